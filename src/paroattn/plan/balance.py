"""Which rank computes which heads, so that none waits for another: decided before the run, from what a plan keeps.

Ranks get equally many heads, and another deal for every layer and phase. All of it follows from the plan, so that every
rank finds the same deal for any number of ranks and nothing need be stored.
"""

from collections.abc import Sequence

from torch import Tensor

from ..block_mask import BlockMask

Deal = tuple[tuple[int, ...], ...]
"""Heads of each rank, rising."""


def kept_blocks(mask: BlockMask) -> Tensor:
    """Kept blocks of every head, (…, heads) int64: what its attention costs."""
    return (mask.head_density() * (mask.query_blocks * mask.key_blocks)).round().long()


def deal_heads(costs: Sequence[float], ranks: int) -> Deal:
    """Deal heads to ranks so that the busiest rank has as little to do as possible.

    Heads are dealt from the dearest on, each to the least busy rank with room; then the busiest rank swaps heads with
    others as long as that helps.

    Args:
        costs: Of every head.
        ranks: Their number; it divides that of the heads.

    Raises:
        ValueError: If it does not.
    """
    room = heads_each(len(costs), ranks)
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for head in sorted(range(len(costs)), key=lambda head: (-costs[head], head)):
        free = (rank for rank in range(ranks) if len(dealt[rank]) < room)
        dealt[min(free, key=lambda rank: (sum(costs[h] for h in dealt[rank]), rank))].append(head)
    while _swap(dealt, costs):
        pass
    return tuple(tuple(sorted(heads)) for heads in dealt)


def contiguous_deal(heads: int, ranks: int) -> Deal:
    """Heads in the model's order, as Ulysses deals them without a plan.

    Raises:
        ValueError: If the number of ranks does not divide that of the heads.
    """
    each = heads_each(heads, ranks)
    return tuple(tuple(range(rank * each, (rank + 1) * each)) for rank in range(ranks))


def heads_each(heads: int, ranks: int) -> int:
    """Heads of every rank.

    Raises:
        ValueError: If the number of ranks does not divide that of the heads.
    """
    if ranks < 1 or heads % ranks:
        fitting = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
        raise ValueError(f"the number of ranks must divide the {heads} heads; got {ranks}. Use one of {fitting}.")
    return heads // ranks


def imbalance(costs: Sequence[float], dealt: Deal) -> float:
    """Cost of the busiest rank over the mean of all ranks, 1 at best."""
    loads = [sum(costs[head] for head in heads) for heads in dealt]
    return max(loads) * len(loads) / sum(loads)


def _swap(dealt: list[list[int]], costs: Sequence[float]) -> bool:
    """Make the one swap that relieves the busiest rank most, if any does."""
    loads = [sum(costs[head] for head in heads) for heads in dealt]
    busiest = max(range(len(dealt)), key=lambda rank: (loads[rank], -rank))
    best, found = loads[busiest], None
    for other, heads in enumerate(dealt):
        for i, mine in enumerate(dealt[busiest]):
            for j, theirs in enumerate(heads):
                moved = costs[mine] - costs[theirs]
                worse = max(loads[busiest] - moved, loads[other] + moved)
                if other != busiest and worse < best:
                    best, found = worse, (i, other, j)
    if found is None:
        return False
    i, other, j = found
    dealt[busiest][i], dealt[other][j] = dealt[other][j], dealt[busiest][i]
    return True
