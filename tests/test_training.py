"""How the bundled model is trained: a few steps of it on a CPU, on made-up photographs."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def photographs(monkeypatch):
    def made_up(device, height):
        return torch.rand(8, 3, height, height * 4 // 3, generator=torch.Generator().manual_seed(1)) * 2 - 1

    monkeypatch.setattr(train, "load_photographs", made_up)
    monkeypatch.setattr(train, "held_out_loss", lambda model, photographs, size: 0.5)


def arguments(out, **changes):
    settings = {"size": (1, 16, 16), "batch": 2, "steps": 5, "rate": 1e-3, "seed": 0, "start": None, "eager": True}
    return Namespace(**settings | {"save_every": 2, "out": out} | changes)


def weights(out):
    return {name: x for file in (out / "transformer").glob("*.safetensors") for name, x in load_file(file).items()}


def losses(out):
    return [(each["step"], each["loss"]) for each in json.loads((out / "metrics.json").read_text())["log"]]


def test_a_run_that_was_killed_ends_with_the_weights_of_one_that_was_not(photographs, tmp_path, monkeypatch):
    train.train(arguments(tmp_path / "whole"))
    step = train.Run.train_once

    def killed(run):
        if run.step == 4:
            raise KeyboardInterrupt
        return step(run)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Run, "train_once", killed)
        train.train(arguments(tmp_path / "killed"))
    assert not (tmp_path / "killed" / "metrics.json").exists()
    ran = []
    monkeypatch.setattr(train.Run, "train_once", lambda run: (ran.append(run.step), step(run))[1])
    train.train(arguments(tmp_path / "killed"))
    assert ran == [3, 4]  # the checkpoint was written after three steps
    found, wanted = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_a_checkpoint_of_other_settings_is_not_gone_on_with(photographs, tmp_path):
    train.train(arguments(tmp_path, steps=3))
    with pytest.raises(ValueError, match=r"was made with .*'steps': 3.*; got .*'steps': 5.*Give another --out"):
        train.train(arguments(tmp_path))
