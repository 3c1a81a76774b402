"""One threshold for all blocks of a model, layer by layer: what a sort of all scores would keep, to the last block.

Scores of a large model fill tens of gigabytes. Here they are made three times, a layer and phase at a time, and never
all there at once: twice to be counted by their bits, the upper and then the lower half of those that decide, which
finds the threshold exactly, and once to be compared with it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HALF = 16
BINS = 2**HALF
AT_ONCE = 2**20
CERTAIN = 0x7F800000
"""Bits of infinity, the score of a block that is kept whatever it costs."""
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Tally:
    """How many blocks have which score.

    Attributes:
        costs: What a block of each phase costs.
        counts: Blocks by layer, phase and upper half of their score's bits, (layers, phases, 2¹⁵) int64.
    """

    costs: tuple[int, ...]
    counts: Tensor


def tally(layers: Sequence[str], costs: Sequence[int], scores: Callable[[str, int], Tensor]) -> Tally:
    """Count blocks by the upper half of their score's bits; arguments as in `select`."""
    counts = torch.zeros(len(layers), len(costs), BINS // 2, dtype=torch.int64)
    for row, layer in enumerate(layers):
        for phase in range(len(costs)):
            for part in _bits(scores, layer, phase).flatten().split(AT_ONCE):
                counts[row, phase] += torch.bincount(part >> HALF, minlength=BINS // 2).cpu()
    return Tally(tuple(costs), counts)


def _bits(scores: Callable[[str, int], Tensor], layer: str, phase: int) -> Tensor:
    return scores(layer, phase).contiguous().abs_().view(torch.int32)  # -0.0 has a bit set


def select(
    layers: Sequence[str],
    costs: Sequence[int],
    scores: Callable[[str, int], Tensor],
    density: float,
    counted: Tally | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Keep the blocks with the highest scores until the density is spent.

    Of equal scores those come first that are earlier in the model: by layer, phase, head, row and column.

    Args:
        layers: Names of the layers.
        costs: What a block of each phase costs, such as the number of its steps.
        scores: Makes the scores of a layer and phase, (heads, Nq, Nk) float32, 0 or more, the same ones every time,
            in a new tensor; infinity keeps a block in any case.
        density: Share of the cost of all blocks that may be kept.
        counted: What `tally` made of the same.

    Yields:
        Every layer's name and its kept blocks, bool (phases, heads, Nq, Nk).
    """
    phases = range(len(costs))

    def bits(layer: str, phase: int) -> Tensor:
        return _bits(scores, layer, phase)

    upper = (counted or tally(layers, costs, scores)).counts.sum(0)
    weights = torch.tensor(costs)
    left = int((density + TOLERANCE) * float((upper.sum(1) * weights).sum()))
    certain = CERTAIN >> HALF
    left -= int((upper[:, certain] * weights).sum())
    decisive, left = _reach((upper * weights[:, None]).sum(0)[:certain], left)
    threshold = 0
    if decisive >= 0:
        lower = torch.zeros(len(costs), BINS, dtype=torch.int64)
        for layer in layers:
            for phase in phases:
                for part in bits(layer, phase).flatten().split(AT_ONCE):
                    found = part[part >> HALF == decisive] & (BINS - 1)
                    lower[phase] += torch.bincount(found, minlength=BINS).cpu()
        last, left = _reach((lower * weights[:, None]).sum(0), left)
        threshold = (decisive << HALF) + last
    for layer in layers:
        kept = []
        for phase in phases:
            found = bits(layer, phase)
            if decisive < 0:
                kept.append(torch.ones_like(found, dtype=torch.bool))
                continue
            part = found > threshold
            if left >= 0:
                equal = (found == threshold).flatten().nonzero()[:, 0]
                affordable = min(len(equal), left // costs[phase])
                part.view(-1)[equal[:affordable]] = True
                left = left - affordable * costs[phase] if affordable == len(equal) else -1
            kept.append(part)
        yield layer, torch.stack(kept)


def _reach(costs: Tensor, left: int) -> tuple[int, int]:
    """Pay for bins from the highest down: the first that is too dear, or −1, and what is left by then."""
    spent = costs.flip(0).cumsum(0)
    affordable = int((spent <= left).sum())
    paid = int(spent[affordable - 1]) if affordable else 0
    return len(costs) - 1 - affordable, left - paid
