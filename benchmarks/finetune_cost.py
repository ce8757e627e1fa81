"""What a step of fine-tuning costs with models of real sizes, beside what the plan of the run said before.

    python benchmarks/finetune_cost.py smollm2-135m llama-3.2-1b --out fine-tuning.json

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
    import torch
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
    from memlm.train import plan

    outlook = plan(recipe(folder, arguments), folder / "plan")
    assert outlook.trial is not None
    found["plan"] = {
        "lines": list(outlook.lines()),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", choices=list(SHAPES))
    parser.add_argument("--segments", type=int, default=3)
    parser.add_argument("--segment-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    results = {}
    for name in arguments.models:
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
            results[name] = dict(found)
        print(json.dumps({name: results[name]}, indent=2), flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
