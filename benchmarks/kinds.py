"""What a model knows of endless bAbI stories, question by kind of question: the tasks and their steps.

Every story is told one fact per short segment, with words of the built-in held-out text around it, and then
asked each kind of question of its end. `--without 1` leaves out what the first memory answers, in reading
and in asking alike, so that it shows which memory an answer depends on. In a checkpoint of stages that hid
the tokens before the segment (transformer-xl with read_dropout=1) they are hidden here, too.

    python benchmarks/kinds.py qa1-5 [--facts 30 --stories 128 --length 12 --without 1 --without 2]
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from record import write_result
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from memlm import MemLMForCausalLM
from memlm.memory.parts.delta_block import DeltaBlock
from memlm.memory.transformer_xl import TransformerXL
from memlm.pretrained import resolve_pretrained
from memlm.tasks.babi.endless import LESSONS, Telling, kinds_of, telling
from memlm.tasks.babilong import encode_answer, encode_question
from memlm.tasks.haystack import TokenHaystack, tokenized_haystack
from memlm.templates import BABILONG_FACT_TEMPLATE

# The tasks whose stories are told; the second tells of gifts, the third of places.
TOLD = ("qa3", "qa5", "qa4")
ASKED = ("qa1", "qa2", "qa3", "qa4", "qa5", *LESSONS)
# Questions of a kind about one story, and questions read at once.
MOST, ROWS = 4, 256


def opened(model: str) -> tuple[str, PreTrainedTokenizerBase, TokenHaystack]:
    """A model's folder by its name or path, its tokenizer, and the built-in held-out text."""
    torch.set_num_threads(1)
    path = resolve_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    return path, tokenizer, tokenized_haystack("builtin", "eval", tokenizer)


def told(
    task: str, seed: int, facts: int, length: int, haystack: TokenHaystack
) -> tuple[np.ndarray, Telling]:
    """(facts x length,) tokens of a story, and what it knows then."""
    rng = random.Random(seed)
    story, parts = telling(task, rng), []
    at = rng.randrange(len(haystack.ids) - facts * length)
    for _ in range(facts):
        event = story.draw()
        ids = haystack.encode(BABILONG_FACT_TEMPLATE.format(fact=story.tell(event)))
        if len(ids) > length:
            raise typer.BadParameter(f"a fact has {len(ids)} tokens", param_hint="--length")
        story.note(event)
        noise = haystack.ids[at : at + length - len(ids)]
        at += len(noise)
        place = rng.randint(0, len(noise))
        parts.append(np.concatenate([noise[:place], ids, noise[place:]]))
    return np.concatenate(parts), story


def asked(stories: list[Telling], kinds: list[str]) -> list[tuple[int, str, str, str]]:
    """(story, kind, question, answer), up to MOST of each kind about each."""
    return [
        (number, kind, question, answers[question])
        for number, story in enumerate(stories)
        for kind in kinds
        for answers in [story.answers(kind)]
        for question in random.Random(number).sample(sorted(answers), min(MOST, len(answers)))
    ]


@torch.no_grad()
def right(
    model: MemLMForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    length: int,
    questions: list[tuple[int, str, str, str]],
) -> Counter[str]:
    """How many answers of each kind are right, every token the likeliest, after ids (N, T)."""
    state = None
    for part in ids.split(length, 1):
        state = model(part, memory_state=state, logits_to_keep=1).memory_state
    found: Counter[str] = Counter()
    for begin in range(0, len(questions), ROWS):
        some = questions[begin : begin + ROWS]
        prompts = [encode_question(tokenizer, question) for _, _, question, _ in some]
        replies = [encode_answer(tokenizer, answer) for _, _, _, answer in some]
        width = max(len(p) + len(r) for p, r in zip(prompts, replies, strict=True))
        x, mask = torch.zeros(2, len(some), width, dtype=torch.long)
        for row, both in enumerate(map(np.concatenate, zip(prompts, replies, strict=True))):
            x[row, : len(both)], mask[row, : len(both)] = torch.from_numpy(both), 1
        rows = torch.tensor([number for number, *_ in some])
        out = model(x, attention_mask=mask, memory_state=state.select(rows), write=False)
        said = out.logits.argmax(-1)
        for row, (_, kind, _, _) in enumerate(some):
            span = slice(len(prompts[row]), len(prompts[row]) + len(replies[row]))
            before = slice(span.start - 1, span.stop - 1)
            found[kind] += int(torch.equal(said[row, before], x[row, span]))
    return found


def silence(model: MemLMForCausalLM, number: int) -> None:
    """Leave out what memory `number`, counted from 1 at the bottom, answers."""
    memories = [module for module in model.modules() if isinstance(module, DeltaBlock)]
    if not 1 <= number <= len(memories):
        raise typer.BadParameter(
            f"{number} is none of the model's {len(memories)} delta rules", param_hint="--without"
        )
    memories[number - 1].o_proj.weight.data.zero_()


def hide_unseen(model: MemLMForCausalLM) -> None:
    """Hide the tokens before the segment from attention that never saw them in training."""
    for module in model.modules():
        if isinstance(module, TransformerXL) and module.config.read_dropout == 1:
            module.train()


def main(
    model: Annotated[str, typer.Argument(help="a folder, or the name of a shipped model")],
    facts: Annotated[int, typer.Option(help="facts of a story")] = 30,
    stories: Annotated[int, typer.Option(help="stories of each task")] = 128,
    length: Annotated[
        int, typer.Option(help="tokens of a segment, in which one fact is told")
    ] = 12,
    without: Annotated[list[int] | None, typer.Option(help="leave out this memory; again")] = None,
    seed: int = 0,
    out: Path = Path(__file__).parent / "results/kinds.json",
) -> None:
    """Measure; write the table and its JSON."""
    path, tokenizer, haystack = opened(model)
    rows: list[dict[str, Any]] = []
    for left_out in (0, *(without or ())):
        weights = MemLMForCausalLM.from_pretrained(path).eval()
        hide_unseen(weights)
        if left_out:
            silence(weights, left_out)
        found: Counter[str] = Counter()
        count: Counter[str] = Counter()
        for task in TOLD:
            pairs = [
                told(task, 1000 * seed + number, facts, length, haystack)
                for number in range(stories)
            ]
            ids = torch.tensor(np.stack([ids for ids, _ in pairs]), dtype=torch.long)
            known = [story for _, story in pairs]
            kinds = [k for k in ASKED if k in kinds_of(task) and k not in count]
            questions = asked(known, kinds)
            count.update(kind for _, kind, _, _ in questions)
            found += right(weights, tokenizer, ids, length, questions)
        rows.append({"without": left_out, **{k: found[k] / count[k] for k in count}})
        shares = "  ".join(f"{kind} {found[kind] / count[kind]:.2f}" for kind in count)
        typer.echo(f"{f'without {left_out}' if left_out else 'all'}: {shares}")
    settings = {"model": model, "facts": facts, "stories": stories, "length": length, "seed": seed}
    write_result(out, "answers right by kind of question", settings | {"asked": dict(count)}, rows)


if __name__ == "__main__":
    typer.run(main)
