"""The kernel behind `rotary.norm_rotate`: one program for each token, which reads its rows twice, then from the cache.

pass 1: sum of squares over all heads                  pass 2: · rstd · weight → round → rotate pairs → round
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_CHUNK = 1024
CHANNELS_PER_WARP = 256
"""8 channels, 16 bytes, for each of 32 threads."""


@triton.jit
def _pairs(x, CHUNK: tl.constexpr):
    """Even and odd channels."""
    return tl.split(tl.reshape(x, [CHUNK // 2, 2]))


@triton.jit
def _norm_rotate_row(
    x_ptr, weight_ptr, out_ptr, cos_ptr, sin_ptr, eps,
    CHANNELS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunk = tl.arange(0, CHUNK)
    squares = tl.zeros([CHUNK], tl.float32)
    for start in range(0, CHANNELS, CHUNK):
        x = tl.load(x_ptr + start + chunk).to(tl.float32)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares) / CHANNELS + eps)
    for start in range(0, CHANNELS, CHUNK):
        channel = start + chunk
        x = tl.load(x_ptr + channel).to(tl.float32) * rstd * tl.load(weight_ptr + channel).to(tl.float32)
        first, second = _pairs(x.to(out_ptr.dtype.element_ty).to(tl.float32), CHUNK)
        cos, _ = _pairs(tl.load(cos_ptr + channel % D), CHUNK)
        _, sin = _pairs(tl.load(sin_ptr + channel % D), CHUNK)
        rotated = tl.join(first * cos - second * sin, first * sin + second * cos)
        tl.store(out_ptr + channel, tl.reshape(rotated, [CHUNK]).to(out_ptr.dtype.element_ty))


@triton.jit
def _norm_rotate_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, tokens,
    q_stride_b, q_stride_n, k_stride_b, k_stride_n, eps, CHANNELS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, n = row // tokens, row % tokens
    cos_ptr += n * D
    sin_ptr += n * D
    _norm_rotate_row(
        q_ptr + b * q_stride_b + n * q_stride_n, q_weight_ptr, q_out_ptr + row * CHANNELS, cos_ptr, sin_ptr, eps,
        CHANNELS, D, CHUNK,
    )  # fmt: skip
    _norm_rotate_row(
        k_ptr + b * k_stride_b + n * k_stride_n, k_weight_ptr, k_out_ptr + row * CHANNELS, cos_ptr, sin_ptr, eps,
        CHANNELS, D, CHUNK,
    )  # fmt: skip


def norm_rotate(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cosines: Tensor, sines: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Norm and rotate q and k (B, N, H·D) into (B, N, H, D); see `rotary.norm_rotate`."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    batch, tokens, channels = q.shape
    chunk = min(channels & -channels, LARGEST_CHUNK)  # the largest power of two that divides them
    out = [torch.empty(batch, tokens, heads, channels // heads, dtype=x.dtype, device=x.device) for x in (q, k)]
    _norm_rotate_kernel[(batch * tokens,)](
        q, k, *(x.contiguous() for x in (q_weight, k_weight, cosines, sines)), *out, tokens,
        *q.stride()[:2], *k.stride()[:2], eps,
        CHANNELS=channels, D=channels // heads, CHUNK=chunk, num_warps=max(1, chunk // CHANNELS_PER_WARP),
    )  # fmt: skip
    return out[0], out[1]
