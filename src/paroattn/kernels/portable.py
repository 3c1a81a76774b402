"""Block-sparse attention in Triton for any GPU, one program per (tile of query rows, head, batch element).

    for each query row of a tile, in base 2 (scales carry log2 e):
        m, total, acc = −∞, 0, 0                running maximum, sum of weights, output
        for each kept key block j:              from a list made of the packed bits; dropped blocks are never read
            s = q k_jᵀ                          INT8: the accumulator starts at BIAS and is read as a float
            b = rowmax s · scale
            m' = max(m, b)
            INT p:     p̂ = round(exp2(s · scale − b) · top)          stored against the block's own maximum
                   total = total · exp2(m − m') + rowsum p̂ · exp2(b − m')
                   acc = acc · exp2(m − m') + p̂ v_j · exp2(b − m')
        others:    p = exp2(s · scale − m') · top, total and acc as usual; m' is what rounding makes of it
    out = acc / total · v_scale             lse = (m + log2 (total / top)) ln 2 + softmax_scale · q·k̄

INT8 p̂ is unsigned, 0…255: the product runs on p̂ − 128 and starts at BIAS + 128 · sum of v over the block.

The key block in which the real tokens end is the only one that is masked; it comes last. Blocks after it are not read.

Layout: operands of `prepare`; out (B, N, H, D) and lse (B, H, N) in the model's token order. Grid: tiles one after the
other, densest head first, all batch elements of a head together, and its longest rows first.
Not handled: head dimensions above 128, formats other than int8, int4 (in bytes), fp8 (P·V only), bf16 and fp16.
"""

from typing import Any

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..precision import Precision
from .elements import _exp2, _round
from .prepare import LOG2_E, Operands
from .tiles import INTERPRETED, Tile, capability, units, warps_for


@triton.jit
def _rename(p, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Columns 16 h + 8 g + 2 t + i → 16 h + 4 t + 2 g + i: what a thread has accumulated is what it multiplies next."""
    p = tl.reshape(p, [ROWS, KEYS // 32, 2, 2, 4, 2])
    return tl.reshape(tl.permute(p, (0, 1, 2, 4, 3, 5)), [ROWS, KEYS])


@triton.jit
def _by_step(p, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """The four steps of all chains, (ROWS, KEYS / 64, 16) each; see `four_bits.round_weights`."""
    p = tl.permute(tl.reshape(p, [ROWS, KEYS // 64, 2, 2, 16]), (0, 1, 4, 2, 3))
    even, odd = tl.split(p)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _carried_on(p, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """0…240 as int32 → 0…15, each taking over what is left of the 16th key before it."""
    a, b, c, d = _by_step(p, ROWS, KEYS)
    a += (tl.arange(0, ROWS)[:, None, None] * 3 + tl.arange(0, 16)[None, None, :] * 9) & 15
    b += a
    c += b
    d += c
    even = tl.join(a >> 4, (c >> 4) - (b >> 4))
    odd = tl.join((b >> 4) - (a >> 4), (d >> 4) - (c >> 4))
    return tl.reshape(tl.permute(tl.join(even, odd), (0, 1, 3, 4, 2)), [ROWS, KEYS])


@triton.jit
def _key_block(
    j, m, total, acc, q, q_scale, k_ref, k_scale_ptr, v_ref, v_start_ptr, k_row, v_row, v_stride, scale_row, limit,
    QK: tl.constexpr, PV: tl.constexpr, TOP: tl.constexpr, LOG2_TOP: tl.constexpr, MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr, ON_GPU: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: m, total and acc after key block j."""
    n, d = tl.arange(0, KEYS), tl.arange(0, D_PAD)
    first = j * KEYS
    if DESCRIPTORS:
        k = k_ref.load([k_row + first, 0])
    else:
        k = tl.load(k_ref + (first + n)[:, None] * D_PAD + d[None, :])  # (KEYS, D_PAD)
    if QK == "int8":
        start = tl.full([ROWS, KEYS], 0x4B400000, tl.int32)
        s = tl.dot(q, tl.trans(k), start, out_dtype=tl.int32).to(tl.float32, bitcast=True)
        scale = q_scale * tl.load(k_scale_ptr + scale_row + j)  # (ROWS,)
        offset = 12582912.0
    else:
        s = tl.dot(q, tl.trans(k).to(q.dtype))
        scale = q_scale
        offset = 0.0
    if MASKED:
        s = tl.where((first + n)[None, :] < limit, s, float("-inf"))
    top = tl.max(s, 1)
    highest = (top - offset) * scale
    new = tl.maximum(m, highest)
    if PV == "int8" or PV == "int4":
        origin = -(top * scale)
        unit = TOP * _exp2(-tl.fma(top, scale, origin), ON_GPU)  # undoes what rounding did to origin
    else:
        origin = tl.fma(scale, -offset, LOG2_TOP - new)
        new = LOG2_TOP - tl.fma(scale, offset, origin)  # goes along with what rounding did to origin
    p = _exp2(tl.fma(s, scale[:, None], origin[:, None]), ON_GPU)
    old_share = _exp2(m - new, ON_GPU)
    if PV == "int4":
        p = _carried_on(_round(p * unit[:, None]), ROWS, KEYS)
        added = tl.sum(p, 1).to(tl.float32)
        p = _rename(p.to(tl.int8), ROWS, KEYS)
    elif PV == "int8":
        bits = tl.fma(p, unit[:, None], 12582784.0).to(tl.int32, bitcast=True)  # + BIAS − 128: the low byte is p̂ − 128
        added = (tl.sum(bits, 1) - KEYS * 0xFF80) & 0xFFFF  # the sum of p̂, whatever wrapped around
        added = (added | 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
        p = _rename(bits.to(tl.int8), ROWS, KEYS)
    else:
        added = tl.sum(p, 1)
    if PV == "fp8":
        p = _rename(p.to(tl.float8e4nv), ROWS, KEYS)
    if PV == "half":
        if DESCRIPTORS:
            v = v_ref.load([v_row + first, 0])
        else:
            v = tl.load(v_ref + (first + n)[:, None] * D_PAD + d[None, :])  # (KEYS, D_PAD)
        p = p.to(v.dtype)
        if ON_GPU:
            acc = tl.dot(p, v, acc * old_share[:, None])
        else:  # the interpreter multiplies no bf16
            acc = tl.dot(p.to(tl.float32), v.to(tl.float32), acc * old_share[:, None], input_precision="ieee")
    else:
        if DESCRIPTORS:
            v = v_ref.load([v_row, first])
        else:
            v = tl.load(v_ref + d[:, None] * v_stride + (first + n)[None, :])  # (D_PAD, KEYS)
        if PV == "int8" or PV == "int4":
            share = _exp2(highest - new, ON_GPU)
            added *= share
            if PV == "int8":
                start = tl.load(v_start_ptr + (scale_row + j) * D_PAD + d)
                start = tl.broadcast_to(start[None, :], [ROWS, D_PAD])
            else:
                start = tl.full([ROWS, D_PAD], 0x4B400000, tl.int32)
            pv = tl.dot(p, tl.trans(v), start, out_dtype=tl.int32).to(tl.float32, bitcast=True)
            acc = acc * old_share[:, None] + (pv * share[:, None] - (12582912.0 * share)[:, None])
        else:
            acc = acc * old_share[:, None] + tl.dot(p, tl.trans(v))
    total = total * old_share + added
    return new, total, acc


@triton.jit
def _sparse_kernel(
    q_ptr, k_ref, v_ref, q_scale_ptr, k_scale_ptr, v_scale_ptr, v_start_ptr, shift_ptr,
    lists_ptr, counts_ptr, bits_ptr, tiles_ptr, table_ptr, order_ptr, valid_ptr, out_ptr, lse_ptr,
    B, N, H, ROW_BLOCKS, KEY_BLOCKS, BYTES, q_scale,
    QK: tl.constexpr, PV: tl.constexpr, TOP: tl.constexpr, LOG2_TOP: tl.constexpr,
    HAS_LSE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    DESCRIPTORS: tl.constexpr, ON_GPU: tl.constexpr, PLAIN_DOT: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Rows of out and lse; grid (H · B · query blocks · tiles per query block,)."""
    part, pair = tl.program_id(0) % SPLIT, tl.program_id(0) // SPLIT
    tile = tl.load(
        tiles_ptr + pair // (ROW_BLOCKS * B) * ROW_BLOCKS + pair % ROW_BLOCKS
    )  # head · row blocks + row block
    b, h = pair // ROW_BLOCKS % B, tile // ROW_BLOCKS
    bh = (b * H + h).to(tl.int64)
    d = tl.arange(0, D_PAD)
    rows = ((tile % ROW_BLOCKS) * SPLIT + part) * ROWS + tl.arange(0, ROWS)
    q_rows = bh * ROW_BLOCKS * SPLIT * ROWS + rows
    q = tl.load(q_ptr + q_rows[:, None] * D_PAD + d[None, :])
    if PLAIN_DOT:
        q = q.to(tl.float32)
    if QK == "int8":
        row_scale = tl.load(q_scale_ptr + q_rows)
    else:
        row_scale = tl.full([ROWS], q_scale, tl.float32)

    scale_row = bh * KEY_BLOCKS
    v_stride = KEY_BLOCKS * KEYS
    if DESCRIPTORS:
        k, k_row = k_ref, (bh * v_stride).to(tl.int32)
        v, v_row = v_ref, (bh * v_stride if PV == "half" else bh * D_PAD).to(tl.int32)
    else:
        k, k_row = k_ref + bh * v_stride * D_PAD, 0
        v, v_row = v_ref + bh * v_stride * D_PAD, 0

    m = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    list_ptr = lists_ptr + tile.to(tl.int64) * KEY_BLOCKS
    count = tl.load(counts_ptr + b.to(tl.int64) * H * ROW_BLOCKS + tile)
    for i in range(count):
        j = tl.load(list_ptr + i).to(tl.int32)
        m, total, acc = _key_block(
            j, m, total, acc, q, row_scale, k, k_scale_ptr, v, v_start_ptr, k_row, v_row, v_stride, scale_row, 0,
            QK, PV, TOP, LOG2_TOP, False, DESCRIPTORS, ON_GPU, ROWS, KEYS, D_PAD,
        )  # fmt: skip
    valid = tl.load(valid_ptr + b).to(tl.int32)
    j = valid // KEYS
    if valid % KEYS > 0:
        if (tl.load(bits_ptr + tile.to(tl.int64) * BYTES + j // 8).to(tl.int32) >> (j % 8)) & 1 > 0:
            m, total, acc = _key_block(
                j, m, total, acc, q, row_scale, k, k_scale_ptr, v, v_start_ptr, k_row, v_row, v_stride, scale_row,
                valid,
                QK, PV, TOP, LOG2_TOP, True, DESCRIPTORS, ON_GPU, ROWS, KEYS, D_PAD,
            )  # fmt: skip

    out = acc * (1.0 / tl.maximum(total, 1e-30))[:, None]
    if PV != "half":
        out *= tl.load(v_scale_ptr + bh * D_PAD + d)[None, :]
    position = tl.load(table_ptr + tl.load(order_ptr + h).to(tl.int64) * N + rows, mask=rows < N, other=0)
    out_rows = (b.to(tl.int64) * N + position) * H + h
    inside = (rows < N)[:, None] & (d < D)[None, :]
    tl.store(out_ptr + out_rows[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
    if HAS_LSE:
        lse = (m + tl.log2(tl.maximum(total, 1e-30)) - LOG2_TOP) * 0.6931471805599453
        if HAS_SHIFT:
            lse += tl.load(shift_ptr + q_rows)
        tl.store(lse_ptr + bh * N + position, tl.where(total > 0, lse, float("-inf")), mask=rows < N)


def launch(
    operands: Operands,
    *,
    block: tuple[int, int],
    tile: Tile,
    programs: int,
    precision: Precision,
    softmax_scale: float,
    **arguments: Any,
) -> None:
    """Run the kernel on prepared operands.

    Args:
        operands: From `prepare`.
        block: Tokens of a query block and of a key block.
        tile: How it is compiled.
        programs: Query blocks of all heads and batch elements.
        precision: Formats of the two products.
        softmax_scale: What q · k is multiplied by.
        arguments: As `sparse.attend` names them.
    """
    parts = units(precision)
    d_pad, keys, eight_bits = operands.q.shape[-1], block[1], parts["PV"] != "half"
    rows = min(tile.rows, block[0])
    warps = warps_for(rows, tile.warps, capability(operands.q.device))
    split = block[0] // rows
    k, v = operands.k, operands.v
    if tile.descriptors:
        k = TensorDescriptor.from_tensor(k.view(-1, d_pad), [keys, d_pad])
        v = TensorDescriptor.from_tensor(v.view(-1, v.shape[-1]), [d_pad, keys] if eight_bits else [keys, d_pad])
    _sparse_kernel[(programs * split,)](
        operands.q, k, v, **arguments, **parts, v_start_ptr=operands.v_start, q_scale=softmax_scale * LOG2_E,
        DESCRIPTORS=tile.descriptors,
        ON_GPU=not INTERPRETED, PLAIN_DOT=INTERPRETED and parts["QK"] == "half",
        ROWS=rows, SPLIT=split, D_PAD=d_pad, num_warps=warps, num_stages=tile.stages,
    )  # fmt: skip
