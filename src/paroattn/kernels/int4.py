"""Block-sparse attention in INT4 on matrix units of four bits: starts `cuda/int4.cu` on packed operands."""

from typing import Any

import torch
from torch import Tensor

from . import native
from .prepare import Operands
from .tiles import Warps, capability

FILE, NAME = "int4.cu", "attend_int4"
KINDS = {torch.float32: (32, 0), torch.float16: (16, 0), torch.bfloat16: (16, 1)}
"""OUT_BITS and OUT_BFLOAT16 of an output's dtype."""


def macros(channels: int, d_pad: int, block: tuple[int, int], warps: Warps, dtype: torch.dtype) -> dict[str, int]:
    """What the source leaves open."""
    rows = min(warps.rows, block[0])
    bits, bfloat16 = KINDS[dtype]
    return {
        "D": channels, "D_PAD": d_pad, "KEYS": block[1], "SPLIT": block[0] // rows, "WARPS": rows // 16,
        "STAGES": warps.stages, "PROGRAMS": warps.programs, "OUT_BITS": bits, "OUT_BFLOAT16": bfloat16,
    }  # fmt: skip


def shared_bytes(opened: dict[str, int]) -> int:
    """Shared memory of a program: its ring of key blocks."""
    keys, channels = opened["KEYS"], opened["D_PAD"]
    return opened["STAGES"] * ((keys + keys // 16) * channels // 2 + channels * (keys // 2 + 16))


def launch(operands: Operands, warps: Warps, block: tuple[int, int], programs: int, **arguments: Any) -> None:
    """Run the kernel on packed operands.

    Args:
        operands: From `prepare` with `packed`.
        warps: How it is compiled.
        block: Tokens of a query block and of a key block.
        programs: Query blocks of all heads and batch elements.
        arguments: The other arguments of the portable kernel.

    Raises:
        RuntimeError: If `cuda.core` or NVRTC is missing, or the kernel does not compile or load.
    """
    out, lse = arguments["out_ptr"], arguments["lse_ptr"]
    opened = macros(arguments["D"], operands.v.shape[-2], block, warps, out.dtype)
    kernel = native.kernel(FILE, NAME, native.architecture(capability(out.device)), **opened)
    kernel.launch(
        programs * opened["SPLIT"], 32 * opened["WARPS"], shared_bytes(opened),
        operands.q, operands.k, operands.v, operands.q_scale, operands.k_scale, operands.v_scale, operands.shift,
        arguments["lists_ptr"], arguments["counts_ptr"], arguments["bits_ptr"], arguments["tiles_ptr"],
        arguments["table_ptr"], _int32(arguments["order_ptr"]), _int32(arguments["valid_ptr"]), out, lse,
        *(arguments[name] for name in ("B", "N", "H", "ROW_BLOCKS", "KEY_BLOCKS", "BYTES")),
    )  # fmt: skip


def _int32(x: Tensor) -> Tensor:
    return x.to(torch.int32)
