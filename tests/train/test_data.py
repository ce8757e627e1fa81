"""Batches and streams: padding, who reads what, and where a resumed stream goes on."""

from __future__ import annotations

import pickle
import re
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from memlm.segment import IGNORE
from memlm.tasks import babi, babilong
from memlm.tasks.haystack import Document, TokenHaystack, read_documents
from memlm.train import (
    BabilongOptions,
    BabilongSource,
    Collator,
    DocumentSource,
    Piece,
    PieceSource,
    Question,
    Stage,
    TrainingStream,
)
from memlm.train.data import Windows, shifted
from memlm.train.documents import DatasetTexts, TextFiles, open_texts
from tests.tokenizers import tokenizer
from tests.train.tiny import Endless, answer_piece, ids, stream, text_piece

LENGTH = 64


@pytest.fixture(scope="module")
def haystack() -> TokenHaystack:
    sentences = [f"Sentence number {n} says nothing about anyone at all." for n in range(40)]
    return TokenHaystack([Document("given", sentences)], tokenizer("byte-bpe"), "given")


def deal(made: TrainingStream, **values: int) -> TrainingStream:
    defaults = {"batch_size": 2, "accumulation": 1, "rank": 0, "world": 1}
    made.deal(**{**defaults, **values})
    return made


def numbers(batch: dict[str, Any]) -> list[int]:
    return batch["cursor"][:, 0].tolist()


def same(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    if mine.keys() != theirs.keys():
        return False
    return all(torch.equal(torch.as_tensor(mine[k]), torch.as_tensor(theirs[k])) for k in mine)


# Batches.


def test_rows_are_padded_on_the_right_with_their_targets() -> None:
    batch = Collator(9)([Piece(np.array([5, 6, 7]), np.array([6, 7, -100])), Piece(np.array([8]))])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["shift_labels"].tolist() == [[6, 7, -100], [-100] * 3]


def test_a_mapping_without_labels_is_text_to_model() -> None:
    batch = Collator()([{"input_ids": [5, 6, 7]}, {"input_ids": [4, 8], "labels": [-100, 8]}])
    assert batch["shift_labels"].tolist() == [[6, 7, -100], [8, -100, -100]]


def test_questions_are_targets_in_their_answers_alone() -> None:
    question = Question(1, np.array([4, 5, 6, 7]), 2)
    batch = Collator()([text_piece(9), Piece(ids(9), questions=(question,))])
    assert batch["question_at"].tolist() == [[1, 1]]
    assert batch["question_labels"].tolist() == [[IGNORE, IGNORE, 6, 7]]


def test_an_empty_document_is_refused_in_a_batch() -> None:
    with pytest.raises(ValueError, match="sample 1 of the batch holds no token"):
        Collator()([text_piece(3), Piece(np.array([], dtype=np.int64))])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a page"}, "holds text, but no input_ids; tokenize its text first"),
        ({}, "holds nothing, but no input_ids"),
        ({"input_ids": [4, 5, 6], "labels": [5, 6]}, r"labels of shape \(2,\), but input_ids of"),
        ({"input_ids": [4, 5], "attention_mask": [1, 1, 0]}, "attention_mask of shape"),
    ],
)
def test_rows_that_are_not_tokens_are_refused(row, message) -> None:
    with pytest.raises(ValueError, match=message):
        Collator()([row])


# Streams.


@pytest.mark.parametrize("world", [1, 3])
def test_processes_read_no_document_twice(world: int) -> None:
    read: list[int] = []
    for rank in range(world):
        made = deal(stream(Endless(pieces=1)), rank=rank, world=world)
        read += [n for batch in islice(made, 6) for n in numbers(batch)]
    assert sorted(read) == list(range(12 * world))


@pytest.mark.parametrize("world", [1, 2])
def test_rows_that_read_on_read_no_document_twice(world: int) -> None:
    opened: list[int] = []
    for rank in range(world):
        made = deal(stream(Endless(pieces=3)), rank=rank, world=world, accumulation=2)
        for batch in islice(made, 8):
            opened += [
                n for n, on in zip(numbers(batch), batch["continued"], strict=True) if not on
            ]
    assert len(opened) == len(set(opened))
    assert {n % world for n in opened} == set(range(world))


def test_workers_share_the_documents_in_the_order_of_one() -> None:
    alone = list(islice(deal(stream(Endless(pieces=1))), 7))
    loader = DataLoader(deal(stream(Endless(pieces=1))), batch_size=None, num_workers=2)
    shared = list(islice(loader, 7))
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))


def test_a_stage_reaches_workers_that_are_running() -> None:
    made = deal(
        stream(
            Endless(pieces=1),
            Stage(max_segments=1, advance_at=0.5),
            Stage(min_segments=4, max_segments=4),
            score_window=1,
            lookahead=4,
        )
    )
    lengths = []
    loader = DataLoader(made, batch_size=None, num_workers=2, prefetch_factor=2)
    for step, batch in enumerate(islice(loader, 9)):
        lengths.append(batch["input_ids"].shape[1] // 6)
        made.curriculum.record(step, 1, 1)
    assert lengths == [1] * 5 + [4] * 4


@pytest.mark.parametrize("layout", ["story", "aligned", "flowing"])
def test_sources_that_were_used_pickle(layout: Any, haystack: TokenHaystack) -> None:
    options = BabilongOptions(layout=layout, retrieval=int(layout == "story"))
    rows = DatasetTexts([{"text": "Mary went to the office."}, {"text": "John left."}])
    tok = tokenizer("byte-bpe")
    for source in (
        BabilongSource(haystack, LENGTH, options),
        DocumentSource(rows, tok, LENGTH),
        DocumentSource([("a", "Mary went to the office.")], tok, LENGTH),
        PieceSource([text_piece(9)]),
        Windows(BabilongSource(haystack, LENGTH, options), 2, LENGTH),
    ):
        made = deal(stream(source, Stage(min_segments=6, max_segments=6)))
        expected = next(iter(made))
        again = pickle.loads(pickle.dumps(made))
        assert same(next(iter(again)), expected)


def test_questions_and_answers_are_those_of_an_evaluation(haystack: TokenHaystack) -> None:
    template = "\nQuestion:{question}"
    source = BabilongSource(haystack, LENGTH, BabilongOptions(question_template=template))
    tok = haystack.tokenizer
    for text in ("Where is Mary?", "Is John here?"):
        wanted = babilong.encode_question(tok, text, template).tolist()
        assert source.prompt(text).tolist() == wanted
        assert source.answer(text).tolist() == babilong.encode_answer(tok, text).tolist()


@pytest.mark.slow
def test_workers_may_be_spawned(haystack: TokenHaystack) -> None:
    stages = [Stage(min_segments=6, max_segments=6)]
    source = BabilongSource(haystack, LENGTH)
    alone = list(islice(deal(stream(source, *stages)), 3))
    loader = DataLoader(
        deal(stream(source, *stages)),
        batch_size=None,
        num_workers=1,
        multiprocessing_context="spawn",
        timeout=120,
    )
    batches = iter(loader)
    try:
        assert all(same(next(batches), batch) for batch in alone)
    finally:
        batches._shutdown_workers()  # type: ignore[attr-defined]


def test_several_workers_cannot_read_on() -> None:
    deal(stream(Endless(pieces=1))).check_workers(2)
    with pytest.raises(ValueError, match="use 0 or 1"):
        deal(stream(Endless(pieces=3))).check_workers(2)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_stream_goes_on_with_the_next_batch(pieces: int, accumulation: int) -> None:
    stages = Stage(max_segments=2, steps=4), Stage(min_segments=2, max_segments=3)

    def made() -> TrainingStream:
        return deal(stream(Endless(pieces), *stages), accumulation=accumulation)

    whole = list(islice(made(), 14))
    for stop in (1, 2, 7, 8, 9, 10):
        first, second = made(), made()
        for batch in islice(first, stop):
            first.consumed(batch["cursor"])
        second.load_state_dict(first.state_dict())
        rest = list(islice(second, 14 - stop))
        for slot, (mine, theirs) in enumerate(zip(rest, whole[stop:], strict=True)):
            assert same(mine, theirs), (stop, slot)


def test_a_stream_is_not_resumed_with_other_batches() -> None:
    saved = deal(stream(Endless())).state_dict()
    with pytest.raises(ValueError, match="batch_size=2, this run 3"):
        deal(stream(Endless()), batch_size=3).load_state_dict(saved)


def test_a_new_stage_begins_with_new_documents() -> None:
    stages = Stage(max_segments=1, steps=2), Stage(max_segments=1)
    batches = list(islice(deal(stream(Endless(pieces=9), *stages)), 3))
    assert batches[1]["continued"].any()
    assert not batches[2]["continued"].any()


def test_epochs_of_given_documents_differ_in_order_alone() -> None:
    source = PieceSource([text_piece(3, n) for n in range(5)])
    stage = Stage(max_segments=1)
    read = [tuple(next(source.document(n, stage)).ids) for n in range(10)]
    assert read[:5] != read[5:]
    assert sorted(read[:5]) == sorted(read[5:])


def test_windows_end_in_targets_and_lose_none() -> None:
    piece = answer_piece(27)
    targets = piece.targets.copy()
    targets[8] = 5
    source = PieceSource([Piece(piece.ids, targets, (Question(2, ids(3), 1),))])
    windows = list(Windows(source, 1, 6).document(0, Stage(max_segments=1)))
    assert [len(w.ids) for w in windows] == [12, 6, 9]
    assert [[q.segment for q in w.questions] for w in windows] == [[], [0], []]
    assert np.array_equal(np.concatenate([w.targets for w in windows]), targets)


# BABILong.


def source_of(haystack: TokenHaystack, **options: Any) -> BabilongSource:
    return BabilongSource(haystack, LENGTH, BabilongOptions(**options), seed=3)


# The check below reads facts by their words alone, which is enough for these.
@pytest.mark.parametrize("task", ["qa1", "qa2", "qa3", "qa4", "qa5", "qa8", "qa12", "qa14"])
def test_a_story_fills_its_segments_and_its_answer_is_true(
    haystack: TokenHaystack, task: str
) -> None:
    source = source_of(haystack, tasks=(task,), questions=2, max_facts=14)
    stage = Stage(min_segments=4, max_segments=6)
    lengths = set()
    for number in range(15):
        (piece,) = source.document(number, stage)
        lengths.add(len(piece.ids))
        aimed = np.flatnonzero(piece.targets != IGNORE) + 1
        assert aimed[-1] == len(piece.ids) - 1
        assert piece.ids[-1] == haystack.tokenizer.eos_token_id
        assert np.array_equal(piece.ids[aimed], piece.targets[aimed - 1])
        check_answers(haystack, piece)
    assert lengths == {4 * LENGTH, 5 * LENGTH, 6 * LENGTH}


@pytest.mark.parametrize("task", babi.TASKS)
def test_every_task_can_be_trained_on(haystack: TokenHaystack, task: str) -> None:
    source = source_of(haystack, tasks=(task,))
    stage = Stage(min_segments=6, max_segments=6)
    answers = set()
    for number in range(12):
        (piece,) = source.document(number, stage)
        aimed = piece.targets[piece.targets != IGNORE]
        assert aimed[-1] == haystack.tokenizer.eos_token_id
        answers.add(haystack.tokenizer.decode(aimed[:-1]).strip())
    assert len(answers) > 1
    for story in islice(babi.generate(task, 0), 5000):
        answers.discard(story.answer)
        if not answers:
            break
    assert not answers


def check_answers(haystack: TokenHaystack, piece: Piece) -> None:
    """Read the document as text, and let the symbolic solver answer its questions."""
    text = haystack.tokenizer.decode(piece.ids)
    start = min(at for at in (text.find(f" {w} ") for w in ("Where", "What", "Who")) if at >= 0)
    context, end = text[:start], haystack.tokenizer.eos_token
    asked = [part for part in text[start:].split(end) if part.strip()]
    # A second question is asked when the facts answer one.
    assert len(asked) in (1, 2)
    facts = facts_in(context)
    for part in asked:
        question, answer = part.split("?")
        assert babi.solve(facts, question.strip() + "?") == answer.strip()


def facts_in(text: str) -> list[str]:
    """The sentences of `text` the solver can read, in order."""
    facts = []
    for word in text.replace("Sentence", "|Sentence").split("|"):
        for sentence in word.split("."):
            for start in range(len(sentence)):
                if readable(sentence[start:].strip()):
                    facts.append(sentence[start:].strip() + ".")
                    break
    return facts


def readable(sentence: str) -> bool:
    for question in ("Where is Mary?", "What is north of the office?"):
        try:
            babi.solve([sentence], question)
        except ValueError as error:
            if "parse the fact" in str(error):
                continue
        return True
    return False


@pytest.mark.parametrize("task", ["qa1", "qa3", "qa4", "qa5"])
@pytest.mark.parametrize("layout", ["aligned", "flowing"])
def test_questions_behind_segments_are_answered_by_what_was_read(
    haystack: TokenHaystack, layout: str, task: str
) -> None:
    source = source_of(
        haystack,
        tasks=(task,),
        lessons=("qa1", "qa2") if task in ("qa3", "qa5") else (),
        layout=layout,
        questions=3,
        end_probability=0.3,
        gap_tokens=(8, 40),
        no_gap=0.5,
    )
    stage = Stage(min_segments=2, max_segments=3)
    checked = 0
    for number in range(6):
        read = np.array([], dtype=np.int64)
        for piece in islice(source.document(number, stage), 4):
            assert piece.targets is None and len(piece.ids) % LENGTH == 0
            for question in piece.questions:
                end = (question.segment + 1) * LENGTH
                text = haystack.tokenizer.decode(np.concatenate([read, piece.ids[:end]]))
                asked, answer = haystack.tokenizer.decode(question.ids[:-1]).split("?")
                # A border may cut the last fact, which then nobody knows yet.
                whole = facts_in(text[: text.rfind(".") + 1])
                assert babi.solve(whole, asked.strip() + "?") == answer.strip()
                checked += 1
            read = np.concatenate([read, piece.ids])
    assert checked > 20


def test_lessons_are_asked_beside_a_task(haystack: TokenHaystack) -> None:
    source = source_of(
        haystack,
        tasks=("qa2",),
        lessons=("handler", "before"),
        layout="aligned",
        facts_per_segment=(2,),
        questions=3,
    )
    asked = [
        haystack.tokenizer.decode(question.ids)
        for number in range(10)
        for piece in source.document(number, Stage(min_segments=6, max_segments=6))
        for question in piece.questions
    ]
    for start in (" Where is the ", " Who had the ", " Where was "):
        assert sum(text.startswith(start) for text in asked) > 10
    # Once both people were told of, the task's own questions take all places but one.
    (piece,) = source_of(
        haystack,
        lessons=("before",),
        layout="aligned",
        facts_per_segment=(3,),
        questions=3,
    ).document(0, Stage(min_segments=9, max_segments=9))
    last = [q for q in piece.questions if q.segment >= 6]
    starts = [haystack.tokenizer.decode(q.ids).split()[1] for q in last]
    assert starts == ["is", "is", "was"] * 3


def test_a_lesson_named_again_is_asked_more_often(haystack: TokenHaystack) -> None:
    def shares(*lessons: str) -> float:
        source = source_of(
            haystack,
            tasks=("qa2",),
            lessons=lessons,
            layout="aligned",
            facts_per_segment=(1,),
            questions=2,
        )
        asked = [
            haystack.tokenizer.decode(question.ids)
            for number in range(12)
            for piece in source.document(number, Stage(min_segments=40, max_segments=40))
            # By then there are both kinds to ask.
            for question in piece.questions
            if question.segment >= 20
        ]
        found = [text.startswith(" Who had") for text in asked if " Where is the" not in text]
        return sum(found) / len(found)

    assert 0.4 < shares("handler", "before") < 0.6
    assert 0.65 < shares("handler", "before", "handler", "handler") < 0.85


def test_lessons_that_nothing_tells_are_refused() -> None:
    with pytest.raises(ValueError, match="'handler', which no story of tasks"):
        BabilongOptions(layout="aligned", lessons=("handler",))
    with pytest.raises(ValueError, match="'owner', which is neither a lesson nor a task"):
        BabilongOptions(layout="aligned", lessons=("handler", "owner"))


def test_questions_are_put_as_the_template_says(haystack: TokenHaystack) -> None:
    source = source_of(haystack, question_template="\nAsked: {question} Say:")
    (piece,) = source.document(0, Stage(max_segments=3))
    text = haystack.tokenizer.decode(piece.ids)
    assert re.search(r"\nAsked: Where is \w+\? Say: \w+<eos>$", text)


@pytest.mark.parametrize("layout", ["aligned", "flowing"])
def test_segments_that_tell_nothing_are_known(haystack: TokenHaystack, layout: str) -> None:
    how: dict[str, Any] = {"layout": layout, "facts_per_segment": (0, 1), "gap_tokens": (40, 80)}
    stage = Stage(min_segments=12, max_segments=12)
    (plain,) = islice(source_of(haystack, **how).document(0, stage), 1)
    (piece,) = islice(source_of(haystack, **how, price_facts=False).document(0, stage), 1)
    assert plain.silent == () and np.array_equal(plain.ids, piece.ids)
    texts = [haystack.tokenizer.decode(ids) for ids in np.split(piece.ids, 12)]
    people = re.compile(r"(?: |^)(?:Daniel|John|Mary|Sandra) ")
    told = [bool(people.search(text)) for text in texts]
    assert 0 < sum(piece.silent) < 12 and len(piece.silent) == 12
    # A border may leave the end of a fact alone in a segment.
    assert not any(silent and fact for silent, fact in zip(piece.silent, told, strict=True))
    if layout == "aligned":
        assert [not fact for fact in told] == list(piece.silent)
    batch = Collator()([plain, piece])
    assert batch["auxiliary_mask"][0].all()
    assert batch["auxiliary_mask"][1].tolist() == list(piece.silent)
    assert "auxiliary_mask" not in Collator()([plain])


@pytest.mark.parametrize("layout", ["aligned", "flowing"])
def test_facts_may_begin_a_line(haystack: TokenHaystack, layout: str) -> None:
    how = {"layout": layout, "facts_per_segment": (2,), "no_gap": 1.0}
    stage, begun = Stage(min_segments=8, max_segments=8), {}
    for share in (0.0, 0.5, 1.0):
        piece = next(source_of(haystack, **how, line_breaks=share).document(0, stage))
        text = haystack.tokenizer.decode(piece.ids)
        facts = re.findall(r"(.)(?:Daniel|John|Mary|Sandra) \w+[^.]* the \w+\.", text, re.DOTALL)
        assert len(facts) > 8
        begun[share] = facts.count("\n") / len(facts)
    assert begun[0.0] == 0 < begun[0.5] < begun[1.0] == 1
    with pytest.raises(ValueError, match=r"line_breaks=1\.5"):
        BabilongOptions(layout=layout, line_breaks=1.5)  # type: ignore[arg-type]


def test_distinct_actors_take_turns(haystack: TokenHaystack) -> None:
    source = source_of(haystack, layout="aligned", facts_per_segment=(2,), distinct_actors=True)
    (piece,) = source.document(0, Stage(min_segments=4, max_segments=4))
    told = [fact.split()[0] for fact in facts_in(haystack.tokenizer.decode(piece.ids))]
    assert len(told) == 8
    assert len(set(told[:4])) == len(set(told[4:])) == 4


def test_a_document_is_a_function_of_its_number(haystack: TokenHaystack) -> None:
    stage = Stage(max_segments=3)
    for layout in ("story", "aligned", "flowing"):
        one, two = source_of(haystack, layout=layout), source_of(haystack, layout=layout)
        for number in (5, 2, 5):
            pieces = zip(one.document(number, stage), two.document(number, stage), strict=True)
            for mine, theirs in islice(pieces, 3):
                assert np.array_equal(mine.ids, theirs.ids)
                assert [q.ids.tolist() for q in mine.questions] == [
                    q.ids.tolist() for q in theirs.questions
                ]
        first, second = (next(one.document(n, stage)).ids for n in (1, 2))
        assert not np.array_equal(first, second)


def test_a_stage_may_change_the_data(haystack: TokenHaystack) -> None:
    source = source_of(haystack, layout="aligned", facts_per_segment=(1,))
    stage = Stage(max_segments=1, data={"segment_length": 16, "questions": 3})
    piece = next(source.document(0, stage))
    assert (len(piece.ids), piece.segment_length) == (16, 16)


def test_a_segment_too_short_for_a_story_is_refused(haystack: TokenHaystack) -> None:
    source = BabilongSource(haystack, 8, BabilongOptions())
    with pytest.raises(ValueError, match="segment_length=8 with 1 segments"):
        next(source.document(0, Stage(max_segments=1)))


# Plain documents.


def source_of_texts(texts: Any, **options: Any) -> DocumentSource:
    return DocumentSource(texts, tokenizer("byte-bpe"), 6, **options)


def test_a_long_document_is_read_on_and_loses_no_target() -> None:
    source = source_of_texts([("a", "Mary went to the kitchen. " * 5)])
    pieces = list(source.document(0, Stage(min_segments=2, max_segments=2)))
    assert len(pieces) > 1 and {len(p.ids) for p in pieces[:-1]} == {12}
    whole = np.concatenate([p.ids for p in pieces])
    assert np.array_equal(np.concatenate([p.targets for p in pieces]), shifted(whole))
    assert whole[-1] == source.tokenizer.eos_token_id


def test_documents_share_no_row() -> None:
    source = source_of_texts([("a", "Mary."), ("b", "John went to the hallway.")])
    made = deal(stream(source, Stage(max_segments=8)))
    batch = next(iter(made))
    rows = [
        row[mask == 1]
        for row, mask in zip(*(batch[k] for k in ("input_ids", "attention_mask")), strict=True)
    ]
    texts = {source.tokenizer.decode(row, skip_special_tokens=True) for row in rows}
    assert texts == {"Mary.", "John went to the hallway."}


def test_a_streamed_data_set_is_resumed_where_it_stood() -> None:
    rows = [{"text": f"Document {n} of many. " * (n % 3 + 1)} for n in range(9)]

    def made() -> TrainingStream:
        source = source_of_texts(DatasetTexts(iter_twice(rows)))
        return deal(stream(source, Stage(max_segments=2)))

    whole = list(islice(made(), 30))
    first, second = made(), made()
    for batch in islice(first, 13):
        first.consumed(batch["cursor"])
    second.load_state_dict(first.state_dict())
    assert all(same(a, b) for a, b in zip(islice(second, 17), whole[13:], strict=True))


def iter_twice(rows: list[dict[str, str]]) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows).to_iterable_dataset()


def test_empty_documents_are_refused_or_passed_over(tmp_path: Path) -> None:
    rows = DatasetTexts([{"text": "Mary."}, {"text": "  "}])
    stage = Stage(max_segments=1)
    with pytest.raises(ValueError, match="'row 1' is empty"):
        list(source_of_texts(rows).document(1, stage))
    assert list(source_of_texts(rows, skip_empty=True).document(1, stage))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty\.txt' is empty"):
        TextFiles(tmp_path)


@pytest.mark.parametrize("of", ["list", "folder", "folder listed as it is"])
def test_empty_documents_are_passed_over_in_every_kind_of_source(tmp_path: Path, of: str) -> None:
    told = {"a": "Mary.", "b": "", "c": " \n ", "d": "John.", "e": "\n"}
    for name, text in told.items():
        (tmp_path / name).write_text(text)
    texts: Any = list(told.items())
    if of == "folder":
        texts = open_texts(str(tmp_path), skip_empty=True)
    elif of != "list":
        (tmp_path / "b").unlink()
        (tmp_path / "b").write_text(" ")
        texts = TextFiles(tmp_path)
    source = source_of_texts(texts, skip_empty=True)
    for epoch in range(3):
        read = [
            source.tokenizer.decode(
                next(iter(source.document(2 * epoch + n, Stage(max_segments=1)))).ids
            )
            for n in range(2)
        ]
        assert sorted(text[:5] for text in read) == ["John.", "Mary."]
    with pytest.raises(ValueError, match="no document with text"):
        source_of_texts([("b", " ")], skip_empty=True)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "b").touch()
    with pytest.raises(ValueError, match="no document with text"):
        open_texts(str(tmp_path / "none"), skip_empty=True)


def test_a_haystack_s_held_out_part_is_no_training_text() -> None:
    texts = dict(open_texts("builtin"))
    held_out = {text.name: " ".join(text.sentences) for text in read_documents("builtin", "eval")}
    everything = {text.name for text in read_documents("builtin", "all")}
    assert texts.keys() | held_out.keys() == everything and len(texts) > 5 * len(held_out) > 0
    assert not texts.keys() & held_out.keys()
    assert dict(open_texts("builtin", split="eval")) == held_out
    # Sentences run on as text.
    assert all(text.strip() and "  " not in text[:200] for text in texts.values())


def test_a_hub_data_set_is_evaluated_on_a_split_that_is_not_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    splits = {part: [{"text": f"{part} text"}] for part in ("train", "test")}
    monkeypatch.setattr("memlm.train.documents.open_dataset", lambda *_: splits)
    assert [text for _, text in open_texts("hub:me/my")] == ["train text"]
    assert [text for _, text in open_texts("hub:me/my", split="eval")] == ["test text"]
    del splits["test"]
    with pytest.raises(ValueError, match="no split 'validation' or 'test' but train; name other"):
        open_texts("hub:me/my", split="eval")


def test_control_tokens_in_training_texts_are_text_unless_asked_otherwise() -> None:
    end = tokenizer("byte-bpe").eos_token_id
    for split, ends in ((True, 1), (False, 3)):
        source = source_of_texts([("a", "One <eos> two <eos>.")], split_special_tokens=split)
        ids = np.concatenate([p.ids for p in source.document(0, Stage(max_segments=99))])
        assert (ids == end).sum() == ends and ids[-1] == end
    assert source.tokenizer.decode(ids).count("<eos>") == 3


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone' does not exist"):
        TextFiles(tmp_path / "gone")
    (tmp_path / "noise.bin").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ValueError, match=r"noise\.bin' is not UTF-8"):
        TextFiles(tmp_path)[0]


# Recalled passages.


def test_what_a_question_recalls_stands_in_front_of_it_without_targets(
    haystack: TokenHaystack,
) -> None:
    options = {"retrieval": 3, "retrieval_size": 12, "recall_template": " See: {text}"}
    source = source_of(haystack, questions=2, **options)
    tokenizer, found = haystack.tokenizer, 0
    for number in range(8):
        (piece,) = source.document(number, Stage(min_segments=3, max_segments=3))
        # The document fills its segments; the questions stand behind it, in one of their own.
        assert len(piece.ids) == 3 * LENGTH and piece.targets is None
        document = facts_in(tokenizer.decode(piece.ids))
        for question in piece.questions:
            assert question.segment == 2
            reply = tokenizer.decode(question.ids[-question.answer :]).split(tokenizer.eos_token)[0]
            shown = tokenizer.decode(question.ids[: -question.answer])
            recalled, asked = shown[: shown.index("Where")], shown[shown.index("Where") :]
            assert recalled.count("See:") == 3
            last = next(fact for fact in reversed(document) if asked.split()[2][:-1] in fact)
            assert babi.solve(document, asked.strip()) == reply.strip()
            found += last in recalled
    assert found >= 12


def test_recalled_tokens_are_limited(haystack: TokenHaystack) -> None:
    stage = Stage(min_segments=3, max_segments=3)
    wide, narrow = (
        next(source_of(haystack, retrieval=4, retrieval_tokens=most).document(0, stage))
        for most in (192, 7)
    )
    for one, other in zip(wide.questions, narrow.questions, strict=True):
        assert len(other.ids) < len(one.ids) and np.array_equal(other.ids[:7], one.ids[:7])
        assert np.array_equal(other.ids[7:], one.ids[-len(other.ids[7:]) :])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retrieval": 2, "layout": "flowing"}, "needs layout='story'"),
        ({"retrieval": -1}, "retrieval=-1"),
        ({"retrieval_size": 0}, "retrieval_size=0"),
        ({"recall_template": "no place"}, "no place for the passage"),
    ],
)
def test_impossible_recall_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BabilongOptions(**options)
