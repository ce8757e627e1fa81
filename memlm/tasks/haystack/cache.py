"""Tokenised haystacks kept on disk: made once, then mapped into memory instead of made again.

CACHE/haystacks/KEY/ holds a flat .npy file for each array of a `TokenHaystack` and manifest.json,
written last. The key is a digest of everything the arrays depend on, so an entry is never stale; one
that is damaged is made again. CACHE is the variable MEMLM_CACHE, else ~/.cache/memlm; empty for none.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from memlm import text as sentence_rules
from memlm.tasks.haystack import documents as document_rules
from memlm.tasks.haystack import sources, tokenised
from memlm.tasks.haystack.documents import Document, Split
from memlm.tasks.haystack.sources import (
    MAX_CHARACTERS,
    check_source,
    check_split,
    files_of,
    parse_hub,
    read_documents,
)
from memlm.tasks.haystack.tokenised import MIN_TOKENS, SentenceTexts, TokenHaystack, tokenise
from memlm.tokens import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
VARIABLE = "MEMLM_CACHE"
# Less is tokenised in about a second. So is "builtin", whose text moreover changes with Python's
# version and options (-OO has no docstrings).
MIN_CHARACTERS = 1_000_000
# No build takes this long: what is left of an older one was abandoned.
ABANDONED_SECONDS = 24 * 3600
PROBE = " It's 3.5 miles, he said - naïve café.\n\nMary went to the office."
_DTYPES: dict[str, np.dtype[Any]] = {
    "ids": np.dtype("<i4"),
    "offsets": np.dtype("<i8"),
    "first_sentence": np.dtype("<i8"),
    "text": np.dtype("u1"),
    "text_offsets": np.dtype("<i8"),
}
_MANIFEST = "manifest.json"
# Entries read through in this process; once is enough, files in use are never written to.
_verified: set[tuple[str, str]] = set()
_log = logging.getLogger(__name__)


class _Unwritable(Exception):
    """The disk refused something of the cache's own."""


def tokenized_haystack(
    source: str | os.PathLike[str],
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    *,
    min_tokens: int = MIN_TOKENS,
    max_characters: int = MAX_CHARACTERS,
    cache: str | os.PathLike[str] | None = "auto",
) -> TokenHaystack:
    """Return the sentences of a source's split as tokens, from the disk where they were made before.

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
        place = folder / "haystacks" / _digest(wanted)
        known = _open(place, wanted, tokenizer, source)
        if known is not None:
            return known
        documents = read_documents(source, split, max_characters)
        try:
            return _build(place, wanted, documents, tokenizer, source)
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
        # Control tokens written out are text; entries of before took them for control tokens.
        known["split_special_tokens"] = True
        if tokenizer.is_fast:
            backend = json.loads(tokenizer.backend_tokenizer.to_str())
            # Left over from the last call, and set anew by every call.
            known["backend"] = {
                k: backend[k] for k in backend if k not in ("truncation", "padding")
            }
        else:
            known["vocabulary"] = sorted(tokenizer.get_vocab().items())
            known["special"] = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
            # Merges and rules are not to be had from every class; what they do is.
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
    # Second, as a large vocabulary takes a moment.
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
    if source == "builtin":
        return None
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
    """A digest of how documents and sentences are cut: with other rules, another entry."""
    try:
        modules = (document_rules, sources, tokenised, sentence_rules)
        return _digest([inspect.getsource(module) for module in modules])
    except OSError:
        import memlm

        return memlm.__version__


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _open(
    place: Path, wanted: dict[str, Any], tokenizer: PreTrainedTokenizerBase, source: str
) -> TokenHaystack | None:
    """Map an entry; None when it is missing, of something else, or damaged."""
    try:
        text = (place / _MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        if manifest["wanted"] != wanted:
            return None
        columns = manifest["columns"]
        arrays = {name: _map(place / f"{name}.npy", columns[name], name) for name in _DTYPES}
        if (str(place), text) not in _verified:
            for name in _DTYPES:
                if _checksum(place / f"{name}.npy") != columns[name]["checksum"]:
                    raise ValueError(f"{name} is damaged")
            _verified.add((str(place), text))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        _log.warning("the haystack cache entry %s is left unused (%s)", place, error)
        return None
    made = TokenHaystack.of_arrays(
        tokenizer,
        source,
        wanted["min_tokens"],
        SentenceTexts(arrays["text"], arrays["text_offsets"]),
        arrays["ids"],
        arrays["offsets"],
        arrays["first_sentence"],
    )
    # The checksum of the ids is their digest, and reading them all would bring them into memory.
    made.digest = columns["ids"]["checksum"]
    return made


def _map(path: Path, column: dict[str, Any], name: str) -> NDArray[Any]:
    # A plain view: np.memmap makes every slice an object that is slow to make.
    found = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    if found.dtype != _DTYPES[name] or found.shape != (column["size"],):
        raise ValueError(f"{name} has {found.dtype} {found.shape}, not {column['size']} values")
    return found


def _checksum(path: Path) -> str:
    """The digest of an array's values, read from the file and not through the mapping."""
    known = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        while chunk := file.read(1 << 20):
            known.update(chunk)
    return known.hexdigest()


class _Column:
    """A flat .npy file that is appended to; its length is known when it is closed."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.size = 0
        self._known = hashlib.blake2b(digest_size=8)
        with _disk():
            self._file = path.open("wb")
            self._header()
            self._begin = self._file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _disk():
            self._file.close()

    def append(self, values: Any) -> None:
        data = np.ascontiguousarray(values, dtype=self.dtype)
        self.size += len(data)
        self._known.update(data.data)
        with _disk():
            self._file.write(data.data)

    def finish(self) -> dict[str, Any]:
        """Write the length into the header; numpy leaves room there for any."""
        with _disk():
            self._file.seek(0)
            self._header()
            assert self._file.tell() == self._begin
            self._file.flush()
        return {"size": self.size, "checksum": self._known.hexdigest()}

    def _header(self) -> None:
        described = np.lib.format.dtype_to_descr(self.dtype)
        np.lib.format.write_array_header_1_0(
            self._file, {"descr": described, "fortran_order": False, "shape": (self.size,)}
        )


@contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _Unwritable(error.strerror or str(error)) from error


def _build(
    place: Path,
    wanted: dict[str, Any],
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    source: str,
) -> TokenHaystack:
    """Make an entry in a folder of its own, then rename that: nobody ever meets half an entry."""
    with _disk():
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    _clear_abandoned(place.parent)
    try:
        _fill(temporary, wanted, tokenise(documents, tokenizer, source, wanted["min_tokens"]))
        # A source that changed while it was read is neither the old nor the new one.
        same = "revision" in wanted["source"] or identity(source) == wanted["source"]
        found = None
        if same and _publish(temporary, place, wanted, tokenizer, source):
            found = _open(place, wanted, tokenizer, source)
        # What is mapped stays readable after its files are removed.
        found = found or _open(temporary, wanted, tokenizer, source)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if found is None:
        raise _Unwritable("what was written could not be read back")
    return found


def _fill(
    folder: Path,
    wanted: dict[str, Any],
    made: Iterable[tuple[list[str], NDArray[np.int32], NDArray[np.int64]]],
) -> None:
    with ExitStack() as stack:
        columns = {
            name: stack.enter_context(_Column(folder / f"{name}.npy", dtype))
            for name, dtype in _DTYPES.items()
        }
        for name in ("offsets", "first_sentence", "text_offsets"):
            columns[name].append([0])
        sentences = 0
        for texts, ids, lengths in made:
            encoded = [text.encode() for text in texts]
            sizes = np.array([len(text) for text in encoded], dtype=np.int64)
            sentences += len(texts)
            columns["offsets"].append(columns["ids"].size + np.cumsum(lengths))
            columns["text_offsets"].append(columns["text"].size + np.cumsum(sizes))
            columns["ids"].append(ids)
            columns["text"].append(np.frombuffer(b"".join(encoded), dtype=np.uint8))
            columns["first_sentence"].append([sentences])
        written = {name: column.finish() for name, column in columns.items()}
    manifest = json.dumps({"wanted": wanted, "columns": written}, indent=2) + "\n"
    with _disk():
        (folder / _MANIFEST).write_text(manifest, encoding="utf-8")
        # A cache may be shared; a temporary folder is its owner's alone.
        folder.chmod(0o755)


def _publish(
    temporary: Path,
    place: Path,
    wanted: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    source: str,
) -> bool:
    """Rename a finished entry into place, moving a damaged one away; False where that fails."""
    for _ in range(3):
        try:
            os.rename(temporary, place)
            return True
        except OSError:
            if _open(place, wanted, tokenizer, source) is not None:
                return True  # Another process was quicker.
        with _disk():
            aside = Path(tempfile.mkdtemp(prefix=".damaged.", dir=place.parent))
        try:
            os.rename(place, aside / "entry")
        except OSError:
            pass  # Another process has moved it, or nobody may.
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return False


def _clear_abandoned(folder: Path) -> None:
    """Remove what builds that were killed have left behind."""
    for path in folder.glob(".*"):
        try:
            newest = max(p.stat().st_mtime for p in (path, *path.iterdir()))
        except OSError:
            continue
        if time.time() - newest > ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
