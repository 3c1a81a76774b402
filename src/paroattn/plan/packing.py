"""Block masks of a large plan: each phase as what changed since the one before, deflated, until they are used."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod

import torch
from torch import Tensor

from ..block_mask import BlockMask, blocks_of

PACKED_FROM = 2**24
"""Bytes of all masks from which they are packed."""


def pack(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pack bits (phases, …) uint8 of every layer into bytes (n,) uint8."""
    with ThreadPoolExecutor() as threads:
        return dict(zip(masks, threads.map(_packed, masks.values()), strict=True))


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Bits (phases, …) uint8 of a layer that `pack` packed; nothing larger is ever made.

    Raises:
        ValueError: If the bytes are damaged, or give another shape.
    """
    size, stream = prod(shape), zlib.decompressobj()
    try:
        blob = stream.decompress(packed.numpy().data, size + 1)
    except zlib.error as error:
        raise ValueError(f"packed masks are damaged ({error})") from error
    if len(blob) != size or not stream.eof or stream.unused_data:
        raise ValueError(f"packed masks must hold {size} bytes; got {'more' if len(blob) > size else 'other'}")
    bits = torch.frombuffer(bytearray(blob), dtype=torch.uint8).view(*shape)
    for phase in range(1, len(bits)):
        bits[phase] ^= bits[phase - 1]
    return bits


class PackedMask(BlockMask):
    """A mask that is unpacked and checked when its bits are first asked for, and kept from then on.

    Args:
        name: Of the layer, for messages.
        packed: Bytes (n,) uint8, from `pack`.
        shape: (phases, heads, query blocks, key blocks).
        block: Tokens of a query block and of a key block.

    Raises:
        ValueError: If `packed` is something else.
    """

    _name: str
    _packed: Tensor | None
    _shape: tuple[int, ...]
    _bits: Tensor | None

    def __init__(self, name: str, packed: Tensor, shape: tuple[int, ...], block: tuple[int, int]):
        if packed.dtype != torch.uint8 or packed.ndim != 1:
            raise ValueError(f"{name}: packed masks are damaged (bytes in a row; got {packed.dtype}, {packed.ndim}-d)")
        vars(self).update(key_blocks=shape[-1], block=block, _launch_order=None, _name=name, _packed=packed)
        vars(self).update(_shape=shape, _bits=None)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def bits(self) -> Tensor:  # type: ignore[override]
        """Packed bits of all phases, as in a `BlockMask`.

        Raises:
            ValueError: If the bytes are damaged, or what they hold is no mask.
        """
        packed = self._packed
        if packed is None:  # unpacked before, perhaps in another thread
            assert self._bits is not None
            return self._bits
        try:
            bits = unpack(packed, (*self._shape[:-1], blocks_of(self.key_blocks, 8)))
            BlockMask(bits, self.key_blocks, self.block).check()
        except ValueError as error:
            raise ValueError(f"{self._name}: {error}. Fetch or make the plan again.") from error
        vars(self)["_bits"] = bits
        vars(self)["_packed"] = None
        return bits

    @property
    def unpacked(self) -> bool:
        return self._bits is not None

    def check(self) -> None:
        """Nothing to check before the bits are there."""


def unpack_all(masks: Iterable[BlockMask]) -> None:
    """Unpack what is still packed, several masks at a time."""
    packed = [mask for mask in masks if isinstance(mask, PackedMask) and not mask.unpacked]
    if packed:
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda mask: mask.bits, packed))


def _packed(bits: Tensor) -> Tensor:
    changes = bits.contiguous().clone()
    changes[1:] ^= bits[:-1]
    return torch.frombuffer(bytearray(zlib.compress(changes.numpy().data)), dtype=torch.uint8)
