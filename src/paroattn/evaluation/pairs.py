"""Keeps every finished pair of an evaluation in a folder, so that one that was interrupted goes on where it was.

Several processes may fill one folder. What a report says comes from what was kept, never from what happens to be in
memory, so an evaluation in one go, in two, or on many devices ends in the same report.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..capture.maps import SCRATCH, write_whole
from ..files import read_json
from .clip_sections import CLIPS_BUDGET, SHOWN_CLIPS, sheets_of
from .fidelity import Comparison, Fidelity
from .video import SpriteSheet, to_pixels

ASKED = "evaluation.json"
PAIR = "pair-{:05d}.json"
PIXELS = "pair-{:05d}.npz"
SHEETS_BUDGET = CLIPS_BUDGET // (3 * SHOWN_CLIPS)


@dataclass(frozen=True, eq=False)
class Kept:
    """A finished pair: its comparison without frames, and what was executed meanwhile, from `Report.to_dict`."""

    comparison: Comparison
    executed: Mapping[str, Any]


class Pairs:
    """Finished pairs by number.

    Args:
        folder: Where they are kept; made if it does not exist.
        asked: What is evaluated and how, as JSON.
        fps: Frames per second of the clips.
        pixels: Keep the clips' pixels too, for metrics over all of them.

    Raises:
        ValueError: If the folder holds pairs of another evaluation.
        FileExistsError: If it holds anything else.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any], *, fps: float, pixels: bool = False):
        self.folder, self.fps, self.pixels = folder, fps, pixels
        asked = json.loads(json.dumps(asked))
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / ASKED).is_file():
            if any(not path.name.endswith(SCRATCH) for path in folder.iterdir()):
                raise FileExistsError(f"{folder} must be a new folder or an unfinished evaluation; it is neither")
            self._begin(asked)
        known = read_json(folder / ASKED)
        differing = [name for name in asked if asked[name] != known.get(name)]
        if differing and self.done():
            name = differing[0]
            raise ValueError(
                f"{folder} holds an unfinished evaluation that differs in {name}: {known.get(name)}; got "
                f"{asked[name]}. Finish it with the same settings, or remove {folder}"
            )
        if differing:  # one that failed before its first pair
            self._begin(asked)

    def _begin(self, asked: Mapping[str, Any]) -> None:
        write_whole(self.folder / ASKED, json.dumps(asked, indent=1).encode())

    def done(self) -> set[int]:
        """Numbers of the finished pairs."""
        return {int(path.stem.removeprefix("pair-")) for path in self.folder.glob("pair-*.json")}

    def keep(self, number: int, pair: Comparison, executed: Mapping[str, Any]) -> None:
        """Keep a pair and what was executed for it; its name vanishes or is whole."""
        if self.pixels:
            scratch = self.folder / (PIXELS.format(number) + SCRATCH)
            with scratch.open("wb") as file:
                np.savez(file, dense=_frames(pair.dense), sparse=_frames(pair.sparse))
            scratch.replace(self.folder / PIXELS.format(number))
        sheets = [_described(sheet) for sheet in sheets_of(pair, self.fps, SHEETS_BUDGET)]
        kept = {"record": pair.record(), "more": dict(pair.more), "executed": executed, "sheets": sheets}
        write_whole(self.folder / PAIR.format(number), json.dumps(kept).encode())

    def load(self, number: int) -> Kept:
        """A finished pair.

        Raises:
            ValueError: If its file is damaged.
        """
        path = self.folder / PAIR.format(number)
        try:
            found = read_json(path)
            record = found["record"]
            fidelity = Fidelity(
                float("inf") if record["identical"] else record["psnr"], record["ssim"], record["cosine"]
            )
            pair = Comparison(
                record["prompt"], record["seed"], fidelity, record["dense_seconds"], record["sparse_seconds"],
                more=found["more"], sheets=tuple(_sheet(each) for each in found["sheets"]),
            )  # fmt: skip
            return Kept(pair, found["executed"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}). Remove it and run again") from error

    def clips(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Pixels of a pair's dense and sparse clip, uint8 (F, H, W, 3), if they were kept."""
        with np.load(self.folder / PIXELS.format(number)) as found:
            return found["dense"], found["sparse"]


def _frames(clip: Tensor | None) -> np.ndarray:
    assert clip is not None
    return to_pixels(clip)


def _described(sheet: SpriteSheet) -> dict[str, Any]:
    return {**vars(sheet), "data": base64.b64encode(sheet.data).decode()}


def _sheet(found: Mapping[str, Any]) -> SpriteSheet:
    return SpriteSheet(**{**found, "data": base64.b64decode(found["data"]), "cell": tuple(found["cell"])})
