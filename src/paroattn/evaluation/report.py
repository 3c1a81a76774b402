"""One self-contained HTML file that shows what a plan does: clips beside their dense twins, orders, densities, times."""

import io
import math
import os
import platform
import statistics
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from html import escape
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..grid import ORDERS, TILES
from ..plan.plan import TransformerPlan
from .fidelity import Comparison, Summary, summarise, summarise_metrics
from .video import DEFAULT_FPS, SpriteSheet, check_file, data_uri, difference, replacing, sprite_sheet

DIFFERENCE_GAIN = 4
SHOWN_CLIPS = 6
CLIPS_BUDGET = 2_000_000
MASKS_PIXELS = 600_000
LARGEST_MAP = 256
LARGEST_THUMBNAIL = 64
PACKAGES = ("paroattn", "torch", "diffusers", "triton")

RAMP = ("#0a0d1c", "#222b5c", "#2f5c86", "#3f8f8b", "#86b96a", "#eacb5c", "#fff6d0")
DROPPED = 255
ORDER_COLOURS = {
    "FHW": "#8b939b", "FWH": "#5b74a8", "HFW": "#2f9aa0", "HWF": "#3aa567", "WFH": "#d9a033", "WHF": "#d9723c",
    "4x4x4": "#b0568f", "1x8x8": "#8d63c4", "16x2x2": "#c65a63", "4x2x8": "#8f7d5a",
}  # fmt: skip
OTHER_COLOUR = "#77706a"
AXES = {"F": "frame", "H": "row", "W": "column"}
METRIC_ROWS = {"psnr": ("PSNR, dB", "{:.1f}"), "ssim": ("SSIM", "{:.3f}"), "cosine": ("cosine similarity", "{:.4f}")}


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """One head's attention before and after reordering.

    Attributes:
        layer, head: Which head.
        order: The order chosen for it.
        before: Block mass in the model's own order, (Nq, Nk): share of a query block's attention on a key block.
        after: The same in the chosen order.
        kept: Kept blocks in the chosen order, bool, the shape of `after`.
    """

    layer: str
    head: int
    order: str
    before: Tensor
    after: Tensor
    kept: Tensor

    def __post_init__(self):
        if self.before.ndim != 2 or self.after.ndim != 2 or self.kept.shape != self.after.shape:
            shapes = [tuple(part.shape) for part in (self.before, self.after, self.kept)]
            raise ValueError(f"maps must be 2-D, `kept` like `after`; got before, after, kept of shapes {shapes}")

    @property
    def density(self) -> float:
        return self.kept.double().mean().item()

    @property
    def mass_kept(self) -> float:
        """Share of the attention that lies in kept blocks."""
        after = self.after.double()
        return (after[self.kept.bool()].sum() / after.sum()).item()


@dataclass(frozen=True, eq=False)
class ReportData:
    """What a report shows; what is empty is left out.

    Attributes:
        title: Heading.
        introduction: A sentence or two before the headline numbers, which are computed.
        clips: All pairs. Those that still hold frames can be shown: the first few, and always the worst.
        plan: Plans by component, such as a `Plan`.
        maps: A few instructive heads.
        execution: What ran: `Report.to_dict()` of the integration, `{"layers": [{"layer", "phase", ...}, ...]}`.
        timings: Seconds by what took them; clips are added by themselves.
        note: How this plan was made, and how that differs from a shipped one.
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
    parts = [_header(report), *(section(report) for section in _REPORT_SECTIONS), _footer(report.versions)]
    return _write_page(path, report.title, parts)


def write_plan(plan: Mapping[str, TransformerPlan], path: str | os.PathLike, *, title: str = "Attention plan") -> Path:
    """Write a plan as one HTML file: orders, densities and the mask of every head.

    Args:
        plan: Plans by component, such as a `Plan`.
        path: Where to.
        title: Heading.

    Raises:
        IsADirectoryError, PermissionError: If the file cannot be written.
    """
    path = check_file(path)
    header = _tag("header", _tag("h1", title), *(_tag("p", _described(part)) for part in plan.values()))
    sections = [_plan_section(draw(part), name, plan) for name, part in plan.items() for draw in (_orders, _densities, _masks)]
    return _write_page(path, title, [header, *sections])


def draw_plan(plan: TransformerPlan, *, phase: int = 0) -> Image.Image:
    """Draw the mask of every head in one picture: a row per layer, tinted by order, with order and density below.

    Args:
        plan: The plan.
        phase: Which phase's masks.
    """
    side, gap, left, top = 96, 14, 96, 64
    tile = (side + gap, side + gap + 18)
    canvas = Image.new("RGB", (left + plan.heads * tile[0], top + len(plan.layers) * tile[1]), "white")
    pen, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(15), ImageFont.load_default(12)
    pen.text((gap, 12), _described(plan), "#1c2126", font)
    for head in range(plan.heads):
        pen.text((left + head * tile[0], top - 20), f"head {head}", "#5b646d", small)
    for row, (name, (path, layer)) in enumerate(zip(_short(plan.layers), plan.layers.items(), strict=True)):
        pen.text((gap, top + row * tile[1] + side // 2 - 8), f"layer {name}", "#5b646d", small)
        densities = layer.mask[phase].head_density().tolist()
        for head, (order, kept) in enumerate(zip(layer.orders, layer.mask[phase].dense(), strict=True)):
            corner = (left + head * tile[0], top + row * tile[1])
            picture = _mask_picture(kept, order, side).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(Image.new("RGB", (side, side), "#f0f1f2"), corner)
            canvas.paste(picture, corner, picture)
            pen.text((corner[0], corner[1] + side + 2), f"{_times(order)}  {_percent(densities[head])}", "#1c2126", small)
    return canvas


def environment() -> dict[str, str]:
    """Versions, device and date for a report's footer."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    found = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "device": device}
    found["threads"] = str(torch.get_num_threads())
    found["python"] = platform.python_version()
    return found | {name: installed for name in PACKAGES if (installed := _installed(name))}


# Markup


class Markup(str):
    """Text that is HTML already; everything else is escaped."""


def _tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element; an attribute that is None or False is left out, True stands alone, and class_ means class."""
    shown = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value not in (None, False)}
    opening = "".join(f" {key}" if value is True else f' {key}="{escape(str(value))}"' for key, value in shown.items())
    if name in ("img", "input"):
        return Markup(f"<{name}{opening}>")
    return Markup(f"<{name}{opening}>{_join(children)}</{name}>")


def _join(children: Iterable[Any]) -> Markup:
    return Markup("".join(child if isinstance(child, Markup) else escape(str(child)) for child in children if child != ""))


def _section(title: str, lead: str, *children: Any) -> Markup:
    heading = _tag("div", _tag("h2", title), _tag("p", lead, class_="lead") if lead else "")
    return _tag("section", heading, *children)


def _table(head: Sequence[str], rows: Iterable[Iterable[Any]], *, caption: str, class_: str | None = None) -> Markup:
    """A table in its own scrolling box.

    The first cell of a row is its heading, cells may be <td> already, and a column headed " so" is text, to the left.
    """
    columns = _tag("tr", *(_tag("th", name.strip(), scope="col", class_=name.startswith(" ") and "text") for name in head))
    lines = [_tag("tr", _tag("th", first, scope="row"), *map(_cell, rest)) for first, *rest in rows]
    table = _tag("table", _tag("caption", caption), _tag("thead", columns), _tag("tbody", *lines), class_=class_)
    return _tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _cell(value: Any) -> Markup:
    return value if isinstance(value, Markup) and value.startswith("<td") else _tag("td", value)


def _terms(pairs: Mapping[str, Any], **attributes: Any) -> Markup:
    return _tag("dl", *(_tag("div", _tag("dt", name + " "), _tag("dd", value)) for name, value in pairs.items()), **attributes)


def _write_page(path: Path, title: str, parts: Iterable[Markup]) -> Path:
    template = string.Template((files(__package__) / "page.html").read_text(encoding="utf-8"))
    page = template.substitute(title=escape(title), body="\n".join(part for part in parts if part))
    with replacing(path) as target:
        target.write_text(page, encoding="utf-8")
    return path


# Sections of a report


def _header(report: ReportData) -> Markup:
    paragraphs = [_tag("p", text) for text in (report.introduction, _headline(report)) if text]
    return _tag("header", _tag("h1", report.title), *paragraphs, _key_figures(report))


def _headline(report: ReportData) -> str:
    said = []
    if report.clips:
        psnr, count = summarise(clip.fidelity.psnr for clip in report.clips), len(report.clips)
        pairs = f"Over {count} pairs of clips" if count > 1 else "For one pair of clips"
        worst = f" (worst clip {psnr.lowest:.1f} dB)" if count > 1 else ""
        close = f"reaches {_mean_spread(psnr, '{:.1f}')} dB PSNR against dense attention{worst}"
        dense, sparse = _median_seconds(report.clips)
        said.append(
            f"{pairs} with the same prompt and seed, PAROAttention "
            f"{close if psnr.infinite < count else 'gives exactly what dense attention gives'} and makes a clip in "
            f"{_duration(sparse)} instead of {_duration(dense)}, {dense / sparse:.2f} times as fast."
        )
    if report.plan:
        heads = [order for part in report.plan.values() for layer in part.layers.values() for order in layer.orders]
        moved = sum(order != ORDERS[0] for order in heads)
        said.append(
            f"The plan keeps {_percent(_planned(report.plan))} of the attention blocks; {moved} of {len(heads)} heads read "
            "their tokens in another order than the model's own."
        )
    return " ".join(said)


def _key_figures(report: ReportData) -> Markup:
    figures: dict[str, tuple[str, str]] = {}
    if report.clips:
        psnr = summarise(clip.fidelity.psnr for clip in report.clips)
        dense, sparse = _median_seconds(report.clips)
        value = f"{psnr.mean:.1f} dB" if math.isfinite(psnr.mean) else "identical"
        figures["Mean PSNR"] = (value, f"against dense, {_plural(psnr.count, 'pair')}")
        if math.isfinite(psnr.lowest):
            figures["Worst clip"] = (f"{psnr.lowest:.1f} dB", "PSNR against dense")
        figures["Speed"] = (f"{dense / sparse:.2f}×", "whole clip, dense = 1")
    if report.plan:
        figures["Blocks kept"] = (_percent(_planned(report.plan)), "of all, as planned")
    shown = {name: _join([value, " ", _tag("div", unit, class_="small")]) for name, (value, unit) in figures.items()}
    return _terms(shown, class_="figures") if shown else Markup()


def _clips(report: ReportData) -> Markup:
    worst = min(report.clips, key=lambda clip: clip.fidelity.psnr, default=None)
    shown = _chosen_clips(report.clips, worst)
    if not shown:
        return Markup()
    budget = CLIPS_BUDGET // (3 * len(shown))
    sheets = [_sheets(clip, report.fps, budget) for clip in shown]
    most = max(sheet.frames for trio in sheets for sheet in trio)
    start = 0 if most < 2 else most // 2
    several = len(report.clips) > 1
    blocks = [_clip(clip, trio, several and clip is worst) for clip, trio in zip(shown, sheets, strict=True)]
    whole = "" if len(shown) == len(report.clips) else f" {len(shown)} of {len(report.clips)} pairs are shown, the worst among them."
    lead = (
        "The same prompt and seed, once with dense attention and once with the plan, in step. The third panel is the difference: "
        f"black where both agree, white where a colour is off by 1/{DIFFERENCE_GAIN} of its range or more.{whole}"
    )
    slider = _tag("input", type="range", id="time", min=0, max=most - 1, value=start, step=1, aria_label="Frame")
    player = _tag(
        "div",
        _tag("button", "Pause", type="button", id="play"),
        _tag("label", slider, _tag("span", f"{start + 1} / {most}", id="frame", aria_hidden="true")),
        class_="player",
        role="group",
        aria_label="Player for all clips",
    )
    return _section("Clips", lead, _tag("div", player, *blocks))


def _clip(clip: Comparison, trio: Sequence[SpriteSheet], is_worst: bool) -> Markup:
    labels = ("Dense", "PAROAttention", f"Difference × {DIFFERENCE_GAIN}")
    panels = [
        _tag("figure", *_canvas(sheet, f"{label}: {clip.prompt}"), _tag("figcaption", label))
        for label, sheet in zip(labels, trio, strict=True)
    ]
    badge = _tag("span", "worst pair", class_="badge") if is_worst else ""
    measures = {
        "PSNR": _decibels(clip.fidelity.psnr),
        "SSIM": f"{clip.fidelity.ssim:.3f}",
        "cosine": f"{clip.fidelity.cosine:.4f}",
        "dense": _duration(clip.dense_seconds),
        "PAROAttention": _duration(clip.sparse_seconds),
        "speed": f"{clip.speed_up:.2f}×",
        "seed": clip.seed,
    }
    heading = _tag("h3", clip.prompt, " ", badge)
    return _tag("article", heading, _tag("div", *panels, class_="trio"), _terms(measures, class_="measures"), class_="clip")


def _canvas(sheet: SpriteSheet, label: str) -> tuple[Markup, Markup]:
    canvas = _tag(
        "canvas", role="img", aria_label=label, width=sheet.width, height=sheet.height,
        style=f"aspect-ratio: {sheet.width} / {sheet.height}",
        data_frames=sheet.frames, data_columns=sheet.columns, data_fps=sheet.fps, data_width=sheet.width,
        data_height=sheet.height, data_cell_width=sheet.cell[0], data_cell_height=sheet.cell[1],
    )  # fmt: skip
    return canvas, _tag("img", class_="sheet", alt=f"All frames. {label}", src=sheet.uri)


def _fidelity(report: ReportData) -> Markup:
    if not report.clips:
        return Markup()
    metrics = summarise_metrics([clip.fidelity for clip in report.clips])
    rows = [_metric_row(metrics[name], label, form) for name, (label, form) in METRIC_ROWS.items()]
    identical = metrics["psnr"].infinite
    aside = f"{_plural(identical, 'pair')} of identical clips, whose PSNR is infinite, left out of its mean." if identical else ""
    table = _table(
        ("", "mean ± spread", "95 % interval of the mean", "worst clip", "best clip"),
        rows,
        caption=f"Over {_plural(len(report.clips), 'pair')}; spread is the standard deviation over clips",
    )
    each = _table(
        ("", "seed", "PSNR, dB", "SSIM", "cosine", "dense", "PAROAttention", "speed"),
        [
            (
                _tag("span", clip.prompt, style="white-space: normal; display: inline-block; min-width: 11rem"),
                clip.seed,
                _decibels(clip.fidelity.psnr, unit=""),
                f"{clip.fidelity.ssim:.3f}",
                f"{clip.fidelity.cosine:.4f}",
                _duration(clip.dense_seconds),
                _duration(clip.sparse_seconds),
                f"{clip.speed_up:.2f}×",
            )
            for clip in report.clips
        ],
        caption="Every pair",
    )
    lead = "How close clips stay to their dense twins. PSNR over all frames with values in −1…1; SSIM per frame, then the mean."
    return _section("Fidelity", lead, table, _tag("p", aside) if aside else "", _details("Every pair", each))


def _metric_row(summary: Summary, label: str, form: str) -> list[str]:
    show: Callable[[float], str] = lambda value: form.format(value) if math.isfinite(value) else "∞"  # noqa: E731
    interval = " … ".join(map(show, summary.interval)) if summary.interval else "–"
    return [label, _mean_spread(summary, form), interval, show(summary.lowest), show(summary.highest)]


def _maps(report: ReportData) -> Markup:
    if not report.maps:
        return Markup()
    low = 0.1 / max(part.after.shape[1] for part in report.maps)
    high = max(float(values.max()) for part in report.maps for values in (part.before, part.after))
    scale = (low, max(high, 10 * low))
    ticks = (f"≤ {_percent(scale[0], digits=2)}", f"{_percent(math.sqrt(scale[0] * scale[1]), digits=1)}", _percent(scale[1]))
    ramp = _tag(
        "div",
        _tag("div", style=f"background: linear-gradient(90deg, {', '.join(RAMP)})"),
        _tag("p", *(_tag("span", tick) for tick in ticks), class_="small"),
        class_="ramp",
        role="img",
        aria_label=f"Colour scale, logarithmic, from {ticks[0]} to {ticks[2]}",
    )
    lead = (
        "One pixel is one block: brightness is the share of a query block's attention (row) that falls on a key block "
        "(column), on a logarithmic scale. The order gathers what a head reads into few blocks; flat grey blocks are skipped."
    )
    return _section("Attention before and after reordering", lead, ramp, _tag("div", *(_head(m, scale) for m in report.maps), class_="heads"))


def _head(part: AttentionMap, scale: tuple[float, float]) -> Markup:
    name = f"{part.layer}, head {part.head}"
    kept = f"{_percent(part.density)} of the blocks, {_percent(part.mass_kept, digits=1)} of the attention"
    panels = (
        (f"Model's order, {ORDERS[0]}", part.before, None),
        (f"Order {_times(part.order)}", part.after, None),
        (f"Kept: {kept}", part.after, part.kept),
    )
    figures = [
        _tag("figure", _map_image(values, mask, scale, f"{name}: {label}"), _tag("figcaption", label))
        for label, values, mask in panels
    ]
    return _tag("div", _tag("h3", name), _tag("div", *figures, class_="trio"), class_="head")


def _orders(plan: TransformerPlan) -> Markup:
    counts = Counter(order for layer in plan.layers.values() for order in layer.orders)
    total = sum(counts.values())
    listed = [*(order for order in ORDERS + TILES if counts[order] or order in ORDERS)]
    listed += sorted(set(counts) - set(listed))
    widest = max(counts.values())
    bars = [
        (
            _join([_key(order), " ", _times(order)]),
            _tag("td", _meaning(order), class_="text muted"),
            _tag("td", _tag("span", style=f"width: {100 * counts[order] / widest:.1f}%; --order: {_colour(order)}"), class_="bar"),
            counts[order],
        )
        for order in listed
    ]
    chart = _table(("order", " tokens, slowest axis first", "", "heads"), bars, caption=f"How many of {total} heads", class_="bars")
    rows = [
        (
            _tag("span", name, title=path),
            *(_tag("td", _times(order), class_="order", style=f"--order: {_colour(order)}") for order in layer.orders),
        )
        for name, (path, layer) in zip(_short(plan.layers), plan.layers.items(), strict=True)
    ]
    grid = _table(_head_columns(plan), rows, caption="Order of each head", class_="cells")
    lead = "The axis order in which each head reads the tokens of the video."
    return _section("Orders chosen", lead, _tag("div", chart, grid, class_="beside"))


def _densities(plan: TransformerPlan) -> Markup:
    by_head = plan.head_density()
    shares = torch.tensor([phase.share for phase in plan.phases], dtype=by_head.dtype)
    mean = (by_head * shares[:, None]).sum(1) / shares.sum()
    top = mean.max().item()
    rows = [
        (
            _tag("span", name, title=path),
            *(_density_cell(mean[row, head].item(), by_head[row, :, head].tolist(), top) for head in range(plan.heads)),
        )
        for row, (name, path) in enumerate(zip(_short(plan.layers), plan.layers, strict=True))
    ]
    grid = _table(_head_columns(plan), rows, caption="Kept blocks of each head in percent, mean over the schedule", class_="cells")
    starts = [1.0, *(phase.lowest_noise for phase in plan.phases)]
    phases = _table(
        ("phase", "noise level", "share of steps", "blocks kept"),
        [
            (index + 1, f"{starts[index]:.2f} … {phase.lowest_noise:.2f}", _percent(phase.share), _percent(float(density), digits=1))
            for index, (phase, density) in enumerate(zip(plan.phases, plan.phase_density(), strict=True))
        ],
        caption="Phases of the schedule; each has its own masks",
    )
    lead = f"Blocks of {plan.block[0]}×{plan.block[1]} tokens. Heads and phases that lose more by dropping blocks keep more of them."
    return _section("Density", lead, _tag("div", grid, phases, class_="beside"))


def _density_cell(mean: float, phases: Sequence[float], top: float) -> Markup:
    by_phase = ", ".join(_percent(density) for density in phases)
    level = f"--level: {4 + 46 * mean / top:.0f}%"
    return _tag("td", f"{100 * mean:.0f}", class_="density", style=level, title=f"by phase: {by_phase}")


def _masks(plan: TransformerPlan, phase: int = 0) -> Markup:
    heads = plan.heads * len(plan.layers)
    side = max(16, min(LARGEST_THUMBNAIL, int((MASKS_PIXELS / heads) ** 0.5)))
    rows = []
    for name, (path, layer) in zip(_short(plan.layers), plan.layers.items(), strict=True):
        densities = layer.mask[phase].head_density().tolist()
        cells = [
            _mask_cell(path, head, order, kept, densities[head], side)
            for head, (order, kept) in enumerate(zip(layer.orders, layer.mask[phase].dense(), strict=True))
        ]
        rows.append((_tag("span", name, title=path), *cells))
    table = _table(_head_columns(plan), rows, caption="Query blocks down, key blocks across; colour by order", class_="cells")
    lead = f"Kept blocks of every head in phase {phase + 1} of {len(plan.phases)}."
    return _section("Masks", lead, table)


def _mask_cell(path: str, head: int, order: str, kept: Tensor, density: float, side: int) -> Markup:
    label = f"{path}, head {head}: order {_times(order)}, keeps {_percent(density)}"
    image = _tag("img", alt=label, src=data_uri(_png(_mask_picture(kept, order, side)), "image/png"))
    return _tag("td", image, _tag("span", f"{_times(order)} · {_percent(density)}"), class_="mask")


def _execution(report: ReportData) -> Markup:
    rows = list(report.execution.get("layers", ()))
    if not rows:
        return Markup()
    phases = sorted({row.get("phase", 0) for row in rows}, key=lambda phase: (str(type(phase)), phase))
    layers = list(dict.fromkeys(str(row.get("layer", "–")) for row in rows))
    names = dict(zip(layers, _short(layers), strict=True))
    lines = [_execution_line(names[layer], phases, [row for row in rows if str(row.get("layer", "–")) == layer]) for layer in layers]
    calls = {kind: sum(_count(row, kind) for row in rows) for kind in ("sparse_calls", "dense_calls")}
    labels = [f"phase {phase + 1}" if isinstance(phase, int) else str(phase) for phase in phases]
    table = _table(
        ("layer", *labels, "sparse calls", "dense calls", " why dense"), lines, caption="Executed density and calls by layer and phase"
    )
    lead = (
        f"Density as executed, text and edge blocks included. {calls['sparse_calls']} calls of attention ran sparse, "
        f"{calls['dense_calls']} fell back to dense."
    )
    return _section("What ran", lead, table)


def _execution_line(name: str, phases: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    found = {row.get("phase", 0): row.get("density_executed") for row in rows}
    densities = [_percent(found[phase], digits=1) if found.get(phase) is not None else "–" for phase in phases]
    calls = [sum(_count(row, kind) for row in rows) for kind in ("sparse_calls", "dense_calls")]
    return [name, *densities, *calls, _tag("td", _reasons(rows) or "–", class_="text muted")]


def _reasons(rows: Iterable[Mapping[str, Any]]) -> str:
    reasons = [row[key] for row in rows for key in ("reason", "reasons", "dense_reason", "dense_reasons") if row.get(key)]
    listed = (part for reason in reasons for part in ([reason] if isinstance(reason, str) else reason))
    return "; ".join(dict.fromkeys(map(str, listed)))


def _times_and_origin(report: ReportData) -> Markup:
    seconds = dict(report.timings)
    if report.clips:
        dense, sparse = _median_seconds(report.clips)
        seconds |= {"One clip, dense (median)": dense, "One clip, PAROAttention (median)": sparse}
    times = _table(("step", "time"), [(name, _duration(value)) for name, value in seconds.items()], caption="Wall time")
    timed = _section("Time", "", times) if seconds else ""
    note = [_tag("p", paragraph) for paragraph in report.note.split("\n\n") if paragraph.strip()]
    origin = _section("How this plan was made", "", *note) if note else ""
    return _tag("div", timed, origin, class_="pair") if timed or origin else Markup()


def _command(report: ReportData) -> Markup:
    if not report.command:
        return Markup()
    return _section("Make this report again", "", _tag("pre", _tag("code", report.command), tabindex=0, aria_label="Command"))


def _footer(versions: Mapping[str, str]) -> Markup:
    return _tag("footer", _terms(versions)) if versions else Markup()


def _plans(*draws: Callable[[TransformerPlan], Markup]) -> Callable[[ReportData], Markup]:
    def sections(report: ReportData) -> Markup:
        drawn = [_plan_section(draw(part), name, report.plan) for name, part in report.plan.items() for draw in draws]
        return _join(drawn)

    return sections


def _plan_section(drawn: Markup, name: str, plan: Mapping[str, TransformerPlan]) -> Markup:
    """A section, marked with its component where there are several."""
    return drawn if len(plan) == 1 else Markup(drawn.replace("</h2>", f" – {escape(name)}</h2>", 1))


def _masks_folded(plan: TransformerPlan) -> Markup:
    return _details(f"Masks of all {plan.heads * len(plan.layers)} heads", _masks(plan))


_REPORT_SECTIONS = (
    _clips, _fidelity, _maps, _plans(_orders, _densities, _masks_folded), _execution, _times_and_origin, _command,
)  # fmt: skip


# Pieces of sections


def _chosen_clips(clips: Sequence[Comparison], worst: Comparison | None) -> list[Comparison]:
    drawable = [clip for clip in clips if clip.dense is not None and clip.sparse is not None]
    first = drawable[:SHOWN_CLIPS]
    return first if worst in first or worst not in drawable else [*first[: SHOWN_CLIPS - 1], worst]  # pyright: ignore[reportReturnType]


def _sheets(clip: Comparison, fps: float, budget: int) -> list[SpriteSheet]:
    assert clip.dense is not None and clip.sparse is not None
    trio = (clip.dense, clip.sparse, difference(clip.dense, clip.sparse, DIFFERENCE_GAIN))
    return [sprite_sheet(frames, fps=fps, budget=budget) for frames in trio]


def _details(title: str, *children: Any) -> Markup:
    return _tag("details", _tag("summary", title), *children)


def _head_columns(plan: TransformerPlan) -> list[str]:
    return ["layer", *(f"h{head}" for head in range(plan.heads))]


def _key(order: str) -> Markup:
    return _tag("span", class_="key", style=f"background: {_colour(order)}", aria_hidden="true")


def _meaning(order: str) -> str:
    if order == ORDERS[0]:
        return "frame › row › column (the model's own)"
    if order in ORDERS:
        return " › ".join(AXES[axis] for axis in order)
    return "boxes of {} frames × {} rows × {} columns".format(*order.split("x"))


def _described(plan: TransformerPlan) -> str:
    shape = f"{len(plan.layers)} layers × {plan.heads} heads × {len(plan.phases)} phases"
    size = f"grid {_times(str(plan.grid))}, blocks of {plan.block[0]}×{plan.block[1]} tokens"
    return f"{plan.model_class}: {shape}, {size}, {_percent(plan.density)} of the blocks kept"


def _short(paths: Iterable[str]) -> list[str]:
    """Module paths without the leading and trailing parts that all share: blocks.3.attn1 → 3."""
    parts = [path.split(".") for path in paths]
    same = [len(set(column)) == 1 for column in zip(*parts, strict=False)]
    same_behind = [len(set(column)) == 1 for column in zip(*(part[::-1] for part in parts), strict=False)]
    ahead, behind = (flags.index(False) if False in flags else 0 for flags in (same, same_behind))
    return [".".join(part[ahead : len(part) - behind]) for part in parts]


def _planned(plan: Mapping[str, TransformerPlan]) -> float:
    return statistics.fmean(part.density for part in plan.values())


def _median_seconds(clips: Sequence[Comparison]) -> tuple[float, float]:
    return statistics.median(clip.dense_seconds for clip in clips), statistics.median(clip.sparse_seconds for clip in clips)


def _count(row: Mapping[str, Any], kind: str) -> int:
    return int(row.get(kind) or 0)


# Numbers as text


def _decibels(psnr: float, unit: str = " dB") -> str:
    return f"{psnr:.1f}{unit}" if math.isfinite(psnr) else "∞ (identical)"


def _mean_spread(summary: Summary, form: str) -> str:
    if math.isinf(summary.mean):
        return "∞"
    return form.format(summary.mean) + (f" ± {form.format(summary.spread)}" if summary.interval else "")


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _times(text: str) -> str:
    return text.replace("x", "×")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# Pictures


def _colour(order: str) -> str:
    return ORDER_COLOURS.get(order, OTHER_COLOUR)


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


@cache
def _palette() -> list[int]:
    """The ramp in 255 steps, and one entry for dropped blocks."""
    anchors = np.array([_rgb(colour) for colour in RAMP], dtype=float)
    at = np.linspace(0, len(RAMP) - 1, 255)
    steps = np.stack([np.interp(at, range(len(RAMP)), channel) for channel in anchors.T], axis=1)
    return [*steps.round().astype(int).flatten().tolist(), 0, 0, 0]


def _map_image(values: Tensor, kept: Tensor | None, scale: tuple[float, float], label: str) -> Markup:
    low, high = (math.log(bound) for bound in scale)
    shades = ((_pooled(values).clamp(min=scale[0]).log() - low) / (high - low)).clamp(0, 1)
    levels = (shades * 254).round().to(torch.uint8)
    if kept is not None:
        levels[_pooled(kept) < 0.5] = DROPPED
    picture = Image.fromarray(levels.numpy())
    picture.putpalette(_palette())
    return _tag("img", class_="map", alt=label, src=data_uri(_png(picture, transparency=DROPPED), "image/png"))


def _mask_picture(kept: Tensor, order: str, side: int) -> Image.Image:
    """Kept blocks in the order's colour, the others transparent, at most `side` pixels wide and high."""
    alpha = (_pooled(kept, side) * 255).round().to(torch.uint8).numpy()
    picture = Image.new("RGBA", alpha.shape[::-1], (*_rgb(_colour(order)), 0))
    picture.putalpha(Image.fromarray(alpha))
    return picture


def _pooled(values: Tensor, largest: int = LARGEST_MAP) -> Tensor:
    size = [min(extent, largest) for extent in values.shape]
    return adaptive_avg_pool2d(values.float().cpu()[None, None], size)[0, 0]


def _png(picture: Image.Image, **settings) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True, **settings)
    return buffer.getvalue()
