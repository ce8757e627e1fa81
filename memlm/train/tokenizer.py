"""A byte-level BPE tokenizer for models made from scratch, trained on the data at hand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice
from typing import Any

# The words that answers are made of must be one token each: each is shown to the trainer this often, which
# puts its merges before those of the words of any text.
WEIGHT = 20_000
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
# 256 bytes and the special tokens come before any merge.
SMALLEST = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(texts: Iterable[str], vocab_size: int, whole_words: Iterable[str] = ()) -> Any:
    """Train a `PreTrainedTokenizerFast` on `texts`; the same texts give the same tokenizer.

    whole_words: words that become one token each when they follow a space. ValueError when `vocab_size`
    has no room for them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST:
        raise ValueError(
            f"vocab_size={vocab_size} has no room for the 256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens; use at least {SMALLEST}"
        )
    words = sorted({word for word in whole_words if word})
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_weighted(texts, words), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL_TOKENS)
    split = [word for word in words if len(core.encode(f" {word}").ids) != 1]
    if split:
        raise ValueError(
            f"vocab_size={vocab_size} leaves {split[0]!r} in several tokens ({len(split)} words of "
            f"{len(words)}); use a larger one"
        )
    return tokenizer


# The tasks of BABILong's headline average; a model trained on one of them can be taught the others.
MAIN_TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")


def babi_words(tasks: Iterable[str] = (), stories: int = 400) -> list[str]:
    """Every word of BABILong's five main tasks and of `tasks`, answers and questions included."""
    return sorted(
        frozenset[str]().union(*(_words_of(task, stories) for task in {*MAIN_TASKS, *tasks}))
    )


@cache
def _words_of(task: str, stories: int) -> frozenset[str]:
    """Kept, as telling the stories takes half a second, and a run that goes on in a process asks again."""
    from memlm.tasks import babi

    told = islice(babi.generate(task, 0), stories)
    texts = (text for story in told for text in (*story.facts, story.question, story.answer))
    return frozenset(word for text in texts for word in re.findall(r"[A-Za-z]+", text))


def _weighted(texts: Iterable[str], words: list[str]) -> Iterator[str]:
    line = "".join(f" {word}" for word in words)
    for _ in range(WEIGHT if words else 0):
        yield line
    yield from texts
