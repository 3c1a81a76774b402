"""Runs a function in several processes that share a group: on CPUs forked, since importing everything takes long."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers.hooks import context_parallel

LIMIT = 120.0
GROUP_LIMIT = 20.0


def on_ranks(
    size: int, work: Callable[..., Any], *args: Any, limit: float = LIMIT, backend: str | None = "gloo"
) -> list[Any]:
    """What `work(rank, *args)` returned on every rank, or the exception's type and words, or None if it died.

    With backend "nccl" every rank has a GPU; with None they make no group.

    Raises:
        TimeoutError: If a rank hangs.
    """
    context: Any = multiprocessing.get_context("spawn" if backend == "nccl" else "fork")
    with tempfile.TemporaryDirectory() as scratch:
        ends = [context.Pipe(duplex=False) for _ in range(size)]
        ranks = [
            context.Process(target=_run, args=(rank, size, Path(scratch), end[1], work, args, backend), daemon=True)
            for rank, end in enumerate(ends)
        ]
        for process in ranks:
            process.start()
        for _, write in ends:
            write.close()
        until = time.monotonic() + limit
        try:
            found = [_received(read, until) for read, _ in ends]
        finally:
            for process in ranks:
                process.join(max(0.0, until - time.monotonic()))
                process.kill()
        return found


def _received(read: Any, until: float) -> Any:
    if not read.poll(max(0.0, until - time.monotonic())):
        raise TimeoutError("a rank hangs")
    try:
        return read.recv()
    except EOFError:
        return None


def _run(rank: int, size: int, scratch: Path, write: Any, work: Any, args: Any, backend: str | None) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    else:
        as_on_a_cpu()
    try:
        if backend:
            dist.init_process_group(
                backend, init_method=f"file://{scratch}/store", rank=rank, world_size=size,
                timeout=timedelta(seconds=GROUP_LIMIT),
            )  # fmt: skip
        write.send(work(rank, *args))
    except BaseException as error:
        write.send((type(error).__name__, str(error)))
    write.close()
    os._exit(0)


def as_on_a_cpu() -> None:
    """Let diffusers split a model over CPUs: it finds no devices there, and gloo gathers equal parts only."""
    context_parallel._all_gather_anything = _gathered
    torch.accelerator.device_count = lambda: 1
    torch.accelerator.current_accelerator = lambda *_, **__: None
    torch._C._get_accelerator = lambda: torch.device("cpu")


def _gathered(x: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, x.numpy(), group)
    return torch.cat([torch.from_numpy(part) for part in parts], dim)
