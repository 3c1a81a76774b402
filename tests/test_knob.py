"""One knob: a density, an error or a speed-up, and the curve that they are points of."""

import json
import math
from dataclasses import replace

import pytest
import torch

from paroattn.capture import BlockStats, CaptureSettings, Statistics
from paroattn.evaluation.curve_page import write_curves
from paroattn.evaluation.plan_page import write_plan
from paroattn.grid import Grid, Layout, TextSpan
from paroattn.plan import cost, search
from paroattn.plan.card import model_card
from paroattn.plan.cost import Call, TimeUnknown, kept_blocks, rates_of, saved_by_four_bits
from paroattn.plan.curve import Curve, OutOfReach, Prices, curve_of, error_of
from paroattn.plan.plan import Plan
from paroattn.plan.search import Draft, PlanSettings, make_plan, predicted_error
from paroattn.plan.threshold import Tally, tally
from paroattn.plan.workloads import known_model

GRID, HEADS, BLOCK = Grid(5, 45, 80), 2, (128, 128)
LEVELS = (0.9, 0.3)
LAYERS = ("blocks.0.attn1", "blocks.1.attn1")
WAN = "WanTransformer3DModel"
QUICK = {"precision": "int8/fp8", "orders": ("FHW", "HWF")}


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    """Errors over many orders of magnitude; layers and heads differ, and one order is better for one head."""
    generator = torch.Generator().manual_seed(0)
    blocks = -(-GRID.tokens // BLOCK[0])
    shape = (2, HEADS, blocks, blocks)

    def sums(scale: float) -> BlockStats:
        mass = torch.rand(shape, generator=generator)
        error = scale * torch.rand(shape, generator=generator).pow(12)
        error[:, 1] *= 0.1
        error[1, 0] *= 0.5
        scores = torch.zeros(2, HEADS)
        return BlockStats(mass, error, scores, scores, torch.tensor(1e5 * scale), 1)

    layers = {name: {level: sums(1.0 + 2 * level) for level in LEVELS} for name in LAYERS}
    settings = CaptureSettings(orders=("FHW", "HWF"), block=BLOCK)
    weights = {level: 1000 * level for level in LEVELS}
    return Statistics(WAN, HEADS, 128, Layout(GRID), settings, layers, level_weights=weights)


def rounded(statistics: Statistics) -> Statistics:
    """The same with what INT8 and INT4 cost each head: least in the second, and more at high noise."""
    costs = torch.tensor([[1e-5, 2e-6], [4e-4, 3e-5]], dtype=torch.float64)
    layers = {
        name: {level: replace(sums, rounding=costs * float(sums.output_power) * (1 + row) * (0.5 + level))
               for level, sums in levels.items()}
        for row, (name, levels) in enumerate(statistics.layers.items())
    }  # fmt: skip
    return replace(statistics, layers=layers)


def _predicted(plan) -> dict:
    curve = curve_of(plan.made)
    assert curve is not None
    return curve["chosen"]


# Targets


def test_one_target_is_given_and_a_density_of_a_quarter_is_none():
    assert PlanSettings().density == 0.25 and PlanSettings(error=0.1).density is None
    for two in ({"density": 0.3, "error": 0.1}, {"error": 0.1, "speedup": 2.0}, {"density": 0.3, "speedup": 2.0}):
        with pytest.raises(ValueError, match=f"got {' and '.join(two)}"):
            PlanSettings(**two)
    assert PlanSettings(speedup=1.5, precision="int8").at(0.3) == PlanSettings(0.3, precision="int8")


@pytest.mark.parametrize(
    "bad",
    [
        {"error": 0.0},
        {"speedup": -1.0},
        {"error": float("inf")},
        {"error": 0.1, "budget": "per_head"},
        {"speedup": 2.0, "budget": "per_head"},
        {"error": 0.1, "mask_score": "mass"},
        {"error": 0.1, "budget": "global"},
    ],
)
def test_targets_that_mean_nothing_are_refused(bad):
    with pytest.raises(ValueError, match=r"must|needs"):
        PlanSettings(**bad)


@pytest.mark.parametrize("error", [1e-3, 0.05, 4.0])
def test_a_target_error_is_met_by_the_plan_itself_and_hardly_undercut(statistics, error):
    settings = PlanSettings(error=error, **QUICK)
    plan = make_plan(statistics, settings)
    found = float(predicted_error(statistics, plan, settings.at(plan.density)).sum())
    assert found == pytest.approx(error, rel=0.01)
    assert _predicted(plan)["error"] == pytest.approx(found, rel=0.01)
    assert _predicted(plan)["density"] == pytest.approx(plan.density, abs=1e-5)


def test_an_error_can_be_given_as_decibels():
    assert error_of(30) == pytest.approx(1e-3)
    curve = Curve(Tally((1,), _counts([(0.01, 1), (4.0, 1)])), (1.0,), of_sample=True)
    assert curve.at(0.5).snr_db == pytest.approx(20, abs=0.02) and curve.at(1.0).snr_db is None


def test_smaller_errors_take_more_blocks_and_larger_speed_ups_fewer(statistics):
    curve = Draft(statistics, PlanSettings(**QUICK)).curve
    assert curve is not None
    by_error = [curve.density_at_error(10.0**power) for power in range(-6, 1)]
    assert by_error == sorted(by_error, reverse=True) and by_error[0] > by_error[-1]
    slowest, fastest = curve.at(1.0).speedup, curve.at(curve.lowest).speedup
    aims = torch.linspace(slowest, fastest, 9, dtype=torch.float64).tolist()
    by_speed = [curve.density_at_speedup(aim) for aim in aims]
    assert by_speed == sorted(by_speed, reverse=True) and by_speed[0] == pytest.approx(1)
    assert [curve.at(density).speedup for density in by_speed] == pytest.approx(aims, rel=1e-6)


def test_a_target_speed_up_is_that_of_the_cost_model_for_the_kept_blocks(statistics):
    plan = make_plan(statistics, PlanSettings(speedup=1.3, **QUICK))
    rates, call = rates_of("NVIDIA H200"), Call(GRID.tokens, HEADS, 128)
    model = known_model(WAN, HEADS, 128, len(LAYERS))
    around, dense = len(LAYERS) * rates.around_ms(model, GRID.tokens), len(LAYERS) * rates.dense_ms(call)
    sparse = sum(
        phase.share * rates.sparse_ms(call, kept_blocks(Layout(GRID), BLOCK, density.tolist()), BLOCK, "int8/fp8")
        for layer in plan.layers.values()
        for phase, density in zip(plan.phases, layer.mask.head_density(), strict=True)
    )
    assert (dense + around) / (sparse + around) == pytest.approx(1.3, rel=1e-3)
    assert _predicted(plan)["speedup"] == pytest.approx(1.3, rel=1e-3)


def test_orders_are_those_of_the_density_that_meets_the_target(statistics):
    plan = make_plan(statistics, PlanSettings(error=1.0, **QUICK))
    again = make_plan(statistics, PlanSettings(_predicted(plan)["density"], **QUICK))
    for name, layer in plan.layers.items():
        assert layer.orders == again.layers[name].orders == ("HWF", layer.orders[1])
        changed = layer.mask.bits ^ again.layers[name].mask.bits
        assert int(changed.bool().sum()) <= 1


def test_what_cannot_be_reached_is_refused_with_the_range_and_the_remedy(statistics):
    with pytest.raises(OutOfReach, match=r"must be at most \d+.*dB\), which is predicted.*got 1e\+06.*Ask"):
        make_plan(statistics, PlanSettings(error=1e6, **QUICK))
    for speedup in (1.0, 50.0):
        with pytest.raises(OutOfReach, match=rf"on NVIDIA H200 must be 1\.\d\d….*int8/fp8.*got {speedup:g}\. Ask"):
            make_plan(statistics, PlanSettings(speedup=speedup, **QUICK))


def test_a_speed_up_needs_times_that_are_known_and_the_rest_does_not(statistics):
    with pytest.raises(TimeUnknown, match=r"times: times on NVIDIA H200 are known for.*got fp32/fp32"):
        make_plan(statistics, PlanSettings(speedup=1.3, orders=("FHW",)))
    with pytest.raises(TimeUnknown, match=r"what is around attention must be known.*got Model.*density or an error"):
        make_plan(replace(statistics, model_class="Model"), PlanSettings(speedup=1.3, **QUICK))
    plan = make_plan(replace(statistics, model_class="Model"), PlanSettings(error=0.1, **QUICK))
    assert _predicted(plan)["attention_speedup"] > 1 and _predicted(plan)["speedup"] is None
    plan = make_plan(statistics, PlanSettings(error=0.1, orders=("FHW",)))
    assert _predicted(plan)["attention_ms"] is None


def test_without_sensitivity_the_error_is_that_of_attention_as_a_mean_over_layers(statistics):
    plain = replace(statistics, level_weights={})
    settings = PlanSettings(error=0.005, **QUICK)
    plan = make_plan(plain, settings)
    curve = curve_of(plan.made)
    assert curve is not None and curve["error_of"] == "attention"
    found = predicted_error(plain, plan, settings.at(plan.density)).sum() / len(LAYERS)
    assert float(found) == pytest.approx(0.005, rel=0.01)


def test_the_same_statistics_and_target_give_the_same_plan(statistics):
    one, other = (make_plan(statistics, PlanSettings(error=0.3, **QUICK)) for _ in range(2))
    assert one.made == other.made
    for name, layer in one.layers.items():
        assert torch.equal(layer.mask.bits, other.layers[name].mask.bits)


def test_a_density_takes_three_looks_at_the_scores_of_each_layer_and_phase(statistics, monkeypatch):
    seen, ranked = [], search.Ranking.ranked
    monkeypatch.setattr(search.Ranking, "ranked", lambda maps, *place: seen.append(place) or ranked(maps, *place))
    make_plan(statistics, PlanSettings(0.3, **QUICK))
    assert len(seen) == 3 * len(LAYERS) * len(LEVELS) and len(set(seen)) == len(LAYERS) * len(LEVELS)


# Heads


def test_heads_that_need_it_stay_dense_and_heads_that_hold_nothing_keep_one_block_per_row(statistics):
    layers = {
        name: {level: BlockStats(**{**vars(sums), "error": sums.error.clone()}) for level, sums in levels.items()}
        for name, levels in statistics.layers.items()
    }
    for sums in layers[LAYERS[0]].values():
        sums.error[:, 0], sums.error[:, 1] = 1e3, 0.0
    plan = make_plan(replace(statistics, layers=layers), PlanSettings(0.4, **QUICK))
    needs, holds = plan.layers[LAYERS[0]].mask.dense().unbind(1)
    assert needs.all()
    assert (holds.sum(-1) == 1).all()
    assert plan.density == pytest.approx(0.4, abs=1e-3)


# The curve


def _counts(scores) -> torch.Tensor:
    """A tally of one layer and phase."""
    made = torch.tensor([score for score, count in scores for _ in range(count)])
    return tally(["a"], (1,), lambda layer, phase: made.clone()).counts


def test_the_curve_drops_the_smallest_scores_first_and_never_those_that_are_certain():
    curve = Curve(Tally((1,), _counts([(0.0, 4), (1.0, 2), (3.0, 1), (torch.inf, 1)])), (1.0,), of_sample=True)
    assert curve.lowest == 1 / 8
    errors = [curve.at(density).error for density in (1.0, 0.5, 0.375, 0.25, 0.125, 0.01)]
    assert errors == pytest.approx([0, 0, 1, 2, 5, 5], rel=4e-3)
    assert curve.at(0.4375).error == pytest.approx(0.5, rel=4e-3)  # half of a block
    assert curve.density_at_error(1.5) == pytest.approx(0.3125, abs=1e-3)
    assert [point.density for point in curve.points((0.33,))].count(0.33) == 1


def test_phases_count_with_their_steps_in_density_and_with_their_share_in_error():
    counts = torch.cat([_counts([(1.0, 2), (8.0, 2)]), _counts([(2.0, 4)])], 1)
    curve = Curve(Tally((3, 1), counts), (0.75, 0.25), of_sample=True)
    assert curve.at(1 - 6 / 16).error == pytest.approx(0.75 * 2, rel=4e-3)
    assert curve.at(1 - 10 / 16).error == pytest.approx(0.75 * 2 + 0.25 * 8, rel=4e-3)


def test_a_layer_that_dense_attention_serves_faster_counts_as_dense():
    layout, call = Layout(Grid(1, 64, 64), TextSpan(512, "prefix")), Call(4608, 24, 128)
    prices = Prices.of("NVIDIA H200", layout, call, (128, 128), "bf16", None)
    every = torch.tensor([[24 * 32 * 32], [24 * 32 * 32 // 10]])
    one = torch.ones(1, dtype=torch.float64)
    dense, sparse = prices.attention_ms(every[:1], one), prices.attention_ms(every[1:], one)
    assert float(dense) == prices.dense_ms() < float(prices.sparse_ms(every[0]))
    assert float(sparse) == float(prices.sparse_ms(every[1])) < prices.dense_ms()


def test_a_plan_holds_its_curve_as_plain_values(statistics):
    plan = make_plan(statistics, PlanSettings(0.4, **QUICK))
    curve = curve_of(plan.made)
    assert curve is not None and json.loads(json.dumps(curve, allow_nan=False)) == curve
    densities = [point["density"] for point in curve["points"]]
    assert densities == sorted(densities, reverse=True) and densities[0] == 1.0
    for key, rising in (("error", True), ("attention_ms", False), ("speedup", True)):
        values = [point[key] for point in curve["points"]]
        assert values == sorted(values, reverse=not rising), key
    assert curve["chosen"]["density"] == pytest.approx(0.4)
    assert curve_of(make_plan(statistics, PlanSettings(0.4, budget="per_head", **QUICK)).made) is None


# Pages


def test_the_page_has_a_picture_and_the_chosen_point_in_bold(statistics, tmp_path):
    plan = make_plan(statistics, PlanSettings(error=0.05, **QUICK))
    page = write_plan({"transformer": plan}, tmp_path / "plan.html").read_text()
    density, snr = _predicted(plan)["density"], -10 * math.log10(0.05)
    assert page.count("<polyline") == page.count("<circle") == 2
    assert f"<strong>{density:.3f}</strong>" in page and f"<strong>{snr:.1f}</strong>" in page
    assert "Density, error and time" in page and "predicted to lose and to take. The error" in page
    assert "of the finished sample" in page and "NVIDIA H200" in page and "nan" not in page
    without = replace(plan, made={})
    assert "<svg" not in write_plan({"transformer": without}, tmp_path / "without.html").read_text()


def test_the_model_card_says_what_is_predicted_in_a_sentence(statistics):
    card = model_card(Plan({"transformer": make_plan(statistics, PlanSettings(error=0.01, **QUICK))}))
    (line,) = [line for line in card.splitlines() if line.startswith("Predicted, not measured")]
    assert "of the finished sample 20.0 dB; faster than dense on an NVIDIA H200: attention 2." in line
    assert '"points"' not in card and '"error": 0.01' in card
    bare = model_card(Plan({"transformer": make_plan(statistics, PlanSettings(0.4, budget="per_head", **QUICK))}))
    assert "Predicted" not in bare


def test_a_curve_without_times_says_why(statistics, tmp_path):
    curve = curve_of(make_plan(statistics, PlanSettings(0.4, orders=("FHW",))).made)
    page = write_curves({"transformer": curve, "transformer_2": curve}, tmp_path / "curve.html").read_text()
    assert page.count("<polyline") == 2 and "got fp32/fp32" in page and "faster" not in page
    assert "Density and error – transformer_2" in page and "predicted to lose. The error" in page
    with pytest.raises(ValueError, match=r"\.html or \.json; got 'curve.pdf'"):
        write_curves({"transformer": curve}, tmp_path / "curve.pdf")


# Precision by head

AUTO = {"precision": "auto", "orders": ("FHW", "HWF")}


def in_int4(plan) -> torch.Tensor:
    """(layers, heads), the same in every phase."""
    for layer in plan.layers.values():
        assert len(set(layer.precision)) == 1 and set(layer.precision[0]) <= {"int4", "int8"}
    return torch.tensor([[name == "int4" for name in layer.precision[0]] for layer in plan.layers.values()])


def rounding_of(statistics: Statistics) -> torch.Tensor:
    """Error of INT8 and INT4 in every head, (2, layers, heads): weights times errors over the layer's power."""
    found = torch.zeros(2, len(LAYERS), HEADS, dtype=torch.float64)
    for row, levels in enumerate(statistics.layers.values()):
        power = sum(float(sums.output_power) for sums in levels.values()) / len(levels)
        for level, sums in levels.items():
            found[:, row] += statistics.level_weights[level] * sums.rounding / power / len(levels)
    return found


def test_a_head_is_in_int4_where_dropping_as_many_blocks_would_cost_more(statistics):
    statistics, shares = rounded(statistics), []
    eight, four = rounding_of(statistics)
    for density in (0.9, 0.4, 0.3, 0.2, 0.05):
        draft = Draft(statistics, PlanSettings(density, gpu="sm_89", **AUTO))
        masks = dict(draft.masks())
        dropped = [
            draft._ranking.ranked(name, phase)[~kept].max() for name in LAYERS for phase, kept in enumerate(masks[name])
        ]
        of_steps = torch.tensor([phase.share for phase in draft.phases], dtype=torch.float64)
        blocks = torch.stack([masks[name].sum((1, 2, 3)) for name in LAYERS]).double() @ of_steps / HEADS
        pays = four - eight < float(max(dropped)) * 0.5 * blocks[:, None]
        assert torch.equal(draft.in_four_bits(), pays), density
        shares.append(float(pays.double().mean()))
    assert shares == sorted(shares) and shares[0] < shares[-1] and len(set(shares)) > 2


def test_the_predicted_error_counts_what_rounding_costs(statistics):
    statistics = rounded(statistics)
    eight, four = rounding_of(statistics)
    for settings in (PlanSettings(0.3, gpu="sm_80", **AUTO), PlanSettings(0.3, int4_share=0.5, **AUTO),
                     PlanSettings(0.3, precision="int4", orders=("FHW", "HWF"))):  # fmt: skip
        plan = make_plan(statistics, settings)
        rounding = torch.where(in_int4(plan), four, eight).sum()
        expected = float(predicted_error(statistics, plan, settings).sum() + rounding)
        assert _predicted(plan)["error"] == pytest.approx(expected, rel=0.02)
        assert expected > 1.05 * float(predicted_error(statistics, plan, settings).sum())
        assert _predicted(plan)["heads_int4"] == pytest.approx(float(in_int4(plan).double().mean()))


def test_a_target_error_is_shared_by_blocks_and_rounding(statistics):
    statistics = rounded(statistics)
    error = _predicted(make_plan(statistics, PlanSettings(0.3, gpu="sm_86", **AUTO)))["error"]
    found = make_plan(statistics, PlanSettings(error=error, gpu="sm_86", **AUTO))
    assert found.density == pytest.approx(0.3, abs=0.01) and in_int4(found).any()
    for_int8 = Draft(statistics, PlanSettings(error=error, **AUTO))
    assert not for_int8.in_four_bits().any() and for_int8.density < found.density
    least = float(rounding_of(statistics)[1].sum())
    for_int4 = Draft(statistics, PlanSettings(error=error + least, precision="int4", orders=("FHW", "HWF")))
    assert for_int4.density == pytest.approx(Draft(statistics, PlanSettings(error=error, **QUICK)).density, abs=1e-4)
    with pytest.raises(OutOfReach, match=f"at least {least:.3g} .* rounding alone"):
        make_plan(statistics, PlanSettings(error=least / 2, precision="int4", orders=("FHW", "HWF")))


@pytest.mark.parametrize("gpu", ["NVIDIA H200", "sm_90", "sm_120"])
def test_where_int4_saves_no_time_every_head_is_in_int8_and_the_plan_says_so(statistics, gpu):
    plan = make_plan(rounded(statistics), PlanSettings(0.05, gpu=gpu, **AUTO))
    assert not in_int4(plan).any()
    assert plan.made["precision"] == {
        "int4_share": 0.0, "why": f"INT4 saves no time on {gpu}: every head is in INT8"
    }  # fmt: skip
    found = {}
    for weight in (None, 0.1):
        made = make_plan(
            replace(rounded(statistics), rounding_weight=weight), PlanSettings(0.2, gpu="sm_89", **AUTO)
        ).made
        found[weight] = made["precision"]
        assert made["precision"]["why"].startswith(
            f"{made['precision']['int4_share']:.0%} of the heads are in INT4, of "
        )
    assert found[None]["int4_share"] < found[0.1]["int4_share"]
    assert found[None]["why"].endswith("it may be more") and found[0.1]["why"].endswith("0.50 of its time on sm_89")
    assert saved_by_four_bits("sm_86", 128, BLOCK) == 0.5 > saved_by_four_bits(gpu, 128, BLOCK) == 0.0


def test_a_share_of_the_heads_is_that_of_those_that_lose_least(statistics):
    statistics = rounded(statistics)
    added = rounding_of(statistics).diff(dim=0)[0].flatten()
    for count in (0, 1, 3, 4):
        chosen = Draft(statistics, PlanSettings(0.3, int4_share=count / 4, **AUTO)).in_four_bits().flatten()
        assert chosen.sum() == count
        assert count in (0, 4) or added[chosen].max() < added[~chosen].min()
    plan = make_plan(statistics, PlanSettings(0.3, int4_share=0.75, **AUTO))
    assert plan.precision_shares() == pytest.approx({"int4": 0.75, "int8": 0.25})
    assert list(plan.precision_shares()) == ["int4", "int8"] and plan.made["precision"]["int4_share"] == 0.75


def test_times_that_were_measured_decide_and_count(statistics, monkeypatch):
    """A GPU on which a block of INT4 takes a quarter less: plans are faster by that and no more."""
    rates = rates_of("NVIDIA H200")
    eight = rates.kernel(128, BLOCK, "int8")
    for share, taken in ((1.1, 0.0), (0.96, 0.0), (0.94, 0.06), (0.75, 0.25)):  # less than 5 % would not pay
        four = replace(eight, block_ns=share * eight.block_ns)
        measured = replace(rates, gpu="sm_86", kernels={**rates.kernels, (128, "int4/int4", BLOCK): four})
        monkeypatch.setattr(cost, "_packaged", lambda measured=measured: {"sm_86": measured})
        assert saved_by_four_bits("sm_86", 128, BLOCK) == pytest.approx(taken)
    mixed, statistics = AUTO | {"gpu": "sm_86"}, rounded(statistics)
    drafts = [Draft(statistics, PlanSettings(0.3, int4_share=share, **mixed)) for share in (0, 1)]
    slow, fast = (draft.curve.at(0.3).attention_ms for draft in drafts if draft.curve)
    assert slow is not None and fast is not None
    blocks = 0.3 * len(LAYERS) * HEADS * 142**2 * eight.block_ns * 1e-6
    assert slow - fast == pytest.approx(0.25 * blocks, rel=0.05)
    assert Draft(statistics, PlanSettings(0.1, **mixed)).in_four_bits().any()


def test_statistics_without_rounding_are_refused_where_it_decides(statistics):
    again = "must hold what INT4 costs each head.* Calibrate again"
    for settings in (AUTO, AUTO | {"int4_share": 0.5}, {"precision": "int4", "error": 0.1}):
        with pytest.raises(ValueError, match=again):
            make_plan(statistics, PlanSettings(**settings))
    assert _predicted(make_plan(statistics, PlanSettings(precision="int4")))["heads_int4"] is None
    one_level = {name: dict(list(levels.items())[:1]) for name, levels in rounded(statistics).layers.items()}
    mixed = {name: {**statistics.layers[name], **levels} for name, levels in one_level.items()}
    with pytest.raises(ValueError, match=again):
        make_plan(replace(statistics, layers=mixed), PlanSettings(**AUTO))


@pytest.mark.parametrize(
    "bad",
    [
        {"int4_share": 0.5},
        {"precision": "int8", "int4_share": 0.5},
        {"precision": "auto", "int4_share": 1.5},
        {"precision": "auto", "budget": "per_head"},
        {"precision": "auto", "mask_score": "mass"},
    ],
)
def test_mixtures_that_mean_nothing_are_refused(bad):
    with pytest.raises(ValueError, match=r"int4_share must be 0…1|precision auto needs blocks scored by output_error"):
        PlanSettings(**bad)
