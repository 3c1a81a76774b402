"""The bundled model, its language, its plan and the numbers published about it."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import paroattn
from paroattn.block_mask import BlockMask
from paroattn.capture import CaptureSettings
from paroattn.demo.pipeline import MODEL, PLAN, DemoPipeline, load_demo, weights_sha256
from paroattn.demo.prompt import (
    CALIBRATION_PROMPTS,
    EVALUATION_PROMPTS,
    SLOTS,
    VOCABULARY,
    ids_of,
    prompt_of,
    words_of,
)
from paroattn.integration.apply import recording
from paroattn.integration.calibrate import collect
from paroattn.plan.plan import Plan

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
PROMPT = EVALUATION_PROMPTS[0]
SMALL = {"num_frames": 5, "height": 24, "width": 28}


@pytest.fixture(scope="module")
def pipe():
    return load_demo()


def clip(pipe, prompt=PROMPT, seed=3, **settings):
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0} | settings
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **settings).frames


def test_a_clip_of_another_size_follows_the_plan_carried_there(pipe):
    size = {"num_frames": 5, "height": 24, "width": 44}
    dense = clip(pipe, **size)
    assert dense.shape == (1, 5, 3, 24, 44)
    shipped = Plan.from_pretrained(PLAN)
    paroattn.apply(pipe, shipped)
    try:
        with pytest.raises(ValueError, match=r"this call has 5x6x11\. .* paro plan --grid 5x6x11"):
            clip(pipe, **size)
    finally:
        paroattn.remove(pipe)
    paroattn.apply(pipe, shipped.for_grid(paroattn.Grid(5, 6, 11)))
    try:
        sparse = clip(pipe, **size)
        assert paroattn.report(pipe).to_dict()["transformer"]["calls"] == {"sparse": 2}
    finally:
        paroattn.remove(pipe)
    assert 0 < float((dense - sparse).abs().mean()) < 0.2


@pytest.mark.parametrize("wrong", [{"height": 50}, {"num_frames": 33}, {"width": 0}], ids=str)
def test_sizes_that_the_model_cannot_make_are_refused(pipe, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be a multiple of .* got {value}"):
        clip(pipe, **wrong)


# Language


def test_every_sentence_made_of_known_words_is_understood():
    choices = [words[:2] for words in SLOTS.values()]
    for words in itertools.product(*choices):
        assert words_of(prompt_of(words)) == words
    one_object = ("coffee", "still", "red", "disc", "left", "", "", "")
    assert words_of(prompt_of(one_object)) == one_object


def test_capitals_articles_and_spaces_do_not_matter_and_the_camera_is_still_unless_told():
    assert words_of("A  Red disc moving RIGHT over the astronaut") == words_of(
        "a red disc moving right over astronaut, camera still"
    )


def test_an_empty_prompt_asks_for_nothing():
    assert set(ids_of(words_of(""))) == {0} and VOCABULARY[0] == ""


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat",
        "a red disc over cat",
        "a pink disc moving left over cat",
        "red disc moving left",
        "an infrared disc moving left over cat",
        "a red disc moving left and a pink star moving up over cat",
        "a red disc moving leftover cat",
        "a red disc moving left over cat, camera spins wildly",
    ],
)
def test_unknown_words_are_refused_with_all_known_ones(prompt):
    with pytest.raises(ValueError, match=r"got '.*Scenes: astronaut, .*Cameras: still"):
        words_of(prompt)


def test_calibration_and_evaluation_prompts_differ():
    assert len(set(EVALUATION_PROMPTS)) == len(EVALUATION_PROMPTS) == 16
    assert not set(CALIBRATION_PROMPTS) & set(EVALUATION_PROMPTS)


# Pipeline


def test_the_model_is_small_and_its_grid_is_awkward_on_purpose(pipe):
    parameters = sum(p.numel() for p in pipe.transformer.parameters())
    assert parameters < 12e6
    assert all(path.stat().st_size <= 15e6 for path in MODEL.rglob("*.safetensors"))
    grid = Plan.from_pretrained(PLAN)["transformer"].grid
    assert len(set(grid)) == 3 and grid.tokens >= 3000 and grid.tokens % 64 != 0


def test_a_seed_fixes_the_clip_and_batches_do_not_mix(pipe):
    first = clip(pipe)
    assert first.shape == (1, 16, 3, 52, 72) and 0 <= first.min() < first.max() <= 1
    generators = [torch.Generator().manual_seed(seed) for seed in (9, 3)]
    both = pipe([EVALUATION_PROMPTS[1], PROMPT], generator=generators, num_inference_steps=2, guidance_scale=1.0).frames
    torch.testing.assert_close(both[1], first[0], atol=1e-4, rtol=0)
    assert not torch.equal(both[0], first[0])


def test_guidance_latents_and_callbacks(pipe):
    steps = []
    raw = clip(
        pipe, **SMALL, output_type="latent", callback_on_step_end=lambda pipe, step, when, tensors: steps.append(step)
    )
    assert steps == [0, 1]
    torch.testing.assert_close(raw.clamp(-1, 1) / 2 + 0.5, clip(pipe, **SMALL))
    assert not torch.equal(clip(pipe, **SMALL, guidance_scale=3.0), clip(pipe, **SMALL))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"output_type": "pil"}, "pt or latent; got 'pil'"), ({"num_inference_steps": 0}, "1 or more; got 0")],
)
def test_arguments_out_of_range_are_refused(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        clip(pipe, **settings)


def test_saved_and_loaded_again_it_makes_the_same_clip(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = DemoPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(clip(again), clip(pipe), atol=1e-4, rtol=0)


# Plan and calibration


def test_training_starts_from_other_weights_and_what_it_saves_is_loaded_for_larger_images(pipe, tmp_path):
    sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
    import train

    model = train.Model((1, 16, 160))
    model.start_from(MODEL)
    for name, part in model.named_children():
        saved = getattr(pipe, name).state_dict()
        assert saved.keys() == part.state_dict().keys()
        assert all(torch.equal(weight, saved[key]) for key, weight in part.state_dict().items())
        part.save_pretrained(tmp_path / name)
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    larger = load_demo(model=tmp_path)
    assert weights_sha256(tmp_path) != weights_sha256()
    call = {"prompt": EVALUATION_PROMPTS[0], "num_inference_steps": 1, "guidance_scale": 1}
    frames = larger(**call, num_frames=1, height=16, width=160).frames
    assert frames.shape == (1, 1, 3, 16, 160) and frames.isfinite().all()
    with pytest.raises(ValueError, match="width must be a multiple of 4, 128 at most; got 160"):
        pipe(**call, num_frames=1, height=16, width=160)


def test_the_plan_that_ships_fits_and_runs_where_it_says(pipe):
    plan = Plan.from_pretrained(PLAN)
    dense = clip(pipe)
    paroattn.apply(pipe, plan)
    try:
        sparse = clip(pipe)
        report = paroattn.report(pipe)
    finally:
        paroattn.remove(pipe)
    assert 0 < (sparse - dense).abs().mean() < 0.1
    executed = report.to_dict()["transformer"]["density"]
    assert executed == pytest.approx(float(plan["transformer"].phase_density()[[0, 2]].mean()), abs=0.02)
    torch.testing.assert_close(clip(pipe), dense, atol=0, rtol=0)


def test_calibration_measures_what_the_model_does_and_leaves_it_as_it_was(pipe):
    before, seen = clip(pipe, **SMALL), []
    plan = paroattn.calibrate(
        pipe, PROMPT, density=0.4, steps=2, capture=CaptureSettings(paper=False),
        progress=seen.append, guidance_scale=1.0, **SMALL,
    )["transformer"]  # fmt: skip
    assert plan.density == pytest.approx(0.4, abs=1e-3) and str(plan.grid) == "5x6x7"
    assert len(plan.phases) == 2 and plan.made["calibration"]["prompts"] == [PROMPT]
    assert seen[-4] == 1.0 and seen[:-3] == sorted(seen[:-3])
    assert seen[-3:] == pytest.approx([1 / 3, 2 / 3, 1])  # with all blocks, and with those of each phase dropped
    assert next(iter(plan.layers.values())).precision[0][0] == "fp32"
    assert torch.equal(clip(pipe, **SMALL), before)


@pytest.mark.parametrize(("prompts", "message"), [([], "at least one prompt"), ([PROMPT, " "], "none of them empty")])
def test_calibration_without_prompts_is_refused_before_the_model_runs(pipe, prompts, message):
    with pytest.raises(ValueError, match=message):
        collect(pipe, prompts)


def test_calibration_refuses_arguments_that_the_pipeline_does_not_know(pipe):
    with pytest.raises(ValueError, match="DemoPipeline has no argument colour"):
        collect(pipe, PROMPT, steps=1, colour="red")
    assert not hasattr(pipe.transformer, "paroattn")


# Published numbers


@pytest.mark.parametrize("name", ["fidelity_demo", "numerics_cpu", "bundled_model_maps"])
def test_published_numbers_belong_to_the_weights_that_ship(name):
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    assert {row["weights_sha256"] for row in rows} == {weights_sha256()}


def test_tables_are_made_from_the_results():
    import tables

    for page in tables.PAGES:
        text = (tables.ROOT / page).read_text()
        assert tables.filled(text) == text, f"{page} is out of date: run python benchmarks/tables.py"


# Numbers of few bits on the model's own q, k and v


@pytest.fixture(scope="module")
def attentions(pipe):
    """q, k and v (1, N, H, D) of the first, middle and last layer at the first step."""
    found = {}
    with recording(pipe, lambda layer, attn, q, k, v, *_: found.setdefault(layer, (q[:1], k[:1], v[:1]))):
        clip(pipe, num_inference_steps=1)
    return list(found.values())[::2]


@pytest.mark.parametrize(("precision", "floor"), [("int8/fp8", 0.999), ("int8", 0.9995)])
def test_dense_attention_of_8_bits_keeps_the_direction_of_the_output(attentions, precision, floor):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for q, k, v in attentions:
        q, k, v = (x.to(device, torch.bfloat16) for x in (q, k, v))
        exact = torch.nn.functional.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)))
        mask = BlockMask.full(q.shape[2], q.shape[1], (64, 128)).to(device)
        got: Any = paroattn.attention(q, k, v, mask, precision=precision)
        cosine = torch.cosine_similarity(got.double().flatten(), exact.transpose(1, 2).flatten(), dim=0)
        assert cosine >= floor, cosine
