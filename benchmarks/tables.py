"""Fills the result tables of README and docs from benchmarks/results: python benchmarks/tables.py [--check]."""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/method.md", "docs/benchmarks.md")
CONTESTANTS = (
    *(("paroattn", density) for density in (1.0, 0.5, 0.3, 0.2)),
    ("sage2", 1.0),
    ("sparge", 0.2),
    ("flex", 0.2),
    ("paro-authors", 0.2),
)
COMPARED = (
    "dense", "paroattn", "none", "paper", "local-window", "spatial-temporal", "radial", "dynamic-topk",
    "dynamic-topk+reorder", "oracle", "oracle+reorder",
)  # fmt: skip
GPUS = ("h200", "h100")
BLOCK = re.compile(r"(<!-- results:([\w-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)
RULE = ("order_score", "mask_score", "budget", "sensitivity")
RULE_NAMES = {
    ("none", "mass", "global", "none"): "no reorder, mass, one threshold",
    ("none", "mass", "per_head", "none"): "no reorder, mass, per head",
    ("none", "output_error", "layer_normalised", "none"): "no reorder, output error",
    ("none", "output_error", "layer_normalised", "phases"): "no reorder, output error, weighed by phase",
    ("paper", "mass", "global", "none"): "paper's score, mass, one threshold",
    ("paper", "mass", "per_head", "none"): "paper's score, mass, per head",
    ("mass", "mass", "global", "none"): "mass, one threshold",
    ("mass", "mass", "per_head", "none"): "mass, per head",
    ("output_error", "output_error", "global", "none"): "output error, one threshold",
    ("output_error", "output_error", "per_head", "none"): "output error, per head",
    ("output_error", "output_error", "layer_normalised", "none"): "output error, layer-normalised",
    ("output_error", "output_error", "layer_normalised", "layers"): "output error, weighed by phase and layer",
    ("output_error", "output_error", "layer_normalised", "phases"): "**output error, weighed by phase (default)**",
}


def rows_of(name: str) -> list[dict]:
    """Rows of a result file; none if it does not exist."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *lines))


def where(rows: list[dict]) -> str:
    """Devices, versions and dates of some rows, in words."""
    about = sorted({f"{row['device']}, PyTorch {row['torch']}, {row['date']}" for row in rows})
    return "; ".join(about)


def fidelity() -> str:
    """Density × rule at 16-bit precision, then precision at density 1."""
    rows = rows_of("fidelity_demo")
    sparse = [row for row in rows if row["precision"] == "bf16" and row["density_target"] < 1]
    if not sparse:
        return "Not measured yet.\n"
    densities = sorted({row["density_target"] for row in sparse}, reverse=True)
    lines = []
    for rule, name in RULE_NAMES.items():
        for orders in ("six", "six+tiles"):
            mine = {
                row["density_target"]: row
                for row in sparse
                if tuple(row[name] for name in RULE) == rule and row["orders"] == orders
            }
            if mine:
                cells = [
                    f"{mine[d]['psnr_mean']:.1f} ± {mine[d]['psnr_std']:.1f}, {mine[d]['psnr_min']:.1f}"
                    if d in mine
                    else "–"
                    for d in densities
                ]
                lines.append([name + (" + tiles" if orders != "six" else ""), *cells])
    first = sparse[0]
    text = table(["PSNR against dense, dB: mean ± spread, worst clip", *(f"density {d:g}" for d in densities)], lines)
    text += (
        f"\nBundled model, {first['clips']} clips from prompts that the plan has not seen, {first['steps']} "
        f"steps, none of them dense, {first['phases']} phases, blocks of {first['block']}, bf16. {where(sparse)}.\n"
    )
    quantised = [row for row in rows if row["density_target"] == 1 or row["precision"] != "bf16"]
    if quantised:
        lines = [
            [
                row["precision"],
                f"{row['density_executed']:.2f}",
                f"{row['psnr_mean']:.1f} ± {row['psnr_std']:.1f}",
                f"{row['ssim_mean']:.4f}",
            ]
            for row in quantised
        ]
        text += (
            "\n"
            + table(["precision", "density", "PSNR, dB", "SSIM"], lines)
            + f"\nThe same clips. {where(quantised)}.\n"
        )
    return text


def comparison() -> str:
    """Rules that choose blocks, at equal density: one line per method and density, without and with dense steps."""
    rows = rows_of("fidelity")
    text = ""
    for warmup in sorted({row["dense_warmup"] for row in rows}):
        mine = [row for row in rows if row["dense_warmup"] == warmup]
        ours = {row["density_target"]: row for row in mine if row["method"] == "paroattn"}
        densities = sorted({row["density_target"] for row in mine}, reverse=True)
        lines = [
            comparison_cells(row, ours.get(density))
            for density in densities
            for method in COMPARED
            for row in mine
            if (row["method"], row["density_target"]) == (method, density)
        ]
        dense = f"the first {100 * warmup:g} % of the steps dense" if warmup else "no step dense"
        head = ["method, density", "executed", "PSNR, dB", "SSIM", "worst clip", "PSNR − ours, clip by clip"]
        first = mine[0]
        text += table(head, lines) + (
            f"\nBundled model, {first['clips']} clips of {first['frames']} frames, {first['steps']} steps, {dense}; "
            f"blocks of {first['block']}, {first['precision']}. In brackets 95 % of Student's t. {where(mine)}.\n\n"
        )
    return text.removesuffix("\n") or NOTHING


def comparison_cells(row: dict, ours: dict | None) -> list[str]:
    """A line of the comparison; the difference is the mean over the same clips."""
    name = f"{row['method']}, {row['density_target']:g}"
    numbers = [("density_executed", 3), ("psnr_mean", 1), ("ssim_mean", 3), ("psnr_min", 1)]
    cells = ["–" if row[key] is None else f"{row[key]:.{digits}f}" for key, digits in numbers]
    return [name, *cells, paired(row["psnr"], ours["psnr"]) if ours and ours is not row else "–"]


def paired(psnr: list[float | None], ours: list[float | None]) -> str:
    """Mean difference over clips and its 95 % interval; a dash where clips are not the same or are identical."""
    from paroattn.evaluation.fidelity import summarise

    both = [(one, other) for one, other in zip(psnr, ours, strict=False) if one is not None and other is not None]
    if len(psnr) != len(ours) or len(both) < len(ours):
        return "–"
    found = summarise([one - other for one, other in both])
    interval = f" ({decibels(found.interval[0])} … {decibels(found.interval[1])})" if found.interval else ""
    return decibels(found.mean) + interval


def decibels(difference: float) -> str:
    """With its sign, and a minus that is one."""
    return f"{difference:+.1f}".replace("-", "−")


def attention() -> str:
    """The CPU path against PyTorch's dense attention."""
    rows = rows_of("attention_cpu")
    if not rows:
        return "Not measured yet.\n"
    lines = [
        [
            f"{row['tokens']}, {row['block']}",
            f"{row['density']:g}",
            f"{row['ms']:.0f}",
            f"{row['dense_ms']:.0f}",
            f"{row['speedup']:.2f}×",
        ]
        for row in rows
    ]
    first = rows[0]
    head = ["tokens, block", "density", "ms", "dense SDPA, ms", "speed-up"]
    return (
        table(head, lines)
        + f"\nOn a CPU, float32, {first['heads']} heads of {first['head_dim']}; {first['includes']}. {where(rows)}.\n"
    )


def by_product(line: tuple[str, str]) -> bool:
    """Q·K first."""
    return line[0] != "QK"


def four_bits() -> str:
    """Whole samples with every head in INT4: ingredients, cumulative from line to line within a product."""
    rows = rows_of("int4")
    if not rows:
        return NOTHING
    names = {"qk": "Q·K", "pv": "P·V", "qk+pv": "both", "0.5": "density 0.5"}

    def place(what: str) -> int:
        return list(names).index(what.removeprefix("0.5+"))

    lines = [
        ["density 0.5, " * row["what"].startswith("0.5+") + names[row["what"].removeprefix("0.5+")],
         "; ".join(row["ingredients"]) or "–", f"{row['psnr_mean']:.1f}"]
        for row in sorted(rows, key=lambda row: (place(row["what"]), len(row["ingredients"])))
    ]  # fmt: skip
    first = rows[0]
    about = f"{first['clips']} clips of {first['steps']} steps at guidance {first['guidance']:g}"
    return table(["in INT4", "made of", "PSNR, dB"], lines) + f"\n{about}, all heads. {where(rows)}.\n"


def numerics() -> str:
    """Ingredients of the integer formats, cumulative from line to line within a product."""
    rows = rows_of("numerics_cpu")
    if not rows:
        return "Not measured yet.\n"
    found = {(row["product"], row["variant"], row["format"]): row for row in rows}
    lines = []
    for product, variant in sorted(dict.fromkeys((row["product"], row["variant"]) for row in rows), key=by_product):
        cells = [found.get((product, variant, form)) for form in ("int8", "int4")]
        values = [
            f"{'**' * row['shipped']}{row['sqnr_db']:.1f}{'**' * row['shipped']}" if row else "–" for row in cells
        ]
        lines.append([f"{'Q·K' if product == 'QK' else 'P·V'}: {variant}", *values])
    note = f"\nMean over {rows[0]['maps']} layers and steps; what ships is bold. {where(rows)}.\n"
    return table(["signal to noise of the attention output, dB", "INT8", "INT4"], lines) + note


def attention_gpu() -> str:
    """Whole calls at shapes of real models: one line per implementation, one column per density."""

    def cell(row: dict) -> str:
        return (
            f"{row['ms']:.3g} ms, {row['speedup_vs_cudnn']:.2f}×" if row["speedup_vs_cudnn"] else f"{row['ms']:.3g} ms"
        )

    text = ""
    for gpu in GPUS:
        rows = [row for row in rows_of(f"attention_{gpu}") if (row["includes"], row["mask"]) == ("call", "even")]
        text += by_density(rows, ("shape", "impl", "precision", "block"), "time, against cuDNN's dense bf16", cell)
        reasons = {row["impl"]: row["reason"] for row in rows if row["ms"] is None and row["density"] == 1}
        timed = {row["impl"] for row in rows if row["ms"] is not None}
        text += "".join(f"\nNot measured: {impl}, {why}.\n" for impl, why in reasons.items() if impl not in timed)
    return text or NOTHING


def attention_gpu_short() -> str:
    """Speed-up of whole calls over cuDNN's dense bf16: one line per shape, a column for each contestant."""
    text = ""
    for gpu in GPUS:
        rows = [row for row in rows_of(f"attention_{gpu}") if (row["includes"], row["mask"]) == ("call", "even")]
        best: dict[tuple, float] = {}
        for row in (row for row in rows if row["speedup_vs_cudnn"]):
            key = (row["shape"], row["impl"], row["density"])
            best[key] = max(best.get(key, 0.0), row["speedup_vs_cudnn"])
        lines = []
        for shape in dict.fromkeys(row["shape"] for row in rows):
            found = [best.get((shape, *contestant)) for contestant in CONTESTANTS]
            lines.append([shape, *("–" if x is None else f"{x:.2f}×" for x in found)])
        head = ["against dense bf16 of cuDNN", *(f"{impl}, density {density:g}" for impl, density in CONTESTANTS)]
        text += (
            table(head, lines) + f"\nWhole calls, each at its best block and precision. {where(rows)}.\n"
            if rows
            else ""
        )
    return text or NOTHING


def kernels_gpu() -> str:
    """Our kernels alone: one line per precision, block and kind of mask, one column per density."""
    text = ""
    for gpu in GPUS:
        rows = [row for row in rows_of(f"attention_{gpu}") if row["includes"] == "kernel"]
        names = ("shape", "precision", "block", "mask")
        text += by_density(rows, names, "useful TFLOP/s", lambda row: f"{row['useful_tflops']:.0f}")
    return text or NOTHING


def prepare_gpu() -> str:
    """What preparing costs."""
    rows = [row for gpu in GPUS for row in rows_of(f"prepare_{gpu}")]
    lines = [
        [
            f"{row['shape']}, {row['precision']}",
            f"{row['ms']:.3g}",
            f"{row['bound_ms']:.3g}",
            f"{row['over_bound']:.2f}×",
            f"{row['share_of_call']:.1%} at density {row['density']:g}",
        ]
        for row in rows
    ]
    head = ["shape, precision", "ms", "copy of as many bytes, ms", "over it", "share of a whole call"]
    return table(head, lines) + f"\n{where(rows)}.\n" if rows else NOTHING


def forward_name(row: dict) -> str:
    """Model, implementation and, of ours, what it ran with."""
    ours = f" {row['density']:g} {row['precision']} {row['block']}" if row["block"] else ""
    return f"{row['model']}, {row['impl']}{ours}"


def forward_settings(row: dict) -> str:
    """What else is on in a row."""
    on = ["compiled" if row["compiled"] else "eager"]
    on += ["FP8 linears"] * row["fp8_linears"] + [row["step_cache"]] * bool(row["step_cache"])
    if row["impl"] == "stock":
        on += [f"{row['kernel'].partition('_')[0]} kernel"]
    on += ["whole model"] * (not row["extrapolated"])
    return ", ".join(on)


def dense_row(rows: list[dict], row: dict) -> dict | None:
    """The row of cuDNN's attention that has everything else on that `row` has."""
    same = ("device", "model", "compiled", "fp8_linears", "step_cache", "extrapolated")
    found = (each for each in rows if each["impl"] == "cudnn" and all(each[name] == row[name] for name in same))
    return next(found, None)


def signed(value: float) -> str:
    """A difference in percent."""
    return f"{value:+.1%}"


def end_to_end() -> str:
    """One forward of every model, one line per row."""

    def memory(row: dict) -> list[str]:
        dense = dense_row(timed, row)
        if not row["peak_gib"]:
            return ["–", "–"]
        more = row["impl"] == "paroattn" and dense is not None and dense["peak_gib"]
        return [f"{row['peak_gib']:.1f}", signed(row["peak_gib"] / dense["peak_gib"] - 1) if more and dense else "–"]

    text = ""
    for gpu in GPUS:
        rows = rows_of(f"end_to_end_{gpu}")
        timed = [row for row in rows if row["ms"]]
        names = ("speedup_vs_dense", "speedup_vs_same_linears", "speedup_vs_stock")
        lines = [
            [f"{forward_name(row)}, {forward_settings(row)}", milliseconds(row["ms"])]
            + [f"{row[name]:.2f}×" if row[name] else "–" for name in names]
            + memory(row)
            for row in sorted(timed, key=forward_place)
        ]
        head = [
            "one forward", "ms", "against dense", "dense, same linears", "stock", "peak, GiB", "more than dense",
        ]  # fmt: skip
        text += table(head, lines) + f"\n{where(timed)}, diffusers {timed[0]['diffusers']}.\n" if timed else ""
        reasons = {row["impl"]: row["reason"] for row in rows if row["ms"] is None}
        ran = {row["impl"] for row in timed}
        text += "".join(f"\nNot measured: {impl}, {why}.\n" for impl, why in reasons.items() if impl not in ran)
    return text or NOTHING


def forwards() -> str:
    """One compiled forward of every model at density 0.2: dense, ours, and both with FP8 linears where measured."""
    text = ""
    for gpu in GPUS:
        rows = [row for row in rows_of(f"end_to_end_{gpu}") if row["ms"]]
        ours = [
            row for row in rows
            if row["impl"] == "paroattn" and row["compiled"] and row["extrapolated"] and not row["step_cache"]
            and (row["density"], row["precision"]) == (0.2, "int8/fp8")
        ]  # fmt: skip
        lines = []
        for row in sorted(ours, key=forward_place):
            dense = dense_row(rows, row)
            name = row["model"] + ", FP8 linears" * row["fp8_linears"]
            stock = f"{row['speedup_vs_stock']:.2f}×" if row["speedup_vs_stock"] else "–"
            if dense:
                times = [milliseconds(each["ms"]) for each in (dense, row)]
                lines.append([name, *times, f"{dense['ms'] / row['ms']:.2f}×", stock])
        head = ["one forward of", "dense, ms", "sparse, ms", "faster", "than diffusers as installed"]
        text += table(head, lines) + f"\n{where(ours)}.\n" if lines else ""
    return text or NOTHING


def forward_place(row: dict) -> tuple:
    """Models by name; dense before sparse, eager before compiled, the densest first."""
    kind = ("stock", "cudnn", "sage2", "paroattn").index(row["impl"])
    return (
        row["model"],
        row["fp8_linears"],
        row["compiled"],
        kind,
        -row["density"],
        row["precision"],
        row["extrapolated"],
    )


def milliseconds(ms: float) -> str:
    """Four digits."""
    return f"{ms:.4g}" if ms < 1000 else f"{ms:.0f}"


def roofline() -> str:
    """Where the time of compiled forwards goes: what attention alone can bring, what it has brought, what remains."""
    text = ""
    for gpu in GPUS:
        rows = [row for row in rows_of(f"end_to_end_{gpu}") if row["ms"]]
        plain = [row for row in rows if row["compiled"] and not row["fp8_linears"] and not row["step_cache"]]
        ours = [row for row in plain if row["extrapolated"] and row["impl"] == "paroattn" and row["attention_ms"]]
        lines = []
        for row in (row for row in ours if row["precision"] == "int8/fp8"):
            dense = dense_row(plain, row)
            if dense and dense["attention_ms"]:
                lines.append(
                    [f"{row['model']}, {row['density']:g}", *roofline_cells(row, dense, whole_row(plain, row))]
                )
        head = [
            "model, density", "attention's share, dense", "bound, kept blocks alone", "bound, attention free",
            "reached", "of that bound", "then attention", "preparing", "linear", "other", "other, added by ours",
            "line off the whole model",
        ]  # fmt: skip
        text += table(head, lines) + f"\n{where(ours)}.\n" if lines else ""
    return text or NOTHING


def whole_row(rows: list[dict], row: dict) -> dict | None:
    """The row that was measured on the whole model where `row` is a line through two depths."""
    names = ("device", "model", "impl", "density", "precision", "compiled", "fp8_linears", "step_cache")
    found = (each for each in rows if not each["extrapolated"] and all(each[name] == row[name] for name in names))
    return next(found, None)


def roofline_cells(row: dict, dense: dict, whole: dict | None) -> list[str]:
    """Amdahl's bounds from the dense row, what our row reached of them, and what takes its time."""
    share = dense["attention_ms"] / dense["ms"]
    free, reached = 1 / (1 - share), dense["ms"] / row["ms"]
    kept = 1 / (1 - share * (1 - row["density_executed"]))
    rest = row["other_ms"] + row["idle_ms"]
    parts = [each / row["ms"] for each in (row["attention_ms"], row["prepare_ms"], row["linear_ms"], rest)]
    added = (rest - dense["other_ms"] - dense["idle_ms"]) / row["ms"]
    return [
        f"{share:.0%}", f"{kept:.2f}×", f"{free:.2f}×", f"{reached:.2f}×", f"{reached / free:.0%}",
        *(f"{part:.1%}" if part < 0.1 else f"{part:.0%}" for part in parts),
        f"{added:.1%}", f"{abs(row['ms'] / whole['ms'] - 1):.1%}" if whole else "–",
    ]  # fmt: skip


def forecasts() -> str:
    """What `paro doctor` predicts of eager forwards, beside what was measured."""
    text = ""
    for gpu in GPUS:
        rows = [row for row in rows_of(f"end_to_end_{gpu}") if row["ms"] and row.get("predicted_ms")]
        lines = []
        for row in sorted(rows, key=lambda row: row["model"], reverse=True):
            dense = dense_row(rows, row)
            cells = [
                milliseconds(row["ms"]),
                milliseconds(row["predicted_ms"]),
                signed(row["predicted_ms"] / row["ms"] - 1),
            ]
            if dense is not None:
                measured, predicted = dense["ms"] / row["ms"], dense["predicted_ms"] / row["predicted_ms"]
                cells += [f"{measured:.2f}×", f"{predicted:.2f}×", signed(predicted / measured - 1)]
            lines.append([forward_name(row), *cells, *["–"] * (6 - len(cells))])
        head = ["one forward, eager", "ms", "predicted", "off", "against dense", "predicted", "off"]
        text += table(head, lines) + f"\n{where(rows)}.\n" if lines else ""
    return text or NOTHING


def by_density(rows: list[dict], names: tuple[str, ...], head: str, cell: Callable[[dict], str]) -> str:
    """A table with a line for each combination of the fields `names` and a column for each density; none, no table."""
    timed = [row for row in rows if row["ms"] is not None]
    densities = sorted({row["density"] for row in timed}, reverse=True)
    lines: dict[tuple, dict[float, str]] = {}
    for row in timed:
        lines.setdefault(tuple(row[name] for name in names), {})[row["density"]] = cell(row)
    cells = [
        [", ".join(name for name in line if name), *(found.get(density, "–") for density in densities)]
        for line, found in lines.items()
    ]
    columns = [head, *(f"density {density:g}" for density in densities)]
    return table(columns, cells) + f"\n{where(timed)}.\n" if timed else ""


NOTHING = "Not measured yet.\n"
TABLES: dict[str, Callable[[], str]] = {
    "fidelity": fidelity,
    "comparison": comparison,
    "attention": attention,
    "numerics": numerics,
    "four-bits": four_bits,
    "attention-gpu": attention_gpu,
    "attention-gpu-short": attention_gpu_short,
    "kernels-gpu": kernels_gpu,
    "prepare-gpu": prepare_gpu,
    "end-to-end": end_to_end,
    "forwards": forwards,
    "roofline": roofline,
    "forecasts": forecasts,
}


def filled(page: str) -> str:
    """The page with every known table made anew."""
    return BLOCK.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say which pages are out of date")
    args = parser.parse_args()
    stale = []
    for name in PAGES:
        path = ROOT / name
        new = filled(path.read_text())
        if new != path.read_text():
            stale.append(name)
            if not args.check:
                path.write_text(new)
    print(f"{'out of date' if args.check else 'written'}: {', '.join(stale) or 'nothing'}")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
