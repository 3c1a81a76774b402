"""One self-contained HTML file on what a plan does: clips beside their dense twins, orders, densities, times."""

import os
import platform
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..grid import ORDERS
from ..plan.plan import TransformerPlan
from .clip_sections import clips_section, differences_section, fidelity_section
from .fidelity import Comparison, Summary, summarise
from .maps import AttentionMap, maps_section
from .markup import Markup, join, section, table, tag, terms, write_page
from .plan_page import plan_sections
from .video import DEFAULT_FPS, check_file
from .wording import decibels, duration, mean_spread, percent, plural, short

PACKAGES = ("torch", "diffusers", "triton")


@dataclass(frozen=True, eq=False)
class ReportData:
    """What a report shows; what is empty is left out.

    Attributes:
        title: Heading.
        introduction: A sentence or two ahead of the headline numbers, which are computed.
        clips: All pairs. Those that still hold frames can be shown: the first few, and always the worst.
        plan: Plans by component, such as a `Plan`.
        maps: A few instructive heads.
        execution: What ran: `{"layers": rows}`, each with "layer", "phase" (None for all), "density" or
            "density_executed", and "sparse_calls" and "dense_calls" as numbers or as numbers by reason.
        timings: Seconds by what took them; clips are added by themselves.
        differences: By how much the metrics exceed those of another evaluation, pair by pair.
        against: Name of that one.
        over_all: Metrics over all clips together, by name, such as FVD.
        note: How this plan was made, and how that differs from a shipped one; a blank line starts a paragraph.
        command: The command that makes this report again.
        versions: Versions, device and date, such as `environment()`.
        fps: Frames per second of the clips.
    """

    title: str
    introduction: str = ""
    clips: Sequence[Comparison] = ()
    plan: Mapping[str, TransformerPlan] = field(default_factory=dict)
    maps: Sequence[AttentionMap] = ()
    execution: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    differences: Mapping[str, Summary] = field(default_factory=dict)
    against: str = ""
    over_all: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    fps: float = DEFAULT_FPS


def write_report(report: ReportData, path: str | os.PathLike) -> Path:
    """Write a report as one HTML file that needs nothing else.

    Raises:
        IsADirectoryError, PermissionError: If the file cannot be written; before anything is drawn.
    """
    path = check_file(path)
    return write_page(path, report.title, [draw(report) for draw in _REPORT])


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """Versions, the device that ran, and the date, for a report's footer."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(device)
        if torch.device(device).type == "cuda"
        else f"CPU ({platform.machine()})",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "paroattn": __version__,
    } | {package: found for package in PACKAGES if (found := _installed(package))}


def _header(report: ReportData) -> Markup:
    paragraphs = [tag("p", text) for text in (report.introduction, _headline(report)) if text]
    return tag("header", tag("h1", report.title), *paragraphs, _key_figures(report))


def _headline(report: ReportData) -> str:
    """The numbers in one paragraph."""
    said = []
    if report.clips:
        psnr, count = summarise(clip.fidelity.psnr for clip in report.clips), len(report.clips)
        pairs = f"Over {count} pairs of clips" if count > 1 else "For one pair of clips"
        worst = f" (worst clip {psnr.lowest:.1f} dB)" if count > 1 else ""
        close = f"reaches {mean_spread(psnr, '.1f')} dB PSNR against dense attention{worst}"
        dense, sparse = _median_seconds(report.clips)
        said.append(
            f"{pairs} with the same prompt and seed, PAROAttention "
            f"{close if psnr.infinite < count else 'gives exactly what dense attention gives'} and makes a clip in "
            f"{duration(sparse)} instead of {duration(dense)}, {dense / sparse:.2f} times as fast."
        )
    if report.plan:
        orders = [order for part in report.plan.values() for layer in part.layers.values() for order in layer.orders]
        moved = sum(order != ORDERS[0] for order in orders)
        said.append(
            f"The plan keeps {percent(_planned(report.plan))} of the attention blocks; {moved} of {len(orders)} heads "
            "read their tokens in another order than the model's own."
        )
    return " ".join(said)


def _key_figures(report: ReportData) -> Markup:
    figures: dict[str, tuple[str, str]] = {}
    if report.clips:
        psnr = summarise(clip.fidelity.psnr for clip in report.clips)
        dense, sparse = _median_seconds(report.clips)
        figures["Mean PSNR"] = (decibels(psnr.mean), f"against dense, {plural(psnr.count, 'pair')}")
        if psnr.count > 1:
            figures["Worst clip"] = (decibels(psnr.lowest), "PSNR against dense")
        figures["Speed"] = (f"{dense / sparse:.2f}×", "whole clip, dense = 1")
    if report.plan:
        figures["Blocks kept"] = (percent(_planned(report.plan)), "of all, as planned")
    shown = {name: join([value, tag("div", unit, class_="small")]) for name, (value, unit) in figures.items()}
    return terms(shown, class_="figures") if shown else Markup()


def _execution(report: ReportData) -> Markup:
    by_layer: dict[str, list[Mapping[str, Any]]] = {}
    for row in report.execution.get("layers", ()):
        by_layer.setdefault(str(row.get("layer", "–")), []).append(row)
    if not by_layer:
        return Markup()
    everything = [row for rows in by_layer.values() for row in rows]
    phases = sorted({row["phase"] for row in everything if row.get("phase") is not None})
    lines = [_execution_row(name, phases, rows) for name, rows in zip(short(by_layer), by_layer.values(), strict=True)]
    columns = ("layer", *(f"phase {phase}" for phase in phases), "sparse calls", "dense calls", " why dense")
    lead = (
        f"Density as executed, text and edge blocks included. Attention ran {_calls(everything, 'sparse_calls')} times "
        f"sparse and {_calls(everything, 'dense_calls')} times dense."
    )
    return section("What ran", lead, table(columns, lines, caption="Executed density and calls by layer and phase"))


def _execution_row(name: str, phases: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    found = {row.get("phase"): row.get("density_executed", row.get("density")) for row in rows}
    densities = ["–" if found.get(phase) is None else percent(found[phase], 1) for phase in phases]
    reasons = Counter[str]()
    for row in rows:
        if isinstance(row.get("dense_calls"), Mapping):
            reasons.update(row["dense_calls"])
    why = "; ".join(f"{reason} ({count})" for reason, count in reasons.items()) or "–"
    calls = [_calls(rows, kind) for kind in ("sparse_calls", "dense_calls")]
    return [name, *densities, *calls, tag("td", why, class_="text quiet")]


def _calls(rows: Iterable[Mapping[str, Any]], kind: str) -> int:
    counts = [row.get(kind) or 0 for row in rows]
    return sum(sum(count.values()) if isinstance(count, Mapping) else count for count in counts)


def _over_all(found: Mapping[str, float]) -> Markup:
    if not found:
        return Markup()
    rows = [(name, f"{value:.4f}") for name, value in found.items()]
    return section("All clips together", "", table(("metric", "value"), rows, caption="Over all clips at once"))


def _run(report: ReportData) -> Markup:
    seconds = dict(report.timings)
    if report.clips:
        dense, sparse = _median_seconds(report.clips)
        seconds |= {"One clip, dense (median)": dense, "One clip, PAROAttention (median)": sparse}
    rows = [(name, duration(value)) for name, value in seconds.items()]
    paragraphs = [tag("p", text) for text in report.note.split("\n\n") if text.strip()]
    parts = [section("Time", "", table(("step", "time"), rows, caption="Wall time"))] if rows else []
    parts += [section("How this plan was made", "", *paragraphs)] if paragraphs else []
    return tag("div", *parts, class_="pair") if parts else Markup()


def _command(report: ReportData) -> Markup:
    if not report.command:
        return Markup()
    code = tag("pre", tag("code", report.command), tabindex=0, aria_label="Command")
    return section("Make this report again", "", code)


def _footer(report: ReportData) -> Markup:
    return tag("footer", terms(report.versions)) if report.versions else Markup()


_REPORT = (
    _header,
    lambda report: clips_section(report.clips, report.fps),
    lambda report: fidelity_section(report.clips),
    lambda report: differences_section(report.differences, report.against),
    lambda report: _over_all(report.over_all),
    lambda report: maps_section(report.maps),
    lambda report: plan_sections(report.plan),
    _execution,
    _run,
    _command,
    _footer,
)


def _planned(plan: Mapping[str, TransformerPlan]) -> float:
    return statistics.fmean(part.density for part in plan.values())


def _median_seconds(clips: Sequence[Comparison]) -> tuple[float, float]:
    dense, sparse = ([getattr(clip, name) for clip in clips] for name in ("dense_seconds", "sparse_seconds"))
    return statistics.median(dense), statistics.median(sparse)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
