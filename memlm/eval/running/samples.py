"""Where an evaluation's samples come from: composed by us, or a data set in the published layout.

A composed sample depends on (seed, task, length, index) alone.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from memlm.tasks import babi, babilong
from memlm.tasks.babi import Story
from memlm.tasks.haystack import Document, TokenHaystack
from memlm.tasks.registry import find_task
from memlm.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_ATTEMPTS = 200


class Sampled(Protocol):
    """A document with its question; the ids of the document come piece by piece."""

    @property
    def task(self) -> str: ...

    @property
    def question(self) -> str: ...

    @property
    def target(self) -> str: ...

    @property
    def tokens(self) -> int: ...

    @property
    def fact_offsets(self) -> tuple[int, ...]: ...

    @property
    def story(self) -> Story: ...

    def ids(self) -> Iterator[NDArray[np.int32]]: ...

    def __iter__(self) -> Iterator[str]: ...


class SampleSource(ABC):
    """Samples by (task, length, index). notes: where each cell's come from, for the summary."""

    def __init__(self) -> None:
        self.notes: dict[str, dict[str, Any]] = {}

    @abstractmethod
    def prepare(self, task: str, length: int, samples: int) -> int:
        """Prepare a cell, and return how many of the `samples` wanted exist. ValueError when none do."""

    @abstractmethod
    def get(self, task: str, length: int, index: int) -> Sampled: ...

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of an earlier run is about the sample this source gives now."""
        return True

    def task(self, name: str) -> Task:
        """How the answers of a task are scored."""
        return find_task(name)

    def document(self, task: str, length: int, index: int) -> Hashable:
        """The same for samples that are asked about the same text, which is then read once."""
        return index

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The settings that decide the samples."""

    def _note(self, task: str, length: int, note: dict[str, Any]) -> None:
        self.notes.setdefault(task, {})[babilong.format_length(length)] = note


class Composed(SampleSource):
    """Stories, generated or from bAbI's files, scattered through a haystack."""

    def __init__(
        self,
        stories: str | os.PathLike[str],
        noise: TokenHaystack,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        *,
        position: tuple[float, float] = (0.0, 1.0),
        distance: int | None = None,
        composition: str | babilong.Composition = "exact",
    ) -> None:
        """position, distance, composition: as for `babilong.compose`."""
        super().__init__()
        self.rules = babilong.composition_of(composition, position=position, distance=distance)
        self.folder = None if os.fspath(stories) == "generated" else Path(stories)
        self.tokenizer = tokenizer
        self.noise = noise
        self.seed = seed
        self.position = (float(position[0]), float(position[1]))
        self.distance = distance
        self._loaded: dict[str, list[Story]] = {}
        self._fitting: dict[tuple[str, int], list[Story]] = {}
        self._fillers: dict[str, TokenHaystack] = {}

    def settings(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "haystack": self.noise.source,
            "haystack_digest": self.noise.digest,
            "stories": "generated" if self.folder is None else str(self.folder),
            "stories_digest": self._digest(),
            "position": list(self.position),
            "distance": self.distance,
            "composition": self.rules.settings(),
        }

    def _digest(self) -> str:
        """A fingerprint of the folder's story files; empty when stories are generated."""
        if self.folder is None:
            return ""
        known = hashlib.blake2b(digest_size=8)
        for path in sorted(self.folder.glob("qa*_*.txt")):
            known.update(path.name.encode() + path.read_bytes())
        return known.hexdigest()

    def prepare(self, task: str, length: int, samples: int) -> int:
        note: dict[str, Any] = {"source": "generated"}
        if self.folder is not None and task in babi.TASKS:
            fitting = self._read(task, length)
            note = {
                "source": babi.find_task(self.folder, task).name,
                "stories": len(fitting),
                "too_long_left_out": len(self._loaded[task]) - len(fitting),
                "repeated": samples > len(fitting),
            }
        # A story that cannot be composed is refused now, not when its turn comes.
        self.get(task, length, 0)
        self._note(task, length, note)
        return samples

    def get(self, task: str, length: int, index: int) -> babilong.Sample:
        story = self.story(task, length, index)
        rng = np.random.default_rng([self.seed, zlib.crc32(task.encode()), length, index])
        noise = self._noise(find_task(task))
        return babilong.compose(
            story,
            noise,
            length,
            self.tokenizer,
            rng,
            position=self.position,
            distance=self.distance,
            composition=self.rules,
        )

    def story(self, task: str, length: int, index: int) -> Story:
        """Return the story of sample `index`: the same at every length where its facts fit."""
        if self.folder is not None and task in babi.TASKS:
            fitting = self._fitting[task, length]
            return fitting[index % len(fitting)]
        asked = find_task(task)
        for attempt in range(MAX_ATTEMPTS):
            name = f"evaluate/{self.seed}/{task}/{index}/{attempt}"
            mark = hashlib.blake2b(name.encode(), digest_size=8).digest()
            told = asked.tell(int.from_bytes(mark, "big"))
            story = next(itertools.islice(told, index % asked.questions, None))
            if self._fits(story, length):
                return story
        raise ValueError(
            f"no story of {task} in {MAX_ATTEMPTS} fits in length "
            f"{babilong.format_length(length)}; use a longer length, or 0k for facts alone"
        )

    def _noise(self, task: Task) -> TokenHaystack:
        if not task.noise:
            return self.noise
        if task.name not in self._fillers:
            self._fillers[task.name] = TokenHaystack(
                [Document(task.name, list(task.noise))],
                self.tokenizer,
                task.name,
                min_tokens=1,
                in_order=True,
            )
        return self._fillers[task.name]

    def _read(self, task: str, length: int) -> Sequence[Story]:
        if task not in self._loaded:
            assert self.folder is not None
            loaded = babi.load_task(self.folder, task)
            # Neighbours in a file are prefixes of one story; a small sample should come from many stories.
            order = np.random.default_rng([self.seed, zlib.crc32(task.encode())])
            self._loaded[task] = [loaded[i] for i in order.permutation(len(loaded))]
        fitting = [story for story in self._loaded[task] if self._fits(story, length)]
        if not fitting:
            raise ValueError(
                f"no story of {task} in {str(self.folder)!r} fits in length "
                f"{babilong.format_length(length)}; use a longer length, or 0k for facts alone"
            )
        self._fitting[task, length] = fitting
        return fitting

    def _fits(self, story: Story, length: int) -> bool:
        return length == 0 or babilong.facts_fit(
            story, self.noise, length, distance=self.distance, composition=self.rules
        )


class Published(SampleSource):
    """Ready-made samples in the published layout: a hub id or a folder.

    A file may be larger than memory, so one sample is held at a time, and samples are taken in order.
    """

    def __init__(self, data: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.data = os.fspath(data)
        self.tokenizer = tokenizer
        self._asked: dict[tuple[str, int], list[tuple[str, str]]] = {}
        self._cell: tuple[str, int] | None = None
        self._rows: Iterator[babilong.Record] = iter(())
        self._next = 0

    def settings(self) -> dict[str, Any]:
        return {"data": self.data}

    def prepare(self, task: str, length: int, samples: int) -> int:
        rows = self._iterate(task, length, samples)
        asked = [(row["question"], row["target"]) for row in rows]
        if not asked:
            raise ValueError(
                f"data={self.data!r} has no sample of {task} at {babilong.format_length(length)}"
            )
        self._asked[task, length] = asked
        self._note(task, length, {"source": self.data, "samples": len(asked)})
        return len(asked)

    def holds(self, row: Mapping[str, Any]) -> bool:
        asked = self._asked[row["task"], babilong.parse_length(row["length"])]
        return asked[row["index"]] == (row["question"], row["target"])

    def get(self, task: str, length: int, index: int) -> Sampled:
        if self._cell != (task, length) or index < self._next:
            self._cell, self._next = (task, length), 0
            self._rows = self._iterate(task, length)
        row = next(itertools.islice(self._rows, index - self._next, None))
        self._next = index + 1
        return babilong.RecordSample(row, task, self.tokenizer)

    def _iterate(
        self, task: str, length: int, limit: int | None = None
    ) -> Iterator[babilong.Record]:
        return babilong.iterate(self.data, task, babilong.format_length(length), limit=limit)
