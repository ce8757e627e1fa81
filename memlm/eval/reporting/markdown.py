"""A report as Markdown: tables to paste, with links to the pictures beside it."""

from __future__ import annotations

from collections.abc import Sequence

from memlm.eval.reporting.findings import Findings, capitalised, reasons_for_gap
from memlm.eval.reporting.pictures import NO_DEPTH, captions
from memlm.eval.reporting.report import escape_cell, percent_range

MEAN_NOTE = (
    "A mean weighs every task the same; its interval adds the squared distances of each task's accuracy "
    "to its Wilson limits like variances (square-and-add). All intervals are 95%."
)


def markdown_of(findings: Findings, pictures: Sequence[str]) -> str:
    """The report as Markdown, beside the `pictures` that were drawn."""
    lines = [f"# {escape_cell(findings.title)}", "", escape_cell(findings.answer()), ""]
    for section in findings.sections:
        lines += [f"## {escape_cell(section.heading)}", "", escape_cell(section.text), ""]
        if section.rows:
            lines += [*_table([section.heads, *section.rows]), ""]
    if len(findings.runs) > 1:
        lines += [f"## {escape_cell(capitalised(findings.over))}", "", _means_table(findings), ""]
    for run in findings.runs:
        lines += [f"## {escape_cell(run.name)}", "", run.report.to_markdown(intervals=True), ""]
    lines += ["Percent right, with the 95% interval. " + MEAN_NOTE, ""]
    for name, (heading, caption) in captions(findings).items():
        drawn = name in pictures
        lines += [f"## {heading}", ""]
        lines += (
            [f"![{heading}]({name})", "", escape_cell(caption), ""] if drawn else [NO_DEPTH, ""]
        )
    lines += ["## Settings and versions", "", _settings_table(findings), ""]
    if commands := findings.commands():
        lines += ["## To repeat", "", *(f"    {' '.join(c.splitlines())}" for c in commands), ""]
    return "\n".join(lines)


def _means_table(findings: Findings) -> str:
    lines = [
        "| run | " + " | ".join(findings.lengths) + " |",
        "|---" * (1 + len(findings.lengths)) + "|",
    ]
    for name, report in findings.shared.items():
        row = []
        for length in findings.lengths:
            if found := report.at(length):
                entry = percent_range(report.mean(length), report.mean_interval(length))
                row.append(entry + "*" * (len(found) < len(report.tasks)))
            else:
                row.append("-" if reasons_for_gap(report, length) else "")
        lines.append(f"| {escape_cell(name)} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _settings_table(findings: Findings) -> str:
    lines = [
        "| | " + " | ".join(escape_cell(run.name) for run in findings.runs) + " |",
        "|---" * (1 + len(findings.runs)) + "|",
    ]
    for key, values in findings.settings():
        lines.append(f"| {escape_cell(key)} | " + " | ".join(map(escape_cell, values)) + " |")
    return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(escape_cell, row)) + " |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]
