"""Rules that choose blocks, each written from the idea of a published method, for benchmarks/fidelity.py.

Static shapes rank the blocks of a map by where they lie, and a density keeps the first so many:

    local_window      like DiTFastAttn (arXiv 2406.08552): a window around the diagonal of the flattened sequence. Its
                      sharing of residuals, of steps and of guidance branches is another saving and left out.
    spatial_temporal  like Sparse VideoGen (arXiv 2502.01776): a spatial head sees its own and the nearest frames, a
                      temporal head the same places of all frames, which the order HWF puts side by side. Heads are
                      classified once, by the calibration's output error, not anew at every step from sampled rows. A
                      spatial head may keep the first frame too, within its density, where that error is lower so.
    radial            like Radial Attention (arXiv 2506.19852): all heads share one mask. Around the same place in
                      another frame the window is as wide as a frame for neighbouring frames and half as wide whenever
                      the temporal distance doubles. The density scales all widths. The first frame is kept if the
                      calibration's error is lower so.

Dynamic rules look at each input, for every layer, step, guidance branch and clip:

    pooled_topk       like SpargeAttn (arXiv 2502.18137): the mean query of each query block against the mean key of
                      each key block, and the best so many of each row. Its test of how alike the tokens of a block are
                      and its skipping inside the kernel are left out.
    oracle            the blocks with the largest output error on the very input. No method can run it: it computes the
                      map first. Each layer and phase gets as many blocks as a plan gives it, and spreads them over
                      heads and rows; like our plans it keeps the heaviest block of every row.

No code of these projects was used.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from paroattn.block_mask import BlockMask, blocks_of
from paroattn.capture import Statistics
from paroattn.grid import Grid, Layout
from paroattn.kernels.block_stats import block_stats
from paroattn.kernels.reference import to_kernel_order
from paroattn.phases import Phase
from paroattn.plan.plan import LayerPlan, TransformerPlan
from paroattn.plan.search import of_model
from standing_in import Place, instead

Block = tuple[int, int]
Shapes = dict[str, tuple[tuple[str, ...], Tensor]]
"""Orders of the heads and kept blocks (heads, Nq, Nk) of every layer."""
SPATIAL, TEMPORAL = "FHW", "HWF"
GOLDEN = 0.6180339887
FIRST = -1.0
QUARTER = 0.25


# Where blocks lie


def centre_distance(tokens: int, block: Block) -> Tensor:
    """Distance along the sequence between the middles of two blocks, in tokens, (Nq, Nk)."""
    rows, columns = ((torch.arange(blocks_of(tokens, size)) + 0.5) * size for size in block)
    return (rows[:, None] - columns).abs()


def slab_distance(tokens: int, slab: int, block: Block) -> Tensor:
    """Smallest distance between the slabs of so many tokens that two blocks touch, 0 where they share one, (Nq, Nk)."""
    starts = [torch.arange(blocks_of(tokens, size)) * size for size in block]
    rows, columns = (
        (start // slab, (start + size).clamp_max(tokens).sub(1) // slab)
        for start, size in zip(starts, block, strict=True)
    )
    gap = torch.maximum(columns[0] - rows[1][:, None], rows[0][:, None] - columns[1])
    return gap.clamp_min(0)


def window_rank(grid: Grid, block: Block) -> Tensor:
    """Blocks by their distance from the diagonal, lowest first, (Nq, Nk)."""
    return centre_distance(grid.tokens, block)


def slab_rank(grid: Grid, slab: int, block: Block) -> Tensor:
    """Blocks by the distance of their slabs; of equal ones by that from the diagonal, lowest first, (Nq, Nk)."""
    return slab_distance(grid.tokens, slab, block) + centre_distance(grid.tokens, block) / (2 * grid.tokens)


@lru_cache(maxsize=2)
def radial_rank(grid: Grid, block: Block) -> Tensor:
    """Blocks by the factor on all widths at which a quarter of their pairs lies within, lowest first, (Nq, Nk).

    The width is a frame for the same and the next frame, and half of it whenever the temporal distance doubles.
    """
    frame = grid.height * grid.width
    token = torch.arange(grid.tokens)
    when, where = token // frame, token % frame
    away = (when[:, None] - when).abs().clamp_min(1).float()
    needed = (where[:, None] - where).abs() * 2 ** away.log2().floor() / frame
    padding = [-grid.tokens % size for size in block]
    padded = torch.nn.functional.pad(needed, (0, padding[1], 0, padding[0]), value=torch.inf)
    pairs = padded.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1])).transpose(1, 2).flatten(2).sort(-1).values
    count = pairs.isfinite().sum(-1, keepdim=True)
    return pairs.gather(-1, (count * QUARTER).ceil().long() - 1)[..., 0]


def first_frame(rank: Tensor, grid: Grid, block: Block) -> Tensor:
    """The same, with the key blocks of the first frame before all others, in the model's own order."""
    rank = rank.clone()
    rank[:, : blocks_of(grid.height * grid.width, block[1])] = FIRST
    return rank


def keep_lowest(rank: Tensor, density: float) -> Tensor:
    """The blocks that come first, exactly as many as the density allows; of equal ones some all over the map.

    The first block of every row is kept in any case.
    """
    flat = rank.scatter(-1, rank.argmin(-1, keepdim=True), -torch.inf).flatten()
    scattered = (torch.arange(len(flat)).double() * GOLDEN % 1).argsort()
    chosen = scattered[flat[scattered].argsort(stable=True)[: round(density * len(flat))]]
    return torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, chosen, True).view(rank.shape)


def even_rows(rows: int, columns: int, density: float) -> Tensor:
    """Blocks of each row that make up the density together, (rows,), equal but for one."""
    total = round(density * rows * columns)
    ends = torch.arange(rows + 1) * total // rows
    return ends.diff()


@lru_cache(maxsize=4)
def _averaging(tokens: int, size: int) -> Tensor:
    """Matrix that averages the tokens of each block, (blocks, tokens) float64."""
    owner = torch.arange(tokens) // size
    ones = torch.nn.functional.one_hot(owner).double().mT
    return ones / ones.sum(1, keepdim=True)


# Static shapes


def local_window(statistics: Statistics, density: float) -> Shapes:
    """The same window in every head."""
    kept = keep_lowest(window_rank(statistics.layout.grid, statistics.settings.block), density)
    return _everywhere(statistics, kept)


def spatial_temporal(statistics: Statistics, density: float) -> Shapes:
    """A spatial or a temporal mask for each head, whichever drops less output error."""
    grid, block = statistics.layout.grid, statistics.settings.block
    frame = slab_rank(grid, grid.height * grid.width, block)
    ranks = ((SPATIAL, frame), (SPATIAL, first_frame(frame, grid, block)))
    ranks += ((TEMPORAL, slab_rank(grid, grid.frames, block)),)
    orders = [order for order, _ in ranks]
    masks = torch.stack([keep_lowest(rank, density) for _, rank in ranks])
    shapes = {}
    for layer in statistics.layers:
        errors = [dropped(statistics, layer, order, kept) for order, kept in zip(orders, masks, strict=True)]
        best = torch.stack(errors).argmin(0)
        shapes[layer] = tuple(orders[index] for index in best.tolist()), masks[best]
    return shapes


def radial(statistics: Statistics, density: float) -> Shapes:
    """One mask for all heads, with the first frame or without, whichever drops less output error in all."""
    grid, block = statistics.layout.grid, statistics.settings.block
    rank = radial_rank(grid, block)
    masks = [keep_lowest(each, density) for each in (rank, first_frame(rank, grid, block))]

    def error(kept: Tensor) -> float:
        parts = ((layer, dropped(statistics, layer, SPATIAL, kept).sum()) for layer in statistics.layers)
        return sum(float(part / statistics.mean(layer, "output_power")) for layer, part in parts)

    return _everywhere(statistics, min(masks, key=error))


def dropped(statistics: Statistics, layer: str, order: str, kept: Tensor) -> Tensor:
    """Output error that a mask drops in each head, averaged over the calibration, (heads,)."""
    error = statistics.mean(layer, "error")[statistics.settings.orders.index(order)]
    return (error * ~kept).sum((-2, -1))


def _everywhere(statistics: Statistics, kept: Tensor) -> Shapes:
    heads = statistics.heads
    return {layer: ((SPATIAL,) * heads, kept.expand(heads, -1, -1)) for layer in statistics.layers}


STATIC: dict[str, Callable[[Statistics, float], Shapes]] = {
    "local-window": local_window,
    "spatial-temporal": spatial_temporal,
    "radial": radial,
}


def plan_of(statistics: Statistics, shapes: Shapes, precision: str) -> TransformerPlan:
    """A plan of one phase with these masks."""
    block = statistics.settings.block
    layers = {
        layer: LayerPlan(orders, BlockMask.from_dense(kept[None], block), ((precision,) * statistics.heads,))
        for layer, (orders, kept) in shapes.items()
    }
    return TransformerPlan(**of_model(statistics), phases=(Phase(0.0, 1.0),), layers=layers)


# Dynamic rules


@dataclass(frozen=True)
class Input:
    """What a layer sees, every head of every clip as a head of its own.

    Attributes:
        q, k, v: (1, N, heads, D) in the model's order.
        table: Gather tables of the orders, (orders, N).
        order: Row of `table` for each head, (heads,).
        w_o: Output projection of each head, (heads, D, channels).
        clips: How many clips the heads belong to; those of the first come first.
        rows: Blocks that each row of each head may keep in the plan, (heads of the layer, Nq), on the CPU.
        layout, orders, block: Of the plan.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    order: Tensor
    w_o: Tensor
    clips: int
    rows: Tensor
    layout: Layout
    orders: tuple[str, ...]
    block: Block


Choose = Callable[[Input], Tensor]
"""Kept blocks of an input, bool (heads, Nq, Nk); as many for each clip as `rows` sum up to."""


def pooled_topk(seen: Input) -> Tensor:
    """Of each row as many blocks as it may keep, by the product of mean query and mean key."""
    q, k = (
        (
            _averaging(x.shape[1], size).to(x.device, torch.float32)
            @ to_kernel_order(x, seen.table, seen.order)[0].float()
        )
        for x, size in zip((seen.q, seen.k), seen.block, strict=True)
    )
    place = (q @ k.mT).argsort(-1, descending=True).argsort(-1)
    return place < seen.rows.repeat(seen.clips, 1)[..., None].to(place.device)


def oracle(seen: Input) -> Tensor:
    """Of each clip as many blocks as the layer may keep, by the output error of dropping them."""
    stats = block_stats(
        seen.q, seen.k, seen.v, seen.w_o, layout=seen.layout, orders=seen.orders, block=seen.block, order=seen.order,
        paper=False,
    )  # fmt: skip
    score = stats.error[0].scatter(-1, stats.mass[0].argmax(-1, keepdim=True), torch.inf)
    flat = score.view(seen.clips, -1)
    best = flat.topk(int(seen.rows.sum()), -1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, best, True).view(score.shape)


DYNAMIC: dict[str, Choose] = {"dynamic-topk": pooled_topk, "oracle": oracle}


@contextmanager
def choosing(transformer: Any, choose: Choose) -> Iterator[None]:
    """Let a rule choose the blocks of every call, as many as the plan that is applied would keep.

    The plan's masks only count then. Layers and phases where it keeps everything stay dense. The same operation runs,
    with all clips' heads side by side, since each has its own mask.
    """
    known, held = WeakKeyDictionary(), {}

    def run(place: Place, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, **rest: Any) -> Any:
        if mask not in known:
            known[mask] = mask.dense().sum(-1).cpu()
        rows = known[mask]
        if int(rows.sum()) == rows.numel() * mask.key_blocks:
            return place.attention(q, k, v, mask, **rest)
        order = rest.pop("order")
        if place.layer not in held or len(held[place.layer][0]) != len(q) * len(order):
            held[place.layer] = order.repeat(len(q)), place.w_o(q.device).repeat(len(q), 1, 1)
        orders, w_o = held[place.layer]
        wide_q, wide_k, wide_v = (x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v))
        layout, names = place.hook.call.layout, place.hook._orders
        seen = Input(wide_q, wide_k, wide_v, rest["table"], orders, w_o, len(q), rows, layout, names, mask.block)
        kept = choose(seen)
        counts = kept.view(len(q), -1).sum(-1).cpu()
        if bool((counts != rows.sum()).any()):
            raise RuntimeError(f"a rule must keep {int(rows.sum())} blocks of each clip; got {counts.tolist()}")
        own = BlockMask.from_dense(kept, mask.block)
        out: Any = place.attention(wide_q, wide_k, wide_v, own, order=orders, **rest)
        return out[0].unflatten(1, (len(q), -1)).transpose(0, 1)

    with instead(transformer, run):
        yield
