"""One forward of a real transformer on 1, 2 and 4 GPUs: torchrun --nproc-per-node 4 benchmarks/multi_gpu.py --out FILE.

Transformers, plans and inputs are those of end_to_end.py: published configurations with random weights, synthetic plans
with uneven heads. diffusers splits the sequence (Ulysses); heads are dealt to GPUs by their kept blocks (`balanced`) or
in the model's order, as without a plan. Where fewer GPUs than processes share a sequence, all of them work, in groups.

    ms            median over rounds of a whole forward, of the slowest process; all start together
    speedup_vs_1  over one GPU of the same machine, by the same plan
    imbalance     mean over layers of kept blocks of the busiest GPU over the mean of all
    layer         milliseconds of one layer by kernels, mean over processes; an exchange waits for the slowest
    ms_two_parts  the same in two parts of the heads, one of which computes while the other travels; with --overlap
    exchange_*    q, k and v of one layer exchanged alone, as bf16 and in 8 bits with their scales
    error_vs_1    norm of the difference to the output of one GPU over the norm of that
    same_attention  attention of a whole sequence on one GPU and split give the same bits

With two depths, `ms` is that of the whole model by the line through them (`extrapolated`), if neither is the whole;
all but `ms` is measured at the smaller one.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from diffusers.hooks.context_parallel import remove_context_parallel
from torch import Tensor

from architectures import ARCHITECTURES, Architecture, Inputs, built, first_blocks, only, plan_of
from gate import Wrong, check_output, check_what_ran, relative_error
from kernel_times import OWN_KERNEL, by_name, part_of, profiled
from paroattn import apply, remove
from paroattn.grid import Grid
from paroattn.integration import ranks as dealing
from paroattn.integration.exchange import to_heads, to_tokens
from paroattn.integration.hook import hook_of
from paroattn.integration.splits import split_sequence
from paroattn.kernels.attention import attention
from paroattn.kernels.planned import planned_attention
from paroattn.plan.balance import contiguous_deal, deal_heads, imbalance, kept_blocks
from paroattn.plan.plan import TransformerPlan
from records import environment, merge, significant

KEY = ("device", "model", "gpus", "density", "precision", "block", "balanced", "compiled")
EXCHANGE = re.compile(r"(?i:nccl)|^_copy_kernel")
PARTS = ("attention", "prepare", "exchange", "linear", "other", "idle")
LARGEST_ERROR = 0.05
TINY = {"num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 64, "num_layers": 3, "text_dim": 16}


@dataclass(frozen=True)
class Setting:
    """What is measured, the same for every number of GPUs."""

    model: Architecture
    density: float
    precision: str
    block: str
    depths: tuple[int, ...]
    rounds: int
    overlap: bool
    device: torch.device


def start() -> torch.device:
    """Join the other processes."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=90))
    return device


def measure(setting: Setting, gpus: Sequence[int], save: Callable[[dict[str, Any]], None]) -> None:
    """Rows for every number of GPUs, fewest first; the first is what the others are compared with."""
    model, device = setting.model, setting.device
    began = time.perf_counter()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    transformer = built(model, (max(setting.depths),), device, dtype)
    inputs = model.inputs(model, device, dtype)
    plan = plan_of(transformer, model, setting.density, setting.block)
    say(f"built in {time.perf_counter() - began:.0f} s")
    bench = Bench(setting, transformer, inputs, plan)
    first: dict[str, Any] | None = None
    for count, balanced in [(count, True) for count in gpus] + [(count, False) for count in gpus if count > 1]:
        with bench.following(count, balanced):
            row = bench.row(count, balanced)
        row["ms_two_parts"] = None
        if setting.overlap and balanced and count > 1:
            with bench.following(count, balanced, parts=2), torch.no_grad():
                found = {depth: bench.timed(depth) for depth in setting.depths}
                row["ms_two_parts"] = significant(whole_model(found, sum(model.depth)))
        first = first or row
        row |= {"speedup_vs_1": significant(first["ms"] / row["ms"])}
        save(row)
        say(f"{described(row)}, {time.perf_counter() - began:.0f} s")


class Bench:
    """A transformer, its inputs and its plan."""

    def __init__(self, setting: Setting, transformer: Any, inputs: Inputs, plan: TransformerPlan):
        self.setting, self.transformer, self.inputs, self.plan = setting, transformer, inputs, plan
        self.whole: Tensor | None = None
        self.blocks = {depth: first_blocks(transformer, setting.model, (depth,)) for depth in setting.depths}

    @contextmanager
    def following(self, gpus: int, balanced: bool, parts: int = dealing.PARTS) -> Iterator[None]:
        """Split and follow the plan for a while."""
        before = dealing.PARTS
        deal = deal_heads if balanced else lambda costs, ranks: contiguous_deal(len(costs), ranks)
        dealing.deal_heads, dealing.PARTS = deal, parts
        split_sequence(self.transformer, gpus)
        apply(self.transformer, self.plan, precision=self.setting.precision)
        try:
            yield
        finally:
            remove(self.transformer)
            unsplit(self.transformer)
            dealing.deal_heads, dealing.PARTS = deal_heads, before

    def row(self, gpus: int, balanced: bool) -> dict[str, Any]:
        setting = self.setting
        with torch.no_grad():
            found = {depth: self.timed(depth) for depth in setting.depths}
            output = self.forward(min(setting.depths))
            check_output(output, self.inputs)
            if gpus == 1:
                self.whole = output
            assert self.whole is not None
            error = _worst(relative_error(output, self.whole))
            with only(self.transformer, self.blocks[min(setting.depths)]):
                check_what_ran(self.transformer, setting.device)
            same = self.same_attention(gpus)
            parts = self.parts(min(setting.depths))
            exchange = self.exchange_alone(gpus)
        if not error < LARGEST_ERROR or not same:
            raise Wrong(f"{gpus} GPUs differ from one by {error:.2g}; attention is {'the same' if same else 'not'}")
        ms, depth = whole_model(found, sum(setting.model.depth)), sum(setting.model.depth)
        return about(setting) | {
            "gpus": gpus, "balanced": balanced, "ms": significant(ms), "speedup_vs_1": None,
            "imbalance": significant(self.imbalance(gpus)), "depth": depth,
            "extrapolated": depth not in setting.depths, "rounds": setting.rounds, "error_vs_1": error,
            "same_attention": same, "layer": parts, **exchange,
            "measured": [{"depth": at, "ms": significant(each)} for at, each in found.items()],
        }  # fmt: skip

    def forward(self, depth: int) -> Tensor:
        with only(self.transformer, self.blocks[depth]):
            return self.transformer(**self.inputs, return_dict=False)[0]

    def timed(self, depth: int) -> float:
        """Median time of the slowest process, in milliseconds."""
        self.forward(depth)
        times = []
        for _ in range(self.setting.rounds):
            dist.barrier()
            finish()
            began = time.perf_counter()
            self.forward(depth)
            finish()
            times.append(_worst((time.perf_counter() - began) * 1e3))
        return statistics.median(times)

    def parts(self, depth: int) -> dict[str, float]:
        """Milliseconds of one layer by `PARTS`, mean over processes; what is around the layers is spread over them."""
        dist.barrier()
        profile = profiled(lambda: self.forward(depth))
        times: dict[str, float] = dict.fromkeys(PARTS, 0.0) | {"idle": (profile.gaps or 0.0) / depth}
        for name, ms in profile.kernels:
            part = "exchange" if EXCHANGE.search(name) else part_of(name)
            part = "other" if part == "attention" and not OWN_KERNEL.search(name) else part
            times[part] += ms / depth
        longest = ", ".join(f"{row['name'][:32]} {row['ms'] / depth:.3g}" for row in by_name(profile.kernels)[:14])
        say(f"    milliseconds of a layer: {longest}")
        return {part: significant(_mean(ms)) for part, ms in times.items()}

    def imbalance(self, gpus: int) -> float:
        costs = [kept_blocks(layer.mask[0]).tolist() for layer in self.plan.layers.values()]
        return statistics.mean(imbalance(each, dealing.deal_heads(each, gpus)) for each in costs)

    def same_attention(self, gpus: int) -> bool:
        """Whether attention of one layer, split, is that of the whole sequence, on the same q, k and v."""
        plan, precision = self.plan, self.setting.precision
        name = next(iter(plan.layers))
        generator = torch.Generator(self.setting.device).manual_seed(7)
        size = (1, plan.grid.tokens, plan.heads, plan.head_dim)
        q, k, v = (
            torch.randn(size, generator=generator, device=self.setting.device).to(self.transformer.dtype) for _ in "qkv"
        )
        whole = planned_attention(q, k, v, plan, name, 0, precision=precision)
        hook: Any = hook_of(self.transformer)
        if hook.ranks is None:
            return True
        operands, ranks = hook.layers[name].operands, hook.ranks
        q, k, v = (x.tensor_split(gpus, 1)[ranks.rank] for x in (q, k, v))
        tokens = q.shape[1]
        q, k, v = to_heads(q, k, v, operands.heads, operands.sizes, ranks.group)
        out: Any = attention(q, k, v, operands.mask, table=operands.table, order=operands.order, precision=precision)
        back = to_tokens(out, operands.heads, operands.sizes, tokens, ranks.group)
        equal = torch.equal(back, whole.tensor_split(gpus, 1)[ranks.rank])
        return _worst(0.0 if equal else 1.0) == 0

    def exchange_alone(self, gpus: int) -> dict[str, float | None]:
        """Milliseconds of q, k and v of one layer, exchanged one after the other, in 16 and in 8 bits."""
        hook: Any = hook_of(self.transformer)
        if hook.ranks is None:
            return {"exchange_bf16_ms": None, "exchange_int8_ms": None}
        model, group = self.setting.model, hook.ranks._process_group
        tokens = model.grid.tokens // gpus * gpus
        return {
            f"exchange_{name}_ms": significant(self._exchange(tokens * model.heads * channels // gpus, dtype, group))
            for name, dtype, channels in (
                ("bf16", torch.bfloat16, model.head_dim), ("int8", torch.int8, model.head_dim + 2),
            )
        }  # fmt: skip

    def _exchange(self, count: int, dtype: torch.dtype, group: Any) -> float:
        sent = torch.ones(count, device=self.setting.device).to(dtype)
        received, times = torch.empty_like(sent), []
        for _ in range(5):
            dist.barrier()
            finish()
            began = time.perf_counter()
            for _ in range(3):
                dist.all_to_all_single(received, sent, group=group)
            finish()
            times.append(_worst((time.perf_counter() - began) * 1e3))
        return statistics.median(times[1:])


def unsplit(transformer: Any) -> None:
    """Undo `split_sequence`, which diffusers has no verb for."""
    if transformer._parallel_config is None:
        return
    remove_context_parallel(transformer, transformer._cp_plan)
    transformer._parallel_config = None
    for module in transformer.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = None


def whole_model(found: dict[int, float], depth: int) -> float:
    """Time at the published depth."""
    if depth in found:
        return found[depth]
    (low, less), (high, more) = sorted(found.items())
    return less + (more - less) * (depth - low) / (high - low)


def about(setting: Setting) -> dict[str, Any]:
    versions = environment(setting.device.type)
    if setting.device.type == "cuda":
        import triton

        versions["triton"] = triton.__version__
    model = setting.model
    return versions | {
        "diffusers": diffusers.__version__, "model": model.name, "tokens": model.layout.tokens, "batch": model.batch,
        "heads": model.heads, "density": setting.density, "precision": setting.precision, "block": setting.block,
        "compiled": False,
    }  # fmt: skip


def described(row: dict[str, Any]) -> str:
    parts = " ".join(f"{part} {ms:.3g}" for part, ms in row["layer"].items())
    order = "balanced" if row["balanced"] else "in order"
    return (
        f"{row['gpus']} GPUs {order}: {row['ms']:.5g} ms, {row['speedup_vs_1']:.3f}x, "
        f"imbalance {row['imbalance']:.3f}, error {row['error_vs_1']:.2g}, a layer: {parts}; "
        f"in two parts {row['ms_two_parts']}; exchange alone {row['exchange_bf16_ms']} / {row['exchange_int8_ms']}; "
        f"{row['measured']}"
    )


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _worst(value: float) -> float:
    return _over_processes(value, dist.ReduceOp.MAX)


def _mean(value: float) -> float:
    return _over_processes(value, dist.ReduceOp.SUM) / dist.get_world_size()


def _over_processes(value: float, how: Any) -> float:
    number = torch.tensor([value], dtype=torch.float64)  # on the CPU: gloo
    dist.all_reduce(number, how)
    return number.item()


def smaller(model: Architecture) -> Architecture:
    """A model of the same kind that a CPU runs in seconds."""
    return replace(model, name=f"{model.name}-tiny", config=dict(model.config) | TINY, grid=Grid(3, 8, 10))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=ARCHITECTURES, default="wan-14b-720p")
    add("--gpus", nargs="+", type=int, default=[1, 2, 4])
    add("--density", type=float, default=0.2)
    add("--precision", default="int8/fp8")
    add("--block", default="128x128")
    add("--depths", nargs="+", type=int, help="one or two numbers of layers (default: all)")
    add("--rounds", type=int, default=3)
    add("--tiny", action="store_true", help="does everything run: a small model of the same kind")
    add("--overlap", action="store_true", help="time exchanging in two parts as well")
    add("--out", type=Path, help="result file to merge the rows into")
    options = parser.parse_args(arguments)
    diffusers.utils.logging.set_verbosity_error()
    if options.overlap:  # lets an exchange begin while attention keeps the GPU busy
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    device = start()
    model = smaller(ARCHITECTURES[options.model]) if options.tiny else ARCHITECTURES[options.model]
    setting = Setting(
        model, options.density, options.precision, options.block, tuple(options.depths or model.depth), options.rounds,
        options.overlap, device,
    )  # fmt: skip

    def save(row: dict[str, Any]) -> None:
        if options.out and dist.get_rank() == 0:
            merge(options.out, [json.loads(json.dumps(row))], KEY)

    try:
        measure(setting, options.gpus, save)
    except Wrong as reason:
        print(reason, flush=True)
        return 1
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
