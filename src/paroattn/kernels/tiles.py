"""How the attention kernels are compiled: by GPU, precision, head dimension and block."""

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton

from ..precision import Precision
from .reference import P_TOP

INTERPRETED = bool(triton.knobs.runtime.interpret)
BLOCKS = tuple(product((64, 128), repeat=2))
LARGEST_HEAD = 128
LOWEST_CAPABILITY = {"int8": (8, 0), "int4": (8, 0), "fp16": (8, 0), "bf16": (8, 0), "fp8": (8, 9)}

STORED_AS = {"int8": "int8", "int4": "int8", "fp8": "fp8"}
"""Four bits travel in bytes, the same integers; `int4.py` alone uses matrix units of four bits."""


@dataclass(frozen=True)
class Tile:
    """How one program is compiled.

    Attributes:
        rows: Query rows of a program, at most a query block.
        warps: Warps of a program.
        stages: Key blocks in flight.
        descriptors: Load K and V through tensor descriptors (TMA) instead of pointers.
    """

    rows: int
    warps: int
    stages: int
    descriptors: bool = False


@dataclass(frozen=True)
class Ring:
    """How a program of `hopper.py` is compiled.

    Attributes:
        stages: Key blocks in flight.
        registers: Limit per thread: up to 96 let five programs share a multiprocessor, 128 four, 168 three.
        matrix_sums: Sum rows of the rounded P on matrix units, which takes work off the others.
    """

    stages: int
    registers: int
    matrix_sums: bool = False


@dataclass(frozen=True)
class Pipeline:
    """How a program of `sm90.py`, 64 query rows, is compiled.

    Attributes:
        programs: Programs that share a multiprocessor.
        stages: Key blocks in its ring.
    """

    programs: int
    stages: int


@dataclass(frozen=True)
class Warps:
    """How a program of `cuda/int4.cu` is compiled.

    Attributes:
        rows: Query rows of a program, 16 for each warp; at most a query block.
        stages: Key blocks in flight.
        programs: How many a multiprocessor is to hold, which limits their registers.
    """

    rows: int
    stages: int
    programs: int


@dataclass(frozen=True)
class Rows:
    """How a program of `four_bit_rows.py` is compiled.

    Attributes:
        warps: Warps of a program, at most one for 16 rows.
        stages: Blocks of rows in flight.
        registers: Limit per thread, if there is one; for bytes only.
    """

    warps: int
    stages: int
    registers: int | None = None


TILES = {
    # (from capability, format of P·V, D'): fastest of those measured on an H200 from (9, 0) on, else without spills
    ((9, 0), "fp8", 128): Tile(64, 4, 3, descriptors=True),
    ((9, 0), "int8", 128): Tile(64, 4, 3),
    ((9, 0), "half", 128): Tile(128, 8, 2, descriptors=True),
    ((9, 0), "fp8", 64): Tile(64, 4, 2, descriptors=True),
    ((9, 0), "int8", 64): Tile(64, 4, 2, descriptors=True),
    ((9, 0), "half", 64): Tile(64, 4, 2, descriptors=True),
    ((8, 0), "fp8", 128): Tile(128, 8, 2),
    ((8, 0), "int8", 128): Tile(128, 8, 2),
    ((8, 0), "half", 128): Tile(128, 8, 2),
    ((8, 0), "fp8", 64): Tile(64, 4, 2),
    ((8, 0), "int8", 64): Tile(64, 4, 2),
    ((8, 0), "half", 64): Tile(64, 4, 2),
}
# (10, 0) and above have no wgmma either
TILES |= {((10, 0), *key): tile for (lowest, *key), tile in TILES.items() if lowest == (8, 0)}
"""The highest capability that the GPU has wins."""

RINGS = {
    # (format of P·V, D', tokens of a key block), for INT8 Q·K: fastest of those measured on an H200
    ("fp8", 128, 128): Ring(2, 168),
    ("fp8", 128, 64): Ring(4, 168),
    ("fp8", 64, 128): Ring(2, 128, matrix_sums=True),
    ("fp8", 64, 64): Ring(4, 96, matrix_sums=True),
    ("int8", 128, 128): Ring(2, 168),
    ("int8", 128, 64): Ring(4, 168),
    ("int8", 64, 128): Ring(2, 128, matrix_sums=True),
    ("int8", 64, 64): Ring(4, 96, matrix_sums=True),
}
"""Where Triton has Gluon as `hopper.py` needs it; elsewhere the portable kernel computes the same."""
PIPELINE_OF = {128: Pipeline(programs=3, stages=2), 64: Pipeline(programs=4, stages=2)}
"""By D', whatever the blocks and the format: fastest of those measured on an H200."""
PIPELINES = {
    # (format of P·V, D', blocks), for INT8 Q·K: those that beat the Gluon kernel on an H200
    ("fp8", 128, (128, 128)): PIPELINE_OF[128],
    ("int8", 128, (128, 128)): PIPELINE_OF[128],
    ("fp8", 64, (64, 128)): PIPELINE_OF[64],
    ("int8", 64, (64, 128)): PIPELINE_OF[64],
}
"""What GPUs of capability 9.0 do in CUDA C++ by themselves; elsewhere the Gluon kernel runs."""
WARPS = {
    # (D', tokens of a key block): as many programs as there are registers for without spills
    (128, 128): Warps(64, 2, 2),
    (128, 64): Warps(64, 2, 2),
    (64, 128): Warps(64, 2, 3),
    (64, 64): Warps(64, 2, 3),
}
FOUR_BIT_ROWS = {
    # (from capability, whether of K, D'): (9, 0) were fastest on an H200, also that with spills; others have none
    ((9, 0), False, 64): Rows(4, 2),
    ((9, 0), False, 128): Rows(4, 2),
    ((9, 0), True, 64): Rows(8, 2),
    ((9, 0), True, 128): Rows(8, 2, registers=128),
}
FOUR_BIT_ROWS |= {((8, 0), of_keys, d_pad): Rows(8 if of_keys else 4, 1) for _, of_keys, d_pad in FOUR_BIT_ROWS}
HAS_GLUON = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)


def warps_for(rows: int, wanted: int, has: tuple[int, int]) -> int:
    """How many warps may share products of so many rows: on Hopper 16 rows for each.

    With fewer, Triton's code for it reads beyond an operand in shared memory where products follow from each other.
    """
    return min(wanted, rows // 16) if has[0] == 9 else wanted


def units(precision: Precision) -> dict[str, Any]:
    """Compile-time arguments of the attention kernels.

    QK, PV: what the products are made of. TOP: what p is multiplied by before it is rounded; four bits are what is left
    of eight. LOG2_TOP: of what one is stored as.
    """
    qk, pv = STORED_AS.get(precision.qk, "half"), precision.pv if precision.pv in STORED_AS else "half"
    top = P_TOP.get(precision.pv, 1.0)
    return {"QK": qk, "PV": pv, "TOP": 16 * top if pv == "int4" else top, "LOG2_TOP": math.log2(top)}


def tile_of(has: tuple[int, int], precision: Precision, block: tuple[int, int], d_pad: int) -> Tile | Ring:
    """How a GPU of a compute capability does a precision, with these blocks and this padded head dimension."""
    parts = units(precision)
    pv = STORED_AS.get(parts["PV"], "half")
    ring = RINGS.get((pv, d_pad, block[1])) if parts["QK"] == "int8" else None
    if ring and has[0] == 9 and HAS_GLUON and not INTERPRETED:
        return ring
    known = [lowest for lowest, *key in TILES if key == [pv, d_pad] and lowest <= has]
    return TILES[max(known), pv, d_pad]


def pipeline_of(precision: Precision, block: tuple[int, int], channels: int) -> Pipeline | None:
    """How `sm90.py` does what it is faster at than the Gluon kernel; None for all else."""
    return PIPELINES.get((precision.pv, padded(channels), block)) if precision.qk == "int8" else None


def padded(channels: int) -> int:
    """The head dimension that kernels are compiled for."""
    return 64 if channels <= 64 else 128


def rows_of(has: tuple[int, int], of_keys: bool, d_pad: int) -> Rows:
    """The row of `FOUR_BIT_ROWS` for a GPU, for Q or K, and a padded head dimension."""
    return FOUR_BIT_ROWS[(9, 0) if has[0] == 9 else (8, 0), of_keys, d_pad]


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; the interpreter stands in for (9, 0)."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
