"""Perplexity: streamed losses are the whole document's, in constant memory, resumed to equal numbers."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from memlm.eval.losses import measure as module
from memlm.eval.losses import texts as texts_module
from memlm.eval.losses.measure import perplexity, stream_losses
from memlm.eval.losses.report import Estimate, PerplexityReport, student_t, summarise
from memlm.eval.losses.texts import choose_texts
from memlm.modeling import MemLMForCausalLM
from memlm.tasks.haystack import Document, Haystack
from tests.cases import (
    A_SITE_EACH,
    CASES,
    FAMILIES,
    SEGMENT,
    base_model,
    by_default,
    memory_model,
    tokens,
)
from tests.eval.lent import as_it_is

Tokenizer = PreTrainedTokenizerFast
VOCAB = 700
pytestmark = pytest.mark.usefixtures("unpainted")


def reference(model: MemLMForCausalLM, ids: Tensor) -> np.ndarray:
    """Loss of every prediction by reading the whole document in one call, (tokens - 1,)."""
    with torch.no_grad():
        said = model(ids[None]).logits[0].log_softmax(dim=-1)
    return -said[:-1].gather(1, ids[1:, None])[:, 0].numpy()


def streamed(
    model: MemLMForCausalLM, rows: list[Tensor], baseline: bool = True
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    pieces = list(stream_losses(model, [row.numpy() for row in rows], baseline=baseline))
    found: list[list[np.ndarray]] = []
    for name in ("loss", "alone") if baseline else ("loss",):
        table = np.concatenate([getattr(piece, name) for piece in pieces], axis=1)
        found.append([row[~np.isnan(row)] for row in table])
    return found[0], found[-1]


# That calls compute the same however a document or a batch is cut is a law of every memory: here by default
# one of each site, and with last segments that are full, or all but, two.
@pytest.mark.parametrize(
    ("length", "memory"),
    [
        pytest.param(length, memory, marks=() if chosen else pytest.mark.slow)
        for length in (5 * SEGMENT, 5 * SEGMENT + 1, 5 * SEGMENT - 1)
        for memory in (*CASES, "none")
        for chosen in [
            memory in (*A_SITE_EACH, "none")
            if length % SEGMENT == 1
            else memory in ("rmt", "infini")
        ]
    ],
)
def test_streamed_losses_are_those_of_the_whole_document(memory: str, length: int) -> None:
    model = memory_model("llama", memory)
    ids = tokens(1, length)[0]
    (loss,), _ = streamed(model, [ids])
    np.testing.assert_allclose(loss, reference(model, ids), rtol=0, atol=1e-10)


@pytest.mark.parametrize("memory", by_default(CASES, A_SITE_EACH))
def test_the_baseline_reads_every_segment_from_an_empty_memory(memory: str) -> None:
    model = memory_model("llama", memory)
    ids = tokens(1, 4 * SEGMENT + 2)[0]
    (loss,), (alone,) = streamed(model, [ids])
    expected = []
    for start in range(0, len(ids) - 1, SEGMENT):
        piece = ids[start : start + SEGMENT]
        with torch.no_grad():
            said = model(piece[None]).logits[0].log_softmax(dim=-1)
        following = ids[start + 1 : start + 1 + SEGMENT]
        expected += [-float(said[i, token]) for i, token in enumerate(following)]
    np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-10)
    assert (alone[:SEGMENT] == loss[:SEGMENT]).all()
    assert np.abs(alone[SEGMENT:] - loss[SEGMENT:]).max() > 1e-6


@pytest.mark.parametrize("memory", by_default(CASES, A_SITE_EACH))
def test_rows_of_a_ragged_batch_are_rows_alone(memory: str) -> None:
    model = memory_model("llama", memory)
    lengths = [1, 2, SEGMENT, SEGMENT + 1, 3 * SEGMENT - 1, 4 * SEGMENT]
    rows = [tokens(1, n, seed=n)[0] for n in lengths]
    together = streamed(model, rows)
    for number, row in enumerate(rows):
        assert all(len(found[number]) == len(row) - 1 for found in together)
        if len(row) > 1:
            for found, (alone,) in zip(together, streamed(model, [row]), strict=True):
                np.testing.assert_allclose(found[number], alone, rtol=0, atol=1e-10)


def test_logits_of_one_segment_at_most_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = memory_model("llama", "armt")
    made: list[tuple[int, ...]] = []
    logits = model.backbone.logits

    def watch(hidden: Tensor) -> Tensor:
        made.append(tuple(hidden.shape[:2]))
        return logits(hidden)

    monkeypatch.setattr(model.backbone, "logits", watch)
    streamed(model, list(tokens(2, 20 * SEGMENT)))
    assert set(made) == {(2, SEGMENT)} and len(made) == 39


def test_one_token_predicts_nothing_and_none_at_all_is_refused() -> None:
    model = memory_model("llama", "armt")
    assert list(stream_losses(model, [np.array([3])])) == []
    for rows in ([], [np.zeros(0, dtype=np.int64)]):
        with pytest.raises(ValueError, match="give documents of a token or more"):
            list(stream_losses(model, rows))


# The whole measurement.


@pytest.fixture(scope="module")
def model() -> MemLMForCausalLM:
    return memory_model("llama", "armt", segment_length=16, vocab_size=VOCAB)


def run(model: Any, tokenizer: Tokenizer, prose: Haystack, **kwargs: Any) -> PerplexityReport:
    settings: dict[str, Any] = {
        "haystack": prose, "length": 200, "documents": 5, "batch_size": 2, "progress": False,
    }  # fmt: skip
    return perplexity(model, tokenizer, **(settings | kwargs))


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "documents.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.usefixtures("painted")
def test_bins_are_the_means_of_every_prediction(
    model: MemLMForCausalLM, tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    report = run(model, tokenizer, prose, out=tmp_path)
    texts = choose_texts(prose, tokenizer, 200, 5, seed=0)
    table = [reference(model, torch.from_numpy(text.ids).long()) for text in texts]
    starts = [0, 16, 32, 64, 128, 199]
    assert [(b.start, b.end) for b in report.bins] == list(itertools.pairwise(starts))
    for found in report.bins:
        means = [losses[found.start : found.end].mean() for losses in table]
        assert found.loss.mean == pytest.approx(np.mean(means), abs=1e-10)
        half = 2.77645 * np.std(means, ddof=1) / math.sqrt(5)
        assert found.loss.high - found.loss.mean == pytest.approx(half, rel=1e-6)
        assert found.documents == 5 and found.predictions == 5 * (found.end - found.start)
        held = [text.sizes[found.start + 1 : found.end + 1].sum() for text in texts]
        bits = [
            losses[found.start : found.end].sum() / math.log(2) / size
            for losses, size in zip(table, held, strict=True)
        ]
        assert found.bits_per_byte.mean == pytest.approx(np.mean(bits), abs=1e-10)
    assert report.bins[0].gain == Estimate(0.0, 0.0, 0.0)
    changes = [losses[128:199].mean() - losses[16:32].mean() for losses in table]
    assert report.change.mean == pytest.approx(np.mean(changes), abs=1e-10)
    assert report.perplexity == pytest.approx(math.exp(np.mean(table)), rel=1e-9)
    saved = json.loads((tmp_path / "perplexity.json").read_text())
    assert saved["verdict"] == report.verdict and len(saved["bins"]) == 5
    assert (tmp_path / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert [Path(name).name for name in report.files] == [
        "documents.jsonl", "perplexity.json", "perplexity.png",
    ]  # fmt: skip
    table_lines = report.to_markdown().split("\n")
    assert table_lines[2].startswith("| 0-15 | 1 | 5 | ") and "| 9-13 |" in table_lines[6]
    assert report.verdict in table_lines


def test_training_mode_is_left_as_it_was(
    model: MemLMForCausalLM, tokenizer: Tokenizer, prose: Haystack
) -> None:
    model.train()
    try:
        run(model, tokenizer, prose, documents=1, length=40)
        assert model.training
    finally:
        model.eval()


def test_texts_count_every_byte_once(tokenizer: Tokenizer) -> None:
    sentences = ["Naïve cafés — déjà vu.", "Plain words follow it.", "日本語の文。"] * 30
    haystack = Haystack("given", [Document("one", sentences)])
    (text,) = choose_texts(haystack, tokenizer, 300, 1, seed=0)
    assert len(text.ids) == len(text.sizes) == 300 and text.sizes.min() >= 0
    encoded = [tokenizer(f" {sentence}")["input_ids"] for sentence in sentences[:3]]
    for start, sentence, ids in zip((0, len(encoded[0])), sentences, encoded, strict=False):
        held = text.sizes[start : start + len(ids)].sum()
        assert held == len(f" {sentence}".encode())


def test_a_tokenizer_that_knows_no_spans_shares_bytes_evenly() -> None:
    assert texts_module._bytes_of(" ab cd", 4, None) == [1, 2, 1, 2]
    assert texts_module._bytes_of("", 0, None) == []
    assert sum(texts_module._bytes_of(" é x ", 3, [(0, 2), (0, 2), (2, 4)])) == len(
        " é x ".encode()
    )


def test_long_documents_are_taken_before_short_ones_are_joined(tokenizer: Tokenizer) -> None:
    long = [f"Sentence number {i} of the long one goes on and on." for i in range(60)]
    short = [f"A short one says {i}." for i in range(6)]
    documents = [Document(f"short-{i}", short) for i in range(30)]
    documents.insert(7, Document("long", long))
    haystack = Haystack("given", documents)
    texts = choose_texts(haystack, tokenizer, 300, 3, seed=0)
    assert [(text.name, text.joined > 1) for text in texts] == [
        ("long", False), ("short-0", True), (f"short-{texts[1].joined}", True),
    ]  # fmt: skip
    # The first of more documents are the same ones.
    more = choose_texts(haystack, tokenizer, 300, 99, seed=0)
    assert [t.digest for t in more[:3]] == [t.digest for t in texts] and 3 <= len(more) < 99


def test_blocks_of_one_file_are_one_document_again(tokenizer: Tokenizer) -> None:
    parts = [Document(f"book.txt#{i}", [f"Part {i} tells of the sea."]) for i in (0, 1, 2, 5, 6)]
    haystack = Haystack("given", [*parts, Document("other.txt#7", ["Other."])])
    joined = texts_module._rejoined(haystack)
    assert [(name, len(text)) for name, text in joined] == [
        ("book.txt#0", 3), ("book.txt#5", 2), ("other.txt#7", 1),
    ]  # fmt: skip


def test_joined_and_missing_documents_are_told(
    model: MemLMForCausalLM, tokenizer: Tokenizer
) -> None:
    short = [Document(f"{i}", [f"Number {i} says a little of itself."] * 2) for i in range(20)]
    haystack = Haystack("given", short)
    report = run(model, tokenizer, haystack, length=60, documents=1000)
    assert report.overall.documents < 1000
    assert "joined from whole shorter ones in order" in report.notes[0]
    assert "of the 1000 asked for" in report.notes[1]
    assert f"Note: {report.notes[1]}." in report.to_markdown()
    with pytest.raises(ValueError, match=r"tokens in split 'eval', fewer than length=1M; give a"):
        run(model, tokenizer, haystack, length="1M")


@pytest.mark.parametrize("length", [2, 15, 16, 17])
def test_documents_within_one_segment_have_no_verdict(
    length: int, model: MemLMForCausalLM, tokenizer: Tokenizer, prose: Haystack
) -> None:
    report = run(model, tokenizer, prose, length=length)
    assert [(b.start, b.end) for b in report.bins] == [(0, length - 1)]
    assert report.change is None and "too short to tell" in report.verdict


def test_one_document_has_no_interval(
    model: MemLMForCausalLM, tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    report = run(model, tokenizer, prose, documents=1, out=tmp_path)
    assert report.overall.loss.low is None and "One document cannot tell" in report.verdict


def test_bins_of_ones_own(model: MemLMForCausalLM, tokenizer: Tokenizer, prose: Haystack) -> None:
    report = run(model, tokenizer, prose, bins=[10, 100])
    assert [(b.start, b.end) for b in report.bins] == [(0, 10), (10, 100), (100, 199)]
    for bins in ([5, 5], [7, 3], [199], [-1, 4]):
        with pytest.raises(ValueError, match=r"must be rising positions below length - 1 = 199"):
            run(model, tokenizer, prose, bins=bins)


def test_documents_shorter_than_a_bin_are_left_out_of_it() -> None:
    def row(tokens: int, nats: list[float]) -> dict[str, Any]:
        counts = [min(max(tokens - 1 - start, 0), 4) for start in (0, 4, 8)]
        return {
            "document": 0, "tokens": tokens, "predictions": counts, "nats": nats,
            "baseline_nats": None, "bytes": [3 * n for n in counts],
        }  # fmt: skip

    rows = [row(13, [8.0, 4.0, 2.0]), row(7, [4.0, 2.0, 0.0]), row(1, [0.0, 0.0, 0.0])]
    report = summarise(rows, np.array([0, 4, 8]), 4)
    assert [b.documents for b in report.bins] == [2, 2, 1]
    assert [b.loss.mean for b in report.bins] == [1.5, 1.0, 0.5]
    assert report.change == Estimate(-0.5) and report.overall.baseline is None
    assert report.overall.bits_per_byte.mean == pytest.approx((14 / 36 + 6 / 18) / 2 / math.log(2))


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (-0.3, -0.1, "keeps falling"), (-0.2, 0.1, "neither falls nor rises"),
        (0.1, 0.2, "Loss rises"),
    ],
)  # fmt: skip
def test_the_verdict_follows_the_interval(low: float, high: float, told: str) -> None:
    losses = [(low + high) / 2 + (high - low) * shift for shift in (-0.5, 0.0, 0.5)]
    # Three documents whose changes have just this mean and about this spread.
    spread = student_t(2) / math.sqrt(3)
    rows = [
        {
            "document": i, "tokens": 13, "predictions": [4, 4, 4], "bytes": [4, 4, 4],
            "nats": [8.0, 4.0, 4.0 + 4 * ((low + high) / 2 + (x - (low + high) / 2) / spread)],
            "baseline_nats": [8.0, 5.0, 5.0],
        }
        for i, x in enumerate(losses)
    ]  # fmt: skip
    report = summarise(rows, np.array([0, 4, 8]), 4)
    assert report.change.low == pytest.approx(low) and report.change.high == pytest.approx(high)
    assert told in report.verdict and "the memory of the past gains" in report.verdict


def test_students_t_is_the_tables() -> None:
    known = {1: 12.706, 2: 4.303, 5: 2.571, 10: 2.228, 11: 2.201, 15: 2.131, 20: 2.086, 30: 2.042}
    known |= {60: 2.000, 120: 1.980, 1000: 1.962}
    assert {n: round(student_t(n), 3) for n in known} == known


# Models that are not ours.


def test_another_model_reads_in_independent_windows(tokenizer: Tokenizer, prose: Haystack) -> None:
    base = base_model("llama", vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"segment_length=None, but model=LlamaForCausalLM"):
        run(base, tokenizer, prose)
    texts = choose_texts(prose, tokenizer, 200, 5, seed=0)
    expected = []
    for text in texts:
        ids = torch.from_numpy(text.ids).long()
        for start in range(0, 199, 50):
            with torch.no_grad():
                said = base(ids[None, start : start + 50]).logits[0].log_softmax(dim=-1)
            following = ids[start + 1 : start + 51]
            expected += [-float(said[i, token]) for i, token in enumerate(following)]
    report = run(base, tokenizer, prose, segment_length=50)
    assert report.overall.loss.mean == pytest.approx(np.mean(expected), abs=1e-10)
    assert report.overall.gain is None and "gain" not in report.to_markdown().split("\n")[0]


def test_another_model_is_left_as_it_was(tokenizer: Tokenizer, prose: Haystack) -> None:
    base = base_model("llama", vocab_size=VOCAB).train()
    base.model.norm.eval()
    before = as_it_is(base)
    with pytest.raises(ValueError, match="rising positions"):
        run(base, tokenizer, prose, segment_length=50, bins=[5, 2])
    assert as_it_is(base) == before
    run(base, tokenizer, prose, segment_length=50, documents=1)
    assert as_it_is(base) == before


def test_a_model_of_ours_keeps_its_segment_length(
    model: MemLMForCausalLM, tokenizer: Tokenizer, prose: Haystack
) -> None:
    with pytest.raises(ValueError, match="segment_length=8 is not the model's own 16; leave it"):
        run(model, tokenizer, prose, segment_length=8)
    run(model, tokenizer, prose, segment_length=16, documents=1, length=20)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"length": 1}, "length=1 must be at least 2"),
        ({"length": "4x"}, "unknown length '4x'"),
        ({"documents": 0}, "documents=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"haystack": "no/such/folder"}, "haystack 'no/such/folder' is neither"),
        ({"split": "train"}, "split='train' chooses a part of a source"),
    ],
)
def test_what_cannot_work_is_refused(
    wrong: dict[str, Any], message: str, model: MemLMForCausalLM, tokenizer: Tokenizer,
    prose: Haystack,
) -> None:  # fmt: skip
    with pytest.raises(ValueError, match=message):
        run(model, tokenizer, prose, **wrong)


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Tokenizer, prose: Haystack) -> None:
    with pytest.raises(
        ValueError, match=r"tokenizer makes token \d+, but the model knows 61; give"
    ):
        run(memory_model("llama", "armt"), tokenizer, prose)


# Resuming.


@pytest.fixture(scope="module")
def unbroken(
    model: MemLMForCausalLM, tokenizer: Tokenizer, prose: Haystack, tmp_path_factory: Any
) -> tuple[Path, PerplexityReport]:
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, run(model, tokenizer, prose, out=folder)


SLOW = pytest.mark.slow


# At which segment each run is interrupted in turn: in the first document, in the middle and late.
@pytest.mark.parametrize(
    "fail_at", [(1, 27, 27), *(pytest.param((at,), marks=SLOW) for at in (14, 27, 40, 53))]
)
def test_an_interrupted_run_ends_like_an_unbroken_one(
    fail_at: tuple[int, ...], unbroken: tuple[Path, PerplexityReport], model: MemLMForCausalLM,
    tokenizer: Tokenizer, prose: Haystack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole, expected = unbroken
    calls, measure, last = 0, module._cross_entropy, 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(module, "_cross_entropy", interrupted)
    broken = tmp_path / "broken"
    for at in fail_at:
        last = calls + at
        with pytest.raises(KeyboardInterrupt):
            run(model, tokenizer, prose, out=broken)
        assert not (broken / "perplexity.json").exists()
    report = run(model, tokenizer, prose, out=broken)
    assert rows_of(broken) == rows_of(whole)
    assert (report.bins, report.verdict) == (expected.bins, expected.verdict)
    done = calls
    run(model, tokenizer, prose, out=broken)
    assert calls == done
    more = run(model, tokenizer, prose, out=broken, documents=6)
    assert more.overall.documents == 6 and rows_of(broken)[:5] == rows_of(whole)


def test_a_torn_line_is_repaired_and_a_damaged_one_named(
    model: MemLMForCausalLM, tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    run(model, tokenizer, prose, out=tmp_path)
    path = tmp_path / "documents.jsonl"
    whole, content = rows_of(tmp_path), path.read_bytes()
    for torn in (content[:-1], content[:-40], content + b'{"document": 5}\n'):
        path.write_bytes(torn)
        run(model, tokenizer, prose, out=tmp_path)
        assert rows_of(tmp_path) == whole
    path.write_bytes(b"rubbish\n" + content)
    with pytest.raises(ValueError, match=r"documents\.jsonl' line 1 is damaged .* remove the line"):
        run(model, tokenizer, prose, out=tmp_path)
    assert path.read_bytes() == b"rubbish\n" + content


@pytest.mark.parametrize("other", [{"length": 100}, {"seed": 1}, {"bins": [50]}])
def test_a_folder_of_another_run_is_refused(
    other: dict[str, Any], model: MemLMForCausalLM, tokenizer: Tokenizer, prose: Haystack,
    tmp_path: Path,
) -> None:  # fmt: skip
    run(model, tokenizer, prose, out=tmp_path, documents=1)
    (name,) = other
    with pytest.raises(ValueError, match=rf"holds a run with {name}="):
        run(model, tokenizer, prose, out=tmp_path, documents=1, **other)


def test_another_model_text_or_file_is_refused(
    model: MemLMForCausalLM, tokenizer: Tokenizer, prose: Haystack, tmp_path: Path
) -> None:
    run(model, tokenizer, prose, out=tmp_path / "a", documents=1)
    other = memory_model("llama", "rmt", segment_length=16, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="holds a run with model="):
        run(other, tokenizer, prose, out=tmp_path / "a", documents=1)
    changed = Haystack(prose.source, [Document(d.name, d.sentences[1:]) for d in prose.documents])
    with pytest.raises(ValueError, match="document 0 of other tokens than this run's"):
        run(model, tokenizer, changed, out=tmp_path / "a", documents=1)
    (tmp_path / "a" / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json' is not readable JSON"):
        run(model, tokenizer, prose, out=tmp_path / "a", documents=1)
    (tmp_path / "a" / "run.json").unlink()
    with pytest.raises(ValueError, match=r"has documents\.jsonl but no run\.json"):
        run(model, tokenizer, prose, out=tmp_path / "a", documents=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file' is a file; name a folder"):
        run(model, tokenizer, prose, out=tmp_path / "file")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_is_summed_in_single(
    dtype: torch.dtype, tokenizer: Tokenizer, prose: Haystack
) -> None:
    torch.manual_seed(0)
    config = CONFIG_MAPPING["llama"](**{**FAMILIES["llama"], "vocab_size": VOCAB})
    base = AutoModelForCausalLM.from_config(config).to(dtype)
    report = run(base, tokenizer, prose, segment_length=32)
    # An untrained model knows nothing: about the log of the vocabulary.
    assert report.overall.loss.mean == pytest.approx(math.log(VOCAB), abs=0.2)
