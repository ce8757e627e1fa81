"""Tokenised haystacks kept on disk: made once, then mapped into memory instead of made again.

CACHE/haystacks/KEY-DIGEST.arrow holds a sentence per row: `document` (its number), `text` and `ids`;
`datasets.Dataset.from_file` opens it. KEY is a digest of everything the rows depend on, so an entry is
never stale; DIGEST is that of the file, and one that is damaged is made again. CACHE is the variable
MEMLM_CACHE, else ~/.cache/memlm; empty for none.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from memlm import text as sentence_rules
from memlm.tasks.haystack import documents as document_rules
from memlm.tasks.haystack import installed, made, sources, tokenised
from memlm.tasks.haystack.documents import Document, Split
from memlm.tasks.haystack.sources import (
    MAX_CHARACTERS,
    check_source,
    check_split,
    files_of,
    parse_hub,
    parts_of,
    read_documents,
)
from memlm.tasks.haystack.tokenised import MIN_TOKENS, SentenceTexts, TokenHaystack, tokenise
from memlm.tokens import encode_texts

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

FORMAT = 2
VARIABLE = "MEMLM_CACHE"
# Less text is tokenised in about a second. So is "builtin", whose text moreover changes with Python's
# version and options (-OO has no docstrings).
MIN_CHARACTERS = 1_000_000
# No build takes this long: the temporary files of an older one were abandoned.
ABANDONED_SECONDS = 24 * 3600
PROBE = " It's 3.5 miles, he said - naïve café.\n\nMary went to the office."
# The key in a file's schema metadata that says what it was made of, and the digest of its ids.
_SCHEMA_KEY = b"memlm"
# Entries read through in this process; once is enough, files in use are never written to.
_verified: set[Path] = set()
_log = logging.getLogger(__name__)


class _Unwritable(Exception):
    """The disk refused something the cache wanted to write."""


def tokenized_haystack(
    source: str | os.PathLike[str],
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    *,
    min_tokens: int = MIN_TOKENS,
    max_characters: int = MAX_CHARACTERS,
    cache: str | os.PathLike[str] | None = "auto",
) -> TokenHaystack:
    """Return the sentences of a source's split as tokens, read from disk if they were made before.

    The same as `Haystack.open(source, split).tokenized(tokenizer)`, but of a large source neither
    text nor ids are held in memory. cache: a folder; "auto" is $MEMLM_CACHE, else ~/.cache/memlm;
    None or "" for none. Where the folder cannot be written, the result is made in memory.
    """
    check_source(source)
    check_split(split)
    if min_tokens < 1:
        raise ValueError(f"min_tokens={min_tokens} must be at least 1")
    source = os.fspath(source)
    folder = cache_folder(cache)
    wanted = None
    if folder is not None:
        wanted = _wanted(source, split, tokenizer, min_tokens, max_characters)
    if folder is not None and wanted is not None:
        entries, key = folder / "haystacks", _digest(wanted)
        for path in _entries(entries, key):
            known = _open_entry(path, tokenizer, source, min_tokens)
            if known is not None:
                return known
        documents = read_documents(source, split, max_characters)
        try:
            return _build(entries, key, wanted, documents, tokenizer, source)
        except _Unwritable as error:
            _log.warning(
                "the haystack cache %s cannot be written (%s); set %s to another folder",
                folder,
                error,
                VARIABLE,
            )
    documents = read_documents(source, split, max_characters)
    return TokenHaystack(documents, tokenizer, source, min_tokens)


def cache_folder(cache: str | os.PathLike[str] | None = "auto") -> Path | None:
    """The folder that `cache` means; None for no cache."""
    if cache == "auto":
        cache = os.environ.get(VARIABLE, os.path.join("~", ".cache", "memlm"))
    if cache is None or os.fspath(cache) == "":
        return None
    try:
        return Path(cache).expanduser()
    except RuntimeError:  # There is no home folder.
        return None


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A digest of all that decides how texts become ids; None where that cannot be told."""
    import tokenizers
    import transformers

    known: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "versions": [tokenizers.__version__, transformers.__version__],
    }
    try:
        # Control tokens written out are text; older entries treated them as control tokens.
        known["split_special_tokens"] = True
        if tokenizer.is_fast:
            backend = json.loads(tokenizer.backend_tokenizer.to_str())
            # Left over from the last call, and set again by every call.
            known["backend"] = {
                k: backend[k] for k in backend if k not in ("truncation", "padding")
            }
        else:
            known["vocabulary"] = sorted(tokenizer.get_vocab().items())
            known["special"] = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
            # Not every class gives its merges and rules, but their effect can be seen.
            known["probe"] = [list(map(int, ids)) for ids in encode_texts(tokenizer, [PROBE])]
        return _digest(known)
    except Exception:  # A tokenizer of any make may lack any of these, or refuse.
        return None


def _wanted(
    source: str,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    min_tokens: int,
    max_characters: int,
) -> dict[str, Any] | None:
    """All that an entry depends on; None when the source is not worth keeping or cannot be identified."""
    origin = identity(source)
    # After the source, as a large vocabulary takes a moment.
    tokenized_by = fingerprint(tokenizer) if origin is not None else None
    if origin is None or tokenized_by is None:
        return None
    return {
        "format": FORMAT,
        "rules": _rules(),
        "source": origin,
        "split": split,
        "max_characters": max_characters,
        "min_tokens": min_tokens,
        "tokenizer": tokenized_by,
    }


def identity(source: str) -> dict[str, Any] | None:
    """What tells this state of a source from any other; None when it is small or cannot be told."""
    parts = parts_of(source)
    if len(parts) > 1:
        own = {part: identity(part) for part in parts}
        # What is small by itself comes with Python or with memlm.
        carried = {part: sys.version for part in ("builtin", "made") if part in own}
        told = own | carried
        return {"joined": [told[part] for part in parts]} if all(told.values()) else None
    if source in ("builtin", "made"):
        return None
    if source == "installed":
        return {"installed": installed.manifest()}
    if not source.startswith("hub:"):
        return _files(Path(source))
    name, config, column = parse_hub(source)
    if Path(name).exists():
        found = _files(Path(name))
        return found and {**found, "config": config, "column": column}
    revision = _revision(name, config)
    if revision is None:
        return None
    return {"hub": name, "config": config, "column": column, "revision": revision}


def _files(path: Path) -> dict[str, Any] | None:
    try:
        files = files_of(path) if path.is_dir() else [path]
        root = path if path.is_dir() else path.parent
        stats = [(file.relative_to(root).as_posix(), file.stat()) for file in files]
        absolute = str(path.resolve())
    except OSError:
        return None
    size = sum(stat.st_size for _, stat in stats)
    if size < MIN_CHARACTERS:
        return None
    listed = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    # Two copies with the same names, sizes and times may differ all the same.
    return {"files": len(listed), "bytes": size, "digest": _digest([absolute, listed])}


def _revision(name: str, config: str | None) -> str | None:
    """The commit of a data set on the hub."""
    try:
        import datasets

        revision = str(datasets.load_dataset_builder(name, config).hash)
    except Exception:  # `datasets` raises a different type for every cause.
        return None
    return revision if re.fullmatch(r"[0-9a-f]{40}", revision) else None


def _rules() -> str:
    """A digest of how documents and sentences are cut: other rules give another entry."""
    try:
        modules = (document_rules, sources, installed, made, tokenised, sentence_rules)
        return _digest([inspect.getsource(module) for module in modules])
    except OSError:
        import memlm

        return memlm.__version__


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _entries(folder: Path, key: str) -> list[Path]:
    """The files of an entry: one, unless another release of pyarrow wrote another."""
    try:
        return sorted(folder.glob(f"{key}-*.arrow"))
    except OSError:
        return []


def _open_entry(
    path: Path, tokenizer: PreTrainedTokenizerBase, source: str, min_tokens: int
) -> TokenHaystack | None:
    """Map an entry; None when it cannot be read or is damaged. A damaged one is removed."""
    try:
        if path not in _verified:
            if _file_digest(path) != path.stem.rpartition("-")[2]:
                _log.warning("the haystack cache entry %s is damaged and is made again", path)
                path.unlink()
                return None
            _verified.add(path)
        return _map(path, tokenizer, source, min_tokens)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        _log.warning("the haystack cache entry %s is left unused (%s)", path, error)
        return None


def _map(
    path: Path, tokenizer: PreTrainedTokenizerBase, source: str, min_tokens: int
) -> TokenHaystack:
    """A haystack whose arrays are views of the file, which is one batch, so each column is in one piece."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        batch = pa.ipc.open_stream(file).read_next_batch()
    document, text, ids = (batch.column(name) for name in ("document", "text", "ids"))
    _, starts, characters = text.buffers()
    text_offsets = np.frombuffer(starts, np.int64, len(batch) + 1)
    first = np.flatnonzero(np.diff(document.to_numpy(), prepend=-1))
    made = TokenHaystack.of_arrays(
        tokenizer,
        source,
        min_tokens,
        SentenceTexts(np.frombuffer(characters, np.uint8, text_offsets[-1]), text_offsets),
        ids.values.to_numpy(),
        ids.offsets.to_numpy(),
        np.append(first, len(batch)).astype(np.int64),
    )
    # Reading the ids for it would bring them all into memory.
    made.digest = json.loads(batch.schema.metadata[_SCHEMA_KEY])["ids"]
    return made


def _file_digest(path: Path) -> str:
    """Read from the file and not through the mapping, which would keep it in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, _hash).hexdigest()


def _hash() -> Any:
    return hashlib.blake2b(digest_size=8)


class _Column:
    """Values of a column in a temporary file without a name, which is gone however the process ends."""

    def __init__(self, folder: Path, dtype: type[np.generic]) -> None:
        self.dtype = dtype
        self.size = 0
        with _disk():
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with _disk():
            self._file.close()

    def append(self, values: Any) -> None:
        data = np.ascontiguousarray(values, dtype=self.dtype)
        self.size += len(data)
        with _disk():
            self._file.write(data.data)

    def buffer(self) -> pa.Buffer:
        """All values, mapped."""
        import pyarrow as pa

        with _disk():
            self._file.flush()
            return pa.py_buffer(np.memmap(self._file, self.dtype, "r", shape=(self.size,)))


@contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _Unwritable(error.strerror or str(error)) from error


def _build(
    folder: Path,
    key: str,
    wanted: dict[str, Any],
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    source: str,
) -> TokenHaystack:
    """Make an entry beside its place, then rename it: nobody ever sees half an entry."""
    with _disk():
        folder.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(folder)
        handle, name = tempfile.mkstemp(prefix=f".{key}.", dir=folder)
        os.close(handle)
    path = temporary = Path(name)
    min_tokens = wanted["min_tokens"]
    try:
        _write(temporary, wanted, tokenise(documents, tokenizer, source, min_tokens))
        with _disk():
            # A source that changed while it was read is neither the old nor the new one.
            if "revision" in wanted["source"] or identity(source) == wanted["source"]:
                path = folder / f"{key}-{_file_digest(temporary)}.arrow"
                # A cache may be shared; a temporary file is its owner's alone.
                temporary.chmod(0o644)
                os.replace(temporary, path)
                _verified.add(path)
            # What is mapped stays readable after its file is removed.
            return _map(path, tokenizer, source, min_tokens)
    finally:
        temporary.unlink(missing_ok=True)


def _write(
    path: Path,
    wanted: dict[str, Any],
    made: Iterable[tuple[list[str], NDArray[np.int32], NDArray[np.int64]]],
) -> None:
    """Write sentences as one batch, which begins with its size, so columns are gathered on disk first."""
    import pyarrow as pa

    with ExitStack() as stack:
        document, text, text_offsets, ids, offsets = (
            stack.enter_context(_Column(path.parent, dtype))
            for dtype in (np.int32, np.uint8, np.int64, np.int32, np.int64)
        )
        for starts in (text_offsets, offsets):
            starts.append([0])
        known = hashlib.blake2b(digest_size=8)
        for number, (texts, tokens, lengths) in enumerate(made):
            encoded = [text.encode() for text in texts]
            sizes = np.array([len(text) for text in encoded], dtype=np.int64)
            document.append(np.full(len(texts), number))
            text_offsets.append(text.size + np.cumsum(sizes))
            text.append(np.frombuffer(b"".join(encoded), dtype=np.uint8))
            offsets.append(ids.size + np.cumsum(lengths))
            ids.append(tokens)
            known.update(np.ascontiguousarray(tokens, dtype=np.int32).data)
        rows = document.size
        flat = pa.Array.from_buffers(pa.int32(), ids.size, [None, ids.buffer()])
        columns = {
            "document": pa.Array.from_buffers(pa.int32(), rows, [None, document.buffer()]),
            "text": pa.Array.from_buffers(
                pa.large_string(), rows, [None, text_offsets.buffer(), text.buffer()]
            ),
            "ids": pa.Array.from_buffers(
                pa.large_list(pa.int32()), rows, [None, offsets.buffer()], children=[flat]
            ),
        }
        notes = json.dumps({"ids": known.hexdigest(), "made_of": wanted})
        batch = pa.record_batch(columns, metadata={_SCHEMA_KEY: notes})
        with _disk(), pa.OSFile(str(path), "wb") as file:
            with pa.ipc.new_stream(file, batch.schema) as writer:
                writer.write_batch(batch)


def _clear_abandoned(folder: Path) -> None:
    """Remove the temporary files of builds that were killed."""
    for path in folder.glob(".*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()
