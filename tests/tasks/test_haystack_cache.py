"""Tokenised haystacks on disk: the same as made anew, never stale, never half written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from memlm.tasks import babi, babilong
from memlm.tasks.haystack import Haystack, TokenHaystack
from memlm.tasks.haystack import cache as haystack_cache
from memlm.tasks.haystack.cache import cache_folder, fingerprint, tokenized_haystack
from tests.fresh import Fresh
from tests.tokenizers import tokenizer as other_tokenizer


class Counting:
    """A tokenizer that counts its calls."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.calls = 0

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.calls += 1
        return self.tokenizer(*given, **named)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@pytest.fixture(autouse=True)
def small_sources_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haystack_cache, "MIN_CHARACTERS", 0)


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haystack_cache, "_verified", set())


@pytest.fixture
def counting(tokenizer: PreTrainedTokenizerFast) -> Counting:
    return Counting(tokenizer)


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "haystacks").glob("[!.]*"))


def left_over(cache: Path) -> list[Path]:
    return list((cache / "haystacks").glob(".*"))


def same(one: TokenHaystack, other: TokenHaystack) -> bool:
    return (
        one.digest == other.digest
        and np.array_equal(one.ids, other.ids)
        and np.array_equal(one.offsets, other.offsets)
        and np.array_equal(one.first_sentence, other.first_sentence)
        and list(one.texts) == list(other.texts)
    )


@pytest.mark.parametrize("split", ["train", "eval", "all"])
def test_kept_is_the_same_as_made(
    split: Any, prose_folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = Haystack.open(prose_folder, split).tokenized(tokenizer)
    for _ in range(2):
        kept = tokenized_haystack(prose_folder, split, tokenizer, cache=tmp_path)
        assert same(kept, plain) and kept.source == plain.source
        assert kept.ids.dtype == np.int32 and not kept.ids.flags.writeable
        story = next(babi.generate("qa1", 0))
        one, other = (babilong.compose(story, n, "4k", tokenizer, 0) for n in (kept, plain))
        assert one.text() == other.text() and one.fact_offsets == other.fact_offsets
        assert np.array_equal(np.concatenate([*one.ids()]), np.concatenate([*other.ids()]))
    assert len(entries(tmp_path)) == 1 and not left_over(tmp_path)


def test_text_of_any_alphabet_is_kept(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = tmp_path / "a.txt"
    source.write_text(
        "Köln liegt am Rhein — 日本語のテキスト, и по-русски тоже.\n\nA second one 🙂 stands here."
    )
    kept = tokenized_haystack(source, "all", tokenizer, cache=tmp_path / "cache")
    plain = Haystack.open(source, "all").tokenized(tokenizer)
    assert same(kept, plain)
    assert kept.texts[-1] == plain.texts[-1] and kept.texts[:] == list(plain.texts)
    with pytest.raises(IndexError, match="sentence 2 of 2"):
        kept.texts[2]
    assert kept.cut_text(0, 3) == plain.cut_text(0, 3)


def test_the_second_time_neither_tokenises_nor_reads(
    prose_folder: Path, tmp_path: Path, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tokenized_haystack(prose_folder, "all", counting, cache=tmp_path)
    assert counting.calls >= 30
    counting.calls = 0

    def refuse(*_: Any) -> Iterator[Any]:
        raise AssertionError("the source was read")

    monkeypatch.setattr(haystack_cache, "read_documents", refuse)
    again = tokenized_haystack(prose_folder, "all", counting, cache=tmp_path)
    assert counting.calls == 0 and same(first, again)


def test_whatever_it_depends_on_makes_another_entry(
    prose_folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenized_haystack(prose_folder, "all", tokenizer, cache=tmp_path)
    others: list[tuple[Any, Any, dict[str, Any]]] = [
        ("train", tokenizer, {}),
        ("eval", tokenizer, {}),
        ("all", tokenizer, {"min_tokens": 12}),
        ("all", tokenizer, {"max_characters": 20_000}),
        ("all", other_tokenizer("byte-bpe"), {}),
    ]
    for number, (split, chosen, options) in enumerate(others, start=2):
        kept = tokenized_haystack(prose_folder, split, chosen, cache=tmp_path, **options)
        assert len(entries(tmp_path)) == number
        plain = Haystack.open(prose_folder, split, options.get("max_characters", 10**9))
        assert same(kept, plain.tokenized(chosen, options.get("min_tokens", 10)))


def test_a_changed_source_is_read_anew(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder, cache = tmp_path / "text", tmp_path / "cache"
    folder.mkdir()
    (folder / "a.txt").write_text("The first sentence of them all is standing here.\n\n" * 5)
    first = tokenized_haystack(folder, "all", tokenizer, cache=cache)
    changed = folder / "a.txt"
    before = changed.stat()
    changed.write_text("The other sentence of them all is standing here.\n\n" * 5)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert changed.stat().st_size == before.st_size
    second = tokenized_haystack(folder, "all", tokenizer, cache=cache)
    assert second.texts[0].startswith("The other") and second.digest != first.digest
    (folder / "b.txt").write_text("One more file with a sentence of its own in it.")
    assert len(tokenized_haystack(folder, "all", tokenizer, cache=cache).texts) == 6


def test_a_source_that_changes_while_it_is_read_is_not_kept(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = tmp_path / "a.txt", tmp_path / "cache"
    source.write_text("A sentence that is long enough to be kept by the filter.\n\n" * 5)
    known = haystack_cache.read_documents

    def touching(*given: Any) -> Iterator[Any]:
        yield from known(*given)
        os.utime(source, ns=(1, 1))

    monkeypatch.setattr(haystack_cache, "read_documents", touching)
    made = tokenized_haystack(source, "all", tokenizer, cache=cache)
    assert len(made.texts) == 5 and int(made.ids.sum()) > 0
    assert entries(cache) == [] and left_over(cache) == []


@pytest.mark.parametrize("harm", ["cut", "emptied", "longer", "foreign", *range(8)])
def test_a_damaged_entry_is_made_again(
    harm: str | int,
    prose_folder: Path,
    tmp_path: Path,
    counting: Counting,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = Haystack.open(prose_folder, "eval").tokenized(counting.tokenizer)
    tokenized_haystack(prose_folder, "eval", counting, cache=tmp_path)
    haystack_cache._verified.clear()
    (path,) = entries(tmp_path)
    data = path.read_bytes()
    if isinstance(harm, int):
        # One bit, in the header, the columns and the end alike.
        at = (len(data) - 1) * harm // 7
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    else:
        harms = {"cut": data[:-9], "emptied": b"", "longer": data + b"\0", "foreign": b"{}"}
        path.write_bytes(harms[harm])
    counting.calls = 0
    assert same(tokenized_haystack(prose_folder, "eval", counting, cache=tmp_path), plain)
    assert counting.calls > 0 and entries(tmp_path) == [path] and not left_over(tmp_path)
    assert f"{path} is damaged and is made again" in caplog.text and path.read_bytes() == data
    haystack_cache._verified.clear()
    counting.calls = 0
    assert same(tokenized_haystack(prose_folder, "eval", counting, cache=tmp_path), plain)
    assert counting.calls == 0


def test_an_entry_opens_as_a_data_set(
    prose_folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    datasets = pytest.importorskip("datasets")
    kept = tokenized_haystack(prose_folder, "all", tokenizer, cache=tmp_path)
    rows = datasets.Dataset.from_file(str(entries(tmp_path)[0]))
    assert rows["text"][:] == list(kept.texts)
    assert [i for row in rows["ids"] for i in row] == kept.ids.tolist()
    numbers = np.array(rows["document"])
    assert (
        np.flatnonzero(np.diff(numbers, prepend=-1)).tolist() == kept.first_sentence[:-1].tolist()
    )


def test_an_entry_that_cannot_be_read_is_left_alone(
    prose_folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = Haystack.open(prose_folder, "eval").tokenized(tokenizer)
    tokenized_haystack(prose_folder, "eval", tokenizer, cache=tmp_path)
    haystack_cache._verified.clear()
    (path,) = entries(tmp_path)
    path.unlink()
    path.mkdir()
    assert same(tokenized_haystack(prose_folder, "eval", tokenizer, cache=tmp_path), plain)
    assert path.is_dir() and not left_over(tmp_path)


def test_folders_of_an_earlier_format_are_ignored(
    prose_folder: Path, tmp_path: Path, counting: Counting
) -> None:
    former = tmp_path / "haystacks" / ("0" * 32) / "ids.npy"
    former.parent.mkdir(parents=True)
    former.write_bytes(b"as it was")
    for calls in (True, False):
        counting.calls = 0
        tokenized_haystack(prose_folder, "eval", counting, cache=tmp_path)
        assert bool(counting.calls) is calls
    assert former.read_bytes() == b"as it was"


def test_an_interrupted_build_leaves_nothing_that_is_taken_for_whole(
    prose_folder: Path, tmp_path: Path, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = haystack_cache.tokenise

    def interrupted(*given: Any) -> Iterator[Any]:
        for number, made in enumerate(known(*given)):
            if number == 7:
                raise KeyboardInterrupt
            yield made

    with monkeypatch.context() as patch:
        patch.setattr(haystack_cache, "tokenise", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokenized_haystack(prose_folder, "all", counting, cache=tmp_path)
    assert entries(tmp_path) == [] and left_over(tmp_path) == []
    # A kill leaves its file; it is never opened, and removed when it is old.
    killed = tmp_path / "haystacks" / ".0123.abc"
    killed.write_bytes(b"half")
    tokenized_haystack(prose_folder, "all", counting, cache=tmp_path)
    assert len(entries(tmp_path)) == 1 and left_over(tmp_path) == [killed]
    os.utime(killed, (1, 1))
    tokenized_haystack(prose_folder, "train", counting, cache=tmp_path)
    assert left_over(tmp_path) == []


def test_a_source_refused_leaves_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "a.txt").write_text("Yes. No.")
    for _ in range(2):
        with pytest.raises(ValueError, match="no sentence of 10 tokens"):
            tokenized_haystack(tmp_path / "a.txt", "all", tokenizer, cache=tmp_path / "cache")
    assert entries(tmp_path / "cache") == [] and left_over(tmp_path / "cache") == []
    with pytest.raises(ValueError, match="single document"):
        tokenized_haystack(tmp_path / "a.txt", "eval", tokenizer, cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="min_tokens=0"):
        tokenized_haystack(tmp_path / "a.txt", "all", tokenizer, min_tokens=0)
    with pytest.raises(ValueError, match="unknown haystack split 'test'"):
        tokenized_haystack(tmp_path / "a.txt", "test", tokenizer)  # type: ignore[arg-type]


BUILD = """
import sys
from transformers import AutoTokenizer
from memlm.tasks.haystack import cache as haystack_cache
haystack_cache.MIN_CHARACTERS = 0
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for _ in range(5):
    made = haystack_cache.tokenized_haystack(sys.argv[2], "all", tokenizer, cache=sys.argv[3])
print(made.digest, int(made.ids.sum()))
"""


def test_two_processes_may_build_at_once(
    prose_folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    given = [str(tmp_path / "tokenizer"), str(prose_folder), str(tmp_path / "cache")]
    running = [Fresh(tmp_path, BUILD, *given) for _ in range(2)]
    told = {process.result() for process in running}
    assert len(told) == 1
    assert len(entries(tmp_path / "cache")) == 1 and not left_over(tmp_path / "cache")


def test_the_slower_of_two_builds_takes_the_other_ones(
    prose_folder: Path, tmp_path: Path, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = haystack_cache.tokenise

    def overtaken(*given: Any) -> Iterator[Any]:
        yield from known(*given)
        with monkeypatch.context() as patch:
            patch.setattr(haystack_cache, "tokenise", known)
            tokenized_haystack(prose_folder, "all", counting, cache=tmp_path)

    with monkeypatch.context() as patch:
        patch.setattr(haystack_cache, "tokenise", overtaken)
        made = tokenized_haystack(prose_folder, "all", counting, cache=tmp_path)
    assert same(made, Haystack.open(prose_folder, "all").tokenized(counting.tokenizer))
    assert len(entries(tmp_path)) == 1 and not left_over(tmp_path)


def test_without_a_folder_to_write_in_it_is_made_in_memory(
    prose_folder: Path, tmp_path: Path, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    plain = Haystack.open(prose_folder, "eval").tokenized(counting.tokenizer)
    monkeypatch.setenv("MEMLM_CACHE", "")
    for cache in (None, "", "auto", blocked, blocked / "below"):
        assert same(tokenized_haystack(prose_folder, "eval", counting, cache=cache), plain)
    assert blocked.read_text() == "not a folder"


def test_a_full_disk_is_no_failure(
    prose_folder: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: Any) -> None:
        raise haystack_cache._Unwritable("No space left on device")

    monkeypatch.setattr(haystack_cache._Column, "append", full)
    made = tokenized_haystack(prose_folder, "eval", tokenizer, cache=tmp_path)
    assert same(made, Haystack.open(prose_folder, "eval").tokenized(tokenizer))
    assert "No space left on device" in caplog.text and left_over(tmp_path) == []


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEMLM_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    assert cache_folder(None) is None and cache_folder("") is None
    monkeypatch.setenv("MEMLM_CACHE", "")
    assert cache_folder() is None
    monkeypatch.delenv("MEMLM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "memlm"


def test_what_is_quickly_made_is_not_kept(
    prose_folder: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(haystack_cache, "MIN_CHARACTERS", 1_000_000)
    tokenized_haystack(prose_folder, "all", tokenizer, cache=tmp_path)
    tokenized_haystack("builtin", "eval", tokenizer, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_fingerprint_says_how_texts_become_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    kinds = [fingerprint(other_tokenizer(kind)) for kind in ("byte-bpe", "metaspace", "words")]
    assert None not in kinds and len({*kinds, fingerprint(tokenizer)}) == 4
    chosen = other_tokenizer("byte-bpe")
    before = fingerprint(chosen)
    # What a call leaves behind in the tokenizer decides nothing.
    chosen(["a text", "another longer text"], padding=True, truncation=True, max_length=4)
    assert fingerprint(chosen) == before
    assert fingerprint(object()) is None  # type: ignore[arg-type]


def test_a_hub_data_set_is_kept_by_its_commit(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    told = "Row {} tells a rather long and winding tale of the sea."
    opened = []

    class Builder:
        hash = "0" * 40

    def streams(*_: Any, **__: Any) -> dict[str, list[dict[str, str]]]:
        opened.append(1)
        return {"train": [{"text": told.format(n)} for n in range(40)]}

    monkeypatch.setattr(datasets, "load_dataset", streams)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: Builder)
    for _ in range(2):
        made = tokenized_haystack("hub:some/tales", "all", tokenizer, cache=tmp_path)
        assert len(made.texts) == 40 and len(opened) == 1
    Builder.hash = "1" * 40
    tokenized_haystack("hub:some/tales", "all", tokenizer, cache=tmp_path)
    tokenized_haystack("hub:some/tales@other:text", "all", tokenizer, cache=tmp_path)
    assert len(opened) == 3 and len(entries(tmp_path)) == 3
    # Without a commit nobody knows whether it is still the same.
    Builder.hash = "auto"
    tokenized_haystack("hub:some/tales", "all", tokenizer, cache=tmp_path)
    assert len(opened) == 4 and len(entries(tmp_path)) == 3


def test_rows_of_a_local_file_are_kept_by_the_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prose": f"Row {n} tells a rather long and winding tale."} for n in range(50)]
    path.write_text("\n".join(map(json.dumps, rows)))
    for _ in range(2):
        kept = tokenized_haystack(f"hub:{path}", "eval", tokenizer, cache=tmp_path / "cache")
        assert same(kept, Haystack.open(f"hub:{path}", "eval").tokenized(tokenizer))
    assert len(entries(tmp_path / "cache")) == 1
