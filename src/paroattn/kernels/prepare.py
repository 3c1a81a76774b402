"""Operands of the block-sparse kernel: gathered into kernel order, rotated, quantised and, where 8-bit, transposed.

    k̄, v_max = mean of every 8th real token of K, largest |V| per channel           one pass over V, 1/8 of K
    Q: x R → int8, one scale per token, times softmax_scale · log2 e                 R: Hadamard rotation
    K: (x − k̄) R → int8, one scale per key block
    V: x → int8 or fp8, one scale per channel, stored transposed, its tokens renamed inside each group of 32
    INT4: the integers of `four_bits`, packed or as bytes, which hold K's and V's with their middles, and of text INT8's

(x − k̄) R is computed as x R − k̄ R: 16-bit x and the signs of R are exact, so the product runs on matrix units.

Renaming: an 8-bit left operand wants four neighbouring columns in a register where an accumulator holds two. The sparse
kernel takes column 16 h + 8 g + 2 t + i of P for column 16 h + 4 t + 2 g + i; V's tokens are stored in that order.

Layout: q, k and 16-bit v (B, H, tokens, D'), 8-bit v (B, H, D', tokens), D' = 64 or 128, tokens padded to whole blocks.
Padding, of channels and of tokens, is 0; what pads the text counts as padding in K and V. 16-bit operands are only
gathered. Swizzled, for products that read them where bulk copies put them: v (B, H, key blocks, D', tokens of a block),
and row n of every 8-bit operand with its 16-byte pieces p at p ⊕ (n mod 8), or at p ⊕ (n / 2 mod 4) in rows of 64.

Packed, two numbers share a byte, the first in its lower half: q (B, H, tokens, D' / 2); k (B, H, key blocks,
tokens of a block + a 16th, D' / 2), where the lower and the upper four bits of each middle follow what is left of the
tokens; v (B, H, key blocks, D', tokens of a block / 2 + 16), where words follow that hold the middles of two runs in
their lower bytes. V's tokens and channels are renamed inside each group of 32: token 32 h + 16 s + 8 g + 2 t + i is at
32 h + 8 t + 4 g + 2 i + s, and channel 32 h + 8 t + 2 g + i at 32 h + 8 g + 2 t + i.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..precision import FORMATS, SMALLEST_SCALE, Precision, hadamard
from . import four_bits
from .elements import (
    _along,
    _carried_runs,
    _centred,
    _gather,
    _head,
    _packed_middles,
    _packed_runs,
    _piece,
    _rotated,
    _round,
    _transposed_runs,
)
from .feedback import feedback_of
from .four_bit_rows import _four_bit_rows_kernel
from .reference import MEAN_OF_EVERY
from .tiles import INTERPRETED, capability, rows_of, warps_for
from .totals import _finish_kernel, _sum_kernel

LOG2_E = 1.4426950408889634
BIAS = 0x4B400000
"""These bits plus s, read as float32, are 12582912 + s for every integer |s| < 2²²."""
STORED = {
    "int8": torch.int8,
    "int4": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
FOUR_BITS_TOP = {part: four_bits.HIGHEST / reach for part, reach in four_bits.REACH.items()}
V_TOP = {"int8": 127.0, "int4": FOUR_BITS_TOP["v"], "fp8": 448.0}
"""Where the largest value of a channel is put."""
# fastest of those measured on an H200
TOKENS_PER_SUM = 512
TOKENS_AT_ONCE = 64
WARPS_PER_SUM = 8
BLOCKS_AT_ONCE = 4
KEY_BLOCKS_AT_ONCE = {64: 4, 128: 8}
KEY_WARPS = {64: 4, 128: 8}
STAGES = 3


@dataclass(frozen=True)
class Operands:
    """What the sparse kernel reads; shapes of q, k and v unless packed.

    Attributes:
        q: (B, H, query tokens, D').
        k: (B, H, key tokens, D').
        v: (B, H, D', key tokens) in 8 bits, (B, H, key blocks, D', tokens) if swizzled; else (B, H, key tokens, D').
        q_scale: (B, H, query tokens) float32, softmax_scale · log2 e included; None for 16 bits.
        k_scale: (B, H, key blocks) float32, swizzled the first of (B, H, key blocks, 4); None for 16 bits.
        v_scale: (B, H, D') float32; None for 16 bits.
        v_start: (B, H, key blocks, D') int32 for INT8: `BIAS` + 128 · sum of v over the block; else None.
        shift: (B, H, query tokens) float32: softmax_scale · q·k̄, what smoothing took from lse; None if nothing.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    v_start: Tensor | None
    shift: Tensor | None


@triton.jit
def _gather_kernel(
    x_ptr, table_ptr, order_ptr, valid_ptr, out_ptr,
    stride_b, stride_n, stride_h, stride_d,
    N, H,
    IS_QUERY: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One block of rows of a 16-bit operand; grid (token blocks, B·H)."""
    block, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    n, d = block * TOKENS + tl.arange(0, TOKENS), tl.arange(0, D_PAD)
    limit = N if IS_QUERY else tl.load(valid_ptr + b).to(tl.int32)
    real = n < limit
    position = tl.load(table_ptr + tl.load(order_ptr + h).to(tl.int64) * N + n, mask=real, other=0)
    x = _gather(x_ptr + b * stride_b + h * stride_h, stride_n, stride_d, position, real, D, D_PAD)
    rows = bh * tl.num_programs(0) * TOKENS + n
    tl.store(out_ptr + rows[:, None] * D_PAD + d[None, :], x.to(out_ptr.dtype.element_ty))


@triton.jit
def _rows_kernel(
    x_ptr, table_ptr, order_ptr, valid_ptr, signs_ptr, mean_ptr, centre_ptr, out_ptr, scale_ptr, shift_ptr,
    stride_b, stride_n, stride_h, stride_d,
    N, H, BLOCKS, factor, softmax_scale, smallest, norm, top,
    IS_KEY: tl.constexpr, HAS_SHIFT: tl.constexpr, ON_GPU: tl.constexpr, SWIZZLED: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, TOKENS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """A few blocks of rows of Q or K in INT8, one after the other; grid (token blocks / AT_ONCE, B·H)."""
    bh, limit, row_ptr, x_ptr = _head(x_ptr, table_ptr, order_ptr, valid_ptr, stride_b, stride_h, N, H, IS_KEY)
    place, d = tl.arange(0, TOKENS), tl.arange(0, 64)
    signs = tl.load(signs_ptr + d[:, None] * D_PAD + d[None, :])
    first = tl.program_id(0) * AT_ONCE
    for block in range(first, tl.minimum(first + AT_ONCE, BLOCKS)):
        n = block * TOKENS + place
        real = n < limit
        position = tl.load(row_ptr + n, mask=real, other=0)
        x, y, left, right = _rotated(x_ptr, signs, stride_n, stride_d, position, real, norm, ON_GPU, D, D_PAD)
        if IS_KEY:
            left, right = _centred(left, right, real, centre_ptr + bh * D_PAD, D_PAD)
        largest = tl.max(tl.maximum(tl.abs(left), tl.abs(right)), 1)
        rows = bh * BLOCKS * TOKENS + n
        if IS_KEY:
            scale = tl.maximum(tl.max(largest, 0) / top, smallest)
            tl.store(scale_ptr + (bh * BLOCKS + block) * (4 if SWIZZLED else 1), scale)
            inverse = tl.full([TOKENS], 1.0, tl.float32) / scale
        else:
            scale = tl.maximum(largest / top, smallest)
            tl.store(scale_ptr + rows, scale * factor)
            inverse = 1.0 / scale
        out = out_ptr + rows[:, None] * D_PAD
        tl.store(out + _piece(n, d, D_PAD, SWIZZLED), _round(left * inverse[:, None]).to(tl.int8))
        if D_PAD == 128:
            tl.store(out + _piece(n, d + 64, D_PAD, SWIZZLED), _round(right * inverse[:, None]).to(tl.int8))
        if HAS_SHIFT:
            tl.store(shift_ptr + rows, _along(x, y, mean_ptr + bh * D_PAD, D_PAD) * softmax_scale)


@triton.jit
def _values_kernel(
    v_ptr, table_ptr, order_ptr, valid_ptr, v_scale_ptr, out_ptr, start_ptr,
    stride_b, stride_n, stride_h, stride_d,
    N, H, carry, from_fourth,
    STORED: tl.constexpr, PACKED: tl.constexpr, SWIZZLED: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """64 channels of one key block of V in 8 or 4 bits; grid (key blocks · D_PAD / 64, B·H)."""
    PARTS: tl.constexpr = D_PAD // 64
    block, bh = tl.program_id(0) // PARTS, tl.program_id(1).to(tl.int64)
    blocks = tl.num_programs(0) // PARTS
    first = tl.program_id(0) % PARTS * 64
    b, h = bh // H, bh % H
    place, d = tl.arange(0, TOKENS), first + tl.arange(0, 64)
    limit = tl.load(valid_ptr + b)
    row_ptr = table_ptr + tl.load(order_ptr + h).to(tl.int64) * N
    v_ptr += b * stride_b + h * stride_h + first * stride_d
    tokens = blocks.to(tl.int64) * TOKENS
    inverse = 1.0 / tl.load(v_scale_ptr + bh * D_PAD + d)
    if SWIZZLED:
        rows = (bh * blocks + block) * D_PAD + d
        out = out_ptr + rows[:, None] * TOKENS + _piece(d, place, TOKENS, True)
    else:
        out = out_ptr + (bh * D_PAD + d)[:, None] * tokens + (block * TOKENS + place)[None, :]
    if STORED == "int4":
        runs, middle = _carried_runs(
            v_ptr, row_ptr, stride_n, stride_d, inverse, carry, from_fourth, limit, block * TOKENS, D - first, TOKENS
        )
        if PACKED:
            row = (d & ~30) | ((d & 24) >> 2) | ((d & 6) << 2)  # 32 h + 8 t + 2 g + i → 32 h + 8 g + 2 t + i
            out = out_ptr + ((bh * blocks + block) * D_PAD + row)[:, None] * (TOKENS // 2 + 16)
            tl.store(out + tl.arange(0, TOKENS // 2)[None, :], _packed_runs(runs, TOKENS))
            words = (out + TOKENS // 2).to(tl.pointer_type(tl.int32)) + tl.arange(0, TOKENS // 32)[None, :]
            middles = _packed_middles(middle, TOKENS)
            tl.store(words, middles)
            if TOKENS == 64:
                tl.store(words + 2, tl.zeros_like(middles))
        else:
            tl.store(out, _transposed_runs(runs, middle, TOKENS))
    else:
        token = (place & ~14) | ((place & 2) << 2) | ((place & 12) >> 1)  # 16 h + 4 t + 2 g + i → 16 h + 8 g + 2 t + i
        n = block * TOKENS + token
        position = tl.load(row_ptr + n, mask=n < limit, other=0)
        v = _gather(v_ptr, stride_n, stride_d, position, n < limit, D - first, 64)
        scaled = v.to(tl.float32) * inverse[None, :]
        if STORED == "int8":
            rounded = _round(scaled)
            tl.store(out, tl.trans(rounded.to(tl.int8)))
            start = tl.sum(rounded, 0) * 128 + 0x4B400000
            tl.store(start_ptr + (bh * blocks + block) * D_PAD + d, start)
        else:
            tl.store(out, tl.trans(tl.clamp(scaled, -448.0, 448.0).to(tl.float8e4nv)))


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    table: Tensor,
    order: Tensor,
    valid: Tensor,
    block: tuple[int, int],
    precision: Precision,
    softmax_scale: float,
    with_shift: bool,
    text_tokens: int = 0,
    packed: bool = False,
    swizzled: bool = False,
) -> Operands:
    """Gather, rotate, quantise and transpose: the integers of `reference_attention`.

    Args:
        q, k, v: (B, N, H, D) in the model's order, any strides, D ≤ 128.
        table: Gather tables (orders, N), int32.
        order: Row of `table` for each head, (H,).
        valid: (B,) int: keys from this kernel position on are padding.
        block: Tokens of a query block and of a key block.
        precision: Formats of the two products.
        softmax_scale: Factor on q·k.
        with_shift: Return `shift`, which lse needs.
        text_tokens: How many tokens are text, the last ones in kernel order.
        packed: For INT4 of both products without text: store two numbers in a byte.
        swizzled: For INT8 Q·K: store 8-bit operands swizzled.
    """
    batch, tokens, heads, channels = q.shape
    d_pad = 64 if channels <= 64 else 128
    smoothed, scaled = FORMATS[precision.qk].scaled, FORMATS[precision.pv].scaled
    query_blocks, key_blocks = triton.cdiv(tokens, block[0]), triton.cdiv(tokens, block[1])

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(batch, heads, *shape, dtype=dtype, device=q.device)

    tokens_args = {"table_ptr": table, "order_ptr": order, "valid_ptr": valid, "N": tokens, "H": heads}
    sizes = {"D": channels, "D_PAD": d_pad}
    constants = {"smallest": SMALLEST_SCALE, "norm": d_pad**-0.5}
    signs = _signs(d_pad, q.dtype, q.device)
    mean, centre, v_scale = (empty(d_pad) for _ in range(3))

    if smoothed or scaled:
        k_chunks = triton.cdiv(tokens, MEAN_OF_EVERY * TOKENS_PER_SUM) * smoothed
        v_chunks = triton.cdiv(tokens, TOKENS_PER_SUM) * scaled
        sums, largest = empty(k_chunks, d_pad), empty(v_chunks, d_pad)
        chunks = {"K_CHUNKS": k_chunks, "V_CHUNKS": v_chunks}
        _sum_kernel[(k_chunks + v_chunks, batch * heads)](
            k, v, sums_ptr=sums, largest_ptr=largest, **tokens_args, **_strides(k, "k_"), **_strides(v, "v_"), **chunks,
            share=FOUR_BITS_TOP["v"] / four_bits.LARGEST_MIDDLE, RUN=four_bits.RUN if precision.pv == "int4" else 1,
            EVERY=MEAN_OF_EVERY, **sizes, TOKENS=TOKENS_PER_SUM, STEP=TOKENS_AT_ONCE, num_warps=WARPS_PER_SUM,
        )  # fmt: skip
        _finish_kernel[(batch * heads,)](
            sums, largest, valid, signs, mean, centre, v_scale, heads, **chunks,
            v_top=V_TOP.get(precision.pv, 1.0), **constants, HAS_K=smoothed, HAS_V=scaled,
            EVERY=MEAN_OF_EVERY, D_PAD=d_pad, STEP=TOKENS_AT_ONCE,
        )  # fmt: skip

    shift = empty(query_blocks * block[0]) if smoothed and with_shift else None

    def gathered(x: Tensor, blocks: int, size: int, form: str, is_query: bool) -> Tensor:
        out = empty(blocks * size, d_pad, dtype=STORED[form])
        _gather_kernel[(blocks, batch * heads)](
            x, out_ptr=out, **tokens_args, **_strides(x), IS_QUERY=is_query, **sizes, TOKENS=size,
        )  # fmt: skip
        return out

    in_four_bits = precision.qk == "int4"
    for_queries, for_keys = None, None
    if in_four_bits:
        for_queries, for_keys = feedback_of(
            q, k, signs=signs, centre=centre, norm=d_pad**-0.5, strides=_strides(q, "q_") | _strides(k, "k_"),
            sizes=sizes, **tokens_args,
        )  # fmt: skip

    def rows(x: Tensor, blocks: int, size: int, is_key: bool) -> tuple[Tensor, Tensor | None]:
        if not smoothed:
            return gathered(x, blocks, size, precision.qk, not is_key), None
        if not packed:
            out = empty(blocks * size, d_pad, dtype=torch.int8)
        elif is_key:
            out = empty(blocks, size + size // 16, d_pad // 2, dtype=torch.int8)
        else:
            out = empty(blocks * size, d_pad // 2, dtype=torch.int8)
        tile = size if is_key else min(size, 64)
        scale = empty(*((blocks, 4) if swizzled else (blocks,))) if is_key else empty(blocks * size)
        blocks = blocks * size // tile
        at_once = KEY_BLOCKS_AT_ONCE[d_pad] if is_key else BLOCKS_AT_ONCE
        common = tokens_args | constants | sizes | _strides(x) | {
            "signs_ptr": signs, "mean_ptr": mean, "centre_ptr": centre, "out_ptr": out, "scale_ptr": scale,
            "shift_ptr": None if is_key else shift, "HAS_SHIFT": shift is not None and not is_key, "IS_KEY": is_key,
            "BLOCKS": blocks, "TOKENS": tile, "AT_ONCE": at_once, "ON_GPU": not INTERPRETED,
            "factor": softmax_scale * LOG2_E, "softmax_scale": softmax_scale,
        }  # fmt: skip
        grid, has = (triton.cdiv(blocks, at_once), batch * heads), capability(q.device)
        if in_four_bits:
            how = rows_of(has, is_key, d_pad)
            _four_bit_rows_kernel[grid](
                x, feedback_ptr=for_keys if is_key else for_queries, top=FOUR_BITS_TOP["k" if is_key else "q"],
                highest_middle=four_bits.LARGEST_MIDDLE, RUN=four_bits.TOKENS_PER_MIDDLE, PACKED=packed,
                HAS_TEXT=text_tokens > 0, VIDEO=tokens - text_tokens,
                num_warps=warps_for(tile, how.warps, has), num_stages=how.stages,
                maxnreg=None if packed else how.registers, **common,
            )  # fmt: skip
        else:
            warps = 8 if x.dtype == torch.float32 else KEY_WARPS[d_pad] if is_key else 4
            _rows_kernel[grid](
                x, top=127.0, SWIZZLED=swizzled, num_warps=warps_for(tile, warps, has), num_stages=STAGES, **common,
            )  # fmt: skip
        return out, scale

    q_, q_scale = rows(q, query_blocks, block[0], is_key=False)
    k_, k_scale = rows(k, key_blocks, block[1], is_key=True)
    if not scaled:
        v_ = gathered(v, key_blocks, block[1], precision.pv, False)
        return Operands(q_, k_, v_, q_scale, k_scale, None, None, shift)
    v_blocks = (key_blocks, d_pad, block[1] // 2 + 16 if packed else block[1])
    v_shape = v_blocks if packed or swizzled else (d_pad, key_blocks * block[1])
    v_ = empty(*v_shape, dtype=STORED[precision.pv])
    v_start = empty(key_blocks, d_pad, dtype=torch.int32) if precision.pv == "int8" else None
    _values_kernel[(key_blocks * d_pad // 64, batch * heads)](
        v, v_scale_ptr=v_scale, out_ptr=v_, start_ptr=v_start, **tokens_args, **_strides(v),
        carry=four_bits.CARRY, from_fourth=four_bits.CARRY_FROM_FOURTH,
        STORED=precision.pv, PACKED=packed, SWIZZLED=swizzled, **sizes, TOKENS=block[1],
    )  # fmt: skip
    return Operands(q_, k_, v_, q_scale, k_scale, v_scale, v_start, shift)


def _strides(x: Tensor, name: str = "") -> dict[str, int]:
    return {f"{name}stride_{axis}": x.stride(i) for i, axis in enumerate("bnhd")}


@cache
def _signs(d_pad: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The Hadamard matrix as ±1, in bf16 for float32 tensors."""
    return hadamard(d_pad).sign().to(device, torch.bfloat16 if dtype == torch.float32 else dtype)
