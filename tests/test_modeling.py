"""MemLMForCausalLM: construction, arguments, errors, adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

import memlm.memory
from memlm import MemLMConfig, MemLMForCausalLM, MemoryState
from memlm.memory import ARMTConfig, RMTConfig, available_memories
from tests.cases import FAMILIES, SEGMENT, base_model, memory_model, randomise, tokens
from tests.fresh import run_fresh


def test_names_are_discovered_from_files() -> None:
    files = {path.stem for path in Path(memlm.memory.__file__).parent.glob("*.py")}
    files -= {"__init__", "base"}
    assert available_memories() == ("none", *sorted(name.replace("_", "-") for name in files))
    # Names that others' code and files use.
    assert {"armt", "rmt", "rmt-r", "titans-mac", "gated-delta", "knn"} <= set(available_memories())


def test_from_base_takes_a_model_a_config_or_a_path(tmp_path) -> None:
    base = base_model("llama")
    base.save_pretrained(tmp_path / "base")
    ids = tokens(1, 9)
    live = MemLMForCausalLM.from_base(base, memory="none", segment_length=4)
    loaded = MemLMForCausalLM.from_base(
        str(tmp_path / "base"), memory="none", segment_length=4, dtype=torch.float64
    )
    torch.testing.assert_close(loaded(ids).logits, live(ids).logits, rtol=0, atol=1e-10)
    fresh = MemLMForCausalLM.from_base(
        LlamaConfig(**FAMILIES["llama"]), memory=ARMTConfig(layers=(1,)), segment_length=4
    )
    assert list(fresh.memory.attached["armt"].cells) == ["1"]
    assert fresh(ids).logits.shape == (1, 9, 61)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ("armd", "did you mean 'armt'"),
        ({"name": "armt", "num_memory_token": 3}, "did you mean 'num_memory_tokens'"),
    ],
)
def test_unknown_memories_and_fields_name_the_nearest(memory, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemLMForCausalLM.from_base(base_model("llama"), memory=memory, segment_length=8)


def test_configs_survive_json(tmp_path) -> None:
    model = memory_model("gpt2", ["rmt", ARMTConfig(layers=(1,), d_mem=4)])
    model.config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MemLMConfig)
    assert config.memory == model.config.memory
    assert config.segment_length == SEGMENT
    assert config.text_config.model_type == "gpt2"
    assert (config.vocab_size, config.hidden_size, config.eos_token_id) == (61, 32, 2)


def test_a_newer_checkpoint_is_refused(tmp_path) -> None:
    model = memory_model("llama", "armt")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["memlm_version"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="upgrade memlm"):
        MemLMForCausalLM.from_pretrained(tmp_path)


def test_a_live_lora_survives_wrapping() -> None:
    from peft import LoraConfig, get_peft_model

    model = memory_model("llama", "armt")
    with torch.no_grad():
        before = model(tokens(1, 9)).logits
    lora = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        torch.testing.assert_close(lora(tokens(1, 9)).logits, before, rtol=0, atol=1e-6)


# peft before 0.21 says so of every base that has no name.
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_lora_inside_the_wrapper_trains_and_saves(tmp_path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    ids = tokens(2, 3 * SEGMENT)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["memory"], task_type="CAUSAL_LM"
    )
    lora = get_peft_model(memory_model("llama", "armt"), config)
    lora.train()
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = lora(ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    trained = [
        n for n, p in lora.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    ]
    assert any("lora_B" in n for n in trained) and any("memory" in n for n in trained)
    assert not any("base_layer" in n for n in trained)
    assert losses[-1] < losses[0]
    lora.eval()
    with torch.no_grad():
        expected = lora(ids).logits
    lora.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(memory_model("llama", "armt"), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=1e-6)
        greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(
            lora.generate(input_ids=ids, **greedy), again.generate(input_ids=ids, **greedy)
        )


def test_wrapping_a_base_that_holds_lora_keeps_its_weights() -> None:
    from peft import LoraConfig, get_peft_model

    base = base_model("llama")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    MemLMForCausalLM.from_base(base, memory="armt", segment_length=4)
    assert all(p.abs().sum() == 0 for n, p in base.named_parameters() if "lora_B" in n)


def test_freeze_base_leaves_the_memory_trainable() -> None:
    model = memory_model("llama", "armt")
    model.freeze_base()
    model(tokens(1, 13), labels=tokens(1, 13)).loss.backward()
    assert all(p.grad is None for p in model.base.parameters())
    assert all(p.grad is not None for p in model.memory.parameters())


def test_resized_embeddings_round_trip(tmp_path) -> None:
    model = memory_model("llama", "rmt")
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path)
    loaded = MemLMForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded(tokens(1, 9)).logits.shape[-1] == 70


def test_logits_only_where_asked() -> None:
    model, ids = memory_model("llama", "armt"), tokens(2, 3 * SEGMENT + 2)
    full = model(ids).logits
    assert model(ids, logits_to_keep=None).logits is None
    for keep in (1, 4, SEGMENT + 3, 100):
        torch.testing.assert_close(
            model(ids, logits_to_keep=keep).logits, full[:, -keep:], rtol=0, atol=1e-10
        )


def test_loss_is_the_mean_over_all_labels_whatever_the_windows() -> None:
    model, ids = memory_model("llama", "armt"), tokens(2, 4 * SEGMENT + 1)
    labels = ids.clone()
    labels[:, 1:9] = -100
    logits = model(ids).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 61), labels[:, 1:].reshape(-1)
    )
    for depth in (None, 1, 3):
        torch.testing.assert_close(model(ids, labels=labels, bptt_depth=depth).loss, expected)
    nothing = model(ids, labels=torch.full_like(ids, -100)).loss
    assert nothing.item() == 0.0 and nothing.requires_grad


def test_tuples_for_those_who_want_them() -> None:
    model, ids = memory_model("llama", "armt"), tokens(1, 5)
    assert len(model(ids, labels=ids, return_dict=False)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": None}, "input_ids is missing"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "at least one row and one token"),
        ({"input_ids": torch.zeros(5, dtype=torch.long)}, r"shape \(5,\)"),
        ({"input_ids": torch.zeros(1, 5)}, "integer token ids"),
        ({"labels": torch.zeros(1, 4, dtype=torch.long)}, "labels has shape"),
        ({"attention_mask": torch.ones(2, 5)}, "attention_mask has shape"),
        ({"attention_mask": torch.zeros(1, 5)}, "0 everywhere"),
        ({"memory_state": MemoryState({}, 1, "other")}, "another model's"),
        ({"memory_state": MemoryState({}, 1)}, "does not fit"),
        ({"logits_to_keep": -1}, "logits_to_keep=-1"),
        ({"bptt_depth": -2}, "bptt_depth=-2"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict, message: str) -> None:
    model = memory_model("llama", "armt")
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": torch.ones(1, 5, dtype=torch.long), **arguments})


def test_a_state_of_another_batch_size_is_refused() -> None:
    model = memory_model("llama", "armt")
    with pytest.raises(ValueError, match="2 rows, but input_ids has 1"):
        model(tokens(1, 5), memory_state=model.init_state(2))


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="inputs_embedz"):
        memory_model("llama", "armt")(tokens(1, 5), inputs_embedz=1)


@pytest.mark.parametrize(
    ("memory", "length", "message"),
    [
        (RMTConfig(num_memory_tokens=16), 8, "too small for num_memory_tokens=16"),
        ("armt", 64, "64 positions; use at most 48"),
        ("none", 0, "segment_length=0"),
        ("none", 65, "too large"),
        ("none", 2.5, "segment_length=2.5"),
    ],
)
def test_segments_that_do_not_fit_are_refused(memory, length, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemLMForCausalLM.from_base(base_model("gpt2"), memory=memory, segment_length=length)


def test_wrapping_twice_or_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="already has memories"):
        MemLMForCausalLM.from_base(memory_model("llama", "armt"))
    with pytest.raises(TypeError, match="not a transformers model"):
        MemLMForCausalLM.from_base(torch.nn.Linear(2, 2))


def test_load_memory_refuses_another_memory_and_damage(tmp_path) -> None:
    model = memory_model("llama", "armt")
    model.save_memory(tmp_path)
    before = {n: p.clone() for n, p in model.memory.state_dict().items()}
    with pytest.raises(ValueError, match="memory="):
        memory_model("llama", "rmt").load_memory(tmp_path)
    with pytest.raises(FileNotFoundError, match="memlm_config"):
        model.load_memory(tmp_path / "nowhere")
    weights = tmp_path / "memory.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    randomise(model.memory, seed=4)
    changed = {n: p.clone() for n, p in model.memory.state_dict().items()}
    with pytest.raises(ValueError, match="damaged"):
        model.load_memory(tmp_path)
    assert all(torch.equal(changed[n], p) for n, p in model.memory.state_dict().items())
    assert any(not torch.equal(before[n], p) for n, p in model.memory.state_dict().items())


@pytest.mark.parametrize(
    "order",
    [
        "import memlm\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport memlm",
        "import memlm\nimport transformers\nfrom memlm import DocumentStream\n"
        "from transformers import AutoModelForCausalLM",
    ],
)
def test_auto_classes_know_the_model_after_import_memlm(tmp_path, order: str) -> None:
    memory_model("llama", "armt").save_pretrained(tmp_path)
    code = f"{order}\nprint(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)"
    assert run_fresh(code).strip() == "MemLMForCausalLM"


@pytest.mark.parametrize("how", ["missing", "unexpected", "shape", "kind"])
def test_a_memory_that_is_refused_changes_nothing(tmp_path, how: str) -> None:
    from safetensors.torch import load_file, save_file

    model = memory_model("llama", ["armt", "infini"])
    model.save_memory(tmp_path)
    tensors = load_file(tmp_path / "memory.safetensors")
    last = sorted(tensors)[-1]
    if how == "missing":
        del tensors[last]
    elif how == "unexpected":
        tensors["attached.other"] = torch.zeros(1)
    elif how == "shape":
        tensors[last] = torch.zeros(2, *tensors[last].shape)
    else:
        tensors[last] = torch.zeros(tensors[last].shape, dtype=torch.int8)
    save_file(tensors, tmp_path / "memory.safetensors")
    # As by a version without checksums, so that the tensors themselves are looked at.
    description = json.loads((tmp_path / "memlm_config.json").read_text())
    description = {k: v for k, v in description.items() if "checksum" not in k and "sha" not in k}
    (tmp_path / "memlm_config.json").write_text(json.dumps(description))
    randomise(model.memory, seed=4)
    before = {n: p.clone() for n, p in model.memory.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit"):
        model.load_memory(tmp_path)
    assert all(torch.equal(before[n], p) for n, p in model.memory.state_dict().items())


def test_a_field_the_file_does_not_name_takes_its_default(tmp_path) -> None:
    """A later version's field must not shut out what an earlier one wrote."""
    model = memory_model("llama", "armt")
    model.save_memory(tmp_path)
    path = tmp_path / "memlm_config.json"
    described = json.loads(path.read_text())
    del described["memory"][0]["write_cost"]
    path.write_text(json.dumps(described))
    model.load_memory(tmp_path)
    described["memory"][0]["d_mem"] = 5
    path.write_text(json.dumps(described))
    # Of some twenty fields the one that differs is named.
    with pytest.raises(
        ValueError, match=r"memory=\[{'name': 'armt', 'd_mem': 5}\], but this model"
    ):
        model.load_memory(tmp_path)


def test_a_tied_base_stays_tied_under_peft() -> None:
    """Tokens trained by themselves change what is said, too, and stay what they were when merged."""
    from peft import LoraConfig, get_peft_model

    config = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    found, ids = [], tokens(1, SEGMENT - 1)
    for wrapped in (False, True):
        base = base_model("llama", tie_word_embeddings=True).eval()
        model = MemLMForCausalLM.from_base(base, None, SEGMENT).eval() if wrapped else base
        assert not wrapped or model.config.tie_word_embeddings
        lora = get_peft_model(
            model, LoraConfig(**config, trainable_token_indices=ids[0, :3].tolist())
        )
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in lora.named_parameters():
                if "trainable_tokens_delta" in name:
                    parameter.add_(torch.randn_like(parameter))
            found.append(lora(input_ids=ids).logits)
            torch.testing.assert_close(lora.merge_and_unload()(ids).logits, found[-1])
    torch.testing.assert_close(*found)
    assert not memory_model("llama", "armt").config.tie_word_embeddings
