"""Result files: {"rows": [...]}, merged by key, so that a benchmark never drops rows it did not measure."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def environment(device: str = "cpu", impl: str | None = None) -> dict[str, Any]:
    """Date, the device that ran, and versions, as every row has them; Triton's only for an `impl` that uses it."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else _processor(),
        "torch": torch.__version__.split("+")[0],
        "triton": version("triton") if impl == "triton" else None,
    }


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a result file; none if it does not exist."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def merge(path: Path, rows: Sequence[dict[str, Any]], key: Sequence[str]) -> None:
    """Put rows into a result file; a row replaces the one before it that agrees with it in every field of `key`."""
    new = {_key(row, key): row for row in rows}
    kept = [row for row in read(path) if _key(row, key) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in [*kept, *new.values()])
    scratch = path.with_suffix(".new")
    scratch.write_text(f'{{"rows": [\n{lines}\n]}}\n')
    scratch.replace(path)


def _key(row: dict[str, Any], names: Sequence[str]) -> str:
    return json.dumps([row.get(name) for name in names])


def significant(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {torch.get_num_threads()} threads"
