"""The scripts in examples/ run as their first lines say, on models made here."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from memlm.data import open_rows
from memlm.tasks.haystack import read_documents
from tests.train.test_bases import own  # noqa: F401

EXAMPLES = Path(__file__).parent.parent / "examples"
TEXT = "Mary went to the kitchen. John moved to the hallway, didn't he?\n\n"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "texts" / "text.txt"
    path.parent.mkdir()
    path.write_text(TEXT * 4, encoding="utf-8")
    return path


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'run("{path.name}"' in source or f'"{path.name}",\n' in source, path.name


def test_finetuning_on_questions(run, text: Path, own: Path, tmp_path: Path) -> None:  # noqa: F811
    base, data = own / "base", EXAMPLES / "questions.jsonl"
    said = run(
        "finetune_on_questions.py",
        *(base, data, tmp_path / "out", "--document", text, "--question", "Who?"),
        *("model.segment_length=56", "model.memory={name: armt, num_memory_tokens: 4}"),
        *("tokenizer.source=null", "training.max_steps=1", "training.use_cpu=true"),
        *("training.gradient_accumulation_steps=2", "data.question_template='{question}'"),
    )
    assert "4 rows, 12 questions" in said and "1 steps, loss" in said and "Who? " in said


def test_made_questions_can_be_answered_from_their_documents(run, tmp_path: Path) -> None:
    said = run("make_questions.py", tmp_path / "a", "--documents", 20, "--held-out", 5, "--bare", 0)
    assert "train.jsonl: 20 documents" in said and "held-out.jsonl: 5 documents" in said
    held_out = " ".join(
        sentence for text in read_documents("builtin", "eval") for sentence in text.sentences
    )
    for name in ("train", "held-out"):
        rows = open_rows(tmp_path / "a" / f"{name}.jsonl")
        for row in rows:
            told = dict(re.findall(r"The (\w+) uses the (\w+)\.", row.text))
            assert 2 <= len(told) == len(set(told.values()))
            for read, question in row.asked:
                thing = re.fullmatch(r"What does the (\w+) use\?", question.question)[1]
                assert question.answer == told[thing]
                # What was last said of the place is the fact itself.
                fact = f"The {thing} uses the {told[thing]}."
                assert row.text[:read].rfind(told[thing]) == row.text.index(fact) + len(
                    fact
                ) - 1 - len(told[thing])
            assert len(row.asked) == len(told)
            prose = [part.strip() for part in re.split(r"The \w+ uses the \w+\.", row.text)]
            unseen = all(part[:40] in held_out for part in prose)
            assert unseen == (name == "held-out") and (any(prose) or name == "held-out")
    run("make_questions.py", tmp_path / "b", "--documents", 20, "--held-out", 5, "--bare", 0)
    for name in ("train", "held-out"):
        files = [tmp_path / folder / f"{name}.jsonl" for folder in "ab"]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_loop_with_accelerate(run, text: Path, own: Path, tmp_path: Path) -> None:  # noqa: F811
    arguments = [own / "base", text, "--out", tmp_path / "out", "--segment-length", 16]
    said = run("accelerate_loop.py", *arguments, "--epochs", 2)
    losses = [float(line.rpartition(" ")[2]) for line in said.splitlines()]
    assert len(losses) == 2 and losses[1] < losses[0]
    again = ["--model", tmp_path / "out", "--question", "Who?", "--save", tmp_path / "kept"]
    assert "bytes of memory" in run("stream_a_book.py", text, *again)


def test_a_book_and_a_folder_with_the_shipped_model(run, text: Path, tmp_path: Path) -> None:
    assert "Where is Mary? kitchen" in run("stream_a_book.py", text, "--question", "Where is Mary?")
    arguments = [text.parent, tmp_path / "library", "--question", "Where is Mary?"]
    for _ in range(2):
        said = run("search_a_folder.py", *arguments)
        assert "text.txt: Mary went to the kitchen" in said and "2 passages shown" in said


def test_a_mechanism_of_one_s_own(run, monkeypatch: pytest.MonkeyPatch) -> None:
    import memlm.memory

    monkeypatch.setattr(memlm.memory, "_MECHANISMS", dict(memlm.memory._MECHANISMS))
    said = run("add_a_mechanism.py")
    assert float(said.rpartition(" ")[2]) > 0 and "gradient 0.0000" not in said
    with pytest.raises(ValueError, match="name='armt' is another memory's"):
        memlm.memory.register_memory("armt", memlm.memory.memory_class("rmt"))
