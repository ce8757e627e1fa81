"""Evaluation: bAbI stories, haystacks, BABILong composition, metrics and the streaming runner.

Names are imported on first use, so that importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memlm.eval import babi, babilong, haystack, metrics
    from memlm.tasks.haystack import Haystack
    from memlm.eval.reporting.report import Report
    from memlm.eval.running.runner import evaluate

_MODULES = ("babi", "babilong", "haystack", "metrics", "report", "runner")
_NAMES = {
    "Haystack": "memlm.tasks.haystack",
    "Report": "memlm.eval.reporting.report",
    "evaluate": "memlm.eval.running.runner",
}

__all__ = ["Haystack", "Report", "babi", "babilong", "evaluate", "haystack", "metrics"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"memlm.eval.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'memlm.eval' has no attribute {name!r}")
