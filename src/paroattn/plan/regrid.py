"""Carries a plan to another grid: every head keeps its order, and its mask is resampled from blocks to blocks.

The new grid is laid over the old one, so that each of its tokens stands where an old token was. A new block is worth
the share of its pairs of tokens whose old places were kept together, and every head keeps the blocks worth most, as
many as at its old density. Nobody has seen the model's attention on the new grid: what that loses is not known.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..block_mask import BlockMask, blocks_of
from ..grid import Grid, token_order
from .plan import LayerPlan, Plan, TransformerPlan
from .threshold import select

CARRIED = "carried_from"
NEARNESS = 1e-4
"""Of two new blocks worth the same, the nearer to the diagonal is kept; one more pair of tokens outweighs that."""


def plan_for_grid(plan: Plan, grid: Grid) -> Plan:
    """Every transformer's plan on another grid, from `for_grid`."""
    return Plan({name: for_grid(part, grid) for name, part in plan.items()})


def for_grid(plan: TransformerPlan, grid: Grid) -> TransformerPlan:
    """Carry a plan to another grid, at the density of every head and phase; see `TransformerPlan.for_grid`."""
    if grid == plan.grid:
        return plan
    orders = {order for layer in plan.layers.values() for order in layer.orders}
    maps = {order: _Resampling(plan.grid, grid, order, plan.block) for order in orders}
    layers = {name: _carried(layer, maps, plan.block) for name, layer in plan.layers.items()}
    made = {**plan.made, CARRIED: [*plan.made.get(CARRIED, ()), str(plan.grid)]}
    return replace(plan, grid=grid, layers=layers, made=made)


def _carried(layer: LayerPlan, maps: dict[str, "_Resampling"], block: tuple[int, int]) -> LayerPlan:
    heads = zip(layer.orders, layer.mask.bits.unbind(1), strict=True)
    found = [torch.stack(list(maps[order].masks(bits, layer.mask.key_blocks))) for order, bits in heads]
    return replace(layer, mask=BlockMask.from_dense(torch.stack(found, 1), block))


class _Resampling:
    """From the blocks of one grid to those of another, both in one order."""

    def __init__(self, old: Grid, new: Grid, order: str, block: tuple[int, int]):
        places = _old_places(old, new, order)
        self.rows, self.columns = (_shares(places, old.tokens, size) for size in block)
        row, column = (_centres(each.shape[0]) for each in (self.rows, self.columns))
        self.nearness = NEARNESS * (1 - (row[:, None] - column).abs())

    def masks(self, bits: Tensor, key_blocks: int) -> Iterator[Tensor]:
        """Kept new blocks of a head in each phase, bool (Nq, Nk), from packed old ones (phases, Nq, bytes)."""
        for phase in bits:
            old = BlockMask(phase[None], key_blocks, (1, 1)).dense()[0]
            worth = self.worth(old) + self.nearness
            worth.scatter_(-1, worth.argmax(-1, keepdim=True), torch.inf)
            density = float(old.double().mean())
            ((_, kept),) = select(("",), (1,), lambda *_, worth=worth: worth[None].clone(), density)
            yield kept[0, 0]

    def worth(self, old: Tensor) -> Tensor:
        """Share of the pairs of tokens in every new block that an old mask (Nq, Nk) keeps, float32."""
        by_row = torch.sparse.mm(self.rows, old.float())
        return torch.sparse.mm(self.columns, by_row.T.contiguous()).T.contiguous()


def _old_places(old: Grid, new: Grid, order: str) -> Tensor:
    """For the new tokens in their order, where in its order the old token stood that lies under each, (tokens,)."""
    under = [((torch.arange(size) + 0.5) * was / size).long() for was, size in zip(old, new, strict=True)]
    frames, height, width = torch.meshgrid(*under, indexing="ij")
    token = (frames * old.height + height) * old.width + width
    return token_order(old, order).argsort()[token.flatten()[token_order(new, order)]]


def _shares(places: Tensor, old_tokens: int, block: int) -> Tensor:
    """How much of every new block lies over every old one, sparse (new blocks, old blocks) float32, rows sum to 1."""
    new_blocks, old_blocks = blocks_of(len(places), block), blocks_of(old_tokens, block)
    of_token = torch.arange(len(places)) // block
    counts = torch.bincount(of_token * old_blocks + places // block, minlength=new_blocks * old_blocks)
    counts = counts.view(new_blocks, old_blocks).double()
    return (counts / counts.sum(-1, keepdim=True)).float().to_sparse()


def _centres(count: int) -> Tensor:
    """Middles of so many equal parts of 0…1."""
    return (torch.arange(count) + 0.5) / count
