"""Vectors in codes: what they lose, what an index of them finds, and what it takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memlm.retrieval import ChunkIndex, HashingEmbedder, store
from memlm.retrieval.codes import Ternary
from tests.retrieval.fake import WordVectors, corpus
from tests.retrieval.test_index_files import same


def decoded(codes: Ternary, kept: np.ndarray) -> np.ndarray:
    """What products with unit vectors see."""
    return codes.products(np.eye(codes.dim, dtype=np.float32), kept).T


def best_ternary(vector: np.ndarray) -> np.ndarray:
    """The nearest vector of -a, 0 and a, by trying every number of nonzeros."""
    order = np.argsort(-np.abs(vector))
    tried = [np.zeros_like(vector)]
    for count in range(1, len(vector) + 1):
        kept = np.zeros_like(vector)
        kept[order[:count]] = np.sign(vector[order[:count]])
        tried.append(kept * np.abs(vector[order[:count]]).mean())
    return min(tried, key=lambda kept: float(((vector - kept) ** 2).sum()))


@pytest.mark.parametrize(("dim", "excess"), [(1, 0.0), (7, 0.1), (384, 0.01)])
def test_ternary_codes_are_nearly_the_nearest(dim: int, excess: float) -> None:
    random = np.random.default_rng(dim)
    sparse = random.standard_normal((80, dim)) * (random.random((80, dim)) < 0.3)
    vectors = np.concatenate([sparse, random.standard_normal((60, dim))]).astype(np.float32)
    codes = Ternary(dim)
    kept = codes.encode(vectors)
    assert kept.shape == (140, codes.width) and kept.dtype == np.uint8
    seen = decoded(codes, kept)
    assert all(len(np.unique(np.abs(row[row != 0]))) <= 1 for row in seen)
    error = ((vectors - seen) ** 2).sum()
    least = sum(((row - best_ternary(row)) ** 2).sum() for row in vectors)
    assert least - 1e-4 <= error <= (1 + excess) * least + 1e-4


def test_ternary_codes_keep_ternary_vectors_and_zero() -> None:
    random = np.random.default_rng(0)
    vectors = random.integers(-1, 2, (70, 13)).astype(np.float32) * 0.25
    vectors[3] = 0
    codes = Ternary(13)
    np.testing.assert_allclose(decoded(codes, codes.encode(vectors)), vectors, atol=1e-7)
    # A vector does not depend on those it is encoded with.
    alone = np.concatenate([codes.encode(vectors[n : n + 1]) for n in range(70)])
    np.testing.assert_array_equal(alone, codes.encode(vectors))


def texts(count: int, words: int) -> list[str]:
    """Texts of words drawn as in a language, each with a name that no other text has."""
    random = np.random.default_rng(1)
    share = 1 / np.arange(1, 5001)
    drawn = random.choice(5000, (count, words), p=share / share.sum())
    return [" ".join(f"w{w}" for w in line) + f" name{n}" for n, line in enumerate(drawn)]


@pytest.mark.parametrize("words", [12, 60])
def test_a_hashed_index_finds_what_one_of_floats_finds(words: int) -> None:
    corpus, exact = texts(800, words), 0
    queries = [f"where is name{n}" for n in range(0, 800, 4)]
    found = {}
    for precision in ("float32", "ternary"):
        index = ChunkIndex(HashingEmbedder(), hybrid=False, precision=precision)
        index.add(corpus)
        found[precision] = [[hit.id for hit in hits] for hits in index.search(queries, 5)]
    exact = sum(f"chunk-{4 * n}" in ids for n, ids in enumerate(found["float32"]))
    coded = sum(f"chunk-{4 * n}" in ids for n, ids in enumerate(found["ternary"]))
    assert exact > 150 and coded >= exact - 2


def test_the_default_takes_at_most_five_times_the_text(tmp_path: Path) -> None:
    corpus = texts(1500, 64)
    index = ChunkIndex(HashingEmbedder())
    assert index.precision == "ternary" and ChunkIndex(WordVectors()).precision == "float32"
    index.add(corpus)
    index.search(["name7"])
    index.save(tmp_path)
    text = sum(len(each) for each in corpus)
    assert index.bytes < 5 * text
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 5 * text
    assert ChunkIndex(HashingEmbedder(), precision="float32").precision == "float32"


@pytest.mark.parametrize("mmap", [False, True])
def test_coded_indexes_are_changed_and_saved_like_others(tmp_path: Path, mmap: bool) -> None:
    index = ChunkIndex(WordVectors(dim=64), precision="ternary", hybrid=False)
    index.add(corpus(300), ids=range(300), metadata=[{"part": n % 2} for n in range(300)])
    index.save(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    index.add(["w1 w2 tail"], ids=[300])
    index.update([3], ["an update"])
    index.remove([4, 5])
    assert 4 not in {hit.id for hit in index.search([corpus(5)[4]], 300)[0]}
    index.save(tmp_path)
    # Only what was added is written, in codes.
    new = {path for path in tmp_path.iterdir() if path.name not in before}
    assert len(list(tmp_path.glob("vectors-*"))) == 2 and not list(tmp_path.glob("main-*"))
    assert sum(path.stat().st_size for path in new if path.name != store.MANIFEST) < 10_000
    again = ChunkIndex.load(tmp_path, WordVectors(dim=64), mmap=mmap)
    assert again.precision == "ternary" and len(again) == 299
    for where in (None, {"part": [1]}):
        queries = ["an update", "w1 w2", "w9", corpus(5)[4]]
        same(again.search(queries, 20, where=where), index.search(queries, 20, where=where))
    assert again.search(["an update"], 1)[0][0].id == 3
    if not mmap:
        again.remove([3])
        again.compact()
        again.save(tmp_path)
        again = ChunkIndex.load(tmp_path, WordVectors(dim=64))
        assert len(again) == 298 and 3 not in again and again.info()["parts"] == 2


def test_a_save_of_the_first_version_is_read_and_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "VERSION", 1)
    index = ChunkIndex(HashingEmbedder(), precision="float32")
    index.add(texts(20, 12))
    index.save(tmp_path)
    manifest = store.read_manifest(tmp_path)
    assert manifest is not None and manifest.pop("precision") == "float32"
    manifest.pop("checksum")
    parts = manifest.pop("parts")
    settings = {
        name: value
        for name, value in manifest.items()
        if name not in ("format", "version", "generation")
    }
    store.commit(tmp_path, settings, parts, manifest["generation"])
    monkeypatch.undo()
    again = ChunkIndex.load(tmp_path, HashingEmbedder())
    assert again.precision == "float32"
    assert again.search(["name3 w1"], 5) == index.search(["name3 w1"], 5)
    again.add(["a word more"])
    again.save(tmp_path)
    assert ChunkIndex.load(tmp_path, HashingEmbedder()).precision == "float32"


def test_bad_precisions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"precision='half' is unknown; use one of float32, tern"):
        ChunkIndex(WordVectors(), precision="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="precision='ternary' is for factory='Flat'"):
        ChunkIndex(WordVectors(), factory="SQ8", precision="ternary")
    assert ChunkIndex(HashingEmbedder(64), factory="SQ8").precision is None
    index = ChunkIndex(WordVectors(), precision="ternary")
    index.add(["a", "b"])
    with pytest.raises(ValueError, match="needs no training"):
        index.train(["a"])
    index.save(tmp_path)
    manifest = store.read_manifest(tmp_path)
    assert manifest is not None
    forged = {
        k: v for k, v in manifest.items() if k not in ("format", "version", "checksum", "parts")
    }
    generation = forged.pop("generation")
    store.commit(tmp_path, {**forged, "precision": "float32"}, manifest["parts"], generation)
    with pytest.raises(ValueError, match="damaged or not of this index"):
        ChunkIndex.load(tmp_path, WordVectors())
