"""TransformerFAM against its recurrence, layer by layer through plain transformers."""

from __future__ import annotations

import pytest
import torch

from memlm.memory import FAMConfig
from memlm.memory.base import Dims
from memlm.memory.fam import FAM, FAMState
from memlm.modeling import MemLMForCausalLM
from tests.cases import SEGMENT, base_model, memory_model, randomise, tokens

F, LAYERS = 3, 2
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
lengths = pytest.mark.parametrize("keeps_length", [True, False], ids=["kept", "free"])


def layer_of(base, number: int, x: torch.Tensor) -> torch.Tensor:
    """One layer of a plain base model on a sequence of its own, every place seeing those before it."""
    count = x.shape[1]
    mask = torch.full((count, count), -torch.inf, dtype=x.dtype).triu(1)[None, None]
    decoder = base.get_decoder()
    if not hasattr(decoder, "rotary_emb"):
        out = decoder.h[number](x, attention_mask=mask)
    else:
        places = torch.arange(count)[None]
        out = decoder.layers[number](
            x,
            attention_mask=mask,
            position_ids=places,
            position_embeddings=decoder.rotary_emb(x, places),
        )
    return out[0] if isinstance(out, tuple) else out


def finish(base, x: torch.Tensor) -> torch.Tensor:
    decoder = base.get_decoder()
    norm = decoder.norm if hasattr(decoder, "norm") else decoder.ln_f
    return base.get_output_embeddings()(norm(x))


def entering(base, ids: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """The segment and the embeddings behind it, as the first layer gets them."""
    x = torch.cat([base.get_input_embeddings()(ids), added.expand(len(ids), -1, -1)], 1)
    decoder = base.get_decoder()
    return x + decoder.wpe(torch.arange(x.shape[1])) if hasattr(decoder, "wpe") else x


def by_hand(base, embeddings: torch.Tensor, ids: torch.Tensor, keeps_length: bool):
    """The logits of a document, and the vectors of each layer after it."""
    vectors, longest = [None] * LAYERS, [None] * LAYERS
    logits = []
    for segment in ids.split(SEGMENT, dim=1):
        x = entering(base, segment, embeddings)
        for layer in range(LAYERS):
            old = vectors[layer]
            if old is None:
                x = layer_of(base, layer, x)
            else:
                x = layer_of(base, layer, torch.cat([old, x[:, :-F], old], 1))[:, F:]
            new, size = x[:, -F:], x[:, -F:].square().sum(-1, keepdim=True).sqrt()
            if longest[layer] is None:
                longest[layer] = size
            elif keeps_length:
                new = torch.where(size > longest[layer], new / size * longest[layer], new)
            vectors[layer] = new
        logits.append(finish(base, x[:, :-F]))
    return torch.cat(logits, 1), vectors


def model_of(family: str, keeps_length: bool) -> MemLMForCausalLM:
    config = FAMConfig(num_memory_tokens=F, keeps_length=keeps_length)
    model = MemLMForCausalLM.from_base(base_model(family), memory=config, segment_length=SEGMENT)
    randomise(model.memory)
    return model


@lengths
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@torch.no_grad()
def test_equals_layers_around_vectors(family: str, keeps_length: bool) -> None:
    model, ids = model_of(family, keeps_length), tokens(2, 4 * SEGMENT + 2)
    expected, vectors = by_hand(
        base_model(family), model.memory.attached["fam"].tokens, ids, keeps_length
    )
    out = model(ids)
    torch.testing.assert_close(out.logits, expected, **CLOSE)
    for layer in range(LAYERS):
        torch.testing.assert_close(
            out.memory_state[f"fam.{layer}.vectors"], vectors[layer], **CLOSE
        )


@lengths
def test_gradients_equal_those_by_hand(keeps_length: bool) -> None:
    model, ids = model_of("llama", keeps_length), tokens(2, 3 * SEGMENT)
    base, own = base_model("llama"), model.memory.attached["fam"].tokens
    embeddings = own.detach().clone().requires_grad_()
    logits, _ = by_hand(base, embeddings, ids, keeps_length)
    logits.sin().sum().backward()
    model(ids).logits.sin().sum().backward()
    assert own.grad.abs().max() > 1e-3
    torch.testing.assert_close(own.grad, embeddings.grad, rtol=1e-7, atol=1e-7)
    found = dict(model.base.named_parameters())
    for name, parameter in base.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-7, atol=1e-7)


@torch.no_grad()
def test_vectors_grow_unless_their_length_is_kept() -> None:
    sizes = {}
    for keeps in (True, False):
        model = memory_model("llama", FAMConfig(num_memory_tokens=F, keeps_length=keeps))
        after = [model(tokens(1, n * SEGMENT)).memory_state["fam.0.vectors"] for n in (1, 30)]
        sizes[keeps] = [float(one.norm(dim=-1).max()) for one in after]
    assert sizes[True][1] <= sizes[True][0] + 1e-9
    assert sizes[False][1] > 4 * sizes[False][0]


@torch.no_grad()
def test_a_shorter_vector_stays_as_short_as_it_is() -> None:
    config = FAMConfig(num_memory_tokens=F)
    dims = Dims(4, 4, 2, 2, 2, 2, SEGMENT)
    memory = FAM(FAM.resolve(config, dims), dims).double()
    new = torch.tensor([[[0.0, 3.0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 2]]], dtype=torch.float64)
    old = FAMState(torch.ones_like(new), torch.full((1, F), 2.0, dtype=torch.float64))
    state = memory.write(new, old)
    assert state.vectors.norm(dim=-1).tolist() == [[2.0, 1.0, 2.0]]
    assert torch.equal(state.lengths, old.lengths)


@torch.no_grad()
def test_some_layers_alone() -> None:
    model, ids = memory_model("llama", FAMConfig(num_memory_tokens=F, layers=(1,))), tokens(1, 20)
    assert set(model(ids).memory_state.tensors) == {"fam.1.vectors", "fam.1.lengths"}
    other = ids.clone()
    other[0, 2] = 5
    assert (model(ids).logits - model(other).logits)[:, 12:].abs().max() > 1e-7


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="num_memory_tokens=0 must be at least 1"):
        memory_model("llama", FAMConfig(num_memory_tokens=0))
    # Twice, in front and behind: 6 + 2 x 30 places of 64.
    with pytest.raises(ValueError, match="segment_length=6 with 60 memory positions is too large"):
        memory_model("llama", FAMConfig(num_memory_tokens=30))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@torch.no_grad()
def test_the_open_first_segment_goes_on_without_vectors(family: str) -> None:
    """Nothing real stands in front, and the decoder has no mask that could say so."""
    model = memory_model(family, FAMConfig(num_memory_tokens=F), sliding_window=32)
    ids = tokens(2, 2)
    given = {"max_new_tokens": 3, "do_sample": False, "output_logits": True}
    given |= {"return_dict_in_generate": True, "eos_token_id": None}
    kept, again = (model.generate(ids, use_cache=use, **given) for use in (True, False))
    for a, b in zip(kept.logits, again.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-5)


def test_sizes() -> None:
    config = FAMConfig.paper()
    assert (config.num_memory_tokens, config.keeps_length) == (64, False)
    dims = Dims(4, 4, 2, 2, 2, 2, 40)
    assert FAM.resolve(FAMConfig(), dims).num_memory_tokens == 16
