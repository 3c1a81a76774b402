"""Block-sparse attention for Hopper in CUDA C++: how `cuda/sm90.cu` is compiled and started."""

from typing import Any

import torch

from . import native
from .prepare import Operands
from .tiles import Pipeline

SOURCE, NAME, ARCH = "sm90.cu", "sm90_attention", "sm_90a"
ROWS, THREADS = 64, 128
POINTERS = (
    "q", "k", "v", "q_scale", "k_scale", "v_scale", "shift", "lists", "counts", "bits", "tiles", "table", "order",
    "valid", "out", "lse",
)  # fmt: skip
SIZES = ("B", "N", "H", "D", "ROW_BLOCKS", "KEY_BLOCKS", "BYTES")
FROM_OPERANDS = ("q", "k", "v")
INDICES = ("table", "order", "valid")


def macros(pipeline: Pipeline, block: tuple[int, int], d_pad: int, pv: str, dtype: torch.dtype) -> dict[str, int]:
    """What the source leaves open, for operands of `prepare` and outputs of a dtype."""
    return {
        "HEAD_DIM": d_pad,
        "QUERIES": block[0],
        "KEYS": block[1],
        "INT8_VALUES": int(pv == "int8"),
        "STAGES": pipeline.stages,
        "PROGRAMS": pipeline.programs,
        "OUT_BYTES": dtype.itemsize,
        "OUT_IS_BF16": int(dtype == torch.bfloat16),
    }


def shared_bytes(pipeline: Pipeline, keys: int, d_pad: int, pv: str) -> int:
    """Shared memory of a program, as the source lays it out."""
    ones = 8 * keys if pv == "fp8" else 0
    stage = -(-(2 * keys * d_pad + ones) // 1024) * 1024
    return ROWS * d_pad + 4 * (d_pad + ROWS) + pipeline.stages * (stage + 48) + 8


def launch(
    operands: Operands, *, block: tuple[int, int], pipeline: Pipeline, programs: int, pv: str, **arguments: Any
) -> None:
    """Run the kernel on swizzled operands.

    Args:
        operands: As `prepare` makes them, swizzled.
        block: Tokens of a query block and of a key block.
        pipeline: How it is compiled.
        programs: Query blocks of all heads and batch elements.
        pv: Format of the second product, "int8" or "fp8".
        arguments: As `sparse.attend` names them.

    Raises:
        RuntimeError: If the kernel does not compile or start.
    """
    d_pad, split = operands.q.shape[-1], block[0] // ROWS
    values = {name: getattr(operands, name) for name in FROM_OPERANDS}
    values |= {name: arguments[f"{name}_ptr"] for name in POINTERS if name not in FROM_OPERANDS}
    values |= {name: values[name].int() for name in INDICES}
    kernel = native.kernel(SOURCE, NAME, ARCH, **macros(pipeline, block, d_pad, pv, values["out"].dtype))
    kernel.launch(
        programs * split, THREADS, shared_bytes(pipeline, block[1], d_pad, pv),
        *(values[name] for name in POINTERS), *(arguments[name] for name in SIZES),
    )  # fmt: skip
