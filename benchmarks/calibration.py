"""Time, memory and disk of calibrating a large model: python benchmarks/calibration.py [--model wan-14b-720p].

A transformer with a few of the model's layers and random weights runs the whole calibration, as `paroattn.calibrate`
does it: the run that orders are chosen from, the runs that masks are made from, statistics on disk, and the plan. A run
of the pipeline without calibration says what of that are forwards. What a layer takes is then multiplied by the model's
layers. Random weights do not change the time: every query row meets every key.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.utils import BaseOutput

from paroattn.block_mask import parse_block
from paroattn.capture import CaptureSettings
from paroattn.grid import Grid
from paroattn.integration.calibrate import collect, needed_by, save_statistics
from paroattn.integration.collecting import Economy
from paroattn.plan.plan import Plan
from paroattn.plan.search import PlanSettings, make_plan
from records import environment, merge

RESULT = Path(__file__).parent / "results" / "calibration_h200.json"
KEY = ("device", "model", "block", "prompts", "steps", "maps", "layers_measured")
TEXT = 512
PROMPTS = ("a cat walks over the grass", "waves break at a rocky shore at night", "a train", "a city from above")
GUIDANCE = 5.0


@dataclass(frozen=True)
class Model:
    """A Wan transformer at one size of video."""

    layers: int
    heads: int
    head_dim: int
    ffn_dim: int
    grid: Grid


MODELS = {
    "wan-14b-720p": Model(40, 40, 128, 13824, Grid(21, 45, 80)),
    "wan-14b-480p": Model(40, 40, 128, 13824, Grid(21, 30, 52)),
    "wan-1.3b-480p": Model(30, 12, 128, 8960, Grid(21, 30, 52)),
    "tiny": Model(3, 2, 64, 64, Grid(3, 7, 10)),
}


class Pipeline(DiffusionPipeline):
    """Denoises random latents with guidance, in two calls a step; the prompt is its length."""

    def __init__(self, transformer: Any, scheduler: Any, model: Model):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.model = model

    @torch.no_grad()
    def __call__(self, prompt: str, num_inference_steps: int, generator: torch.Generator) -> Any:
        transformer: Any = self.transformer
        device, dtype = transformer.device, transformer.dtype
        frames, height, width = self.model.grid
        latents = torch.randn(1, 16, frames, 2 * height, 2 * width, generator=generator).to(device)
        drawn = torch.Generator().manual_seed(len(prompt))
        texts = {name: torch.randn(1, TEXT, 64, generator=drawn).to(device, dtype) for name in ("cond", "uncond")}
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for timestep in self.scheduler.timesteps:
            found = {}
            for name, text in texts.items():
                with transformer.cache_context(name):
                    found[name] = transformer(latents.to(dtype), timestep.expand(1), text, return_dict=False)[0]
            velocity = found["uncond"] + GUIDANCE * (found["cond"] - found["uncond"])
            latents = self.scheduler.step(velocity.float(), timestep, latents, return_dict=False)[0]
        return BaseOutput(frames=latents)


def pipeline(model: Model, layers: int, device: str) -> Pipeline:
    """The model's first layers with random weights."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            transformer = WanTransformer3DModel(
                num_attention_heads=model.heads, attention_head_dim=model.head_dim, ffn_dim=model.ffn_dim,
                num_layers=layers, text_dim=64,
            )  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)
    transformer = transformer.eval().requires_grad_(False)
    return Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=5.0), model)


def seconds(call: Callable[[], Any], device: str) -> tuple[Any, float, int]:
    """What a call returns, the seconds it takes, and the most memory of the GPU at any moment."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = call()
    if cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - began, torch.cuda.max_memory_allocated() if cuda else 0


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """A result row."""
    model, device = MODELS[name], args.device
    layers, scale = min(args.layers, model.layers), model.layers / min(args.layers, model.layers)
    pipe, economy = pipeline(model, layers, device), Economy(maps=args.maps, order_steps=args.order_steps)
    settings, prompts = PlanSettings(args.density), PROMPTS[: args.prompts]
    capture: CaptureSettings = needed_by(settings, block=parse_block(args.block))

    def calibrated(folder: Path) -> Any:
        return collect(
            pipe, list(prompts), steps=args.steps, capture=capture, settings=settings, exact=False, economy=economy,
            journal=folder, progress=lambda done: None,
        )  # fmt: skip

    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        pipe(PROMPTS[0], 1, torch.Generator().manual_seed(0))
        warm = Economy(maps=1, order_steps=1)
        collect(
            pipe, "warm", steps=1, capture=capture, exact=False, economy=warm, journal=Path(scratch) / "warm",
            progress=lambda done: None,
        )  # fmt: skip
        _, one_run, before = seconds(lambda: pipe(PROMPTS[0], args.steps, torch.Generator().manual_seed(0)), device)
        found, whole, peak = seconds(lambda: calibrated(Path(scratch) / "journal"), device)
        plans, planning, planning_peak = seconds(
            lambda: {part: make_plan(each, settings) for part, each in found.items()}, device
        )
        _, saving, _ = seconds(lambda: save_statistics(found, Path(scratch) / "statistics"), device)
        Plan(plans).save_pretrained(Path(scratch) / "plan")
        size, plan_size = (
            sum(path.stat().st_size for path in (Path(scratch) / part).rglob("*") if path.is_file())
            for part in ("statistics", "plan")
        )
    forward = one_run * (economy.order_steps + args.steps * len(prompts)) / args.steps
    measuring = whole - forward
    beyond = measuring + planning + saving
    return environment(device, "triton" if device.startswith("cuda") else None) | {
        "model": name, "tokens": model.grid.tokens, "layers": model.layers, "layers_measured": layers,
        "heads": model.heads, "head_dim": model.head_dim, "block": args.block,
        "phases": len(plans["transformer"].phases),
        "prompts": len(prompts), "steps": args.steps, "order_steps": economy.order_steps, "branches": 2,
        "maps": economy.maps, "density": args.density,
        "seconds": round(beyond * scale, 1),
        "seconds_measuring": round(measuring * scale, 1), "seconds_planning": round(planning * scale, 1),
        "seconds_forward": round(forward * scale, 1), "seconds_total": round((beyond + forward) * scale, 1),
        "extra_gib": round((max(peak, planning_peak) - before) / 2**30, 2) if before else None,
        "host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "statistics_gb": round(size * scale / 1e9, 3), "plan_mb": round(plan_size * scale / 1e6, 1),
        "includes": (
            "seconds: measuring, writing statistics, planning, beyond seconds_forward; one dense run timed, "
            "x all steps; all times and sizes x layers / layers_measured"
        ),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["wan-14b-720p"], choices=MODELS)
    parser.add_argument("--layers", type=int, default=4, help="layers to measure")
    parser.add_argument("--block", default="128x128")
    parser.add_argument("--prompts", type=int, default=2, choices=range(1, len(PROMPTS) + 1))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--order-steps", type=int, default=Economy().order_steps)
    parser.add_argument("--maps", type=int, default=Economy().maps)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scratch", type=Path, help="folder for statistics while it runs (default: the system's)")
    parser.add_argument("--out", type=Path, default=RESULT, help="result file to merge the rows into")
    args = parser.parse_args()
    for name in args.model:
        row = measure(name, args)
        print(
            f"{name}: {row['seconds']:.0f} s beyond {row['seconds_forward']:.0f} s of forwards "
            f"({row['layers_measured']} of {row['layers']} layers measured), {row['statistics_gb']} GB on disk, "
            f"{row['extra_gib']} GiB more on the GPU",
            flush=True,
        )
        merge(args.out, [row], KEY)


if __name__ == "__main__":
    main()
