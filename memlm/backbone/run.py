"""The memories at work while one segment passes through the base model, and the states they leave.

A `Run` travels in a context variable between modules and as a keyword argument through a layer's
`__call__`, so that a recomputation by activation checkpointing, which happens long after the call, finds
the same memories and states. At the end of a segment every memory has left exactly one state, or the call
raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm.backbone.open import Front, OpenSegment
from memlm.backbone.silence import run_memory, unchanged
from memlm.memory.base import QKV, Memory, Site

# The dtypes in which small training steps are lost to rounding.
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Cell:
    """One memory at one stage, and the name its state goes by.

    within: calls the function it is given, with the memory's parameters at hand.
    """

    name: str
    memory: Memory
    within: Callable[[Callable[[], Any]], Any]


# (site, layer) -> the memories there, outermost first. Site "model" has layer -1.
Cells = Mapping[tuple[Site, int], list[Cell]]


class Places(Protocol):
    """What stages and heads need of the model: positions and masks for a sequence of another length."""

    def lengthened(
        self,
        layer: int,
        arguments: Mapping[str, Any],
        x: Tensor,
        mask: Tensor | None,
        times: Tensor | None = None,
        padded: bool = True,
    ) -> dict[str, Any]: ...

    def behind(
        self, layer: int, arguments: Mapping[str, Any], x: Tensor, front: Front, where: OpenSegment
    ) -> dict[str, Any]: ...

    def unrotated(
        self, layer: int, arguments: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], tuple[Tensor, Tensor] | None]: ...

    def rotary(self, layer: int, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]: ...


class Enough(Exception):
    """All memories have left their states, and nobody wants what the layers above would make."""


class Run:
    """The memories at work while one segment passes through the base model, and the states they leave.

    No dataclass and no tuple: sharding rebuilds those on their way into a module, and what was written into
    the copy would be lost.

    module's output; None is all. open: what is kept of the segment, when tokens may be added to it later.
    stops: whether to raise `Enough` once every memory has left its state. batched: whether several layers
    run as one, under vmap.
    """

    heads: int | None = None
    rotation: tuple[Tensor, Tensor] | None = None
    wanted: int | None = None
    stops: bool = False
    batched: bool = False

    def __init__(
        self,
        backbone: Places,
        cells: Cells,
        states: Mapping[str, Any],
        write: bool,
        mask: Tensor | None = None,
        open_segment: OpenSegment | None = None,
    ) -> None:
        self.backbone, self.cells, self.states = backbone, cells, states
        self.write, self.mask, self.open = write, mask, open_segment
        self.differentiates = torch.is_grad_enabled()
        self.left = Left()

    def but(self, **changes: Any) -> Run:
        """The same run inside one stage; states recorded there are recorded here."""
        inside = copy(self)
        vars(inside).update(changes)
        return inside

    def chain(self, site: Site, layer: int, stage: Callable[..., Tensor], x: Any) -> Tensor:
        """Pass `x` through the memories at one stage, `stage` innermost."""
        # No closure that refers to itself: cyclic garbage would keep a segment's tensors until
        # Python's next full collection.
        for cell in reversed(self.cells.get((site, layer), ())):
            stage = partial(self._through, cell, stage)
        return stage(x)

    def _through(
        self,
        cell: Cell,
        inner: Callable[..., Tensor],
        x: Any,
        mask: Tensor | None = None,
        times: Tensor | None = None,
        last: int | None = None,
    ) -> Tensor:
        if times is not None:
            # `attach` refuses the compositions that would get here.
            raise TypeError(f"{cell.name} cannot tell inserted positions from the segment's tokens")
        if self.differentiates and not torch.is_grad_enabled():
            raise RuntimeError(
                f"the memory {cell.name!r} was run without gradient inside a call with gradient, as "
                "use_reentrant=True does, and what it writes would lose its gradient; give activation "
                "checkpointing use_reentrant=False (CheckpointImpl.NO_REENTRANT)"
            )
        if self.open is not None and self.open.begun and cell.memory.continues.how == "front":
            self.left.add(cell.name, self.states[cell.name])
            return inner(x)
        known = self.mask_for(x) if mask is None else mask
        return cell.within(partial(self._use, cell, inner, x, known))[0]

    def _use(
        self, cell: Cell, inner: Callable[..., Tensor], x: Any, mask: Tensor | None
    ) -> tuple[Tensor, Any]:
        before = self.states[cell.name]
        last = self.stops and self.left.lacks_only(cell.name, self.cells)
        if last and not cell.memory.reads_inner:
            inner = unchanged
        if self.open is not None:
            progress = self.open.progress(cell.name, cell.memory.continues, before)
            use = partial(_in_precision_of, memory=cell.memory)
            y, state = progress.go_on(use, inner, x, mask, self.open.begun), before
        else:
            y, state = _in_precision_of(x, before, inner, cell.memory, mask=mask, write=self.write)
        self.left.add(cell.name, state)
        if last:
            raise Enough
        # Both are returned, though the state is recorded: sharding looks at what a call returns.
        return y, state

    def mask_for(self, x: Any) -> Tensor | None:
        """The mask of what passes a stage: positions before the segment's own are real."""
        length, device = (
            (x.q.shape[2], x.q.device) if isinstance(x, QKV) else (x.shape[1], x.device)
        )
        if self.mask is None:
            return None
        return F.pad(self.mask, (length - self.mask.shape[1], 0), value=True).to(device)


class Passage:
    """The decoder without its layers: what it gives each of them, and what it makes of what they return.

    tuples: whether each layer returns a tuple. leaves (B, T, D): what the last layer has made of the
    segment; None when it is about to enter. inputs (B, T, D): what the first layer is given. arguments: the
    other arguments of each layer, by name.
    """

    def __init__(self, tuples: Sequence[bool], leaves: Tensor | None = None) -> None:
        self.tuples, self.leaves = tuples, leaves
        self.inputs: Tensor | None = None
        self.arguments: list[dict[str, Any]] = []

    def meet(self, layer: int, arguments: dict[str, Any], call: Callable[[], Any]) -> Any:
        """What `layer` would return, without running it. ValueError when more than that is left out."""
        hidden = arguments.pop("hidden_states")
        if self.inputs is None:
            self.inputs = hidden
            self.passes = hidden if self.leaves is None else self.leaves
        if len(self.arguments) != layer or (layer and hidden is not self.passes):
            raise ValueError(
                f"the base model does something of its own before layer {layer}, which would be left out"
            )
        self.arguments.append(arguments)
        return (self.passes,) if self.tuples[layer] else self.passes


class Returns:
    """Whether each layer returns a tuple, seen while the decoder runs as always."""

    def __init__(self) -> None:
        self.tuples: list[bool] = []

    def meet(self, layer: int, arguments: dict[str, Any], call: Callable[[], Any]) -> Any:
        out = call()
        self.tuples.append(isinstance(out, tuple))
        return out


class Left:
    """The states the memories leave in one segment, by name."""

    def __init__(self) -> None:
        self.states: dict[str, Any] = {}
        self.open = True

    def add(self, name: str, state: Any) -> None:
        """Record a state. RuntimeError for the second one of a memory."""
        if not self.open:
            return  # A recomputation, whose state is known already.
        if name in self.states:
            raise RuntimeError(
                f"the memory {name!r} ran twice in one segment: the base model runs its stage more than "
                "once; attach it to other layers (`layers=`)"
            )
        self.states[name] = state

    def lacks_only(self, name: str, cells: Cells) -> bool:
        """Whether every memory but this one has left its state."""
        names = {cell.name for found in cells.values() for cell in found}
        return names - self.states.keys() == {name}

    def close(self, cells: Cells) -> dict[str, Any]:
        """All states. RuntimeError when a memory has left none."""
        self.open = False
        names = [cell.name for found in cells.values() for cell in found]
        missing = [name for name in names if name not in self.states]
        if missing:
            raise RuntimeError(
                f"the memories {missing} did not run: the base model passed their layers by, or a layer "
                "or its forward was replaced after the model was made; make the change before, or "
                "change a subclass of the layer instead of its instance"
            )
        return self.states


def _in_precision_of(
    x: Any,
    state: Any,
    inner: Callable[..., Tensor],
    memory: Memory,
    *,
    mask: Tensor | None,
    write: bool,
) -> tuple[Tensor, Any]:
    """`memory` on `x`, under autocast where `x` is in half precision and the parameters are wider.

    So a training step changes float32 numbers, and products cost what they cost in the base model. `inner`
    runs under the caller's own setting, on what it would be given without memories.
    """
    stream = (x.v if isinstance(x, QKV) else x).dtype
    parameter = next(memory.parameters(), None) if stream in HALF else None
    if parameter is None or parameter.dtype == stream:
        return run_memory(memory, x, state, inner, mask=mask, write=write)
    device = parameter.device.type
    outside = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    def stage(x: Any, **given: Any) -> Any:
        x = QKV(*(part.to(stream) for part in x)) if isinstance(x, QKV) else x.to(stream)
        with torch.autocast(device, *outside):
            return inner(x, **given)

    # A cell uses a weight once per segment, so autocast's cache would only keep copies alive.
    with torch.autocast(device, stream, cache_enabled=False):
        within = inner if inner is unchanged else stage
        y, new = run_memory(memory, x, state, within, mask=mask, write=write)
    return y.to(stream), new


RUN: ContextVar[Run | None] = ContextVar("memlm_run", default=None)
# What meets the decoder's calls of its layers, if anything does.
MEETS: ContextVar[Passage | Returns | None] = ContextVar("memlm_meets", default=None)


class entered:
    """`run` at work within the block."""

    # No generator: a new token passes one of these a layer, and a generator costs it five calls.

    def __init__(self, run: Run | None) -> None:
        self.run = run

    def __enter__(self) -> None:
        self.token = RUN.set(self.run)

    def __exit__(self, *raised: object) -> None:
        RUN.reset(self.token)


@contextmanager
def met_by(one: Passage | Returns) -> Iterator[None]:
    token = MEETS.set(one)
    try:
        yield
    finally:
        MEETS.reset(token)
