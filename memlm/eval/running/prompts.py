"""The text before and after a document when a model is asked about it.

A model fine-tuned on answers is given the document and the question, as in training. An instruction model
is told what to do, shown solved examples, and asked after the document, in its chat format where it has
one. The layout is the published one (BABILong, arXiv:2406.10149, section 3); wording and examples are our
own. A YAML file may bring other words, such as the published ones:

    template: "{instruction}\\n\\n<context>\\n{context}\\n</context>\\n\\nQuestion: {question}"
    tasks:
      qa1: {instruction: ..., examples: ..., post_prompt: ...}
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlm.files import parse_yaml
from memlm.tasks import babi
from memlm.templates import BABILONG_QUESTION_TEMPLATE
from memlm.tokens import Part, fill, joined

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STYLES = ("answer", "instruction", "chat")
TEMPLATE = (
    "{instruction}\n\n{examples}\n\n{post_prompt}\n\n<context>\n{context}\n</context>\n\n"
    "Question: {question}"
)
# Follows the question where no chat format says whose turn it is.
CUE = "\nAnswer:"
EXAMPLES = 2
# The seed of the examples, from which no sample of an evaluation is drawn.
EXAMPLES_SEED = 20_240_610
# Placeholders for what is put in later, which no chat template changes.
_CONTEXT, _QUESTION = "[[memlm:context]]", "[[memlm:question]]"

_WHO_IS_WHERE = (
    "The text below tells of many things. Somewhere in it short sentences say where persons are or go. "
    "Find out from them where the person in question was last."
)
_ONE_PLACE = "Answer with the name of the place alone."
_YES_NO = "Answer with yes or no alone."

# (what to do, how to answer)
WORDS: Mapping[str, tuple[str, str]] = {
    "qa1": (_WHO_IS_WHERE, _ONE_PLACE),
    "qa2": (
        "Somewhere in the text below short sentences say where persons go and what they take or leave. "
        "Find out from them where the object in question is now.",
        _ONE_PLACE,
    ),
    "qa3": (
        "Somewhere in the text below short sentences say where persons go and what they take or leave. "
        "Find out from them where the object in question was before it came to the place named.",
        _ONE_PLACE,
    ),
    "qa4": (
        "Somewhere in the text below short sentences say which place lies north, south, east or west "
        "of which. Answer the question from them.",
        _ONE_PLACE,
    ),
    "qa5": (
        "Somewhere in the text below short sentences say who gives what to whom. Answer the question "
        "from them; when several fit, the last one counts.",
        "Answer with the name of the person or of the object alone.",
    ),
    "qa6": (_WHO_IS_WHERE, _YES_NO),
    "qa7": (
        "Somewhere in the text below short sentences say who takes, leaves and gives which objects. "
        "Count the objects that the person in question carries at the end.",
        "Answer with none, one, two or three alone.",
    ),
    "qa8": (
        "Somewhere in the text below short sentences say who takes, leaves and gives which objects. "
        "Name the objects that the person in question carries at the end.",
        "Answer with the objects alone, with commas between them, or with nothing.",
    ),
    "qa9": (
        "Somewhere in the text below short sentences say where persons are, or are no longer. "
        "Answer the question from them.",
        _YES_NO,
    ),
    "qa10": (
        "Somewhere in the text below short sentences say where persons are, some of them leaving open "
        "which of two places it is. Answer the question from them.",
        "Answer with yes, no or maybe alone.",
    ),
    "qa11": (_WHO_IS_WHERE + " He and she mean the person named last.", _ONE_PLACE),
    "qa12": (_WHO_IS_WHERE, _ONE_PLACE),
    "qa13": (_WHO_IS_WHERE + " They means the two persons named last.", _ONE_PLACE),
    "qa14": (
        "Somewhere in the text below short sentences say where persons went and when: yesterday, this "
        "morning, this afternoon or this evening, in any order. Answer the question from them.",
        _ONE_PLACE,
    ),
    "qa15": (
        "Somewhere in the text below short sentences say which animals are afraid of which, and which "
        "animal somebody is. Deduce what the one in question is afraid of.",
        "Answer with the name of the animal alone, in the singular.",
    ),
    "qa16": (
        "Somewhere in the text below short sentences say which animal somebody is and what colour "
        "somebody has. Conclude from others of the same kind.",
        "Answer with the colour alone.",
    ),
    "qa17": (
        "Somewhere in the text below short sentences say how coloured shapes lie to each other. "
        "Answer the question from them.",
        _YES_NO,
    ),
    "qa18": (
        "Somewhere in the text below short sentences compare the sizes of things. Answer the question "
        "from them.",
        _YES_NO,
    ),
    "qa19": (
        "Somewhere in the text below short sentences say which place lies north, south, east or west "
        "of which. Find the two steps that lead from one place to the other.",
        "Answer with the first letters of the two directions, with a comma between them, as in n,e.",
    ),
    "qa20": (
        "Somewhere in the text below short sentences say how persons feel, where they go and what they "
        "take. Answer why somebody does something, or where somebody will go.",
        "Answer with one word: the feeling or the place.",
    ),
}
_OTHERS = (
    "Somewhere in the text below stand sentences that answer a question. Remember them.",
    "Answer with what is asked for, and nothing else.",
)


@dataclass(frozen=True)
class Prompts:
    """How a model is asked.

    style: "answer" (the document, then `question_template`), "instruction", or "chat" (an instruction in
    the tokenizer's chat format). words: task -> instruction, examples, post_prompt, in place of our own.
    bare: nothing stands before the document, not even the tokenizer's start token; chat formats bring
    their own. file: where the words come from, None for our own.
    """

    style: str
    question_template: str = BABILONG_QUESTION_TEMPLATE
    template: str = TEMPLATE
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    bare: bool = False
    file: str | None = None

    @classmethod
    def of(
        cls,
        prompt: str | os.PathLike[str],
        tokenizer: PreTrainedTokenizerBase,
        question_template: str = BABILONG_QUESTION_TEMPLATE,
        bare: bool = False,
    ) -> Prompts:
        """Make the prompts of a style or a YAML file. ValueError on an unknown style or a bad file.

        A file's prompts are in chat format where the tokenizer has one.
        """
        chats = getattr(tokenizer, "chat_template", None) is not None
        if prompt == "chat" and not chats:
            raise ValueError(
                "prompt='chat' needs a tokenizer with a chat template; use 'instruction', or set "
                "tokenizer.chat_template"
            )
        if prompt in STYLES:
            return cls(str(prompt), question_template, bare=bare)
        path = Path(prompt)
        if path.suffix not in (".yaml", ".yml", ".json") or not path.is_file():
            raise ValueError(
                f"prompt={os.fspath(prompt)!r} is neither one of {', '.join(STYLES)} nor a YAML file "
                "that exists; name one of these"
            )
        template, words = _read_words(path)
        style = "chat" if chats else "instruction"
        return cls(style, question_template, template, words, file=os.fspath(path))

    @property
    def digest(self) -> str:
        """A short fingerprint of the wording."""
        said = [
            self.style,
            self.question_template,
            self.template,
            _plain(self.words),
            _plain(WORDS),
        ]
        return hashlib.blake2b(json.dumps(said).encode(), digest_size=8).hexdigest()

    def around(
        self, task: str, question: str, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[str, str]:
        """Return the text before the document and the text after it."""
        before, after = self.parts(task, question, tokenizer)
        return before, joined(after)

    def parts(
        self, task: str, question: str, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[str, list[Part]]:
        """`around`, the text after the document in parts, as only a template may bring control tokens."""
        if self.style == "answer":
            return "", fill(self.question_template, question=question)
        before, after = self._framed(task, tokenizer)
        pieces = after.split(_QUESTION)
        filled: list[Part] = [(pieces[0], True)]
        for piece in pieces[1:]:
            filled += [(question, False), (piece, True)]
        return before, filled

    def _framed(self, task: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
        instruction, post_prompt = WORDS.get(task, _OTHERS)
        words = {
            "instruction": instruction,
            "post_prompt": post_prompt,
            "examples": _examples(task),
        }
        words |= self.words.get(task, {})
        text = self.template
        for key, value in (words | {"context": _CONTEXT, "question": _QUESTION}).items():
            text = text.replace(f"{{{key}}}", value)
        # An empty part must not leave a gap.
        while "\n\n\n" in text:
            text = text.replace("\n\n\n", "\n\n")
        text = text.lstrip("\n")
        if self.style == "chat":
            text = str(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}],
                    tokenize=False,
                    add_generation_prompt=True,
                    # Models that think aloud first would use up the answer's tokens.
                    enable_thinking=False,
                )
            )
        else:
            text += CUE
        before, _, after = text.partition(_CONTEXT)
        if _QUESTION not in after:
            raise ValueError(
                f"the prompt of {task} loses the context or the question; the template must hold "
                "{context} and, after it, {question}"
            )
        return before, after


@functools.lru_cache(maxsize=64)
def _examples(task: str) -> str:
    """Solved examples, drawn from our generators; none where a task has no generator of stories."""
    if task not in babi.TASKS:
        return ""
    told = itertools.islice(babi.generate(task, EXAMPLES_SEED), 1, None, 6)
    return "\n\n".join(
        f"<example>\n{' '.join(story.facts)}\nQuestion: {story.question}{CUE} {story.answer}\n</example>"
        for story in itertools.islice(told, EXAMPLES)
    )


def _plain(words: Mapping[str, Any]) -> list[Any]:
    return [
        [key, _plain(value) if isinstance(value, Mapping) else value]
        for key, value in sorted(words.items())
    ]


def _read_words(path: Path) -> tuple[str, dict[str, dict[str, str]]]:
    try:
        found = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"prompt={str(path)!r} is not YAML ({reason}); correct it") from error
    if not isinstance(found, dict) or not found.keys() <= {"template", "tasks"}:
        raise ValueError(f"prompt={str(path)!r} must hold the keys 'template' and 'tasks' alone")
    template = found.get("template", TEMPLATE)
    if not isinstance(template, str) or "{context}" not in template.partition("{question}")[0]:
        raise ValueError(
            f"prompt={str(path)!r}: template must be text that holds {{context}} and, after it, "
            "{question}"
        )
    words: dict[str, dict[str, str]] = {}
    tasks = found.get("tasks") or {}
    if not isinstance(tasks, dict):
        raise ValueError(f"prompt={str(path)!r}: tasks must be a mapping of tasks to their texts")
    for task, parts in tasks.items():
        known = {"instruction", "examples", "post_prompt"}
        if (
            not isinstance(parts, dict)
            or not parts.keys() <= known
            or not all(isinstance(value, str) for value in parts.values())
        ):
            raise ValueError(
                f"prompt={str(path)!r}: tasks.{task} must hold texts named {', '.join(sorted(known))}"
            )
        words[str(task)] = dict(parts)
    return template, words
