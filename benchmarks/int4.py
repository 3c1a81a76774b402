"""What every ingredient of INT4 brings to whole samples of the bundled model, and what mixtures of INT4 and INT8 keep.

    python benchmarks/int4.py --out benchmarks/results/int4.json
    python benchmarks/int4.py --device cpu --clips 1 --steps 6 --guidance 1 --only shipped --out RESULTS

All blocks are kept, except in the rows of 0.5. Every head is in INT4, or a share of them: those that the planner finds
to lose least by it, and for comparison those that lose most, all others in INT8. The reference computes both sides of
every pair, the dense one in float32; --impl triton measures what ships on its kernels and nothing else, against bf16.
PSNR as in fidelity_demo.py.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import pad

from fidelity_demo import Bench, all_kept
from paroattn.capture import CaptureSettings, Statistics
from paroattn.demo.pipeline import GUIDANCE, PLAN, STEPS, weights_sha256
from paroattn.demo.prompt import CALIBRATION_PROMPTS, EVALUATION_PROMPTS
from paroattn.integration.calibrate import collect
from paroattn.kernels import four_bits, reference
from paroattn.plan.plan import Plan, TransformerPlan
from paroattn.plan.search import PlanSettings, make_plan
from paroattn.precision import FORMATS, dequantize, hadamard, quantize, round_to
from records import environment, merge

KEY = ("what", "ingredients", "heads_int4", "heads", "impl", "clips", "steps", "guidance")
SIGNED = FORMATS["int4"]
SHIPPED_P = reference._round_p
LEAST, MOST = "those that lose least", "those that lose most"
Patches = dict[str, Any]


def plain(x: Tensor, granularity: str, block: int) -> Tensor:
    return dequantize(*quantize(x, SIGNED, granularity, block if granularity == "block" else None))


def plain_qk(granularity: str, rotated: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def rounded(q: Tensor, k: Tensor, real: Any, video: int, block: int, precision: Any) -> tuple[Tensor, Tensor]:
        rotation = hadamard(q.shape[-1]).to(q) if rotated else torch.eye(q.shape[-1], device=q.device)
        return plain(q @ rotation, granularity, block), plain(k @ rotation, granularity, block)

    return rounded


def fed_back(q: Tensor, k: Tensor, real: Any, video: int, block: int, precision: Any) -> tuple[Tensor, Tensor]:
    """Rotated, both by token, errors fed back."""
    rotation = hadamard(q.shape[-1]).to(q)
    found = [x @ rotation for x in (q, k)]
    for_keys, for_queries = (four_bits.feedback(x[:, :, :: four_bits.SAMPLE_OF_EVERY]) for x in found)
    q_hat = dequantize(*four_bits.round_queries(found[0], for_queries))
    return q_hat, dequantize(*four_bits.round_queries(found[1], for_keys))


def no_mean(k: Tensor, real: Any) -> Tensor:
    return k.new_zeros(*k.shape[:2], 1, k.shape[-1])


def plain_p(shared: str, top: float) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """P with one scale for a row within the block or for the whole block."""

    def rounded(scores: Tensor, block: tuple[int, int], precision: Any) -> tuple[Tensor, Tensor, Tensor]:
        rows, keys = scores.shape[-2:]
        largest = scores.amax(-1, keepdim=True)
        tiles = pad(scores, (0, -keys % block[1], 0, -rows % block[0]), value=-torch.inf)
        tiles = tiles.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
        highest = tiles.amax((-3, -1) if shared == "block" else -1, keepdim=True)
        form = replace(FORMATS["uint4"], highest=top)
        stored = round_to((tiles - highest.clamp_min(-1e30)).exp() * top, form).flatten(-4, -3)[..., :rows, :, :]
        highest = highest.expand(*tiles.shape[:-1], 1).flatten(-4, -3)[..., :rows, :, :]
        p = stored * (highest - largest[..., None]).exp()
        return p.flatten(-2)[..., :keys], p.sum((-2, -1))[..., None], largest

    return rounded


def exact_sum(scores: Tensor, block: tuple[int, int], precision: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What ships over the sum of P before it is rounded."""
    total = (scores - scores.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True)
    p, _, largest = SHIPPED_P(scores, block, precision)
    return p, total, largest


def plain_v(v: Tensor, precision: Any) -> Tensor:
    return plain(v, "channel", 0)


def middles_of_v(v: Tensor, precision: Any) -> Tensor:
    return dequantize(*four_bits.round_values(v, carry=0.0, from_fourth=0.0))


@dataclass(frozen=True)
class Variant:
    """A row to be.

    Attributes:
        what: Is in INT4.
        ingredients: What that is made of.
        patches: What they replace of the reference, or of `four_bits` if in capitals; None: nothing, what ships.
        density: Kept blocks.
        share: Of the heads in INT4; all others are in INT8.
        heads: Which these are.
    """

    what: str
    ingredients: tuple[str, ...]
    patches: Patches | None = None
    density: float = 1.0
    share: float = 1.0
    heads: str | None = None


QK: tuple[tuple[str, Patches | None], ...] = (
    ("Q and K by block (the paper)", {"_round_qk": plain_qk("block", False), "_mean_key": no_mean}),
    ("K's mean subtracted, by token", {"_round_qk": plain_qk("token", False)}),
    ("rotation", {"_round_qk": plain_qk("token", True)}),
    ("errors fed back to other channels", {"_round_qk": fed_back}),
    ("middles of 32 keys, K by block", None),
)
PV: tuple[tuple[str, Patches | None], ...] = (
    ("P by block, V by channel (the paper)", {"_round_p": plain_p("block", 7.0), "_round_v": plain_v}),
    ("P by row within the block", {"_round_p": plain_p("row", 7.0), "_round_v": plain_v}),
    ("P unsigned", {"_round_p": plain_p("row", 15.0), "_round_v": plain_v}),
    ("P's errors carried on", {"_round_v": plain_v}),
    ("middles of 16 values", {"_round_v": middles_of_v}),
    ("V's errors carried on", None),
)
INSTEAD: tuple[tuple[str, str, Patches], ...] = (
    ("qk", "scales of the largest value", {"REACH": dict.fromkeys(four_bits.REACH, 1.0)}),
    ("pv", "P's exact sum as denominator", {"_round_p": exact_sum}),
)
"""Of what ships, one thing otherwise."""
SHARES = (0.0, 0.25, 0.5, 0.75)
PRECISIONS = {"qk": "int4/fp32", "pv": "fp32/int4", "qk+pv": "int4"}


def variants() -> Iterator[Variant]:
    """What ships first, then the tables of ingredients, each line with all of those before it."""
    shipped = {"qk": tuple(name for name, _ in QK[1:]), "pv": tuple(name for name, _ in PV[1:])}
    shipped["qk+pv"] = shipped["qk"] + shipped["pv"]
    for what, ingredients in shipped.items():
        yield Variant(what, ingredients)
    yield Variant("0.5", (), density=0.5)
    for what, ingredients in shipped.items():
        yield Variant(f"0.5+{what}", ingredients, density=0.5)
    for share in SHARES:
        yield Variant("qk+pv", shipped["qk+pv"], share=share, heads=LEAST)
    yield Variant("qk+pv", shipped["qk+pv"], share=0.5, heads=MOST)
    yield Variant("0.5+qk+pv", shipped["qk+pv"], density=0.5, share=0.5, heads=LEAST)
    for what, table in (("qk", QK), ("pv", PV)):
        yield Variant(what, (table[0][0],), table[0][1])
        for last in range(1, len(table) - 1):
            yield Variant(what, tuple(name for name, _ in table[1 : last + 1]), table[last][1])
    for what, other, patches in INSTEAD:
        yield Variant(what, (*shipped[what], f"but {other}"), patches)
    paper = (QK[0][1] or {}) | (PV[0][1] or {})
    yield Variant("qk+pv", (QK[0][0], PV[0][0]), paper)


@contextmanager
def replaced(patches: Patches | None) -> Iterator[None]:
    with ExitStack() as stack:
        for name, replacement in (patches or {}).items():
            stack.enter_context(patch.object(four_bits if name.isupper() else reference, name, replacement))
        yield


class Plans:
    """Plans of the variants; statistics are collected once, from the calibration prompts, and not weighed.

    Args:
        bench: Whose pipeline is calibrated.
        steps: Of the calibration schedule.
    """

    def __init__(self, bench: Bench, steps: int):
        self.bench, self.steps = bench, steps
        self.dense = all_kept(Plan.from_pretrained(PLAN)["transformer"])

    @functools.cached_property
    def statistics(self) -> Statistics:
        capture = CaptureSettings(paper=False)
        return collect(self.bench.pipe, CALIBRATION_PROMPTS, steps=self.steps, capture=capture)["transformer"]

    def of(self, variant: Variant) -> TransformerPlan:
        if variant.heads is None and variant.density == 1:
            return self.dense
        share = None if variant.heads is None else 1 - variant.share if variant.heads == MOST else variant.share
        settings = PlanSettings(variant.density, precision=None if share is None else "auto", int4_share=share)
        plan = make_plan(self.statistics, settings)
        if variant.heads == MOST:
            plan = swapped(plan)
        if variant.density < 1:
            return plan
        layers = {name: replace(self.dense.layers[name], precision=(each.precision[0],) * len(self.dense.phases))
                  for name, each in plan.layers.items()}  # fmt: skip
        return replace(self.dense, layers=layers)


def swapped(plan: TransformerPlan) -> TransformerPlan:
    """INT4 for INT8 and the other way round."""
    other = {"int4": "int8", "int8": "int4"}
    layers = {name: replace(layer, precision=tuple(tuple(other[each] for each in heads) for heads in layer.precision))
              for name, layer in plan.layers.items()}  # fmt: skip
    return replace(plan, layers=layers)


def measured(bench: Bench, variant: Variant, plan: TransformerPlan) -> dict[str, Any]:
    precision = PRECISIONS.get(variant.what.removeprefix("0.5+"), "fp32")
    if bench.impl == "triton":
        precision = precision.replace("fp32", "bf16")
    with replaced(variant.patches):
        row = bench.row(plan, None if variant.heads else precision)
    shared = {name: row[name] for name in ("density_executed", "psnr_mean", "psnr_std", "psnr_min", "clips", "steps")}
    share = plan.precision_shares().get("int4", 0.0) if variant.heads else float(variant.what != "0.5")
    about = {"what": variant.what, "ingredients": list(variant.ingredients), "heads_int4": round(share, 5)}
    return about | {"heads": variant.heads} | shared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--impl", default="reference", choices=("reference", "triton"))
    parser.add_argument("--clips", type=int, default=len(EVALUATION_PROMPTS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--calibration-steps", type=int, default=10)
    parser.add_argument(
        "--only", choices=("shipped", "dense", "half", "mixed"), help="fewer rows: what ships, by density, mixtures"
    )
    parser.add_argument("--share", type=int, nargs=2, metavar=("INDEX", "OF"), default=(0, 1), help="of the rows")
    args = parser.parse_args()
    bench = Bench(args.device, args.clips, args.steps, args.impl)
    call = type(bench.pipe).__call__
    about = environment(args.device, args.impl) | {"weights_sha256": weights_sha256(), "impl": args.impl}
    chosen = [
        each for each in variants()
        if (each.patches is None or args.impl == "reference")
        and {
            "shipped": each.density == 1 and each.patches is None and each.heads is None,
            "dense": each.density == 1,
            "half": each.density < 1,
            "mixed": each.heads is not None,
        }.get(args.only, True)
    ][args.share[0] :: args.share[1]]  # fmt: skip
    with patch.object(type(bench.pipe), "__call__", functools.partialmethod(call, guidance_scale=args.guidance)):
        plans = Plans(bench, args.calibration_steps)
        bench.dense = bench.clips(plans.dense, "bf16" if args.impl == "triton" else "fp32")
        began = time.time()
        for variant in chosen:
            row = measured(bench, variant, plans.of(variant)) | {"guidance": args.guidance} | about
            merge(args.out, [row], KEY)
            said = (row["what"], row["ingredients"], row["heads_int4"], row["heads"], row["psnr_mean"])
            print(f"{time.time() - began:6.0f} s", *said, flush=True)


if __name__ == "__main__":
    main()
