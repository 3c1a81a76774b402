"""The noise level of the running step, without a device synchronisation per step.

A noise level is σ for flow matching and √(1−ᾱ) for variance-preserving schedulers. The scheduler's table is read once
per run; the step comes from the pipeline's cache context, from the scheduler, or from counting calls.
"""

from typing import Any

import torch


def noise_levels(scheduler: Any) -> list[float] | None:
    """Noise level of every step of the scheduler's current schedule, or None if its kind is not known.

    Flow-matching schedulers have σ from 1 to 0 and no ᾱ; every other σ is √((1−ᾱ)/ᾱ).
    """
    timesteps, sigmas = getattr(scheduler, "timesteps", None), getattr(scheduler, "sigmas", None)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if timesteps is None or getattr(scheduler, "num_inference_steps", None) is None:
        return None
    if sigmas is not None:
        sigmas = torch.as_tensor(sigmas).double().cpu()[: len(timesteps)]
        if scheduler.config.get("use_flow_sigmas") or (alphas is None and sigmas.max() <= 1):
            return (1 - sigmas if scheduler.config.get("invert_sigmas") else sigmas).tolist()
        return (sigmas / (1 + sigmas**2).sqrt()).tolist()
    if alphas is not None:
        return (1 - alphas.double().cpu()[timesteps.long().cpu()]).sqrt().tolist()
    return None


class NoiseSchedule:
    """Follows a pipeline's scheduler from step to step.

    Attributes:
        given: Noise level set by hand; it wins until it is reset.
    """

    def __init__(self, pipeline: Any = None):
        self.pipeline = pipeline
        self.reset()

    def __deepcopy__(self, memo: dict) -> "NoiseSchedule":
        # A copied pipeline brings its own scheduler; a transformer copied alone has none.
        return NoiseSchedule(memo.get(id(self.pipeline)))

    def reset(self) -> None:
        self.given: float | None = None
        self._timesteps = None
        self._levels: list[float] | None = None
        self._counted, self._calls = None, 0

    def level(self, context: Any) -> float | None:
        """Noise level of the call that is about to run, or None if nothing tells.

        Args:
            context: diffusers' cache context of the call, or its name, or None.
        """
        scheduler = getattr(self.pipeline, "scheduler", None)
        if self.given is not None or scheduler is None:
            return self.given
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is not self._timesteps:  # every run makes a new table
            self._timesteps, self._levels = timesteps, noise_levels(scheduler)
            self._counted, self._calls = branch_of(context), 0
        self._calls += branch_of(context) == self._counted
        step = self._step(scheduler, context)
        return self._levels[step] if self._levels is not None and step < len(self._levels) else None

    def _step(self, scheduler: Any, context: Any) -> int:
        first = getattr(scheduler, "begin_index", None) or 0
        step = getattr(context, "step_index", None)
        if step is not None:
            return first + step
        if hasattr(scheduler, "step_index"):
            return first if scheduler.step_index is None else scheduler.step_index
        return self._calls - 1


def branch_of(context: Any) -> str | None:
    """Name of a cache context, such as "cond" or "uncond"; diffusers before 0.41 has only the name."""
    return getattr(context, "name", context)
