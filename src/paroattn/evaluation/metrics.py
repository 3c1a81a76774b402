"""Metrics that need packages or weights of their own: asked for by name, loaded before any work, refused by name.

Of a pair: LPIPS between the two clips, and the CLIP score of each for its prompt. Of all clips at once: the Fréchet
video distance between dense and sparse clips, and VBench's dimensions for both, through VBench's own command, whose
requirements rarely go together with those of a current diffusers.
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .fidelity import Measure
from .video import write_pixels

CLIP_MODEL = "openai/clip-vit-base-patch16"
VBENCH_DIMENSIONS = (
    "subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree", "aesthetic_quality",
    "imaging_quality",
)  # fmt: skip
"""Those that VBench measures on any prompt."""
AT_ONCE = 8

Clips = Iterable[tuple[np.ndarray, np.ndarray]]
OverAll = Callable[[Clips], Mapping[str, float]]


@dataclass(frozen=True)
class Metric:
    """What a metric needs.

    Attributes:
        packages: Modules that must be importable.
        load: Makes the measure from a device; takes a while.
        over_all: Whether it measures all clips at once.
        remedy: How to install what is missing.
        command: Program that must be on the path.
    """

    packages: tuple[str, ...]
    load: Callable[[str], Any]
    over_all: bool = False
    remedy: str = 'Run pip install "paroattn[metrics]"'
    command: str | None = None


def load_metrics(names: Sequence[str], device: str) -> tuple[list[Measure], list[OverAll]]:
    """Measures of pairs, and of all clips at once.

    Raises:
        RuntimeError: If a package, a program or weights are missing; the message says which, and what to do.
        ValueError: If a name is unknown.
    """
    pairs, over_all = [], []
    for name in names:
        check_metric(name)
        try:
            measure = METRICS[name].load(device)
        except OSError as error:
            raise RuntimeError(
                f"{name} needs weights that are not on this machine and cannot be fetched ({error}). Run it once with "
                "a connection, or leave the metric out"
            ) from error
        (over_all if METRICS[name].over_all else pairs).append(measure)
    return pairs, over_all


def check_metric(name: str) -> None:
    """Check that a metric is known and its packages are installed; errors as `load_metrics`."""
    if name not in METRICS:
        raise ValueError(f"metrics are {', '.join(METRICS)}; got {name!r}")
    metric = METRICS[name]
    missing = [package for package in metric.packages if find_spec(package) is None]
    if metric.command and shutil.which(metric.command) is None:
        missing.append(f"the command {metric.command}")
    if missing:
        raise RuntimeError(f"{name} needs {', '.join(missing)}, not found here. {metric.remedy}, or leave it out")


def _lpips(device: str) -> Measure:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    network = LearnedPerceptualImagePatchSimilarity(net_type="alex").to(device)

    @torch.no_grad()
    def measure(prompt: str, dense: Tensor, sparse: Tensor) -> dict[str, float]:
        parts = zip(dense.split(AT_ONCE), sparse.split(AT_ONCE), strict=True)
        found = [network(*(each.float().clamp(-1, 1).to(device) for each in part)) * len(part[0]) for part in parts]
        return {"lpips": float(sum(found)) / len(dense)}

    return measure


def _clip_score(device: str) -> Measure:
    from torchmetrics.multimodal.clip_score import CLIPScore

    network = CLIPScore(CLIP_MODEL).to(device)

    @torch.no_grad()
    def of(prompt: str, clip: Tensor) -> float:
        frames = ((clip.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        network.reset()
        for part in frames.split(AT_ONCE):
            network.update(list(part.to(device)), [prompt] * len(part))
        return float(network.compute())

    def measure(prompt: str, dense: Tensor, sparse: Tensor) -> dict[str, float]:
        one, other = of(prompt, dense), of(prompt, sparse)
        return {"clip_score_dense": one, "clip_score_sparse": other, "clip_score_change": other - one}

    return measure


def _fvd(device: str) -> OverAll:
    network: Any = import_module("cdfvd.fvd").cdfvd("i3d", ckpt_path=None, device=device)

    def measure(clips: Clips) -> dict[str, float]:
        dense, sparse = (np.stack(side) for side in zip(*clips, strict=True))
        return {"fvd": float(network.compute_fvd(dense, sparse))}

    return measure


def _vbench(device: str) -> OverAll:
    def measure(clips: Clips) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as scratch:
            folders = {side: Path(scratch) / side for side in ("dense", "sparse")}
            for folder in folders.values():
                folder.mkdir()
            for number, pair in enumerate(clips):
                for folder, pixels in zip(folders.values(), pair, strict=True):
                    write_pixels(pixels, folder / f"{number:05d}.mp4")
            found = {side: _vbench_of(folder) for side, folder in folders.items()}
        return {f"{name}, {side}": value for side, each in found.items() for name, value in each.items()}

    return measure


def _vbench_of(folder: Path) -> dict[str, float]:
    """Scores of the clips in a folder, from the file that VBench writes."""
    out = folder.with_name(folder.name + "-results")
    words = ["vbench", "evaluate", "--videos_path", str(folder), "--output_path", str(out), "--mode", "custom_input"]
    done = subprocess.run([*words, "--dimension", *VBENCH_DIMENSIONS], capture_output=True, text=True, check=False)
    written = sorted(out.glob("*_eval_results.json"))
    if done.returncode or not written:
        raise RuntimeError(f"vbench must evaluate the clips; it failed: {done.stderr.strip()[-500:]}")
    found = json.loads(written[-1].read_text())
    return {f"vbench {name}": float(score[0]) for name, score in found.items()}


METRICS = {
    "lpips": Metric(("torchvision",), _lpips),
    "clip-score": Metric(("transformers",), _clip_score),
    "fvd": Metric(("cdfvd",), _fvd, over_all=True),
    "vbench": Metric(
        (), _vbench, over_all=True, command="vbench", remedy="Install VBench, best by itself: pipx install vbench"
    ),
}
