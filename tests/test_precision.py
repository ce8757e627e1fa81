"""Memories in float32 on a base in half precision: what is learnt stays, and costs no speed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from memlm import MemLMConfig, MemLMForCausalLM, MemoryState
from memlm.memory import memory_class
from tests.cases import (
    A_SITE_EACH,
    CASES,
    SEGMENT,
    by_default,
    memory_model,
    randomise,
    tokens,
)
from tests.written.make import base_for

WRITTEN = Path(__file__).parent / "written" / "0.1"
half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# The base's dtype, and whether the caller has an autocast of their own.
SETTINGS = [(memory, torch.bfloat16, False) for memory in CASES]
SETTINGS += [
    pytest.param(memory, dtype, True, marks=() if memory == "armt" else pytest.mark.slow)
    for memory in CASES
    for dtype in (torch.bfloat16, torch.float32)
]


def half_model(memory: object, dtype: torch.dtype = torch.bfloat16, **kwargs: object):
    """A memory with nothing at zero on a base in half precision."""
    model = MemLMForCausalLM.from_base(
        base_for(memory, dtype), memory=CASES.get(memory, memory), segment_length=SEGMENT, **kwargs
    )
    with torch.no_grad():
        # Weights of ordinary size: this is about rounding, not about a chaotic network.
        for parameter in model.base.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.4)
    randomise(model.memory, std=0.1)
    return model.eval()


def dtypes(module: torch.nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters()}


@pytest.mark.parametrize(
    ("dtype", "memories"),
    [
        (torch.bfloat16, tuple(CASES)),
        (torch.float16, A_SITE_EACH),
        pytest.param(torch.float16, tuple(CASES), marks=pytest.mark.slow),
    ],
)
def test_parameters_are_float32_on_a_base_in_half_precision(
    dtype: torch.dtype, memories: tuple[str, ...]
) -> None:
    for memory in memories:
        model = half_model(memory, dtype)
        assert dtypes(model.memory) <= {torch.float32}, memory
        assert dtypes(model.base) == {dtype} and model.dtype == dtype
    kept = half_model("armt", dtype, memory_dtype="base")
    assert dtypes(kept.memory) == {dtype}
    with pytest.raises(ValueError, match=r"memory_dtype='bfloat16'.*'float32' or 'base'"):
        half_model("armt", dtype, memory_dtype="bfloat16")


def test_a_wider_base_has_memories_as_wide() -> None:
    assert dtypes(memory_model("llama", "armt").memory) == {torch.float64}


def test_a_small_learning_rate_moves_every_weight() -> None:
    model, ids = half_model("armt").train(), tokens(2, 3 * SEGMENT)
    query = model.memory.attached["armt"].cells["0"].query.weight
    before = query.detach().clone()
    optimizer = torch.optim.AdamW(model.memory.parameters(), lr=1e-5)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert (query != before).float().mean() > 0.99


@pytest.mark.parametrize(("memory", "dtype", "autocast"), SETTINGS)
def test_gradients_and_states_are_those_of_a_wide_model(
    memory: str, dtype: torch.dtype, autocast: bool
) -> None:
    model, ids = half_model(memory, dtype).train(), tokens(2, 3 * SEGMENT)
    wide = MemLMForCausalLM.from_base(
        base_for(memory, torch.float64), memory=CASES[memory], segment_length=SEGMENT
    ).train()
    wide.load_state_dict(model.state_dict())
    exact = wide(ids, labels=ids, logits_to_keep=0)
    exact.loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = model(ids, labels=ids, logits_to_keep=0)
    out.loss.backward()
    assert (out.logits - exact.logits).abs().mean() < 0.05 * exact.logits.abs().mean()
    start = model.init_state(2)
    for name, tensor in out.memory_state.tensors.items():
        assert tensor.dtype == start[name].dtype, name
        if not memory_class(memory).accumulates and tensor.ndim > 2 and tensor.numel():
            # A cache in float32 would be twice as large.
            assert tensor.dtype == dtype, name
    expected = {name: p.grad for name, p in wide.memory.named_parameters()}
    largest = max((grad.norm() for grad in expected.values()), default=0)
    for name, parameter in model.memory.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        if expected[name].norm() > 1e-3 * largest:
            a, b = parameter.grad.double().flatten(), expected[name].flatten()
            assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.8, name


# Their base reads more than the segment's own positions: some processors round a longer product otherwise.
LONGER = {"armt", "fam", "memory-prompt", "transformer-xl"}


@torch.no_grad()
def test_a_memory_that_says_nothing_leaves_the_base_to_the_bit() -> None:
    ids = tokens(2, SEGMENT)
    for memory in CASES:
        if memory_class(memory).neutral:
            plain_base = base_for(memory, torch.bfloat16)
            plain = plain_base(ids).logits
            model = MemLMForCausalLM.from_base(
                plain_base, memory=CASES[memory], segment_length=SEGMENT
            )
            logits = model(ids).logits
            if memory in LONGER:
                torch.testing.assert_close(logits, plain, rtol=2**-6, atol=2**-6)
            else:
                assert torch.equal(logits, plain), memory


# All memories have their parameters in float32 (above), and all are saved and loaded in the laws.
@pytest.mark.parametrize("memory", by_default(CASES, A_SITE_EACH))
@torch.no_grad()
def test_files_keep_each_precision(memory: str, tmp_path) -> None:
    model, ids = half_model(memory), tokens(2, 2 * SEGMENT)
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert dtypes(loaded.memory) <= {torch.float32} and dtypes(loaded.base) == {torch.bfloat16}
    assert torch.equal(loaded(ids).logits, expected)
    model.save_memory(tmp_path / "memory")
    other = half_model(memory)
    randomise(other.memory, seed=9)
    other.load_memory(tmp_path / "memory")
    assert torch.equal(other(ids).logits, expected)


def test_a_missing_memory_is_made_in_float32(tmp_path) -> None:
    """A checkpoint without the memory's weights: transformers makes them, in its own dtype if let."""
    half_model("none").save_pretrained(tmp_path)
    config = MemLMConfig.from_pretrained(tmp_path)
    config.memory = [{"name": "armt"}]
    model = MemLMForCausalLM.from_pretrained(tmp_path, config=config)
    assert dtypes(model.memory) == {torch.float32} and dtypes(model.base) == {torch.bfloat16}


def test_a_file_of_the_first_version_keeps_its_precision() -> None:
    folder = WRITTEN / "armt-bfloat16" / "model"
    old = AutoModelForCausalLM.from_pretrained(folder)
    assert old.config.memory_dtype == "base" and dtypes(old.memory) == {torch.bfloat16}
    new = AutoModelForCausalLM.from_pretrained(folder, memory_dtype="float32")
    assert dtypes(new.memory) == {torch.float32} and dtypes(new.base) == {torch.bfloat16}
    assert MemLMConfig().memory_dtype == "float32"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_state_kept_in_half_precision_is_computed_with_as_any_other(dtype: torch.dtype) -> None:
    """It is admitted in the numbers of its model, and not in those in which it was kept."""
    for memory in CASES:
        half = dtype == torch.bfloat16
        model = half_model(memory) if half else memory_model("llama", memory).float()
        ids = tokens(2, 3 * SEGMENT)
        state = model(ids, logits_to_keep=None).memory_state
        kept = state.to(dtype=torch.bfloat16)
        # What the caller would have to do otherwise: each tensor in the numbers that it had.
        numbers = {name: value.dtype for name, value in state.tensors.items()}
        own = {name: value.to(numbers[name]) for name, value in kept.tensors.items()}
        back = MemoryState(own, state.batch_size, state.signature)
        found, expected = (model(ids, memory_state=one) for one in (kept, back))
        assert torch.equal(found.logits, expected.logits), memory
        for name, value in expected.memory_state.tensors.items():
            assert found.memory_state[name].dtype == value.dtype, (memory, name)
