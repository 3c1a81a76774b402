"""`paro evaluate`: paired statistics, metrics beyond the usual, killed and resumed, and shared among ranks."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from paroattn.cli import main
from paroattn.demo.pipeline import PLAN
from paroattn.demo.prompt import EVALUATION_PROMPTS
from paroattn.evaluation import metrics as metrics_module
from paroattn.evaluation.fidelity import (
    Comparison,
    Fidelity,
    compare,
    evaluate,
    paired_differences,
    summarise_pairs,
)
from paroattn.evaluation.metrics import METRICS, check_metric, load_metrics
from paroattn.evaluation.pairs import Pairs
from paroattn.evaluation.ranks import Ranks
from paroattn.grid import Grid
from paroattn.integration.report import merged
from paroattn.plan.plan import Plan

ROOT = Path(__file__).parents[1]
PROMPTS = EVALUATION_PROMPTS[:3]
SMALL = ["--steps", "2", "--guidance-scale", "1", "--num-frames", "4", "--height", "20", "--width", "28"]
TIMES = ("dense_seconds", "sparse_seconds")
pytestmark = pytest.mark.usefixtures("one_thread")


def clip(seed=0, frames=3, height=20, width=24):
    coarse = torch.rand(1, 3, frames, 5, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (frames, height, width), mode="trilinear")[0].transpose(0, 1)


def pair(prompt="a", seed=0, psnr=30.0, **more):
    return Comparison(prompt, seed, Fidelity(psnr, 0.9, 0.95), 3.0, 2.0, more=more)


# Statistics


def test_pairs_are_summarised_by_every_metric_that_all_of_them_have():
    found = summarise_pairs([pair(lpips=0.1, ms_ssim=0.99), pair(psnr=20.0, lpips=0.3)])
    assert list(found) == ["psnr", "ssim", "cosine", "lpips"]
    assert (found["lpips"].mean, found["lpips"].lowest, found["psnr"].lowest) == (pytest.approx(0.2), 0.1, 20)


def test_two_evaluations_are_compared_pair_by_pair_and_not_mean_by_mean():
    ours = [pair("a", 0, 30.0), pair("b", 0, 20.0), pair("c", 0, 25.0), pair("c", 1, 90.0)]
    theirs = [pair("c", 0, 24.5), pair("a", 0, 29.0), pair("b", 0, 19.5), pair("d", 0, 5.0)]
    found = paired_differences(*([each.record() for each in side] for side in (ours, theirs)), ["psnr", "lpips"])
    assert list(found) == ["psnr"]
    half = 4.303 * np.std([1.0, 0.5, 0.5], ddof=1) / np.sqrt(3)
    assert found["psnr"].mean == pytest.approx(2 / 3) and found["psnr"].count == 3
    assert found["psnr"].interval == pytest.approx((2 / 3 - half, 2 / 3 + half), rel=1e-4)
    with pytest.raises(ValueError, match="share none"):
        paired_differences([ours[0].record()], [theirs[0].record()], ["psnr"])


def test_identical_clips_leave_the_difference_of_psnr_but_not_the_others():
    ours, theirs = [pair("a", psnr=float("inf")), pair("b")], [pair("a"), pair("b", psnr=28.0)]
    found = paired_differences(*([each.record() for each in side] for side in (ours, theirs)), ["psnr", "ssim"])
    assert (found["psnr"].count, found["psnr"].mean, found["ssim"].count) == (1, 2.0, 2)


def test_ms_ssim_is_measured_where_five_scales_fit_and_orders_clips_as_it_should():
    large = clip(frames=1, height=176, width=180)

    def generated(noise):
        state = iter([large + noise * clip(1, 1, 176, 180), large])
        return next(evaluate(lambda prompt, seed: next(state), ["a"], dense=nullcontext))

    near, far = generated(0.05), generated(0.4)
    assert 0.5 < far.more["ms_ssim"] < near.more["ms_ssim"] < 1
    small = iter([clip(), clip()])
    assert next(evaluate(lambda *_: next(small), ["a"], dense=nullcontext)).more == {}


def test_the_cosine_of_the_latents_is_that_of_the_two_last_latents():
    made, latents = iter([0, 1]), [torch.tensor([3.0, 4.0]), torch.tensor([5.0, 0.0])]
    current = []

    def generate(prompt, seed):
        current[:] = [latents[next(made)]]
        return clip()

    (found,) = evaluate(generate, ["a"], dense=nullcontext, latents=lambda: current[0])
    assert found.more["latents_cosine"] == pytest.approx(0.6)
    assert found.record()["latents_cosine"] == found.more["latents_cosine"]


# Metrics with packages of their own


@pytest.mark.parametrize("name", ["lpips", "fvd", "vbench"])
def test_a_metric_without_its_package_names_what_to_install(name, monkeypatch):
    monkeypatch.setattr(metrics_module, "find_spec", lambda package: None)
    monkeypatch.setattr(metrics_module.shutil, "which", lambda command: None)
    with pytest.raises(RuntimeError, match=rf"{name} needs .*(paroattn\[metrics\]|pipx install vbench)"):
        check_metric(name)
    with pytest.raises(ValueError, match="metrics are lpips"):
        check_metric("beauty")


def test_weights_that_are_not_there_are_named_before_any_work(monkeypatch):
    def load(device):
        raise OSError("offline")

    monkeypatch.setitem(METRICS, "clip-score", replace(METRICS["clip-score"], packages=(), load=load))
    with pytest.raises(RuntimeError, match=r"clip-score needs weights that are not on this machine.*offline"):
        load_metrics(["clip-score"], "cpu")


def test_lpips_is_zero_for_the_same_clip_and_grows_with_the_difference():
    pytest.importorskip("torchvision", reason="LPIPS needs torchvision, from the extra metrics")
    try:
        (measure,), _ = load_metrics(["lpips"], "cpu")
    except RuntimeError as error:
        pytest.skip(str(error))
    one = clip(height=64, width=64)
    near, far = (measure("a", one, one + gap * clip(1, height=64, width=64))["lpips"] for gap in (0.1, 0.8))
    assert measure("a", one, one)["lpips"] == pytest.approx(0, abs=1e-6) and near < far


def test_fvd_gets_all_dense_clips_and_all_sparse_ones(monkeypatch):
    seen = []

    class Network:
        def __init__(self, name, ckpt_path, device):
            seen.append((name, device))

        def compute_fvd(self, real, fake):
            seen.append((real.shape, real[1, 0, 0, 0].tolist(), fake[1, 0, 0, 0].tolist()))
            return np.float64(12.5)

    monkeypatch.setitem(sys.modules, "cdfvd.fvd", types.SimpleNamespace(cdfvd=Network))
    monkeypatch.setitem(sys.modules, "cdfvd", types.SimpleNamespace())
    monkeypatch.setattr(metrics_module, "find_spec", lambda name: True)
    _, (measure,) = load_metrics(["fvd"], "cpu")
    clips = [(np.full((4, 8, 8, 3), i, np.uint8), np.full((4, 8, 8, 3), 100 + i, np.uint8)) for i in range(2)]
    assert measure(clips) == {"fvd": 12.5}
    assert seen == [("i3d", "cpu"), ((2, 4, 8, 8, 3), [1] * 3, [101] * 3)]


def test_vbench_is_run_by_its_own_command_on_both_sides(monkeypatch, tmp_path):
    pytest.importorskip("imageio", reason="VBench reads .mp4, which needs the extra video")
    program = tmp_path / "vbench"
    program.write_text(
        f"#!{sys.executable}\nimport json, pathlib, sys\n"
        "words = dict(zip(sys.argv[2::2], sys.argv[3::2]))\n"
        "out = pathlib.Path(words['--output_path']); out.mkdir()\n"
        "count = len(list(pathlib.Path(words['--videos_path']).glob('*.mp4')))\n"
        "score = count + (0.5 if words['--videos_path'].endswith('sparse') else 0.25)\n"
        "(out / 'x_eval_results.json').write_text(json.dumps({'motion_smoothness': [score, []]}))\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    _, (measure,) = load_metrics(["vbench"], "cpu")
    clips = [(np.zeros((4, 32, 32, 3), np.uint8),) * 2] * 2
    assert measure(clips) == {"vbench motion_smoothness, dense": 2.25, "vbench motion_smoothness, sparse": 2.5}


# Finished pairs


def test_a_pair_comes_back_as_it_was_kept(tmp_path):
    dense, sparse = clip(), clip() * 0.9
    kept = Comparison("a", 3, compare(dense, sparse), 2.0, 1.0, dense, sparse, more={"lpips": 0.25})
    pairs = Pairs(tmp_path / "pairs", {"steps": 2}, fps=8, pixels=True)
    pairs.keep(4, kept, {"transformer": {}})
    pairs.keep(5, replace(kept, fidelity=compare(dense, dense)), {})
    assert pairs.done() == {4, 5} == Pairs(tmp_path / "pairs", {"steps": 2}, fps=8).done()
    found = pairs.load(4).comparison
    assert (found.record(), found.more) == (kept.record(), kept.more) and found.dense is None
    assert pairs.load(5).comparison.fidelity.identical and pairs.load(4).executed == {"transformer": {}}
    assert [sheet.frames for sheet in found.sheets] == [3, 3, 3] and found.sheets[0].cell == (24 + 8, 20 + 12)
    assert pairs.clips(4)[1].shape == (3, 20, 24, 3)


def test_a_folder_of_something_else_is_refused(tmp_path):
    Pairs(tmp_path / "pairs", {"steps": 1, "seed": 0}, fps=8)
    pairs = Pairs(tmp_path / "pairs", {"steps": 2, "seed": 0}, fps=8)  # the first has finished nothing
    pairs.keep(0, Comparison("a", 0, compare(clip(), clip()), 2.0, 1.0, clip(), clip()), {})
    with pytest.raises(ValueError, match="differs in steps: 2; got 3"):
        Pairs(tmp_path / "pairs", {"steps": 3, "seed": 0}, fps=8)
    assert Pairs(tmp_path / "pairs", {"steps": 2, "seed": 0}, fps=8).done() == {0}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="neither"):
        Pairs(tmp_path / "mine", {}, fps=8)


def test_a_damaged_pair_is_named(tmp_path):
    pairs = Pairs(tmp_path / "pairs", {}, fps=8)
    (tmp_path / "pairs" / "pair-00003.json").write_text('{"record": {}}')
    with pytest.raises(ValueError, match=r"pair-00003.json is damaged"):
        pairs.load(3)


def test_reports_of_several_runs_add_up():
    def part(density, calls, dense):
        phase = {"density": density, "sparse_calls": calls, "precision": "bf16", "impl": "cpu" if calls else None}
        layer = {"density": density, "sparse_calls": calls, "dense_calls": dense, "phases": [phase]}
        layer["faster_dense"] = next(iter(dense), None)
        return {"transformer": {
            "model_class": "M", "plan_grid": "1x2x3", "grids_seen": {"1x2x3": calls}, "calls": {"sparse": calls},
            "replaced_layers": [], "density": density, "layers": {"a": layer},
        }}  # fmt: skip

    found = merged([part(0.2, 3, {}), part(None, 0, {"too short": 1}), part(0.4, 1, {})])
    row = found.to_dict()["transformer"]
    assert row["layers"]["a"]["phases"][0] == {
        "density": pytest.approx(0.25), "sparse_calls": 4, "precision": "bf16", "impl": "cpu",
    }  # fmt: skip
    assert row["layers"]["a"]["density"] == row["density"] == pytest.approx((4 * 0.25 + 1) / 5)
    assert row["calls"] == row["grids_seen"] | {"sparse": 4} | {} or row["calls"] == {"sparse": 4}
    assert row["layers"]["a"]["dense_calls"] == {"too short": 1}
    assert row["layers"]["a"]["faster_dense"] == "too short"


# The command


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan") / "plan"
    Plan.from_pretrained(PLAN).for_grid(Grid(4, 5, 7)).save_pretrained(folder)
    return folder


def words(plan, out, *more):
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    return ["evaluate", "demo", "--plan", str(plan), *prompts, "--out", str(out), *SMALL, *more]


def timeless(folder):
    """An evaluation's numbers without what a clock or the command says."""
    numbers = json.loads((folder / "results.json").read_text())
    for record in (*numbers["clips"], numbers["worst"]):
        for name in TIMES:
            record.pop(name)
    numbers["environment"].pop("date")
    return numbers


@pytest.fixture(scope="module")
def whole(plan):
    out = plan.with_name("whole")
    assert main(words(plan, out)) == 0
    return out


def test_an_evaluation_has_statistics_the_worst_clip_and_its_prompt(whole):
    numbers = timeless(whole)
    psnr = [each["psnr"] for each in numbers["clips"]]
    assert [each["prompt"] for each in numbers["clips"]] == list(PROMPTS)
    assert numbers["summary"]["psnr"]["mean"] == pytest.approx(sum(psnr) / 3)
    low, high = numbers["summary"]["psnr"]["interval"]
    assert low < numbers["summary"]["psnr"]["mean"] < high
    assert numbers["worst"]["psnr"] == min(psnr)
    assert 0.5 < numbers["summary"]["latents_cosine"]["mean"] <= 1
    assert numbers["executed"]["transformer"]["calls"] == {"sparse": 6, "inside paroattn.dense": 6}
    page = (whole / "report.html").read_text()
    assert "95 % interval of the mean" in page and f"{numbers['worst']['prompt']}, seed 0" in page
    assert "cosine of the latents" in page


def test_samples_count_seeds_up_and_another_evaluation_stands_beside(plan, whole, tmp_path):
    sparser = ["--samples", "2", "--precision", "int8", "--against", str(whole)]
    assert main(words(plan, tmp_path / "out", *sparser)) == 0
    numbers = timeless(tmp_path / "out")
    assert [(each["prompt"], each["seed"]) for each in numbers["clips"][:3]] == [
        (PROMPTS[0], 0), (PROMPTS[0], 1), (PROMPTS[1], 0),
    ]  # fmt: skip
    ours = {each["prompt"]: each["psnr"] for each in numbers["clips"] if each["seed"] == 0}
    differences = [ours[each["prompt"]] - each["psnr"] for each in timeless(whole)["clips"]]
    assert numbers["against"]["psnr"]["mean"] == pytest.approx(sum(differences) / 3)
    assert numbers["against"]["psnr"]["count"] == 3
    assert "leaves out 0" in (tmp_path / "out" / "report.html").read_text()


def started(command, **environment):
    return subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_killed_after_a_pair_it_goes_on_and_ends_with_the_same_numbers(plan, whole, tmp_path, capsys):
    out = tmp_path / "out"
    process = started([sys.executable, "-m", "paroattn.cli", *words(plan, out)])
    kept = tmp_path / "out.unfinished" / "pair-00000.json"
    for _ in range(1200):
        if kept.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert kept.exists() and not out.exists()
    before = kept.read_bytes()
    (tmp_path / "out.unfinished" / "pair-00001.json.new").write_text("half of a pai")
    assert main(words(plan, out, "--seed", "1")) == 2
    assert "differs in seed: 0; got 1" in capsys.readouterr().err
    assert main(words(plan, out)) == 0
    assert "going on with" in capsys.readouterr().err
    assert timeless(out) == timeless(whole)
    times = [json.loads(before)["record"][name] for name in TIMES]
    assert [json.loads((out / "results.json").read_text())["clips"][0][name] for name in TIMES] == times
    assert not kept.parent.exists()


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


def test_two_ranks_make_what_one_process_makes(plan, whole, tmp_path):
    out = tmp_path / "out"
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    process = started([sys.executable, "-m", *torchrun, "-m", "paroattn.cli", *words(plan, out)])
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert timeless(out) == timeless(whole)
    assert said.count("wrote ") == said.count("against dense:") == 1


def test_a_rank_that_fails_ends_the_job_and_the_rest_is_kept(plan, tmp_path):
    out = tmp_path / "out"
    prompts = [word for prompt in (PROMPTS[0], "a dragon over Rome", PROMPTS[2]) for word in ("--prompt", prompt)]
    command = ["evaluate", "demo", "--plan", str(plan), *prompts, "--out", str(out), *SMALL]
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    process = started([sys.executable, "-m", *torchrun, "-m", "paroattn.cli", *command])
    said, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and not out.exists()
    assert "understands prompts like" in said and "Traceback" not in said.split("torch/distributed")[0]


def test_without_anyone_to_stop_it_rank_0_gives_up_when_the_group_has_been_silent(monkeypatch):
    ticks, clock = [], iter(float(second) for second in range(1000))
    monkeypatch.setattr("paroattn.evaluation.ranks.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("paroattn.evaluation.ranks.time.sleep", lambda seconds: None)
    group = Ranks(0, 2, timeout=20)
    with pytest.raises(RuntimeError, match=r"pair 1 \(2 are missing\).*for 20 s\. Finished pairs are kept"):
        group.wait(range(4), lambda: {0} if len(ticks) < 12 else {0, 3}, lambda: ticks.append(1))
    assert len(ticks) > 28  # the wait began anew when pair 3 came


def test_ranks_share_what_is_left_and_refuse_to_disagree(monkeypatch):
    monkeypatch.setattr("paroattn.evaluation.ranks.dist.broadcast_object_list", lambda told, src: None)
    shares = [Ranks(rank, 3).share({1, 2, 5, 7, 8}) for rank in range(3)]
    assert shares == [[1, 7], [2, 8], [5]]

    def gathered(found, mine):
        found[:] = [{"plan": "a", "steps": 2}, {"plan": "b", "steps": 2}]

    monkeypatch.setattr("paroattn.evaluation.ranks.dist.all_gather_object", gathered)
    with pytest.raises(ValueError, match="rank 1 has another plan than rank 0: b instead of a"):
        Ranks(0, 2).agree({"plan": "a", "steps": 2})
