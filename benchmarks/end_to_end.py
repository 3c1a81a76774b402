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

Times are medians between two events on the GPU around a whole forward, launches of Python included. By default, a few
blocks of each kind are timed at two depths, and a line through them gives the time of the whole model (`extrapolated`);
`--depths full` times the whole model. `compiled` is diffusers' regional compilation of the repeated blocks. FP8 linears
are torchao's, scaled by row, in the blocks. The step cache is diffusers' first-block cache. Which steps it skips would
depend on weights, so here it skips every second one, and `ms` is the mean of both. `density` is that of the video's
blocks; `density_executed` counts text, which is always dense.
"""

import argparse
import copy
import functools
import gc
import inspect
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry
from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from architectures import ARCHITECTURES, Architecture, built, lengthened, planned_layers, shortened
from paroattn import apply, remove, report
from paroattn.block_mask import parse_block
from paroattn.integration.adapters import dispatching
from paroattn.integration.models import self_attentions
from paroattn.kernels.attention import OWN_PRECISION
from paroattn.plan.plan import TransformerPlan
from peers import Missing, wanted
from records import environment, merge
from synthetic_plan import synthetic_plan

OURS, BASELINE, STOCK = "paroattn", "cudnn", "stock"
KEY = (
    "device", "model", "impl", "density", "precision", "block", "compiled", "fp8_linears", "step_cache", "depth",
    "extrapolated",
)  # fmt: skip
PARTS = ("attention", "prepare", "linear", "other")
NUMBERS = ("ms", *(f"{part}_ms" for part in PARTS), "peak_gib")
SPEEDUPS = ("speedup_vs_dense", "speedup_vs_same_linears", "speedup_vs_stock")
MAIN_BLOCK = {64: "64x128", 128: "128x128"}
"""By head dimension."""
MASK = "encoder_attention_mask"
EVERY_SECOND = "first-block, every second step"
DEPTHS = (2, 6)
LARGEST_ERROR = 0.02
"""Of a self-attention's output, projection included: the norm of the difference to stock over the norm of stock."""
SHARPER = 4.0
"""What norms of q are multiplied by before outputs are compared: random weights attend to everything alike, and a token
in the wrong place would change little."""
AGREEMENT = 0.03
GIB = 2**30
COMPILE: dict[str, Any] = {}
"""Arguments of torch.compile."""
LEAST_FEATURES = 256
"""Linear layers with fewer in- or outputs stay as they are."""


@dataclass(frozen=True)
class Backend:
    """How diffusers is told to attend densely.

    Attributes:
        name: Of diffusers' backend.
        sdpa: The same for models that call PyTorch's attention themselves.
        precision: Formats of the two products, QK/PV.
        module: What must be installed.
    """

    name: str
    sdpa: SDPBackend | None
    precision: str
    module: str | None = None


BACKENDS = {
    BASELINE: Backend("_native_cudnn", SDPBackend.CUDNN_ATTENTION, "bf16/bf16"),
    "sage2": Backend("sage", None, "int8/fp8", "sageattention"),
}


@dataclass(frozen=True)
class Kind:
    """What is on in a row."""

    impl: str
    density: float = 1.0
    precision: str = "bf16/bf16"
    block: str | None = None
    compiled: bool = False
    fp8_linears: bool = False
    step_cache: str | None = None

    @property
    def graph(self) -> tuple[Any, ...]:
        """What compiled code depends on."""
        return self.impl, self.precision, self.block, self.compiled, self.fp8_linears, self.step_cache


@dataclass(frozen=True)
class Choice:
    """What to measure of a model."""

    groups: tuple[str, ...] = ("stock", "cudnn", "sage2", "paroattn", "cache", "fp8")
    densities: tuple[float, ...] = (0.5, 0.3, 0.2)
    precisions: tuple[str, ...] = ("int8/fp8", "int8/int8")
    block: str | None = None
    depths: tuple[int, int] | None = DEPTHS
    rounds: int = 5
    impl: str = "auto"


@dataclass(frozen=True)
class Measured:
    """One forward at one depth.

    Attributes:
        ms: Median time.
        gib: Peak memory of a model of this depth; None on a CPU.
        parts: Milliseconds by `PARTS`; None where not profiled.
        kernel: Name of what attends longest.
    """

    ms: float
    gib: float | None = None
    parts: dict[str, float] | None = None
    kernel: str | None = None


class Wrong(Exception):
    """An output is not what it should be."""


# What is measured


def kinds(model: Architecture, choice: Choice) -> list[Kind]:
    """All rows of the groups; FP8 linears last, since weights stay quantised."""
    block = choice.block or MAIN_BLOCK[model.head_dim]
    both, first = (False, True), choice.precisions[0]
    ours = functools.partial(Kind, OURS, block=block)
    lowest = min(choice.densities)
    fastest = ours(lowest, first, compiled=True)
    dense = Kind(BASELINE, precision=BACKENDS[BASELINE].precision, compiled=True)
    groups = {
        "stock": [Kind(STOCK)],
        "cudnn": [replace(dense, compiled=compiled) for compiled in both],
        "sage2": [Kind("sage2", precision=BACKENDS["sage2"].precision, compiled=compiled) for compiled in both],
        "paroattn": [
            ours(density, precision, compiled=compiled)
            for compiled in both
            for precision in choice.precisions
            for density in choice.densities
        ],
        "cache": [replace(each, step_cache=EVERY_SECOND) for each in (dense, fastest)],
        "fp8": [replace(each, fp8_linears=True) for each in (dense, fastest)],
    }
    if choice.depths is None:
        groups = {"cudnn": [dense], "paroattn": [fastest], "fp8": [replace(fastest, fp8_linears=True)]}
    return sorted((kind for name in choice.groups for kind in groups.get(name, ())), key=lambda kind: kind.fp8_linears)


def points(model: Architecture, depths: tuple[int, int] | None) -> list[tuple[int, ...]]:
    """Depths to measure: the shallow one, then each kind of blocks deeper in turn; or the published depth alone."""
    if depths is None:
        return [model.depth]
    shallow, deep = depths
    if not 1 <= shallow < deep <= min(model.depth):
        raise ValueError(f"depths must rise within 1…{min(model.depth)}; got {shallow} and {deep}")
    base = (shallow,) * len(model.depth)
    return [base, *((*base[:i], deep, *base[i + 1 :]) for i in range(len(base)))]


def whole_model(values: Sequence[float], at: Sequence[tuple[int, ...]], depth: tuple[int, ...]) -> float:
    """Value at the published depth, from one at a base depth and one for each kind of blocks that is deeper there."""
    base, *deeper = values
    total = base
    for i, value in enumerate(deeper):
        total += (value - base) * (depth[i] - at[0][i]) / (at[i + 1][i] - at[0][i])
    return total


def measure(model: Architecture, choice: Choice, device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Rows of a model, one after the other.

    Raises:
        Wrong: If attention by a plan is not what stock computes.
    """
    at, where = points(model, choice.depths), torch.device(device)
    start = time.perf_counter()
    transformer = built(model, tuple(map(max, zip(*at, strict=True))), where, dtype)
    inputs = model.inputs(model, where, dtype)
    error = attention_error(transformer, model, inputs, choice.impl)
    print(
        f"{model.name}: built and compared with stock, error {error:.2g}, {time.perf_counter() - start:.1f} s",
        flush=True,
    )
    if not error <= LARGEST_ERROR:
        raise Wrong(f"{model.name} with all blocks kept is off from stock by {error:.2g}; at most {LARGEST_ERROR:g}")
    bench = Bench(transformer, model, inputs, choice)
    for kind in kinds(model, choice):
        start, graphs = time.perf_counter(), _graphs()
        try:
            row = bench.row(kind, at)
        except Exception as failure:  # a backend of someone else fails in ways of its own, and others are still to come
            row = asdict(kind) | dict.fromkeys((*NUMBERS, "kernel")) | {"reason": _reason(failure)}
            row |= {"depth": sum(model.depth), "extrapolated": choice.depths is not None}
        _free()
        row = _about(model, device) | row
        compiled_now = f", {_graphs() - graphs} graphs" if kind.compiled else ""
        print(f"{described(row)}  ({time.perf_counter() - start:.0f} s{compiled_now})", flush=True)
        yield row


class Bench:
    """A transformer, its inputs and its plans."""

    def __init__(self, transformer: Any, model: Architecture, inputs: dict[str, Any], choice: Choice):
        self.transformer, self.model, self.inputs, self.choice = transformer, model, inputs, choice
        self.plans: dict[tuple[float, str], TransformerPlan] = {}
        self.quantised = False
        self._graph: tuple[Any, ...] | None = None

    def row(self, kind: Kind, at: list[tuple[int, ...]]) -> dict[str, Any]:
        """Everything about a row but speed-ups and where it ran."""
        if kind.fp8_linears and not self.quantised:
            fp8_linears(self.transformer, self.model)
            self.quantised = True
        if kind.graph != self._graph:
            torch._dynamo.reset()
            self._graph = kind.graph
        found = [self.measured(kind, depth) for depth in at]
        depth = self.model.depth

        def whole(values: Iterable[float | None]) -> float | None:
            known = [value for value in values if value is not None]
            return _significant(whole_model(known, at, depth)) if len(known) == len(at) else None

        parts = {f"{part}_ms": whole(each.parts[part] if each.parts else None for each in found) for part in PARTS}
        numbers = {"ms": whole(each.ms for each in found), **parts, "peak_gib": whole(each.gib for each in found)}
        about = {"depth": sum(depth), "extrapolated": self.choice.depths is not None}
        measured = [{"depth": list(where), "ms": _significant(each.ms)} for where, each in zip(at, found, strict=True)]
        executed = {"density_executed": self.executed(kind), "kernel": found[-1].kernel}
        return asdict(kind) | about | numbers | executed | {"measured": measured}

    def plan(self, density: float, block: str) -> TransformerPlan:
        """A plan for as many blocks as the transformer has now."""
        layers, made = planned_layers(self.transformer), self.plans.get((density, block))
        if made is None or not set(layers) <= set(made.layers):
            made = plan_of(self.transformer, self.model, density, block)
            self.plans[density, block] = made
        return replace(made, layers={name: made.layers[name] for name in layers})

    def executed(self, kind: Kind) -> float:
        """Density over all blocks, text among them."""
        if kind.impl != OURS or kind.block is None:
            return 1.0
        made, tokens = self.plans[kind.density, kind.block], self.model.grid.tokens
        first = next(iter(made.layers.values()))
        return _significant(first.mask[0].with_text(tokens, self.model.text.tokens).density)

    def measured(self, kind: Kind, depth: tuple[int, ...]) -> Measured:
        """One row at one depth."""
        transformer, model, choice = self.transformer, self.model, self.choice
        if kind.impl == OURS and kind.block is not None:
            self.plan(kind.density, kind.block)  # for all blocks at once
        whole = shortened(transformer, model, depth)
        try:
            kept = {id(x) for x in transformer.parameters()}
            beside = sum(_bytes(x) for blocks in whole.values() for x in blocks.parameters() if id(x) not in kept)
            with torch.no_grad(), running(transformer, model, self.inputs, kind, self) as call:
                _check_finite(call())
                if kind.impl == OURS and not kind.compiled:
                    _check_what_ran(transformer, self.inputs["hidden_states"].device)
                _reset_peak()
                ms = statistics.median(elapsed(call, choice.rounds)) / (2 if kind.step_cache else 1)
                gib = _peak(beside)
                if kind.step_cache or choice.depths is None:
                    return Measured(ms, gib)
                found, kernel = split(call, len(planned_layers(transformer)), ms)
                return Measured(ms, gib, found, kernel)
        finally:
            lengthened(transformer, whole)


# How it runs


@contextmanager
def running(
    transformer: Any, model: Architecture, inputs: dict[str, Any], kind: Kind, bench: Bench
) -> Iterator[Callable[[], Any]]:
    """What is on in a row, around the call to time."""
    with ExitStack() as stack:
        if kind.impl != STOCK:
            backend, dense = BACKENDS.get(kind.impl, BACKENDS[BASELINE]), kind.impl != OURS
            stack.enter_context(attending(transformer, backend, dense, MASK in inputs))
        if kind.impl == OURS:
            assert kind.block is not None
            plan = bench.plan(kind.density, kind.block)
            apply(transformer, plan, precision=kind.precision, impl=bench.choice.impl)
            stack.callback(remove, transformer)

        def forward() -> Any:
            return transformer(**inputs, return_dict=False)[0]

        if kind.step_cache:
            yield stack.enter_context(caching(transformer, model, kind.compiled, forward))
            return
        if kind.compiled:
            stack.enter_context(compiled(transformer, model))
        yield forward


@contextmanager
def attending(transformer: Any, backend: Backend, everywhere: bool, masked: bool) -> Iterator[None]:
    """Let a transformer attend through a backend; `everywhere`: in layers that a plan would cover too.

    Processors that call PyTorch's attention themselves are told through PyTorch, or, where it does not have the kernel,
    changed for ones that use diffusers' dispatcher. Where all text is real, a mask over it is left out: that is the
    same computation, and a mask takes the fast kernels away.
    """
    if backend.module is not None:
        wanted(backend.module)
    layers = self_attentions(transformer) if everywhere else {}
    original = {name: attn.processor for name, attn in layers.items()}
    for attn in layers.values():
        direct = not hasattr(attn.processor, "_attention_backend")
        if direct and backend.sdpa is None:
            attn.processor = dispatching(attn.processor)
        if masked and not direct:
            attn.processor = _unmasked(attn.processor)
    try:
        transformer.set_attention_backend(backend.name)
        with sdpa_kernel(backend.sdpa) if backend.sdpa and _any_direct(layers) else nullcontext():
            yield
    finally:
        transformer.reset_attention_backend()
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
        for name, attn in layers.items():
            attn.processor = original[name]


def _any_direct(layers: dict[str, Any]) -> bool:
    return any(not hasattr(attn.processor, "_attention_backend") for attn in layers.values())


def _unmasked(processor: Any) -> Any:
    """A processor like this one that attends without a mask."""
    made = copy.copy(processor)
    made.__class__ = _unmasked_class(type(processor))
    return made


@functools.cache
def _unmasked_class(cls: type) -> type:
    place = list(inspect.signature(cls.__call__).parameters).index("attention_mask") - 1

    @functools.wraps(cls.__call__)
    def __call__(self, *args, **kwargs):
        if len(args) > place:
            args = (*args[:place], None, *args[place + 1 :])
        else:
            kwargs["attention_mask"] = None
        return cls.__call__(self, *args, **kwargs)

    return type(f"Unmasked{cls.__name__}", (cls,), {"__call__": __call__})


@contextmanager
def compiled(transformer: Any, model: Architecture) -> Iterator[None]:
    """Regional compilation: diffusers' own, or of the repeated blocks where it names none."""
    try:
        if getattr(transformer, "_repeated_blocks", None):
            transformer.compile_repeated_blocks(**COMPILE)
        else:
            for block in repeated(transformer, model):
                block.compile(**COMPILE)
        yield
    finally:
        for module in transformer.modules():
            if module._compiled_call_impl is not None:
                module._compiled_call_impl = None


@contextmanager
def caching(
    transformer: Any, model: Architecture, compile_blocks: bool, forward: Callable[[], Any]
) -> Iterator[Callable[[], Any]]:
    """First-block cache; the call is a step that computes and one that does not."""
    blocks = repeated(transformer, model)
    if compile_blocks:  # below the cache's hooks, which would be compiled anew for every block
        for block in blocks:
            block.forward = torch.compile(block.forward, **COMPILE)
    transformer.enable_cache(FirstBlockCacheConfig())
    leader: Any = HookRegistry.check_if_exists_or_initialize(blocks[0]).get_hook(_FBC_LEADER_BLOCK_HOOK)

    def call() -> Any:
        with transformer.cache_context("cond"):
            leader.threshold = -1.0  # the change from step to step is above
            forward()
            leader.threshold = float("inf")
            return forward()

    try:
        yield call
    finally:
        transformer.disable_cache()
        for block in blocks:
            vars(block).pop("forward", None)


def repeated(transformer: Any, model: Architecture) -> list[nn.Module]:
    """All repeated blocks in the order in which they run."""
    return [block for name in model.blocks for block in getattr(transformer, name)]


def fp8_linears(transformer: Any, model: Architecture) -> None:
    """Quantise the blocks' linear layers for good: weights and activations to FP8, one scale per row.

    Layers of the modulation, which see one row per batch element, stay as they are.

    Raises:
        Missing: If torchao is not installed.
    """
    quantization = wanted("torchao.quantization")
    config = quantization.Float8DynamicActivationFloat8WeightConfig(
        granularity=quantization.PerRow(), set_inductor_config=False
    )

    def chosen(module: nn.Module, name: str) -> bool:
        large = isinstance(module, nn.Linear) and min(module.weight.shape) >= LEAST_FEATURES
        return large and not any("norm" in part for part in name.split("."))

    for block in repeated(transformer, model):
        quantization.quantize_(block, config, filter_fn=chosen)


def plan_of(transformer: Any, model: Architecture, density: float, block: str) -> TransformerPlan:
    """A synthetic plan for all self-attentions of a transformer."""
    device = next(transformer.parameters()).device
    return synthetic_plan(
        model.transformer, planned_layers(transformer), model.heads, model.head_dim, model.grid, model.text,
        density=density, block=parse_block(block), device=device,
    )  # fmt: skip


# The gate


@torch.no_grad()
def attention_error(transformer: Any, model: Architecture, inputs: dict[str, Any], impl: str = "auto") -> float:
    """Largest relative error, over self-attentions of one block of each kind, of a plan that keeps all, to stock.

    Both see the same inputs: those of the stock model. Its norms of q are made sharper meanwhile.
    """
    whole = shortened(transformer, model, (1,) * len(model.blocks))
    layers = self_attentions(transformer)
    norms = [
        norm.weight
        for attn in layers.values()
        for name in ("norm_q", "norm_added_q")
        if (norm := getattr(attn, name, None)) is not None
    ]
    seen: dict[str, tuple[Any, Any, Any]] = {}
    errors: list[float] = []

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            seen[name] = args, kwargs, out

        return hook

    def repeat(name: str) -> Callable[..., Any]:
        return lambda module, args, kwargs: seen[name][:2]

    def compare(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            errors.extend(relative_error(a, b) for a, b in zip(_tensors(out), _tensors(seen[name][2]), strict=True))

        return hook

    try:
        for weight in norms:
            weight.mul_(SHARPER)
        with ExitStack() as stack:
            for name, attn in layers.items():
                stack.callback(attn.register_forward_hook(see(name), with_kwargs=True).remove)
            transformer(**inputs)
        apply(
            transformer, plan_of(transformer, model, 1.0, MAIN_BLOCK[model.head_dim]), impl=impl,
            precision=OWN_PRECISION[inputs["hidden_states"].dtype],
        )  # fmt: skip
        with ExitStack() as stack:
            stack.callback(remove, transformer)
            for name, attn in layers.items():
                stack.callback(attn.register_forward_pre_hook(repeat(name), with_kwargs=True).remove)
                stack.callback(attn.register_forward_hook(compare(name), with_kwargs=True).remove)
            transformer(**inputs)
    finally:
        for weight in norms:
            weight.div_(SHARPER)
        lengthened(transformer, whole)
    return max(errors, key=lambda error: error if error == error else float("inf"))


def relative_error(found: Tensor, right: Tensor) -> float:
    """Norm of the difference over the norm of what is right."""
    return ((found.float() - right.float()).norm() / right.float().norm()).item()


def _tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [each for each in out if each is not None]


def _check_finite(out: Tensor) -> None:
    if not torch.isfinite(out).all():
        raise Wrong("the output is not finite")


def _check_what_ran(transformer: Any, device: torch.device) -> None:
    """On a GPU, every planned layer must have run on its kernels."""
    layers = report(transformer).to_dict()["transformer"]["layers"]
    ran = {phase["impl"] for layer in layers.values() for phase in layer["phases"]}
    if device.type == "cuda" and ran != {"triton"}:
        raise Wrong(f"layers must run on kernels; some ran by {', '.join(map(str, ran))}")


# Time, memory, and where time goes


def elapsed(call: Callable[[], Any], rounds: int) -> list[float]:
    """Milliseconds of every round, from the first launch to the last kernel."""
    times = []
    for _ in range(rounds):
        if torch.cuda.is_available():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            call()
            times.append((time.perf_counter() - began) * 1e3)
    return times


NAMES = {
    "prepare": r"^_(sum|finish|rows|values|gather)_kernel|(?i:quant_?int8|quant_(query|key)|meanscale|transposepad)",
    "attention": r"_(hopper|sparse|lists)_kernel|(?i:sdpa|fmha|flash|attn|attention)",
    "linear": r"(?i:gemm|nvjet|cutlass|cublas|xmma|splitk|scaled_mm|aten::(add|b)?mm)",
}
"""What kernels are, by name, the first that matches; those that a compiler has written are "other", templates apart."""
OWN_KERNEL = re.compile(r"_(hopper|sparse|lists)_kernel|paroattn::attention")


def part_of(kernel: str) -> str:
    """Which of `PARTS` a kernel belongs to."""
    if kernel.startswith("triton_"):
        return "linear" if kernel.startswith("triton_tem_") else "other"
    return next((part for part, names in NAMES.items() if re.search(names, kernel)), "other")


def shares(kernels: Iterable[tuple[str, float]], layers: int, ms: float) -> tuple[dict[str, float], str | None]:
    """Milliseconds of each part of a forward that took `ms`, and what attends longest.

    Attention is that of the planned layers. Where it is not ours, they are as many as the layers, and the longest;
    shorter ones are cross-attentions, "other" as all else is, and as the time is when the GPU waits.
    """
    found: dict[str, list[tuple[float, str]]] = {part: [] for part in PARTS}
    for name, time_ms in kernels:
        found[part_of(name)].append((time_ms, name))
    attention = sorted(found["attention"], reverse=True)
    own = [each for each in attention if OWN_KERNEL.search(each[1])]
    attention = own or attention[:layers]
    parts = {part: sum(time_ms for time_ms, _ in found[part]) for part in ("prepare", "linear")}
    parts["attention"] = sum(time_ms for time_ms, _ in attention)
    parts["other"] = max(0.0, ms - sum(parts.values()))
    return {part: parts[part] for part in PARTS}, attention[0][1] if attention else None


def split(call: Callable[[], Any], layers: int, ms: float) -> tuple[dict[str, float], str | None]:
    """`shares` of a profiled forward."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    kernels = []
    for event in profiler.events() or ():
        if on_gpu and event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            kernels.append((event.name, event.time_range.elapsed_us() / 1e3))
        elif not on_gpu:
            kernels.append((event.name, event.self_cpu_time_total / 1e3))
    parts, kernel = shares(kernels, layers, ms)
    return parts, kernel and re.split(r"[<(]", kernel.removeprefix("void "))[0][:80]


def _bytes(x: Tensor) -> int:
    if is_traceable_wrapper_subclass(x):
        return sum(_bytes(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return x.numel() * x.element_size()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def _peak(beside: int) -> float | None:
    """Peak memory in GiB without what blocks take that do not take part."""
    return (torch.cuda.max_memory_allocated() - beside) / GIB if torch.cuda.is_available() else None


def _graphs() -> int:
    """Graphs compiled so far; many in one row mean that blocks do not share them."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Rows


def with_speedups(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what they are faster than: baselines of the same device and model, of the same depth if there."""

    def baseline(row: dict[str, Any], **wanted: Any) -> float | None:
        wanted |= {"device": row["device"], "model": row["model"], "step_cache": None}
        found = [each for each in rows if each["ms"] and all(each[name] == value for name, value in wanted.items())]
        same = [each for each in found if each["extrapolated"] == row["extrapolated"]]
        return (same or found)[0]["ms"] if found else None

    def speedup(row: dict[str, Any], **wanted: Any) -> float | None:
        ms = baseline(row, **wanted)
        return _significant(ms / row["ms"]) if ms and row["ms"] else None

    return [
        row
        | {
            "speedup_vs_dense": speedup(row, impl=BASELINE, compiled=row["compiled"], fp8_linears=False),
            "speedup_vs_same_linears": speedup(
                row, impl=BASELINE, compiled=row["compiled"], fp8_linears=row["fp8_linears"]
            ),
            "speedup_vs_stock": speedup(row, impl=STOCK),
        }
        for row in rows
    ]


def save(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Merge rows into a file and work out the speed-ups anew; a row without a time leaves one with a time as it is."""
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    timed = {_key(row) for row in known if row["ms"] is not None}
    merge(path, [row for row in rows if row["ms"] is not None or _key(row) not in timed], KEY)
    merge(path, with_speedups(json.loads(path.read_text())["rows"]), KEY)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def _about(model: Architecture, device: str) -> dict[str, Any]:
    versions = environment(device)
    if device.startswith("cuda"):
        import triton

        versions["triton"] = triton.__version__
    return versions | {
        "model": model.name, "batch": model.batch, "tokens": model.layout.tokens, "heads": model.heads,
        "head_dim": model.head_dim, "diffusers": diffusers.__version__,
    }  # fmt: skip


def _reason(failure: Exception) -> str:
    text = str(failure).strip().partition("\n")[0]
    return text if isinstance(failure, (Missing, Wrong)) else f"{type(failure).__name__}: {text}"


def _significant(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")


def described(row: dict[str, Any]) -> str:
    on = [name for name in ("compiled", "fp8_linears", "step_cache") if row[name]]
    label = f"{row['model']} {row['impl']:<8} {row['density']:<4} {row['precision']:<9} {' + '.join(on) or 'eager':<22}"
    if row["ms"] is None:
        return f"{label} {row['reason']}"
    parts = " ".join(f"{part} {row[f'{part}_ms']:.4g}" for part in PARTS if row[f"{part}_ms"] is not None)
    memory = f"{row['peak_gib']:.1f} GiB" if row["peak_gib"] else ""
    return f"{label} {row['ms']:9.1f} ms  {parts}  {memory}  {row['kernel'] or ''}"


def depths_of(text: Sequence[str]) -> tuple[int, int] | None:
    """Read "full", or two depths."""
    if list(text) == ["full"]:
        return None
    if len(text) != 2 or not all(each.isdigit() for each in text):
        raise ValueError(f"depths must be two numbers, or full; got {' '.join(text)}")
    return int(text[0]), int(text[1])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Choice()
    parser.add_argument("--model", nargs="+", choices=ARCHITECTURES, required=True)
    parser.add_argument("--rows", nargs="+", choices=default.groups, default=default.groups)
    parser.add_argument("--densities", nargs="+", type=float, default=default.densities, help="ours")
    parser.add_argument("--precisions", nargs="+", default=default.precisions, help="ours, QK/PV")
    parser.add_argument("--block", help="ours, QUERYxKEY")
    parser.add_argument("--depths", nargs="+", default=list(map(str, DEPTHS)), help="two depths, or full")
    parser.add_argument("--rounds", type=int, help="5, and 3 of the whole model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="result file to merge the rows into; without it they are only printed")
    options = parser.parse_args(arguments)
    depths = depths_of(options.depths)
    diffusers.utils.logging.set_verbosity_error()
    choice = Choice(
        tuple(options.rows), tuple(options.densities), tuple(options.precisions), options.block, depths,
        options.rounds or (3 if depths is None else 5),
    )  # fmt: skip
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
        torch._dynamo.reset()
        _free()
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
