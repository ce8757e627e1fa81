"""Another attention implementation, set while memories stand in the attention."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from memlm import MemLMForCausalLM
from memlm.memory import memory_class
from tests.cases import CASES, SEGMENT, memory_model, tokens

INSIDE = [name for name in CASES if memory_class(name).site in ("heads", "attention")]
# The eager attention takes its softmax in float32.
CLOSE = {"rtol": 0.0, "atol": 1e-4}


# Beside the softmax, in front of its keys, with its scores, around its module, keys that are looked up.
KINDS = ("infini", "transformer-xl", "tova", "titans-mac", "knn")


@pytest.mark.parametrize(
    ("memory", "whose"),
    [
        *(
            pytest.param(memory, "base", marks=() if memory in KINDS else pytest.mark.slow)
            for memory in INSIDE
        ),
        ("infini", "wrapper"),
        ("infini", "decoder"),
    ],
)
@torch.no_grad()
def test_memories_stay_at_work(memory: str, whose: str) -> None:
    model, ids = memory_model("llama", memory), tokens(2, 2 * SEGMENT + 2)
    expected = model(ids)
    asked = {"wrapper": model, "base": model.base, "decoder": model.base.get_decoder()}[whose]
    for implementation in ("eager", "sdpa"):
        asked.set_attn_implementation(implementation)
        out = model(ids)
        torch.testing.assert_close(out.logits, expected.logits, **CLOSE)
        for name, tensor in out.memory_state.tensors.items():
            torch.testing.assert_close(tensor, expected.memory_state[name], **CLOSE)
        assert model.base.config._attn_implementation.endswith(implementation)


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
@torch.no_grad()
def test_other_families_too(family: str) -> None:
    over = {"sliding_window": 64} if family == "gemma3_text" else {}
    model, ids = memory_model(family, "transformer-xl", **over), tokens(1, 3 * SEGMENT)
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


@pytest.fixture
def without_query_masks() -> str:
    """An implementation that, like flash attention, is given no mask for each query."""
    AttentionInterface.register("varlen_like", sdpa_attention_forward)
    AttentionMaskInterface.register("varlen_like", flash_attention_mask)
    return "varlen_like"


@pytest.mark.parametrize("whose", ["wrapper", "base"])
@torch.no_grad()
def test_one_that_a_memory_cannot_work_with_is_refused(whose: str, without_query_masks) -> None:
    model, ids = memory_model("llama", "transformer-xl"), tokens(1, 3 * SEGMENT)
    expected = model(ids).logits
    refused = pytest.raises(ValueError, match=r"attn_implementation='varlen_like'.*'sdpa'")
    if whose == "wrapper":
        with refused:
            model.set_attn_implementation(without_query_masks)
        # What was refused has changed nothing.
        assert model.config._attn_implementation == "sdpa"
    else:
        model.base.set_attn_implementation(without_query_masks)
        for _ in range(2):
            with refused:
                model(ids)
        model.base.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


@torch.no_grad()
def test_what_is_saved_is_an_implementation_others_know(tmp_path) -> None:
    model, ids = memory_model("llama", "infini"), tokens(1, 3 * SEGMENT)
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    loaded = MemLMForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(loaded(ids).logits, expected, **CLOSE)
    eager = MemLMForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    torch.testing.assert_close(eager(ids).logits, expected, **CLOSE)
    assert eager.base.config._attn_implementation == "memlm_eager"
