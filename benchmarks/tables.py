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
from result_tables import NOTHING, rows_of, table, where
from scaling import modelled_ms

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md", "docs/method.md", "docs/benchmarks.md", "docs/quality.md", "docs/several-gpus.md", "docs/transfer.md",
)  # fmt: skip
CONTESTANTS = (
    *(("paroattn", density) for density in (1.0, 0.5, 0.3, 0.2)),
    ("sage2", 1.0),
    ("sparge", 0.2),
    ("flex", 0.2),
    ("paro-authors", 0.2),
)
GPUS = ("h200", "h100")
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
            "by the cost model", "reached", "of that bound", "then attention", "preparing", "linear", "other",
            "other, added by ours", "line off the whole model",
        ]  # fmt: skip
        text += table(head, lines) + f"\n{where(ours)}.\n" if lines else ""
    return text or NOTHING


def whole_row(rows: list[dict], row: dict) -> dict | None:
    """The row that was measured on the whole model where `row` is a line through two depths."""
    names = ("device", "model", "impl", "density", "precision", "compiled", "fp8_linears", "step_cache")
    found = (each for each in rows if not each["extrapolated"] and all(each[name] == row[name] for name in names))
    return next(found, None)


def roofline_cells(row: dict, dense: dict, whole: dict | None) -> list[str]:
    """Amdahl's bounds from the dense row, the cost model's word, what our row reached, and what takes its time."""
    expected = [predicted for _, predicted in predictions([dense, row])]
    share = dense["attention_ms"] / dense["ms"]
    free, reached = 1 / (1 - share), dense["ms"] / row["ms"]
    kept = 1 / (1 - share * (1 - row["density_executed"]))
    rest = row["other_ms"] + row["idle_ms"]
    parts = [each / row["ms"] for each in (row["attention_ms"], row["prepare_ms"], row["linear_ms"], rest)]
    return [
        f"{share:.0%}", f"{kept:.2f}×", f"{free:.2f}×",
        f"{expected[0] / expected[1]:.2f}×" if len(expected) == 2 else "–", f"{reached:.2f}×", f"{reached / free:.0%}",
        *(f"{part:.1%}" if part < 0.1 else f"{part:.0%}" for part in parts),
        "–" if row["overhead"] is None else f"{row['overhead']:.1%}",
        f"{abs(row['ms'] / whole['ms'] - 1):.1%}" if whole else "–",
    ]  # fmt: skip


def predictions(rows: list[dict]) -> list[tuple[dict, float]]:
    """The rows that the cost model knows, each with what it says, in milliseconds."""
    from predictions import predicted_ms

    both = [(row, predicted_ms(row)) for row in rows]
    return [(row, predicted) for row, predicted in both if predicted is not None]


def forecasts() -> str:
    """What the cost model says of every forward, beside what was measured."""
    text = ""
    for gpu in GPUS:
        timed = [row for row in rows_of(f"end_to_end_{gpu}") if row["ms"]]
        known = predictions(sorted(timed, key=forward_place))
        lines = []
        for row, predicted in known:
            dense = dense_row(timed, row) if row["impl"] == "paroattn" else None
            cells = [milliseconds(row["ms"]), milliseconds(predicted), signed(predicted / row["ms"] - 1)]
            for same, dense_predicted in predictions([dense] if dense else []):
                speedups = same["ms"] / row["ms"], dense_predicted / predicted
                cells += [*(f"{each:.2f}×" for each in speedups), signed(speedups[1] / speedups[0] - 1)]
            lines.append([f"{forward_name(row)}, {forward_settings(row)}", *cells, *["–"] * (6 - len(cells))])
        head = ["one forward", "ms", "predicted", "off", "against dense", "predicted", "off"]
        text += table(head, lines) + f"\n{where([row for row, _ in known])}.\n" if lines else ""
    return text or NOTHING


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
