"""Reference attention in plain PyTorch: the meaning of every kernel.

    in kernel order (each head's own token order, video first, text last), for each block i of query rows:
        s    = q_i kᵀ · softmax_scale            over the keys of the kept blocks, −∞ elsewhere and on padding
        m    = rowmax s
        p    = exp(s − m)
        out  = p v / rowsum p                    softmax renormalised over the kept blocks; 0 without any real key
        lse  = m + ln rowsum p                   −∞ without any real key

Quantised products change three lines. K's mean, over every 8th token of the head's order, is subtracted first (softmax
does not change, whatever is subtracted; lse gets softmax_scale · q·k̄ back), and the channels of Q and K are rotated by
a Hadamard matrix, which spreads outliers over all channels and leaves q·k as it is. Q gets one scale per token, K one
per block, V one per channel; how INT4 rounds them, `four_bits` says. Text stays in INT8 then: its queries, and the key
blocks from the one on in which it begins. P, which is never negative, is stored unsigned.
Integers count from each row's own maximum inside each key block: with b = max of s over row and block,
p̂ = round(exp(s − b) · top) · exp(b − m) / top, top = 255 (INT8) or 15 (INT4), and the denominator sums p̂, so that the
weights of a row add up to one. FP8 needs less care: b is the row's maximum over this and all earlier key blocks, top is
448, and the denominator, like that of the 16-bit formats, sums p before it is rounded.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..precision import FORMATS, Precision, dequantize, hadamard, quantize, round_to
from .four_bits import SAMPLE_OF_EVERY, feedback, round_keys, round_queries, round_values, round_weights

ELEMENTS_AT_ONCE = 2**26
P_FORMAT = {"int8": "uint8", "int4": "uint4"}
P_TOP = {"int8": 255.0, "int4": 15.0, "fp8": 448.0}
"""What the largest p of a row is multiplied by before it is rounded."""
MEAN_OF_EVERY = 8
"""K's mean is taken over one token in so many."""
TEXT = FORMATS["int8"]
"""Queries and keys of text where those of the video are in INT4."""
Rounding = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From values to integers and their scale."""


def to_kernel_order(x: Tensor, table: Tensor, order: Tensor) -> Tensor:
    """(B, N, H, D) in the model's order → (B, H, N, D) in each head's own."""
    index = table[order.long()].long()
    return x.transpose(1, 2).gather(2, index[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3]))


def to_model_order(x: Tensor, table: Tensor, order: Tensor) -> Tensor:
    """(B, H, N, D) in each head's own order → (B, N, H, D) in the model's."""
    index = table[order.long()].long()[None, :, :, None].expand_as(x)
    return torch.empty_like(x).scatter_(2, index, x).transpose(1, 2)


def reference_attention(
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
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention with a token order per head.

    Args:
        q, k, v: (B, N, H, D) in the model's order. Computed in float64 if they are float64, else in float32.
        table: Gather tables (orders, N), int32, from `Layout.table`.
        order: Row of `table` for each head, (H,).
        mask: Kept blocks over the whole sequence, text included, (H, Nq, Nk).
        precision: Formats of the two products.
        softmax_scale: Factor on q·k.
        valid_tokens: (B,) int: keys from this kernel position on are padding. None: no padding.
        text_tokens: How many tokens are text, the last ones in kernel order.

    Returns:
        out (B, N, H, D) in the model's order and q's dtype, and lse (B, H, N) in the model's order.

    Source:
        PAROAttention (arXiv 2506.16054); rotation, and unsigned P scaled by row within the block, are ours.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_, k_, v_ = (to_kernel_order(x.to(compute), table, order) for x in (q, k, v))
    batch, heads, tokens, _ = q_.shape
    real = None
    if valid_tokens is not None:
        real = (torch.arange(tokens, device=q.device) < valid_tokens[:, None])[:, None]  # (B, 1, N)
        k_, v_ = (x.masked_fill(~real[..., None], 0) for x in (k_, v_))
    q_hat, k_hat, v_hat, mean = _rounded(q_, k_, v_, real, tokens - text_tokens, mask.block[1], precision)
    q_hat = q_hat * softmax_scale

    out, lse = torch.empty_like(q_), q_.new_empty(batch, heads, tokens)
    kept = mask.dense()
    block_rows = max(1, ELEMENTS_AT_ONCE // (batch * heads * mask.block[0] * tokens))
    for first in range(0, mask.query_blocks, block_rows):
        rows = slice(first * mask.block[0], min(tokens, (first + block_rows) * mask.block[0]))
        keep = kept[:, first : first + block_rows].repeat_interleave(mask.block[0], 1)[:, : rows.stop - rows.start]
        keep = keep.repeat_interleave(mask.block[1], 2)[..., :tokens]
        keep = keep if real is None else keep & real[:, :, None]
        scores = (q_hat[:, :, rows] @ k_hat.mT).masked_fill_(~keep, -math.inf)
        p, total, largest = _round_p(scores, mask.block, precision)
        out[:, :, rows] = p @ v_hat / total.clamp_min(torch.finfo(compute).tiny)
        lse[:, :, rows] = (largest + total.log()).squeeze(-1)
    if mean is not None:
        lse += (q_ @ mean.mT).squeeze(-1) * softmax_scale
    lse = to_model_order(lse[..., None], table, order).squeeze(-1).transpose(1, 2)
    return to_model_order(out, table, order).to(q.dtype), lse


def some_rows(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, block: tuple[int, int], precision: Precision, softmax_scale: float,
    text_tokens: int = 0,
) -> Tensor:  # fmt: skip
    """The output (B, H, rows, D) of some query rows over all keys, none of them padding; q, k, v in kernel order."""
    video = q.shape[2] - text_tokens
    q_hat, k_hat, v_hat, _ = _rounded(q, k, v, None, video, block[1], precision)
    p, total, _ = _round_p(q_hat[:, :, rows] @ k_hat.mT * softmax_scale, block, precision)
    return p @ v_hat / total


def _rounded(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, video: int, key_block: int, precision: Precision
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What the products are made of, and the mean that was taken from k, if one was; text begins at `video`."""
    mean = _mean_key(k, real) if FORMATS[precision.qk].scaled else None
    if mean is not None:
        k = k - mean if real is None else (k - mean) * real[..., None]
    return *_round_qk(q, k, real, video, key_block, precision), _round_v(v, precision), mean


def _mean_key(k: Tensor, real: Tensor | None) -> Tensor:
    """Mean over every 8th real token, (B, H, 1, D); k is 0 on padding."""
    k = k[:, :, ::MEAN_OF_EVERY]
    if real is None:
        return k.mean(2, keepdim=True)
    return k.sum(2, keepdim=True) / real[:, :, ::MEAN_OF_EVERY].sum(2).clamp_min(1)[..., None, None]


def _round_qk(
    q: Tensor, k: Tensor, real: Tensor | None, video: int, key_block: int, precision: Precision
) -> tuple[Tensor, Tensor]:
    form = FORMATS[precision.qk]
    if not form.scaled:
        return round_to(q, form), round_to(k, form)
    rotation = hadamard(q.shape[-1]).to(q)
    q, k = q @ rotation, k @ rotation
    if precision.qk != "int4":
        return dequantize(*quantize(q, form, "token")), dequantize(*quantize(k, form, "block", key_block))
    samples = (x[:, :, ::SAMPLE_OF_EVERY] for x in (q if real is None else q.masked_fill(~real[..., None], 0), k))
    for_keys, for_queries = map(feedback, samples)
    whole = video if video == k.shape[2] else video // key_block * key_block
    return (
        _rounded_in_two(q, video, lambda x: round_queries(x, for_queries), lambda x: quantize(x, TEXT, "token")),
        _rounded_in_two(
            k, whole, lambda x: round_keys(x, for_keys, key_block), lambda x: quantize(x, TEXT, "block", key_block)
        ),
    )


def _rounded_in_two(x: Tensor, first: int, of_video: Rounding, of_text: Rounding) -> Tensor:
    """The first tokens of (B, H, N, D) rounded in one way, those after them in another."""
    parts = ((of_video, x[:, :, :first]), (of_text, x[:, :, first:]))
    return torch.cat([dequantize(*rounded(part)) for rounded, part in parts if part.shape[2]], 2)


def _round_v(v: Tensor, precision: Precision) -> Tensor:
    if precision.pv == "int4":
        return dequantize(*round_values(v))
    return dequantize(*quantize(v, FORMATS[precision.pv], "channel"))


def _round_p(scores: Tensor, block: tuple[int, int], precision: Precision) -> tuple[Tensor, Tensor, Tensor]:
    """exp(scores − row maximum) as the second product sees it, its denominator and the row maximum.

    Overwrites `scores`.
    """
    form = FORMATS[P_FORMAT.get(precision.pv, precision.pv)]
    lowest = torch.finfo(scores.dtype).min
    largest = scores.amax(-1, keepdim=True).clamp_min(lowest)
    if not form.scaled:
        p = scores.sub_(largest).exp_()
        return round_to(p, form), p.sum(-1, keepdim=True), largest
    tokens = scores.shape[-1]
    padding = -tokens % block[1]
    blocks = torch.nn.functional.pad(scores, (0, padding), value=-math.inf).unflatten(-1, (-1, block[1]))
    highest = blocks.amax(-1, keepdim=True).clamp_min(lowest)
    if form.dtype.is_floating_point:
        highest = highest.cummax(-2).values
    p = (blocks - highest).exp_().mul_(P_TOP[precision.pv])
    stored = round_weights(p, block[0]) if precision.pv == "int4" else round_to(p, form)
    weight = (highest - largest[..., None]).exp_() / P_TOP[precision.pv]
    summed = p if form.dtype.is_floating_point else stored
    total = (summed.sum(-1, keepdim=True) * weight).sum(-2)
    return (stored * weight).flatten(-2)[..., :tokens], total, largest
