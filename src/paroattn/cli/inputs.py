"""What the commands read from their words: the pipeline, its plan, prompts, and the arguments of its call."""

import argparse
from pathlib import Path
from typing import Any

LOADED = ("pipeline", "vae_dtype", "vae_tiling", "without", "load")
"""What says how a diffusers pipeline is loaded; the bundled model is not one."""
CALL_ARGUMENTS = ("height", "width", "num_frames", "guidance_scale", "negative_prompt")


def pipeline_of(args: argparse.Namespace) -> Any:
    """The bundled pipeline for "demo", or a diffusers pipeline by folder or hub id."""
    from ..integration.pipelines import device_named, dtype_of, load_pipeline, place, read_arguments

    device = device_named(args.device)
    if args.model == "demo":
        from ..demo.pipeline import load_demo

        _check_nothing_else_is_loaded(args)
        return place(load_demo(dtype=dtype_of(args.dtype or "fp32", device)), device, args.offload)
    settings = {"device": device, "dtype": args.dtype, "vae_dtype": args.vae_dtype, "pipeline": args.pipeline}
    load = dict.fromkeys(args.without) | read_arguments(args.load)
    return load_pipeline(args.model, **settings, offload=args.offload, vae_tiling=args.vae_tiling, **load)


def _check_nothing_else_is_loaded(args: argparse.Namespace) -> None:
    given = [f"--{name.replace('_', '-')}" for name in LOADED if getattr(args, name)]
    if given:
        raise ValueError(f"demo comes whole and takes no {given[0]}. Leave it out, or name another model.")


def device_of(pipe: Any) -> Any:
    """Where the pipeline computes, which is not where its weights wait if they are offloaded."""
    return getattr(pipe, "_execution_device", pipe.device)


def plan_of(args: argparse.Namespace) -> Path:
    """The plan asked for; the bundled model has one of its own."""
    if args.plan is not None:
        return args.plan
    if args.model == "demo":
        from ..demo.pipeline import PLAN

        return PLAN
    raise ValueError("--plan is needed, or --dense for dense attention. Make one with paro calibrate.")


def prompts_of(args: argparse.Namespace) -> list[str]:
    """All prompts asked for: those of the file, those given as words, and those given as embeddings."""
    from ..integration.pipelines import read_embeddings, read_prompts

    prompts = [*(read_prompts(args.prompts) if args.prompts else []), *args.prompt]
    prompts += map(read_embeddings, args.prompt_embeds)
    if not prompts:
        raise ValueError("at least one prompt is needed; give --prompts FILE, --prompt TEXT or --prompt-embeds FILE")
    return _understood(args, prompts)


def prompt_of(args: argparse.Namespace) -> str:
    """The one prompt asked for, as words or as embeddings."""
    from ..integration.pipelines import read_embeddings

    given = [*([args.prompt] if args.prompt else []), *map(read_embeddings, args.prompt_embeds)]
    if len(given) != 1:
        raise ValueError(f"one prompt is needed, as --prompt TEXT or --prompt-embeds FILE; got {len(given)}")
    return _understood(args, given)[0]


def _understood(args: argparse.Namespace, prompts: list[str]) -> list[str]:
    """The prompts, all of which the bundled model knows; other models take any words."""
    if args.model == "demo":
        from ..demo.prompt import words_of

        for prompt in prompts:
            words_of(prompt)
    return prompts


def call_of(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline's call; pictures are read here, before any work."""
    from ..integration.pipelines import read_arguments, read_file

    call = {name: value for name in CALL_ARGUMENTS if (value := getattr(args, name)) is not None}
    pictures = [read_file(path) for path in args.image]
    call |= {"image": pictures if len(pictures) > 1 else pictures[0]} if pictures else {}
    return call | read_arguments(args.set)
