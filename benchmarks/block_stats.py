"""Time of the calibration statistics on a GPU: python benchmarks/block_stats.py [--shape wan-14b-720p].

orders: all candidate orders (the six axis orders, or ten with the tiles) on one query block in 16, to choose orders.
masks: one given order per head on all query blocks, to make the masks. A row is one self-attention, the whole call from
q, k and v in the model's order. Before it is timed, a sample of its query blocks is compared with float64 on the same
inputs: attention that is local in the video, of another reach along each axis in every head.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from paroattn.block_mask import blocks_of, parse_block
from paroattn.capture import BlockStats
from paroattn.grid import ORDERS, TILES, Grid, Layout, TextSpan
from paroattn.kernels.block_stats import block_stats
from records import environment, merge
from timing import medians

RESULT = Path(__file__).parent / "results" / "block_stats.json"
KEY = ("device", "shape", "mode", "orders", "block", "paper")
SHAPES = {
    "wan-14b-720p": (40, 128, Layout(Grid(21, 45, 80))),
    "wan-14b-480p": (40, 128, Layout(Grid(21, 30, 52))),
    "cogvideox-5b": (48, 64, Layout(Grid(13, 30, 45), TextSpan(226, "prefix"))),
    "hunyuanvideo-720p": (24, 128, Layout(Grid(33, 45, 80), TextSpan(256, "suffix"))),
}
BLOCKS = ("128x128", "64x128", "64x64")
MODES = {"orders": ORDERS, "orders and tiles": ORDERS + TILES, "masks": ORDERS + TILES}
STRIDE = 16
CHECKED = 3
TOLERANCE = {"error": 0.02, "mass": 0.01}


def inputs(heads: int, dim: int, layout: Layout) -> tuple[Tensor, ...]:
    """q, k, v (1, N, H, D) in bf16 and W_o (H, D, 5120): random Fourier features of each token's place, and noise."""
    generator = torch.Generator("cuda").manual_seed(0)
    noise = partial(torch.randn, generator=generator, device="cuda")
    sides = torch.meshgrid(*(torch.linspace(-1, 1, size, device="cuda") for size in layout.grid), indexing="ij")
    places = torch.stack(sides, -1).flatten(0, 2)
    places = torch.cat([places, 2 * noise(layout.text.tokens, 3)])
    if layout.text.side == "prefix":
        places = places.roll(layout.text.tokens, 0)
    q, k, v = (torch.empty(1, layout.tokens, heads, dim, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    for head in range(heads):
        reach = 2 ** (4 * torch.rand(3, 1, generator=generator, device="cuda"))
        phases = places @ (reach * noise(3, dim // 2))
        features = torch.cat([phases.cos(), phases.sin()], 1)
        for x, share in ((q, 1.5), (k, 1.0), (v, 1.0)):
            x[0, :, head] = share * features + 0.5 * noise(layout.tokens, dim) + (1.0 if x is v else 0.0)
    return q, k, v, noise(heads, dim, 5120) / 64


def check(got: BlockStats, tensors: tuple[Tensor, ...], settings: dict[str, Any], block: tuple[int, int]) -> float:
    """Compare some query blocks of the first order with float64; the largest relative error of E that counts."""
    q, k, v, w_o = tensors
    rows = blocks_of(settings["layout"].grid.tokens, block[0])
    settings = settings | {"paper": False, "impl": "torch"}
    if got.rows is None:
        settings["block_stride"] = rows // CHECKED
    else:
        settings["orders"] = settings["orders"][:1]
    expected = block_stats(q.double(), k.double(), v.double(), w_o.double(), block=block, **settings)
    worst = {}
    for name, limit in TOLERANCE.items():
        found, wanted = (getattr(each, name)[0] for each in (got, expected))
        found = found[:, expected.rows] if got.rows is None else found
        counted = wanted >= 1e-4 * wanted.sum((1, 2), keepdim=True)
        worst[name] = float(((found - wanted).abs() / wanted)[counted].max())
        if not worst[name] < limit:
            raise RuntimeError(f"{name} must agree with float64 to {limit:.0%}; it is off by {worst[name]:.2%}")
    return worst["error"]


def measure(shape: str, mode: str, block: str, paper: bool, rounds: int) -> dict[str, Any]:
    """A result row."""
    heads, dim, layout = SHAPES[shape]
    tensors, sizes = inputs(heads, dim, layout), parse_block(block)
    settings: dict[str, Any] = {"layout": layout, "orders": MODES[mode], "paper": paper}
    if mode == "masks":
        settings["order"] = torch.arange(heads) % len(MODES[mode])
    else:
        settings["block_stride"] = STRIDE
    call = partial(block_stats, *tensors, block=sizes, **settings)
    got = call()
    worst = check(got, tensors, settings, sizes)
    ms = medians({"call": call}, rounds, 1)["call"]
    measured = got.mass.shape[0] * got.mass.shape[2] * sizes[0]
    del got
    return environment("cuda") | {
        "triton": triton.__version__, "shape": shape, "batch": 1, "heads": heads, "tokens": layout.tokens,
        "head_dim": dim, "impl": "triton", "precision": "bf16/bf16", "block": block, "mode": mode,
        "orders": 1 if mode == "masks" else len(MODES[mode]), "block_stride": settings.get("block_stride", 1),
        "paper": paper, "ms": round(ms, 1), "tflops": round(8 * measured * layout.tokens * dim * heads / ms / 1e9),
        "error_off": round(worst, 5), "includes": "call: reorder, project, both passes",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--mode", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--block", nargs="+", default=["128x128"], choices=BLOCKS)
    parser.add_argument("--paper", action="store_true", help="with what only the paper's score needs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT, help="result file to merge the rows into")
    args = parser.parse_args()
    for shape in args.shape:
        for mode in args.mode:
            for block in args.block:
                row = measure(shape, mode, block, args.paper, args.rounds)
                print(f"{shape}, {mode}, {block}: {row['ms']:.1f} ms, {row['tflops']} TFLOP/s", flush=True)
                merge(args.out, [row], KEY)


if __name__ == "__main__":
    main()
