"""Training batches: documents as rows, cut into pieces, with their place in an endless stream.

A source makes document number n from a seed and n alone. The stream deals the numbers out to
processes, workers and rows without overlap, continues documents longer than a piece in the same row,
and writes its position into every batch, so that resuming continues with the very next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from memlm.padding import pad_rows
from memlm.scan import Anchor, first_window
from memlm.segment import IGNORE
from memlm.train.curriculum import Curriculum, Stage


@dataclass(frozen=True)
class Question:
    """Asked of a fork of the memory after segment `segment` of its piece, which is read, never written.

    ids: prompt and answer. answer: how many ids at the end are the answer.
    """

    segment: int
    ids: np.ndarray
    answer: int


@dataclass(frozen=True)
class Piece:
    """Consecutive segments of one document: what a row of a batch holds.

    targets: the token to predict after each of `ids`, -100 for none; None for none at all. Shifted
    already, so that the last token of a piece may have the first of the next for its target.
    segment_length: None is the model's own; a shorter one makes each of its segments end early.
    silent: for each segment, whether nothing in it is worth remembering: writing has its price in these
    alone. Empty: in all of them.
    """

    ids: np.ndarray
    targets: np.ndarray | None = None
    questions: tuple[Question, ...] = ()
    segment_length: int | None = None
    silent: tuple[bool, ...] = ()


def shifted(labels: np.ndarray) -> np.ndarray:
    """The target of token t is the label of t + 1; the last token has none."""
    return np.append(labels[1:], IGNORE)


class Source(Protocol):
    """Makes documents."""

    def single_piece(self, stages: Sequence[Stage]) -> bool:
        """Whether no document of `stages` has more than one piece, however long."""
        ...

    def document(self, ordinal: int, stage: Stage) -> Iterator[Piece]:
        """The pieces of document `ordinal`, the same ones whenever it is asked for."""
        ...


class PieceSource:
    """Documents that are already there, in an order shuffled anew every epoch."""

    def __init__(self, pieces: Sequence[Piece], seed: int = 0) -> None:
        if not pieces:
            raise ValueError("pieces is empty; give at least one document")
        self.pieces = pieces
        self.seed = seed
        self._order: tuple[int, np.ndarray] | None = None

    def single_piece(self, stages: Sequence[Stage]) -> bool:
        """Every document is one piece."""
        return True

    def document(self, ordinal: int, stage: Stage) -> Iterator[Piece]:
        """Document `ordinal`, counted through all epochs."""
        epoch, index = divmod(ordinal, len(self.pieces))
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.pieces))
            self._order = epoch, order
        yield self.pieces[self._order[1][index]]


class Windows:
    """The documents of another source, cut where a window with a target ends.

    Batches of these, each continuing the one before, make one optimiser step per window. Windows without
    a target join the next one; what follows the last target of a piece is dropped. With `anchor` "end",
    windows are counted back from that target.
    """

    def __init__(
        self, source: Source, window: int, segment_length: int, anchor: Anchor = "end"
    ) -> None:
        self.source = source
        self.window = window
        self.segment_length = segment_length
        self.anchor = anchor

    def single_piece(self, stages: Sequence[Stage]) -> bool:
        """No: a piece is a window here."""
        return False

    def document(self, ordinal: int, stage: Stage) -> Iterator[Piece]:
        """The windows of document `ordinal` of the source."""
        for piece in self.source.document(ordinal, stage):
            yield from self._cut(piece)

    def _cut(self, piece: Piece) -> Iterator[Piece]:
        segment = piece.segment_length or self.segment_length
        aimed = {question.segment for question in piece.questions}
        if piece.targets is not None:
            aimed |= {int(at) // segment for at in np.flatnonzero(piece.targets != IGNORE)}
        count = max(aimed, default=-1) + 1
        first, last = 0, first_window(max(count, 1), self.window, self.anchor)
        while first < count:
            if not any(first <= place < last for place in aimed):
                last += self.window
                continue
            at = slice(first * segment, last * segment)
            yield Piece(
                piece.ids[at],
                None if piece.targets is None else piece.targets[at],
                tuple(
                    replace(question, segment=question.segment - first)
                    for question in piece.questions
                    if first <= question.segment < last
                ),
                piece.segment_length,
                piece.silent[first:last],
            )
            first, last = last, last + self.window


class Collator:
    """Pieces, or mappings with `input_ids`, to a batch of tensors padded on the right.

    A mapping without `labels` is read as text to model: every token is a target.
    """

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, samples: Sequence[Piece | Mapping[str, Any]]) -> dict[str, Any]:
        pieces = [s if isinstance(s, Piece) else _piece(s) for s in samples]
        for index, piece in enumerate(pieces):
            if len(piece.ids) == 0:
                raise ValueError(
                    f"sample {index} of the batch holds no token; leave empty documents out"
                )
        lengths = {piece.segment_length for piece in pieces}
        if len(lengths) > 1:
            raise ValueError(f"segment_length differs within a batch: {lengths}; give all rows one")
        ids, mask = self._pad([piece.ids for piece in pieces])
        targets = torch.full_like(ids, IGNORE)
        for row, piece in enumerate(pieces):
            if piece.targets is not None:
                targets[row, : len(piece.targets)] = torch.from_numpy(
                    piece.targets.astype(np.int64)
                )
        batch: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask,
            "shift_labels": targets,
        }
        (length,) = lengths
        if length is not None:
            batch["segment_length"] = length
        if any(piece.silent for piece in pieces):
            count = max(len(piece.silent) for piece in pieces)
            priced = torch.ones(len(pieces), count, dtype=torch.bool)
            for row, piece in enumerate(pieces):
                priced[row, : len(piece.silent)] = torch.tensor(piece.silent)
            batch["auxiliary_mask"] = priced
        asked = [(row, q) for row, piece in enumerate(pieces) for q in piece.questions]
        if asked:
            question_ids, question_mask = self._pad([q.ids for _, q in asked])
            question_labels = torch.full_like(question_ids, IGNORE)
            for index, (_, q) in enumerate(asked):
                span = slice(len(q.ids) - q.answer, len(q.ids))
                question_labels[index, span] = question_ids[index, span]
            batch["question_ids"], batch["question_mask"] = question_ids, question_mask
            batch["question_labels"] = question_labels
            batch["question_at"] = torch.tensor([(row, q.segment) for row, q in asked])
        return batch

    def _pad(self, rows: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = pad_rows(rows, self.pad_token_id)
        return torch.from_numpy(ids), torch.from_numpy(mask).long()


def _piece(sample: Mapping[str, Any]) -> Piece:
    if sample.get("input_ids") is None:
        raise ValueError(
            f"a row holds {', '.join(sample) or 'nothing'}, but no input_ids; tokenize its text first, or "
            "train with memlm.train and data.source: rows"
        )
    ids = np.asarray(sample["input_ids"])
    real = np.ones(len(ids), dtype=bool)
    if sample.get("attention_mask") is not None:
        real = _beside(ids, sample, "attention_mask").astype(bool)
    labels = ids if sample.get("labels") is None else _beside(ids, sample, "labels")
    return Piece(ids[real], shifted(labels[real]))


def _beside(ids: np.ndarray, sample: Mapping[str, Any], name: str) -> np.ndarray:
    """A column that has a number for every token."""
    values = np.asarray(sample[name])
    if values.shape != ids.shape:
        raise ValueError(
            f"a row has {name} of shape {values.shape}, but input_ids of shape {ids.shape}; give one for "
            "every token"
        )
    return values


class TrainingStream(IterableDataset):  # type: ignore[type-arg]
    """Whole batches of documents, without end, from `position` on.

    Batch b of a process trains at optimiser step b // accumulation, in the curriculum's stage of
    that step. Draw n of process r takes document n * world + r, so that nothing is read twice. A
    document of several pieces stays in its row from batch to batch (`continued` says so) until it
    or the stage ends.
    """

    def __init__(self, source: Source, curriculum: Curriculum, pad_token_id: int = 0) -> None:
        self.source = source
        self.curriculum = curriculum
        self.collate = Collator(pad_token_id)
        self.batch_size, self.accumulation, self.rank, self.world = 1, 1, 0, 1
        self.batches = 0
        # Optimiser steps after which no batch comes: a run that is resumed when it is over trains no more.
        self.last_step: int | None = None
        self._cursors: dict[int, list[list[int]]] = {}
        # Documents below the first were read before the stream was dealt anew, which was at batch two.
        self._read_before, self._dealt_at = 0, 0

    def deal(self, *, batch_size: int, accumulation: int, rank: int, world: int) -> None:
        """Set how many rows a batch has, and which process of how many this is."""
        self.batch_size, self.accumulation = batch_size, accumulation
        self.rank, self.world = rank, world

    @property
    def step(self) -> int:
        """The optimiser step the next batch trains at."""
        return self.batches // self.accumulation

    def consumed(self, cursor: torch.Tensor) -> None:
        """Note that a batch was trained on; `cursor` (B, 2) came with it."""
        self._cursors[self.batches % self.accumulation] = cursor.tolist()
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        """The stream's position, as JSON types."""
        return {
            "batch_size": self.batch_size,
            "accumulation": self.accumulation,
            "world": self.world,
            "batches": self.batches,
            "cursors": {str(slot): cursor for slot, cursor in self._cursors.items()},
            "read_before": self._read_before,
            "dealt_at": self._dealt_at,
        }

    def deal_anew(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on at the step of the processes with these `state_dict`s, which were more or fewer.

        Documents that these have begun are left where they are; those to come are dealt to the processes
        there are, so that none is begun twice. Call `deal` first.
        """
        began = 0
        for state in states:
            before = (state["batches"] - state["dealt_at"]) * state["batch_size"] * state["world"]
            before += state["read_before"]
            ordinals = [row[0] + 1 for cursor in state["cursors"].values() for row in cursor]
            # Where every document is one batch's, its number follows from that of the batch.
            single = self.source.single_piece(self.curriculum.stages)
            began = max(began, state["read_before"], before if single else max(ordinals, default=0))
        first = states[0]
        self.batches = first["batches"] // first["accumulation"] * self.accumulation
        self._cursors, self._read_before, self._dealt_at = {}, began, self.batches

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken; call `deal` first. ValueError when that differed."""
        for name in ("batch_size", "accumulation", "world"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the checkpoint's data stream has {name}={state[name]}, this run "
                    f"{getattr(self, name)}; resume with the same batch size, accumulation and "
                    "processes"
                )
        batches = state["batches"]
        cursors = {int(slot): cursor for slot, cursor in state["cursors"].items()}
        for slot, cursor in cursors.items():
            numbers = [number for row in cursor for number in row]
            whole = all(type(number) is int and number >= 0 for number in numbers)
            if (
                not 0 <= slot < self.accumulation
                or [len(row) for row in cursor] != [2] * self.batch_size
                or not whole
            ):
                raise ValueError(
                    f"the checkpoint's data stream has a cursor that is none: {cursor!r}"
                )
        if type(batches) is not int or batches < 0:
            raise ValueError(
                f"the checkpoint's data stream has batches={batches!r}, which is no count"
            )
        # Older versions did not deal anew.
        anew = state.get("read_before", 0), state.get("dealt_at", 0)
        if not all(type(number) is int and number >= 0 for number in anew):
            raise ValueError(
                f"the checkpoint's data stream was dealt anew at {anew!r}, which are no counts"
            )
        self.batches, self._cursors = batches, cursors
        self._read_before, self._dealt_at = anew

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        self.check_workers(workers)
        over = self.last_step is not None and self.step >= self.last_step
        if over or self.curriculum.finished(self.step):
            return iter(())
        single = self.source.single_piece(self.curriculum.stages)
        return self._single(worker, workers) if single else self._lanes()

    def check_workers(self, workers: int) -> None:
        """Refuse more workers than can share the documents."""
        if workers > 1 and not self.source.single_piece(self.curriculum.stages):
            raise ValueError(
                f"dataloader_num_workers={workers}, but documents are read on from batch to batch, "
                "which one worker must do in order; use 0 or 1"
            )

    def _stage(self, batch: int) -> tuple[int, Stage]:
        index = self.curriculum.index_at(batch // self.accumulation)
        return index, self.curriculum.stages[index]

    def _single(self, worker: int, workers: int) -> Iterator[dict[str, Any]]:
        batch = self.batches + worker
        # Dealt anew, the documents to come begin where those that were read end.
        ahead = -(-self._read_before // self.world) - self._dealt_at * self.batch_size
        while True:
            _, stage = self._stage(batch)
            first = batch * self.batch_size + ahead
            numbers = [n * self.world + self.rank for n in range(first, first + self.batch_size)]
            pieces = [next(iter(self.source.document(number, stage))) for number in numbers]
            yield {
                **self.collate(pieces),
                "cursor": torch.tensor([(number, 0) for number in numbers]),
            }
            batch += workers

    def _lanes(self) -> Iterator[dict[str, Any]]:
        batch = self.batches
        lanes = self._reopen(batch)
        drawn = max((lane.ordinal for slot in lanes for lane in slot), default=-1)
        drawn = drawn // self.world + 1 if drawn >= 0 else 0
        drawn = max(drawn, -(-self._read_before // self.world))
        while True:
            index, stage = self._stage(batch)
            pieces, continued = [], []
            slot = lanes[batch % self.accumulation]
            for lane in slot:
                piece = lane.read_on(index)
                continued.append(piece is not None)
                if piece is None:
                    ordinal = drawn * self.world + self.rank
                    drawn += 1
                    piece = lane.open(self.source, ordinal, index, stage)
                pieces.append(piece)
            yield {
                **self.collate(pieces),
                "continued": torch.tensor(continued),
                "cursor": torch.tensor([(lane.ordinal, lane.piece) for lane in slot]),
            }
            batch += 1

    def _reopen(self, batch: int) -> list[list[_Lane]]:
        """The rows' documents, as they were after the last batch trained on."""
        lanes = [[_Lane() for _ in range(self.batch_size)] for _ in range(self.accumulation)]
        places = [
            (ordinal, piece, slot, row)
            for slot, cursor in self._cursors.items()
            for row, (ordinal, piece) in enumerate(cursor)
        ]
        # In the order of the documents: a streamed source can only be read forwards.
        for ordinal, piece, slot, row in sorted(places):
            last = batch - 1 - (batch - 1 - slot) % self.accumulation
            index, stage = self._stage(last)
            lanes[slot][row].open(self.source, ordinal, index, stage, skip=piece)
        return lanes


class _Lane:
    """One row of the batches of one accumulation slot: the document it is reading."""

    def __init__(self) -> None:
        self.ordinal, self.piece, self.stage = -1, -1, -1
        self._pieces: Iterator[Piece] = iter(())

    def open(self, source: Source, ordinal: int, index: int, stage: Stage, skip: int = 0) -> Piece:
        self.ordinal, self.piece, self.stage = ordinal, skip, index
        self._pieces = iter(source.document(ordinal, stage))
        for _ in range(skip):
            next(self._pieces)
        return next(self._pieces)

    def read_on(self, index: int) -> Piece | None:
        """The next piece of the open document, None when it or its stage is over."""
        if index != self.stage:
            return None
        piece = next(self._pieces, None)
        self.piece += piece is not None
        return piece
