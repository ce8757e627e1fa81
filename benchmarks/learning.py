"""What every memory learns from scratch with one shared recipe: recall of pairs, and bAbI qa1 in noise.

recall: n random pairs of a key and a value, each pair in a segment of its own at a random place in noise,
one segment of noise, and a last segment that asks for keys; n of 2 n keys, reported for 4, 8 and 16.
qa1: stories of bAbI in noise over eight segments, questions in a ninth. The answers are in earlier
segments, so a model without memory guesses.

A task is learnt in stages of growing difficulty, the same for all memories; a stage ends when it is solved
or its steps are used up, and those that are reported are asked about fresh documents then. A memory has
its own sizes and initial scales, and nothing else of its own. A cell (memory, task, seed) that is in the
JSON with the same settings and these or more stages is not run again.

    python benchmarks/learning.py [--memories armt,rmt] [--tasks recall,qa1] [--seed 0] [--upto recall-4]
        [--table]
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from memlm import MemLMForCausalLM, __version__
from memlm.files import write_json
from memlm.memory import (
    MemoryConfig,
    available_memories,
    config_to_dict,
    memory_class,
    resolve_memories,
)
from memlm.segment import IGNORE
from memlm.tasks import babi

# Sizes and initial scales; what is not named is the mechanism's default. Who has a "name" is a second form
# of that mechanism.
MEMORIES: dict[str, dict[str, Any]] = {
    "armt": {"num_memory_tokens": 4, "d_mem": 32, "value_std": 0.1, "token_std": 0.02},
    "block-recurrent": {"num_states": 8, "initial_scale": 4.0, "output_std": 0.1},
    "camelot": {"num_modes": 256, "read": "all"},
    "compressive": {"memory_length": 16, "compressed_length": 32},
    "fam": {"num_memory_tokens": 8},
    "gated-delta": {"rule": "delta", "chunk_length": 16, "output_std": 0.1},
    "gated-delta-heads": {"decays": False, "initial_mix": 1.0},
    "hmt": {"queue_size": 20},
    "infini": {"initial_gate": 1.0},
    "knn": {"capacity": 256, "layers": [0, 1]},
    "knn-chunks": {"name": "knn", "capacity": 256, "chunk_length": 4, "layers": [0, 1]},
    "lact": {"output_std": 0.1},
    "landmark": {"num_blocks": 20, "block_length": 8},
    "lm2": {"num_slots": 20, "forget_bias": 3.0, "output_std": 0.1},
    "memformer": {"num_slots": 20, "output_std": 0.1},
    "memora": {"chunk_length": 8, "output_std": 0.1},
    "memory-caching": {"num_slots": 20, "chunk_length": 16, "output_std": 0.1},
    "memory-prompt": {"num_memory_tokens": 4, "mlp_gain": 1.0},
    "memoryllm": {"pool_size": 64, "num_written": 4},
    "mom": {"rule": "delta", "chunk_length": 16, "output_std": 0.1},
    "moneta": {"chunk_length": 8, "output_std": 0.1},
    "omega": {"chunk_length": 8, "output_std": 0.1},
    "rmt": {"num_memory_tokens": 8},
    "rmt-r": {"num_memory_tokens": 8},
    "titans-mac": {"chunk_length": 8, "output_std": 0.1},
    "titans-mag": {"chunk_length": 8, "output_std": 0.1},
    "titans-mal": {"chunk_length": 8, "output_std": 0.1},
    "tova": {"memory_length": 64},
    "transformer-xl": {"memory_length": 64},
    "ttt-linear": {"mini_batch": 8, "output_std": 0.1},
    "yaad": {"chunk_length": 8, "output_std": 0.1},
}


@dataclass(frozen=True)
class Recipe:
    """The training that all memories share."""

    hidden_size: int = 64
    layers: int = 2
    heads: int = 2
    # The usual 0.02 is meant for models ten times as wide. Embeddings far apart let keys be told apart in
    # the stream that memories read, where what attention adds is of scale 1.
    weight_std: float = 0.125
    embedding_std: float = 1.0
    head_std: float = 0.02
    down_std: float = 0.044
    batch: int = 32
    learning_rate: float = 2e-3
    beta2: float = 0.98
    warmup: int = 40
    clip: float = 1.0
    advance_at: float = 0.95
    window: int = 20
    stop_at: float = 0.99
    check_every: int = 25
    check_documents: int = 256
    test_documents: int = 512
    seconds: float = 420.0


@dataclass(frozen=True)
class Stage:
    """One difficulty, learnt for `steps` at most.

    pairs: pairs in a document, or facts at most. segments: those before the questions. length: tokens of a
    segment. report: the name its accuracy is reported under, None for a step on the way. keys: how many
    there are. together: facts in a segment at most. distinct: only stories in which nobody moves twice.
    """

    pairs: int
    segments: int
    length: int
    steps: int
    report: str | None = None
    keys: int = 0
    together: int = 1
    distinct: bool = False


Batch = tuple[Tensor, Tensor]


class Recall:
    """Pairs of distinct keys and random values, a segment for each; labels stand at the asked keys."""

    segment_length, keys, values, noise = 8, 32, 16, 8
    # Places of a pair's key and value behind its first.
    key_at, value_at = 0, 1
    vocabulary = keys + values + noise
    chance = 1 / values

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.stages = [
            # What a memory is for: two keys, short segments, little noise.
            Stage(2, 3, 4, 1200, keys=2),
            Stage(2, 3, 8, 500, keys=4),
            Stage(4, 5, 8, 700, "recall-4", keys=8),
            Stage(8, 9, 8, 500, "recall-8", keys=16),
            Stage(16, 17, 8, 600, "recall-16", keys=32),
        ]

    def batch(self, stage: Stage, count: int) -> Batch:
        g, length = self.generator, stage.length
        keys = torch.rand(count, stage.keys, generator=g).argsort(1)[:, : stage.pairs]
        values = self.keys + torch.randint(self.values, keys.shape, generator=g)
        told = torch.randint(self.noise, (count, stage.segments, length), generator=g)
        told += self.keys + self.values
        at = torch.randint(length - 1, (*keys.shape, 1), generator=g)
        told[:, : stage.pairs].scatter_(2, at + self.key_at, keys.unsqueeze(2))
        told[:, : stage.pairs].scatter_(2, at + self.value_at, values.unsqueeze(2))
        rounds = math.ceil(length / stage.pairs)
        asked = torch.rand(count, rounds, stage.pairs, generator=g).argsort(2)
        asked = asked.flatten(1)[:, :length]
        ids = torch.cat([told.flatten(1), keys.gather(1, asked)], dim=1)
        labels = torch.full_like(ids, IGNORE)
        labels[:, -length:] = values.gather(1, asked)
        return ids, labels


class QA1:
    """Stories of qa1, no fact cut by a border; where everybody is gets asked in a segment of its own.

    The answer stands at the actor, without a question mark between: read at a mark, it takes a small model
    several times the steps.
    """

    segment_length, noise = 16, 16
    chance = 1 / 6

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.stories = iter(babi.generate("qa1", seed))
        seen = islice(babi.generate("qa1", 0), 2000)
        words = {w for s in seen for text in (*s.facts, s.question) for w in split(text)}
        self.words = {word: i for i, word in enumerate(sorted(words))}
        self.vocabulary = len(words) + self.noise
        self.stages = [
            Stage(2, 2, 8, 1200, distinct=True),
            Stage(4, 4, 16, 800, distinct=True),
            Stage(10, 8, 16, 800, "qa1", together=2),
        ]

    def batch(self, stage: Stage, count: int) -> Batch:
        documents = [self._document(stage) for _ in range(count)]
        ids, labels = zip(*documents, strict=True)
        return torch.tensor(ids), torch.tensor(labels)

    def _document(self, stage: Stage) -> tuple[list[int], list[int]]:
        story = next(s for s in self.stories if self._fits(s, stage))
        facts = [[self.words[word] for word in split(fact)] for fact in story.facts]
        slots = torch.randperm(stage.together * stage.segments, generator=self.generator)
        where = sorted(slots[: len(facts)].tolist())
        ids: list[int] = []
        for segment in range(stage.segments):
            here = zip(facts, where, strict=True)
            told = [f for f, slot in here if slot // stage.together == segment]
            ids += self._segment(told, stage.length)
        labels = [IGNORE] * len(ids)
        places = {fact.split()[0]: split(fact)[-2] for fact in story.facts}
        order = torch.randperm(len(places), generator=self.generator).tolist()
        known = [list(places)[i] for i in order]
        for i in range(stage.length // 3):
            actor = known[i % len(known)]
            ids += [self.words[word] for word in ("Where", "is", actor)]
            labels += [IGNORE, IGNORE, self.words[places[actor]]]
        rest = stage.length % 3
        return ids + [self.words["?"]] * rest, labels + [IGNORE] * rest

    def _fits(self, story: babi.Story, stage: Stage) -> bool:
        actors = [fact.split()[0] for fact in story.facts]
        return len(actors) <= stage.pairs and not (
            stage.distinct and len(set(actors)) < len(actors)
        )

    def _segment(self, facts: list[list[int]], length: int) -> list[int]:
        free = length - sum(map(len, facts))
        words = len(self.words) + torch.randint(self.noise, (free,), generator=self.generator)
        noise: list[int] = words.tolist()
        cuts = sorted(torch.randint(free + 1, (len(facts),), generator=self.generator).tolist())
        ids: list[int] = []
        begin = 0
        for fact, cut in zip(facts, cuts, strict=True):
            ids += noise[begin:cut] + fact
            begin = cut
        return ids + noise[begin:]


def split(text: str) -> list[str]:
    """Words and the mark at the end."""
    return text.replace(".", " .").replace("?", " ?").split()


Task = Recall | QA1
TASKS: dict[str, type[Recall] | type[QA1]] = {
    "recall": Recall,
    "qa1": QA1,
}


def build(memory: Any, task: Task, recipe: Recipe) -> MemLMForCausalLM:
    """A small Llama with `memory`, at the recipe's initial scales."""
    config = LlamaConfig(
        vocab_size=task.vocabulary,
        hidden_size=recipe.hidden_size,
        intermediate_size=2 * recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=512,
        initializer_range=recipe.weight_std,
        tie_word_embeddings=False,
    )
    base = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        base.get_input_embeddings().weight.normal_(std=recipe.embedding_std)
        base.get_output_embeddings().weight.normal_(std=recipe.head_std)
        for name, parameter in base.named_parameters():
            if name.endswith("down_proj.weight"):
                parameter.normal_(std=recipe.down_std)
    return MemLMForCausalLM.from_base(base, memory=memory, segment_length=task.segment_length)


def right(logits: Tensor, labels: Tensor) -> float:
    """Share of the labelled positions answered rightly."""
    asked = labels != IGNORE
    return float((logits.argmax(-1) == labels)[asked].float().mean())


@torch.no_grad()
def accuracy(model: MemLMForCausalLM, task: Task, stage: Stage, documents: int) -> float:
    """Share of right answers over fresh documents."""
    model.eval()
    found, size, kept = [], 128, stage.length
    for _ in range(documents // size):
        ids, labels = task.batch(stage, size)
        found.append(right(model(ids, logits_to_keep=kept).logits, labels[:, -kept:]))
    model.train()
    return sum(found) / len(found)


def train_cell(
    memory_config: MemoryConfig | dict[str, Any] | str,
    task: str,
    seed: int = 0,
    recipe: Recipe | None = None,
    log: Callable[[str], None] | None = None,
    upto: str = "",
) -> dict[str, Any]:
    """Train one memory on one task from scratch, and question it about documents it has not seen.

    upto: the last accuracy that is reported, and what is trained for; "" for the last of the task.
    """
    recipe = recipe or Recipe()
    started = time.process_time()
    torch.manual_seed(seed)
    # Documents to train on, to decide when to stop, and to report on.
    data, checks, tests = (TASKS[task](3 * seed + i) for i in range(3))
    model = build(memory_config, data, recipe).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, recipe.beta2),
        weight_decay=0.0,
    )
    step, over = 0, False
    stages: list[dict[str, Any]] = []
    found: dict[str, dict[str, Any]] = {}
    for stage in stages_of(data, upto):
        model.config.segment_length = kept = stage.length
        recent: list[float] = []
        stopped, index = ("seconds", 0) if over else ("steps", 0)
        for index in range(0 if over else stage.steps):
            rate = min(1.0, (step + 1) / recipe.warmup)
            if stage.report:
                # The second half cools down, for those who have not solved the task by then.
                rate *= min(1.0, max(0.05, 2 * (1 - index / stage.steps)))
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * rate
            ids, labels = data.batch(stage, recipe.batch)
            out = model(ids, shift_labels=labels, logits_to_keep=kept)
            optimizer.zero_grad()
            out.loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            step += 1
            recent = [*recent, right(out.logits, labels[:, -kept:])][-recipe.window :]
            solved = sum(recent) / recipe.window >= recipe.advance_at
            spent = time.process_time() - started
            if log and step % 100 == 0:
                log(
                    f"{task} {stage.pairs} of {stage.keys}, step {step}: loss {out.loss.item():.3f}, "
                    f"right {sum(recent) / len(recent):.3f}, gradient {float(norm):.2f}, {spent:.0f} s"
                )
            if solved and stage.report:
                solved = (index + 1) % recipe.check_every == 0 and (
                    accuracy(model, checks, stage, recipe.check_documents) >= recipe.stop_at
                )
            if solved:
                stopped = "accuracy"
                break
            if spent > recipe.seconds:
                stopped, over = "seconds", True
                break
        stages.append({**asdict(stage), "trained": index + 1 if recent else 0, "stopped": stopped})
        if stage.report:
            found[stage.report] = {
                "accuracy": round(accuracy(model, tests, stage, recipe.test_documents), 4),
                "steps": step,
                "cpu_seconds": round(time.process_time() - started, 1),
            }
            if log:
                log(f"{stage.report}: {found[stage.report]}")
    return {
        "task": task,
        "seed": seed,
        "found": found,
        "chance": round(data.chance, 4),
        "documents": recipe.test_documents,
        "stages": stages,
        "state_bytes": model.init_state(1).nbytes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "memory": list(model.memory.configs),
        "settings": settings(memory_config, task, recipe, upto),
    }


def stages_of(task: Task, upto: str) -> list[Stage]:
    """The stages of `task`, none after the one that is reported as `upto`; all of them where none is."""
    reported = [stage.report for stage in task.stages]
    return task.stages[: reported.index(upto) + 1] if upto in reported else task.stages


def settings(memory: Any, task: str, recipe: Recipe, upto: str = "") -> dict[str, Any]:
    """What a result depends on; a finished cell with other settings is run again."""
    return {
        "memory": [config_to_dict(config) for config in resolve_memories(memory)],
        "stages": [asdict(stage) for stage in stages_of(TASKS[task](0), upto)],
        "recipe": asdict(recipe),
    }


def covers(done: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether what was run is what is asked for, or went on from there."""
    stages = asked["stages"]
    return {**done, "stages": done["stages"][: len(stages)]} == asked


def config_of(name: str) -> dict[str, Any]:
    """The memory's config in this benchmark."""
    return {"name": name, **MEMORIES.get(name, {})}


def table(cells: dict[str, dict[str, Any]]) -> str:
    """Markdown: memories down, what is reported across; a row for each seed."""
    rows = sorted({(key.split("/")[0], int(key.split("/")[2])) for key in cells})
    rows.sort(key=lambda row: (row[0] == "none", row))
    reported = {
        stage.report: (task, TASKS[task].chance)
        for task in TASKS
        for stage in TASKS[task](0).stages
        if stage.report
    }
    lines = [
        f"| memory | seed | {' | '.join(reported)} | state |",
        "|---|---|" + "---|" * (len(reported) + 1),
    ]
    for name, seed in rows:
        texts, size = [], 0
        for report, (task, _) in reported.items():
            cell = cells.get(f"{name}/{task}/{seed}")
            result = cell and cell["found"].get(report)
            if not cell or not result:
                texts.append("")
                continue
            size = max(size, cell["state_bytes"])
            texts.append(
                f"{result['accuracy']:.1%} ({result['steps']:,} steps, {result['cpu_seconds']:.0f} s)"
            )
        lines.append(f"| {name} | {seed} | " + " | ".join(texts) + f" | {size:,} bytes |")
    chances = [f"{chance:.1%}" for _, chance in reported.values()]
    lines.append("| chance | | " + " | ".join(chances) + " | |")
    return "\n".join(lines)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The cells in `path`, none when there is no such file."""
    return json.loads(path.read_text())["cells"] if path.is_file() else {}


def write(path: Path, cells: dict[str, dict[str, Any]]) -> None:
    """Replace `path` at once, so that whoever is interrupted leaves a whole file."""
    versions = {
        "memlm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    what = "accuracy after training from scratch with one shared recipe"
    write_json(path, {"what": what, "versions": versions, "cells": dict(sorted(cells.items()))})


def names(text: str, known: tuple[str, ...], option: str) -> list[str]:
    """The names in a list with commas or spaces; ValueError for one that is not known."""
    found = list(known) if text == "all" else text.replace(",", " ").split()
    for name in found:
        if name not in known:
            raise typer.BadParameter(f"{option}={name!r} is unknown; use {', '.join(known)} or all")
    return found


def main(
    memories: Annotated[str, typer.Option(help="names with commas between, or all")] = "all",
    tasks: Annotated[str, typer.Option(help="names with commas between, or all")] = "all",
    seed: int = 0,
    upto: Annotated[
        str, typer.Option(help="the last accuracy to train for, such as recall-4")
    ] = "",
    only_table: Annotated[bool, typer.Option("--table", help="print what is there")] = False,
    quiet: Annotated[bool, typer.Option(help="no line for every hundred steps")] = False,
    out: Annotated[Path, typer.Option(help="the JSON with the finished cells")] = Path(
        "benchmarks/results/learning.json"
    ),
) -> None:
    torch.set_num_threads(1)
    # The base of this benchmark has no recurrent state of its own.
    known = [n for n in available_memories() if n == "none" or memory_class(n).site != "recurrence"]
    known += [name for name in MEMORIES if name not in known]
    chosen = names(memories, tuple(known), "memories")
    asked = names(tasks, tuple(TASKS), "tasks")
    known_reports = {s.report for task in asked for s in TASKS[task](seed).stages if s.report}
    if upto and upto not in known_reports:
        raise typer.BadParameter(
            f"--upto={upto!r} is unknown; use {' or '.join(sorted(known_reports))}"
        )
    recipe = Recipe()
    for task in () if only_table else asked:
        for name in chosen:
            key, config = f"{name}/{task}/{seed}", config_of(name)
            done = read(out).get(key)
            wanted = json.loads(json.dumps(settings(config, task, recipe, upto)))
            if done and covers(done["settings"], wanted):
                continue
            result = train_cell(
                config,
                task,
                seed,
                recipe,
                None if quiet else partial(print, flush=True),
                upto,
            )
            write(out, {**read(out), key: result})
            print(f"{key}: {result['found']}", flush=True)
    print(table(read(out)))


if __name__ == "__main__":
    typer.run(main)
