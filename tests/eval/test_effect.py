"""The report after training: four readers of the same questions, and what became of the base."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import memlm
from memlm import MemLMForCausalLM
from memlm.cli import main
from memlm.eval import evaluate
from memlm.eval.effect import BASE, MEMORY, NONE, SILENCED, Effect, effect
from memlm.eval.losses.report import Estimate
from memlm.eval.reporting.report import load_rows
from memlm.eval.running.readers import MemoryReader
from memlm.tasks.haystack import Haystack
from tests.cases import FAMILIES, randomise
from tests.tokenizers import TEXT, tokenizer

pytestmark = pytest.mark.usefixtures("unpainted")
TALK = (
    "The meeting went on for hours, and the budget was discussed at length before anybody had tea. "
)


def write_questions(path: Path) -> Path:
    """Facts at once before the question, and many segments before it."""
    rows = [
        {
            "document": f"John moved to the {place}. {TALK * count}",
            "questions": [{"question": "Where is John?", "answer": place}],
        }
        for place in ("kitchen", "garden", "office")
        for count in (0, 30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def prose(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    words = np.random.default_rng(0).choice(TALK.split(), 20_000)
    path.write_text(" ".join(words) + ".", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base with the shipped model's tokenizer."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    _, tok = memlm.load_pretrained("qa1")
    config = LlamaConfig(
        **{**FAMILIES["llama"], "vocab_size": len(tok), "max_position_embeddings": 512}
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tok.save_pretrained(path)
    return path


def test_a_silenced_memory_answers_what_stands_in_the_open_segment_alone(tmp_path) -> None:
    shipped, tok = memlm.load_pretrained("qa1")
    # The memory with gates alone, which a threshold silences; the other one has no weights.
    weights, (_, gated) = shipped.memory.state_dict(), shipped.config.memory
    model = MemLMForCausalLM.from_base(shipped.unload(), memory=gated, segment_length=256)
    model.memory.load_state_dict(weights)
    model.config.question_template = shipped.config.question_template
    model.config.question_segment = "own"
    data = write_questions(tmp_path / "mine.jsonl")
    with_memory = evaluate(model, tok, data=data, progress=False, out=tmp_path / "a")
    assert sum(cell.correct for cell in with_memory.cells) == 6
    silenced = evaluate(
        model, tok, data=data, baseline="silenced", progress=False, out=tmp_path / "b"
    )
    assert silenced.settings["silenced_by"] == "write_threshold"
    assert sum(cell.correct for cell in silenced.cells) < 3
    # The answers are those of a model that has read nothing.
    assert len({row["output"] for row in load_rows(tmp_path / "b")}) == 1
    # The model goes back as it was.
    assert [entry["write_threshold"] for entry in model.config.memory] == [0.4]


def test_a_memory_without_gates_is_silenced_by_fresh_states(tmp_path) -> None:
    torch.manual_seed(0)
    tok = tokenizer("words")
    config = LlamaConfig(**{**FAMILIES["llama"], "vocab_size": len(tok)})
    model = MemLMForCausalLM.from_base(config, memory="rmt", segment_length=16).eval()
    randomise(model)
    text = TEXT + "The end of it."
    data = tmp_path / "mine.jsonl"
    question = {"question": "Where is Mary?", "answer": "kitchen"}
    data.write_text(json.dumps({"document": text, "questions": [question]}), encoding="utf-8")
    asked = {"data": data, "max_new_tokens": 8, "progress": False}
    report = evaluate(model, tok, baseline="silenced", out=tmp_path / "a", **asked)
    assert report.settings["silenced_by"] == "fresh states"
    # As if the document had been what stands in the open segment.
    ids = tok(text, return_tensors="pt").input_ids
    rest = ids[:, ids.shape[1] // 16 * 16 :]
    prompt = tok("\n\nQuestion: Where is Mary?\nAnswer:", return_tensors="pt").input_ids
    prompt = torch.cat([rest, prompt], dim=1)
    said = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
    )[0, prompt.shape[1] :]
    (row,) = load_rows(tmp_path / "a")
    assert rest.shape[1] and row["output"] == tok.decode(said, skip_special_tokens=True).strip()
    evaluate(model, tok, out=tmp_path / "b", **asked)
    assert load_rows(tmp_path / "b")[0]["output"] != row["output"]


@pytest.fixture(scope="module")
def found(base, prose, tmp_path_factory):
    folder = tmp_path_factory.mktemp("effect")
    model, tok = memlm.load_pretrained("qa1")
    data = write_questions(folder / "mine.jsonl")
    before = LlamaForCausalLM.from_pretrained(base)
    return effect(
        model, tok, before, folder / "out", data=data, texts=prose, documents=2, progress=False
    ), folder / "out", before  # fmt: skip


def test_four_readers_answer_the_same_questions(found) -> None:
    result, out, _ = found
    assert list(result.reports) == [MEMORY, SILENCED, NONE, BASE]
    rights = {name: sum(c.correct for c in report.cells) for name, report in result.reports.items()}
    assert rights[MEMORY] == 6 and rights[SILENCED] < 3 and rights[BASE] == 0
    asked = {
        name: sorted(
            (r["question"], r["target"], r["tokens"])
            for r in load_rows(out / name.replace(" ", "-"))
        )
        for name in result.reports
    }
    assert all(rows == asked[MEMORY] for rows in asked.values())
    digests = {report.settings["prompt_digest"] for report in result.reports.values()}
    assert len(digests) == 1


@torch.no_grad()
def test_the_base_is_compared_on_short_texts_by_its_own_predictions(found, prose) -> None:
    """Against transformers' own loss of the plain base on the very texts."""
    result, out, before = found
    written = (out / "losses-before" / "documents.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in written.splitlines()]
    assert len(rows) == 2 and {row["tokens"] for row in rows} == {256}
    _, tok = memlm.load_pretrained("qa1")
    from memlm.eval.losses.texts import choose_texts

    haystack = Haystack.open(prose, "eval")
    texts = choose_texts(haystack, tok, 256, 2, 0, "eval")
    losses = []
    for text in texts:
        ids = torch.from_numpy(text.ids.astype(np.int64))[None]
        losses.append(float(before(input_ids=ids, labels=ids).loss))
    assert result.before.mean == pytest.approx(np.mean(losses), abs=1e-4)
    assert result.change.mean == pytest.approx(result.after.mean - result.before.mean, abs=1e-9)
    # The shipped model learned answers; of text it knows less than random weights do.
    assert result.change.mean > 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (Estimate(0.5, 0.1, 0.9), "worse than the base did: +0.500"),
        (Estimate(-0.5, -0.9, -0.1), "better than the base did: -0.500"),
        (Estimate(0.5, -0.1, 1.1), "as the base did, as far as can be told"),
        (Estimate(0.5), "One text cannot tell"),
        (None, "no untouched base"),
    ],
)
def test_what_became_of_the_base_is_said_in_a_sentence(change, told) -> None:
    assert told in Effect({}, Estimate(2.0), Estimate(2.5), change, ()).kept


def test_the_page_and_the_markdown_say_what_was_found(found) -> None:
    result, out, _ = found
    page = (out / "report.html").read_text(encoding="utf-8")
    text = (out / "report.md").read_text(encoding="utf-8")
    for told in (page, text):
        for part in ("Does it work?", "What did it cost?", "Answers by distance", *result.reports):
            assert part in told
        assert result.kept in told
    assert "| 0 to 64 | 100 (3) |" in text or "| 0 to 256 | 100 (3) |" in text
    ratio = math.exp(result.after.mean) / math.exp(result.before.mean)
    assert f"| {math.exp(result.before.mean):,.1f} |" in text and f"| {ratio:,.2f} times |" in text
    assert {Path(path).name for path in result.files} >= {"report.md", "report.html", "lengths.png"}


def test_a_report_goes_on_without_answering_again(found, prose, monkeypatch) -> None:
    result, out, before = found
    model, tok = memlm.load_pretrained("qa1")

    def never(*_, **__):
        raise AssertionError("a question was answered again")

    monkeypatch.setattr(MemoryReader, "answer", never)
    data = out.parent / "mine.jsonl"
    again = effect(model, tok, before, out, data=data, texts=prose, documents=2, progress=False)
    assert again.change == result.change
    assert {n: r.accuracy for n, r in again.reports.items()} == {
        n: r.accuracy for n, r in result.reports.items()
    }


def test_the_command_line_reports_without_a_base_where_there_was_none(tmp_path, capsys) -> None:
    data = write_questions(tmp_path / "mine.jsonl")
    asked = ["--data", str(data), "--samples", "2", "--out", str(tmp_path / "out")]
    assert main(["eval", "effect", "qa1", *asked]) == 0
    told = capsys.readouterr().out
    assert "memory silenced" in told and "There is no untouched base" in told
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "the trained base, which sees the last 256 tokens alone" in text
    again = [*asked[:-1], str(tmp_path / "other"), "--none", "qa1"]
    assert main(["eval", "effect", "qa1", *again]) == 0
    # Judged as it is: this one has a memory, and uses it.
    text = (tmp_path / "other" / "report.md").read_text(encoding="utf-8")
    assert "a model trained without memory" in text and "| none | 100 " in text
    assert "untouched base\n" not in told and str(tmp_path / "out" / "report.html") in told
    assert main(["eval", "effect", "qa1", *asked, "--base", "./nowhere"]) == 2
    assert "--base" in capsys.readouterr().err


def test_what_has_no_memory_is_refused(base, tmp_path) -> None:
    plain, tok = LlamaForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    with pytest.raises(ValueError, match="has no memory to judge"):
        effect(plain, tok, None, tmp_path)
    model, tok = memlm.load_pretrained("qa1")
    with pytest.raises(ValueError, match="base has memories itself"):
        effect(model, tok, model, tmp_path)
    assert math.isfinite(model.config.memory[1]["write_threshold"])
