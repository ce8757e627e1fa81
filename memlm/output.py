"""What a call of the model returns, and what stands in for logits that nobody asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from memlm.state import MemoryState


@dataclass
class MemLMOutput(ModelOutput):
    """What a call returns.

    loss: () mean cross-entropy, plus the auxiliary loss in training. logits (B, N, V) where asked for; a
    `LogitsNotMade` where only labels were given. memory_state: after the last segment, a row per document.
    auxiliary_loss: () what the memories add to the training loss (`Memory.auxiliary_loss`), a mean over
    the call's real segments, rows and each memory's layers, as it is part of `loss`; given without labels
    too, and None when they add nothing. It includes the router loss of a base with experts that is
    configured for one (`output_router_logits`).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    memory_state: MemoryState | None = None
    auxiliary_loss: Tensor | None = None


_NOT_MADE = (
    "logits were not made, since labels were given for more than one segment; set "
    "model.config.logits_with_labels=True, or call the model with logits_to_keep=0, for all of them"
)


class _Telling(type):
    """Trainers that gather predictions name the class of a non-tensor they refuse: it is the remedy."""

    def __repr__(cls) -> str:
        return f"{cls.__name__}: {_NOT_MADE}"


class LogitsNotMade(metaclass=_Telling):
    """Stands in for logits that nobody asked for: whoever uses them is told how to ask."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(_NOT_MADE)

    __getitem__ = __iter__ = __len__ = __array__ = _refuse

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_NOT_MADE)
