"""A member "paro" of diffusers' attention dispatcher, and the function it dispatches to.

The dispatcher hands over q, k and v but not the layer they belong to. A planned layer therefore sends itself along in
the slot of `parallel_config`, which diffusers passes on unread; a call without a layer runs dense.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import diffusers
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from ..block_mask import BlockMask
from ..grid import Layout, TextSpan
from ..kernels.attention import attention, what_runs
from ..kernels.presence import attention_with_presence
from ..plan.plan import LayerPlan
from ..precision import Precision

NAME = "paro"
NATIVE = attention_dispatch.AttentionBackendName.NATIVE
LAYOUTS_KEPT = 4

Observer = Callable[..., None]


@dataclass(frozen=True)
class Call:
    """What holds for every layer during one call of the transformer.

    Attributes:
        layout: Sequence of the self-attentions; None if the call does not tell.
        noise_level: None if unknown.
        branch: Name of the cache context, such as "cond" or "uncond".
        phase: The plan's phase; None for a dense call.
        dense: Why the call runs dense.
        observer: Called as observer(layer name, attention module, q, k, v, layout, call) before each attention, without
            the padding of its text: batch elements with different numbers of real tokens come one after another.
        presence: If given, the call can be differentiated, and the backward pass calls presence(layer name, phase,
            sums) with the effect of every block's presence on the loss, (B, H, Nq, Nk), text included.
    """

    layout: Layout | None
    noise_level: float | None
    branch: str | None
    phase: int | None = None
    dense: str | None = None
    observer: Observer | None = None
    presence: Callable[[str, int, Tensor], None] | None = None


class Owner(Protocol):
    """What a layer asks of the transformer it belongs to."""

    call: Call | None
    precision: Precision | str | None
    impl: str

    def fall_back(self, reason: str, remedy: str) -> str: ...

    def table(self, layout: Layout, device: torch.device) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Operands:
    """What a layer hands to the operation besides q, k and v.

    Attributes:
        mask: Kept blocks of the whole sequence.
        table: Gather tables of the plan's orders, shared by all layers.
        order: Row of `table` for each head, (H,).
        precision: One name if all heads agree, else one per head.
    """

    mask: BlockMask
    table: Tensor
    order: Tensor
    precision: Precision | str | tuple[str, ...]


class Layer:
    """One planned self-attention: its part of the plan, and what became of its calls.

    Compiled code is shared by all layers of a model, so what differs between them is found before the first block and
    read from `operands`.

    Attributes:
        video_only: It sees the video without the text.
        padding_last: Padded text always stands behind the real tokens.
        operands: For the running call.
        ran: What ran the layer, by phase, such as "triton".
        sparse_calls: By phase and number of text tokens.
        dense_calls: By reason. Neither counts calls inside torch.compile.
    """

    def __init__(
        self,
        name: str,
        attn: Any,
        owner: Owner,
        plan: LayerPlan | None = None,
        orders: tuple[str, ...] = (),
        *,
        video_only: bool = False,
        padding_last: bool = False,
    ):
        self.name, self.attn, self.owner, self.plan = name, attn, owner, plan
        self.video_only, self.padding_last = video_only, padding_last
        self.original, self.processor = attn.processor, None
        self.order = torch.tensor([orders.index(order) for order in plan.orders], dtype=torch.int32) if plan else None
        self.sparse_calls: Counter[tuple[int, int]] = Counter()
        self.dense_calls: Counter[str] = Counter()
        self.operands: Operands | None = None
        self.ran: dict[int, str] = {}
        self._known: dict[Any, Operands] = {}

    def sees(self, layout: Layout) -> Layout:
        """The part of a call's sequence that reaches this layer."""
        return Layout(layout.grid) if self.video_only else layout

    def follow(self, phase: int, layout: Layout, device: torch.device) -> Operands:
        """Set `operands` to those of a phase on a device; they are kept until another phase is followed."""
        assert self.plan is not None and self.order is not None
        layout = self.sees(layout)
        key = (phase, layout.text, device)
        if key not in self._known:
            if len(self._known) >= LAYOUTS_KEPT or any(known != phase for known, *_ in self._known):
                self._known.clear()
            mask = self.plan.mask[phase].with_text(layout.grid.tokens, layout.text.tokens).to(device)
            if device.type == "cuda" or self.owner.impl == "triton":
                _ = mask.launch_order
            table = self.owner.table(layout, device)
            self._known[key] = Operands(mask, table, self.order.to(device), self.precision(phase))
        self.operands, self._followed = self._known[key], (phase, layout)
        return self.operands

    def operands_on(self, device: torch.device) -> Operands:
        """`operands` where q, k and v are: elsewhere than expected if they moved on their way to the layer."""
        assert self.operands is not None
        return self.operands if self.operands.order.device == device else self.follow(*self._followed, device)

    def precision(self, phase: int) -> Precision | str | tuple[str, ...]:
        """Precision of a phase: one name if all heads agree, else one per head."""
        assert self.plan is not None
        heads = self.plan.precision[phase]
        return self.owner.precision or (heads[0] if len(set(heads)) == 1 else heads)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """Attention of a planned layer by its plan and of any other dense; q, k, v and the result are (B, N, H, D)."""
    dense = functools.partial(
        dispatch_attention_fn, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )
    layer = _parallel_config
    if not isinstance(layer, Layer):
        return dense(backend=NATIVE, parallel_config=layer)
    call, counting = layer.owner.call, not torch.compiler.is_compiling()
    layout = None if call is None or call.layout is None else layer.sees(call.layout)
    if _is_beside(layout, query, key):
        return dense(backend=_dense_backend(layer))
    reason = _why_dense(layer, layout, query, key, attn_mask, plain=not (is_causal or dropout_p or enable_gqa))
    if call is not None and call.observer is not None and layout is not None:
        for part, *tensors in _without_padding(layout, attn_mask, query, key, value):
            call.observer(layer.name, layer.attn, *tensors, part, call)
    if reason is not None:
        if counting:
            layer.dense_calls[reason] += 1
        return dense(backend=_dense_backend(layer))
    assert call is not None and layout is not None  # no look at the phase: compiled code would be made for it
    if attn_mask is not None and not layer.padding_last:
        key, value = _real_text_first(layout, attn_mask, key, value)
    operands = layer.operands_on(query.device)
    if call.presence is not None:
        assert call.phase is not None
        return attention_with_presence(
            query, key, value, operands.mask, functools.partial(call.presence, layer.name, call.phase),
            table=operands.table, order=operands.order, text_tokens=layout.text.tokens,
            valid_text=_valid_text(layout, attn_mask), softmax_scale=scale,
        )  # fmt: skip
    out: Any = attention(
        query, key, value, operands.mask, table=operands.table, order=operands.order,
        text_tokens=layout.text.tokens, valid_text=_valid_text(layout, attn_mask),
        precision=operands.precision, softmax_scale=scale, impl=layer.owner.impl,
    )  # fmt: skip
    if counting:
        assert call.phase is not None
        layer.sparse_calls[call.phase, layout.text.tokens] += 1
        if call.phase not in layer.ran:
            layer.ran[call.phase] = what_runs(
                query, operands.mask, precision=operands.precision, softmax_scale=scale, impl=layer.owner.impl
            )
    return out


@functools.cache
def paro_backend() -> Any:
    """The dispatcher's member "paro", registered at the first call.

    Raises:
        RuntimeError: If this diffusers has another dispatcher.
    """
    try:
        names, registry = attention_dispatch.AttentionBackendName, attention_dispatch._AttentionBackendRegistry
        if NAME not in names._value2member_map_:
            member = str.__new__(names, NAME)
            member._name_, member._value_ = NAME.upper(), NAME
            names._value2member_map_[NAME] = names._member_map_[NAME.upper()] = member
            names._member_names_.append(NAME.upper())
        member = names(NAME)
        registry.register(member)(attend)
        return member
    except (AttributeError, TypeError) as error:
        raise RuntimeError(
            f"diffusers must have the attention dispatcher of 0.38 to 0.42; got {diffusers.__version__}: {error}. "
            "Install one of these versions."
        ) from error


def _dense_backend(layer: Layer) -> Any:
    """The backend that the layer would run without a plan: its own, else the active one if it looks at that."""
    chosen = getattr(layer.original, "_attention_backend", NATIVE)
    if chosen is None:
        chosen, _ = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    return NATIVE if chosen == NAME else chosen


def _is_beside(layout: Layout | None, query: Tensor, key: Tensor) -> bool:
    """Whether a joint layer's processor looks from the video alone at something else, such as an IP-adapter's image."""
    if layout is None or layout.text.tokens == 0:
        return False
    return query.shape[1] == layout.grid.tokens and key.shape[1] != query.shape[1]


def _why_dense(
    layer: Layer, layout: Layout | None, query: Tensor, key: Tensor, attn_mask: Tensor | None, plain: bool
) -> str | None:
    call = layer.owner.call
    if call is None:
        obstacle = "a layer was called outside its transformer"
    elif layout is None or (call.dense is not None and call.observer is None):
        return call.dense
    else:
        obstacle = _obstacle(layout, query, key, attn_mask, plain)
        if obstacle is None:
            return call.dense
    return layer.owner.fall_back(obstacle, f"{layer.name} cannot follow a plan then; strict=False runs it dense.")


def _obstacle(layout: Layout, query: Tensor, key: Tensor, attn_mask: Tensor | None, plain: bool) -> str | None:
    if (query.shape[1], key.shape[1]) != (layout.tokens, layout.tokens):
        return f"grid and text make {layout.tokens} tokens; got {query.shape[1]} queries and {key.shape[1]} keys"
    if not plain:
        return "the attention is causal, grouped or has dropout"
    per_key = attn_mask is None or (attn_mask.dtype == torch.bool and attn_mask.numel() == key.shape[0] * key.shape[1])
    if not per_key or (attn_mask is not None and layout.text.tokens == 0):
        return "the attention mask is not one of padded text"
    return None


def _text_mask(layout: Layout, attn_mask: Tensor) -> Tensor:
    """The text's part of a mask over keys, (B, text tokens)."""
    ahead = 0 if layout.text.side == "prefix" else layout.grid.tokens
    return attn_mask.flatten(1)[:, ahead : ahead + layout.text.tokens]


def _valid_text(layout: Layout, attn_mask: Tensor | None) -> Tensor | None:
    """Number of real text tokens (B,), from a mask over keys."""
    return None if attn_mask is None else _text_mask(layout, attn_mask).sum(1, dtype=torch.int32)


def _real_text_first(layout: Layout, attn_mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Keys or values (B, N, H, D) with the real text tokens before the padded ones."""
    sizes = (layout.text.tokens, layout.grid.tokens)
    at, sizes = (0, sizes) if layout.text.side == "prefix" else (1, sizes[::-1])
    index = _text_mask(layout, attn_mask).logical_not().to(torch.uint8).argsort(dim=1, stable=True)[..., None, None]
    sorted_ = []
    for x in tensors:
        parts = list(x.split(sizes, dim=1))
        parts[at] = parts[at].gather(1, index.expand_as(parts[at]))
        sorted_.append(torch.cat(parts, dim=1))
    return sorted_


def _without_padding(layout: Layout, attn_mask: Tensor | None, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """The sequence and q, k, v with real tokens only: all elements at once, or one by one if some are padded."""
    if attn_mask is None or bool(attn_mask.all()):
        yield layout, *tensors
        return
    for element, real in enumerate(attn_mask.flatten(1)):
        text = TextSpan(int(real.sum()) - layout.grid.tokens, layout.text.side)
        yield Layout(layout.grid, text), *(x[element : element + 1, real] for x in tensors)
