"""The CUDA C++ kernel for Hopper on a CPU: its source runs on emulated warpgroups, with the PTX manual's layouts.

Copies and products are done as late as they may be there, and warps come late at random.
"""

import ctypes
import shutil
import subprocess
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from paroattn.block_mask import BlockMask, blocks_of
from paroattn.grid import ORDERS, Grid, Layout, TextSpan
from paroattn.kernels import native, sm90, sparse
from paroattn.kernels.prepare import Operands, prepare
from paroattn.kernels.reference import reference_attention, to_kernel_order
from paroattn.kernels.tiles import Pipeline
from paroattn.precision import Precision

EMULATOR = Path(__file__).parent / "emulator"
LAYOUT = Layout(Grid(2, 9, 11), TextSpan(150, "suffix"))
HEADS = 3
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")

PADDED = (LAYOUT.tokens - 9, LAYOUT.tokens - 143)
"""Real tokens of two batch elements; nothing in the last block of the second is real."""
ALONE = Pipeline(programs=3, stages=2)
CLUSTER = replace(ALONE, cluster=2)
AHEAD = Pipeline(programs=3, stages=3, ahead=True)
HALVES = Pipeline(programs=2, stages=3, halves=2)
PAIR = Pipeline(programs=1, stages=3, warpgroups=2, halves=3, matrix_sums=True)
TURNS = Pipeline(programs=1, stages=2, warpgroups=2, ahead=True, turns=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Emulated kernels by their macros."""
    folder = tmp_path_factory.mktemp("emulator")

    @cache
    def build(**macros: int):
        library = folder / f"{len(list(folder.iterdir()))}.so"
        definitions = [f"-D{name}={value}" for name, value in macros.items()]
        subprocess.run(
            ["g++", "-O1", "-std=c++17", "-fPIC", "-shared", "-w", f"-I{EMULATOR}", f"-I{native.SOURCES}", *definitions,
             str(EMULATOR / "emulated.cpp"), "-o", str(library)], check=True,
        )  # fmt: skip
        return ctypes.CDLL(str(library)).emulate

    return build


@pytest.fixture
def emulated(compiled, monkeypatch):
    """Run kernels of `sm90` on the emulator; the list of seeds to run under."""
    seeds = [1]

    class Kernel:
        def __init__(self, file: str, name: str, arch: str, **macros: int):
            assert (file, name, arch) == ("sm90.cu", "sm90_attention", "sm_90a")
            self.run = compiled(**macros)

        def launch(self, blocks: int, threads: int, shared_bytes: int, *arguments):
            passed = [
                ctypes.c_void_p(x.data_ptr() if isinstance(x, Tensor) else None) if not isinstance(x, int) else x
                for x in arguments
            ]
            assert all(x.is_contiguous() for x in arguments if isinstance(x, Tensor))
            used = self.run(blocks, seeds[0], threads, *passed)
            assert used != -1, "what was wrong is on stderr"
            assert used == shared_bytes

    monkeypatch.setattr(sm90.native, "kernel", Kernel)
    return seeds


def inputs(dim: int, batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dim)
    q, k, v = (torch.randn(batch, LAYOUT.tokens, HEADS, dim, generator=generator) for _ in range(3))
    levels = torch.linspace(0.5, 2.0, HEADS)[:, None] * torch.linspace(0.8, 1.2, dim)
    steep = 3 if batch == 1 else 0.2  # nearly flat, where keys that are not real would weigh as much as real ones
    return (steep * q * levels).to(dtype), (k + levels).to(dtype), (v + levels).to(dtype)


def random_mask(block: tuple[int, int]) -> BlockMask:
    generator = torch.Generator().manual_seed(7)
    rows, columns = (blocks_of(LAYOUT.tokens, size) for size in block)
    kept = torch.rand(HEADS, rows, columns, generator=generator) < 0.5
    kept[0] = True
    kept[1, :, 0] = True
    kept[2, :, 0] = False
    kept[2, :, -1] = True  # some rows read nothing but the ragged block
    return BlockMask.from_dense(kept, block)


TABLE = LAYOUT.table(ORDERS)
ORDER = torch.tensor([3, 5, 2], dtype=torch.int32)


def swizzled(rows: Tensor) -> Tensor:
    """Rows of 64 or 128 bytes (…, rows, bytes), their 16-byte pieces exchanged, spelled out."""
    out = torch.empty_like(rows)
    pieces = rows.shape[-1] // 16
    for n in range(rows.shape[-2]):
        for piece in range(pieces):
            to = piece ^ (n % 8 if pieces == 8 else n // 2 % 4)
            out[..., n, 16 * to : 16 * to + 16] = rows[..., n, 16 * piece : 16 * piece + 16]
    return out


def blocked_values(v: Tensor, keys: int) -> Tensor:
    """(B, H, D', tokens) → (B, H, key blocks, D', tokens of a block), swizzled."""
    return swizzled(v.unflatten(-1, (-1, keys)).transpose(2, 3))


def fp8_values(v: Tensor, operands: Operands) -> Tensor:
    """V in FP8, transposed and renamed, (B, H, D', tokens), which Triton's interpreter rounds wrong."""
    v_scale, tokens = operands.v_scale, operands.k.shape[2]
    assert v_scale is not None
    in_order = to_kernel_order(v.float(), TABLE, ORDER).mT
    padded = in_order.new_zeros(*v_scale.shape, tokens)
    padded[:, :, : v.shape[-1], : v.shape[1]] = in_order / v_scale[..., : v.shape[-1], None]
    place = torch.arange(tokens)
    h, t, g, i = place // 16, place // 4 % 4, place // 2 % 2, place % 2
    return padded[..., 16 * h + 8 * g + 2 * t + i].clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.int8)


@dataclass(frozen=True)
class Case:
    """What is attended to: head dimension, blocks, format of P·V, real tokens of each batch element, output."""

    dim: int
    block: tuple[int, int]
    pv: str
    valid: tuple[int, ...] = (LAYOUT.tokens,)
    dtype: torch.dtype = torch.float32

    @property
    def settings(self):
        return {
            "table": TABLE,
            "order": ORDER,
            "softmax_scale": self.dim**-0.5,
            "precision": Precision("int8", self.pv),
        }


@cache
def prepared(case: Case):
    """Swizzled operands and what the reference makes of the same tensors."""
    q, k, v = inputs(case.dim, len(case.valid), case.dtype)
    valid = torch.tensor(case.valid)
    operands = prepare(q, k, v, **case.settings, block=case.block, valid=valid, with_shift=True, swizzled=True)
    if case.pv == "fp8":
        stored = fp8_values(v * (torch.arange(LAYOUT.tokens) < valid[:, None])[..., None, None], operands)
        operands = replace(operands, v=blocked_values(stored, case.block[1]).contiguous())
    return operands, reference_attention(q, k, v, **case.settings, mask=random_mask(case.block), valid_tokens=valid)


def run(pipeline: Pipeline, case: Case) -> tuple[Tensor, Tensor]:
    operands, (right, _) = prepared(case)
    valid = torch.tensor(case.valid)
    out, lse = sparse.attend(
        operands, right.shape, case.dtype, **case.settings, mask=random_mask(case.block), tile=pipeline, valid=valid,
        return_lse=True,
    )  # fmt: skip
    assert lse is not None
    return out, lse


def assert_right(pipeline: Pipeline, case: Case) -> None:
    """An integer of Q or P may be one off the reference's; FP8 P is rounded against another maximum than there."""
    (out, lse), (_, (right, right_lse)) = run(pipeline, case), prepared(case)
    largest = {"int8": 0.005, "fp8": 0.03}[case.pv]
    assert out.dtype == case.dtype
    assert (out.double() - right.double()).norm() < largest * right.double().norm()
    assert torch.equal(lse.isfinite(), right_lse.isfinite())
    assert (lse - right_lse)[right_lse.isfinite()].abs().mean() < largest / 5


WIDE, NARROW, RAGGED = (128, (128, 128)), (64, (64, 128)), (41, (64, 64))
CASES = {
    "alone": (ALONE, Case(*WIDE, "int8")),
    "cluster": (CLUSTER, Case(*WIDE, "int8")),
    "pair in turns": (TURNS, Case(*WIDE, "int8")),
    "ahead": (AHEAD, Case(64, (128, 64), "int8")),
    "ragged channels, exponentials multiplied": (replace(ALONE, on_fma=3), Case(*RAGGED, "int8")),
    "FP8, cluster": (CLUSTER, Case(*WIDE, "fp8")),
    "FP8, summed by matrices": (replace(ALONE, matrix_sums=True, on_fma=2), Case(*NARROW, "fp8")),
    "FP8, promoted late": (replace(TURNS, promote=2, matrix_sums=True), Case(*WIDE, "fp8")),
    "in halves": (HALVES, Case(*NARROW, "int8")),
    "FP8, in halves": (replace(HALVES, halves=1), Case(*RAGGED, "fp8")),
    "FP8, in halves, by parts": (replace(HALVES, halves=2, span=64, matrix_sums=True), Case(*NARROW, "fp8")),
    "in halves, by parts": (replace(HALVES, span=64), Case(*NARROW, "int8", PADDED)),
    "cluster in halves": (replace(HALVES, cluster=2), Case(*WIDE, "int8")),
    "FP8, pair in halves": (PAIR, Case(*WIDE, "fp8")),
    "padded text, pair in halves": (replace(PAIR, matrix_sums=False), Case(*WIDE, "int8", PADDED)),
    "padded text, cluster": (CLUSTER, Case(*WIDE, "int8", PADDED)),
    "padded text, pair in turns": (TURNS, Case(*WIDE, "int8", PADDED)),
    "half precision": (ALONE, Case(*NARROW, "int8", dtype=torch.float16)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_reference(name, emulated):
    assert_right(*CASES[name])


@pytest.mark.parametrize("name", ["cluster", "pair in turns", "ahead", "in halves", "FP8, pair in halves"])
def test_whatever_comes_late_the_result_is_the_same(name, emulated):
    results = []
    for emulated[0] in range(2, 5):
        results.append(run(*CASES[name]))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize(
    "pipeline", [replace(CLUSTER, cluster=4), replace(ALONE, promote=2), replace(TURNS, warpgroups=3)]
)
def test_a_pipeline_that_does_not_fit_is_named(pipeline, emulated):
    with pytest.raises(ValueError, match="must fit int8 and blocks of 128 queries"):
        run(pipeline, Case(*WIDE, "int8"))


@pytest.mark.parametrize(("dim", "block"), [(128, (64, 64)), (64, (128, 128))])
def test_swizzled_operands_are_the_plain_ones_rearranged(dim, block):
    q, k, v = inputs(dim, 2)
    given = {"table": TABLE, "order": ORDER, "block": block, "softmax_scale": 0.1, "with_shift": False}
    given |= {"precision": Precision("int8", "int8"), "valid": torch.tensor([LAYOUT.tokens, LAYOUT.tokens - 5])}
    plain, moved = prepare(q, k, v, **given), prepare(q, k, v, **given, swizzled=True)
    assert torch.equal(moved.q, swizzled(plain.q)) and torch.equal(moved.k, swizzled(plain.k))
    assert torch.equal(moved.v, blocked_values(plain.v, block[1]))
    assert moved.k_scale is not None and torch.equal(moved.k_scale[..., 0], plain.k_scale)
    assert torch.equal(moved.q_scale, plain.q_scale)
