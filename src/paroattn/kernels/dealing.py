"""Copies tokens × heads into the order in which they go to other ranks, and back; the heads' order costs nothing more.

ours (B, N, H, D)  ↔  dealt (ranks, N, B, heads of each, D), where rank p gets the heads `deal[p]`
"""

from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor


def deal(x: Tensor, heads: Tensor) -> Tensor:
    """Put tokens in the order in which they are sent.

    Args:
        x: (B, N, H, D), any strides but channels next to each other.
        heads: Heads of every rank, (ranks, heads of each), integers on x's device.

    Returns:
        (ranks, N, B, heads of each, D), contiguous.
    """
    batch, tokens, _, channels = x.shape
    if not x.is_cuda:
        return x[:, :, heads].permute(2, 1, 0, 3, 4).contiguous()
    dealt = x.new_empty(heads.shape[0], tokens, batch, heads.shape[1], channels)
    _kernels().copy(x, dealt, heads, back=False)
    return dealt


def collect(dealt: Tensor, heads: Tensor, out: Tensor) -> Tensor:
    """Undo `deal`.

    Args:
        dealt: (ranks, N, B, heads of each, D), contiguous.
        heads: As in `deal`.
        out: (B, N, H, D), in which these heads are written.

    Returns:
        `out`.
    """
    if dealt.is_cuda:
        _kernels().copy(out, dealt, heads, back=True)
    else:
        out[:, :, heads] = dealt.permute(2, 1, 0, 3, 4)
    return out


@cache
def _kernels() -> Any:
    return import_module(".copying", __package__)
