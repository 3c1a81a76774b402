"""Splits the sequence of a model over processes, by diffusers' `enable_parallelism`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .apply import targets_of
from .hook import hook_of
from .models import matches, self_attentions

TOKENS, PLACES = ContextParallelInput(1, expected_dims=3), ContextParallelInput(0, expected_dims=2)
WHOLE = ContextParallelOutput(1, expected_dims=3)
STREAMS = {"transformer_blocks.0": {"hidden_states": TOKENS, "encoder_hidden_states": TOKENS}, "proj_out": WHOLE}


@dataclass(frozen=True)
class Split:
    """How to split a model, where diffusers cannot or does it wrong.

    Attributes:
        plan: As diffusers' `_cp_plan`.
        beside: Patterns of attentions that need the exchange beside the planned ones: their keys are split too. All
            others see whole sequences, or whole keys.
    """

    plan: Mapping[str, Any]
    beside: tuple[str, ...] = ()


def _cogvideox(transformer: Any) -> Split:
    return Split({**STREAMS, "transformer_blocks.*": {"image_rotary_emb": [PLACES, PLACES]}})


def _hunyuanvideo(transformer: Any) -> Split:
    if transformer.config.image_condition_type == "token_replace":
        raise ValueError("a HunyuanVideo that replaces the first frame's tokens counts them in the whole sequence")
    return Split({**STREAMS, "rope": _made(PLACES)})


def _ltx(transformer: Any) -> Split:
    """Text stays whole: diffusers splits it with its mask, and then gives masks of all heads to some heads."""
    return Split({"": {"hidden_states": TOKENS}, "rope": _made(TOKENS), "proj_out": WHOLE})


def _ltx2(transformer: Any) -> Split:
    """Sound stays whole; looking at the video, it needs the video's places split too, which diffusers forgets."""
    by_head = transformer.config.rope_type == "split"
    places = _made(ContextParallelInput(2, expected_dims=4) if by_head else TOKENS)
    plan = {"": {"hidden_states": TOKENS}, "rope": places, "cross_attn_rope": places, "proj_out": WHOLE}
    return Split(plan, ("transformer_blocks.*.video_to_audio_attn",))


def _made(places: ContextParallelInput) -> dict[int, ContextParallelInput]:
    """Cosines and sines that a module returns."""
    return dict.fromkeys((0, 1), replace(places, split_output=True))


SPLITS: Mapping[str, Callable[[Any], Split]] = {
    "CogVideoXTransformer3DModel": _cogvideox,
    "HunyuanVideoTransformer3DModel": _hunyuanvideo,
    "LTX2VideoTransformer3DModel": _ltx2,
    "LTXVideoTransformer3DModel": _ltx,
}


def split_sequence(target: Any, ranks: int | None = None) -> None:
    """Split the sequences of a model over several processes, each of which calls this.

    A plan may be applied before or after. Models that diffusers cannot split by itself need it before, since their own
    attention does not know that it has a part of the sequence only.

    Args:
        target: A diffusers pipeline or one transformer.
        ranks: How many processes share a sequence, neighbours by rank; all by default. One is no split.

    Raises:
        ValueError: If there is no process group, or the model cannot be split, is split already, or has no plan but
            needs one.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "a sequence is split over the processes of a group; there is none. Start with torchrun and call "
            "torch.distributed.init_process_group."
        )
    processes = dist.get_world_size()
    ranks = processes if ranks is None else ranks
    if ranks < 1 or processes % ranks:
        raise ValueError(f"the ranks that share a sequence must divide the {processes} processes; got {ranks}")
    transformers = targets_of(target)[0].values()
    splits = [_split_of(transformer) for transformer in transformers]
    if ranks > 1:
        mesh = _mesh(processes // ranks, ranks)
        for transformer, split in zip(transformers, splits, strict=True):
            config = ContextParallelConfig(ulysses_degree=ranks, ulysses_anything=True, mesh=mesh)
            _enable(transformer, config, split)


def _split_of(transformer: Any) -> Split | None:
    """How to split a model; None: as diffusers does."""
    name, known = type(transformer).__name__, getattr(transformer, "_cp_plan", None) is not None
    if getattr(transformer, "_parallel_config", None) is not None:
        raise ValueError("a model is split once; this one is split already. Load it again to split it otherwise.")
    if name not in SPLITS and not known:
        raise ValueError(
            f"diffusers must know how to split a {name}; this one does not. Give its enable_parallelism a cp_plan."
        )
    if not known and hook_of(transformer) is None:
        raise ValueError(f"a {name} must have a plan before it is split. Call paroattn.apply first.")
    return SPLITS[name](transformer) if name in SPLITS else None


def _mesh(groups: int, ranks: int) -> DeviceMesh:
    """All processes, as diffusers wants them named, in groups that work on their own."""
    accelerator = torch.accelerator.current_accelerator()
    kind = "cpu" if accelerator is None else accelerator.type
    return init_device_mesh(kind, (groups, 1, ranks), mesh_dim_names=("groups", "ring", "ulysses"))


def _enable(transformer: Any, config: ContextParallelConfig, split: Split | None) -> None:
    if split is None:
        transformer.enable_parallelism(config=config)
        return
    transformer.enable_parallelism(config=config, cp_plan=split.plan)
    planned = {id(module) for module in self_attentions(transformer).values()}
    for name, module in transformer.named_modules():
        exchanges = id(module) in planned or matches(name, split.beside)
        if not exchanges and hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = None
