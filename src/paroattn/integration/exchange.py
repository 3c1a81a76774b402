"""Ulysses: ranks that have some tokens of all heads exchange them for all tokens of some heads, and back.

Every exchange is one node of a compiled graph, whatever the layer.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from ..kernels.dealing import collect, deal


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


def _to_heads(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor, sizes: list[int], group: str
) -> tuple[Tensor, Tensor, Tensor]:
    batch, own, _, channels = q.shape
    received, works = [], []
    for x in (q, k, v):
        sent = deal(x, heads).flatten(0, 1)
        received.append(x.new_empty(sum(sizes), batch, heads.shape[1], channels))
        works.append(
            dist.all_to_all_single(received[-1], sent, sizes, [own] * len(sizes), _named(group), async_op=True)
        )
    for work in works:
        work.wait()
    q, k, v = received
    return q, k, v


def _to_tokens(out: Tensor, heads: Tensor, sizes: list[int], own: int, group: str) -> Tensor:
    batch, _, each, channels = out.shape
    received = out.new_empty(len(sizes) * own, batch, each, channels)
    dist.all_to_all_single(received, out.transpose(0, 1).contiguous(), [own] * len(sizes), sizes, _named(group))
    return collect(received.unflatten(0, (len(sizes), own)), heads)


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
