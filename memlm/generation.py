"""Generation from memory: full segments are committed, and tokens are added to the open one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerateBeamDecoderOnlyOutput

from memlm.arguments import refuse
from memlm.attach import MemoryStack
from memlm.backbone import Backbone, OpenSegment
from memlm.rolling import Reader, RollingMemory, RowEnds, padded
from memlm.segment import BORDERS, documents_in
from memlm.state import MemoryState
from memlm.writes import WriteCount

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

# Settings of a generation_config that say how a cache of the whole text is kept.
CACHES = ("cache_implementation", "cache_config", "prefill_chunk_size")


class MemoryGenerationMixin(GenerationMixin):
    """`generate` of transformers for a `Reader` with memories."""

    memory: MemoryStack
    backbone: Backbone
    base: PreTrainedModel

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        memory_state: MemoryState | None = None,
        past_key_values: RollingMemory | None = None,
        logits_to_keep: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Commit the full segments, and hand over what is to be computed of the open one."""
        refuse({**kwargs, "use_cache": None})
        if past_key_values is None:
            past_key_values = RollingMemory(cast(Reader, self), memory_state)
        ids, mask, state = past_key_values.advance(input_ids, attention_mask)
        given = {"input_ids": ids, "attention_mask": mask, "memory_state": state, "write": False}
        if past_key_values.segment is not None:
            given["past_key_values"] = past_key_values
        return {**given, "logits_to_keep": 1}

    @torch.no_grad()
    def _added(
        self, ids: Tensor, mask: Tensor | None, state: MemoryState, segment: OpenSegment
    ) -> Tensor:
        """(B, 1, V) logits after tokens (B, T) that are added to an open segment."""
        if not segment.begun:
            self._check_ready()
        hidden, _, _ = self.backbone.run_segment(
            ids,
            None if mask is None else mask.to(torch.bool),
            self.memory.cells(),
            None,
            self.memory.unpack(state),
            False,
            segment,
        )
        assert hidden is not None
        return self.backbone.logits(hidden[:, -1:])

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        memory_state: MemoryState | None = None,
        writes: WriteCount | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts of any length, after what `memory_state` remembers.

        Takes what transformers' `generate` takes, and returns the same. Keys, values and what memories have
        written are kept within the open segment, and the segment is committed when the next token needs a
        new one. So the tokens are the same as if the whole prefix were read again at every step. With
        use_cache=False, or where something cannot go on within a segment (`reruns`), the open segment is
        run again at every token. writes: counts the segments in which a write gate opened.

        With return_dict_in_generate=True there are also, a row per sequence, memory_state (committed),
        open_ids (S, n), the tokens since then up to the row's end, padded on the left, and open_mask
        (S, n), None without padding. Going on from them with `torch.cat([out.open_ids, more], 1)` is
        going on with the unbroken text.
        """
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        _check(prompt, kwargs)
        given = {} if generation_config is None else generation_config.to_dict()
        own = self.generation_config.to_dict().items()
        asked = {k: v for k, v in given.items() if v is not None} | kwargs
        given = {k: v for k, v in own if v is not None} | asked
        _check_settings(given, writes)
        if prompt is not None and memory_state is not None:
            memory_state = self.memory.admit(memory_state, prompt.shape[0])
        keeps = self._keeps(given.get("use_cache"), kwargs)
        if generation_config is None:
            kwargs["use_cache"] = keeps
        else:
            kwargs.pop("use_cache", None)
            generation_config = copy.deepcopy(generation_config)
            generation_config.use_cache = keeps
        stops = RowEnds()
        rolling = RollingMemory(
            cast(Reader, self),
            memory_state,
            self.backbone.open_segment if keeps else None,
            _ids(given.get("eos_token_id")),
            writes,
            stops,
            given.get("pad_token_id"),
        )
        if given.get("num_beams", 1) == 1:
            # Given to transformers as a criterion, and found among all of them below.
            if len(args) > 1:
                args = (args[0], [*(args[1] or ()), stops], *args[2:])
            else:
                others = kwargs.get("stopping_criteria") or ()
                kwargs["stopping_criteria"] = StoppingCriteriaList([*others, stops])
        out = super().generate(inputs, generation_config, *args, past_key_values=rolling, **kwargs)
        return out if isinstance(out, Tensor) else _with_memory(out, rolling)

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        # transformers' own, which alone has every criterion of a call. Without it nothing is lost but the
        # ends of rows that no end token ended.
        found = super()._get_stopping_criteria(*args, **kwargs)
        for criterion in found:
            if isinstance(criterion, RowEnds):
                return criterion.watch(found)
        return found

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """ValueError: transformers' continuous batching keeps pages of a cache, and a memory has none."""
        raise ValueError(
            "generate_batch pages a cache of the whole text, which a memory has not; use generate, which "
            "takes a batch, or memlm.StreamPool for many streams at once"
        )

    def _keeps(self, wanted: bool | None, asked: Mapping[str, Any]) -> bool:
        """Whether the open segment is kept. ValueError where a call `asked` for it and it cannot be."""
        reason = self.reruns
        if asked.get("use_cache") and reason:
            raise ValueError(
                f"use_cache=True: the open segment has to be run again at every token, since {reason}; "
                "leave use_cache out"
            )
        return wanted is not False and not reason

    @property
    def reruns(self) -> str | None:
        """Why generation runs the open segment again at every token; None where it adds token to token."""
        if self.training and self.base.is_gradient_checkpointing:
            return "gradient checkpointing keeps nothing in training mode"
        return self.memory.reruns() or self.backbone.reruns(self.memory.cells())


def _with_memory(out: Any, rolling: RollingMemory) -> Any:
    """What transformers returns, with what is remembered in the place of the cache."""
    found = type(out)(**{k: v for k, v in out.items() if k != "past_key_values"})
    place = rolling.after(out.sequences, isinstance(out, GenerateBeamDecoderOnlyOutput))
    found["memory_state"] = place.state
    found["open_ids"], found["open_mask"] = padded(place.rows, "left")
    return found


def _ids(tokens: Any) -> list[int]:
    """One token, several or none, as a list."""
    if tokens is None:
        return []
    found = tokens.tolist() if isinstance(tokens, Tensor) else tokens
    return list(found) if isinstance(found, list | tuple) else [found]


def without_cache(config: GenerationConfig | None) -> GenerationConfig | None:
    """A copy without what a base's own cache is told, whose place a memory takes."""
    found = copy.deepcopy(config)
    for name in CACHES if found is not None else ():
        setattr(found, name, None)
    return found


def _check_settings(given: Mapping[str, Any], writes: WriteCount | None) -> None:
    """Refuse what asks for another cache than the open segment's."""
    for name in CACHES:
        if given.get(name) is not None:
            raise ValueError(
                f"{name}={given[name]!r} is for a cache of the whole text, which a memory reads in "
                "segments; leave it out (of a generation_config, too)"
            )
    for name in ("num_beams", "num_return_sequences"):
        if writes is not None and (given.get(name) or 1) != 1:
            raise ValueError(
                f"writes counts one sequence per prompt; leave out {name}={given[name]}"
            )


def _check(prompt: Tensor | None, arguments: Mapping[str, Any]) -> None:
    """Refuse what generation would silently ignore."""
    refuse({**arguments, "use_cache": None})
    if idle := [name for name in _NOT_IN_GENERATION if arguments.get(name) is not None]:
        raise ValueError(
            f"generate() has no use for {', '.join(idle)}; leave it out, or call the model"
        )
    if prompt is None:
        return
    if prompt.ndim != 2 or not prompt.shape[1]:
        raise ValueError(
            f"input_ids has shape {tuple(prompt.shape)}; give (rows, tokens), with at least one token"
        )
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
