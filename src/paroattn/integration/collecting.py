"""Which attention maps a calibration measures.

Small models: everything, in every candidate order. Large ones in two stages. *Orders*: a short run of the first prompt,
a sample of query blocks in every candidate order, one map for each layer and step. *Masks*: a run of every prompt, all
query blocks, each head in its own order alone, a few maps for each layer and step, taken in turns from prompts and
guidance branches: map b of prompt p, at step s in layer l, is measured if p + b + s + l is a multiple of so many.

Processes that have joined share the layers: each runs every prompt, and measures layers of its own.
"""

import errno
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..block_mask import blocks_of
from ..capture import BlockStats, CaptureSettings, Statistics
from ..capture.maps import SUFFIX
from ..capture.statistics import DESCRIPTION, MAPS_FOLDER, SAME_LEVEL, link
from ..grid import Grid, Layout, TextSpan
from ..kernels.block_stats import block_stats
from ..plan.plan import own_config
from ..plan.search import PlanSettings, choose_orders
from .journal import Journal
from .models import self_attentions
from .processes import everyones, group, wait
from .projection import output_projection

FULL = (errno.ENOSPC, errno.EDQUOT)
EXACT_BYTES = 2**30
OPERAND_BYTES = 2 * 2**30
COPIES = 7  # of a 16-bit operand: projected values, and q, k and v of two candidate orders


@dataclass(frozen=True)
class Economy:
    """How a calibration saves time and space where measuring everything would take too much.

    Attributes:
        order_steps: Steps of the short run that orders are chosen from.
        block_stride: Query blocks of which one is measured in that run.
        maps: Most maps of a layer and step that masks are made from, over all prompts and guidance branches.
    """

    order_steps: int = 4
    block_stride: int = 16
    maps: int = 2

    def __post_init__(self):
        if min(self.order_steps, self.block_stride, self.maps) < 1:
            raise ValueError(f"order_steps, block_stride and maps must be 1 or more; got {self}")


@dataclass(frozen=True)
class Run:
    """One run of the pipeline: what it is for, and on which prompt."""

    stage: str
    prompt: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.stage} {self.prompt}"


class StartOver(Exception):
    """The first call has shown that the model is too large to measure everything."""


class Collector:
    """Turns recorded calls into statistics of each transformer.

    Args:
        transformers: By component name.
        prompts: How many.
        steps: Of the calibration schedule.
        capture: What to measure if everything is.
        settings: The plan that orders are chosen for.
        economy: What to measure otherwise.
        journal: Where to go on.
        made: What the statistics say about their making.
        impl: How maps are measured.
        progress: Called with the share of the work done.
        scratch: Temporary folder of the journal, if it is in one.
    """

    def __init__(
        self,
        transformers: Mapping[str, nn.Module],
        prompts: int,
        steps: int,
        capture: CaptureSettings,
        settings: PlanSettings,
        economy: Economy,
        journal: Journal,
        made: Mapping[str, Any],
        impl: str,
        progress: Callable[[float], None],
        scratch: Any = None,
    ):
        self.prompts, self.steps, self.capture, self.settings = prompts, steps, capture, settings
        self.economy, self.journal, self.made, self.progress = economy, journal, dict(made), progress
        self.transformers = transformers
        self.names = {name: list(self_attentions(each)) for name, each in transformers.items()}
        self.measure = partial(by_heads, partial(block_stats, impl=impl))
        self.run = Run("masks", 0, steps)
        self.scratch = scratch
        self._shown = 0.0
        self._begin(self.run)

    def runs(self) -> Iterator[Run]:
        """The runs that are left; the next one is known when the one before is finished."""
        while left := [run for run in self._all() if run.name not in self.journal.done]:
            self._begin(left[0])
            yield left[0]

    def finish(self) -> None:
        """Note that the current run is finished, and choose orders after the run that is for them."""
        if self.run.stage == "orders":
            for component, found in self._statistics.items():
                mine = {
                    layer: [found.settings.orders[index] for index in choose_orders(found, layer, self.settings)]
                    for layer in found.layers
                }
                self.journal.chosen[component] = everyones(mine)
                self.journal.branches[component] = self._branches(component, finished=True)
        for each in self._statistics.values():
            each.note()
        self.journal.done.append(self.run.name)
        self.journal.write()
        for each in self._statistics.values() if self.run.stage == "orders" else ():
            each.remove()

    def result(self) -> dict[str, Statistics]:
        """Statistics by component."""
        folder = self.journal.folder
        self._share()
        for component in self.names:
            if component not in self._statistics and folder and (folder / component / DESCRIPTION).is_file():
                self._statistics[component] = Statistics.load(folder / component)
        for component, each in self._statistics.items():
            how = {"exact": True} if self.journal.exact else {"exact": False, "economy": asdict(self.economy)}
            measured = {"capture": asdict(each.settings), "noise_levels": each.noise_levels}
            own = {"component": component, "config": own_config(self.transformers[component])}
            each.made = self.made | how | measured | own
            each.note()
        return {component: self._statistics[component] for component in self.names if component in self._statistics}

    def _share(self) -> None:
        """Take over what other processes have measured, layers of their own, from the folders where they keep it."""
        own, processes = group()
        folder = self.journal.folder
        if processes == 1 or folder is None:
            return
        folders = {rank: Path(each) for rank, each in everyones({own: str(folder)}).items() if rank != own}
        for component, names in self.names.items():
            there = folder / component / MAPS_FOLDER
            for path in (
                path for each in folders.values() for path in (each / component / MAPS_FOLDER).glob(f"*{SUFFIX}")
            ):
                if not (there / path.name).exists():
                    link(path, there / path.name)
            if component in self._statistics:
                self._statistics[component].keep_in(folder / component, names, self.scratch)
        wait()

    def observe(
        self, component: str, layer: str, attention: nn.Module, q: Tensor, k: Tensor, v: Tensor,
        noise_level: float | None, branch: str | None, grid: Grid | None, text: TextSpan, transformer: nn.Module,
    ) -> None:  # fmt: skip
        """Measure a call, or those of its maps that are to be measured and were not yet.

        Raises:
            ValueError: If the grid or the noise level is not known, or the grid is not that of the calls before.
            StartOver: If this was the first call, and everything is too much.
        """
        if grid is None or noise_level is None:
            raise ValueError(
                f"calibration must know the grid and the noise level of every call; got {grid} and {noise_level}. "
                "Calibrate a pipeline with a scheduler, at a resolution its ModelSpec understands."
            )
        layout = Layout(grid, text)
        statistics = self._statistics_of(component, transformer, layout, q)
        if grid != statistics.layout.grid:
            raise ValueError(
                f"all calls of a calibration must have one grid; got {statistics.layout.grid} and {grid}. "
                "Calibrate each size by itself."
            )
        level = round(noise_level, SAME_LEVEL)
        steps = self._levels.setdefault(component, [])
        if level not in steps:
            steps.append(level)
        seen = self._maps[component, layer, level]
        self._maps[component, layer, level] += len(q)
        wanted = [seen + i for i in range(len(q)) if self._wanted(statistics, component, layer, level, seen + i)]
        units = [f"{self.run.prompt}.{b}" for b in wanted]
        if units and not set(units) <= set(statistics.units(layer, level)):
            if len(units) < len(q):
                q, k, v = (x[[b - seen for b in wanted]] for x in (q, k, v))
            w_o = output_projection(transformer, layer, attention, q.dtype, q.device)
            statistics.add(layer, q, k, v, w_o, noise_level, self.measure, units, layout)
        self._show(component, layer, level)

    def _wanted(self, statistics: Statistics, component: str, layer: str, level: float, b: int) -> bool:
        """Whether map b of the current step is measured."""
        if not self._mine(component, layer):
            return False
        if self.journal.exact:
            return True
        turn = self._levels[component].index(level) + self.names[component].index(layer)
        if self.run.stage == "orders":
            branches = self._branches(component)
            return b == turn % branches
        branches, p = self.journal.branches[component], self.run.prompt
        every = min(-(-self.prompts * branches // self.economy.maps), self.prompts + branches - 1)
        before = statistics.layers.get(layer, {}).get(level)
        if before is None and p == self.prompts - 1 and b >= branches - 1:
            return True  # the last chance
        return (p + b + turn) % every == 0 and (before is None or before.calls < self.economy.maps)

    def _mine(self, component: str, layer: str) -> bool:
        """Whether this process measures the layer: joined processes share them."""
        own, processes = group()
        return self.names[component].index(layer) % processes == own

    def _branches(self, component: str, finished: bool = False) -> int:
        """Maps of a layer and step, as far as this run has shown; 1 during its first step."""
        levels = self._levels.get(component, [])
        known = levels if finished else levels[:-1]
        return min((self._maps[component, self.names[component][0], level] for level in known), default=1)

    def _all(self) -> list[Run]:
        orders = [] if self.journal.exact in (None, True) else [Run("orders", 0, self.economy.order_steps)]
        return [*orders, *(Run("masks", prompt, self.steps) for prompt in range(self.prompts))]

    def _begin(self, run: Run) -> None:
        if run.stage != self.run.stage or run.prompt == 0:
            self._statistics: dict[str, Statistics] = {}
        self.run = run
        self._levels: dict[str, list[float]] = {}
        self._maps: Counter[tuple[str, str, float]] = Counter()

    def _statistics_of(self, component: str, transformer: nn.Module, layout: Layout, q: Tensor) -> Statistics:
        found = self._statistics.get(component)
        if found is None:
            found = self._statistics[component] = self._open(component, type(transformer).__name__, layout, q)
        return found

    def _open(self, component: str, model_class: str, layout: Layout, q: Tensor) -> Statistics:
        """Statistics of the current stage, with what an earlier process has measured of them."""
        names = self.names[component]
        heads, head_dim = q.shape[2:]
        new = Statistics(model_class, heads, head_dim, layout, self.capture)
        if self.journal.exact is None:
            self.journal.exact = new.bytes_needed(len(names), self.steps) <= EXACT_BYTES
            if not self.journal.exact:
                raise StartOver
        if not self.journal.exact:
            new.settings = self._economical(layout, self.run.stage)
            if self.run.stage == "masks":
                if component not in self.journal.chosen:
                    raise ValueError(
                        f"the run that orders are chosen from must call the {component}; its "
                        f"{self.economy.order_steps} steps did not. Give more order_steps."
                    )
                chosen = self.journal.chosen[component]
                new.chosen = {layer: tuple(orders) for layer, orders in chosen.items()}
        self.journal.write()
        folder = self._folder(component)
        if folder is not None:
            if (folder / DESCRIPTION).is_file():
                there = Statistics.load(folder).layout
                if there.grid != layout.grid:
                    raise ValueError(
                        f"{folder} holds statistics of {there.grid}; got {layout.grid}. Remove the folder."
                    )
                new.layout = there  # that of the first call; the text may differ from call to call
            folder.mkdir(parents=True, exist_ok=True)
            new.keep_in(folder, names, self.scratch)
        new.check_size(len(names), self.run.steps)
        if self.run.stage == "orders":  # masks are made later, but what is too much for them is known now
            masks = replace(new, settings=self._economical(layout, "masks"), layers={}, chosen={names[0]: ()})
            masks.check_size(len(names), self.steps, folder)
        return new

    def _economical(self, layout: Layout, stage: str) -> CaptureSettings:
        stride = min(self.economy.block_stride, blocks_of(layout.grid.tokens, self.capture.block[0]))
        by_mass = {"orders": self.settings.order_score, "masks": self.settings.mask_score}[stage] == "mass"
        orders = stage == "orders"
        return replace(
            self.capture,
            codes=True,
            whole_mass=by_mass,
            paper=orders and self.settings.order_score == "paper",
            block_stride=stride if orders else 1,
            rounding=self.capture.rounding and not orders,
        )

    def _folder(self, component: str) -> Path | None:
        """Where the current stage keeps its statistics; None: in memory."""
        folder = self.journal.folder
        if folder is None and not self.journal.exact:
            self.scratch = self.scratch or tempfile.TemporaryDirectory(prefix="paroattn-")
            folder = Path(self.scratch.name)
        if folder is None:
            return None
        return folder / component / "orders" if self.run.stage == "orders" else folder / component

    def _show(self, component: str, layer: str, level: float) -> None:
        """Report how many of all steps are done, counting the layers of the current one."""
        runs = self._all()
        before = sum(run.steps for run in runs[: runs.index(self.run)])
        steps = sum(len(levels) for levels in self._levels.values())
        names = self.names[component]
        branches = max(self.journal.branches.get(component, 0), self._branches(component))
        calls = branches * len(names)
        earlier = sum(self._maps[component, name, level] for name in names)
        share = min(1.0, earlier / calls)
        self._shown = max(self._shown, min(1.0, (before + steps - 1 + share) / sum(run.steps for run in runs)))
        self.progress(self._shown)


def by_heads(
    measure: Callable[..., BlockStats], q: Tensor, k: Tensor, v: Tensor, w_o: Tensor, *, order: Tensor | None = None,
    **settings: Any,
) -> BlockStats:  # fmt: skip
    """Measure some heads after the other where their operands together would take too much memory."""
    tokens, heads, dim = q.shape[1:]
    parts = max(1, -(-COPIES * 2 * tokens * heads * dim // OPERAND_BYTES))
    found = [
        measure(
            q[:, :, part], k[:, :, part], v[:, :, part], w_o[part], **settings,
            **({} if order is None else {"order": order[part]}),
        )
        for part in _split(heads, parts)
    ]  # fmt: skip
    if len(found) == 1:
        return found[0]
    by_head = (*_BY_HEAD, *(["rounding"] if found[0].rounding is not None else []))
    joined = {name: torch.cat([getattr(each, name) for each in found], 1) for name in by_head}
    return BlockStats(
        **joined,
        output_power=torch.stack([each.output_power for each in found]).sum(0),
        calls=found[0].calls,
        rows=found[0].rows,
    )


_BY_HEAD = ("mass", "error", "sparse_share", "incoherence")


def _split(count: int, parts: int) -> list[slice]:
    size = -(-count // parts)
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


@contextmanager
def explained(folder: Path | None) -> Iterator[None]:
    """Say what to do when memory or disk ends.

    Args:
        folder: Journal in which everything measured so far is kept.

    Raises:
        RuntimeError: When memory ends, instead of an error of PyTorch or Python.
        OSError: When the disk is full.
    """
    kept = f"What was measured is kept in {folder}: run the same again to go on." if folder else ""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RuntimeError(
            f"calibration needs more memory than there is ({str(error).splitlines()[0] if str(error) else 'host'}). "
            f"Offload the model (pipe.enable_model_cpu_offload()) or calibrate smaller videos. {kept}".rstrip()
        ) from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(error.errno, f"calibration needs more space on the disk ({error}). {kept}".rstrip()) from error


def check_prompts(prompts: str | Sequence[str]) -> list[str]:
    """The prompts as a list.

    Raises:
        TypeError: If they are no texts.
        ValueError: If there is none, or an empty one.
    """
    found = [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, Iterable) else None
    if found is None or not all(isinstance(prompt, str) for prompt in found):
        raise TypeError(f"prompts must be a text or several; got {prompts!r}")
    if not found or not all(prompt.strip() for prompt in found):
        raise ValueError(f"calibration needs at least one prompt, none of them empty; got {found}")
    return found


def check_steps(steps: int) -> None:
    """Check a number of inference steps.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be 1 or more, a whole number; got {steps!r}")
