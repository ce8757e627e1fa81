"""Two processes over gloo: the gradients are those of one process with all rows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from memlm.memory import ARMTConfig
from memlm.train import PieceSource, Stage
from memlm.train.data import shifted
from tests.cases import memory_model
from tests.test_sharding import put_lora
from tests.train.tiny import (
    Endless,
    Piece,
    assert_same,
    gradients,
    stream,
    text_piece,
    trainer,
    weights,
)


class Dealt:
    """One overflowing document among eight; dealt so that one process has the micro-batches of two."""

    def __init__(self, world: int) -> None:
        # Two processes take even and odd numbers, one takes them as they come.
        self.order = range(8) if world == 2 else (0, 2, 1, 3, 4, 6, 5, 7)

    def single_piece(self, stages: Any) -> bool:
        return True

    def document(self, ordinal: int, stage: Stage) -> Iterator[Piece]:
        number = self.order[ordinal]
        piece = text_piece(14 + number, number)
        piece.ids[:] = piece.ids.clip(max=59)
        piece.ids[10] = 60 if number == 3 else 5
        yield Piece(piece.ids, shifted(piece.ids))


def run_overflow(folder: Path, world: int) -> dict[str, torch.Tensor]:
    """Two steps, in the first of which one process' documents overflow."""
    model = memory_model("llama", ARMTConfig(num_memory_tokens=3, d_mem=8, write_cost=0.3))
    with torch.no_grad():
        model.get_input_embeddings().weight[60] = 1e200
    made = trainer(
        model,
        folder,
        stream(Dealt(world), Stage(max_segments=1)),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2 // world,
        bptt_depth=2,
        max_steps=2,
    )
    made.train()
    assert made.skipped == 1
    logged = made.state.log_history
    assert [line.get("skipped") for line in logged[:2]] == [1, None]
    costs = {f"cost{n}": torch.tensor(line["auxiliary_loss"]) for n, line in enumerate(logged[:2])}
    return {**weights(model), **costs}


class Gradients(TrainerCallback):
    """Keeps what the optimizer is about to apply, once all processes have told each other."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        self.steps.append(gradients(model))


# Memories, LoRA, and what is recomputed: segments by us, or layers by the base itself.
SETUPS = [
    (memory, lora, recomputed)
    for memory in ("armt", "rmt")
    for lora in (False, True)
    for recomputed in ("", "segments", "layers")
]


def pieces_of_unlike_lengths() -> list[Piece]:
    """Processes run unlike numbers of windows, one of them without targets."""
    pieces = [text_piece(n, n) for n in (20, 6, 3, 15, 9, 27, 1, 1)]
    pieces[2] = Piece(pieces[2].ids)
    return pieces


def run_gradients(folder: Path, world: int) -> dict[str, torch.Tensor]:
    """The gradients of two steps for all of `SETUPS`, in a base that is in float64 throughout."""
    found = {}
    for memory, lora, recomputed in SETUPS:
        model = memory_model("gpt2", memory)
        if lora:
            put_lora(model)
        if recomputed == "layers":
            model.base.gradient_checkpointing_enable({"use_reentrant": False})
        kept = Gradients()
        trainer(
            model,
            folder,
            stream(PieceSource(pieces_of_unlike_lengths()), Stage(max_segments=2)),
            [kept],
            per_device_train_batch_size=4 // world,
            bptt_depth=2,
            bptt_anchor="start",
            max_steps=2,
            gradient_checkpointing=recomputed == "segments",
        ).train()
        assert len(kept.steps) == 2
        for step, values in enumerate(kept.steps):
            named = f"{memory} {lora} {recomputed} {step} "
            found |= {named + name.removeprefix("module."): value for name, value in values.items()}
    return found


def run(folder: Path, world: int, kind: str) -> dict[str, torch.Tensor]:
    """Train two steps on four rows, dealt to `world` processes."""
    if kind == "overflow":
        return run_overflow(folder, world)
    if kind == "gradients":
        return run_gradients(folder, world)
    pieces = pieces_of_unlike_lengths()
    source = Endless(pieces=3) if kind == "questions" else PieceSource(pieces)
    model = memory_model("llama", "rmt" if kind == "rmt" else "armt")
    if kind == "lora":
        put_lora(model)
    made = trainer(
        model,
        folder,
        stream(source, Stage(max_segments=2)),
        per_device_train_batch_size=4 // world,
        # From the end, a window's place would depend on the longest row of a process' batch.
        bptt_depth=2,
        bptt_anchor="start",
        max_steps=2,
        gradient_checkpointing=kind == "recomputed",
    )
    made.train()
    return weights(model)


@pytest.mark.slow
# peft sets by itself what GPT-2's layers need, and says so.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning")
@pytest.mark.parametrize(
    "kind", ["gradients", "text", "rmt", "recomputed", "questions", "overflow", "lora"]
)
def test_two_processes_train_as_one(tmp_path: Path, kind: str) -> None:
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "torch.set_num_threads(1)\n"
        "from tests.train.test_distributed import run\n"
        f"found = run(Path({str(tmp_path)!r}), 2, {kind!r})\n"
        "import os\n"
        "from safetensors.torch import save_file\n"
        f"save_file(found, {str(tmp_path)!r} + '/rank' + os.environ['RANK'])\n"
    )
    (tmp_path / "child.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    port = 20000 + os.getpid() % 20000
    command += [f"--master-port={port}", str(tmp_path / "child.py")]
    launched = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = launched.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        # Asked to end, and not killed: the launcher then ends its workers, which would wait on.
        launched.terminate()
        _, errors = launched.communicate(timeout=60)
    assert launched.returncode == 0, errors[-3000:]
    from safetensors.torch import load_file

    ranks = [load_file(tmp_path / f"rank{rank}") for rank in range(2)]
    if kind == "gradients":
        right = run(tmp_path / "one", 1, kind)
        assert ranks[0].keys() == ranks[1].keys() == right.keys() and len(right) > 100
        assert any(bool(value.any()) for name, value in right.items() if "lora_" in name)
        for name, value in right.items():
            for rank in ranks:
                torch.testing.assert_close(rank[name], value, rtol=1e-9, atol=1e-12, msg=name)
        return
    assert_same(ranks[0], ranks[1])
    # Lanes are dealt otherwise to two processes; what both learn from is compared where it is
    # equal.
    if kind != "questions":
        assert_same(ranks[0], run(tmp_path / "one", 1, kind))


RECIPE = """
seed: 3
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1,
    num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 256}
  memory: {name: armt, num_memory_tokens: 2, d_mem: 4}
  segment_length: 64
tokenizer: {source: train, vocab_size: 1024}
data: {source: babilong, tasks: [qa1]}
curriculum: {stages: [{max_segments: 2}]}
training: {max_steps: 6, per_device_train_batch_size: 2, save_steps: 2, logging_steps: 1, use_cpu: true}
"""


@pytest.mark.slow
def test_the_command_trains_in_two_processes_and_goes_on_in_one(tmp_path: Path) -> None:
    """Two processes begin; after a kill, one process ends the run."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "ACCELERATE_USE_CPU": "true"}

    def command(*launcher: str) -> list[str]:
        module = ["-m", "memlm", "train", str(tmp_path / "recipe.yaml")]
        return [sys.executable, *launcher, *module, "--out", str(tmp_path / "out")]

    port = str(21000 + os.getpid() % 20000)
    # What `accelerate launch` starts on accelerators; on CPUs it starts one process.
    launch = command("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}")
    made = subprocess.run(
        [*launch, "training.max_steps=4"], env=environment, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr[-3000:]
    # Its end is taken back, as if it had been killed after the checkpoint of step 4.
    out = tmp_path / "out"
    for name in ("train_result.json", "model.safetensors"):
        (out / name).unlink()
    recipe = (out / "recipe.yaml").read_text()
    (out / "recipe.yaml").write_text(recipe.replace("max_steps: 4", "max_steps: 6"))
    assert (out / "checkpoint-4" / "stream-1.json").is_file()
    again = subprocess.run(command(), env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "is of 2 processes, and there are 1" in again.stderr
    assert "6 steps" in again.stdout and (out / "model.safetensors").is_file()
