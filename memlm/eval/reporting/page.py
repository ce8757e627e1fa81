"""A report about one or more runs: pictures, tables to paste, and a page to open in a browser.

The page is one file without scripts, made from `templates/report.html`, which escapes all text it is given.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from memlm.eval.reporting.findings import Findings, Section, capitalised, reasons_for_gap
from memlm.eval.reporting.markdown import MEAN_NOTE, markdown_of
from memlm.eval.reporting.pictures import (
    COST,
    DEPTH,
    HEAT,
    LINES,
    NO_DEPTH,
    captions,
    draw_pictures,
)
from memlm.eval.reporting.report import Report, percent
from memlm.eval.reporting.runs import Run, as_text
from memlm.files import write_atomically

MARKDOWN, PAGE = "report.md", "report.html"
TEXT_SHOWN = 300


def write_report(
    runs: Mapping[str, str | os.PathLike[str] | Report],
    out: str | os.PathLike[str],
    *,
    chance: float | None = None,
    title: str = "Accuracy by length of context",
    sections: Sequence[Section] = (),
) -> list[Path]:
    """Write pictures, `report.md` and `report.html` about `runs` into the folder `out`; return their paths.

    A run is the folder of an evaluation, or a Report, which has no samples to draw depths or show wrong
    answers from. `chance` is what guessing scores, by default what the commonest answer of each task would
    score, where the samples are enough to tell. sections: what stands before the pictures.
    """
    if not runs:
        raise ValueError("runs is empty; give at least one {name: folder}")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={os.fspath(out)!r} is a file; name a folder")
    loaded = [Run.load(name, run) for name, run in runs.items()]
    findings = Findings(title, loaded, chance, sections)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures(findings, folder)
    _write(folder / MARKDOWN, markdown_of(findings, pictures))
    images = {name: (folder / name).read_bytes() for name in pictures}
    _write(folder / PAGE, html_of(findings, images))
    return [folder / name for name in [*pictures, MARKDOWN, PAGE]]


def html_of(findings: Findings, images: Mapping[str, bytes]) -> str:
    """The report as a page that holds its `images`, PNG by name."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("memlm.eval.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "capitalised": capitalised}
    explained = captions(findings)
    page = environment.get_template("report.html").render(
        findings=findings,
        names=", ".join(run.name for run in findings.runs),
        figures=[
            (*explained[name], base64.b64encode(images[name]).decode() if name in images else None)
            for name in (LINES, HEAT, DEPTH, COST)
        ],
        no_figure=NO_DEPTH,
        mean_note=MEAN_NOTE,
        reasons_for_gap=reasons_for_gap,
        wrong_answers={run.name: _wrong_answers(run) for run in findings.runs},
        settings=[(key, list(map(_shortened, values))) for key, values in findings.settings()],
    )
    return page + "\n"


def _wrong_answers(run: Run) -> list[list[str]]:
    """Task, length, sample, question, right answer and answer of some wrong answers of every task."""
    keys = ("length", "index", "question", "target", "output")
    return [
        [task, *(_shortened(as_text(row.get(key, ""))) for key in keys)]
        for task in run.report.tasks
        for row in run.wrong(task)
    ]


def _shortened(text: str) -> str:
    return text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 3] + "..."


def _write(path: Path, text: str) -> None:
    # Invalid text, such as half of a surrogate pair in an output, must not stop a report.
    content = text.encode("utf-8", "replace")
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
