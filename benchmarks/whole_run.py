"""A whole run of Wan2.1-14B: python benchmarks/whole_run.py --model wan-14b-720p --steps 10 --out FILE.

What `paro generate` does after loading: a plan on diffusers' pipeline, all denoising steps with guidance, and the VAE.
Weights and prompt embeddings are random, and made on the GPU; the text encoder is left out. Compilation happens in a
forward before the run and is told apart (`first_forward_s`); `graphs_in_run` counts what was compiled in the run all
the same. After every step the GPU is waited for, and memory is read: what is allocated then must not grow, and the peak
is that of the step.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from architectures import ARCHITECTURES, CROSS_TEXT, MAIN_BLOCK, Architecture, built, plan_of
from forwards import BACKENDS, BASELINE, attending, compiled
from paroattn import Plan, apply, remove, report
from paroattn.integration.generate import Prompt, generate_clip
from records import environment, merge

OURS = "paroattn"
KEY = ("device", "model", "impl", "density", "precision", "block", "compiled", "steps", "guidance")
WAN = [name for name, model in ARCHITECTURES.items() if model.config.get("in_channels") == 16 and "wan-" in name]
STRIDE = (4, 16, 16)
"""Pixels of a token: frames (the first frame stands alone), height, width."""
SHIFT = 5.0
"""Of the noise schedule, as the 720p model has it."""
GIB = 2**30
LEAST_GROWTH = 1e-3
"""GiB that are no growth."""


@dataclass
class Steps:
    """Seconds, allocated and peak memory of every denoising step.

    Attributes:
        device: Where memory is read; zeros without a GPU.
        seconds, allocated, peak: One number for each step, GiB.
    """

    device: torch.device
    seconds: list[float] = field(default_factory=list)
    allocated: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)

    def begin(self) -> None:
        self._reset()
        self._since = time.perf_counter()

    def __call__(self) -> None:
        """A step has ended."""
        _finish(self.device)
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self.allocated.append(_gib(torch.cuda.memory_allocated, self.device))
        self.peak.append(_gib(torch.cuda.max_memory_allocated, self.device))
        self._reset()
        self._since = now

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()


def pipeline(model: Architecture, transformer: Any, device: torch.device, dtype: torch.dtype, vae: Any = None) -> Any:
    """Diffusers' pipeline around a transformer, without a text encoder; the VAE is Wan2.1's, with random weights."""
    if vae is None:
        made: Any = diffusers.AutoencoderKLWan
        with torch.device(device):
            vae = made().to(dtype)
    scheduler: Any = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    )
    nothing: Any = None
    pipe = diffusers.WanPipeline(
        tokenizer=nothing, text_encoder=nothing, vae=vae.eval().requires_grad_(False), scheduler=scheduler,
        transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeddings(model: Architecture, device: torch.device, dtype: torch.dtype) -> Prompt:
    """A prompt and a negative one, random."""
    generator = torch.Generator(device).manual_seed(3)
    size = (2, 1, CROSS_TEXT, model.config["text_dim"])
    prompt, negative = torch.randn(size, generator=generator, device=device).to(dtype)
    return Prompt("random", prompt_embeds=prompt, negative_prompt_embeds=negative)


def video_size(model: Architecture) -> dict[str, Any]:
    """Arguments of the pipeline's call that give the architecture's grid."""
    frames, height, width = model.grid
    return {
        "num_frames": (frames - 1) * STRIDE[0] + 1, "height": height * STRIDE[1], "width": width * STRIDE[2],
    }  # fmt: skip


def run(
    pipe: Any, model: Architecture, prompt: Prompt, steps: int, guidance: float
) -> tuple[Tensor, Steps, dict[str, float]]:
    """Frames, what every step took, and seconds of the run and of what follows the last step."""
    followed = Steps(pipe.device)
    began = time.perf_counter()
    followed.begin()
    frames = generate_clip(pipe, prompt, 0, steps=steps, on_step=followed, guidance_scale=guidance, **video_size(model))
    _finish(pipe.device)
    whole = time.perf_counter() - began
    decoding = whole - sum(followed.seconds)
    decoding_peak = _gib(torch.cuda.max_memory_allocated, pipe.device)
    return frames, followed, {"seconds": whole, "decoding_s": decoding, "decoding_peak_gib": decoding_peak}


def measure(
    model: Architecture, options: argparse.Namespace, device: torch.device, dtype: torch.dtype, vae: Any = None
) -> tuple[dict[str, Any], list[str]]:
    """One row, and what is wrong with it."""
    transformer = built(model, model.depth, device, dtype)
    pipe, prompt = pipeline(model, transformer, device, dtype, vae), embeddings(model, device, dtype)
    block = options.block or MAIN_BLOCK[model.head_dim]
    with ExitStack() as stack:
        stack.enter_context(attending(transformer, BACKENDS[BASELINE], {}, everywhere=options.impl != OURS))
        if options.impl == OURS:
            plan = Plan({"transformer": plan_of(transformer, model, options.density, block)})
            apply(pipe, plan, precision=options.precision, even_if_slower=True)
            stack.callback(remove, pipe)
        if not options.eager:
            stack.enter_context(compiled(transformer, model))
        first = _seconds(lambda: _forward(transformer, model, device, dtype), device)
        again = _seconds(lambda: _forward(transformer, model, device, dtype), device)
        gc.collect()
        graphs = _graphs()
        frames, steps, seconds = run(pipe, model, prompt, options.steps, options.guidance)
        executed = report(pipe).to_dict()["transformer"]["calls"] if options.impl == OURS else None
    numbers = seconds | {
        "first_forward_s": first, "forward_s": again, "step_s": statistics.median(steps.seconds[1:]),
        "first_step_s": steps.seconds[0], "graphs_in_run": _graphs() - graphs,
        "allocated_gib": _rounded(steps.allocated), "step_peak_gib": _rounded(steps.peak),
        "peak_gib": max(*steps.peak, seconds["decoding_peak_gib"]),
    }  # fmt: skip
    row = _about(model, options, device, block) | {
        name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in numbers.items()
    }
    return row, list(problems(frames, model, steps, executed, options.steps))


def problems(
    frames: Tensor, model: Architecture, steps: Steps, executed: dict[str, int] | None, wanted: int
) -> Iterator[str]:
    """What is wrong with a run of so many steps; `executed` counts calls by how they ran."""
    size = video_size(model)
    right = (size["num_frames"], 3, size["height"], size["width"])
    if frames.shape != right or not torch.isfinite(frames).all():
        yield f"frames must be finite and {right}; got {tuple(frames.shape)}"
    if len(steps.seconds) != wanted:
        yield f"{wanted} steps must run; {len(steps.seconds)} did"
    if executed is not None and set(executed) != {"sparse"}:
        yield f"every call must run by the plan; got {executed}"
    if steps.allocated[-1] > steps.allocated[1] + LEAST_GROWTH:
        yield f"memory must not grow from the second step on; got {_rounded(steps.allocated)} GiB"


def _forward(transformer: Any, model: Architecture, device: torch.device, dtype: torch.dtype) -> None:
    with torch.no_grad():
        transformer(**model.inputs(model, device, dtype), return_dict=False)


def _about(model: Architecture, options: argparse.Namespace, device: torch.device, block: str) -> dict[str, Any]:
    ours = options.impl == OURS
    return environment(device.type, "triton" if ours else None) | {
        "diffusers": diffusers.__version__, "model": model.name, "impl": options.impl,
        "density": options.density if ours else 1.0, "precision": options.precision if ours else "bf16/bf16",
        "block": block if ours else None, "compiled": not options.eager, "steps": options.steps,
        "guidance": options.guidance,
    }  # fmt: skip


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    began = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - began


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _gib(read: Callable[[], int], device: torch.device) -> float:
    return read() / GIB if device.type == "cuda" else 0.0


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in values]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=WAN, default=WAN[0])
    parser.add_argument("--impl", choices=(OURS, BASELINE), default=OURS)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--precision", default="int8/fp8")
    parser.add_argument("--block", help="QUERYxKEY")
    parser.add_argument("--eager", action="store_true", help="without regional compilation")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=5.0, help="1 runs one branch")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="result file to merge the row into")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    diffusers.utils.logging.set_verbosity_error()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    row, wrong = measure(ARCHITECTURES[options.model], options, device, dtype)
    print(json.dumps(row), *wrong, sep="\n", flush=True)
    if options.out and not wrong:
        merge(options.out, [row], KEY)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
