"""Nobody's text reaches another: whatever is interleaved, each stream is what it would be alone."""

from __future__ import annotations

import tempfile
import threading
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import memlm.streaming
from memlm import DocumentStream, MemLMForCausalLM, StreamPool
from memlm.memory import available_memories
from memlm.retrieval import ChunkIndex, HashingEmbedder, RetrievalConfig, Retriever
from tests.cases import memory_model
from tests.tokenizers import tokenizer

TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}
KINDS = ("none", "own", "own words", "shared", "shared words")
WORDS = "bird tree stone cloud river house door lamp road boat song salt".split()
QUICK = settings(
    max_examples=3,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
# Some 15 CPU seconds for each memory: what takes minutes is never run.
LONG = settings(QUICK, max_examples=6, stateful_step_count=20, derandomize=False)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few words, so that short texts reach the memory."""
    monkeypatch.setattr(memlm.streaming, "BLOCK", 40)


@cache
def model_of(memory: str) -> MemLMForCausalLM:
    return memory_model("llama", memory, num_hidden_layers=2, vocab_size=400)


def new_index(words: bool) -> ChunkIndex:
    return ChunkIndex(HashingEmbedder(256), hybrid=words)


def retriever(index: ChunkIndex | None) -> Retriever | None:
    return None if index is None else Retriever(index, RetrievalConfig(k=2, size=6))


@dataclass
class Told:
    """A stream, and what it was told, in order."""

    stream: DocumentStream
    kind: str
    owner: int
    texts: list[str] = field(default_factory=list)


class Interleaved(RuleBasedStateMachine):
    """Streams, rows of a pool, forks, saves and questions in any order."""

    memory = "armt"
    streams = Bundle("streams")

    @initialize()
    def begin(self) -> None:
        self.model, self.tokenizer = model_of(self.memory), tokenizer("byte-bpe")
        self.pool = StreamPool(self.model, self.tokenizer, batch_size=3)
        self.shared = {words: new_index(words) for words in (False, True)}
        self.owners = 0
        self.all: list[Told] = []
        self.folder = tempfile.TemporaryDirectory()

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            for told in self.all:
                self.compare(told)
            self.folder.cleanup()

    def keep(self, told: Told) -> Told:
        self.all.append(told)
        return told

    @rule(target=streams, kind=st.sampled_from(KINDS), pooled=st.booleans())
    def open(self, kind: str, pooled: bool) -> Told:
        words = kind.endswith("words")
        index = None
        if kind != "none":
            index = self.shared[words] if kind.startswith("shared") else new_index(words)
        self.owners += 1
        if pooled:
            stream = self.pool.open(retriever(index))
        else:
            stream = DocumentStream(self.model, self.tokenizer, retriever(index))
        return self.keep(Told(stream, kind, self.owners))

    @rule(told=streams, seed=st.integers(0, 999), length=st.integers(1, 60))
    def write(self, told: Told, seed: int, length: int) -> None:
        # A mark that no other stream writes.
        rng = Random(seed)
        text = " ".join(rng.choice(WORDS) for _ in range(length)) + f" of o{told.owner}. "
        told.stream.write(text)
        told.texts.append(text)

    @rule(target=streams, told=streams)
    def fork(self, told: Told) -> Told:
        return self.keep(replace(told, stream=told.stream.fork(), texts=list(told.texts)))

    @rule(target=streams, told=streams, name=st.sampled_from("ab"))
    def save_and_load(self, told: Told, name: str) -> Told:
        place = Path(self.folder.name) / f"{len(self.all)}{name}"
        told.stream.save(place)
        again = DocumentStream.load(place, self.model, self.tokenizer, HashingEmbedder(256))
        return self.keep(replace(told, stream=again, texts=list(told.texts)))

    @rule()
    def run(self) -> None:
        self.pool.run()

    @rule(told=streams)
    def ask(self, told: Told) -> None:
        self.compare(told)

    @invariant()
    def gradients_are_off(self) -> None:
        assert all(p.grad is None for p in model_of(self.memory).parameters())

    def compare(self, told: Told) -> None:
        """The answer, the passages, the score and the memory are those of the stream alone."""
        if not "".join(told.texts):
            return
        words = told.kind.endswith("words")
        index = None if told.kind == "none" else new_index(words)
        alone = DocumentStream(self.model, self.tokenizer, retriever(index))
        for text in told.texts:
            alone.write(text)
        question = f"{told.texts[-1].split()[0]}?"
        mine, right = (one.ask(question, max_new_tokens=2) for one in (told.stream, alone))
        marks = [f"o{other.owner}." for other in self.all if other.owner != told.owner]
        for source in mine.sources:
            assert source.text in " ".join(told.texts).replace("  ", " "), source.text
            assert not any(mark in source.text for mark in marks), source.text
        # How rare a word is counts all texts of an index, and so decides the order of what is found.
        if told.kind != "shared words":
            assert [s.text for s in mine.sources] == [s.text for s in right.sources]
            assert mine == right
        assert told.stream.tokens_seen == alone.tokens_seen
        score, expected = (one.score(" a bird") for one in (told.stream, alone))
        assert score == pytest.approx(expected, abs=1e-9)
        assert alone._committed or len(" ".join(told.texts)) < 300
        if told.stream._pool is None and told.stream._committed == alone._committed:
            assert told.stream._open_ids == alone._open_ids
            for name, value in alone._state.tensors.items():
                torch.testing.assert_close(told.stream._state[name], value, **TOLERANCE, msg=name)


def interleave(memory: str, how: settings) -> None:
    machine: Any = type(f"Of{memory}", (Interleaved,), {"memory": memory})
    run_state_machine_as_test(machine, settings=how)


@pytest.mark.parametrize("memory", ["armt", "rmt-r"])
def test_streams_know_nothing_of_each_other(memory: str) -> None:
    interleave(memory, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("memory", available_memories())
def test_streams_of_every_memory_know_nothing_of_each_other(memory: str) -> None:
    interleave(memory, LONG)


def test_two_threads_on_one_model_do_not_disturb_each_other() -> None:
    model, words = model_of("armt"), tokenizer("byte-bpe")

    def read(number: int, found: list[Any]) -> None:
        rng = Random(number)
        stream = DocumentStream(model, words, retriever(new_index(True)))
        for _ in range(2):
            stream.write(" ".join(rng.choice(WORDS) for _ in range(30)) + f" of o{number}. ")
            answer = stream.ask("bird?", max_new_tokens=2)
            found.append((answer, [s.text for s in answer.sources], stream.score(" a bird")))
        found.append(stream._state)

    together: list[list[Any]] = [[], []]
    threads = [threading.Thread(target=read, args=(n, together[n])) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, found in enumerate(together):
        alone: list[Any] = []
        read(number, alone)
        assert found[:-1] == alone[:-1]
        for name, value in alone[-1].tensors.items():
            assert torch.equal(found[-1][name], value), name


@pytest.mark.slow
def test_a_thousand_documents_in_a_pool_are_each_as_alone() -> None:
    """Of one to forty segments, written in turns; memory and answer are those of the document alone.

    With a memory that does not magnify rounding: by ARMT's division a batch's last bit becomes 6e-5.
    """
    model, words, rng = model_of("gated-delta"), tokenizer("byte-bpe"), Random(0)
    texts = [
        [
            " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 60))) + f" of o{n}. "
            for _ in range(rng.randint(1, 4))
        ]
        for n in range(1000)
    ]
    pool = StreamPool(model, words, batch_size=64)
    streams = [pool.open() for _ in texts]
    for turn in range(4):
        for stream, pieces in zip(streams, texts, strict=True):
            for piece in pieces[turn : turn + 1]:
                stream.write(piece)
        pool.run()
    for number, (stream, pieces) in enumerate(zip(streams, texts, strict=True)):
        alone = DocumentStream(model, words)
        for piece in pieces:
            alone.write(piece)
        for name, value in alone._state.tensors.items():
            torch.testing.assert_close(stream._state[name], value, **TOLERANCE, msg=name)
        assert (stream._open_ids, stream._text) == (alone._open_ids, alone._text)
        if number % 20 == 0:  # Answers follow from what was compared, at twenty times its price.
            assert stream.ask("bird?", max_new_tokens=2) == alone.ask("bird?", max_new_tokens=2)
