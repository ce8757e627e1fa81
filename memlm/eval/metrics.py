"""Scores of answers, and intervals and tests for shares of right answers."""

from memlm.eval.statistics import (
    holm,
    mcnemar,
    mean_interval,
    paired_interval,
    sign_flips,
    wilson,
)
from memlm.tasks.scoring import LABELS, babilong_score, exact_match, normalised_match, token_f1

__all__ = [
    "LABELS",
    "babilong_score",
    "exact_match",
    "holm",
    "mcnemar",
    "mean_interval",
    "normalised_match",
    "paired_interval",
    "sign_flips",
    "token_f1",
    "wilson",
]
