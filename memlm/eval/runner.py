"""Evaluate a memory model on BABILong: stream documents, ask, score, keep every sample on disk.

A sample's content depends on (seed, task, length, index) alone, and samples run in the same batches
whatever was done before, so a run that was killed and started again ends as if it had never stopped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from memlm.eval import babi
from memlm.eval.babilong import Sample, compose, facts_fit, format_length, parse_length
from memlm.eval.haystack import Haystack, Split, TokenHaystack, check_source
from memlm.eval.metrics import babilong_score, exact_match
from memlm.eval.report import Cell, Report

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm
    from transformers import PreTrainedTokenizerBase

    from memlm.modeling import MemLMForCausalLM
    from memlm.segment import Segment
    from memlm.state import MemoryState

SAMPLES = "samples.jsonl"
RUN = "run.json"
# A story asks up to five questions; sample i takes the (i mod 5)-th, as short and long ones differ.
QUESTIONS_TAKEN = 5
MAX_ATTEMPTS = 200
MEMORY_POLL_SECONDS = 0.05

Row = dict[str, Any]


def evaluate(
    model: MemLMForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    lengths: Sequence[str | int],
    samples: int = 100,
    *,
    haystack: str | os.PathLike[str] | Haystack = "builtin",
    stories: str | os.PathLike[str] = "generated",
    out: str | os.PathLike[str] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    max_new_tokens: int = 8,
    split: Split = "eval",
    progress: bool = True,
) -> Report:
    """Score `model` on `samples` documents of every task and length, and report.

    `haystack` names a source, of which `split` is used; `stories` is "generated" or a folder of bAbI
    files, of which the test file is preferred. With
    `out`, each batch is appended to `samples.jsonl`, a later call with the same settings goes on from
    there (more samples, tasks and lengths may be asked for), and `summary.json` and `accuracy.png`
    are written at the end.
    """
    plan = _check(tokenizer, tasks, lengths, samples, haystack, stories, out, seed)
    for name, value in (
        ("batch_size", batch_size), ("max_new_tokens", max_new_tokens)
    ):  # fmt: skip
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not isinstance(haystack, Haystack):
        haystack = Haystack.open(haystack, split)
    noise = haystack.tokenized(tokenizer)
    source = _Stories(stories, seed, noise)
    for task, length in plan:
        source.prepare(task, length, samples)
    settings = {
        "seed": seed,
        "haystack": haystack.source,
        "haystack_digest": noise.digest,
        "stories": os.fspath(stories),
        "stories_digest": source.digest,
        "split": split,
        "max_new_tokens": max_new_tokens,
        "model": _fingerprint(model),
    }
    runner = _Runner(model, tokenizer, noise, source, batch_size, max_new_tokens)
    with ExitStack() as stack:
        log = stack.enter_context(_Log(out, settings))
        stack.enter_context(_without_training(model))
        bar = stack.enter_context(_bar(plan, samples, batch_size, log, runner.segment, progress))
        for task, length in plan:
            runner.run_cell(task, length, samples, log, bar)
    cells = [_cell(task, length, log.of_cell(task, length, samples)) for task, length in plan]
    report = Report(cells, settings | {"batch_size": batch_size}, _versions(model), source.notes)
    if out is None:
        return report
    files = [Path(out) / SAMPLES, *report.save(out)]
    return Report(cells, report.settings, report.versions, report.stories, tuple(map(str, files)))


def _check(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    lengths: Sequence[str | int],
    samples: int,
    haystack: str | os.PathLike[str] | Haystack,
    stories: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    seed: int,
) -> list[tuple[str, int]]:
    """Refuse what cannot work before any work is done; return the cells to evaluate."""
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    lengths = [lengths] if isinstance(lengths, str | int) else list(lengths)
    if not tasks or not lengths:
        raise ValueError(f"tasks={tasks} and lengths={lengths} must each name at least one")
    for task in tasks:
        babi.check_task(task)
        if os.fspath(stories) == "generated" and task not in babi.GENERATED:
            raise ValueError(
                f"no generator for task {task!r} yet; generated tasks are "
                f"{', '.join(babi.GENERATED)}, for others give stories=FOLDER of bAbI files"
            )
        if os.fspath(stories) != "generated":
            babi.find_task(stories, task)
    tokens = list(dict.fromkeys(parse_length(length) for length in lengths))
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token; set tokenizer.eos_token")
    if not isinstance(haystack, Haystack):
        check_source(haystack)
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"out={os.fspath(out)!r} is a file; name a folder")
    return list(itertools.product(dict.fromkeys(tasks), tokens))


class _Stories:
    """The story of every (task, length, index), generated or from files."""

    def __init__(self, source: str | os.PathLike[str], seed: int, noise: TokenHaystack) -> None:
        self.folder = None if os.fspath(source) == "generated" else Path(source)
        self.seed = seed
        self.noise = noise
        self.notes: dict[str, dict[str, Any]] = {}
        self._loaded: dict[str, list[babi.Story]] = {}
        self._fitting: dict[tuple[str, int], list[babi.Story]] = {}

    @property
    def digest(self) -> str:
        """A fingerprint of the folder's story files; empty when stories are generated."""
        if self.folder is None:
            return ""
        known = hashlib.blake2b(digest_size=8)
        for path in sorted(self.folder.glob("qa*_*.txt")):
            known.update(path.name.encode() + path.read_bytes())
        return known.hexdigest()

    def prepare(self, task: str, length: int, samples: int) -> None:
        """Read what `get` needs, and note where the stories of this cell come from."""
        note: dict[str, Any] = {"source": "generated"}
        if self.folder is None:
            self.get(task, length, 0)
        else:
            fitting = self._read(task, length)
            note = {
                "source": babi.find_task(self.folder, task).name,
                "stories": len(fitting),
                "too_long_left_out": len(self._loaded[task]) - len(fitting),
                "repeated": samples > len(fitting),
            }
        self.notes.setdefault(task, {})[format_length(length)] = note

    def get(self, task: str, length: int, index: int) -> babi.Story:
        """Return the story of sample `index`: the same at every length where its facts fit."""
        if self.folder is not None:
            fitting = self._fitting[task, length]
            return fitting[index % len(fitting)]
        for attempt in range(MAX_ATTEMPTS):
            name = f"evaluate/{self.seed}/{task}/{index}/{attempt}"
            mark = hashlib.blake2b(name.encode(), digest_size=8).digest()
            told = babi.generate(task, int.from_bytes(mark, "big"))
            story = next(itertools.islice(told, index % QUESTIONS_TAKEN, None))
            if self._fits(story, length):
                return story
        raise ValueError(
            f"no story of {task} in {MAX_ATTEMPTS} fits in length {format_length(length)}; "
            "use a longer length, or 0k for facts alone"
        )

    def _read(self, task: str, length: int) -> list[babi.Story]:
        if task not in self._loaded:
            assert self.folder is not None
            loaded = babi.load_task(self.folder, task)
            # Neighbours in a file are prefixes of one story: a small sample should not be of few.
            order = np.random.default_rng([self.seed, zlib.crc32(task.encode())])
            self._loaded[task] = [loaded[i] for i in order.permutation(len(loaded))]
        fitting = [story for story in self._loaded[task] if self._fits(story, length)]
        if not fitting:
            raise ValueError(
                f"no story of {task} in {str(self.folder)!r} fits in length "
                f"{format_length(length)}; use a longer length, or 0k for facts alone"
            )
        self._fitting[task, length] = fitting
        return fitting

    def _fits(self, story: babi.Story, length: int) -> bool:
        return length == 0 or facts_fit(story, self.noise, length)


@dataclass
class _Reader:
    """A sample's tokens, taken as many as wanted at a time."""

    pieces: Iterator[NDArray[np.int32]]
    rest: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))

    def take(self, into: NDArray[np.int64]) -> None:
        """Fill `into` with the next tokens, which must be there."""
        filled = 0
        while filled < len(into):
            if not len(self.rest):
                self.rest = next(self.pieces)
            piece = self.rest[: len(into) - filled]
            into[filled : filled + len(piece)] = piece
            filled += len(piece)
            self.rest = self.rest[len(piece) :]


class _Runner:
    """Runs batches of samples through the model."""

    def __init__(
        self,
        model: MemLMForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        noise: TokenHaystack,
        stories: _Stories,
        batch_size: int,
        max_new_tokens: int,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.noise = noise
        self.stories = stories
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.segment = int(model.config.segment_length)
        self.template = model.config.question_template
        self.own_segment = model.config.question_segment == "own"
        # Padding is masked everywhere, so any id serves where the tokenizer names none.
        pad = tokenizer.pad_token_id
        self.pad = int(tokenizer.eos_token_id if pad is None else pad)
        self.data_seconds = 0.0

    def run_cell(self, task: str, length: int, samples: int, log: _Log, bar: tqdm) -> None:
        """Run the batches of a cell that have samples missing from the log."""
        for batch in _batches(samples, self.batch_size):
            missing = [i for i in batch if not log.has(task, length, i)]
            if not missing:
                continue
            bar.set_postfix_str(f"{task} {format_length(length)}", refresh=False)
            # The whole batch again: with other neighbours, rounding could turn an answer.
            rows = self._run_batch(task, length, batch, bar)
            log.append([row for row in rows if row["index"] in missing])

    def _run_batch(self, task: str, length: int, batch: Sequence[int], bar: tqdm) -> list[Row]:
        import torch

        began = time.perf_counter()
        self.data_seconds = 0.0
        with _PeakMemory(self.model.device) as peak, torch.no_grad():
            composed = [self._compose(task, length, index) for index in batch]
            self.data_seconds += time.perf_counter() - began
            reported = bar.n
            outputs = self._answer(composed, bar)
            bar.update(_cost(length, self.segment) * len(batch) - (bar.n - reported))
        seconds = time.perf_counter() - began
        return [
            {
                "task": task,
                "length": format_length(length),
                "index": index,
                "seed": self.stories.seed,
                "question": sample.question,
                "target": sample.target,
                "output": output,
                "correct": babilong_score(output, sample.target, sample.question, task),
                "exact": exact_match(output, sample.target),
                "published": babilong_score(
                    output, sample.target, sample.question, task, strict_compat=True
                ),
                "tokens": sample.tokens,
                "seconds": seconds / len(batch),
                "data_seconds": self.data_seconds / len(batch),
                "peak_memory_bytes": peak.bytes,
                "fact_offsets": list(sample.fact_offsets),
            }
            for index, sample, output in zip(batch, composed, outputs, strict=True)
        ]

    def _compose(self, task: str, length: int, index: int) -> Sample:
        story = self.stories.get(task, length, index)
        rng = np.random.default_rng([self.stories.seed, zlib.crc32(task.encode()), length, index])
        return compose(story, self.noise, length, self.tokenizer, rng)

    def _answer(self, samples: Sequence[Sample], bar: tqdm) -> list[str]:
        """Read all whole segments of every document, then the open rest with the question.

        A model that was trained to be asked in a segment of the question's own has read the rest, too.
        """
        readers = [_Reader(sample.ids()) for sample in samples]
        whole = [
            sample.tokens if self.own_segment else sample.tokens // self.segment * self.segment
            for sample in samples
        ]
        segments = self._segments(readers, whole, bar)
        state = self.model.read(segments) if max(whole) else None
        prompts = []
        for sample, reader, end in zip(samples, readers, whole, strict=True):
            question = sample.question_ids(self.template)
            prompt = np.empty(sample.tokens - end + len(question), dtype=np.int64)
            reader.take(prompt[: sample.tokens - end])
            prompt[sample.tokens - end :] = question
            prompts.append(prompt)
        return self._generate(prompts, state)

    def _segments(
        self, readers: Sequence[_Reader], whole: Sequence[int], bar: tqdm
    ) -> Iterator[Segment]:
        """Yield the segments of all rows side by side; a row that has ended is padding."""
        import torch

        from memlm.segment import Segment

        device = self.model.device
        for start in range(0, max(whole), self.segment):
            began = time.perf_counter()
            sizes = np.clip(np.array(whole) - start, 0, self.segment)
            width = int(sizes.max())
            ids = np.full((len(readers), width), self.pad, dtype=np.int64)
            for reader, row, size in zip(readers, ids, sizes.tolist(), strict=True):
                reader.take(row[:size])
            mask = None
            if sizes.min() < width:
                real = np.arange(width)[None, :] < sizes[:, None]
                mask = torch.from_numpy(real).to(device)
            segment = Segment(torch.from_numpy(ids).to(device), mask)
            self.data_seconds += time.perf_counter() - began
            yield segment
            bar.update(int(sizes.sum()))

    def _generate(
        self, prompts: Sequence[NDArray[np.int64]], state: MemoryState | None
    ) -> list[str]:
        """Continue the prompts greedily behind `state`; return what was said up to the end token."""
        import torch

        longest = max(map(len, prompts))
        ids = np.full((len(prompts), longest), self.pad, dtype=np.int64)
        mask = np.zeros((len(prompts), longest), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        eos = int(cast(int, self.tokenizer.eos_token_id))
        said = self.model.generate(
            input_ids=torch.from_numpy(ids).to(self.model.device),
            attention_mask=torch.from_numpy(mask).to(self.model.device),
            memory_state=state,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=self.pad,
        )
        outputs = []
        for row in said[:, longest:].tolist():
            tokens = row[: row.index(eos)] if eos in row else row
            outputs.append(self.tokenizer.decode(tokens, skip_special_tokens=True).strip())
        return outputs


class _Log:
    """The samples done so far, in memory and, given a folder, in its `samples.jsonl`."""

    def __init__(self, out: str | os.PathLike[str] | None, settings: dict[str, Any]) -> None:
        self.rows: dict[tuple[str, str, int], Row] = {}
        self._file: IO[str] | None = None
        self._path: Path | None = None
        if out is None:
            return
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / SAMPLES
        _check_run(folder, settings)
        for row in _read_log(self._path):
            self.rows[row["task"], row["length"], row["index"]] = row

    def __enter__(self) -> Self:
        if self._path is not None:
            self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def has(self, task: str, length: int, index: int) -> bool:
        return (task, format_length(length), index) in self.rows

    def of_cell(self, task: str, length: int, samples: int) -> list[Row]:
        return [self.rows[task, format_length(length), index] for index in range(samples)]

    def append(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.rows[row["task"], row["length"], row["index"]] = row
        if self._file is not None:
            self._file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
            self._file.flush()


def _check_run(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder with samples of another run; note the settings in a fresh one."""
    from memlm.state import write_json

    path = folder / RUN
    if not path.exists():
        if (folder / SAMPLES).exists():
            raise ValueError(
                f"out={str(folder)!r} has {SAMPLES} but no {RUN} to say how they were made; "
                "use another folder"
            )
        write_json(path, settings)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        different = [key for key in settings if before.get(key) != settings[key]]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is not readable JSON; use another folder") from error
    if different:
        key = different[0]
        raise ValueError(
            f"out={str(folder)!r} holds a run with {key}={before.get(key)!r}, this one has "
            f"{settings[key]!r}; use another folder or the same settings"
        )


def _read_log(path: Path) -> list[Row]:
    """Return the samples on disk; a last line cut short by a kill is removed from the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    rows: list[Row] = []
    good = 0
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("the line has no end")
            row = json.loads(line)
            if row.keys() < {"task", "length", "index", "correct"}:
                raise ValueError("the line lacks a key")
        except (ValueError, AttributeError) as error:
            if number < len(lines):
                raise ValueError(
                    f"{str(path)!r} line {number} is damaged ({error}); remove the line"
                ) from error
            os.truncate(path, good)
            break
        rows.append(row)
        good += len(line)
    return rows


class _PeakMemory:
    """The most memory in use meanwhile: of the GPU where the model is on one, else resident."""

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device = device
        self._stop = threading.Event()
        self._poll = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        import torch

        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._poll.start()
        return self

    def __exit__(self, *exception: object) -> None:
        import torch

        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
        else:
            self._stop.set()
            self._poll.join()

    def _watch(self) -> None:
        import psutil

        process = psutil.Process()
        while True:
            self.bytes = max(self.bytes, process.memory_info().rss)
            if self._stop.wait(MEMORY_POLL_SECONDS):
                self.bytes = max(self.bytes, process.memory_info().rss)
                return


@contextmanager
def _without_training(model: MemLMForCausalLM) -> Iterator[None]:
    """Switch dropout off, and back to what it was."""
    training = bool(model.training)
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _batches(samples: int, batch_size: int) -> Iterator[range]:
    for start in range(0, samples, batch_size):
        yield range(start, min(start + batch_size, samples))


def _cost(length: int, segment: int) -> int:
    # Facts alone and questions take about a segment.
    return max(length, segment)


def _bar(
    plan: Sequence[tuple[str, int]],
    samples: int,
    batch_size: int,
    log: _Log,
    segment: int,
    progress: bool,
) -> tqdm:
    from tqdm import tqdm

    total = sum(
        _cost(length, segment) * len(batch)
        for task, length in plan
        for batch in _batches(samples, batch_size)
        if not all(log.has(task, length, index) for index in batch)
    )
    return tqdm(
        total=total,
        unit="tok",
        unit_scale=True,
        disable=not progress,
        smoothing=0.05,
        mininterval=0.5,
    )


def _cell(task: str, length: int, rows: Sequence[Row]) -> Cell:
    sums: dict[str, float] = defaultdict(float)
    for row in rows:
        for key in ("correct", "exact", "published", "tokens", "seconds", "data_seconds"):
            sums[key] += row[key]
    return Cell(
        task,
        format_length(length),
        samples=len(rows),
        correct=int(sums["correct"]),
        exact=int(sums["exact"]),
        published=int(sums["published"]),
        tokens=int(sums["tokens"]),
        seconds=sums["seconds"],
        data_seconds=sums["data_seconds"],
        peak_memory_bytes=max(row["peak_memory_bytes"] for row in rows),
    )


def _fingerprint(model: MemLMForCausalLM) -> str:
    """Name the model's class, segment length and a digest of some of every parameter's values."""
    known = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        # The ends of each tensor: reading billions of values would take longer than it is worth.
        values = parameter.detach().reshape(-1)
        ends = [*values[:8].float().tolist(), *values[-8:].float().tolist()]
        known.update(f"{name}{tuple(parameter.shape)}{ends}".encode())
    length = model.config.segment_length
    return f"{type(model).__name__}/segment_length={length}/{known.hexdigest()}"


def _versions(model: MemLMForCausalLM) -> dict[str, str]:
    import torch
    import transformers

    import memlm

    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "memlm": memlm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": f"{device.type} {name}",
    }
