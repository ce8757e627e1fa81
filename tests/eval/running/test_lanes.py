"""Texts of any lengths share a batch, join and leave it at segment borders, and are read as if alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from memlm.eval.running import readers
from memlm.eval.running.lanes import Questions, Stretch, Tape, Text, TextName, side_by_side
from memlm.eval.running.readers import Asked, Kept, MemoryReader
from memlm.segment import cut
from tests.cases import memory_model
from tests.tokenizers import tokenizer

SEGMENT = 8
LENGTHS = (3, 70, 8, 41, 16, 0, 95, 30)


def tokens_of(number: int) -> np.ndarray:
    """A text of its own for each number."""
    made = np.random.default_rng(number).integers(1, 90, LENGTHS[number])
    return made.astype(np.int32)


def text_of(number: int, questions: int = 1, own_segment: bool = False, done: int = 0) -> Text:
    ids = tokens_of(number)
    text = Text(
        TextName("qa1", str(len(ids)), str(number)),
        [(number, question) for question in range(questions)],  # type: ignore[misc]
        [np.array([91 + question]) for question in range(questions)],
        # In pieces that end anywhere.
        Tape(iter(np.array_split(ids, 3))),
        done,
        len(ids) // SEGMENT * SEGMENT,
        len(ids),
    )
    text.tape.skip(done)
    return text


def laid_out(rows: int, at_once: int = 3, own_segment: bool = False, **given: Any) -> list[Any]:
    texts = (text_of(number, **given) for number in range(len(LENGTHS)))
    return list(side_by_side(texts, rows, SEGMENT, at_once, own_segment, 0))


@pytest.mark.parametrize("own_segment", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_every_token_is_read_once_in_order_and_unpadded(rows: int, own_segment: bool) -> None:
    seen: dict[str, list[int]] = {str(number): [] for number in range(len(LENGTHS))}
    asked = []
    for piece in laid_out(rows, own_segment=own_segment):
        if isinstance(piece, Stretch):
            assert len(piece.texts) <= rows and piece.ids.shape[1] % SEGMENT == 0
            for name, row in zip(piece.texts, piece.ids.tolist(), strict=True):
                seen[name.document] += row
            continue
        assert isinstance(piece, Questions) and len(piece.asked) <= rows
        for number, name in enumerate(piece.short):
            assert own_segment and piece.short_ids is not None and piece.short_mask is not None
            seen[name.document] += piece.short_ids[number][piece.short_mask[number]].tolist()
        for name, ids, mask in zip(piece.texts, piece.ids, piece.mask, strict=True):
            prompt = ids[mask].tolist()
            assert prompt[-1] == 91 and (len(prompt) == 1 or not own_segment)
            asked.append(seen[name.document] + prompt[:-1])
        assert piece.leaving == piece.texts
    assert sorted(asked) == sorted(tokens_of(n).tolist() for n in range(len(LENGTHS)))


def test_a_row_that_is_free_is_taken_by_the_next_text() -> None:
    shapes = [len(piece.texts) for piece in laid_out(2, 50) if isinstance(piece, Stretch)]
    # Two texts at a time until but one is left; nothing waits for the longest.
    assert shapes[:-1] == [2] * (len(shapes) - 1)
    most = max(piece.ids.shape[1] for piece in laid_out(2, 2) if isinstance(piece, Stretch))
    assert most == 2 * SEGMENT


def test_a_text_stays_until_its_last_question(rows: int = 3) -> None:
    left: set[str] = set()
    for piece in laid_out(rows, questions=5, own_segment=True):
        if isinstance(piece, Questions):
            assert not {name.document for name in piece.texts} & left
            left |= {name.document for name in piece.leaving}
    assert len(left) == len(LENGTHS)
    shorts = [n for p in laid_out(rows, questions=5, own_segment=True)
              if isinstance(p, Questions) for n in p.short]  # fmt: skip
    # The short end is read once, whatever is asked.
    assert len(shorts) == len(set(shorts)) == sum(length % SEGMENT > 0 for length in LENGTHS)


class Said(Exception):
    """Stops a reader when it would read on."""


class Document:
    def __init__(self, number: int) -> None:
        self.tokens = LENGTHS[number]
        self.number = number

    def ids(self) -> Any:
        return iter([tokens_of(self.number)])


def group_of(number: int) -> list[Asked]:
    key = ("qa1", "0k", number)
    empty, after = np.zeros(0, np.int32), np.array([5, 6], np.int32)
    name = TextName("qa1", "0k", str(number))
    return [Asked(Document(number), empty, after, key, 2, name)]  # type: ignore[arg-type]


def states_asked(reader: MemoryReader, rows: int, kept: Kept | None = None) -> dict[int, Any]:
    """The state and prompt with which each text is asked about."""
    found: dict[int, Any] = {}

    def generate(model: Any, ids: Any, mask: Any, asked: Any, memory_state: Any) -> list[str]:
        for row, one in enumerate(asked):
            prompt = ids[row][mask[row]].tolist()
            found[one.key[2]] = (memory_state.select([row]), prompt)
        return ["said"] * len(asked)

    reader._generate = generate  # type: ignore[method-assign]
    order = sorted(range(len(LENGTHS)), key=lambda n: -LENGTHS[n])
    pieces = reader.prepare(map(group_of, order), rows, kept)
    with torch.no_grad():
        told = list(reader.answer(pieces, lambda count: None, kept))
    assert sorted(one.key[2] for step in told for one in step.asked) == sorted(order)
    return found


@pytest.mark.parametrize("own_segment", [False, True])
@pytest.mark.parametrize("schedule", ["sequential", "wavefront"])
def test_a_text_is_remembered_as_if_it_were_alone(schedule: str, own_segment: bool) -> None:
    model = memory_model("llama", "armt", SEGMENT, num_hidden_layers=2, vocab_size=100).eval()
    model.config.schedule = schedule
    ran = []
    batched = model.scheduler._wavefront
    model.scheduler._wavefront = lambda *given: ran.append(1) or batched(*given)  # type: ignore
    reader = MemoryReader(model, tokenizer("byte-bpe"), own_segment)
    found = states_asked(reader, 3)
    assert bool(ran) == (schedule == "wavefront")
    model.config.schedule = "sequential"
    for number, (state, prompt) in found.items():
        ids = torch.from_numpy(tokens_of(number).astype(np.int64))[None]
        read = ids.shape[1] if own_segment else ids.shape[1] // SEGMENT * SEGMENT
        assert prompt == [*ids[0, read:].tolist(), 5, 6]
        alone = model.read(cut(ids[:, :read], None, None, SEGMENT), model.init_state(1))
        for name, value in alone.tensors.items():
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-11)


def test_reading_goes_on_from_what_was_kept(tmp_path: Any, monkeypatch: Any) -> None:
    model = memory_model("llama", "armt", SEGMENT, num_hidden_layers=2, vocab_size=100).eval()
    monkeypatch.setattr(readers, "KEEP_SECONDS", -1.0)
    monkeypatch.setattr(readers, "AT_ONCE", 2)
    whole = states_asked(MemoryReader(model, tokenizer("byte-bpe")), 3)
    file = tmp_path / "kept.safetensors"
    reader = MemoryReader(model, tokenizer("byte-bpe"), keep_at=file)
    read, calls = model.read, [0]

    def failing(*given: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6:
            raise Said
        return read(*given)

    monkeypatch.setattr(model, "read", failing)
    with pytest.raises(Said):
        states_asked(reader, 3)
    monkeypatch.setattr(model, "read", read)
    kept = reader.resume()
    assert kept is not None and any(kept.done.values())
    # A text that is not wanted any more is dropped.
    others = list(kept.done)[1:]
    assert list(kept.only(set(others)).done) == others
    assert kept.only(set(others)).state.batch_size == len(others)
    again = states_asked(reader, 2, kept)
    for number, (state, prompt) in again.items():
        assert prompt == whole[number][1]
        for name, value in whole[number][0].tensors.items():
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-11)
    reader.forget()
    assert not file.exists() and reader.resume() is None
