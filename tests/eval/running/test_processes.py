"""An evaluation in several processes is the evaluation in one, also when one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memlm.eval import evaluate, perplexity
from memlm.eval.log import SAMPLES, RunLog, join_parts, part_of
from memlm.eval.processes import Processes
from tests.test_kills import check_evaluated, evaluated, finish, start

LAUNCH = (
    "import sys\nfrom pathlib import Path\nfrom tests.eval.running.test_processes import work\n"
)


def work(folder: Path, dies: int | None = None) -> None:
    """What each process does; process 1 dies when it has answered so many samples."""
    if dies is not None and os.environ["RANK"] == "1":
        from memlm.eval.running.batches import BatchRunner

        answer, left = BatchRunner._row, [dies]

        def dying(self, *arguments):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer(self, *arguments)

        BatchRunner._row = dying
    evaluated(folder)


def launch(folder: Path, dies: int | None = None, count: int = 2) -> int:
    code = f"{LAUNCH}work(Path({str(folder)!r}), {dies})\n"
    script = folder.parent / "work.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "ACCELERATE_USE_CPU": "true"}
    port = 20000 + os.getpid() % 20000
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
    command += [f"--nproc-per-node={count}", f"--master-port={port}", str(script)]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if dies is None:
        assert made.returncode == 0, made.stderr[-3000:]
    return made.returncode


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tmp_path: Path) -> None:
    """The batches are dealt out and their rows joined; of a process that died, they are made again."""
    assert finish(start(evaluated, tmp_path / "whole")) == 0
    launch(tmp_path / "killed")
    check_evaluated(tmp_path)
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


@pytest.mark.slow
@pytest.mark.parametrize("then", [1, 2])
def test_a_process_that_died_is_made_up_for(tmp_path: Path, then: int) -> None:
    """By the same command, with as many processes or fewer."""
    assert finish(start(evaluated, tmp_path / "whole")) == 0
    assert launch(tmp_path / "killed", dies=1) != 0
    assert (tmp_path / "killed" / "samples-1.jsonl").is_file()
    if then == 2:
        launch(tmp_path / "killed")
    else:
        assert finish(start(evaluated, tmp_path / "killed")) == 0
    check_evaluated(tmp_path)


def test_processes_share_samples_and_join_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes one after the other, who need not wait for each other: the second is the first."""
    from tests.test_kills import summary

    assert finish(start(evaluated, tmp_path / "whole")) == 0
    taken = []

    class Other(Processes):
        def wait(self) -> None:
            pass

        def share(self, items):
            taken.append(super().share(items))
            return taken[-1]

        def join_skipped(self, folder, skipped):
            if self.first:
                return skipped
            raise SystemExit

    def be(rank: int) -> None:
        monkeypatch.setattr(Processes, "current", classmethod(lambda cls: Other(rank, 2)))

    be(1)
    with pytest.raises(SystemExit):
        evaluated(tmp_path / "killed")
    # What it wrote would be joined at the start of a run that goes on; here it is still running.
    mine = part_of(tmp_path / "killed" / SAMPLES, 1)
    held = mine.read_bytes()
    mine.unlink()

    def join(*arguments):
        mine.write_bytes(held)
        join_parts(*arguments)

    monkeypatch.setattr("memlm.eval.running.runner.join_parts", join)
    be(0)
    evaluated(tmp_path / "killed")
    assert [len(texts) for texts in taken] == [4, 4]
    first, second = ({key for text in texts for key in text.keys} for texts in taken)
    assert not first & second
    assert summary(tmp_path / "killed") == summary(tmp_path / "whole")
    check_evaluated(tmp_path)


def test_what_processes_left_is_joined_when_a_run_goes_on(tmp_path: Path) -> None:
    keys = ("task", "length", "index")
    for part in (0, 2):
        with RunLog(tmp_path, {"seed": 0}, keys, part=part) as log:
            log.append(
                [dict(task="qa1", length="0k", index=part + n, right=True) for n in range(2)]
            )
    with part_of(tmp_path / SAMPLES, 2).open("a") as file:
        file.write('{"task": "qa1", "len')
    assert not (tmp_path / SAMPLES).exists()
    log = RunLog(tmp_path, {"seed": 0}, keys)
    assert sorted(key[2] for key in log.rows) == [0, 1, 2, 3]
    assert {path.name for path in tmp_path.iterdir()} == {SAMPLES, "run.json"}
    assert len((tmp_path / SAMPLES).read_text().splitlines()) == 4


def test_what_several_processes_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "current", classmethod(lambda cls: Processes(0, 2)))
    with pytest.raises(ValueError, match="out=None, but 2 processes join"):
        evaluate(None, None, ["qa1"], ["0k"])  # type: ignore[arg-type]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match="perplexity runs in one process, but the launcher started 2"
    ):
        perplexity(None, None)  # type: ignore[arg-type]
