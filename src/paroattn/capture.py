"""Accumulates block statistics of a model's attention maps while it generates, and keeps them on disk.

What is measured is passed in as a function; this room adds up, averages and stores. Statistics are kept per noise
level, so phases, density, scores and budget can all be chosen later without running the model again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from .block_mask import blocks_of, parse_block
from .files import read_json, writing_folder
from .grid import ORDERS, Grid, Layout, TextSpan, check_order

FORMAT_VERSION = 1
SAME_LEVEL = 5
FILES = ("statistics.json", "statistics.safetensors")
LARGEST = 16 * 2**30
MAPS = ("mass", "error")
TENSORS = ("mass", "error", "sparse_share", "incoherence", "output_power")


@dataclass(frozen=True)
class CaptureSettings:
    """What to measure.

    Attributes:
        orders: Candidate orders.
        block: Tokens of a query block and of a key block.
        row_stride: Measure one query row in so many; 1 measures all.
        block_stride: Measure one query block in so many, which is enough to choose orders; a mask needs all, 1.
        paper: Also measure what the paper's order score needs.
    """

    orders: tuple[str, ...] = ORDERS
    block: tuple[int, int] = (64, 64)
    row_stride: int = 1
    block_stride: int = 1
    paper: bool = True

    def __post_init__(self):
        if not self.orders or len(set(self.orders)) != len(self.orders):
            raise ValueError(f"candidate orders must be given and differ; got {self.orders}")
        for order in self.orders:
            check_order(order)
        if min(*self.block, self.row_stride, self.block_stride) < 1:
            raise ValueError(
                "block, row stride and block stride must be positive; "
                f"got {self.block}, {self.row_stride} and {self.block_stride}"
            )


@dataclass(frozen=True)
class BlockStats:
    """Statistics of one self-attention, summed over `calls` maps (batch, prompts, guidance branches).

    Attributes:
        mass: Post-softmax attention inside a block over its number of rows, (orders, H, Nq, Nk); of a sample, the
            measured query blocks only, (orders, H, S, Nk).
        error: Squared output error that dropping the block causes, likewise.
        sparse_share: Share of measured blocks with at least 90 % of entries below 1e-3, (orders, H).
        incoherence: Mean over measured blocks of max P / mean P, (orders, H).
        output_power: Σ over heads and all rows of ‖o_r W_o‖²; of a sample, estimated from its rows.
        calls: How many maps were summed.
        rows: Query blocks that were measured, (S,), rising; None: all.
    """

    mass: Tensor
    error: Tensor
    sparse_share: Tensor
    incoherence: Tensor
    output_power: Tensor
    calls: int
    rows: Tensor | None = None


@dataclass
class Statistics:
    """Block statistics of one transformer.

    Attributes:
        model_class: Class of the transformer.
        heads, head_dim: Of its self-attentions.
        layout: Grid and text of the sequence.
        settings: What is measured.
        layers: Block statistics by module path and noise level.
        made: How the statistics were made; free JSON.
    """

    model_class: str
    heads: int
    head_dim: int
    layout: Layout
    settings: CaptureSettings = field(default_factory=CaptureSettings)
    layers: dict[str, dict[float, BlockStats]] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)

    def check_size(self, layers: int, levels: int) -> None:
        """Refuse before the model runs what would not fit in memory.

        Raises:
            ValueError: If statistics of so many layers and noise levels pass 16 GiB.
        """
        rows, columns = (blocks_of(self.layout.grid.tokens, size) for size in self.settings.block)
        rows = blocks_of(rows, self.settings.block_stride)
        size = 2 * 4 * layers * levels * len(self.settings.orders) * self.heads * rows * columns
        if size > LARGEST:
            raise ValueError(
                f"statistics must stay below {LARGEST / 2**30:.0f} GiB; {layers} layers, {levels} noise levels, "
                f"{len(self.settings.orders)} orders and {rows}×{columns} blocks take {size / 2**30:.0f} GiB. "
                "Take larger blocks, fewer orders or fewer steps."
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

        Raises:
            ValueError: If the tensors have other heads or another length than the statistics.
        """
        expected, found = (self.layout.tokens, self.heads, self.head_dim), tuple(q.shape[1:])
        if expected != found:
            raise ValueError(f"{layer}: (tokens, heads, head dimension) must be {expected}; got {found}")
        levels = self.layers.setdefault(layer, {})
        level = round(noise_level, SAME_LEVEL)
        measured = measure(
            q,
            k,
            v,
            w_o,
            layout=self.layout,
            orders=self.settings.orders,
            block=self.settings.block,
            row_stride=self.settings.row_stride,
            row_offset=sum(sums.calls for sums in levels.values()),
            block_stride=self.settings.block_stride,
            block_offset=list(levels).index(level) if level in levels else len(levels),
            paper=self.settings.paper,
        )
        before = levels.get(level)
        new = {name: getattr(measured, name).float().cpu() for name in TENSORS}
        if before is not None:
            new = {name: getattr(before, name) + part for name, part in new.items()}
        calls = measured.calls + (before.calls if before else 0)
        rows = measured.rows if self._sampled else None
        levels[level] = BlockStats(**new, calls=calls, rows=None if rows is None else rows.cpu())

    @property
    def noise_levels(self) -> list[float]:
        """Noise levels of the calibration schedule, falling."""
        return sorted(next(iter(self.layers.values())), reverse=True) if self.layers else []

    @property
    def _sampled(self) -> bool:
        return self.settings.block_stride > 1

    def mean(self, layer: str, name: str, levels: list[float] | None = None) -> Tensor:
        """A layer's statistic `name`, averaged over maps and over the given noise levels (all by default).

        Of a sample of query blocks, mass and error are those of all levels one below the other, (orders, H, measured
        query blocks, Nk): enough to compare orders.

        Raises:
            ValueError: If single levels of a sample are asked for, as for a mask, which needs all query blocks.
        """
        if self._sampled and levels is not None:
            raise ValueError(
                f"a mask needs statistics of all query blocks; got one in {self.settings.block_stride}, which is "
                "enough to choose orders. Calibrate with block_stride=1."
            )
        sums = [self.layers[layer][level] for level in (levels or self.noise_levels)]
        means = [getattr(each, name) / each.calls for each in sums]
        if self._sampled and name in MAPS:
            return torch.cat(means, -2)
        return torch.stack(means).mean(0)

    def save(self, folder: str | os.PathLike) -> Path:
        """Write the statistics as a folder, all of it or nothing."""
        with writing_folder(folder, FILES) as target:
            blob = save_tensors(dict(self._tensors()))
            (target / "statistics.safetensors").write_bytes(blob)
            described = {
                "format_version": FORMAT_VERSION,
                "model_class": self.model_class,
                "heads": self.heads,
                "head_dim": self.head_dim,
                "grid": list(self.layout.grid),
                "text": asdict(self.layout.text),
                "settings": asdict(self.settings) | {"block": "x".join(map(str, self.settings.block))},
                "calls": {
                    name: {repr(level): sums.calls for level, sums in levels.items()}
                    for name, levels in self.layers.items()
                },
                "made": self.made,
                "tensors": {"file": "statistics.safetensors", "sha256": hashlib.sha256(blob).hexdigest()},
            }
            (target / "statistics.json").write_text(json.dumps(described, indent=1) + "\n")
        return Path(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Statistics":
        """Read statistics that `save` wrote.

        Raises:
            ValueError: If the folder holds none, or they are damaged or of another format.
        """
        folder = Path(folder)
        if not (folder / "statistics.json").is_file():
            raise ValueError(f"{folder} holds no statistics: expected statistics.json in it")
        described = read_json(folder / "statistics.json")
        if described.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{folder} has statistics format {described.get('format_version')}; "
                f"this paroattn reads format {FORMAT_VERSION}. Calibrate again."
            )
        try:
            blob = (folder / "statistics.safetensors").read_bytes()
            if hashlib.sha256(blob).hexdigest() != described["tensors"]["sha256"]:
                raise ValueError("statistics.safetensors was cut short or changed")
            return cls._from(described, load_tensors(blob))
        except (KeyError, TypeError, ValueError, AttributeError, FileNotFoundError, SafetensorError) as error:
            raise ValueError(f"the statistics in {folder} are damaged ({error}). Calibrate again.") from error

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, levels in self.layers.items():
            for level, sums in levels.items():
                for part in self._stored:
                    yield f"{name}@{level!r}.{part}", getattr(sums, part).contiguous()

    @property
    def _stored(self) -> tuple[str, ...]:
        return (*TENSORS, "rows") if self._sampled else TENSORS

    @classmethod
    def _from(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Statistics":
        settings = dict(described["settings"])
        settings |= {"orders": tuple(settings["orders"]), "block": parse_block(settings["block"])}
        statistics = cls(
            model_class=described["model_class"],
            heads=described["heads"],
            head_dim=described["head_dim"],
            layout=Layout(Grid(*described["grid"]), TextSpan(**described["text"])),
            settings=CaptureSettings(**settings),
            made=described["made"],
        )
        statistics.layers = {
            name: {
                float(level): BlockStats(
                    **{part: tensors[f"{name}@{level}.{part}"] for part in statistics._stored}, calls=calls
                )
                for level, calls in levels.items()
            }
            for name, levels in described["calls"].items()
        }
        return statistics
