"""Generation from memory: full segments are committed, and the open one is run again at every token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationMixin

from memlm.arguments import refuse
from memlm.attach import MemoryStack
from memlm.rolling import Reader, RollingMemory
from memlm.segment import BORDERS, documents_in
from memlm.state import MemoryState

# Arguments of `forward` that generation sets by itself, or has no use for.
_NOT_IN_GENERATION = (
    "labels",
    "shift_labels",
    "num_items_in_batch",
    "bptt_depth",
    "bptt_anchor",
    "segment_alignment",
    "write",
    "logits_to_keep",
    "return_dict",
)


class MemoryGenerationMixin(GenerationMixin):
    """`generate` of transformers for a `Reader` with memories."""

    memory: MemoryStack

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        memory_state: MemoryState | None = None,
        rolling: RollingMemory | None = None,
        logits_to_keep: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Commit the full segments, and hand over the open one, padded on the left."""
        refuse({**kwargs, "use_cache": None})
        if rolling is None:
            rolling = RollingMemory(cast(Reader, self), memory_state)
        ids, mask, state = rolling.advance(input_ids, attention_mask)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "memory_state": state,
            "logits_to_keep": 1,
            "write": False,
        }

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        memory_state: MemoryState | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts of any length, after what `memory_state` remembers.

        Takes what transformers' `generate` takes, and returns the same. The open segment is run again
        at every token from the last committed state, and is committed when the next token needs a new
        segment. So the tokens are the same as if the whole prefix were read again at every step.
        """
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        _check(prompt, kwargs)
        if prompt is not None and memory_state is not None:
            memory_state = self.memory.admit(memory_state, prompt.shape[0])
        kwargs["use_cache"] = False
        prompts = None if prompt is None else (len(prompt), prompt.shape[1])
        rolling = RollingMemory(cast(Reader, self), memory_state, prompts)
        return super().generate(inputs, *args, rolling=rolling, **kwargs)


def _check(prompt: Tensor | None, arguments: Mapping[str, Any]) -> None:
    """Refuse what generation would silently ignore."""
    refuse({**arguments, "use_cache": None})
    if idle := [name for name in _NOT_IN_GENERATION if arguments.get(name) is not None]:
        raise ValueError(
            f"generate() has no use for {', '.join(idle)}; leave it out, or call the model"
        )
    if prompt is None or prompt.ndim != 2:
        return
    mask = arguments.get("attention_mask")
    if mask is not None and mask.shape != prompt.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but input_ids has shape "
            f"{tuple(prompt.shape)}; give both the same shape, without what memory_state remembers"
        )
    real = None if mask is None else mask.to(torch.bool)
    if documents_in(prompt, real, **{name: arguments.get(name) for name in BORDERS}) is not None:
        raise ValueError(
            "generate() continues one document per row, but position_ids, seq_idx or cu_seq_lens_q put "
            "several into a row; give each its own row"
        )
