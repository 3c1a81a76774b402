"""The whole story on the bundled model: calibrate, plan, generate dense and sparse, compare, report."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..capture import CaptureSettings
from ..evaluation.fidelity import Comparison, evaluate, summarise_pairs
from ..evaluation.maps import instructive_maps
from ..evaluation.report import ReportData, environment, write_report
from ..files import writing_folder
from ..integration.apply import apply, dense, remove, report
from ..integration.calibrate import collect
from ..integration.generate import generate_clip
from ..plan.plan import Plan, TransformerPlan
from ..plan.search import PlanSettings, make_plan
from .pipeline import PLAN, load_demo
from .prompt import CALIBRATION_PROMPTS, EVALUATION_PROMPTS

Progress = Callable[[str, float], None]
REPORT = "report.html"
FOLDER = (REPORT, "results.json", "plan")
PROMPTS = (*EVALUATION_PROMPTS[1:], EVALUATION_PROMPTS[0])


@dataclass(frozen=True)
class DemoSettings:
    """How long the demo takes.

    Attributes:
        density: Of the plan it makes.
        clips: How many pairs it generates.
        steps: Inference steps of every clip.
        calibration_steps: Steps of the calibration run.
        row_stride: One query row in so many is measured.
        seed: Of every clip.
    """

    density: float = 0.25
    clips: int = 2
    steps: int = 10
    calibration_steps: int = 8
    row_stride: int = 4
    seed: int = 0

    def __post_init__(self):
        if not 1 <= self.clips <= len(EVALUATION_PROMPTS):
            raise ValueError(f"clips must be between 1 and {len(EVALUATION_PROMPTS)}; got {self.clips}")
        if min(self.steps, self.calibration_steps) < 1:
            raise ValueError(f"steps must be 1 or more; got {self.steps} and {self.calibration_steps} for calibration")
        _ = self.plan, self.capture

    @property
    def plan(self) -> PlanSettings:
        return PlanSettings(density=self.density, orders=self.capture.orders)

    @property
    def capture(self) -> CaptureSettings:
        return CaptureSettings(row_stride=self.row_stride, paper=False)


def run_demo(out: Path, settings: DemoSettings, progress: Progress, command: str = "paro demo") -> dict[str, Any]:
    """Make `out` with the plan, the report and the numbers; returns the numbers.

    Args:
        out: Folder to write, all of it or nothing.
        settings: How long it takes.
        progress: Called with the name of the stage and the share of it that is done.
        command: What the report says makes it again.
    """
    with writing_folder(out, FOLDER) as folder:
        seconds: dict[str, float] = {}
        pipe = load_demo()
        with _timed(seconds, "calibration"):
            statistics = collect(
                pipe, CALIBRATION_PROMPTS[:1], steps=settings.calibration_steps, capture=settings.capture,
                progress=partial(progress, "calibrating on one prompt"),
            )["transformer"]  # fmt: skip
        with _timed(seconds, "planning"):
            plan = make_plan(statistics, settings.plan)
        Plan({"transformer": plan}).save_pretrained(folder / "plan")
        apply(pipe, Plan({"transformer": plan}), even_if_slower=True)
        pairs = _pairs(pipe, settings, progress)
        executed = report(pipe)
        remove(pipe)
        numbers = _numbers(plan, pairs, seconds, executed.to_dict())
        (folder / "results.json").write_text(json.dumps(numbers, indent=1) + "\n")
        data = ReportData(
            title="PAROAttention on the bundled video model",
            introduction=(
                "A small video transformer generated the same clips twice from the same noise: with dense attention, "
                "and with its tokens reordered per head and most attention blocks skipped, in every step."
            ),
            clips=pairs,
            plan={"transformer": plan},
            maps=instructive_maps(statistics, plan),
            execution={"layers": executed.rows()},
            timings=seconds,
            note=_note(plan, settings),
            command=command,
            versions=environment(),
        )
        write_report(data, folder / REPORT)
        progress("writing the report", 1.0)
    return numbers


class _timed:
    """Adds the seconds spent inside to a table."""

    def __init__(self, table: dict[str, float], name: str):
        self.table, self.name = table, name

    def __enter__(self):
        self.began = time.perf_counter()

    def __exit__(self, *_):
        self.table[self.name] = time.perf_counter() - self.began


def _pairs(pipe: Any, settings: DemoSettings, progress: Progress) -> list[Comparison]:
    done, total = 0, 2 * settings.clips * settings.steps

    def step() -> None:
        nonlocal done
        done += 1
        progress("generating clips, dense and sparse", done / total)

    def generate(prompt: str, seed: int) -> torch.Tensor:
        return generate_clip(pipe, prompt, seed, steps=settings.steps, on_step=step)

    prompts = PROMPTS[: settings.clips]
    return list(evaluate(generate, prompts, (settings.seed,), dense=partial(dense, pipe)))


def _numbers(
    plan: TransformerPlan, pairs: list[Comparison], seconds: dict[str, float], executed: dict
) -> dict[str, Any]:
    summary = summarise_pairs(pairs)
    return {
        "density": plan.density,
        "clips": [pair.record() for pair in pairs],
        "summary": {name: each.to_dict() for name, each in summary.items()},
        "seconds": seconds | {
            "dense": sum(pair.dense_seconds for pair in pairs),
            "sparse": sum(pair.sparse_seconds for pair in pairs),
        },
        "executed": executed,
        "environment": environment(),
    }  # fmt: skip


def _note(plan: TransformerPlan, settings: DemoSettings) -> str:
    """How this plan was made, beside the one that ships."""
    shipped = Plan.from_pretrained(PLAN)["transformer"]
    orders = [
        mine == theirs
        for name, layer in plan.layers.items()
        for mine, theirs in zip(layer.orders, shipped.layers[name].orders, strict=True)
    ]
    made = shipped.made["calibration"]
    refined = shipped.made["refined"]
    return (
        f"This plan was made just now from one prompt, {settings.calibration_steps} steps and one query row in "
        f"{settings.row_stride}. The plan that ships was made from {len(made['prompts'])} prompts, "
        f"{made['steps']} steps and all rows, at density {shipped.density:.2f} with {len(shipped.phases)} phases, "
        f"and refined with {refined['rounds'] * refined['clips']} clips. "
        f"The two chose the same order for {sum(orders)} of {len(orders)} heads."
    )
