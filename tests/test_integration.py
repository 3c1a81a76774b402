"""Plans on diffusers models: what is computed, when, what stays untouched, and what each wrong use says."""

import copy
import functools
import json
import threading
import warnings
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from diffusers.hooks import FirstBlockCacheConfig, _helpers, hooks
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from tiny_models import (
    BLOCK,
    GRID,
    TWO_PHASES,
    TinyPipeline,
    random_plan,
    randomised,
    tiny_pipeline,
    tiny_wan,
    wan_inputs,
    whole,
)
from torch._dynamo.utils import counters
from torch.nn import functional as F

from paroattn.block_mask import blocks_of
from paroattn.grid import Grid, Layout, TextSpan
from paroattn.integration import backend, models
from paroattn.integration.apply import apply, dense, recording, remove, report, set_noise_level
from paroattn.integration.backend import Layer
from paroattn.integration.hook import hook_of
from paroattn.integration.models import ModelSpec, latent_grid, register_model, self_attentions, spec_of
from paroattn.integration.processor import planned_processor
from paroattn.integration.schedule import noise_levels
from paroattn.phases import Phase
from paroattn.plan.card import model_card
from paroattn.plan.plan import LayerPlan, Plan, PlanError

contexts_know_the_step = pytest.mark.skipif(not hasattr(hooks, "CacheContext"), reason="needs diffusers 0.41")
real_sdpa = F.scaled_dot_product_attention
pytestmark = pytest.mark.usefixtures("one_thread")


def forward(model, **changed) -> torch.Tensor:
    with torch.no_grad():
        return model(**wan_inputs() | changed).sample


def levels_of(scheduler) -> list[float]:
    levels = noise_levels(scheduler)
    assert levels is not None
    return levels


def difference(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@functools.cache
def token_mask(layer: LayerPlan, phase, grid, text=0):
    """Who reads whom, (H, N, N) in the model's order with text behind, from positions computed one by one."""
    sizes = dict(zip("FHW", grid, strict=True))
    packed = np.unpackbits(layer.mask.bits[phase].numpy(), axis=-1, bitorder="little")
    tokens, (rows, columns) = grid.tokens + text, layer.mask.block
    mask = torch.zeros(len(layer.orders), tokens, tokens, dtype=torch.bool)
    for head, order in enumerate(layer.orders):
        slow, middle, fast = order
        place = []
        for f in range(grid.frames):
            for h in range(grid.height):
                for w in range(grid.width):
                    at = {"F": f, "H": h, "W": w}
                    place.append((at[slow] * sizes[middle] + at[middle]) * sizes[fast] + at[fast])
        place = np.array(place + list(range(grid.tokens, tokens)))
        kept = np.ones((blocks_of(tokens, rows), blocks_of(tokens, columns)), dtype=bool)
        video = (grid.tokens // rows, grid.tokens // columns) if text else kept.shape
        kept[: video[0], : video[1]] = packed[head, : video[0], : video[1]]
        mask[head] = torch.from_numpy(kept[place // rows][:, place // columns])
    return mask


@contextmanager
def sdpa_by(plan, phases, monkeypatch, text=0):
    """Mask stock models' self-attention with a plan, phase by phase of the given calls."""
    calls = iter([(layer, phase) for phase in phases for layer in plan.layers.values()])

    def masked(query, key, value, attn_mask=None, **rest):
        if key.shape[-2] != plan.grid.tokens + text:
            return real_sdpa(query, key, value, attn_mask=attn_mask, **rest)
        allowed = token_mask(*next(calls), plan.grid, text)
        allowed = allowed if attn_mask is None else allowed & attn_mask
        return real_sdpa(query, key, value, attn_mask=allowed, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", masked)
        yield
    assert next(calls, None) is None


@contextmanager
def sdpa_seen(monkeypatch):
    """Collect what stock SDPA gets from self-attention, as (B, N, H, D)."""
    seen = []

    def watched(query, key, value, **rest):
        if key.shape == query.shape:
            seen.append([x.transpose(1, 2) for x in (query, key, value)])
        return real_sdpa(query, key, value, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", watched)
        yield seen


@contextmanager
def op_calls(monkeypatch):
    """Collect the keyword arguments and masks that the op gets, or what heads in groups are told."""
    seen = []
    op, op_by_group = backend.attention, backend.attention_by_group

    def watched(q, k, v, mask, **rest):
        seen.append({"mask": mask, **rest})
        return op(q, k, v, mask, **rest)

    def watched_groups(q, k, v, groups, **rest):
        named = {head: group.precision for group in groups for head in group.heads.tolist()}
        seen.append({"precision": tuple(named[head] for head in range(q.shape[2])), **rest})
        return op_by_group(q, k, v, groups, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(backend, "attention", watched)
        patch.setattr(backend, "attention_by_group", watched_groups)
        yield seen


def state_of(model):
    """Everything on a model's modules that apply could leave behind."""
    return {
        name: {
            key: (list(value) if isinstance(value, dict) else id(value))
            for key, value in vars(module).items()
            if key != "_diffusers_hook"
        }
        for name, module in model.named_modules()
    }


class TestWhatIsComputed:
    def test_a_plan_that_keeps_all_blocks_equals_the_stock_model_in_any_order(self):
        model = tiny_wan()
        expected = forward(model)
        apply(model, random_plan(density=1))
        assert difference(forward(model), expected) < 1e-5
        assert report(model).transformers["transformer"]["layers"]["blocks.1.attn1"]["sparse_calls"] == 1

    @pytest.mark.parametrize("batch", [1, 2])
    def test_a_sparse_plan_equals_sdpa_with_its_token_mask(self, batch, monkeypatch):
        model, plan, inputs = tiny_wan(), random_plan(density=0.4), wan_inputs(batch)
        stock = forward(model, **inputs)
        with sdpa_by(plan, [0], monkeypatch):
            expected = forward(model, **inputs)
        apply(model, plan)
        found = forward(model, **inputs)
        assert difference(found, expected) < 1e-5
        assert difference(found, stock) > 1e-2

    def test_positional_arguments_and_tuples_work_as_before(self):
        model = tiny_wan()
        expected = forward(model)
        apply(model, random_plan(density=1))
        with torch.no_grad():
            found = model(*wan_inputs().values(), return_dict=False)[0]
        assert difference(found, expected) < 1e-5

    def test_cross_attention_is_never_touched(self):
        model = tiny_wan(image_dim=16, added_kv_proj_dim=128)
        text = torch.randn(1, 512 + 5, 16)
        changed = {"encoder_hidden_states": text[:, :512], "encoder_hidden_states_image": text[:, 512:]}
        before = [block.attn2.processor for block in model.blocks]
        expected = forward(model, **changed)
        apply(model, random_plan(density=1))
        assert [block.attn2.processor for block in model.blocks] == before
        assert all(type(processor) is WanAttnProcessor for processor in before)
        assert difference(forward(model, **changed), expected) < 1e-5

    @pytest.mark.parametrize(
        "named, expected",
        [(("fp32", "fp32"), "fp32"), (("fp32", "bf16"), ("fp32", "bf16"))],
    )
    def test_precision_is_one_name_if_heads_agree_and_else_one_per_head(self, named, expected, monkeypatch):
        plan = random_plan(phases=TWO_PHASES)
        layers = {n: LayerPlan(p.orders, p.mask, (("fp32",) * 2, named)) for n, p in plan.layers.items()}
        model = tiny_wan()
        apply(model, replace(plan, layers=layers))
        set_noise_level(model, 0.1)
        with op_calls(monkeypatch) as seen:
            forward(model)
        assert [call["precision"] for call in seen] == [expected] * 2
        remove(model)
        apply(model, plan, precision="fp32", impl="reference")
        set_noise_level(model, 0.1)
        with op_calls(monkeypatch) as seen:
            forward(model)
        assert [(str(call["precision"]), call["impl"]) for call in seen] == [("fp32", "reference")] * 2

    def test_masks_and_tables_are_made_once_and_the_table_is_shared(self, monkeypatch):
        model = tiny_wan()
        apply(model, random_plan())
        with op_calls(monkeypatch) as seen:
            forward(model)
            forward(model)
        assert len({id(call["table"]) for call in seen}) == 1
        assert [id(call["mask"]) for call in seen[:2]] == [id(call["mask"]) for call in seen[2:]]
        orders = {order for layer in random_plan().layers.values() for order in layer.orders}
        assert seen[0]["table"].shape == (len(orders), GRID.tokens)

    def test_inputs_that_move_on_their_way_find_the_operands_where_they_are(self):
        model = tiny_wan()
        apply(model, random_plan())
        hook: Any = hook_of(model)
        expected, layer = forward(model), next(iter(hook.layers.values()))
        there, elsewhere = layer.operands, layer.follow(0, Layout(GRID), torch.device("meta"))
        assert [x.device.type for x in (elsewhere.mask.bits, elsewhere.table, elsewhere.order)] == ["meta"] * 3
        assert layer.operands_on(torch.device("cpu")) is there
        assert layer.operands is there
        assert torch.equal(forward(model), expected)

    def test_grad_is_refused_and_the_model_works_afterwards(self):
        model = tiny_wan()
        apply(model, random_plan(density=1))
        model.requires_grad_(True)
        with pytest.raises((ValueError, RuntimeError), match="grad"):
            model(**wan_inputs())
        assert all(layer.processor._parallel_config is None for layer in self_attentions(model).values())
        model.requires_grad_(False)
        forward(model)
        remove(model)
        model.requires_grad_(True)
        model(**wan_inputs()).sample.sum().backward()


class TestSteps:
    @pytest.mark.parametrize("steps", [4, 9])
    @pytest.mark.parametrize(
        "call",
        [{}, {"named": False}, {"batched": True}, pytest.param({"informed": True}, marks=contexts_know_the_step)],
        ids=str,
    )
    def test_every_step_uses_the_mask_of_its_phase(self, steps, call, monkeypatch):
        pipe, plan = tiny_pipeline(), random_plan(phases=TWO_PHASES, density=0.4)
        pipe.scheduler.set_timesteps(steps)
        phases = [0 if sigma >= 0.6 else 1 for sigma in pipe.scheduler.sigmas[:-1].tolist()]
        assert 0 < sum(phases) < steps
        with sdpa_by(plan, [p for p in phases for _ in range(1 if call.get("batched") else 2)], monkeypatch):
            expected = pipe(steps, **call).frames
        apply(pipe, whole(plan))
        for _ in range(2):
            assert difference(pipe(steps, **call).frames, expected) < 1e-5
        rows = report(pipe).to_dict()["transformer"]["layers"]["blocks.0.attn1"]["phases"]
        per_step = 2 * (1 if call.get("batched") else 2)
        assert [row["sparse_calls"] for row in rows] == [per_step * phases.count(0), per_step * phases.count(1)]

    def test_only_the_masks_of_the_running_phase_are_kept_where_the_model_runs(self):
        pipe = tiny_pipeline()
        apply(pipe, whole(random_plan(phases=TWO_PHASES, density=0.4)))
        hook: Any = hook_of(pipe.transformer)
        layer, seen = hook.layers["blocks.0.attn1"], []
        follow = layer.follow
        layer.follow = lambda phase, *rest: (
            follow(phase, *rest),
            seen.append((phase, [mask._phase for known in layer._known.values() for mask in known._masks])),
        )
        pipe(6)
        assert {phase for phase, _ in seen} == {0, 1}
        assert all(kept == [phase] for phase, kept in seen)

    def test_every_phase_has_its_own_precision(self, monkeypatch):
        model, plan = tiny_wan(), random_plan(phases=TWO_PHASES)
        precision = (("fp32",) * plan.heads, ("int8", *("fp32",) * (plan.heads - 1)))
        layers = {name: replace(layer, precision=precision) for name, layer in plan.layers.items()}
        apply(model, replace(plan, layers=layers))
        with op_calls(monkeypatch) as seen:
            for level in (0.9, 0.1, 0.9):
                set_noise_level(model, level)
                forward(model)
        expected = [precision[0], precision[1], precision[0]]
        assert [call["precision"] for call in seen] == [each for each in expected for _ in plan.layers]

    @pytest.mark.parametrize("resets", [True, False])
    def test_counting_follows_the_branch_that_came_first_where_nothing_else_tells(self, resets, monkeypatch):
        pipe = tiny_pipeline(scheduler=CogVideoXDDIMScheduler())
        if not resets:
            monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: None)
        assert not hasattr(pipe.scheduler, "step_index")
        levels = []
        with recording(pipe, lambda *seen: levels.append(seen[5])):
            for steps in (3, 5):
                pipe(steps)
                assert levels == [level for level in levels_of(pipe.scheduler) for _ in range(4)]
                levels.clear()

    @pytest.mark.parametrize(
        "scheduler",
        [
            FlowMatchEulerDiscreteScheduler(shift=5.0),
            FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
            UniPCMultistepScheduler(),
            DPMSolverMultistepScheduler(),
            DDIMScheduler(),
            CogVideoXDDIMScheduler(),
        ],
        ids=lambda scheduler: f"{type(scheduler).__name__}{scheduler.config.get('use_flow_sigmas', '')}",
    )
    def test_noise_levels_are_what_the_scheduler_adds(self, scheduler):
        assert noise_levels(scheduler) is None
        scheduler.set_timesteps(6)
        levels = levels_of(scheduler)
        clean, noise = torch.zeros(6, 1), torch.ones(6, 1)
        if hasattr(scheduler, "add_noise"):
            expected = scheduler.add_noise(clean, noise, scheduler.timesteps).flatten()
        elif scheduler.config.invert_sigmas:
            expected = 1 - scheduler.sigmas[:6]
        else:
            expected = scheduler.scale_noise(clean, scheduler.timesteps, noise).flatten()
        assert levels == pytest.approx(expected.tolist(), abs=1e-5)
        assert len(levels) == 6 and levels == sorted(levels, reverse=True)

    @contexts_know_the_step
    def test_a_run_that_starts_midway_takes_its_levels_from_there(self):
        model = tiny_wan()
        pipe: Any = TinyPipeline(model, FlowMatchEulerDiscreteScheduler())
        levels = []
        with recording(pipe, lambda *seen: levels.append(seen[5])):
            pipe.scheduler.set_timesteps(8)
            pipe.scheduler.set_begin_index(5)
            forward(model)
            with model.cache_context("cond", step_index=1):
                forward(model)
        sigmas = pipe.scheduler.sigmas.tolist()
        assert levels == pytest.approx([sigmas[5]] * 2 + [sigmas[6]] * 2)

    def test_the_schedulers_table_is_read_once_per_run(self, monkeypatch):
        pipe = tiny_pipeline()
        apply(pipe, whole(random_plan(phases=TWO_PHASES)))
        reads = []
        from paroattn.integration import schedule

        monkeypatch.setattr(schedule, "noise_levels", lambda scheduler: reads.append(1) or noise_levels(scheduler))
        pipe(5)
        pipe(5)
        assert len(reads) == 2

    def test_another_scheduler_after_apply_is_followed(self):
        pipe = tiny_pipeline()
        apply(pipe, whole(random_plan(phases=(Phase(0.3, 0.5), Phase(0.0, 0.5)))))
        pipe.scheduler = flat = FlowMatchEulerDiscreteScheduler(shift=0.2)
        pipe(4)
        flat.set_timesteps(4)
        high = sum(level >= 0.3 for level in levels_of(flat))
        rows = report(pipe).to_dict()["transformer"]["layers"]["blocks.0.attn1"]["phases"]
        assert [row["sparse_calls"] for row in rows] == [2 * high, 2 * (4 - high)] and 0 < high < 4

    def test_without_a_scheduler_several_phases_need_a_noise_level(self, monkeypatch):
        model, plan = tiny_wan(), random_plan(phases=TWO_PHASES)
        apply(model, plan)
        with pytest.raises(PlanError, match=r"2 phases; the noise level of this call is not known.*set_noise_level"):
            forward(model)
        with op_calls(monkeypatch) as seen:
            for level in (1.0, 0.6, 0.59, 0.0):
                set_noise_level(model, level)
                forward(model)
        densities = [plan.layers["blocks.0.attn1"].mask[phase].dense() for phase in (0, 0, 1, 1)]
        assert [torch.equal(call["mask"].dense(), kept) for call, kept in zip(seen[::2], densities, strict=True)] == [
            True
        ] * 4
        set_noise_level(model, None)
        with pytest.raises(PlanError, match="noise level"):
            forward(model)
        with pytest.raises(ValueError, match=r"within 0…1; got 500"):
            set_noise_level(model, 500)

    def test_a_scheduler_that_is_not_set_up_or_has_run_out_gives_no_level(self):
        pipe = tiny_pipeline()
        apply(pipe, whole(random_plan(phases=TWO_PHASES)))
        with pytest.raises(PlanError, match="noise level"):
            forward(pipe.transformer)
        pipe(3)
        with pytest.raises(PlanError, match="noise level"):
            forward(pipe.transformer)

    def test_two_transformers_take_turns_each_with_its_own_plan(self, monkeypatch):
        pipe = tiny_pipeline(two=True)
        plans = [random_plan(seed=seed, phases=TWO_PHASES) for seed in (1, 2)]
        pipe.scheduler.set_timesteps(6)
        high = sum(t >= 600 for t in pipe.scheduler.timesteps.tolist())
        assert 0 < high < 6
        apply(pipe, Plan({"transformer": plans[0], "transformer_2": plans[1]}))
        with op_calls(monkeypatch) as seen:
            pipe(6)
        for call, plan in zip(seen[:: len(seen) - 1], plans, strict=True):
            layer = plan.layers["blocks.0.attn1" if plan is plans[0] else "blocks.1.attn1"]
            assert torch.equal(call["mask"].bits, layer.mask.bits[plans.index(plan)])
        parts = report(pipe).to_dict()
        assert [sum(part["calls"].values()) for part in parts.values()] == [2 * high, 2 * (6 - high)]


class TestOnAndOff:
    def test_remove_restores_the_model_to_the_bit(self):
        pipe = tiny_pipeline()
        model = pipe.transformer
        processors, keys, expected = dict(model.attn_processors), list(model.state_dict()), forward(model)
        before = state_of(model)
        apply(pipe, whole(random_plan()))
        assert list(model.state_dict()) == keys
        assert not torch.equal(forward(model), expected)
        remove(pipe)
        assert state_of(model) == before
        assert all(model.attn_processors[name] is processor for name, processor in processors.items())
        assert torch.equal(forward(model), expected)

    def test_apply_after_remove_works_again(self):
        model = tiny_wan()
        apply(model, random_plan())
        expected = forward(model)
        remove(model)
        apply(model, random_plan())
        assert torch.equal(forward(model), expected)

    def test_saving_an_applied_model_writes_no_plan(self, tmp_path):
        model = tiny_wan()
        expected = forward(model)
        apply(model, random_plan())
        model.save_pretrained(tmp_path)
        again = WanTransformer3DModel.from_pretrained(tmp_path)
        assert list(again.state_dict()) == list(tiny_wan().state_dict())
        assert all(type(processor) is WanAttnProcessor for processor in again.attn_processors.values())
        assert torch.equal(forward(again.eval()), expected)

    def test_a_deep_copy_follows_the_plan_with_its_own_weights(self):
        model = tiny_wan()
        stock = forward(model)
        apply(model, random_plan())
        twin = copy.deepcopy(model)
        assert torch.equal(forward(twin), forward(model))
        assert list(twin.state_dict()) == list(tiny_wan().state_dict())
        for parameter in twin.parameters():
            parameter.data.mul_(0.5)
        assert not torch.equal(forward(twin), forward(model))
        remove(twin)
        assert all(type(processor) is WanAttnProcessor for processor in twin.attn_processors.values())
        assert report(model).to_dict()["transformer"]["density"] < 1
        remove(model)
        assert torch.equal(forward(model), stock)

    def test_a_copied_pipeline_follows_its_own_scheduler(self):
        pipe = tiny_pipeline()
        apply(pipe, whole(random_plan(phases=TWO_PHASES)))
        twin = copy.deepcopy(pipe)
        expected = pipe(4).frames
        pipe.scheduler.set_timesteps(50)
        assert torch.equal(twin(4).frames, expected)
        alone = copy.deepcopy(pipe.transformer)
        with pytest.raises(PlanError, match="noise level"):
            forward(alone)

    def test_model_offload_that_restores_forward_between_runs_does_not_lose_the_plan(self):
        accelerate = pytest.importorskip("accelerate")
        pipe = tiny_pipeline()
        stock = forward(pipe.transformer)
        _, offload = accelerate.cpu_offload_with_hook(pipe.transformer, "cpu")
        apply(pipe, whole(random_plan()))
        expected = pipe(2).frames
        offload.remove()
        accelerate.cpu_offload_with_hook(pipe.transformer, "cpu")
        assert torch.equal(pipe(2).frames, expected)
        assert report(pipe).to_dict()["transformer"]["layers"]["blocks.0.attn1"]["sparse_calls"] == 8
        remove(pipe)
        assert hasattr(pipe.transformer, "_hf_hook")
        assert torch.equal(forward(pipe.transformer), stock)

    def test_a_cache_of_diffusers_on_top_still_sees_its_context(self):
        pipe = tiny_pipeline()
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
        expected = pipe(3).frames
        apply(pipe, whole(random_plan(density=1, phases=TWO_PHASES)))
        assert difference(pipe(3).frames, expected) < 1e-5
        remove(pipe)
        assert torch.equal(pipe(3).frames, expected)

    def test_dense_is_stock_nests_and_survives_exceptions(self):
        model = tiny_wan()
        stock = forward(model)
        apply(model, random_plan())
        sparse = forward(model)
        with dense(model):
            assert torch.equal(forward(model), stock)
            with dense(model):
                assert torch.equal(forward(model), stock)
            assert torch.equal(forward(model), stock)
        with pytest.raises(KeyError), dense(model):
            raise KeyError
        assert torch.equal(forward(model), sparse)
        row = report(model).to_dict()["transformer"]["layers"]["blocks.0.attn1"]
        assert row["dense_calls"] == {"inside paroattn.dense": 3} and row["sparse_calls"] == 2

    def test_the_users_attention_backend_runs_dense_calls_and_outlives_remove(self, monkeypatch):
        model = tiny_wan()
        apply(model, random_plan())
        used = []
        original = backend.dispatch_attention_fn

        def watched(*args, backend, **rest):
            used.append(backend)
            return original(*args, backend=backend, **rest)

        monkeypatch.setattr(backend, "dispatch_attention_fn", watched)
        try:
            model.set_attention_backend("_native_math")
            sparse = forward(model)
            assert used == []
            with dense(model):
                forward(model)
            assert used == [AttentionBackendName._NATIVE_MATH] * 2
            remove(model)
            assert {p._attention_backend for p in model.attn_processors.values()} == {AttentionBackendName._NATIVE_MATH}
            apply(model, random_plan())
            assert difference(forward(model), sparse) < 1e-5
            model.reset_attention_backend()
            remove(model)
            assert {p._attention_backend for p in model.attn_processors.values()} == {None}
        finally:
            backend.attention_dispatch._AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)

    def test_the_backend_without_a_plan_is_native_attention(self):
        q, k, v = torch.randn(3, 2, 10, 2, 64).unbind()
        member = backend.paro_backend()
        assert member is backend.paro_backend() and AttentionBackendName("paro") is member
        expected = dispatch_attention_fn(q, k, v, backend=AttentionBackendName.NATIVE)
        assert torch.equal(dispatch_attention_fn(q, k, v, backend=AttentionBackendName("paro")), expected)
        with attention_backend("paro"):
            assert torch.equal(dispatch_attention_fn(q, k, v), expected)
            model = tiny_wan()
            stock = forward(model)
            apply(model, random_plan())
            with dense(model):
                assert torch.equal(forward(model), stock)

    def test_two_models_in_two_threads_do_not_mix(self):
        found, expected = {}, {}

        def work(seed, start):
            model = tiny_wan(seed)
            apply(model, random_plan(seed=seed, density=0.3))
            expected[seed] = forward(model)
            start.wait()
            found[seed] = [forward(model) for _ in range(5)]

        start = threading.Barrier(2)
        threads = [threading.Thread(target=work, args=(seed, start)) for seed in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for seed in (0, 1):
            assert all(torch.equal(each, expected[seed]) for each in found[seed])
        assert not torch.equal(expected[0], expected[1])


def test_diffusers_can_skip_a_planned_layer_where_it_can_skip_the_original():
    attn = SimpleNamespace(processor=FluxAttnProcessor())
    planned = planned_processor(Layer("layer", attn, owner=None))  # pyright: ignore[reportArgumentType]
    registry = _helpers.AttentionProcessorRegistry
    assert registry.get(type(planned)) is registry.get(FluxAttnProcessor)


class TestWrongUse:
    @pytest.mark.parametrize(
        "plan, error, match",
        [
            (random_plan(model_class="Other"), PlanError, "made for Other; this model is WanTransformer3DModel"),
            (random_plan(heads=3), PlanError, "3 heads of dimension 64, the model 2 of 64"),
            (random_plan(head_dim=32), PlanError, "2 heads of dimension 32, the model 2 of 64"),
            (random_plan(["blocks.0.attn1"]), PlanError, "differ at blocks.1.attn1"),
            (random_plan([f"blocks.{i}.attn1" for i in range(3)]), PlanError, "differ at blocks.2.attn1"),
            ("plan/", TypeError, "TransformerPlan.*got str"),
            (whole(random_plan()), TypeError, r'TransformerPlan, such as plan\["transformer"\], is needed.*got Plan'),
        ],
    )
    def test_a_plan_that_does_not_fit_changes_nothing(self, plan, error, match):
        model = tiny_wan()
        before = state_of(model)
        with pytest.raises(error, match=match):
            apply(model, plan)
        assert state_of(model) == before

    def test_a_second_transformer_that_does_not_fit_leaves_the_first_alone(self):
        pipe = tiny_pipeline(two=True)
        before = [state_of(pipe.transformer), state_of(pipe.transformer_2)]
        with pytest.raises(PlanError, match="3 heads"):
            apply(pipe, Plan({"transformer": random_plan(), "transformer_2": random_plan(heads=3)}))
        with pytest.raises(PlanError, match="the pipeline has transformer, transformer_2; the plan has transformer"):
            apply(pipe, whole(random_plan()))
        with pytest.raises(PlanError, match="the plan has transformer_2"):
            apply(tiny_pipeline(), Plan({"transformer_2": random_plan()}))
        with pytest.raises(TypeError, match="a Plan is needed for transformer, transformer_2; got TransformerPlan"):
            apply(pipe, random_plan())
        assert [state_of(pipe.transformer), state_of(pipe.transformer_2)] == before
        apply(pipe, whole(random_plan()), strict=False)
        assert list(report(pipe).transformers) == ["transformer"]

    def test_an_unknown_model_is_named_with_the_known_ones(self):
        with pytest.raises(ValueError, match=r"one of .*WanTransformer3DModel.*; got Linear\. .*register_model"):
            apply(torch.nn.Linear(2, 2), random_plan())
        with pytest.raises(TypeError, match=r"a pipeline with a transformer.*got int"):
            apply(3, whole(random_plan()))

    @pytest.mark.parametrize("setting", [{"precision": "int3"}, {"impl": "fastest"}], ids=str)
    def test_a_bad_setting_changes_nothing(self, setting):
        model = tiny_wan()
        before = state_of(model)
        with pytest.raises(ValueError, match=f"must be .*; got '{next(iter(setting.values()))}'"):
            apply(model, random_plan(), **setting)
        assert state_of(model) == before

    def test_what_the_op_refuses_reaches_the_user_and_leaves_the_model_removable(self):
        model = tiny_wan()
        stock = forward(model)
        apply(model, random_plan(), precision="fp64")
        with pytest.raises(ValueError, match=r"float64 tensors for precision fp64; got fp64 on torch\.float32"):
            forward(model)
        remove(model)
        assert torch.equal(forward(model), stock)

    def test_applying_twice_and_removing_twice_say_what_to_do(self):
        model = tiny_wan()
        for use in (remove, report, lambda m: dense(m).__enter__(), lambda m: set_noise_level(m, 0.5)):
            with pytest.raises(ValueError, match=r"carries none\. Call paroattn\.apply first"):
                use(model)
        apply(model, random_plan())
        with pytest.raises(ValueError, match=r"has a plan applied\. Call paroattn\.remove first"):
            apply(model, random_plan())
        with pytest.raises(ValueError, match=r"has a plan applied\. Call paroattn\.remove first"):
            recording(model, print).__enter__()
        remove(model)
        with pytest.raises(ValueError, match="carries none"):
            remove(model)

    def test_another_grid_raises_before_the_first_block(self):
        model = tiny_wan()
        apply(model, random_plan())
        ran = []
        model.patch_embedding.register_forward_pre_hook(lambda *_: ran.append(1))
        message = r"grid 5x7x6 \(frames.*; this call has 5x6x7\. Calibrate at this resolution, or .* strict=False"
        with pytest.raises(PlanError, match=message):
            forward(model, **wan_inputs(latents=(4, 5, 12, 14)))
        assert ran == []
        forward(model)

    def test_another_grid_runs_dense_with_one_warning_if_not_strict(self):
        model = tiny_wan()
        other = wan_inputs(latents=(4, 5, 12, 14))
        expected = forward(model, **other)
        apply(model, random_plan(), strict=False)
        with pytest.warns(UserWarning, match=r"5x6x7\. Such calls run dense") as caught:
            assert torch.equal(forward(model, **other), expected)
            assert torch.equal(forward(model, **other), expected)
        assert len(caught) == 1
        forward(model)
        part = report(model).to_dict()["transformer"]
        row = part["layers"]["blocks.0.attn1"]
        assert sum(row["dense_calls"].values()) == 2 and row["sparse_calls"] == 1
        assert row["density"] == pytest.approx((2 + row["phases"][0]["density"]) / 3)
        assert part["grids_seen"] == {"5x6x7": 2, "5x7x6": 1}
        assert next(iter(row["dense_calls"])) in str(report(model))

    def test_a_layer_called_outside_its_transformer_is_noticed(self):
        model = tiny_wan()
        apply(model, random_plan())
        hidden = torch.randn(1, GRID.tokens, 128)
        forward(model)
        with pytest.raises(PlanError, match=r"outside its transformer. blocks\.0\.attn1 cannot follow a plan"):
            model.blocks[0].attn1(hidden)
        left_over = model.blocks[0].attn1.processor
        remove(model)
        model.blocks[0].attn1.processor = left_over
        with pytest.warns(UserWarning, match="outside its transformer"):
            left = model.blocks[0].attn1(hidden)
        model.blocks[0].attn1.processor = left_over._paro_layer.original
        assert torch.equal(left, model.blocks[0].attn1(hidden))

    def test_an_attention_mask_is_not_ignored(self, monkeypatch):
        model = tiny_wan()
        apply(model, random_plan())
        hidden, mask = torch.randn(1, GRID.tokens, 128), torch.ones(1, 1, 1, GRID.tokens, dtype=torch.bool)
        first = model.blocks[0].attn1
        model.blocks[0].forward = lambda *_: first(hidden, None, mask)
        with pytest.raises(PlanError, match="the attention mask is not one of padded text"):
            forward(model)
        model.blocks[0].forward = lambda *_: first(hidden[:, 1:])
        with pytest.raises(PlanError, match="grid and text make 210 tokens; got 209 queries and 209 keys"):
            forward(model)

    def test_processors_that_someone_replaced_are_noticed_once_and_reported(self):
        model = tiny_wan()
        apply(model, random_plan())
        mine = WanAttnProcessor()
        model.blocks[1].attn1.set_processor(mine)
        with pytest.warns(UserWarning, match=r"1 planned layers \(blocks\.1\.attn1") as caught:
            forward(model)
            forward(model)
        assert len(caught) == 1
        assert report(model).to_dict()["transformer"]["replaced_layers"] == ["blocks.1.attn1"]
        assert "replaced by someone else: blocks.1.attn1" in str(report(model))
        remove(model)
        assert model.blocks[1].attn1.processor is mine

    def test_fused_projections_keep_the_plan(self):
        model = tiny_wan()
        apply(model, random_plan())
        expected = forward(model)
        model.fuse_qkv_projections()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert difference(forward(model), expected) < 1e-5


class TestReport:
    def test_densities_are_those_executed_weighted_by_calls(self):
        pipe, plan = tiny_pipeline(), random_plan(phases=TWO_PHASES, density=0.4)
        apply(pipe, whole(plan))
        pipe(4)
        with dense(pipe):
            pipe(1)
        found = report(pipe).to_dict()["transformer"]
        pipe.scheduler.set_timesteps(4)
        high = 2 * sum(sigma >= 0.6 for sigma in pipe.scheduler.sigmas[:-1].tolist())
        calls, total = [high, 8 - high], 0.0
        for name, layer in plan.layers.items():
            kept = [float(layer.mask[phase].dense().double().mean()) for phase in (0, 1)]
            row = found["layers"][name]
            assert [phase["density"] for phase in row["phases"]] == pytest.approx(kept)
            assert [phase["sparse_calls"] for phase in row["phases"]] == calls
            executed = (kept[0] * calls[0] + kept[1] * calls[1]) / 8
            assert row["density"] == pytest.approx(executed)
            assert row["phases"][0]["precision"] == "fp32"
            total += executed / 2
        assert found["density"] == pytest.approx(total)
        assert found["calls"] == {"sparse": 8, "inside paroattn.dense": 2}
        assert json.loads(json.dumps(report(pipe).to_dict())) == report(pipe).to_dict()
        assert f"executed density {total:.3f}" in str(report(pipe))

    @pytest.mark.parametrize(
        ("setting", "expected"),
        [({}, "cpu"), ({"precision": "int8"}, "reference"), ({"impl": "reference"}, "reference")],
    )
    def test_what_ran_is_said_for_every_phase_that_ran(self, setting, expected):
        model = tiny_wan()
        apply(model, random_plan(phases=TWO_PHASES), **setting)
        set_noise_level(model, 0.1)
        for _ in range(2):
            forward(model)
        for row in report(model).to_dict()["transformer"]["layers"].values():
            assert [phase["impl"] for phase in row["phases"]] == [None, expected]
        assert f"fp32, {expected})" in str(report(model)) or f"int8, {expected})" in str(report(model))

    def test_heads_of_different_precision_may_run_differently(self):
        model, plan = tiny_wan(), random_plan()
        layers = {n: replace(p, precision=(("fp32", "int8"),)) for n, p in plan.layers.items()}
        apply(model, replace(plan, layers=layers))
        forward(model)
        found = report(model).to_dict()["transformer"]["layers"]
        assert [row["phases"][0]["impl"] for row in found.values()] == ["cpu + reference"] * 2

    def test_the_share_of_the_heads_in_each_precision_is_that_of_what_is_applied(self):
        model, plan = tiny_wan(heads=4), random_plan(heads=4, phases=TWO_PHASES)
        each = (("int8", "int8", "int4", "int8"), ("int8", "int4", "int4", "int4"))
        first, *others = plan.layers
        layers = {first: replace(plan.layers[first], precision=each)}
        layers |= {name: replace(plan.layers[name], precision=(("int8",) * 4,) * 2) for name in others}
        plan = replace(plan, layers=layers)
        share = sum(phase.share * heads.count("int4") / 4 for phase, heads in zip(TWO_PHASES, each, strict=True))
        share /= len(layers)
        assert plan.precision_shares() == pytest.approx({"int8": 1 - share, "int4": share})
        assert f"| precision | int8 ({1 - share:.0%}), int4 ({share:.0%}) |" in model_card(Plan({"transformer": plan}))
        apply(model, plan)
        found = report(model)
        assert found.to_dict()["transformer"]["precision"] == pytest.approx({"int8": 1 - share, "int4": share})
        assert f"precision of the heads: int8 {1 - share:.0%}, int4 {share:.0%}" in str(found)
        remove(model)
        apply(model, plan, precision="bf16")
        assert report(model).to_dict()["transformer"]["precision"] == {"bf16": 1.0}

    def test_before_the_first_call_nothing_is_claimed(self):
        model = tiny_wan()
        apply(model, random_plan())
        assert report(model).to_dict()["transformer"]["density"] is None
        assert "calls by grid: none" in str(report(model))


class TestRecording:
    def test_the_observer_sees_what_stock_attention_gets(self, monkeypatch):
        pipe, seen = tiny_pipeline(), []
        with sdpa_seen(monkeypatch) as stock:
            expected = pipe(2).frames
        before = state_of(pipe.transformer)
        with recording(pipe, lambda *args: seen.append(args)):
            found = pipe(2).frames
        assert torch.equal(found, expected) and state_of(pipe.transformer) == before
        assert len(seen) == len(stock) == 8
        for (*_, grid, text, model), (layer, attn, q, k, v, *_), tensors in zip(seen, seen, stock, strict=True):
            assert all(torch.equal(a, b) for a, b in zip((q, k, v), tensors, strict=True))
            assert (grid, text, model) == (GRID, TextSpan(), pipe.transformer)
            assert attn is pipe.transformer.get_submodule(layer)
        pipe.scheduler.set_timesteps(2)
        high, low = levels_of(pipe.scheduler)
        rows = [(layer, level, branch) for layer, *_, level, branch, _, _, _ in seen]
        layers = ("blocks.0.attn1", "blocks.1.attn1")
        assert rows == [(n, s, b) for s in (high, low) for b in ("cond", "uncond") for n in layers]

    def test_only_one_transformer_may_be_watched(self):
        pipe, seen = tiny_pipeline(two=True), []
        with recording(pipe, lambda *args: seen.append(args[-1]), transformer=pipe.transformer_2):
            pipe(4)
        assert seen and all(model is pipe.transformer_2 for model in seen)
        with pytest.raises(ValueError, match="transformer or transformer_2; got another"):
            recording(pipe, print, transformer=tiny_wan()).__enter__()

    def test_an_exception_restores_the_model(self):
        model = tiny_wan()
        before = state_of(model)

        def fail(*_):
            raise KeyError("observer")

        with pytest.raises(KeyError, match="observer"), recording(model, fail):
            forward(model)
        assert state_of(model) == before

    def test_levels_can_be_given_and_plans_wait(self):
        model, levels = tiny_wan(), []
        with recording(model, lambda *args: levels.append(args[5])):
            forward(model)
            set_noise_level(model, 0.25)
            forward(model)
            with pytest.raises(ValueError, match="is being recorded"):
                apply(model, random_plan())
            with pytest.raises(ValueError, match="carries none"):
                report(model)
        assert levels == [None, None, 0.25, 0.25]


@pytest.fixture
def table_of_models(monkeypatch):
    monkeypatch.setattr(models, "MODELS", dict(models.MODELS))


def tiny_hunyuan():
    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=64, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(16, 24, 24), guidance_embeds=False,
    )  # fmt: skip
    return randomised(model)


def hunyuan_spec():
    def grid(model: Any, arguments):
        frames, height, width = arguments["hidden_states"].shape[2:]
        patch = model.config.patch_size
        return Grid(frames // model.config.patch_size_t, height // patch, width // patch)

    return ModelSpec(
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        grid=grid,
        text=lambda model, arguments: TextSpan(arguments["encoder_hidden_states"].shape[1], "suffix"),
    )


def hunyuan_inputs(text=21, real=(13, 21)):
    mask = torch.arange(text) < torch.tensor(real)[:, None]
    return wan_inputs(batch=2) | {
        "encoder_hidden_states": torch.randn(2, text, 16), "encoder_attention_mask": mask.int(),
        "pooled_projections": torch.randn(2, 8),
    }  # fmt: skip


class TestOtherModels:
    layers = ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn")

    @pytest.mark.parametrize("density", [1, 0.4])
    def test_one_row_adds_a_model_with_padded_text_in_its_sequence(self, density, table_of_models, monkeypatch):
        register_model("HunyuanVideoTransformer3DModel", hunyuan_spec())
        model, text, inputs = tiny_hunyuan(), 21, hunyuan_inputs()
        plan = random_plan(
            self.layers, model_class="HunyuanVideoTransformer3DModel", density=density, text=TextSpan(7, "suffix")
        )
        with sdpa_by(plan, [0], monkeypatch, text):
            expected = forward(model, **inputs)
        apply(model, plan)
        assert difference(forward(model, **inputs), expected) < 1e-5
        row = report(model).to_dict()["transformer"]["layers"][self.layers[0]]
        video = plan.layers[self.layers[0]].mask.density
        assert row["density"] == 1 if density == 1 else video < row["density"] < 1

    def test_text_on_the_other_side_is_refused(self, table_of_models):
        register_model("HunyuanVideoTransformer3DModel", hunyuan_spec())
        model = tiny_hunyuan()
        apply(model, random_plan(self.layers, model_class=type(model).__name__, text=TextSpan(7, "prefix")))
        extra = {"encoder_hidden_states": torch.randn(1, 9, 16), "pooled_projections": torch.randn(1, 8)}
        with pytest.raises(PlanError, match="text as prefix; this call has it as suffix"):
            forward(model, **extra, encoder_attention_mask=torch.ones(1, 9))

    def test_a_processor_that_skips_the_dispatcher_needs_an_adapter(self, table_of_models):
        spec = ModelSpec(("transformer_blocks.*.attn1",), lambda model, arguments: GRID)
        register_model("CogVideoXTransformer3DModel", spec)
        model = CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, time_embed_dim=2,
            text_embed_dim=8, num_layers=1, sample_width=16, sample_height=16, sample_frames=9,
        )  # fmt: skip
        before = state_of(model)
        with pytest.raises(ValueError, match=r"got CogVideoXAttnProcessor2_0, which.*adapter"):
            apply(model, random_plan(["transformer_blocks.0.attn1"], model_class=type(model).__name__))
        assert state_of(model) == before

    def test_an_adapter_makes_the_processor(self, table_of_models):
        adapted = []

        def adapter(original):
            adapted.append(original)
            return WanAttnProcessor()

        register_model("WanTransformer3DModel", ModelSpec(("blocks.*.attn1",), latent_grid, adapter=adapter))
        model = tiny_wan()
        originals = [block.attn1.processor for block in model.blocks]
        expected = forward(model)
        apply(model, random_plan(density=1))
        assert adapted == originals
        assert difference(forward(model), expected) < 1e-5
        remove(model)
        assert [block.attn1.processor for block in model.blocks] == originals

    def test_globs_name_one_part_of_a_path_each(self, table_of_models):
        model = tiny_wan()
        assert list(self_attentions(model)) == ["blocks.0.attn1", "blocks.1.attn1"]
        register_model("WanTransformer3DModel", ModelSpec(("*.attn1",), latent_grid))
        with pytest.raises(ValueError, match=r"must have modules at \*\.attn1; got none"):
            self_attentions(model)
        assert spec_of(model).layers == ("*.attn1",)

    def test_a_grid_that_the_call_does_not_tell_is_an_error_or_dense(self, table_of_models):
        register_model("WanTransformer3DModel", ModelSpec(("blocks.*.attn1",), lambda model, arguments: None))
        model = tiny_wan()
        expected = forward(model)
        apply(model, random_plan())
        with pytest.raises(PlanError, match="this call has None"):
            forward(model)
        remove(model)
        apply(model, random_plan(), strict=False)
        with pytest.warns(UserWarning, match="run dense"):
            assert torch.equal(forward(model), expected)
        remove(model)
        with pytest.raises(PlanError, match="must tell the grid"), recording(model, print):
            forward(model)


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")  # Triton's interpreter's
class TestCompilation:
    @pytest.fixture(autouse=True)
    def fresh_compiler(self):
        torch.compiler.reset()
        counters.clear()
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize(
        ("impl", "precision", "block"),
        [("auto", None, BLOCK), ("reference", "int8", BLOCK), ("triton", "int8", (64, 64))],
    )
    def test_all_layers_and_phases_share_one_graph_and_dense_calls_another(self, impl, precision, block):
        names, grid = tuple(f"blocks.{index}.attn1" for index in range(2)), Grid(2, 7, 6)
        plan, inputs = random_plan(names, phases=TWO_PHASES, block=block, grid=grid), wan_inputs(latents=(4, 2, 14, 12))
        plain, compiled = tiny_wan(), tiny_wan()
        for model in (plain, compiled):
            apply(model, plan, impl=impl, precision=precision)
        compiled.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for level in (0.1, 0.9):
                for model in (plain, compiled):
                    set_noise_level(model, level)
                expected = forward(plain, **inputs)
                assert difference(forward(compiled, **inputs), expected) < 1e-5
        assert counters["stats"]["unique_graphs"] == 1
        hook: Any = hook_of(compiled)
        for layer in hook.layers.values():  # compiled code would not have kept it
            assert (layer.operands.mask._launch_order is not None) == (impl == "triton")
        with dense(compiled), dense(plain):
            assert difference(forward(compiled, **inputs), forward(plain, **inputs)) < 1e-5
        assert counters["stats"]["unique_graphs"] == 2
        assert difference(forward(compiled, **inputs), expected) < 1e-5
        assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (2, {})

    @pytest.mark.parametrize(("impl", "names", "block"), [("reference", ("int4", "int8"), BLOCK),
                                                          ("triton", ("int8", "fp16"), (64, 64))])  # fmt: skip
    def test_layers_with_other_heads_in_int4_share_one_graph_and_follow_the_phase(self, impl, names, block):
        layers, grid, heads = tuple(f"blocks.{index}.attn1" for index in range(3)), Grid(2, 7, 6), 6
        plan = random_plan(layers, phases=TWO_PHASES, block=block, grid=grid, heads=heads)
        each = [tuple(names[head % 3 == index or head < index] for head in range(heads)) for index in range(3)]
        mixed = zip(plan.layers.items(), each, strict=True)
        plan = replace(plan, layers={name: replace(layer, precision=(own,) * 2) for (name, layer), own in mixed})
        assert {sum(name == "int8" for name in layer.precision[0]) for layer in plan.layers.values()} == {2, 3, 4}
        inputs = wan_inputs(latents=(4, 2, 14, 12))
        plain, compiled = tiny_wan(layers=3, heads=heads), tiny_wan(layers=3, heads=heads)
        for model in (plain, compiled):
            apply(model, plan, impl=impl)
        compiled.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for level in (0.9, 0.1):
                set_noise_level(plain, level)
                set_noise_level(compiled, level)
                assert difference(forward(compiled, **inputs), forward(plain, **inputs)) < 1e-5
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
        whole: Any = hook_of(plain)
        for layer in whole.layers.values():  # groups are kept from phase to phase; told apart, heads are the same
            groups, operands = layer.operands.groups, layer.operands
            assert [group.precision for group in groups] == sorted(names)
            assert sorted(torch.cat([group.heads for group in groups]).tolist()) == list(range(heads))
            for group in groups:
                assert torch.equal(group.mask.bits, operands.mask.bits[group.heads])
                assert torch.equal(group.order, operands.order[group.heads])
                assert {operands.precision[head] for head in group.heads.tolist()} == {group.precision}

    @pytest.mark.parametrize("how", ["compiled in place", "wrapped"])
    def test_a_whole_model_is_one_graph_whatever_the_step(self, how):
        plain, model = tiny_wan(), tiny_wan()
        for each in (plain, model):
            apply(each, random_plan(phases=TWO_PHASES))
        options = {"fullgraph": True, "backend": "eager"}
        wrapped = torch.compile(model, **options) if how == "wrapped" else model.compile(**options) or model
        for level in (0.1, 0.9, 0.3):
            for each in (plain, model):
                set_noise_level(each, level)
            assert difference(forward(wrapped), forward(plain)) < 1e-5
        assert counters["stats"]["unique_graphs"] == 1
        assert report(model).to_dict()["transformer"]["calls"] == {"sparse": 3}

    def test_padded_text_compiles_too(self, table_of_models):
        register_model("HunyuanVideoTransformer3DModel", hunyuan_spec())
        plain, compiled = tiny_hunyuan(), tiny_hunyuan()
        plan = random_plan(
            TestOtherModels.layers, model_class="HunyuanVideoTransformer3DModel", text=TextSpan(7, "suffix")
        )
        for model in (plain, compiled):
            apply(model, plan)
        compiled.compile_repeated_blocks(fullgraph=True, backend="eager")
        for real in ((13, 21), (20, 2)):
            inputs = hunyuan_inputs(real=real)
            assert difference(forward(compiled, **inputs), forward(plain, **inputs)) < 1e-5
        assert not counters["graph_break"]
