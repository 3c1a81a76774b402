"""Loads a diffusers pipeline by folder or hub id, and reads what its call takes from files and command lines."""

import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ..files import existing_file, read_words
from .generate import EMBEDDINGS, Prompt

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def load_pipeline(
    model: str,
    *,
    pipeline: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    vae_dtype: str | None = None,
    offload: str = "none",
    vae_tiling: bool = False,
    **load: Any,
) -> Any:
    """Load a diffusers pipeline, ready to use and without progress bars.

    Args:
        model: Folder or hub id.
        pipeline: Class in diffusers; the one that the model names by default.
        device: Where it runs; the GPU if there is one.
        dtype: "bf16", "fp16" or "fp32"; bf16 on a GPU and fp32 on a CPU by default.
        vae_dtype: The same for the VAE alone; that of all others by default.
        offload: As in `place`.
        vae_tiling: Decode in tiles, which takes less memory.
        load: Passed on to `from_pretrained`, such as revision, variant, or None for a component that is not needed.

    Raises:
        ValueError: If there is no such pipeline, it does not load here, or a setting is unknown.
        RuntimeError: If there is nothing to offload from.
    """
    import diffusers

    _check_offload(offload)
    kind_of_pipeline: Any = getattr(diffusers, pipeline or "DiffusionPipeline", None)
    if not hasattr(kind_of_pipeline, "from_pretrained"):
        raise ValueError(f"pipeline must be a class in diffusers, such as WanVideoToVideoPipeline; got {pipeline!r}")
    device = device_named(device)
    kind = dtype_of(dtype, device)
    kinds = kind if vae_dtype is None else {"default": kind, "vae": dtype_of(vae_dtype, device)}
    try:
        with warnings.catch_warnings():  # a newer name for it is not known to older versions
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            pipe = kind_of_pipeline.from_pretrained(model, torch_dtype=kinds, **load)
    except (OSError, ValueError, ImportError, AttributeError, TypeError) as error:
        why = str(error).strip().rstrip(".")
        raise ValueError(
            f"{model!r} is neither demo, nor a diffusers model folder or hub id that loads here: {why}. Check the "
            'name; most pipelines need `pip install "paroattn[models]"`.'
        ) from error
    pipe.set_progress_bar_config(disable=True)
    if vae_tiling:
        if not hasattr(getattr(pipe, "vae", None), "enable_tiling"):
            raise ValueError(f"the VAE of {type(pipe).__name__} cannot decode in tiles. Leave out --vae-tiling.")
        pipe.vae.enable_tiling()
    return place(pipe, device, offload)


def place(pipe: Any, device: str, offload: str = "none") -> Any:
    """Put a pipeline on a device: whole, or with what is not running kept on the CPU.

    Args:
        pipe: The pipeline.
        device: Where it runs.
        offload: "none"; "model", which moves one component at a time; "group", which moves layer by layer and needs
            the least memory.

    Raises:
        ValueError: If `offload` is unknown.
        RuntimeError: If there is nothing to offload from.
    """
    _check_offload(offload)
    if offload != "none" and torch.device(device).type == "cpu":
        raise RuntimeError(f"offload {offload} needs a GPU to run on; got device {device}. Leave out --offload.")
    OFFLOADS[offload](pipe, device)
    return pipe


def _group(pipe: Any, device: str) -> None:
    pipe.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level")


OFFLOADS: dict[str, Callable[[Any, str], Any]] = {
    "none": lambda pipe, device: pipe.to(device),
    "model": lambda pipe, device: pipe.enable_model_cpu_offload(device=device),
    "group": _group,
}


def device_named(name: str | None) -> str:
    """A device by name, if it is there; the GPU if there is one by default.

    Raises:
        ValueError: If there is no such device.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return "cuda" if there else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda or one of several such as cuda:1; got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= there:
        seen = f"{there} of them" if there else "none; paro doctor says why"
        raise ValueError(
            f"device {name} needs a GPU that PyTorch sees; got {seen}. Leave out --device, or name another."
        )
    return name


def dtype_of(name: str | None, device: str) -> torch.dtype:
    """A dtype by name; bf16 on a GPU and fp32 on a CPU by default.

    Raises:
        ValueError: If the name is unknown.
    """
    name = name or ("bf16" if torch.device(device).type == "cuda" else "fp32")
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {name!r}")
    return DTYPES[name]


def read_prompts(path: str | Path) -> list[str]:
    """Read prompts from a file.

    Args:
        path: Text, one prompt a line, empty lines and lines that begin with # left out; or .jsonl, one object a line
            with "prompt" and any other argument of the pipeline's call, "@FILE" standing for a picture beside it.

    Raises:
        ValueError: If there is none, or a line is something else.
        OSError: If the file cannot be read.
    """
    path = Path(path)
    lines = [line.strip() for line in read_words(path, "a list of prompts").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ValueError(f"{path} must hold at least one prompt, one a line; got none")
    return [_described(line, path) for line in lines] if path.suffix == ".jsonl" else lines


def read_embeddings(path: str | Path) -> Prompt:
    """Read a prompt as embeddings: a .safetensors file with tensors named as arguments of the pipeline's call.

    Its metadata may hold the words under "prompt"; else the file's name stands for them.

    Raises:
        ValueError: If the file is something else or has no prompt_embeds.
        OSError: If the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = existing_file(path, "a prompt as embeddings")
    try:
        with safe_open(path, framework="pt") as file:
            words, tensors = (
                (file.metadata() or {}).get("prompt"),
                {name: file.get_tensor(name) for name in file.keys()},
            )
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    if EMBEDDINGS not in tensors:
        found = ", ".join(tensors) or "none"
        raise ValueError(f"{path} must hold a tensor {EMBEDDINGS}, and may hold others by name; got {found}")
    return Prompt(words or path.stem, **tensors)


def read_arguments(pairs: Iterable[str]) -> dict[str, Any]:
    """Read "name=value" pairs; values as in `read_value`.

    Raises:
        ValueError: If a pair has another form.
        OSError: If a file cannot be read.
    """
    arguments = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"an argument is written name=value, such as max_sequence_length=256; got {pair!r}")
        arguments[name] = read_value(value)
    return arguments


def read_value(text: str) -> Any:
    """Read a value: JSON if it is (numbers, true, null, lists), @FILE for a picture or JSON in a file, else the text.

    Raises:
        ValueError: If the file is of another kind.
        OSError: If the file cannot be read.
    """
    if text.startswith("@"):
        return read_file(text[1:])
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_file(path: str | Path) -> Any:
    """Read a picture, or JSON.

    Raises:
        ValueError: If the file is of another kind.
        OSError: If the file cannot be read.
    """
    path = Path(path)
    if path.suffix.lower() in PICTURES:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(existing_file(path, "a picture")) as picture:
                return picture.convert("RGB")
        except UnidentifiedImageError as error:
            raise ValueError(f"a picture must be one that Pillow reads; got {str(path)!r}, which is none") from error
    if path.suffix.lower() == ".json":
        try:
            return json.loads(read_words(path, "a value in JSON"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    raise ValueError(f"a file must be a picture ({', '.join(PICTURES)}) or .json; got {path.name!r}")


def _described(line: str, path: Path) -> Prompt:
    try:
        described = json.loads(line)
        words = described.pop("prompt")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f'{path}: a line is {{"prompt": "…", …}}; got {line[:80]!r}') from error
    return Prompt(words, **{name: _resolved(value, path.parent) for name, value in described.items()})


def _resolved(value: Any, folder: Path) -> Any:
    return read_file(folder / value[1:]) if isinstance(value, str) and value.startswith("@") else value


def _check_offload(offload: str) -> None:
    if offload not in OFFLOADS:
        raise ValueError(f"offload must be one of {', '.join(OFFLOADS)}; got {offload!r}")
