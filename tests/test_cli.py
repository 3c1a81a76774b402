"""The command line: every stage on the bundled model, and every wrong use before any work."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image, ImageChops

from paroattn import cli
from paroattn.cli import arguments, main, planning
from paroattn.demo.prompt import CALIBRATION_PROMPTS, EVALUATION_PROMPTS
from paroattn.grid import CANDIDATES, Grid
from paroattn.integration.refining import Refinement
from paroattn.plan.plan import Plan

FAST = ["--guidance-scale", "1", "--steps", "2"]


def paro(*words) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(f"# calibration\n\n{CALIBRATION_PROMPTS[0]}\n")
    return path


@pytest.fixture(scope="module")
def plan(prompts):
    folder = prompts.parent / "plan"
    assert (
        paro("calibrate", "demo", "--prompts", prompts, "--density", 0.4, "--out", folder, "--row-stride", 8, *FAST)
        == 0
    )
    return folder


def said(capsys) -> tuple[dict, str]:
    captured = capsys.readouterr()
    return json.loads(captured.out) if captured.out else {}, " ".join(captured.err.split())


def test_calibrate_writes_statistics_and_the_plan_made_from_them(plan):
    files = {str(path.relative_to(plan)) for path in plan.rglob("*") if path.is_file()}
    maps = {name for name in files if name.startswith("statistics/transformer/maps/blocks.")}
    assert len(maps) == 10 and "statistics/transformer/maps/blocks.4.attn1@1.0.safetensors" in maps
    assert files - maps == {
        "README.md",
        "transformer/plan.json",
        "transformer/plan.safetensors",
        "statistics/transformer/statistics.json",
    }
    assert not plan.with_name(plan.name + ".unfinished").exists()


def test_plan_makes_another_density_without_the_model(plan, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("paroattn.demo.pipeline.load_demo", None)
    assert paro("plan", plan, "--density", 0.2, "--out", tmp_path / "plan20", "--json") == 0
    numbers, words = said(capsys)
    assert numbers["transformer"]["density"] == pytest.approx(0.2, abs=1e-3)
    assert "next: paro show" in words
    assert paro("plan", tmp_path / "plan20", "--density", 0.3, "--out", tmp_path / "plan30", "--precision", "int8") == 0


def test_plan_takes_one_target_and_shows_what_it_comes_to(plan, tmp_path, capsys):
    words = ("--snr", 20, "--precision", "int8/fp8", "--out", tmp_path / "plan", "--curve", tmp_path / "curve.json")
    assert paro("plan", plan, *words, "--json") == 0
    numbers, said_words = said(capsys)
    chosen = numbers["transformer"]["predicted"]
    assert chosen["snr_db"] == pytest.approx(20, abs=0.1) and 0.02 < chosen["density"] < 0.9
    assert numbers["transformer"]["density"] == pytest.approx(chosen["density"], abs=1e-3)
    curves = json.loads((tmp_path / "curve.json").read_text())
    assert curves == numbers["curves"] and curves["transformer"]["chosen"] == chosen
    assert "finished sample" in said_words and "20.0" in said_words
    assert paro("show", tmp_path / "plan", "--html", tmp_path / "plan.html") == 0
    assert "20.0" in said(capsys)[1] and "<svg" in (tmp_path / "plan.html").read_text()


def test_plan_shows_the_curve_without_writing_a_plan(plan, tmp_path, capsys):
    assert paro("plan", plan, "--curve", tmp_path / "curve.html") == 0
    assert "not predicted: times on NVIDIA H200 are known for" in said(capsys)[1]
    assert [path.name for path in tmp_path.iterdir()] == ["curve.html"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--speedup", 3, "--precision", "int8/fp8"], "speed-up of one forward on NVIDIA H200 must be 1.00…1.00"),
        (["--speedup", 3], "got fp32/fp32 in blocks of 64x64 with head dimension 64"),
        (["--error", 1e6], "a target error must be at most"),
        (["--gpu", "abacus"], "a GPU must be NVIDIA H200"),
        (["--error", 0.1, "--budget", "per_head"], "needs one threshold; got the budget per_head"),
    ],
)
def test_a_target_out_of_reach_leaves_no_plan(words, message, plan, tmp_path, capsys):
    assert paro("plan", plan, "--out", tmp_path / "plan", *words) == 2
    assert message in said(capsys)[1] and not (tmp_path / "plan").exists()


def test_plan_mixes_int4_and_int8_and_says_so(plan, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    assert paro("plan", plan, "--precision", "auto", "--int4-share", 0.2, "--out", mixed, "--json") == 0
    numbers, words = said(capsys)
    assert numbers["transformer"]["precision"] == pytest.approx({"int8": 0.8, "int4": 0.2})
    assert "transformer: 20% of the heads are in INT4, those that are predicted to lose least by it" in words
    assert numbers["transformer"]["predicted"]["heads_int4"] == pytest.approx(0.2)
    assert paro("show", mixed, "--html", tmp_path / "plan.html") == 0
    words = said(capsys)[1]
    assert "int8 (80% of heads), int4 (20% of heads)" in words and "heads in INT4" in words
    assert re.search(r"20\s% of the heads in int4", (tmp_path / "plan.html").read_text())
    assert paro("plan", mixed, "--density", 0.3, "--out", tmp_path / "again", "--json") == 0
    assert said(capsys)[0]["transformer"]["precision"] == pytest.approx({"int8": 0.8, "int4": 0.2})
    assert paro("plan", plan, "--precision", "auto", "--out", tmp_path / "eight", "--json") == 0
    numbers, words = said(capsys)
    assert numbers["transformer"]["precision"] == {"int8": 1.0}
    assert "INT4 saves no time on NVIDIA H200: every head is in INT8" in words
    part = Plan.from_pretrained(plan)["transformer"]
    first, *others = part.layers
    eight = replace(part.layers[first], precision=(("int8",) * part.heads,) * len(part.phases))
    other = replace(part, layers={first: eight, **{name: part.layers[name] for name in others}})
    with pytest.raises(ValueError, match=r"several precisions, fp32, int8; give one with --precision"):
        planning._precision_of({"transformer": other})


def test_plan_needs_something_to_write_or_to_show(plan, tmp_path, capsys):
    assert paro("plan", plan) == 2 and "--out FOLDER is needed" in said(capsys)[1]
    assert paro("plan", plan, "--curve", tmp_path / "curve.pdf") == 2
    assert "written as .html or .json; got 'curve.pdf'" in said(capsys)[1]
    with pytest.raises(SystemExit):
        paro("plan", plan, "--density", 0.3, "--error", 0.1, "--out", tmp_path / "plan")


def test_plan_from_statistics_is_for_another_grid_at_another_density(plan, tmp_path, capsys):
    out = tmp_path / "longer"
    assert paro("plan", plan, "--grid", "19x13x18", "--density", 0.2, "--out", out, "--json") == 0
    numbers, words = said(capsys)
    assert numbers["transformer"]["grid"] == "19x13x18" and "tells what that loses" in words
    assert numbers["transformer"]["density"] == pytest.approx(0.2, abs=1e-3)
    made = Plan.from_pretrained(out)["transformer"].made
    assert made["carried_from"] == ["16x13x18"] and not (out / "statistics").exists()
    masks_alone = Plan.from_pretrained(plan)["transformer"].for_grid(Grid(19, 13, 18))
    assert masks_alone.density == pytest.approx(0.4, abs=0.01)


def test_refine_hands_over_the_plan_its_statistics_and_the_prompts(plan, prompts, tmp_path, capsys, monkeypatch):
    handed: dict[str, Any] = {}

    def refine(pipe, plan, measured, prompts, **settings):
        settings["progress"](1.0)
        handed.update(settings, pipe=type(pipe).__name__, plan=plan, measured=measured, prompts=prompts)
        return Plan({name: replace(part, made={**part.made, "refined": {}}) for name, part in plan.items()})

    monkeypatch.setattr("paroattn.integration.refining.refine", refine)
    words = ["refine", "demo", "--plan", plan, "--prompts", prompts, "--out", tmp_path / "new", "--rounds", 3]
    assert paro(*words, "--clips", 2, "--keep-activations", "--steps", 5, "--guidance-scale", 1.5, "--seed", 7) == 0
    assert handed["prompts"] == [CALIBRATION_PROMPTS[0]] and handed["pipe"] == "DemoPipeline"
    assert handed["refinement"] == Refinement(3, 2, checkpointing=False)
    assert (handed["steps"], handed["seed"], handed["guidance_scale"]) == (5, 7, 1.5)
    assert handed["measured"]["transformer"].layers.keys() == handed["plan"]["transformer"].layers.keys()
    assert Plan.from_pretrained(tmp_path / "new")["transformer"].made["refined"] == {}
    assert "next: paro show" in said(capsys)[1]
    assert paro("plan", tmp_path / "new", "--density", 0.2, "--out", tmp_path / "again") == 0  # statistics came along


def test_show_prints_a_table_and_draws_a_page(plan, tmp_path, capsys):
    assert paro("show", plan, "--html", tmp_path / "plan.html", "--json") == 0
    numbers, words = said(capsys)
    assert numbers["transformer"]["grid"] == "16x13x18" and "density 0.400" in words and "blocks.4.attn1" in words
    assert "<html" in (tmp_path / "plan.html").read_text()


def test_show_draws_the_masks_of_a_phase_into_one_picture(plan, tmp_path, capsys):
    pictures = {}
    for phase in (0, 1):
        assert paro("show", plan, "--png", tmp_path / f"{phase}.png", "--phase", phase) == 0
        with Image.open(tmp_path / f"{phase}.png") as picture:
            pictures[phase] = picture.convert("RGB")
    assert min(pictures[0].size) > 500 and pictures[0].size == pictures[1].size
    assert ImageChops.difference(pictures[0], pictures[1]).getbbox() is not None
    assert paro("show", plan, "--html", tmp_path / "plan.html", "--phase", 1) == 0
    assert "in phase 1 of" in (tmp_path / "plan.html").read_text()


def test_show_draws_both_experts_below_each_other(plan, tmp_path):
    both, one = tmp_path / "both", Plan.from_pretrained(plan)["transformer"]
    Plan({"transformer": one, "transformer_2": replace(one, component="transformer_2")}).save_pretrained(both)
    for folder in (plan, both):
        assert paro("show", folder, "--png", tmp_path / f"{folder.name}.png") == 0
    with Image.open(tmp_path / "plan.png") as single, Image.open(tmp_path / "both.png") as double:
        assert double.size == (single.width, 2 * single.height)
        lower = double.crop((0, single.height, *double.size))
        assert ImageChops.difference(lower.convert("RGB"), single.convert("RGB")).getbbox() is None


def test_generate_writes_a_clip_and_says_what_ran(plan, tmp_path, capsys):
    out = tmp_path / "clip.gif"
    assert (
        paro("generate", "demo", "--plan", plan, "--prompt", EVALUATION_PROMPTS[0], "--out", out, "--json", *FAST) == 0
    )
    numbers, words = said(capsys)
    assert out.stat().st_size > 1000
    assert numbers["executed"]["transformer"]["calls"] == {"sparse": 2}
    assert f"wrote {out}" in words and "next: paro evaluate" in words


def test_evaluate_writes_a_report_and_numbers(plan, prompts, tmp_path, capsys):
    out = tmp_path / "report"
    assert paro("evaluate", "demo", "--plan", plan, "--prompts", prompts, "--out", out, "--json", *FAST) == 0
    numbers, _ = said(capsys)
    assert json.loads((out / "results.json").read_text())["clips"] == numbers["clips"]
    assert 10 < numbers["summary"]["psnr"]["mean"] < 99
    assert CALIBRATION_PROMPTS[0] in (out / "report.html").read_text()


def test_demo_tells_the_whole_story(tmp_path, capsys):
    out = tmp_path / "demo"
    assert paro("demo", "--out", out, "--clips", 1, "--steps", 1, "--calibration-steps", 1, "--json") == 0
    numbers, words = said(capsys)
    page = (out / "report.html").read_text()
    assert "How this plan was made" in page and "The plan that ships" in page
    assert (
        numbers["density"] == pytest.approx(0.25, abs=1e-3) and (out / "plan" / "transformer" / "plan.json").is_file()
    )
    assert "against dense:" in words and "report.html" in words


def _wrong_uses(prompts, plan, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n# nothing\n")
    busy = tmp_path / "busy"
    busy.mkdir()
    (busy / "thesis.txt").write_text("mine")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "words.png").write_text("no picture")
    (tmp_path / "half.json").write_text("{")
    out, clip = ["--out", tmp_path / "out"], ["--out", tmp_path / "x.gif"]
    calibrate, some = ["calibrate", "demo", "--prompts", prompts, *out], ["--prompt", EVALUATION_PROMPTS[0]]
    generate = ["generate", "demo", *some, *clip]
    return {
        "at least one prompt": ["calibrate", "demo", "--prompts", empty, *out],
        "a list of prompts must be a file; got": ["calibrate", "demo", "--prompts", tmp_path / "none.txt", *out],
        "which is a folder. Check the path": ["calibrate", "demo", "--prompts", busy, *out],
        "must be text in UTF-8": ["calibrate", "demo", "--prompts", tmp_path / "bytes.txt", *out],
        "above 0 and at most 1; got 0.0": [*calibrate, "--density", 0],
        "above 0 and at most 1; got 1.5": ["plan", busy, *out, "--density", 1.5],
        "holds something else": ["calibrate", "demo", "--prompts", prompts, "--out", busy],
        "is a file": ["calibrate", "demo", "--prompts", prompts, "--out", empty],
        "an order must be one of": [*calibrate, "--orders", "FWX"],
        "a block is written": [*calibrate, "--block", "big"],
        "budget must be one of": [*calibrate, "--budget", "all"],
        "phases must end": [*calibrate, "--phase-ends", 0.5],
        "precision must be": [*calibrate, "--precision", "int5"],
        "has no argument negative_prompt": [*calibrate, "--negative-prompt", "blurry"],
        "height must be a multiple of 4, 128 at most; got 66": [*calibrate, "--height", 66],
        "neither demo, nor a diffusers model": ["calibrate", tmp_path / "model", "--prompts", prompts, *out],
        "device cuda:99 needs a GPU that PyTorch sees": [*calibrate, "--device", "cuda:99"],
        "device must be cpu, cuda or one of several such as cuda:1; got 'gpu'": [*calibrate, "--device", "gpu"],
        "demo comes whole and takes no --pipeline": [*calibrate, "--pipeline", "WanPipeline"],
        "demo comes whole and takes no --vae-tiling": [*generate, "--vae-tiling"],
        "demo comes whole and takes no --load": [*generate, "--load", "variant=fp16"],
        "statistics lie in the folder that a calibration wrote": ["plan", tmp_path / "missing", *out],
        "holds no statistics": ["plan", busy, *out],
        "holds no plan": ["show", busy],
        "neither a folder nor a plan": ["show", tmp_path / "missing"],
        "--phase must be 0…1; got 2": ["show", plan, "--phase", 2],
        "--phase must be 0…1; got -1": ["show", plan, "--phase", -1],
        "written as .png; got 'plan.jpg'": ["show", plan, "--png", tmp_path / "plan.jpg"],
        "is a folder; give the name of a file": ["show", plan, "--html", busy],
        "--plan is needed": ["generate", "some/model", *some, *clip],
        "got 'a dragon'": [*calibrate, "--prompt", "a dragon"],
        "understands prompts like": ["generate", "demo", "--prompt", "a dragon", *clip, *FAST],
        ".avi": ["generate", "demo", *some, "--out", tmp_path / "x.avi"],
        "a picture must be a file; got": [*generate, "--image", tmp_path / "none.png"],
        "a picture must be one that Pillow reads": [*generate, "--image", tmp_path / "words.png"],
        "half.json is not JSON": [*generate, "--set", f"image=@{tmp_path / 'half.json'}"],
        "what --against compares with must be a file": [
            "evaluate", "demo", "--prompts", prompts, *out, "--against", busy,
        ],
        "a curve is written as .html or .json; got 'curve.txt'": ["plan", busy, "--curve", tmp_path / "curve.txt"],
        "clips must be between": ["demo", *out, "--clips", 0],
        "at most 1; got 2.0": ["demo", *out, "--density", 2],
        "steps must be 1 or more": ["demo", *out, "--steps", 0],
        "--dense runs without a plan": [*generate, "--dense", "--plan", busy],
    }  # fmt: skip


def test_a_wrong_use_is_one_line_that_says_what_and_leaves_nothing(prompts, plan, tmp_path, capsys):
    for expected, words in _wrong_uses(prompts, plan, tmp_path).items():
        before = sorted(tmp_path.rglob("*"))
        assert paro(*words) == 2, words
        numbers, line = said(capsys)
        assert expected in line and not numbers and "Traceback" not in line, (expected, line)
        assert sorted(tmp_path.rglob("*")) == before, words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", 0], "must be 1 or more; got 0"),
        (["--fps", 0], "must be above 0; got 0"),
        (["--height", -8], "got -8"),
        (["--guidance-scale", "nan"], "must be finite; got nan"),
        (["--steps", "many"], "paro generate --help lists all options"),
        (["--resolution", "720p"], "paro generate: unknown arguments: --resolution 720p. paro generate --help"),
    ],
)
def test_numbers_out_of_range_are_refused_by_the_parser(words, message, capsys):
    with pytest.raises(SystemExit):
        paro("generate", "demo", "--prompt", EVALUATION_PROMPTS[0], "--out", "x.gif", *words)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize("words", [["--error", -1], ["--speedup", 0], ["--snr", "nan"], ["--snr", "inf"]])
def test_a_target_that_is_none_is_refused_by_its_own_name(words, capsys):
    with pytest.raises(SystemExit):
        paro("plan", "plan/", "--out", "out/", *words)
    assert f"argument {words[0]}: must be" in capsys.readouterr().err


def test_what_show_says_of_a_plan_whose_times_are_unknown_fits_in_a_few_lines(plan, capsys):
    assert paro("show", plan) == 0
    words = said(capsys)[1]
    verdict = words[words.index("every layer follows the plan") :]
    assert "int8/int8 in blocks of 64x128 with head dimension 64" in verdict and "dimension 128" not in verdict
    assert "got fp32/fp32" in verdict and "--precision" not in verdict


def test_every_command_shows_its_options_in_groups_after_one_line_of_usage(capsys):
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as ended:
            paro(name, "--help")
        usage, blank, *_ = capsys.readouterr().out.split("\n")
        assert ended.value.code == 0 and blank == "" and usage.startswith(f"usage: paro {name} ")
        given = usage.removeprefix("usage: ").removesuffix(" [options]").split()
        assert cli.parser(cli.COMMANDS).parse_args([word.replace("DENSITY", "0.5") for word in given[1:]])


def test_the_candidates_that_help_names_are_those_of_the_grid():
    assert tuple(arguments.CANDIDATES.split()) == CANDIDATES


def test_an_unknown_command_names_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        paro("paint")
    assert "evaluate" in capsys.readouterr().err
