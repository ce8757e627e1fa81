"""Processes that know nothing of memlm yet, for what depends on the order of imports or on being killed.

They are forks of one process per test worker that has imported torch and transformers (and what those
import late), which costs three seconds each time otherwise. Where neither may be loaded, take `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path

# Not transformers.modeling_utils: it brings the Auto classes, whose import is what is being tested.
PRELOADED = ["pytest", "torch", "torch._dynamo", "transformers", "transformers.activations"]


def _run(code: str, arguments: tuple[str, ...], folder: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    assert not [name for name in sys.modules if name.split(".")[0] == "memlm"]
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<fresh>", "exec"), {"__name__": "__main__"})


class Fresh:
    """Run Python code in a new process, as `python -c code *arguments` does. Output goes to `folder`."""

    def __init__(self, folder: Path, code: str, *arguments: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._folder = tempfile.mkdtemp(dir=folder)
        given = (code, arguments, self._folder)
        self.process: BaseProcess = context.Process(target=_run, args=given)
        self.process.start()

    def result(self, timeout: float = 120) -> str:
        """Wait for the end; returns what was printed. AssertionError when the code failed."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        out, errors = (Path(self._folder, name).read_text() for name in ("out", "err"))
        assert self.process.exitcode == 0, f"exit code {self.process.exitcode}\n{errors}"
        return out


def run_fresh(code: str, *arguments: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return Fresh(Path(folder), code, *arguments).result()
