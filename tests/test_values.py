"""Values of blocks: predicted, corrected by what was seen, and the masks that they make."""

import pytest
import torch

from paroattn.block_mask import BlockMask
from paroattn.grid import Grid, TextSpan
from paroattn.phases import Phase
from paroattn.plan.plan import LayerPlan, TransformerPlan
from paroattn.plan.values import OWN, BlockValues, _positive

LAYERS, HEADS, ROWS = ("blocks.0", "blocks.1"), 2, 4
PHASES = (Phase(0.5, 0.5), Phase(0.0, 0.5))
UNIT = 7.0
KEPT = (6, 3)  # blocks of each head and phase above the diagonal's


def predicted(name: str, phase: int) -> torch.Tensor:
    """Other numbers everywhere; the diagonal is kept in any case."""
    generator = torch.Generator().manual_seed(10 * LAYERS.index(name) + phase)
    score = torch.rand(HEADS, ROWS, ROWS, generator=generator) + 0.1
    return score.masked_fill(torch.eye(ROWS, dtype=torch.bool), torch.inf)


def made_plan() -> TransformerPlan:
    layers = {}
    for name in LAYERS:
        masks = torch.stack([predicted(name, phase) for phase in range(2)])
        for phase, count in enumerate(KEPT):
            flat = masks[phase].flatten(1)
            flat[:] = torch.zeros_like(flat).scatter_(1, flat.topk(ROWS + count).indices, 1)
        mask = BlockMask.from_dense(masks.bool(), (16, 16))
        layers[name] = LayerPlan(("FHW", "HWF"), mask, (("fp32",) * HEADS,) * 2)
    return TransformerPlan(
        "WanTransformer3DModel", HEADS, 8, Grid(1, 8, 8), TextSpan(), (16, 16), PHASES, layers, {"settings": {}}
    )


def kept_of(plan, name: str, phase: int) -> torch.Tensor:
    return plan.layers[name].mask[phase].dense()


def seen(plan, changes=(), phases=(0, 1)) -> dict:
    """Presences that make every value the same multiple of its prediction, in other units than the predictions."""
    found = {}
    for name in LAYERS:
        for phase in phases:
            own = predicted(name, phase)
            own = own.masked_fill(own.isinf(), 0)
            found[name, phase] = torch.where(kept_of(plan, name, phase), -UNIT, -2 * UNIT) * own
    for (name, phase, *at), value in changes:
        found[name, phase][tuple(at)] = value
    return found


def off(before, after) -> dict:
    """Which blocks came (+1) and went (-1)."""
    moved = {}
    for name in LAYERS:
        for phase in range(2):
            change = kept_of(after, name, phase).int() - kept_of(before, name, phase).int()
            moved |= {(name, phase, *at.tolist()): int(change[tuple(at)]) for at in change.nonzero()}
    return moved


def place(plan, kept: bool, phase: int, largest: bool):
    """The kept or dropped block of a phase with the largest or smallest prediction."""
    found = {}
    for name in LAYERS:
        score = predicted(name, phase)
        mine = (kept_of(plan, name, phase) == kept) & score.isfinite()
        found |= {(name, phase, *at): float(score[tuple(at)]) for at in mine.nonzero().tolist()}
    return (max if largest else min)(found, key=found.__getitem__)


def test_masks_stay_where_the_prediction_was_right():
    values = BlockValues(made_plan(), predicted)
    first = values.plan
    values.learn(seen(first), 1.0)
    balanced = values.plan
    assert off(first, balanced), "this plan has the same count in each head, values one threshold for each phase"
    for _ in range(2):
        values.learn(seen(values.plan), 1.0)
        assert off(balanced, values.plan) == {}
    assert values.rounds == 3


def test_a_dropped_block_that_the_error_cries_for_replaces_the_least_valuable_one():
    values = BlockValues(made_plan(), predicted)
    for _ in range(3):
        values.learn(seen(values.plan), 0.5)
    before = values.plan
    wanted = place(before, kept=False, phase=1, largest=False)
    values.learn(seen(before, [(wanted, -1000.0)]), 1.0)
    moved = off(before, values.plan)
    gone = [where for where, change in moved.items() if change == -1]
    assert moved[wanted] == 1 and sum(moved.values()) == 0
    assert {phase for _, phase, *_ in moved} == {1}, "the other phase has a density of its own"
    assert gone == [place(before, kept=True, phase=1, largest=False)]


def test_a_kept_block_that_only_harms_goes():
    values = BlockValues(made_plan(), predicted)
    for _ in range(3):
        values.learn(seen(values.plan), 0.5)
    before = values.plan
    harmful = place(before, kept=True, phase=0, largest=True)
    values.learn(seen(before, [(harmful, 1000.0)]), 1.0)
    moved = off(before, values.plan)
    assert moved.pop(harmful) == -1 and list(moved.values()) == [1]


def test_densities_of_phases_and_what_is_always_kept_stay():
    values = BlockValues(made_plan(), predicted)
    before = values.plan.phase_density()
    for number in range(4):
        noise = {key: torch.randn_like(found) * 100 + number for key, found in seen(values.plan).items()}
        values.learn(noise, 0.7)
    assert values.plan.phase_density().tolist() == before.tolist() and before[0] > before[1]
    diagonal = torch.eye(ROWS, dtype=torch.bool)
    assert all(kept_of(values.plan, name, phase)[:, diagonal].all() for name in LAYERS for phase in range(2))
    assert values.plan.layers["blocks.0"].orders == ("FHW", "HWF")


def test_a_phase_that_did_not_run_keeps_its_masks():
    values = BlockValues(made_plan(), predicted)
    first = values.plan
    values.learn({key: torch.randn_like(x) * 1e4 for key, x in seen(first, phases=(1,)).items()}, 1.0)
    moved = off(first, values.plan)
    assert moved and {phase for _, phase, *_ in moved} == {1}


def test_small_steps_remember_the_prediction():
    first = made_plan()
    wanted = place(first, kept=False, phase=0, largest=False)
    effects = []
    for step in (1e-4, 1.0):
        values = BlockValues(first, predicted)
        values.learn(seen(first, [(wanted, -50.0)]), step)
        effects.append(off(first, values.plan).get(wanted, 0))
    assert effects == [0, 1]


def test_a_dropped_block_counts_half_its_prediction_against_it():
    """Value = effect − half the prediction, in units in which dropped blocks' effects are twice their predictions."""
    values = BlockValues(made_plan(), predicted)
    values.learn(seen(values.plan), 1.0)
    name, phase, *at = place(made_plan(), kept=False, phase=0, largest=True)
    expected = (2 - OWN) * UNIT * predicted(name, phase)[tuple(at)]
    assert values._values[name, phase][tuple(at)] == pytest.approx(float(expected), rel=1e-5)


def test_values_of_both_signs_become_positive_scores_in_the_same_order():
    values = torch.tensor([-1e6, -3.0, -1e-6, 0.0, 1e-6, 0.5, 1e6])
    scores = _positive(values, 2.0)
    assert (scores > 0).all() and (scores.diff() >= 0).all()
    assert (scores.diff()[[0, 4, 5]] > 0).all() and scores[3] == 1
