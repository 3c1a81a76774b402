"""How numbers are rounded to four bits: so that rounding errors cancel in what is made of the numbers.

    Q, K  An error d of a query costs Σ (d · k)² over the keys, dᵀ W d with W = Σ k kᵀ, and likewise for keys. Queries
          and keys crowd into few directions, so W is far from a multiple of 1. The last 16 channels are rounded first;
          what they err, the targets of all others make up for, as W = L D Lᵀ by blocks says.
    K     is the middle of every 32 tokens, in whole steps of the block's scale, plus four bits for the rest. The
          product with a middle is one integer for 32 keys, and the middle itself is 16 · four bits + four bits.
    V     Neighbours have similar weights, so each token takes over a share of the error of the one before it.
    P     What is below half a step would be lost, always in the same places. P is rounded to 8 bits, 0…240, an
          ordered dither 0…15 is added, and the lower four bits are dropped: neighbours keep what they have alike.

Scales of Q and K end short of the largest value: what is cut off is an error like any other. V's do not, since a
channel that hardly varies would lose all its values alike.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..precision import SMALLEST_SCALE

LOWEST, HIGHEST = -8, 7
GROUP = 16
"""Channels that are rounded together."""
SAMPLE_OF_EVERY = 16
"""One token in so many is looked at for `feedback`."""
DAMPING = 0.1
RUN = 16
"""Tokens over which an error of V is carried on."""
CARRY = 0.6
TOKENS_PER_MIDDLE = 32
LARGEST_MIDDLE = 119
"""16 · 7 + 7."""
REACH = {"q": 0.95, "k": 0.9, "v": 1.0}
"""Which share of the largest value is the highest of the four bits."""

DITHER = ((0, 8, 2, 10), (12, 4, 14, 6), (3, 11, 1, 9), (15, 7, 13, 5))
"""Bayer's matrix: its row by the last two bits of the query's place in its block, its column by bits 3 and 0 of the
key's."""


def feedback(samples: Tensor) -> Tensor:
    """What an error in a channel adds to the targets of the channels before it, so that products with samples stay.

    Args:
        samples: Tokens of the other operand, (…, n, D), 0 where there is none; D below 16 or a multiple of it.

    Returns:
        (…, D, D), lower block-triangular with the identity for each group of channels; numbers of half precision.
    """
    moments = samples.mT @ samples
    size = moments.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(SMALLEST_SCALE)
    identity = torch.eye(samples.shape[-1], dtype=samples.dtype, device=samples.device)
    lower = torch.linalg.cholesky_ex(moments + DAMPING * size * identity).L
    inverse = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
    own = torch.stack([lower[..., group, group] for group in groups(lower.shape[-1])], -3)
    return _half((own @ inverse.unflatten(-2, own.shape[-3:-1])).flatten(-3, -2))


def groups(channels: int) -> list[slice]:
    """Channels that are rounded together, from the first."""
    return [slice(start, start + GROUP) for start in range(0, channels, GROUP)]


def round_channels(target: Tensor, feedback: Tensor | None) -> Tensor:
    """Integers for targets (…, n, D) in steps, the last channels first; errors in half precision, as in the kernels."""
    if feedback is None:
        return target.round().clamp(LOWEST, HIGHEST)
    target, feedback = target.clone(), feedback.to(target)
    for group in reversed(groups(target.shape[-1])):
        wanted = target[..., group]
        error = _half(wanted.round().clamp(LOWEST, HIGHEST) - wanted)
        target[..., : group.stop] += error @ feedback[..., group, : group.stop]  # their own becomes the integer
    return target.round()


def round_queries(q: Tensor, feedback: Tensor | None) -> tuple[Tensor, Tensor]:
    """Integers of rotated queries (…, N, D), and a scale for each token, (…, N, 1)."""
    scale = (q.abs().amax(-1, keepdim=True) * (REACH["q"] / HIGHEST)).clamp_min(SMALLEST_SCALE)
    return round_channels(q / scale, feedback), scale


def round_keys(
    k: Tensor, feedback: Tensor | None, block: int, per_middle: int = TOKENS_PER_MIDDLE
) -> tuple[Tensor, Tensor]:
    """Integers of rotated keys (…, N, D), middles included, and the scale of each token's block, (…, N, 1)."""
    per_middle = math.gcd(per_middle, block)
    runs = _in_runs(k, per_middle)
    middle = (runs.amax(-2, keepdim=True) + runs.amin(-2, keepdim=True)) / 2
    rest, largest = (runs - middle).abs().amax((-2, -1)), middle.abs().amax((-2, -1))
    scale = torch.maximum(rest * (REACH["k"] / HIGHEST), largest / LARGEST_MIDDLE).clamp_min(SMALLEST_SCALE)
    scale = _in_runs(scale[..., None], block // per_middle).amax(-2).repeat_interleave(block, -2)[..., : k.shape[-2], :]
    middle = (middle.expand_as(runs).flatten(-3, -2)[..., : k.shape[-2], :] / scale).round()
    return middle + round_channels(k / scale - middle, feedback), scale


def round_values(v: Tensor, carry: float = CARRY) -> tuple[Tensor, Tensor]:
    """Integers of values (…, N, D), and a scale for each channel, (…, 1, D)."""
    scale = (v.abs().amax(-2, keepdim=True) * (REACH["v"] / HIGHEST)).clamp_min(SMALLEST_SCALE)
    runs = _in_runs(v / scale, RUN)
    stored, error = torch.empty_like(runs), torch.zeros_like(runs[..., 0, :])
    for n in range(RUN):
        wanted = runs[..., n, :] + carry * error
        stored[..., n, :] = wanted.round().clamp(LOWEST, HIGHEST)
        error = wanted - stored[..., n, :]
    return stored.flatten(-3, -2)[..., : v.shape[-2], :], scale


def round_weights(p: Tensor, rows: int) -> Tensor:
    """Integers 0…15 for weights (…, N, key blocks, keys of a block) of at most 15, in query blocks of so many rows."""
    dither = torch.tensor(DITHER, dtype=p.dtype, device=p.device)
    row = torch.arange(p.shape[-3], device=p.device)[:, None, None] % rows % 4
    key = torch.arange(p.shape[-1], device=p.device)
    return ((p * 16).round() + dither[row, key % 2 + key // 8 % 2 * 2]).div(16, rounding_mode="floor")


def _half(x: Tensor) -> Tensor:
    return x.half().to(x.dtype)


def _in_runs(x: Tensor, size: int) -> Tensor:
    """(…, N, D) → (…, runs, size, D), padded with 0."""
    return pad(x, (0, 0, 0, -x.shape[-2] % size)).unflatten(-2, (-1, size))
