"""Spans of the noise schedule that share one block mask.

A noise level is σ for flow matching and √(1−ᾱ) for variance-preserving schedulers: 1 is pure noise, 0 is clean.
Phases end midway between the two levels that a given share of the calibration schedule's *steps* separates, so one
plan serves any number of steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

TOLERANCE = 1e-6


@dataclass(frozen=True)
class Phase:
    """A span of the schedule.

    Attributes:
        lowest_noise: The phase ends at this noise level, which still belongs to it; 0 for the last phase.
        share: Share of the calibration schedule's steps, 0…1.
    """

    lowest_noise: float
    share: float


def phases_of(noise_levels: Sequence[float], ends: Sequence[float]) -> tuple[Phase, ...]:
    """Cut a schedule into phases.

    Args:
        noise_levels: Noise level of every step, falling.
        ends: Share of the steps at which each phase ends, rising, the last one 1. Phases that would hold no step of
            this schedule are left out.

    Raises:
        ValueError: If the levels do not fall or the ends do not rise to 1.
    """
    if not noise_levels or any(b >= a for a, b in pairwise(noise_levels)):
        raise ValueError(f"noise levels must fall from step to step; got {list(noise_levels)}")
    check_ends(ends)
    steps = len(noise_levels)
    counts = list(dict.fromkeys(max(1, round(end * steps)) for end in ends))
    starts = [0, *counts[:-1]]
    return tuple(
        Phase(0.0 if stop == steps else _between(noise_levels[stop - 1], noise_levels[stop]), (stop - start) / steps)
        for start, stop in zip(starts, counts, strict=True)
    )


def check_ends(ends: Sequence[float]) -> None:
    """Check the shares of the steps at which phases end.

    Raises:
        ValueError: If they do not rise from above 0 to 1.
    """
    if not ends or ends[-1] != 1 or ends[0] <= 0 or any(b <= a for a, b in pairwise(ends)):
        raise ValueError(f"phases must end at rising shares of the steps, the last one at 1; got {list(ends)}")


def phase_at(phases: Sequence[Phase], noise_level: float) -> int:
    """Index of the phase that a noise level belongs to."""
    inside = (i for i, phase in enumerate(phases) if noise_level >= phase.lowest_noise - TOLERANCE)
    return next(inside, len(phases) - 1)


def _between(above: float, below: float) -> float:
    return (above + below) / 2
