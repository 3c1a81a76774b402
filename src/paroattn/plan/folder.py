"""A plan on disk: one sub-folder for each transformer of the pipeline, or a repository on the Hub that holds the same.

`PLAN/transformer/plan.json` and `plan.safetensors` (`transformer_2/` for a second expert). Only JSON and safetensors
are ever read, and only after their checksums agree; masks of large plans stay packed until they are used.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from ..block_mask import BlockMask, blocks_of, parse_block
from ..files import read_json, sha256_of, shortened
from ..grid import Grid, TextSpan
from ..phases import Phase
from .packing import PACKED_FROM, PackedMask, pack
from .plan import COMPONENTS, HUB_ID, LayerPlan, PlanError, TransformerPlan

PLAIN, PACKED = 1, 2
FORMATS = {PLAIN: "masks as they are", PACKED: "masks packed"}
HEADER_BYTES = 2**20  # room for names and shapes of the tensors
DAMAGED = "Fetch or make the plan again."


def write_component(plan: TransformerPlan, folder: Path, together: list[str]) -> None:
    """Write the plan of one transformer into its folder, with the names of all that belong together."""
    from .. import __version__

    masks = {f"{name}.mask": layer.mask.bits.cpu().contiguous() for name, layer in plan.layers.items()}
    version = PACKED if sum(bits.numel() for bits in masks.values()) >= PACKED_FROM else PLAIN
    blob = save_tensors(pack(masks) if version == PACKED else masks)
    (folder / "plan.safetensors").write_bytes(blob)
    described = {
        "format_version": version,
        "paroattn_version": __version__,
        "component": plan.component,
        "components": together,
        "model_class": plan.model_class,
        "model": None if plan.config is None else {"config": dict(plan.config), "sha256": plan.config_sha256},
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
    described["sha256"] = sha256_of(described)
    text = json.dumps(described, indent=1, allow_nan=False)
    (folder / "plan.json").write_text(text + "\n", encoding="utf-8")


def read_component(folder: Path) -> tuple[TransformerPlan, list[str]]:
    """One transformer's plan, and the names of all components that were saved with it.

    Raises:
        PlanError: If it is damaged or of a newer format.
    """
    path = folder / "plan.json"
    try:
        described = read_json(path)
    except ValueError as error:
        raise PlanError(f"{error}. {DAMAGED}") from error
    version = described.get("format_version")
    if version is None:
        raise PlanError(f"{path} must be a plan of paroattn, which names its format; got none. Check the path.")
    if version not in FORMATS:
        raise PlanError(
            f"{path} has plan format {version}; this paroattn reads formats {', '.join(map(str, FORMATS))}. "
            "Update paroattn."
        )
    try:
        plan = _plan_from(described, load_tensors(_tensor_bytes(described, folder / "plan.safetensors")))
        if described["component"] != folder.name:
            raise PlanError(f"the plan is for {described['component']}; it lies in a folder {folder.name}. {DAMAGED}")
        _check_sums(described)
        return plan, list(described["components"])
    except PlanError as error:
        raise PlanError(f"{folder}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, SafetensorError) as error:
        raise PlanError(f"{path} is damaged: {error!r}. {DAMAGED}") from error


def _tensor_bytes(described: dict, path: Path) -> bytes:
    """The file of tensors, no larger than the description allows and with the SHA-256 that it names."""
    name, expected = described["tensors"].get("file", path.name), described["tensors"]["sha256"]
    if name != path.name:
        raise PlanError(f"the tensors must lie in {path.name} beside plan.json; got {name!r}. {DAMAGED}")
    if not path.is_file():
        raise PlanError(f"there is no {path.name} beside plan.json. {DAMAGED}")
    grid, block = Grid(*described["grid"]), parse_block(described["block"])
    rows = described["heads"] * len(described["phases"]) * blocks_of(grid.tokens, block[0])
    largest = HEADER_BYTES + len(described["layers"]) * rows * blocks_of(blocks_of(grid.tokens, block[1]), 8)
    if path.stat().st_size > largest:
        raise PlanError(f"{path.name} must have at most {largest} bytes; got {path.stat().st_size}. {DAMAGED}")
    blob = path.read_bytes()
    found = hashlib.sha256(blob).hexdigest()
    if found != expected:
        raise PlanError(
            f"{path.name} has SHA-256 {shortened(found)}, but plan.json expects {shortened(expected)}: "
            f"the file was cut short or changed. {DAMAGED}"
        )
    return blob


def _check_sums(described: dict) -> None:
    """Check the description's own SHA-256, after all that has a better message."""
    model = described["model"]
    if model is not None and model["sha256"] != sha256_of(model["config"]):
        raise PlanError(
            f"the model's configuration has SHA-256 {shortened(sha256_of(model['config']))}, but plan.json expects "
            f"{shortened(model['sha256'])}. {DAMAGED}"
        )
    found = sha256_of({name: value for name, value in described.items() if name != "sha256"})
    if found != described["sha256"]:
        raise PlanError(
            f"plan.json has SHA-256 {shortened(found)}, but says {shortened(described['sha256'])}: it was changed "
            f"after it was written. {DAMAGED}"
        )


def _plan_from(described: dict, tensors: dict[str, torch.Tensor]) -> TransformerPlan:
    grid, block = Grid(*described["grid"]), parse_block(described["block"])
    if set(tensors) != {f"{name}.mask" for name in described["layers"]}:
        raise PlanError("plan.safetensors and plan.json list different layers")
    shape = (len(described["phases"]), described["heads"], *(blocks_of(grid.tokens, size) for size in block))

    def mask(name: str) -> BlockMask:
        tensor = tensors[f"{name}.mask"]
        if described["format_version"] == PACKED:
            return PackedMask(name, tensor, shape, block)
        return BlockMask(tensor, shape[-1], block)

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
                mask=mask(name),
                precision=tuple(tuple(heads) for heads in layer["precision"]),
            )
            for name, layer in described["layers"].items()
        },
        made=described["made"],
        config=described["model"] and described["model"]["config"],
        component=described["component"],
    )


def files_of(components: Iterable[str]) -> list[str]:
    """The files that plans of these components are."""
    return [f"{name}/{file}" for name in components for file in ("plan.json", "plan.safetensors")]


def download(source: str, revision: str | None, token: str | None) -> Path:
    """Fetch a plan from the Hub; arguments as in `Plan.from_pretrained`.

    Raises:
        PlanError: If there is none.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    nowhere = f"{source!r} is neither a folder nor a plan on the Hugging Face Hub"
    if not HUB_ID.fullmatch(source):
        raise PlanError(f'{nowhere}, whose ids are "owner/name". Check the path.')
    try:
        return Path(snapshot_download(source, revision=revision, token=token, allow_patterns=files_of(COMPONENTS)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        where = f" at revision {revision!r}" if revision else ""
        raise PlanError(f"{nowhere}{where}: {error}") from error
