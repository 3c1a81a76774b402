"""The attention operation: checks its arguments and hands them to the registered operation as plain tensors."""

import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..block_mask import BlockMask, blocks_of
from ..precision import Precision
from .library import choose, keep_constants, lse_dtype, parse

OWN_PRECISION = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

_checked_tables = WeakTensorKeyDictionary()
_checked_orders = WeakTensorKeyDictionary()
_checked_pairs: dict[tuple[int, int], tuple[weakref.ref, weakref.ref]] = {}
PAIRS_KEPT = 4096
_parts: "weakref.WeakKeyDictionary[BlockMask, dict[tuple[int, ...], tuple[BlockMask, Tensor]]]"
_parts = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Heads of one precision, with their part of what a layer has.

    Attributes:
        heads: Which, (h,) int64, on the device of the others.
        mask: Their kept blocks, (h, Nq, Nk).
        order: Their rows of the gather table, (h,).
        precision: Formats of the two products.
    """

    heads: Tensor
    mask: BlockMask
    order: Tensor
    precision: str


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    table: Tensor | None = None,
    order: Tensor | None = None,
    text_tokens: int = 0,
    valid_text: Tensor | None = None,
    precision: str | Precision | Sequence[str | Precision] | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Self-attention over the kept blocks, each head reading the tokens in its own order.

    Inside torch.compile this is one node of the graph, shared by all calls of the same shapes and precision, and a CUDA
    graph captures it once it has run. Values of `table` and `order` are checked when a tensor is first seen outside of
    both.

    Args:
        q: (B, N, H, D) in the model's token order; float64, float32, float16 or bfloat16.
        k: Like q.
        v: Like q.
        mask: Kept blocks over the whole sequence in kernel order, text included, (H, Nq, Nk).
        table: Gather tables (orders, N), int32, from `Layout.table`. None: every head reads in the model's order.
        order: Row of `table` for each head, (H,), integers. Comes with `table`.
        text_tokens: Number of text tokens, which kernel order puts last.
        valid_text: How many text tokens of each batch element are real, (B,), integers; the others are never read as
            keys. None: all. The values are checked on a CPU only, since reading them would stall a GPU, and not inside
            torch.compile.
        precision: Formats of the two products, such as "int8", for all heads or one per head. None: the tensors' own.
        softmax_scale: Factor on q·k. None: 1 / √D.
        return_lse: Return lse too.
        impl: "cpu", "triton", "native", "sm90", "reference" or "auto": "cpu" for float32 on a CPU, "triton" on a GPU,
            and the reference for all else. It computes everything exactly as defined, but slowly; where it runs on a
            GPU because no kernel handles the formats, blocks or head dimension, a warning says why, once. "native",
            INT4 on matrix units of four bits, takes no text and needs `paroattn[native]`; "auto" takes it on GPUs of
            capability 8.0 to 8.9, and warns once where that is not installed. "sm90", INT8 Q·K in CUDA C++ on GPUs of
            capability 9.0, needs the same; "auto" takes it for what it is faster at, `tiles.PIPELINES`, likewise.

    Returns:
        out (B, N, H, D) in the model's order and q's dtype; with `return_lse` also lse (B, H, N) in the model's order,
        the natural log of the softmax denominator, float32 (float64 for float64 tensors). A row without any real key
        gives out 0 and lse −∞.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If arguments do not fit each other, a gradient is wanted, or `impl` cannot do what is asked.
        RuntimeError: If the GPU lacks a format, or Triton, or what `impl` needs, is missing.
    """
    _check_tensors(q, k, v)
    _check_mask(mask, q)
    table, order = _check_order(table, order, q)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if not math.isfinite(scale):
        raise ValueError(f"softmax_scale must be finite; got {scale}")
    call = _Call(table, _check_text(text_tokens, valid_text, q), text_tokens, scale, return_lse, impl)
    names = _heads_by_precision(precision, q)
    if len(names) == 1:
        out, lse = call.run(q, k, v, mask, order, *names)
    else:
        parts = ((name, *_some_heads(mask, heads)) for name, heads in names.items())
        out, lse = call.run_groups(q, k, v, (HeadGroup(index, part, order[index], name) for name, part, index in parts))
    return (out, lse) if return_lse else out


def attention_by_group(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Sequence[HeadGroup],
    *,
    table: Tensor,
    text_tokens: int = 0,
    valid_text: Tensor | None = None,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """As `attention`, of heads that were put into groups once and not in every call.

    Inside torch.compile, all calls with as many groups of the same precisions share one graph, whatever heads are in
    them; a group of a single head needs another one.

    Raises:
        TypeError, ValueError, RuntimeError: As `attention`.
    """
    _check_tensors(q, k, v)
    for group in groups:
        some = q[:, :, : len(group.heads)]
        _check_mask(group.mask, some)
        _check_order(table, group.order, some)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    call = _Call(table, _check_text(text_tokens, valid_text, q), text_tokens, scale, False, impl)
    return call.run_groups(q, k, v, groups)[0]


@dataclass(frozen=True)
class _Call:
    """What the registered operation is told of a call besides its heads."""

    table: Tensor
    valid_tokens: Tensor | None
    text_tokens: int
    softmax_scale: float
    return_lse: bool
    impl: str

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, order: Tensor, precision: str
    ) -> tuple[Tensor, Tensor]:
        """Heads of one precision."""
        if torch.compiler.is_compiling():
            keep_constants(self.impl, q.device, q.dtype, q.shape[-1])
        launch_order = mask.launch_order if q.is_cuda or self.impl == "triton" else None
        return torch.ops.paroattn.attention(
            q, k, v, mask.bits, mask.key_blocks, *mask.block, launch_order, self.table, order, self.valid_tokens,
            self.text_tokens, precision, self.softmax_scale, self.return_lse, self.impl,
        )  # fmt: skip

    def run_groups(self, q: Tensor, k: Tensor, v: Tensor, groups: Iterable[HeadGroup]) -> tuple[Tensor, Tensor]:
        """One group after the other."""
        out, lse = torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=lse_dtype(q))
        for group in groups:
            index = group.heads
            some = q[:, :, index], k[:, :, index], v[:, :, index]
            result, logs = self.run(*some, group.mask, group.order, group.precision)
            out[:, :, index] = result
            if self.return_lse:
                lse[:, index] = logs
        return out, lse


def what_runs(
    q: Tensor,
    mask: BlockMask,
    *,
    precision: str | Precision | Sequence[str | Precision] | None = None,
    softmax_scale: float | None = None,
    text_tokens: int = 0,
    impl: str = "auto",
) -> str:
    """Name what runs `attention` on these arguments, such as "triton", or "cpu + reference" if heads differ.

    Raises:
        ValueError: If `impl` cannot do what is asked.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    groups = _heads_by_precision(precision, q)
    return " + ".join(sorted({choose(impl, q, mask, parse(name), scale, text_tokens) for name in groups}))


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    tensors = {"q": q, "k": k, "v": v}
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q must have shape (B, N, H, D), none of them 0; got {tuple(q.shape)}")
    if q.dtype not in OWN_PRECISION:
        raise ValueError(f"q must be float64, float32, float16 or bfloat16; got {q.dtype}")
    for name, x in tensors.items():
        if (x.shape, x.dtype, x.device) != (q.shape, q.dtype, q.device):
            raise ValueError(
                f"{name} must be like q, {q.dtype} of shape {tuple(q.shape)} on {q.device}; "
                f"got {x.dtype} of shape {tuple(x.shape)} on {x.device}"
            )
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values()):
        raise ValueError("attention has no gradient; got tensors that require one. Call it under torch.no_grad().")


def _check_mask(mask: BlockMask, q: Tensor) -> None:
    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask must be a BlockMask; got {type(mask).__name__}. BlockMask.from_dense makes one.")
    if mask.bits.ndim != 3:
        raise ValueError(
            f"the mask must be one phase's, (H, Nq, Nk); got {mask.bits.ndim} dimensions. Use mask[phase]."
        )
    _, tokens, heads, _ = q.shape
    rows, columns = (blocks_of(tokens, size) for size in mask.block)
    if (mask.heads, mask.query_blocks, mask.key_blocks) != (heads, rows, columns):
        raise ValueError(
            f"the mask must cover {heads} heads and {rows}×{columns} blocks of {mask.block[0]}×{mask.block[1]} for "
            f"{tokens} tokens; got {mask.heads} heads and {mask.query_blocks}×{mask.key_blocks} blocks. "
            "BlockMask.with_text adds text to a mask over video."
        )
    if mask.bits.device != q.device:
        raise ValueError(f"the mask must be on {q.device}; got {mask.bits.device}. Move it with mask.to(device).")


def _check_order(table: Tensor | None, order: Tensor | None, q: Tensor) -> tuple[Tensor, Tensor]:
    _, tokens, heads, _ = q.shape
    if table is None and order is None:
        model = torch.arange(tokens, dtype=torch.int32, device=q.device)
        return model[None], torch.zeros(heads, dtype=torch.int32, device=q.device)
    if not isinstance(table, Tensor) or not isinstance(order, Tensor):
        raise TypeError(
            f"table and order must both be tensors or both None; got {type(table).__name__} and {type(order).__name__}"
        )
    if table.dtype != torch.int32 or table.ndim != 2 or table.shape[1] != tokens:
        raise ValueError(
            f"table must be int32 of shape (orders, {tokens}); got {table.dtype} of shape {tuple(table.shape)}. "
            "Layout.table makes it."
        )
    if order.dtype not in (torch.int32, torch.int64) or order.shape != (heads,):
        raise ValueError(f"order must be integers of shape ({heads},); got {order.dtype} of shape {tuple(order.shape)}")
    for name, x in {"table": table, "order": order}.items():
        if x.device != q.device:
            raise ValueError(f"{name} must be on {q.device}; got {x.device}. Move it once, before the first call.")
    _check_order_values(table, order)
    return table, order


def _check_order_values(table: Tensor, order: Tensor) -> None:
    """Look at the values of a table and an order when they are first seen, where looking stalls no GPU for long."""
    if torch.compiler.is_compiling() or _capturing(table):
        return
    pair = id(table), id(order)
    known = _checked_pairs.get(pair)
    if known is not None and known[0]() is table and known[1]() is order:  # the same layer again: no slow look-up
        return
    if table not in _checked_tables:
        wanted = torch.arange(table.shape[1], dtype=torch.int32, device=table.device)
        wrong = (table.sort(-1).values != wanted).any(-1).nonzero()
        if len(wrong):
            raise ValueError(f"every row of table must hold each position once; got row {int(wrong[0])} that does not")
        _checked_tables[table] = True
    if order not in _checked_orders or _checked_orders[order] > len(table):
        lowest, highest = (int(x) for x in order.aminmax())
        if lowest < 0 or highest >= len(table):
            raise ValueError(f"order must name rows 0…{len(table) - 1} of table; got {lowest}…{highest}")
        _checked_orders[order] = len(table)
    if len(_checked_pairs) >= PAIRS_KEPT:
        _checked_pairs.clear()
    _checked_pairs[pair] = weakref.ref(table), weakref.ref(order)


def _check_text(text_tokens: int, valid_text: Tensor | None, q: Tensor) -> Tensor | None:
    """Valid tokens of each batch element, (B,), or None."""
    batch, tokens = q.shape[:2]
    if not isinstance(text_tokens, int):
        raise TypeError(f"text_tokens must be an integer; got {type(text_tokens).__name__}")
    if not 0 <= text_tokens < tokens:
        raise ValueError(f"text_tokens must be 0…{tokens - 1} of {tokens} tokens; got {text_tokens}")
    if valid_text is None:
        return None
    if not isinstance(valid_text, Tensor):
        raise TypeError(f"valid_text must be a tensor; got {type(valid_text).__name__}")
    if valid_text.dtype not in (torch.int32, torch.int64) or valid_text.shape != (batch,):
        raise ValueError(
            f"valid_text must be integers of shape ({batch},); got {valid_text.dtype} of {tuple(valid_text.shape)}"
        )
    if valid_text.device != q.device:
        raise ValueError(f"valid_text must be on {q.device}; got {valid_text.device}")
    readable = q.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and bool(((valid_text < 0) | (valid_text > text_tokens)).any()):
        raise ValueError(f"valid_text must be 0…{text_tokens}; got {valid_text.tolist()}")
    return valid_text + (tokens - text_tokens)


def _heads_by_precision(precision: Any, q: Tensor) -> dict[str, list[int]]:
    heads = q.shape[2]
    if precision is None or isinstance(precision, str):
        return {precision or OWN_PRECISION[q.dtype]: list(range(heads))}
    each = list(precision) if isinstance(precision, Sequence) else [precision] * heads
    for name in each:
        if not isinstance(name, str | Precision):
            raise TypeError(f"precision must be a name, a Precision or one of them per head; got {type(name).__name__}")
    if len(each) != heads:
        raise ValueError(f"precision must be one name or one per head, {heads} of them; got {len(each)}")
    groups: dict[str, list[int]] = {}
    for head, name in enumerate(each):
        groups.setdefault(name if isinstance(name, str) else f"{name.qk}/{name.pv}", []).append(head)
    return groups


def _some_heads(mask: BlockMask, heads: list[int]) -> tuple[BlockMask, Tensor]:
    """The mask of some heads, the same object at every call, and the heads as a tensor."""
    if torch.compiler.is_compiling():
        return _select(mask, heads)
    known, key = _parts.setdefault(mask, {}), tuple(heads)
    if key not in known:
        known[key] = _select(mask, heads)
    part, index = known[key]
    if _capturing(mask.bits):  # a CUDA graph reads what is in the mask's memory when it runs
        part = BlockMask(mask.bits[index], mask.key_blocks, mask.block)
    return part, index


def _select(mask: BlockMask, heads: list[int]) -> tuple[BlockMask, Tensor]:
    index = torch.tensor(heads, device=mask.bits.device)
    return BlockMask(mask.bits[index], mask.key_blocks, mask.block), index


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
