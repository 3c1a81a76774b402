"""Published sizes of real transformers: what one layer of them computes besides its self-attention."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..grid import Grid, Layout, TextSpan

NO_TEXT = TextSpan()
CROSS_TEXT = 512
"""Prompt tokens of models that see them through cross-attention."""


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
        model_class: Class in diffusers.
        name: Under which it is known.
        batch: Of one call in the model's own pipeline.
    """

    heads: int
    head_dim: int
    layers: int
    sizes: Mapping[str, tuple[int, int, int]]
    stride: tuple[int, int, int]
    feed_forward: float = 8.0
    cross: float = 0.0
    text: TextSpan = NO_TEXT
    model_class: str = ""
    name: str = ""
    batch: int = 1

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def cross_text(self) -> int:
        """Prompt tokens that the cross-attention reads."""
        return CROSS_TEXT if self.cross else 0

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

    def linear_flops(self, tokens: int) -> float:
        """FLOPs of one layer's matrix products with weights."""
        return 2.0 * tokens * (4 + self.cross + self.feed_forward) * self.width**2

    def flops(self, size: str) -> tuple[float, float]:
        """FLOPs of one layer's dense self-attention, and of the matrix products around it."""
        tokens = self.layout(size).tokens
        return 4.0 * tokens**2 * self.width, self.linear_flops(tokens)


def _image(side: int = 1024) -> dict[str, tuple[int, int, int]]:
    return {str(side): (1, side, side), "2048": (1, 2048, 2048)}


_WAN = {"480p": (81, 480, 832), "720p": (81, 720, 1280)}
_COG = (4, 16, 16), 8.0, 0.0, TextSpan(226, "prefix"), "CogVideoXTransformer3DModel"


def _wan(heads: int, layers: int, hidden: int, sizes: Mapping[str, tuple[int, int, int]], side: int = 16) -> Workload:
    width = heads * 128
    return Workload(
        heads, 128, layers, sizes, (4, side, side), 2 * hidden / width, 2, model_class="WanTransformer3DModel"
    )


_KNOWN = {
    "wan-1.3b": _wan(12, 30, 8960, _WAN),
    "wan-14b": _wan(40, 40, 13824, _WAN),
    "wan2.2-5b": _wan(24, 30, 14336, {"720p": (121, 704, 1280)}, 32),
    "cogvideox-2b": Workload(30, 64, 30, {"480p": (49, 480, 720)}, *_COG, batch=2),
    "cogvideox-5b": Workload(48, 64, 42, {"480p": (49, 480, 720)}, *_COG, batch=2),
    "cogvideox1.5-5b": Workload(48, 64, 42, {"768p": (81, 768, 1360)}, (8, *_COG[0][1:]), *_COG[1:], batch=2),
    "hunyuanvideo": Workload(
        24, 128, 60, {"544p": (129, 544, 960), "720p": (129, 720, 1280)}, (4, 16, 16), text=TextSpan(256, "suffix"),
        model_class="HunyuanVideoTransformer3DModel",
    ),
    "hunyuanvideo-1.5": Workload(
        16, 128, 54, {"480p": (121, 480, 848), "720p": (121, 720, 1280)}, (4, 16, 16), text=TextSpan(1985, "suffix"),
        model_class="HunyuanVideo15Transformer3DModel",
    ),
    "ltx-video": Workload(
        32, 64, 28, {"512p": (161, 512, 704)}, (8, 32, 32), cross=2, model_class="LTXVideoTransformer3DModel"
    ),
    "ltx-2": Workload(
        32, 128, 48, {"512p": (121, 512, 768)}, (8, 32, 32), cross=2, model_class="LTX2VideoTransformer3DModel"
    ),
    "mochi": Workload(
        24, 128, 48, {"480p": (163, 480, 848)}, (6, 16, 16), text=TextSpan(256, "suffix"),
        model_class="MochiTransformer3DModel",
    ),
    "flux": Workload(
        24, 128, 57, _image(), (1, 16, 16), text=TextSpan(512, "prefix"), model_class="FluxTransformer2DModel"
    ),
    "flux2": Workload(
        48, 128, 56, _image(), (1, 16, 16), feed_forward=9, text=TextSpan(512, "prefix"),
        model_class="Flux2Transformer2DModel",
    ),
    "qwen-image": Workload(
        24, 128, 60, _image(), (1, 16, 16), text=TextSpan(256, "prefix"), model_class="QwenImageTransformer2DModel"
    ),
    "sd3.5-large": Workload(
        38, 64, 38, _image(), (1, 16, 16), text=TextSpan(333, "suffix"), model_class="SD3Transformer2DModel"
    ),
}  # fmt: skip
WORKLOADS: dict[str, Workload] = {name: replace(each, name=name) for name, each in _KNOWN.items()}
"""From the models' published configurations. Two-expert models are those of one expert."""


def workload(name: str) -> Workload:
    """Look a model up.

    Raises:
        ValueError: If it is not known; the message lists those that are.
    """
    if name not in WORKLOADS:
        raise ValueError(f"model must be one of {', '.join(WORKLOADS)}; got {name!r}")
    return WORKLOADS[name]


def workload_like(
    model_class: str, heads: int, head_dim: int, layers: int, config: Mapping[str, Any] | None = None
) -> Workload | None:
    """The known model of a class and size, or one of that class with other sizes; None if the class is not known.

    Args:
        model_class: Class in diffusers.
        heads, head_dim, layers: Of its self-attentions.
        config: Settings that differ from the class's defaults, for the width of its feed-forward network.
    """
    same_class = [each for each in WORKLOADS.values() if each.model_class == model_class]
    exact = [each for each in same_class if (each.heads, each.head_dim, each.layers) == (heads, head_dim, layers)]
    if exact or not same_class:
        return exact[0] if exact else None
    hidden = (config or {}).get("ffn_dim")
    feed_forward = 2 * hidden / (heads * head_dim) if hidden else same_class[0].feed_forward
    return replace(same_class[0], heads=heads, head_dim=head_dim, layers=layers, feed_forward=feed_forward, name="")


def known_model(
    model_class: str, heads: int, head_dim: int, layers: int, config: Mapping[str, Any] | None = None
) -> Workload:
    """As `workload_like`, of a class that is known.

    Raises:
        ValueError: If it is not; what is around its attention is not known then.
    """
    found = workload_like(model_class, heads, head_dim, layers, config)
    if found is None:
        classes = dict.fromkeys(each.model_class for each in WORKLOADS.values())
        raise ValueError(
            f"what is around attention must be known to predict a forward, as it is of {', '.join(classes)}; got "
            f"{model_class}. Ask for a density or an error."
        )
    return found
