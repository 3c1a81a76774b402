"""Attention by a plan for hosts other than diffusers: they bring q, k, v and say which layer and phase they are in."""

import weakref
from typing import Any

import torch
from torch import Tensor

from ..grid import Layout, TextSpan
from ..plan.plan import LayerPlan, PlanError, TransformerPlan
from ..precision import Precision
from .attention import attention
from .resident import ResidentMask

TEXTS_KEPT = 4
_known: "weakref.WeakKeyDictionary[LayerPlan, dict[Any, tuple[ResidentMask, dict[str, Any]]]]"
_known = weakref.WeakKeyDictionary()
_tables: "weakref.WeakKeyDictionary[TransformerPlan, dict[Any, Tensor]]" = weakref.WeakKeyDictionary()


def planned_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TransformerPlan,
    layer: str,
    phase: int,
    *,
    text: TextSpan | None = None,
    valid_text: Tensor | None = None,
    precision: str | Precision | None = None,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Self-attention of one layer as its plan says.

    Args:
        q, k, v: (B, N, H, D) after norm and RoPE, in the model's token order: the video in raster order, frames
            slowest, and text before or after it. All heads of the layer.
        plan: The transformer's part of a plan, such as `Plan.from_pretrained(folder)["transformer"]`.
        layer: Name of the layer in the plan.
        phase: Index of the phase; `plan.phase_at(noise_level)` finds it, once a step.
        text: Text tokens of this call; None: as at calibration. Masks do not depend on their number.
        valid_text: How many text tokens of each batch element are real, (B,), integers. None: all.
        precision: Instead of the plan's, for all heads.
        softmax_scale: Factor on q·k. None: 1 / √D.
        impl: As in `paroattn.attention`.

    Returns:
        (B, N, H, D) in the model's token order.

    Raises:
        PlanError: If the call does not fit the plan.
        ValueError, TypeError, RuntimeError: As `paroattn.attention`.
    """
    text = plan.text if text is None else text
    size = (Layout(plan.grid, text).tokens, plan.heads, plan.head_dim)
    if tuple(q.shape[1:]) != size:
        raise PlanError(
            f"q must be (B, {', '.join(map(str, size))}) for grid {plan.grid} and {text.tokens} text tokens; got "
            f"{tuple(q.shape)}. Pass the whole sequence with all heads, or make a plan at this size."
        )
    operands = operands_of(plan, layer, phase, text=text, device=q.device)
    operands |= {"precision": precision} if precision is not None else {}
    out = attention(q, k, v, **operands, valid_text=valid_text, softmax_scale=softmax_scale, impl=impl)
    assert isinstance(out, Tensor)
    return out


def operands_of(
    plan: TransformerPlan,
    layer: str,
    phase: int,
    *,
    text: TextSpan | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """What `paroattn.attention` needs besides q, k and v: mask, table, order, text_tokens and precision.

    They are made at the first call and kept as long as the plan, so that every step and batch shares them. A host that
    compiles its blocks asks for them before the first block and hands the tensors in. On a GPU a layer has the mask of
    one phase at a time, in the same memory: asking for another phase overwrites it there, without waiting.

    Args:
        plan: The transformer's part of a plan.
        layer: Name of the layer in the plan.
        phase: Index of the phase.
        text: Text tokens; None: as at calibration.
        device: Where they are wanted.

    Raises:
        PlanError: If the plan has no such layer or phase, or has text on the other side.
    """
    text, device = plan.text if text is None else text, torch.device(device)
    if layer not in plan.layers:
        raise PlanError(f"the plan has no layer {layer!r}; it has {', '.join(list(plan.layers)[:3])}, …")
    if not 0 <= phase < len(plan.phases):
        raise PlanError(f"phase must be 0…{len(plan.phases) - 1}; got {phase}. plan.phase_at(noise_level) finds it.")
    if text.tokens and plan.text.tokens and text.side != plan.text.side:
        raise PlanError(f"the plan has text as {plan.text.side}; this call has it as {text.side}")
    part = plan.layers[layer]
    known, key = _known.setdefault(part, {}), (text, device)
    if key not in known:
        if len(known) >= TEXTS_KEPT:
            known.clear()
        known[key] = _make(plan, part, text, device)
    resident, others = known[key]
    heads = part.precision[phase]
    precision = heads[0] if len(set(heads)) == 1 else heads
    return {"mask": resident.follow(phase), **others, "precision": precision}


def _make(
    plan: TransformerPlan, part: LayerPlan, text: TextSpan, device: torch.device
) -> tuple[ResidentMask, dict[str, Any]]:
    """What holds a layer's mask, and what does not depend on the phase."""
    orders = sorted({order for each in plan.layers.values() for order in each.orders})
    tables = _tables.setdefault(plan, {})
    if (text, device) not in tables:
        if len(tables) >= TEXTS_KEPT:
            tables.clear()
        tables[text, device] = Layout(plan.grid, text).table(orders).to(device)
    tokens = plan.grid.tokens, text.tokens
    resident = ResidentMask(part.mask, tokens, device, launch_order=device.type == "cuda")
    order = torch.tensor([orders.index(order) for order in part.orders], dtype=torch.int32, device=device)
    return resident, {"table": tables[text, device], "order": order, "text_tokens": text.tokens}
