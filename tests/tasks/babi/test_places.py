"""The generators of qa9 to qa14: what their stories promise, and that the originals keep it too."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from memlm.tasks import babi
from memlm.tasks.babi import Story
from tests.tasks.babi.agreement import supporting_facts, take

TASKS = [f"qa{number}" for number in range(9, 15)]
STORIES = 1500
TIMES = ("yesterday", "this morning", "this afternoon", "this evening")
_NAME = re.compile(r"\b(?:Bill|Daniel|Fred|John|Julie|Mary|Sandra)\b")


# Returns the stories of a task.
Tell = Callable[[str], list[Story]]


@pytest.fixture(params=["ours", "original"])
def tell(request: pytest.FixtureRequest) -> Tell:
    """Our stories or the original ones, for what must hold of both."""
    if request.param == "ours":
        return lambda task: take(task, STORIES)
    folder: Path = request.getfixturevalue("original_stories")
    return lambda task: babi.load_task(folder, task)


def doers(facts: list[str]) -> list[tuple[str, int]]:
    """Everybody who did something, in order, with the index of the fact that tells of it."""
    found: list[tuple[str, int]] = []
    named: list[str] = []
    for index, fact in enumerate(facts):
        named = _NAME.findall(fact) or named
        found += [(name, index) for name in named]
    return found


def asked(story: Story) -> str:
    return _NAME.findall(story.question)[0]


def places(fact: str) -> list[str]:
    return re.findall(r"the (\w+)", fact)


def visit(fact: str) -> tuple[str, int, str]:
    """The actor, time and place of a timed sentence."""
    time = next(i for i, words in enumerate(TIMES) if words in fact.lower())
    return _NAME.findall(fact)[0], time, places(fact)[0]


@pytest.mark.parametrize("task", TASKS)
def test_supporting_facts_are_what_the_solver_needs(task: str) -> None:
    for story in take(task, STORIES):
        assert babi.solve(story.facts, story.question) == story.answer, story
        assert babi.solve(supporting_facts(story), story.question) == story.answer, story


@pytest.mark.parametrize("task", ["qa11", "qa13", "qa14"])
def test_no_supporting_fact_can_be_left_out(task: str) -> None:
    for story in take(task, 300):
        for left_out in story.supporting:
            facts = [story.facts[i] for i in sorted(story.supporting) if i != left_out]
            try:
                assert babi.solve(facts, story.question) != story.answer, story
            except ValueError:
                pass


@pytest.mark.parametrize("task", TASKS[:-1])
def test_whoever_is_asked_about_did_one_of_the_last_five_things(task: str, tell: Tell) -> None:
    stories = tell(task)
    back: Counter[int] = Counter()
    for story in stories:
        latest = [name for name, _ in reversed(doers(story.facts))].index(asked(story))
        back[latest] += 1
    assert max(back) == 4
    # The newest are asked about most, as they may have done several of the five.
    assert back[0] + back[1] > 2 * (back[3] + back[4])


@pytest.mark.parametrize("task", TASKS[:-1])
def test_support_is_the_latest_told_of_the_one_asked_about(task: str, tell: Tell) -> None:
    pronouns = task in ("qa11", "qa13")
    stories = tell(task)
    for story in stories:
        latest = dict(doers(story.facts))[asked(story)]
        assert story.supporting == ([latest - 1, latest] if pronouns else [latest]), story


@pytest.mark.parametrize("task", ["qa9", "qa10"])
def test_yes_no_and_maybe_follow_from_the_sentence(task: str, tell: Tell) -> None:
    stories = tell(task)
    counts: Counter[str] = Counter()
    for story in stories:
        fact, place = story.facts[story.supporting[0]], places(story.question)[0]
        named = place in places(fact)
        denied, unsure = " not " in fact or "no longer" in fact, "either" in fact
        right = "no" if denied or not named else "maybe" if unsure else "yes"
        assert story.answer == right, story
        # A denial hides the true place, so that no other can be asked for.
        assert named or not denied, story
        if not denied and not unsure:
            counts[story.answer] += 1
    assert counts["yes"] / counts.total() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("task", ["qa9", "qa10"])
def test_sentences_agree_with_each_other(task: str, tell: Tell) -> None:
    """Nobody is denied to be anywhere but where they were last told to be, nor goes where they are."""
    stories = tell(task)
    for story in stories:
        stands: dict[str, str] = {}
        for fact in story.facts:
            (name,), place = _NAME.findall(fact), places(fact)[0]
            if " not " in fact or "no longer" in fact:
                assert stands.pop(name, place) == place, story
            elif "either" in fact:
                stands.pop(name, None)
            else:
                assert stands.get(name) != place, story
                stands[name] = place


@pytest.mark.parametrize("task", ["qa12", "qa13"])
def test_two_go_together_to_a_place_that_is_new_to_both(task: str, tell: Tell) -> None:
    stories = tell(task)
    for story in stories:
        stands: dict[str, str] = {}
        for name, index in doers(story.facts):
            place = places(story.facts[index])[0]
            assert stands.get(name) != place, story
            stands[name] = place


def test_a_day_has_every_time_before_its_later_ones(tell: Tell) -> None:
    stories = tell("qa14")
    for story in stories:
        days: dict[str, dict[int, str]] = {}
        for name, time, place in map(visit, story.facts):
            assert days.setdefault(name, {}).setdefault(time, place) == place, story
        for day in days.values():
            assert sorted(day) == list(range(len(day))), story
            assert all(day[time] != day[time + 1] for time in range(len(day) - 1)), story


def test_a_question_on_times_has_one_answer_and_lists_the_later_visit_first(
    tell: Tell,
) -> None:
    stories = tell("qa14")
    for story in stories:
        later, earlier = (visit(story.facts[index]) for index in story.supporting)
        assert (later[0], later[1] - 1) == earlier[:2], story
        assert later[2] == places(story.question)[0] and earlier[2] == story.answer, story
        visits = set(map(visit, story.facts))
        assert not any((*later[:1], t, later[2]) in visits for t in range(later[1] + 1, 4))


def test_two_visits_told_in_one_turn_are_always_told_in_reverse(tell: Tell) -> None:
    stories = tell("qa14")
    turns = 0
    for before, story in itertools.pairwise(stories):
        turn = story.facts[len(before.facts) :]
        if story.facts[: len(before.facts)] != before.facts or len(turn) != 2:
            continue
        first, second = map(visit, turn)
        if first[0] == second[0]:
            turns += 1
            assert first[1] > second[1], story
    assert turns > 100
