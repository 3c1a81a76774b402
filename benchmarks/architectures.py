"""Published configurations of real transformers, built with random weights, and inputs of the shapes that they see.

Configurations are diffusers' own: scripts/convert_wan_to_diffusers.py, convert_cogvideox_to_diffusers.py,
convert_hunyuan_video_to_diffusers.py and convert_flux_to_diffusers.py of huggingface/diffusers at 58eb52c. Grids follow
from the size of the clip, the VAE's compression (4×8×8; Wan2.2-5B 4×16×16; FLUX 8×8) and the patch size. Batches are
those of one call in the model's own pipeline: CogVideoX runs both branches of the guidance in one call, Wan each in a
call of its own, HunyuanVideo and FLUX have the guidance distilled into one.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

from paroattn.block_mask import parse_block
from paroattn.grid import Grid, Layout, TextSpan
from paroattn.integration.models import self_attentions
from paroattn.plan.plan import TransformerPlan
from shapes import NO_TEXT
from synthetic_plan import synthetic_plan

Inputs = dict[str, Any]
Blocks = Mapping[str, nn.ModuleList]
"""Repeated blocks by the name of their list."""
CROSS_TEXT = 512
"""Text tokens of models that see them through cross-attention."""
MAIN_BLOCK = {64: "64x128", 128: "128x128"}
"""The fastest blocks of a plan, by head dimension."""


@dataclass(frozen=True)
class Architecture:
    """A transformer at the size of one clip or image.

    Attributes:
        name: As in result files.
        transformer: Class in diffusers.
        config: Its arguments.
        blocks: Lists of repeated blocks, and the argument of `config` that says how many each has.
        grid: Size of the video in tokens.
        workload: Name and size by which `paro doctor` knows it.
        inputs: Makes the arguments of one call, from the architecture, the device and the dtype.
        text: Text in the sequence of the self-attentions.
        batch: Of one call.
    """

    name: str
    transformer: str
    config: Mapping[str, Any]
    blocks: Mapping[str, str]
    grid: Grid
    workload: tuple[str, str]
    inputs: Callable[["Architecture", torch.device, torch.dtype], Inputs]
    text: TextSpan = NO_TEXT
    batch: int = 1

    @property
    def layout(self) -> Layout:
        return Layout(self.grid, self.text)

    @property
    def heads(self) -> int:
        return self.config["num_attention_heads"]

    @property
    def head_dim(self) -> int:
        return self.config["attention_head_dim"]

    @property
    def depth(self) -> tuple[int, ...]:
        """Published number of blocks of each kind."""
        return tuple(self.config[argument] for argument in self.blocks.values())


def wan_inputs(model: Architecture, device: torch.device, dtype: torch.dtype) -> Inputs:
    return {
        "hidden_states": _noise(model, device, dtype),
        "timestep": torch.full((model.batch,), 500, device=device),
        "encoder_hidden_states": _text(model, CROSS_TEXT, model.config["text_dim"], device, dtype),
    }


def wan_tokenwise_inputs(model: Architecture, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Wan2.2-5B has a timestep for every token."""
    return wan_inputs(model, device, dtype) | {
        "timestep": torch.full((model.batch, model.grid.tokens), 500.0, device=device)
    }


def cogvideox_inputs(model: Architecture, device: torch.device, dtype: torch.dtype) -> Inputs:
    frames, height, width = model.grid
    cosines, sines = get_3d_rotary_pos_embed(
        model.head_dim, ((0, 0), (height, width)), (height, width), frames, device=device
    )
    return {
        "hidden_states": _noise(model, device, dtype).transpose(1, 2).contiguous(),
        "timestep": torch.full((model.batch,), 500, device=device),
        "encoder_hidden_states": _text(model, model.text.tokens, model.config["text_embed_dim"], device, dtype),
        "image_rotary_emb": (cosines, sines),
    }


def hunyuanvideo_inputs(model: Architecture, device: torch.device, dtype: torch.dtype) -> Inputs:
    """A prompt that fills its place, so that leaving out the mask of padded text is the same computation."""
    return {
        "hidden_states": _noise(model, device, dtype),
        "timestep": torch.full((model.batch,), 500, device=device, dtype=dtype),
        "encoder_hidden_states": _text(model, model.text.tokens, model.config["text_embed_dim"], device, dtype),
        "encoder_attention_mask": torch.ones(model.batch, model.text.tokens, device=device, dtype=dtype),
        "pooled_projections": _random((model.batch, model.config["pooled_projection_dim"]), device, dtype, 2),
        "guidance": torch.full((model.batch,), 6000.0, device=device, dtype=dtype),
    }


def flux_inputs(model: Architecture, device: torch.device, dtype: torch.dtype) -> Inputs:
    places = torch.cartesian_prod(*(torch.arange(size, device=device) for size in model.grid))
    return {
        "hidden_states": _random((model.batch, model.grid.tokens, model.config["in_channels"]), device, dtype, 0),
        "timestep": torch.full((model.batch,), 0.5, device=device, dtype=dtype),
        "encoder_hidden_states": _text(model, model.text.tokens, model.config["joint_attention_dim"], device, dtype),
        "pooled_projections": _random((model.batch, model.config["pooled_projection_dim"]), device, dtype, 2),
        "guidance": torch.full((model.batch,), 3.5, device=device),
        "img_ids": places.to(dtype),
        "txt_ids": torch.zeros(model.text.tokens, 3, device=device, dtype=dtype),
    }


_WAN = {
    "patch_size": (1, 2, 2), "attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096,
    "freq_dim": 256, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6,
    "added_kv_proj_dim": None,
}  # fmt: skip
_WAN_14B = _WAN | {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
_WAN_1_3B = _WAN | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_WAN_5B = _WAN | {
    "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48,
}  # fmt: skip
_COGVIDEOX_5B = {
    "num_attention_heads": 48, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16, "num_layers": 42,
    "time_embed_dim": 512, "text_embed_dim": 4096, "patch_size": 2, "max_text_seq_length": 226,
    "sample_width": 90, "sample_height": 60, "sample_frames": 49, "use_rotary_positional_embeddings": True,
}  # fmt: skip
_HUNYUANVIDEO = {
    "in_channels": 16, "out_channels": 16, "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 20,
    "num_single_layers": 40, "num_refiner_layers": 2, "mlp_ratio": 4.0, "patch_size": 2, "patch_size_t": 1,
    "qk_norm": "rms_norm", "guidance_embeds": True, "text_embed_dim": 4096, "pooled_projection_dim": 768,
    "rope_theta": 256.0, "rope_axes_dim": (16, 56, 56), "image_condition_type": None,
}  # fmt: skip
_FLUX_DEV = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
_ONE = {"blocks": "num_layers"}
_TWO = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}


def _wan(name: str, config: Mapping[str, Any], grid: Grid, inputs: Any = wan_inputs) -> Architecture:
    model, _, size = name.rpartition("-")
    return Architecture(name, "WanTransformer3DModel", config, _ONE, grid, (model, size), inputs)


def _flux(name: str, side: int) -> Architecture:
    text = TextSpan(512, "prefix")
    model, _, size = name.rpartition("-")
    return Architecture(
        name, "FluxTransformer2DModel", _FLUX_DEV, _TWO, Grid(1, side, side), (model, size), flux_inputs, text
    )


ARCHITECTURES = {
    model.name: model
    for model in (
        _wan("wan-14b-720p", _WAN_14B, Grid(21, 45, 80)),  # Wan2.1-T2V-14B, 81 frames of 720×1280
        _wan("wan-14b-480p", _WAN_14B, Grid(21, 30, 52)),  # 81 frames of 480×832
        _wan("wan-1.3b-480p", _WAN_1_3B, Grid(21, 30, 52)),  # Wan2.1-T2V-1.3B, 81 frames of 480×832
        _wan("wan2.2-5b-720p", _WAN_5B, Grid(31, 22, 40), wan_tokenwise_inputs),  # TI2V, 121 frames of 704×1280
        Architecture(
            "cogvideox-5b", "CogVideoXTransformer3DModel", _COGVIDEOX_5B, {"transformer_blocks": "num_layers"},
            Grid(13, 30, 45), ("cogvideox-5b", "480p"), cogvideox_inputs, TextSpan(226, "prefix"), batch=2,
        ),  # 49 frames of 480×720
        Architecture(
            "hunyuanvideo-720p", "HunyuanVideoTransformer3DModel", _HUNYUANVIDEO, _TWO,
            Grid(33, 45, 80), ("hunyuanvideo", "720p"), hunyuanvideo_inputs, TextSpan(256, "suffix"),
        ),  # 129 frames of 720×1280
        _flux("flux-1024", 64),  # FLUX.1-dev, one image of 1024×1024
        _flux("flux-2048", 128),
    )
}  # fmt: skip


def built(model: Architecture, depth: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Any:
    """The transformer with random weights and so many blocks of each kind, made where it will run.

    As `from_pretrained` leaves it: the modules that diffusers keeps in float32 are float32, buffers were computed under
    the model's dtype.
    """
    made_of = dict(model.config) | dict(zip(model.blocks.values(), depth, strict=True))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            transformer = getattr(diffusers, model.transformer)(**made_of)
    finally:
        torch.set_default_dtype(before)
    kept = set(transformer._keep_in_fp32_modules or ())
    for name, parameter in transformer.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    return transformer.eval().requires_grad_(False)


def first_blocks(transformer: Any, model: Architecture, depth: tuple[int, ...]) -> Blocks:
    """The first so many repeated blocks of each kind.

    Raises:
        ValueError: If there are not as many.
    """
    for name, count in zip(model.blocks, depth, strict=True):
        if not 1 <= count <= len(getattr(transformer, name)):
            raise ValueError(f"{name} must keep 1…{len(getattr(transformer, name))} blocks; got {count}")
    return {name: getattr(transformer, name)[:count] for name, count in zip(model.blocks, depth, strict=True)}


@contextmanager
def only(transformer: Any, blocks: Blocks) -> Iterator[None]:
    """Let a transformer have these blocks and no others for a while."""
    whole = {name: getattr(transformer, name) for name in blocks}
    try:
        for name, some in blocks.items():
            setattr(transformer, name, some)
        yield
    finally:
        for name, all_ in whole.items():
            setattr(transformer, name, all_)


def planned_layers(transformer: Any) -> tuple[str, ...]:
    """Paths of the self-attentions that a plan covers."""
    return tuple(self_attentions(transformer))


def plan_of(transformer: Any, model: Architecture, density: float, block: str) -> TransformerPlan:
    """A synthetic plan for all self-attentions of a transformer."""
    device = next(transformer.parameters()).device
    return synthetic_plan(
        model.transformer, planned_layers(transformer), model.heads, model.head_dim, model.grid, model.text,
        density=density, block=parse_block(block), device=device,
    )  # fmt: skip


def _noise(model: Architecture, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Latents (B, C, F, H, W)."""
    patch = model.config["patch_size"]
    patch = patch if isinstance(patch, tuple) else (1, patch, patch)
    size = (count * each for count, each in zip(model.grid, patch, strict=True))
    return _random((model.batch, model.config["in_channels"], *size), device, dtype, 0)


def _text(model: Architecture, tokens: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _random((model.batch, tokens, channels), device, dtype, 1)


def _random(size: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)
