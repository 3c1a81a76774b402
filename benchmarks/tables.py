"""Fills the result tables of README and docs from benchmarks/results: python benchmarks/tables.py [--check]."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from fidelity_tables import (
    comparison,
    demands,
    fidelity,
    fidelity_short,
    formats,
    images,
    joint,
    layouts,
    quality,
    transfer,
)
from forward_tables import end_to_end, forecasts, forwards, roofline, signed, whole_runs
from readme_tables import attention_gpu_short, attention_short, headline, whole_calls
from result_tables import GPUS, NOTHING, rows_of, table, where
from scaling import modelled_ms

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md", "docs/method.md", "docs/benchmarks.md", "docs/quality.md", "docs/several-gpus.md", "docs/transfer.md",
    "docs/sm90.md",
)  # fmt: skip
BLOCK = re.compile(r"(<!-- results:([\w-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)


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
    """Whole samples in INT4: ingredients, cumulative from line to line within a product, then mixtures with INT8."""
    rows = rows_of("int4")
    if not rows:
        return NOTHING
    names = {"qk": "Q·K", "pv": "P·V", "qk+pv": "both", "0.5": "density 0.5"}

    def place(what: str) -> int:
        return list(names).index(what.removeprefix("0.5+"))

    lines = [
        ["density 0.5, " * row["what"].startswith("0.5+") + names[row["what"].removeprefix("0.5+")],
         "; ".join(row["ingredients"]) if row["heads"] is None and row["ingredients"] else "–",
         f"{row['heads_int4']:.0%}{', ' * bool(row['heads'])}{row['heads'] or ''}", f"{row['psnr_mean']:.1f}"]
        for row in sorted(rows, key=lambda row: (bool(row["heads"]), place(row["what"]), row["heads"] or "",
                                                 row["heads_int4"], len(row["ingredients"])))
    ]  # fmt: skip
    first = rows[0]
    about = f"{first['clips']} clips of {first['steps']} steps at guidance {first['guidance']:g}"
    note = f"\n{about}; heads that are not in INT4 are in INT8, all of them as they ship. {where(rows)}.\n"
    return table(["in INT4", "made of", "heads in INT4", "PSNR, dB"], lines) + note


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
        rows = whole_calls(gpu)
        text += by_density(rows, ("shape", "impl", "precision", "block"), "time, against cuDNN's dense bf16", cell)
        reasons = {row["impl"]: row["reason"] for row in rows if row["ms"] is None and row["density"] == 1}
        timed = {row["impl"] for row in rows if row["ms"] is not None}
        text += "".join(f"\nNot measured: {impl}, {why}.\n" for impl, why in reasons.items() if impl not in timed)
    return text or NOTHING


def kernels_gpu() -> str:
    """Our kernels alone: one line per precision, block and kind of mask, one column per density."""
    text = ""
    for gpu in GPUS:
        rows = [row for row in rows_of(f"attention_{gpu}") if row["includes"] == "kernel"]
        names = ("shape", "precision", "block", "mask")
        text += by_density(rows, names, "useful TFLOP/s", lambda row: f"{row['useful_tflops']:.0f}")
    return text or NOTHING


def hopper_cuda() -> str:
    """Structures of the Hopper kernel in CUDA C++ beside the Gluon kernel."""
    text = ""
    for gpu in GPUS:
        cell = "{useful_tflops:.0f}, {times_gluon:.2f}×".format_map
        text += by_density(rows_of(f"sm90_{gpu}"), ("shape", "precision", "variant"), "TFLOP/s, against Gluon", cell)
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


def several() -> str:
    """One forward on several GPUs: measured, and what takes the time of a layer."""
    text = ""
    for gpu in GPUS:
        rows = sorted(rows_of(f"multi_gpu_{gpu}"), key=lambda row: (row["gpus"], row["balanced"]))
        lines = [
            [
                f"{row['gpus']}" + (", heads in order" if not row["balanced"] else ", balanced" * (row["gpus"] > 1)),
                f"{row['ms']:.0f}",
                f"{row['speedup_vs_1']:.2f}×",
                f"{row['imbalance']:.3f}",
                *(f"{row['layer'][part]:.1f}" for part in ("attention", "exchange", "linear")),
                f"{row['layer']['other'] + row['layer']['prepare']:.1f}",
            ]
            for row in rows
        ]
        head = ["GPUs", "ms", "over one", "imbalance", "attention", "exchange", "linear", "other"]
        text += table(head, lines) + f"\n{where(rows)}, diffusers {rows[0]['diffusers']}.\n" if rows else ""
    return text or NOTHING


def exchanges() -> str:
    """q, k and v of a layer exchanged alone, in two formats."""
    rows = [row for gpu in GPUS for row in rows_of(f"multi_gpu_{gpu}") if row["gpus"] > 1 and row["balanced"]]
    lines = [
        [
            str(row["gpus"]),
            f"{row['exchange_bf16_ms']:.2f}",
            f"{row['exchange_int8_ms']:.2f}",
            f"{(row['exchange_bf16_ms'] - row['exchange_int8_ms']) * row['depth'] / row['ms']:.1%}",
        ]
        for row in sorted(rows, key=lambda row: row["gpus"])
    ]
    return table(["GPUs", "bf16, ms", "8 bits with scales, ms", "difference, of a forward"], lines) if rows else NOTHING


def scaling() -> str:
    """The model of more GPUs, and how far it is off where it can be checked."""
    text = ""
    for gpu in GPUS:
        measured = {row["gpus"]: row for row in rows_of(f"multi_gpu_{gpu}") if row["balanced"]}
        if not {1, 2} <= set(measured):
            continue
        one, two = measured[1], measured[2]
        even = {
            row["gpus"]: row["by_phase"]
            for row in rows_of("balance")
            if row["plan"].startswith(one["model"]) and row["density"] == one["density"]
        }
        lines = []
        for gpus in (2, 4, 8, 16):
            ms = modelled_ms(one, two, gpus, even.get(gpus, 1.0))
            found = measured.get(gpus)
            real = ["–", "–"] if found is None else [f"{found['ms']:.0f}", signed(ms / found["ms"] - 1)]
            lines.append([str(gpus), f"{ms:.0f}", f"{one['ms'] / ms:.2f}×", *real])
        text += table(["GPUs", "modelled, ms", "over one", "measured, ms", "error of the model"], lines)
    return text or NOTHING


def balance() -> str:
    """Imbalance of heads before and after dealing."""
    rows = rows_of("balance")
    lines = [
        [
            f"{row['plan']}, density {row['density']:g}, {row['phases']} phase{'s' * (row['phases'] > 1)}",
            *(str(row[name]) for name in ("heads", "gpus")),
            *(f"{row[name]:.3f}" for name in ("in_order", "by_layer", "by_phase", "worst")),
        ]
        for row in rows
    ]
    head = ["plan", "heads", "GPUs", "in order", "one deal a layer", "**one a layer and phase**", "its worst"]
    return table(head, lines) if rows else NOTHING


def by_density(rows: list[dict], names: tuple[str, ...], head: str, cell: Callable[[dict], str]) -> str:
    """A table with a line for each combination of the fields `names` and a column for each density; none, no table.

    Lines that share the first field stand together.
    """
    timed = [row for row in rows if row["ms"] is not None]
    densities = sorted({row["density"] for row in timed}, reverse=True)
    lines: dict[tuple, dict[float, str]] = {}
    for row in timed:
        lines.setdefault(tuple(row[name] for name in names), {})[row["density"]] = cell(row)
    cells = [
        [", ".join(name for name in line if name), *(found.get(density, "–") for density in densities)]
        for line, found in lines.items()
    ]
    shapes = list(dict.fromkeys(line[0] for line in lines))
    cells = [each for _, each in sorted(zip(lines, cells, strict=True), key=lambda pair: shapes.index(pair[0][0]))]
    columns = [head, *(f"density {density:g}" for density in densities)]
    return table(columns, cells) + f"\n{where(timed)}.\n" if timed else ""


TABLES: dict[str, Callable[[], str]] = {
    "fidelity": fidelity,
    "fidelity-short": fidelity_short,
    "comparison": comparison,
    "images": images,
    "demands": demands,
    "formats": formats,
    "transfer": transfer,
    "quality": quality,
    "layouts": layouts,
    "joint": joint,
    "headline": headline,
    "attention": attention,
    "attention-short": attention_short,
    "numerics": numerics,
    "four-bits": four_bits,
    "attention-gpu": attention_gpu,
    "attention-gpu-short": attention_gpu_short,
    "kernels-gpu": kernels_gpu,
    "hopper-cuda": hopper_cuda,
    "prepare-gpu": prepare_gpu,
    "end-to-end": end_to_end,
    "forwards": forwards,
    "roofline": roofline,
    "forecasts": forecasts,
    "whole-runs": whole_runs,
    "several": several,
    "exchanges": exchanges,
    "scaling": scaling,
    "balance": balance,
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
