"""Block statistics of a model's attention maps: what is measured, how it adds up, and how it is kept on disk."""

from .measured import BlockStats, CaptureSettings
from .statistics import Statistics

__all__ = ["BlockStats", "CaptureSettings", "Statistics"]
