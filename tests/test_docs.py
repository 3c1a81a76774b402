"""The documents: every command, snippet, argument and message in them is one that exists, and what can run is run."""

import argparse
import ast
import importlib
import inspect
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

import paroattn
from paroattn.block_mask import BlockMask, parse_block
from paroattn.capture import CaptureSettings, Statistics
from paroattn.capture.statistics import LARGEST
from paroattn.cli import COMMANDS
from paroattn.cli.arguments import parser
from paroattn.grid import CANDIDATES, Grid, Layout
from paroattn.kernels.attention import attention
from paroattn.plan.plan import Plan
from paroattn.plan.workloads import workload

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODEL_PAGES = sorted((ROOT / "docs" / "models").glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
HUB = {
    # what is loaded: class of its pipeline, and its sizes; longer names first
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("WanPipeline", "wan-1.3b"),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": ("WanPipeline", "wan-14b"),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": ("WanImageToVideoPipeline", "wan-14b"),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": ("WanPipeline", "wan-14b"),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": ("WanPipeline", "wan2.2-5b"),
    "zai-org/CogVideoX-5b": ("CogVideoXPipeline", "cogvideox-5b"),
    "zai-org/CogVideoX-5b-I2V": ("CogVideoXImageToVideoPipeline", "cogvideox-5b"),
    "zai-org/CogVideoX1.5-5B": ("CogVideoXPipeline", "cogvideox1.5-5b"),
    "hunyuanvideo-community/HunyuanVideo": ("HunyuanVideoPipeline", "hunyuanvideo"),
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v": ("HunyuanVideo15Pipeline", "hunyuanvideo-1.5"),
    "Lightricks/LTX-Video": ("LTXPipeline", "ltx-video"),
    "Lightricks/LTX-2": ("LTX2Pipeline", "ltx-2"),
    "genmo/mochi-1-preview": ("MochiPipeline", "mochi"),
    "black-forest-labs/FLUX.1-dev": ("FluxPipeline", "flux"),
    "black-forest-labs/FLUX.2-dev": ("Flux2Pipeline", "flux2"),
    "Qwen/Qwen-Image": ("QwenImagePipeline", "qwen-image"),
    "stabilityai/stable-diffusion-3.5-large": ("StableDiffusion3Pipeline", "sd3.5-large"),
}
CALL = {"height", "width", "num_frames", "guidance_scale", "negative_prompt"}
EMPTY = ((), [], None, False, "")


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(page.read_text()) if language in languages]


def commands(page: Path) -> list[str]:
    """Every `paro …` of a page's code blocks, on one line and without the words beside it."""
    lines = [line for text in blocks(page, "", "sh") for line in text.replace("\\\n", " ").splitlines()]
    return [re.split(r"(?<=\S) {2,}(?=[a-z])", line)[0].rstrip() for line in lines if line.startswith("paro ")]


def parsed(command: str) -> Any:
    return parser(COMMANDS).parse_args(shlex.split(command)[1:])


def parsed_or_none(command: str) -> Any:
    """While tests are collected: the test of the command itself says what is wrong with it."""
    try:
        return parsed(command)
    except SystemExit:
        return None


def named(value: Any) -> str:
    return value.stem if isinstance(value, Path) else f"{value.command} {value.model}"


COMMAND_LINES = [(page, command) for page in PAGES for command in commands(page)]
ON_MODELS = [
    (page, args)
    for page, command in COMMAND_LINES
    if (args := parsed_or_none(command)) and getattr(args, "model", None) in HUB and args.command != "doctor"
]
ids = SimpleNamespace(command=[f"{page.stem}: {command[:60]}" for page, command in COMMAND_LINES])


@pytest.mark.parametrize(("page", "command"), COMMAND_LINES, ids=ids.command)
def test_every_command_is_one_that_paro_takes(page, command):
    args = parsed(command)
    model = getattr(args, "model", None)
    if args.command != "doctor":
        assert model in (None, "demo", "MODEL", *HUB), f"{model} must be in this file's table"
    elif model not in (None, "list"):
        workload(model).layout(args.size)


def test_there_are_commands_to_check():
    assert len(COMMAND_LINES) > 50 and len(ON_MODELS) > 30
    assert {args.model for _, args in ON_MODELS} == set(HUB)
    with pytest.raises(SystemExit):
        parsed("paro generate demo --prompt x --out x.gif --resolution 720p")


SCRIPTS = [
    (page, line)
    for page in PAGES
    for text in blocks(page, "", "sh")
    for line in text.replace("\\\n", " ").splitlines()
    if re.match(r"(torchrun .*|python )benchmarks/", line)
]


@pytest.mark.parametrize(("page", "line"), SCRIPTS, ids=[line[:60] for _, line in SCRIPTS])
def test_every_benchmark_takes_what_the_pages_hand_it(page, line, monkeypatch):
    script, given = re.split(r"(?<=\.py)", line.partition("benchmarks/")[2], maxsplit=1)
    parse, taken = argparse.ArgumentParser.parse_args, []

    def parse_only(parser, arguments=None, namespace=None):
        taken.append(parse(parser, shlex.split(given)))
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    with pytest.raises(Parsed):
        importlib.import_module(script.removesuffix(".py")).main()
    assert len(taken) == 1


class Parsed(Exception):
    """A command line was taken."""


def _layout(args: Any) -> Any:
    sizes = (args.num_frames or 1, args.height, args.width)
    return workload(HUB[args.model][1]).layout("x".join(map(str, sizes)))


@pytest.mark.parametrize(("page", "args"), [(p, a) for p, a in ON_MODELS if a.command == "calibrate"], ids=named)
def test_every_calibration_fits_in_memory(page, args):
    model, grid, block = workload(HUB[args.model][1]), _layout(args).grid, parse_block(args.block)
    settings = CaptureSettings(orders=args.orders or CANDIDATES, block=block, codes=True)
    statistics = Statistics("Model", model.heads, model.head_dim, Layout(grid), settings, chosen={"a": ("FHW",)})
    assert statistics.bytes_needed(model.layers, args.steps) <= LARGEST
    assert args.height % model.stride[1] == args.width % model.stride[2] == 0
    assert ((args.num_frames or 1) - 1) % model.stride[0] == 0


@pytest.mark.parametrize("page", MODEL_PAGES, ids=lambda page: page.stem)
def test_a_plan_is_used_at_the_size_and_with_the_model_it_was_made_for(page):
    made = {str(args.out): args for where, args in ON_MODELS if where == page and args.command == "calibrate"}
    used = [args for where, args in ON_MODELS if where == page and args.command != "calibrate"]
    assert made and used
    for args in used:
        maker = made[str(Path(args.plan))]
        assert args.model == maker.model and _layout(args) == _layout(maker)
        for name in ("offload", "vae_dtype", "vae_tiling", "dtype"):
            assert getattr(args, name) == getattr(maker, name)


@pytest.mark.parametrize(("page", "args"), ON_MODELS, ids=named)
def test_the_pipeline_takes_what_the_command_hands_it(page, args):
    pytest.importorskip("transformers", reason="diffusers' own pipelines need transformers")
    takes = inspect.signature(getattr(diffusers, args.pipeline or HUB[args.model][0]).__call__).parameters
    given = {name for name in CALL if getattr(args, name) not in EMPTY}
    given |= {pair.split("=")[0] for pair in args.set} | ({"image"} if args.image else set())
    assert given <= set(takes)
    parts = inspect.signature(getattr(diffusers, HUB[args.model][0]).__init__).parameters
    assert set(args.without) <= set(parts)


SNIPPETS = [(page, text) for page in PAGES for text in blocks(page, "python")]


@pytest.mark.parametrize(("page", "text"), SNIPPETS, ids=[f"{page.stem} {i}" for i, (page, _) in enumerate(SNIPPETS)])
def test_every_snippet_imports_and_calls_what_exists(page, text):
    tree, names = ast.parse(text), {"paroattn": paroattn, "Plan": Plan, "torch": torch}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            names |= {alias.name: getattr(importlib.import_module(node.module), alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name: importlib.import_module(alias.name) for alias in node.names}
    made = {
        target.id: names[value.func.value.id]
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(value := node.value, ast.Call)
        if isinstance(value.func, ast.Attribute) and value.func.attr == "from_pretrained"
        if isinstance(value.func.value, ast.Name)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            _check_call(node, names, made)


def _check_call(node: ast.Call, names: dict[str, Any], made: dict[str, Any]) -> None:
    """The keywords of a call are arguments of what is called, where that is known."""
    where = ast.unparse(node.func).split(".")
    function: Any = names.get(where[0])
    if where == ["pipe"] and "pipe" in made:
        function = made["pipe"].__call__
        if "dummy" in made["pipe"].__module__:
            return
    for attribute in where[1:] if function is not None and where != ["pipe"] else []:
        function = getattr(function, attribute)
    if function is None:
        return
    try:
        takes = inspect.signature(function).parameters
    except (ValueError, TypeError):
        return
    if not any(each.kind is each.VAR_KEYWORD for each in takes.values()):
        assert {keyword.arg for keyword in node.keywords if keyword.arg} <= set(takes), ast.unparse(node)


def test_the_page_on_other_hosts_runs_from_a_plan_to_an_output(tmp_path):
    run_planned, run_compiled, make = blocks(ROOT / "docs" / "other-hosts.md", "python")
    generator = torch.Generator().manual_seed(0)

    def forward(layer, noise_level):
        q, k, v = (torch.randn(1, Grid(4, 6, 10).tokens, 2, 64, generator=generator) for _ in range(3))
        return q, k, v, torch.randn(2, 64, 32, generator=generator)

    space: dict[str, Any] = {"folder": tmp_path / "plan", "layers": ["a", "b"], "forward": forward}
    exec(compile(make, "make", "exec"), space)
    q, k, v, _ = forward("a", 0.5)
    space |= {"q": q, "k": k, "v": v, "layer": "b", "noise_level": 0.6}
    exec(compile(run_planned, "run", "exec"), space)
    assert space["plan"].density == pytest.approx(0.25, abs=0.02)
    first = space["out"]
    exec(compile(run_compiled, "compiled", "exec"), space)
    assert torch.equal(first, space["out"])
    full = attention(q, k, v, BlockMask.full(2, 240, (64, 64)))
    assert not torch.allclose(first, full, atol=1e-2)


def test_the_page_on_the_plan_file_knows_every_field_of_one():
    page = (ROOT / "docs" / "plan-format.md").read_text()
    written = json.loads((ROOT / "src/paroattn/demo/plan/transformer/plan.json").read_text())
    explained = {
        name for names in re.findall(r"^\| (`.*?) \| ", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", names)
    }
    (shown,) = blocks(ROOT / "docs" / "plan-format.md", "json")
    assert explained == set(written)
    assert list(json.loads(shown)) == list(written)
    assert set(json.loads(shown)["layers"]["blocks.0.attn1"]) == set(written["layers"]["blocks.0.attn1"])


def test_every_message_in_the_troubleshooting_table_is_one_of_ours():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = re.findall(r"^\| (`.*`) \| ", page.split("## Errors that a call raises")[1], re.MULTILINE)
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row)]
    quoted += re.findall(
        r"`((?:impl triton needs|Triton needs|writing \.mp4|statistics must|The slow but)[^`]*)`", page
    )
    source = " ".join(
        re.sub(r'"\s*f?"', "", " ".join(path.read_text().split())) for path in (ROOT / "src").rglob("*.py")
    )
    fragments = [
        part.strip(" ;,") for text in quoted for part in re.split(r"…|transformer(?:_2)?\b|\d+ GiB|on cuda,", text)
    ]
    missing = [part for part in fragments if len(part) > 3 and part not in source]
    assert len(rows) >= 9 and missing == []


def test_the_readme_lists_every_document():
    readme = (ROOT / "README.md").read_text()
    assert [str(page) for page in PAGES[1:] if f"({page.relative_to(ROOT)})" not in readme] == []


def anchors(page: Path) -> set[str]:
    """What a link can name in a page: its headings in lower case, without signs, words joined by hyphens."""
    heads = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


LINKED = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "training" / "README.md"]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings_that_exist(page):
    missing = []
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert missing == []


def test_every_model_page_says_who_makes_the_plan():
    for page in MODEL_PAGES:
        assert "No plan of this model comes with paroattn: you make it" in page.read_text(), page.name
