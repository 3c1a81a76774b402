"""Trains the bundled video model: python training/train.py --out run/

With --size 1 208 320 it trains the same transformer on images, and --start gives it the weights to start from.

Flow matching on clips rendered on the fly. The same seed, steps and GPU give the same model; a killed run continues
from its last checkpoint. Ends by writing the pipeline folder that ships inside the package and metrics.json beside
it.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Generator, Tensor, nn

from clips import draw_words, load_photographs, render
from paroattn.demo.conditioner import Conditioner

CLIP = (16, 52, 72)
TRANSFORMER = {
    "patch_size": (1, 4, 4),
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 64,
    "freq_dim": 256,
    "ffn_dim": 1024,
    "num_layers": 5,
    "rope_max_seq_len": 32,
}
SHIFT = 3.0
UNCONDITIONAL = 0.1
WARM_UP = 200
AVERAGE_OVER = 400


class Model(nn.Module):
    """Transformer and conditioner for clips of a size (frames, height, width) in pixels."""

    def __init__(self, size: Sequence[int] = CLIP):
        super().__init__()
        tokens = (length // patch for length, patch in zip(size, TRANSFORMER["patch_size"], strict=True))
        reach = max(TRANSFORMER["rope_max_seq_len"], *tokens)
        self.transformer = WanTransformer3DModel(**TRANSFORMER | {"rope_max_seq_len": reach})
        self.conditioner = Conditioner(dim=TRANSFORMER["text_dim"])

    def start_from(self, folder: Path) -> None:
        """Take the weights of a pipeline folder."""
        for name, part in self.named_children():
            saved: Any = type(part)
            part.load_state_dict(saved.from_pretrained(folder / name).state_dict())

    def forward(self, noisy: Tensor, noise_level: Tensor, ids: Tensor) -> Tensor:
        return self.transformer(noisy, noise_level * 1000, self.conditioner(ids), return_dict=False)[0]


def shifted(uniform: Tensor) -> Tensor:
    """Noise levels σ: logit-normal, then shifted towards noise as in Stable Diffusion 3."""
    level = torch.sigmoid(torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4)))
    return SHIFT * level / (1 + (SHIFT - 1) * level)


def denoising_loss(
    model: Callable[..., Tensor], clips: Tensor, ids: Tensor, uniform: Tensor, generator: Generator
) -> Tensor:
    """Mean squared error of the predicted velocity, noise − clip."""
    level = shifted(uniform)
    noise = torch.randn(clips.shape, generator=generator, device=clips.device)
    mix = level[:, None, None, None, None]
    predicted = model((1 - mix) * clips + mix * noise, level, ids)
    return nn.functional.mse_loss(predicted.float(), noise - clips)


def optimizers(model: Model, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if n.startswith("transformer.blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=(0.9, 0.99), fused=matrices[0].is_cuda),
    ]


def rate_at(step: int, steps: int) -> float:
    """Linear warm-up, constant, then linear decay to zero over the last 40 %."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (0.4 * steps))


@torch.no_grad()
def held_out_loss(
    model: Model, photographs: Tensor, batches: int = 8, batch: int = 16, size: tuple[int, int, int] = CLIP
) -> float:
    """Denoising loss on clips and word combinations that training never sees."""
    device = photographs.device
    generator = Generator(device).manual_seed(2**31)
    losses = []
    for _ in range(batches):
        words = draw_words(batch, generator, held_out=True)
        clips = render(words, photographs, size, generator)
        uniform = (torch.arange(batch, device=device) + 0.5) / batch
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses.append(denoising_loss(model, clips, words.ids(), uniform, generator).item())
    return sum(losses) / len(losses)


class Run:
    """A training run: what is trained, on what, how far it is, and the checkpoint it goes on from.

    Attributes:
        step: Steps that are done.
        log: Losses so far.
        average: Running average of the weights, which ships.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.photographs = load_photographs(device, max(160, 2 * args.size[1]))
        self.model = Model(args.size).to(device)
        if args.start:
            self.model.start_from(args.start)
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(1 - 1 / AVERAGE_OVER)
        self.average = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=average)
        self.optims = optimizers(self.model, args.rate)
        self.generator = Generator(device).manual_seed(args.seed)
        self.checkpoint = args.out / "checkpoint.pt"
        self.settings = {name: getattr(args, name) for name in ("steps", "batch", "rate", "seed", "size")}
        self.step, self.log, before = 0, [], 0.0
        if self.checkpoint.exists():
            before = self._resume()
        self.runner = torch.compile(self.model) if device.type == "cuda" and not args.eager else self.model
        self.began = time.time() - before

    @property
    def seconds(self) -> float:
        """Since the run began, without what lay between its parts."""
        return time.time() - self.began

    def _resume(self) -> float:
        """Go on from the checkpoint; returns the seconds that it took to come there."""
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if state["settings"] != self.settings:
            raise ValueError(
                f"{self.checkpoint} was made with {state['settings']}; got {self.settings}. Give another --out."
            )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optim, saved in zip(self.optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
        self.generator.set_state(state["generator"].cpu())
        self.step, self.log = state["step"], state["log"]
        print(f"continuing at step {self.step}")
        return state["seconds"]

    def keep(self) -> None:
        """Write the checkpoint, all of it or nothing."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optims": [optim.state_dict() for optim in self.optims],
            "generator": self.generator.get_state(),
            "step": self.step,
            "settings": self.settings,
            "log": self.log,
            "seconds": self.seconds,
        }
        self.args.out.mkdir(parents=True, exist_ok=True)
        scratch = self.checkpoint.with_suffix(".tmp")
        torch.save(state, scratch)
        scratch.rename(self.checkpoint)

    def train_once(self) -> Tensor:
        """One step on new clips; returns its loss."""
        batch, random = self.args.batch, {"generator": self.generator, "device": self.device}
        words = draw_words(batch, self.generator)
        clips = render(words, self.photographs, self.args.size, self.generator)
        dropped = torch.rand(batch, **random) < UNCONDITIONAL
        ids = words.ids().masked_fill(dropped[:, None], 0)
        uniform = (torch.randperm(batch, **random) + torch.rand(batch, **random)) / batch
        for optim in self.optims:
            for group in optim.param_groups:
                group["lr"] = self.args.rate * rate_at(self.step, self.args.steps)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = denoising_loss(self.runner, clips, ids, uniform, self.generator)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optim in self.optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        self.average.update_parameters(self.model)
        self.step += 1
        return loss


def train(args: argparse.Namespace) -> None:
    """Train to the last step, from the checkpoint if there is one, and write what ships."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    run = Run(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for step in range(run.step, args.steps):
        loss = run.train_once()
        if step % 100 == 0 or step == args.steps - 1:
            run.log.append({"step": step, "loss": round(loss.item(), 5), "seconds": round(run.seconds, 1)})
            print(run.log[-1], flush=True)
        if step and step % args.save_every == 0:
            run.keep()
    finish(run.average.module, run.photographs, args, run.log, run.seconds)


def finish(model: Any, photographs: Tensor, args: argparse.Namespace, log: list[dict], seconds: float) -> None:
    """Write the weights in bfloat16 as they ship, and the held-out loss of exactly those weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    args.out.mkdir(parents=True, exist_ok=True)
    for part, name in ((model.transformer, "transformer"), (model.conditioner, "conditioner")):
        part.to(torch.bfloat16).save_pretrained(args.out / name, max_shard_size="12MB")
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(args.out / "scheduler")
    metrics = {
        "held_out_loss": held_out_loss(model.float(), photographs, size=args.size),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": args.steps,
        "batch": args.batch,
        "seed": args.seed,
        "rate": args.rate,
        "size": list(args.size),
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if photographs.is_cuda else "cpu",
        "torch": torch.__version__,
        "log": log,
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(json.dumps({k: v for k, v in metrics.items() if k != "log"}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument("--size", type=int, nargs=3, default=CLIP, help="frames, height and width in pixels")
    parser.add_argument("--start", type=Path, help="pipeline folder with the weights to start from")
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    parser.add_argument("--out", type=Path, default=Path("run"))
    args = parser.parse_args()
    args.size = tuple(args.size)
    train(args)
