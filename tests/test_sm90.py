"""The CUDA C++ kernel for Hopper on a CPU: its source runs on emulated warpgroups, with the PTX manual's layouts.

Copies and products are done as late as they may be there, and warps come late at random.
"""

import ctypes
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from paroattn.block_mask import BlockMask, blocks_of
from paroattn.grid import ORDERS, Grid, Layout, TextSpan
from paroattn.kernels import native, sm90, sparse
from paroattn.kernels.prepare import prepare
from paroattn.kernels.reference import reference_attention, to_kernel_order
from paroattn.kernels.tiles import Pipeline, Tile
from paroattn.precision import Precision

EMULATOR = Path(__file__).parent / "emulator"
GRID = Grid(3, 9, 11)
TEXT = TextSpan(23, "suffix")
LAYOUT = Layout(GRID, TEXT)
HEADS = 3
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")

ALONE = Pipeline(programs=3, stages=2)
AHEAD = Pipeline(programs=3, stages=3, ahead=True)
PAIR = Pipeline(programs=1, stages=3, warpgroups=2, ahead=True)


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
            assert used == shared_bytes

    monkeypatch.setattr(sm90.native, "kernel", Kernel)
    return seeds


def inputs(dim: int, batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dim)
    q, k, v = (torch.randn(batch, LAYOUT.tokens, HEADS, dim, generator=generator) for _ in range(3))
    levels = torch.linspace(0.5, 2.0, HEADS)[:, None] * torch.linspace(0.8, 1.2, dim)
    return (3 * q * levels).to(dtype), (k + levels).to(dtype), (v + levels).to(dtype)


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


def fp8_values(v: Tensor, v_scale: Tensor, tokens: int) -> Tensor:
    """V in FP8, transposed and renamed, (B, H, D', tokens), which Triton's interpreter rounds wrong."""
    scaled = to_kernel_order(v.float(), TABLE, ORDER).mT / v_scale[..., : v.shape[-1], None]
    padded = scaled.new_zeros(*v_scale.shape, tokens)
    padded[:, :, : v.shape[-1], : v.shape[1]] = scaled
    place = torch.arange(tokens)
    h, t, g, i = place // 16, place // 4 % 4, place // 2 % 2, place % 2
    return padded[..., 16 * h + 8 * g + 2 * t + i].clamp(-448, 448).to(torch.float8_e4m3fn)


def run(pipeline, dim, block, pv, batch=1, valid=None, dtype=torch.float32, seeds=None):
    """Out and lse of the emulated kernel, and the same of the portable kernel for INT8, of the reference for FP8."""
    q, k, v = inputs(dim, batch, dtype)
    precision, mask = Precision("int8", pv), random_mask(block)
    valid_tokens = torch.full((batch,), LAYOUT.tokens, dtype=torch.int32) if valid is None else torch.tensor(valid)
    settings = {"table": TABLE, "order": ORDER, "softmax_scale": dim**-0.5}
    given = settings | {"block": block, "precision": precision, "valid": valid_tokens, "with_shift": True}
    operands = prepare(q, k, v, **given, swizzled=True)
    if pv == "fp8":
        keys = mask.key_blocks * block[1]
        plain = fp8_values(v * (torch.arange(LAYOUT.tokens) < LAYOUT.tokens)[:, None, None], operands.v_scale, keys)
        hidden = torch.arange(keys)[None] >= valid_tokens[:, None]
        place = torch.arange(keys)
        token = (place & ~14) | ((place & 2) << 2) | ((place & 12) >> 1)
        plain = plain.view(torch.int8).masked_fill(hidden[:, token][:, None, None], 0)
        operands = replace(operands, v=blocked_values(plain, block[1]).contiguous())
    settings |= {"mask": mask, "precision": precision}
    attend = settings | {"valid": valid_tokens, "return_lse": True}
    out, lse = sparse.attend(operands, q.shape, q.dtype, **attend, tile=pipeline)
    if pv == "int8":
        plain = prepare(q, k, v, **given)
        right = sparse.attend(plain, q.shape, q.dtype, **attend, tile=Tile(64, 4, 2))
    else:
        right = reference_attention(q, k, v, **settings, valid_tokens=valid_tokens)
    return out, lse, *right


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


CASES = {
    "alone": (ALONE, 128, (64, 128)),
    "alone, small blocks": (ALONE, 128, (128, 64)),
    "alone, few channels": (replace(ALONE, programs=4), 64, (64, 128)),
    "alone, ragged channels": (ALONE, 41, (64, 64)),
    "cluster": (replace(ALONE, cluster=2), 128, (128, 128)),
    "ahead": (AHEAD, 64, (64, 128)),
    "pair": (PAIR, 128, (128, 128)),
    "pair in turns": (replace(PAIR, turns=True, stages=4), 128, (128, 128)),
    "multiplied exponentials": (replace(ALONE, on_fma=3), 64, (64, 128)),
}
FP8_CASES = {
    "sums on matrix units": (replace(ALONE, matrix_sums=True), 128, (128, 128)),
    "sums on matrix units, few channels": (replace(ALONE, matrix_sums=True), 64, (64, 128)),
    "promoted late": (replace(PAIR, promote=2, matrix_sums=True), 128, (128, 128)),
    "never promoted": (replace(AHEAD, promote=0), 64, (64, 64)),
}


@pytest.mark.parametrize("name", CASES)
def test_int8_equals_the_portable_kernel(name, emulated):
    out, lse, right, right_lse = run(*CASES[name], "int8")
    assert difference(out, right) < 2e-3
    assert (lse - right_lse).abs().max() < 0.005  # a weight of 255 may be one off


@pytest.mark.parametrize("name", CASES | FP8_CASES)
def test_fp8_is_near_the_reference(name, emulated):
    out, lse, right, right_lse = run(*(CASES | FP8_CASES)[name], "fp8")
    assert difference(out, right) < 0.03
    assert (lse - right_lse).abs().max() < 0.03


@pytest.mark.parametrize("pv", ["int8", "fp8"])
def test_padded_text_is_not_read(pv, emulated):
    valid = [LAYOUT.tokens - 9, LAYOUT.tokens - 23]
    out, lse, right, right_lse = run(PAIR, 128, (128, 128), pv, batch=2, valid=valid)
    assert difference(out, right) < 0.03
    assert (lse - right_lse).abs().max() < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_outputs_are_the_float32_ones_rounded(dtype, emulated):
    out, _, right, _ = run(replace(ALONE, programs=4), 64, (64, 128), "int8", dtype=dtype)
    assert out.dtype == dtype and difference(out, right) < 6e-3


@pytest.mark.parametrize("pipeline", [replace(PAIR, turns=True), AHEAD, ALONE], ids=["pair", "ahead", "alone"])
def test_whatever_comes_late_the_result_is_the_same(pipeline, emulated):
    results = []
    for seed in (1, 2, 3):
        emulated[0] = seed
        results.append(run(pipeline, 64, (128, 128), "int8")[:2])
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("block", [(64, 64), (128, 128)])
def test_swizzled_operands_are_the_plain_ones_rearranged(dim, block):
    q, k, v = inputs(dim, 2)
    given = {"table": TABLE, "order": ORDER, "block": block, "softmax_scale": 0.1, "with_shift": False}
    given |= {"precision": Precision("int8", "int8"), "valid": torch.tensor([LAYOUT.tokens, LAYOUT.tokens - 5])}
    plain, moved = prepare(q, k, v, **given), prepare(q, k, v, **given, swizzled=True)
    assert torch.equal(moved.q, swizzled(plain.q)) and torch.equal(moved.k, swizzled(plain.k))
    assert torch.equal(moved.v, blocked_values(plain.v, block[1]))
    assert torch.equal(moved.q_scale, plain.q_scale) and torch.equal(moved.k_scale, plain.k_scale)
