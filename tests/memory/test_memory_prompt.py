"""MemoryPrompt against torch's LSTM around plain transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memlm.memory import MemoryPromptConfig
from memlm.modeling import MemLMForCausalLM
from tests.cases import FAMILIES, SEGMENT, base_model, memory_model, randomise, tokens

P, SIZE = 3, 7
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
CONFIG = MemoryPromptConfig(num_memory_tokens=P, mlp_size=SIZE)


def model_of(family: str) -> MemLMForCausalLM:
    window = {"sliding_window": 64} if family == "gemma3_text" else {}
    base = base_model(family, **window)
    model = MemLMForCausalLM.from_base(base, memory=CONFIG, segment_length=SEGMENT)
    randomise(model.memory)
    return model


def lstm_of(cell) -> nn.LSTM:
    """torch's LSTM with the weights of the memory."""
    width = P * cell.dims.embedding_size
    lstm = nn.LSTM(SIZE, width).double()
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(cell.gates.weight[:, :SIZE])
        lstm.weight_hh_l0.copy_(cell.gates.weight[:, SIZE:])
        lstm.bias_ih_l0.copy_(cell.gates.bias)
        lstm.bias_hh_l0.zero_()
    return lstm


def by_hand(model: MemLMForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of one document (1, N), and the prompt behind it."""
    base, cell = model.base, model.memory.attached["memory-prompt"].cells["model"]
    lstm, past, prompt, logits = lstm_of(cell), None, None, []
    for segment in ids.split(SEGMENT, dim=1):
        x = base.get_input_embeddings()(segment)
        front = 0 if prompt is None else P
        x = x if prompt is None else torch.cat([prompt, x], 1)
        plain = base(inputs_embeds=x, use_cache=False, output_hidden_states=True)
        logits.append(plain.logits[:, front:])
        seen = nn.functional.linear(plain.hidden_states[-1][:, -1], cell.enter.weight)
        seen = cell.leave((seen + cell.enter.bias).relu())
        out, past = lstm(seen.unsqueeze(0), past)
        prompt = out[0].unflatten(1, (P, -1))
    return torch.cat(logits, 1), prompt


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_an_lstm_behind_each_segment(family: str) -> None:
    model, ids = model_of(family), tokens(2, 3 * SEGMENT + 2)
    expected, prompt = by_hand(model, ids)
    out = model(ids)
    torch.testing.assert_close(out.logits, expected, **CLOSE)
    hidden = out.memory_state["memory-prompt.hidden"].unflatten(1, (P, -1))
    torch.testing.assert_close(hidden, prompt, **CLOSE)


@torch.no_grad()
def test_the_last_token_is_the_last_real_one() -> None:
    model = model_of("llama")
    cell = model.memory.attached["memory-prompt"].cells["model"]
    y = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    real = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 1, 1, 1]]).bool()
    state = cell.write(y, cell.init_state(2), real)
    for row, last in enumerate((2, 4)):
        alone = y[row : row + 1, last : last + 1]
        expected = cell.write(alone, cell.init_state(1), torch.ones(1, 1, dtype=torch.bool))
        torch.testing.assert_close(state.hidden[row], expected.hidden[0], **CLOSE)


def test_gradients_equal_those_by_hand() -> None:
    model, ids = model_of("llama"), tokens(2, 3 * SEGMENT)
    cell = model.memory.attached["memory-prompt"].cells["model"]
    found = torch.autograd.grad(model(ids).logits.sin().sum(), [cell.enter.weight, cell.leave.bias])
    expected = torch.autograd.grad(
        by_hand(model, ids)[0].sin().sum(), [cell.enter.weight, cell.leave.bias]
    )
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_starts_as_published() -> None:
    base = base_model("llama")
    model = MemLMForCausalLM.from_base(base, memory=CONFIG, segment_length=SEGMENT)
    cell = model.memory.attached["memory-prompt"].cells["model"]
    assert cell.enter.weight.abs().max() < 1e-4 and not cell.leave.bias.any()
    bound = (P * base.config.hidden_size) ** -0.5
    assert 0.9 * bound < cell.gates.weight.abs().max() <= bound
    assert MemoryPromptConfig.paper().mlp_size == 1024


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": (0,)}, "layers=\\(0,\\) has no meaning for memory-prompt"),
        ({"num_memory_tokens": 0}, "num_memory_tokens=0 must be at least 1"),
        ({"mlp_size": 0}, "mlp_size=0 must be at least 1"),
        ({"mlp_gain": 0.0}, "mlp_gain=0.0 must be above 0"),
        ({"num_memory_tokens": 59}, "segment_length=6 with 59 memory positions is too large"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        memory_model("llama", MemoryPromptConfig(**options))
