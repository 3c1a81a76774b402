"""What preparing costs at shapes of real models: python benchmarks/prepare.py --shape wan-14b-720p --out FILE.

Preparing gathers q, k and v in the heads' orders, smooths, rotates and quantises them and transposes V. Its bound is
the time in which a copy on the same GPU, in the same run, moves as many bytes as are read and written if everything is
read once and written once. V is read twice and K an eighth more, since V's scales and K's mean come before what needs
them.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention import MAIN_BLOCK, OURS, Inputs, Job, about, checked, own_call, own_kernel
from paroattn.block_mask import parse_block
from paroattn.precision import Precision
from records import merge, significant
from shapes import SHAPES, Shape
from timing import gpu_medians, medians

KEY = ("device", "shape", "precision", "block", "density")
PRECISIONS = ("int8/fp8", "int8/int8", "int4/int4")
COPIED_BYTES = 2**31


def moved_bytes(inputs: Inputs, operands: Any) -> int:
    """Bytes read and written if everything is read once and written once."""
    written = [value for value in vars(operands).values() if isinstance(value, Tensor)]
    return sum(x.numel() * x.element_size() for x in (*inputs.model, *written))


def measure(shape: Shape, precision: str, density: float, rounds: int = 30, device: str = "cuda") -> dict[str, Any]:
    """The row of one shape and precision."""
    block = MAIN_BLOCK[shape.head_dim]
    formats, size = Precision.parse(precision), parse_block(block)
    inputs = Inputs(shape, device)
    whole = partial(own_call, formats, size)
    call = checked(inputs, Job(OURS, precision, block, "even", density, "call", whole, reordered=True))
    source = torch.zeros(COPIED_BYTES if device.startswith("cuda") else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    own_kernel(formats, size, inputs, inputs.kept("even", density))()
    prepared = inputs.prepared[formats, size, "triton"]
    assert prepared.run
    calls: dict[str, Callable[[], Any]] = {"prepare": prepared.run, "call": call, "copy": lambda: target.copy_(source)}
    moved = moved_bytes(inputs, prepared.operands)
    times = (gpu_medians if device.startswith("cuda") else medians)(calls, rounds)
    speed = 2 * source.numel() / times["copy"]  # bytes per millisecond
    bound = moved / speed
    return about(shape, device) | {
        "precision": precision, "block": block, "density": density, "ms": significant(times["prepare"]), "bytes": moved,
        "copy_tb_per_s": significant(speed / 1e9), "bound_ms": significant(bound),
        "over_bound": significant(times["prepare"] / bound), "call_ms": significant(times["call"]),
        "share_of_call": significant(times["prepare"] / times["call"]),
    }  # fmt: skip


def described(row: dict[str, Any]) -> str:
    return (
        f"{row['shape']} {row['precision']}: {row['ms']:.3f} ms, {row['over_bound']:.2f} × {row['bound_ms']:.3f} ms "
        f"for {row['bytes'] / 1e6:.0f} MB at {row['copy_tb_per_s']:.2f} TB/s; {row['share_of_call']:.1%} of a call of "
        f"{row['call_ms']:.2f} ms at density {row['density']:g}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, required=True)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, help="QK/PV")
    parser.add_argument("--density", type=float, default=0.2, help="of the whole call")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="result file to merge the rows into; without it they are only printed")
    options = parser.parse_args(arguments)
    for name in options.shape:
        for precision in options.precisions:
            row = measure(SHAPES[name], precision, options.density, options.rounds, options.device)
            print(described(row), flush=True)
            if options.out:
                merge(options.out, [row], KEY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
