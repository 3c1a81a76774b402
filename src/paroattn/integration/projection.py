"""Reads the output projection of each head out of whatever form a model keeps it in."""

from typing import Any

import torch
from torch import Tensor, nn

LOUD = 1024
"""Input that makes a weight much larger than the bias beside it, which 16-bit numbers would round away."""


def output_projection(
    transformer: nn.Module,
    layer: str,
    attention: Any,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """Output projection of each head for the video, (H, D, channels).

    Blocks with one stream project attention and feed-forward together, attention first. Weights in a quantised form are
    read through the layer, in `dtype`. Weights that are elsewhere at the moment are brought.

    Args:
        transformer: The model.
        layer: Module path of the attention.
        attention: The attention.
        dtype: Of weights that must be read through the layer.
        device: Where the result should be; by default where the weights are.

    Raises:
        ValueError: If the weights cannot be read.
    """
    projection: Any = getattr(attention, "to_out", None)
    if projection is None:
        projection = transformer.get_submodule(layer.rpartition(".")[0]).proj_out
    if isinstance(projection, nn.ModuleList | nn.Sequential):
        projection = projection[0]
    weight: Any = projection.weight
    if weight.is_meta:
        weight = _offloaded(projection)
    where: torch.device = device or weight.device
    if type(weight) not in (Tensor, nn.Parameter) or weight.ndim != 2 or not weight.is_floating_point():
        weight = _through(projection, attention.inner_dim, where, dtype)
    return weight.detach().to(where)[:, : attention.inner_dim].mT.unflatten(0, (attention.heads, -1))


def _offloaded(linear: nn.Module) -> Tensor:
    """The weight that accelerate's hook loads when the layer runs."""
    hook: Any = getattr(linear, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "weights_map", None) is not None:
            return each.weights_map["weight"]
    raise ValueError("the output projection's weights must be readable; this layer's are on no device")


@torch.no_grad()
def _through(linear: Any, inputs: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Weights of the first inputs, (channels, inputs), from what a layer makes of each alone."""
    unit = torch.eye(inputs, linear.in_features, device=device, dtype=dtype)
    return ((linear(unit * LOUD) - linear(torch.zeros_like(unit[:1]))) / LOUD).mT
