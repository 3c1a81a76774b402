"""Makes a plan from statistics: an order per head, then the blocks worth their time under one density.

Budgets say what competes with what. "per_head": the blocks of one head in one phase, all at the same density.
"global": all blocks of the model under one threshold. "layer_normalised": the same after dividing each layer's scores
by its own output power, so that layers with large activations do not starve the others.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..capture import CaptureSettings, Statistics
from ..grid import ORDERS, check_order
from ..phases import Phase, check_ends, phase_at, phases_of
from ..precision import Precision
from .plan import LayerPlan, TransformerPlan
from .scores import MASK_SCORES, ORDER_SCORES

BUDGETS = ("global", "per_head", "layer_normalised")
PHASE_ENDS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class PlanSettings:
    """What a plan should be.

    Attributes:
        density: Kept video blocks over all, above 0 and at most 1.
        order_score: How orders are compared; "none" keeps the model's own order.
        mask_score: How blocks are compared.
        budget: Which blocks compete.
        orders: Candidate orders; the statistics must hold them.
        phase_ends: Shares of the calibration schedule's steps at which phases end.
        precision: Precision of every head. None: fp32, or the model's own dtype where it is known.
    """

    density: float = 0.25
    order_score: str = "output_error"
    mask_score: str = "output_error"
    budget: str = "layer_normalised"
    orders: tuple[str, ...] = ORDERS
    phase_ends: tuple[float, ...] = PHASE_ENDS
    precision: str | None = None

    def __post_init__(self):
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be above 0 and at most 1; got {self.density}")
        for name, allowed in (("order_score", ORDER_SCORES), ("mask_score", MASK_SCORES), ("budget", BUDGETS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if not self.orders:
            raise ValueError(f"candidate orders must be given; got {self.orders}")
        for order in self.orders:
            check_order(order)
        check_ends(self.phase_ends)
        Precision.parse(self.precision or "fp32")

    def check_measured(self, capture: CaptureSettings) -> None:
        """Check that a calibration measures all that this plan needs.

        Raises:
            ValueError: If an order or the paper's statistics are missing.
        """
        needed = (*self.orders, "FHW") if self.order_score == "none" else self.orders
        missing = [order for order in needed if order not in capture.orders]
        if missing:
            raise ValueError(
                f"the statistics must hold the orders {', '.join(needed)}; got {', '.join(capture.orders)}. "
                "Calibrate with these orders."
            )
        if self.order_score == "paper" and not capture.paper:
            raise ValueError("order_score paper needs what it was calibrated without; calibrate with paper=True")


def make_plan(statistics: Statistics, settings: PlanSettings | None = None) -> TransformerPlan:
    """Choose an order for every head and a block mask for every head and phase.

    Args:
        statistics: From a calibration; at least one noise level.
        settings: What the plan should be.

    Raises:
        ValueError: If the statistics lack a candidate order or hold no layer.
    """
    settings = settings or PlanSettings()
    settings.check_measured(statistics.settings)
    if not statistics.layers:
        raise ValueError("the statistics must hold at least one layer; got none. Calibrate again.")
    phases = phases_of(statistics.noise_levels, settings.phase_ends)
    chosen = {layer: choose_orders(statistics, layer, settings) for layer in statistics.layers}
    scores = {layer: _phase_scores(statistics, layer, chosen[layer], phases, settings.mask_score) for layer in chosen}
    heaviest = {layer: _phase_scores(statistics, layer, chosen[layer], phases, "mass").argmax(-1) for layer in chosen}
    if settings.budget == "layer_normalised":
        scores = {layer: score / _size(statistics, layer, settings.mask_score) for layer, score in scores.items()}
    select = _select_per_head if settings.budget == "per_head" else _select_together
    masks = select(
        scores, heaviest, settings.density, torch.tensor([phase.share for phase in phases], dtype=torch.float64)
    )
    names = statistics.settings.orders
    return TransformerPlan(
        model_class=statistics.model_class,
        heads=statistics.heads,
        head_dim=statistics.head_dim,
        grid=statistics.layout.grid,
        text=statistics.layout.text,
        block=statistics.settings.block,
        phases=phases,
        layers={
            layer: LayerPlan(
                orders=tuple(names[index] for index in chosen[layer].tolist()),
                mask=BlockMask.from_dense(masks[layer], statistics.settings.block),
                precision=((settings.precision or "fp32",) * statistics.heads,) * len(phases),
            )
            for layer in statistics.layers
        },
        made={"settings": asdict(settings), "calibration": statistics.made},
        config=statistics.made.get("config"),
        component=statistics.made.get("component"),
    )


def choose_orders(statistics: Statistics, layer: str, settings: PlanSettings) -> Tensor:
    """Index into the statistics' orders for each head, (heads,)."""
    names = list(statistics.settings.orders)
    score_of = ORDER_SCORES[settings.order_score]
    if score_of is None:
        return torch.full((statistics.heads,), names.index("FHW"))
    candidates = torch.tensor([names.index(order) for order in settings.orders])
    return candidates[score_of(statistics, layer, settings.density)[candidates].argmin(0)]


def _phase_scores(
    statistics: Statistics, layer: str, orders: Tensor, phases: tuple[Phase, ...], mask_score: str
) -> Tensor:
    """Block scores of the chosen orders, (phases, heads, Nq, Nk)."""
    heads = torch.arange(len(orders))
    levels: list[list[float]] = [[] for _ in phases]
    for level in statistics.noise_levels:
        levels[phase_at(phases, level)].append(level)
    return torch.stack([MASK_SCORES[mask_score](statistics, layer, each)[orders, heads] for each in levels])


def _size(statistics: Statistics, layer: str, mask_score: str) -> Tensor:
    """What makes a layer's scores comparable: its output power, or 1 for mass, which sums to 1 in every row."""
    return statistics.mean(layer, "output_power") if mask_score == "output_error" else torch.ones(())


def _select_per_head(
    scores: dict[str, Tensor], heaviest: dict[str, Tensor], density: float, shares: Tensor
) -> dict[str, Tensor]:
    masks = {}
    for layer, score in scores.items():
        ranked = score.scatter(-1, heaviest[layer][..., None], torch.inf).flatten(-2)
        count = max(score.shape[-2], int(density * ranked.shape[-1]))
        kept = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, ranked.topk(count, -1).indices, True)
        masks[layer] = kept.view(score.shape)
    return masks


def _select_together(
    scores: dict[str, Tensor], heaviest: dict[str, Tensor], density: float, shares: Tensor
) -> dict[str, Tensor]:
    """One threshold for all blocks; a block costs its phase's share of the steps."""
    ranked = {layer: score.scatter(-1, heaviest[layer][..., None], torch.inf) for layer, score in scores.items()}
    flat = torch.cat([score.flatten() for score in ranked.values()])
    cost = torch.cat(
        [(shares[:, None] / score[0].numel()).expand(-1, score[0].numel()).flatten() for score in ranked.values()]
    )
    order = flat.argsort(descending=True, stable=True)
    spent = cost[order].double().cumsum(0) / len(scores)
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[order] = (spent <= density + 1e-9) | flat[order].isinf()
    parts = kept.split([score.numel() for score in ranked.values()])
    return {layer: part.view(score.shape) for (layer, score), part in zip(ranked.items(), parts, strict=True)}
