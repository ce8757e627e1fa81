"""Several memories at once, bases where a memory cannot apply, and states that are no longer finite."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import memlm.memory
from memlm import MemLMForCausalLM, MemoryState
from memlm.attach import check_attention
from memlm.backbone import Backbone
from memlm.memory import (
    ARMTConfig,
    CompressiveConfig,
    RMTConfig,
    TitansMACConfig,
    TitansMAGConfig,
    TitansMALConfig,
    TransformerXLConfig,
    memory_class,
    register_memory,
)
from tests.cases import (
    A_SITE_EACH,
    CASES,
    FAMILIES,
    SEGMENT,
    base_model,
    by_default,
    randomise,
    standing,
    tokens,
)
from tests.fresh import run_fresh
from tests.memory.test_laws import EXACT, same_state

TOGETHER = {
    "tokens and a branch": [RMTConfig(num_memory_tokens=2), TitansMAGConfig(chunk_length=4)],
    "tokens and a context": [RMTConfig(num_memory_tokens=2), TitansMACConfig(chunk_length=4)],
    "tokens and a cache": [RMTConfig(num_memory_tokens=2), TransformerXLConfig(memory_length=8)],
    "a branch and a window": [TitansMAGConfig(chunk_length=2), TransformerXLConfig()],
    "a layer and a compression": [
        TitansMALConfig(chunk_length=3),
        CompressiveConfig(memory_length=4, compression_rate=2),
    ],
    "linear and softmax pasts": ["infini", "transformer-xl"],
    "associations and a linear past": [CASES["armt"], "infini"],
    "different layers": [TitansMACConfig(layers=(0,)), TransformerXLConfig(layers=(1,))],
    "one mechanism twice": [TitansMAGConfig(layers=(0,)), TitansMAGConfig(layers=(1,), depth=1)],
}


# Learned positions and fused projections: by default for one memory of each site.
@pytest.mark.parametrize(
    ("together", "family"),
    [
        pytest.param(together, family, marks=() if by_default else pytest.mark.slow)
        for together in TOGETHER
        for family in ("llama", "gpt2")
        for by_default in [
            family == "llama"
            or together in ("tokens and a branch", "associations and a linear past")
        ]
    ],
)
def test_memories_work_together(family: str, together: str) -> None:
    model = MemLMForCausalLM.from_base(
        base_model(family), memory=TOGETHER[together], segment_length=SEGMENT
    )
    randomise(model.memory)
    model.eval()
    rows = [tokens(1, n, seed=n)[0] for n in (3 * SEGMENT + 2, SEGMENT + 1)]
    ids = torch.zeros(2, 4 * SEGMENT, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    out = model(ids, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = model(row[None])
        torch.testing.assert_close(out.logits[i, : len(row)], alone.logits[0], **EXACT)
        assert same_state(out.memory_state.select([i]), alone.memory_state)
    ids = tokens(1, 3 * SEGMENT)
    whole = model(ids)
    first = model(ids[:, :SEGMENT])
    rest = model(ids[:, SEGMENT:], memory_state=first.memory_state)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole.logits, **EXACT)
    other = ids.clone()
    other[0, SEGMENT + 1] = (other[0, SEGMENT + 1] - 2) % 50 + 3
    changed = model(other).logits
    at = SEGMENT + 1
    torch.testing.assert_close(changed[:, :at], whole.logits[:, :at], **EXACT)
    model.train()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.memory.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (["titans-mac", "transformer-xl"], "'titans-mac' inserts 10 positions into layer 0"),
        (["titans-mac", "titans-mag"], "'titans-mag' inside it would take them for tokens"),
        (["transformer-xl", "infini"], "'transformer-xl' inserts 6 positions"),
        (["transformer-xl", "compressive"], "give them different layers"),
        (
            [TitansMALConfig(num_persistent_tokens=2), "infini"],
            "or set num_persistent_tokens=0",
        ),
    ],
)
def test_memories_that_would_disturb_each_other_are_refused(memory, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemLMForCausalLM.from_base(base_model("llama"), memory=memory, segment_length=SEGMENT)


def hybrid():
    """A base model whose first layer is a linear attention and has no softmax."""
    config = CONFIG_MAPPING["qwen3_next"](
        **{
            **FAMILIES["qwen3"],
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
            "mlp_only_layers": [0, 1],
        }
    )
    return AutoModelForCausalLM.from_config(config).to(torch.float64)


@pytest.mark.parametrize("memory", ["titans-mac", "titans-mag", "transformer-xl", "infini"])
def test_a_layer_without_softmax_attention_is_refused(memory: str) -> None:
    with pytest.raises(ValueError, match=r"layers \[0\].*use layers=\(1,\)"):
        MemLMForCausalLM.from_base(hybrid(), memory=memory, segment_length=SEGMENT)


def test_an_attention_whose_turning_cannot_be_taken_off_is_refused() -> None:
    config = CONFIG_MAPPING["deepseek_v3"](
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=1,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        max_position_embeddings=64,
    )
    base = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"layer 0 .*that works outside it"):
        MemLMForCausalLM.from_base(base, memory="infini", segment_length=SEGMENT)


OLD = {
    "bloom": {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gptj": {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
}


@pytest.mark.parametrize("memory", ["infini", "transformer-xl", "titans-mac", "armt"])
@pytest.mark.parametrize("family", OLD)
def test_families_with_an_attention_of_their_own(family: str, memory: str) -> None:
    """No heads to stand at outside transformers' interface; biases by distance do not grow."""
    tokens_ = {"bos_token_id": 1, "eos_token_id": 2}
    base = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**OLD[family], **tokens_))
    if memory == "armt" or (family, memory) == ("gptj", "titans-mac"):
        model = MemLMForCausalLM.from_base(base, memory=memory, segment_length=SEGMENT)
        assert model(tokens(1, 2 * SEGMENT)).logits.isfinite().all()
        return
    with pytest.raises(ValueError, match=r"that works outside it|such as 'armt'"):
        MemLMForCausalLM.from_base(base, memory=memory, segment_length=SEGMENT)


@pytest.mark.parametrize("family", ["phi", "cohere2", "gemma2", "exaone4", "glm", "granite"])
@torch.no_grad()
def test_other_ways_of_turning_keys_are_found_by_trying(family: str) -> None:
    """Partial, interleaved, in some layers only, scaled: the past in front equals the unsplit sequence."""
    over = {"head_dim": 8} if family in ("gemma2", "glm") else {}
    over |= {"sliding_window": 64} if family in ("gemma2", "cohere2", "exaone4") else {}
    config = CONFIG_MAPPING[family](**{**FAMILIES["llama"], **over})
    base, ids = AutoModelForCausalLM.from_config(config).double().eval(), tokens(1, 4 * SEGMENT)
    plain = base(ids).logits
    model = MemLMForCausalLM.from_base(
        base, memory=TransformerXLConfig(memory_length=40), segment_length=SEGMENT
    )
    torch.testing.assert_close(model(ids).logits, plain, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("memory", ["titans-mac", "transformer-xl", "compressive"])
def test_an_attention_without_a_mask_for_each_query_is_refused(memory: str) -> None:
    backbone = Backbone(base_model("llama"))
    check_attention([CASES[memory]], backbone, backbone.dims(SEGMENT))
    # As a base loaded with it has it; transformers refuses to build one where it is not installed.
    backbone.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"attn_implementation='flash_attention_2'.*'sdpa'"):
        check_attention([CASES[memory]], backbone, backbone.dims(SEGMENT))


def test_a_window_that_would_hide_the_context_is_refused() -> None:
    base = base_model("gemma3_text", sliding_window=SEGMENT)
    with pytest.raises(ValueError, match=r"sliding window of 6 in layers \[0\].*layers=\(1,\)"):
        MemLMForCausalLM.from_base(base, memory="titans-mac", segment_length=SEGMENT)
    model = MemLMForCausalLM.from_base(
        base, memory=TitansMACConfig(layers=(1,)), segment_length=SEGMENT
    )
    assert model(tokens(1, 2 * SEGMENT)).logits.isfinite().all()


# A state is looked through whatever made it; that of memory-caching is of several parts.
@pytest.mark.parametrize("memory", by_default(CASES, (*A_SITE_EACH, "memory-caching")))
def test_a_state_that_is_not_finite_names_layer_and_segment(memory: str, monkeypatch) -> None:
    config = CASES[memory]
    base = base_model(standing(memory, "llama"))
    model = MemLMForCausalLM.from_base(base, memory=config, segment_length=SEGMENT)
    cells = [cell for found in model.memory.cells().values() for cell in found]
    last, calls = cells[-1], []
    forward = type(last.memory).forward

    def broken(self, x, state, inner, **kwargs):
        y, new = forward(self, x, state, inner, **kwargs)
        if self is last.memory:
            calls.append(None)
            if len(calls) == 3:
                spoilt = {new._fields[0]: _spoilt(new[0])}
                new = new._replace(**spoilt)
        return y, new

    monkeypatch.setattr(type(last.memory), "forward", broken)
    where = "layer 1" if last.memory.site != "model" else f"memory '{memory}'"
    with pytest.raises(FloatingPointError, match=rf"{where}.* after segment 2 of this call"):
        model(tokens(2, 5 * SEGMENT), bptt_depth=2)


def _spoilt(leaf):
    if not isinstance(leaf, tuple):
        return leaf * torch.nan
    parts = map(_spoilt, leaf)
    return type(leaf)(*parts) if hasattr(leaf, "_fields") else tuple(parts)


def test_largest_tells_what_is_not_finite() -> None:
    state = MemoryState(
        {"a": torch.tensor([[1.0, -3.0]]), "b": torch.zeros(1, 0), "c": torch.ones(1).long()}, 1
    )
    assert state.largest().tolist() == [3.0]
    state = MemoryState({"a": torch.tensor([[1.0, torch.nan]]), "b": torch.ones(1)}, 1)
    assert state.largest().isfinite().tolist() == [False, True]


@pytest.mark.parametrize(
    "first",
    [
        "import memlm; from transformers import LlamaForCausalLM, AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import memlm",
    ],
)
def test_a_configuration_suffices_for_the_auto_classes(first: str) -> None:
    code = (
        f"{first}\n"
        "import sys\n"
        "assert 'memlm.modeling' not in sys.modules\n"
        "from transformers import AutoConfig\n"
        "text = {'model_type': 'gpt2', 'n_embd': 8, 'n_head': 2, 'n_layer': 1, 'vocab_size': 9,\n"
        "        'bos_token_id': 1, 'eos_token_id': 2}\n"
        "config = AutoConfig.for_model('memlm', text_config=text, memory=[{'name': 'armt'}])\n"
        "model = AutoModelForCausalLM.from_config(config)\n"
        "assert type(model).__name__ == 'MemLMForCausalLM'\n"
        "assert AutoModelForCausalLM._model_mapping[type(config)] is type(model)\n"
    )
    run_fresh(code)


def test_any_module_may_be_imported_first() -> None:
    """transformers' Auto classes know the model whichever way the package was entered."""
    code = (
        "import importlib, sys\n"
        "assert 'transformers.models.auto.configuration_auto' not in sys.modules\n"
        "importlib.import_module(sys.argv[1])\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "config = AutoConfig.for_model('memlm')\n"
        "from memlm import MemLMForCausalLM\n"
        "assert AutoModelForCausalLM._model_mapping[type(config)] is MemLMForCausalLM\n"
    )
    for module in ("memlm.backbone", "memlm.attach", "memlm.config"):
        run_fresh(code, module)


OPTIONS = {
    "armt": {"initial_gate": 1.0, "value_std": 0.1, "shared_start": True, "write_cost": 0.5},
    "compressive": {"reconstruction_weight": 0.0},
    "knn": {"top_k": 2, "min_similarity": 0.1},
    "rmt-r": {"recall": 2},
    "titans-mal": {"initial_rate": 0.1, "output_std": 0.2},
}
SHAPING = {
    "armt": {"correction": False},
    "infini": {"update": "linear"},
    "knn": {"capacity": 30},
    "transformer-xl": {"memory_length": 7},
}


def stacked(config) -> MemLMForCausalLM:
    return MemLMForCausalLM.from_base(base_model("llama"), memory=config, segment_length=SEGMENT)


@pytest.mark.parametrize("memory", OPTIONS)
def test_a_state_goes_on_under_other_options(memory: str) -> None:
    """How parameters start, what training costs and how much is read is no part of a state."""
    state = stacked(CASES[memory])(tokens(1, SEGMENT)).memory_state
    other = stacked(replace(CASES[memory], **OPTIONS[memory]))
    assert other(tokens(1, SEGMENT), memory_state=state).memory_state.batch_size == 1


@pytest.mark.parametrize("memory", SHAPING)
def test_a_state_of_another_meaning_is_refused(memory: str) -> None:
    state = stacked(CASES[memory])(tokens(1, SEGMENT)).memory_state
    other = stacked(replace(CASES[memory], **SHAPING[memory]))
    with pytest.raises(ValueError, match="another model's"):
        other(tokens(1, SEGMENT), memory_state=state)


def test_signatures_of_the_first_version_are_read() -> None:
    """They held every field; one that came later had no say then, and has its default."""
    model = stacked(CASES["armt"])
    old = json.dumps([*model.memory.configs, 32, 2])
    assert old != model.memory.signature and model.memory.signed(old)
    fewer = [{k: v for k, v in model.memory.configs[0].items() if k != "nu"}]
    assert model.memory.signed(json.dumps([*fewer, 32, 2]))
    wider = [{**model.memory.configs[0], "d_mem": 9}]
    unknown = [{**model.memory.configs[0], "of_tomorrow": 1}]
    for other in (json.dumps([*wider, 32, 2]), json.dumps([*unknown, 32, 2]), "[]", "no JSON", "5"):
        assert not model.memory.signed(other)


def test_a_memory_of_one_s_own_is_known_by_a_config_of_its_own(monkeypatch) -> None:
    """Otherwise the one it derives from would be built in its place."""
    monkeypatch.setattr(memlm.memory, "_MECHANISMS", dict(memlm.memory._MECHANISMS))
    armt = memory_class("armt")

    class Inherits(armt):
        pass

    class Own(armt):
        class Config(ARMTConfig):
            pass

    with pytest.raises(ValueError, match=r"Inherits.Config is that of 'armt'.*ARMTConfig"):
        register_memory("mine", Inherits)
    for wrong in (dict, armt.Config, "armt"):
        with pytest.raises(TypeError, match="give a subclass of Memory"):
            register_memory("mine", wrong)
    Own.Config = None
    with pytest.raises(TypeError, match=r"Own.Config=None must be a subclass of MemoryConfig"):
        register_memory("mine", Own)


@pytest.mark.parametrize(
    ("spoil", "left"),
    [
        (
            lambda state: state._replace(keys=torch.cat([state.keys] * 2, 2)),
            r"left mine.*, 8, .*has",
        ),
        (lambda state: state.keys, r"left mine.0 \(.*mine.0.keys"),
        (lambda state: (), "left nothing"),
    ],
    ids=["grown", "a tensor", "empty"],
)
@pytest.mark.parametrize("schedule", ["sequential", "wavefront"])
def test_a_state_of_another_form_than_it_began_with_is_refused(
    monkeypatch, spoil, left: str, schedule: str
) -> None:
    """A memory of one's own may be wrong: its state would grow with the document, or be lost."""
    monkeypatch.setattr(memlm.memory, "_MECHANISMS", dict(memlm.memory._MECHANISMS))
    cached = memory_class("transformer-xl")

    class Spoilt(cached):
        class Config(TransformerXLConfig):
            pass

        def forward(self, x, state, inner, *, mask, write=True):
            y, new = super().forward(x, state, inner, mask=mask, write=write)
            return y, spoil(new)

    register_memory("mine", Spoilt)
    memory = Spoilt.Config(memory_length=4)
    # The wavefront is tried out when the model is made.
    with pytest.raises(ValueError, match=left):
        MemLMForCausalLM.from_base(base_model("llama"), memory, SEGMENT, schedule=schedule)(
            tokens(1, 3 * SEGMENT)
        )
