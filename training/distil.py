"""Distils the bundled model to four steps without guidance: python training/distil.py --out distilled/

The teacher, guided, integrates noise to clips in small steps. The student starts as a copy of it and learns, at the
noise levels of the short schedule, the one velocity that leads to where the teacher is at the next. No clips are
needed, only prompts. The same seed and GPU give the same model. Ends by writing the transformer and
distilled.json, which holds both models in four steps against the teacher's small ones, on prompts never trained on.
"""

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from clips import draw_words
from paroattn.demo.pipeline import FRAMES, GUIDANCE, HEIGHT, WIDTH, load_demo

STEPS = 4
PARTS = (5, 5, 7, 1)  # steps of the teacher inside each step of the student
LEARNT = 3  # the fourth leads from σ = 0.009 to 0, which no velocity can spoil
WARM_UP = 20


@dataclass(frozen=True)
class Settings:
    """How the student is made.

    Attributes:
        clips: Trajectories of the teacher.
        steps, batch, rate: Of training.
        seed: Of everything drawn.
        checked: Clips that the quality is measured on.
    """

    clips: int = 320
    steps: int = 240
    batch: int = 32
    rate: float = 3e-4
    seed: int = 0
    checked: int = 64


class Distillation:
    """A guided teacher and its trajectories over a short schedule."""

    def __init__(self, pipe: Any, settings: Settings, size: Sequence[int] = (FRAMES, HEIGHT, WIDTH)):
        self.teacher, self.conditioner, self.settings = pipe.transformer, pipe.conditioner, settings
        self.size, self.device = tuple(size), pipe.transformer.device
        self.generator = Generator(self.device).manual_seed(settings.seed)
        pipe.scheduler.set_timesteps(STEPS)
        self.levels = pipe.scheduler.sigmas.tolist()

    @torch.no_grad()
    def trajectories(self, clips: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Words (clips, 8), and the teacher's state at every short level, (clips, levels, 3, F, H, W)."""
        ids = draw_words(clips, self.generator, held_out=held_out).ids()
        parts = []
        for some in ids.split(self.settings.batch):
            state = torch.randn(len(some), 3, *self.size, generator=self.generator, device=self.device)
            states = [state.half()]
            for start, end, count in zip(self.levels, self.levels[1:], PARTS, strict=False):
                state = self.integrate(self.teacher, state, torch.linspace(start, end, count + 1).tolist(), some)
                states.append(state.half())
            parts.append(torch.stack(states, 1))
        return ids, torch.cat(parts)

    @torch.no_grad()
    def integrate(
        self, model: nn.Module, state: Tensor, levels: Sequence[float], ids: Tensor, guidance: float = GUIDANCE
    ) -> Tensor:
        """Euler steps through the levels."""
        wanted, unguided = self.conditioner(ids), self.conditioner(torch.zeros_like(ids))
        for level, following in pairwise(levels):
            velocity = self.velocity(model, state, level, wanted)
            if guidance != 1:
                plain = self.velocity(model, state, level, unguided)
                velocity = plain + guidance * (velocity - plain)
            state = state + (following - level) * velocity
        return state

    def velocity(self, model: nn.Module, state: Tensor, level: float | Tensor, words: Tensor) -> Tensor:
        when = torch.as_tensor(level, device=self.device).expand(len(state)) * 1000
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return model(state, when, words, return_dict=False)[0].float()

    def train(self) -> tuple[nn.Module, list[dict[str, float]]]:
        """The student, and its loss on the way."""
        settings, began = self.settings, time.time()
        ids, states = self.trajectories(settings.clips)
        levels = torch.tensor(self.levels, device=self.device)
        student = copy.deepcopy(self.teacher).train().requires_grad_(True)
        optimizer = torch.optim.AdamW(student.parameters(), lr=settings.rate, weight_decay=0.0, betas=(0.9, 0.99))
        log = []
        for step in range(settings.steps):
            rows = torch.randint(len(ids), (settings.batch,), generator=self.generator, device=self.device)
            places = torch.randint(LEARNT, (settings.batch,), generator=self.generator, device=self.device)
            state, following = states[rows, places].float(), states[rows, places + 1].float()
            start, end = levels[places], levels[places + 1]
            wanted = (following - state) / (end - start)[:, None, None, None, None]
            with torch.no_grad():
                words = self.conditioner(ids[rows])
            loss = nn.functional.mse_loss(self.velocity(student, state, start, words), wanted)
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = settings.rate * min(1.0, (step + 1) / WARM_UP, 2 * (1 - step / settings.steps))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 40 == 0 or step == settings.steps - 1:
                log.append({"step": step, "loss": round(loss.item(), 5), "seconds": round(time.time() - began, 1)})
                print(log[-1], flush=True)
        return student.eval().requires_grad_(False), log

    @torch.no_grad()
    def quality(self, student: nn.Module) -> dict[str, float]:
        """PSNR against the guided teacher's small steps, dB: of the student, and of the teacher in four steps."""
        ids, states = self.trajectories(self.settings.checked, held_out=True)
        exact = states[:, -1].float().clamp(-1, 1)
        found = {}
        contestants = (
            ("student", student, 1.0),
            ("unguided_teacher", self.teacher, 1.0),
            ("teacher", self.teacher, GUIDANCE),
        )
        for name, model, guidance in contestants:
            parts = zip(ids.split(self.settings.batch), states[:, 0].float().split(self.settings.batch), strict=True)
            made = torch.cat([self.integrate(model, noise, self.levels, some, guidance) for some, noise in parts])
            error = (made.clamp(-1, 1) - exact).square().flatten(1).mean(1)
            found[f"psnr_{name}"] = round(float((10 * (4 / error).log10()).mean()), 3)
        return found


def distil(pipe: Any, settings: Settings, size: Sequence[int] = (FRAMES, HEIGHT, WIDTH)) -> tuple[Any, dict]:
    """The student's transformer, and how it was made and how good it is."""
    began, work = time.time(), Distillation(pipe, settings, size)
    student, log = work.train()
    about = {
        **vars(settings), **work.quality(student), "seconds": round(time.time() - began, 1),
        "device": torch.cuda.get_device_name() if work.device.type == "cuda" else "cpu", "torch": torch.__version__,
        "log": log,
    }  # fmt: skip
    return student, about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in vars(Settings()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--out", type=Path, default=Path("distilled"))
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    pipe = load_demo("cuda" if torch.cuda.is_available() else "cpu")
    student, about = distil(pipe, Settings(**{name: getattr(args, name) for name in vars(Settings())}))
    args.out.mkdir(parents=True, exist_ok=True)
    student.to(torch.bfloat16).save_pretrained(args.out / "transformer")
    (args.out / "distilled.json").write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps({name: value for name, value in about.items() if name != "log"}))


if __name__ == "__main__":
    main()
