"""Wrong uses, one by one: an error names the rule, what it got and what to do, and the model is as it was."""

import contextlib
import copy
import hashlib
import json
import os
import pickle
import random
import re
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from safetensors.torch import load, save
from tiny_models import GRID, TWO_PHASES, random_plan, tiny_pipeline, tiny_wan, wan_inputs

import paroattn
from paroattn.block_mask import BlockMask
from paroattn.grid import Grid, TextSpan
from paroattn.integration.apply import apply, dense, recording, remove, report, set_noise_level
from paroattn.integration.calibrate import calibrate
from paroattn.plan.packing import pack, unpack_all
from paroattn.plan.plan import LayerPlan, Plan, PlanError, own_config

PLAN = random_plan(density=0.4)
NAMES = tuple(PLAN.layers)
pytestmark = pytest.mark.usefixtures("one_thread")


def whole(plan=PLAN) -> Plan:
    return Plan({"transformer": plan})


def forward(model: Any, **changed: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**wan_inputs() | changed).sample


def traces(model: Any) -> dict[str, Any]:
    """Everything that could stay behind on a model: processors, hooks, children, replaced methods, parameters."""
    found = {}
    for name, module in model.named_modules():
        mine = {key: value for key, value in vars(module).items() if key != "_diffusers_hook"}
        found[name] = {key: list(value) if isinstance(value, dict) else id(value) for key, value in mine.items()}
    return found


def says(rule: str, remedy: str) -> str:
    """A pattern for a message that names rule and value, and after that the remedy, as sentences."""
    return rf"(?s){rule}.*{remedy}"


@dataclass(frozen=True)
class Misuse:
    """A wrong use of a pipeline without a plan."""

    name: str
    use: Callable[[Any], Any]
    error: type[Exception]
    rule: str
    remedy: str


def mixed_up(pipe: Any) -> None:
    """Two experts, and the plan of one on the other."""
    model = tiny_wan()
    model.register_to_config(_name_or_path="some/folder/transformer_2")
    apply(model, whole()["transformer"])


def configured(**changes: Any):
    return replace(PLAN, config=own_config(tiny_wan()) | changes)


def on_call(call: Callable[[Any], Any], plan=PLAN, **settings: Any) -> Callable[[Any], None]:
    """Something wrong with a call under a plan; afterwards the plan still works and comes off."""

    def use(pipe: Any) -> None:
        model = pipe.transformer
        apply(model, plan, **settings)
        try:
            call(model)
        finally:
            remove(model)

    return use


def with_gradients(model: Any) -> None:
    model.requires_grad_(True)
    try:
        model(**wan_inputs())
    finally:
        model.requires_grad_(False)


def input_with_gradient(model: Any) -> None:
    inputs = wan_inputs()
    inputs["hidden_states"].requires_grad_()
    model(**inputs)


def in_double(model: Any) -> None:
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in wan_inputs().items()}
    try:
        forward(model.double(), **inputs)
    finally:
        model.float()


def without_interpreter(model: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        forward(model)


def masked_video(model: Any) -> None:
    first, own = model.blocks[0].attn1, model.blocks[0].forward
    mask = torch.ones(1, 1, 1, GRID.tokens, dtype=torch.bool)
    model.blocks[0].forward = lambda hidden, *_: first(hidden, None, mask)
    try:
        forward(model)
    finally:
        del model.blocks[0].forward
        assert model.blocks[0].forward == own


def while_recording(pipe: Any) -> None:
    with recording(pipe, lambda *_: None):
        apply(pipe, whole())


def applied_twice(pipe: Any) -> None:
    apply(pipe, whole())
    try:
        apply(pipe, whole(random_plan(seed=9)))
    finally:
        remove(pipe)


def removed_twice(pipe: Any) -> None:
    apply(pipe, whole())
    remove(pipe)
    remove(pipe)


def recorded_under_a_plan(pipe: Any) -> None:
    apply(pipe, whole())
    try:
        with recording(pipe, lambda *_: None):
            pass
    finally:
        remove(pipe)


def calibrated_under_a_plan(pipe: Any) -> None:
    apply(pipe, whole())
    try:
        calibrate(pipe, "a cat", progress=lambda _: None)
    finally:
        remove(pipe)


CALIBRATE = "(paro calibrate|[Cc]alibrate)"
VAE = AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1], num_res_blocks=1, temperal_downsample=[])
MISUSES = [
    # plans of something else
    Misuse("a plan of another class", lambda p: apply(p, whole(random_plan(model_class="CogVideoXTransformer3DModel"))),
           PlanError, "made for CogVideoXTransformer3DModel; this model is WanTransformer3DModel", CALIBRATE),
    Misuse("a plan with other heads", lambda p: apply(p, whole(random_plan(heads=3))),
           PlanError, r"blocks\.0\.attn1: the plan has 3 heads of dimension 64, the model 2 of 64", CALIBRATE),
    Misuse("a plan with another head dimension", lambda p: apply(p, whole(random_plan(head_dim=128))),
           PlanError, "the plan has 2 heads of dimension 128, the model 2 of 64", CALIBRATE),
    Misuse("a plan of a smaller model", lambda p: apply(p, whole(random_plan(NAMES[:1]))),
           PlanError, r"1 layers and the model 2; they differ at blocks\.1\.attn1", CALIBRATE),
    Misuse("a plan of a larger model", lambda p: apply(p, whole(random_plan((*NAMES, "blocks.2.attn1")))),
           PlanError, r"3 layers and the model 2; they differ at blocks\.2\.attn1", CALIBRATE),
    Misuse("a plan of a model of other width", lambda p: apply(p, whole(configured(ffn_dim=8960))),
           PlanError, r"with ffn_dim=8960 \(configuration \w{16}…\); this model has ffn_dim=32 \(\w{16}…\)", CALIBRATE),
    Misuse("a plan of a model with more inputs", lambda p: apply(p, whole(configured(image_dim=1280))),
           PlanError, "with image_dim=1280 .*; this model has image_dim at its default", CALIBRATE),
    Misuse("the plan of the other expert", mixed_up,
           PlanError, "made for transformer; this model was loaded as transformer_2", "apply to the pipeline"),
    Misuse("experts in each other's place",
           lambda p: Plan({"transformer": whole()["transformer"], "transformer_2": whole()["transformer"]}),
           PlanError, "the plan for transformer_2 was made for transformer", "Give each transformer its own"),
    Misuse("a plan for the second expert alone", lambda p: apply(p, Plan({"transformer_2": PLAN})),
           PlanError, "the pipeline has transformer; the plan has transformer_2", "strict=False"),
    # arguments of apply
    Misuse("a part of a plan on a pipeline with two experts",
           lambda p: apply(tiny_pipeline(two=True), PLAN),
           TypeError, "a Plan is needed for transformer, transformer_2; got TransformerPlan", ""),
    Misuse("half a plan on two experts", lambda p: apply(tiny_pipeline(two=True), whole()),
           PlanError, "the pipeline has transformer, transformer_2; the plan has transformer", "strict=False"),
    Misuse("a whole plan on a bare transformer", lambda p: apply(p.transformer, whole()),
           TypeError, r"a TransformerPlan, such as plan\[\"transformer\"\], is needed", "got Plan"),
    Misuse("a path instead of a plan", lambda p: apply(p, "plan/"), TypeError, "a Plan is needed", "got str"),
    Misuse("no plan at all", lambda p: apply(p, None), TypeError, "a Plan is needed", "got NoneType"),
    Misuse("a number instead of a pipeline", lambda p: apply(3, whole()),
           TypeError, "a pipeline with a transformer, or a transformer, is needed", "got int"),
    Misuse("a text instead of a pipeline", lambda p: apply("Wan-AI/Wan2.1", whole()),
           TypeError, "a pipeline with a transformer", "got str"),
    Misuse("a VAE instead of a transformer", lambda p: apply(VAE, PLAN),
           ValueError, "transformer must be one of .*WanTransformer3DModel.*got AutoencoderKLWan", "register_model"),
    Misuse("an unknown implementation", lambda p: apply(p, whole(), impl="fastest"),
           ValueError, "impl must be auto or one of cpu, reference, triton", "got 'fastest'"),
    Misuse("an unknown precision", lambda p: apply(p, whole(), precision="int3"),
           ValueError, "precision must be one of fp64, .* or QK/PV such as int8/fp8", "got 'int3'"),
    *(Misuse(f"{precision!r} as a precision", lambda p, precision=precision: apply(p, whole(), precision=precision),
             ValueError, "precision must be one of fp64", "got") for precision in (8, ["int8"], "auto")),
    *(Misuse(f"a plan for grid {grid!r}", lambda p, grid=grid: apply(p, whole().for_grid(grid)),
             TypeError, "a plan is carried to a Grid, such as Grid", "got") for grid in ((5, 7, 6), "5x7x6", 210)),
    Misuse("half a precision", lambda p: apply(p, whole(), precision="int8/"),
           ValueError, "pv must be one of fp64", "got ''"),
    # the order of things
    Misuse("apply twice", applied_twice, ValueError, "must carry no plan; this one has a plan applied",
           r"Call paroattn\.remove first"),
    Misuse("remove twice", removed_twice, ValueError, "a plan must be applied; this model carries none",
           r"Call paroattn\.apply first"),
    Misuse("remove without apply", remove, ValueError, "this model carries none", r"Call paroattn\.apply first"),
    Misuse("report without apply", report, ValueError, "this model carries none", r"Call paroattn\.apply first"),
    Misuse("dense without apply", lambda p: dense(p).__enter__(), ValueError, "carries none", "apply first"),
    Misuse("apply while recording", while_recording, ValueError, "is being recorded", "remove first"),
    Misuse("record under a plan", recorded_under_a_plan, ValueError, "has a plan applied", "remove first"),
    Misuse("calibrate under a plan", calibrated_under_a_plan, ValueError, "has a plan applied", "remove first"),
    Misuse("a noise level without a plan", lambda p: set_noise_level(p, 0.5), ValueError, "carries none", "first"),
    *(Misuse(f"a noise level of {level}", lambda p, level=level: set_noise_level(p, level), ValueError,
             f"a noise level must be within 0…1; got {level}", "Give σ, or .*, not the timestep")
      for level in (500, -0.1, float("nan"))),
    # calls that do not fit
    Misuse("another resolution", on_call(lambda m: forward(m, **wan_inputs(latents=(4, 5, 12, 14)))), PlanError,
           "the plan is for grid 5x7x6 .*; this call has 5x6x7", "Calibrate at this resolution, or .*strict=False"),
    Misuse("fewer frames", on_call(lambda m: forward(m, **wan_inputs(latents=(4, 1, 14, 12)))), PlanError,
           "the plan is for grid 5x7x6 .*; this call has 1x7x6", "Calibrate at this resolution"),
    Misuse("steps that nobody tells", on_call(forward, random_plan(phases=TWO_PHASES)), PlanError,
           "the plan has 2 phases; the noise level of this call is not known", "Apply to the pipe.*set_noise_level"),
    Misuse("inputs that require a gradient", on_call(with_gradients), ValueError,
           "attention has no gradient; got tensors that require one", r"Call it under torch\.no_grad"),
    Misuse("64-bit attention of 32-bit tensors", on_call(forward, precision="fp64"), ValueError,
           r"float64 tensors for precision fp64; got fp64 on torch\.float32", "Choose another impl or precision"),
    Misuse("64-bit inputs in a kernel", on_call(in_double, impl="triton", precision="int8"), ValueError,
           "triton needs tensors on a GPU, not float64.*got int8 on torch.float64", "Choose another impl"),
    Misuse("64-bit inputs on the CPU path", on_call(in_double, impl="cpu"), ValueError,
           "cpu needs float32 tensors on a CPU.*got fp32 on torch.float64", "Choose another impl"),
    Misuse("an input that requires a gradient", on_call(input_with_gradient), ValueError,
           "attention has no gradient; got tensors that require one", r"Call it under torch\.no_grad"),
    Misuse("Triton without a GPU", on_call(without_interpreter, impl="triton", precision="int8"), ValueError,
           "triton needs tensors on a GPU.*; got int8 on .* tensors on cpu", "Choose another impl"),
    Misuse("the CPU path in INT8", on_call(forward, impl="cpu", precision="int8"), ValueError,
           "cpu needs float32 tensors on a CPU and precision fp32; got int8", "Choose another impl"),
    Misuse("a layer on its own", on_call(lambda m: m.blocks[0].attn1(torch.randn(1, GRID.tokens, 128))), PlanError,
           "a layer was called outside its transformer", "strict=False runs it dense"),
    Misuse("an attention mask over the video", on_call(masked_video), PlanError,
           "the attention mask is not one of padded text", "strict=False runs it dense"),
    # calibration
    Misuse("no prompt", lambda p: calibrate(p, []), ValueError, "at least one prompt", r"got \[\]"),
    Misuse("an empty prompt", lambda p: calibrate(p, " "), ValueError, "none of them empty", r"got \[' '\]"),
    *(Misuse(f"a density of {density}", lambda p, density=density: calibrate(p, "a cat", density=density),
             ValueError, "density must be", f"got {density}") for density in (0, 1.5, -0.2)),
    Misuse("no steps", lambda p: calibrate(p, "a cat", steps=0), ValueError, "steps must be 1 or more", "got 0"),
    *(Misuse(f"prompts that are {prompts!r}", lambda p, prompts=prompts: calibrate(p, prompts),
             TypeError, "prompts must be a text or several", "got") for prompts in (5, None, [5], ["a cat", None])),
    *(Misuse(f"{steps!r} as steps", lambda p, steps=steps: calibrate(p, "a cat", steps=steps),
             ValueError, "steps must be 1 or more, a whole number", f"got {steps!r}") for steps in (2.5, "10", -3)),
    Misuse("a density that is a text", lambda p: calibrate(p, "a cat", density="0.3"),
           ValueError, "density must be above 0 and at most 1", "got '0.3'"),
    Misuse("a precision that is a number", lambda p: calibrate(p, "a cat", precision=8),
           ValueError, "precision must be one of fp64, .* or QK/PV", "got 8"),
    Misuse("a setting of the plan as an argument", lambda p: calibrate(p, "a cat", speedup=2),
           TypeError, r"speedup must be given as settings=PlanSettings\(speedup=…\); got it as an argument",
           r"Import PlanSettings from paroattn\.plan\.search"),
    Misuse("a setting of the capture as an argument", lambda p: calibrate(p, "a cat", block=64),
           TypeError, r"block must be given as capture=CaptureSettings\(block=…\)", "Import CaptureSettings"),
    Misuse("an argument that the pipeline lacks", lambda p: calibrate(p, "a cat", frames=81, progress=lambda _: None),
           ValueError, "TinyPipeline has no argument frames", "it has .*num_inference_steps"),
]  # fmt: skip


@pytest.mark.parametrize("misuse", MISUSES, ids=lambda misuse: misuse.name)
def test_a_wrong_use_says_what_is_wrong_and_leaves_the_model_alone(misuse):
    pipe = tiny_pipeline()
    model = pipe.transformer
    expected = forward(model)
    before = traces(model)
    with pytest.raises(misuse.error, match=says(misuse.rule, misuse.remedy)):
        misuse.use(pipe)
    assert traces(model) == before
    assert torch.equal(forward(model), expected)
    apply(model, PLAN)
    remove(model)


def test_there_are_many_wrong_uses():
    assert len(MISUSES) >= 40 and len({misuse.name for misuse in MISUSES}) == len(MISUSES)


def test_apply_on_a_compiled_model_keeps_its_code_for_later():
    torch.compiler.reset()
    model = tiny_wan()
    wrapped = torch.compile(model, backend="eager")
    stock = forward(wrapped)
    with pytest.raises(PlanError, match="the plan has 3 heads"):
        apply(wrapped, random_plan(heads=3))
    assert torch.equal(forward(wrapped), stock)
    apply(wrapped, PLAN)
    with pytest.raises(ValueError, match="has a plan applied"):
        apply(model, PLAN)
    sparse = forward(wrapped)
    assert not torch.allclose(sparse, stock, atol=1e-3)
    remove(wrapped)
    assert torch.equal(forward(wrapped), stock)
    torch.compiler.reset()


def test_a_processor_of_someone_else_is_noticed_and_stays():
    model = tiny_wan()
    apply(model, PLAN)
    mine = WanAttnProcessor()
    model.blocks[1].attn1.set_processor(mine)
    with pytest.warns(UserWarning, match=says(r"1 planned layers \(blocks\.1", "remove and apply again")):
        forward(model)
    remove(model)
    assert model.blocks[1].attn1.processor is mine


# Plan files


@pytest.fixture
def folder(tmp_path):
    """A plan of two experts on disk."""
    two = random_plan(density=0.4, phases=TWO_PHASES, seed=2)
    plan = Plan({"transformer": configured(), "transformer_2": replace(two, config=own_config(tiny_wan()))})
    return plan.save_pretrained(tmp_path / "plan")


def tensors_of(folder: Path) -> Path:
    return folder / "transformer" / "plan.safetensors"


def description_of(folder: Path) -> Path:
    return folder / "transformer" / "plan.json"


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def forged(folder: Path, blob: bytes | None = None, **changes: Any) -> None:
    """Change a plan as someone would who also computes the checksums."""
    path = description_of(folder)
    described = json.loads(path.read_text())
    if blob is not None:
        tensors_of(folder).write_bytes(blob)
        described["tensors"]["sha256"] = hashlib.sha256(blob).hexdigest()
    described |= changes
    del described["sha256"]
    path.write_text(json.dumps(described | {"sha256": digest(described)}))


def remade(folder: Path, change: Callable[[dict[str, Any]], Any]) -> bytes:
    tensors = load(tensors_of(folder).read_bytes())
    return save(change(tensors) or tensors)


def layers_named(folder: Path, name: str) -> None:
    layers = json.loads(description_of(folder).read_text())["layers"]
    layers[name] = layers.pop(NAMES[0])
    tensors = {key.replace(NAMES[0], name): value for key, value in load(tensors_of(folder).read_bytes()).items()}
    forged(folder, save(tensors), layers=layers)


def header(length: int, text: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + text


class Bomb:
    def __reduce__(self):
        return (os.system, ("false",))


def sparse_file(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def swapped(folder: Path) -> None:
    (folder / "transformer").rename(folder / "aside")
    (folder / "transformer_2").rename(folder / "transformer")
    (folder / "aside").rename(folder / "transformer_2")


def stale(folder: Path) -> None:
    """A plan for one transformer written over one for two by someone's copy command."""
    single = whole(configured()).save_pretrained(folder.parent / "single")
    for name in ("plan.json", "plan.safetensors"):
        (folder / "transformer" / name).write_bytes((single / "transformer" / name).read_bytes())


def device_file(folder: Path) -> None:
    tensors_of(folder).unlink()
    tensors_of(folder).symlink_to("/dev/zero")


def text_of(folder: Path, change: Callable[[str], str | bytes]) -> None:
    path = description_of(folder)
    changed = change(path.read_text())
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())


def huge(folder: Path) -> None:
    sparse_file(description_of(folder), 65 * 2**20)


AGAIN = "Fetch or make the plan again"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a plan of a newer format": (lambda f: forged(f, format_version=3),
                                 "plan format 3; this paroattn reads formats 1, 2.*Update paroattn"),
    "masks that are not packed though they should be": (lambda f: forged(f, format_version=2), "masks are damaged"),
    "a format that is no number": (lambda f: forged(f, format_version="1"), "plan format 1;.*Update"),
    "no tensors": (lambda f: tensors_of(f).unlink(), rf"no plan\.safetensors beside plan\.json.*{AGAIN}"),
    "no second expert": (lambda f: __import__("shutil").rmtree(f / "transformer_2"),
                         rf"belongs to a plan of transformer, transformer_2; the folder has transformer\..*{AGAIN}"),
    "no description of the second expert": (lambda f: (f / "transformer_2" / "plan.json").unlink(),
                                            f"belongs to a plan of transformer, transformer_2.*{AGAIN}"),
    "an expert too many": (stale, f"belongs to a plan of transformer; the folder has transformer, .*{AGAIN}"),
    "experts in each other's folder": (swapped, f"is for transformer_2; it lies in a folder transformer.*{AGAIN}"),
    "an empty file of tensors": (lambda f: tensors_of(f).write_bytes(b""), f"cut short or changed.*{AGAIN}"),
    "an empty description": (lambda f: description_of(f).write_text(""), f"is not JSON.*{AGAIN}"),
    "a list": (lambda f: description_of(f).write_text("[]"), f"must hold a JSON object; got list.*{AGAIN}"),
    "bytes that are no text": (lambda f: text_of(f, lambda text: b"\xff" + text.encode()), f"is not JSON.*{AGAIN}"),
    "brackets without end": (lambda f: text_of(f, lambda text: '{"a":' + "[" * 200_000), f"is not JSON.*{AGAIN}"),
    "a number that is none": (lambda f: text_of(f, lambda text: text.replace("0.0,", "NaN,")), "NaN is no number"),
    "a number of many digits": (lambda f: text_of(f, lambda text: text.replace(": 64,", f": {'9' * 5000},")), AGAIN),
    "a description of 65 MiB": (huge, r"plan\.json must be at most 67108864 bytes; got 68157440"),
    "tensors without end": (lambda f: sparse_file(tensors_of(f), 2**40),
                            r"plan\.safetensors must have at most \d+ bytes; got 1099511627776"),
    "a device instead of a file": (device_file, rf"no plan\.safetensors beside.*{AGAIN}"),
    "a path to other tensors": (
        lambda f: forged(f, tensors={"file": "../../secret.safetensors", "sha256": "0" * 64}),
        r"must lie in plan\.safetensors beside plan\.json; got '\.\./\.\./secret\.safetensors'"),
    "a layer that climbs out": (lambda f: layers_named(f, "../../etc/passwd"),
                                r"layers must be named by module path.*got '\.\./\.\./etc/passwd'"),
    "a layer that is a script": (lambda f: layers_named(f, "<script>alert(1)</script>"), "named by module path"),
    "a layer without a name": (lambda f: layers_named(f, ""), "named by module path.*got ''"),
    "a component that climbs out": (lambda f: forged(f, component="../transformer"),
                                    r"the plan is for \.\./transformer; it lies in a folder transformer"),
    "a header larger than the file": (lambda f: forged(f, header(2**40)), rf"is damaged: SafetensorError.*{AGAIN}"),
    "a header of 2⁶³ bytes": (lambda f: forged(f, header(2**63 - 1)), rf"is damaged: SafetensorError.*{AGAIN}"),
    "a header that is no JSON": (lambda f: forged(f, header(9, b"{{{{{{{{{")), rf"damaged: SafetensorError.*{AGAIN}"),
    "a pickle in place of tensors": (lambda f: forged(f, pickle.dumps(Bomb())), rf"is damaged: Safetensor.*{AGAIN}"),
    "masks of floats": (lambda f: forged(f, remade(f, lambda t: {k: v.float() for k, v in t.items()})),
                        "must be uint8"),
    "masks of other shape": (lambda f: forged(f, remade(f, lambda t: {k: v[..., :1, :].clone() for k, v in t.items()})),
                             r"mask must have \(phases, heads, Nq, Nk\) = \(1, 2, 7, 4\); got \(1, 2, 1, 4\)"),
    "a mask that keeps nothing": (lambda f: forged(f, remade(f, lambda t: {k: v * 0 for k, v in t.items()})),
                                  "every row must keep at least one block"),
    "a mask with stray bits": (lambda f: forged(f, remade(f, lambda t: {k: v | 128 for k, v in t.items()})),
                               "bits beyond the 4 key blocks must be 0"),
    "a mask too many": (lambda f: forged(f, remade(f, lambda t: t | {"x.mask": torch.ones(1, dtype=torch.uint8)})),
                        "list different layers"),
    "a grid of nothing": (lambda f: forged(f, grid=[0, 7, 6]), "frames of a grid must be a positive integer; got 0"),
    "a grid of 10⁴⁵ tokens": (lambda f: forged(f, grid=[10**15] * 3), f"is damaged.*bytes a row; got 1.*{AGAIN}"),
    "a grid of fractions": (lambda f: forged(f, grid=[5.0, 7, 6]), "must be a positive integer; got 5.0"),
    "two axes": (lambda f: forged(f, grid=[5, 7]), AGAIN),
    "heads of truth": (lambda f: forged(f, heads=True), "heads of a plan must be a positive integer; got True"),
    "heads in words": (lambda f: forged(f, heads="2"), AGAIN),
    "no head dimension": (lambda f: forged(f, head_dim=0), "head_dim of a plan must be a positive integer; got 0"),
    "blocks of nothing": (lambda f: forged(f, block="0x64"), "a block is written QUERYxKEY.*got '0x64'"),
    "no phases": (lambda f: forged(f, phases=[]), "at least one layer and one phase"),
    "phases that rise": (lambda f: forged(f, phases=[{"lowest_noise": 0.0, "share": 0.5}] * 2), "falling noise levels"),
    "phases of no step": (lambda f: forged(f, phases=[{"lowest_noise": 0.0, "share": 0}]),
                          r"must be positive and sum to 1; got \[0\]"),
    "a phase with more": (lambda f: forged(f, phases=[{"lowest_noise": 0.0, "share": 1, "x": 1}]), AGAIN),
    "text in the middle": (lambda f: forged(f, text={"tokens": 2, "side": "middle"}), "must be prefix or suffix"),
    "no layers": (lambda f: forged(f, layers={}), "list different layers"),
    "another configuration": (lambda f: forged(f, model={"config": {}, "sha256": digest({"a": 1})}),
                              rf"configuration has SHA-256 \w{{16}}…, but plan\.json expects \w{{16}}….*{AGAIN}"),
    "a number changed by hand": (lambda f: text_of(f, lambda text: text.replace('"share": 1.0', '"share": 1.0000001')),
                                 rf"plan\.json has SHA-256 .*, but says .*changed after it was written.*{AGAIN}"),
}  # fmt: skip


FOUND_WHEN_USED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "packed masks that are larger than they should be": (
        lambda f: forged(
            f, remade(f, lambda t: pack({n: torch.zeros(2, 9, 99, 99).byte() for n in t})), format_version=2
        ),
        "packed masks must hold .* bytes; got more",
    ),
    "packed masks that are smaller than they should be": (
        lambda f: forged(f, remade(f, lambda t: pack({n: torch.zeros(2, 1).byte() for n in t})), format_version=2),
        "packed masks must hold .* bytes; got other",
    ),
    "packed masks with something behind": (
        lambda f: forged(
            f, remade(f, lambda t: {n: torch.cat([m, m[:1]]) for n, m in pack(t).items()}), format_version=2
        ),
        "packed masks must hold .* bytes; got other",
    ),
}


@pytest.mark.parametrize("damage", FOUND_WHEN_USED)
def test_packed_masks_are_looked_at_when_they_are_used_and_nothing_larger_is_made(damage, folder):
    change, message = FOUND_WHEN_USED[damage]
    change(folder)
    layers = Plan.from_pretrained(folder)["transformer"].layers
    with pytest.raises(ValueError, match=f"(?s){message}.*{AGAIN}"):
        unpack_all(layer.mask for layer in layers.values())


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(damage, folder):
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(PlanError, match=f"(?s){message}"):
        Plan.from_pretrained(folder)


def same(a: Plan, b: Plan) -> bool:
    """Whether two plans decide the same."""
    if list(a) != list(b):
        return False
    fields = ("model_class", "heads", "head_dim", "grid", "text", "block", "phases", "made", "config", "component")
    for one, other in ((a[name], b[name]) for name in a):
        if any(getattr(one, each) != getattr(other, each) for each in fields) or list(one.layers) != list(other.layers):
            return False
        for x, y in zip(one.layers.values(), other.layers.values(), strict=True):
            if (x.orders, x.precision) != (y.orders, y.precision) or not torch.equal(x.mask.bits, y.mask.bits):
                return False
    return True


@pytest.mark.parametrize("file", ["plan.json", "plan.safetensors"])
def test_a_changed_byte_anywhere_is_noticed_or_changes_nothing(file, folder):
    """A byte of white space may become another one; nothing else may."""
    intact, path, dice = Plan.from_pretrained(folder), folder / "transformer_2" / file, random.Random(0)
    blob = path.read_bytes()
    noticed = 0
    for _ in range(200):
        at, byte = dice.randrange(len(blob)), dice.randrange(256)
        path.write_bytes(blob[:at] + bytes([byte]) + blob[at + 1 :])
        try:
            assert same(Plan.from_pretrained(folder), intact), (at, byte)
        except PlanError as error:
            noticed += 1
            assert re.search("plan|Update", str(error))
    path.write_bytes(blob)
    assert same(Plan.from_pretrained(folder), intact)
    assert noticed > (60 if file == "plan.json" else 190)


def test_a_file_cut_anywhere_is_noticed(folder):
    dice = random.Random(1)
    for file in ("plan.json", "plan.safetensors"):
        path = folder / "transformer" / file
        blob = path.read_bytes()
        for length in [0, 1, 8, *(dice.randrange(len(blob) - 1) for _ in range(40))]:
            path.write_bytes(blob[:length])
            with pytest.raises(PlanError):
                Plan.from_pretrained(folder)
        path.write_bytes(blob)


def test_nothing_that_is_loaded_is_executed(folder, monkeypatch):
    bomb = pickle.dumps(Bomb())
    for module, name in ((os, "system"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("a plan was executed"))
    forged(folder, bomb)
    with pytest.raises(PlanError):
        Plan.from_pretrained(folder)
    (folder / "transformer" / "plan.py").write_text("raise SystemExit")
    (folder / "transformer" / "plan.pt").write_bytes(bomb)
    with pytest.raises(PlanError):
        Plan.from_pretrained(folder)


SOURCES = {
    "a folder that is not there": ("nowhere/at/all", "neither a folder nor a plan on the Hugging Face Hub"),
    "a path above": ("../plan", 'ids are "owner/name".*Check the path'),
    "an absolute path": ("/nowhere/plan", "ids are"),
    "a path on Windows": ("C:\\plans\\mine", "ids are"),
    "an address": ("https://huggingface.co/owner/plan", "ids are"),
    "nothing": ("", "holds no plan|ids are"),
    "an id that climbs": ("owner/../plan", "ids are"),
    "an id of three parts": ("owner/name/transformer", "ids are"),
    "an id with a newline": ("owner/name\n", "ids are"),
    "a lonely name": ("plan-of-nobody", "ids are"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_that_is_no_plan_is_refused_without_asking_the_hub(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    path, message = SOURCES[source]
    with pytest.raises(PlanError, match=f"(?s){message}"):
        Plan.from_pretrained(path)


def test_a_revision_of_a_folder_is_refused(folder):
    with pytest.raises(PlanError, match=says("a revision is for plans on the Hub; got 'main'", "Leave it out")):
        Plan.from_pretrained(folder, revision="main")


@pytest.mark.parametrize("name", ["../evil", "unet", "", "transformer/..", "transformer_3"])
def test_components_have_fixed_names(name):
    with pytest.raises(
        PlanError, match=says("needs components among transformer, transformer_2; got", re.escape(name))
    ):
        Plan({name: PLAN})


@pytest.mark.parametrize("repository", ["plan", "a/b/c", "../plan", "owner/", "owner/na me", "owner/..", ""])
def test_a_plan_is_pushed_to_a_repository_and_nowhere_else(repository, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **_: pytest.fail("the Hub was asked"))
    with pytest.raises(PlanError, match=says('a repository "owner/name"', re.escape(f"got {repository!r}"))):
        whole().push_to_hub(repository)


def test_plans_are_written_over_plans_only(tmp_path):
    plan = whole()
    for name in ("thesis.txt", "README.md", "transformer.txt"):
        mine = tmp_path / name.partition(".")[0]
        mine.mkdir()
        (mine / name).write_text("years of work")
        with pytest.raises(FileExistsError, match=says(f"holds something else \\({name}\\)", "give another folder")):
            plan.save_pretrained(mine)
        with pytest.raises(FileExistsError, match="is a file; give the name of a folder"):
            plan.save_pretrained(mine / name)
        assert (mine / name).read_text() == "years of work"


def test_numbers_that_json_lacks_are_refused_before_a_folder_appears(tmp_path):
    plan = whole(replace(PLAN, made={"loss": float("nan")}))
    with pytest.raises(ValueError, match="not JSON compliant"):
        plan.save_pretrained(tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_contradicts_itself_cannot_be_made():
    layer = PLAN.layers[NAMES[0]]
    wrong = {
        "positive integer; got -1": {"heads": -1},
        "at least one layer": {"layers": {}},
        "named by module path": {"layers": {"../x": layer}},
        "2 heads need 2 orders; got 1": {"layers": {NAMES[0]: replace(layer, orders=layer.orders[:1])}},
        "an order must be one of": {"layers": {NAMES[0]: replace(layer, orders=("FHW", "FHX"))}},
        "precision must be one of": {"layers": {NAMES[0]: replace(layer, precision=(("int8", "int9"),))}},
        "precision must have one entry": {"layers": {NAMES[0]: replace(layer, precision=())}},
        "the mask must have": {"grid": Grid(6, 7, 6)},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            replace(PLAN, **change)
    with pytest.raises(ValueError, match="prefix or suffix"):
        replace(PLAN, text=TextSpan(3, "middle"))
    with pytest.raises(ValueError, match="packed bits must be uint8"):
        LayerPlan(layer.orders, BlockMask(layer.mask.bits.float(), 4, layer.mask.block), layer.precision)


# The operation by itself

N, H, D = 96, 2, 32
Q = torch.randn(1, N, H, D)
MASK = BlockMask.full(H, N, (32, 32))
OPERANDS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "integers": (lambda: paroattn.attention(*[Q.int()] * 3, MASK), ValueError, r"q must be float64.*got torch\.int32"),
    "three dimensions": (lambda: paroattn.attention(*[Q[0]] * 3, MASK), ValueError, r"shape \(B, N, H, D\).*got \(96"),
    "nothing": (lambda: paroattn.attention(*[Q[:, :0]] * 3, MASK), ValueError, "none of them 0"),
    "lists": (lambda: paroattn.attention(Q.tolist(), Q, Q, MASK), TypeError, "q must be a tensor; got list"),
    "keys of other length": (lambda: paroattn.attention(Q, Q[:, 1:], Q, MASK), ValueError, "k must be like q"),
    "values of other dtype": (lambda: paroattn.attention(Q, Q, Q.half(), MASK), ValueError, "v must be like q"),
    "keys elsewhere": (lambda: paroattn.attention(Q, Q.to("meta"), Q, MASK), ValueError, "on meta"),
    "a boolean mask": (lambda: paroattn.attention(Q, Q, Q, MASK.dense()), TypeError, "BlockMask.from_dense makes one"),
    "a mask of other length": (lambda: paroattn.attention(Q, Q, Q, BlockMask.full(H, 2 * N, (32, 32))), ValueError,
                               "3×3 blocks of 32×32 for 96 tokens; got 2 heads and 6×6"),
    "a mask of other heads": (lambda: paroattn.attention(Q, Q, Q, BlockMask.full(3, N, (32, 32))), ValueError,
                              "must cover 2 heads"),
    "an order without a table": (lambda: paroattn.attention(Q, Q, Q, MASK, order=torch.zeros(2)), TypeError, "both"),
    "text longer than the sequence": (lambda: paroattn.attention(Q, Q, Q, MASK, text_tokens=N), ValueError,
                                      "text_tokens must be 0…95 of 96 tokens; got 96"),
    "an infinite scale": (lambda: paroattn.attention(Q, Q, Q, MASK, softmax_scale=float("inf")), ValueError,
                          "softmax_scale must be finite; got inf"),
    "a precision for each of three heads": (lambda: paroattn.attention(Q, Q, Q, MASK, precision=["fp32"] * 3),
                                            ValueError, "one per head, 2 of them; got 3"),
    "a gradient": (lambda: paroattn.attention(*[Q.clone().requires_grad_()] * 3, MASK), ValueError, "no gradient"),
}  # fmt: skip


@pytest.mark.parametrize("operands", OPERANDS)
def test_operands_that_do_not_fit_are_refused(operands):
    use, error, message = OPERANDS[operands]
    before = Q.clone()
    with pytest.raises(error, match=f"(?s){message}"):
        use()
    assert torch.equal(Q, before)


def test_errors_inside_a_run_leave_nothing_for_the_next():
    """A pipeline that fails midway, under a plan, runs the next time as if nothing had been."""
    pipe = tiny_pipeline()
    apply(pipe, whole(random_plan(density=0.4, phases=TWO_PHASES)))
    expected = pipe(4).frames
    broken = pipe.transformer.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe(4)
    broken.remove()
    assert torch.equal(pipe(4).frames, expected)
    twin = copy.deepcopy(pipe)
    with contextlib.suppress(ZeroDivisionError), dense(pipe):
        raise ZeroDivisionError
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(pipe(4).frames, expected) and torch.equal(twin(4).frames, expected)
