"""With recomputation a longer document takes the states at its further borders, and nothing else."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from memlm import MemLMForCausalLM
from memlm.memory import GatedDeltaConfig, MemoryConfig, TransformerXLConfig
from tests.cases import SEGMENT, base_model, memory_model, randomise, tokens


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are held, made within it, and the most of them at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = call(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or not size:
            return
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)

        def gone() -> None:
            self.known.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)


@pytest.mark.parametrize("name", ["armt", "rmt"])
def test_each_further_segment_takes_its_state(name: str) -> None:
    model = memory_model("llama", name).train()
    model.gradient_checkpointing_enable()
    most = {}
    for count in (4, 12):
        ids = tokens(1, count * SEGMENT)
        model.zero_grad(set_to_none=True)
        with Live() as live:
            model(ids, labels=ids).loss.backward()
        most[count] = live.most
    state, each = model.init_state(1).nbytes, (most[12] - most[4]) / 8
    # Beside it torch keeps its random state of 5 kB; ids, losses and counts are some hundred bytes.
    assert state < each < state + torch.get_rng_state().nbytes + 1024


@pytest.mark.parametrize("schedule", ["sequential", "wavefront"])
def test_what_transformers_hands_over_recomputes(schedule: str) -> None:
    """Its function may hold what is kept on the host, as `offload=True` asks of it."""
    model, ids = memory_model("llama", "armt").train(), tokens(1, 3 * SEGMENT)
    model.config.schedule = schedule
    ran = []

    def counted(*arguments: Any, **options: Any) -> Any:
        ran.append((arguments[0].__name__, options))
        return checkpoint(*arguments, **options)

    loss = model(ids, labels=ids).loss
    expected = torch.autograd.grad(loss, model.memory.parameters(), allow_unused=True)
    # As `activation_checkpointing_enable(..., offload=True)` does on an accelerator.
    model._set_gradient_checkpointing(True, partial(counted, use_reentrant=True))
    loss = model(ids, labels=ids).loss
    assert all(options == {"use_reentrant": False} for _, options in ran)
    # The wavefront's losses too, or the logits of every segment would be held.
    whole = {"sequential": {"step"}, "wavefront": {"cells", "loss_of"}}
    assert {name for name, _ in ran} == whole[schedule]
    found = torch.autograd.grad(loss, model.memory.parameters(), allow_unused=True)
    torch.testing.assert_close(found, expected)


def test_a_share_of_the_layers_is_refused() -> None:
    model = memory_model("llama", "armt").train()
    if not hasattr(model, "activation_checkpointing_enable"):
        pytest.skip("this release of transformers has no such option")
    with pytest.raises(ValueError, match="every_n_layers=2 is not for a memory model"):
        model.activation_checkpointing_enable(every_n_layers=2)
    assert not model.gradient_checkpointing
    model.activation_checkpointing_enable()
    assert model.gradient_checkpointing
    model.activation_checkpointing_disable()
    assert not model.gradient_checkpointing


@pytest.mark.parametrize(
    ("memory", "schedule"),
    [
        (GatedDeltaConfig(read_dropout=0.5, output_std=0.5), "sequential"),
        (GatedDeltaConfig(read_dropout=0.5, output_std=0.5), "wavefront"),
        (TransformerXLConfig(memory_length=SEGMENT, read_dropout=0.5), "sequential"),
        (TransformerXLConfig(memory_length=SEGMENT, read_dropout=0.5), "wavefront"),
    ],
)
def test_recomputing_drops_the_same_rows_again(memory: MemoryConfig, schedule: str) -> None:
    found = []
    for again in (False, True):
        model = MemLMForCausalLM.from_base(
            base_model("llama"), memory=memory, segment_length=SEGMENT, schedule=schedule
        ).train()
        randomise(model.memory)
        if again:
            model.gradient_checkpointing_enable()
        ids = tokens(4, 3 * SEGMENT)
        torch.manual_seed(0)
        model(ids, labels=ids).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0.0, atol=1e-9)
