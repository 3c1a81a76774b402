"""Lays what was measured by blocks on one grid over another grid, where nobody has measured.

Attention looks at offsets: so many frames back, so many tokens to the side. A new pair of tokens stands for an old one
with the same offset in tokens, as near as that can be to the same place of the video; offsets that no old pair has
become the largest that one has. A new block is the mean over a sample of its pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..block_mask import blocks_of
from ..grid import Grid, token_order
from .statistics import Statistics

SAMPLE = (4, 4)
"""Queries and keys of a block that stand for all of it."""
AT_ONCE = 2**22
NEARNESS = 1e-4
"""Of two new blocks worth the same, the nearer to the diagonal counts more."""


class Resampling:
    """From the blocks of one grid to those of another, both read in one order.

    Args:
        old, new: The grids.
        order: In which tokens are read.
        block: Tokens of a query block and of a key block.
        device: Where maps are.
    """

    def __init__(self, old: Grid, new: Grid, order: str, block: tuple[int, int], device: torch.device | str = "cpu"):
        self.old, self.columns = old, blocks_of(old.tokens, block[1])
        place = token_order(old, order).argsort()
        self._block_of = tuple((place // size).to(device) for size in block)
        here = _coordinates(new)[token_order(new, order)].to(device)
        self._queries, self._keys = (_sample(here, size, count) for size, count in zip(block, SAMPLE, strict=True))
        scale = torch.tensor([was / size for was, size in zip(old, new, strict=True)], device=device)
        self._under = ((self._queries + 0.5) * scale).long()
        self._last = torch.tensor([size - 1 for size in old], device=device)

    def __call__(self, maps: Tensor) -> Tensor:
        """Maps (…, old Nq, old Nk) of one head or several on the new grid, (…, new Nq, new Nk) float32."""
        flat = maps.flatten(-2).float()
        rows = [flat[..., pairs].mean((-1, -3)) for pairs in self._pairs]
        return torch.cat(rows, -2)

    @cached_property
    def nearness(self) -> Tensor:
        """What makes the nearer of two equal blocks count more, (Nq, Nk)."""
        row, column = (_centres(len(each), each.device) for each in (self._queries, self._keys))
        return NEARNESS * (1 - (row[:, None] - column).abs())

    @cached_property
    def _pairs(self) -> list[Tensor]:
        """Old blocks that the sampled pairs of each new one stand for, by some rows: (rows, queries, Nk, keys)."""
        size = self._keys.shape[0] * self._keys.shape[1] * self._queries.shape[1]
        step = max(1, AT_ONCE // size)
        parts = zip(self._queries.split(step), self._under.split(step), strict=True)
        return [self._old_blocks(queries, under) for queries, under in parts]

    def _old_blocks(self, queries: Tensor, under: Tensor) -> Tensor:
        offset = self._keys - queries[:, :, None, None]
        offset = torch.minimum(torch.maximum(offset, -self._last), self._last)
        lowest, highest = (-offset).clamp_min(0), self._last - offset.clamp_min(0)
        query = torch.minimum(torch.maximum(under[:, :, None, None], lowest), highest)
        places = (query, query + offset)
        row, column = (table[self._token(each)] for table, each in zip(self._block_of, places, strict=True))
        return (row * self.columns + column).to(torch.int32)

    def _token(self, at: Tensor) -> Tensor:
        return (at[..., 0] * self.old.height + at[..., 1]) * self.old.width + at[..., 2]


@dataclass
class RegriddedStatistics(Statistics):
    """Statistics of another grid, laid over this one's whenever they are asked for.

    Attributes:
        measured: What was measured, on the other grid.
    """

    measured: Any = None

    def mean(
        self, layer: str, name: str, levels: Sequence[float] | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """As `Statistics.mean`, of this grid."""
        found = self.measured.mean(layer, name, levels, device)
        return self._laid(layer, found) if found.ndim == 4 else found

    def rounding(self, layer: str, levels: Sequence[float] | None = None) -> Tensor | None:
        """As measured: what a head's rounding costs, over what its layer puts out, is taken to be the same here."""
        return self.measured.rounding(layer, levels)

    def heaviest(self, layer: str, levels: Sequence[float] | None = None, device: torch.device | str = "cpu") -> Tensor:
        """As `Statistics.heaviest`: the key block that most pairs of a row find to have been the heaviest."""
        places = self.measured.heaviest(layer, levels, device)
        columns = blocks_of(self.measured.layout.grid.tokens, self.settings.block[1])
        return self._laid(layer, torch.nn.functional.one_hot(places, columns), near=True).argmax(-1)

    def _laid(self, layer: str, maps: Tensor, near: bool = False) -> Tensor:
        """Maps (orders, H, Nq, Nk) on this grid."""
        heads = range(maps.shape[1])
        names = [self.chosen[layer]] if self.chosen else [(order,) * len(heads) for order in self.settings.orders]
        rows = [torch.stack([self._one(maps[i, h], names[i][h], near) for h in heads]) for i in range(len(names))]
        return torch.stack(rows)

    def _one(self, found: Tensor, order: str, near: bool) -> Tensor:
        key = (order, found.device)
        if key not in self._resamplings:
            old, new = self.measured.layout.grid, self.layout.grid
            self._resamplings[key] = Resampling(old, new, order, self.settings.block, found.device)
        laid = self._resamplings[key](found)
        return laid + self._resamplings[key].nearness if near else laid

    @cached_property
    def _resamplings(self) -> dict[Any, Resampling]:
        return {}


def regridded(statistics: Statistics, grid: Grid) -> Statistics:
    """Statistics as they may be on another grid; those of the same grid are as they are.

    Raises:
        ValueError: If not all query blocks were measured.
    """
    if statistics.settings.block_stride > 1:
        raise ValueError("statistics of all query blocks are needed for another grid. Calibrate with block_stride=1.")
    if grid == statistics.layout.grid:
        return statistics
    same = {name: getattr(statistics, name) for name in _SAME}
    return RegriddedStatistics(layout=replace(statistics.layout, grid=grid), measured=statistics, **same)


_SAME = (
    "model_class", "heads", "head_dim", "settings", "layers", "made", "chosen", "level_weights", "layer_weights",
    "rounding_weight",
)  # fmt: skip


def _coordinates(grid: Grid) -> Tensor:
    """Frame, row and column of every token, (tokens, 3)."""
    token = torch.arange(grid.tokens)
    return torch.stack([token // (grid.height * grid.width), token // grid.width % grid.height, token % grid.width], 1)


def _sample(tokens: Tensor, block: int, count: int) -> Tensor:
    """Evenly spread tokens of every block, (blocks, count, 3); a last block that is not whole is spread over too."""
    blocks, count = blocks_of(len(tokens), block), min(count, block)
    sizes = torch.full((blocks,), block, device=tokens.device)
    sizes[-1] = len(tokens) - (blocks - 1) * block
    inside = ((torch.arange(count, device=tokens.device) + 0.5) / count * sizes[:, None]).long()
    return tokens[torch.arange(blocks, device=tokens.device)[:, None] * block + inside]


def _centres(count: int, device: torch.device) -> Tensor:
    """Middles of so many equal parts of 0…1."""
    return (torch.arange(count, device=device) + 0.5) / count
