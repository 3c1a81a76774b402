"""`paro doctor`: is this machine fit, does every kernel agree with the reference here, and what will it bring."""

import argparse
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Table

from .. import __version__
from .terminal import console, say, stages

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "numpy")
TIMED_MODEL = "cogvideox-5b"
"""Timed on a GPU where no model is named."""
LOWEST_CAPABILITY = (8, 0)
LOWEST = {"torch": (2, 8), "triton": (3, 4), "diffusers": (0, 38)}
DRIVER = Path("/proc/driver/nvidia/version")


def examine(args: argparse.Namespace) -> dict[str, Any]:
    """Check this machine: what is installed, whether every kernel agrees with the reference, and how fast it is."""
    import torch

    from ..integration.pipelines import device_named
    from ..plan.workloads import workload

    if args.model == "list":
        return _list_models()
    model = workload(args.model) if args.model else None
    size = args.size or (next(iter(model.sizes)) if model else None)
    if model is not None:
        model.layout(str(size))
    elif size is not None:
        raise ValueError("--size needs --model, such as --model wan-14b --size 720p")
    if not 0 < args.density <= 1:
        raise ValueError(f"density must be above 0 and at most 1; got {args.density}")
    device = torch.device(device_named(args.device))
    machine = describe_machine(device)
    for name, value in machine.items():
        say(f"{name:16} {value}")
    problems = list(find_problems(device, asked=args.device is not None))
    result: dict[str, Any] = {"machine": machine, "checks": [], "skipped": [], "forecast": None}
    if not args.no_kernels and not problems:
        checks, skipped = _check_kernels(device)
        result |= {"checks": [_plain(vars(check)) for check in checks], "skipped": skipped}
        problems += [f"{check.what}: {check.problem}. {_KERNEL_REMEDY}" for check in checks if check.problem]
    if not problems and (model is not None or (device.type == "cuda" and not args.no_kernels)):
        result["forecast"] = _forecast(args, device, args.model or TIMED_MODEL)
    _conclude(problems, device)
    return result | {"problems": problems}


_KERNEL_REMEDY = (
    "Do not rely on this configuration here: report it with the output of paro doctor --json, and use impl='reference' "
    "or another precision meanwhile"
)


def describe_machine(device: Any) -> dict[str, str]:
    """Hardware, driver and versions, in words."""
    import torch

    found = {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "processor": f"{_processor()}, {torch.get_num_threads()} threads",
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found["GPU"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, capability {about.major}.{about.minor}"
    else:
        found["GPU"] = "none that PyTorch sees"
    found["driver"] = _driver() or "no NVIDIA driver"
    found["CUDA of PyTorch"] = torch.version.cuda or "none, this build is for CPUs"
    if device.type == "cuda":
        found["in CUDA C++"] = _in_cuda(device)
    found |= {package: installed(package) or "not installed" for package in PACKAGES}
    return found | {"paroattn": __version__}


def _in_cuda(device: Any) -> str:
    try:
        from ..kernels.selfcheck import in_cuda_here
    except ImportError as error:  # without Triton, which `find_problems` names
        return f"nothing, {error}"
    return in_cuda_here(device)


def find_problems(device: Any, asked: bool = False) -> Iterator[str]:
    """What is wrong with this machine: the rule, what was found and the remedy.

    Args:
        device: Where models would run.
        asked: The device was named, so that a GPU beside it does not matter.
    """
    for look in (_outdated, _blind, _old_gpu, _interpreting, _without_compiler, _without_cache, _dispatcher):
        found = look(device, asked)
        if found is not None:
            yield found


def installed(package: str) -> str | None:
    """Version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _outdated(device: Any, asked: bool) -> str | None:
    for package, lowest in LOWEST.items():
        found, wanted = installed(package), ".".join(map(str, lowest))
        if found is None and (package != "triton" or device.type == "cuda"):
            return f"{package} {wanted} or newer is needed; it is not installed. Run: pip install '{package}>={wanted}'"
        if found is not None and _numbers(found) < lowest:
            return f"{package} {wanted} or newer is needed; got {found}. Run: pip install -U '{package}>={wanted}'"
    return None


def _blind(device: Any, asked: bool) -> str | None:
    """A GPU that PyTorch does not use."""
    import torch

    if asked or device.type == "cuda" or not _driver():
        return None
    if torch.version.cuda is None:
        return (
            f"there is an NVIDIA driver ({_driver()}), but PyTorch {torch.__version__} is built for CPUs. Install a "
            "CUDA build, see https://pytorch.org/get-started/locally, or say --device cpu"
        )
    return (
        f"there is an NVIDIA driver ({_driver()}), but PyTorch {torch.__version__}, built for CUDA "
        f"{torch.version.cuda}, sees no GPU. Update the driver, install a build for an older CUDA, look at "
        "CUDA_VISIBLE_DEVICES, or say --device cpu"
    )


def _old_gpu(device: Any, asked: bool) -> str | None:
    import torch

    if device.type != "cuda" or (has := torch.cuda.get_device_capability(device)) >= LOWEST_CAPABILITY:
        return None
    return (
        f"the kernels need a GPU of compute capability 8.0 or newer (Ampere); got {has[0]}.{has[1]} "
        f"({torch.cuda.get_device_name(device)}). Run on another GPU; here only the slow reference works"
    )


def _interpreting(device: Any, asked: bool) -> str | None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return None
    if device.type == "cuda":
        return "TRITON_INTERPRET=1 makes kernels run in Python, a thousand times slower. Unset it"
    numpy, triton = installed("numpy"), installed("triton")
    if triton and numpy and _numbers(numpy) >= (2, 4) and _numbers(triton) < (3, 7):
        return f"Triton {triton}'s interpreter needs NumPy before 2.4; got {numpy}. Run: pip install 'numpy<2.4'"
    return None


def _without_compiler(device: Any, asked: bool) -> str | None:
    if device.type != "cuda":
        return None
    from ..kernels.toolchain import missing

    return missing()


def _without_cache(device: Any, asked: bool) -> str | None:
    """A folder for compiled kernels that cannot be written."""
    if device.type != "cuda":
        return None
    from triton import knobs

    folder = Path(knobs.cache.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return (
            f"Triton keeps compiled kernels in {folder}, which cannot be written ({error.strerror}). Set "
            "TRITON_CACHE_DIR to a folder that can"
        )


def _dispatcher(device: Any, asked: bool) -> str | None:
    from ..integration.backend import paro_backend

    try:
        paro_backend()
    except RuntimeError as error:
        return str(error)
    return None


def _check_kernels(device: Any) -> tuple[list[Any], list[str]]:
    from ..kernels.selfcheck import check_kernels, configurations, skipped

    expected, checks = len(configurations(device)) + (5 if device.type == "cuda" else 1), []
    with stages() as stage:
        for check in check_kernels(device):
            checks.append(check)
            stage("checking kernels", min(1.0, len(checks) / expected))
    say("\nevery kernel against the reference: norm of the difference over the norm of what is right")
    say(f"{'':52} float64   (reference)  reference  allowed      s")
    for check in checks:
        say(_line(check))
    left_out = skipped(device)
    for each in left_out:
        say(f"not checked: {each}")
    return checks, left_out


def _line(check: Any) -> str:
    errors = (check.error, check.reference_error, check.difference, check.allowed)
    numbers = [f"{'–' if error is None else f'{error:.1e}':>9}" for error in errors]
    verdict = f"  WRONG: {check.problem}" if check.problem else ""
    return f"{check.what:50} {'  '.join(numbers)} {check.seconds:6.1f}{verdict}"


def _forecast(args: argparse.Namespace, device: Any, name: str) -> dict[str, Any]:
    """Time one layer of a model on a GPU; on a CPU say what can be said without."""
    import torch

    from ..block_mask import parse_block
    from ..evaluation.forecast import forecast
    from ..plan.workloads import workload

    model, block = workload(name), parse_block(args.block)
    size = args.size or next(iter(model.sizes))
    layout, (inside, around) = model.layout(size), model.flops(size)
    about = {
        "model": name, "size": size, "grid": str(layout.grid), "tokens": layout.tokens, "layers": model.layers,
        "attention_share_of_flops": inside / (inside + around), "measured": None,
    }  # fmt: skip
    say(
        f"{name} at {size}: grid {layout.grid}, {layout.tokens} tokens, {model.layers} layers; self-attention is "
        f"{about['attention_share_of_flops']:.0%} of the FLOPs"
    )
    if device.type != "cuda":
        say("no speed-up predicted: it is measured, and there is no GPU to measure on")
        return about
    eight_bits = ("int8/fp8",) if torch.cuda.get_device_capability(device) >= (8, 9) else ()
    try:
        measured = forecast(model, size, args.density, (*eight_bits, "int8", "bf16"), block=block, device=device)
    except torch.OutOfMemoryError as error:
        say(f"not timed, the sequence does not fit on this GPU: {error}")
        return about
    _say_forecast(measured, args.block)
    return about | {"measured": measured.to_dict()}


def _say_forecast(measured: Any, block: str) -> None:
    """The forward of a model as a table, dense and by block masks."""
    dense = ", ".join(f"{measured.forward_ms(None, mode):.0f} ms {mode}" for mode in measured.around_ms)
    shares = ", ".join(f"{measured.attention_share(mode):.0%}" for mode in measured.around_ms)
    say(
        f"one forward, batch {measured.model.batch}, dense: {dense}; of that self-attention {shares}. "
        f"Blocks of {block}, executed density {measured.density:.3f}:"
    )
    table = Table()
    heads = ("precision", "attention, ms a layer", "faster", *(f"forward, {mode}" for mode in measured.around_ms))
    for column in heads:
        table.add_column(column, justify="left" if column == "precision" else "right")
    for name, ms in measured.sparse_ms.items():
        whole = [
            f"{measured.forward_ms(name, mode):.0f} ms, {measured.speed_up(name, mode):.2f}×"
            for mode in measured.around_ms
        ]
        table.add_row(name, f"{ms:.2f}", f"{measured.dense_ms / ms:.2f}×", *whole)
    console().print(table)
    say(
        f"Attention was timed here; what is around it comes from rates of {measured.gpu}. Text encoder and VAE come on "
        "top and stay as they are. Quality depends on the plan: measure with paro evaluate."
    )


def _conclude(problems: list[str], device: Any) -> None:
    for problem in problems:
        say(f"problem: {problem}")
    if not problems:
        missing = "" if device.type == "cuda" else " for the CPU path; large models need a GPU"
        say(f"nothing is wrong: this machine is fit{missing}")


def _list_models() -> dict[str, Any]:
    from ..plan.workloads import WORKLOADS

    models: dict[str, Any] = {}
    table = Table()
    for column in ("model", "size", "grid", "tokens", "attention, of FLOPs"):
        table.add_column(column, justify="left" if column in ("model", "size") else "right")
    for name, model in WORKLOADS.items():
        for size in model.sizes:
            layout, (inside, around) = model.layout(size), model.flops(size)
            share = inside / (inside + around)
            table.add_row(name, size, str(layout.grid), str(layout.tokens), f"{share:.0%}")
            models.setdefault(name, {})[size] = {"grid": str(layout.grid), "tokens": layout.tokens, "share": share}
    console().print(table)
    return {"models": models}


def _driver() -> str | None:
    """Version of the NVIDIA driver, "present" if only its tool is there, or None."""
    if DRIVER.exists():
        words = DRIVER.read_text().split("Module", 1)[-1].split()
        return next((word for word in words if word[0].isdigit() and "." in word), "present")
    return "present" if shutil.which("nvidia-smi") else None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")


def _numbers(found: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) for part in found.split(".")[:2])


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers for JSON; what is not finite is null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
