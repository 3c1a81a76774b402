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

from ..grid import Layout, TextSpan
from ..kernels.attention import attention, attention_by_group, what_runs
from ..kernels.presence import attention_with_presence
from ..plan.plan import LayerPlan
from ..precision import Precision
from .exchange import by_parts, to_heads, to_tokens
from .operands import Followed, Operands, Precisions
from .ranks import Ranks

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
    ranks: Ranks | None

    def fall_back(self, reason: str, remedy: str) -> str: ...

    def table(self, layout: Layout, device: torch.device) -> Tensor: ...


class Layer:
    """One planned self-attention: its part of the plan, and what became of its calls.

    Compiled code is shared by all layers of a model, so what differs between them is found before the first block and
    read from `operands`.

    Attributes:
        video_only: It sees the video without the text.
        padding_last: Padded text always stands behind the real tokens.
        operands: For the running call.
        faster_dense: Dense attention is predicted to serve it faster. Compiled code looks at this, but not at why.
        why_dense: In words; empty if it is not.
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
        self.faster_dense, self.why_dense = False, ""
        self.ran: dict[int, str] = {}
        self._known: dict[tuple[TextSpan, torch.device], Followed] = {}

    def sees(self, layout: Layout) -> Layout:
        """The part of a call's sequence that reaches this layer."""
        return Layout(layout.grid) if self.video_only else layout

    def follow(self, phase: int, layout: Layout, device: torch.device) -> Operands:
        """Set `operands` to those of a phase on a device; the masks of one phase at a time are there."""
        assert self.plan is not None and self.order is not None
        layout = self.sees(layout)
        key = (layout.text, device)
        if key not in self._known:
            if len(self._known) >= LAYOUTS_KEPT:
                self._known.clear()
            self._known[key] = Followed(
                self.plan, self.order, self.owner.table(layout, device), layout, device, self.owner.ranks,
                launch_order=device.type == "cuda" or self.owner.impl == "triton", mixed=not self.owner.precision,
            )  # fmt: skip
        operands = self._known[key].follow(phase, self.precision(phase))
        self.operands, self._followed = operands, (phase, layout)
        return operands

    def operands_on(self, device: torch.device) -> Operands:
        """`operands` where q, k and v are: elsewhere than expected if they moved on their way to the layer."""
        assert self.operands is not None
        return self.operands if self.operands.order.device == device else self.follow(*self._followed, device)

    def forget(self) -> None:
        """Drop what was made for other ranks."""
        self._known.clear()

    def precision(self, phase: int) -> Precisions:
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
    settings = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    dense = functools.partial(dispatch_attention_fn, query, key, value, **settings)
    layer = _parallel_config
    if not isinstance(layer, Layer):
        return dense(attn_mask=attn_mask, backend=NATIVE, parallel_config=layer)
    call, ranks, counting = layer.owner.call, layer.owner.ranks, not torch.compiler.is_compiling()
    layout = None if call is None or call.layout is None else layer.sees(call.layout)
    if _is_beside(layout, ranks, query, key):
        return dense(attn_mask=attn_mask, backend=_dense_backend(layer))
    plain = not (is_causal or dropout_p or enable_gqa)
    reason = _why_dense(layer, layout, ranks, query, key, attn_mask, plain)
    if call is not None and call.observer is not None and layout is not None:
        for part, *tensors in _without_padding(layout, attn_mask, query, key, value):
            call.observer(layer.name, layer.attn, *tensors, part, call)
    if reason is not None or layer.faster_dense:
        if counting:
            layer.dense_calls[reason or layer.why_dense] += 1
        return _all_blocks(dense, layer, layout, attn_mask)
    assert call is not None and layout is not None  # no look at the phase: compiled code would be made for it
    operands = layer.operands_on(query.device)
    run = _follow if ranks is None else functools.partial(_follow_shared, ranks)
    out = run(layer, layout, operands, query, key, value, attn_mask, scale)
    if counting:
        _count(layer, call, layout, query, operands, scale)
    return out


def _count(layer: Layer, call: Call, layout: Layout, query: Tensor, operands: Operands, scale: float | None) -> None:
    """Remember that a layer followed its plan, and once for each phase what ran it."""
    assert call.phase is not None
    layer.sparse_calls[call.phase, layout.text.tokens] += 1
    if call.phase not in layer.ran:
        some = query[:, :, : operands.mask.heads]
        layer.ran[call.phase] = what_runs(
            some, operands.mask, precision=operands.precision, softmax_scale=scale, text_tokens=layout.text.tokens,
            impl=layer.owner.impl,
        )  # fmt: skip


def _all_blocks(dense: Callable[..., Tensor], layer: Layer, layout: Layout | None, attn_mask: Tensor | None) -> Tensor:
    """Dense attention as the layer would run it without a plan, of a whole sequence if several ranks share it."""
    ranks = layer.owner.ranks
    if ranks is None:
        return dense(attn_mask=attn_mask, backend=_dense_backend(layer))
    if attn_mask is not None and layout is not None and attn_mask.dtype == torch.bool:
        attn_mask = ranks.arrived_mask(attn_mask, layout)
    return dense(attn_mask=attn_mask, backend=_dense_backend(layer), parallel_config=ranks.config)


def _follow_shared(
    ranks: Ranks, layer: Layer, layout: Layout, operands: Operands, query: Tensor, key: Tensor, value: Tensor,
    attn_mask: Tensor | None, scale: float | None,
) -> Tensor:  # fmt: skip
    """Attention by the plan of a sequence that several ranks share: tokens go where their heads are, and back."""
    assert operands.heads is not None and operands.places is not None
    own, sizes, group = query.shape[1], operands.sizes, ranks.group
    attn_mask = None if attn_mask is None else ranks.whole_mask(attn_mask, sizes, operands.places)

    def follow(part: Operands, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _follow(layer, layout, part, q, k, v, attn_mask, scale)

    if operands.parts and not torch.compiler.is_compiling():
        parts = [(part.heads, functools.partial(follow, part)) for part in operands.parts if part.heads is not None]
        return by_parts(query, key, value, parts, sizes, group)
    shared = to_heads(query, key, value, operands.heads, sizes, group)
    return to_tokens(follow(operands, *shared), operands.heads, sizes, own, group)


def _follow(
    layer: Layer,
    layout: Layout,
    operands: Operands,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Attention of a whole sequence by the plan; `attn_mask` is over keys in the model's order."""
    if attn_mask is not None and not layer.padding_last:
        text = layout.text_positions
        text = text if operands.places is None else operands.places[text]
        key, value = _real_text_first(layout, attn_mask, text, key, value)
    call = layer.owner.call
    if call is not None and call.presence is not None:
        assert call.phase is not None
        return attention_with_presence(
            query, key, value, operands.mask, functools.partial(call.presence, layer.name, call.phase),
            table=operands.table, order=operands.order, text_tokens=layout.text.tokens,
            valid_text=_valid_text(layout, attn_mask), softmax_scale=scale,
        )  # fmt: skip
    if operands.groups:
        return attention_by_group(
            query, key, value, operands.groups, table=operands.table, text_tokens=layout.text.tokens,
            valid_text=_valid_text(layout, attn_mask), softmax_scale=scale, impl=layer.owner.impl,
        )  # fmt: skip
    out: Any = attention(
        query, key, value, operands.mask, table=operands.table, order=operands.order,
        text_tokens=layout.text.tokens, valid_text=_valid_text(layout, attn_mask),
        precision=operands.precision, softmax_scale=scale, impl=layer.owner.impl,
    )  # fmt: skip
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
        registry.register(member, supports_context_parallel=True)(attend)
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


def _is_beside(layout: Layout | None, ranks: Ranks | None, query: Tensor, key: Tensor) -> bool:
    """Whether a joint layer's processor looks from the video alone at something else, such as an IP-adapter's image."""
    if layout is None or layout.text.tokens == 0:
        return False
    video = layout.grid.tokens if ranks is None else ranks.own_video(layout)
    return query.shape[1] == video and key.shape[1] != query.shape[1]


def _why_dense(
    layer: Layer,
    layout: Layout | None,
    ranks: Ranks | None,
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    plain: bool,
) -> str | None:
    call = layer.owner.call
    if call is None:
        obstacle = "a layer was called outside its transformer"
    elif layout is None or (call.dense is not None and call.observer is None):
        return call.dense
    else:
        obstacle = _obstacle(layout, ranks, query, key, attn_mask, plain)
        if obstacle is None:
            return call.dense
    return layer.owner.fall_back(obstacle, f"{layer.name} cannot follow a plan then; strict=False runs it dense.")


def _obstacle(
    layout: Layout, ranks: Ranks | None, query: Tensor, key: Tensor, attn_mask: Tensor | None, plain: bool
) -> str | None:
    own = layout.tokens if ranks is None else ranks.own_tokens(layout)
    if (query.shape[1], key.shape[1]) != (own, own):
        here = "" if ranks is None else f" on rank {ranks.rank} of {ranks.size}"
        return f"grid and text make {own} tokens{here}; got {query.shape[1]} queries and {key.shape[1]} keys"
    if not plain:
        return "the attention is causal, grouped or has dropout"
    if attn_mask is None:
        return None
    per_key = attn_mask.dtype == torch.bool and attn_mask.numel() in (len(key) * own, len(key) * layout.tokens)
    return None if per_key and layout.text.tokens else "the attention mask is not one of padded text"


def _text_mask(layout: Layout, attn_mask: Tensor) -> Tensor:
    """The text's part of a mask over keys, (B, text tokens)."""
    return attn_mask.flatten(1)[:, layout.text_positions]


def _valid_text(layout: Layout, attn_mask: Tensor | None) -> Tensor | None:
    """Number of real text tokens (B,), from a mask over keys."""
    return None if attn_mask is None else _text_mask(layout, attn_mask).sum(1, dtype=torch.int32)


def _real_text_first(layout: Layout, attn_mask: Tensor, text: slice | Tensor, *tensors: Tensor) -> list[Tensor]:
    """Keys or values (B, N, H, D), whose text lies at `text`, with the real text tokens before the padded ones."""
    index = _text_mask(layout, attn_mask).logical_not().to(torch.uint8).argsort(dim=1, stable=True)[..., None, None]
    sorted_ = []
    for x in tensors:
        found, x = x[:, text], x.clone()
        x[:, text] = found.gather(1, index.expand_as(found))
        sorted_.append(x)
    return sorted_


def _without_padding(layout: Layout, attn_mask: Tensor | None, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """The sequence and q, k, v with real tokens only: all elements at once, or one by one if some are padded."""
    if attn_mask is None or bool(attn_mask.all()):
        yield layout, *tensors
        return
    for element, real in enumerate(attn_mask.flatten(1)):
        text = TextSpan(int(real.sum()) - layout.grid.tokens, layout.text.side)
        yield Layout(layout.grid, text), *(x[element : element + 1, real] for x in tensors)
