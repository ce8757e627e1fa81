"""Rows of every format and kind of file, and what is said of those that are none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memlm.data import (
    CompletionRow,
    DocumentRow,
    MessagesRow,
    TextRow,
    TokensRow,
    make_row,
    open_rows,
)
from memlm.data.order import ShuffledRows

pytestmark = pytest.mark.usefixtures("no_waiting")
ASKED = {
    "document": "Mary left. John came.",
    "questions": [{"question": "Who left?", "answer": "Mary", "at": 10}],
}
TURNS = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
ROWS: dict[str, tuple[dict[str, Any], type]] = {
    "text": ({"text": "The sky is blue."}, TextRow),
    "messages": ({"messages": TURNS}, MessagesRow),
    "prompt": ({"prompt": "The sky is", "completion": " blue."}, CompletionRow),
    "input_ids": ({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, TokensRow),
    "document": (ASKED, DocumentRow),
    "question": (
        {"document": "Mary left. John came.", "question": "Who left?", "answer": "Mary", "at": 10},
        DocumentRow,
    ),
    "documents": ({"documents": [{"document": "Once."}, ASKED]}, DocumentRow),
}


def write(folder: Path, *rows: Any, name: str = "my.jsonl") -> Path:
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def parquet(folder: Path, rows: list[dict[str, Any]], name: str = "my.parquet") -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    return folder / name


@pytest.mark.parametrize("form", ROWS)
def test_a_format_is_known_by_its_columns_in_every_kind_of_file(form: str, tmp_path: Path) -> None:
    values, kind = ROWS[form]
    lines = open_rows(write(tmp_path, values, "", values))
    array = tmp_path / "array.json"
    array.write_text(json.dumps([values, values]), encoding="utf-8")
    table = open_rows(parquet(tmp_path, [values, values], "MY.PARQUET"))
    for rows in (lines, open_rows(array), table):
        assert rows.format.name == form
        assert rows.format.asks == (kind is DocumentRow)
        assert [type(row) for row in rows] == [kind, kind]
    assert len(lines) == 2 and table.size == 2
    assert lines[1].where.endswith("my.jsonl' line 3")
    expected, _ = make_row(values, lines[1].where)
    assert lines[1] == expected


def test_columns_of_two_formats_are_told_apart_as_trl_does() -> None:
    """trl looks for tokens, then a prompt with its completion, then messages, then text."""
    every = {name: value for values, _ in ROWS.values() for name, value in values.items()}
    order = []
    while every:
        _, form = make_row(every, "row 0")
        order.append(form.name)
        done = {*form.columns, *{"input_ids": ["labels"], "question": ["at"]}.get(form.name, [])}
        if form.name == "document":
            # Rows with one question have one, too.
            done.remove("document")
        every = {name: value for name, value in every.items() if name not in done}
    assert order == [
        *("documents", "document", "input_ids", "prompt", "messages", "text", "question")
    ]


def test_a_text_file_or_folder_is_rows_of_text(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "b.txt").write_text("Second.", encoding="utf-8")
    (tmp_path / "inner" / "a.md").write_text("First.", encoding="utf-8")
    (tmp_path / ".hidden").write_text("", encoding="utf-8")
    assert {row.text for row in open_rows(tmp_path)} == {"First.", "Second."}
    assert [row.text for row in open_rows(tmp_path / "b.txt")] == ["Second."]


def test_questions_are_asked_in_the_order_of_reading() -> None:
    first = {
        "document": "abcd",
        "questions": [
            {"question": "q2", "answer": "a"},
            {"question": "q1", "answer": "a", "at": 2},
        ],
    }
    second = {"document": "efg", "questions": [{"question": "q3", "answer": "a", "at": 1}]}
    row, _ = make_row({"documents": [first, second]}, "row 0")
    assert isinstance(row, DocumentRow)
    assert row.text == "abcd\n\nefg"
    assert [(at, question.question) for at, question in row.asked] == [
        (2, "q1"),
        (4, "q2"),
        (7, "q3"),
    ]


def test_padding_is_not_read() -> None:
    row, _ = make_row(
        {"input_ids": [0, 5, 6, 7], "labels": [0, 5, -100, 7], "attention_mask": [0, 1, 1, 1]}, ""
    )
    assert row == TokensRow((5, 6, 7), (5, -100, 7))


GOOD = json.dumps({"text": "Good."})
QUESTION = {"question": "Who?", "answer": "Mary"}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ('{"text": "cut sho', r"my\.jsonl' line 3 is not JSON .*cut short"),
        ("[1]", "line 3 is a list, not an object"),
        (
            {"txt": "x"},
            "line 3 has the columns 'txt', and what is expected is missing; give \"text\"",
        ),
        ({"text": None}, "what is expected is empty"),
        ({"text": " "}, "line 3: text is empty"),
        ({"text": 5}, "line 3: text is a number; give text"),
        (
            {"messages": TURNS},
            "line 3 has the columns of 'messages', the rows before those of 'text'",
        ),
    ],
)
def test_a_bad_line_is_named_before_any_is_used(bad: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        open_rows(write(tmp_path, GOOD, "", bad))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (
            {"prompt": "x"},
            'has the columns \'prompt\', .* is missing; give .*"prompt" and "completion"',
        ),
        ({"prompt": "x", "completion": TURNS}, "one of prompt and completion is text"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has no content"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] has no role"),
        ({"messages": TURNS[:1]}, "no turn of the role 'assistant'"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries, input_ids 2"),
        ({"input_ids": [1, 2], "labels": [1, -100]}, "nothing to predict"),
        ({"input_ids": [1, 2.5]}, r"input_ids\[1\]=2.5 is no token"),
        ({"document": "x", "questions": []}, "questions is empty"),
        ({"document": "x", "questions": [{"question": "y"}]}, r"questions\[0\] has no 'answer'"),
        ({"document": "x", "questions": [{**QUESTION, "answer": ""}]}, r"\[0\]: answer is empty"),
        ({"document": "x", "questions": [{**QUESTION, "at": 2}]}, r"at=2 .* 1 characters"),
        ({"document": "x", "questions": [{**QUESTION, "at": 0}]}, "at=0 is no place"),
        ({"document": "x", "questions": "y"}, "questions is text; give a list"),
        ({"documents": []}, "documents is empty"),
        ({"documents": [{"document": "x"}]}, "no document has a question"),
        ({"documents": ["x"]}, r"documents\[0\] is text"),
    ],
)
def test_a_row_that_cannot_be_learned_from_is_refused(bad: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        open_rows(write(tmp_path, bad))


def test_files_that_hold_no_rows_are_refused(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet", "a.txt"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=f"{name}' is empty"):
            open_rows(tmp_path / name)
    with pytest.raises(ValueError, match="files of different kinds"):
        open_rows(tmp_path)
    (tmp_path / "half.parquet").write_bytes(parquet(tmp_path, [{"text": "x"}]).read_bytes()[:50])
    with pytest.raises(ValueError, match=r"half\.parquet' cannot be read"):
        open_rows(tmp_path / "half.parquet")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl' does not exist"):
        open_rows("none.jsonl")


def test_a_table_s_row_is_named_by_its_number(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"my\.parquet' row 1 .* is empty"):
        open_rows(parquet(tmp_path, [{"text": "x"}, {"text": None}]))


def test_one_question_per_row(tmp_path: Path) -> None:
    """What a table has room for. Cells of a CSV file are text, a place in the document too."""
    document = "Mary left. John came."
    path = tmp_path / "asked.csv"
    path.write_text(
        f'document,question,answer,at\n"{document}",Who left?,Mary,10\n"{document}",Who came?,John,\n',
        encoding="utf-8",
    )
    first, second = open_rows(path)
    assert [(at, q.question, q.answer) for at, q in first.asked] == [(10, "Who left?", "Mary")]
    assert [(at, q.question, q.answer) for at, q in second.asked] == [(21, "Who came?", "John")]
    assert first == replace(make_row(ASKED, "")[0], where=first.where)
    both, form = make_row({**ASKED, "question": "Who came?", "answer": "John"}, "")
    assert form.name == "document" and len(both.asked) == 1
    for at in ("-1", "0", "22", "ten", 2.0, True):
        row = {"document": document, "question": "Who left?", "answer": "Mary", "at": at}
        with pytest.raises(ValueError, match="is no place in its document of 21 characters"):
            make_row(row, "row 0")


def test_cells_of_a_csv_file_are_what_is_written_there(tmp_path: Path) -> None:
    """Not numbers, and nothing missing where somebody answers NA."""
    said = ["12", "007", "NA", "None", "1.50", "True", "a, b\nc"]
    lines = [
        "\ufeff",
        "id,prompt,completion",
        *(f'{n},What?,"{text}"' for n, text in enumerate(said)),
    ]
    rows = open_rows(write(tmp_path, *lines, name="MY.CSV"))
    assert [row.completion for row in rows] == said


def test_a_data_set_of_the_hub_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    path, read = parquet(tmp_path, [{"body": f"Text {n}.", "id": n} for n in range(5)]), []
    load = datasets.load_dataset

    def from_hub(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        read.append((name, config, split, streaming))
        return load("parquet", data_files=str(path), split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    rows = open_rows("me/texts@small:body", split="validation")
    assert read == [("me/texts", "small", "validation", True)]
    assert rows.size is None and [row.text for row in rows] == [f"Text {n}." for n in range(5)]
    # How many there are is found when an epoch has been read.
    shuffled, again = ShuffledRows(rows, seed=1), ShuffledRows(rows, seed=1)
    order = [shuffled[n].text for n in range(15)]
    assert sorted(order[:5]) == sorted(order[5:10]) == sorted(order[10:])
    assert len({tuple(order[at : at + 5]) for at in (0, 5, 10)}) == 3
    # Forwards, back to an epoch before, and back within one.
    assert [again[n].text for n in (13, 3, 1)] == [order[n] for n in (13, 3, 1)]
    with pytest.raises(ValueError, match=r"me/texts' row 0 has no column 'txt'.*body, id"):
        open_rows("hub:me/texts:txt")
    with pytest.raises(ValueError, match="split='test' is for data sets of the hub"):
        open_rows(path, split="test")


def test_a_stream_is_shuffled_anew_every_epoch_and_the_same_for_a_seed(tmp_path: Path) -> None:
    texts = [f"Number {n}." for n in range(40)]
    rows = open_rows(parquet(tmp_path, [{"text": text} for text in texts]))

    def epoch(number: int, seed: int) -> list[str]:
        return [row.text for row in rows.epoch(number, seed)]

    assert [row.text for row in rows] == texts
    orders = [epoch(0, 1), epoch(1, 1), epoch(0, 2)]
    assert all(sorted(order) == sorted(texts) for order in orders)
    assert len({tuple(order) for order in [texts, *orders]}) == 4
    assert epoch(1, 1) == orders[1]
