"""Checks on this machine, with its compiler and driver, that every kernel computes what the reference defines.

Inputs are small and cannot hide: another order and mask for every head, a ragged tail, padded text, two batch elements,
values that differ in every token, head and channel.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..block_mask import BlockMask, blocks_of
from ..grid import Grid, Layout, TextSpan
from ..precision import Precision
from . import native
from .attention import attention
from .block_stats import block_stats
from .library import FOUR_BIT_UNITS, HOPPER, in_cuda

BLOCKS = ((64, 64), (64, 128), (128, 64), (128, 128))
HEAD_DIMS = (64, 128)
ORDERS = ("FHW", "WHF", "HFW", "2x2x4", "FWH")
CHOSEN = (3, 1, 4)
FACTOR = 2.0
"""An implementation may err so many times as much as the reference at the same precision."""
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 5.6e-3, torch.float16: 2e-3}
"""How far from the reference at the same precision, by dtype of the tensors: 45 dB below the output in bfloat16."""
FLOOR_OF_FOUR_BITS = 0.03
"""A p̂ that rounds another way differs by a fifteenth."""
STATISTICS = {"mass": 0.01, "error": 0.02}
FP8_FROM = (8, 9)


@dataclass(frozen=True)
class Configuration:
    """One way to compute, as the machine would choose or compile it."""

    impl: str
    precision: str
    dtype: torch.dtype
    block: tuple[int, int]
    head_dim: int

    def __str__(self) -> str:
        size = "x".join(map(str, self.block))
        return f"{self.impl} {self.precision}, blocks {size}, head dimension {self.head_dim}"


@dataclass(frozen=True)
class Check:
    """What became of a configuration.

    Attributes:
        what: The configuration in words.
        error: Norm of the difference from float64 over the norm of what is right; None if nothing came out.
        reference_error: The same of the reference at the same precision.
        difference: Norm of the difference from the reference over its norm.
        allowed: Largest `difference` that counts as right; `error` may be twice `reference_error`.
        seconds: Compilation included.
        problem: What is wrong, or None.
    """

    what: str
    error: float | None
    reference_error: float | None
    difference: float | None
    allowed: float
    seconds: float
    problem: str | None = None


def configurations(device: torch.device) -> list[Configuration]:
    """Every configuration that this machine would use: its GPU's kernels, or the CPU path; see also `skipped`."""
    if device.type == "cuda":
        has = torch.cuda.get_device_capability(device)
        eight_bits = ["int8/fp8"] if has >= FP8_FROM else []
        wanted = [
            ("triton", precision, torch.bfloat16) for precision in (*eight_bits, "int8/int8", "int4/int4", "bf16")
        ]
        if has[0] == FOUR_BIT_UNITS and native.missing() is None:
            wanted.append(("native", "int4/int4", torch.bfloat16))
        if has == HOPPER and native.missing() is None:
            wanted += [("sm90", precision, torch.bfloat16) for precision in ("int8/fp8", "int8/int8")]
    else:
        wanted = [("cpu", "fp32", torch.float32)]
        if _interpreted():
            wanted += [("triton", precision, torch.float16) for precision in ("int8/int8", "fp16")]
    return [Configuration(*kind, *sizes) for kind in wanted for sizes in product(BLOCKS, HEAD_DIMS)]


def skipped(device: torch.device) -> list[str]:
    """What is not checked here, and why."""
    if device.type == "cuda":
        has = torch.cuda.get_device_capability(device)
        left_out = [] if has >= FP8_FROM else [f"int8/fp8: this GPU has capability {has[0]}.{has[1]}, FP8 needs 8.9"]
        in_cuda = {FOUR_BIT_UNITS: "int4/int4 on matrix units of four bits", HOPPER[0]: "int8 in CUDA C++"}.get(has[0])
        missing = native.missing() if in_cuda else None
        return left_out if missing is None else [*left_out, f"{in_cuda}: {missing}"]
    if _interpreted():
        return ["int8/fp8, bf16, statistics, times: Triton's interpreter does not compute them as a GPU does"]
    return [
        "Triton kernels: there is no GPU. One adds block-sparse attention in INT8, FP8 and bf16, statistics for large "
        "models, and times. TRITON_INTERPRET=1 runs the INT8 kernels in Triton's interpreter here, slowly"
    ]


def in_cuda_here(device: torch.device) -> str:
    """What "auto" runs in CUDA C++ on a GPU, or why nothing, in words."""
    block: dict[int, tuple[int, int]] = {64: (64, 128), 128: (128, 128)}
    faster = []
    for name, dim in product(("int8/fp8", "int8/int8", "int4/int4"), HEAD_DIMS):
        q = _query(dim, device)
        mask = BlockMask.from_dense(torch.ones(1, 128 // block[dim][0], 1, dtype=torch.bool), block[dim])
        impl = in_cuda(q, mask, Precision.parse(name), 0)
        faster += [f"{name} of head dimension {dim} ({impl})"] if impl else []
    if not faster:
        return "nothing, for this GPU Triton's kernels are faster"
    reason = native.missing()
    return ", ".join(faster) if reason is None else f"not {', '.join(faster)}, which Triton does slower: {reason}"


def _query(dim: int, device: torch.device) -> Tensor:
    return torch.empty(1, 128, 1, dim, dtype=torch.bfloat16, device=device)


def check_kernels(device: torch.device) -> Iterator[Check]:
    """Check the reference, every configuration of `configurations`, and the statistics on a GPU, one at a time."""
    yield _timed("reference against attention written out, float64", 1e-10, lambda: _check_reference(device))
    for configuration in configurations(device):
        allowed = FLOOR_OF_FOUR_BITS if "int4" in configuration.precision else FLOOR[configuration.dtype]
        yield _timed(str(configuration), allowed, lambda each=configuration: _check(each, device))
    if device.type == "cuda":
        for head_dim, block in product(HEAD_DIMS, ((64, 64), (128, 128))):
            size = "x".join(map(str, block))
            what = f"triton statistics, blocks {size}, head dimension {head_dim}"
            allowed = STATISTICS["error"]
            yield _timed(what, allowed, lambda d=head_dim, b=block: _check_statistics(d, b, device))


Errors = tuple[float | None, float | None, float]


def _timed(what: str, allowed: float, run: Callable[[], Errors]) -> Check:
    began = time.perf_counter()
    try:
        error, reference_error, difference = run()
    except Exception as failure:  # a compiler may raise anything; the other configurations are still worth checking
        message = f"{type(failure).__name__}: {str(failure).strip() or 'no message'}"
        return Check(what, None, None, None, allowed, time.perf_counter() - began, message)
    problem = None
    if not difference <= allowed:
        problem = f"differs from the reference by {difference:.2g}; at most {allowed:.2g} is allowed"
    elif error is not None and reference_error is not None and not error <= max(FACTOR * reference_error, allowed):
        problem = f"is off from float64 by {error:.2g}; the reference by {reference_error:.2g}"
    return Check(what, error, reference_error, difference, allowed, time.perf_counter() - began, problem)


class _Inputs:
    """Inputs of a check, on a device."""

    def __init__(
        self, block: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device, text_tokens: int = 23
    ):
        grid, heads = (Grid(5, 9, 11) if device.type == "cuda" else Grid(3, 5, 11)), len(CHOSEN)
        text = TextSpan(text_tokens)
        generator = torch.Generator().manual_seed(0)
        self.layout = Layout(grid, text)
        shape = (2, self.layout.tokens, heads, head_dim)
        levels = torch.linspace(0.5, 2, heads)[:, None] * torch.linspace(0.8, 1.2, head_dim)
        q, k, v, mean = (torch.randn(size, generator=generator) for size in (shape, shape, shape, shape[2:]))
        self.q, self.k, self.v = (x.to(device, dtype) for x in (q * levels * 1.4, k + 2 * mean, v + levels / 4))
        rows, columns = (blocks_of(grid.tokens, size) for size in block)
        kept = torch.rand(heads, rows, columns, generator=generator) < 0.5
        kept[0, 0] = torch.arange(columns) == columns - 1
        kept[..., 0] |= ~kept.any(-1)
        self.mask = BlockMask.from_dense(kept, block).with_text(grid.tokens, text.tokens).to(device)
        self.settings: dict[str, Any] = {
            "table": self.layout.table(ORDERS).to(device),
            "order": torch.tensor(CHOSEN, dtype=torch.int32, device=device),
            "text_tokens": text.tokens,
            "valid_text": torch.tensor([text.tokens - 4, 3], device=device) if text.tokens else None,
        }
        self.valid = torch.tensor([text.tokens - 4, 3] if text.tokens else [0, 0], device=device) + grid.tokens

    def run(self, impl: str, precision: str) -> Tensor:
        double = precision == "fp64"
        tensors = (x.double() if double else x for x in (self.q, self.k, self.v))
        out = attention(*tensors, self.mask, **self.settings, precision=precision, impl=impl)
        assert isinstance(out, Tensor)
        return out.double() * self.real

    @property
    def real(self) -> Tensor:
        """1 for tokens that are no padding, (B, N, 1, 1); padding is last in the model's order too."""
        return (torch.arange(self.layout.tokens, device=self.valid.device) < self.valid[:, None])[..., None, None]


def _check(wanted: Configuration, device: torch.device) -> Errors:
    no_text = {"text_tokens": 0} if wanted.impl == "native" else {}
    case = _Inputs(wanted.block, wanted.head_dim, wanted.dtype, device, **no_text)
    out, reference = case.run(wanted.impl, wanted.precision), case.run("reference", wanted.precision)
    exact = case.run("reference", "fp64")
    return _off(out, exact), _off(reference, exact), _off(out, reference)


def _check_reference(device: torch.device) -> Errors:
    """The reference in float64 against one softmax over all kept pairs."""
    case = _Inputs((64, 64), 64, torch.float64, device)
    tokens, block = case.layout.tokens, torch.arange(case.layout.tokens, device=device) // 64
    kept = case.mask.dense()[:, block][:, :, block]  # (H, N, N) in kernel order
    allowed = kept[None] & (torch.arange(tokens, device=device) < case.valid[:, None])[:, None, None]
    place = case.settings["table"].long()[case.settings["order"].long()]
    out = torch.zeros_like(case.q)
    for head, index in enumerate(place):
        q, k, v = (x[:, index, head] for x in (case.q, case.k, case.v))
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~allowed[:, head], -torch.inf)
        out[:, index, head] = scores.softmax(-1) @ v
    return None, None, _off(case.run("reference", "fp64"), out * case.real)


def _check_statistics(head_dim: int, block: tuple[int, int], device: torch.device) -> Errors:
    case = _Inputs(block, head_dim, torch.bfloat16, device)
    w_o = torch.randn(len(CHOSEN), head_dim, 3 * head_dim, generator=torch.Generator().manual_seed(1)).to(device)
    settings: dict[str, Any] = {"layout": case.layout, "orders": ORDERS, "block": block, "paper": False}
    found = block_stats(case.q, case.k, case.v, w_o, **settings, impl="triton")
    exact = block_stats(case.q.double(), case.k.double(), case.v.double(), w_o, **settings, impl="torch")
    off = {name: _off(getattr(found, name), getattr(exact, name)) for name in STATISTICS}
    return None, None, max(off["mass"] * STATISTICS["error"] / STATISTICS["mass"], off["error"])


def _off(found: Tensor, right: Tensor) -> float:
    """Norm of the difference over the norm of what is right; infinite if a value is not finite."""
    off = ((found.double() - right.double()).norm() / right.double().norm()).item()
    return off if off == off else float("inf")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
