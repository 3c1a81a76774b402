"""What the layers of an applied plan did, as plain values and as a table."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..grid import Grid
from ..plan.plan import precision_shares
from .backend import Layer
from .hook import ON_REQUEST, PlanHook


@dataclass(frozen=True)
class Report:
    """What was executed since a plan was applied.

    Attributes:
        transformers: Plain values by component name. Densities are over all blocks, 0…1, weighted by calls, None where
            nothing ran; a call that fell back to dense counts as 1, one inside `paroattn.dense` not at all. What
            torch.compile runs is counted for the transformer but not for its layers.
    """

    transformers: Mapping[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.transformers)

    def rows(self) -> list[dict[str, Any]]:
        """One flat row for each layer and phase; dense calls stand in the row of the first phase."""
        several = len(self.transformers) > 1
        return [
            {
                "layer": f"{name}.{layer}" if several else layer,
                "phase": index,
                "density_executed": phase["density"],
                "sparse_calls": phase["sparse_calls"],
                "dense_calls": row["dense_calls"] if index == 0 else {},
            }
            for name, part in self.transformers.items()
            for layer, row in part["layers"].items()
            for index, phase in enumerate(row["phases"])
        ]

    def __str__(self) -> str:
        return "\n\n".join(_table(name, part) for name, part in self.transformers.items())


def merged(reports: Sequence[Mapping[str, dict[str, Any]]]) -> Report:
    """One report of what several runs with the same plan did, from their `to_dict`."""
    names = {name: None for report in reports for name in report}
    return Report({name: _merged([report[name] for report in reports if name in report]) for name in names})


def _merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One transformer's part of several reports."""
    layers = {name: _merged_layer([part["layers"][name] for part in parts]) for name in parts[0]["layers"]}
    return {
        **parts[0],
        "grids_seen": dict(sum((Counter(part["grids_seen"]) for part in parts), Counter())),
        "calls": dict(sum((Counter(part["calls"]) for part in parts), Counter())),
        "replaced_layers": list(dict.fromkeys(name for part in parts for name in part["replaced_layers"])),
        "density": _mean((layer["density"], 1) for layer in layers.values()),
        "layers": layers,
    }


def _merged_layer(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    phases = [
        {
            **same[0],
            "density": _mean((each["density"], each["sparse_calls"]) for each in same),
            "sparse_calls": sum(each["sparse_calls"] for each in same),
            "impl": next((each["impl"] for each in same if each["impl"]), None),
        }
        for same in zip(*(row["phases"] for row in rows), strict=True)
    ]
    dense_calls = sum((Counter(row["dense_calls"]) for row in rows), Counter())
    return _layer(phases, dense_calls, next((row["faster_dense"] for row in rows if row["faster_dense"]), None))


def describe(transformer: nn.Module, hook: PlanHook) -> dict[str, Any]:
    """One transformer's part of the report."""
    assert hook.plan is not None
    layers = {name: _describe_layer(layer, hook.plan.grid) for name, layer in hook.layers.items()}
    return {
        "model_class": type(transformer).__name__,
        "plan_grid": str(hook.plan.grid),
        "grids_seen": dict(hook.grids),
        "calls": dict(hook.calls),
        "replaced_layers": hook.replaced,
        "prediction": None if hook.verdict is None else str(hook.verdict),
        "precision": precision_shares([_applied(layer) for layer in hook.layers.values()], hook.plan.phases),
        "density": _mean((layer["density"], 1) for layer in layers.values()),
        "layers": layers,
    }


def _applied(layer: Layer) -> list[tuple[str, ...]]:
    """Precision of each head in each phase as it is applied."""
    assert layer.plan is not None
    each = [layer.precision(phase) for phase in range(len(layer.plan.precision))]
    return [name if isinstance(name, tuple) else (str(name),) * len(layer.plan.orders) for name in each]


def _describe_layer(layer: Layer, grid: Grid) -> dict[str, Any]:
    assert layer.plan is not None
    phases = [_describe_phase(layer, phase, grid) for phase in range(len(layer.plan.precision))]
    return _layer(phases, layer.dense_calls, layer.why_dense or None)


def _layer(phases: list[dict[str, Any]], dense_calls: Counter[str], faster_dense: str | None) -> dict[str, Any]:
    """What a layer did, from what it did in each phase."""
    ran = [(phase["density"], phase["sparse_calls"]) for phase in phases]
    fell_back = dense_calls.total() - dense_calls[ON_REQUEST]
    return {
        "density": _mean([*ran, (1.0, fell_back)]),
        "sparse_calls": sum(phase["sparse_calls"] for phase in phases),
        "dense_calls": {reason: count for reason, count in dense_calls.items() if count},
        "faster_dense": faster_dense,
        "phases": phases,
    }


def _describe_phase(layer: Layer, phase: int, grid: Grid) -> dict[str, Any]:
    assert layer.plan is not None
    calls = {text: count for (at, text), count in layer.sparse_calls.items() if at == phase}
    mask, precision = layer.plan.mask[phase], layer.precision(phase)
    return {
        "density": _mean((mask.with_text(grid.tokens, text).density, count) for text, count in calls.items()),
        "sparse_calls": sum(calls.values()),
        "precision": list(precision) if isinstance(precision, tuple) else str(precision),
        "impl": layer.ran.get(phase),
    }


def _mean(weighted: Iterable[tuple[float | None, int]]) -> float | None:
    pairs = [(value, weight) for value, weight in weighted if value is not None and weight]
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs) if pairs else None


def _table(name: str, part: dict[str, Any]) -> str:
    grids = ", ".join(f"{grid} ({count})" for grid, count in part["grids_seen"].items()) or "none"
    lines = [
        f"{name}: {part['model_class']}, executed density {_number(part['density'])}",
        f"  plan's grid {part['plan_grid']}; calls by grid: {grids}",
    ]
    lines += [f"  {part['prediction']}"] if part["prediction"] else []
    lines.append("  precision of the heads: " + ", ".join(f"{form} {n:.0%}" for form, n in part["precision"].items()))
    lines += [f"  {count:6} calls {_outcome(kind)}" for kind, count in part["calls"].items()]
    reasons = sum((Counter(row["dense_calls"]) for row in part["layers"].values()), Counter())
    lines += [f"  {n:6} layer calls {_outcome(kind)}" for kind, n in reasons.items() if kind not in part["calls"]]
    if part["replaced_layers"]:
        lines.append(f"  processors replaced by someone else: {', '.join(part['replaced_layers'])}")
    width = max(map(len, part["layers"]))
    lines.append(f"  {'layer':{width}}  density  sparse  dense  density by phase (calls, precision, implementation)")
    for layer, row in part["layers"].items():
        phases = "  ".join(
            f"{_number(each['density'])} ({each['sparse_calls']}, {_precision(each['precision'])}{_ran(each['impl'])})"
            for each in row["phases"]
        )
        dense = sum(row["dense_calls"].values())
        lines.append(f"  {layer:{width}}  {_number(row['density']):>7}  {row['sparse_calls']:6}  {dense:5}  {phases}")
    return "\n".join(lines)


def _outcome(kind: str) -> str:
    return kind if kind == "sparse" else f"dense: {kind}"


def _number(density: float | None) -> str:
    return "-" if density is None else f"{density:.3f}"


def _ran(impl: str | None) -> str:
    return "" if impl is None else f", {impl}"


def _precision(precision: str | list[str]) -> str:
    if isinstance(precision, str):
        return precision
    return " + ".join(f"{count} heads {name}" for name, count in Counter(precision).items())
