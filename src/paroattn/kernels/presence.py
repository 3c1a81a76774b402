"""Attention with a gradient, which also tells what the presence of every block does to a loss.

For a loss whose gradient in the output of row r is g_r, with P, o and the softmax denominator over the kept blocks:

    c_rj = Σ_{n∈j} P_rn (g_r · v_n − g_r · o_r)        m_rj = Σ_{n∈j} P_rn
    presence_ij = Σ over rows r of block i of  c_rj / (1 − m_rj)  if block j is kept,  c_rj / (1 + m_rj)  if not

Σ g · (output with the block − output without it) is exactly that, all other blocks staying as they are: to first order
in the output, what the loss gains from leaving a kept block out, or loses from taking a dropped one in. c is a sum that
the gradient of attention needs anyway, of dropped blocks too.

This module is the operation and its gradient in plain PyTorch; `gradients.py` is the gradient on a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..block_mask import BlockMask, blocks_of
from .attention import OWN_PRECISION, attention
from .reference import to_kernel_order, to_model_order

LARGEST_LOG = 20.0
"""A dropped key may outweigh all kept ones; exp is stopped here."""
SMALLEST_REST = 0.1
"""Of a row's attention, what is taken to be left when a kept block goes."""
ELEMENTS_AT_ONCE = 2**24


@dataclass(frozen=True, eq=False)
class _Call:
    """What attention needs beside q, k and v."""

    mask: BlockMask
    table: Tensor
    order: Tensor
    text_tokens: int
    valid_text: Tensor | None
    scale: float
    note: Callable[[Tensor], None]

    @property
    def readable(self) -> Tensor | None:
        """Tokens in kernel order that are no padding, (B,)."""
        tokens = self.table.shape[1]
        return None if self.valid_text is None else self.valid_text + (tokens - self.text_tokens)


def attention_with_presence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    note: Callable[[Tensor], None],
    *,
    table: Tensor,
    order: Tensor,
    text_tokens: int = 0,
    valid_text: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention over the kept blocks, in the tensors' own precision, that a loss can be differentiated through.

    Args:
        q, k, v, mask, table, order, text_tokens, valid_text, softmax_scale: As in `attention`.
        note: Called in the backward pass with the presence of every block, (B, H, Nq, Nk) float32.

    Returns:
        out (B, N, H, D), with a gradient whether or not q, k and v have one.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    anchor = torch.zeros((), device=q.device, requires_grad=True)
    return _Attention.apply(anchor, q, k, v, _Call(mask, table, order, text_tokens, valid_text, scale, note))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> Tensor:
        out, lse = attention(
            q, k, v, call.mask, table=call.table, order=call.order, text_tokens=call.text_tokens,
            valid_text=call.valid_text, softmax_scale=call.scale, return_lse=True, precision=_precision(q),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        call, gradient = ctx.call, gradients[0].to(q.dtype)
        centre = (gradient.float() * out.float()).sum(-1, keepdim=True)
        rows = [lse.transpose(1, 2)[..., None], centre]
        lse, centre = (to_kernel_order(x, call.table, call.order)[..., 0].float().contiguous() for x in rows)
        operands = (to_kernel_order(x, call.table, call.order) for x in (q, k, v, gradient))
        lse = lse.masked_fill(lse.isneginf(), torch.inf)  # a row without keys attends to nothing
        run = _on_gpu if q.is_cuda else gradients_of
        *found, presence = run(*operands, lse, centre, call.mask, call.scale, call.readable)
        call.note(presence)
        return None, *(to_model_order(x, call.table, call.order).to(q.dtype) for x in found), None


def gradients_of(
    q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, lse: Tensor, centre: Tensor, mask: BlockMask, scale: float,
    readable: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients in q, k and v, (B, H, N, D), and presences (B, H, Nq, Nk), a few query blocks of a head at a time.

    Args:
        q, k, v, gradient: (B, H, N, D) in kernel order.
        lse: Of every row, over the kept blocks, (B, H, N) float32; infinite for rows that attend to nothing.
        centre: gradient · output of every row, (B, H, N) float32.
        mask: Kept blocks.
        scale: Factor on q·k.
        readable: Keys from this position on are padding, (B,).
    """
    batch, heads, tokens, _ = q.shape
    found = [torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in (q, k, v)]
    presence = torch.zeros(batch, heads, mask.query_blocks, mask.key_blocks, device=q.device)
    kept = mask.dense()
    some = max(1, ELEMENTS_AT_ONCE // (tokens * mask.block[0]))
    for element in range(batch):
        limit = tokens if readable is None else int(readable[element])
        for head in range(heads):
            for first in range(0, mask.query_blocks, some):
                keep = kept[head, first : first + some]
                rows = slice(first * mask.block[0], min(tokens, (first + len(keep)) * mask.block[0]))
                at = (element, head)
                parts = [x[at].float() for x in (q, k, v, gradient)]
                seen = _gradients_of_rows(parts, rows, lse[at], centre[at], keep, mask.block, scale, limit)
                found[0][at][rows] = seen[0]
                found[1][at] += seen[1]
                found[2][at] += seen[2]
                presence[element, head, first : first + len(keep)] = seen[3]
    return found[0], found[1], found[2], presence


def _gradients_of_rows(
    operands: list[Tensor], rows: slice, lse: Tensor, centre: Tensor, keep: Tensor, block: tuple[int, int],
    scale: float, limit: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradient in the rows of q, what they add to those in k and v, and their blocks' presences."""
    q, k, v, gradient = operands
    q, gradient, tokens = q[rows], gradient[rows], len(k)
    p = (q @ k.mT * scale - lse[rows, None]).clamp_max(LARGEST_LOG).exp()
    p[:, limit:] = 0
    c = p * (gradient @ v.mT - centre[rows, None])
    kept_row = keep.repeat_interleave(block[0], 0)[: len(q)]
    share, change = (_by_block(x, block[1]) for x in (p, c))
    change = torch.where(kept_row, change / (1 - share).clamp_min(SMALLEST_REST), change / (1 + share))
    presence = F.pad(change, (0, 0, 0, -len(q) % block[0])).unflatten(0, (-1, block[0])).sum(1)
    kept = kept_row.repeat_interleave(block[1], 1)[:, :tokens]
    p, c = p * kept, c * kept
    return c @ k * scale, c.mT @ q * scale, p.mT @ gradient, presence


def _by_block(x: Tensor, size: int) -> Tensor:
    """Sums over blocks of columns, (rows, Nk)."""
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (blocks_of(x.shape[-1], size), size)).sum(-1)


def _on_gpu(*arguments: Any) -> tuple[Tensor, ...]:
    from .gradients import gradients_on_gpu

    return gradients_on_gpu(*arguments)


def _precision(q: Tensor) -> str:
    """The tensors' own, but bf16 for float32 on a GPU, where kernels have no float32."""
    return "bf16" if q.is_cuda and q.dtype == torch.float32 else OWN_PRECISION[q.dtype]
