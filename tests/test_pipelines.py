"""Pipelines of diffusers from a folder to a report: calibrate, generate and evaluate, for videos and for images."""

import functools
import inspect
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from paroattn.cli import main
from paroattn.integration.generate import Prompt, generate_clip, run
from paroattn.integration.models import MODELS
from paroattn.integration.pipelines import load_pipeline, place, read_arguments, read_embeddings, read_prompts
from paroattn.plan.plan import Plan

pytest.importorskip("transformers", reason="diffusers' own pipelines need transformers")
import tiny_pipelines as tiny

PIPELINES = tiny.PIPELINES
EVERY = pytest.mark.parametrize("name", PIPELINES)
WITH_WORDS = ("ltx",)
quiet = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # Mochi's rotary embedding
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of pipelines, each written when it is asked for."""
    root = tmp_path_factory.mktemp("models")

    @functools.cache
    def folder(name):
        pipe = tiny.wan_i2v() if name == "wan-i2v" else PIPELINES[name].build()
        return tiny.saved(pipe, root / name), tiny.missing(pipe)

    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Two prompts for a pipeline, as options: words if it reads them, else embeddings of which one says its words."""
    root = tmp_path_factory.mktemp("prompts")

    @functools.cache
    def options(name):
        if name in WITH_WORDS:
            return ["--prompt", "a cat runs", "--prompt", "dog"]
        given, folder = PIPELINES[name], root / name
        folder.mkdir()
        files = [
            tiny.saved_embeddings(
                folder / f"{file}.safetensors", seed, *given.text, words=text, negative=given.negative
            )
            for seed, (file, text) in enumerate({"cat": "a cat runs", "dog": None}.items())
        ]
        return ["--prompt-embeds", files[0], "--prompt-embeds", files[1]]

    return options


def size(name) -> list:
    height, width, frames = PIPELINES[name].size
    return ["--height", height, "--width", width, *(["--frames", frames] if frames else [])]


def without(missing) -> list:
    return ["--without", *missing] if missing else []


def paro(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def said(capsys) -> tuple[dict, str]:
    captured = capsys.readouterr()
    return json.loads(captured.out) if captured.out else {}, " ".join(captured.err.split())


@quiet
@EVERY
def test_a_pipeline_goes_from_calibration_to_a_report(name, models, words, tmp_path, capsys):
    given, (folder, missing) = PIPELINES[name], models(name)
    parts = ("transformer", "transformer_2")[: len(given.calls)]
    shared = [*without(missing), *size(name), *given.call, "--json"]
    plan = tmp_path / "plan"
    settings = ["--density", 0.4, "--block", "16x16", "--steps", 2, "--out", plan]
    assert paro("calibrate", folder, *words(name), *shared, *settings) == 0
    about, _ = said(capsys)
    assert {part: about[part]["grid"] for part in parts} == dict.fromkeys(parts, given.grid)
    made = {name: part.made["calibration"]["prompts"] for name, part in Plan.from_pretrained(plan).items()}
    assert made == {part: ["a cat runs", "dog"] for part in parts}

    image = given.size[2] is None
    out = tmp_path / ("image.png" if image else "clip.gif")
    one = words(name)[:2]
    assert paro("generate", folder, "--plan", plan, *one, *shared, "--steps", 3, "--out", out) == 0
    executed = said(capsys)[0]["executed"]
    assert {part: executed[part]["calls"] for part in parts} == {
        part: {"sparse": calls} for part, calls in zip(parts, given.calls, strict=True)
    }
    assert all(0.3 < executed[part]["density"] < 1 for part in parts)
    with Image.open(out) as picture:
        assert picture.width * given.size[0] == picture.height * given.size[1]
        assert getattr(picture, "n_frames", 1) == (given.size[2] or 1)

    report = tmp_path / "report"
    assert paro("evaluate", folder, "--plan", plan, *one, *shared, "--steps", 2, "--out", report) == 0
    numbers, _ = said(capsys)
    assert 5 < numbers["summary"]["psnr"]["mean"] < 80
    assert "a cat runs" in (report / "report.html").read_text()


@quiet
@EVERY
def test_a_plan_that_keeps_everything_gives_what_dense_gives(name, models, words, tmp_path, capsys):
    folder, missing = models(name)
    shared, one = [*without(missing), *size(name), *PIPELINES[name].call, "--json"], words(name)[:2]
    plan, report = tmp_path / "plan", tmp_path / "report"
    settings = ["--density", 1, "--block", "16x16", "--steps", 2, "--out", plan]
    assert paro("calibrate", folder, *one, *shared, *settings) == 0
    said(capsys)
    assert paro("evaluate", folder, "--plan", plan, *one, *shared, "--steps", 2, "--out", report) == 0
    (clip,) = said(capsys)[0]["clips"]
    assert clip["identical"] or clip["psnr"] > 80


def test_every_kind_of_model_has_a_tiny_pipeline():
    assert {type(each.build().transformer).__name__ for each in PIPELINES.values()} == set(MODELS)


def test_another_size_than_the_plan_s_stops_before_the_first_step(models, words, tmp_path, capsys):
    folder, missing = models("wan")
    shared = [folder, *without(missing), *words("wan")[:2]]
    plan, out = tmp_path / "plan", tmp_path / "clip.gif"
    assert paro("calibrate", *shared, *size("wan"), "--block", "16x16", "--steps", 1, "--out", plan) == 0
    said(capsys)
    other = ["--height", 64, "--width", 64, "--frames", 9, "--steps", 2]
    assert paro("generate", *shared, "--plan", plan, *other, "--out", out) == 2
    assert "grid 3x3x4" in (line := said(capsys)[1]) and "3x4x4" in line and not out.exists()
    with pytest.warns(UserWarning, match="3x4x4"):
        assert paro("generate", *shared, "--plan", plan, *other, "--allow-dense", "--out", out, "--json") == 0
    calls = said(capsys)[0]["executed"]["transformer"]["calls"]
    assert sum(calls.values()) == 4 and "sparse" not in calls


def test_pictures_reach_the_pipeline_for_all_prompts_or_for_one(models, words, tmp_path):
    pictures = {}
    for name, colour in (("red", "red"), ("blue", "blue")):
        Image.new("RGBA", (64, 48), colour).save(pictures.setdefault(name, tmp_path / f"{name}.png"))
    folder, missing = models("wan-i2v")
    shared = ["generate", folder, "--dense", *without(missing), *size("wan"), "--steps", 1, *words("wan")[:2], "--out"]
    assert paro(*shared, tmp_path / "red.gif", "--image", pictures["red"]) == 0
    assert paro(*shared, tmp_path / "blue.gif", "--image", pictures["blue"]) == 0
    assert paro(*shared, tmp_path / "set.gif", "--set", f"image=@{pictures['red']}") == 0
    assert (tmp_path / "red.gif").read_bytes() == (tmp_path / "set.gif").read_bytes()
    assert (tmp_path / "red.gif").read_bytes() != (tmp_path / "blue.gif").read_bytes()


def test_prompts_in_a_file_may_bring_pictures_of_their_own(models, words, tmp_path):
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    lines = ['{"prompt": "a cat", "image": "@red.png", "max_sequence_length": 12}', '{"prompt": "a dog"}']
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    cat, dog = read_prompts(tmp_path / "prompts.jsonl")
    assert isinstance(cat, Prompt) and isinstance(dog, Prompt)
    assert (cat, dog, dog.arguments) == ("a cat", "a dog", {})
    assert cat.arguments["max_sequence_length"] == 12 and cat.arguments["image"].size == (64, 48)
    assert cat.arguments["image"].getpixel((5, 5)) == (255, 0, 0)


def test_a_prompt_s_own_arguments_win_and_embeddings_replace_its_words(monkeypatch):
    seen = []

    class Pipe:
        device = torch.device("cpu")
        transformer = torch.nn.Linear(1, 1, dtype=torch.bfloat16)

        def __call__(self, prompt=None, prompt_embeds=None, mask=None, latents=None, height=8, generator=None):
            seen.append((prompt, prompt_embeds, mask, latents, height))

    Pipe.transformer.dtype = torch.bfloat16  # type: ignore[assignment]
    pipe, values = Pipe(), torch.ones(1, 2, 3)
    run(pipe, Prompt("a cat", height=16), 0, height=32)
    run(pipe, Prompt("a cat", prompt_embeds=values, mask=torch.ones(1, 2, dtype=torch.bool), latents=values), 0)
    run(pipe, "a dog", 0)
    run(pipe, "a name", 0, prompt_embeds=values)
    assert seen[0] == ("a cat", None, None, None, 16)
    assert (seen[1][0], seen[1][1].dtype, seen[1][2].dtype, seen[1][3].dtype) == (
        None, torch.bfloat16, torch.bool, torch.float32,
    )  # fmt: skip
    assert seen[2] == ("a dog", None, None, None, 8)
    assert seen[3][0] is None
    with pytest.raises(ValueError, match="no argument width; it has prompt, prompt_embeds"):
        run(pipe, Prompt("a cat", width=3), 0)


def loaded(models, name, **settings):
    folder, missing = models(name)
    return load_pipeline(folder, device="cpu", **dict.fromkeys(missing), **settings)


def test_several_images_for_a_prompt_all_come_back(models, words):
    pipe, prompt = loaded(models, "flux"), read_embeddings(words("flux")[1])
    images = generate_clip(pipe, prompt, 0, steps=1, height=20, width=24, num_images_per_prompt=2)
    assert images.shape == (2, 3, 20, 24) and not torch.equal(images[0], images[1])
    assert images.amin() < 0 and -1 <= images.amin() and images.amax() <= 1


def test_dtypes_are_those_asked_for(models):
    pipe = loaded(models, "wan", dtype="bf16", vae_dtype="fp32", vae_tiling=True)
    assert (pipe.transformer.dtype, pipe.vae.dtype, pipe.vae.use_tiling) == (torch.bfloat16, torch.float32, True)
    assert loaded(models, "wan").transformer.dtype == torch.float32


def test_another_class_than_the_model_s_own_may_load_it(models):
    pipe = loaded(models, "wan", pipeline="WanVideoToVideoPipeline")
    assert type(pipe).__name__ == "WanVideoToVideoPipeline"


def test_offloading_is_asked_of_diffusers():
    asked = []

    class Pipe:
        def enable_model_cpu_offload(self, device):
            asked.append(("model", device))

        def enable_group_offload(self, onload_device, offload_type):
            asked.append(("group", onload_device, offload_type))

    place(Pipe(), "cuda", "model")
    place(Pipe(), "cuda:1", "group")
    assert asked == [("model", "cuda"), ("group", torch.device("cuda:1"), "leaf_level")]


def test_diffusers_takes_what_offloading_hands_it(models):
    pipe = loaded(models, "wan")
    assert {"onload_device", "offload_type"} <= set(inspect.signature(pipe.enable_group_offload).parameters)
    assert "device" in inspect.signature(pipe.enable_model_cpu_offload).parameters


def test_arguments_are_json_or_text_or_files(tmp_path):
    (tmp_path / "list.json").write_text("[1, 2]")
    pairs = [
        "a=1",
        "b=0.5",
        "c=true",
        "d=null",
        "e=some words",
        "f=[1,2]",
        'g="1"',
        f"h=@{tmp_path / 'list.json'}",
        "i=",
    ]
    expected = {"a": 1, "b": 0.5, "c": True, "d": None, "e": "some words", "f": [1, 2], "g": "1", "h": [1, 2], "i": ""}
    assert read_arguments(pairs) == expected


def test_a_wrong_use_says_what_and_why(models, words, tmp_path, capsys):
    (tmp_path / "words.safetensors").write_text("not tensors")
    save_file({"embeds": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "lines.jsonl").write_text('{"words": "a cat"}\n')
    folder, missing = models("wan")
    wan = [folder, *without(missing)]
    generate = ["generate", *wan, "--dense", "--out", tmp_path / "x.gif"]
    cat = words("wan")[:2]
    calibrate = ["calibrate", *wan, "--out", tmp_path / "plan"]
    wrong = {
        "is no safetensors file": [*generate, "--prompt-embeds", tmp_path / "words.safetensors"],
        "must hold a tensor prompt_embeds": [*generate, "--prompt-embeds", tmp_path / "other.safetensors"],
        "a prompt as embeddings must be a file": [*generate, "--prompt-embeds", tmp_path / "none.safetensors"],
        "one prompt is needed": [*generate, "--prompt", "a", *cat],
        "got 0": generate,
        "at least one prompt is needed": calibrate,
        'a line is {"prompt"': [*calibrate, "--prompts", tmp_path / "lines.jsonl"],
        "written name=value": [*generate, *cat, "--set", "height"],
        "WanPipeline has no argument heigth; it has prompt": [*generate, *cat, "--set", "heigth=3"],
        "a file must be a picture": [*generate, *cat, "--image", cat[1]],
        "none.png": [*generate, *cat, "--image", tmp_path / "none.png"],
        "offload must be one of none, model, group; got disk": [*generate, *cat, "--offload", "disk"],
        "offload model needs a GPU": [*generate, *cat, "--device", "cpu", "--offload", "model"],
        "pipeline must be a class in diffusers": [*generate, *cat, "--pipeline", "SoraPipeline"],
        "dtype must be one of bf16, fp16, fp32; got fp8": [*generate, *cat, "--dtype", "fp8"],
        "expected ['scheduler', 'text_encoder'": [
            "generate",
            folder,
            *generate[2 + len(without(missing)) :],
            *cat,
        ],
    }
    for message, arguments in wrong.items():
        assert paro(*arguments) == 2, arguments
        line = said(capsys)[1].replace("'disk'", "disk").replace("'fp8'", "fp8")
        assert message in line and "Traceback" not in line, (message, line)
    assert not (tmp_path / "plan").exists() and not (tmp_path / "x.gif").exists()
