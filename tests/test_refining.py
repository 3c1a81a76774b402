"""Masks chosen anew by the error that a model really makes."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from tiny_models import LATENTS, TinyPipeline, tiny_wan, wan_inputs

from paroattn.capture import CaptureSettings
from paroattn.integration import refining
from paroattn.integration.apply import apply, dense, hook_of, remove, set_noise_level
from paroattn.integration.calibrate import collect
from paroattn.integration.refining import Refinement, _recording, _Seen, refine
from paroattn.plan.plan import Plan
from paroattn.plan.search import PlanSettings, make_plan

STEPS = 4
SETTINGS = PlanSettings(density=0.4, phase_ends=(0.5, 1.0))
CAPTURE = CaptureSettings(block=(16, 16), paper=False)
pytestmark = pytest.mark.usefixtures("one_thread")


class Pipeline(TinyPipeline):
    """Generates latents from a prompt, at two guidance branches a step."""

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=STEPS, generator=None):
        latents = torch.randn(1, *LATENTS, generator=generator)
        texts = [wan_inputs(seed=seed)["encoder_hidden_states"] for seed in (len(prompt), 99)]
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.scheduler.timesteps:
            model = self.transformer if self.transformer_2 is None or timestep >= 700 else self.transformer_2
            cond, plain = (
                self._call(model, latents, timestep, text, name, {})
                for text, name in zip(texts, ("cond", "uncond"), strict=True)
            )
            latents = self.scheduler.step(plain + 2 * (cond - plain), timestep, latents)[0]
        return BaseOutput(frames=latents)


def pipeline(two=False):
    return Pipeline(tiny_wan(0), FlowMatchEulerDiscreteScheduler(shift=3.0), tiny_wan(1) if two else None)


def planned(pipe):
    measured = collect(pipe, "a", steps=STEPS, capture=CAPTURE, exact=True, progress=lambda done: None)
    return measured, Plan({name: make_plan(each, SETTINGS) for name, each in measured.items()})


def refined(pipe, plan, measured, rounds=8, clips=2, checkpointing=True, **settings):
    settings = {"steps": STEPS, "progress": lambda done: None} | settings
    return refine(pipe, plan, measured, ["aa", "b"], refinement=Refinement(rounds, clips, checkpointing), **settings)


@pytest.fixture(scope="module")
def made():
    pipe = pipeline()
    measured, plan = planned(pipe)
    return pipe, measured, plan, refined(pipe, plan, measured)


def error(pipe, plan, seeds=range(300, 306)) -> float:
    """Squared difference from the calls of dense clips that no refinement saw."""
    total = 0.0
    apply(pipe, plan)
    try:
        for seed in seeds:
            with dense(pipe), _recording({"transformer": pipe.transformer}) as recorded:
                pipe("cccc", generator=torch.Generator().manual_seed(seed))
            for call in recorded["transformer"]:
                set_noise_level(pipe, call.noise_level)
                with torch.no_grad():
                    made = pipe.transformer(*call.arguments, **call.keywords)[0]
                total += float((made - call.result).square().sum())
    finally:
        remove(pipe)
    return total


def same(one: Plan, other: Plan) -> bool:
    return all(
        torch.equal(layer.mask.bits, other[name].layers[path].mask.bits)
        for name, part in one.items()
        for path, layer in part.layers.items()
    )


def test_the_error_on_inputs_it_has_not_seen_falls(made):
    pipe, _, plan, new = made
    before, after = error(pipe, plan), error(pipe, new)
    assert 0 < after < 0.85 * before


def test_densities_orders_and_settings_stay(made):
    _, _, plan, new = made
    mine, other = plan["transformer"], new["transformer"]
    assert not same(plan, new)
    assert other.phase_density().tolist() == pytest.approx(mine.phase_density().tolist(), abs=0.01)
    assert [layer.orders for layer in other.layers.values()] == [layer.orders for layer in mine.layers.values()]
    assert other.made["settings"] == mine.made["settings"] and other.phases == mine.phases


def test_the_plan_says_how_it_was_refined(made, tmp_path):
    new = made[3]
    new.save_pretrained(tmp_path / "plan")
    told = Plan.from_pretrained(tmp_path / "plan")["transformer"].made["refined"]
    assert told == {"rounds": 8, "clips": 2, "checkpointing": True, "prompts": 2, "steps": STEPS, "seed": 0}
    assert "refined" in (tmp_path / "plan" / "README.md").read_text()
    json.dumps(told)


def test_the_model_is_left_as_it_was(made):
    pipe = made[0]
    assert hook_of(pipe.transformer) is None and not pipe.transformer.is_gradient_checkpointing
    assert not pipe.transformer._forward_pre_hooks and not pipe.transformer._forward_hooks


def test_weights_take_no_gradient_and_do_not_change():
    pipe = pipeline()
    measured, plan = planned(pipe)
    pipe.transformer.requires_grad_(True)
    before = {name: weight.clone() for name, weight in pipe.transformer.named_parameters()}
    refined(pipe, plan, measured, rounds=1, clips=1)
    for name, weight in pipe.transformer.named_parameters():
        assert weight.requires_grad and weight.grad is None and torch.equal(weight, before[name]), name


def test_keeping_activations_gives_the_same_plan(made):
    pipe, measured, plan, _ = made
    plans = [refined(pipe, plan, measured, rounds=2, clips=1, checkpointing=each) for each in (True, False)]
    assert same(*plans) and not same(plan, plans[0])


def test_each_expert_is_refined_by_its_own_calls():
    pipe = pipeline(two=True)
    measured, plan = planned(pipe)
    new = refined(pipe, plan, measured, rounds=2, clips=1)
    assert set(new) == {"transformer", "transformer_2"}
    both = [not same(Plan({name: plan[name]}), Plan({name: new[name]})) for name in plan]
    assert both == [True, True]


def test_a_phase_without_an_error_teaches_nothing():
    seen = _Seen(2, 3)
    for phase, error in ((0, 0.0), (1, 4.0)):
        for _ in range(2):
            seen.note("a", phase, torch.full((2, 1, 5, 7), 3.0))  # text beyond 2×3 blocks of video
        seen.errors[phase] = error
    found = seen.relative()
    assert list(found) == [("a", 1)] and found["a", 1].shape == (1, 2, 3)
    assert (found["a", 1] == 2 * 2 * 3.0 / 4.0).all()


def test_progress_counts_clips(made):
    pipe, measured, plan, _ = made
    shares: list[float] = []
    refined(pipe, plan, measured, rounds=2, clips=2, progress=shares.append)
    assert shares == [0.25, 0.5, 0.75, 1.0]


def test_an_error_on_the_way_leaves_the_model_free(made):
    pipe, measured, plan, _ = made

    def stop(done: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refined(pipe, plan, measured, progress=stop)
    assert hook_of(pipe.transformer) is None and not pipe.transformer.is_gradient_checkpointing


def test_statistics_must_hold_the_component_and_the_orders(made):
    pipe, measured, plan, _ = made
    with pytest.raises(ValueError, match="statistics of transformer are needed; got none of transformer"):
        refined(pipe, plan, {})
    part = plan["transformer"]
    layers = {name: replace(layer, orders=("2x2x2",) * part.heads) for name, layer in part.layers.items()}
    with pytest.raises(ValueError, match=r"must hold the plan's orders; got FHW.*without 2x2x2"):
        refined(pipe, Plan({"transformer": replace(part, layers=layers)}), measured)


def test_a_prompt_and_a_round_are_needed(made):
    pipe, measured, plan, _ = made
    with pytest.raises(ValueError, match="at least one prompt"):
        refine(pipe, plan, measured, [])
    with pytest.raises(ValueError, match="rounds and clips must be 1 or more; got 0 and 8"):
        Refinement(rounds=0)


def test_steps_grow_smaller_and_the_first_is_no_leap():
    steps = [Refinement(rounds=16).step(number) for number in range(16)]
    assert steps[0] == 0.2 and steps[-1] == 0.05 and steps == sorted(steps, reverse=True)


def test_layers_that_dense_attention_would_serve_faster_are_refined_all_the_same(monkeypatch):
    pipe = pipeline()
    measured, plan = planned(pipe)
    asked = []
    monkeypatch.setattr(refining, "apply", lambda *args, **said: (asked.append(said), apply(*args, **said)))
    refined(pipe, plan, measured, rounds=2, clips=1)
    assert asked == [{"even_if_slower": True}] * 2
