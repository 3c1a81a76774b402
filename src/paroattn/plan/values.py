"""What every block of a plan is worth: predicted by a calibration at first, then corrected by what was seen.

A calibration predicts the error of dropping one block alone. What a block is worth to a plan is another thing: errors
of dropped blocks add up or cancel, within a row, over heads and from layer to layer. That can be seen where a model
runs by the plan, as the presence of each block: the first-order effect g on the squared error of what the model makes.

    worth of a block = what the error would be without it − what it would be with it
                     ≈ −g + E  if the plan keeps it,  −g − E  if not           E: the error of its own, predicted

Half of the predicted E is taken, since predictions hold what errors have in common too. The prediction is scaled so
that −g of all dropped blocks of a phase sums to twice theirs, which it does where errors are independent.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..block_mask import BlockMask
from .plan import TransformerPlan
from .threshold import select

OWN = 0.5
Place = tuple[str, int]
"""A layer and a phase."""


class BlockValues:
    """Values of all blocks of a plan, and the plan that they make.

    Attributes:
        plan: The plan as it is now: density of every phase, orders and precision stay those of the first.
        rounds: How often something was learned.
    """

    def __init__(self, plan: TransformerPlan, predicted: Callable[[str, int], Tensor]):
        """Start from a plan and its predictions.

        Args:
            plan: Orders and masks to start from.
            predicted: Makes the predicted errors of a layer and phase, (H, Nq, Nk) float32 in a new tensor; infinite
                for blocks that are kept in any case. They are comparable within a phase.
        """
        self.plan, self.rounds = plan, 0
        self._predicted = predicted
        self._densities = plan.phase_density().tolist()
        self._scales: dict[int, float] = {}
        self._values: dict[Place, Tensor] = {}

    def learn(self, presences: Mapping[Place, Tensor], step: float) -> None:
        """Move values towards what was seen, and choose masks anew.

        Args:
            presences: By layer and phase, summed effects on the relative squared error of that phase,
                (H, Nq, Nk). Phases that did not run stay as they are.
            step: How far, 0…1.
        """
        kept = {phase: self._choose(phase, presences, step) for phase in sorted({phase for _, phase in presences})}
        layers = {}
        for name, layer in self.plan.layers.items():
            bits = layer.mask.bits.clone()
            for phase, masks in kept.items():
                bits[phase] = BlockMask.from_dense(masks[name], self.plan.block).bits
            layers[name] = replace(layer, mask=replace(layer.mask, bits=bits))
        self.plan = replace(self.plan, layers=layers)
        self.rounds += 1

    def _choose(self, phase: int, presences: Mapping[Place, Tensor], step: float) -> dict[str, Tensor]:
        """Kept blocks of a phase by layer, after moving its values."""
        names = list(self.plan.layers)
        if phase not in self._scales:
            self._scales[phase] = self._scale(phase, presences)
        scale, total = self._scales[phase], 0.0
        for name in names:
            predicted = scale * self._finite(name, phase)
            own = torch.where(self._kept(name, phase), OWN, -OWN) * predicted
            values = self._values.setdefault((name, phase), predicted)
            values += step * (own - presences[name, phase].cpu() - values)
            total += float(predicted.double().mean()) / len(names)

        def scores(name: str, _: int) -> Tensor:
            certain = self._predicted(name, phase).cpu().isinf()
            return _positive(self._values[name, phase], total).masked_fill_(certain, torch.inf)

        chosen = select(names, [1], scores, self._densities[phase])
        return {name: masks[0] for name, masks in chosen}

    def _scale(self, phase: int, presences: Mapping[Place, Tensor]) -> float:
        """What predictions must be multiplied by to be in the units of the error that was seen."""
        seen = predicted = 0.0
        for name in self.plan.layers:
            dropped = ~self._kept(name, phase)
            seen -= float(presences[name, phase].cpu()[dropped].double().sum())
            predicted += 2 * float(self._finite(name, phase)[dropped].double().sum())
        return abs(seen) / predicted if predicted > 0 else 0.0

    def _finite(self, name: str, phase: int) -> Tensor:
        predicted = self._predicted(name, phase).cpu()
        return predicted.masked_fill_(predicted.isinf(), 0.0)

    def _kept(self, name: str, phase: int) -> Tensor:
        return self.plan.layers[name].mask[phase].dense()


def _positive(values: Tensor, unit: float) -> Tensor:
    """Above 0 and in the same order, as a choice by threshold needs it."""
    x = values / max(unit, torch.finfo(torch.float32).tiny)
    return torch.where(x > 0, 1 + x, 1 / (1 - x))
