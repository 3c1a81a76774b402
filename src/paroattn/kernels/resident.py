"""One phase of a layer's mask at a time on a device, always in the same memory."""

from typing import Any

import torch
from torch import Tensor

from ..block_mask import BlockMask


class ResidentMask:
    """The mask of the phase that is followed, text included, on a device.

    On a GPU, following another phase overwrites the one before, in the order of the current stream: kernels that were
    launched earlier have read it by then, nothing waits, and what captured the memory's address (CUDA graphs) reads the
    new phase from then on. On a CPU the plan's own memory is read.

    Args:
        mask: Of all phases, over the video, on the host.
        tokens: Of the video and of the text.
        device: Where it is wanted.
        launch_order: Whether kernels will ask for `BlockMask.launch_order`.
        overwrite: Whether phases share memory; by default on anything but a CPU.
    """

    def __init__(
        self, mask: BlockMask, tokens: tuple[int, int], device: torch.device, *, launch_order: bool,
        overwrite: bool | None = None,
    ):  # fmt: skip
        self._mask, self._tokens, self._device, self._ordered = mask, tokens, device, launch_order
        self._overwrite = device.type != "cpu" if overwrite is None else overwrite
        self._current: BlockMask | None = None
        self._phase: int | None = None

    def follow(self, phase: int) -> BlockMask:
        """The mask of a phase; the same object until another phase is followed."""
        if self._current is None or phase != self._phase:
            made = self._made(phase)
            if self._current is not None and self._overwrite:
                made = _written_over(self._current, made)
            self._current, self._phase = made, phase
        return self._current

    def _made(self, phase: int) -> BlockMask:
        bits = self._mask.bits[phase]
        if self._device.type == "cuda":
            bits = bits.pin_memory()  # from pageable memory, the copy would wait for the GPU
        moved = bits.to(self._device, non_blocking=True, copy=self._overwrite)
        whole = BlockMask(moved, self._mask.key_blocks, self._mask.block).with_text(*self._tokens)
        if self._ordered:
            _ = whole.launch_order  # made now: inside a CUDA graph or compiled code it would not be kept
        return whole


def _written_over(old: BlockMask, new: BlockMask) -> BlockMask:
    """The new mask in the old one's memory, as another object: what is kept for the old one is not true of it."""
    pairs: list[tuple[Any, Any]] = [(old.bits, new.bits), (old._launch_order, new._launch_order)]
    kept: list[Tensor | None] = [None if before is None else before.copy_(after) for before, after in pairs]
    assert kept[0] is not None
    return BlockMask(kept[0], old.key_blocks, old.block, kept[1])
