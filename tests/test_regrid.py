"""A plan on another grid, from statistics or from masks alone: offsets and densities hold, and nothing is silent."""

import json
from dataclasses import replace

import pytest
import torch

from paroattn.block_mask import BlockMask, blocks_of
from paroattn.capture import BlockStats, CaptureSettings, Statistics, regrid
from paroattn.capture.regrid import Resampling, regridded
from paroattn.cli import main
from paroattn.grid import Grid, Layout, TextSpan, token_order
from paroattn.phases import Phase
from paroattn.plan.plan import CARRIED, LayerPlan, Plan, TransformerPlan
from paroattn.plan.regrid import masks
from paroattn.plan.search import PlanSettings, make_plan

ORDERS = ("FHW", "HWF", "WFH", "2x3x2", "FWH")
GRID = Grid(5, 7, 9)
BLOCK = (16, 8)
PHASES = (Phase(0.6, 0.25), Phase(0.0, 0.75))
OTHERS = (Grid(9, 7, 9), Grid(5, 13, 8), Grid(3, 4, 5), Grid(1, 11, 6), Grid(7, 9, 10), Grid(2, 2, 3))


def a_plan(grid=GRID, block=BLOCK, density=0.35, seed=0):
    """Two layers of five heads whose masks all differ, rows of different length among them."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (blocks_of(grid.tokens, size) for size in block)
    shares = density * torch.linspace(0.5, 1.5, len(PHASES) * len(ORDERS)).view(len(PHASES), len(ORDERS), 1, 1)
    layers = {}
    for name in ("blocks.0.attn1", "blocks.1.attn1"):
        kept = torch.rand(len(PHASES), len(ORDERS), rows, columns, generator=generator) < shares
        kept.scatter_(-1, torch.randint(columns, (*kept.shape[:-1], 1), generator=generator), True)
        precision = (("int8", "bf16", "int8", "int8", "int8"), ("bf16",) * len(ORDERS))
        layers[name] = LayerPlan(ORDERS, BlockMask.from_dense(kept, block), precision)
    made = {"settings": {"density": density}, "calibration": {"call": {"height": 56}}}
    return TransformerPlan("Model", len(ORDERS), 64, grid, TextSpan(6, "prefix"), block, PHASES, layers, made)


def counterparts(old, new, t, u):
    """By hand: the old tokens that a new pair of tokens stands for, as coordinates."""
    query, key = [], []
    for at, to, size, was in zip(t, u, new, old, strict=True):
        offset = max(-(was - 1), min(was - 1, to - at))
        place = int((at + 0.5) * was / size)
        place = min(max(place, -min(offset, 0)), was - 1 - max(offset, 0))
        query.append(place)
        key.append(place + offset)
    return query, key


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("new", [OTHERS[1], OTHERS[2]], ids=str)
def test_a_new_block_is_worth_the_mean_of_the_pairs_it_stands_for(order, new, monkeypatch):
    old, generator = Grid(3, 4, 6), torch.Generator().manual_seed(0)
    block = (8, 4)
    monkeypatch.setattr(regrid, "SAMPLE", block)
    maps = torch.rand(blocks_of(old.tokens, 8), blocks_of(old.tokens, 4), generator=generator)
    place_of = {tuple(at): place for place, at in enumerate(coordinates(old, order))}
    tokens = coordinates(new, order)
    found = Resampling(old, new, order, block)(maps)
    assert found.shape == (blocks_of(new.tokens, 8), blocks_of(new.tokens, 4))
    for i, j in ((0, 0), (1, 5), (found.shape[0] - 1, 2), (2, found.shape[1] - 1)):
        pairs = [
            counterparts(old, new, tokens[t], tokens[u])
            for t in sampled(i, 8, new.tokens)
            for u in sampled(j, 4, new.tokens)
        ]
        values = [float(maps[place_of[tuple(q)] // 8, place_of[tuple(k)] // 4]) for q, k in pairs]
        assert float(found[i, j]) == pytest.approx(sum(values) / len(values), abs=1e-5)


def sampled(number, size, tokens):
    """Places of a block's tokens; a last block that is not whole is spread over as often."""
    first, length = number * size, min(size, tokens - number * size)
    return [first + int((i + 0.5) / size * length) for i in range(size)]


def coordinates(grid, order):
    return [
        (token // (grid.height * grid.width), token // grid.width % grid.height, token % grid.width)
        for token in token_order(grid, order).tolist()
    ]


@pytest.mark.parametrize("new", OTHERS, ids=str)
def test_what_depends_on_the_offset_alone_is_found_again_on_every_grid(new):
    old = Grid(4, 5, 6)

    def by_offset(grid, limit):
        at = torch.tensor(coordinates(grid, "HWF"))
        gap = (at[None] - at[:, None]).clamp(-limit, limit)
        return 1 / (1 + gap[..., 0].abs() + 2 * (gap[..., 1] + 0.5).abs() + 3 * (gap[..., 2] - 0.25).abs())

    limit = torch.tensor([3, 4, 5])
    found = Resampling(old, new, "HWF", (1, 1))(by_offset(old, limit))
    torch.testing.assert_close(found, by_offset(new, limit))


@pytest.mark.parametrize("new", OTHERS, ids=str)
def test_every_head_keeps_its_density_and_the_blocks_worth_most(new):
    plan = a_plan()
    carried = plan.for_grid(new)
    resamplings = {order: Resampling(GRID, new, order, BLOCK) for order in ORDERS}
    rows, columns = (blocks_of(new.tokens, size) for size in BLOCK)
    assert carried.grid == new and list(carried.layers) == list(plan.layers)
    for name, layer in carried.layers.items():
        before, kept = plan.layers[name], layer.mask.dense()
        assert layer.orders == before.orders and layer.precision == before.precision
        assert kept.any(-1).all()
        wanted = (before.mask.head_density() * rows * columns).floor().clamp_min(rows)
        assert ((kept.sum((-2, -1)) - wanted).abs() <= 1).all()
        for phase in range(len(PHASES)):
            for head, order in enumerate(ORDERS):
                worth = resamplings[order](before.mask[phase].dense()[head])
                mine = kept[phase, head]
                best = worth.amax(-1, keepdim=True)
                assert (mine & (worth == best)).any(-1).all()
                spare = mine & (worth < best)  # kept for their worth, not for their row
                if spare.any() and not mine.all():
                    assert worth[spare].min() >= worth[~mine].max() - 1e-6


def test_the_densities_of_the_phases_and_the_plan_hold():
    plan = a_plan()
    carried = plan.for_grid(Grid(9, 13, 8))
    assert carried.density == pytest.approx(plan.density, abs=2e-3)
    assert carried.phase_density().tolist() == pytest.approx(plan.phase_density().tolist(), abs=2e-3)


def test_the_same_grid_gives_the_same_plan():
    plan = a_plan()
    assert plan.for_grid(GRID) is plan
    for order in ORDERS:
        resampling = Resampling(GRID, GRID, order, BLOCK)
        for layer in plan.layers.values():
            found = masks(layer.mask.bits[:, 3], layer.mask.key_blocks, resampling)
            assert torch.equal(found, layer.mask.dense()[:, 3])


def test_there_and_back_most_blocks_are_the_same():
    plan = local_plan(Grid(8, 8, 4), "FHW", 0.2)
    back = plan.for_grid(Grid(16, 8, 4)).for_grid(Grid(8, 8, 4))
    kept, again = (each.layers["a"].mask.dense() for each in (plan, back))
    assert again.sum() == kept.sum() and (kept & again).sum() > 0.85 * kept.sum()
    assert back.made[CARRIED] == ["8x8x4", "16x8x4"]


def local_plan(grid, order, reach):
    """One head that keeps what lies within `reach` of its rows, as a share of the sequence."""
    rows, columns = (blocks_of(grid.tokens, size) for size in BLOCK)
    gap = ((torch.arange(rows) + 0.5) / rows)[:, None] - (torch.arange(columns) + 0.5) / columns
    layer = LayerPlan((order,), BlockMask.from_dense((gap.abs() <= reach)[None, None], BLOCK), (("fp32",),))
    return TransformerPlan("Model", 1, 64, grid, TextSpan(), BLOCK, (Phase(0.0, 1.0),), {"a": layer})


@pytest.mark.parametrize("new", [Grid(10, 7, 9), Grid(5, 12, 14), Grid(3, 5, 8)], ids=str)
@pytest.mark.parametrize("order", ["FHW", "HWF", "WFH"])
def test_a_local_mask_stays_local(order, new):
    kept = local_plan(GRID, order, 0.12).for_grid(new).layers["a"].mask.dense()[0, 0]
    rows, columns = kept.shape
    gap = ((torch.arange(rows) + 0.5) / rows)[:, None] - (torch.arange(columns) + 0.5) / columns
    assert gap.abs()[kept].max() < 0.45 and gap.abs()[kept].mean() < 0.12
    assert kept[gap.abs() < 0.5 / columns].double().mean() > 0.9


def test_of_blocks_worth_the_same_the_nearer_is_kept():
    worth = Resampling(GRID, Grid(7, 7, 9), "FHW", BLOCK)
    rows, columns = worth.nearness.shape
    assert (rows, columns) == (blocks_of(441, 16), blocks_of(441, 8))
    assert float(worth.nearness.max()) < 1 / (regrid.SAMPLE[0] * regrid.SAMPLE[1])
    assert worth.nearness[5].argmax() in (10, 11) and worth.nearness[0].argmin() == columns - 1


# From statistics


def statistics(orders=("FHW", "HWF"), chosen=None):
    """Of two layers at two noise levels; errors fall with the distance, steeper in the second head."""
    generator, heads = torch.Generator().manual_seed(0), 3
    grid, block = Grid(4, 6, 8), (16, 16)
    count = blocks_of(grid.tokens, 16)
    gap = (torch.arange(count)[:, None] - torch.arange(count)).abs()
    layers = {}
    for name in ("a", "b"):
        layers[name] = {}
        for level in (0.9, 0.3):
            steep = torch.tensor([0.5, 2.0, 1.0]).view(1, heads, 1, 1)
            error = torch.exp(-gap * steep) * (1 + torch.rand(len(orders), heads, count, count, generator=generator))
            paper = [torch.rand(len(orders), heads, generator=generator) for _ in range(2)]
            layers[name][level] = BlockStats(error / error.sum(-1, keepdim=True), error, *paper, torch.tensor(9.0), 1)
    settings = CaptureSettings(orders=orders, block=block)
    return Statistics("Model", heads, 64, Layout(grid), settings, layers, chosen=chosen or {})


def test_statistics_on_another_grid_make_a_plan_for_it_with_every_knob():
    new = Grid(5, 6, 11)
    laid = regridded(statistics(), new)
    plan = make_plan(laid, PlanSettings(0.4, orders=("FHW", "HWF"), phase_ends=(0.5, 1.0)))
    assert plan.grid == new and plan.density == pytest.approx(0.4, abs=0.01) and plan.made[CARRIED] == ["4x6x8"]
    assert len({tuple(layer.orders) for layer in plan.layers.values()}) >= 1
    steep, flat = (float(plan.head_density()[:, :, head].mean()) for head in (1, 0))
    assert steep < 0.6 * flat
    blocks = (blocks_of(new.tokens, 16),) * 2
    for layer in ("a", "b"):
        error = statistics().mean(layer, "error", [0.9])
        found = laid.mean(layer, "error", [0.9])
        assert found.shape == (2, 3, *blocks)
        for index, order in enumerate(("FHW", "HWF")):
            expected = Resampling(Grid(4, 6, 8), new, order, (16, 16))(error[index])
            torch.testing.assert_close(found[index], expected)
        assert torch.equal(laid.mean(layer, "sparse_share"), statistics().mean(layer, "sparse_share"))
        diagonal = (torch.arange(blocks[0]) - laid.heaviest(layer)[0, 1]).abs()
        assert diagonal.double().mean() < 1.5


def test_statistics_of_chosen_orders_are_laid_in_them():
    chosen = {"a": ("HWF", "FHW", "WFH"), "b": ("FHW",) * 3}
    whole = statistics(("FHW",), chosen)
    laid = regridded(whole, Grid(3, 6, 8))
    for head, order in enumerate(chosen["a"]):
        expected = Resampling(Grid(4, 6, 8), Grid(3, 6, 8), order, (16, 16))(whole.mean("a", "error")[0, head])
        torch.testing.assert_close(laid.mean("a", "error")[0, head], expected)


def test_statistics_of_the_same_grid_are_as_they_are_and_samples_are_refused():
    whole = statistics()
    assert regridded(whole, Grid(4, 6, 8)) is whole
    whole.settings = replace(whole.settings, block_stride=2)
    with pytest.raises(ValueError, match="all query blocks"):
        regridded(whole, Grid(4, 6, 9))


# The card and the command


def test_the_card_says_where_a_carried_plan_comes_from_and_that_nobody_measured(tmp_path):
    Plan({"transformer": a_plan()}).for_grid(Grid(9, 13, 8)).save_pretrained(tmp_path / "plan")
    card = (tmp_path / "plan" / "README.md").read_text()
    assert "| carried over from | 5x7x9 tokens; what that loses was not measured |" in card
    assert "height 56" not in card and "Not measured." in card
    Plan({"transformer": a_plan()}).save_pretrained(tmp_path / "own")
    own = (tmp_path / "own" / "README.md").read_text()
    assert "height 56" in own and "carried over" not in own


def test_paro_plan_carries_all_parts_of_a_plan(tmp_path, capsys):
    both = Plan({"transformer": a_plan(), "transformer_2": replace(a_plan(seed=4), component="transformer_2")})
    both.save_pretrained(tmp_path / "plan")
    words = ["plan", str(tmp_path / "plan"), "--out", str(tmp_path / "wide"), "--json"]
    assert main([*words, "--grid", "5x7x16"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {name: part["grid"] for name, part in said.items()} == dict.fromkeys(both, "5x7x16")
    read = Plan.from_pretrained(tmp_path / "wide")
    for name, part in both.for_grid(Grid(5, 7, 16)).items():
        assert read[name].made[CARRIED] == ["5x7x9"]
        for layer, expected in part.layers.items():
            assert torch.equal(read[name].layers[layer].mask.bits, expected.mask.bits)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grid", "5x7"], "FRAMESxHEIGHTxWIDTH"),
        (["--grid", "5x7x16", "--density", "0.2"], "has no statistics, from which another plan could be made"),
    ],
)
def test_a_grid_that_cannot_be_read_or_comes_with_other_wishes_is_refused(words, message, tmp_path, capsys):
    Plan({"transformer": a_plan()}).save_pretrained(tmp_path / "plan")
    assert main(["plan", str(tmp_path / "plan"), "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
