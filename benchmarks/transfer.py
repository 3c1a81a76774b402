"""What one plan keeps elsewhere: other prompts, seeds, steps, guidance, weights and sizes, on the bundled model.

    python benchmarks/transfer.py --impl triton
    python benchmarks/transfer.py --impl triton --axes steps guidance --densities 0.3 --out RESULTS

One plan is made as `paroattn.calibrate` makes it, from two prompts, and used everywhere; beside it stands a plan that
was calibrated the same way at that very value, set to execute the same density there. Every pair of clips is compared
with its own dense clip: same prompt, seed, steps, guidance, weights and size. The model runs in bf16.

    prompt       plans from 2 and from 16 prompts on 16 others; the plan beside them is calibrated on these 16
    seed         other noise
    steps        4 to 50 instead of 24, and a student distilled to four steps without guidance (training/distil.py)
    guidance     none, and twice as much
    finetune     a LoRA (training/lora.py); it and the student are made here, with what they can do in the row
    resolution   a plan for another grid from the statistics of this one, as `paro plan --grid` makes it, and the plan's
                 masks alone carried there with `for_grid`

Rows are merged into the result file as they are measured. Several processes may share a GPU: each takes some --values
into a file of its own, and all of them keep what they calibrate in one --statistics folder.
"""

import argparse
import fcntl
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from at_density import executed, tuned
from fidelity_demo import all_kept
from paroattn import apply, remove, report
from paroattn.capture import Statistics
from paroattn.capture.regrid import regridded
from paroattn.demo.pipeline import FRAMES, GUIDANCE, HEIGHT, STEPS, WIDTH, load_demo, weights_sha256
from paroattn.demo.prompt import CALIBRATION_PROMPTS, EVALUATION_PROMPTS, SLOTS, prompt_of
from paroattn.evaluation.fidelity import DATA_RANGE, summarise
from paroattn.grid import Grid
from paroattn.integration.calibrate import collect, needed_by, own_precision
from paroattn.integration.schedule import noise_levels
from paroattn.integration.sensitivity import measure_sensitivity
from paroattn.plan.plan import Plan, TransformerPlan
from paroattn.plan.search import PlanSettings, make_plan
from records import environment, merge, read

TRAINING = Path(__file__).parent.parent / "training"
RESULT = Path(__file__).parent / "results" / "transfer.json"
AXES = ("prompt", "seed", "steps", "guidance", "finetune", "resolution")
KEY = ("axis", "value", "density_target")
DENSITIES = (0.3, 0.2)
FIRST_SEED = 1000
CALIBRATION_STEPS = 10
MANY = 16


@dataclass(frozen=True)
class Setting:
    """How clips are made.

    Attributes:
        steps, guidance: Of the sampler.
        seed: Of the first clip; the next ones count up.
        model: Whose weights.
        size: Frames, height and width in pixels.
    """

    steps: int = STEPS
    guidance: float = GUIDANCE
    seed: int = FIRST_SEED
    model: str = "bundled"
    size: tuple[int, int, int] = (FRAMES, HEIGHT, WIDTH)

    @property
    def call(self) -> dict[str, Any]:
        frames, height, width = self.size
        return {"guidance_scale": self.guidance, "num_frames": frames, "height": height, "width": width}

    @property
    def grid(self) -> Grid:
        frames, height, width = self.size
        return Grid(frames, height // 4, width // 4)


@dataclass(frozen=True)
class Calibration:
    """How a plan is calibrated: on which prompts, with how many steps, from which seed, and at which setting."""

    prompts: tuple[str, ...] = CALIBRATION_PROMPTS
    steps: int = CALIBRATION_STEPS
    seed: int = 0
    at: Setting = Setting()


@dataclass(frozen=True)
class Case:
    """A row: the plan that is carried over, where it is used, and the plan that is calibrated there.

    Attributes:
        masks_alone: Another grid gets the plan's masks instead of a plan from the statistics.
    """

    axis: str
    value: str | int | float
    setting: Setting
    own: Calibration
    plan: Calibration = Calibration()
    masks_alone: bool = False


def sized(*size: int) -> Setting:
    return Setting(size=(size[0], size[1] * 4, size[2] * 4))


def cases() -> list[Case]:
    """All rows but their density, the most important first."""
    base, many = Setting(), Calibration(drawn_prompts(MANY))
    here = Calibration(EVALUATION_PROMPTS)
    found = [Case("prompt", "calibrated on 2", base, here), Case("prompt", "calibrated on 16", base, here, many)]
    found += [
        Case("steps", n, replace(base, steps=n), Calibration(steps=n, at=replace(base, steps=n)))
        for n in (4, 8, 12, 24, 50)
    ]
    student, tuned_model = Setting(steps=4, guidance=1.0, model="distilled"), Setting(model="lora")
    found += [Case("steps", "4, distilled", student, Calibration(steps=4, at=student))]
    found += [Case("finetune", "LoRA", tuned_model, Calibration(at=tuned_model))]
    places = [sized(24, 13, 18), sized(16, 17, 24), sized(11, 9, 14)]
    found += [Case("resolution", str(each.grid), each, Calibration(at=each)) for each in places]
    found += [
        Case("resolution", f"{each.grid}, masks alone", each, Calibration(at=each), masks_alone=True) for each in places
    ]
    found += [
        Case("guidance", g, replace(base, guidance=g), Calibration(at=replace(base, guidance=g))) for g in (1.0, 4.0)
    ]
    found += [Case("seed", s, replace(base, seed=s), Calibration(seed=s)) for s in (2000, 3000)]
    return found


def drawn_prompts(count: int) -> tuple[str, ...]:
    """The two calibration prompts and as many more, none of them evaluated."""
    found: list[str] = [*CALIBRATION_PROMPTS]
    generator = torch.Generator().manual_seed(0)
    while len(found) < count:
        words = tuple(each[int(torch.randint(len(each), (), generator=generator))] for each in SLOTS.values())
        if (prompt := prompt_of(words)) not in (*found, *EVALUATION_PROMPTS):
            found.append(prompt)
    return tuple(found[:count])


def remembered(statistics: Statistics) -> Statistics:
    """The same statistics, which answer what they were asked before at once: laying maps over a grid takes seconds."""
    kept: dict[Any, Tensor] = {}

    def once(ask: Callable[..., Tensor], *question: Any) -> Tensor:
        key = ask.__name__, *(tuple(part) if isinstance(part, list) else part for part in question)
        if key not in kept:
            kept[key] = ask(*question)
        return kept[key].clone()

    found = copy(statistics)
    for name in ("mean", "heaviest"):
        setattr(found, name, partial(once, getattr(statistics, name)))
    return found


class Models:
    """Transformers by name; those that are no part of the package are trained here, once."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.about: dict[str, dict[str, Any]] = {}
        self.named = cache(self._named)

    def _named(self, name: str) -> Any:
        if name == "bundled":
            return load_demo(self.device, self.dtype).transformer
        trained, about = self._trained(name, load_demo(self.device))
        self.about[name] = {key: value for key, value in about.items() if key != "log"}
        print(name, self.about[name], flush=True)
        with tempfile.TemporaryDirectory() as folder:  # as a model that was saved comes back
            trained.to(torch.bfloat16).save_pretrained(folder)
            return type(trained).from_pretrained(folder, torch_dtype=self.dtype).to(self.device)

    def _trained(self, name: str, pipe: Any) -> tuple[Any, dict[str, Any]]:
        sys.path.append(str(TRAINING))
        if name == "distilled":
            from distil import Settings, distil

            return distil(pipe, Settings())
        from clips import load_photographs
        from lora import Settings as LoraSettings
        from lora import fine_tune

        return fine_tune(pipe, load_photographs(torch.device(self.device)), LoraSettings())


class Bench:
    """Calibrates and makes clips at any setting; what was made before is not made again."""

    def __init__(self, device: str, clips: int, impl: str, dtype: torch.dtype, folder: Path | None = None):
        self.folder = folder
        self.pipe, self.models, self.impl = load_demo(device, dtype), Models(device, dtype), impl
        self.precision = own_precision(self.pipe)
        self.prompts = EVALUATION_PROMPTS[:clips]
        self.statistics, self.levels = cache(self._statistics), cache(self._levels)
        self.laid = cache(lambda calibration, grid: remembered(regridded(self.statistics(calibration), grid)))
        self.dense: dict[Setting, Tensor] = {}

    def plan(self, calibration: Calibration, density: float, steps: int, grid: Grid | None = None) -> TransformerPlan:
        """A plan that executes this density on a schedule of so many steps, on the calibration's grid by default."""
        statistics = self.laid(calibration, grid or calibration.at.grid)

        def make(wanted: float) -> TransformerPlan:
            return make_plan(statistics, PlanSettings(wanted, precision=self.precision))

        return tuned(make, density, self.levels(steps))

    def clips(self, setting: Setting, plan: TransformerPlan) -> tuple[Tensor, float]:
        """Clips (clips, F, 3, H, W) in [-1, 1], and the density that was executed."""
        self.pipe.transformer = self.models.named(setting.model)
        generators = [torch.Generator().manual_seed(setting.seed + index) for index in range(len(self.prompts))]
        apply(self.pipe, Plan({"transformer": plan}), impl=self.impl)
        try:
            made = self.pipe(self.prompts, setting.steps, generator=generators, **setting.call).frames * 2 - 1
            return made, report(self.pipe).to_dict()["transformer"]["density"]
        finally:
            remove(self.pipe)

    def psnr(self, setting: Setting, plan: TransformerPlan) -> tuple[list[float], float]:
        """PSNR of every clip against its dense one, dB, and the density that was executed."""
        if setting not in self.dense:
            self.dense[setting], _ = self.clips(setting, all_kept(plan))
        made, density = self.clips(setting, plan)
        error = (made - self.dense[setting]).double().square().flatten(1).mean(1)
        return (10 * (DATA_RANGE**2 / error).log10()).tolist(), density

    def _levels(self, steps: int) -> tuple[float, ...]:
        self.pipe.scheduler.set_timesteps(steps)
        return tuple(noise_levels(self.pipe.scheduler) or ())

    def _statistics(self, calibration: Calibration) -> Statistics:
        """What a calibration measures; from the folder if any process has measured it, one at a time."""
        if self.folder is None:
            return self._measured(calibration)
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = self.folder / sha256(repr(calibration).encode()).hexdigest()[:16]
        with kept.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not kept.is_dir():
                self._measured(calibration).save(kept)
            return Statistics.load(kept)

    def _measured(self, calibration: Calibration) -> Statistics:
        self.pipe.transformer = self.models.named(calibration.at.model)
        settings, prompts, common = PlanSettings(), list(calibration.prompts), calibration.at.call
        common |= {"steps": calibration.steps, "seed": calibration.seed, "progress": lambda done: None}
        measured = collect(
            self.pipe, prompts, capture=needed_by(settings), settings=settings, exact=True, **common
        )  # fmt: skip
        measure_sensitivity(self.pipe, measured, prompts, precision=self.precision, impl=self.impl, **common)
        return measured["transformer"]


def row(bench: Bench, case: Case, density: float) -> dict[str, Any]:
    """The plan made elsewhere and the one made here, on the same clips."""
    setting = case.setting
    bench.models.named(setting.model)
    carried = (
        bench.plan(case.plan, density, STEPS).for_grid(setting.grid)
        if case.masks_alone
        else bench.plan(case.plan, density, STEPS, setting.grid)
    )
    psnr, got = bench.psnr(setting, carried)
    own = bench.plan(case.own, executed(carried, bench.levels(setting.steps)), setting.steps)
    own_psnr, own_got = bench.psnr(setting, own)
    found = summarise(psnr)
    loss = summarise([there - here for there, here in zip(own_psnr, psnr, strict=True)])
    trained = bench.models.about.get(setting.model)
    return {
        "axis": case.axis, "value": case.value, "density_target": density, "density_executed": round(got, 5),
        "psnr_mean": round(found.mean, 3), "psnr_std": round(found.spread, 3), "psnr_min": round(found.lowest, 3),
        "psnr_own_plan": round(sum(own_psnr) / len(own_psnr), 3), "density_own_plan": round(own_got, 5),
        "loss_mean": round(loss.mean, 3), "loss_interval": [round(end, 3) for end in loss.interval or ()],
        "clips": len(psnr), "steps": setting.steps, "guidance": setting.guidance, "grid": str(setting.grid),
        "calibration_prompts": len(case.plan.prompts), "precision": bench.precision, "trained": trained,
        "psnr": [round(each, 4) for each in psnr], "psnr_own": [round(each, 4) for each in own_psnr],
    }  # fmt: skip


def rows(bench: Bench, args: argparse.Namespace, there: set[str]) -> Iterator[dict[str, Any]]:
    """Every row that is asked for and not there yet, the most important first."""
    for case in (case for case in cases() if case.axis in args.axes):
        if not args.values or str(case.value) in args.values:
            wanted = [density for density in args.densities if str((case.axis, case.value, density)) not in there]
            yield from (row(bench, case, density) for density in wanted)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES)
    parser.add_argument("--values", nargs="+", default=(), help="only these of the axes")
    parser.add_argument("--statistics", type=Path, help="read or keep what is calibrated here")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--clips", type=int, default=len(EVALUATION_PROMPTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--out", type=Path, default=RESULT, help="result file to merge the rows into")
    parser.add_argument("--resume", action="store_true", help="leave out rows that the result file has")
    args = parser.parse_args(argv)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    bench, last = Bench(args.device, args.clips, args.impl, dtype, args.statistics), time.time()
    about = environment(args.device, args.impl) | {"weights_sha256": weights_sha256(), "impl": args.impl}
    there = {str(tuple(each.get(name) for name in KEY)) for each in read(args.out)} if args.resume else set()
    for found in rows(bench, args, there):
        merge(args.out, [found | about], KEY)
        shown = (*KEY, "density_executed", "psnr_mean", "psnr_own_plan", "density_own_plan", "loss_interval")
        print(f"{time.time() - last:6.1f} s", {name: found[name] for name in shown}, flush=True)
        last = time.time()


if __name__ == "__main__":
    main()
