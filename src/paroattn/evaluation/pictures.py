"""Attention maps and block masks as small pictures, and the colours of the orders."""

import io
import math
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

LARGEST_MAP = 256
SKIPPED = 255

RAMP = ("#0a0d1c", "#222b5c", "#2f5c86", "#3f8f8b", "#86b96a", "#eacb5c", "#fff6d0")
ORDER_COLOURS = {
    "FHW": "#8b939b", "FWH": "#5b74a8", "HFW": "#2f9aa0", "HWF": "#3aa567", "WFH": "#d9a033", "WHF": "#d9723c",
    "4x4x4": "#b0568f", "1x8x8": "#8d63c4", "16x2x2": "#c65a63", "4x2x8": "#8f7d5a",
}  # fmt: skip
OTHER_COLOUR = "#77706a"


def colour_of(order: str) -> str:
    """A colour that stands out on light and dark pages; grey is the model's own order."""
    return ORDER_COLOURS.get(order, OTHER_COLOUR)


def map_picture(values: Tensor, kept: Tensor | None, scale: tuple[float, float]) -> bytes:
    """Draw an attention map.

    Args:
        values: (Nq, Nk), not negative; at most 256 pixels are drawn each way.
        kept: bool (Nq, Nk): blocks that are not kept are transparent. None keeps all.
        scale: Darkest and brightest value; colours are logarithmic between.

    Returns:
        PNG.
    """
    low, high = map(math.log, scale)
    shades = ((_pooled(values, LARGEST_MAP).clamp(min=scale[0]).log() - low) / (high - low)).clamp(0, 1)
    levels = (shades * (SKIPPED - 1)).round().to(torch.uint8)
    if kept is not None:
        levels[_pooled(kept, LARGEST_MAP) < 0.5] = SKIPPED
    picture = Image.fromarray(levels.numpy())
    picture.putpalette(_palette())
    return png(picture, transparency=SKIPPED)


def mask_picture(kept: Tensor, order: str, largest: int) -> Image.Image:
    """Draw kept blocks in the order's colour and the others transparent, at most `largest` pixels each way."""
    alpha = (_pooled(kept, largest) * 255).round().to(torch.uint8).numpy()
    picture = Image.new("RGB", alpha.shape[::-1], colour_of(order))
    picture.putalpha(Image.fromarray(alpha))
    return picture


def png(picture: Image.Image, **settings) -> bytes:
    """The picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **settings)
    return buffer.getvalue()


@cache
def _palette() -> list[int]:
    """The ramp in 255 steps, and one entry for skipped blocks."""
    anchors = np.array([list(bytes.fromhex(colour[1:])) for colour in RAMP], dtype=float)
    at = np.linspace(0, len(RAMP) - 1, SKIPPED)
    steps = np.stack([np.interp(at, range(len(RAMP)), channel) for channel in anchors.T], axis=1)
    return [*steps.round().astype(int).flatten().tolist(), 0, 0, 0]


def _pooled(values: Tensor, largest: int) -> Tensor:
    height, width = values.shape
    return adaptive_avg_pool2d(values.float().cpu()[None, None], (min(height, largest), min(width, largest)))[0, 0]
