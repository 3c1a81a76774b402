"""Makes a plan from a few prompts: runs the pipeline dense, feeds the capture, and plans."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..capture import CaptureSettings, Statistics
from ..files import check_writable, writing_folder
from ..grid import CANDIDATES
from ..kernels.attention import OWN_PRECISION
from ..plan.cost import rates_of
from ..plan.plan import COMPONENTS, HUB_ID, Plan, own_config
from ..plan.search import DENSITY, PlanSettings, make_plan
from ..plan.workloads import known_model
from .apply import recording, unwrapped
from .collecting import Collector, Economy, StartOver, check_prompts, check_steps, explained
from .generate import check_call, run
from .journal import Journal, described, discard, unfinished
from .models import head_size, self_attentions
from .processes import everyones, group, wait
from .sensitivity import check_sensitivity, measure_sensitivity

STEPS = 10


def calibrate(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    density: float | None = None,
    steps: int = STEPS,
    precision: str | None = None,
    capture: CaptureSettings | None = None,
    settings: PlanSettings | None = None,
    exact: bool | None = None,
    economy: Economy | None = None,
    sensitivity: str = "phases",
    sensitivity_seeds: int = 1,
    statistics: str | os.PathLike | None = None,
    seed: int = 0,
    impl: str = "auto",
    progress: Callable[[float], None] | None = None,
    **call: Any,
) -> Plan:
    """Make a plan for a pipeline from one or two prompts.

    Every prompt is generated once, dense, on a short schedule. Statistics of prompts, seeds, guidance branches and the
    steps of a phase are averaged: a block matters as much as it does on average, and one odd prompt cannot take the
    budget.

    Processes that have joined one torch.distributed group and all call this share the work: each measures some of the
    layers, and runs some of the samples that sensitivity is measured on. They need a file system in common, and all
    return the plan that one process would have made, to the bit.

    Small models are measured whole, in every candidate order. Of large ones, a short run more chooses the orders from
    a sample, and masks are made from a few maps of each layer and step, kept in 8 bits a block.

    Args:
        pipe: A diffusers pipeline with a known transformer; it may be offloaded.
        prompts: Calibration prompts.
        density: Kept video blocks over all, above 0 and at most 1; the target of `settings`, 0.25, by default.
        steps: Steps of the calibration schedule.
        precision: Precision of every head, or "auto" for INT4 or INT8 in each; that of `settings`, or the
            transformer's own dtype, by default.
        capture: What to measure; what `settings` needs, on every query row, by default.
        settings: What else the plan should be.
        exact: Measure everything; by default if that takes at most 1 GiB.
        economy: What to measure otherwise.
        sensitivity: Measure what errors in "phases", or also in "layers", matter for the finished sample, or "none":
            every prompt is generated once more for every phase, for every layer, and with all blocks.
        sensitivity_seeds: Samples of every prompt for that; more weigh phases more surely.
        statistics: Folder to keep the statistics in, one sub-folder per transformer, for other plans later. A
            calibration that was interrupted leaves a folder of this name and ".unfinished", and goes on from there.
        seed: Seed of the first prompt; the next ones count up.
        impl: How attention maps are measured: "torch", "triton", or "auto", by device; see `block_stats`.
        progress: Called with the share of the work done, 0…1, of measuring maps and then of sensitivity; progress
            bars by default.
        call: Passed on to the pipeline, such as height, width, num_frames, guidance_scale.

    Returns:
        A plan for every transformer of the pipeline that ran.

    Raises:
        TypeError, ValueError: If there is no prompt, or a setting is out of range or unknown, before the model runs;
            or if the unfinished calibration is one with other settings.
        OSError: If the disk is full. What was measured before is kept.
        RuntimeError: If memory ends. What was measured before is kept.

    Source:
        PAROAttention (arXiv 2506.16054): static plans from one or two prompts; scores and budget are ours.
    """
    _check_places(call)
    settings = settings or PlanSettings()
    settings = replace(settings, precision=precision or settings.precision or own_precision(pipe))
    settings = settings if density is None else settings.at(density)
    capture = capture or needed_by(settings)
    settings.check_measured(capture)
    check_times(pipe, settings, capture)
    check_sensitivity(sensitivity, sensitivity_seeds)
    if capture.block_stride > 1:
        raise ValueError(
            f"block_stride must be 1 to make a plan, since a mask needs all query blocks; got {capture.block_stride}. "
            "`collect` measures a sample, from which orders can be chosen."
        )
    if statistics is not None:
        check_writable(statistics, COMPONENTS)
    journal = None if statistics is None else unfinished(statistics)
    measured = collect(
        pipe, prompts, steps=steps, capture=capture, settings=settings, exact=exact, economy=economy, journal=journal,
        seed=seed, impl=impl, progress=progress, **call,
    )  # fmt: skip
    with explained(journal), ExitStack() as stack:
        if sensitivity != "none":
            bar = progress or stack.enter_context(progress_bar("measuring sensitivity"))
            measure_sensitivity(
                pipe, measured, prompts, what=sensitivity, seeds=sensitivity_seeds, settings=settings, steps=steps,
                seed=seed, precision=own_precision(pipe), progress=bar, **call,
            )  # fmt: skip
        plan = Plan({name: make_plan(each, settings) for name, each in measured.items()})
        if statistics is not None and group()[0] == 0:
            save_statistics(measured, statistics)
    wait()
    if journal is not None and group()[0] == 0:
        discard(journal)
    return plan


def _check_places(call: Mapping[str, Any]) -> None:
    """No pipeline takes what settings of the plan and of the capture are called."""
    for place, kind in (("settings", PlanSettings), ("capture", CaptureSettings)):
        for name in (field.name for field in fields(kind) if field.name in call):
            raise TypeError(
                f"{name} must be given as {place}={kind.__name__}({name}=…); got it as an argument of its own. "
                f"Import {kind.__name__} from {kind.__module__}."
            )


def check_times(pipe: Any, settings: PlanSettings, capture: CaptureSettings) -> None:
    """Check that times are known that a target speed-up needs.

    Raises:
        ValueError: If they are not.
    """
    if settings.speedup is None:
        return
    rates = rates_of(settings.gpu)
    for transformer in transformers_of(pipe).values():
        attentions = self_attentions(transformer)
        heads, head_dim = head_size(next(iter(attentions.values())))
        precision = settings.each_precision if settings.precision else own_precision(pipe)
        rates.kernel(head_dim, capture.block, precision)
        known_model(type(transformer).__name__, heads, head_dim, len(attentions), own_config(transformer))


def needed_by(settings: PlanSettings, **changes: Any) -> CaptureSettings:
    """The least that a calibration must measure for such a plan."""
    candidates = settings.orders or (() if settings.order_score == "none" else CANDIDATES)
    orders = tuple(dict.fromkeys(("FHW", *candidates)))
    by_mass = "mass" in (settings.order_score, settings.mask_score)
    return CaptureSettings(orders=orders, paper=settings.order_score == "paper", whole_mass=by_mass, **changes)


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
    if not Path(folder).parent.is_dir():
        raise ValueError(
            f"statistics lie in the folder that a calibration wrote; got {str(Path(folder).parent)!r}, "
            "which is no folder. Check the path."
        )
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
    settings: PlanSettings | None = None,
    exact: bool | None = None,
    economy: Economy | None = None,
    journal: str | os.PathLike | None = None,
    seed: int = 0,
    impl: str = "auto",
    progress: Callable[[float], None] | None = None,
    **call: Any,
) -> dict[str, Statistics]:
    """Run the pipeline dense and measure its attention maps; arguments as in `calibrate`.

    Args:
        pipe, prompts, steps, capture, exact, economy, seed, impl, progress, call: As in `calibrate`.
        settings: The plan that orders are chosen for, where not everything is measured.
        journal: Folder that always holds what was measured. An interrupted calibration goes on from there, and the
            statistics that are returned stay in it.

    Returns:
        Statistics by component name ("transformer", "transformer_2").

    Raises:
        ValueError: As `calibrate`, or if the journal is that of another calibration.
        OSError, RuntimeError: As `calibrate`.
    """
    prompts, transformers = check_prompts(prompts), transformers_of(pipe)
    check_steps(steps)
    check_call(pipe, call)
    settings, economy = settings or PlanSettings(), economy or Economy()
    capture = capture or CaptureSettings()
    exact = True if capture.block_stride > 1 else exact
    what = {"prompts": prompts, "steps": steps, "seed": seed}
    orders = {name: getattr(settings, name) for name in ("order_score", "mask_score", "orders")}
    made = what | {"call": {k: v for k, v in call.items() if _is_plain(v)}, "model": _name_on_hub(pipe)}
    asked = what | {
        "call": call, "models": {name: _told_apart(each) for name, each in transformers.items()},
        "capture": asdict(capture), "orders": {"density": settings.density or DENSITY} | orders,
        "economy": asdict(economy), "measured": exact, "impl": impl,
    }  # fmt: skip
    folder, scratch = _place(journal)
    with ExitStack() as stack:
        stack.enter_context(explained(folder))
        report = progress or stack.enter_context(progress_bar(f"calibrating on {len(prompts)} prompts"))
        kept = _journal(folder, asked, exact)
        collector = Collector(
            transformers, len(prompts), steps, capture, settings, economy, kept, made, impl, report, scratch
        )  # fmt: skip
        for name, transformer in transformers.items():
            observer = partial(collector.observe, name)
            stack.enter_context(recording(pipe, observer, transformer=transformer))
        for each in collector.runs():
            try:
                run(pipe, prompts[each.prompt], seed + each.prompt, steps=each.steps, output_type="latent", **call)
            except StartOver:
                _free(pipe)
                continue
            collector.finish()
        report(1.0)
        return collector.result()


def _journal(folder: Path | None, asked: Mapping[str, Any], exact: bool | None) -> Journal:
    """What is remembered of this calibration; runs that another process has not finished count as not finished."""
    kept = Journal(folder, described(asked), exact)
    everywhere = everyones({group()[0]: kept.done}).values()
    kept.done = [name for name in kept.done if all(name in done for done in everywhere)]
    return kept


def _place(journal: str | os.PathLike | None) -> tuple[Path | None, Any]:
    """Where this process keeps what it measures, and the temporary folder around it: several need one each."""
    own, processes = group()
    if journal is not None:
        return Path(journal) / f"{own}-of-{processes}" if processes > 1 else Path(journal), None
    scratch = tempfile.TemporaryDirectory(prefix="paroattn-") if processes > 1 else None
    return scratch and Path(scratch.name), scratch


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's transformers by component name, without what torch.compile has wrapped around them.

    Raises:
        ValueError: If it has none.
    """
    found = {name: getattr(pipe, name, None) for name in COMPONENTS}
    modules = {name: unwrapped(module) for name, module in found.items() if isinstance(module, nn.Module)}
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


def _told_apart(transformer: Any) -> dict[str, Any]:
    """What tells one model from another without reading its weights."""
    loaded = getattr(getattr(transformer, "config", None), "_name_or_path", None)
    kind, dtype = type(transformer).__name__, str(transformer.dtype)
    return {"class": kind, "dtype": dtype, "loaded": loaded, "config": own_config(transformer)}


def _free(pipe: Any) -> None:
    """Offload what the run that was broken off has loaded."""
    if hasattr(pipe, "maybe_free_model_hooks"):
        pipe.maybe_free_model_hooks()


def _name_on_hub(pipe: Any) -> str | None:
    """Id of the repository that the pipeline was loaded from; a folder of this machine is nobody else's business."""
    name = getattr(getattr(pipe, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | None)
