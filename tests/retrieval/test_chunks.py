"""Chunks: the same however the text came, at the right places, within their size, none of the text lost."""

from __future__ import annotations

import json
import random
import re
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise

import pytest

from memlm.retrieval.chunks import Chunk, Chunker, chunk_text
from memlm.text import ends_sentence, split_sentences
from tests.tokenizers import tokenizer

PARTS = (
    *'a Mr. b. The x! é 日本語のテキスト - 1. * "Q c." d?) 3.5 . ... e.g. U.S. I'.split(),
    *("\n", "\n\n", "\r\n", "\r\n\r\n", "\t", "  ", "\u00a0", "\u2003"),
    *("w" * 31, "w" * 32, "w" * 33, "x" * 256, "y" * 257, "z" * 600),
    *(" " * 256, " " * 257, "\n" * 300),
)


def texts(count: int, seed: int = 0) -> Iterator[tuple[str, random.Random]]:
    rng = random.Random(seed)
    for _ in range(count):
        length = rng.randint(0, 50)
        yield "".join(rng.choice(PARTS) + rng.choice(("", " ")) for _ in range(length)), rng


def words(text: str) -> int:
    """What the words of a text count: one for every 32 characters."""
    return sum(-(-len(word) // 32) for word in text.split())


def test_random_texts_in_random_pieces_give_the_chunks_of_the_whole() -> None:
    for text, rng in texts(1500):
        size = rng.randint(1, 12)
        settings = (size, rng.randint(0, size - 1), "words", rng.choice(("sentences", "tokens")))
        chunker = Chunker(*settings)
        found: list[Chunk] = []
        at = 0
        while at < len(text):
            step = rng.choice((1, 1, 2, 3, 50, 400))
            found += chunker.push(text[at : at + step])
            at += step
            if rng.random() < 0.3:
                chunker = Chunker.restore(json.loads(json.dumps(chunker.state())))
        found += chunker.finish()
        assert found == list(chunk_text(text, *settings)), (text, settings)


def test_chunks_stand_where_they_say_within_their_size_and_lose_nothing() -> None:
    for text, rng in texts(1500, seed=1):
        size = rng.randint(1, 12)
        overlap = rng.randint(0, size - 1)
        chunks = list(chunk_text(text, size, overlap, by=rng.choice(("sentences", "tokens"))))
        covered: set[int] = set()
        for chunk in chunks:
            assert text[chunk.start : chunk.end] == chunk.text == chunk.text.strip() != ""
            assert words(chunk.text) <= size
            covered.update(range(chunk.start, chunk.end))
        assert covered >= {at for at, character in enumerate(text) if not character.isspace()}
        for before, after in pairwise(chunks):
            assert before.start < after.start and before.end < after.end
            repeated = text[after.start : before.end] if after.start < before.end else ""
            assert words(repeated) <= overlap


def test_words_are_not_cut() -> None:
    cut = 0
    for text, rng in texts(500, seed=2):
        size = rng.randint(8, 20)
        chunks = list(chunk_text(text, size, by=rng.choice(("sentences", "tokens"))))
        ends = {end for chunk in chunks for end in (chunk.start, chunk.end)}
        for run in re.finditer(r"\S+", text):
            if len(run.group()) <= 256:
                assert not ends & set(range(run.start() + 1, run.end()))
            else:
                cut += bool(ends & set(range(run.start() + 1, run.end())))
    assert cut


def test_sentences_are_those_of_split_sentences() -> None:
    text = (
        'Mr. Smith went home. "Why?" he asked! It was 3.5 miles, e.g. by car. John F. Kennedy came (late.) '
        "No one saw it\n\nA heading\n\nThe end of it came soon. 4 more followed."
    )
    sentences = split_sentences(text)
    assert len(sentences) == 8
    longest = max(len(sentence.split()) for sentence in sentences)
    packed = [" ".join(chunk.text.split()) for chunk in chunk_text(text, longest)]
    # Every chunk is whole sentences, and takes in all that fit.
    expected, rest = [], list(sentences)
    while rest:
        taken = [rest.pop(0)]
        while rest and len(" ".join([*taken, rest[0]]).split()) <= longest:
            taken.append(rest.pop(0))
        expected.append(" ".join(taken))
    assert packed == expected


def test_one_rule_says_where_sentences_end() -> None:
    rng = random.Random(3)
    parts = [
        "Mr.",
        "e.g.",
        "F.",
        "a",
        "B",
        "b.",
        "c!",
        'd."',
        "'E",
        "(4",
        "f.)",
        "...",
        "x?!",
        "\u201cG",
        "h.\u201d",
    ]
    for _ in range(500):
        line = rng.choices(parts, k=rng.randint(1, 20))
        sentences = [line[0]]
        for before, word in pairwise(line):
            if ends_sentence(before, word):
                sentences.append(word)
            else:
                sentences[-1] += f" {word}"
        assert sentences == split_sentences(" ".join(line))


def test_a_list_item_goes_on_after_a_saved_mark() -> None:
    text = "1. Mary went home"
    expected = list(chunk_text(text, 3))
    assert [chunk.text for chunk in expected] == ["1. Mary went", "home"]
    for at in range(len(text)):
        chunker = Chunker(3)
        found = chunker.push(text[:at])
        chunker = Chunker.restore(json.loads(json.dumps(chunker.state())))
        assert found + chunker.push(text[at:]) + chunker.finish() == expected


def test_list_items_begin_anew_and_keep_their_marks() -> None:
    text = "A list\n1. Mary went home\n2. John stayed\n- nobody came"
    assert [c.text for c in chunk_text(text, 4)] == [
        "A list",
        "1. Mary went home",
        "2. John stayed",
        "- nobody came",
    ]


def test_a_sentence_too_long_is_split_at_blanks_and_only_that_one() -> None:
    text = "One two. Aa bb cc dd ee ff gg. Three four."
    assert [c.text for c in chunk_text(text, 3)] == [
        "One two.",
        "Aa bb cc",
        "dd ee ff",
        "gg. Three four.",
    ]


def test_overlap_repeats_whole_sentences_as_far_as_they_fit() -> None:
    text = "A b. C d. E f. G h. I j k l. M n o p q."
    assert [c.text for c in chunk_text(text, 6, overlap=2)] == [
        "A b. C d. E f.",
        "E f. G h.",
        "G h. I j k l.",
        "M n o p q.",
    ]


def test_overlap_by_tokens_repeats_words() -> None:
    assert [c.text for c in chunk_text("a. B c\n\nd e f g", 4, overlap=2, by="tokens")] == [
        "a. B c\n\nd",
        "c\n\nd e f",
        "e f g",
    ]


def test_a_sentence_too_long_is_repeated_in_words() -> None:
    found = [c.text for c in chunk_text("a b c d e f g", 4, overlap=1)]
    assert found == ["a b c d", "d e f g"]


@pytest.mark.parametrize("by", ["sentences", "tokens"])
@pytest.mark.parametrize("kind", ["byte-bpe", "metaspace"])
def test_sizes_in_tokens(kind: str, by: str) -> None:
    tokens = tokenizer(kind)
    text = (
        "Mary went to the kitchen. John moved to the hallway, didn't he?\n\nIt's 42 degrees. " * 20
    )
    chunks = list(chunk_text(text, 40, 8, unit="tokens", by=by, tokenizer=tokens))
    lengths = [len(tokens(chunk.text, add_special_tokens=False).input_ids) for chunk in chunks]
    # Counted word by word, a chunk may be off where a word begins it.
    assert max(lengths) <= 41
    assert min(lengths[:-1]) >= (32 if by == "tokens" else 8)
    for chunk in chunks:
        assert text[chunk.start : chunk.end] == chunk.text
        assert chunk.start == 0 or text[chunk.start - 1].isspace()
    chunker = Chunker(40, 8, "tokens", by, tokens)
    found = [chunk for character in text for chunk in chunker.push(character)]
    restored = Chunker.restore(chunker.state(), tokens)
    assert found + restored.finish() == chunks


def test_a_word_of_many_tokens_is_split_when_it_does_not_fit() -> None:
    tokens = tokenizer("byte-bpe")
    text = "q" * 200
    chunks = list(chunk_text(text, 40, unit="tokens", tokenizer=tokens))
    assert "".join(chunk.text for chunk in chunks) == text
    assert [len(chunk.text) for chunk in chunks] == [32] * 5 + [40]


@pytest.mark.parametrize("text", ["", " \n\t ", "\r\n" * 1000])
def test_no_words_no_chunks(text: str) -> None:
    assert list(chunk_text(text)) == []
    assert list(chunk_text(iter(text))) == []


def test_small_texts_and_line_ends() -> None:
    assert list(chunk_text("word")) == [Chunk("word", 0, 4)]
    assert list(chunk_text("  word\n")) == [Chunk("word", 2, 6)]
    assert list(chunk_text("One.\r\n\r\nTwo.\r\nThree", 2)) == [
        Chunk("One.\r\n\r\nTwo.", 0, 12),
        Chunk("Three", 14, 19),
    ]


def test_no_blanks_at_all() -> None:
    text = "日本語" * 1000
    chunks = list(chunk_text(text, 4))
    assert "".join(chunk.text for chunk in chunks) == text
    assert {len(chunk.text) for chunk in chunks[:-1]} == {4 * 32}


def test_long_white_space_ends_a_chunk() -> None:
    text = "a b" + " " * 300 + "c"
    assert list(chunk_text(text, 8, 2)) == [Chunk("a b", 0, 3), Chunk("c", 303, 304)]


@pytest.mark.parametrize("piece", ["word ", "x", " ", "Yes. ", "\n"])
def test_what_is_held_does_not_grow_with_the_text(piece: str) -> None:
    chunker = Chunker(16, 4)
    largest = 0
    for _ in range(300):
        chunker.push(piece * 100)
        largest = max(largest, len(json.dumps(chunker.state())))
    assert largest < 6000


def test_a_long_text_is_read_lazily() -> None:
    asked = []

    def pieces() -> Iterator[str]:
        for number in range(10_000):
            asked.append(number)
            yield "Some words of a sentence. " * 10

    chunks = chunk_text(pieces(), 8)
    next(chunks)
    assert len(asked) == 1
    tracemalloc.start()
    for number, _ in enumerate(chunks):
        if number > 20_000:
            break
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"size": 2.5}, "size=2.5"),
        ({"size": 4, "overlap": 4}, "overlap=4"),
        ({"overlap": -1}, "overlap=-1"),
        ({"unit": "letters"}, "unit='letters'"),
        ({"by": "page"}, "by='page'"),
        ({"unit": "tokens"}, "needs a tokenizer"),
        ({"tokenizer": object()}, "unit='words'"),
    ],
)
def test_bad_settings_are_refused_before_any_text_is_read(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        chunk_text("some text", **settings)


def test_misuse_is_refused() -> None:
    chunker = Chunker()
    chunker.push("some text")
    with pytest.raises(TypeError, match="bytes"):
        chunker.push(b"some text")  # type: ignore[arg-type]
    assert [chunk.text for chunk in chunker.finish()] == ["some text"]
    assert chunker.finish() == []
    with pytest.raises(ValueError, match="follows the end"):
        chunker.push("more")
    with pytest.raises(ValueError, match="follows the end"):
        Chunker.restore(chunker.state()).push("more")
    with pytest.raises(ValueError, match="version None"):
        Chunker.restore({})
    state = chunker.state()
    del state["words"]
    with pytest.raises(ValueError, match="lacks 'words'"):
        Chunker.restore(state)
