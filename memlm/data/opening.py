"""Opens data by name: files, folders of files, and data sets of the hub."""

from __future__ import annotations

import os
from pathlib import Path

from memlm.data.files import JsonArray, JsonLines, TextRows, is_array
from memlm.data.formats import FORMATS
from memlm.data.tables import BUILDERS, StreamedRows, open_hub, open_tables

JSON = (".jsonl", ".ndjson", ".json")
Rows = JsonLines | JsonArray | TextRows | StreamedRows


def open_rows(source: str | os.PathLike[str], split: str = "train") -> Rows:
    """The rows of a file, of a folder of files, or of a hub data set, "ID[@CONFIG][:COLUMN]".

    Files: .jsonl (a JSON object per line), .json (that, or an array of objects), .parquet, .csv; all
    others are texts, a row each. A folder holds files of one of these kinds. Every local row is checked
    now, those of the hub as they are read. split: of a hub data set. All rows have the format of the first
    (`rows.format.name`). ValueError or FileNotFoundError name the file, the row and the key.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if name.startswith("hub:") or not path.exists():
        if not name.startswith("hub:") and looks_like_file(name):
            raise FileNotFoundError(
                f"{name!r} does not exist; name a file, a folder or a data set of the hub"
            )
        body, _, column = name.removeprefix("hub:").partition(":")
        hub, _, config = body.partition("@")
        return open_hub(hub, config or None, column or None, split)
    if split != "train":
        raise ValueError(
            f"split={split!r} is for data sets of the hub, and {name!r} is a file or folder; name the "
            "part to read instead"
        )
    files = _files(path)
    suffixes = {_kind(file) for file in files}
    if len(suffixes) > 1:
        raise ValueError(
            f"folder {name!r} holds files of different kinds ({', '.join(sorted(suffixes))}); give a "
            "folder of one kind, or one file"
        )
    (kind,) = suffixes
    if kind in BUILDERS:
        return open_tables(files, name)
    if kind == "text":
        return TextRows(files, next(form for form in FORMATS if form.name == "text"))
    arrays = [file for file in files if is_array(file)]
    if arrays and len(files) > 1:
        raise ValueError(
            f"file {str(arrays[0])!r} is an array, which has to be a data set by itself; write one object "
            "per line"
        )
    return JsonArray(files[0]) if arrays else JsonLines(files)


def looks_like_file(name: str) -> bool:
    """Whether a name can only be meant as a file's: ids of the hub are "name" or "owner/name"."""
    known = (*JSON, *BUILDERS, ".txt", ".md")
    return (
        name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or "\\" in name
        or name.lower().endswith(known)
    )


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(path).parts)
    )
    if not found:
        raise ValueError(f"folder {str(path)!r} holds no file; give a folder of data or text files")
    return found


def _kind(file: Path) -> str:
    suffix = file.suffix.lower()
    return ".jsonl" if suffix in JSON else suffix if suffix in BUILDERS else "text"
