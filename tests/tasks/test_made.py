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


def test_documents_are_the_same_at_every_call_and_of_every_kind() -> None:
    first = list(made.made_texts())
    assert first == list(made.made_texts()) and len(first) == made.TEXTS
    assert {name.split("/")[1] for name, _ in first} == KINDS
    assert len({text for _, text in first}) == made.TEXTS


def test_nothing_is_said_about_anybody_of_babi() -> None:
    text = " ".join(text for _, text in made.made_texts())
    assert not PEOPLE & set(re.findall(r"[A-Z][a-z]+", text))
    assert not re.search(r"\b(?:he|she|they)\b", text, re.IGNORECASE)
    # But of its places and things much is said.
    for word in (*world.PLACES, *world.OBJECTS):
        assert text.count(f" {word}") > 100


def test_no_place_of_babi_lies_anywhere() -> None:
    text = " ".join(text for _, text in made.made_texts())
    told = re.findall(r"The (\w+) is (?:north|south|east|west) of the (\w+)\.", text)
    assert len(told) > 100
    assert not {place for pair in told for place in pair} & set(world.PLACES)


def test_what_is_trained_on_is_not_evaluated_on() -> None:
    train, held_out = (Haystack.open("made", split) for split in ("train", "eval"))
    assert not {d.name for d in train.documents} & {d.name for d in held_out.documents}
    assert sum(len(d.sentences) for d in held_out.documents) > 500
    # Numbers and talk are kept as they are.
    assert any('"' in s for d in train.documents for s in d.sentences)


def test_sources_are_joined(tmp_path: Path) -> None:
    (tmp_path / "a+b.txt").write_text("One sentence is here. Another one follows it. " * 60)
    assert parts_of(tmp_path / "a+b.txt") == [str(tmp_path / "a+b.txt")]
    joined = Haystack.open("builtin+made", "eval")
    alone = [Haystack.open(name, "eval").documents for name in ("builtin", "made")]
    assert joined.documents == [*alone[0], *alone[1]]
    with pytest.raises(ValueError, match=r"haystack 'nothing' is neither .* joined by '\+'"):
        Haystack.open("made+nothing")


def test_a_joined_source_is_told_by_all_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert identity("made") is None
    both, other = identity("builtin+made"), identity("made+builtin")
    assert both is not None and other is not None
    assert identity("builtin+missing.txt") is None
