"""Which forwards of a model are timed: what is on in each, and at which depths."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from architectures import MAIN_BLOCK, Architecture
from forwards import BACKENDS, BASELINE

OURS, STOCK = "paroattn", "stock"
EVERY_SECOND = "first-block, every second step"
MODES = {"eager": False, "compiled": True}
DEPTHS = (2, 6)
GROUPS = ("stock", "cudnn", "sage2", "paroattn", "cache", "fp8")
HEADLINE = "headline"


@dataclass(frozen=True)
class Kind:
    """What is on in a row."""

    impl: str
    density: float = 1.0
    precision: str = "bf16/bf16"
    block: str | None = None
    compiled: bool = False
    fp8_linears: bool = False
    step_cache: str | None = None

    @property
    def graph(self) -> tuple[Any, ...]:
        """What compiled code depends on."""
        return self.impl, self.precision, self.block, self.compiled, self.fp8_linears, self.step_cache


@dataclass(frozen=True)
class Choice:
    """What to measure of a model.

    Attributes:
        groups: Which rows, by the names in `kinds`.
        densities, precisions, block: Of ours.
        modes: Of `MODES`.
        depths: Two to draw a line through; None draws none.
        whole: Measure the whole model, in three rows.
        rounds: Forwards to take the median of.
        profile: Rows list the kernels that take longest.
        impl: Implementation of ours.
    """

    groups: tuple[str, ...] = GROUPS
    densities: tuple[float, ...] = (0.5, 0.3, 0.2)
    precisions: tuple[str, ...] = ("int8/fp8", "int8/int8")
    block: str | None = None
    modes: tuple[str, ...] = tuple(MODES)
    depths: tuple[int, int] | None = DEPTHS
    whole: bool = False
    rounds: int = 5
    profile: bool = False
    impl: str = "auto"


def kinds(model: Architecture, choice: Choice) -> list[Kind]:
    """All rows of the groups, each once; FP8 linears last, since weights stay quantised."""
    modes = [MODES[name] for name in choice.modes]
    ours = functools.partial(Kind, OURS, block=choice.block or MAIN_BLOCK[model.head_dim])
    fastest = ours(min(choice.densities), choice.precisions[0], compiled=True)
    dense, sage2 = (Kind(name, precision=BACKENDS[name].precision, compiled=True) for name in (BASELINE, "sage2"))
    fp8 = [replace(each, fp8_linears=True) for each in (dense, fastest)]
    groups = {
        HEADLINE: [Kind(STOCK), dense, fastest],
        "stock": [Kind(STOCK)],
        "cudnn": [replace(dense, compiled=each) for each in modes],
        "sage2": [replace(sage2, compiled=each) for each in modes],
        "paroattn": [
            ours(density, precision, compiled=each)
            for each in modes
            for precision in choice.precisions
            for density in choice.densities
        ],
        "cache": [replace(each, step_cache=EVERY_SECOND) for each in (dense, fastest)],
        "fp8": fp8,
    }
    if choice.whole:
        groups = {"cudnn": [dense], "paroattn": [fastest], "fp8": fp8[1:]}
    found = dict.fromkeys(kind for name in choice.groups for kind in groups.get(name, ()))
    return sorted(found, key=lambda kind: kind.fp8_linears)


def points(model: Architecture, depths: tuple[int, int] | None) -> list[tuple[int, ...]]:
    """Depths to draw a line through: the shallow one, then each kind of blocks deeper in turn; none for None."""
    if depths is None:
        return []
    shallow, deep = depths
    if not 1 <= shallow < deep <= min(model.depth):
        raise ValueError(f"depths must rise within 1…{min(model.depth)}; got {shallow} and {deep}")
    base = (shallow,) * len(model.depth)
    return [base, *((*base[:i], deep, *base[i + 1 :]) for i in range(len(base)))]


def whole_model(values: Sequence[float], at: Sequence[tuple[int, ...]], depth: tuple[int, ...]) -> float:
    """Value at the published depth, from one at a base depth and one for each kind of blocks that is deeper there."""
    base, *deeper = values
    total = base
    for i, value in enumerate(deeper):
        total += (value - base) * (depth[i] - at[0][i]) / (at[i + 1][i] - at[0][i])
    return total
