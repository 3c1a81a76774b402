"""The benchmark of a whole run: pipeline, plan, steps and VAE of a tiny Wan, on a CPU."""

import json

import pytest
import torch
from test_end_to_end import toy
from torch.nn.attention import SDPBackend

import forwards
import whole_run
from paroattn.grid import Grid

pytest.importorskip("transformers", reason="diffusers' pipelines need it")

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch):
    """A model, and arguments of `main` that run it here."""
    from diffusers import AutoencoderKLWan

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    native = forwards.Backend("native", SDPBackend.MATH, "bf16/bf16")
    monkeypatch.setitem(forwards.BACKENDS, "cudnn", native)
    monkeypatch.setattr(forwards, "COMPILE", {"backend": "eager"})
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    monkeypatch.setattr("diffusers.AutoencoderKLWan", lambda: vae)
    model = toy("wan-14b-720p", num_layers=2)
    monkeypatch.setitem(whole_run.ARCHITECTURES, "wan-14b-720p", model)
    yield model
    torch.set_num_threads(threads)


def arguments(out, *more):
    shared = ["--device", "cpu", "--block", "32x64", "--precision", "int8", "--steps", "3", "--out", str(out)]
    return [*shared, *more]


def test_a_run_by_plan_tells_steps_memory_and_compilation_apart(tiny, tmp_path):
    out = tmp_path / "run.json"
    assert whole_run.main(arguments(out)) == 0
    assert whole_run.main(arguments(out, "--impl", "cudnn", "--eager", "--guidance", "1")) == 0
    ours, dense = json.loads(out.read_text())["rows"]
    assert (ours["impl"], ours["density"], ours["precision"], ours["block"]) == ("paroattn", 0.2, "int8", "32x64")
    assert (dense["impl"], dense["density"], dense["precision"], dense["block"]) == ("cudnn", 1.0, "bf16/bf16", None)
    assert (ours["compiled"], dense["compiled"], ours["guidance"], dense["guidance"]) == (True, False, 5.0, 1.0)
    for row in (ours, dense):
        assert len(row["allocated_gib"]) == len(row["step_peak_gib"]) == row["steps"] == 3
        assert row["seconds"] > row["decoding_s"] > 0
        assert row["step_s"] > 0
    assert ours["graphs_in_run"] == 0


def test_the_call_has_the_size_of_the_clip():
    assert whole_run.WAN == ["wan-14b-720p", "wan-14b-480p", "wan-1.3b-480p"]
    size = whole_run.video_size(whole_run.ARCHITECTURES["wan-14b-720p"])
    assert size == {"num_frames": 81, "height": 720, "width": 1280}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": torch.zeros(9, 3, 80, 111)}, "frames must be finite"),
        ({"frames": torch.full((9, 3, 80, 112), float("nan"))}, "frames must be finite"),
        ({"seconds": [1.0]}, "2 steps must run; 1 did"),
        ({"executed": {"sparse": 1, "the plan is for another grid": 1}}, "every call must run by the plan"),
        ({"allocated": [1.0, 2.0, 2.1]}, "memory must not grow"),
    ],
)
def test_a_run_that_went_wrong_is_no_row(change, message):
    model = toy("wan-14b-720p")
    assert model.grid == Grid(3, 5, 7)
    steps = whole_run.Steps(CPU, change.get("seconds", [1.0, 1.0]), change.get("allocated", [1.0, 2.0, 2.0]))
    frames = change.get("frames", torch.zeros(9, 3, 80, 112))
    (found,) = whole_run.problems(frames, model, steps, change.get("executed"), 2)
    assert message in found
    right = whole_run.Steps(CPU, [1.0, 1.0], [1.0, 2.0, 1.5])
    assert not list(whole_run.problems(torch.zeros(9, 3, 80, 112), model, right, {"sparse": 4}, 2))


def test_a_run_that_went_wrong_is_told_and_not_kept(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(whole_run, "problems", lambda *_: iter(["memory must not grow"]))
    assert whole_run.main(arguments(tmp_path / "run.json", "--eager")) == 1
    assert "memory must not grow" in capsys.readouterr().out
    assert not (tmp_path / "run.json").exists()
