"""Makes a plan from a few prompts: runs the pipeline dense, feeds the capture, and plans."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import CaptureSettings, Statistics
from ..files import check_writable, writing_folder
from ..grid import Grid, Layout, TextSpan
from ..kernels.attention import OWN_PRECISION
from ..kernels.block_stats import block_stats
from ..plan.plan import COMPONENTS, HUB_ID, Plan, own_config
from ..plan.search import PlanSettings, make_plan
from .apply import recording
from .generate import run
from .models import self_attentions

STEPS = 10
LOUD = 1024
"""Input that makes a weight much larger than the bias beside it, which 16-bit numbers would round away."""


def calibrate(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    density: float | None = None,
    steps: int = STEPS,
    precision: str | None = None,
    capture: CaptureSettings | None = None,
    settings: PlanSettings | None = None,
    statistics: str | os.PathLike | None = None,
    seed: int = 0,
    impl: str = "auto",
    progress: Callable[[float], None] | None = None,
    **call: Any,
) -> Plan:
    """Make a plan for a pipeline from one or two prompts.

    Every prompt is generated once, dense, on a short schedule. Statistics of prompts, guidance branches and the steps
    of a phase are averaged: a block matters as much as it does on average, and one odd prompt cannot take the budget.

    Args:
        pipe: A diffusers pipeline with a known transformer.
        prompts: Calibration prompts.
        density: Kept video blocks over all, above 0 and at most 1; that of `settings`, 0.25, by default.
        steps: Steps of the calibration schedule.
        precision: Precision of every head; that of `settings`, or the transformer's own dtype, by default.
        capture: What to measure; what `settings` needs, on every query row, by default.
        settings: What else the plan should be.
        statistics: Folder to keep the statistics in, one sub-folder per transformer, for other plans later.
        seed: Seed of the first prompt; the next ones count up.
        impl: How attention maps are measured: "torch", "triton", or "auto", by device; see `block_stats`.
        progress: Called with the share of the work done, 0…1; a progress bar by default.
        call: Passed on to the pipeline, such as height, width, num_frames, guidance_scale.

    Returns:
        A plan for every transformer of the pipeline that ran.

    Raises:
        ValueError: If there is no prompt or a setting is out of range, before the model runs.

    Source:
        PAROAttention (arXiv 2506.16054): static plans from one or two prompts; scores and budget are ours.
    """
    settings = settings or PlanSettings()
    settings = replace(settings, precision=precision or settings.precision or own_precision(pipe))
    settings = settings if density is None else replace(settings, density=density)
    capture = capture or needed_by(settings)
    settings.check_measured(capture)
    if capture.block_stride > 1:
        raise ValueError(
            f"block_stride must be 1 to make a plan, since a mask needs all query blocks; got {capture.block_stride}. "
            "`collect` measures a sample, from which orders can be chosen."
        )
    if statistics is not None:
        check_writable(statistics, COMPONENTS)
    measured = collect(pipe, prompts, steps=steps, capture=capture, seed=seed, impl=impl, progress=progress, **call)
    if statistics is not None:
        save_statistics(measured, statistics)
    return Plan({name: make_plan(each, settings) for name, each in measured.items()})


def needed_by(settings: PlanSettings, **changes: Any) -> CaptureSettings:
    """The least that a calibration must measure for such a plan."""
    orders = tuple(dict.fromkeys(("FHW", *settings.orders)))
    return CaptureSettings(orders=orders, paper=settings.order_score == "paper", **changes)


def save_statistics(measured: Mapping[str, Statistics], folder: str | os.PathLike) -> None:
    """Write statistics as a folder with one sub-folder per transformer, all of it or nothing."""
    with writing_folder(folder, COMPONENTS) as target:
        for name, each in measured.items():
            each.save(target / name)


def load_statistics(folder: str | os.PathLike) -> dict[str, Statistics]:
    """Read what `save_statistics` wrote.

    Raises:
        ValueError: If the folder holds no statistics, or damaged ones.
    """
    found = [name for name in COMPONENTS if (Path(folder) / name / "statistics.json").is_file()]
    if not found:
        raise ValueError(
            f"{folder} holds no statistics: expected {COMPONENTS[0]}/statistics.json in it. Calibrate first."
        )
    return {name: Statistics.load(Path(folder) / name) for name in found}


def collect(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    steps: int = STEPS,
    capture: CaptureSettings | None = None,
    seed: int = 0,
    impl: str = "auto",
    progress: Callable[[float], None] | None = None,
    **call: Any,
) -> dict[str, Statistics]:
    """Run the pipeline dense and measure its attention maps; arguments as in `calibrate`.

    Returns:
        Statistics by component name ("transformer", "transformer_2").
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError(f"calibration needs at least one prompt, none of them empty; got {prompts}")
    if steps < 1:
        raise ValueError(f"steps must be 1 or more; got {steps}")
    transformers = transformers_of(pipe)
    made = {"prompts": prompts, "steps": steps, "seed": seed, "call": {k: v for k, v in call.items() if _is_plain(v)}}
    with ExitStack() as stack:
        report = progress or stack.enter_context(progress_bar(f"calibrating on {len(prompts)} prompts"))
        collector = _Collector(capture or CaptureSettings(), steps, len(prompts), impl, report)
        for name, transformer in transformers.items():
            stack.enter_context(recording(pipe, collector.observer(name), transformer=transformer))
        for index, prompt in enumerate(prompts):
            collector.prompt = index
            run(pipe, prompt, seed + index, steps=steps, output_type="latent", **call)
    made["model"] = _name_on_hub(pipe)
    for name, each in collector.statistics.items():
        measured = {"capture": asdict(each.settings), "noise_levels": each.noise_levels}
        each.made = made | measured | {"component": name, "config": own_config(transformers[name])}
    return collector.statistics


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's transformers by component name.

    Raises:
        ValueError: If it has none.
    """
    found = {name: getattr(pipe, name, None) for name in COMPONENTS}
    modules = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
    if not modules:
        raise ValueError(f"a pipeline with a {' or '.join(COMPONENTS)} is needed; got {type(pipe).__name__}")
    return modules


def own_precision(pipe: Any) -> str:
    """The transformer's own dtype as a precision.

    Raises:
        ValueError: If attention cannot run in that dtype.
    """
    transformer: Any = next(iter(transformers_of(pipe).values()))
    if transformer.dtype not in OWN_PRECISION:
        known = ", ".join(map(str, OWN_PRECISION))
        raise ValueError(f"the transformer's dtype must be one of {known}; got {transformer.dtype}")
    return OWN_PRECISION[transformer.dtype]


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[float], None]]:
    """A bar on standard error that takes the share of the work done, 0…1."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=1.0)
        yield lambda done: progress.update(task, completed=done)


class _Collector:
    """Turns recorded calls into statistics of each transformer."""

    def __init__(
        self, settings: CaptureSettings, steps: int, prompts: int, impl: str, progress: Callable[[float], None]
    ):
        self.settings, self.steps, self.prompts, self.progress = settings, steps, prompts, progress
        self.measure = partial(block_stats, impl=impl)
        self.statistics: dict[str, Statistics] = {}
        self.seen: set[tuple[int, float]] = set()
        self.prompt = 0

    def observer(self, component: str) -> Callable[..., None]:
        def observe(
            layer: str, attention: nn.Module, q: Tensor, k: Tensor, v: Tensor,
            noise_level: float | None, branch: str | None, grid: Grid | None, text: TextSpan, transformer: nn.Module,
        ) -> None:  # fmt: skip
            if grid is None or noise_level is None:
                raise ValueError(
                    f"calibration must know the grid and the noise level of every call; got {grid} and {noise_level}. "
                    "Calibrate a pipeline with a scheduler, at a resolution its ModelSpec understands."
                )
            statistics = self.statistics.get(component)
            if statistics is None:
                heads, head_dim = q.shape[2:]
                layout = Layout(grid, text)
                statistics = Statistics(type(transformer).__name__, heads, head_dim, layout, self.settings)
                statistics.check_size(len(self_attentions(transformer)), self.steps)
                self.statistics[component] = statistics
            if grid != statistics.layout.grid:
                raise ValueError(
                    f"all calls of a calibration must have one grid; got {statistics.layout.grid} and {grid}. "
                    "Calibrate each size by itself."
                )
            w_o = output_projection(transformer, layer, attention, q.dtype)
            with _layout(statistics, Layout(grid, text)):  # the length of the text may differ from call to call
                statistics.add(layer, q, k, v, w_o, noise_level, self.measure)
            self.seen.add((self.prompt, noise_level))
            self.progress(min(1.0, len(self.seen) / (self.steps * self.prompts)))

        return observe


@contextmanager
def _layout(statistics: Statistics, layout: Layout) -> Iterator[None]:
    usual, statistics.layout = statistics.layout, layout
    try:
        yield
    finally:
        statistics.layout = usual


def output_projection(transformer: nn.Module, layer: str, attention: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Output projection of each head for the video, (H, D, channels).

    Blocks with one stream project attention and feed-forward together, attention first. Weights in a quantised form are
    read through the layer, in `dtype`.
    """
    projection: Any = getattr(attention, "to_out", None)
    if projection is None:
        projection = transformer.get_submodule(layer.rpartition(".")[0]).proj_out
    if isinstance(projection, nn.ModuleList | nn.Sequential):
        projection = projection[0]
    weight: Any = projection.weight
    if type(weight) not in (Tensor, nn.Parameter) or weight.ndim != 2 or not weight.is_floating_point():
        weight = _through(projection, attention.inner_dim, weight.device, dtype)
    return weight.detach()[:, : attention.inner_dim].mT.unflatten(0, (attention.heads, -1))


@torch.no_grad()
def _through(linear: Any, inputs: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Weights of the first inputs, (channels, inputs), from what a layer makes of each alone."""
    unit = torch.eye(inputs, linear.in_features, device=device, dtype=dtype)
    return ((linear(unit * LOUD) - linear(torch.zeros_like(unit[:1]))) / LOUD).mT


def _name_on_hub(pipe: Any) -> str | None:
    """Id of the repository that the pipeline was loaded from; a folder of this machine is nobody else's business."""
    name = getattr(getattr(pipe, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | None)
