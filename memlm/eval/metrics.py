"""Scores of answers: BABILong's published metric, the same with its faults mended, exact match.

The published metric (github.com/booydar/babilong, metrics.py) finds labels as substrings. So "one" is
found in "none" and a qa7 target "none" is never right; "know" and "now" count as "no"; its labels of
qa19 lack the four paths that turn back ("n,s"), so that these count as nothing said; and its cut at
"Question" never cuts, as the text is in lower case by then.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from memlm.tasks.babi.story import check_task

_PLACES = frozenset({"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"})
_YES_NO = frozenset({"no", "yes"})

LABELS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4", "qa11", "qa12", "qa13"), _PLACES),
    "qa5": frozenset({"bill", "fred", "jeff", "mary", "apple", "football", "milk"}),
    **dict.fromkeys(("qa6", "qa9", "qa17", "qa18"), _YES_NO),
    "qa7": frozenset({"none", "one", "two", "three"}),
    "qa8": frozenset({"apple", "football", "milk", "nothing"}),
    "qa10": _YES_NO | {"maybe"},
    "qa14": frozenset({"bedroom", "cinema", "kitchen", "office", "park", "school"}),
    "qa15": frozenset({"cat", "mouse", "sheep", "wolf"}),
    "qa16": frozenset({"gray", "green", "white", "yellow"}),
    "qa19": frozenset(f"{a},{b}" for a in "nsew" for b in "nsew"),
    "qa20": frozenset({"bored", "hungry", "thirsty", "tired", "bedroom", "garden", "kitchen"}),
}


# As published, where that differs: the twelve paths of two steps that a story may ask for.
_PUBLISHED_LABELS = {"qa19": LABELS["qa19"] - {"n,s", "s,n", "e,w", "w,e"}}


def babilong_score(
    output: str, target: str, question: str, task: str, *, strict_compat: bool = False
) -> bool:
    """Say whether the first sentence of `output` names the target and no other label of the task.

    Labels that the question mentions do not count. `strict_compat` reproduces the published metric
    with its faults, for comparison with published tables; otherwise labels are whole words.
    """
    labels = LABELS[check_task(task)]
    if strict_compat:
        return _published(output, target, question, _PUBLISHED_LABELS.get(task, labels))
    said = re.split(r"\.|<context>|<example>|question", output.lower())[0]
    said = re.sub(r",\s+", ",", said)  # "n, e" is the label "n,e"
    wanted = target.lower().strip()
    targets = {wanted} if wanted in labels else {part.strip() for part in wanted.split(",")}
    asked = _whole_words(question.lower(), labels) - targets
    return _whole_words(said, labels | targets) - asked == targets


def _published(output: str, target: str, question: str, labels: frozenset[str]) -> bool:
    said = output.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    wanted = target.lower()
    found = {label for label in labels if label in said}
    found -= {label for label in labels if label in question.lower()}
    if "," in wanted and len(wanted) > 3:  # qa8's lists; qa19's "n,e" is one label
        parts = wanted.split(",")
        return all(part in found for part in parts) and len(found) == len(parts)
    return found == {wanted}


def _whole_words(text: str, labels: frozenset[str]) -> set[str]:
    return {label for label in labels if re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text)}


def exact_match(output: str, target: str) -> bool:
    """Say whether the output is the target and nothing else, as the RMT and ARMT papers count."""
    return output.strip() == target.strip()


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
        # The likeliest share of lost pairs, were the difference delta.
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
    """Return the two-sided exact p of McNemar's test: were either run as likely to win a pair that
    only one of them has right, how often would the split be as uneven as this?"""
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

    Under no difference each group's net gain is as likely of either sign. With groups of one pair it
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
    """Return Holm's adjusted p-values, in the order given: below 0.05 the family errs 5% at most."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted
