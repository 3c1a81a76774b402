"""Where a plan would not pay: layers that dense attention serves faster on a GPU, by the cost model."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..block_mask import blocks_of
from ..grid import Layout, TextSpan
from ..precision import Precision
from .cost import Call, Rates, TimeUnknown, kept_blocks, rates_of
from .plan import LayerPlan, TransformerPlan

PerHead = str | Precision | Sequence[str]


@dataclass(frozen=True)
class Verdict:
    """What runs dense though a plan is applied.

    Attributes:
        gpu: Where.
        dense: Reasons by layer.
        unknown: Why nothing is known of times there, so that all layers follow the plan.
    """

    gpu: str
    dense: dict[str, str] = field(default_factory=dict)
    unknown: str | None = None

    def __str__(self) -> str:
        if self.unknown is not None:
            return f"on {self.gpu}, every layer follows the plan: {self.unknown}"
        if not self.dense:
            return f"on {self.gpu}, every layer is predicted to gain"
        example = next(iter(self.dense))
        return f"on {self.gpu}, layers that run dense: {len(self.dense)}; {example}: {self.dense[example]}"


def judge(
    plan: TransformerPlan,
    gpu: str,
    *,
    text: TextSpan | None = None,
    video_only: Sequence[str] = (),
    precision: str | Precision | None = None,
) -> Verdict:
    """Find the layers for which dense attention is predicted to be faster than the plan, over the whole schedule.

    The answer depends on the plan, the text's length, the precision and the GPU's name alone, and holds for all phases.

    Args:
        plan: Of one transformer.
        gpu: Its name, as PyTorch has it.
        text: Text tokens of a call; as at calibration by default.
        video_only: Layers that see the video alone.
        precision: Instead of the plan's.
    """
    found: dict[str, str] = {}
    text = plan.text if text is None else text
    try:
        rates = rates_of(gpu)
        for name, layer in plan.layers.items():
            layout = Layout(plan.grid) if name in video_only else Layout(plan.grid, text)
            slower = _slower(plan, layer, layout, rates, precision)
            if slower is not None:
                dense, sparse = slower
                found[name] = (
                    f"{layout.tokens} tokens are too few to gain on {gpu}: predicted {dense:.2g} ms a call dense, "
                    f"{sparse:.2g} ms by the plan"
                )
    except TimeUnknown as unknown:
        return Verdict(gpu, unknown=unknown.why)
    return Verdict(gpu, found)


def _slower(
    plan: TransformerPlan, layer: LayerPlan, layout: Layout, rates: Rates, precision: str | Precision | None
) -> tuple[float, float] | None:
    """Milliseconds of a layer dense and by its plan if the former are fewer; blocks are counted only if they matter."""
    call = Call(layout.tokens, plan.heads, plan.head_dim)
    dense = rates.dense_ms(call)
    formats: list[PerHead] = [precision or heads for heads in layer.precision]
    shares = [phase.share for phase in plan.phases]

    def sparse(density: Sequence[Sequence[float]]) -> float:
        kept = [kept_blocks(layout, plan.block, each) for each in density]
        times = [rates.sparse_ms(call, *each) for each in zip(kept, [plan.block] * len(kept), formats, strict=True)]
        return sum(share * ms for share, ms in zip(shares, times, strict=True))

    def even(density: float) -> list[list[float]]:
        return [[density] * plan.heads] * len(shares)

    if sparse(even(1.0)) <= dense:
        return None
    least = 1 / blocks_of(plan.grid.tokens, plan.block[1])
    ms = sparse(even(least))
    if ms <= dense:
        ms = sparse(layer.mask.head_density().tolist())
    return (dense, ms) if ms > dense else None
