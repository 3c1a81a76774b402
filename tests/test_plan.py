"""Scores, budgets and the plan file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from paroattn.block_mask import BlockMask
from paroattn.capture import BlockStats, CaptureSettings, Statistics
from paroattn.capture.maps import TENSORS
from paroattn.files import writing_folder
from paroattn.grid import CANDIDATES, Grid, Layout, TextSpan
from paroattn.integration.calibrate import needed_by
from paroattn.phases import Phase, phase_at, phases_of
from paroattn.plan.packing import pack, unpack
from paroattn.plan.plan import FOLDER, LayerPlan, Plan, PlanError, TransformerPlan
from paroattn.plan.search import BUDGETS, PlanSettings, make_plan
from paroattn.plan.threshold import select

GRID = Grid(3, 4, 5)
BLOCK = (8, 16)
NQ, NK = 8, 4
HEADS = 3
ORDERS = ("FHW", "WFH", "HWF", "2x2x2")
LEVELS = (0.95, 0.8, 0.5, 0.1)


def _statistics(seed: int = 0, orders: tuple[str, ...] = ORDERS) -> Statistics:
    generator = torch.Generator().manual_seed(seed)

    def sums(scale: float) -> BlockStats:
        blocks = (len(orders), HEADS, NQ, NK)
        mass = torch.rand(blocks, generator=generator).pow(4)
        mass /= mass.sum(-1, keepdim=True)
        error = scale * torch.rand(blocks, generator=generator).pow(6)
        scores = [torch.rand(blocks[:2], generator=generator) for _ in range(2)]
        return BlockStats(mass, error, *scores, torch.tensor(100.0 * scale), 1)

    layers = {name: {level: sums(scale) for level in LEVELS} for name, scale in (("a", 1.0), ("b", 1e4))}
    settings = CaptureSettings(orders=orders, block=BLOCK)
    return Statistics("Model", HEADS, 16, Layout(GRID, TextSpan(6, "prefix")), settings, layers)


def _plan(**changes) -> TransformerPlan:
    return replace(make_plan(_statistics(), PlanSettings(0.4, orders=ORDERS)), **changes)


# Phases


def test_phases_end_between_the_levels_of_the_calibration_schedule():
    phases = phases_of(LEVELS, (0.25, 0.5, 1.0))
    assert [phase.share for phase in phases] == [0.25, 0.25, 0.5]
    assert [phase.lowest_noise for phase in phases] == pytest.approx([0.875, 0.65, 0.0])
    assert [phase_at(phases, level) for level in (1.0, 0.875, 0.87, 0.65, 0.64, 0.0)] == [0, 0, 1, 1, 2, 2]


def test_a_schedule_with_fewer_steps_than_phases_has_fewer_phases():
    assert [phase.share for phase in phases_of((0.9, 0.3), (0.25, 0.5, 0.75, 1.0))] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("levels", "ends"), [((0.5, 0.5), (1.0,)), ((0.9, 0.5), (0.5,)), ((0.9,), (0.6, 0.5, 1.0)), ((), (1,))]
)
def test_schedules_that_do_not_fall_and_ends_that_do_not_rise_to_one_are_refused(levels, ends):
    with pytest.raises(ValueError, match="must"):
        phases_of(levels, ends)


# Search


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("density", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("mask_score", ["mass", "output_error"])
def test_the_density_is_met_but_not_exceeded(budget, density, mask_score):
    plan = make_plan(_statistics(), PlanSettings(density, "output_error", mask_score, budget, ORDERS))
    assert density - 1.5 / (NQ * NK) < plan.density <= density + 1e-6
    if budget == "per_head":
        assert plan.head_density().std() < 1e-9


def test_phases_count_with_their_share_of_the_steps():
    plan = make_plan(_statistics(), PlanSettings(0.5, orders=ORDERS, phase_ends=(0.25, 1.0)))
    by_phase = plan.phase_density()
    assert plan.density == pytest.approx(float(0.25 * by_phase[0] + 0.75 * by_phase[1]))
    assert plan.density == pytest.approx(0.5, abs=0.02) and abs(by_phase[0] - by_phase[1]) > 0.01


def test_every_row_keeps_its_heaviest_block_even_at_the_lowest_density():
    statistics = _statistics()
    plan = make_plan(statistics, PlanSettings(1e-6, orders=ORDERS, phase_ends=(1.0,)))
    for name, layer in plan.layers.items():
        chosen = torch.tensor([ORDERS.index(order) for order in layer.orders])
        heaviest = statistics.mean(name, "mass")[chosen, torch.arange(HEADS)].argmax(-1)
        kept = layer.mask.dense()[0]
        assert kept.sum() == HEADS * NQ
        assert kept.gather(-1, heaviest[..., None]).all()


def test_a_global_threshold_starves_the_layer_with_small_outputs_and_normalising_does_not():
    densities = {}
    for budget in ("global", "layer_normalised"):
        plan = make_plan(_statistics(), PlanSettings(0.5, budget=budget, orders=ORDERS))
        densities[budget] = [float(layer.mask.head_density().mean()) for layer in plan.layers.values()]
    assert densities["global"][0] < 0.3 < 0.7 < densities["global"][1]
    assert densities["layer_normalised"] == pytest.approx([0.5, 0.5], abs=0.1)


def test_the_blocks_kept_are_those_with_the_highest_score_of_the_chosen_order():
    statistics = _statistics()
    plan = make_plan(statistics, PlanSettings(0.5, orders=ORDERS, phase_ends=(0.5, 1.0)))
    kept, dropped = [], []
    for name, layer in plan.layers.items():
        chosen = torch.tensor([ORDERS.index(order) for order in layer.orders])
        for phase, levels in enumerate((LEVELS[:2], LEVELS[2:])):
            score = statistics.mean(name, "error", list(levels))[chosen, torch.arange(HEADS)]
            score = score / statistics.mean(name, "output_power")
            heaviest = statistics.mean(name, "mass", list(levels))[chosen, torch.arange(HEADS)].argmax(-1)
            free = torch.ones_like(score, dtype=torch.bool).scatter(-1, heaviest[..., None], False)
            mask = layer.mask.dense()[phase]
            kept.append(score[mask & free])
            dropped.append(score[~mask])
    assert torch.cat(kept).min() >= torch.cat(dropped).max()


def test_each_order_score_picks_the_order_it_says():
    statistics = _statistics()
    for levels in statistics.layers.values():
        for sums in levels.values():
            sums.error[1] *= 1e-6
            sums.mass[2] = 0
            sums.mass[2, ..., 0] = 1
            sums.sparse_share[:] = torch.tensor([0.1, 0.2, 0.3, 0.9])[:, None]
            sums.incoherence[:] = torch.tensor([9.0, 8.0, 7.0, 2.0])[:, None]
    chosen = {
        score: {
            order
            for layer in make_plan(statistics, PlanSettings(0.5, score, orders=ORDERS)).layers.values()
            for order in layer.orders
        }
        for score in ("none", "output_error", "mass", "paper")
    }
    assert chosen == {"none": {"FHW"}, "output_error": {"WFH"}, "mass": {"HWF"}, "paper": {"2x2x2"}}


def test_orders_outside_the_candidates_are_not_chosen():
    plan = make_plan(_statistics(), PlanSettings(0.5, orders=("FHW", "HWF")))
    assert {order for layer in plan.layers.values() for order in layer.orders} <= {"FHW", "HWF"}
    with pytest.raises(ValueError, match="must hold the orders FHW, HWF; got FHW"):
        make_plan(_statistics(orders=("FHW",)), PlanSettings(0.5, orders=("FHW", "HWF")))


def test_without_candidates_all_measured_orders_are_some():
    measured = ("FHW", "2x2x3")
    plan = make_plan(_statistics(orders=measured), PlanSettings(0.5))
    assert {order for layer in plan.layers.values() for order in layer.orders} <= set(measured)
    chosen = [PlanSettings(order_score=score).orders for score in ("none", "output_error")]
    assert chosen == [None, None]
    captured = [needed_by(PlanSettings(order_score=score)).orders for score in ("none", "output_error")]
    assert captured == [("FHW",), CANDIDATES]


@pytest.mark.parametrize(
    "bad",
    [
        {"density": 0},
        {"density": 1.01},
        {"density": -0.1},
        {"orders": ()},
        {"phase_ends": (0.5,)},
        {"order_score": "x"},
        {"mask_score": "paper"},
        {"budget": "x"},
    ],
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="must"):
        PlanSettings(**bad)


def test_everything_is_kept_at_density_one():
    generator = torch.Generator().manual_seed(0)
    for ends in ((1 / 3, 1.0), (0.1, 0.3, 0.7, 1.0), (0.25, 0.5, 0.75, 1.0)):
        statistics = _statistics(int(torch.randint(99, (), generator=generator)))
        assert make_plan(statistics, PlanSettings(1.0, orders=ORDERS, phase_ends=ends)).density == 1.0


def test_the_papers_score_and_no_reorder_refuse_statistics_that_lack_what_they_need():
    statistics = _statistics()
    statistics.settings = replace(statistics.settings, paper=False)
    with pytest.raises(ValueError, match="paper=True"):
        make_plan(statistics, PlanSettings(0.5, "paper", orders=ORDERS))
    with pytest.raises(ValueError, match="must hold the orders HWF, FHW"):
        make_plan(_statistics(orders=("HWF", "WFH")), PlanSettings(0.5, "none", orders=("HWF",)))


# One threshold without all scores at once


def _sorted(layers, costs, scores, density):
    """What is kept if all scores are sorted: the definition."""
    found = {layer: torch.stack([scores(layer, phase) for phase in range(len(costs))]) for layer in layers}
    flat = torch.cat([score.flatten() for score in found.values()])
    each = torch.tensor(costs)
    cost = torch.cat([each[:, None].expand(-1, score[0].numel()).flatten() for score in found.values()])
    order = flat.argsort(descending=True, stable=True)
    spent = cost[order].cumsum(0)
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[order] = (spent <= (density + 1e-9) * float(cost.sum())) | flat[order].isinf()
    parts = kept.split([score.numel() for score in found.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(found.items(), parts, strict=True)}


SCORES = {
    "all different": lambda drawn: drawn.pow(9),
    "of a few values": lambda drawn: (drawn * 5).round() / 7,
    "all the same": lambda drawn: torch.full_like(drawn, 0.3),
    "nothing": lambda drawn: torch.zeros_like(drawn),
    "mostly nothing": lambda drawn: (drawn - 0.9).clamp_min(0),
    "tiny and huge": lambda drawn: (drawn * 250 - 125).exp2(),
    "alike in their upper bits": lambda drawn: 1 + drawn * 1e-5,
    "minus zero": lambda drawn: torch.where(drawn < 0.5, -0.0, 0.0),
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("density", [1e-6, 0.13, 0.25, 0.5, 0.77, 0.999, 1.0])
@pytest.mark.parametrize("costs", [(1,), (2, 3, 3, 2), (5, 1)])
def test_the_threshold_keeps_what_a_sort_of_all_scores_would(kind, density, costs):
    generator = torch.Generator().manual_seed(len(kind))
    drawn = {
        (layer, phase): torch.rand(3, 7, 11, generator=generator) for layer in "abc" for phase in range(len(costs))
    }

    def scores(layer, phase):
        score = SCORES[kind](drawn[layer, phase])
        return score.scatter(-1, drawn[layer, phase].argmax(-1, keepdim=True), torch.inf)

    expected = _sorted("abc", costs, scores, density)
    found = dict(select("abc", costs, scores, density))
    assert list(found) == list("abc")
    for layer, kept in expected.items():
        assert torch.equal(found[layer], kept), layer


def test_the_threshold_works_on_part_of_the_scores_at_a_time():
    made = []

    def scores(layer, phase):
        made.append((layer, phase))
        return torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(layer))

    found = select(range(3), (1, 1), scores, 0.5)
    next(found)
    assert made == [*((layer, phase) for layer in range(3) for phase in range(2))] * 2 + [(0, 0), (0, 1)]


# Statistics of the chosen orders alone


def _coded(tmp_path, chosen=None) -> tuple[Statistics, Statistics]:
    """Statistics in 8 bits of heads measured in one order each, in a folder; the same ones in memory."""
    generator = torch.Generator().manual_seed(3)
    settings = CaptureSettings(orders=ORDERS, block=BLOCK, codes=True)
    chosen = chosen or {"a": ("WFH", "FHW", "2x2x2"), "b": ("HWF", "HWF", "FHW")}
    layout = Layout(GRID, TextSpan(6, "prefix"))
    kept = Statistics("Model", HEADS, 16, layout, settings, chosen=chosen)
    kept.keep_in(tmp_path / "statistics", list(chosen))

    def measure(*args, order, **settings):
        shape = (1, HEADS, NQ, NK)
        maps = [torch.rand(shape, generator=generator).pow(6) for _ in range(2)]
        return BlockStats(*maps, torch.zeros(1, HEADS), torch.zeros(1, HEADS), torch.rand((), generator=generator), 1)

    x = torch.zeros(1, 66, HEADS, 16)
    for layer in chosen:
        for level in LEVELS:
            kept.add(layer, x, x, x, torch.zeros(HEADS, 16, 20), level, measure)
    memory = replace(
        kept,
        layers={
            layer: {
                level: BlockStats(*(getattr(each, name) for name in TENSORS), calls=each.calls)
                for level, each in levels.items()
            }
            for layer, levels in kept.layers.items()
        },
    )
    return kept, memory


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("density", [0.3, 0.5, 1.0])
def test_statistics_in_a_folder_give_the_plan_that_they_would_in_memory(tmp_path, budget, density):
    kept, memory = _coded(tmp_path)
    plans = [make_plan(each, PlanSettings(density, budget=budget, orders=ORDERS)) for each in (kept, memory)]
    for layer, orders in kept.chosen.items():
        assert plans[0].layers[layer].orders == orders
        assert torch.equal(plans[0].layers[layer].mask.bits, plans[1].layers[layer].mask.bits)
    assert plans[0].density == pytest.approx(density, abs=1.5 / (NQ * NK))


def test_orders_that_calibration_chose_must_be_candidates(tmp_path):
    kept, _ = _coded(tmp_path)
    with pytest.raises(ValueError, match=r"a has 2x2x2 among them; got FHW, WFH, HWF to choose from"):
        make_plan(kept, PlanSettings(0.5, orders=("FHW", "WFH", "HWF")))
    with pytest.raises(ValueError, match=r"a has 2x2x2 among them; got FHW to choose from"):
        make_plan(kept, PlanSettings(0.5, "none", orders=ORDERS))
    with pytest.raises(ValueError, match="calibrate with whole_mass=True"):
        make_plan(kept, PlanSettings(0.5, mask_score="mass", orders=ORDERS))


# The file


def _saved(tmp_path, plan=None):
    return Plan({"transformer": plan or _plan()}).save_pretrained(tmp_path / "plan")


def test_a_plan_survives_save_and_load(tmp_path):
    plan = _plan()
    mixed = tuple(tuple("int8" if head == phase % HEADS else "bf16" for head in range(HEADS)) for phase in range(4))
    plan = replace(plan, layers={name: replace(layer, precision=mixed) for name, layer in plan.layers.items()})
    again = Plan.from_pretrained(_saved(tmp_path, plan))["transformer"]
    for name in ("model_class", "heads", "head_dim", "grid", "text", "block", "phases"):
        assert getattr(again, name) == getattr(plan, name), name
    for name, layer in plan.layers.items():
        assert again.layers[name].orders == layer.orders
        assert again.layers[name].precision == mixed
        assert torch.equal(again.layers[name].mask.dense(), layer.mask.dense())
    assert again.made["settings"]["density"] == 0.4


def test_only_json_safetensors_and_a_card_are_written(tmp_path):
    names = {path.name for path in _saved(tmp_path).rglob("*") if path.is_file()}
    assert names == {"plan.json", "plan.safetensors", "README.md"}
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_a_changed_bit_anywhere_in_the_tensors_is_noticed(tmp_path):
    folder = _saved(tmp_path)
    path = folder / "transformer" / "plan.safetensors"
    blob = path.read_bytes()
    for position in (0, 9, len(blob) // 2, len(blob) - 1):
        path.write_bytes(blob[:position] + bytes([blob[position] ^ 4]) + blob[position + 1 :])
        with pytest.raises(PlanError, match="cut short or changed"):
            Plan.from_pretrained(folder)
    path.write_bytes(blob[:-7])
    with pytest.raises(PlanError, match="cut short or changed"):
        Plan.from_pretrained(folder)
    path.unlink()
    with pytest.raises(PlanError, match=r"no plan\.safetensors"):
        Plan.from_pretrained(folder)


CHANGES = {
    "format_version": (3, "format 3; this paroattn reads formats 1, 2"),
    "grid": ([3, 4, 6], "mask must have"),
    "heads": (4, "mask must have|heads"),
    "block": ("8x20", "beyond the 3 key blocks"),
    "phases": ([{"lowest_noise": 0.0, "share": 1.0}], "mask must have"),
    "text": ({"tokens": 6, "side": "middle"}, "prefix or suffix"),
    "layers": ({}, "different layers"),
    "tensors": ({}, "damaged"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_description_that_does_not_match_its_tensors_is_refused(tmp_path, field):
    value, message = CHANGES[field]
    path = _saved(tmp_path) / "transformer" / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(PlanError, match=message):
        Plan.from_pretrained(tmp_path / "plan")


def test_a_mask_with_an_empty_row_or_stray_bits_is_refused(tmp_path):
    for change, message in ((0x00, "head 1, query block 2 keeps none"), (0x10, "beyond the 4 key blocks")):
        plan = _plan()
        plan.layers["b"].mask.bits[3, 1, 2] = change
        with pytest.raises(PlanError, match=message):
            Plan.from_pretrained(_saved(tmp_path, plan))


def test_an_unknown_order_or_precision_is_refused(tmp_path):
    path = _saved(tmp_path) / "transformer" / "plan.json"
    described = json.loads(path.read_text())
    for key, bad, message in (
        ("orders", "FWX", "an order must be one of"),
        ("precision", ["int9"] * HEADS, "precision must be"),
    ):
        broken = json.loads(json.dumps(described))
        broken["layers"]["a"][key][0] = bad
        path.write_text(json.dumps(broken))
        with pytest.raises(PlanError, match=message):
            Plan.from_pretrained(tmp_path / "plan")


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": 1}'])
def test_a_file_that_is_no_plan_is_refused(tmp_path, text):
    path = _saved(tmp_path) / "transformer" / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=r"JSON|names its format; got none"):
        Plan.from_pretrained(tmp_path / "plan")


def test_a_component_that_the_plan_lacks_is_named_with_those_it_has(tmp_path):
    _saved(tmp_path)
    plan = Plan.from_pretrained(tmp_path / "plan")
    with pytest.raises(KeyError, match="one of the plan's, transformer; got 'transformer_3'"):
        plan["transformer_3"]
    assert "transformer_3" not in plan and plan.get("transformer_3") is None


def test_a_folder_without_a_plan_and_an_unknown_id_are_refused(tmp_path):
    with pytest.raises(PlanError, match="holds no plan"):
        Plan.from_pretrained(tmp_path)
    with pytest.raises(PlanError, match="neither a folder nor a plan"):
        Plan.from_pretrained("nobody/nothing-of-this-name")


def test_saving_fails_before_writing_where_it_must_not_or_cannot_write(tmp_path):
    plan = Plan({"transformer": _plan()})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds something else"):
        plan.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "transformer").mkdir()
    with pytest.raises(FileExistsError, match=r"holds something else \(thesis\.txt\)"):
        plan.save_pretrained(tmp_path / "mine")
    with pytest.raises(FileExistsError, match="is a file"):
        plan.save_pretrained(tmp_path / "mine" / "thesis.txt")
    with pytest.raises(PermissionError, match="cannot be written"):
        plan.save_pretrained(tmp_path / "mine" / "thesis.txt" / "plan")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_failure_while_writing_leaves_the_old_plan_and_nothing_half_written(tmp_path):
    folder = _saved(tmp_path)
    before = (folder / "transformer" / "plan.json").read_text()
    with pytest.raises(KeyError), writing_folder(folder, FOLDER) as scratch:
        (scratch / "half").write_text("written")
        raise KeyError("the disk is full")
    assert (folder / "transformer" / "plan.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_the_old_plan_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    folder, rename = _saved(tmp_path), Path.rename

    def failing(self, target):
        if self.name == "new":
            raise OSError("no space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no space left"):
        _saved(tmp_path, make_plan(_statistics(), PlanSettings(0.9, orders=ORDERS)))
    assert Plan.from_pretrained(folder)["transformer"].made["settings"]["density"] == 0.4
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_saving_over_a_plan_replaces_it(tmp_path):
    _saved(tmp_path)
    folder = _saved(tmp_path, make_plan(_statistics(), PlanSettings(0.9, orders=ORDERS)))
    assert Plan.from_pretrained(folder)["transformer"].made["settings"]["density"] == 0.9


def test_large_plans_are_packed_and_come_back_bit_by_bit(tmp_path, monkeypatch):
    plain = _saved(tmp_path / "plain")
    monkeypatch.setattr("paroattn.plan.folder.PACKED_FROM", 1)
    packed = _saved(tmp_path / "packed")
    versions = [
        json.loads((each / "transformer" / "plan.json").read_text())["format_version"] for each in (plain, packed)
    ]
    assert versions == [1, 2]
    one, two = (Plan.from_pretrained(each)["transformer"] for each in (plain, packed))
    for name, layer in one.layers.items():
        assert torch.equal(two.layers[name].mask.bits, layer.mask.bits)
        assert len(layer.mask.bits) > 1 and not torch.equal(layer.mask.bits[0], layer.mask.bits[1])


def test_masks_that_change_little_from_phase_to_phase_take_little_space():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(256, (1, 3, 64, 8), generator=generator, dtype=torch.uint8).repeat(4, 1, 1, 1)
    bits[2:, 1, 5, 3] ^= 4
    packed = pack({"a": bits})["a"]
    assert torch.equal(unpack(packed, bits.shape), bits)
    assert packed.numel() < 1.1 * bits[0].numel()


# Fit


SIZES = {"a": (HEADS, 16), "b": (HEADS, 16)}


def test_a_plan_fits_the_model_it_was_made_for():
    _plan().check_fits("Model", SIZES)


@pytest.mark.parametrize(
    ("model_class", "layers", "message"),
    [
        ("Other", SIZES, "made for Model; this model is Other"),
        ("Model", SIZES | {"c": (HEADS, 16)}, "2 layers and the model 3; they differ at c"),
        ("Model", {"a": (HEADS, 16)}, "2 layers and the model 1; they differ at b"),
        ("Model", SIZES | {"b": (HEADS + 1, 16)}, "b: the plan has 3 heads of dimension 16, the model 4 of 16"),
        ("Model", SIZES | {"b": (HEADS, 32)}, "the model 3 of 32"),
    ],
)
def test_a_plan_for_another_model_is_refused_with_both_sides_and_a_remedy(model_class, layers, message):
    with pytest.raises(PlanError, match=message) as error:
        _plan().check_fits(model_class, layers)
    assert "paro calibrate" in str(error.value)


def test_a_plan_that_contradicts_itself_cannot_be_made():
    plan = _plan()
    layer = plan.layers["a"]
    with pytest.raises(PlanError, match="falling noise levels"):
        _plan(phases=(Phase(0.5, 0.5), Phase(0.6, 0.25), Phase(0.1, 0.125), Phase(0.0, 0.125)))
    with pytest.raises(PlanError, match="3 heads need 3 orders; got 2"):
        _plan(layers={"a": LayerPlan(layer.orders[:2], layer.mask, layer.precision)})
    with pytest.raises(PlanError, match="mask must have"):
        _plan(layers={"a": replace(layer, mask=BlockMask(layer.mask.bits[:, :2], layer.mask.key_blocks, BLOCK))})
    with pytest.raises(PlanError, match="components among"):
        Plan({"unet": plan})
