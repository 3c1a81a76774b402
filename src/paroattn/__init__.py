"""PAROAttention: block-sparse, quantised attention for visual diffusion transformers, planned once, applied always."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .grid import Grid
    from .integration.apply import apply, dense, remove, report
    from .integration.calibrate import calibrate
    from .integration.refining import refine
    from .kernels.attention import attention
    from .plan.plan import Plan

__version__ = "0.1.0"
__all__ = ["Grid", "Plan", "__version__", "apply", "attention", "calibrate", "dense", "refine", "remove", "report"]

_DEFINED_IN = {
    "Grid": ".grid",
    "Plan": ".plan.plan",
    "apply": ".integration.apply",
    "attention": ".kernels.attention",
    "calibrate": ".integration.calibrate",
    "dense": ".integration.apply",
    "refine": ".integration.refining",
    "remove": ".integration.apply",
    "report": ".integration.apply",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that importing the package loads nothing heavy."""
    if name not in _DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_DEFINED_IN[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
