"""The tokenizer trained on the data at hand."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from memlm.tasks import babi
from memlm.train import tokenizer as module
from memlm.train import train_tokenizer
from memlm.train.tokenizer import MAIN_TASKS, babi_words

TEXTS = ["The quick brown fox jumps over the lazy dog; then two — naïve! — spaces  follow."] * 50


@pytest.fixture(autouse=True)
def few_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are shown far more often than these few texts, as in earnest, but not for seconds."""
    monkeypatch.setattr(module, "WEIGHT", 40 * len(TEXTS))


@pytest.mark.parametrize("tasks", [(), ("qa6", "qa10"), babi.TASKS])
def test_every_babi_word_is_one_token_behind_a_space(tasks: tuple[str, ...]) -> None:
    tokenizer = train_tokenizer(TEXTS, 900, babi_words(tasks))
    for task in {*MAIN_TASKS, *tasks} - {"qa8", "qa19"}:
        for story in islice(babi.generate(task, 5), 50):
            for text in (*story.facts, story.question, story.answer):
                words = text.replace(".", "").replace("?", "").split()
                ends = sum(text.count(mark) for mark in ".?")
                assert len(tokenizer.tokenize(f" {text}")) == len(words) + ends, text


def test_training_twice_gives_one_tokenizer() -> None:
    one, two = (train_tokenizer(TEXTS, 400, ["kitchen"]) for _ in range(2))
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()


def test_a_saved_tokenizer_is_an_ordinary_one(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 400)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = " Any text\nat all: 42 — naïve café, 日本."
    assert again.decode(again(text)["input_ids"]) == text
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.eos_token_id == tokenizer.eos_token_id is not None
    assert len({again.pad_token_id, again.bos_token_id, again.eos_token_id}) == 3


@pytest.mark.parametrize(("size", "words"), [(200, "at least 259"), (270, "use a larger one")])
def test_a_vocabulary_too_small_is_refused(size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        train_tokenizer(TEXTS, size, babi_words())
