"""Generated stories: solvable, reproducible, and told as the original tells them."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from memlm.eval import babi

STORIES = 1500


def take(task: str, count: int = STORIES, seed: int = 0) -> list[babi.Story]:
    return list(itertools.islice(babi.generate(task, seed), count))


def words(stories: list[babi.Story]) -> set[str]:
    texts = (text for story in stories for text in (*story.facts, story.question, story.answer))
    return {word.strip(".?") for text in texts for word in text.split()}


@pytest.mark.parametrize("task", babi.GENERATED)
def test_the_solver_agrees_with_every_generated_answer(task: str) -> None:
    for story in take(task):
        assert babi.solve(story.facts, story.question) == story.answer, story


@pytest.mark.parametrize("task", babi.GENERATED)
def test_supporting_facts_alone_give_the_answer(task: str) -> None:
    for story in take(task):
        facts = [story.facts[index] for index in sorted(story.supporting)]
        assert babi.solve(facts, story.question) == story.answer, story


@pytest.mark.parametrize("task", ["qa2", "qa3"])
def test_no_supporting_fact_can_be_left_out(task: str) -> None:
    for story in take(task, 300):
        for left_out in story.supporting:
            facts = [story.facts[i] for i in sorted(story.supporting) if i != left_out]
            try:
                assert babi.solve(facts, story.question) != story.answer, story
            except ValueError:
                pass


@pytest.mark.parametrize("task", babi.GENERATED)
def test_a_seed_gives_the_same_stories_and_another_seed_others(task: str) -> None:
    assert take(task, 50) == take(task, 50)
    assert take(task, 50) != take(task, 50, seed=1)
    by_generator = itertools.islice(babi.generate(task, np.random.default_rng(3)), 50)
    again = itertools.islice(babi.generate(task, np.random.default_rng(3)), 50)
    assert list(by_generator) == list(again)


def test_a_seed_means_the_same_stories_in_every_version() -> None:
    assert take("qa1", 1)[0] == babi.Story(
        facts=["Sandra journeyed to the kitchen.", "Mary moved to the hallway."],
        question="Where is Sandra?",
        answer="kitchen",
        supporting=[0],
        task="qa1",
    )


def test_qa1_asks_after_every_two_facts_up_to_ten() -> None:
    assert [len(story.facts) for story in take("qa1", 12)] == [2, 4, 6, 8, 10, 2, 4, 6, 8, 10, 2, 4]


@pytest.mark.parametrize("task", babi.GENERATED)
def test_no_answer_is_a_good_guess(task: str) -> None:
    counts = Counter(story.answer for story in take(task))
    most = {"qa5": 0.26}.get(task, 0.24)
    assert len(counts) >= 6
    assert max(counts.values()) / STORIES < most, counts


@pytest.mark.parametrize("task", babi.GENERATED)
def test_vocabulary_is_the_original_one(task: str, original_stories: Path) -> None:
    assert words(take(task)) == words(babi.load_task(original_stories, task))


@pytest.mark.parametrize("task", babi.GENERATED)
def test_lengths_are_like_the_original_ones(task: str, original_stories: Path) -> None:
    ours = [len(story.facts) for story in take(task, 5000)]
    theirs = [len(story.facts) for story in babi.load_task(original_stories, task)]
    assert statistics.mean(ours) == pytest.approx(statistics.mean(theirs), rel=0.25)
    assert statistics.median(ours) == pytest.approx(statistics.median(theirs), rel=0.3, abs=1)


@pytest.mark.parametrize("task", babi.GENERATED)
def test_first_words_are_shared_out_like_the_original_ones(
    task: str, original_stories: Path
) -> None:
    def shares(stories: list[babi.Story]) -> dict[str, float]:
        verbs = Counter(fact.split()[1] for story in stories for fact in story.facts)
        return {verb: count / verbs.total() for verb, count in verbs.items()}

    ours, theirs = shares(take(task, 5000)), shares(babi.load_task(original_stories, task))
    assert ours.keys() == theirs.keys()
    for verb, share in theirs.items():
        assert ours[verb] == pytest.approx(share, abs=0.05), verb


@pytest.mark.parametrize("task", ["qa6", "qa20"])
def test_a_task_without_generator_names_those_that_have_one(task: str) -> None:
    with pytest.raises(ValueError, match=r"qa1, qa2, qa3, qa4, qa5.*babi\.load"):
        babi.generate(task, 0)


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="nearest is 'qa3'"):
        babi.generate("qa 3", 0)


def test_there_are_twenty_tasks() -> None:
    assert babi.TASKS[0] == "qa1" and babi.TASKS[-1] == "qa20" and len(babi.TASKS) == 20
