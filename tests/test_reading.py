"""What is computed of a document that is only read: nothing above the last memory, if nobody watches."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from memlm import MemLMForCausalLM
from memlm.memory import (
    ARMTConfig,
    GatedDeltaConfig,
    GatedDeltaHeadsConfig,
    LaCTConfig,
    MemoryCachingConfig,
    MemoryConfig,
    MoMConfig,
    TitansMALConfig,
    memory_class,
    name_of,
)
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


SKIPPING = {
    "gated-delta": GatedDeltaConfig(write_gate="hard", conv_size=4, num_heads=2),
    "gated-delta-without-convolutions": GatedDeltaConfig(
        write_gate="hard", conv_size=0, num_heads=2
    ),
    "gated-delta-heads": GatedDeltaHeadsConfig(write_gate="hard"),
    "lact": LaCTConfig(write_gate="hard"),
    "memory-caching": MemoryCachingConfig(write_gate="hard", num_slots=4, num_heads=2),
    "mom": MoMConfig(write_gate="hard", num_heads=2),
}


@pytest.mark.parametrize("name", SKIPPING)
@torch.no_grad()
def test_silent_segments_leave_the_same_state_when_only_read(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SKIPPING[name]
    model, ids = memory_model("llama", config), tokens(2, 3 * SEGMENT)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, -2:] = False
    start = model(ids).memory_state
    model.set_memory_options(write_threshold=float("inf"))
    with monkeypatch.context() as patch:
        patch.setattr("memlm.backbone.silence.may_skip", lambda *_: False)
        run = model(ids, attention_mask=mask, memory_state=start).memory_state
    read = model.read(cut(ids, mask, None, SEGMENT), start)
    assert run.tensors.keys() == read.tensors.keys()
    for leaf, value in run.tensors.items():
        torch.testing.assert_close(read[leaf], value, rtol=0, atol=1e-12, msg=leaf)
    lasting = [
        n for n in run.tensors if not set(n.split(".")) & memory_class(name_of(config)).transient
    ]
    assert lasting and all(torch.equal(read[n], start[n]) for n in lasting)
