"""The directory of an index: round trips, what a save costs, damage, and processes killed while saving."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memlm.retrieval import saving, store
from memlm.retrieval.index import ChunkIndex, Hit
from tests.fresh import Fresh
from tests.retrieval.fake import WordVectors, corpus

FACTORIES = ["Flat", "SQ8", "HNSW16", "HNSW16_SQ8", "IVF4,Flat", "IVF4,SQ8", "PQ8x4"]
QUERIES = ["w1 w2 w3", "n0x17", "w50"]


def build(factory: str = "Flat", train: bool = True, count: int = 300) -> ChunkIndex:
    index = ChunkIndex(WordVectors(), factory=factory, effort=300)
    if train and not index.info()["trained"]:
        index.train(corpus(300))
    index.add(corpus(count), metadata=[{"part": n % 3} if n % 4 else {} for n in range(count)])
    return index


def answers(index: ChunkIndex) -> list[list[Hit]]:
    return [
        *index.search(QUERIES, 10),
        *index.search(QUERIES, 10, where={"part": [0, 1]}),
        *index.search(QUERIES, 1000, hybrid=False),
    ]


def same(one: list[list[Hit]], two: list[list[Hit]]) -> None:
    """Equal but for rounding, which differs with the size of a block."""
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        assert len(left) == len(right)
        assert {hit.id for hit in left} == {hit.id for hit in right}
        np.testing.assert_allclose(
            [hit.score for hit in left], [hit.score for hit in right], rtol=1e-4, atol=1e-6
        )
        texts = {hit.id: (hit.text, hit.metadata) for hit in left}
        assert all(texts[hit.id] == (hit.text, hit.metadata) for hit in right)


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("factory", FACTORIES)
def test_what_is_loaded_is_what_was_saved(
    factory: str, train: bool, mmap: bool, tmp_path: Path
) -> None:
    index = build(factory, train)
    index.save(tmp_path / "a")
    same(answers(ChunkIndex.load(tmp_path / "a", WordVectors(), mmap=mmap)), answers(index))
    # A tail, an update and removals, of rows of the first save and of the second.
    index.add(corpus(20, seed=1), ids=range(20), metadata=[{"part": 0}] * 20)
    index.update([3, "chunk-5"], ["an update", "w1 w2 another"])
    index.remove([4, "chunk-6", "chunk-7"])
    index.save(tmp_path / "a")
    again = ChunkIndex.load(tmp_path / "a", WordVectors(), mmap=mmap)
    assert len(again) == len(index) == 317
    assert again.get(3).text == "an update" and 4 not in again and "chunk-6" not in again
    if mmap and train and ("SQ" in factory or "PQ" in factory):
        # A mapped tail is compared in float32, not in the codes it would have in the faiss index.
        assert again.search(["an update"], 1)[0][0].text == "an update"
        assert len(again.search(["w1"], 1000, where={"part": [0, 1]})[0]) == len(
            index.search(["w1"], 1000, where={"part": [0, 1]})[0]
        )
    else:
        same(answers(again), answers(index))
    if not mmap:
        again.add(corpus(5, seed=2))
        again.remove([0])
        again.save(tmp_path / "a")
        same(answers(ChunkIndex.load(tmp_path / "a", WordVectors())), answers(again))


def test_loaded_settings_and_info(tmp_path: Path) -> None:
    index = ChunkIndex(
        WordVectors(), factory="SQfp16", metric="inner_product", hybrid=False, effort=9
    )
    index.add(["a", "b"])
    index.save(tmp_path)
    again = ChunkIndex.load(tmp_path, WordVectors())
    first, second = index.info(), again.info()
    assert first.pop("bytes").keys() == second.pop("bytes").keys() and first == second
    json.dumps(first)
    assert again.hybrid is False


def test_an_empty_and_an_emptied_index_are_kept(tmp_path: Path) -> None:
    index = ChunkIndex(WordVectors())
    index.save(tmp_path)
    assert len(ChunkIndex.load(tmp_path, WordVectors())) == 0
    ids = index.add(["a", "b"])
    index.save(tmp_path)
    index.remove(ids)
    index.save(tmp_path)
    for mmap in (False, True):
        again = ChunkIndex.load(tmp_path, WordVectors(), mmap=mmap)
        assert again.search(["a"]) == [[]] and len(again) == 0
    again = ChunkIndex.load(tmp_path, WordVectors())
    assert not set(again.add(["c"])) & set(ids)


def test_a_second_save_writes_what_was_added(tmp_path: Path) -> None:
    for factory in ("Flat", "HNSW16", "IVF4,Flat"):
        folder = tmp_path / factory.replace(",", "-")
        index = build(factory, count=5000)
        index.save(folder)
        before = files(folder)
        index.save(folder)
        assert files(folder) == before
        for reopened in (False, True):
            if reopened:
                index = ChunkIndex.load(folder, WordVectors())
            before = files(folder)
            index.add(corpus(10, seed=len(index)))
            index.remove([f"chunk-{int(reopened)}"])
            index.save(folder)
            after = files(folder)
            written = sum(size for name, size in after.items() if name not in before)
            assert written < 0.05 * sum(before.values())
            assert {name for name in before if name.startswith("main")} <= after.keys()


def test_many_small_saves_leave_few_parts_and_write_little(tmp_path: Path) -> None:
    index = build(count=50)
    index.save(tmp_path)
    written = 0
    for n in range(40):
        before = files(tmp_path)
        index.add([f"small {n}"])
        index.save(tmp_path)
        written += sum(s for name, s in files(tmp_path).items() if name not in before)
    assert index.info()["parts"] <= 16
    # Each save also writes its manifest, some 3 kB.
    assert written < 40 * 20_000
    again = ChunkIndex.load(tmp_path, WordVectors())
    assert len(again) == 90 and again.search(["small 27"], 1)[0][0].text == "small 27"


def test_long_tails_and_many_removals_go_into_new_parts(tmp_path: Path) -> None:
    index = build(count=600)
    index.save(tmp_path)
    for n in range(1, 5):
        index.add(corpus(600, seed=n))
        index.save(tmp_path)
    kinds = [part.kind for part in index._store._saver.saved.parts]  # type: ignore[attr-defined]
    assert kinds.count("main") == 1
    same(answers(ChunkIndex.load(tmp_path, WordVectors())), answers(index))
    index.remove([f"chunk-{n}" for n in range(1000)])
    index.save(tmp_path)
    assert index.info()["parts"] == 3
    again = ChunkIndex.load(tmp_path, WordVectors())
    same(answers(again), answers(index))
    again.remove(["chunk-1000"])
    again.save(tmp_path)
    assert "chunk-1000" not in ChunkIndex.load(tmp_path, WordVectors())


@pytest.mark.parametrize("factory", ["Flat", "HNSW16"])
def test_compact_takes_removed_text_off_the_disk(factory: str, tmp_path: Path) -> None:
    index = build(factory)
    index.add(["a secret to forget"], ids=["secret"])
    index.save(tmp_path)
    index.remove(["secret"])
    index.compact()
    index.save(tmp_path)
    assert index.info()["parts"] == 2
    assert all(b"secret" not in path.read_bytes() for path in tmp_path.iterdir())
    same(answers(ChunkIndex.load(tmp_path, WordVectors())), answers(index))


def test_mmap_is_read_only(tmp_path: Path) -> None:
    build().save(tmp_path / "a")
    index = ChunkIndex.load(tmp_path / "a", WordVectors(), mmap=True)
    for call in (
        lambda: index.add(["a"]),
        lambda: index.remove(["chunk-1"]),
        lambda: index.update(["chunk-1"], ["a"]),
        lambda: index.save(tmp_path / "b"),
        index.compact,
    ):
        with pytest.raises(ValueError, match="mmap=False"):
            call()
    assert len(index) == 300


def test_another_embedder_is_refused(tmp_path: Path) -> None:
    build().save(tmp_path)
    for embedder in (WordVectors(dim=8), WordVectors(fingerprint="other")):
        with pytest.raises(ValueError, match="built with"):
            ChunkIndex.load(tmp_path, embedder)


def test_what_is_no_index_is_never_overwritten(tmp_path: Path) -> None:
    index = build(count=5)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "manifest.json").write_text("{}")
    for name in ("notes", "file", "json"):
        with pytest.raises(ValueError, match=name):
            index.save(tmp_path / name)
        with pytest.raises(ValueError, match=name):
            ChunkIndex.load(tmp_path / name, WordVectors())
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"
    assert (tmp_path / "json" / "manifest.json").read_text() == "{}"
    with pytest.raises(ValueError, match="absent"):
        ChunkIndex.load(tmp_path / "absent", WordVectors())
    (tmp_path / "empty").mkdir()
    index.save(tmp_path / "empty")


def test_leftovers_are_cleaned_and_other_files_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    # As an interrupted first save leaves it.
    leftovers = [
        "main-0123456789abcdef.faiss",
        ".chunks-0123456789abcdef.arrow.x_y",
        ".manifest.json.q",
    ]
    for name in leftovers:
        (folder / name).write_bytes(b"half")
    index = build(count=5)
    index.save(folder)
    assert not set(leftovers) & files(folder).keys()
    (folder / "readme.txt").write_text("mine")
    (folder / leftovers[0]).write_bytes(b"half")
    assert len(ChunkIndex.load(folder, WordVectors())) == 5
    index.add(["more"])
    index.save(folder)
    assert (folder / "readme.txt").exists() and leftovers[0] not in files(folder)


def test_a_failed_save_leaves_the_old_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = build(count=20)
    index.save(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    index.add(["more"])
    for name in ("write_vectors", "write_chunks", "commit"):
        with monkeypatch.context() as patch:
            patch.setattr(store, name, full)
            with pytest.raises(OSError, match="No space"):
                index.save(tmp_path)
        assert len(ChunkIndex.load(tmp_path, WordVectors())) == 20
    index.save(tmp_path)
    assert len(ChunkIndex.load(tmp_path, WordVectors())) == 21


def test_two_writers_do_not_undo_each_other(tmp_path: Path) -> None:
    index = build(count=20)
    index.save(tmp_path)
    other = ChunkIndex.load(tmp_path, WordVectors())
    other.add(["from the other"])
    other.save(tmp_path)
    index.add(["mine"])
    with pytest.raises(ValueError, match="changed by another"):
        index.save(tmp_path)
    assert len(ChunkIndex.load(tmp_path, WordVectors())) == 21
    index.save(tmp_path / "elsewhere")
    assert "mine" in ChunkIndex.load(tmp_path / "elsewhere", WordVectors()).get("chunk-20").text


def test_an_index_whose_files_were_deleted_is_written_whole(tmp_path: Path) -> None:
    index = build(count=20)
    index.save(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    index.save(tmp_path / "a")
    next((tmp_path / "a").glob("main-*")).unlink()
    index.add(["more"])
    index.save(tmp_path / "a")
    assert len(ChunkIndex.load(tmp_path / "a", WordVectors())) == 21


@pytest.fixture(scope="module", params=["Flat", "IVF4,Flat"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small index with a file of every kind."""
    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "FEW", 10)
        save_twice(folder, request.param)
    kinds = {name.split("-")[0] for name in files(folder)}
    assert kinds == {"chunks", "vectors", "main", "words", "removed", "manifest.json"}
    return folder


def save_twice(folder: Path, factory: str) -> None:
    index = ChunkIndex(WordVectors(), factory=factory)
    if factory != "Flat":
        index.train(corpus(20))
    index.add(corpus(40))
    index.save(folder)
    index.add(corpus(5, seed=1))
    index.remove(["chunk-3", "chunk-41"])
    index.save(folder)


def refused_or_harmless(folder: Path, name: str, expected: list[list[Hit]]) -> bool:
    """Whether loading was refused by the name of the file; otherwise the answers must be right."""
    try:
        index = ChunkIndex.load(folder, WordVectors())
    except ValueError as error:
        assert name in str(error) or str(folder) in str(error), error
        return True
    assert index.search(QUERIES, 10) == expected
    return False


@pytest.mark.parametrize("flips", [40, pytest.param(150, marks=pytest.mark.slow)])
def test_flipped_bits_are_found(sound: Path, tmp_path: Path, flips: int) -> None:
    expected = ChunkIndex.load(sound, WordVectors()).search(QUERIES, 10)
    folder = tmp_path / "index"
    shutil.copytree(sound, folder)
    accepted = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        step = max(1, len(content) // flips)
        for at in range(0, len(content), step):
            flipped = bytearray(content)
            flipped[at] ^= 1 << (at % 8)
            path.write_bytes(flipped)
            if not refused_or_harmless(folder, path.name, expected):
                accepted.append((path.name, chr(content[at])))
        path.write_bytes(content)
    # Blanks between the manifest's values mean nothing.
    assert {name for name, _ in accepted} <= {store.MANIFEST}
    assert {char for _, char in accepted} <= {" ", "\n"}


def test_cut_missing_and_foreign_files_are_found(sound: Path, tmp_path: Path) -> None:
    expected = ChunkIndex.load(sound, WordVectors()).search(QUERIES, 10)
    folder = tmp_path / "index"
    shutil.copytree(sound, folder)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for wrong in (b"", content[:-2], content[: len(content) // 2], content + b"x", b"\0" * 99):
            path.write_bytes(wrong)
            assert refused_or_harmless(folder, path.name, expected), (path.name, len(wrong))
        path.unlink()
        assert refused_or_harmless(folder, path.name, expected)
        path.write_bytes(content)
    assert not refused_or_harmless(folder, "", expected)


def forge(folder: Path, **changes: Any) -> None:
    path = folder / store.MANIFEST
    manifest = {**json.loads(path.read_text()), **changes}
    manifest["checksum"] = store._checksum(manifest)
    path.write_text(json.dumps(manifest))


def test_newer_foreign_and_inconsistent_manifests_are_refused(sound: Path, tmp_path: Path) -> None:
    parts = json.loads((sound / store.MANIFEST).read_text())["parts"]
    main = next(part for part in parts if part["kind"] == "main")
    for number, (changes, match) in enumerate(
        [
            ({"version": 4}, "upgrade memlm"),
            ({"version": 3}, "store=None in version 3"),
            ({"format": "other"}, "not a manifest"),
            ({"chunks": 7}, "counts"),
            ({"parts": [p for p in parts if p["kind"] != "vectors"]}, "counts"),
            ({"parts": [{**main, "file": "../main-0123456789abcdef.faiss"}]}, "names a part"),
            ({"factory": "HNSW16", "precision": None}, "it is no HNSW16"),
        ]
    ):
        folder = tmp_path / str(number)
        shutil.copytree(sound, folder)
        forge(folder, **changes)
        with pytest.raises(ValueError, match=match):
            ChunkIndex.load(folder, WordVectors())
    with pytest.raises(ValueError, match="upgrade memlm"):
        build(count=5).save(tmp_path / "0")


# Forks children that save in a loop, kills each at a random moment, and looks at what is left. The
# children tell through a pipe which step was saved; the next step may or may not be on disk.
KILLING = """
import os, random, select, signal, sys, time
from memlm.retrieval.index import ChunkIndex
import memlm.state, faiss, pyarrow
from memlm.retrieval import saving
from tests.retrieval.fake import WordVectors
folder, times, factory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
random.seed(0)
# So that every few saves write the word index too.
saving.FEW = 5
index = ChunkIndex(WordVectors(), factory=factory)
if not index.info()["trained"]:
    index.train([f"text {n}" for n in range(20)])
index.add(["step zero"] * 3, ids=[0, "a0", "b0"])
index.save(folder)

def work(pipe):
    index = ChunkIndex.load(folder, WordVectors())
    step = len(index) - 2
    while True:
        # Every step has three chunks when new, and one when the next one came.
        index.add([f"step {step}"] * 3, ids=[step, f"a{step}", f"b{step}"])
        index.remove([f"a{step - 1}", f"b{step - 1}"])
        if step % 17 == 0:
            index.compact()
        index.save(folder)
        os.write(pipe, step.to_bytes(4, "big"))
        step += 1

last = 0
for _ in range(times):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            work(writing)
        finally:
            os._exit(1)
    os.close(writing)
    select.select([reading], [], [], 20)
    time.sleep(random.uniform(0, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    told = b""
    while block := os.read(reading, 65536):
        told += block
    os.close(reading)
    assert told, "the child saved nothing"
    last = int.from_bytes(told[-4:], "big")
    index = ChunkIndex.load(folder, WordVectors())
    now = len(index) - 3
    assert last <= now <= last + 1, (last, now)
    wanted = {*range(now + 1)} | {f"a{now}", f"b{now}"}
    hits = index.search(["step 1"], 10 * len(index), hybrid=False)[0]
    assert {hit.id for hit in hits} == wanted
    if now:
        hits = index.search([str(now)], 10 * len(index))[0]
        assert {hit.id for hit in hits if hit.lexical} == {now, f"a{now}", f"b{now}"}
print(last)
"""


def kill(tmp_path: Path, times: int, factory: str) -> None:
    out = Fresh(tmp_path, KILLING, str(tmp_path / "index"), str(times), factory).result(timeout=300)
    assert int(out) >= times


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_save_leaves_the_index_before_or_after(tmp_path: Path) -> None:
    kill(tmp_path, 15, "Flat")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW16"])
def test_a_hundred_killed_saves(factory: str, tmp_path: Path) -> None:
    kill(tmp_path, 100, factory)
