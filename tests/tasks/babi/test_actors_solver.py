"""The solver of the actor tasks, on stories written by hand and on the original ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from memlm.tasks import babi
from tests.tasks.babi.agreement import supporting_facts

# Names, places and things that no original file holds: the grammar alone must tell them apart.
EITHER = "Zoe is either in the attic or the cellar."


@pytest.mark.parametrize(
    ("facts", "question", "answer"),
    [
        (["Zoe went to the attic."], "Is Zoe in the attic?", "yes"),
        (["Zoe went to the attic."], "Is Zoe in the cellar?", "no"),
        (["Zoe is in the attic.", "Zoe is in the cellar."], "Is Zoe in the attic?", "no"),
        (["Zoe is in the attic."], "Where is Zoe?", "attic"),
        (["Zoe is not in the attic."], "Is Zoe in the attic?", "no"),
        (["Zoe went to the attic.", "Zoe is not in the cellar."], "Is Zoe in the attic?", "yes"),
        (
            ["Zoe went to the attic.", "Zoe is no longer in the attic."],
            "Is Zoe in the attic?",
            "no",
        ),
        (
            ["Zoe is no longer in the attic.", "Zoe went to the attic."],
            "Is Zoe in the attic?",
            "yes",
        ),
        ([EITHER], "Is Zoe in the cellar?", "maybe"),
        ([EITHER], "Is Zoe in the attic?", "maybe"),
        ([EITHER], "Is Zoe in the barn?", "no"),
        (["Zoe went to the attic.", EITHER], "Is Zoe in the attic?", "maybe"),
        ([EITHER, "Zoe went to the barn."], "Is Zoe in the attic?", "no"),
        ([EITHER, "Zoe went to the barn."], "Is Zoe in the barn?", "yes"),
        ([EITHER, "Zoe is not in the attic."], "Is Zoe in the cellar?", "yes"),
        ([EITHER, "Zoe is not in the barn."], "Is Zoe in the cellar?", "maybe"),
        ([EITHER, "Max went to the attic."], "Is Zoe in the attic?", "maybe"),
    ],
)
def test_whether_somebody_is_somewhere(facts: list[str], question: str, answer: str) -> None:
    assert babi.solve(facts, question) == answer


@pytest.mark.parametrize(
    ("facts", "question"),
    [
        (["Zoe is not in the attic."], "Is Zoe in the cellar?"),
        (["Zoe went to the attic.", "Zoe is no longer in the attic."], "Where is Zoe?"),
        # Zoe has been to the cellar since, and gone from there.
        (
            ["Zoe is in the attic.", "Zoe is no longer in the cellar."],
            "Is Zoe in the attic?",
        ),
        ([EITHER, "Zoe is no longer in the attic."], "Is Zoe in the cellar?"),
        ([EITHER], "Where is Zoe?"),
        ([EITHER, "Zoe went to the barn."], "Where was Zoe before the barn?"),
        (["Zoe went to the attic."], "Is Max in the attic?"),
        (["Zoe went to the attic."], "What is Max carrying?"),
        (["Zoe went to the attic."], "Where was Zoe before the attic?"),
    ],
)
def test_what_does_not_follow_is_not_answered(facts: list[str], question: str) -> None:
    with pytest.raises(ValueError, match="do not answer"):
        babi.solve(facts, question)


def test_pronouns_mean_whoever_was_last_named_alone_or_together() -> None:
    facts = [
        "Zoe went to the attic.",
        "Max moved to the barn.",
        "After that he travelled to the cellar.",
        "Zoe and Ida went back to the barn.",
        "Following that they journeyed to the shed.",
        "Then they went to the attic.",
        "Max and Ida went to the shed.",
        "Afterwards they went to the barn.",
        "He went to the shed.",
    ]
    assert babi.solve(facts[:3], "Where is Max?") == "cellar"
    assert babi.solve(facts[:3], "Where is Zoe?") == "attic"
    assert babi.solve(facts[:5], "Where is Ida?") == "shed"
    assert babi.solve(facts[:6], "Where is Zoe?") == "attic"
    assert babi.solve(facts, "Where is Ida?") == "barn"
    assert babi.solve(facts, "Where is Zoe?") == "attic"
    # "He" skips those named together.
    assert babi.solve(facts, "Where is Max?") == "shed"


TOOK = ["Zoe took the lamp there.", "Zoe got the rope there."]


@pytest.mark.parametrize(
    ("facts", "count", "things"),
    [
        (["Zoe went to the attic."], "none", "nothing"),
        (TOOK[:1], "one", "lamp"),
        (TOOK, "two", "lamp,rope"),
        ([*TOOK, "Zoe put down the lamp."], "one", "rope"),
        ([*TOOK, "Zoe dropped the lamp there.", "Zoe left the rope."], "none", "nothing"),
        ([*TOOK, "Zoe handed the rope to Max."], "one", "lamp"),
        ([*TOOK, "Zoe gave the rope to Max.", "Max passed the rope to Zoe."], "two", "lamp,rope"),
        (
            ["Max took the bell there.", *TOOK, "Max gave the bell to Zoe."],
            "three",
            "lamp,rope,bell",
        ),
        # A thing had before keeps its place in the list when it is taken again.
        ([*TOOK, "Zoe dropped the lamp.", "Zoe took the lamp there."], "two", "lamp,rope"),
        # Who dropped it no longer matters to the next who takes it.
        (["Max got the rope there.", "Max left the rope.", *TOOK], "two", "lamp,rope"),
    ],
)
def test_what_somebody_carries(facts: list[str], count: str, things: str) -> None:
    assert babi.solve(facts, "How many objects is Zoe carrying?") == count
    assert babi.solve(facts, "What is Zoe carrying?") == things


def test_a_receiver_need_not_do_anything_to_carry() -> None:
    facts = ["Zoe took the lamp there.", "Zoe gave the lamp to Max."]
    assert babi.solve(facts, "What is Max carrying?") == "lamp"
    assert babi.solve(facts, "How many objects is Zoe carrying?") == "none"


def test_handling_a_thing_tells_where_those_at_it_stand() -> None:
    facts = ["Max went to the barn.", "Zoe gave the lamp to Max.", "Max left the lamp."]
    assert babi.solve(facts, "Where is Zoe?") == "barn"
    facts += ["Ida took the lamp there."]
    assert babi.solve(facts, "Is Ida in the barn?") == "yes"
    either = ["Ida is either in the shed or the barn.", *facts]
    assert babi.solve(either, "Is Ida in the barn?") == "yes"


DAY = [
    "Zoe went to the barn this evening.",
    "This morning Zoe travelled to the cellar.",
    "Zoe this afternoon moved to the attic.",
    "Yesterday Zoe journeyed to the shed.",
    "Max went back to the attic this afternoon.",
]


@pytest.mark.parametrize(
    ("place", "before"), [("barn", "attic"), ("attic", "cellar"), ("cellar", "shed")]
)
def test_times_count_and_not_the_order_of_telling(place: str, before: str) -> None:
    for facts in (DAY, DAY[::-1]):
        assert babi.solve(facts, f"Where was Zoe before the {place}?") == before
        assert babi.solve(facts, "Where is Zoe?") == "barn"


def test_a_place_visited_twice_is_asked_about_at_its_last_visit() -> None:
    facts = [
        "Zoe went to the shed this evening.",
        "Zoe went to the barn this afternoon.",
        "Zoe went to the shed this morning.",
        "Zoe went to the attic yesterday.",
    ]
    assert babi.solve(facts, "Where was Zoe before the shed?") == "barn"


def test_a_sentence_without_time_goes_with_the_one_before() -> None:
    facts = [
        "This morning Zoe went to the barn.",
        "Then she went to the shed.",
        "Yesterday Zoe went to the attic.",
        "Then she went to the cellar.",
    ]
    assert babi.solve(facts, "Where is Zoe?") == "shed"
    assert babi.solve(facts, "Where was Zoe before the barn?") == "cellar"


def test_an_object_is_followed_through_pronouns_and_pairs() -> None:
    facts = [
        "Zoe took the lamp there.",
        "Zoe and Max went to the barn.",
        "Then they went to the shed.",
    ]
    assert babi.solve(facts, "Where is the lamp?") == "shed"
    assert babi.solve(facts, "Where was the lamp before the shed?") == "barn"


@pytest.mark.parametrize(
    "fact",
    [
        "Then he went to the barn.",  # nobody was named
        "Zoe is neither in the attic nor the barn.",
        "Zoe went to the barn tomorrow.",
        "Zoe went to the barn yesterday this morning.",
        "Zoe and Max took the lamp there.",
    ],
)
def test_a_sentence_that_is_not_understood_is_named(fact: str) -> None:
    with pytest.raises(ValueError, match=f"cannot parse the fact '{fact}'"):
        babi.solve([fact], "Where is Zoe?")


def test_they_needs_a_pair() -> None:
    with pytest.raises(ValueError, match="cannot parse the fact 'Then they"):
        babi.solve(["Zoe went to the barn.", "Then they went to the shed."], "Where is Zoe?")


@pytest.mark.parametrize("task", [f"qa{number}" for number in range(6, 15)])
def test_original_stories_are_solved_from_all_and_from_supporting_facts(
    task: str, original_stories: Path
) -> None:
    for story in babi.load_task(original_stories, task):
        assert babi.solve(story.facts, story.question) == story.answer, story
        assert babi.solve(supporting_facts(story), story.question) == story.answer, story
