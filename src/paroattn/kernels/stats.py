"""Block statistics on a GPU: two passes over the keys for a tile of query rows, whose map never leaves the registers.

    pass 1, over all keys:            m, total, acc as in any online softmax      lse = m + log2 total, o = acc / total
    pass 2, over the video's blocks:  P = exp2(s · scale − lse)     m_r = rowsum P     A = P V'
                                      mass = Σ_r m_r     error = Σ_r ‖A_r − m_r o_r‖²     entries below ε, largest entry

V' = (V − V̄) S: S Sᵀ = W_o W_oᵀ makes ‖x S‖ the length after the output projection; V̄, the mean over the tokens,
leaves A_r − m_r o_r as it is and keeps it from being a small difference of large numbers. P and V' are bf16, the
products of 16-bit numbers are summed in float32.

Rows that are not measured get lse = ∞ after pass 1: P, and with it every sum, is 0. Text is a column in pass 1 only.

Layout: operands of `prepare` in the order of one candidate; sums (H, measured query blocks, key blocks).
Grid: (tiles of measured query blocks, H), one launch per batch element and candidate, so that a head's keys stay in L2.
Not handled: head dimensions above 128, float64; float32 is rounded to bf16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from ..precision import Precision
from .elements import _exp2
from .prepare import LOG2_E, Operands, prepare
from .tiles import BLOCKS, INTERPRETED, LARGEST_HEAD, Tile, capability

PRECISIONS = {
    torch.bfloat16: Precision("bf16", "bf16"),
    torch.float16: Precision("fp16", "bf16"),
    torch.float32: Precision("bf16", "bf16"),
}


TILES = {
    # (from capability, D', tokens of a query block, of a key block); (9, 0) were fastest on an H200
    ((9, 0), 128, 128, 128): Tile(128, 8, 3, descriptors=True),
    ((9, 0), 128, 64, 128): Tile(128, 8, 3, descriptors=True),
    ((9, 0), 128, 128, 64): Tile(128, 8, 4, descriptors=True),
    ((9, 0), 128, 64, 64): Tile(128, 8, 4, descriptors=True),
    ((9, 0), 64, 128, 128): Tile(128, 8, 3, descriptors=True),
    ((9, 0), 64, 64, 128): Tile(64, 4, 2, descriptors=True),
    ((9, 0), 64, 128, 64): Tile(128, 8, 4, descriptors=True),
    ((9, 0), 64, 64, 64): Tile(128, 8, 4, descriptors=True),
}
# not measured
TILES |= {((8, 0), d_pad, *block): Tile(128, 8, 2) for d_pad in (64, 128) for block in BLOCKS}


@triton.jit
def _load(ref, row, first, KEYS: tl.constexpr, D_PAD: tl.constexpr, DESCRIPTORS: tl.constexpr, PLAIN: tl.constexpr):
    """One key block of K or V, (KEYS, D_PAD); in float32 where the interpreter is to multiply it."""
    if DESCRIPTORS:
        x = ref.load([row + first, 0])
    else:
        n, d = tl.arange(0, KEYS), tl.arange(0, D_PAD)
        x = tl.load(ref + (first + n)[:, None] * D_PAD + d[None, :])
    return x.to(tl.float32) if PLAIN else x


@triton.jit
def _by_block(x, BLOCKS: tl.constexpr):
    """(rows,) → (BLOCKS, rows of a query block)."""
    return tl.reshape(x, [BLOCKS, x.shape[0] // BLOCKS])


@triton.jit
def _add(mass, error, other_mass, other_error):
    return mass + other_mass, error + other_error


@triton.jit
def _add_and_compare(mass, error, small, largest, other_mass, other_error, other_small, other_largest):
    return mass + other_mass, error + other_error, small + other_small, tl.maximum(largest, other_largest)


@triton.jit
def _softmax_step(
    first, limit, m, total, acc, q, k_ref, v_ref, row, scale,
    MASKED: tl.constexpr, KEYS: tl.constexpr, D_PAD: tl.constexpr, DESCRIPTORS: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """m, total and acc after one more key block."""
    k = _load(k_ref, row, first, KEYS, D_PAD, DESCRIPTORS, PLAIN)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        s = tl.where((first + tl.arange(0, KEYS))[None, :] < limit, s, float("-inf"))
    new = tl.maximum(m, tl.max(s, 1) * scale)
    old_share = _exp2(m - new, not PLAIN)
    p = _exp2(tl.fma(s, scale, -new[:, None]), not PLAIN)
    total = total * old_share + tl.sum(p, 1)
    v = _load(v_ref, row, first, KEYS, D_PAD, DESCRIPTORS, PLAIN)
    acc = tl.dot(p.to(v.dtype), v, acc * old_share[:, None], input_precision="ieee")
    return new, total, acc


@triton.jit
def _measure(
    first, limit, lse, output, measured, q, k_ref, v_ref, row, scale,
    mass_ptr, error_ptr, small_ptr, largest_ptr, there,
    PAPER: tl.constexpr, SMALL: tl.constexpr, MASKED: tl.constexpr, BLOCKS: tl.constexpr,
    KEYS: tl.constexpr, D_PAD: tl.constexpr, DESCRIPTORS: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Store the sums of one key block."""
    k = _load(k_ref, row, first, KEYS, D_PAD, DESCRIPTORS, PLAIN)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    p = _exp2(tl.fma(s, scale, -lse[:, None]), not PLAIN)
    if MASKED:
        p = tl.where((first + tl.arange(0, KEYS))[None, :] < limit, p, 0.0)
    mass = tl.sum(p, 1)
    v = _load(v_ref, row, first, KEYS, D_PAD, DESCRIPTORS, PLAIN)
    moved = tl.dot(p.to(v.dtype), v, input_precision="ieee") - mass[:, None] * output.to(tl.float32)
    error = tl.sum(moved * moved, 1)
    place = first // KEYS
    mass, error = _by_block(mass, BLOCKS), _by_block(error, BLOCKS)
    if PAPER:
        small = _by_block(tl.sum((p < SMALL).to(tl.int32), 1) * measured, BLOCKS)
        largest = _by_block(tl.max(p, 1), BLOCKS)
        mass, error, small, largest = tl.reduce((mass, error, small, largest), 1, _add_and_compare)
        tl.store(small_ptr + place, small, mask=there)
        tl.store(largest_ptr + place, largest, mask=there)
    else:
        mass, error = tl.reduce((mass, error), 1, _add)
    tl.store(mass_ptr + place, mass, mask=there)
    tl.store(error_ptr + place, error, mask=there)


@triton.jit
def _stats_kernel(
    q_ptr, k_ref, v_ref, rows_ptr, measured_ptr, order_ptr, centre_ptr,
    mass_ptr, error_ptr, small_ptr, largest_ptr, power_ptr,
    COUNT, Q_TOKENS, K_TOKENS, MEASURED, N, VIDEO, KEY_BLOCKS, scale,
    PAPER: tl.constexpr, SMALL: tl.constexpr, DESCRIPTORS: tl.constexpr, PLAIN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Sums of one or two query blocks of one head."""
    BLOCKS: tl.constexpr = ROWS // BLOCK
    tile, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    r, d = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    slot = tile * BLOCKS + r // BLOCK
    n = tl.load(rows_ptr + slot, mask=slot < COUNT, other=0) * BLOCK + r % BLOCK
    q = tl.load(q_ptr + (h * Q_TOKENS + n)[:, None] * D_PAD + d[None, :])
    if PLAIN:
        q = q.to(tl.float32)
    if DESCRIPTORS:
        k, v, row = k_ref, v_ref, (h * K_TOKENS).to(tl.int32)
    else:
        k, v, row = k_ref + h * K_TOKENS * D_PAD, v_ref + h * K_TOKENS * D_PAD, 0

    m = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    whole = N // KEYS * KEYS
    for first in range(0, whole, KEYS):
        m, total, acc = _softmax_step(
            first, N, m, total, acc, q, k, v, row, scale, False, KEYS, D_PAD, DESCRIPTORS, PLAIN
        )
    if whole < N:
        m, total, acc = _softmax_step(
            whole, N, m, total, acc, q, k, v, row, scale, True, KEYS, D_PAD, DESCRIPTORS, PLAIN
        )

    measured = tl.load(measured_ptr + tl.load(order_ptr + h) * MEASURED + n, mask=slot < COUNT, other=0)
    lse = tl.where(measured > 0, m + tl.log2(total), float("inf"))
    output = acc * (1.0 / total)[:, None]
    block = tile * BLOCKS + tl.arange(0, BLOCKS)
    there = block < COUNT
    whole_output = output + tl.load(centre_ptr + h * D_PAD + d)[None, :]
    power = tl.sum(whole_output * whole_output, 1) * measured
    tl.store(power_ptr + h * COUNT + block, tl.sum(_by_block(power, BLOCKS), 1), mask=there)

    place = (h * COUNT + block) * KEY_BLOCKS
    output = output.to(tl.bfloat16)
    whole = VIDEO // KEYS * KEYS
    for first in range(0, whole, KEYS):
        _measure(
            first, VIDEO, lse, output, measured, q, k, v, row, scale,
            mass_ptr + place, error_ptr + place, small_ptr + place, largest_ptr + place, there,
            PAPER, SMALL, False, BLOCKS, KEYS, D_PAD, DESCRIPTORS, PLAIN,
        )  # fmt: skip
    if whole < VIDEO:
        _measure(
            whole, VIDEO, lse, output, measured, q, k, v, row, scale,
            mass_ptr + place, error_ptr + place, small_ptr + place, largest_ptr + place, there,
            PAPER, SMALL, True, BLOCKS, KEYS, D_PAD, DESCRIPTORS, PLAIN,
        )  # fmt: skip


def map_sums(
    q: Tensor, k: Tensor, v: Tensor, root: Tensor, *,
    table: Tensor, chosen: Tensor, rows: Tensor, measured: Tensor, video: int, block: tuple[int, int],
    softmax_scale: float, paper: bool, small: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Sums of one map over the measured rows of every query block: arguments and results of the one in plain PyTorch.

    Raises:
        ValueError: If tensors, blocks or softmax_scale are not handled.
        RuntimeError: If the GPU is too old.
    """
    _check(q, block, softmax_scale)
    shape = (*chosen.shape, len(rows), triton.cdiv(video, block[1]))
    dtypes = (torch.float32, torch.float32, torch.int32, torch.float32)
    with torch.cuda.device_of(q):
        sums = [torch.empty(shape, dtype=dtype, device=q.device) for dtype in dtypes[: 4 if paper else 2]]
        sums += [torch.zeros(len(chosen), 1, 1, 1, device=q.device)] * (4 - len(sums))
        power = torch.empty(shape[:3], dtype=torch.float32, device=q.device)
        values, centre = _project(v, root)
        shared = {
            "rows_ptr": rows.to(torch.int32), "measured_ptr": measured.flatten(1).to(torch.int8),
            "centre_ptr": centre, "MEASURED": measured[0].numel(), "N": q.shape[1], "VIDEO": video,
            "KEY_BLOCKS": shape[-1], "scale": softmax_scale * LOG2_E, "PAPER": paper, "SMALL": small,
        }  # fmt: skip
        valid = torch.full((1,), q.shape[1], dtype=torch.int32, device=q.device)
        for candidate, order in enumerate(chosen.to(q.device, torch.int32)):
            operands = prepare(
                q, k, values, table=table, order=order, valid=valid, block=block, precision=PRECISIONS[q.dtype],
                softmax_scale=1.0, with_shift=False,
            )  # fmt: skip
            names = ("mass_ptr", "error_ptr", "small_ptr", "largest_ptr")
            outputs = {name: total[candidate] for name, total in zip(names, sums, strict=True)}
            _launch(operands, block, len(rows), order_ptr=order, power_ptr=power[candidate], **outputs, **shared)
    return (*(total.to(torch.float32).expand(shape) for total in sums), power.sum(-1))


def _launch(operands: Operands, block: tuple[int, int], count: int, **arguments) -> None:
    """Measure one candidate."""
    k, v = operands.k, operands.v
    _, heads, tokens, d_pad = k.shape
    tile = tile_of(capability(k.device), d_pad, block)
    if tile.descriptors:
        k, v = (TensorDescriptor.from_tensor(x.view(-1, d_pad), [block[1], d_pad]) for x in (k, v))
    _stats_kernel[(triton.cdiv(count, tile.rows // block[0]), heads)](
        operands.q, k, v, **arguments, COUNT=count, Q_TOKENS=operands.q.shape[2], K_TOKENS=tokens,
        DESCRIPTORS=tile.descriptors, PLAIN=INTERPRETED, ROWS=tile.rows, BLOCK=block[0], KEYS=block[1], D_PAD=d_pad,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def tile_of(capability: tuple[int, int], d_pad: int, block: tuple[int, int]) -> Tile:
    """The row of `TILES` for a GPU, a padded head dimension and a block."""
    lowest = (9, 0) if capability[0] == 9 else (8, 0)  # later GPUs have no wgmma either
    return TILES[lowest, d_pad, *block]


def _project(v: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """(V − V̄) S like V in bf16, and V̄ S, (H, D') float32; a head at a time, so that little is ever in float32."""
    _, tokens, heads, channels = v.shape
    root = root.float()
    mean = v[0].mean(0, dtype=torch.float32)
    values = torch.empty(1, tokens, heads, channels, dtype=torch.bfloat16, device=v.device)
    for head in range(heads):
        values[0, :, head] = (v[0, :, head].float() - mean[head]) @ root[head]
    return values, F.pad((mean[:, None] @ root)[:, 0], (0, (64 if channels <= 64 else 128) - channels))


def _check(q: Tensor, block: tuple[int, int], softmax_scale: float) -> None:
    if q.dtype not in PRECISIONS:
        raise ValueError(f"impl triton needs {', '.join(map(str, PRECISIONS))}; got {q.dtype}. Use impl='torch'.")
    if block not in BLOCKS or q.shape[-1] > LARGEST_HEAD or softmax_scale <= 0:
        known = ", ".join(f"{rows}x{columns}" for rows, columns in BLOCKS)
        raise ValueError(
            f"impl triton needs blocks of {known}, a head dimension of at most {LARGEST_HEAD} and a softmax_scale "
            f"above 0; got {block[0]}x{block[1]}, {q.shape[-1]} and {softmax_scale}. Use impl='torch'."
        )
    if capability(q.device) < (8, 0):
        raise RuntimeError(
            f"impl triton needs a GPU of compute capability 8.0 or higher; got {torch.cuda.get_device_name(q.device)}. "
            "Use impl='torch'."
        )
