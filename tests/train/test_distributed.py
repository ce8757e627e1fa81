"""Two processes over gloo: the gradients are those of one process with all rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memlm.train import PieceSource, Stage
from tests.cases import memory_model
from tests.train.tiny import Endless, Piece, assert_same, stream, text_piece, trainer, weights


def run(folder: Path, world: int, kind: str) -> dict[str, torch.Tensor]:
    """Train two steps on four rows, dealt to `world` processes."""
    # Rows of unlike lengths: processes run unlike numbers of windows, one of them without targets.
    lengths = (20, 6, 3, 15, 9, 27, 1, 1)
    pieces = [text_piece(n, n) for n in lengths]
    pieces[2] = Piece(pieces[2].ids)
    source = Endless(pieces=3) if kind == "questions" else PieceSource(pieces)
    model = memory_model("llama", "rmt" if kind == "rmt" else "armt")
    made = trainer(
        model,
        folder,
        stream(source, Stage(max_segments=2)),
        per_device_train_batch_size=4 // world,
        bptt_depth=2,
        max_steps=2,
        gradient_checkpointing=kind == "recomputed",
    )
    made.train()
    return weights(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "rmt", "recomputed", "questions"])
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
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    from safetensors.torch import load_file

    ranks = [load_file(tmp_path / f"rank{rank}") for rank in range(2)]
    assert_same(ranks[0], ranks[1])
    # Lanes are dealt otherwise to two processes; what both learn from is compared where it is
    # equal.
    if kind != "questions":
        assert_same(ranks[0], run(tmp_path / "one", 1, kind))
