"""Rows of people's own data in training: pieces and questions, the same ones after resuming."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memlm.data import open_rows
from memlm.data.encoding import Encoder
from memlm.segment import IGNORE, cut
from memlm.train import Curriculum, MemLMTrainer, Recipe, RowSource, Stage
from memlm.train.data import Windows
from memlm.train.making import make_arguments
from tests.cases import memory_model
from tests.data.test_rows import parquet, write
from tests.test_chat import TEMPLATE
from tests.tokenizers import tokenizer
from tests.train.tiny import arguments, gradients, stream

pytestmark = pytest.mark.usefixtures("no_waiting")
SEGMENT = 16
TEXT = "Mary went to the kitchen. John moved to the hallway, didn't he? "


def source(path: Path, seed: int = 0) -> RowSource:
    encoder = Encoder(copy.deepcopy(tokenizer("byte-bpe")), " {question}")
    return RowSource(open_rows(path), encoder, SEGMENT, seed)


def asked(number: int, times: int = 3) -> dict[str, Any]:
    document = f"{number}. {TEXT * times}"
    questions = [
        {"question": "Who?", "answer": "Mary", "at": 40},
        {"question": "Where?", "answer": "hallway"},
    ]
    return {"document": document, "questions": questions}


def test_a_document_is_one_piece_with_its_questions_behind_their_segments(tmp_path: Path) -> None:
    made = source(write(tmp_path, asked(1)))
    stage = Stage(max_segments=1)
    (piece,) = made.document(0, stage)
    assert made.single_piece([stage]) and piece.targets is None
    tok = made.encoder.tokenizer
    document = asked(1)["document"]
    assert tok.decode(piece.ids) == document
    first, last = piece.questions
    # The segment of the last character that was read.
    read = len(tok(document[:40], add_special_tokens=False).input_ids)
    assert first.segment == (read - 1) // SEGMENT
    assert last.segment == (len(piece.ids) - 1) // SEGMENT
    assert tok.decode(first.ids) == " Who? Mary<eos>"
    assert tok.decode(last.ids[-last.answer :]) == " hallway<eos>"


def test_a_question_at_a_border_is_asked_before_the_next_segment(tmp_path: Path) -> None:
    """A segment's last token has been read when the segment has, and the next one's first has not."""
    row = asked(1)
    tok = tokenizer("byte-bpe")
    ids = tok(row["document"], add_special_tokens=False).input_ids
    ends = [len(tok.decode(ids[:n])) for n in (SEGMENT, SEGMENT + 1)]
    row["questions"] = [{"question": "Who?", "answer": "Mary", "at": at} for at in ends]
    (piece,) = source(write(tmp_path, row)).document(0, Stage(max_segments=1))
    assert [question.segment for question in piece.questions] == [0, 1]


def test_a_document_is_read_once_and_asked_on_forks(tmp_path: Path) -> None:
    """Loss and gradients are those of reading it by hand, with each answer after its question."""
    torch.manual_seed(0)
    model = memory_model("llama", "armt", segment_length=SEGMENT, vocab_size=320).float().train()
    made = source(write(tmp_path, asked(1)))
    run = MemLMTrainer(model, arguments(tmp_path / "out"), train_dataset=stream(made))
    batch = next(iter(run.get_train_dataloader()))
    loss = run.training_step(run.model, {k: v for k, v in batch.items() if k != "cursor"})
    found = gradients(model)
    model.zero_grad()
    (piece,) = made.document(0, Stage(max_segments=1))
    answered, state = [], None
    segments = list(cut(torch.tensor(piece.ids)[None], None, None, SEGMENT))
    for number, segment in enumerate(segments):
        state = model(segment.ids, memory_state=state, logits_to_keep=None).memory_state
        for question in piece.questions:
            if question.segment == number:
                ids = torch.tensor(question.ids)[None]
                logits = model(ids, memory_state=state, write=False).logits[0]
                answers = range(len(question.ids) - question.answer, len(question.ids))
                answered += [-logits[at - 1].log_softmax(-1)[ids[0, at]] for at in answers]
    expected = torch.stack(answered).mean()
    expected.backward()
    # Both rows of the batch are the only document there is.
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_piece_goes_on_until_it_has_something_to_learn(tmp_path: Path) -> None:
    row = {"prompt": TEXT * 4, "completion": " Mary." * 20}
    made = source(write(tmp_path, row))
    ids, labels = made.encoder.encode(made.rows[0])
    pieces = list(made.document(0, Stage(max_segments=2, min_segments=2)))
    assert not made.single_piece([Stage(max_segments=2)])
    assert len(pieces) > 2 and len(pieces[0].ids) > 2 * SEGMENT
    assert np.array_equal(np.concatenate([piece.ids for piece in pieces]), ids)
    targets = np.concatenate([piece.targets for piece in pieces])
    assert np.array_equal(targets[:-1], labels[1:]) and targets[-1] == IGNORE
    assert all((piece.targets != IGNORE).any() for piece in pieces)


@pytest.mark.parametrize("kind", ["document", "text"])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_resumed_stream_goes_on_with_the_very_next_batch(
    kind: str, form: str, tmp_path: Path
) -> None:
    """Over the end of an epoch, documents of several pieces included."""
    rows = [asked(n, times=1 + n % 3) for n in range(5)]
    if kind == "text":
        rows = [{"text": row["document"]} for row in rows]
    path = write(tmp_path, *rows) if form == "jsonl" else parquet(tmp_path, rows)

    def batches(position: Any = None) -> Any:
        made = stream(source(path, seed=3), Stage(max_segments=2))
        made.deal(batch_size=2, accumulation=1, rank=0, world=1)
        if position is not None:
            made.load_state_dict(json.loads(json.dumps(position)))
        return made, iter(made)

    whole, every = batches()
    found = []
    for _ in range(9):
        found.append(next(every))
        whole.consumed(found[-1]["cursor"])
        if len(found) == 4:
            position = whole.state_dict()
    _, rest = batches(position)
    for expected in found[4:]:
        batch = next(rest)
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert len({str(batch["input_ids"].tolist()) for batch in found}) > 4


def test_every_epoch_has_all_rows_in_another_order(tmp_path: Path) -> None:
    rows = [{"text": f"Number {n}."} for n in range(12)]
    for path in (write(tmp_path, *rows), parquet(tmp_path, rows)):
        made = source(path)
        decode = made.encoder.tokenizer.decode
        order = [decode(next(iter(made.document(n, Stage(max_segments=4)))).ids) for n in range(24)]
        assert sorted(order[:12]) == sorted(order[12:]) == sorted({*order})
        assert order[:12] != order[12:]


def test_a_survey_counts_and_refuses_what_cannot_be_learned(tmp_path: Path) -> None:
    made = source(write(tmp_path, asked(1), asked(2, times=5)))
    survey = made.survey()
    lengths = [len(next(made.document(n, Stage(max_segments=1))).ids) for n in range(2)]
    assert sorted(survey.lengths) == sorted(lengths) and survey.questions == 4
    assert survey.exact and survey.whole and survey.pieces(Stage(max_segments=1)) == 2
    texts = source(write(tmp_path, {"text": TEXT}, {"text": TEXT * 5}, name="texts.jsonl")).survey()
    assert texts.pieces(Stage(max_segments=1)) == sum(-(-texts.lengths // SEGMENT))
    long = asked(1)
    long["questions"][1]["question"] = TEXT
    with pytest.raises(
        ValueError, match=r"line 2: the question 'Mary .* more than a segment of 16"
    ):
        source(write(tmp_path, asked(1), long)).survey()


@pytest.mark.parametrize("anchor", ["end", "start"])
@pytest.mark.parametrize("kind", ["asked", "completion", "chat", "text"])
def test_a_survey_counts_the_pieces_and_windows_there_are(
    tmp_path: Path, kind: str, anchor: Any
) -> None:
    """An epoch is then every row once: also of rows in which little is learned, at their end."""
    rows: list[dict[str, Any]] = []
    for number, times in enumerate((1, 4, 9, 2)):
        text = f"{number}. {TEXT * times}"
        if kind == "asked":
            rows.append(asked(number, times + 2))
        elif kind == "completion":
            rows.append({"prompt": text, "completion": " kitchen"})
        elif kind == "chat":
            said = {"role": "user", "content": text}
            rows.append({"messages": [said, {"role": "assistant", "content": "Yes."}] * 2})
        else:
            rows.append({"text": text})
    made = source(write(tmp_path, *rows))
    if kind == "chat":
        made.encoder.tokenizer.chat_template = TEMPLATE
    survey = made.survey()
    for stage in (Stage(max_segments=1), Stage(min_segments=3, max_segments=3)):
        found = sum(len(list(made.document(n, stage))) for n in range(len(rows)))
        assert survey.pieces(stage) == found
        windows = Windows(made, 1, SEGMENT, anchor)
        found = sum(len(list(windows.document(n, stage))) for n in range(len(rows)))
        assert survey.pieces(stage, 1, anchor) == found
    if kind == "asked":
        windows = Windows(made, 2, SEGMENT, anchor)
        found = sum(len(list(windows.document(n, stage))) for n in range(len(rows)))
        assert survey.pieces(stage, 2, anchor) == found > len(rows)
    # One completion has a border inside.
    assert kind != "completion" or survey.pieces(Stage(max_segments=1)) == len(rows) + 1


def test_epochs_are_counted_where_no_steps_are_asked_for(tmp_path: Path) -> None:
    """As transformers reads max_steps=-1; a step is a window where the arguments make it one."""
    survey = source(write(tmp_path, *(asked(n, 5) for n in range(4)))).survey()
    given = {"num_train_epochs": 3, "per_device_train_batch_size": 2, "use_cpu": True}
    given["gradient_accumulation_steps"] = 1

    def steps(**training: Any) -> int:
        recipe = Recipe.for_data("base", "somebody/rows", overrides=[])
        recipe = replace(recipe, training={**given, **training})
        return make_arguments(
            recipe, tmp_path, Curriculum([Stage(max_segments=2)]), survey
        ).max_steps

    assert steps() == steps(max_steps=-1) == steps(max_steps=0) == 6
    windows = survey.pieces(Stage(max_segments=2), 1)
    assert windows > 4
    assert steps(window_step="window", bptt_depth=1) == -(-3 * windows // 2)
    assert steps(max_steps=5, eval_strategy=False, save_strategy=False) == 5
