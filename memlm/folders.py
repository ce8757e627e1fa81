"""Files of a folder that change together: an interrupted save leaves all the old or all the new ones.

They are written into a folder inside of theirs. When that is whole and on disk it gets the name `PENDING`,
and from that moment the new files count; then each is renamed into its place. What an interruption leaves
undone is done by whoever reads or writes the folder next (`finish_replacing`).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from memlm.files import put_on_disk, read_json, remove_abandoned, temporary_beside, write_json

PENDING = ".memlm-saved"
# In the pending folder: names of files that the new ones supersede.
SUPERSEDED = ".superseded.json"
# Moved first: a reader that looks at it before it finishes what is pending sees what belongs to the rest.
CONFIG = "config.json"


@contextmanager
def replace_together(
    directory: str | os.PathLike[str], superseded: str | None = None
) -> Iterator[Path]:
    """A folder to write into; when the block ends, what is in it takes its place in `directory`.

    An error in the block leaves `directory` as it was. superseded: a pattern of names; files in `directory`
    that match it and are not written anew are removed together with the change.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    remove_abandoned(directory / PENDING)
    staged = temporary_beside(directory / PENDING)
    staged.mkdir()
    try:
        yield staged
        finish_replacing(directory)
        written = {path.relative_to(staged).as_posix() for path in _files(staged)}
        old = re.compile(superseded) if superseded else None
        gone = [n for n in os.listdir(directory) if old and old.fullmatch(n) and n not in written]
        write_json(staged / SUPERSEDED, sorted(gone))
        for path in [*_files(staged), staged / SUPERSEDED]:
            put_on_disk(path)
        os.rename(staged, directory / PENDING)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    with suppress(OSError):  # Not every file system takes it of a folder.
        put_on_disk(directory)
    finish_replacing(directory)


def finish_replacing(directory: str | os.PathLike[str]) -> list[str]:
    """Put in place what an interrupted save had ready; returns the names of the files that were moved.

    Several processes may do it at once. OSError where the folder cannot be changed; ValueError for what
    `replace_together` cannot have written.
    """
    pending = Path(directory) / PENDING
    if not os.path.lexists(pending):
        return []
    if pending.is_symlink() or not pending.is_dir():
        raise ValueError(f"{str(pending)!r} is no folder; it is damaged, remove it")
    moved = []
    superseded, files = _superseded(pending), _files(pending)
    # Before anything is changed: a link where a folder is expected leads out of this one.
    for path in files:
        for above in path.relative_to(pending).parents:
            if (at := pending.parent / above) != pending.parent and at.is_symlink():
                raise ValueError(f"{str(at)!r} is a link, and no folder of a save; remove it")
    try:
        for name in superseded:
            (pending.parent / name).unlink(missing_ok=True)
        for path in files:
            place = path.relative_to(pending)
            with suppress(FileNotFoundError):  # Another process was faster.
                (pending.parent / place).parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, pending.parent / place)
                moved.append(place.as_posix())
        shutil.rmtree(pending, ignore_errors=True)
    except OSError as error:
        raise OSError(
            f"directory={str(directory)!r} has a save that was interrupted when it was whole, and cannot "
            f"be put in place ({error}); let this process write there once"
        ) from error
    return moved


def _superseded(pending: Path) -> list[str]:
    try:
        names = read_json(pending / SUPERSEDED)
    except FileNotFoundError:  # Another process has finished.
        return []
    if not isinstance(names, list) or any(
        not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name
        for name in names
    ):
        raise ValueError(f"{str(pending / SUPERSEDED)!r} is damaged; remove {str(pending)!r}")
    return names


def _files(folder: Path) -> list[Path]:
    """All files in a folder, `CONFIG` first; links are not followed."""
    found = [Path(at, name) for at, _, names in os.walk(folder) for name in names]
    ours = [path for path in found if path != folder / SUPERSEDED]
    return sorted(ours, key=lambda path: (path.name != CONFIG, path))
