"""Tables in Markdown from result files."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
GPUS = ("h200", "h100")
NOTHING = "Not measured yet.\n"


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


def paired(psnr: list[float | None], ours: list[float | None]) -> str:
    """Mean difference over clips and its 95 % interval; a dash where clips are not the same or are identical."""
    from paroattn.evaluation.fidelity import summarise  # loads torch, which most pages do without

    both = [(one, other) for one, other in zip(psnr, ours, strict=False) if one is not None and other is not None]
    if len(psnr) != len(ours) or len(both) < len(ours):
        return "–"
    found = summarise([one - other for one, other in both])
    interval = f" ({decibels(found.interval[0])} … {decibels(found.interval[1])})" if found.interval else ""
    return decibels(found.mean) + interval


def decibels(difference: float) -> str:
    """With its sign, and a minus that is one."""
    return f"{difference:+.1f}".replace("-", "−")
