"""How close sparse attention stays to dense: paired metrics, clips for a browser, and one self-contained report."""

from .fidelity import Comparison, Fidelity, Summary, compare, evaluate, summarise, summarise_pairs
from .maps import AttentionMap
from .plan_page import draw_plan, write_plan
from .report import ReportData, environment, write_report
from .video import check_clip_path, write_clip

__all__ = [
    "AttentionMap",
    "Comparison",
    "Fidelity",
    "ReportData",
    "Summary",
    "check_clip_path",
    "compare",
    "draw_plan",
    "environment",
    "evaluate",
    "summarise",
    "summarise_pairs",
    "write_clip",
    "write_plan",
    "write_report",
]
