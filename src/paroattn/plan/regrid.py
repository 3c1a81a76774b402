"""Carries a plan's masks to another grid where the statistics that it was made from are gone.

Every head keeps its order and, in every phase, its density. A new block is worth the share of its pairs of tokens whose
old counterparts were kept, and the blocks worth most are kept. Statistics laid over the
new grid (`capture.regrid`) say more than masks do; neither has seen the model there.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..capture.regrid import Resampling
from ..grid import Grid
from .plan import CARRIED, LayerPlan, Plan, TransformerPlan
from .threshold import select


def plan_for_grid(plan: Plan, grid: Grid) -> Plan:
    """Every transformer's plan on another grid, from `for_grid`."""
    return Plan({name: for_grid(part, grid) for name, part in plan.items()})


def for_grid(plan: TransformerPlan, grid: Grid) -> TransformerPlan:
    """Carry a plan to another grid, at the density of every head and phase; see `TransformerPlan.for_grid`."""
    if not isinstance(grid, Grid):
        raise TypeError(f"a plan is carried to a Grid, such as Grid(13, 30, 45); got {grid!r}")
    if grid == plan.grid:
        return plan
    orders = {order for layer in plan.layers.values() for order in layer.orders}
    resamplings = {order: Resampling(plan.grid, grid, order, plan.block) for order in orders}
    layers = {name: _carried(layer, resamplings, plan.block) for name, layer in plan.layers.items()}
    return replace(plan, grid=grid, layers=layers, made=noted(plan.made, plan.grid))


def noted(made: Mapping[str, Any], grid: Grid) -> dict[str, Any]:
    """How a plan was made, with the grid it was carried from."""
    return {**made, CARRIED: [*made.get(CARRIED, ()), str(grid)]}


def _carried(layer: LayerPlan, resamplings: dict[str, Resampling], block: tuple[int, int]) -> LayerPlan:
    heads = zip(layer.orders, layer.mask.bits.unbind(1), strict=True)
    found = [masks(bits, layer.mask.key_blocks, resamplings[order]) for order, bits in heads]
    return replace(layer, mask=BlockMask.from_dense(torch.stack(found, 1), block))


def masks(bits: Tensor, key_blocks: int, resampling: Resampling) -> Tensor:
    """Kept new blocks of a head in each phase, bool (phases, Nq, Nk), from packed old ones (phases, Nq, bytes)."""
    found = []
    for phase in bits:
        old = BlockMask(phase[None], key_blocks, (1, 1)).dense()[0]
        worth = resampling(old) + resampling.nearness
        worth.scatter_(-1, worth.argmax(-1, keepdim=True), torch.inf)
        density = float(old.double().mean())
        ((_, kept),) = select(("",), (1,), lambda *_, worth=worth: worth[None].clone(), density)
        found.append(kept[0, 0])
    return torch.stack(found)
