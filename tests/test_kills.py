"""Processes killed with SIGKILL at random moments: what goes on afterwards is what was never killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import memlm.streaming
import memlm.train.trainer.trainer as trainer
from memlm import DocumentStream
from memlm.eval import evaluate
from memlm.eval.log import SAMPLES
from memlm.eval.running import readers
from memlm.retrieval import ChunkIndex, HashingEmbedder
from memlm.tasks.haystack import Haystack
from memlm.tasks.haystack.documents import Document
from memlm.train.folder import last_checkpoint
from tests.cases import by_default, memory_model
from tests.tokenizers import TEXT, tokenizer
from tests.train.test_resume import made

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")

STEPS = 6
TOLD = ("step", "loss", "stage", "accuracy", "learning_rate", "grad_norm")
SENTENCES = [f"Nothing of note happened on day {n}." for n in range(200)]


def start(work: Callable[..., None], *arguments: Any) -> int:
    """One of the works below in a process of its own, forked: there is nothing to import again."""
    with warnings.catch_warnings():
        # Of Python 3.12 and later, where a process has threads; those of torch and faiss are one each.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process:
        return process
    try:
        work(*arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def finish(process: int) -> int:
    """How a process ended: 0, or the signal that ended it, negative."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def counted(work: Callable[..., None], *arguments: Any) -> None:
    """Do a work, and note beside its folder how many functions were called for it."""
    calls = count()
    sys.setprofile(lambda *_: next(calls))
    work(*arguments)
    sys.setprofile(None)
    arguments[0].with_suffix(".calls").write_text(str(next(calls)))


def dying(number: int, work: Callable[..., None], *arguments: Any) -> None:
    """Do a work, and die with SIGKILL at the call of a function of that number, whichever it is."""
    calls = count()

    def at_call(*_: Any) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(at_call)
    work(*arguments)


# Between which shares of the undisturbed work a kill's moment is drawn, run after run. Much of it may be
# late imports, so that either kill may come before the first save: PLACES has some that come after it.
TWO_KILLS = ((0.5, 0.7), (0.1, 0.3))


def kill_often(
    folder: Path,
    shares: Sequence[tuple[float, float]],
    work: Callable[..., None],
    *more: Any,
) -> int:
    """Do a work once undisturbed, and once more with kills, a kill for each of `shares`.

    Returns how many kills there were, which is less where the work was done before.
    """
    rng, killed = random.Random(0), 0
    assert finish(start(counted, work, folder / "whole", *more)) == 0
    calls = int((folder / "whole.calls").read_text())
    for low, high in shares:
        moment = rng.randrange(int(calls * low), int(calls * high))
        killed += finish(start(dying, moment, work, folder / "killed", *more)) == -signal.SIGKILL
    assert finish(start(work, folder / "killed", *more)) == 0
    return killed


# --- training


def train(folder: Path, steps: int = STEPS) -> None:
    """Train up to `steps`, going on from the newest checkpoint, with a save at every second step."""
    run = made(folder, "carried", max_steps=steps, save_steps=2, save_total_limit=2)
    run.train(resume_from_checkpoint=last_checkpoint(folder))
    told = [[line.get(n) for n in TOLD] for line in run.state.log_history if "loss" in line]
    save_file({n: p.detach() for n, p in run.model.named_parameters()}, folder / "weights")
    (folder / "told.json").write_text(json.dumps(told))


def check_trained(folder: Path) -> None:
    """The run that was killed is the one that was not, to the bit."""
    mine, theirs = (load_file(folder / name / "weights") for name in ("killed", "whole"))
    told, right = ((folder / name / "told.json").read_text() for name in ("killed", "whole"))
    assert told == right
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_a_training_run_that_is_killed_is_the_run_left_alone(tmp_path: Path) -> None:
    assert kill_often(tmp_path, TWO_KILLS, train) == 2
    check_trained(tmp_path)


@pytest.mark.slow
def test_training_killed_twenty_times_is_the_run_left_alone(tmp_path: Path) -> None:
    assert kill_often(tmp_path, [(0.0, 0.2)] * 20, train, 40) == 20
    check_trained(tmp_path)


# A kill inside each part of a save, and inside a step, rather than by the clock.
PLACES = ("weights", "optimizer", "position", "list", "old", "step")


def train_until(folder: Path, place: str) -> None:
    """Train, and die at the second time that a place of the code is come to."""
    counts = {"left": 2}

    def dying(function: Any, after: bool) -> Any:
        def instead(*args: Any, **kwargs: Any) -> Any:
            counts["left"] -= 1
            found = function(*args, **kwargs) if after or counts["left"] else None
            if not counts["left"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return instead

    run = made(folder, "carried", max_steps=STEPS, save_steps=2, save_total_limit=1)
    if place == "weights":
        run._save = dying(run._save, after=True)
    elif place == "optimizer":
        run._save_optimizer_and_scheduler = dying(run._save_optimizer_and_scheduler, after=True)
    elif place == "position":
        trainer.save_position = dying(trainer.save_position, after=True)
    elif place == "list":
        trainer.seal = dying(trainer.seal, after=False)
    elif place == "old":
        shutil.rmtree = dying(shutil.rmtree, after=False)
    else:
        run._run_batch = dying(run._run_batch, after=True)
        counts["left"] = 5
    run.train(resume_from_checkpoint=last_checkpoint(folder))


def kill_at(folder: Path, places: Sequence[str]) -> None:
    train(folder / "whole")
    for place in places:
        assert finish(start(train_until, folder / "killed", place)) == -signal.SIGKILL
    assert finish(start(train, folder / "killed")) == 0
    check_trained(folder)


# In a step behind the first save by default.
@pytest.mark.parametrize("place", by_default(PLACES, ("step",)))
def test_training_killed_at_every_place_of_a_save_goes_on(tmp_path: Path, place: str) -> None:
    kill_at(tmp_path, (place, place))


# --- evaluation


def evaluated(folder: Path) -> None:
    """A task at two lengths; a state is kept after every other segment."""
    model = memory_model("llama", "armt", 48, num_hidden_layers=1, vocab_size=400)
    model.config.schedule = "sequential"
    prose = Haystack("made", [Document("days", SENTENCES)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "KEEP_SECONDS", -1.0)
        patch.setattr(readers, "AT_ONCE", 2)
        evaluate(
            model, tokenizer("byte-bpe"), ["qa1"], [200, 900], 4, haystack=prose, out=folder,
            batch_size=2, max_new_tokens=2, progress=False,
        )  # fmt: skip


# What is measured on the clock or the machine, and not on the model.
MEASURED = ("seconds", "data_seconds", "data_wait_share", "tokens_per_second", "peak_memory_bytes")


def without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_clocks(v) for k, v in value.items() if k not in MEASURED}
    return [without_clocks(v) for v in value] if isinstance(value, list) else value


def summary(folder: Path) -> Any:
    return without_clocks(json.loads((folder / "summary.json").read_text()))


def check_evaluated(folder: Path) -> None:
    assert summary(folder / "killed") == summary(folder / "whole")
    mine, theirs = (
        sorted(
            (
                without_clocks(json.loads(line))
                for line in (folder / name / SAMPLES).read_text().splitlines()
            ),
            # Lines stand in the order of answering.
            key=lambda row: (row["length"], row["index"]),
        )
        for name in ("killed", "whole")
    )
    assert mine == theirs


def test_a_killed_evaluation_ends_with_the_same_summary(tmp_path: Path) -> None:
    assert kill_often(tmp_path, TWO_KILLS, evaluated) == 2
    check_evaluated(tmp_path)


@pytest.mark.slow
def test_an_evaluation_killed_twenty_times_ends_with_the_same_summary(tmp_path: Path) -> None:
    assert kill_often(tmp_path, [(0.0, 0.2)] * 20, evaluated) == 20
    check_evaluated(tmp_path)


# --- streams


@pytest.fixture(autouse=True)
def _blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memlm.streaming, "BLOCK", memlm.streaming.BLOCK)


def new_stream() -> DocumentStream:
    memlm.streaming.BLOCK = 40  # So that every piece reaches the memory; undone by `_blocks`.
    model = memory_model("llama", "armt", num_hidden_layers=1, vocab_size=400)
    return DocumentStream(model, tokenizer("byte-bpe"), ChunkIndex(HashingEmbedder(64)))


def pieces() -> Iterator[str]:
    """Texts that say which one they are."""
    for number in count():
        yield f"Piece {number} tells of the colour c{number}. {TEXT[:60]}"


def write_and_save(folder: Path, stream: DocumentStream) -> None:
    """Write a piece and save, again and again."""
    for piece in islice(pieces(), 12):
        stream.write(piece)
        stream.save(folder)


def kill_saving(folder: Path, times: int) -> int:
    """After each kill, the stream in the folder is one that was saved, to the bit. Returns how many."""
    rng, found = random.Random(0), []
    assert finish(start(counted, write_and_save, folder / "whole", new_stream())) == 0
    calls = int((folder / "whole.calls").read_text())
    for number in range(times):
        place, moment = folder / str(number), rng.randrange(calls // 12, calls)
        assert finish(start(dying, moment, write_and_save, place, new_stream())) == -signal.SIGKILL
        if (place / "stream.safetensors").exists():
            model = memory_model("llama", "armt", num_hidden_layers=1, vocab_size=400)
            args = (place, model, tokenizer("byte-bpe"), HashingEmbedder(64))
            found.append(DocumentStream.load(*args))
    right, saved = new_stream(), {}
    for piece in islice(pieces(), 12):
        right.write(piece)
        saved[right.tokens_seen] = right.fork()
    assert all(stream._committed for stream in found)
    for stream in found:
        alone = saved[stream.tokens_seen]
        assert (stream._text, stream._open_ids) == (alone._text, alone._open_ids)
        for name, value in alone._state.tensors.items():
            assert torch.equal(stream._state[name], value), name
        told = [[hit.text for hit in one.retriever.recall("colour c1")] for one in (stream, alone)]
        assert told[0] == told[1]
        # It goes on, in the folder as well.
        stream.write("The end.")
        stream.save(folder / "again")
    return len(found)


def test_a_killed_save_leaves_a_stream_that_was_saved(tmp_path: Path) -> None:
    assert kill_saving(tmp_path, times=3) == 3


@pytest.mark.slow
def test_twenty_killed_saves_leave_streams_that_were_saved(tmp_path: Path) -> None:
    assert kill_saving(tmp_path, times=20) > 15


def test_a_killed_save_over_another_stream_leaves_the_one_or_the_other(tmp_path: Path) -> None:
    """Not the memory of the one with the passages of the other."""

    def told(name: str) -> DocumentStream:
        stream = new_stream()
        stream.write(f"{name} told of the golden lamp. {TEXT[:60]}" * 12)
        return stream

    def save(_: Path, folder: Path, stream: DocumentStream) -> None:
        stream.save(folder)

    def indexes(folder: Path) -> list[Path]:
        """Those that are not somebody's own, which stay."""
        own = {folder / name for name in ("index-0123abcd", "index-89abcdef")}
        folders = {path for path in folder.iterdir() if path.is_dir()}
        assert own < folders and all((path / "notes").exists() for path in own)
        return sorted(folders - own)

    def found(folder: Path) -> str:
        model = memory_model("llama", "armt", num_hidden_layers=1, vocab_size=400)
        stream = DocumentStream.load(folder, model, tokenizer("byte-bpe"), HashingEmbedder(64))
        texts = " ".join(hit.text for hit in stream.retriever.recall("Who told of the lamp?"))
        (name,) = (name for name in streams if name in texts)
        assert stream.tokens_seen == streams[name].tokens_seen
        for part, value in streams[name]._state.tensors.items():
            assert torch.equal(stream._state[part], value), part
        return name

    streams = {"Ann": told("Ann"), "Bartholomew": told("Bartholomew")}
    streams["Ann"].save(old := tmp_path / "old")
    # Somebody's own: not an index, and a folder with an index and more.
    (old / "index-0123abcd").mkdir()
    (old / "index-0123abcd" / "notes").write_text("mine")
    shutil.copytree(old / "index", old / "index-89abcdef")
    (old / "index-89abcdef" / "notes").write_text("mine")
    shutil.copytree(old, tmp_path / "place")
    work = (save, tmp_path / "whole", tmp_path / "place", streams["Bartholomew"])
    assert finish(start(counted, *work)) == 0
    assert found(tmp_path / "place") == "Bartholomew"
    assert len(indexes(tmp_path / "place")) == 1
    calls, seen, rng = int((tmp_path / "whole.calls").read_text()), [], random.Random(0)
    # Most of them at the end, where the files are renamed.
    for number, moment in enumerate([*rng.sample(range(calls), 4), *range(calls - 300, calls, 50)]):
        place = tmp_path / str(number)
        shutil.copytree(old, place)
        save_there = (save, tmp_path, place, streams["Bartholomew"])
        assert finish(start(dying, moment, *save_there)) in (0, -signal.SIGKILL)
        seen.append(found(place))
        # What the kill left behind goes with the next save.
        again = told("Bartholomew")
        again.save(place)
        assert found(place) == "Bartholomew"
        again.write(TEXT)
        again.save(place)
        assert len(indexes(place)) == 1
    assert set(seen) == set(streams)
