"""How good is a token order for a head, and how much does a block matter.

Order scores are (orders, heads), lower is better. Block scores are (orders, heads, Nq, Nk), higher is kept first.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..capture import Statistics

ALPHA = 0.5


def paper_order_score(statistics: Statistics, layer: str, density: float) -> Tensor:
    """α (1 − M_sparse)/Σ + (1 − α) M_quant/Σ, each summed over the candidate orders; α = 0.5.

    The paper prints M_sparse without "1 −", which would prefer the order with fewer sparse blocks.

    Source:
        PAROAttention (arXiv 2506.16054), selection of the reordering plan. α is not published.
    """
    dense = 1 - statistics.mean(layer, "sparse_share")
    incoherence = statistics.mean(layer, "incoherence")
    parts = ((ALPHA, dense), (1 - ALPHA, incoherence))
    return torch.stack([weight * part / part.sum(0).clamp_min(1e-12) for weight, part in parts]).sum(0)


def mass_order_score(statistics: Statistics, layer: str, density: float) -> Tensor:
    """Attention mass outside the heaviest blocks that the density allows."""
    return _smallest(statistics.mean(layer, "mass"), density)


def error_order_score(statistics: Statistics, layer: str, density: float) -> Tensor:
    """Output error of dropping all blocks but those that the density allows."""
    return _smallest(statistics.mean(layer, "error"), density)


def mass_block_score(statistics: Statistics, layer: str, levels: list[float], device: str = "cpu") -> Tensor:
    """Post-softmax attention inside each block, as the paper scores blocks."""
    return statistics.mean(layer, "mass", levels, device)


def error_block_score(statistics: Statistics, layer: str, levels: list[float], device: str = "cpu") -> Tensor:
    """Output error that dropping each block causes."""
    return statistics.mean(layer, "error", levels, device)


def _smallest(score: Tensor, density: float) -> Tensor:
    """Sum of each head's lowest block scores, all but the share `density`."""
    flat = score.flatten(-2)
    dropped = round(flat.shape[-1] * (1 - density))
    return flat.sort(-1).values[..., :dropped].sum(-1)


ORDER_SCORES: dict[str, Callable[[Statistics, str, float], Tensor] | None] = {
    "none": None,
    "paper": paper_order_score,
    "mass": mass_order_score,
    "output_error": error_order_score,
}
MASK_SCORES: dict[str, Callable[[Statistics, str, list[float], str], Tensor]] = {
    "mass": mass_block_score,
    "output_error": error_block_score,
}
