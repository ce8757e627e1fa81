"""StreamPool: streams that are read side by side remember what each would alone."""

from __future__ import annotations

import gc
import random

import pytest

from memlm import DocumentStream, StreamPool
from memlm.memory import available_memories
from tests.test_streaming import SEGMENT, model_for, same
from tests.tokenizers import TEXT, tokenizer

# Short enough that rounding does not grow: with random weights a memory is chaotic.
LENGTHS = (250, 40, 0, 420, 133, 330)


def pool_for(memory: str = "armt", **options) -> StreamPool:
    return StreamPool(model_for(memory), tokenizer("byte-bpe"), **options)


def documents() -> list[str]:
    return [(TEXT[at:] + TEXT * 8)[:length] for at, length in enumerate(LENGTHS)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch) -> None:
    monkeypatch.setattr("memlm.streaming.BLOCK", 40)


def alone(pool: StreamPool, text: str) -> DocumentStream:
    stream = DocumentStream(pool.model, pool.tokenizer)
    stream.write(text)
    return stream


@pytest.mark.parametrize(
    "memory",
    [
        pytest.param(name, marks=() if name in ("armt", "transformer-xl") else pytest.mark.slow)
        for name in available_memories()
    ],
)
def test_streams_remember_what_they_would_alone(monkeypatch, memory: str) -> None:
    pool, rows = pool_for(memory, batch_size=2), []
    read = pool.model.read

    def noted(segments, state, writes=None):
        segments = list(segments)
        rows.append(segments[0].ids.shape[0])
        return read(segments, state, writes)

    monkeypatch.setattr(pool.model, "read", noted)
    texts, chance = documents(), random.Random(0)
    streams, places = [], [0] * len(texts)
    for index in range(len(texts)):
        # They come at different times, in pieces of different sizes.
        streams.append(pool.open())
        for other in range(index + 1):
            size = chance.randrange(1, 150)
            streams[other].write(texts[other][places[other] : places[other] + size])
            places[other] += size
        if index % 2:
            pool.run()
    for stream, text, at in zip(streams, texts, places, strict=True):
        stream.write(text[at:])
    pool.run()
    assert not pool.waiting and set(rows) == {1, 2}
    monkeypatch.undo()
    monkeypatch.setattr("memlm.streaming.BLOCK", 40)
    for stream, text in zip(streams, texts, strict=True):
        expected = alone(pool, text)
        assert same(stream, expected) and stream.writes == expected.writes


def test_what_waits_is_seen_by_questions() -> None:
    pool = pool_for()
    streams = [pool.open(), pool.open()]
    for stream, text in zip(streams, (TEXT, TEXT[30:]), strict=True):
        stream.write(text)
    waiting = pool.waiting
    assert waiting == sum((len(stream._open_ids) - 1) // SEGMENT for stream in streams) > 2
    before = [(stream.ask("Where?"), stream.tokens_seen) for stream in streams]
    fork = streams[0].fork()
    assert len(pool) == 3 and pool.waiting > waiting
    pool.run()
    assert [(stream.ask("Where?"), stream.tokens_seen) for stream in streams] == before
    assert same(fork, streams[0]) and not pool.waiting
    del fork
    gc.collect()
    assert len(pool) == 2


def test_a_failing_model_loses_nothing(monkeypatch) -> None:
    pool = pool_for()
    streams = [pool.open(), pool.open()]
    for stream in streams:
        stream.write(TEXT)
    monkeypatch.setattr(pool.model, "read", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pool.run()
    monkeypatch.undo()
    monkeypatch.setattr("memlm.streaming.BLOCK", 40)
    pool.run()
    assert all(same(stream, alone(pool, TEXT)) for stream in streams)


def test_a_stream_from_a_file_joins_a_pool_of_its_model(tmp_path) -> None:
    pool = pool_for()
    stream = pool.open()
    stream.write(TEXT)
    stream.save(tmp_path)
    loaded = DocumentStream.load(tmp_path, pool.model, pool.tokenizer)
    pool.add(loaded)
    pool.run()
    assert same(stream, loaded) and len(loaded._open_ids) <= SEGMENT
    # A second time changes nothing.
    pool.add(stream)
    pool.add(loaded)
    assert len(pool) == 2
    for one in (stream, loaded):
        one.write(TEXT)
    pool.run()
    assert same(stream, loaded) and same(stream, alone(pool, TEXT + TEXT))
    with pytest.raises(ValueError, match="another model"):
        pool_for().add(loaded)
    with pytest.raises(ValueError, match="batch_size=0"):
        pool_for(batch_size=0)
