"""Tables and pictures of results."""

from __future__ import annotations

from pathlib import Path

import pytest

from memlm.eval.report import Cell, Report, plot_lines


def cell(task: str, length: str, correct: int, samples: int = 10) -> Cell:
    return Cell(task, length, samples, correct, correct, correct, 1000, 2.0, 0.1, 2**20)


REPORT = Report(
    [cell("qa1", "1M", 5), cell("qa1", "4k", 10), cell("qa2", "4k", 7)], {"seed": 0}, {}, {}
)


def test_the_table_orders_lengths_and_leaves_gaps() -> None:
    assert REPORT.to_markdown().splitlines() == [
        "| task | 4k | 1M |",
        "|---|---|---|",
        "| qa1 | 100 | 50 |",
        "| qa2 | 70 |  |",
        "| mean | 85 | 50 |",
    ]


def test_cells_know_their_rates() -> None:
    first = REPORT.cells[0]
    assert (first.accuracy, first.tokens_per_second, first.data_wait_share) == (0.5, 500.0, 0.05)
    assert first.interval == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert REPORT.mean(4096) == pytest.approx(0.85)
    with pytest.raises(ValueError, match="'8k' was not evaluated"):
        REPORT.mean("8k")


def test_a_report_survives_saving(tmp_path: Path) -> None:
    written = REPORT.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written}
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    loaded = Report.load(tmp_path)
    assert loaded.cells == REPORT.cells and loaded.settings == {"seed": 0}


def test_lines_of_several_runs_are_drawn(tmp_path: Path) -> None:
    plot_lines({"armt": REPORT, "none": Report([cell("qa1", "4k", 1)])}, tmp_path / "lines.png")
    assert (tmp_path / "lines.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least one"):
        plot_lines({}, tmp_path / "none.png")


def test_a_folder_without_summary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        Report.load(tmp_path)
    (tmp_path / "summary.json").write_text('{"cells": [1]}')
    with pytest.raises(ValueError, match="is not a summary"):
        Report.load(tmp_path)
