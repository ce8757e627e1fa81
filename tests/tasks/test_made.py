"""The haystack "made", and haystacks that are joined."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from memlm.tasks.babi.generators import kinds, motives, places, world
from memlm.tasks.haystack import Haystack, made
from memlm.tasks.haystack.cache import identity
from memlm.tasks.haystack.sources import parts_of

KINDS = {"others", "mentions", "talk", "numbers", "words"}


# Everybody who appears in a generator.
PEOPLE = {
    *world.ACTORS,
    *world.GIVERS,
    *places.TRAVELLERS,
    *motives.NAMES,
    *kinds.FEARFUL,
    *kinds.COLOURED,
}


@pytest.fixture(scope="module")
def texts() -> tuple[tuple[str, str], ...]:
    return tuple(made.made_texts())


@pytest.fixture(scope="module")
def held_out() -> Haystack:
    return Haystack.open("made", "eval")


def test_documents_are_the_same_at_every_call_and_of_every_kind(texts) -> None:
    first = texts
    assert first == tuple(made.made_texts()) and len(first) == made.TEXTS
    assert {name.split("/")[1] for name, _ in first} == KINDS
    assert len({text for _, text in first}) == made.TEXTS


def test_nothing_is_said_about_anybody_of_babi(texts) -> None:
    text = " ".join(text for _, text in texts)
    assert not PEOPLE & set(re.findall(r"[A-Z][a-z]+", text))
    assert not re.search(r"\b(?:he|she|they)\b", text, re.IGNORECASE)
    # But of its places and things much is said.
    for word in (*world.PLACES, *world.OBJECTS):
        assert text.count(f" {word}") > 100


def test_no_place_of_babi_lies_anywhere(texts) -> None:
    text = " ".join(text for _, text in texts)
    told = re.findall(r"The (\w+) is (?:north|south|east|west) of the (\w+)\.", text)
    assert len(told) > 100
    assert not {place for pair in told for place in pair} & set(world.PLACES)


def test_what_is_trained_on_is_not_evaluated_on(held_out: Haystack) -> None:
    train = Haystack.open("made", "train")
    assert not {d.name for d in train.documents} & {d.name for d in held_out.documents}
    assert sum(len(d.sentences) for d in held_out.documents) > 500
    # Numbers and talk are kept as they are.
    assert any('"' in s for d in train.documents for s in d.sentences)


def test_sources_are_joined(tmp_path: Path, held_out: Haystack) -> None:
    (tmp_path / "a+b.txt").write_text("One sentence is here. Another one follows it. " * 60)
    assert parts_of(tmp_path / "a+b.txt") == [str(tmp_path / "a+b.txt")]
    joined = Haystack.open("builtin+made", "eval")
    alone = Haystack.open("builtin", "eval")
    assert joined.documents == [*alone.documents, *held_out.documents]
    with pytest.raises(ValueError, match=r"haystack 'nothing' is neither .* joined by '\+'"):
        Haystack.open("made+nothing")


def test_a_joined_source_is_told_by_all_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert identity("made") is None
    both, other = identity("builtin+made"), identity("made+builtin")
    assert both is not None and other is not None
    assert identity("builtin+missing.txt") is None
