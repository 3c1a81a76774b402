"""The benchmark of ideas for better plans: prompts, clips at once, and what the tables say of its rows."""

from types import SimpleNamespace

import pytest
import torch

import fidelity_tables
import quality
import refined
from paroattn.demo.prompt import CALIBRATION_PROMPTS, EVALUATION_PROMPTS, words_of


def test_training_and_held_out_prompts_are_nobody_elses():
    prompts = refined.drawn(refined.TRAINING + quality.HELD_OUT)
    assert len(set(prompts)) == refined.TRAINING + quality.HELD_OUT
    assert not set(prompts) & {*CALIBRATION_PROMPTS, *EVALUATION_PROMPTS}
    assert prompts[: refined.TRAINING] == refined.drawn(refined.TRAINING)
    assert len({words_of(prompt) for prompt in prompts}) == len(prompts)


def test_prompts_are_joined_in_groups_and_few_are_repeated():
    assert refined.joined(["a", "b", "c"], 2) == ["a|b", "c"]
    assert refined.joined(["a", "b"], 4) == ["a|b|a|b"]


def test_a_batch_has_noise_of_its_own_for_every_clip_and_seed():
    called = []

    def pipe(prompts, steps, generator, output_type):
        called.append((prompts, steps, [one.initial_seed() for one in generator], output_type))

    batched = refined.Batched(pipe)
    for seed in (0, 1):
        batched("a|b", 5, torch.Generator().manual_seed(seed), "latent")
    assert called == [(["a", "b"], 5, [0, 1], "latent"), (["a", "b"], 5, [2, 3], "latent")]
    assert refined.Batched(SimpleNamespace(transformer=3)).transformer == 3


@pytest.mark.parametrize(
    ("row", "base", "cell"),
    [
        (None, None, "–"),
        ({"psnr_mean": 26.04, "psnr": [26.0, 26.08]}, None, "26.0"),
        ({"psnr_mean": 26.0, "psnr": None}, {"psnr_mean": 25.0, "psnr": [25.0, 25.0]}, "26.0, +1.0"),
        ({"psnr_mean": 24.0, "psnr": [23.0, 25.0]}, {"psnr": [24.0, 26.0]}, "24.0, −1.0 (−1.0 … −1.0)"),
    ],
    ids=["not measured", "nothing beside it", "means alone", "clip by clip"],
)  # fmt: skip
def test_a_cell_names_the_mean_and_the_difference_on_the_same_clips(row, base, cell):
    assert fidelity_tables.quality_cell(row, base) == cell


def test_every_experiment_is_in_the_table_and_says_what_it_is():
    rows = fidelity_tables.rows_of("quality_experiments")
    text = fidelity_tables.quality()
    assert rows and all(row["idea"] and f"({row['method'].removeprefix('paroattn-')})" in text for row in rows)
    for row in rows:
        assert row["psnr"] is None or row["psnr_mean"] == pytest.approx(sum(row["psnr"]) / row["clips"], abs=2e-3)
