"""What a plan does together with everything else that people use; the table in docs/compatibility.md is made here.

Every row is a test. What it returns is written in the table: a number is how far the result is from the same model with
the same feature and no plan, its attention masked token by token. `python tests/test_compatibility.py` makes the table.
"""

import contextlib
import copy
import functools
import re
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from diffusers import ContextParallelConfig, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, hooks
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from PIL import Image
from several import on_ranks
from tiny_models import TWO_PHASES, VARIANTS, random_plan, tiny_pipeline, tiny_wan, wan_inputs
from torch._dynamo.utils import counters
from torch.nn import functional as F

from paroattn.block_mask import blocks_of
from paroattn.grid import Grid, TextSpan
from paroattn.integration.apply import apply, dense, remove, report
from paroattn.plan.plan import Plan, PlanError, TransformerPlan

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
START, END = "<!-- table: python tests/test_compatibility.py -->", "<!-- /table -->"
real_sdpa = F.scaled_dot_product_attention
orders_of_use = ("before", "after")
pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Row:
    """A line of the table: what is used together with a plan, and how far the result may be off."""

    section: str
    feature: str
    note: str
    bound: float


@dataclass(frozen=True)
class Refused:
    """The feature and a plan exclude each other, and this is what is said."""

    says: str


@dataclass(frozen=True)
class Dense:
    """The layers concerned run dense, and this is what the warning says."""

    says: str


ROWS: dict[str, Row] = {}
FOUND: dict[str, str] = {}


def row(section: str, feature: str, note: str = "", *, bound: float = 0.0) -> Callable[[Any], Any]:
    """Make a test a row: it returns a difference, Refused or Dense."""

    def wrap(test: Any) -> Any:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            FOUND[test.__name__] = outcome(test(*args, **kwargs), bound)

        ROWS[test.__name__] = Row(section, feature, note, bound)
        return run

    return wrap


def outcome(result: Any, bound: float) -> str:
    if isinstance(result, Refused):
        return f"refused: “{result.says}”"
    if isinstance(result, Dense):
        return f"dense, with a warning: “{result.says}”"
    assert result <= bound, f"{result} is more than {bound}"
    return f"within {bound:.0e}".replace("e-0", "e-") if bound else "exact"


def table(found: dict[str, str]) -> str:
    lines: list[str] = []
    section = None
    for name, each in ROWS.items():
        if each.section != section:
            section = each.section
            lines += ["", f"**{section}**", "", "| together with | outcome | how |", "| --- | --- | --- |"]
        lines.append(f"| {each.feature} | {found.get(name, '')} | {each.note} |")
    return "\n".join(lines[1:]) + "\n"


def documented() -> dict[str, str]:
    """What the page says, by name of the test."""
    text = PAGE.read_text(encoding="utf-8")
    cells = re.findall(r"^\| (.*?) \| (.*?) \| .*?\|$", text[text.index(START) : text.index(END)], re.M)
    says = dict(cells)
    return {name: says.get(each.feature, "") for name, each in ROWS.items()}


def needs(name: str) -> Any:
    return pytest.importorskip(name, reason=f"needs {name}")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@pytest.fixture
def compiler():
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


# What is right: the stock model, its attention masked token by token


@functools.cache
def token_mask(plan: TransformerPlan, name: str, phase: int, text: int) -> torch.Tensor:
    """Who reads whom, (H, N, N) in the model's order, from the coordinates of every token."""
    layer, tokens, (rows, columns) = plan.layers[name], plan.grid.tokens + text, plan.block
    kept = np.ones((plan.heads, blocks_of(tokens, rows), blocks_of(tokens, columns)), dtype=bool)
    sparse = (plan.grid.tokens // rows, plan.grid.tokens // columns) if text else kept.shape[1:]
    kept[:, : sparse[0], : sparse[1]] = layer.mask.dense()[phase].numpy()[:, : sparse[0], : sparse[1]]
    coordinates = np.stack(np.unravel_index(np.arange(plan.grid.tokens), tuple(plan.grid)))
    masks = []
    for order, keep in zip(layer.orders, kept, strict=True):
        slowest_last = [coordinates["FHW".index(axis)] for axis in reversed(order)]
        place = np.argsort(np.lexsort(slowest_last))
        place = [np.arange(plan.grid.tokens, tokens), place] if plan.text.side == "prefix" else [
            place, np.arange(plan.grid.tokens, tokens)]  # fmt: skip
        place = np.concatenate(place)
        masks.append(keep[place // rows][:, place // columns])
    return torch.from_numpy(np.stack(masks))


@contextlib.contextmanager
def masked(model: Any, plan: TransformerPlan, scheduler: Any = None):
    """Mask a stock model's self-attentions as a plan says, phase by phase of its scheduler."""
    running: list[str] = []

    def phase() -> int:
        if scheduler is None:
            return 0
        step = scheduler.step_index if scheduler.step_index is not None else scheduler.begin_index or 0
        return plan.phase_at(float(scheduler.sigmas[step]))

    def attend(query, key, value, attn_mask=None, **rest):
        text = key.shape[-2] - plan.grid.tokens
        if not running or query.shape != key.shape or text < 0:
            return real_sdpa(query, key, value, attn_mask=attn_mask, **rest)
        assert attn_mask is None
        return real_sdpa(query, key, value, attn_mask=token_mask(plan, running[-1], phase(), text), **rest)

    handles = []
    for name in plan.layers:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        handles.append(module.register_forward_hook(lambda *_: running.pop() and None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        yield
    for handle in handles:
        handle.remove()


def forward(model: Any, **changed: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**wan_inputs() | changed).sample


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


SPARSE, PHASED = random_plan(density=0.4), random_plan(density=0.4, phases=TWO_PHASES)


def whole(plan: TransformerPlan) -> Plan:
    return Plan({"transformer": plan})


def calls(target: Any) -> list[int]:
    """Sparse calls of every layer."""
    layers = report(target).to_dict()["transformer"]["layers"]
    return [layer["sparse_calls"] for layer in layers.values()]


def together(change: Callable[[Any], Any], run: Callable[[Any], Any] = forward, plan=SPARSE, make=tiny_wan) -> float:
    """How far a planned model is from a masked one after the same change, made before or after `apply`."""
    stock = make()
    change(stock)
    with masked(stock, plan):
        expected = run(stock)
    worst = 0.0
    for order in orders_of_use:
        model = make()
        if order == "before":
            change(model)
        apply(model, plan)
        if order == "after":
            change(model)
        worst = max(worst, difference(run(model), expected))
        assert all(calls(model))
    return worst


def pipelines_together(change, run=lambda pipe: pipe(4).frames, plan=PHASED, make=tiny_pipeline) -> float:
    """The same for pipelines, with a plan of two phases."""
    stock = make()
    change(stock)
    with masked(stock.transformer, plan, stock.scheduler):
        expected = run(stock)
    worst = 0.0
    for order in orders_of_use:
        pipe = make()
        if order == "before":
            change(pipe)
        apply(pipe, whole(plan))
        if order == "after":
            change(pipe)
        for _ in range(2):  # the second run of a pipeline meets what the first one left
            worst = max(worst, difference(run(pipe), expected))
        assert all(calls(pipe))
    return worst


def nothing(_: Any) -> None:
    pass


# On and off

ON_AND_OFF = "On and off"


@row(ON_AND_OFF, "`paroattn.remove`", "the stock model, to the bit")
def test_remove():
    model = tiny_wan()
    expected = forward(model)
    apply(model, SPARSE)
    assert not torch.equal(forward(model), expected)
    remove(model)
    return difference(forward(model), expected)


@row(ON_AND_OFF, "`paroattn.dense`", "the stock model, to the bit")
def test_dense():
    model = tiny_wan()
    expected = forward(model)
    apply(model, SPARSE)
    with dense(model):
        return difference(forward(model), expected)


# Compilation

COMPILED = "Compilation"


def compiled(make_ready: Callable[[Any], Any], runs: Any = (4, 9)) -> tuple[float, int]:
    """Difference to the plan without compilation, and graphs, of a pipeline with four layers and two phases."""
    names = [f"blocks.{index}.attn1" for index in range(4)]
    plan = whole(random_plan(names, density=0.4, phases=TWO_PHASES))
    plain, pipe = (tiny.TinyPipeline(tiny_wan(layers=4), FlowMatchEulerDiscreteScheduler(shift=3.0)) for _ in range(2))
    apply(plain, plan)
    apply(pipe, plan)
    make_ready(pipe.transformer)
    worst = max(difference(pipe(steps).frames, plain(steps).frames) for steps in runs)
    assert dict(counters["graph_break"]) == {}
    return worst, counters["stats"]["unique_graphs"]


@row(COMPILED, "`transformer.compile_repeated_blocks(fullgraph=True)`",
     "1 graph for 4 layers, 13 steps and 2 phases; 0 recompiles", bound=1e-5)  # fmt: skip
def test_compiled_blocks(compiler):
    worst, graphs = compiled(lambda model: model.compile_repeated_blocks(fullgraph=True, backend="aot_eager"))
    assert graphs == 1
    return worst


@row(COMPILED, "`torch.compile` of the whole transformer", "`fullgraph=True`: 1 graph, 0 recompiles", bound=1e-5)
def test_compiled_model(compiler):
    worst, graphs = compiled(lambda model: model.compile(fullgraph=True, backend="aot_eager"))
    assert graphs == 1
    return worst


@row(COMPILED, "`apply` and `remove` on a compiled model",
     "1 more graph, once; `remove` gives back the first one's result", bound=1e-5)  # fmt: skip
def test_apply_on_a_compiled_model():
    torch.compiler.reset()
    counters.clear()
    model, plain = tiny_wan(), tiny_wan()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    stock = forward(model)
    assert counters["stats"]["unique_graphs"] == 1
    apply(model, SPARSE)
    apply(plain, SPARSE)
    worst = difference(forward(model), forward(plain))
    forward(model)
    assert counters["stats"]["unique_graphs"] == 2
    remove(model)
    assert torch.equal(forward(model), stock)
    assert counters["stats"]["unique_graphs"] <= 3
    torch.compiler.reset()
    return worst


# Memory

MEMORY = "Memory"


@row(MEMORY, "`enable_model_cpu_offload`", "before or after `apply`, two runs; CPU as the device", bound=1e-5)
def test_model_offload():
    return pipelines_together(lambda pipe: pipe.enable_model_cpu_offload(device="cpu"))


@row(MEMORY, "`enable_group_offload`, blocks or leaves, to memory or disk",
     "before or after `apply`; CPU as the device", bound=1e-5)  # fmt: skip
def test_group_offload(tmp_path, monkeypatch):
    cpu, folders = torch.device("cpu"), iter(range(99))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: cpu)  # diffusers 0.38 asks even for none

    def offload(pipe: Any, **how: Any) -> None:
        pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, **how)

    return max(
        pipelines_together(lambda pipe: offload(pipe, offload_type="block_level", num_blocks_per_group=1)),
        pipelines_together(lambda pipe: offload(pipe, offload_type="leaf_level")),
        pipelines_together(
            lambda pipe: offload(
                pipe, offload_type="leaf_level", offload_to_disk_path=str(tmp_path / str(next(folders)))
            )
        ),
    )


@row(MEMORY, "`enable_layerwise_casting`", "weights stored in FP8, computed in float32", bound=1e-5)
def test_layerwise_casting():
    types = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    return together(lambda model: model.enable_layerwise_casting(**types))


# Weights

WEIGHTS = "Weights"


def linears(model: Any, make: Callable[[torch.nn.Linear], torch.nn.Module]) -> None:
    """Put other modules in place of the blocks' linears."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name.startswith("blocks"):
            parent, _, own = name.rpartition(".")
            made = make(module)
            if module.bias is not None:
                made.bias = module.bias
            setattr(model.get_submodule(parent), own, made.to("cpu"))


@row(WEIGHTS, "torchao, INT8 weights", "quantised before or after `apply`", bound=1e-5)
def test_torchao_weights():
    ao = needs("torchao.quantization")
    return together(lambda model: ao.quantize_(model, ao.Int8WeightOnlyConfig()))


@row(WEIGHTS, "torchao, INT8 weights and activations",
     "activations are rounded after attention, so its last bits decide some of them", bound=3e-2)  # fmt: skip
def test_torchao_activations():
    ao = needs("torchao.quantization")
    return together(lambda model: ao.quantize_(model, ao.Int8DynamicActivationInt8WeightConfig()))


@row(WEIGHTS, "bitsandbytes, INT8", "quantised before or after `apply`", bound=1e-5)
def test_bitsandbytes_int8():
    bnb = needs("bitsandbytes")

    def quantised(linear: torch.nn.Linear) -> torch.nn.Module:
        made = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
        )
        made.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        return made

    return together(lambda model: linears(model, quantised))


@row(WEIGHTS, "bitsandbytes, NF4", "quantised before or after `apply`", bound=1e-5)
def test_bitsandbytes_nf4():
    bnb = needs("bitsandbytes")

    def quantised(linear: torch.nn.Linear) -> torch.nn.Module:
        made = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=torch.float32,
            quant_type="nf4",
        )  # fmt: skip
        made.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        return made

    return together(lambda model: linears(model, quantised))


def with_lora(model: Any) -> None:
    peft = needs("peft")
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets), "style")
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    model.requires_grad_(False)


def every_state_of_lora(model: Any) -> torch.Tensor:
    """A forward pass with a LoRA beside the weights, in them, out again, off, on, and gone."""
    found = [forward(model)]
    for step in ("fuse_lora", "unfuse_lora", "disable_adapters", "enable_adapters", "unload_lora"):
        getattr(model, step)()
        found.append(forward(model))
    assert difference(found[0], found[-1]) > 1e-2
    return torch.stack(found)


@row(WEIGHTS, "LoRA: add, fuse, unfuse, disable, enable, unload", "before or after `apply`", bound=1e-5)
def test_lora():
    return together(with_lora, every_state_of_lora)


@row(WEIGHTS, "`pipe.load_lora_weights`, `unload_lora_weights`", "Wan, after `apply`", bound=1e-5)
def test_lora_of_a_pipeline():
    needs("peft")
    generator = torch.Generator().manual_seed(4)
    weights = {
        f"transformer.blocks.{block}.attn1.{name}.lora_{side}.weight": torch.randn(*shape, generator=generator) * 0.2
        for block in (0, 1)
        for name in ("to_q", "to_k", "to_v")
        for side, shape in (("A", (4, 128)), ("B", (128, 4)))
    }
    stock, pipe, plan = wan_pipeline(), wan_pipeline(), wan_plan()
    apply(pipe, whole(plan))
    without = run_wan(pipe)
    for each in (stock, pipe):
        each.load_lora_weights(dict(weights), adapter_name="style")
    with masked(stock.transformer, plan, stock.scheduler):
        expected = run_wan(stock)
    found = run_wan(pipe)
    assert difference(found, without) > 1e-2
    pipe.unload_lora_weights()
    assert difference(run_wan(pipe), without) < 1e-6
    return difference(found, expected)


@row(WEIGHTS, "`fuse_qkv_projections`", "Wan, LTX, FLUX: before or after `apply`", bound=1e-5)
def test_fused_projections():
    def fused(name: str) -> float:
        variant = VARIANTS[name]
        inputs = {key: value for key, value in variant.call().items() if key != "encoder_attention_mask"}

        def run(model: Any) -> torch.Tensor:
            with torch.no_grad():
                return model(**inputs, **({"encoder_attention_mask": None} if name == "ltx" else {})).sample

        return together(
            lambda model: model.fuse_qkv_projections(), run, variant.plan(density=0.4), lambda: variant.build()
        )

    return max(map(fused, ("wan", "ltx", "flux")))


@row(WEIGHTS, "`fuse_qkv_projections` after `apply` on CogVideoX and SD3", "they swap the processors; fuse first")
def test_fused_projections_that_swap_processors():
    says = "run without the plan. Call paroattn.remove and apply again"
    for name in ("cogvideox-5b", "sd3"):
        variant = VARIANTS[name]
        model, stock = variant.build(), variant.build()
        apply(model, variant.plan(density=0.4))
        model.fuse_qkv_projections()
        stock.fuse_qkv_projections()
        with torch.no_grad(), pytest.warns(UserWarning, match=re.escape(says)):
            found = model(**variant.call()).sample
        assert len(report(model).to_dict()["transformer"]["replaced_layers"]) == len(variant.layers)
        with torch.no_grad():
            assert torch.equal(found, stock(**variant.call()).sample)
    return Dense(says)


# Caches

CACHES = "Caches and skipped layers"


def cached(config: Callable[[], Any], steps: int = 8) -> float:
    """A cache that skips some of the layers' calls."""
    worst = pipelines_together(lambda pipe: pipe.transformer.enable_cache(config()), lambda pipe: pipe(steps).frames)
    pipe = tiny_pipeline()
    apply(pipe, whole(PHASED))
    pipe.transformer.enable_cache(config())
    pipe(steps)
    assert 0 < min(calls(pipe)) < 2 * steps, "nothing was cached"
    pipe.transformer.disable_cache()
    stock = tiny_pipeline()
    with masked(stock.transformer, PHASED, stock.scheduler):
        assert difference(pipe(3).frames, stock(3).frames) < 1e-5
    return worst


@row(CACHES, "FirstBlockCache", "on and off, before or after `apply`", bound=1e-5)
def test_first_block_cache():
    return cached(lambda: hooks.FirstBlockCacheConfig(threshold=5.0))


@row(CACHES, "MagCache", "on and off, before or after `apply`", bound=1e-5)
def test_mag_cache():
    settings = {"threshold": 0.5, "max_skip_steps": 2, "retention_ratio": 0.2}
    return cached(lambda: hooks.MagCacheConfig(**settings, num_inference_steps=8, mag_ratios=[1.0] * 8))


@row(CACHES, "TaylorSeer", "on and off, before or after `apply`", bound=1e-5)
def test_taylor_seer():
    settings = {"cache_interval": 3, "disable_cache_before_step": 1, "max_order": 1}
    return cached(
        lambda: hooks.TaylorSeerCacheConfig(
            **settings, taylor_factors_dtype=torch.float32, cache_identifiers=[r"blocks\.\d+\.attn1"]
        )
    )


@row(CACHES, "Pyramid Attention Broadcast", "on and off, before or after `apply`", bound=1e-5)
def test_pyramid_attention_broadcast():
    return cached(
        lambda: hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            spatial_attention_block_identifiers=("blocks.*attn1",),
            current_timestep_callback=lambda: 500,
        )
    )


@row(CACHES, "SeaCache", "Wan, with a diffusers that has it; before or after `apply`", bound=1e-5)
def test_sea_cache():
    if not hasattr(hooks, "SeaCacheConfig"):
        pytest.skip("this diffusers has none")
    config = hooks.SeaCacheConfig(threshold=50.0)

    def run(pipe: Any) -> torch.Tensor:
        return run_wan(pipe, num_inference_steps=8)

    def enable(pipe: Any) -> None:
        pipe.transformer.enable_cache(config)

    worst, pipe = pipelines_together(enable, run, wan_plan(), make=wan_pipeline), wan_pipeline()
    apply(pipe, whole(wan_plan()))
    enable(pipe)
    run(pipe)
    assert 0 < min(calls(pipe)) < 16, "nothing was cached"
    return worst


def with_tea_cache(model: Any, threshold: float = 2.5) -> None:
    """TeaCache as its users write it: a new `forward` that skips all blocks while the time embedding hardly changes."""
    original, known = model.forward, {}

    @functools.wraps(original)
    def forward(hidden_states, timestep, encoder_hidden_states, *args, **kwargs):
        embedding = model.condition_embedder.timesteps_proj(timestep)
        branch = float(encoder_hidden_states.sum())
        before, found, drift = known.get(branch, (None, None, 0.0))
        if before is not None:
            drift += ((embedding - before).abs().mean() / before.abs().mean()).item()
        if before is None or drift >= threshold:
            found, drift = original(hidden_states, timestep, encoder_hidden_states, *args, **kwargs), 0.0
        known[branch] = (embedding, found, drift)
        return found

    model.forward, model.tea_cache = forward, known


@row(CACHES, "TeaCache, TeaCache-like", "a `forward` that skips all blocks, before or after `apply`", bound=1e-5)
def test_tea_cache():
    def run(pipe: Any) -> torch.Tensor:
        pipe.transformer.tea_cache.clear()
        return pipe(8).frames

    worst, pipe = pipelines_together(lambda pipe: with_tea_cache(pipe.transformer), run), tiny_pipeline()
    apply(pipe, whole(PHASED))
    with_tea_cache(pipe.transformer)
    run(pipe)
    assert 2 < min(calls(pipe)) < 16, "nothing was skipped, or all"
    return worst


@row(CACHES, "cache-dit", "its `DBCacheConfig` on the blocks, before or after `apply`", bound=1e-5)
def test_cache_dit():
    cache_dit = needs("cache_dit")
    settings = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "residual_diff_threshold": 5.0, "max_warmup_steps": 1}

    def enable(pipe: Any) -> None:
        adapter = cache_dit.BlockAdapter(
            pipe=pipe, transformer=pipe.transformer, blocks=pipe.transformer.blocks, has_separate_cfg=True,
            forward_pattern=cache_dit.ForwardPattern.Pattern_2,
        )  # fmt: skip
        cache_dit.enable_cache(adapter, cache_config=cache_dit.DBCacheConfig(**settings, num_inference_steps=6))

    stock, worst = tiny_pipeline(), 0.0
    enable(stock)
    with masked(stock.transformer, PHASED, stock.scheduler):
        expected = stock(6).frames
    for order in orders_of_use:
        pipe = tiny_pipeline()
        if order == "before":
            enable(pipe)
        apply(pipe, whole(PHASED))
        if order == "after":
            enable(pipe)
        worst = max(worst, difference(pipe(6).frames, expected))
        assert 0 < min(calls(pipe)) < 12
    return worst


@row(CACHES, "`apply_layer_skip`", "a whole block is left out, as skip-layer guidance does", bound=1e-5)
def test_layer_skip():
    skipped = {"skip_attention": True, "skip_attention_scores": False, "skip_ff": True}

    def skip(model: Any) -> None:
        hooks.apply_layer_skip(model, hooks.LayerSkipConfig(indices=[1], fqn="blocks", **skipped))

    names = [f"blocks.{index}.attn1" for index in range(3)]
    plan = random_plan(names, density=0.4)
    stock = tiny_wan(layers=3)
    skip(stock)
    with masked(stock, plan):
        expected = forward(stock)
    worst = 0.0
    for order in orders_of_use:
        model = tiny_wan(layers=3)
        if order == "before":
            skip(model)
        apply(model, plan)
        if order == "after":
            skip(model)
        worst = max(worst, difference(forward(model), expected))
    return worst


# Attention

ATTENTION = "Other attention"


@row(ATTENTION, "`set_attention_backend`", "runs dense calls and cross-attention; planned layers follow the plan",
     bound=1e-5)  # fmt: skip
def test_attention_backend():
    try:
        worst = together(lambda model: model.set_attention_backend("_native_math"))
        model, stock = tiny_wan(), tiny_wan()
        apply(model, SPARSE)
        for each in (model, stock):
            each.set_attention_backend("_native_math")
        with dense(model):
            assert torch.equal(forward(model), forward(stock))
        return worst
    finally:
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


@row(ATTENTION, "IP-adapter (FLUX)", "loaded before `apply`; its own attention runs dense beside the plan", bound=1e-5)
def test_ip_adapter():
    variant, generator = VARIANTS["flux"], torch.Generator().manual_seed(5)
    plan, model = variant.plan(density=0.4), variant.build()
    adapter = FluxIPAdapterAttnProcessor(tiny.WIDTH, 24)
    for parameter in adapter.parameters():
        parameter.data.normal_(std=0.2, generator=generator).requires_grad_(False)
    model.transformer_blocks[0].attn.set_processor(adapter)
    image = {"ip_hidden_states": [torch.randn(1, 5, 24, generator=generator)]}

    def run() -> torch.Tensor:
        with torch.no_grad():
            return model(**variant.call(), joint_attention_kwargs=dict(image)).sample

    with masked(model, plan):
        expected = run()
    apply(model, plan)
    found = run()
    assert calls(model) == [1, 1]
    return difference(found, expected)


@row(ATTENTION, "IP-adapter loaded after `apply`", "its processors take the plan's place")
def test_ip_adapter_after_apply():
    variant = VARIANTS["flux"]
    says = "were replaced after apply, so they run without the plan. Call paroattn.remove and apply again"
    model = variant.build()
    apply(model, variant.plan(density=0.4))
    model.transformer_blocks[0].attn.set_processor(FluxIPAdapterAttnProcessor(tiny.WIDTH, 24))
    with torch.no_grad(), pytest.warns(UserWarning, match=re.escape(says)):
        model(**variant.call(), joint_attention_kwargs={"ip_hidden_states": [torch.randn(1, 5, 24)]})
    return Dense(says)


@row(ATTENTION, "IP-adapter (SD3)", "loaded before `apply`; it calls attention in a way of its own")
def test_ip_adapter_of_sd3():
    says = (
        "the processor must call diffusers' attention dispatcher; got SD3IPAdapterJointAttnProcessor2_0, which does not"
    )
    variant = VARIANTS["sd3"]
    model = variant.build()
    adapter = SD3IPAdapterJointAttnProcessor2_0(tiny.WIDTH, 24, tiny.HEADS, tiny.HEAD_DIM, 16)
    model.transformer_blocks[0].attn.set_processor(adapter)
    before = dict(model.attn_processors)
    with pytest.raises(ValueError, match=re.escape(says)):
        apply(model, variant.plan())
    assert dict(model.attn_processors) == before
    return Refused(says)


@row(ATTENTION, "image conditioning of Wan I2V", "257 image tokens stay in cross-attention", bound=1e-5)
def test_image_conditioning():
    variant = VARIANTS["wan-i2v"]

    def run(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(**variant.call()).sample

    return together(nothing, run, variant.plan(density=0.4), variant.build)


@row(ATTENTION, "ring parallelism", "`ContextParallelConfig(ring_degree=…)`")
def test_ring_parallelism(monkeypatch):
    says, distributed = "this one has ring parallelism. Use ContextParallelConfig(ulysses_degree=…)", torch.distributed
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    distributed.init_process_group("fake", rank=0, world_size=2, store=fake.FakeStore())
    try:
        model = tiny_wan()
        model.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
        with pytest.raises(ValueError, match=re.escape(says)):
            apply(model, SPARSE)
        model = tiny_wan()
        apply(model, SPARSE)
        model.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
        with pytest.raises(ValueError, match=re.escape(says)):
            forward(model)
    finally:
        distributed.destroy_process_group()
    return Refused(says)


def _split(rank: int, first: bool) -> Any:
    model, config = tiny_wan(), ContextParallelConfig(ulysses_degree=2)
    if first:
        model.enable_parallelism(config=config)
    apply(model, SPARSE)
    if not first:
        model.enable_parallelism(config=config)
    with torch.no_grad():
        return model(**wan_inputs(), return_dict=False)[0].numpy()


@row(
    ATTENTION, "Ulysses: `enable_parallelism`", "Wan, two processes, before or after `apply`; see several-gpus.md",
    bound=1e-5,
)  # fmt: skip
def test_ulysses():
    model = tiny_wan()
    with masked(model, SPARSE):
        expected = forward(model)
    found = [each for first in (True, False) for each in on_ranks(2, _split, first)]
    return max(difference(torch.from_numpy(each), expected) for each in found)


# Calls

CALLS = "How the pipeline is called"
WAN_GRID = Grid(3, 3, 4)


def wan_pipeline() -> Any:
    needs("transformers")
    import tiny_pipelines

    pipe = tiny_pipelines.wan()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_plan() -> TransformerPlan:
    return random_plan(grid=WAN_GRID, density=0.5, phases=TWO_PHASES, block=(8, 16))


def prompts(*names: str, **kinds: bool) -> dict[str, torch.Tensor]:
    import tiny_pipelines

    return tiny_pipelines.embeddings(1, *names, **kinds)


def run_wan(pipe: Any, **call: Any) -> torch.Tensor:
    size = {"height": 48, "width": 64} | ({} if "video" in call else {"num_frames": 9})
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"} | size
    return pipe(**prompts(negative=True), **settings | call, generator=torch.Generator().manual_seed(0)).frames


@row(CALLS, "batch of 2, guidance in one call or two", "masks do not depend on the batch", bound=1e-5)
def test_batches():
    batched = pipelines_together(nothing, lambda pipe: pipe(4, batched=True).frames)
    return max(batched, together(nothing, lambda model: forward(model, **wan_inputs(batch=2))))


@row(CALLS, "several videos per prompt", "`num_videos_per_prompt=2`, Wan", bound=1e-5)
def test_several_videos():
    return pipelines_together(
        nothing, lambda pipe: run_wan(pipe, num_videos_per_prompt=2), wan_plan(), make=wan_pipeline
    )


@row(CALLS, "video to video", "Wan with `strength=0.5`: phases of the steps that run", bound=1e-5)
def test_video_to_video():
    needs("transformers")
    from diffusers import WanVideoToVideoPipeline

    frames = [Image.new("RGB", (64, 48), (20 * index, 30, 200)) for index in range(9)]

    def make() -> Any:
        parts = wan_pipeline().components
        names = ("vae", "transformer", "text_encoder", "tokenizer")
        scheduler = UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, num_train_timesteps=1000
        )
        pipe = WanVideoToVideoPipeline(**{name: parts[name] for name in names}, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(pipe: Any) -> torch.Tensor:
        return run_wan(pipe, video=frames, strength=0.5, num_inference_steps=8)

    worst = pipelines_together(nothing, run, wan_plan(), make=make)
    pipe = make()
    apply(pipe, whole(wan_plan()))
    run(pipe)
    assert report(pipe).to_dict()["transformer"]["calls"] == {"sparse": 8}
    return worst


def flux_pipeline(name: str) -> Callable[[], Any]:
    def make() -> Any:
        import diffusers
        import tiny_pipelines

        pipe = getattr(diffusers, name)(**tiny_pipelines.flux().components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def flux_together(name: str, **call: Any) -> float:
    needs("transformers")
    plan = random_plan(
        ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"), grid=Grid(1, 10, 12), density=0.5,
        model_class="FluxTransformer2DModel", text=TextSpan(6, "prefix"), block=(16, 16), phases=TWO_PHASES,
    )  # fmt: skip

    def run(pipe: Any) -> torch.Tensor:
        settings = {"height": 20, "width": 24, "num_inference_steps": 5, "output_type": "latent"}
        return pipe(
            **prompts("pooled_prompt_embeds"), **settings, **call, generator=torch.Generator().manual_seed(0)
        ).images

    return pipelines_together(nothing, run, plan, make=flux_pipeline(name))


@row(CALLS, "several images per prompt", "`num_images_per_prompt=3`, FLUX", bound=1e-5)
def test_several_images():
    return flux_together("FluxPipeline", num_images_per_prompt=3)


@row(CALLS, "image to image, inpainting", "FLUX with `strength=0.6`", bound=1e-5)
def test_image_to_image():
    image, mask = Image.new("RGB", (24, 20), (200, 100, 40)), Image.new("L", (24, 20), 255)
    return max(
        flux_together("FluxImg2ImgPipeline", image=image, strength=0.6),
        flux_together("FluxInpaintPipeline", image=image, mask_image=mask, strength=0.6),
    )


@row(CALLS, "callbacks that change latents or interrupt", "`callback_on_step_end`, Wan", bound=1e-5)
def test_callbacks():
    def run(pipe: Any) -> torch.Tensor:
        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = step == 2
            return {"latents": tensors["latents"] * 0.9}

        return run_wan(pipe, callback_on_step_end=callback)

    return pipelines_together(nothing, run, wan_plan(), make=wan_pipeline)


@row(CALLS, "another number of steps, another scheduler", "the phases follow noise levels", bound=1e-5)
def test_other_schedules():
    def swap(pipe: Any) -> None:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)

    stock, pipe = tiny_pipeline(), tiny_pipeline()
    apply(pipe, whole(PHASED))
    swap(stock)
    swap(pipe)
    with masked(stock.transformer, PHASED, stock.scheduler):
        expected = stock(11).frames
    return max(difference(pipe(11).frames, expected), pipelines_together(nothing, lambda pipe: pipe(7).frames))


@row(CALLS, "another resolution or number of frames", "before the first block, `strict=True`")
def test_another_grid():
    says = "the plan is for grid 5x7x6 (frames x height x width in tokens); this call has 5x6x7"
    model = tiny_wan()
    apply(model, SPARSE)
    with pytest.raises(PlanError, match=re.escape(says)):
        forward(model, **wan_inputs(latents=(4, 5, 12, 14)))
    with pytest.raises(PlanError, match="this call has 4x7x6"):
        forward(model, **wan_inputs(latents=(4, 4, 14, 12)))
    return Refused(says)


@row(CALLS, "the same with `strict=False`", "counted in the report")
def test_another_grid_without_strictness():
    says = "this call has 5x6x7. Such calls run dense"
    model, other = tiny_wan(), wan_inputs(latents=(4, 5, 12, 14))
    expected = forward(model, **other)
    apply(model, SPARSE, strict=False)
    with pytest.warns(UserWarning, match=says):
        assert torch.equal(forward(model, **other), expected)
    return Dense(says)


# PyTorch

TORCH = "PyTorch"


@row(TORCH, "`torch.inference_mode`", "around the model's call", bound=1e-5)
def test_inference_mode():
    def run(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            return model(**wan_inputs()).sample

    return together(nothing, run)


@row(TORCH, "`torch.autocast` to bfloat16", "both sides round to 8 bits", bound=3e-2)
def test_autocast():
    def run(model: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(model)

    return together(nothing, run)


@row(TORCH, "`.to(torch.bfloat16)` before or after `apply`", "both sides round to 8 bits", bound=3e-2)
def test_other_dtypes():
    def run(model: Any) -> torch.Tensor:
        return forward(model, **wan_inputs(dtype=torch.bfloat16))

    return together(lambda model: model.to(torch.bfloat16), run, random_plan(density=0.4, precision="bf16"))


@row(
    TORCH,
    "`.to(torch.float64)`, float64 inputs",
    "the reference, in float64; a kernel that is asked for refuses",
    bound=1e-5,
)
def test_float64():
    def run(model: Any) -> torch.Tensor:
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in wan_inputs().items()}
        return forward(model, **inputs)

    return together(lambda model: model.to(torch.float64), run)


@row(TORCH, "gradient checkpointing switched on, no gradient asked for", "nothing to recompute", bound=1e-5)
def test_checkpointing_without_gradients():
    return together(lambda model: model.enable_gradient_checkpointing())


@row(TORCH, "training", "there is no backward pass through the kept blocks")
def test_training():
    says = "attention has no gradient; got tensors that require one. Call it under torch.no_grad()"
    model = tiny_wan()
    apply(model, SPARSE)
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=re.escape(says)):
        model(**wan_inputs())
    return Refused(says)


@row(TORCH, "`copy.deepcopy`, `save_pretrained`", "copies follow the plan; files hold none", bound=1e-5)
def test_copies(tmp_path):
    model = tiny_wan()
    keys = list(model.state_dict())
    apply(model, SPARSE)
    twin = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert list(again.state_dict()) == keys and torch.equal(forward(again), forward(tiny_wan()))
    stock = tiny_wan()
    with masked(stock, SPARSE):
        return difference(forward(twin), forward(stock))


# Several at once

SEVERAL = "Several at once"


def in_threads(*work: Callable[[], Any]) -> list[BaseException]:
    """Run functions at the same time; what they raised."""
    raised: list[BaseException] = []

    def guarded(each: Callable[[], Any]) -> None:
        try:
            each()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(each,)) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@row(SEVERAL, "two pipelines in two threads", "each with its own plan", bound=1e-5)
def test_two_pipelines_in_two_threads():
    plans = [random_plan(density=0.3, phases=TWO_PHASES, seed=seed) for seed in (1, 2)]
    expected, pipes, found = [], [], {}
    for seed, plan in enumerate(plans):
        stock = tiny_pipeline(seed)
        with masked(stock.transformer, plan, stock.scheduler):
            expected.append(stock(5).frames)
        pipe = tiny_pipeline(seed)
        apply(pipe, whole(plan))
        pipes.append(pipe)

    def run(index: int) -> None:
        found[index] = [pipes[index](5).frames for _ in range(3)]

    assert in_threads(functools.partial(run, 0), functools.partial(run, 1)) == []
    return max(difference(each, expected[index]) for index, all_ in found.items() for each in all_)


@row(SEVERAL, "one transformer in two threads", "a model runs one call at a time")
def test_one_transformer_in_two_threads():
    says = "the transformer must run one call at a time; this one is running in another thread"
    model = tiny_wan()
    stock = forward(model)
    apply(model, SPARSE)
    alone, started, go_on = forward(model), threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        started.set()
        assert go_on.wait(20)

    def second() -> None:
        assert started.wait(20)
        try:
            forward(model)
        finally:
            go_on.set()

    found = []
    handle = model.blocks[1].register_forward_pre_hook(wait)
    (error,) = in_threads(lambda: found.append(forward(model)), second)
    handle.remove()
    assert isinstance(error, RuntimeError) and says in str(error)
    assert torch.equal(found[0], alone) and torch.equal(forward(model), alone)
    remove(model)
    assert torch.equal(forward(model), stock)
    return Refused(says)


@row(SEVERAL, "two pipelines that share a transformer", "`from_pipe`: the plan is on the transformer", bound=1e-5)
def test_pipelines_that_share_a_transformer():
    pipe = wan_pipeline()
    from diffusers import WanVideoToVideoPipeline

    apply(pipe, whole(wan_plan()))
    other = WanVideoToVideoPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    frames = [Image.new("RGB", (64, 48), (20 * index, 30, 200)) for index in range(9)]
    stock = wan_pipeline()
    changed = WanVideoToVideoPipeline.from_pipe(stock)
    changed.set_progress_bar_config(disable=True)
    with masked(stock.transformer, wan_plan(), stock.scheduler):
        expected = run_wan(changed, video=frames, strength=0.5, num_inference_steps=8)
    run_wan(pipe)
    return difference(run_wan(other, video=frames, strength=0.5, num_inference_steps=8), expected)


@row(SEVERAL, "two experts (Wan 2.2 A14B)", "a plan for each", bound=1e-5)
def test_two_experts():
    plans = [replace(PHASED, component=None), random_plan(density=0.3, phases=TWO_PHASES, seed=7)]
    stock, pipe = tiny_pipeline(two=True), tiny_pipeline(two=True)
    apply(pipe, Plan(dict(zip(("transformer", "transformer_2"), plans, strict=True))))
    expected = expert_run(stock, plans)
    return difference(pipe(6).frames, expected)


def expert_run(stock: Any, plans: list[TransformerPlan]) -> torch.Tensor:
    """A run in which each expert's attention is masked as its own plan says."""
    for model, plan in zip((stock.transformer, stock.transformer_2), plans, strict=True):
        original = model.forward

        @functools.wraps(original)
        def run(*args, model=model, plan=plan, original=original, **kwargs):
            with masked(model, plan, stock.scheduler):
                return original(*args, **kwargs)

        model.forward = run
    return stock(6).frames


# The page


def test_the_page_says_what_was_found():
    says = documented()
    assert len(ROWS) >= 40 and all(says.values()), [name for name, each in says.items() if not each]
    assert {name: says[name] for name in FOUND} == FOUND, f"run python tests/{Path(__file__).name}"


def test_the_page_has_no_empty_cell():
    assert all(row.section and row.feature and row.note for row in ROWS.values())
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\|(.*)\|$", text[text.index(START) : text.index(END)], re.M)
    assert all(cell.strip() for each in rows for cell in each.split("|"))


def test_the_page_has_no_row_that_is_no_test():
    text = PAGE.read_text(encoding="utf-8")
    listed = re.findall(r"^\| (.*?) \|", text[text.index(START) : text.index(END)], re.M)
    assert {each for each in listed if each not in ("together with", "---")} == {row.feature for row in ROWS.values()}


def test_every_test_that_touches_diffusers_runs_on_the_oldest_supported_one_too():
    root = PAGE.parents[1]
    makefile = (root / "Makefile").read_text()
    tested = re.search(r"^OLDEST := (\d+\.\d+)\.", makefile, re.M)
    supported = re.search(r'"diffusers>=(\d+\.\d+)"', (root / "pyproject.toml").read_text())
    assert tested and supported and tested[1] == supported[1]
    listed = re.search(r"^TOUCH_DIFFUSERS := .*,([\w ]+)\)\)$", makefile, re.M)
    touching = [
        path.stem.removeprefix("test_")
        for path in sorted((root / "tests").glob("test_*.py"))
        if re.search(r"^\s*(from|import) (diffusers|tiny_)", path.read_text(encoding="utf-8"), re.M)
    ]
    assert listed and set(touching) <= set(listed[1].split())


def main() -> int:
    """Run all rows and write the page's table."""
    code = pytest.main([__file__, "-q", "-k", "not page"])
    found: dict[str, str] = sys.modules[Path(__file__).stem].FOUND
    missing = [name for name in ROWS if name not in found]
    if code or missing:
        sys.stderr.write(f"nothing was written; these rows were not found: {', '.join(missing) or 'none'}\n")
        return 1
    text = PAGE.read_text(encoding="utf-8")
    before, after = text[: text.index(START)], text[text.index(END) :]
    PAGE.write_text(f"{before}{START}\n\n{table(found)}\n{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
