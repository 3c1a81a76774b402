"""Where the time of a forward goes, by the names of the kernels that PyTorch's profiler has seen."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PARTS = ("attention", "prepare", "linear", "other", "idle")
NAMES = {
    "prepare": r"^_(sum|finish|rows|values|gather)_kernel|(?i:quant_?int8|quant_(query|key)|meanscale|transposepad)",
    "attention": r"_(hopper|sparse|lists)_kernel|(?i:sdpa|fmha|flash|attn|attention)",
    "linear": r"(?i:gemm|nvjet|cutlass|cublas|xmma|splitk|scaled_mm|aten::(add|b)?mm)",
}
"""What kernels are, by name, the first that matches; those that a compiler has written are "other", templates apart."""
OWN_KERNEL = re.compile(r"_(hopper|sparse|lists)_kernel|sm90_attention|attend_int4|paroattn::attention")
OWN_ATTENTION = re.compile(r"_(hopper|sparse)_kernel|sm90_attention|attend_int4|paroattn::attention")
REGIONS = ("##", "Torch-Compiled Region")
"""How names begin that are of ranges, not of kernels."""


def part_of(kernel: str) -> str:
    """Which of `PARTS` a kernel belongs to."""
    if kernel.startswith("triton_"):
        return "linear" if kernel.startswith("triton_tem_") else "other"
    return next((part for part, names in NAMES.items() if re.search(names, kernel)), "other")


@dataclass(frozen=True)
class Breakdown:
    """Where the time of one forward goes.

    Attributes:
        parts: Milliseconds by `PARTS`. Attention is that of the planned layers, prepare what reorders and quantises for
            them; idle is what no kernel took, below zero where kernels take longer while they are profiled.
        gaps: Milliseconds between the first kernel and the last, while profiled, in which no kernel ran.
        attention: Name of what attends longest.
        own_calls: Launches of our attention.
        longest: Rows of kernels by name, the longest first: name, part, calls, ms.
    """

    parts: dict[str, float]
    gaps: float
    attention: str | None
    own_calls: int
    longest: list[dict[str, Any]]


@dataclass(frozen=True)
class Profile:
    """What ran in one call: name and milliseconds of each launch, and milliseconds in which none ran in between."""

    kernels: Sequence[tuple[str, float]]
    gaps: float = 0.0


def breakdown(profile: Profile, layers: int, ms: float) -> Breakdown:
    """What the launches of a call did in a forward that took `ms`.

    Where attention is not ours, it is that of as many launches as there are planned layers, the longest; shorter ones
    are cross-attentions, "other" as all else is.
    """
    kernels = profile.kernels
    attention = sorted(((ms, name) for name, ms in kernels if part_of(name) == "attention"), reverse=True)
    own = [each for each in attention if OWN_KERNEL.search(each[1])]
    attention = own or attention[:layers]
    parts = {part: sum(ms for name, ms in kernels if part_of(name) == part) for part in ("prepare", "linear")}
    parts["attention"] = sum(each for each, _ in attention)
    busy = sum(each for _, each in kernels)
    parts["other"] = busy - sum(parts.values())
    parts["idle"] = ms - busy
    name = short(attention[0][1]) if attention else None
    own_calls = sum(OWN_ATTENTION.search(each) is not None for each, _ in kernels)
    return Breakdown({part: parts[part] for part in PARTS}, profile.gaps, name, own_calls, by_name(kernels))


def by_name(kernels: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    """Launches of the same kernel together, the longest in sum first."""
    times: dict[str, list[float]] = {}
    for name, ms in kernels:
        times.setdefault(name, []).append(ms)
    rows = [{"name": short(name), "part": part_of(name), "calls": len(ms), "ms": sum(ms)} for name, ms in times.items()]
    return sorted(rows, key=lambda row: -row["ms"])


def short(kernel: str) -> str:
    """Name of a kernel without its template arguments and parameters."""
    return re.split(r"[<(]", kernel.removeprefix("void "))[0][:80]


def profiled(call: Callable[[], Any]) -> Profile:
    """Every kernel of a call, or, without a GPU, every operator."""
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    events = profiler.events() or ()
    if not on_gpu:
        return Profile([(event.name, event.self_cpu_time_total / 1e3) for event in events])
    launches = [
        event
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not (event.is_user_annotation or event.name.startswith(REGIONS))
    ]
    spans = [(event.time_range.start, event.time_range.end) for event in launches]
    return Profile([(event.name, event.time_range.elapsed_us() / 1e3) for event in launches], gaps(spans) / 1e3)


def gaps(spans: Iterable[tuple[float, float]]) -> float:
    """Time between the first start and the last end that no span covers."""
    found, until = 0.0, None
    for start, end in sorted(spans):
        found += max(0.0, start - until) if until is not None else 0.0
        until = end if until is None else max(until, end)
    return found
