"""What every density would lose and take: the curve on which a plan is one point, and the way back from a target.

Blocks are dropped in the order of their scores, so all plans from the same statistics lie on one curve. It follows from
how many blocks of each layer and phase have which score, which is counted once (`threshold.tally`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..block_mask import blocks_of
from ..grid import Layout
from .cost import Call, Rates, TimeUnknown, formats_of, kept_blocks, rates_of
from .mixing import Mixing
from .threshold import CERTAIN, HALF, Tally
from .workloads import Workload

SHOWN = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.125, 0.1, 0.075, 0.05)
"""Densities of the curve that is written down."""

MEANINGS = {
    "sample": "of the finished sample",
    "attention": "of attention's output, mean over layers",
}


class OutOfReach(ValueError):
    """No density gives what is asked."""


@dataclass(frozen=True)
class Point:
    """One density, and what the models of error and cost say of it.

    Attributes:
        density: Kept video blocks over all, phases counting with their share of the steps.
        error: Predicted relative squared error; `Curve.of_sample` says of what.
        attention_ms: All self-attentions of one forward; None where times are not known.
        attention_speedup: Dense over that.
        speedup: One compiled forward, dense over this; None where times are not known, or the model is not.
        heads_int4: Share of the heads in INT4; None where all heads have another precision.
    """

    density: float
    error: float
    attention_ms: float | None = None
    attention_speedup: float | None = None
    speedup: float | None = None
    heads_int4: float | None = None

    @property
    def snr_db(self) -> float | None:
        """The error as a signal-to-noise ratio, dB; None for no error."""
        return -10 * math.log10(self.error) if self.error > 0 else None

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self) | {"snr_db": self.snr_db}


def error_of(snr_db: float) -> float:
    """The relative squared error of a signal-to-noise ratio in dB."""
    return 10 ** (-snr_db / 10)


@dataclass(frozen=True)
class Prices:
    """What turns kept blocks into milliseconds of one forward.

    Attributes:
        rates: Of the GPU.
        layout: Of the sequence.
        call: Size of one self-attention.
        block: Tokens of a query block and of a key block.
        precision: Of every head, but for those in INT4, of which `attention_ms` is told.
        around_ms: One forward but its self-attentions; None if the model is not known.
    """

    rates: Rates
    layout: Layout
    call: Call
    block: tuple[int, int]
    precision: str
    around_ms: float | None

    def __post_init__(self):
        self.rates.kernel(self.call.head_dim, self.block, self.precision)

    @classmethod
    def of(
        cls, gpu: str, layout: Layout, call: Call, block: tuple[int, int], precision: str, model: Workload | None
    ) -> "Prices":
        """Prices on a GPU, of a forward of all layers of a model.

        Raises:
            TimeUnknown: If times of such attention are not known on that GPU.
        """
        rates = rates_of(gpu)
        around = None if model is None else model.layers * rates.around_ms(model, layout.tokens)
        return cls(rates, layout, call, block, precision, around)

    def dense_ms(self) -> float:
        """One dense self-attention."""
        return self.rates.dense_ms(self.call)

    def sparse_ms(self, kept: Tensor) -> Tensor:
        """One self-attention for each number of kept video blocks of all heads, any shape, float64."""
        rows, columns = (blocks_of(self.layout.grid.tokens, size) for size in self.block)
        ends = torch.tensor([
            self.rates.sparse_ms(self.call, kept_blocks(self.layout, self.block, [density] * self.call.heads),
                                 self.block, self.precision)
            for density in (0.0, 1.0)
        ])  # fmt: skip
        density = kept.double() / (self.call.heads * rows * columns)
        return ends[0] + density * (ends[1] - ends[0])

    def attention_ms(self, kept: Tensor, shares: Tensor) -> Tensor:
        """All self-attentions of one forward: of (layers, phases, …) kept blocks, mean over phases by their share.

        A block in INT4 counts as the part of one that it takes.

        A layer that dense attention would serve faster runs dense.
        """
        of_layer = torch.einsum("lp...,p->l...", self.sparse_ms(kept), shares)
        return of_layer.clamp_max(self.dense_ms()).sum(0)


class Curve:
    """All densities that one set of scores allows, with what they lose and take.

    Args:
        tally: Blocks by score.
        shares: Share of the steps of each phase.
        of_sample: Errors are those of the finished sample. Otherwise of attention's output, mean over layers.
        mixing: What rounding adds to the errors, and which heads are in INT4; None if that is not counted.
        prices: What blocks cost; None if that is not known.
        why: What is not known of times, for messages.
    """

    def __init__(
        self, tally: Tally, shares: Sequence[float], *, of_sample: bool, prices: Prices | None = None, why: str = "",
        mixing: Mixing | None = None,
    ):  # fmt: skip
        self.of_sample, self.prices, self.why, self.mixing = of_sample, prices, why, mixing
        counts, weights = tally.counts, torch.tensor(shares, dtype=torch.float64)
        used = torch.cat([counts.sum((0, 1)).nonzero()[:, 0], torch.tensor([CERTAIN >> HALF])]).unique()
        counts = counts[..., used]  # (layers, phases, scores)
        kept = counts.flip(-1).cumsum(-1).flip(-1)  # of all blocks, those with at least this score
        costs = torch.tensor(tally.costs, dtype=torch.float64)
        spent = torch.einsum("lps,p->s", kept.double(), costs)
        loss = torch.einsum("lps,p->s", counts.double(), weights) * _scores(used)
        lost = loss.cumsum(0) - loss
        if mixing is not None:
            self._first = mixing.first(kept, _scores(used), weights)
            in_four = self._first[..., None] <= torch.arange(len(used))  # (layers, heads, scores)
            lost = lost + mixing.eight.sum() + (in_four * mixing.added[..., None]).sum((0, 1))
            kept = kept * (1 - mixing.saved * in_four.double().mean(1, keepdim=True))
        lost /= 1 if of_sample else len(counts)
        self._density, self._error = (part.flip(0) for part in (spent / spent[0], lost))  # densities rise
        self._ms = None if prices is None else prices.attention_ms(kept, weights).flip(0)
        self._dense_ms = None if prices is None else len(counts) * prices.dense_ms()

    @property
    def lowest(self) -> float:
        """The least density: every row of blocks keeps one."""
        return float(self._density[0])

    def at(self, density: float) -> Point:
        """The point at a density, or at the nearest one there is."""
        density = min(max(density, self.lowest), 1.0)
        error = self._between(self._error, density)
        in_four = None if self.mixing is None else float(self.in_four_bits(density).double().mean())
        if self._ms is None or self._dense_ms is None or self.prices is None:
            return Point(density, error, heads_int4=in_four)
        ms, around = self._between(self._ms, density), self.prices.around_ms
        whole = None if around is None else (self._dense_ms + around) / (ms + around)
        return Point(density, error, ms, self._dense_ms / ms, whole, in_four)

    def in_four_bits(self, density: float) -> Tensor:
        """Which heads are in INT4 at a density, bool (layers, heads)."""
        assert self.mixing is not None
        right = min(int(torch.searchsorted(self._density, density)), len(self._density) - 1)
        return self._first <= len(self._density) - 1 - right

    def points(self, also: Sequence[float] = ()) -> list[Point]:
        """Points for a table, densest first."""
        shown = {each for each in (*SHOWN, *also) if each >= self.lowest} | {self.lowest}
        return [self.at(density) for density in sorted(shown, reverse=True)]

    def density_at_error(self, error: float) -> float:
        """The least density whose predicted error is no larger.

        Raises:
            OutOfReach: If that of every density is smaller, or larger.
        """
        largest, smallest = float(self._error[0]), float(self._error[-1])
        if error < smallest:
            raise OutOfReach(
                f"a target error must be at least {smallest:.3g} ({_decibels(smallest)}), which rounding alone is "
                f"predicted to cost; got {error:.3g} ({_decibels(error)}). Ask for a larger error or more bits."
            )
        if error > largest:
            raise OutOfReach(
                f"a target error must be at most {largest:.3g} ({_decibels(largest)}), which is predicted at the least "
                f"density there is, {self.lowest:.3g}; got {error:.3g} ({_decibels(error)}). Ask for a smaller error."
            )
        return self._where(-self._error, -error)

    def density_at_speedup(self, speedup: float) -> float:
        """The largest density with which one forward is predicted to be so many times faster.

        Raises:
            OutOfReach: If none is fast enough, or even all blocks are faster.
            TimeUnknown: If times are not known.
        """
        if self._ms is None or self._dense_ms is None or self.prices is None or self.prices.around_ms is None:
            raise TimeUnknown(
                f"a target speed-up needs times: {self.why.rstrip('.')}", "Ask for a density or an error instead."
            )
        slowest, fastest = (self.at(density).speedup or 0.0 for density in (1.0, self.lowest))
        if not slowest <= speedup <= fastest:
            raise OutOfReach(
                f"a target speed-up of one forward on {self.prices.rates.gpu} must be {slowest:.2f}…{fastest:.2f}, "
                f"from all blocks in {self.prices.precision} to the least density there is, {self.lowest:.3g}; got "
                f"{speedup:g}. Ask for one in that range, or take a larger clip: longer sequences gain more."
            )
        around = self.prices.around_ms
        return self._where(self._ms, (self._dense_ms + around) / speedup - around, last=True)

    def _between(self, values: Tensor, density: float) -> float:
        """Piecewise linear over densities: blocks of one score cost alike."""
        right = min(int(torch.searchsorted(self._density, density)), len(values) - 1)
        if right == 0:
            return float(values[0])
        low, high = self._density[right - 1], self._density[right]
        return float(torch.lerp(values[right - 1], values[right], ((density - low) / (high - low)).clamp(0, 1)))

    def _where(self, rising: Tensor, aim: float, last: bool = False) -> float:
        """The density at which values that rise along the densities reach `aim`: the first one, or the last."""
        right = int(torch.searchsorted(rising, aim, right=last))
        if right in (0, len(rising)):
            return self.lowest if right == 0 else 1.0
        low, high = rising[right - 1], rising[right]
        part = (aim - low) / (high - low)
        return float(torch.lerp(self._density[right - 1], self._density[right], part))


def described(curve: Curve, chosen: float) -> dict[str, Any]:
    """A curve as plain values, with the point that a plan took."""
    prices = curve.prices
    return {
        "error_of": "sample" if curve.of_sample else "attention",
        "gpu": prices and prices.rates.gpu,
        "precision": formats_of(prices.precision) if prices else None,
        "times_unknown": None if prices and prices.around_ms is not None else curve.why,
        "chosen": curve.at(chosen).to_dict(),
        "points": [point.to_dict() for point in curve.points()],
    }


def curve_of(made: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The curve that a plan was made with, if it has one."""
    found = made.get("curve")
    return found if isinstance(found, Mapping) and found.get("points") and found.get("chosen") else None


def _scores(upper: Tensor) -> Tensor:
    """Scores by their upper bits, as the middle of what the lower bits can be, float64; infinity counts as 0."""
    middle = ((upper << HALF) + (1 << (HALF - 1))).to(torch.int32).view(torch.float32).double()
    return middle.where(upper < CERTAIN >> HALF, 0.0).where(upper > 0, 0.0)


def _decibels(error: float) -> str:
    return f"{-10 * math.log10(error):.1f} dB" if error > 0 else "no error"
