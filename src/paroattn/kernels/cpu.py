"""Block-sparse attention on a CPU in float32, skipping blocks for real, out of plain PyTorch calls.

All (head, query block) pairs are sorted by how many key tokens they keep and cut into chunks of about equal pairs; the
K and V blocks of a chunk are gathered and one batched product, softmax and product does all its pairs. Rows that keep
every block read K and V in place.
"""

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from ..block_mask import BlockMask, blocks_of

SCORES_AT_ONCE = 2**20
PADDING_SHARE = 1 / 16
SCHEDULES_PER_MASK = 4


@dataclass(frozen=True)
class Chunk:
    """Pairs of a head and a query block that are computed together.

    Attributes:
        pairs: Which pairs of the sorted list, first and one past the last.
        blocks: Kept key blocks of each pair, (pairs, blocks) counted over all heads; short rows repeat some block.
        tokens: Key tokens of the longest pair.
        short: Pairs with fewer tokens, as (first, one past the last, tokens) counted from the chunk's first pair.
    """

    pairs: tuple[int, int]
    blocks: Tensor
    tokens: int
    short: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Schedule:
    """All that depends on the mask, the token orders and the number of valid keys, but not on q, k and v.

    A row below is a row of q, k or v seen as (N · H, D).

    Attributes:
        positions: Model position of every token of every head, (H, N); what the schedule was made for.
        valid: Number of valid keys in kernel order; what the schedule was made for.
        queries: Row of every query, pair after pair, (pairs · query block,).
        keys: Row of every key, head after head, (H · Nk · key block,).
        back: Position in `queries` of every row, (N · H,).
        full: Pairs that keep every valid key, as (head, first, one past the last).
        chunks: The other pairs.
    """

    positions: Tensor
    valid: int
    queries: Tensor
    keys: Tensor
    back: Tensor
    full: tuple[tuple[int, int, int], ...]
    chunks: tuple[Chunk, ...]


_schedules: "weakref.WeakKeyDictionary[BlockMask, list[Schedule]]" = weakref.WeakKeyDictionary()
