"""What stands in the README alone: the headline, and the shortest tables."""

import textwrap

from attention import IMPLS
from fidelity_tables import measured_of
from forward_tables import dense_row
from result_tables import GPUS, NOTHING, rows_of, table, where

CONTESTANTS = (
    *(("paroattn", density) for density in (1.0, 0.5, 0.3, 0.2)),
    *((dense, 1.0) for dense in ("sage2", "flash3-fp8", "cudnn-fp8")),
    *((sparse, 0.2) for sparse in ("sparge", "flex", "paro-authors")),
)
"""Implementations and densities of the short table, those of them that have a time."""
DENSE = {"sage2": "SageAttention 2 is", "flash3-fp8": "FlashAttention 3 in FP8"}
"""Dense attention in 8 bits that the headline names."""
SHAPE = "wan-14b-720p"
FASTEST = {"compiled": True, "extrapolated": True, "step_cache": None, "precision": "int8/fp8", "density": 0.2}


def headline() -> str:
    """How fast and how close, in two sentences."""
    gpu = next((gpu for gpu in GPUS if forward_speedups(gpu)), None)
    psnr = {row["method"]: row["psnr_mean"] for row in plain_fidelity() if row["density_target"] == 0.3}
    if gpu is None or not psnr:
        return NOTHING
    best, forward = best_speedups(gpu), forward_speedups(gpu)
    times = {name: f"{best[(SHAPE, *name)]:.1f}×" for name in CONTESTANTS if (SHAPE, *name) in best}
    device = whole_calls(gpu)[0]["device"]
    dense = ", ".join(f"{words} {times[name, 1.0]}" for name, words in DENSE.items() if (name, 1.0) in times)
    fast = (
        f"* **Fast.** On one {device}, attention of Wan2.1-14B at 720p runs {times['paroattn', 0.3]} as fast as "
        f"cuDNN's at density 0.3 and **{times['paroattn', 0.2]}** at 0.2, against {times['sparge', 0.2]} for "
        f"SpargeAttn at 0.2; of those that skip nothing, {dense}. One forward of the transformer is then "
        f"**{forward[False]:.1f}×** as fast, {forward[True]:.1f}× with FP8 linears on both sides."
    )
    close = (
        f"* **Close.** At density 0.3, clips of the bundled model have a PSNR of **{psnr['paroattn']:.1f} dB** against "
        f"dense, {psnr['paroattn-unrefined']:.1f} dB before refining. As many blocks give "
        f"{psnr['dynamic-topk']:.1f} dB if chosen as in SpargeAttn and {psnr['spatial-temporal']:.1f} dB as in "
        "Sparse-VideoGen."
    )
    return "".join(
        textwrap.fill(each, 120, subsequent_indent="  ", break_long_words=False) + "\n" for each in (fast, close)
    )


def plain_fidelity() -> list[dict]:
    """Rows of the comparison of rules on clips, no step dense."""
    return [row for row in measured_of(images=False) if row["dense_warmup"] == 0]


def forward_speedups(gpu: str) -> dict[bool, float]:
    """How much faster one forward of the headline's model is than dense, by whether linears are in FP8."""
    rows = [row for row in rows_of(f"end_to_end_{gpu}") if row["ms"] and row["model"] == SHAPE]
    ours = [row for row in rows if row["impl"] == "paroattn" and all(row[name] == FASTEST[name] for name in FASTEST)]
    beside = [(row, dense_row(rows, row)) for row in ours]
    found = {row["fp8_linears"]: dense["ms"] / row["ms"] for row, dense in beside if dense}
    return found if len(found) == 2 else {}


def best_speedups(gpu: str) -> dict[tuple, float]:
    """Speed-up of whole calls over cuDNN's dense bf16 at the best block and precision, by shape, name and density."""
    best: dict[tuple, float] = {}
    for row in whole_calls(gpu):
        if row["speedup_vs_cudnn"]:
            key = (row["shape"], "paroattn" if row["impl"] in IMPLS else row["impl"], row["density"])
            best[key] = max(best.get(key, 0.0), row["speedup_vs_cudnn"])
    return best


def whole_calls(gpu: str) -> list[dict]:
    """Rows of attention with reordering and quantising, under masks with the same density in every head."""
    return [row for row in rows_of(f"attention_{gpu}") if (row["includes"], row["mask"]) == ("call", "even")]


def attention_gpu_short() -> str:
    """Speed-up of whole calls over cuDNN's dense bf16: one line per shape, a column for each contestant."""
    text = ""
    for gpu in GPUS:
        rows, best = whole_calls(gpu), best_speedups(gpu)
        timed = [each for each in CONTESTANTS if each in {key[1:] for key in best}]
        shapes = dict.fromkeys(row["shape"] for row in rows)
        found = {shape: [best.get((shape, *each)) for each in timed] for shape in shapes}
        lines = [[shape, *("–" if x is None else f"{x:.2f}×" for x in each)] for shape, each in found.items()]
        head = ["against dense bf16 of cuDNN", *(f"{impl}, density {density:g}" for impl, density in timed)]
        note = f"\nWhole calls, each at its best block, precision and kernel. {where(rows)}.\n"
        text += table(head, lines) + note if rows else ""
    return text or NOTHING


def attention_short() -> str:
    """The CPU path against PyTorch's dense attention: one line per size, a column for each density."""
    rows = rows_of("attention_cpu")
    if not rows:
        return NOTHING
    found = {(f"{row['tokens']}, {row['block']}", row["density"]): f"{row['speedup']:.2f}×" for row in rows}
    names, densities = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
    lines = [[name, *(found.get((name, density), "–") for density in densities)] for name in names]
    head = ["tokens, block; against dense SDPA", *(f"density {density:g}" for density in densities)]
    about = f"Whole calls in float32, {rows[0]['heads']} heads of {rows[0]['head_dim']}. {where(rows)}."
    return table(head, lines) + f"\n{about}\n"
