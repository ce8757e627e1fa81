"""What a call of the model gives, and what stands for the logits that nobody asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from memlm.state import MemoryState


@dataclass
class MemLMOutput(ModelOutput):
    """What a call gives.

    loss: () mean cross-entropy, and in training the auxiliary loss. logits (B, N, V) where asked; a
    `LogitsNotMade` where labels alone were. memory_state: behind the last segment, a row per document.
    auxiliary_loss: () what the memories ask for in training besides (`Memory.auxiliary_loss`), a mean over
    the call's real segments, rows and each memory's layers, as it stands in `loss`; there without labels
    too; None when they ask for nothing. The router loss of a base with experts that is configured for one
    (`output_router_logits`) is in it as well.
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
    """Trainers that gather predictions refuse what is no tensor by naming its class, and so the remedy."""

    def __repr__(cls) -> str:
        return f"{cls.__name__}: {_NOT_MADE}"


class LogitsNotMade(metaclass=_Telling):
    """What stands for logits that nobody asked for: whoever uses them is told how to ask."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(_NOT_MADE)

    __getitem__ = __iter__ = __len__ = __array__ = _refuse

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_NOT_MADE)
