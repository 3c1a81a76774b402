"""Rows of Q and K in four bits, as `four_bits` rounds them: what `prepare` starts for INT4 where it rounds rows."""

import triton
import triton.language as tl

from .elements import _along, _centred, _head, _nearest, _nearest_four_bits, _rotated, _round, _two_in_a_byte


@triton.jit
def _halves(x, TOKENS: tl.constexpr, HALF: tl.constexpr):
    """The lower and the upper half of the channels."""
    return tl.split(tl.permute(tl.reshape(x, [TOKENS, 2, HALF]), (0, 2, 1)))


@triton.jit
def _whole(low, high, TOKENS: tl.constexpr, HALF: tl.constexpr):
    """Two halves of channels side by side."""
    return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), [TOKENS, 2 * HALF])


@triton.jit
def _made_up_for(low, error, feedback_ptr, first, SIZE: tl.constexpr, D_PAD: tl.constexpr):
    """Targets of SIZE channels from `first` on, after errors in as many channels that follow them."""
    d = tl.arange(0, SIZE)
    part = tl.load(feedback_ptr + (first + SIZE + d)[:, None] * D_PAD + (first + d)[None, :])
    return tl.dot(error, part, low)


@triton.jit
def _in_turn(
    x, video, feedback_ptr, first,
    SIZE: tl.constexpr, HAS_TEXT: tl.constexpr, D_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Integers for targets of SIZE channels from `first` on, as float32, and their errors; the last 16 come first.

    Text is in eight bits, and none of its errors is made up for.
    """
    if SIZE == 16:
        stored = _nearest_four_bits(x)
        if HAS_TEXT:
            stored = tl.where(video[:, None], stored, _nearest(x))
            return stored, tl.where(video[:, None], stored - x, 0.0).to(tl.float16)
        else:
            return stored, (stored - x).to(tl.float16)
    else:
        HALF: tl.constexpr = SIZE // 2
        low, high = _halves(x, TOKENS, HALF)
        high, high_error = _in_turn(high, video, feedback_ptr, first + HALF, HALF, HAS_TEXT, D_PAD, TOKENS)
        low = _made_up_for(low, high_error, feedback_ptr, first, HALF, D_PAD)
        low, low_error = _in_turn(low, video, feedback_ptr, first, HALF, HAS_TEXT, D_PAD, TOKENS)
        return _whole(low, high, TOKENS, HALF), _whole(low_error, high_error, TOKENS, HALF)


@triton.jit
def _middle(x, TOKENS: tl.constexpr, RUN: tl.constexpr):
    """The middle between largest and smallest of every RUN tokens, (TOKENS, 64)."""
    runs = tl.reshape(x, [TOKENS // RUN, RUN, 64])
    middle = (tl.max(runs, 1) + tl.min(runs, 1)) * 0.5
    return tl.reshape(tl.broadcast_to(middle[:, None, :], [TOKENS // RUN, RUN, 64]), [TOKENS, 64])


@triton.jit
def _farthest(x, middle, share):
    """How far x is from its middle, or a share of how far that is from 0, whichever is more."""
    return tl.maximum(tl.abs(x - middle), tl.abs(middle) * share)


@triton.jit
def _packed(x, TOKENS: tl.constexpr):
    """(TOKENS, 32) bytes of two neighbouring channels each, from (TOKENS, 64)."""
    return _two_in_a_byte(tl.reshape(x, [TOKENS, 32, 2]))


@triton.jit
def _store(
    out_ptr, x, middle, real,
    IS_KEY: tl.constexpr, PACKED: tl.constexpr, RUN: tl.constexpr, D_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Store 64 channels of a block: in bytes with their middles; packed, they follow by lower and upper four bits."""
    place = tl.arange(0, TOKENS)
    if IS_KEY:
        x = tl.where(real[:, None], x if PACKED else x + middle, 0.0)
    if not PACKED:
        tl.store(out_ptr + place[:, None] * D_PAD + tl.arange(0, 64)[None, :], _round(x).to(tl.int8))
    else:
        at = out_ptr + place[:, None] * (D_PAD // 2) + tl.arange(0, 32)[None, :]
        tl.store(at, _packed(_round(x), TOKENS))
        if IS_KEY:
            at += (TOKENS - place + place // RUN * 2 + place % RUN)[:, None] * (D_PAD // 2)
            lower, one_of_two = (place % RUN == 0)[:, None], (place % RUN < 2)[:, None]
            middle = _round(middle)
            tl.store(at, _packed(tl.where(lower, middle, (middle + 8) >> 4), TOKENS), mask=one_of_two)


@triton.jit
def _four_bit_rows_kernel(
    x_ptr, table_ptr, order_ptr, valid_ptr, signs_ptr, mean_ptr, centre_ptr, feedback_ptr, out_ptr, scale_ptr,
    shift_ptr,
    stride_b, stride_n, stride_h, stride_d,
    N, H, BLOCKS, VIDEO, factor, softmax_scale, smallest, norm, top, highest_middle,
    IS_KEY: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_TEXT: tl.constexpr, PACKED: tl.constexpr, RUN: tl.constexpr,
    ON_GPU: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, TOKENS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """A few blocks of rows of Q or K, one after the other; grid (token blocks / AT_ONCE, B·H). Text begins at VIDEO."""
    bh, limit, row_ptr, x_ptr = _head(x_ptr, table_ptr, order_ptr, valid_ptr, stride_b, stride_h, N, H, IS_KEY)
    place, d = tl.arange(0, TOKENS), tl.arange(0, 64)
    signs = tl.load(signs_ptr + d[:, None] * D_PAD + d[None, :])
    feedback_ptr += bh * D_PAD * D_PAD
    IN_BYTES: tl.constexpr = D_PAD // 2 if PACKED else D_PAD
    HALF: tl.constexpr = 32 if PACKED else 64
    STORED: tl.constexpr = TOKENS + TOKENS // 16 if IS_KEY and PACKED else TOKENS
    first = tl.program_id(0) * AT_ONCE
    for block in range(first, tl.minimum(first + AT_ONCE, BLOCKS)):
        n = block * TOKENS + place
        real = n < limit
        position = tl.load(row_ptr + n, mask=real, other=0)
        x, y, left, right = _rotated(x_ptr, signs, stride_n, stride_d, position, real, norm, ON_GPU, D, D_PAD)
        rows = bh * BLOCKS * TOKENS + n
        if HAS_SHIFT:
            tl.store(shift_ptr + rows, _along(x, y, mean_ptr + bh * D_PAD, D_PAD) * softmax_scale)
        if IS_KEY:
            video = tl.full([TOKENS], 0, tl.int32) + (block + 1) * TOKENS <= VIDEO
            left, right = _centred(left, right, real, centre_ptr + bh * D_PAD, D_PAD)
            left_middle = _middle(left, TOKENS, RUN)
            farthest = _farthest(left, left_middle, top / highest_middle)
            right_middle = left_middle
            if D_PAD == 128:
                right_middle = _middle(right, TOKENS, RUN)
                farthest = tl.maximum(farthest, _farthest(right, right_middle, top / highest_middle))
            scale = tl.max(farthest, 1) / top
            if HAS_TEXT:
                largest = tl.max(tl.maximum(tl.abs(left), tl.abs(right)), 1)
                scale = tl.where(video, scale, largest / 127.0)
            scale = tl.maximum(tl.max(scale, 0), smallest)
            tl.store(scale_ptr + bh * BLOCKS + block, scale)
            inverse = tl.full([TOKENS], 1.0, tl.float32) / scale
            of_middle = tl.where(video, inverse, 0.0) if HAS_TEXT else inverse
            left_middle = _nearest(left_middle * of_middle[:, None])
            left = left * inverse[:, None] - left_middle
            if D_PAD == 128:
                right_middle = _nearest(right_middle * of_middle[:, None])
                right = right * inverse[:, None] - right_middle
        else:
            video = n < VIDEO
            left_middle, right_middle = 0.0, 0.0
            largest = tl.max(tl.maximum(tl.abs(left), tl.abs(right)), 1)
            scale = tl.maximum(largest / (tl.where(video, top, 127.0) if HAS_TEXT else top), smallest)
            tl.store(scale_ptr + rows, scale * factor)
            inverse = 1.0 / scale
            left, right = left * inverse[:, None], right * inverse[:, None]
        block_ptr = out_ptr + (bh * BLOCKS + block) * (STORED * IN_BYTES)
        if D_PAD == 128:
            right, error = _in_turn(right, video, feedback_ptr, 64, 64, HAS_TEXT, D_PAD, TOKENS)
            _store(block_ptr + HALF, right, right_middle, real, IS_KEY, PACKED, RUN, D_PAD, TOKENS)
            left = _made_up_for(left, error, feedback_ptr, 0, 64, D_PAD)
        left, error = _in_turn(left, video, feedback_ptr, 0, 64, HAS_TEXT, D_PAD, TOKENS)
        _store(block_ptr, left, left_middle, real, IS_KEY, PACKED, RUN, D_PAD, TOKENS)
