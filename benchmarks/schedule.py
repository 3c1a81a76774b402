"""What a short calibration loses against the full schedule, on the bundled model: python benchmarks/schedule.py.

Plans come from the same two prompts, measured on schedules of so many steps: whole, and in the two stages of a large
model. Clips come from sixteen others, at the pipeline's own number of steps. What a plan loses is the mean difference,
over these pairs of clips, to the plan of the full schedule measured whole. Rows are merged by key into the result file.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from fidelity_demo import Bench, all_kept
from paroattn.demo.pipeline import STEPS, weights_sha256
from paroattn.demo.prompt import CALIBRATION_PROMPTS, EVALUATION_PROMPTS
from paroattn.evaluation.fidelity import compare, summarise
from paroattn.integration.calibrate import collect, needed_by
from paroattn.integration.collecting import Economy
from paroattn.plan.search import PlanSettings, make_plan
from records import environment, merge

RESULT = Path(__file__).parent / "results" / "calibration_schedule.json"
KEY = ("calibration_steps", "stages", "density_target", "prompts", "steps", "device")
SHORT = ((10, 1), (8, 1), (10, 2), (8, 2), (6, 1), (4, 1))
DENSITIES = (0.5, 0.3, 0.2)


def measured(bench: Bench, steps: int, stages: int, prompts: int) -> Any:
    """Statistics of a calibration on a schedule."""
    settings = PlanSettings()
    return collect(
        bench.pipe, CALIBRATION_PROMPTS[:prompts], steps=steps, capture=needed_by(settings), settings=settings,
        exact=stages == 1, economy=Economy(), progress=lambda done: None,
    )["transformer"]  # fmt: skip


def clips_of(bench: Bench, statistics: Any, density: float) -> tuple[list[float], float]:
    """PSNR of every clip against its dense one, and the executed density."""
    plan = make_plan(statistics, PlanSettings(density, precision="bf16"), device="cpu")
    if bench.dense is None:
        bench.dense = bench.clips(all_kept(plan), "bf16")
    pairs = zip(bench.dense, bench.clips(plan, "bf16"), strict=True)
    return [compare(dense, sparse).psnr for dense, sparse in pairs], bench.executed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--impl", default="triton" if torch.cuda.is_available() else "reference")
    parser.add_argument("--clips", type=int, default=len(EVALUATION_PROMPTS))
    parser.add_argument("--steps", type=int, default=STEPS, help="of every clip, and of the full calibration")
    parser.add_argument("--prompts", type=int, default=len(CALIBRATION_PROMPTS))
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--out", type=Path, default=RESULT, help="result file to merge the rows into")
    args = parser.parse_args()
    bench, began = Bench(args.device, args.clips, args.steps, args.impl), time.time()
    about = environment(args.device, args.impl) | {
        "weights_sha256": weights_sha256(), "prompts": args.prompts, "steps": args.steps, "clips": args.clips,
    }  # fmt: skip
    full: dict[float, list[float]] = {}
    for steps, stages in ((args.steps, 1), *(each for each in SHORT if each[0] < args.steps)):
        statistics = measured(bench, steps, stages, args.prompts)
        for density in args.densities:
            found, executed = clips_of(bench, statistics, density)
            losses = [best - each for best, each in zip(full.setdefault(density, found), found, strict=True)]
            loss, psnr = summarise(losses), summarise(found)
            row = {
                "calibration_steps": steps, "stages": stages, "density_target": density,
                "density_executed": round(executed, 5), "psnr_mean": round(psnr.mean, 3),
                "psnr_min": round(psnr.lowest, 3), "loss_mean": round(loss.mean, 3), "loss_std": round(loss.spread, 3),
            }  # fmt: skip
            merge(args.out, [row | about], KEY)
            print(f"{time.time() - began:6.1f} s", row, flush=True)


if __name__ == "__main__":
    main()
