"""Every supported family, and the four sites, through plain transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import memlm.memory
from memlm.backbone import find_attention
from memlm.backbone.heads import only_real, with_keys_in_front
from memlm.backbone.open import Front
from memlm.backbone.run import RUN
from memlm.memory import QKV, Memory, MemoryConfig, TransformerXLConfig
from memlm.modeling import MemLMForCausalLM
from tests.cases import FAMILIES, SEGMENT, base_model, memory_model, randomise, tokens

EXACT = {"rtol": 0.0, "atol": 1e-10}
families = pytest.mark.parametrize("family", FAMILIES)


@families
@torch.no_grad()
def test_no_memory_is_plain_transformers(family: str) -> None:
    base, ids = base_model(family), tokens(2, 20)
    names = list(base.state_dict())
    plain = base(ids).logits
    model = MemLMForCausalLM.from_base(base, memory="none", segment_length=20)
    assert torch.equal(model(ids).logits, plain)
    assert torch.equal(base(ids).logits, plain)
    assert list(base.state_dict()) == names
    segmented = MemLMForCausalLM.from_base(base, memory="none", segment_length=SEGMENT)
    expected = torch.cat([base(part).logits for part in ids.split(SEGMENT, 1)], 1)
    torch.testing.assert_close(segmented(ids).logits, expected, **EXACT)


@families
@torch.no_grad()
def test_wrapping_leaves_the_live_base_causal(family: str) -> None:
    base, ids = base_model(family), tokens(1, 12)
    implementation = base.config._attn_implementation
    MemLMForCausalLM.from_base(base, memory="armt", segment_length=SEGMENT)
    assert base.config._attn_implementation == implementation
    other = ids.clone()
    other[0, -1] = 5 if ids[0, -1] != 5 else 6
    torch.testing.assert_close(base(other).logits[:, :-1], base(ids).logits[:, :-1], **EXACT)


@families
@pytest.mark.parametrize("memory", ["rmt", "armt"])
@torch.no_grad()
def test_every_family_carries_and_ignores_padding(family: str, memory: str) -> None:
    over = {"sliding_window": 64} if family == "gemma3_text" else {}
    model = MemLMForCausalLM.from_base(
        base_model(family, **over), memory=memory, segment_length=SEGMENT
    )
    randomise(model.memory)
    ids = tokens(1, 3 * SEGMENT + 1)
    whole = model(ids).logits
    first = model(ids[:, : 2 * SEGMENT])
    second = model(ids[:, 2 * SEGMENT :], memory_state=first.memory_state)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, **EXACT)
    padded = F.pad(ids, (4, 3)), F.pad(torch.ones_like(ids), (4, 3))
    torch.testing.assert_close(
        model(padded[0], attention_mask=padded[1]).logits[:, 4:-3], whole, **EXACT
    )


@families
def test_tied_weights_and_gradients_round_trip(family: str, tmp_path) -> None:
    model = MemLMForCausalLM.from_base(
        base_model(family, tie_word_embeddings=True), memory="armt", segment_length=SEGMENT
    )
    randomise(model.memory)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "memory-model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "memory-model", dtype=torch.float64)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    ids = tokens(1, 2 * SEGMENT)
    # Gemma keeps the scale of its embeddings as a constant, rounded to the dtype it was built in.
    close = {"rtol": 0.0, "atol": 1e-5} if family == "gemma3_text" else EXACT
    torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits, **close)
    # The base inside is an ordinary checkpoint of its own architecture.
    model.base.save_pretrained(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    torch.testing.assert_close(plain(ids).logits, model.base(ids).logits, **close)


@dataclass(frozen=True, kw_only=True)
class PrefixConfig(MemoryConfig):
    slots: int = 4


class PrefixState(NamedTuple):
    slots: torch.Tensor


class Prefix(Memory):
    """The last inputs of the stage, put in front of the next segment's."""

    site = "attention"
    Config = PrefixConfig

    def __init__(self, config, dims) -> None:
        super().__init__(config, dims)
        self.start = nn.Parameter(torch.zeros(config.slots, dims.hidden_size))

    def reset_parameters(self, embedding_std: float) -> None:
        nn.init.normal_(self.start)

    def init_state(self, batch_size: int) -> PrefixState:
        return PrefixState(self.start.expand(batch_size, -1, -1))

    def forward(self, x, state, inner, *, mask, write=True):
        slots = state.slots.shape[1]
        if mask is not None:
            mask = torch.cat([mask.new_ones(mask.shape[0], slots), mask], 1)
        y = inner(torch.cat([state.slots, x], 1), mask=mask)[:, slots:]
        if not write:
            return y, state
        real = torch.ones(x.shape[:2]) if mask is None else mask[:, slots:].to(x.dtype)
        mean = (x * real[..., None]).sum(1) / real.sum(1).clamp(min=1)[:, None]
        return y, PrefixState(torch.cat([state.slots[:, 1:], mean[:, None]], 1))


@dataclass(frozen=True, kw_only=True)
class LayerPrefixConfig(PrefixConfig):
    pass


class LayerPrefix(Prefix):
    site = "layer"
    Config = LayerPrefixConfig


@dataclass(frozen=True, kw_only=True)
class InfiniConfig(MemoryConfig):
    pass


class InfiniState(NamedTuple):
    matrix: torch.Tensor
    norm: torch.Tensor


class Infini(Memory):
    """A linear attention over past segments, mixed with the softmax one."""

    site = "heads"
    Config = InfiniConfig

    def __init__(self, config, dims) -> None:
        super().__init__(config, dims)
        self.gate = nn.Parameter(torch.zeros(dims.num_heads))

    def init_state(self, batch_size: int) -> InfiniState:
        h, d = self.dims.num_heads, self.dims.head_dim
        zeros = self.gate.new_zeros
        return InfiniState(zeros(batch_size, h, d, d), zeros(batch_size, h, d))

    def forward(self, x, state, inner, *, mask, write=True):
        q = F.elu(x.q) + 1
        read = (q @ state.matrix) / ((q @ state.norm[..., None]) + 1e-5)
        g = torch.sigmoid(self.gate)[:, None, None]
        y = g * read + (1 - g) * inner(x)
        if not write:
            return y, state
        groups = x.q.shape[1] // x.k.shape[1]
        k, v = (F.elu(x.k) + 1).repeat_interleave(groups, 1), x.v.repeat_interleave(groups, 1)
        if mask is not None:
            k = k * mask[:, None, :, None]
        return y, InfiniState(state.matrix + k.mT @ v, state.norm + k.sum(2))


@dataclass(frozen=True, kw_only=True)
class KeysConfig(MemoryConfig):
    pass


class Keys(Memory):
    """Keys and values of the last segment's start, in front of the present ones."""

    site = "heads"
    Config = KeysConfig

    def init_state(self, batch_size: int) -> QKV:
        g, d = self.dims.num_kv_heads, self.dims.head_dim
        zeros = torch.zeros(batch_size, g, 2, d, dtype=torch.float64)
        return QKV(zeros[:, :, :0], zeros, zeros)

    def forward(self, x, state, inner, *, mask, write=True):
        k, v = torch.cat([state.k, x.k], 2), torch.cat([state.v, x.v], 2)
        y = inner(QKV(x.q, k, v))
        if not write:
            return y, state
        return y, QKV(state.q, x.k.mean(2, True) + state.k, x.v.mean(2, True) + state.v)


TEST_MEMORIES = {
    "prefix": Prefix,
    "layer-prefix": LayerPrefix,
    "infini-test": Infini,
    "key-prefix": Keys,
}


@pytest.fixture(autouse=True)
def registered(monkeypatch) -> None:
    for name, cls in TEST_MEMORIES.items():
        monkeypatch.setitem(memlm.memory._MECHANISMS, name, cls)


def site_model(family: str, memory: object) -> MemLMForCausalLM:
    model = MemLMForCausalLM.from_base(base_model(family), memory=memory, segment_length=SEGMENT)
    randomise(model.memory)
    return model.eval()


@families
@pytest.mark.parametrize("memory", TEST_MEMORIES)
def test_all_sites_work_on_every_family(family: str, memory: str) -> None:
    model, ids = site_model(family, memory), tokens(2, 3 * SEGMENT + 2)
    whole = model(ids)
    first = model(ids[:, :SEGMENT])
    rest = model(ids[:, SEGMENT:], memory_state=first.memory_state)
    got = torch.cat([first.logits, rest.logits], 1)
    torch.testing.assert_close(got, whole.logits, **EXACT)
    other = ids.clone()
    other[:, 1] = (other[:, 1] - 2) % 50 + 3
    changed = model(other).logits
    torch.testing.assert_close(changed[:, :1], whole.logits[:, :1], **EXACT)
    assert (changed - whole.logits)[:, SEGMENT:].abs().max() > 1e-9
    model.train()
    found = []
    for recompute in (False, True):
        if recompute:
            model.base.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert all(p.grad is not None for p in model.memory.parameters())
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@families
@pytest.mark.parametrize("memory", ["prefix", "infini-test"])
@torch.no_grad()
def test_sites_see_no_padding(family: str, memory: str) -> None:
    model = site_model(family, memory)
    rows = [tokens(1, n, seed=n)[0] for n in (2 * SEGMENT + 3, 4)]
    ids = torch.zeros(2, 3 * SEGMENT, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    out = model(ids, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = model(row[None])
        torch.testing.assert_close(out.logits[i, : len(row)], alone.logits[0], **EXACT)
        for name, tensor in alone.memory_state.tensors.items():
            torch.testing.assert_close(out.memory_state[name][i], tensor[0], **EXACT)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_a_prefix_in_front_of_attention_is_attention_over_both(family: str) -> None:
    """The house lengthens mask and positions: equal to running the stage on the longer input."""
    model, ids = site_model(family, "prefix"), tokens(1, SEGMENT)
    layer = model.backbone.layers[0]
    attention = find_attention(layer)[0]
    original = type(attention)._memlm_original.forward
    calls = []

    def record(self, hidden_states, *args, **kwargs):
        calls.append((hidden_states, kwargs.get("attention_mask")))
        return original(self, hidden_states, *args, **kwargs)

    type(attention)._memlm_original.forward = record
    try:
        model(ids)
    finally:
        type(attention)._memlm_original.forward = original
    hidden, mask = calls[0]
    assert hidden.shape[1] == SEGMENT + 4
    assert mask is None or mask.shape[-2:] == (SEGMENT + 4, SEGMENT + 4)


@families
def test_memories_of_different_sites_compose(family: str) -> None:
    over = {"sliding_window": 64} if family == "gemma3_text" else {}
    model = MemLMForCausalLM.from_base(
        base_model(family, **over),
        memory=["rmt", "armt", "prefix", "infini-test"],
        segment_length=6,
    )
    randomise(model.memory)
    ids = tokens(1, 3 * SEGMENT)
    whole = model(ids)
    first = model(ids[:, :SEGMENT])
    rest = model(ids[:, SEGMENT:], memory_state=first.memory_state)
    got = torch.cat([first.logits, rest.logits], 1)
    torch.testing.assert_close(got, whole.logits, **EXACT)
    whole.logits.square().mean().backward()
    for name, parameter in model.memory.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_two_memories_with_tokens_of_their_own_are_refused() -> None:
    with pytest.raises(ValueError, match="armt_2"):
        site_model("llama", ["armt", "armt"])


def test_an_encoder_decoder_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    base = T5ForConditionalGeneration(
        T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration"):
        MemLMForCausalLM.from_base(base, memory="armt", segment_length=4)


@pytest.mark.parametrize("memory", ["none", "rmt", "armt", "prefix", "infini-test"])
@torch.no_grad()
def test_a_segment_leaves_no_cyclic_garbage(memory: str) -> None:
    """What waits for the collector holds tensors, and a long document would grow."""
    import gc

    model, ids = site_model("llama", memory), tokens(2, 4 * SEGMENT)
    model(ids, logits_to_keep=None)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(3):
            model(ids, logits_to_keep=None)
        gc.collect()
        kept = [found for found in gc.garbage if isinstance(found, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not kept


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_hide_what_is_not_real(dtype: torch.dtype) -> None:
    real = torch.tensor([[False, True, True], [True, True, False]])
    causal = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    seen = causal if dtype == torch.bool else torch.zeros(1, 1, 3, 3).masked_fill(~causal, -9e9)
    shown = only_real(seen, real)
    longer = with_keys_in_front(seen, Front(3, real), 3)
    if dtype != torch.bool:
        shown, longer = shown > -1e9, longer > -1e9
    assert torch.equal(shown, causal & real[:, None, None])
    front = real[:, None, None].expand(-1, -1, 3, -1)
    assert torch.equal(longer, torch.cat([front, causal.expand(2, -1, -1, -1)], -1))


def test_masks_that_know_of_no_queries_hide_what_is_not_real() -> None:
    real, seen = torch.tensor([[False, True]]), torch.tensor([[True, False]])
    assert only_real(seen, real).tolist() == [[False, False]]
    assert with_keys_in_front(seen, Front(2, real), 1).tolist() == [[False, True, True, False]]
    assert with_keys_in_front(seen, Front(2, None), 1).tolist() == [[True, True, True, False]]


@torch.no_grad()
def test_no_run_is_left_when_a_call_ends_or_fails() -> None:
    """A run that stayed would reach whatever uses the base next."""
    model, ids = memory_model("llama", "armt"), tokens(1, SEGMENT)
    model(ids)
    assert RUN.get() is None

    def fail(*given: object) -> None:
        raise ZeroDivisionError

    handle = model.backbone.layers[0].mlp.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(ids)
    handle.remove()
    assert RUN.get() is None


@torch.no_grad()
def test_attention_that_rotates_by_pairs_or_calls_the_softmax_from_a_part_of_it() -> None:
    """gpt-oss has an angle per pair of features, and sinks; BERT calls the softmax from a part."""
    config = CONFIG_MAPPING["gpt_oss"](
        **{**FAMILIES["llama"], "intermediate_size": 16},
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention"] * 2,
    )
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids, every = tokens(2, 3 * SEGMENT), TransformerXLConfig(memory_length=24)
    for parameter in base.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    unsplit = base(ids).logits
    model = MemLMForCausalLM.from_base(base, memory=every, segment_length=SEGMENT)
    # Experts are computed in float32 at most.
    torch.testing.assert_close(model(ids).logits, unsplit, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="s_aux"):
        MemLMForCausalLM.from_base(model.unload(), memory="landmark", segment_length=SEGMENT)

    sizes = {k: v for k, v in FAMILIES["llama"].items() if k != "num_key_value_heads"}
    config = CONFIG_MAPPING["bert"](**sizes, is_decoder=True)
    base = AutoModelForCausalLM.from_config(config).double().eval()
    split = torch.cat([base(part).logits for part in ids.split(SEGMENT, 1)], 1)
    model = MemLMForCausalLM.from_base(base, memory=every, segment_length=SEGMENT).eval()
    out = model(ids)
    # The first segment as the base reads it; the others with what was before them.
    torch.testing.assert_close(out.logits[:, :SEGMENT], split[:, :SEGMENT], **EXACT)
    assert (out.logits - split)[:, SEGMENT:].abs().amax(-1).min() > 1e-4
    state = model(ids[:, : 2 * SEGMENT]).memory_state
    later = model(ids[:, 2 * SEGMENT :], memory_state=state).logits
    torch.testing.assert_close(later, out.logits[:, 2 * SEGMENT :], **EXACT)
