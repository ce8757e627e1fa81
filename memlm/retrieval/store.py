"""The directory of a saved index: append-only parts, and a manifest that says which of them count.

    manifest.json          settings, counts and the list of parts, each with size and SHA-256
    chunks-*.arrow         row, id, text, metadata (JSON) of some rows
    vectors-*.arrow        row, vector (float32 or codes) of rows that main-*.faiss does not hold
    main-*.faiss           the faiss index
    words-*.sqlite         the word index of rows up to some number, once there are many
    removed-*.npy          rows removed from the chunks-* files

A save writes new parts under new names and replaces the manifest last. So a reader finds the old index or
the new one, also after a save that was killed. Checksums find damage; they do not make a stranger's files
safe: faiss trusts the files it reads, so load only what you trust. One writer at a time.

The manifest of an index whose chunks are elsewhere says where, and names no parts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import tokenize
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memlm.files import file_checksum, write_atomically

if TYPE_CHECKING:
    import pyarrow as pa

    from memlm.retrieval.arguments import ChunkEntry
    from memlm.retrieval.codes import Codes

FORMAT = "memlm-chunk-index"
# 2 has word indexes and vectors in codes.
VERSION = 2
# 3 says that the chunks are elsewhere, which earlier readers cannot know.
PLACE_VERSION = 3
MANIFEST = "manifest.json"
BATCH = 65_536  # rows
_SUFFIX = {
    "chunks": "arrow",
    "vectors": "arrow",
    "main": "faiss",
    "words": "sqlite",
    "removed": "npy",
}
KINDS = tuple(_SUFFIX)
_PART = re.compile("|".join(rf"{kind}-[0-9a-f]{{16}}\.{end}" for kind, end in _SUFFIX.items()))
# What a manifest holds beside its parts, by the words of annotations.
_COMMON = {
    **dict.fromkeys(("generation", "metric", "fingerprint"), "str"),
    **dict.fromkeys(("dim", "chunks"), "int"),
    "hybrid": "bool",
}
_SETTINGS = {**_COMMON, "factory": "str", "next_row": "int"}
# What may be missing, or none.
_OPTIONAL = {"effort": "int", "precision": "str"}
_KINDS: dict[str, type] = {"str": str, "int": int, "bool": bool}
_LEFTOVER = re.compile(
    rf"({_PART.pattern})|\.({_PART.pattern}|{re.escape(MANIFEST)})\.[A-Za-z0-9_]+"
)


@dataclass(frozen=True)
class PartFile:
    """A file of the directory. first, stop: range its rows lie in; count: how many it holds."""

    kind: str
    file: str
    first: int
    stop: int
    count: int
    bytes: int
    sha256: str


def damaged(path: Path, why: object) -> ValueError:
    return ValueError(
        f"{str(path)!r} is damaged or not of this index ({why}); "
        "restore the directory from a copy, or build the index again"
    )


def _checksum(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest, or None where there is none. ValueError when damaged, foreign, or newer."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(
            f"{str(path)!r} is not a manifest of a {FORMAT}; give a directory ChunkIndex.save wrote"
        )
    version = manifest.get("version")
    if isinstance(version, int) and version > PLACE_VERSION:
        raise ValueError(
            f"{str(path)!r} has version {version}, this memlm reads up to {PLACE_VERSION}; upgrade memlm"
        )
    if version not in (1, VERSION, PLACE_VERSION) or manifest.get("checksum") != _checksum(
        manifest
    ):
        raise damaged(path, "its checksum does not match")
    try:
        manifest["parts"] = [PartFile(**part) for part in manifest["parts"]]
        if (version == PLACE_VERSION) != ("store" in manifest):
            raise TypeError(f"store={manifest.get('store')!r} in version {version}")
        if version == PLACE_VERSION:
            _check_kinds(manifest, _COMMON)
            _check_kinds(manifest["store"], dict.fromkeys(("kind", "address", "collection"), "str"))
            if manifest["parts"]:
                raise TypeError("parts of an index whose chunks are elsewhere")
            return manifest
        known = {key: kind for key, kind in _OPTIONAL.items() if manifest.get(key) is not None}
        _check_kinds(manifest, _SETTINGS | known)
        _ = manifest["effort"]
        for part in manifest["parts"]:
            _check_kinds(asdict(part), PartFile.__annotations__)
    except (KeyError, TypeError) as error:
        raise damaged(path, error) from error
    for part in manifest["parts"]:
        # Named as `write_part` names it, and so in this folder; its rows are among those ever given.
        named = _PART.fullmatch(part.file) and part.file.startswith(f"{part.kind}-")
        if not named or not 0 <= part.first <= part.stop <= manifest["next_row"]:
            raise damaged(path, f"it names a part {part.file!r}")
    return manifest


def _check_kinds(found: dict[str, Any], kinds: dict[str, str]) -> None:
    """TypeError unless every value is of its kind, KeyError where one is missing."""
    for key, kind in kinds.items():
        value = found[key]
        sound = isinstance(value, _KINDS[kind]) and (kind == "bool") == isinstance(value, bool)
        if not sound or (kind == "int" and not 0 <= value < 2**62):
            raise TypeError(f"{key}={value!r} is no {kind}")


def check_target(directory: Path) -> dict[str, Any] | None:
    """What `read_manifest` returns. ValueError when something other than an index is there."""
    manifest = read_manifest(directory)
    if manifest is None and os.path.lexists(directory):
        if not directory.is_dir():
            raise ValueError(f"{str(directory)!r} is not a directory; give another")
        for entry in sorted(os.listdir(directory)):
            # Files that an interrupted first save left are ours.
            if not _LEFTOVER.fullmatch(entry):
                raise ValueError(
                    f"{str(directory)!r} holds {entry!r} and is not an index, so it is not overwritten; "
                    "give a new or empty directory"
                )
    return manifest


def remove_index(directory: Path) -> None:
    """Remove the directory of an index; one that holds anything else, or is a link to one, stays."""
    if directory.is_symlink():
        return
    with suppress(ValueError):
        if check_target(directory) is None or all(map(_ours, os.listdir(directory))):
            shutil.rmtree(directory, ignore_errors=True)


def _ours(entry: str) -> bool:
    return entry == MANIFEST or _LEFTOVER.fullmatch(entry) is not None


def write_part(
    directory: Path, kind: str, rows: tuple[int, int], count: int, write: Callable[[Path], Any]
) -> PartFile:
    """Let `write` fill a file under a new name, on disk when this returns."""
    path = directory / f"{kind}-{secrets.token_hex(8)}.{_SUFFIX[kind]}"
    found: tuple[int, str] = (0, "")

    def fill(temporary: Path) -> None:
        nonlocal found
        write(temporary)
        _write_to_disk(temporary)
        found = (temporary.stat().st_size, file_checksum(temporary))

    write_atomically(path, fill)
    return PartFile(kind, path.name, rows[0], rows[1], count, *found)


def commit(
    directory: Path, settings: dict[str, Any], parts: Iterable[PartFile], before: str | None
) -> dict[str, Any]:
    """Replace the manifest, then delete files no longer named; returns the new manifest.

    before: generation of the replaced manifest, None for none. ValueError when it has changed since.
    """
    parts = list(parts)
    manifest = {
        "format": FORMAT,
        "version": PLACE_VERSION if "store" in settings else VERSION,
        "generation": secrets.token_hex(8),
        **settings,
        "parts": [asdict(part) for part in parts],
    }
    manifest["checksum"] = _checksum(manifest)
    _write_to_disk(directory)
    there = read_manifest(directory)
    if (there["generation"] if there else None) != before:
        raise ValueError(
            f"{str(directory)!r} was changed by another process while saving; load it again, "
            "or save elsewhere"
        )

    def fill(temporary: Path) -> None:
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8")
        _write_to_disk(temporary)

    write_atomically(directory / MANIFEST, fill)
    _write_to_disk(directory)
    kept = {part.file for part in parts}
    for entry in os.listdir(directory):
        if entry not in kept and _LEFTOVER.fullmatch(entry):
            (directory / entry).unlink(missing_ok=True)
    return {**manifest, "parts": parts}


def save_place(directory: Path, settings: dict[str, Any], place: dict[str, str]) -> None:
    """Write the manifest of an index whose chunks are at `place`.

    ValueError when something other than an index is there, or changed meanwhile.
    """
    there = check_target(directory)
    directory.mkdir(parents=True, exist_ok=True)
    before = there["generation"] if there else None
    commit(directory, {**settings, "store": place}, [], before)


def intact(directory: Path, parts: Iterable[PartFile]) -> bool:
    """Whether every part is there with its size; content is not read."""
    try:
        return all((directory / part.file).stat().st_size == part.bytes for part in parts)
    except OSError:
        return False


def verify(directory: Path, part: PartFile) -> Path:
    """The path of a part. ValueError when it is missing, cut, or its checksum differs."""
    path = directory / part.file
    if not path.is_file():
        raise damaged(path, "it is missing")
    size = path.stat().st_size
    if size != part.bytes:
        raise damaged(path, f"{size} bytes instead of {part.bytes}")
    if file_checksum(path) != part.sha256:
        raise damaged(path, "its checksum does not match")
    return path


def num_parts_kept(parts: list[PartFile], count: int) -> int:
    """How many parts stay as they are when `count` rows are added: the others are written again with them.

    A part is written again only together with at least as many rows, so a row is written at most
    log2(rows) times, and there are at most as many parts.
    """
    kept = len(parts)
    while kept and parts[kept - 1].count <= count:
        kept -= 1
        count += parts[kept].count
    return kept


def chunk_schema() -> pa.Schema:
    import pyarrow as pa

    names = ("id", "text", "metadata")
    return pa.schema([("row", pa.int64()), *((name, pa.large_string()) for name in names)])


def vector_schema(codes: Codes) -> pa.Schema:
    import pyarrow as pa

    column = pa.list_(pa.from_numpy_dtype(codes.dtype), codes.width)
    return pa.schema([("row", pa.int64()), ("vector", column)])


def write_chunks(path: Path, rows: Iterable[tuple[int, ChunkEntry]]) -> None:
    import pyarrow as pa

    schema = chunk_schema()
    batches = _batches(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for batch in batches:
            numbers, entries = zip(*batch, strict=True)
            columns = [pa.array(numbers, pa.int64())]
            for values in zip(*entries, strict=True):
                columns.append(pa.array(values, pa.large_string()))
            writer.write_batch(pa.record_batch(columns, schema=schema))


def _batches(rows: Iterable[tuple[int, ChunkEntry]]) -> Iterable[list[tuple[int, ChunkEntry]]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def write_vectors(
    path: Path, codes: Codes, blocks: Iterable[tuple[NDArray[np.int64], NDArray[Any]]]
) -> None:
    import pyarrow as pa

    schema = vector_schema(codes)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for rows, kept in blocks:
            flat = pa.array(np.ascontiguousarray(kept, codes.dtype).reshape(-1))
            columns = [pa.array(rows), pa.FixedSizeListArray.from_arrays(flat, codes.width)]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def read_arrow(path: Path, mmap: bool, schema: pa.Schema) -> list[pa.RecordBatch]:
    """The batches of a file that `verify` found intact; with `mmap` they stay on disk.

    ValueError for other columns than those of `schema`, and for batches that are not sound.
    """
    import pyarrow as pa

    try:
        source = pa.memory_map(str(path)) if mmap else pa.OSFile(str(path))
        reader = pa.ipc.open_file(source)
        if reader.schema != schema:
            raise damaged(path, f"its columns are {', '.join(reader.schema.names)}")
        batches = [reader.get_batch(n) for n in range(reader.num_record_batches)]
        for batch in batches:
            # A checksum says that a file is as it was written, not that its offsets stay inside of it.
            batch.validate(full=True)
        return batches
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise damaged(path, error) from error


def vectors_of(
    path: Path, batch: pa.RecordBatch, codes: Codes
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """(n,) rows and (n, width) codes of a batch of a file, without a copy."""
    flat = batch.column("vector").flatten().to_numpy()
    if flat.dtype != codes.dtype or flat.size != batch.num_rows * codes.width:
        raise damaged(path, f"its vectors are not {codes.name} of width {codes.dim}")
    return batch.column("row").to_numpy(), flat.reshape(-1, codes.width)


def write_removed(path: Path, rows: list[int]) -> None:
    with path.open("wb") as file:
        np.save(file, np.asarray(rows, np.int64), allow_pickle=False)


def read_removed(path: Path) -> NDArray[np.int64]:
    try:
        with path.open("rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("it is of another version than write_removed gives it")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            rows = np.frombuffer(file.read(), np.int64)
    except (ValueError, OSError, SyntaxError, tokenize.TokenError, RecursionError) as error:
        raise damaged(path, error) from error
    # The header is not followed, but compared with what is there: it may claim any size.
    if shape != (len(rows),) or dtype != np.int64:
        raise damaged(path, f"its header claims {dtype} of shape {shape}")
    return rows
