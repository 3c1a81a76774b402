"""How much faster a model can become on this machine: its published sizes, and one layer of it timed here.

A layer is timed in two parts: its attention, dense and by block masks, and everything around it (projections, norms,
rotary embedding, feed-forward) as plain PyTorch modules of the model's widths with random weights. No model is loaded.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..block_mask import BlockMask, blocks_of
from ..grid import ORDERS, Grid, Layout, TextSpan
from ..kernels.attention import attention

NO_TEXT = TextSpan()
LEAST_ROUNDS = 3
ENOUGH = 0.5
"""Seconds of measuring after which a call is not repeated."""


@dataclass(frozen=True)
class Workload:
    """The published sizes of a transformer and what it is run at.

    Attributes:
        heads, head_dim: Of its self-attention; width is their product.
        layers: Self-attention layers of all kinds.
        sizes: Frames, height and width in pixels, by name.
        stride: Pixels of a token: frames (the first frame stands alone), height, width.
        feed_forward: Weights of the feed-forward network of a layer, in squares of the width.
        cross: Weights per video token of the cross-attention, in squares of the width.
        text: Prompt tokens in the same sequence.
    """

    heads: int
    head_dim: int
    layers: int
    sizes: Mapping[str, tuple[int, int, int]]
    stride: tuple[int, int, int]
    feed_forward: float = 8.0
    cross: float = 0.0
    text: TextSpan = NO_TEXT

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def layout(self, size: str) -> Layout:
        """The sequence at a size.

        Raises:
            ValueError: If the size is neither known nor FRAMESxHEIGHTxWIDTH in pixels.
        """
        if size in self.sizes:
            frames, height, width = self.sizes[size]
        else:
            try:
                frames, height, width = Grid.parse(size)
            except ValueError:
                known = ", ".join(self.sizes)
                raise ValueError(
                    f"size must be {known} or FRAMESxHEIGHTxWIDTH in pixels, such as 81x480x832; got {size!r}"
                ) from None
        latent = ((frames - 1) // self.stride[0] + 1, height // self.stride[1], width // self.stride[2])
        if min(latent) < 1:
            raise ValueError(f"size must be at least {self.stride[1]}x{self.stride[2]} pixels; got {size}")
        return Layout(Grid(*latent), self.text)

    def flops(self, size: str) -> tuple[float, float]:
        """FLOPs of one layer's dense self-attention, and of the matrix products around it."""
        tokens = self.layout(size).tokens
        weights = (4 + self.cross + self.feed_forward) * self.width**2
        return 4.0 * tokens**2 * self.width, 2.0 * tokens * weights


def _image(side: int = 1024) -> dict[str, tuple[int, int, int]]:
    return {str(side): (1, side, side), "2048": (1, 2048, 2048)}


_WAN = {"480p": (81, 480, 832), "720p": (81, 720, 1280)}
WORKLOADS: dict[str, Workload] = {
    "wan-1.3b": Workload(12, 128, 30, _WAN, (4, 16, 16), feed_forward=2 * 8960 / 1536, cross=2),
    "wan-14b": Workload(40, 128, 40, _WAN, (4, 16, 16), feed_forward=2 * 13824 / 5120, cross=2),
    "wan2.2-5b": Workload(24, 128, 30, {"720p": (121, 704, 1280)}, (4, 32, 32), feed_forward=2 * 14336 / 3072, cross=2),
    "cogvideox-2b": Workload(30, 64, 30, {"480p": (49, 480, 720)}, (4, 16, 16), text=TextSpan(226, "prefix")),
    "cogvideox-5b": Workload(48, 64, 42, {"480p": (49, 480, 720)}, (4, 16, 16), text=TextSpan(226, "prefix")),
    "cogvideox1.5-5b": Workload(48, 64, 42, {"768p": (81, 768, 1360)}, (8, 16, 16), text=TextSpan(226, "prefix")),
    "hunyuanvideo": Workload(
        24, 128, 60, {"544p": (129, 544, 960), "720p": (129, 720, 1280)}, (4, 16, 16), text=TextSpan(256, "suffix")
    ),
    "hunyuanvideo-1.5": Workload(
        16, 128, 54, {"480p": (121, 480, 848), "720p": (121, 720, 1280)}, (4, 16, 16), text=TextSpan(1985, "suffix")
    ),
    "ltx-video": Workload(32, 64, 28, {"512p": (161, 512, 704)}, (8, 32, 32), cross=2),
    "ltx-2": Workload(32, 128, 48, {"512p": (121, 512, 768)}, (8, 32, 32), cross=2),
    "mochi": Workload(24, 128, 48, {"480p": (163, 480, 848)}, (6, 16, 16), text=TextSpan(256, "suffix")),
    "flux": Workload(24, 128, 57, _image(), (1, 16, 16), text=TextSpan(512, "prefix")),
    "flux2": Workload(48, 128, 56, _image(), (1, 16, 16), feed_forward=9, text=TextSpan(512, "prefix")),
    "qwen-image": Workload(24, 128, 60, _image(), (1, 16, 16), text=TextSpan(256, "prefix")),
    "sd3.5-large": Workload(38, 64, 38, _image(), (1, 16, 16), text=TextSpan(333, "suffix")),
}
"""From the models' published configurations. Two-expert models are those of one expert."""


def workload(name: str) -> Workload:
    """Look a model up.

    Raises:
        ValueError: If it is not known; the message lists those that are.
    """
    if name not in WORKLOADS:
        raise ValueError(f"model must be one of {', '.join(WORKLOADS)}; got {name!r}")
    return WORKLOADS[name]


@dataclass(frozen=True)
class Forecast:
    """What was timed, and what follows from it.

    Attributes:
        tokens: Of the sequence, text included.
        density: As executed, dense text included.
        around_ms: Everything in a layer but its self-attention.
        dense_ms: Dense self-attention in PyTorch, cuDNN's where it is faster.
        sparse_ms: Self-attention by block masks, whole call, by precision.
    """

    tokens: int
    density: float
    around_ms: float
    dense_ms: float
    sparse_ms: Mapping[str, float]

    @property
    def attention_share(self) -> float:
        """Share of a dense layer's time that is self-attention."""
        return self.dense_ms / (self.dense_ms + self.around_ms)

    def speed_up(self, precision: str) -> float:
        """Of the transformer as a whole, dense time over sparse time."""
        return (self.dense_ms + self.around_ms) / (self.sparse_ms[precision] + self.around_ms)

    def to_dict(self) -> dict[str, Any]:
        rows = {
            name: {"ms": ms, "attention_speed_up": self.dense_ms / ms, "transformer_speed_up": self.speed_up(name)}
            for name, ms in self.sparse_ms.items()
        }
        plain = {name: getattr(self, name) for name in ("tokens", "density", "around_ms", "dense_ms")}
        return plain | {"attention_share": self.attention_share, "sparse": rows}


def forecast(
    model: Workload,
    size: str,
    density: float,
    precisions: tuple[str, ...],
    *,
    block: tuple[int, int] = (64, 64),
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> Forecast:
    """Time one layer of a model here.

    Masks are random, the same density in every head; q, k and v are random too. Real masks of uneven heads take about
    as long, since heads are launched densest first.

    Args:
        model: The model's sizes.
        size: One of its sizes, or FRAMESxHEIGHTxWIDTH in pixels.
        density: Kept video blocks over all.
        precisions: Precisions to time.
        block: Tokens of a query block and of a key block.
        device: Where.
        dtype: Of q, k, v and the weights.

    Raises:
        ValueError: If the density or the size is out of range.
        torch.OutOfMemoryError: If the model's sequence does not fit here.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1; got {density}")
    with torch.no_grad():
        executed, dense_ms, sparse_ms = _time_attention(
            model, model.layout(size), density, precisions, block, device, dtype
        )
        around = _Around(model).to(device, dtype)
        x = torch.randn(model.layout(size).tokens, model.width, device=device, dtype=dtype)
        around_ms = milliseconds(lambda: around(x), device)
    return Forecast(len(x), executed, around_ms, dense_ms, sparse_ms)


def _time_attention(
    model: Workload, layout: Layout, density: float, precisions: Sequence[str], block: tuple[int, int],
    device: torch.device | str, dtype: torch.dtype,
) -> tuple[float, float, dict[str, float]]:  # fmt: skip
    """Executed density, and milliseconds of dense attention and of that by block masks in each precision."""
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
    return mask.density, dense_ms, {each: milliseconds(sparse(each), device) for each in precisions}


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


class _Around(nn.Module):
    """A layer without its attention: modulation, norms, projections, rotary embedding and feed-forward."""

    def __init__(self, model: Workload):
        super().__init__()
        width, self.head_dim = model.width, model.head_dim
        hidden = max(8, round(model.feed_forward * width / 2))
        self.projections = nn.ModuleList(nn.Linear(width, width) for _ in range(4 + round(model.cross)))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, out, *cross = self.projections
        normed = F.layer_norm(x, x.shape[-1:]) * 1.1 + 0.1
        q, k = self._rotated(self.norms[0](query(normed))), self._rotated(self.norms[1](key(normed)))
        x = x + out(value(normed) + q + k) * 0.5  # stands for what attention returns
        for projection in cross:
            x = x + projection(F.layer_norm(x, x.shape[-1:]))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:]) * 1.1 + 0.1), approximate="tanh")) * 0.5

    def _rotated(self, x: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * 0.8 - odd * 0.6, even * 0.6 + odd * 0.8), -1).flatten(-2)


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
