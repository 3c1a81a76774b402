"""How close the bundled model's clips stay to its dense clips: our plans, other rules and oracles at equal density.

    python benchmarks/fidelity.py --impl triton --out benchmarks/results/fidelity.json
    python benchmarks/fidelity.py --impl triton --methods paroattn paper --densities 0.3 --warmups 0 --out RESULTS
    python benchmarks/fidelity.py --impl triton --model IMAGES --size 1 208 320 --out RESULTS

Static rules are calibrated on two prompts; clips come from sixteen others. All methods run the same operation on the
same noise and are compared with the same dense clips. Each is set so that the density it executes, over the steps that
are not dense, is the one asked for. With a warm-up of 0.2 the first fifth of the steps keeps every block.

    dense             every block kept, tokens in our orders: what rounding alone does to the clips
    paroattn          what calibrating makes by default: output error, layer-normalised, weighed by phase
    none              the same without reordering
    paper             orders by the paper's score, blocks by mass above one threshold
    local-window, spatial-temporal, radial, dynamic-topk, oracle      see rules.py
    …+reorder         the same rule on tokens in the orders of `paroattn`; an oracle has the budgets of `paroattn` or,
                      without reordering, of `none`

One frame is an image; training/train.py --size makes a model for it.

Rows are merged into the result file as they are measured, the most important first.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fidelity_demo import CANDIDATES, CLIP, Bench, Rule, all_kept
from paroattn.block_mask import BlockMask, blocks_of
from paroattn.capture import CaptureSettings, Statistics
from paroattn.demo.pipeline import MODEL, STEPS, weights_sha256
from paroattn.demo.prompt import CALIBRATION_PROMPTS, EVALUATION_PROMPTS
from paroattn.evaluation.fidelity import Summary, compare, summarise
from paroattn.integration.calibrate import collect
from paroattn.integration.schedule import noise_levels
from paroattn.integration.sensitivity import measure_sensitivity
from paroattn.phases import Phase, phase_at
from paroattn.plan.plan import LayerPlan, TransformerPlan
from paroattn.plan.search import PHASE_ENDS, PlanSettings, make_plan
from records import environment, merge
from rules import DYNAMIC, SPATIAL, STATIC, Choose, choosing, even_rows, plan_of

METHODS = (
    "dense", "paroattn", "none", "paper", "dynamic-topk", "oracle+reorder", "dynamic-topk+reorder", "oracle",
    "spatial-temporal", "radial", "local-window",
)  # fmt: skip
DENSITIES = (0.5, 0.3, 0.2, 0.125)
WARMUPS = (0.0, 0.2)
KEY = ("method", "density_target", "dense_warmup", "frames", "precision", "block", "steps", "phase_ends")
PLANNED = {
    "paroattn": Rule("output_error", "output_error", "layer_normalised", "six+tiles", "phases"),
    "none": Rule("none", "output_error", "layer_normalised", sensitivity="phases"),
    "paper": Rule("paper", "mass", "global"),
}
UNPLANNED = {"order_score": None, "mask_score": None, "budget": None, "orders": None, "sensitivity": None}
CLOSE = 1e-3
TRIES, SCALED = 16, 3


# Densities and warm-up


def warmup_steps(warmup: float, steps: int) -> int:
    """How many of the first steps are dense."""
    return math.ceil(warmup * steps - 1e-9)


def executed(plan: TransformerPlan, levels: Sequence[float]) -> float:
    """Video density over steps at these noise levels."""
    density = plan.phase_density()
    return float(sum(density[phase_at(plan.phases, level)] for level in levels) / len(levels))


def tuned(make: Callable[[float], TransformerPlan], density: float, levels: Sequence[float]) -> TransformerPlan:
    """The plan that executes a density over steps at these noise levels, or the closest that was found.

    Phases have densities of their own and hold other shares of a longer schedule, so what a plan executes is not what
    it was made for.
    """
    wanted, low, high, found = density, 0.0, 1.0, []
    for tries in range(TRIES):
        plan = make(wanted)
        got = executed(plan, levels)
        found.append((abs(got - density), tries, plan))
        if found[-1][0] <= CLOSE:
            break
        low, high = (wanted, high) if got < density else (low, wanted)
        scaled = wanted * density / got
        wanted = scaled if tries < SCALED and low < scaled < high else (low + high) / 2
    return min(found)[2]


def warmed(plan: TransformerPlan, levels: Sequence[float], dense: int) -> TransformerPlan:
    """The plan with every block kept in the first so many steps of a schedule, as a phase of its own."""
    if dense == 0:
        return plan
    later = [phase_at(plan.phases, level) for level in levels[dense:]]
    rest = sorted(set(later))
    phases = (
        Phase((levels[dense - 1] + levels[dense]) / 2, dense / len(levels)),
        *(Phase(plan.phases[each].lowest_noise, later.count(each) / len(levels)) for each in rest),
    )

    def longer(layer: LayerPlan, full: LayerPlan) -> LayerPlan:
        bits = torch.cat([full.mask.bits[:1], layer.mask.bits[rest]])
        precision = tuple(layer.precision[each] for each in (0, *rest))
        return replace(layer, mask=BlockMask(bits, layer.mask.key_blocks, plan.block), precision=precision)

    everything = all_kept(plan)
    layers = {name: longer(layer, everything.layers[name]) for name, layer in plan.layers.items()}
    return replace(plan, phases=phases, layers=layers)


# Methods


@dataclass(frozen=True)
class Method:
    """How one row is made.

    Attributes:
        plan: Orders and masks; for a rule that chooses by input, orders and how many blocks.
        about: Fields of the row that say how it was made.
        choose: That rule.
    """

    plan: TransformerPlan
    about: dict[str, Any]
    choose: Choose | None = None


class Methods:
    """Makes methods at a density over the noise levels of the steps that are not dense."""

    def __init__(self, statistics: Statistics, phase_ends: tuple[float, ...], precision: str):
        self.statistics, self.phase_ends, self.precision = statistics, phase_ends, precision
        self.planned = cache(self._planned)

    def __call__(self, name: str, density: float, levels: tuple[float, ...]) -> Method:
        rule, _, reorder = name.partition("+")
        if rule in PLANNED:
            about = vars(PLANNED[rule]) | {"phase_ends": list(self.phase_ends)}
            return Method(self.planned(rule, density, levels), about)
        about = UNPLANNED | {"phase_ends": None}
        if rule in STATIC:
            return Method(plan_of(self.statistics, STATIC[rule](self.statistics, density), self.precision), about)
        if rule == "oracle":
            budget = "paroattn" if reorder else "none"
            about |= {"budget": budget, "phase_ends": list(self.phase_ends)}
            return Method(self.planned(budget, density, levels), about, DYNAMIC[rule])
        return Method(self._even(density, levels, bool(reorder)), about, DYNAMIC[rule])

    def _planned(self, name: str, density: float, levels: tuple[float, ...]) -> TransformerPlan:
        rule = PLANNED[name]

        def make(wanted: float) -> TransformerPlan:
            settings = PlanSettings(
                wanted, rule.order_score, rule.mask_score, rule.budget, CANDIDATES[rule.orders], self.phase_ends,
                self.precision,
                sensitivity=rule.sensitivity != "none",
            )  # fmt: skip
            return make_plan(self.statistics, settings)

        return tuned(make, density, levels)

    def _even(self, density: float, levels: tuple[float, ...], reorder: bool) -> TransformerPlan:
        """As many blocks in every row; which ones is for the rule to say."""
        model = (SPATIAL,) * self.statistics.heads
        ours = self.planned("paroattn", density, levels).layers if reorder else {}
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

    def measure(self, method: Method, warmup: float) -> dict[str, Any]:
        """A row's numbers."""
        assert self.dense is not None
        dense = warmup_steps(warmup, self.steps)
        plan = warmed(method.plan, self.levels, dense)
        with choosing(self.pipe.transformer, method.choose) if method.choose else nullcontext():
            clips = self.clips(plan, self.precision)
        pairs = [compare(one, other) for one, other in zip(self.dense, clips, strict=True)]
        psnr, ssim = summarise([pair.psnr for pair in pairs]), summarise([pair.ssim for pair in pairs])
        return {
            "density_executed": round((self.executed * self.steps - dense) / (self.steps - dense), 5),
            "dense_warmup": warmup,
            "frames": clips.shape[1],
            "tokens": math.prod(plan.grid),
            "precision": self.precision,
            "block": "x".join(map(str, plan.block)),
            "steps": self.steps,
            "phases": len(method.plan.phases),
            **_summary(psnr, "psnr", 3),
            "ssim_mean": round(ssim.mean, 5),
            "clips": len(pairs),
            "psnr": [_number(pair.psnr, 4) for pair in pairs],
        }


def _summary(found: Summary, name: str, digits: int) -> dict[str, Any]:
    parts = {"mean": found.mean, "std": found.spread, "min": found.lowest}
    return {f"{name}_{part}": _number(value, digits) for part, value in parts.items()}


def _number(value: float, digits: int) -> float | None:
    return round(value, digits) if math.isfinite(value) else None


def rows(
    bench: Comparison, methods: Methods, names: Sequence[str], densities: Sequence[float], warmups: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Every row, the most important first."""
    seeds = methods.statistics.made.get("sensitivity_seeds")
    common = {"calibration_prompts": len(CALIBRATION_PROMPTS), "sensitivity_seeds": seeds}
    bench.dense = bench.clips(methods.dense(), bench.precision)
    if "dense" in names:
        reordered = Method(all_kept(methods("paroattn", 0.5, bench.levels).plan), UNPLANNED | {"phase_ends": None})
        yield common | {"method": "dense", "density_target": 1.0} | reordered.about | bench.measure(reordered, 0.0)
    for warmup in warmups:
        levels = bench.levels[warmup_steps(warmup, bench.steps) :]
        for name in (name for name in METHODS if name in names and name != "dense"):
            for density in densities:
                method = methods(name, density, levels)
                asked = {"method": name, "density_target": density}
                yield common | asked | method.about | bench.measure(method, warmup)


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
    args = parser.parse_args(argv)
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
    about = environment(args.device, args.impl) | {"weights_sha256": weights_sha256(args.model), "impl": args.impl}
    methods, last = Methods(replace(statistics, layer_weights={}), phase_ends, args.precision), time.time()
    for row in rows(bench, methods, args.methods, args.densities, args.warmups):
        merge(args.out, [row | about], KEY)
        shown = ("method", "density_target", "dense_warmup", "density_executed", "psnr_mean", "psnr_min")
        print(f"{time.time() - last:6.1f} s", {name: row[name] for name in shown}, flush=True)
        last = time.time()


if __name__ == "__main__":
    main()
