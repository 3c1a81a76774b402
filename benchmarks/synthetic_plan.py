"""Plans without a calibration, for timing: every head attends locally, and heads differ in density as real ones do.

A head has a length of attention along each axis of the video. Its order makes the axis along which it is most local the
slowest, and it keeps the blocks that are nearest to each other in units of those lengths. How densities spread over the
heads of a layer follows the bundled model's plans: a beta distribution of the stated mean and one concentration. Every
layer has the same mean, so that blocks of a model take the same time and times of few blocks tell those of many.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from paroattn.block_mask import BlockMask, blocks_of
from paroattn.grid import Grid, TextSpan, token_order
from paroattn.phases import Phase
from paroattn.plan.plan import LayerPlan, TransformerPlan

BUNDLED = {
    0.3: (0.1225, 0.2032, 0.2802, 0.3857, 0.5359),
}
"""5, 25, 50, 75 and 95 % quantiles of head density in the bundled model's plans, by their mean."""
CONCENTRATION = 12.0
"""Of the beta distribution; fitted to `BUNDLED`."""
LENGTHS = (0.03, 1.0)
"""Shortest and longest length of attention along an axis, as a share of it."""
JITTER = 0.3
"""How much kept blocks stray from the nearest ones, as a share of a distance."""


def synthetic_plan(
    model_class: str,
    layers: Sequence[str],
    heads: int,
    head_dim: int,
    grid: Grid,
    text: TextSpan,
    *,
    density: float,
    block: tuple[int, int],
    precision: str = "bf16",
    device: torch.device | str = "cpu",
) -> TransformerPlan:
    """A plan of one phase; `density` is that of the video's blocks, and 1 keeps all of them."""
    return TransformerPlan(
        model_class, heads, head_dim, grid, text, block, (Phase(0.0, 1.0),),
        {name: _layer(seed, heads, grid, density, block, precision, device) for seed, name in enumerate(layers)},
        {"synthetic": {"density": density, "concentration": CONCENTRATION}},
    )  # fmt: skip


def head_densities(density: float, heads: int) -> Tensor:
    """Densities of a layer's heads, rising, (heads,) float64: evenly spaced quantiles with the stated mean.

    Raises:
        ValueError: If the density is not above 0 and at most 1.
    """
    if not 0 < density <= 1:
        raise ValueError(f"the density must be above 0 and at most 1; got {density}")
    if density == 1:
        return torch.ones(heads, dtype=torch.float64)
    x = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    share = ((density * CONCENTRATION - 1) * x.log() + ((1 - density) * CONCENTRATION - 1) * (-x).log1p()).exp()
    share = share.cumsum(0) / share.sum()
    wanted = (torch.arange(heads, dtype=torch.float64) + 0.5) / heads
    found = x[torch.searchsorted(share, wanted).clamp_max(len(x) - 1)]
    for _ in range(20):  # few quantiles have another mean than the distribution
        found = (found * density / found.mean()).clamp_max(1.0)
    return found


def _layer(
    seed: int,
    heads: int,
    grid: Grid,
    density: float,
    block: tuple[int, int],
    precision: str,
    device: torch.device | str,
) -> LayerPlan:
    generator = torch.Generator().manual_seed(seed)
    shares = head_densities(density, heads)[torch.randperm(heads, generator=generator)]
    low, high = (math.log(length) for length in LENGTHS)
    lengths = (torch.rand(heads, 3, generator=generator) * (high - low) + low).exp()  # along F, H and W
    orders = tuple("".join("FHW"[axis] for axis in each.argsort().tolist()) for each in lengths)
    units = lengths * torch.tensor([*grid], dtype=torch.float32)
    kept = _nearest(orders, units, shares, grid, block, seed, torch.device(device))
    return LayerPlan(orders, BlockMask.from_dense(kept[None], block), ((precision,) * heads,))


def _nearest(
    orders: tuple[str, ...],
    units: Tensor,
    shares: Tensor,
    grid: Grid,
    block: tuple[int, int],
    seed: int,
    device: torch.device,
) -> Tensor:
    """The nearest blocks of every head, as many as its share, bool (heads, Nq, Nk)."""
    rows, columns = (blocks_of(grid.tokens, size) for size in block)
    generator = torch.Generator(device).manual_seed(seed)
    own = torch.arange(rows, device=device) * block[0] // block[1]  # the key block in which a query block begins
    kept = torch.zeros(len(orders), rows * columns, dtype=torch.bool, device=device)
    for head, (order, share) in enumerate(zip(orders, shares.tolist(), strict=True)):
        queries, keys = (_centres(grid, order, size).to(device) / units[head].to(device) for size in block)
        distance = torch.cdist(queries, keys)
        distance *= 1 + JITTER * torch.rand(distance.shape, generator=generator, device=device)
        distance.scatter_(1, own[:, None], -1.0)
        count = max(rows, round(share * rows * columns))
        kept[head].scatter_(0, distance.flatten().argsort()[:count], True)
    return kept.view(-1, rows, columns)


@cache
def _centres(grid: Grid, order: str, size: int) -> Tensor:
    """Mean place (frame, row, column) of every block of tokens in an order, (blocks, 3)."""
    tokens = token_order(grid, order)
    places = torch.stack(
        [tokens // (grid.height * grid.width), tokens // grid.width % grid.height, tokens % grid.width]
    )
    return torch.stack([part.float().mean(1) for part in places.split(size, 1)])
