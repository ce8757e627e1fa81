"""The model without its head, as trainers that compute losses of their own ask for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from memlm.output import MemLMOutput


def _as_they_are(hidden: Tensor) -> Tensor:
    return hidden


class Body:
    """What transformers calls `base_model`: the model without its head, memories included.

    forward: that of the memory model. Attributes are those of the model's `base`.
    """

    def __init__(self, model: PreTrainedModel, forward: Callable[..., Any]) -> None:
        self._model, self._forward = model, forward

    def __call__(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        kwargs |= {"logits_to_keep": 0, "head": _as_they_are}
        out: MemLMOutput = self._forward(*args, **kwargs)
        if out.auxiliary_loss is not None:
            raise ValueError(
                "this trainer takes hidden states and computes its own loss, without what the "
                "memories add to it (write_cost, reconstruction_weight) or the base's routers do "
                "(router_aux_loss_coef); set that to 0, or use memlm.train.MemLMTrainer"
            )
        return BaseModelOutput(last_hidden_state=out.logits)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model.base, name)
