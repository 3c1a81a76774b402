"""Time of calls that are compared: taken in turns, so that a busy moment hits all of them alike."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

LEAST_ROUNDS = 3
HELD_CYCLES = 2_000_000
"""How long the GPU is kept busy before a call, about a millisecond, so that its launches are queued by then."""


def milliseconds(calls: Mapping[Any, Callable[[], Any]], rounds: int = 15, warm_up: int = 3) -> dict[Any, list[float]]:
    """Milliseconds of every call in every round, a round being each call once; with a GPU, until the GPU is done."""
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for current in range(-warm_up, rounds):
        for name, call in calls.items():
            _finish()
            start = time.perf_counter()
            call()
            _finish()
            if current >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def gpu_milliseconds(
    calls: Mapping[Any, Callable[[], Any]], rounds: int = 15, enough: float = 150.0
) -> dict[Any, list[float]]:
    """Milliseconds of calls that ran before, by events on the GPU, which does not wait there for Python's launches.

    Every round has another order, since what ran before decides how warm and how fast the GPU is. Slow calls take part
    in fewer rounds: until they have taken `enough` milliseconds, and in at least `LEAST_ROUNDS`.
    """
    times: dict[Any, list[float]] = {}
    events: dict[Any, list[tuple[Any, Any]]] = {name: [] for name in calls}
    names, order = list(calls), random.Random(0)
    for current in range(rounds):
        order.shuffle(names)
        for name in names:
            if current == 0:
                times[name] = _elapsed([_timed(calls[name])])
            elif current < max(LEAST_ROUNDS, enough / max(times[name][0], 1e-3)):
                events[name].append(_timed(calls[name]))
    return {name: times[name] + _elapsed(events[name]) for name in calls}


def medians(calls: Mapping[Any, Callable[[], Any]], rounds: int = 15, warm_up: int = 3) -> dict[Any, float]:
    """Median milliseconds of every call."""
    return {name: statistics.median(times) for name, times in milliseconds(calls, rounds, warm_up).items()}


def lasting_medians(calls: Mapping[Any, Callable[[], Any]], rounds: int, least: float) -> dict[Any, float]:
    """Median milliseconds of every call under lasting load: in each round a call is repeated for `least` milliseconds.

    Nothing waits between repetitions. A GPU lowers its clock after some tenths of a second of work, so that a short
    call by itself runs faster than as a part of a long one. Every call ran before.
    """
    repeats = {name: max(1, round(least / times[0])) for name, times in milliseconds(calls, 1, warm_up=0).items()}

    def repeated(name: Any) -> Callable[[], None]:
        def call() -> None:
            for _ in range(repeats[name]):
                calls[name]()

        return call

    times = medians({name: repeated(name) for name in calls}, rounds, warm_up=0)
    return {name: times[name] / repeats[name] for name in calls}


def gpu_medians(calls: Mapping[Any, Callable[[], Any]], rounds: int = 15, enough: float = 150.0) -> dict[Any, float]:
    """Median milliseconds of every call, each of which ran before, on the GPU."""
    return {name: statistics.median(times) for name, times in gpu_milliseconds(calls, rounds, enough).items()}


def _timed(call: Callable[[], Any]) -> tuple[Any, Any]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HELD_CYCLES)
    start.record()
    call()
    end.record()
    return start, end


def _elapsed(pairs: list[tuple[Any, Any]]) -> list[float]:
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
