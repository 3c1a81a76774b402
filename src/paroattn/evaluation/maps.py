"""Picks the heads whose attention maps show best what reordering does."""

from collections.abc import Sequence

from ..capture import Statistics
from ..phases import phase_at
from ..plan.plan import TransformerPlan
from .report import AttentionMap


def instructive_maps(statistics: Statistics, plan: TransformerPlan, count: int = 4) -> list[AttentionMap]:
    """The heads that gain most from reordering in the last phase, one for each chosen order first.

    Args:
        statistics: Of the calibration that the plan was made from, with "FHW" among its orders.
        plan: The plan.
        count: How many heads.
    """
    ranked = sorted(_maps(statistics, plan), key=_gain, reverse=True)
    first_of_order = list({each.order: each for each in reversed(ranked)}.values())
    firsts = sorted(first_of_order, key=_gain, reverse=True)
    return (firsts + [each for each in ranked if each not in firsts])[:count]


def _maps(statistics: Statistics, plan: TransformerPlan) -> Sequence[AttentionMap]:
    orders = statistics.settings.orders
    maps, last = [], len(plan.phases) - 1
    levels = [level for level in statistics.noise_levels if phase_at(plan.phases, level) == last]
    for name, layer in plan.layers.items():
        mass, kept = statistics.mean(name, "mass", levels), layer.mask.dense()[last]
        for head, order in enumerate(layer.orders):
            before, after = mass[orders.index("FHW"), head], mass[orders.index(order), head]
            maps.append(AttentionMap(name, head, order, before, after, kept[head]))
    return maps


def _gain(each: AttentionMap) -> float:
    """Attention in the kept blocks beyond what as many blocks could hold in the model's own order."""
    most = each.before.flatten().topk(int(each.kept.sum())).values.sum() / each.before.sum()
    return each.mass_kept - float(most)
