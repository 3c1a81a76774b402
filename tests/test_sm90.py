"""The CUDA C++ kernel for Hopper on a CPU: its source runs on emulated warpgroups, with the PTX manual's layouts.

Copies and products are done as late as they may be there, and warps come late at random.
"""

from dataclasses import dataclass, replace
from functools import cache

import emulation
import pytest
import torch
from torch import Tensor

from paroattn.block_mask import BlockMask, blocks_of
from paroattn.grid import ORDERS, Grid, Layout, TextSpan
from paroattn.kernels import native, sparse
from paroattn.kernels.prepare import Operands, prepare
from paroattn.kernels.reference import reference_attention, to_kernel_order
from paroattn.kernels.tiles import Pipeline
from paroattn.precision import Precision

LAYOUT = Layout(Grid(2, 9, 11), TextSpan(150, "suffix"))
HEADS = 3
pytestmark = [
    pytest.mark.skipif(emulation.COMPILER is None, reason=emulation.REASON),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

PADDED = (LAYOUT.tokens - 9, LAYOUT.tokens - 143)
"""Real tokens of two batch elements; nothing in the last block of the second is real."""
TWO = Pipeline(programs=3, stages=2)
THREE = Pipeline(programs=4, stages=3)


@pytest.fixture
def emulated(monkeypatch):
    """Run kernels of `sm90` on the emulator; the seed to run under."""
    monkeypatch.setattr(native, "kernel", emulation.kernel)
    monkeypatch.setattr(emulation, "SEED", [1])
    return emulation.SEED


def inputs(
    dim: int, batch: int, dtype: torch.dtype = torch.float32, steepness: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dim)
    q, k, v = (torch.randn(batch, LAYOUT.tokens, HEADS, dim, generator=generator) for _ in range(3))
    levels = torch.linspace(0.5, 2.0, HEADS)[:, None] * torch.linspace(0.8, 1.2, dim)
    steep = 3 if batch == 1 else 0.2  # nearly flat, where keys that are not real would weigh as much as real ones
    return (steepness * steep * q * levels).to(dtype), (k + levels).to(dtype), (v + levels).to(dtype)


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
    """What is attended to: head dimension, blocks, format of P·V, real tokens of each batch element, the rest."""

    dim: int
    block: tuple[int, int]
    pv: str
    valid: tuple[int, ...] = (LAYOUT.tokens,)
    dtype: torch.dtype = torch.float32
    steepness: float = 1.0

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
    q, k, v = inputs(case.dim, len(case.valid), case.dtype, case.steepness)
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
    "INT8": (TWO, Case(*WIDE, "int8")),
    "INT8, 64 channels, three stages": (THREE, Case(64, (128, 64), "int8")),
    "INT8, ragged channels": (TWO, Case(*RAGGED, "int8", PADDED)),
    "FP8": (TWO, Case(*WIDE, "fp8")),
    "FP8, 64 channels": (TWO, Case(*NARROW, "fp8")),
    "FP8, ragged channels, three stages": (THREE, Case(*RAGGED, "fp8")),
    "FP8, three stages, padded text": (THREE, Case(*NARROW, "fp8", PADDED)),
    "padded text, all keys alike": (TWO, Case(*NARROW, "int8", PADDED, steepness=1e-9)),
    "padded text": (TWO, Case(*WIDE, "int8", PADDED)),
    "half precision": (TWO, Case(*NARROW, "int8", dtype=torch.float16)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_reference(name, emulated):
    assert_right(*CASES[name])


@pytest.mark.parametrize("name", ["INT8", "FP8", "INT8, 64 channels, three stages", "FP8, three stages, padded text"])
def test_whatever_comes_late_the_result_is_the_same(name, emulated):
    results = []
    for emulated[0] in range(2, 5):
        results.append(run(*CASES[name]))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


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
