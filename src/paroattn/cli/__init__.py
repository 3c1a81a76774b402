"""The command `paro`: one sub-command per stage; each reads what the one before wrote and names the next."""

import argparse
import json
import shlex
import sys
from typing import Any

from .arguments import parser
from .doctor import examine
from .evaluation import evaluate
from .inputs import call_of, pipeline_of, plan_of, prompt_of
from .planning import calibrate, described, plan, refine
from .terminal import console, curve_table, end, plan_table, say, say_summary, stages, steps, which

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
        print(f"paro {args.command}{which()}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        left = (
            "the same command goes on from here" if args.command in ("calibrate", "evaluate") else "nothing was written"
        )
        print(f"paro {args.command}: interrupted; {left}", file=sys.stderr)
        return 130
    if args.json and not which():
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


def _show(args: argparse.Namespace) -> dict[str, Any]:
    """Show orders, density and precision per layer, as a table and as pictures."""
    from ..evaluation.plan_page import check_picture
    from ..evaluation.video import check_file
    from ..plan.curve import curve_of
    from ..plan.plan import Plan
    from ..plan.worth import judge

    plan = Plan.from_pretrained(args.plan)
    if not all(0 <= args.phase < len(part.phases) for part in plan.values()):
        last = min(len(part.phases) for part in plan.values()) - 1
        raise ValueError(f"--phase must be 0…{last}; got {args.phase}")
    for path, kind in ((args.png, check_picture), (args.html, check_file)):
        if path:
            kind(path)
    worth = {name: judge(part, args.gpu) for name, part in plan.items()}
    for name, part in plan.items():
        console().print(plan_table(name, part))
        if curve := curve_of(part.made):
            console().print(curve_table(name, curve))
        say(f"{name}: {worth[name]}")
    following = f"paro generate MODEL --plan {args.plan} --prompt PROMPT --out out.mp4"
    if args.png:
        from ..evaluation.plan_page import write_plan_picture

        end(write_plan_picture(plan, args.png, phase=args.phase), following)
    if args.html:
        from ..evaluation.plan_page import write_plan

        end(write_plan(plan, args.html, title=f"Attention plan {args.plan}", phase=args.phase), following)
    return {name: each | {"runs_dense": vars(worth[name])} for name, each in described(plan).items()}


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    """Generate one clip or image with a plan, or dense without one; under torchrun, on several GPUs together."""
    import time

    from ..evaluation.video import check_clip_path, write_clip
    from ..integration.apply import apply, report
    from ..integration.generate import generate_clip
    from ..integration.processes import joined, rank
    from ..integration.splits import split_sequence
    from ..plan.plan import Plan

    check_clip_path(args.out)
    if args.dense and (args.plan or args.precision or args.allow_dense):
        raise ValueError("--dense runs without a plan; leave out --plan, --precision and --allow-dense")
    prompt, call = prompt_of(args), call_of(args)
    plan = Plan.from_pretrained(plan_of(args)) if not args.dense else None
    with joined() as processes:
        pipe = pipeline_of(args)
        if plan is not None:
            apply(pipe, plan, strict=not args.allow_dense, precision=args.precision, even_if_slower=args.even_if_slower)
        if processes > 1:
            split_sequence(pipe)
        began = time.perf_counter()
        with steps(args.steps) as step:
            frames = generate_clip(pipe, prompt, args.seed, steps=args.steps, on_step=step, **call)
    seconds = time.perf_counter() - began
    executed = report(pipe) if plan is not None else None
    if executed is not None:
        say(str(executed))
    if rank() == 0:
        given = f" --plan {args.plan}" if args.plan else ""
        following = f"paro evaluate {args.model}{given} --prompts prompts.txt --out report/"
        end(write_clip(frames, args.out, fps=args.fps), following)
    return {
        "out": str(args.out), "seconds": seconds, "processes": processes,
        "executed": executed.to_dict() if executed else None,
    }  # fmt: skip


COMMANDS = {
    "demo": _demo,
    "calibrate": calibrate,
    "plan": plan,
    "refine": refine,
    "show": _show,
    "generate": _generate,
    "evaluate": evaluate,
    "doctor": examine,
}
