"""Makes a plan from statistics: an order per head, then the blocks worth their time under one knob.

Budgets say what competes with what. "per_head": the blocks of one head in one phase, all at the same density.
"global": all blocks of the model under one threshold. "layer_normalised": the same after dividing each layer's scores
by its own output power, so that layers with large activations do not starve the others.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..capture import CaptureSettings, Statistics
from ..capture.regrid import RegriddedStatistics
from ..grid import check_order
from ..phases import check_ends, phases_of
from ..precision import Precision
from .cost import Call, TimeUnknown, formats_of, saved_by_four_bits
from .curve import Curve, Prices, described
from .mixing import AUTO, Mixing
from .plan import CARRIED, LayerPlan, TransformerPlan
from .ranking import Ranking
from .scores import MASK_SCORES, ORDER_SCORES
from .threshold import select, tally
from .workloads import known_model

TARGETS = ("density", "error", "speedup")
BUDGETS = ("global", "per_head", "layer_normalised")
PHASE_ENDS = (0.25, 0.5, 0.75, 1.0)
DENSITY = 0.25
"""Where no target is given; also where orders are first compared when the density is what is looked for."""
GPU = "NVIDIA H200"


@dataclass(frozen=True)
class PlanSettings:
    """What a plan should be: one target, and how it is reached.

    Attributes:
        density: Kept video blocks over all, above 0 and at most 1; 0.25 if no target is given.
        order_score: How orders are compared; "none" keeps the model's own order.
        mask_score: How blocks are compared.
        budget: Which blocks compete.
        orders: Candidate orders; the statistics must hold them. None: all that they hold, which for a calibration are
            the six axis orders and the tiles.
        phase_ends: Shares of the calibration schedule's steps at which phases end.
        precision: Precision of every head, or "auto" for INT4 where it pays on the GPU and INT8 elsewhere. None: fp32,
            or the model's own dtype where it is known.
        int4_share: With "auto", how many of the heads are in INT4, 0…1, wherever it pays: those that are predicted to
            lose least by it.
        sensitivity: Weigh predicted errors by what the calibration found phases and layers to matter for the finished
            sample, if it measured that; with the budget "layer_normalised".
        error: Instead of a density, the predicted relative squared error: of the finished sample if the calibration
            measured sensitivity, else of attention's output. `curve.error_of` turns dB into it.
        speedup: Instead of a density, how many times faster one compiled forward of the transformer is predicted to be
            than with dense attention.
        gpu: Where times are predicted: a name as PyTorch has it, or an architecture such as "sm_89", of which nothing
            but its matrix units is known.
    """

    density: float | None = None
    order_score: str = "output_error"
    mask_score: str = "output_error"
    budget: str = "layer_normalised"
    orders: tuple[str, ...] | None = None
    phase_ends: tuple[float, ...] = PHASE_ENDS
    precision: str | None = None
    sensitivity: bool = True
    error: float | None = None
    speedup: float | None = None
    gpu: str = GPU
    int4_share: float | None = None

    def __post_init__(self):
        self._check_target()
        for name, allowed in (("order_score", ORDER_SCORES), ("mask_score", MASK_SCORES), ("budget", BUDGETS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if self.orders is not None and not self.orders:
            raise ValueError(f"candidate orders must be given; got {self.orders}")
        for order in self.orders or ():
            check_order(order)
        check_ends(self.phase_ends)
        Precision.parse(self.each_precision)
        self._check_mixing()

    @property
    def each_precision(self) -> str:
        """Precision of every head, but for those that are in INT4 by choice."""
        return "int8" if self.precision == AUTO else self.precision or "fp32"

    @property
    def may_be_int4(self) -> bool:
        """Whether heads are in INT4, or may be."""
        return self.precision == AUTO or formats_of(self.each_precision) == formats_of("int4")

    def _check_mixing(self) -> None:
        if self.int4_share is not None and (self.precision != AUTO or not 0 <= self.int4_share <= 1):
            raise ValueError(
                f"int4_share must be 0…1 and come with the precision {AUTO}; got {self.int4_share} with "
                f"{self.precision}"
            )
        if self.precision == AUTO and not self._in_units_of_error:
            raise ValueError(
                f"the precision {AUTO} needs blocks scored by output_error under the budget layer_normalised; got "
                f"{self.mask_score} and {self.budget}. Give int8 or int4."
            )

    @property
    def _in_units_of_error(self) -> bool:
        """Whether scores of blocks are errors that can be compared and summed."""
        return (self.mask_score, self.budget) == ("output_error", "layer_normalised")

    def _check_target(self) -> None:
        given = {name: getattr(self, name) for name in TARGETS if getattr(self, name) is not None}
        if len(given) > 1:
            raise ValueError(f"one of {', '.join(TARGETS)} must be given; got {' and '.join(given)}. Leave one out.")
        if not given:
            object.__setattr__(self, "density", DENSITY)
        elif self.density is not None and not (isinstance(self.density, Real) and 0 < self.density <= 1):
            raise ValueError(f"density must be above 0 and at most 1; got {self.density!r}")
        for name in ("error", "speedup"):
            if name in given and not (isinstance(given[name], Real) and 0 < given[name] < float("inf")):
                raise ValueError(f"a target {name} must be above 0; got {given[name]!r}")
        if self.density is None and self.budget == "per_head":
            raise ValueError("a target error or speed-up needs one threshold; got the budget per_head. Give a density.")
        if self.error is not None and not self._in_units_of_error:
            raise ValueError(
                "a target error needs blocks scored by output_error under the budget layer_normalised; got "
                f"{self.mask_score} and {self.budget}. Give a density."
            )

    def at(self, density: float, **changes: Any) -> "PlanSettings":
        """The same with a density as target."""
        return replace(self, density=density, error=None, speedup=None, **changes)

    def check_measured(self, capture: CaptureSettings) -> None:
        """Check that a calibration measures all that this plan needs.

        Raises:
            ValueError: If an order or the paper's statistics are missing.
        """
        needed = (*(self.orders or ()), *(("FHW",) if self.order_score == "none" else ()))
        missing = [order for order in needed if order not in capture.orders]
        if missing:
            raise ValueError(
                f"the statistics must hold the orders {', '.join(needed)}; got {', '.join(capture.orders)}. "
                "Calibrate with these orders."
            )
        if self.order_score == "paper" and not capture.paper:
            raise ValueError("order_score paper needs what it was calibrated without; calibrate with paper=True")
        if "mass" in (self.mask_score, self.order_score) and capture.codes and not capture.whole_mass:
            raise ValueError("scores by mass need the masses of all blocks; calibrate with whole_mass=True")


def make_plan(
    statistics: Statistics, settings: PlanSettings | None = None, *, device: str | None = None
) -> TransformerPlan:
    """Choose orders and masks.

    Layers are read one after the other, so statistics in a folder may be larger than memory.

    Args:
        statistics: From a calibration; at least one noise level.
        settings: What the plan should be.
        device: Where scores are compared; by default the CPU, or for statistics in 8 bits a GPU if there is one.

    Raises:
        ValueError: If the statistics lack a candidate order or a map, or hold no layer; or if a target error or
            speed-up is out of reach, or times are not known that it needs.
    """
    settings = settings or PlanSettings()
    draft = Draft(statistics, settings, device)
    names = statistics.settings.orders
    made = {"settings": asdict(settings), "calibration": statistics.made}
    if draft.curve is not None:
        made["curve"] = described(draft.curve, draft.density)
    if draft.curve is not None and settings.precision == AUTO and draft.curve.mixing is not None:
        share = float(draft.in_four_bits().double().mean())
        made["precision"] = {"int4_share": share, "why": draft.curve.mixing.explained(settings.gpu, share)}
    each = dict(zip(draft.chosen, draft.precisions(), strict=True))
    return TransformerPlan(
        **of_model(statistics),
        phases=draft.phases,
        layers={
            layer: LayerPlan(
                orders=tuple(names[index] for index in draft.chosen[layer].tolist()),
                mask=BlockMask.from_dense(kept, statistics.settings.block).to("cpu"),
                precision=(each[layer],) * len(draft.phases),
            )
            for layer, kept in draft.masks()
        },
        made=made | _carried(statistics),
    )


def of_model(statistics: Statistics) -> dict[str, Any]:
    """What a plan says of the model, the grid and the blocks that were measured."""
    return {
        "model_class": statistics.model_class,
        "heads": statistics.heads,
        "head_dim": statistics.head_dim,
        "grid": statistics.layout.grid,
        "text": statistics.layout.text,
        "block": statistics.settings.block,
        "config": statistics.made.get("config"),
        "component": statistics.made.get("component"),
    }


class Draft:
    """A plan before its masks: orders, scores, the curve that they allow, and the density that meets the target.

    Args:
        statistics, settings, device: As in `make_plan`.

    Attributes:
        phases: Spans of the schedule.
        chosen: Index into the statistics' orders for each head, by layer.
        curve: What every density loses and takes; None for the budget "per_head", under which there is none.
        density: What the target comes to.

    Raises:
        ValueError: As `make_plan`, or if the target is out of reach.
    """

    def __init__(self, statistics: Statistics, settings: PlanSettings, device: str | None = None):
        settings.check_measured(statistics.settings)
        if not statistics.layers:
            raise ValueError("the statistics must hold at least one layer; got none. Calibrate again.")
        if device is None:
            device = "cuda" if statistics.settings.codes and torch.cuda.is_available() else "cpu"
        self.statistics, self.settings, self.device = statistics, settings, device
        self.phases = phases_of(statistics.noise_levels, settings.phase_ends)
        self._costs = [round(phase.share * len(statistics.noise_levels)) for phase in self.phases]
        self._follow(settings.density or DENSITY)
        if settings.density is None:
            density = self._target()
            if not statistics.chosen:
                self._follow(density)
                density = self._target()
            self.density = density

    def masks(self) -> Iterator[tuple[str, Tensor]]:
        """Every layer and its kept blocks, bool (phases, heads, Nq, Nk)."""
        if self.settings.budget == "per_head":
            return ((layer, self._ranking.each_head(layer)) for layer in self.chosen)
        return select(list(self.chosen), self._costs, self._ranking.ranked, self.density, self._tally)

    def in_four_bits(self) -> Tensor:
        """Which heads are in INT4 by choice, bool (layers, heads)."""
        if self.curve is None or self.curve.mixing is None or self.settings.precision != AUTO:
            return torch.zeros(len(self.chosen), self.statistics.heads, dtype=torch.bool)
        return self.curve.in_four_bits(self.density)

    def precisions(self) -> list[tuple[str, ...]]:
        """Precision of each head, by layer."""
        names = (self.settings.each_precision, "int4")
        return [tuple(names[four] for four in heads) for heads in self.in_four_bits().tolist()]

    def _follow(self, density: float) -> None:
        """Choose orders for a density, and count blocks by their scores then."""
        at, statistics = self.settings.at(density), self.statistics
        self.density = density
        self.chosen = {layer: choose_orders(statistics, layer, at) for layer in statistics.layers}
        self._ranking = Ranking(statistics, self.chosen, self.phases, at, self.device)
        self._tally = self.curve = None
        if at.budget != "per_head":
            self._tally = tally(list(self.chosen), self._costs, self._ranking.ranked)
            prices, why = _prices(statistics, self.settings)
            weighed = bool(statistics.level_weights) and at.sensitivity and at.budget == "layer_normalised"
            shares = [phase.share for phase in self.phases]
            mixing = self._mixing()
            self.curve = Curve(self._tally, shares, of_sample=weighed, prices=prices, why=why, mixing=mixing)

    def _mixing(self) -> Mixing | None:
        """What INT4 costs each head, where some or all heads are to be in it.

        Raises:
            ValueError: If that was not measured and the plan cannot be made without.
        """
        settings, statistics = self.settings, self.statistics
        if not settings.may_be_int4 or not settings._in_units_of_error:
            return None
        found = [self._ranking.rounding(layer) for layer in self.chosen]
        known = [each for each in found if each is not None]
        if len(known) < len(found):
            if settings.precision != AUTO and settings.error is None:
                return None
            raise ValueError(
                "the statistics must hold what INT4 costs each head, to choose between INT4 and INT8 or to predict an "
                "error in INT4; these were measured without. Calibrate again, or give a density and another precision."
            )
        eight, four = torch.stack(known, 1)
        if settings.precision != AUTO:
            return Mixing(eight, four, 0.0, share=1.0)
        saved = saved_by_four_bits(settings.gpu, statistics.head_dim, statistics.settings.block)
        doubted = bool(statistics.level_weights) and settings.sensitivity and statistics.rounding_weight is None
        return Mixing(eight, four, saved, settings.int4_share, doubted)

    def _target(self) -> float:
        """The density that meets a target error or speed-up."""
        assert self.curve is not None
        if self.settings.error is not None:
            return self.curve.density_at_error(self.settings.error)
        assert self.settings.speedup is not None
        return self.curve.density_at_speedup(self.settings.speedup)


def _prices(statistics: Statistics, settings: PlanSettings) -> tuple[Prices | None, str]:
    """What blocks cost, or why that is not known."""
    sizes = statistics.heads, statistics.head_dim
    call, layout = Call(statistics.layout.tokens, *sizes), statistics.layout
    model, why = None, ""
    try:
        model = known_model(statistics.model_class, *sizes, len(statistics.layers), statistics.made.get("config"))
    except ValueError as unknown:
        why = str(unknown)
    try:
        block, precision = statistics.settings.block, settings.each_precision
        return Prices.of(settings.gpu, layout, call, block, precision, model), why
    except TimeUnknown as unknown:
        return None, unknown.why


def _carried(statistics: Statistics) -> dict[str, list[str]]:
    """The grid that was measured, if it is another than the plan's."""
    if not isinstance(statistics, RegriddedStatistics):
        return {}
    return {CARRIED: [str(statistics.measured.layout.grid)]}


def predicted_error(statistics: Statistics, plan: TransformerPlan, settings: PlanSettings) -> Tensor:
    """Predicted error of what a plan drops, (layers, phases) float64: comparable between layers, times share of steps.

    Weighed as `settings` say; the sum is then the relative squared error that is expected of the finished sample, as
    long as errors are small and add up.
    """
    scores = block_scores(statistics, plan, settings)
    found = torch.zeros(len(plan.layers), len(plan.phases), dtype=torch.float64)
    for row, (name, layer) in enumerate(plan.layers.items()):
        for column, phase in enumerate(plan.phases):
            dropped = ~layer.mask[column].dense()
            found[row, column] = phase.share * scores(name, column)[dropped].double().sum()
    return found


def block_scores(statistics: Statistics, plan: TransformerPlan, settings: PlanSettings) -> Callable[[str, int], Tensor]:
    """What makes the scores of a layer and phase in a plan's orders, (H, Nq, Nk); infinite for each row's heaviest.

    Raises:
        ValueError: If the statistics do not hold the plan's orders.
    """
    names = list(statistics.settings.orders)
    if missing := {order for layer in plan.layers.values() for order in layer.orders} - set(names):
        raise ValueError(
            f"the statistics must hold the plan's orders; got {', '.join(names)} without {', '.join(sorted(missing))}. "
            "Give those that the plan was made from."
        )
    chosen = {name: torch.tensor([names.index(order) for order in layer.orders]) for name, layer in plan.layers.items()}
    return Ranking(statistics, chosen, plan.phases, settings, "cpu").ranked


def choose_orders(statistics: Statistics, layer: str, settings: PlanSettings) -> Tensor:
    """Index into the statistics' orders for each head, (heads,).

    Raises:
        ValueError: If the calibration chose already, and what it chose is no candidate.
    """
    names = list(statistics.settings.orders)
    allowed = ("FHW",) if settings.order_score == "none" else settings.orders or statistics.settings.orders
    if statistics.chosen:
        chosen = statistics.chosen[layer]
        if excluded := sorted(set(chosen) - set(allowed)):
            raise ValueError(
                f"each head was measured in the order chosen at calibration alone, and {layer} has {excluded[0]} among "
                f"them; got {', '.join(allowed)} to choose from. Calibrate with these orders."
            )
        return torch.tensor([names.index(order) for order in chosen])
    score_of = ORDER_SCORES[settings.order_score]
    if score_of is None:
        return torch.full((statistics.heads,), names.index("FHW"))
    candidates = torch.tensor([names.index(order) for order in allowed])
    density = settings.density or DENSITY
    return candidates[score_of(statistics, layer, density)[candidates].argmin(0)]
