"""A save that is interrupted anywhere: the model that was there before, or the new one."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers.modeling_utils
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import memlm.saving
from memlm import MemLMConfig, MemLMForCausalLM, folders
from memlm.folders import PENDING, finish_replacing
from memlm.train.trainer import MemLMTrainer
from tests.cases import memory_model
from tests.test_kills import counted, dying, finish, start
from tests.tokenizers import tokenizer
from tests.train.test_resume import made

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")

# As many parts as a save can have beside each other; the tiny model is 30 kB.
SIZES = {"whole": "50GB", "in parts": "12KB"}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    # A kill leaves what was given to the system; a power cut cannot be tried here.
    monkeypatch.setattr(os, "fsync", lambda _: None)


def generation(number: int, model: MemLMForCausalLM | None = None) -> MemLMForCausalLM:
    """A model whose every weight, and whose configuration, says of which save it is."""
    model = model or memory_model("llama", "armt", num_hidden_layers=1)
    model.config.question_template = f"{number}: {{question}}"
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, number)
    return model


def generation_of(model: MemLMForCausalLM) -> int:
    number = int(model.config.question_template.split(":")[0])
    for name, parameter in model.named_parameters():
        assert (parameter == number).all(), name
    return number


def load(folder: Path) -> int:
    """The generation in a folder, which is all of that one; asked as any user of transformers does."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        if "load the model again" not in str(error):
            raise
        model = AutoModelForCausalLM.from_pretrained(folder)
    return generation_of(model)


def save(folder: Path, number: int, size: str) -> None:
    generation(number).save_pretrained(folder, max_shard_size=size)


def stopped(place: Any, name: str, call: int, work: Callable[..., None], *arguments: Any) -> None:
    """Do a work, and die at a call of one function; a file that it was to write is half there."""
    function, calls = getattr(place, name), count()

    def instead(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            for given in args if "save_file" in name else ():
                if isinstance(given, str | Path):
                    Path(given).write_bytes(b"\x08" + bytes(99))
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(place, name, instead)
    work(*arguments)


# What a save does, one part after the other.
PARTS: dict[str, tuple[Any, str]] = {
    "configuration": (MemLMConfig, "save_pretrained"),
    "settings of generation": (GenerationConfig, "save_pretrained"),
    "weights": (transformers.modeling_utils, "safe_save_file"),
    "on disk": (folders, "put_on_disk"),
    "whole": (os, "rename"),
    "into place": (os, "replace"),
    "what is superseded": (Path, "unlink"),
    "card": (memlm.saving, "write_card"),
}


@pytest.mark.parametrize(
    ("before", "after"),
    [("whole", "in parts"), pytest.param("in parts", "whole", marks=pytest.mark.slow)],
)
def test_a_model_whose_save_is_killed_is_the_old_or_the_new_one(
    tmp_path: Path, before: str, after: str
) -> None:
    seen: dict[str, set[int]] = {}
    save(old := tmp_path / "old", 1, SIZES[before])
    for part, (place, name) in PARTS.items():
        for call in count(step=4 if part == "on disk" else 1):
            shutil.copytree(old, folder := tmp_path / f"{part}-{call}")
            work = (stopped, place, name, call, save, folder, 2, SIZES[after])
            ended = finish(start(*work))
            found = load(folder)
            seen.setdefault(part, set()).add(found)
            assert not (folder / PENDING).exists()
            if ended == 0:
                assert found == 2 and call > 0, part
                break
            assert ended == -signal.SIGKILL
    for part in ("configuration", "settings of generation", "weights", "on disk"):
        # The last is of the work that went through.
        assert seen[part] == {1, 2}, part
    assert seen["card"] == {2}


def adapter(folder: Path, number: int) -> None:
    model = generation(number)
    if number == 1:
        with_lora(model)
    model.save_adapter(folder)


def with_lora(model: MemLMForCausalLM) -> MemLMForCausalLM:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    inject_adapter_in_model(config, model.base)
    return model


def test_an_adapter_whose_save_is_killed_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = memory_model("llama", "armt", num_hidden_layers=1).unload()
    parts = {n: PARTS[n] for n in ("whole", "into place", "what is superseded", "card")}
    parts["weights"] = safetensors.torch, "save_file"
    seen = set()
    adapter(old := tmp_path / "old", 1)
    assert (old / "adapter_config.json").exists()
    for part, (place, name) in parts.items():
        for call in count():
            shutil.copytree(old, folder := tmp_path / f"{part}-{call}")
            ended = finish(start(stopped, place, name, call, adapter, folder, 2))
            model = MemLMForCausalLM.from_adapter(folder, base)
            number = int(model.config.question_template.split(":")[0])
            assert all((value == number).all() for value in model.memory.parameters()), part
            # The first has LoRA; what is left of it must not get onto the base of the second.
            assert hasattr(model.base, "peft_config") == (number == 1), part
            seen.add(number)
            base = memory_model("llama", "armt", num_hidden_layers=1).unload()
            if ended == 0:
                assert number == 2 and call > 0, part
                break
    assert seen == {1, 2}


def test_a_lora_that_is_damaged_or_of_another_adapter_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    for number, name in enumerate(("mine", "other")):
        model = with_lora(memory_model("llama", "armt", num_hidden_layers=1))
        for parameter in model.base.parameters():
            parameter.data += number
        model.save_adapter(tmp_path / name)
    base = memory_model("llama", "armt", num_hidden_layers=1).unload()
    file = tmp_path / "mine" / "adapter_model.safetensors"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 0x40
    for content in (flipped, whole[:-4], (tmp_path / "other" / file.name).read_bytes()):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="save the adapter again"):
            MemLMForCausalLM.from_adapter(tmp_path / "mine", base)
    file.unlink()
    with pytest.raises(ValueError, match="save the adapter again"):
        MemLMForCausalLM.from_adapter(tmp_path / "mine", base)
    file.write_bytes(whole)
    assert hasattr(MemLMForCausalLM.from_adapter(tmp_path / "mine", base).base, "peft_config")


def test_an_error_in_a_save_leaves_the_model_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, SIZES["whole"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, SIZES["in parts"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_reader_that_has_the_old_configuration_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, SIZES["whole"])
    with monkeypatch.context() as patch:
        patch.setattr(folders, "finish_replacing", lambda _: [])  # nothing is moved
        save(tmp_path, 2, SIZES["whole"])
    assert (tmp_path / PENDING).is_dir()
    with pytest.raises(ValueError, match="the configuration is another one: load the model again"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert load(tmp_path) == 2
    assert finish_replacing(tmp_path) == []


def test_weights_of_another_kind_do_not_outlive_a_save(tmp_path: Path) -> None:
    for number, size in enumerate(("whole", "in parts", "whole"), start=1):
        save(tmp_path, number, SIZES[size])
        kept = {path.name for path in tmp_path.glob("model*")}
        assert ("model.safetensors" in kept) == (size == "whole") == (len(kept) == 1)
        assert load(tmp_path) == number
    (tmp_path / "model-of-mine.safetensors").write_text("mine")
    save(tmp_path, 4, SIZES["whole"])
    assert (tmp_path / "model-of-mine.safetensors").exists()


# --- what the Trainer writes


def trainer_of(folder: Path) -> MemLMTrainer:
    run = made(folder / "run", "documents")
    run.processing_class = tokenizer("byte-bpe")
    return run


def test_what_the_trainer_saves_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    run, seen = trainer_of(tmp_path), set()
    places = [
        (torch, "save"),
        (type(run.processing_class), "save_pretrained"),
        (os, "rename"),
        (os, "replace"),
        (transformers.modeling_utils, "safe_save_file"),
    ]

    def again(folder: Path, number: int) -> None:
        generation(number, run.model)
        run.processing_class.model_max_length = number
        run.save_model(str(folder))

    again(old := tmp_path / "old", 1)
    (old / "README.md").write_text("Mine.\n" + (old / "README.md").read_text())
    for place, name in places:
        for call in range(0, 99, 4 if name == "replace" else 1):
            shutil.copytree(old, folder := tmp_path / f"{name}-{call}")
            ended = finish(start(stopped, place, name, call, again, folder, 2))
            number = load(folder)
            assert AutoTokenizer.from_pretrained(folder).model_max_length == number
            card = (folder / "README.md").read_text()
            assert "Mine." in card and (ended or f"{name}-{call}" in card)
            seen.add(number)
            if ended == 0:
                assert number == 2 and call > 0
                break
    assert seen == {1, 2}


# --- kills at any moment


def save_thrice(folder: Path) -> None:
    for number in (1, 2, 3):
        save(folder, number, SIZES["in parts" if number == 2 else "whole"])


def kill_saving(folder: Path, times: int) -> int:
    """Kill saves at random moments; returns after how many there was a model, whole each time."""
    rng, found = random.Random(0), 0
    assert finish(start(counted, save_thrice, folder / "whole")) == 0
    calls = int((folder / "whole.calls").read_text())
    for number in range(times):
        place = folder / str(number)
        moment = rng.randrange(calls // 3, calls)
        assert finish(start(dying, moment, save_thrice, place)) == -signal.SIGKILL
        if (place / "config.json").exists():
            assert load(place) in (1, 2, 3)
            found += 1
    return found


def test_a_save_killed_at_any_moment_leaves_a_whole_model(tmp_path: Path) -> None:
    assert kill_saving(tmp_path, 2) == 2


@pytest.mark.slow
def test_twenty_killed_saves_leave_whole_models(tmp_path: Path) -> None:
    assert kill_saving(tmp_path, 20) > 15


def test_shards_are_read_as_they_were_written(tmp_path: Path) -> None:
    model = memory_model("llama", "armt", num_hidden_layers=1)
    model.save_pretrained(tmp_path, max_shard_size=SIZES["in parts"])
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    written = {n: v for path in tmp_path.glob("*.safetensors") for n, v in load_file(path).items()}
    for name, value in model.state_dict().items():
        if name in written:
            assert torch.equal(written[name], value)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in model.state_dict().items())
