"""Plans without a calibration, for timing: every head attends locally, and heads differ in density as real ones do.

A head has a length of attention along each axis of the video. Its order makes the axis along which it is most local the
slowest, and it keeps the blocks that are nearest to each other in units of those lengths. Densities spread over the
heads of a layer as they do over the bundled model's heads at the same mean. Every layer has that mean, so that blocks
of a model take the same time and times of few blocks tell those of many.
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
    0.1: (0.0169, 0.0649, 0.1113, 0.1362, 0.1784),
    0.2: (0.0329, 0.1474, 0.1896, 0.2584, 0.3606),
    0.3: (0.1225, 0.2032, 0.2802, 0.3857, 0.5359),
    0.4: (0.1587, 0.2459, 0.3901, 0.4961, 0.7253),
    0.5: (0.1956, 0.2950, 0.5040, 0.6376, 0.9354),
    0.7: (0.2858, 0.4624, 0.7301, 0.9584, 1.0000),
}
"""Quantiles of head density, over layers, phases and heads, in plans of the bundled model that do not weigh phases, by
their mean. The heads of each phase of the plan that ships, which does, spread like that around the phase's own mean."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
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
    """A plan of one phase, on the host; `density` is that of the video's blocks, and 1 keeps all of them.

    `device` is where the nearest blocks are looked for.
    """
    return TransformerPlan(
        model_class, heads, head_dim, grid, text, block, (Phase(0.0, 1.0),),
        {name: _layer(seed, heads, grid, density, block, precision, device) for seed, name in enumerate(layers)},
        {"synthetic": {"density": density}},
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
    found = _quantiles(density, torch.linspace(0, 1, heads, dtype=torch.float64))
    for _ in range(20):  # few quantiles have another mean than the whole spread
        found = (found * density / found.mean()).clamp_max(1.0)
    return found


def layer_densities(density: float, heads: int, generator: torch.Generator) -> Tensor:
    """Densities of a layer's heads in the model's order, (heads,) float64: the same ones, shuffled."""
    return head_densities(density, heads)[torch.randperm(heads, generator=generator)]


def _quantiles(density: float, shares: Tensor) -> Tensor:
    """Density below which a share of the bundled model's heads is, at a mean between or beside those of `BUNDLED`."""
    means = torch.tensor([0.0, *BUNDLED, 1.0], dtype=torch.float64)
    known = torch.tensor([[0.0] * 5, *BUNDLED.values(), [1.0] * 5], dtype=torch.float64)
    at = int(torch.searchsorted(means, density)) - 1
    part = (density - means[at]) / (means[at + 1] - means[at])
    low, *middle, high = torch.lerp(known[at], known[at + 1], part).tolist()
    ends = [low - (middle[0] - low) / 4, low, *middle, high, min(1.0, high + (high - middle[-1]) / 4)]
    values = torch.tensor(ends, dtype=torch.float64).clamp_min(low / 2)
    places = torch.tensor([0.0, *QUANTILES, 1.0], dtype=torch.float64)
    i = torch.searchsorted(places, shares).clamp(1, len(places) - 1)
    return torch.lerp(values[i - 1], values[i], (shares - places[i - 1]) / (places[i] - places[i - 1]))


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
    shares = layer_densities(density, heads, generator)
    low, high = (math.log(length) for length in LENGTHS)
    lengths = (torch.rand(heads, 3, generator=generator) * (high - low) + low).exp()  # along F, H and W
    orders = tuple("".join("FHW"[axis] for axis in each.argsort().tolist()) for each in lengths)
    units = lengths * torch.tensor([*grid], dtype=torch.float32)
    kept = _nearest(orders, units, shares, grid, block, seed, torch.device(device))
    return LayerPlan(orders, BlockMask.from_dense(kept[None].cpu(), block), ((precision,) * heads,))


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
