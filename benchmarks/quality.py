"""How close the bundled model stays to its dense clips with other candidates, and when its plan is refined.

    python benchmarks/quality.py --series 4 --out RESULTS [--rounds 16] [--densities 0.3]

Plans come from two prompts. They are refined on 128 others, several clips at once, and compared on 16 held-out prompts,
by which ideas are chosen, and on the 16 of every other comparison. Rows are merged by key into the result file, under a
number of their own, `series`, since only rows of one run share statistics and arithmetic.
"""

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch

from fidelity_demo import Bench, all_kept
from paroattn.capture import CaptureSettings
from paroattn.demo.pipeline import STEPS, weights_sha256
from paroattn.demo.prompt import (
    CALIBRATION_PROMPTS,
    CAMERAS,
    COLOURS,
    DIRECTIONS,
    EVALUATION_PROMPTS,
    SCENES,
    SHAPES,
    prompt_of,
)  # fmt: skip
from paroattn.evaluation.fidelity import compare, summarise
from paroattn.grid import CANDIDATES, ORDERS
from paroattn.integration.calibrate import collect
from paroattn.integration.refining import Refinement, refine
from paroattn.integration.sensitivity import measure_sensitivity
from paroattn.plan.plan import Plan, TransformerPlan
from paroattn.plan.search import PlanSettings, make_plan
from records import environment, merge

RESULT = Path(__file__).parent / "results" / "quality_experiments.json"
KEY = ("series", "method", "prompts", "density_target")
TRAINING, HELD_OUT = 128, 16
AT_ONCE = 8
REFINING_STEPS = 12
JOINT = "|"
IDEAS = {
    "six": "six orders, weighed by phase",
    "tiles": "tile orders among the candidates",
    "refined": "refined call by call",
    "refined-two": "refined call by call, on the two calibration prompts",
}


class Batched:
    """The bundled pipeline, which makes a clip of every prompt that is joined to one; a seed stands for as many."""

    def __init__(self, pipe: Any):
        self.pipe = pipe

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["pipe"], name)

    def __call__(
        self, prompt: str, num_inference_steps: int = STEPS, generator: Any = None, output_type: str = "pt"
    ) -> Any:
        prompts = prompt.split(JOINT)
        first = generator.initial_seed() * len(prompts)
        generators = [torch.Generator().manual_seed(first + index) for index in range(len(prompts))]
        return self.pipe(prompts, num_inference_steps, generator=generators, output_type=output_type)


def drawn(count: int) -> list[str]:
    """Prompts that no calibration and no evaluation uses, always the same ones."""
    rng, found = random.Random(11), {}

    def thing() -> tuple[str, str, str]:
        return rng.choice(COLOURS), rng.choice(SHAPES), rng.choice(DIRECTIONS)

    while len(found) < count:
        rear = thing() if rng.random() < 0.6 else ("", "", "")
        prompt = prompt_of((rng.choice(SCENES), rng.choice(CAMERAS), *thing(), *rear))
        if prompt not in (*CALIBRATION_PROMPTS, *EVALUATION_PROMPTS):
            found[prompt] = True
    return list(found)


def joined(prompts: list[str], at_once: int) -> list[str]:
    """Prompts in groups; a list shorter than a group is repeated."""
    prompts = prompts * max(1, at_once // len(prompts))
    return [JOINT.join(prompts[first : first + at_once]) for first in range(0, len(prompts), at_once)]


class Plans:
    """Plans of the bundled model by idea and density, from one calibration."""

    def __init__(self, bench: Bench, steps: int, rounds: int, training: int):
        self.bench, self.rounds = bench, rounds
        self.precision = "bf16" if bench.impl == "triton" else "fp32"
        self.training = drawn(training)
        capture = CaptureSettings(orders=CANDIDATES, paper=False)
        self.measured = collect(bench.pipe, CALIBRATION_PROMPTS, steps=steps, capture=capture, exact=True)
        measure_sensitivity(
            bench.pipe, self.measured, CALIBRATION_PROMPTS, seeds=4, steps=steps, precision=self.precision,
            impl=bench.impl,
        )  # fmt: skip

    def __call__(self, idea: str, density: float) -> TransformerPlan:
        orders = ORDERS if idea == "six" else CANDIDATES
        settings = PlanSettings(density, orders=orders, precision=self.precision)
        plan = make_plan(self.measured["transformer"], settings)
        if not idea.startswith("refined"):
            return plan
        prompts: list[str] = [*CALIBRATION_PROMPTS] if idea == "refined-two" else self.training
        return refine(
            Batched(self.bench.pipe), Plan({"transformer": plan}), self.measured, joined(prompts, AT_ONCE),
            refinement=Refinement(self.rounds, 1, checkpointing=False), steps=REFINING_STEPS,
        )["transformer"]  # fmt: skip


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT, help="result file to merge the rows into")
    parser.add_argument("--series", type=int, required=True, help="a number that no row has yet")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--impl", default="triton" if torch.cuda.is_available() else "reference")
    parser.add_argument("--clips", type=int, default=HELD_OUT)
    parser.add_argument("--steps", type=int, default=STEPS, help="of every clip")
    parser.add_argument("--calibration-steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=16, help=f"of refining, {AT_ONCE} clips each")
    parser.add_argument("--training", type=int, default=TRAINING, help="prompts to refine on")
    parser.add_argument("--densities", type=float, nargs="+", default=(0.3, 0.2, 0.5))
    parser.add_argument("--ideas", nargs="+", default=tuple(IDEAS), choices=IDEAS)
    args = parser.parse_args()
    bench, began = Bench(args.device, args.clips, args.steps, args.impl), time.time()
    plans = Plans(bench, args.calibration_steps, args.rounds, args.training)
    sets = {"held-out": drawn(TRAINING + HELD_OUT)[TRAINING:], "evaluation": list(EVALUATION_PROMPTS)}
    about = environment(args.device, args.impl) | {
        "weights_sha256": weights_sha256(), "series": args.series, "predicted": None, "dense_warmup": 0,
        "calibration_prompts": len(CALIBRATION_PROMPTS),
    }  # fmt: skip
    dense: dict[str, torch.Tensor] = {}
    for density in args.densities:
        for idea in args.ideas:
            plan = plans(idea, density)
            for name, prompts in sets.items():
                bench.prompts = tuple(prompts[: args.clips])
                if name not in dense:
                    dense[name] = bench.clips(all_kept(plan), plans.precision)
                note = f"{args.rounds} rounds of {AT_ONCE} clips" if idea.startswith("refined") else ""
                row = {"method": f"paroattn-{idea}", "idea": IDEAS[idea], "prompts": name, "density_target": density}
                row |= measured(bench, plan, dense[name]) | {"orders": "six" if idea == "six" else "six+tiles"}
                merge(args.out, [row | about | {"note": note}], KEY)
                print(f"{time.time() - began:6.1f} s", row["method"], density, name, row["psnr_mean"], row["psnr_min"])


if __name__ == "__main__":
    main()
