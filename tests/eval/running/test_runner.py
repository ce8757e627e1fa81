"""The runner: exact streams, resuming, refusals, and what it writes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast

from memlm import MemLMForCausalLM
from memlm.eval import Report, evaluate
from memlm.eval.running import batches, readers
from memlm.eval.running.samples import Composed
from memlm.retrieval.embedders import HashingEmbedder
from memlm.retrieval.retriever import RetrievalConfig
from memlm.tasks.haystack import Haystack
from memlm.tasks.lengths import parse_length
from tests.eval.fake import SolvingModel
from tests.fresh import Fresh

TIMINGS = ("seconds", "data_seconds", "peak_memory_bytes")
Tokenizer = PreTrainedTokenizerFast
pytestmark = pytest.mark.usefixtures("unpainted")


def run(
    model: Any, tokenizer: Tokenizer, prose: Haystack, out: Path | None = None, **kwargs: Any
) -> Report:
    settings: dict[str, Any] = {
        "tasks": ["qa1"], "lengths": ["0k", "1k"], "samples": 7, "batch_size": 3,
        "haystack": prose, "progress": False,
    }  # fmt: skip
    return evaluate(model, tokenizer, out=out, **(settings | kwargs))


def samples_of(out: Path) -> list[dict[str, Any]]:
    """The rows without their timings, in the order of task, length and index; written as answers came."""
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: (row["task"], parse_length(row["length"]), row["index"]))
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


@pytest.mark.parametrize("segment_length", [1, 7, 32, 100, 5000])
def test_a_model_that_keeps_everything_is_always_right(
    segment_length: int, tokenizer: Tokenizer, prose: Haystack
) -> None:
    model = SolvingModel(tokenizer, segment_length)
    # A segment per token of few tokens.
    length = 700 if segment_length == 1 else 2000
    report = run(model, tokenizer, prose, tasks=["qa1", "qa2", "qa3"], lengths=["0k", length])
    assert report.accuracy == {t: {"0k": 1.0, f"{length}": 1.0} for t in ("qa1", "qa2", "qa3")}
    assert all(cell.exact == cell.published == cell.samples == 7 for cell in report.cells)
    assert [cell.tokens for cell in report.cells if cell.length != "0k"] == [7 * length] * 3


def test_accuracy_counts_exactly_the_samples_that_are_right(
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    span = 300
    report = run(SolvingModel(tokenizer, span=span), tokenizer, prose, tmp_path, samples=40)
    rows = [row for row in samples_of(tmp_path) if row["length"] == "1k"]
    right = sum(row["output"] == row["target"] for row in rows)
    assert report.accuracy["qa1"] == {"0k": 1.0, "1k": right / 40}
    assert 0 < right < 40
    # What it forgot is what it got wrong: the newest fact lies further back than its span.
    for row in rows:
        if row["fact_offsets"][-1] < row["tokens"] - span:
            assert row["output"] == "nowhere"


def test_segments_are_whole_and_hold_the_whole_batch(tokenizer: Tokenizer, prose: Haystack) -> None:
    model = SolvingModel(tokenizer, segment_length=100)
    run(model, tokenizer, prose, lengths=[1050], samples=5)
    assert model.batches == [(3, 100)] * 10 + [(2, 100)] * 10


def test_a_question_in_a_segment_of_its_own_comes_behind_all_that_was_read(
    tokenizer: Tokenizer, prose: Haystack
) -> None:
    model = SolvingModel(tokenizer, segment_length=100, question_segment="own")
    report = run(model, tokenizer, prose, lengths=["0k", 250], samples=3)
    assert report.accuracy["qa1"] == {"0k": 1.0, "250": 1.0}
    assert model.batches[:3] == [(3, 100), (3, 100), (3, 50)]


def test_a_sample_depends_on_seed_task_length_and_index_alone(
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    model = SolvingModel(tokenizer)
    run(model, tokenizer, prose, tmp_path / "a", lengths=["1k"], samples=6, batch_size=4)
    run(
        model, tokenizer, prose, tmp_path / "b",
        tasks=["qa2", "qa1"], lengths=["2k", "1k"], samples=4, batch_size=1,
    )  # fmt: skip
    run(model, tokenizer, prose, tmp_path / "c", lengths=["1k"], samples=4, seed=1)

    def chosen(name: str) -> list[dict[str, Any]]:
        rows = samples_of(tmp_path / name)
        return [r for r in rows if (r["task"], r["length"]) == ("qa1", "1k")][:4]

    assert chosen("a") == chosen("b")
    assert chosen("a") != chosen("c")


def test_stories_are_the_same_at_every_length(
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    run(SolvingModel(tokenizer), tokenizer, prose, tmp_path, samples=10)
    rows = samples_of(tmp_path)
    asked = {
        length: [(r["index"], r["question"], r["target"]) for r in rows if r["length"] == length]
        for length in ("0k", "1k")
    }
    assert asked["0k"] == asked["1k"]
    assert len({len(row["fact_offsets"]) for row in rows}) == 5


@pytest.mark.parametrize("fail_at", [1, 2, 4, 5])
def test_an_interrupted_run_ends_like_an_unbroken_one(
    fail_at: int, tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = run(SolvingModel(tokenizer), tokenizer, prose, whole)
    with pytest.raises(KeyboardInterrupt):
        run(SolvingModel(tokenizer, fail_at=fail_at), tokenizer, prose, broken)
    assert not (broken / "summary.json").exists()
    report = run(SolvingModel(tokenizer), tokenizer, prose, broken)
    assert samples_of(broken) == samples_of(whole)
    assert report.accuracy == expected.accuracy


def test_finished_samples_are_not_run_again(
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    run(SolvingModel(tokenizer), tokenizer, prose, tmp_path)
    before = (tmp_path / "samples.jsonl").read_bytes()
    idle = SolvingModel(tokenizer)
    run(idle, tokenizer, prose, tmp_path)
    assert idle.calls == 0 and (tmp_path / "samples.jsonl").read_bytes() == before
    run(SolvingModel(tokenizer), tokenizer, prose, tmp_path, samples=9, lengths=["0k", "1k", 600])
    after = (tmp_path / "samples.jsonl").read_bytes()
    assert after.startswith(before) and len(samples_of(tmp_path)) == 27


def test_a_folder_reports_what_earlier_calls_left_in_it(
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    first = run(SolvingModel(tokenizer), tokenizer, prose, tmp_path, lengths=["1k"], samples=6)
    both = run(SolvingModel(tokenizer), tokenizer, prose, tmp_path, lengths=["2k"], samples=2)
    assert {cell.length: cell.samples for cell in both.cells} == {"2k": 2, "1k": 6}
    assert first.cells[0] == both.cells[1]
    assert Report.load(tmp_path).cells == both.cells
    fewer = run(SolvingModel(tokenizer), tokenizer, prose, tmp_path, lengths=["1k"], samples=4)
    assert {cell.length: cell.samples for cell in fewer.cells} == {"1k": 4, "2k": 2}


@pytest.mark.parametrize("cut", [1, 2, 40, "half a batch"])
def test_a_line_cut_short_by_a_kill_is_dropped_and_redone(
    cut: int | str, tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    run(SolvingModel(tokenizer), tokenizer, prose, tmp_path)
    path = tmp_path / "samples.jsonl"
    whole, content = samples_of(tmp_path), path.read_bytes()
    lines = content.splitlines(keepends=True)
    path.write_bytes(content[:-cut] if isinstance(cut, int) else b"".join(lines[:5]) + lines[5][:9])
    run(SolvingModel(tokenizer), tokenizer, prose, tmp_path)
    assert samples_of(tmp_path) == whole


def test_a_last_line_of_rubbish_is_dropped_and_one_in_the_middle_refused(
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    run(SolvingModel(tokenizer), tokenizer, prose, tmp_path)
    path = tmp_path / "samples.jsonl"
    whole, content = samples_of(tmp_path), path.read_bytes()
    path.write_bytes(content + b'{"task": "qa1"}\n')
    run(SolvingModel(tokenizer), tokenizer, prose, tmp_path)
    assert samples_of(tmp_path) == whole
    path.write_bytes(b"rubbish\n" + content)
    with pytest.raises(ValueError, match=r"samples\.jsonl' line 1 is damaged"):
        run(SolvingModel(tokenizer), tokenizer, prose, tmp_path)
    assert path.read_bytes() == b"rubbish\n" + content


KILLED = """
import sys, time
from tests.eval.fake import SolvingModel
from transformers import PreTrainedTokenizerFast
from memlm.eval import evaluate, Haystack

class Slow(SolvingModel):
    def forward(self, *args, **kwargs):
        time.sleep(0.02)
        return super().forward(*args, **kwargs)

tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
evaluate(Slow(tokenizer), tokenizer, ["qa1"], ["1k"], 60, haystack=Haystack.open(sys.argv[2], "all"),
         out=sys.argv[3], batch_size=3, progress=False)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_process_is_resumed(
    tokenizer: Tokenizer, prose: Haystack, prose_folder: Path, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "out"
    arguments = [str(tmp_path / "tokenizer"), str(prose_folder), str(out)]
    running = Fresh(tmp_path, KILLED, *arguments)
    log = out / "samples.jsonl"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and (not log.exists() or log.stat().st_size == 0):
        assert running.process.exitcode is None, running.result()
        time.sleep(0.01)
    running.process.kill()
    running.process.join()
    done = len(log.read_bytes().splitlines())
    assert 0 < done < 60
    kwargs: dict[str, Any] = {"lengths": ["1k"], "samples": 60}

    class Slow(SolvingModel):
        """Named as the killed process's model, whose settings must match."""

    run(Slow(tokenizer), tokenizer, prose, out, **kwargs)
    run(SolvingModel(tokenizer), tokenizer, prose, tmp_path / "whole", **kwargs)
    assert samples_of(out) == samples_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, "seed=0, this one has 1"),
        ({"max_new_tokens": 3}, "max_new_tokens=20, this one has 3"),
        ({"haystack": "builtin"}, "haystack="),
        ({"distance": 100, "lengths": ["1k"]}, "distance=None, this one has 100"),
        ({"position": (0.0, 0.5)}, r"position=\[0.0, 1.0\], this one has \[0.0, 0.5\]"),
        ({"composition": "published", "lengths": ["1k"]}, "composition='exact'"),
    ],
)
def test_a_folder_of_other_settings_is_refused(
    changed: dict[str, Any], named: str, tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    run(SolvingModel(tokenizer), tokenizer, prose, tmp_path, samples=2)
    before = (tmp_path / "samples.jsonl").read_bytes()
    with pytest.raises(ValueError, match=named):
        run(SolvingModel(tokenizer), tokenizer, prose, tmp_path, samples=2, **changed)
    assert (tmp_path / "samples.jsonl").read_bytes() == before


def test_a_folder_of_another_model_is_refused(
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    run(SolvingModel(tokenizer), tokenizer, prose, tmp_path, samples=2)
    other = SolvingModel(tokenizer)
    with torch.no_grad():
        other.weight[0] = 1.0
    for model in (other, SolvingModel(tokenizer, segment_length=16)):
        with pytest.raises(ValueError, match="holds a run with model="):
            run(model, tokenizer, prose, tmp_path, samples=2)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"no run\.json"):
        run(SolvingModel(tokenizer), tokenizer, prose, tmp_path, samples=2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tasks": ["qa21"]}, "unknown task 'qa21'"),
        ({"tasks": []}, "at least one"),
        ({"lengths": ["4q"]}, "unknown length '4q'"),
        ({"samples": 0}, "samples=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"seed": -1}, "seed=-1"),
        ({"tasks": ["passkeys"]}, "unknown task 'passkeys'"),
        ({"prompt": "chat"}, "chat template"),
        ({"embedder": HashingEmbedder()}, "embedder finds passages to recall"),
        ({"split": "train"}, "haystack is a Haystack"),
        ({"data": "some/where", "haystack": "builtin", "stories": "a"}, "stories='a' says how"),
        ({"baseline": "everything"}, "baseline='everything'"),
        ({"stories": "no/such/folder"}, "'no/such/folder' does not exist"),
        ({"haystack": "no/such/file"}, "haystack 'no/such/file'"),
        ({"tasks": ["qa3"], "lengths": [20]}, "no story of qa3"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    changed: dict[str, Any], message: str, tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    model = SolvingModel(tokenizer)
    with pytest.raises(ValueError, match=message):
        run(model, tokenizer, prose, tmp_path / "out", **changed)
    assert model.calls == 0 and not (tmp_path / "out").exists()


def test_a_tokenizer_without_end_token_or_a_file_as_folder_is_refused(
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no end token"):
        run(SolvingModel(tokenizer), endless, prose)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        run(SolvingModel(tokenizer), tokenizer, prose, tmp_path / "file")


def test_stories_from_a_folder_repeat_when_too_few_and_the_summary_says_so(
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    lines = [
        "1 Mary moved to the office.\n2 John moved to the garden.\n"
        f"3 Where is {actor}? \t{place}\t{line}\n"
        for actor, place, line in (("Mary", "office", 1), ("John", "garden", 2))
    ]
    (tmp_path / "qa1_single_test.txt").write_text("".join(lines))
    report = run(
        SolvingModel(tokenizer), tokenizer, prose, tmp_path / "out", stories=tmp_path, samples=5
    )
    assert report.accuracy["qa1"]["1k"] == 1.0
    note = report.stories["qa1"]["1k"]
    assert note == {
        "source": "qa1_single_test.txt", "stories": 2, "too_long_left_out": 0, "repeated": True,
    }  # fmt: skip
    questions = [row["question"] for row in samples_of(tmp_path / "out") if row["length"] == "1k"]
    assert len(set(questions[:2])) == 2 and questions[:2] == questions[2:4]


def test_original_stories_are_evaluated(
    original_stories: Path, tokenizer: Tokenizer, prose: Haystack
) -> None:
    report = run(
        SolvingModel(tokenizer), tokenizer, prose, tasks=["qa1", "qa2", "qa3"], lengths=["4k"],
        stories=original_stories, samples=20,
    )  # fmt: skip
    assert report.accuracy == {t: {"4k": 1.0} for t in ("qa1", "qa2", "qa3")}


def test_stories_that_do_not_fit_are_drawn_again(
    tokenizer: Tokenizer, prose: Haystack, original_stories: Path
) -> None:
    noise = prose.tokenized(tokenizer)
    for stories in ("generated", original_stories):
        source = Composed(stories, noise, tokenizer, 0)
        source.prepare("qa3", 300, 50)
        for index in range(50):
            facts = source.story("qa3", 300, index).facts
            assert sum(len(noise.encode(f" {fact}")) for fact in facts) <= 300


@pytest.mark.usefixtures("painted")
def test_the_summary_says_all_and_loads_again(
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    report = run(SolvingModel(tokenizer), tokenizer, prose, tmp_path, seed=3)
    assert [Path(f).name for f in report.files] == [
        "samples.jsonl", "summary.json", "accuracy.png",
    ]  # fmt: skip
    assert all(Path(f).stat().st_size > 0 for f in report.files)
    assert {path.name for path in tmp_path.iterdir()} == {
        "samples.jsonl", "summary.json", "accuracy.png", "run.json",
    }  # fmt: skip
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["accuracy"] == {"qa1": {"0k": 1.0, "1k": 1.0}}
    assert summary["counts"]["qa1"]["1k"] == {"correct": 7, "samples": 7}
    assert 0 < summary["interval"]["qa1"]["1k"][0] < summary["interval"]["qa1"]["1k"][1] <= 1
    assert summary["seed"] == 3
    assert summary["tokens_per_second"]["qa1"]["1k"] > 0
    assert summary["peak_memory_bytes"]["qa1"]["1k"] > 2**20
    assert 0 <= summary["data_wait_share"]["qa1"]["1k"] <= 1
    assert {"memlm", "torch", "transformers", "python"} <= summary["versions"].keys()
    loaded = Report.load(tmp_path)
    assert loaded.accuracy == report.accuracy and loaded.cells == report.cells


def test_training_mode_is_restored(tokenizer: Tokenizer, prose: Haystack) -> None:
    model = SolvingModel(tokenizer).train()
    run(model, tokenizer, prose, samples=1)
    assert model.training
    with pytest.raises(KeyboardInterrupt):
        run(SolvingModel(tokenizer, fail_at=1), tokenizer, prose)


@pytest.fixture(scope="module")
def tiny(tokenizer: Tokenizer) -> MemLMForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = MemLMForCausalLM.from_base(
        config, memory="armt", segment_length=64, schedule="sequential"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def test_a_real_model_answers_alike_in_any_batch(
    tiny: MemLMForCausalLM, tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    for name, batch_size in (("a", 1), ("b", 4)):
        run(
            tiny, tokenizer, prose, tmp_path / name,
            samples=4, lengths=["0k", 500], batch_size=batch_size, max_new_tokens=5,
        )  # fmt: skip
    assert samples_of(tmp_path / "a") == samples_of(tmp_path / "b")
    assert len({row["output"] for row in samples_of(tmp_path / "a")}) > 1


def test_streaming_a_document_equals_generating_after_all_of_it(
    tiny: MemLMForCausalLM, tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    run(tiny, tokenizer, prose, tmp_path, samples=3, lengths=[500])
    source = Composed("generated", prose.tokenized(tokenizer), tokenizer, 0)
    for row in samples_of(tmp_path):
        sample = source.get("qa1", 500, row["index"])
        ids = torch.cat([torch.tensor(piece) for piece in sample.ids()])
        prompt = torch.cat(
            [ids, torch.tensor(sample.question_ids(tiny.config.question_template))]
        ).long()[None]
        said = tiny.generate(
            input_ids=prompt, max_new_tokens=20, do_sample=False,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        text = tokenizer.decode(said[0, prompt.shape[1] :], skip_special_tokens=True).strip()
        assert text == row["output"]


class Broken(Exception):
    """Stands for a kill."""


@pytest.fixture
def kept_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(readers, "AT_ONCE", 1)


def break_at(monkeypatch: pytest.MonkeyPatch, model: Any, segment: int) -> list[int]:
    """Let the model's reading break off behind so many segments; counts those it reads."""
    read, seen = model.read, [0]

    def counting(segments: Any, *given: Any) -> Any:
        def watched() -> Any:
            for one in segments:
                if seen[0] == segment:
                    raise Broken
                seen[0] += 1
                yield one

        return read(watched(), *given)

    monkeypatch.setattr(model, "read", counting)
    return seen


# Seven whole segments per document, three batches of two.
HALF_READ: dict[str, Any] = {"lengths": [450], "samples": 6, "batch_size": 2, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def half_read_whole(
    tiny: MemLMForCausalLM,
    tokenizer: Tokenizer,
    prose: Haystack,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[str, Any]]:
    """The samples of a run that nothing broke."""
    out = tmp_path_factory.mktemp("whole")
    run(tiny, tokenizer, prose, out, **HALF_READ)
    return samples_of(out)


@pytest.mark.parametrize("at", [1, 6, 7, 8, 20])
def test_a_document_half_read_is_gone_on_with(
    at: int,
    half_read_whole: list[dict[str, Any]],
    tiny: MemLMForCausalLM,
    tokenizer: Tokenizer,
    prose: Haystack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept_often: None,
) -> None:
    out = tmp_path / "broken"
    with monkeypatch.context() as patched:
        break_at(patched, tiny, at)
        with pytest.raises(Broken):
            run(tiny, tokenizer, prose, out, **HALF_READ)
    seen = break_at(monkeypatch, tiny, -1)
    run(tiny, tokenizer, prose, out, **HALF_READ)
    # At most the segment under way was lost.
    assert seen[0] in (3 * 7 - at, 3 * 7 - at + 1)
    assert samples_of(out) == half_read_whole
    assert not (out / "unfinished.safetensors").exists()


@pytest.mark.parametrize("harm", ["none", "damaged", "of other texts"])
def test_a_kept_state_serves_fewer_rows_and_a_damaged_one_costs_only_time(
    harm: str,
    tiny: MemLMForCausalLM,
    tokenizer: Tokenizer,
    prose: Haystack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept_often: None,
) -> None:
    kwargs: dict[str, Any] = {"lengths": [450], "samples": 4, "max_new_tokens": 4}
    with monkeypatch.context() as patched:
        break_at(patched, tiny, 5)
        with pytest.raises(Broken):
            run(tiny, tokenizer, prose, tmp_path / "a", **kwargs)
    kept = tmp_path / "a" / "unfinished.safetensors"
    if harm == "damaged":
        kept.write_bytes(kept.read_bytes()[:-100])
    if harm == "of other texts":
        kwargs["lengths"] = [449]
    kwargs["batch_size"] = 2
    seen = break_at(monkeypatch, tiny, -1)
    run(tiny, tokenizer, prose, tmp_path / "a", **kwargs)
    # Five segments of three texts were kept: two more of the first two, then the third beside the fourth.
    assert seen[0] == (2 + 7 if harm == "none" else 2 * 7)
    run(tiny, tokenizer, prose, tmp_path / "whole", **kwargs)
    assert samples_of(tmp_path / "a") == samples_of(tmp_path / "whole")


def test_recalled_passages_bring_back_what_was_forgotten(
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    kwargs: dict[str, Any] = {"lengths": ["2k"], "samples": 20}
    forgetful = SolvingModel(tokenizer, span=420)
    alone = run(forgetful, tokenizer, prose, tmp_path / "alone", **kwargs)
    recall = RetrievalConfig(k=6, size=24)
    recalling = run(forgetful, tokenizer, prose, tmp_path / "both", retrieval=recall, **kwargs)
    assert alone.accuracy["qa1"]["2k"] + 0.2 < recalling.accuracy["qa1"]["2k"]
    for row in samples_of(tmp_path / "both"):
        assert len(row["recalled"]) == 6 and row["recalled"] == sorted(row["recalled"])
        assert 0 <= row["supporting_recalled"] <= 1
        # Where the newest fact on the person was recalled the answer is right.
        assert row["supporting_recalled"] < 1 or row["correct"]
    assert all("recalled" not in row for row in samples_of(tmp_path / "alone"))
    settings = json.loads((tmp_path / "both" / "run.json").read_text())
    assert settings["retrieval"]["k"] == 6 and settings["embedder"]
    with pytest.raises(ValueError, match="retrieval="):
        run(forgetful, tokenizer, prose, tmp_path / "both", retrieval=3, **kwargs)
    # Nor is a run with passages gone on with without any.
    with pytest.raises(ValueError, match=r"retrieval=.*this one has None"):
        run(forgetful, tokenizer, prose, tmp_path / "both", **kwargs)


def test_samples_are_recalled_from_alone(
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    # The same sample recalls the same whatever stands beside it in the batch.
    for name, batch_size in (("a", 1), ("b", 5)):
        run(
            SolvingModel(tokenizer), tokenizer, prose, tmp_path / name,
            lengths=["1k"], samples=5, batch_size=batch_size, retrieval=4,
        )  # fmt: skip
    assert samples_of(tmp_path / "a") == samples_of(tmp_path / "b")


def test_little_is_made_ahead_of_the_model(
    tokenizer: Tokenizer, prose: Haystack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "AHEAD", 500)
    monkeypatch.setattr(readers, "AT_ONCE", 1)
    made, leads = [0], []
    prepare = readers.MemoryReader.prepare

    def counting(self: Any, *args: Any) -> Any:
        for piece in prepare(self, *args):
            made[0] += piece.size
            yield piece

    class Slow(SolvingModel):
        read_tokens = 0

        def read(self, segments: Any, *given: Any) -> Any:
            def watched() -> Any:
                for segment in segments:
                    time.sleep(0.01)
                    leads.append(made[0] - self.read_tokens)
                    self.read_tokens += segment.ids.numel()
                    yield segment

            return super().read(watched(), *given)

    monkeypatch.setattr(readers.MemoryReader, "prepare", counting)
    run(Slow(tokenizer, 50), tokenizer, prose, lengths=["2k"], samples=2, batch_size=2)
    # In store, in the maker's hand, in the model's, and the prompts.
    assert 300 <= max(leads) <= 500 + 3 * 100
