"""Block-sparse attention for Hopper (sm_90): what `portable.py` computes, with every copy and product placed by hand.

A program is one warpgroup with 64 query rows. Blocks of K and V come through TMA into a ring of STAGES stages, refilled
as soon as a block is done, and products run on wgmma. Few registers and little shared memory let three to five programs
share a multiprocessor: while one is in its softmax, another multiplies.

Layout, masking and launch order: as in `portable.py`, for INT8 Q·K with FP8 or INT8 P·V. Numbers too, except that INT8
P passes through half precision and may round to a neighbour, and that `matrix_sums` sum FP8 P after rounding.
"""

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .tiles import Ring

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # the name before Triton 3.7


@gluon.jit
def _exp2(x):
    """2ˣ without the code for denormals that `gl.exp2` adds."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


_ROUND_TO_INT8: gl.constexpr = gl.constexpr("""{
    .reg .b32 low, high, unit, bias;
    cvt.rn.f16x2.f32 low, $2, $1;
    cvt.rn.f16x2.f32 high, $4, $3;
    cvt.rn.f16x2.f32 unit, $5, $5;
    mov.b32 bias, 0x64806480;
    fma.rn.f16x2 low, low, unit, bias;
    fma.rn.f16x2 high, high, unit, bias;
    prmt.b32 $0, low, high, 0x6420;
}""")
"""Four p times their row's unit: 1152 + p in half precision has p − 128 for its low byte."""


def _chains_to_int4() -> str:
    """Assembly that rounds 64 keys of two rows, of which a thread has 32 numbers, each with its row's unit and starts.

    Sums of every 16th key start at 1024 to 1039 in half precision. Their low bytes hold the sum modulo 16 and what is
    left; with the latter all ones, differences between steps lose nothing to the byte beside them but some of these.
    """
    lines = [f".reg .b32 low, high, unit, {', '.join(f's{x}, d{x}' for x in range(8))};"]
    for row in range(2):
        lines += [f"cvt.rn.f16x2.f32 unit, ${40 + 4 * row}, ${40 + 4 * row};", *_chains_of_a_row(row)]
    return "\n".join(["{", *lines, *(f"mov.b32 ${x}, d{x};" for x in range(8)), "}"])


def _chains_of_a_row(row: int) -> list[str]:
    lines = [f"mov.b32 low, ${72 + 4 * row};", "xor.b32 high, low, 0x00080008;"]
    for x in range(row, 8, 2):
        for i, half in enumerate(("low", "high")):
            first = 8 + 4 * x + 2 * i
            lines += [
                f"cvt.rn.f16x2.f32 d{x}, ${first + 1}, ${first};",
                f"fma.rn.f16x2 {half}, d{x}, unit, {half};",
            ]
        lines += [f"prmt.b32 s{x}, low, high, 0x6420;", f"or.b32 s{x}, s{x}, 0x0f0f0f0f;"]
        if x < 2:
            lines += [f"mov.b32 d{x}, s{x};"]
        else:
            lines += [f"sub.u32 d{x}, s{x}, s{x - 2};", f"add.u32 d{x}, d{x}, 0x0f0f0f0f;"]
        lines += [f"shr.u32 d{x}, d{x}, 4;", f"and.b32 d{x}, d{x}, 0x0f0f0f0f;"]
    return lines


_ROUND_TO_INT4: gl.constexpr = gl.constexpr(_chains_to_int4())
_ROUND_TO_INT4_USES: gl.constexpr = gl.constexpr(",".join(["=r"] * 8 + ["f"] * 64 + ["r"] * 32))
_STARTS: gl.constexpr = gl.constexpr("""{
    .reg .b32 lane, first, second;
    mov.u32 lane, %laneid;
    and.b32 lane, lane, 3;
    mad.lo.u32 first, $1, 3, lane;
    add.u32 first, first, lane;
    add.u32 second, first, 9;
    and.b32 first, first, 15;
    and.b32 second, second, 15;
    shl.b32 second, second, 16;
    or.b32 first, first, second;
    add.u32 $0, first, 0x64006400;
}""")
"""A row's starts of a thread's first two chains of four: each thread of a row has others."""
_SUM_OF_FOUR: gl.constexpr = gl.constexpr("""
    dp4a.s32.s32 $0, $4, 0x01010101, 0;
    mov.b32 $1, 0;
    mov.b32 $2, 0;
    mov.b32 $3, 0;
""")


@gluon.jit
def _weights(s, m, scale, tail, PV: gl.constexpr, TOP: gl.constexpr, LOG2_TOP: gl.constexpr, MASKED: gl.constexpr):
    """Biased scores of a block → p before its rounding, its unit, m, and the factors of acc.

    The maxima are taken of integers, of which one instruction compares three.
    """
    if MASKED:
        real = (gl.arange(0, s.type.shape[1], gl.SliceLayout(0, s.type.layout)) < tail)[None, :]
        s = gl.where(real, s, 0)
    top = gl.max(s, 1).to(gl.float32, bitcast=True)
    s = s.to(gl.float32, bitcast=True)
    if MASKED:
        s = gl.where(real, s, float("-inf"))
    highest = (top - 12582912.0) * scale
    new = gl.maximum(m, highest)
    if PV != "fp8":
        origin = -(top * scale)
        unit = TOP * _exp2(-gl.fma(top, scale, origin))  # undoes what rounding did to origin
        share = _exp2(highest - new)
        old_share = _exp2(m - new)
    else:
        origin = gl.fma(scale, -12582912.0, LOG2_TOP - new)
        new = LOG2_TOP - gl.fma(scale, 12582912.0, origin)  # goes along with what rounding did to origin
        unit = scale
        old_share = _exp2(m - new)
        share = old_share
    return _exp2(gl.fma(s, scale[:, None], origin[:, None])), unit, new, old_share, share


@gluon.jit
def _rounded(p, unit, PV: gl.constexpr, LAYOUT: gl.constexpr):
    """Round p to 8 or 4 bits, its columns renamed so that every thread multiplies what it holds."""
    if PV != "fp8":
        p = _renamed(p, LAYOUT)
        unit = gl.convert_layout(unit, gl.SliceLayout(1, LAYOUT))
        unit, p = gl.broadcast(unit[:, None], p)
    if PV == "int4":
        rows = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
        starts = gl.inline_asm_elementwise(_STARTS, "=r,r", [rows], dtype=gl.int32, is_pure=True, pack=1)
        starts, p = gl.broadcast(starts[:, None], p)
        return gl.inline_asm_elementwise(
            _ROUND_TO_INT4, _ROUND_TO_INT4_USES, [p, unit, starts], dtype=gl.int8, is_pure=True, pack=32
        )
    elif PV == "int8":
        return gl.inline_asm_elementwise(
            _ROUND_TO_INT8, "=r,f,f,f,f,f,f,f,f", [p, unit], dtype=gl.int8, is_pure=True, pack=4
        )
    else:
        return _renamed(p.to(gl.float8e4nv), LAYOUT)


@gluon.jit
def _renamed(p, LAYOUT: gl.constexpr):
    ROWS: gl.constexpr = p.type.shape[0]
    KEYS: gl.constexpr = p.type.shape[1]
    p = gl.reshape(p, [ROWS, KEYS // 32, 2, 2, 4, 2])
    p = gl.reshape(gl.permute(p, (0, 1, 2, 4, 3, 5)), [ROWS, KEYS])
    return gl.convert_layout(p, LAYOUT)


@gluon.jit
def _row_sums(p, rounded, PV: gl.constexpr, ROW: gl.constexpr):
    """Sums of p; of integers of what is stored, for INT8 the rounded p − 128."""
    if PV != "fp8":
        fours = gl.inline_asm_elementwise(
            _SUM_OF_FOUR, "=r,=r,=r,=r,r", [rounded], dtype=gl.int32, is_pure=True, pack=4
        )
        return gl.convert_layout(gl.sum(fours, 1), ROW)
    else:
        return gl.convert_layout(gl.sum(p, 1), ROW)


@gluon.jit
def _add(acc, pv, old_share, share, PV: gl.constexpr):
    """Add the product of a block to acc."""
    ROW: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    old_share = gl.convert_layout(old_share, ROW)
    if PV != "fp8":
        share = gl.convert_layout(share, ROW)
        acc = gl.fma(acc, old_share[:, None], -(12582912.0 * share)[:, None])
        return gl.fma(pv.to(gl.float32, bitcast=True), share[:, None], acc)
    else:
        return gl.fma(acc, old_share[:, None], pv)


@gluon.jit
def _fetch(stage, j, k_desc, k_row, v_desc, v_row, start_desc, start_row, k_smem, v_smem, start_smem, full,
           PV: gl.constexpr, KEYS: gl.constexpr):  # fmt: skip
    """Start the copy of key block j into a stage."""
    barrier = full.index(stage)
    if PV == "int8":
        mbarrier.expect(barrier, k_desc.block_type.nbytes + v_desc.block_type.nbytes + start_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(start_desc, [start_row + j, 0], barrier, start_smem.index(stage))
    else:
        mbarrier.expect(barrier, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [k_row + j * KEYS, 0], barrier, k_smem.index(stage))
    tma.async_copy_global_to_shared(v_desc, [v_row, j * KEYS], barrier, v_smem.index(stage))


@gluon.jit
def _step(
    i, m, total, acc, following, k_scale, count, list_ptr, tail, q_smem, q_scale, k_scale_ptr,
    k_desc, k_row, v_desc, v_row, start_desc, start_row, k_smem, v_smem, start_smem, full, ones_smem,
    PV: gl.constexpr, TOP: gl.constexpr, LOG2_TOP: gl.constexpr, MASKED: gl.constexpr, KEYS: gl.constexpr,
    D_PAD: gl.constexpr, STAGES: gl.constexpr, MATRIX_SUMS: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax: m, total and acc after the i-th kept block; next block and scale, asked early."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 32])
    OUT: gl.constexpr = acc.type.layout
    SUMS: gl.constexpr = total.type.layout
    stage = i % STAGES
    bias = gl.full([64, KEYS], 0x4B400000, gl.int32, SCORES)
    mbarrier.wait(full.index(stage), (i // STAGES) & 1)
    s = warpgroup_mma(q_smem, k_smem.index(stage).permute((1, 0)), bias, is_async=True)
    scale = q_scale * k_scale
    k_scale = gl.load(k_scale_ptr + following)
    following = gl.load(list_ptr + gl.minimum(i + 2, count - 1)).to(gl.int32)
    ahead = gl.load(list_ptr + gl.minimum(i + STAGES, count - 1)).to(gl.int32)
    s = warpgroup_mma_wait(0, deps=[s])
    p, unit, m, old_share, share = _weights(s, m, scale, tail, PV, TOP, LOG2_TOP, MASKED)
    rounded = _rounded(p, unit, PV, gl.DotOperandLayout(0, OUT, 4))
    if PV == "int4":
        start = gl.full([64, D_PAD], 0x4B400000, gl.int32, OUT)
    elif PV == "int8":
        start = start_smem.index(stage).reshape([D_PAD]).load(gl.SliceLayout(0, OUT))
        start = gl.zeros([64, D_PAD], gl.int32, OUT) + start[None, :]
    else:
        start = gl.zeros([64, D_PAD], gl.float32, OUT)
    pv = warpgroup_mma(rounded, v_smem.index(stage).permute((1, 0)), start, use_acc=PV != "fp8", is_async=True)
    if MATRIX_SUMS:
        nought = gl.zeros([64, 8], start.dtype, SUMS)
        rounded = gl.convert_layout(rounded, gl.DotOperandLayout(0, SUMS, 4))
        added = warpgroup_mma(rounded, ones_smem.permute((1, 0)), nought, use_acc=False, is_async=True)
        pv, added = warpgroup_mma_wait(0, deps=[pv, added])
    else:
        added = _row_sums(p, rounded, PV, gl.SliceLayout(1, SUMS))[:, None]
        pv = warpgroup_mma_wait(0, deps=[pv])
    _barrier()
    if i + STAGES < count:
        _fetch(stage, ahead, k_desc, k_row, v_desc, v_row, start_desc, start_row, k_smem, v_smem, start_smem, full,
               PV, KEYS)  # fmt: skip
    total *= gl.convert_layout(old_share, gl.SliceLayout(1, SUMS))[:, None]
    if PV == "int8":
        added += 128 * KEYS
    if PV != "fp8":
        added = added.to(gl.float32) * gl.convert_layout(share, gl.SliceLayout(1, SUMS))[:, None]
    total += added
    return m, total, _add(acc, pv, old_share, share, PV), following, k_scale


@gluon.jit
def _hopper_kernel(
    q_desc, k_desc, v_desc, start_desc, q_scale_ptr, k_scale_ptr, v_scale_ptr, shift_ptr,
    lists_ptr, counts_ptr, bits_ptr, tiles_ptr, table_ptr, order_ptr, valid_ptr, out_ptr, lse_ptr,
    B, N, H, ROW_BLOCKS, KEY_BLOCKS, BYTES,
    QK: gl.constexpr, PV: gl.constexpr, TOP: gl.constexpr, LOG2_TOP: gl.constexpr,
    HAS_LSE: gl.constexpr, HAS_SHIFT: gl.constexpr,
    SPLIT: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr, D_PAD: gl.constexpr, STAGES: gl.constexpr,
    MATRIX_SUMS: gl.constexpr,
):  # fmt: skip
    """64 rows of out and lse; grid (H · B · query blocks · SPLIT,)."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 32])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_PAD, 32])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)

    part, pair = gl.program_id(0) % SPLIT, gl.program_id(0) // SPLIT
    tile = gl.load(tiles_ptr + pair // (ROW_BLOCKS * B) * ROW_BLOCKS + pair % ROW_BLOCKS)
    b, h = pair // ROW_BLOCKS % B, tile // ROW_BLOCKS
    bh = (b * H + h).to(gl.int64)
    first = ((tile % ROW_BLOCKS) * SPLIT + part) * 64
    q_row = bh * ROW_BLOCKS * SPLIT * 64 + first
    rows = gl.arange(0, 64, ROW)

    list_ptr = lists_ptr + tile.to(gl.int64) * KEY_BLOCKS
    whole = gl.load(counts_ptr + b.to(gl.int64) * H * ROW_BLOCKS + tile)
    valid = gl.load(valid_ptr + b).to(gl.int32)
    cut, tail = valid // KEYS, valid % KEYS
    count = whole
    if tail > 0:  # the block in which the real keys end follows the whole ones in the list, if it is kept
        count += (gl.load(bits_ptr + tile.to(gl.int64) * BYTES + cut // 8).to(gl.int32) >> (cut % 8)) & 1

    q_smem = gl.allocate_shared_memory(q_desc.dtype, [64, D_PAD], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, KEYS, D_PAD], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, D_PAD, KEYS], v_desc.layout)
    start_smem = v_smem
    if PV == "int8":
        start_smem = gl.allocate_shared_memory(gl.int32, [STAGES, 1, D_PAD], start_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ones_smem = v_smem
    if MATRIX_SUMS:
        ones_smem = gl.allocate_shared_memory(v_desc.dtype, [8, KEYS], v_desc.layout)
        SPREAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // KEYS, KEYS // 8], [4, 1], [1, 0])
        ones = gl.full([8, KEYS], 0x38 if PV == "fp8" else 1, gl.int8, SPREAD)  # 0x38: the bits of 1.0 in FP8
        ones_smem.store(ones.to(v_desc.dtype, bitcast=True))
        fence_async_shared()
        _barrier()
    mbarrier.init(q_full, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
    mbarrier.expect(q_full, q_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(q_desc, [q_row.to(gl.int32), 0], q_full, q_smem)
    start_row = (bh * KEY_BLOCKS).to(gl.int32)
    k_row, v_row = start_row * KEYS, (bh * D_PAD).to(gl.int32)
    for slot in gl.static_range(STAGES):
        if slot < count:
            _fetch(slot, gl.load(list_ptr + slot).to(gl.int32), k_desc, k_row, v_desc, v_row, start_desc, start_row,
                   k_smem, v_smem, start_smem, full, PV, KEYS)  # fmt: skip

    q_scale = gl.load(q_scale_ptr + q_row + rows)
    m = gl.full([64], -1e30, gl.float32, ROW)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])
    total = gl.zeros([64, 8], gl.float32, SUMS)
    acc = gl.zeros([64, D_PAD], gl.float32, OUT)
    mbarrier.wait(q_full, 0)
    k_scale_ptr += start_row
    k_scale = gl.load(k_scale_ptr + gl.load(list_ptr).to(gl.int32))
    following = gl.load(list_ptr + gl.where(count > 1, 1, 0)).to(gl.int32)
    for i in range(whole):
        m, total, acc, following, k_scale = _step(
            i, m, total, acc, following, k_scale, count, list_ptr, tail, q_smem, q_scale, k_scale_ptr,
            k_desc, k_row, v_desc, v_row, start_desc, start_row, k_smem, v_smem, start_smem, full, ones_smem,
            PV, TOP, LOG2_TOP, False, KEYS, D_PAD, STAGES, MATRIX_SUMS,
        )  # fmt: skip
    if count > whole:
        m, total, acc, following, k_scale = _step(
            whole, m, total, acc, following, k_scale, count, list_ptr, tail, q_smem, q_scale, k_scale_ptr,
            k_desc, k_row, v_desc, v_row, start_desc, start_row, k_smem, v_smem, start_smem, full, ones_smem,
            PV, TOP, LOG2_TOP, True, KEYS, D_PAD, STAGES, MATRIX_SUMS,
        )  # fmt: skip

    total = gl.convert_layout(gl.max(total, 1), ROW)
    d = gl.arange(0, D_PAD, gl.SliceLayout(0, OUT))
    out = acc * gl.convert_layout(1.0 / gl.maximum(total, 1e-30), gl.SliceLayout(1, OUT))[:, None]
    out *= gl.load(v_scale_ptr + bh * D_PAD + d)[None, :]
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D_PAD, D_PAD // 8], [4, 1], [1, 0])
    out = gl.convert_layout(out.to(out_ptr.dtype.element_ty), WIDE)
    n = first + gl.arange(0, 64, gl.SliceLayout(1, WIDE))
    d = gl.arange(0, D_PAD, gl.SliceLayout(0, WIDE))
    place_ptr = table_ptr + gl.load(order_ptr + h).to(gl.int64) * N
    position = gl.load(place_ptr + n, mask=n < N, other=0)
    out_rows = (b.to(gl.int64) * N + position) * H + h
    gl.store(out_ptr + out_rows[:, None] * D + d[None, :], out, mask=(n < N)[:, None] & (d < D)[None, :])
    if HAS_LSE:
        lse = (m + gl.log2(gl.maximum(total, 1e-30)) - LOG2_TOP) * 0.6931471805599453
        if HAS_SHIFT:
            lse += gl.load(shift_ptr + q_row + rows)
        n = first + rows
        position = gl.load(place_ptr + n, mask=n < N, other=0)
        gl.store(lse_ptr + bh * N + position, gl.where(total > 0, lse, float("-inf")), mask=n < N)


_ELEMENTS = {torch.int8: gl.int8, torch.int32: gl.int32, torch.float8_e4m3fn: gl.float8e4nv}


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    v_start: Tensor | None,
    *,
    block: tuple[int, int],
    ring: Ring,
    programs: int,
    **arguments: Any,
) -> None:
    """Run the kernel on prepared operands.

    Args:
        q, k, v, v_start: As in `prepare.Operands`.
        block: Tokens of a query block and of a key block.
        ring: How it is compiled.
        programs: Query blocks of all heads and batch elements.
        arguments: The kernel's other arguments.
    """
    (rows, keys), d_pad = block, q.shape[-1]
    split = rows // 64
    _hopper_kernel[(programs * split,)](
        _descriptor(q, [64, d_pad]), _descriptor(k, [keys, d_pad]), _descriptor(v, [d_pad, keys]),
        None if v_start is None else _descriptor(v_start, [1, d_pad]),
        SPLIT=split, D_PAD=d_pad, STAGES=ring.stages, MATRIX_SUMS=ring.matrix_sums,
        num_warps=4, maxnreg=ring.registers, **arguments,
    )  # fmt: skip


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, _ELEMENTS[x.dtype])
    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), block, layout)
