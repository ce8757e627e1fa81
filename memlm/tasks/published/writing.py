"""Writes samples in the published layout, so that a later call may go on."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from memlm.tasks.babi.story import TASKS, Story, check_task
from memlm.tasks.compose import Sample, compose, facts_fit
from memlm.tasks.composition import Composition, composition_of
from memlm.tasks.haystack.cache import tokenized_haystack
from memlm.tasks.haystack.sources import check_source
from memlm.tasks.haystack.tokenised import TokenHaystack
from memlm.tasks.lengths import format_length, parse_length
from memlm.tasks.published.records import COLUMNS, Format, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The file that says what was written with which settings, so that a later call may go on.
SETTINGS = "memlm.json"
CARD = "README.md"
CARD_MARK = "<!-- Written by `memlm data babilong`, and anew by every call. -->"

# When this many stories in a row do not fit, none will.
MAX_REJECTED = 2_000

# Rows are gathered up to this size before they are written; one row of 10M tokens exceeds it by itself.
BATCH_CHARACTERS = 16_000_000
BATCH_ROWS = 100


def write(
    out: str | os.PathLike[str],
    tasks: Sequence[str],
    lengths: Sequence[str | int],
    samples: int = 100,
    *,
    haystack: str | os.PathLike[str] = "builtin",
    stories: str | os.PathLike[str] = "generated",
    tokenizer: PreTrainedTokenizerBase | str = "words",
    seed: int = 0,
    format: Format = "json",
    position: tuple[float, float] = (0.0, 1.0),
    distance: int | None = None,
    reserve: int = 0,
    share: float = 1.0,
    composition: str | Composition = "exact",
    overwrite: bool = False,
) -> list[Path]:
    """Write samples in the published layout with a data set card, and return the files of samples.

    format: "json" for `out`/data/TASK/LENGTH.json, "parquet" for
    `out`/LENGTH/TASK-00000-of-00001.parquet. `tokenizer` is what `length` counts in: a tokenizer, a
    hub id or folder, or "words" for words and punctuation marks. `stories` is "generated" or a folder
    of bAbI files, repeated when there are too few. position, distance, reserve, composition: as for
    `compose`; share: as for `facts_fit`. A file is written a row at a time and appears when it is
    complete. A later call with the same settings leaves it alone; one with other settings is refused,
    unless `overwrite` is set.
    """
    from memlm.files import write_atomically, write_json, write_text

    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    lengths = [lengths] if isinstance(lengths, str | int) else list(lengths)
    counts = [parse_length(length) for length in lengths]
    rules = composition_of(
        composition, reserve=reserve, share=share, position=position, distance=distance
    )
    placed = {"position": tuple(position), "distance": distance, "composition": rules}
    out = Path(out)
    _check_write(out, tasks, counts, samples, haystack, stories, seed, format, rules)
    made = load_tokenizer(tokenizer)
    noise = tokenized_haystack(haystack, "eval", made)
    settings = {
        "samples": samples,
        "seed": seed,
        "haystack": _name(haystack),
        "haystack_digest": noise.digest,
        "stories": _name(stories),
        "tokenizer": _name(tokenizer if isinstance(tokenizer, str) else made.name_or_path),
        "position": list(position),
        "distance": distance,
        "composition": composition if isinstance(composition, str) else rules.settings(),
        "reserve": rules.reserve,
        "share": rules.share,
    }
    plan: list[tuple[Path, str, int, dict[str, Any]]] = []
    for task in tasks:
        marked = settings | {"stories_digest": _stories_digest(stories, task)}
        for count in counts:
            path = out / _file_name(task, count, format)
            if not overwrite:
                _check_written(out, path, marked)
            plan.append((path, task, count, marked))
    for path, task, count, marked in plan:
        if path.exists() and not overwrite:
            continue
        # A file must never stand beside the settings of another.
        path.unlink(missing_ok=True)
        entries = _read_settings(out)
        entries[path.relative_to(out).as_posix()] = {"settings": marked, "versions": _versions()}
        write_json(out / SETTINGS, {"files": dict(sorted(entries.items()))})
        rows = _compose_rows(task, count, samples, noise, stories, seed, placed)
        fill = functools.partial(_write_json if format == "json" else _write_parquet, rows)
        write_atomically(path, fill)
    card = _card(out)
    write_text(out / CARD, card)
    return [path for path, *_ in plan]


def _check_write(
    out: Path,
    tasks: Sequence[str],
    counts: Sequence[int],
    samples: int,
    haystack: str | os.PathLike[str],
    stories: str | os.PathLike[str],
    seed: int,
    format: str,
    rules: Composition,
) -> None:
    """Refuse what cannot work before any work is done."""
    from memlm.tasks import babi

    check_source(haystack)
    if not tasks or not counts:
        raise ValueError(f"tasks={tasks} and lengths={counts} must each name at least one")
    for task in tasks:
        check_task(task)
        if os.fspath(stories) != "generated":
            babi.find_task(stories, task)
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative")
    if format not in get_args(Format):
        raise ValueError(f"format={format!r} is unknown; use one of {get_args(Format)}")
    for count in counts:
        rules.room(count)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r} is a file; name a folder")
    others = _samples_in(out, "parquet" if format == "json" else "json")
    if others:
        raise ValueError(
            f"out={str(out)!r} holds {others[0][0].name}, and a data set is of one format; "
            f"use the other format than {format!r}, or another folder"
        )
    card = out / CARD
    if card.is_file() and CARD_MARK not in card.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(
            f"out={str(out)!r} holds a {CARD} that was not written here; name another folder"
        )


def _check_written(out: Path, path: Path, settings: dict[str, Any]) -> None:
    """Refuse a file that was written with other settings than the wanted ones."""
    if not path.exists():
        return
    name = path.relative_to(out).as_posix()
    entry = _read_settings(out).get(name)
    # Without an entry, it is unknown what the file was made of; it is left alone all the same.
    # Files of version 0.1 do not name a composition: there was only one.
    known = settings if entry is None else {"composition": "exact", **entry["settings"]}
    for key, value in json.loads(json.dumps(settings)).items():
        if known.get(key) != value:
            raise ValueError(
                f"{name} in out={str(out)!r} was written with {key}={known.get(key)!r}, not "
                f"{value!r}; set overwrite, or name another folder"
            )


def _read_settings(out: Path) -> dict[str, Any]:
    from memlm.files import read_json

    path = out / SETTINGS
    if not path.is_file():
        return {}
    try:
        return dict(read_json(path)["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); remove it") from error


def _compose_rows(
    task: str,
    length: int,
    samples: int,
    noise: TokenHaystack,
    stories: str | os.PathLike[str],
    seed: int,
    placed: dict[str, Any],
) -> Iterator[Record]:
    from memlm.tasks import babi

    rng = np.random.default_rng([seed, zlib.crc32(task.encode()), length])
    if os.fspath(stories) == "generated":
        told: Iterable[Story] = babi.generate(task, rng)
    else:
        told = cycle(babi.load_task(stories, task))
    made = rejected = 0
    rules: Composition = placed["composition"]
    for story in told:
        if not facts_fit(story, noise, length, distance=placed["distance"], composition=rules):
            rejected += 1
            if rejected == MAX_REJECTED:
                raise ValueError(
                    f"none of {MAX_REJECTED} stories of {task} fits in length "
                    f"{format_length(length)} with reserve={rules.reserve}, "
                    f"distance={placed['distance']} and share={rules.share}; use a longer length"
                )
            continue
        rejected = 0
        sample: Sample = compose(story, noise, length, noise.tokenizer, rng, **placed)
        yield Record(input=sample.text().strip(), question=story.question, target=story.answer)
        made += 1
        if made == samples:
            return


def _write_json(rows: Iterator[Record], temporary: Path) -> None:
    with temporary.open("w", encoding="utf-8") as file:
        before = "[\n"
        for row in rows:
            file.write(before)
            file.write(json.dumps(row, ensure_ascii=False))
            before = ",\n"
        file.write("\n]\n")


def _write_parquet(rows: Iterator[Record], temporary: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([(name, pyarrow.string()) for name in COLUMNS])
    # A page, which is read whole, ends after a batch at the earliest. No text comes twice, so a dictionary
    # of them would only be a copy.
    with pyarrow.parquet.ParquetWriter(
        temporary, schema, write_batch_size=1, use_dictionary=["question", "target"]
    ) as file:
        for batch in _batches(rows):
            file.write_table(pyarrow.Table.from_pylist(batch, schema=schema))


def _batches(rows: Iterator[Record]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    held = 0
    for row in rows:
        batch.append(dict(row))
        held += len(row["input"])
        if held >= BATCH_CHARACTERS or len(batch) == BATCH_ROWS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _file_name(task: str, length: int, format: Format) -> str:
    named = format_length(length)
    if format == "json":
        return f"data/{task}/{named}.json"
    return f"{named}/{task}-00000-of-00001.parquet"


def _samples_in(out: Path, format: Format) -> list[tuple[Path, str, int]]:
    """The files of samples in a folder, each with its task and length, by length and task."""
    pattern = "data/*/*.json" if format == "json" else "*/*-00000-of-00001.parquet"
    found = []
    for path in out.glob(pattern):
        json_names = path.parent.name, path.stem
        task, length = (
            json_names if format == "json" else (path.name.partition("-")[0], path.parent.name)
        )
        try:
            found.append((path, check_task(task), parse_length(length)))
        except ValueError:
            continue  # Something of the user's own.
    return sorted(found, key=lambda entry: (entry[2], TASKS.index(entry[1])))


def _card(out: Path) -> str:
    """The data set card: which file is which split, and how each was made."""
    import yaml

    files = _samples_in(out, "json") or _samples_in(out, "parquet")
    configs: dict[str, list[dict[str, str]]] = {}
    for path, task, length in files:
        split = {"split": task, "path": path.relative_to(out).as_posix()}
        configs.setdefault(format_length(length), []).append(split)
    head = {
        "pretty_name": "BABILong samples composed by memlm",
        "language": ["en"],
        "task_categories": ["question-answering"],
        "tags": ["long-context", "babilong"],
        "configs": [{"config_name": n, "data_files": splits} for n, splits in configs.items()],
    }
    entries = _read_settings(out)
    groups: dict[str, list[str]] = {}
    for path, _, _ in files:
        name = path.relative_to(out).as_posix()
        told = {**entries.get(name, {}).get("settings", {})}
        told.pop("stories_digest", None)
        told |= {f"version of {k}": v for k, v in entries.get(name, {}).get("versions", {}).items()}
        groups.setdefault(json.dumps(told), []).append(name)
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        CARD_MARK,
        "",
        "# BABILong samples",
        "",
        "bAbI facts scattered through running text (BABILong, arXiv:2406.10149). A configuration is",
        "a length in tokens (4k is 4,096; where the composition is published, 4,000 less 300), a split",
        "a task; columns are input, question and target.",
        "",
        "```python",
        'datasets.load_dataset(FOLDER_OR_ID, "4k", split="qa1")',
        "```",
    ]
    for group, names in groups.items():
        lines += ["", "## Made with", ""]
        lines += [f"- {key}: {value}" for key, value in json.loads(group).items()]
        lines += ["", f"Files: {', '.join(names)}"]
    return "\n".join(lines) + "\n"


def _stories_digest(stories: str | os.PathLike[str], task: str) -> str:
    if os.fspath(stories) == "generated":
        return ""
    from memlm.tasks import babi

    return hashlib.blake2b(babi.find_task(stories, task).read_bytes(), digest_size=8).hexdigest()


def _versions() -> dict[str, str]:
    import tokenizers
    import transformers

    import memlm

    return {
        "memlm": memlm.__version__,
        "tokenizers": tokenizers.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _name(source: str | os.PathLike[str]) -> str:
    """The name of a source, without its folder on this machine."""
    name = os.fspath(source)
    if name.startswith("hub:") and Path(name.removeprefix("hub:")).exists():
        return f"hub:{Path(name).name}"
    return Path(name).name if Path(name).exists() else name


def load_tokenizer(name: PreTrainedTokenizerBase | str) -> PreTrainedTokenizerBase:
    if not isinstance(name, str):
        return name
    if name != "words":
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name)
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Only counted, never decoded: every word is the same token.
    core = Tokenizer(models.WordLevel({"<word>": 0}, unk_token="<word>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core)
