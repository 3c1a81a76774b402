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
GPUS = ("h200", "h100")
BLOCK = re.compile(r"(<!-- results:([\w-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)
RULE_NAMES = {
    ("none", "mass", "global"): "no reorder, mass, one threshold",
    ("none", "mass", "per_head"): "no reorder, mass, per head",
    ("none", "output_error", "layer_normalised"): "no reorder, output error",
    ("paper", "mass", "global"): "paper's score, mass, one threshold",
    ("paper", "mass", "per_head"): "paper's score, mass, per head",
    ("mass", "mass", "global"): "mass, one threshold",
    ("mass", "mass", "per_head"): "mass, per head",
    ("output_error", "output_error", "global"): "output error, one threshold",
    ("output_error", "output_error", "per_head"): "output error, per head",
    ("output_error", "output_error", "layer_normalised"): "**output error, layer-normalised (default)**",
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
                if (row["order_score"], row["mask_score"], row["budget"]) == rule and row["orders"] == orders
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


def numerics() -> str:
    """Ingredients of the integer formats, cumulative from line to line within a product."""
    rows = rows_of("numerics_cpu")
    if not rows:
        return "Not measured yet.\n"
    found = {(row["product"], row["variant"], row["format"]): row for row in rows}
    lines = []
    for product, variant in dict.fromkeys((row["product"], row["variant"]) for row in rows):
        cells = [found[product, variant, form] for form in ("int8", "int4")]
        values = [f"{'**' * row['shipped']}{row['sqnr_db']:.1f}{'**' * row['shipped']}" for row in cells]
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
    "attention": attention,
    "numerics": numerics,
    "attention-gpu": attention_gpu,
    "attention-gpu-short": attention_gpu_short,
    "kernels-gpu": kernels_gpu,
    "prepare-gpu": prepare_gpu,
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
