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
def _round(x):
    """Nearest integer of float32 |x| < 2²², ties to even, as int32."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


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
def _nearest(x):
    """Nearest integer of float32 |x| < 2²², ties to even, as float32."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _nearest_four_bits(x):
    """Nearest of −8…7, as float32."""
    return _nearest(tl.clamp(x, -8.0, 7.0))


@triton.jit
def _carried_token(
    error, x_ptr, row_ptr, stride_n, stride_d, inverse, carry, limit, n, D: tl.constexpr,
):  # fmt: skip
    """Four bits for tokens n, one of every run, with a share of the error of those before them; and their own error."""
    real = n < limit
    position = tl.load(row_ptr + n, mask=real, other=0)
    x = _gather(x_ptr, stride_n, stride_d, position, real, D, 64).to(tl.float32)
    wanted = x * inverse[None, :] + carry * error
    rounded = _nearest_four_bits(wanted)
    return _round(rounded).to(tl.int8), wanted - rounded


@triton.jit
def _four_carried_tokens(
    error, x_ptr, row_ptr, stride_n, stride_d, inverse, carry, limit, n, D: tl.constexpr,
):  # fmt: skip
    """Four tokens one after the other, (runs, 64, 2, 2) with the lowest bit first."""
    a, error = _carried_token(error, x_ptr, row_ptr, stride_n, stride_d, inverse, carry, limit, n, D)
    b, error = _carried_token(error, x_ptr, row_ptr, stride_n, stride_d, inverse, carry, limit, n + 1, D)
    c, error = _carried_token(error, x_ptr, row_ptr, stride_n, stride_d, inverse, carry, limit, n + 2, D)
    d, error = _carried_token(error, x_ptr, row_ptr, stride_n, stride_d, inverse, carry, limit, n + 3, D)
    return tl.join(tl.join(a, b), tl.join(c, d)), error


@triton.jit
def _carried_runs(
    x_ptr, row_ptr, stride_n, stride_d, inverse, carry, limit, first, D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Runs of 16 tokens in four bits, int8, token 8 g + 4 t₁ + 2 t₀ + i at (run, channel, i, t₀, t₁, g).

    See `four_bits.round_values`.
    """
    n = first + tl.arange(0, TOKENS // 16) * 16
    error = tl.zeros([TOKENS // 16, 64], tl.float32)
    a, error = _four_carried_tokens(error, x_ptr, row_ptr, stride_n, stride_d, inverse, carry, limit, n, D)
    b, error = _four_carried_tokens(error, x_ptr, row_ptr, stride_n, stride_d, inverse, carry, limit, n + 4, D)
    c, error = _four_carried_tokens(error, x_ptr, row_ptr, stride_n, stride_d, inverse, carry, limit, n + 8, D)
    d, error = _four_carried_tokens(error, x_ptr, row_ptr, stride_n, stride_d, inverse, carry, limit, n + 12, D)
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def _transposed_runs(runs, TOKENS: tl.constexpr):
    """(64, TOKENS) int8, tokens renamed as for INT8."""
    return tl.reshape(tl.permute(runs, (1, 0, 4, 3, 5, 2)), [64, TOKENS])


@triton.jit
def _packed_runs(runs, TOKENS: tl.constexpr):
    """(64, TOKENS / 2) bytes of two tokens each, token 32 h + 8 g + 2 t + i at 32 h + 8 t + 2 g + i."""
    pairs = tl.reshape(runs, [TOKENS // 32, 2, 64, 2, 2, 2, 2])  # h, g₁, channel, i, t₀, t₁, g₀
    pairs = tl.reshape(tl.permute(pairs, (2, 0, 5, 4, 1, 6, 3)), [64, TOKENS // 2, 2])
    return _two_in_a_byte(pairs)


@triton.jit
def _two_in_a_byte(pairs):
    """The first in the lower half; of larger integers the last four bits."""
    first, second = tl.split(pairs)
    return ((first & 15) | (second << 4)).to(tl.int8)
