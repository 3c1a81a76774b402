"""What must be known of a whole head before its tokens are rounded: K's mean, and how far V goes.

One pass over V and over every few tokens of K adds up chunks, a second brings the chunks of each head together.
"""

import triton
import triton.language as tl

from .elements import _extremes, _tokens


@triton.jit
def _chunk(
    x_ptr, row_ptr, out_ptr, stride_n, stride_d, start, limit,
    LARGEST: tl.constexpr, EVERY: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    TOKENS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Sum, or largest magnitude, of every EVERY-th token of a chunk."""
    found = tl.zeros([STEP, D_PAD], tl.float32)
    for first in range(start, start + TOKENS, STEP):
        x = _tokens(x_ptr, row_ptr, stride_n, stride_d, limit, (first + tl.arange(0, STEP)) * EVERY, D, D_PAD)
        if LARGEST:
            found = tl.maximum(found, tl.abs(x))
        else:
            found += x
    tl.store(out_ptr + tl.arange(0, D_PAD), tl.max(found, 0) if LARGEST else tl.sum(found, 0))


@triton.jit
def _chunk_of_runs(
    x_ptr, row_ptr, out_ptr, stride_n, stride_d, start, limit, share,
    RUN: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """How far the tokens of a chunk's runs go from their middles, or a share of the largest middle if that is more."""
    n = start + tl.arange(0, TOKENS // RUN) * RUN
    lowest, highest = _extremes(x_ptr, row_ptr, stride_n, stride_d, limit, n, RUN, D, D_PAD)
    found = tl.maximum(highest - lowest, tl.abs(highest + lowest) * share) * 0.5
    tl.store(out_ptr + tl.arange(0, D_PAD), tl.max(found, 0))


@triton.jit
def _sum_kernel(
    k_ptr, v_ptr, table_ptr, order_ptr, valid_ptr, sums_ptr, largest_ptr,
    k_stride_b, k_stride_n, k_stride_h, k_stride_d,
    v_stride_b, v_stride_n, v_stride_h, v_stride_d,
    N, H, K_CHUNKS, V_CHUNKS, share,
    RUN: tl.constexpr, EVERY: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    TOKENS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Sums of every EVERY-th real token of K and how far V goes, by chunks; grid (K's and V's chunks, B·H)."""
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    limit = tl.load(valid_ptr + b).to(tl.int32)
    row_ptr = table_ptr + tl.load(order_ptr + h).to(tl.int64) * N
    if chunk < K_CHUNKS:
        k_ptr += b * k_stride_b + h * k_stride_h
        sums_ptr += (bh * K_CHUNKS + chunk) * D_PAD
        _chunk(k_ptr, row_ptr, sums_ptr, k_stride_n, k_stride_d, chunk * TOKENS, limit,
               False, EVERY, D, D_PAD, TOKENS, STEP)  # fmt: skip
    else:
        chunk -= K_CHUNKS
        v_ptr += b * v_stride_b + h * v_stride_h
        largest_ptr += (bh * V_CHUNKS + chunk) * D_PAD
        if RUN == 1:
            _chunk(v_ptr, row_ptr, largest_ptr, v_stride_n, v_stride_d, chunk * TOKENS, limit,
                   True, 1, D, D_PAD, TOKENS, STEP)  # fmt: skip
        else:
            _chunk_of_runs(v_ptr, row_ptr, largest_ptr, v_stride_n, v_stride_d, chunk * TOKENS, limit, share,
                           RUN, D, D_PAD, TOKENS)  # fmt: skip


@triton.jit
def _finish_kernel(
    sums_ptr, largest_ptr, valid_ptr, signs_ptr, mean_ptr, centre_ptr, v_scale_ptr,
    H, K_CHUNKS, V_CHUNKS, v_top, smallest, norm,
    HAS_K: tl.constexpr, HAS_V: tl.constexpr, EVERY: tl.constexpr, D_PAD: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Chunks → k̄, k̄ R and V's scales; grid (B·H,)."""
    bh = tl.program_id(0).to(tl.int64)
    step, d = tl.arange(0, STEP), tl.arange(0, D_PAD)
    if HAS_K:
        sums = tl.zeros([STEP, D_PAD], tl.float32)
        for start in range(0, K_CHUNKS, STEP):
            chunk = start + step
            place = (bh * K_CHUNKS + chunk)[:, None] * D_PAD + d[None, :]
            sums += tl.load(sums_ptr + place, mask=(chunk < K_CHUNKS)[:, None], other=0.0)
        counted = tl.maximum((tl.load(valid_ptr + bh // H).to(tl.int32) + EVERY - 1) // EVERY, 1)
        mean = tl.sum(sums, 0) / counted.to(tl.float32)
        tl.store(mean_ptr + bh * D_PAD + d, mean)
        signs = tl.load(signs_ptr + d[:, None] * D_PAD + d[None, :]).to(tl.float32)
        tl.store(centre_ptr + bh * D_PAD + d, tl.sum(mean[:, None] * signs, 0) * norm)
    if HAS_V:
        largest = tl.zeros([STEP, D_PAD], tl.float32)
        for start in range(0, V_CHUNKS, STEP):
            chunk = start + step
            place = (bh * V_CHUNKS + chunk)[:, None] * D_PAD + d[None, :]
            found = tl.load(largest_ptr + place, mask=(chunk < V_CHUNKS)[:, None], other=0.0)
            largest = tl.maximum(largest, found)
        tl.store(v_scale_ptr + bh * D_PAD + d, tl.maximum(tl.max(largest, 0) / v_top, smallest))
