"""How much an attention error matters for the finished sample: blocks are dropped in one phase, or layer, at a time.

A predicted error says what one attention loses of its own output. What becomes of it by the end depends on when it
happens, and where: an error at high noise changes what the sample shows, one at low noise a texture. No formula knows;
a few generations tell:

    every prompt is generated with all blocks, and again with the blocks of one phase dropped at density 0.3
    weight of a phase = squared difference of the latents / predicted error of what was dropped

With layers, one at a time as well; the weight of a block is then that of its phase times that of its layer.

The predicted error of dropped blocks is too small, and weights make up for it; that of rounding is as measured. Where
INT4 is an option, every prompt is therefore generated once more with all blocks and all heads in INT4, and errors of
rounding have a weight of their own, as a factor on the others.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..capture import Statistics
from ..capture.measured import ROUNDED
from ..plan.plan import Plan, TransformerPlan
from ..plan.ranking import Ranking
from ..plan.search import PlanSettings, make_plan, predicted_error
from .apply import apply, remove
from .collecting import check_prompts
from .generate import run
from .processes import each_some, group

Place = int | str
"""A phase by its number, a layer by its path, or `IN_INT4`."""
Probe = tuple[str, Place]
"""A component of the pipeline, and what is done to it."""
SENSITIVITIES = ("none", "phases", "layers")
PROBE_DENSITY = 0.3
IN_INT4 = "all heads in INT4"
"""Instead of a phase or layer: all blocks are kept then."""
SMALLEST = 1e-6
"""Of the largest weight; a phase that seems to matter not at all was too short to tell."""


def check_sensitivity(what: str, seeds: int = 1) -> None:
    """Check what is to be measured, and on how many samples.

    Raises:
        ValueError: If it is unknown, or on none.
    """
    if what not in SENSITIVITIES:
        raise ValueError(f"sensitivity must be one of {', '.join(SENSITIVITIES)}; got {what!r}")
    if seeds < 1:
        raise ValueError(f"sensitivity needs at least 1 seed of every prompt; got {seeds}")


def measure_sensitivity(
    pipe: Any,
    measured: Mapping[str, Statistics],
    prompts: str | Sequence[str],
    *,
    what: str = "phases",
    seeds: int = 1,
    settings: PlanSettings | None = None,
    steps: int,
    precision: str | None = None,
    seed: int = 0,
    impl: str = "auto",
    progress: Callable[[float], None] = lambda share: None,
    **call: Any,
) -> None:
    """Measure weights of phases, and of layers, and keep them in the statistics; joined processes share the runs.

    Args:
        pipe: The pipeline that was calibrated.
        measured: Its statistics, from `collect`.
        prompts: As there; a sample of each is generated once for every phase, once for every layer if asked, and once
            more.
        what: "phases", "layers" for both, or "none".
        seeds: Samples of every prompt. Single ones differ by a factor of two and more; their geometric mean counts.
        settings: How the blocks that are dropped are chosen. If heads may be in INT4 by them, what that does to the
            sample is measured too.
        precision: Of the attention meanwhile; that of `settings` by default. The transformer's own is best.
        impl: Which attention runs meanwhile, see `paroattn.attention`.
        steps, seed, call: As in `calibrate`.
        progress: Called with the share of the work done, 0…1.

    Raises:
        ValueError: If `what` is unknown, `seeds` is below 1, or the pipeline makes something that is not finite.
    """
    check_sensitivity(what, seeds)
    if what == "none":
        return
    settings = settings or PlanSettings()
    probes = _Probes(measured, settings, precision or settings.each_precision, what)
    samples = list(enumerate(check_prompts(prompts) * seeds))
    total, done = len(samples) * (1 + len(probes.all)), 0

    def latents(number: int, prompt: str, probe: Probe | None) -> Tensor:
        nonlocal done
        planned = probe is not None and probe[1] == IN_INT4
        apply(pipe, probes.plan(probe), precision=None if planned else precision, impl=impl, even_if_slower=True)
        try:
            output = run(pipe, prompt, seed + number, steps=steps, output_type="latent", **call)
        finally:
            remove(pipe)
        done += group()[1]
        progress(min(1.0, done / total))
        return _tensor(output).float().cpu()

    errors: dict[Probe, list[float]] = {probe: [] for probe in probes.all}
    for number, prompt in samples:
        exact, *changed = each_some([None, *probes.all], partial(latents, number, prompt))
        for probe, other in zip(probes.all, changed, strict=True):
            errors[probe].append(_difference(other, exact, prompt))
    for name, statistics in measured.items():
        probes.note(name, statistics, {place: _typical(each) for (own, place), each in errors.items() if own == name})


class _Probes:
    """The plans under which samples are generated.

    Args:
        measured: Statistics by component.
        settings: How the blocks that are dropped are chosen.
        own: Precision of heads that are not in INT4.
        what: "phases" or "layers".

    Attributes:
        all: All probes.
    """

    def __init__(self, measured: Mapping[str, Statistics], settings: PlanSettings, own: str, what: str):
        changes = {"precision": settings.each_precision, "int4_share": None}
        self._own = own
        self._settings = settings.at(PROBE_DENSITY, budget="layer_normalised", sensitivity=False, **changes)
        self._dropping = {name: make_plan(each, self._settings) for name, each in measured.items()}
        self._whole = {name: _limited(plan, lambda layer, phase: False) for name, plan in self._dropping.items()}
        also = [IN_INT4] if settings.may_be_int4 else []
        self.all = [(name, place) for name, plan in self._dropping.items() for place in [*_places(plan, what), *also]]

    def plan(self, probe: Probe | None) -> Plan:
        """What a probe changes, and all blocks of everything else; all blocks alone for None."""
        if probe is None:
            return Plan(self._whole)
        name, place = probe
        if place == IN_INT4:
            forms = dict.fromkeys(self._whole, self._own) | {name: "int4"}
            return Plan({each: _all_in(self._whole[each], form) for each, form in forms.items()})
        changed = _limited(self._dropping[name], lambda layer, phase: place in (layer, phase))
        return Plan(self._whole | {name: changed})

    def note(self, name: str, statistics: Statistics, found: Mapping[Place, float]) -> None:
        """Keep weights in the statistics of a component, from what every probe of it did to the samples."""
        dropped = {place: error for place, error in found.items() if place != IN_INT4}
        plan = self._dropping[name]
        _note(statistics, plan, dropped, predicted_error(statistics, plan, self._settings))
        if IN_INT4 in found:
            _note_rounding(statistics, plan, found[IN_INT4])


def _difference(other: Tensor, exact: Tensor, prompt: str) -> float:
    """Squared difference of two latents, as a share of the power of the exact ones."""
    error = float((other - exact).square().mean() / exact.square().mean())
    if not math.isfinite(error):
        raise ValueError(f"the pipeline's latents must be finite; {prompt!r} gave NaN or infinity")
    return error


def _places(plan: TransformerPlan, what: str) -> list[Place]:
    """Where blocks are dropped one after another: in a phase, or in a layer."""
    return [*range(len(plan.phases)), *(plan.layers if what == "layers" else ())]


def _limited(plan: TransformerPlan, dropping: Callable[[str, int], bool]) -> TransformerPlan:
    """The plan with all blocks kept but where `dropping` says so."""
    everything = BlockMask.full(plan.heads, plan.grid.tokens, plan.block).bits
    layers = {}
    for name, layer in plan.layers.items():
        phases = range(len(plan.phases))
        bits = torch.stack([layer.mask.bits[phase] if dropping(name, phase) else everything for phase in phases])
        layers[name] = replace(layer, mask=BlockMask(bits, layer.mask.key_blocks, plan.block))
    return replace(plan, layers=layers)


def _note(statistics: Statistics, plan: TransformerPlan, found: Mapping[Place, float], predicted: Tensor) -> None:
    """Turn differences of latents into weights; predicted errors are (layers, phases), by share of the steps."""
    phases = torch.tensor([found[place] for place in range(len(plan.phases))], dtype=torch.float64)
    weights = _positive(phases / predicted.sum(0))
    levels = {level: float(weights[plan.phase_at(level)]) for level in statistics.noise_levels}
    layers = {}
    if any(isinstance(place, str) for place in found):
        each = torch.tensor([found[name] for name in plan.layers], dtype=torch.float64)
        expected = predicted @ weights
        factors = _positive(each / expected)
        factors *= expected.sum() / (factors * expected).sum()
        layers = dict(zip(plan.layers, factors.tolist(), strict=True))
    statistics.level_weights, statistics.layer_weights = levels, layers
    statistics.note()


def _note_rounding(statistics: Statistics, plan: TransformerPlan, found: float) -> None:
    """Turn the difference of latents that INT4 makes into a weight, if what it costs each head was measured."""
    statistics.rounding_weight = None
    ranking = Ranking(statistics, {}, plan.phases, PlanSettings(PROBE_DENSITY), "cpu")
    costs = [ranking.rounding(layer) for layer in statistics.layers]
    predicted = sum(float(cost[ROUNDED.index("int4")].sum()) for cost in costs if cost is not None)
    if predicted > 0 and found > 0 and all(cost is not None for cost in costs):
        statistics.rounding_weight = found / predicted
    statistics.note()


def _all_in(plan: TransformerPlan, precision: str) -> TransformerPlan:
    """The plan with every head in one precision."""
    every = ((precision,) * plan.heads,) * len(plan.phases)
    return replace(plan, layers={name: replace(layer, precision=every) for name, layer in plan.layers.items()})


def _positive(weights: Tensor) -> Tensor:
    weights = weights.nan_to_num(0.0, posinf=0.0)
    largest = weights.max()
    return weights.clamp_min(SMALLEST * float(largest)) if largest > 0 else torch.ones_like(weights)


def _typical(errors: Sequence[float]) -> float:
    """Geometric mean, since single samples may go to quite another picture."""
    return math.exp(sum(math.log(max(error, 1e-30)) for error in errors) / len(errors))


def _tensor(output: Any) -> Tensor:
    """Latents that a pipeline returned for output_type="latent"."""
    found = output.frames if hasattr(output, "frames") else output.images
    return found if isinstance(found, Tensor) else torch.as_tensor(found)
