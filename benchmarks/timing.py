"""Time of calls that are compared: taken in turns, so that a busy moment hits all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def milliseconds(calls: Mapping[str, Callable[[], Any]], rounds: int = 15, warm_up: int = 3) -> dict[str, list[float]]:
    """Milliseconds of every call in every round, a round being each call once; with a GPU, until the GPU is done."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for current in range(-warm_up, rounds):
        for name, call in calls.items():
            _finish()
            start = time.perf_counter()
            call()
            _finish()
            if current >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def medians(calls: Mapping[str, Callable[[], Any]], rounds: int = 15, warm_up: int = 3) -> dict[str, float]:
    """Median milliseconds of every call."""
    return {name: statistics.median(times) for name, times in milliseconds(calls, rounds, warm_up).items()}


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
