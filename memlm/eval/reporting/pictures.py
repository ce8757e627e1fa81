"""The pictures of a report: drawn into its folder, each with a heading and how to read it."""

from __future__ import annotations

from pathlib import Path

from memlm.eval.reporting.findings import Findings
from memlm.eval.reporting.plots import PICTURE, plot_cost, plot_depth, plot_heat_map, plot_lines

HEAT, LINES, DEPTH, COST = PICTURE, "lengths.png", "depth.png", "cost.png"
NO_DEPTH = "Not drawn: no sample says which facts support its answer (older runs do not)."


def draw_pictures(findings: Findings, folder: Path) -> list[str]:
    """Draw into `folder`; return the names of the pictures drawn, those there is anything to show in."""
    reports = {run.name: run.report for run in findings.runs}
    plot_heat_map(reports, folder / HEAT)
    plot_lines(findings.shared, folder / LINES, findings.chance, guess=findings.guess)
    drawn = [HEAT, LINES]
    if plot_depth({run.name: run.rows for run in findings.runs}, folder / DEPTH):
        drawn.append(DEPTH)
    else:
        # A picture left by an earlier report would be taken for this one's.
        (folder / DEPTH).unlink(missing_ok=True)
    plot_cost(reports, folder / COST)
    return [*drawn, COST]


def captions(findings: Findings) -> dict[str, tuple[str, str]]:
    """A heading and a line on how to read it, for every picture."""
    lines = f"Each point is {findings.over} with its 95% interval."
    if any(
        len(r.at(x)) not in (0, len(r.tasks)) for r in findings.shared.values() for x in r.lengths
    ):
        lines += " Hollow points lack some of the tasks."
    if findings.left_out:
        lines += f" Tasks that not every run has are left out: {', '.join(findings.left_out)}."
    if not findings.comparable:
        lines = (
            "The runs share no task: each line is the mean over its own, so do not compare them."
        )
    return {
        HEAT: (
            "Accuracy by task and length",
            "Percent right; below it the 95% interval and n, the samples. Light is right, dark is "
            "wrong, hatched could not be run, white was not asked for.",
        ),
        LINES: ("Accuracy against length", lines),
        DEPTH: (
            "Accuracy against where the fact stands",
            "All tasks and lengths but 0k together, by the earliest fact that the answer needs. A "
            "level line means that place does not matter; n is the samples of a bin, with + where "
            "another run has more.",
        ),
        COST: (
            "What it costs",
            "A level memory line means that longer documents need no more memory. Peak memory is of "
            "the GPU where there is one, otherwise of the whole process.",
        ),
    }
