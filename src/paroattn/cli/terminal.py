"""What a person sees in the terminal: progress bars, tables, and the closing words of every command."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


def plan_table(name: str, part: Any) -> Table:
    """One transformer's plan: orders and density of every layer."""
    precisions = [f"{name} ({share:.0%} of heads)" for name, share in part.precision_shares().items()]
    size = "×".join(map(str, part.block))
    title = f"{name}: {part.model_class}, grid {part.grid}, blocks of {size}\ndensity {part.density:.3f}"
    table = Table(title=f"{title}, precision {', '.join(precisions)}", title_justify="left")
    table.add_column("layer", no_wrap=True)
    table.add_column("orders (heads)")
    for index, phase in enumerate(part.phases):
        table.add_column(f"phase {index}\nσ≥{phase.lowest_noise:.2f}", justify="right", no_wrap=True)
    table.add_column("heads", justify="right", no_wrap=True)
    mixed = len(precisions) > 1
    if mixed:
        table.add_column("precision (heads)")
    for path, layer in part.layers.items():
        density = layer.mask.head_density()
        orders = ", ".join(f"{order} {count}" for order, count in Counter(layer.orders).most_common())
        heads = density.mean(0)
        phases = [f"{value:.2f}" for value in density.mean(1).tolist()]
        formats = Counter(name for each in layer.precision for name in each)
        each = ", ".join(f"{name} {count / len(part.phases):g}" for name, count in formats.most_common())
        table.add_row(path, orders, *phases, f"{heads.min():.2f}–{heads.max():.2f}", *([each] if mixed else []))
    return table


def curve_table(name: str, curve: Any) -> Table:
    """One transformer's curve of density, predicted error and predicted time, the chosen point marked."""
    from ..evaluation.curve_page import cell, columns_of, rows_of
    from ..plan.curve import MEANINGS

    where = f"; times of one compiled forward on an {curve['gpu']}" if curve["gpu"] else ""
    table = Table(title=f"{name}: predicted error {MEANINGS[curve['error_of']]}{where}", title_justify="left")
    columns = columns_of(curve)
    for _, head in columns:
        table.add_column(head, justify="right")
    for point, chosen in rows_of(curve):
        cells = [cell(key, point[key]) for key, _ in columns]
        table.add_row(*cells, style="bold" if chosen else None)
    return table


@contextmanager
def stages() -> Iterator[Callable[[str, float], None]]:
    """Progress bars, one per stage, made when a stage first reports."""
    tasks: dict[str, Any] = {}
    with _bars(TaskProgressColumn()) as progress:

        def stage(name: str, done: float) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=1.0)
            progress.update(tasks[name], completed=done)

        yield stage


@contextmanager
def steps(total: int | None) -> Iterator[Callable[[], None]]:
    """A progress bar over inference steps; without a total while their number is the pipeline's own."""
    with _bars(MofNCompleteColumn()) as progress:
        task = progress.add_task("generating", total=total)
        yield lambda: progress.advance(task)


def say_summary(summary: dict[str, Any], seconds: dict[str, float]) -> None:
    """The outcome of a paired comparison in one line."""
    psnr, ssim = summary["psnr"], summary["ssim"]
    quality = "identical" if psnr["mean"] is None else f"{psnr['mean']:.1f} dB PSNR (worst {psnr['lowest']:.1f})"
    speed = seconds["dense"] / seconds["sparse"]
    say(
        f"against dense: {quality}, SSIM {ssim['mean']:.3f}; "
        f"{seconds['dense']:.1f} s dense, {seconds['sparse']:.1f} s sparse ({speed:.2f}×)"
    )


def end(path: Path, following: str) -> None:
    """Name what was written and what to do next."""
    say(f"wrote {path}\nnext: {following}")


def say(text: str) -> None:
    """Plain text on standard error."""
    console().print(text, highlight=False, soft_wrap=True, markup=False)


def console() -> Console:
    """Standard error, so that standard output holds JSON alone; of several processes, the first one's."""
    return Console(stderr=True, quiet=bool(which()))


def which() -> str:
    """Which of the processes that torchrun has started this is, in words; nothing for the first."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f" (rank {rank})"


def _bars(amount: ProgressColumn) -> Progress:
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), BarColumn(), amount, *times, console=console())
