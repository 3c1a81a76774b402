"""Kernels in CUDA C++ on a CPU: the same source, compiled by g++ against instructions of a warp that are emulated."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor

from paroattn.kernels import native

EMULATED = Path(__file__).parent / "emulated"
COMPILER = shutil.which("g++")
REASON = "kernels are emulated in C++, and g++ is not installed"
SEED = [1]
"""What decides who comes late; tests change it."""
CTYPES = {int: ctypes.c_void_p, numpy.int32: ctypes.c_int32, numpy.float32: ctypes.c_float}


class EmulatedKernel:
    """Stands in for `native.Kernel`."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def launch(self, blocks: int, threads: int, shared_bytes: int, *arguments: Any) -> None:
        assert all(argument.is_contiguous() for argument in arguments if isinstance(argument, Tensor))
        given = [native._as_argument(argument) for argument in arguments]
        boxes = [CTYPES[type(value)](value if type(value) is int else value.item()) for value in given]
        pointers = (ctypes.c_void_p * len(boxes))(*(ctypes.addressof(box) for box in boxes))
        assert self.library.emulate(blocks, threads, shared_bytes, SEED[0], pointers), "what is wrong is on stderr"


@functools.cache
def kernel(file: str, name: str, arch: str, **macros: int) -> EmulatedKernel:
    """Stands in for `native.kernel`."""
    assert COMPILER is not None, REASON
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "kernel.so")
        opened = [f"-D{macro}={value}" for macro, value in macros.items()]
        subprocess.run(
            [COMPILER, "-x", "c++", "-", "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-o", library,
             "-Wall", "-Wno-unknown-pragmas", f"-I{EMULATED}", f"-I{native.SOURCES}", *opened],
            input=f"#include <{file}>\nEMULATED({name})\n", text=True, check=True,
        )  # fmt: skip
        return EmulatedKernel(ctypes.CDLL(str(library)))
