"""What a planned layer hands to the operation besides q, k and v, phase by phase, in one process or on one of many."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..grid import Layout
from ..kernels.attention import HeadGroup
from ..kernels.resident import ResidentGroups, ResidentMask
from ..plan.plan import LayerPlan
from ..precision import Precision
from .ranks import Ranks

Precisions = Precision | str | tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Operands:
    """What a layer hands to the operation besides q, k and v; of several ranks, each those of its own heads.

    Attributes:
        mask: Kept blocks of the whole sequence.
        table: Gather tables of the plan's orders, shared by all layers.
        order: Row of `table` for each head, (H,).
        precision: One name if all heads agree, else one per head.
        groups: Heads of each precision, if they differ and all of them are here.
        heads: Heads of every rank, (ranks, heads of each); None for one process, as `places`.
        sizes: Tokens of every rank.
        places: Where the model's positions lie after the exchange, (tokens,).
        parts: The same for each part of the own heads, if they are exchanged in parts.
    """

    mask: BlockMask
    table: Tensor
    order: Tensor
    precision: Precisions
    groups: tuple[HeadGroup, ...] = ()
    heads: Tensor | None = None
    sizes: tuple[int, ...] = ()
    places: Tensor | None = None
    parts: "tuple[Operands, ...]" = ()


class Followed:
    """Operands of one layer for one layout and device, of the phase that is followed.

    Args:
        plan: The layer's.
        order: Row of `table` for each head, (H,), on the host.
        table: As in `Operands`.
        layout: The sequence that reaches the layer.
        device: Where q, k and v will be.
        ranks: The ranks that share the sequence, if it is shared.
        launch_order: Whether kernels will ask for `BlockMask.launch_order`.
        mixed: Whether heads have the precisions of the plan, so that they may differ.
    """

    def __init__(
        self, plan: LayerPlan, order: Tensor, table: Tensor, layout: Layout, device: torch.device, ranks: Ranks | None,
        *, launch_order: bool, mixed: bool,
    ):  # fmt: skip
        tokens = layout.grid.tokens, layout.text.tokens

        def resident(mask: BlockMask) -> ResidentMask:
            return ResidentMask(mask, tokens, device, launch_order=launch_order)

        self.operands: Operands | None = None
        self._table, self._layout, self._ranks = table, layout, ranks
        self._order = order.to(device) if ranks is None else order
        self._groups: ResidentGroups | None = None
        self._dealt: list[list[Tensor]] = []
        if ranks is not None:  # whose heads are others in every phase: no groups
            self._dealt = dealt_heads(plan.mask, ranks)
            self._masks = [resident(_own(plan.mask, phases, ranks.rank)) for phases in self._dealt]
            return
        self._masks = [resident(plan.mask)]
        if mixed and any(len(set(heads)) > 1 for heads in plan.precision):
            self._groups = ResidentGroups(plan.precision, plan.mask, self._order, tokens, launch_order=launch_order)

    def follow(self, phase: int, precision: Precisions) -> Operands:
        """Those of a phase; the same object until another phase is followed."""
        masks = [mask.follow(phase) for mask in self._masks]
        if self.operands is None or self.operands.mask is not masks[0]:
            self.operands = self._made(phase, masks, precision)
        return self.operands

    def _made(self, phase: int, masks: Sequence[BlockMask], precision: Precisions) -> Operands:
        if self._ranks is None:
            groups = self._groups.follow(phase) if self._groups else ()
            return Operands(masks[0], self._table, self._order, precision, groups)
        sizes, places = self._ranks.sizes(self._layout), self._ranks.places(self._layout).to(self._table.device)
        found = []
        for mask, phases in zip(masks, self._dealt, strict=True):
            own = phases[phase][self._ranks.rank].tolist()
            names = tuple(precision[head] for head in own) if isinstance(precision, tuple) else precision
            order, heads = self._order[own].to(places.device), phases[phase].to(places.device)
            found.append(Operands(mask, self._table, order, names, (), heads, sizes, places))
        return replace(found[0], parts=tuple(found[1:]))


def dealt_heads(mask: BlockMask, ranks: Ranks) -> list[list[Tensor]]:
    """Heads of every rank, (ranks, heads of each), for each phase of a layer's masks: all, then those of each part."""
    by_phase = []
    for phase in range(len(mask.bits)):
        parts = ranks.deal(mask[phase])
        by_phase.append(parts if len(parts) == 1 else [torch.cat(parts, 1), *parts])
    return [list(phases) for phases in zip(*by_phase, strict=True)]


def _own(mask: BlockMask, dealt: Sequence[Tensor], rank: int) -> BlockMask:
    """Masks of all phases, of the heads of one rank."""
    own = [bits[heads[rank].to(bits.device)] for bits, heads in zip(mask.bits, dealt, strict=True)]
    return BlockMask(torch.stack(own), mask.key_blocks, mask.block)
