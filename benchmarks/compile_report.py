"""Registers, spills and instructions of every kernel, without a GPU: python benchmarks/compile_report.py [--arch 90].

Runs the launchers on small tensors with kernels that only note how they are called, compiles each call for each
architecture and counts: registers and spilled bytes per thread, shared memory, instructions of the longest loop around
a matrix product, which products, and instructions that should be few: SHFL (row reductions only), I2F and F2I
(conversions between integers and floats). Kernels in CUDA C++ need the extra [native].
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from paroattn.block_mask import BlockMask
from paroattn.grid import Grid, Layout
from paroattn.kernels import feedback, gradients, hopper, int4, native, portable, prepare, sparse, stats
from paroattn.kernels.block_stats import SMALL
from paroattn.precision import Precision
from records import environment, merge

OUT = Path(__file__).parent / "results" / "compile_report.json"
KEY = ("kernel", "arch", "precision", "block", "head_dim", "dtype", "variant")
ARCHES = (80, 89, 90)
PRECISIONS = ("int8/fp8", "int8/int8", "int4/int4", "int8/bf16", "bf16/int8", "bf16/bf16")
BLOCKS = ("64x64", "64x128", "128x128")
HEADS = (64, 128)
COUNTED = {"shfl": r"\bSHFL\b", "i2f": r"\bI2FP?\b", "f2i": r"\bF2I\b", "mufu": r"\bMUFU\.EX2\b"}
MATRIX = r"\b(?:[IHQ]G?MMA)[\w.]*"
NATIVE = {"attend_int4": "int4"}
ONLY = {
    "attention": ("sparse", "hopper", "int4"),
    "stats": ("stats",),
    "gradients": ("past_queries", "past_keys"),
    "native": ("int4",),
}
TILE = ("num_warps", "num_stages", "STAGES", "ROWS", "DESCRIPTORS")
KERNELS = r"_kernel$|^_past_"
TOKENS = 304


class Call:
    """Stands in for a kernel and notes how it is launched."""

    def __init__(self, kernel: Any, calls: list[tuple[Any, tuple, dict]]):
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.calls.append((self.kernel, args, kwargs))


class NativeCall:
    """Stands in for `native.kernel` and the kernel that it returns, and notes how it is launched."""

    def __init__(self, calls: list[tuple[Any, tuple, dict]], file: str, name: str, arch: str, **macros: Any):
        self.calls, self.file, self.arch, self.macros = calls, file, arch, macros
        self.__name__ = NATIVE[name]

    def launch(self, blocks: int, threads: int, shared_bytes: int, *arguments: Any) -> None:
        about = {"num_warps": threads // 32, "ROWS": threads // 2, "shared_bytes": shared_bytes}
        self.calls.append((self, (), self.macros | about))

    def compiled(self, shared_bytes: int) -> Any:
        code = native.machine_code(self.file, self.arch, **self.macros)
        return SimpleNamespace(asm={"cubin": code}, metadata=SimpleNamespace(shared=shared_bytes))


@contextmanager
def noted(arch: int) -> Iterator[list[tuple[Any, tuple, dict]]]:
    """Launch nothing inside; gives the list of what would have been launched on an architecture."""
    calls: list[tuple[Any, tuple, dict]] = []
    saved = []

    def put(module: Any, name: str, value: Any) -> None:
        saved.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    for module in (prepare, feedback, sparse, portable, hopper, stats, gradients):
        for name in [name for name in vars(module) if re.search(KERNELS, name)]:
            put(module, name, Call(getattr(module, name), calls))
    for module in (prepare, sparse, portable, stats, gradients, int4):
        put(module, "capability", lambda device: divmod(arch, 10))
    put(native, "kernel", lambda *args, **macros: NativeCall(calls, *args, **macros))
    try:
        yield calls
    finally:
        for module, name, value in saved:
            setattr(module, name, value)


def launches(arch: int, precision: str, block: str, head_dim: int, dtype: str) -> list[tuple[Any, tuple, dict]]:
    """All kernel launches of one attention call."""
    q = torch.zeros(1, TOKENS, 1, head_dim, dtype=getattr(torch, dtype))
    rows, columns = (int(size) for size in block.split("x"))
    table, order = torch.arange(TOKENS, dtype=torch.int32)[None], torch.zeros(1, dtype=torch.int32)
    has_native = precision == "int4/int4" and native.missing() is None
    with noted(arch) as calls:
        for four_bit_units in (False, True)[: 1 + has_native]:
            sparse.sparse_attention(
                q, q, q, table=table, order=order, mask=BlockMask.full(1, TOKENS, (rows, columns)), softmax_scale=0.1,
                precision=Precision.parse(precision), return_lse=False, four_bit_units=four_bit_units,
            )  # fmt: skip
    return calls


def measurements(arch: int, block: str, head_dim: int, dtype: str) -> list[tuple[Any, tuple, dict]]:
    """The launches of the statistics' kernel, without and with what only the paper's score needs."""
    q = torch.zeros(1, TOKENS, 1, head_dim, dtype=getattr(torch, dtype))
    rows, columns = (int(size) for size in block.split("x"))
    table, blocks = Layout(Grid(1, 1, TOKENS)).table(("FHW",)), -(-TOKENS // rows)
    with noted(arch) as calls:
        for paper in (False, True):
            stats.map_sums(
                q, q, q, torch.eye(head_dim)[None], table=table, chosen=torch.zeros(1, 1, dtype=torch.int64),
                rows=torch.arange(blocks), measured=torch.ones(1, blocks, rows, dtype=torch.bool), video=TOKENS,
                block=(rows, columns), softmax_scale=0.1, paper=paper, small=SMALL,
            )  # fmt: skip
    return [call for call in calls if call[0].__name__ == "_stats_kernel"]


def refining(arch: int, block: str, head_dim: int, dtype: str) -> list[tuple[Any, tuple, dict]]:
    """The launches of the gradient."""
    q = torch.zeros(1, 1, TOKENS, head_dim, dtype=getattr(torch, dtype))
    rows, columns = (int(size) for size in block.split("x"))
    sums = torch.zeros(q.shape[:3])
    with noted(arch) as calls:
        gradients.gradients_on_gpu(q, q, q, q, sums, sums, BlockMask.full(1, TOKENS, (rows, columns)), 0.1, None)
    return calls


def compiled(kernel: Any, args: tuple, kwargs: dict, arch: int) -> Any:
    """Compile one launch, specialised exactly as the launch would be."""
    if isinstance(kernel, NativeCall):
        return kernel.compiled(kwargs["shared_bytes"])
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    return triton.compile(source(kernel, signature, constexprs, attrs), target=target, options=options.__dict__)


def counts(binary: Any) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory, the longest loop and counted instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        text = _tool("nvdisasm", "-c", file.name)
    used = {name: int(re.search(rf"\b{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK")}  # pyright: ignore
    found = {name: len(re.findall(pattern, text)) for name, pattern in COUNTED.items()}
    sizes = {"registers": used["REG"], "spilled_bytes": used["STACK"], "shared_bytes": binary.metadata.shared}
    found["overreaching"] = overreaching(binary.asm.get("ttgir", ""))
    return sizes | found | {"loop": _longest_loop(text), "matrix": sorted(set(re.findall(MATRIX, text)))}


def overreaching(text: str) -> int:
    """Products of warp groups whose warps, 16 rows each, are more than their rows: Triton 3.6 reads beyond those."""
    layouts = dict(re.findall(r"(#\w+) = #ttg\.nvidia_mma<\{versionMajor = 3,.*?warpsPerCTA = \[(\d+)", text))
    results = re.findall(r"warp_group_dot .*-> tensor<(\d+)x\d+x\w+, (#\w+)>", text)
    return sum(16 * int(layouts[layout]) > int(rows) for rows, layout in results)


def _longest_loop(text: str) -> int | None:
    """Instructions between a label and a jump back to it with matrix products between them; None if there are none."""
    labels: dict[str, int] = {}
    products, longest, count = [], 0, 0
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = count
        if not re.search(r"/\*[0-9a-f]{4,}\*/", line):
            continue
        count += 1
        if re.search(MATRIX, line):
            products.append(count)
        jump = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        start = labels.get(jump[1]) if jump else None
        if start is not None and products and products[-1] > start:
            longest = max(longest, count - start)
    return longest or None  # what is called, such as products that Hopper imitates, is no part of a loop


def _tool(name: str, *arguments: str) -> str:
    path = getattr(knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def report(
    arch: int, precision: str, block: str, head_dim: int, dtype: str, only: str | None, known: set[Any]
) -> list[dict[str, Any]]:
    """One row per kernel of one configuration; those in `known` are left out, and the others put into it."""
    rows = []
    calls = [] if only in ("stats", "gradients") else launches(arch, precision, block, head_dim, dtype)
    if precision == "bf16/bf16":
        calls += measurements(arch, block, head_dim, dtype) + refining(arch, block, head_dim, dtype)
    for kernel, args, kwargs in calls:
        name = kernel.__name__.strip("_").removesuffix("_kernel")
        values = (*args, *kwargs.values())
        same = (arch, name, *(str(value.dtype if isinstance(value, torch.Tensor) else value) for value in values))
        if same in known or (only and name not in ONLY[only]):
            continue
        known.add(same)
        variant = "k" if kwargs.get("IS_KEY") else "q" if "IS_KEY" in kwargs else "paper" * kwargs.get("PAPER", False)
        variant = f"{variant}{' packed' * kwargs.get('PACKED', False)}".strip()
        tile = {key: kwargs[key] for key in TILE if key in kwargs}
        about = {"kernel": name, "arch": f"sm_{arch}", "precision": precision, "block": block, "head_dim": head_dim}
        row = about | {"dtype": dtype, "variant": variant, **{key.lower(): value for key, value in tile.items()}}
        if isinstance(kernel, NativeCall):
            row |= {"triton": None, "nvrtc": native.compiler()}
        rows.append(row | counts(compiled(kernel, args, kwargs, arch)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHES)
    parser.add_argument("--only", nargs="+", default=PRECISIONS, help="precisions")
    parser.add_argument("--block", nargs="+", default=BLOCKS)
    parser.add_argument("--head-dim", type=int, nargs="+", default=HEADS)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of q, k and v")
    which = parser.add_mutually_exclusive_group()
    for name, what in (
        ("attention", "the attention kernels only"), ("stats", "the statistics' kernel only"),
        ("gradients", "the gradients' kernels only"), ("native", "the kernels in CUDA C++ only"),
    ):  # fmt: skip
        which.add_argument(f"--{name}", dest="kernel", action="store_const", const=name, help=what)
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines and write no file")
    options = parser.parse_args()
    about = environment() | {"device": "none, compiled only", "triton": triton.__version__}
    rows, known = [], set()
    for arch, precision, block, head_dim in product(options.arch, options.only, options.block, options.head_dim):
        if precision.endswith("fp8") and arch < 89:
            continue
        for row in report(arch, precision, block, head_dim, options.dtype, options.kernel, known):
            rows.append(about | row)
            print(json.dumps(row) if options.json else _line(row), flush=True)
    if not options.json:
        merge(OUT, rows, KEY)


def _line(row: dict[str, Any]) -> str:
    tile = " ".join(str(row.get(name, "")) for name in ("rows", "num_warps", "num_stages", "stages"))
    tile += " tma" * row.get("descriptors", False)
    about = (
        f"{row['kernel']:7}{row['variant']:6}{row['arch']:6} {row['precision']:10} {row['block']:8} {row['head_dim']:4}"
    )
    return f"{about} {tile:12}" + "".join(
        f" {name} {row[name]:<5}" for name in ("registers", "spilled_bytes", "shared_bytes", *COUNTED)
    )


if __name__ == "__main__":
    sys.exit(main())
