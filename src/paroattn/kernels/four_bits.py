"""How numbers are rounded to four bits: so that rounding errors cancel in what is made of the numbers.

    Q, K  An error d of a query costs Σ (d · k)² over the keys, dᵀ W d with W = Σ k kᵀ, and likewise for keys. Queries
          and keys crowd into few directions, so W is far from a multiple of 1. The last 16 channels are rounded first;
          what they err, the targets of all others make up for, as W = L D Lᵀ by blocks says.
    K     is the middle of every 32 tokens, in whole steps of the block's scale, plus four bits for the rest. The
          product with a middle is one integer for 32 keys, and the middle itself is 16 · four bits + four bits.
    V     is likewise the middle of every 16 tokens plus four bits. Neighbours have similar weights, so each token takes
          over a quarter of all errors before it in its 16, and a fifth of the one four before it: in a tile, that is
          the frame before.
    P     What is below half a step would be lost, always in the same places. P is rounded to 8 bits, 0…240, and added
          up over every 16th key of 64. What the upper four bits of the sum grow by is stored, so that each key takes
          over what is left of the last. The 16 sums of a row start at 0…15, and neighbouring rows' otherwise: on
          average over places nothing is lost.

Scales end short of the largest value: what is cut off is an error like any other.
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
"""Tokens of V that share a middle, and over which errors are carried on."""
CARRY = 0.25
"""Share of the errors of all earlier tokens of a run."""
CARRY_FROM_FOURTH = 0.2
"""Share, beyond that, of the error of the token four before."""
SPAN, CHAINS = 64, 16
"""Keys over which P's errors are carried on, from each to the 16th after it."""
TOKENS_PER_MIDDLE = 32
"""Of K."""
LARGEST_MIDDLE = 119
"""16 · 7 + 7."""
REACH = {"q": 0.95, "k": 0.9, "v": 0.8}
"""Which share of the largest value is the highest of the four bits."""


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


def round_values(
    v: Tensor, carry: float = CARRY, from_fourth: float = CARRY_FROM_FOURTH, per_middle: int = RUN
) -> tuple[Tensor, Tensor]:
    """Integers of values (…, N, D), middles included, and a scale for each channel, (…, 1, D)."""
    runs = _in_runs(v, per_middle)
    middle = (runs.amax(-2, keepdim=True) + runs.amin(-2, keepdim=True)) / 2
    rest, largest = (runs - middle).abs().amax((-3, -2)), middle.abs().amax((-3, -2))
    scale = torch.maximum(rest * (REACH["v"] / HIGHEST), largest / LARGEST_MIDDLE).clamp_min(SMALLEST_SCALE)
    scale = scale[..., None, :]
    middle = (middle / scale[..., None, :]).round().expand_as(runs).flatten(-3, -2)[..., : v.shape[-2], :]
    targets = _in_runs(v / scale - middle, RUN)
    stored, errors = torch.empty_like(targets), torch.zeros_like(targets)
    for n in range(RUN):
        taken_over = carry * errors[..., :n, :].sum(-2) + from_fourth * errors[..., n - 4, :]  # 0 before the fifth
        stored[..., n, :] = (targets[..., n, :] - taken_over).round().clamp(LOWEST, HIGHEST)
        errors[..., n, :] = stored[..., n, :] - targets[..., n, :]
    return stored.flatten(-3, -2)[..., : v.shape[-2], :] + middle, scale


def round_weights(p: Tensor, rows: int) -> Tensor:
    """Integers 0…15 for weights (…, N, key blocks, keys of a block) of at most 15, in query blocks of so many rows."""
    steps = _in_runs((p * 16).round()[..., None], SPAN).squeeze(-1).unflatten(-1, (-1, CHAINS))
    row = torch.arange(p.shape[-3], device=p.device)[:, None, None, None, None] % rows
    start = (3 * row + 9 * torch.arange(CHAINS, device=p.device)) % 16
    sums = (steps.cumsum(-2) + start).div_(16, rounding_mode="floor")
    sums[..., 1:, :] -= sums[..., :-1, :].clone()
    return sums.flatten(-3)[..., : p.shape[-1]]


def _half(x: Tensor) -> Tensor:
    return x.half().to(x.dtype)


def _in_runs(x: Tensor, size: int) -> Tensor:
    """(…, N, D) → (…, runs, size, D), padded with 0."""
    return pad(x, (0, 0, 0, -x.shape[-2] % size)).unflatten(-2, (-1, size))
