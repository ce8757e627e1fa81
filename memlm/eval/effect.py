"""Does it work, and what did it cost? One report about a model that was given a memory and trained.

Answers to the same questions by the model with its memory, with the memory silenced, by its own base
without one (`none`), and by the base as it was before training; and what training did to the loss on short
texts, for which the base needs no memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlm.eval.log import read_rows
from memlm.eval.losses.measure import DOCUMENTS, perplexity
from memlm.eval.losses.report import Estimate
from memlm.eval.reporting.compare import compare
from memlm.eval.reporting.findings import Section
from memlm.eval.reporting.page import write_report
from memlm.eval.reporting.plots import distances
from memlm.eval.reporting.report import Report, load_rows, percent
from memlm.eval.running.baselines import default_window, is_memory_model
from memlm.eval.running.runner import evaluate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from memlm.modeling import MemLMForCausalLM

MEMORY, SILENCED, NONE, BASE = "with memory", "memory silenced", "none", "untouched base"
TITLE = "Does the memory work, and what did it cost?"
# What a model of memlm is asked with.
_ASKING = ("question_template", "question_segment", "recall_template")


@dataclass(frozen=True)
class Effect:
    """What the report says. reports: by reader; before, after: nats per token of short texts by the base as
    it was and by the model, change: after less before, paired by text; None without an untouched base."""

    reports: Mapping[str, Report]
    before: Estimate | None
    after: Estimate | None
    change: Estimate | None
    files: tuple[str, ...]

    @property
    def kept(self) -> str:
        """In a sentence: what became of the base's predictions in short texts."""
        if self.before is None or self.change is None:
            return "There is no untouched base to compare short texts with."
        by = f"{self.change.mean:+.3f} nats per token"
        if self.change.low is None or self.change.high is None:
            return f"One text cannot tell what became of the base's predictions ({by})."
        by += f", 95% interval {self.change.low:+.3f} to {self.change.high:+.3f}"
        if self.change.low > 0:
            return f"In short texts the model predicts worse than the base did: {by}."
        if self.change.high < 0:
            return f"In short texts the model predicts better than the base did: {by}."
        return f"In short texts the model predicts as the base did, as far as can be told: {by}."


def effect(
    model: MemLMForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    base: PreTrainedModel | None,
    out: str | os.PathLike[str],
    *,
    none: PreTrainedModel | None = None,
    texts: str | os.PathLike[str] = "builtin",
    documents: int = 32,
    progress: bool = True,
    **asked: Any,
) -> Effect:
    """Evaluate what training gave and what it cost, write a report into `out`, and return its content.

    base: the base model before training, None for a model from random weights. none: a model trained
    without memory, to be judged as `none`; by default the trained base, which sees the last segment alone.
    texts, documents: the haystack, and how many texts of one segment, on which the base's predictions are
    compared. asked: what `evaluate` is asked with (tasks, lengths, samples, data, ...). Everything resumes
    in `out`, as evaluations do. ValueError on arguments that cannot work.
    """
    if not is_memory_model(model):
        raise ValueError(
            f"model={type(model).__name__} has no memory to judge; give a model of memlm"
        )
    if base is not None and is_memory_model(base):
        raise ValueError(
            "base has memories itself; give the model of transformers that was wrapped"
        )
    folder, segment = Path(out), int(model.config.segment_length)
    reports: dict[str, Report] = {}

    def judge(name: str, judged: Any, **how: Any) -> None:
        reports[name] = evaluate(
            judged, tokenizer, out=folder / name.replace(" ", "-"), progress=progress, **asked, **how
        )  # fmt: skip

    judge(MEMORY, model)
    judge(SILENCED, model, baseline="silenced")
    if none is None:
        judge(NONE, model, baseline="last-tokens", window=segment)
    else:
        judge(NONE, none)
    before = after = change = None
    if base is not None:
        wrapped = _asked_alike(base, model)
        try:
            judge(BASE, wrapped, baseline="last-tokens", window=default_window(base))
        finally:
            wrapped.unload()
        losses = {}
        for name, measured in (("losses-before", base), ("losses-after", model)):
            perplexity(
                measured, tokenizer, texts, segment, documents,
                segment_length=segment, out=folder / name, progress=progress,
            )  # fmt: skip
            rows = read_rows(folder / name / DOCUMENTS, ("document", "digest"))
            losses[name] = {
                (row["document"], row["digest"]): sum(row["nats"]) / sum(row["predictions"])
                for row in rows
            }
        first, last = losses["losses-before"], losses["losses-after"]
        same = sorted(first.keys() & last.keys())
        before, after = (Estimate.of([found[key] for key in same]) for found in (first, last))
        change = Estimate.of([last[key] - first[key] for key in same])
    found = Effect(reports, before, after, change, ())
    runs = {name: folder / name.replace(" ", "-") for name in reports}
    files = write_report(runs, folder, title=TITLE, sections=_sections(found, runs, segment, none))
    return Effect(reports, before, after, change, tuple(map(str, files)))


def _asked_alike(base: Any, model: Any) -> Any:
    """The base in a wrapping without memory, so that it is asked in the words the model is asked in."""
    from memlm.modeling import MemLMForCausalLM

    wrapped = MemLMForCausalLM.from_base(
        base, memory="none", segment_length=model.config.segment_length
    )
    for name in _ASKING:
        setattr(wrapped.config, name, getattr(model.config, name))
    return wrapped.eval()


def _sections(found: Effect, runs: Mapping[str, Path], segment: int, none: Any) -> list[Section]:
    judged = (
        "a model trained without memory"
        if none is not None
        else f"the trained base, which sees the last {segment:,} tokens alone"
    )
    readers = [
        (MEMORY, "the model, reading into its memory"),
        (SILENCED, "the same model, remembering nothing: "
         + {"write_threshold": "its write gates stay shut", "fresh states": "every segment starts afresh"}[
             found.reports[SILENCED].settings["silenced_by"]]),
        (NONE, judged),
    ]  # fmt: skip
    if BASE in found.reports:
        window = found.reports[BASE].settings["window"]
        readers.append((BASE, f"the base before training, which sees the last {window:,} tokens"))
    sections = [
        Section("Who answers", "The same questions, in the same words.", ("", ""), readers),
        Section(
            "Does it work?",
            f"With the memory (B) and with it silenced (A): "
            f"{compare(runs[SILENCED], runs[MEMORY], (SILENCED, MEMORY)).verdict}",
        ),
    ]
    if rows := _by_distance(runs):
        sections.append(
            Section(
                "Answers by distance",
                "Percent right (questions), by the tokens from the earliest fact that an answer needs to "
                "the question. Where facts are not marked, a fact stands where its answer was last said.",
                ("tokens", *runs),
                rows,
            )
        )
    costs = []
    if found.before is not None and found.after is not None and found.change is not None:
        costs = [
            ("base before training", str(found.before), f"{math.exp(found.before.mean):,.1f}"),
            ("model, from an empty memory", str(found.after), f"{math.exp(found.after.mean):,.1f}"),
            (
                "change, paired by text",
                str(found.change),
                f"{math.exp(found.change.mean):,.2f} times",
            ),
        ]
    return [
        *sections,
        Section(
            "What did it cost?",
            f"{found.kept} Texts of one segment ({segment:,} tokens), mean over texts [95% interval].",
            ("", "nats per token", "perplexity"),
            costs,
        ),
    ]


def _by_distance(runs: Mapping[str, Path]) -> list[Sequence[str]]:
    """A row for each range of distances: percent right and questions, run by run."""
    bins = {name: distances(load_rows(folder), 4) for name, folder in runs.items()}
    ranges = sorted({(part.low, part.high) for parts in bins.values() for part in parts})
    table: list[Sequence[str]] = []
    for low, high in ranges:
        row = [f"{low:,.0f} to {high:,.0f}"]
        for parts in bins.values():
            here = [part for part in parts if (part.low, part.high) == (low, high)]
            right = sum(part.correct for part in here)
            asked = sum(part.samples for part in here)
            row.append(f"{percent(right / asked)} ({asked})" if asked else "")
        table.append(row)
    return table
