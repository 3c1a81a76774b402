"""Variants of the CUDA C++ kernel for Hopper beside the Gluon one: python benchmarks/sm90.py --out FILE.

A worker process for each head dimension and format of P·V compiles the variants, checks each against float64 on small
shapes that hide nothing (ragged ends, padded text, heads with masks of their own), and times those that are right in
turns, kernels alone, on shapes of real models. A variant that is wrong, fails or hangs gets a row that says so, and the
others go on in a new worker.
"""

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention import significant
from paroattn.block_mask import BlockMask, blocks_of, parse_block
from paroattn.grid import ORDERS, Grid, Layout, TextSpan
from paroattn.kernels import sparse
from paroattn.kernels.prepare import prepare
from paroattn.kernels.reference import reference_attention
from paroattn.kernels.tiles import PIPELINE_OF, Pipeline, tile_of
from paroattn.precision import Precision
from records import environment, merge
from shapes import SHAPES, block_mask, draw, kept_pairs, tensors
from timing import gpu_medians

VARIANTS = {
    (dim, pv): {"two stages": PIPELINE_OF[dim]}
    | ({"three stages": replace(PIPELINE_OF[dim], stages=3)} if dim == 64 else {})
    for dim in (128, 64)
    for pv in ("fp8", "int8")
}
BLOCK = {64: "64x128", 128: "128x128"}
TIMED = {128: ("wan-14b-480p", "wan-14b-720p"), 64: ("cogvideox-5b",)}
DENSITIES = (0.2, 1.0)
PRESENT, PLAINEST = "gluon", "two stages"
KEY = ("device", "variant", "shape", "precision", "block", "density")
LARGEST_ERROR = {"int8": 0.02, "fp8": 0.05}
REPEATS = 50
SILENCE = 60.0
"""Seconds without a line after which a worker is taken for hung."""

SMALL = Layout(Grid(5, 11, 13), TextSpan(150, "suffix"))
SMALL_HEADS, SMALL_BATCH = 5, 2
PADDED = 143
"""Text tokens of the second batch element that are padding: it has no real key in the last block."""


def small_tensors(dim: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v whose heads and channels differ."""
    generator = torch.Generator(device).manual_seed(dim)
    shape = (SMALL_BATCH, SMALL.tokens, SMALL_HEADS, dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
    levels = torch.linspace(0.5, 2, SMALL_HEADS, device=device)[:, None] * torch.linspace(0.8, 1.2, dim, device=device)
    return 3 * q * levels, k + levels, v + levels


def small_mask(block: tuple[int, int]) -> BlockMask:
    """Another mask for each head: dense, sparse, and rows that read nothing but the ragged block."""
    rows, columns = (blocks_of(SMALL.tokens, size) for size in block)
    kept = torch.rand(SMALL_HEADS, rows, columns, generator=torch.Generator().manual_seed(3)) < 0.4
    kept[0] = True
    kept[1, :, 0] = True
    kept[2] = torch.arange(columns) == columns - 1
    kept[3:, :, -1] = True
    return BlockMask.from_dense(kept, block)


def wrong(pipeline: Pipeline, pv: str, dim: int, block: tuple[int, int], dtype: torch.dtype, device: str) -> float:
    """Largest relative error of out, or absolute error of lse, against float64 on the same integers of Q, K and V."""
    q, k, v = small_tensors(dim, device)
    valid = torch.tensor([SMALL.tokens, SMALL.tokens - PADDED], dtype=torch.int32, device=device)
    mask, precision = small_mask(block).to(device), Precision("int8", pv)
    table = SMALL.table(ORDERS).to(device)
    order = torch.tensor([3, 5, 2, 0, 4], dtype=torch.int32, device=device)
    settings = {"table": table, "order": order, "precision": precision, "softmax_scale": dim**-0.5}
    operands = prepare(q, k, v, **settings, block=block, valid=valid, with_shift=True, swizzled=True)
    right, right_lse = reference_attention(
        q.double(), k.double(), v.double(), mask=mask, valid_tokens=valid, **settings
    )
    results = [
        sparse.attend(operands, q.shape, dtype, **settings, mask=mask, tile=pipeline, valid=valid, return_lse=True)
        for _ in range(REPEATS)
    ]
    out, lse = (x for x in results[0] if x is not None)
    if not all(torch.equal(x, y) for again in results for x, y in zip((out, lse), again, strict=True) if y is not None):
        return float("nan")
    if not torch.equal(out.abs().amax(-1) > 0, right.abs().amax(-1) > 0):
        return float("inf")
    if not torch.equal(lse.isfinite(), right_lse.isfinite()):
        return float("inf")
    heads = [((out - right)[:, :, head].norm() / right[:, :, head].norm()).item() for head in range(SMALL_HEADS)]
    return max(*heads, (lse - right_lse)[right_lse.isfinite()].abs().max().item() / 2)


def small_shapes(name: str, dim: int) -> list[tuple[int, tuple[int, int], torch.dtype]]:
    """Head dimensions, blocks and outputs to check a variant with; the plainest one with more."""
    main = parse_block(BLOCK[dim])
    shapes = [(channels, main, torch.bfloat16) for channels in (dim, dim - 23, dim - 8)]
    if name == PLAINEST:
        shapes += [(dim, main, torch.float32), (dim - 23, main, torch.float16), (dim, (64, 64), torch.bfloat16)]
        shapes += [(dim, (128, 128), torch.bfloat16), (dim, (128, 64), torch.bfloat16)]
    return shapes


def work(dim: int, pv: str, names: Sequence[str], shapes: Sequence[str], densities: Sequence[float],
         device: str, say: Callable[..., None]) -> None:  # fmt: skip
    """Check and time variants, telling everything that is started and found."""
    right = []
    for name in names:
        pipeline = VARIANTS[dim, pv][name]
        say(start=name, at="small shapes")
        torch.use_deterministic_algorithms(True, warn_only=True)  # poisons what nobody has written
        start = time.perf_counter()
        errors = [wrong(pipeline, pv, *shape, device) for shape in small_shapes(name, dim)]
        torch.use_deterministic_algorithms(False)
        say(checked=name, errors=list(map(significant, errors)), seconds=significant(time.perf_counter() - start))
        if all(error <= LARGEST_ERROR[pv] for error in errors):
            right.append(name)
        else:
            say(failed=name, reason=f"off from float64 on small shapes by {errors}")
    say(start=None, at="timing")
    for shape in shapes:
        timed(dim, pv, right, shape, densities, device, say)
    say(finished=True)


def timed(dim: int, pv: str, names: Sequence[str], shape_name: str, densities: Sequence[float],
          device: str, say: Callable[..., None]) -> None:  # fmt: skip
    """Times of one shape."""
    shape, block, precision = SHAPES[shape_name], parse_block(BLOCK[dim]), Precision("int8", pv)
    q, k, v = tensors(shape, device)
    table, order = shape.orders(device)
    valid = torch.full((shape.batch,), shape.tokens, dtype=torch.int32, device=device)
    settings = {"table": table, "order": order, "precision": precision, "softmax_scale": dim**-0.5, "valid": valid}

    @cache
    def operands(swizzled: bool):
        return prepare(q, k, v, **settings, block=block, with_shift=False, swizzled=swizzled)

    present = tile_of((9, 0), precision, block, dim)
    for density in densities:
        kept = draw(shape, density, "even", device)
        mask = block_mask(kept, shape.tokens, block)
        work = 4 * dim * shape.batch * kept_pairs(kept, shape.tokens)

        def call(tile: Any, mask: BlockMask = mask) -> Tensor:
            given = operands(isinstance(tile, Pipeline))
            return sparse.attend(given, q.shape, q.dtype, **settings, mask=mask, tile=tile, return_lse=False)[0]

        right = call(present)
        calls: dict[str, Callable[[], Tensor]] = {PRESENT: partial(call, present)}
        about = {"shape": shape_name, "precision": f"int8/{pv}", "block": BLOCK[dim], "density": density}
        for name in names:
            say(start=name, at=f"{shape_name} {density}")
            calls[name] = partial(call, VARIANTS[dim, pv][name])
            out = calls[name]()
            error = float((out.float() - right.float()).norm() / right.float().norm())
            say(compared=name, at=f"{shape_name} {density}", with_gluon=error)
            if not error <= LARGEST_ERROR[pv]:
                say(failed=name, reason=f"off from {PRESENT} by {error:.3g} on {shape_name} at {density}")
                del calls[name]
        say(start=None, at=f"timing {shape_name} {density}")
        times = gpu_medians(calls, 11)
        for name, ms in times.items():
            numbers = {"ms": significant(ms), "useful_tflops": significant(work / ms / 1e9)}
            numbers |= {"times_gluon": significant(times[PRESENT] / ms)}
            pipeline = {} if name == PRESENT else vars(VARIANTS[dim, pv][name])
            say(row=environment(device, "triton") | {"variant": name} | about | numbers | pipeline)


def supervise(dim: int, pv: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and failures of all variants of a head dimension and format, whatever becomes of workers."""
    names = [name for name in VARIANTS[dim, pv] if not options.only or any(word in name for word in options.only)]
    rows: dict[tuple, dict[str, Any]] = {}
    failures = []
    while names:
        command = [sys.executable, sys.argv[0], "--work", str(dim), pv, *names]
        command += ["--shapes", *options.shapes, "--densities", *map(str, options.densities)]
        current, reason, finished = None, "", False
        for line in spoken([*command, "--device", options.device], options.deadline):
            told = json.loads(line)
            print(f"{dim} {pv} {line.strip()}"[:400] if "row" not in told else described(told["row"]), flush=True)
            if "row" in told:
                rows[told["row"]["variant"], told["row"]["shape"], told["row"]["density"]] = told["row"]
            elif "start" in told:
                current = told["start"]
            elif "failed" in told:
                failures.append({"variant": told["failed"], "head_dim": dim, "pv": pv, "reason": told["reason"]})
                names = [name for name in names if name != told["failed"]]
            finished |= "finished" in told
            reason = told.get("died", reason)
        if finished or time.time() > options.deadline or current is None:
            break
        failures.append({"variant": current, "head_dim": dim, "pv": pv, "reason": reason})
        names = [name for name in names if name != current]
    return list(rows.values()), failures


def spoken(command: Sequence[str], deadline: float) -> Iterator[str]:
    """Lines of JSON that a worker prints; the last tells how it ended."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: queue.Queue[str | None] = queue.Queue()
    assert process.stdout is not None

    def read(pipe: Any) -> None:
        for line in pipe:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
    last = []
    while True:
        try:
            line = lines.get(timeout=max(0.1, min(SILENCE, deadline - time.time())))
        except queue.Empty:
            process.kill()
            process.wait()
            yield json.dumps({"died": "it said nothing for too long"})
            return
        if line is None:
            yield json.dumps({"died": f"exit status {process.wait()}: {' | '.join(last[-4:])}"[:600]})
            return
        if line.startswith("{"):
            yield line
        else:
            last.append(line.strip())


def described(row: dict[str, Any]) -> str:
    about = f"{row['shape']:<13} {row['density']:<4} {row['precision']:<10} {row['variant']:<45}"
    return f"{about} {row['ms']:8.3f} ms {row['useful_tflops']:6.0f} TFLOP/s {row['times_gluon']:5.2f} × {PRESENT}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=(), help="words of variants' names")
    parser.add_argument("--cases", nargs="+", default=[f"{dim}:{pv}" for dim, pv in VARIANTS], help="D:PV")
    parser.add_argument("--shapes", nargs="*", default=("cogvideox-5b", "wan-14b-480p", "wan-14b-720p"))
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--seconds", type=float, default=280)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        dim, pv, *names = options.work
        shapes = [name for name in TIMED[int(dim)] if name in options.shapes]

        def say(**told: Any) -> None:
            print(json.dumps(told), flush=True)

        work(int(dim), pv, names, shapes, options.densities, options.device, say)
        return 0
    options.deadline = time.time() + options.seconds
    rows, failures = [], []
    for case in options.cases:
        dim, pv = case.split(":")
        found, failed = supervise(int(dim), pv, options)
        rows, failures = rows + found, failures + failed
        if options.out and found:
            merge(options.out, found, KEY)
    print("\n".join(map(described, sorted(rows, key=lambda row: (row["shape"], row["density"], row["precision"])))))
    print("\n".join(json.dumps(failure) for failure in failures))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
