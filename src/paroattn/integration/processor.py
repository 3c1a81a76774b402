"""Attention processors that follow a plan: each layer's own, subclassed on the fly.

Projections, norms, RoPE and the output projection stay diffusers' own code; the subclass only names the backend and
lets the layer ride along.
"""

import copy
import functools
from typing import Any

from diffusers.hooks._helpers import AttentionProcessorRegistry

from .backend import Layer, paro_backend

_SLOTS = ("_attention_backend", "_parallel_config")


def planned_processor(layer: Layer, adapter: Any = None) -> Any:
    """A fresh processor for one layer, in place of its own.

    Raises:
        ValueError: If the layer's processor does not go through diffusers' attention dispatcher.
    """
    base = adapter(layer.original) if adapter else layer.original
    if not all(hasattr(base, slot) for slot in _SLOTS):
        raise ValueError(
            f"{layer.name}: the processor must call diffusers' attention dispatcher; got {type(base).__name__}, which "
            "does not. Give the model's ModelSpec an adapter."
        )
    processor = copy.copy(base)
    for slot in _SLOTS:
        vars(processor).pop(slot, None)
    processor.__class__ = _planned_class(type(base))
    processor._paro_layer, processor._paro_runs = layer, False
    return processor


@functools.cache
def _planned_class(cls: type) -> type:
    """The class with both slots taken: what diffusers puts into them is for the layer's own processor."""

    # diffusers drops keyword arguments (RoPE among them) that it does not find in the signature, so `wraps` matters.
    @functools.wraps(cls.__call__)
    def __call__(self, *args, **kwargs):
        self._paro_runs = True
        try:
            return cls.__call__(self, *args, **kwargs)
        finally:
            self._paro_runs = False

    def parallel_config(self):
        layer = self._paro_layer
        return layer if self._paro_runs else getattr(layer.original, "_parallel_config", None)

    def pass_on(slot):
        return lambda self, value: setattr(self._paro_layer.original, slot, value)

    backend = paro_backend()
    slots = {
        "_attention_backend": property(lambda self: backend, pass_on("_attention_backend")),
        "_parallel_config": property(parallel_config, pass_on("_parallel_config")),
    }
    planned = type(f"Paro{cls.__name__}", (cls,), {"__call__": __call__, **slots})
    _allow_layer_skip(planned, cls)
    return planned


def _allow_layer_skip(planned: type, cls: type) -> None:
    try:
        AttentionProcessorRegistry.register(planned, AttentionProcessorRegistry.get(cls))
    except ValueError:  # diffusers cannot skip this kind of layer either
        return
