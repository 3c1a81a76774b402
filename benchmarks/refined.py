"""Refined plans of the bundled model and its relatives: several clips at once, on prompts that nothing else uses."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paroattn.capture import Statistics
from paroattn.demo.pipeline import STEPS
from paroattn.demo.prompt import (
    CALIBRATION_PROMPTS,
    CAMERAS,
    COLOURS,
    DIRECTIONS,
    EVALUATION_PROMPTS,
    SCENES,
    SHAPES,
    prompt_of,
)  # fmt: skip
from paroattn.integration.refining import Refinement, refine
from paroattn.plan.plan import Plan, TransformerPlan

TRAINING = 128
ROUNDS, AT_ONCE, REFINING_STEPS = 18, 8, 12
JOINT = "|"


class Batched:
    """The bundled pipeline, which makes a clip of every prompt that is joined to one; a seed stands for as many."""

    def __init__(self, pipe: Any):
        self.pipe = pipe

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["pipe"], name)

    def __call__(
        self, prompt: str, num_inference_steps: int = STEPS, generator: Any = None, output_type: str = "pt", **call: Any
    ) -> Any:
        prompts = prompt.split(JOINT)
        first = generator.initial_seed() * len(prompts)
        generators = [torch.Generator().manual_seed(first + index) for index in range(len(prompts))]
        return self.pipe(prompts, num_inference_steps, generator=generators, output_type=output_type, **call)


def drawn(count: int) -> list[str]:
    """Prompts that no calibration and no evaluation uses, always the same ones."""
    rng, found = random.Random(11), {}

    def thing() -> tuple[str, str, str]:
        return rng.choice(COLOURS), rng.choice(SHAPES), rng.choice(DIRECTIONS)

    while len(found) < count:
        rear = thing() if rng.random() < 0.6 else ("", "", "")
        prompt = prompt_of((rng.choice(SCENES), rng.choice(CAMERAS), *thing(), *rear))
        if prompt not in (*CALIBRATION_PROMPTS, *EVALUATION_PROMPTS):
            found[prompt] = True
    return list(found)


def joined(prompts: list[str], at_once: int) -> list[str]:
    """Prompts in groups; a list shorter than a group is repeated."""
    prompts = prompts * max(1, at_once // len(prompts))
    return [JOINT.join(prompts[first : first + at_once]) for first in range(0, len(prompts), at_once)]


@dataclass(frozen=True)
class Refiner:
    """Refines plans, and keeps them in a folder if there is one: a plan that lies there is not made again.

    Attributes:
        pipe: Whose plans.
        statistics: What they were made from.
        call: Size of the clips, as the pipeline takes it.
        rounds, at_once, steps: How often masks are chosen anew, clips of each round, and their steps.
        folder: Of a plan for each name.
    """

    pipe: Any
    statistics: Statistics
    call: dict[str, Any]
    rounds: int = ROUNDS
    at_once: int = AT_ONCE
    steps: int = REFINING_STEPS
    folder: Path | None = None

    def __call__(self, plan: TransformerPlan, name: str, prompts: list[str] | None = None) -> TransformerPlan:
        """The plan with masks refined on prompts, `TRAINING` of its own by default."""
        kept = self.folder / name if self.folder else None
        if kept is not None and kept.is_dir():
            return Plan.from_pretrained(kept)["transformer"]
        found = refine(
            Batched(self.pipe), Plan({"transformer": plan}), {"transformer": self.statistics},
            joined(prompts or drawn(TRAINING), self.at_once),
            refinement=Refinement(self.rounds, 1, checkpointing=False), steps=self.steps, progress=lambda done: None,
            **self.call,
        )  # fmt: skip
        if kept is not None:
            found.save_pretrained(kept)
        return found["transformer"]
