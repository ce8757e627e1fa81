"""What the benchmarks share: which memories stand on a plain base, and how a result is written."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from memlm import __version__
from memlm.files import write_json
from memlm.memory import available_memories, memory_class

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
    write_json(out, {"what": what, "settings": settings, "versions": versions, "rows": rows})
    print(f"written: {out}")
