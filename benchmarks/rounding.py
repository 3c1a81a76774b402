"""INT8 attention weights under three scales: attention over all blocks, with P and V rounded and all else exact."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from paroattn.block_mask import BlockMask
from paroattn.kernels.reference import to_model_order
from paroattn.precision import FORMATS, dequantize, quantize
from standing_in import Place, clips_of, instead

SHARED = {"row": (-2, -1), "block": (-3, -1), "row in block": (-1,)}
"""What shares a scale of P, as axes of its blocks (heads, Nq, rows, Nk, columns)."""
SMALLEST = 1e-30
HIGHEST = 127.0


@contextmanager
def rounded(transformer: Any, scales: str | None) -> Iterator[None]:
    """Let a model that runs by a plan attend to all blocks, with INT8 P and V; with None, nothing is rounded."""

    def run(
        place: Place, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, table: Tensor, order: Tensor, **_: Any
    ) -> Tensor:
        out = torch.stack([attended(*clip, mask.block, scales) for clip in clips_of(q, k, v, table, order)])
        return to_model_order(out, table, order).to(q.dtype)

    with instead(transformer, run):
        yield


def attended(q: Tensor, k: Tensor, v: Tensor, block: tuple[int, int], scales: str | None) -> Tensor:
    """Attention of one clip, (heads, N, D) in kernel order.

    P is exp(s − row maximum); the denominator sums it as it was rounded. V has one scale a channel.
    """
    tokens, (rows, columns) = q.shape[1], (-q.shape[1] % size for size in block)
    scores = pad(q * q.shape[-1] ** -0.5, (0, 0, 0, rows)) @ pad(k, (0, 0, 0, columns)).mT
    p = scores.sub_(scores[..., :tokens].amax(-1, keepdim=True)).exp_()
    p[:, tokens:], p[..., tokens:] = 0, 0
    if scales is not None:
        tiles = p.unflatten(-1, (-1, block[1])).unflatten(1, (-1, block[0]))
        unit = tiles.amax(SHARED[scales], keepdim=True).clamp_min_(SMALLEST).div_(HIGHEST)
        tiles.div_(unit).round_().mul_(unit)
        v = dequantize(*quantize(v, FORMATS["int8"], "channel"))
    p = p[:, :tokens, :tokens]
    return p @ v / p.sum(-1, keepdim=True)
