"""Whatever stands around the base's modules, every memory runs once per segment, or the call raises."""

from __future__ import annotations

import copy
import subprocess
import sys
import types
from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)

from memlm import MemLMForCausalLM
from memlm.backbone import find_attention, works_on
from memlm.memory import available_memories
from tests.cases import CASES, SEGMENT, base_model, memory_model, randomise, tokens
from tests.memory.test_laws import EXACT, PER_SITE, same_state

CPU = torch.device("cpu")


def hooked(base: nn.Module, folder: str) -> None:
    for layer in base.model.layers:
        add_hook_to_module(layer, AlignDevicesHook(CPU))
    add_hook_to_module(base.model, AlignDevicesHook(CPU, io_same_device=True))


def dispatched(base: nn.Module, folder: str) -> None:
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    dispatch_model(base, places, "cpu", state_dict=base.state_dict(), offload_dir=folder)


PLACEMENTS: dict[str, Callable[[nn.Module, str], object]] = {
    "hooks": hooked,
    "cpu_offload": lambda base, folder: cpu_offload(base, CPU),
    "disk_offload": lambda base, folder: disk_offload(base, folder, CPU),
    "dispatch_model": dispatched,
}


@pytest.mark.filterwarnings("ignore:.*offloaded")
@pytest.mark.parametrize("memory", ["none", "armt", "infini"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", PLACEMENTS)
@torch.no_grad()
def test_memories_run_under_the_hooks_of_accelerate(
    place: str, when: str, memory: str, tmp_path
) -> None:
    ids, expected = tokens(2, 2 * SEGMENT + 1), memory_model("llama", memory)
    expected = expected(ids)
    base = base_model("llama")
    if when == "before":
        PLACEMENTS[place](base, str(tmp_path))
    model = MemLMForCausalLM.from_base(
        base, memory=CASES.get(memory, memory), segment_length=SEGMENT
    )
    randomise(model.memory)
    model.eval()
    if when == "after":
        PLACEMENTS[place](base, str(tmp_path))
    out = model(ids)
    torch.testing.assert_close(out.logits, expected.logits, **EXACT)
    assert same_state(out.memory_state, expected.memory_state)
    if place == "hooks":
        remove_hook_from_module(base, recurse=True)
        torch.testing.assert_close(model(ids).logits, expected.logits, **EXACT)
        hooked(base, "")
    base = model.unload()
    torch.testing.assert_close(base(ids).logits, base_model("llama")(ids).logits, **EXACT)


@torch.no_grad()
def test_a_memory_computes_where_its_layer_does() -> None:
    base = base_model("llama")
    for layer, device in zip(base.model.layers, ("cpu", "meta"), strict=True):
        add_hook_to_module(layer.mlp, AlignDevicesHook(device))
    model = MemLMForCausalLM.from_base(base, memory=CASES["armt"], segment_length=SEGMENT)
    assert [works_on(layer).type for layer in model.backbone.layers] == ["cpu", "meta"]
    state = model.memory.at_home(model.init_state(2).map(lambda value: torch.zeros(value.shape)))
    where = {name.split(".")[1]: value.device.type for name, value in state.tensors.items()}
    assert where == {"0": "cpu", "1": "meta"}


def test_offloading_the_memories_themselves_is_refused() -> None:
    model = cpu_offload(memory_model("llama", "armt"), CPU)
    with pytest.raises(RuntimeError, match=r"armt.tokens' is offloaded.*the base alone"):
        model(tokens(1, SEGMENT))


@pytest.mark.filterwarnings("ignore:.*offloaded")
@torch.no_grad()
def test_a_device_map_offloads_the_base_and_keeps_the_memories(tmp_path) -> None:
    model, ids = memory_model("llama", "armt"), tokens(1, 3 * SEGMENT)
    model.save_pretrained(tmp_path)
    parts = ("embed_tokens", "layers.0", "norm", "rotary_emb")
    places = {f"base.model.{part}": "cpu" for part in parts}
    places |= {"base.model.layers.1": "disk", "base.lm_head": "cpu", "memory": "cpu"}
    how = {"dtype": torch.float64, "offload_folder": tmp_path / "away"}
    loaded = MemLMForCausalLM.from_pretrained(tmp_path, device_map=places, **how)
    assert loaded.base.model.layers[1].mlp.up_proj.weight.is_meta
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **EXACT)
    with pytest.raises(RuntimeError, match="give 'memory' a device in the device_map"):
        MemLMForCausalLM.from_pretrained(tmp_path, device_map={**places, "memory": "disk"}, **how)


@pytest.mark.parametrize("kind", ["layer", "attention", "decoder"])
def test_a_forward_of_an_instance_is_refused(kind: str) -> None:
    base = base_model("llama")
    layer = base.model.layers[1]
    module = {"layer": layer, "attention": layer.self_attn, "decoder": base.model}[kind]
    forward = type(module).forward
    module.forward = types.MethodType(lambda self, *a, **k: forward(self, *a, **k), module)
    with pytest.raises(ValueError, match=f"a {type(module).__name__} has its own forward"):
        MemLMForCausalLM.from_base(base, memory="armt", segment_length=SEGMENT)


@pytest.mark.parametrize("memory", ["armt", "infini", "titans-mag"])
@pytest.mark.parametrize("kind", ["patched", "replaced", "skipped", "twice"])
@torch.no_grad()
def test_a_memory_that_was_passed_by_raises(kind: str, memory: str) -> None:
    model, ids = memory_model("llama", memory), tokens(1, 2 * SEGMENT)
    layers = model.base.model.layers
    if kind == "patched":
        module = layers[1] if memory == "armt" else layers[1].self_attn
        forward = type(module)._memlm_original.forward
        module.forward = types.MethodType(lambda self, *a, **k: forward(self, *a, **k), module)
    elif kind == "replaced":
        layers[1] = base_model("llama").model.layers[1]
    elif kind == "skipped":
        model.base.model.layers = layers[:1]
        model.base.config.num_hidden_layers = 1
    else:
        model.base.model.layers = nn.ModuleList([layers[0], layers[1], layers[1]])
        model.base.config.num_hidden_layers = 3
    message = "ran twice" if kind == "twice" else rf"{memory}.1'\] did not run"
    with pytest.raises(RuntimeError, match=message):
        model(ids)


def gradients(model: MemLMForCausalLM, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    # Targets at the end alone, so that the first segments are heard through their states only.
    labels = ids.clone()
    labels[:, : -SEGMENT // 2] = -100
    model(ids, labels=labels, logits_to_keep=None).loss.backward()
    return {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def wrap_layers(base: nn.Module, **how: object) -> None:
    layers = base.get_decoder().layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer, **how)


def wrap_attention(base: nn.Module, **how: object) -> None:
    for layer in base.model.layers:
        layer.self_attn = checkpoint_wrapper(layer.self_attn, **how)


@pytest.mark.parametrize(
    ("what", "memory"),
    [
        *(
            # tests/memory/test_laws.py recomputes the layers of every mechanism's base.
            pytest.param(
                "layers", memory, marks=() if memory in ("none", *PER_SITE) else pytest.mark.slow
            )
            for memory in available_memories()
        ),
        *((what, memory) for what in ("before", "attention") for memory in ("armt", "infini")),
    ],
)
def test_checkpointed_modules_of_the_base_change_no_gradient(what: str, memory: str) -> None:
    ids = tokens(2, 3 * SEGMENT + 1)
    expected = gradients(memory_model("llama", memory).train(), ids)
    if what == "before":
        base = base_model("llama")
        wrap_layers(base)
        model = MemLMForCausalLM.from_base(
            base, memory=CASES.get(memory, memory), segment_length=SEGMENT
        )
        randomise(model.memory)
    else:
        model = memory_model("llama", memory)
        (wrap_layers if what == "layers" else wrap_attention)(model.base)
    found = gradients(model.train(), ids)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **EXACT, msg=name)


@pytest.mark.parametrize("memory", ["armt", "rmt", "transformer-xl"])
@pytest.mark.parametrize("way", ["checkpoint_wrapper", "gradient_checkpointing_enable"])
def test_reentrant_checkpointing_is_right_or_refused(way: str, memory: str) -> None:
    ids, model = tokens(2, 3 * SEGMENT + 1), memory_model("llama", memory).train()
    expected = gradients(model, ids)
    if way == "checkpoint_wrapper":
        wrap_layers(model.base, checkpoint_impl=CheckpointImpl.REENTRANT)
    else:
        model.base.gradient_checkpointing_enable({"use_reentrant": True})
    if next(iter(model.memory.cells()))[0] == "model":
        found = gradients(model, ids)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, **EXACT, msg=name)
    else:
        with pytest.raises(RuntimeError, match=f"'{memory}.0' was run without gradient.*=False"):
            gradients(model, ids)


@torch.no_grad()
def test_a_wrapper_leaves_nothing_behind_and_attention_may_be_one() -> None:
    model, ids = memory_model("llama", "titans-mac"), tokens(1, 2 * SEGMENT)
    expected = model(ids).logits
    wrap_layers(model.base)
    outer = model.base.model.layers[0]
    torch.testing.assert_close(model(ids).logits, expected, **EXACT)
    assert not outer._forward_pre_hooks
    wrap_attention(model.base)
    torch.testing.assert_close(model(ids).logits, expected, **EXACT)
    assert find_attention(model.backbone.layers[0])


@pytest.mark.parametrize("memory", ["armt", "infini", "rmt"])
@torch.no_grad()
def test_a_model_is_pickled_and_copied_with_its_memories(memory: str, tmp_path) -> None:
    model, ids = memory_model("llama", memory), tokens(1, 3 * SEGMENT)
    expected = model(ids)
    torch.save(model, tmp_path / "model")
    for again in (torch.load(tmp_path / "model", weights_only=False), copy.deepcopy(model)):
        out = again(ids)
        assert torch.equal(out.logits, expected.logits)
        assert same_state(out.memory_state, expected.memory_state)
        assert list(again.state_dict()) == list(model.state_dict())
        for parameter in again.parameters():
            parameter.zero_()
    assert torch.equal(model(ids).logits, expected.logits)


@pytest.mark.slow
def test_another_process_reads_a_pickled_model(tmp_path) -> None:
    """As the workers of a loader do that are spawned."""
    model, ids = memory_model("llama", "infini"), tokens(1, 3 * SEGMENT)
    torch.save((model, ids), tmp_path / "model")
    code = (
        "import torch\n"
        f"model, ids = torch.load({str(tmp_path / 'model')!r}, weights_only=False)\n"
        f"torch.save(model(ids).logits.detach(), {str(tmp_path / 'logits')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "logits"), model(ids).logits, **EXACT)
