"""The words of every command."""

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__

CANDIDATES = "FHW FWH HFW HWF WFH WHF 4x4x4 1x8x8 16x2x2 4x2x8"
"""As in grid.py, which loads PyTorch; help and a wrong word come without."""
Run = Callable[[argparse.Namespace], dict[str, Any]]


class _Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = f"{self.prog} {parsed.command}"
            self.exit(2, f"{command}: unknown arguments: {' '.join(unknown)}. {command} --help lists all options.\n")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. {self.prog} --help lists all options.\n")


def parser(commands: Mapping[str, Run]) -> argparse.ArgumentParser:
    """The parser of `paro`; a command's help is its function's docstring."""
    top = _Parser(prog="paro", description="Sparse, quantised attention for diffusion transformers.")
    top.add_argument("--version", action="version", version=f"paroattn {__version__}")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run in commands.items():
        words, parts = _ARGUMENTS[name]
        sub = subparsers.add_parser(name, help=run.__doc__, description=run.__doc__, usage=f"paro {name} {words}")
        sub.set_defaults(run=run)
        for title, part in parts.items():
            part(sub.add_argument_group(title))
        sub.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0; got {text}")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite; got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more; got {text}")
    return value


def _demo_arguments(sub: argparse._ArgumentGroup) -> None:
    sub.add_argument("--out", type=Path, default=Path("paro-demo"), help="folder to write (default: %(default)s)")
    sub.add_argument("--density", type=float, help="kept share of blocks of the plan it makes")
    sub.add_argument("--clips", type=int, help="pairs of clips to generate")
    sub.add_argument("--steps", type=int, help="inference steps of every clip")
    sub.add_argument("--calibration-steps", type=int, help="steps of the calibration run")
    sub.add_argument("--seed", type=int, help="seed of every clip")


def _model_arguments(sub: argparse._ArgumentGroup) -> None:
    sub.add_argument("model", help='"demo" for the bundled model, or a diffusers model folder or hub id')
    sub.add_argument(
        "--pipeline", help="class in diffusers, such as WanVideoToVideoPipeline (default: the model's own)"
    )
    sub.add_argument("--device", help="such as cuda or cpu (default: cuda if there is one)")
    sub.add_argument("--dtype", help="bf16, fp16 or fp32 (default: bf16 on a GPU, fp32 on a CPU)")
    sub.add_argument("--vae-dtype", help="of the VAE alone (default: as --dtype)")
    sub.add_argument("--vae-tiling", action="store_true", help="decode in tiles, which takes less memory")
    sub.add_argument(
        "--offload", default="none", help="none, model or group: what waits on the CPU (default: %(default)s)"
    )
    sub.add_argument(
        "--without", nargs="+", default=[], metavar="COMPONENT",
        help="do not load these, such as text_encoder tokenizer where prompts are embeddings",
    )  # fmt: skip
    sub.add_argument(
        "--load", action="append", default=[], metavar="NAME=VALUE",
        help="more for from_pretrained, such as variant=fp16 or revision=main",
    )  # fmt: skip
    sub.add_argument(
        "--seed", type=int, default=0, help="seed of the first clip, others count up from it (default: %(default)s)"
    )


def _prompts_arguments(sub: argparse._ArgumentGroup) -> None:
    sub.add_argument("--prompts", type=Path, help="text file, one prompt a line, or .jsonl with arguments of their own")
    sub.add_argument("--prompt", action="append", default=[], help="one more prompt; may be repeated")
    _embeddings_argument(sub)


def _embeddings_argument(sub: argparse._ArgumentGroup) -> None:
    sub.add_argument(
        "--prompt-embeds", type=Path, action="append", default=[], metavar="FILE",
        help="a prompt as .safetensors with prompt_embeds and others by name; may be repeated",
    )  # fmt: skip


def _calibration_arguments(sub: argparse._ArgumentGroup) -> None:
    sub.add_argument("--out", type=Path, required=True, help="folder to write")
    sub.add_argument(
        "--steps", type=_count, default=10, help="steps of the calibration schedule (default: %(default)s)"
    )
    sub.add_argument("--block", default="64x64", help="query x key tokens of a block (default: %(default)s)")
    sub.add_argument(
        "--sensitivity", default="phases", choices=("none", "phases", "layers"),
        help="what to measure of how much errors matter for the finished sample: every prompt is generated once more "
        "for each phase, and each layer (default: %(default)s)",
    )  # fmt: skip
    sub.add_argument(
        "--sensitivity-seeds", type=_count, default=1, help="samples of every prompt for that (default: %(default)s)"
    )
    sub.add_argument("--row-stride", type=int, default=1, help="measure one query row in so many (default: all)")


def _replan_arguments(sub: argparse._ArgumentGroup) -> None:
    sub.add_argument("plan", type=Path, help="folder that paro calibrate wrote")
    sub.add_argument("--out", type=Path, help="folder to write; without it, only the curve is shown")
    sub.add_argument(
        "--curve", nargs="?", const="", metavar="FILE",
        help="show density, predicted error and predicted time; also as .html or .json",
    )  # fmt: skip
    sub.add_argument(
        "--grid", metavar="FxHxW",
        help="make the plan for this grid of tokens, from statistics of the other; what that loses is not measured",
    )  # fmt: skip


def _plan_arguments(sub: argparse._ArgumentGroup) -> None:
    target = sub.add_mutually_exclusive_group()
    target.add_argument("--density", type=float, help="kept share of the video's blocks (default: 0.25)")
    target.add_argument("--error", type=_positive, help="instead: predicted relative squared error, such as 0.003")
    target.add_argument("--snr", type=_finite, metavar="DB", help="instead: the same as dB, such as 25")
    target.add_argument(
        "--speedup", type=_positive, help="instead: predicted speed-up of one compiled forward over dense, such as 1.8"
    )
    sub.add_argument(
        "--gpu", default="NVIDIA H200",
        help="where times are predicted, or an architecture such as sm_89 for --precision auto (default: %(default)s)",
    )  # fmt: skip
    sub.add_argument(
        "--precision",
        help="of every head, such as int8, int4, bf16 or int8/fp8, or auto: INT4 in the heads in which it pays on "
        "--gpu, INT8 in the others (default: of the plan it is made from, or the model's dtype)",
    )
    sub.add_argument(
        "--int4-share", type=float, metavar="SHARE",
        help="with --precision auto: how many of the heads are in INT4, 0 to 1, those that are predicted to lose least",
    )  # fmt: skip
    sub.add_argument(
        "--order-score", default="output_error", help="none, paper, mass or output_error (default: %(default)s)"
    )
    sub.add_argument("--mask-score", default="output_error", help="mass or output_error (default: %(default)s)")
    sub.add_argument(
        "--budget", default="layer_normalised", help="global, per_head or layer_normalised (default: %(default)s)"
    )
    sub.add_argument(
        "--orders", nargs="+", help=f"candidate orders (default: {CANDIDATES}; of statistics, all in them)"
    )
    sub.add_argument("--phase-ends", type=float, nargs="+", help="shares of the steps at which phases end")


def _refine_arguments(sub: argparse._ArgumentGroup) -> None:
    sub.add_argument("--plan", type=Path, required=True, help="folder that paro calibrate or paro plan wrote")
    sub.add_argument("--out", type=Path, required=True, help="folder to write")
    sub.add_argument("--steps", type=_count, default=10, help="inference steps of every clip (default: %(default)s)")
    sub.add_argument("--rounds", type=_count, default=16, help="how often masks are chosen anew (default: %(default)s)")
    sub.add_argument("--clips", type=_count, default=8, help="clips generated for each round (default: %(default)s)")
    sub.add_argument(
        "--keep-activations", action="store_true", help="faster, where memory for a whole backward pass is there"
    )


def _show_arguments(sub: argparse._ArgumentGroup) -> None:
    sub.add_argument("plan", help="plan folder or hub id")
    sub.add_argument("--html", type=Path, help="also draw orders, densities and masks into this page")
    sub.add_argument("--png", type=Path, help="also draw the mask of every head, with its order and density, into one")
    sub.add_argument("--phase", type=int, default=0, help="whose masks are drawn (default: %(default)s)")
    sub.add_argument(
        "--gpu", default="NVIDIA H200", help="say which layers gain nothing there, and run dense (default: %(default)s)"
    )


def _run_arguments(sub: argparse._ArgumentGroup) -> None:
    sub.add_argument("--plan", help="plan folder or hub id (default for demo: the plan that ships)")
    sub.add_argument("--precision", help="instead of the plan's: int8, int4, bf16, int8/fp8 and others")
    sub.add_argument(
        "--allow-dense", action="store_true", help="run calls that do not fit the plan dense instead of failing"
    )
    sub.add_argument(
        "--even-if-slower", action="store_true",
        help="follow the plan in layers too that dense attention is predicted to serve faster on this GPU",
    )  # fmt: skip


def _run_or_dense_arguments(sub: argparse._ArgumentGroup) -> None:
    _run_arguments(sub)
    sub.add_argument("--dense", action="store_true", help="dense attention, no plan")


def _clip_arguments(sub: argparse._ArgumentGroup) -> None:
    sub.add_argument("--steps", type=_count, help="inference steps (default: the pipeline's own)")
    sub.add_argument("--fps", type=_positive, default=8.0, help="frames per second of the file (default: %(default)s)")


def _generate_arguments(sub: argparse._ArgumentGroup) -> None:
    sub.add_argument("--prompt", help="what to show")
    _embeddings_argument(sub)
    sub.add_argument("--out", type=Path, required=True, help=".mp4, .gif, .webp or .png; .png for images")
    _clip_arguments(sub)


def _evaluate_arguments(sub: argparse._ArgumentGroup) -> None:
    sub.add_argument("--out", type=Path, required=True, help="folder to write")
    _clip_arguments(sub)
    sub.add_argument(
        "--samples", type=_count, default=1, help="pairs of every prompt, seeds counting up (default: %(default)s)"
    )
    sub.add_argument(
        "--metrics", nargs="+", default=[], metavar="NAME",
        help="more of them: lpips, clip-score, fvd, vbench, from packages and weights of their own",
    )  # fmt: skip
    sub.add_argument(
        "--against", type=Path, metavar="REPORT",
        help="folder of another evaluation with the same prompts and seeds, to compare pair by pair",
    )  # fmt: skip
    sub.add_argument(
        "--timeout", type=_positive, default=1800.0,
        help="under torchrun, how long all ranks may be silent, in seconds (default: %(default)s)",
    )  # fmt: skip


def _call_arguments(sub: argparse._ArgumentGroup) -> None:
    for name in ("height", "width"):
        sub.add_argument(f"--{name}", type=_count, help="in pixels (default: the pipeline's own)")
    sub.add_argument("--num-frames", "--frames", type=_count, help="frames of a video (default: the pipeline's own)")
    sub.add_argument("--guidance-scale", type=_finite, help="classifier-free guidance")
    sub.add_argument("--negative-prompt", help="for classifier-free guidance")
    sub.add_argument(
        "--image", type=Path, action="append", default=[], help="picture to start from; repeated, a list of them"
    )
    sub.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="any other argument of the pipeline's call; @FILE reads a picture or .json",
    )  # fmt: skip


def _doctor_arguments(sub: argparse._ArgumentGroup) -> None:
    sub.add_argument("--device", help="such as cuda or cpu (default: cuda if there is one)")
    sub.add_argument("--no-kernels", action="store_true", help="look at the machine only, compile and time nothing")
    sub.add_argument("--model", help="predict the speed-up of a model, such as wan-14b; --model list names them all")
    sub.add_argument("--size", help="such as 720p, or FRAMESxHEIGHTxWIDTH in pixels (default: the model's first)")
    sub.add_argument("--density", type=float, default=0.25, help="kept share of blocks (default: %(default)s)")
    sub.add_argument("--block", default="64x64", help="query x key tokens of a block (default: %(default)s)")


_MODEL, _PROMPTS, _CALL = "the model", "prompts", "what is generated"
_ARGUMENTS = {
    "demo": ("[options]", {"the story": _demo_arguments}),
    "calibrate": (
        "MODEL --prompts FILE --out PLAN [options]",
        {
            _MODEL: _model_arguments, _PROMPTS: _prompts_arguments, "calibration": _calibration_arguments,
            "the plan made from it": _plan_arguments, _CALL: _call_arguments,
        },
    ),
    "plan": (
        "PLAN --density DENSITY --out PLAN [options]", {"from what": _replan_arguments, "the new plan": _plan_arguments}
    ),
    "refine": (
        "MODEL --plan PLAN --prompts FILE --out PLAN [options]",
        {
            _MODEL: _model_arguments, _PROMPTS: _prompts_arguments, "refining": _refine_arguments,
            _CALL: _call_arguments,
        },
    ),
    "show": ("PLAN [options]", {"the plan": _show_arguments}),
    "generate": (
        "MODEL --plan PLAN --prompt TEXT --out FILE [options]",
        {
            _MODEL: _model_arguments, "with which attention": _run_or_dense_arguments, "the clip": _generate_arguments,
            _CALL: _call_arguments,
        },
    ),
    "evaluate": (
        "MODEL --plan PLAN --prompts FILE --out FOLDER [options]",
        {
            _MODEL: _model_arguments, "with which attention": _run_arguments, _PROMPTS: _prompts_arguments,
            "the evaluation": _evaluate_arguments, _CALL: _call_arguments,
        },
    ),
    "doctor": ("[options]", {"what to look at": _doctor_arguments}),
}  # fmt: skip
