"""Number formats, what shares a scale, and plain quantise and dequantise.

A scale is what the stored number is multiplied by to get the value back.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A number format of one operand.

    Attributes:
        name: As written in plans and results.
        highest: Largest stored magnitude; None for a floating format that needs no scale.
        lowest: Smallest stored value.
        dtype: What values are rounded to: a floating dtype, or int8 for the integer formats.
    """

    name: str
    highest: float | None
    lowest: float | None
    dtype: torch.dtype

    @property
    def scaled(self) -> bool:
        return self.highest is not None


FORMATS = {
    form.name: form
    for form in (
        Format("fp64", None, None, torch.float64),
        Format("fp32", None, None, torch.float32),
        Format("fp16", None, None, torch.float16),
        Format("bf16", None, None, torch.bfloat16),
        Format("fp8", 448.0, -448.0, torch.float8_e4m3fn),
        Format("int8", 127.0, -127.0, torch.int8),
        Format("int4", 7.0, -7.0, torch.int8),
        Format("uint8", 255.0, 0.0, torch.uint8),
        Format("uint4", 15.0, 0.0, torch.uint8),
    )
}
GRANULARITIES = ("tensor", "head", "block", "token", "channel")
SMALLEST_SCALE = 1e-12


@dataclass(frozen=True)
class Precision:
    """Formats of the two matrix products: Q and K in `qk`, P and V in `pv`."""

    qk: str
    pv: str

    def __post_init__(self):
        for product, name in vars(self).items():
            if name not in FORMATS or name.startswith("uint"):
                names = ", ".join(form for form in FORMATS if not form.startswith("uint"))
                raise ValueError(f"{product} must be one of {names}; got {name!r}")

    def __str__(self) -> str:
        return next((name for name, value in PRECISIONS.items() if value == self), f"{self.qk}/{self.pv}")

    @property
    def quantised(self) -> bool:
        return FORMATS[self.qk].scaled or FORMATS[self.pv].scaled

    @classmethod
    def parse(cls, text: "str | Precision") -> "Precision":
        """Read a name of `PRECISIONS`, or "QK/PV" such as "int8/fp8".

        Raises:
            ValueError: If it is neither.
        """
        if isinstance(text, Precision):
            return text
        if not isinstance(text, str) or (text not in PRECISIONS and text.count("/") != 1):
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)} or QK/PV such as int8/fp8; got {text!r}"
            )
        return PRECISIONS[text] if text in PRECISIONS else cls(*text.split("/"))


PRECISIONS = {
    "fp64": Precision("fp64", "fp64"),
    "fp32": Precision("fp32", "fp32"),
    "fp16": Precision("fp16", "fp16"),
    "bf16": Precision("bf16", "bf16"),
    "int8": Precision("int8", "int8"),
    "int8-qk": Precision("int8", "bf16"),
    "int8-pv": Precision("bf16", "int8"),
    "int4": Precision("int4", "int4"),
    "int4-qk": Precision("int4", "bf16"),
    "int4-pv": Precision("bf16", "int4"),
}


def round_to(x: Tensor, form: Format) -> Tensor:
    """Round scaled values to what the format can store, in the dtype of `x`."""
    if not form.scaled:
        return x.to(form.dtype).to(x.dtype)
    x = x.clamp(form.lowest, form.highest)
    return x.to(form.dtype).to(x.dtype) if form.dtype.is_floating_point else x.round()


def quantize(x: Tensor, form: Format, granularity: str, block: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantise symmetrically with scale = largest magnitude / highest stored value.

    Args:
        x: (…, N, D), tokens and channels last.
        form: Target format; a floating one gives scale 1.
        granularity: What shares a scale: the whole "tensor", a "head" (N, D), a "block" of tokens, a "token" (D), or a
            "channel" (N).
        block: Tokens of a block, for "block" only.

    Returns:
        Stored values in the dtype of `x`, and the scale, which broadcasts against them; (…, N, 1) for "block".

    Raises:
        ValueError: If the granularity is unknown, or "block" comes without a block size.
    """
    if granularity not in GRANULARITIES or (granularity == "block") != (block is not None):
        raise ValueError(
            f"granularity must be one of {', '.join(GRANULARITIES)}, with a block size for block only; "
            f"got {granularity!r} with block {block}"
        )
    if not form.scaled:
        return round_to(x, form), x.new_ones(())
    assert form.highest is not None
    if granularity == "tensor":
        largest = x.abs().amax()
    elif block is not None:
        largest = _block_maximum(x, block)
    else:
        dims = {"head": (-2, -1), "token": (-1,), "channel": (-2,)}[granularity]
        largest = x.abs().amax(dims, keepdim=True)
    scale = (largest / form.highest).clamp_min(SMALLEST_SCALE)
    return round_to(x / scale, form), scale


@cache
def hadamard(channels: int) -> Tensor:
    """Orthogonal rotation that spreads every channel evenly over all others.

    Returns:
        float64 of shape (channels, 2ⁿ) with the smallest 2ⁿ ≥ channels: the first rows of a Hadamard matrix over √2ⁿ.
        Dot products stay what they are: (q R) · (k R) = q · k.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < channels:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix[:channels] / len(matrix) ** 0.5


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """Stored values times their scale."""
    return values * scale


def _block_maximum(x: Tensor, block: int) -> Tensor:
    """Largest magnitude of every token's block, (…, N, 1)."""
    tokens = x.shape[-2]
    padded = torch.nn.functional.pad(x.abs().amax(-1), (0, -tokens % block))
    largest = padded.unflatten(-1, (-1, block)).amax(-1)
    return largest.repeat_interleave(block, -1)[..., :tokens, None]
