"""What is particular to each model: one row per transformer class."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..grid import Grid, TextSpan
from .adapters import dispatching

Arguments = Mapping[str, Any]


class GridUnknown(Exception):
    """A call's tokens are no single grid, or its arguments do not tell; the message says what it has instead."""


def no_text(transformer: nn.Module, arguments: Arguments) -> TextSpan:
    """The prompt enters through cross-attention; self-attention sees the video alone."""
    return TextSpan()


@dataclass(frozen=True)
class ModelSpec:
    """Where a transformer keeps its video self-attentions and what their sequence looks like.

    Attributes:
        layers: Glob patterns of their module paths, `*` standing for one name: "blocks.*.attn1".
        grid: Size of the video in tokens, from the transformer and the arguments of its call by name; GridUnknown, or
            None, if the call does not tell.
        text: Prompt tokens in the same sequence, from the same two.
        adapter: Makes a processor that calls diffusers' attention dispatcher, from the layer's own that does not.
        video_only: Patterns of those layers that see the video without the text.
        padding_last: Padded text always stands behind the real tokens. If not, keys and values are copied to make it
            so before every attention with a mask. A mask may hide text, never video.
    """

    layers: tuple[str, ...]
    grid: Callable[[nn.Module, Arguments], Grid | None]
    text: Callable[[nn.Module, Arguments], TextSpan] = no_text
    adapter: Callable[[Any], Any] | None = None
    video_only: tuple[str, ...] = ()
    padding_last: bool = False


def latent_grid(transformer: Any, arguments: Arguments) -> Grid | None:
    """Grid of latents (B, C, F, H, W) under the patch size (frames, height, width) of the configuration."""
    latents = arguments.get("hidden_states")
    if latents is None or latents.ndim != 5:
        return None
    return Grid(*(size // patch for size, patch in zip(latents.shape[2:], _patch(transformer), strict=True)))


def cogvideox_grid(transformer: Any, arguments: Arguments) -> Grid:
    """Grid of latents (B, F, C, H, W); 1.0 has no patches in time."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    patch_t, patch, _ = _patch(transformer)
    return Grid(ceil(frames / patch_t), height // patch, width // patch)


def image_grid(transformer: Any, arguments: Arguments) -> Grid:
    """Grid of latents (B, C, H, W)."""
    height, width = arguments["hidden_states"].shape[2:]
    patch = transformer.config.patch_size
    return Grid(1, height // patch, width // patch)


def ltx_grid(transformer: Any, arguments: Arguments) -> Grid:
    """Grid of packed latents (B, N, C) whose size the call gives as num_frames, height and width."""
    if arguments.get("video_self_attention_mask") is not None:
        raise GridUnknown("a mask over its video tokens")
    sizes: list[Any] = [arguments.get(name) for name in ("num_frames", "height", "width")]
    if None in sizes:
        raise GridUnknown("no num_frames, height and width")
    return _whole(
        Grid(*(ceil(size / patch) for size, patch in zip(sizes, _patch(transformer), strict=True))), arguments
    )


def index_grid(transformer: Any, arguments: Arguments) -> Grid:
    """Grid of packed latents (B, N, C) that come with the place of each token, `img_ids`.

    A tensor of places is read once, which waits for the device; a pipeline passes the same one in every step.
    """
    if arguments.get("kv_cache_mode") is not None:
        raise GridUnknown("reference images as cached keys and values")
    places = arguments.get("img_ids")
    if places is None:
        raise GridUnknown("no img_ids")
    if places not in _grids_read:
        _grids_read[places] = _read_grid(places)
    grid = _grids_read[places]
    if grid is None:
        raise GridUnknown(f"{arguments['hidden_states'].shape[1]} tokens that are no single grid: reference images")
    return _whole(grid, arguments)


def shape_grid(transformer: Any, arguments: Arguments) -> Grid:
    """Grid of packed latents (B, N, C) whose sizes the call lists as `img_shapes`, for each batch element."""
    elements = [[each] if isinstance(each, tuple) else list(each) for each in arguments.get("img_shapes") or ()]
    if not elements:
        raise GridUnknown("no img_shapes")
    different = {tuple(map(tuple, shapes)) for shapes in elements}
    if len(different) > 1 or len(elements[0]) != 1:
        listed = " and ".join("x".join(map(str, shape)) for shapes in different for shape in shapes)
        raise GridUnknown(f"images of {listed}")
    return _whole(Grid(*elements[0][0]), arguments)


def text_span(
    transformer: nn.Module, arguments: Arguments, *, side: str, names: tuple[str, ...] = ("encoder_hidden_states",)
) -> TextSpan:
    """All tokens of the named arguments (B, tokens, C), padding included."""
    given = (arguments.get(name) for name in names)
    return TextSpan(sum(each.shape[1] for each in given if each is not None), side)


_grids_read = WeakTensorKeyDictionary()


def _read_grid(places: Tensor) -> Grid | None:
    """The grid whose tokens, in the model's order, are at these places (N, 3 or more), if there is one."""
    found = (places[0] if places.ndim == 3 else places).detach().cpu().long()
    sizes = found.amax(0).tolist()
    if min(sizes) < 0 or len(found) != prod(size + 1 for size in sizes):
        return None
    raster = torch.cartesian_prod(*(torch.arange(size + 1) for size in sizes))
    return Grid(*(size + 1 for size in sizes[:3])) if max(sizes[3:], default=0) == 0 and found.equal(raster) else None


def _whole(grid: Grid, arguments: Arguments) -> Grid:
    tokens = arguments["hidden_states"].shape[1]
    if grid.tokens != tokens:
        raise GridUnknown(f"{tokens} tokens, {grid.tokens} of them in a grid {grid}: reference images or frames")
    return grid


def _patch(transformer: Any) -> tuple[int, int, int]:
    """Patch size as (frames, height, width)."""
    patch = transformer.config.patch_size
    return (
        tuple(patch) if isinstance(patch, tuple | list) else (transformer.config.get("patch_size_t") or 1, patch, patch)
    )


_prefix, _suffix = partial(text_span, side="prefix"), partial(text_span, side="suffix")
_streams = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")

MODELS: dict[str, ModelSpec] = {
    "CogVideoXTransformer3DModel": ModelSpec(
        ("transformer_blocks.*.attn1",), cogvideox_grid, _prefix, adapter=dispatching
    ),
    "Flux2Transformer2DModel": ModelSpec(_streams, index_grid, _prefix),
    "FluxTransformer2DModel": ModelSpec(_streams, index_grid, _prefix),
    "HunyuanVideo15Transformer3DModel": ModelSpec(
        ("transformer_blocks.*.attn",),
        latent_grid,
        partial(_suffix, names=("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")),
        adapter=dispatching,
        padding_last=True,
    ),
    "HunyuanVideoTransformer3DModel": ModelSpec(_streams, latent_grid, _suffix, padding_last=True),
    "LTX2VideoTransformer3DModel": ModelSpec(("transformer_blocks.*.attn1",), ltx_grid),
    "LTXVideoTransformer3DModel": ModelSpec(("transformer_blocks.*.attn1",), ltx_grid),
    "MochiTransformer3DModel": ModelSpec(
        ("transformer_blocks.*.attn1",), latent_grid, _suffix, adapter=dispatching, padding_last=True
    ),
    "QwenImageTransformer2DModel": ModelSpec(("transformer_blocks.*.attn",), shape_grid, _prefix),
    "SD3Transformer2DModel": ModelSpec(
        ("transformer_blocks.*.attn", "transformer_blocks.*.attn2"),
        image_grid,
        _suffix,
        adapter=dispatching,
        video_only=("transformer_blocks.*.attn2",),
    ),
    "WanTransformer3DModel": ModelSpec(("blocks.*.attn1",), latent_grid, adapter=dispatching),
    "WanVACETransformer3DModel": ModelSpec(("blocks.*.attn1", "vace_blocks.*.attn1"), latent_grid, adapter=dispatching),
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
    found = {name: module for name, module in transformer.named_modules() if matches(name, patterns)}
    if not found:
        raise ValueError(f"{type(transformer).__name__} must have modules at {', '.join(patterns)}; got none")
    return found


def head_size(attn: Any) -> tuple[int, int]:
    """Heads and head dimension of an attention module."""
    return attn.heads, attn.inner_dim // attn.heads


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module path is described by one of the glob patterns, part by part."""
    parts = name.split(".")
    split = (pattern.split(".") for pattern in patterns)
    return any(len(parts) == len(each) and all(map(fnmatchcase, parts, each)) for each in split)
