"""FSDP2 over gloo: a sharded model computes what a whole one does, and learns the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from memlm import MemLMForCausalLM
from memlm.memory import available_memories
from tests.cases import CASES, SEGMENT, base_model, memory_model, tokens

EXACT = {"rtol": 0.0, "atol": 1e-9}


def shard(model: MemLMForCausalLM, memories: bool = True, **how: object) -> None:
    """As the documentation says: layers, memories, and the rest."""
    for layer in model.backbone.layers:
        fully_shard(layer, **how)
    for memory in model.memory.attached.values() if memories else ():
        fully_shard(memory, **how)
    fully_shard(model, **how)


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def ids_of(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one process, with targets at the end alone: the first segments are heard by their states."""
    ids = tokens(2, 3 * SEGMENT + 1, seed=20 + rank)
    labels = ids.clone()
    labels[:, : -SEGMENT // 2] = -100
    return ids, labels


def learn(model: MemLMForCausalLM, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """Two steps of descent on the mean over `batches`; their losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = sum(model(i, labels=t, logits_to_keep=None).loss for i, t in batches) / len(batches)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    return losses


def compare(memory: str, kind: str) -> None:
    """One process of the comparison: AssertionError where sharded and whole differ."""
    rank, world = dist.get_rank(), dist.get_world_size()
    plain, sharded = memory_model("llama", memory), memory_model("llama", memory)
    if kind == "two dtypes":
        plain.memory.float(), sharded.memory.float()
    if "checkpointed" in kind:
        sharded.base.gradient_checkpointing_enable({"use_reentrant": False})
    if "recomputed" in kind:
        sharded.gradient_checkpointing_enable()
    if "lora" in kind:
        put_lora(plain), put_lora(sharded)
    shard(sharded)
    ids, labels = ids_of(rank)
    plain.train(), sharded.train()
    learn(plain, [ids_of(other) for other in range(world)])
    learn(sharded, [(ids, labels)])
    found = dict(sharded.named_parameters())
    for name, value in plain.named_parameters():
        torch.testing.assert_close(whole(found[name]), value, **EXACT, msg=f"{name} {rank}")
        # Of the second step.
        assert (found[name].grad is None) == (value.grad is None), name
        if value.grad is not None:
            mine = whole(found[name].grad)
            torch.testing.assert_close(mine, value.grad, **EXACT, msg=f"gradient {name} {rank}")
    plain.eval(), sharded.eval()
    with torch.no_grad():
        right, out = plain(ids), sharded(ids)
        torch.testing.assert_close(out.logits, right.logits, **EXACT)
        for name, value in right.memory_state.tensors.items():
            assert not hasattr(out.memory_state[name], "full_tensor"), name
            torch.testing.assert_close(out.memory_state[name], value, **EXACT, msg=name)
        again = sharded(ids, memory_state=sharded.init_state(2))
        torch.testing.assert_close(again.logits, right.logits, **EXACT)


def put_lora(model: MemLMForCausalLM) -> None:
    """LoRA in the base's attention, or in its recurrence, not at zero; the rest of the base frozen."""
    from memlm.train.bases import add_lora

    there = {name.rpartition(".")[2] for name, _ in model.base.named_modules()}
    targets = there & {"q_proj", "v_proj", "c_attn", "in_proj"}
    add_lora(model, {"r": 2, "target_modules": sorted(targets)})
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = 0.1 * noise


def save_or_load(folder: str, load: bool) -> None:
    """Train a step, sharded, and save as torch's distributed checkpoints do; or load, and compare."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    plain, sharded = memory_model("llama", "armt"), memory_model("llama", "armt")
    shard(sharded)
    optimizers = []
    for model in (plain.train(), sharded.train()):
        if model is sharded and load:
            optimizers.append(torch.optim.AdamW(model.parameters(), lr=1e-2))
            continue
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        step(model, optimizer)
        optimizers.append(optimizer)
    weights, moments = get_state_dict(sharded, optimizers[1])
    state = {"model": weights, "optimizer": moments}
    if not load:
        checkpoint.save(state, checkpoint_id=folder)
        return
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(
        sharded, optimizers[1], model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    # The next step needs the weights and both moments.
    step(plain, optimizers[0]), step(sharded, optimizers[1])
    found = dict(sharded.named_parameters())
    for name, value in plain.named_parameters():
        torch.testing.assert_close(whole(found[name]), value, **EXACT, msg=name)


def step(model: MemLMForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    """A step on the same rows in every process."""
    optimizer.zero_grad()
    ids, labels = ids_of(0)
    model(ids, labels=labels, logits_to_keep=None).loss.backward()
    optimizer.step()


def main(kind: str, memories: list[str]) -> None:
    """One process of several: `compare` for each memory."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        for memory in memories:
            print(memory, file=sys.stderr)
            if kind in ("save", "load"):
                save_or_load(memory, kind == "load")
            else:
                compare(memory, kind)
    finally:
        dist.destroy_process_group()


def run(world: int, kind: str, memories: list[str]) -> None:
    """`compare` in processes of their own."""
    code = (
        "import torch\ntorch.set_num_threads(1)\n"
        f"from tests.test_sharding import main\nmain({kind!r}, {memories})\n"
    )
    common = {**os.environ, "PYTHONPATH": os.getcwd(), "WORLD_SIZE": str(world)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    made = [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in made]
    finally:
        for process in made:
            process.kill()
    assert [process.returncode for process in made] == [0] * world, "\n".join(errors)[-6000:]


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# A gradient that reaches a layer by its state alone finds parameters freed, should the layer not show it.
@pytest.mark.parametrize("memory", ["armt", "titans-mag", "transformer-xl"])
def test_a_sharded_model_equals_a_whole_one(memory: str, alone: None) -> None:
    compare(memory, "plain")


def test_accelerate_makes_each_memory_a_unit(alone: None) -> None:
    """What `Accelerator.prepare` does with `fsdp_version=2`, which asks for an accelerator first."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=True,
        device=torch.device("cpu"),
        torch_device_mesh=None,
    )
    plain = memory_model("llama", "armt").train()
    sharded = fsdp2_prepare_model(accelerator, memory_model("llama", "armt").train())
    assert isinstance(sharded.memory.attached["armt"], FSDPModule)
    assert all(isinstance(layer, FSDPModule) for layer in sharded.backbone.layers)
    assert learn(sharded, [ids_of(0)]) == pytest.approx(learn(plain, [ids_of(0)]), abs=1e-9)


def test_a_state_keeps_its_dtype_in_a_memory_computed_in_bfloat16(alone: None) -> None:
    model = memory_model("llama", "armt").float()
    half = torch.bfloat16
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=half, output_dtype=half))
    state = model(ids_of(0)[0]).memory_state
    assert {value.dtype for value in state.tensors.values()} == {torch.float32}


def test_a_memory_may_have_a_dtype_of_its_own(alone: None) -> None:
    compare("rmt", "two dtypes")


def test_lora_in_a_sharded_base_equals_lora_in_a_whole_one(alone: None) -> None:
    compare("armt", "lora")


@pytest.mark.slow
@pytest.mark.parametrize(("writers", "readers"), [(2, 1), (1, 2)])
def test_what_some_processes_saved_others_load(tmp_path: Path, writers: int, readers: int) -> None:
    """Weights and the optimizer's moments, in parts of other sizes."""
    run(writers, "save", [str(tmp_path)])
    run(readers, "load", [str(tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["plain", "checkpointed", "recomputed", "lora", "lora checkpointed", "lora recomputed"],
)
def test_two_processes_share_a_model(kind: str) -> None:
    run(2, kind, list(available_memories()))


def test_a_base_that_is_sharded_already_is_refused(alone: None) -> None:
    base = base_model("llama")
    fully_shard(base.model.layers[0])
    with pytest.raises(ValueError, match="attach the memory first, then shard"):
        MemLMForCausalLM.from_base(base, memory=CASES["armt"], segment_length=SEGMENT)


def test_a_memory_in_pieces_is_refused(alone: None) -> None:
    model = memory_model("llama", "rmt")
    shard(model, memories=False)
    with pytest.raises(RuntimeError, match=r"in pieces.*fully_shard\(memory\)"):
        model.init_state(1)
