"""Bases whose weights are stored as integers: what is found by trying, LoRA, and files."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memlm import MemLMForCausalLM
from tests.cases import (
    A_SITE_EACH,
    CASES,
    SEGMENT,
    base_model,
    randomise,
    standing,
    tokens,
)

KINDS = (*A_SITE_EACH, "transformer-xl", "memoryllm")


class Int8Linear(nn.Linear):
    """A linear layer stored in int8, one scale per output, as quantisers make it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, "meta")
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), False)
        self.bias = linear.bias
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)
        return F.linear(x, weight, self.bias)

    def plain(self) -> nn.Linear:
        """The same layer with its weights as numbers."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear.weight = nn.Parameter(self.weight.to(self.scale.dtype) * self.scale)
        linear.bias = self.bias
        return linear


def exchange(base: nn.Module, make) -> nn.Module:
    """Every linear layer of the decoder as `make` makes it."""
    for name, module in list(base.get_decoder().named_modules()):
        if isinstance(module, nn.Linear):
            base.get_decoder().set_submodule(name, make(module))
    return base


def quantised(family: str = "llama", dtype: torch.dtype = torch.float64) -> nn.Module:
    return exchange(base_model(family).to(dtype), Int8Linear)


def with_memory(base: nn.Module, memory: str) -> MemLMForCausalLM:
    torch.manual_seed(3)
    model = MemLMForCausalLM.from_base(base, memory=CASES[memory], segment_length=SEGMENT)
    randomise(model.memory, std=0.1)
    return model.eval()


# A memory sees what a layer computes and not its weights; how keys are turned is found by trying them.
BASES = [("llama", memory) for memory in CASES]
BASES += [("qwen3", "infini"), ("qwen3", "transformer-xl")]


@pytest.mark.parametrize(
    ("family", "memory"),
    [
        pytest.param(*base, marks=() if base[1] in KINDS else pytest.mark.slow, id="-".join(base))
        for base in BASES
    ],
)
@torch.no_grad()
def test_a_quantised_base_gives_what_its_numbers_give(family: str, memory: str) -> None:
    family, ids = standing(memory, family), tokens(2, 3 * SEGMENT + 2)
    found = with_memory(quantised(family), memory)(ids).logits
    plain = exchange(quantised(family), Int8Linear.plain)
    expected = with_memory(plain, memory)(ids).logits
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-9)


def test_a_trial_that_sees_nothing_is_no_answer() -> None:
    base = base_model("llama")
    with torch.no_grad():
        base.model.layers[1].self_attn.k_proj.weight.zero_()
    with pytest.raises(ValueError, match=r"layer 1 .*queries or keys are zero"):
        with_memory(base, "infini")


@pytest.mark.parametrize("memory", ["armt", "infini"])
def test_memory_and_adapters_train_on_a_quantised_base(memory: str) -> None:
    from peft import LoraConfig, get_peft_model

    model, ids = with_memory(quantised(dtype=torch.bfloat16), memory), tokens(2, 3 * SEGMENT)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["memory"], task_type="CAUSAL_LM"
    )
    lora = get_peft_model(model, config).train()
    stored = {n: p.clone() for n, p in lora.named_parameters() if p.dtype == torch.int8}
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = lora(ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    moved = [n for n, p in lora.named_parameters() if p.grad is not None and p.grad.any()]
    assert any("lora_B" in n for n in moved) and any("memory" in n for n in moved)
    assert losses[-1] < losses[0]
    assert stored and all(torch.equal(lora.get_parameter(n), p) for n, p in stored.items())


def test_a_quantised_base_is_not_written_as_if_it_were_plain(tmp_path) -> None:
    """Read again into plain layers, integers would be taken for weights."""
    model, ids = with_memory(quantised(), "armt"), tokens(1, 2 * SEGMENT)
    with pytest.raises(ValueError, match=r"base=LlamaForCausalLM is quantised.*save_memory"):
        model.save_pretrained(tmp_path / "model")
    model.save_memory(tmp_path / "memory")
    other = with_memory(quantised(), "armt")
    randomise(other.memory)
    other.load_memory(tmp_path / "memory")
    assert torch.equal(other(ids).logits, model(ids).logits)
