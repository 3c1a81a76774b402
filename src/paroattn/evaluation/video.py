"""Frames → pictures: clips as files, and sprite sheets that a browser plays in sync inside one HTML file."""

import base64
import io
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .fidelity import check_frames

DEFAULT_FPS = 8.0
SHORTEST_SIDE = 240
SHEET_SIDE = 360
SHEET_FRAMES = 48
SHEET_BUDGET = 120_000
LOSSLESS_PIXELS = 500_000
QUALITIES = (95, 88, 80, 70, 55, 40)
CODEC_BLOCK = 16


@dataclass(frozen=True)
class SpriteSheet:
    """All frames of a clip in one picture, row by row.

    Attributes:
        data: The picture, WebP.
        frames, columns: Number of frames, and how many stand side by side.
        width, height: Of a frame, pixels.
        cell: Width and height that a frame occupies in the sheet, at its top left.
        fps: Frames per second.
        lossless: Whether pixels survive exactly.
    """

    data: bytes
    frames: int
    columns: int
    width: int
    height: int
    cell: tuple[int, int]
    fps: float
    lossless: bool

    @property
    def uri(self) -> str:
        return data_uri(self.data, "image/webp")


def to_pixels(frames: Tensor) -> np.ndarray:
    """Convert a clip (F, 3, H, W) in [-1, 1] to uint8 (F, H, W, 3), clipping what lies outside."""
    scaled = (frames.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def difference(dense: Tensor, sparse: Tensor, gain: float) -> Tensor:
    """Largest absolute difference of the three colours, amplified, as a grey clip (F, 3, H, W) in [-1, 1].

    Black where both clips agree, white where they differ by 1 / gain of the range or more.
    """
    gap = (sparse.float().clamp(-1, 1) - dense.float().clamp(-1, 1)).abs().amax(1, keepdim=True)
    return ((gap * gain).clamp(max=2) - 1).expand(-1, 3, -1, -1)


def sprite_sheet(frames: Tensor, *, fps: float = DEFAULT_FPS, budget: int = SHEET_BUDGET) -> SpriteSheet:
    """Put a clip into one picture.

    Small clips keep every frame and pixel. Long ones keep every n-th frame (at most 48, at the same speed), large ones
    are made smaller (at most 360 pixels), and quality falls until the sheet fits the budget or is as low as it may be.

    Args:
        frames: (F, 3, H, W) in [-1, 1].
        fps: Frames per second.
        budget: Bytes to stay below.
    """
    check_frames(frames, "a clip")
    stride = -(-len(frames) // SHEET_FRAMES)
    pixels = _shrunk(to_pixels(frames[::stride]))
    count, height, width, _ = pixels.shape
    sheet, columns = _tiled(pixels, CODEC_BLOCK)
    data, lossless = _webp_within(Image.fromarray(sheet), budget)
    cell = (sheet.shape[1] // columns, sheet.shape[0] // -(-count // columns))
    return SpriteSheet(data, count, columns, width, height, cell, fps / stride, lossless)


def write_clip(frames: Tensor, path: str | os.PathLike, *, fps: float = DEFAULT_FPS, scale: int | None = None) -> Path:
    """Write a clip as .gif, .webp, .mp4, or .png (all frames in one picture).

    Args:
        frames: (F, 3, H, W) in [-1, 1].
        path: Where to; its ending says the format. An existing file is replaced.
        fps: Frames per second.
        scale: Enlarge by this whole number, smoothly. None enlarges a clip of less than 240 pixels just beyond that.

    Raises:
        ValueError: If the ending is unknown or the frames have another form.
        OSError: If the file cannot be written.
        RuntimeError: If .mp4 is asked for and no package that writes it is installed.
    """
    path = check_clip_path(path)
    check_frames(frames, "a clip")
    pixels = _enlarged(to_pixels(frames), scale or -(-SHORTEST_SIDE // min(*frames.shape[2:], SHORTEST_SIDE)))
    return write_pixels(pixels, path, fps=fps)


def write_pixels(pixels: np.ndarray, path: Path, *, fps: float = DEFAULT_FPS) -> Path:
    """Write uint8 pixels (F, H, W, 3) as they are; otherwise as `write_clip`."""
    with replacing(path) as target:
        _WRITERS[path.suffix.lower()](pixels, target, fps)
    return path


def check_clip_path(path: str | os.PathLike) -> Path:
    """Raise before any long work if `write_clip` would fail for this path; the errors are the same."""
    path = Path(path)
    if path.suffix.lower() not in _WRITERS:
        raise ValueError(f"a clip is written as {', '.join(_WRITERS)}; got {path.name!r}")
    check_file(path)
    if path.suffix.lower() == ".mp4":
        _mp4_plugin()
    return path


def check_file(path: str | os.PathLike) -> Path:
    """Raise before any long work if this file cannot be written later; makes its folder.

    Raises:
        IsADirectoryError: If it is a folder.
        PermissionError: If its folder cannot be made or written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise PermissionError(f"{path.parent} cannot be written ({error.strerror}); give another path") from error
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file that takes `path`'s name on success and vanishes on failure."""
    with tempfile.TemporaryDirectory(prefix=".writing.", dir=path.parent) as scratch:
        target = Path(scratch) / path.name
        yield target
        target.replace(path)


def data_uri(data: bytes, mime: str) -> str:
    """The bytes as a URI that needs no network."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _shrunk(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[1:3]
    ratio = SHEET_SIDE / max(height, width)
    return pixels if ratio >= 1 else _resized(pixels, max(1, round(width * ratio)), max(1, round(height * ratio)))


def _enlarged(pixels: np.ndarray, scale: int) -> np.ndarray:
    return pixels if scale == 1 else _resized(pixels, pixels.shape[2] * scale, pixels.shape[1] * scale)


def _resized(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    resize = (Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS) for frame in pixels)
    return np.stack([np.asarray(frame) for frame in resize])


def _tiled(pixels: np.ndarray, block: int) -> tuple[np.ndarray, int]:
    """All frames as one nearly square picture, and its number of columns; edges are repeated up to whole blocks."""
    count, height, width, _ = pixels.shape

    def shortfall(columns: int) -> float:
        rows = -(-count // columns)
        return abs(math.log(columns * width / (rows * height))) + (rows * columns - count) / count

    columns = min(range(1, count + 1), key=shortfall)
    rows = -(-count // columns)
    cells = np.pad(pixels, [(0, 0), (0, -height % block), (0, -width % block), (0, 0)], mode="edge")
    cells = np.pad(cells, [(0, rows * columns - count), (0, 0), (0, 0), (0, 0)])
    grid = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(grid.reshape(rows * cells.shape[1], columns * cells.shape[2], 3)), columns


def _webp_within(picture: Image.Image, budget: int) -> tuple[bytes, bool]:
    if picture.width * picture.height <= LOSSLESS_PIXELS:
        data = _encoded(picture, lossless=True, quality=100)
        if len(data) <= budget:
            return data, True
    data = b""
    for quality in QUALITIES:
        data = _encoded(picture, quality=quality)
        if len(data) <= budget:
            break
    return data, False


def _encoded(picture: Image.Image, **settings) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", **settings)
    return buffer.getvalue()


def _write_animation(pixels: np.ndarray, path: Path, fps: float) -> None:
    first, *rest = [Image.fromarray(frame) for frame in pixels]
    settings: dict[str, Any] = _ANIMATION[path.suffix.lower()]
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, **settings)


def _write_sheet(pixels: np.ndarray, path: Path, fps: float) -> None:
    Image.fromarray(_tiled(pixels, block=1)[0]).save(path)


def _write_mp4(pixels: np.ndarray, path: Path, fps: float) -> None:
    from imageio.v3 import imwrite

    even = np.pad(pixels, [(0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0)], mode="edge")
    plugin, settings = _mp4_plugin()
    imwrite(path, even, plugin=plugin, fps=fps, **settings)


def _mp4_plugin() -> tuple[str, dict]:
    """What writes .mp4 here, with its settings: H.264 that every player reads, at the size given."""
    plugins = {
        "av": ("pyav", {"codec": "libx264", "out_pixel_format": "yuv420p"}),
        "imageio_ffmpeg": ("FFMPEG", {"codec": "libx264", "quality": 8, "macro_block_size": 1}),
    }
    usable = [plugins[package] for package in plugins if find_spec("imageio") and find_spec(package)]
    if not usable:
        raise RuntimeError(
            "writing .mp4 needs imageio with PyAV; neither that nor imageio-ffmpeg is installed. "
            'Run `pip install "imageio[pyav]"`, or write .gif, .webp or .png.'
        )
    return usable[0]


_ANIMATION = {".gif": {"disposal": 1}, ".webp": {"quality": 92, "method": 4}}
_WRITERS = {".gif": _write_animation, ".webp": _write_animation, ".png": _write_sheet, ".mp4": _write_mp4}
