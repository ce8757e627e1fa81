"""Model cards, adapters and uploads: what is written beside the weights, and that it is true."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from memlm import MemLMForCausalLM
from memlm.card import BEGIN, END, write_card
from memlm.cli import main
from tests.cases import FAMILIES, randomise, tokens
from tests.tokenizers import TEXT, tokenizer
from tests.written import make
from tests.written.make import base_for

pytestmark = pytest.mark.usefixtures("unpainted")
WRITTEN = Path(make.__file__).parent
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def base(tmp_path) -> Path:
    """A saved base model with a card that states its licence."""
    path = tmp_path / "base"
    torch.manual_seed(0)
    tok = tokenizer("byte-bpe")
    LlamaForCausalLM(LlamaConfig(**{**FAMILIES["llama"], "vocab_size": len(tok)})).save_pretrained(
        path
    )
    tok.save_pretrained(path)
    (path / "README.md").write_text("---\nlicense: mit\n---\nA base.\n", encoding="utf-8")
    return path


@pytest.fixture
def model(base) -> MemLMForCausalLM:
    made = MemLMForCausalLM.from_base(str(base), memory="armt", segment_length=16).eval()
    randomise(made.memory)
    return made


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def summary(accuracy: float, baseline: str = "memory", length: str = "4k") -> str:
    cell = {"task": "qa1", "length": length, "samples": 4, "correct": int(4 * accuracy)}
    return json.dumps(
        {
            "cells": [{**cell, "tokens": 4 * (4096 if length == "4k" else 2**20)}],
            "settings": {"baseline": baseline, "haystack": "builtin", "seed": 0},
        }
    )


def test_a_saved_model_has_a_card_that_says_what_it_is(model, tmp_path) -> None:
    model.save_pretrained(tmp_path / "mine")
    card = card_of(tmp_path / "mine")
    assert card.data.library_name == "memlm" and card.data.pipeline_tag == "text-generation"
    assert card.data.license == "mit"
    assert {"memlm", "armt"} <= set(card.data.tags)
    # The base is a folder of this machine: its name is told, its place is not, and it is no id of the hub.
    assert card.data.base_model is None and str(tmp_path) not in card.content
    assert "| base | base (llama) |" in card.text
    assert "| segment length | 16 tokens |" in card.text and "| memory | armt (" in card.text
    memory = sum(parameter.numel() for parameter in model.memory.parameters())
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert f"| parameters | memory {memory:,}, base {whole - memory:,} |" in card.text


def test_the_code_on_the_card_runs(model, tmp_path, monkeypatch, capsys) -> None:
    model.save_pretrained(tmp_path / "mine")
    tokenizer("byte-bpe").save_pretrained(tmp_path / "mine")
    model.save_adapter(tmp_path / "adapter")
    tokenizer("byte-bpe").save_pretrained(tmp_path / "adapter")
    write_card(tmp_path / "adapter")
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", "adapter"):
        (code,) = CODE.findall(card_of(tmp_path / folder).text)
        assert code.startswith("import memlm\n")
        exec(compile(code, folder, "exec"), {})
    whole, adapter = capsys.readouterr().out.splitlines()
    assert whole == adapter


def test_only_what_was_changed_is_told_of_a_memory(base, tmp_path) -> None:
    memory = {"name": "armt", "num_memory_tokens": 3, "layers": [1]}
    made = MemLMForCausalLM.from_base(str(base), memory=memory, segment_length=16)
    made.save_pretrained(tmp_path / "mine")
    text = card_of(tmp_path / "mine").text
    assert "layers=[1]" in text and "num_memory_tokens=3" in text and "value_std" not in text


def test_a_base_of_the_hub_is_named_by_its_id(model, tmp_path) -> None:
    model.base.config._name_or_path = "org/some-base"
    model.save_pretrained(tmp_path / "mine")
    card = card_of(tmp_path / "mine")
    assert card.data.base_model == "org/some-base" and card.data.license is None
    assert "not stated; that of org/some-base applies" in card.text


def test_the_card_tells_the_recipe_and_no_folder_of_this_machine(model, tmp_path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    recipe = "seed: 3\ndata:\n  path: /home/somebody/secret/contracts.jsonl\n"
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    model.save_pretrained(folder)
    text = card_of(folder).text
    assert "path: contracts.jsonl" in text and "seed: 3" in text and "secret" not in text


def test_measurements_are_told_when_asked_for_and_not_of_weights_just_saved(
    model, tmp_path, capsys
) -> None:
    folder = tmp_path / "mine"
    for name, content in (
        ("a", summary(1.0, length="1M")),
        ("b", summary(0.75)),
        ("c", summary(0.25, "last-tokens")),
        ("d", "{}"),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "summary.json").write_text(content, encoding="utf-8")
    model.save_pretrained(folder)
    assert "Nothing is stored" in card_of(folder).text
    assert main(["card", str(folder), "--license", "apache-2.0"]) == 0
    assert str(folder / "README.md") in capsys.readouterr().out
    card = card_of(folder)
    # Shorter lengths first, whatever the folders are called.
    assert "| task | 4k | 1M |" in card.text and "| qa1 | 75 (4) | 100 (4) |" in card.text
    assert "| qa1 | 25 (4) |" in card.text
    assert "baseline last-tokens" in card.text
    # Metadata are about the model alone, and a licence that was given stays.
    results = [(result.dataset_name, result.metric_value) for result in card.data.eval_results]
    assert results == [("qa1 at 4k", 0.75), ("qa1 at 1M", 1.0)]
    model.save_pretrained(folder)
    card = card_of(folder)
    assert card.data.license == "apache-2.0" and card.data.eval_results is None


def test_what_somebody_wrote_around_the_card_is_kept(model, tmp_path) -> None:
    folder = tmp_path / "mine"
    model.save_pretrained(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    text = text.replace("---\n# mine", "language: de\n---\n# A better title")
    text = text.replace("| segment length | 16 tokens |", "") + "\nThanks to \\1 everybody.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    model.save_pretrained(folder)
    card = card_of(folder)
    assert "# A better title" in card.text and card.text.endswith("Thanks to \\1 everybody.\n")
    assert "| segment length | 16 tokens |" in card.text and card.data.language == "de"
    assert card.text.count(BEGIN) == card.text.count(END) == 1


def test_a_readme_without_our_marks_is_left_as_it_is(model, tmp_path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n", encoding="utf-8")
    model.save_pretrained(folder)
    card = card_of(folder)
    assert card.text == "# Mine\n" and card.data.library_name == "memlm"


def test_a_readme_that_cannot_be_read_ends_no_saving_and_is_named(model, tmp_path, caplog) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "README.md").write_text("---\na: [\n---\n# Mine\n", encoding="utf-8")
    model.save_pretrained(folder)
    assert (folder / "model.safetensors").is_file() and "README.md" in caplog.text
    with pytest.raises(ValueError, match="mend or remove it"):
        write_card(folder)
    with pytest.raises(ValueError, match="holds no model of memlm"):
        write_card(tmp_path)


# Adapters.


@torch.no_grad()
def test_an_adapter_is_put_on_its_base_again(model, base, tmp_path) -> None:
    model.config.question_template = " {question}"
    folder = tmp_path / "adapter"
    model.save_adapter(folder)
    written = sum(path.stat().st_size for path in folder.iterdir())
    assert written < (base / "model.safetensors").stat().st_size
    assert "from_adapter" in card_of(folder).text
    ids = tokens(2, 50)
    for again in (
        MemLMForCausalLM.from_adapter(folder),
        MemLMForCausalLM.from_adapter(folder, LlamaForCausalLM.from_pretrained(base)),
    ):
        assert again.config.question_template == " {question}"
        assert torch.equal(again.eval()(ids).logits, model(ids).logits)


@torch.no_grad()
def test_an_adapter_with_lora_is_put_on_its_base_again(model, base, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    ids, folder = tokens(2, 50), tmp_path / "adapter"
    before = model(ids).logits
    model.base.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    for name, parameter in model.base.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    expected = model(ids).logits
    assert not torch.allclose(expected, before)
    model.save_adapter(folder)
    assert "| LoRA | rank 2" in card_of(folder).text
    again = MemLMForCausalLM.from_adapter(folder).eval()
    torch.testing.assert_close(again(ids).logits, expected)
    # The LoRA alone is peft's own format.
    plain = LlamaForCausalLM.from_pretrained(base)
    alone = peft.PeftModel.from_pretrained(plain, folder)
    torch.testing.assert_close(alone(ids).logits, model.base(ids).logits)


@pytest.mark.parametrize("name", ["armt", "armt-bfloat16", "rmt"])
@torch.no_grad()
def test_memories_that_earlier_versions_wrote_are_adapters(name) -> None:
    folder = WRITTEN / "0.1" / name
    whole = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    base = base_for(whole.config.memory, whole.base.dtype)
    base.load_state_dict(whole.base.state_dict())
    again = MemLMForCausalLM.from_adapter(folder / "memory", base).eval()
    ids = tokens(2, 20)
    # Weights at other addresses may be multiplied in another order.
    tolerance = 2e-2 if whole.base.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(again(ids).logits, whole(ids).logits, rtol=tolerance, atol=tolerance)
    assert again.config.memory_dtype == whole.config.memory_dtype == "base"


def test_a_model_with_lora_in_its_base_is_saved_as_an_adapter(model, tmp_path, caplog) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(model.base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "mine")
    assert "adapter alone is saved" in caplog.text
    assert not (tmp_path / "mine" / "model.safetensors").exists()
    assert (tmp_path / "mine" / "adapter_model.safetensors").is_file()
    MemLMForCausalLM.from_adapter(tmp_path / "mine")
    with pytest.raises(ValueError, match="adapter_only=True"):
        model.save_pretrained(tmp_path / "other", push_to_hub=True)
    # Merged, the base is a plain one again.
    lora.merge_and_unload()
    model.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").is_file()


def test_an_adapter_without_a_base_asks_for_one(model, tmp_path) -> None:
    model.base.config._name_or_path = ""
    model.save_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match="give base"):
        MemLMForCausalLM.from_adapter(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="save_adapter"):
        MemLMForCausalLM.from_adapter("./nowhere")


def test_adapters_around_the_whole_model_are_left_to_peft(model, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="PeftModel around this model"):
        model.save_adapter(tmp_path / "adapter")


# Uploads, with a stand-in for the hub.


@pytest.fixture
def hub(monkeypatch) -> SimpleNamespace:
    """What would have been sent. card: the one that is there already."""
    sent = SimpleNamespace(files={}, card=None, commit=None, private=None, asked=[])

    def create_repo(self, repo_id, *, private=None, exist_ok=False, **_):
        sent.private = private
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **commit):
        files = (p for p in Path(folder_path).rglob("*") if p.is_file())
        sent.files = {str(p.relative_to(folder_path)): p.read_bytes() for p in files}
        sent.repo_id, sent.commit = repo_id, commit
        return "the commit"

    def load(repo_id, **_):
        sent.asked.append(repo_id)
        if repo_id == "org/some-base":
            return ModelCard("---\nlicense: gpl-3.0\n---\nA base.\n")
        if sent.card is None:
            raise EntryNotFoundError("no card")
        return ModelCard(sent.card)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(ModelCard, "load", staticmethod(load))
    return sent


def test_a_pushed_model_has_its_card(model, tmp_path, hub) -> None:
    (tmp_path / "run" / "eval").mkdir(parents=True)
    (tmp_path / "run" / "eval" / "summary.json").write_text(summary(0.5), encoding="utf-8")
    (tmp_path / "run" / "recipe.yaml").write_text("seed: 3\n", encoding="utf-8")
    model.base.config._name_or_path = "org/some-base"
    done = model.push_to_hub("mine", sources=tmp_path / "run", private=True, tags=["extra"])
    assert done == "the commit" and hub.repo_id == "me/mine" and hub.private is True
    assert {"config.json", "model.safetensors", "README.md"} <= hub.files.keys()
    card = ModelCard(hub.files["README.md"].decode())
    assert 'AutoModelForCausalLM.from_pretrained("me/mine")' in card.text
    assert "| qa1 | 50 (4) |" in card.text and "seed: 3" in card.text
    assert card.data.library_name == "memlm" and "extra" in card.data.tags
    # Of a base on the hub, the card there says the licence.
    assert card.data.license == "gpl-3.0" and "licence | gpl-3.0" in card.text


def test_pushing_again_keeps_what_was_written_on_the_hub(model, hub) -> None:
    hub.card = f"---\nlicense: other\n---\n# Title\n{BEGIN}\nold\n{END}\nOur notes.\n"
    model.push_to_hub("mine", commit_message="Better", create_pr=True)
    card = ModelCard(hub.files["README.md"].decode())
    assert card.text.startswith("# Title\n") and card.text.endswith("Our notes.\n")
    assert "old" not in card.text and "me/mine" in card.text and card.data.license == "other"
    assert hub.commit == {"commit_message": "Better", "create_pr": True}


def test_an_adapter_is_pushed_without_its_base(model, hub) -> None:
    model.push_to_hub("mine", adapter_only=True)
    assert set(hub.files) == {"README.md", "memlm_config.json", "memory.safetensors"}
    text = hub.files["README.md"].decode()
    assert 'MemLMForCausalLM.from_adapter("me/mine")' in text


def test_saving_with_push_to_hub_uploads_what_was_saved(model, tmp_path, hub) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "checkpoint.txt").write_text("not for others", encoding="utf-8")
    model.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert hub.repo_id == "me/mine" and "model.safetensors" in hub.files
    assert "checkpoint.txt" not in hub.files and (tmp_path / "mine" / "model.safetensors").is_file()
    with pytest.raises(TypeError, match="max_shards"):
        model.push_to_hub("mine", max_shards=1)


def test_a_model_loaded_from_its_folder_is_the_model_saved(model, tmp_path) -> None:
    model.save_pretrained(tmp_path / "mine")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mine").eval()
    ids = tokens(2, 50)
    assert torch.equal(again(ids).logits, model(ids).logits)
