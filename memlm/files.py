"""Files that are whole or not there, and read with care: what is wrong with one is a ValueError.

Written beside their place, then renamed into it. Nothing here unpickles, evaluates or expands what a file
says.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

# Nodes of a YAML file once its aliases are followed: a recipe has some hundred, a bomb has billions.
MAX_YAML_NODES = 100_000
MAX_YAML_DEPTH = 200
CHECKSUM = "sha256"
# A temporary file that nobody has touched for so long, and whose writer is gone, was left behind.
ABANDONED_SECONDS = 60
# The rest of a temporary name: a process, of as many digits as psutil can ask about, and a random part.
_WRITER = re.compile(r"([0-9]{1,9})_[0-9a-f]{8}")


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, put it on disk, then rename it into place.

    What a writer of this machine left behind when it was killed is removed first. A file that is replaced
    keeps its permissions; a new one has those of the process (its umask).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    remove_abandoned(path)
    try:
        mode = stat.S_IMODE(path.stat().st_mode) if path.is_file() else None
        # Made here: from its first byte on nobody can read it who may not read it in the end.
        at_first = 0o666 if mode is None else mode | stat.S_IWUSR
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, at_first))
        write(temporary)
        if mode is not None:
            os.chmod(temporary, mode)
        put_on_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with suppress(OSError):  # Not every file system takes it of a folder.
        put_on_disk(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON, atomically; keys stay in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_checked_json(path: str | os.PathLike[str], value: dict[str, Any]) -> None:
    """As `write_json`, with a checksum that `read_checked_json` compares."""
    write_json(path, {**value, CHECKSUM: _checksum(value)})


def parse_json(text: str | bytes) -> Any:
    """A JSON value. ValueError for what is none, however deep it goes."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file. ValueError naming the file when it is none."""
    try:
        return parse_json(Path(path).read_bytes().decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is no JSON, or damaged ({error})") from error


def read_checked_json(path: str | os.PathLike[str]) -> tuple[dict[str, Any], bool]:
    """What `write_checked_json` wrote, and whether there was a checksum: older versions wrote none."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(
            f"{os.fspath(path)!r} holds no JSON object; it is another file, or damaged"
        )
    found = value.pop(CHECKSUM, None)
    if found is not None and found != _checksum(value):
        raise ValueError(f"{os.fspath(path)!r} is damaged: its checksum does not match")
    return value, found is not None


def file_checksum(path: Path) -> str:
    """SHA-256 in hex, read from start to end in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_yaml(text: str) -> Any:
    """YAML of plain values, with 1e-3 read as a number, which YAML 1.1 takes for text.

    ValueError for what is no YAML, a key that is given twice, and aliases that unfold to more than
    `MAX_YAML_NODES` values or into themselves.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_YAML_DEPTH:
        # PyYAML's scanner takes the square of the depth, which is minutes for a few kilobytes.
        raise ValueError("it is nested too deeply")
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        # Before anything is made of it: merging alone can take all memory.
        if node is not None and _unfolded(node, {}) > MAX_YAML_NODES:
            raise ValueError(f"its aliases unfold to more than {MAX_YAML_NODES:,} values")
        return None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (OverflowError, TypeError, AttributeError, KeyError, IndexError) as error:
        # PyYAML's own constructors raise them at scalars such as "!!int" without a digit.
        raise ValueError(f"it holds a value that cannot be read ({error})") from error


def _unfolded(node: Any, known: dict[int, int | None]) -> int:
    """How many values `node` has, each alias counted as what it stands for."""
    import yaml

    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise ValueError("an alias stands inside of what it stands for")
        return size
    known[id(node)] = None
    if isinstance(node, yaml.MappingNode):
        keys: set[tuple[str, str]] = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name in keys:
                raise ValueError(f"line {key.start_mark.line + 1}: {key.value!r} is given twice")
            if name is not None:
                keys.add(name)
        children = [child for pair in node.value for child in pair]
    else:
        children = node.value if isinstance(node, yaml.SequenceNode) else []
    size = 1 + sum(_unfolded(child, known) for child in children)
    known[id(node)] = size
    return size


def _checksum(value: dict[str, Any]) -> str:
    # As it is read again: what JSON makes one of, such as tuple and list, is one.
    same = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def temporary_beside(path: Path) -> Path:
    """A name for what shall become `path`, of this process; a later one knows by it that it was left."""
    return path.with_name(f"{_begun(path)}{os.getpid()}_{secrets.token_hex(4)}")


def _begun(path: Path) -> str:
    return f".{path.name.removeprefix('.')}.{_host()}_"


def remove_abandoned(path: Path) -> None:
    """Remove files and folders that were to become `path`, of writers of this machine that are no more."""
    import psutil

    begun = _begun(path)
    for entry in os.listdir(path.parent):
        found = _WRITER.fullmatch(entry, len(begun)) if entry.startswith(begun) else None
        if found is None or psutil.pid_exists(int(found[1])):
            continue
        with suppress(OSError):
            left = path.parent / entry
            # Containers may share a host's name and number their processes apart: a file that is being
            # written has changed a moment ago.
            if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def put_on_disk(path: Path) -> None:
    """Let what was written survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
