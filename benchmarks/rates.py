"""Derives the rates that all predictions of times rest on from the result files: python benchmarks/rates.py [--check].

    kernels     attention_GPU.json, rows of the kernel alone: a constant, a row of blocks, a kept block. Where one
                length was measured only, the constant is that of the others. bf16 is the best of the variants of
                kernel_variants_GPU.json, for which only the kept block is fitted
    preparing   prepare_GPU.json, eight bits and four: a constant for each head dimension, and bytes
    dense       cuDNN's rows of attention_GPU.json and the dense rows of end_to_end_GPU.json
    linear      end_to_end_GPU.json, FLOPs of the linear layers over the time of their kernels
    around      the same rows: what is left of the whole time, by model, eager and compiled
    launching   rows in which the GPU waits for launches for 30 % of the time; the fits above leave them out

All are least squares of the relative error. `worst` in the output is the largest one over the rows behind each rate.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from paroattn.block_mask import blocks_of, parse_block
from paroattn.plan.cost import MODES, Rates, launching, moved_bytes, read_rates
from paroattn.plan.workloads import Workload
from predictions import forward_ms, model_of, predictable
from tables import ROOT, rows_of

OUT = ROOT / "src" / "paroattn" / "plan" / "rates.json"
GPUS = {"h200": "NVIDIA H200"}
DIGITS = 5
WAITING = 0.3
"""Share of a forward without any kernel from which it is launches that take the time."""


def fitted(columns: Sequence[Sequence[float]], times: Sequence[float]) -> list[float]:
    """Coefficients, none below 0, of the columns whose sum is nearest to the times, errors taken relative to them."""
    used = list(range(len(columns)))
    while True:
        matrix = torch.tensor([columns[i] for i in used], dtype=torch.float64).T
        aim = torch.tensor(times, dtype=torch.float64)
        found = torch.linalg.lstsq(matrix / aim[:, None], torch.ones(len(aim), 1, dtype=torch.float64)).solution[:, 0]
        if (found >= 0).all():
            values = dict(zip(used, found.tolist(), strict=True))
            return [values.get(i, 0.0) for i in range(len(columns))]
        used.remove(used[int(found.argmin())])


def significant(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def kernels(gpu: str) -> list[dict[str, Any]]:
    rows = [
        row for row in rows_of(f"attention_{gpu}")
        if row["impl"] == "paroattn" and row["includes"] == "kernel" and row["ms"]
    ]  # fmt: skip
    kinds = sorted({(row["head_dim"], row["precision"], row["block"]) for row in rows})
    found, launches = {}, []
    for several in (True, False):
        for kind in kinds:
            mine = [row for row in rows if (row["head_dim"], row["precision"], row["block"]) == kind]
            if (len({row["tokens"] for row in mine}) > 1) != several:
                continue
            times = [row["ms"] for row in mine]
            row_counts = [rows_of_blocks(row) for row in mine]
            counts = [kept(row) for row in mine]
            if several:
                found[kind] = fitted([[1.0] * len(mine), row_counts, counts], times)
                launches.append(found[kind][0])
            else:
                launch = sum(launches) / len(launches)
                found[kind] = [launch, *fitted([row_counts, counts], [time - launch for time in times])]
    found |= bf16_kernels(gpu, sum(launches) / len(launches))
    return [
        {
            "head_dim": head_dim, "precision": precision, "block": block, "launch_ms": significant(launch),
            "row_ns": significant(row * 1e6), "block_ns": significant(each * 1e6),
        }
        for (head_dim, precision, block), (launch, row, each) in found.items()
    ]  # fmt: skip


def bf16_kernels(gpu: str, launch: float) -> dict[tuple, list[float]]:
    rows = [row for row in rows_of(f"kernel_variants_{gpu}") if row["precision"] == "bf16/bf16"]
    found: dict[tuple, list[float]] = {}
    for row in sorted(rows, key=lambda row: -row["ms"]):  # the fastest is what is left
        found[row["head_dim"], row["precision"], row["block"]] = [launch, 0.0, (row["ms"] - launch) / kept(row)]
    return found


def rows_of_blocks(row: dict) -> float:
    return row["heads"] * blocks_of(row["tokens"], parse_block(row["block"])[0])


def kept(row: dict) -> float:
    columns = blocks_of(row["tokens"], parse_block(row["block"])[1])
    return row["density"] * rows_of_blocks(row) * columns


def preparing(gpu: str) -> list[dict[str, Any]]:
    found = []
    for bits in (8, 4):
        rows = [row for row in rows_of(f"prepare_{gpu}") if ("int4" in row["precision"]) == (bits == 4)]
        head_dims = sorted({row["head_dim"] for row in rows}, reverse=True)
        columns = [[float(row["head_dim"] == each) for row in rows] for each in head_dims]
        *constants, each = fitted([*columns, [moved(row) for row in rows]], [row["ms"] for row in rows])
        found += [
            {"bits": bits, "head_dim": head_dim, "constant_ms": significant(ms), "byte_ps": significant(each * 1e9)}
            for head_dim, ms in zip(head_dims, constants, strict=True)
        ]
    return found


def moved(row: dict) -> float:
    """Bytes of q, k and v before and after."""
    elements = row["batch"] * row["tokens"] * row["heads"] * row["head_dim"]
    return elements * moved_bytes(row["precision"])


def forwards(gpu: str) -> list[tuple[dict, Workload]]:
    """Rows of whole forwards that a profile was taken of, each with its model."""
    rows = [row for row in rows_of(f"end_to_end_{gpu}") if row["ms"] and row["attention_ms"] and predictable(row)]
    return [(row, model_of(row)[0]) for row in rows if not waits(row)]


def waits(row: dict) -> bool:
    """Whether the GPU waits for launches for much of a forward."""
    return bool(row.get("gaps_ms")) and row["gaps_ms"] > WAITING * row["ms"]


def launches(gpu: str) -> dict[str, float]:
    """What a layer takes at least, where the GPU waits."""
    rows = [row for row in rows_of(f"end_to_end_{gpu}") if row["ms"] and waits(row)]
    return {
        launching(MODES[row["compiled"]], row["fp8_linears"]): significant(row["ms"] / row["depth"]) for row in rows
    }


def dense(gpu: str) -> list[dict[str, Any]]:
    """Work in pairs and channels, times in ms. Cross-attention counts as the same work."""
    samples = [
        (row["head_dim"], row["tokens"], float(row["batch"] * row["heads"] * row["head_dim"]) * row["tokens"] ** 2,
         row["ms"])
        for row in rows_of(f"attention_{gpu}") if row["impl"] == "cudnn" and row["ms"]
    ]  # fmt: skip
    for row, model in forwards(gpu):
        if row["impl"] != "paroattn":
            work = row["depth"] * row["batch"] * row["tokens"] * model.width * (row["tokens"] + model.cross_text)
            samples.append((row["head_dim"], row["tokens"], float(work), row["attention_ms"]))
    found = []
    for head_dim in sorted({sample[0] for sample in samples}, reverse=True):
        _, tokens, work, times = zip(*(each for each in samples if each[0] == head_dim), strict=True)
        if len(set(tokens)) > 2:
            columns = [work, [w * math.log2(n) for w, n in zip(work, tokens, strict=True)]]
        else:  # one length: as it grows with the length at the other head dimension
            share = found[0]["octave_ps"] / found[0]["pair_ps"]
            columns = [[w * (1 + share * math.log2(n)) for w, n in zip(work, tokens, strict=True)]]
        pair, *octave = (each * 1e9 for each in fitted(columns, times))
        octave = octave[0] if octave else pair * found[0]["octave_ps"] / found[0]["pair_ps"]
        found.append({"head_dim": head_dim, "pair_ps": significant(pair), "octave_ps": significant(octave)})
    return found


def linears(gpu: str) -> dict[str, float]:
    rates = {}
    for name, fp8 in (("bf16", False), ("fp8", True)):
        mine = [(row, model) for row, model in forwards(gpu) if row["fp8_linears"] == fp8]
        work = [row["batch"] * row["depth"] * model.linear_flops(row["tokens"]) for row, model in mine]
        (ms,) = fitted([work], [row["linear_ms"] for row, _ in mine])
        rates[name] = significant(1e-9 / ms)
    return rates


def around(gpu: str, rates: Rates) -> tuple[dict[str, dict[str, float]], float]:
    """What is left by model and mode, and what FP8 activations add, so that whole forwards come out right."""
    left: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    added: list[tuple[float, float, float]] = []
    rows = sorted(forwards(gpu), key=lambda each: each[0]["fp8_linears"])
    for row, model in rows:
        elements = row["batch"] * row["depth"] * row["tokens"] * model.width
        other = row["ms"] - forward_ms(rates, row)
        mode = MODES[row["compiled"]]
        if row["fp8_linears"]:
            added.append((elements, other - elements * 1e-9 * best(left[mode, model.name]), row["ms"]))
        else:
            left.setdefault((mode, model.name), []).append((elements, other, row["ms"]))
    by_mode = {
        mode: {name: significant(best(found)) for (each, name), found in sorted(left.items()) if each == mode}
        for mode in MODES
    }
    return by_mode, significant(best(added))


def best(found: Iterable[tuple[float, float, float]]) -> float:
    """Picoseconds an element, so that the squares of errors relative to the whole are least."""
    found = list(found)
    above = sum(elements * other / whole**2 for elements, other, whole in found)
    return 1e9 * above / sum((elements / whole) ** 2 for elements, _, whole in found)


def derived(gpu: str) -> dict[str, Any]:
    rows = rows_of(f"attention_{gpu}")
    found = {
        "measured": sorted({f"PyTorch {row['torch']}, Triton {row['triton']}, {row['date']}" for row in rows}),
        "kernels": kernels(gpu),
        "preparing": preparing(gpu),
        "dense": dense(gpu),
        "linear_tflops": linears(gpu),
        "around_ps": {mode: {"none": 0.0} for mode in MODES},
        "fp8_activations_ps": 0.0,
        "launching_ms": launches(gpu),
        "copy_tb_per_s": significant(max(row["copy_tb_per_s"] for row in rows_of(f"prepare_{gpu}"))),
    }
    found["around_ps"], found["fp8_activations_ps"] = around(gpu, read_rates(GPUS[gpu], found))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the packaged rates are out of date")
    args = parser.parse_args()
    text = json.dumps({name: derived(gpu) for gpu, name in GPUS.items()}, indent=1) + "\n"
    stale = not OUT.exists() or OUT.read_text() != text
    if stale and not args.check:
        OUT.write_text(text)
    print(f"{OUT.name}: {'out of date' if stale and args.check else 'written' if stale else 'up to date'}")
    return int(args.check and stale)


if __name__ == "__main__":
    sys.exit(main())
