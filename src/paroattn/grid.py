"""Where tokens sit: the latent video's grid, the text beside it, and the orders in which a head may read them.

A diffusion transformer flattens (frames, height, width) with width fastest, so neighbours along the other axes end up
far apart. An order is another way to flatten the same grid. In kernel order the reordered video comes first and text
last.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ORDERS = ("FHW", "FWH", "HFW", "HWF", "WFH", "WHF")
TILES = ("4x4x4", "1x8x8", "16x2x2", "4x2x8")
CANDIDATES = ORDERS + TILES
"""What a calibration measures and a plan chooses from unless told otherwise."""
_SIZE = re.compile(r"[1-9]\d{0,5}x[1-9]\d{0,5}x[1-9]\d{0,5}")


@dataclass(frozen=True)
class Grid:
    """Size of the latent video in tokens, after patchify."""

    frames: int
    height: int
    width: int

    def __post_init__(self):
        for axis, size in vars(self).items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{axis} of a grid must be a positive integer; got {size!r}")

    def __iter__(self) -> Iterator[int]:
        return iter((self.frames, self.height, self.width))

    def __str__(self) -> str:
        return "x".join(map(str, self))

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width

    @classmethod
    def parse(cls, text: str) -> "Grid":
        """Read "FxHxW".

        Raises:
            ValueError: If the text has another form.
        """
        if not _SIZE.fullmatch(text):
            raise ValueError(f"a grid is written FRAMESxHEIGHTxWIDTH, such as 13x30x45; got {text!r}")
        return cls(*map(int, text.split("x")))


@dataclass(frozen=True)
class TextSpan:
    """Prompt tokens that share the video's sequence, before it ("prefix") or after it ("suffix") in the model."""

    tokens: int = 0
    side: str = "suffix"

    def __post_init__(self):
        if self.side not in ("prefix", "suffix"):
            raise ValueError(f"the side of a text span must be prefix or suffix; got {self.side!r}")
        if self.tokens < 0:
            raise ValueError(f"a text span must have 0 or more tokens; got {self.tokens}")


def check_order(order: str) -> str:
    """Return `order` if it names one of the six axis orders or a tile such as "4x4x4".

    Raises:
        ValueError: Otherwise.
    """
    if order not in ORDERS and not _SIZE.fullmatch(order):
        raise ValueError(f"an order must be one of {', '.join(ORDERS)} or a tile such as {TILES[0]}; got {order!r}")
    return order


def token_order(grid: Grid, order: str) -> Tensor:
    """List the tokens of a video in another order.

    An axis order names the axes from slowest to fastest; "FHW" is the model's own. A tile "4x2x8" visits boxes of
    4 frames × 2 rows × 8 columns one after the other, and the tokens inside a box together; boxes at the border are
    smaller where the grid does not divide.

    Args:
        grid: Size of the video in tokens.
        order: One of `ORDERS`, or a tile as frames x height x width.

    Returns:
        Index of shape (F·H·W,), int64: `x[..., index, :]` is `x` in the new order, and `argsort` of it goes back.

    Raises:
        ValueError: If `order` is neither.

    Source:
        PAROAttention (arXiv 2506.16054), token reordering; the tiles are ours.
    """
    positions = torch.arange(grid.tokens).view(*grid)
    if check_order(order) in ORDERS:
        return positions.permute(["FHW".index(axis) for axis in order]).flatten()
    tile = Grid.parse(order)
    boxes = (
        box.flatten()
        for slab in positions.split(tile.frames, 0)
        for row in slab.split(tile.height, 1)
        for box in row.split(tile.width, 2)
    )
    return torch.cat(list(boxes))


@dataclass(frozen=True)
class Layout:
    """The sequence of one self-attention: a video's grid and the text beside it."""

    grid: Grid
    text: TextSpan = TextSpan()

    @property
    def tokens(self) -> int:
        return self.grid.tokens + self.text.tokens

    @property
    def text_positions(self) -> slice:
        """Where the model has the text."""
        first = 0 if self.text.side == "prefix" else self.grid.tokens
        return slice(first, first + self.text.tokens)

    def table(self, orders: Sequence[str]) -> Tensor:
        """Gather tables, the one definition of kernel order: `table[i, n]` is the model's position of token n.

        Returns:
            int32 of shape (len(orders), tokens); video tokens in each order, then text in the model's order.
        """
        ahead = self.text.tokens if self.text.side == "prefix" else 0
        text = torch.arange(self.text_positions.start, self.text_positions.stop)
        rows = [torch.cat([token_order(self.grid, order) + ahead, text]) for order in orders]
        return torch.stack(rows).to(torch.int32)
