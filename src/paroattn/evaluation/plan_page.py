"""A plan as pictures: its orders, densities and masks as a page, as sections of a report, and as one picture."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..grid import ORDERS, TILES
from ..plan.curve import curve_of
from ..plan.plan import TransformerPlan
from .curve_page import curve_section
from .markup import Markup, details, join, section, table, tag, write_page
from .pictures import colour_of, mask_picture, png
from .video import check_file, data_uri, replacing
from .wording import percent, plural, short, times

MASKS_PIXELS = 600_000
THUMBNAIL = (16, 64)
AXES = {"F": "frame", "H": "row", "W": "column"}


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
    return write_page(
        path, title, [header, _of_each(plan, (_curve, _orders, _densities, _precisions, partial(_masks, phase=phase)))]
    )


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
    path = check_picture(path)
    parts = [draw_plan(part, phase=phase) for part in plan.values()]
    canvas = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    for index, part in enumerate(parts):
        canvas.paste(part, (0, sum(above.height for above in parts[:index])))
    with replacing(path) as target:
        canvas.save(target)
    return path


def check_picture(path: str | os.PathLike) -> Path:
    """Raise before any work if `write_plan_picture` would fail for this path; the errors are the same."""
    path = check_file(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"a picture of a plan is written as .png; got {path.name!r}")
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
    for row, (name, layer) in enumerate(zip(short(plan.layers), plan.layers.values(), strict=True)):
        pen.text((gap, top + row * high + side // 2 - 8), f"layer {name}", "#5b646d", small)
        kept = layer.mask[phase].dense()
        for head, order in enumerate(layer.orders):
            corner = (left + head * wide, top + row * high)
            picture = mask_picture(kept[head], order, side).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste("#f0f1f2", (*corner, corner[0] + side, corner[1] + side))
            canvas.paste(picture, corner, picture)
            caption = f"{order}  {percent(kept[head].double().mean().item())}"
            pen.text((corner[0], corner[1] + side + 2), caption, "#1c2126", small)
    return canvas


def plan_sections(plan: Mapping[str, TransformerPlan]) -> Markup:
    """The curve where it is known, orders, densities and folded masks of every component."""
    return _of_each(plan, (_curve, _orders, _densities, _precisions, _masks_folded))


_PlanSection = Callable[[TransformerPlan, str], Markup]


def _of_each(plan: Mapping[str, TransformerPlan], draws: Sequence[_PlanSection]) -> Markup:
    """Sections for every component, named after it where there are several."""
    several = len(plan) > 1
    return join(draw(part, f" – {name}" if several else "") for name, part in plan.items() for draw in draws)


def _curve(plan: TransformerPlan, of: str) -> Markup:
    """Empty where the plan does not hold its curve."""
    curve = curve_of(plan.made)
    return join([]) if curve is None else curve_section(curve, of)


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
        join([key, " ", times(order)]),
        tag("td", _meaning(order), class_="text quiet"),
        tag("td", bar, class_="bar"),
        count,
    ]


def _order_cell(order: str) -> Markup:
    return tag("td", times(order), class_="order", style=f"--order: {colour_of(order)}")


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
        (index, f"{starts[index]:.2f} … {phase.lowest_noise:.2f}", percent(phase.share), percent(density, 1))
        for index, (phase, density) in enumerate(zip(plan.phases, by_phase.mean((0, 2)).tolist(), strict=True))
    ]
    columns = ("phase", "noise level", "share of steps", "blocks kept")
    phases = table(columns, rows, caption="Phases of the schedule; each has its own masks")
    lead = f"Blocks of {_block(plan)} tokens. Heads and phases that lose more by dropping blocks keep more of them."
    return section(f"Density{of}", lead, tag("div", grid, phases, class_="beside"))


def _density_cell(mean: Tensor, phases: Tensor, top: Tensor) -> Markup:
    by_phase = "by phase: " + ", ".join(percent(density) for density in phases.tolist())
    level = f"--level: {4 + 46 * float(mean / top):.0f}%"
    return tag("td", f"{100 * float(mean):.0f}", class_="density", style=level, title=by_phase)


def _precisions(plan: TransformerPlan, of: str) -> Markup:
    """Empty where all heads have one precision."""
    shares = plan.precision_shares()
    if len(shares) == 1:
        return join([])
    cells = [
        [tag("td", ", ".join(dict.fromkeys(each)), class_="order") for each in zip(*layer.precision, strict=True)]
        for layer in plan.layers.values()
    ]
    lead = ", ".join(f"{percent(share)} of the heads in {name}" for name, share in shares.items())
    return section(f"Precision{of}", f"{lead}.", _by_head(plan, cells, "Precision of each head, high noise first"))


def _masks(plan: TransformerPlan, of: str, phase: int = 0) -> Markup:
    smallest, largest = THUMBNAIL
    side = max(smallest, min(largest, int((MASKS_PIXELS / (plan.heads * len(plan.layers))) ** 0.5)))
    cells = []
    for path, layer in plan.layers.items():
        kept = layer.mask[phase].dense()
        cells.append([_mask_cell(path, head, order, kept[head], side) for head, order in enumerate(layer.orders)])
    grid = _by_head(plan, cells, "Query blocks down, key blocks across; colour by order")
    return section(
        f"Masks{of}", f"Kept blocks of every head in phase {phase} of {plural(len(plan.phases), 'phase')}.", grid
    )


def _mask_cell(path: str, head: int, order: str, kept: Tensor, side: int) -> Markup:
    caption = f"{times(order)} · {percent(kept.double().mean().item())}"
    picture = data_uri(png(mask_picture(kept, order, side), optimize=True), "image/png")
    return tag(
        "td", tag("img", alt=f"{path}, head {head}: {caption}", src=picture), tag("span", caption), class_="mask"
    )


def _masks_folded(plan: TransformerPlan, of: str) -> Markup:
    return details(f"Masks of all {plan.heads * len(plan.layers)} heads{of}", _masks(plan, of))


def _by_head(plan: TransformerPlan, cells: Iterable[Iterable[Markup]], caption: str) -> Markup:
    """A table of layers × heads."""
    names = [tag("span", name, title=path) for name, path in zip(short(plan.layers), plan.layers, strict=True)]
    rows = [[name, *row] for name, row in zip(names, cells, strict=True)]
    return table(["layer", *(f"h{head}" for head in range(plan.heads))], rows, caption=caption, class_="cells")


def _described(plan: TransformerPlan) -> str:
    shape = f"{len(plan.layers)} layers × {plan.heads} heads × {plural(len(plan.phases), 'phase')}"
    size = f"grid {times(str(plan.grid))}, blocks of {_block(plan)} tokens"
    shares = plan.precision_shares()
    formats = ", ".join(name if len(shares) == 1 else f"{percent(share)} {name}" for name, share in shares.items())
    return f"{plan.model_class}: {shape}, {size}, {percent(plan.density)} of the blocks kept, heads in {formats}"


def _block(plan: TransformerPlan) -> str:
    return "×".join(map(str, plan.block))


def _meaning(order: str) -> str:
    if order not in ORDERS:
        counts = zip(map(int, order.split("x")), ("frame", "row", "column"), strict=True)
        return "boxes of " + " × ".join(plural(count, axis) for count, axis in counts)
    return " → ".join(AXES[axis] for axis in order) + (" (the model's own)" if order == ORDERS[0] else "")
