"""Attention at shapes of real models, ours and others': python benchmarks/attention.py --shape wan-14b-480p --out FILE.

Every call is checked first: 64 blocks of queries over all heads, the ragged end and text, against float64 on the same
inputs. What is further off than its precision allows is not timed. Times are medians of rounds in which all calls take
turns, by events on the GPU. Rows are merged into FILE by key; a row without a time never replaces one with a time.

    includes "call"    everything: ours reorders, smooths, quantises, expands the mask, attends, restores the order
    includes "kernel"  ours on operands prepared before: expands the mask, attends, restores the order

Each head of ours reads its tokens in its own order. Other implementations get the same mask over tokens in the model's
order, so that they reorder nothing; peers.py says what is timed. FLOPs are those of kept pairs of real tokens.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from paroattn.block_mask import blocks_of, parse_block
from paroattn.kernels.attention import attention
from paroattn.precision import Precision
from peers import PEERS, Case, Missing
from records import environment, merge, significant
from shapes import DRAWN, SHAPES, Shape, block_mask, draw, kept_pairs, reachable, tensors, text_blocks
from timing import gpu_medians, medians

OURS, BASELINE = "paroattn", "cudnn"
IMPLS = {OURS: "triton", "paroattn-sm90": "sm90"}
"""Ours, and the `impl` that each is. A GPU other than Hopper has reasons instead of times for the second."""
KEY = ("device", "shape", "impl", "precision", "block", "mask", "density", "includes")
NUMBERS = ("ms", "useful_tflops", "speedup_vs_cudnn")
MAIN_BLOCK = {64: "64x128", 128: "128x128"}
"""By head dimension, where everything is measured; at other blocks the first precision and even masks only."""
SAMPLES = 64
LARGEST_ERROR = {"bf16": 0.005, "fp16": 0.005, "int8": 0.05, "fp8": 0.06, "fp8/fp8": 0.25, "int4": 0.6}
"""Of a sampled block, by its precision, else by its coarser format: the norm of the difference over the norm of what is
right. On these inputs right kernels are off by 0.002 (bf16/bf16), 0.032 (int8/int8), 0.042 (int8/fp8) and 0.043
(int8/fp16) on a GPU. INT4 errs by up to 0.45 in the reference too; rounding q, k, P and v to FP8, k with its mean,
errs by up to 0.15 in arithmetic that is otherwise exact: random heads of sharp attention are the worst for few bits."""


@dataclass(frozen=True)
class Choice:
    """What to measure of a shape."""

    impls: tuple[str, ...] = (*IMPLS, *PEERS)
    densities: tuple[float, ...] = (1.0, 0.5, 0.3, 0.2, 0.1)
    masks: tuple[str, ...] = ("even", "uneven")
    precisions: tuple[str, ...] = ("int8/fp8", "int8/int8")
    blocks: tuple[str, ...] = ("128x128", "64x128", "64x64")


@dataclass(frozen=True)
class Job:
    """One row to be: the fields that name it, and how to make the call that is timed.

    `make` takes the inputs and the kept blocks; the call gives (B, N, H, D). `reordered`: heads read in their orders.
    """

    impl: str
    precision: str
    block: str | None
    mask: str
    density: float
    includes: str
    make: Callable[["Inputs", Tensor], Callable[[], Tensor]]
    reordered: bool = False

    @property
    def about(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("make", "reordered")}


class Inputs:
    """Tensors, masks and orders of a shape, each made once, and what is right for some blocks of queries."""

    def __init__(self, shape: Shape, device: str):
        self.shape, self.device = shape, device
        q, k, v = tensors(shape, device)
        self.model = (q, k, v)
        self.heads_first = (heads_first(q), heads_first(k), heads_first(v))
        self.table, self.order = shape.orders(device)
        self.samples = samples(shape)
        self.prepared: dict[tuple[Precision, tuple[int, int], str], Prepared] = {}
        self._kept: dict[tuple[str, float], Tensor] = {}
        self._right: dict[tuple[str, float, bool], list[Tensor]] = {}

    def kept(self, mask: str, density: float) -> Tensor:
        """Kept blocks, as `shapes.draw` gives them."""
        if (mask, density) not in self._kept:
            self._kept[mask, density] = draw(self.shape, density, mask, self.device)
        return self._kept[mask, density]

    def tokens_of(self, head: int, reordered: bool) -> Tensor:
        """Positions in the model of a head's tokens, in the order in which it reads them."""
        if reordered:
            return self.table[self.order[head].long()].long()
        return torch.arange(self.shape.tokens, device=self.device)

    def right(self, job: Job) -> list[Tensor]:
        """The sampled blocks in float64."""
        key = (job.mask, job.density, job.reordered)
        if key not in self._right:
            kept, found = self.kept(job.mask, job.density), []
            for b, head, block in self.samples:
                tokens = self.tokens_of(head, job.reordered)
                q, k, v = (x[b, tokens, head] for x in self.model)
                found.append(exact(q, k, v, kept[head, block], block))
            self._right[key] = found
        return self._right[key]

    def error(self, job: Job, out: Tensor) -> float:
        """Largest relative error of a sampled block of (B, N, H, D); not a number if any is."""
        errors = []
        for (b, head, block), right in zip(self.samples, self.right(job), strict=True):
            tokens = self.tokens_of(head, job.reordered)[block * DRAWN[0] : (block + 1) * DRAWN[0]]
            errors.append((out[b, tokens, head].double() - right).norm() / right.norm())
        return torch.stack(errors).max().item()


def heads_first(x: Tensor) -> Tensor:
    """(B, N, H, D) → contiguous (B, H, N, D)."""
    return x.transpose(1, 2).contiguous()


def samples(shape: Shape) -> list[tuple[int, int, int]]:
    """Blocks to check, (batch element, head, block of queries): both ends and where text begins, the others random."""
    blocks = blocks_of(shape.tokens, DRAWN[0])
    special = sorted({0, min(text_blocks(shape, DRAWN[0]), blocks - 1), blocks - 1})
    pairs = [(head, block) for block in special for head in range(0, shape.heads, -(-shape.heads // 5))]
    count = max(SAMPLES - len(pairs), shape.heads)
    others = torch.randint(blocks, (count,), generator=torch.Generator().manual_seed(2)).tolist()
    pairs += [(n % shape.heads, block) for n, block in enumerate(others)]
    return [(n % shape.batch, head, block) for n, (head, block) in enumerate(pairs)]


def exact(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block: int) -> Tensor:
    """One block of queries in float64, of q, k and v (N, D) in the order that `kept`, (Nk,), is about."""
    keys = kept.repeat_interleave(DRAWN[1])[: len(k)].nonzero()[:, 0]
    rows = q[block * DRAWN[0] : (block + 1) * DRAWN[0]].double()
    weights = (rows @ k[keys].double().T * q.shape[-1] ** -0.5).softmax(-1)
    return weights @ v[keys].double()


def jobs(shape: Shape, choice: Choice) -> Iterator[Job]:
    """All rows to be, the baseline first and whether chosen or not."""
    for name in dict.fromkeys((BASELINE, *choice.impls)):
        yield from own_jobs(name, shape, choice) if name in IMPLS else peer_jobs(name, choice)


def own_jobs(name: str, shape: Shape, choice: Choice) -> Iterator[Job]:
    """Ours: whole calls, and kernels alone."""
    for block, precision, mask, density in product(choice.blocks, choice.precisions, choice.masks, choice.densities):
        main = block == MAIN_BLOCK[shape.head_dim]
        if (main or (mask == "even" and precision == choice.precisions[0])) and (mask == "even" or density < 1):
            about = (name, precision, block, mask, density)
            formats, size, impl = Precision.parse(precision), parse_block(block), IMPLS[name]
            yield Job(*about, "call", partial(own_call, formats, size, impl=impl), reordered=True)
            yield Job(*about, "kernel", partial(own_kernel, formats, size, impl=impl), reordered=True)


def peer_jobs(name: str, choice: Choice) -> Iterator[Job]:
    """A peer: once if it is dense, else at every density."""
    peer = PEERS[name]
    for density in choice.densities if peer.block else (1.0,):
        yield Job(name, peer.precision, peer.block, "even", density, "call", partial(peer_call, name))


def peer_call(name: str, inputs: Inputs, kept: Tensor) -> Callable[[], Tensor]:
    call = PEERS[name].call(Case(inputs.model, inputs.heads_first, kept))
    return lambda: call().transpose(1, 2)


def own_call(
    precision: Precision, block: tuple[int, int], inputs: Inputs, kept: Tensor, impl: str = "triton"
) -> Callable[[], Any]:
    mask = block_mask(kept, inputs.shape.tokens, block)
    settings = {"table": inputs.table, "order": inputs.order, "precision": precision, "impl": impl}
    settings["text_tokens"] = inputs.shape.text.tokens
    return partial(attention, *inputs.model, mask, **settings)


def own_kernel(
    precision: Precision, block: tuple[int, int], inputs: Inputs, kept: Tensor, impl: str = "triton"
) -> Callable[[], Tensor]:
    from paroattn.kernels import sparse

    whole = own_call(precision, block, inputs, kept, impl)
    prepared = inputs.prepared.setdefault((precision, block, impl), Prepared())

    def call() -> Tensor:
        with patch.object(sparse, "prepare", prepared):
            return whole()

    return call


class Prepared:
    """Stands in for `prepare`: does its work at the first call and gives the same operands ever after."""

    def __init__(self):
        self.run: Callable[[], Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.run is None:
            from paroattn.kernels.prepare import prepare

            self.run = partial(prepare, *args, **kwargs)
            self.operands = self.run()
        return self.operands


def checked(inputs: Inputs, job: Job) -> Callable[[], Tensor]:
    """The call of a job, once it has given what is right.

    Raises:
        Missing: If it cannot run here, or is wrong.
    """
    start = time.perf_counter()
    try:
        call = job.make(inputs, inputs.kept(job.mask, job.density))
        error = inputs.error(job, call())
    except (Missing, ValueError):
        raise
    except Exception as failure:  # peers fail in ways of their own
        raise Missing(f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}") from failure
    allowed = LARGEST_ERROR.get(job.precision) or max(LARGEST_ERROR[form] for form in job.precision.split("/"))
    print(f"{label(job.about)} error {error:.4f} after {time.perf_counter() - start:.1f} s", flush=True)
    if not error <= allowed:
        raise Missing(f"off from float64 by {error:.2g}; at most {allowed:g} is allowed")
    return call


def measure(shape: Shape, choice: Choice, rounds: int = 15, device: str = "cuda") -> list[dict[str, Any]]:
    """Rows of one shape."""
    inputs, calls, reasons = Inputs(shape, device), {}, {}
    for job in jobs(shape, choice):
        try:
            calls[job] = checked(inputs, job)
        except (Missing, ValueError) as reason:
            reasons[job] = str(reason)
    times: dict[Job, float] = (gpu_medians if device.startswith("cuda") else medians)(calls, rounds)
    baseline = next((ms for job, ms in times.items() if job.impl == BASELINE), None)
    rows = [job.about | dict.fromkeys(NUMBERS) | {"reason": reason} for job, reason in reasons.items()]
    for job, ms in times.items():
        work = 4 * shape.head_dim * shape.batch * kept_pairs(inputs.kept(job.mask, job.density), shape.tokens)
        numbers = (ms, work / ms / 1e9, baseline and baseline / ms)
        rows.append(
            job.about | {name: value and significant(value) for name, value in zip(NUMBERS, numbers, strict=True)}
        )
    return [about(shape, device) | row for row in rows]


def about(shape: Shape, device: str) -> dict[str, Any]:
    """What all rows of a shape share."""
    names = ("batch", "tokens", "heads", "head_dim")
    versions = environment(device)
    if device.startswith("cuda"):
        import triton

        versions["triton"] = triton.__version__
    return versions | {"shape": shape.name, **dict(zip(names, shape.size, strict=True))}


def save(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Merge rows into a file; a row without a time leaves one with a time as it is."""
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    timed = {tuple(row[name] for name in KEY) for row in known if row["ms"] is not None}
    merge(path, [row for row in rows if row["ms"] is not None or tuple(row[name] for name in KEY) not in timed], KEY)


def label(row: dict[str, Any]) -> str:
    names = {"impl": 12, "precision": 9, "block": 7, "mask": 6, "density": 4, "includes": 6}
    return " ".join(f"{row[name] or 'dense':<{width}}" for name, width in names.items())


def described(row: dict[str, Any]) -> str:
    if row["ms"] is None:
        return f"{label(row)} {row['reason']}"
    faster = f"{row['speedup_vs_cudnn']:6.2f}×" if row["speedup_vs_cudnn"] else ""
    return f"{label(row)} {row['ms']:9.3f} ms {row['useful_tflops']:6.0f} TFLOP/s {faster}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Choice()
    parser.add_argument("--shape", nargs="+", choices=SHAPES, required=True)
    parser.add_argument("--impls", nargs="+", choices=default.impls, default=default.impls)
    parser.add_argument("--densities", nargs="+", type=float, default=default.densities)
    parser.add_argument("--masks", nargs="+", choices=default.masks, default=default.masks, help="ours")
    parser.add_argument("--precisions", nargs="+", default=default.precisions, help="ours, QK/PV")
    parser.add_argument("--blocks", nargs="+", default=default.blocks, help="ours, QUERYxKEY")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="result file to merge the rows into; without it they are only printed")
    options = parser.parse_args(arguments)
    choice = Choice(**{name: tuple(getattr(options, name)) for name in vars(default)})
    wrong = False
    for name in options.shape:
        print(f"{name}: {SHAPES[name].size}", flush=True)
        start = time.perf_counter()
        rows = measure(SHAPES[name], choice, options.rounds, options.device)
        if options.out:
            save(options.out, rows)
        print("\n".join(map(described, rows)), f"\n{time.perf_counter() - start:.0f} s", sep="", flush=True)
        for row in rows:
            least, most = reachable(SHAPES[name], row["mask"])
            wrong |= row["impl"] == OURS and row["ms"] is None and least <= row["density"] <= most
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
