"""Block scores in 8 bits: logarithms in steps of an eighth of an octave below the largest of each map.

Ranking is what masks are made from, and a score is off by 4.4 % at most. 255 steps reach 32 octaves down; what is
smaller counts as nothing.
"""

import torch
from torch import Tensor

STEP = 1 / 8
LAST = 255
HEAVIEST = 4


def encode(score: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (…, Nq, Nk) uint8 of scores that are 0 or more, and log2 of the largest of each map, (…) float32."""
    logs = score.float().log2()
    top = logs.amax((-2, -1))
    codes = ((logs - top[..., None, None]) / STEP + LAST).round().nan_to_num(0, LAST, 0).clamp(0, LAST)
    return codes.to(torch.uint8), top


def decode(codes: Tensor, top: Tensor) -> Tensor:
    """Scores (…, Nq, Nk) float32 that `encode` gave these codes; code 0 is 0."""
    logs = codes.float().sub_(LAST).mul_(STEP).add_(top[..., None, None])
    return logs.exp2_().masked_fill_(codes == 0, 0)


def heaviest(mass: Tensor) -> tuple[Tensor, Tensor]:
    """Key blocks of each row's largest masses, (…, Nq, ≤4) int32, and these masses, float32."""
    found = mass.float().topk(min(HEAVIEST, mass.shape[-1]), -1)
    return found.indices.int(), found.values


def spread(places: Tensor, mass: Tensor, columns: int) -> Tensor:
    """Masses (…, Nq, columns) that `heaviest` kept, 0 elsewhere."""
    return mass.new_zeros(*mass.shape[:-1], columns).scatter_(-1, places.long(), mass)
