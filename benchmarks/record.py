"""What the benchmarks share: which memories stand on a plain base, and how a result is written."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from memlm import __version__
from memlm.files import write_text
from memlm.memory import available_memories, memory_class

# Characters of a line of a result.
WIDTH = 240
# Those that can stand on a base that has no recurrent state of its own.
ON_PLAIN_BASES = tuple(
    name
    for name in available_memories()
    if name == "none" or memory_class(name).site != "recurrence"
)


def write_result(
    out: Path, what: str, settings: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """Write a benchmark's rows with what they are, how they were measured, and the versions."""
    versions = {
        "memlm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    value = {"what": what, "settings": settings, "versions": versions, "rows": rows}
    write_text(out, laid_out(value) + "\n")
    print(f"written: {out}")


def laid_out(value: Any, indent: int = 0) -> str:
    """JSON in which whatever fits on a line has one: a list of numbers, or a row of few figures."""
    line = json.dumps(value, ensure_ascii=False)
    if indent + len(line) <= WIDTH or not isinstance(value, dict | list):
        return line
    inner = indent + 2
    if isinstance(value, dict):
        parts = [
            f"{json.dumps(str(key), ensure_ascii=False)}: {laid_out(part, inner)}"
            for key, part in value.items()
        ]
    else:
        parts = [laid_out(part, inner) for part in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    space = " " * inner
    return f"{opening}\n{space}" + f",\n{space}".join(parts) + f"\n{' ' * indent}{closing}"
