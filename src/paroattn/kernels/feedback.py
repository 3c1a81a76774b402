"""What `four_bits.feedback` computes, in two launches for Q and K of all heads, neither of which waits for the host.

One adds up Wᵢ = Σ x xᵀ over chunks of the sampled tokens. The other eliminates 16 channels after the other from
W + λ, and does to a unit matrix what it does to W: W = U D Uᵀ with U unit lower triangular by blocks, and what becomes
of the unit matrix is U⁻¹, the feedback.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..precision import SMALLEST_SCALE
from . import four_bits
from .elements import _rotated
from .tiles import INTERPRETED

SAMPLES_PER_SUM = 512
SAMPLES_AT_ONCE = 32


@triton.jit
def _add_product(total, a, b, ON_GPU: tl.constexpr):
    """Add aᵀ b, on matrix units with float32 as the sum of two bf16."""
    if ON_GPU:
        a_high, b_high = a.to(tl.bfloat16), b.to(tl.bfloat16)
        a_low, b_low = (a - a_high.to(tl.float32)).to(tl.bfloat16), (b - b_high.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(tl.trans(a_low), b_high, total)
        total = tl.dot(tl.trans(a_high), b_low, total)
        return tl.dot(tl.trans(a_high), b_high, total)
    else:
        return tl.dot(tl.trans(a), b, total, input_precision="ieee")


@triton.jit
def _chunk_moments(
    x_ptr, row_ptr, signs, centre_ptr, out_ptr, stride_n, stride_d, start, limit, norm,
    CENTRED: tl.constexpr, EVERY: tl.constexpr, ON_GPU: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    SAMPLES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Sum of x xᵀ over a chunk of samples, the blocks on and below the diagonal."""
    d = tl.arange(0, 64)
    first = tl.zeros([64, 64], tl.float32)
    below = tl.zeros([64, 64], tl.float32)
    second = tl.zeros([64, 64], tl.float32)
    for sample in range(start, tl.minimum(start + SAMPLES, tl.cdiv(limit, EVERY)), STEP):
        n = (sample + tl.arange(0, STEP)) * EVERY
        real = n < limit
        position = tl.load(row_ptr + n, mask=real, other=0)
        _, _, left, right = _rotated(x_ptr, signs, stride_n, stride_d, position, real, norm, ON_GPU, D, D_PAD)
        if CENTRED:
            left = tl.where(real[:, None], left - tl.load(centre_ptr + d)[None, :], 0.0)
        first = _add_product(first, left, left, ON_GPU)
        if D_PAD == 128:
            if CENTRED:
                right = tl.where(real[:, None], right - tl.load(centre_ptr + 64 + d)[None, :], 0.0)
            below = _add_product(below, right, left, ON_GPU)
            second = _add_product(second, right, right, ON_GPU)
    out_ptr += d[:, None] * D_PAD + d[None, :]
    tl.store(out_ptr, first)
    if D_PAD == 128:
        tl.store(out_ptr + 64 * D_PAD, below)
        tl.store(out_ptr + 64 * D_PAD + 64, second)


@triton.jit
def _moments_kernel(
    q_ptr, k_ptr, table_ptr, order_ptr, valid_ptr, signs_ptr, centre_ptr, moments_ptr,
    q_stride_b, q_stride_n, q_stride_h, q_stride_d,
    k_stride_b, k_stride_n, k_stride_h, k_stride_d,
    N, H, CHUNKS, norm,
    EVERY: tl.constexpr, ON_GPU: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    SAMPLES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Moments of K (less its mean) and of Q, both rotated, by chunks of samples; grid (2 · chunks, B·H)."""
    part, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h, d = bh // H, bh % H, tl.arange(0, 64)
    limit = tl.load(valid_ptr + b).to(tl.int32)
    row_ptr = table_ptr + tl.load(order_ptr + h).to(tl.int64) * N
    signs = tl.load(signs_ptr + d[:, None] * D_PAD + d[None, :])
    if part < CHUNKS:
        k_ptr += b * k_stride_b + h * k_stride_h
        moments_ptr += (bh * CHUNKS + part) * D_PAD * D_PAD
        _chunk_moments(k_ptr, row_ptr, signs, centre_ptr + bh * D_PAD, moments_ptr, k_stride_n, k_stride_d,
                       part * SAMPLES, limit, norm, True, EVERY, ON_GPU, D, D_PAD, SAMPLES, STEP)  # fmt: skip
    else:
        part -= CHUNKS
        q_ptr += b * q_stride_b + h * q_stride_h
        moments_ptr += ((tl.num_programs(1) + bh) * CHUNKS + part) * D_PAD * D_PAD
        _chunk_moments(q_ptr, row_ptr, signs, centre_ptr, moments_ptr, q_stride_n, q_stride_d,
                       part * SAMPLES, limit, norm, False, EVERY, ON_GPU, D, D_PAD, SAMPLES, STEP)  # fmt: skip


@triton.jit
def _inverse(a, SIZE: tl.constexpr):
    """Inverse of a positive definite matrix: after a sweep for each row it is what became of the matrix, times −1."""
    i = tl.arange(0, SIZE)
    for pivot in range(SIZE):
        own = i == pivot
        column = tl.sum(tl.where(own[None, :], a, 0.0), 1)
        size = tl.sum(tl.where(own, column, 0.0))
        column = tl.where(own, -1.0, column)
        others = tl.where(own[:, None] | own[None, :], 0.0, a)
        a = others - column[:, None] * (column / size)[None, :]
    return -a


@triton.jit
def _factor_kernel(
    moments_ptr, rows_ptr, feedback_ptr, CHUNKS, damping, smallest,
    ON_GPU: tl.constexpr, D_PAD: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Chunks of moments → feedback; grid (matrices,). Keeps the rows of one group at a time in `rows_ptr`."""
    matrix = tl.program_id(0).to(tl.int64)
    i, j, group = tl.arange(0, D_PAD)[:, None], tl.arange(0, D_PAD)[None, :], tl.arange(0, GROUP)
    low = tl.maximum(i, j) * D_PAD + tl.minimum(i, j)
    a = tl.zeros([D_PAD, D_PAD], tl.float32)
    for chunk in range(CHUNKS):
        a += tl.load(moments_ptr + (matrix * CHUNKS + chunk) * D_PAD * D_PAD + low)
    size = tl.maximum(tl.sum(tl.where(i == j, a, 0.0)) / D_PAD, smallest)
    a = a / size + tl.where(i == j, damping, 0.0)
    found = tl.where(i == j, 1.0, 0.0)
    rows_ptr += matrix * 2 * GROUP * D_PAD
    feedback_ptr += matrix * D_PAD * D_PAD
    precision: tl.constexpr = "tf32x3" if ON_GPU else "ieee"
    for first in range(0, D_PAD, GROUP):
        now = (i >= first) & (i < first + GROUP)
        tl.debug_barrier()  # the rows before these have been read
        place = rows_ptr + (i - first) * D_PAD + j
        tl.store(place, a, mask=now)
        tl.store(place + GROUP * D_PAD, found, mask=now)
        tl.store(feedback_ptr + i * D_PAD + j, found.to(tl.float16), mask=now)
        tl.debug_barrier()
        place = rows_ptr + group[:, None] * D_PAD + j
        own = tl.load(rows_ptr + group[:, None] * D_PAD + first + group[None, :])
        down = tl.load(rows_ptr + group[None, :] * D_PAD + i, mask=i >= first + GROUP, other=0.0)
        share = tl.dot(down, _inverse(own, GROUP), input_precision=precision)
        a -= tl.dot(share, tl.load(place), input_precision=precision)
        found -= tl.dot(share, tl.load(place + GROUP * D_PAD), input_precision=precision)


def feedback_of(
    q: Tensor,
    k: Tensor,
    *,
    signs: Tensor,
    centre: Tensor,
    norm: float,
    strides: dict[str, int],
    sizes: dict[str, int],
    **tokens: Tensor | int,
) -> tuple[Tensor, Tensor]:
    """`four_bits.feedback` for queries and for keys, (B, H, D', D') float16, each from tokens of the other.

    Args:
        q, k: (B, N, H, D) in the model's order.
        signs: The rotation as ±1, (D', D').
        centre: The mean that is taken from rotated keys, (B, H, D') float32.
        norm: Factor on ±1.
        strides: Of q and k, by the names that the kernel gives them.
        sizes: D and D'.
        tokens: Gather tables, what each head reads of them, and what is real: as other kernels that prepare take them.
    """
    batch, heads, d_pad = centre.shape
    chunks = triton.cdiv(q.shape[1], four_bits.SAMPLE_OF_EVERY * SAMPLES_PER_SUM)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(2, batch, heads, *shape, d_pad, dtype=dtype, device=q.device)

    moments, rows, found = empty(chunks, d_pad), empty(2, four_bits.GROUP), empty(d_pad, dtype=torch.float16)
    _moments_kernel[(2 * chunks, batch * heads)](
        q, k, signs_ptr=signs, centre_ptr=centre, moments_ptr=moments, CHUNKS=chunks, norm=norm, **tokens, **strides,
        EVERY=four_bits.SAMPLE_OF_EVERY, ON_GPU=not INTERPRETED, **sizes, SAMPLES=SAMPLES_PER_SUM, STEP=SAMPLES_AT_ONCE,
        num_stages=1,
    )  # fmt: skip
    _factor_kernel[(2 * batch * heads,)](
        moments, rows, found, chunks, four_bits.DAMPING, SMALLEST_SCALE,
        ON_GPU=not INTERPRETED, D_PAD=d_pad, GROUP=four_bits.GROUP, num_warps=d_pad // 16, num_stages=1,
    )  # fmt: skip
    return found[0], found[1]
