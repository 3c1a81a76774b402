"""Norm over all heads and rotary embedding of q and k, as Wan does both before attention, in one pass over memory.

To compilers a row's norm and its rotation are two loops, so that they go through memory more than once.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

NAME = "paroattn::norm_rotate"


def fusable(x: Tensor, weights: tuple[Tensor, Tensor], rotations: tuple[Tensor, Tensor]) -> bool:
    """Whether the kernel can: 16-bit rows and norms on a GPU, float32 rotations, no autocast or gradient."""
    alike = all(weight.device == x.device and weight.dtype == x.dtype for weight in weights)
    single = all(rotation.dtype == torch.float32 for rotation in rotations)
    plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cuda")
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and alike and single and plain


def norm_rotate(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cosines: Tensor, sines: Tensor, *, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Root mean square norm of whole rows, then rotation of neighbouring channels within every head.

    Both results are rounded to the tensors' dtype, as they are where each is an operation of its own.

    Args:
        q: (B, N, H·D), bfloat16 or float16; channels lie side by side.
        k: Like q.
        q_weight: (H·D,) of the norm.
        k_weight: Like `q_weight`.
        cosines: (N, D) float32; those of even channels are used for both of a pair, as diffusers does.
        sines: Like `cosines`; those of odd channels are used.
        heads: H.
        eps: Added to the mean square.

    Returns:
        q and k as (B, N, H, D).

    Raises:
        ValueError: If shapes do not fit each other.
    """
    _, tokens, channels = q.shape
    wanted = {"k": (k, q.shape), "q_weight": (q_weight, (channels,)), "k_weight": (k_weight, (channels,))}
    rotations = (tokens, channels // heads)
    wanted |= {"cosines": (cosines, rotations), "sines": (sines, rotations)}
    for name, (x, shape) in wanted.items():
        if x.shape != shape:
            raise ValueError(
                f"{name} must be {tuple(shape)} for q {tuple(q.shape)} and {heads} heads; got {tuple(x.shape)}"
            )
    return torch.ops.paroattn.norm_rotate(q, k, q_weight, k_weight, cosines, sines, heads, eps)


def reference_norm_rotate(x: Tensor, weight: Tensor, cosines: Tensor, sines: Tensor, heads: int, eps: float) -> Tensor:
    """What the kernel computes of q or k, as (B, N, H, D), in plain PyTorch."""
    normal = torch.nn.functional.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
    first, second = normal.unflatten(-1, (heads, -1, 2)).unbind(-1)
    cosines, sines = cosines[:, None, 0::2], sines[:, None, 1::2]
    parts = (first * cosines - second * sines, first * sines + second * cosines)
    return torch.stack(parts, -1).flatten(-2).to(x.dtype)


def _norm_rotate(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cosines: Tensor, sines: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    kernel: Any = import_module(".rotary_kernel", __package__)
    return kernel.norm_rotate(q, k, q_weight, k_weight, cosines, sines, heads, eps)


def _fake(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cosines: Tensor, sines: Tensor, heads: int, eps: float
):
    shape = (*q.shape[:2], heads, q.shape[2] // heads)
    return q.new_empty(shape), k.new_empty(shape)


torch.library.define(
    NAME,
    "(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cosines, Tensor sines, int heads, float eps) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl(NAME, "default")(_norm_rotate)
torch.library.register_fake(NAME)(_fake)
