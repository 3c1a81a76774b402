"""What must hold before a forward is timed: attention by a plan that keeps every block is that of stock diffusers."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from architectures import MAIN_BLOCK, Architecture, Inputs, first_blocks, only, plan_of, planned_layers
from paroattn import apply, remove, report
from paroattn.integration.models import self_attentions
from paroattn.kernels.attention import OWN_PRECISION

LARGEST_ERROR = 0.02
"""Of a self-attention's output, projection included: the norm of the difference to stock over the norm of stock."""
SHARPER = 4.0
"""What norms of q are multiplied by before outputs are compared: random weights attend to everything alike, and a token
in the wrong place would change little."""


ON_GPU = {"triton", "native", "sm90"}
"""Implementations that are kernels of this project."""


class Wrong(Exception):
    """An output is not what it should be."""


def attention_error(transformer: Any, model: Architecture, inputs: Inputs, impl: str = "auto") -> float:
    """Largest relative error, over self-attentions of one block of each kind, of a plan that keeps all, to stock.

    Both see the same inputs: those of the stock model. Its norms of q are made sharper meanwhile.
    """
    seen: dict[str, tuple[Any, Any, Any]] = {}
    errors: list[float] = []

    def see(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs, out: seen.update({name: (args, kwargs, out)})

    def repeat(name: str) -> Callable[..., Any]:
        return lambda module, args, kwargs: seen[name][:2]

    def compare(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            errors.extend(relative_error(a, b) for a, b in zip(_tensors(out), _tensors(seen[name][2]), strict=True))

        return hook

    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(only(transformer, first_blocks(transformer, model, (1,) * len(model.blocks))))
        layers = self_attentions(transformer)
        stack.enter_context(_sharper(layers.values()))
        with ExitStack() as hooks:
            for name, attn in layers.items():
                hooks.callback(attn.register_forward_hook(see(name), with_kwargs=True).remove)
            transformer(**inputs)
        plan = plan_of(transformer, model, 1.0, MAIN_BLOCK[model.head_dim])
        precision = OWN_PRECISION[inputs["hidden_states"].dtype]
        apply(transformer, plan, impl=impl, precision=precision, even_if_slower=True)
        stack.callback(remove, transformer)
        for name, attn in layers.items():
            stack.callback(attn.register_forward_pre_hook(repeat(name), with_kwargs=True).remove)
            stack.callback(attn.register_forward_hook(compare(name), with_kwargs=True).remove)
        transformer(**inputs)
    return max(errors, key=lambda error: error if error == error else float("inf"))


@contextmanager
def _sharper(layers: Iterable[Any]) -> Iterator[None]:
    """Larger norms of q, `SHARPER` times, a power of two, so that they come back exactly."""
    norms = [getattr(attn, name, None) for attn in layers for name in ("norm_q", "norm_added_q")]
    weights = [norm.weight for norm in norms if norm is not None]
    for weight in weights:
        weight.mul_(SHARPER)
    try:
        yield
    finally:
        for weight in weights:
            weight.div_(SHARPER)


def relative_error(found: Tensor, right: Tensor) -> float:
    """Norm of the difference over the norm of what is right."""
    return ((found.float() - right.float()).norm() / right.float().norm()).item()


def _tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [each for each in out if each is not None]


def check_output(out: Tensor, inputs: Inputs) -> None:
    """Every model here returns what it is given, denoised.

    Raises:
        Wrong: If the output has another shape or is not finite.
    """
    if out.shape != inputs["hidden_states"].shape:
        raise Wrong(f"the output must be {tuple(inputs['hidden_states'].shape)}; got {tuple(out.shape)}")
    if not torch.isfinite(out).all():
        raise Wrong("the output is not finite")


def check_what_ran(transformer: Any, device: torch.device) -> None:
    """On a GPU, every planned layer must have run on its kernels, and by its plan alone.

    Raises:
        Wrong: If one did not.
    """
    layers = report(transformer).to_dict()["transformer"]["layers"]
    for name in planned_layers(transformer):
        ran, fell_back = {phase["impl"] for phase in layers[name]["phases"]}, layers[name]["dense_calls"]
        if device.type == "cuda" and (not ran or not ran <= ON_GPU or fell_back):
            why = f"{', '.join(map(str, ran))}; dense calls: {fell_back or 'none'}"
            raise Wrong(f"{name} must run on kernels and never dense; ran by {why}")
