"""Commands that make plans: `paro calibrate`, `paro plan` and `paro refine`."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .inputs import call_of, pipeline_of, prompts_of
from .terminal import console, curve_table, end, say, stages


def calibrate(args: argparse.Namespace) -> dict[str, Any]:
    """Run a model on calibration prompts; write block statistics and the plan made from them."""
    from ..files import check_writable
    from ..integration.calibrate import check_times, collect, needed_by, own_precision
    from ..integration.collecting import explained
    from ..integration.journal import discard, unfinished
    from ..integration.processes import group, joined, wait
    from ..integration.sensitivity import measure_sensitivity
    from ..plan.plan import FOLDER

    prompts, call = prompts_of(args), call_of(args)
    settings = _plan_settings(args)
    capture = needed_by(settings, block=_block(args.block), row_stride=args.row_stride)
    check_writable(args.out, FOLDER)
    journal = unfinished(args.out)
    with joined():
        pipe = pipeline_of(args)
        settings = replace(settings, precision=args.precision or own_precision(pipe))
        check_times(pipe, settings, capture)
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
        result: dict[str, Any] = {}
        if group()[0] == 0:
            with explained(journal):
                result = _write_plan(measured, settings, args.out)
        wait()
        if group()[0] == 0:
            discard(journal)
    return result


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """Make another plan from the statistics of a calibration, without running the model, also for another grid."""
    from ..capture.regrid import regridded
    from ..evaluation.curve_page import check_curve_path
    from ..files import check_writable
    from ..grid import Grid
    from ..integration.calibrate import load_statistics
    from ..plan.plan import FOLDER, STATISTICS, Plan

    settings = _plan_settings(args)
    grid = None if args.grid is None else Grid.parse(args.grid)
    if args.out is None and args.curve is None:
        raise ValueError("--out FOLDER is needed for a plan, or --curve for what plans there could be; got neither")
    if args.out is not None:
        check_writable(args.out, FOLDER)
    if args.curve:
        check_curve_path(args.curve)
    if grid is not None and not (args.plan / STATISTICS).is_dir():
        return _carry(args, settings, grid)
    measured = load_statistics(args.plan / STATISTICS)
    if not args.precision:
        settings = replace(settings, **_precision_of(Plan.from_pretrained(args.plan)))
    if grid is not None:
        measured = {name: regridded(each, grid) for name, each in measured.items()}
    curves = {} if args.curve is None else _show_curves(measured, settings, args)
    plan = {} if args.out is None else _write_plan(measured, settings, args.out, carried=grid is not None)
    return plan if args.curve is None else plan | {"curves": curves}


def refine(args: argparse.Namespace) -> dict[str, Any]:
    """Choose the masks of a plan anew by the error that the model really makes with it."""
    from ..files import check_writable
    from ..integration.calibrate import load_statistics
    from ..integration.refining import Refinement, refine
    from ..plan.plan import FOLDER, STATISTICS, Plan

    prompts, call = prompts_of(args), call_of(args)
    refinement = Refinement(args.rounds, args.clips, checkpointing=not args.keep_activations)
    check_writable(args.out, FOLDER)
    measured = load_statistics(args.plan / STATISTICS)
    plan, pipe = Plan.from_pretrained(args.plan), pipeline_of(args)
    with stages() as stage:
        refined = refine(
            pipe, plan, measured, prompts, refinement=refinement, steps=args.steps, seed=args.seed,
            progress=partial(stage, f"refining with {args.rounds * args.clips} clips"), **call,
        )  # fmt: skip
    return _keep(refined, measured, args.out)


def _plan_settings(args: argparse.Namespace) -> Any:
    from ..plan.cost import check_gpu
    from ..plan.curve import error_of
    from ..plan.search import PHASE_ENDS, PlanSettings

    check_gpu(args.gpu)
    return PlanSettings(
        density=args.density,
        error=args.error if args.snr is None else error_of(args.snr),
        speedup=args.speedup,
        gpu=args.gpu,
        order_score=args.order_score,
        mask_score=args.mask_score,
        budget=args.budget,
        orders=tuple(args.orders) if args.orders else None,
        phase_ends=tuple(args.phase_ends or PHASE_ENDS),
        precision=args.precision,
        int4_share=args.int4_share,
    )


def _block(text: str) -> tuple[int, int]:
    from ..block_mask import parse_block

    return parse_block(text)


def _precision_of(plan: Any) -> dict[str, Any]:
    """Settings for heads in the precision of a plan's; chosen anew where heads differ."""
    from ..plan.mixing import AUTO

    part = next(iter(plan.values()))
    made = part.made.get("settings", {})
    if made.get("precision") == AUTO:
        return {"precision": AUTO, "int4_share": made.get("int4_share")}
    if len(part.precision_shares()) > 1:
        names = ", ".join(part.precision_shares())
        raise ValueError(f"heads of the plan have several precisions, {names}; give one with --precision, or {AUTO}")
    return {"precision": next(iter(part.precision_shares()))}


def _show_curves(measured: dict[str, Any], settings: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Show what every density would lose and take, with the point that the target comes to."""
    from ..evaluation.curve_page import write_curves
    from ..plan.curve import described
    from ..plan.search import Draft

    drafts = {name: Draft(each, settings) for name, each in measured.items()}
    if not all(draft.curve for draft in drafts.values()):
        raise ValueError("a curve needs one threshold; got the budget per_head. Choose another budget.")
    curves = {name: described(draft.curve, draft.density) for name, draft in drafts.items() if draft.curve}
    for name, curve in curves.items():
        console().print(curve_table(name, curve))
    if args.curve:
        end(write_curves(curves, args.curve), f"paro plan {args.plan} --density DENSITY --out PLAN")
    return curves


def _carry(args: argparse.Namespace, settings: Any, grid: Any) -> dict[str, Any]:
    """Write a plan for another grid from its masks alone, the same in everything else."""
    from ..plan.plan import Plan
    from ..plan.search import PlanSettings

    plan = Plan.from_pretrained(args.plan)
    if settings != PlanSettings() or args.out is None:
        raise ValueError(
            f"{args.plan} has no statistics, from which another plan could be made; got more than --grid and --out, "
            "which carry the masks as they are. Leave out the rest, or calibrate."
        )
    say(f"{args.plan} has no statistics: its masks are carried, which may lose much")
    carried = plan.for_grid(grid)
    carried.save_pretrained(args.out)
    end(args.out, _unmeasured(args.out))
    return described(carried)


def _unmeasured(out: Path) -> str:
    """What to do with a plan that nobody has measured where it is for."""
    return f"paro evaluate MODEL --plan {out} --prompts prompts.txt --out report/ tells what that loses"


def _write_plan(measured: dict[str, Any], settings: Any, out: Path, *, carried: bool = False) -> dict[str, Any]:
    """Make a plan and write it, with the statistics it was made from unless those are of another grid."""
    from ..plan.plan import Plan
    from ..plan.search import make_plan

    plan = Plan({name: make_plan(each, settings) for name, each in measured.items()})
    for name, part in plan.items():
        if "precision" in part.made:
            say(f"{name}: {part.made['precision']['why']}")
    if not carried:
        return _keep(plan, measured, out)
    plan.save_pretrained(out)
    end(out, _unmeasured(out))
    return described(plan)


def _keep(plan: Any, measured: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write a plan with the statistics it was made from."""
    from ..files import writing_folder
    from ..integration.calibrate import save_statistics
    from ..plan.plan import FOLDER, STATISTICS

    with writing_folder(out, FOLDER) as folder:
        plan.write(folder)
        save_statistics(measured, folder / STATISTICS)
    end(out, f"paro show {out}")
    return described(plan)


def described(plan: Any) -> dict[str, Any]:
    """A plan as the result of a command."""
    from ..plan.curve import curve_of

    return {
        name: {
            "model_class": part.model_class,
            "grid": str(part.grid),
            "block": "x".join(map(str, part.block)),
            "density": part.density,
            "precision": part.precision_shares(),
            "predicted": (curve_of(part.made) or {}).get("chosen"),
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
