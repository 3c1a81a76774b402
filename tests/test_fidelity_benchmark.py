"""The comparison of rules that choose blocks: their masks, equal density, warm-up, and rows, all on a CPU."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_models import GRID as WAN_GRID
from tiny_models import random_plan, tiny_wan, wan_inputs

import fidelity
import fidelity_tables
import result_tables
import rounding
import rules
from at_density import executed, warmed, warmup_steps
from paroattn.block_mask import BlockMask, blocks_of
from paroattn.demo import pipeline as demo
from paroattn.grid import Grid, Layout, token_order
from paroattn.integration.apply import apply, remove, report
from paroattn.integration.schedule import noise_levels
from paroattn.kernels.attention import attention
from paroattn.phases import phase_at
from paroattn.plan.plan import Plan
from paroattn.plan.search import PlanSettings, make_plan
from refined import Refiner

GRIDS = [(Grid(5, 6, 7), (16, 16)), (Grid(3, 7, 11), (16, 32)), (Grid(7, 4, 3), (8, 4))]
DENSITIES = (0.5, 0.3, 0.2, 0.15)
LEVELS = (1.0, 0.9, 0.8, 0.6, 0.3)
STEPS, BLOCK = 5, 16
LAYOUT = Layout(Grid(3, 5, 7))  # 105 tokens: 6.6 blocks of 16


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def blocks(tokens, size):
    return [range(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def by_hand(grid, block, score):
    """score(tokens of the query block, tokens of the key block) for every pair of blocks, (Nq, Nk)."""
    rows, columns = (blocks(grid.tokens, size) for size in block)
    return torch.tensor([[score(row, column) for column in columns] for row in rows], dtype=torch.float64)


def check_lowest(kept, score, density):
    """As many blocks as the density allows; but for one block of each row, none is worse than one that is dropped."""
    assert int(kept.sum()) == round(density * kept.numel())
    assert kept.any(-1).all()
    spare = kept & ~torch.nn.functional.one_hot(score.argmin(-1), kept.shape[-1]).bool()
    assert not spare.any() or score[spare].max() <= score[~kept].min() + 1e-6


# Static shapes


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(("grid", "block"), GRIDS)
def test_a_local_window_lies_around_the_diagonal(grid, block, density):
    score = by_hand(grid, block, lambda row, column: abs(row.start + block[0] / 2 - column.start - block[1] / 2))
    check_lowest(rules.keep_lowest(rules.window_rank(grid, block), density), score, density)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(("grid", "block"), GRIDS)
@pytest.mark.parametrize("order", ["FHW", "HWF"])
def test_spatial_and_temporal_masks_keep_the_nearest_frames_and_places(grid, block, density, order):
    size = grid.height * grid.width if order == "FHW" else grid.frames
    place = token_order(grid, order)
    slab = place // size if order == "FHW" else place % (grid.height * grid.width)  # frame, or place in the frame

    def score(row, column):
        nearest = min(abs(int(slab[a]) - int(slab[b])) for a in row for b in column)
        return nearest + abs(row.start + block[0] / 2 - column.start - block[1] / 2) / (2 * grid.tokens)

    check_lowest(rules.keep_lowest(rules.slab_rank(grid, size, block), density), by_hand(grid, block, score), density)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(("grid", "block"), GRIDS)
def test_a_radial_mask_keeps_blocks_by_a_quarter_of_their_pairs(grid, block, density):
    frame = grid.height * grid.width

    def needed(a, b):
        away = max(1, abs(a // frame - b // frame))
        return abs(a % frame - b % frame) * 2 ** int(math.log2(away)) / frame

    def score(row, column):
        pairs = sorted(needed(a, b) for a in row for b in column)
        return pairs[math.ceil(len(pairs) / 4) - 1]

    check_lowest(rules.keep_lowest(rules.radial_rank(grid, block), density), by_hand(grid, block, score), density)


def test_radial_windows_are_half_as_wide_whenever_the_temporal_distance_doubles():
    grid = Grid(9, 4, 8)
    kept = rules.radial_rank(grid, (1, 1)) <= 0.5
    widths = []
    for away in range(9):
        rows, columns = torch.arange(32), torch.arange(32) + 32 * away
        widths.append(int((rows[:, None] - rows)[kept[rows][:, columns]].abs().max()))
    assert widths == [16, 16, 8, 8, 4, 4, 4, 4, 2]


def test_the_first_frame_comes_before_all_else_within_the_density():
    grid, block = Grid(5, 6, 7), (16, 16)  # 42 tokens a frame: 3 blocks
    rank = rules.window_rank(grid, block)
    kept = rules.keep_lowest(rules.first_frame(rank, grid, block), 0.4)
    assert kept[:, :3].all() and not kept[:, 3:].all()
    assert int(kept.sum()) == round(0.4 * kept.numel())
    assert torch.equal(rank, rules.window_rank(grid, block)), "the rank itself must not change"


@pytest.mark.parametrize(("rows", "columns"), [(14, 14), (59, 59), (7, 30)])
@pytest.mark.parametrize("density", [*DENSITIES, 0.125, 1.0])
def test_rows_share_a_density_evenly(rows, columns, density):
    counts = rules.even_rows(rows, columns, density)
    assert int(counts.sum()) == round(density * rows * columns)
    assert int(counts.max() - counts.min()) <= 1


class Planted:
    """Statistics of two heads whose error lies in one frame, or in one place of all frames, and in the first frame."""

    layout = Layout(Grid(5, 6, 7))
    settings = SimpleNamespace(block=(16, 16), orders=("HFW", "HWF", "FHW"))
    heads, head_dim, model_class, made = 3, 8, "Planted", {}
    layers = ("a", "b")

    def __init__(self):
        grid, block = self.layout.grid, self.settings.block
        inside = {
            "FHW": (rules.slab_distance(grid.tokens, 42, block) == 0).double(),
            "HWF": (rules.slab_distance(grid.tokens, 5, block) <= 1).double(),
        }
        first = torch.zeros(14, 14).double()
        first[:, :3] = 1
        flat = torch.full_like(first, 0.5)
        head = {"spatial": ("FHW", inside["FHW"]), "temporal": ("HWF", inside["HWF"]), "sink": ("FHW", first)}
        self.planted = {"a": ("spatial", "temporal", "sink"), "b": ("temporal", "sink", "spatial")}
        self.error = {
            layer: torch.stack(
                [
                    torch.stack([head[kind][1] if head[kind][0] == order else flat for kind in kinds])
                    for order in self.settings.orders
                ]
            )
            for layer, kinds in self.planted.items()
        }

    def mean(self, layer, name):
        return self.error[layer] if name == "error" else torch.tensor({"a": 1.0, "b": 100.0}[layer])


def test_every_head_gets_the_shape_that_its_calibration_error_has():
    planted = Planted()
    found = rules.spatial_temporal(planted, 0.3)
    for layer, kinds in planted.planted.items():
        orders, kept = found[layer]
        assert orders == tuple({"spatial": "FHW", "temporal": "HWF", "sink": "FHW"}[kind] for kind in kinds)
        for kind, mask in zip(kinds, kept, strict=True):
            assert int(mask.sum()) == round(0.3 * mask.numel())
            assert bool(mask[:, :3].all()) == (kind == "sink")


def test_radial_keeps_the_first_frame_only_where_that_drops_less_relative_error():
    planted = Planted()
    rank = rules.radial_rank(planted.layout.grid, planted.settings.block)
    with_sink = rules.first_frame(rank, planted.layout.grid, planted.settings.block)
    away = rules.keep_lowest(rank, 0.3)
    near = rules.keep_lowest(with_sink, 0.3)
    for layer, wanted in (("a", near), ("b", away)):  # the other layer has a larger error, and a larger power
        planted.error["a"], planted.error["b"] = (
            (wanted.double() * size).expand(3, 3, -1, -1)
            for size, wanted in ((1.0, wanted), (50.0, away if layer == "a" else near))
        )
        orders, kept = rules.radial(planted, 0.3)["b"]
        assert orders == ("FHW",) * 3
        assert all(torch.equal(mask, wanted) for mask in kept)


# Dynamic rules


def seen(clips=2, heads=3, seed=0, rows=None):
    """An input of several clips, another order for every head; orders of one clip's heads first."""
    generator = torch.Generator().manual_seed(seed)
    wide = clips * heads
    q, k, v = (torch.randn(1, LAYOUT.tokens, wide, 8, generator=generator) for _ in range(3))
    k += torch.randn(1, 1, wide, 8, generator=generator)  # a mean changes no softmax
    q += torch.randn(1, LAYOUT.tokens // 5, wide, 8, generator=generator).repeat_interleave(5, 1) * 2
    orders = ("HFW", "FHW", "WFH")
    count = blocks_of(LAYOUT.tokens, 16)
    rows = torch.tensor([[2, 3, 1, 2, 4, 2, 2], [1] * 7, [7, 1, 1, 1, 5, 1, 6]])[:heads] if rows is None else rows
    assert rows.shape == (heads, count)
    w_o = torch.randn(heads, 8, 20, generator=generator).repeat(clips, 1, 1)
    order = torch.tensor([2, 0, 1])[:heads].repeat(clips)
    return rules.Input(q, k, v, LAYOUT.table(orders), order, w_o, clips, rows, LAYOUT, orders, (16, 16))


def reordered(given, x, head):
    return x[0, :, head].double()[given.table[given.order[head]].long()]


def test_pooled_topk_keeps_the_best_products_of_means():
    given = seen()
    kept = rules.pooled_topk(given)
    for head in range(6):
        q, k = (
            torch.stack([reordered(given, x, head)[list(part)].mean(0) for part in blocks(LAYOUT.tokens, 16)])
            for x in (given.q, given.k)
        )
        weights = (q @ k.mT / 8**0.5).softmax(-1)
        for row, weight in enumerate(weights):
            best = weight.topk(int(given.rows[head % 3, row])).indices
            assert set(kept[head, row].nonzero()[:, 0].tolist()) == set(best.tolist())


def output_error(given, head):
    """Mass and output error of every block, in float64 from the whole map."""
    q, k, v = (reordered(given, x, head) for x in (given.q, given.k, given.v))
    p = (q @ k.mT / 8**0.5).softmax(-1)
    parts = blocks(LAYOUT.tokens, 16)
    mass, error = torch.zeros(2, len(parts), len(parts)).double()
    for i, rows in enumerate(parts):
        for j, columns in enumerate(parts):
            part = p[list(rows)][:, list(columns)]
            share = part.sum(-1, keepdim=True)
            moved = (part @ v[list(columns)] - share * (p @ v)[list(rows)]) @ given.w_o[head].double()
            mass[i, j], error[i, j] = share.sum(), moved.square().sum()
    return mass, error


def test_no_mask_of_equal_density_drops_less_output_error_than_the_oracle():
    given = seen(seed=3)
    found = [output_error(given, head) for head in range(6)]
    kept, total = rules.oracle(given), int(given.rows.sum())
    generator = torch.Generator().manual_seed(0)
    for clip in (0, 1):
        mass, error = (torch.stack([found[head][part] for head in range(3 * clip, 3 * clip + 3)]) for part in (0, 1))
        mine = kept[3 * clip : 3 * clip + 3]
        heaviest = torch.zeros_like(mine).scatter_(-1, mass.argmax(-1, keepdim=True), True)
        assert int(mine.sum()) == total and bool((mine | ~heaviest).all())
        least = error[~mine].sum()
        others = [(torch.rand(error.shape, generator=generator) + heaviest).double() for _ in range(20)]
        others += [mass / mass.max() + 2 * heaviest, error.amax(0).expand_as(error) + error.max() * 2 * heaviest]
        pooled = rules.pooled_topk(given)[3 * clip : 3 * clip + 3]
        others.append(pooled + error / error.max() * 0.1 + 2.0 * heaviest)
        for score in others:
            other = torch.zeros_like(mine).flatten().index_fill_(0, score.flatten().topk(total).indices, True)
            assert least <= error.flatten()[~other].sum() * (1 + 1e-5)
        exact = error.masked_fill(heaviest, torch.inf).flatten().topk(total).indices  # and it is the very best
        best = torch.zeros_like(mine).flatten().index_fill_(0, exact, True)
        assert least == pytest.approx(float(error.flatten()[~best].sum()), rel=1e-5)


@pytest.fixture
def wan():
    model = tiny_wan(0)
    plan = random_plan(density=0.5, seed=4)
    apply(model, plan, impl="cpu")
    yield model, plan
    remove(model)


def two_clips():
    inputs = wan_inputs(batch=2, seed=1)
    return inputs, [{name: x[i : i + 1] for name, x in inputs.items()} for i in (0, 1)]


@pytest.mark.parametrize("choose", rules.DYNAMIC.values(), ids=rules.DYNAMIC)
def test_every_clip_gets_the_masks_it_gets_alone(wan, choose):
    model, plan = wan
    both, single = two_clips()
    with torch.no_grad(), rules.choosing(model, choose):
        together = model(**both).sample
        alone = torch.cat([model(**inputs).sample for inputs in single])
    assert torch.allclose(together, alone, atol=1e-4 * float(alone.abs().max()))
    with torch.no_grad():
        planned = model(**both).sample
    assert not torch.allclose(together, planned, atol=1e-2 * float(alone.abs().max()))
    assert report(model).to_dict()["transformer"]["density"] == pytest.approx(plan.density)


def test_the_chosen_masks_are_what_runs(wan):
    model, plan = wan
    asked, masks = [], []

    def choose(given):
        generator = torch.Generator().manual_seed(len(asked))
        score = torch.rand(
            given.q.shape[2], *plan.layers["blocks.0.attn1"].mask.dense().shape[-2:], generator=generator
        )
        score.scatter_(-1, score.argmax(-1, keepdim=True), 2.0)
        flat = score.view(given.clips, -1)
        best = flat.topk(int(given.rows.sum()), -1).indices
        asked.append(given)
        masks.append(torch.zeros_like(flat, dtype=torch.bool).scatter_(1, best, True).view(score.shape))
        return masks[-1]

    outputs = []
    projections = [model.blocks[i].attn1.to_out[0] for i in (0, 1)]
    handles = [each.register_forward_pre_hook(lambda _, args: outputs.append(args[0])) for each in projections]
    with torch.no_grad(), rules.choosing(model, choose):
        model(**two_clips()[0])
    for handle in handles:
        handle.remove()
    assert [int(given.rows.sum()) for given in asked] == [
        int(layer.mask.dense().sum()) for layer in plan.layers.values()
    ]
    for index, (given, mask, out) in enumerate(zip(asked, masks, outputs, strict=True)):
        planned = plan.layers[f"blocks.{index}.attn1"]
        w_o = projections[index].weight.mT.unflatten(0, (2, -1))
        assert torch.equal(given.w_o, w_o.repeat(2, 1, 1)) and given.layout.grid == WAN_GRID
        for clip in (0, 1):
            heads = slice(2 * clip, 2 * clip + 2)
            table = Layout(WAN_GRID).table(planned.orders)
            alone = attention(
                *(x[:, :, heads] for x in (given.q, given.k, given.v)), BlockMask.from_dense(mask[heads], plan.block),
                table=table, order=torch.arange(2), impl="reference",
            )  # fmt: skip
            assert torch.allclose(alone.flatten(2)[0], out[clip], atol=1e-5)


def test_a_rule_that_keeps_more_than_it_may_is_refused(wan):
    model, _ = wan
    full = lambda given: torch.ones(given.q.shape[2], *rules.pooled_topk(given).shape[1:], dtype=torch.bool)  # noqa: E731
    with pytest.raises(RuntimeError, match="a rule must keep"), rules.choosing(model, full):
        model(**two_clips()[0])
    with torch.no_grad():
        model(**two_clips()[0])  # and the operation is the original one again


# Density and warm-up


def unchanged(plan, name):
    """In place of refining."""
    return plan


@pytest.fixture(scope="module")
def small():
    """The bundled model on a small grid, and its statistics."""
    torch.set_num_threads(1)
    bench = fidelity.Comparison("cpu", 1, STEPS, "auto", "fp32", demo.MODEL, (5, 24, 28))
    statistics = fidelity.calibrated(bench, 3, (BLOCK, BLOCK), (0.4, 1.0), 1)
    return bench, statistics


@pytest.mark.parametrize(("steps", "dense"), [(24, 5), (5, 1), (2, 1), (10, 2), (15, 3)])
def test_a_fifth_of_the_steps_is_rounded_up(steps, dense):
    assert warmup_steps(0.2, steps) == dense
    assert warmup_steps(0.0, steps) == 0


@pytest.mark.parametrize("warmup", fidelity.WARMUPS)
@pytest.mark.parametrize("name", [name for name in fidelity.METHODS if name != "dense"])
def test_every_method_is_set_to_the_density_that_is_asked_for(small, name, warmup):
    bench, statistics = small
    methods = fidelity.Methods(statistics, (0.4, 1.0), "fp32", unchanged)
    dense = warmup_steps(warmup, STEPS)
    for density in (0.5, 0.3, 0.2):
        method = methods(name, density, bench.levels[dense:])
        counted = [
            layer.mask[phase_at(method.plan.phases, level)].density
            for level in bench.levels[dense:]
            for layer in method.plan.layers.values()
        ]
        assert sum(counted) / len(counted) == pytest.approx(density, abs=0.005)
        rule, _, reorder = name.partition("+")
        assert (method.choose is rules.DYNAMIC.get(rule)) and (method.choose is None) == (rule not in rules.DYNAMIC)
        used = {order for layer in method.plan.layers.values() for order in layer.orders}
        ours = name in ("paroattn", "paroattn-unrefined")
        assert (used == {"FHW"}) == (not reorder and not ours and name not in ("paper", "spatial-temporal"))


def test_ours_is_what_calibrating_makes_by_default(small):
    _, statistics = small
    levels = statistics.noise_levels  # the schedule of the calibration needs no tuning
    ours = fidelity.Methods(statistics, (0.25, 0.5, 0.75, 1.0), "fp32", unchanged)(
        "paroattn-unrefined", 0.3, tuple(levels)
    ).plan
    default = make_plan(statistics, PlanSettings(0.3))
    assert statistics.level_weights and not statistics.layer_weights
    assert ours.density == pytest.approx(0.3, abs=0.001)
    for name, layer in default.layers.items():
        assert layer.orders == ours.layers[name].orders
        assert (layer.mask.dense() ^ ours.layers[name].mask.dense()).double().mean() < 0.002


def test_a_warm_up_is_a_phase_of_its_own_with_every_block(small):
    bench, statistics = small
    plan = make_plan(statistics, PlanSettings(0.3, phase_ends=(0.4, 1.0)))
    longer = warmed(plan, bench.levels, 2)
    for step, level in enumerate(bench.levels):
        for name, layer in longer.layers.items():
            found = layer.mask[phase_at(longer.phases, level)].dense()
            wanted = plan.layers[name].mask[phase_at(plan.phases, level)].dense()
            assert torch.equal(found, torch.ones_like(wanted) if step < 2 else wanted)
            assert layer.orders == plan.layers[name].orders
    assert longer.phases[0].share == pytest.approx(2 / STEPS)
    assert warmed(plan, bench.levels, 0) is plan


def test_the_first_steps_of_a_warm_up_make_what_dense_steps_make(small):
    bench, statistics = small
    methods = fidelity.Methods(statistics, (0.4, 1.0), "fp32", unchanged)
    made = {}
    for name, plan, choose in (
        ("dense", methods.dense(), None),
        ("static", warmed(methods("paroattn", 0.3, bench.levels).plan, bench.levels, 2), None),
        ("dynamic", warmed(methods("oracle", 0.3, bench.levels).plan, bench.levels, 2), rules.oracle),
    ):
        steps = made[name] = []
        apply(bench.pipe, Plan({"transformer": plan}), impl="auto")
        with rules.choosing(bench.pipe.transformer, choose) if choose else torch.no_grad():
            bench.pipe(
                bench.prompts, num_inference_steps=STEPS, generator=[torch.Generator().manual_seed(3)],
                callback_on_step_end=lambda *args, into=steps: into.append(args[3]["latents"].clone()), **bench.call,
            )  # fmt: skip
        remove(bench.pipe)
    for name in ("static", "dynamic"):
        off = [float((a - b).abs().max()) for a, b in zip(made["dense"], made[name], strict=True)]
        assert max(off[:2]) < 1e-4 and min(off[2:]) > 1e-3


# Rows


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    """Rows of all methods, one clip and two steps."""
    folder = tmp_path_factory.mktemp("fidelity")
    statistics = small[1].save(folder / "statistics")
    out = folder / "fidelity.json"
    out.write_text(json.dumps({"rows": [{"method": "kept"}, {"method": "paper", "frames": 49}]}))
    base = ["--out", str(out), "--statistics", str(statistics), "--precision", "fp32", "--steps", "2", "--clips", "1"]
    base += ["--size", "5", "24", "28", "--refining", "1", "1", "2"]
    fidelity.main([*base, "--densities", "0.5"])
    fidelity.main([*base, "--densities", "0.5", "0.3", "--methods", "paper", "--warmups", "0"])
    with pytest.MonkeyPatch.context() as patch:  # what is there is neither made nor measured again
        patch.setattr(fidelity.Comparison, "clips", None)
        fidelity.main([*base, "--densities", "0.5", "--resume"])
    return json.loads(out.read_text())["rows"]


def test_rows_are_complete_and_merged(run):
    assert {"method": "kept"} in run and {"method": "paper", "frames": 49} in run
    found = [row for row in run if "psnr" in row]
    keys = [(row["method"], row["density_target"], row["dense_warmup"]) for row in found]
    wanted = {(name, 0.5, warmup) for name in fidelity.METHODS for warmup in (0.0, 0.2) if name != "dense"}
    assert len(keys) == len(set(keys)) and set(keys) == wanted | {("dense", 1.0, 0.0), ("paper", 0.3, 0.0)}
    like = json.loads((result_tables.RESULTS / "fidelity_demo.json").read_text())["rows"][-1]
    for row in found:
        assert not set(like) - set(row)
        assert (row["clips"], row["frames"], row["steps"], row["block"]) == (1, 5, 2, "16x16")
        assert row["density_executed"] == pytest.approx(row["density_target"], abs=0.005)
        assert row["psnr"] == [pytest.approx(row["psnr_mean"], abs=1e-3)] and row["psnr_min"] == row["psnr_mean"]
    score = {key: row["psnr_mean"] for key, row in zip(keys, found, strict=True)}
    assert score["dense", 1.0, 0.0] > 80 > max(x for key, x in score.items() if key[0] != "dense")
    assert all(score[name, 0.5, 0.2] > score[name, 0.5, 0.0] for name in fidelity.METHODS if name != "dense")


def row(method, psnr, density=0.5, warmup=0.0, **more):
    mean = sum(psnr) / len(psnr)
    return {
        "method": method, "density_target": density, "density_executed": density + 0.001, "dense_warmup": warmup,
        "psnr": psnr, "psnr_mean": mean, "psnr_min": min(psnr), "psnr_std": 1.5, "ssim_mean": 0.9,
        "cosine_mean": 0.95, "clips": len(psnr), "steps": 24, "tokens": 3744, "scales": None, "block": "64x64",
        "precision": "bf16", "frames": 16, "device": "GPU", "torch": "2.11.0", "date": "2026-11-22",
    } | more  # fmt: skip


@pytest.fixture
def made(monkeypatch):
    """Sets what the tables read."""

    def make(*rows):
        monkeypatch.setattr(fidelity_tables, "rows_of", lambda name: list(rows) if name == "fidelity" else [])

    return make


def lines_of(text):
    return [line for line in text.splitlines() if line.startswith("| ")]


def test_the_table_pairs_clips_with_ours(made):
    ours = row("paroattn", [30.0, 32.0, 34.0, 36.0])
    other = row("paper", [28.0, 31.0, 31.0, 34.0])  # −2, −1, −3, −2: mean −2, standard error 0.408, t 3.182
    made(other, row("oracle", [31.0, 33.0]), row("radial", [32.0] * 5), ours, row("paper", [25.0] * 4, 0.3, 0.2))
    text = fidelity_tables.comparison()
    lines = lines_of(text)
    assert lines.index("| paroattn, 0.5 | 0.501 | 33.0 ± 1.5 | 0.900 | 0.9500 | 30.0 | – |") < lines.index(
        "| paper, 0.5 | 0.501 | 31.0 ± 1.5 | 0.900 | 0.9500 | 28.0 | −2.0 (−3.3 … −0.7) |"
    )
    for other in ("oracle, 0.5 | 0.501 | 32.0 ± 1.5 | 0.900 | 0.9500 | 31.0", "radial, 0.5 | 0.501 | 32.0 ± 1.5 "):
        assert any(line.startswith(f"| {other}") and line.endswith("| – |") for line in lines)  # other clips: no pairs
    assert "| paper, 0.3 | 0.301 | 25.0 ± 1.5 | 0.900 | 0.9500 | 25.0 | – |" in lines
    assert text.index("no step dense") < text.index("first 20 % of the steps dense")


def test_images_and_formats_have_tables_of_their_own(made):
    made(
        row("paroattn", [30.0, 31.0], 0.3), row("paroattn", [40.0, 41.0], 0.3, frames=1),
        row("paroattn", [29.5, 30.9], 0.3, precision="int8"), row("dense", [90.0, 90.0], 1.0),
        row("dense", [45.0, 47.0], 1.0, precision="int8-pv", scales="row in block"),
    )  # fmt: skip
    assert len(lines_of(fidelity_tables.comparison())) == 4 and "40.5" not in fidelity_tables.comparison()
    assert len(lines_of(fidelity_tables.images())) == 3 and "2 images" in fidelity_tables.images()
    assert lines_of(fidelity_tables.formats())[2:] == [
        "| dense, 1 | P and V alone, one scale a row in block | 46.0 ± 1.5 | 45.0 | – |",
        "| paroattn, 0.3 | int8 | 30.2 ± 1.5 | 29.5 | −0.3 (−2.8 … +2.2) |",
    ]


def test_demands_hold_ours_against_the_best_of_each_kind_and_the_oracle(made):
    made(
        row("paroattn", [30.0, 34.0]), row("paper", [26.0, 28.0]), row("none", [27.0, 30.0]),
        row("radial", [28.0, 31.0]), row("local-window", [20.0, 21.0]), row("dynamic-topk", [22.0, 24.0]),
        row("dynamic-topk+reorder", [29.0, 34.0]), row("oracle+reorder", [34.0, 36.0]),
        row("paroattn", [25.0, 25.0], 0.3, 0.2), row("paper", [26.0, 26.0], 0.3, 0.2),
        row("paroattn", [20.0, 20.0], 0.3, frames=1),
    )  # fmt: skip
    first, second = lines_of(fidelity_tables.demands())[2:]
    assert first == (
        "| 0.5 | 32.0 | +5.0 (−7.7 … +17.7) | +3.5 (−2.9 … +9.9) | +2.5 (−3.9 … +8.9), radial | "
        "+0.5 (−5.9 … +6.9), dynamic-topk+reorder | 30.0, 26.0, 27.0 | 62% |"
    )  # (32 − 27) / (35 − 27)
    assert second == (
        "| 0.3, the first 20 % of the steps dense | 25.0 | −1.0 (−1.0 … −1.0) | – | −1.0 (−1.0 … −1.0), paper | – | "
        "25.0, 26.0, – | – |"
    )


def test_the_short_table_has_means_and_worst_clips_of_clips_without_dense_steps_ours_first(made):
    made(
        row("paper", [26.0, 28.0]), row("paroattn", [30.0, 34.0]), row("paroattn", [25.0, 29.0], 0.2),
        row("paper", [36.0, 38.0], 0.2, 0.2), row("paper", [11.0, 12.0], frames=1), row("dense", [60.0, 61.0], 1.0),
        row("paroattn", [1.0, 2.0], precision="int8"),
    )  # fmt: skip
    assert lines_of(fidelity_tables.fidelity_short()) == [
        "| PSNR against dense, dB: mean, worst clip | density 0.5 | density 0.2 |",
        "| --- | ---: | ---: |",
        "| **paroattn** | 32.0, 30.0 | 27.0, 25.0 |",
        "| PAROAttention's own rule | 27.0, 26.0 | – |",
    ]


def test_without_results_the_tables_say_so(made):
    made()
    for each in ("comparison", "fidelity_short", "images", "demands", "formats"):
        assert getattr(fidelity_tables, each)() == "Not measured yet.\n"


# Refining and rounding


def test_a_refined_plan_is_made_once_for_each_name_and_keeps_orders_and_densities(small, tmp_path):
    bench, statistics = small
    refiner = Refiner(bench.pipe, statistics, bench.call, 1, 2, 2, tmp_path)
    methods = fidelity.Methods(statistics, (0.4, 1.0), "fp32", refiner)
    ours = methods("paroattn", 0.3, bench.levels).plan
    before = methods("paroattn-unrefined", 0.3, bench.levels).plan
    assert torch.allclose(ours.phase_density(), before.phase_density())
    for name, layer in ours.layers.items():
        assert layer.orders == before.layers[name].orders
    changed = [(layer.mask.bits != before.layers[name].mask.bits).any() for name, layer in ours.layers.items()]
    assert any(changed)
    assert [each.name for each in tmp_path.iterdir()] == [f"paroattn-0.3-{STEPS}"]
    kept = replace(refiner, pipe=None)(before, f"paroattn-0.3-{STEPS}")  # no pipeline: it is read
    for name, layer in ours.layers.items():
        assert torch.equal(kept.layers[name].mask.bits, layer.mask.bits)


def test_the_bundled_plan_is_ours_where_it_fits_and_has_the_density(small):
    bench, statistics = small
    other = make_plan(statistics, PlanSettings(0.4, phase_ends=(0.4, 1.0)))
    density = executed(other, bench.levels)
    methods = fidelity.Methods(statistics, (0.4, 1.0), "fp32", unchanged, other)
    assert methods("paroattn", density, bench.levels).plan is other
    for name, wanted in (("paroattn", density - 0.01), ("paroattn-unrefined", density), ("paroattn-in-order", density)):
        assert methods(name, wanted, bench.levels).plan is not other
    elsewhere = replace(other, grid=Grid(*tuple(other.grid)[::-1]))
    assert not fidelity.Methods(statistics, (0.4, 1.0), "fp32", unchanged)._fits(elsewhere, density, bench.levels)


def test_the_plan_that_ships_has_the_density_that_its_row_is_asked_for():
    plan = Plan.from_pretrained(demo.PLAN)["transformer"]
    scheduler = demo.load_demo().scheduler
    scheduler.set_timesteps(demo.STEPS)
    assert executed(plan, noise_levels(scheduler)) == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize("scales", [None, *rounding.SHARED])
def test_int8_weights_share_a_scale_by_row_block_or_row_in_block(scales):
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 21, 4, generator=generator) * 2 for _ in range(3))
    block = (8, 4)  # the last query block has 5 rows, the last key block 1 column
    found = rounding.attended(q, k, v, block, scales)
    if scales is not None:
        v = (v / (top := v.abs().amax(1, keepdim=True)) * 127).round() * top / 127
    for head in range(2):
        s = q[head] @ k[head].mT / 2
        p = (s - s.amax(-1, keepdim=True)).exp()
        weights = p.clone()
        for rows in blocks(21, 8) if scales else ():
            for columns in blocks(21, 4):
                part = p[rows.start : rows.stop, columns.start : columns.stop]
                top = {
                    "row": p[rows.start : rows.stop].amax(1, keepdim=True),
                    "block": part.amax(),
                    "row in block": part.amax(1, keepdim=True),
                }[scales]
                quantised = (part / top * 127).round() / 127 * top
                weights[rows.start : rows.stop, columns.start : columns.stop] = quantised
        torch.testing.assert_close(found[head], weights @ v[head] / weights.sum(-1, keepdim=True), atol=1e-5, rtol=1e-5)
