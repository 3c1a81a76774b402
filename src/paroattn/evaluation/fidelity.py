"""Paired comparison: one pipeline, prompt and seed, once with dense attention and once with the plan."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

LIMITS = {"psnr": (-math.inf, math.inf), "ssim": (-1.0, 1.0), "cosine": (-1.0, 1.0)}
FURTHER_LIMITS = {"ms_ssim": (0.0, 1.0), "latents_cosine": (-1.0, 1.0)}
DATA_RANGE = 2.0
SMALLEST_FRAME = 11
SMALLEST_FOR_SCALES = 176

Generate = Callable[[str, int], Tensor]
Measure = Callable[[str, Tensor, Tensor], Mapping[str, float]]
Toggle = Callable[[], AbstractContextManager]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Fidelity:
    """How close a clip is to its dense twin.

    Attributes:
        psnr: Peak signal-to-noise ratio over all values of the clip, dB, data range 2; infinite for identical clips.
        ssim: Structural similarity (11×11 Gaussian window, σ = 1.5, frames mirrored at their edges), mean over frames.
        cosine: Cosine of the angle between the clips as vectors; 1 for two clips of zeros, 0 for one.
    """

    psnr: float
    ssim: float
    cosine: float

    @property
    def identical(self) -> bool:
        return math.isinf(self.psnr)

    def to_dict(self) -> dict[str, Any]:
        """Numbers for JSON; the PSNR of identical clips is null."""
        return {"psnr": _finite(self.psnr), "ssim": self.ssim, "cosine": self.cosine, "identical": self.identical}


@dataclass(frozen=True)
class Summary:
    """One number over many clips.

    Infinite values (the PSNR of identical clips) enter `lowest`, `highest` and `count`, but neither the mean nor what
    follows from it, so the mean can only understate. If all are infinite, so is the mean.

    Attributes:
        mean, spread: Mean and sample standard deviation (0 for one value) of the finite values.
        interval: 95 % confidence interval of the mean (Student's t); None for fewer than two finite values.
        lowest, highest: Of all values.
        count: Number of all values.
        infinite: How many of them are infinite.
    """

    mean: float
    spread: float
    interval: tuple[float, float] | None
    lowest: float
    highest: float
    count: int
    infinite: int

    def to_dict(self) -> dict[str, Any]:
        """Numbers for JSON; infinity is null."""
        return {name: _finite(value) if isinstance(value, float) else value for name, value in vars(self).items()}


@dataclass(frozen=True, eq=False)
class Comparison:
    """One prompt and seed, made twice.

    Attributes:
        fidelity: The sparse clip against the dense one.
        dense_seconds, sparse_seconds: Wall time of each.
        dense, sparse: The clips, (frames, 3, height, width) in [-1, 1] on the CPU; None once dropped.
        more: Metrics beyond those of `fidelity`, by name.
        sheets: The dense clip, the sparse one and their difference as a report draws them, if they were kept.
    """

    prompt: str
    seed: int
    fidelity: Fidelity
    dense_seconds: float
    sparse_seconds: float
    dense: Tensor | None = None
    sparse: Tensor | None = None
    more: Mapping[str, float] = field(default_factory=dict)
    sheets: tuple[Any, ...] = ()

    @property
    def speed_up(self) -> float:
        return self.dense_seconds / self.sparse_seconds

    def without_frames(self) -> "Comparison":
        """The same without the clips, which are large."""
        return replace(self, dense=None, sparse=None)

    def record(self) -> dict[str, Any]:
        """One JSON record: prompt, seed, metrics and seconds."""
        seconds = {"dense_seconds": self.dense_seconds, "sparse_seconds": self.sparse_seconds}
        return {"prompt": self.prompt, "seed": self.seed, **self.fidelity.to_dict(), **self.more, **seconds}

    @property
    def metrics(self) -> dict[str, float]:
        """All metrics by name; the PSNR of identical clips is infinite."""
        return {name: getattr(self.fidelity, name) for name in LIMITS} | dict(self.more)


def compare(dense: Tensor, sparse: Tensor) -> Fidelity:
    """Measure how close a clip is to its dense twin, after clipping to [-1, 1]; sums in float64, SSIM in float32.

    Args:
        dense: (frames, 3, height, width), floating point, in [-1, 1].
        sparse: The same shape.

    Raises:
        TypeError: If a clip is not floating point.
        ValueError: If the shapes differ or are of another form, or a value is not finite.
    """
    check_frames(dense, "the dense clip")
    check_frames(sparse, "the sparse clip")
    if dense.shape != sparse.shape:
        raise ValueError(f"both clips must have one shape; got {tuple(dense.shape)} and {tuple(sparse.shape)}")
    squares = torch.zeros(4, dtype=torch.float64)
    similarity = 0.0
    for frames in zip(dense, sparse, strict=True):
        one, other = (frame.double().clamp(-1, 1) for frame in frames)
        products = ((one - other).square(), one * other, one.square(), other.square())
        squares += torch.stack([product.sum() for product in products]).cpu()
        similarity += _ssim(one.float()[None], other.float()[None])
    error, dot, *energies = squares.tolist()
    return Fidelity(_psnr(error / dense.numel()), similarity / len(dense), _cosine(dot, *energies))


def check_frames(frames: Tensor, name: str) -> None:
    """Check the form every clip has here.

    Raises:
        TypeError: If the frames are not floating point.
        ValueError: If they are not (frames, 3, height, width) of at least 11×11 pixels, or not finite.
    """
    if not frames.is_floating_point():
        raise TypeError(f"{name} must be floating point in [-1, 1]; got {frames.dtype}")
    if frames.ndim != 4 or frames.shape[1] != 3 or len(frames) == 0 or min(frames.shape[2:]) < SMALLEST_FRAME:
        raise ValueError(
            f"{name} must be (frames, 3, height, width) of at least {SMALLEST_FRAME}×{SMALLEST_FRAME} pixels; "
            f"got {tuple(frames.shape)}"
        )
    if not (finite := frames.isfinite()).all():
        raise ValueError(f"{name} must be finite; {(~finite).sum()} of its {frames.numel()} values are not")


def summarise(values: Iterable[float], *, limits: tuple[float, float] = (-math.inf, math.inf)) -> Summary:
    """Summarise one number over many clips; see `Summary` for what infinite values do.

    Args:
        values: One per clip.
        limits: What a value can be at least and at most; the interval stays between.

    Raises:
        ValueError: If there is no value.
    """
    values = list(values)
    if not values:
        raise ValueError("a summary needs at least one value; got none")
    finite = [value for value in values if not math.isinf(value)]
    mean = statistics.fmean(finite) if finite else math.inf
    spread = statistics.stdev(finite) if len(finite) > 1 else 0.0
    return Summary(
        mean=mean,
        spread=spread,
        interval=_interval(mean, spread, len(finite), limits) if len(finite) > 1 else None,
        lowest=min(values),
        highest=max(values),
        count=len(values),
        infinite=len(values) - len(finite),
    )


def summarise_pairs(pairs: Sequence[Comparison]) -> dict[str, Summary]:
    """Summarise every metric that all pairs have, by name."""
    names = [name for name in pairs[0].metrics if all(name in pair.metrics for pair in pairs)]
    columns = {name: [pair.metrics[name] for pair in pairs] for name in names}
    limits = FURTHER_LIMITS | LIMITS
    return {name: summarise(each, limits=limits.get(name, (-math.inf, math.inf))) for name, each in columns.items()}


def paired_differences(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], metrics: Iterable[str]
) -> dict[str, Summary]:
    """Summarise by how much our clips' metrics exceed those of another evaluation, pair by pair.

    Args:
        ours, theirs: Records of clips; those with the same prompt and seed are one pair, others are left out. Identical
            clips have no PSNR and are left out of it.
        metrics: Names of what is compared; those that one side lacks are left out.

    Raises:
        ValueError: If no clip is in both.
    """
    others = {(each["prompt"], each["seed"]): each for each in theirs}
    both = [(each, others[key]) for each in ours if (key := (each["prompt"], each["seed"])) in others]
    if not both:
        raise ValueError("two evaluations must share prompts and seeds to be compared; these share none")
    columns = {
        name: [one[name] - other[name] for one, other in both if None not in (one.get(name), other.get(name))]
        for name in metrics
    }
    return {name: summarise(values) for name, values in columns.items() if values}


def evaluate(
    generate: Generate,
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    *,
    dense: Toggle,
    progress: Progress | None = None,
    warm_up: bool = False,
    measures: Sequence[Measure] = (),
    latents: Callable[[], Tensor | None] = lambda: None,
) -> Iterator[Comparison]:
    """Make every prompt with every seed twice, sparse and dense, and compare; yields as it goes.

    The sparse clip comes first, so one-time costs such as compilation count against it unless `warm_up` is set.

    Args:
        generate: Makes (frames, 3, height, width) in [-1, 1] from a prompt and a seed, and nothing else may vary.
        prompts: Prompts.
        seeds: Seeds.
        dense: Makes a context manager inside which `generate` runs dense, such as `partial(paroattn.dense, pipe)`.
        progress: Called as (clips made, clips in all, what is being made).
        warm_up: Make the first pair once beforehand, untimed.
        measures: Metrics beyond PSNR, SSIM and cosine: each takes the prompt, the dense and the sparse clip, and
            returns values by name.
        latents: Gives the latents of the clip that was made last, if there are any; their cosine is measured too.

    Raises:
        TypeError: If `prompts` is one string.
        ValueError: If there are no prompts or seeds, or the clips have another form.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a sequence of strings; got the string {prompts!r}")
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    if not pairs:
        raise ValueError(f"there must be prompts and seeds; got {len(prompts)} prompts and {len(seeds)} seeds")
    return _evaluate(generate, pairs, dense, progress or (lambda *_: None), warm_up, measures, latents)


def _evaluate(
    generate: Generate, pairs: Sequence[tuple[str, int]], dense: Toggle, progress: Progress, warm_up: bool,
    measures: Sequence[Measure], latents: Callable[[], Tensor | None],
) -> Iterator[Comparison]:  # fmt: skip
    total = 2 * len(pairs)
    if warm_up:
        progress(0, total, "warm-up")
        for toggle in (nullcontext, dense):
            _timed(generate, pairs[0][0], pairs[0][1], toggle)
    for index, (prompt, seed) in enumerate(pairs):
        progress(2 * index, total, f"sparse: {prompt}")
        sparse_clip, sparse_seconds = _timed(generate, prompt, seed, nullcontext)
        check_frames(sparse_clip, "the sparse clip")
        sparse_latents = latents()
        progress(2 * index + 1, total, f"dense: {prompt}")
        dense_clip, dense_seconds = _timed(generate, prompt, seed, dense)
        fidelity, more = compare(dense_clip, sparse_clip), _latents_cosine(latents(), sparse_latents)
        for measure in (ms_ssim, *measures):
            more |= measure(prompt, dense_clip, sparse_clip)
        yield Comparison(prompt, seed, fidelity, dense_seconds, sparse_seconds, dense_clip, sparse_clip, more)
    progress(total, total, "done")


def ms_ssim(prompt: str, dense: Tensor, sparse: Tensor) -> dict[str, float]:
    """Mean MS-SSIM of the frames (five scales, window and σ as for SSIM), for frames of 176 pixels or more.

    Source:
        Wang, Simoncelli and Bovik, Multi-scale structural similarity for image quality assessment, 2003.
    """
    if min(dense.shape[2:]) < SMALLEST_FOR_SCALES:
        return {}
    found = []
    for pair in zip(dense, sparse, strict=True):
        one, other = (frame.float().clamp(-1, 1)[None] for frame in pair)
        found.append(multiscale_structural_similarity_index_measure(one, other, data_range=DATA_RANGE))
    return {"ms_ssim": sum(float(each) for each in found) / len(found)}


def _latents_cosine(dense: Tensor | None, sparse: Tensor | None) -> dict[str, float]:
    """Cosine of two clips' latents, if there are any."""
    if dense is None or sparse is None or dense.shape != sparse.shape:
        return {}
    one, other = dense.double().flatten(), sparse.double().flatten()
    return {"latents_cosine": _cosine(*(float(x @ y) for x, y in ((one, other), (one, one), (other, other))))}


def _timed(generate: Generate, prompt: str, seed: int, toggle: Toggle) -> tuple[Tensor, float]:
    """The clip on the CPU, which waits for the device, and the seconds it took."""
    with toggle():
        start = time.perf_counter()
        frames = generate(prompt, seed).cpu()
        return frames, time.perf_counter() - start


def _ssim(dense: Tensor, sparse: Tensor) -> float:
    similarity = structural_similarity_index_measure(sparse, dense, data_range=DATA_RANGE)
    assert isinstance(similarity, Tensor)
    return similarity.item()


def _psnr(mean_square: float) -> float:
    return 10 * math.log10(DATA_RANGE**2 / mean_square) if mean_square else math.inf


def _cosine(dot: float, one: float, other: float) -> float:
    if one == 0 or other == 0:
        return float(one == other)
    return max(-1.0, min(1.0, dot / math.sqrt(one * other)))


def _interval(mean: float, spread: float, count: int, limits: tuple[float, float]) -> tuple[float, float]:
    half = _student_975(count - 1) * spread / math.sqrt(count)
    return max(mean - half, limits[0]), min(mean + half, limits[1])


_STUDENT_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def _student_975(freedom: int) -> float:
    """Quantile of Student's t, tabulated up to 10 degrees of freedom, beyond that its expansion around the normal."""
    if freedom <= len(_STUDENT_975):
        return _STUDENT_975[freedom - 1]
    return 1.95996 + 2.37227 / freedom + 2.8225 / freedom**2 + 2.556 / freedom**3


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
