"""Baselines: the same base model without the memory that is being judged, or the memory with an advantage.

last-tokens: the end of the document alone; full: attention over all of it; window: a sliding window of
attention (Transformer-XL's cache, streamed like any memory); retrieval: the best passages from an index;
chunks: every chunk by itself, and the surest answer. With the memory: twice, the document read a second
time; question-first, the question known before reading; passages, what an index recalls in place of the
document; reread, after the document; silenced, the memory model with nothing remembered.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memlm.eval.log import FORMER_WORDS
from memlm.eval.provenance import write_thresholds
from memlm.eval.running.lanes import Tape
from memlm.eval.running.readers import (
    Asked,
    BatchReader,
    LastReader,
    MemoryReader,
    RecalledReader,
    WholeReader,
)
from memlm.eval.running.unforgetting import (
    ChunksReader,
    PassagesReader,
    QuestionFirstReader,
    RereadReader,
    TwiceReader,
)
from memlm.memory import config_from_dict

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from memlm.modeling import MemLMForCausalLM

_log = logging.getLogger(__name__)

# No baseline: the given model itself is judged.
MODEL = "model"
# Tokens a baseline sees when the model names no limit.
DEFAULT_WINDOW = 4096


def make_reader(
    model: MemLMForCausalLM | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    baseline: str | None = MODEL,
    window: int | None = None,
    own_segment: bool = False,
    keep_at: str | os.PathLike[str] | None = None,
) -> BatchReader:
    """Say how `model` reads: into its memory where it has one, else with all its attention.

    baseline: "model" (or None) for that; or a name of `BASELINES`, to read in that way instead. window:
    tokens that "last-tokens", "window" and "chunks" see; None is a segment, or what the base's positions
    allow up to 4,096. A reader may change the model until it is closed.
    """
    baseline = present_word(baseline)
    if baseline not in (MODEL, *BASELINES):
        raise ValueError(
            f"baseline={baseline!r} is unknown; use one of {', '.join(BASELINES)}, or {MODEL!r} for the "
            "model itself"
        )
    if window is not None and baseline not in WINDOWED:
        raise ValueError(
            f"window={window} says what the baselines {', '.join(map(repr, WINDOWED))} see, but baseline "
            f"is {baseline!r}; leave it out"
        )
    if window is not None and window < 2:
        raise ValueError(f"window={window} must be at least 2 tokens")
    if baseline in WITH_MEMORY and not is_memory_model(model):
        raise ValueError(
            f"baseline={baseline!r} reads with a memory, and {type(model).__name__} has none; wrap it with "
            "MemLMForCausalLM.from_base, or use 'full' or 'chunks'"
        )
    if is_memory_model(model) and baseline in (MODEL, *WITH_MEMORY):
        reads = WITH_MEMORY.get(baseline, MemoryReader)
        return reads(model, tokenizer, own_segment, keep_at)  # type: ignore[arg-type]
    if baseline == MODEL:
        return WholeReader(model, tokenizer)  # type: ignore[arg-type]
    return BASE_ALONE[baseline](base_of(model), tokenizer, window or default_window(model))


def present_word(baseline: str | None) -> str:
    """The present word for a baseline: "model" for None; a former word is replaced, with a warning."""
    if baseline is None:
        return MODEL
    present = FORMER_WORDS["baseline"].get(baseline, baseline)
    if present != baseline:
        _log.warning(
            "the baseline %r is called %r now; the old word still works", baseline, present
        )
    return present


def is_memory_model(model: Any) -> bool:
    """Whether the model reads segments into a state."""
    return callable(getattr(model, "read", None))


def base_of(model: Any) -> Any:
    """The model of transformers that a memory model wraps; any other model as it is."""
    return model.base if is_memory_model(model) else model


def default_window(model: Any) -> int:
    """Tokens of a segment; for a model without memory what its positions allow, up to 4,096."""
    if is_memory_model(model):
        return int(model.config.segment_length)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(DEFAULT_WINDOW, limit or DEFAULT_WINDOW)


def _last(base: Any, tokenizer: PreTrainedTokenizerBase, window: int) -> BatchReader:
    return LastReader(base, tokenizer, window)


def _whole(base: Any, tokenizer: PreTrainedTokenizerBase, window: int) -> BatchReader:
    return WholeReader(base, tokenizer)


class WindowReader(MemoryReader):
    """Baseline "window": at every layer a token sees at most `window` tokens, and at least half of them.

    Segments are half a window long, and each sees the keys and values of as many tokens before it.
    """

    name = "window"

    def __init__(self, base: Any, tokenizer: PreTrainedTokenizerBase, window: int) -> None:
        from memlm.memory.transformer_xl import TransformerXLConfig
        from memlm.modeling import MemLMForCausalLM

        segment = window // 2
        memory = TransformerXLConfig(memory_length=window - segment)
        model = MemLMForCausalLM.from_base(base, memory=memory, segment_length=segment)
        super().__init__(model.eval(), tokenizer)
        self.window = window

    def close(self) -> None:
        self.model.unload()

    def settings(self) -> dict[str, Any]:
        return {"baseline": self.name, "window": self.window}


class SilencedReader(MemoryReader):
    """Baseline "silenced": the memory model, trained as it is, remembers nothing of the document.

    Where all its memories have write gates, their threshold is infinite while it reads, so that what a
    memory does beside writing stays as it was. Otherwise every segment starts with a fresh state, so that
    only the last one, which holds the question, need be read.
    """

    name = "silenced"

    def __init__(
        self,
        model: MemLMForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        own_segment: bool = False,
        keep_at: str | os.PathLike[str] | None = None,
    ) -> None:
        # Little is read, and a state without anything in it need not be kept.
        super().__init__(model, tokenizer, own_segment)
        thresholds = write_thresholds(model)
        configs = map(config_from_dict, getattr(model.config, "memory", None) or [])
        gated = all(getattr(config, "write_gate", "none") != "none" for config in configs)
        # One threshold for all is what can be put back.
        self._before = thresholds[0] if gated and len(thresholds) == 1 else None
        if self._before is not None:
            model.set_memory_options(write_threshold=float("inf"))

    def close(self) -> None:
        if self._before is not None:
            self.model.set_memory_options(write_threshold=self._before)

    def settings(self) -> dict[str, Any]:
        fresh = self._before is None
        return {
            "baseline": self.name,
            "silenced_by": "fresh states" if fresh else "write_threshold",
        }

    def text(self, asked: Asked) -> tuple[Iterator[NDArray[np.int32]], int]:
        pieces, tokens = super().text(asked)
        if self._before is not None:
            return pieces, tokens
        # Of what is forgotten nothing is read, and the rest stands in the question's segment.
        rest = 0 if self.own_segment else tokens % self.segment
        tape = Tape(pieces)
        tape.skip(tokens - rest)
        kept = np.empty(rest, dtype=np.int64)
        tape.take(kept)
        return iter([kept.astype(np.int32)]), rest


def _recalled(base: Any, tokenizer: PreTrainedTokenizerBase, window: int) -> BatchReader:
    return RecalledReader(base, tokenizer)


# Those that read with the base model alone, and those that read with the memory.
BASE_ALONE: dict[str, Callable[[Any, PreTrainedTokenizerBase, int], BatchReader]] = {
    "last-tokens": _last,
    "full": _whole,
    "window": WindowReader,
    "retrieval": _recalled,
    "chunks": ChunksReader,
}
WITH_MEMORY: dict[str, type[MemoryReader]] = {
    "twice": TwiceReader,
    "question-first": QuestionFirstReader,
    "passages": PassagesReader,
    "reread": RereadReader,
    "silenced": SilencedReader,
}
# Those that read what an index recalls.
RECALLING = ("retrieval", "passages", "reread")
BASELINES = (*BASE_ALONE, *WITH_MEMORY)
WINDOWED = ("last-tokens", "window", "chunks")
