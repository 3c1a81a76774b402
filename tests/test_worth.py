"""Where a plan would not pay, dense attention runs: which layers, for what reason, and what they compute then."""

import warnings
from dataclasses import replace

import pytest
import torch
from tiny_models import random_plan, tiny_wan, wan_inputs
from torch._dynamo.utils import counters

from paroattn.block_mask import BlockMask, blocks_of
from paroattn.grid import Grid, Layout, TextSpan
from paroattn.integration import hook as hooks
from paroattn.integration.apply import apply, dense, remove, report
from paroattn.integration.hook import hook_of
from paroattn.phases import Phase
from paroattn.plan.cost import Call, kept_blocks, rates_of
from paroattn.plan.plan import LayerPlan, TransformerPlan
from paroattn.plan.worth import Verdict, judge

H200 = "NVIDIA H200"
PHASES = (Phase(0.5, 0.25), Phase(0.0, 0.75))
BLOCK = (128, 128)
pytestmark = pytest.mark.usefixtures("one_thread")


def _layer(grid: Grid, densities: tuple[float, float], heads: int, precision: str) -> LayerPlan:
    """Every row of every head keeps the first blocks, as many as the phase's density says."""
    blocks = blocks_of(grid.tokens, BLOCK[0])
    kept = torch.zeros(2, heads, blocks, blocks, dtype=torch.bool)
    for phase, density in enumerate(densities):
        kept[phase, ..., : max(1, round(density * blocks))] = True
    return LayerPlan(("FHW",) * heads, BlockMask.from_dense(kept, BLOCK), ((precision,) * heads,) * 2)


def _plan(grid: Grid, precision: str, heads: int = 4, **densities: tuple[float, float]) -> TransformerPlan:
    layers = {name: _layer(grid, each, heads, precision) for name, each in densities.items()}
    return TransformerPlan("Model", heads, 128, grid, TextSpan(), BLOCK, PHASES, layers)


def test_long_sequences_gain_and_short_ones_do_not():
    long, short = Grid(21, 30, 52), Grid(1, 32, 32)
    assert judge(_plan(long, "int8/fp8", a=(0.3, 0.2)), H200).dense == {}
    verdict = judge(_plan(short, "int8/fp8", a=(0.3, 0.2)), H200)
    assert "1024 tokens are too few to gain on NVIDIA H200: predicted" in verdict.dense["a"]
    assert "layers that run dense: 1; a: 1024 tokens" in str(verdict)


def test_layers_are_judged_one_by_one_over_all_phases():
    """In bf16 a kept block is slower than a dense one, so a layer that keeps almost all would lose."""
    grid = Grid(21, 30, 52)
    plan = _plan(grid, "bf16", sparse=(1.0, 0.3), full=(0.1, 1.0), mixed=(0.0, 0.95))
    verdict = judge(plan, H200)
    rates, call = rates_of(H200), Call(grid.tokens, 4, 128)
    for name, layer in plan.layers.items():
        times = [
            rates.sparse_ms(call, kept_blocks(Layout(grid), BLOCK, density.tolist()), BLOCK, "bf16")
            for density in layer.mask.head_density()
        ]
        assert (name in verdict.dense) == (0.25 * times[0] + 0.75 * times[1] > rates.dense_ms(call)), name
    assert "sparse" not in verdict.dense and "full" in verdict.dense
    assert judge(plan, H200, precision="int8/fp8").dense == {}


def test_text_that_is_dense_counts_but_not_for_layers_that_see_the_video_alone():
    grid = Grid(1, 96, 96)
    plan = _plan(grid, "bf16", 24, a=(0.5, 0.6), b=(0.5, 0.6))
    assert judge(plan, H200).dense == {}
    text = TextSpan(9216, "suffix")
    assert set(judge(plan, H200, text=text).dense) == {"a", "b"}
    assert set(judge(plan, H200, text=text, video_only=("a",)).dense) == {"b"}


def test_where_times_are_not_known_every_layer_follows_the_plan():
    plan = _plan(Grid(1, 32, 32), "int8/fp8", a=(1.0, 1.0))
    verdict = judge(plan, "NVIDIA RTX 4090")
    assert verdict.dense == {} and "every layer follows the plan: times are known for NVIDIA H200" in str(verdict)
    assert judge(plan, H200, precision="fp32").unknown is not None


# On a model


@pytest.fixture
def judged(monkeypatch):
    """A GPU on which the first layer gains nothing."""
    asked = []

    def verdict(plan, gpu, **settings):
        asked.append((gpu, settings))
        return Verdict(gpu, {next(iter(plan.layers)): "too short here"})

    monkeypatch.setattr(hooks, "gpu_name", lambda device: "a GPU")
    monkeypatch.setattr(hooks, "judge", verdict)
    return asked


def forward(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**wan_inputs()).sample


def test_a_layer_that_gains_nothing_runs_dense_and_the_report_says_why(judged):
    model, plan = tiny_wan(), random_plan()
    first, *others = plan.layers
    everything = BlockMask.full(plan.heads, plan.grid.tokens, plan.block).bits[None].expand_as(
        plan.layers[first].mask.bits
    )  # fmt: skip
    whole = BlockMask(everything.contiguous(), plan.layers[first].mask.key_blocks, plan.block)
    expected_plan = replace(plan, layers=plan.layers | {first: replace(plan.layers[first], mask=whole)})
    apply(model, expected_plan, even_if_slower=True)
    expected = forward(model)
    assert judged == [] and report(model).to_dict()["transformer"]["prediction"] is None
    remove(model)
    apply(model, plan)
    with pytest.warns(UserWarning, match=r"on a GPU, layers that run dense: 1; .*too short here.*even_if_slower=True"):
        found = forward(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward(model)
    part = report(model).to_dict()["transformer"]
    assert part["layers"][first]["dense_calls"] == {"too short here": 2}
    assert part["layers"][first]["faster_dense"] == "too short here" and part["layers"][first]["density"] == 1.0
    for name in others:
        assert part["layers"][name]["sparse_calls"] == 2 and part["layers"][name]["faster_dense"] is None
    words = str(report(model))
    assert "on a GPU, layers that run dense: 1" in words and "2 layer calls dense: too short here" in words
    assert len(judged) == 1  # once for all calls of the same text


def test_masks_of_layers_that_run_dense_are_not_kept(judged):
    model, plan = tiny_wan(), random_plan()
    apply(model, plan)
    with pytest.warns(UserWarning):
        forward(model)
    hook = hook_of(model)
    assert hook is not None
    assert [layer.operands is None for layer in hook.layers.values()] == [True] + [False] * (len(plan.layers) - 1)


def test_an_implementation_that_is_named_and_a_request_to_run_dense_come_first(judged):
    model, plan = tiny_wan(), random_plan()
    apply(model, plan, impl="reference")
    forward(model)
    assert judged == []
    remove(model)
    apply(model, plan)
    with dense(model):
        forward(model)
    part = report(model).to_dict()["transformer"]["layers"]
    assert all(set(row["dense_calls"]) == {"inside paroattn.dense"} for row in part.values())


def test_without_a_gpu_nobody_asks(monkeypatch):
    monkeypatch.setattr(hooks, "judge", lambda *_, **__: pytest.fail("asked"))
    model = tiny_wan()
    apply(model, random_plan())
    forward(model)
    assert report(model).to_dict()["transformer"]["prediction"] is None


def test_compiled_blocks_follow_and_are_not_compiled_again(judged):
    torch.compiler.reset()
    counters.clear()
    plain, compiled, plan = tiny_wan(), tiny_wan(), random_plan()
    for model in (plain, compiled):
        apply(model, plan)
    compiled.compile_repeated_blocks(fullgraph=True, backend="eager")
    with pytest.warns(UserWarning):
        expected = forward(plain)
        torch.testing.assert_close(forward(compiled), expected, rtol=1e-4, atol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(forward(compiled), expected, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2  # one for layers that run dense, one for the others
    torch.compiler.reset()
