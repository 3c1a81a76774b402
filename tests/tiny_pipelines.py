"""Tiny pipelines of diffusers with random weights, written to folders from which they load as large ones do."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import save_file
from tiny_models import randomised
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

TEXT_TOKENS, TEXT_WIDTH = 6, 16
WORDS = ["<pad>", "</s>", "<unk>", "a", "cat", "dog", "runs", "sleeps"]


def _wan_parts(**config: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, out_channels=16, text_dim=TEXT_WIDTH,
        freq_dim=64, ffn_dim=32, num_layers=2, rope_max_seq_len=32, **{"in_channels": 16, **config},
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = {"vae": vae.eval(), "transformer": randomised(transformer), "scheduler": scheduler}
    return parts | {"text_encoder": None, "tokenizer": None}


def wan() -> Any:
    return WanPipeline(**_wan_parts())


def wan_i2v() -> Any:
    return WanImageToVideoPipeline(**_wan_parts(in_channels=36), image_encoder=None, image_processor=None)


def ltx() -> Any:
    """With a tokenizer of whole words and a T5 of two layers, so that it takes prompts."""
    torch.manual_seed(0)
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    text = T5Config(vocab_size=len(WORDS), d_model=TEXT_WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    vae.use_framewise_encoding = False
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=64, cross_attention_dim=128,
        num_layers=2, caption_channels=TEXT_WIDTH,
    )  # fmt: skip
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae.eval(), text_encoder=T5EncoderModel(text).eval(),
        tokenizer=tokenizer, transformer=randomised(transformer),
    )  # fmt: skip


def flux() -> Any:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=1, norm_num_groups=1, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=8, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae.eval(), transformer=randomised(transformer),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip


def embeddings(seed: int, pooled: bool = False, negative: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {"prompt_embeds": torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, generator=generator)}
    if negative:
        found["negative_prompt_embeds"] = torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, generator=generator)
    return found | ({"pooled_prompt_embeds": torch.randn(1, 8, generator=generator)} if pooled else {})


def saved(pipe: Any, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    return folder


def saved_embeddings(path: Path, seed: int, words: str | None = None, **kinds: bool) -> Path:
    save_file(embeddings(seed, **kinds), path, metadata={"prompt": words} if words else None)
    return path
