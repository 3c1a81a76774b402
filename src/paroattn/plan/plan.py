"""The plan: order, block mask and precision of every head, with the model and grid they belong to.

A plan is a folder with one sub-folder per transformer of the pipeline, `PLAN/transformer/plan.json` and
`plan.safetensors` (`transformer_2/` for a second expert). Only JSON and safetensors are ever read.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from ..block_mask import BlockMask, blocks_of, parse_block
from ..files import read_json, writing_folder
from ..grid import Grid, TextSpan, check_order
from ..phases import Phase, phase_at
from ..precision import Precision

FORMAT_VERSION = 1
COMPONENTS = ("transformer", "transformer_2")
STATISTICS = "statistics"
FOLDER = (*COMPONENTS, STATISTICS)


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

    def __post_init__(self):
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
        for name, layer in self.layers.items():
            mask = layer.mask
            found = (*mask.bits.shape[:-1], mask.key_blocks)
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

    def phase_at(self, noise_level: float) -> int:
        """Index of the phase that a noise level belongs to."""
        return phase_at(self.phases, noise_level)

    def check_fits(self, model_class: str, layers: Mapping[str, tuple[int, int]]) -> None:
        """Check that the plan was made for this model.

        Args:
            model_class: Class name of the transformer.
            layers: (heads, head dimension) of each self-attention by module path.

        Raises:
            PlanError: Naming what differs, both sides and the remedy.
        """
        remedy = "Make a plan for this model with paroattn.calibrate or `paro calibrate`."
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


class Plan(Mapping[str, TransformerPlan]):
    """The plans of a pipeline's transformers, by component name ("transformer", "transformer_2")."""

    def __init__(self, components: Mapping[str, TransformerPlan]):
        if not components or set(components) - set(COMPONENTS):
            raise PlanError(f"a plan needs components among {', '.join(COMPONENTS)}; got {sorted(components)}")
        self._components = dict(components)

    def __getitem__(self, name: str) -> TransformerPlan:
        return self._components[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._components)

    def __len__(self) -> int:
        return len(self._components)

    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Write the plan as a folder, all of it or nothing.

        Raises:
            FileExistsError: If the folder exists and holds something other than a plan.
            PermissionError: If the folder cannot be written.
        """
        with writing_folder(folder, FOLDER) as target:
            self.write(target)
        return Path(folder)

    def write(self, folder: Path) -> None:
        """Write the plan into a folder that exists and is still private."""
        for name, plan in self.items():
            (folder / name).mkdir()
            _write_component(plan, folder / name)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, *, revision: str | None = None) -> "Plan":
        """Read a plan from a folder, or from the Hugging Face Hub by id ("owner/name").

        Raises:
            PlanError: If the folder holds no plan, or one that is damaged, incomplete or of a newer format.
        """
        folder = Path(source)
        if not folder.is_dir():
            folder = _download(str(source), revision)
        found = [name for name in COMPONENTS if (folder / name / "plan.json").is_file()]
        if not found:
            raise PlanError(f"{source} holds no plan: expected {COMPONENTS[0]}/plan.json in it")
        return cls({name: _read_component(folder / name) for name in found})

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the plan to the Hugging Face Hub; returns the URL of the commit."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.save_pretrained(Path(scratch) / "plan")
            return api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message="Upload attention plan"
            ).commit_url


def _write_component(plan: TransformerPlan, folder: Path) -> None:
    from .. import __version__

    blob = save_tensors({f"{name}.mask": layer.mask.bits.cpu().contiguous() for name, layer in plan.layers.items()})
    (folder / "plan.safetensors").write_bytes(blob)
    described = {
        "format_version": FORMAT_VERSION,
        "paroattn_version": __version__,
        "model_class": plan.model_class,
        "heads": plan.heads,
        "head_dim": plan.head_dim,
        "grid": list(plan.grid),
        "text": vars(plan.text),
        "block": "x".join(map(str, plan.block)),
        "phases": [vars(phase) for phase in plan.phases],
        "layers": {
            name: {"orders": list(layer.orders), "precision": [list(heads) for heads in layer.precision]}
            for name, layer in plan.layers.items()
        },
        "made": dict(plan.made),
        "tensors": {"file": "plan.safetensors", "sha256": hashlib.sha256(blob).hexdigest()},
    }
    (folder / "plan.json").write_text(json.dumps(described, indent=1) + "\n")


def _read_component(folder: Path) -> TransformerPlan:
    path = folder / "plan.json"
    try:
        described = read_json(path)
    except ValueError as error:
        raise PlanError(str(error)) from error
    version = described.get("format_version")
    if version != FORMAT_VERSION:
        raise PlanError(
            f"{path} has plan format {version}; this paroattn reads format {FORMAT_VERSION}. Update paroattn."
        )
    try:
        blob = (folder / "plan.safetensors").read_bytes()
        found, expected = hashlib.sha256(blob).hexdigest(), described["tensors"]["sha256"]
        if found != expected:
            raise PlanError(
                f"{folder / 'plan.safetensors'} has SHA-256 {found[:16]}…, "
                f"but plan.json expects {str(expected)[:16]}…: the file was cut short or changed. "
                "Fetch or make the plan again."
            )
        return _plan_from(described, load_tensors(blob))
    except PlanError as error:
        raise PlanError(f"{folder}: {error}") from error
    except FileNotFoundError as error:
        raise PlanError(f"{folder} has no plan.safetensors beside plan.json. Fetch or make the plan again.") from error
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise PlanError(f"{path} is damaged: {error!r}. Fetch or make the plan again.") from error


def _plan_from(described: dict, tensors: dict[str, torch.Tensor]) -> TransformerPlan:
    grid, block = Grid(*described["grid"]), parse_block(described["block"])
    if set(tensors) != {f"{name}.mask" for name in described["layers"]}:
        raise PlanError("plan.safetensors and plan.json list different layers")
    key_blocks = blocks_of(grid.tokens, block[1])
    return TransformerPlan(
        model_class=described["model_class"],
        heads=described["heads"],
        head_dim=described["head_dim"],
        grid=grid,
        text=TextSpan(**described["text"]),
        block=block,
        phases=tuple(Phase(**phase) for phase in described["phases"]),
        layers={
            name: LayerPlan(
                orders=tuple(layer["orders"]),
                mask=BlockMask(tensors[f"{name}.mask"], key_blocks, block),
                precision=tuple(tuple(heads) for heads in layer["precision"]),
            )
            for name, layer in described["layers"].items()
        },
        made=described["made"],
    )


def _download(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=["*/plan.json", "*/plan.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise PlanError(f"{source!r} is neither a folder nor a plan on the Hugging Face Hub: {error}") from error
