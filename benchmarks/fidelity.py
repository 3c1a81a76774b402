"""How close the bundled model's clips stay to its dense clips: our plans, other rules and oracles at equal density.

    python benchmarks/fidelity.py --impl triton --out benchmarks/results/fidelity.json
    python benchmarks/fidelity.py --impl triton --methods paroattn paper --densities 0.3 --warmups 0 --out RESULTS
    python benchmarks/fidelity.py --impl triton --model IMAGES --size 1 208 320 --out RESULTS

Static rules are calibrated on two prompts; clips come from sixteen others. All methods run the same operation on the
same noise and are compared with the same dense clips. Each is set so that the density it executes, over the steps that
are not dense, is the one asked for. With a warm-up of 0.2 the first fifth of the steps keeps every block.

    dense               every block kept, tokens in our orders: what rounding alone does to the clips
    paroattn            what ships: calibrated, then refined on 128 prompts that no clip here is made of; where the
                        bundled plan has the density, this plan itself
    paroattn-unrefined  the same without refining: what calibrating makes by default
    paroattn-in-order   refined too, but without reordering
    none                calibrated without reordering, with our scores and budget
    paper               orders by the paper's score, blocks by mass above one threshold
    local-window, spatial-temporal, radial, dynamic-topk, oracle      see rules.py
    …+reorder           the same rule on tokens in our orders; an oracle has the budgets of `paroattn-unrefined` or,
                        without reordering, of `none`

Formats: --precisions adds rows of `dense` and of `paroattn` in each of them, --scales rows of `dense` with INT8
attention weights that share a scale by row, block, or row in block, against the same arithmetic without rounding.
One frame is an image; training/train.py --size makes a model for it.

Rows are merged into the result file as they are measured, the most important first; with --resume those that it has are
left out. Several processes may share a GPU, each with --methods and a result file of its own.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from at_density import CLOSE, executed, tuned, warmed, warmup_steps
from fidelity_demo import CANDIDATES, CLIP, Bench, Rule, all_kept
from paroattn.block_mask import blocks_of
from paroattn.capture import CaptureSettings, Statistics
from paroattn.demo.pipeline import MODEL, PLAN, STEPS, weights_sha256
from paroattn.demo.prompt import CALIBRATION_PROMPTS, EVALUATION_PROMPTS
from paroattn.evaluation.fidelity import Summary, compare, summarise
from paroattn.integration.calibrate import collect
from paroattn.integration.schedule import noise_levels
from paroattn.integration.sensitivity import measure_sensitivity
from paroattn.plan.plan import Plan, TransformerPlan
from paroattn.plan.search import PHASE_ENDS, PlanSettings, make_plan
from records import environment, merge, read
from refined import AT_ONCE, REFINING_STEPS, ROUNDS, Refiner
from rounding import SHARED, rounded
from rules import DYNAMIC, SPATIAL, STATIC, Choose, choosing, even_rows, plan_of

METHODS = (
    "dense", "paroattn", "paper", "none", "dynamic-topk", "oracle+reorder", "dynamic-topk+reorder", "oracle",
    "spatial-temporal", "radial", "local-window", "paroattn-unrefined", "paroattn-in-order",
)  # fmt: skip
DENSITIES = (0.5, 0.3, 0.2, 0.125)
WARMUPS = (0.0, 0.2)
QUANTISED = (0.3,)
"""Densities at which other formats are measured too."""
REFINING_HELP = "rounds of refining, clips of each round and their steps"
ASKED = ("method", "density_target", "dense_warmup", "precision", "scales")
KEY = (*ASKED, "frames", "block", "steps", "phase_ends")
PLANNED = {
    "paroattn-unrefined": Rule("output_error", "output_error", "layer_normalised", "six+tiles", "phases"),
    "none": Rule("none", "output_error", "layer_normalised", sensitivity="phases"),
    "paper": Rule("paper", "mass", "global"),
}
REFINED = {"paroattn": "paroattn-unrefined", "paroattn-in-order": "none"}
"""Methods that refine the plan of another one."""
UNPLANNED = {"order_score": None, "mask_score": None, "budget": None, "orders": None, "sensitivity": None}


# Methods


@dataclass(frozen=True)
class Method:
    """How one row is made.

    Attributes:
        plan: Orders and masks; for a rule that chooses by input, orders and how many blocks.
        choose: That rule.
        scales: What shares a scale of attention weights in INT8, all blocks being kept.
    """

    plan: TransformerPlan
    choose: Choose | None = None
    scales: str | None = None

    def running(self, transformer: Any) -> AbstractContextManager:
        """Inside, a model that the plan is applied to runs as the method says."""
        if self.choose is not None:
            return choosing(transformer, self.choose)
        return rounded(transformer, self.scales) if self.scales else nullcontext()


class Methods:
    """Makes methods at a density over the noise levels of the steps that are not dense.

    Args:
        statistics: Of the calibration.
        phase_ends: Of our plans.
        precision: Of all plans.
        refine: Makes the refined plan of a plan and a name for it.
        bundled: The plan that ships, which is `paroattn` wherever it fits and executes the density.
    """

    def __init__(
        self, statistics: Statistics, phase_ends: tuple[float, ...], precision: str,
        refine: Callable[[TransformerPlan, str], TransformerPlan], bundled: TransformerPlan | None = None,
    ):  # fmt: skip
        self.statistics, self.phase_ends, self.precision, self.refine = statistics, phase_ends, precision, refine
        self.bundled = bundled
        self.planned = cache(self._planned)

    def __call__(self, name: str, density: float, levels: tuple[float, ...]) -> Method:
        rule, _, reorder = name.partition("+")
        if rule in PLANNED or rule in REFINED:
            return Method(self.planned(rule, density, levels))
        if rule in STATIC:
            return Method(plan_of(self.statistics, STATIC[rule](self.statistics, density), self.precision))
        if rule == "oracle":
            return Method(self.planned(self.budget(name), density, levels), DYNAMIC[rule])
        return Method(self._even(density, levels, bool(reorder)), DYNAMIC[rule])

    def about(self, name: str) -> dict[str, Any]:
        """Fields of a method's rows that say how it is made."""
        rule = name.partition("+")[0]
        planned = PLANNED.get(REFINED.get(rule, rule))
        about = vars(planned) if planned else UNPLANNED
        followed = planned or rule == "oracle"
        return about | {
            "phase_ends": list(self.phase_ends) if followed else None,
            "refined": rule in REFINED,
            "budget": self.budget(name) if rule == "oracle" else about["budget"],
        }

    def budget(self, oracle: str) -> str:
        """Whose shares of layers and phases an oracle has."""
        return "paroattn-unrefined" if oracle.endswith("+reorder") else "none"

    def _planned(self, name: str, density: float, levels: tuple[float, ...]) -> TransformerPlan:
        if name == "paroattn" and self.bundled is not None and self._fits(self.bundled, density, levels):
            return self.bundled
        if name in REFINED:
            plan = self.planned(REFINED[name], density, levels)
            return self.refine(plan, f"{name}-{density:g}-{len(levels)}")
        rule = PLANNED[name]

        def make(wanted: float) -> TransformerPlan:
            settings = PlanSettings(
                wanted, rule.order_score, rule.mask_score, rule.budget, CANDIDATES[rule.orders], self.phase_ends,
                self.precision,
                sensitivity=rule.sensitivity != "none",
            )  # fmt: skip
            return make_plan(self.statistics, settings)

        return tuned(make, density, levels)

    def _fits(self, plan: TransformerPlan, density: float, levels: tuple[float, ...]) -> bool:
        """Whether a plan is for this model's grid and blocks, and executes the density."""
        same = (plan.grid, plan.block) == (self.statistics.layout.grid, self.statistics.settings.block)
        return same and abs(executed(plan, levels) - density) <= CLOSE

    def _even(self, density: float, levels: tuple[float, ...], reorder: bool) -> TransformerPlan:
        """As many blocks in every row; which ones is for the rule to say."""
        model = (SPATIAL,) * self.statistics.heads
        ours = self.planned("paroattn-unrefined", density, levels).layers if reorder else {}
        tokens, block = self.statistics.layout.grid.tokens, self.statistics.settings.block
        rows, columns = (blocks_of(tokens, size) for size in block)
        kept = torch.arange(columns) < even_rows(rows, columns, density)[:, None]
        each = kept.expand(self.statistics.heads, -1, -1)
        shapes = {name: (ours[name].orders if reorder else model, each) for name in self.statistics.layers}
        return plan_of(self.statistics, shapes, self.precision)

    def dense(self) -> TransformerPlan:
        """Every block, tokens in the model's own order."""
        return plan_of(self.statistics, STATIC["local-window"](self.statistics, 1.0), self.precision)


# Running


class Comparison(Bench):
    """Makes the clips of a method and compares them with the dense ones."""

    def __init__(self, device: str, clips: int, steps: int, impl: str, precision: str, *model: Any):
        super().__init__(device, clips, steps, impl, *model)
        self.precision = precision
        self.pipe.scheduler.set_timesteps(steps)
        self.levels = tuple(noise_levels(self.pipe.scheduler) or ())
        self.exact: Tensor | None = None

    def measure(self, method: Method, warmup: float, precision: str | None = None) -> dict[str, Any]:
        """A row's numbers."""
        dense = warmup_steps(warmup, self.steps)
        plan = warmed(method.plan, self.levels, dense)
        with method.running(self.pipe.transformer):
            clips = self.clips(plan, precision or self.precision)
        pairs = [compare(one, other) for one, other in zip(self.reference(method), clips, strict=True)]
        psnr = summarise([pair.psnr for pair in pairs])
        ssim, cosine = (summarise([getattr(pair, name) for pair in pairs]).mean for name in ("ssim", "cosine"))
        return {
            "density_executed": round((self.executed * self.steps - dense) / (self.steps - dense), 5),
            "frames": clips.shape[1],
            "tokens": math.prod(plan.grid),
            "block": "x".join(map(str, plan.block)),
            "steps": self.steps,
            "phases": len(method.plan.phases),
            **_summary(psnr, "psnr", 3),
            "ssim_mean": round(ssim, 5),
            "cosine_mean": round(cosine, 6),
            "clips": len(pairs),
            "psnr": [_number(pair.psnr, 4) for pair in pairs],
        }

    def reference(self, method: Method) -> Tensor:
        """What the clips of a method are compared with: dense ones, of the same arithmetic without rounding."""
        if method.scales is None:
            assert self.dense is not None
            return self.dense
        if self.exact is None:
            with rounded(self.pipe.transformer, None):
                self.exact = self.clips(method.plan, self.precision)
        return self.exact


def _summary(found: Summary, name: str, digits: int) -> dict[str, Any]:
    parts = {"mean": found.mean, "std": found.spread, "min": found.lowest}
    return {f"{name}_{part}": _number(value, digits) for part, value in parts.items()}


def _number(value: float, digits: int) -> float | None:
    return round(value, digits) if math.isfinite(value) else None


@dataclass(frozen=True)
class Asked:
    """What a row is of, before anything is made for it."""

    method: str
    density: float
    warmup: float
    precision: str
    scales: str | None = None

    def row(self) -> dict[str, Any]:
        return dict(zip(ASKED, vars(self).values(), strict=True))


def asked(args: argparse.Namespace) -> Iterator[Asked]:
    """Every row, the most important first."""
    for warmup in args.warmups:
        for name in (name for name in METHODS if name in args.methods and name != "dense"):
            yield from (Asked(name, density, warmup, args.precision) for density in args.densities)
            if name == "paroattn" and warmup == 0:
                some = [density for density in args.densities if density in QUANTISED]
                yield from (Asked(name, density, 0.0, each) for density in some for each in args.precisions)
    if "dense" in args.methods:
        yield Asked("dense", 1.0, 0.0, args.precision)
        yield from (Asked("dense", 1.0, 0.0, each) for each in args.precisions)
        yield from (Asked("dense", 1.0, 0.0, "int8-pv", scales) for scales in args.scales)


def rows(bench: Comparison, methods: Methods, wanted: Iterable[Asked], there: set[str]) -> Iterator[dict[str, Any]]:
    """Rows but those that are there already, as `identity` names them."""
    seeds = methods.statistics.made.get("sensitivity_seeds")
    common = {"calibration_prompts": len(CALIBRATION_PROMPTS), "sensitivity_seeds": seeds}
    block = "x".join(map(str, methods.statistics.settings.block))
    common |= {"frames": bench.call["num_frames"], "steps": bench.steps, "block": block}
    for each in wanted:
        row = common | each.row() | methods.about(each.method)
        if identity(row) in there:
            continue
        if bench.dense is None:
            bench.dense = bench.clips(methods.dense(), bench.precision)
        levels = bench.levels[warmup_steps(each.warmup, bench.steps) :]
        if each.method == "dense":
            method = Method(all_kept(methods("paroattn-unrefined", 0.5, levels).plan), scales=each.scales)
        else:
            method = methods(each.method, each.density, levels)
        precision = bench.precision if each.scales else each.precision
        yield row | {"bundled": method.plan is methods.bundled} | bench.measure(method, each.warmup, precision)


def identity(row: dict[str, Any]) -> str:
    """What tells a row from all others of a result file."""
    return json.dumps([row.get(name) for name in KEY])


def calibrated(
    bench: Comparison, steps: int, block: tuple[int, int], phase_ends: tuple[float, ...], seeds: int
) -> Statistics:
    """Statistics of the calibration prompts, with the weights of phases."""
    capture = CaptureSettings(orders=CANDIDATES["six+tiles"], block=block)
    measured = collect(
        bench.pipe, CALIBRATION_PROMPTS, steps=steps, capture=capture, exact=True, progress=lambda done: None,
        **bench.call,
    )  # fmt: skip
    measure_sensitivity(
        bench.pipe, measured, CALIBRATION_PROMPTS, seeds=seeds, settings=PlanSettings(phase_ends=phase_ends),
        steps=steps, precision=bench.precision, impl=bench.impl, **bench.call,
    )  # fmt: skip
    statistics = measured["transformer"]
    statistics.made["sensitivity_seeds"] = seeds
    return statistics


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--warmups", type=float, nargs="+", default=WARMUPS, help="shares of dense first steps")
    parser.add_argument("--clips", type=int, default=len(EVALUATION_PROMPTS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--calibration-steps", type=int, default=10)
    parser.add_argument("--phase-ends", type=float, nargs="+", default=PHASE_ENDS)
    parser.add_argument("--sensitivity-seeds", type=int, default=1, help="as in calibrate")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder that training/train.py wrote")
    parser.add_argument("--size", type=int, nargs=3, default=CLIP, help="frames, height and width in pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--statistics", type=Path, help="read or keep the statistics here")
    parser.add_argument("--precisions", nargs="*", default=(), help="further formats of dense and paroattn")
    parser.add_argument("--scales", nargs="*", choices=SHARED, default=(), help="of INT8 attention weights, for dense")
    parser.add_argument("--plans", type=Path, help="read or keep refined plans here")
    parser.add_argument("--refining", type=int, nargs=3, default=(ROUNDS, AT_ONCE, REFINING_STEPS), help=REFINING_HELP)
    parser.add_argument("--resume", action="store_true", help="leave out rows that the result file has")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
    phase_ends = tuple(args.phase_ends)
    bench = Comparison(args.device, args.clips, args.steps, args.impl, args.precision, args.model, args.size)
    began = time.time()
    if args.statistics and args.statistics.is_dir():
        statistics = Statistics.load(args.statistics)
    else:
        block = (args.block, args.block)
        statistics = calibrated(bench, args.calibration_steps, block, phase_ends, args.sensitivity_seeds)
        if args.statistics:
            statistics.save(args.statistics)
    print(f"statistics after {time.time() - began:.1f} s", flush=True)
    about = environment(args.device, args.impl) | {
        "weights_sha256": weights_sha256(args.model), "impl": args.impl,
        "linear": "tf32" if args.device.startswith("cuda") else "fp32",
    }  # fmt: skip
    statistics, last = replace(statistics, layer_weights={}), time.time()
    refiner = Refiner(bench.pipe, statistics, bench.call, *args.refining, folder=args.plans)
    bundled = Plan.from_pretrained(PLAN)["transformer"] if args.model == MODEL else None
    methods = Methods(statistics, phase_ends, args.precision, refiner, bundled)
    there = set(map(identity, read(args.out))) if args.resume else set()
    for row in rows(bench, methods, asked(args), there):
        merge(args.out, [row | about], KEY)
        shown = (*ASKED, "density_executed", "psnr_mean", "psnr_min")
        print(f"{time.time() - last:6.1f} s", {name: row[name] for name in shown}, flush=True)
        last = time.time()


if __name__ == "__main__":
    main()
