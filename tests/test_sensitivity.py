"""What errors matter for the finished sample: measured, kept with the statistics, and used by plans."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from tiny_models import BLOCK, LATENTS, TinyPipeline, tiny_wan, wan_inputs

from paroattn.capture import CaptureSettings, Statistics
from paroattn.integration.apply import apply, hook_of, remove
from paroattn.integration.calibrate import calibrate, collect, load_statistics
from paroattn.integration.sensitivity import _limited, measure_sensitivity
from paroattn.plan.plan import Plan
from paroattn.plan.search import PlanSettings, make_plan, predicted_error

STEPS = 4
SETTINGS = PlanSettings(density=0.4, phase_ends=(0.5, 1.0))
CAPTURE = CaptureSettings(block=BLOCK, paper=False)
pytestmark = pytest.mark.usefixtures("one_thread")


class Pipeline(TinyPipeline):
    """Its clip hears so much of every step: `loud` says how much, from the first step to the last."""

    loud: tuple[float, ...] = (1.0, 1.0, 0.05, 0.05)

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=STEPS, generator=None):
        noise = torch.randn(1, *LATENTS, generator=generator)
        text = wan_inputs(seed=len(prompt))["encoder_hidden_states"]
        self.scheduler.set_timesteps(num_inference_steps)
        clip = torch.zeros_like(noise)
        for part, timestep in zip(self.loud, self.scheduler.timesteps, strict=True):
            model = self.transformer if self.transformer_2 is None or timestep >= 700 else self.transformer_2
            velocity = self._call(model, noise, timestep, text, "cond", {})
            self.scheduler.step(velocity, timestep, noise)
            clip += part * velocity
        return BaseOutput(frames=clip)


def pipeline(two=False):
    return Pipeline(tiny_wan(0), FlowMatchEulerDiscreteScheduler(shift=3.0), tiny_wan(1) if two else None)


def collected(pipe):
    return collect(pipe, "a", steps=STEPS, capture=CAPTURE, exact=True, progress=lambda done: None)


def measure(pipe, measured, what="phases", **settings):
    measure_sensitivity(pipe, measured, "a", what=what, settings=SETTINGS, steps=STEPS, **settings)


@pytest.fixture(scope="module")
def found():
    pipe = pipeline()
    measured = collected(pipe)
    measure(pipe, measured)
    return pipe, measured["transformer"]


def phase_weights(statistics: Statistics) -> list[float]:
    return [statistics.level_weights[level] for level in statistics.noise_levels]


def test_steps_that_the_clip_hardly_hears_weigh_little(found):
    weights = phase_weights(found[1])
    assert weights[0] == weights[1] and weights[2] == weights[3]
    assert 2.5e-4 < weights[2] / weights[0] < 2.5e-2  # about a twentieth, squared


def test_the_budget_goes_where_errors_matter(found):
    weighed, plain = (make_plan(found[1], replace(SETTINGS, sensitivity=each)) for each in (True, False))
    assert weighed.density == pytest.approx(plain.density, abs=0.03)
    early, late = weighed.phase_density().tolist()
    assert early > plain.phase_density()[0] + 0.1
    assert late < early - 0.2


def test_weighed_predictions_are_what_was_measured_one_phase_at_a_time(found):
    pipe, statistics = found
    plan = make_plan(statistics, replace(SETTINGS, density=0.3, sensitivity=False))
    predicted = predicted_error(statistics, plan, SETTINGS).sum(0)
    exact, changed = clips(pipe, plan)
    measured = [float((each - exact).square().mean() / exact.square().mean()) for each in changed]
    assert predicted.tolist() == pytest.approx(measured, rel=1e-3)


def clips(pipe, plan):
    """The clip with all blocks, and with those of one phase after another dropped."""
    plans = [_limited(plan, lambda layer, phase: False)]
    plans += [_limited(plan, lambda layer, phase, each=each: phase == each) for each in range(2)]
    made = []
    for each in plans:
        apply(pipe, Plan({"transformer": each}))
        try:
            made.append(pipe("a", generator=torch.Generator().manual_seed(0)).frames)
        finally:
            remove(pipe)
    return made[0], made[1:]


def test_layers_whose_output_goes_nowhere_weigh_least_and_break_nothing():
    pipe = pipeline()
    measured = collected(pipe)
    with torch.no_grad():
        pipe.transformer.blocks[0].attn1.to_out[0].weight.zero_()
    measure(pipe, measured, "layers")
    weights = measured["transformer"].layer_weights
    assert list(weights) == ["blocks.0.attn1", "blocks.1.attn1"]
    assert 0 < weights["blocks.0.attn1"] < 1e-3 * weights["blocks.1.attn1"]
    plan = make_plan(measured["transformer"], SETTINGS)
    first, second = plan.head_density().mean((1, 2)).tolist()
    assert first < second


def test_layers_that_drop_nothing_worth_predicting_get_a_weight():
    pipe = pipeline()
    with torch.no_grad():
        pipe.transformer.blocks[0].attn1.to_out[0].weight.zero_()
    measured = collected(pipe)
    measure(pipe, measured, "layers")
    assert all(0 < weight < float("inf") for weight in measured["transformer"].layer_weights.values())


def test_both_transformers_get_weights_of_their_own():
    pipe = pipeline(two=True)
    measured = collected(pipe)
    measure(pipe, measured)
    for statistics in measured.values():
        assert set(statistics.level_weights) == set(statistics.noise_levels)
    assert len(measured) == 2


@pytest.mark.parametrize("what", ["phases", "layers", "none"])
def test_every_sample_is_generated_once_and_once_for_every_probe(what):
    pipe, shares = pipeline(), []
    measured = collected(pipe)
    measure_sensitivity(
        pipe, measured, ("a", "bc"), what=what, seeds=2, settings=SETTINGS, steps=STEPS, progress=shares.append
    )
    assert len(shares) == {"phases": 4 * 3, "layers": 4 * 5, "none": 0}[what]
    assert shares[-1:] == ([1.0] if shares else [])


def test_weights_are_kept_and_checked(tmp_path, found):
    statistics = replace(found[1], layer_weights={"blocks.0.attn1": 0.5, "blocks.1.attn1": 1.5})
    statistics.save(tmp_path / "kept")
    again = Statistics.load(tmp_path / "kept")
    assert (again.level_weights, again.layer_weights) == (statistics.level_weights, statistics.layer_weights)
    path = tmp_path / "kept" / "statistics.json"
    described = json.loads(path.read_text())
    level = next(iter(described["level_weights"]))
    for wrong, message in ((-1.0, "above 0"), (0, "above 0"), ("much", "damaged"), (None, "missing")):
        weights = dict(described["level_weights"])
        weights.pop(level) if wrong is None else weights.update({level: wrong})
        path.write_text(json.dumps(described | {"level_weights": weights}))
        with pytest.raises(ValueError, match=message):
            Statistics.load(tmp_path / "kept")


def test_a_calibration_measures_phases_unless_told_otherwise(tmp_path):
    settings = {"steps": STEPS, "capture": CAPTURE, "settings": SETTINGS, "progress": lambda done: None}
    weighed = calibrate(pipeline(), "a", statistics=tmp_path / "statistics", **settings)["transformer"]
    plain = calibrate(pipeline(), "a", sensitivity="none", **settings)["transformer"]
    assert weighed.phase_density()[0] > plain.phase_density()[0] + 0.1
    kept = load_statistics(tmp_path / "statistics")["transformer"]
    assert set(kept.level_weights) == set(kept.noise_levels)
    with pytest.raises(ValueError, match=r"sensitivity must be one of none, phases, layers; got 'steps'"):
        calibrate(pipeline(), "a", sensitivity="steps", **settings)
    with pytest.raises(ValueError, match="at least 1 seed of every prompt; got 0"):
        calibrate(pipeline(), "a", sensitivity_seeds=0, **settings)


def test_a_clip_that_is_not_finite_is_an_error_and_leaves_the_model_alone():
    pipe = pipeline()
    measured = collected(pipe)
    pipe.loud = (float("nan"),) * STEPS
    with pytest.raises(ValueError, match="'a' gave NaN or infinity"):
        measure(pipe, measured)
    assert hook_of(pipe.transformer) is None
    assert not measured["transformer"].level_weights


def test_int4_is_weighed_by_what_it_does_to_the_sample():
    """The weight makes the predicted error of all heads in INT4 that of the sample; blocks weigh as they did."""
    pipe = pipeline()
    measured = collected(pipe)
    measure(pipe, measured)
    plain, statistics = dict(measured["transformer"].level_weights), measured["transformer"]
    assert statistics.rounding_weight is None
    runs = []
    measure_sensitivity(
        pipe, measured, "a", settings=replace(SETTINGS, precision="auto"), steps=STEPS, precision="fp32",
        progress=runs.append,
    )  # fmt: skip
    assert len(runs) == 4 and statistics.level_weights == plain  # all blocks, two phases, INT4
    clips = []
    for precision in ("fp32", "int4"):
        probing = SETTINGS.at(0.3, sensitivity=False)  # orders are those of the probes
        everything = _limited(make_plan(statistics, probing), lambda layer, phase: False)
        apply(pipe, Plan({"transformer": everything}), precision=precision)
        clips.append(vars(pipe("a", STEPS, torch.Generator().manual_seed(0)))["frames"])
        remove(pipe)
    error = float((clips[1] - clips[0]).square().mean() / clips[0].square().mean())
    for precision in ("int4", "auto"):
        settings = PlanSettings(
            1.0, phase_ends=(0.5, 1.0), precision=precision, int4_share=1 if precision == "auto" else None
        )
        made = make_plan(statistics, settings).made["curve"]["chosen"]
        assert (made["error"], made["heads_int4"]) == (pytest.approx(error, rel=1e-3), 1.0)
    assert statistics.rounding_weight != pytest.approx(1, rel=0.1)


def test_the_weight_of_rounding_is_kept_and_an_unknown_one_counts_as_one(found, tmp_path):
    statistics = replace(found[1], rounding_weight=0.25)
    for each in (statistics, found[1]):
        loaded = Statistics.load(each.save(tmp_path / str(each.rounding_weight)))
        assert loaded.rounding_weight == each.rounding_weight
    settings = PlanSettings(1.0, phase_ends=(0.5, 1.0), precision="int4")
    less, more = (make_plan(each, settings).made["curve"]["chosen"]["error"] for each in (statistics, found[1]))
    assert less == pytest.approx(more / 4)
    path = tmp_path / "0.25" / "statistics.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps(described | {"rounding_weight": -1.0}))
    with pytest.raises(ValueError, match="weights must be above 0"):
        Statistics.load(tmp_path / "0.25")
    del described["rounding_weight"]  # as an earlier version wrote it
    path.write_text(json.dumps(described))
    assert Statistics.load(tmp_path / "0.25").rounding_weight is None
