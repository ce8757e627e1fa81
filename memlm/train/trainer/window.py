"""One window of segments through the model: its loss, its auxiliary loss, and the state after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from memlm.segment import IGNORE, auxiliary_flags, shift_labels
from memlm.state import MemoryState
from memlm.train.trainer.plan import AskedSegment, Questions, join_segments, split_calls
from memlm.train.trainer.tally import Tally, tally_answers


@dataclass(frozen=True)
class WindowResult:
    """The outcome of a window.

    loss: cross-entropy of its targets and its questions, a scalar; None where there are neither.
    auxiliary: the memories' auxiliary loss, a scalar summed over rows; None where there is none.
    tally: answers right and asked. state: the memory after its last segment.
    """

    loss: Tensor | None
    auxiliary: Tensor | None
    tally: Tally
    state: MemoryState


def run_window(
    model: nn.Module,
    window: Sequence[AskedSegment],
    state: MemoryState,
    *,
    count: Tensor | int,
    length: int,
    model_length: int,
    head: nn.Module | None,
) -> WindowResult:
    """Run a window's segments and the questions after them.

    count: targets that the summed loss is divided by. length: tokens per segment of this batch;
    model_length: of the model. head: the module whose logits are counted as answers; None: no count.
    """
    total: Tensor | None = None
    auxiliary: Tensor | None = None
    tally = Tally()
    # Segments shorter than the model's own each need a call.
    whole = length == model_length
    for segments in split_calls(window, whole):
        ids, mask, labels = join_segments(segments)
        with collect_predictions(None if labels is None else head) as predicted:
            out = model(
                input_ids=ids,
                attention_mask=mask,
                shift_labels=labels,
                memory_state=state,
                logits_to_keep=None,
                auxiliary_mask=auxiliary_flags(segments),
            )
        state = out.memory_state
        # A segment without targets still has the memories' auxiliary loss.
        cost = out.auxiliary_loss
        if cost is not None:
            cost = cost * sum(segment.rows for segment in segments)
            auxiliary = cost if auxiliary is None else auxiliary + cost
        if labels is not None:
            # Both are means over this call, but the loss is wanted as a share of the batch's targets.
            loss = out.loss if cost is None else out.loss - out.auxiliary_loss
            # In the loss's own precision: a ratio of whole numbers would be in float32.
            loss = loss * ((labels != IGNORE).sum().to(loss.dtype) / count)
            total = loss if total is None else total + loss
        if labels is not None and predicted is not None:
            tally.add(tally_answers(labels, predicted, length))
        questions = segments[-1].questions
        if questions is not None:
            loss, answered = ask(model, questions, state, count, model_length, head)
            total = loss if total is None else total + loss
            tally.add(answered)
    return WindowResult(total, auxiliary, tally, state)


def ask(
    model: nn.Module,
    questions: Questions,
    state: MemoryState,
    count: Tensor | int,
    model_length: int,
    head: nn.Module | None,
) -> tuple[Tensor, Tally]:
    """The loss of questions on forks of `state`, which stays as it is, and the answers right."""
    if questions.ids.shape[1] > model_length:
        raise ValueError(
            f"a question of {questions.ids.shape[1]} tokens does not fit into the model's "
            f"segment_length={model_length}; use longer segments"
        )
    labels = shift_labels(questions.labels)
    with collect_predictions(head) as predicted:
        out = model(
            input_ids=questions.ids,
            attention_mask=questions.mask,
            shift_labels=labels,
            memory_state=state.select(questions.rows),
            logits_to_keep=None,
            num_items_in_batch=count,
            write=False,
        )
    tally = Tally() if predicted is None else tally_answers(labels, predicted, model_length)
    return out.loss, tally


@contextmanager
def collect_predictions(head: nn.Module | None) -> Iterator[list[Tensor] | None]:
    """Collect the most likely tokens wherever `head` is asked, one tensor per segment."""
    if head is None:
        yield None
        return
    found: list[Tensor] = []

    def collect(module: nn.Module, given: Any, logits: Tensor) -> None:
        found.append(logits.detach().argmax(dim=-1).flatten())

    # Removed before backward: recomputation would run the head once more.
    handle = head.register_forward_hook(collect)
    try:
        yield found
    finally:
        handle.remove()
