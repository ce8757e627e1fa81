"""Probes: what is told can be answered, evenly drawn, scored as their protocols do, named strictly."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from memlm.tasks.babi.story import Story
from memlm.tasks.babilong import compose
from memlm.tasks.haystack import TokenHaystack
from memlm.tasks.probes import (
    ADJECTIVES,
    FILLER,
    NOUNS,
    PEOPLE,
    PROBES,
    chance,
    find_probe,
)
from memlm.tasks.task import Task

NAMES = [*PROBES, "mk-niah-1", "mk-niah-33", "recall-1", "recall-300", "recall-1000"]


def probe(name: str) -> Task:
    found = find_probe(name)
    assert found is not None
    return found


def told(name: str, count: int, seed: int = 0) -> list[Story]:
    return list(itertools.islice(probe(name).tell(seed), count))


def solve(story: Story) -> str:
    """Answer from the facts by the key the question names, as a reader would."""
    if story.question == "What is the pass key?":
        return re.findall(r"\d+", story.facts[0])[0]
    key = re.search(r"(?:for|does the) (\S+(?: \S+)?) (?:mentioned|keep)", story.question)
    assert key is not None
    holding = [fact for fact in story.facts if f" {key[1]} " in fact]
    assert len(holding) == 1
    return holding[0].removesuffix(".").split()[-1]


@pytest.mark.parametrize("name", NAMES)
def test_the_fact_that_supports_the_answer_is_the_only_one_that_gives_it(name: str) -> None:
    task = probe(name)
    assert task.name == name and task.questions == 1
    for story in told(name, 40):
        assert story.task == name
        (support,) = story.supporting
        assert story.answer in story.facts[support]
        assert solve(story) == story.answer
        score = task.mark(story.answer, story.answer, story.question)
        assert score.correct and score.published and score.exact
        assert not any(vars(task.mark("", story.answer, story.question)).values())


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_tells_the_same_stories_and_another_seed_others(name: str) -> None:
    assert told(name, 5) == told(name, 5)
    assert told(name, 5) != told(name, 5, seed=1)
    rng = np.random.default_rng(0)
    assert list(itertools.islice(probe(name).tell(rng), 5)) == told(name, 5)


def test_words_are_common_short_different_and_of_one_kind_each() -> None:
    lists = (ADJECTIVES, PEOPLE, NOUNS)
    assert [len(words) for words in lists] == [128, 64, 256]
    everything = [word for words in lists for word in words]
    assert len(set(everything)) == len(everything)
    assert all(re.fullmatch(r"[a-z]{2,9}", word) for word in everything)


@pytest.mark.parametrize(("name", "count"), [("recall-16", 16), ("mk-niah-4", 4)])
def test_every_pair_is_asked_for_as_often(name: str, count: int) -> None:
    asked = Counter(story.supporting[0] for story in told(name, 100 * count))
    spread = sum((asked[i] - 100) ** 2 / 100 for i in range(count))
    assert set(asked) == set(range(count)) and spread < 2.5 * count


@pytest.mark.parametrize("count", [1, 2, 16, 256, 257, 1000])
def test_recall_uses_all_words_before_any_again_and_no_key_twice(count: int) -> None:
    for story in told(f"recall-{count}", 3):
        assert len(story.facts) == count
        keys = Counter(fact.split(" keeps ")[0] for fact in story.facts)
        values = Counter(fact.split(" keeps the ")[1] for fact in story.facts)
        assert max(keys.values()) == 1
        most = -(-count // 256)
        assert max(values.values()) == most and len(values) == min(count, 256)
        assert chance(f"recall-{count}") == (1 / 256, most / count)


def test_needles_have_keys_and_values_of_their_own() -> None:
    for story in told("mk-niah-1000", 2):
        pairs = [re.findall(r"for (\S+) is: (\S+)\.$", fact)[0] for fact in story.facts]
        keys, values = zip(*pairs, strict=True)
        assert len(set(keys)) == len(set(values)) == 1000
        assert all(re.fullmatch(r"[1-9]\d{6}", value) for value in values)


def test_wording_is_the_protocols() -> None:
    needle = told("s-niah-3", 1)[0]
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    assert re.fullmatch(
        rf"One of the special magic uuids for [a-z]+-[a-z]+ is: {uuid}\.", needle.facts[0]
    )
    key = needle.facts[0].split()[7]
    question = f"What is the special magic uuid for {key} mentioned in the provided text?"
    assert needle.question == question
    passkey = told("passkey", 1)[0]
    said = f"The pass key is {passkey.answer}. Remember it. {passkey.answer} is the pass key."
    assert passkey.facts == [said] and re.fullmatch(r"[1-9]\d{4}", passkey.answer)


def test_noise_is_the_filler_where_the_protocol_repeats_it() -> None:
    repeated = {name: task.noise for name, task in PROBES.items() if task.noise}
    assert repeated == {"passkey": FILLER, "s-niah-1": (" ".join(FILLER),)}


@pytest.mark.parametrize("name", ["passkey", "s-niah-1"])
def test_filler_and_fact_compose_to_the_exact_length(
    name: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    story = told(name, 1)[0]
    sample = compose(story, PROBES[name].noise, "1k", tokenizer, 0)
    assert sample.tokens == 1024 == sum(map(len, sample.ids()))
    text = sample.text().replace(f" {story.facts[0]}", "")
    filler = "".join(f" {sentence}" for sentence in FILLER)
    assert (filler * 100).startswith(text) and story.facts[0] in sample.text()


def test_pairs_compose_into_running_text_in_order(
    noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast
) -> None:
    story = told("recall-40", 1)[0]
    sample = compose(story, noise, "4k", tokenizer, 0)
    text = sample.text()
    at = [text.index(f" {fact}") for fact in story.facts]
    assert at == sorted(at) and sample.tokens == 4096


@pytest.mark.parametrize(
    ("name", "target", "output", "marks"),
    [
        ("s-niah-1", "1234567", " 1234567", (True, True, True)),
        ("s-niah-1", "1234567", "It is 1234567, I think.", (True, True, False)),
        ("s-niah-1", "1234567", "1234567 or 7654321", (False, True, False)),
        ("s-niah-1", "1234567", "91234567", (False, True, False)),
        ("s-niah-1", "1234567", "1234567 in 1999", (True, True, False)),
        ("passkey", "12345", "12345. Remember it.", (True, True, False)),
        ("passkey", "12345", "54321, no, 12345", (False, False, False)),
        ("passkey", "12345", "12345 and 54321", (False, True, False)),
        ("passkey", "12345", "none", (False, False, False)),
        ("recall-16", "lamp", "The lamp.", (True, True, False)),
        ("recall-16", "lamp", "The brave baker keeps the Lamp", (True, True, False)),
        ("recall-16", "lamp", "lamp kettle", (False, True, False)),
        ("recall-16", "cap", "captain", (False, True, False)),
    ],
)
def test_answers_are_marked_three_ways(
    name: str, target: str, output: str, marks: tuple[bool, bool, bool]
) -> None:
    score = probe(name).mark(output, target, "What does the brave baker keep?")
    assert (score.correct, score.published, score.exact) == marks


def test_uuids_are_matched_whole_and_in_either_case() -> None:
    target = told("s-niah-3", 1)[0].answer
    mark = PROBES["s-niah-3"].mark
    assert mark(f"It is {target.upper()}.", target, "").correct
    assert not mark(f"0{target}", target, "").correct and mark(f"0{target}", target, "").published
    assert not mark(target[:-1], target, "").published


def test_guessing_what_was_told_scores_what_chance_says() -> None:
    rng = np.random.default_rng(0)
    task, right = probe("recall-8"), 0
    for story in told("recall-8", 2000):
        guess = story.facts[int(rng.integers(8))].removesuffix(".").split()[-1]
        right += task.mark(guess, story.answer, story.question).correct
    assert right / 2000 == pytest.approx(chance("recall-8").told, abs=0.03)


def test_chance_of_every_probe() -> None:
    assert chance("passkey") == (1 / 90_000, 1)
    assert chance("s-niah-2") == (1 / 9_000_000, 1)
    assert chance("s-niah-3").blind == 2.0**-122
    assert chance("mk-niah-4") == (1 / 9_000_000, 1 / 4)
    with pytest.raises(ValueError, match="unknown probe 'qa1'; probes are passkey"):
        chance("qa1")


@pytest.mark.parametrize("name", ["qa1", "", "niah-4", "s-niah-4", "recall16", "pass-key"])
def test_what_is_no_probe_is_none(name: str) -> None:
    assert find_probe(name) is None


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("recall-0", "recall-1"),
        ("recall--3", "recall-1"),
        ("recall-1001", "recall-1000"),
        ("recall-99999999999", "recall-16"),
        ("recall-016", "recall-16"),
        ("recall-4.5", "recall-16"),
        ("recall-", "recall-16"),
        ("recall", "recall-16"),
        ("recall-16\n", "recall-16"),
        ("recall-\u0664", "recall-16"),
        ("mk-niah-0", "mk-niah-1"),
        ("mk-niah-5000", "mk-niah-1000"),
    ],
)
def test_a_wrong_number_is_refused_with_the_nearest(name: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"from 1 to 1000.*as in '{re.escape(remedy)}'$") as error:
        find_probe(name)
    assert repr(name) in str(error.value)
    assert find_probe(remedy) is not None


def test_a_probe_by_number_is_one_task() -> None:
    assert find_probe("recall-7") is find_probe("recall-7")
    assert find_probe("recall-16") is PROBES["recall-16"]
