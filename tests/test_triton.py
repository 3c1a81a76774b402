"""The Triton kernels against the reference: in Triton's interpreter on a CPU, and compiled without a GPU."""

import json
import math
import os
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_kernels import sqnr
from torch import Tensor

import paroattn
from paroattn.block_mask import BlockMask, blocks_of
from paroattn.grid import Grid, Layout, TextSpan
from paroattn.kernels import four_bits, reference
from paroattn.precision import FORMATS, Precision, hadamard, quantize

pytest.importorskip("triton", reason="Triton is not installed")
from triton.runtime import interpreter

from paroattn.kernels import feedback, portable, prepare, sparse, tiles

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRID = Grid(3, 5, 11)
HEADS = 3
ROOM = 4096
LSE_ERROR = {"": 1e-2, "fp8": 4e-2, "int4": 0.15, "int4/fp8": 5e-2}
"""By format of P·V; row sums of FP8 are of p before its rounding or after it, whichever is faster. A p̂ of INT4 that
differs by one differs by a fifteenth."""
OF_A_TOKEN = 0.3
"""What lse may differ by where a query near a half was rounded to another integer in INT4."""
LOWEST = {"int4": 38, "int4/fp8": 42}
"""Agreement with the reference, dB. A maximum that is off by part of a step of INT4's scores moves p on FP8's grid:
each is rounded to another neighbour, and a row's largest is no longer 448. Emulated in float64, this alone brings 55 dB
down to 43, and lse 0.038 apart where rounded p are summed."""
NO_TEXT = TextSpan()
TEXTS = [
    (NO_TEXT, False),
    (TextSpan(23, "prefix"), False),
    (TextSpan(23, "prefix"), True),
    (TextSpan(70, "suffix"), True),
]
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)  # the interpreter's
layouts = pytest.mark.parametrize(("text", "padded"), TEXTS, ids=["video", "prefix", "prefix-padded", "suffix-padded"])


class Case:
    """Inputs that differ in every batch element, token, head and channel, with another order and mask per head."""

    def __init__(self, text=NO_TEXT, padded=False, block=(64, 64), dim=64, dtype=torch.float32, grid=GRID, keep=0.5):
        generator = torch.Generator().manual_seed(0)
        layout = Layout(grid, text)
        self.tokens = layout.tokens
        shape, levels = (
            (2, self.tokens, HEADS, dim),
            torch.linspace(0.5, 2, HEADS)[:, None] * torch.linspace(0.8, 1.2, dim),
        )
        q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
        self.q, self.k, self.v = q * levels * 1.5, k + 2 * torch.randn(HEADS, dim, generator=generator), v + levels
        self.table = layout.table(("FHW", "WHF", "HFW", "2x2x4", "FWH")).to(DEVICE)
        self.order = torch.tensor([3, 1, 4], dtype=torch.int32, device=DEVICE)
        rows, columns = (blocks_of(grid.tokens, size) for size in block)
        kept = torch.rand(HEADS, rows, columns, generator=generator) < keep
        kept[0, 0] = torch.arange(columns) == columns - 1  # one kept block, the ragged one
        kept[1] = True
        kept[2, :, 0] |= ~kept[2].any(-1)
        kept[0, :, 0] |= ~kept[0].any(-1)
        self.mask = BlockMask.from_dense(kept, block).with_text(grid.tokens, text.tokens).to(DEVICE)
        self.text_tokens = text.tokens
        self.valid_text = torch.tensor([text.tokens - 4, 3], device=DEVICE) if padded else None
        self.move(dtype)

    def move(self, dtype: torch.dtype) -> None:
        self.q, self.k, self.v = (x.to(DEVICE, dtype) for x in (self.q, self.k, self.v))

    @property
    def valid(self) -> Tensor:
        return (torch.full((2,), self.text_tokens, device=DEVICE) if self.valid_text is None else self.valid_text) + (
            self.tokens - self.text_tokens
        )

    @property
    def real(self) -> Tensor:
        """Which tokens are no padding, (B, N) in the model's order."""
        flags = torch.zeros(2, self.tokens, dtype=torch.bool, device=DEVICE)
        for element, valid in enumerate(self.valid.tolist()):
            flags[element, self.table[0, :valid].long()] = True
        return flags

    def run(self, precision: Any, impl: str = "triton", **changes) -> Any:
        settings = {"table": self.table, "order": self.order, "text_tokens": self.text_tokens, "impl": impl}
        settings |= {"valid_text": self.valid_text, "precision": precision, "return_lse": True} | changes
        return paroattn.attention(self.q, self.k, self.v, self.mask, **settings)

    def prepared(self, precision: str) -> Any:
        return prepare.prepare(
            self.q, self.k, self.v, table=self.table, order=self.order, valid=self.valid, block=self.mask.block,
            precision=Precision.parse(precision), softmax_scale=0.3, with_shift=True, text_tokens=self.text_tokens,
        )  # fmt: skip

    def rounded(self, precision: str) -> tuple[Tensor, Tensor, Tensor]:
        """What the products are made of, in float32 and in kernel order: the integers of `prepared` times scales."""
        got, tokens, dim = self.prepared(precision), self.tokens, self.q.shape[-1]
        q = got.q.float() * got.q_scale[..., None] * (math.log(2) / 0.3)
        k = got.k.float() * got.k_scale.repeat_interleave(self.mask.block[1], -1)[..., None]
        if got.v_scale is None:
            v = got.v.float()
        else:
            v = renamed_back(got.v.float()) * got.v_scale[:, :, None]
        return q[:, :, :tokens], k[:, :, :tokens], v[:, :, :tokens, :dim]

    def kernel_order(self, x: Tensor) -> Tensor:
        """(B, N, H, D) → (B, H, N, D) in each head's order, padding 0."""
        real = torch.arange(self.tokens, device=DEVICE) < self.valid[:, None]
        return reference.to_kernel_order(x.float(), self.table, self.order) * real[:, None, :, None]


def pv_of(precision: str) -> str:
    return "int4" if precision == "int4" else precision.partition("/")[2]


@pytest.fixture
def guarded(monkeypatch):
    """Room around everything that `prepare` writes, which must stay as it is."""
    rooms = []

    class Roomy:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def empty(self, *shape: int, **settings: Any) -> Tensor:
            rooms.append(torch.full((math.prod(shape) + 2 * ROOM,), 77, **settings))
            return rooms[-1][ROOM:-ROOM].view(shape)

    for module in (prepare, feedback):
        monkeypatch.setattr(module, "torch", Roomy())
    yield
    assert rooms and all((side == 77).all() for room in rooms for side in (room[:ROOM], room[-ROOM:]))


def off_by_one(got: Tensor, expected: Tensor) -> float:
    """Share of integers that differ; none by more than 1."""
    difference = (got.float() - expected.float()).abs()
    assert difference.max() <= 1
    return difference.mean().item()


def on_the_same_integers(case: Case, precision: str, **settings) -> tuple[Tensor, Tensor]:
    """The reference of what the kernels have rounded. A target near a half may fall to either side of it on a GPU and
    then changes what the other channels of its token are rounded to."""
    rounded, own = case.rounded(precision), reference._rounded
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_rounded", lambda *args: (*rounded, own(*args)[3]))
        return case.run(precision, "reference", **settings)


def like_the_reference(
    case: Case, precision: Any, decibels: float, lse_error: float, same_integers: bool = False, **settings
) -> None:
    out, lse = case.run(precision, **settings)
    if same_integers:
        expected, expected_lse = on_the_same_integers(case, precision, **settings)
    else:
        expected, expected_lse = case.run(precision, "reference", **settings)
    real = case.real
    assert (out.dtype, out.shape, lse.dtype) == (case.q.dtype, case.q.shape, torch.float32)
    assert out.isfinite().all()
    assert sqnr(out[real], expected[real]) >= decibels
    assert (lse - expected_lse).transpose(1, 2)[real].abs().max() <= lse_error


@pytest.mark.parametrize(
    ("block", "dim"), [((64, 128), 24), ((128, 64), 64), ((64, 64), 72), ((64, 128), 128)], ids=str
)
@pytest.mark.usefixtures("guarded")
def test_prepared_q_and_k_are_the_reference_s_integers(block, dim, monkeypatch):
    monkeypatch.setattr(prepare, "TOKENS_PER_SUM", 64)
    case = Case(TextSpan(23, "prefix"), True, block, dim)
    got, tokens = case.prepared("int8"), case.tokens
    q, k = reference.to_kernel_order(case.q.float(), case.table, case.order), case.kernel_order(case.k)
    mean = k[:, :, ::8].sum(2, keepdim=True) / ((case.valid + 7) // 8)[:, None, None, None]
    keys = k - mean
    keys *= (torch.arange(tokens, device=DEVICE) < case.valid[:, None])[:, None, :, None]
    rotation = hadamard(dim).float().to(DEVICE)
    width, d_pad = rotation.shape[1], got.q.shape[-1]
    norm = math.sqrt(width / d_pad)  # a wider rotation repeats its columns, each smaller
    expected_q, q_scale = quantize(q @ rotation, FORMATS["int8"], "token")
    expected_k, k_scale = quantize(keys @ rotation, FORMATS["int8"], "block", block[1])
    for x, expected, name in ((got.q, expected_q, "q"), (got.k, expected_k, "k")):
        for first in range(0, d_pad, width):
            assert off_by_one(x[:, :, :tokens, first : first + width], expected) <= 1e-3, name
        assert not x[:, :, tokens:].any()
    torch.testing.assert_close(
        got.q_scale[..., :tokens, None], q_scale * norm * 0.3 / math.log(2), rtol=1e-5, atol=1e-12
    )
    per_block = k_scale[:, :, :: block[1], 0] * norm
    torch.testing.assert_close(got.k_scale, per_block, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(got.shift[..., :tokens], 0.3 * (q @ mean.mT).squeeze(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dim", "key_block"), [(40, 64), (128, 128)])
@pytest.mark.usefixtures("guarded")
def test_prepared_v_is_the_reference_s_integers_transposed_and_renamed(dim, key_block, monkeypatch):
    monkeypatch.setattr(prepare, "TOKENS_PER_SUM", 64)
    case = Case(TextSpan(23, "suffix"), True, (64, key_block), dim)
    got, tokens = case.prepared("int8"), case.tokens
    expected, scale = quantize(case.kernel_order(case.v), FORMATS["int8"], "channel")
    padded = torch.nn.functional.pad(expected, (0, 0, 0, -tokens % key_block))
    assert off_by_one(got.v[:, :, :dim], renamed(padded)) <= 1e-3
    assert not got.v[:, :, dim:].any()
    torch.testing.assert_close(got.v_scale[:, :, None, :dim], scale, rtol=1e-6, atol=0)
    own = got.v.unflatten(-1, (-1, key_block)).int().sum(-1).transpose(2, 3)
    assert torch.equal(got.v_start, prepare.BIAS + 128 * own)


@pytest.mark.gpu
def test_prepared_v_in_fp8_is_the_reference_s():
    case = Case(TextSpan(23, "suffix"), True, (64, 64), 64)
    expected, _ = quantize(case.kernel_order(case.v), FORMATS["fp8"], "channel")
    padded = torch.nn.functional.pad(expected, (0, 0, 0, -case.tokens % 64))
    renamed = [16 * h + 8 * g + 2 * t + i for h in range(2) for t in range(4) for g in range(2) for i in range(2)]
    groups = padded.unflatten(2, (-1, 32))[:, :, :, renamed].flatten(2, 3)
    assert (case.prepared("int8/fp8").v.float() != groups.mT).float().mean() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_half_precision_operands_are_gathered_and_nothing_else(dtype):
    case = Case(TextSpan(23, "prefix"), True, dim=40, dtype=dtype)
    got = case.prepared("fp16")
    own = reference.to_kernel_order(case.q, case.table, case.order)
    for x, expected in ((got.q, own), (got.k, case.kernel_order(case.k)), (got.v, case.kernel_order(case.v))):
        assert torch.equal(x[:, :, : case.tokens, :40], expected.half())
        assert not x[:, :, case.tokens :].any() and not x[..., 40:].any()
    assert (got.q_scale, got.k_scale, got.v_scale, got.v_start, got.shift) == (None,) * 5


@pytest.mark.parametrize("keys", [64, 128])
def test_p_is_rounded_as_the_reference_says(keys):
    """With V the identity and a single block, the output is p̂ over its sum, and its largest entry is 255."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, keys, 4, keys, generator=generator).to(DEVICE) for _ in range(2))
    v = torch.eye(keys, device=DEVICE)[None, :, None].expand(-1, -1, 4, -1)
    mask = BlockMask.full(4, keys, (keys, keys)).to(DEVICE)
    out, _ = paroattn.attention(q, k, v, mask, precision="int8", return_lse=True, impl="triton")
    out = out.transpose(1, 2).double()
    table, order = (
        torch.arange(keys, dtype=torch.int32, device=DEVICE)[None],
        torch.zeros(4, dtype=torch.int64, device=DEVICE),
    )
    got: Any = prepare.prepare(
        q, k, v, table=table, order=order, valid=torch.tensor([keys], device=DEVICE), block=mask.block,
        precision=Precision.parse("int8"), softmax_scale=keys**-0.5, with_shift=False,
    )  # fmt: skip
    scores = (got.q.double() @ got.k.double().mT) * got.q_scale[..., None] * got.k_scale[..., None]
    expected = (255 * (scores - scores.amax(-1, keepdim=True)).exp2()).round()
    p = 255 * out / out.amax(-1, keepdim=True)
    assert (p - p.round()).abs().max() <= 1e-2
    assert off_by_one(p.round(), expected) <= (1e-2 if DEVICE == "cuda" else 2e-3)
    assert expected.mean() > 10
    # on a GPU the bias is taken off a product that was rounded to whole units of p̂ v
    tolerance = 1e-3 if DEVICE == "cuda" else 1e-5
    torch.testing.assert_close(out.sum(-1), torch.ones_like(out[..., 0]), atol=tolerance, rtol=0)


def renamed(stored: Tensor) -> Tensor:
    """Tokens of (B, H, N, D) as the kernel stores them, (B, H, D, N)."""
    places = [16 * h + 8 * g + 2 * t + i for h in range(2) for t in range(4) for g in range(2) for i in range(2)]
    return stored.unflatten(2, (-1, 32))[:, :, :, places].flatten(2, 3).mT


def renamed_back(stored: Tensor) -> Tensor:
    """(B, H, D, N) as the kernel stores them → (B, H, N, D)."""
    places = [16 * h + 4 * t + 2 * g + i for h in range(2) for g in range(2) for t in range(4) for i in range(2)]
    return stored.mT.unflatten(2, (-1, 32))[:, :, :, places].flatten(2, 3)


def in_two(x: Tensor, first: int, of_video: Any, of_text: Any) -> tuple[Tensor, Tensor]:
    """Integers and scales of the first tokens rounded in one way, and of the others in another."""
    parts = of_video(x[:, :, :first]), of_text(x[:, :, first:])
    return tuple(torch.cat(each, 2) for each in zip(*parts, strict=True))


@pytest.mark.parametrize(("block", "dim"), [((64, 128), 40), ((128, 64), 64), ((64, 128), 128)], ids=str)
@pytest.mark.usefixtures("guarded")
def test_prepared_four_bits_are_the_reference_s_integers(block, dim, monkeypatch):
    monkeypatch.setattr(prepare, "TOKENS_PER_SUM", 64)
    monkeypatch.setattr(feedback, "SAMPLES_PER_SUM", 16)
    monkeypatch.setattr(feedback, "SAMPLES_AT_ONCE", 16)
    case = Case(TextSpan(23, "prefix"), True, block, dim, grid=Grid(3, 5, 17))
    four_bits_are_the_reference_s(case, block, dim)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "block", "dim"),
    [(torch.bfloat16, block, dim) for block in tiles.BLOCKS for dim in (40, 120)] + [(torch.float32, (64, 64), 128)],
    ids=str,
)
@pytest.mark.usefixtures("guarded")
def test_prepared_four_bits_are_the_reference_s_integers_on_a_gpu(dtype, block, dim):
    four_bits_are_the_reference_s(Case(TextSpan(70, "suffix"), True, block, dim, dtype, Grid(5, 14, 17)), block, dim)


def four_bits_are_the_reference_s(case: Case, block: tuple[int, int], dim: int) -> None:
    got, tokens = case.prepared("int4"), case.tokens
    q, k = reference.to_kernel_order(case.q.float(), case.table, case.order), case.kernel_order(case.k)
    mean = k[:, :, ::8].sum(2, keepdim=True) / ((case.valid + 7) // 8)[:, None, None, None]
    real = (torch.arange(tokens, device=DEVICE) < case.valid[:, None])[:, None, :, None]
    rotation = hadamard(dim).float().to(DEVICE)
    q, k = q @ rotation, (k - mean) * real @ rotation
    for_queries, for_keys = four_bits.feedback(k[:, :, ::16]), four_bits.feedback((q * real)[:, :, ::16])
    video = tokens - case.text_tokens
    text = video // block[1] * block[1]  # the block in which text begins is text
    expected_q, q_scale = in_two(
        q, video, lambda x: four_bits.round_queries(x, for_queries), lambda x: quantize(x, FORMATS["int8"], "token")
    )
    expected_k, k_scale = in_two(
        k, text, lambda x: four_bits.round_keys(x, for_keys, block[1]),
        lambda x: quantize(x, FORMATS["int8"], "block", block[1]),
    )  # fmt: skip
    expected_v, v_scale = four_bits.round_values(case.kernel_order(case.v))
    differing = {
        "q": got.q[:, :, :tokens] != expected_q,
        "k": (got.k[:, :, :tokens] != expected_k) & real,
        "v": got.v[:, :, :dim] != renamed(torch.nn.functional.pad(expected_v, (0, 0, 0, -tokens % block[1]))),
    }
    # a target near a half that differs changes what its token's others make of it
    for name, wrong in differing.items():
        assert wrong.float().mean() <= (2e-2 if DEVICE == "cuda" else 1e-3), name
    of_video = expected_q[:, :, :video]
    assert expected_k[:, :, :text].abs().max() > 8 > of_video.max() and of_video.min() == -8
    assert expected_q[:, :, video:].abs().amax(-1).min() == 127 == expected_k[:, :, text:].abs().max()
    assert not (got.k[:, :, :tokens] * ~real).any() and not got.k[:, :, tokens:].any()
    torch.testing.assert_close(got.q_scale[..., :tokens, None], q_scale * 0.3 / math.log(2), rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(got.k_scale, k_scale[:, :, :: block[1], 0], rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(got.v_scale[:, :, None, :dim], v_scale, rtol=1e-6, atol=0)
    assert got.v_start is None


def test_the_scale_of_a_channel_far_from_0_is_that_of_its_middles():
    case = Case(grid=Grid(4, 4, 10))
    case.v[..., 5] += 200
    expected = four_bits.round_values(case.kernel_order(case.v))[1]
    assert (expected[..., 5] > 200 / 120).all() and (expected[..., :5] < 1).all()
    torch.testing.assert_close(case.prepared("int4").v_scale[:, :, None], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", ["int4", "int4/int8", "int8/int4", "int4/fp16"])
def test_int4_attention_is_the_reference_s(precision):
    dtype = torch.float16 if precision.endswith("fp16") else torch.float32
    case = Case(TextSpan(23, "prefix"), True, (64, 128), 64, dtype=dtype)
    like_the_reference(case, precision, 40 if precision == "int4" else 50, OF_A_TOKEN)


def test_heads_in_int4_and_int8_are_the_reference_s():
    like_the_reference(Case(TextSpan(23, "prefix"), True), ["int4", "int8", "int4"], 40, OF_A_TOKEN)


@layouts
def test_int8_attention_is_the_reference_s_whatever_the_text(text, padded):
    like_the_reference(Case(text, padded), "int8", 60, 5e-3)


@pytest.mark.parametrize(("block", "dim"), [((64, 128), 40), ((128, 64), 128), ((128, 128), 64)], ids=str)
def test_int8_attention_is_the_reference_s_at_every_block_and_head_dimension(block, dim):
    like_the_reference(Case(TextSpan(23, "prefix"), True, block, dim), "int8", 60, 5e-3)


@pytest.mark.parametrize(("precision", "padded"), [("int8/fp16", True), ("fp16", False), ("fp16/int8", True)])
def test_half_precision_products_are_the_reference_s(precision, padded):
    like_the_reference(Case(TextSpan(23, "suffix"), padded, (64, 128), dtype=torch.float16), precision, 55, 3e-3)


def test_coarse_steps_of_scores_move_no_weight(monkeypatch):
    """12582912 steps and their scale are a float whose last place is about a step: of INT4, several percent of a p."""

    def fma(self, x, y, z):  # the interpreter's rounds twice
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)
    case = Case(dtype=torch.float16, block=(64, 64), grid=Grid(2, 5, 17), keep=1.0)
    monkeypatch.setattr(Case, "prepared", cache(Case.prepared))
    monkeypatch.setattr(sparse, "prepare", lambda *args, **settings: case.prepared("int4/fp16"))
    like_the_reference(case, "int4/fp16", 60, 1e-3, same_integers=True, softmax_scale=0.3)


def test_bf16_tensors_do_as_well():
    like_the_reference(Case(block=(128, 64), dtype=torch.bfloat16), "int8-qk", 45, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("block", tiles.BLOCKS, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize(
    "precision", ["int8/fp8", "bf16/fp8", "bf16", "int8", "int8-qk", "int8-pv", "int4", "int4/fp8", "int4-qk"]
)
def test_every_configuration_is_the_reference_s_on_a_gpu(precision, block, dim):
    case = Case(TextSpan(70, "suffix"), True, block, dim, torch.bfloat16, Grid(5, 14, 17), 0.3)
    lowest, lse_error = LOWEST.get(precision, 45), LSE_ERROR.get(precision, LSE_ERROR[pv_of(precision)])
    like_the_reference(case, precision, lowest, lse_error, same_integers=precision.startswith("int4"))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [40, 64, 128])
@pytest.mark.parametrize("block", tiles.BLOCKS, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("precision", ["int8/fp8", "int8", "int4"])
def test_the_portable_kernel_agrees_with_the_one_for_this_gpu(precision, block, dim, monkeypatch):
    case = Case(TextSpan(70, "prefix"), True, block, dim, torch.bfloat16, Grid(5, 14, 17), 0.3)
    out, lse = case.run(precision)
    monkeypatch.setattr(tiles, "HAS_GLUON", False)
    portable, portable_lse = case.run(precision)
    allowed = 1.3e-2 if precision == "int4" else 1e-2
    assert (out - portable)[case.real].norm() <= allowed * portable[case.real].norm()
    largest = (lse - portable_lse).transpose(1, 2)[case.real].abs().max()
    assert largest <= LSE_ERROR[pv_of(precision)]


def test_descriptors_and_pointers_load_the_same(monkeypatch):
    case, results = Case(TextSpan(23, "prefix"), True, (128, 128), grid=Grid(3, 5, 7)), []
    for descriptors in (False, True):
        monkeypatch.setattr(sparse, "tile_of", lambda *_, d=descriptors: tiles.Tile(64, 4, 2, d))
        results.append([case.run(precision)[0] for precision in ("int8", "fp16")])
    for pointer, descriptor in zip(*results, strict=True):
        assert torch.equal(pointer, descriptor)


def test_half_precision_is_as_exact_as_the_reference_in_float64():
    case = Case(TextSpan(23, "prefix"), dtype=torch.float16)
    out, _ = case.run("fp16")
    rounded, _ = case.run("fp16", "reference")
    case.move(torch.float64)
    expected, _ = case.run("fp64", "reference")
    assert (out - expected).norm() <= 1.5 * (rounded - expected).norm()


@pytest.mark.parametrize("grid", [Grid(1, 5, 7), Grid(4, 4, 4)], ids=str)
def test_one_block_is_enough(grid):
    like_the_reference(Case(grid=grid), "int8", 60, 5e-3)


def test_without_table_and_lse():
    case = Case()
    alone = case.run("int8", table=None, order=None, return_lse=False)
    own = torch.arange(case.tokens, dtype=torch.int32, device=DEVICE)[None]
    assert torch.equal(
        alone, case.run("int8", table=own, order=torch.zeros(HEADS, dtype=torch.int64, device=DEVICE))[0]
    )


def test_slices_of_a_fused_projection_do_as_well():
    case = Case()
    expected, _ = case.run("int8")
    case.q, case.k, case.v = torch.stack([case.q, case.k, case.v], -1).unbind(-1)
    assert case.q.stride(-1) == 3
    got, _ = case.run("int8")
    assert (got - expected).norm() <= (0 if DEVICE == "cpu" else 2e-3) * expected.norm()  # compiled anew on a GPU


@pytest.mark.parametrize("precision", ["int8", "int4", "fp16"])
def test_padding_is_never_read(precision):
    case = Case(TextSpan(23, "suffix"), True)
    before, lse = case.run(precision)
    real = case.real
    for x in (case.k, case.v):
        x[~real] = math.nan
    after, lse_after = case.run(precision)
    assert torch.equal(before[real], after[real])
    assert torch.equal(lse.transpose(1, 2)[real], lse_after.transpose(1, 2)[real])


def test_dropped_blocks_are_never_read():
    case = Case(dtype=torch.float16)
    kept = case.mask.dense().clone()
    kept[0, :, 1], kept[0, :, 0] = False, True
    case.mask = BlockMask.from_dense(kept, (64, 64))
    before, _ = case.run("fp16")
    tokens = case.table[int(case.order[0]), 64:128].long()
    case.k[:, tokens, 0] = case.v[:, tokens, 0] = math.nan
    assert torch.equal(case.run("fp16")[0], before)


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_a_row_without_real_keys_gives_zero_and_minus_infinity(precision):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 192, 2, 64, generator=generator).to(DEVICE) for _ in range(3))
    kept = torch.tensor([[[1, 0, 0], [0, 0, 1], [1, 1, 1]], [[0, 0, 1], [1, 0, 1], [1, 0, 0]]]).bool()
    out, lse = paroattn.attention(
        q, k, v, BlockMask.from_dense(kept, (64, 64)).to(DEVICE), text_tokens=64, return_lse=True, impl="triton",
        valid_text=torch.tensor([0, 64], device=DEVICE), precision=precision,
    )  # fmt: skip
    empty = torch.zeros(2, 2, 192, dtype=torch.bool, device=DEVICE)
    empty[0, 0, 64:128] = empty[0, 1, :64] = True
    assert torch.equal(lse == -math.inf, empty)
    assert torch.equal((out == 0).all(-1).transpose(1, 2), empty)
    assert out.isfinite().all()


def test_channels_that_stick_out_and_very_negative_scores_stay_finite():
    case = Case(TextSpan(23, "prefix"), True)
    case.q[..., 5] *= 100
    case.k[..., 11] *= 100
    case.v[..., 3] *= 100
    like_the_reference(case, "int8", 50, 2e-2, softmax_scale=0.002)
    like_the_reference(case, "int8", 0, math.inf)  # one key takes all, which one is decided by the last bit
    case = Case(keep=0.2)
    first = case.table[case.order.long(), :64].long()  # the first block holds every row's maximum
    for head in range(HEADS):
        case.k[:, first[head], head] += 60 * case.q[:, :, head].mean(1, keepdim=True)
    like_the_reference(case, "int8", 45, 0.3)


def test_heads_of_two_precisions_run_side_by_side():
    case = Case(dtype=torch.float16)
    mixed, lse = case.run(["int8", "fp16", "int8"])
    for precision, heads in (("int8", [0, 2]), ("fp16", [1])):
        out, logs = case.run(precision)
        assert torch.equal(mixed[:, :, heads], out[:, :, heads])
        assert torch.equal(lse[:, heads], logs[:, heads])


def test_the_softmax_scale_is_the_caller_s():
    case = Case(dtype=torch.float16)
    for precision in ("int8", "fp16"):
        out, lse = case.run(precision, softmax_scale=0.05)
        expected, expected_lse = case.run(precision, "reference", softmax_scale=0.05)
        assert sqnr(out, expected) >= 55
        assert (lse - expected_lse).abs().max() <= 5e-3


def test_lists_hold_the_kept_blocks_and_counts_leave_out_padding():
    case = Case(TextSpan(70, "suffix"), True)
    seen = {}

    class Listening:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: seen.update(kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "_sparse_kernel", Listening())
        case.run("fp16")
    counts, indices = case.mask.key_lists()
    whole = (
        case.mask.dense()[None] & (torch.arange(4, device=DEVICE) < (case.valid // 64)[:, None])[:, None, None]
    ).sum(-1)
    assert torch.equal(seen["counts_ptr"].long(), whole)
    for head in range(HEADS):
        for row, count in enumerate(counts[head].tolist()):
            assert seen["lists_ptr"][head, row, :count].tolist() == indices[head, row, :count].tolist()


def test_the_densest_head_and_its_longest_rows_are_launched_first():
    kept = torch.zeros(3, 4, 4, dtype=torch.bool)
    for head, lengths in enumerate([[1, 2, 1, 1], [2, 4, 1, 3], [3, 1, 1, 1]]):
        for row, length in enumerate(lengths):
            kept[head, row, :length] = True
    mask = BlockMask.from_dense(kept, (64, 64))
    order = sparse.launch_order(mask)
    assert order.tolist() == [5, 7, 4, 6, 8, 9, 10, 11, 1, 0, 2, 3]
    assert sparse.launch_order(mask) is order


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"dim": 136}, ValueError, "head dimension must be at most 128 .* got 136"),
        ({"block": (32, 64)}, ValueError, r"blocks must be one of 64x64, .* got 32x64\. Make the plan"),
        ({"dtype": torch.float64}, ValueError, "triton needs tensors on a GPU, not float64"),
    ],
)
def test_what_the_kernels_cannot_do_is_said(change, kind, message):
    with pytest.raises(kind, match=message):
        Case(**change).run("int8")


@pytest.mark.parametrize("precision", ["fp32", "fp8/fp8", "fp8/int4"])
def test_formats_without_a_kernel_are_refused(precision):
    with pytest.raises(ValueError, match=f"triton needs .* got {precision} on torch.float32"):
        Case().run(precision)


def test_a_softmax_scale_of_zero_is_refused():
    with pytest.raises(ValueError, match="softmax_scale must be above 0"):
        Case().run("int8", softmax_scale=0.0)


@pytest.mark.parametrize(
    ("capability", "precision", "message"),
    [
        ((7, 5), "int8", r"int8 needs .* 8\.0 or higher; got 7\.5"),
        ((8, 6), "int8/fp8", r"fp8 needs .* 8\.9 .* got 8\.6"),
    ],
)
def test_a_gpu_without_a_format_is_named(monkeypatch, capability, precision, message):
    monkeypatch.setattr(sparse, "capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    with pytest.raises(RuntimeError, match=f"{message} .*Some GPU"):
        Case().run(precision)


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "paroattn.kernels.sparse", None)
    with pytest.raises(RuntimeError, match=r"needs Triton .* pip install 'paroattn\[gpu\]'"):
        Case().run("int8")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_every_gpu_has_a_tile(capability, monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(tiles, "HAS_GLUON", False)
    for precision, block, d_pad in product(("int8", "int4", "int8/fp8", "fp16", "int8-qk"), tiles.BLOCKS, (64, 128)):
        tile = tiles.tile_of(capability, Precision.parse(precision), block, d_pad)
        assert isinstance(tile, tiles.Tile) and (not tile.descriptors or capability[0] == 9)


def test_hopper_has_its_own_kernel_for_products_of_8_bits(monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    for precision, block, d_pad in product(
        ("int8", "int8/fp8", "int4", "int4/fp8", "bf16", "int8-qk", "int4-qk"), tiles.BLOCKS, (64, 128)
    ):
        formats = Precision.parse(precision)
        ring = tiles.tile_of((9, 0), formats, block, d_pad)
        assert isinstance(ring, tiles.Ring) == (formats.pv in ("int8", "int4", "fp8"))
        assert isinstance(tiles.tile_of((10, 0), formats, block, d_pad), tiles.Tile)
        with monkeypatch.context() as old_triton:
            old_triton.setattr(tiles, "HAS_GLUON", False)
            assert isinstance(tiles.tile_of((9, 0), formats, block, d_pad), tiles.Tile)


def compiled(*options: str) -> list[dict]:
    """Rows of benchmarks/compile_report.py, run where the interpreter is off."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "compile_report.py"), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"PYTHONPATH": str(ROOT / "src")})
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_counts(row: dict) -> None:
    about = {
        name: row[name] for name in ("kernel", "arch", "precision", "block", "head_dim", "registers", "spilled_bytes")
    }
    assert row["registers"] <= 255
    assert not row["overreaching"], about
    limit = {"sm_80": 163, "sm_89": 99, "sm_90": 227}[row["arch"]] * 1024
    assert row["shared_bytes"] <= limit, about
    if row["arch"] == "sm_90":
        assert row["spilled_bytes"] <= (192 if row["kernel"] == "four_bit_rows" else 64), about
    if row["kernel"] == "sparse" and row["arch"] == "sm_90":
        assert row["shfl"] <= 16 * max(1, row["rows"] // (16 * row["num_warps"])), (
            about
        )  # row reductions, two loop bodies
        assert row["i2f"] <= 1 and row["f2i"] <= 1, about  # one integer division, outside the loop


@pytest.mark.parametrize(
    "options", [("--arch", "80", "89", "90"), ("--arch", "90", "--dtype", "float32")], ids=["bf16", "float32"]
)
def test_kernels_compile_without_a_gpu(options):
    rows = compiled(*options, "--only", "int8/int8", "int8/fp8", "--block", "64x128", "--head-dim", "128")
    for arch in {row["arch"] for row in rows}:
        kernels = {row["kernel"] for row in rows if row["arch"] == arch}
        assert kernels == {"sum", "finish", "rows", "values", "lists", "hopper" if arch == "sm_90" else "sparse"}
    for row in rows:
        check_counts(row)


@pytest.mark.parametrize(("arch", "dim", "attends"), [("80", "64", "sparse"), ("90", "128", "hopper")])
def test_kernels_of_int4_compile_without_a_gpu(arch, dim, attends):
    rows = compiled("--arch", arch, "--only", "int4/int4", "--block", "64x64", "--head-dim", dim)
    prepares = {"sum", "finish", "moments", "factor", "four_bit_rows", "values"}
    assert {row["kernel"] for row in rows} - {"int4"} == prepares | {"lists", attends}
    for row in rows:
        check_counts(row)


def test_kernels_with_64_rows_have_no_more_warps_than_those_allow():
    rows = compiled("--arch", "90", "--only", "bf16/bf16", "--block", "64x64", "--head-dim", "128")
    assert {row["kernel"] for row in rows} == {"gather", "lists", "sparse", "stats", "past_queries", "past_keys"}
    assert all(
        any("HGMMA" in name for name in row["matrix"]) for row in rows if row["kernel"] not in ("gather", "lists")
    )
    for row in rows:
        check_counts(row)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "89", "90"])
def test_every_shipped_configuration_compiles_without_a_gpu(arch):
    rows = compiled("--arch", arch)
    assert sum(row["kernel"] == "sparse" for row in rows) >= 20
    for row in rows:
        check_counts(row)
