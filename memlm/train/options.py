"""What a training document of BABILong looks like. Imports nothing heavy, so that recipes load fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from memlm.tasks import babi
from memlm.tasks.babi import endless
from memlm.templates import BABILONG_QUESTION_TEMPLATE, BABILONG_RECALL_TEMPLATE

# Options that only some layouts use, and options that only matter with recalled passages.
READ_BY = {
    "max_facts": ("story",),
    "facts_per_segment": ("aligned",),
    "gap_tokens": ("flowing",),
    "no_gap": ("flowing",),
    "ask_every": ("aligned", "flowing"),
    "end_probability": ("aligned", "flowing"),
    "distinct_actors": ("aligned", "flowing"),
    "line_breaks": ("aligned", "flowing"),
    "price_facts": ("aligned", "flowing"),
    "lessons": ("aligned", "flowing"),
}
RECALLING = ("retrieval_size", "retrieval_hops", "retrieval_tokens")


def described(help: str, default: Any) -> Any:
    """A dataclass field with its documentation."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class BabilongOptions:
    """How BABILong documents are made; a stage of the curriculum may change any of these."""

    tasks: tuple[str, ...] = described("bAbI tasks, one drawn per document", ("qa1",))
    question_template: str | None = described(
        "text that asks a question after a document, with {question} in it; the model remembers it; "
        "null: ' {question}' for babilong, the model's own for rows",
        None,
    )
    layout: Literal["story", "aligned", "flowing"] = described(
        "story: a bAbI story between sentences, questions as its last words (the papers'); "
        "aligned: some whole facts in every segment; flowing: facts at varying distances in "
        "endless text",
        "story",
    )
    questions: int = described(
        "story: questions at the end of a document; else questions after each asked segment", 1
    )
    ask_every: int = described("aligned, flowing: ask after every n-th segment and the last", 1)
    facts_per_segment: tuple[int, ...] = described(
        "aligned: how many facts a segment may have, one number drawn per segment", (0, 1, 1, 2)
    )
    lessons: tuple[str, ...] = described(
        "aligned, flowing: what else is asked about a task's stories, other tasks and the steps they are "
        "made of: handler (Who had the apple?), holder (Where is the one who had it?), taker (Who took "
        "it to the kitchen?), carrier (Who carries it? nobody, if it was put down), carried (qa2, of what "
        "somebody carries), left (Where was it left?), before (Where was Mary before the kitchen?), gift "
        "(What did Mary give to John?). One named twice is asked twice as often",
        (),
    )
    distinct_actors: bool = described(
        "aligned, qa1: everybody moves once before anybody moves again, so that the newest fact is not "
        "a better guess than any other",
        False,
    )
    line_breaks: float = described(
        "aligned, flowing: share of facts that begin a line, where others follow a space: to most "
        "tokenizers their first word is then another token",
        0.0,
    )
    price_facts: bool = described(
        "aligned, flowing: whether writing has its price (write_cost, open_cost) in segments that tell "
        "facts as well; false: only where nothing is told, so that no price stands against learning them",
        True,
    )
    max_facts: int | None = described("story: most facts a story may have; null: no limit", None)
    gap_tokens: tuple[float, float] = described(
        "flowing: mean distance between facts in tokens, redrawn log-uniformly in this range",
        (8.0, 1024.0),
    )
    no_gap: float = described("flowing: share of stretches whose facts follow each other", 0.2)
    end_probability: float = described(
        "aligned, flowing: chance that a document ends with a batch; below 1 its memory is carried "
        "into the next batch, and states of any age are trained on",
        1.0,
    )
    segment_length: int | None = described(
        "tokens per segment of the training documents; null: the model's own", None
    )
    retrieval: int = described(
        "story: passages of the document that are recalled before every question, so that the "
        "model learns to read them; 0: none",
        0,
    )
    retrieval_size: int = described("words of a passage", 32)
    retrieval_hops: int = described("searches per question, each with what the one before found", 1)
    retrieval_tokens: int = described("most tokens of recalled passages; the rest is cut off", 192)
    recall_template: str = described(
        "how a recalled passage is written before the question, with {text} in it; the model "
        "remembers it",
        BABILONG_RECALL_TEMPLATE,
    )

    @property
    def asked_with(self) -> str:
        """The text that asks a question after a document of BABILong."""
        return (
            BABILONG_QUESTION_TEMPLATE if self.question_template is None else self.question_template
        )

    def reads(self, name: str) -> bool:
        """Whether documents of this layout depend on the option `name`."""
        if name in RECALLING:
            return self.retrieval > 0
        return self.layout in READ_BY.get(name, (self.layout,))

    def __post_init__(self) -> None:
        for name in ("tasks", "facts_per_segment", "gap_tokens", "lessons"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.layout not in ("story", "aligned", "flowing"):
            raise ValueError(
                f"layout={self.layout!r} is unknown; use 'story', 'aligned' or 'flowing'"
            )
        if self.question_template is not None and "{question}" not in self.question_template:
            raise ValueError(
                f"question_template={self.question_template!r} has no place for the question; "
                "write {question} in it"
            )
        if "{text}" not in self.recall_template:
            raise ValueError(
                f"recall_template={self.recall_template!r} has no place for the passage; "
                "write {text} into it"
            )
        if self.retrieval and self.layout != "story":
            raise ValueError(
                f"retrieval={self.retrieval} needs layout='story'; the others have no whole document "
                "to recall from"
            )
        for name, least in (("retrieval", 0), ("retrieval_size", 1), ("retrieval_hops", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.line_breaks <= 1:
            raise ValueError(f"line_breaks={self.line_breaks} is a share; use 0 to 1")
        if not self.tasks:
            raise ValueError("tasks is empty; name at least one, such as 'qa1'")
        for task in self.tasks:
            babi.check_task(task)
            if self.layout != "story" and task not in endless.TASKS:
                raise ValueError(
                    f"tasks names {task!r}, which tells no endless story; use layout='story' for it"
                )
        for lesson in self.lessons:
            if lesson not in (*endless.TASKS, *endless.LESSONS):
                raise ValueError(
                    f"lessons names {lesson!r}, which is neither a lesson nor a task that tells endless "
                    f"stories; use {', '.join((*endless.LESSONS, *endless.TASKS))}"
                )
        for lesson in self.lessons if self.layout != "story" else ():
            if not any(lesson in endless.kinds_of(task) for task in self.tasks):
                raise ValueError(
                    f"lessons names {lesson!r}, which no story of tasks={self.tasks} answers; leave it "
                    "out, or add a task whose stories do"
                )
        if self.distinct_actors and set(self.tasks) != {"qa1"}:
            raise ValueError(
                f"distinct_actors leaves moves untold, which tasks={self.tasks} cannot do without; "
                "use it with qa1 alone"
            )
        for name in ("questions", "ask_every", "segment_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not self.facts_per_segment or min(self.facts_per_segment) < 0:
            raise ValueError(
                f"facts_per_segment={self.facts_per_segment} must name numbers of facts, 0 or more"
            )
        if not 0 < self.gap_tokens[0] <= self.gap_tokens[1]:
            raise ValueError(
                f"gap_tokens={self.gap_tokens} must be two rising numbers of tokens above 0"
            )
        for name, low in (("end_probability", 0.0), ("no_gap", -1.0)):
            if not low < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a probability; use up to 1")
