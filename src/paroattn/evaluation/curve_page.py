"""The curve of density, predicted error and predicted time, as a picture with a table, and as files of its own."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..plan.curve import MEANINGS
from .markup import Markup, join, section, table, tag, write_page
from .video import check_file, replacing
from .wording import percent

SIZE = (640, 300)
MARGIN = (64, 16, 44, 20)
"""Left, right, bottom and top of the picture, in pixels."""
LARGEST_DB = 60.0
"""Errors below this are nobody's concern and would flatten the picture."""
TIMES = {"attention_speedup": "attention faster", "speedup": "forward faster"}


def write_curves(curves: Mapping[str, Mapping[str, Any]], path: str | os.PathLike) -> Path:
    """Write curves as a page (.html) or as plain values (.json).

    Args:
        curves: By component, each as `plan.curve.described` makes it.
        path: Where to.

    Raises:
        ValueError: If the file is neither.
        IsADirectoryError, PermissionError: If it cannot be written; before anything is drawn.
    """
    path = check_curve_path(path)
    if path.suffix.lower() == ".json":
        with replacing(path) as target:
            target.write_text(json.dumps(curves, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return path
    title = "Density, error and time"
    several = len(curves) > 1
    parts = [curve_section(curve, f" – {name}" if several else "") for name, curve in curves.items()]
    return write_page(path, title, [tag("header", tag("h1", title)), *parts])


def check_curve_path(path: str | os.PathLike) -> Path:
    """Raise before any work if `write_curves` would fail for this path; the errors are the same."""
    path = check_file(path)
    if path.suffix.lower() not in (".html", ".json"):
        raise ValueError(f"a curve is written as .html or .json; got {path.name!r}")
    return path


def curve_section(curve: Mapping[str, Any], of: str = "") -> Markup:
    """The picture and the table of one curve, with the point that was chosen."""
    points, chosen = curve["points"], curve["chosen"]
    where = "" if curve["gpu"] is None else f" Times are predicted for one compiled forward on an {curve['gpu']}."
    unknown = f" Not predicted: {curve['times_unknown']}" if curve["times_unknown"] else ""
    lead = (
        "What each density is predicted to lose and to take. The error is the relative squared error "
        f"{MEANINGS[curve['error_of']]}; good for comparing points, exact only where it is small.{where}{unknown}"
    )
    picture = tag("figure", _drawn(points, chosen), tag("figcaption", _caption(curve, chosen)))
    return section(f"Density, error and time{of}", lead, tag("div", picture, _table(curve), class_="beside"))


def columns_of(curve: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Keys and headings of what is known along a curve."""
    ahead = [("density", "density"), ("error", "error"), ("snr_db", "dB"), ("attention_ms", "attention ms")]
    known = [*ahead, *TIMES.items(), ("heads_int4", "heads in INT4")]
    return [(key, head) for key, head in known if any(point.get(key) is not None for point in curve["points"])]


def cell(key: str, value: float | None) -> str:
    """A number of a curve in words."""
    forms = {"density": ".3f", "error": ".1e", "snr_db": ".1f", "attention_ms": ".4g", "heads_int4": ".0%"}
    if value is None:
        return "∞" if key == "snr_db" else "–"
    return f"{value:.2f}×" if key in TIMES else format(value, forms[key]).replace("0.0e+00", "0").replace("-", "−")


def rows_of(curve: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], bool]]:
    """Points, the densest first, and whether each is the chosen one, which has its own row."""
    chosen = curve["chosen"]
    others = [point for point in curve["points"] if abs(point["density"] - chosen["density"]) > 1e-3]
    every = sorted([*others, chosen], key=lambda point: -point["density"])
    return [(point, point is chosen) for point in every]


def _table(curve: Mapping[str, Any]) -> Markup:
    columns = columns_of(curve)

    def shown(text: str, chosen: bool) -> Markup:
        return tag("strong", text) if chosen else join([text])

    rows = [[shown(cell(key, point[key]), chosen) for key, _ in columns] for point, chosen in rows_of(curve)]
    return table([head for _, head in columns], rows, caption="In bold, the point that was chosen")


def _caption(curve: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    second = " The line falling to the right is the speed-up." if _speedup_key(curve["points"]) else ""
    return f"Rising to the right: predicted error in dB. The dot is density {percent(chosen['density'], 1)}.{second}"


def _speedup_key(points: Sequence[Mapping[str, Any]]) -> str | None:
    return next((key for key in ("speedup", "attention_speedup") if points[0][key] is not None), None)


def _drawn(points: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> Markup:
    """Error in dB and speed-up over the density, each on its own scale."""
    width, height = SIZE
    left, right, bottom, top = MARGIN
    key = _speedup_key(points)
    right = 64 if key else right
    low = min(point["density"] for point in points)
    span = math.log(1 / low) or 1.0

    def across(density: float) -> float:
        return left + (width - left - right) * (1 - math.log(1 / density) / span)

    def upwards(share: float) -> float:
        return top + (height - top - bottom) * (1 - share)

    marks = [each for each in (1.0, 0.5, 0.3, 0.2, 0.1, 0.05) if each >= low]
    parts = [_text(across(each), height - bottom + 18, f"{each:g}", "middle") for each in marks]
    parts.append(_text((left + width - right) / 2, height - 6, "density, logarithmic", "middle"))
    series = [("snr_db", "dB", "var(--accent)", "end", left - 8), (key, "×", "var(--ink)", "start", width - right + 8)]
    for name, unit, colour, anchor, x in series:
        values = [(point["density"], point[name]) for point in points if name and point[name] is not None]
        values = [(density, value) for density, value in values if name != "snr_db" or value <= LARGEST_DB]
        if not name or not values:
            continue
        least, most = (pick(value for _, value in values) for pick in (min, max))
        extent = (most - least) or 1.0
        path = " ".join(f"{across(d):.1f},{upwards((value - least) / extent):.1f}" for d, value in values)
        parts.append(tag("polyline", points=path, fill="none", stroke=colour, stroke_width=2))
        parts += [
            _text(x, upwards(at) + 4, f"{least + at * extent:.3g} {unit}".replace("-", "−"), anchor)
            for at in (0.0, 0.5, 1.0)
        ]
        if chosen[name] is not None:
            place = across(chosen["density"]), upwards(min(1.0, max(0.0, (chosen[name] - least) / extent)))
            parts.append(tag("circle", cx=f"{place[0]:.1f}", cy=f"{place[1]:.1f}", r=5, fill=colour))
    base = tag(
        "line", x1=left, x2=width - right, y1=height - bottom, y2=height - bottom, stroke="var(--rule)", stroke_width=1
    )
    label = f"Predicted error and speed-up from density {low:.3g} to 1; chosen {chosen['density']:.3g}"
    return tag("svg", base, *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=label, class_="curve")


def _text(x: float, y: float, words: str, anchor: str) -> Markup:
    return tag("text", words, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)
