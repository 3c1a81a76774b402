"""Tiny models, pipelines and plans that tests share; every value that could be zero is random."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import CogVideoXDDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
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


IMAGE = Grid(1, 14, 15)
TEXT, REAL = 21, (13, 21)
WIDTH = HEADS * HEAD_DIM
ROPE = (16, 24, 24)


@dataclass(frozen=True)
class Variant:
    """A tiny transformer of one architecture, and what a call of it gets.

    Attributes:
        transformer: Its class in diffusers.
        config: Arguments of the class.
        inputs: Arguments of a call, from the batch size and a source of noise.
        layers: Module paths of the self-attentions over video tokens.
        grid, text: Their sequence.
        video_only: Layers that see the video without the text.
    """

    transformer: str
    config: dict[str, Any]
    inputs: Callable[[int, Callable[..., torch.Tensor]], dict[str, Any]]
    layers: tuple[str, ...]
    grid: Grid = GRID
    text: TextSpan = NO_TEXT
    video_only: tuple[str, ...] = ()
    scheduler: Callable[[], Any] = field(default=lambda: FlowMatchEulerDiscreteScheduler(shift=3.0))

    def build(self, seed=0) -> Any:
        return randomised(getattr(diffusers, self.transformer)(**self.config), seed)

    def call(self, batch=1, seed=0) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        return self.inputs(batch, lambda *shape: torch.randn(*shape, generator=generator))

    def plan(self, **changed) -> TransformerPlan:
        known = {"grid": self.grid, "text": self.text, "model_class": self.transformer}
        return random_plan(self.layers, **known | changed)


def numbered(pattern, count=2):
    return tuple(pattern.replace("*", str(index)) for index in range(count))


def time(batch):
    return torch.full((batch,), 500.0)


def real_tokens(batch, tokens=TEXT):
    """A mask of padded text, another length for every element."""
    return torch.arange(tokens) < torch.tensor(REAL[:batch])[:, None]


def positions(*sizes):
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes)).float()


def wan(batch, noise):
    return {
        "hidden_states": noise(batch, *LATENTS),
        "timestep": time(batch),
        "encoder_hidden_states": noise(batch, 3, 16),
    }


def wan_with_image(batch, noise):
    return wan(batch, noise) | {
        "encoder_hidden_states": noise(batch, 512, 16),
        "encoder_hidden_states_image": noise(batch, 5, 16),
    }


def wan_ti2v(batch, noise):
    per_token = torch.cat([torch.zeros(42), torch.full((GRID.tokens - 42,), 500.0)])
    return wan(batch, noise) | {"timestep": per_token.expand(batch, -1)}


def vace(batch, noise):
    return wan(batch, noise) | {
        "control_hidden_states": noise(batch, 12, *LATENTS[1:]),
        "control_hidden_states_scale": torch.tensor([0.7, 1.2]),
    }


def cogvideox(batch, noise, frames=5, channels=4, rope=True):
    given = {"hidden_states": noise(batch, frames, channels, 14, 12), "timestep": time(batch)}
    given["encoder_hidden_states"] = noise(batch, 9, 8)
    return given | (
        {"image_rotary_emb": get_3d_rotary_pos_embed(HEAD_DIM, ((0, 0), (7, 6)), (7, 6), 5)} if rope else {}
    )


def hunyuan(batch, noise):
    return {
        "hidden_states": noise(batch, *LATENTS),
        "timestep": time(batch),
        "encoder_hidden_states": noise(batch, TEXT, 16),
        "encoder_attention_mask": real_tokens(batch).int(),
        "pooled_projections": noise(batch, 8),
    }


def hunyuan15(batch, noise, image=True):
    return {
        "hidden_states": noise(batch, *LATENTS),
        "timestep": time(batch),
        "encoder_hidden_states": noise(batch, TEXT, 16),
        "encoder_attention_mask": real_tokens(batch).int(),
        "encoder_hidden_states_2": noise(batch, 7, 8),
        "encoder_attention_mask_2": real_tokens(batch, 7).int(),
        "image_embeds": noise(batch, 5, 12) * image,
    }


def ltx(batch, noise):
    return {
        "hidden_states": noise(batch, GRID.tokens, 4),
        "timestep": time(batch),
        "encoder_hidden_states": noise(batch, TEXT, 16),
        "encoder_attention_mask": real_tokens(batch).float(),
        "num_frames": 5,
        "height": 7,
        "width": 6,
    }


def ltx2(batch, noise, projected=False):
    return ltx(batch, noise) | {
        "encoder_hidden_states": noise(batch, TEXT, WIDTH if projected else 16),
        "audio_hidden_states": noise(batch, 11, 4),
        "audio_encoder_hidden_states": noise(batch, TEXT, 64 if projected else 16),
        "audio_encoder_attention_mask": real_tokens(batch).float(),
        "audio_num_frames": 11,
        "sigma": time(batch) / 1000,
    }


def mochi(batch, noise):
    return {
        "hidden_states": noise(batch, *LATENTS),
        "timestep": time(batch),
        "encoder_hidden_states": noise(batch, TEXT, 16),
        "encoder_attention_mask": real_tokens(batch),
    }


def flux(batch, noise):
    return {
        "hidden_states": noise(batch, IMAGE.tokens, 4),
        "timestep": time(batch) / 1000,
        "encoder_hidden_states": noise(batch, TEXT, 32),
        "pooled_projections": noise(batch, 32),
        "img_ids": positions(*IMAGE),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def flux2(batch, noise):
    return {
        "hidden_states": noise(batch, IMAGE.tokens, 4),
        "timestep": time(batch) / 1000,
        "guidance": torch.full((batch,), 4.0),
        "encoder_hidden_states": noise(batch, TEXT, 32),
        "img_ids": positions(*IMAGE, 1).expand(batch, -1, -1),
        "txt_ids": positions(1, 1, 1, TEXT).expand(batch, -1, -1),
    }


def qwen(batch, noise, padded=True):
    return {
        "hidden_states": noise(batch, IMAGE.tokens, 16),
        "timestep": time(batch) / 1000,
        "encoder_hidden_states": noise(batch, TEXT, 16),
        "img_shapes": [[tuple(IMAGE)]] * batch,
        "encoder_hidden_states_mask": real_tokens(batch) if padded else None,
    }


def sd3(batch, noise):
    return {
        "hidden_states": noise(batch, 4, 28, 30),
        "timestep": time(batch),
        "encoder_hidden_states": noise(batch, TEXT, 32),
        "pooled_projections": noise(batch, 16),
    }


HEADS_OF = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}
WAN = HEADS_OF | {
    "patch_size": (1, 2, 2), "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 64, "ffn_dim": 32,
    "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
COGVIDEOX = HEADS_OF | {
    "in_channels": 4, "out_channels": 4, "time_embed_dim": 2, "text_embed_dim": 8, "num_layers": 2, "sample_width": 12,
    "sample_height": 14, "sample_frames": 17, "max_text_seq_length": 9, "use_rotary_positional_embeddings": True,
}  # fmt: skip
HUNYUAN = HEADS_OF | {
    "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1,
    "patch_size": 2, "patch_size_t": 1, "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": ROPE,
    "guidance_embeds": False,
}  # fmt: skip
HUNYUAN15 = HEADS_OF | {
    "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1,
    "text_embed_dim": 16, "text_embed_2_dim": 8, "image_embed_dim": 12, "rope_axes_dim": ROPE, "target_size": 16,
}  # fmt: skip
LTX = HEADS_OF | {
    "in_channels": 4, "out_channels": 4, "cross_attention_dim": WIDTH, "caption_channels": 16, "num_layers": 2,
}  # fmt: skip
LTX2 = LTX | {
    "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 32,
    "audio_cross_attention_dim": 64,
}  # fmt: skip
LTX23 = LTX2 | {
    "gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True, "audio_cross_attn_mod": True,
    "perturbed_attn": True, "rope_type": "split", "use_prompt_embeddings": False,
}  # fmt: skip
MOCHI = HEADS_OF | {
    "patch_size": 2, "num_layers": 2, "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 16,
    "time_embed_dim": 4, "max_sequence_length": TEXT,
}  # fmt: skip
FLUX = HEADS_OF | {
    "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32,
    "pooled_projection_dim": 32, "axes_dims_rope": ROPE,
}  # fmt: skip
FLUX2 = HEADS_OF | {
    "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32,
    "timestep_guidance_channels": 64, "axes_dims_rope": (16, 16, 16, 16),
}  # fmt: skip
QWEN = HEADS_OF | {
    "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 16,
    "axes_dims_rope": ROPE,
}  # fmt: skip
SD3 = HEADS_OF | {
    "sample_size": 32, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 32,
    "caption_projection_dim": WIDTH, "pooled_projection_dim": 16, "pos_embed_max_size": 32,
}  # fmt: skip

ATTN1, ATTN = numbered("transformer_blocks.*.attn1"), numbered("transformer_blocks.*.attn")
STREAMS = ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn")
BLOCKS = numbered("blocks.*.attn1")


def _cogvideox(config, inputs):
    return Variant(
        "CogVideoXTransformer3DModel", COGVIDEOX | config, inputs, ATTN1, GRID, TextSpan(9, "prefix"),
        scheduler=CogVideoXDDIMScheduler,
    )  # fmt: skip


def _suffix(transformer, config, inputs, layers, grid=GRID, tokens=TEXT, **more):
    return Variant(transformer, config, inputs, layers, grid, TextSpan(tokens, "suffix"), **more)


def _prefix(transformer, config, inputs, layers):
    return Variant(transformer, config, inputs, layers, IMAGE, TextSpan(TEXT, "prefix"))


VARIANTS = {
    "wan": Variant("WanTransformer3DModel", WAN, wan, BLOCKS),
    "wan-i2v": Variant(
        "WanTransformer3DModel", WAN | {"image_dim": 16, "added_kv_proj_dim": WIDTH}, wan_with_image, BLOCKS
    ),
    "wan-ti2v": Variant("WanTransformer3DModel", WAN, wan_ti2v, BLOCKS),
    "wan-vace": Variant(
        "WanVACETransformer3DModel", WAN | {"num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 12}, vace,
        numbered("blocks.*.attn1", 3) + numbered("vace_blocks.*.attn1"),
    ),
    "cogvideox-2b": _cogvideox(
        {"use_rotary_positional_embeddings": False}, lambda batch, noise: cogvideox(batch, noise, rope=False)
    ),
    "cogvideox-5b": _cogvideox({}, cogvideox),
    "cogvideox-1.5": _cogvideox({"patch_size_t": 2}, lambda batch, noise: cogvideox(batch, noise, frames=10)),
    "cogvideox-1.5-i2v": _cogvideox(
        {"patch_size_t": 2, "in_channels": 8, "ofs_embed_dim": 2},
        lambda batch, noise: cogvideox(batch, noise, 10, 8) | {"ofs": torch.full((1,), 2.0)},
    ),
    "hunyuanvideo": _suffix("HunyuanVideoTransformer3DModel", HUNYUAN, hunyuan, STREAMS),
    "hunyuanvideo-i2v": _suffix(
        "HunyuanVideoTransformer3DModel", HUNYUAN | {"image_condition_type": "token_replace"}, hunyuan, STREAMS
    ),
    "hunyuanvideo-1.5": _suffix(
        "HunyuanVideo15Transformer3DModel", HUNYUAN15, lambda batch, noise: hunyuan15(batch, noise, image=False), ATTN,
        tokens=TEXT + 7 + 5,
    ),
    "hunyuanvideo-1.5-i2v": _suffix(
        "HunyuanVideo15Transformer3DModel", HUNYUAN15, hunyuan15, ATTN, tokens=TEXT + 7 + 5
    ),
    "ltx": Variant("LTXVideoTransformer3DModel", LTX, ltx, ATTN1),
    "ltx-2": Variant("LTX2VideoTransformer3DModel", LTX2, ltx2, ATTN1),
    "ltx-2.3": Variant(
        "LTX2VideoTransformer3DModel", LTX23, lambda batch, noise: ltx2(batch, noise, projected=True), ATTN1
    ),
    "mochi": _suffix("MochiTransformer3DModel", MOCHI, mochi, ATTN1),
    "flux": _prefix("FluxTransformer2DModel", FLUX, flux, STREAMS),
    "flux.2": _prefix("Flux2Transformer2DModel", FLUX2, flux2, STREAMS),
    "qwen-image": _prefix(
        "QwenImageTransformer2DModel", QWEN, lambda batch, noise: qwen(batch, noise, padded=False), ATTN
    ),
    "qwen-image-padded": _prefix("QwenImageTransformer2DModel", QWEN, qwen, ATTN),
    "sd3": _suffix("SD3Transformer2DModel", SD3, sd3, ATTN, IMAGE),
    "sd3.5": _suffix(
        "SD3Transformer2DModel", SD3 | {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}, sd3,
        (*ATTN, "transformer_blocks.0.attn2"), IMAGE, video_only=("transformer_blocks.0.attn2",),
    ),
}  # fmt: skip


class VariantPipeline(DiffusionPipeline):
    """Calls a variant's transformer step by step with guidance, on other noise for every prompt, step and branch."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt=None, generator=None, num_inference_steps=2, output_type="latent", *, calls) -> Any:
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.scheduler.timesteps:
            for branch in ("cond", "uncond"):
                seed = int(torch.randint(2**31, (), generator=generator))
                context = getattr(self.transformer, "cache_context", contextlib.nullcontext)
                with context(branch):
                    found = self.transformer(**calls(branch, seed)).sample
            self.scheduler.step(found, timestep, torch.zeros_like(found), return_dict=False)
        self.maybe_free_model_hooks()
        return BaseOutput(frames=found)
