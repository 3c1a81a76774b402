"""Statistics of every block of an attention map, for every candidate order, without keeping the map.

    P    = softmax(q kᵀ · softmax_scale)                         text columns included
    m_rj = Σ_{n∈j} P_rn        A_rj = Σ_{n∈j} P_rn v_n        o_r = Σ_n P_rn v_n
    mass_ij  = mean over rows r of block i of m_rj
    error_ij = Σ_r ‖(A_rj − m_rj o_r) W_o‖²                      to first order, the output error of dropping block j
    small_ij = share of entries below ε           Ψ_ij = max P / mean P

‖x W_o‖ = ‖x S‖ with S Sᵀ = W_o W_oᵀ, so V is multiplied by S once per head and every sum stays D wide.

This module defines what is measured and measures it in plain PyTorch; `stats.py` does so on a GPU.
"""

import math
import os
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ..block_mask import blocks_of
from ..capture import BlockStats
from ..grid import Layout
from .rounding import rounding_errors

SMALL = 1e-3
SMALL_SHARE = 0.9
ELEMENTS_AT_ONCE = {"cpu": 2**24, "cuda": 2**28}
GOLDEN = 0.618


def block_stats(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_o: Tensor,
    *,
    layout: Layout,
    orders: tuple[str, ...],
    block: tuple[int, int],
    order: Tensor | None = None,
    row_stride: int = 1,
    row_offset: int = 0,
    block_stride: int = 1,
    block_offset: int = 0,
    softmax_scale: float | None = None,
    paper: bool = True,
    rounding: bool = False,
    impl: str = "auto",
) -> BlockStats:
    """Measure every block of the video's attention map in each candidate order, or in one given order per head.

    To choose orders, a sample of query blocks is enough (`block_stride`); to make a mask, every query block is needed,
    but only in the chosen orders (`order`).

    Args:
        q, k, v: (B, N, H, D) in the model's order.
        w_o: The output projection of each head, (H, D, channels).
        layout: Grid and text of the sequence.
        orders: Candidate orders.
        block: Tokens of a query block and of a key block.
        order: Index into `orders` for each head, (H,): measure this one only. The result has one order.
        row_stride: Measure one query row in so many, chosen as a lattice over the grid so that every block of every
            order gets its share; sums are scaled up. Saves time in plain PyTorch only.
        row_offset: Which of the lattices.
        block_stride: Measure one query block in so many, spread over the map, and each of them whole. The result holds
            these blocks alone; only output_power is scaled up, to the whole map.
        block_offset: Which of the samples; 0 … block_stride − 1 together hold every block once.
        softmax_scale: Factor on q·k; 1/√D by default.
        paper: Also measure what only the paper's score needs; without, sparse_share and incoherence are 0.
        rounding: Also measure what INT8 and INT4 cost each head of the first batch element, in plain PyTorch.
        impl: "torch", "triton", or "auto": triton for tensors on a GPU, torch elsewhere. Triton multiplies 16-bit
            numbers, float32 tensors are rounded to bfloat16; PyTorch computes in float32, or float64 for such tensors.

    Raises:
        ValueError: If a stride leaves nothing to measure, or `impl` cannot do what is asked.
        RuntimeError: If the machine cannot run `impl`.

    Source:
        PAROAttention (arXiv 2506.16054) for mass, share of small entries and Ψ; the output error is ours.
    """
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"impl must be auto or one of {', '.join(IMPLEMENTATIONS)}; got {impl!r}")
    run = IMPLEMENTATIONS[("triton" if q.is_cuda else "torch") if impl == "auto" else impl]
    heads, head_dim = q.shape[2:]
    device, video = q.device, layout.grid.tokens
    table = _table(layout, orders, device)
    rows = _sample(blocks_of(video, block[0]), block_stride, block_offset).to(device)
    measured = _measured(layout, table, block[0], row_stride, row_offset)
    if not bool(measured[:, rows].any(-1).all()):
        raise ValueError(
            f"row_stride must leave a row in every query block of {block[0]} tokens, in every order and in the "
            f"last one, which may be short; got {row_stride}. Take a smaller one, such as {max(1, row_stride // 4)}."
        )
    every = torch.arange(len(orders))[:, None].expand(-1, heads)
    chosen = every if order is None else _check_order(order, len(orders), heads)[None]
    root = _square_root(w_o)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    maps = []
    for element in range(q.shape[0]):
        one = [x[element : element + 1] for x in (q, k, v)]
        sums = run(
            *one, root, table=table, chosen=chosen, rows=rows, measured=measured, video=video, block=block, paper=paper,
            softmax_scale=scale,
        )  # fmt: skip
        sampled = measured[:, rows].sum(-1)[chosen.to(device)]  # (candidates, H, S)
        maps.append(_finish(*sums, sampled, rows, video, block, block_stride))
    totals = (torch.stack(each).sum(0) for each in zip(*maps, strict=True))
    first = [x[:1] for x in (q, k, v)]
    rounded = rounding_errors(*first, root, layout=layout, block=block, softmax_scale=scale) if rounding else None
    return BlockStats(*totals, calls=len(maps), rows=None if block_stride == 1 else rows, rounding=rounded)


def _check_order(order: Tensor, orders: int, heads: int) -> Tensor:
    order = order.cpu().long()
    if order.shape != (heads,) or not bool(((order >= 0) & (order < orders)).all()):
        raise ValueError(f"order must name one of {orders} orders for each of {heads} heads; got {order.tolist()}")
    return order


@lru_cache(maxsize=8)
def _table(layout: Layout, orders: tuple[str, ...], device: torch.device) -> Tensor:
    return layout.table(orders).to(device)


def _sample(count: int, stride: int, offset: int) -> Tensor:
    """One block of every `stride` neighbours, not always the same one: a grid's period cannot hide from it."""
    if not 1 <= stride <= count:
        raise ValueError(f"block_stride must be 1…{count} for {count} query blocks; got {stride}")
    step = next(step for step in range(round(GOLDEN * stride), 2 * stride) if math.gcd(step, stride) == 1)
    first = torch.arange(0, count, stride)
    blocks = first + (offset + first // stride * step) % stride
    return blocks[blocks < count]


def _measured(layout: Layout, table: Tensor, block: int, stride: int, offset: int) -> Tensor:
    """Which rows of every query block are measured, (orders, Nq, rows of a block), for one lattice."""
    frames, height, width = (torch.arange(size) for size in layout.grid)
    chosen = (frames[:, None, None] + height[:, None] + width) % stride == offset % stride
    text = layout.text.tokens
    chosen = F.pad(chosen.flatten(), (text, 0) if layout.text.side == "prefix" else (0, text)).to(table.device)
    video = layout.grid.tokens
    return F.pad(chosen[table[:, :video].long()], (0, -video % block)).unflatten(1, (-1, block))


def _square_root(w_o: Tensor) -> Tensor:
    """S of shape (H, D, D) in float64 with S Sᵀ = W_o W_oᵀ, to 12 digits also where that is singular."""
    gram = w_o.double() @ w_o.double().mT
    least = 1e-12 * gram.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-30
    return torch.linalg.cholesky(gram + least[:, None, None] * torch.eye(gram.shape[-1]).to(gram))


def _finish(
    mass: Tensor, error: Tensor, small: Tensor, largest: Tensor, power: Tensor,
    sampled: Tensor, rows: Tensor, video: int, block: tuple[int, int], block_stride: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Sums over the measured rows → mass, error, share of sparse blocks, incoherence and output power."""
    heights, widths = (_sizes(video, size, mass) for size in block)
    heights = heights[rows]
    sampled = sampled.to(mass.dtype)[..., None]
    mean = mass / (sampled * widths)
    return (
        mass / sampled,
        error * (heights[:, None] / sampled),
        (small - sampled * (block[1] - widths) >= SMALL_SHARE * sampled * widths).to(mean.dtype).mean((2, 3)),
        (largest / mean.clamp_min(1e-30)).mean((2, 3)),
        (power * heights.sum() / sampled.sum((2, 3))).sum(1).mean() * block_stride,
    )


def _sizes(tokens: int, block: int, like: Tensor) -> Tensor:
    """Tokens of each block; the last may have fewer."""
    starts = torch.arange(blocks_of(tokens, block), device=like.device) * block
    return (tokens - starts).clamp_max(block).to(like.dtype)


def _torch(
    q: Tensor, k: Tensor, v: Tensor, root: Tensor, *,
    table: Tensor, chosen: Tensor, rows: Tensor, measured: Tensor, video: int, block: tuple[int, int],
    softmax_scale: float, paper: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Sums of one map over the measured rows of every query block, rows a chunk at a time.

    Args:
        q, k, v: (1, N, H, D).
        root: S, (H, D, D).
        table: Gather tables of the orders, (orders, N).
        chosen: Row of `table` for each candidate and head, (C, H), on the CPU.
        rows: Query blocks to measure, (S,).
        measured: Which rows of every query block, (orders, Nq, rows of a block).
        video: Number of video tokens.
        block: Tokens of a query block and of a key block.
        softmax_scale: Factor on q·k.
        paper: Fill `small` and `largest`.

    Returns:
        Mass, error, number of entries below ε (columns beyond the video count as such) and largest entry,
        (C, H, S, Nk) each; Σ_r ‖o_r W_o‖², (C, H).
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    one_q, one_k, one_v = (x[0].to(dtype).transpose(0, 1) for x in (q, k, v))
    queries = one_q.mT * softmax_scale
    keys, values = F.pad(one_k, (0, 0, 0, 1)), F.pad(one_v @ root.to(dtype), (0, 0, 0, 1))
    shape = (*chosen.shape, len(rows), blocks_of(video, block[1]))
    totals = [q.new_zeros(shape, dtype=dtype) for _ in range(4)] + [q.new_zeros(shape[:2], dtype=dtype)]
    for heads, candidates, positions in _parts(table, chosen, rows, measured):
        orders = chosen[candidates, heads[0]]
        sums = _Sums(table[orders, :video].long(), q.shape[1], len(heads), rows, block, dtype, paper)
        part_q, part_k, part_v = (x if len(heads) == len(x) else x[heads] for x in (queries, keys, values))
        at_once = max(1, ELEMENTS_AT_ONCE.get(q.device.type, 2**24) // (len(heads) * q.shape[1]))
        for chunk in positions.split(at_once):
            scores = part_k @ part_q[:, :, chunk]
            scores[:, -1] = -torch.inf
            sums.add(torch.softmax(scores, 1), chunk, part_v)
        for total, found in zip(totals, (sums.mass, sums.error, sums.small, sums.largest, sums.power), strict=True):
            total[candidates[:, None].to(q.device), heads.to(q.device)] = found
    return tuple(totals)


def _parts(table: Tensor, chosen: Tensor, rows: Tensor, measured: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Heads, candidates and the model's positions of the rows that they share.

    All orders of a whole map have the same rows, so one softmax serves them all; a sample is another one in each.
    """
    heads, candidates = torch.arange(chosen.shape[1]), torch.arange(len(chosen))
    if len(rows) == measured.shape[1] and bool((chosen == chosen[:, :1]).all()):
        yield heads, candidates, _positions(table[0], measured[0], rows)
        return
    for candidate in candidates:
        for order in chosen[candidate].unique():
            same = (chosen[candidate] == order).nonzero()[:, 0]
            yield same, candidate[None], _positions(table[order], measured[order], rows)


def _positions(columns: Tensor, measured: Tensor, rows: Tensor) -> Tensor:
    """Positions in the model's sequence of the measured rows of some query blocks of one order."""
    tokens = rows[:, None] * measured.shape[1] + torch.arange(measured.shape[1], device=rows.device)
    return columns[tokens[measured[rows]]].long()


class _Sums:
    """Running sums over the rows of one map, (orders, H, S, Nk) each."""

    def __init__(
        self, video: Tensor, tokens: int, heads: int, rows: Tensor, block: tuple[int, int], dtype: torch.dtype,
        paper: bool,
    ):  # fmt: skip
        self.block, self.paper = block, paper
        count, size = video.shape
        shape = (count, heads, len(rows), blocks_of(size, block[1]))
        self.mass, self.error, self.small, self.largest = (video.new_zeros(shape, dtype=dtype) for _ in range(4))
        self.power = video.new_zeros(heads, dtype=dtype)
        self.columns = F.pad(video, (0, -size % block[1]), value=tokens)
        place = torch.zeros(count, tokens, dtype=torch.long, device=video.device)
        place.scatter_(1, video, torch.arange(size, device=video.device).expand_as(video))
        slots = torch.zeros(blocks_of(size, block[0]), dtype=torch.long, device=video.device)
        slots[rows] = torch.arange(len(rows), device=video.device)
        self.owners = slots[place // block[0]]

    def add(self, p: Tensor, rows: Tensor, values: Tensor) -> None:
        """Add rows of the map, transposed: p (H, N + 1, R), for values (H, N + 1, D) that were multiplied by S.

        Token N is padding: nobody attends to it. It fills the last block.
        """
        output = values.mT @ p  # (H, D, R)
        self.power += output.square().sum((1, 2))
        for index, columns in enumerate(self.columns):
            blocks = p.index_select(1, columns).unflatten(1, (-1, self.block[1]))  # (H, Nk, bk, R)
            mass = blocks.sum(2)
            partial = values.index_select(1, columns).unflatten(1, (-1, self.block[1])).mT @ blocks  # (H, Nk, D, R)
            error = partial.sub_(mass[:, :, None] * output[:, None]).square_().sum(2)
            owner = self.owners[index, rows]
            self.mass[index].index_add_(1, owner, mass.mT)
            self.error[index].index_add_(1, owner, error.mT)
            if self.paper:
                self.small[index].index_add_(1, owner, (blocks < SMALL).sum(2).to(mass.dtype).mT)
                where = owner[None, :, None].expand_as(mass.mT)
                self.largest[index].scatter_reduce_(1, where, blocks.amax(2).mT, "amax")


def _triton(q: Tensor, *args, **kwargs) -> tuple[Tensor, ...]:
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"impl triton needs tensors on a GPU; got {q.device}. Use impl='torch'.")
    try:
        from .stats import map_sums
    except ImportError as error:
        raise RuntimeError(
            f"impl triton needs Triton 3.4 or newer; got {error}. pip install 'paroattn[gpu]', or use impl='torch'."
        ) from error
    return map_sums(q, *args, small=SMALL, **kwargs)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {"torch": _torch, "triton": _triton}
