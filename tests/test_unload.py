"""The base model is handed back as it was before it was wrapped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from memlm import MemLMForCausalLM
from memlm.eval.losses.measure import perplexity
from memlm.memory import memory_class
from memlm.tasks.haystack import Haystack
from tests.cases import CASES, SEGMENT, base_model, randomise, tokens
from tests.tokenizers import tokenizer


def nothing(*_: Any) -> None:
    """A hook of the user's."""


def described(base: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Everything wrapping could have changed."""
    yield str(base.config.to_dict()), base.config._attn_implementation
    yield base.get_decoder().config._attn_implementation, str(base.generation_config)
    for name, module in base.named_modules():
        yield name, type(module), sorted(vars(module)), module.training
        yield name, list(module._forward_hooks), list(module._forward_pre_hooks)
    for name, parameter in base.named_parameters():
        yield name, parameter.dtype, parameter.requires_grad, id(parameter)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("memory", ["armt", "infini", "rmt", "titans-mag", "none"])
def test_the_base_is_as_it_was(family: str, memory: str) -> None:
    base, ids = base_model(family), tokens(2, 12)
    base.get_decoder().register_forward_hook(nothing)
    with torch.no_grad():
        plain, before = base(ids).logits, list(described(base))
        model = MemLMForCausalLM.from_base(base, memory=CASES.get(memory, memory), segment_length=6)
        randomise(model.memory)
        model(ids)
        assert model.unload() is base
        assert list(described(base)) == before
        assert torch.equal(base(ids).logits, plain)
    with pytest.raises(RuntimeError, match=r"unloaded.*from_base"):
        model(ids)
    with pytest.raises(RuntimeError, match="unloaded"):
        model.generate(ids, max_new_tokens=1)
    again = MemLMForCausalLM.from_base(base, memory="armt", segment_length=6)
    assert again(ids).logits.isfinite().all()


@torch.no_grad()
def test_a_base_wrapped_twice_is_handed_back_in_turn() -> None:
    """What was wrapped when it came is wrapped when it goes."""
    base, ids = base_model("llama"), tokens(1, 2 * SEGMENT)
    plain = base(ids).logits
    outer = MemLMForCausalLM.from_base(base, memory="infini", segment_length=SEGMENT)
    randomise(outer.memory)
    expected = outer(ids).logits
    inner = MemLMForCausalLM.from_base(base, memory="transformer-xl", segment_length=SEGMENT)
    inner.unload()
    assert torch.equal(outer(ids).logits, expected)
    outer.unload()
    assert torch.equal(base(ids).logits, plain) and base.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_what_was_trained_and_set_stays(tmp_path) -> None:
    """The base's own weights, and an attention implementation set while it was wrapped."""
    base, ids = base_model("llama"), tokens(1, 2 * SEGMENT)
    model = MemLMForCausalLM.from_base(base, memory="infini", segment_length=SEGMENT)
    model.set_attn_implementation("eager")
    base.get_input_embeddings().weight.mul_(2)
    model.save_pretrained(tmp_path)
    found = model.unload()(ids).logits
    assert base.config._attn_implementation == "eager"
    loaded = MemLMForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).unload().eval()
    assert type(loaded) is type(base) and loaded.config._attn_implementation == "sdpa"
    torch.testing.assert_close(loaded(ids).logits, found, rtol=0, atol=1e-4)


def test_a_stage_that_was_wrapped_again_is_not_taken_away() -> None:
    base = base_model("llama")
    model = MemLMForCausalLM.from_base(base, memory="armt", segment_length=SEGMENT)
    layer = base.model.layers[1]
    layer.__class__ = type("Sharded", (type(layer),), {})
    with pytest.raises(RuntimeError, match=r"model\.layers\.1 has become a Sharded"):
        model.unload()
    assert memory_class("armt").site == "layer" and model(tokens(1, 9)).logits.isfinite().all()


def test_perplexity_leaves_a_plain_model_alone(tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Mary went to the kitchen . " * 200)
    words = tokenizer("words")
    base = base_model("llama", vocab_size=len(words))
    before = list(described(base))
    perplexity(
        base, words, Haystack.open(str(text), "all"), "64", 1, segment_length=16, progress=False
    )
    assert list(described(base)) == before
