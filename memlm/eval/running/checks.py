"""Checks of an evaluation's arguments: what cannot work is refused by name before any work is done."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlm.tasks import babi
from memlm.tasks.babilong import Composition
from memlm.tasks.haystack import Haystack, check_source
from memlm.tasks.lengths import parse_length
from memlm.tasks.registry import find_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_own_questions(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] | None,
    lengths: Sequence[str | int] | None,
    data: str | os.PathLike[str] | None,
    out: str | os.PathLike[str] | None,
) -> None:
    """Refuse what own questions do not have, and what no evaluation can do without."""
    for name, value in (("tasks", tasks), ("lengths", lengths)):
        if value is not None:
            raise ValueError(
                f"{name}={value} choose samples of BABILong, but data={os.fspath(data or '')!r} brings "
                "documents and questions of its own; leave one of the two out"
            )
    _check_run(tokenizer, out)


def _check_run(tokenizer: PreTrainedTokenizerBase, out: str | os.PathLike[str] | None) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token; set tokenizer.eos_token")
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"out={os.fspath(out)!r} is a file; name a folder")


def cells_to_evaluate(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] | None,
    lengths: Sequence[str | int] | None,
    haystack: str | os.PathLike[str] | Haystack,
    stories: str | os.PathLike[str],
    data: str | os.PathLike[str] | None,
    out: str | os.PathLike[str] | None,
    seed: int,
) -> list[tuple[str, int]]:
    """Refuse what cannot work before any work is done; return the cells to evaluate."""
    tasks = [tasks] if isinstance(tasks, str) else list(tasks or ())
    lengths = [lengths] if isinstance(lengths, str | int) else list(lengths or ())
    if not tasks or not lengths:
        raise ValueError(f"tasks={tasks} and lengths={lengths} must each name at least one")
    for task in tasks:
        find_task(task)
        if data is None and os.fspath(stories) != "generated" and task in babi.TASKS:
            babi.find_task(stories, task)
    tokens = list(dict.fromkeys(parse_length(length) for length in lengths))
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative")
    _check_run(tokenizer, out)
    if data is None and not isinstance(haystack, Haystack):
        check_source(haystack)
    return list(itertools.product(dict.fromkeys(tasks), tokens))


# The settings that say how samples are composed, with their defaults.
_COMPOSING = {
    "haystack": "builtin",
    "stories": "generated",
    "position": (0.0, 1.0),
    "distance": None,
    "composition": "exact",
    "split": "eval",
    "seed": 0,
}


def check_composition(
    plan: Sequence[tuple[str, int]],
    rules: Composition,
    data: str | os.PathLike[str] | None,
    **composing: Any,
) -> None:
    """Refuse settings of composition where nothing is composed, or by rules that do not have them."""
    if data is not None:
        for name, value in composing.items():
            if value != _COMPOSING[name]:
                raise ValueError(
                    f"{name}={value!r} says how samples are composed, but data={os.fspath(data)!r} "
                    "brings them ready-made; leave one of the two out"
                )
        return
    if isinstance(composing["haystack"], Haystack) and composing["split"] != _COMPOSING["split"]:
        raise ValueError(
            f"split={composing['split']!r} chooses a part of a source, but haystack is a Haystack, "
            "whose part is chosen already; leave split out, or name the source"
        )
    for task, length in plan:
        if rules.name == "published" and task not in babi.TASKS:
            raise ValueError(
                f"composition='published' is for bAbI's tasks, and {task!r} is none; evaluate it apart"
            )
        rules.room(length)
