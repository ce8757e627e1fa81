"""Reader of the original bAbI text format.

Lines are numbered from 1 within a story; a line with tabs is a question, its answer and the numbers
of the supporting lines. A line numbered 1 opens a new story.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from memlm.tasks.babi.story import Story, check_task

_NAME = re.compile(r"(qa\d+)_.*\.txt")


def load(path: str | os.PathLike[str]) -> list[Story]:
    """Read one file: an item per question, with the facts before it and no earlier question.

    The task is taken from a name like `qa1_single-supporting-fact_test.txt`, else left empty.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; use babi.load_task(folder, task)")
    if not path.is_file():
        raise ValueError(f"story file {str(path)!r} does not exist; name a bAbI text file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"story file {str(path)!r} is not UTF-8 text; name a bAbI text file"
        ) from error
    named = _NAME.fullmatch(path.name)
    stories = _parse(text, str(path), named.group(1) if named else "")
    if not stories:
        raise ValueError(f"story file {str(path)!r} holds no question; name a bAbI text file")
    return stories


def find_task(
    folder: str | os.PathLike[str], task: str, split: Literal["train", "test"] | None = None
) -> Path:
    """Return the file of `task` in `folder`; without `split`, test is taken before train."""
    check_task(task)
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"story folder {str(folder)!r} does not exist; name a folder of bAbI files"
        )
    for wanted in (split,) if split else ("test", "train"):
        found = sorted(folder.glob(f"{task}_*_{wanted}.txt"))
        if found:
            return found[0]
    raise ValueError(
        f"story folder {str(folder)!r} has no file {task}_*_{split or '[test|train]'}.txt; "
        "generate stories or name another folder"
    )


def load_task(
    folder: str | os.PathLike[str], task: str, split: Literal["train", "test"] | None = None
) -> list[Story]:
    """Read the stories of `task` from a folder of files named as bAbI names them."""
    return load(find_task(folder, task, split))


def _parse(text: str, path: str, task: str) -> list[Story]:
    stories: list[Story] = []
    facts: list[str] = []
    index_of: dict[int, int] = {}  # line number within the story -> index into facts
    expected = 1
    for at, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{at}"
        head, _, body = line.strip().partition(" ")
        if not head.isdecimal() or not body.strip():
            raise ValueError(f"{where}: expected 'number sentence', got {line[:80]!r}")
        number = int(head)
        if number == 1:
            facts, index_of, expected = [], {}, 1
        if number != expected:
            raise ValueError(
                f"{where}: expected line number {expected} or 1, got {number}; a line is missing"
            )
        expected += 1
        if "\t" not in body:
            index_of[number] = len(facts)
            facts.append(body.strip())
            continue
        stories.append(_question(body, where, list(facts), index_of, task))
    return stories


def _question(
    body: str, where: str, facts: list[str], index_of: dict[int, int], task: str
) -> Story:
    parts = [part.strip() for part in body.split("\t")]
    if len(parts) not in (2, 3) or not parts[0] or not parts[1]:
        raise ValueError(f"{where}: expected 'question<TAB>answer<TAB>supporting', got {body!r}")
    numbers = parts[2].split() if len(parts) == 3 else []
    supporting = []
    for number in numbers:
        if not number.isdecimal() or int(number) not in index_of:
            raise ValueError(f"{where}: supporting line {number!r} is not an earlier fact")
        supporting.append(index_of[int(number)])
    return Story(facts, parts[0], parts[1], supporting, task)
