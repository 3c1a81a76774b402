"""What every ingredient of INT8 and INT4 attention brings, on the bundled model's own q, k and v.

    python benchmarks/numerics.py --out benchmarks/results/numerics_cpu.json

One prompt, four noise levels, every layer and head, three blocks of query rows each, all keys, the model's own order.
The figure is the signal-to-noise ratio of the attention output against float32, one product quantised, the other exact.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from paroattn.demo.pipeline import load_demo, weights_sha256
from paroattn.demo.prompt import EVALUATION_PROMPTS
from paroattn.integration.apply import recording
from paroattn.integration.generate import run
from paroattn.kernels import four_bits
from paroattn.precision import FORMATS, Format, dequantize, hadamard, quantize, round_to
from records import environment, merge

BLOCK = 64
ROWS = torch.cat([torch.arange(start, start + BLOCK) for start in (192, 1280, 2624)])
KEY = ("product", "format", "variant")
PROMPT, SEED, STEPS = EVALUATION_PROMPTS[1], 5, 4


def captured() -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k, v (H, N, D) of every layer and step."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def observe(layer: str, attn: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> None:
        found.append((q[0].transpose(0, 1).clone(), k[0].transpose(0, 1).clone(), v[0].transpose(0, 1).clone()))

    pipe = load_demo()
    with recording(pipe, observe):
        run(pipe, PROMPT, SEED, steps=STEPS, guidance_scale=1.0)
    return found


def rounded(x: Tensor, form: Format, granularity: str) -> Tensor:
    return dequantize(*quantize(x, form, granularity, BLOCK if granularity == "block" else None))


def scores(q: Tensor, k: Tensor, form: Format, q_by: str, k_by: str, smooth: bool, rotate: bool) -> Tensor:
    """q kᵀ / √D of the sampled rows with both operands quantised."""
    k = k - k[:, ::8].mean(1, keepdim=True) if smooth else k
    rotation = hadamard(q.shape[-1]).to(q) if rotate else torch.eye(q.shape[-1])
    return rounded(q @ rotation, form, q_by)[:, ROWS] @ rounded(k @ rotation, form, k_by).mT * q.shape[-1] ** -0.5


QK = {
    "block, block (the paper)": ("block", "block", False, False),
    "+ K's mean subtracted": ("block", "block", True, False),
    "+ rotation": ("block", "block", True, True),
    "+ Q by token": ("token", "block", True, True),
    "+ K by token": ("token", "token", True, True),
}
SHIPPED = {
    ("QK", "int8"): "+ Q by token",
    ("QK", "int4"): "+ middles of 32 keys, K by block",
    ("PV", "int8"): "+ unsigned",
    ("PV", "int4"): "+ V's errors carried on",
}


def weights(s: Tensor, form: Format, shared: str) -> Tensor:
    """exp(s − row maximum), quantised with one scale for what is `shared`."""
    tokens, largest = s.shape[-1], s.amax(-1, keepdim=True)
    p = pad((s - largest).exp(), (0, -tokens % BLOCK))
    tiles = p.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # (H, Nq, bq, Nk, bk)
    dims = {"row": (-2, -1), "block": (-3, -1), "row in block": (-1,)}[shared]
    assert form.highest is not None
    top = tiles.amax(dims, keepdim=True).clamp_min(1e-30)
    stored = round_to(tiles / top * form.highest, form)
    return (stored * top / form.highest).flatten(-2).flatten(1, 2)[..., :tokens]


PV = {
    "one scale a row": ("row", "{}"),
    "a block of 64×64 (the paper)": ("block", "{}"),
    "a row within the block": ("row in block", "{}"),
    "+ unsigned": ("row in block", "u{}"),
}


def variants(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[tuple[str, str, str], Tensor]]:
    """(product, format, variant) and the attention output of the sampled rows."""
    exact = q[:, ROWS] @ k.mT * q.shape[-1] ** -0.5
    for form in ("int8", "int4"):
        for name, settings in QK.items():
            yield ("QK", form, name), torch.softmax(scores(q, k, FORMATS[form], *settings), -1) @ v
        v_hat = rounded(v, FORMATS[form], "channel")
        for name, (shared, pattern) in PV.items():
            p = weights(exact, FORMATS[pattern.format(form)], shared)
            yield ("PV", form, name), p @ v_hat / p.sum(-1, keepdim=True)
        p = weights(exact, FORMATS[f"u{form}"], "row in block")
        yield (
            ("PV", form, "+ unsigned, exact denominator"),
            p @ v_hat / torch.exp(exact - exact.amax(-1, keepdim=True)).sum(-1, keepdim=True),
        )


def only_in_four_bits(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    """(product, variant) and the attention output of the sampled rows; see `four_bits`."""
    rotation, scale = hadamard(q.shape[-1]).to(q), q.shape[-1] ** -0.5
    q_, k_ = q @ rotation, (k - k[:, ::8].mean(1, keepdim=True)) @ rotation
    for_keys, for_queries = (four_bits.feedback(x[:, :: four_bits.SAMPLE_OF_EVERY]) for x in (q_, k_))
    q_hat = dequantize(*four_bits.round_queries(q_, for_queries))[:, ROWS] * scale
    by_token = dequantize(*four_bits.round_queries(k_, for_keys))
    yield "QK", "+ errors fed back to other channels", torch.softmax(q_hat @ by_token.mT, -1) @ v
    by_block = dequantize(*four_bits.round_keys(k_, for_keys, BLOCK))
    yield "QK", SHIPPED["QK", "int4"], torch.softmax(q_hat @ by_block.mT, -1) @ v
    s = q[:, ROWS] @ k.mT * scale
    tiles = pad(s, (0, -s.shape[-1] % BLOCK), value=-torch.inf).unflatten(-1, (-1, BLOCK))
    top = tiles.amax(-1, keepdim=True)
    stored = four_bits.round_weights((tiles - top).exp() * 15, BLOCK)
    p = (stored * (top - s.amax(-1)[..., None, None]).exp()).flatten(-2)[..., : s.shape[-1]]
    for name, v_hat in (
        ("+ errors carried on to later keys", rounded(v, FORMATS["int4"], "channel")),
        ("+ middles of 16 values", dequantize(*four_bits.round_values(v, 0.0, 0.0))),
        (SHIPPED["PV", "int4"], dequantize(*four_bits.round_values(v))),
    ):
        yield "PV", name, p @ v_hat / p.sum(-1, keepdim=True)


def ratio(exact: Tensor, got: Tensor) -> float:
    return 20 * (exact.norm() / (exact - got).norm()).log10().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for q, k, v in captured():
        exact = torch.softmax(q[:, ROWS] @ k.mT * q.shape[-1] ** -0.5, -1) @ v
        for key, output in variants(q, k, v):
            found[key].append(ratio(exact, output))
        for product, name, output in only_in_four_bits(q, k, v):
            found[product, "int4", name].append(ratio(exact, output))
    about = environment() | {"weights_sha256": weights_sha256()}
    rows = [
        dict(zip(KEY, key, strict=True))
        | {
            "shipped": SHIPPED[key[:2]] == key[2],
            "sqnr_db": round(sum(each) / len(each), 2),
            "sqnr_db_min": round(min(each), 2),
        }
        | {"maps": len(each)}
        | about
        for key, each in found.items()
    ]
    merge(args.out, rows, KEY)
    for row in rows:
        figures = f"{row['sqnr_db']:6.2f} dB, lowest {row['sqnr_db_min']:6.2f}"
        print(f"{row['product']} {row['format']:5} {row['variant']:34} {figures}")


if __name__ == "__main__":
    main()
