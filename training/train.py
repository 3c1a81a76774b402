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


def train(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    photographs = load_photographs(device, max(160, 2 * args.size[1]))
    model = Model(args.size).to(device)
    if args.start:
        model.start_from(args.start)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(1 - 1 / AVERAGE_OVER)
    )
    optims = optimizers(model, args.rate)
    generator = Generator(device).manual_seed(args.seed)
    checkpoint = args.out / "checkpoint.pt"
    settings = {name: getattr(args, name) for name in ("steps", "batch", "rate", "seed", "size")}
    start, log, before = 0, [], 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["settings"] != settings:
            raise ValueError(f"{checkpoint} was made with {state['settings']}; got {settings}. Give another --out.")
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optim, saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
        generator.set_state(state["generator"].cpu())
        start, log, before = state["step"], state["log"], state["seconds"]
        print(f"continuing at step {start}")
    runner = torch.compile(model) if device.type == "cuda" and not args.eager else model
    began = time.time() - before
    for step in range(start, args.steps):
        words = draw_words(args.batch, generator)
        clips = render(words, photographs, args.size, generator)
        dropped = torch.rand(args.batch, generator=generator, device=device) < UNCONDITIONAL
        ids = words.ids().masked_fill(dropped[:, None], 0)
        uniform = (
            torch.randperm(args.batch, generator=generator, device=device)
            + torch.rand(args.batch, generator=generator, device=device)
        ) / args.batch
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = args.rate * rate_at(step, args.steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = denoising_loss(runner, clips, ids, uniform, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        average.update_parameters(model)
        if step % 100 == 0 or step == args.steps - 1:
            log.append({"step": step, "loss": round(loss.item(), 5), "seconds": round(time.time() - began, 1)})
            print(log[-1], flush=True)
        if step and step % args.save_every == 0:
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optims": [o.state_dict() for o in optims],
            }
            args.out.mkdir(parents=True, exist_ok=True)
            torch.save(
                state
                | {
                    "generator": generator.get_state(),
                    "step": step + 1,
                    "settings": settings,
                    "log": log,
                    "seconds": time.time() - began,
                },
                checkpoint.with_suffix(".tmp"),
            )
            checkpoint.with_suffix(".tmp").rename(checkpoint)
    finish(average.module, photographs, args, log, time.time() - began)


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
