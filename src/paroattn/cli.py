"""The command `paro`: one sub-command per stage; each reads what the one before wrote and names the next."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from . import __version__

CALL_ARGUMENTS = ("height", "width", "num_frames", "guidance_scale", "negative_prompt")
REPORT_FOLDER = ("report.html", "results.json")
EXPECTED_ERRORS = (ValueError, TypeError, OSError, RuntimeError, ImportError)


def main(argv: list[str] | None = None) -> int:
    """Run `paro`; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    args.words = "paro " + shlex.join(argv)
    try:
        result = args.run(args)
    except EXPECTED_ERRORS as error:
        if args.debug:
            raise
        print(f"paro {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"paro {args.command}: interrupted; nothing was written", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps(result, indent=1, default=str))
    return 0


def _demo(args: argparse.Namespace) -> dict[str, Any]:
    """Run the whole story on the bundled model and write an HTML report."""
    from .demo.story import FOLDER, REPORT, DemoSettings, run_demo
    from .files import check_writable

    given = {name: getattr(args, name) for name in ("density", "clips", "steps", "calibration_steps", "seed")}
    settings = DemoSettings(**{name: value for name, value in given.items() if value is not None})
    check_writable(args.out, FOLDER)
    with _stages() as stage:
        numbers = run_demo(args.out, settings, stage, args.words)
    _say_summary(numbers["summary"], numbers["seconds"])
    _end(args.out / REPORT, "open it in a browser, then try: paro generate demo --prompt "
         '"a red disc moving right over coffee, camera pans left" --out clip.gif')  # fmt: skip
    return numbers


def _calibrate(args: argparse.Namespace) -> dict[str, Any]:
    """Run a model on calibration prompts; write block statistics and the plan made from them."""
    from .files import check_writable
    from .integration.calibrate import collect, needed_by, own_precision
    from .plan.plan import FOLDER

    prompts = _prompts(args.prompts)
    settings = _plan_settings(args)
    capture = needed_by(settings, block=_block(args.block), row_stride=args.row_stride)
    check_writable(args.out, FOLDER)
    pipe = _pipeline(args)
    settings = replace(settings, precision=args.precision or own_precision(pipe))
    with _stages() as stage:
        report = partial(stage, f"calibrating on {len(prompts)} prompts")
        measured = collect(
            pipe, prompts, steps=args.steps, capture=capture, seed=args.seed, progress=report, **_call(args)
        )
    return _write_plan(measured, settings, args.out)


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    """Make another plan from the statistics of a calibration, without running the model."""
    from .files import check_writable
    from .integration.calibrate import load_statistics
    from .plan.plan import FOLDER, STATISTICS, Plan

    settings = _plan_settings(args)
    check_writable(args.out, FOLDER)
    measured = load_statistics(args.plan / STATISTICS)
    if not args.precision:
        layers = next(iter(Plan.from_pretrained(args.plan).values())).layers
        settings = replace(settings, precision=next(iter(layers.values())).precision[0][0])
    return _write_plan(measured, settings, args.out)


def _write_plan(measured: dict[str, Any], settings: Any, out: Path) -> dict[str, Any]:
    """Make a plan and write it with the statistics it was made from."""
    from .files import writing_folder
    from .integration.calibrate import save_statistics
    from .plan.plan import FOLDER, STATISTICS, Plan
    from .plan.search import make_plan

    plan = Plan({name: make_plan(each, settings) for name, each in measured.items()})
    with writing_folder(out, FOLDER) as folder:
        plan.write(folder)
        save_statistics(measured, folder / STATISTICS)
    _end(out, f"paro show {out}")
    return _describe(plan)


def _show(args: argparse.Namespace) -> dict[str, Any]:
    """Show orders, density and precision per layer, as a table and as pictures."""
    from .plan.plan import Plan

    plan = Plan.from_pretrained(args.plan)
    for name, part in plan.items():
        _console().print(_table(name, part))
    if args.html:
        from .evaluation.report import write_plan

        _end(
            write_plan(plan, args.html, title=f"Attention plan {args.plan}"), f"paro generate MODEL --plan {args.plan}"
        )
    return _describe(plan)


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    """Generate one clip with a plan, or dense without one."""
    import time

    from .evaluation.video import check_clip_path, write_clip
    from .integration.apply import apply, report
    from .integration.generate import generate_clip
    from .plan.plan import Plan

    check_clip_path(args.out)
    if args.dense and (args.plan or args.precision or args.allow_dense):
        raise ValueError("--dense runs without a plan; leave out --plan, --precision and --allow-dense")
    plan = Plan.from_pretrained(_plan_of(args)) if not args.dense else None
    pipe = _pipeline(args)
    if plan is not None:
        apply(pipe, plan, strict=not args.allow_dense, precision=args.precision)
    began = time.perf_counter()
    with _steps(args, 1) as step:
        frames = generate_clip(pipe, args.prompt, args.seed, steps=args.steps, on_step=step, **_call(args))
    seconds = time.perf_counter() - began
    executed = report(pipe) if plan is not None else None
    if executed is not None:
        _say(str(executed))
    given = f" --plan {args.plan}" if args.plan else ""
    following = f"paro evaluate {args.model}{given} --prompts prompts.txt --out report/"
    _end(write_clip(frames, args.out, fps=args.fps), following)
    return {"out": str(args.out), "seconds": seconds, "executed": executed.to_dict() if executed else None}


def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Generate every prompt dense and with the plan, same seeds, and report the differences."""
    from .evaluation.fidelity import evaluate, summarise_metrics
    from .evaluation.report import ReportData, environment, write_report
    from .files import check_writable, writing_folder
    from .integration.apply import apply, dense, report
    from .integration.generate import generate_clip
    from .plan.plan import Plan

    prompts = _prompts(args.prompts)
    check_writable(args.out, REPORT_FOLDER)
    plan = Plan.from_pretrained(_plan_of(args))
    pipe = _pipeline(args)
    apply(pipe, plan, strict=not args.allow_dense, precision=args.precision)
    with writing_folder(args.out, REPORT_FOLDER) as folder, _steps(args, 2 * len(prompts)) as step:

        def generate(prompt: str, seed: int) -> Any:
            return generate_clip(pipe, prompt, seed, steps=args.steps, on_step=step, **_call(args))

        pairs = list(evaluate(generate, prompts, (args.seed,), dense=partial(dense, pipe)))
        executed, summary = report(pipe), summarise_metrics([pair.fidelity for pair in pairs])
        numbers = {
            "model": args.model,
            "density": {name: part.density for name, part in plan.items()},
            "summary": {name: each.to_dict() for name, each in summary.items()},
            "clips": [pair.record() for pair in pairs],
            "executed": executed.to_dict(),
            "environment": environment(pipe.device),
        }
        (folder / "results.json").write_text(json.dumps(numbers, indent=1) + "\n")
        data = ReportData(
            title=f"PAROAttention against dense attention: {args.model}",
            clips=pairs,
            plan=plan,
            execution={"layers": executed.rows()},
            command=args.words,
            versions=environment(pipe.device),
        )
        write_report(data, folder / "report.html")
    seconds = {"dense": sum(p.dense_seconds for p in pairs), "sparse": sum(p.sparse_seconds for p in pairs)}
    _say_summary(numbers["summary"], seconds)
    _end(
        args.out / "report.html",
        "open it in a browser; for other densities, paro plan PLAN --density 0.2 --out plan20/",
    )
    return numbers


def _pipeline(args: argparse.Namespace) -> Any:
    """The bundled pipeline for "demo", or a diffusers pipeline by folder or hub id."""
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.model == "demo":
        from .demo.pipeline import load_demo

        return load_demo(device)
    from diffusers import DiffusionPipeline

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    try:
        pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype).to(device)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise ValueError(
            f"{args.model!r} is neither demo, nor a diffusers model folder or hub id that loads here: {error}. "
            'Most pipelines need `pip install "paroattn[models]"`.'
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _plan_of(args: argparse.Namespace) -> Path:
    """The plan asked for; the bundled model has one of its own."""
    if args.plan is not None:
        return args.plan
    if args.model == "demo":
        from .demo.pipeline import PLAN

        return PLAN
    raise ValueError("--plan is needed, or --dense for dense attention. Make one with paro calibrate.")


def _prompts(path: Path) -> list[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{path} must hold at least one prompt, one a line; got none")
    return prompts


def _plan_settings(args: argparse.Namespace) -> Any:
    from .plan.search import PHASE_ENDS, PlanSettings

    return PlanSettings(
        density=args.density,
        order_score=args.order_score,
        mask_score=args.mask_score,
        budget=args.budget,
        orders=tuple(args.orders),
        phase_ends=tuple(args.phase_ends or PHASE_ENDS),
        precision=args.precision,
    )


def _block(text: str) -> tuple[int, int]:
    from .block_mask import parse_block

    return parse_block(text)


def _call(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in CALL_ARGUMENTS if (value := getattr(args, name)) is not None}


def _describe(plan: Any) -> dict[str, Any]:
    return {
        name: {
            "model_class": part.model_class,
            "grid": str(part.grid),
            "block": "x".join(map(str, part.block)),
            "density": part.density,
            "phases": [vars(phase) for phase in part.phases],
            "layers": {
                path: {
                    "orders": list(layer.orders),
                    "density": layer.mask.head_density().mean(0).tolist(),
                    "precision": sorted({name for heads in layer.precision for name in heads}),
                }
                for path, layer in part.layers.items()
            },
        }
        for name, part in plan.items()
    }


def _table(name: str, part: Any) -> Any:
    from collections import Counter

    from rich.table import Table

    precisions = sorted({name for layer in part.layers.values() for heads in layer.precision for name in heads})
    size = "×".join(map(str, part.block))
    title = f"{name}: {part.model_class}, grid {part.grid}, blocks of {size}\ndensity {part.density:.3f}"
    table = Table(title=f"{title}, precision {', '.join(precisions)}", title_justify="left")
    table.add_column("layer", no_wrap=True)
    table.add_column("orders (heads)")
    for index, phase in enumerate(part.phases):
        table.add_column(f"phase {index}\nσ≥{phase.lowest_noise:.2f}", justify="right", no_wrap=True)
    table.add_column("heads", justify="right", no_wrap=True)
    for path, layer in part.layers.items():
        density = layer.mask.head_density()
        orders = ", ".join(f"{order} {count}" for order, count in Counter(layer.orders).most_common())
        heads = density.mean(0)
        phases = [f"{value:.2f}" for value in density.mean(1).tolist()]
        table.add_row(path, orders, *phases, f"{heads.min():.2f}–{heads.max():.2f}")
    return table


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def _stages() -> Iterator[Callable[[str, float], None]]:
    """Progress bars, one per stage, made when a stage first reports."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=_console()) as progress:

        def stage(name: str, done: float) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=1.0)
            progress.update(tasks[name], completed=done)

        yield stage


@contextmanager
def _steps(args: argparse.Namespace, clips: int) -> Iterator[Callable[[], None]]:
    """A progress bar over the steps of all clips; without a total while the number of steps is the pipeline's own."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console()) as progress:
        task = progress.add_task("generating", total=clips * args.steps if args.steps else None)
        yield lambda: progress.advance(task)


def _say_summary(summary: dict[str, Any], seconds: dict[str, float]) -> None:
    psnr, ssim = summary["psnr"], summary["ssim"]
    quality = "identical" if psnr["mean"] is None else f"{psnr['mean']:.1f} dB PSNR (worst {psnr['lowest']:.1f})"
    speed = seconds["dense"] / seconds["sparse"]
    _say(
        f"against dense: {quality}, SSIM {ssim['mean']:.3f}; "
        f"{seconds['dense']:.1f} s dense, {seconds['sparse']:.1f} s sparse ({speed:.2f}×)"
    )


def _end(path: Path, following: str) -> None:
    _say(f"wrote {path}\nnext: {following}")


def _say(text: str) -> None:
    _console().print(text, highlight=False, soft_wrap=True, markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="paro", description="Sparse, quantised attention for diffusion transformers.")
    parser.add_argument("--version", action="version", version=f"paroattn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def command(name: str, run: Callable[[argparse.Namespace], dict[str, Any]], *parts: Callable) -> None:
        sub = commands.add_parser(name, parents=[common], help=run.__doc__, description=run.__doc__)
        sub.set_defaults(run=run)
        for part in parts:
            part(sub)

    command("demo", _demo, _demo_arguments)
    command("calibrate", _calibrate, _model_arguments, _calibration_arguments, _plan_arguments, _call_arguments)
    command("plan", _plan, _replan_arguments, _plan_arguments)
    command("show", _show, _show_arguments)
    command("generate", _generate, _model_arguments, _run_arguments, _generate_arguments, _call_arguments)
    command("evaluate", _evaluate, _model_arguments, _run_arguments, _evaluate_arguments, _call_arguments)
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0; got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more; got {text}")
    return value


def _demo_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", type=Path, default=Path("paro-demo"), help="folder to write (default: %(default)s)")
    sub.add_argument("--density", type=float, help="kept share of blocks of the plan it makes")
    sub.add_argument("--clips", type=int, help="pairs of clips to generate")
    sub.add_argument("--steps", type=int, help="inference steps of every clip")
    sub.add_argument("--calibration-steps", type=int, help="steps of the calibration run")
    sub.add_argument("--seed", type=int, help="seed of every clip")


def _model_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", help='"demo" for the bundled model, or a diffusers model folder or hub id')
    sub.add_argument("--device", help="such as cuda or cpu (default: cuda if there is one)")
    sub.add_argument(
        "--seed", type=int, default=0, help="seed of the clips; calibration counts up from it (default: %(default)s)"
    )
    sub.add_argument("--precision", help="such as int8, bf16 or int8/fp8 (default: the plan's, or the model's dtype)")


def _calibration_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--prompts", type=Path, required=True, help="text file, one prompt a line; one or two suffice")
    sub.add_argument("--out", type=Path, required=True, help="folder to write")
    sub.add_argument(
        "--steps", type=_count, default=10, help="steps of the calibration schedule (default: %(default)s)"
    )
    sub.add_argument("--block", default="64x64", help="query x key tokens of a block (default: %(default)s)")
    sub.add_argument("--row-stride", type=int, default=1, help="measure one query row in so many (default: all)")


def _replan_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("plan", type=Path, help="folder that paro calibrate wrote")
    sub.add_argument("--out", type=Path, required=True, help="folder to write")
    sub.add_argument("--precision", help="precision of every head (default: as in the plan)")


def _plan_arguments(sub: argparse.ArgumentParser) -> None:
    from .grid import ORDERS, TILES

    sub.add_argument(
        "--density", type=float, default=0.25, help="kept share of the video's blocks (default: %(default)s)"
    )
    sub.add_argument("--order-score", default="output_error", help="none, paper, mass or output_error")
    sub.add_argument("--mask-score", default="output_error", help="mass or output_error")
    sub.add_argument("--budget", default="layer_normalised", help="global, per_head or layer_normalised")
    sub.add_argument(
        "--orders", nargs="+", default=list(ORDERS), help=f"candidates, also tiles such as {' '.join(TILES)}"
    )
    sub.add_argument("--phase-ends", type=float, nargs="+", help="shares of the steps at which phases end")


def _show_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("plan", help="plan folder or hub id")
    sub.add_argument("--html", type=Path, help="also draw orders, densities and masks into this file")


def _run_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--plan", help="plan folder or hub id (default for demo: the plan that ships)")
    sub.add_argument("--steps", type=_count, help="inference steps (default: the pipeline's own)")
    sub.add_argument(
        "--allow-dense", action="store_true", help="run calls that do not fit the plan dense instead of failing"
    )


def _generate_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--prompt", required=True, help="what to show")
    sub.add_argument("--out", type=Path, required=True, help=".mp4, .gif, .webp or .png")
    sub.add_argument("--fps", type=_positive, default=8.0, help="frames per second of the file (default: %(default)s)")
    sub.add_argument("--dense", action="store_true", help="dense attention, no plan")


def _evaluate_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--prompts", type=Path, required=True, help="text file, one prompt a line")
    sub.add_argument("--out", type=Path, required=True, help="folder to write")


def _call_arguments(sub: argparse.ArgumentParser) -> None:
    for name in ("height", "width", "num-frames"):
        sub.add_argument(f"--{name}", type=_count, help="of the video (default: the pipeline's own)")
    sub.add_argument("--guidance-scale", type=float, help="classifier-free guidance")
    sub.add_argument("--negative-prompt", help="for classifier-free guidance")


if __name__ == "__main__":
    sys.exit(main())
