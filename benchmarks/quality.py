"""How close the bundled model stays to its dense clips by other ideas for plans than those that ship.

    python benchmarks/quality.py --series 4 --out RESULTS [--ideas refined tiles] [--densities 0.3] [--sets held-out]

Plans come from two prompts. They are refined on others, several clips at once, and compared on 16 held-out prompts, by
which ideas are chosen, and on the 16 of every other comparison. Rows are merged by key into the result file, under a
number of their own, `series`, since only rows of one run share statistics and arithmetic. Several processes may share a
GPU, each with --ideas or --densities and a result file of its own; they share --statistics.
"""

import argparse
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from compensation import Compensation, compensated, looked_at
from fidelity_demo import CLIP, Bench, all_kept
from paroattn import apply, remove
from paroattn.capture import CaptureSettings, Statistics
from paroattn.demo.pipeline import STEPS, weights_sha256
from paroattn.demo.prompt import CALIBRATION_PROMPTS, EVALUATION_PROMPTS
from paroattn.evaluation.fidelity import compare, summarise
from paroattn.grid import CANDIDATES, ORDERS
from paroattn.integration.calibrate import collect
from paroattn.integration.generate import run
from paroattn.integration.sensitivity import measure_sensitivity
from paroattn.kernels.block_stats import block_stats
from paroattn.plan.plan import Plan, TransformerPlan
from paroattn.plan.search import PlanSettings, make_plan
from records import environment, merge
from refined import AT_ONCE, REFINING_STEPS, ROUNDS, TRAINING, Refiner, drawn
from standing_in import Place, instead

RESULT = Path(__file__).parent / "results" / "quality_experiments.json"
KEY = ("series", "method", "prompts", "density_target")
HELD_OUT = 16
SENSITIVITY_SEEDS = 4


@dataclass(frozen=True)
class Idea:
    """What a plan is made by.

    Attributes:
        words: What the tables say.
        expected: What was expected of it.
        orders: Candidates.
        refined: Prompts to refine on, the calibration's own first if they are few; 0: not at all.
        pooled: Which dropped blocks are replaced by a token, see `compensation.py`.
        again: Whether it is planned once more, from what layers see where those before them run by the plan.
        block: Tokens of a block.
    """

    words: str
    expected: str = "–"
    orders: tuple[str, ...] = CANDIDATES
    refined: int = 0
    pooled: str | None = None
    again: bool = False
    block: int | None = None


IDEAS = {
    "six": Idea("six orders, weighed by phase", orders=ORDERS),
    "tiles": Idea("tile orders among the candidates"),
    "refined": Idea("refined call by call", refined=TRAINING),
    "refined-16": Idea("refined call by call, on 16 prompts", "at most 0.5 dB below 128 prompts", refined=16),
    "refined-two": Idea("refined call by call, on the two calibration prompts", refined=len(CALIBRATION_PROMPTS)),
    "pooled-heads": Idea(
        "a pooled token for each dropped block of the heads that err less with them", "+0.3 dB at 0.5", pooled="heads"
    ),
    "pooled-blocks": Idea(
        "a pooled token for each dropped block that errs less with it", "+0.3 dB at 0.5, 0 at 0.3", pooled="blocks"
    ),
    "pooled-all": Idea("a pooled token for each dropped block", "+0.3 dB at 0.5, −2 dB at 0.3", pooled="all"),
    "recalibrated": Idea("planned again from the sparse model's own activations", "+0.2 dB", again=True),
    "blocks-32": Idea("blocks of 32 tokens", "+0.5 dB", block=32),
}


class Plans:
    """Plans of the bundled model by idea and density, from one calibration."""

    def __init__(self, bench: Bench, steps: int, refining: tuple[int, int, int], block: int, folder: Path | None):
        self.bench, self.steps, self.refining, self.block = bench, steps, refining, block
        self.precision = "bf16" if bench.impl == "triton" else "fp32"
        if folder is not None and folder.is_dir():
            self.statistics = replace(Statistics.load(folder), layer_weights={})
        else:
            self.statistics = self._measured(block)
            measure_sensitivity(
                bench.pipe, {"transformer": self.statistics}, CALIBRATION_PROMPTS, seeds=SENSITIVITY_SEEDS,
                steps=steps, precision=self.precision, impl=bench.impl, **bench.call,
            )  # fmt: skip
            if folder is not None:
                self.statistics.save(folder)
        self.tokens = cache(self._tokens)

    def __call__(self, name: str, density: float) -> TransformerPlan:
        idea = IDEAS[name]
        if idea.block is not None:
            fine = self._measured(max(1, self.block * idea.block // 64), impl="torch")
            fine.level_weights = self.statistics.level_weights
            return self._planned(fine, density, idea.orders)
        plan = self._planned(self.statistics, density, idea.orders)
        if idea.again:
            return self._planned(self._again(plan), density, idea.orders)
        if idea.refined:
            few = idea.refined < TRAINING
            prompts = [*(CALIBRATION_PROMPTS if few else ()), *drawn(TRAINING)][: idea.refined]
            refiner = Refiner(self.bench.pipe, self.statistics, self.bench.call, *self.refining)
            return refiner(plan, name, prompts)
        return plan

    def running(self, name: str, density: float) -> AbstractContextManager:
        """Inside, a model that the plan is applied to runs as the idea says."""
        pooled = IDEAS[name].pooled
        if pooled is None:
            return nullcontext()
        return compensated(self.bench.pipe.transformer, self.tokens(density), pooled)

    def _planned(self, statistics: Statistics, density: float, orders: tuple[str, ...]) -> TransformerPlan:
        return make_plan(statistics, PlanSettings(density, orders=orders, precision=self.precision))

    def _tokens(self, density: float) -> Compensation:
        plan = self._planned(self.statistics, density, CANDIDATES)
        return looked_at(self.bench.pipe, plan, CALIBRATION_PROMPTS, self.steps, **self.bench.call)

    def _measured(self, block: int, impl: str = "auto") -> Statistics:
        capture = CaptureSettings(orders=CANDIDATES, paper=False, block=(block, block))
        return collect(
            self.bench.pipe, CALIBRATION_PROMPTS, steps=self.steps, capture=capture, exact=True, impl=impl,
            progress=lambda done: None, **self.bench.call,
        )["transformer"]  # fmt: skip

    def _again(self, plan: TransformerPlan) -> Statistics:
        """Statistics of what layers see where those before them, and the steps before, run by a plan."""
        found, pipe = replace(self.statistics, layers={}), self.bench.pipe

        def attend(place: Place, q: Any, k: Any, v: Any, mask: Any, **rest: Any) -> Any:
            found.add(place.layer, q, k, v, place.w_o(q.device), place.hook.call.noise_level, block_stats)
            return place.attention(q, k, v, mask, **rest)

        apply(pipe, Plan({"transformer": plan}), impl=self.bench.impl, even_if_slower=True)
        try:
            with instead(pipe.transformer, attend):
                for seed, prompt in enumerate(CALIBRATION_PROMPTS):
                    run(pipe, prompt, seed, steps=self.steps, output_type="latent", **self.bench.call)
        finally:
            remove(pipe)
        return found


def measured(bench: Bench, plan: TransformerPlan, dense: torch.Tensor) -> dict[str, Any]:
    """A row's numbers, from the clips of a plan and the dense ones."""
    precision = next(iter(plan.layers.values())).precision[0][0]
    pairs = [compare(one, other) for one, other in zip(dense, bench.clips(plan, precision), strict=True)]
    psnr = summarise([pair.psnr for pair in pairs])
    return {
        "density_executed": round(bench.executed, 5),
        "phase_densities": [round(each, 4) for each in plan.phase_density().tolist()],
        "psnr": [round(pair.psnr, 3) for pair in pairs],
        "psnr_mean": round(psnr.mean, 3), "psnr_std": round(psnr.spread, 3), "psnr_min": round(psnr.lowest, 3),
        "ssim_mean": round(sum(pair.ssim for pair in pairs) / len(pairs), 5), "clips": len(pairs),
        "precision": precision, "block": "x".join(map(str, plan.block)), "steps": bench.steps,
        "frames": plan.grid.frames,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT, help="result file to merge the rows into")
    parser.add_argument("--series", type=int, required=True, help="a number that no row has yet")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--impl", default="triton" if torch.cuda.is_available() else "auto")
    parser.add_argument("--clips", type=int, default=HELD_OUT)
    parser.add_argument("--steps", type=int, default=STEPS, help="of every clip")
    parser.add_argument("--size", type=int, nargs=3, default=CLIP, help="frames, height and width in pixels")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--calibration-steps", type=int, default=10)
    refining = (ROUNDS, AT_ONCE, REFINING_STEPS)
    parser.add_argument("--refining", type=int, nargs=3, default=refining, help="rounds, clips of each and their steps")
    parser.add_argument("--densities", type=float, nargs="+", default=(0.3, 0.2, 0.5))
    parser.add_argument("--ideas", nargs="+", default=tuple(IDEAS), choices=IDEAS)
    parser.add_argument("--sets", nargs="+", default=("held-out", "evaluation"), choices=("held-out", "evaluation"))
    parser.add_argument("--statistics", type=Path, help="read or keep the statistics here")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
    bench, began = Bench(args.device, args.clips, args.steps, args.impl, size=args.size), time.time()
    plans = Plans(bench, args.calibration_steps, tuple(args.refining), args.block, args.statistics)
    sets = {"held-out": drawn(TRAINING + HELD_OUT)[TRAINING:], "evaluation": list(EVALUATION_PROMPTS)}
    about = environment(args.device, args.impl) | {
        "weights_sha256": weights_sha256(), "series": args.series, "dense_warmup": 0,
        "calibration_prompts": len(CALIBRATION_PROMPTS),
        "sensitivity_seeds": plans.statistics.made.get("sensitivity_seeds", SENSITIVITY_SEEDS),
    }  # fmt: skip
    linear = "linear layers in " + ("TF32" if args.device.startswith("cuda") else "fp32")
    dense: dict[str, torch.Tensor] = {}
    for density in args.densities:
        for name in args.ideas:
            idea, plan = IDEAS[name], plans(name, density)
            rounds = f"{args.refining[0]} rounds of {args.refining[1]} clips; " if idea.refined else ""
            for chosen in args.sets:
                bench.prompts = tuple(sets[chosen][: args.clips])
                if chosen not in dense:
                    dense[chosen] = bench.clips(all_kept(plans("tiles", density)), plans.precision)
                bench.impl = "auto" if idea.block else args.impl
                with plans.running(name, density):
                    row = measured(bench, plan, dense[chosen])
                bench.impl = args.impl
                row |= {"method": f"paroattn-{name}", "idea": idea.words, "predicted": idea.expected}
                row |= {"prompts": chosen, "density_target": density, "note": rounds + linear}
                row |= {"orders": "six" if idea.orders == ORDERS else "six+tiles"}
                if idea.pooled:
                    row["pooled_share"] = round(plans.tokens(density).share(idea.pooled), 4)
                merge(args.out, [row | about], KEY)
                told = (row["method"], density, chosen, row["density_executed"], row["psnr_mean"], row["psnr_min"])
                print(f"{time.time() - began:6.1f} s", *told, flush=True)


if __name__ == "__main__":
    main()
