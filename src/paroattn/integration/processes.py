"""Processes that torchrun has started: each takes its GPU and joins the others; one of them speaks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

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
def joined() -> Iterator[int]:
    """Join the other processes for a while; yields their number. One process joins nobody.

    Raises:
        ValueError: If there are fewer GPUs than processes on this machine.
    """
    processes, local = count(), int(os.environ.get("LOCAL_RANK", "0"))
    if processes == 1:
        yield 1
        return
    gpus = torch.cuda.device_count()
    if 0 < gpus <= local:
        raise ValueError(f"every process needs a GPU; there are {gpus}. Start torchrun with --nproc-per-node {gpus}.")
    if gpus:
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=TIMEOUT)
    try:
        yield processes
    finally:
        dist.destroy_process_group()
