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
def _nearest_four_bits(x):
    """Nearest of −8…7, as float32."""
    return tl.clamp(_round(x).to(tl.float32), -8.0, 7.0)


@triton.jit
def _fed_back(
    near, far, feedback_ptr, group,
    FAR: tl.constexpr, ON_GPU: tl.constexpr, D_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Round 16 of the 64 channels in `near`, and make up for it there and in `far`, the 64 channels before them."""
    c, d = tl.arange(0, 16), tl.arange(0, 64)
    parts = tl.reshape(near, [TOKENS, 4, 16])
    wanted = tl.sum(tl.where((tl.arange(0, 4) == group)[None, :, None], parts, 0.0), 1)
    error = _nearest_four_bits(wanted) - wanted
    first = D_PAD - 64 if FAR else 0
    row_ptr = feedback_ptr + (first + group * 16 + c)[:, None] * D_PAD + d[None, :]
    precision: tl.constexpr = "tf32" if ON_GPU else "ieee"
    near = tl.dot(error, tl.load(row_ptr + first), near, input_precision=precision)
    if FAR:
        far = tl.dot(error, tl.load(row_ptr), far, input_precision=precision)
    return near, far


@triton.jit
def _four_bits(
    left, right, feedback_ptr, ON_GPU: tl.constexpr, D_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Integers, as float32, for targets of 64 or 2 · 64 channels, the last first; see `four_bits.round_channels`."""
    if D_PAD == 128:
        for group in tl.static_range(3, -1, -1):
            right, left = _fed_back(right, left, feedback_ptr, group, True, ON_GPU, D_PAD, TOKENS)
    for group in tl.static_range(3, -1, -1):
        left, right = _fed_back(left, right, feedback_ptr, group, False, ON_GPU, D_PAD, TOKENS)
    return left, right


@triton.jit
def _middle(x, TOKENS: tl.constexpr, RUN: tl.constexpr):
    """The middle between largest and smallest of every RUN tokens, (TOKENS, 64)."""
    runs = tl.reshape(x, [TOKENS // RUN, RUN, 64])
    middle = (tl.max(runs, 1) + tl.min(runs, 1)) * 0.5
    return tl.reshape(tl.broadcast_to(middle[:, None, :], [TOKENS // RUN, RUN, 64]), [TOKENS, 64])


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
    return rounded.to(tl.int8), wanted - rounded


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
def _packed(x, TOKENS: tl.constexpr):
    """(TOKENS, 32) bytes of two neighbouring channels each, from (TOKENS, 64)."""
    return _two_in_a_byte(tl.reshape(x, [TOKENS, 32, 2]))


@triton.jit
def _two_in_a_byte(pairs):
    """The first in the lower half; of larger integers the last four bits."""
    first, second = tl.split(pairs)
    return ((first & 15) | (second << 4)).to(tl.int8)


@triton.jit
def _store_packed(
    block_ptr, left, right, left_middle, right_middle,
    IS_KEY: tl.constexpr, RUN: tl.constexpr, D_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Store a block of Q, or of K and then the lower and the upper four bits of every run's middle."""
    place = tl.arange(0, TOKENS)
    at = block_ptr + place[:, None] * (D_PAD // 2) + tl.arange(0, 32)[None, :]
    tl.store(at, _packed(_round(left), TOKENS))
    if D_PAD == 128:
        tl.store(at + 32, _packed(_round(right), TOKENS))
    if IS_KEY:
        at += (TOKENS - place + place // RUN * 2 + place % RUN)[:, None] * (D_PAD // 2)
        lower, one_of_two = (place % RUN == 0)[:, None], (place % RUN < 2)[:, None]
        middle = _round(left_middle)
        tl.store(at, _packed(tl.where(lower, middle, (middle + 8) >> 4), TOKENS), mask=one_of_two)
        if D_PAD == 128:
            middle = _round(right_middle)
            tl.store(at + 32, _packed(tl.where(lower, middle, (middle + 8) >> 4), TOKENS), mask=one_of_two)
