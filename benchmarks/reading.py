"""Reading a document whose hidden states nobody wants: what is saved above the last memory.

    python benchmarks/reading.py

For the two shipped models, and a base of `--layers` layers with a memory at the layers named: the speed
of `model.read` over that of running every layer, on the same ids. Medians of interleaved pairs in CPU
seconds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from record import write_result
from timing import seconds
from transformers import LlamaConfig

import memlm
from memlm.backbone.model import Backbone
from memlm.memory import ARMTConfig, GatedDeltaConfig, MemoryConfig
from memlm.segment import cut


@contextmanager
def every_layer() -> Iterator[None]:
    """Reading as it was before: nothing rests."""
    with patch.object(Backbone, "may_stop", lambda self: False):
        yield


def ratio(
    model: memlm.MemLMForCausalLM, ids: torch.Tensor, rounds: int
) -> tuple[float, float, float]:
    """Median, lowest and highest of (every layer / with rest), interleaved."""

    def read() -> object:
        return model.read(cut(ids, None, None, model.segment_length))

    read()
    found = []
    for _ in range(rounds):
        with every_layer():
            whole = seconds(read, "cpu")
        found.append(whole / seconds(read, "cpu"))
    return statistics.median(found), min(found), max(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--segments", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/reading.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []

    def measure(name: str, model: memlm.MemLMForCausalLM) -> None:
        model = model.eval()
        shape = (args.rows, args.segments * model.segment_length)
        ids = torch.randint(3, model.config.text_config.vocab_size - 1, shape)
        median, low, high = ratio(model, ids, args.rounds)
        rows.append({"model": name, "ratio": median, "lowest": low, "highest": high})
        print(f"{name:40s} {median:.2f} ({low:.2f} to {high:.2f})", flush=True)

    for name in ("qa1", "qa1-5"):
        measure(f"shipped {name}", memlm.load_pretrained(name)[0])
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    middle, top = args.layers // 2, args.layers - 1
    memories: dict[str, MemoryConfig] = {
        f"gated-delta at layer {middle}": GatedDeltaConfig(layers=(middle,)),
        f"gated-delta at layer {top}": GatedDeltaConfig(layers=(top,)),
        f"armt at layer {middle}": ARMTConfig(layers=(middle,)),
        "armt at every layer": ARMTConfig(),
    }
    for name, memory in memories.items():
        measure(
            f"{args.layers} layers, {name}",
            memlm.MemLMForCausalLM.from_base(config, memory=memory, segment_length=256),
        )
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    write_result(args.out, "speed of reading over that of running every layer", settings, rows)


if __name__ == "__main__":
    main()
