"""Tables of whole forwards: how long, beside what, what holds them, and what was forecast."""

from result_tables import GPUS, NOTHING, rows_of, table, where


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


def whole_runs() -> str:
    """Whole runs: seconds of what follows one another, and memory."""
    text = ""
    for gpu in GPUS:
        rows = rows_of(f"whole_run_{gpu}")
        lines = [
            [
                f"{row['model']}, {row['impl']} {row['density']:g} {row['precision']}", str(row["steps"]),
                *(f"{row[name]:.1f}" for name in ("first_forward_s", "step_s", "decoding_s", "seconds")),
                f"{max(row['step_peak_gib']):.1f}, {row['decoding_peak_gib']:.1f}",
                f"{row['allocated_gib'][-1] - row['allocated_gib'][1]:.2f}",
            ]
            for row in rows
        ]  # fmt: skip
        head = [
            "run", "steps", "first forward, compiling, s", "a step, s", "decoding, s", "the run, s",
            "peak of steps, of decoding, GiB", "growth from step 2, GiB",
        ]  # fmt: skip
        text += table(head, lines) + f"\n{where(rows)}.\n" if lines else ""
    return text or NOTHING
