"""Statistics of every block of an attention map, for every candidate order, without keeping the map.

    P    = softmax(q kᵀ · softmax_scale)                         rows r, a chunk at a time, text columns included
    m_rj = Σ_{n∈j} P_rn        A_rj = Σ_{n∈j} P_rn v_n        o_r = Σ_n P_rn v_n
    mass_ij  = mean over rows r of block i of m_rj
    error_ij = Σ_r ‖(A_rj − m_rj o_r) W_o‖²                      to first order, the output error of dropping block j
    small_ij = share of entries below ε           Ψ_ij = max P / mean P

‖x W_o‖ = ‖x S‖ with S Sᵀ = W_o W_oᵀ, so V is multiplied by S once per head and every sum stays D wide.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..block_mask import blocks_of
from ..capture import BlockStats
from ..grid import Layout

SMALL = 1e-3
SMALL_SHARE = 0.9
ELEMENTS_AT_ONCE = {"cpu": 2**24, "cuda": 2**28}


def block_stats(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_o: Tensor,
    *,
    layout: Layout,
    orders: tuple[str, ...],
    block: tuple[int, int],
    row_stride: int = 1,
    row_offset: int = 0,
    softmax_scale: float | None = None,
    paper: bool = True,
) -> BlockStats:
    """Measure every block of the video's attention map in each candidate order.

    Args:
        q, k, v: (B, N, H, D) in the model's order.
        w_o: The output projection of each head, (H, D, channels).
        layout: Grid and text of the sequence.
        orders: Candidate orders.
        block: Tokens of a query block and of a key block.
        row_stride: Measure one query row in so many, chosen as a lattice over the grid so that every block of every
            order gets its share; sums are scaled up.
        row_offset: Which of the lattices.
        softmax_scale: Factor on q·k; 1/√D by default.
        paper: Also measure what only the paper's score needs; without, sparse_share and incoherence are 0.

    Source:
        PAROAttention (arXiv 2506.16054) for mass, share of small entries and Ψ; the output error is ours.
    """
    heads, head_dim = q.shape[2:]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    video = layout.table(orders).to(q.device).long()[:, : layout.grid.tokens]
    rows = _lattice(layout, row_stride, row_offset).to(q.device)
    _check_sampled(video, rows, block[0], row_stride)
    root = _square_root(w_o.to(compute))
    maps = []
    for one_q, one_k, one_v in zip(*(x.to(compute).transpose(1, 2) for x in (q, k, v)), strict=True):
        sums = _Sums(video, q.shape[1], heads, block, compute, paper)
        queries, keys, values = one_q.mT * scale, F.pad(one_k, (0, 0, 0, 1)), F.pad(one_v @ root, (0, 0, 0, 1))
        at_once = max(1, ELEMENTS_AT_ONCE.get(q.device.type, 2**24) // (heads * one_q.shape[1]))
        for chunk in rows.split(at_once):
            scores = keys @ queries[:, :, chunk]
            scores[:, -1] = -torch.inf
            sums.add(torch.softmax(scores, 1), chunk, values)
        maps.append(sums.finish(rows))
    return BlockStats(*(torch.stack(each).sum(0) for each in zip(*maps, strict=True)), calls=len(maps))


def _lattice(layout: Layout, stride: int, offset: int) -> Tensor:
    """Positions in the model's sequence of every `stride`-th video token along each axis."""
    frames, height, width = (torch.arange(size) for size in layout.grid)
    chosen = (frames[:, None, None] + height[:, None] + width) % stride == offset % stride
    start = layout.text.tokens if layout.text.side == "prefix" else 0
    return chosen.flatten().nonzero()[:, 0] + start


def _check_sampled(video: Tensor, rows: Tensor, block: int, stride: int) -> None:
    for columns in video:
        sampled = torch.isin(columns, rows)
        if not all(part.any() for part in sampled.split(block)):
            raise ValueError(f"row_stride must leave every query block of {block} tokens a row; got {stride}")


def _square_root(w_o: Tensor) -> Tensor:
    """S of shape (H, D, D) with S Sᵀ = W_o W_oᵀ."""
    gram = w_o.double() @ w_o.double().mT
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp_min(0).sqrt()[:, None]).to(w_o.dtype)


class _Sums:
    """Running sums over the rows of one map, (orders, H, Nq, Nk) each."""

    def __init__(self, video: Tensor, tokens: int, heads: int, block: tuple[int, int], dtype: torch.dtype, paper: bool):
        self.video, self.block, self.tokens, self.paper = video, block, video.shape[1], paper
        shape = (len(video), heads, blocks_of(self.tokens, block[0]), blocks_of(self.tokens, block[1]))
        self.mass, self.error, self.small, self.largest = (video.new_zeros(shape, dtype=dtype) for _ in range(4))
        self.output_power = video.new_zeros((), dtype=dtype)
        self.columns = F.pad(video, (0, -self.tokens % block[1]), value=tokens)
        self.place = torch.zeros(len(video), tokens, dtype=torch.long, device=video.device)
        self.place.scatter_(1, video, torch.arange(self.tokens, device=video.device).expand_as(video))

    def add(self, p: Tensor, rows: Tensor, values: Tensor) -> None:
        """Add rows of the map, transposed: p (H, N + 1, R), for values (H, N + 1, D) that were multiplied by S.

        Token N is padding: nobody attends to it. It fills the last block.
        """
        output = values.mT @ p  # (H, D, R)
        power = output.square().sum(1, keepdim=True)
        self.output_power += power.sum()
        for index, columns in enumerate(self.columns):
            blocks = p.index_select(1, columns).unflatten(1, (-1, self.block[1]))  # (H, Nk, bk, R)
            mass = blocks.sum(2)
            partial = values.index_select(1, columns).unflatten(1, (-1, self.block[1])).mT @ blocks  # (H, Nk, D, R)
            error = partial.sub_(mass[:, :, None] * output[:, None]).square_().sum(2)
            owner = self.place[index, rows] // self.block[0]
            self.mass[index].index_add_(1, owner, mass.mT)
            self.error[index].index_add_(1, owner, error.mT)
            if self.paper:
                self.small[index].index_add_(1, owner, (blocks < SMALL).sum(2).to(mass.dtype).mT)
                where = owner[None, :, None].expand_as(mass.mT)
                self.largest[index].scatter_reduce_(1, where, blocks.amax(2).mT, "amax")

    def finish(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Mass, error, share of sparse blocks, incoherence and output power of the whole map."""
        heights, widths = (self._sizes(side) for side in (0, 1))
        owners = self.place[:, rows] // self.block[0]
        sampled = torch.stack([torch.bincount(owner, minlength=len(heights)) for owner in owners])
        sampled = sampled.to(self.mass.dtype).clamp_min(1)[:, None, :, None]
        mean = self.mass / (sampled * widths)
        small = self.small - sampled * (self.block[1] - widths)
        return (
            self.mass / sampled,
            self.error * (heights[:, None] / sampled),
            (small >= SMALL_SHARE * sampled * widths).to(mean.dtype).mean((2, 3)),
            (self.largest / mean.clamp_min(1e-30)).mean((2, 3)),
            self.output_power * (self.tokens / len(rows)),
        )

    def _sizes(self, side: int) -> Tensor:
        """Tokens of each query (0) or key (1) block; the last may have fewer."""
        starts = torch.arange(self.mass.shape[2 + side], device=self.mass.device) * self.block[side]
        return (self.tokens - starts).clamp_max(self.block[side]).to(self.mass.dtype)
