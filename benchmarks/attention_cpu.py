"""The CPU path against PyTorch's dense attention: python benchmarks/attention_cpu.py [--tokens 4096,8190] [--write].

Every row is checked against the float64 reference on a sample of heads before it is timed, and timed in turns with the
dense call. Each head has its own order; masks are uneven over heads and rows, as planned ones are: heads of different
reach around the diagonal, columns that most rows read, rows that read more than others, and noise. The machine must
have nothing else to do: a row during which this process got less than 90 % of its threads' time is measured again, up
to --tries times, and never written.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from paroattn.block_mask import BlockMask, blocks_of, parse_block
from paroattn.grid import ORDERS, Grid, Layout
from paroattn.kernels.attention import attention
from records import environment, merge
from timing import medians

RESULT = Path(__file__).parent / "results" / "attention_cpu.json"
KEY = ("device", "heads", "head_dim", "tokens", "density", "block", "precision")
HEADS, HEAD_DIM = 6, 64
GRIDS = {4096: Grid(16, 16, 16), 8190: Grid(13, 21, 30)}
DENSITIES = (1.0, 0.5, 0.25, 0.2)
BLOCKS = ("64x64", "128x128")
REACH = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
LEAST_SHARE = 0.9


def uneven_mask(tokens: int, density: float, block: tuple[int, int], seed: int = 0) -> BlockMask:
    """A mask whose blocks exceed one threshold over all heads, the diagonal always kept."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (blocks_of(tokens, size) for size in block)
    distance = (torch.linspace(0, 1, rows)[:, None] - torch.linspace(0, 1, columns)).abs()
    weight = -distance / torch.tensor(REACH)[:, None, None]
    for scale, shape in ((3.0, (HEADS, 1, columns)), (1.5, (HEADS, rows, 1)), (1.0, (HEADS, rows, columns))):
        weight += scale * torch.randn(shape, generator=generator)
    weight[:, distance <= distance.amin(1, keepdim=True)] = torch.inf
    kept = torch.zeros(weight.numel(), dtype=torch.bool)
    kept[weight.flatten().topk(round(density * weight.numel())).indices] = True
    return BlockMask.from_dense(kept.view_as(weight), block)


def check(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, table: Tensor, got: Tensor, head: int) -> None:
    """Compare one head with a float64 softmax under the token mask, on every fifth query."""
    index = table[head].long()
    sample = torch.arange(0, len(index), 5)
    rows, columns = (
        tokens // size for tokens, size in ((sample, mask.block[0]), (torch.arange(len(index)), mask.block[1]))
    )
    q_, k_, v_ = (x[0, :, head].double()[index] for x in (q, k, v))
    scores = (q_[sample] @ k_.T * HEAD_DIM**-0.5).masked_fill(~mask.dense()[head][rows][:, columns], -torch.inf)
    worst = (got[0, index[sample], head] - scores.softmax(-1) @ v_).abs().max().item()
    if not worst < 1e-5:
        raise RuntimeError(f"the CPU path must agree with float64 to 1e-5; it is off by {worst:.1e}")


def measure(tokens: int, density: float, block: str, rounds: int) -> tuple[dict, float]:
    """A result row, and the share of its threads' time that this process got meanwhile."""
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(1, tokens, HEADS, HEAD_DIM, generator=generator) for _ in range(3))
    table, order = Layout(GRIDS[tokens]).table(ORDERS), torch.arange(HEADS)
    mask = uneven_mask(tokens, density, parse_block(block))
    dense_q, dense_k, dense_v = (x.transpose(1, 2) for x in (q, k, v))
    calls: dict[str, Callable[[], Any]] = {
        "dense": lambda: scaled_dot_product_attention(dense_q, dense_k, dense_v),
        "sparse": lambda: attention(q, k, v, mask, table=table, order=order, precision="fp32", impl="cpu"),
    }
    got = calls["sparse"]()
    for head in (0, HEADS - 1):
        check(q, k, v, mask, table, got, head)
    wall, processor = time.perf_counter(), time.process_time()
    times = medians(calls, rounds)
    share = (time.process_time() - processor) / (time.perf_counter() - wall) / torch.get_num_threads()
    row = environment() | {
        "heads": HEADS, "head_dim": HEAD_DIM, "tokens": tokens, "density": density,
        "density_executed": round(mask.density, 4), "block": block, "precision": "fp32",
        "ms": round(times["sparse"], 1), "dense_ms": round(times["dense"], 1),
        "speedup": round(times["dense"] / times["sparse"], 2),
        "includes": "call: reorder, attend, restore order",
    }  # fmt: skip
    return row, share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")], default=list(GRIDS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--write", action="store_true", help="merge the rows into benchmarks/results/attention_cpu.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for tokens, block, density in itertools.product(args.tokens, BLOCKS, DENSITIES):
        for _ in range(args.tries):
            row, share = measure(tokens, density, block, args.rounds)
            print(f"{tokens} tokens, {block}, density {row['density_executed']:.3f}: {row['ms']:.1f} ms,", end=" ")
            print(
                f"dense {row['dense_ms']:.1f} ms, {row['speedup']:.2f}×, share of the threads {share:.0%}", flush=True
            )
            if share >= LEAST_SHARE:
                if args.write:
                    merge(RESULT, [row], KEY)
                break


if __name__ == "__main__":
    main()
