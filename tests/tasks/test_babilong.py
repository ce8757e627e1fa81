"""Composition: exact lengths, order, evenness, laziness, and where facts may stand."""

from __future__ import annotations

import itertools
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from memlm import MemLMConfig
from memlm.tasks import babi, babilong
from memlm.tasks.haystack import Haystack, TokenHaystack
from memlm.train.options import BabilongOptions
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
    # A small model reads 100k tokens per second; data may cost a twentieth of that.
    assert total / (time.process_time() - began) > 2_000_000


def long_story(facts: int, supporting: list[int]) -> babi.Story:
    told = [f"Mary went to the {place}." for place in ("office", "garden", "kitchen")] * facts
    return babi.Story(told[:facts], "Where is Mary?", "kitchen", supporting, "qa1")


def facts_tokens(noise: TokenHaystack, story: babi.Story) -> list[int]:
    return [len(noise.encode(f" {fact}")) for fact in story.facts]


@pytest.mark.parametrize("supporting", [[0], [2], [4, 2], [5]])
def test_the_earliest_supporting_fact_stands_at_the_distance_asked(
    supporting: list[int], noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast
) -> None:
    story, first = long_story(6, supporting), min(supporting)
    sizes = facts_tokens(noise, story)
    longest = int(np.diff(noise.offsets).max())
    low, high = sum(sizes[first:]), 4096 - sum(sizes[:first])
    for seed, distance in enumerate([low, low + 1, 700, 2000, 3333, high - 1, high]):
        sample = babilong.compose(story, noise, "4k", tokenizer, seed, distance=distance)
        stands = 4096 - sample.fact_offsets[first]
        # At the ends there is a gap, elsewhere within half a sentence.
        assert abs(stands - distance) <= (0 if distance in (low, high) else longest / 2)
        assert list(sample.fact_offsets) == sorted(sample.fact_offsets)
        ids = ids_of(sample)
        assert len(ids) == sample.tokens == 4096
        for fact, at in zip(story.facts, sample.fact_offsets, strict=True):
            told = tokenizer(f" {fact}")["input_ids"]
            assert ids[at : at + len(told)] == told
    for distance in (low - 1, high + 1, 0, -5, 10**9):
        assert not babilong.facts_fit(story, noise, 4096, distance=distance)
        with pytest.raises(ValueError, match=rf"distance={distance} is impossible.*{low}.*{high}"):
            babilong.compose(story, noise, "4k", tokenizer, 0, distance=distance)
    assert babilong.facts_fit(story, noise, 4096, distance=low)
    assert babilong.facts_fit(story, noise, 4096, distance=high)


def test_facts_around_a_distance_fall_on_their_side_of_it_anywhere(
    noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast
) -> None:
    story = long_story(5, [2])
    at = np.array(
        [
            babilong.compose(story, noise, "4k", tokenizer, seed, distance=1000).fact_offsets
            for seed in range(300)
        ]
    )
    stands = 4096 - at
    assert np.all(stands[:, :2] >= 950) and np.all(stands[:, 3:] <= 1050)
    # The two before share 3,000 tokens evenly, so do the two after 1,000.
    assert 2300 < stands[:, :2].mean() < 2800 and 400 < stands[:, 3:].mean() < 600
    assert len({tuple(row) for row in at.tolist()}) > 290


def test_a_distance_without_room_or_supporting_facts(
    noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast
) -> None:
    story = long_story(3, [1])
    sizes = facts_tokens(noise, story)
    bare = babilong.compose(story, noise, "0k", tokenizer, 0, distance=sum(sizes[1:]))
    assert bare.tokens == sum(sizes)
    with pytest.raises(ValueError, match="is impossible"):
        babilong.compose(story, noise, "0k", tokenizer, 0, distance=sum(sizes))
    unnamed = long_story(3, [])
    assert not babilong.facts_fit(unnamed, noise, 4096, distance=100)
    with pytest.raises(ValueError, match="names its supporting facts"):
        babilong.compose(unnamed, noise, "4k", tokenizer, 0, distance=100)
    with pytest.raises(ValueError, match="lies outside position"):
        babilong.compose(story, noise, "4k", tokenizer, 0, distance=3900, position=(0.5, 1.0))
    placed = babilong.compose(story, noise, "4k", tokenizer, 0, distance=1000, position=(0.5, 1.0))
    assert min(placed.fact_offsets) >= 0.45 * 4096


def test_a_haystack_of_one_sentence_is_repeated(tokenizer: PreTrainedTokenizerFast) -> None:
    line = "There is one sentence in this haystack, and it comes again."
    for seed in range(20):
        sample = babilong.compose(
            long_story(4, [1]), [line], 500, tokenizer, seed, distance=100 + 15 * seed
        )
        told = [piece.strip() for piece in sample]
        assert sample.tokens == len(ids_of(sample)) == 500
        (cut,) = set(told) - {line, *long_story(4, []).facts}
        assert line.startswith(cut) and told.count(cut) == 1


def test_a_fact_is_never_cut(noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast) -> None:
    """The last gap lies behind the cut sentence: facts there end the document, whole."""
    ends = 0
    for length in range(60, 160):
        for seed in range(4):
            sample = babilong.compose(STORY, noise, length, tokenizer, seed, position=(1.0, 1.0))
            assert sample.text().endswith("".join(f" {fact}" for fact in STORY.facts))
            assert len(ids_of(sample)) == length
            ends += 1
    assert ends == 400


def test_a_reserve_is_left_free(noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast) -> None:
    reserved = babilong.compose(STORY, noise, "1k", tokenizer, 3, reserve=300)
    assert reserved.tokens == len(ids_of(reserved)) == 724
    assert ids_of(reserved) == ids_of(babilong.compose(STORY, noise, 724, tokenizer, 3))
    bare = babilong.compose(STORY, noise, 0, tokenizer, 3, reserve=300)
    assert bare.text() == "".join(f" {fact}" for fact in STORY.facts)
    for reserve in (-1, 1024, 5000):
        with pytest.raises(ValueError, match=rf"reserve={reserve} must be"):
            babilong.compose(STORY, noise, "1k", tokenizer, 3, reserve=reserve)
    with pytest.raises(ValueError, match="more than length 1k less reserve=1010"):
        babilong.compose(STORY, noise, "1k", tokenizer, 3, reserve=1010)


def test_stories_that_fit(noise: TokenHaystack) -> None:
    story = long_story(9, [0])
    used = sum(facts_tokens(noise, story))
    assert babilong.facts_fit(story, noise, used) and not babilong.facts_fit(story, noise, used - 1)
    assert babilong.facts_fit(story, noise, 0)
    assert not babilong.facts_fit(story, noise, used + 5, reserve=6)
    # Nine facts and a question are ten rows: at an eighth, 80 tokens are wanted.
    wide = max(80, used)
    assert babilong.facts_fit(story, noise, wide, 1 / 8)
    ten = long_story(1, [0])
    assert babilong.facts_fit(ten, noise, 16, 1 / 8) and not babilong.facts_fit(
        ten, noise, 15, 1 / 8
    )
    assert babilong.facts_fit(ten, noise, 316, 1 / 8, reserve=300)
    assert not babilong.facts_fit(ten, noise, 315, 1 / 8, reserve=300)
    # A fifth is no binary fraction.
    assert babilong.facts_fit(ten, noise, 10, 1 / 5) and not babilong.facts_fit(
        ten, noise, 9, 1 / 5
    )
    for share in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match="must be above 0"):
            babilong.facts_fit(story, noise, 100, share)


def test_what_was_moved_is_still_found_here() -> None:
    for name in babilong.__all__:
        assert getattr(babilong, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        getattr(babilong, "nothing")  # noqa: B009


def test_templates_are_what_samples_and_models_were_made_with() -> None:
    # Samples, shipped weights and files of users hold these; changing one changes what they mean.
    assert (babilong.FACT_TEMPLATE, babilong.QUESTION_TEMPLATE, babilong.ANSWER_TEMPLATE) == (
        " {fact}",
        " {question}",
        " {answer}",
    )
    assert BabilongOptions().recall_template == " {text}"
    config = MemLMConfig()
    assert config.question_template == "\n\nQuestion: {question}\nAnswer:"
    assert config.recall_template == "\nRecalled: {text}"
