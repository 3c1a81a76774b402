"""One phase of a layer's mask at a time on a device, always in the same memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..block_mask import BlockMask
from .attention import HeadGroup


class ResidentMask:
    """The mask of the phase that is followed, text included, on a device.

    On a GPU, following another phase overwrites the one before, in the order of the current stream: kernels that were
    launched earlier have read it by then, nothing waits, and what captured the memory's address (CUDA graphs) reads the
    new phase from then on. On a CPU the plan's own memory is read.

    Args:
        mask: Of all phases, over the video; best on the host, where it takes no memory of the device.
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
        if self._device.type == "cuda" and bits.device.type == "cpu":
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


class ResidentGroups:
    """The heads of a layer by precision, each group with its own resident mask.

    Heads are together if they have the same precision in every phase, so that groups stay what they are. They come in
    the order of their precisions, whatever layer they are of.

    Args:
        precision: Of each head in each phase, [phase][head].
        mask: Of all phases and heads, over the video, on the host.
        order: Row of the gather table for each head, on the device where groups are wanted.
        tokens: Of the video and of the text.
        launch_order: Whether kernels will ask for `BlockMask.launch_order`.
    """

    def __init__(
        self, precision: Sequence[Sequence[str]], mask: BlockMask, order: Tensor, tokens: tuple[int, int], *,
        launch_order: bool,
    ):  # fmt: skip
        by_head = list(zip(*precision, strict=True))
        self._names = sorted(set(by_head))
        self._parts = []
        for names in self._names:
            index = torch.tensor([head for head, each in enumerate(by_head) if each == names])
            part = BlockMask(mask.bits[:, index], mask.key_blocks, mask.block)
            resident = ResidentMask(part, tokens, order.device, launch_order=launch_order, overwrite=True)
            heads = index.to(order.device)
            self._parts.append((_of_any_size(heads), _of_any_size(order[heads]), resident))

    def follow(self, phase: int) -> tuple[HeadGroup, ...]:
        """The groups in a phase."""
        found = []
        for names, (heads, order, resident) in zip(self._names, self._parts, strict=True):
            mask = resident.follow(phase)
            _of_any_size(mask.bits)
            _of_any_size(mask._launch_order)
            found.append(HeadGroup(heads, mask, order, names[phase]))
        return tuple(found)


def _of_any_size(tensor: Any) -> Any:
    """Let compiled code take other numbers of heads without being compiled again."""
    if tensor is not None:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return tensor
