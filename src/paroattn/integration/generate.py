"""Runs any pipeline for one clip, the same way for calibration, generation and evaluation."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def generate_clip(
    pipe: Any,
    prompt: str,
    seed: int,
    *,
    steps: int | None = None,
    on_step: Callable[[], None] | None = None,
    **call: Any,
) -> Tensor:
    """Generate one clip.

    Args:
        pipe: A diffusers pipeline that makes videos, or images, which count as clips of one frame.
        prompt: What to show.
        seed: Of the noise, drawn on the CPU so that every device starts from the same.
        steps: Number of inference steps; the pipeline's own by default.
        on_step: Called after every step, where the pipeline allows it.
        call: Passed on to the pipeline.

    Returns:
        (F, 3, H, W) float32 on the CPU, in [-1, 1].
    """
    output = run(pipe, prompt, seed, steps=steps, on_step=on_step, output_type="pt", **call)
    frames = output.frames[0] if hasattr(output, "frames") else output.images[:1]
    return frames.float().cpu() * 2 - 1


def run(
    pipe: Any,
    prompt: str,
    seed: int,
    *,
    steps: int | None = None,
    on_step: Callable[[], None] | None = None,
    **call: Any,
) -> Any:
    """Call the pipeline with a seed; arguments it does not know are an error, except the output type."""
    known = inspect.signature(pipe.__call__).parameters
    unknown = [name for name in call if name not in known and name != "output_type"]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        raise ValueError(f"{type(pipe).__name__} has no argument {', '.join(unknown)}; it has {', '.join(known)}")
    call = {name: value for name, value in call.items() if name in known or name != "output_type"}
    if steps is not None:
        call["num_inference_steps"] = steps
    if on_step is not None and "callback_on_step_end" in known:
        call["callback_on_step_end"] = lambda pipe, step, timestep, tensors: on_step() or {}
    return pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), **call)
