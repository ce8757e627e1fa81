"""A segment in which nothing is written is read alone; skipping the rest changes nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from memlm import MemoryState
from memlm.backbone import silence
from memlm.memory import available_memories, memory_class
from memlm.memory.base import MemoryConfig
from memlm.memory.parts.gates import GatedMemory
from memlm.modeling import MemLMForCausalLM
from tests.cases import CASES, SEGMENT, base_model, memory_model, randomise, tokens

# Those that know their gates before most of their work is done.
SKIPPING = [
    name
    for name in available_memories()
    if name != "none"
    and getattr(memory_class(name), "gates_of", None) != GatedMemory.gates_of
    and issubclass(memory_class(name), GatedMemory)
]
VARIANTS = {
    **{name: CASES[name] for name in SKIPPING},
    "steps": replace(CASES["gated-delta"], householder_steps=2, rule="kda"),
    "turning": replace(
        CASES["gated-delta"], rule="delta", negative_eigenvalues=True, key_map="product"
    ),
    "long tails": replace(CASES["gated-delta"], conv_size=SEGMENT + 3, rule="kaczmarz"),
    "no tails": replace(CASES["gated-delta"], conv_size=0, rule="gla"),
    "no decay": replace(CASES["gated-delta-heads"], decays=False, erases=False),
    "momentum and norms": replace(CASES["lact"], momentum=False, norm="pre"),
    "means": replace(CASES["memory-caching"], summary="mean", read="gated"),
    "continuing": replace(CASES["memory-caching"], continuing=True),
    "residual": replace(CASES["memory-caching"], read="residual", conv_size=0),
    "soup": replace(CASES["memory-caching"], read="soup"),
}


@pytest.fixture
def skipped(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a memory was run in full ("full") and how often it was read alone ("silent")."""
    found: Counter[str] = Counter()
    run = silence.run_memory

    def counted(memory, *args, **kwargs):
        before = found["silent"]
        out = run(memory, *args, **kwargs)
        found["full"] += found["silent"] == before
        return out

    for name in SKIPPING:
        cls = memory_class(name)

        def alone(self, *args, cls=cls, original=cls.forward_silent, **kwargs):
            found["silent"] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, "forward_silent", alone)
    monkeypatch.setattr("memlm.backbone.run.run_memory", counted)
    return found


def sparse_model(config: MemoryConfig) -> tuple[MemLMForCausalLM, torch.Tensor, torch.Tensor]:
    """A model, and a ragged batch of which some segments are silent in all rows, and some in one alone."""
    ids, mask = tokens(3, 7 * SEGMENT), torch.ones(3, 7 * SEGMENT, dtype=torch.bool)
    mask[1, 5 * SEGMENT + 2 :] = False
    mask[2, 3::4] = False
    model = memory_model("llama", config)
    opened = []
    with torch.no_grad():
        state = None
        for part, real in zip(ids.split(SEGMENT, 1), mask.split(SEGMENT, 1), strict=True):
            state = model(part, attention_mask=real, memory_state=state).memory_state
            opened.append(gates_in(state))
    # Of the three rows the largest decides, so that about half of the segments are silent.
    level = torch.stack(opened).amax(dim=-1).median()
    model.set_memory_options(write_threshold=float(level))
    return model, ids, mask


def gates_in(state: MemoryState) -> torch.Tensor:
    """(layers, B) the largest gates of the last segment."""
    return torch.stack([v for n, v in state.tensors.items() if n.endswith(".opened")])


def read(
    model: MemLMForCausalLM, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[list[torch.Tensor], list[MemoryState]]:
    logits, states, state = [], [], None
    for part, real in zip(ids.split(SEGMENT, 1), mask.split(SEGMENT, 1), strict=True):
        out = model(part, attention_mask=real, memory_state=state)
        state = out.memory_state
        logits.append(out.logits[real])
        states.append(state)
    return logits, states


def test_memories_that_tell_their_gates_early() -> None:
    assert SKIPPING == ["gated-delta", "gated-delta-heads", "lact", "memory-caching", "mom"]


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(
            name,
            marks=()
            if name in (*CASES, "steps", "turning", "long tails", "continuing")
            else pytest.mark.slow,
        )
        for name in VARIANTS
    ],
)
@torch.no_grad()
def test_skipping_changes_nothing(
    variant: str, skipped: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, mask = sparse_model(VARIANTS[variant])
    skipped.clear()
    logits, states = read(model, ids, mask)
    assert skipped["silent"] > 1 and skipped["full"] > 1
    gates = torch.stack([gates_in(state) for state in states])
    some = (gates > 0).any(dim=-1) & (gates == 0).any(dim=-1)
    assert some.any(), "no segment is silent in some rows alone"
    monkeypatch.setattr(silence, "may_skip", lambda memory, x: False)
    skipped.clear()
    expected, kept = read(model, ids, mask)
    assert skipped["silent"] == 0
    for got, wanted in zip(logits, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)
    transient = model.memory.attached[next(iter(model.memory.attached))].cells["0"].transient
    for got, wanted in zip(states, kept, strict=True):
        for name, value in wanted.tensors.items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-11, msg=name)
    # Where a memory is skipped, what it holds is the very tensor it was given.
    for (before, after), gate in zip(pairwise(states), gates[1:], strict=True):
        for layer in (gate == 0).all(dim=-1).nonzero().flatten().tolist():
            for name in before.tensors:
                parts = name.split(".")
                if parts[1] == str(layer) and not set(parts) & transient:
                    assert torch.equal(after[name], before[name]), name


@pytest.mark.parametrize("memory", SKIPPING)
def test_nothing_is_skipped_where_more_than_the_result_counts(
    memory: str, skipped: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = replace(CASES[memory], write_threshold=float("inf"), train_threshold=float("inf"))
    model, ids = memory_model("llama", silent), tokens(2, 2 * SEGMENT)

    def count(**options: bool) -> int:
        skipped.clear()
        model(ids, **options)
        assert skipped["silent"] + skipped["full"] == 4
        return skipped["silent"]

    assert count() == 0, "gradients"
    with torch.no_grad():
        assert count() == 4
        assert count(write=False) == 0
        model.train()
        assert count() == 0, "training"
        model.eval()
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            assert count() == 0, "torch.compile"
        hook = (
            next(iter(model.memory.attached.values()))
            .cells["0"]
            .register_forward_hook(lambda module, args, out: None)
        )
        assert count() == 2, "hooks"
        hook.remove()
        cell = next(iter(model.memory.attached.values())).cells["0"]
        assert silence.may_skip(cell, ids)
        model.set_memory_options(write_threshold=0.0)
        assert not silence.may_skip(cell, ids), "sigmoids are never zero"


@pytest.mark.parametrize("memory", SKIPPING)
@torch.no_grad()
def test_a_half_precision_base_is_skipped_alike(
    memory: str, skipped: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, ids = base_model("llama").to(torch.bfloat16), tokens(2, 2 * SEGMENT)
    model = MemLMForCausalLM.from_base(base, memory=CASES[memory], segment_length=SEGMENT).eval()
    randomise(model.memory, std=0.1)
    before = model(ids).memory_state
    model.set_memory_options(write_threshold=float("inf"))
    skipped.clear()
    found = model(ids, memory_state=before)
    assert skipped["silent"] == 4
    monkeypatch.setattr(silence, "may_skip", lambda memory, x: False)
    expected = model(ids, memory_state=before)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=0.03)
    assert found.logits.dtype == torch.bfloat16
    for name, value in expected.memory_state.tensors.items():
        assert found.memory_state[name].dtype == value.dtype
        torch.testing.assert_close(found.memory_state[name], value, rtol=0, atol=0.03)


@torch.no_grad()
def test_what_is_not_finite_is_not_silence(skipped: Counter[str]) -> None:
    model = memory_model("llama", replace(CASES["gated-delta"], write_gate="hard"))
    cell = model.memory.attached["gated-delta"].cells["1"]
    cell.b_proj.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="layer 1"):
        model(tokens(1, SEGMENT))
