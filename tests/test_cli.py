"""The command line: what a user types, and what a mistake prints."""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from memlm import MemLMForCausalLM
from memlm.cli import main
from memlm.cli.train import make_recipe
from memlm.data.files import TextRows
from memlm.text import PIECE
from memlm.train.documents import TextFiles
from tests.cases import FAMILIES
from tests.test_chat import TEMPLATE
from tests.tokenizers import TEXT, tokenizer

pytestmark = pytest.mark.usefixtures("unpainted")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tok = tokenizer("byte-bpe")
    config = LlamaConfig(**{**FAMILIES["llama"], "vocab_size": len(tok)})
    MemLMForCausalLM.from_base(config, memory="armt", segment_length=16).save_pretrained(path)
    tok.save_pretrained(path)
    return path


@pytest.fixture
def book(tmp_path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT * 5, encoding="utf-8")
    return path


def test_help_needs_no_torch_and_names_every_command() -> None:
    code = (
        "import sys, memlm.cli\n"
        "try: memlm.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("train", "eval", "ask", "data", "demo"):
        assert f"\n    {command} " in done.stdout


def test_ask_reads_files_and_goes_on_with_a_saved_stream(folder, book, tmp_path, capsys) -> None:
    arguments = ["ask", str(folder), str(book), "-q", "Where is Mary?", "--max-new-tokens", "3"]
    assert main([*arguments, "--save", str(tmp_path / "stream")]) == 0
    first = capsys.readouterr().out
    assert "tokens read" in first and "Where is Mary?" in first and "written:" in first
    again = ["ask", str(folder), "--load", str(tmp_path / "stream"), "-q", "Where is Mary?"]
    assert main([*again, "--max-new-tokens", "3"]) == 0
    second = capsys.readouterr().out
    assert first.splitlines()[:3] == second.splitlines()[:3]


def test_a_dialogue_is_printed_as_it_comes_and_saved(
    folder, book, tmp_path, capsys, monkeypatch
) -> None:
    talking = tmp_path / "model"
    shutil.copytree(folder, talking)
    tok = copy.deepcopy(tokenizer("byte-bpe"))
    tok.chat_template = TEMPLATE
    tok.save_pretrained(talking)
    given = ["--max-new-tokens", "3", "--chat"]
    saved = str(tmp_path / "stream")
    ask = ["ask", str(talking), str(book), *given, "--save", saved, "-q", "Where?", "-q", "Why?"]
    assert main(ask) == 0
    first = capsys.readouterr().out
    assert "> Where?\n" in first and "> Why?\n" in first
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\n\n"))
    assert main(["ask", str(talking), "--load", saved, *given]) == 0
    # Two exchanges of more than three tokens each are remembered beside the book.
    read = [
        int(out.split(" tokens read")[0].replace(",", ""))
        for out in (first, capsys.readouterr().out)
    ]
    assert read[1] > read[0] + 6
    assert main(["ask", str(folder), str(book)]) == 2
    assert "-q QUESTION" in capsys.readouterr().err


def test_files_and_overrides_may_follow_options(folder, book, tmp_path, capsys) -> None:
    assert main(["ask", str(folder), "-q", "Where?", "--max-new-tokens", "2", str(book)]) == 0
    assert "tokens read" in capsys.readouterr().out
    arguments = ["train", "tiny-none-qa1", "--out", str(tmp_path / "run"), "training.max_stepz=1"]
    assert main(arguments) == 2
    assert "max_steps" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["ask", str(folder), str(book), "-q", "Where?", "--no-such-option"])


@pytest.fixture
def noise(tmp_path) -> Path:
    path = tmp_path / "noise.txt"
    path.write_text(
        "\n\n".join(
            f"Line {n} of a long quiet book says nothing of anybody at all." for n in range(300)
        )
    )
    return path


@pytest.mark.usefixtures("painted")
def test_eval_writes_its_files_and_data_its_layout(folder, noise, tmp_path, capsys) -> None:
    common = [
        "--tasks",
        "qa1",
        "--lengths",
        "0k",
        "200",
        "--samples",
        "2",
        "--haystack",
        str(noise),
    ]
    out = tmp_path / "eval"
    assert main(["eval", str(folder), *common, "--out", str(out), "--max-new-tokens", "2"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["accuracy"]["qa1"]) == {"0k", "200"}
    assert len((out / "samples.jsonl").read_text().splitlines()) == 4
    assert (out / "accuracy.png").stat().st_size > 1000
    assert "| qa1 |" in capsys.readouterr().out
    assert main(["data", "babilong", *common, "--out", str(tmp_path / "data")]) == 0
    assert (tmp_path / "data/data/qa1/200.json").is_file()
    data = ["--data", str(tmp_path / "data"), "--tasks", "qa1", "--lengths", "200"]
    arguments = ["eval", str(folder), *data, "--out", str(tmp_path / "published")]
    assert main([*arguments, "--samples", "2", "--max-new-tokens", "2"]) == 0
    summary = json.loads((tmp_path / "published/summary.json").read_text())
    assert summary["counts"]["qa1"]["200"]["samples"] == 2


# Options of `memlm eval` that change no answer: where things are, and what the machine does.
ELSEWHERE = {"help", "debug", "model", "out", "device"}


def test_the_command_that_repeats_a_run_has_every_option_that_decides_it(
    folder, noise, tmp_path, capsys
) -> None:
    from memlm.cli.parsing import make_commands, parse
    from memlm.eval.reporting.runs import Run

    (tmp_path / "qa1_single_test.txt").write_text(
        "1 Mary moved to the office.\n2 Where is Mary? \toffice\t1\n"
    )
    (tmp_path / "words.yaml").write_text("tasks: {qa1: {instruction: Read.}}")
    (tmp_path / "data/qa1").mkdir(parents=True)
    row = {"input": "Mary moved to the office.", "question": "Where is Mary?", "target": "office"}
    (tmp_path / "data/qa1/0k.json").write_text(json.dumps([row]))
    common = ["--samples", "1", "--max-new-tokens", "2"]
    cases = [
        [
            *("--tasks", "qa1", "passkey", "--lengths", "0k", "150", "--haystack", str(noise)),
            *("--stories", str(tmp_path), "--seed", "3", "--position", "0.2", "0.7"),
            *("--retrieval", "2", "--chunk-size", "9", "--hops", "2", "--dtype", "float64"),
            *("--prompt", str(tmp_path / "words.yaml"), "--batch-size", "3"),
        ],
        [
            *("--lengths", "1k", "--haystack", str(noise), "--composition", "published"),
            *("--baseline", "window", "--window", "24", "--write-threshold", "0.25"),
        ],
        ["--lengths", "150", "--haystack", str(noise), "--distance", "60", "--baseline", "none"],
        ["--lengths", "0k", "--data", str(tmp_path / "data"), "--baseline", "retrieval"],
    ]
    parts = make_commands().parsers["eval"]._actions
    wanted = {action.dest for action in parts} - ELSEWHERE
    given: set[str] = set()
    for number, case in enumerate(cases):
        out = tmp_path / f"out{number}"
        typed = ["eval", str(folder), *common, *case, "--out", str(out)]
        assert main(typed) == 0, capsys.readouterr().err
        run = Run.load("again", out)
        (command,) = run.commands
        words = shlex.split(command)
        assert words[:3] == ["memlm", "eval", "MODEL"] and "#" not in command
        again, first = parse(words[1:]), parse(typed)
        given |= {name for name in wanted if f"--{name.replace('_', '-')}" in words}
        # What was not typed stands in the command as what it came to.
        for name in wanted:
            value = getattr(first, name)
            if f"--{name.replace('_', '-')}" in typed:
                assert getattr(again, name) == value, name
    assert given == wanted
    summary = json.loads((tmp_path / "out3/summary.json").read_text())["settings"]
    assert summary["retrieval"]["k"] == 5 and summary["dtype"] == "float32"


def test_a_model_in_a_folder_named_like_a_command_is_evaluated(
    folder, noise, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--samples", "1", "--haystack", str(noise), "--max-new-tokens", "2"]
    for name in ("report", "compare", "perplexity"):
        shutil.copytree(folder, tmp_path / name)
        assert main(["eval", name, "--lengths", "0k", *common, "--out", f"of-{name}"]) == 0
        assert (tmp_path / f"of-{name}/summary.json").is_file()
    capsys.readouterr()
    assert main(["eval", "compare", "of-report", "of-compare"]) == 0
    assert "no significant difference" in capsys.readouterr().out
    assert main(["eval", "report", "of-report", "--out", "page"]) == 0
    assert (tmp_path / "page/report.html").is_file()
    # Without a model of that name it is the command, which says what it lacks.
    monkeypatch.chdir(tmp_path / "page")
    with pytest.raises(SystemExit):
        main(["eval", "report", "--out", "page"])
    assert "usage: memlm eval report" in capsys.readouterr().err


def test_a_model_is_asked_what_its_recipe_says_unless_told_otherwise(
    folder, noise, tmp_path, capsys
) -> None:
    shutil.copytree(folder, tmp_path / "run")
    recipe = f"eval: {{tasks: [qa6], lengths: [0k, '120'], samples: 2, haystack: {noise}}}"
    (tmp_path / "run/recipe.yaml").write_text(recipe)
    model, out = str(tmp_path / "run"), tmp_path / "out"
    assert main(["eval", model, "--max-new-tokens", "2", "--out", str(out)]) == 0
    assert "recipe.yaml says: tasks ['qa6'], lengths" in capsys.readouterr().err
    summary = json.loads((out / "summary.json").read_text())
    assert {task: set(found) for task, found in summary["counts"].items()} == {"qa6": {"0k", "120"}}
    assert summary["settings"]["haystack"] == str(noise)
    arguments = ["--tasks", "qa1", "--lengths", "0k", "--samples", "1", "--max-new-tokens", "2"]
    assert main(["eval", model, *arguments, "--out", str(tmp_path / "other")]) == 0
    summary = json.loads((tmp_path / "other/summary.json").read_text())
    assert summary["counts"] == {"qa1": {"0k": {"correct": 0, "samples": 1}}}


def test_an_answer_is_as_long_as_the_folders_answers(folder, noise, tmp_path) -> None:
    from memlm.eval import evaluate

    model = AutoModelForCausalLM.from_pretrained(folder)
    given = {"haystack": str(noise), "samples": 1, "progress": False}
    evaluate(model, tokenizer("byte-bpe"), ["qa1"], ["0k"], out=tmp_path / "a", **given)
    common = ["--tasks", "qa1", "--haystack", str(noise), "--samples", "1"]
    # What Python began with its default, the command goes on with.
    arguments = ["eval", str(folder), *common, "--lengths", "0k", "90"]
    assert main([*arguments, "--out", str(tmp_path / "a")]) == 0
    assert json.loads((tmp_path / "a/run.json").read_text())["max_new_tokens"] == 20
    # A folder of version 0.1, whose default was 8 in Python, goes on with its own.
    settings = json.loads((tmp_path / "a/run.json").read_text())
    for name in ("position", "distance", "composition"):
        del settings[name]
    (tmp_path / "a/run.json").write_text(json.dumps({**settings, "max_new_tokens": 8}))
    assert main([*arguments, "--out", str(tmp_path / "a")]) == 0
    assert json.loads((tmp_path / "a/summary.json").read_text())["settings"]["max_new_tokens"] == 8
    assert main([*arguments, "--max-new-tokens", "20", "--out", str(tmp_path / "a")]) == 2


def test_keys_of_recipes_are_printed_without_one(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--keys"])
    assert stop.value.code == 0 and "model.segment_length" in capsys.readouterr().out


def test_a_base_that_has_a_memory_is_trained_on(folder, tmp_path, capsys) -> None:
    """Named alone, or in place of a recipe's own base."""
    data = tmp_path / "my.jsonl"
    data.write_text(json.dumps({"text": TEXT}) + "\n", encoding="utf-8")
    named = ["--base", str(folder), "--data", str(data)]
    assert main(["train", *named, "--out", str(tmp_path / "more"), "training.max_steps=1"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "more")
    assert model.segment_length == 16 and [m["name"] for m in model.config.memory] == ["armt"]
    given = argparse.Namespace(
        words=["gpt2-armt-babilong"], base=str(folder), data=str(data), eval_data=None, memory=None
    )
    section = make_recipe(given).model
    assert (section.base, section.init_from) == (None, str(folder))
    # The recipe's memory is another one.
    assert main(["train", "gpt2-armt-babilong", *named, "--out", str(tmp_path / "other")]) == 2
    assert "leave it out" in capsys.readouterr().err
    # One that is named is compared, where it is a recipe's default, too.
    given.memory = "armt"
    assert make_recipe(given).model.memory == {"name": "armt"}


def test_baselines_are_compared_and_reported(folder, noise, tmp_path, capsys) -> None:
    common = ["--tasks", "qa6", "passkey", "--lengths", "150", "--samples", "3"]
    common += ["--haystack", str(noise), "--max-new-tokens", "2"]
    for name, extra in (
        ("memory", []),
        ("none", ["--baseline", "none"]),
        ("window", ["--baseline", "window", "--window", "24"]),
        ("full", ["--baseline", "full", "--prompt", "instruction"]),
    ):
        assert main(["eval", str(folder), *common, *extra, "--out", str(tmp_path / name)]) == 0
    capsys.readouterr()
    assert main(["eval", "compare", str(tmp_path / "memory"), str(tmp_path / "none")]) == 0
    assert "qa6" in capsys.readouterr().out
    runs = [f"ours={tmp_path / 'memory'}", str(tmp_path / "none"), str(tmp_path / "full")]
    assert main(["eval", "report", *runs, "--out", str(tmp_path / "report")]) == 0
    assert "report.html" in capsys.readouterr().out
    page = (tmp_path / "report/report.html").read_text()
    assert "ours" in page and "passkey" in page


def test_a_model_without_memory_is_evaluated_but_not_asked(
    folder, noise, book, tmp_path, capsys
) -> None:
    AutoModelForCausalLM.from_pretrained(folder).base.save_pretrained(tmp_path / "base")
    tokenizer("byte-bpe").save_pretrained(tmp_path / "base")
    common = ["--lengths", "0k", "--samples", "2", "--haystack", str(noise)]
    base, out = str(tmp_path / "base"), str(tmp_path / "eval")
    assert main(["eval", base, *common, "--prompt", "answer", "--out", out]) == 0
    assert json.loads((tmp_path / "eval/run.json").read_text())["baseline"] == "full"
    assert main(["ask", base, str(book), "-q", "Where?"]) == 2
    assert "without memory" in capsys.readouterr().err


@pytest.mark.usefixtures("painted")
def test_perplexity_prints_a_verdict(folder, noise, tmp_path, capsys) -> None:
    arguments = ["eval", "perplexity", str(folder), "--haystack", str(noise), "--length", "300"]
    arguments += ["--documents", "2", "--out", str(tmp_path / "loss")]
    assert main(arguments) == 0
    assert "written: " in capsys.readouterr().out
    assert (tmp_path / "loss/perplexity.png").is_file()


def test_an_index_is_built_added_to_searched_and_asked(folder, tmp_path, capsys) -> None:
    (tmp_path / "a.txt").write_text("The brave baker keeps the golden lamp under the stairs. " * 3)
    (tmp_path / "b.txt").write_text("The old sailor keeps a silver spoon in the drawer. " * 3)
    library = str(tmp_path / "library")
    assert main(["index", "build", library, str(tmp_path / "a.txt")]) == 0
    assert "chunks added" in capsys.readouterr().out
    assert main(["index", "build", library, str(tmp_path / "a.txt")]) == 2
    assert "index add" in capsys.readouterr().err
    assert main(["index", "add", library, str(tmp_path / "b.txt")]) == 0
    capsys.readouterr()
    where = f"document={tmp_path / 'b.txt'}"
    assert main(["index", "search", library, "golden lamp", "-k", "1"]) == 0
    assert "a.txt" in capsys.readouterr().out
    assert main(["index", "search", library, "golden lamp", "--where", where]) == 0
    out = capsys.readouterr().out
    assert "b.txt" in out and "a.txt" not in out
    # Metadata has numbers, a command line words; of a key given twice either value will do.
    assert main(["index", "search", library, "golden lamp", "--where", "start=0"]) == 0
    assert "a.txt" in capsys.readouterr().out
    both = ["--where", where, f"document={tmp_path / 'a.txt'}"]
    assert main(["index", "search", library, "golden lamp", *both]) == 0
    out = capsys.readouterr().out
    assert "b.txt" in out and "a.txt" in out
    assert main(["index", "info", library]) == 0
    assert "Flat" in capsys.readouterr().out
    question = ["-q", "Who keeps the spoon?", "--max-new-tokens", "2"]
    assert main(["ask", str(folder), "--index", library, *question]) == 0
    assert "from " in capsys.readouterr().out
    capsys.readouterr()
    # A file shorter than a passage is found, too.
    assert main(["ask", str(folder), str(tmp_path / "a.txt"), "--recall", "1", *question]) == 0
    assert "from " in capsys.readouterr().out


def test_what_is_asked_without_saving_leaves_nothing_in_a_store(
    folder, tmp_path, monkeypatch
) -> None:
    from memlm.retrieval import ChunkIndex, HashingEmbedder
    from memlm.retrieval.embedded import EmbeddedStore

    # Two chunks are enough, of a document that is read five times.
    book = tmp_path / "book.txt"
    book.write_text(TEXT * 2, encoding="utf-8")
    library = ChunkIndex(HashingEmbedder())
    library.add(["The brave baker keeps the golden lamp under the stairs."])
    # Chunks in this process, taken for a store that goes on without it.
    monkeypatch.setattr(EmbeddedStore, "outlives_process", True)
    monkeypatch.setattr(ChunkIndex, "load", lambda *_, **__: library)
    ask = [
        "ask",
        str(folder),
        str(book),
        "--index",
        "library",
        "-q",
        "Who?",
        "--max-new-tokens",
        "1",
    ]
    there = []

    def asked(*_: Any, **__: Any) -> Any:
        there.append(len(library))
        raise KeyboardInterrupt

    assert main(ask) == 0 and len(library) == 1
    assert main([*ask, "--save", str(tmp_path / "stream")]) == 0
    saved = len(library)
    assert saved > 1
    again = [*ask[:3], "--load", str(tmp_path / "stream"), *ask[5:]]
    assert main(again) == 0 and len(library) == saved
    monkeypatch.setattr("memlm.DocumentStream.ask", asked)
    assert main(again) == 130 and len(library) == saved
    assert main(ask) == 130 and len(library) == saved


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "{model}", "{tmp}/nowhere.txt", "-q", "?"], "does not exist"),
        (["ask", "{model}", "{tmp}/binary", "-q", "Where?"], "zero byte"),
        (["ask", "{model}", "{tmp}/empty.txt", "-q", "Where?"], "holds no text"),
        (["ask", "{model}", "-q", "Where?"], "no FILE to read"),
        (["ask", "{tmp}", "{tmp}/text.txt", "-q", "Where?"], "no config.json"),
        (["ask", "./no/such/model", "{tmp}/text.txt", "-q", "Where?"], "does not exist"),
        (["eval", "{model}", "--tasks", "qa77", "--out", "{tmp}/o"], "qa77"),
        (["eval", "{model}", "--lengths", "4q", "--out", "{tmp}/o"], "4q"),
        (["eval", "{model}", "--samples", "0", "--out", "{tmp}/o"], "samples=0"),
        (["eval", "{model}", "--haystack", "{tmp}/none", "--out", "{tmp}/o"], "none"),
        (["data", "babilong", "--tasks", "passkey", "--out", "{tmp}/o"], "passkey"),
        (["eval", "{model}", "--retrieval", "0", "--out", "{tmp}/o"], "k=0"),
        (["index", "build", "{tmp}/i", "{tmp}/nowhere.txt"], "does not exist"),
        (["index", "build", "{tmp}/i", "{tmp}/binary"], "zero byte"),
        (["index", "info", "{tmp}/none"], "none"),
        (["index", "search", "{tmp}", "Where?"], "manifest"),
        (["ask", "{model}", "--index", "{tmp}/none", "-q", "Where?"], "none"),
        (["eval", "{model}", "--window", "9", "--out", "{tmp}/o"], "window=9"),
        (["eval", "{model}", "--chunk-size", "9", "--out", "{tmp}/o"], "add --retrieval K"),
        (["eval", "{model}", "--hops", "2", "--out", "{tmp}/o"], "add --retrieval K"),
        (["eval", "{model}", "--data", "x/y", "--seed", "1", "--out", "{tmp}/o"], "seed=1 says"),
        (["eval", "{model}", "--data", "x/y", "--distance", "9", "--out", "{tmp}/o"], "distance=9"),
        (
            ["eval", "{model}", "--data", "x/y", "--haystack", "{tmp}", "--out", "{tmp}/o"],
            "brings them ready-made",
        ),
        (
            [
                "eval",
                "{model}",
                "--composition",
                "published",
                "--distance",
                "9",
                "--out",
                "{tmp}/o",
            ],
            "distance=9 places facts",
        ),
        (
            [
                "data",
                "babilong",
                "--composition",
                "published",
                "--share",
                "0.2",
                "--out",
                "{tmp}/o",
            ],
            "share=0.2 given beside composition='published'",
        ),
        (["eval", "{model}", "--prompt", "shout", "--out", "{tmp}/o"], "shout"),
        (["eval", "{model}", "--data", "{tmp}/none", "--out", "{tmp}/o"], "none"),
        (["eval", "{model}", "--distance", "-1", "--out", "{tmp}/o"], "distance"),
        (["eval", "{model}", "--position", "0.5", "0.1", "--out", "{tmp}/o"], "position"),
        (["eval", "compare", "{tmp}/a", "{tmp}/b"], "samples.jsonl"),
        (["eval", "report", "{tmp}/a", "--out", "{tmp}/o"], "a"),
        (["eval", "perplexity", "{model}", "--length", "1", "--out", "{tmp}/o"], "length=1"),
        (["train", "{tmp}/missing.yaml"], "missing.yaml"),
        (["demo", "--ask", "{tmp}/text.txt"], "belong together"),
        (["ask", "{model}", "{tmp}/text.txt", "-q", " "], "-q is empty"),
        (["ask", "{model}", "{tmp}/text.txt", "-q", "a", "--max-new-tokens", "0"], "=0 must be"),
        (["ask", "{model}", "{tmp}/text.txt", "--chat"], "no chat template"),
        (["ask", "{model}", "{tmp}/text.txt", "-q", "a", "--device", "cuda"], "no CUDA here"),
        (["ask", "{model}", "-", "-q", "a"], "/dev/stdin"),
        (["demo", "--ask", "{tmp}/binary", "-q", "Where?"], "zero byte"),
    ],
)
def test_mistakes_are_one_sentence_without_a_traceback(
    folder, tmp_path, monkeypatch, capsys, arguments, message
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "text.txt").write_text("Mary went to the kitchen.")
    before = sorted(p.name for p in tmp_path.iterdir())
    filled = [a.format(model=folder, tmp=tmp_path) for a in arguments]
    assert main(filled) == 2
    error = capsys.readouterr().err
    assert error.startswith("memlm: error: ") and message in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    with pytest.raises((ValueError, OSError)):
        main([*filled, "--debug"])


def test_ctrl_c_says_how_to_go_on(folder, book, monkeypatch, capsys) -> None:
    import memlm.cli.ask

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(memlm.cli.ask, "load_model", interrupt)
    assert main(["ask", str(folder), str(book), "-q", "Where?"]) == 130
    assert "goes on" in capsys.readouterr().err


def test_every_baseline_can_be_asked_for() -> None:
    """Listed again for the command line, which must not import what they are made of."""
    from memlm.cli.parsing import make_commands
    from memlm.eval.running.baselines import BASELINES, MODEL

    actions = make_commands().parsers["eval"]._actions
    (baseline,) = (action for action in actions if action.dest == "baseline")
    assert set(baseline.choices) == {MODEL, *BASELINES}


def test_a_pipe_is_read_whole(folder, tmp_path, capsys) -> None:
    """It can be read but once, from its first byte."""
    text, pipe = "Mary went to the kitchen. " * 4_000, tmp_path / "pipe"
    (tmp_path / "book.txt").write_text(text)
    os.mkfifo(pipe)
    said = []
    for path in (tmp_path / "book.txt", pipe):
        if path == pipe:
            threading.Thread(target=pipe.write_text, args=(text,), daemon=True).start()
        assert main(["index", "build", str(tmp_path / f"index-{path.stem}"), str(path)]) == 0
        said.append(capsys.readouterr().out.splitlines()[0])
    assert len(text) > PIECE and said[0] == said[1]
    threading.Thread(target=pipe.write_text, args=(text[:600],), daemon=True).start()
    assert main(["ask", str(folder), str(pipe), "-q", "Where?", "--max-new-tokens", "1"]) == 0
    read = capsys.readouterr().out
    (tmp_path / "short.txt").write_text(text[:600])
    asked = ["ask", str(folder), str(tmp_path / "short.txt"), "-q", "Where?"]
    assert main([*asked, "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().out == read


def test_rows_and_documents_do_not_come_through_a_pipe(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for reader in (lambda p: TextRows([p], "document"), TextFiles):
        with pytest.raises(ValueError, match="is a pipe or a device"):
            reader(tmp_path / "pipe")
