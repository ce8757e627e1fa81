"""RMT against the paper's recurrence, through plain transformers."""

from __future__ import annotations

import pytest
import torch

from memlm.memory import RMTConfig
from memlm.modeling import MemLMForCausalLM
from tests.cases import FAMILIES, SEGMENT, base_model, randomise, tokens

M = 3


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_memory_tokens_around_each_segment(family: str) -> None:
    base = base_model(family, **({"sliding_window": 64} if family == "gemma3_text" else {}))
    model = MemLMForCausalLM.from_base(
        base, memory=RMTConfig(num_memory_tokens=M), segment_length=SEGMENT
    )
    randomise(model.memory)
    ids = tokens(2, 3 * SEGMENT + 2)
    memory = model.memory.attached["rmt"].cells["model"].initial_memory.expand(2, -1, -1)
    logits = []
    for segment in ids.split(SEGMENT, dim=1):
        length = segment.shape[1]
        x = torch.cat([memory, base.get_input_embeddings()(segment), memory], 1)
        plain = base(inputs_embeds=x, use_cache=False, output_hidden_states=True)
        logits.append(plain.logits[:, M : M + length])
        memory = plain.hidden_states[-1][:, -M:]
    out = model(ids)
    torch.testing.assert_close(out.logits, torch.cat(logits, 1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.memory_state["rmt.memory"], memory, rtol=1e-9, atol=1e-9)


def test_a_window_shorter_than_segment_and_memory_is_refused() -> None:
    base = base_model("mistral", sliding_window=8)
    with pytest.raises(ValueError, match="sliding window of 8"):
        MemLMForCausalLM.from_base(base, RMTConfig(num_memory_tokens=2), segment_length=6)
    MemLMForCausalLM.from_base(base, RMTConfig(num_memory_tokens=1), segment_length=6)


def test_layers_have_no_meaning() -> None:
    with pytest.raises(ValueError, match="layers="):
        MemLMForCausalLM.from_base(base_model("llama"), RMTConfig(layers=(0,)), segment_length=8)


def test_embeddings_of_another_size_are_refused() -> None:
    base = base_model("opt", word_embed_proj_dim=16)
    with pytest.raises(ValueError, match="memory='armt'"):
        MemLMForCausalLM.from_base(base, "rmt", segment_length=8)
    MemLMForCausalLM.from_base(base, "armt", segment_length=8)
