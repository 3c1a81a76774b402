"""The command `paro`: one sub-command per stage; each reads what the one before wrote and names the next."""

import argparse
import json
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .arguments import parser
from .doctor import examine
from .terminal import console, end, plan_table, say, say_summary, stages, steps

CALL_ARGUMENTS = ("height", "width", "num_frames", "guidance_scale", "negative_prompt")
REPORT_FOLDER = ("report.html", "results.json")
EXPECTED_ERRORS = (ValueError, TypeError, OSError, RuntimeError, ImportError)


def main(argv: list[str] | None = None) -> int:
    """Run `paro`; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser(COMMANDS).parse_args(argv)
    args.words = "paro " + shlex.join(argv)
    try:
        result = args.run(args)
    except EXPECTED_ERRORS as error:
        if args.debug:
            raise
        print(f"paro {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        left = "the same command goes on from here" if args.command == "calibrate" else "nothing was written"
        print(f"paro {args.command}: interrupted; {left}", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps(result, indent=1, default=str))
    return 1 if result.get("problems") else 0


def _demo(args: argparse.Namespace) -> dict[str, Any]:
    """Run the whole story on the bundled model and write an HTML report."""
    from ..demo.story import FOLDER, REPORT, DemoSettings, run_demo
    from ..files import check_writable

    given = {name: getattr(args, name) for name in ("density", "clips", "steps", "calibration_steps", "seed")}
    settings = DemoSettings(**{name: value for name, value in given.items() if value is not None})
    check_writable(args.out, FOLDER)
    with stages() as stage:
        numbers = run_demo(args.out, settings, stage, args.words)
    say_summary(numbers["summary"], numbers["seconds"])
    end(args.out / REPORT, "open it in a browser, then try: paro generate demo --prompt "
         '"a red disc moving right over coffee, camera pans left" --out clip.gif')  # fmt: skip
    return numbers


def _calibrate(args: argparse.Namespace) -> dict[str, Any]:
    """Run a model on calibration prompts; write block statistics and the plan made from them."""
    from ..files import check_writable
    from ..integration.calibrate import collect, needed_by, own_precision
    from ..integration.collecting import explained
    from ..integration.journal import discard, unfinished
    from ..integration.sensitivity import measure_sensitivity
    from ..plan.plan import FOLDER

    prompts, call = _prompts(args), _call(args)
    settings = _plan_settings(args)
    capture = needed_by(settings, block=_block(args.block), row_stride=args.row_stride)
    check_writable(args.out, FOLDER)
    pipe = _pipeline(args)
    settings = replace(settings, precision=args.precision or own_precision(pipe))
    journal = unfinished(args.out)
    if journal.exists():
        say(f"going on with {journal}")
    with stages() as stage:
        report = partial(stage, f"calibrating on {len(prompts)} prompts")
        measured = collect(
            pipe, prompts, steps=args.steps, capture=capture, settings=settings, journal=journal, seed=args.seed,
            progress=report, **call,
        )  # fmt: skip
    with explained(journal), stages() as stage:
        measure_sensitivity(
            pipe, measured, prompts, what=args.sensitivity, seeds=args.sensitivity_seeds, settings=settings,
            steps=args.steps, seed=args.seed, precision=own_precision(pipe),
            progress=partial(stage, "measuring sensitivity"), **call,
        )  # fmt: skip
    with explained(journal):
        result = _write_plan(measured, settings, args.out)
    discard(journal)
    return result


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    """Make another plan from the statistics of a calibration, without running the model."""
    from ..files import check_writable
    from ..integration.calibrate import load_statistics
    from ..plan.plan import FOLDER, STATISTICS, Plan

    settings = _plan_settings(args)
    check_writable(args.out, FOLDER)
    measured = load_statistics(args.plan / STATISTICS)
    if not args.precision:
        layers = next(iter(Plan.from_pretrained(args.plan).values())).layers
        settings = replace(settings, precision=next(iter(layers.values())).precision[0][0])
    return _write_plan(measured, settings, args.out)


def _refine(args: argparse.Namespace) -> dict[str, Any]:
    """Choose the masks of a plan anew by the error that the model really makes with it."""
    from ..files import check_writable
    from ..integration.calibrate import load_statistics
    from ..integration.refining import Refinement, refine
    from ..plan.plan import FOLDER, STATISTICS, Plan

    prompts, call = _prompts(args), _call(args)
    refinement = Refinement(args.rounds, args.clips, checkpointing=not args.keep_activations)
    check_writable(args.out, FOLDER)
    measured = load_statistics(args.plan / STATISTICS)
    plan, pipe = Plan.from_pretrained(args.plan), _pipeline(args)
    with stages() as stage:
        refined = refine(
            pipe, plan, measured, prompts, refinement=refinement, steps=args.steps, seed=args.seed,
            progress=partial(stage, f"refining with {args.rounds * args.clips} clips"), **call,
        )  # fmt: skip
    return _keep(refined, measured, args.out)


def _write_plan(measured: dict[str, Any], settings: Any, out: Path) -> dict[str, Any]:
    """Make a plan and write it with the statistics it was made from."""
    from ..plan.plan import Plan
    from ..plan.search import make_plan

    return _keep(Plan({name: make_plan(each, settings) for name, each in measured.items()}), measured, out)


def _keep(plan: Any, measured: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write a plan with the statistics it was made from."""
    from ..files import writing_folder
    from ..integration.calibrate import save_statistics
    from ..plan.plan import FOLDER, STATISTICS

    with writing_folder(out, FOLDER) as folder:
        plan.write(folder)
        save_statistics(measured, folder / STATISTICS)
    end(out, f"paro show {out}")
    return _describe(plan)


def _show(args: argparse.Namespace) -> dict[str, Any]:
    """Show orders, density and precision per layer, as a table and as pictures."""
    from ..plan.plan import Plan

    plan = Plan.from_pretrained(args.plan)
    if not all(0 <= args.phase < len(part.phases) for part in plan.values()):
        raise ValueError(f"--phase must be below {min(len(part.phases) for part in plan.values())}; got {args.phase}")
    for name, part in plan.items():
        console().print(plan_table(name, part))
    following = f"paro generate MODEL --plan {args.plan} --prompt PROMPT --out out.mp4"
    if args.png:
        from ..evaluation.plan_page import write_plan_picture

        end(write_plan_picture(plan, args.png, phase=args.phase), following)
    if args.html:
        from ..evaluation.plan_page import write_plan

        end(write_plan(plan, args.html, title=f"Attention plan {args.plan}", phase=args.phase), following)
    return _describe(plan)


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    """Generate one clip or image with a plan, or dense without one."""
    import time

    from ..evaluation.video import check_clip_path, write_clip
    from ..integration.apply import apply, report
    from ..integration.generate import generate_clip
    from ..plan.plan import Plan

    check_clip_path(args.out)
    if args.dense and (args.plan or args.precision or args.allow_dense):
        raise ValueError("--dense runs without a plan; leave out --plan, --precision and --allow-dense")
    prompt, call = _prompt(args), _call(args)
    plan = Plan.from_pretrained(_plan_of(args)) if not args.dense else None
    pipe = _pipeline(args)
    if plan is not None:
        apply(pipe, plan, strict=not args.allow_dense, precision=args.precision)
    began = time.perf_counter()
    with steps(args.steps) as step:
        frames = generate_clip(pipe, prompt, args.seed, steps=args.steps, on_step=step, **call)
    seconds = time.perf_counter() - began
    executed = report(pipe) if plan is not None else None
    if executed is not None:
        say(str(executed))
    given = f" --plan {args.plan}" if args.plan else ""
    following = f"paro evaluate {args.model}{given} --prompts prompts.txt --out report/"
    end(write_clip(frames, args.out, fps=args.fps), following)
    return {"out": str(args.out), "seconds": seconds, "executed": executed.to_dict() if executed else None}


def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Generate every prompt dense and with the plan, same seeds, and report the differences."""
    from ..evaluation.fidelity import evaluate, summarise_metrics
    from ..evaluation.report import ReportData, environment, write_report
    from ..files import check_writable, writing_folder
    from ..integration.apply import apply, dense, report
    from ..integration.generate import generate_clip
    from ..plan.plan import Plan

    prompts, call = _prompts(args), _call(args)
    check_writable(args.out, REPORT_FOLDER)
    plan = Plan.from_pretrained(_plan_of(args))
    pipe = _pipeline(args)
    apply(pipe, plan, strict=not args.allow_dense, precision=args.precision)
    with writing_folder(args.out, REPORT_FOLDER) as folder, steps(args.steps and 2 * len(prompts) * args.steps) as step:

        def generate(prompt: str, seed: int) -> Any:
            return generate_clip(pipe, prompt, seed, steps=args.steps, on_step=step, **call)

        pairs = list(evaluate(generate, prompts, (args.seed,), dense=partial(dense, pipe)))
        executed, summary = report(pipe), summarise_metrics([pair.fidelity for pair in pairs])
        numbers = {
            "model": args.model,
            "density": {name: part.density for name, part in plan.items()},
            "summary": {name: each.to_dict() for name, each in summary.items()},
            "clips": [pair.record() for pair in pairs],
            "executed": executed.to_dict(),
            "environment": environment(_device_of(pipe)),
        }
        (folder / "results.json").write_text(json.dumps(numbers, indent=1) + "\n")
        data = ReportData(
            title=f"PAROAttention against dense attention: {args.model}",
            clips=pairs,
            plan=plan,
            execution={"layers": executed.rows()},
            command=args.words,
            versions=environment(_device_of(pipe)),
            fps=args.fps,
        )
        write_report(data, folder / "report.html")
    seconds = {"dense": sum(p.dense_seconds for p in pairs), "sparse": sum(p.sparse_seconds for p in pairs)}
    say_summary(numbers["summary"], seconds)
    end(
        args.out / "report.html",
        "open it in a browser; for other densities, paro plan PLAN --density 0.2 --out plan20/",
    )
    return numbers


def _pipeline(args: argparse.Namespace) -> Any:
    """The bundled pipeline for "demo", or a diffusers pipeline by folder or hub id."""
    from ..integration.pipelines import default_device, dtype_of, load_pipeline, place, read_arguments

    device = args.device or default_device()
    if args.model == "demo":
        from ..demo.pipeline import load_demo

        return place(load_demo(dtype=dtype_of(args.dtype or "fp32", device)), device, args.offload)
    settings = {"device": device, "dtype": args.dtype, "vae_dtype": args.vae_dtype, "pipeline": args.pipeline}
    load = dict.fromkeys(args.without) | read_arguments(args.load)
    return load_pipeline(args.model, **settings, offload=args.offload, vae_tiling=args.vae_tiling, **load)


def _device_of(pipe: Any) -> Any:
    """Where the pipeline computes, which is not where its weights wait if they are offloaded."""
    return getattr(pipe, "_execution_device", pipe.device)


def _plan_of(args: argparse.Namespace) -> Path:
    """The plan asked for; the bundled model has one of its own."""
    if args.plan is not None:
        return args.plan
    if args.model == "demo":
        from ..demo.pipeline import PLAN

        return PLAN
    raise ValueError("--plan is needed, or --dense for dense attention. Make one with paro calibrate.")


def _prompts(args: argparse.Namespace) -> list[str]:
    """All prompts asked for: those of the file, those given as words, and those given as embeddings."""
    from ..integration.pipelines import read_embeddings, read_prompts

    prompts = [*(read_prompts(args.prompts) if args.prompts else []), *args.prompt]
    prompts += map(read_embeddings, args.prompt_embeds)
    if not prompts:
        raise ValueError("at least one prompt is needed; give --prompts FILE, --prompt TEXT or --prompt-embeds FILE")
    return prompts


def _prompt(args: argparse.Namespace) -> str:
    from ..integration.pipelines import read_embeddings

    given = [*([args.prompt] if args.prompt else []), *map(read_embeddings, args.prompt_embeds)]
    if len(given) != 1:
        raise ValueError(f"one prompt is needed, as --prompt TEXT or --prompt-embeds FILE; got {len(given)}")
    return given[0]


def _plan_settings(args: argparse.Namespace) -> Any:
    from ..plan.search import PHASE_ENDS, PlanSettings

    return PlanSettings(
        density=args.density,
        order_score=args.order_score,
        mask_score=args.mask_score,
        budget=args.budget,
        orders=tuple(args.orders) if args.orders else None,
        phase_ends=tuple(args.phase_ends or PHASE_ENDS),
        precision=args.precision,
    )


def _block(text: str) -> tuple[int, int]:
    from ..block_mask import parse_block

    return parse_block(text)


def _call(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline's call; pictures are read here, before any work."""
    from ..integration.pipelines import read_arguments, read_file

    call = {name: value for name in CALL_ARGUMENTS if (value := getattr(args, name)) is not None}
    pictures = [read_file(path) for path in args.image]
    call |= {"image": pictures if len(pictures) > 1 else pictures[0]} if pictures else {}
    return call | read_arguments(args.set)


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


COMMANDS = {
    "demo": _demo,
    "calibrate": _calibrate,
    "plan": _plan,
    "refine": _refine,
    "show": _show,
    "generate": _generate,
    "evaluate": _evaluate,
    "doctor": examine,
}
