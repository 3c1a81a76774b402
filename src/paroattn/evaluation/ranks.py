"""Shares the pairs of an evaluation among the processes that `torchrun` started, over one folder that all of them see.

Nothing but a few words travels between them, so the group is gloo's on GPUs too. Every rank writes its pairs into the
folder, and rank 0 waits there for all of them. A rank that fails ends the job: torchrun stops the others; where nobody
does, rank 0 gives up once no pair has come for as long as the group may be silent.
"""

import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..integration.processes import count, joined, rank

TIMEOUT = 1800.0
POLL = 0.2
STOPPED = (
    "this rank was told to stop, most likely because another one has failed (its message is above). Finished pairs are "
    "kept: run the same command again to go on"
)


@dataclass(frozen=True)
class Ranks:
    """The processes of this evaluation.

    Attributes:
        rank, count: Which one this is, and of how many.
        timeout: How long the group may be silent, seconds.
    """

    rank: int = 0
    count: int = 1
    timeout: float = TIMEOUT

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, asked: Mapping[str, Any]) -> None:
        """Check that all ranks were asked for the same.

        Raises:
            ValueError: If one was not; all ranks raise it.
            RuntimeError: If a rank does not answer in time.
        """
        if self.count == 1:
            return
        found: list[Any] = [None] * self.count
        self._together(lambda: dist.all_gather_object(found, dict(asked)))
        for number, theirs in enumerate(found):
            differing = [name for name in asked if theirs.get(name) != found[0].get(name)]
            if differing:
                raise ValueError(
                    f"all ranks must be given the same command; rank {number} has another {differing[0]} than rank 0: "
                    f"{theirs.get(differing[0])} instead of {found[0].get(differing[0])}"
                )

    def share(self, left: Collection[int]) -> list[int]:
        """The pairs that this rank makes, of those that rank 0 has found to be left."""
        told = [sorted(left)]
        if self.count > 1:
            self._together(lambda: dist.broadcast_object_list(told, src=0))
        return told[0][self.rank :: self.count]

    def wait(self, wanted: Collection[int], done: Callable[[], Collection[int]], tick: Callable[[], None]) -> None:
        """Wait until all pairs are done, whoever makes them.

        Raises:
            RuntimeError: If no pair has come for as long as the group may be silent.
        """
        came, count = time.monotonic(), -1
        while missing := set(wanted) - (found := set(done())):
            tick()
            if len(found) != count:
                came, count = time.monotonic(), len(found)
            if time.monotonic() - came > self.timeout:
                raise RuntimeError(
                    f"another rank must finish pair {min(missing)} ({len(missing)} are missing), and none has finished "
                    f"any for {self.timeout:.0f} s. Finished pairs are kept: run the same command again to go on"
                )
            time.sleep(POLL)

    def _together(self, exchange: Callable[[], Any]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise RuntimeError(
                f"all {self.count} ranks must answer within {self.timeout:.0f} s; rank {self.rank} waited in vain "
                f"({str(error).splitlines()[0]}). Look for the message of the rank that failed"
            ) from error


@contextmanager
def ranks(timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """The group that torchrun's environment describes, or this process alone.

    Each rank computes on the GPU of its own number where there are several.

    Raises:
        RuntimeError: If the group does not come together in time, or the process is told to stop.
    """
    if count() == 1:
        yield Ranks()
        return
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        with joined(timedelta(seconds=timeout), over_gpus=False) as processes:
            yield Ranks(rank(), processes, timeout)
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(*_: Any) -> None:
    raise RuntimeError(STOPPED)
