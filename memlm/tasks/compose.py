"""BABILong documents: the facts of a story among the sentences of a haystack, made lazily."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memlm.tasks.asking import encode_question
from memlm.tasks.babi.story import Story
from memlm.tasks.composition import Composition, composition_of
from memlm.tasks.haystack.haystack import Haystack
from memlm.tasks.haystack.tokenised import TokenHaystack, from_sentences
from memlm.tasks.lengths import format_length, parse_length
from memlm.templates import BABILONG_FACT_TEMPLATE, BABILONG_QUESTION_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """A composed document with its question: iterate for text, call `ids` for tokens, both lazily.

    `fact_offsets` says at which token of the document each fact starts; `tokens` is the length of
    the document, question and answer not counted.
    """

    story: Story
    tokens: int
    fact_offsets: tuple[int, ...]
    _haystack: TokenHaystack = field(repr=False)
    _fact_ids: tuple[NDArray[np.int32], ...] = field(repr=False)
    _gaps: NDArray[np.int64] = field(repr=False)  # (facts,) sentences before each fact
    _firsts: NDArray[np.int64] = field(repr=False)  # (runs,) first sentence of each stretch
    _counts: NDArray[np.int64] = field(repr=False)  # (runs,) sentences of each stretch
    _noise: int = field(repr=False)  # tokens of noise

    @property
    def question(self) -> str:
        return self.story.question

    @property
    def target(self) -> str:
        return self.story.answer

    @property
    def task(self) -> str:
        return self.story.task

    def __len__(self) -> int:
        return self.tokens

    def ids(self) -> Iterator[NDArray[np.int32]]:
        """Yield the document's token ids in order, in pieces; read-only views, do not write."""
        offsets, flat = self._haystack.offsets, self._haystack.ids
        left = self._noise
        for first, end, facts in self._stretches():
            start = offsets[first]
            stop = min(int(offsets[end]), start + left)
            if stop > start:
                yield flat[start:stop]
                left -= stop - start
            for fact in facts:
                yield self._fact_ids[fact]

    def __iter__(self) -> Iterator[str]:
        """Yield the document's text, a fact or a sentence at a time, each with its leading space."""
        offsets, left = self._haystack.offsets, self._noise
        for first, end, facts in self._stretches():
            for sentence in range(first, end):
                size = int(offsets[sentence + 1] - offsets[sentence])
                if size <= left:
                    yield f" {self._haystack.texts[sentence]}"
                else:
                    yield self._haystack.cut_text(sentence, left)
                left -= min(size, left)
            for fact in facts:
                yield BABILONG_FACT_TEMPLATE.format(fact=self.story.facts[fact])

    def text(self) -> str:
        """Return the whole document."""
        return "".join(self)

    def question_ids(self, template: str = BABILONG_QUESTION_TEMPLATE) -> NDArray[np.int32]:
        """Return what `encode_question` does."""
        return encode_question(self._haystack.tokenizer, self.question, template)

    def _stretches(self) -> Iterator[tuple[int, int, list[int]]]:
        """Yield (first sentence, sentence after the last, facts that follow) in order."""
        gaps = self._gaps.tolist()
        fact, before = 0, 0
        for first, count in zip(self._firsts.tolist(), self._counts.tolist(), strict=True):
            done = 0
            while fact < len(gaps) and gaps[fact] < before + count:
                here = gaps[fact] - before
                following = []
                while fact < len(gaps) and gaps[fact] - before == here:
                    following.append(fact)
                    fact += 1
                yield first + done, first + here, following
                done = here
            yield first + done, first + count, []
            before += count
        yield 0, 0, list(range(fact, len(gaps)))


def compose(
    story: Story,
    haystack: Haystack | TokenHaystack | str | os.PathLike[str] | Iterable[str],
    length: str | int,
    tokenizer: PreTrainedTokenizerBase,
    rng: np.random.Generator | int,
    *,
    position: tuple[float, float] = (0.0, 1.0),
    distance: int | None = None,
    reserve: int = 0,
    composition: str | Composition = "exact",
) -> Sample:
    """Scatter the story's facts through `length` tokens of noise, to be read lazily.

    Facts keep their order; each falls into one of the gaps before, between and after the sentences
    of noise, drawn evenly with repetition. Noise fills what the facts leave free, sentence by sentence
    in the order of its documents, with the last sentence cut; length 0 means no noise. A string names a
    source, of which all documents are used; other iterables of sentences are used in order.

    position: keeps the facts between two fractions of the document's sentences. distance: tokens from
    the start of the earliest supporting fact to the document's end, as near as a gap allows; the facts
    before it fall into the gaps before, those after into the gaps after. reserve: tokens of `length`
    left free for a prompt, none when length is 0. composition: a name of `COMPOSITIONS`, or your own
    rules. ValueError on facts longer than the rest, where the rules do not let them overflow.
    """
    rng = np.random.default_rng(rng)
    whole = parse_length(length)
    rules = composition_of(composition, reserve=reserve, position=position, distance=distance)
    start, end = position
    tokens = rules.room(whole)
    noise = _as_tokens(haystack, tokenizer, tokens)
    fact_ids = tuple(noise.encode(BABILONG_FACT_TEMPLATE.format(fact=fact)) for fact in story.facts)
    sizes = np.array([len(ids) for ids in fact_ids], dtype=np.int64)
    used = int(sizes.sum())
    if tokens and used > tokens and not rules.overflow:
        left = f" less reserve={rules.reserve}" if rules.reserve else ""
        raise ValueError(
            f"the {len(story.facts)} facts of a story take {used} tokens, more than length "
            f"{format_length(whole)}{left}; use a longer length or a shorter story"
        )
    budget = max(tokens - used, 0)
    firsts, counts = _cut_runs(noise, budget, rng, rules.stretch)
    total = int(counts.sum())
    low, high = int(total * start), int(total * end)
    if distance is None:
        gaps = np.sort(rng.integers(low, high + 1, len(fact_ids)))
    else:
        possible = _check_distance(story, sizes, budget + used, distance)
        before = possible.stop - 1 - distance  # of noise
        fixed = _gap_at(noise, firsts, counts, before, budget)
        if not low <= fixed <= high:
            raise ValueError(
                f"distance={distance} lies outside position={position!r}; give one of the two"
            )
        first = min(story.supporting)
        gaps = np.concatenate(
            [
                np.sort(rng.integers(low, fixed + 1, first)),
                [fixed],
                np.sort(rng.integers(fixed, high + 1, len(fact_ids) - first - 1)),
            ]
        )
    offsets = _noise_before(noise, firsts, counts, gaps, budget) + np.cumsum(sizes) - sizes
    return Sample(
        story, budget + used, tuple(offsets.tolist()), noise, fact_ids, gaps, firsts, counts, budget
    )


def _check_distance(story: Story, sizes: NDArray[np.int64], tokens: int, distance: int) -> range:
    if not story.supporting:
        raise ValueError(
            f"distance={distance} needs a story that names its supporting facts, which that of "
            f"{story.question!r} does not; leave distance out"
        )
    possible = _distances(story, sizes, tokens)
    if distance not in possible:
        raise ValueError(
            f"distance={distance} is impossible: in {tokens} tokens the earliest supporting fact "
            f"stands between {possible.start} and {possible.stop - 1} tokens from the end"
        )
    return possible


def _as_tokens(haystack: Any, tokenizer: PreTrainedTokenizerBase, tokens: int) -> TokenHaystack:
    if isinstance(haystack, TokenHaystack):
        return haystack
    if isinstance(haystack, str | os.PathLike):
        haystack = _open_all(os.fspath(haystack))
    if isinstance(haystack, Haystack):
        return haystack.tokenized(tokenizer)
    return from_sentences(haystack, tokenizer, tokens)


@functools.lru_cache(maxsize=1)
def _open_all(source: str) -> Haystack:
    return Haystack.open(source, split="all")


def _cut_runs(
    noise: TokenHaystack, budget: int, rng: np.random.Generator, stretch: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw stretches holding exactly `budget` tokens: first sentences and sentence counts, (runs,).

    The last sentence of the last stretch may be longer than the rest of the budget.
    """
    firsts, ends = noise.runs(budget, rng, None if stretch is None else stretch * budget)
    if budget == 0:
        return firsts, ends
    held = np.cumsum(noise.offsets[ends] - noise.offsets[firsts])
    last = int(np.searchsorted(held, budget))
    firsts, counts = firsts[: last + 1], (ends - firsts)[: last + 1]
    left = budget - (int(held[last - 1]) if last else 0)
    stop = noise.offsets[firsts[last]] + left
    counts[last] = int(np.searchsorted(noise.offsets, stop)) - firsts[last]
    return firsts, counts


def _gap_at(
    noise: TokenHaystack,
    firsts: NDArray[np.int64],
    counts: NDArray[np.int64],
    tokens: int,
    budget: int,
) -> int:
    """Return the gap nearest to the end of `tokens` tokens of noise, the earlier of two equally near."""
    if budget == 0:
        return 0
    ends = np.cumsum(noise.offsets[firsts + counts] - noise.offsets[firsts])
    run = min(int(np.searchsorted(ends, tokens)), len(ends) - 1)
    begins = int(ends[run - 1]) if run else 0
    first, count = int(firsts[run]), int(counts[run])
    starts = noise.offsets[first : first + count + 1] - noise.offsets[first] + begins
    after = min(int(np.searchsorted(starts, tokens)), count)
    gaps = int(counts[:run].sum()) + np.array([max(after - 1, 0), after])
    away = np.abs(_noise_before(noise, firsts, counts, gaps, budget) - tokens)
    return int(gaps[np.argmin(away)])


def _noise_before(
    noise: TokenHaystack,
    firsts: NDArray[np.int64],
    counts: NDArray[np.int64],
    gaps: NDArray[np.int64],
    budget: int,
) -> NDArray[np.int64]:
    """Return how many tokens of noise precede each gap, (facts,)."""
    if budget == 0:
        return np.zeros(len(gaps), dtype=np.int64)
    sentences_before = np.cumsum(counts) - counts
    sizes = noise.offsets[firsts + counts] - noise.offsets[firsts]
    tokens_before = np.cumsum(sizes) - sizes
    run = np.searchsorted(sentences_before, gaps, side="right") - 1
    sentence = firsts[run] + gaps - sentences_before[run]
    at = tokens_before[run] + noise.offsets[sentence] - noise.offsets[firsts[run]]
    # The gap after the cut sentence lies where the cut is.
    return np.minimum(at, budget)


def facts_fit(
    story: Story,
    noise: TokenHaystack,
    length: int,
    share: float = 1.0,
    *,
    reserve: int = 0,
    distance: int | None = None,
    composition: str | Composition = "exact",
) -> bool:
    """Whether `compose` can place a story's facts in `length` tokens; length 0 holds any.

    share: facts and questions allowed per token of length, like the published composer's cap, which is
    1/8 with reserve=300. reserve, distance, composition: as for `compose`.
    """
    rules = composition_of(composition, reserve=reserve, share=share, distance=distance)
    sizes = np.array(
        [len(noise.encode(BABILONG_FACT_TEMPLATE.format(fact=f))) for f in story.facts]
    )
    tokens = rules.room(length) if length else int(sizes.sum())
    if sizes.sum() > tokens and not rules.overflow:
        return False
    # Except for facts of one token, a share of 1 is no cap at all.
    capped = length and rules.share < 1.0
    if capped and len(story.facts) + 1 > int(tokens * rules.share + 1e-9):
        return False
    if distance is None:
        return True
    return bool(story.supporting) and distance in _distances(story, sizes, tokens)


def _distances(story: Story, sizes: NDArray[np.int64], tokens: int) -> range:
    """The distances at which the earliest supporting fact of a document can stand from its end."""
    told_before = int(sizes[: min(story.supporting)].sum())
    return range(int(sizes.sum()) - told_before, tokens - told_before + 1)
