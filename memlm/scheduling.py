"""Which schedule a window of segments runs under: the one asked for, or the one measured to be faster.

`schedule="wavefront"` runs neighbouring layers of neighbouring segments together
(`memlm.schedule.wavefront`), and refuses by name what it cannot; "sequential" is segment after segment;
"auto" measures once for every device and shape, keeps what it found in `config.schedule_measured`, and goes
by that from then on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.distributed
from torch import Tensor, nn

from memlm.attach import MemoryStack
from memlm.backbone import Backbone, Cell
from memlm.backbone.batched import BatchedLine, Kind, find_kinds, returned_tuples
from memlm.backbone.stacking import separate
from memlm.config import MemLMConfig
from memlm.schedule import Checkpoint, Place, alike, sequential, wavefront
from memlm.segment import Segment
from memlm.state import MemoryState

# Under "auto", fewer segments are run in sequence: diagonals would hold a few cells, and measuring takes as
# long as some ten segments.
LEAST_SEGMENTS = 8
# How much faster "auto" wants the wavefront to be, so that what it picks is no accident of measuring.
MARGIN = 1.1
ROUNDS = 3
# Segments in a window for each layer when a document is only read: then nine diagonals in ten are full.
READ_AHEAD = 8
# Tokens of the segments on which the wavefront is tried out.
TRIED_TOKENS = 4


class Read(NamedTuple):
    """What one segment leaves beside the state.

    loss (): summed over its targets. hidden (B, T, D): last hidden states. cost (): summed over rows, what
    the changes of state cost in training. sizes (n,): `MemoryState.largest` of the state after it. gate
    (B,): the largest write gate. None where it was not asked for.
    """

    loss: Tensor | None
    hidden: Tensor | None
    cost: Tensor | None = None
    sizes: Tensor | None = None
    gate: Tensor | None = None


Step = Callable[[Segment, MemoryState], tuple[Read, MemoryState]]


class How(NamedTuple):
    """How a window is run.

    step: a segment through the whole model. finish: the loss of a segment, from its last hidden states.
    write: whether memories are written. hidden: whether the last hidden states are wanted. recompute: what
    runs a function and keeps few activations, to compute them again in backward, such as torch's
    `checkpoint`; None: all are kept. gates: whether the write gates are wanted.
    """

    step: Step
    finish: Callable[[Segment, Tensor | None], Tensor | None]
    write: bool = True
    hidden: bool = True
    recompute: Checkpoint | None = None
    gates: bool = False


class Trial(NamedTuple):
    """Whether each layer returns a tuple, and why the wavefront cannot be had; None: it can."""

    tuples: list[bool]
    obstacle: str | None


class Parts(Protocol):
    """What is needed of a model with memories."""

    backbone: Backbone
    memory: MemoryStack
    config: MemLMConfig


class Scheduler:
    """Runs windows of segments for one model."""

    def __init__(self, model: Parts) -> None:
        self._model = model
        # Trying needs weights, and is done once for each make of model.
        self._tried: dict[Any, Trial] = {}
        self._checked: str | None = None

    @property
    def backbone(self) -> Backbone:
        return self._model.backbone

    @property
    def memory(self) -> MemoryStack:
        # Looked up each time: peft may have put a copy in its place.
        return self._model.memory

    @property
    def config(self) -> MemLMConfig:
        return self._model.config

    def __getstate__(self) -> dict[str, Any]:
        # What was tried names classes that pickle cannot find.
        return {**vars(self), "_tried": {}}

    def obstacle(self) -> str | None:
        """Why this model cannot run under the wavefront, and what helps; None: it looks as if it can."""
        return self._kinds()[0]

    def _kinds(self) -> tuple[str | None, list[Kind]]:
        """What stands in the way, and, where nothing does, the layers by kind."""
        try:
            return None, find_kinds(self.backbone, self.memory.cells())
        except ValueError as error:
            return str(error), []

    def check(self) -> None:
        """ValueError when the config asks for a schedule that cannot be. Looks once for each value."""
        if self.config.schedule == self._checked:
            return
        self.config.check_schedule()
        if self.config.schedule == "wavefront":
            reason, kinds = self._kinds()
            if reason is None and self.backbone.device.type != "meta":
                reason = self.try_out(kinds).obstacle
            if reason is not None:
                raise ValueError(_refused(reason))
        self._checked = self.config.schedule

    def try_out(self, kinds: Sequence[Kind]) -> Trial:
        """Try the wavefront on two short segments, with and without padding: not everything shows."""
        key = tuple((tuple(kind.members), kind.description) for kind in kinds)
        if key not in self._tried:
            modes = [
                (module, module.training)
                for module in (*self.backbone.base.modules(), *self.memory.modules())
            ]
            try:
                for module, _ in modes:
                    module.training = False
                with torch.no_grad(), torch.random.fork_rng(self._devices()):
                    self._tried[key] = self._differs(kinds)
            finally:
                for module, training in modes:
                    module.training = training
        return self._tried[key]

    def _devices(self) -> list[torch.device]:
        return [self.backbone.device] if self.backbone.device.type == "cuda" else []

    def _differs(self, kinds: Sequence[Kind]) -> Trial:
        tokens = min(TRIED_TOKENS, self.config.segment_length)
        vocabulary = self.backbone.base.get_input_embeddings().num_embeddings
        ids = (
            torch.arange(2 * 2 * tokens, device=self.backbone.device).reshape(2, 2, tokens)
            % vocabulary
        )
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, 1, -1] = tokens == 1
        tuples = returned_tuples(self.backbone, ids[0])
        for masks in (None, mask):
            segments = [Segment(ids[i], None if masks is None else masks[i]) for i in range(2)]
            start = self.memory.init_state(2)
            expected, states = zip(*sequential(self._one, segments, start), strict=True)
            note = partial(self._note, False, False)
            how = How(_no_step, _no_loss)
            line = self._line(how, kinds, start, masks is not None, note, tuples)
            try:
                found = [cast(Tensor, passed.hidden) for passed in wavefront(line, segments)]
            except Exception as error:
                said = next(iter(str(error).strip().splitlines()), "no reason given")
                return Trial(
                    tuples, f"its layers cannot run together ({type(error).__name__}: {said})"
                )
            real = [torch.ones_like(ids[0], dtype=torch.bool)] * 2 if masks is None else list(masks)
            pairs = [(a[m], b[m]) for a, b, m in zip(found, expected, real, strict=True)]
            result = self.memory.pack(line.result(), 2)
            pairs += [(result[name], value) for name, value in states[-1].floating().items()]
            if not all(_close(a, b) for a, b in pairs):
                return Trial(
                    tuples,
                    "its layers, run together, compute something else than one by one: they differ in "
                    "more than their weights",
                )
        return Trial(tuples, None)

    def _one(self, segment: Segment, state: MemoryState) -> tuple[Tensor, MemoryState]:
        """The last hidden states of one segment, and the state after it."""
        before = self.memory.unpack(state)
        hidden, after, _ = self.backbone.run_segment(
            segment.ids, segment.mask, self.memory.cells(), self.memory.tokens, before, True
        )
        assert hidden is not None
        new = self.memory.pack({**before, **after}, state.batch_size)
        return hidden, new if segment.active is None else new.where(segment.active, state)

    def reads_ahead(self) -> int:
        """How many segments of a document that is only read make a window: enough to fill the diagonals."""
        around = any(site == "model" for site, _ in self.memory.cells())
        if self.config.schedule == "sequential" or around:
            return 1
        return READ_AHEAD * len(self.backbone.layers)

    def run(
        self, how: How, segments: Sequence[Segment], state: MemoryState
    ) -> Iterator[tuple[Read, MemoryState | None]]:
        """What each segment of a window leaves, and the state after it, None where that is never whole.

        The state after the last segment is always given.
        """
        if not how.write or self._in_sequence(how, segments):
            yield from sequential(how.step, segments, state, recompute=how.recompute)
            return
        for part in alike(segments):
            kinds = self._kinds_for(how, part, state)
            found: Iterator[tuple[Read, MemoryState | None]]
            if kinds is None:
                found = sequential(how.step, part, state, recompute=how.recompute)
            else:
                found = self._wavefront(how, kinds, part, state)
            for read, after in found:
                state = state if after is None else after
                yield read, after

    def _wavefront(
        self, how: How, kinds: Sequence[Kind], segments: list[Segment], state: MemoryState
    ) -> Iterator[tuple[Read, MemoryState | None]]:
        training = self.backbone.base.training and torch.is_grad_enabled()
        padded = any(segment.mask is not None for segment in segments)
        note = partial(self._note, training, how.gates)
        line = self._line(how, kinds, state, padded, note)
        for number, (hidden, notes) in enumerate(wavefront(line, segments)):
            segment = segments[number]
            last = number == len(segments) - 1
            after = self.memory.pack(line.result(), state.batch_size) if last else None
            if hidden is not None:
                hidden = hidden.to(segment.ids.device)
            if how.recompute is not None:
                loss = how.recompute(how.finish, segment, hidden)
            else:
                loss = how.finish(segment, hidden)
            yield Read(loss, hidden, *self._noted(notes, segment.counted)), after
            del hidden, notes

    def _line(
        self,
        how: How,
        kinds: Sequence[Kind],
        state: MemoryState,
        padded: bool,
        note: Any,
        tuples: Sequence[bool] | None = None,
    ) -> BatchedLine:
        return BatchedLine(
            self.backbone,
            kinds,
            self.try_out(kinds).tuples if tuples is None else tuples,
            self._depth(how),
            how.hidden,
            self.memory.tokens,
            padded,
            self.memory.unpack(state),
            note,
            how.recompute,
        )

    def _depth(self, how: How) -> int:
        """How many layers segments pass: without hidden states wanted, those up to the last memory's."""
        cells = self.memory.cells()
        if how.hidden or not cells or not self.backbone.may_stop():
            return len(self.backbone.layers)
        return 1 + max(layer for _, layer in cells)

    def _note(
        self,
        costs: bool,
        gates: bool,
        cell: Cell,
        before: Any,
        after: Any,
        kept: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """What is kept of one cell: see `Read`. kept: the leaves after it, ended rows as they were."""
        found: dict[str, Tensor] = {}
        sizes = [
            leaf.detach().abs().amax().double()
            for leaf in kept.values()
            if leaf.is_floating_point() and leaf.numel()
        ]
        if sizes:
            found["sizes"] = torch.stack(sizes)
        if costs and (cost := cell.memory.auxiliary_loss(before, after)) is not None:
            found["cost"] = cost
        if gates and (gate := cell.memory.largest_gate(after)) is not None:
            found["gate"] = gate.float()
        return found

    def _noted(
        self, notes: Mapping[str, Mapping[str, Tensor]], counted: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(cost, sizes, gate) of a segment from what was noted of its cells."""
        labels = [label for label in self.memory.labels() if label in notes]
        sizes = [notes[label]["sizes"] for label in labels if "sizes" in notes[label]]
        gates = [notes[label]["gate"] for label in labels if "gate" in notes[label]]
        cost = None
        for label in labels:
            if "cost" in notes[label]:
                one = notes[label]["cost"]
                if counted is not None:
                    one = one.masked_fill(~counted, 0.0)
                one = one.sum() / self.memory.count_of(label)
                cost = one if cost is None else cost + one
        return (
            cost,
            torch.cat(sizes) if sizes else None,
            torch.stack(gates).amax(dim=0) if gates else None,
        )

    def _kinds_for(
        self, how: How, segments: list[Segment], state: MemoryState
    ) -> list[Kind] | None:
        """The layers by kind where `segments` are to run under the wavefront, else None."""
        if self._in_sequence(how, segments):
            return None
        measures, known = self.config.schedule == "auto", None
        if measures and (known := self._known(how, segments[0])) is not None:
            if not faster(known, len(segments)):
                return None
        reason, kinds = self._kinds()
        if torch.compiler.is_compiling():
            reason = "torch.compile cannot look into it; compile without it"
        if reason is None:
            reason = self.try_out(kinds).obstacle
        if reason is not None:
            if measures:
                return None
            raise ValueError(_refused(reason))
        if measures and known is None:
            with torch.random.fork_rng(self._devices()):
                seconds = self._measure(how, kinds, segments[0], state.detach())
            known = {**self._shape(how, segments[0]), **seconds}
            self.config.schedule_measured = [*(self.config.schedule_measured or []), known]
            if not faster(known, len(segments)):
                return None
        return kinds

    def _in_sequence(self, how: How, segments: Sequence[Segment]) -> bool:
        """Whether this is one after the other without looking further."""
        asked = self.config.schedule
        if asked != "auto":
            return asked == "sequential" or len(segments) < 2
        # Processes that measured for themselves would not agree; a compiler cannot look into measuring.
        apart = torch.distributed.is_initialized() or torch.compiler.is_compiling()
        # Who recomputes wants memory, and diagonals keep the hidden states that enter them as well.
        return apart or how.recompute is not None or len(segments) < LEAST_SEGMENTS

    def _known(self, how: How, segment: Segment) -> dict[str, Any] | None:
        """What was measured at this shape."""
        shape = self._shape(how, segment).items()
        for one in self.config.schedule_measured or []:
            if all(one.get(name) == value for name, value in shape):
                return one
        return None

    def _shape(self, how: How, segment: Segment) -> dict[str, Any]:
        """What seconds are taken to depend on, beside the model and its memories."""
        device = self.backbone.device
        return {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "rows": segment.ids.shape[0],
            "tokens": segment.ids.shape[1],
            "layers": self._depth(how),
            "padded": segment.mask is not None,
            "learning": torch.is_grad_enabled(),
            "autocast": torch.is_autocast_enabled(device.type),
            "recompute": how.recompute is not None,
        }

    def _measure(
        self, how: How, kinds: Sequence[Kind], segment: Segment, state: MemoryState
    ) -> dict[str, Any]:
        """Seconds of one segment, and of diagonals of some sizes."""
        depth, device, learning = self._depth(how), self.backbone.device, torch.is_grad_enabled()
        parameters = [
            p
            for p in (*self.backbone.base.parameters(), *self.memory.parameters())
            if p.requires_grad
        ]
        note = partial(self._note, False, False)

        def finish(*outputs: Tensor) -> None:
            if learning:
                wanted = [x for x in outputs if x.requires_grad]
                if wanted:
                    total = torch.stack([x.sum() for x in wanted]).sum()
                    torch.autograd.grad(total, parameters, allow_unused=True)

        def one_segment() -> None:
            read, _ = next(sequential(how.step, [segment], state, recompute=how.recompute))
            if read.hidden is not None:
                finish(read.hidden)

        def cells(count: int) -> Callable[[], None]:
            places = [Place(layer, count - 1 - layer) for layer in range(count)]

            def call() -> None:
                fresh = self._line(how, kinds, state, segment.mask is not None, note)
                # One segment enters at a time.
                fresh.enter(0, segment)
                first = fresh.under_way.pop(0)
                for layer, number in places:
                    fresh.under_way[number] = one = copy(first)
                    one.layer, one.notes = layer, {}
                fresh.run(places)
                finish(*(one.x for one in fresh.under_way.values()))

            return call

        sizes = sorted({1, -(-depth // 2), depth})
        jobs = [one_segment, *(cells(size) for size in sizes)]
        best = [float("inf")] * len(jobs)
        for turn in range(ROUNDS + 1):
            for index, job in enumerate(jobs):
                taken = _seconds(job, device)
                if turn:  # The first is for what is made once.
                    best[index] = min(best[index], taken)
        return {"segment_seconds": best[0], "cells": sizes, "cells_seconds": best[1:]}

    def release(self) -> None:
        """Give every parameter memory of its own again."""
        for module in (self.backbone.base, self.memory):
            separate(list(cast(nn.Module, module).parameters()))


def faster(measured: Mapping[str, Any], segments: int) -> bool:
    """Whether `segments` are clearly faster under the wavefront, going by what was measured.

    A diagonal's seconds are taken to lie on straight lines between the sizes that were measured.
    """
    layers = measured["layers"]
    largest = min(layers, segments)
    ramps = sum(2 * _between(measured, size) for size in range(1, largest))
    full = (layers + segments - 1 - 2 * (largest - 1)) * _between(measured, largest)
    return segments * measured["segment_seconds"] > MARGIN * (ramps + full)


def _between(measured: Mapping[str, Any], size: int) -> float:
    points = list(zip(measured["cells"], measured["cells_seconds"], strict=True))
    for (a, low), (b, high) in pairwise(points):
        if a <= size <= b:
            return low + (high - low) * (size - a) / (b - a)
    return points[-1][1]


def _seconds(job: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call: on an accelerator until it is done, else CPU seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        job()
        torch.cuda.synchronize(device)
        return time.perf_counter() - start
    start = time.process_time()
    job()
    return time.process_time() - start


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of any dtype."""
    if not a.numel():
        return True
    return float((a - b).abs().max()) <= 0.02 * float(b.abs().max()) + 1e-6


def _no_step(segment: Segment, state: MemoryState) -> tuple[Read, MemoryState]:
    raise AssertionError("a trial runs no whole segment")


def _no_loss(segment: Segment, hidden: Tensor | None) -> None:
    return None


def _refused(reason: str) -> str:
    return f"schedule='wavefront' cannot run this model: {reason}; or use schedule='sequential'"
