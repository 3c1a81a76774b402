"""Runs any pipeline for one clip, the same way for calibration, generation and evaluation."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

EMBEDDINGS = "prompt_embeds"


class Prompt(str):
    """A prompt with arguments of its own, such as a picture to start from, or embeddings instead of its words.

    It is a string wherever prompts are strings; only the pipeline's call sees the rest. Given `prompt_embeds`, the
    words are a name for people and the pipeline gets none.

    Attributes:
        arguments: More arguments of the pipeline's call, which win over those given for all prompts.
    """

    arguments: dict[str, Any]

    def __new__(cls, text: str, **arguments: Any) -> "Prompt":
        prompt = super().__new__(cls, text)
        prompt.arguments = arguments
        return prompt


def generate_clip(
    pipe: Any,
    prompt: str,
    seed: int,
    *,
    steps: int | None = None,
    on_step: Callable[[], None] | None = None,
    on_latents: Callable[[Tensor], None] | None = None,
    **call: Any,
) -> Tensor:
    """Generate one clip.

    Args:
        pipe: A diffusers pipeline that makes videos, or images, which count as clips of one frame.
        prompt: What to show; a `Prompt` brings arguments of its own.
        seed: Of the noise, drawn on the CPU so that every device starts from the same.
        steps: Number of inference steps; the pipeline's own by default.
        on_step: Called after every step, where the pipeline allows it.
        on_latents: Called with the latents after every step, likewise.
        call: Passed on to the pipeline.

    Returns:
        (F, 3, H, W) float32 on the CPU, in [-1, 1]; several images or videos for one prompt follow one another.

    Raises:
        ValueError: If the pipeline does not know an argument.
    """
    output = run(pipe, prompt, seed, steps=steps, on_step=on_step, on_latents=on_latents, output_type="pt", **call)
    frames = output.frames.flatten(0, 1) if hasattr(output, "frames") else output.images
    return frames.float().cpu() * 2 - 1


def run(
    pipe: Any,
    prompt: str,
    seed: int,
    *,
    steps: int | None = None,
    on_step: Callable[[], None] | None = None,
    on_latents: Callable[[Tensor], None] | None = None,
    **call: Any,
) -> Any:
    """Call the pipeline with a seed; arguments it does not know are an error, except the output type."""
    call |= getattr(prompt, "arguments", {})
    known = check_call(pipe, call)
    call = {n: _placed(n, value, pipe) for n, value in call.items() if n in known or n != "output_type"}
    if steps is not None:
        call["num_inference_steps"] = steps
    if (on_step or on_latents) and "callback_on_step_end" in known:
        call["callback_on_step_end"] = partial(_after_step, on_step, on_latents)
    words = None if call.get(EMBEDDINGS) is not None else str(prompt)
    return pipe(prompt=words, generator=torch.Generator().manual_seed(seed), **call)


def check_call(pipe: Any, call: Mapping[str, Any]) -> Mapping[str, inspect.Parameter]:
    """Check that a pipeline's call takes these arguments, and say which it takes; it need not take an output type.

    Raises:
        ValueError: If it does not.
    """
    known = inspect.signature(pipe.__call__).parameters
    unknown = [name for name in call if name not in known and name != "output_type"]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        raise ValueError(
            f"{type(pipe).__name__} has no argument {', '.join(unknown)}; it has {', '.join(known)}. Leave it out, or "
            "check the name."
        )
    return known


def _after_step(
    on_step: Callable[[], None] | None, on_latents: Callable[[Tensor], None] | None, pipe: Any, step: int,
    timestep: Any, tensors: Mapping[str, Any],
) -> dict:  # fmt: skip
    """What a pipeline calls after every step; it takes what is returned for its own."""
    if on_step is not None:
        on_step()
    if on_latents is not None and isinstance(tensors.get("latents"), Tensor):
        on_latents(tensors["latents"])
    return {}


def _placed(name: str, value: Any, pipe: Any) -> Any:
    """Tensors where the pipeline runs, and embeddings in the transformer's dtype; not every pipeline does so itself."""
    if not isinstance(value, Tensor):
        return value
    transformer = getattr(pipe, "transformer", None) or getattr(pipe, "transformer_2", None)
    cast = "embeds" in name and value.is_floating_point()
    dtype = getattr(transformer, "dtype", value.dtype) if cast else value.dtype
    return value.to(getattr(pipe, "_execution_device", pipe.device), dtype)
