"""What a step of fine-tuning costs with models of real sizes, beside what the plan of the run said before.

    python benchmarks/finetune_cost.py [smollm2-135m llama-3.2-1b --segments 2 --segment-length 64]

Weights are random, since only shapes matter here. Each model gets ARMT and LoRA, in bfloat16 and with
recomputation, reads documents of `--segments` segments, and is asked at their ends. The plan and the run
are processes of their own, so that the memory of one is not counted for the other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import write_result

OUT = Path("benchmarks/results/finetune_cost.json")
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rope_theta": 100000.0,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
    },
}


def make_base(folder: Path, name: str) -> None:
    """A base of the shape `name` with random weights, and a tokenizer trained on a page."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["The key is under the lamp."], trainer)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(folder)
    config = LlamaConfig(**SHAPES[name], bos_token_id=0, eos_token_id=0, dtype="bfloat16")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def make_data(path: Path, tokens: int) -> None:
    """Documents of about `tokens` tokens with a question at the end."""
    row = {"questions": [{"question": "Where is the key?", "answer": "under the lamp"}]}
    lines = [
        json.dumps({"document": f"Page {n}. " + "abcdefg " * (tokens // 8), **row})
        for n in range(8)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def recipe(folder: Path, arguments: argparse.Namespace) -> Any:
    """As `memlm train --base ... --data ...` makes it, with LoRA, bfloat16 and recomputation."""
    from memlm.train import Recipe

    overrides = [
        "model.dtype=bfloat16",
        "model.lora={r: 16}",
        f"model.segment_length={arguments.segment_length}",
        "training.gradient_checkpointing=true",
        "training.gradient_accumulation_steps=1",
        f"training.max_steps={arguments.steps}",
        "training.logging_steps=1",
        "training.save_strategy='no'",
    ]
    return Recipe.for_data(str(folder / "base"), str(folder / "data.jsonl"), "armt", overrides)


def planned(folder: Path, arguments: argparse.Namespace, found: Any) -> None:
    """What the plan says, from its trial of three batches."""
    from memlm.train import plan

    outlook = plan(recipe(folder, arguments), folder / "plan")
    assert outlook.trial is not None
    found["plan"] = {
        "trained": outlook.trained,
        "frozen": outlook.frozen,
        "tokens_per_step": outlook.trial.tokens,
        "seconds_per_step": outlook.trial.seconds,
        "peak_bytes": outlook.peak_bytes,
        "state_bytes": outlook.state_bytes,
        "device": outlook.device,
    }


def measured(folder: Path, arguments: argparse.Namespace, found: Any) -> None:
    """Steps as `train` makes them, timed one by one; the first, which warms up, is left out."""
    from transformers import TrainerCallback

    from memlm.peak import PeakMemory
    from memlm.train.run import prepare

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

    run, clock = prepare(recipe(folder, arguments), folder / "run", None), Clock()
    run.trainer.add_callback(clock)
    with PeakMemory(run.trainer.args.device) as memory:
        run.trainer.train()
    seconds = [b - a for a, b in zip(clock.ends[:-1], clock.ends[1:], strict=True)]
    found["run"] = {"seconds_per_step": sum(seconds) / len(seconds), "peak_bytes": memory.bytes}


def row_of(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """What was said beforehand and what was measured, side by side."""
    plan, run = found["plan"], found["run"]
    return {
        "model": name,
        "trained": sum(plan["trained"].values()),
        "frozen": plan["frozen"],
        "state_bytes": plan["state_bytes"],
        "tokens_per_step": plan["tokens_per_step"],
        "planned_seconds_per_step": plan["seconds_per_step"],
        "measured_seconds_per_step": run["seconds_per_step"],
        "planned_peak_bytes": plan["peak_bytes"],
        "measured_peak_bytes": run["peak_bytes"],
        "device": plan["device"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = [
        "| model | trained | frozen | tokens per step | seconds per step: plan, measured "
        "| peak: plan, measured |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        seconds = [row[f"{kind}_seconds_per_step"] for kind in ("planned", "measured")]
        peaks = [row[f"{kind}_peak_bytes"] / 1e9 for kind in ("planned", "measured")]
        lines.append(
            f"| {row['model']} | {row['trained'] / 1e6:.1f}M | {row['frozen'] / 1e6:,.0f}M "
            f"| {row['tokens_per_step']:.0f} | {seconds[0]:.1f}, {seconds[1]:.1f} "
            f"| {peaks[0]:.2f}, {peaks[1]:.2f} GB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"of {', '.join(SHAPES)} (default: all)")
    parser.add_argument("--segments", type=int, default=2)
    parser.add_argument("--segment-length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if unknown := set(arguments.models) - set(SHAPES):
        parser.error(f"models names {min(unknown)!r}; use {', '.join(SHAPES)}")
    spawn = multiprocessing.get_context("spawn")
    rows = []
    for name in arguments.models or SHAPES:
        with tempfile.TemporaryDirectory() as temporary, spawn.Manager() as manager:
            folder, found = Path(temporary), manager.dict()
            make_data(folder / "data.jsonl", arguments.segments * arguments.segment_length)
            steps = [(make_base, (folder / "base", name))]
            steps += [(call, (folder, arguments, found)) for call in (planned, measured)]
            for call, given in steps:
                process = spawn.Process(target=call, args=given)
                process.start()
                process.join()
                if process.exitcode:
                    raise SystemExit(f"{call.__name__} of {name} ended with {process.exitcode}")
            rows.append(row_of(name, dict(found)))
        print(table(rows[-1:]), flush=True)
    settings = {"segments": arguments.segments, "segment_length": arguments.segment_length}
    settings |= {"steps": arguments.steps, "memory": "armt", "lora": "r: 16", "dtype": "bfloat16"}
    what = "Steps of fine-tuning with LoRA and recomputation: the plan's estimate and what was measured"
    write_result(arguments.out, what, settings | {"threads": torch.get_num_threads()}, rows)


if __name__ == "__main__":
    main()
