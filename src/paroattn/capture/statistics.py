"""Accumulates block statistics of a model's attention maps while it generates, and keeps them on disk.

What is measured is passed in as a function; this room adds up, averages and stores. Statistics are kept per noise
level, so phases, density, scores and budget can all be chosen later without running the model again.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..block_mask import blocks_of, parse_block
from ..files import read_json, writing_folder
from ..grid import Grid, Layout, TextSpan
from .codes import HEAVIEST, merge
from .maps import TENSORS, FolderMaps, MemoryMaps, StoredStats, write_whole
from .measured import BlockStats, CaptureSettings

FORMAT_VERSION = 2
SAME_LEVEL = 5
DESCRIPTION = "statistics.json"
MAPS_FOLDER = "maps"
FILES = (DESCRIPTION, MAPS_FOLDER)
LARGEST = 16 * 2**30
MAPS = ("mass", "error")


@dataclass
class Statistics:
    """Block statistics of one transformer.

    Attributes:
        model_class: Class of the transformer.
        heads, head_dim: Of its self-attentions.
        layout: Grid and text of the sequence; the text of other calls may be longer or shorter.
        settings: What is measured.
        layers: Block statistics by module path and noise level, in memory or in a folder.
        made: How the statistics were made; free JSON.
        chosen: Order of each head by module path, if heads were measured in one order each; the statistics then have
            a single order.
        level_weights: By noise level, how much an error there matters for the finished sample; empty if unknown.
        layer_weights: By module path, likewise, as a factor on that.
        rounding_weight: The same for errors of rounding, as a factor on both; None if unknown.
    """

    model_class: str
    heads: int
    head_dim: int
    layout: Layout
    settings: CaptureSettings = field(default_factory=CaptureSettings)
    layers: Mapping[str, Mapping[float, Any]] = field(default_factory=MemoryMaps)
    made: dict[str, Any] = field(default_factory=dict)
    chosen: dict[str, tuple[str, ...]] = field(default_factory=dict)
    level_weights: dict[float, float] = field(default_factory=dict)
    layer_weights: dict[str, float] = field(default_factory=dict)
    rounding_weight: float | None = None

    def __post_init__(self):
        if not isinstance(self.layers, FolderMaps):
            self.layers = MemoryMaps(self.layers)

    def bytes_needed(self, layers: int, levels: int) -> int:
        """What statistics of so many layers and noise levels take."""
        rows, columns = (blocks_of(self.layout.grid.tokens, size) for size in self.settings.block)
        rows = blocks_of(rows, self.settings.block_stride)
        masses = columns if self.settings.whole_mass else 8 * HEAVIEST
        row = columns + masses if self.settings.codes else 2 * 4 * columns
        return layers * levels * (1 if self.chosen else len(self.settings.orders)) * self.heads * rows * row

    def check_size(self, layers: int, levels: int, folder: Path | None = None) -> None:
        """Refuse before the model runs what would not fit in memory, or on the disk that holds the folder.

        Args:
            layers: How many.
            levels: How many noise levels.
            folder: Where the statistics will be kept, if they are not yet kept in a folder.

        Raises:
            ValueError: If statistics of so many layers and noise levels pass 16 GiB.
            OSError: If the disk has too little space.
        """
        size = self.bytes_needed(layers, levels)
        rows, columns = (blocks_of(self.layout.grid.tokens, size) for size in self.settings.block)
        rows = blocks_of(rows, self.settings.block_stride)
        if size > LARGEST:
            raise ValueError(
                f"statistics must stay below {LARGEST / 2**30:.0f} GiB; {layers} layers, {levels} noise levels, "
                f"{1 if self.chosen else len(self.settings.orders)} orders and {rows}×{columns} blocks take "
                f"{size / 2**30:.0f} GiB. Take larger blocks, fewer orders or fewer steps."
            )
        there = 0
        if isinstance(self.layers, FolderMaps):
            folder = self.layers.folder
            there = sum(path.stat().st_size for path in self.layers.files())
        if folder is not None:
            free = shutil.disk_usage(folder).free
            if size - there > free:
                raise OSError(
                    f"{folder} must have {(size - there) / 1e9:.1f} GB free for the statistics; it has "
                    f"{free / 1e9:.1f} GB. Give a folder on another disk, or take larger blocks or fewer steps."
                )

    def add(
        self,
        layer: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        w_o: Tensor,
        noise_level: float,
        measure: Callable[..., BlockStats],
        units: Sequence[str] = (),
        layout: Layout | None = None,
    ) -> None:
        """Measure one self-attention call and add it up.

        Every call measures other rows, where one in so many is measured. A sample of query blocks is the same for all
        maps of a noise level, so that they can be averaged, and another one at every level.

        Args:
            layer: Module path.
            q, k, v: (B, N, H, D) in the model's order, after RoPE.
            w_o: Output projection of each head, (H, D, channels).
            noise_level: Of this call.
            measure: The statistics function, such as `kernels.block_stats.block_stats`.
            units: Names of these maps, kept with the statistics in a folder.
            layout: Of these maps; that of the statistics by default. The text may be longer or shorter.

        Raises:
            ValueError: If the tensors have other heads or another length than the statistics, or what is measured is
                not finite.
            OSError: If the statistics cannot be written.
        """
        layout = layout or self.layout
        expected, found = (layout.tokens, self.heads, self.head_dim), tuple(q.shape[1:])
        if expected != found:
            raise ValueError(f"{layer}: (tokens, heads, head dimension) must be {expected}; got {found}")
        levels, level = self.layers.get(layer, {}), round(noise_level, SAME_LEVEL)
        measured = measure(
            q,
            k,
            v,
            w_o,
            layout=layout,
            orders=self.settings.orders,
            block=self.settings.block,
            row_stride=self.settings.row_stride,
            row_offset=sum(sums.calls for sums in levels.values()),
            block_stride=self.settings.block_stride,
            block_offset=list(levels).index(level) if level in levels else len(levels),
            paper=self.settings.paper,
            rounding=self.settings.rounding and level not in levels,
            **({"order": self._order(layer)} if self.chosen else {}),
        )
        new = {name: getattr(measured, name).float() for name in TENSORS}
        if not all(bool(new[name].isfinite().all()) for name in MAPS):
            raise ValueError(f"{layer}: what is measured must be finite; got NaN or infinity at noise level {level}")
        before, rounding = levels.get(level), measured.rounding
        if before is not None:
            new = {name: _part(before, name, part.device) + part for name, part in new.items()}
            rounding = before.rounding
        calls = measured.calls + (before.calls if before else 0)
        sums = BlockStats(**new, calls=calls, rows=measured.rows if self._sampled else None, rounding=rounding)
        self._maps.put(layer, level, sums, units)

    def units(self, layer: str, noise_level: float) -> tuple[str, ...]:
        """Names of the maps of a layer and noise level that were added; known in a folder only."""
        return self._maps.units(layer, round(noise_level, SAME_LEVEL))

    @property
    def noise_levels(self) -> list[float]:
        """Noise levels of the calibration schedule, falling."""
        return sorted({level for levels in self.layers.values() for level in levels}, reverse=True)

    @property
    def _maps(self) -> MemoryMaps | FolderMaps:
        assert isinstance(self.layers, MemoryMaps | FolderMaps)
        return self.layers

    @property
    def _sampled(self) -> bool:
        return self.settings.block_stride > 1

    def _order(self, layer: str) -> Tensor:
        return torch.tensor([self.settings.orders.index(order) for order in self.chosen[layer]])

    def mean(
        self,
        layer: str,
        name: str,
        levels: Sequence[float] | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """A layer's statistic `name`, averaged over maps and over the given noise levels (all by default).

        Of a sample of query blocks, mass and error are those of all levels one below the other, (orders, H, measured
        query blocks, Nk): enough to compare orders.

        Raises:
            ValueError: If single levels of a sample are asked for, as for a mask, which needs all query blocks; or the
                layer was measured at none of the levels.
        """
        if self._sampled and levels is not None:
            raise ValueError(
                f"a mask needs statistics of all query blocks; got one in {self.settings.block_stride}, which is "
                "enough to choose orders. Calibrate with block_stride=1."
            )
        sums = self._measured(layer, levels)
        if self._sampled and name in MAPS:
            return torch.cat([_part(each, name, device) / each.calls for each in sums], -2)
        total = _part(sums[0], name, device) / sums[0].calls
        for each in sums[1:]:
            total += _part(each, name, device).div_(each.calls)
        return total.div_(len(sums))

    def rounding(self, layer: str, levels: Sequence[float] | None = None) -> Tensor | None:
        """Squared output error that each precision of `ROUNDED` causes, (precisions, H), mean over noise levels.

        None if that was not measured at all of them.
        """
        sums = self._measured(layer, levels)
        found = [each.rounding for each in sums if each.rounding is not None]
        return torch.stack(found).mean(0) if len(found) == len(sums) else None

    def heaviest(self, layer: str, levels: Sequence[float] | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Key block of the largest mean mass of each row, (orders, H, Nq)."""
        sums = self._measured(layer, levels)
        kept = [found for each in sums if isinstance(each, StoredStats) and (found := each.heaviest) is not None]
        if len(kept) < len(sums):
            return self.mean(layer, "mass", levels, device).argmax(-1)
        places = torch.cat([each[0] for each in kept], -1).to(device)
        masses = torch.cat([each[1] / one.calls for each, one in zip(kept, sums, strict=True)], -1).to(device)
        places, masses = merge(places, masses)
        return places.gather(-1, masses.argmax(-1, keepdim=True))[..., 0].long()

    def _measured(self, layer: str, levels: Sequence[float] | None) -> list[Any]:
        measured = self.layers[layer]
        sums = [measured[level] for level in (self.noise_levels if levels is None else levels) if level in measured]
        if not sums:
            raise ValueError(f"{layer} was measured at none of the noise levels {levels}. Calibrate with more maps.")
        return sums

    def save(self, folder: str | os.PathLike) -> Path:
        """Write the statistics as a folder, all of it or nothing; files that are there already are linked."""
        with writing_folder(folder, FILES) as target:
            if isinstance(self.layers, FolderMaps):
                (target / MAPS_FOLDER).mkdir()
                for path in self.layers.files():
                    link(path, target / MAPS_FOLDER / path.name)
            else:
                maps = FolderMaps(target / MAPS_FOLDER, list(self.layers), **self._format)
                for layer, levels in self.layers.items():
                    for level, sums in levels.items():
                        maps.put(layer, level, sums)
            self._describe(target)
        return Path(folder)

    def keep_in(self, folder: Path, names: Sequence[str], owner: Any = None) -> None:
        """Keep statistics in a folder from now on, one file for each layer and noise level.

        Args:
            folder: The folder. What `keep_in` left there earlier is taken over.
            names: The model's layers in their order.
            owner: Kept as long as the statistics, such as a temporary folder.
        """
        self.layers = FolderMaps(folder / MAPS_FOLDER, names, owner=owner, **self._format)
        self.layers.tidy()
        self._describe(folder)

    def note(self) -> None:
        """Bring the description in the folder up to date; nothing to do in memory."""
        if isinstance(self.layers, FolderMaps):
            self._describe(self.layers.folder.parent)

    def remove(self) -> None:
        """Remove the folder that the statistics are kept in; they are gone then."""
        if isinstance(self.layers, FolderMaps):
            shutil.rmtree(self.layers.folder.parent, ignore_errors=True)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Statistics":
        """Open statistics that `save` or `keep_in` wrote; maps are read when they are asked for.

        Raises:
            ValueError: If the folder holds none, or they are damaged or of another format.
        """
        folder = Path(folder)
        if not (folder / DESCRIPTION).is_file():
            raise ValueError(f"{folder} holds no statistics: expected {DESCRIPTION} in it")
        described = read_json(folder / DESCRIPTION)
        if described.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{folder} has statistics format {described.get('format_version')}; "
                f"this paroattn reads format {FORMAT_VERSION}. Calibrate again."
            )
        try:
            return cls._from(described, folder)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the statistics in {folder} are damaged ({error}). Calibrate again.") from error

    @property
    def _format(self) -> dict[str, bool]:
        return {"codes": self.settings.codes, "whole_mass": self.settings.whole_mass}

    def _describe(self, folder: Path) -> None:
        described = {
            "format_version": FORMAT_VERSION,
            "model_class": self.model_class,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "grid": list(self.layout.grid),
            "text": asdict(self.layout.text),
            "settings": asdict(self.settings) | {"block": "x".join(map(str, self.settings.block))},
            "layers": list(self.layers.names if isinstance(self.layers, FolderMaps) else self.layers),
            "calls": {
                name: {repr(level): sums.calls for level, sums in levels.items()}
                for name, levels in self.layers.items()
            },
            "chosen": {name: list(orders) for name, orders in self.chosen.items()},
            "level_weights": {repr(level): weight for level, weight in self.level_weights.items()},
            "layer_weights": self.layer_weights,
            "rounding_weight": self.rounding_weight,
            "made": self.made,
        }
        write_whole(folder / DESCRIPTION, (json.dumps(described, indent=1) + "\n").encode())

    @classmethod
    def _from(cls, described: Mapping[str, Any], folder: Path) -> "Statistics":
        settings = dict(described["settings"])
        settings |= {"orders": tuple(settings["orders"]), "block": parse_block(settings["block"])}
        settings.setdefault("rounding", False)  # statistics of an earlier version were measured without
        statistics = cls(
            model_class=described["model_class"],
            heads=described["heads"],
            head_dim=described["head_dim"],
            layout=Layout(Grid(*described["grid"]), TextSpan(**described["text"])),
            settings=CaptureSettings(**settings),
            made=described["made"],
            chosen={name: tuple(orders) for name, orders in described["chosen"].items()},
            level_weights={float(level): weight for level, weight in described["level_weights"].items()},
            layer_weights=dict(described["layer_weights"]),
            rounding_weight=described.get("rounding_weight"),
        )
        own = () if statistics.rounding_weight is None else (statistics.rounding_weight,)
        for weight in (*statistics.level_weights.values(), *statistics.layer_weights.values(), *own):
            if not 0 < weight < math.inf:
                raise ValueError(f"weights must be above 0 and finite; got {weight}")
        statistics.layers = FolderMaps(folder / MAPS_FOLDER, described["layers"], **statistics._format)
        for name, levels in described["calls"].items():
            for level in levels:
                if float(level) not in statistics.layers.get(name, {}):
                    raise ValueError(f"{name} at noise level {level} is missing")
        if statistics.level_weights and (missing := set(statistics.noise_levels) - set(statistics.level_weights)):
            raise ValueError(f"the weight of noise level {min(missing)} is missing")
        return statistics


def _part(sums: Any, name: str, device: torch.device | str) -> Tensor:
    """One statistic of a level, a tensor of its own."""
    if isinstance(sums, StoredStats) and name in MAPS:
        return sums.on(name, torch.device(device))
    return getattr(sums, name).to(device, copy=True)


def link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the file system has no links."""
    with suppress(OSError):
        target.hardlink_to(source)
        return
    shutil.copyfile(source, target)
