"""A retriever: what was written is found again, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memlm.retrieval import ChunkIndex, HashingEmbedder
from memlm.retrieval.retriever import (
    Recalled,
    RetrievalConfig,
    Retriever,
    as_retriever,
    read_document,
    render,
)
from memlm.templates import DOCUMENT_RECALL_TEMPLATE

NOISE = [
    f"Sentence {n} tells of the weather over the northern hills and of nothing else."
    for n in range(60)
]
SECRET = "The brave baker keeps the golden lamp under the stairs."


def document(secret: str = SECRET, at: int = 30) -> str:
    return " ".join([*NOISE[:at], secret, *NOISE[at:]])


def retriever(**config: object) -> Retriever:
    return Retriever(ChunkIndex(HashingEmbedder()), RetrievalConfig(**{"size": 24, **config}))


def test_what_was_written_is_recalled_with_its_place() -> None:
    text = document()
    found = retriever(k=2)
    found.write(text, "tale.txt")
    found.end()
    recalled = found.recall("Where does the brave baker keep the golden lamp?")
    assert len(recalled) == 2
    best = max(recalled, key=lambda passage: passage.score)
    assert SECRET in best.text and best.document == "tale.txt"
    assert text[best.start : best.end] == best.text


def test_passages_come_in_the_order_in_which_they_were_written() -> None:
    found = retriever(k=6)
    found.write(document())
    found.end()
    starts = [passage.start for passage in found.recall("weather and the golden lamp")]
    assert starts == sorted(starts) and len(starts) == 6


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_it_does_not_matter_how_text_is_handed_over(size: int) -> None:
    text = document()
    whole, pieces = retriever(), retriever()
    whole.write(text)
    for start in range(0, len(text), size):
        pieces.write(text[start : start + size])
    for one in (whole, pieces):
        one.end()
    question = "Who keeps the lamp?"
    told = [[(p.text, p.start, p.end) for p in one.recall(question)] for one in (whole, pieces)]
    assert told[0] == told[1] and told[0]


def test_a_second_hop_finds_what_the_first_names() -> None:
    facts = [
        "The milk was taken by Sandra before noon.",
        "Sandra then walked by night along a narrow path into a quiet cellar.",
    ]
    text = " ".join([*NOISE[:20], facts[0], *NOISE[20:40], facts[1], *NOISE[40:]])
    question = "Where is the milk?"
    told = {}
    for hops in (1, 2):
        found = read_document([text], HashingEmbedder(), RetrievalConfig(k=2, size=14, hops=hops))
        told[hops] = " ".join(passage.text for passage in found.recall(question))
    assert facts[0] in told[1] and facts[1] not in told[1]
    assert facts[0] in told[2] and facts[1] in told[2]


def test_two_retrievers_of_one_index_see_nothing_of_each_other() -> None:
    index = ChunkIndex(HashingEmbedder())
    index.add(["A library says that lamps are made of brass."], metadata=[{"document": "library"}])
    mine, theirs = (Retriever(index, RetrievalConfig(k=100, size=24)) for _ in range(2))
    mine.write(document(), "mine")
    theirs.write(document("The other secret is about a silver spoon.", 5), "theirs")
    for one in (mine, theirs):
        one.end()
    seen = {one: {p.document for p in one.recall("secret lamp spoon")} for one in (mine, theirs)}
    assert seen == {mine: {"mine", "library"}, theirs: {"theirs", "library"}}
    assert not any("spoon" in p.text for p in mine.recall("silver spoon", k=100))


def test_a_fork_knows_the_past_and_not_what_comes_after() -> None:
    first = retriever(k=200)
    first.write(document(), "past")
    first.end()
    other = first.fork()
    first.write("The first wrote about a crimson kite after they parted. " * 8, "first")
    other.write("The other wrote about a violet kettle after they parted. " * 8, "other")
    for one in (first, other):
        one.end()
    for one, own, foreign in ((first, "crimson", "violet"), (other, "violet", "crimson")):
        texts = " ".join(passage.text for passage in one.recall("kite kettle lamp"))
        assert own in texts and foreign not in texts and SECRET in texts


def test_a_filter_is_obeyed_and_cannot_open_another_stream() -> None:
    index = ChunkIndex(HashingEmbedder())
    index.add(
        ["Lamps of year one are dim.", "Lamps of year two are bright."],
        metadata=[{"year": 1}, {"year": 2}],
    )
    other = Retriever(index, RetrievalConfig(size=24))
    other.write(document())
    other.end()
    owner = {"memlm_stream": other._owners}
    for where in ({"year": 2}, {"year": 2, **owner}):
        asked = Retriever(index, RetrievalConfig(k=50, where=where))
        assert [p.text for p in asked.recall("lamps")] == ["Lamps of year two are bright."]
    assert not any(
        SECRET in p.text
        for p in Retriever(index, RetrievalConfig(k=50, where=owner)).recall("lamp")
    )


def test_state_and_index_together_go_on_where_they_stopped(tmp_path: Path) -> None:
    text = document()
    whole, broken = retriever(), retriever()
    whole.write(text)
    whole.end()
    broken.write(text[:700])
    state = json.loads(json.dumps(broken.state()))
    broken.index.save(tmp_path / "index")
    again = Retriever.restore(ChunkIndex.load(tmp_path / "index", HashingEmbedder()), state)
    again.write(text[700:])
    again.end()
    question = "Who keeps the lamp?"
    places = [[(p.start, p.end) for p in one.recall(question)] for one in (whole, again)]
    assert places[0] == places[1]


def test_an_index_saved_later_than_the_state_is_set_back() -> None:
    one = retriever(k=500)
    one.write(document()[:1500])
    state = one.state()
    known = len(one.index)
    one.write(document()[1500:])
    one.end()
    one.flush()
    assert len(one.index) > known
    again = Retriever.restore(one.index, state)
    assert len(again.index) == known
    again.write(document()[1500:])
    again.end()
    assert any(SECRET in passage.text for passage in again.recall("golden lamp"))


def test_blank_text_and_nothing_recall_nothing() -> None:
    empty = retriever()
    assert empty.recall("anything?") == []
    empty.write("   \n\n  ")
    empty.end()
    assert empty.recall("anything?") == []
    assert render([]) == ""


def test_passages_are_shown_as_the_template_says() -> None:
    passage = Recalled("Two\n lines.", "book", 7, 17, "a", 0.5)
    assert render([passage, passage]) == 2 * DOCUMENT_RECALL_TEMPLATE.replace(
        "{text}", "Two lines."
    )
    assert render([passage], "[{document}, {start}] {text}\n") == "[book, 7] Two lines.\n"
    tricky = Recalled("{start} {document}", "{text}", 7, 17, "a", 0.5)
    assert render([tricky], "{text}") == "{start} {document}"


@pytest.mark.parametrize(
    ("config", "message"),
    [({"k": 0}, "k=0"), ({"size": 0}, "size=0"), ({"hops": 0}, "hops=0"), ({"overlap": -1}, "overlap=-1"),
     ({"k": 1.5}, "k=1.5"), ({"k": True}, "k=True")],
)  # fmt: skip
def test_impossible_settings_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetrievalConfig(**config)


def test_other_things_than_an_index_are_refused() -> None:
    assert as_retriever(None) is None
    with pytest.raises(TypeError, match="retrieval is a dict"):
        as_retriever({})


def test_an_id_of_digits_and_a_number_are_two() -> None:
    index = ChunkIndex(HashingEmbedder())
    index.add(["The lamp is brass.", "The lamp is golden."], ids=[7, "7"])
    recalled = Retriever(index, RetrievalConfig(k=2)).recall("Which lamp?")
    assert {(p.id, p.text) for p in recalled} == {
        (7, "The lamp is brass."),
        ("7", "The lamp is golden."),
    }
    assert all(index.get(passage.id).text == passage.text for passage in recalled)


@pytest.mark.parametrize("years", [{1, 2}, (1, 2), frozenset([1, 2]), [1, 2]])
def test_a_filter_of_several_values_can_be_saved(years: object) -> None:
    index = ChunkIndex(HashingEmbedder())
    index.add(["Lamps of one.", "Lamps of three."], metadata=[{"year": 1}, {"year": 3}])
    state = Retriever(index, RetrievalConfig(where={"year": years})).state()
    again = Retriever.restore(index, json.loads(json.dumps(state)))
    assert [passage.text for passage in again.recall("lamps")] == ["Lamps of one."]


def test_a_filter_that_is_none_is_refused_when_it_is_made() -> None:
    with pytest.raises(ValueError, match=r"where\['year'\]"):
        RetrievalConfig(where={"year": object()})
