"""The operation as PyTorch knows it, paroattn::attention, and the table of what can run it.

Its arguments are plain tensors, numbers and strings, so that compilers and CUDA graphs take it as one node whatever the
layer. It reads no tensor's values on the host, and its shapes follow from those of its inputs.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..precision import Precision
from . import native
from .cpu import cpu_attention
from .reference import reference_attention

TRITON_FORMATS = {"qk": ("int8", "int4", "bf16", "fp16"), "pv": ("int8", "int4", "fp8", "bf16", "fp16")}
FP32, INT4 = ("fp32", "fp32"), ("int4", "int4")
HOPPER = (9, 0)
FOUR_BIT_UNITS = 8
"""First part of the compute capability of GPUs with matrix units of four bits; later ones only imitate them."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute attention.

    Attributes:
        run: Function with the arguments of `reference_attention` and `return_lse`.
        needs: What it asks of tensors and precision, in words.
        usable: Whether tensors like this one, a precision and a number of text tokens meet that.
    """

    run: Callable[..., tuple[Tensor, Tensor | None]]
    needs: str
    usable: Callable[[Tensor, Precision, int], bool]


def _reference(*args, return_lse: bool, **kwargs) -> tuple[Tensor, Tensor]:
    return reference_attention(*args, **kwargs)


def _triton(*args, **kwargs) -> tuple[Tensor, Tensor | None]:
    return _kernels().sparse_attention(*args, **kwargs)


def _native(*args, **kwargs) -> tuple[Tensor, Tensor | None]:
    reason = native.missing()
    if reason is not None:
        raise RuntimeError(f"{reason} Or use impl='triton'.")
    return _kernels().sparse_attention(*args, **kwargs, four_bit_units=True)


def _sm90(*args, **kwargs) -> tuple[Tensor, Tensor | None]:
    has = torch.cuda.get_device_capability(args[0].device)
    if has != HOPPER:
        raise RuntimeError(
            f"impl sm90 needs a GPU of compute capability 9.0; got {has[0]}.{has[1]} "
            f"({torch.cuda.get_device_name(args[0].device)}). Use impl='triton'."
        )
    reason = native.missing()
    if reason is not None:
        raise RuntimeError(f"{reason} Or use impl='triton'.")
    return _kernels().sparse_attention(*args, **kwargs, warpgroup_units=True)


def _kernels() -> Any:
    try:
        return import_module(".sparse", __package__)
    except ImportError as error:
        raise RuntimeError(
            f"impl triton needs Triton 3.4 or newer; got {error}. pip install 'paroattn[gpu]', or use impl='reference'."
        ) from error


def _triton_usable(q: Tensor, precision: Precision, text_tokens: int) -> bool:
    runs = q.device.type == "cuda" or (q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
    formats = precision.qk in TRITON_FORMATS["qk"] and precision.pv in TRITON_FORMATS["pv"]
    return runs and formats and q.dtype != torch.float64


def _native_usable(q: Tensor, precision: Precision, text_tokens: int) -> bool:
    formats = (precision.qk, precision.pv) == INT4 and text_tokens == 0  # text is rounded to 8 bits
    return q.device.type == "cuda" and formats and q.dtype != torch.float64


def _sm90_usable(q: Tensor, precision: Precision, text_tokens: int) -> bool:
    formats = precision.qk == "int8" and precision.pv in ("int8", "fp8")
    return q.device.type == "cuda" and formats and q.dtype != torch.float64


IMPLEMENTATIONS = {
    "cpu": Implementation(
        cpu_attention,
        "float32 tensors on a CPU and precision fp32",
        lambda q, precision, text: (
            (q.device.type, q.dtype, precision.qk, precision.pv) == ("cpu", torch.float32, *FP32)
        ),
    ),
    "reference": Implementation(
        _reference,
        "float64 tensors for precision fp64",
        lambda q, precision, text: q.dtype == torch.float64 or "fp64" not in (precision.qk, precision.pv),
    ),
    "triton": Implementation(
        _triton,
        "tensors on a GPU, not float64, int8, int4, bf16 or fp16 for Q·K and int8, int4, fp8, bf16 or fp16 for P·V",
        _triton_usable,
    ),
    "native": Implementation(
        _native, "tensors on a GPU, not float64, int4 for both Q·K and P·V, and no text", _native_usable
    ),
    "sm90": Implementation(_sm90, "tensors on a GPU, not float64, int8 for Q·K and int8 or fp8 for P·V", _sm90_usable),
}
parse = cache(Precision.parse)
_warned: set[str] = set()


def choose(
    impl: str, q: Tensor, mask: BlockMask, precision: Precision, softmax_scale: float, text_tokens: int = 0
) -> str:
    """Name of the implementation that runs tensors like q.

    "auto" takes "cpu" for float32 on a CPU, "triton" on a GPU, and else "reference", which can do everything. On a GPU,
    where that is slow, a warning names what no kernel handles, once. Two kernels in CUDA C++ are taken where they are
    faster: "native" for INT4 without text on a GPU that has matrix units of four bits, and "sm90" for what
    `tiles.PIPELINES` lists on one of capability 9.0; where `cuda.core` or NVRTC is missing, "triton", and a warning
    says so, once.

    Raises:
        ValueError: If `impl` is unknown or cannot do what is asked.
        RuntimeError: If there is a GPU but no Triton.
    """
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be auto or one of {', '.join(IMPLEMENTATIONS)}; got {impl!r}")
    warning = None
    if impl == "auto":
        impl, warning = _automatic(q, mask, precision, softmax_scale, text_tokens)
    chosen = IMPLEMENTATIONS[impl]
    if not chosen.usable(q, precision, text_tokens):
        text = f" with {text_tokens} text tokens" * (impl == "native" and text_tokens > 0)
        raise ValueError(
            f"{impl} needs {chosen.needs}; got {precision} on {q.dtype} tensors on {q.device}{text}. "
            "Choose another impl or precision."
        )
    if warning is not None and warning not in _warned:
        _warned.add(warning)
        warnings.warn(warning, stacklevel=2)
    return impl


def _automatic(
    q: Tensor, mask: BlockMask, precision: Precision, softmax_scale: float, text_tokens: int
) -> tuple[str, str | None]:
    """What "auto" means, and a warning where something faster could not be taken."""
    if q.device.type != "cuda":
        return ("cpu" if IMPLEMENTATIONS["cpu"].usable(q, precision, text_tokens) else "reference"), None
    slow = f"The slow but exact reference runs on {q.device}, because "
    if not _triton_usable(q, precision, text_tokens):
        return "reference", (
            f"{slow}no kernel computes {precision} on {q.dtype} tensors. Give another precision such as 'int8'."
        )
    reason = _kernels().refusal(q, mask, softmax_scale)
    if reason is not None:
        return "reference", slow + reason
    faster = in_cuda(q, mask, precision, text_tokens)
    missing = None if faster is None else native.missing()
    if faster is None or missing is not None:
        return "triton", faster and f"{WITHOUT[faster].format(q.device)}, because {missing}"
    return faster, None


def in_cuda(q: Tensor, mask: BlockMask, precision: Precision, text_tokens: int) -> str | None:
    """The kernel in CUDA C++, if any, that is faster on the tensor's GPU than "triton"."""
    if _native_usable(q, precision, text_tokens):
        return "native" if torch.cuda.get_device_capability(q.device)[0] == FOUR_BIT_UNITS else None
    pipeline_of = import_module(".tiles", __package__).pipeline_of
    if _sm90_usable(q, precision, text_tokens) and pipeline_of(precision, mask.block, q.shape[-1]):
        return "sm90" if torch.cuda.get_device_capability(q.device) == HOPPER else None
    return None


WITHOUT = {
    "native": "INT4 runs on the 8-bit matrix units of {}, no faster than INT8",
    "sm90": "attention runs in Triton on {}, up to a sixth slower than in CUDA C++",
}


@torch.compiler.assume_constant_result
def keep_constants(impl: str, device: torch.device, dtype: torch.dtype, channels: int) -> None:
    """Make what kernels keep from call to call while a caller is compiled; made later, it would be a graph's memory."""
    if device.type == "cuda" or impl == "triton":
        _kernels().keep_constants(device, dtype, channels)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    key_blocks: int,
    query_block: int,
    key_block: int,
    launch_order: Tensor | None,
    table: Tensor,
    order: Tensor,
    valid_tokens: Tensor | None,
    text_tokens: int,
    precision: str,
    softmax_scale: float,
    return_lse: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    formats, mask = parse(precision), BlockMask(bits, key_blocks, (query_block, key_block), launch_order)
    out, lse = IMPLEMENTATIONS[choose(impl, q, mask, formats, softmax_scale, text_tokens)].run(
        q, k, v, table=table, order=order, mask=mask, precision=formats, softmax_scale=softmax_scale,
        valid_tokens=valid_tokens, text_tokens=text_tokens, return_lse=return_lse,
    )  # fmt: skip
    return out.contiguous(), lse.contiguous() if return_lse and lse is not None else _no_lse(q)


def _fake(q: Tensor, *args) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    return_lse = args[-2]
    return q.new_empty(q.shape), q.new_empty(batch, heads, tokens, dtype=lse_dtype(q)) if return_lse else _no_lse(q)


def lse_dtype(q: Tensor) -> torch.dtype:
    """float64 for float64 tensors, else float32."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _no_lse(q: Tensor) -> Tensor:
    """What the operation returns where no lse is wanted, since it always returns two tensors."""
    return q.new_empty(0, dtype=lse_dtype(q))


NAME = "paroattn::attention"
torch.library.define(
    NAME,
    "(Tensor q, Tensor k, Tensor v, Tensor bits, int key_blocks, int query_block, int key_block, "
    "Tensor? launch_order, Tensor table, Tensor order, Tensor? valid_tokens, SymInt text_tokens, str precision, "
    "float softmax_scale, bool return_lse, str impl) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl(NAME, "default")(_attention)
torch.library.register_fake(NAME)(_fake)
