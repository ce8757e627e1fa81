"""Scores of answers, and intervals and tests for shares of right answers."""

from memlm.eval.statistics import (
    holm,
    mcnemar,
    mean_interval,
    paired_interval,
    sign_flips,
    wilson,
)
from memlm.tasks.scoring import LABELS, babilong_score, exact_match

__all__ = [
    "LABELS",
    "babilong_score",
    "exact_match",
    "holm",
    "mcnemar",
    "mean_interval",
    "paired_interval",
    "sign_flips",
    "wilson",
]
