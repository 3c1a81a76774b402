"""What kernels do to the numbers of a tile: gather, rotate, and round to eight or to four bits."""

import triton
import triton.language as tl


@triton.jit
def _gather(x_ptr, stride_n, stride_d, position, real, D: tl.constexpr, D_PAD: tl.constexpr):
    """Tokens of one head, (tokens, D_PAD) in their own dtype; 0 where not real and in the padding channels."""
    d = tl.arange(0, D_PAD)
    offsets = position.to(tl.int64)[:, None] * stride_n + d[None, :] * stride_d
    return tl.load(x_ptr + offsets, mask=real[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _exp2(x, ASSEMBLY: tl.constexpr):
    """2ˣ without the code for denormals that `tl.exp2` adds."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.exp2(x)


@triton.jit
def _round(x):
    """Nearest integer of float32 |x| < 2²², ties to even, as int32."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _piece(row, column, BYTES: tl.constexpr, SWIZZLED: tl.constexpr):
    """Where the bytes `column` of rows of 64 or 128 bytes lie in them."""
    if SWIZZLED:
        turn = row % 8 if BYTES == 128 else row // 2 % 4
        return tl.max_contiguous(tl.multiple_of(column[None, :] ^ (turn * 16)[:, None], (1, 16)), (1, 16))
    else:
        return column[None, :]


@triton.jit
def _rotate(x, signs, ON_GPU: tl.constexpr):
    """Multiply by ±1 on matrix units, with float32 as the sum of three bf16; the interpreter multiplies no bf16."""
    if not ON_GPU:
        return tl.dot(x.to(tl.float32), signs.to(tl.float32), input_precision="ieee")
    elif x.dtype == tl.float32:
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(high, signs, tl.dot(middle, signs, tl.dot(low, signs)))
    else:
        return tl.dot(x, signs)


@triton.jit
def _rotated(
    x_ptr, signs, stride_n, stride_d, position, real, norm, ON_GPU: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Tokens as they are and rotated, in halves of 64 channels; of 64 channels both halves are the same.

    The rotation of 128 channels is one of 64 on either half, their sum and their difference.
    """
    x = _gather(x_ptr, stride_n, stride_d, position, real, D, 64)
    left = _rotate(x, signs, ON_GPU) * norm
    if D_PAD == 64:
        return x, x, left, left
    else:
        y = _gather(x_ptr + 64 * stride_d, stride_n, stride_d, position, real, D - 64, 64)
        right = _rotate(y, signs, ON_GPU) * norm
        return x, y, left + right, left - right


@triton.jit
def _head(x_ptr, table_ptr, order_ptr, valid_ptr, stride_b, stride_h, N, H, OF_KEYS: tl.constexpr):
    """A program's head of a batch element, by axis 1 of the grid: its number, real tokens, positions and tokens."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    limit = tl.load(valid_ptr + b).to(tl.int32) if OF_KEYS else N
    return bh, limit, table_ptr + tl.load(order_ptr + h).to(tl.int64) * N, x_ptr + b * stride_b + h * stride_h


@triton.jit
def _along(x, y, vector_ptr, D_PAD: tl.constexpr):
    """Tokens, in halves of 64 channels, times a vector: (tokens,) in float32."""
    d = tl.arange(0, 64)
    product = tl.sum(x.to(tl.float32) * tl.load(vector_ptr + d)[None, :], 1)
    if D_PAD == 128:
        product += tl.sum(y.to(tl.float32) * tl.load(vector_ptr + 64 + d)[None, :], 1)
    return product


@triton.jit
def _centred(left, right, real, centre_ptr, D_PAD: tl.constexpr):
    """Rotated tokens less a vector, in halves as `_rotated` gives them; 0 where not real."""
    d = tl.arange(0, 64)
    left = tl.where(real[:, None], left - tl.load(centre_ptr + d)[None, :], 0.0)
    if D_PAD == 64:
        return left, left
    else:
        return left, tl.where(real[:, None], right - tl.load(centre_ptr + 64 + d)[None, :], 0.0)


@triton.jit
def _nearest(x):
    """Nearest integer of float32 |x| < 2²², ties to even, as float32."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _nearest_four_bits(x):
    """Nearest of −8…7, as float32."""
    return _nearest(tl.clamp(x, -8.0, 7.0))


@triton.jit
def _tokens(x_ptr, row_ptr, stride_n, stride_d, limit, n, D: tl.constexpr, D_PAD: tl.constexpr):
    """Tokens n of a head, (tokens, D_PAD) in float32; 0 from the limit on."""
    real = n < limit
    position = tl.load(row_ptr + n, mask=real, other=0)
    return _gather(x_ptr, stride_n, stride_d, position, real, D, D_PAD).to(tl.float32)


@triton.jit
def _extremes(
    x_ptr, row_ptr, stride_n, stride_d, limit, n, RUN: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Smallest and largest of the RUN tokens from each of n on."""
    lowest = _tokens(x_ptr, row_ptr, stride_n, stride_d, limit, n, D, D_PAD)
    highest = lowest
    for i in range(1, RUN):
        x = _tokens(x_ptr, row_ptr, stride_n, stride_d, limit, n + i, D, D_PAD)
        lowest, highest = tl.minimum(lowest, x), tl.maximum(highest, x)
    return lowest, highest


@triton.jit
def _carried_token(
    total, fourth, middle, x_ptr, row_ptr, stride_n, stride_d, inverse, carry, from_fourth, limit, n, D: tl.constexpr,
):  # fmt: skip
    """Four bits for tokens n, one of every run, that make up for shares of errors; all errors so far, and theirs."""
    target = _tokens(x_ptr, row_ptr, stride_n, stride_d, limit, n, D, 64) * inverse[None, :] - middle
    rounded = _nearest_four_bits(target - carry * total - from_fourth * fourth)
    error = rounded - target
    return _round(rounded).to(tl.int8), total + error, error


@triton.jit
def _four_carried_tokens(
    total, e, f, g, h, middle, x_ptr, row_ptr, stride_n, stride_d, inverse, carry, from_fourth, limit, n,
    D: tl.constexpr,
):  # fmt: skip
    """Four tokens one after the other, (runs, 64, 2, 2) with the lowest bit first; the four before err e, f, g, h."""
    a, total, e = _carried_token(
        total, e, middle, x_ptr, row_ptr, stride_n, stride_d, inverse, carry, from_fourth, limit, n, D
    )
    b, total, f = _carried_token(
        total, f, middle, x_ptr, row_ptr, stride_n, stride_d, inverse, carry, from_fourth, limit, n + 1, D
    )
    c, total, g = _carried_token(
        total, g, middle, x_ptr, row_ptr, stride_n, stride_d, inverse, carry, from_fourth, limit, n + 2, D
    )
    d, total, h = _carried_token(
        total, h, middle, x_ptr, row_ptr, stride_n, stride_d, inverse, carry, from_fourth, limit, n + 3, D
    )
    return tl.join(tl.join(a, b), tl.join(c, d)), total, e, f, g, h


@triton.jit
def _carried_runs(
    x_ptr, row_ptr, stride_n, stride_d, inverse, carry, from_fourth, limit, first, D: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Runs of 16 tokens in four bits, int8, token 8 g + 4 t₁ + 2 t₀ + i at (run, channel, i, t₀, t₁, g), and middles.

    See `four_bits.round_values`.
    """
    n = first + tl.arange(0, TOKENS // 16) * 16
    lowest, highest = _extremes(x_ptr, row_ptr, stride_n, stride_d, limit, n, 16, D, 64)
    middle = _nearest((lowest + highest) * 0.5 * inverse[None, :])
    total = tl.zeros([TOKENS // 16, 64], tl.float32)
    a, total, e, f, g, h = _four_carried_tokens(
        total, total, total, total, total, middle, x_ptr, row_ptr, stride_n, stride_d, inverse, carry, from_fourth,
        limit, n, D,
    )  # fmt: skip
    b, total, e, f, g, h = _four_carried_tokens(
        total, e, f, g, h, middle, x_ptr, row_ptr, stride_n, stride_d, inverse, carry, from_fourth, limit, n + 4, D
    )
    c, total, e, f, g, h = _four_carried_tokens(
        total, e, f, g, h, middle, x_ptr, row_ptr, stride_n, stride_d, inverse, carry, from_fourth, limit, n + 8, D
    )
    d, total, e, f, g, h = _four_carried_tokens(
        total, e, f, g, h, middle, x_ptr, row_ptr, stride_n, stride_d, inverse, carry, from_fourth, limit, n + 12, D
    )
    return tl.join(tl.join(a, b), tl.join(c, d)), _round(middle).to(tl.int8)


@triton.jit
def _transposed_runs(runs, middle, TOKENS: tl.constexpr):
    """(64, TOKENS) int8 with their middles, tokens renamed as for INT8."""
    runs += tl.reshape(middle, [TOKENS // 16, 64, 1, 1, 1, 1])
    return tl.reshape(tl.permute(runs, (1, 0, 4, 3, 5, 2)), [64, TOKENS])


@triton.jit
def _packed_runs(runs, TOKENS: tl.constexpr):
    """(64, TOKENS / 2) bytes of two tokens each, token 32 h + 16 s + 8 g + 2 t + i at 32 h + 8 t + 4 g + 2 i + s."""
    pairs = tl.reshape(runs, [TOKENS // 32, 2, 64, 2, 2, 2, 2])  # h, s, channel, i, t₀, t₁, g
    pairs = tl.reshape(tl.permute(pairs, (2, 0, 5, 4, 6, 3, 1)), [64, TOKENS // 2, 2])
    return _two_in_a_byte(pairs)


@triton.jit
def _packed_middles(middle, TOKENS: tl.constexpr):
    """(64, TOKENS / 32) words, of two runs each in the lower two bytes."""
    pairs = tl.permute(tl.reshape(middle.to(tl.int32), [TOKENS // 32, 2, 64]), (2, 0, 1))
    first, second = tl.split(pairs)
    return (first & 255) | ((second & 255) << 8)


@triton.jit
def _two_in_a_byte(pairs):
    """The first in the lower half; of larger integers the last four bits."""
    first, second = tl.split(pairs)
    return ((first & 15) | (second << 4)).to(tl.int8)
