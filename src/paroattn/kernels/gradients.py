"""The gradient of block-sparse attention on a GPU, and with it the presence of every block, kept or dropped.

One kernel takes a key block past all query rows: P and c of every block, of which the kept ones add to the gradients in
k and v, and all give a presence. Another takes a tile of query rows past its kept key blocks, for the gradient in q.

Layout: operands (B, H, N, D) in kernel order, contiguous, bf16 or fp16; sums in float32.
Grid: (key blocks, B · H) and (tiles of query rows, B · H).
Not handled: head dimensions above 128, query blocks that are no multiple of 64; float32 is rounded to bf16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import BlockMask, blocks_of
from .tiles import BLOCKS, INTERPRETED, LARGEST_HEAD, capability, warps_for

ROWS = 64


@triton.jit
def _load(ptr, n, limit, D, D_PAD: tl.constexpr, PLAIN: tl.constexpr):
    d = tl.arange(0, D_PAD)
    x = tl.load(ptr + n[:, None] * D + d[None, :], mask=(n < limit)[:, None] & (d < D)[None, :], other=0.0)
    return x.to(tl.float32) if PLAIN else x


@triton.jit
def _store(ptr, n, limit, x, D, D_PAD: tl.constexpr):
    d = tl.arange(0, D_PAD)
    tl.store(ptr + n[:, None] * D + d[None, :], x, mask=(n < limit)[:, None] & (d < D)[None, :])


@triton.jit
def _p_and_c(s, moved, lse, centre, there):
    """P and c of a block or its transpose, 0 for rows and keys that are not there."""
    p = tl.where(there, tl.exp(tl.minimum(s - lse, 20.0)), 0.0)
    return p, p * (moved - centre)


@triton.jit
def _tile(
    q_ptr, gradient_ptr, lse_ptr, centre_ptr, first, r, TOKENS, D, D_PAD: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """What is known of a tile of rows: q, the gradient in the output, lse and centre."""
    q = _load(q_ptr + first * D, r, TOKENS, D, D_PAD, PLAIN)
    gradient = _load(gradient_ptr + first * D, r, TOKENS, D, D_PAD, PLAIN)
    lse = tl.load(lse_ptr + first + r, mask=r < TOKENS, other=0.0)
    centre = tl.load(centre_ptr + first + r, mask=r < TOKENS, other=0.0)
    return q, gradient, lse, centre


@triton.jit
def _past_queries(
    q_ptr, k_ptr, v_ptr, gradient_ptr, lse_ptr, centre_ptr, kept_ptr, readable_ptr, dk_ptr, dv_ptr, presence_ptr,
    TOKENS, HEADS, TILES, QUERY_BLOCKS, KEY_BLOCKS, D, scale,
    ROWS: tl.constexpr, PER_BLOCK: tl.constexpr, KEYS: tl.constexpr, D_PAD: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Gradients in k and v of one key block, and the presences of its column."""
    j, map_ = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = map_ % HEADS
    readable = tl.load(readable_ptr + map_ // HEADS)
    first = map_ * TOKENS
    n = j * KEYS + tl.arange(0, KEYS)
    k = _load(k_ptr + first * D, n, TOKENS, D, D_PAD, PLAIN)
    v = _load(v_ptr + first * D, n, TOKENS, D, D_PAD, PLAIN)
    dk = tl.zeros([KEYS, D_PAD], tl.float32)
    dv = tl.zeros([KEYS, D_PAD], tl.float32)
    for tile in range(TILES):
        r = tile * ROWS + tl.arange(0, ROWS)
        q, gradient, lse, centre = _tile(q_ptr, gradient_ptr, lse_ptr, centre_ptr, first, r, TOKENS, D, D_PAD, PLAIN)
        s = (
            tl.dot(k, tl.trans(q), input_precision="ieee") * scale
        )  # (KEYS, ROWS): warps share rows, of which keys are more
        moved = tl.dot(v, tl.trans(gradient), input_precision="ieee")
        p, c = _p_and_c(s, moved, lse[None, :], centre[None, :], (n < readable)[:, None] & (r < TOKENS)[None, :])
        kept = tl.load(kept_ptr + (head * QUERY_BLOCKS + tile // PER_BLOCK) * KEY_BLOCKS + j)
        share, change = tl.sum(p, 0), tl.sum(c, 0)
        change = tl.where(kept > 0, change / tl.maximum(1 - share, 0.1), change / (1 + share))
        tl.store(presence_ptr + (map_ * TILES + tile) * KEY_BLOCKS + j, tl.sum(change, 0))
        if kept > 0:
            dv += tl.dot(p.to(gradient.dtype), gradient, input_precision="ieee")
            dk += tl.dot(c.to(q.dtype), q, input_precision="ieee")
    _store(dk_ptr + first * D, n, TOKENS, dk * scale, D, D_PAD)
    _store(dv_ptr + first * D, n, TOKENS, dv, D, D_PAD)


@triton.jit
def _past_keys(
    q_ptr, k_ptr, v_ptr, gradient_ptr, lse_ptr, centre_ptr, kept_ptr, readable_ptr, dq_ptr,
    TOKENS, HEADS, QUERY_BLOCKS, KEY_BLOCKS, D, scale,
    ROWS: tl.constexpr, PER_BLOCK: tl.constexpr, KEYS: tl.constexpr, D_PAD: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Gradient in q of one tile of rows."""
    tile, map_ = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = map_ % HEADS
    readable = tl.load(readable_ptr + map_ // HEADS)
    first = map_ * TOKENS
    r = tile * ROWS + tl.arange(0, ROWS)
    q, gradient, lse, centre = _tile(q_ptr, gradient_ptr, lse_ptr, centre_ptr, first, r, TOKENS, D, D_PAD, PLAIN)
    row = kept_ptr + (head * QUERY_BLOCKS + tile // PER_BLOCK) * KEY_BLOCKS
    dq = tl.zeros([ROWS, D_PAD], tl.float32)
    for j in range(KEY_BLOCKS):
        if tl.load(row + j) > 0:
            n = j * KEYS + tl.arange(0, KEYS)
            k = _load(k_ptr + first * D, n, TOKENS, D, D_PAD, PLAIN)
            v = _load(v_ptr + first * D, n, TOKENS, D, D_PAD, PLAIN)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            moved = tl.dot(gradient, tl.trans(v), input_precision="ieee")
            there = (r < TOKENS)[:, None] & (n < readable)[None, :]
            _, c = _p_and_c(s, moved, lse[:, None], centre[:, None], there)
            dq += tl.dot(c.to(k.dtype), k, input_precision="ieee")
    _store(dq_ptr + first * D, r, TOKENS, dq * scale, D, D_PAD)


def gradients_on_gpu(
    q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, lse: Tensor, centre: Tensor, mask: BlockMask, scale: float,
    readable: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Arguments and results of `presence.gradients_of`.

    Raises:
        ValueError: If blocks or head dimension are not handled.
    """
    batch, heads, tokens, dim = q.shape
    if mask.block not in BLOCKS or dim > LARGEST_HEAD:
        known = ", ".join(f"{rows}x{columns}" for rows, columns in BLOCKS)
        raise ValueError(
            f"refining on a GPU needs blocks of {known} and a head dimension of at most {LARGEST_HEAD}; got "
            f"{mask.block[0]}x{mask.block[1]} and {dim}. Calibrate with such blocks."
        )
    half = torch.bfloat16 if q.dtype == torch.float32 and not INTERPRETED else q.dtype
    operands = [x.to(half).contiguous() for x in (q, k, v, gradient)]
    kept = mask.dense().to(torch.uint8).contiguous()
    if readable is None:
        readable = torch.full((batch,), tokens, device=q.device)
    tiles, (rows, columns) = blocks_of(tokens, ROWS), (mask.query_blocks, mask.key_blocks)
    dq, dk, dv = (torch.empty(q.shape, dtype=torch.float32, device=q.device) for _ in range(3))
    presence = torch.empty(batch, heads, tiles, columns, device=q.device)
    d_pad = max(16, triton.next_power_of_2(dim))
    shape = {"ROWS": ROWS, "PER_BLOCK": mask.block[0] // ROWS, "KEYS": mask.block[1], "D_PAD": d_pad}
    has, wanted = capability(q.device), 4 if d_pad * mask.block[1] <= 64 * 64 else 8
    how = {"PLAIN": INTERPRETED, "num_stages": 2}
    common = (*operands, lse, centre, kept, readable.to(torch.int32))
    _past_queries[(columns, batch * heads)](
        *common, dk, dv, presence, tokens, heads, tiles, rows, columns, dim, scale, **shape, **how,
        num_warps=warps_for(mask.block[1], wanted, has),
    )  # fmt: skip
    _past_keys[(tiles, batch * heads)](
        *common, dq, tokens, heads, rows, columns, dim, scale, **shape, **how, num_warps=warps_for(ROWS, wanted, has)
    )
    per_block = torch.nn.functional.pad(presence, (0, 0, 0, rows * shape["PER_BLOCK"] - tiles))
    return dq, dk, dv, per_block.unflatten(2, (rows, shape["PER_BLOCK"])).sum(3)
