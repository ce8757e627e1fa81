"""Files that change together: interrupted anywhere, a folder has all the old ones or all the new ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memlm import files, folders
from memlm.folders import PENDING, SUPERSEDED, finish_replacing, replace_together


class Stopped(BaseException):
    """What a kill is for the code that runs: nothing catches it."""


def write(folder: Path, generation: int) -> None:
    """Three files, and one whose name is another in every generation."""
    with replace_together(folder, r"part-\d+") as staged:
        for name in ("config.json", "a", "z", f"part-{generation}"):
            (staged / name).write_text(str(generation))
        (staged / "code").mkdir()
        (staged / "code" / "a.py").write_text(str(generation))


def found(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def whole(generation: int) -> dict[str, str]:
    names = ("a", "code/a.py", "config.json", "notes", f"part-{generation}", "z")
    return {name: "mine" if name == "notes" else str(generation) for name in names}


def stops_at(number: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the call of that number of those that change a folder not happen, and none after it."""
    calls: list[str] = []

    def stopping(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **kwargs: Any) -> Any:
            if calls[number:]:
                return None  # The process is no more: nothing is tidied up.
            calls.append(name)
            if calls[number:]:
                raise Stopped
            return function(*args, **kwargs)

        return instead

    for module, name in (
        (os, "replace"), (os, "rename"), (Path, "unlink"), (Path, "mkdir"), (shutil, "rmtree"),
        (Path, "write_text"), (folders, "put_on_disk"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, stopping(name, getattr(module, name)))
    return calls


def test_stopped_at_any_step_a_folder_is_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        steps = stops_at(10**9, patch)
        write(tmp_path / "counted", 0)
        write(tmp_path / "counted", 1)
        first = steps.index("rename") + steps[steps.index("rename") :].index("write_text")
    seen = []
    for number in range(len(steps)):
        folder = tmp_path / str(number)
        write(folder, 0)
        (folder / "notes").write_text("mine")
        with monkeypatch.context() as patch:
            stops_at(number, patch)
            try:
                write(folder, 1)
                break
            except Stopped:
                pass
        pending = (folder / PENDING).exists()
        # The next save goes through, whether or not somebody has read the folder before.
        shutil.copytree(folder, again := tmp_path / f"{number}-again")
        write(again, 2)
        assert {n: t for n, t in found(again).items() if n[0] != "."} == whole(2)
        moved = finish_replacing(folder)
        assert pending or not moved
        shown = {n: text for n, text in found(folder).items() if not n.startswith(".")}
        assert shown == whole(1 if pending or shown["config.json"] == "1" else 0)
        seen.append((pending, shown["config.json"]))
        write(folder, 2)
        assert {n: t for n, t in found(folder).items() if n[0] != "."} == whole(2)
    assert first > 0 and {(False, "0"), (True, "1")} <= set(seen)


def test_an_error_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, 0)
    before = found(tmp_path)
    with pytest.raises(ZeroDivisionError), replace_together(tmp_path, ".*") as staged:
        (staged / "a").write_text("half")
        1 / 0  # noqa: B018
    assert found(tmp_path) == before and not list(tmp_path.glob(".*"))


def test_the_configuration_is_moved_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "finish_replacing", lambda _: [])
    write(tmp_path, 0)
    monkeypatch.undo()
    assert finish_replacing(tmp_path) == ["config.json", "a", "code/a.py", "part-0", "z"]
    assert finish_replacing(tmp_path) == [] and not (tmp_path / PENDING).exists()


def test_what_a_killed_writer_left_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 0)
    left = files.temporary_beside(tmp_path / PENDING)
    process, ended = str(os.getpid()), "999999999"
    gone = left.with_name(left.name.replace(f"_{process}_", f"_{ended}_"))
    for folder in (left, gone):
        folder.mkdir()
        (folder / "a").write_text("half")
    write(tmp_path, 1)
    assert left.exists() and gone.exists()  # Its writer may be in another container.
    monkeypatch.setattr(files, "ABANDONED_SECONDS", -1)
    write(tmp_path, 2)
    # A writer that is alive is at work.
    assert left.exists() and not gone.exists()


@pytest.mark.parametrize("process", ["9999999999", "9" * 30, "-1", "", "१२"])
def test_a_temporary_name_of_no_process_stops_no_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: str
) -> None:
    monkeypatch.setattr(files, "ABANDONED_SECONDS", -1)
    mine = files.temporary_beside(tmp_path / "a")
    forged = mine.with_name(mine.name.replace(f"_{os.getpid()}_", f"_{process}_"))
    forged.write_text("whose?")
    files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and forged.exists()


def test_writing_compiles_no_pattern_for_each_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`re` keeps 512 patterns for the whole process: those of names would put all others out."""
    compiled: list[Any] = []
    compile_ = re.compile

    def noted(*given: Any) -> Any:
        compiled.append(given)
        return compile_(*given)

    monkeypatch.setattr(re, "compile", noted)
    files.write_text(tmp_path / "a", "new")
    assert not compiled


@pytest.mark.parametrize(
    "names", [["../victim"], ["/victim"], ["a/b"], [".."], [""], [7], {"a": 1}, "a"]
)
def test_a_forged_list_removes_nothing(tmp_path: Path, names: Any) -> None:
    (tmp_path / "victim").write_text("mine")
    pending = tmp_path / "model" / PENDING
    pending.mkdir(parents=True)
    (pending / SUPERSEDED).write_text(json.dumps(names))
    with pytest.raises(ValueError, match="is damaged; remove"):
        finish_replacing(tmp_path / "model")
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_link_in_place_of_what_is_pending_is_refused(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("mine")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / PENDING).symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match="is no folder"):
        finish_replacing(tmp_path / "model")
    assert (tmp_path / "private" / "key").exists()
    (tmp_path / "model" / PENDING).unlink()
    (tmp_path / "model" / PENDING).mkdir()
    (tmp_path / "model" / PENDING / "sub").symlink_to(tmp_path / "private")
    finish_replacing(tmp_path / "model")
    assert (tmp_path / "private" / "key").exists()


def test_nothing_is_put_in_place_through_a_link(tmp_path: Path) -> None:
    """A folder that was made to harm: its link leads to where a file of its own would be written."""
    (tmp_path / "private" / "deeper").mkdir(parents=True)
    model = tmp_path / "model"
    (model / PENDING / "sub" / "deeper").mkdir(parents=True)
    (model / PENDING / "sub" / "deeper" / "keys").write_text("theirs")
    (model / PENDING / "a").write_text("new")
    (model / PENDING / SUPERSEDED).write_text(json.dumps(["b"]))
    (model / "b").write_text("old")
    (model / "sub").symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match="sub' is a link"):
        finish_replacing(model)
    assert not list((tmp_path / "private" / "deeper").iterdir())
    assert (model / "b").exists() and not (model / "a").exists()
    (model / "sub").unlink()
    (model / "sub").mkdir()
    (model / "sub" / "deeper").symlink_to(tmp_path / "private" / "deeper")
    with pytest.raises(ValueError, match="deeper' is a link"):
        finish_replacing(model)
    (model / "sub" / "deeper").unlink()
    finish_replacing(model)
    assert (model / "sub" / "deeper" / "keys").exists() and not (model / "b").exists()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_nobody_may_read_a_new_file_whom_the_process_does_not_let(
    tmp_path: Path, umask: int
) -> None:
    def mode(name: str) -> int:
        return stat.S_IMODE((tmp_path / name).stat().st_mode)

    during = []

    def fill(temporary: Path) -> None:
        during.append(stat.S_IMODE(temporary.stat().st_mode))
        temporary.write_text("new")

    before = os.umask(umask)
    try:
        files.write_atomically(tmp_path / "new", fill)
        assert mode("new") == 0o666 & ~umask
        # What is replaced stays as closed, or as open, as somebody made it.
        for kept in (0o600, 0o400, 0o664):
            (tmp_path / "old").write_text("old")
            (tmp_path / "old").chmod(kept)
            files.write_atomically(tmp_path / "old", fill)
            assert mode("old") == kept and not during[-1] & ~(kept | 0o200)
            (tmp_path / "old").unlink()
    finally:
        os.umask(before)


def test_a_folder_that_cannot_be_changed_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(folders, "finish_replacing", lambda _: [])
        write(tmp_path, 0)

    def refuse(*_: Any) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="a save that was interrupted when it was whole"):
        finish_replacing(tmp_path)
