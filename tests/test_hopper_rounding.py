"""Hopper's assembly for P in four bits, interpreted for every thread of a warp, against the reference."""

import re

import numpy as np
import pytest
import torch

from paroattn.kernels import four_bits

pytest.importorskip("triton", reason="Triton is not installed")
hopper = pytest.importorskip("paroattn.kernels.hopper", reason="Triton has no Gluon")
ALL = 0xFFFFFFFF


def halves(word: int) -> np.ndarray:
    return np.array([word & 0xFFFF, word >> 16], np.uint16).view(np.float16)


def word_of(pair: np.ndarray) -> int:
    low, high = pair.astype(np.float16).view(np.uint16).tolist()
    return low | high << 16


def bytes_picked(low: int, high: int, selector: int) -> int:
    both = low | high << 32
    return sum((both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i for i in range(4))


OPERATIONS = {
    "mov": lambda a: a,
    "cvt": lambda high, low: word_of(np.array([low, high], np.float32)),
    "fma": lambda a, b, c: word_of(halves(a).astype(np.float64) * halves(b) + halves(c)),
    "prmt": bytes_picked,
    "mad": lambda a, b, c: a * b + c & ALL,
    "add": lambda a, b: a + b & ALL,
    "sub": lambda a, b: a - b & ALL,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << b & ALL,
    "shr": lambda a, b: a >> b,
}


def interpreted(assembly: str, outputs: int, inputs: list, lane: int) -> list[int]:
    """What a thread gets for its inputs."""
    values: dict = {f"${outputs + i}": x for i, x in enumerate(inputs)} | {"%laneid": lane}
    for line in assembly.strip("{}\n ").splitlines():
        name, *operands = re.findall(r"[$%\w.]+", line)
        if not name.startswith("."):
            to, *given = operands
            values[to] = OPERATIONS[name.split(".")[0]](*(values[x] if x in values else int(x, 0) for x in given))
    return [values[f"${i}"] for i in range(outputs)]


@pytest.mark.parametrize("warp", [0, 3])
def test_every_thread_rounds_its_weights_as_the_reference_does(warp):
    generator = torch.Generator().manual_seed(warp)
    p = torch.rand(64, 64, generator=generator) ** 3
    p /= p.amax(1, keepdim=True)
    expected = four_bits.round_weights(15 * p[:, None].double(), 64)[:, 0]
    got = torch.full((64, 64), -1)
    for lane in range(32):
        rows = [16 * warp + lane // 4 + below for below in (0, 8)]
        columns = [[16 * h + 8 * g + 2 * (lane % 4) + i for g in range(2) for i in range(2)] for h in range(4)]
        words = [(row, columns[h]) for h in range(4) for row in rows]
        starts = {row: interpreted(hopper._STARTS.value, 1, [row], lane)[0] for row in rows}
        of_words = [starts[row] for row, _ in words for _ in range(4)]
        inputs = [p[row, column].item() for row, four in words for column in four] + [240.0] * 32
        found = interpreted(hopper._ROUND_TO_INT4.value, 8, inputs + of_words, lane)
        for (row, four), word in zip(words, found, strict=True):
            got[row, four] = torch.tensor([word >> 8 * i & 255 for i in range(4)])
    mine = slice(16 * warp, 16 * warp + 16)
    off = (got - expected)[mine].abs()
    assert off.max() <= 1 and off.mean() < 0.02  # half precision rounds some sixteenths otherwise
    assert got[mine].max() == 15 and len(got[mine].unique()) == 16
    assert (got - expected)[mine].unflatten(1, (4, 16)).sum(1).abs().max() <= 1
