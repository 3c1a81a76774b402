"""The plan: order, block mask and precision of every head, with the model and grid they belong to."""

import copy
import hashlib
import inspect
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..block_mask import BlockMask, blocks_of
from ..files import sha256_of, shortened, writing_folder
from ..grid import Grid, TextSpan, check_order
from ..phases import Phase, phase_at
from ..precision import Precision

COMPONENTS = ("transformer", "transformer_2")
STATISTICS = "statistics"
CARD = "README.md"
CARRIED = "carried_from"
FOLDER = (*COMPONENTS, STATISTICS, CARD)
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # "owner/name"
_MODULE_PATH = re.compile(r"\w+(\.\w+)*")
_CALIBRATE = "Make a plan for this model with paroattn.calibrate or `paro calibrate`."


class PlanError(ValueError):
    """A plan cannot be read, or does not fit."""


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """Decisions for one self-attention.

    Attributes:
        orders: Token order of each head.
        mask: Kept blocks over the video, (phases, heads, Nq, Nk).
        precision: Precision of each head in each phase, [phase][head].
    """

    orders: tuple[str, ...]
    mask: BlockMask
    precision: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False)
class TransformerPlan:
    """The plan of one transformer.

    Attributes:
        model_class: Class of the transformer.
        heads, head_dim: Of every planned layer.
        grid: Size of the video in tokens.
        text: Text tokens in the same sequence at calibration.
        block: Tokens of a query block and of a key block.
        phases: From high noise to low.
        layers: Decisions by module path.
        made: How the plan was made; free JSON.
        config: Configuration of the calibrated model, from `own_config`; None if unknown, which is not checked.
        component: Which of the pipeline's transformers it is for; None if unknown.
    """

    model_class: str
    heads: int
    head_dim: int
    grid: Grid
    text: TextSpan
    block: tuple[int, int]
    phases: tuple[Phase, ...]
    layers: Mapping[str, LayerPlan]
    made: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    component: str | None = None

    def __post_init__(self):
        for name, size in (("heads", self.heads), ("head_dim", self.head_dim)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise PlanError(f"{name} of a plan must be a positive integer; got {size!r}")
        shape = (
            len(self.phases),
            self.heads,
            blocks_of(self.grid.tokens, self.block[0]),
            blocks_of(self.grid.tokens, self.block[1]),
        )
        if not self.layers or not self.phases:
            raise PlanError("a plan must have at least one layer and one phase")
        ends = [phase.lowest_noise for phase in self.phases]
        if ends[-1] != 0 or any(high <= low for high, low in pairwise(ends)):
            raise PlanError(f"phases must end at falling noise levels, the last one at 0; got {ends}")
        if any(phase.share <= 0 for phase in self.phases) or abs(sum(phase.share for phase in self.phases) - 1) > 1e-6:
            raise PlanError(f"shares of the phases must be positive and sum to 1; got {[p.share for p in self.phases]}")
        for name, layer in self.layers.items():
            if not _MODULE_PATH.fullmatch(name):
                raise PlanError(f"layers must be named by module path, such as blocks.0.attn1; got {name!r}")
            mask = layer.mask
            found = mask.shape
            if found != shape or mask.block != self.block:
                raise PlanError(f"{name}: the mask must have (phases, heads, Nq, Nk) = {shape}; got {found}")
            mask.check()
            if len(layer.orders) != self.heads:
                raise PlanError(f"{name}: {self.heads} heads need {self.heads} orders; got {len(layer.orders)}")
            if [len(heads) for heads in layer.precision] != [self.heads] * len(self.phases):
                raise PlanError(f"{name}: precision must have one entry for each of {shape[:2]} (phases, heads)")
            for order in set(layer.orders):
                check_order(order)
            for precision in {name for heads in layer.precision for name in heads}:
                Precision.parse(precision)

    @property
    def density(self) -> float:
        """Video density, phases counting with their share of steps."""
        return sum(float(d) * p.share for d, p in zip(self.phase_density(), self.phases, strict=True))

    def phase_density(self) -> torch.Tensor:
        """Video density of each phase, (phases,)."""
        return torch.stack([layer.mask.head_density().mean(1) for layer in self.layers.values()]).mean(0)

    def head_density(self) -> torch.Tensor:
        """Density by (layers, phases, heads)."""
        return torch.stack([layer.mask.head_density() for layer in self.layers.values()])

    def precision_shares(self) -> dict[str, float]:
        """Share of the heads in each precision, largest first, phases counting with their share of steps."""
        return precision_shares([layer.precision for layer in self.layers.values()], self.phases)

    def phase_at(self, noise_level: float) -> int:
        """Index of the phase that a noise level belongs to."""
        return phase_at(self.phases, noise_level)

    def for_grid(self, grid: Grid) -> "TransformerPlan":
        """Carry the plan to another resolution or number of frames, without running the model or its statistics.

        Every head keeps its order, density and precision; a block is kept where those with the same offset between
        query and key were, and every row keeps at least one. With the statistics that the plan was made from,
        `paro plan --grid` chooses anew instead. What either loses is not measured; `paro evaluate` tells. The grids
        that it came from are noted in `made`.

        Args:
            grid: Size of the video in tokens; the plan's own gives the plan itself.

        Returns:
            A plan for that grid.
        """
        from .regrid import for_grid

        return for_grid(self, grid)

    def digest(self, *settings: Any) -> str:
        """SHA-256 over all that decides what runs, and settings beside it; how a plan was made does not enter."""
        size = self.heads, self.head_dim, str(self.grid), vars(self.text), self.block
        found = hashlib.sha256(repr((self.model_class, size, self.phases, settings)).encode())
        for name, layer in self.layers.items():
            found.update(repr((name, layer.orders, layer.precision)).encode())
            found.update(layer.mask.bits.cpu().contiguous().numpy().data)
        return found.hexdigest()

    @property
    def config_sha256(self) -> str | None:
        """SHA-256 of the calibrated model's configuration, None if unknown."""
        return None if self.config is None else sha256_of(self.config)

    def check_fits(
        self, model_class: str, layers: Mapping[str, tuple[int, int]], config: Mapping[str, Any] | None = None
    ) -> None:
        """Check that the plan was made for this model.

        Args:
            model_class: Class name of the transformer.
            layers: (heads, head dimension) of each self-attention by module path.
            config: The transformer's configuration, from `own_config`; None leaves it unchecked.

        Raises:
            PlanError: Naming what differs, both sides and the remedy.
        """
        remedy = _CALIBRATE
        if model_class != self.model_class:
            raise PlanError(f"the plan was made for {self.model_class}; this model is {model_class}. {remedy}")
        missing, unknown = sorted(set(layers) - set(self.layers)), sorted(set(self.layers) - set(layers))
        if missing or unknown:
            name, side = (
                (missing[0], "the model has it, the plan does not") if missing else (unknown[0], "the plan has it")
            )
            raise PlanError(
                f"the plan has {len(self.layers)} layers and the model {len(layers)}; "
                f"they differ at {name} ({side}). {remedy}"
            )
        for name, (heads, head_dim) in layers.items():
            if (heads, head_dim) != (self.heads, self.head_dim):
                raise PlanError(
                    f"{name}: the plan has {self.heads} heads of dimension {self.head_dim}, "
                    f"the model {heads} of {head_dim}. {remedy}"
                )
        if self.config is not None and config is not None and sha256_of(config) != self.config_sha256:
            ours, theirs = _differing(self.config, config)
            raise PlanError(
                f"the plan was made for a {self.model_class} with {ours} "
                f"(configuration {shortened(self.config_sha256)}); this model has {theirs} "
                f"({shortened(sha256_of(config))}). {remedy}"
            )


def precision_shares(layers: Sequence[Sequence[Sequence[str]]], phases: Sequence[Phase]) -> dict[str, float]:
    """Share of the heads in each precision, largest first, of precisions [layer][phase][head]."""
    found: dict[str, float] = {}
    for layer in layers:
        for phase, heads in zip(phases, layer, strict=True):
            for name in heads:
                found[name] = found.get(name, 0.0) + phase.share / len(heads)
    total = sum(found.values())
    return {name: found[name] / total for name in sorted(found, key=lambda name: -found[name])}


def own_config(transformer: Any) -> dict[str, Any]:
    """What sets a model apart from others of its class: the settings that differ from its constructor's defaults.

    Weights, precision and quantisation do not enter, so a fine-tuned or quantised model has the same; nor do settings
    that a later version adds with a default.

    Args:
        transformer: A diffusers model.
    """
    transformer = getattr(transformer, "_orig_mod", transformer)  # what torch.compile has wrapped
    config = getattr(transformer, "config", None)
    config = config if isinstance(config, Mapping) else {}
    known = inspect.signature(type(transformer).__init__).parameters
    given = {name: _as_json(config[name]) for name in known if name in config and not name.startswith("_")}
    return {name: value for name, value in sorted(given.items()) if value != _as_json(known[name].default)}


class Plan(Mapping[str, TransformerPlan]):
    """The plans of a pipeline's transformers, by component name ("transformer", "transformer_2")."""

    def __init__(self, components: Mapping[str, TransformerPlan]):
        if not components or set(components) - set(COMPONENTS):
            raise PlanError(f"a plan needs components among {', '.join(COMPONENTS)}; got {sorted(components)}")
        for name, plan in components.items():
            if plan.component not in (None, name):
                raise PlanError(f"the plan for {name} was made for {plan.component}. Give each transformer its own.")
        self._components = {name: _meant_for(name, plan) for name, plan in components.items()}

    def __getitem__(self, name: str) -> TransformerPlan:
        if name not in self._components:
            raise KeyError(f"a component must be one of the plan's, {', '.join(self._components)}; got {name!r}")
        return self._components[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._components)

    def __len__(self) -> int:
        return len(self._components)

    def for_grid(self, grid: Grid) -> "Plan":
        """Carry every transformer's plan to another grid, see `TransformerPlan.for_grid`."""
        from .regrid import plan_for_grid

        return plan_for_grid(self, grid)

    def digest(self) -> str:
        """SHA-256 over all that decides what runs; how a plan was made does not enter."""
        return hashlib.sha256(repr([(name, plan.digest()) for name, plan in self.items()]).encode()).hexdigest()

    def save_pretrained(self, folder: str | os.PathLike, *, evaluation: Mapping[str, Any] | None = None) -> Path:
        """Write the plan as a folder with a model card, all of it or nothing.

        Args:
            folder: The folder to write; one that holds a plan is replaced.
            evaluation: Content of the results.json of `paro evaluate`, for the card.

        Raises:
            FileExistsError: If the folder exists and holds something other than a plan.
            PermissionError: If the folder cannot be written.
        """
        with writing_folder(folder, FOLDER) as target:
            self.write(target, evaluation=evaluation)
        return Path(folder)

    def write(self, folder: Path, *, evaluation: Mapping[str, Any] | None = None) -> None:
        """Write the plan into a folder that exists and is still private."""
        from .card import model_card
        from .folder import write_component

        for name, plan in self.items():
            (folder / name).mkdir()
            write_component(plan, folder / name, list(self))
        (folder / CARD).write_text(model_card(self, evaluation), encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, *, revision: str | None = None, token: str | None = None
    ) -> "Plan":
        """Read a plan from a folder, or from the Hugging Face Hub by id ("owner/name").

        Only JSON and safetensors are read, and only after their checksums agree.

        Args:
            source: A folder, or the id of a repository.
            revision: Branch, tag or commit of the repository.
            token: Of the Hub, for a private repository; the one stored by `hf auth login` by default.

        Raises:
            PlanError: If there is no plan, or one that is damaged, incomplete or of a newer format.
        """
        from .folder import DAMAGED, download, read_component

        folder = Path(source)
        if folder.is_dir() and revision is not None:
            raise PlanError(
                f"a revision is for plans on the Hub; got {revision!r} with the folder {source}. Leave it out."
            )
        if not folder.is_dir():
            folder = download(str(source), revision, token)
        found = [name for name in COMPONENTS if (folder / name / "plan.json").is_file()]
        if not found:
            alone = (folder / "plan.json").is_file()
            remedy = f"It is one part of a plan: name {folder.parent}." if alone else "Check the path."
            raise PlanError(f"{source} holds no plan: expected {COMPONENTS[0]}/plan.json in it. {remedy}")
        read = {name: read_component(folder / name) for name in found}
        for name, (_, together) in read.items():
            if sorted(together) != sorted(found):
                raise PlanError(
                    f"{folder / name} belongs to a plan of {', '.join(together)}; the folder has {', '.join(found)}. "
                    f"{DAMAGED}"
                )
        return cls({name: plan for name, (plan, _) in read.items()})

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        evaluation: Mapping[str, Any] | None = None,
    ) -> str:
        """Upload the plan with its model card to the Hugging Face Hub, in place of one that was there.

        Args:
            repo_id: "owner/name"; made if it does not exist.
            private: Whether a new repository is private.
            token: Of the Hub; the one stored by `hf auth login` by default.
            revision: Branch to commit to; main by default.
            evaluation: Content of the results.json of `paro evaluate`, for the card.

        Returns:
            The URL of the commit.

        Raises:
            PlanError: If `repo_id` is not the id of a repository.
        """
        from huggingface_hub import HfApi

        from .folder import files_of

        if not HUB_ID.fullmatch(repo_id):
            raise PlanError(f'a plan is pushed to a repository "owner/name"; got {repo_id!r}')
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.save_pretrained(Path(scratch) / "plan", evaluation=evaluation)
            return api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message="Upload attention plan", revision=revision,
                delete_patterns=files_of(COMPONENTS),
            ).commit_url  # fmt: skip


def _meant_for(component: str, plan: TransformerPlan) -> TransformerPlan:
    """The plan that knows its component; the masks, which are large, were checked before."""
    if plan.component is None:
        plan = copy.copy(plan)
        object.__setattr__(plan, "component", component)
    return plan


def _as_json(value: Any) -> Any:
    """The value as JSON keeps it: tuples are lists, and what JSON does not know is its name."""
    return json.loads(json.dumps(value, default=str))


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, str]:
    """The settings that differ, as each side has them."""
    names = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]

    def written(side: Mapping[str, Any]) -> str:
        return ", ".join(f"{name}={side[name]!r}" if name in side else f"{name} at its default" for name in names)

    return written(ours), written(theirs)
