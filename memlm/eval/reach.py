"""How far back a model's predictions reach: how they change when it has not read the beginning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memlm.eval.provenance import without_training

if TYPE_CHECKING:
    from torch import Tensor

    from memlm.modeling import MemLMForCausalLM


def remembrance(
    model: MemLMForCausalLM, input_ids: Tensor, segments: Sequence[int]
) -> dict[int, float]:
    """How much predictions in a document's last segment owe to text before the nearest `segments`.

    For each number in `segments`: the total variation, from 0 to 1, between the next-token distributions
    after the whole document and after that many segments before the last alone, a mean over positions of
    the last segment and over rows (the effective remembrance of Buitrago and Gu 2025, *Understanding and
    Improving Length Generalization in Recurrent Models*). At 0 the earlier text might as well not have
    been read; values that keep growing with distance point to states unlike those of training.

    input_ids (B, N): whole segments, at least two. ValueError when they are not, or do not hold the
    `segments` asked for.
    """
    import torch

    from memlm.segment import cut

    length = model.config.segment_length
    count, rest = divmod(input_ids.shape[1], length)
    if rest or count < 2:
        raise ValueError(
            f"input_ids has {input_ids.shape[1]} tokens; give whole segments of {length}, at least two"
        )
    for kept in segments:
        if not 0 <= kept < count:
            raise ValueError(
                f"segments={kept} must lie between 0 and {count - 1}, those before the last"
            )

    def predicted(kept: int) -> Tensor:
        past, last = input_ids[:, (count - 1 - kept) * length : -length], input_ids[:, -length:]
        state = model.init_state(len(input_ids))
        if kept:
            state = model.read(cut(past, None, None, length), state)
        return model(last, memory_state=state, write=False).logits.float().softmax(dim=-1)

    with torch.no_grad(), without_training(model):
        whole = predicted(count - 1)
        return {
            kept: float((whole - predicted(kept)).abs().sum(dim=-1).mean() / 2) for kept in segments
        }
