"""What is particular to each model: one row per transformer class."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..grid import Grid, TextSpan

Arguments = Mapping[str, Any]


def no_text(transformer: nn.Module, arguments: Arguments) -> TextSpan:
    """The prompt enters through cross-attention; self-attention sees the video alone."""
    return TextSpan()


@dataclass(frozen=True)
class ModelSpec:
    """Where a transformer keeps its video self-attentions and what their sequence looks like.

    Attributes:
        layers: Glob patterns of their module paths, `*` standing for one name: "blocks.*.attn1".
        grid: Size of the video in tokens, from the transformer and the arguments of its call by name; None when the
            call does not tell.
        text: Prompt tokens in the same sequence, from the same two.
        adapter: Makes a processor that calls diffusers' attention dispatcher, from the layer's own that does not.
    """

    layers: tuple[str, ...]
    grid: Callable[[nn.Module, Arguments], Grid | None]
    text: Callable[[nn.Module, Arguments], TextSpan] = no_text
    adapter: Callable[[Any], Any] | None = None


def latent_grid(transformer: Any, arguments: Arguments) -> Grid | None:
    """Grid of latents (B, C, F, H, W) under the patch size (frames, height, width) of the configuration."""
    latents = arguments.get("hidden_states")
    if latents is None or latents.ndim != 5:
        return None
    return Grid(*(size // patch for size, patch in zip(latents.shape[2:], transformer.config.patch_size, strict=True)))


MODELS: dict[str, ModelSpec] = {
    "WanTransformer3DModel": ModelSpec(layers=("blocks.*.attn1",), grid=latent_grid),
}


def register_model(class_name: str, spec: ModelSpec) -> None:
    """Make another transformer class known; an earlier row of that name is replaced."""
    MODELS[class_name] = spec


def spec_of(transformer: nn.Module) -> ModelSpec:
    """The row of a transformer.

    Raises:
        ValueError: If its class is not known; the message lists those that are.
    """
    name = type(transformer).__name__
    if name not in MODELS:
        raise ValueError(
            f"the transformer must be one of {', '.join(sorted(MODELS))}; got {name}. Describe it with a ModelSpec and "
            "paroattn.integration.models.register_model."
        )
    return MODELS[name]


def self_attentions(transformer: nn.Module) -> dict[str, Any]:
    """Attention modules that a plan may cover, by module path, in the model's order.

    Raises:
        ValueError: If the class is not known or no module matches its row.
    """
    patterns = spec_of(transformer).layers
    found = {name: module for name, module in transformer.named_modules() if any(_matches(name, p) for p in patterns)}
    if not found:
        raise ValueError(f"{type(transformer).__name__} must have modules at {', '.join(patterns)}; got none")
    return found


def head_size(attn: Any) -> tuple[int, int]:
    """Heads and head dimension of an attention module."""
    return attn.heads, attn.inner_dim // attn.heads


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
