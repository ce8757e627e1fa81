"""The published layout: read a row at a time, written so that others and a later call can go on."""

from __future__ import annotations

import itertools
import json
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from memlm.tasks import babi, babilong, published
from memlm.tasks.haystack import TokenHaystack
from memlm.tasks.published import reading, records, writing
from tests.tokenizers import tokenizer as other_tokenizer

RECORDS = [
    {"input": f"Text {n}.", "question": "Where is Mary?", "target": "office"} for n in range(3)
]


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "noise.txt"
    path.write_text(
        "\n\n".join(
            f"Paragraph {n} of a quiet book tells of rain, of bread, and of an old clock."
            for n in range(400)
        )
    )
    return str(path)


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = pytest.importorskip("datasets")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    monkeypatch.setattr(found.config, "HF_HUB_OFFLINE", True)
    found.disable_progress_bars()
    return found


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def put_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("path", ["data/qa1/4k.json", "qa1/4k.json", "data/qa1/4k.jsonl"])
def test_samples_are_loaded_from_json(tmp_path: Path, path: str) -> None:
    lines = path.endswith("l")
    text = "\n".join(map(json.dumps, RECORDS)) if lines else json.dumps(RECORDS)
    put(tmp_path / path, text)
    assert babilong.load(tmp_path, "qa1", "4k") == RECORDS
    assert list(babilong.iterate(tmp_path, "qa1", 4096, limit=2)) == RECORDS[:2]
    assert list(babilong.iterate(tmp_path, "qa1", 4096, limit=9)) == RECORDS


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("size", [1, 2, 7, 64, 1 << 16])
def test_json_is_read_alike_wherever_a_read_ends(
    size: int, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_READ_CHARACTERS", size)
    rows = [
        {
            "input": 'He said: "]},{[" \\ ' + "é日🙂\n" * n,
            "id": [n, {"a": -1.5e3, "b": None}],
            "question": "Wo \u2028 ist Mary?",
            "target": "\ud83d\ude42 true",
        }
        for n in range(6)
    ]
    wanted = [{key: row[key] for key in records.COLUMNS} for row in rows]
    for ascii in (True, False):
        if not ascii:
            rows = json.loads(json.dumps(rows))
            wanted = json.loads(json.dumps(wanted))
        text = json.dumps(rows, indent=indent, ensure_ascii=ascii)
        put(tmp_path / "qa1" / "4k.json", f" \n{text}\n ")
        assert babilong.load(tmp_path, "qa1", "4k") == json.loads(json.dumps(wanted))
    put(tmp_path / "qa2" / "4k.jsonl", "\n\n".join(json.dumps(row) for row in rows))
    assert babilong.load(tmp_path, "qa2", "4k") == json.loads(json.dumps(wanted))
    put(tmp_path / "qa3" / "4k.json", "\ufeff[ ]")
    assert babilong.load(tmp_path, "qa3", "4k") == []


def test_a_file_is_never_held_whole(tmp_path: Path) -> None:
    row = {"input": "word " * 100_000, "question": "Where?", "target": "here"}
    (tmp_path / "qa1").mkdir()
    with (tmp_path / "qa1" / "4k.json").open("w") as file:
        file.write("[" + ",".join([json.dumps(row)] * 40) + "]")
    put_parquet(tmp_path / "8k" / "qa1-00000-of-00001.parquet", [row] * 40)
    for length in ("4k", "8k"):
        tracemalloc.start()
        count = sum(len(record["input"]) for record in babilong.iterate(tmp_path, "qa1", length))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # 20 million characters in the file, half a million in a row.
        assert count == 20_000_000 and peak < 6_000_000, peak


def test_samples_are_loaded_from_parquet(tmp_path: Path) -> None:
    for number, rows in enumerate((RECORDS[:2], RECORDS[2:])):
        put_parquet(tmp_path / "4k" / f"qa1-0000{number}-of-00002.parquet", rows)
    assert babilong.load(str(tmp_path), "qa1", 4096) == RECORDS
    assert list(babilong.iterate(tmp_path, "qa1", "4k", limit=1)) == RECORDS[:1]


def test_samples_that_are_missing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither data/qa2/8k\.json nor 8k/qa2-"):
        babilong.load(tmp_path, "qa2", "8k")
    with pytest.raises(ValueError, match="does not exist"):
        babilong.load("./no-such-folder", "qa1", "4k")
    with pytest.raises(ValueError, match="is a file; name the folder"):
        babilong.load(put(tmp_path / "a.json", "[]"), "qa1", "4k")
    with pytest.raises(ValueError, match="unknown task 'qa21'"):
        babilong.iterate(tmp_path, "qa21", "4k")
    with pytest.raises(ValueError, match="limit=0 must be at least 1"):
        babilong.iterate(tmp_path, "qa1", "4k", limit=0)


GOOD = json.dumps(RECORDS[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{]", "row 0 of .*not JSON"),
        (f"[{GOOD}, {{]", "row 1 of .*not JSON"),
        (f"[{GOOD}", "row 1 of .*not JSON.*',' is expected, not 'the end'"),
        (f"[{GOOD},", "row 1 of .*an object is expected"),
        (f"[{GOOD}, ]", "row 1 of .*an object is expected"),
        (f"[{GOOD} {GOOD}]", "row 1 of .*',' is expected, not '{'"),
        (f"[{GOOD}] {GOOD}", "row 1 of .*'the end' is expected"),
        (f"{GOOD}\n{GOOD[:-3]}", "row 1 of .*not JSON"),
        ("", "row 0 of .*it is empty"),
        ("[1]", "row 0 of .*an object is expected, not '1'"),
        ('[{"input": "a\nb"}]', "row 0 of .*not JSON.*control character"),
        ('[{"input": "a", "question": "b"}]', r"row 0 of .*4k\.json.* lacks 'target'"),
        (f'[{GOOD}, {{"input": 3}}]', "row 1 of .*has input='3', a int"),
        ('[{"input": "a", "question": null}]', "row 0 of .*has question='None', a NoneType"),
    ],
)
def test_damaged_json_is_refused_by_file_and_row(tmp_path: Path, text: str, message: str) -> None:
    put(tmp_path / "qa1" / "4k.json", text)
    with pytest.raises(ValueError, match=message):
        babilong.load(tmp_path, "qa1", "4k")


def test_what_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "qa1").mkdir()
    (tmp_path / "qa1" / "4k.json").write_bytes(b'[{"input": "\xff"}]')
    with pytest.raises(ValueError, match=r"4k\.json' is not JSON"):
        babilong.load(tmp_path, "qa1", "4k")
    nested = "[" * 50
    put(tmp_path / "qa2" / "4k.json", f'[{{"input": {nested * 4000}')
    with pytest.raises(ValueError, match="not JSON"):
        babilong.load(tmp_path, "qa2", "4k")


def test_a_fault_is_told_before_the_rest_is_read(tmp_path: Path) -> None:
    rest = json.dumps({"input": "word " * 4_000_000})
    put(tmp_path / "qa1" / "4k.json", f'[{GOOD}, {{"input": oops}}, {rest}]')
    tracemalloc.start()
    with pytest.raises(ValueError, match="row 1 of"):
        babilong.load(tmp_path, "qa1", "4k")
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_damaged_parquet_is_refused_by_file_and_row(tmp_path: Path) -> None:
    name = "4k/qa1-00000-of-00001.parquet"
    put_parquet(tmp_path / name, [{"input": "a", "question": "b"}])
    with pytest.raises(ValueError, match=r"row 0 of .*parquet.* lacks 'target'"):
        babilong.load(tmp_path, "qa1", "4k")
    put_parquet(tmp_path / name, [{"input": "a", "question": "b", "target": 3}])
    with pytest.raises(ValueError, match=r"row 0 of .*has target='3', a int"):
        babilong.load(tmp_path, "qa1", "4k")
    put_parquet(tmp_path / name, RECORDS)
    data = (tmp_path / name).read_bytes()
    for text in (b"", b"PAR1", data[:-20], data[:40]):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(ValueError, match=r"row 0 of .*is not parquet"):
            babilong.load(tmp_path, "qa1", "4k")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_laid_out_like_the_hub_is_read_by_its_card(
    streaming: bool, tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_parquet(tmp_path / "set" / "shards" / "first.parquet", RECORDS[:2])
    put_parquet(tmp_path / "set" / "shards" / "second.parquet", RECORDS[2:])
    put(
        tmp_path / "set" / "README.md",
        "---\nconfigs:\n- config_name: 4k\n  data_files:\n  - split: qa1\n"
        "    path: shards/*.parquet\n---\n",
    )
    found = babilong.iterate(tmp_path / "set", "qa1", "4k", streaming=streaming)
    assert list(found) == RECORDS
    monkeypatch.chdir(tmp_path)
    # As if it were an id of the hub.
    rows = reading._hub_rows("set", "qa1", "4k", streaming)
    assert [reading._checked(*row) for row in rows] == RECORDS
    with pytest.raises(ValueError, match=r"qa2 4k cannot be loaded"):
        babilong.load(tmp_path / "set", "qa2", "4k")
    with pytest.raises(ValueError, match=r"qa1 8k cannot be loaded"):
        babilong.load(tmp_path / "set", "qa1", "8k")


def test_an_id_of_the_hub_is_asked_for_length_and_task(
    tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[Any] = []

    def answer(*given: Any, **named: Any) -> Iterator[dict[str, Any]]:
        asked.append((given, named))
        return iter([*RECORDS, {"input": "a", "question": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", answer)
    found = babilong.iterate("RMT-team/babilong", "qa3", 2**20)
    assert list(itertools.islice(found, 3)) == RECORDS
    assert asked == [(("RMT-team/babilong", "1M"), {"split": "qa3", "streaming": False})]
    with pytest.raises(ValueError, match="row 3 of 'RMT-team/babilong' 1M qa3 lacks 'target'"):
        next(found)


def test_written_samples_are_read_back_in_the_published_layout(tmp_path: Path, source: str) -> None:
    files = babilong.write(
        tmp_path / "out", ["qa1", "qa2"], ["0k", 300], samples=5, haystack=source, seed=3
    )
    assert [f.relative_to(tmp_path / "out").as_posix() for f in files] == [
        "data/qa1/0k.json",
        "data/qa1/300.json",
        "data/qa2/0k.json",
        "data/qa2/300.json",
    ]
    for task in ("qa1", "qa2"):
        for length, words in (("0k", 0), ("300", 300)):
            records = babilong.load(tmp_path / "out", task, length)
            assert len(records) == 5
            for record in records:
                assert "<word>" not in record["input"]
                pieces = re.findall(r"\w+|[^\w\s]+", record["input"])
                assert not words or len(pieces) == words
                facts = [s for s in re.split(r"(?<=\.) ", record["input"]) if " rain," not in s]
                if not words:
                    assert babi.solve(facts, record["question"]) == record["target"]
    again = babilong.write(
        tmp_path / "again", ["qa1"], ["0k", 300], samples=5, haystack=source, seed=3
    )
    assert again[1].read_bytes() == files[1].read_bytes()


def test_parquet_and_json_hold_the_same_records(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    given: Any = {"samples": 7, "haystack": source, "seed": 1}
    babilong.write(tmp_path / "j", ["qa1", "qa5"], [500], **given)
    monkeypatch.setattr(writing, "BATCH_CHARACTERS", 3000)
    files = babilong.write(tmp_path / "p", ["qa1", "qa5"], [500], format="parquet", **given)
    assert [f.relative_to(tmp_path / "p").as_posix() for f in files] == [
        "500/qa1-00000-of-00001.parquet",
        "500/qa5-00000-of-00001.parquet",
    ]
    for task in ("qa1", "qa5"):
        records = babilong.load(tmp_path / "j", task, 500)
        assert len(records) == 7 and records == babilong.load(tmp_path / "p", task, 500)
    with pytest.raises(ValueError, match=r"holds .*json, and a data set is of one format"):
        babilong.write(tmp_path / "j", ["qa2"], [500], format="parquet", **given)


@pytest.mark.parametrize("format", ["json", "parquet"])
def test_what_is_written_is_a_data_set_with_a_card(
    format: Any, tmp_path: Path, source: str, datasets: Any
) -> None:
    out = tmp_path / "out"
    given: Any = {"samples": 4, "haystack": source, "seed": 5, "format": format}
    babilong.write(out, ["qa1"], ["0k", "1k"], reserve=300, **given)
    babilong.write(out, ["qa10"], ["1k"], **given)
    for length in ("0k", "1k"):
        rows = datasets.load_dataset(str(out), length, split="qa1")
        assert rows.column_names == ["input", "question", "target"]
        assert list(rows) == babilong.load(out, "qa1", length)
    card = (out / "README.md").read_text()
    # Shells and readers alike should find what it was made with, and nothing of this machine.
    for told in ("seed: 5", "haystack: noise.txt", "tokenizer: words", "reserve: 300", "numpy"):
        assert told in card
    for path in (out / "README.md", out / "memlm.json"):
        assert str(tmp_path) not in path.read_text()
    assert card.index("config_name: 0k") < card.index("config_name: 1k")


def test_a_write_that_was_killed_goes_on_where_it_was(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: Any = {"samples": 3, "haystack": source, "seed": 2}
    whole = babilong.write(tmp_path / "whole", ["qa1", "qa2"], ["0k", 400], **given)
    known, calls = writing.compose, []

    def killed(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:  # In the third of four files.
            raise KeyboardInterrupt
        return known(*args, **named)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(writing, "compose", killed)
        with pytest.raises(KeyboardInterrupt):
            babilong.write(out, ["qa1", "qa2"], ["0k", 400], **given)
    left = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.json"))
    assert left == ["data/qa1/0k.json", "data/qa1/400.json", "memlm.json"]
    assert not list(out.rglob(".*"))
    before = [(out / name).stat().st_mtime_ns for name in left[:2]]
    files = babilong.write(out, ["qa1", "qa2"], ["0k", 400], **given)
    assert [(out / name).stat().st_mtime_ns for name in left[:2]] == before
    assert [f.read_bytes() for f in files] == [f.read_bytes() for f in whole]
    assert (out / "README.md").read_text() == (tmp_path / "whole" / "README.md").read_text()


def test_other_settings_are_refused_unless_overwritten(tmp_path: Path, source: str) -> None:
    out = tmp_path / "out"
    given: Any = {"samples": 3, "haystack": source}
    path = babilong.write(out, ["qa1"], [400], seed=2, **given)[0]
    first = path.read_bytes()
    with pytest.raises(ValueError, match=r"data/qa1/400\.json .*with seed=2, not 3; set overwrite"):
        babilong.write(out, ["qa1"], [400], seed=3, **given)
    with pytest.raises(ValueError, match=r"with position=\[0\.0, 1\.0\], not \[0\.0, 0\.5\]"):
        babilong.write(out, ["qa1"], [400], seed=2, position=(0.0, 0.5), **given)
    Path(source).write_text(Path(source).read_text().replace("quiet", "noisy and long"))
    # The words are counted alike whichever they are: tokens tell haystacks apart by length only.
    with pytest.raises(ValueError, match="with haystack_digest="):
        babilong.write(out, ["qa1"], [400], seed=2, **given)
    assert path.read_bytes() == first
    babilong.write(out, ["qa1"], [400], seed=3, overwrite=True, **given)
    assert path.read_bytes() != first and "seed: 3" in (out / "README.md").read_text()


def test_a_file_of_unknown_settings_is_left_alone(tmp_path: Path, source: str) -> None:
    path = put(tmp_path / "out" / "data" / "qa1" / "400.json", json.dumps(RECORDS))
    babilong.write(tmp_path / "out", ["qa1"], [400], samples=2, haystack=source)
    assert json.loads(path.read_text()) == RECORDS
    babilong.write(tmp_path / "out", ["qa1"], [400], samples=2, haystack=source, overwrite=True)
    assert len(json.loads(path.read_text())) == 2


def test_written_facts_stand_where_asked(tmp_path: Path, source: str) -> None:
    given: Any = {"samples": 20, "haystack": source, "overwrite": True}
    babilong.write(tmp_path, ["qa1"], [600], position=(0.0, 0.2), **given)
    for record in babilong.load(tmp_path, "qa1", 600):
        assert all("Paragraph" in part for part in record["input"].split(". ")[20:])
    babilong.write(tmp_path, ["qa1"], [600], distance=200, **given)
    records = babilong.load(tmp_path, "qa1", 600)
    for record in records:
        parts = re.split(r"(?<=\.) ", record["input"])
        name = re.findall(r"\w+", record["question"])[-1]
        last = max(i for i, part in enumerate(parts) if part.startswith(name))
        words = len(re.findall(r"\w+|[^\w\s]+", " ".join(parts[last:])))
        assert abs(words - 200) <= 12
    babilong.write(tmp_path, ["qa1"], [600], reserve=100, **given)
    for record in babilong.load(tmp_path, "qa1", 600):
        assert len(re.findall(r"\w+|[^\w\s]+", record["input"])) == 500


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"tasks": ["qa99"]}, "qa99"),
        ({"tasks": []}, "must each name at least one"),
        ({"samples": 0}, "samples=0"),
        ({"seed": -1}, "seed=-1"),
        ({"format": "csv"}, "format='csv' is unknown"),
        ({"share": 0}, "share=0"),
        ({"position": (0.6, 0.2)}, r"position=\(0.6, 0.2\)"),
        ({"reserve": 400}, "reserve=400"),
        ({"lengths": [5]}, "none of 2000 stories of qa1 fits in length 5 "),
        ({"distance": 401}, "none of 2000 stories of qa1 fits in length 400 .*distance=401"),
        ({"stories": "no/such"}, "story folder 'no/such' does not exist"),
    ],
)
def test_a_write_that_cannot_work_is_refused(
    named: dict[str, Any], message: str, tmp_path: Path, source: str
) -> None:
    given = {"tasks": ["qa1"], "lengths": [400], "samples": 2, "haystack": source, **named}
    with pytest.raises(ValueError, match=message):
        babilong.write(tmp_path / "out", **given)
    assert not list((tmp_path / "out").rglob("*.json.*"))
    assert not list((tmp_path / "out").rglob("qa*/*"))


def test_what_others_wrote_is_not_written_over(tmp_path: Path, source: str) -> None:
    put(tmp_path / "mine" / "README.md", "# My data\n")
    with pytest.raises(ValueError, match=r"a README\.md that was not written here"):
        babilong.write(tmp_path / "mine", ["qa1"], [400], samples=2, haystack=source)
    with pytest.raises(ValueError, match="is a file; name a folder"):
        babilong.write(source, ["qa1"], [400], samples=2, haystack=source)
    put(tmp_path / "broken" / "memlm.json", "{")
    put(tmp_path / "broken" / "data" / "qa1" / "400.json", "[]")
    with pytest.raises(ValueError, match=r"memlm\.json' is damaged"):
        babilong.write(tmp_path / "broken", ["qa1"], [400], samples=2, haystack=source)


def test_any_generated_task_can_be_written(tmp_path: Path, source: str) -> None:
    files = babilong.write(tmp_path, babi.TASKS, [1000], samples=1, haystack=source)
    assert len(files) == len(babi.TASKS)
    assert all(len(babilong.load(tmp_path, task, 1000)) == 1 for task in babi.TASKS)


STORY = babi.Story(["Mary went to the office."], "Where is Mary?", "office", [0], "qa1")


def sample_of(text: str, tokenizer: PreTrainedTokenizerFast) -> babilong.RecordSample:
    record = published.Record(input=text, question="Where is Mary?", target="office")
    return babilong.RecordSample(record, "qa1", tokenizer)


def flat(sample: Any) -> list[int]:
    return [int(token) for piece in sample.ids() for token in piece]


def test_a_record_is_read_as_the_sample_it_came_from(
    noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast
) -> None:
    composed = babilong.compose(STORY, noise, "16k", tokenizer, 0, position=(1.0, 1.0))
    read = sample_of(composed.text().strip(), tokenizer)
    assert (read.question, read.target, read.task) == ("Where is Mary?", "office", "qa1")
    assert read.story == babi.Story([], "Where is Mary?", "office", [], "qa1")
    assert read.fact_offsets == () and read.text() == composed.text()
    assert np.array_equal(read.question_ids(), composed.question_ids())
    assert np.array_equal(read.question_ids("Q:{question}"), composed.question_ids("Q:{question}"))
    whole = tokenizer(composed.text())["input_ids"]
    assert flat(read) == whole and read.tokens == len(read) == len(whole)
    # All but the sentence that was cut inside a word is as it was composed.
    begun = composed.fact_offsets[0] - 60
    assert flat(read)[:begun] == flat(composed)[:begun]
    pieces = list(read.ids())
    assert all(p.dtype == np.int32 and not p.flags.writeable for p in pieces)
    assert "".join(read) == read.text() and len(list(read)) > 2


@pytest.mark.parametrize("kind", ["byte-bpe", "words"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "word",
        "no-blank-in-it" * 50,
        "  ".join(["two", "blanks", "between", "every", "word"] * 30),
        " \n ".join(["A line.", "Another line!", "é日🙂"] * 40) + "   ",
        "It's 42 degrees — naïve café. " * 30,
    ],
)
def test_tokens_in_pieces_are_those_of_the_whole(
    text: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = other_tokenizer(kind)
    for size in (1, 2, 5, 16, 50):
        monkeypatch.setattr(records, "_PIECE_CHARACTERS", size)
        monkeypatch.setattr(records, "_PIECE_TOKENS", 7)
        sample = sample_of(text, tokenizer)
        said = f" {text.strip()}" if text.strip() else ""
        assert sample.text() == said
        assert flat(sample) == tokenizer(said, add_special_tokens=False)["input_ids"]
        assert sample.tokens == len(flat(sample))


def test_a_long_record_takes_four_bytes_per_token(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = sample_of("The boats came home and nobody spoke. " * 30_000, tokenizer)
    tracemalloc.start()
    tokens = sample.tokens
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tokens > 200_000
    # The text once more, while it is stripped and cut; then the ids alone.
    assert held < 5 * tokens and peak < 20_000_000
