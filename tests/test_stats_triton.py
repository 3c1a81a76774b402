"""The statistics' Triton kernel against float64: in the interpreter on a CPU, on a GPU, and compiled without one."""

import sys

import pytest
import torch
from test_triton import check_counts, compiled
from torch import Tensor

from paroattn.grid import Grid, Layout, TextSpan

pytest.importorskip("triton", reason="Triton is not installed")
from paroattn.kernels import block_stats as definition
from paroattn.kernels import stats
from paroattn.kernels.block_stats import block_stats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = 2
GRID = Grid(3, 7, 11)
ORDERS = ("WHF", "2x2x4")
VIDEO_ONLY, PREFIX, SUFFIX = TextSpan(), TextSpan(23, "prefix"), TextSpan(70, "suffix")
NAMES = ("mass", "error", "sparse_share", "incoherence", "output_power")
TOLERANCE = {"mass": 0.01, "error": 0.02, "sparse_share": 0.002, "incoherence": 0.02, "output_power": 0.01}
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)  # the interpreter's


class Case:
    """Inputs that differ in every batch element, token, head and channel; values with a mean, as real ones have."""

    def __init__(self, text=VIDEO_ONLY, dim=40, dtype=torch.bfloat16, grid=GRID, batch=1, heads=HEADS):
        generator = torch.Generator().manual_seed(0)
        self.layout = Layout(grid, text)
        shape = (batch, self.layout.tokens, heads, dim)
        levels = torch.linspace(0.5, 2, heads)[:, None] * torch.linspace(0.8, 1.2, dim)
        q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
        self.w_o = torch.randn(heads, dim, 3 * dim, generator=generator).to(DEVICE)
        self.q, self.k, self.v = (x.to(DEVICE, dtype) for x in (q * levels * 1.2, k, v + 3 * levels))

    def run(self, impl: str = "triton", block=(64, 64), **settings):
        tensors = (self.q, self.k, self.v)
        if impl == "torch":
            tensors = tuple(x.double() for x in tensors)
        settings = {"layout": self.layout, "orders": ORDERS, "block": block, "impl": impl} | settings
        return block_stats(*tensors, self.w_o, **settings)


def agree(case: Case, names=NAMES, looser: float = 1, **settings) -> None:
    got, expected = case.run(**settings), case.run("torch", **settings)
    for name in names:
        assert_near(getattr(got, name), getattr(expected, name), name, looser)
    assert got.calls == expected.calls
    assert (got.rows is None) == (expected.rows is None)
    assert got.rows is None or torch.equal(got.rows, expected.rows)


def assert_near(got: Tensor, expected: Tensor, name: str, looser: float = 1) -> None:
    """Within the tolerance wherever a block holds 1e-4 of its head's total."""
    assert got.shape == expected.shape
    assert got.isfinite().all()
    total = expected.sum((-2, -1), keepdim=True) if expected.ndim == 4 else expected
    counted = expected >= 1e-4 * total
    off = ((got - expected).abs() / expected.clamp_min(1e-12))[counted].max()
    assert off <= looser * TOLERANCE[name], f"{name} is off by {off:.2%}"
    assert (got.sum() - expected.sum()).abs() <= looser * 0.01 * expected.sum(), name


@pytest.mark.parametrize(
    ("text", "block", "dim"),
    [
        (VIDEO_ONLY, (64, 64), 40),
        (PREFIX, (128, 64), 64),
        (SUFFIX, (64, 128), 72),
        (PREFIX, (128, 128), 128),
    ],
    ids=["video-64x64", "prefix-128x64", "suffix-64x128", "prefix-128x128"],
)
def test_all_statistics_are_those_of_float64_at_every_block_and_layout(text, block, dim):
    agree(Case(text, dim), block=block)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes_do_as_well(dtype):
    case = Case(PREFIX, dtype=dtype)
    if dtype == torch.float32:  # as the kernel reads them
        case.q, case.k = (x.bfloat16().float() for x in (case.q, case.k))
    agree(case)


def test_float32_is_rounded_to_bfloat16_and_loses_little():
    agree(Case(dtype=torch.float32), looser=3, names=("mass", "error", "output_power"))


def test_batch_elements_are_added_up():
    agree(Case(SUFFIX, batch=2), block=(64, 128))


@pytest.mark.parametrize(("stride", "offset"), [(2, 0), (2, 1), (3, 2)])
def test_a_sample_of_query_blocks_is_measured_whole(stride, offset):
    agree(Case(PREFIX), block_stride=stride, block_offset=offset)


def test_each_head_is_measured_in_its_own_order():
    agree(Case(SUFFIX), order=torch.tensor([1, 0]))
    agree(Case(SUFFIX), order=torch.tensor([1, 0]), block_stride=2, block_offset=1)


def test_a_row_stride_leaves_out_the_same_rows():
    agree(Case(PREFIX), block=(128, 64), row_stride=3, row_offset=2)


def test_the_softmax_scale_is_the_caller_s():
    agree(Case(), softmax_scale=0.05)


def test_slices_of_a_fused_projection_do_as_well():
    case = Case()
    expected = case.run()
    case.q, case.k, case.v = torch.stack([case.q, case.k, case.v], -1).unbind(-1)
    assert case.q.stride(-1) == 3
    got = case.run()
    for name in ("mass", "sparse_share", "incoherence"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    torch.testing.assert_close(got.error, expected.error, rtol=1e-2, atol=0)  # V's mean is summed in another order


@pytest.mark.parametrize("block", [(64, 64), (128, 128)], ids=str)
def test_leaving_out_the_papers_statistics_changes_nothing_else(block):
    case = Case()
    whole, short = (case.run(block=block, paper=paper) for paper in (True, False))
    assert torch.equal(whole.mass, short.mass) and torch.equal(whole.error, short.error)
    assert short.incoherence.abs().sum() == 0 == short.sparse_share.sum()


def test_a_grid_of_one_block_is_enough():
    agree(Case(PREFIX, grid=Grid(2, 3, 5)), block=(128, 128))
    agree(Case(PREFIX, grid=Grid(4, 4, 4)))


def test_a_common_value_costs_no_accuracy():
    """What all tokens share moves no output when a block goes; it must not drown what they do not share."""
    case = Case(dtype=torch.float16)
    case.v += 40
    agree(case, names=("error", "output_power"))


def test_rows_that_one_key_takes_and_very_negative_scores_stay_finite():
    case = Case(PREFIX)
    case.q *= 30
    found = case.run()
    for name in NAMES:
        assert getattr(found, name).isfinite().all(), name
    torch.testing.assert_close(found.mass.sum(-1) <= 1.01, torch.ones_like(found.mass[..., 0], dtype=torch.bool))


def test_pointers_and_descriptors_load_the_same(monkeypatch):
    case, results = Case(PREFIX), []
    for descriptors in (False, True):
        monkeypatch.setattr(stats, "tile_of", lambda *_, d=descriptors: stats.Tile(128, 4, 2, d))
        results.append(case.run(block=(64, 128)))
    for name in NAMES:
        assert torch.equal(*(getattr(result, name) for result in results)), name


def test_a_tile_of_one_query_block_does_as_well(monkeypatch):
    case = Case(PREFIX)
    expected = case.run()
    monkeypatch.setattr(stats, "tile_of", lambda *_: stats.Tile(64, 4, 2))
    found = case.run()
    for name in NAMES:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"dim": 136}, {}, "head dimension of at most 128 .* got 64x64, 136"),
        ({}, {"block": (32, 64)}, "needs blocks of 64x64, .* got 32x64"),
        ({}, {"softmax_scale": 0.0}, "softmax_scale above 0; got .* and 0.0"),
        ({"dtype": torch.float64}, {}, "needs torch.bfloat16, .* got torch.float64"),
    ],
)
def test_what_the_kernel_cannot_do_is_said(change, settings, message):
    with pytest.raises(ValueError, match=message):
        Case(**change).run(**settings)


def test_tensors_on_a_cpu_without_the_interpreter_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = Case()
    case.q, case.k, case.v, case.w_o = (x.cpu() for x in (case.q, case.k, case.v, case.w_o))
    with pytest.raises(ValueError, match=r"needs tensors on a GPU; got cpu\. Use impl='torch'"):
        case.run()


def test_an_old_gpu_is_named(monkeypatch):
    monkeypatch.setattr(stats, "capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    with pytest.raises(RuntimeError, match=r"8\.0 or higher; got Some GPU"):
        Case().run()


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "paroattn.kernels.stats", None)
    with pytest.raises(RuntimeError, match=r"needs Triton .* pip install 'paroattn\[gpu\]'"):
        Case().run()


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_every_gpu_has_a_tile(capability):
    for d_pad in (64, 128):
        for block in stats.BLOCKS:
            tile = stats.tile_of(capability, d_pad, block)
            assert tile.rows % block[0] == 0
            assert not tile.descriptors or capability >= (9, 0)


@pytest.mark.gpu
def test_a_gpu_is_used_where_there_is_one(monkeypatch):
    seen = []
    monkeypatch.setitem(definition.IMPLEMENTATIONS, "triton", lambda *_, **__: seen.append(1) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Case().run("auto")
    assert seen == [1]


@pytest.mark.gpu
@pytest.mark.parametrize("block", stats.BLOCKS, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize(
    ("dim", "dtype"), [(64, torch.bfloat16), (128, torch.bfloat16), (128, torch.float16), (72, torch.float32)], ids=str
)
def test_every_configuration_is_that_of_float64_on_a_gpu(block, dim, dtype):
    case = Case(SUFFIX, dim, dtype, Grid(5, 14, 17))
    if dtype == torch.float32:
        case.q, case.k = (x.bfloat16().float() for x in (case.q, case.k))
    agree(case, block=block)
    agree(case, block=block, order=torch.tensor([1, 0]), block_stride=3, block_offset=1)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [(128, 128), (64, 64)], ids="{0[0]}x{0[1]}".format)
def test_a_video_of_a_real_size_is_that_of_float64_on_a_gpu(block):
    """Every query block in one order per head, compared where float64 measures a sample of them."""
    case = Case(TextSpan(77, "suffix"), 128, torch.bfloat16, Grid(13, 30, 45), heads=3)
    settings = {"orders": ("FHW", "WHF", "16x2x2"), "order": torch.tensor([2, 0, 1]), "block": block}
    whole = case.run(**settings)
    sample = case.run("torch", **settings, block_stride=23, block_offset=5)
    for name in ("mass", "error"):
        assert_near(getattr(whole, name)[:, :, sample.rows], getattr(sample, name), name)
    torch.testing.assert_close(whole.mass.sum(-1).max(), torch.tensor(1.0, device=DEVICE), atol=0.01, rtol=0)


@pytest.mark.parametrize("head_dim", ["64", "128"])
def test_the_kernel_compiles_without_a_gpu(head_dim):
    rows = compiled(
        "--arch", "80", "90", "--stats", "--only", "bf16/bf16", "--block", "64x64", "128x128", "--head-dim", head_dim
    )
    assert {row["kernel"] for row in rows} == {"stats"}
    assert {(row["arch"], row["block"], row["variant"]) for row in rows} == {
        (arch, block, variant)
        for arch in ("sm_80", "sm_90")
        for block in ("64x64", "128x128")
        for variant in ("", "paper")
    }
    for row in rows:
        check_counts(row)
