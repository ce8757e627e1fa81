"""Deduction, induction, positions, sizes, paths and motives: qa4 and qa15 to qa20.

What is checked of our stories against rules written anew here is checked of the original ones too,
where they are at hand.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from memlm.tasks import babi
from memlm.tasks.babi import Story
from tests.tasks.babi.agreement import supporting_facts, take

STEPS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
BESIDE = {"above": (0, 1), "below": (0, -1), "to the left of": (-1, 0), "to the right of": (1, 0)}
RELATION = "|".join([*BESIDE, "bigger than", "afraid of"])


# --- the solver, on stories written by hand ---


@pytest.mark.parametrize(
    ("relation", "inverse", "initial", "back"),
    [("north", "south", "n", "s"), ("east", "west", "e", "w")],
)
def test_a_neighbour_is_found_from_either_side(
    relation: str, inverse: str, initial: str, back: str
) -> None:
    facts = [f"The barn is {relation} of the mill.", f"The inn is {inverse} of the mill."]
    assert babi.solve(facts, f"What is {relation} of the mill?") == "barn"
    assert babi.solve(facts, f"What is {relation} of the inn?") == "mill"
    assert babi.solve(facts, f"What is the barn {relation} of?") == "mill"
    assert babi.solve(facts, f"What is the mill {inverse} of?") == "barn"
    assert babi.solve(facts, "How do you go from the inn to the barn?") == f"{initial},{initial}"
    assert babi.solve(facts, "How do you go from the barn to the inn?") == f"{back},{back}"
    assert babi.solve(facts, "How do you go from the mill to the barn?") == initial


def test_of_two_neighbours_told_on_one_side_the_newest_counts() -> None:
    facts = ["The barn is north of the mill.", "The mill is south of the inn."]
    assert babi.solve(facts, "What is north of the mill?") == "inn"
    assert babi.solve(facts[::-1], "What is north of the mill?") == "barn"


def test_of_two_ways_round_a_block_the_shorter_is_taken() -> None:
    ring = ["gate", "barn", "mill", "inn", "well", "shed"]
    ways = ["east", "east", "north", "west", "west", "south"]
    facts = [
        f"The {there} is {way} of the {here}."
        for here, there, way in zip(ring, [*ring[1:], ring[0]], ways, strict=True)
    ]
    for told in (facts, facts[::-1]):
        assert babi.solve(told, "How do you go from the gate to the mill?") == "e,e"
        assert babi.solve(told, "How do you go from the mill to the well?") == "n,w"


def test_a_path_turns_corners_and_takes_the_shortest_told_way() -> None:
    facts = [
        "The mill is north of the barn.",
        "The inn is west of the mill.",
        "The inn is south of the well.",
    ]
    assert babi.solve(facts, "How do you go from the barn to the well?") == "n,w,n"
    assert babi.solve(facts, "How do you go from the well to the barn?") == "s,e,s"
    # The gate would lie between the barn and the inn, but nobody said that one can go there.
    facts.append("The gate is west of the barn.")
    assert babi.solve(facts, "How do you go from the gate to the inn?") == "e,n,w"
    facts.append("The gate is south of the inn.")
    assert babi.solve(facts, "How do you go from the gate to the inn?") == "n"


def test_of_two_shapes_aslant_both_relations_hold() -> None:
    facts = [
        "The red sphere is above the blue square.",
        "The red sphere is to the right of the triangle.",
    ]

    def holds(first: str, relation: str, second: str) -> bool:
        return babi.solve(facts, f"Is the {first} {relation} the {second}?") == "yes"

    assert [r for r in BESIDE if holds("triangle", r, "blue square")] == ["above", "to the left of"]
    assert [r for r in BESIDE if holds("blue square", r, "triangle")] == [
        "below",
        "to the right of",
    ]


def test_of_two_shapes_in_one_row_neither_is_above() -> None:
    facts = [
        "The red sphere is to the left of the blue square.",
        "The pink rectangle is to the right of the blue square.",
        "The triangle is below the pink rectangle.",
        "The red square is above the triangle.",
    ]
    assert babi.solve(facts, "Is the red sphere to the left of the pink rectangle?") == "yes"
    assert babi.solve(facts, "Is the red sphere above the pink rectangle?") == "no"
    assert babi.solve(facts, "Is the red sphere below the pink rectangle?") == "no"
    # Down and up again, or two steps to the right: offsets add up.
    assert babi.solve(facts, "Is the red square above the red sphere?") == "no"
    assert babi.solve(facts, "Is the red square to the right of the red sphere?") == "yes"
    assert babi.solve(facts, "Is the red square above the triangle?") == "yes"


def test_sizes_are_transitive_through_any_chain() -> None:
    facts = [
        "The box of chocolates fits inside the box.",
        "The suitcase is bigger than the box.",
        "The suitcase fits inside the chest of drawers.",
        "The marble fits inside the box of chocolates.",
    ]
    order = ["marble", "box of chocolates", "box", "suitcase", "chest of drawers"]
    for small, big in itertools.combinations(order, 2):
        assert babi.solve(facts, f"Does the {small} fit in the {big}?") == "yes"
        assert babi.solve(facts, f"Does the {big} fit in the {small}?") == "no"
        assert babi.solve(facts, f"Is the {big} bigger than the {small}?") == "yes"
        assert babi.solve(facts, f"Is the {small} bigger than the {big}?") == "no"


def test_a_fear_is_that_of_the_kind_and_goes_no_further() -> None:
    facts = [
        "Wolves are afraid of mice.",
        "Mice are afraid of cats.",
        "Cats are afraid of sheep.",
        "Sheep are afraid of wolves.",
        "Emily is a wolf.",
        "Jessica is a sheep.",
        "Winona is a mouse.",
        "Gertrude is a cat.",
        "Ada is an ox.",
    ]
    fears = {"emily": "mouse", "Jessica": "wolf", "winona": "cat", "gertrude": "sheep"}
    for name, feared in fears.items():
        assert babi.solve(facts, f"What is {name} afraid of?") == feared
    with pytest.raises(ValueError, match="do not answer"):
        babi.solve(facts, "What is ada afraid of?")


def test_a_colour_is_that_of_the_peer_whose_kind_was_told_last() -> None:
    facts = [
        "Brian is a frog.",
        "Brian is green.",
        "Greg is a frog.",
        "Lily is a swan.",
        "Lily is gray.",
        "Bernhard is a frog.",
        "Bernhard is white.",
        "Greg is green.",
    ]
    # Neither the majority nor the newest colour.
    assert babi.solve([*facts, "Julius is a frog."], "What color is Julius?") == "white"
    assert babi.solve(["Julius is a frog.", *facts], "What color is Julius?") == "white"
    assert babi.solve([*facts, "Julius is a swan."], "What color is Julius?") == "gray"
    # What is told of the animal itself, or told again, goes before.
    told = ["Julius is a frog.", "Julius is yellow.", *facts]
    assert babi.solve(told, "What color is Julius?") == "yellow"
    again = [*facts, "Brian is a frog.", "Julius is a frog."]
    assert babi.solve(again, "What color is Julius?") == "green"
    for nothing in ([], ["Julius is a lion."]):
        with pytest.raises(ValueError, match="do not answer"):
            babi.solve([*facts, *nothing], "What color is Julius?")


def test_an_animal_whose_colour_is_untold_is_no_evidence() -> None:
    facts = ["Brian is a frog.", "Brian is green.", "Greg is a frog.", "Lily is a frog."]
    assert babi.solve(facts, "What color is Lily?") == "green"


def test_every_state_of_mind_has_its_cure() -> None:
    cures = [("hungry", "kitchen", "apple"), ("thirsty", "kitchen", "milk")]
    cures += [("tired", "bedroom", "pajamas"), ("bored", "garden", "football")]
    for state, place, thing in cures:
        facts = [f"Yann is {state}."]
        assert babi.solve(facts, "Where will yann go?") == place
        assert babi.solve(facts, f"Why did yann go to the {place}?") == state
        assert babi.solve(facts, f"Why did Yann get the {thing}?") == state


def test_a_motive_follows_another() -> None:
    facts = [
        "Sumit is thirsty.",
        "Jason is tired.",
        "Sumit journeyed to the kitchen.",
        "Sumit took the milk there.",
        "Sumit is hungry.",
    ]
    # They went before they were hungry.
    assert babi.solve(facts, "Why did sumit go to the kitchen?") == "thirsty"
    facts += ["Sumit went back to the kitchen.", "Sumit is bored."]
    assert babi.solve(facts, "Why did sumit go to the kitchen?") == "hungry"
    assert babi.solve(facts, "Why did sumit get the milk?") == "thirsty"
    assert babi.solve(facts, "Why did sumit get the apple?") == "hungry"
    assert babi.solve(facts, "Where will sumit go?") == "garden"
    assert babi.solve(facts, "Where will jason go?") == "bedroom"


@pytest.mark.parametrize(
    ("facts", "question", "message"),
    [
        (["The barn is near the mill."], "What is north of the mill?", "near the mill"),
        (["The barn is north of the mill."], "What is near the mill?", "question 'What is near"),
        (["The barn is north of the mill."], "What is south of the mill?", "do not answer"),
        (["The box is taller than the mug."], "Is the box bigger than the mug?", "box is taller"),
        (
            ["The box is bigger than the mug."],
            "Is the mug taller than the box?",
            "Is the mug taller",
        ),
        (["The sphere is behind the square."], "Is the sphere above the square?", "is behind the"),
        (["Wolves eat mice."], "What is emily afraid of?", "Wolves eat mice"),
        (["Lily turned green."], "What color is Lily?", "Lily turned green"),
        (["Yann is melancholic."], "Where will yann go?", "Yann is melancholic"),
        (["Yann is bored."], "Why did yann go to the kitchen?", "Why did yann go to the kitchen"),
        (
            ["Yann went to the garden.", "Yann is bored."],
            "Why did yann go to the garden?",
            "2 facts",
        ),
        (["Yann is bored."], "Where will jason go?", "1 facts do not answer"),
    ],
)
def test_what_cannot_be_solved_is_refused_by_sentence(
    facts: list[str], question: str, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        babi.solve(facts, question)


@pytest.mark.parametrize(
    ("fact", "question"),
    [
        ("The barn is north of the mill.", "How do you go from the barn to the inn?"),
        ("The mug is above the cup.", "Is the mug above the jar?"),
        # Both fit inside the chest, which says nothing of the two.
        ("The mug fits inside the chest.", "Does the mug fit in the box?"),
    ],
)
def test_what_no_chain_of_facts_links_is_not_guessed(fact: str, question: str) -> None:
    other = {"barn": "The well is east of the inn.", "mug ": "The jar is below the pot."}
    facts = [fact, "The box fits inside the chest." if "fit" in fact else other[fact[4:8]]]
    with pytest.raises(ValueError, match="2 facts do not answer"):
        babi.solve(facts, question)


# --- stories, ours and the original ones, against rules written anew ---


def check_fears(story: Story) -> None:
    singular = {"Wolves": "wolf", "Mice": "mouse", "Cats": "cat", "Sheep": "sheep"}
    plural = {one: many.lower() for many, one in singular.items()}
    told = [fact.rstrip(".").split() for fact in story.facts]
    asked = story.question.split()[2]
    (own, kind), (fear, feared) = ((i, told[i][-1]) for i in story.supporting)
    assert told[own][0].lower() == asked and singular[told[fear][0]] == kind
    assert feared == plural[story.answer] and story.answer != kind
    # Four of each, and the fear of a kind before any animal of that kind.
    assert len(told) == 8 and len({words[0] for words in told}) == 8
    known: set[str] = set()
    for words in told:
        if len(words) == 5:
            known.add(singular[words[0]])
        else:
            assert words[-1] in known


def check_colours(story: Story) -> None:
    kinds: dict[str, str] = {}
    colours: dict[str, str] = {}
    draws: dict[str, int] = {}
    for number, fact in enumerate(story.facts):
        name, *_, what = fact.rstrip(".").split()
        if len(fact.split()) == 4:
            kinds[name] = what
            # A newcomer changes the colour of all its kind whose colour is untold.
            draws |= {n: number for n in kinds if kinds[n] == what and n not in colours}
        else:
            assert name in kinds
            colours[name] = what
    for one, other in itertools.combinations(colours, 2):
        if draws[one] == draws[other]:
            assert colours[one] == colours[other]
    asked = story.question.rstrip("?").split()[-1]
    assert len(kinds) == 5 and colours.keys() == kinds.keys() - {asked}
    peers = [name for name in kinds if name != asked and kinds[name] == kinds[asked]]
    assert len(peers) in (1, 3, 4)
    evidence = peers[-1]
    assert story.answer == colours[evidence]
    assert [story.facts[index] for index in story.supporting] == [
        f"{asked} is a {kinds[asked]}.",
        f"{evidence} is a {kinds[asked]}.",
        f"{evidence} is {story.answer}.",
    ]


def parts(sentence: str) -> tuple[str, str, str]:
    match = re.fullmatch(
        rf"(?:Is the|The) (.+?) (?:is )?({RELATION}) the (.+)[.?]", sentence.strip()
    )
    assert match, sentence
    return match[1], match[2], match[3]


def check_positions(story: Story) -> None:
    """Try every way to lay the shapes out on nine fields."""
    facts = [parts(fact) for fact in story.facts]
    names = sorted({name for first, _, second in facts for name in (first, second)})
    first, asked, second = parts(story.question)
    assert len(names) == 3 and len(facts) == 2
    answers = set()
    for fields in itertools.permutations(itertools.product(range(3), repeat=2), 3):
        at = dict(zip(names, fields, strict=True))
        if all(
            (at[a][0] - at[b][0], at[a][1] - at[b][1]) == BESIDE[relation]
            for a, relation, b in facts
        ):
            across, up = BESIDE[asked]
            lies = (at[first][0] - at[second][0]) * across + (at[first][1] - at[second][1]) * up
            answers.add("yes" if lies > 0 else "no")
    assert answers == {story.answer}
    assert first in facts[story.supporting[0]] and second in facts[story.supporting[1]]


def compared(fact: str) -> tuple[str, str]:
    """The bigger and the smaller of a comparison."""
    if " fits inside " in fact:
        small, big = fact[4:-1].split(" fits inside the ")
        return big, small
    big, small = fact[4:-1].split(" is bigger than the ")
    return big, small


def check_sizes(story: Story) -> None:
    """Close the comparisons by Floyd and Warshall."""
    bigger = {compared(fact) for fact in story.facts}
    things = sorted({thing for pair in bigger for thing in pair})
    for middle, a, b in itertools.product(things, repeat=3):
        if (a, middle) in bigger and (middle, b) in bigger:
            bigger.add((a, b))
    assert not any((thing, thing) in bigger for thing in things), "a thing bigger than itself"
    if story.question.startswith("Does"):
        match = re.fullmatch(r"Does the (.+) fit in the (.+)\?", story.question.strip())
        assert match
        big, small = match[2], match[1]
    else:
        big, _, small = parts(story.question)
    asked, turned = (big, small) in bigger, (small, big) in bigger
    assert (asked, turned) == ((True, False) if story.answer == "yes" else (False, True))
    first, second = (compared(story.facts[index]) for index in story.supporting)
    assert big in first and small in second and set(first) & set(second)
    assert len(story.facts) % 5 == 0


def walk(story: Story) -> tuple[str, str, list[tuple[int, int]]]:
    start, goal = story.question.rstrip("?").split(" from the ")[1].split(" to the ")
    by_initial = {way[0]: step for way, step in STEPS.items()}
    return start, goal, [by_initial[initial] for initial in story.answer.split(",")]


def links(facts: Sequence[str]) -> dict[tuple[str, tuple[int, int]], str]:
    """(place, step) -> where the step leads."""
    lead: dict[tuple[str, tuple[int, int]], str] = {}
    for fact in facts:
        _, subject, _, way, _, _, place = fact.rstrip(".").split()
        x, y = STEPS[way]
        lead[place, (x, y)] = subject
        lead[subject, (-x, -y)] = place
    assert len(lead) == 2 * len(facts), "two places in one direction"
    return lead


def check_paths(story: Story) -> None:
    """Walk every pair of steps; only the answer leads to the goal, by the supporting facts alone."""
    start, goal, answer = walk(story)
    for facts in (story.facts, supporting_facts(story)):
        lead = links(facts)
        arrive = [
            [first, second]
            for first, second in itertools.product(STEPS.values(), repeat=2)
            if lead.get((lead.get((start, first), ""), second)) == goal
        ]
        assert arrive == [answer]
        assert goal not in {lead.get((start, step)) for step in STEPS.values()}
    assert len(story.facts) == 5 and start in story.facts[story.supporting[0]]


def check_motives(story: Story) -> None:
    acts: dict[str, list[str]] = {}
    last = {name: fact.rstrip(".").split() for fact in story.facts for name in [fact.split()[0]]}
    for fact in story.facts:
        acts.setdefault(fact.split()[0], []).append(fact)
    for name, told in acts.items():
        forms = [rf"{name} is (\w+)\.", rf"{name} .* to the \w+\.", rf"{name} .* the \w+ there\."]
        assert len(told) <= 3
        assert all(re.fullmatch(form, fact) for form, fact in zip(forms, told, strict=False))
    # Each thing is there once.
    taken = [words[-2] for words in last.values() if words[-1] == "there"]
    assert len(taken) == len(set(taken))
    # The newest fact is asked about, and explained by the state of mind that began it.
    name = story.facts[-1].split()[0]
    assert name.lower() in story.question.split()
    assert supporting_facts(story) == acts[name][:1]
    if story.question.startswith("Where"):
        assert story.facts[-1] == acts[name][0]
    else:
        assert story.answer == acts[name][0].rstrip(".").split()[-1]


CHECKS: dict[str, Callable[[Story], None]] = {
    "qa15": check_fears,
    "qa16": check_colours,
    "qa17": check_positions,
    "qa18": check_sizes,
    "qa19": check_paths,
    "qa20": check_motives,
}


@pytest.mark.parametrize("task", CHECKS)
def test_our_stories_keep_the_rules(task: str) -> None:
    for story in take(task, 600):
        CHECKS[task](story)


@pytest.mark.parametrize("task", CHECKS)
def test_the_original_stories_keep_the_rules(task: str, original_stories: Path) -> None:
    for story in babi.load_task(original_stories, task):
        CHECKS[task](story)


def test_places_of_a_path_lie_apart() -> None:
    for story in take("qa19", 300):
        lead = links(story.facts)
        spots = {walk(story)[0]: (0, 0)}
        while len(spots) < 6:
            for (place, (x, y)), other in lead.items():
                if place in spots:
                    spot = (spots[place][0] + x, spots[place][1] + y)
                    assert spots.setdefault(other, spot) == spot
        assert len(set(spots.values())) == 6


def stories_of(task: str, count: int = 2000) -> list[list[Story]]:
    """Our questions, those of one telling together."""
    tellings: list[list[Story]] = []
    for story in take(task, count):
        before = tellings[-1][-1].facts if tellings else None
        if before is None or story.facts[: len(before)] != before:
            tellings.append([])
        tellings[-1].append(story)
    return tellings[:-1]  # the last may be cut short


@pytest.mark.parametrize(("task", "questions"), [("qa15", 4), ("qa16", 1), ("qa17", 8)])
def test_a_telling_has_the_original_number_of_questions(task: str, questions: int) -> None:
    assert {len(telling) for telling in stories_of(task)} == {questions}


def test_the_shape_between_is_the_subject_of_two_facts_in_three() -> None:
    subjects = Counter[bool]()
    for telling in stories_of("qa17", 4000):
        facts = [parts(fact) for fact in telling[0].facts]
        (between,) = {facts[0][0], facts[0][2]} & {facts[1][0], facts[1][2]}
        subjects.update(first == between for first, _, _ in facts)
    assert subjects[True] / subjects.total() == pytest.approx(2 / 3, abs=0.06)


def test_sizes_are_told_on_until_five_questions_are_found() -> None:
    tellings = stories_of("qa18")
    for telling in tellings:
        lengths = [len(story.facts) for story in telling]
        assert lengths[-5:] == [lengths[-1]] * 5 and lengths.count(lengths[-1]) == 5
    # In the original 155 of 198 first blocks are enough.
    enough = sum(len(telling[0].facts) == 5 for telling in tellings) / len(tellings)
    assert enough == pytest.approx(155 / 198, abs=0.08)


def test_motives_end_when_nothing_is_left_to_do() -> None:
    for telling in stories_of("qa20"):
        assert [len(story.facts) for story in telling] == list(range(1, len(telling) + 1))
        states = {fact for fact in telling[-1].facts if len(fact.split()) == 3}
        needs = {fact.split()[-1] for fact in states}
        # Four feel and go, and each thing is taken by the first who needs it.
        assert len(states) == 4 and len(telling) == 8 + len(needs)


@pytest.mark.parametrize(("task", "form"), [("qa17", "Is"), ("qa18", "Is"), ("qa18", "Does")])
def test_yes_and_no_are_even_for_every_form_of_question(task: str, form: str) -> None:
    asked = [story for story in take(task, 4000) if story.question.startswith(form)]
    counts = Counter(story.answer for story in asked)
    assert counts.keys() == {"yes", "no"}
    assert counts["yes"] / len(asked) == pytest.approx(0.5, abs=0.05)


def test_colours_of_a_kind_differ_as_rarely_as_in_the_original(original_stories: Path) -> None:
    def differ(stories: Sequence[Story]) -> float:
        return sum(len(evidence(story)) > 1 for story in stories) / len(stories)

    def evidence(story: Story) -> set[str]:
        kinds = dict(re.findall(r"(\w+) is a (\w+)\.", " ".join(story.facts)))
        asked = story.question.rstrip("?").split()[-1]
        told = [fact.rstrip(".").split() for fact in story.facts if len(fact.split()) == 3]
        return {colour for name, _, colour in told if kinds[name] == kinds[asked]}

    theirs = differ(babi.load_task(original_stories, "qa16"))
    assert differ(take("qa16", 3000)) == pytest.approx(theirs, abs=0.03)
