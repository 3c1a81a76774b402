"""How close the bundled model's clips stay to its dense clips, for every score, budget, density and precision.

    python benchmarks/fidelity_demo.py --impl triton --precisions int8 int8/fp8 int8-pv int8-qk --out RESULTS

Plans come from two prompts, clips from sixteen others. Both sides of a pair use the same attention code and the same
noise; the dense side computes in bf16, and no step of the other side is dense. Rows are merged by key into the result
file.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paroattn import apply, remove, report
from paroattn.block_mask import BlockMask
from paroattn.capture import CaptureSettings, Statistics
from paroattn.demo.pipeline import FRAMES, HEIGHT, MODEL, STEPS, WIDTH, load_demo, weights_sha256
from paroattn.demo.prompt import CALIBRATION_PROMPTS, EVALUATION_PROMPTS
from paroattn.evaluation.fidelity import compare, summarise
from paroattn.grid import ORDERS, TILES
from paroattn.integration.calibrate import collect
from paroattn.integration.sensitivity import measure_sensitivity
from paroattn.plan.plan import LayerPlan, Plan, TransformerPlan
from paroattn.plan.search import PHASE_ENDS, PlanSettings, make_plan
from records import environment, merge

DENSITIES = (0.5, 0.3, 0.2, 0.1)
KEY = (
    "order_score",
    "mask_score",
    "budget",
    "orders",
    "sensitivity",
    "density_target",
    "precision",
    "block",
    "steps",
    "phase_ends",
)
PRECISIONS = ("int8", "int8/fp8", "int8-pv", "int8-qk", "int4")
CLIP = (FRAMES, HEIGHT, WIDTH)
FIRST_SEED = 1000
SENSITIVITY_SEEDS = 4


@dataclass(frozen=True)
class Rule:
    """How a plan is made."""

    order_score: str
    mask_score: str
    budget: str
    orders: str = "six"
    sensitivity: str = "none"


RULES = (
    Rule("output_error", "output_error", "layer_normalised", sensitivity="phases"),
    Rule("output_error", "output_error", "layer_normalised", "six+tiles", "phases"),
    Rule("output_error", "output_error", "layer_normalised", sensitivity="layers"),
    Rule("none", "output_error", "layer_normalised", sensitivity="phases"),
    Rule("output_error", "output_error", "layer_normalised"),
    Rule("output_error", "output_error", "layer_normalised", "six+tiles"),
    Rule("paper", "mass", "global"),
    Rule("paper", "mass", "per_head"),
    Rule("none", "output_error", "layer_normalised"),
    Rule("mass", "mass", "global"),
    Rule("mass", "mass", "per_head"),
    Rule("none", "mass", "global"),
    Rule("none", "mass", "per_head"),
    Rule("output_error", "output_error", "global"),
    Rule("output_error", "output_error", "per_head"),
)
CANDIDATES = {"six": ORDERS, "six+tiles": ORDERS + TILES}


def all_kept(plan: TransformerPlan) -> TransformerPlan:
    """The same orders with every block kept."""

    def full(layer: LayerPlan) -> LayerPlan:
        return replace(layer, mask=BlockMask.from_dense(torch.ones_like(layer.mask.dense()), plan.block))

    return replace(plan, layers={name: full(layer) for name, layer in plan.layers.items()})


class Bench:
    """Makes clips of a model, the bundled one by default, of a size (frames, height, width) in pixels."""

    def __init__(self, device: str, clips: int, steps: int, impl: str, model: Path = MODEL, size: Sequence[int] = CLIP):
        self.pipe, self.steps, self.impl = load_demo(device, model=model), steps, impl
        self.call: dict[str, Any] = dict(zip(("num_frames", "height", "width"), size, strict=True))
        self.prompts = EVALUATION_PROMPTS[:clips]
        self.dense: Tensor | None = None
        self.executed = 1.0

    def clips(self, plan: TransformerPlan, precision: str | None) -> Tensor:
        """Clips of all prompts by a plan, in another precision than the plan's if given."""
        generators = [torch.Generator().manual_seed(FIRST_SEED + index) for index in range(len(self.prompts))]
        apply(self.pipe, Plan({"transformer": plan}), precision=precision, impl=self.impl, even_if_slower=True)
        try:
            clips = self.pipe(self.prompts, self.steps, generator=generators, **self.call).frames.cpu() * 2 - 1
            self.executed = report(self.pipe).to_dict()["transformer"]["density"]
            return clips
        finally:
            remove(self.pipe)

    def row(self, plan: TransformerPlan, precision: str | None) -> dict:
        assert self.dense is not None
        clips = self.clips(plan, precision)
        pairs = [compare(dense, sparse) for dense, sparse in zip(self.dense, clips, strict=True)]
        psnr, ssim = summarise([pair.psnr for pair in pairs]), summarise([pair.ssim for pair in pairs])
        return {
            "density_executed": round(self.executed, 5),
            "precision": precision,
            "block": "x".join(map(str, plan.block)),
            "steps": self.steps,
            "phases": len(plan.phases),
            "psnr_mean": round(psnr.mean, 3),
            "psnr_std": round(psnr.spread, 3),
            "psnr_min": round(psnr.lowest, 3),
            "ssim_mean": round(ssim.mean, 5),
            "clips": len(pairs),
        }


def rows(bench: Bench, statistics: Statistics, args: argparse.Namespace) -> Iterator[dict]:
    """Every row of the table, the most important first."""
    common = {"phase_ends": list(args.phase_ends), "calibration_prompts": len(CALIBRATION_PROMPTS)}

    by_phase = replace(statistics, layer_weights={})

    def plan(rule: Rule, density: float) -> TransformerPlan:
        settings = PlanSettings(
            density, rule.order_score, rule.mask_score, rule.budget, CANDIDATES[rule.orders], args.phase_ends, "bf16",
            sensitivity=rule.sensitivity != "none",
        )  # fmt: skip
        return make_plan(statistics if rule.sensitivity == "layers" else by_phase, settings)

    default = RULES[0]
    dense = all_kept(plan(default, 1.0))
    bench.dense = bench.clips(dense, "bf16")
    nothing = {"order_score": "none", "mask_score": None, "budget": None, "orders": None, "sensitivity": None}
    nothing |= {"density_target": 1.0}
    for precision in args.precisions:
        yield common | nothing | bench.row(dense, precision)
        if precision == "int8":
            yield common | vars(default) | {"density_target": 0.3} | bench.row(plan(default, 0.3), precision)
    for rule in RULES[: args.rules]:
        for density in args.densities:
            yield common | vars(rule) | {"density_target": density} | bench.row(plan(rule, density), "bf16")


def weigh(bench: Bench, statistics: Statistics, steps: int) -> None:
    """Measure what errors in phases and layers matter, on the calibration prompts."""
    measure_sensitivity(
        bench.pipe, {"transformer": statistics}, CALIBRATION_PROMPTS, what="layers", seeds=SENSITIVITY_SEEDS,
        steps=steps, precision="bf16", impl=bench.impl,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--impl", default="reference")
    parser.add_argument("--clips", type=int, default=len(EVALUATION_PROMPTS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--calibration-steps", type=int, default=10)
    parser.add_argument("--phase-ends", type=float, nargs="+", default=PHASE_ENDS)
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--rules", type=int, default=len(RULES), help="only the first so many rules")
    parser.add_argument("--precisions", nargs="*", default=PRECISIONS, help="of the dense rows")
    parser.add_argument("--statistics", type=Path, help="read or keep the statistics here")
    args = parser.parse_args()
    args.phase_ends = tuple(args.phase_ends)
    bench = Bench(args.device, args.clips, args.steps, args.impl)
    began = time.time()
    if args.statistics and args.statistics.is_dir():
        statistics = Statistics.load(args.statistics)
    else:
        capture = CaptureSettings(orders=ORDERS + TILES)
        statistics = collect(bench.pipe, CALIBRATION_PROMPTS, steps=args.calibration_steps, capture=capture)[
            "transformer"
        ]
        weigh(bench, statistics, args.calibration_steps)
        if args.statistics:
            statistics.save(args.statistics)
    print(f"statistics after {time.time() - began:.1f} s", flush=True)
    about = environment(args.device, args.impl) | {"weights_sha256": weights_sha256(), "impl": args.impl}
    for row in rows(bench, statistics, args):
        merge(args.out, [row | about], KEY)
        print(
            f"{time.time() - began:6.1f} s",
            {name: row[name] for name in (*KEY[:7], "density_executed", "psnr_mean", "psnr_min")},
            flush=True,
        )


if __name__ == "__main__":
    main()
