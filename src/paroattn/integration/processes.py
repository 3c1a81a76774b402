"""Processes that torchrun has started: each takes its GPU and joins the others; one of them speaks."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)


def rank() -> int:
    """This process among those that torchrun has started, 0 if it has not."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes torchrun has started, 1 if it has not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(timeout: timedelta = TIMEOUT, *, over_gpus: bool = True) -> Iterator[int]:
    """Join the other processes for a while; yields their number. One process joins nobody.

    Args:
        timeout: How long a process waits for the others.
        over_gpus: Exchange tensors between GPUs, of which every process then needs one of its own.

    Raises:
        ValueError: If there are fewer GPUs than processes on this machine.
    """
    processes, local = count(), int(os.environ.get("LOCAL_RANK", "0"))
    if processes == 1:
        yield 1
        return
    gpus = torch.cuda.device_count()
    if over_gpus and 0 < gpus <= local:
        raise ValueError(f"every process needs a GPU; there are {gpus}. Start torchrun with --nproc-per-node {gpus}.")
    if gpus:
        torch.cuda.set_device(local % gpus)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus and over_gpus else "gloo", timeout=timeout)
    try:
        yield processes
    finally:
        dist.destroy_process_group()


def group() -> tuple[int, int]:
    """Rank and number of the processes that have joined; (0, 1) for one on its own."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def each_some(jobs: Sequence[Any], work: Callable[[Any], Any]) -> list[Any]:
    """What `work` gives for every job, in their order, on every process; each does some of them."""
    own, processes = group()
    mine = {index: work(job) for index, job in enumerate(jobs) if index % processes == own}
    found = everyones(mine)
    return [found[index] for index in range(len(jobs))]


def everyones(mine: Mapping[Any, Any]) -> dict[Any, Any]:
    """The entries of all processes."""
    _, processes = group()
    parts: list[Any] = [mine] * processes
    if processes > 1:
        dist.all_gather_object(parts, mine)
    return {name: value for part in parts for name, value in part.items()}


def firsts(value: Any) -> Any:
    """The first process's value."""
    _, processes = group()
    values = [value]
    if processes > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


def wait() -> None:
    """Wait until all processes have come here."""
    if group()[1] > 1:
        dist.barrier()
