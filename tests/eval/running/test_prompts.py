"""Prompts: what stands around a document, in each style, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from memlm.eval import evaluate
from memlm.eval.running.prompts import WORDS, Prompts
from memlm.tasks import babi
from memlm.tasks.haystack import Haystack
from memlm.tasks.registry import TASKS
from tests.eval.fake import SolvingModel

Tokenizer = PreTrainedTokenizerFast
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def chatting(tokenizer: Tokenizer) -> Tokenizer:
    ours = copy.deepcopy(tokenizer)
    ours.chat_template = CHAT
    return ours


def test_answer_style_puts_the_question_behind_the_document(tokenizer: Tokenizer) -> None:
    prompts = Prompts.of("answer", tokenizer, "\nQ: {question} A:")
    assert prompts.around("qa1", "Where is Mary?", tokenizer) == ("", "\nQ: Where is Mary? A:")


@pytest.mark.parametrize("task", [*babi.TASKS, *TASKS])
def test_instructions_frame_the_document_for_every_task(task: str, tokenizer: Tokenizer) -> None:
    before, after = Prompts.of("instruction", tokenizer).around(task, "{context}? so", tokenizer)
    assert before.endswith("<context>\n") and after.startswith("\n</context>")
    assert after == "\n</context>\n\nQuestion: {context}? so\nAnswer:"
    assert before.count("<example>") == (2 if task in babi.TASKS else 0)
    assert "[[" not in before + after and "\n\n\n" not in before


def test_every_task_of_babi_has_words_of_its_own() -> None:
    assert set(WORDS) == set(babi.TASKS)
    assert len({instruction for instruction, _ in WORDS.values()}) >= 13


@pytest.mark.parametrize("task", babi.TASKS)
def test_examples_are_true(task: str, tokenizer: Tokenizer) -> None:
    before, _ = Prompts.of("instruction", tokenizer).around(task, "?", tokenizer)
    for example in before.split("<example>\n")[1:]:
        told, answer = example.split("\n</example>")[0].split("\nAnswer: ")
        facts, question = told.split("\nQuestion: ")
        sentences = [f"{part}." for part in facts.rstrip(".").split(". ")]
        assert babi.solve(sentences, question) == answer


def test_chat_style_obeys_the_tokenizers_template(
    chatting: Tokenizer, tokenizer: Tokenizer
) -> None:
    before, after = Prompts.of("chat", chatting).around("qa1", "Where is Mary?", chatting)
    assert before.startswith("<|user|>The text below") and before.endswith("<context>\n")
    assert after == "\n</context>\n\nQuestion: Where is Mary?<|end|><|assistant|>"
    with pytest.raises(ValueError, match="chat template"):
        Prompts.of("chat", tokenizer)


def test_a_file_brings_other_words(
    chatting: Tokenizer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "words.yaml"
    path.write_text(
        "template: '{instruction}|{examples}|{context}|{question}'\n"
        "tasks: {qa1: {instruction: Look for her., examples: none}}\n"
    )
    prompts = Prompts.of(path, tokenizer)
    assert prompts.style == "instruction"
    assert prompts.around("qa1", "Who?", tokenizer) == ("Look for her.|none|", "|Who?\nAnswer:")
    # What the file leaves out stays ours.
    assert prompts.around("qa2", "Who?", tokenizer)[0].startswith("Somewhere in the text")
    assert Prompts.of(path, chatting).style == "chat"
    assert prompts.digest != Prompts.of("instruction", tokenizer).digest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("template: no context", "that holds {context}"),
        ("template: '{question} {context}'", "that holds {context}"),
        ("tasks: {qa1: [1]}", r"tasks\.qa1 must hold texts"),
        ("tasks: {qa1: {instructions: a}}", r"tasks\.qa1 must hold texts"),
        ("prompts: {}", "keys 'template' and 'tasks'"),
        ("{", "is not YAML"),
    ],
)
def test_bad_files_are_refused(
    content: str, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "words.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Prompts.of(path, tokenizer)


@pytest.mark.parametrize("prompt", ["chatty", "missing.yaml"])
def test_unknown_styles_and_missing_files_are_refused(prompt: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="neither one of answer, instruction, chat"):
        Prompts.of(prompt, tokenizer)


class Listening(SolvingModel):
    """Keeps the text it was given, whole."""

    def _answer(self, tokens: list[int]) -> str:
        self.heard = [*getattr(self, "heard", []), self.tokenizer.decode(tokens)]
        return "office"


@pytest.mark.parametrize("prompt", ["instruction", "chat", "answer"])
def test_the_model_is_given_the_whole_prompt_around_every_document(
    prompt: str, chatting: Tokenizer, prose: Haystack
) -> None:
    model = Listening(chatting, segment_length=50)
    kwargs: dict[str, Any] = {"haystack": prose, "progress": False, "batch_size": 2}
    evaluate(model, chatting, ["qa2"], ["0k", 300], 3, prompt=prompt, **kwargs)
    prompts = Prompts.of(prompt, chatting, model.config.question_template)
    assert len(model.heard) == 6
    for text in model.heard:
        before, after = prompts.around("qa2", "@", chatting)
        start, _, end = after.partition("@")
        assert text.startswith(before) and text.endswith(end)
        document, _, question = text[len(before) : len(text) - len(end)].rpartition("Where")
        assert question.startswith(" is the ") and document.startswith(" ")
        assert document.endswith(start)


def test_chat_models_are_asked_not_to_think_aloud(tokenizer: Tokenizer) -> None:
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = CHAT + "{% if enable_thinking is not false %}<think>{% endif %}"
    _, after = Prompts.of("chat", thinking).around("qa1", "Where?", thinking)
    assert after.endswith("<|assistant|>")
