"""Attention maps before and after reordering: the heads that show best what it does, and a report's section on them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..capture import Statistics
from ..grid import ORDERS
from ..phases import phase_at
from ..plan.plan import TransformerPlan
from .markup import Markup, section, tag
from .pictures import RAMP, map_picture
from .video import data_uri
from .wording import percent, times


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """One head's attention before and after reordering.

    Attributes:
        layer, head: Which head.
        order: The order chosen for it.
        before: Block mass in the model's own order, (Nq, Nk): share of a query block's attention on a key block.
        after: The same in the chosen order.
        kept: Kept blocks in the chosen order, bool, the shape of `after`.
    """

    layer: str
    head: int
    order: str
    before: Tensor
    after: Tensor
    kept: Tensor

    def __post_init__(self):
        if self.before.ndim != 2 or self.after.ndim != 2 or self.kept.shape != self.after.shape:
            shapes = [tuple(part.shape) for part in (self.before, self.after, self.kept)]
            raise ValueError(f"maps must be 2-D, kept like after; got before, after and kept of shapes {shapes}")

    @property
    def density(self) -> float:
        return self.kept.double().mean().item()

    @property
    def mass_kept(self) -> float:
        """Share of the attention that lies in kept blocks."""
        after = self.after.double()
        return (after[self.kept.bool()].sum() / after.sum()).item()


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


def maps_section(maps: Sequence[AttentionMap]) -> Markup:
    """Heads before and after reordering, all on one scale."""
    if not maps:
        return Markup()
    low = 0.1 / max(part.after.shape[1] for part in maps)
    high = max(float(values.max()) for part in maps for values in (part.before, part.after))
    scale = (low, max(high, 10 * low))
    lead = (
        "One pixel is one block: brightness is the share of a query block's attention (row) that falls on a key block "
        "(column), on a logarithmic scale. The order gathers what a head reads into few blocks; flat grey blocks are "
        "skipped."
    )
    heads = tag("div", *(_panels(part, scale) for part in maps), class_="heads")
    return section("Attention before and after reordering", lead, _ramp(*scale), heads)


def _ramp(low: float, high: float) -> Markup:
    ticks = (f"≤ {percent(low, 2)}", percent(math.sqrt(low * high), 1), percent(high))
    strip = tag("div", style=f"background: linear-gradient(90deg, {', '.join(RAMP)})")
    label = f"Colour scale, logarithmic, from {ticks[0]} to {ticks[2]}"
    return tag(
        "div",
        strip,
        tag("p", *(tag("span", t) for t in ticks), class_="small"),
        class_="ramp",
        role="img",
        aria_label=label,
    )


def _panels(part: AttentionMap, scale: tuple[float, float]) -> Markup:
    name = f"{part.layer}, head {part.head}"
    share = f"{percent(part.density)} of the blocks, {percent(part.mass_kept, 1)} of the attention"
    panels = (
        (f"Model's order, {ORDERS[0]}", part.before, None),
        (f"Order {times(part.order)}", part.after, None),
        (f"Kept: {share}", part.after, part.kept),
    )
    figures = []
    for label, values, kept in panels:
        picture = data_uri(map_picture(values, kept, scale), "image/png")
        image = tag("img", class_="map", alt=f"{name}: {label}", src=picture)
        figures.append(tag("figure", image, tag("figcaption", label)))
    return tag("div", tag("h3", name), tag("div", *figures, class_="trio"), class_="head")
