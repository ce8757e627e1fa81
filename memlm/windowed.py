"""A document of any length, read in windows whose memory is bounded.

Each window is a call of the model as it is given, wrapped or not: what DDP, FSDP, peft and torch.compile
put around a forward is around every window. No graph reaches from one window into another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from memlm.arguments import Batch, packed
from memlm.output import MemLMOutput
from memlm.scan import Anchor, first_window, scan
from memlm.segment import (
    BORDERS,
    IGNORE,
    Alignment,
    Segment,
    auxiliary_flags,
    cut,
    joined_mask,
    masked_auxiliary,
)
from memlm.state import MemoryState


class _Model(Protocol):
    """What `windows` needs of the model inside whatever wraps it."""

    training: bool

    @property
    def segment_length(self) -> int: ...


def windows(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    memory_state: MemoryState | None = None,
    bptt_depth: int = 2,
    bptt_anchor: Anchor = "end",
    num_items_in_batch: Tensor | int | None = None,
    segment_alignment: Alignment = "left",
    auxiliary_mask: Tensor | None = None,
    **kwargs: Any,
) -> Iterator[MemLMOutput]:
    """Read documents window by window: one call of `model`, and one `MemLMOutput`, per window.

    model: a `MemLMForCausalLM`, or a module around one (DDP, FSDP, peft, torch.compile), which is then
    called. input_ids, attention_mask and labels (B, N), memory_state, bptt_anchor, segment_alignment and
    auxiliary_mask (B, S), for all S segments, are as its `forward` takes them; so are position_ids,
    seq_idx or cu_seq_lens_q, for rows of several documents, and `kwargs`, which go to every call.
    bptt_depth: segments per window. A memory learns what to write from later segments of the same window,
    so with 1 it does not learn that.

    Call backward on each window's loss before the next window is asked for:

        for out in memlm.windows(model, input_ids, labels=labels, bptt_depth=4):
            out.loss.backward()
        optimizer.step()

    The losses of all windows sum to the loss of one `forward` with the same bptt_depth, the mean over all
    labels of the call (or their sum divided by num_items_in_batch), and so do the gradients. Each output's
    memory_state, the one after its window, is still part of that window's graph; the next window starts
    from its values alone. The rows of each output are documents, packed to the left: logits (B, T, V) are
    those of the window's own T positions.

    ValueError on what `forward` refuses, before anything is read.
    """
    if unknown := {"shift_labels", "return_dict"} & kwargs.keys():
        raise TypeError(f"windows() got unexpected arguments {sorted(unknown)}; give labels alone")
    inner = _model_within(model)
    borders = {name: kwargs.pop(name, None) for name in BORDERS}
    batch = packed(
        input_ids,
        attention_mask,
        labels,
        continued=memory_state is not None,
        alignment=segment_alignment,
        segment_length=inner.segment_length,
        **borders,
    )
    segments = list(cut(batch.ids, batch.mask, batch.targets, inner.segment_length))
    if auxiliary_mask is not None:
        segments = masked_auxiliary(segments, auxiliary_mask)
    first = first_window(len(segments), bptt_depth, bptt_anchor)
    shares = _Shares(batch, segments, num_items_in_batch)

    def call(window: list[Segment], state: MemoryState) -> tuple[MemLMOutput, MemoryState]:
        whole = _joined(window)
        counted = auxiliary_flags(window)
        out = model(
            input_ids=whole.ids,
            attention_mask=whole.mask,
            shift_labels=whole.labels,
            memory_state=state,
            segment_alignment=segment_alignment,
            auxiliary_mask=counted,
            **kwargs,
        )
        return shares.weigh(out, whole, window, inner.training), out.memory_state

    # The model makes the first state itself: when it is sharded, nobody else has the parameters for it.
    start = cast(MemoryState, memory_state)
    return _outputs(scan(call, segments, start, bptt_depth, first))


def _outputs(found: Iterator[tuple[MemLMOutput, MemoryState]]) -> Iterator[MemLMOutput]:
    """The outputs alone, none of them held while the next window is read."""
    for out, _ in found:
        yield out
        del out, _


class _Shares:
    """How much each window's means count in those of the whole call."""

    def __init__(
        self, batch: Batch, segments: list[Segment], num_items_in_batch: Tensor | int | None
    ) -> None:
        self.rows = sum(segment.rows for segment in segments)
        self.labels = 0 if batch.targets is None else (batch.targets != IGNORE).sum()
        self.items = self.labels if num_items_in_batch is None else num_items_in_batch

    def weigh(
        self, out: MemLMOutput, whole: Segment, window: list[Segment], training: bool
    ) -> MemLMOutput:
        """A window's output with its losses as parts of the call's."""
        loss, auxiliary = out.loss, out.auxiliary_loss
        if auxiliary is not None:
            share = auxiliary * sum(segment.rows for segment in window) / self.rows
            if loss is not None and self.items is not self.labels:
                share = share * self.labels / self.items
        if loss is not None and whole.labels is not None:
            if training and auxiliary is not None:
                loss = loss - auxiliary
            own = (whole.labels != IGNORE).sum()
            loss = loss * own / torch.as_tensor(self.items, device=own.device).clamp(min=1)
            if training and auxiliary is not None:
                loss = loss + share
            out["loss"] = loss
        if auxiliary is not None:
            out["auxiliary_loss"] = share
        return out


def _joined(window: list[Segment]) -> Segment:
    """The segments of a window as one."""

    labels = [segment.labels for segment in window if segment.labels is not None]
    ids = torch.cat([segment.ids for segment in window], dim=1)
    return Segment(ids, joined_mask(window), torch.cat(labels, dim=1) if labels else None)


def _model_within(model: nn.Module) -> _Model:
    """The model with memories in `model`. TypeError when there is none."""
    for module in model.modules():
        if hasattr(type(module), "segment_length"):
            return cast(_Model, module)
    raise TypeError(
        f"model={type(model).__name__} has no MemLMForCausalLM in it; give one, or a module around one"
    )
