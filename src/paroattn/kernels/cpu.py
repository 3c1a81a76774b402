"""Block-sparse attention on a CPU in float32 that really skips the dropped blocks, made of plain PyTorch calls.

All pairs of a head and a query block are sorted by how many key tokens they keep and cut into chunks of nearly equal
pairs. The kept blocks of K and V of a chunk are gathered, and one batched product, softmax and product serves all its
pairs. Pairs that keep every block read K and V where they are, by PyTorch's dense attention. Each thread works on
chunks of its own: threads that share every small product wait for each other after it, and long if the machine has
anything else to do.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, groupby
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary

from ..block_mask import BlockMask, blocks_of
from ..precision import Precision

SCORES_AT_ONCE = 2**20
DENSE_FACTOR = 4
CHUNKS_PER_THREAD = 8
SHORTEST_SHARE = 7 / 8
SCHEDULES_PER_MASK = 4
Item = TypeVar("Item")


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
        block: Tokens of a query block and of a key block: what the schedule was made for.
        positions: Model position of each token in each head's order, (H, N): what the schedule was made for.
        real: Tokens before the padding in kernel order: what the schedule was made for.
        queries: Row of each query, pair by pair, (pairs · query block,); a ragged block repeats its last.
        keys: Row of each key, head by head, (H · Nk · key block,); padding repeats the last real one.
        chunks: All pairs that keep a real key; the pairs after them keep none.
    """

    block: tuple[int, int]
    positions: Tensor
    real: int
    queries: Tensor
    keys: Tensor
    chunks: tuple[Chunk, ...]


_schedules = WeakTensorKeyDictionary()  # by a mask's bits


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
    text_tokens: int = 0,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Block-sparse attention in float32: arguments and results of `reference_attention`, lse on request."""
    assert q.device.type == "cpu" and q.dtype == torch.float32 and str(precision) == "fp32"
    positions = table[order.long()]
    out, lse = torch.empty(q.shape), torch.empty(q.shape[:3]) if return_lse else None
    for index, real in enumerate([q.shape[1]] * len(q) if valid_tokens is None else valid_tokens.tolist()):
        q_, k_, v_, out_ = (x[index].detach().reshape(-1, x.shape[-1]) for x in (q, k, v, out))
        lse_ = None if lse is None else lse[index].view(-1)
        _attend(q_, k_, v_, schedule_of(mask, positions, real), mask, softmax_scale, out_, lse_)
    return out, None if lse is None else lse.transpose(1, 2)


def schedule_of(mask: BlockMask, positions: Tensor, real: int) -> Schedule:
    """The schedule of a mask, made once and kept as long as the mask's bits live."""
    known = _schedules.setdefault(mask.bits, [])
    for schedule in known:
        if schedule.block == mask.block and schedule.real == real and torch.equal(schedule.positions, positions):
            return schedule
    made = _make_schedule(mask, positions, real)
    known.append(made)
    del known[:-SCHEDULES_PER_MASK]
    return made


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schedule: Schedule,
    mask: BlockMask,
    softmax_scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Compute one batch element; q, k, v and out are (N · H, D), lse is (N · H,)."""
    key_blocks, value_blocks = torch.empty(2, len(schedule.keys) // mask.block[1], mask.block[1], q.shape[1])

    def reorder(part: slice) -> None:
        for source, target in ((k, key_blocks), (v, value_blocks)):
            torch.index_select(source, 0, schedule.keys[part], out=target.flatten(0, 1)[part])

    def attend(chunks: Iterator[Chunk]) -> None:
        memory = _Memory(schedule.chunks, mask, q.shape[1], with_lse=lse is not None)
        for chunk in chunks:
            rows = schedule.queries[chunk.first * mask.block[0] : chunk.last * mask.block[0]]
            result, logs = memory.attend(chunk, q.index_select(0, rows), key_blocks, value_blocks, softmax_scale)
            out.index_copy_(0, rows, result)
            if lse is not None and logs is not None:
                lse.index_copy_(0, rows, logs)

    step = blocks_of(len(schedule.keys), torch.get_num_threads())
    _in_every_thread(lambda parts: [reorder(part) for part in parts], _slices(len(schedule.keys), step))
    _in_every_thread(attend, schedule.chunks)
    computed = schedule.chunks[-1].last * mask.block[0] if schedule.chunks else 0
    out.index_fill_(0, schedule.queries[computed:], 0)
    if lse is not None:
        lse.index_fill_(0, schedule.queries[computed:], -math.inf)


class _Memory:
    """What a thread needs for any of its chunks; fresh pages for each would cost as much as filling them."""

    def __init__(self, chunks: tuple[Chunk, ...], mask: BlockMask, dim: int, with_lse: bool):
        self.mask, self.with_lse = mask, with_lse
        scored = ((c.last - c.first) * c.tokens for c in chunks if with_lse or c.head is None)
        self.scores = torch.empty(max(scored, default=0) * mask.block[0])
        self.gathered = torch.empty(max((len(chunk.blocks) for chunk in chunks), default=0), mask.block[1], dim)

    def attend(
        self, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """Out (queries, D) and lse (queries,) of a chunk's queries (queries, D)."""
        if chunk.head is not None and not self.with_lse:
            keys, values = (self.keys_of(chunk, x)[None] for x in (k, v))
            return scaled_dot_product_attention(q[None, None], keys, values, scale=softmax_scale)[0, 0], None
        queries = q.view(1 if chunk.head is not None else chunk.last - chunk.first, -1, q.shape[1])
        scores = self.scores[: len(q) * chunk.tokens].view(*queries.shape[:2], chunk.tokens)
        torch.baddbmm(scores, queries, self.keys_of(chunk, k).mT, beta=0, alpha=softmax_scale, out=scores)
        for first, last, tokens in chunk.short:
            scores[first:last, :, tokens:] = -math.inf
        largest = scores.amax(-1) if self.with_lse else None
        torch.softmax(scores, -1, out=scores)
        out = (scores @ self.keys_of(chunk, v)).view_as(q)
        # the largest weight of a row is 1 / Σ exp(s − largest)
        return out, None if largest is None else (largest - scores.amax(-1).log_()).flatten()

    def keys_of(self, chunk: Chunk, x: Tensor) -> Tensor:
        """K or V of a chunk, (pairs, tokens, D), or (1, tokens, D) if all pairs read the same.

        They are gathered into the same memory one after the other.
        """
        if chunk.head is not None:
            first = chunk.head * self.mask.key_blocks
            return x[first : first + self.mask.key_blocks].flatten(0, 1)[None, : chunk.tokens]
        part = self.gathered[: len(chunk.blocks)]
        torch.index_select(x, 0, chunk.blocks, out=part)
        return part.view(chunk.last - chunk.first, -1, x.shape[-1])[:, : chunk.tokens]


def _in_every_thread(work: Callable[[Iterator[Item]], object], items: Iterable[Item]) -> None:
    """Let as many threads as PyTorch may use take items from one iterator."""
    count, shared, inference = torch.get_num_threads(), iter(items), torch.is_inference_mode_enabled()

    def share(_) -> None:
        with torch.inference_mode(inference):
            work(shared)

    if count == 1:
        work(shared)
    else:
        list(_threads(count).map(share, range(count)))


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Threads in which PyTorch does not start further ones."""
    ready = Barrier(count + 1)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # makes this thread take the setting over before it is set back
        ready.wait()

    threads = ThreadPoolExecutor(count, "paroattn", start)
    for _ in range(count):
        threads.submit(int)
    ready.wait()
    torch.set_num_threads(count)
    return threads


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_threads.cache_clear)


def _slices(length: int, step: int) -> list[slice]:
    return [slice(first, first + step) for first in range(0, length, step)]


def _make_schedule(mask: BlockMask, positions: Tensor, real: int) -> Schedule:
    heads, tokens = positions.shape
    query_block, key_block = mask.block
    lengths, blocks = _kept_keys(mask, real)
    pairs = lengths.argsort(descending=True, stable=True)

    rows = positions.long() * heads + torch.arange(heads)[:, None]
    queries = rows[:, torch.arange(mask.query_blocks * query_block).clamp_max(tokens - 1)]
    keys = rows[:, torch.arange(mask.key_blocks * key_block).clamp_max(max(real - 1, 0))]

    scores = int(lengths.sum()) * query_block
    at_once = min(SCORES_AT_ONCE, scores // (torch.get_num_threads() * CHUNKS_PER_THREAD))
    whole = torch.where(lengths == real, torch.arange(len(lengths)) // mask.query_blocks, -1)
    cuts = _cut(lengths[pairs].tolist(), whole[pairs].tolist(), at_once // query_block)
    chunks = tuple(_chunk(*cut, blocks[pairs], key_block) for cut in cuts)
    return Schedule(mask.block, positions, real, queries.view(-1, query_block)[pairs].flatten(), keys.flatten(), chunks)


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


def _cut(lengths: list[int], whole: list[int], most: int) -> Iterator[tuple[list[int], int, int]]:
    """Cut pairs into chunks.

    Args:
        lengths: Key tokens of each pair, falling.
        whole: The head of each pair that keeps all, else −1.
        most: The longest pair's key tokens times pairs of a chunk, at most; dense attention likes more queries.

    Yields:
        Lengths of a chunk's pairs, its first pair and the head that it reads in place or −1.
    """
    first, end = 0, len(lengths) - lengths.count(0)
    for pair in range(1, end + 1):
        longest = lengths[first]
        if (
            pair == end
            or whole[pair] != whole[first]
            or lengths[pair] < longest * SHORTEST_SHARE
            or (pair - first + 1) * longest > (most if whole[first] < 0 else most * DENSE_FACTOR)
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
