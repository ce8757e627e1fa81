"""lm_eval's own BABILong tasks over samples of ours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from memlm.files import write_json
from memlm.tasks.babi.story import check_task
from memlm.tasks.lengths import format_length


def write_babilong_tasks(
    out: str | os.PathLike[str],
    source: str | os.PathLike[str],
    tasks: Sequence[str],
    lengths: Sequence[str | int],
) -> list[str]:
    """Give lm_eval's BABILong tasks the samples in a folder instead of the hub's; return their names.

    source: what `memlm.tasks.babilong.write` wrote, `data/TASK/LENGTH.json`. out: a folder for
    `--include_path`, with one task `memlm_babilong_TASK_LENGTH` per file, prompts and metric unchanged.
    """
    import lm_eval.tasks

    theirs = Path(lm_eval.tasks.__file__).parent / "babilong"
    names = []
    for task in tasks:
        check_task(task)
        for length in map(format_length, lengths):
            samples = Path(source).resolve() / "data" / task / f"{length}.json"
            if not samples.is_file():
                raise ValueError(
                    f"source={os.fspath(source)!r} has no data/{task}/{length}.json; write it with "
                    "memlm data babilong, or choose a task and a length that are there"
                )
            name = f"memlm_babilong_{task}_{length}"
            # JSON is YAML; the harness looks for files with this ending.
            description = {
                "include": str(theirs / f"babilong_{task}.yaml"),
                "task": name,
                "custom_dataset": None,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {task: str(samples)}},
            }
            write_json(Path(out) / f"{name}.yaml", description)
            names.append(name)
    return names
