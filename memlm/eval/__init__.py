"""Evaluation: a model is asked questions, its answers are scored, and results are shown and compared.

Names are imported on first use, so that importing this package loads neither torch nor transformers.
The tasks are in `memlm.tasks`; the names of it that an evaluation needs are here as well.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memlm.eval import metrics
    from memlm.eval.losses.measure import perplexity
    from memlm.eval.reach import remembrance
    from memlm.eval.reporting.compare import compare
    from memlm.eval.reporting.report import Report
    from memlm.eval.running.runner import evaluate
    from memlm.tasks import babi, babilong, haystack
    from memlm.tasks.haystack import Haystack

_MODULES = {
    "babi": "memlm.eval.babi",
    "babilong": "memlm.eval.babilong",
    "haystack": "memlm.tasks.haystack",
    "metrics": "memlm.eval.metrics",
}
_NAMES = {
    "Haystack": "memlm.tasks.haystack",
    "Report": "memlm.eval.reporting.report",
    "compare": "memlm.eval.reporting.compare",
    "evaluate": "memlm.eval.running.runner",
    "perplexity": "memlm.eval.losses.measure",
    "remembrance": "memlm.eval.reach",
}

__all__ = [
    "Haystack",
    "Report",
    "babi",
    "babilong",
    "compare",
    "evaluate",
    "haystack",
    "metrics",
    "perplexity",
    "remembrance",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'memlm.eval' has no attribute {name!r}")
