"""StreamPool: many streams that are read side by side, rows of one batch."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from weakref import WeakValueDictionary

import torch

from memlm.modeling import MemLMForCausalLM
from memlm.retrieval.index import ChunkIndex
from memlm.retrieval.retriever import Retriever
from memlm.segment import cut
from memlm.state import MemoryState
from memlm.streaming import DocumentStream
from memlm.writes import WriteCount


class StreamPool:
    """Documents of different lengths that come at different times, read in one batch.

    What is written into a stream of the pool waits until `run`, which reads the full segments of all
    streams beside each other; they join and leave the batch at segment borders. Nothing is padded, and
    every stream remembers what it would alone. Questions see all that was written, at the price of reading
    what waits once more. Streams that nobody holds any longer leave the pool.

    batch_size: streams read at once. The rest is as in `DocumentStream`.
    """

    def __init__(
        self,
        model: MemLMForCausalLM,
        tokenizer: Any,
        *,
        batch_size: int = 64,
        split_special_tokens: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1 stream")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.split_special_tokens = split_special_tokens
        # By id: a stream that is added twice is read once.
        self._streams: WeakValueDictionary[int, DocumentStream] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, retrieval: ChunkIndex | Retriever | None = None) -> DocumentStream:
        """A new stream of this pool."""
        stream = DocumentStream(
            self.model,
            self.tokenizer,
            retrieval,
            split_special_tokens=self.split_special_tokens,
        )
        self.add(stream)
        return stream

    def add(self, stream: DocumentStream) -> None:
        """Take a stream into the pool, such as one that was loaded. ValueError for another model's."""
        if stream.model is not self.model:
            raise ValueError("stream belongs to another model; open it in a pool of that model")
        stream._pool = self
        self._streams[id(stream)] = stream

    @property
    def waiting(self) -> int:
        """Segments that `run` would read."""
        return sum(map(self._full, list(self._streams.values())))

    @torch.no_grad()
    def run(self) -> None:
        """Read every full segment that waits. Those with most to read come first."""
        while True:
            ready = [stream for stream in list(self._streams.values()) if self._full(stream)]
            if not ready:
                return
            ready.sort(key=self._full, reverse=True)
            self._read(ready[: self.batch_size])

    def _full(self, stream: DocumentStream) -> int:
        """Full segments of a stream that another token follows."""
        return max(0, len(stream._open_ids) - 1) // self.model.segment_length

    def _read(self, streams: list[DocumentStream]) -> None:
        """As many segments of each stream as all of them have."""
        with ExitStack() as held:
            # In one order, or two pools could wait for each other.
            for stream in sorted(streams, key=id):
                held.enter_context(stream._writing)
            model = streams[0].model
            count = min(map(self._full, streams)) * model.segment_length
            if not count:
                return
            ids = torch.tensor(
                [stream._open_ids[:count] for stream in streams], device=model.backbone.device
            )
            known = [stream._writes.rows() for stream in streams]
            writes = WriteCount([0 if rows is None else rows[0] for rows in known])
            state = model.read(
                cut(ids, None, None, model.segment_length),
                MemoryState.cat([stream._state for stream in streams]),
                writes,
            )
            gates = model.memory.largest_gate(state) is not None
            counted = writes.rows() or []
            for row, stream in enumerate(streams):
                with stream._lock:
                    stream._state = state.select([row])
                    stream._open_ids = stream._open_ids[count:]
                    stream._committed += count
                    if gates:
                        stream._writes = WriteCount([counted[row]])
