"""A plan on another grid: orders stay, masks are stretched over it, densities hold, and nothing is silent."""

import json
from dataclasses import replace

import pytest
import torch

from paroattn.block_mask import BlockMask, blocks_of
from paroattn.cli import main
from paroattn.grid import Grid, TextSpan, token_order
from paroattn.phases import Phase
from paroattn.plan.plan import LayerPlan, Plan, TransformerPlan
from paroattn.plan.regrid import CARRIED, _Resampling

ORDERS = ("FHW", "HWF", "WFH", "2x3x2", "FWH")
GRID = Grid(5, 7, 9)
BLOCK = (16, 8)
PHASES = (Phase(0.6, 0.25), Phase(0.0, 0.75))
OTHERS = (Grid(9, 7, 9), Grid(5, 13, 8), Grid(3, 4, 5), Grid(1, 11, 6), Grid(10, 14, 18), Grid(2, 2, 3))


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


def old_places(old, new, order):
    """By hand, token by token: the place in the old order of what lies under each token of the new order."""
    place_of = {int(token): place for place, token in enumerate(token_order(old, order))}
    found = []
    for token in token_order(new, order).tolist():
        at = (token // (new.height * new.width), token // new.width % new.height, token % new.width)
        f, h, w = (int((x + 0.5) * was / size) for x, size, was in zip(at, new, old, strict=True))
        found.append(place_of[(f * old.height + h) * old.width + w])
    return found


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("new", [OTHERS[1], OTHERS[2]], ids=str)
def test_a_new_block_is_worth_the_share_of_its_pairs_that_were_kept(order, new):
    plan = a_plan()
    mask = plan.layers["blocks.0.attn1"].mask.dense()[1, 2]
    places = old_places(GRID, new, order)
    by_token = mask[[p // BLOCK[0] for p in places]][:, [p // BLOCK[1] for p in places]].double()
    rows = torch.stack([part.mean(0) for part in by_token.split(BLOCK[0])])
    expected = torch.stack([part.mean(1) for part in rows.split(BLOCK[1], 1)], 1)
    worth = _Resampling(GRID, new, order, BLOCK).worth(mask)
    torch.testing.assert_close(worth.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("new", OTHERS, ids=str)
def test_every_head_keeps_its_density_and_the_blocks_worth_most(new):
    plan = a_plan()
    carried = plan.for_grid(new)
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
                worth = _Resampling(GRID, new, order, BLOCK).worth(before.mask[phase].dense()[head])
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
        resampling = _Resampling(GRID, GRID, order, BLOCK)
        for layer in plan.layers.values():
            bits = layer.mask.bits[:, 3]
            found = torch.stack(list(resampling.masks(bits, layer.mask.key_blocks)))
            assert torch.equal(found, layer.mask.dense()[:, 3])


@pytest.mark.parametrize("order", ["FHW", "HWF"])
def test_there_and_back_along_the_slowest_axis_is_exact(order):
    grid, block = Grid(8, 8, 4), (32, 32)
    doubled = {"FHW": Grid(16, 8, 4), "HWF": Grid(8, 16, 4)}[order]
    generator = torch.Generator().manual_seed(3)
    kept = torch.rand(1, 1, 8, 8, generator=generator) < 0.3
    kept |= torch.eye(8, dtype=torch.bool)
    layer = LayerPlan((order,), BlockMask.from_dense(kept, block), (("fp32",),))
    plan = TransformerPlan("Model", 1, 64, grid, TextSpan(), block, (Phase(0.0, 1.0),), {"a": layer})
    there = plan.for_grid(doubled)
    assert torch.equal(there.layers["a"].mask.dense()[0, 0], kept[0, 0].repeat_interleave(2, 0).repeat_interleave(2, 1))
    back = there.for_grid(grid)
    assert torch.equal(back.layers["a"].mask.dense(), kept)
    assert back.made[CARRIED] == ["8x8x4", "16x8x4" if order == "FHW" else "8x16x4"]


@pytest.mark.parametrize("new", [Grid(10, 7, 9), Grid(5, 12, 14), Grid(3, 5, 8)], ids=str)
@pytest.mark.parametrize("order", ["FHW", "HWF", "WFH"])
def test_a_local_mask_stays_local(order, new):
    rows, columns = (blocks_of(GRID.tokens, size) for size in BLOCK)
    gap = ((torch.arange(rows) + 0.5) / rows)[:, None] - (torch.arange(columns) + 0.5) / columns
    layer = LayerPlan((order,), BlockMask.from_dense((gap.abs() <= 0.12)[None, None], BLOCK), (("fp32",),))
    plan = TransformerPlan("Model", 1, 64, GRID, TextSpan(), BLOCK, (Phase(0.0, 1.0),), {"a": layer})
    kept = plan.for_grid(new).layers["a"].mask.dense()[0, 0]
    rows, columns = kept.shape
    gap = ((torch.arange(rows) + 0.5) / rows)[:, None] - (torch.arange(columns) + 0.5) / columns
    assert gap.abs()[kept].max() < 0.3
    assert kept[gap.abs() < 0.5 / columns].double().mean() > 0.9


def test_a_row_whose_old_blocks_lie_elsewhere_keeps_what_is_nearest_among_the_best():
    kept = torch.zeros(1, 1, 4, 8, dtype=torch.bool)
    kept[..., 0] = True
    kept[0, 0, 3] = True  # dense row beside three that keep one block
    grid, block = Grid(1, 8, 8), (16, 8)
    layer = LayerPlan(("FHW",), BlockMask.from_dense(kept, block), (("fp32",),))
    plan = TransformerPlan("Model", 1, 64, grid, TextSpan(), block, (Phase(0.0, 1.0),), {"a": layer})
    found = plan.for_grid(Grid(1, 16, 8)).layers["a"].mask.dense()[0, 0]
    assert found[:6, :2].any(-1).all() and not found[:6, 2:].any()
    assert found[:6].sum(-1).tolist() == [2] * 6 and found[6:].all()


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
        (["--grid", "5x7x16", "--density", "0.2"], "carries the plan as it is"),
    ],
)
def test_a_grid_that_cannot_be_read_or_comes_with_other_wishes_is_refused(words, message, tmp_path, capsys):
    Plan({"transformer": a_plan()}).save_pretrained(tmp_path / "plan")
    assert main(["plan", str(tmp_path / "plan"), "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
