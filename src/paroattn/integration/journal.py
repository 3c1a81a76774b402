"""Remembers what a calibration has decided and finished, so that one that was interrupted goes on where it was."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..capture.maps import SCRATCH, write_whole
from ..files import read_json

JOURNAL = "calibration.json"
JOURNAL_VERSION = 1


class Journal:
    """What a calibration has decided and finished: in memory, or in a folder from where the next one goes on.

    Args:
        folder: The folder; None: in memory.
        asked: What is calibrated and how, from `described`.
        exact: Whether everything is to be measured; None if that is still to be decided.

    Attributes:
        exact: Whether everything is measured; None until the first call has shown how much that is.
        done: Names of the finished runs.
        branches: Maps of a layer and step, by component.
        chosen: Order of each head, by component and layer.

    Raises:
        ValueError: If the folder holds a calibration of something else, or a damaged one.
        FileExistsError: If it holds anything else.
    """

    def __init__(self, folder: Path | None, asked: Mapping[str, Any], exact: bool | None):
        self.folder, self.asked = folder, json.loads(json.dumps(asked))
        self.exact = exact
        self.done: list[str] = []
        self.branches: dict[str, int] = {}
        self.chosen: dict[str, dict[str, list[str]]] = {}
        if folder is not None and (folder / JOURNAL).is_file():
            self._resume(read_json(folder / JOURNAL))
        elif folder is not None:
            half_written = f"{JOURNAL}.*{SCRATCH}"
            if folder.exists() and not (folder.is_dir() and all(path.match(half_written) for path in folder.iterdir())):
                raise FileExistsError(f"{folder} must be a new folder or an unfinished calibration; it is neither")

    def write(self) -> None:
        """Keep what was decided and finished."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = {name: getattr(self, name) for name in ("asked", "exact", "done", "branches", "chosen")}
            blob = json.dumps({"version": JOURNAL_VERSION} | kept, indent=1).encode()
            write_whole(self.folder / JOURNAL, blob)

    def _resume(self, found: dict[str, Any]) -> None:
        remedy = f"Finish it with the same settings, or remove {self.folder}"
        if found.get("version") != JOURNAL_VERSION:
            raise ValueError(f"{self.folder} holds a calibration of another paroattn. Remove it to start again")
        try:
            known = found["asked"]
            differing = [name for name in self.asked if self.asked[name] != known.get(name)]
            self.exact, self.done = found["exact"], list(found["done"])
            self.branches, self.chosen = dict(found["branches"]), dict(found["chosen"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{JOURNAL} in {self.folder} is damaged ({error}). Remove {self.folder}") from error
        if differing:
            name = differing[0]
            there, here = _apart(known.get(name), self.asked[name])
            raise ValueError(
                f"{self.folder} holds an unfinished calibration that differs in {name}: {there}; got {here}. {remedy}"
            )


def _apart(one: Any, other: Any) -> tuple[Any, Any]:
    """What differs: of objects, the fields that do."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one, other
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return {name: one.get(name) for name in names}, {name: other.get(name) for name in names}


def described(value: Any) -> Any:
    """JSON that tells apart what a pipeline is called with: pictures and tensors by a digest of their content."""
    if isinstance(value, Mapping):
        return {str(name): described(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [described(each) for each in value]
    if arguments := getattr(value, "arguments", None):
        return {"words": str(value), "arguments": described(arguments)}
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    elif hasattr(value, "tobytes"):
        content = value.tobytes()
    else:
        return type(value).__name__
    return f"{type(value).__name__} {hashlib.sha256(content).hexdigest()}"


def unfinished(folder: str | os.PathLike) -> Path:
    """Where a calibration keeps what it has measured until it can write `folder`."""
    final = Path(folder).absolute()
    return final.with_name(f"{final.name}.unfinished")


def discard(journal: Path) -> None:
    """Remove the journal of a calibration whose results are written; its name vanishes at once."""
    finished = journal.with_name(f".{journal.name}.finished")
    shutil.rmtree(finished, ignore_errors=True)
    journal.rename(finished)
    shutil.rmtree(finished, ignore_errors=True)
