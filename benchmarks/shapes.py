"""Shapes of real models' self-attention, and block masks over them for timing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from paroattn.block_mask import BlockMask, blocks_of
from paroattn.grid import ORDERS, Grid, Layout, TextSpan

DRAWN = (128, 128)
"""Blocks in which masks are drawn; masks of smaller blocks are these, divided."""
LOWEST_HEAD = 0.05
NO_TEXT = TextSpan()


@dataclass(frozen=True)
class Shape:
    """One self-attention of a model: (batch, tokens, heads, head_dim)."""

    name: str
    heads: int
    head_dim: int
    grid: Grid
    text: TextSpan = NO_TEXT
    batch: int = 1

    @property
    def tokens(self) -> int:
        return Layout(self.grid, self.text).tokens

    @property
    def size(self) -> tuple[int, int, int, int]:
        return self.batch, self.tokens, self.heads, self.head_dim

    def orders(self, device: str) -> tuple[Tensor, Tensor]:
        """Gather tables of the six orders, and one of them for each head in turn."""
        table = Layout(self.grid, self.text).table(ORDERS).to(device)
        return table, (torch.arange(self.heads, dtype=torch.int32) % len(ORDERS)).to(device)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("cogvideox-5b", 48, 64, Grid(13, 30, 45), TextSpan(226, "prefix")),  # 49 frames of 480×720
        Shape("wan-14b-480p", 40, 128, Grid(21, 30, 52)),  # 81 frames of 480×832
        Shape("wan-14b-720p", 40, 128, Grid(21, 45, 80)),  # 81 frames of 720×1280
        Shape("hunyuanvideo-720p", 24, 128, Grid(33, 45, 80), TextSpan(256, "suffix")),  # 129 frames of 720×1280
        Shape("flux-1024", 24, 128, Grid(1, 64, 64), TextSpan(512, "prefix")),  # one image of 1024×1024
    )
}


def tensors(shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, ...]:
    """Random q, k and v: heads of different strength, a mean in every channel of K, and a small one in V."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32)

    level = torch.logspace(-0.5, 0.5, shape.heads, 2.0, device=device)[:, None]
    mean, middle = 2 * normal(shape.heads, shape.head_dim), 0.1 * normal(shape.heads, shape.head_dim)

    def drawn(scale: Tensor | float, offset: Tensor | float) -> Tensor:
        out = torch.empty(shape.size, dtype=dtype, device=device)
        for one in out:
            for part in one.split(8192):
                part.copy_(normal(*part.shape) * scale + offset)
        return out

    return drawn(2**0.5 * level, 0.0), drawn(level, mean), drawn(level, middle)


def text_blocks(shape: Shape, size: int) -> int:
    """First block, in kernel order, that holds text; the number of blocks without any."""
    return shape.grid.tokens // size if shape.text.tokens else blocks_of(shape.tokens, size)


def lowest_head(shape: Shape, kind: str = "even") -> float:
    """What a head keeps at least: text and the diagonal, and `LOWEST_HEAD` where heads are uneven."""
    blocks, first = blocks_of(shape.tokens, DRAWN[0]), text_blocks(shape, DRAWN[0])
    always = 1 - first * max(first - 1, 0) / blocks**2
    return always if kind == "even" else max(always, LOWEST_HEAD)


def reachable(shape: Shape, kind: str = "even") -> tuple[float, float]:
    """Lowest and highest density of a mask; uneven heads are one at 1.0 and one at the lowest, at least."""
    lowest = lowest_head(shape, kind)
    margin = 0.0 if kind == "even" else (1 - lowest) / shape.heads
    return lowest + margin, 1 - margin


def head_densities(shape: Shape, density: float, kind: str = "even") -> Tensor:
    """Density of every head, float64: all alike, or from the lowest to 1.0 with the same mean, in a mixed order.

    Raises:
        ValueError: If there is no such mask.
    """
    least, most = reachable(shape, kind)
    if not least <= density <= most:
        raise ValueError(
            f"the density must be {least:.3f}…{most:.3f} for {kind} heads, which keep text and the diagonal; "
            f"got {density:g}"
        )
    lowest = lowest_head(shape, kind)
    if kind == "even":
        return torch.full((shape.heads,), density, dtype=torch.float64)
    steps = torch.linspace(0, 1, shape.heads, dtype=torch.float64)
    low, high = -12.0, 12.0  # of the base-2 logarithm of the exponent that gives the mean
    for _ in range(60):
        exponent = (low + high) / 2
        above = (lowest + (1 - lowest) * steps ** (2**exponent)).mean() > density
        low, high = (exponent, high) if above else (low, exponent)
    densities = lowest + (1 - lowest) * steps ** (2**low)
    return densities[torch.randperm(shape.heads, generator=torch.Generator().manual_seed(1))]


def draw(shape: Shape, density: float, kind: str = "even", device: str = "cpu", seed: int = 0) -> Tensor:
    """Kept blocks of `DRAWN` size, bool (H, Nq, Nk), random but for dense text and the diagonal.

    Args:
        shape: What is attended to.
        density: Kept blocks over all blocks, text included.
        kind: "even", or "uneven": heads from 0.05 to 1.0 with the same mean.
        device: Where the mask is wanted.
        seed: Of the random blocks.

    Raises:
        ValueError: If there is no such mask.
    """
    blocks, first = blocks_of(shape.tokens, DRAWN[0]), text_blocks(shape, DRAWN[0])
    counts = (head_densities(shape, density, kind) * blocks**2).round().long()
    weight = torch.rand(shape.heads, blocks, blocks, generator=torch.Generator().manual_seed(seed)).to(device)
    weight[:, first:] = weight[:, :, first:] = 2
    weight.diagonal(dim1=1, dim2=2).fill_(2)
    rank = weight.flatten(1).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(blocks**2, device=device).expand_as(rank)
    kept = torch.zeros(shape.heads, blocks**2, dtype=torch.bool, device=device)
    return kept.scatter_(1, rank, place < counts.to(device)[:, None]).view_as(weight)


def divided(kept: Tensor, tokens: int, block: tuple[int, int]) -> Tensor:
    """The same kept tokens in smaller blocks: bool (H, Nq, Nk) of `DRAWN` size to the like of `block` size."""
    if any(drawn % size for drawn, size in zip(DRAWN, block, strict=True)):
        raise ValueError(f"blocks must divide {DRAWN[0]}×{DRAWN[1]}; got {block[0]}×{block[1]}")
    for axis, size in enumerate(block, 1):
        kept = kept.repeat_interleave(DRAWN[axis - 1] // size, axis).narrow(axis, 0, blocks_of(tokens, size))
    return kept


def block_mask(kept: Tensor, tokens: int, block: tuple[int, int]) -> BlockMask:
    """The mask that the kernels read."""
    return BlockMask.from_dense(divided(kept, tokens, block), block)


def kept_pairs(kept: Tensor, tokens: int) -> int:
    """Pairs of a query and a key that are kept, over all heads; a block at the end counts its real tokens."""
    lengths = torch.full((kept.shape[1],), DRAWN[0], dtype=torch.float64, device=kept.device)
    lengths[-1] = tokens - (kept.shape[1] - 1) * DRAWN[0]
    return int((kept.double() @ lengths @ lengths).sum())
