"""The bundled model as a diffusers pipeline: a prompt in, a clip of 16 frames out."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.utils import BaseOutput, logging
from torch import Tensor

from .conditioner import Conditioner

MODEL = Path(__file__).parent / "model"
PLAN = Path(__file__).parent / "plan"
FRAMES, HEIGHT, WIDTH = 16, 52, 72
STEPS = 24
GUIDANCE = 2.0


@dataclass
class DemoOutput(BaseOutput):
    """Clips of the bundled model.

    Attributes:
        frames: (B, F, 3, H, W) float32, in [0, 1] for output type "pt", in the model's [-1, 1] for "latent".
    """

    frames: Tensor


class DemoPipeline(DiffusionPipeline):
    """Generates clips in pixel space with a small Wan transformer; there is no VAE and no text encoder."""

    model_cpu_offload_seq = "conditioner->transformer"
    transformer: Any
    scheduler: Any
    conditioner: Any
    progress_bar: Any

    def __init__(
        self, transformer: WanTransformer3DModel, scheduler: FlowMatchEulerDiscreteScheduler, conditioner: Conditioner
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, conditioner=conditioner)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = STEPS,
        guidance_scale: float = GUIDANCE,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pt",
        num_frames: int = FRAMES,
        height: int = HEIGHT,
        width: int = WIDTH,
        callback_on_step_end: Callable[[Any, int, Tensor, dict], Any] | None = None,
    ) -> DemoOutput:
        """Generate one clip per prompt.

        Args:
            prompt: In the words of `demo.prompt`, such as "a red disc moving right over coffee, camera pans left".
            num_inference_steps: Steps of the scheduler.
            guidance_scale: Classifier-free guidance; 1 turns it off and halves the time.
            generator: One for all clips, or one per clip.
            output_type: "pt" for frames in [0, 1], "latent" for the model's own values.
            num_frames, height, width: Of a clip, sizes in pixels. The model was trained on the defaults alone; others
                show what a plan does there, not what the model can do.
            callback_on_step_end: Called after every step as in other diffusers pipelines; its result is ignored.

        Raises:
            ValueError: If a prompt uses unknown words, or an argument is out of range.
        """
        if output_type not in ("pt", "latent"):
            raise ValueError(f"output_type must be pt or latent; got {output_type!r}")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be 1 or more; got {num_inference_steps}")
        size = (num_frames, height, width)
        longest = self.transformer.config.rope_max_seq_len  # tokens along an axis that the model's positions reach
        for name, length, patch in zip(("num_frames", "height", "width"), size, self._patch, strict=True):
            if length % patch or not 0 < length <= patch * longest:
                raise ValueError(f"{name} must be a multiple of {patch}, {patch * longest} at most; got {length}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("at least one prompt is needed; got none")
        device, dtype = self.transformer.device, self.transformer.dtype
        wanted = self.conditioner.encode(prompts).to(dtype)
        unguided = self.conditioner.encode([""] * len(prompts)).to(dtype)
        clips = self._noise(len(prompts), size, generator).to(device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            when = timestep.expand(len(prompts))
            with self.transformer.cache_context("cond"):
                velocity = self.transformer(clips.to(dtype), when, wanted, return_dict=False)[0]
            if guidance_scale != 1:
                with self.transformer.cache_context("uncond"):
                    plain = self.transformer(clips.to(dtype), when, unguided, return_dict=False)[0]
                velocity = plain + guidance_scale * (velocity - plain)
            clips = self.scheduler.step(velocity.float(), timestep, clips, return_dict=False)[0]
            if callback_on_step_end is not None:
                callback_on_step_end(self, step, timestep, {"latents": clips})
        self.maybe_free_model_hooks()
        frames = clips.transpose(1, 2)
        return DemoOutput(frames=frames if output_type == "latent" else frames.clamp(-1, 1) / 2 + 0.5)

    @property
    def _patch(self) -> tuple[int, int, int]:
        return tuple(self.transformer.config.patch_size)

    def _noise(
        self, clips: int, size: tuple[int, int, int], generator: torch.Generator | Sequence[torch.Generator] | None
    ) -> Tensor:
        shape = (3, *size)
        generators = list(generator) if isinstance(generator, Sequence) else [generator] * clips
        if len(generators) != clips:
            raise ValueError(f"{clips} prompts need one generator or {clips}; got {len(generators)}")
        drawn = [
            torch.randn(shape, generator=one, device=one.device if one is not None else "cpu").cpu()
            for one in generators
        ]
        return torch.stack(drawn)


def load_demo(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, *, model: Path = MODEL
) -> DemoPipeline:
    """The bundled pipeline with its weights, ready to use; or one like it, from the folder that training wrote."""
    settings = {} if dtype == torch.float32 else {"torch_dtype": dtype}
    with _quiet():
        transformer = WanTransformer3DModel.from_pretrained(model / "transformer", **settings)
        conditioner = Conditioner.from_pretrained(model / "conditioner", **settings)
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_pretrained(model / "scheduler")
    pipe = DemoPipeline(transformer, scheduler, conditioner).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of diffusers' loader, which takes no time here."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def weights_sha256(model: Path = MODEL) -> str:
    """SHA-256 over a model's weights, file by file in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(model.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
