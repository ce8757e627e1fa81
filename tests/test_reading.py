"""What is computed of a document that is only read: nothing above the last memory, if nobody watches."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from memlm import MemLMForCausalLM
from memlm.memory import ARMTConfig, GatedDeltaConfig, MemoryConfig, TitansMALConfig
from memlm.segment import cut
from tests.cases import SEGMENT, memory_model, tokens

Count = Callable[[MemLMForCausalLM], tuple[int, int]]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Count:
    """How often attentions and MLPs run while two segments are read."""
    seen = {LlamaAttention: 0, LlamaMLP: 0}

    def counted(kind: type[torch.nn.Module]) -> Callable[..., object]:
        run = kind.forward

        @wraps(run)
        def forward(*args: object, **kwargs: object) -> object:
            seen[kind] += 1
            return run(*args, **kwargs)

        return forward

    for kind in seen:
        monkeypatch.setattr(kind, "forward", counted(kind))

    def count(model: MemLMForCausalLM) -> tuple[int, int]:
        seen.update(dict.fromkeys(seen, 0))
        model.read(cut(tokens(1, 2 * SEGMENT), None, None, SEGMENT))
        return seen[LlamaAttention], seen[LlamaMLP]

    return count


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        # Two layers, two segments. A branch beside an attention writes without it; ARMT writes what its
        # layer made of memory tokens; MAL writes before its layer.
        (GatedDeltaConfig(layers=(0,)), (0, 0)),
        (GatedDeltaConfig(layers=(1,)), (2, 2)),
        (ARMTConfig(layers=(0,)), (2, 2)),
        (ARMTConfig(), (4, 4)),
        (TitansMALConfig(layers=(1,)), (2, 2)),
        ("rmt", (4, 4)),
        ("none", (4, 4)),
    ],
)
def test_layers_above_the_last_memory_rest(
    memory: MemoryConfig | str, expected: tuple[int, int], runs: Count
) -> None:
    assert runs(memory_model("llama", memory)) == expected


def test_logits_and_losses_need_every_layer(runs: Count) -> None:
    model, ids = memory_model("llama", GatedDeltaConfig(layers=(0,))), tokens(1, 2 * SEGMENT)
    with torch.no_grad():
        assert model(ids).logits.shape[1] == 2 * SEGMENT
        assert model(ids, labels=ids).loss.isfinite()


def test_layers_run_where_somebody_watches_them(runs: Count) -> None:
    model = memory_model("llama", GatedDeltaConfig(layers=(0,)))
    handle = model.base.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert runs(model) == (4, 4)
    handle.remove()
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert runs(model) == (4, 4)
    everywhere.remove()
    assert runs(model) == (0, 0)
    assert runs(model.train()) == (4, 4)
