"""Retrieval inside a stream: stored as it is written, shown before the question, named in the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from memlm import DocumentStream, MemLMForCausalLM
from memlm.retrieval import ChunkIndex, HashingEmbedder, store
from memlm.retrieval.chunk_store import ChunkStore, StoreSettings
from memlm.retrieval.embedded import EmbeddedStore
from memlm.retrieval.milvus import MilvusStore
from memlm.retrieval.retriever import RetrievalConfig, Retriever
from tests.cases import CASES, FAMILIES, randomise
from tests.retrieval.test_retriever import SECRET, document
from tests.tokenizers import tokenizer

QUESTION = "Where does the brave baker keep the golden lamp?"


@pytest.fixture(scope="module")
def model() -> MemLMForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "num_hidden_layers": 1, "max_position_embeddings": 128}
    config = LlamaConfig(**{**FAMILIES["llama"], **sizes})
    made = MemLMForCausalLM.from_base(
        config, memory=CASES["armt"], segment_length=80, dtype=torch.float64
    )
    randomise(made.memory)
    return made


def stream_of(
    model: MemLMForCausalLM, index: ChunkIndex | None = None, **config: Any
) -> DocumentStream:
    index = ChunkIndex(HashingEmbedder()) if index is None else index
    retriever = Retriever(index, RetrievalConfig(**{"size": 24, "k": 2, **config}))
    return DocumentStream(model, tokenizer("byte-bpe"), retriever)


def heard(model: MemLMForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the text of every prompt the model is given."""
    said: list[str] = []
    generate = model.generate

    def listening(ids: Any, **kwargs: Any) -> Any:
        said.append(tokenizer("byte-bpe").decode(ids[0]))
        return generate(ids, **kwargs)

    monkeypatch.setattr(model, "generate", listening)
    return said


@pytest.mark.parametrize("own", [False, True])
def test_what_is_recalled_stands_before_the_question_and_in_the_sources(
    model: MemLMForCausalLM, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    monkeypatch.setattr(model.config, "question_segment", "own" if own else "open")
    text = document()
    stream = stream_of(model)
    stream.write(text, document="tale.txt")
    said = heard(model, monkeypatch)
    answer = stream.ask(QUESTION, max_new_tokens=2)
    assert len(answer.sources) == 2
    best = max(answer.sources, key=lambda passage: passage.score)
    assert best.document == "tale.txt" and SECRET in text[best.start : best.end]
    (prompt,) = said
    recalled, question = prompt.find(SECRET), prompt.find("brave baker keep")
    assert 0 <= recalled < question and "Recalled: " in prompt
    # With a segment of its own the question follows nothing but what was recalled.
    assert prompt.lstrip().startswith("Recalled") == own


def test_asking_leaves_the_stream_as_it_is(model: MemLMForCausalLM) -> None:
    stream = stream_of(model)
    stream.write(document())
    first = stream.ask(QUESTION, max_new_tokens=3)
    seen, size = stream.tokens_seen, len(stream.retriever.index)
    again = stream.ask(QUESTION, max_new_tokens=3)
    assert (first, first.sources) == (again, again.sources)
    assert (stream.tokens_seen, len(stream.retriever.index)) == (seen, size)


def test_retrieval_changes_nothing_of_what_is_read(model: MemLMForCausalLM) -> None:
    plain = DocumentStream(model, tokenizer("byte-bpe"))
    recalling = stream_of(model)
    for stream in (plain, recalling):
        stream.write(document())
    assert plain.tokens_seen == recalling.tokens_seen
    for name, value in plain._state.tensors.items():
        assert torch.equal(value, recalling._state.tensors[name])
    assert plain.score(" The end.") == recalling.score(" The end.")
    assert plain.ask(QUESTION, max_new_tokens=2).sources == ()


@pytest.mark.parametrize("size", [1, 13, 500])
def test_pieces_of_any_size_give_the_same_answer(model: MemLMForCausalLM, size: int) -> None:
    text = document()
    whole, pieces = stream_of(model), stream_of(model)
    whole.write(text)
    pieces.write(text[at : at + size] for at in range(0, len(text), size))
    one, other = (s.ask(QUESTION, max_new_tokens=3) for s in (whole, pieces))
    assert one == other
    assert [(p.start, p.end) for p in one.sources] == [(p.start, p.end) for p in other.sources]


def test_streams_that_share_an_index_share_nothing_they_wrote(model: MemLMForCausalLM) -> None:
    index = ChunkIndex(HashingEmbedder())
    index.add(["The library says the lamp was lit."], metadata=[{"document": "library"}])
    mine, theirs = stream_of(model, index, k=9), stream_of(model, index, k=9)
    mine.write(document(), document="mine")
    theirs.write(document("A silver spoon lies in the second drawer.", 3), document="theirs")
    documents = [
        {passage.document for passage in stream.ask(QUESTION, max_new_tokens=1).sources}
        for stream in (mine, theirs)
    ]
    assert documents[0] <= {"mine", "library"} and documents[1] <= {"theirs", "library"}
    assert "mine" in documents[0] and "theirs" in documents[1]


def test_a_library_answers_a_stream_that_has_read_nothing(model: MemLMForCausalLM) -> None:
    index = ChunkIndex(HashingEmbedder())
    index.add([SECRET], metadata=[{"document": "library"}])
    stream = DocumentStream(model, tokenizer("byte-bpe"), index)
    assert [p.text for p in stream.ask(QUESTION, max_new_tokens=1).sources] == [SECRET]
    with pytest.raises(ValueError, match="nothing was written"):
        DocumentStream(model, tokenizer("byte-bpe"), ChunkIndex(HashingEmbedder())).ask(QUESTION)


def test_forks_part_ways(model: MemLMForCausalLM) -> None:
    stream = stream_of(model, k=300)
    stream.write(document(), document="past")
    other = stream.fork()
    stream.write("A crimson kite was seen by the first of them. " * 12, document="first")
    other.write("A violet kettle was seen by the other of them. " * 12, document="other")
    told = [
        " ".join(p.text for p in s.ask("kite, kettle, lamp?", max_new_tokens=1).sources)
        for s in (stream, other)
    ]
    assert "crimson" in told[0] and "violet" not in told[0] and SECRET in told[0]
    assert "violet" in told[1] and "crimson" not in told[1] and SECRET in told[1]


def test_a_saved_stream_goes_on_with_its_index(model: MemLMForCausalLM, tmp_path: Path) -> None:
    text = document()
    whole, broken = stream_of(model), stream_of(model)
    whole.write(text, document="tale")
    broken.write(text[:1000], document="tale")
    broken.save(tmp_path)
    again = DocumentStream.load(tmp_path, model, tokenizer("byte-bpe"))
    again.write(text[1000:])
    one, other = (s.ask(QUESTION, max_new_tokens=3) for s in (whole, again))
    assert one == other
    places = [[(p.document, p.start, p.end) for p in answer.sources] for answer in (one, other)]
    assert places[0] == places[1] and places[0]


def test_a_kill_between_index_and_state_loses_and_doubles_nothing(
    model: MemLMForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = document()
    stream = stream_of(model, k=500)
    stream.write(text[:1200])
    stream.save(tmp_path)
    stream.write(text[1200:])
    with monkeypatch.context() as patched:
        patched.setattr(type(stream._state), "save", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stream.save(tmp_path)
    again = DocumentStream.load(tmp_path, model, tokenizer("byte-bpe"))
    again.write(text[1200:])
    whole = stream_of(model, k=500)
    whole.write(text)
    places = [
        [(p.start, p.end) for p in s.ask(QUESTION, max_new_tokens=1).sources]
        for s in (again, whole)
    ]
    assert places[0] == places[1] and len(set(places[0])) == len(places[0]) > 10


def test_another_embedder_is_refused_when_a_stream_is_loaded(
    model: MemLMForCausalLM, tmp_path: Path
) -> None:
    stream = stream_of(model)
    stream.write(document())
    stream.save(tmp_path)
    with pytest.raises(ValueError, match="embedder"):
        DocumentStream.load(
            tmp_path, model, tokenizer("byte-bpe"), embedder=HashingEmbedder(dim=512)
        )


class Elsewhere:
    """An address as `store=` takes it; what is kept there outlives the index that opened it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.kept: ChunkStore | None = None

    def open(self, settings: StoreSettings, create: bool) -> ChunkStore:
        if create:
            self.kept = KeptElsewhere(self.address, settings)
        assert self.kept is not None
        return self.kept


class KeptElsewhere(EmbeddedStore):
    """A store that saves where it is, and no chunk: as one of another machine does."""

    def __init__(self, address: str, settings: StoreSettings) -> None:
        super().__init__(settings, "Flat", "float32", None, 1)
        self.place = {"kind": "milvus", "address": address, "collection": "tales"}

    def save(self, directory: Path, settings: dict[str, Any]) -> None:
        store.save_place(directory, settings, self.place)


def test_a_stream_goes_on_with_chunks_that_have_moved(
    model: MemLMForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = document()
    old, new = Elsewhere("http://old:19530"), Elsewhere("http://new:19530")
    stream = stream_of(model, ChunkIndex(HashingEmbedder(), store=old))
    stream.write(text[:1000], document="tale")
    stream.save(tmp_path)
    new.kept = old.kept
    assert isinstance(new.kept, KeptElsewhere)
    new.kept.place = {**new.kept.place, "address": new.address}
    again = DocumentStream.load(tmp_path, model, tokenizer("byte-bpe"), store=new)
    again.write(text[1000:])
    whole = stream_of(model)
    whole.write(text, document="tale")
    one, other = (s.ask(QUESTION, max_new_tokens=3) for s in (whole, again))
    assert one == other and SECRET in " ".join(passage.text for passage in other.sources)
    # The next save says where the chunks are now.
    again.save(tmp_path)
    asked: list[MilvusStore] = []

    def opened(place: MilvusStore, settings: StoreSettings, create: bool) -> ChunkStore:
        assert not create and new.kept is not None
        asked.append(place)
        return new.kept

    monkeypatch.setattr(MilvusStore, "open", opened)
    DocumentStream.load(tmp_path, model, tokenizer("byte-bpe"))
    # A text is another address of the same collection.
    for place in ("http://third:19530", MilvusStore("http://third:19530", "others")):
        DocumentStream.load(tmp_path, model, tokenizer("byte-bpe"), store=place)
    assert [(place.address, place.collection) for place in asked] == [
        ("http://new:19530", "tales"),
        ("http://third:19530", "tales"),
        ("http://third:19530", "others"),
    ]


@pytest.mark.parametrize(
    ("retrieval", "match"),
    [
        (False, r"saved without retrieval; leave store='x\.db' out"),
        (True, r"holds its chunks itself; leave store='x\.db' out"),
    ],
)
def test_a_store_that_a_stream_does_not_have_is_refused(
    model: MemLMForCausalLM, tmp_path: Path, retrieval: bool, match: str
) -> None:
    stream = stream_of(model) if retrieval else DocumentStream(model, tokenizer("byte-bpe"))
    stream.write("Mary hid the lamp.")
    stream.save(tmp_path)
    with pytest.raises(ValueError, match=match):
        DocumentStream.load(tmp_path, model, tokenizer("byte-bpe"), store="x.db")


def test_only_an_index_is_taken_for_retrieval(model: MemLMForCausalLM) -> None:
    with pytest.raises(TypeError, match="retrieval is a list"):
        DocumentStream(model, tokenizer("byte-bpe"), [])
