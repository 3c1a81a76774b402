"""Where block statistics lie: in memory, or one file for each layer and noise level.

A file is written under another name first and then renamed, and says which calls it holds. So a folder of such files
is at any moment a complete record of what was measured, and a calibration that was killed goes on from it.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from .codes import decode, encode, heaviest, spread
from .measured import BlockStats

TENSORS = ("mass", "error", "sparse_share", "incoherence", "output_power")
PLAIN = ("sparse_share", "incoherence", "output_power", "rows", "rounding")
OPTIONAL = ("rows", "rounding")
SUFFIX = ".safetensors"
SCRATCH = ".new"


class MemoryMaps(dict[str, Any]):
    """Statistics in memory, by layer and noise level."""

    def put(self, layer: str, level: float, sums: BlockStats, units: Sequence[str] = ()) -> None:
        """Keep the sums of a layer at a noise level instead of those before."""
        kept = {name: getattr(sums, name).cpu() for name in TENSORS}
        optional = {name: getattr(sums, name) for name in OPTIONAL if getattr(sums, name) is not None}
        optional = {name: tensor.cpu() for name, tensor in optional.items()}
        self.setdefault(layer, {})[level] = BlockStats(**kept, calls=sums.calls, **optional)

    def units(self, layer: str, level: float) -> tuple[str, ...]:
        """Names of the calls that were added; not known in memory."""
        return ()


class StoredStats:
    """One file, with the attributes of `BlockStats`, each of which is read when it is asked for.

    Attributes:
        calls: How many maps were summed.
        units: Names of these maps.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, "pt") as file:
                described = file.metadata()
            known = json.loads(described["known"])
            if hashlib.sha256(described["known"].encode()).hexdigest() != described["sha256"]:
                raise ValueError("its description does not match")
            self.calls, self.units = int(known["calls"]), tuple(known["units"])
            self._columns, self._sums = int(known["columns"]), dict(known["tensors"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path.name} was cut short or changed ({error})") from error
        self._checked: set[str] = set()

    @property
    def mass(self) -> Tensor:
        return self.on("mass", torch.device("cpu"))

    @property
    def error(self) -> Tensor:
        return self.on("error", torch.device("cpu"))

    @property
    def heaviest(self) -> tuple[Tensor, Tensor] | None:
        """Key blocks of each row's largest masses and these masses, (orders, H, Nq, kept), if only they were kept."""
        return (self._read("heaviest"), self._read("heaviest_mass")) if "heaviest" in self._sums else None

    def on(self, name: str, device: torch.device) -> Tensor:
        """Mass or error on a device, where it is decoded."""
        if name == "mass" and (kept := self.heaviest) is not None:
            places, masses = kept
            return spread(places.to(device), masses.to(device), self._columns)
        if f"{name}_top" in self._sums:
            return decode(self._read(name).to(device), self._read(f"{name}_top").to(device))
        return self._read(name).to(device)

    @property
    def rows(self) -> Tensor | None:
        return self._read("rows") if "rows" in self._sums else None

    @property
    def rounding(self) -> Tensor | None:
        return self._read("rounding").clone() if "rounding" in self._sums else None

    @cached_property
    def sparse_share(self) -> Tensor:
        return self._read("sparse_share").clone()  # the file is mapped as long as a tensor of it lives

    @cached_property
    def incoherence(self) -> Tensor:
        return self._read("incoherence").clone()

    @cached_property
    def output_power(self) -> Tensor:
        return self._read("output_power").clone()

    def _read(self, name: str) -> Tensor:
        try:
            with safe_open(self.path, "pt") as file:
                tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} was cut short or changed ({error}). Calibrate again.") from error
        if name not in self._checked:
            if _digest(tensor) != self._sums[name]:
                raise ValueError(f"{self.path} was cut short or changed. Calibrate again.")
            self._checked.add(name)
        return tensor


class FolderMaps(Mapping[str, Mapping[float, StoredStats]]):
    """Statistics in a folder, by layer and noise level; nothing but an index is in memory.

    Args:
        folder: The folder; it is made if it is not there.
        names: The model's layers in their order.
        codes: Write 8-bit codes instead of float32.
        whole_mass: With codes, write all masses and not only each row's largest.
        owner: Kept as long as this object, such as a temporary folder.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], *, codes: bool = False, whole_mass: bool = False, owner: Any = None
    ):
        self.folder, self.names, self.owner = folder, tuple(names), owner
        self.codes, self.whole_mass = codes, whole_mass
        folder.mkdir(parents=True, exist_ok=True)
        found: dict[str, dict[float, StoredStats]] = {}
        for path in folder.glob(f"*{SUFFIX}"):
            layer, _, level = path.name.removesuffix(SUFFIX).rpartition("@")
            found.setdefault(layer, {})[float(level)] = StoredStats(path)
        order = {name: index for index, name in enumerate(self.names)}
        if unknown := sorted(set(found) - set(order)):
            raise ValueError(f"{folder} holds a layer that is not the model's: {unknown[0]}")
        self._index = {
            layer: dict(sorted(found[layer].items(), reverse=True)) for layer in sorted(found, key=order.__getitem__)
        }

    def __getitem__(self, layer: str) -> Mapping[float, StoredStats]:
        return self._index[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def put(self, layer: str, level: float, sums: BlockStats, units: Sequence[str] = ()) -> None:
        """Write the sums of a layer at a noise level instead of those before, all of them or nothing.

        Raises:
            OSError: If they cannot be written; what was there before still is.
        """
        path = self.folder / _name(layer, level)
        kept = self._encoded(sums)
        known = json.dumps({
            "calls": sums.calls,
            "columns": sums.mass.shape[-1],
            "units": [*self.units(layer, level), *units],
            "tensors": {name: _digest(tensor) for name, tensor in kept.items()},
        })  # fmt: skip
        described = {"known": known, "sha256": hashlib.sha256(known.encode()).hexdigest()}
        write_whole(path, save_tensors(kept, described))
        new = layer not in self._index
        self._index.setdefault(layer, {})[level] = StoredStats(path)
        if new:
            self._index = {name: self._index[name] for name in self.names if name in self._index}

    def units(self, layer: str, level: float) -> tuple[str, ...]:
        """Names of the calls that were added."""
        stored = self._index.get(layer, {}).get(level)
        return stored.units if stored else ()

    def files(self) -> Collection[Path]:
        """All files, one for each layer and noise level."""
        return [stored.path for levels in self._index.values() for stored in levels.values()]

    def tidy(self) -> None:
        """Remove what a killed process left half written."""
        for path in self.folder.glob(f"*{SCRATCH}"):
            path.unlink()

    def _encoded(self, sums: BlockStats) -> dict[str, Tensor]:
        kept = {name: getattr(sums, name).clone() for name in PLAIN if getattr(sums, name) is not None}
        if not self.codes:
            kept |= {"mass": sums.mass, "error": sums.error}
        else:
            kept["error"], kept["error_top"] = encode(sums.error)
            if self.whole_mass:
                kept["mass"], kept["mass_top"] = encode(sums.mass)
            else:
                kept["heaviest"], kept["heaviest_mass"] = heaviest(sums.mass)
        return {name: tensor.cpu().contiguous() for name, tensor in kept.items()}


def write_whole(path: Path, blob: bytes) -> None:
    """Write a file so that its name holds, at any moment, either what it held before or all of `blob`.

    Several processes may write the same file; the last one's holds.

    Raises:
        OSError: If the disk is full or cannot be written; the message says where.
    """
    scratch = path.with_name(f"{path.name}.{uuid4().hex}{SCRATCH}")
    try:
        with scratch.open("wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise OSError(
            error.errno, f"{path.name} cannot be written in {path.parent} ({reason}); what was there before is whole"
        ) from error


def _name(layer: str, level: float) -> str:
    return f"{layer}@{level!r}{SUFFIX}"


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).numpy().data).hexdigest()
