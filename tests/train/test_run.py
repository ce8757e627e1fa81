"""A whole run from a recipe, on a haystack of a page."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import memlm
from memlm.modeling import MemLMForCausalLM
from memlm.train import Recipe, train
from memlm.train.callbacks import LogFile
from memlm.train.making import make_model, make_tokenizer
from memlm.train.recipe import override
from memlm.train.run import check_sharded
from tests.tokenizers import tokenizer
from tests.train.tiny import weights

PAGE = " ".join(
    f"Chapter {n} speaks at some length of nothing that anybody has to remember. It is long."
    for n in range(60)
)


def values(folder: Path) -> dict[str, Any]:
    (folder / "page.txt").write_text(PAGE, encoding="utf-8")
    return {
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "max_position_embeddings": 64,
                "initializer_range": 0.1,
            },
            "memory": {"name": "armt", "num_memory_tokens": 3, "d_mem": 8, "value_std": 0.1},
            "segment_length": 16,
        },
        "tokenizer": {"source": "train", "vocab_size": 500},
        "data": {
            "haystack": str(folder / "page.txt"),
            "layout": "aligned",
            "facts_per_segment": [1],
            "segment_length": 8,
        },
        "curriculum": {
            "score_window": 5,
            "stages": [
                {"max_segments": 1, "steps": 40, "advance_at": 0.6},
                {"max_segments": 2, "min_segments": 2, "steps": 40},
            ],
        },
        "training": {
            "per_device_train_batch_size": 16,
            "learning_rate": 3e-3,
            "logging_steps": 5,
            "save_steps": 10,
            "use_cpu": True,
        },
    }


def recipe(folder: Path, *overrides: str) -> Recipe:
    return Recipe.from_dict(override(values(folder), overrides))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def few_repetitions() -> Iterator[None]:
    """Training the tokenizer takes longer than these runs when words are shown as often as in earnest."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("memlm.train.tokenizer.WEIGHT", 2000)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("run")
    return folder, train(recipe(folder), folder / "out", progress=False)


def test_a_run_learns_and_its_model_loads(finished: tuple[Path, Any]) -> None:
    folder, result = finished
    out = folder / "out"
    assert result.finished and result.stage == 1
    assert 45 <= result.steps <= 80
    logged = [line for line in lines(out) if "loss" in line]
    assert logged[0]["loss"] > 3 > 1.2 > logged[-1]["loss"]
    assert max(line["accuracy"] for line in logged) > 0.6
    assert {line["stage"] for line in logged} == {0, 1}
    assert all(line["tokens_per_second"] > 0 for line in logged)
    assert logged[-1]["step"] == result.steps
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert isinstance(model, MemLMForCausalLM)
    assert len(tokenizer.tokenize(" kitchen")) == 1
    assert model.config.question_template == " {question}"
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert Recipe.load(out / "recipe.yaml") == recipe(folder)
    assert all(Path(file).is_file() for file in result.files)
    assert not list(out.glob("**/.*.tmp"))


def test_a_finished_run_is_not_run_again(finished: tuple[Path, Any]) -> None:
    folder, result = finished
    before = (folder / "out" / "model.safetensors").stat().st_mtime_ns
    again = train(recipe(folder), folder / "out", progress=False)
    assert again == result
    assert (folder / "out" / "model.safetensors").stat().st_mtime_ns == before


def test_the_folder_of_another_recipe_is_refused(finished: tuple[Path, Any]) -> None:
    folder, _ = finished
    other = recipe(folder, "training.learning_rate=1e-4")
    with pytest.raises(ValueError, match=r"training\.learning_rate: 0\.0001, there 0\.003"):
        train(other, folder / "out")


def test_a_model_without_a_recipe_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a model but no recipe\.yaml"):
        train(recipe(tmp_path), tmp_path / "out")


def test_a_stopped_run_goes_on_where_it_was(
    finished: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, whole = finished
    log = LogFile.on_log

    def terminate(self: LogFile, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        log(self, args, state, control, **kwargs)
        if state.global_step == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    again = recipe(folder)
    monkeypatch.setattr(LogFile, "on_log", terminate)
    stopped = train(again, tmp_path / "out", progress=False)
    monkeypatch.undo()
    assert not stopped.finished and stopped.steps < 25
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    result = train(again, tmp_path / "out", progress=False)
    assert result.finished and result.steps == whole.steps
    one = AutoModelForCausalLM.from_pretrained(folder / "out")
    two = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in weights(one).items():
        assert torch.equal(value, weights(two)[name]), name
    names = ("step", "loss", "stage")
    kept = [[line[n] for n in names] for line in lines(tmp_path / "out") if "loss" in line]
    # The interrupted step may have had a line of its own; the rest is the unbroken run's.
    expected = [[line[n] for n in names] for line in lines(folder / "out") if "loss" in line]
    assert [line for line in kept if line[0] > stopped.steps + 5] == [
        line for line in expected if line[0] > stopped.steps + 5
    ]
    assert len({line[0] for line in kept}) == len(kept)


def test_starting_over_forgets_the_run(tmp_path: Path) -> None:
    short = recipe(tmp_path, "training.max_steps=2", "training.save_steps=1")
    train(short, tmp_path / "out", progress=False)
    first = lines(tmp_path / "out")
    train(short, tmp_path / "out", resume=False, progress=False)
    assert [line["step"] for line in lines(tmp_path / "out")] == [line["step"] for line in first]
    with pytest.raises(ValueError, match="holds no checkpoint"):
        train(short, tmp_path / "other", resume=True)


def test_documents_train_a_language_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    for n in range(3):
        (tmp_path / "texts" / f"{n}.txt").write_text(PAGE[n * 400 : n * 400 + 500 + 200 * n])
    made = recipe(
        tmp_path,
        "data={source: documents, path: " + str(tmp_path / "texts") + "}",
        "curriculum.stages=[{max_segments: 4, steps: 30}]",
        "training.per_device_train_batch_size=2",
        "training.bptt_depth=2",
    )
    result = train(made, tmp_path / "out")
    logged = [line for line in lines(tmp_path / "out") if "loss" in line]
    assert result.finished and logged[-1]["loss"] < 0.9 * logged[0]["loss"]
    assert "accuracy" not in logged[-1]
    shown = capsys.readouterr().err
    assert "training" in shown and "stage=1/1" in shown and "Writing model" not in shown


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.config.model_type=lama"], "'lama' is unknown; did you mean 'llama'"),
        (["model.config.hiden_size=8"], r"hiden_size is not a field .*'hidden_size'"),
        (["model.init_std={gaet: 0.1}"], "init_std.gaet matches no weight"),
        (["model.memory.d_mm=8"], "did you mean 'd_mem'"),
        (["curriculum.stages=[{max_segments: 1}]"], "training.max_steps"),
        (["model.segment_length=80"], "segment_length=80"),
    ],
)
def test_what_cannot_be_built_is_refused(tmp_path: Path, changes: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        train(recipe(tmp_path, *changes), tmp_path / "out", progress=False)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    from tests.tokenizers import tokenizer

    bare = tokenizer("byte-bpe").__class__(tokenizer_object=tokenizer("byte-bpe").backend_tokenizer)
    bare.save_pretrained(tmp_path / "tokenizer")
    made = recipe(tmp_path)
    made = replace(made, tokenizer=replace(made.tokenizer, source=str(tmp_path / "tokenizer")))
    with pytest.raises(ValueError, match="has no end token"):
        train(made, tmp_path / "out", progress=False)


def test_training_goes_on_from_a_trained_model(finished: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = finished
    source = folder / "out"
    made = recipe(
        tmp_path,
        "model.config=null",
        f"model.init_from={source}",
        f"tokenizer.source={source}",
        "training.learning_rate=0.0",
        "training.max_steps=1",
    )
    train(made, tmp_path / "out", progress=False)
    before = AutoModelForCausalLM.from_pretrained(source)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in weights(before).items():
        assert torch.equal(value, weights(after)[name]), name


def test_training_goes_on_from_a_shipped_model_by_its_name(tmp_path: Path) -> None:
    changes = ("model.config=null", "model.init_from=qa1", "tokenizer.source=null")
    made = recipe(tmp_path, *changes, "model.segment_length=256", "model.memory=armt")
    named = make_tokenizer(made)
    expected, its_own = memlm.load_pretrained("qa1")
    assert named.get_vocab() == its_own.get_vocab()
    found = weights(make_model(made, named))
    for name, value in weights(expected).items():
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize(
    ("key", "make"),
    [
        ("tokenizer.source", make_tokenizer),
        ("model.init_from", lambda made: make_model(made, None)),
    ],
)
def test_a_model_that_is_nowhere_is_named_with_its_key(
    key: str, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a recipe goes on from, and nobody has trained yet.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    made = recipe(tmp_path, "model.config=null", "model.init_from=qa1", f"{key}=runs/part-one")
    with pytest.raises(OSError, match=rf"{key}='runs/part-one' is no folder, not found on the hub"):
        make(made)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "model.segment_length=7",
            "model.segment_length=7, but the model of init_from=.* leave it out",
        ),
        ("model.memory=rmt", "model.memory='rmt', but the model"),
        ("model.memory={name: armt, num_memory_tokens: 77}", "with their own settings"),
    ],
)
def test_what_a_trained_model_is_already_is_not_said_otherwise(
    change: str, words: str, finished: tuple[Path, Any], tmp_path: Path
) -> None:
    source = finished[0] / "out"
    given = ("model.config=null", f"model.init_from={source}", f"tokenizer.source={source}", change)
    with pytest.raises(ValueError, match=words):
        train(recipe(tmp_path, *given), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_what_nothing_reads_is_refused_before_a_run_begins(tmp_path: Path) -> None:
    made = recipe(tmp_path, "data.layout=story", "data.gap_tokens=[2, 4]")
    with pytest.raises(ValueError, match=r"sets what nothing reads \(.*data\.gap_tokens: no stage"):
        train(made, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_evaluations_score_held_out_text(tmp_path: Path) -> None:
    made = recipe(
        tmp_path,
        "training.eval_strategy=steps",
        "training.eval_steps=3",
        "training.max_steps=6",
        "curriculum.advance_on=evaluation",
        "curriculum.stages.0.advance_at=1.0e-9",
        "eval.samples=5",
    )
    train(made, tmp_path / "out", progress=False)
    scored = [line for line in lines(tmp_path / "out") if "eval_accuracy" in line]
    assert [line["step"] for line in scored] == [3, 6]
    stages = {line["step"]: line["stage"] for line in lines(tmp_path / "out") if "loss" in line}
    assert stages[6] == int(any(line["eval_accuracy"] > 0 for line in scored[:1]))


OWN = {
    "text": [{"text": PAGE[n * 90 : n * 90 + 160]} for n in range(6)],
    "asked": [
        {
            "document": PAGE[n * 90 : n * 90 + 160],
            "questions": [{"question": "Who?", "answer": f"{n}"}],
        }
        for n in range(6)
    ],
}


@pytest.mark.parametrize("kind", ["documents", "text", "asked"])
def test_own_data_are_evaluated_on_what_is_held_out(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On whole documents, however long, as the finished model reads them."""
    trained, held_out = tmp_path / "train", tmp_path / "held-out"
    for folder, part in ((trained, slice(0, 3)), (held_out, slice(3, 6))):
        folder.mkdir()
        if kind == "documents":
            for n, row in enumerate(OWN["text"][part]):
                (folder / f"{n}.txt").write_text(row["text"])
        else:
            (folder / "rows.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in OWN[kind][part])
            )
    source = "documents" if kind == "documents" else "rows"
    made = recipe(
        tmp_path,
        f"data={{source: {source}, path: '{trained}', eval_path: '{held_out}'}}",
        "curriculum.stages=[{max_segments: 1, steps: 4}]",
        "training.eval_strategy=steps",
        "training.eval_steps=0.5",
        # A batch's mean is a mean over its targets.
        "training.per_device_eval_batch_size=1",
        *(["data.question_template=' {question}'"] if kind == "asked" else []),
    )
    result = train(made, tmp_path / "out")
    scored = [line for line in lines(tmp_path / "out") if "eval_loss" in line]
    assert [line["step"] for line in scored] == [2, 4]
    assert result.eval_loss == scored[-1]["eval_loss"]
    assert f"step 4: held-out loss {result.eval_loss:.3f}" in capsys.readouterr().err
    model = MemLMForCausalLM.from_pretrained(tmp_path / "out")
    tok = AutoTokenizer.from_pretrained(tmp_path / "out")
    losses = []
    for row in OWN["text"][3:]:
        if kind == "asked":
            continue
        ids = torch.tensor([[*tok(row["text"]).input_ids, tok.eos_token_id]])
        assert ids.shape[1] > 2 * model.segment_length
        with torch.no_grad():
            losses.append(float(model(ids, labels=ids).loss))
    if kind == "asked":
        assert scored[-1]["eval_accuracy"] == result.eval_accuracy is not None
    else:
        assert result.eval_loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_an_evaluation_without_held_out_data_is_refused(tmp_path: Path) -> None:
    rows = {kind: tmp_path / f"{kind}.jsonl" for kind in OWN}
    for kind, path in rows.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in OWN[kind]))
    evaluated = ("curriculum.stages=[{max_segments: 1, steps: 4}]", "training.eval_strategy=epoch")
    for data, words, more in (
        (f"path: '{rows['text']}'", "none are named; set data.eval_path", evaluated),
        (
            f"path: '{rows['text']}', eval_path: '{rows['asked']}'",
            "holds rows of document, but data.path rows of text",
            evaluated,
        ),
        (
            f"path: '{rows['text']}', eval_path: '{rows['text']}'",
            "data.eval_path: is for training.eval_strategy, which is not set",
            evaluated[:1],
        ),
    ):
        made = recipe(tmp_path, f"data={{source: rows, {data}}}", *more)
        with pytest.raises(ValueError, match=words):
            train(made, tmp_path / "out", progress=False)
    made = recipe(tmp_path, f"data={{source: rows, path: '{rows['text']}', eval_path: ./no.jsonl}}")
    with pytest.raises(FileNotFoundError, match=r"data\.eval_path='./no\.jsonl' does not exist"):
        made.check_files()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.quantization=8bit"], r"model\.quantization is set, and FSDP"),
        (["data={source: rows, path: x}", "training.eval_strategy=steps"], "reads whole documents"),
    ],
)
def test_what_weights_spread_over_processes_cannot_do_is_refused(
    tmp_path: Path, changes: list[str], words: str
) -> None:
    made = recipe(tmp_path)
    check_sharded(made)
    check_sharded(recipe(tmp_path, "training.eval_strategy=steps"))
    if "quantization" in changes[0]:
        changes = ["model.config=null", "model.base=x", "tokenizer={}", *changes]
    with pytest.raises(ValueError, match=words):
        check_sharded(recipe(tmp_path, *changes))


def test_a_model_that_learns_to_read_passages_remembers_how_it_was_asked() -> None:
    recipe = Recipe.load("tiny-none-recall", ["data.recall_template=' See: {text}'"])
    config = make_model(recipe, tokenizer("byte-bpe")).config
    assert config.recall_template == " See: {text}" and config.question_segment == "own"
    alone = Recipe.load("tiny-none-recall", ["data.retrieval=0"])
    assert make_model(alone, tokenizer("byte-bpe")).config.question_segment == "open"


@pytest.mark.parametrize(
    ("first", "second", "segment", "template"),
    [
        ({"layout": "aligned"}, {"layout": "story"}, "open", " {text}"),
        ({"layout": "story"}, {"layout": "flowing"}, "own", " {text}"),
        ({}, {"retrieval": 2, "recall_template": " See: {text}"}, "own", " See: {text}"),
        ({"retrieval": 2, "recall_template": " See: {text}"}, {}, "open", " See: {text}"),
    ],
)
def test_a_model_is_asked_as_its_last_stage_asked(
    first: dict[str, Any], second: dict[str, Any], segment: str, template: str
) -> None:
    recipe = Recipe.load("tiny-none-recall", ["data.retrieval=0"])
    stages = [{"max_segments": 1, "data": first}, {"max_segments": 2, "data": second}]
    values = recipe.to_dict()
    values["curriculum"]["stages"] = stages
    config = make_model(Recipe.from_dict(values), tokenizer("byte-bpe")).config
    assert (config.question_segment, config.recall_template) == (segment, template)


def test_a_run_goes_segment_by_segment_unless_asked_otherwise(
    finished: tuple[Path, Any],
) -> None:
    """What "auto" measures differs from run to run, and a run is to be repeated from its seed."""
    folder, _ = finished
    words = tokenizer("byte-bpe")
    assert make_model(recipe(folder), words).config.schedule == "sequential"
    asked = recipe(folder, "model.schedule=wavefront")
    assert make_model(asked, words).config.schedule == "wavefront"
    assert AutoModelForCausalLM.from_pretrained(folder / "out").config.schedule == "auto"
