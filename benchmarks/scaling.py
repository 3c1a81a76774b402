"""What more GPUs would take: a model of one forward split over them, from the rows of multi_gpu.py.

Work is divided by the number of GPUs, attention times the imbalance of its heads; idle time is not divided. Every layer
exchanges q, k, v and its output: each GPU sends (n - 1) / n of its part of each, at the rate measured on two GPUs, and
copies each once on its way out and once on its way in, at the rate of its memory. What goes to the GPUs of other hosts
does so at the rate of the network.
"""

from typing import Any

EXCHANGED, BYTES = 4, 2
MEMORY = 4.3e12
"""Bytes a second of a copy on an H200, read and written."""
NETWORK = 50e9
"""Bytes a second and GPU between hosts: one 400 Gbit/s adapter each; not measured."""
ONE_HOST = 8


def modelled_ms(one: dict[str, Any], two: dict[str, Any], gpus: int, imbalance: float, head_dim: int = 128) -> float:
    """Milliseconds of a forward on so many GPUs, from the rows of one and of two GPUs."""
    layers, parts = one["depth"], one["layer"]
    busy = sum(ms for part, ms in parts.items() if part != "idle")
    attention = one["ms"] / layers * parts["attention"] / (busy + parts["idle"])
    idle = one["ms"] / layers * parts["idle"] / (busy + parts["idle"])
    rest = one["ms"] / layers - attention - idle
    work = (attention * imbalance + rest) / gpus + idle
    return layers * (work + exchange_ms(one, two, gpus, head_dim))


def exchange_ms(one: dict[str, Any], two: dict[str, Any], gpus: int, head_dim: int) -> float:
    """Milliseconds that one layer takes to exchange."""
    whole = one["batch"] * one["tokens"] * one["heads"] * head_dim * BYTES
    link = 3 * whole / 4 / two["exchange_bf16_ms"]  # bytes a millisecond: half of a half, of q, k and v
    part, hosts = EXCHANGED * whole / gpus, -(-gpus // ONE_HOST)
    beyond = part * (hosts - 1) / hosts
    inside = part * (gpus - 1) / gpus - beyond
    return inside / link + beyond / NETWORK * 1e3 + 2 * part / MEMORY * 1e3
