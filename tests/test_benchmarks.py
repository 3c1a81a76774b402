"""Benchmarks of attention on a GPU: shapes, masks, the gate, rows and tables, all on a CPU."""

import json
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import attention as benchmark
import int4
import paroattn
import peers
import prepare
import readme_tables
import records
import shapes
import tables
import timing
from paroattn.block_mask import BlockMask, blocks_of
from paroattn.capture import BlockStats, CaptureSettings, Statistics
from paroattn.grid import Grid, Layout, TextSpan
from paroattn.plan.plan import Plan
from shapes import SHAPES, Shape

ROOT = Path(__file__).parents[1]
FIELDS = {
    "date", "device", "torch", "triton", "shape", "batch", "heads", "tokens", "head_dim", "impl", "precision", "block",
    "mask", "density", "ms", "useful_tflops", "speedup_vs_cudnn", "includes",
}  # fmt: skip
TINY = Shape("tiny", 3, 64, Grid(3, 7, 19), TextSpan(30, "prefix"))  # 399 + 30 tokens: 3.35 blocks of 128
VIDEO = Shape("video", 6, 64, Grid(5, 16, 27))  # 2160 tokens: 16.9 blocks of 128
PRECISION = "bf16/bf16"
pytestmark = pytest.mark.usefixtures("one_thread")


def by_token(kept, tokens, block):
    """A mask as pairs of tokens, (H, N, N)."""
    rows, columns = (torch.arange(tokens) // size for size in block)
    return kept[:, rows][:, :, columns]


def exact_attention(case):
    """Attention in float64 as a peer: (B, H, N, D)."""
    q, k, v = (x.double() for x in case.heads_first)
    allowed = by_token(case.kept, q.shape[2], shapes.DRAWN)
    scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~allowed, -torch.inf)
    return lambda: (scores.softmax(-1) @ v).bfloat16()


@pytest.fixture
def exact_peers(monkeypatch):
    """The baseline and a sparse peer "sound", both exact and fast on a CPU."""
    monkeypatch.setitem(benchmark.PEERS, "cudnn", peers.Peer(exact_attention, PRECISION))
    monkeypatch.setitem(benchmark.PEERS, "sound", peers.Peer(exact_attention, PRECISION, "128x128"))


def measured(*impls, densities=(1.0, 0.8), shape=TINY, **settings):
    choice = benchmark.Choice(impls=impls, densities=densities, **settings)
    return benchmark.measure(shape, choice, rounds=1, device="cpu")


# Shapes and masks


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("cogvideox-5b", (1, 17776, 48, 64)),
        ("wan-14b-480p", (1, 32760, 40, 128)),
        ("wan-14b-720p", (1, 75600, 40, 128)),
        ("hunyuanvideo-720p", (1, 119056, 24, 128)),
        ("flux-1024", (1, 4608, 24, 128)),
    ],
)
def test_grids_and_text_add_up_to_the_models_sequences(name, size):
    assert SHAPES[name].size == size
    assert set(SHAPES) == {"cogvideox-5b", "wan-14b-480p", "wan-14b-720p", "hunyuanvideo-720p", "flux-1024"}


def test_heads_read_in_all_orders_in_turn():
    table, order = TINY.orders("cpu")
    assert table.shape == (6, TINY.tokens)
    assert order.tolist() == [0, 1, 2]


def test_tensors_have_heads_of_different_strength_and_a_mean_in_k():
    q, k, v = shapes.tensors(VIDEO, "cpu")
    for x in (q, k, v):
        assert x.shape == VIDEO.size
        assert x.dtype == torch.bfloat16
    assert 1.6 < q[..., -1, :].float().std() / q[..., 0, :].float().std() < 2.4
    assert k.float().mean(1).std() > 1.5
    assert not torch.equal(q, k)


@pytest.mark.parametrize("shape", [TINY, VIDEO], ids=lambda shape: shape.name)
@pytest.mark.parametrize("block", [(128, 128), (64, 128), (128, 64), (64, 64)], ids=str)
def test_smaller_blocks_keep_exactly_the_same_tokens(shape, block):
    kept = shapes.draw(shape, 0.7)
    mask = shapes.block_mask(kept, shape.tokens, block)
    assert (mask.query_blocks, mask.key_blocks) == tuple(blocks_of(shape.tokens, size) for size in block)
    wanted = by_token(kept, shape.tokens, shapes.DRAWN)
    assert torch.equal(by_token(mask.dense(), shape.tokens, block), wanted)
    assert shapes.kept_pairs(kept, shape.tokens) == wanted.sum().item()


def test_blocks_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="must divide 128×128; got 96×64"):
        shapes.divided(shapes.draw(TINY, 1.0), TINY.tokens, (96, 64))


@pytest.mark.parametrize("density", [0.9, 0.5, 0.3, 0.2, 0.1])
@pytest.mark.parametrize("name", ["wan-14b-480p", "cogvideox-5b"])
def test_uneven_heads_reach_from_0_05_to_1_with_the_asked_mean(name, density):
    densities = shapes.head_densities(SHAPES[name], density, "uneven")
    assert densities.mean().item() == pytest.approx(density, abs=1e-6)
    assert (densities.min().item(), densities.max().item()) == pytest.approx((0.05, 1.0), abs=1e-6)
    assert not torch.equal(densities, densities.sort().values)


@pytest.mark.parametrize("kind", ["even", "uneven"])
@pytest.mark.parametrize("density", [0.5, 0.25])
def test_masks_have_the_asked_density_and_differ_between_heads(kind, density):
    kept = shapes.draw(VIDEO, density, kind)
    each = kept.double().mean((1, 2))
    assert each.mean().item() == pytest.approx(density, abs=0.003)
    assert each.std().item() < 0.002 if kind == "even" else each.std().item() > 0.2
    assert not torch.equal(kept[0], kept[1])
    assert kept.any(-1).all()


def test_text_is_dense_and_counts_towards_the_density():
    shape = Shape("text", 2, 64, Grid(5, 16, 27), TextSpan(200, "suffix"))
    kept = shapes.draw(shape, 0.4)
    assert shapes.text_blocks(shape, 128) == 16
    assert kept[:, 16:].all()
    assert kept[:, :, 16:].all()
    assert not kept[:, :16, :16].all()
    assert kept.double().mean().item() == pytest.approx(0.4, abs=0.003)


@pytest.mark.parametrize("density", [0.2, 1.5])
def test_a_density_that_text_does_not_leave_is_refused(density):
    shape = SHAPES["flux-1024"]
    with pytest.raises(ValueError, match=rf"must be 0\.235…1\.000 for even heads.*got {density}"):
        shapes.draw(shape, density)
    assert shapes.draw(shape, 0.3).double().mean().item() == pytest.approx(0.3, abs=1e-3)


def test_few_heads_cannot_be_uneven_at_every_mean():
    least, most = shapes.reachable(VIDEO, "uneven")
    assert least == pytest.approx(1 / 17 + 16 / 17 / 6)
    for density in (least - 0.01, most + 0.01):
        with pytest.raises(ValueError, match="for uneven heads"):
            shapes.head_densities(VIDEO, density, "uneven")
    assert shapes.head_densities(VIDEO, least, "uneven").sort().values.tolist() == pytest.approx([1 / 17] * 5 + [1.0])


def test_uneven_heads_keep_text_too():
    assert shapes.head_densities(SHAPES["flux-1024"], 0.5, "uneven").min().item() == pytest.approx(0.2346, abs=1e-4)


# The gate


@pytest.mark.parametrize("shape", [*SHAPES.values(), TINY], ids=lambda shape: shape.name)
def test_samples_are_64_blocks_over_all_heads_both_ends_and_text(shape):
    samples = benchmark.samples(shape)
    assert len(samples) >= 64
    assert {head for _, head, _ in samples} == set(range(shape.heads))
    blocks = {block for *_, block in samples}
    last = blocks_of(shape.tokens, 128) - 1
    assert {0, last, min(shapes.text_blocks(shape, 128), last)} <= blocks
    assert blocks <= set(range(last + 1))


def test_what_is_exact_agrees_with_a_softmax_under_the_token_mask():
    inputs = benchmark.Inputs(TINY, "cpu")
    kept = inputs.kept("even", 0.8)
    out = exact_attention(peers.Case(inputs.model, inputs.heads_first, kept))()
    for _, head, block in inputs.samples:
        q, k, v = (x[0, head] for x in inputs.heads_first)
        right = benchmark.exact(q, k, v, kept[head, block], block)
        rows = out[0, head, block * 128 : (block + 1) * 128].double()
        assert (rows - right).norm() / right.norm() < 3e-3


def drop_a_block(case):
    kept = case.kept.clone()
    kept[2, 1] = kept[2, 1] & (torch.arange(kept.shape[-1]) != kept[2, 1].nonzero()[0])
    return exact_attention(peers.Case(case.model, case.heads_first, kept))


def swap_heads(case):
    call = exact_attention(case)
    return lambda: call()[:, [1, 0, 2]]


def spoil(value, head, row):
    def wrong(case):
        out = exact_attention(case)()
        out[0, head, row] = value
        return lambda: out

    return wrong


@pytest.mark.parametrize(
    "wrong",
    [drop_a_block, swap_heads, spoil(0, 0, -1), spoil(float("nan"), 1, 200), spoil(float("inf"), 2, 399)],
    ids=["dropped block", "swapped heads", "last row 0", "NaN", "infinity in text"],
)
def test_a_wrong_kernel_is_not_timed(exact_peers, monkeypatch, wrong):
    monkeypatch.setitem(benchmark.PEERS, "wrong", peers.Peer(wrong, PRECISION, "128x128"))
    rows = {row["impl"]: row for row in measured("sound", "wrong", densities=(0.8,))}
    assert rows["sound"]["ms"] > 0
    assert rows["wrong"]["ms"] is None
    assert "off from float64" in rows["wrong"]["reason"]


def test_an_own_kernel_that_ignores_the_order_is_not_timed(exact_peers, monkeypatch):
    def unordered(q, k, v, mask, *, table, order, precision, impl):
        return exact_attention(peers.Case((q, k, v), tuple(x.transpose(1, 2) for x in (q, k, v)), kept))().transpose(
            1, 2
        )

    kept = shapes.draw(TINY, 0.8)
    monkeypatch.setattr(benchmark, "attention", unordered)
    monkeypatch.setattr(benchmark, "own_kernel", benchmark.own_call)
    rows = measured("paroattn", densities=(0.8,), precisions=("int8/int8",), blocks=("64x128",), masks=("even",))
    assert [row["ms"] is None for row in rows if row["impl"] == "paroattn"] == [True, True]


def test_our_kernels_pass_the_gate(exact_peers, monkeypatch):
    shape = Shape("small", 2, 64, Grid(2, 5, 14), TextSpan(20, "suffix"))
    monkeypatch.setattr(benchmark, "SAMPLES", 6)
    monkeypatch.setattr(benchmark, "medians", lambda calls, rounds: {job: 1.0 for job in calls})
    settings = {"densities": (1.0,), "precisions": ("int8/int8",), "blocks": ("64x128",), "masks": ("even",)}
    rows = measured("paroattn", shape=shape, **settings)
    ours = [row for row in rows if row["impl"] == "paroattn"]
    assert [row["includes"] for row in ours] == ["call", "kernel"]
    for row in ours:
        assert row["ms"] > 0, row
        assert set(row) == FIELDS


# Rows


def test_rows_have_all_fields_and_honest_numbers(exact_peers):
    rows = measured("sound")
    assert [(row["impl"], row["density"], row["block"]) for row in rows] == [
        ("cudnn", 1.0, None), ("sound", 1.0, "128x128"), ("sound", 0.8, "128x128"),
    ]  # fmt: skip
    baseline, _, sparse = rows
    for row in rows:
        assert set(row) == FIELDS
        assert (row["shape"], row["batch"], row["tokens"], row["heads"], row["head_dim"]) == ("tiny", 1, 429, 3, 64)
        assert (row["mask"], row["includes"], row["precision"]) == ("even", "call", PRECISION)
    assert baseline["speedup_vs_cudnn"] == 1
    assert sparse["speedup_vs_cudnn"] == pytest.approx(baseline["ms"] / sparse["ms"], rel=2e-3)
    pairs = by_token(shapes.draw(TINY, 0.8), TINY.tokens, shapes.DRAWN).sum().item()
    assert sparse["useful_tflops"] == pytest.approx(4 * 64 * pairs / sparse["ms"] / 1e9, rel=2e-3)
    json.dumps(rows, allow_nan=False)


def test_what_cannot_run_gives_a_row_that_says_why(exact_peers, monkeypatch):
    def broken(case):
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setitem(benchmark.PEERS, "broken", peers.Peer(broken, PRECISION))
    monkeypatch.setattr(peers, "import_module", missing)
    rows = {row["impl"]: row for row in measured("sage2", "broken", "sound", densities=(0.3,))}
    assert rows["sage2"]["reason"] == "sageattention cannot be imported: No module named 'sageattention'"
    assert rows["broken"]["reason"] == "RuntimeError: no kernel image"
    assert "text and the diagonal" in rows["sound"]["reason"]
    for name in ("sage2", "broken", "sound"):
        assert set(rows[name]) == FIELDS | {"reason"}
        assert all(rows[name][number] is None for number in ("ms", "useful_tflops", "speedup_vs_cudnn"))


def missing(name):
    raise ImportError(f"No module named {name!r}")


# Peers in FP8


class Port:
    """A tensor of a graph, which knows how to find its values in a buffer."""

    def __init__(self, **fields):
        self.fields = fields

    def __getattr__(self, name):
        return lambda value: self.fields.update({name.removeprefix("set_"): value}) or self

    def of(self, buffer):
        assert buffer.dtype == self.fields["data_type"]
        return buffer.as_strided(self.fields["dim"], self.fields["stride"])


class Graph:
    """What cuDNN's `pygraph` computes with FP8 operands, in float64 but for its roundings to FP8."""

    def __init__(self, **types):
        self.built = False

    def tensor(self, **fields):
        return Port(**fields)

    def sdpa_fp8(self, generate_stats, attn_scale, **operands):
        assert not generate_stats
        self.operands, self.attn_scale = operands, attn_scale
        self.out, self.largest = Port(), (Port(), Port())
        return [self.out, None, *self.largest]

    def build(self, modes):
        self.built = modes

    def get_workspace_size(self):
        return 7

    def execute(self, buffers, workspace):
        assert self.built
        assert workspace.numel() == 7
        x = {name: port.of(buffers[port]).double() for name, port in self.operands.items()}
        scores = x["q"] * x["descale_q"] @ (x["k"] * x["descale_k"]).mT * self.attn_scale
        numerators = (scores - scores.amax(-1, keepdim=True)).exp()
        rounded = (numerators * x["scale_s"]).to(peers.FP8).double() * x["descale_s"]
        out = rounded @ (x["v"] * x["descale_v"]) / numerators.sum(-1, keepdim=True)
        self.out.of(buffers[self.out]).copy_(out * x["scale_o"])
        for port, each in zip(self.largest, (numerators, out), strict=True):
            port.of(buffers[port]).fill_(each.abs().max())


CUDNN = SimpleNamespace(
    data_type=SimpleNamespace(FP8_E4M3=peers.FP8, FLOAT=torch.float32), heur_mode=SimpleNamespace(A="A"), pygraph=Graph
)


def flash_attn_func(q, k, v, q_descale, k_descale, v_descale):
    """FlashAttention 3 with FP8 operands (B, N, H, D), a scale for each batch element and head, in float64."""
    q, k, v = (
        x.transpose(1, 2).double() * scale[..., None, None]
        for x, scale in ((q, q_descale), (k, k_descale), (v, v_descale))
        if x.dtype == peers.FP8
    )
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2).bfloat16()


@pytest.fixture
def fp8_packages(monkeypatch):
    modules = {"cudnn": CUDNN, "flash_attn_interface": SimpleNamespace(flash_attn_func=flash_attn_func)}
    monkeypatch.setattr(peers, "import_module", modules.__getitem__)
    monkeypatch.setattr(peers, "compiled", lambda function: function)


@pytest.mark.parametrize(("name", "rounded"), [("cudnn-fp8", 0.02), ("flash3-fp8", 0.002)])
def test_peers_in_fp8_are_right_to_their_rounding(fp8_packages, name, rounded):
    shape = Shape("two", 3, 64, TINY.grid, TINY.text, batch=2)
    inputs = benchmark.Inputs(shape, "cpu")
    model = tuple(x * scale for x, scale in zip(inputs.model, (0.3, 3.0, 50.0), strict=True))
    case = peers.Case(model, tuple(benchmark.heads_first(x) for x in model), inputs.kept("even", 1.0))
    out = peers.PEERS[name].call(case)()
    assert (out.shape, out.dtype) == ((2, 3, shape.tokens, 64), torch.bfloat16)
    codes, scales = peers.in_fp8(*case.heads_first)
    q, k, v = (each.double() * scale for each, scale in zip(codes, scales, strict=True))
    right = (q @ k.mT / 8).softmax(-1) @ v
    assert rounded / 4 < (out.double() - right).norm() / right.norm() < 2 * rounded
    bf16 = exact_attention(case)().double()
    assert 0.02 < (out.double() - bf16).norm() / bf16.norm() < 0.15


def test_fp8_uses_its_whole_range_and_gives_values_back():
    tensors = [torch.linspace(-at, at / 2, 1000).bfloat16().reshape(2, 5, 100) for at in (1e-3, 1.0, 3e4)]
    codes, scales = peers.in_fp8(*tensors)
    for x, code, scale in zip(tensors, codes, scales, strict=True):
        assert (code.dtype, code.shape, scale.dtype, scale.shape) == (peers.FP8, x.shape, torch.float32, ())
        assert code.float().abs().max() == 448
        back = peers.out_of_fp8(code, scale, torch.bfloat16)
        assert back.dtype == torch.bfloat16
        assert (back.float() - x.float()).norm() / x.float().norm() < 0.04


@pytest.mark.parametrize(
    ("name", "module", "remark"),
    [
        ("cudnn-fp8", "cudnn", "the package is nvidia-cudnn-frontend"),
        ("flash3-fp8", "flash_attn_interface", "no wheel of it is published"),
    ],
)
def test_peers_in_fp8_that_are_not_installed_say_so(exact_peers, monkeypatch, name, module, remark):
    monkeypatch.setattr(peers, "import_module", missing)
    (row,) = (row for row in measured(name) if row["impl"] == name)
    assert (row["precision"], row["block"], row["density"], row["ms"]) == ("fp8/fp8", None, 1.0, None)
    assert row["reason"] == f"{module} cannot be imported: No module named {module!r}; {remark}"


@pytest.mark.parametrize(("noise", "timed"), [(0.15, True), (0.3, False)])
def test_what_multiplies_q_and_k_in_fp8_may_be_further_off(exact_peers, monkeypatch, noise, timed):
    def noisy(case):
        out = exact_attention(case)()
        wrong = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        off = out + noise * out.double().square().mean(-1, keepdim=True).sqrt() * wrong
        return lambda: off

    for precision in ("fp8/fp8", "int8/fp8"):
        monkeypatch.setitem(benchmark.PEERS, precision, peers.Peer(noisy, precision))
    rows = {row["impl"]: row for row in measured("fp8/fp8", "int8/fp8")}
    assert (rows["fp8/fp8"]["ms"] is not None) == timed
    assert "at most 0.06 is allowed" in rows["int8/fp8"]["reason"]


def test_jobs_cover_the_full_table():
    jobs = list(benchmark.jobs(SHAPES["wan-14b-480p"], benchmark.Choice()))
    keys = [tuple(job.about.values()) for job in jobs]
    assert len(keys) == len(set(keys))
    assert jobs[0].impl == "cudnn"
    ours, in_cuda = (
        {(job.precision, job.block, job.mask, job.density) for job in jobs if job.impl == impl}
        for impl in ("paroattn", "paroattn-sm90")
    )
    assert ours == in_cuda
    for precision in ("int8/fp8", "int8/int8"):
        assert {(precision, "128x128", "even", density) for density in (1.0, 0.5, 0.3, 0.2, 0.1)} <= ours
        assert {(precision, "128x128", "uneven", density) for density in (0.5, 0.3, 0.2, 0.1)} <= ours
    assert ("int8/fp8", "64x64", "even", 0.2) in ours
    assert {job.impl for job in jobs} == {"paroattn", "paroattn-sm90", *peers.PEERS}
    assert {job.density for job in jobs if job.impl in ("flex", "sparge", "paro-authors")} == {1.0, 0.5, 0.3, 0.2, 0.1}


def test_rows_are_merged_by_key_and_a_null_never_replaces_a_time(tmp_path, exact_peers):
    path = tmp_path / "result.json"
    rows = measured("sound", "flash3")
    benchmark.save(path, rows)
    later = [row | {"ms": 7.0, "speedup_vs_cudnn": 2.0} for row in rows if row["impl"] == "flash3"]
    later += [row | {"ms": None, "reason": "gone"} for row in rows if row["impl"] == "sound"]
    later += [row | {"device": "another"} for row in rows if row["impl"] == "cudnn"] * 2
    benchmark.save(path, later)
    merged = json.loads(path.read_text())["rows"]
    assert len(merged) == len(rows) + 1
    assert {row["ms"] for row in merged if row["impl"] == "flash3"} == {7.0}
    assert all(row["ms"] for row in merged if row["impl"] == "sound")


# Time


def test_slow_calls_take_part_in_fewer_rounds_and_rounds_have_another_order(monkeypatch):
    played = []
    monkeypatch.setattr(timing, "_timed", lambda call: (played.append(call()), call())[1])
    monkeypatch.setattr(timing, "_elapsed", list)
    calls = {"slow": lambda: 100.0, "fast": lambda: 10.0, "short": lambda: 1.0}
    times = timing.gpu_milliseconds(calls, rounds=12, enough=50.0)
    assert {name: len(each) for name, each in times.items()} == {"slow": 3, "fast": 5, "short": 12}
    assert [sorted(played[at : at + 3]) for at in (0, 3, 6)] == [[1.0, 10.0, 100.0]] * 3
    assert len({tuple(played[at : at + 3]) for at in (0, 3, 6)}) > 1
    assert timing.gpu_medians({"one": lambda: 4.0}, rounds=3) == {"one": 4.0}


def test_short_calls_follow_one_another_until_a_load_has_lasted(monkeypatch):
    now, played = [0.0], []
    seconds = {"short": 0.1, "middle": 0.3, "long": 2.0}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(name):
        played.append(name)
        now[0] += seconds[name] * (1.5 if played[-2:-1] == [name] else 1)  # a slower clock once the GPU is busy

    found = timing.lasting_medians({name: partial(call, name) for name in seconds}, rounds=3, least=700.0)
    assert Counter(played) == {"short": 1 + 3 * 7, "middle": 1 + 3 * 2, "long": 1 + 3}
    assert found == pytest.approx({"short": (100 + 6 * 150) / 7, "middle": (300 + 450) / 2, "long": 2000})


def test_preparing_is_held_against_the_bytes_that_it_must_move(monkeypatch):
    shape = Shape("tiny", 2, 64, Grid(2, 5, 14))
    monkeypatch.setattr(prepare, "checked", lambda inputs, job: lambda: None)
    row = prepare.measure(shape, "int8/int8", 1.0, rounds=1, device="cpu")
    read = 3 * 2 * 140 * 64 * 2  # q, k, v in bf16
    blocks = blocks_of(140, 64) * 64, blocks_of(140, 128) * 128
    stored = 2 * 64 * (blocks[0] + 2 * blocks[1])  # in 8 bits, whole blocks
    assert read + stored < row["bytes"] < 1.1 * (read + stored)  # and scales
    assert row["over_bound"] == pytest.approx(row["ms"] / row["bound_ms"], rel=2e-3)
    assert row["bound_ms"] == pytest.approx(row["bytes"] / row["copy_tb_per_s"] / 1e9, rel=2e-3)
    assert row["share_of_call"] == pytest.approx(row["ms"] / row["call_ms"], rel=2e-3)
    assert set(prepare.KEY) <= set(row)


# Command line and tables


@pytest.mark.parametrize("script", ["attention.py", "prepare.py"])
def test_scripts_say_what_they_do(script):
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT / "src")})
    assert "--shape" in said.stdout
    assert "--out" in said.stdout


def test_the_command_writes_rows_and_fails_if_ours_is_wrong(tmp_path, monkeypatch, exact_peers, capsys):
    monkeypatch.setitem(benchmark.SHAPES, "tiny", TINY)
    monkeypatch.setattr(benchmark, "attention", lambda q, *rest, **settings: torch.zeros_like(q))
    monkeypatch.setattr(benchmark, "own_kernel", benchmark.own_call)
    out = tmp_path / "attention.json"
    common = ["--shape", "tiny", "--device", "cpu", "--rounds", "1", "--densities", "0.8", "--out", str(out)]
    assert benchmark.main([*common, "--impls", "cudnn"]) == 0
    assert benchmark.main([*common, "--impls", "paroattn", "--blocks", "64x128", "--masks", "even"]) == 1
    assert {row["impl"] for row in json.loads(out.read_text())["rows"]} == {"cudnn", "paroattn"}
    assert "off from float64" in capsys.readouterr().out


def result(**fields):
    names = {"device": "NVIDIA H200", "torch": "2.11.0", "date": "2026-01-01", "shape": "wan-14b-480p"}
    row = names | {"impl": "paroattn", "precision": "int8/fp8", "block": "128x128", "mask": "even", "density": 0.2}
    return row | {"includes": "call", "ms": 6.25, "useful_tflops": 700.4, "speedup_vs_cudnn": 5.5} | fields


def test_tables_show_times_by_density_and_why_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr("result_tables.RESULTS", tmp_path)
    empty = {tables.attention_gpu(), tables.attention_gpu_short(), tables.kernels_gpu(), tables.prepare_gpu()}
    assert empty == {"Not measured yet.\n"}
    rows = [
        result(impl="cudnn", precision="bf16/bf16", block=None, density=1.0, ms=34.32, speedup_vs_cudnn=1.0),
        result(),
        result(includes="kernel", mask="uneven"),
        result(impl="flash3", density=1.0, ms=None, useful_tflops=None, speedup_vs_cudnn=None, reason="no wheel"),
        result(impl="sparge", density=1.0, ms=None, useful_tflops=None, speedup_vs_cudnn=None, reason="too long"),
        result(impl="sparge", speedup_vs_cudnn=None),
    ]
    records.merge(tmp_path / "attention_h200.json", rows, benchmark.KEY)
    text = tables.attention_gpu()
    assert "| wan-14b-480p, cudnn, bf16/bf16 | 34.3 ms, 1.00× | – |" in text
    assert "| wan-14b-480p, paroattn, int8/fp8, 128x128 | – | 6.25 ms, 5.50× |" in text
    assert "| wan-14b-480p, sparge, int8/fp8, 128x128 | – | 6.25 ms |" in text
    assert "Not measured: flash3, no wheel." in text
    assert "too long" not in text
    assert "NVIDIA H200, PyTorch 2.11.0, 2026-01-01." in text
    assert "| wan-14b-480p, int8/fp8, 128x128, uneven | 700 |" in tables.kernels_gpu()
    assert "| against dense bf16 of cuDNN | paroattn, density 0.2 |\n" in tables.attention_gpu_short()
    dense = {"precision": "fp8/fp8", "block": None, "density": 1.0, "ms": 20.0, "speedup_vs_cudnn": 1.72}
    records.merge(tmp_path / "attention_h200.json", [result(impl="flash3-fp8", **dense)], benchmark.KEY)
    assert "| wan-14b-480p, flash3-fp8, fp8/fp8 | 20 ms, 1.72× | – |" in tables.attention_gpu()
    short = tables.attention_gpu_short()
    assert "| against dense bf16 of cuDNN | paroattn, density 0.2 | flash3-fp8, density 1 |\n" in short
    assert "| wan-14b-480p | 5.50× | 1.72× |" in short


def test_ours_is_the_best_of_our_kernels_and_lines_of_a_shape_stand_together(tmp_path, monkeypatch):
    monkeypatch.setattr("result_tables.RESULTS", tmp_path)
    rows = [result(), result(shape="cogvideox-5b"), result(impl="paroattn-sm90", ms=5.0, speedup_vs_cudnn=6.88)]
    records.merge(tmp_path / "attention_h200.json", rows, benchmark.KEY)
    assert "| wan-14b-480p | 6.88× |" in tables.attention_gpu_short()
    lines = [line for line in tables.attention_gpu().splitlines() if "int8/fp8" in line]
    assert [line.split(",")[:2] for line in lines] == [
        ["| wan-14b-480p", " paroattn"], ["| wan-14b-480p", " paroattn-sm90"], ["| cogvideox-5b", " paroattn"],
    ]  # fmt: skip


def test_the_headline_says_what_the_tables_below_it_say():
    text = " ".join(readme_tables.headline().split())
    fast = re.search(
        r"runs (\S+)× as fast as cuDNN's at density 0.3 and \*\*(\S+)×\*\* at 0.2, against (\S+)× for SpargeAttn", text
    )
    lines = tables.attention_gpu_short().splitlines()
    (line,) = [line for line in lines if line.startswith("| wan-14b-720p ")]
    head, cells = ([cell.strip(" ×") for cell in row.split("|")[2:-1]] for row in (lines[0], line))
    named = dict(zip(head, cells, strict=True))
    wanted = [named[each] for each in ("paroattn, density 0.3", "paroattn, density 0.2", "sparge, density 0.2")]
    assert fast and list(map(float, fast.groups())) == [pytest.approx(float(cell), abs=0.06) for cell in wanted]
    whole = [line.split("|") for line in tables.forwards().splitlines() if line.startswith("| wan-14b-720p")]
    ours = re.search(r"\*\*(\S+)×\*\* as fast, (\S+)× with FP8 linears", text)
    faster = [float(cells[4].strip(" ×")) for cells in whole]
    assert ours and list(map(float, ours.groups())) == [pytest.approx(each, abs=0.06) for each in faster]
    close = re.search(r"\*\*(\S+) dB\*\* against dense, (\S+) dB before refining", text)
    short = [
        line.split("|")[3].split(",")[0].strip() for line in tables.fidelity_short().splitlines() if "paroattn" in line
    ]
    assert close and list(close.groups()) == short[:2]


def test_there_is_no_headline_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("result_tables.RESULTS", tmp_path)
    assert readme_tables.headline() == tables.attention_short() == tables.attention_gpu_short() == tables.NOTHING


def test_every_ingredient_of_int4_changes_what_the_reference_computes():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 150, 2, 64, generator=generator) for _ in range(3))
    mask, outputs = BlockMask.full(2, 150, (64, 64)), {}
    expected = paroattn.attention(q, k, v, mask, precision="fp32", impl="reference")
    variants = [each for each in int4.variants() if each.density == 1 and each.heads is None]
    for variant in variants:
        with int4.replaced(variant.patches):
            out = paroattn.attention(q, k, v, mask, precision=int4.PRECISIONS[variant.what], impl="reference")
        assert isinstance(out, torch.Tensor) and isinstance(expected, torch.Tensor)
        error = ((out - expected).norm() / expected.norm()).item()
        assert 0.01 < error < 1.5, variant
        outputs[variant.what, variant.ingredients] = error
    assert len(set(outputs.values())) == len(variants) == 15
    assert {each.what for each in int4.variants() if each.density == 0.5} == {"0.5", "0.5+qk", "0.5+pv", "0.5+qk+pv"}


def test_a_mixture_has_the_heads_that_the_planner_picks_and_its_row_says_how_many(monkeypatch):
    """Statistics in which a head's rounding costs the more the later it comes; only some layers are there."""
    layout, heads, blocks = Layout(Grid(16, 13, 18)), 6, 59
    flat = torch.rand(1, heads, blocks, blocks, generator=torch.Generator().manual_seed(0))
    names = list(Plan.from_pretrained(int4.PLAN)["transformer"].layers)

    def sums(row: int) -> BlockStats:
        cost = torch.tensor([[0.1], [1.0]]) * (1 + row * heads + torch.arange(heads))
        return BlockStats(flat, flat, flat[..., 0, 0], flat[..., 0, 0], torch.tensor(1.0), 1, rounding=cost)

    layers = {name: {0.5: sums(row)} for row, name in enumerate(names)}
    settings = CaptureSettings(orders=("FHW",), paper=False)
    plans = int4.Plans(SimpleNamespace(), 1)  # pyright: ignore[reportArgumentType]
    vars(plans)["statistics"] = Statistics("WanTransformer3DModel", heads, 64, layout, settings, layers)
    variants = [each for each in int4.variants() if each.heads]
    assert [(each.what, each.share, each.heads) for each in variants] == [
        *(("qk+pv", share, int4.LEAST) for share in (0.0, 0.25, 0.5, 0.75)),
        ("qk+pv", 0.5, int4.MOST), ("0.5+qk+pv", 0.5, int4.LEAST),
    ]  # fmt: skip
    for variant in variants:
        plan, asked = plans.of(variant), []
        bench = SimpleNamespace(
            impl="reference", row=lambda plan, precision, asked=asked: asked.append(precision) or ROW
        )
        row = int4.measured(bench, variant, plan)  # pyright: ignore[reportArgumentType]
        count = round(variant.share * heads * len(names))
        assert asked == [None] and row["heads_int4"] == pytest.approx(count / (heads * len(names)), abs=1e-4)
        chosen = [name == "int4" for layer in plan.layers.values() for name in layer.precision[0]]
        first = sum(chosen[:count]) if variant.heads == int4.LEAST else sum(chosen[-count:])
        assert sum(chosen) == first == count
        assert plan.density == pytest.approx(variant.density, abs=1e-3)
    assert plans.of(next(int4.variants())) is plans.dense


ROW = {"density_executed": 1.0, "psnr_mean": 1.0, "psnr_std": 1.0, "psnr_min": 1.0, "clips": 1, "steps": 1}


def test_the_table_of_int4_tells_its_rows_apart(monkeypatch):
    about = {"date": "2026-11-22", "device": "a GPU", "torch": "2.11.0", "triton": None}
    about |= {"clips": 16, "steps": 24, "guidance": 2.0, "heads": None, "heads_int4": 1.0}
    rows = [
        {"what": "0.5+qk+pv", "ingredients": ["a", "b"], "psnr_mean": 30.04} | about,
        {"what": "pv", "ingredients": ["b"], "psnr_mean": 36.26} | about,
        {"what": "qk", "ingredients": ["a", "c"], "psnr_mean": 34.0} | about,
        about | {"what": "qk+pv", "ingredients": ["a", "b"], "psnr_mean": 35.0, "heads": "most", "heads_int4": 0.5},
        about | {"what": "qk+pv", "ingredients": ["a", "b"], "psnr_mean": 38.0, "heads": "least", "heads_int4": 0.5},
        about | {"what": "qk+pv", "ingredients": ["a", "b"], "psnr_mean": 41.0, "heads": "least", "heads_int4": 0.25},
        {"what": "qk", "ingredients": ["a"], "psnr_mean": 31.0} | about,
    ]
    monkeypatch.setattr(tables, "rows_of", lambda name: rows if name == "int4" else [])
    lines = tables.four_bits().splitlines()
    assert lines[2:9] == [
        "| Q·K | a | 100% | 31.0 |", "| Q·K | a; c | 100% | 34.0 |", "| P·V | b | 100% | 36.3 |",
        "| density 0.5, both | a; b | 100% | 30.0 |",
        *(f"| both | – | {heads} |" for heads in ("25%, least | 41.0", "50%, least | 38.0", "50%, most | 35.0")),
    ]  # fmt: skip
    assert "16 clips of 24 steps at guidance 2; heads that are not in INT4 are in INT8" in lines[-1]
