"""Numbers, durations and names as a report writes them."""

import math
from collections.abc import Iterable, Sequence

from .fidelity import Summary


def short(paths: Iterable[str]) -> list[str]:
    """Module paths without the leading and trailing parts that all share: blocks.3.attn1 becomes 3."""
    parts = [path.split(".") for path in paths]
    ahead, behind = _shared(parts), _shared([part[::-1] for part in parts])
    return [".".join(part[ahead : len(part) - behind]) for part in parts]


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """How many leading parts all share; none if they share everything."""
    differs = [len(set(column)) > 1 for column in zip(*parts, strict=False)]
    return differs.index(True) if True in differs else 0


def number(value: float, form: str) -> str:
    """A number as `form` says, or ∞."""
    return format(value, form) if math.isfinite(value) else "∞"


def decibels(psnr: float) -> str:
    """A PSNR with its unit; the same clip has none."""
    return f"{psnr:.1f} dB" if math.isfinite(psnr) else "identical"


def mean_spread(summary: Summary, form: str) -> str:
    """Mean ± spread; the mean alone of one value."""
    spread = f" ± {number(summary.spread, form)}" if summary.interval else ""
    return number(summary.mean, form) + spread


def percent(share: float, digits: int = 0) -> str:
    """A share 0…1 in percent."""
    return f"{100 * share:.{digits}f} %"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def plural(count: int, noun: str) -> str:
    """A count and what is counted."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def times(text: str) -> str:
    """Sizes such as 2x3 with a typographic ×."""
    return text.replace("x", "×")
