"""Sources, sentences, the split and the tokenised form."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from memlm.tasks.haystack import Document, Haystack, TokenHaystack, read_documents
from memlm.tasks.haystack.sources import BUILTIN_MODULES
from memlm.text import split_sentences

WORDS = 200_000


@pytest.fixture(scope="module")
def builtin() -> Haystack:
    return Haystack.open("builtin", split="all")


def texts(haystack: Haystack) -> set[str]:
    return {sentence for document in haystack.documents for sentence in document.sentences}


def test_sentences_end_at_stops_but_not_at_abbreviations() -> None:
    text = 'Dr. Smith met J. Brown, e.g. at noon. "Who?" he said. It was 3.5 miles! (Far.) Go on'
    assert split_sentences(text) == [
        "Dr. Smith met J. Brown, e.g. at noon.",
        '"Who?" he said.',
        "It was 3.5 miles!",
        "(Far.)",
        "Go on",
    ]


def test_paragraphs_and_list_items_end_sentences() -> None:
    assert split_sentences("a heading\n\nfirst line\nsecond line\n* an item\n* another") == [
        "a heading",
        "first line second line",
        "an item",
        "another",
    ]


def test_text_without_stops_is_cut_and_nothing_is_lost() -> None:
    text = "word " * 3000 + "x" * 5000
    pieces = split_sentences(text)
    assert max(map(len, pieces)) <= 2000
    assert "".join(pieces).replace(" ", "") == text.replace(" ", "")


def test_builtin_is_plenty_of_english(builtin: Haystack) -> None:
    count = sum(len(sentence.split()) for sentence in texts(builtin))
    assert count > WORDS
    assert len(builtin.documents) > 80
    names = [document.name for document in builtin.documents]
    assert len(set(names)) == len(names)


def test_builtin_is_the_same_every_time(builtin: Haystack) -> None:
    again = Haystack.open("builtin", split="all")
    assert again.documents == builtin.documents


def test_builtin_reads_no_module_with_side_effects() -> None:
    for name in ("antigravity", "this", "idlelib", "turtledemo", "test", "readline", "__main__"):
        assert name not in BUILTIN_MODULES
    for name in BUILTIN_MODULES:
        assert name.partition(".")[0] in sys.stdlib_module_names


@pytest.mark.parametrize("source", ["builtin", "folder"])
def test_train_and_eval_share_no_document(source: str, prose_folder: Path) -> None:
    opened = str(prose_folder) if source == "folder" else source
    train, held_out = Haystack.open(opened, "train"), Haystack.open(opened, "eval")
    names = [{document.name for document in h.documents} for h in (train, held_out)]
    assert names[0] and names[1] and not names[0] & names[1]
    whole = Haystack.open(opened, "all").documents
    assert names[0] | names[1] == {document.name for document in whole}
    assert 0.02 < len(names[1]) / len(whole) < 0.3


def test_a_single_file_is_divided_by_blocks(tmp_path: Path) -> None:
    lines = [f"Line {n} of the file goes on about nothing in particular today." for n in range(900)]
    path = tmp_path / "book.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    train, held_out = (texts(Haystack.open(path, split)) for split in ("train", "eval"))
    assert train and held_out and not train & held_out
    assert train | held_out == set(lines)


def test_a_tiny_source_still_holds_one_document_out(tmp_path: Path) -> None:
    path = tmp_path / "tiny.txt"
    path.write_text("\n".join(f"Line {n} says something short." for n in range(40)))
    assert len(Haystack.open(path, "eval").documents) >= 1
    path.write_text("One line only.")
    with pytest.raises(ValueError, match="single document"):
        Haystack.open(path, "train")
    assert Haystack.open(path, "all").documents[0].sentences == ["One line only."]


def test_sentences_run_on_in_order_from_random_places(prose: Haystack) -> None:
    taken = list(itertools.islice(prose.sentences(np.random.default_rng(0)), 400))
    assert taken == list(itertools.islice(prose.sentences(np.random.default_rng(0)), 400))
    following = {pair for d in prose.documents for pair in itertools.pairwise(d.sentences)}
    runs_on = sum(pair in following for pair in itertools.pairwise(taken))
    assert runs_on > 300
    assert len({sentence.split()[1] for sentence in taken}) > 10


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\x00\x00", b"text \xff\xfe more", b"a\0b"])
def test_a_binary_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "good.txt").write_text("A perfectly good line of text stands here.")
    (tmp_path / "picture.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"picture\.png.*not UTF-8 text"):
        Haystack.open(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [("no/such/place", "neither 'builtin'"), ("hub:", "neither 'builtin'")],
)
def test_an_unknown_source_is_refused(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Haystack.open(source)


def test_an_empty_folder_or_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no file"):
        Haystack.open(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n ")
    with pytest.raises(ValueError, match="holds no text"):
        Haystack.open(tmp_path)


def test_tokens_are_those_of_each_sentence_behind_a_space(
    prose: Haystack, noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert noise.ids.dtype == np.int32
    assert len(noise.texts) == len(noise.offsets) - 1 == noise.first_sentence[-1]
    for at in (0, 17, len(noise.texts) - 1):
        ids = noise.ids[noise.offsets[at] : noise.offsets[at + 1]].tolist()
        assert ids == tokenizer(f" {noise.texts[at]}")["input_ids"]
    for number, document in enumerate(prose.documents):
        first, end = noise.first_sentence[number : number + 2]
        assert noise.texts[first:end] == document.sentences


def test_short_sentences_are_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    long = "The clerk read the list aloud, slowly, as though every name on it were a debt."
    (tmp_path / "a.txt").write_text(f"Yes. {long} No. {long}")
    noise = Haystack.open(tmp_path, "all").tokenized(tokenizer)
    assert set(noise.texts) == {long}
    (tmp_path / "a.txt").write_text("Yes. No.")
    with pytest.raises(ValueError, match="no sentence of 10 tokens"):
        Haystack.open(tmp_path, "all").tokenized(tokenizer)


def test_tokenising_is_done_once(prose: Haystack, tokenizer: PreTrainedTokenizerFast) -> None:
    assert prose.tokenized(tokenizer) is prose.tokenized(tokenizer)


def test_a_digest_tells_haystacks_apart(
    prose_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    digests = [
        Haystack.open(prose_folder, split).tokenized(tokenizer).digest
        for split in ("train", "eval", "train")
    ]
    assert digests[0] == digests[2] != digests[1]


def test_reading_stops_at_the_limit(prose_folder: Path) -> None:
    few = Haystack.open(prose_folder, "all", max_characters=5000)
    assert sum(len(s) for s in texts(few)) <= 5000


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_of_a_dataset_are_documents(tmp_path: Path, suffix: str) -> None:
    rows = [{"id": n, "prose": f"Row {n} tells a rather long and winding tale."} for n in range(50)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    train, held_out = (texts(Haystack.open(f"hub:{path}", split)) for split in ("train", "eval"))
    assert train | held_out == {row["prose"] for row in rows} and not train & held_out
    assert texts(Haystack.open(f"hub:{path}:prose", "train")) == train
    with pytest.raises(ValueError, match="no column 'nothing'"):
        Haystack.open(f"hub:{path}:nothing")


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; import memlm.eval; from memlm.eval import babi, babilong, haystack, metrics; "
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    assert importlib.util.find_spec("memlm") is not None
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_documents_are_read_only_as_far_as_taken(prose_folder: Path, tmp_path: Path) -> None:
    for path in prose_folder.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "zz-last.txt").write_bytes(b"\xff\xfe")
    for split in ("train", "eval", "all"):
        found = list(itertools.islice(read_documents(tmp_path, split), 2))
        assert len(found) == 2
    with pytest.raises(ValueError, match=r"zz-last\.txt.*not UTF-8"):
        list(read_documents(tmp_path, "all"))


def test_no_least_number_of_tokens_is_refused(
    prose: Haystack, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="min_tokens=0 must be at least 1"):
        TokenHaystack(prose.documents, tokenizer, "prose", min_tokens=0)


def test_a_book_is_tokenised_in_parts(tokenizer: PreTrainedTokenizerFast) -> None:
    sentences = [f"Line {n} of the book speaks of nothing in particular." for n in range(2500)]
    sizes = []

    class Watching:
        def __call__(self, texts: list[str], **named: Any) -> Any:
            sizes.append(len(texts))
            return tokenizer(texts, **named)

        def __len__(self) -> int:
            return len(tokenizer)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    made = TokenHaystack([Document("book", sentences)], Watching(), "book")  # type: ignore[arg-type]
    assert max(sizes) <= 1000 and sum(sizes) == 2500
    assert list(made.texts) == sentences
    whole = tokenizer("".join(f" {sentence}" for sentence in sentences))["input_ids"]
    assert made.ids.tolist() == whole
