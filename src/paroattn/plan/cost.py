"""What attention and all around it take, in milliseconds: one model, from rates measured on a GPU.

The doctor, the planner, the decision to run dense where masks do not pay, and the tables of predicted times all ask
here. Rates come packaged for the GPUs that were measured (rates.json, made by benchmarks/rates.py); those of another
GPU are these, scaled by a few measurements there.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from ..block_mask import blocks_of
from ..grid import Layout
from ..precision import FORMATS, Precision
from .workloads import Workload

Kind = tuple[int, str, tuple[int, int]]
"""Head dimension, formats "QK/PV", and tokens of a block."""
MODES = ("eager", "compiled")
FOUR_BIT_UNITS = ("sm_80", "sm_86", "sm_87", "sm_89")
"""Architectures with matrix units for four-bit integers, by published peak rates twice as fast as for eight."""
LEAST_SAVED = 0.05
"""Of a block's time, by which INT4 must be faster than INT8 to be chosen."""
ARCHITECTURES = (*FOUR_BIT_UNITS, "sm_90", "sm_100", "sm_103", "sm_120")
"""What a GPU without packaged rates may be named by."""
RATES = Path(__file__).parent / "rates.json"
BF16 = 2


class TimeUnknown(ValueError):
    """No rate was measured for what is asked.

    Attributes:
        why: What is known and what was asked, without the remedy.
    """

    def __init__(self, why: str, remedy: str = ""):
        super().__init__(f"{why}. {remedy}" if remedy else why)
        self.why = why


@dataclass(frozen=True)
class Kernel:
    """Time of a kernel by block masks: a constant, and what a row of blocks and a kept block take on the whole GPU."""

    launch_ms: float
    row_ns: float
    block_ns: float


@dataclass(frozen=True)
class Preparing:
    """Time of reordering and quantising q, k and v: a constant, and what each byte takes that is read or written."""

    constant_ms: float
    byte_ps: float


@dataclass(frozen=True)
class Call:
    """Size of one self-attention, (batch, tokens, heads, head_dim)."""

    tokens: int
    heads: int
    head_dim: int
    batch: int = 1

    @property
    def elements(self) -> int:
        return self.batch * self.tokens * self.heads * self.head_dim


@dataclass(frozen=True)
class Rates:
    """How fast a GPU is.

    Attributes:
        gpu: Its name.
        kernels: Attention by block masks, quantised operands given.
        preparing: By bits of the narrower product, 8 or 4, and head dimension.
        dense: By head dimension: picoseconds of a query, key and channel in dense attention in 16 bits, and by how much
            they grow with each doubling of the keys.
        linear_tflops: Matrix products with weights, by their format.
        around_ps: By mode and model: picoseconds of everything else (norms, rotary embedding, activations, launches,
            waiting) for each token, channel and layer.
        fp8_activations_ps: What quantising activations for FP8 weights adds to that.
        copy_tb_per_s: Bytes read and written by a copy.
        launching_ms: What launching one layer's kernels takes, below which a layer cannot be, by mode and format of the
            linear layers, such as "compiled fp8"; only where a GPU was seen to wait for it.
    """

    gpu: str
    kernels: Mapping[Kind, Kernel]
    preparing: Mapping[tuple[int, int], Preparing]
    dense: Mapping[int, tuple[float, float]]
    linear_tflops: Mapping[str, float]
    around_ps: Mapping[str, Mapping[str, float]]
    fp8_activations_ps: float
    copy_tb_per_s: float
    launching_ms: Mapping[str, float]

    def dense_ms(self, call: Call, keys: int | None = None) -> float:
        """Dense attention in 16 bits, the fastest of the GPU's libraries."""
        keys = keys or call.tokens
        nearest = min(self.dense, key=lambda head_dim: abs(head_dim - call.head_dim))
        pair, octave = self.dense[nearest]
        return call.elements * keys * (pair + octave * math.log2(max(keys, 2))) * 1e-9

    def sparse_ms(
        self, call: Call, kept: Sequence[float], block: tuple[int, int], precision: str | Precision | Sequence[str]
    ) -> float:
        """Attention by block masks, the whole call: preparing q, k and v, and the kernels.

        Args:
            call: Size of the attention.
            kept: Kept blocks of each head, text included; heads may differ.
            block: Tokens of a query block and of a key block.
            precision: Of all heads, or of each. Heads of several precisions are gathered and run one after the other.

        Raises:
            TimeUnknown: If such a kernel was not measured on this GPU.
        """
        each = [precision] * call.heads if isinstance(precision, str | Precision) else list(precision)
        groups = Counter(map(formats_of, each))
        kept_of = {name: 0.0 for name in groups}
        for name, count in zip(map(formats_of, each), kept, strict=True):
            kept_of[name] += float(count)
        parts = {name: replace(call, heads=heads) for name, heads in groups.items()}
        ms = sum(self.kernel_ms(part, kept_of[name], block, name) for name, part in parts.items())
        ms += sum(self.preparing_ms(part, name) for name, part in parts.items())
        return ms + (self.copy_ms(4 * 2 * BF16 * call.elements) if len(groups) > 1 else 0.0)

    def kernel_ms(self, call: Call, kept: float, block: tuple[int, int], precision: str | Precision) -> float:
        """Attention over so many kept blocks of all heads together, of q, k and v that are prepared.

        Raises:
            TimeUnknown: If such a kernel was not measured on this GPU.
        """
        kernel = self.kernel(call.head_dim, block, precision)
        rows = call.heads * blocks_of(call.tokens, block[0])
        return kernel.launch_ms + call.batch * (kernel.row_ns * rows + kernel.block_ns * kept) * 1e-6

    def kernel(self, head_dim: int, block: tuple[int, int], precision: str | Precision) -> Kernel:
        """Look a kernel's rates up.

        Raises:
            TimeUnknown: If it was not measured on this GPU.
        """
        kind = head_dim, formats_of(precision), block
        if kind not in self.kernels:
            raise TimeUnknown(
                f"times on {self.gpu} are known for {self._known(head_dim)}; got {kind[1]} in {_size(block)} with head "
                f"dimension {head_dim}",
                "Choose one of these with --precision and --block, or a target that needs no times: a density or an "
                "error.",
            )
        return self.kernels[kind]

    def _known(self, head_dim: int) -> str:
        """Kernels with rates; those of this head dimension if it has any."""
        dims = {head_dim} & {dim for dim, _, _ in self.kernels} or {dim for dim, _, _ in self.kernels}
        sizes: dict[tuple[int, str], list[str]] = {}
        for dim, form, block in sorted(self.kernels):
            if dim in dims:
                sizes.setdefault((dim, form), []).append("x".join(map(str, block)))
        return "; ".join(
            f"{form} in blocks of {', '.join(each)} with head dimension {dim}" for (dim, form), each in sizes.items()
        )

    def preparing_ms(self, call: Call, precision: str | Precision) -> float:
        """Reordering and quantising q, k and v."""
        bits = 4 if "int4" in formats_of(precision) else 8
        nearest = min(self.preparing, key=lambda kind: (abs(kind[0] - bits), abs(kind[1] - call.head_dim)))
        rates = self.preparing[nearest]
        return rates.constant_ms + call.elements * moved_bytes(precision) * rates.byte_ps * 1e-9

    def copy_ms(self, size: float) -> float:
        """Read and write so many bytes together."""
        return size / self.copy_tb_per_s * 1e-9

    def linear_ms(self, model: Workload, tokens: int, batch: int = 1, fp8_linears: bool = False) -> float:
        """Matrix products with weights of one layer."""
        rate = self.linear_tflops["fp8" if fp8_linears else "bf16"]
        return batch * model.linear_flops(tokens) / rate * 1e-9

    def other_ms(
        self, model: Workload, tokens: int, batch: int = 1, *, mode: str = "compiled", fp8_linears: bool = False
    ) -> float:
        """What else is in one layer; that of a model that was not measured is the median of those that were."""
        known = self.around_ps[mode]
        rate = known.get(model.name) or median(known.values())
        rate += self.fp8_activations_ps if fp8_linears else 0.0
        return batch * tokens * model.width * rate * 1e-9

    def around_ms(
        self, model: Workload, tokens: int, batch: int = 1, *, mode: str = "compiled", fp8_linears: bool = False
    ) -> float:
        """One layer but its self-attention; cross-attention is part of it."""
        across = Call(tokens, model.heads, model.head_dim, batch)
        cross = self.dense_ms(across, model.cross_text) if model.cross_text else 0.0
        other = self.other_ms(model, tokens, batch, mode=mode, fp8_linears=fp8_linears)
        return cross + other + self.linear_ms(model, tokens, batch, fp8_linears)

    def scaled(
        self, gpu: str, *, dense: float = 1.0, linear: float = 1.0, memory: float = 1.0,
        kernels: Mapping[Kind, Kernel] | None = None,
    ) -> "Rates":  # fmt: skip
        """Rates of another GPU, on which some things take so many times as long and some kernels were measured.

        Args:
            gpu: Its name.
            dense, linear, memory: Times there over times here, of dense attention, matrix products and copies.
            kernels: Attention by block masks as measured there; nothing is known there of the others.
        """
        return replace(
            self,
            gpu=gpu,
            kernels=self.kernels if kernels is None else dict(kernels),
            preparing={
                kind: Preparing(each.constant_ms * memory, each.byte_ps * memory)
                for kind, each in self.preparing.items()
            },
            dense={head_dim: (pair * dense, octave * dense) for head_dim, (pair, octave) in self.dense.items()},
            linear_tflops={form: rate / linear for form, rate in self.linear_tflops.items()},
            around_ps={mode: {name: ps * memory for name, ps in by.items()} for mode, by in self.around_ps.items()},
            fp8_activations_ps=self.fp8_activations_ps * memory,
            copy_tb_per_s=self.copy_tb_per_s / memory,
        )


def formats_of(precision: str | Precision) -> str:
    """A precision by its two formats, such as "int8/int8" for "int8"."""
    parsed = Precision.parse(precision)
    return f"{parsed.qk}/{parsed.pv}"


def moved_bytes(precision: str | Precision) -> int:
    """Bytes that preparing reads and writes for each token, channel and head."""
    qk, pv = (FORMATS[form].dtype.itemsize for form in formats_of(precision).split("/"))
    return 3 * BF16 + 2 * qk + pv


def kept_blocks(layout: Layout, block: tuple[int, int], density: Iterable[float]) -> list[float]:
    """Kept blocks of each head over the whole sequence, from its density over the video's; text is dense."""
    rows, columns = (blocks_of(layout.tokens, size) for size in block)
    if not layout.text.tokens:
        return [each * rows * columns for each in density]
    inside = (layout.grid.tokens // block[0]) * (layout.grid.tokens // block[1])
    return [rows * columns - inside * (1 - each) for each in density]


def launching(mode: str, fp8_linears: bool) -> str:
    """Key of `Rates.launching_ms`."""
    return f"{mode} {'fp8' if fp8_linears else 'bf16'}"


def gpus() -> tuple[str, ...]:
    """Names of the GPUs whose rates are packaged."""
    return tuple(_packaged())


def rates_of(gpu: str) -> Rates:
    """The packaged rates of a GPU.

    Raises:
        TimeUnknown: If it was not measured.
    """
    known = _packaged()
    if gpu not in known:
        raise TimeUnknown(
            f"times are known for {', '.join(known)}; got {gpu!r}",
            "`paro doctor --model MODEL` measures and predicts on the GPU that it runs on.",
        )
    return known[gpu]


def check_gpu(gpu: str) -> None:
    """Check that something is known of a GPU: its rates, or what its matrix units can do.

    Raises:
        TimeUnknown: If nothing is.
    """
    if gpu not in (*gpus(), *ARCHITECTURES):
        raise TimeUnknown(
            f"a GPU must be {', '.join(gpus())}, of which times are known, or an architecture, of which none are: "
            f"{', '.join(ARCHITECTURES)}; got {gpu!r}"
        )


def saved_by_four_bits(gpu: str, head_dim: int, block: tuple[int, int]) -> float:
    """Share of a kept block's time in INT8 that INT4 saves.

    As measured where both were, and nothing if that is less than `LEAST_SAVED`, which does not pay for preparing INT4.
    Else a half on architectures with matrix units for it, which is what peak rates promise and no kernel keeps, and
    nothing elsewhere.
    """
    known = _packaged()[gpu].kernels if gpu in _packaged() else {}
    eight, four = (known.get((head_dim, formats_of(name), block)) for name in ("int8", "int4"))
    if eight is not None and four is not None:
        saved = 1 - four.block_ns / eight.block_ns
        return saved if saved >= LEAST_SAVED else 0.0
    return 0.5 if gpu in FOUR_BIT_UNITS else 0.0


@cache
def _packaged() -> dict[str, Rates]:
    described = json.loads(RATES.read_text(encoding="utf-8"))
    return {gpu: read_rates(gpu, each) for gpu, each in described.items()}


def read_rates(gpu: str, described: Mapping[str, Any]) -> Rates:
    """Rates as the packaged file describes them."""
    kernels = {
        (each["head_dim"], each["precision"], (int(rows), int(columns))): Kernel(
            each["launch_ms"], each["row_ns"], each["block_ns"]
        )
        for each in described["kernels"]
        for rows, columns in [each["block"].split("x")]
    }
    dense = {each["head_dim"]: (each["pair_ps"], each["octave_ps"]) for each in described["dense"]}
    preparing = {
        (each["bits"], each["head_dim"]): Preparing(each["constant_ms"], each["byte_ps"])
        for each in described["preparing"]
    }
    names = ("linear_tflops", "around_ps", "fp8_activations_ps", "copy_tb_per_s", "launching_ms")
    others = {name: described[name] for name in names}
    return Rates(gpu=gpu, kernels=kernels, preparing=preparing, dense=dense, **others)


def _size(block: tuple[int, int]) -> str:
    return f"blocks of {block[0]}x{block[1]}"
