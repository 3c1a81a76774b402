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
    score = torch.empty(codes.shape, device=codes.device)
    maps = zip(score.flatten(0, -3), codes.flatten(0, -3), top.flatten(), strict=True)
    for one, code, largest in maps if codes.device.type == "cpu" else ((score, codes, top[..., None, None]),):
        one.copy_(code).sub_(LAST).mul_(STEP).add_(largest).exp2_().masked_fill_(code == 0, 0)  # stays in the cache
    return score


def heaviest(mass: Tensor) -> tuple[Tensor, Tensor]:
    """Key blocks of each row's largest masses, (…, Nq, ≤4) int32, and these masses, float32."""
    found = mass.float().topk(min(HEAVIEST, mass.shape[-1]), -1)
    return found.indices.int(), found.values


def merge(places: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """What `heaviest` kept of several masses of the same rows, (…, Nq, kept), as it would of their sum."""
    same = places[..., None] == places[..., None, :]
    return places, (same * mass[..., None, :]).sum(-1)


def spread(places: Tensor, mass: Tensor, columns: int) -> Tensor:
    """Masses (…, Nq, columns) that `heaviest` kept, 0 elsewhere."""
    return mass.new_zeros(*mass.shape[:-1], columns).scatter_(-1, places.long(), mass)
