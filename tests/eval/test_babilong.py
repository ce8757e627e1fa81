"""Composition: exact lengths, order, evenness, laziness; and ready-made samples."""

from __future__ import annotations

import itertools
import json
import re
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from memlm.eval import babi, babilong
from memlm.eval.haystack import Haystack, TokenHaystack
from tests.tokenizers import tokenizer as other_tokenizer

STORY = babi.Story(
    ["Mary went to the office.", "John moved to the garden.", "Mary travelled to the kitchen."],
    "Where is Mary?",
    "kitchen",
    [2],
    "qa1",
)


def ids_of(sample: babilong.Sample) -> list[int]:
    return np.concatenate(list(sample.ids())).tolist()


@pytest.mark.parametrize(
    ("written", "tokens"),
    [
        *(("0k", 0), ("4k", 4096), ("128K", 131072), ("1M", 2**20), ("10m", 10 * 2**20)),
        *((512, 512), ("512", 512), ("0.5k", 512), ("50M", 50 * 2**20), (0, 0)),
    ],
)
def test_lengths_are_powers_of_two(written: str | int, tokens: int) -> None:
    assert babilong.parse_length(written) == tokens
    assert babilong.parse_length(babilong.format_length(written)) == tokens


def test_lengths_are_written_shortest() -> None:
    wrote = [babilong.format_length(n) for n in (0, 4096, "1024k", 10 * 2**20, 1000, 1536)]
    assert wrote == ["0k", "4k", "1M", "10M", "1000", "1536"]


@pytest.mark.parametrize("bad", ["4kk", "", "-1", -5, "k", "4g", "0.3", True, "four"])
def test_an_unknown_length_is_refused(bad: str | int) -> None:
    with pytest.raises(ValueError, match="write whole tokens as"):
        babilong.parse_length(bad)


@pytest.mark.parametrize("length", [50, 64, 100, 513, "1k", "4k", "64k"])
@pytest.mark.parametrize("seed", range(4))
def test_a_sample_has_exactly_the_length_asked(
    length: str | int, seed: int, noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast
) -> None:
    sample = babilong.compose(STORY, noise, length, tokenizer, seed)
    assert len(ids_of(sample)) == sample.tokens == len(sample) == babilong.parse_length(length)


def test_every_fact_stands_in_order_where_its_offset_says(
    noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast
) -> None:
    for seed in range(200):
        sample = babilong.compose(STORY, noise, 100 + 7 * seed, tokenizer, seed)
        ids = ids_of(sample)
        assert list(sample.fact_offsets) == sorted(sample.fact_offsets)
        for fact, at in zip(STORY.facts, sample.fact_offsets, strict=True):
            told = tokenizer(f" {fact}")["input_ids"]
            assert ids[at : at + len(told)] == told


def test_without_the_facts_the_noise_runs_on_unbroken(
    noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast
) -> None:
    for seed in range(50):
        sample = babilong.compose(STORY, noise, 700, tokenizer, seed)
        pieces = list(sample)
        facts = [piece for piece in pieces if piece.strip() in STORY.facts]
        assert facts == [f" {fact}" for fact in STORY.facts]
        sentences = [piece.strip() for piece in pieces if piece not in facts]
        assert set(sentences[:-1]) <= set(noise.texts)
        # A sentence is followed by its neighbour, unless its document ended.
        for left, right in itertools.pairwise(sentences[:-1]):
            at = [i for i, text in enumerate(noise.texts) if text == left]
            follows = any(
                i + 1 in noise.first_sentence.tolist() or noise.texts[i + 1] == right for i in at
            )
            assert follows


def test_ids_are_those_of_the_joined_text(
    noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast
) -> None:
    for seed in range(30):
        sample = babilong.compose(STORY, noise, 600, tokenizer, seed)
        ids = ids_of(sample)
        assert tokenizer.decode(ids) == sample.text()
        # Only the last sentence is cut inside a word, where the text cannot tell how it went on.
        again = tokenizer("".join(list(sample)[:-1]))["input_ids"]
        assert ids[: len(again)] == again


def test_zero_length_is_the_facts_alone(
    noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast
) -> None:
    sample = babilong.compose(STORY, noise, "0k", tokenizer, 0)
    assert list(sample) == [f" {fact}" for fact in STORY.facts]
    assert sample.tokens == len(ids_of(sample))
    assert (sample.question, sample.target, sample.task) == ("Where is Mary?", "kitchen", "qa1")


def test_a_length_of_the_facts_alone_leaves_no_noise(
    noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast
) -> None:
    bare = babilong.compose(STORY, noise, 0, tokenizer, 0)
    assert ids_of(babilong.compose(STORY, noise, bare.tokens, tokenizer, 0)) == ids_of(bare)
    with pytest.raises(ValueError, match=r"3 facts of a story take \d+ tokens.*longer length"):
        babilong.compose(STORY, noise, bare.tokens - 1, tokenizer, 0)


def test_a_seed_gives_the_same_sample(
    noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast
) -> None:
    first, again, other = (
        ids_of(babilong.compose(STORY, noise, "4k", tokenizer, np.random.default_rng(seed)))
        for seed in (5, 5, 6)
    )
    assert first == again != other


def test_facts_fall_evenly_over_the_document(
    noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast
) -> None:
    single = babi.Story(["Mary went to the office."], "Where is Mary?", "office", [0])
    rng = np.random.default_rng(0)
    samples = [babilong.compose(single, noise, "2k", tokenizer, rng) for _ in range(2000)]
    at = np.array([s.fact_offsets[0] / s.tokens for s in samples])
    tenths = np.histogram(at, bins=10, range=(0, 1))[0]
    # 200 expected in each: five standard deviations either way.
    assert tenths.min() > 130 and tenths.max() < 270, tenths


def test_every_gap_is_reached_with_the_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    sentences = [f"The number of this line is {word}." for word in ("one", "two", "three")]
    single = babi.Story(["Mary went to the office."], "Where is Mary?", "office", [0])
    length = sum(len(tokenizer(f" {s}")["input_ids"]) for s in [*sentences, *single.facts])
    orders = {
        babilong.compose(single, sentences, length, tokenizer, seed).text() for seed in range(100)
    }
    lines = [f" {sentence}" for sentence in sentences]
    fact = " Mary went to the office."
    assert orders == {"".join([*lines[:gap], fact, *lines[gap:]]) for gap in range(4)}


def test_facts_keep_to_the_position_asked(
    noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast
) -> None:
    for seed in range(50):
        sample = babilong.compose(STORY, noise, "8k", tokenizer, seed, position=(0.5, 0.75))
        assert all(0.45 < at / sample.tokens < 0.8 for at in sample.fact_offsets)
    with pytest.raises(ValueError, match="rising fractions"):
        babilong.compose(STORY, noise, "8k", tokenizer, 0, position=(0.8, 0.2))


def test_ten_million_tokens_take_neither_time_nor_memory(
    noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast
) -> None:
    tracemalloc.start()
    began = time.process_time()
    sample = babilong.compose(STORY, noise, "50M", tokenizer, 0)
    first = list(itertools.islice(sample.ids(), 100))
    text = list(itertools.islice(sample, 100))
    taken = time.process_time() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(first) == len(text) == 100
    assert taken < 2.0
    # The haystack's own stretches are listed, a few dozen bytes each; the document is not.
    assert peak < 50 * 2**20
    ten = babilong.compose(STORY, noise, "10M", tokenizer, 0)
    assert sum(len(piece) for piece in ten.ids()) == 10 * 2**20


def test_a_list_of_sentences_is_used_in_order_and_starts_over(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    sample = babilong.compose(STORY, ["First it rained.", "Then it stopped."], 200, tokenizer, 0)
    told = [piece.strip() for piece in sample if piece.strip() not in STORY.facts]
    assert told[:4] == ["First it rained.", "Then it stopped."] * 2
    assert sample.tokens == 200


def test_an_endless_iterable_of_sentences_is_read_only_as_far_as_needed(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    endless = (f"Line {number} of a tale without an end." for number in itertools.count())
    sample = babilong.compose(STORY, endless, 2000, tokenizer, 0)
    assert len(ids_of(sample)) == 2000
    assert int(next(endless).split()[1]) < 2000
    with pytest.raises(ValueError, match="empty list of sentences"):
        babilong.compose(STORY, [], 100, tokenizer, 0)


def test_a_source_may_be_named_by_its_path(
    prose: Haystack, prose_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    by_name = babilong.compose(STORY, str(prose_folder), 500, tokenizer, 0)
    assert by_name.text() == babilong.compose(STORY, prose, 500, tokenizer, 0).text()


@pytest.mark.parametrize("kind", ["byte-bpe", "metaspace", "words"])
def test_other_tokenizers_give_exact_lengths_too(kind: str, prose: Haystack) -> None:
    tokenizer = other_tokenizer(kind)
    sample = babilong.compose(STORY, prose.tokenized(tokenizer), 700, tokenizer, 0)
    assert len(ids_of(sample)) == 700
    assert all(piece.startswith(" ") for piece in sample)


def test_question_and_answer_are_encoded_for_training_and_asking(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    question = babilong.encode_question(tokenizer, STORY.question)
    answer = babilong.encode_answer(tokenizer, STORY.answer)
    assert tokenizer.decode(question) == " Where is Mary?"
    assert tokenizer.decode(answer[:-1]) == " kitchen"
    assert answer[-1] == tokenizer.eos_token_id


def test_composing_is_far_faster_than_any_model(
    noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast
) -> None:
    began = time.process_time()
    total = 0
    for seed in range(50):
        sample = babilong.compose(STORY, noise, "16k", tokenizer, seed)
        total += sum(len(piece) for piece in sample.ids())
    # A small model reads 100k tokens a second; data may cost a twentieth of that.
    assert total / (time.process_time() - began) > 2_000_000


RECORDS = [
    {"input": f"Text {n}.", "question": "Where is Mary?", "target": "office"} for n in range(3)
]


@pytest.mark.parametrize("path", ["data/qa1/4k.json", "qa1/4k.json", "data/qa1/4k.jsonl"])
def test_samples_are_loaded_from_json(tmp_path: Path, path: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    lines = path.endswith("l")
    file.write_text("\n".join(map(json.dumps, RECORDS)) if lines else json.dumps(RECORDS))
    assert babilong.load(tmp_path, "qa1", "4k") == RECORDS


def test_samples_are_loaded_from_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "4k").mkdir()
    for number, rows in enumerate((RECORDS[:2], RECORDS[2:])):
        path = tmp_path / "4k" / f"qa1-0000{number}-of-00002.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert babilong.load(str(tmp_path), "qa1", 4096) == RECORDS


def test_samples_that_are_missing_or_broken_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither data/qa2/8k\.json nor 8k/qa2-"):
        babilong.load(tmp_path, "qa2", "8k")
    with pytest.raises(ValueError, match="does not exist"):
        babilong.load("./no-such-folder", "qa1", "4k")
    (tmp_path / "qa1").mkdir()
    (tmp_path / "qa1" / "4k.json").write_text("[{]")
    with pytest.raises(ValueError, match="not JSON"):
        babilong.load(tmp_path, "qa1", "4k")
    (tmp_path / "qa1" / "4k.json").write_text('[{"input": "a", "question": "b"}]')
    with pytest.raises(ValueError, match="lacks 'target'"):
        babilong.load(tmp_path, "qa1", "4k")


def test_written_samples_are_read_back_in_the_published_layout(tmp_path: Path) -> None:
    source = tmp_path / "noise.txt"
    source.write_text(
        "\n\n".join(
            f"Paragraph {n} of a quiet book tells of rain, of bread, and of an old clock."
            for n in range(400)
        )
    )
    files = babilong.write(
        tmp_path / "out", ["qa1", "qa2"], ["0k", 300], samples=5, haystack=str(source), seed=3
    )
    assert [f.relative_to(tmp_path / "out").as_posix() for f in files] == [
        "data/qa1/0k.json",
        "data/qa1/300.json",
        "data/qa2/0k.json",
        "data/qa2/300.json",
    ]
    for task in ("qa1", "qa2"):
        for length, words in (("0k", 0), ("300", 300)):
            records = babilong.load(tmp_path / "out", task, length)
            assert len(records) == 5
            for record in records:
                assert "<word>" not in record["input"]
                pieces = re.findall(r"\w+|[^\w\s]+", record["input"])
                assert not words or len(pieces) == words
                facts = [s for s in re.split(r"(?<=\.) ", record["input"]) if " rain," not in s]
                if not words:
                    assert babi.solve(facts, record["question"]) == record["target"]
    again = babilong.write(
        tmp_path / "again", ["qa1"], ["0k", 300], samples=5, haystack=str(source), seed=3
    )
    assert again[1].read_bytes() == files[1].read_bytes()
    with pytest.raises(ValueError, match="qa99"):
        babilong.write(tmp_path / "no", ["qa99"], ["0k"], haystack=str(source))
