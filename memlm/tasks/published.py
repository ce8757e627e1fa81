"""BABILong samples as published: read without ever holding a file, and written by us.

A sample is an object with columns input, question and target. Layouts: data/TASK/LENGTH.json, one
array a file (or .jsonl); LENGTH/TASK-*.parquet; and data sets of the hub, whose configuration is the
length and whose split is the task.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

import numpy as np
from numpy.typing import NDArray

from memlm.tasks.babi.story import TASKS, Story, check_task
from memlm.tasks.babilong import (
    QUESTION_TEMPLATE,
    Composition,
    Sample,
    compose,
    composition_of,
    encode_question,
    facts_fit,
    format_length,
    parse_length,
)
from memlm.tasks.haystack import TokenHaystack, check_source
from memlm.tasks.haystack_cache import tokenized_haystack
from memlm.tokens import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Format = Literal["json", "parquet"]

COLUMNS = ("input", "question", "target")
# What was written with which settings, so that a later call may go on.
SETTINGS = "memlm.json"
CARD = "README.md"
CARD_MARK = "<!-- Written by `memlm data babilong`, and anew by every call. -->"
# So many stories in a row that do not fit: none will.
MAX_REJECTED = 2_000
# Rows are gathered up to here before they are written; one row of 10M tokens is more by itself.
BATCH_CHARACTERS = 16_000_000
BATCH_ROWS = 100

_READ_CHARACTERS = 1 << 16
_PIECE_CHARACTERS = 1 << 13
_PIECES_AT_ONCE = 16
_PIECE_TOKENS = 1 << 16
# A blank between two words: byte-level tokenizers never join across one.
_CUT = re.compile(r"(?<=\S) (?=\S)")
_SPACE = re.compile(r"[ \t\n\r]*")


class Record(TypedDict):
    """A ready-made sample, with the columns of the published data sets."""

    input: str
    question: str
    target: str


class RecordSample:
    """A ready-made sample as an evaluation takes it, read like a composed `Sample`.

    Where its facts stand is not known, so there are neither `fact_offsets` nor facts in `story`. The
    text follows one space, as a composed document does. Tokens are counted when first asked for.
    """

    fact_offsets: tuple[int, ...] = ()

    def __init__(self, record: Record, task: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.record = record
        self.task = task
        self.tokenizer = tokenizer
        self.question = record["question"]
        self.target = record["target"]
        self.story = Story([], self.question, self.target, [], task)

    @property
    def tokens(self) -> int:
        return len(self._flat)

    def __len__(self) -> int:
        return self.tokens

    def ids(self) -> Iterator[NDArray[np.int32]]:
        """Yield the document's token ids in order, in pieces; read-only views, do not write."""
        for begin in range(0, len(self._flat), _PIECE_TOKENS):
            yield self._flat[begin : begin + _PIECE_TOKENS]

    def __iter__(self) -> Iterator[str]:
        """Yield the document's text in pieces, each but the first cut before a blank."""
        text = self.record["input"].strip()
        yield from _cut_at_blanks(f" {text}" if text else "")

    def text(self) -> str:
        """Return the whole document."""
        return "".join(self)

    def question_ids(self, template: str = QUESTION_TEMPLATE) -> NDArray[np.int32]:
        """Return what `encode_question` does."""
        return encode_question(self.tokenizer, self.question, template)

    @functools.cached_property
    def _flat(self) -> NDArray[np.int32]:
        # In pieces: a tokenizer's own record of a text is many times the text.
        parts = [np.zeros(0, dtype=np.int32)]
        pieces = iter(self)
        while batch := list(islice(pieces, _PIECES_AT_ONCE)):
            parts += [np.array(ids, dtype=np.int32) for ids in encode_texts(self.tokenizer, batch)]
        flat = np.concatenate(parts)
        flat.flags.writeable = False
        return flat


def _cut_at_blanks(text: str) -> Iterator[str]:
    begin = 0
    while len(text) - begin > _PIECE_CHARACTERS:
        end = begin + _PIECE_CHARACTERS
        at = text.rfind(" ", begin + 1, end)
        # The last blank mostly serves; a run of blanks must stay whole.
        found = _CUT.search(text, at if at > 0 else end)
        if found is None:
            break
        yield text[begin : found.start()]
        begin = found.start()
    if begin < len(text):
        yield text[begin:]


def load(source: str | os.PathLike[str], task: str, length: str | int) -> list[Record]:
    """Read all samples of `iterate` at once."""
    return list(iterate(source, task, length))


def iterate(
    source: str | os.PathLike[str],
    task: str,
    length: str | int,
    limit: int | None = None,
    *,
    streaming: bool = False,
) -> Iterator[Record]:
    """Yield ready-made samples of a local folder or a hub data set, one at a time, at most `limit`.

    A folder has `data/TASK/LENGTH.json` or `.jsonl`, or `LENGTH/TASK-*.parquet`, each with or without
    `data/`, or a data set card that says what its files are. A hub data set is downloaded once and
    kept by `datasets`; with `streaming` only what is read is, each time anew.
    """
    check_task(task)
    named = format_length(length)
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or None for all samples")
    name = os.fspath(source)
    folder = Path(name).expanduser()
    if folder.is_dir():
        rows = _local_rows(folder, task, named, streaming)
    elif folder.exists():
        raise ValueError(f"{name!r} is a file; name the folder that holds data/TASK/LENGTH.json")
    elif name.startswith((".", "/", "~")):
        raise ValueError(f"folder {name!r} does not exist; name a folder or a hub id")
    else:
        rows = _hub_rows(name, task, named, streaming)
    return islice((_checked(*row) for row in rows), limit)


def _checked(where: str, number: int, row: Any) -> Record:
    """Return row `number`, counted from 0, with the columns of a sample; ValueError when it has not."""
    if not isinstance(row, dict):
        raise ValueError(
            f"row {number} of {where} is a {type(row).__name__}, not an object with the columns "
            "input, question and target"
        )
    for key in COLUMNS:
        if key not in row:
            raise ValueError(
                f"row {number} of {where} lacks {key!r}; columns must be input, question and target"
            )
        if not isinstance(row[key], str):
            raise ValueError(
                f"row {number} of {where} has {key}={str(row[key])[:40]!r}, a "
                f"{type(row[key]).__name__}; columns must be strings"
            )
    return Record(input=row["input"], question=row["question"], target=row["target"])


_Rows = Iterator[tuple[str, int, Any]]


def _local_rows(folder: Path, task: str, length: str, streaming: bool) -> _Rows:
    for root in (folder / "data", folder):
        for suffix in (".json", ".jsonl"):
            path = root / task / f"{length}{suffix}"
            if path.is_file():
                return _json_rows(path)
        shards = sorted((root / length).glob(f"{task}-*.parquet"))
        if shards:
            return _parquet_rows(shards)
    if (folder / CARD).is_file():
        return _hub_rows(str(folder), task, length, streaming)
    raise ValueError(
        f"folder {str(folder)!r} has neither data/{task}/{length}.json nor "
        f"{length}/{task}-*.parquet; choose a task and a length that are there"
    )


def _json_rows(path: Path) -> _Rows:
    """Read an array of objects, or objects one after the other, as far as they are taken."""
    number = 0
    try:
        # Some editors begin a file with a mark of its encoding.
        with path.open(encoding="utf-8-sig") as stream:
            text = _Json(stream.read)
            array = text.next() == "["
            if array:
                text.at += 1
            while (char := text.next()) != ("]" if array else ""):
                if array and number:
                    text.expect(",")
                    char = text.next()
                if char != "{":
                    raise _Damaged(f"an object is expected, not {char or 'the end'!r}")
                yield repr(str(path)), number, text.value()
                number += 1
            if array:
                text.at += 1
                text.expect("")
            elif not number:
                raise _Damaged("it is empty")
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, _Damaged) as error:
        raise ValueError(
            f"row {number} of {str(path)!r} is not JSON ({error}); download the file again"
        ) from error


class _Damaged(Exception):
    """What is wrong with a file."""


class _Json:
    """Text of which only what is not yet decoded is held."""

    def __init__(self, read: Callable[[int], str]) -> None:
        self.read = read
        self.text = ""
        self.at = 0
        self.decoder = json.JSONDecoder()

    def more(self) -> bool:
        # Half as much again as is held: a long row is scanned three times over, not once a piece.
        found = self.read(max(_READ_CHARACTERS, (len(self.text) - self.at) // 2))
        self.text = self.text[self.at :] + found
        self.at = 0
        return bool(found)

    def next(self) -> str:
        """Pass over blanks; return the character there, "" at the end."""
        while True:
            match = _SPACE.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def expect(self, char: str) -> None:
        found = self.next()
        if found != char:
            raise _Damaged(f"{char or 'the end'!r} is expected, not {found or 'the end'!r}")
        self.at += len(char)

    def value(self) -> Any:
        while True:
            try:
                value, self.at = self.decoder.raw_decode(self.text, self.at)
                return value
            except json.JSONDecodeError as error:
                # A string or a word may go on behind what was read; any other fault will not mend.
                open_ended = error.msg.startswith("Unterminated string")
                if not open_ended and error.pos < len(self.text) - 16:
                    raise
                if not self.more():
                    raise


def _parquet_rows(paths: Sequence[Path]) -> _Rows:
    import pyarrow
    import pyarrow.parquet

    for path in paths:
        number = 0
        try:
            # Through a small buffer, or a whole column of a group of rows is read ahead.
            with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20) as file:
                names = [name for name in file.schema_arrow.names if name in COLUMNS]
                # A reader of all groups would keep what it read of each until the end.
                for group in range(file.num_row_groups):
                    for batch in file.iter_batches(batch_size=1, row_groups=[group], columns=names):
                        for row in batch.to_pylist():
                            yield repr(str(path)), number, row
                            number += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(
                f"row {number} of {str(path)!r} is not parquet ({str(error)[:200]}); "
                "download the file again"
            ) from error


def _hub_rows(source: str, task: str, length: str, streaming: bool) -> _Rows:
    import datasets

    try:
        rows = datasets.load_dataset(source, length, split=task, streaming=streaming)
    except Exception as error:  # `datasets` raises a different type for every cause.
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(
            f"{source!r} {task} {length} cannot be loaded ({type(error).__name__}: {reason}); "
            "name a folder, or check the id and the connection"
        ) from error
    where = f"{source!r} {length} {task}"
    return ((where, number, row) for number, row in enumerate(rows))


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
    of bAbI files, repeated when they are fewer. position, distance, reserve, composition: as for
    `compose`; share: as for `facts_fit`. A file is written a row at a time and is there when it is
    whole; a later call with the same settings leaves it alone, with others it refuses, unless
    `overwrite`.
    """
    from memlm.state import write_atomically, write_json

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
        # Never a file beside the settings of another.
        path.unlink(missing_ok=True)
        entries = _read_settings(out)
        entries[path.relative_to(out).as_posix()] = {"settings": marked, "versions": _versions()}
        write_json(out / SETTINGS, {"files": dict(sorted(entries.items()))})
        rows = _compose_rows(task, count, samples, noise, stories, seed, placed)
        fill = functools.partial(_write_json if format == "json" else _write_parquet, rows)
        write_atomically(path, fill)
    card = _card(out)
    write_atomically(out / CARD, lambda temporary: temporary.write_text(card, encoding="utf-8"))
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
    """Refuse to take a file written with other settings for the one that is wanted."""
    if not path.exists():
        return
    name = path.relative_to(out).as_posix()
    entry = _read_settings(out).get(name)
    # Without an entry, what it was made of is unknown; it is left alone all the same.
    # Files of version 0.1 say nothing of a composition: there was one.
    known = settings if entry is None else {"composition": "exact", **entry["settings"]}
    for key, value in json.loads(json.dumps(settings)).items():
        if known.get(key) != value:
            raise ValueError(
                f"{name} in out={str(out)!r} was written with {key}={known.get(key)!r}, not "
                f"{value!r}; set overwrite, or name another folder"
            )


def _read_settings(out: Path) -> dict[str, Any]:
    path = out / SETTINGS
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["files"])
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
    # A page, which is read whole, ends after a batch at the earliest; no text comes twice, so that a
    # dictionary of them would be a copy.
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
    """What a source is called, without where on this machine it lies."""
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
