"""The verbs: put a plan on a model and take it off again, run dense in between, record what layers see, and report."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..grid import Layout
from ..kernels.library import IMPLEMENTATIONS
from ..plan.plan import COMPONENTS, Plan, PlanError, TransformerPlan, own_config
from ..precision import Precision
from .backend import Call, Observer
from .hook import PlanHook, hook_of
from .models import head_size, self_attentions
from .ranks import ranks_of
from .report import Report, describe


def apply(
    target: Any,
    plan: Plan | TransformerPlan,
    *,
    strict: bool = True,
    precision: str | Precision | None = None,
    impl: str = "auto",
    even_if_slower: bool = False,
) -> None:
    """Run a model's self-attentions by a plan, until `remove`.

    Args:
        target: A diffusers pipeline, or one transformer with a TransformerPlan.
        plan: What was calibrated.
        strict: Raise before the first block if a call does not fit the plan. False runs such calls dense, with one
            warning and a line in the report.
        precision: Instead of the plan's, for all heads.
        impl: Which implementation runs, see `paroattn.attention`.
        even_if_slower: Follow the plan in layers too that dense attention is predicted to serve faster on this GPU.
            By default these run dense, with a warning and their reason in the report. Only GPUs whose times are known
            predict anything, and an `impl` that is named runs in any case.

    Raises:
        PlanError: If the plan does not fit the model; the model is unchanged.
        ValueError: If the model is unknown, split other than with Ulysses, or carries a plan already; or if a setting
            is unknown.
        TypeError: If target or plan are of another kind.
    """
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be auto or one of {', '.join(IMPLEMENTATIONS)}; got {impl!r}")
    transformers, pipeline = targets_of(target)
    plans = _plans(transformers, pipeline, plan, strict)
    settings: dict[str, Any] = {
        "strict": strict,
        "precision": precision and Precision.parse(precision),
        "impl": impl,
        "even_if_slower": even_if_slower,
    }
    for name, part in plans.items():
        _check_free(transformers[name])
        sizes = {layer: head_size(attn) for layer, attn in self_attentions(transformers[name]).items()}
        part.check_fits(type(transformers[name]).__name__, sizes, own_config(transformers[name]))
        ranks = ranks_of(transformers[name])
        if ranks is not None:
            ranks.check_heads(part.heads)
    hooks = {name: PlanHook(transformers[name], pipeline, part, **settings) for name, part in plans.items()}
    for name, hook in hooks.items():
        hook.install(transformers[name])


def remove(target: Any) -> None:
    """Undo `apply`: the original processors come back and nothing else stays.

    Raises:
        ValueError: If no plan is applied, or the model is split in a way that its own attention does not know.
    """
    applied = _applied(target).values()
    for transformer, _ in applied:
        if ranks_of(transformer) is not None and getattr(transformer, "_cp_plan", None) is None:
            raise ValueError(
                f"the own attention of a {type(transformer).__name__} needs whole sequences; this one is split. Use "
                "paroattn.dense, or load it again."
            )
    for transformer, hook in applied:
        hook.uninstall(transformer)


@contextmanager
def dense(target: Any) -> Iterator[None]:
    """Run the layers of an applied plan dense inside the block.

    Raises:
        ValueError: If no plan is applied.
    """
    hooks = [hook for _, hook in _applied(target).values()]
    for hook in hooks:
        hook.dense_depth += 1
    try:
        yield
    finally:
        for hook in hooks:
            hook.dense_depth -= 1


@contextmanager
def recording(target: Any, observer: Callable[..., None], *, transformer: nn.Module | None = None) -> Iterator[None]:
    """Run dense and show an observer what every layer's self-attention sees.

    Args:
        target: A diffusers pipeline or one transformer, without a plan.
        observer: Called as observer(layer, attn, q, k, v, noise_level, branch, grid, text, transformer) before each
            attention: module path and module, q, k, v (B, N, H, D) after RoPE, noise level or None, name of the
            guidance branch or None, sequence, and the model it belongs to. Padded text is cut off; batch elements with
            different numbers of real tokens are shown one after another.
        transformer: Watch only this one of the pipeline's.

    Raises:
        ValueError: If the model is unknown, split over devices, or carries a plan already.
    """
    found, pipeline = targets_of(target)
    watched = [each for each in found.values() if transformer is None or unwrapped(transformer) is each]
    if not watched:
        raise ValueError(f"the transformer to watch must be the pipeline's {' or '.join(found)}; got another one")
    for each in watched:
        _check_free(each)
        if ranks_of(each) is not None:
            raise ValueError(
                "what layers see is recorded of whole models; this one is split by enable_parallelism. Load it "
                "without, and give every process other prompts."
            )
    hooks = [PlanHook(each, pipeline, observer=_observing(each, observer)) for each in watched]
    for each, hook in zip(watched, hooks, strict=True):
        hook.install(each)
    try:
        yield
    finally:
        for each, hook in zip(watched, hooks, strict=True):
            if hook_of(each) is hook:
                hook.uninstall(each)


def set_noise_level(target: Any, noise_level: float | None) -> None:
    """Say at which noise level the coming calls run, where no scheduler can tell.

    Args:
        target: What `apply` or `recording` was given.
        noise_level: σ for flow matching, √(1−ᾱ) for variance-preserving schedulers; None asks the scheduler again.

    Raises:
        ValueError: If no plan is applied, or the level is not within 0…1.
    """
    if noise_level is not None and not 0 <= noise_level <= 1:
        raise ValueError(f"a noise level must be within 0…1; got {noise_level}. Give σ, or √(1−ᾱ), not the timestep.")
    for _, hook in _applied(target, recording=True).values():
        hook.schedule.given = noise_level


def report(target: Any) -> Report:
    """Say what was executed: density by layer and phase, and dense calls with their reasons.

    Raises:
        ValueError: If no plan is applied.
    """
    return Report({name: describe(transformer, hook) for name, (transformer, hook) in _applied(target).items()})


def _observing(transformer: nn.Module, observer: Callable[..., None]) -> Observer:
    def observe(layer: str, attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, layout: Layout, call: Call) -> None:
        observer(layer, attn, q, k, v, call.noise_level, call.branch, layout.grid, layout.text, transformer)

    return observe


def targets_of(target: Any) -> tuple[dict[str, nn.Module], Any]:
    """Transformers by component name, and the pipeline they came in."""
    pipeline = None if isinstance(target, nn.Module) else target
    found = {name: getattr(target, name, None) for name in COMPONENTS} if pipeline else {COMPONENTS[0]: target}
    found = {name: unwrapped(each) for name, each in found.items() if isinstance(each, nn.Module)}
    if not found:
        raise TypeError(f"a pipeline with a transformer, or a transformer, is needed; got {type(target).__name__}")
    return found, pipeline


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that torch.compile has wrapped."""
    return getattr(module, "_orig_mod", module)


def _plans(transformers: dict[str, nn.Module], pipeline: Any, plan: Any, strict: bool) -> dict[str, TransformerPlan]:
    if isinstance(plan, TransformerPlan) and len(transformers) == 1:
        for transformer in transformers.values():
            _check_expert(transformer, plan)
        return dict.fromkeys(transformers, plan)
    if not isinstance(plan, Plan) or pipeline is None:
        takes = "a Plan" if pipeline is not None else 'a TransformerPlan, such as plan["transformer"],'
        raise TypeError(f"{takes} is needed for {', '.join(transformers)}; got {type(plan).__name__}")
    fitting = {name: plan[name] for name in transformers if name in plan}
    missing = sorted(set(transformers) - set(plan))
    if not fitting or (missing and strict):
        raise PlanError(
            f"the pipeline has {', '.join(transformers)}; the plan has {', '.join(plan)}. Calibrate this pipeline, or "
            "apply with strict=False to leave a transformer that has no plan dense."
        )
    return fitting


def _check_expert(transformer: nn.Module, plan: TransformerPlan) -> None:
    """Two experts have one configuration; a pipeline that loads them leaves their names in the path."""
    loaded_as = Path(getattr(getattr(transformer, "config", None), "_name_or_path", None) or "").name
    if loaded_as in COMPONENTS and plan.component is not None and plan.component != loaded_as:
        raise PlanError(
            f"the plan was made for {plan.component}; this model was loaded as {loaded_as}. Give each transformer its "
            "own part of the plan, or apply to the pipeline."
        )


def _check_free(transformer: nn.Module) -> None:
    hook = hook_of(transformer)
    if hook is not None:
        state = "is being recorded" if hook.plan is None else "has a plan applied"
        raise ValueError(f"the transformer must carry no plan; this one {state}. Call paroattn.remove first.")


def _applied(target: Any, recording: bool = False) -> dict[str, tuple[nn.Module, PlanHook]]:
    hooks = {name: (transformer, hook_of(transformer)) for name, transformer in targets_of(target)[0].items()}
    found = {name: (module, hook) for name, (module, hook) in hooks.items() if hook and (hook.plan or recording)}
    if not found:
        raise ValueError("a plan must be applied; this model carries none. Call paroattn.apply first.")
    return found
