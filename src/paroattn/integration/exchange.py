"""Ulysses: ranks that have some tokens of all heads exchange them for all tokens of some heads, and back.

Eager code exchanges one part of the heads while it computes another. In compiled code every exchange is one node of the
graph, whatever the layer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from ..kernels.dealing import collect, deal


def by_parts(
    q: Tensor, k: Tensor, v: Tensor, parts: Sequence[tuple[Tensor, Callable[..., Tensor]]], sizes: Sequence[int],
    group: str,
) -> Tensor:  # fmt: skip
    """Attention of all heads, one part of each rank's after the other, so that one computes while another travels.

    Args:
        q, k, v: (B, own tokens, H, D).
        parts: Heads of every rank, (ranks, heads of each), and what makes of their q, k and v, (B, N, own heads, D),
            one tensor like these.
        sizes: Tokens of every rank.
        group: Name of the process group.

    Returns:
        (B, own tokens, H, D).
    """
    sizes, own = list(sizes), q.shape[1]
    arriving = [_send_tokens((q, k, v), heads, sizes, group) for heads, _ in parts]
    leaving = [
        _send_heads(attend(*(x.transpose(0, 1) for x in arrived())), sizes, own, group)
        for (_, attend), arrived in zip(parts, arriving, strict=True)
    ]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for (heads, _), arrived in zip(parts, leaving, strict=True):
        collect(arrived(), heads, out)
    return out


def to_heads(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor, sizes: Sequence[int], group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Give other ranks their heads of this rank's tokens, and get their tokens of this rank's heads.

    Args:
        q, k, v: (B, own tokens, H, D).
        heads: Heads of every rank, (ranks, heads of each).
        sizes: Tokens of every rank.
        group: Name of the process group.

    Returns:
        q, k and v of (B, N, own heads, D), the tokens of rank 0 first. They are views of (N, B, own heads, D).
    """
    received = torch.ops.paroattn.to_heads(q, k, v, heads, list(sizes), group)
    q, k, v = (x.transpose(0, 1) for x in received)
    return q, k, v


def to_tokens(out: Tensor, heads: Tensor, sizes: Sequence[int], own: int, group: str) -> Tensor:
    """Undo `to_heads`: (B, N, own heads, D) to (B, own tokens, H, D); `own` is the number of own tokens."""
    return torch.ops.paroattn.to_tokens(out, heads, list(sizes), own, group)


def whole_mask(mask: Tensor, sizes: Sequence[int], group: str) -> Tensor:
    """The masks over keys of all ranks, bool (B, own tokens) of each, one after the other."""
    return torch.ops.paroattn.whole_mask(mask, list(sizes), group)


def _named(group: str) -> Any:
    resolve: Any = distributed_c10d._resolve_process_group
    return resolve(group)


def _send_tokens(
    tensors: Sequence[Tensor], heads: Tensor, sizes: list[int], group: str
) -> Callable[[], tuple[Tensor, ...]]:
    """Begin to send; what is returned waits for what arrives, (N, B, own heads, D) each."""
    batch, own, _, channels = tensors[0].shape
    sent, received, works = [], [], []
    for x in tensors:
        sent.append(deal(x, heads).flatten(0, 1))
        received.append(x.new_empty(sum(sizes), batch, heads.shape[1], channels))
        works.append(_exchange(received[-1], sent[-1], sizes, [own] * len(sizes), group))

    def arrived() -> tuple[Tensor, ...]:
        for work in works:
            work.wait()
        sent.clear()
        return tuple(received)

    return arrived


def _send_heads(out: Tensor, sizes: list[int], own: int, group: str) -> Callable[[], Tensor]:
    """Begin to send back; what is returned waits for what arrives, (ranks, own tokens, B, heads of each, D)."""
    batch, _, each, channels = out.shape
    sent = out.transpose(0, 1).contiguous()
    received = out.new_empty(len(sizes), own, batch, each, channels)
    work = _exchange(received.flatten(0, 1), sent, [own] * len(sizes), sizes, group)

    def arrived() -> Tensor:
        work.wait()
        kept.clear()
        return received

    kept = [sent]  # as long as it may be read
    return arrived


def _exchange(received: Tensor, sent: Tensor, arriving: list[int], leaving: list[int], group: str) -> Any:
    return dist.all_to_all_single(received, sent, arriving, leaving, _named(group), async_op=True)


def _to_heads(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor, sizes: list[int], group: str
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _send_tokens((q, k, v), heads, sizes, group)()
    return q, k, v


def _to_tokens(out: Tensor, heads: Tensor, sizes: list[int], own: int, group: str) -> Tensor:
    batch, _, _, channels = out.shape
    return collect(_send_heads(out, sizes, own, group)(), heads, out.new_empty(batch, own, heads.numel(), channels))


def _whole_mask(mask: Tensor, sizes: list[int], group: str) -> Tensor:
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, max(sizes) - mask.shape[1])).contiguous()
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, _named(group))
    return torch.cat([part[:, :size] for part, size in zip(gathered, sizes, strict=True)], dim=1).bool()


def _fake_to_heads(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor, sizes: list[int], group: str
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (sum(sizes), q.shape[0], heads.shape[1], q.shape[3])
    return q.new_empty(shape), k.new_empty(shape), v.new_empty(shape)


def _fake_to_tokens(out: Tensor, heads: Tensor, sizes: list[int], own: int, group: str) -> Tensor:
    return out.new_empty(out.shape[0], own, heads.numel(), out.shape[3])


def _fake_whole_mask(mask: Tensor, sizes: list[int], group: str) -> Tensor:
    return mask.new_empty(mask.shape[0], sum(sizes), dtype=torch.bool)


_OPERATIONS = {
    "to_heads(Tensor q, Tensor k, Tensor v, Tensor heads, int[] sizes, str group) -> (Tensor, Tensor, Tensor)": (
        _to_heads,
        _fake_to_heads,
    ),
    "to_tokens(Tensor out, Tensor heads, int[] sizes, int own, str group) -> Tensor": (_to_tokens, _fake_to_tokens),
    "whole_mask(Tensor mask, int[] sizes, str group) -> Tensor": (_whole_mask, _fake_whole_mask),
}
for _schema, (_run, _fake) in _OPERATIONS.items():
    _name, _, _arguments = _schema.partition("(")
    torch.library.define(f"paroattn::{_name}", f"({_arguments}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"paroattn::{_name}", "default")(_run)
    torch.library.register_fake(f"paroattn::{_name}")(_fake)
