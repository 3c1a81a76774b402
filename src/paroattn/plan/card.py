"""The model card of a plan: what it is for, how much it keeps, how good it is if anyone measured, how it was made."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .curve import MEANINGS, curve_of
from .plan import CARRIED, HUB_ID, Plan, TransformerPlan

_UNITS = {"psnr": ("PSNR, dB", ".1f"), "ssim": ("SSIM", ".4f"), "cosine": ("cosine", ".4f")}
_CALLED_WITH = ("num_frames", "height", "width")


def model_card(plan: Plan, evaluation: Mapping[str, Any] | None = None) -> str:
    """The card, as Markdown with the metadata that the Hugging Face Hub reads.

    Args:
        plan: What the card describes.
        evaluation: Content of the results.json of `paro evaluate`. None: the card says that nobody measured.
    """
    model = _model(plan)
    classes = ", ".join(dict.fromkeys(part.model_class for part in plan.values()))
    sections = [
        _metadata(model),
        f"# Attention plan for {model or classes}",
        "Block-sparse self-attention, planned once: which key blocks every query block reads, the order in which every "
        "head reads the video's tokens, and the number format. It holds no weights and changes none.",
        _usage(model),
        "## What it is for",
        *(_component(name, part) for name, part in plan.items()),
        "A call of another size is refused with both sizes, or runs dense if the plan was applied with "
        "`strict=False`. Weights, precision and LoRA of the model may differ from those it was calibrated with; its "
        "configuration may not.",
        "## Density",
        *(_density(name, part) for name, part in plan.items()),
        "## Quality and speed",
        _quality(evaluation),
        "## How it was made",
        *(_made(name, part) for name, part in plan.items()),
    ]
    return "\n\n".join(sections) + "\n"


def _model(plan: Plan) -> str | None:
    """Name on the Hub of the model that was calibrated, if it has one."""
    names = {_calibration(part).get("model") for part in plan.values()}
    name = next(iter(names)) if len(names) == 1 else None
    return name if isinstance(name, str) and HUB_ID.fullmatch(name) else None


def _calibration(plan: TransformerPlan) -> Mapping[str, Any]:
    found = plan.made.get("calibration")
    return found if isinstance(found, Mapping) else {}


def _metadata(model: str | None) -> str:
    lines = ["library_name: paroattn", *([f"base_model: {model}"] if model else [])]
    lines += ["tags:", "- paroattn", "- diffusers", "- sparse-attention"]
    return "\n".join(["---", *lines, "---"])


def _usage(model: str | None) -> str:
    return "\n".join(
        [
            "```python",
            "import paroattn",
            "from diffusers import DiffusionPipeline",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{model or "the model it was made for"}")',
            'plan = paroattn.Plan.from_pretrained("this repository, or a folder")',
            "paroattn.apply(pipe, plan)  # paroattn.remove(pipe) takes it off again",
            "```",
        ]
    )


def _component(name: str, plan: TransformerPlan) -> str:
    call = _calibration(plan).get("call")
    carried = plan.made.get(CARRIED)
    known = call if isinstance(call, Mapping) and not carried else {}
    size = [f"{key} {known[key]}" for key in _CALLED_WITH if known.get(key) is not None]
    rows = {
        "model": plan.model_class,
        "self-attentions": f"{len(plan.layers)} of {plan.heads} heads × {plan.head_dim}",
        "grid": f"{plan.grid} tokens (frames × height × width), {plan.grid.tokens} in all",
        "carried over from": f"{carried[-1]} tokens; what that loses was not measured" if carried else None,
        "pipeline called with": ", ".join(size) or None,
        "text in the sequence": f"{plan.text.tokens} tokens, {plan.text.side}" if plan.text.tokens else "none",
        "block": f"{plan.block[0]} query × {plan.block[1]} key tokens",
        "precision": ", ".join(f"{form} ({share:.0%})" for form, share in plan.precision_shares().items()),
        "configuration, SHA-256": plan.config_sha256,
    }
    return _table((name, ""), [(key, value) for key, value in rows.items() if value is not None])


def _density(name: str, plan: TransformerPlan) -> str:
    rows = [
        (f"down to {phase.lowest_noise:.3f}", f"{phase.share:.0%}", f"{float(density):.3f}")
        for phase, density in zip(plan.phases, plan.phase_density(), strict=True)
    ]
    kept = _table(
        (f"{name}: noise level", "share of the steps", "blocks kept"), [*rows, ("all", "100%", f"{plan.density:.3f}")]
    )
    return "\n\n".join([kept, *_predicted(plan)])


def _predicted(plan: TransformerPlan) -> list[str]:
    """What the models of error and cost say, in a sentence; nothing where the plan does not hold its curve."""
    curve = curve_of(plan.made)
    if curve is None:
        return []
    chosen = curve["chosen"]
    decibels = "none" if chosen["snr_db"] is None else f"{chosen['snr_db']:.1f} dB"
    words = f"Predicted, not measured: relative squared error {MEANINGS[curve['error_of']]} {decibels}"
    times = {"attention": chosen["attention_speedup"], "one compiled forward": chosen["speedup"]}
    known = [f"{what} {value:.2f}×" for what, value in times.items() if value is not None]
    return [f"{words}; faster than dense on an {curve['gpu']}: {', '.join(known)}." if known else f"{words}."]


def _quality(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return "Not measured. `paro evaluate MODEL --plan PLAN --prompts prompts.txt --out report/` measures both."
    rows = []
    for key, (title, form) in _UNITS.items():
        found = (evaluation.get("summary") or {}).get(key)
        if found:
            rows.append((title, *(_number(found.get(field), form) for field in ("mean", "spread", "lowest", "count"))))
    lines = [_table(("against dense, same seeds", "mean", "spread", "worst clip", "clips"), rows)] if rows else []
    dense, sparse = (_seconds(evaluation.get("clips"), side) for side in ("dense_seconds", "sparse_seconds"))
    machine = (evaluation.get("environment") or {}).get("device")
    if dense and sparse:
        where = f" on {machine}" if machine else ""
        lines.append(f"{dense:.1f} s a clip dense, {sparse:.1f} s with the plan{where}: {dense / sparse:.2f}×.")
    return "\n\n".join(lines) or "The evaluation holds no numbers."


def _seconds(clips: Any, side: str) -> float | None:
    times = [clip[side] for clip in clips or () if clip.get(side)]
    return sum(times) / len(times) if times else None


def _number(value: Any, form: str) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else format(value, form)


def _made(name: str, plan: TransformerPlan) -> str:
    made = {key: value for key, value in plan.made.items() if key != "curve"}
    text = json.dumps(made, indent=1, ensure_ascii=False, default=str)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{name}:\n\n{fence}json\n{text}\n{fence}"


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
