"""How evenly heads are dealt to GPUs: python benchmarks/balance.py --out FILE. Counts kept blocks; runs nothing.

    in_order   heads in the model's order, as Ulysses deals them without a plan
    by_layer   one deal for all phases of a layer
    by_phase   another deal for every phase, which is what runs

Each is the mean, over layers and phases with their share of steps, of kept blocks of the busiest GPU over the mean of
all; `worst` is the largest of `by_phase`. Plans: the synthetic ones of end_to_end.py, one phase, at the shape of a real
model; and the one that ships, four phases.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from architectures import ARCHITECTURES, MAIN_BLOCK, Architecture
from paroattn.block_mask import blocks_of, parse_block
from paroattn.demo.pipeline import PLAN
from paroattn.plan.balance import Deal, contiguous_deal, deal_heads, imbalance, kept_blocks
from paroattn.plan.plan import Plan
from records import environment, merge
from synthetic_plan import layer_densities

KEY = ("plan", "density", "gpus")
DENSITIES = (0.5, 0.3, 0.2, 0.1)
GPUS = (2, 3, 4, 8)
Costs = list[list[list[int]]]
"""Kept blocks, [layer][phase][head]."""


def synthetic_costs(model: Architecture, density: float) -> Costs:
    """Kept blocks of a synthetic plan, without its masks."""
    rows, columns = (blocks_of(model.grid.tokens, size) for size in parse_block(MAIN_BLOCK[model.head_dim]))
    layers = []
    for seed in range(sum(model.depth)):
        shares = layer_densities(density, model.heads, torch.Generator().manual_seed(seed)).tolist()
        layers.append([[max(rows, round(share * rows * columns)) for share in shares]])
    return layers


def plans() -> Iterator[tuple[str, float, list[float], Costs]]:
    """Name, density, shares of the phases and kept blocks of every plan."""
    model = ARCHITECTURES["wan-14b-720p"]
    for density in DENSITIES:
        yield f"{model.name}, synthetic", density, [1.0], synthetic_costs(model, density)
    bundled = Plan.from_pretrained(PLAN)["transformer"]
    costs = [kept_blocks(layer.mask).tolist() for layer in bundled.layers.values()]
    yield "bundled model", round(bundled.density, 4), [phase.share for phase in bundled.phases], costs


def row(name: str, density: float, shares: Sequence[float], costs: Costs, gpus: int) -> dict[str, Any]:
    heads = len(costs[0][0])

    def one_for_all(layer: list[list[int]]) -> Deal:
        weighed = [sum(share * each[head] for share, each in zip(shares, layer, strict=True)) for head in range(heads)]
        return deal_heads(weighed, gpus)

    def mean(deal: Callable[[list[list[int]], list[int]], Deal]) -> float:
        found = (
            sum(share * imbalance(each, deal(layer, each)) for share, each in zip(shares, layer, strict=True))
            for layer in costs
        )
        return round(statistics.mean(found), 4)

    return environment() | {
        "plan": name, "density": density, "gpus": gpus, "layers": len(costs), "phases": len(shares), "heads": heads,
        "in_order": mean(lambda layer, each: contiguous_deal(heads, gpus)),
        "by_layer": mean(lambda layer, each: one_for_all(layer)),
        "by_phase": mean(lambda layer, each: deal_heads(each, gpus)),
        "worst": round(max(imbalance(each, deal_heads(each, gpus)) for layer in costs for each in layer), 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result file to merge the rows into")
    options = parser.parse_args()
    rows = [
        row(name, density, shares, costs, gpus)
        for name, density, shares, costs in plans()
        for gpus in GPUS
        if len(costs[0][0]) % gpus == 0
    ]
    for each in rows:
        print({name: each[name] for name in (*KEY, "in_order", "by_layer", "by_phase", "worst")})
    if options.out:
        merge(options.out, rows, KEY)


if __name__ == "__main__":
    main()
