"""How much faster a model can become on this machine: the cost model, with the rates of this GPU.

Where the GPU's rates are packaged, attention alone is timed here. On another GPU the rates are those of the first one
that is packaged, scaled by what dense attention, one matrix product and one copy take here. No model is loaded.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..block_mask import BlockMask, blocks_of
from ..grid import ORDERS, Layout
from ..kernels.attention import attention
from ..plan.cost import MODES, Call, Kernel, Kind, Rates, formats_of, gpus, kept_blocks, launching, rates_of
from ..plan.workloads import Workload

LEAST_ROUNDS = 3
ENOUGH = 0.5
"""Seconds of measuring after which a call is not repeated."""
COPIED = 2**26
"""Elements of the copy that is timed."""


@dataclass(frozen=True)
class Forecast:
    """What the cost model says of one forward of a model.

    Attributes:
        model: Its sizes.
        gpu: Whose rates.
        tokens: Of the sequence, text included.
        density: As executed, dense text included.
        dense_ms: Dense self-attention of one layer, of the whole batch.
        sparse_ms: The same by block masks, whole call, by precision.
        around_ms: Everything in a layer but its self-attention, by mode.
        least_ms: What launching a layer takes, by mode, where that is known to matter.
    """

    model: Workload
    gpu: str
    tokens: int
    density: float
    dense_ms: float
    sparse_ms: Mapping[str, float]
    around_ms: Mapping[str, float]
    least_ms: Mapping[str, float] = field(default_factory=dict)

    def attention_share(self, mode: str) -> float:
        """Share of a dense forward that is self-attention."""
        return self.dense_ms / (self.dense_ms + self.around_ms[mode])

    def forward_ms(self, precision: str | None, mode: str) -> float:
        """One forward of the transformer; no precision is dense."""
        inside = self.dense_ms if precision is None else self.sparse_ms[precision]
        return self.model.layers * max(inside + self.around_ms[mode], self.least_ms.get(mode, 0.0))

    def speed_up(self, precision: str, mode: str) -> float:
        """Of one forward, dense time over sparse time."""
        return self.forward_ms(None, mode) / self.forward_ms(precision, mode)

    def to_dict(self) -> dict[str, Any]:
        rows = {
            name: {
                "ms": ms,
                "attention_speed_up": self.dense_ms / ms,
                "forward_ms": {mode: self.forward_ms(name, mode) for mode in self.around_ms},
                "forward_speed_up": {mode: self.speed_up(name, mode) for mode in self.around_ms},
            }
            for name, ms in self.sparse_ms.items()
        }
        plain = {name: getattr(self, name) for name in ("gpu", "tokens", "density", "dense_ms")}
        modes = {
            "around_ms": dict(self.around_ms),
            "attention_share": {mode: self.attention_share(mode) for mode in self.around_ms},
            "forward_ms": {mode: self.forward_ms(None, mode) for mode in self.around_ms},
        }
        return plain | {"batch": self.model.batch} | modes | {"sparse": rows}


def predict(
    rates: Rates,
    model: Workload,
    size: str,
    density: float,
    precisions: Sequence[str],
    *,
    block: tuple[int, int] = (64, 64),
    fp8_linears: bool = False,
) -> Forecast:
    """Predict one forward of a model, with the batch of its own pipeline.

    Args:
        rates: Of the GPU.
        model: The model's sizes.
        size: One of its sizes, or FRAMESxHEIGHTxWIDTH in pixels.
        density: Kept video blocks over all, in every head alike.
        precisions: Precisions of attention.
        block: Tokens of a query block and of a key block.
        fp8_linears: Whether weights and activations of the linear layers are FP8.

    Raises:
        ValueError: If the density or the size is out of range, or no such kernel was measured.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1; got {density}")
    layout = model.layout(size)
    call = Call(layout.tokens, model.heads, model.head_dim, model.batch)
    kept = kept_blocks(layout, block, [density] * model.heads)
    blocks = blocks_of(layout.tokens, block[0]) * blocks_of(layout.tokens, block[1])
    return Forecast(
        model, rates.gpu, layout.tokens, sum(kept) / (blocks * model.heads), rates.dense_ms(call),
        {each: rates.sparse_ms(call, kept, block, each) for each in precisions},
        {mode: rates.around_ms(model, layout.tokens, model.batch, mode=mode, fp8_linears=fp8_linears)
         for mode in MODES},
        {mode: rates.launching_ms.get(launching(mode, fp8_linears), 0.0) for mode in MODES},
    )  # fmt: skip


def forecast(
    model: Workload,
    size: str,
    density: float,
    precisions: Sequence[str],
    *,
    block: tuple[int, int] = (64, 64),
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> Forecast:
    """Predict one forward of a model on this machine.

    Args:
        model, size, density, precisions, block: As in `predict`.
        device: Where.
        dtype: Of q, k, v and the weights.

    Raises:
        ValueError: If the density or the size is out of range.
        torch.OutOfMemoryError: If one self-attention of the model does not fit here.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1; got {density}")
    with torch.no_grad():
        rates = rates_here(model, model.layout(size), density, precisions, block, torch.device(device), dtype)
    return predict(rates, model, size, density, precisions, block=block)


def rates_here(
    model: Workload, layout: Layout, density: float, precisions: Sequence[str], block: tuple[int, int],
    device: torch.device, dtype: torch.dtype,
) -> Rates:  # fmt: skip
    """The rates of this machine, of attention as it is measured at one size, with random q, k, v and masks."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    base = rates_of(gpu if gpu in gpus() else gpus()[0])
    dense_ms, sparse_ms = _time_attention(model, layout, density, precisions, block, device, dtype)
    call = Call(layout.tokens, model.heads, model.head_dim)
    memory = linear = 1.0
    if gpu != base.gpu:
        linear, memory = _time_matrices(model, layout.tokens, base, device, dtype)
    rates = base.scaled(gpu, dense=dense_ms / base.dense_ms(call), linear=linear, memory=memory)
    kept = sum(kept_blocks(layout, block, [density] * model.heads))
    kernels: dict[Kind, Kernel] = {}
    for name, ms in sparse_ms.items():
        alone = max(ms - rates.preparing_ms(call, name), ms / 10)
        kernels[model.head_dim, formats_of(name), block] = Kernel(0.0, 0.0, alone * 1e6 / kept)
    return rates.scaled(gpu, kernels=kernels)


def _time_matrices(
    model: Workload, tokens: int, base: Rates, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Times of a matrix product and of a copy over those of the base's GPU."""
    width = model.width
    x, weights = (torch.randn(rows, width, device=device, dtype=dtype) for rows in (tokens, width))
    product = milliseconds(lambda: F.linear(x, weights), device)
    source = torch.zeros(min(COPIED, tokens * width), device=device, dtype=dtype)
    copied = milliseconds(source.clone, device)
    flops = 2.0 * tokens * width**2
    return product * base.linear_tflops["bf16"] * 1e9 / flops, copied / base.copy_ms(2 * source.nbytes)


def _time_attention(
    model: Workload, layout: Layout, density: float, precisions: Sequence[str], block: tuple[int, int],
    device: torch.device, dtype: torch.dtype,
) -> tuple[float, dict[str, float]]:  # fmt: skip
    """Milliseconds of dense attention, and of that by block masks in each precision, with batch 1."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, layout.tokens, model.heads, model.head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3))
    mask, table = _random_mask(layout, model.heads, density, block).to(device), layout.table(ORDERS).to(device)
    settings: dict[str, Any] = {
        "table": table,
        "order": (torch.arange(model.heads, dtype=torch.int32) % len(ORDERS)).to(device),
        "text_tokens": layout.text.tokens,
    }

    def sparse(precision: str) -> Callable[[], Any]:
        return lambda: attention(q, k, v, mask, **settings, precision=precision)

    dense_ms = _dense_milliseconds([x.transpose(1, 2) for x in (q, k, v)], device)
    return dense_ms, {each: milliseconds(sparse(each), device) for each in precisions}


def milliseconds(call: Callable[[], Any], device: torch.device | str) -> float:
    """Median time of a call that has run before, until the device is done."""
    for _ in range(2):
        call()
    times: list[float] = []
    while len(times) < LEAST_ROUNDS or sum(times) < ENOUGH:
        _finish(device)
        began = time.perf_counter()
        call()
        _finish(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def _dense_milliseconds(heads_first: Sequence[Tensor], device: torch.device | str) -> float:
    """PyTorch's own choice, or cuDNN's attention where that runs and is faster."""
    q, k, v = heads_first

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    times = [milliseconds(dense, device)]
    if torch.device(device).type == "cuda":
        try:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                times.append(milliseconds(dense, device))
        except RuntimeError:  # no cuDNN attention for this GPU or dtype
            pass
    return min(times)


def _random_mask(layout: Layout, heads: int, density: float, block: tuple[int, int]) -> BlockMask:
    """Random kept blocks of the video, every row with at least one, and dense text."""
    rows, columns = (blocks_of(layout.grid.tokens, size) for size in block)
    generator, count = torch.Generator().manual_seed(0), max(1, round(density * columns))
    masks = []
    for _ in range(heads):
        chosen = torch.rand(rows, columns, generator=generator).topk(count, dim=-1).indices
        kept = torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, chosen, True)
        masks.append(BlockMask.from_dense(kept[None], block).bits)
    return BlockMask(torch.cat(masks), columns, block).with_text(layout.grid.tokens, layout.text.tokens)


def _finish(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
