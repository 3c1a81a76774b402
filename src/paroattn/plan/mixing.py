"""Which heads run in INT4: those where it costs less than dropping as many blocks more as would save the same time.

A block in INT4 takes 1 − saved of the time that it takes in INT8, so a head with n kept blocks gains what dropping
n · saved of them would. At a density, the next blocks to be dropped cost the threshold each. The head is in INT4 if

    error of INT4 − error of INT8  <  threshold · saved · n

which is the same bargain that decides about blocks. The further a plan goes down its curve, the more heads are in INT4.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

AUTO = "auto"
"""A precision in plan settings: INT4 or INT8, head by head."""


@dataclass(frozen=True, eq=False)
class Mixing:
    """What is known of every head in INT8 and INT4.

    Attributes:
        eight, four: Predicted error of rounding, (layers, heads) float64, in the units of the blocks' scores.
        saved: Share of a block's time that INT4 saves.
        share: Of the heads, those that are to be in INT4, the ones that lose least by it; None: those where it pays.
        doubted: Errors of rounding are weighed as those of blocks are, for want of a measured weight: too much.
    """

    eight: Tensor
    four: Tensor
    saved: float
    share: float | None = None
    doubted: bool = False

    @property
    def added(self) -> Tensor:
        """What INT4 errs more than INT8, (layers, heads)."""
        return (self.four - self.eight).clamp_min(0)

    def first(self, kept: Tensor, thresholds: Tensor, shares: Tensor) -> Tensor:
        """From which threshold on each head is in INT4.

        Args:
            kept: Blocks that each threshold keeps, (layers, phases, thresholds).
            thresholds: Rising scores, float64.
            shares: Of the steps that each phase has.

        Returns:
            Indices (layers, heads); the number of thresholds for a head that never is.
        """
        if self.share is not None:
            return self._least(len(thresholds))
        blocks = torch.einsum("lps,p->ls", kept.double(), shares) / self.added.shape[1]
        pays = self.added[..., None] < (thresholds * self.saved * blocks)[:, None]
        return torch.where(pays.any(-1), pays.to(torch.uint8).argmax(-1), len(thresholds))

    def explained(self, gpu: str, found: float) -> str:
        """What became of the heads, and why, in a sentence."""
        if self.share is not None:
            return f"{found:.0%} of the heads are in INT4, those that are predicted to lose least by it"
        if not self.saved:
            return f"INT4 saves no time on {gpu}: every head is in INT8"
        more = "; calibrated with the precision auto, it may be more" if self.doubted else ""
        time = f"of which a block takes {1 - self.saved:.2f} of its time on {gpu}"
        return f"{found:.0%} of the heads are in INT4, {time}{more}"

    def _least(self, never: int) -> Tensor:
        assert self.share is not None
        flat = torch.full((self.added.numel(),), never)
        flat[self.added.flatten().argsort(stable=True)[: round(self.share * len(flat))]] = 0
        return flat.view(self.added.shape)
