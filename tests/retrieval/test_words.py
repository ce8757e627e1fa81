"""The word index in files: read instead of built, brought up to date, and never out of step."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from memlm.files import file_checksum
from memlm.retrieval import saving, store
from memlm.retrieval.embedded import EmbeddedStore
from memlm.retrieval.index import ChunkIndex
from memlm.retrieval.lexical import Lexical
from tests.retrieval.fake import WordVectors, corpus

QUERIES = ["w1 w2 w3", "n0x17", "w50 n0x4", "added", "changed"]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "FEW", 20)


def built(folder: Path) -> ChunkIndex:
    """Rows 0 to 199 and a gap at 200."""
    index = ChunkIndex(WordVectors())
    index.add([*corpus(200), "never saved"], ids=range(201))
    index.remove([200])
    index.save(folder)
    return index


def word_hits(index: ChunkIndex) -> list[list[tuple[object, float | None]]]:
    return [[(hit.id, hit.lexical) for hit in hits] for hits in index.search(QUERIES, 60)]


def word_file(folder: Path) -> str:
    (file,) = folder.glob("words-*")
    return file.name


@pytest.mark.parametrize("mmap", [False, True])
def test_a_loaded_index_does_not_enter_words_again(
    tmp_path: Path, mmap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = built(tmp_path)
    entered: list[tuple[int, str]] = []
    add = Lexical.add

    def counted(self: Lexical, items: list[tuple[int, str]]) -> None:
        items = list(items)
        entered.extend(items)
        add(self, items)

    monkeypatch.setattr(Lexical, "add", counted)
    again = ChunkIndex.load(tmp_path, WordVectors(), mmap=mmap)
    assert word_hits(again) == word_hits(index) and not entered
    # What was added since is all that is entered.
    index.add(["added later"], ids=["new"])
    index.save(tmp_path)
    expected = word_hits(index)
    entered.clear()
    again = ChunkIndex.load(tmp_path, WordVectors(), mmap=mmap)
    assert word_hits(again) == expected and [text for _, text in entered] == ["added later"]


@pytest.mark.parametrize("mmap", [False, True])
def test_changes_since_the_file_was_written(tmp_path: Path, mmap: bool) -> None:
    index = built(tmp_path)
    first = word_file(tmp_path)
    index.remove([4, 17])
    index.update([5], ["w1 changed"])
    index.add(["w1 added"], ids=["a"])
    index.save(tmp_path)
    assert word_file(tmp_path) == first
    again = ChunkIndex.load(tmp_path, WordVectors(), mmap=mmap)
    # BM25 counts documents, so a removed row that were only hidden would show in every score.
    assert word_hits(again) == word_hits(index)
    kept = again._store
    assert isinstance(kept, EmbeddedStore) and kept._words is not None
    assert kept._words._lexical.rows() == list(kept._chunks.live())
    if not mmap:
        again.remove([6, "a"])
        again.add(["added again"], ids=["b"])
        again.save(tmp_path)
        third = ChunkIndex.load(tmp_path, WordVectors())
        assert word_hits(third) == word_hits(again)


def test_the_file_is_written_again_after_many_changes(tmp_path: Path) -> None:
    index = built(tmp_path)
    first = word_file(tmp_path)
    index.add(corpus(30, seed=1))
    index.save(tmp_path)
    assert word_file(tmp_path) == first
    index.add(corpus(40, seed=2))
    index.remove(range(3))
    index.save(tmp_path)
    second = word_file(tmp_path)
    assert second != first
    again = ChunkIndex.load(tmp_path, WordVectors())
    assert word_hits(again) == word_hits(index)
    index.remove(range(3, 150))
    index.save(tmp_path)
    assert word_file(tmp_path) != second
    assert word_hits(ChunkIndex.load(tmp_path, WordVectors())) == word_hits(index)


def test_small_indexes_and_those_without_words_have_no_file(tmp_path: Path) -> None:
    index = ChunkIndex(WordVectors())
    index.add(corpus(20))
    index.save(tmp_path / "small")
    index = ChunkIndex(WordVectors(), hybrid=False)
    index.add(corpus(200))
    index.save(tmp_path / "plain")
    assert not list(tmp_path.glob("*/words-*"))
    assert ChunkIndex.load(tmp_path / "small", WordVectors()).search(["n0x7"], 1)[0][0].lexical


def test_removed_words_leave_the_disk_when_compacted(tmp_path: Path) -> None:
    index = built(tmp_path)
    index.add(["a secretword to forget"], ids=["secret"])
    index.add(corpus(80, seed=1))
    index.save(tmp_path)
    assert b"secretword" in (tmp_path / word_file(tmp_path)).read_bytes()
    index.remove(["secret"])
    index.compact()
    index.save(tmp_path)
    assert all(b"secretword" not in path.read_bytes() for path in tmp_path.iterdir())
    assert word_hits(ChunkIndex.load(tmp_path, WordVectors())) == word_hits(index)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ("text", "file is not a database"),
        ("table", "no such table"),
        ("fewer", "its rows are not those"),
        ("beyond", "its rows are not those"),
        ("others", "it lacks rows"),
        ("negative", "its rows are not those"),
    ],
)
def test_files_of_other_content_are_refused(
    tmp_path: Path, wrong: str, match: str, mmap: bool
) -> None:
    """The manifest vouches for the file, as one from a foreign writer may."""
    built(tmp_path)
    path = tmp_path / word_file(tmp_path)
    path.unlink()
    if wrong == "text":
        path.write_text("no words " * 1000)
    elif wrong == "table":
        other = sqlite3.connect(path)
        other.execute("CREATE TABLE t (x)")
        other.close()
    else:
        words = Lexical()
        first, stop = {
            "fewer": (0, 150),
            "beyond": (2, 202),
            "others": (1, 201),
            "negative": (-1, 199),
        }[wrong]
        words.add((row, "w1") for row in range(first, stop))
        words.write(path)
    manifest = store.read_manifest(tmp_path)
    assert manifest is not None
    parts = [
        part
        if part.file != path.name
        else store.PartFile(
            **{
                **part.__dict__,
                "bytes": path.stat().st_size,
                "sha256": file_checksum(path),
            }
        )
        for part in manifest["parts"]
    ]
    settings = {
        name: value
        for name, value in manifest.items()
        if name not in ("format", "version", "generation", "checksum", "parts")
    }
    store.commit(tmp_path, settings, parts, manifest["generation"])
    with pytest.raises(ValueError, match=match) as error:
        ChunkIndex.load(tmp_path, WordVectors(), mmap=mmap)
    assert path.name in str(error.value)
