"""Lets another function stand in for the attention of a model that runs by a plan, for benchmarks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from paroattn.block_mask import BlockMask
from paroattn.integration import backend
from paroattn.integration.apply import hook_of
from paroattn.integration.projection import output_projection
from paroattn.kernels.reference import to_kernel_order


@dataclass(frozen=True)
class Place:
    """Where a call of attention comes from.

    Attributes:
        transformer: The model.
        hook: What its plan put on it; `hook.call` is the call that runs.
        layer: Name of the self-attention.
        attention: The operation that would have run.
    """

    transformer: Any
    hook: Any
    layer: str
    attention: Callable[..., Any]

    def w_o(self, device: torch.device) -> Tensor:
        """The layer's output projection of each head, (H, D, channels)."""
        return output_projection(self.transformer, self.layer, self.hook.layers[self.layer].attn, device=device)


def clips_of(q: Tensor, k: Tensor, v: Tensor, table: Tensor, order: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every clip's q, k and v, (heads, N, D) float32 in each head's own order, from (B, N, heads, D) in the model's."""
    queries, keys, values = (to_kernel_order(x.float(), table, order) for x in (q, k, v))
    return zip(queries, keys, values, strict=True)


Run = Callable[..., Any]
"""Called as run(place, q, k, v, mask, table=…, order=…, …) instead of `paroattn.attention` without the place."""


@contextmanager
def instead(transformer: Any, run: Run) -> Iterator[None]:
    """Let a function stand in for the attention of every layer that follows the plan on a model.

    Raises:
        ValueError: If a call has text in the sequence of the video.
    """
    attention = backend.attention

    def stand_in(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, **rest: Any) -> Any:
        if rest["text_tokens"] or rest["valid_text"] is not None:
            raise ValueError("rules choose blocks of the video alone; got text in the same sequence")
        hook: Any = hook_of(transformer)
        layer = next(name for name, each in hook.layers.items() if each.operands and each.operands.mask is mask)
        return run(Place(transformer, hook, layer, attention), q, k, v, mask, **rest)

    with patch.object(backend, "attention", stand_in):
        yield
