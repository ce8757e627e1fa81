"""ChunkIndex in memory: what it finds, what a filter lets through, what it refuses."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from memlm.retrieval.embedders import HashingEmbedder
from memlm.retrieval.index import ChunkIndex, Hit
from memlm.retrieval.lexical import Lexical, words
from tests.retrieval.fake import WordVectors, corpus

# Two of them trained by 600 texts through train(), and one that still waits for training.
FACTORIES = ["Flat", "SQ8", "SQfp16", "HNSW16", "HNSW16_SQ8", "IVF4,Flat", "IVF4,SQ8", "PQ8x4"]
EXACT = ["Flat", "HNSW16", "IVF4,Flat"]


def build(
    factory: str = "Flat", count: int = 600, train: bool = True, **options: Any
) -> ChunkIndex:
    index = ChunkIndex(WordVectors(), factory=factory, **options)
    if train and not index.info()["trained"]:
        index.train(corpus(600))
    index.add(corpus(count), metadata=[{"part": n % 7, "even": n % 2 == 0} for n in range(count)])
    return index


def brute(texts: list[str], query: str, k: int, metric: str = "cosine") -> list[tuple[str, float]]:
    embedder = WordVectors()
    vectors, target = embedder.encode(texts), embedder.encode_queries([query])[0]
    if metric == "cosine":
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        target = target / np.linalg.norm(target)
    scores = vectors @ target
    return [(texts[n], float(scores[n])) for n in np.argsort(-scores, kind="stable")[:k]]


def found(index: ChunkIndex, query: str, k: int = 5, **options: Any) -> list[str]:
    return [hit.text for hit in index.search([query], k, **options)[0]]


@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("factory", EXACT)
def test_finds_what_brute_force_finds(factory: str, train: bool, metric: str) -> None:
    index = build(factory, train=train, metric=metric, hybrid=False, effort=600)
    texts = corpus(600)
    for query in (texts[3], "w1 w2 w3", "unknown"):
        hits = index.search([query], 10)[0]
        expected = brute(texts, query, 10, metric)
        np.testing.assert_allclose([h.score for h in hits], [s for _, s in expected], rtol=1e-4)
        assert [h.text for h in hits] == [text for text, _ in expected]
        assert [h.score for h in hits] == [h.dense for h in hits]


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("train", [True, False])
def test_approximate_kinds_find_a_chunk_by_its_own_text(factory: str, train: bool) -> None:
    index = build(factory, train=train, hybrid=False)
    texts = corpus(600)
    own = index.search(texts[:50], 5)
    assert sum(texts[n] in [hit.text for hit in hits] for n, hits in enumerate(own)) >= 45


@pytest.mark.parametrize("hybrid", [True, False])
@pytest.mark.parametrize("factory", FACTORIES)
def test_a_filter_lets_nothing_else_through_and_still_gives_k(factory: str, hybrid: bool) -> None:
    index = build(factory, hybrid=hybrid)
    for where, expected in [
        ({"part": 3}, {3}),
        ({"part": [3, 5.0]}, {3, 5}),
        ({"part": (0, 1, 2, 4, 5, 6)}, {0, 1, 2, 4, 5, 6}),
        ({"part": 3, "even": True}, {3}),
    ]:
        matching = sum(
            n % 7 in expected and ("even" not in where or n % 2 == 0) for n in range(600)
        )
        for k in (1, 40, 1000):
            for hits in index.search(["w1 w2", corpus(600)[8]], k, where=where):
                assert len(hits) == min(k, matching)
                assert {hit.metadata["part"] for hit in hits} <= expected
                assert len({hit.id for hit in hits}) == len(hits)


@pytest.mark.parametrize(
    "where", [{"part": 9}, {"part": []}, {"no": None}, {"even": 1}, {"part": "3"}]
)
def test_a_filter_nothing_matches_gives_nothing(where: dict[str, Any]) -> None:
    assert build().search(["w1"], where=where) == [[]]


def test_none_matches_none_and_a_single_match_is_found_by_every_kind() -> None:
    for factory in FACTORIES:
        index = build(factory)
        index.add(["the one"], ids=["one"], metadata=[{"part": None}])
        assert [h.id for h in index.search(["w5"], 3, where={"part": None})[0]] == ["one"]


def test_the_word_half_finds_a_rare_word_that_the_vectors_miss() -> None:
    class Blind(WordVectors):
        def word(self, word: str) -> Any:
            return super().word("same")

    index = ChunkIndex(Blind())
    index.add([*corpus(300), "the code is Zanzibar-77 here", *corpus(300, seed=1)])
    assert "Zanzibar-77" in found(index, "where is ZANZIBAR?")[0]
    assert "Zanzibar-77" not in " ".join(found(index, "where is zanzibar?", hybrid=False))
    hit = index.search(["zanzibar"], 1)[0][0]
    assert hit.lexical is not None and hit.lexical > 0


@pytest.mark.parametrize(
    "query",
    [
        'a" OR "b',
        "NEAR(a b)",
        "body:w1",
        "w1*",
        "NOT w1",
        "w1 AND",
        "^w1",
        "-",
        "'; DROP TABLE",
        "((",
    ],
)
def test_a_query_is_no_language(query: str) -> None:
    index = build()
    assert len(index.search([query], 5)[0]) == 5


def test_words() -> None:
    assert words("Café_au LAIT, x2!") == ["cafe", "au", "lait", "x2"]
    assert words("Straße \uff21\uff22") == ["strasse", "ab"]
    assert words("東京 to") == ["東", "京", "to"]
    assert words("...") == []


def test_many_words_and_only_common_words() -> None:
    index = ChunkIndex(WordVectors())
    index.add([f"all same {n}" for n in range(20)])
    assert len(index.search([" ".join(f"all same q{n}" for n in range(3000))], 3)[0]) == 3


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("train", [True, False])
def test_changes_show_at_once(factory: str, train: bool) -> None:
    index = build(factory, train=train)
    texts = corpus(600)
    ids = [f"chunk-{n}" for n in range(600)]
    assert found(index, texts[10], 1) == [texts[10]]
    index.remove([ids[10]])
    assert ids[10] not in index and len(index) == 599
    assert texts[10] not in found(index, texts[10], 599)
    index.update([ids[11]], ["brand new words"])
    assert index.get(ids[11]).text == "brand new words"
    assert index.get(ids[11]).metadata == {"part": 4, "even": False}
    assert found(index, "brand new words", 1) == ["brand new words"]
    assert texts[11] not in found(index, texts[11], 599)
    index.update([ids[11]], ["again"], metadata=[{"part": 1}])
    assert index.get(ids[11]).metadata == {"part": 1}
    assert index.add([texts[10]], ids=[ids[10]]) == [ids[10]]
    assert found(index, texts[10], 1) == [texts[10]]
    index.remove([name for name in ids if name != ids[12]])
    assert found(index, "w1", 5) == [texts[12]]
    index.compact()
    assert found(index, "w1", 5) == [texts[12]]
    index.remove([ids[12]])
    assert index.search(["w1"]) == [[]] and len(index) == 0
    index.add(texts)
    assert len(found(index, "w1", 1000)) == 600


def test_training_by_itself_when_enough_was_added() -> None:
    index = ChunkIndex(WordVectors(), factory="IVF8,SQ8", hybrid=False)
    need = index.info()["train_at"]
    texts = corpus(need + 10)
    index.add(texts[: need - 1])
    assert not index.info()["trained"] and index.info()["waiting"] == need - 1
    assert found(index, texts[0], 1) == [texts[0]]
    index.add(texts[need - 1 :])
    assert index.info()["trained"] and index.info()["waiting"] == 0
    assert found(index, texts[0], 1) == [texts[0]] and found(index, texts[-1], 1) == [texts[-1]]
    assert len(found(index, "w1", need + 10)) == need + 10


def test_equal_scores_keep_the_order_of_adding() -> None:
    index = ChunkIndex(WordVectors(), hybrid=False)
    index.add(["same text"] * 5, ids=list(range(5)))
    assert [hit.id for hit in index.search(["same"], 5)[0]] == [0, 1, 2, 3, 4]


def test_edges() -> None:
    index = ChunkIndex(WordVectors())
    assert index.search(["w1"]) == [[]] and index.search([]) == [] and index.add([]) == []
    assert index.bytes >= 0 and len(index) == 0 and "x" not in index and None not in index
    ids = index.add(["höhe 東京 \U0001f600", "zero"], ids=["ключ", 7], metadata=[{"a": None}, {}])
    assert ids == ["ключ", 7] and 7 in index and "7" not in index
    assert index.get(7) == Hit("zero", 7, 0.0, {})
    index.add(["other"], ids=["7"])
    assert index.get("7").text == "other" and index.get(7).text == "zero"
    index.remove(["7"])
    assert index.get("ключ").metadata == {"a": None}
    assert {hit.id: hit.dense for hit in index.search(["zero"], 9)[0]} == {"ключ": 0.0, 7: 0.0}
    with pytest.raises(KeyError, match="absent"):
        index.get("absent")
    assert index.add(["more"]) == ["chunk-3"]
    index.add(["taken"], ids=["chunk-5"])
    assert index.add(["a", "b"]) == ["chunk-6", "chunk-7"]


def test_two_indexes_share_nothing() -> None:
    embedder = WordVectors()
    one, two = ChunkIndex(embedder), ChunkIndex(embedder)
    one.add(["alpha"], ids=["a"])
    two.add(["beta"], ids=["a"])
    assert found(one, "beta") == ["alpha"] and found(two, "alpha") == ["beta"]


class Modern:
    """An embedder with sentence-transformers' names alone, which marks what it was asked for."""

    dim, fingerprint = 2, "modern"

    def encode_document(self, texts: Sequence[str]) -> Any:
        return np.tile(np.array([1, 0], np.float32), (len(texts), 1))

    def encode_query(self, texts: Sequence[str]) -> Any:
        return np.tile(np.array([0.6, 0.8], np.float32), (len(texts), 1))


def test_documents_and_queries_go_to_their_own_methods() -> None:
    index = ChunkIndex(Modern(), hybrid=False)
    index.add(["one"])
    assert index.search(["who"])[0][0].score == pytest.approx(0.6)
    assert index.likeness("who", ["one"]) == pytest.approx([0.6])
    with pytest.raises(ValueError, match="Nothing, which has no encode_document"):
        nothing = type("Nothing", (), {"dim": 2, "fingerprint": "nothing"})
        ChunkIndex(nothing()).add(["one"])


class Spoiled(WordVectors):
    """Good vectors, until told what to return."""

    answer: Any = None

    def encode(self, texts: Any) -> Any:
        return super().encode(texts) if self.answer is None else self.answer


def bad_vectors(value: float) -> Any:
    return np.full((2, 16), value, np.float32)


BAD: list[tuple[str, Callable[[ChunkIndex], Any], str]] = [
    ("str", lambda i: i.add("text"), "list of texts"),
    ("None", lambda i: i.add(None), "NoneType"),
    ("metadata int", lambda i: i.add(["new"], metadata=3), "int"),
    ("remove int", lambda i: i.remove(1), "int"),
    ("empty", lambda i: i.add(["new", " \n"]), r"texts\[1\].*empty"),
    ("bytes", lambda i: i.add(["new", b"b"]), r"texts\[1\].*bytes"),
    ("surrogate", lambda i: i.add(["new", "a\ud800"]), r"texts\[1\].*surrogate"),
    ("known id", lambda i: i.add(["new"], ids=["chunk-1"]), "'chunk-1'.*in the index"),
    ("twice", lambda i: i.add(["new", "b"], ids=[5, 5]), r"ids\[1\]=5 .*before"),
    ("bool id", lambda i: i.add(["new"], ids=[True]), "bool"),
    ("empty id", lambda i: i.add(["new"], ids=[""]), "empty"),
    ("surrogate id", lambda i: i.add(["new"], ids=["\udfff"]), "surrogate"),
    ("ids are one str", lambda i: i.add(["new"], ids="a"), "list of ids"),
    ("too few ids", lambda i: i.add(["new", "b"], ids=["a"]), "1 entries for 2"),
    ("metadata count", lambda i: i.add(["new"], metadata=[{}, {}]), "2 entries for 1"),
    ("metadata mapping", lambda i: i.add(["new"], metadata={"a": 1}), "list"),
    ("metadata nested", lambda i: i.add(["new"], metadata=[{"a": [1]}]), "list"),
    ("metadata key", lambda i: i.add(["new"], metadata=[{1: 1}]), "key"),
    ("metadata nan", lambda i: i.add(["new"], metadata=[{"a": float("nan")}]), "finite"),
    ("metadata surrogate", lambda i: i.add(["new"], metadata=[{"a": "\ud800"}]), "surrogate"),
    ("update unknown", lambda i: i.update(["chunk-1", "x"], ["a", "b"]), "'x'.*not in"),
    ("update count", lambda i: i.update(["chunk-1"], ["a", "b"]), "1 entries for 2"),
    ("update twice", lambda i: i.update(["chunk-1"] * 2, ["a", "b"]), "before"),
    ("remove unknown", lambda i: i.remove(["chunk-1", "x"]), "'x'.*not in"),
    ("remove twice", lambda i: i.remove(["chunk-1", "chunk-1"]), "before"),
    ("remove str", lambda i: i.remove("chunk-1"), "list of ids"),
    ("k 0", lambda i: i.search(["a"], 0), "k=0"),
    ("k bool", lambda i: i.search(["a"], True), "k=True"),
    ("k float", lambda i: i.search(["a"], 2.0), "k=2.0"),
    ("query str", lambda i: i.search("a"), "list of texts"),
    ("query empty", lambda i: i.search([""]), "empty"),
    ("where list", lambda i: i.search(["a"], where=["part"]), "where"),
    ("where value", lambda i: i.search(["a"], where={"part": {"a": 1}}), r"where\['part'\]"),
    ("train Flat", lambda i: i.train(["a"]), "no training"),
]


@pytest.mark.parametrize(("call", "match"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_changes_nothing(call: Callable[[ChunkIndex], Any], match: str) -> None:
    index = build(count=30)
    before = (len(index), index.search(["w1 new"], 30))
    with pytest.raises(ValueError, match=match):
        call(index)
    assert (len(index), index.search(["w1 new"], 30)) == before


@pytest.mark.parametrize(
    "answer",
    [
        bad_vectors(float("nan")),
        bad_vectors(float("inf")),
        bad_vectors(3e38),
        np.zeros((2, 8), np.float32),
        np.zeros((1, 16), np.float32),
        np.zeros(16, np.float32),
        np.zeros((2, 16), np.int64),
    ],
)
def test_bad_vectors_change_nothing(answer: Any) -> None:
    embedder = Spoiled()
    index = ChunkIndex(embedder)
    index.add(corpus(20))
    before = index.search(["w1"], 20)
    embedder.answer = answer
    for call in (
        lambda: index.add(["a", "b"]),
        lambda: index.update(["chunk-1", "chunk-2"], ["a", "b"]),
        lambda: index.search(["a", "b"]),
    ):
        with pytest.raises(ValueError, match="embedder returned"):
            call()
    embedder.answer = None
    assert index.search(["w1"], 20) == before


def test_a_changed_embedder_is_refused() -> None:
    embedder = WordVectors()
    index = ChunkIndex(embedder)
    embedder.fingerprint = "words-2"
    index.add(["first"])
    embedder.fingerprint = "words-3"
    for call in (lambda: index.add(["second"]), lambda: index.search(["first"])):
        with pytest.raises(ValueError, match="words-3"):
            call()
    assert len(index) == 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"factory": "LSH"}, "LSH"),
        ({"factory": "PCA8,Flat"}, "PCA8"),
        ({"factory": 3}, "factory=3"),
        ({"factory": "IVF4,PQ7"}, "dim=16"),
        ({"factory": "PQ0"}, "'PQ0' is not supported"),
        # faiss would end the process: at once, or when something is added or looked for.
        ({"factory": "IVF4,PQ0"}, "'IVF4,PQ0' is not supported"),
        ({"factory": "IVF0,Flat"}, "'IVF0,Flat' is not supported"),
        ({"factory": "HNSW0"}, "'HNSW0' is not supported"),
        ({"factory": "HNSW1_SQ8"}, "'HNSW1_SQ8' is not supported"),
        ({"factory": "HNSW1"}, "'HNSW1' is not supported"),
        ({"factory": "HNSW٣٢"}, "is not supported"),
        ({"metric": "l2"}, "cosine"),
        ({"threads": 0}, "threads=0"),
        ({"effort": -1}, "effort=-1"),
    ],
)
def test_bad_settings(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ChunkIndex(WordVectors(), **options)


def test_impossible_training_is_refused() -> None:
    index = ChunkIndex(WordVectors(), factory="IVF16,Flat", hybrid=False)
    with pytest.raises(ValueError, match="at least 16"):
        index.train(corpus(15))
    index.train(corpus(16))
    with pytest.raises(ValueError, match="is trained"):
        index.train(corpus(16))
    with pytest.raises(ValueError, match="hybrid=False"):
        index.search(["a"], hybrid=True)


def test_without_fts5_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlite3

    class Poor(sqlite3.Connection):
        def execute(self, sql: str, *rest: Any) -> Any:
            if "fts5" in sql:
                raise sqlite3.OperationalError("no such module: fts5")
            return super().execute(sql, *rest)

    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: real(*a, factory=Poor, **k))
    with pytest.raises(ValueError, match=r"FTS5.*hybrid=False"):
        ChunkIndex(WordVectors())
    ChunkIndex(WordVectors(), hybrid=False).add(["a"])


def test_a_dropped_word_index_is_freed() -> None:
    lexical = Lexical()
    lexical.add([(0, "alpha")])
    assert lexical.search("alpha", 1, np.ones(1, bool)) and not lexical.search(
        "alpha", 1, np.zeros(1, bool)
    )
    gone = weakref.ref(lexical)
    del lexical
    gc.collect()
    assert gone() is None


def test_words_find_what_hashing_alone_misses() -> None:
    from memlm.retrieval import HashingEmbedder

    index = ChunkIndex(HashingEmbedder(dim=64))
    index.add(corpus(400, words=2000))
    names = [f"n0x{n}" for n in range(0, 400, 20)]

    def recall(hybrid: bool) -> int:
        answers = index.search(names, 5, hybrid=hybrid)
        return sum(
            any(hit.text.endswith(f" {name}") for hit in hits)
            for name, hits in zip(names, answers, strict=True)
        )

    assert recall(True) == len(names) > recall(False)


def test_words_are_added_all_or_none() -> None:
    lexical = Lexical()

    def items() -> Any:
        yield 0, "alpha"
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        lexical.add(items())
    assert lexical.count == 0 and lexical.search("alpha", 5) == []
    lexical.add([(0, "alpha")])
    assert lexical.count == 1 and len(lexical.search("alpha", 5)) == 1


def test_threads_setting_stays_inside() -> None:
    import faiss

    before = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(3)
        build("IVF4,Flat", threads=1).search(["w1"])
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)


def test_threads_add_and_search_at_once() -> None:
    index = ChunkIndex(WordVectors())
    index.add(corpus(50))
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for n in range(10):
                texts = corpus(20, seed=seed * 100 + n)
                ids = index.add(texts)
                assert texts[0] in found(index, texts[0], 1)
                index.remove(ids[:5])
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors and len(index) == 50 + 4 * 10 * 15


def test_importing_is_light() -> None:
    code = (
        "import sys, memlm.retrieval, memlm.retrieval.index;"
        "assert not {'torch', 'faiss', 'pyarrow', 'transformers'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


TOGETHER = """
import sys
first, second = sys.argv[1:]
for name in (first, second):
    __import__(name)
import faiss, numpy as np, torch
from memlm.retrieval.index import ChunkIndex
torch.set_num_threads(2)
class Embedder:
    dim, fingerprint = 32, "r"
    def encode(self, texts):
        return np.random.default_rng(len(texts)).standard_normal((len(texts), 32)).astype("f4")
    encode_queries = encode
index = ChunkIndex(Embedder(), factory="IVF64,Flat", threads=2)
for step in range(3):
    index.add([f"text {step} {n}" for n in range(3000)])
    layer = torch.nn.Linear(256, 256)
    layer(torch.randn(512, 256)).square().mean().backward()
    assert all(len(hits) == 5 for hits in index.search(["a"] * 32))
assert index.info()["trained"] and torch.isfinite(layer.weight.grad).all()
print("done")
"""


# In the processes of the other tests torch is imported first.
@pytest.mark.parametrize(
    "order", [pytest.param(("torch", "faiss"), marks=pytest.mark.slow), ("faiss", "torch")]
)
def test_torch_and_faiss_in_one_process(order: tuple[str, str]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", TOGETHER, *order], capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0 and run.stdout.strip() == "done", run.stderr


class OneAtATime(WordVectors):
    """Notes when it is used by two threads at once."""

    def __init__(self) -> None:
        super().__init__()
        self.busy, self.disturbed = False, 0

    def encode(self, texts: Sequence[str]) -> Any:
        self.disturbed += self.busy
        self.busy = True
        time.sleep(0.002)
        found = super().encode(texts)
        self.busy = False
        return found


def in_threads(work: Callable[[int], object], count: int = 4) -> list[BaseException]:
    """Run `work` with 0, 1, ... at once, the threads taking turns as often as they can."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=guarded, args=(n,), daemon=True) for n in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    finally:
        sys.setswitchinterval(before)
    return errors


def test_an_embedder_is_used_by_one_thread_at_a_time() -> None:
    embedder = OneAtATime()
    index = ChunkIndex(embedder)
    index.add(corpus(5))

    def work(number: int) -> None:
        for n in range(3):
            ids = index.add(corpus(4, seed=10 * number + n + 1))
            index.search(["w1"])
            index.likeness("w1", ["w1", "w2"])
            index.update(ids[:1], [f"another text {number} {n}"])

    assert in_threads(work) == []
    assert embedder.disturbed == 0 and len(index) == 5 + 4 * 3 * 4


def test_threads_that_add_new_words_lose_no_chunk() -> None:
    """Words are learned as they come, by indexes that share their embedder as well."""
    embedder = HashingEmbedder(dim=64)
    indexes = [ChunkIndex(embedder), ChunkIndex(embedder)]

    def work(number: int) -> None:
        for n in range(30):
            texts = [" ".join(f"w{number}x{n}x{t}x{w}" for w in range(12)) for t in range(20)]
            indexes[number % 2].add(texts)

    assert in_threads(work) == []
    assert [len(index) for index in indexes] == [1200, 1200]
    alone = ChunkIndex(HashingEmbedder(dim=64))
    alone.add(["w1x2x3x4 w1x2x3x5"])
    query = "w1x2x3x5"
    assert embedder.encode([query]).tolist() == alone.embedder.encode([query]).tolist()
    again = pickle.loads(pickle.dumps(embedder))
    assert again.encode([query]).tolist() == embedder.encode([query]).tolist()
