"""What an index promises wherever its chunks are: in this process, or with Milvus (Lite, no cluster)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memlm import DocumentStream
from memlm.cli import main
from memlm.retrieval import store
from memlm.retrieval.arguments import ABSENT
from memlm.retrieval.embedders import HashingEmbedder
from memlm.retrieval.index import ChunkIndex
from memlm.retrieval.milvus import MilvusStore, saved_address
from memlm.retrieval.retriever import RetrievalConfig, Retriever
from tests.cases import memory_model
from tests.retrieval.fake import WordVectors, corpus
from tests.tokenizers import tokenizer

Make = Callable[..., ChunkIndex]
STORES = ["memory", "milvus"]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("pymilvus")
    manager = pytest.importorskip("milvus_lite.server_manager").server_manager_instance
    path = str(tmp_path_factory.mktemp("milvus") / "chunks.db")
    yield path
    manager.release_server(path)


@pytest.fixture
def place(database: str, request: pytest.FixtureRequest) -> MilvusStore:
    """A collection of this test's own."""
    name = "".join(c if c.isalnum() else "_" for c in request.node.name)
    return MilvusStore(database, f"t_{name}")


@pytest.fixture(params=STORES)
def make(request: pytest.FixtureRequest) -> Make:
    """Makes an empty index over the store that the parameter names."""
    if request.param == "memory":
        return lambda **options: ChunkIndex(WordVectors(), **options)
    place = request.getfixturevalue("place")
    return lambda **options: ChunkIndex(WordVectors(), store=place, **options)


def ids(index: ChunkIndex, query: str = "w1 w2", k: int = 50, **options: Any) -> set[Any]:
    return {hit.id for hit in index.search([query], k, **options)[0]}


@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
def test_the_nearest_are_those_of_numpy(make: Make, metric: str) -> None:
    index, texts = make(metric=metric), [*corpus(120), "zero", "zero"]
    given = index.add(texts)
    assert len(index) == 122 and len(set(given)) == 122 and given[5] in index
    vectors = WordVectors().encode(texts)
    queries = ["w1 w2 w3", texts[7], "zero"]
    targets = WordVectors().encode_queries(queries)
    if metric == "cosine":
        vectors, targets = (
            v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-9)
            for v in (vectors, targets)
        )
    for hits, target in zip(index.search(queries, 10, hybrid=False), targets, strict=True):
        scores = vectors @ target
        order = np.argsort(-scores, kind="stable")[:10]
        np.testing.assert_allclose([hit.score for hit in hits], scores[order], rtol=1e-4, atol=1e-5)
        if target.any():
            assert [hit.id for hit in hits] == [given[n] for n in order]
        assert all(hit.lexical is None and hit.dense == hit.score for hit in hits)


@pytest.mark.parametrize("hybrid", [True, False])
def test_equal_scores_keep_the_order_of_adding(make: Make, hybrid: bool) -> None:
    index, order = make(), ["d", "a", "c", "b"]
    index.add(["w1 same"] * 2, ids=order[:2])
    index.add(["w1 same"] * 2, ids=order[2:])
    assert [hit.id for hit in index.search(["w1 same"], 9, hybrid=hybrid)[0]] == order


def test_a_rare_word_is_found_whatever_the_embedder(make: Make) -> None:
    index = make()
    index.add([*corpus(100), "the code is Zänzibar-77 here"], ids=range(101))
    best = index.search(["where is ZANZIBAR?", "zero ??"], 1)[0][0]
    assert best.id == 100 and best.lexical is not None and best.lexical > 0
    only = {hit.id for hit in index.search(["zanzibar"], 101)[0] if hit.lexical is not None}
    assert only == {100}


ODD = 'a" or array_length(tags) >= 0 or "\\\n\'日本'
NOTES: list[dict[str, Any]] = [
    {"part": 1},
    {"part": 1.0, "even": True},
    {"part": "1"},
    {"part": True},
    {"part": None},
    {},
    {ODD: ODD},
    {"part": 2**70, "even": False},
    {"part": 0.5},
]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"part": 1}, {0, 1}),
        ({"part": "1"}, {2}),
        ({"part": True}, {3}),
        ({"part": None}, {4}),
        ({"part": ABSENT}, {5, 6}),
        ({"part": [ABSENT, 0.5]}, {5, 6, 8}),
        ({"part": [1, "1"], "even": True}, {1}),
        ({"part": 1, "even": ABSENT}, {0}),
        ({ODD: ODD}, {6}),
        ({ODD: ABSENT, "even": ABSENT}, {0, 2, 3, 4, 5, 8}),
        ({"part": 2**70}, {7}),
        ({"part": 2**70 + 1}, set()),
        ({"part": []}, set()),
        ({"nowhere": 1}, set()),
        ({'" or key != "': "x"}, set()),
    ],
)
def test_a_filter_lets_through_what_it_says(
    filtered: ChunkIndex, where: dict[str, Any], expected: set[int]
) -> None:
    for hybrid in (False, True):
        assert ids(filtered, "w1 common", where=where, hybrid=hybrid) == expected
    assert len(filtered.search(["w1 common"], 1, where=where)[0]) == min(1, len(expected))


@pytest.fixture(scope="module", params=STORES)
def filtered(request: pytest.FixtureRequest) -> ChunkIndex:
    index = ChunkIndex(WordVectors())
    if request.param == "milvus":
        place = MilvusStore(request.getfixturevalue("database"), "filtered")
        index = ChunkIndex(WordVectors(), store=place)
    index.add([f"w{n} common" for n in range(9)], ids=range(9), metadata=NOTES)
    return index


def test_changes_show_at_once_and_are_all_or_none(make: Make) -> None:
    index = make()
    odd = ['q"\\\n', 7, "7", '" or key != "', "日本"]
    index.add(["w1", "w2", "w3", "w4", "w5"], ids=odd, metadata=[{"n": n} for n in range(5)])
    assert all(name in index for name in odd) and "nobody" not in index
    assert index.get(7).text == "w2" and index.get("7").metadata == {"n": 2}
    for bad in (
        lambda: index.add(["x", "y"], ids=["new", 7]),
        lambda: index.remove(["7", "nobody"]),
        lambda: index.update(["7", "nobody"], ["x", "y"]),
    ):
        with pytest.raises(ValueError, match=r"is (not )?in the index"):
            bad()
    assert len(index) == 5 and "new" not in index
    index.update([7], ["w2 changed"])
    assert index.get(7).text == "w2 changed" and index.get(7).metadata == {"n": 1}
    assert index.search(["changed"], 1)[0][0].id == 7 and len(index) == 5
    index.update([7], ["w9"], metadata=[{"n": 9}])
    assert ids(index, where={"n": 9}) == {7} and ids(index, where={"n": 1}) == set()
    assert all(hit.lexical is None for hit in index.search(["changed"], 9)[0])
    index.remove([7, '" or key != "'])
    assert ids(index) == {'q"\\\n', "7", "日本"} and len(index) == 3
    with pytest.raises(KeyError, match="not in the index"):
        index.get(7)
    index.add(["w2 again"], ids=[7])
    assert index.get(7).metadata == {} and len(index) == 4
    index.compact()
    assert len(index) == 4 and index.search(["again"], 1)[0][0].id == 7
    index.remove(list(ids(index)))
    assert len(index) == 0 and index.search(["w1"]) == [[]]


def test_streams_of_one_index_see_nothing_of_each_other(make: Make) -> None:
    index = make()
    index.add(["The library says the moon is made of rock."], ids=["library"])
    one, two = Retriever(index), Retriever(index)
    one.write("Mary hid the golden lamp in the cellar. " * 12, document="one")
    two.write("John sold the golden lamp to a stranger. " * 12, document="two")
    fork = one.fork()
    fork.write("The fork alone knows of the silver key. " * 12)
    one.end(), two.end(), fork.end()

    def told(retriever: Retriever, question: str) -> str:
        return " ".join(passage.text for passage in retriever.recall(question, k=50))

    question = "Who has the golden lamp, the silver key and the moon?"
    assert "Mary" in told(one, question) and "John" not in told(one, question)
    assert "John" in told(two, question) and "Mary" not in told(two, question)
    assert "silver" in told(fork, question) and "Mary" in told(fork, question)
    assert "silver" not in told(one, question)
    assert all("library" in told(some, question) for some in (one, two, fork))


def test_a_stream_takes_back_what_it_alone_wrote(make: Make) -> None:
    index, text = make(), "Mary hid the golden lamp in the cellar. " * 40
    index.add(["w1 a library"], ids=["library"])
    one, other = Retriever(index), Retriever(index)
    other.write(text)
    other.flush()
    kept = ids(index)
    one.write(text)
    one.flush()
    assert ids(index) > kept
    one.write(text)  # some of it waits
    one.withdraw()
    assert ids(index) == kept
    one.write(text)
    fork = one.fork()
    both = ids(index)
    for retriever in (one, fork):
        retriever.write(text)
        retriever.flush()
        assert ids(index) > both
        retriever.withdraw()
        assert ids(index) == both
    fork.write(text)
    state, more = fork.state(), ids(index)
    fork.withdraw()
    assert ids(index) == more > both
    again = Retriever.restore(index, state)
    again.write(text)
    again.flush()
    assert ids(index) > more
    again.withdraw()
    assert ids(index) == more


@pytest.mark.parametrize("kind", STORES)
def test_a_saved_index_opens_again_with_its_embedder(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    where = {} if kind == "memory" else {"store": request.getfixturevalue("place")}
    index = ChunkIndex(WordVectors(), **where)
    index.add(corpus(20), ids=range(20), metadata=[{"even": n % 2 == 0} for n in range(20)])
    index.save(tmp_path)
    again = ChunkIndex.load(tmp_path, WordVectors())
    queries = ["w1 w2", "n0x7"]
    assert again.search(queries, 20, {"even": True}) == index.search(queries, 20, {"even": True})
    with pytest.raises(ValueError, match="fingerprint='other'"):
        ChunkIndex.load(tmp_path, WordVectors(fingerprint="other"))
    with pytest.raises(ValueError, match="dim=8"):
        ChunkIndex.load(tmp_path, WordVectors(8))


@pytest.mark.parametrize("kind", STORES)
def test_those_who_go_on_from_one_save_see_nothing_of_each_other(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share a store, and what was saved: the stream that was saved is one of them."""
    where = {} if kind == "memory" else {"store": request.getfixturevalue("place")}
    index = ChunkIndex(HashingEmbedder(64), **where)
    config = RetrievalConfig(k=50, size=6)
    # One index that all hold stands for a store that all reach.
    monkeypatch.setattr(type(index._store), "outlives_process", True)

    def again(state: Any) -> Retriever:
        reached = ChunkIndex(HashingEmbedder(64), **where) if where else index
        return Retriever.restore(reached, json.loads(json.dumps(state)))

    def known(retriever: Retriever) -> set[str]:
        found = " ".join(passage.text for passage in retriever.recall("Who hid the lamp?"))
        return {word for word in ("Mary", "Ann", "Bob", "Cid", "Dan") if word in found}

    def write(retriever: Retriever, who: str) -> None:
        retriever.write(f"{who} hid the golden lamp in the cellar. ")
        retriever.end()

    empty = Retriever(index, config)
    before = empty.state()
    write(empty, "Dan")
    assert known(empty) == {"Dan"} and known(again(before)) == set()
    first = Retriever(index, config)
    write(first, "Mary")
    states = [first.state(), first.state()]  # Nothing is written between the two.
    write(first, "Ann")
    others = [again(state) for state in states]
    assert [known(other) for other in others] == [{"Mary"}, {"Mary"}]
    for other, who in zip(others, ("Bob", "Cid"), strict=True):
        write(other, who)
    everybody = [first, *others]
    told = [{"Mary", "Ann"}, {"Mary", "Bob"}, {"Mary", "Cid"}]
    assert [known(one) for one in everybody] == told
    # Whoever comes later takes nothing from those who are there.
    states = [one.state() for one in everybody]
    for one in everybody:
        write(one, "Dan")
    assert [known(again(state)) for state in states] == told
    assert [known(one) for one in everybody] == [words | {"Dan"} for words in told]


# --- Milvus alone


def test_what_is_saved_is_the_address_and_no_more(place: MilvusStore, tmp_path: Path) -> None:
    secret = MilvusStore(place.address, place.collection, token="root:secret")
    assert "secret" not in repr(secret)
    index = ChunkIndex(WordVectors(), store=secret)
    index.add(["w1 private", "w2"], ids=[1, 2])
    index.save(tmp_path)
    assert os.listdir(tmp_path) == [store.MANIFEST]
    written = (tmp_path / store.MANIFEST).read_text()
    assert "secret" not in written and "private" not in written
    kept = json.loads(written)
    assert kept["store"]["collection"] == place.collection and kept["chunks"] == 2
    index.add(["w3"], ids=[3])  # others go on writing
    assert len(ChunkIndex.load(tmp_path, WordVectors())) == 3
    # A text is another address, of the collection that was saved.
    assert len(ChunkIndex.load(tmp_path, WordVectors(), store=place.address)) == 3
    index.remove([1, 2])
    with pytest.raises(ValueError, match="the store has 1 chunks, and had 2"):
        ChunkIndex.load(tmp_path, WordVectors())
    for options, match in (
        ({"mmap": True}, "mmap=True is for an index that holds its chunks itself"),
        ({"store": MilvusStore(place.address, "nobody")}, "holds no collection 'nobody'"),
        ({"store": str(tmp_path / "gone.db")}, "is not there"),
    ):
        with pytest.raises(ValueError, match=match):
            ChunkIndex.load(tmp_path, WordVectors(), **options)
    assert not (tmp_path / "gone.db").exists()


def test_a_collection_is_for_one_embedder_and_one_kind_of_search(place: MilvusStore) -> None:
    ChunkIndex(WordVectors(), store=place).add(["w1"])
    assert len(ChunkIndex(WordVectors(), store=place)) == 1
    for embedder, options, match in (
        (WordVectors(fingerprint="other"), {}, "fingerprint='other', but collection"),
        (WordVectors(8), {}, "dim=8, but"),
        (WordVectors(), {"metric": "inner_product"}, "metric='inner_product', but"),
        (WordVectors(), {"hybrid": False}, "hybrid=False, but"),
    ):
        with pytest.raises(ValueError, match=match):
            ChunkIndex(embedder, store=place, **options)


def test_without_words_a_collection_has_none(place: MilvusStore) -> None:
    index = ChunkIndex(WordVectors(), store=place, hybrid=False)
    index.add(["w1", "w2"], ids=[1, 2])
    assert ids(index) == {1, 2}
    with pytest.raises(ValueError, match="hybrid=True, but the index was made with hybrid=False"):
        index.search(["w1"], hybrid=True)


def test_a_foreign_collection_is_refused(place: MilvusStore) -> None:
    from pymilvus import MilvusClient

    client = MilvusClient(place.address)
    client.create_collection(place.collection, dimension=16)
    with pytest.raises(ValueError, match="was not made by memlm"):
        ChunkIndex(WordVectors(), store=place)


def test_what_milvus_cannot_keep_is_refused_before_anything_is_kept(place: MilvusStore) -> None:
    index = ChunkIndex(WordVectors(), store=place)
    many = {f"k{n}": n for n in range(2049)}
    for texts, metadata, match in (
        (["w1", "w" * 65_536], None, "text 1: its text has 65,536 bytes"),
        (["w1", "日" * 17_000], None, "text 1: its words has 67,999 bytes"),
        (["w1"], [many], "text 0: its metadata has 2,049 keys"),
    ):
        with pytest.raises(ValueError, match=match):
            index.add(texts, metadata=metadata)
    assert len(index) == 0
    index.add(["w1"])
    with pytest.raises(ValueError, match="k wants 20,000 hits"):
        index.search(["w1"], 10_000)
    with pytest.raises(ValueError, match="leave train out"):
        index.train(["w1"])


def test_more_than_a_message_holds_is_kept_whole(
    place: MilvusStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memlm.retrieval.milvus.MESSAGE_BYTES", 500)
    monkeypatch.setattr("memlm.retrieval.milvus.MESSAGE_KEYS", 3)
    index = ChunkIndex(WordVectors(), store=place)
    index.add(corpus(40), ids=range(40))
    assert len(index) == 40 and ids(index) == set(range(40))
    index.remove(range(0, 40, 2))
    assert ids(index) == set(range(1, 40, 2))


WRITER = """
import os, signal, sys
from memlm.retrieval.index import ChunkIndex
from tests.retrieval.fake import WordVectors
index = ChunkIndex(WordVectors(), store=sys.argv[1])
index.add(["w1 one", "w2 two"], ids=[1, 2], metadata=[{"a": 1}, {"a": 2}])
index.save(sys.argv[2])
index.remove([2])
index.add(["w3 three"], ids=[3])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_file_outlives_a_killed_process_and_belongs_to_one_at_a_time(
    database: str, tmp_path: Path
) -> None:
    from milvus_lite.server_manager import server_manager_instance

    file = str(tmp_path / "own.db")
    command = [sys.executable, "-c", WRITER, file, str(tmp_path / "saved")]
    assert subprocess.run(command, timeout=120).returncode == -9
    try:
        index = ChunkIndex.load(tmp_path / "saved", WordVectors())
        assert ids(index) == {1, 3} and ids(index, where={"a": 1}) == {1}
        second = subprocess.run(command, timeout=120, capture_output=True, text=True)
        assert (
            second.returncode == 1 and "close the process that has the file open" in second.stderr
        )
    finally:
        server_manager_instance.release_server(file)


def test_the_command_builds_adds_and_searches_where_the_store_is(
    database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, folder = tmp_path / "a.txt", str(tmp_path / "library")
    text.write_text("Mary hid the golden lamp in the cellar.")
    build = ["index", "build", folder, str(text), "--store", database, "--collection", "command"]
    assert main(build) == 0
    assert os.listdir(folder) == [store.MANIFEST]
    text.write_text("John sold the silver key.")
    assert main(["index", "add", folder, str(text)]) == 0
    assert "1 chunks added, 2 in all" in capsys.readouterr().out
    assert main(["index", "search", folder, "silver key", "-k", "1"]) == 0
    assert "John sold" in capsys.readouterr().out
    assert main(["index", "info", folder]) == 0
    assert f"store: {database}" in capsys.readouterr().out
    moved = ["--store", database, "--collection"]
    for command in (["info", folder], ["search", folder, "key"], ["add", folder, str(text)]):
        assert main(["index", *command, *moved, "gone"]) == 2
        assert "holds no collection 'gone'" in capsys.readouterr().err
        assert main(["index", *command, *moved, "command"]) == 0


def test_a_stream_is_saved_and_goes_on_where_its_store_is(
    place: MilvusStore, tmp_path: Path
) -> None:
    model, tok = (
        memory_model("llama", "armt", num_hidden_layers=1, vocab_size=400),
        tokenizer("byte-bpe"),
    )
    stream = DocumentStream(model, tok, ChunkIndex(HashingEmbedder(64), store=place))
    stream.write("Mary hid the golden lamp in the cellar. " * 20, document="one")
    stream.save(tmp_path)
    question = "Who hid the golden lamp?"
    told = [hit.text for hit in stream.retriever.recall(question)]
    assert told and "Mary" in told[0]
    for where in (None, place, place.address):
        again = DocumentStream.load(tmp_path, model, tok, HashingEmbedder(64), store=where)
        assert [hit.text for hit in again.retriever.recall(question)] == told
    gone = MilvusStore(place.address, "nobody")
    with pytest.raises(ValueError, match="holds no collection 'nobody'"):
        DocumentStream.load(tmp_path, model, tok, HashingEmbedder(64), store=gone)


def test_the_command_refuses_what_needs_a_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("Mary hid the golden lamp in the cellar.")
    build = ["index", "build", str(tmp_path / "library"), str(text)]
    assert main([*build, "--collection", "x"]) == 2
    assert "give --store URL with it" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    assert main([*build, "--store", str(tmp_path / "x.db")]) == 2
    assert "pip install 'memlm[milvus]'" in capsys.readouterr().err
    ask = ["ask", "no-model", str(text), "-q", "Where?", "--store", str(tmp_path / "x.db")]
    assert main(ask) == 2
    assert "give --save DIR too" in capsys.readouterr().err
    assert main([*ask[:3], "-q", "Where?", "--collection", "x"]) == 2
    assert "give --store URL with it" in capsys.readouterr().err
    assert main([*ask, "--save", str(tmp_path / "stream")]) == 2
    assert "pip install 'memlm[milvus]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "match"),
    [
        ("chunks", "neither a file that ends in .db nor an address"),
        ("ftp://host:1", "neither a file"),
        ("http://", "neither a file"),
        ("http://host:19530/x.db", "neither a file"),
        ("http://root:secret@host:19530", "give a password as MilvusStore"),
        ("http://host:19530?token=secret", "give a password as MilvusStore"),
    ],
)
def test_bad_addresses_are_refused_without_repeating_a_secret(address: str, match: str) -> None:
    with pytest.raises(ValueError, match=match) as refused:
        ChunkIndex(WordVectors(), store=address)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"factory": "SQ8"}, "factory='SQ8' is for an index that holds its chunks itself"),
        ({"threads": 2}, "threads=2 is for"),
        ({"effort": 3}, "effort=3 is for"),
        ({"precision": "ternary"}, "a store keeps float32"),
        ({"store": MilvusStore("x.db", "x")}, ""),
    ],
)
def test_settings_of_the_other_store_are_refused(options: dict[str, Any], match: str) -> None:
    if "store" in options:
        with pytest.raises(ValueError, match="collection='a-b' is no name"):
            MilvusStore("x.db", "a-b")
        return
    with pytest.raises(ValueError, match=match):
        ChunkIndex(WordVectors(), store="never-made.db", **options)
    assert not os.path.exists("never-made.db")


def test_a_store_is_an_address_and_a_file_may_have_any_name() -> None:
    with pytest.raises(TypeError, match="store is of type int; give an address"):
        ChunkIndex(WordVectors(), store=7)  # type: ignore[arg-type]
    assert MilvusStore("a#1/b@c?d.db").is_file and not MilvusStore("https://host/base").is_file


def test_a_directory_with_its_own_chunks_takes_no_store(tmp_path: Path) -> None:
    index = ChunkIndex(WordVectors())
    index.add(["w1"])
    index.save(tmp_path)
    with pytest.raises(ValueError, match=r"holds its chunks itself; leave store='x\.db' out"):
        ChunkIndex.load(tmp_path, WordVectors(), store="x.db")


def test_without_pymilvus_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(ImportError, match=r"pip install 'memlm\[milvus\]'"):
        ChunkIndex(WordVectors(), store="never-made.db")


@pytest.mark.parametrize(
    "place",
    [
        {"kind": "milvus"},
        {"kind": "milvus", "address": 3, "collection": "x"},
        {"kind": "other", "address": "x.db", "collection": "x"},
        {"kind": "milvus", "address": "http://u:p@host", "collection": "x"},
        {"kind": "milvus", "address": "/etc/passwd", "collection": "x"},
        [],
    ],
)
def test_a_forged_place_is_refused(place: Any, tmp_path: Path) -> None:
    embedder = WordVectors()
    settings = {
        "metric": "cosine",
        "hybrid": True,
        "dim": embedder.dim,
        "fingerprint": embedder.fingerprint,
        "chunks": 0,
    }
    store.save_place(tmp_path, settings, {"kind": "milvus", "address": "x.db", "collection": "x"})
    manifest = json.loads((tmp_path / store.MANIFEST).read_text())
    manifest["store"] = place
    manifest["checksum"] = store._checksum(manifest)
    (tmp_path / store.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"damaged|kind|address"):
        ChunkIndex.load(tmp_path, embedder)


def test_the_token_of_the_environment_goes_to_its_address_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pymilvus = pytest.importorskip("pymilvus")
    sent: dict[str, str] = {}

    class Stop(Exception):
        pass

    def client(uri: str, token: str, timeout: float) -> None:
        sent[uri] = token
        raise Stop

    monkeypatch.setattr(pymilvus, "MilvusClient", client)
    monkeypatch.setenv("MEMLM_STORE", "http://ours:19530")
    monkeypatch.setenv("MEMLM_STORE_TOKEN", "secret")
    for host in ("ours", "theirs"):
        with pytest.raises(Stop):
            place = {"kind": "milvus", "address": f"http://{host}:19530", "collection": "x"}
            ChunkIndex(WordVectors(), store=saved_address(place))
    assert sent == {"http://ours:19530": "secret", "http://theirs:19530": ""}
