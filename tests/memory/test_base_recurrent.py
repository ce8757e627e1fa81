"""The base's own recurrent state against the base itself, reading the whole document unsplit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.mamba2 import modeling_mamba2

from memlm import DocumentStream, MemLMForCausalLM
from memlm.memory import ARMTConfig, BaseRecurrentConfig, TitansMALConfig, TransformerXLConfig
from tests.cases import (
    RECURRENT,
    RECURRENT_FAMILIES,
    SEGMENT,
    base_model,
    float64_stays,
    memory_model,
    tokens,
)
from tests.tokenizers import TEXT, tokenizer

EXACT = {"rtol": 0.0, "atol": 1e-10}
# Every family, the first ones by default, and one of each kind of recurrence.
DEFAULT = (*RECURRENT_FAMILIES, "nemotron_h", "kimi_linear")
families = pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in DEFAULT else pytest.mark.slow)
        for family in RECURRENT
    ],
)
# The softmax of these cannot be opened for transformer-xl, in some versions of transformers: they are
# compared without softmax layers.
ALONE: dict[str, dict] = {
    "kimi_linear": {"layer_types": ["linear_attention"] * 2},
    "qwen3_5_text": {"layer_types": ["linear_attention"] * 2},
    "zamba2": {"layers_block_type": ["mamba"] * 3, "hybrid_layer_ids": []},
}
TINY = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
# What transformers has besides, and what it is called when it is refused.
REFUSED = {
    "mamba": ({"state_size": 8}, "MambaMixer"),
    "falcon_mamba": ({"state_size": 8}, "FalconMambaMixer"),
    "jamba": (
        {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
        "JambaMambaMixer",
    ),
    "recurrent_gemma": (
        {"lru_width": 32, "head_dim": 8, "block_types": ["recurrent"], "num_attention_heads": 4},
        "RecurrentGemmaRglru",
    ),
    "rwkv": ({"attention_hidden_size": 32}, "RwkvSelfAttention"),
    "zamba": (
        {
            "num_attention_heads": 4,
            "n_mamba_heads": 2,
            "mamba_d_state": 8,
            "layers_block_type": ["mamba"] * 2,
        },
        "ZambaMambaMixer",
    ),
    "minimax": (
        {"num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 2},
        "MiniMaxLightningAttention",
    ),
    "xlstm": ({"num_heads": 4}, "xLSTM.*|mLSTM.*"),
}


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with float64_stays():
        yield


def carrying(base: PreTrainedModel, segment: int = SEGMENT, reach: int = 32) -> MemLMForCausalLM:
    """The recurrences go on, and softmax layers see `reach` tokens before the segment."""
    model = MemLMForCausalLM.from_base(base, memory="base-recurrent", segment_length=segment)
    backbone = model.backbone
    softmax = [layer for layer in range(len(backbone.layers)) if backbone.has_attention(layer)]
    if not softmax:
        return model.eval()
    cache = TransformerXLConfig(memory_length=reach, layers=tuple(softmax))
    return MemLMForCausalLM.from_base(
        base, memory=["base-recurrent", cache], segment_length=segment
    ).eval()


@families
@torch.no_grad()
def test_segments_compute_what_the_unsplit_document_does(family: str) -> None:
    base, ids = base_model(family, **ALONE.get(family, {})), tokens(2, 4 * SEGMENT + 3)
    plain = base(ids, use_cache=False).logits
    for segment in (1, SEGMENT) if family in RECURRENT_FAMILIES else (SEGMENT,):
        found = carrying(base, segment)(ids).logits
        torch.testing.assert_close(found, plain, **EXACT)


@families
@torch.no_grad()
def test_padding_changes_no_state(family: str) -> None:
    model = memory_model(family, "base-recurrent")
    rows = [tokens(1, n, seed=n)[0] for n in (2 * SEGMENT + 1, SEGMENT - 1, 1)]
    ids = torch.zeros(len(rows), 3 * SEGMENT, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(i))
        at = at[: len(row)].sort()[0]
        ids[i, at], mask[i, at] = row, 1
    out = model(ids, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = model(row[None])
        torch.testing.assert_close(out.logits[i][mask[i].bool()], alone.logits[0], **EXACT)
        state = out.memory_state.select([i]).tensors
        torch.testing.assert_close(state, alone.memory_state.tensors, **EXACT)


@pytest.mark.parametrize("family", RECURRENT_FAMILIES)
def test_gradients_are_those_of_the_unsplit_document(family: str) -> None:
    base, ids = base_model(family), tokens(2, 3 * SEGMENT)
    parameters = list(base.parameters())
    plain = torch.autograd.grad(
        base(ids, labels=ids, use_cache=False).loss, parameters, allow_unused=True
    )
    model = carrying(base)
    found = torch.autograd.grad(model(ids, labels=ids).loss, parameters, allow_unused=True)
    for a, b in zip(found, plain, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("family", RECURRENT_FAMILIES[1:])
@torch.no_grad()
def test_softmax_layers_of_a_hybrid_start_afresh(family: str) -> None:
    base, ids = base_model(family), tokens(1, 3 * SEGMENT)
    plain = base(ids, use_cache=False).logits
    found = MemLMForCausalLM.from_base(base, memory="base-recurrent", segment_length=SEGMENT)(ids)
    torch.testing.assert_close(found.logits[:, :SEGMENT], plain[:, :SEGMENT], **EXACT)
    assert (found.logits - plain)[:, SEGMENT:].abs().max() > 1e-3


@torch.no_grad()
def test_layers_may_be_chosen_and_the_others_start_afresh() -> None:
    base, ids = base_model("mamba2"), tokens(1, 3 * SEGMENT)
    one = MemLMForCausalLM.from_base(
        base, memory=BaseRecurrentConfig(layers=(1,)), segment_length=SEGMENT
    )
    out = one(ids)
    assert {name.split(".")[1] for name in out.memory_state.tensors} == {"1"}
    assert (out.logits - base(ids).logits)[:, SEGMENT:].abs().max() > 1e-3


@torch.no_grad()
def test_nothing_is_written_into_what_was_carried() -> None:
    for length in (1, SEGMENT):
        model, ids = memory_model("mamba2", "base-recurrent"), tokens(1, length)
        before = model(tokens(1, SEGMENT, seed=3)).memory_state
        kept = before.fork()
        after = model(ids, memory_state=before).memory_state
        for name, tensor in kept.tensors.items():
            assert torch.equal(before[name], tensor) and not torch.equal(after[name], tensor)


@torch.no_grad()
def test_memory_tokens_of_another_memory_come_after_the_last_token() -> None:
    """In a padded row as well, where they stand behind the padding."""
    model = memory_model("mamba2", [ARMTConfig(num_memory_tokens=2, d_mem=8), "base-recurrent"])
    ids, mask = tokens(2, 2 * SEGMENT), torch.ones(2, 2 * SEGMENT, dtype=torch.long)
    mask[1, SEGMENT + 2 :] = 0
    out = model(ids, attention_mask=mask)
    alone = model(ids[1:, : SEGMENT + 2])
    torch.testing.assert_close(out.logits[1:, : SEGMENT + 2], alone.logits, **EXACT)
    state = out.memory_state.select([1]).tensors
    torch.testing.assert_close(state, alone.memory_state.tensors, **EXACT)


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_carried_is_refused_by_name(family: str) -> None:
    from transformers import CONFIG_MAPPING

    over, name = REFUSED[family]
    base = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**TINY, **over}))
    with pytest.raises(
        ValueError, match=rf"the state of its ({name}) cannot be handed on.*Mamba-2"
    ):
        MemLMForCausalLM.from_base(base, memory="base-recurrent")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_base_without_a_recurrent_state_is_refused(family: str) -> None:
    with pytest.raises(ValueError, match=r"no layer of it has a recurrent state.*'armt'"):
        MemLMForCausalLM.from_base(base_model(family), memory="base-recurrent")


def test_what_does_not_fit_is_refused() -> None:
    def attach(*memories: object, family: str = "mamba2") -> None:
        MemLMForCausalLM.from_base(
            base_model(family), memory=list(memories), segment_length=SEGMENT
        )

    with pytest.raises(
        ValueError, match=r"layers \[1\] of the base model have no .*use layers among \(0,\)"
    ):
        attach(BaseRecurrentConfig(layers=(1,)), family="qwen3_next")
    with pytest.raises(ValueError, match="each carry the same state; attach one"):
        attach("base-recurrent", "base-recurrent")
    with pytest.raises(ValueError, match="'base-recurrent' inside it would take them for tokens"):
        attach(TitansMALConfig(num_persistent_tokens=2), "base-recurrent")


def test_a_recurrence_that_drops_its_state_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of a later transformers might."""
    scan = modeling_mamba2.mamba2_chunk_scan

    def forgetful(*args: Tensor, initial_states: Tensor | None = None, **kwargs: object) -> object:
        return scan(*args, **kwargs)

    monkeypatch.setattr(modeling_mamba2, "mamba2_chunk_scan", forgetful)
    with pytest.raises(ValueError, match=r"layer 0 \(Mamba2Mixer\) does not compute in parts"):
        MemLMForCausalLM.from_base(base_model("mamba2"), memory="base-recurrent")


@pytest.mark.parametrize("family", ["mamba2", "nemotron_h", "qwen3_next"])
@torch.no_grad()
def test_the_base_is_handed_back_as_it_was(family: str) -> None:
    base, ids = base_model(family), tokens(1, SEGMENT)
    described = [
        (name, type(module), sorted(vars(module))) for name, module in base.named_modules()
    ]
    plain = base(ids, use_cache=False).logits
    model = MemLMForCausalLM.from_base(base, memory="base-recurrent", segment_length=SEGMENT)
    model(ids)
    assert torch.equal(base(ids).logits, plain)
    model.unload()
    assert described == [(n, type(m), sorted(vars(m))) for n, m in base.named_modules()]


@torch.no_grad()
def test_a_stream_is_written_saved_and_forked(tmp_path) -> None:
    words = tokenizer("byte-bpe")
    base = base_model("mamba2", vocab_size=len(words))
    model = carrying(base, segment=12)
    stream = DocumentStream(model, words)
    stream.write(list(TEXT[:200]))
    bytes_held = stream.memory_bytes
    fork = stream.fork()
    stream.save(tmp_path / "stream")
    stream.write(TEXT[200:])
    assert stream.memory_bytes == bytes_held
    # The fork and the file are where they were, and go on to the same.
    loaded = DocumentStream.load(tmp_path / "stream", model, words)
    assert fork.tokens_seen == loaded.tokens_seen < stream.tokens_seen
    score = stream.score("Mary")
    for other in (fork, loaded):
        assert abs(other.score("Mary") - score) > 1e-6
        other.write(TEXT[200:])
        assert other.score("Mary") == pytest.approx(score, abs=1e-9)
    # What is said next is what the base itself says, having read everything in one piece.
    before, after = (words(text, add_special_tokens=False)["input_ids"] for text in (TEXT, "Mary"))
    said = base(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
    nats = -said.gather(1, torch.tensor(after)[:, None]).mean()
    assert score == pytest.approx(float(nats), abs=1e-9)
