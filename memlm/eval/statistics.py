"""Intervals and tests for shares of right answers, alone and in pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion, 95% by default; (0, 1) without trials."""
    if not 0 <= successes <= n:
        raise ValueError(f"successes={successes} must lie between 0 and n={n}")
    if n == 0:
        return 0.0, 1.0
    share, spread = successes / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(counts: Sequence[tuple[int, int]], z: float = 1.959964) -> tuple[float, float]:
    """Return an interval, 95% by default, of the mean of several accuracies, each (right, samples).

    Every task weighs the same however many samples it has. The squared distances of each accuracy to
    its Wilson limits are added like variances (Newcombe's square-and-add, also called MOVER): with one
    task it is Wilson's interval, and it keeps a width where every answer is right.
    """
    if not counts:
        raise ValueError("counts is empty; give (right, samples) of at least one task")
    below = above = total = 0.0
    for right, samples in counts:
        if samples < 1:
            raise ValueError(f"counts has a task with samples={samples}; leave such tasks out")
        low, high = wilson(right, samples, z)
        share = right / samples
        total += share
        below += (share - low) ** 2
        above += (high - share) ** 2
    tasks = len(counts)
    mean = total / tasks
    return max(0.0, mean - math.sqrt(below) / tasks), min(1.0, mean + math.sqrt(above) / tasks)


def paired_interval(
    gained: float, lost: float, n: float, z: float = 1.959964
) -> tuple[float, float]:
    """Return Tango's score interval of a paired difference of proportions, 95% by default.

    Of n pairs, `gained` are right in the second run only and `lost` in the first only; the difference
    is (gained - lost) / n. Counts need not be whole: a design effect may have shrunk them.
    """
    if n <= 0 or gained < 0 or lost < 0 or gained + lost > n * (1 + 1e-9):
        raise ValueError(
            f"gained={gained}, lost={lost} must not be negative nor exceed n={n} together"
        )
    observed = (gained - lost) / n

    def outside(delta: float) -> bool:
        # The likeliest share of lost pairs if the difference were delta.
        linear = (2 * n - gained + lost) * delta - gained - lost
        constant = -lost * delta * (1 - delta)
        root = math.sqrt(max(0.0, linear * linear - 8 * n * constant))
        share = (root - linear) / (4 * n)
        variance = n * max(0.0, 2 * share + delta * (1 - delta))
        return (gained - lost - n * delta) ** 2 > z * z * variance

    def limit(end: float) -> float:
        if not outside(end):
            return end
        inner, outer = observed, end
        for _ in range(60):
            middle = (inner + outer) / 2
            inner, outer = (inner, middle) if outside(middle) else (middle, outer)
        return inner

    return limit(-1.0), limit(1.0)


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided exact p of McNemar's test: if either run were as likely to win a pair that
    only one of them has right, how often would the split be at least as uneven as this?"""
    if gained < 0 or lost < 0:
        raise ValueError(f"gained={gained} and lost={lost} must not be negative")
    n, fewer = gained + lost, min(gained, lost)
    term = total = 1
    for k in range(fewer):
        term = term * (n - k) // (k + 1)
        total += term
    return min(1.0, 2 * total / 2**n)  # whole numbers up to the division: no rounding, no overflow


def sign_flips(sums: Iterable[int]) -> float:
    """Return the two-sided exact p of a sign-flip test on the net gains of independent groups.

    If there is no difference, each group's net gain is as likely of either sign. With groups of one pair it
    is McNemar's test; groups of dependent pairs are flipped as one.
    """
    import numpy as np

    kept = [gain for gain in sums if gain]
    gains = [abs(gain) for gain in kept]
    chance = np.ones(1)
    for gain in sorted(gains):
        wider = np.zeros(len(chance) + 2 * gain)
        wider[: len(chance)] += chance / 2
        wider[2 * gain :] += chance / 2
        chance = wider
    reach, centre = abs(sum(kept)), sum(gains)
    if not reach:
        return 1.0
    return min(1.0, 2 * float(chance[centre + reach :].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the order given: those below 0.05 hold jointly at that level."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted
