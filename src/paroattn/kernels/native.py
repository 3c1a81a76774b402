"""Kernels in CUDA C++, compiled where they run: NVRTC, a library that pip installs, makes machine code at first use.

Machine code is kept on disk under all that it depends on: sources, options, architecture and version of NVRTC. Loading
`cuda.core` and compiling need no GPU. Nothing here falls back to another kernel: what cannot be had is said.
"""

import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "cuda"
CACHE_VARIABLE = "PAROATTN_KERNEL_CACHE"
STANDARD = "c++17"
FREE_SHARED_BYTES = 48 * 1024
"""Shared memory that a kernel gets without asking."""


class Kernel:
    """A kernel on the GPUs of this process, loaded onto each when it first runs there."""

    def __init__(self, code: bytes, name: str):
        self.name = name
        with _said(f"the kernel {name} must load", f"Check the driver, or remove the kernels in {cache_folder()}."):
            self._kernel = _core().ObjectCode.from_cubin(code, name=name).get_kernel(name)
        self._shared_bytes: dict[int, int] = {}

    def launch(self, blocks: int, threads: int, shared_bytes: int, *arguments: Any) -> None:
        """Start the kernel on torch's current stream and device; a CUDA graph may capture it.

        Args:
            blocks: Thread blocks.
            threads: Threads of a block.
            shared_bytes: Dynamic shared memory of a block.
            arguments: In the kernel's order. A tensor is passed as its address and None as a null pointer, an int as
                32 bits, a float as float32, and anything else as `cuda.core` takes it.
        """
        with _said(f"the kernel {self.name} must start", "paro doctor checks this machine."):
            self._allow(shared_bytes)
            config = _core().LaunchConfig(grid=blocks, block=threads, shmem_size=shared_bytes)
            _core().launch(_CurrentStream(), config, self._kernel, *map(_as_argument, arguments))

    def _allow(self, shared_bytes: int) -> None:
        """Ask for more shared memory than comes by itself, once for each device."""
        device = torch.cuda.current_device()
        if shared_bytes <= self._shared_bytes.get(device, FREE_SHARED_BYTES):
            return
        driver = import_module("cuda.bindings.driver")
        wanted = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        status, *_ = driver.cuKernelSetAttribute(wanted, shared_bytes, self._kernel.handle, driver.CUdevice(device))
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(
                f"a block of {self.name} needs {shared_bytes} bytes of shared memory on GPU {device}; got {status.name}"
            )
        self._shared_bytes[device] = shared_bytes


@cache
def kernel(file: str, name: str, arch: str, **macros: int | str) -> Kernel:
    """A kernel of this package, compiled unless it is known; the same object at every call.

    Args:
        file: Source, in `SOURCES`.
        name: The kernel, an `extern "C"` function of it.
        arch: As `architecture` gives it.
        macros: What the source leaves open.

    Raises:
        RuntimeError: If `cuda.core` or NVRTC is missing, or the kernel does not compile or load.
    """
    return Kernel(machine_code(file, arch, **macros), name)


def architecture(capability: tuple[int, int]) -> str:
    """What to compile for, such as "sm_89"; from Hopper on with what only that generation has, such as "sm_90a"."""
    return f"sm_{capability[0]}{capability[1]}" + "a" * (capability[0] >= 9)


def machine_code(file: str, arch: str, **macros: int | str) -> bytes:
    """A compiled source (cubin), from the disk if it was compiled before; needs no GPU.

    Raises:
        RuntimeError: If `cuda.core` or NVRTC is missing, or the source does not compile.
    """
    reason = missing()
    if reason is not None:
        raise RuntimeError(reason)
    code = (SOURCES / file).read_text()
    options = _core().ProgramOptions(
        name=file, arch=arch, std=STANDARD, include_path=str(SOURCES),
        define_macro=[(macro, str(value)) for macro, value in sorted(macros.items())],
    )  # fmt: skip
    utils = import_module("cuda.core.utils")
    inputs = {"code": code, "code_type": "c++", "options": options, "target_type": "cubin"}
    key = utils.make_program_cache_key(**inputs, extra_digest=_sources_digest())
    kept = _kept()
    known = None if kept is None else kept.get(key)
    if known is not None:
        return known
    with _said(f"{file} must compile for {arch}", "Update nvidia-cuda-nvrtc, or choose another precision."):
        compiled = bytes(_core().Program(code, "c++", options).compile("cubin").code)
    if kept is not None:
        try:
            kept[key] = compiled
        except OSError as error:
            _say_once(error)
    return compiled


def compiler() -> str:
    """Version of NVRTC, such as "13.0"."""
    return ".".join(map(str, import_module("cuda.bindings.nvrtc").nvrtcVersion()[1:]))


def cache_folder() -> Path:
    """Where compiled kernels are kept: PAROATTN_KERNEL_CACHE, else paroattn/kernels in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paroattn" / "kernels"


@cache
def missing() -> str | None:
    """What these kernels lack here: the rule, what was found and the remedy; None if nothing."""
    try:
        _core()
        compiler()
    except (ImportError, RuntimeError) as error:  # the second if there is no library to load
        first = str(error).splitlines()[0]
        return f"kernels in CUDA C++ need cuda.core and NVRTC; got {first}. pip install 'paroattn[native]'."
    return None


def _core() -> Any:
    return import_module("cuda.core")


class _CurrentStream:
    """Torch's current stream in the protocol of `cuda.core`."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, torch.cuda.current_stream().cuda_stream


def _as_argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if value is None:
        return 0
    if isinstance(value, int):
        return numpy.int32(value)
    return numpy.float32(value) if isinstance(value, float) else value


@cache
def _sources_digest() -> bytes:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.digest()


def _kept() -> Any:
    """Compiled kernels on disk, or None where nothing can be kept; whole files only, whoever else writes there."""
    try:
        return import_module("cuda.core.utils").FileStreamProgramCache(cache_folder())
    except OSError as error:
        _say_once(error)
        return None


@cache
def _say(folder: Path, problem: str) -> None:
    warnings.warn(
        f"compiled kernels are kept in {folder}, which must be writable; got {problem}. They are compiled again in "
        f"every process. Set {CACHE_VARIABLE} to a folder that is.",
        stacklevel=2,
    )


def _say_once(error: OSError) -> None:
    _say(cache_folder(), error.strerror or str(error))


@contextmanager
def _said(rule: str, remedy: str) -> Iterator[None]:
    """Raise what `cuda.core` finds wrong inside as a RuntimeError with the rule and the remedy."""
    try:
        yield
    except RuntimeError:
        raise
    except Exception as error:  # its exceptions have no public name
        raise RuntimeError(f"{rule}; got {str(error).strip(chr(0) + ' ' + chr(10))}. {remedy}") from error
