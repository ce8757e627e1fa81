"""What a model remembers of a fact that a segment's border cuts, by where it cuts.

A story of qa1 is told in the built-in held-out text; its last fact, which moves somebody, has its first
`cut` tokens in one segment and the rest in the next. At the end of a segment or two the model is asked
where they are.

    python benchmarks/borders.py qa1-5 [--stories 100]
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from kinds import opened, right
from record import write_result

from memlm import MemLMForCausalLM
from memlm.tasks.babi.endless import Telling, telling
from memlm.tasks.haystack import TokenHaystack
from memlm.templates import BABILONG_FACT_TEMPLATE

# Facts before the one that is cut, and where the first begins in its segment.
EARLIER, FIRST_AT = 4, 20


def cut_fact(
    seed: int, cut: int, length: int, haystack: TokenHaystack
) -> tuple[np.ndarray, tuple[str, str], int]:
    """Four segments of `length` tokens, the question and answer about the fact cut, and its tokens."""
    rng = random.Random(seed)
    story = telling("qa1", rng)
    facts = []
    for _ in range(EARLIER):
        event = story.draw()
        facts.append(haystack.encode(BABILONG_FACT_TEMPLATE.format(fact=story.tell(event))))
        story.note(event)
    last, changed = _moves(story)
    ids = haystack.encode(BABILONG_FACT_TEMPLATE.format(fact=last))
    at = rng.randrange(len(haystack.ids) - 4 * length)
    tokens = np.array(haystack.ids[at : at + 4 * length], dtype=np.int64)
    place = FIRST_AT
    for fact in facts:
        tokens[place : place + len(fact)] = fact
        place += len(fact) + FIRST_AT
    border = 2 * length
    tokens[border - cut : border - cut + len(ids)] = ids
    return tokens, changed, len(ids)


def _moves(story: Telling) -> tuple[str, tuple[str, str]]:
    """A fact after which a question has another answer, and these two."""
    while True:
        before, event = dict(story.answers("qa1")), story.draw()
        told = story.tell(event)
        story.note(event)
        for question, answer in story.answers("qa1").items():
            if question in before and before[question] != answer:
                return told, (question, answer)


def main(
    model: Annotated[str, typer.Argument(help="a folder, or the name of a shipped model")],
    stories: Annotated[int, typer.Option(help="stories for each place of the border")] = 100,
    seed: int = 0,
    out: Path = Path(__file__).parent / "results/borders.json",
) -> None:
    """Measure; write the table and its JSON."""
    path, tokenizer, haystack = opened(model)
    weights = MemLMForCausalLM.from_pretrained(path).eval()
    length = weights.segment_length
    rows: list[dict[str, Any]] = []
    cut, longest = 0, 1
    while cut < longest:
        told = [cut_fact(1000 * seed + number, cut, length, haystack) for number in range(stories)]
        # A fact that ends before the border is not cut.
        told = [one for one in told if cut < one[2]]
        longest = max(longest, *(size for *_, size in told)) if told else cut
        if told:
            ids = torch.tensor(np.stack([tokens for tokens, *_ in told]))
            asked = [(n, "qa1", *changed) for n, (_, changed, _) in enumerate(told)]
            found = right(weights, tokenizer, ids, length, asked)["qa1"]
            rows.append({"cut": cut, "stories": len(told), "right": found / len(told)})
            typer.echo(f"{cut} tokens before the border: {found} of {len(told)}")
        cut += 1
    write_result(out, "facts cut by a border", {"model": model, "seed": seed}, rows)


if __name__ == "__main__":
    typer.run(main)
