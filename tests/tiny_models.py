"""Tiny models, pipelines and plans that tests share; every value that could be zero is random."""

import contextlib
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.utils import BaseOutput

from paroattn.block_mask import BlockMask, blocks_of
from paroattn.grid import ORDERS, Grid, TextSpan
from paroattn.phases import Phase
from paroattn.plan.plan import LayerPlan, Plan, TransformerPlan

GRID = Grid(5, 7, 6)
LATENTS = (4, 5, 14, 12)
BLOCK = (32, 64)
NO_TEXT = TextSpan()
ONE_PHASE = (Phase(0.0, 1.0),)
HEADS, HEAD_DIM, LAYERS = 2, 64, 2
TWO_PHASES = (Phase(0.6, 0.5), Phase(0.0, 0.5))


def randomised(model: Any, seed=0) -> Any:
    """Give every parameter that initialises to zeros or ones values that matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.data.normal_(std=0.3, generator=generator)
        else:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5 * 1.5, generator=generator)
    return model.eval().requires_grad_(False)


def tiny_wan(seed=0, layers=LAYERS, heads=HEADS, **config) -> Any:
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=64, ffn_dim=32, num_layers=layers, rope_max_seq_len=32, **config,
    )  # fmt: skip
    return randomised(model, seed)


def wan_inputs(batch=1, latents=LATENTS, seed=0, dtype=torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, *latents, generator=generator).to(dtype),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 3, 16, generator=generator).to(dtype),
    }


def random_plan(
    layer_names=tuple(f"blocks.{i}.attn1" for i in range(LAYERS)), *, density=0.5, phases=ONE_PHASE, seed=0,
    grid=GRID, heads=HEADS, head_dim=HEAD_DIM, block=BLOCK, model_class="WanTransformer3DModel", text=NO_TEXT,
    precision="fp32",
):  # fmt: skip
    """Another mask and order for every layer and head, another mask for every phase; density 1 keeps all."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(phases), heads, blocks_of(grid.tokens, block[0]), blocks_of(grid.tokens, block[1]))
    layers = {}
    for name in layer_names:
        kept = torch.rand(shape, generator=generator) < density
        kept |= torch.nn.functional.one_hot(torch.randint(shape[-1], shape[:-1], generator=generator), shape[-1]).bool()
        orders = tuple(ORDERS[int(torch.randint(1, 6, (), generator=generator))] for _ in range(heads))
        names = tuple((precision,) * heads for _ in phases)
        layers[name] = LayerPlan(orders, BlockMask.from_dense(kept, block), names)
    return TransformerPlan(model_class, heads, head_dim, grid, text, block, tuple(phases), layers)


class TinyPipeline(DiffusionPipeline):
    """Denoises random latents with guidance, in two calls or in one of twice the batch."""

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer, scheduler, transformer_2=None):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, transformer_2=transformer_2)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, num_inference_steps=4, batched=False, named=True, informed=False, guidance=2.0) -> Any:
        latents = wan_inputs()["hidden_states"]
        prompts = {"cond": wan_inputs(seed=1), "uncond": wan_inputs(seed=2)}
        prompts = {name: inputs["encoder_hidden_states"] for name, inputs in prompts.items()}
        self.scheduler.set_timesteps(num_inference_steps)
        for step, timestep in enumerate(self.scheduler.timesteps):
            model = self.transformer if self.transformer_2 is None or timestep >= 600 else self.transformer_2
            where = {"step_index": step} if informed else {}
            if batched:
                both = torch.cat(list(prompts.values()))
                with model.cache_context("cond_uncond", **where):
                    wanted, plain = model(latents.repeat(2, 1, 1, 1, 1), timestep.expand(2), both).sample.chunk(2)
            else:
                wanted, plain = (
                    self._call(model, latents, timestep, text, name if named else None, where)
                    for name, text in prompts.items()
                )
            velocity = plain + guidance * (wanted - plain)
            latents = self.scheduler.step(velocity, timestep, latents).prev_sample
        self.maybe_free_model_hooks()
        return BaseOutput(frames=latents)

    def _call(self, model, latents, timestep, text, name, where):
        with model.cache_context(name, **where) if name else contextlib.nullcontext():
            return model(latents, timestep.expand(1), text).sample


def tiny_pipeline(seed=0, two=False, scheduler=None) -> Any:
    return TinyPipeline(
        tiny_wan(seed), scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0), tiny_wan(seed + 1) if two else None
    )


def whole(plan):
    """The plan of a pipeline with one transformer."""
    return Plan({"transformer": plan})
