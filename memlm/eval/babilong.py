"""BABILong (arXiv:2406.10149): bAbI facts scattered through running text, at any length.

Differs from the published composer: lengths are exact powers of two of the model's own tokens (4k is
4,096, 1M is 2**20) and count the context alone, the last cut sentence's rest is not carried over to
the next sample, and nothing is held in memory but the list of stretches of text a sample is made of.
"""

from __future__ import annotations

import functools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from memlm.eval.babi.story import Story, check_task
from memlm.eval.haystack import (
    Haystack,
    TokenHaystack,
    check_source,
    encode_texts,
    from_sentences,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Facts, sentences, the question and the answer each follow one space: in a sample as in training.
FACT_TEMPLATE = " {fact}"
QUESTION_TEMPLATE = " {question}"
ANSWER_TEMPLATE = " {answer}"

_LENGTH = re.compile(r"(\d+(?:\.\d+)?)([kKmM]?)")
_UNITS = {"": 1, "k": 2**10, "m": 2**20}


class Record(TypedDict):
    """A ready-made sample, with the columns of the published data sets."""

    input: str
    question: str
    target: str


def parse_length(length: str | int) -> int:
    """Return the tokens meant by "0k", "4k" (4,096), "1M" (2**20), a plain number or an int."""
    match = _LENGTH.fullmatch(str(length).strip())
    tokens = float(match.group(1)) * _UNITS[match.group(2).lower()] if match else -1.0
    if isinstance(length, bool) or tokens < 0 or tokens != int(tokens):
        raise ValueError(
            f"unknown length {length!r}; write whole tokens as '0k', '4k', '128k', '1M' or 4096"
        )
    return int(tokens)


def format_length(tokens: str | int) -> str:
    """Write a length in its shortest form: 4096 is "4k", 2**20 is "1M", 0 is "0k"."""
    count = parse_length(tokens)
    if count == 0:
        return "0k"
    if count % 2**20 == 0:
        return f"{count // 2**20}M"
    return f"{count // 2**10}k" if count % 2**10 == 0 else str(count)


def encode_question(
    tokenizer: PreTrainedTokenizerBase, question: str, template: str = QUESTION_TEMPLATE
) -> NDArray[np.int32]:
    """Return the ids that follow the context and ask the question, (Q,)."""
    text = template.replace("{question}", question)
    return np.array(encode_texts(tokenizer, [text])[0], dtype=np.int32)


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str) -> NDArray[np.int32]:
    """Return the ids of the answer and the end token, (A,)."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token; set tokenizer.eos_token")
    text = ANSWER_TEMPLATE.format(answer=answer)
    return np.array([*encode_texts(tokenizer, [text])[0], tokenizer.eos_token_id], dtype=np.int32)


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
                yield FACT_TEMPLATE.format(fact=self.story.facts[fact])

    def text(self) -> str:
        """Return the whole document."""
        return "".join(self)

    def question_ids(self, template: str = QUESTION_TEMPLATE) -> NDArray[np.int32]:
        """Return what `encode_question` does, remembered by the haystack."""
        return self._haystack.encode(template.replace("{question}", self.question))

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
) -> Sample:
    """Scatter the story's facts through `length` tokens of noise, to be read lazily.

    Facts keep their order; each falls into one of the gaps before, between and after the sentences
    of noise, drawn evenly with repetition. Noise fills what the facts leave, sentence by sentence in
    the order of its documents, the last sentence cut; length 0 means no noise. `position` keeps the
    facts within two fractions of the document's sentences. A string names a source, of which all
    documents are used; other iterables of sentences are used in order.
    """
    rng = np.random.default_rng(rng)
    tokens = parse_length(length)
    start, end = position
    if not 0.0 <= start <= end <= 1.0:
        raise ValueError(f"position={position!r} must be two rising fractions between 0 and 1")
    noise = _as_tokens(haystack, tokenizer, tokens)
    fact_ids = tuple(noise.encode(FACT_TEMPLATE.format(fact=fact)) for fact in story.facts)
    sizes = np.array([len(ids) for ids in fact_ids], dtype=np.int64)
    used = int(sizes.sum())
    if tokens and used > tokens:
        raise ValueError(
            f"the {len(story.facts)} facts of a story take {used} tokens, more than length "
            f"{format_length(tokens)}; use a longer length or a shorter story"
        )
    budget = tokens - used if tokens else 0
    firsts, counts = _cut_runs(noise, budget, rng)
    total = int(counts.sum())
    low, high = int(total * start), int(total * end)
    gaps = np.sort(rng.integers(low, high + 1, len(fact_ids)))
    offsets = _noise_before(noise, firsts, counts, gaps, budget) + np.cumsum(sizes) - sizes
    return Sample(
        story, budget + used, tuple(offsets.tolist()), noise, fact_ids, gaps, firsts, counts, budget
    )


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
    noise: TokenHaystack, budget: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw stretches holding exactly `budget` tokens: first sentences and sentence counts, (runs,).

    The last sentence of the last stretch may be longer than what is left of the budget.
    """
    firsts, ends = noise.runs(budget, rng)
    if budget == 0:
        return firsts, ends
    held = np.cumsum(noise.offsets[ends] - noise.offsets[firsts])
    last = int(np.searchsorted(held, budget))
    firsts, counts = firsts[: last + 1], (ends - firsts)[: last + 1]
    left = budget - (int(held[last - 1]) if last else 0)
    stop = noise.offsets[firsts[last]] + left
    counts[last] = int(np.searchsorted(noise.offsets, stop)) - firsts[last]
    return firsts, counts


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


def write(
    out: str | os.PathLike[str],
    tasks: Sequence[str],
    lengths: Sequence[str | int],
    samples: int = 100,
    *,
    haystack: str | os.PathLike[str] = "builtin",
    stories: str | os.PathLike[str] = "generated",
    tokenizer: PreTrainedTokenizerBase | str = "words",
    seed: int = 0,
) -> list[Path]:
    """Write samples in the published layout, `out`/data/TASK/LENGTH.json, and return the files.

    `tokenizer` is what `length` counts in: a tokenizer, a hub id or folder, or "words" for words and
    punctuation marks. `stories` is "generated" or a folder of bAbI files, repeated when they are fewer.
    A file is one JSON array with columns input, question and target, written a sample at a time.
    """
    from itertools import cycle, islice

    from memlm.eval import babi
    from memlm.state import write_atomically

    check_source(haystack)
    for task in tasks:
        check_task(task)
        if os.fspath(stories) != "generated":
            babi.find_task(stories, task)
        elif task not in babi.GENERATED:
            raise ValueError(
                f"no generator for task {task!r} yet; generated tasks are {', '.join(babi.GENERATED)}"
            )
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    counts = [parse_length(length) for length in lengths]
    noise = Haystack.open(haystack, "eval").tokenized(_tokenizer(tokenizer))
    written = []
    for task in tasks:
        for length in counts:
            rng = np.random.default_rng([seed, zlib.crc32(task.encode()), length])
            if os.fspath(stories) == "generated":
                told: Iterable[Story] = babi.generate(task, rng)
            else:
                told = cycle(babi.load_task(stories, task))
            fitting = (story for story in told if length == 0 or facts_fit(story, noise, length))
            path = Path(out) / "data" / task / f"{format_length(length)}.json"

            def fill(
                temporary: Path,
                chosen: Iterable[Story] = islice(fitting, samples),
                length: int = length,
                rng: np.random.Generator = rng,
            ) -> None:
                with temporary.open("w", encoding="utf-8") as file:
                    before = "[\n"
                    for story in chosen:
                        sample = compose(story, noise, length, noise.tokenizer, rng)
                        row = {
                            "input": sample.text().strip(),
                            "question": story.question,
                            "target": story.answer,
                        }
                        file.write(before + json.dumps(row, ensure_ascii=False))
                        before = ",\n"
                    file.write("\n]\n")

            write_atomically(path, fill)
            written.append(path)
    return written


def facts_fit(story: Story, noise: TokenHaystack, length: int) -> bool:
    """Whether the facts of a story leave `length` tokens unexceeded."""
    facts = (noise.encode(FACT_TEMPLATE.format(fact=fact)) for fact in story.facts)
    return sum(map(len, facts)) <= length


def _tokenizer(name: PreTrainedTokenizerBase | str) -> PreTrainedTokenizerBase:
    if not isinstance(name, str):
        return name
    if name != "words":
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name)
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Only counted, never decoded: every word is the same token.
    core = Tokenizer(models.WordLevel({"<word>": 0}, unk_token="<word>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def load(source: str | os.PathLike[str], task: str, length: str | int) -> list[Record]:
    """Read ready-made samples from a hub data set or from a local folder laid out like one.

    Local layouts: `data/TASK/LENGTH.json`, or `LENGTH/TASK-*.parquet`; also `.jsonl`, and without
    `data/`. On the hub the configuration is the length and the split is the task.
    """
    check_task(task)
    named = format_length(length)
    folder = Path(source)
    if folder.is_dir():
        rows = _local_rows(folder, task, named)
    elif os.fspath(source).startswith((".", "/", "~")):
        raise ValueError(f"folder {os.fspath(source)!r} does not exist; name a folder or a hub id")
    else:
        rows = _hub_rows(os.fspath(source), task, named)
    records: list[Record] = []
    for number, row in enumerate(rows):
        missing = [key for key in ("input", "question", "target") if key not in row]
        if missing:
            raise ValueError(
                f"row {number} of {os.fspath(source)!r} {task} {named} lacks {missing[0]!r}; "
                "columns must be input, question and target"
            )
        records.append(
            Record(
                input=str(row["input"]), question=str(row["question"]), target=str(row["target"])
            )
        )
    return records


def _local_rows(folder: Path, task: str, length: str) -> Iterator[dict[str, Any]]:
    for root in (folder / "data", folder):
        for suffix in (".json", ".jsonl"):
            path = root / task / f"{length}{suffix}"
            if path.is_file():
                return _json_rows(path)
        shards = sorted((root / length).glob(f"{task}-*.parquet"))
        if shards:
            return _parquet_rows(shards)
    raise ValueError(
        f"folder {str(folder)!r} has neither data/{task}/{length}.json nor "
        f"{length}/{task}-*.parquet; choose a task and a length that are there"
    )


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as stream:
            # One array, or an object a line: the first character tells.
            if stream.read(1) == "[":
                stream.seek(0)
                yield from json.load(stream)
                return
            stream.seek(0)
            yield from (json.loads(line) for line in stream if line.strip())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); download it again") from error


def _parquet_rows(paths: list[Path]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    for path in paths:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=64):
            yield from batch.to_pylist()


def _hub_rows(source: str, task: str, length: str) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        return iter(datasets.load_dataset(source, length, split=task))
    except Exception as error:  # `datasets` raises a different type for every cause.
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(
            f"{source!r} {task} {length} cannot be loaded ({type(error).__name__}: {reason}); "
            "name a folder, or check the id and the connection"
        ) from error
