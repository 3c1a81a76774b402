"""Draws the README's picture: a head's attention in the model's own order, reordered, and what the plan keeps.

paro calibrate demo --prompts prompts.txt --density 0.3 --out plan/
python benchmarks/picture.py plan/ docs/pictures/reorder.png
"""

import argparse
import io
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from paroattn.capture import Statistics
from paroattn.evaluation.maps import AttentionMap, instructive_maps
from paroattn.evaluation.pictures import map_picture
from paroattn.plan.plan import Plan

SIDE, GAP, MARGIN, TOP = 236, 28, 20, 54
PAPER, INK, QUIET, SKIPPED = "#ffffff", "#1c2126", "#66707a", "#eef0f2"


def draw(head: AttentionMap) -> Image.Image:
    """Three panels side by side on white."""
    bright = (float(head.after.clamp_min(1e-5).quantile(0.3)), float(head.after.quantile(0.995)))
    panels = (
        (head.before, None, "the model's own order, FHW", "attention spread over all blocks"),
        (head.after, None, f"reordered, {head.order}", "the same attention, gathered in blocks"),
        (head.after, head.kept, f"kept blocks: {head.density:.0%}", f"hold {head.mass_kept:.0%} of the attention"),
    )
    canvas = Image.new("RGB", (2 * MARGIN + 3 * SIDE + 2 * GAP, TOP + SIDE + MARGIN), PAPER)
    pen, large, small = ImageDraw.Draw(canvas), ImageFont.load_default(15), ImageFont.load_default(13)
    for index, (values, kept, title, line) in enumerate(panels):
        left = MARGIN + index * (SIDE + GAP)
        picture = Image.open(io.BytesIO(map_picture(values, kept, bright))).convert("RGBA")
        ground = Image.new("RGBA", picture.size, SKIPPED)
        ground.alpha_composite(picture)
        canvas.paste(ground.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, TOP))
        pen.text((left, 10), title, fill=INK, font=large)
        pen.text((left, 31), line, fill=QUIET, font=small)
    return canvas


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="folder that paro calibrate wrote")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    statistics = Statistics.load(args.plan / "statistics" / "transformer")
    with torch.no_grad():
        draw(instructive_maps(statistics, Plan.from_pretrained(args.plan)["transformer"], 1)[0]).save(
            args.out, optimize=True
        )
