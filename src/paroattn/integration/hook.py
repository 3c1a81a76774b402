"""What an applied transformer carries: before the first block of every call it says how the layers run it.

The work is done in a forward pre-hook of PyTorch. A diffusers ModelHook on the transformer itself would be discarded by
model CPU offload, which restores `forward` after every pipeline call, and would run the original's weights in a deep
copy. Only the cache context and the reset come through a diffusers hook, on an empty child module.
"""

import inspect
import threading
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor, nn

from ..grid import Grid, Layout, TextSpan
from ..plan.packing import unpack_all
from ..plan.plan import PlanError, TransformerPlan
from ..plan.worth import Verdict, judge
from ..precision import Precision
from .backend import LAYOUTS_KEPT, Call, Layer, Observer
from .models import GridUnknown, matches, self_attentions, spec_of
from .processor import planned_processor
from .ranks import Ranks, ranks_of
from .schedule import NoiseSchedule, branch_of

HOOK = "paroattn"
ON_REQUEST = "inside paroattn.dense"
_eager: Any = torch.compiler.disable  # its annotations hide that a method stays one


class CallContext(StateManager):
    """Holds the cache context that a pipeline announces; diffusers keeps it under another name in every version."""

    def __init__(self):
        super().__init__(BaseState())
        self.current: Any = None

    def set_context(self, context: Any) -> None:
        self.current = context


class PlanHook(ModelHook):
    """A plan, or an observer, on one transformer.

    Attributes:
        call: The running call of the transformer.
        ranks: The processes that share its sequence, if there are several.
        calls: Calls of the transformer, by "sparse" or the reason why they ran dense.
        grids: Calls by grid.
        replaced: Layers whose processor someone else has taken away.
        verdict: Which layers dense attention serves faster, for the last call; None if nobody asked.
        dense_depth: How many `paroattn.dense` are open.
        presence: Given to every call, see `Call`; `call` then outlives it, since a backward pass may run layers again.
    """

    _is_stateful = True

    def __init__(
        self,
        transformer: nn.Module,
        pipeline: Any = None,
        plan: TransformerPlan | None = None,
        observer: Observer | None = None,
        *,
        strict: bool = True,
        precision: str | Precision | None = None,
        impl: str = "auto",
        even_if_slower: bool = False,
    ):
        super().__init__()
        self.plan, self.observer, self.strict, self.precision, self.impl = plan, observer, strict, precision, impl
        self.spec, self.schedule = spec_of(transformer), NoiseSchedule(pipeline)
        self.context = CallContext()
        self.call: Call | None = None
        self.ranks: Ranks | None = None
        self.calls: Counter[str] = Counter()
        self.grids: Counter[str] = Counter()
        self.replaced: list[str] = []
        self.dense_depth = 0
        self.verdict: Verdict | None = None
        self._even_if_slower = even_if_slower or impl != "auto"
        self._verdicts: dict[tuple[TextSpan, torch.device], Verdict] = {}
        self.presence: Any = None
        self._thread: int | None = None
        self._signature = inspect.signature(type(transformer).forward)
        self._warned: set[str] = set()
        self._tables: dict[tuple[TextSpan, torch.device], Tensor] = {}
        planned = plan.layers if plan else {}
        self._orders = tuple(sorted({order for layer in planned.values() for order in layer.orders}))
        self.layers = {
            name: Layer(
                name,
                attn,
                self,
                planned.get(name),
                self._orders,
                video_only=matches(name, self.spec.video_only),
                padding_last=self.spec.padding_last,
            )
            for name, attn in self_attentions(transformer).items()
        }
        for layer in self.layers.values():
            layer.processor = planned_processor(layer, self.spec.adapter)

    def install(self, transformer: nn.Module) -> None:
        anchor = nn.Module()
        HookRegistry.check_if_exists_or_initialize(anchor).register_hook(self, HOOK)
        transformer.add_module(HOOK, anchor)
        _forget_children(transformer)
        self._handles = [
            transformer.register_forward_pre_hook(self.before, with_kwargs=True),
            transformer.register_forward_hook(self.after, always_call=True),
        ]
        for layer in self.layers.values():
            layer.attn.processor = layer.processor

    def uninstall(self, transformer: nn.Module) -> None:
        for layer in self.layers.values():
            if layer.attn.processor is layer.processor:
                layer.attn.processor = layer.original
        for handle in self._handles:
            handle.remove()
        delattr(transformer, HOOK)
        _forget_children(transformer)
        self.strict = False  # a processor that someone kept runs dense

    @_eager
    def before(self, transformer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Look at a call and decide how its layers run."""
        if self._thread not in (None, threading.get_ident()):
            raise RuntimeError(
                "the transformer must run one call at a time; this one is running in another thread, whose masks it "
                "would take. Give every thread a pipeline of its own (copy.deepcopy)."
            )
        self._thread = threading.get_ident()
        arguments = self._signature.bind_partial(transformer, *args, **kwargs).arguments
        grid, has = self._grid(transformer, arguments)
        text = self.spec.text(transformer, arguments)
        context = self.context.current
        noise_level = self.schedule.level(context)
        self._notice_replaced()
        phase, reason = self._decide(grid, has, text, noise_level)
        layout = Layout(grid, text) if grid else None
        self.call = Call(layout, noise_level, branch_of(context), phase, reason, self.observer, self.presence)
        device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
        self._notice_ranks(transformer, device)
        if layout is not None and phase is not None:
            self._follow(phase, layout, device)
        self.calls["sparse" if reason is None else reason] += 1
        self.grids[has] += 1

    @_eager
    def after(self, *_: Any) -> None:
        if self._thread == threading.get_ident():  # a call that was refused ends here too
            self._thread = None
            self.call = self.call if self.presence else None

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.schedule.reset()
        self.context.current = None
        return module

    def fall_back(self, reason: str, remedy: str) -> str:
        """Return the reason for a dense call after warning once.

        Raises:
            PlanError: In strict mode.
        """
        if self.strict:
            raise PlanError(f"{reason}. {remedy}")
        self._warn(f"{reason}. Such calls run dense")
        return reason

    def table(self, layout: Layout, device: torch.device) -> Tensor:
        """Gather tables of the plan's orders, shared by all layers."""
        key = (layout.text, device)
        if key not in self._tables:
            if len(self._tables) >= LAYOUTS_KEPT:
                self._tables.clear()
            table = layout.table(self._orders)
            self._tables[key] = (self.ranks.places(layout)[table].int() if self.ranks else table).to(device)
        return self._tables[key]

    def _follow(self, phase: int, layout: Layout, device: torch.device) -> None:
        """Let every planned layer find its operands now: inside compiled blocks it could not."""
        if self.ranks is not None:
            self.ranks.check_layout(layout)
        self._judge(layout, device)
        unpack_all(layer.plan.mask for layer in self.layers.values() if layer.plan and not layer.faster_dense)
        for layer in self.layers.values():
            if layer.plan is not None and not layer.faster_dense:
                layer.follow(phase, layout, device)

    def _notice_ranks(self, transformer: nn.Module, device: torch.device) -> None:
        """Look whether the transformer was split, before or after `apply`; its ranks then compare their plans."""
        if getattr(transformer, "_parallel_config", None) is (self.ranks and self.ranks.config):
            return
        self.ranks = ranks_of(transformer)
        self._tables.clear()
        for layer in self.layers.values():
            layer.forget()
        if self.ranks is not None and self.plan is not None:
            self.ranks.check_heads(self.plan.heads)
            self.ranks.check_plan(self.plan, device, self.precision, self.impl, self.strict)

    def _judge(self, layout: Layout, device: torch.device) -> None:
        """Let layers run dense that are predicted to gain nothing: the same ones in all phases."""
        gpu = gpu_name(device)
        if self._even_if_slower or gpu is None:
            return
        assert self.plan is not None
        key = layout.text, device
        if key not in self._verdicts:
            video_only = [name for name, layer in self.layers.items() if layer.video_only]
            self._verdicts[key] = judge(
                self.plan, gpu, text=layout.text, video_only=video_only,
                precision=self.precision,
            )  # fmt: skip
        self.verdict = self._verdicts[key]
        for name, layer in self.layers.items():
            layer.why_dense = self.verdict.dense.get(name, "")
            layer.faster_dense = bool(layer.why_dense)
        if self.verdict.dense:
            self._warn(f"{self.verdict}. Say even_if_slower=True to run them by the plan all the same")

    def _grid(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> tuple[Grid | None, str]:
        """Size of the video in tokens, and in words; or what the call has instead."""
        try:
            grid = self.spec.grid(transformer, arguments)
        except GridUnknown as unknown:
            return None, str(unknown)
        return grid, str(grid)

    def _decide(
        self, grid: Grid | None, has: str, text: TextSpan, noise_level: float | None
    ) -> tuple[int | None, str | None]:
        """The phase, or the reason why the call runs dense."""
        plan = self.plan
        if self.dense_depth:
            return None, ON_REQUEST
        if plan is None:
            if grid is None:
                raise PlanError(
                    f"the call's arguments must tell the grid; this call has {has}. A plan covers one video or image "
                    "on one grid: calibrate without reference images or frames."
                )
            return None, "recording"
        if grid != plan.grid:
            return None, self.fall_back(
                f"the plan is for grid {plan.grid} (frames x height x width in tokens); this call has {has}",
                f"Calibrate at this resolution, or {_carry(grid)}apply with strict=False (--allow-dense) to run such "
                "calls dense.",
            )
        if text.tokens and text.side != plan.text.side:
            return None, self.fall_back(
                f"the plan is for text as {plan.text.side}; this call has it as {text.side}",
                "Calibrate this model again.",
            )
        if len(plan.phases) == 1:
            return 0, None
        if noise_level is None:
            return None, self.fall_back(
                f"the plan has {len(plan.phases)} phases; the noise level of this call is not known",
                "Apply to the pipeline rather than its transformer, or call set_noise_level before each step.",
            )
        return plan.phase_at(noise_level), None

    def _notice_replaced(self) -> None:
        self.replaced = [name for name, layer in self.layers.items() if layer.attn.processor is not layer.processor]
        if self.replaced:
            self._warn(
                f"the attention processors of {len(self.replaced)} planned layers ({self.replaced[0]}, …) were "
                "replaced after apply, so they run without the plan. Call paroattn.remove and apply again"
            )

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"{message}.", stacklevel=2)


def hook_of(transformer: nn.Module) -> PlanHook | None:
    """What `apply` or `recording` put on a transformer, if anything."""
    anchor = transformer._modules.get(HOOK)
    hook = None if anchor is None else HookRegistry.check_if_exists_or_initialize(anchor).get_hook(HOOK)
    return hook if isinstance(hook, PlanHook) else None


def gpu_name(device: torch.device) -> str | None:
    """Name of a GPU; None for other devices."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def _carry(grid: Grid | None) -> str:
    """How to come to this grid without calibrating."""
    return f"carry the plan there (plan.for_grid, or paro plan --grid {grid}), or " if grid else ""


def _forget_children(transformer: nn.Module) -> None:
    """Make diffusers look again for hooks below the transformer; only some versions have a method for it."""
    HookRegistry.check_if_exists_or_initialize(transformer)._child_registries_cache = None
