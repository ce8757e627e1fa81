"""Baselines: each reads what its name says, on any model, and leaves the memory model as it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from memlm import MemLMForCausalLM
from memlm.eval import Report, evaluate
from memlm.eval.running import readers
from memlm.eval.running.samples import Composed
from memlm.retrieval import HashingEmbedder
from memlm.retrieval.retriever import RetrievalConfig, read_document, render
from memlm.tasks.haystack import Haystack
from tests.eval.lent import as_it_is

Tokenizer = PreTrainedTokenizerFast
pytestmark = pytest.mark.usefixtures("unpainted")
# Longer than the windows and chunks of these tests, and some segments of 32.
LENGTH = 150
NEW = 6


def small(tokenizer: Tokenizer, **over: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, **over,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def run(
    model: Any, tokenizer: Tokenizer, prose: Haystack, out: Path | None = None, **kwargs: Any
) -> tuple[Report, list[str]]:
    settings: dict[str, Any] = {
        "tasks": ["qa1"], "lengths": [LENGTH], "samples": 5, "batch_size": 3, "haystack": prose,
        "progress": False, "prompt": "answer", "max_new_tokens": NEW,
    }  # fmt: skip
    report = evaluate(model, tokenizer, out=out, **(settings | kwargs))
    if out is None:
        return report, []
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return report, [row["output"] for row in sorted(rows, key=lambda row: row["index"])]


@pytest.mark.parametrize("kind", ["plain", "with memory"])
def test_a_window_leaves_the_model_as_it_was(
    kind: str, tokenizer: Tokenizer, prose: Haystack
) -> None:
    model: Any = small(tokenizer)
    if kind == "with memory":
        model = MemLMForCausalLM.from_base(model, memory=["armt", "infini"], segment_length=32)
    model.train()
    before = as_it_is(model)
    for _ in range(2):
        run(model, tokenizer, prose, baseline="window", window=24, samples=2)
        assert as_it_is(model) == before
    with pytest.raises(ValueError, match="no story of qa3"):
        run(model, tokenizer, prose, baseline="window", window=24, tasks=["qa3"], lengths=[20])
    assert as_it_is(model) == before


def prompts_of(tokenizer: Tokenizer, prose: Haystack, length: int = LENGTH) -> list[list[int]]:
    source = Composed("generated", prose.tokenized(tokenizer), tokenizer, 0)
    prompts = []
    for index in range(5):
        sample = source.get("qa1", length, index)
        ids = [int(token) for piece in sample.ids() for token in piece]
        assert len(ids) == length or length == 0
        prompts.append(ids + tokenizer(f" {sample.question}", add_special_tokens=False).input_ids)
    return prompts


def continued(model: PreTrainedModel, tokenizer: Tokenizer, ids: list[int]) -> str:
    """Greedy continuation by whole forward passes, without cache, batch or padding."""
    said: list[int] = []
    with torch.no_grad():
        for _ in range(NEW):
            token = int(model(torch.tensor([ids + said])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            said.append(token)
    return tokenizer.decode(said, skip_special_tokens=True).strip()


@pytest.mark.parametrize("prefill", [2048, 100])
def test_full_attends_to_the_whole_document(
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path, prefill: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(readers, "PREFILL", prefill)
    model = small(tokenizer)
    expected = [continued(model, tokenizer, ids) for ids in prompts_of(tokenizer, prose)]
    assert len(set(expected)) > 1
    report, said = run(model, tokenizer, prose, tmp_path)
    assert said == expected
    assert report.settings["baseline"] == "full"


def test_full_splits_a_batch_that_does_not_fit(
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path, monkeypatch: Any
) -> None:
    model = small(tokenizer)
    _, together = run(model, tokenizer, prose, tmp_path / "a", batch_size=5)
    sizes = []
    monkeypatch.setattr(readers.WholeReader, "_rows_that_fit", lambda self, tokens: 2)
    generate = type(model).generate
    monkeypatch.setattr(
        type(model),
        "generate",
        lambda self, **kw: sizes.append(len(kw["input_ids"])) or generate(self, **kw),
    )
    _, apart = run(model, tokenizer, prose, tmp_path / "b", batch_size=5)
    assert sizes == [2, 2, 1] and together == apart


def test_last_tokens_are_the_end_of_the_document_alone(
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    model = small(tokenizer)
    expected = [continued(model, tokenizer, ids[-64:]) for ids in prompts_of(tokenizer, prose)]
    _, said = run(model, tokenizer, prose, tmp_path, baseline="last-tokens", window=64)
    assert said == expected
    whole = [continued(model, tokenizer, ids) for ids in prompts_of(tokenizer, prose)]
    assert said != whole


def test_the_former_word_for_a_baseline_still_works(
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small(tokenizer)
    _, said = run(model, tokenizer, prose, tmp_path, baseline="none", window=64)
    assert "'none' is called 'last-tokens' now" in caplog.text
    # A folder of an older version is continued, compared and reported in the present words.
    for name in ("run.json", "summary.json"):
        text = (tmp_path / name).read_text()
        assert '"baseline": "last-tokens"' in text
        (tmp_path / name).write_text(text.replace('"last-tokens"', '"none"'))
    assert Report.load(tmp_path).settings["baseline"] == "last-tokens"
    report, again = run(model, tokenizer, prose, tmp_path, baseline="last-tokens", window=64)
    assert again == said and report.settings["baseline"] == "last-tokens"


def test_the_model_itself_is_named_or_left_unnamed(tokenizer: Tokenizer, prose: Haystack) -> None:
    model = small(tokenizer)
    reports = [
        run(model, tokenizer, prose, **some)[0]
        for some in ({}, {"baseline": None}, {"baseline": "model"})
    ]
    assert [report.settings["baseline"] for report in reports] == ["full"] * 3
    assert reports[0].accuracy == reports[1].accuracy == reports[2].accuracy


def test_a_window_wider_than_the_document_is_full_attention(
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    model = small(tokenizer)
    expected = [continued(model, tokenizer, ids) for ids in prompts_of(tokenizer, prose)]
    _, wide = run(model, tokenizer, prose, tmp_path / "wide", baseline="window", window=1200)
    assert wide == expected
    _, narrow = run(model, tokenizer, prose, tmp_path / "narrow", baseline="window", window=64)
    assert narrow != expected
    # The window leaves the model itself as it was.
    _, after = run(model, tokenizer, prose, tmp_path / "after")
    assert after == expected


def test_a_memory_model_is_judged_without_its_memory_and_keeps_it(
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    base = small(tokenizer)
    expected = [continued(base, tokenizer, ids) for ids in prompts_of(tokenizer, prose)]
    model = MemLMForCausalLM.from_base(base, memory="armt", segment_length=64)
    model.config.question_template = " {question}"
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter.normal_(std=0.3)
    _, with_memory = run(model, tokenizer, prose, tmp_path / "memory")
    for baseline in ("full", "window", "none"):
        window = {} if baseline == "full" else {"window": 1200}
        _, said = run(model, tokenizer, prose, tmp_path / baseline, baseline=baseline, **window)
        # A window of 1200 tokens holds all there is.
        assert said == expected, baseline
    _, again = run(model, tokenizer, prose, tmp_path / "again")
    assert again == with_memory != expected


def test_what_a_baseline_cannot_take_is_left_out_with_the_reason(
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=256,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    kwargs: dict[str, Any] = {"lengths": [100, 300, 100_000]}
    report, said = run(model, tokenizer, prose, tmp_path, **kwargs)
    assert report.accuracy["qa1"].keys() == {"100"} and len(said) == 5
    assert report.skipped["qa1"].keys() == {"300", "100000"}
    assert "256 positions" in report.skipped["qa1"]["300"]
    assert Report.load(tmp_path).skipped == report.skipped
    # Going on finds the same.
    again, _ = run(model, tokenizer, prose, tmp_path, **kwargs)
    assert again.skipped == report.skipped and again.accuracy == report.accuracy


def test_memory_running_out_leaves_the_cell_out_and_the_run_goes_on(
    tokenizer: Tokenizer, prose: Haystack, monkeypatch: Any
) -> None:
    model = small(tokenizer)
    generate = type(model).generate

    def greedy(self: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].shape[1] > 300:
            raise torch.OutOfMemoryError("no more")
        return generate(self, **kwargs)

    monkeypatch.setattr(type(model), "generate", greedy)
    report, _ = run(model, tokenizer, prose, lengths=[500, 100])
    calls = []

    def late(self: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no more")
        return generate(self, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(type(model), "generate", late)
        half, _ = run(model, tokenizer, prose, lengths=[100])
    # Three samples were answered before; a part of a cell is no result.
    assert half.cells == [] and "memory ran out" in half.skipped["qa1"]["100"]
    assert (
        report.accuracy["qa1"].keys() == {"100"}
        and "memory ran out" in report.skipped["qa1"]["500"]
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"baseline": "all"}, "baseline='all' is unknown"),
        ({"window": 5}, "window=5 says what"),
        ({"baseline": "none", "window": 1}, "window=1"),
    ],
)
def test_unknown_baselines_are_refused(
    tokenizer: Tokenizer, prose: Haystack, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(small(tokenizer), tokenizer, prose, **changed)


def test_answers_end_at_any_of_the_models_end_tokens(
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    model = small(tokenizer)
    _, said = run(model, tokenizer, prose, tmp_path / "a")
    (first, *_) = prompts_of(tokenizer, prose)
    with torch.no_grad():
        for _ in range(2):
            ids = [*first, int(model(torch.tensor([first])).logits[0, -1].argmax())]
            end, first = ids[-1], ids
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    _, cut = run(model, tokenizer, prose, tmp_path / "b")
    assert cut[0] == tokenizer.decode(ids[-2:-1]).strip() != said[0]


def test_retrieval_sees_the_passages_and_the_question_alone(
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    model = small(tokenizer)
    config = RetrievalConfig(k=3, size=20)
    _, said = run(model, tokenizer, prose, tmp_path, baseline="retrieval", retrieval=config)
    source = Composed("generated", prose.tokenized(tokenizer), tokenizer, 0)
    for index, output in enumerate(said):
        sample = source.get("qa1", LENGTH, index)
        passages = read_document(sample, HashingEmbedder(), config).recall(sample.question)
        text = f"{render(passages)} {sample.question}"
        assert output == continued(model, tokenizer, tokenizer(text).input_ids)


def test_the_start_token_stands_before_another_models_document_and_not_before_ours(
    tokenizer: Tokenizer, prose: Haystack, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting = copy.deepcopy(tokenizer)
    starting.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", starting.eos_token_id)]
    )
    model, seen = small(tokenizer), []
    generate = type(model).generate
    monkeypatch.setattr(
        type(model), "generate", lambda self, **kw: seen.append(kw) or generate(self, **kw)
    )
    run(model, starting, prose, samples=1)
    assert int(seen[0]["input_ids"][0, 0]) == starting.eos_token_id
    plain = prompts_of(tokenizer, prose)[0]
    assert seen[0]["input_ids"][0, 1:].tolist() == plain
    ours = MemLMForCausalLM.from_base(model, memory="none", segment_length=64)
    seen.clear()
    monkeypatch.setattr(
        type(ours),
        "generate",
        lambda self, **kw: seen.append(kw) or torch.zeros(1, 9999, dtype=torch.long),
    )
    run(ours, starting, prose, samples=1, lengths=["0k"])
    assert int(seen[0]["input_ids"][0, 0]) != starting.eos_token_id


def memory_model(tokenizer: Tokenizer, **memory: Any) -> MemLMForCausalLM:
    torch.manual_seed(0)
    config = {"name": "armt", "num_memory_tokens": 3, "d_mem": 8, "value_std": 0.3, **memory}
    model = MemLMForCausalLM.from_base(small(tokenizer), memory=config, segment_length=32)
    model.config.question_template = " {question}"
    return model.eval()


def remembered(model: MemLMForCausalLM, text: list[int]) -> Any:
    """The state after whole segments, and what is left, by plain calls."""
    whole = len(text) // 32 * 32
    state = None
    with torch.no_grad():
        for start in range(0, whole, 32):
            out = model(torch.tensor([text[start : start + 32]]), memory_state=state)
            state = out.memory_state
    return state, text[whole:]


def answered(model: Any, tokenizer: Tokenizer, state: Any, prompt: list[int]) -> str:
    """What is said after `prompt`, up to the first end token."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, memory_state=state, max_new_tokens=NEW, do_sample=False,
        attention_mask=torch.ones_like(ids), eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    new = out[0, ids.shape[1] :].tolist()
    new = new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new
    return tokenizer.decode(new, skip_special_tokens=True).strip()


# In a batch and a half, where each answer is found a second time by hand.
FEW: dict[str, Any] = {"samples": 3, "batch_size": 2}


@pytest.mark.parametrize("baseline", ["twice", "question-first"])
def test_the_memory_model_with_an_advantage(
    baseline: str, tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    model = memory_model(tokenizer)
    _, said = run(model, tokenizer, prose, tmp_path, baseline=baseline, **FEW)
    source = Composed("generated", prose.tokenized(tokenizer), tokenizer, 0)
    expected = []
    for index in range(3):
        sample = source.get("qa1", LENGTH, index)
        document = [int(token) for piece in sample.ids() for token in piece]
        question = tokenizer(f" {sample.question}", add_special_tokens=False).input_ids
        text = document + document if baseline == "twice" else question + document
        state, rest = remembered(model, text)
        expected.append(answered(model, tokenizer, state, rest + question))
    assert said == expected
    _, plain = run(model, tokenizer, prose, tmp_path / "plain", **FEW)
    assert plain != expected


@pytest.mark.parametrize("baseline", ["passages", "reread"])
def test_recalled_passages_are_read_into_memory(
    baseline: str, tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    model, config = memory_model(tokenizer), RetrievalConfig(k=4, size=16)
    given: dict[str, Any] = {"retrieval": config, **FEW}
    _, said = run(model, tokenizer, prose, tmp_path, baseline=baseline, **given)
    source = Composed("generated", prose.tokenized(tokenizer), tokenizer, 0)
    expected = []
    for index in range(3):
        sample = source.get("qa1", LENGTH, index)
        found = read_document(sample, HashingEmbedder(), config).recall(sample.question)
        shown = tokenizer(render(found), add_special_tokens=False).input_ids
        document = [int(token) for piece in sample.ids() for token in piece]
        question = tokenizer(f" {sample.question}", add_special_tokens=False).input_ids
        state, rest = remembered(model, shown if baseline == "passages" else document + shown)
        expected.append(answered(model, tokenizer, state, rest + question))
    assert said == expected
    other = "reread" if baseline == "passages" else "passages"
    _, otherwise = run(model, tokenizer, prose, tmp_path / other, baseline=other, **given)
    assert otherwise != expected


@pytest.mark.parametrize("window", [40, 1000])
def test_the_surest_chunk_answers(
    window: int, tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    model = small(tokenizer)
    report, said = run(model, tokenizer, prose, tmp_path, baseline="chunks", window=window)
    source = Composed("generated", prose.tokenized(tokenizer), tokenizer, 0)
    expected, chosen = [], []
    for index in range(5):
        sample = source.get("qa1", LENGTH, index)
        document = [int(token) for piece in sample.ids() for token in piece]
        question = tokenizer(f" {sample.question}", add_special_tokens=False).input_ids
        step = window - len(question)
        prompts = [document[at : at + step] + question for at in range(0, len(document), step)]
        with torch.no_grad():
            logits = [model(torch.tensor([ids])).logits[0, -1].float() for ids in prompts]
        entropies = [float(torch.distributions.Categorical(logits=row).entropy()) for row in logits]
        chosen.append(entropies.index(min(entropies)))
        expected.append(continued(model, tokenizer, prompts[chosen[-1]]))
    assert said == expected
    assert len(set(chosen)) > 1 or window == 1000
    assert report.settings["window"] == window


def test_reading_with_a_memory_needs_one(tokenizer: Tokenizer, prose: Haystack) -> None:
    with pytest.raises(ValueError, match=r"baseline='twice' reads with a memory.*LlamaForCausalLM"):
        run(small(tokenizer), tokenizer, prose, baseline="twice")


def test_writes_are_counted_and_survive_a_kill(
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path, monkeypatch: Any
) -> None:
    model = memory_model(tokenizer, write_threshold=0.3)
    report, _ = run(model, tokenizer, prose, tmp_path / "whole")
    rows = [
        json.loads(line) for line in (tmp_path / "whole/samples.jsonl").read_text().splitlines()
    ]
    # Four whole segments in 150 tokens, and with open gates each of them is written.
    assert [row["writes"] for row in rows] == [4] * 5
    assert report.cells[0].writes == 20
    assert report.to_dict()["writes_per_million"] == {"qa1": {"150": 20e6 / 750}}
    assert "150 26,667" in report.writes_note()
    assert Report.load(tmp_path / "whole").cells == report.cells

    reads, read = 0, MemLMForCausalLM.read

    def dying(self: Any, *args: Any) -> Any:
        nonlocal reads
        reads += 1
        if reads == 2:
            raise KeyboardInterrupt
        return read(self, *args)

    monkeypatch.setattr(readers, "KEEP_SECONDS", -1.0)
    monkeypatch.setattr(readers, "AT_ONCE", 2)
    model.config.schedule = "sequential"
    monkeypatch.setattr(MemLMForCausalLM, "read", dying)
    with pytest.raises(KeyboardInterrupt):
        run(model, tokenizer, prose, tmp_path / "killed")
    again, _ = run(model, tokenizer, prose, tmp_path / "killed")
    assert again.cells[0].writes == 20
    # With the gates shut nothing is written, and a folder of the other run is refused.
    model.set_memory_options(write_threshold=2.0)
    shut, _ = run(model, tokenizer, prose, tmp_path / "shut")
    assert shut.cells[0].writes == 0
    with pytest.raises(ValueError, match="model"):
        run(model, tokenizer, prose, tmp_path / "whole", samples=6)
    # Without gates there is nothing to count.
    bare = MemLMForCausalLM.from_base(small(tokenizer), memory="rmt", segment_length=32).eval()
    report, _ = run(bare, tokenizer, prose, tmp_path / "rmt")
    assert report.cells[0].writes is None and report.writes_note() == ""
