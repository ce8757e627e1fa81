"""Scores of answers: BABILong's published metric, the same with its faults corrected, exact match, F1.

The published metric (github.com/booydar/babilong, metrics.py) finds labels as substrings. So "one" is
found in "none" and a qa7 target "none" is never right; "know" and "now" count as "no"; its labels of
qa19 lack the four paths that go back ("n,s"), so that these count as nothing said; and its cut at
"Question" never cuts, as the text is in lower case by then."""

from __future__ import annotations

import re
import string
from collections import Counter

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


def normalised_match(output: str, target: str) -> bool:
    """SQuAD's exact match: equal but for case, punctuation, articles and blanks."""
    said, wanted = _words_of_both(output, target)
    return said == wanted


def token_f1(output: str, target: str) -> float:
    """SQuAD's F1, from 0 to 1: of the words that output and target share, each as often as in both."""
    said, wanted = _words_of_both(output, target)
    if not said or not wanted:
        return float(said == wanted)
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted))


def _words_of_both(output: str, target: str) -> tuple[list[str], list[str]]:
    """The words of both that SQuAD compares; all of them, where it would leave none of the target's.

    Of an answer "A", as of a choice, the article is what was asked for, and of "?" the punctuation.
    """
    for words in (_squad_words, _words, str.split):
        if found := words(target):
            return words(output), found
    # No answer at all is wanted.
    return _squad_words(output), []


def _squad_words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", " ".join(_words(text))).split()


def _words(text: str) -> list[str]:
    return "".join(letter for letter in text.lower() if letter not in string.punctuation).split()
