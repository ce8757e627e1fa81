"""BABILong made on the fly for training: bAbI facts told in haystack text, and questions on them.

Three layouts, from the papers' to denser ones:

- story: one bAbI story, its facts between haystack sentences, the question as the document's last
  words. This is the layout of evaluation, with one answer per document to learn from.
- aligned: every segment holds a few whole facts of an endless story among haystack tokens.
- flowing: facts and haystack sentences form one endless text; the distance between facts is redrawn.

In the last two, questions are asked of forks of the memory after segments. A document may go on over
many batches with its memory carried along, so that states of any age are trained on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property
from itertools import islice
from typing import Any

import numpy as np

from memlm.retrieval.base import Embedder
from memlm.retrieval.embedders import HashingEmbedder
from memlm.retrieval.retriever import RetrievalConfig, read_document, render_parts
from memlm.segment import IGNORE
from memlm.tasks import babi
from memlm.tasks.babi.endless import telling
from memlm.tasks.babi.generators.events import DIALECTS
from memlm.tasks.babilong import (
    Sample,
    compose,
    encode_answer,
    encode_question,
)
from memlm.tasks.haystack import TokenHaystack
from memlm.templates import BABILONG_ANSWER_TEMPLATE, BABILONG_FACT_TEMPLATE
from memlm.tokens import encode_parts
from memlm.train.curriculum import Stage
from memlm.train.data import Piece, Question, shifted
from memlm.train.options import BabilongOptions

# Consecutive questions of the generator share a story; some stories are short.
QUESTIONS_A_STORY, STORIES_TRIED = 5, 200


class BabilongSource:
    """Documents of BABILong, each determined by the seed and its number."""

    def __init__(
        self,
        haystack: TokenHaystack,
        segment_length: int,
        options: BabilongOptions | None = None,
        seed: int = 0,
    ) -> None:
        self.haystack = haystack
        self.segment_length = segment_length
        self.options = options or BabilongOptions()
        self.seed = seed
        # Encoded now: a tokenizer without an end token is refused before any document is made.
        self._end = encode_answer(haystack.tokenizer, "")[-1:]
        self._prompts: dict[str, np.ndarray] = {}

    def single_piece(self, stages: Sequence[Stage]) -> bool:
        """Whether documents end with their first piece in all of `stages`."""
        every = [self._options_of(stage) for stage in stages]
        return all(o.end_probability == 1.0 or o.layout == "story" for o in every)

    def document(self, ordinal: int, stage: Stage) -> Iterator[Piece]:
        """The pieces of document `ordinal`, each of as many segments as `stage` draws."""
        options = self._options_of(stage)
        rng = np.random.default_rng([self.seed, ordinal])
        task = str(rng.choice(options.tasks))
        if options.layout == "story":
            yield self._story(task, options, stage, rng)
            return
        teller = _Teller(self, task, options, rng)
        while True:
            segments = int(rng.integers(stage.min_segments, stage.max_segments + 1))
            yield teller.piece(segments)
            if rng.random() < options.end_probability:
                return

    def _options_of(self, stage: Stage) -> BabilongOptions:
        return replace(self.options, **stage.data) if stage.data else self.options

    def encode(self, fact: str) -> np.ndarray:
        """A fact as it stands in a document, after one space."""
        return self.haystack.encode(BABILONG_FACT_TEMPLATE.format(fact=fact))

    def encode_line(self, fact: str) -> np.ndarray:
        """A fact at the beginning of a line."""
        return self.haystack.encode(f"\n{fact}")

    # Remembered in a dict, not by a cached function: this object is sent to spawned data workers.

    def prompt(self, question: str) -> np.ndarray:
        """What `encode_question` gives."""
        if question not in self._prompts:
            template = self.options.asked_with
            self._prompts[question] = encode_question(self.haystack.tokenizer, question, template)
        return self._prompts[question]

    def answer(self, answer: str) -> np.ndarray:
        """What `encode_answer` gives."""
        ids = self.haystack.encode(BABILONG_ANSWER_TEMPLATE.format(answer=answer))
        return np.concatenate([ids, self._end])

    # Layout "story".

    def _story(
        self, task: str, options: BabilongOptions, stage: Stage, rng: np.random.Generator
    ) -> Piece:
        segments = int(rng.integers(stage.min_segments, stage.max_segments + 1))
        length = segments * (options.segment_length or self.segment_length)
        for story in self._told(task, rng):
            facts = sum(len(self.encode(fact)) for fact in story.facts)
            asked = [(story.question, story.answer)]
            asked += self._more(task, story.facts, story.question, options.questions - 1, rng)
            parts, labels = [], []
            for question, answer in asked:
                prompt, reply = self.prompt(question), self.answer(answer)
                parts += [prompt, reply]
                labels += [np.full(len(prompt), IGNORE), reply]
            # With recalled passages, a question has its own segment after the document.
            budget = length if options.retrieval else length - sum(map(len, parts))
            few = options.max_facts is None or len(story.facts) <= options.max_facts
            if budget >= facts and few:
                sample = compose(story, self.haystack, budget, self.haystack.tokenizer, rng)
                context = np.concatenate(list(sample.ids()))
                if options.retrieval:
                    after = self._recalling(options, sample, asked, segments - 1)
                    return Piece(context, None, after, options.segment_length)
                ids = np.concatenate([context, *parts])
                target = np.concatenate([np.full(len(context), IGNORE), *labels])
                return Piece(ids, shifted(target), segment_length=options.segment_length)
        raise ValueError(
            f"segment_length={options.segment_length or self.segment_length} with {segments} "
            f"segments has no room for a story of {task} and its question; use longer segments, or "
            "min_segments above 1"
        )

    def _recalling(
        self,
        options: BabilongOptions,
        sample: Sample,
        asked: Sequence[tuple[str, str]],
        segment: int,
    ) -> tuple[Question, ...]:
        """Questions after the document, each preceded by the passages it recalls, as in evaluation."""
        config = RetrievalConfig(
            k=options.retrieval, size=options.retrieval_size, hops=options.retrieval_hops
        )
        retriever = read_document(sample, self.embedder, config)
        found = []
        for question, answer in asked:
            shown = render_parts(retriever.recall(question), options.recall_template)
            recalled = encode_parts(self.haystack.tokenizer, shown)[: options.retrieval_tokens]
            prompt, reply = self.prompt(question), self.answer(answer)
            ids = np.concatenate([np.array(recalled, dtype=np.int32), prompt, reply])
            found.append(Question(segment, ids, len(reply)))
        return tuple(found)

    @cached_property
    def embedder(self) -> Embedder:
        return HashingEmbedder()

    def _told(self, task: str, rng: np.random.Generator) -> Iterator[babi.Story]:
        """Stories to try: the questions of one story in random order, then those of the next."""
        stories = babi.generate(task, rng)
        for _ in range(STORIES_TRIED):
            told = list(islice(stories, QUESTIONS_A_STORY))
            for index in rng.permutation(len(told)):
                yield told[index]

    def _more(
        self,
        task: str,
        facts: Sequence[str],
        but: str,
        count: int,
        rng: np.random.Generator,
    ) -> list[tuple[str, str]]:
        """Up to `count` further questions of `task` that `facts` answer, with the answers."""
        found: list[tuple[str, str]] = []
        candidates = _questions(task)
        for index in rng.permutation(len(candidates)) if count else ():
            question = candidates[index]
            if question == but:
                continue
            try:
                found.append((question, babi.solve(facts, question)))
            except ValueError:
                continue
            if len(found) == count:
                break
        return found


class _Teller:
    """Tells an endless story segment by segment."""

    def __init__(
        self, source: BabilongSource, task: str, options: BabilongOptions, rng: np.random.Generator
    ) -> None:
        self.source, self.task, self.options, self.rng = source, task, options, rng
        self.length = options.segment_length or source.segment_length
        self.story = telling(task, random.Random(int(rng.integers(2**63))))
        self.actors = DIALECTS[task].actors if options.distinct_actors else ()
        self.due: list[str] = []
        self.text, self.offsets = source.haystack.ids, source.haystack.offsets
        self.at = int(rng.integers(len(self.text)))
        # Layout "flowing": what is told but not yet read, and the events whose facts end in it.
        self.ahead: list[np.ndarray] = []
        self.width = 0
        self.pending: list[tuple[int, Any]] = []
        # Where facts begin and end that are told but not read to their end.
        self.spans: list[tuple[int, int]] = []
        self.regime, self.sentence, self.gap, self.owed = 0, 0, 0.0, 0.0

    def piece(self, segments: int) -> Piece:
        """The next `segments` segments, with questions after every `ask_every`-th and the last."""
        parts: list[np.ndarray] = []
        questions: list[Question] = []
        silent: list[bool] = []
        for index in range(segments):
            aligned = self.options.layout == "aligned"
            ids, told = self._aligned() if aligned else self._flowing()
            parts.append(ids)
            silent.append(not told)
            if (index + 1) % self.options.ask_every == 0 or index + 1 == segments:
                questions += self._ask(index)
        return Piece(
            np.concatenate(parts),
            questions=tuple(questions),
            segment_length=self.options.segment_length,
            silent=() if self.options.price_facts else tuple(silent),
        )

    def _ask(self, index: int) -> list[Question]:
        """Questions after a segment: the task's own, and lessons for the last or for want of more."""
        kinds = [kind for kind in self.options.lessons if kind != self.task]
        lessons = {kind: said for kind in kinds if (said := self.story.answers(kind))}
        room = self.options.questions
        # Drawn from all that the task may ask, so that a seed gives the documents it gave before lessons.
        asked = self._drawn(
            _questions(self.task), self.story.answers(self.task), room - bool(lessons)
        )
        while len(asked) < room and lessons:
            # By kind first, so that a lesson with few questions is asked as often as another.
            kind = str(self.rng.choice([kind for kind in kinds if kind in lessons]))
            left = {q: answer for q, answer in lessons[kind].items() if q not in asked}
            asked |= self._drawn(sorted(left), left, 1)
            if not left:
                del lessons[kind]
        found = []
        for question, answer in asked.items():
            prompt, reply = self.source.prompt(question), self.source.answer(answer)
            found.append(Question(index, np.concatenate([prompt, reply]), len(reply)))
        return found

    def _drawn(
        self, questions: Sequence[str], answers: dict[str, str], count: int
    ) -> dict[str, str]:
        """Up to `count` of the questions that have answers, at random."""
        order = self.rng.permutation(len(questions)) if count else ()
        known = (questions[at] for at in order if questions[at] in answers)
        return {question: answers[question] for question in islice(known, count)}

    def _tell(self) -> tuple[Any, np.ndarray]:
        """The next event, and its fact's tokens."""
        event = self.story.draw()
        if self.actors:
            if not self.due:
                self.due = [str(actor) for actor in self.rng.permutation(self.actors)]
            actor = self.due.pop()
            while event.actor != actor:
                event = self.story.draw()
        # Nothing is drawn where no fact may begin a line: seeds keep their documents.
        share = self.options.line_breaks
        begins = share > 0 and self.rng.random() < share
        encode = self.source.encode_line if begins else self.source.encode
        return event, encode(self.story.tell(event))

    def _noise(self, count: int) -> np.ndarray:
        at = np.arange(self.at, self.at + count)
        self.at = (self.at + count) % len(self.text)
        return np.take(self.text, at, mode="wrap")

    def _aligned(self) -> tuple[np.ndarray, bool]:
        """The next segment, and whether a fact is told in it."""
        left, told = self.length, []
        for _ in range(int(self.rng.choice(self.options.facts_per_segment))):
            event, ids = self._tell()
            if len(ids) > left:
                # Too long for this segment: nobody will ask about a fact that was not told.
                break
            self.story.note(event)
            told.append(ids)
            left -= len(ids)
        places = np.sort(self.rng.integers(0, left + 1, size=len(told)))
        return _interleave(self._noise(left), told, places), bool(told)

    def _flowing(self) -> tuple[np.ndarray, bool]:
        """The next segment, and whether a fact, or a part of one, is told in it."""
        while self.width < self.length:
            self._flow()
        flat = np.concatenate(self.ahead)
        rest = flat[self.length :]
        self.ahead, self.width = [rest], len(rest)
        for end, event in self.pending:
            if end <= self.length:
                self.story.note(event)
        self.pending = [(end - self.length, e) for end, e in self.pending if end > self.length]
        told = any(begin < self.length for begin, _ in self.spans)
        behind = (
            (begin - self.length, end - self.length)
            for begin, end in self.spans
            if end > self.length
        )
        self.spans = list(behind)
        return flat[: self.length], told

    def _flow(self) -> None:
        """Tell one more haystack sentence, or one more fact."""
        if self.owed > 0:
            ids = self.text[self.offsets[self.sentence] : self.offsets[self.sentence + 1]]
            self.sentence = (self.sentence + 1) % (len(self.offsets) - 1)
            self.owed -= len(ids)
        else:
            if self.regime <= 0:
                rng = self.rng
                self.regime = int(rng.integers(2, 11))
                low, high = self.options.gap_tokens
                dense = rng.random() < self.options.no_gap
                self.gap = 0.0 if dense else float(np.exp(rng.uniform(np.log(low), np.log(high))))
                self.sentence = int(rng.integers(len(self.offsets) - 1))
            event, ids = self._tell()
            self.pending.append((self.width + len(ids), event))
            self.spans.append((self.width, self.width + len(ids)))
            self.regime -= 1
            self.owed = float(self.rng.exponential(self.gap)) if self.gap else 0.0
        self.ahead.append(ids)
        self.width += len(ids)


def _interleave(noise: np.ndarray, facts: Sequence[np.ndarray], places: np.ndarray) -> np.ndarray:
    """`facts` in order, each where `places` (ascending) says, in `noise`."""
    parts, begin = [], 0
    for fact, place in zip(facts, places, strict=True):
        parts += [noise[begin:place], fact]
        begin = int(place)
    return np.concatenate([*parts, noise[begin:]])


@cache
def _questions(task: str) -> list[str]:
    """The questions `task` asks, collected from four hundred of its stories."""
    return sorted({story.question for story in islice(babi.generate(task, 0), 400)})
