"""Fine-tunes the bundled model to photographs in negative with a LoRA: python training/lora.py --out lora/

Flow matching as in train.py, on its clips with inverted photographs; shapes keep their colours. Rank 16 on all matrices
inside the blocks, merged at the end. The same seed and GPU give the same model. Ends by writing the transformer and
lora.json, which holds the denoising loss on held-out negatives before and after.
"""

import argparse
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from clips import draw_words, load_photographs, render
from paroattn.demo.pipeline import FRAMES, HEIGHT, WIDTH, load_demo
from train import Model, denoising_loss, held_out_loss

ADAPTED = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]


@dataclass(frozen=True)
class Settings:
    """How the LoRA is made: its rank, and steps, batch, rate and seed of training."""

    rank: int = 16
    steps: int = 100
    batch: int = 32
    rate: float = 1e-3
    seed: int = 0


class Tuned(nn.Module):
    """A transformer and its conditioner as the model that train.py trains."""

    def __init__(self, transformer: nn.Module, conditioner: nn.Module):
        super().__init__()
        self.transformer, self.conditioner = transformer, conditioner

    forward = Model.forward


def fine_tune(
    pipe: Any, photographs: Tensor, settings: Settings, size: tuple[int, int, int] = (FRAMES, HEIGHT, WIDTH)
) -> tuple[Any, dict]:
    """The transformer with the LoRA merged, and how it was made and what it learnt."""
    from peft import LoraConfig

    began, device = time.time(), pipe.transformer.device
    torch.manual_seed(settings.seed)  # of the adapter's first weights
    generator, negatives = Generator(device).manual_seed(settings.seed), -photographs
    model: Any = Tuned(copy.deepcopy(pipe.transformer), pipe.conditioner)
    before = held_out_loss(model, negatives, batches=2, size=size)
    model.requires_grad_(False)
    model.transformer.add_adapter(LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=ADAPTED))
    adapted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapted, lr=settings.rate, weight_decay=0.0)
    for step in range(settings.steps):
        words = draw_words(settings.batch, generator)
        clips = render(words, negatives, size, generator)
        uniform = torch.rand(settings.batch, generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = denoising_loss(model, clips, words.ids(), uniform, generator)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * min(1.0, (step + 1) / 20, 2 * (1 - step / settings.steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.transformer.fuse_lora()
    model.transformer.unload_lora()
    model.requires_grad_(False)
    about = {
        **vars(settings), "held_out_loss_before": round(before, 5),
        "held_out_loss": round(held_out_loss(model, negatives, batches=2, size=size), 5),
        "seconds": round(time.time() - began, 1), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }  # fmt: skip
    return model.transformer.eval(), about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in vars(Settings()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--out", type=Path, default=Path("lora"))
    args = parser.parse_args()
    pipe = load_demo("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(**{name: getattr(args, name) for name in vars(Settings())})
    transformer, about = fine_tune(pipe, load_photographs(pipe.transformer.device), settings)
    args.out.mkdir(parents=True, exist_ok=True)
    transformer.to(torch.bfloat16).save_pretrained(args.out / "transformer")
    (args.out / "lora.json").write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(about))


if __name__ == "__main__":
    main()
