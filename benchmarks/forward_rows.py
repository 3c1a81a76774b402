"""Rows of end_to_end_GPU.json: what tells them apart, how they compare, and the file they are merged into."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers

from architectures import Architecture
from forward_kinds import OURS, STOCK
from forwards import BASELINE
from gate import Wrong
from kernel_times import PARTS
from peers import Missing
from predictions import predicted_ms
from records import environment, merge, significant

KEY = (
    "device", "model", "impl", "density", "precision", "block", "compiled", "fp8_linears", "step_cache", "depth",
    "extrapolated",
)  # fmt: skip
NUMBERS = ("ms", *(f"{part}_ms" for part in PARTS), "gaps_ms", "peak_gib")
NOT_TIMED = ("kernel", "density_executed")
COMPARED = ("speedup_vs_dense", "speedup_vs_same_linears", "speedup_vs_stock", "overhead", "predicted_ms")


def with_comparisons(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with how they compare with those of the same device and model, of the same depth where there are any.

    `overhead` is the share of a row's time that is other or waiting beyond that in the dense row with the same linears.
    """
    return [row | _compared(row, functools.partial(_baseline, rows, row)) for row in rows]


def _baseline(rows: Sequence[dict[str, Any]], row: dict[str, Any], **wanted: Any) -> dict[str, Any] | None:
    wanted |= {"device": row["device"], "model": row["model"], "step_cache": None}
    found = [each for each in rows if each["ms"] and all(each[name] == value for name, value in wanted.items())]
    return next((each for each in found if each["extrapolated"] == row["extrapolated"]), found[0] if found else None)


def _compared(row: dict[str, Any], baseline: Callable[..., dict[str, Any] | None]) -> dict[str, float | None]:
    dense = functools.partial(baseline, impl=BASELINE, compiled=row["compiled"])
    same = dense(fp8_linears=row["fp8_linears"])

    def speedup(over: dict[str, Any] | None) -> float | None:
        return significant(over["ms"] / row["ms"]) if over and row["ms"] else None

    speedups = speedup(dense(fp8_linears=False)), speedup(same), speedup(baseline(impl=STOCK))
    predicted = predicted_ms(row)
    others = _overhead(row, same), predicted and significant(predicted)
    return dict(zip(COMPARED, (*speedups, *others), strict=True))


def _overhead(row: dict[str, Any], dense: dict[str, Any] | None) -> float | None:
    if row["impl"] != OURS or dense is None or None in (row.get("gaps_ms"), dense.get("gaps_ms")):
        return None
    slower = row["linear_ms"] / dense["linear_ms"]
    waiting, waiting_dense = (min(each["gaps_ms"], max(each["idle_ms"], 0.0)) for each in (row, dense))
    added = row["other_ms"] - dense["other_ms"] * slower + waiting - waiting_dense
    return significant(added / row["ms"])


def save(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Merge rows into a file and compare all of them anew; a row without a time leaves one with a time as it is."""
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    timed = {_key(row) for row in known if row["ms"] is not None}
    merge(path, [row for row in rows if row["ms"] is not None or _key(row) not in timed], KEY)
    merge(path, with_comparisons(json.loads(path.read_text())["rows"]), KEY)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def about(model: Architecture, device: str) -> dict[str, Any]:
    versions = environment(device)
    if device.startswith("cuda"):
        import triton

        versions["triton"] = triton.__version__
    return versions | {
        "model": model.name, "batch": model.batch, "tokens": model.layout.tokens, "heads": model.heads,
        "head_dim": model.head_dim, "diffusers": diffusers.__version__,
    }  # fmt: skip


def reason_of(failure: Exception) -> str:
    text = str(failure).strip().partition("\n")[0]
    return text if isinstance(failure, (Missing, Wrong)) else f"{type(failure).__name__}: {text}"


def described(row: dict[str, Any]) -> str:
    on = [name for name in ("compiled", "fp8_linears", "step_cache") if row[name]]
    label = f"{row['model']} {row['impl']:<8} {row['density']:<4} {row['precision']:<9} {' + '.join(on) or 'eager':<22}"
    if row["ms"] is None:
        return f"{label} {row['reason']}"
    parts = " ".join(f"{part} {row[f'{part}_ms']:.4g}" for part in PARTS if row[f"{part}_ms"] is not None)
    memory = f"{row['peak_gib']:.1f} GiB" if row["peak_gib"] else ""
    return f"{label} {row['ms']:9.1f} ms  {parts}  {memory}  {row['kernel'] or ''}"
