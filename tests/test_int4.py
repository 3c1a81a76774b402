"""INT4 on matrix units of four bits: the CUDA kernel, emulated on a CPU, against the reference on the same integers."""

import json
import math
import warnings
from types import SimpleNamespace
from typing import Any

import emulation
import pytest
import torch
from test_kernels import sqnr
from torch import Tensor

from paroattn.block_mask import BlockMask, blocks_of
from paroattn.grid import Grid
from paroattn.kernels import four_bits, library, native
from paroattn.precision import Precision

pytest.importorskip("triton", reason="Triton is not installed")
from test_triton import DEVICE, ROOT, Case, compiled, on_the_same_integers

from paroattn.kernels import prepare, sparse, tiles

INT4 = Precision.parse("int4")
LOG2_E = prepare.LOG2_E
emulated = pytest.mark.skipif(emulation.COMPILER is None or DEVICE == "cuda", reason=emulation.REASON)
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(native, "kernel", emulation.kernel)


def packed(x: Tensor) -> Tensor:
    """Two neighbours of the last dimension in a byte."""
    return ((x[..., ::2] & 15) | (x[..., 1::2] << 4)).to(torch.int8)


def unpacked(x: Tensor) -> Tensor:
    x = x.int()
    return torch.stack([((x & 15) ^ 8) - 8, x >> 4], -1).flatten(-2)


def renamed(x: Tensor) -> Tensor:
    """Inside each 32 of the last dimension, 8 g + 2 t + i and 8 t + 2 g + i change places; twice is not at all."""
    places = [8 * g + 2 * t + i for t in range(4) for g in range(4) for i in range(2)]
    return x.unflatten(-1, (-1, 32))[..., places].flatten(-2)


def renamed_keys(x: Tensor) -> Tensor:
    """Inside each 32 of the last dimension, 16 s + 8 g + 2 t + i comes to 8 t + 4 g + 2 i + s."""
    places = [16 * s + 8 * g + 2 * t + i for t in range(4) for g in range(2) for i in range(2) for s in range(2)]
    return x.unflatten(-1, (-1, 32))[..., places].flatten(-2)


def in_words(middles: Tensor) -> Tensor:
    """(…, runs) → (…, 16) bytes: two runs in the first half of every word."""
    pairs = torch.nn.functional.pad(middles.unflatten(-1, (-1, 2)), (0, 2)).flatten(-2)
    return torch.nn.functional.pad(pairs, (0, 16 - pairs.shape[-1])).to(torch.int8)


class Integers:
    """Integers of INT4, whatever they would stand for: K's and V's go far beyond four bits with their middles."""

    def __init__(self, block=(64, 64), dim=64, tokens=(150, 97), heads=3, keep=0.6):
        generator = torch.Generator().manual_seed(1)
        self.block, self.dim, self.heads, self.tokens = block, dim, heads, tokens[0]
        self.d_pad, self.valid = 64 if dim <= 64 else 128, torch.tensor(tokens, dtype=torch.int32)
        rows, columns = (blocks_of(self.tokens, size) for size in block)

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high + 1, (2, heads, *shape), generator=generator, dtype=torch.int32)

        self.q = integers(-8, 7, rows * block[0], self.d_pad)
        self.rest = integers(-8, 7, columns, block[1], self.d_pad)
        self.middle = integers(-119, 119, columns, block[1] // 32, self.d_pad)
        self.v_rest = integers(-8, 7, columns, block[1], self.d_pad)
        self.v_middle = integers(-119, 119, columns, block[1] // 16, self.d_pad)
        self.q_scale = torch.rand(2, heads, rows * block[0], generator=generator) * 1e-3 + 1e-4
        self.k_scale = torch.rand(2, heads, columns, generator=generator) + 0.5
        self.v_scale = torch.rand(2, heads, self.d_pad, generator=generator) + 0.1
        self.shift = torch.randn(2, heads, rows * block[0], generator=generator)
        kept = torch.rand(heads, rows, columns, generator=generator) < keep
        kept[0, 0] = torch.arange(columns) == columns - 1
        kept[..., 0] |= ~kept.any(-1)
        self.mask = BlockMask.from_dense(kept, block)
        self.order = torch.randperm(heads, generator=generator)
        self.table = torch.stack([torch.randperm(self.tokens, generator=generator) for _ in range(heads)]).int()

    @property
    def operands(self) -> prepare.Operands:
        low = (self.middle + 8) % 16 - 8
        halves = torch.stack([low, (self.middle - low) // 16], -2).flatten(-3, -2)
        values = packed(renamed_keys(renamed(self.v_rest).mT))
        values = torch.cat([values, in_words(renamed(self.v_middle).mT)], -1)
        return prepare.Operands(
            packed(self.q), packed(torch.cat([self.rest, halves], -2)), values,
            self.q_scale, self.k_scale, self.v_scale, None, self.shift,
        )  # fmt: skip

    @property
    def v(self) -> Tensor:
        return self.v_rest + self.v_middle.repeat_interleave(16, -2)

    def run(self, dtype: torch.dtype, **changes: Any) -> tuple[Tensor, Tensor]:
        out, lse = sparse.attend(
            self.operands, torch.Size((2, self.tokens, self.heads, self.dim)), dtype,
            **{"table": self.table, "order": self.order, "mask": self.mask, "precision": INT4, "softmax_scale": 1.0,
               "tile": tiles.WARPS[self.d_pad, self.block[1]], "valid": self.valid, "return_lse": True} | changes,
        )  # fmt: skip
        return out, lse

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """P̂ (B, H, N, key blocks, keys), the weight of its blocks (B, H, N, key blocks, 1) and rows' maxima, base 2."""
        k = self.rest + self.middle.repeat_interleave(32, -2)
        products = (self.q[:, :, : self.tokens].double() @ k.flatten(2, 3).double().mT).unflatten(
            -1, (-1, self.block[1])
        )
        scores = products * self.q_scale[:, :, : self.tokens, None, None] * self.k_scale[:, :, None, :, None].double()
        kept = self.mask.dense().repeat_interleave(self.block[0], 1)[:, : self.tokens, :, None]
        key = torch.arange(k.shape[2] * self.block[1]).view(-1, self.block[1])
        scores = scores.masked_fill(~(kept & (key < self.valid[:, None, None, None, None])), -math.inf)
        highest = scores.amax(-1, keepdim=True).clamp_min(-1e300)
        largest = highest.amax(-2, keepdim=True)
        p = four_bits.round_weights((scores - highest).exp2() * 15, self.block[0])
        return p, (highest - largest).exp2(), largest[..., 0, 0]

    def expected(self) -> tuple[Tensor, Tensor]:
        p, weight, largest = self.weights()
        total = (p.sum(-1, keepdim=True) * weight).sum((-2, -1))
        out = ((p * weight).flatten(3) @ self.v.flatten(2, 3).double()) * self.v_scale[:, :, None]
        out = out / total[..., None].clamp_min(1e-30)
        lse = (largest + (total / 15).log2()) / LOG2_E + self.shift[:, :, : self.tokens]
        lse = lse.masked_fill(total == 0, -math.inf)
        position = self.table[self.order].long()
        to_model = position.argsort(-1)[None, :, :, None]
        out = out[..., : self.dim].gather(2, to_model.expand(2, -1, -1, self.dim)).transpose(1, 2)
        return out, lse.gather(2, to_model[..., 0].expand(2, -1, -1))


@emulated
@pytest.mark.parametrize(
    ("block", "dim", "tokens", "dtype"),
    [
        ((64, 64), 64, (150, 97), torch.float32),
        ((64, 128), 120, (300, 250), torch.bfloat16),
        ((128, 64), 36, (200, 128), torch.float16),
        ((128, 128), 128, (150, 1), torch.float32),
    ],
    ids=str,
)
def test_the_kernel_computes_the_reference_on_the_same_integers(on_a_cpu, block, dim, tokens, dtype):
    case = Integers(block, dim, tokens)
    out, lse = case.run(dtype)
    expected, expected_lse = case.expected()
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    empty = expected_lse.isinf()
    assert empty.any() and (lse.isinf() == empty).all()
    assert not out.mT[empty.transpose(1, 2)[:, :, None].expand_as(out.mT)].any()
    assert sqnr(out, expected) >= (47 if dtype == torch.bfloat16 else 51)
    assert (lse - expected_lse)[~empty].abs().max() <= 0.02


@emulated
@pytest.mark.parametrize(("block", "dim"), [((64, 64), 64), ((128, 128), 128)], ids=str)
def test_p_is_rounded_and_its_errors_are_carried_on_as_the_reference_says(on_a_cpu, block, dim):
    """One key block for each row and values that pick one key each: the output is p̂ times what its sum makes of it."""
    case = Integers(block, dim, (block[1], block[1] - 3), heads=2, keep=1.0)
    case.mask = BlockMask.from_dense(torch.ones(2, 1, 1, dtype=torch.bool), block)
    case.v_rest = torch.eye(dim, dtype=torch.int32).expand_as(case.v_rest).clone()
    case.v_middle = torch.zeros_like(case.v_middle)
    case.v_scale = torch.ones_like(case.v_scale)
    out, _ = case.run(torch.float32)
    out = out.transpose(1, 2).gather(2, case.table[case.order].long()[None, :, :, None].expand(2, -1, -1, dim))
    got = out / out.amax(-1, keepdim=True) * 15
    expected = case.weights()[0].flatten(3)
    torch.testing.assert_close(got, got.round(), atol=1e-4, rtol=0)
    off = (got - expected).abs().round()
    assert off.max() <= 1 and off.mean() <= 0.01
    assert (expected == 0).float().mean() < 0.5 and len(expected.unique()) == 16


@emulated
def test_scores_that_lie_far_apart_leave_one_key_to_a_row(on_a_cpu):
    case = Integers()
    case.q_scale *= 1e5
    (out, lse), (expected, expected_lse) = case.run(torch.float32), case.expected()
    empty = expected_lse.isinf()
    assert sqnr(out, expected) >= 100
    torch.testing.assert_close(lse[~empty], expected_lse[~empty].float(), rtol=1e-6, atol=0)


@emulated
def test_blocks_are_added_by_their_weights_and_nothing_is_lost_to_the_bias(on_a_cpu):
    """One key of each block counts, and blocks differ little, by what no power of two says."""
    case = Integers(tokens=(300, 280), keep=1.0)
    case.mask = BlockMask.full(case.heads, case.tokens, case.block)
    case.q, case.middle = torch.full_like(case.q, 7), torch.zeros_like(case.middle)
    case.rest = torch.where(torch.arange(64)[:, None] == 5, 7, -8).expand_as(case.rest).int()
    case.q_scale = torch.full_like(case.q_scale, 10 / (7 * 7 * 64))
    case.k_scale = 1 + torch.rand(case.k_scale.shape, generator=torch.Generator().manual_seed(2)) / 5
    (out, lse), (expected, expected_lse) = case.run(torch.float32), case.expected()
    assert case.weights()[0].sum(-1).unique().tolist() == [15]
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-6, atol=1e-6)


@emulated
def test_lse_is_left_out_where_nobody_asks_for_it(on_a_cpu):
    case = Integers()
    out, lse = case.run(torch.float32, return_lse=False)
    assert lse is None and torch.equal(out, case.run(torch.float32)[0])


def test_packed_operands_hold_the_same_integers(monkeypatch):
    block, dim = (64, 128), 72
    case = Case(block=block, dim=dim, grid=Grid(3, 5, 7))
    for head, order in enumerate(case.order.tolist()):  # runs of keys that lie apart
        run = torch.arange(case.tokens, device=DEVICE) // 32
        apart = 9 * torch.sin(run[:, None] * torch.arange(dim, device=DEVICE))
        case.k[:, case.table[order].long(), head] += apart
        case.v[:, case.table[order].long(), head] += apart
    settings: dict[str, Any] = {"table": case.table, "order": case.order, "valid": case.valid, "block": block}
    settings |= {"precision": INT4, "softmax_scale": 0.3, "with_shift": True}
    find, found = prepare.feedback_of, []
    monkeypatch.setattr(prepare, "feedback_of", lambda *x, **more: found or found.extend(find(*x, **more)) or found)
    plain = prepare.prepare(case.q, case.k, case.v, **settings)
    tight = prepare.prepare(case.q, case.k, case.v, **settings, packed=True)
    keys, d_pad = block[1], plain.q.shape[-1]
    assert torch.equal(unpacked(tight.q), plain.q.int())
    k = unpacked(tight.k)
    rest, halves = k[..., :keys, :], k[..., keys:, :].unflatten(-2, (-1, 2))
    middle = (16 * halves[..., 1, :] + halves[..., 0, :]).repeat_interleave(32, -2)
    real = torch.arange(plain.k.shape[2], device=DEVICE) < case.valid[:, None]
    assert torch.equal((rest + middle).flatten(2, 3) * real[:, None, :, None], plain.k.int())
    assert not rest.flatten(2, 3)[~real[:, None].expand(-1, 3, -1)].any()
    assert middle.abs().max() > 7 and rest.min() == -8 and k.shape[-2] == keys + keys // 16
    stored, words = renamed(tight.v.mT).mT.split([keys // 2, 16], -1)
    back = renamed_keys(torch.arange(32, device=DEVICE)).argsort()
    v = unpacked(stored).unflatten(-1, (-1, 32))[..., back].flatten(-2)  # (B, H, key blocks, D', keys)
    v_middle = words.int().unflatten(-1, (-1, 2, 2))[..., : keys // 32, 0, :].flatten(-2)
    assert torch.equal(in_words(v_middle), words) and v_middle.abs().max() > 7 and v.min() == -8
    v = v + v_middle.repeat_interleave(16, -1)
    places = [16 * h + 8 * g + 2 * t + i for h in range(2) for t in range(4) for g in range(2) for i in range(2)]
    as_int8 = v.unflatten(-1, (-1, 32))[..., places].flatten(-2)
    assert torch.equal(as_int8.transpose(2, 3).flatten(3), plain.v.int())
    assert v.shape[-2:] == (d_pad, keys)
    for name in ("q_scale", "k_scale", "v_scale", "shift"):
        assert torch.equal(getattr(tight, name), getattr(plain, name))


@emulated
def test_from_tensors_to_output_it_is_the_reference_s(on_a_cpu):
    case = Case(block=(128, 64), dim=40, grid=Grid(3, 5, 7))
    out, lse = sparse.sparse_attention(
        case.q, case.k, case.v, table=case.table, order=case.order, mask=case.mask, precision=INT4,
        softmax_scale=40**-0.5, valid_tokens=case.valid, four_bit_units=True,
    )  # fmt: skip
    expected, expected_lse = case.run("int4", "reference")
    assert sqnr(out[case.real], expected[case.real]) >= 45
    assert lse is not None and (lse - expected_lse).transpose(1, 2)[case.real].abs().max() <= 1 / 15


@pytest.mark.gpu
@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
@pytest.mark.parametrize("dim", [64, 120, 128], ids="dim{}".format)
@pytest.mark.parametrize("block", tiles.BLOCKS, ids=str)
def test_the_kernel_is_the_reference_s_on_a_gpu(block, dim):
    case = Case(block=block, dim=dim, dtype=torch.bfloat16)
    out, lse = case.run("int4", "native")
    expected, expected_lse = on_the_same_integers(case, "int4")
    assert sqnr(out[case.real], expected[case.real]) >= 38
    assert (lse - expected_lse).transpose(1, 2)[case.real].abs().max() <= 0.15
    portable, _ = case.run("int4", "triton")
    assert sqnr(out[case.real], portable[case.real]) >= 38


@pytest.mark.gpu
@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
@pytest.mark.parametrize(("block", "dim"), [((64, 64), 64), ((128, 128), 128)], ids=str)
def test_the_gpu_s_integers_are_the_reference_s(block, dim):
    case = Integers(block, dim, (300, 261))
    expected, expected_lse = case.expected()
    for name, value in vars(case).items():
        if isinstance(value, Tensor):
            setattr(case, name, value.cuda())
    case.mask = case.mask.to("cuda")
    out, lse = (x.cpu() for x in case.run(torch.float32))
    empty = expected_lse.isinf()
    assert sqnr(out, expected) >= 48
    assert (lse - expected_lse)[~empty].abs().max() <= 1 / 15


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_the_kernel_compiles_to_products_of_four_bits_without_spills_and_to_less_than_int8(tmp_path, monkeypatch):
    monkeypatch.setenv(native.CACHE_VARIABLE, str(tmp_path))
    options = ("--native", "--only", "int4/int4", "--block", "64x64", "128x128", "--arch")
    rows = compiled(*options, "80", "86", "89")
    recorded = json.loads((ROOT / "benchmarks" / "results" / "compile_report.json").read_text())["rows"]

    def instructions(row: dict) -> float:
        """A query row's share of what the warps issue for a key block."""
        return row["loop"] * row["num_warps"] / row["rows"]

    int8 = {
        (row["arch"], row["block"], row["head_dim"]): instructions(row)
        for row in recorded
        if row["kernel"] == "sparse" and row["precision"] == "int8/int8" and row.get("loop")
    }
    assert len(rows) == 3 * 2 * 2
    for row in rows:
        about = {name: row[name] for name in ("arch", "block", "head_dim")}
        programs = tiles.WARPS[row["head_dim"], int(row["block"].split("x")[1])].programs
        assert row["spilled_bytes"] == 0 and row["registers"] * row["num_warps"] * 32 * programs <= 65536, about
        assert (row["shared_bytes"] + 1024) * programs <= 100 * 1024, about
        assert row["matrix"] == ["IMMA.16816.U8.S8", "IMMA.16864.S4.S4", "IMMA.16864.U4.S4"], about
        assert instructions(row) < int8[tuple(about.values())], about
        assert row["shfl"] <= 2 * 14, about  # middles to their columns, and row maxima, in two loop bodies


class OnAGpu:
    """Enough of a tensor for `choose`."""

    def __init__(self, dtype=torch.bfloat16):
        self.device, self.dtype, self.shape = torch.device("cuda:0"), dtype, (1, 128, 2, 64)


@pytest.fixture
def choose(monkeypatch):
    """`choose` for a GPU of a capability, with or without `cuda.core`."""
    library._warned.clear()

    def chosen(impl="auto", precision="int4", has=(8, 9), missing=None, q=None, text=0) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: has)
        monkeypatch.setattr(native, "missing", lambda: missing)
        mask = SimpleNamespace(block=(64, 64))
        return library.choose(impl, OnAGpu() if q is None else q, mask, Precision.parse(precision), 0.1, text)

    return chosen


@pytest.mark.filterwarnings("error")
def test_int4_runs_on_matrix_units_of_four_bits_where_there_are_some(choose):
    assert [choose(has=has) for has in ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0))] == ["native"] * 3 + ["triton"] * 2
    assert [choose(precision=name) for name in ("int8", "int4-qk", "int8/int4", "bf16")] == ["triton"] * 4
    assert choose("native", has=(9, 0)) == "native"
    assert choose(text=23) == choose(text=23, missing="nothing to be said") == "triton"
    assert choose("triton") == "triton"


def test_what_is_missing_for_four_bits_is_said_once(choose):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert [choose(missing="they need cuda.core. pip install it.") for _ in range(3)] == ["triton"] * 3
    assert [str(warning.message) for warning in said] == [
        "INT4 runs on the 8-bit matrix units of cuda:0, no faster than INT8, because they need cuda.core. "
        "pip install it."
    ]


def test_asked_for_by_name_it_runs_or_says_why_not(choose, monkeypatch):
    with pytest.raises(ValueError, match=r"native needs tensors on a GPU, .*int4 for both.*; got int8 on"):
        choose("native", "int8")
    with pytest.raises(ValueError, match=r"native needs tensors on a GPU, .* tensors on cpu"):
        choose("native", q=torch.zeros(1))
    with pytest.raises(ValueError, match=r"and no text; got int4 on .* with 23 text tokens\."):
        choose("native", text=23)
    monkeypatch.setattr(native, "missing", lambda: "kernels need cuda.core.")
    with pytest.raises(RuntimeError, match=r"kernels need cuda.core\. Or use impl='triton'\."):
        library.IMPLEMENTATIONS["native"].run()
