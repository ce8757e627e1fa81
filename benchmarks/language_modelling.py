"""What every memory lowers of the loss on long text, by position, in equal CPU time.

    python benchmarks/language_modelling.py [--memories none,armt] [--base-steps 600] [--seconds 90]

A two-layer Llama of hidden size 96 is trained on segments of 64 tokens without memory, for a number of
steps, so that a later call has the same base; then every memory, and `none`, goes on from there for equal
CPU time, on documents of 16 segments, all weights trained, with the same order of documents. The text is
what every installation carries (haystack `installed`, whole packages held out). The loss of held-out
documents is given for the first segment, in which nothing is remembered yet, and for the later ones, with
the difference from `none` on the same documents and its standard error.
A memory that was measured with the same settings is not run again.
"""

from __future__ import annotations

import copy
import json
import math
import time
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from learning import MEMORIES
from record import ON_PLAIN_BASES, write_result
from transformers import LlamaConfig

import memlm
from memlm.memory import memory_class
from memlm.tasks.haystack import Haystack
from memlm.train.tokenizer import train_tokenizer

WHAT = "loss on held-out text by position, nats per token"
PLACES = {"first": (0, 1), "2 to 4": (1, 4), "5 to 16": (4, 16)}
# How the recall benchmark starts memories from scratch. On a trained base they start as their defaults do,
# most without any effect: with `output_std` 0.1 gated-delta was 0.44 nats behind `none` after 90 seconds.
STARTS = set(
    "conv_std initial_gate initial_mix initial_scale output_std token_std value_std".split()
)
# Sizes for text: more of what the recall benchmark needs little of.
SIZES: dict[str, dict[str, Any]] = {
    name: {option: value for option, value in options.items() if option not in STARTS}
    for name, options in MEMORIES.items()
} | {
    "compressive": {"memory_length": 64, "compressed_length": 64},
    "memory-caching": {"num_slots": 16, "chunk_length": 16},
}


def documents(ids: np.ndarray, length: int) -> np.ndarray:
    """The token stream as documents (N, length); what is left at the end is dropped."""
    return ids[: len(ids) // length * length].reshape(-1, length)


def train(
    model: memlm.MemLMForCausalLM,
    texts: np.ndarray,
    settings: dict[str, Any],
    steps: float = math.inf,
    seconds: float = math.inf,
) -> tuple[int, float]:
    """Train until the steps are done or the CPU seconds are used up; steps and seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    rng = np.random.default_rng(settings["seed"])
    begun, spent = time.process_time(), 0.0
    for step in count():
        spent = time.process_time() - begun
        left = 1 - max(step / steps, spent / seconds)
        if left <= 0:
            return step, spent
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 20, 1.0) * (0.05 + 0.95 * left)
        rows = torch.from_numpy(texts[rng.integers(len(texts), size=settings["batch"])]).long()
        optimizer.zero_grad()
        for out in memlm.windows(model, rows, labels=rows, bptt_depth=settings["bptt_depth"]):
            out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    raise AssertionError


@torch.no_grad()
def losses(model: memlm.MemLMForCausalLM, texts: np.ndarray, segment: int) -> torch.Tensor:
    """(N, segments) mean loss of each segment's tokens; each is predicted from those before it."""
    found = []
    for rows in torch.from_numpy(texts).long().split(16):
        state, hidden = None, []
        for at in range(0, rows.shape[1], segment):
            out = model(rows[:, at : at + segment], memory_state=state)
            state = out.memory_state
            # A segment's first token is predicted by the segment before, which `none` cannot see beyond.
            logits, targets = out.logits[:, :-1], rows[:, at + 1 : at + segment]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="none"
            )
            hidden.append(loss.view(len(rows), -1).mean(dim=1))
        found.append(torch.stack(hidden, dim=1))
    return torch.cat(found)


def main(
    memories: Annotated[str, typer.Option(help="names, separated by commas")] = "",
    base_steps: Annotated[int, typer.Option(help="training steps of the base")] = 600,
    seconds: Annotated[float, typer.Option(help="CPU seconds of training for each")] = 90.0,
    seed: int = 0,
    out: Path = Path(__file__).parent / "results/language_modelling.json",
) -> None:
    """Train and measure; write the table and its JSON."""
    torch.set_num_threads(1)
    settings = {
        "base_steps": base_steps,
        "seconds": seconds,
        "seed": seed,
        "segment": 64,
        "segments": 16,
        "batch": 8,
        "bptt_depth": 4,
        "hidden_size": 96,
        "layers": 2,
        "vocabulary": 2048,
        "held_out": 96,
    }
    known = json.loads(out.read_text()) if out.is_file() else {}
    rows = known.get("rows", []) if known.get("settings") == settings else []
    wanted = memories.split(",") if memories else list(ON_PLAIN_BASES)
    wanted = ["none", *(name for name in wanted if name != "none")]
    length = settings["segment"] * settings["segments"]
    train_set, held_out = (Haystack.open("installed", split=split) for split in ("train", "eval"))
    sentences = (s for document in train_set.documents[:400] for s in document.sentences)
    tokenizer = train_tokenizer(sentences, settings["vocabulary"])
    texts = documents(np.asarray(train_set.tokenized(tokenizer).ids), length)
    held = documents(np.asarray(held_out.tokenized(tokenizer).ids), length)
    chosen = np.linspace(0, len(held) - 1, min(settings["held_out"], len(held))).astype(int)
    typer.echo(f"{len(texts)} documents of {length} tokens to train on, {len(chosen)} held out")
    todo = [name for name in wanted if all(row["memory"] != name for row in rows)]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings["hidden_size"],
        intermediate_size=2 * settings["hidden_size"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    start = memlm.MemLMForCausalLM.from_base(
        config, memory="none", segment_length=settings["segment"]
    ).train()
    if todo:
        train(start, texts, settings, steps=base_steps)
    base = start.unload()
    for name in todo:
        torch.manual_seed(seed)
        memory = name if name == "none" else memory_class(name).Config(**SIZES.get(name, {}))
        model = memlm.MemLMForCausalLM.from_base(
            copy.deepcopy(base), memory=memory, segment_length=settings["segment"]
        ).train()
        steps, spent = train(model, texts, settings, seconds=seconds)
        found = losses(model.eval(), held[chosen], settings["segment"])
        rows.append(
            {"memory": name, "steps": steps, "cpu_seconds": round(spent, 1)}
            | {
                place: [round(loss, 4) for loss in found[:, a:b].mean(dim=1).tolist()]
                for place, (a, b) in PLACES.items()
            }
        )
        write_result(out, WHAT, settings, rows)
        show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """A table: the means, what is above `none`, and how much more they fall behind the first segment."""
    places = " | ".join(PLACES)
    typer.echo(f"| memory | steps | {places} | 5 to 16, less `none` | falls, less `none` |")
    typer.echo("|---|--:|" + "--:|" * (len(PLACES) + 2))
    plain = {place: np.array(rows[0][place]) for place in PLACES}
    for row in rows:
        means = " | ".join(f"{np.mean(row[place]):.3f}" for place in PLACES)
        above = np.array(row["5 to 16"]) - plain["5 to 16"]
        falls = above - (np.array(row["first"]) - plain["first"])
        typer.echo(
            f"| {row['memory']} | {row['steps']} | {means} | {_mean(above)} | {_mean(falls)} |"
        )


def _mean(values: np.ndarray) -> str:
    """The mean and its standard error."""
    return f"{values.mean():+.3f} ± {values.std(ddof=1) / len(values) ** 0.5:.3f}"


if __name__ == "__main__":
    typer.run(main)
