"""One self-contained HTML file on what a plan does: clips beside their dense twins, orders, densities, times."""

import math
import os
import platform
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .. import __version__
from ..grid import ORDERS, TILES
from ..plan.plan import TransformerPlan
from .fidelity import Comparison, Summary, summarise, summarise_metrics
from .markup import Markup, details, join, section, table, tag, terms, write_page
from .pictures import RAMP, colour_of, map_picture, mask_picture, png
from .video import DEFAULT_FPS, SpriteSheet, check_file, data_uri, difference, replacing, sprite_sheet

DIFFERENCE_GAIN = 4
SHOWN_CLIPS = 6
CLIPS_BUDGET = 2_000_000
MASKS_PIXELS = 600_000
THUMBNAIL = (16, 64)
PACKAGES = ("torch", "diffusers", "triton")

AXES = {"F": "frame", "H": "row", "W": "column"}
METRICS = {"psnr": ("PSNR, dB", ".1f"), "ssim": ("SSIM", ".3f"), "cosine": ("cosine similarity", ".4f")}


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
            raise ValueError(f"maps must be 2-D, kept like after; got before, after and kept of shapes {shapes}")

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
        introduction: A sentence or two ahead of the headline numbers, which are computed.
        clips: All pairs. Those that still hold frames can be shown: the first few, and always the worst.
        plan: Plans by component, such as a `Plan`.
        maps: A few instructive heads.
        execution: What ran: `{"layers": rows}`, each with "layer", "phase" (None for all), "density" or
            "density_executed", and "sparse_calls" and "dense_calls" as numbers or as numbers by reason.
        timings: Seconds by what took them; clips are added by themselves.
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


def write_plan(
    plan: Mapping[str, TransformerPlan], path: str | os.PathLike, *, title: str = "Attention plan", phase: int = 0
) -> Path:
    """Write a plan as one HTML file: orders, densities and the mask of every head.

    Args:
        plan: Plans by component, such as a `Plan`.
        path: Where to.
        title: Heading.
        phase: Whose masks are drawn.

    Raises:
        IsADirectoryError, PermissionError: If the file cannot be written; before anything is drawn.
    """
    path = check_file(path)
    header = tag("header", tag("h1", title), *(tag("p", _described(part)) for part in plan.values()))
    return write_page(path, title, [header, _of_each(plan, (_orders, _densities, partial(_masks, phase=phase)))])


def write_plan_picture(plan: Mapping[str, TransformerPlan], path: str | os.PathLike, *, phase: int = 0) -> Path:
    """Write the picture of `draw_plan` as a .png file, all components below each other.

    Args:
        plan: Plans by component, such as a `Plan`.
        path: Where to.
        phase: Whose masks are drawn.

    Raises:
        ValueError: If the file is no .png.
        IsADirectoryError, PermissionError: If the file cannot be written; before anything is drawn.
    """
    path = check_file(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"a picture of a plan is written as .png; got {path.name!r}")
    parts = [draw_plan(part, phase=phase) for part in plan.values()]
    canvas = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    for index, part in enumerate(parts):
        canvas.paste(part, (0, sum(above.height for above in parts[:index])))
    with replacing(path) as target:
        canvas.save(target)
    return path


def draw_plan(plan: TransformerPlan, *, phase: int = 0) -> Image.Image:
    """Draw the mask of every head in one picture: a row per layer, tinted by order, with order and density below.

    Args:
        plan: The plan.
        phase: Which phase's masks.
    """
    side, gap, left, top = 96, 14, 96, 80
    wide, high = side + gap, side + gap + 18
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    heading = _described(plan).replace("×", "x").replace(": ", "\n", 1)  # Pillow's own font has no ×
    widest = max(font.getlength(line) for line in heading.split("\n"))
    size = (max(left + plan.heads * wide, 2 * gap + round(widest)), top + len(plan.layers) * high)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((gap, 10), heading, "#1c2126", font)
    for head in range(plan.heads):
        pen.text((left + head * wide, top - 20), f"head {head}", "#5b646d", small)
    for row, (name, layer) in enumerate(zip(_short(plan.layers), plan.layers.values(), strict=True)):
        pen.text((gap, top + row * high + side // 2 - 8), f"layer {name}", "#5b646d", small)
        kept = layer.mask[phase].dense()
        for head, order in enumerate(layer.orders):
            corner = (left + head * wide, top + row * high)
            picture = mask_picture(kept[head], order, side).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste("#f0f1f2", (*corner, corner[0] + side, corner[1] + side))
            canvas.paste(picture, corner, picture)
            caption = f"{order}  {_percent(kept[head].double().mean().item())}"
            pen.text((corner[0], corner[1] + side + 2), caption, "#1c2126", small)
    return canvas


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


# Sections about the clips


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
        close = f"reaches {_mean_spread(psnr, '.1f')} dB PSNR against dense attention{worst}"
        dense, sparse = _median_seconds(report.clips)
        said.append(
            f"{pairs} with the same prompt and seed, PAROAttention "
            f"{close if psnr.infinite < count else 'gives exactly what dense attention gives'} and makes a clip in "
            f"{_duration(sparse)} instead of {_duration(dense)}, {dense / sparse:.2f} times as fast."
        )
    if report.plan:
        orders = [order for part in report.plan.values() for layer in part.layers.values() for order in layer.orders]
        moved = sum(order != ORDERS[0] for order in orders)
        said.append(
            f"The plan keeps {_percent(_planned(report.plan))} of the attention blocks; {moved} of {len(orders)} heads "
            "read their tokens in another order than the model's own."
        )
    return " ".join(said)


def _key_figures(report: ReportData) -> Markup:
    figures: dict[str, tuple[str, str]] = {}
    if report.clips:
        psnr = summarise(clip.fidelity.psnr for clip in report.clips)
        dense, sparse = _median_seconds(report.clips)
        figures["Mean PSNR"] = (_decibels(psnr.mean), f"against dense, {_plural(psnr.count, 'pair')}")
        if psnr.count > 1:
            figures["Worst clip"] = (_decibels(psnr.lowest), "PSNR against dense")
        figures["Speed"] = (f"{dense / sparse:.2f}×", "whole clip, dense = 1")
    if report.plan:
        figures["Blocks kept"] = (_percent(_planned(report.plan)), "of all, as planned")
    shown = {name: join([value, tag("div", unit, class_="small")]) for name, (value, unit) in figures.items()}
    return terms(shown, class_="figures") if shown else Markup()


def _clips(report: ReportData) -> Markup:
    worst = min(report.clips, key=lambda clip: clip.fidelity.psnr, default=None)
    shown = _chosen(report.clips, worst)
    if not shown:
        return Markup()
    trios = [_sheets(clip, report.fps, CLIPS_BUDGET // (3 * len(shown))) for clip in shown]
    badge = tag("span", "worst pair", class_="badge") if len(report.clips) > 1 else ""
    blocks = [_clip(clip, trio, badge if clip is worst else "") for clip, trio in zip(shown, trios, strict=True)]
    lead = (
        "The same prompt and seed, once with dense attention and once with the plan, in step. The third panel is the "
        f"difference: black where both agree, white where a colour is off by 1/{DIFFERENCE_GAIN} of its range or more."
    )
    if len(shown) < len(report.clips):
        lead += f" {len(shown)} of {len(report.clips)} pairs are shown" + (
            ", the worst among them." if worst in shown else "."
        )
    return section("Clips", lead, tag("div", _player(max(trio[0].frames for trio in trios)), *blocks))


def _chosen(clips: Sequence[Comparison], worst: Comparison | None) -> list[Comparison]:
    """The first pairs whose frames are at hand, and the worst."""
    drawable = [clip for clip in clips if clip.dense is not None and clip.sparse is not None]
    late = [clip for clip in drawable[SHOWN_CLIPS:] if clip is worst]
    return drawable[: SHOWN_CLIPS - len(late)] + late


def _sheets(clip: Comparison, fps: float, budget: int) -> list[SpriteSheet]:
    assert clip.dense is not None and clip.sparse is not None
    trio = (clip.dense, clip.sparse, difference(clip.dense, clip.sparse, DIFFERENCE_GAIN))
    return [sprite_sheet(frames, fps=fps, budget=budget) for frames in trio]


def _player(frames: int) -> Markup:
    start = frames // 2 if frames > 1 else 0
    slider = tag("input", type="range", id="time", min=0, max=frames - 1, value=start, step=1, aria_label="Frame")
    readout = tag("span", f"{start + 1} / {frames}", id="frame", aria_hidden="true")
    button = tag("button", "Pause", type="button", id="play")
    return tag(
        "div", button, tag("label", slider, readout), class_="player", role="group", aria_label="Player for all clips"
    )


def _clip(clip: Comparison, trio: Sequence[SpriteSheet], badge: str) -> Markup:
    labels = ("Dense", "PAROAttention", f"Difference × {DIFFERENCE_GAIN}")
    panels = [_panel(sheet, label, clip.prompt) for label, sheet in zip(labels, trio, strict=True)]
    measures = {
        "PSNR": _decibels(clip.fidelity.psnr),
        "SSIM": f"{clip.fidelity.ssim:.3f}",
        "cosine": f"{clip.fidelity.cosine:.4f}",
        "dense": _duration(clip.dense_seconds),
        "PAROAttention": _duration(clip.sparse_seconds),
        "speed": f"{clip.speed_up:.2f}×",
        "seed": clip.seed,
    }
    heading = tag("h3", clip.prompt, " ", badge)
    return tag(
        "article", heading, tag("div", *panels, class_="trio"), terms(measures, class_="measures"), class_="clip"
    )


def _panel(sheet: SpriteSheet, label: str, prompt: str) -> Markup:
    canvas = tag(
        "canvas", role="img", aria_label=f"{label}: {prompt}", width=sheet.width, height=sheet.height,
        style=f"aspect-ratio: {sheet.width} / {sheet.height}",
        data_frames=sheet.frames, data_columns=sheet.columns, data_fps=sheet.fps, data_width=sheet.width,
        data_height=sheet.height, data_cell_width=sheet.cell[0], data_cell_height=sheet.cell[1],
    )  # fmt: skip
    frames = tag("img", class_="sheet", alt=f"All frames, {label}: {prompt}", src=sheet.uri)
    return tag("figure", canvas, frames, tag("figcaption", label))


def _fidelity(report: ReportData) -> Markup:
    if not report.clips:
        return Markup()
    metrics = summarise_metrics([clip.fidelity for clip in report.clips])
    rows = [_metric_row(metrics[name], label, form) for name, (label, form) in METRICS.items()]
    caption = f"Over {_plural(len(report.clips), 'pair')}; spread is the standard deviation over clips"
    if identical := metrics["psnr"].infinite:
        caption += f". The mean PSNR leaves out {_plural(identical, 'pair')} of identical clips"
    summary = table(
        ("", "mean ± spread", "95 % interval of the mean", "worst clip", "best clip"), rows, caption=caption
    )
    columns = ("", "seed", "PSNR, dB", "SSIM", "cosine", "dense", "PAROAttention", "speed")
    pairs = table(columns, map(_pair_row, report.clips), caption="Every pair")
    lead = (
        "How close clips stay to their dense twins. PSNR over all frames, values in −1…1; SSIM is the mean over frames."
    )
    return section("Fidelity", lead, summary, details("Every pair", pairs))


def _metric_row(summary: Summary, label: str, form: str) -> list[str]:
    interval = " … ".join(_number(bound, form) for bound in summary.interval) if summary.interval else "–"
    return [label, _mean_spread(summary, form), interval, _number(summary.lowest, form), _number(summary.highest, form)]


def _pair_row(clip: Comparison) -> list[Any]:
    metrics = [_number(getattr(clip.fidelity, name), form) for name, (_, form) in METRICS.items()]
    seconds = [_duration(clip.dense_seconds), _duration(clip.sparse_seconds)]
    return [tag("span", clip.prompt, class_="prompt"), clip.seed, *metrics, *seconds, f"{clip.speed_up:.2f}×"]


# Sections about attention


def _maps(report: ReportData) -> Markup:
    if not report.maps:
        return Markup()
    low = 0.1 / max(part.after.shape[1] for part in report.maps)
    high = max(float(values.max()) for part in report.maps for values in (part.before, part.after))
    scale = (low, max(high, 10 * low))
    lead = (
        "One pixel is one block: brightness is the share of a query block's attention (row) that falls on a key block "
        "(column), on a logarithmic scale. The order gathers what a head reads into few blocks; flat grey blocks are "
        "skipped."
    )
    heads = tag("div", *(_head(part, scale) for part in report.maps), class_="heads")
    return section("Attention before and after reordering", lead, _ramp(*scale), heads)


def _ramp(low: float, high: float) -> Markup:
    ticks = (f"≤ {_percent(low, 2)}", _percent(math.sqrt(low * high), 1), _percent(high))
    strip = tag("div", style=f"background: linear-gradient(90deg, {', '.join(RAMP)})")
    label = f"Colour scale, logarithmic, from {ticks[0]} to {ticks[2]}"
    return tag(
        "div",
        strip,
        tag("p", *(tag("span", t) for t in ticks), class_="small"),
        class_="ramp",
        role="img",
        aria_label=label,
    )


def _head(part: AttentionMap, scale: tuple[float, float]) -> Markup:
    name = f"{part.layer}, head {part.head}"
    share = f"{_percent(part.density)} of the blocks, {_percent(part.mass_kept, 1)} of the attention"
    panels = (
        (f"Model's order, {ORDERS[0]}", part.before, None),
        (f"Order {_times(part.order)}", part.after, None),
        (f"Kept: {share}", part.after, part.kept),
    )
    figures = []
    for label, values, kept in panels:
        picture = data_uri(map_picture(values, kept, scale), "image/png")
        image = tag("img", class_="map", alt=f"{name}: {label}", src=picture)
        figures.append(tag("figure", image, tag("figcaption", label)))
    return tag("div", tag("h3", name), tag("div", *figures, class_="trio"), class_="head")


def _orders(plan: TransformerPlan, of: str) -> Markup:
    counts = Counter(order for layer in plan.layers.values() for order in layer.orders)
    listed = dict.fromkeys((*ORDERS, *(tile for tile in TILES if counts[tile]), *sorted(counts)))
    columns = ("order", " tokens, slowest axis first", "", "heads")
    bars = [_order_bar(order, counts[order], max(counts.values())) for order in listed]
    chart = table(columns, bars, caption=f"How many of {counts.total()} heads", class_="bars")
    grid = _by_head(
        plan, [list(map(_order_cell, layer.orders)) for layer in plan.layers.values()], "Order of each head"
    )
    lead = "The axis order in which each head reads the tokens of the video."
    return section(f"Orders chosen{of}", lead, tag("div", chart, grid, class_="beside"))


def _order_bar(order: str, count: int, widest: int) -> list[Any]:
    key = tag("span", class_="key", style=f"background: {colour_of(order)}", aria_hidden="true")
    bar = tag("span", style=f"width: {100 * count / widest:.1f}%; background: {colour_of(order)}")
    return [
        join([key, " ", _times(order)]),
        tag("td", _meaning(order), class_="text quiet"),
        tag("td", bar, class_="bar"),
        count,
    ]


def _order_cell(order: str) -> Markup:
    return tag("td", _times(order), class_="order", style=f"--order: {colour_of(order)}")


def _densities(plan: TransformerPlan, of: str) -> Markup:
    by_phase = plan.head_density()
    shares = torch.tensor([phase.share for phase in plan.phases], dtype=by_phase.dtype)
    mean = torch.einsum("lph,p->lh", by_phase, shares)
    cells = [
        [_density_cell(mean[layer, head], by_phase[layer, :, head], mean.max()) for head in range(plan.heads)]
        for layer in range(len(plan.layers))
    ]
    grid = _by_head(plan, cells, "Kept blocks of each head in percent, mean over the schedule")
    starts = [1.0, *(phase.lowest_noise for phase in plan.phases)]
    rows = [
        (index, f"{starts[index]:.2f} … {phase.lowest_noise:.2f}", _percent(phase.share), _percent(density, 1))
        for index, (phase, density) in enumerate(zip(plan.phases, by_phase.mean((0, 2)).tolist(), strict=True))
    ]
    columns = ("phase", "noise level", "share of steps", "blocks kept")
    phases = table(columns, rows, caption="Phases of the schedule; each has its own masks")
    lead = f"Blocks of {_block(plan)} tokens. Heads and phases that lose more by dropping blocks keep more of them."
    return section(f"Density{of}", lead, tag("div", grid, phases, class_="beside"))


def _density_cell(mean: Tensor, phases: Tensor, top: Tensor) -> Markup:
    by_phase = "by phase: " + ", ".join(_percent(density) for density in phases.tolist())
    level = f"--level: {4 + 46 * float(mean / top):.0f}%"
    return tag("td", f"{100 * float(mean):.0f}", class_="density", style=level, title=by_phase)


def _masks(plan: TransformerPlan, of: str, phase: int = 0) -> Markup:
    smallest, largest = THUMBNAIL
    side = max(smallest, min(largest, int((MASKS_PIXELS / (plan.heads * len(plan.layers))) ** 0.5)))
    cells = []
    for path, layer in plan.layers.items():
        kept = layer.mask[phase].dense()
        cells.append([_mask_cell(path, head, order, kept[head], side) for head, order in enumerate(layer.orders)])
    grid = _by_head(plan, cells, "Query blocks down, key blocks across; colour by order")
    return section(
        f"Masks{of}", f"Kept blocks of every head in phase {phase} of {_plural(len(plan.phases), 'phase')}.", grid
    )


def _mask_cell(path: str, head: int, order: str, kept: Tensor, side: int) -> Markup:
    caption = f"{_times(order)} · {_percent(kept.double().mean().item())}"
    picture = data_uri(png(mask_picture(kept, order, side), optimize=True), "image/png")
    return tag(
        "td", tag("img", alt=f"{path}, head {head}: {caption}", src=picture), tag("span", caption), class_="mask"
    )


def _masks_folded(plan: TransformerPlan, of: str) -> Markup:
    return details(f"Masks of all {plan.heads * len(plan.layers)} heads{of}", _masks(plan, of))


def _by_head(plan: TransformerPlan, cells: Iterable[Iterable[Markup]], caption: str) -> Markup:
    """A table of layers × heads."""
    names = [tag("span", name, title=path) for name, path in zip(_short(plan.layers), plan.layers, strict=True)]
    rows = [[name, *row] for name, row in zip(names, cells, strict=True)]
    return table(["layer", *(f"h{head}" for head in range(plan.heads))], rows, caption=caption, class_="cells")


_PlanSection = Callable[[TransformerPlan, str], Markup]


def _of_each(plan: Mapping[str, TransformerPlan], draws: Sequence[_PlanSection]) -> Markup:
    """Sections for every component, named after it where there are several."""
    several = len(plan) > 1
    return join(draw(part, f" – {name}" if several else "") for name, part in plan.items() for draw in draws)


def _plans(report: ReportData) -> Markup:
    return _of_each(report.plan, (_orders, _densities, _masks_folded))


# Sections about the run


def _execution(report: ReportData) -> Markup:
    by_layer: dict[str, list[Mapping[str, Any]]] = {}
    for row in report.execution.get("layers", ()):
        by_layer.setdefault(str(row.get("layer", "–")), []).append(row)
    if not by_layer:
        return Markup()
    everything = [row for rows in by_layer.values() for row in rows]
    phases = sorted({row["phase"] for row in everything if row.get("phase") is not None})
    lines = [_execution_row(name, phases, rows) for name, rows in zip(_short(by_layer), by_layer.values(), strict=True)]
    columns = ("layer", *(f"phase {phase}" for phase in phases), "sparse calls", "dense calls", " why dense")
    lead = (
        f"Density as executed, text and edge blocks included. Attention ran {_calls(everything, 'sparse_calls')} times "
        f"sparse and {_calls(everything, 'dense_calls')} times dense."
    )
    return section("What ran", lead, table(columns, lines, caption="Executed density and calls by layer and phase"))


def _execution_row(name: str, phases: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    found = {row.get("phase"): row.get("density_executed", row.get("density")) for row in rows}
    densities = ["–" if found.get(phase) is None else _percent(found[phase], 1) for phase in phases]
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


def _run(report: ReportData) -> Markup:
    seconds = dict(report.timings)
    if report.clips:
        dense, sparse = _median_seconds(report.clips)
        seconds |= {"One clip, dense (median)": dense, "One clip, PAROAttention (median)": sparse}
    rows = [(name, _duration(value)) for name, value in seconds.items()]
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


_REPORT = (_header, _clips, _fidelity, _maps, _plans, _execution, _run, _command, _footer)


# Words and numbers


def _described(plan: TransformerPlan) -> str:
    shape = f"{len(plan.layers)} layers × {plan.heads} heads × {_plural(len(plan.phases), 'phase')}"
    size = f"grid {_times(str(plan.grid))}, blocks of {_block(plan)} tokens"
    return f"{plan.model_class}: {shape}, {size}, {_percent(plan.density)} of the blocks kept"


def _block(plan: TransformerPlan) -> str:
    return "×".join(map(str, plan.block))


def _meaning(order: str) -> str:
    if order not in ORDERS:
        return "boxes of {} frames × {} rows × {} columns".format(*order.split("x"))
    return " → ".join(AXES[axis] for axis in order) + (" (the model's own)" if order == ORDERS[0] else "")


def _short(paths: Iterable[str]) -> list[str]:
    """Module paths without the leading and trailing parts that all share: blocks.3.attn1 becomes 3."""
    parts = [path.split(".") for path in paths]
    ahead, behind = _shared(parts), _shared([part[::-1] for part in parts])
    return [".".join(part[ahead : len(part) - behind]) for part in parts]


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """How many leading parts all share; none if they share everything."""
    differs = [len(set(column)) > 1 for column in zip(*parts, strict=False)]
    return differs.index(True) if True in differs else 0


def _planned(plan: Mapping[str, TransformerPlan]) -> float:
    return statistics.fmean(part.density for part in plan.values())


def _median_seconds(clips: Sequence[Comparison]) -> tuple[float, float]:
    dense, sparse = ([getattr(clip, name) for clip in clips] for name in ("dense_seconds", "sparse_seconds"))
    return statistics.median(dense), statistics.median(sparse)


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "∞"


def _decibels(psnr: float) -> str:
    return f"{psnr:.1f} dB" if math.isfinite(psnr) else "identical"


def _mean_spread(summary: Summary, form: str) -> str:
    spread = f" ± {_number(summary.spread, form)}" if summary.interval else ""
    return _number(summary.mean, form) + spread


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _times(text: str) -> str:
    return text.replace("x", "×")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
