"""The operation on the CUDA C++ kernel for Hopper: what chooses it, what it says, and on a GPU what it computes."""

import warnings
from types import SimpleNamespace

import emulation
import pytest
import torch
from test_kernels import sqnr

import paroattn
from paroattn.grid import Grid, TextSpan
from paroattn.kernels import library, native
from paroattn.precision import Precision

pytest.importorskip("triton", reason="Triton is not installed")
from test_triton import DEVICE, LSE_ERROR, Case, pv_of

from paroattn.kernels import sm90, sparse, tiles

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
IS_HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() == library.HOPPER
NEEDED = "a GPU of capability 9.0" if not IS_HOPPER else native.missing()
on_hopper = pytest.mark.skipif(NEEDED is not None, reason=f"needs {NEEDED}")
FORMATS = ("int8/fp8", "int8")
DECIBELS = {"int8/fp8": 35, "int8": 45}
"""P in FP8 is rounded against another maximum than in the reference and in Triton, no more exactly."""
MAIN = {64: (64, 128), 128: (128, 128)}
CHOSEN = sorted(tiles.PIPELINES)


class OnAGpu:
    """Enough of a tensor for `choose`."""

    def __init__(self, channels: int, dtype: torch.dtype = torch.bfloat16):
        self.device, self.dtype, self.shape = torch.device("cuda:0"), dtype, (1, 128, 2, channels)


@pytest.fixture
def choose(monkeypatch):
    """`choose` for a GPU of a capability, with or without `cuda.core`."""
    library._warned.clear()

    def chosen(impl="auto", pv="int8", dim=128, block=None, has=(9, 0), missing=None, **changes) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: has)
        monkeypatch.setattr(native, "missing", lambda: missing)
        mask = SimpleNamespace(block=block or MAIN[tiles.padded(dim)])
        precision = Precision.parse(changes.pop("precision", f"int8/{pv}"))
        return library.choose(impl, OnAGpu(dim, **changes), mask, precision, 0.1, 23)

    return chosen


@pytest.mark.filterwarnings("error")
def test_it_is_chosen_for_what_it_is_faster_at_and_for_nothing_else(choose):
    known = {(pv, dim): choose(pv=pv, dim=dim) for pv in ("fp8", "int8") for dim in (64, 128)}
    assert known == {key: "sm90" if (*key, MAIN[key[1]]) in tiles.PIPELINES else "triton" for key in known}
    assert "sm90" in known.values()
    for pv, dim, block in CHOSEN:
        others = [each for each in tiles.BLOCKS if (pv, dim, each) not in tiles.PIPELINES]
        assert [choose(pv=pv, dim=dim, block=each) for each in others] == ["triton"] * len(others)
        assert choose(pv=pv, dim=dim - 7, block=block) == "sm90"
        assert {choose(pv=pv, dim=dim, block=block, has=has) for has in ((8, 0), (8, 9), (10, 0))} == {"triton"}
        assert choose("triton", pv=pv, dim=dim, block=block) == "triton"
    assert [choose(precision=name) for name in ("int8-qk", "bf16", "int4", "int8/int4")] == ["triton"] * 4


def test_what_is_missing_is_said_once(choose):
    pv, dim, block = CHOSEN[0]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        wanted = {"pv": pv, "dim": dim, "block": block, "missing": "they need cuda.core. pip install it."}
        assert [choose(**wanted) for _ in range(3)] == ["triton"] * 3
    assert [str(warning.message) for warning in said] == [
        "attention runs in Triton on cuda:0, up to a sixth slower than in CUDA C++, because they need cuda.core. "
        "pip install it."
    ]


def test_asked_for_by_name_it_runs_or_says_why_not(choose, monkeypatch):
    assert [choose("sm90", pv=pv, dim=dim, block=(64, 64)) for pv in ("fp8", "int8") for dim in (41, 128)] == [
        "sm90"
    ] * 4
    with pytest.raises(ValueError, match=r"sm90 needs tensors on a GPU, .*int8 for Q·K and int8 or fp8.*; got bf16 on"):
        choose("sm90", precision="bf16")
    with pytest.raises(ValueError, match=r"sm90 needs tensors on a GPU, not float64"):
        choose("sm90", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"sm90 needs tensors on a GPU, .* tensors on cpu"):
        library.choose("sm90", torch.zeros(1, 1, 1, 64), SimpleNamespace(block=(64, 64)), Precision.parse("int8"), 1.0)
    run = library.IMPLEMENTATIONS["sm90"].run
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(RuntimeError, match=r"compute capability 9\.0; got 8\.9 \(Some GPU\)\. Use impl='triton'"):
        run(OnAGpu(64))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(native, "missing", lambda: "kernels need cuda.core.")
    with pytest.raises(RuntimeError, match=r"kernels need cuda.core\. Or use impl='triton'\."):
        run(OnAGpu(64))


@pytest.mark.skipif(emulation.COMPILER is None or DEVICE == "cuda", reason=emulation.REASON)
@pytest.mark.parametrize(("block", "dim"), [((128, 128), 128), ((64, 64), 40)], ids=str)
def test_the_whole_operation_is_the_reference_s_on_the_emulator(block, dim, monkeypatch):
    compiled = []

    def kernel(*about, **macros):
        compiled.append(macros)
        return emulation.kernel(*about, **macros)

    monkeypatch.setattr(native, "kernel", kernel)
    known, case = library.IMPLEMENTATIONS["triton"], Case(TextSpan(23, "prefix"), True, block, dim, grid=Grid(3, 5, 7))

    def run(*args, **kwargs):
        return sparse.sparse_attention(*args, **kwargs, warpgroup_units=True)

    changed = library.Implementation(run, known.needs, known.usable)
    monkeypatch.setitem(library.IMPLEMENTATIONS, "triton", changed)
    out, lse = case.run("int8", softmax_scale=0.2)
    expected, expected_lse = case.run("int8", "reference", softmax_scale=0.2)
    pipeline = tiles.PIPELINES.get(("int8", tiles.padded(dim), block), tiles.PIPELINE_OF[tiles.padded(dim)])
    assert compiled == [sm90.macros(pipeline, block, tiles.padded(dim), "int8", torch.float32)]
    assert sqnr(out[case.real], expected[case.real]) >= 45
    assert (lse - expected_lse).transpose(1, 2)[case.real].abs().max() <= LSE_ERROR[pv_of("int8")]


def gpu_case(block=(128, 128), dim=128, keep=0.3) -> Case:
    return Case(TextSpan(70, "suffix"), True, block, dim, torch.bfloat16, Grid(5, 14, 17), keep)


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dim", [40, 64, 128])
@pytest.mark.parametrize("block", tiles.BLOCKS, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("precision", FORMATS)
def test_every_configuration_is_the_reference_s_and_agrees_with_triton_on_a_gpu(precision, block, dim):
    case, decibels = gpu_case(block, dim), DECIBELS[precision]
    out, lse = case.run(precision, "sm90")
    expected, expected_lse = case.run(precision, "reference")
    assert out.isfinite().all() and out.dtype == torch.bfloat16
    assert sqnr(out[case.real], expected[case.real]) >= decibels
    assert (lse - expected_lse).transpose(1, 2)[case.real].abs().max() <= LSE_ERROR[pv_of(precision)]
    portable, _ = case.run(precision, "triton")
    assert sqnr(out[case.real], portable[case.real]) >= decibels


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("precision", FORMATS)
def test_a_thousand_launches_give_the_same_bits(precision, dim):
    case = gpu_case(MAIN[dim], dim)
    first, first_lse = case.run(precision, "sm90")
    differ = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(1000):
        out, lse = case.run(precision, "sm90")
        differ += (out != first)[case.real].any() | (lse != first_lse).transpose(1, 2)[case.real].any()
    assert differ.item() == 0


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_outputs_of_other_dtypes_are_the_reference_s_on_a_gpu(dtype):
    case = gpu_case(dim=104)
    case.move(dtype)
    out, _ = case.run("int8", "sm90")
    assert out.dtype == dtype and sqnr(out[case.real], case.run("int8", "reference")[0][case.real]) >= 45


@on_hopper
@pytest.mark.gpu
def test_a_cuda_graph_replays_it_on_other_values():
    case = gpu_case()
    case.run("int8", "sm90")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = case.run("int8", "sm90")
    case.q.mul_(0.5)
    case.v.add_(1)
    graph.replay()
    now, now_lse = case.run("int8", "sm90")
    assert torch.equal(out[case.real], now[case.real]) and torch.equal(lse.nan_to_num(), now_lse.nan_to_num())


@on_hopper
@pytest.mark.gpu
def test_heads_of_two_formats_and_a_compiled_caller_agree_with_single_calls():
    case = gpu_case()
    names = ["int8", "int8/fp8", "int8"]
    mixed, _ = case.run(names, "sm90")
    alone = [case.run(name, "sm90")[0] for name in FORMATS]
    for head, name in enumerate(names):
        assert torch.equal(mixed[:, :, head][case.real], alone[FORMATS.index(name)][:, :, head][case.real])

    @torch.compile(fullgraph=True)
    def doubled(q, k, v):
        settings = {"table": case.table, "order": case.order, "text_tokens": case.text_tokens, "impl": "sm90"}
        return 2 * paroattn.attention(q, k, v, case.mask, valid_text=case.valid_text, precision="int8", **settings)

    assert torch.equal(doubled(case.q, case.k, case.v)[case.real], 2 * alone[1][case.real])


@on_hopper
@pytest.mark.gpu
def test_automatically_it_runs_for_what_the_table_names():
    for pv, dim, block in CHOSEN:
        case = gpu_case(block, dim)
        found, _ = case.run(f"int8/{pv}", "auto")
        assert torch.equal(found[case.real], case.run(f"int8/{pv}", "sm90")[0][case.real])
