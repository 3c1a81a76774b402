"""Plans that execute a density over the steps of a schedule, some of its first ones being dense."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fidelity_demo import all_kept
from paroattn.block_mask import BlockMask
from paroattn.phases import Phase, phase_at
from paroattn.plan.plan import LayerPlan, TransformerPlan

CLOSE = 1e-3
TRIES, SCALED = 16, 3


def warmup_steps(warmup: float, steps: int) -> int:
    """How many of the first steps are dense."""
    return math.ceil(warmup * steps - 1e-9)


def executed(plan: TransformerPlan, levels: Sequence[float]) -> float:
    """Video density over steps at these noise levels."""
    density = plan.phase_density()
    return float(sum(density[phase_at(plan.phases, level)] for level in levels) / len(levels))


def tuned(make: Callable[[float], TransformerPlan], density: float, levels: Sequence[float]) -> TransformerPlan:
    """The plan that executes a density over steps at these noise levels, or the closest that was found.

    Phases have densities of their own and hold other shares of a longer schedule, so what a plan executes is not what
    it was made for.
    """
    wanted, low, high, found = density, 0.0, 1.0, []
    for tries in range(TRIES):
        plan = make(wanted)
        got = executed(plan, levels)
        found.append((abs(got - density), tries, plan))
        if found[-1][0] <= CLOSE:
            break
        low, high = (wanted, high) if got < density else (low, wanted)
        scaled = wanted * density / got
        wanted = scaled if tries < SCALED and low < scaled < high else (low + high) / 2
    return min(found)[2]


def warmed(plan: TransformerPlan, levels: Sequence[float], dense: int) -> TransformerPlan:
    """The plan with every block kept in the first so many steps of a schedule, as a phase of its own."""
    if dense == 0:
        return plan
    later = [phase_at(plan.phases, level) for level in levels[dense:]]
    rest = sorted(set(later))
    phases = (
        Phase((levels[dense - 1] + levels[dense]) / 2, dense / len(levels)),
        *(Phase(plan.phases[each].lowest_noise, later.count(each) / len(levels)) for each in rest),
    )

    def longer(layer: LayerPlan, full: LayerPlan) -> LayerPlan:
        bits = torch.cat([full.mask.bits[:1], layer.mask.bits[rest]])
        precision = tuple(layer.precision[each] for each in (0, *rest))
        return replace(layer, mask=BlockMask(bits, layer.mask.key_blocks, plan.block), precision=precision)

    everything = all_kept(plan)
    layers = {name: longer(layer, everything.layers[name]) for name, layer in plan.layers.items()}
    return replace(plan, phases=phases, layers=layers)
