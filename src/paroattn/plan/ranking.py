"""What blocks are worth in the orders that were chosen, and what rounding costs their heads, in one unit.

Scores of a large model fill tens of gigabytes, so they are made anew whenever they are asked for.
"""

from typing import Any

import torch
from torch import Tensor

from ..capture import Statistics
from ..capture.measured import ROUNDED
from ..phases import Phase, phase_at
from .scores import MASK_SCORES


class Ranking:
    """Scores by layer and phase.

    Args:
        statistics: From a calibration.
        chosen: Index into their orders for each head, by layer.
        phases: Spans of the schedule.
        settings: `PlanSettings`: how blocks are compared.
        device: Where scores are made.
    """

    def __init__(
        self, statistics: Statistics, chosen: dict[str, Tensor], phases: tuple[Phase, ...], settings: Any, device: str
    ):
        self.statistics, self.settings, self.device = statistics, settings, device
        self.chosen = {} if statistics.chosen else chosen  # the statistics have a single order then
        self.levels: list[list[float]] = [[] for _ in phases]
        for level in statistics.noise_levels:
            self.levels[phase_at(phases, level)].append(level)
        self._heaviest: dict[tuple[str, int], Tensor] = {}

    def ranked(self, layer: str, phase: int) -> Tensor:
        """What keeping each block is worth, (heads, Nq, Nk); infinite for the heaviest of each row."""
        levels, key = self.levels[phase], (layer, phase)
        score = self._of(MASK_SCORES[self.settings.mask_score](self.statistics, layer, levels, self.device), layer)
        if self.settings.budget == "layer_normalised":
            size = _size(self.statistics, layer, self.settings.mask_score)
            score *= self._weight(layer, levels) / float(size)
        if key not in self._heaviest:
            self._heaviest[key] = self._of(self.statistics.heaviest(layer, levels, self.device), layer)[..., None].cpu()
        return score.scatter_(-1, self._heaviest[key].to(self.device), torch.inf)

    def rounding(self, layer: str) -> Tensor | None:
        """What each precision of `ROUNDED` costs the layer's heads in units of the scores, mean over the schedule.

        (precisions, heads) float64; None if that was not measured.
        """
        size = _size(self.statistics, layer, self.settings.mask_score)
        total, steps = torch.zeros(len(ROUNDED), self.statistics.heads, dtype=torch.float64), sum(map(len, self.levels))
        for levels in self.levels:
            found = self.statistics.rounding(layer, levels)
            if found is None:
                return None
            total += found.double().cpu() * (self._weight(layer, levels) / float(size) * len(levels) / steps)
        known = self.statistics.rounding_weight if self.settings.sensitivity else None
        return total * (1.0 if known is None else known)

    def _weight(self, layer: str, levels: list[float]) -> float:
        """What an error of this layer at these noise levels matters, 1 where that was not measured."""
        known = self.statistics.level_weights if self.settings.sensitivity else {}
        if not known:
            return 1.0
        of_levels = sum(known[level] for level in levels) / len(levels)
        return of_levels * self.statistics.layer_weights.get(layer, 1.0)

    def each_head(self, layer: str) -> Tensor:
        """Kept blocks at the same density in every head and phase, (phases, heads, Nq, Nk)."""
        kept = []
        for phase in range(len(self.levels)):
            ranked = self.ranked(layer, phase)
            flat = ranked.flatten(-2)
            count = max(ranked.shape[-2], int(self.settings.density * flat.shape[-1]))
            best = flat.topk(count, -1).indices
            kept.append(torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, best, True).view(ranked.shape))
        return torch.stack(kept)

    def _of(self, found: Tensor, layer: str) -> Tensor:
        """Of every head what belongs to its order, (heads, …)."""
        if layer not in self.chosen:
            return found[0]
        order = self.chosen[layer].to(found.device)
        return found[order, torch.arange(len(order), device=found.device)]


def _size(statistics: Statistics, layer: str, mask_score: str) -> Tensor:
    """What makes a layer's scores comparable: its output power, or 1 for mass, which sums to 1 in every row."""
    return statistics.mean(layer, "output_power") if mask_score == "output_error" else torch.ones(())
