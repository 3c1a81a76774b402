"""Block masks of a large plan on disk: each phase as what changed since the one before, deflated."""

import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod

import torch
from torch import Tensor

PACKED_FROM = 2**24
"""Bytes of all masks from which they are packed."""


def pack(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pack bits (phases, …) uint8 of every layer into bytes (n,) uint8."""
    with ThreadPoolExecutor() as threads:
        return dict(zip(masks, threads.map(_packed, masks.values()), strict=True))


def unpack(packed: Mapping[str, Tensor], shape: Sequence[int]) -> dict[str, Tensor]:
    """Bits (phases, …) uint8 of every layer that `pack` packed; nothing larger is ever made.

    Raises:
        ValueError: If the bytes are damaged, or give another shape.
    """
    with ThreadPoolExecutor() as threads:
        return dict(zip(packed, threads.map(lambda each: _unpacked(each, shape), packed.values()), strict=True))


def _packed(bits: Tensor) -> Tensor:
    changes = bits.contiguous().clone()
    changes[1:] ^= bits[:-1]
    return torch.frombuffer(bytearray(zlib.compress(changes.numpy().data)), dtype=torch.uint8)


def _unpacked(packed: Tensor, shape: Sequence[int]) -> Tensor:
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
