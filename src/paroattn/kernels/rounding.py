"""What rounding q, k, v and P costs a head: the squared error of its output, in the currency of dropped blocks.

    Σ_r ‖(ô_r − o_r) W_o‖²        over all rows r of the video, estimated from some of them, all keys kept

The rows are read over all keys, text included, in the model's own order.
"""

import torch
from torch import Tensor

from ..capture.measured import ROUNDED
from ..grid import Layout
from ..precision import Precision
from .reference import some_rows, to_kernel_order

ROWS = 64
"""Query rows that stand for all."""
GOLDEN = 0.618034
ELEMENTS_AT_ONCE = 2**24


def rounding_errors(
    q: Tensor, k: Tensor, v: Tensor, root: Tensor, *, layout: Layout, block: tuple[int, int], softmax_scale: float
) -> Tensor:
    """Measure the error of each head in each precision of `ROUNDED`.

    Args:
        q, k, v: (1, N, H, D) in the model's order.
        root: S of each head, (H, D, D), with S Sᵀ = W_o W_oᵀ.
        layout: Grid and text of the sequence.
        block: Tokens of a query block and of a key block.
        softmax_scale: Factor on q·k.

    Returns:
        (precisions, H) in the dtype that the block statistics have.
    """
    heads, video = q.shape[2], layout.grid.tokens
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    table, rows = layout.table(("FHW",)).to(q.device), _rows(video).to(q.device)
    at_once = max(1, ELEMENTS_AT_ONCE // (q.shape[1] * q.shape[3]))
    found = []
    for part in torch.arange(heads).split(at_once):
        some = slice(int(part[0]), int(part[-1]) + 1)
        order = torch.zeros(len(part), dtype=torch.long, device=q.device)
        q_, k_, v_ = (to_kernel_order(x[:, :, some].to(dtype), table, order) for x in (q, k, v))
        exact = torch.softmax(q_[:, :, rows] @ k_.mT * softmax_scale, -1) @ v_
        errors = []
        for precision in map(Precision.parse, ROUNDED):
            got = some_rows(q_, k_, v_, rows, block, precision, softmax_scale, layout.text.tokens)
            errors.append(((got - exact) @ root[some].to(dtype)).square().sum((0, 2, 3)))
        found.append(torch.stack(errors) * (video / len(rows)))
    return torch.cat(found, 1)


def _rows(video: int) -> Tensor:
    """One row of every stretch of the video, never at the same place of it: a grid's period cannot hide."""
    count = min(ROWS, video)
    place = torch.arange(count, dtype=torch.float64)
    return ((place + place * GOLDEN % 1) * (video / count)).long()
