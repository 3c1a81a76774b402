"""Processors for models whose own cannot follow a plan: the same attention, through diffusers' dispatcher.

CogVideoX, Mochi and SD3 call PyTorch's attention directly; HunyuanVideo-1.5 builds a mask over all pairs of tokens,
12.9 GB at 720p. Each class here computes what the original computes, with q, k and v as (B, N, H, D) and padded text as
a mask over keys, (B, 1, 1, N). Wan's own processor can follow a plan; its class here is faster on a GPU.
"""

from typing import Any

import torch
from diffusers.models import attention_processor as originals
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor
from torch.nn import functional as F

from ..kernels.rotary import fusable, norm_rotate

_rotated: Any = apply_rotary_emb  # its annotations promise two tensors
OWN, ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


class Dispatching:
    """What diffusers asks of a processor that goes through its dispatcher."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of (B, N, H, D) as (B, N, H·D)."""
        out = dispatch_attention_fn(
            q, k, v, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return out.flatten(2, 3).to(q.dtype)


class CogVideoXProcessor(Dispatching):
    """CogVideoX: text before the video, rotary embedding on the video alone."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        text = encoder_hidden_states.shape[1]
        both = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        if attention_mask is not None:
            for_each_head: Tensor = attn.prepare_attention_mask(attention_mask, both.shape[1], both.shape[0])
            attention_mask = for_each_head.view(both.shape[0], attn.heads, -1, for_each_head.shape[-1])
        q, k, v = _normalised(attn, _heads(attn, both))
        if image_rotary_emb is not None:
            q, k = (
                torch.cat([x[:, :text], _rotated(x[:, text:], image_rotary_emb, sequence_dim=1)], dim=1) for x in (q, k)
            )
        out = _projected(attn, self.attend(q, k, v, attention_mask))
        return out[:, text:], out[:, :text]


class JointProcessor(Dispatching):
    """SD3: text behind the image where there is any, no rotary embedding."""

    normalised = True

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        video = hidden_states.shape[1]
        parts = _heads(attn, hidden_states)
        parts = _normalised(attn, parts) if self.normalised else parts
        if encoder_hidden_states is None:
            return _projected(attn, self.attend(*parts))
        added = _heads(attn, encoder_hidden_states, ADDED, "to_added_qkv")
        added = _normalised(attn, added, "added_") if self.normalised else added
        out = self.attend(*(torch.cat(pair, dim=1) for pair in zip(parts, added, strict=True)))
        text = out[:, video:]
        return _projected(attn, out[:, :video]), text if attn.context_pre_only else attn.to_add_out(text)


class FusedJointProcessor(JointProcessor):
    """SD3 after `fuse_qkv_projections`, where diffusers leaves out the norms of q and k."""

    normalised = False


class MochiProcessor(Dispatching):
    """Mochi: text behind the video, the real tokens first; what stands behind them gives zeros."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        video = hidden_states.shape[1]
        q, k, v = _normalised(attn, _heads(attn, hidden_states))
        if image_rotary_emb is not None:
            q, k = (_rotated_by_head(x, *image_rotary_emb) for x in (q, k))
        padded = ~attention_mask.bool()
        first = padded.to(torch.uint8).argsort(dim=1, stable=True)[..., None, None]
        added = _normalised(attn, _heads(attn, encoder_hidden_states, ADDED), "added_")
        added = [x.gather(1, first.expand_as(x)) for x in added]
        real = ~padded.sort(dim=1, stable=True).values
        mask = F.pad(real, (video, 0), value=True)[:, None, None]
        q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), added, strict=True))
        out = self.attend(q, k, v, mask)
        text = out[:, video:] * real[..., None]
        return _projected(attn, out[:, :video]), attn.to_add_out(text) if hasattr(attn, "to_add_out") else text


class HunyuanVideo15Processor(Dispatching):
    """HunyuanVideo-1.5: text behind the video, padding last; rows of padding are computed, but nobody reads them."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        video = hidden_states.shape[1]
        q, k, v = _normalised(attn, _heads(attn, hidden_states))
        if image_rotary_emb is not None:
            q, k = (_rotated(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
        if encoder_hidden_states is not None:
            added = _normalised(attn, _heads(attn, encoder_hidden_states, ADDED), "added_")
            q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), added, strict=True))
        if attention_mask is not None:
            behind = q.shape[1] - attention_mask.shape[1]
            attention_mask = F.pad(attention_mask.bool(), (behind, 0), value=True)[:, None, None]
        out = self.attend(q, k, v, attention_mask)
        if encoder_hidden_states is None:
            return out, None
        return _projected(attn, out[:, :video]), attn.to_add_out(out[:, video:])


class WanProcessor(WanAttnProcessor):
    """Wan: norms and rotary embedding of a self-attention in one pass where a kernel can, else diffusers' own code."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        weights = attn.norm_q.weight, attn.norm_k.weight
        if encoder_hidden_states is not None or rotary_emb is None or not fusable(hidden_states, weights, rotary_emb):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        q, k, v = _heads(attn, hidden_states)
        rotations = (x[0, :, 0] for x in rotary_emb)
        q, k = norm_rotate(q.flatten(2), k.flatten(2), *weights, *rotations, heads=attn.heads, eps=attn.norm_q.eps)
        out = dispatch_attention_fn(
            q, k, v, attn_mask=attention_mask, backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )  # fmt: skip
        return _projected(attn, out.flatten(2, 3).to(q.dtype))


ADAPTERS: dict[type, type] = {
    originals.CogVideoXAttnProcessor2_0: CogVideoXProcessor,
    originals.FusedCogVideoXAttnProcessor2_0: CogVideoXProcessor,
    originals.JointAttnProcessor2_0: JointProcessor,
    originals.FusedJointAttnProcessor2_0: FusedJointProcessor,
    originals.MochiAttnProcessor2_0: MochiProcessor,
    HunyuanVideo15AttnProcessor2_0: HunyuanVideo15Processor,
    WanAttnProcessor: WanProcessor,
}


def dispatching(original: Any) -> Any:
    """What computes the same through the dispatcher; `original` itself if it is none of those above."""
    adapter = ADAPTERS.get(type(original))
    return original if adapter is None else adapter()


def _heads(attn: Any, x: Tensor, names: tuple[str, ...] = OWN, fused: str = "to_qkv") -> list[Tensor]:
    """q, k and v of (B, N, C) as (B, N, H, D)."""
    if getattr(attn, "fused_projections", False):
        parts = getattr(attn, fused)(x).chunk(3, dim=-1)
    else:
        parts = [getattr(attn, name)(x) for name in names]
    return [part.unflatten(2, (attn.heads, -1)) for part in parts]


def _normalised(attn: Any, parts: list[Tensor], which: str = "") -> list[Tensor]:
    q, k, v = parts
    norm_q, norm_k = (getattr(attn, f"norm_{which}{name}", None) for name in "qk")
    return [q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v]


def _projected(attn: Any, x: Tensor) -> Tensor:
    """Output projection and dropout."""
    return attn.to_out[1](attn.to_out[0](x))


def _rotated_by_head(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding of neighbouring channels, another one for every head."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    parts = (even * cosines - odd * sines, even * sines + odd * cosines)
    return torch.stack([part.to(x.dtype) for part in parts], dim=-1).flatten(-2)
