"""One forward of real transformers at real shapes: python benchmarks/end_to_end.py --model wan-14b-480p --out FILE.

Transformers are built from their published configurations with random weights (architectures.py): with a static plan,
latency does not depend on weights. A denoising step is one such call, or two for Wan, whose guidance calls it twice.
Plans are synthetic, with the spread of densities over heads that the bundled model's plan has (synthetic_plan.py).

First, the self-attentions of one block of each kind run by a plan that keeps every block, in the model's own dtype, on
inputs that the stock model gave them; if they differ by more than `LARGEST_ERROR` from stock, nothing is timed.

    stock      diffusers as installed: its own choice of attention, named in `kernel`; eager
    cudnn      the fastest dense attention, cuDNN's, through `set_attention_backend`
    sage2      SageAttention 2, through diffusers' backend, where it is installed
    paroattn   a plan on top of cudnn, which still runs the cross-attentions

Times are medians over rounds, in which forwards follow one another for `LOAD_MS`, or once if one takes longer, from
Python's first launch until the GPU is done. By default, a few blocks of each kind are timed at two depths, in turns,
and a line through them gives time, memory and profile of the whole model (`extrapolated`); with `full` among the
depths, the whole model takes turns with them and has rows of its own.
`compiled` is diffusers' regional compilation of the repeated blocks. FP8 linears are torchao's, scaled by row, in the
blocks. The step cache is diffusers' first-block cache. Which steps it skips would depend on weights, so here it skips
every second one, and `ms` is the mean of both. `density` is that of the video's blocks; `density_executed` counts text,
which is always dense.

`*_ms` split one forward by its kernels (kernel_times.py): attention of the planned layers, preparing q, k and v for it,
linear layers, other, idle. `gaps_ms` is when no kernel ran while they were seen. `overhead` is what is other or waiting
beyond that of the dense row, as a share of `ms`: what ours adds around its kernels. The clock of the GPU differs from
row to row, so the dense row's other kernels are scaled by how much longer the same linear layers took; waiting is idle,
but no more than the gaps, since a slower clock looks like idle time and a profiler's launches like gaps. `peak_gib` is
the peak of one forward, weights included. `predicted_ms` is what the cost model says, with the rates that are packaged
for the GPU (rates.py); null where there are none.
"""

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from architectures import (
    ARCHITECTURES,
    Architecture,
    Blocks,
    Inputs,
    built,
    first_blocks,
    only,
    plan_of,
    planned_layers,
)
from forward_kinds import DEPTHS, GROUPS, HEADLINE, MODES, OURS, STOCK, Choice, Kind, kinds, points, whole_model
from forward_rows import NOT_TIMED, NUMBERS, about, described, reason_of, save
from forwards import BACKENDS, BASELINE, attending, caching, compiled, fp8_linears
from gate import LARGEST_ERROR, Wrong, attention_error, check_output, check_what_ran
from kernel_times import PARTS, Breakdown, breakdown, profiled
from paroattn import apply, remove
from paroattn.plan.plan import TransformerPlan
from records import significant
from timing import lasting_medians

SMOKE_DEPTHS = (1, 2)
WHOLE = "full"
KERNELS_KEPT = 16
"""How many kernels a profile lists."""
GIB = 2**30
LOAD_MS = 700.0
"""How long forwards follow one another in a round, so that a few blocks see the clock that a whole model gets."""


@dataclass(frozen=True)
class Measured:
    """One forward at one depth.

    Attributes:
        ms: Median time.
        gib: Peak memory of a model of this depth; None on a CPU.
        profile: None where not profiled.
    """

    ms: float
    gib: float | None = None
    profile: Breakdown | None = None


def measure(model: Architecture, choice: Choice, device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Rows of a model, one after the other.

    Raises:
        Wrong: If attention by a plan is not what stock computes.
    """
    line, where = points(model, choice.depths), torch.device(device)
    lines = [at for at in (line, [model.depth] * choice.whole) if at]
    deepest = tuple(map(max, zip(*(depth for at in lines for depth in at), strict=True)))
    start = time.perf_counter()
    transformer = built(model, deepest, where, dtype)
    inputs = model.inputs(model, where, dtype)
    error = attention_error(transformer, model, inputs, choice.impl)
    seconds = time.perf_counter() - start
    print(f"{model.name}: built and compared with stock, error {error:.2g}, {seconds:.1f} s", flush=True)
    if not error <= LARGEST_ERROR:
        raise Wrong(f"{model.name} with all blocks kept is off from stock by {error:.2g}; at most {LARGEST_ERROR:g}")
    bench = Bench(transformer, model, inputs, choice)
    for kind in kinds(model, choice):
        start, graphs = time.perf_counter(), _graphs()
        try:
            rows = bench.rows(kind, lines)
        except Exception as failure:  # a backend of someone else fails in ways of its own, and others are still to come
            row = asdict(kind) | dict.fromkeys((*NUMBERS, *NOT_TIMED)) | {"reason": reason_of(failure)}
            rows = [row | {"depth": sum(model.depth), "extrapolated": len(at) > 1} for at in lines]
        _free()
        compiled_now = f", {_graphs() - graphs} graphs" if kind.compiled else ""
        seconds = f"  ({time.perf_counter() - start:.0f} s{compiled_now})"
        for row in rows:
            row = about(model, device) | row
            print(described(row) + seconds, flush=True)
            yield row


class Bench:
    """A transformer, its inputs and its plans."""

    def __init__(self, transformer: Any, model: Architecture, inputs: Inputs, choice: Choice):
        self.transformer, self.model, self.inputs, self.choice = transformer, model, inputs, choice
        self.plans: dict[tuple[float, str], TransformerPlan] = {}
        self.quantised = False
        self._graph: tuple[Any, ...] | None = None

    def rows(self, kind: Kind, lines: Sequence[Sequence[tuple[int, ...]]]) -> list[dict[str, Any]]:
        """Everything about rows but speed-ups and where they ran; one for each line, or single point, to measure."""
        self._make_ready(kind)
        blocks = {depth: first_blocks(self.transformer, self.model, depth) for at in lines for depth in at}
        with torch.no_grad(), self.running(kind) as forward:
            if kind.step_cache:
                found = {depth: self.cached(kind, some, forward) for depth, some in blocks.items()}
            else:
                found = self.in_turns(kind, blocks, forward)
        measured = [([found[depth] for depth in at], at) for at in lines]
        return [asdict(kind) | self._numbers(*each) | self._about(kind, *each) for each in measured]

    def _make_ready(self, kind: Kind) -> None:
        if kind.fp8_linears and not self.quantised:
            fp8_linears(self.transformer, self.model)
            self.quantised = True
        if kind.graph != self._graph:
            torch._dynamo.reset()
            self._graph = kind.graph

    @contextmanager
    def running(self, kind: Kind) -> Iterator[Callable[[], Any]]:
        """What is on in a row, but for a step cache, around a forward."""
        transformer = self.transformer
        with ExitStack() as stack:
            if kind.impl != STOCK:
                backend = BACKENDS.get(kind.impl, BACKENDS[BASELINE])
                stack.enter_context(attending(transformer, backend, self.inputs, everywhere=kind.impl != OURS))
            if kind.impl == OURS:
                settings: dict[str, Any] = {"precision": kind.precision, "impl": self.choice.impl}
                apply(transformer, self.plan(kind), **settings, even_if_slower=True)
                stack.callback(remove, transformer)
            if kind.compiled and not kind.step_cache:
                stack.enter_context(compiled(transformer, self.model))
            yield lambda: transformer(**self.inputs, return_dict=False)[0]

    def in_turns(self, kind: Kind, blocks: Mapping[Any, Blocks], forward: Callable[[], Any]) -> dict[Any, Measured]:
        """A forward at every depth. Depths take turns, so that all of them see the same clock of the GPU."""

        def shallow(some: Blocks) -> Callable[[], Any]:
            def call() -> Any:
                with only(self.transformer, some):
                    return forward()

            return call

        calls = {depth: shallow(some) for depth, some in blocks.items()}
        for depth, call in calls.items():
            check_output(call(), self.inputs)
            if kind.impl == OURS and not kind.compiled:
                with only(self.transformer, blocks[depth]):
                    check_what_ran(self.transformer, self.inputs["hidden_states"].device)
        ms = self.times(calls)
        return {depth: self.measured(kind, call, blocks[depth], ms[depth]) for depth, call in calls.items()}

    def measured(self, kind: Kind, call: Callable[[], Any], some: Blocks, ms: float) -> Measured:
        """Peak memory and profile of a call that takes `ms`, both of one more call."""
        with only(self.transformer, some):
            layers = len(planned_layers(self.transformer))
        gib, profile = self.peak(lambda: profiled(call), some)
        found = breakdown(profile, layers, ms)
        if kind.impl == OURS and torch.cuda.is_available() and found.own_calls < layers:
            raise Wrong(f"all {layers} layers must run on our kernels; {found.own_calls} did")
        return Measured(ms, gib, found)

    def cached(self, kind: Kind, some: Blocks, forward: Callable[[], Any]) -> Measured:
        """Half of a step that computes and one that does not."""
        with only(self.transformer, some), caching(self.transformer, self.model, kind.compiled, forward) as call:
            check_output(call(), self.inputs)
            ms = self.times({0: call})[0]
            return Measured(ms / 2, self.peak(call, some)[0])

    def times(self, calls: Mapping[Any, Callable[[], Any]]) -> dict[Any, float]:
        return lasting_medians(calls, self.choice.rounds, LOAD_MS if torch.cuda.is_available() else 0.0)

    def peak(self, call: Callable[[], Any], some: Blocks) -> tuple[float | None, Any]:
        """Peak memory of a call in GiB, without what blocks take that do not take part, and what it returns."""
        if not torch.cuda.is_available():
            return None, call()
        taking_part = {id(x) for blocks in some.values() for x in blocks.parameters()}
        whole = [x for name in self.model.blocks for x in getattr(self.transformer, name).parameters()]
        beside = sum(_bytes(x) for x in whole if id(x) not in taking_part)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - beside) / GIB, result

    def plan(self, kind: Kind) -> TransformerPlan:
        """The plan of a row, the same for rows that differ in other things."""
        assert kind.block is not None
        key = kind.density, kind.block
        if key not in self.plans:
            self.plans[key] = plan_of(self.transformer, self.model, *key)
        return self.plans[key]

    def executed(self, kind: Kind) -> float:
        """Density over all blocks, text among them."""
        if kind.impl != OURS:
            return 1.0
        first = next(iter(self.plan(kind).layers.values()))
        return significant(first.mask[0].with_text(self.model.grid.tokens, self.model.text.tokens).density)

    def _numbers(self, found: Sequence[Measured], at: Sequence[tuple[int, ...]]) -> dict[str, float | None]:
        """Time, memory and what takes the time, of the whole model."""

        def whole(values: Iterable[float | None]) -> float | None:
            known = [value for value in values if value is not None]
            return significant(whole_model(known, at, self.model.depth)) if len(known) == len(at) else None

        times = [each.ms for each in found]
        if min(times[1:], default=float("inf")) <= times[0]:
            raise Wrong(f"more blocks must take longer; {', '.join(map(str, at))} took {times} ms")
        parts = {
            f"{part}_ms": whole(each.profile.parts[part] if each.profile else None for each in found) for part in PARTS
        }
        gaps = whole(each.profile.gaps if each.profile else None for each in found)
        return {"ms": whole(times), **parts, "gaps_ms": gaps, "peak_gib": whole(each.gib for each in found)}

    def _about(self, kind: Kind, found: Sequence[Measured], at: Sequence[tuple[int, ...]]) -> dict[str, Any]:
        profile = found[-1].profile
        measured = [{"depth": list(depth), "ms": significant(each.ms)} for depth, each in zip(at, found, strict=True)]
        about = {
            "depth": sum(self.model.depth), "extrapolated": len(at) > 1,
            "density_executed": self.executed(kind),
            "kernel": profile and profile.attention, "measured": measured,
        }  # fmt: skip
        if profile is None or not self.choice.profile:
            return about
        return about | {"kernels": _rounded(profile.longest[:KERNELS_KEPT])}


# Memory


def _bytes(x: Tensor) -> int:
    if is_traceable_wrapper_subclass(x):
        return sum(_bytes(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return x.numel() * x.element_size()


def _graphs() -> int:
    """Graphs compiled so far; many in one row mean that blocks do not share them."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Rows


def _rounded(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"ms": significant(row["ms"])} for row in rows]


def depths_of(text: Sequence[str]) -> tuple[tuple[int, int] | None, bool]:
    """Read two depths, "full", or all three."""
    whole, numbers = WHOLE in text, [each for each in text if each != WHOLE]
    if (
        len(text) - len(numbers) > 1
        or len(numbers) not in ((0, 2) if whole else (2,))
        or not all(each.isdigit() for each in numbers)
    ):
        raise ValueError(f"depths must be two numbers, {WHOLE}, or both; got {' '.join(text)}")
    return (int(numbers[0]), int(numbers[1])) if numbers else None, whole


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Choice()
    add = made.add_argument
    add("--model", nargs="+", choices=ARCHITECTURES, required=True)
    add("--rows", nargs="+", choices=(*GROUPS, HEADLINE), default=GROUPS)
    add("--densities", nargs="+", type=float, default=default.densities, help="ours")
    add("--precisions", nargs="+", default=default.precisions, help="ours, QK/PV")
    add("--block", help="ours, QUERYxKEY")
    add("--modes", nargs="+", choices=MODES, default=default.modes)
    add("--depths", nargs="+", default=[*map(str, DEPTHS)], help="two depths, full, or both")
    add("--rounds", type=int, help="5, and 3 with the whole model")
    add("--profile", action="store_true", help="list the kernels that take longest in every row")
    add("--smoke", action="store_true", help="does everything run: least density, eager, one round of few blocks")
    add("--device", default="cuda")
    add("--out", type=Path, help="result file to merge the rows into; without it they are only printed")
    return made


def chosen(options: argparse.Namespace) -> Choice:
    """What the command line asks for."""
    depths, whole = depths_of(options.depths)
    choice = Choice(
        tuple(options.rows), tuple(options.densities), tuple(options.precisions), options.block, tuple(options.modes),
        depths, whole, options.rounds or (3 if whole else 5), options.profile,
    )  # fmt: skip
    if not options.smoke:
        return choice
    least, first = (min(choice.densities),), choice.precisions[:1]
    return replace(
        choice, groups=("cudnn", "paroattn"), densities=least, precisions=first, modes=("eager",), depths=SMOKE_DEPTHS,
        whole=False, rounds=1,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    choice = chosen(options)
    diffusers.utils.logging.set_verbosity_error()
    dtype, wrong = torch.bfloat16 if options.device.startswith("cuda") else torch.float32, False
    for name in options.model:
        start = time.perf_counter()
        try:
            for row in measure(ARCHITECTURES[name], choice, options.device, dtype):
                wrong |= row["impl"] == OURS and row["ms"] is None and "cannot be imported" not in row["reason"]
                if options.out:
                    save(options.out, [row])
        except Wrong as reason:
            print(reason, flush=True)
            wrong = True
        except Exception:  # the other models are still to come
            traceback.print_exc()
            wrong = True
        torch._dynamo.reset()
        _free()
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
