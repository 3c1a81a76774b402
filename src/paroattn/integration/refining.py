"""Refines a plan's masks: runs the model by the plan, sees what each block does to the error, and chooses anew.

A round generates clips dense and records what the transformer was given and what it made of it. Every call is then made
again by the plan, and the squared difference of its results is differentiated: with one backward pass that yields the
effect of every block, kept or dropped (`kernels.presence`), with all that errors do to each other on the way. Calls are
those of the dense clips, so each is a small problem of its own, and no gradient passes from step to step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..capture import Statistics
from ..plan.plan import Plan
from ..plan.search import PlanSettings, block_scores
from ..plan.values import BlockValues, Place
from .apply import apply, dense, remove, set_noise_level
from .calibrate import STEPS, progress_bar, transformers_of
from .collecting import check_prompts, check_steps
from .generate import check_call, run
from .hook import hook_of


@dataclass(frozen=True)
class Refinement:
    """How much a refinement looks at.

    Attributes:
        rounds: How often masks are chosen anew.
        clips: Clips that are generated for each round.
        checkpointing: Compute the activations of a block anew for its gradient instead of keeping them, which needs
            less memory and takes longer.
    """

    rounds: int = 16
    clips: int = 8
    checkpointing: bool = True

    def __post_init__(self):
        if min(self.rounds, self.clips) < 1:
            raise ValueError(f"rounds and clips must be 1 or more; got {self.rounds} and {self.clips}")

    def step(self, number: int) -> float:
        """How far values move in a round, 0…1: the prediction counts like a quarter of all rounds."""
        return 1 / (1 + self.rounds / 4 + number)


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A dense call of a transformer."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    noise_level: float | None
    result: Tensor


class _Seen:
    """Presences of one round, by layer and phase, and the errors they are of, by phase."""

    def __init__(self, query_blocks: int, key_blocks: int):
        self.rows, self.columns = query_blocks, key_blocks
        self.presences: dict[Place, Tensor] = {}
        self.errors: dict[int, float] = {}

    def note(self, layer: str, phase: int, presence: Tensor) -> None:
        found = presence.sum(0)[:, : self.rows, : self.columns].cpu()
        before = self.presences.get((layer, phase))
        self.presences[layer, phase] = found if before is None else before.add_(found)

    def relative(self) -> dict[Place, Tensor]:
        """Presences over the error of their phase; phases without an error have nothing to teach."""
        return {
            place: found / self.errors[place[1]] for place, found in self.presences.items() if self.errors[place[1]] > 0
        }


def refine(
    pipe: Any,
    plan: Plan,
    measured: Mapping[str, Statistics],
    prompts: str | Sequence[str],
    *,
    refinement: Refinement | None = None,
    steps: int = STEPS,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
    **call: Any,
) -> Plan:
    """Choose a plan's masks anew by the error that the model really makes; densities and orders stay.

    Every clip costs its dense generation and, for each call of a transformer in it, a forward and a backward pass.
    Weights are not changed. More prompts are better than few: two bring about two thirds of what many bring.

    Args:
        pipe: The pipeline that was calibrated; it carries no plan.
        plan: What to start from.
        measured: The statistics that the plan was made from, by component.
        prompts: Taken in turns, clip by clip.
        refinement: How much to look at.
        steps: Inference steps of every clip.
        seed: Of the first clip; the next ones count up.
        progress: Called with the share of the work done, 0…1; a progress bar by default.
        call: Passed on to the pipeline, such as height, width, num_frames, guidance_scale.

    Returns:
        A plan of the same density in every phase.

    Raises:
        ValueError: If there is no prompt, the statistics lack a component or an order, or the pipeline carries a plan.
        PlanError: If the plan does not fit the pipeline.
    """
    prompts, refinement = check_prompts(prompts), refinement or Refinement()
    check_steps(steps)
    if missing := sorted(set(plan) - set(measured)):
        raise ValueError(f"the statistics of {', '.join(plan)} are needed; got none of {', '.join(missing)}")
    values = {
        name: BlockValues(part, block_scores(measured[name], part, _settings(part))) for name, part in plan.items()
    }
    models = {name: each for name, each in transformers_of(pipe).items() if name in plan}
    check_call(pipe, call)

    def look(first: int, report: Callable[[float], None]) -> dict[str, _Seen]:
        """What the plan as it is now does to some clips."""
        seen = {name: _Seen(*_blocks(each.plan)) for name, each in values.items()}
        for clip in range(first, first + refinement.clips):
            with dense(pipe), _recording(models) as recorded:
                run(pipe, prompts[clip % len(prompts)], seed + clip, steps=steps, output_type="latent", **call)
            for name, calls in recorded.items():
                for each in calls:
                    _replay(pipe, models[name], each, seen[name])
            report((clip + 1) / (refinement.rounds * refinement.clips))
        return seen

    with ExitStack() as stack:
        report = progress or stack.enter_context(progress_bar("refining"))
        stack.enter_context(_differentiable(models.values(), refinement.checkpointing))
        for number in range(refinement.rounds):
            apply(pipe, Plan({name: each.plan for name, each in values.items()}), even_if_slower=True)
            try:
                seen = look(number * refinement.clips, report)
            finally:
                remove(pipe)
            for name, found in seen.items():
                values[name].learn(found.relative(), refinement.step(number))
    how = {"refined": asdict(refinement) | {"prompts": len(prompts), "steps": steps, "seed": seed}}
    return Plan({name: replace(each.plan, made={**each.plan.made, **how}) for name, each in values.items()})


def _settings(plan: Any) -> PlanSettings:
    """How the plan's blocks were scored."""
    made = plan.made.get("settings", {})
    known = {name: made[name] for name in ("mask_score", "budget", "sensitivity") if name in made}
    return PlanSettings(**known)


def _blocks(plan: Any) -> tuple[int, int]:
    mask = next(iter(plan.layers.values())).mask
    return mask.query_blocks, mask.key_blocks


@contextmanager
def _differentiable(models: Any, checkpointing: bool) -> Iterator[None]:
    """No weight takes a gradient meanwhile, and blocks compute their activations anew if asked."""
    models = list(models)
    weights = [weight for model in models for weight in model.parameters() if weight.requires_grad]
    switched = [model for model in models if checkpointing and _can_checkpoint(model)]
    for weight in weights:
        weight.requires_grad_(False)
    for model in switched:
        model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for model in switched:
            model.disable_gradient_checkpointing()
        for weight in weights:
            weight.requires_grad_(True)


def _can_checkpoint(model: Any) -> bool:
    return getattr(model, "_supports_gradient_checkpointing", False) and not model.is_gradient_checkpointing


@contextmanager
def _recording(models: Mapping[str, nn.Module]) -> Iterator[dict[str, list[_Recorded]]]:
    """Record every call of the transformers, by component."""
    recorded: dict[str, list[_Recorded]] = {name: [] for name in models}
    levels: dict[nn.Module, float | None] = {}
    names = {model: name for name, model in models.items()}

    def before(model: nn.Module, args: tuple, kwargs: dict) -> None:
        hook: Any = hook_of(model)
        levels[model] = hook.call.noise_level

    def after(model: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        arguments, keywords = tree_map_only(Tensor, torch.clone, (args, kwargs))
        recorded[names[model]].append(_Recorded(arguments, keywords, levels[model], _tensor(out).clone()))

    handles = [model.register_forward_pre_hook(before, with_kwargs=True) for model in names]
    handles += [model.register_forward_hook(after, with_kwargs=True) for model in names]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _replay(pipe: Any, model: nn.Module, recorded: _Recorded, seen: _Seen) -> None:
    """Make a call by the plan, and add the effect of every block on its squared error to what was seen."""
    hook: Any = hook_of(model)
    phase = 0 if recorded.noise_level is None else hook.plan.phase_at(recorded.noise_level)
    set_noise_level(pipe, recorded.noise_level)
    hook.presence = seen.note
    try:
        with torch.enable_grad():
            made = _tensor(model(*recorded.arguments, **recorded.keywords))
            error = (made.float() - recorded.result.float()).square().sum()
            error.backward()
    finally:
        hook.presence = hook.call = None
        set_noise_level(pipe, None)
    seen.errors[phase] = seen.errors.get(phase, 0.0) + float(error.detach())


def _tensor(out: Any) -> Tensor:
    """What a transformer returns, as a tuple or as diffusers' output."""
    return out[0]
