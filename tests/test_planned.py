"""The one function for hosts beyond diffusers, against attention written out by hand."""

import gc

import pytest
import torch
from tiny_models import random_plan

from paroattn.grid import Grid, Layout, TextSpan, token_order
from paroattn.kernels import planned
from paroattn.kernels.planned import operands_of, planned_attention
from paroattn.phases import Phase
from paroattn.plan.plan import PlanError

GRID = Grid(3, 5, 4)
PHASES = (Phase(0.6, 0.5), Phase(0.0, 0.5))
LAYERS = ("blocks.0", "blocks.1")
TEXTS = {"none": TextSpan(), "prefix": TextSpan(7, "prefix"), "suffix": TextSpan(7, "suffix")}


def plan_with(text=TEXTS["none"], **changes):
    return random_plan(LAYERS, grid=GRID, phases=PHASES, block=(16, 16), text=text, head_dim=8, **changes)


def inputs(plan, text, batch=2):
    generator = torch.Generator().manual_seed(3)
    shape = (batch, Layout(plan.grid, text).tokens, plan.heads, plan.head_dim)
    return tuple(torch.randn(shape, generator=generator) for _ in range(3))


def by_hand(q, k, v, plan, layer, phase, text, valid=None):
    """Softmax over the kept pairs, one batch element and head at a time, in float64."""
    out = torch.empty_like(q, dtype=torch.float64)
    ahead = text.tokens if text.side == "prefix" else 0
    for b in range(q.shape[0]):
        real = text.tokens if valid is None else int(valid[b])
        for h, order in enumerate(plan.layers[layer].orders):
            video = token_order(plan.grid, order) + ahead
            words = torch.arange(text.tokens) + (0 if text.side == "prefix" else plan.grid.tokens)
            place = torch.cat([video, words])
            block = torch.arange(len(place)) // plan.block[0]
            blocks = int(block[-1]) + 1
            kept = torch.ones(blocks, blocks, dtype=torch.bool)
            whole = plan.grid.tokens // plan.block[0] if text.tokens else blocks
            kept[:whole, :whole] = plan.layers[layer].mask[phase].dense()[h][:whole, :whole]
            allowed = kept[block][:, block]
            allowed[:, plan.grid.tokens + real :] = False
            q_, k_, v_ = (x[b, place, h].double() for x in (q, k, v))
            scores = (q_ @ k_.mT * plan.head_dim**-0.5).masked_fill(~allowed, -torch.inf)
            out[b, place, h] = scores.softmax(-1) @ v_
    return out


@pytest.mark.parametrize("side", TEXTS)
@pytest.mark.parametrize("phase", [0, 1])
def test_a_layer_runs_as_its_plan_says(side, phase):
    text = TEXTS[side]
    plan = plan_with(text)
    q, k, v = inputs(plan, text)
    for layer in LAYERS:
        out = planned_attention(q, k, v, plan, layer, phase)
        torch.testing.assert_close(out.double(), by_hand(q, k, v, plan, layer, phase, text), atol=2e-6, rtol=1e-5)


def test_a_prompt_may_have_another_length_and_padding():
    plan, text, valid = plan_with(TextSpan(3, "suffix")), TextSpan(9, "suffix"), torch.tensor([9, 2])
    q, k, v = inputs(plan, text)
    out = planned_attention(q, k, v, plan, "blocks.1", 1, text=text, valid_text=valid)
    expected = by_hand(q, k, v, plan, "blocks.1", 1, text, valid)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)


def test_precision_and_scale_are_handed_on():
    plan = plan_with()
    q, k, v = inputs(plan, plan.text)
    exact = planned_attention(q, k, v, plan, "blocks.0", 0)
    rounded = planned_attention(q, k, v, plan, "blocks.0", 0, precision="int8")
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.05
    scaled = planned_attention(q * 2, k, v, plan, "blocks.0", 0, softmax_scale=plan.head_dim**-0.5 / 2)
    torch.testing.assert_close(scaled, exact)


def test_what_a_layer_needs_is_made_once_and_tables_are_shared():
    plan = plan_with()
    first, again = operands_of(plan, "blocks.0", 0), operands_of(plan, "blocks.0", 0)
    assert first["mask"] is again["mask"] and first["order"] is again["order"]
    assert operands_of(plan, "blocks.1", 1)["table"] is first["table"]
    assert operands_of(plan, "blocks.0", 1)["mask"] is not first["mask"]


def test_prompts_of_many_lengths_do_not_pile_up_and_nothing_outlives_the_plan():
    plan = plan_with(TextSpan(3, "suffix"))
    for tokens in range(30):
        operands_of(plan, "blocks.0", 0, text=TextSpan(tokens, "suffix"))
    part = plan.layers["blocks.0"]
    assert len(planned._known[part]) <= planned.TEXTS_KEPT * len(PHASES)
    assert len(planned._tables[plan]) <= planned.TEXTS_KEPT
    kept = (len(planned._known), len(planned._tables))
    del plan, part
    gc.collect()
    assert (len(planned._known), len(planned._tables)) == (kept[0] - 1, kept[1] - 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": "blocks.7"}, "no layer 'blocks.7'"),
        ({"phase": 2}, "phase must be 0…1; got 2"),
        ({"phase": -1}, "phase must be 0…1; got -1"),
        ({"text": TextSpan(7, "prefix")}, "text as suffix"),
        ({"text": TextSpan(8, "suffix")}, r"q must be \(B, 68, 2, 8\)"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(change, message):
    plan = plan_with(TEXTS["suffix"])
    call = {"layer": "blocks.0", "phase": 0} | change
    with pytest.raises(PlanError, match=message):
        planned_attention(*inputs(plan, TEXTS["suffix"]), plan, **call)
