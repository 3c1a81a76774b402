"""Makes a plan from a few prompts: runs the pipeline dense, feeds the capture, and plans."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import CaptureSettings, Statistics
from ..grid import Grid, Layout, TextSpan
from ..kernels.block_stats import block_stats
from ..plan.plan import COMPONENTS, Plan
from ..plan.search import PlanSettings, make_plan
from .apply import recording
from .generate import run

STEPS = 10


def calibrate(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    density: float = 0.25,
    steps: int = STEPS,
    precision: str | None = None,
    capture: CaptureSettings | None = None,
    settings: PlanSettings | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
    **call: Any,
) -> Plan:
    """Make a plan for a pipeline from one or two prompts.

    Every prompt is generated once, dense, on a short schedule. Statistics of prompts, guidance branches and the steps
    of a phase are averaged: a block matters as much as it does on average, and one odd prompt cannot take the budget.

    Args:
        pipe: A diffusers pipeline with a known transformer.
        prompts: Calibration prompts.
        density: Kept video blocks over all, above 0 and at most 1.
        steps: Steps of the calibration schedule.
        precision: Precision of every head; the transformer's own dtype by default.
        capture: What to measure.
        settings: What else the plan should be; `density` and `precision` above take precedence.
        seed: Seed of the first prompt; the next ones count up.
        progress: Called with the share of the work done, 0…1.
        call: Passed on to the pipeline, such as height, width, num_frames, guidance_scale.

    Returns:
        A plan for every transformer of the pipeline that ran.

    Raises:
        ValueError: If there is no prompt or a setting is out of range, before the model runs.

    Source:
        PAROAttention (arXiv 2506.16054): static plans from one or two prompts; scores and budget are ours.
    """
    precision = precision or own_precision(pipe)
    settings = replace(settings or PlanSettings(), density=density, precision=precision)
    statistics = collect(pipe, prompts, steps=steps, capture=capture, seed=seed, progress=progress, **call)
    return Plan({name: make_plan(each, settings) for name, each in statistics.items()})


def collect(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    steps: int = STEPS,
    capture: CaptureSettings | None = None,
    seed: int = 0,
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
    collector = _Collector(capture or CaptureSettings(), steps * len(prompts), progress)
    made = {"prompts": prompts, "steps": steps, "seed": seed, "call": {k: v for k, v in call.items() if _is_plain(v)}}
    with ExitStack() as stack:
        for name, transformer in transformers_of(pipe).items():
            stack.enter_context(recording(pipe, collector.observer(name), transformer=transformer))
        for index, prompt in enumerate(prompts):
            collector.prompt = index
            run(pipe, prompt, seed + index, steps=steps, output_type="latent", **call)
    for each in collector.statistics.values():
        each.made = made | {"capture": asdict(each.settings), "noise_levels": each.noise_levels}
    return collector.statistics


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's transformers by component name."""
    found = {name: getattr(pipe, name, None) for name in COMPONENTS}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def own_precision(pipe: Any) -> str:
    """The transformer's own dtype as a precision."""
    names = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    dtype = next(iter(transformers_of(pipe).values())).dtype
    if dtype not in names:
        raise ValueError(f"the transformer's dtype must be one of {', '.join(map(str, names))}; got {dtype}")
    return names[dtype]


class _Collector:
    """Turns recorded calls into statistics of each transformer."""

    def __init__(self, settings: CaptureSettings, steps: int, progress: Callable[[float], None] | None):
        self.settings, self.steps, self.progress = settings, steps, progress
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
                self.statistics[component] = statistics
            statistics.add(layer, q, k, v, output_projection(attention, q.shape[2]), noise_level, block_stats)
            self.seen.add((self.prompt, round(noise_level, 5)))
            if self.progress is not None:
                self.progress(min(1.0, len(self.seen) / self.steps))

        return observe


def output_projection(attention: Any, heads: int) -> Tensor:
    """Output projection of each head, (H, D, channels)."""
    return attention.to_out[0].weight.detach().mT.unflatten(0, (heads, -1))


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | None)
