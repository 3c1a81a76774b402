"""Sections of a report on its clips: pairs side by side with their difference, and how close they are."""

from collections.abc import Mapping, Sequence
from typing import Any

from .fidelity import Comparison, Summary, summarise_pairs
from .markup import Markup, details, section, table, tag, terms
from .video import SpriteSheet, difference, sprite_sheet
from .wording import decibels, duration, mean_spread, number, plural

DIFFERENCE_GAIN = 4
SHOWN_CLIPS = 6
CLIPS_BUDGET = 2_000_000
METRICS = {
    "psnr": ("PSNR, dB", ".1f"),
    "ssim": ("SSIM", ".3f"),
    "cosine": ("cosine similarity", ".4f"),
    "ms_ssim": ("MS-SSIM", ".4f"),
    "latents_cosine": ("cosine of the latents", ".4f"),
    "lpips": ("LPIPS", ".4f"),
    "clip_score_dense": ("CLIP score, dense", ".2f"),
    "clip_score_sparse": ("CLIP score, sparse", ".2f"),
    "clip_score_change": ("CLIP score, sparse − dense", "+.2f"),
}
WORST_IS_HIGH = ("lpips",)


def clips_section(clips: Sequence[Comparison], fps: float) -> Markup:
    """Some pairs, the worst among them, with one player for all."""
    worst = min(clips, key=lambda clip: clip.fidelity.psnr, default=None)
    shown = _chosen(clips, worst)
    if not shown:
        return Markup()
    trios = [clip.sheets or sheets_of(clip, fps, CLIPS_BUDGET // (3 * len(shown))) for clip in shown]
    badge = tag("span", "worst pair", class_="badge") if len(clips) > 1 else ""
    blocks = [_clip(clip, trio, badge if clip is worst else "") for clip, trio in zip(shown, trios, strict=True)]
    lead = (
        "The same prompt and seed, once with dense attention and once with the plan, in step. The third panel is the "
        f"difference: black where both agree, white where a colour is off by 1/{DIFFERENCE_GAIN} of its range or more."
    )
    if len(shown) < len(clips):
        lead += f" {len(shown)} of {len(clips)} pairs are shown" + (
            ", the worst among them." if worst in shown else "."
        )
    return section("Clips", lead, tag("div", _player(max(trio[0].frames for trio in trios)), *blocks))


def _chosen(clips: Sequence[Comparison], worst: Comparison | None) -> list[Comparison]:
    """The first pairs whose frames are at hand, and the worst."""
    drawable = [clip for clip in clips if clip.sheets or (clip.dense is not None and clip.sparse is not None)]
    late = [clip for clip in drawable[SHOWN_CLIPS:] if clip is worst]
    return drawable[: SHOWN_CLIPS - len(late)] + late


def sheets_of(clip: Comparison, fps: float, budget: int) -> list[SpriteSheet]:
    """The dense clip, the sparse one and their difference as pictures, each of so many bytes where that is enough."""
    assert clip.dense is not None and clip.sparse is not None
    trio = (clip.dense, clip.sparse, difference(clip.dense, clip.sparse, DIFFERENCE_GAIN))
    return [sprite_sheet(frames, fps=fps, budget=budget) for frames in trio]


def _player(frames: int) -> Markup:
    start = frames // 2 if frames > 1 else 0
    slider = tag("input", type="range", id="time", min=0, max=frames - 1, value=start, step=1, aria_label="Frame")
    readout = tag("span", f"{start + 1} / {frames}", id="frame", aria_hidden="true")
    button = tag("button", "Pause", type="button", id="play")
    return tag(
        "div", button, tag("label", slider, readout), class_="player", role="group", aria_label="Player for all clips"
    )


def _clip(clip: Comparison, trio: Sequence[SpriteSheet], badge: str) -> Markup:
    labels = ("Dense", "PAROAttention", f"Difference × {DIFFERENCE_GAIN}")
    panels = [_panel(sheet, label, clip.prompt) for label, sheet in zip(labels, trio, strict=True)]
    measures = {
        "PSNR": decibels(clip.fidelity.psnr),
        "SSIM": f"{clip.fidelity.ssim:.3f}",
        "cosine": f"{clip.fidelity.cosine:.4f}",
        "dense": duration(clip.dense_seconds),
        "PAROAttention": duration(clip.sparse_seconds),
        "speed": f"{clip.speed_up:.2f}×",
        "seed": clip.seed,
    }
    heading = tag("h3", clip.prompt, " ", badge)
    return tag(
        "article", heading, tag("div", *panels, class_="trio"), terms(measures, class_="measures"), class_="clip"
    )


def _panel(sheet: SpriteSheet, label: str, prompt: str) -> Markup:
    canvas = tag(
        "canvas", role="img", aria_label=f"{label}: {prompt}", width=sheet.width, height=sheet.height,
        style=f"aspect-ratio: {sheet.width} / {sheet.height}",
        data_frames=sheet.frames, data_columns=sheet.columns, data_fps=sheet.fps, data_width=sheet.width,
        data_height=sheet.height, data_cell_width=sheet.cell[0], data_cell_height=sheet.cell[1],
    )  # fmt: skip
    frames = tag("img", class_="sheet", alt=f"All frames, {label}: {prompt}", src=sheet.uri)
    return tag("figure", canvas, frames, tag("figcaption", label))


def fidelity_section(clips: Sequence[Comparison]) -> Markup:
    """Metrics over all pairs, the worst pair, and every pair by itself."""
    if not clips:
        return Markup()
    metrics = summarise_pairs(clips)
    shown = {name: METRICS.get(name, (name, ".4f")) for name in metrics}
    rows = [_metric_row(name, metrics[name], label, form, clips) for name, (label, form) in shown.items()]
    caption = f"Over {plural(len(clips), 'pair')}; spread is the standard deviation over clips"
    if identical := metrics["psnr"].infinite:
        caption += f". The mean PSNR leaves out {plural(identical, 'pair')} of identical clips"
    summary = table(
        ("", "mean ± spread", "95 % interval of the mean", "worst clip", "best clip", " which is worst"), rows,
        caption=caption,
    )  # fmt: skip
    columns = ("", "seed", *(label for label, _ in shown.values()), "dense", "PAROAttention", "speed")
    pairs = table(columns, [_pair_row(clip, shown) for clip in clips], caption="Every pair")
    lead = (
        "How close clips stay to their dense twins. PSNR over all frames, values in −1…1; SSIM is the mean over frames."
    )
    return section("Fidelity", lead, summary, details("Every pair", pairs))


def differences_section(differences: Mapping[str, Summary], other: str) -> Markup:
    """By how much this evaluation's clips are closer than those of another."""
    if not differences:
        return Markup()
    rows = []
    for name, summary in differences.items():
        label, form = METRICS.get(name, (name, ".4f"))
        signed = "+" + form.lstrip("+")
        rows.append([label, mean_spread(summary, signed), _interval(summary, signed), summary.count])
    lead = (
        f"The same prompts and seeds as in {other}: this evaluation minus that one, pair by pair. Where the interval "
        "leaves out 0, the difference is more than chance."
    )
    columns = ("", "mean ± spread", "95 % interval of the mean", "pairs")
    return section("Difference", lead, table(columns, rows, caption=f"Against {other}"))


def _metric_row(name: str, summary: Summary, label: str, form: str, clips: Sequence[Comparison]) -> list[Any]:
    ends = (summary.lowest, summary.highest)
    choose = max if name in WORST_IS_HIGH else min
    worst = choose(clips, key=lambda clip: clip.metrics[name])
    said = tag("td", worst.prompt, f", seed {worst.seed}", class_="text quiet")
    bounds = [number(end, form) for end in (ends[::-1] if name in WORST_IS_HIGH else ends)]
    return [label, mean_spread(summary, form), _interval(summary, form), *bounds, said]


def _interval(summary: Summary, form: str) -> str:
    return " … ".join(number(bound, form) for bound in summary.interval) if summary.interval else "–"


def _pair_row(clip: Comparison, shown: Mapping[str, tuple[str, str]]) -> list[Any]:
    metrics = [number(clip.metrics[name], form) for name, (_, form) in shown.items()]
    seconds = [duration(clip.dense_seconds), duration(clip.sparse_seconds)]
    return [tag("span", clip.prompt, class_="prompt"), clip.seed, *metrics, *seconds, f"{clip.speed_up:.2f}×"]
