"""Tiny pipelines of diffusers with random weights, written to folders from which they load as large ones do."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from tiny_models import COGVIDEOX, FLUX, FLUX2, HUNYUAN, HUNYUAN15, LTX, LTX2, MOCHI, QWEN, SD3, WAN, randomised
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

TEXT_TOKENS, TEXT_WIDTH, POOLED_WIDTH = 6, 16, 8
WORDS = ["<pad>", "</s>", "<unk>", "a", "cat", "dog", "runs", "sleeps"]
MASK, MASK_2, POOLED = "prompt_attention_mask", "prompt_embeds_mask_2", "pooled_prompt_embeds"


@dataclass(frozen=True)
class Tiny:
    """A tiny pipeline and what a call of it gets.

    Attributes:
        build: Makes it; components that are missing are those that would read a prompt's words.
        size: Height, width and frames in pixels; None for the frames of an image.
        grid: The same in tokens.
        text: Tensors that stand for a prompt beside its prompt_embeds.
        negative: Whether it takes a negative prompt as well.
        call: More options on the command line.
        calls: Calls of each transformer in three steps.
    """

    build: Callable[[], Any]
    size: tuple[int, int, int | None]
    grid: str
    text: tuple[str, ...] = ()
    negative: bool = False
    call: tuple[str | float, ...] = ()
    calls: tuple[int, ...] = (3,)


def assembled(pipeline: str, vae: Any, transformer: Any, scheduler: Any = None, **more: Any) -> Any:
    """A pipeline without what reads words, unless it is given."""
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = {"vae": vae.eval(), "transformer": randomised(transformer), "scheduler": scheduler} | more
    kind = getattr(diffusers, pipeline)
    named = ("text_encoder", "tokenizer", "image_", "feature_extractor")
    return kind(**{name: None for name in kind._get_signature_keys(kind)[0] if name.startswith(named)} | parts)


def missing(pipe: Any) -> list[str]:
    """Components that loading must be told to leave out."""
    return [name for name, each in pipe.components.items() if each is None and name != "transformer_2"]


def wan(pipeline="WanPipeline", transformer="WanTransformer3DModel", config: Any = None, experts=1, **more: Any) -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    kind, config = getattr(diffusers, transformer), WAN | {"in_channels": 16, "out_channels": 16} | (config or {})
    if experts == 2:
        more |= {"transformer_2": randomised(kind(**config), seed=1), "boundary_ratio": 0.9}
    return assembled(pipeline, vae, kind(**config), **more)


def wan_i2v() -> Any:
    return wan("WanImageToVideoPipeline", config={"in_channels": 36})


def wan_vace() -> Any:
    config = {"num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 96}
    return wan("WanVACEPipeline", "WanVACETransformer3DModel", config)


def cogvideox() -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    config = COGVIDEOX | {
        "text_embed_dim": TEXT_WIDTH, "max_text_seq_length": TEXT_TOKENS, "sample_height": 6, "sample_width": 8,
        "sample_frames": 9,
    }  # fmt: skip
    transformer = diffusers.CogVideoXTransformer3DModel(**config)
    return assembled("CogVideoXPipeline", vae, transformer, diffusers.CogVideoXDDIMScheduler())


def hunyuanvideo() -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
    )
    transformer = diffusers.HunyuanVideoTransformer3DModel(**HUNYUAN | {"guidance_embeds": True})
    return assembled("HunyuanVideoPipeline", vae, transformer)


def hunyuanvideo15() -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=2, downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip
    config = HUNYUAN15 | {"in_channels": 9, "text_embed_2_dim": TEXT_WIDTH}
    transformer = diffusers.HunyuanVideo15Transformer3DModel(**config)
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
    return assembled("HunyuanVideo15Pipeline", vae, transformer, guider=guider)


def mochi() -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5
    )
    config = MOCHI | {"in_channels": 12, "max_sequence_length": TEXT_TOKENS}
    return assembled("MochiPipeline", vae, diffusers.MochiTransformer3DModel(**config))


def ltx() -> Any:
    """With a tokenizer of whole words and a T5 of two layers, so that it takes prompts."""
    torch.manual_seed(0)
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    text = T5Config(vocab_size=len(WORDS), d_model=TEXT_WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    vae.use_framewise_encoding = False
    transformer = diffusers.LTXVideoTransformer3DModel(**LTX | {"in_channels": 8, "out_channels": 8})
    return assembled(
        "LTXPipeline", vae, transformer, FlowMatchEulerDiscreteScheduler(), text_encoder=T5EncoderModel(text).eval(),
        tokenizer=tokenizer,
    )  # fmt: skip


def ltx2() -> Any:
    """With sound: a second VAE, a vocoder, and connectors from the prompt to both streams."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_residual=(False,),
        upsample_factor=(1,), timestep_conditioning=False, patch_size=4, patch_size_t=1, encoder_causal=True,
        decoder_causal=False,
    )  # fmt: skip
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1, attn_resolutions=None, in_channels=2,
        resolution=32, latent_channels=2, norm_type="pixel", causality_axis="height", dropout=0.0,
        mid_block_add_attention=False, sample_rate=16000, mel_hop_length=160, is_causal=True, mel_bins=8,
    )  # fmt: skip
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=32, out_channels=2, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
    )  # fmt: skip
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    connectors = LTX2TextConnectors(
        caption_channels=TEXT_WIDTH, text_proj_in_factor=1, connector_rope_base_seq_len=32, rope_theta=10000.0,
        rope_double_precision=False, causal_temporal_positioning=False,
        **{f"{stream}_connector_{name}": size for stream in ("video", "audio") for name, size in sizes.items()},
    )  # fmt: skip
    return assembled(
        "LTX2Pipeline", vae, diffusers.LTX2VideoTransformer3DModel(**LTX2), FlowMatchEulerDiscreteScheduler(),
        audio_vae=audio_vae.eval(), vocoder=vocoder.eval(), connectors=connectors.eval(),
    )  # fmt: skip


def image_vae(kind: Any = diffusers.AutoencoderKL, channels=1, **more: Any) -> Any:
    torch.manual_seed(0)
    return kind(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(4,),
        layers_per_block=1, latent_channels=channels, norm_num_groups=1, use_quant_conv=False,
        use_post_quant_conv=False, **more,
    )  # fmt: skip


SCALED = {"shift_factor": 0.06, "scaling_factor": 1.5}


def flux() -> Any:
    config = FLUX | {"joint_attention_dim": TEXT_WIDTH, "pooled_projection_dim": POOLED_WIDTH}
    return assembled(
        "FluxPipeline", image_vae(**SCALED), diffusers.FluxTransformer2DModel(**config),
        FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def flux2() -> Any:
    transformer = diffusers.Flux2Transformer2DModel(**FLUX2 | {"joint_attention_dim": TEXT_WIDTH})
    return assembled("Flux2Pipeline", image_vae(diffusers.AutoencoderKLFlux2), transformer)


def qwen_image() -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return assembled("QwenImagePipeline", vae, diffusers.QwenImageTransformer2DModel(**QWEN))


def sd3() -> Any:
    config = SD3 | {"joint_attention_dim": TEXT_WIDTH, "pooled_projection_dim": POOLED_WIDTH}
    return assembled(
        "StableDiffusion3Pipeline", image_vae(channels=4, **SCALED), diffusers.SD3Transformer2DModel(**config)
    )


GUIDED: dict[str, Any] = {"negative": True, "call": ("--guidance-scale", 3)}
ONE_CALL = ("--set=stg_scale=0", "--set=modality_scale=1", "--set=audio_stg_scale=0", "--set=audio_modality_scale=1")
VIDEO, IMAGE = (48, 64, 9), (20, 24, None)
PIPELINES = {
    "wan": Tiny(wan, VIDEO, "3x3x4", calls=(6,), **GUIDED),
    "wan-a14b": Tiny(lambda: wan(experts=2), VIDEO, "3x3x4", calls=(2, 4), **GUIDED),
    "wan-vace": Tiny(wan_vace, (48, 64, 5), "2x3x4", calls=(6,), **GUIDED),
    "cogvideox": Tiny(cogvideox, VIDEO, "3x3x4", **GUIDED),
    "hunyuanvideo": Tiny(hunyuanvideo, VIDEO, "3x3x4", (POOLED, MASK)),
    "hunyuanvideo-1.5": Tiny(
        hunyuanvideo15, (24, 32, 5), "3x3x4", ("prompt_embeds_mask", "prompt_embeds_2", MASK_2), negative=True,
        calls=(6,),
    ),
    "ltx": Tiny(ltx, (32, 64, 9), "3x8x16", call=("--guidance-scale", 3, "--negative-prompt", "cat")),
    "ltx-2": Tiny(ltx2, (32, 64, 5), "3x4x8", (MASK,), True, ("--guidance-scale", 3, *ONE_CALL)),
    "mochi": Tiny(mochi, (48, 64, 13), "3x3x4", (MASK,), **GUIDED),
    "flux": Tiny(flux, IMAGE, "1x10x12", (POOLED,)),
    "flux.2": Tiny(flux2, IMAGE, "1x10x12"),
    "qwen-image": Tiny(
        qwen_image, (80, 96, None), "1x10x12", ("prompt_embeds_mask",), negative=True,
        call=("--set", "true_cfg_scale=3"), calls=(6,),
    ),
    "sd3": Tiny(sd3, IMAGE, "1x10x12", (POOLED,), **GUIDED),
}  # fmt: skip


def embeddings(seed: int, *names: str, negative: bool = False) -> dict[str, torch.Tensor]:
    """Random tensors for a prompt, and for a negative one, whose masks hide the last token."""
    generator = torch.Generator().manual_seed(seed)
    names = ("prompt_embeds", *names)
    names += tuple(f"negative_{name}" for name in names) if negative else ()
    return {name: _random(name, generator) for name in names}


def _random(name: str, generator: torch.Generator) -> torch.Tensor:
    if "mask" in name:
        return torch.arange(TEXT_TOKENS)[None] < TEXT_TOKENS - 1
    shape = (1, POOLED_WIDTH) if "pooled" in name else (1, TEXT_TOKENS, TEXT_WIDTH)
    return torch.randn(shape, generator=generator)


def saved(pipe: Any, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    return folder


def saved_embeddings(path: Path, seed: int, *names: str, words: str | None = None, negative: bool = False) -> Path:
    save_file(embeddings(seed, *names, negative=negative), path, metadata={"prompt": words} if words else None)
    return path
