"""The published metric with its traps, the corrected one, and the interval."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from memlm.eval.metrics import LABELS, babilong_score, exact_match, wilson

WHERE = "Where is Mary?"


def published(output: str, target: str, question: str, task: str) -> bool:
    return babilong_score(output, target, question, task, strict_compat=True)


@pytest.mark.parametrize("score", [babilong_score, published])
def test_the_target_must_be_the_only_label(score: object) -> None:
    assert callable(score)
    assert score("Mary is in the kitchen.", "kitchen", WHERE, "qa1")
    assert score("KITCHEN", "kitchen", WHERE, "qa1")
    assert not score("kitchen or garden", "kitchen", WHERE, "qa1")
    assert not score("", "kitchen", WHERE, "qa1")
    assert not score("garden", "kitchen", WHERE, "qa1")


@pytest.mark.parametrize("score", [babilong_score, published])
def test_only_the_first_sentence_counts(score: object) -> None:
    assert callable(score)
    assert score("kitchen. Then the garden", "kitchen", WHERE, "qa1")
    assert score("kitchen<context>garden", "kitchen", WHERE, "qa1")
    assert score("kitchen <example> garden", "kitchen", WHERE, "qa1")


@pytest.mark.parametrize("score", [babilong_score, published])
def test_labels_of_the_question_do_not_count(score: object) -> None:
    assert callable(score)
    question = "Where was the apple before the garden?"
    assert score("before the garden it was in the office", "office", question, "qa3")
    assert score("Bill gave the milk to Jeff", "milk", "What did Bill give to Jeff?", "qa5")


def test_the_published_metric_can_never_count_none_right() -> None:
    question = "How many objects is Mary carrying?"
    assert not published("none", "none", question, "qa7")
    assert babilong_score("none", "none", question, "qa7")
    assert not babilong_score("one", "none", question, "qa7")


def test_the_published_metric_reads_no_in_know_and_now() -> None:
    question = "Is Mary in the office?"
    assert not published("yes, I know", "yes", question, "qa6")
    assert published("now", "no", question, "qa6")
    assert babilong_score("yes, I know", "yes", question, "qa6")
    assert not babilong_score("now", "no", question, "qa6")


def test_the_published_cut_at_question_is_dead_and_mended() -> None:
    output = "kitchen Question: garden"
    assert not published(output, "kitchen", WHERE, "qa1")
    assert babilong_score(output, "kitchen", WHERE, "qa1")


@pytest.mark.parametrize("score", [babilong_score, published])
def test_lists_need_every_item_and_no_more(score: object) -> None:
    assert callable(score)
    question = "What is Mary carrying?"
    assert score("milk and apple", "apple,milk", question, "qa8")
    assert not score("milk", "apple,milk", question, "qa8")
    assert not score("milk, apple, football", "apple,milk", question, "qa8")


@pytest.mark.parametrize("score", [babilong_score, published])
def test_a_path_is_one_label(score: object) -> None:
    assert callable(score)
    assert score("n,e", "n,e", "How do you go from the garden to the office?", "qa19")
    assert not score("e,n", "n,e", "How do you go from the garden to the office?", "qa19")


_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
# TASK_LABELS of github.com/booydar/babilong (Apache-2.0), babilong/metrics.py.
TASK_LABELS = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4", "qa11", "qa12", "qa13"), _PLACES),
    "qa5": ["Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"],
    **dict.fromkeys(("qa6", "qa9", "qa17", "qa18"), ("no", "yes")),
    "qa7": ["none", "one", "three", "two"],
    "qa8": ["apple", "football", "milk", "nothing"],
    "qa10": ["maybe", "no", "yes"],
    "qa14": ["bedroom", "cinema", "kitchen", "office", "park", "school"],
    "qa15": ["cat", "mouse", "sheep", "wolf"],
    "qa16": ["gray", "green", "white", "yellow"],
    "qa19": ["e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w"],
    "qa20": ["bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"],
}


def compare_answers(target: str, output: str, question: str, task_labels: Iterable[str]) -> bool:
    """As published, but for its comments."""
    output = output.lower()
    output = output.split(".")[0]
    output = output.split("<context>")[0]
    output = output.split("<example>")[0]
    output = output.split("Question")[0]
    target = target.lower()
    labels = {label.lower() for label in task_labels}
    labels_in_question = {label for label in labels if label in question.lower()}
    labels_in_output = {label for label in labels if label in output}
    labels_in_output = labels_in_output - labels_in_question
    if "," in target and len(target) > 3:
        subtargets = target.split(",")
        return all(t in labels_in_output for t in subtargets) and len(labels_in_output) == len(
            subtargets
        )
    return target in labels_in_output and len(labels_in_output) == 1


@pytest.mark.parametrize("task", list(TASK_LABELS))
def test_strict_compat_is_the_published_metric(task: str) -> None:
    rng = random.Random(task)
    labels = TASK_LABELS[task]
    loose = [*labels, *LABELS[task], "I know", "now", "Question:", ".", "<example>", "n", "e,", ","]
    right = 0
    for _ in range(2000):
        target = rng.choice(labels)
        if task == "qa8":
            target = ",".join(rng.sample(labels[:3], rng.randint(1, 3)))
        said = rng.choice(["", " ", ", ", ","]).join(rng.choices(loose, k=rng.randint(0, 3)))
        output = rng.choice([target, f"{target} {said}", said, f"{said} {target}", target.upper()])
        question = rng.choice(["Where is Mary?", f"Is it {rng.choice(labels)}?"])
        wanted = compare_answers(target, output, question, labels)
        assert published(output, target, question, task) == wanted, (output, target, question)
        right += wanted
    assert 100 < right < 1900


def test_the_published_labels_of_paths_lack_those_that_turn_back() -> None:
    question = "How do you go from the garden to the office?"
    assert published("n,s,e", "s,e", question, "qa19")
    assert not babilong_score("n,s,e", "s,e", question, "qa19")


def test_a_path_may_be_written_with_a_space() -> None:
    assert babilong_score("n, e", "n,e", "How do you go there?", "qa19")


def test_every_task_has_labels() -> None:
    assert set(LABELS) == {f"qa{number}" for number in range(1, 21)}


def test_exact_match_wants_the_target_and_nothing_else() -> None:
    assert exact_match(" kitchen\n", "kitchen")
    assert not exact_match("kitchen garden", "kitchen")
    assert not exact_match("Kitchen", "kitchen")


def test_wilson_gives_the_textbook_interval() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(100, 100) == pytest.approx((0.9630, 1.0), abs=1e-4)
    assert wilson(0, 100)[0] == 0.0
    with pytest.raises(ValueError, match="successes=3"):
        wilson(3, 2)
