"""What an index needs of the place its chunks are kept in: in this process, or with an engine elsewhere.

An index checks what it is given, makes the vectors and fuses what was found. A store keeps chunks and finds
them; it gets only what was checked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from memlm.retrieval.arguments import Absent, ChunkEntry, Value
from memlm.retrieval.codes import Floats, Precision

# What a store calls a chunk: hashable, the same in every search, and sorted in order of adding.
Key = Any
Matches = list[list[tuple[Key, float]]]  # per query (key, score), best first
Where = dict[str, list[Value | Absent]]  # as `check_where` returns it


@dataclass(frozen=True)
class StoreSettings:
    """What all chunks of a store have in common. metric: vectors are normalised already for "cosine"."""

    dim: int
    metric: str
    hybrid: bool
    fingerprint: str


class ChunkStore(ABC):
    """Chunks with their vectors. factory, precision: how vectors are kept, in the store's own words."""

    factory: str
    precision: Precision | None
    # Whether what is put here stays when this process ends, saved or not.
    outlives_process: ClassVar[bool] = False

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def untouched(self) -> bool:
        """Whether nothing depends on the embedder yet."""

    @abstractmethod
    def info(self) -> dict[str, Any]:
        """Counts and bytes, as plain values; "bytes" maps what takes them to how many."""

    def check_writable(self) -> None:
        """ValueError when the store can only be read."""
        return

    @abstractmethod
    def new_ids(self, count: int) -> list[str]:
        """Ids, as JSON texts, that are not in the store."""

    @abstractmethod
    def find(self, ids: Sequence[str]) -> dict[str, Key]:
        """The keys of those ids, JSON texts, that are in the store."""

    @abstractmethod
    def entries(self, keys: Sequence[Key]) -> list[ChunkEntry | None]:
        """The chunks of keys, in order; None where somebody has removed one meanwhile."""

    @abstractmethod
    def put(self, entries: Sequence[ChunkEntry], vectors: Floats) -> None:
        """Keep chunks, each with a row of (n, dim) vectors, in place of those with the same ids."""

    @abstractmethod
    def remove(self, keys: Sequence[Key]) -> None:
        """Forget chunks that are in the store."""

    @abstractmethod
    def search(
        self, vectors: Floats, queries: Sequence[str] | None, k: int, where: Where
    ) -> tuple[Matches, Matches]:
        """For (n, dim) vectors of queries the k best by vector, and by word.

        queries: the words of each; None: the second list is empty.
        """

    @abstractmethod
    def check_trainable(self, count: int) -> None:
        """ValueError unless `count` vectors can train the store."""

    @abstractmethod
    def train(self, vectors: Floats) -> None:
        """Train on (n, dim) vectors, which are not kept."""

    @abstractmethod
    def compact(self) -> None:
        """Free what removed chunks still hold."""

    @abstractmethod
    def save(self, directory: Path, settings: dict[str, Any]) -> None:
        """Write into a directory what opens the store again, with `settings` in the manifest."""


class StoreAddress(Protocol):
    """Where chunks are kept outside of this process, as given to `ChunkIndex(store=...)`."""

    def open(self, settings: StoreSettings, create: bool) -> ChunkStore:
        """The store there. create: make it when there is none. ValueError when it has other settings."""
        ...
