"""Block-sparse attention on a CPU in float32 that really skips the dropped blocks, made of plain PyTorch calls.

All pairs of a head and a query block are sorted by how many key tokens they keep and cut into chunks of nearly equal
pairs. The kept blocks of K and V of a chunk are gathered, and one batched product, softmax and product serves all its
pairs. Pairs that keep every block read K and V where they are.
"""

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor
from torch.nn.functional import embedding

from ..block_mask import BlockMask, blocks_of
from ..precision import Precision

SCORES_AT_ONCE = 2**21
SHORTEST_SHARE = 7 / 8
SCHEDULES_PER_MASK = 4


@dataclass(frozen=True)
class Chunk:
    """Neighbours in the sorted list of pairs, computed together.

    Attributes:
        first: First pair.
        last: One past the last pair.
        tokens: Key tokens of the longest pair.
        head: The head whose keys all pairs read in place; None where blocks are gathered.
        blocks: Key blocks of each pair, counted over all heads, (pairs · blocks,); short pairs repeat their first.
        short: Runs of short pairs as (first, one past the last, tokens), counted from the chunk's first pair.
    """

    first: int
    last: int
    tokens: int
    head: int | None
    blocks: Tensor
    short: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Schedule:
    """All that depends on the mask, the token orders and the number of real tokens, and not on q, k and v.

    A row is a row of q, k or v of one batch element, seen as (N · H, D).

    Attributes:
        positions: Model position of each token in each head's order, (H, N): what the schedule was made for.
        real: Tokens before the padding in kernel order: what the schedule was made for.
        queries: Row of each query, pair by pair, (pairs · query block,).
        keys: Row of each key, head by head, (H · Nk · key block,).
        back: Place in `queries` of each row, (N · H,).
        chunks: All pairs that keep a real key; the pairs after them keep none.
    """

    positions: Tensor
    real: int
    queries: Tensor
    keys: Tensor
    back: Tensor
    chunks: tuple[Chunk, ...]


_schedules: "weakref.WeakKeyDictionary[BlockMask, list[Schedule]]" = weakref.WeakKeyDictionary()


def cpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    table: Tensor,
    order: Tensor,
    mask: BlockMask,
    precision: Precision,
    softmax_scale: float,
    valid_tokens: Tensor | None = None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Block-sparse attention in float32: arguments and results of `reference_attention`, lse on request."""
    assert q.device.type == "cpu" and q.dtype == torch.float32 and str(precision) == "fp32"
    batch, tokens, heads, _ = q.shape
    positions = table[order.long()]
    out, lse = torch.empty(q.shape), torch.empty(q.shape[:3]) if return_lse else None
    for element, real in enumerate([tokens] * batch if valid_tokens is None else valid_tokens.tolist()):
        schedule = schedule_of(mask, positions, real)
        q_, k_, v_ = (x[element].reshape(tokens * heads, -1) for x in (q, k, v))
        values, logs = _attend(q_, k_, v_, schedule, mask, softmax_scale, return_lse)
        out[element] = embedding(schedule.back, values).view(tokens, heads, -1)
        if lse is not None and logs is not None:
            lse[element] = logs[schedule.back].view(tokens, heads)
    return out, None if lse is None else lse.transpose(1, 2)


def schedule_of(mask: BlockMask, positions: Tensor, real: int) -> Schedule:
    """The schedule of a mask, made once and kept as long as the mask lives."""
    known = _schedules.setdefault(mask, [])
    for schedule in known:
        if schedule.real == real and torch.equal(schedule.positions, positions):
            return schedule
    known.append(_make_schedule(mask, positions, real))
    del known[:-SCHEDULES_PER_MASK]
    return known[-1]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, mask: BlockMask, softmax_scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of one batch element: out (pairs · query block, D), lse (pairs · query block,)."""
    q = embedding(schedule.queries, q).unflatten(0, (-1, mask.block[0]))
    k, v = (embedding(schedule.keys, x).unflatten(0, (-1, mask.block[1])) for x in (k, v))
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2]) if return_lse else None
    sizes = [(len(chunk.blocks), (chunk.last - chunk.first) * chunk.tokens) for chunk in schedule.chunks]
    gathered = k.new_empty(max((blocks for blocks, _ in sizes), default=0), *k.shape[1:])
    memory = k.new_empty(max((keys for _, keys in sizes), default=0) * mask.block[0])
    for chunk, (_, keys) in zip(schedule.chunks, sizes, strict=True):
        pairs = slice(chunk.first, chunk.last)
        stacked = 1 if chunk.head is not None else chunk.last - chunk.first
        queries, result = (x[pairs].view(stacked, -1, x.shape[-1]) for x in (q, out))
        scores = memory[: keys * mask.block[0]].view(stacked, -1, chunk.tokens)
        torch.baddbmm(scores, queries, _keys_of(chunk, k, mask, gathered).mT, beta=0, alpha=softmax_scale, out=scores)
        for first, last, tokens in chunk.short:
            scores[first:last, :, tokens:] = -math.inf
        largest = None if lse is None else scores.amax(-1)
        torch.softmax(scores, -1, out=scores)
        torch.bmm(scores, _keys_of(chunk, v, mask, gathered), out=result)
        if lse is not None and largest is not None:  # the largest weight is 1 / Σ exp(s − largest)
            lse[pairs] = (largest - scores.amax(-1).log_()).view(-1, mask.block[0])
    computed = schedule.chunks[-1].last if schedule.chunks else 0
    out[computed:] = 0
    if lse is not None:
        lse[computed:] = -math.inf
    return out.flatten(0, 1), None if lse is None else lse.flatten()


def _keys_of(chunk: Chunk, x: Tensor, mask: BlockMask, gathered: Tensor) -> Tensor:
    """K or V of a chunk, (pairs, tokens, D), or (1, tokens, D) if all pairs read the same.

    K and V are gathered into the same memory one after the other: fresh pages would cost as much as the gather.
    """
    if chunk.head is not None:
        return x[chunk.head * mask.key_blocks : (chunk.head + 1) * mask.key_blocks].flatten(0, 1)[None, : chunk.tokens]
    part = gathered[: len(chunk.blocks)]
    torch.index_select(x, 0, chunk.blocks, out=part)
    return part.view(chunk.last - chunk.first, -1, x.shape[-1])[:, : chunk.tokens]


def _make_schedule(mask: BlockMask, positions: Tensor, real: int) -> Schedule:
    heads, tokens = positions.shape
    query_block, key_block = mask.block
    lengths, blocks = _kept_keys(mask, real)
    pairs = lengths.argsort(descending=True, stable=True)

    rows = positions.long() * heads + torch.arange(heads)[:, None]
    queries = rows[:, torch.arange(mask.query_blocks * query_block).clamp_max(tokens - 1)]
    keys = rows[:, torch.arange(mask.key_blocks * key_block).clamp_max(max(real - 1, 0))]
    places = pairs.argsort()[:, None] * query_block + torch.arange(query_block)
    back = torch.empty(heads * tokens, dtype=torch.long)
    back[rows] = places.view(heads, -1)[:, :tokens]

    whole = torch.where(lengths == real, torch.arange(len(lengths)) // mask.query_blocks, -1)
    chunks = _cut(lengths[pairs].tolist(), whole[pairs].tolist(), query_block)
    return Schedule(
        positions, real, queries.view(-1, query_block)[pairs].flatten(), keys.flatten(), back,
        tuple(_chunk(*cut, blocks[pairs], key_block) for cut in chunks),
    )  # fmt: skip


def _kept_keys(mask: BlockMask, real: int) -> tuple[Tensor, Tensor]:
    """Real key tokens of each pair, (pairs,), and its key blocks counted over all heads, (pairs, key blocks).

    A pair's list goes on with its first block; neither dropped blocks nor padding are ever read.
    """
    used = blocks_of(real, mask.block[1])
    kept = mask.dense()[..., :used].flatten(0, 1)
    counts = kept.sum(-1, keepdim=True)
    beyond = (used * mask.block[1] - real) * kept[:, -1:].any(-1)
    blocks = mask.key_lists()[1].long().flatten(0, 1)
    blocks = torch.where(torch.arange(mask.key_blocks) < counts, blocks, blocks[:, :1])
    head = torch.arange(len(blocks)) // mask.query_blocks
    return counts[:, 0] * mask.block[1] - beyond, blocks + head[:, None] * mask.key_blocks


def _cut(lengths: list[int], whole: list[int], query_block: int) -> Iterator[tuple[list[int], int, int]]:
    """Cut pairs, sorted by falling length, into chunks: (lengths, first pair, head read in place or −1)."""
    first, end = 0, len(lengths) - lengths.count(0)
    for pair in range(1, end + 1):
        longest = lengths[first]
        if (
            pair == end
            or whole[pair] != whole[first]
            or lengths[pair] < longest * SHORTEST_SHARE
            or (pair - first + 1) * query_block * longest > SCORES_AT_ONCE
        ):
            yield lengths[first:pair], first, whole[first]
            first = pair


def _chunk(lengths: list[int], first: int, head: int, blocks: Tensor, key_block: int) -> Chunk:
    last, longest = first + len(lengths), lengths[0]
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    ends = list(accumulate(size for _, size in runs))
    short = tuple((end - size, end, length) for (length, size), end in zip(runs, ends, strict=True) if length < longest)
    needed = 0 if head >= 0 else blocks_of(longest, key_block)
    return Chunk(first, last, longest, head if head >= 0 else None, blocks[first:last, :needed].flatten(), short)
