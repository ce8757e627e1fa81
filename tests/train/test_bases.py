"""The base as a recipe wants it: LoRA that loads by itself, quantisation, its own numbers and rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from memlm import MemLMForCausalLM
from memlm.train import Recipe, train
from memlm.train.bases import add_lora, check_base, loading, quantization_config
from memlm.train.making import make_model
from memlm.train.recipe import ModelSection
from memlm.train.run import prepare
from tests.cases import FAMILIES, memory_model, tokens
from tests.data.test_rows import write
from tests.tokenizers import tokenizer
from tests.train.test_rows import asked
from tests.train.tiny import weights

LORA = {"r": 2, "lora_alpha": 8}
FAST = ["training.learning_rate=0.01", "training.use_cpu=true", "training.warmup_steps=0"]


class StopAfterTwo(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with its tokenizer, and documents with questions."""
    from transformers import CONFIG_MAPPING

    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    config = CONFIG_MAPPING["llama"](**{**FAMILIES["llama"], "vocab_size": 320, "eos_token_id": 2})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    tokenizer("byte-bpe").save_pretrained(folder / "base")
    write(folder, *(asked(n) for n in range(4)))
    return folder


def recipe(own: Path, *overrides: str) -> Recipe:
    return Recipe.for_data(
        str(own / "base"),
        str(own / "my.jsonl"),
        "armt",
        ["model.segment_length=32", "training.gradient_accumulation_steps=1", *FAST, *overrides],
    )


def with_lora(own: Path, *overrides: str) -> Recipe:
    return recipe(own, f"model.lora={json.dumps(LORA)}", "training.max_steps=4", *overrides)


@pytest.fixture(scope="module")
def trained(own: Path) -> Path:
    train(with_lora(own), own / "lora", progress=False)
    return own / "lora"


def test_lora_is_in_the_base_alone_and_the_memory_trains_in_full(own: Path) -> None:
    model = make_model(with_lora(own), AutoTokenizer.from_pretrained(own / "base"))
    names = {name for name, _ in model.memory.named_parameters()}
    add_lora(model, LORA)
    assert {name for name, _ in model.memory.named_parameters()} == names
    assert all(p.requires_grad for p in model.memory.parameters())
    for name, parameter in model.base.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
    layers = len(model.backbone.layers)
    assert sum("lora_A" in name for name, _ in model.base.named_parameters()) == 7 * layers


def test_lora_and_memory_load_by_themselves_and_merged(own: Path, trained: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(own / "base")
    fresh, ids = MemLMForCausalLM.from_base(base, "armt", 32).eval(), tokens(2, 80)
    before = weights(base)
    fresh.load_memory(trained / "adapter")
    without = fresh(ids).logits
    lora = PeftModel.from_pretrained(fresh.base, trained / "adapter")
    together = MemLMForCausalLM.from_adapter(trained / "adapter", own / "base").eval()
    assert together.config.question_segment == "own"
    merged = AutoModelForCausalLM.from_pretrained(trained)
    assert isinstance(merged, MemLMForCausalLM) and merged.config.question_segment == "own"
    with torch.no_grad():
        expected = merged(ids).logits
        assert (expected - without).abs().max() > 1e-3
        torch.testing.assert_close(fresh(ids).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert lora.merge_and_unload() is fresh.base
        torch.testing.assert_close(fresh(ids).logits, expected, rtol=1e-4, atol=1e-4)
    changed = weights(fresh.base)
    assert changed.keys() == before.keys()
    moved = {name for name, value in changed.items() if not torch.equal(value, before[name])}
    assert moved and all("_proj" in name for name in moved)


def test_a_checkpoint_holds_what_is_trained_and_is_resumed_exactly(
    own: Path, trained: Path, tmp_path: Path
) -> None:
    options = ["training.save_steps=2", "training.logging_steps=1"]
    run = prepare(with_lora(own, *options), tmp_path / "out", None)
    run.trainer.add_callback(StopAfterTwo())
    run.trainer.train()
    file = tmp_path / "out" / "checkpoint-2" / "model.safetensors"
    with safe_open(file, "pt") as saved:
        names = set(saved.keys())
    assert names == {n for n, p in run.trainer.model.named_parameters() if p.requires_grad}
    again = prepare(with_lora(own, *options), tmp_path / "out", str(file.parent))
    again.trainer.train(resume_from_checkpoint=str(file.parent))
    assert again.trainer.state.global_step == 4
    again.lora.merge_and_unload()
    unbroken = AutoModelForCausalLM.from_pretrained(trained)
    for name, value in weights(again.trainer.model).items():
        torch.testing.assert_close(value, unbroken.get_parameter(name), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank": 4}, r"model\.lora\.rank is not a field of LoraConfig; did you mean"),
        ({"target_modules": ["q_proj", "qproj"]}, "names 'qproj', .* q_proj"),
        ({"target_modules": "memory.*"}, "does not fit the base"),
    ],
)
def test_lora_that_cannot_work_is_refused(lora: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        add_lora(memory_model("llama", "armt"), lora)


def test_quantisation_is_what_transformers_is_told() -> None:
    four = loading(ModelSection(base="x", quantization="4bit"))["quantization_config"]
    assert four.load_in_4bit and four.bnb_4bit_quant_type == "nf4"
    assert four.bnb_4bit_use_double_quant and four.bnb_4bit_compute_dtype == torch.bfloat16
    half = quantization_config(ModelSection(base="x", quantization="4bit", dtype="float16"))
    assert half.bnb_4bit_compute_dtype == torch.float16
    assert quantization_config(ModelSection(base="x", quantization="8bit")).load_in_8bit
    own = {"load_in_8bit": True, "llm_int8_threshold": 4.0}
    assert quantization_config(ModelSection(base="x", quantization=own)).llm_int8_threshold == 4.0
    with pytest.raises(ValueError, match=r"quantization\.llm_int8_treshold .*llm_int8_threshold"):
        quantization_config(
            ModelSection(quantization={"load_in_8bit": True, "llm_int8_treshold": 1})
        )
    with pytest.raises(ValueError, match="is none of transformers' configurations"):
        quantization_config(ModelSection(quantization={"quant_method": "none-such"}))


def test_a_machine_that_cannot_quantise_is_told_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ImportError("needs bitsandbytes:\n pip install it")

    name = "transformers.quantizers.quantizer_bnb_4bit.Bnb4BitHfQuantizer.validate_environment"
    monkeypatch.setattr(name, refuse)
    with pytest.raises(ValueError, match=r"'4bit' does not work on this machine \(needs bits"):
        check_base(ModelSection(base="x", quantization="4bit"))


@pytest.mark.parametrize(
    ("given", "asked_with"),
    [([], "\n\nQuestion: {question}\nAnswer:"), (["data.question_template=' {question}'"], " {question}")],
)  # fmt: skip
def test_rows_are_asked_in_the_model_s_words_or_in_the_recipe_s(
    own: Path, given: list[str], asked_with: str
) -> None:
    """BABILong's own template, too, counts when a recipe names it."""
    made = recipe(own, *given)
    model = make_model(made, AutoTokenizer.from_pretrained(own / "base"))
    assert model.config.question_template == asked_with
    assert Recipe.from_dict(made.to_dict()) == made


def test_numbers_attention_and_rates_are_the_recipe_s(own: Path) -> None:
    made = recipe(
        own,
        "model.dtype=bfloat16",
        "model.attn_implementation=eager",
        "training.max_steps=2",
        "training.weight_decay=0.1",
        "training.memory_learning_rate=0.5",
        "training.memory_weight_decay=0.25",
        "training.optim=adamw_torch",
    )
    run = prepare(made, own / "rates", None)
    model = run.trainer.model
    assert model.base.dtype == torch.bfloat16
    assert {p.dtype for p in model.memory.parameters()} == {torch.float32}
    assert model.base.config._attn_implementation == "eager"
    optimizer = run.trainer.create_optimizer()
    memory = {id(p) for p in model.memory.parameters()}
    seen = set()
    for group in optimizer.param_groups:
        owned = {id(p) in memory for p in group["params"]}
        assert len(owned) == 1
        assert group["lr"] == (0.5 if owned == {True} else 0.01)
        assert group["weight_decay"] in (0.0, 0.25 if owned == {True} else 0.1)
        seen |= {(owned == {True}, group["weight_decay"])}
    assert {(True, 0.25), (False, 0.1), (False, 0.0)} <= seen
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        list(model.parameters())
    )
    scheduler = run.trainer.create_scheduler(2, optimizer)
    optimizer.step()
    scheduler.step()
    rates = {round(group["lr"] / group["initial_lr"], 6) for group in optimizer.param_groups}
    assert rates == {0.5}


@pytest.mark.parametrize("kind", ["memory", "model"])
def test_a_memory_may_start_from_another_checkpoint(kind: str, own: Path, trained: Path) -> None:
    folder = trained / "adapter" if kind == "memory" else trained
    made = recipe(own, f"model.init_memory={folder}")
    known = AutoTokenizer.from_pretrained(own / "base")
    model = make_model(made, known)
    expected = AutoModelForCausalLM.from_pretrained(trained)
    for name, value in weights(model.memory).items():
        assert torch.equal(value, expected.memory.get_parameter(name))
    with pytest.raises(ValueError, match=r"model\.init_memory=.*was saved with memory"):
        make_model(recipe(own, f"model.init_memory={folder}", "model.memory=rmt"), known)
