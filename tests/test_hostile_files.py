"""Broken and hostile files: whatever is in one, its reader says what is wrong, and nothing of it is run."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import traceback
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from memlm import DocumentStream, MemLMForCausalLM, MemoryState
from memlm.card import write_card
from memlm.cli.models import load_named
from memlm.data.opening import open_rows
from memlm.eval.log import RunLog
from memlm.eval.reporting.report import Report, load_rows
from memlm.eval.running.prompts import Prompts
from memlm.files import parse_yaml, read_checked_json, write_checked_json, write_json
from memlm.loading import load_weights
from memlm.memory import ARMTConfig
from memlm.retrieval import ChunkIndex, HashingEmbedder, ModelEmbedder
from memlm.retrieval.store import _checksum as manifest_checksum
from memlm.state import CHECKSUM, tensors_checksum
from memlm.tasks import babi, babilong
from memlm.text import read_text
from memlm.train import Stage
from memlm.train.bases import start_memory
from memlm.train.folder import RESULT_FILE, prepare_folder
from memlm.train.making import make_model
from memlm.train.recipe import Recipe
from memlm.train.trainer.checkpoint import (
    SEAL,
    check_checkpoint,
    load_position,
    load_states,
    save_position,
    save_states,
    seal,
)
from tests.cases import memory_model
from tests.tokenizers import tokenizer as tokenizer_of
from tests.train.tiny import Endless, stream

# What a reader may raise: a file is missing, or it says what is wrong with it.
REFUSED = (ValueError, FileNotFoundError)
QUICK = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
LONG = settings(QUICK, max_examples=int(os.environ.get("MEMLM_FUZZ", "1000")), derandomize=False)


@pytest.fixture(scope="module")
def model() -> MemLMForCausalLM:
    return memory_model(
        "llama", ARMTConfig(num_memory_tokens=2, d_mem=4), num_hidden_layers=1, vocab_size=400
    )


@dataclass
class Reader:
    """A reader, the files it reads, and whether a checksum lets it notice every change."""

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    exact: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    # How a file's JSON is taken out, and put back as somebody would who knows the checksums.
    json: dict[str, tuple[Callable[[Path], Any], Callable[[Path, Any], None]]] = field(
        default_factory=dict
    )


def plain_json(path: Path) -> Any:
    return json.loads(path.read_text())


def put_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def checked_json(path: Path) -> Any:
    return read_checked_json(path)[0]


def put_checked(path: Path, value: Any) -> None:
    if isinstance(value, dict):
        write_checked_json(path, value)
    else:
        put_json(path, value)


def header(path: Path) -> dict[str, Any]:
    """The JSON at the head of a safetensors file."""
    content = path.read_bytes()
    return json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])


def put_header(path: Path, value: Any) -> None:
    content = path.read_bytes()
    data = content[8 + struct.unpack("<Q", content[:8])[0] :]
    text = json.dumps(value).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def told(path: Path) -> Any:
    """What a state's file says beside its tensors."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        found = {k: v for k, v in file.metadata().items() if k != CHECKSUM}
    if "stream" in found:
        found["stream"] = json.loads(found["stream"])
    return found


def tell(path: Path, value: Any) -> None:
    """Write a state's file that says something else, with the checksum to it."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    value = value if isinstance(value, dict) else {"format": json.dumps(value)}
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in value.items()}
    save_file(tensors, path, {**texts, CHECKSUM: tensors_checksum(tensors, texts)})


def manifest(path: Path) -> Any:
    return {k: v for k, v in plain_json(path).items() if k != "checksum"}


def put_manifest(path: Path, value: Any) -> None:
    if isinstance(value, dict):
        value["checksum"] = manifest_checksum(value)
    put_json(path, value)


SUMMARY = {
    "cells": [
        {
            "task": "qa1", "length": "0k", "samples": 4, "correct": 2, "exact": 2, "published": 2,
            "tokens": 100, "seconds": 1.0, "data_seconds": 0.1, "peak_memory_bytes": 1,
        }
    ],
    "settings": {"seed": 0},
}  # fmt: skip


def readers(model: MemLMForCausalLM) -> dict[str, Reader]:
    tokenizer = tokenizer_of("byte-bpe")
    plain, checked = (plain_json, put_json), (checked_json, put_checked)
    stated, headed = (told, tell), (header, put_header)
    stages = (Stage(max_segments=1, advance_at=0.5), Stage(max_segments=2))

    def make_stream(folder: Path) -> None:
        made = DocumentStream(model, tokenizer, ChunkIndex(HashingEmbedder(16), hybrid=False))
        made.write("a bird sang in the tree. " * 9)
        made.save(folder)

    def read_stream(folder: Path) -> Any:
        found = DocumentStream.load(folder, model, tokenizer, HashingEmbedder(16))
        return found._state.tensors, found._open_ids, found._text, found._committed

    def make_index(folder: Path) -> None:
        index = ChunkIndex(HashingEmbedder(16))
        index.add(["a bird", "a tree", "a stone"], ids=[1, 2, 3], metadata=[{"k": 1}] * 3)
        index.save(folder / "index")
        index.remove([2])
        index.add(["a cloud"])
        index.save(folder / "index")

    def make_checkpoint(folder: Path) -> None:
        data = stream(Endless(3), *stages)
        data.deal(batch_size=2, accumulation=1, rank=0, world=1)
        data.consumed(torch.tensor([[0, 0], [1, 0]]))
        save_position(folder, data, 0, curriculum=True)
        save_states(folder, {0: model.init_state(2)}, 0)
        write_json(folder / "trainer_state.json", {"global_step": 1})
        seal(folder)

    def read_checkpoint(folder: Path) -> Any:
        check_checkpoint(folder)
        return read_position(folder)

    def read_position(folder: Path) -> Any:
        data = stream(Endless(3), *stages)
        data.deal(batch_size=2, accumulation=1, rank=0, world=1)
        load_position(folder, data, 0)
        next(iter(data))
        states = load_states(folder, 0, "cpu")
        return (
            data.state_dict(),
            data.curriculum.state_dict(),
            {k: s.tensors for k, s in states.items()},
        )

    def read_memory(folder: Path) -> Any:
        model.load_memory(folder)
        return {k: v.clone() for k, v in model.memory.state_dict().items()}

    def make_run(folder: Path) -> None:
        with RunLog(folder, {"seed": 0}) as log:
            log.append([dict(task="qa1", length="0k", index=i, correct=True) for i in range(3)])
        write_json(folder / "summary.json", SUMMARY)

    def read_run(folder: Path) -> Any:
        RunLog(folder, {"seed": 0})
        Report.load(folder)
        return load_rows(folder)

    def make_rows(folder: Path) -> None:
        rows = [{"document": "a b", "questions": [{"question": "c?", "answer": "d"}]}] * 2
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        put_json(folder / "rows.json", rows)
        import pyarrow as pa
        import pyarrow.parquet

        texts = pa.table({"text": ["a b c", "d e f"]})
        pyarrow.parquet.write_table(texts, folder / "rows.parquet")
        (folder / "rows.csv").write_text("prompt,completion\na,b\nc,d\n")

    def read_rows(folder: Path) -> Any:
        return [
            list(open_rows(str(folder / name), "train"))
            for name in ("rows.jsonl", "rows.json", "rows.parquet", "rows.csv")
        ]

    def make_published(folder: Path) -> None:
        row = {"input": "a b", "question": "c?", "target": "d"}
        (folder / "data" / "qa1").mkdir(parents=True)
        put_json(folder / "data" / "qa1" / "0k.json", [row, row])

    def make_babi(folder: Path) -> None:
        text = "1 Mary moved to the kitchen.\n2 Where is Mary? \tkitchen\t1\n"
        (folder / "qa1_a_test.txt").write_text(text)

    def make_recipe(folder: Path) -> None:
        text = "model: {config: {model_type: llama}, memory: armt}\ntokenizer: {source: train}\n"
        (folder / "recipe.yaml").write_text(text)
        (folder / "prompt.yaml").write_text("tasks:\n  qa1: {instruction: Say it.}\n")
        result = dict(
            output_dir="x", finished=True, steps=1, stage=0, loss=0.1, accuracy=1.0, seconds=1.0,
            cpu_seconds=1.0, files=["a"],
        )  # fmt: skip
        put_json(folder / RESULT_FILE, result)

    def read_recipe(folder: Path) -> Any:
        recipe = Recipe.load(folder / "recipe.yaml")
        Prompts.of(folder / "prompt.yaml", tokenizer)
        return recipe.to_dict(), prepare_folder(recipe, folder, "auto")

    def make_embedder(folder: Path) -> None:
        HashingEmbedder(16).fit(["a bird", "a tree"]).save(folder / "embedder.npz")

    def read_embedder(folder: Path) -> Any:
        return HashingEmbedder.load(folder / "embedder.npz").fingerprint

    return {
        "state": Reader(
            lambda folder: model.init_state(2).save(folder / "a.state", {"note": "x"}),
            lambda folder: MemoryState.load(folder / "a.state").tensors,
            exact=("a.state",),
            json={"a.state": stated, "./a.state": headed},
        ),
        "stream": Reader(
            make_stream, read_stream, exact=("stream.safetensors",),
            json={"stream.safetensors": stated},
        ),
        "index": Reader(
            make_index,
            lambda folder: ChunkIndex.load(folder / "index", HashingEmbedder(16)).search(["bird"], 3),
            exact=("index/*.json", "index/*.arrow", "index/*.npy", "index/*.faiss"),
            json={"index/manifest.json": (manifest, put_manifest)},
        ),
        "checkpoint": Reader(
            make_checkpoint,
            read_checkpoint,
            exact=("curriculum.json", "stream-0.json", "memory-0-0.safetensors", SEAL),
            json={SEAL: checked},
        ),
        "position": Reader(
            make_checkpoint,
            read_position,
            exact=("memory-0-0.safetensors",),
            json={"curriculum.json": checked, "stream-0.json": checked},
        ),
        "memory": Reader(
            model.save_memory,
            read_memory,
            exact=("memory.safetensors",),
            files=("memlm_config.json",),
            json={"memlm_config.json": plain, "memory.safetensors": headed},
        ),
        "card": Reader(
            model.save_memory,
            lambda folder: write_card(folder),
            files=("memlm_config.json", "memory.safetensors"),
            json={"memlm_config.json": plain},
        ),
        "evaluation": Reader(
            make_run, read_run, files=("run.json", "samples.jsonl", "summary.json"),
            json={"run.json": plain, "summary.json": plain},
        ),
        "rows": Reader(
            make_rows, read_rows, files=("rows.jsonl", "rows.json", "rows.parquet", "rows.csv"),
            json={"rows.json": plain},
        ),
        "published": Reader(
            make_published,
            lambda folder: list(babilong.load(str(folder), "qa1", "0k")),
            files=("data/qa1/0k.json",),
            json={"data/qa1/0k.json": plain},
        ),
        "babi": Reader(
            make_babi,
            lambda folder: babi.load_task(folder, "qa1"),
            files=("qa1_a_test.txt",),
        ),
        "text": Reader(
            lambda folder: (folder / "a.txt").write_text("Ein Vögelchen sang. " * 9),
            lambda folder: list(read_text(folder / "a.txt")),
            files=("a.txt",),
        ),
        "recipe": Reader(
            make_recipe, read_recipe, files=("recipe.yaml", "prompt.yaml", RESULT_FILE),
            json={RESULT_FILE: plain},
        ),
        "embedder": Reader(make_embedder, read_embedder, files=("embedder.npz",)),
    }  # fmt: skip


NAMES = (
    "state", "stream", "index", "checkpoint", "position", "memory", "card", "evaluation", "rows",
    "published", "babi", "text", "recipe", "embedder",
)  # fmt: skip


class Marks:
    """What a pickle could do: leave a mark."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@st.composite
def broken(draw: Any, whole: bytes, mark: Path) -> bytes:
    """The bytes of a file that something happened to."""
    kind = draw(
        st.sampled_from(["cut", "flip", "flip", "filled", "noise", "pickle", "deep", "none"])
    )
    at = draw(st.integers(0, max(len(whole) - 1, 0)))
    if kind == "cut":
        return whole[:at]
    if kind == "flip":
        content = bytearray(whole)
        content[at] ^= 1 << draw(st.integers(0, 7))
        return bytes(content)
    if kind == "filled":
        some = draw(st.binary(min_size=1, max_size=12))
        return whole[:at] + some + whole[at + len(some) :]
    if kind == "pickle":
        return pickle.dumps(Marks(mark))
    if kind == "deep":
        return draw(st.sampled_from([b"[", b'{"a":', b"- "])) * 1_500
    return draw(st.binary(max_size=200)) if kind == "noise" else b""


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 2**31, 2**40, 2**63, 10**30, 1e308, "../../etc/passwd", "", "9" * 5000])
    | st.floats()
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=4,
)


@st.composite
def altered(draw: Any, value: Any) -> Any:
    """A JSON value with one place in it changed, removed or added to."""
    value = json.loads(json.dumps(value))
    place = value
    while isinstance(place, dict | list) and place:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        inner = place[key]
        if isinstance(inner, dict | list) and inner and draw(st.integers(0, 3)):
            place = inner
            continue
        if draw(st.integers(0, 4)) == 0:
            del place[key]
        else:
            place[key] = draw(VALUES)
        return value
    return draw(VALUES)


def same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, torch.Tensor):
        return isinstance(theirs, torch.Tensor) and torch.equal(mine, theirs)
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(same(mine[k], theirs[k]) for k in mine)
    if isinstance(mine, list | tuple):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    return bool(mine == theirs)


def restore(folder: Path, content: dict[Path, bytes]) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path not in content:
            path.unlink()
    for path, whole in content.items():
        if not path.is_file() or path.read_bytes() != whole:
            path.write_bytes(whole)


def fuzz(reader: Reader, folder: Path, how: settings) -> tuple[int, int]:
    """Break every file of a reader; returns how many broken files were read, and how many refused."""
    reader.make(folder)
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    right = reader.read(folder)
    restore(folder, whole)
    mark = folder.parent / "mark"
    exact = [path for pattern in reader.exact for path in sorted(folder.glob(pattern))]
    counts = [0, 0]
    faults: dict[str, str] = {}

    def attempt(path: Path, exactly: bool) -> None:
        counts[0] += 1
        try:
            found = reader.read(folder)
        except REFUSED as error:
            counts[1] += 1
            assert str(error).strip()
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            found = (
                f"{path.name}: {type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
            )
            faults.setdefault(found, f"{error}"[:200])
        else:
            if exactly and not same(found, right):
                faults[f"{path.name}: a change went unnoticed"] = ""
        finally:
            restore(folder, whole)
        assert not mark.exists(), "a pickle was loaded"

    def break_bytes(path: Path) -> None:
        @how
        @given(st.data())
        def once(data: Any) -> None:
            path.write_bytes(data.draw(broken(whole[path], mark)))
            attempt(path, path in exact)

        once()

    def break_values(path: Path, value: Any, put: Callable[[Path, Any], None]) -> None:
        @how
        @given(st.data())
        def once(data: Any) -> None:
            put(path, data.draw(altered(value)))
            attempt(path, False)

        once()

    for path in [*exact, *(folder / name for name in reader.files)]:
        break_bytes(path)
    for name, (take, put) in reader.json.items():
        break_values(folder / name, take(folder / name), put)
    assert not faults, "\n".join(f"{where} {what}" for where, what in faults.items())
    return counts[0], counts[1]


# A reader of CSV in `datasets` leaves a file it could not read to be closed by the collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", NAMES)
def test_broken_files_are_refused(model: MemLMForCausalLM, tmp_path: Path, name: str) -> None:
    (tmp_path / "files").mkdir()
    tried, refused = fuzz(readers(model)[name], tmp_path / "files", QUICK)
    assert refused > tried // 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", NAMES)
def test_many_broken_files_are_refused(model: MemLMForCausalLM, tmp_path: Path, name: str) -> None:
    (tmp_path / "files").mkdir()
    tried, refused = fuzz(readers(model)[name], tmp_path / "files", LONG)
    print(f"\n{name}: {tried} broken files, {refused} refused, the others were read without harm")


def pickled(mark: Path) -> bytes:
    return pickle.dumps(Marks(mark))


def npy(claims: str, data: bytes = b"") -> bytes:
    """A .npy file whose header says `claims`, whatever is in it."""
    text = claims.encode() + b" " * (118 - len(claims) - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000000,)}", b"\0" * 8),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"\0" * 8),
        npy("__import__('os').getcwd()"),
    ],
)
def test_an_array_is_not_taken_by_its_header(tmp_path: Path, content: bytes) -> None:
    """Of an index whose checksums are those of the file that was put in."""
    index = ChunkIndex(HashingEmbedder(16), hybrid=False)
    index.add(["a bird", "a tree", "a stone", "a cloud", "a star"])
    index.save(tmp_path / "index")
    index.remove(["chunk-1"])
    index.save(tmp_path / "index")
    replace_part(tmp_path / "index", "removed", content)
    with pytest.raises(ValueError, match="damaged"):
        ChunkIndex.load(tmp_path / "index", HashingEmbedder(16))


def replace_part(folder: Path, kind: str, content: bytes) -> None:
    """Put other bytes in the place of a part of an index, with their checksum in its manifest."""
    told = plain_json(folder / "manifest.json")
    (part,) = (part for part in told["parts"] if part["kind"] == kind)
    part |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / part["file"]).write_bytes(content)
    told.pop("checksum")
    put_manifest(folder / "manifest.json", told)


@pytest.mark.parametrize("wrong", ["rows", "offsets", "names"])
def test_arrow_files_are_checked_inside(tmp_path: Path, wrong: str) -> None:
    """Rows never given, texts that end before they begin, other columns: none of it is followed."""
    import pyarrow as pa

    index = ChunkIndex(HashingEmbedder(16), hybrid=False)
    index.add(["a bird", "a tree"])
    index.save(tmp_path / "index")
    texts = pa.array(["a bird", "a tree"], pa.large_string())
    if wrong == "offsets":
        ends = pa.py_buffer(np.array([0, 2**40, 12], np.int64).tobytes())
        texts = pa.Array.from_buffers(pa.large_string(), 2, [None, ends, texts.buffers()[2]])
    ids = pa.array(['"chunk-0"', '"chunk-1"'], pa.large_string())
    notes = pa.array(["", ""], pa.large_string())
    rows = pa.array([0, 2**40 if wrong == "rows" else 1], pa.int64())
    names = ["row", "id", "text" if wrong != "names" else "words", "metadata"]
    batch = pa.record_batch([rows, ids, texts, notes], names=names)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    replace_part(tmp_path / "index", "chunks", sink.getvalue().to_pybytes())
    for mmap in (False, True):
        with pytest.raises(ValueError, match="damaged"):
            ChunkIndex.load(tmp_path / "index", HashingEmbedder(16), mmap=mmap)


def test_a_bomb_of_zeros_is_not_unpacked(tmp_path: Path) -> None:
    with (tmp_path / "embedder.npz").open("wb") as file:
        np.savez_compressed(file, settings=np.zeros(50_000_000, np.uint8))
    assert (tmp_path / "embedder.npz").stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"it unpacks to 50,000,\d+ bytes"):
        HashingEmbedder.load(tmp_path / "embedder.npz")


def test_a_header_that_claims_terabytes_is_refused(tmp_path: Path) -> None:
    MemoryState({"a": torch.zeros(1, 2)}, 1).save(tmp_path / "a.state")
    for change in (
        {"a": {"dtype": "F32", "shape": [1, 2**40], "data_offsets": [0, 2**42]}},
        {"a": {"dtype": "F32", "shape": [1, 2**62, 2**62], "data_offsets": [0, 8]}},
    ):
        put_header(tmp_path / "a.state", {**header(tmp_path / "a.state"), **change})
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            MemoryState.load(tmp_path / "a.state")
    (tmp_path / "a.state").write_bytes(struct.pack("<Q", 2**42) + b"{}")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        MemoryState.load(tmp_path / "a.state")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: &a [x, x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n"
         for a, b in zip("abcdefg", "bcdefgh", strict=True)), "unfold to more than 100,000"),
        ("a: &a {x: 1}\n" + "".join(f"{b}: &{b} {{<<: [{','.join([f'*{a}'] * 10)}]}}\n"
         for a, b in zip("abcdefg", "bcdefgh", strict=True)), "unfold to more than 100,000"),
        ("a: &a [*a]", "inside of what it stands for"),
        ("a: 1\na: 2", "line 2: 'a' is given twice"),
        ("[" * 100_000, "nested too deeply"),
        ("- " * 1500, "nested too deeply"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: !!int x", "invalid literal"),
    ],
)  # fmt: skip
def test_yaml_holds_plain_values_that_fit(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_yaml(text)


def test_aliases_are_allowed() -> None:
    assert parse_yaml("a: &a {x: 1e-3}\nb: *a\nc: {<<: *a, y: 2}") == {
        "a": {"x": 1e-3}, "b": {"x": 1e-3}, "c": {"x": 1e-3, "y": 2},
    }  # fmt: skip


def test_files_of_two_memories_are_not_mixed(tmp_path: Path, model: MemLMForCausalLM) -> None:
    """The weights of one save beside the description of another: of one size, and wrong."""
    other = memory_model("llama", model.memory.configs[0], num_hidden_layers=1, vocab_size=400)
    with torch.no_grad():
        next(other.memory.parameters()).add_(1)
    model.save_memory(tmp_path / "mine")
    other.save_memory(tmp_path / "theirs")
    swapped = tmp_path / "mine" / "memory.safetensors"
    swapped.write_bytes((tmp_path / "theirs" / "memory.safetensors").read_bytes())
    with pytest.raises(
        ValueError, match=r"is not the file that memlm_config\.json was written with"
    ):
        model.load_memory(tmp_path / "mine")


def test_names_in_a_list_of_files_stay_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    for name in ("../outside", str(tmp_path / "outside")):
        files = {"version": 1, "files": {name: [1, hashlib.sha256(b"x").hexdigest()]}}
        write_checked_json(tmp_path / "checkpoint-1" / SEAL, files)
        with pytest.raises(ValueError, match="outside of its folder"):
            check_checkpoint(tmp_path / "checkpoint-1")


def test_a_checkpoint_with_a_pickle_is_refused_without_loading_it(tmp_path: Path) -> None:
    """The Trainer's own file of the optimizer, with checksums to it: torch reads weights only."""
    from tests.train.test_resume import made

    made(tmp_path / "run", "documents", max_steps=1, save_steps=1).train()
    folder, mark = tmp_path / "run" / "checkpoint-1", tmp_path / "mark"
    for name in ("optimizer.pt", "rng_state.pth", "model.safetensors"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(pickled(mark))
        with pytest.raises(ValueError, match="is not as it was written"):
            check_checkpoint(folder)
        (folder / SEAL).unlink()
        seal(folder)
        again = made(tmp_path / "run", "documents", max_steps=2)
        with pytest.raises(Exception, match=r"(?i)weights_only|unpickl|header|deserializ"):
            again.train(resume_from_checkpoint=str(folder))
        assert not mark.exists()
        (folder / name).write_bytes(before)


def initial(name: str) -> Recipe:
    return Recipe.from_dict({"model": {"init_from": name}})


def harness(name: str) -> Any:
    pytest.importorskip("lm_eval")
    from memlm.eval.harness.loading import load_model

    return load_model(name, "auto", "main")


PICKLED_PLACES: dict[str, Callable[[str], Any]] = {
    "from_pretrained": MemLMForCausalLM.from_pretrained,
    "from_base": MemLMForCausalLM.from_base,
    "embedder": ModelEmbedder.from_pretrained,
    "harness": harness,
    "command": lambda name: load_named(name, Namespace(dtype="auto", device="cpu")),
    "init_from": lambda name: make_model(initial(name), None),
    "init_memory": lambda name: start_memory(memory_model("llama", "rmt"), name),
}


@pytest.mark.parametrize("place", PICKLED_PLACES)
@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_weights_in_a_pickle_are_not_loaded_unasked(tmp_path: Path, place: str, kind: str) -> None:
    """transformers reads pytorch_model.bin where it finds no safetensors; memlm asks for them."""
    folder = tmp_path / "model"
    memory_model("llama", "rmt").save_pretrained(folder)
    if kind == "model":
        weights = load_file(folder / "model.safetensors")
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    else:
        (folder / "adapter_model.bin").write_bytes(pickled(tmp_path / "mark"))
    with pytest.raises((OSError, ValueError), match=r"in a pickle.*use_safetensors=False"):
        PICKLED_PLACES[place](str(folder))
    assert not (tmp_path / "mark").exists()


def test_a_pickle_is_loaded_where_somebody_asks_for_it(tmp_path: Path) -> None:
    model = memory_model("llama", "rmt")
    model.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    again = MemLMForCausalLM.from_pretrained(tmp_path, use_safetensors=False)
    assert same(dict(again.state_dict()), dict(model.state_dict()))


def test_a_pickle_on_the_hub_is_refused() -> None:
    """By what transformers is told, and by what it says then."""

    def load(name: str, use_safetensors: bool) -> None:
        assert use_safetensors
        raise OSError(
            f"{name} does not appear to have a file named model.safetensors or "
            "model.safetensors.index.json and thus cannot be loaded with `safetensors`. "
            "Please do not set `use_safetensors=True`."
        )

    with pytest.raises(OSError, match=r"'someone/old' has its weights in a pickle"):
        load_weights(load, "someone/old")
    with pytest.raises(OSError, match="in a pickle"):
        load_weights(load, "someone/old", use_safetensors=None)


def test_remote_code_is_not_run_unasked(tmp_path: Path) -> None:
    """A configuration that names code beside it: neither the model nor its base is made of that."""
    mark = tmp_path / "mark"
    memory_model("llama", "rmt").save_pretrained(tmp_path / "model")
    config = plain_json(tmp_path / "model" / "config.json")
    named = {"AutoConfig": "theirs.Theirs", "AutoModelForCausalLM": "theirs.Theirs"}
    config["text_config"]["auto_map"] = config["auto_map"] = named
    put_json(tmp_path / "model" / "config.json", config)
    (tmp_path / "model" / "theirs.py").write_text(f"open({str(mark)!r}, 'w')\nclass Theirs: pass\n")
    MemLMForCausalLM.from_pretrained(tmp_path / "model")
    assert not mark.exists()


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import os, signal\nfrom memlm.files import write_atomically\n"
        f"write_atomically({str(tmp_path / 'a')!r}, lambda path: os.kill(os.getpid(), signal.SIGKILL))"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = tmp_path.iterdir()
    write_json(tmp_path / "a", {})
    # It may be another container's, which numbers its processes apart: not while it is new.
    assert left.exists()
    os.utime(left, (1, 1))
    write_json(tmp_path / "a", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
