"""The transfer benchmark on small clips and short training: rows, what stands beside what, and the models it trains."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fidelity_tables
import transfer
from paroattn.capture.regrid import RegriddedStatistics, regridded
from paroattn.demo.pipeline import load_demo
from paroattn.demo.prompt import CALIBRATION_PROMPTS, EVALUATION_PROMPTS
from paroattn.grid import Grid
from paroattn.integration.calibrate import collect
from paroattn.plan.search import PlanSettings, make_plan
from transfer import Calibration, Case, Setting

sys.path.append(str(Path(__file__).parents[1] / "training"))
SMALL = Setting(steps=2, guidance=1.0, size=(4, 20, 28))
LARGER = replace(SMALL, size=(5, 20, 36))
AT = Calibration(CALIBRATION_PROMPTS[:1], steps=2, at=SMALL)
CASES = [
    Case("steps", 3, replace(SMALL, steps=3), replace(AT, steps=3), AT),
    Case("resolution", "5x5x9", LARGER, replace(AT, at=LARGER), AT),
    Case("resolution", "5x5x9, masks alone", LARGER, replace(AT, at=LARGER), AT, masks_alone=True),
]
pytestmark = pytest.mark.usefixtures("one_thread")


def only_larger(measured):
    """Another process's calibration: what the first one has kept is not measured again."""

    def measure(bench, calibration):
        assert calibration.at == LARGER
        return measured(bench, calibration)

    return measure


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("transfer") / "transfer.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "cases", lambda: CASES)
        patch.setattr(transfer, "STEPS", 2)
        common = ["--clips", "2", "--densities", "0.6", "--device", "cpu", "--out", str(out)]
        folder = ["--statistics", str(out.with_name("statistics"))]
        transfer.main([*common, *folder, "--values", "3"])
        patch.setattr(transfer.Bench, "_measured", only_larger(transfer.Bench._measured))
        transfer.main([*common, *folder, "--axes", "resolution"])
        patch.setattr(transfer, "row", None)  # there is nothing left to measure
        transfer.main([*common, *folder, "--resume"])
    return out


def test_statistics_that_remember_say_the_same_and_read_once(monkeypatch):
    statistics = collect(load_demo(), CALIBRATION_PROMPTS[0], steps=2, num_frames=4, height=20, width=28)["transformer"]
    laid, settings = regridded(statistics, Grid(5, 5, 9)), PlanSettings(0.6)
    wanted, asked, mean = make_plan(laid, settings), [], RegriddedStatistics.mean

    def counted(self, *question):
        asked.append(question)
        return mean(self, *question)

    monkeypatch.setattr(RegriddedStatistics, "mean", counted)
    memory = transfer.remembered(laid)
    layer = next(iter(memory.layers))
    memory.mean(layer, "error").zero_()  # whoever asks may change what he gets
    counts = []
    for _ in range(2):
        found = make_plan(memory, settings)
        assert found.made == wanted.made and found.layers.keys() == wanted.layers.keys()
        for name, layer in found.layers.items():
            assert torch.equal(layer.mask.bits, wanted.layers[name].mask.bits)
            assert layer.orders == wanted.layers[name].orders
        counts.append(len(asked))
    assert counts[0] == counts[1] == len({str(question) for question in asked}) > 0


def test_every_case_becomes_a_row_with_both_plans_at_one_density(found):
    rows = json.loads(found.read_text())["rows"]
    assert [(row["axis"], row["value"], row["grid"], row["steps"]) for row in rows] == [
        ("steps", 3, "4x5x7", 3), ("resolution", "5x5x9", "5x5x9", 2), ("resolution", "5x5x9, masks alone", "5x5x9", 2),
    ]  # fmt: skip
    assert rows[1]["psnr"] != rows[2]["psnr"] and rows[1]["psnr_own"] != rows[1]["psnr"]
    for row in rows:
        assert row["clips"] == len(row["psnr"]) == len(row["psnr_own"]) == 2
        assert row["density_own_plan"] == pytest.approx(row["density_executed"], abs=0.06)
        assert row["psnr_mean"] == pytest.approx(sum(row["psnr"]) / 2, abs=1e-3)
        assert row["psnr_min"] == pytest.approx(min(row["psnr"]), abs=1e-3)
        assert row["loss_mean"] == pytest.approx(row["psnr_own_plan"] - row["psnr_mean"], abs=2e-3)
        assert 5 < row["psnr_mean"] < 80 and row["psnr"] != row["psnr_own"]
        assert row["loss_interval"][0] <= row["loss_mean"] <= row["loss_interval"][1]


def test_the_cases_are_those_of_the_table():
    found = transfer.cases()
    assert {case.axis for case in found} == set(transfer.AXES)
    assert {case.value for case in found if case.axis == "steps"} == {4, 8, 12, 24, 50, "4, distilled"}
    for case in found:
        assert not set(case.plan.prompts) & set(EVALUATION_PROMPTS)
        assert case.plan.at == Setting() and case.plan.steps == 10
        if case.axis in ("steps", "guidance", "finetune", "resolution"):
            assert case.own.at == case.setting and case.own.prompts == CALIBRATION_PROMPTS
        if case.axis == "steps":
            assert case.own.steps == case.setting.steps == int(str(case.value).partition(",")[0])
        if case.axis == "resolution":
            assert case.value == str(case.setting.grid) + ", masks alone" * case.masks_alone
            assert case.setting.grid != Grid(16, 13, 18)
    two, many = (case for case in found if case.axis == "prompt")
    assert (len(two.plan.prompts), len(many.plan.prompts)) == (2, 16) and two.own == many.own
    assert two.own.prompts == EVALUATION_PROMPTS and len(set(many.plan.prompts)) == 16


def test_a_student_learns_the_steps_that_lead_from_one_state_of_the_teacher_to_the_next():
    from distil import PARTS, Distillation, Settings

    pipe = load_demo()
    work = Distillation(pipe, Settings(clips=1, steps=14, batch=3, checked=2), size=(2, 16, 20))
    assert len(work.levels) == 5 and work.levels[0] == 1 and work.levels[-1] == 0
    ids, states = work.trajectories(1)
    start, end, state = work.levels[1], work.levels[2], states[:, 1].float()
    for part in range(PARTS[1]):
        level = start + (end - start) * part / PARTS[1]
        when = torch.full((1,), level * 1000)
        wanted, plain = (
            pipe.transformer(state, when, pipe.conditioner(each), return_dict=False)[0]
            for each in (ids, torch.zeros_like(ids))
        )
        state = state + (end - start) / PARTS[1] * (plain + 2 * (wanted - plain))
    torch.testing.assert_close(state.detach(), states[:, 2].float(), atol=4e-3, rtol=0)
    before = {name: each.clone() for name, each in pipe.transformer.state_dict().items()}
    student, log = work.train()
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert all(torch.equal(each, before[name]) for name, each in pipe.transformer.state_dict().items())
    quality = work.quality(student)
    assert quality["psnr_unguided_teacher"] < quality["psnr_teacher"] < 60 and quality["psnr_student"] > 5


def test_a_lora_learns_negatives_and_leaves_the_model_it_came_from():
    pytest.importorskip("peft")
    import lora

    pipe = load_demo()
    before = {name: each.clone() for name, each in pipe.transformer.state_dict().items()}
    photographs = torch.rand(8, 3, 40, 56, generator=torch.Generator().manual_seed(0)) - 1
    tuned, about = lora.fine_tune(pipe, photographs, lora.Settings(rank=4, steps=8, batch=4), (3, 16, 20))
    assert about["held_out_loss"] < about["held_out_loss_before"]
    assert set(tuned.state_dict()) == set(before)
    assert all(torch.equal(each, before[name]) for name, each in pipe.transformer.state_dict().items())


def test_the_table_pairs_both_plans_and_the_two_numbers_of_prompts(monkeypatch):
    def made(axis, value, psnr, own, trained=None):
        loss = [there - here for there, here in zip(own, psnr, strict=True)]
        return {
            "axis": axis, "value": value, "density_target": 0.3, "density_executed": 0.29, "psnr": psnr,
            "psnr_own": own, "psnr_mean": sum(psnr) / len(psnr), "psnr_own_plan": sum(own) / len(own),
            "psnr_min": min(psnr), "loss_mean": sum(loss) / len(loss), "loss_interval": [0.5, 1.5],
            "clips": len(psnr), "device": "GPU", "torch": "2", "date": "today", "trained": trained,
        }  # fmt: skip

    rows = [
        made("prompt", "calibrated on 2", [24.0, 26.0], [25.0, 27.0]),
        made("prompt", "calibrated on 16", [24.5, 26.1], [25.0, 27.0]),
        made("steps", "4, distilled", [30.0, 20.0], [31.0, 21.0], {"psnr_student": 20.25}),
    ]
    monkeypatch.setattr(fidelity_tables, "rows_of", lambda name: rows)
    text = fidelity_tables.transfer()
    assert "| prompt: calibrated on 2, 0.3 | 0.290 | 25.0 | 24.0 | 26.0 | 1.00 [0.50, 1.50] |" in text
    assert "16 prompts instead of two: at 0.3 0.30 dB." in text
    assert text.index("calibrated on 16") < text.index("4, distilled")
    monkeypatch.setattr(fidelity_tables, "rows_of", lambda name: [])
    assert fidelity_tables.transfer() == fidelity_tables.NOTHING
