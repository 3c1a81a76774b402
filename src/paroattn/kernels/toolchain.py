"""What Triton needs beside a GPU: it builds a small C extension for every kernel that it starts for the first time."""

import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import triton
from triton.backends.nvidia import driver


@cache
def check_toolchain() -> None:
    """Check that Triton can start kernels here; silent where it has built for some before.

    Raises:
        RuntimeError: If the C compiler or Python's headers are missing.
    """
    reason = missing()
    if reason is not None and not any(Path(triton.knobs.cache.dir).glob("*/__triton_launcher*")):
        raise RuntimeError(f"{reason} Or use impl='reference'.")


def missing() -> str | None:
    """What Triton lacks for building its C extensions: the rule, what was found and the remedy; None if nothing."""
    if triton.knobs.build.impl is not None or not hasattr(driver, "compile_module_from_src"):
        return None  # someone else builds, or this Triton needs no building
    chosen = os.environ.get("CC")
    if chosen is not None and shutil.which(chosen) is None:
        return f"Triton needs a C compiler; got CC={chosen}, which is no program. Set CC to one, or unset it."
    if chosen is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        return (
            "Triton needs a C compiler; found neither gcc nor clang on PATH. Install one, such as the package gcc, or "
            "set CC to its path."
        )
    scheme = sysconfig.get_default_scheme()
    headers = Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme))
    if not (headers / "Python.h").exists():
        return (
            f"Triton needs Python's headers; found no Python.h in {headers}. Install them, such as the package "
            "python3-dev, or use a Python that brings them along."
        )
    return None
