"""Scores of answers, and the intervals and tests of their shares."""

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
