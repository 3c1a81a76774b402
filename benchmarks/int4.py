"""What every ingredient of INT4 brings to whole samples of the bundled model, every head in INT4.

    python benchmarks/int4.py --out benchmarks/results/int4.json
    python benchmarks/int4.py --device cpu --clips 1 --steps 6 --guidance 1 --only shipped --out RESULTS

All blocks are kept, except in the rows of 0.5. The reference computes both sides of every pair, the dense one in
float32; --impl triton measures what ships on its kernels and nothing else, against bf16. PSNR as in fidelity_demo.py.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
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

KEY = ("what", "ingredients", "impl", "clips", "steps", "guidance")
SIGNED = FORMATS["int4"]
Patches = dict[str, Callable[..., Any]]


def plain(x: Tensor, granularity: str, block: int) -> Tensor:
    return dequantize(*quantize(x, SIGNED, granularity, block if granularity == "block" else None))


def plain_qk(granularity: str, rotated: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def rounded(q: Tensor, k: Tensor, real: Any, block: int, precision: Any) -> tuple[Tensor, Tensor]:
        rotation = hadamard(q.shape[-1]).to(q) if rotated else torch.eye(q.shape[-1], device=q.device)
        return plain(q @ rotation, granularity, block), plain(k @ rotation, granularity, block)

    return rounded


def fed_back(q: Tensor, k: Tensor, real: Any, block: int, precision: Any) -> tuple[Tensor, Tensor]:
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


def plain_v(v: Tensor, precision: Any) -> Tensor:
    return plain(v, "channel", 0)


@dataclass(frozen=True)
class Variant:
    """A row to be: what is in INT4, what it is made of, and what of the reference it replaces; None: what ships."""

    what: str
    ingredients: tuple[str, ...]
    patches: Patches | None = None
    density: float = 1.0


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
    ("P dithered", {"_round_v": plain_v}),
    ("V's errors carried on", None),
)
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
    for what, table in (("qk", QK), ("pv", PV)):
        yield Variant(what, (table[0][0],), table[0][1])
        for last in range(1, len(table) - 1):
            yield Variant(what, tuple(name for name, _ in table[1 : last + 1]), table[last][1])
    paper = (QK[0][1] or {}) | (PV[0][1] or {})
    yield Variant("qk+pv", (QK[0][0], PV[0][0]), paper)


def half_kept(bench: Bench) -> TransformerPlan:
    """A plan of density 0.5 from the calibration prompts, not weighed."""
    settings = CaptureSettings()
    statistics: Statistics = collect(bench.pipe, CALIBRATION_PROMPTS, steps=10, capture=settings)["transformer"]
    return make_plan(statistics, PlanSettings(density=0.5))


def measured(bench: Bench, variant: Variant, plan: TransformerPlan) -> dict[str, Any]:
    precision = PRECISIONS.get(variant.what.removeprefix("0.5+"), "fp32")
    if bench.impl == "triton":
        precision = precision.replace("fp32", "bf16")
    with ExitStack() as stack:
        for name, replacement in (variant.patches or {}).items():
            stack.enter_context(patch.object(reference, name, replacement))
        row = bench.row(plan, precision)
    shared = {name: row[name] for name in ("density_executed", "psnr_mean", "psnr_std", "psnr_min", "clips", "steps")}
    share = 0.0 if variant.what == "0.5" else 1.0
    return {"what": variant.what, "ingredients": list(variant.ingredients), "heads_int4": share} | shared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--impl", default="reference", choices=("reference", "triton"))
    parser.add_argument("--clips", type=int, default=len(EVALUATION_PROMPTS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--only", choices=("shipped", "dense", "half"), help="fewer rows: what ships, or by density")
    parser.add_argument("--share", type=int, nargs=2, metavar=("INDEX", "OF"), default=(0, 1), help="of the rows")
    args = parser.parse_args()
    bench = Bench(args.device, args.clips, args.steps, args.impl)
    call = type(bench.pipe).__call__
    about = environment(args.device, args.impl) | {"weights_sha256": weights_sha256(), "impl": args.impl}
    chosen = [
        each for each in variants()
        if (each.patches is None or (args.impl == "reference" and args.only != "shipped"))
        and {"dense": each.density == 1, "half": each.density < 1, "shipped": each.density == 1}.get(args.only, True)
    ][args.share[0] :: args.share[1]]  # fmt: skip
    with patch.object(type(bench.pipe), "__call__", functools.partialmethod(call, guidance_scale=args.guidance)):
        plans = {1.0: all_kept(Plan.from_pretrained(PLAN)["transformer"])}
        bench.dense = bench.clips(plans[1.0], "bf16" if args.impl == "triton" else "fp32")
        if any(each.density < 1 for each in chosen):
            plans[0.5] = half_kept(bench)
        began = time.time()
        for variant in chosen:
            row = measured(bench, variant, plans[variant.density]) | {"guidance": args.guidance} | about
            merge(args.out, [row], KEY)
            print(f"{time.time() - began:6.0f} s", row["what"], row["ingredients"], row["psnr_mean"], flush=True)


if __name__ == "__main__":
    main()
