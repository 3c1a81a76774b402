"""`paro evaluate`: every prompt dense and with a plan, alone or as one of several ranks, resumable, into one report."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from .inputs import call_of, device_of, pipeline_of, plan_of, prompts_of
from .terminal import end, say, say_summary, stages

REPORT, RESULTS = "report.html", "results.json"
FOLDER = (REPORT, RESULTS)
USUAL_STEPS = 50  # where the pipeline alone knows how many it takes, for the progress bar


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Generate every prompt dense and with the plan, same seeds, and report the differences."""
    from ..evaluation.metrics import check_metric
    from ..evaluation.ranks import ranks
    from ..files import check_writable, existing_file, read_json

    _ = prompts_of(args), call_of(args)  # what is wrong with them is said before any work
    check_writable(args.out, FOLDER)
    for name in args.metrics:
        check_metric(name)
    other = read_json(existing_file(args.against / RESULTS, "what --against compares with")) if args.against else None
    with ranks(args.timeout) as group:
        numbers = _evaluate(args, group, other)
    if not group.first:
        return {}
    seconds = {side: sum((clip[f"{side}_seconds"] for clip in numbers["clips"]), 0.0) for side in ("dense", "sparse")}
    say_summary(numbers["summary"], seconds)
    following = "open it in a browser; for other densities, paro plan PLAN --density 0.2 --out plan20/"
    end(args.out / REPORT, following)
    return numbers


def _evaluate(args: argparse.Namespace, group: Any, other: Mapping[str, Any] | None) -> dict[str, Any]:
    """Make this rank's share of the pairs; rank 0 then waits for the others and writes the report."""
    from ..evaluation.metrics import load_metrics
    from ..evaluation.pairs import Pairs
    from ..integration.journal import discard, unfinished
    from ..plan.plan import Plan

    prompts = prompts_of(args)
    plan = Plan.from_pretrained(plan_of(args))
    asked = _asked(args, prompts, plan)
    group.agree(asked)
    pipe = pipeline_of(args)
    measures, over_all = load_metrics(args.metrics, str(device_of(pipe)))
    wanted = [(prompt, args.seed + sample) for prompt in prompts for sample in range(args.samples)]
    folder = unfinished(args.out)
    if group.first and folder.exists():
        say(f"going on with {folder}")
    pairs = Pairs(folder, asked, fps=args.fps, pixels=bool(over_all))
    todo = group.share(set(range(len(wanted))) - pairs.done())
    with stages() if group.first else nullcontext(lambda name, done: None) as stage:

        def show(part: float = 0.0) -> None:
            stage(f"evaluating {len(wanted)} pairs", (len(pairs.done()) + part) / len(wanted))

        make = _Maker(args, pipe, plan, measures, show)
        for number in todo:
            pairs.keep(number, *make(*wanted[number]))
            show()
        if not group.first:
            return {}
        group.wait(range(len(wanted)), pairs.done, show)
    kept = [pairs.load(number) for number in range(len(wanted))]
    clips = (pairs.clips(number) for number in range(len(wanted)))
    together = {name: value for measure in over_all for name, value in measure(list(clips)).items()}
    numbers = _write(args, plan, kept, together, other, device_of(pipe))
    discard(folder)
    return numbers


class _Maker:
    """Makes one pair at a time, each with counters of its own."""

    def __init__(
        self, args: argparse.Namespace, pipe: Any, plan: Any, measures: Sequence[Any], show: Callable[[float], None]
    ):
        self.args, self.pipe, self.plan, self.measures, self.show = args, pipe, plan, measures, show
        self.call, self.latents = call_of(args), None
        self.done = 0.0

    def __call__(self, prompt: str, seed: int) -> tuple[Any, dict[str, Any]]:
        """The comparison, and what was executed for it."""
        from ..evaluation.fidelity import evaluate
        from ..integration.apply import apply, dense, remove, report

        self.done = 0.0
        allowed = {"strict": not self.args.allow_dense, "even_if_slower": self.args.even_if_slower}
        apply(self.pipe, self.plan, precision=self.args.precision, **allowed)
        try:
            (pair,) = evaluate(
                self._generate, [prompt], [seed], dense=partial(dense, self.pipe), measures=self.measures,
                latents=lambda: self.latents,
            )  # fmt: skip
            return pair, report(self.pipe).to_dict()
        finally:
            remove(self.pipe)

    def _generate(self, prompt: str, seed: int) -> Any:
        from ..integration.generate import generate_clip

        self.latents = None
        settings = {"steps": self.args.steps, "on_step": self._step, "on_latents": self._keep_latents}
        return generate_clip(self.pipe, prompt, seed, **settings, **self.call)

    def _keep_latents(self, latents: Any) -> None:
        self.latents = latents

    def _step(self) -> None:
        self.done = min(1.0, self.done + 0.5 / (self.args.steps or USUAL_STEPS))
        self.show(self.done)


def _asked(args: argparse.Namespace, prompts: Sequence[str], plan: Any) -> dict[str, Any]:
    """What makes two evaluations the same."""
    from ..integration.journal import described

    names = (
        "model", "seed", "samples", "steps", "precision", "allow_dense", "even_if_slower", "dtype", "metrics", "fps",
    )  # fmt: skip
    return {
        "prompts": described(list(prompts)), "call": described(call_of(args)), "plan": plan.digest(),
        **{name: getattr(args, name) for name in names},
    }  # fmt: skip


def _write(
    args: argparse.Namespace, plan: Any, kept: Sequence[Any], together: Mapping[str, float],
    other: Mapping[str, Any] | None, device: Any,
) -> dict[str, Any]:  # fmt: skip
    """Write the report and the numbers from what was kept."""
    from ..evaluation.fidelity import paired_differences, summarise_pairs
    from ..evaluation.report import ReportData, environment, write_report
    from ..files import writing_folder
    from ..integration.report import merged

    clips, executed = [each.comparison for each in kept], merged([each.executed for each in kept])
    summary, records = summarise_pairs(clips), [clip.record() for clip in clips]
    against = {} if other is None else paired_differences(records, other["clips"], summary)
    worst = min(clips, key=lambda clip: clip.fidelity.psnr)
    numbers = {
        "model": args.model,
        "density": {name: part.density for name, part in plan.items()},
        "summary": {name: each.to_dict() for name, each in summary.items()},
        "worst": worst.record(),
        "over_all": dict(together),
        "against": {name: each.to_dict() for name, each in against.items()},
        "clips": records,
        "executed": executed.to_dict(),
        "environment": environment(device),
    }
    with writing_folder(args.out, FOLDER) as folder:
        (folder / RESULTS).write_text(json.dumps(numbers, indent=1) + "\n")
        data = ReportData(
            title=f"PAROAttention against dense attention: {args.model}",
            clips=clips,
            plan=plan,
            differences=against,
            against=str(args.against or ""),
            over_all=together,
            execution={"layers": executed.rows()},
            command=args.words,
            versions=environment(device),
            fps=args.fps,
        )
        write_report(data, folder / REPORT)
    return numbers
