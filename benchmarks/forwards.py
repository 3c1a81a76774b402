"""How a transformer's forward runs: dense attention kernels, regional compilation, a step cache, FP8 linear layers."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry
from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from architectures import Architecture, Inputs
from paroattn.integration.adapters import dispatching
from paroattn.integration.models import self_attentions
from peers import wanted

BASELINE = "cudnn"
MASK = "encoder_attention_mask"
COMPILE: dict[str, Any] = {}
"""Arguments of torch.compile."""
LEAST_FEATURES = 256
"""Linear layers with fewer in- or outputs stay as they are."""


@dataclass(frozen=True)
class Backend:
    """How diffusers is told to attend densely.

    Attributes:
        name: Of diffusers' backend.
        sdpa: The same for models that call PyTorch's attention themselves.
        precision: Formats of the two products, QK/PV.
        module: What must be installed.
    """

    name: str
    sdpa: SDPBackend | None
    precision: str
    module: str | None = None


BACKENDS = {
    BASELINE: Backend("_native_cudnn", SDPBackend.CUDNN_ATTENTION, "bf16/bf16"),
    "sage2": Backend("sage", None, "int8/fp8", "sageattention"),
}


@contextmanager
def attending(transformer: Any, backend: Backend, inputs: Inputs, *, everywhere: bool) -> Iterator[None]:
    """Let a transformer attend through a backend; `everywhere`: in layers that a plan would cover too.

    Processors that call PyTorch's attention themselves are told through PyTorch, or, where it does not have the kernel,
    changed for ones that use diffusers' dispatcher. Where all text is real, a mask over it is left out: that is the
    same computation, and a mask takes the fast kernels away.
    """
    if backend.module is not None:
        wanted(backend.module)
    layers = self_attentions(transformer) if everywhere else {}
    original = {name: attn.processor for name, attn in layers.items()}
    for attn in layers.values():
        direct = not hasattr(attn.processor, "_attention_backend")
        if direct and backend.sdpa is None:
            attn.processor = dispatching(attn.processor)
        if MASK in inputs and not direct:
            attn.processor = _unmasked(attn.processor)
    try:
        transformer.set_attention_backend(backend.name)
        with sdpa_kernel(backend.sdpa) if backend.sdpa and _any_direct(layers) else nullcontext():
            yield
    finally:
        transformer.reset_attention_backend()
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
        for name, attn in layers.items():
            attn.processor = original[name]


def _any_direct(layers: dict[str, Any]) -> bool:
    return any(not hasattr(attn.processor, "_attention_backend") for attn in layers.values())


def _unmasked(processor: Any) -> Any:
    """A processor like this one that attends without a mask."""
    made = copy.copy(processor)
    made.__class__ = _unmasked_class(type(processor))
    return made


@functools.cache
def _unmasked_class(cls: type) -> type:
    place = list(inspect.signature(cls.__call__).parameters).index("attention_mask") - 1

    @functools.wraps(cls.__call__)
    def __call__(self, *args, **kwargs):
        if len(args) > place:
            args = (*args[:place], None, *args[place + 1 :])
        else:
            kwargs["attention_mask"] = None
        return cls.__call__(self, *args, **kwargs)

    return type(f"Unmasked{cls.__name__}", (cls,), {"__call__": __call__})


@contextmanager
def compiled(transformer: Any, model: Architecture) -> Iterator[None]:
    """Regional compilation: diffusers' own, or of the repeated blocks where it names none."""
    try:
        if getattr(transformer, "_repeated_blocks", None):
            transformer.compile_repeated_blocks(**COMPILE)
        else:
            for block in repeated(transformer, model):
                block.compile(**COMPILE)
        yield
    finally:
        for module in transformer.modules():
            if module._compiled_call_impl is not None:
                module._compiled_call_impl = None


@contextmanager
def caching(
    transformer: Any, model: Architecture, compile_blocks: bool, forward: Callable[[], Any]
) -> Iterator[Callable[[], Any]]:
    """First-block cache; the call is a step that computes and one that does not."""
    blocks = repeated(transformer, model)
    if compile_blocks:  # below the cache's hooks, which would be compiled anew for every block
        for block in blocks:
            block.forward = torch.compile(block.forward, **COMPILE)
    transformer.enable_cache(FirstBlockCacheConfig())
    leader: Any = HookRegistry.check_if_exists_or_initialize(blocks[0]).get_hook(_FBC_LEADER_BLOCK_HOOK)

    def call() -> Any:
        with transformer.cache_context("cond"):
            leader.threshold = -1.0  # the change from step to step is above
            forward()
            leader.threshold = float("inf")
            return forward()

    try:
        yield call
    finally:
        transformer.disable_cache()
        for block in blocks:
            vars(block).pop("forward", None)


def repeated(transformer: Any, model: Architecture) -> list[nn.Module]:
    """All repeated blocks in the order in which they run."""
    return [block for name in model.blocks for block in getattr(transformer, name)]


def fp8_linears(transformer: Any, model: Architecture) -> None:
    """Quantise the blocks' linear layers for good: weights and activations to FP8, one scale per row.

    Layers of the modulation, which see one row per batch element, stay as they are.

    Raises:
        Missing: If torchao is not installed.
    """
    quantization = wanted("torchao.quantization")
    config = quantization.Float8DynamicActivationFloat8WeightConfig(
        granularity=quantization.PerRow(), set_inductor_config=False
    )

    def chosen(module: nn.Module, name: str) -> bool:
        large = isinstance(module, nn.Linear) and min(module.weight.shape) >= LEAST_FEATURES
        return large and not any("norm" in part for part in name.split("."))

    for block in repeated(transformer, model):
        quantization.quantize_(block, config, filter_fn=chosen)
