"""What memories that need no training recall of pairs, on a base that was trained without any.

    python benchmarks/training_free.py [--memories tova,camelot] [--seed 0]

A two-layer Llama of hidden size 64 learns the recall task of learning.py with whole documents in its
attention. Then it reads the same kind of documents in segments of 8 tokens, nothing trained further, with
each memory: what it answers is what the memory hands to attention that knows how to ask. Two orders: "key
first", where the answer is the token after one like the question, and "value first", where it is the token
before. `window` is the base with the whole document, the bound of all that hand out keys and values; `none`
sees only the questions.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from learning import Recall, Recipe, accuracy, build, names, right
from record import write_result

import memlm

WHAT = "accuracy of recall, memories attached to a trained base without further training"


class ValueFirst(Recall):
    """Pairs that are told the other way round."""

    key_at, value_at = 1, 0


ORDERS: dict[str, type[Recall]] = {"key first": Recall, "value first": ValueFirst}
# Four pairs of eight keys are told in 40 tokens; a store has room for all, half or a quarter of them.
MEMORIES: dict[str, dict[str, Any]] = {
    "none": {"name": "none"},
    "transformer-xl-40": {"name": "transformer-xl", "memory_length": 40},
    "transformer-xl-20": {"name": "transformer-xl", "memory_length": 20},
    "tova-20": {"name": "tova", "memory_length": 20},
    "tova-10": {"name": "tova", "memory_length": 10},
    "landmark-ungrouped": {
        "name": "landmark",
        "num_blocks": 10,
        "block_length": 4,
        "grouped": False,
    },
    "landmark": {"name": "landmark", "num_blocks": 10, "block_length": 4},
    "knn": {"name": "knn", "capacity": 40, "top_k": 8, "combine": "joint"},
    "knn-nearest": {"name": "knn", "capacity": 40, "top_k": 1, "combine": "joint"},
    "camelot-unmerged": {"name": "camelot", "num_modes": 40, "merge_similarity": 2.0},
    "camelot": {"name": "camelot", "num_modes": 40},
    "camelot-all": {"name": "camelot", "num_modes": 40, "read": "all"},
    "camelot-all-20": {"name": "camelot", "num_modes": 20, "read": "all"},
    "camelot-all-unmerged": {
        "name": "camelot",
        "num_modes": 40,
        "merge_similarity": 2.0,
        "read": "all",
    },
}


def trained(task: Recall, recipe: Recipe, steps: int) -> tuple[memlm.MemLMForCausalLM, int]:
    """A base that has learnt the stages up to four pairs with the whole document before it."""
    model, step = build("none", task, recipe).train(), 0
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, recipe.beta2), weight_decay=0.0
    )
    for stage in task.stages[:3]:
        model.config.segment_length = (stage.segments + 1) * stage.length
        recent: list[float] = []
        while step < steps and (
            len(recent) < recipe.window or sum(recent) < recipe.stop_at * len(recent)
        ):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup)
            ids, labels = task.batch(stage, recipe.batch)
            out = model(ids, shift_labels=labels, logits_to_keep=stage.length)
            optimizer.zero_grad()
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            step += 1
            recent = [*recent, right(out.logits, labels[:, -stage.length :])][-recipe.window :]
    return model.eval(), step


def main(
    memories: Annotated[str, typer.Option(help="rows, separated by commas, or all")] = "all",
    steps: Annotated[int, typer.Option(help="the most the base is trained for")] = 1500,
    seed: int = 0,
    out: Path = Path(__file__).parent / "results/training_free.json",
) -> None:
    """Train the base for each order, then ask it with every memory; write the table and its JSON."""
    torch.set_num_threads(1)
    recipe = Recipe()
    chosen = names(memories, tuple(MEMORIES), "memories")
    rows: list[dict[str, Any]] = []
    for order, task in ORDERS.items():
        torch.manual_seed(seed)
        model, taken = trained(task(3 * seed), recipe, steps)
        stage = task(0).stages[2]
        tests = partial(task, 3 * seed + 2)
        base = model.unload()
        for name in ["window", *chosen]:
            whole = (stage.segments + 1) * stage.length
            reader = memlm.MemLMForCausalLM.from_base(
                base,
                memory=MEMORIES.get(name, {"name": "none"}),
                segment_length=whole if name == "window" else stage.length,
            )
            found = accuracy(reader, tests(), stage, recipe.test_documents)
            base = reader.unload()
            rows.append({"memory": name, "order": order, "accuracy": round(found, 4)})
            rows[-1]["base_steps"] = taken
            print(f"{order}, {name}: {found:.1%}", flush=True)
    settings = {"seed": seed, "steps": steps, "stage": asdict(stage), "recipe": asdict(recipe)}
    settings["memories"] = MEMORIES
    write_result(out, WHAT, settings, rows)
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """A table, memories down and orders across."""
    print("| memory | " + " | ".join(ORDERS) + " |\n|---|" + "--:|" * len(ORDERS))
    for name in dict.fromkeys(row["memory"] for row in rows):
        found = {row["order"]: row["accuracy"] for row in rows if row["memory"] == name}
        print(f"| {name} | " + " | ".join(f"{found[order]:.1%}" for order in ORDERS) + " |")


if __name__ == "__main__":
    typer.run(main)
