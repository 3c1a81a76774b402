"""Block-sparse attention on a GPU: prepares operands, lists every row's kept blocks, and starts the kernel of a tile.

`portable.py` says what each of the kernels computes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import BlockMask
from ..precision import Precision
from . import portable
from .prepare import Operands, _signs, prepare
from .tiles import (
    BLOCKS,
    LARGEST_HEAD,
    LOWEST_CAPABILITY,
    PIPELINE_OF,
    WARPS,
    Pipeline,
    Ring,
    Tile,
    Warps,
    capability,
    padded,
    pipeline_of,
    tile_of,
    units,
)
from .toolchain import check_toolchain


@triton.jit
def _lists_kernel(
    bits_ptr, valid_ptr, lists_ptr, counts_ptr,
    B, KEY_BLOCKS, BYTES,
    KEYS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Kept key blocks of a row in rising order, and how many hold real tokens only; grid (H · query blocks,)."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, SPAN)
    byte = tl.load(bits_ptr + row * BYTES + j // 8, mask=j < KEY_BLOCKS, other=0).to(tl.int32)
    kept = (byte >> (j % 8)) & 1
    place = tl.cumsum(kept) - kept
    tl.store(lists_ptr + row * KEY_BLOCKS + place, j.to(tl.int16), mask=kept > 0)
    for b in range(B):
        whole = tl.load(valid_ptr + b).to(tl.int32) // KEYS
        tl.store(counts_ptr + b * tl.num_programs(0).to(tl.int64) + row, tl.sum(tl.where(j < whole, kept, 0), 0))


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    table: Tensor,
    order: Tensor,
    mask: BlockMask,
    precision: Precision,
    softmax_scale: float,
    valid_tokens: Tensor | None = None,
    text_tokens: int = 0,
    return_lse: bool = True,
    four_bit_units: bool = False,
    warpgroup_units: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Block-sparse attention on a GPU: arguments and results of `reference_attention`, lse on request.

    With `four_bit_units`, INT4 of both products runs on matrix units of four bits; with `warpgroup_units`, INT8
    Q·K runs in CUDA C++ on those of Hopper.

    Raises:
        ValueError: If blocks, head dimension or softmax_scale are not handled.
        RuntimeError: If the GPU lacks a format.
    """
    _check(q, mask, precision, softmax_scale)
    batch, tokens = q.shape[:2]
    if valid_tokens is None:
        valid_tokens = torch.full((batch,), tokens, dtype=torch.int32, device=q.device)
    with torch.cuda.device_of(q):
        d_pad = padded(q.shape[-1])
        if four_bit_units:
            tile = WARPS[d_pad, mask.block[1]]
        elif warpgroup_units:
            tile = pipeline_of(precision, mask.block, d_pad) or PIPELINE_OF[d_pad]
        else:
            tile = tile_of(capability(q.device), precision, mask.block, d_pad)
        operands = prepare(
            q, k, v, table=table, order=order, valid=valid_tokens, block=mask.block, precision=precision,
            softmax_scale=softmax_scale, with_shift=return_lse, text_tokens=text_tokens, packed=four_bit_units,
            swizzled=isinstance(tile, Pipeline),
        )  # fmt: skip
        return attend(
            operands, q.shape, q.dtype, table=table, order=order, mask=mask, precision=precision, tile=tile,
            softmax_scale=softmax_scale, valid=valid_tokens, return_lse=return_lse,
        )  # fmt: skip


def attend(
    operands: Operands,
    shape: torch.Size,
    dtype: torch.dtype,
    *,
    table: Tensor,
    order: Tensor,
    mask: BlockMask,
    precision: Precision,
    tile: Tile | Ring | Pipeline | Warps,
    softmax_scale: float,
    valid: Tensor,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention of prepared operands: out of shape (B, N, H, D) and `dtype`, and lse."""
    batch, tokens, heads, channels = shape
    keys, device = mask.block[1], operands.q.device
    bits = mask.bits.contiguous()
    lists = torch.empty(heads, mask.query_blocks, mask.key_blocks, dtype=torch.int16, device=device)
    counts = torch.empty(batch, heads, mask.query_blocks, dtype=torch.int32, device=device)
    sizes = {"B": batch, "KEY_BLOCKS": mask.key_blocks, "BYTES": bits.shape[-1], "KEYS": keys}
    rows_args = {"bits_ptr": bits, "valid_ptr": valid, "lists_ptr": lists, "counts_ptr": counts, **sizes}
    _lists_kernel[(heads * mask.query_blocks,)](**rows_args, SPAN=triton.next_power_of_2(mask.key_blocks))

    out = torch.empty(shape, dtype=dtype, device=device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=device) if return_lse else None
    arguments = rows_args | {
        "q_scale_ptr": operands.q_scale, "k_scale_ptr": operands.k_scale, "v_scale_ptr": operands.v_scale,
        "shift_ptr": operands.shift, "tiles_ptr": launch_order(mask), "table_ptr": table, "order_ptr": order,
        "out_ptr": out, "lse_ptr": lse, "N": tokens, "H": heads, "ROW_BLOCKS": mask.query_blocks, "D": channels,
        "HAS_LSE": return_lse, "HAS_SHIFT": operands.shift is not None,
    }  # fmt: skip
    programs = heads * batch * mask.query_blocks
    if isinstance(tile, Ring):
        from . import hopper

        hopper.launch(
            operands.q, operands.k, operands.v, operands.v_start, block=mask.block, ring=tile,
            programs=programs, **units(precision), **arguments,
        )  # fmt: skip
    elif isinstance(tile, Pipeline):
        from . import sm90

        sm90.launch(operands, block=mask.block, pipeline=tile, programs=programs, pv=precision.pv, **arguments)
    elif isinstance(tile, Warps):
        from . import int4

        int4.launch(operands, tile, mask.block, programs, **arguments)
    else:
        portable.launch(
            operands, block=mask.block, tile=tile, programs=programs, precision=precision,
            softmax_scale=softmax_scale, **arguments,
        )  # fmt: skip
    return out, lse


def launch_order(mask: BlockMask) -> Tensor:
    """Order in which query blocks are launched: the mask's own."""
    return mask.launch_order


def keep_constants(device: torch.device, dtype: torch.dtype, channels: int) -> None:
    """Make the tensors that stay from call to call."""
    if channels <= LARGEST_HEAD:
        _signs(padded(channels), dtype, device)


def refusal(q: Tensor, mask: BlockMask, softmax_scale: float) -> str | None:
    """What the kernels do not handle, if anything: the rule, the value and the remedy."""
    if mask.block not in BLOCKS:
        known = ", ".join(f"{rows}x{columns}" for rows, columns in BLOCKS)
        return (
            f"blocks must be one of {known} for impl triton; got {mask.block[0]}x{mask.block[1]}. "
            "Make the plan with such blocks, or use impl='reference'."
        )
    if q.shape[-1] > LARGEST_HEAD:
        return (
            f"the head dimension must be at most {LARGEST_HEAD} for impl triton; got {q.shape[-1]}. "
            "Use impl='reference'."
        )
    if softmax_scale <= 0:
        return f"softmax_scale must be above 0 for impl triton; got {softmax_scale}. Use impl='reference'."
    return None


def _check(q: Tensor, mask: BlockMask, precision: Precision, softmax_scale: float) -> None:
    reason = refusal(q, mask, softmax_scale)
    if reason is not None:
        raise ValueError(reason)
    has = capability(q.device)
    for form in (precision.qk, precision.pv):
        needed = LOWEST_CAPABILITY[form]
        if has < needed:
            raise RuntimeError(
                f"{form} needs a GPU of compute capability {needed[0]}.{needed[1]} or higher; got {has[0]}.{has[1]} "
                f"({torch.cuda.get_device_name(q.device)}). {_REMEDIES[form]}"
            )
    if q.device.type == "cuda":
        check_toolchain()


_REMEDIES = dict.fromkeys(LOWEST_CAPABILITY, "Use impl='reference'.") | {"fp8": "Use precision 'int8', which it has."}
