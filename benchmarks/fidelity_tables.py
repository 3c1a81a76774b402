"""Tables of how close clips stay to dense ones: rules and formats, other ideas, and one plan elsewhere."""

from result_tables import NOTHING, decibels, paired, rows_of, table, where

COMPARED = (
    "dense", "paroattn", "paroattn-unrefined", "paroattn-in-order", "none", "paper", "local-window",
    "spatial-temporal", "radial", "dynamic-topk", "dynamic-topk+reorder", "oracle", "oracle+reorder",
)  # fmt: skip
STATIC = ("paper", "none", "local-window", "spatial-temporal", "radial")
DYNAMIC = ("dynamic-topk", "dynamic-topk+reorder")
WORST = ("paroattn", "paper", "none")
EXACT = ("bf16", "fp16", "fp32")
IN_WORDS = {
    "paroattn": "**paroattn**",
    "paroattn-unrefined": "paroattn before refining",
    "paroattn-in-order": "paroattn, tokens not reordered",
    "none": "the same before refining",
    "paper": "PAROAttention's own rule",
    "dynamic-topk+reorder": "dynamic top-k as in SpargeAttn, on our orders",
    "dynamic-topk": "dynamic top-k as in SpargeAttn",
    "spatial-temporal": "spatial and temporal heads as in Sparse-VideoGen",
    "radial": "radial decay",
    "local-window": "local windows",
    "oracle+reorder": "*oracle: each input's own best blocks, on our orders*",
}
TRANSFERRED = ("prompt", "seed", "steps", "guidance", "finetune", "resolution")
RULE = ("order_score", "mask_score", "budget", "sensitivity")
DEFAULT = (("output_error", "output_error", "layer_normalised", "phases"), "six+tiles")
RULE_NAMES = {
    ("none", "mass", "global", "none"): "no reorder, mass, one threshold",
    ("none", "mass", "per_head", "none"): "no reorder, mass, per head",
    ("none", "output_error", "layer_normalised", "none"): "no reorder, output error",
    ("none", "output_error", "layer_normalised", "phases"): "no reorder, output error, weighed by phase",
    ("paper", "mass", "global", "none"): "paper's score, mass, one threshold",
    ("paper", "mass", "per_head", "none"): "paper's score, mass, per head",
    ("mass", "mass", "global", "none"): "mass, one threshold",
    ("mass", "mass", "per_head", "none"): "mass, per head",
    ("output_error", "output_error", "global", "none"): "output error, one threshold",
    ("output_error", "output_error", "per_head", "none"): "output error, per head",
    ("output_error", "output_error", "layer_normalised", "none"): "output error, layer-normalised",
    ("output_error", "output_error", "layer_normalised", "layers"): "output error, weighed by phase and layer",
    ("output_error", "output_error", "layer_normalised", "phases"): "output error, weighed by phase",
}


def fidelity() -> str:
    """Density × rule at 16-bit precision, then precision at density 1."""
    rows = rows_of("fidelity_demo")
    sparse = [row for row in rows if row["precision"] == "bf16" and row["density_target"] < 1]
    if not sparse:
        return "Not measured yet.\n"
    densities = sorted({row["density_target"] for row in sparse}, reverse=True)
    lines = []
    for rule, name in RULE_NAMES.items():
        for orders in ("six", "six+tiles"):
            mine = {
                row["density_target"]: row
                for row in sparse
                if tuple(row[name] for name in RULE) == rule and row["orders"] == orders
            }
            if mine:
                cells = [
                    f"{mine[d]['psnr_mean']:.1f} ± {mine[d]['psnr_std']:.1f}, {mine[d]['psnr_min']:.1f}"
                    if d in mine
                    else "–"
                    for d in densities
                ]
                full = name + (" + tiles" if orders != "six" else "")
                lines.append([f"**{full} (default)**" if (rule, orders) == DEFAULT else full, *cells])
    first = sparse[0]
    text = table(["PSNR against dense, dB: mean ± spread, worst clip", *(f"density {d:g}" for d in densities)], lines)
    text += (
        f"\nBundled model, {first['clips']} clips from prompts that the plan has not seen, {first['steps']} "
        f"steps, none of them dense, {first['phases']} phases, blocks of {first['block']}, bf16. {where(sparse)}.\n"
    )
    quantised = [row for row in rows if row["density_target"] == 1 or row["precision"] != "bf16"]
    if quantised:
        lines = [
            [
                row["precision"],
                f"{row['density_executed']:.2f}",
                f"{row['psnr_mean']:.1f} ± {row['psnr_std']:.1f}",
                f"{row['ssim_mean']:.4f}",
            ]
            for row in quantised
        ]
        text += (
            "\n"
            + table(["precision", "density", "PSNR, dB", "SSIM"], lines)
            + f"\nThe same clips. {where(quantised)}.\n"
        )
    return text


def comparison() -> str:
    """Rules that choose blocks, at equal density: one line per method and density, without and with dense steps."""
    return compared(measured_of(images=False))


def fidelity_short() -> str:
    """The same in few words: mean and worst clip of every rule, no step dense."""
    rows = [row for row in measured_of(images=False) if row["dense_warmup"] == 0 and row["density_target"] < 1]
    densities = sorted({row["density_target"] for row in rows}, reverse=True)
    found = {(row["method"], row["density_target"]): row for row in rows}
    lines = [
        [name, *(short_cell(found.get((method, density))) for density in densities)]
        for method, name in IN_WORDS.items()
        if any((method, density) in found for density in densities)
    ]
    if not lines:
        return NOTHING
    head = ["PSNR against dense, dB: mean, worst clip", *(f"density {density:g}" for density in densities)]
    note = f"{said(rows[0])}, {dense_steps(0)}; the plan has seen none of their prompts. {where(rows)}."
    return table(head, lines) + f"\n{note}\n"


def short_cell(row: dict | None) -> str:
    return f"{row['psnr_mean']:.1f}, {row['psnr_min']:.1f}" if row else "–"


def images() -> str:
    """The same on images."""
    return compared(measured_of(images=True))


def measured_of(images: bool) -> list[dict]:
    """Rows of the comparison in 16 bits, of images or of clips."""
    rows = [row for row in rows_of("fidelity") if (row["frames"] == 1) == images and not row["scales"]]
    return [row for row in rows if row["precision"] in EXACT]


def compared(rows: list[dict]) -> str:
    """A table for each share of dense steps."""
    text = ""
    for warmup in sorted({row["dense_warmup"] for row in rows}):
        mine = [row for row in rows if row["dense_warmup"] == warmup]
        ours = {row["density_target"]: row for row in mine if row["method"] == "paroattn"}
        densities = sorted({row["density_target"] for row in mine}, reverse=True)
        lines = [
            comparison_cells(row, ours.get(density))
            for density in densities
            for method in COMPARED
            for row in mine
            if (row["method"], row["density_target"]) == (method, density)
        ]
        head = ["method, density", "executed", "PSNR, dB", "SSIM", "cosine", "worst", "PSNR − ours, pair by pair"]
        first = mine[0]
        text += table(head, lines) + f"\n{said(first)}, {dense_steps(warmup)}; "
        text += f"blocks of {first['block']}, {first['precision']}. In brackets 95 % of Student's t. {where(mine)}.\n\n"
    return text.removesuffix("\n") or NOTHING


def said(row: dict) -> str:
    """Clips of a row in words."""
    what = f"{row['clips']} images" if row["frames"] == 1 else f"{row['clips']} clips of {row['frames']} frames"
    model = "The bundled model's relative for images" if row["frames"] == 1 else "Bundled model"
    return f"{model}, {what}, {row['tokens']} tokens, {row['steps']} steps"


def dense_steps(warmup: float) -> str:
    return f"the first {100 * warmup:g} % of the steps dense" if warmup else "no step dense"


def comparison_cells(row: dict, ours: dict | None) -> list[str]:
    """A line of the comparison; the difference is the mean over the same clips."""
    name = f"{row['method']}, {row['density_target']:g}"
    cells = [number(row["density_executed"], 3), f"{number(row['psnr_mean'], 1)} ± {number(row['psnr_std'], 1)}"]
    cells += [number(row["ssim_mean"], 3), number(row["cosine_mean"], 4), number(row["psnr_min"], 1)]
    return [name, *cells, paired(row["psnr"], ours["psnr"]) if ours and ours is not row else "–"]


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def demands() -> str:
    """Ours against each kind of rule, worst clips, and how much of the way to the oracle is gone."""
    lines, shown = [], []
    for images in (False, True):
        rows = measured_of(images)
        for warmup, density in sorted({(row["dense_warmup"], row["density_target"]) for row in rows}, key=densest):
            there = (warmup, density)
            found = {row["method"]: row for row in rows if (row["dense_warmup"], row["density_target"]) == there}
            if "paroattn" in found and "paper" in found:
                lines.append([demand_name(images, *there), *demand_cells(found)])
                shown += [found["paroattn"]]
    head = [
        "density", "ours, dB", "over the paper's rule", "over no reorder", "over the best other static rule",
        "over the better dynamic rule", "worst: ours, paper's, no reorder's", "of the way to the oracle",
    ]  # fmt: skip
    note = "Differences pair by pair, in brackets 95 % of Student's t."
    return table(head, lines) + f"\n{note} {where(shown)}.\n" if lines else NOTHING


def densest(place: tuple[float, float]) -> tuple[float, float]:
    return place[0], -place[1]


def demand_name(images: bool, warmup: float, density: float) -> str:
    return f"{density:g}" + ", images" * images + f", {dense_steps(warmup)}" * bool(warmup)


def demand_cells(found: dict[str, dict]) -> list[str]:
    """Of the rows of one density by method."""
    ours = found["paroattn"]

    def over(names: tuple[str, ...], named: bool = False) -> str:
        there = [found[name] for name in names if name in found]
        if not there:
            return "–"
        best = max(there, key=lambda row: row["psnr_mean"])
        return paired(ours["psnr"], best["psnr"]) + f", {best['method']}" * named

    worst = ", ".join(number(found[name]["psnr_min"], 1) if name in found else "–" for name in WORST)
    return [
        number(ours["psnr_mean"], 1), over(("paper",)), over(("none",)), over(STATIC, True), over(DYNAMIC, True), worst,
        gone(found),
    ]  # fmt: skip


def gone(found: dict[str, dict]) -> str:
    """How much of the gap between the paper's rule and the oracle in our orders ours closes."""
    if "oracle+reorder" not in found:
        return "–"
    ours, paper, oracle = (found[name]["psnr_mean"] for name in ("paroattn", "paper", "oracle+reorder"))
    return f"{(ours - paper) / (oracle - paper):.0%}" if oracle > paper else "–"


def formats() -> str:
    """Formats of the products on the same clips, and what INT8 attention weights lose by what shares their scale."""
    rows = [row for row in rows_of("fidelity") if row["precision"] not in EXACT]
    exact = {
        (row["method"], row["density_target"], row["frames"]): row
        for row in rows_of("fidelity")
        if row["precision"] in EXACT and row["dense_warmup"] == 0
    }
    lines = []
    for row in sorted(rows, key=lambda row: (row["frames"] == 1, -row["density_target"], row["scales"] is not None)):
        other = exact.get((row["method"], row["density_target"], row["frames"]))
        sparse = other is not None and row["density_target"] < 1
        name = f"{row['method']}, {row['density_target']:g}" + ", images" * (row["frames"] == 1)
        kind = f"P and V alone, one scale a {row['scales']}" if row["scales"] else row["precision"]
        cells = [kind, f"{number(row['psnr_mean'], 1)} ± {number(row['psnr_std'], 1)}", number(row["psnr_min"], 1)]
        lines.append([name, *cells, paired(row["psnr"], other["psnr"]) if other and sparse else "–"])
    head = ["method, density", "format", "PSNR, dB", "worst", "PSNR − that in 16 bits, pair by pair"]
    return table(head, lines) + f"\n{said(rows[0])}, no step dense. {where(rows)}.\n" if lines else NOTHING


def quality() -> str:
    """Ideas for better plans: what was expected, held-out and evaluation clips, and the difference to the default."""
    rows = rows_of("quality_experiments")
    text = ""
    for series in sorted({row["series"] for row in rows}):
        mine = [row for row in rows if row["series"] == series]
        found = {(row["method"], row["density_target"], row["prompts"]): row for row in mine}
        lines = []
        for method, density in dict.fromkeys((row["method"], row["density_target"]) for row in mine):
            both = [found.get((method, density, prompts)) for prompts in ("held-out", "evaluation")]
            base = [found.get(("paroattn-tiles", density, prompts)) for prompts in ("held-out", "evaluation")]
            row = next(row for row in both if row)
            cells = [quality_cell(one, other) for one, other in zip(both, base, strict=True)]
            worst = f"{both[1]['psnr_min']:.1f}" if both[1] else "–"
            idea = f"{row['idea']} ({row['method'].removeprefix('paroattn-')}), {density:g}"
            lines.append([idea, row["predicted"] or "–", *cells, worst])
        head = ["idea (method), density", "expected", "held-out, dB", "evaluation, dB", "worst of evaluation"]
        notes = {row["note"].rpartition("; ")[2] for row in mine}
        text += table(head, lines) + f"\nSeries {series}, {', '.join(sorted(notes))}. {where(mine)}.\n\n"
    return text.removesuffix("\n") or NOTHING


def quality_cell(row: dict | None, base: dict | None) -> str:
    """Mean PSNR, and the difference to another plan on the same clips where they are known one by one."""
    if row is None:
        return "–"
    if base is None or base is row:
        return f"{row['psnr_mean']:.1f}"
    if row["psnr"] is None or base["psnr"] is None:
        return f"{row['psnr_mean']:.1f}, {decibels(row['psnr_mean'] - base['psnr_mean'])}"
    return f"{row['psnr_mean']:.1f}, {paired(row['psnr'], base['psnr'])}"


def layouts() -> str:
    """Predicted error of what is dropped with other candidates, over that with the six axis orders."""
    rows = [row for row in rows_of("quality_predictions") if row["kind"] == "candidates"]
    densities = sorted({row["density"] for row in rows}, reverse=True)
    found = {(row["name"], row["density"]): f"{row['relative_error']:.3f}" for row in rows}
    lines = [[name, *(found[name, d] for d in densities)] for name in dict.fromkeys(row["name"] for row in rows)]
    head = ["candidates", *(f"density {d:g}" for d in densities)]
    return (
        table(head, lines) + f"\nError that is predicted of dropped blocks, over that with six orders. {where(rows)}.\n"
    )


def joint() -> str:
    """What a layer's dropped blocks err together, over the sum of what each errs alone."""
    rows = [row for row in rows_of("quality_predictions") if row["kind"] == "joint error"]
    lines = [
        [
            f"{row['name']}, {row['noise_level']:g}",
            f"{row['over_sum']:.1f}",
            f"{min(x for x in row['over_sum_by_head'] if x is not None):.1f} … "
            f"{max(x for x in row['over_sum_by_head'] if x is not None):.1f}",
            f"{row['over_coherent']:.2f}",
            f"{row['over_heads']:.2f}",
            f"{row['dropped_mass']:.2f}",
        ]
        for row in rows
    ]
    head = [
        "layer, noise level",
        "error over ΣE",
        "of single heads",
        "over (Σ√E)²",
        "of all heads over their sum",
        "dropped mass",
    ]
    return table(head, lines) + f"\nDensity 0.3, one clip of a calibration prompt, guided branch. {where(rows)}.\n"


def transfer() -> str:
    """One plan elsewhere beside a plan calibrated there: one line per place and density."""
    rows = rows_of("transfer")
    if not rows:
        return NOTHING
    rows = sorted(rows, key=lambda row: -row["density_target"])
    rows = [row for axis in TRANSFERRED for row in rows if row["axis"] == axis]
    head = ["used at, density", "executed", "PSNR, dB", "worst clip", "calibrated there", "which gains, clip by clip"]
    text = table(head, [transfer_cells(row) for row in rows])
    text += (
        f"\nBundled model in bf16, {rows[0]['clips']} clips of prompts that the plan has not seen, each against its "
        "own dense clip; both plans execute the same density there. PSNR over clips, in brackets 95 % of Student's t. "
        f"{where(rows)}.\n"
    )
    two, many = (
        {row["density_target"]: row["psnr"] for row in rows if row["value"] == f"calibrated on {count}"}
        for count in (2, 16)
    )
    gains = {
        density: sum(there - here for there, here in zip(many[density], two[density], strict=True)) / len(two[density])
        for density in two
        if density in many
    }
    if gains:
        said = ", ".join(f"at {density:g} {gain:.2f} dB" for density, gain in gains.items())
        text += f"\nWhat a plan gains from 16 prompts instead of two: {said}.\n"
    return text


def transfer_cells(row: dict) -> list[str]:
    """A line of the table on transfer."""
    low, high = row["loss_interval"]
    return [
        f"{row['axis']}: {row['value']}, {row['density_target']:g}",
        f"{row['density_executed']:.3f}",
        *(f"{row[name]:.1f}" for name in ("psnr_mean", "psnr_min", "psnr_own_plan")),
        f"{row['loss_mean']:.2f} [{low:.2f}, {high:.2f}]",
    ]
