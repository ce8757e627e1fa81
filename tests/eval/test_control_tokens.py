"""Control tokens written out in what is evaluated are text; those of a prompt's template are not."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from memlm.eval import evaluate
from memlm.eval.losses.texts import choose_texts
from memlm.eval.running.prompts import Prompts
from memlm.tasks.babi.story import Story
from memlm.tasks.babilong import compose, encode_question
from memlm.tasks.haystack import Document, Haystack
from memlm.tokens import encode_parts
from tests.eval.running.test_prompts import CHAT, Listening
from tests.stories import PROSE

Tokenizer = PreTrainedTokenizerFast


@pytest.fixture
def marked() -> Haystack:
    """Prose in which every sentence names the end token."""
    sentences = [text.replace(" the ", " <eos> the ", 1) for text in PROSE * 5]
    assert all("<eos>" in text for text in sentences if " the " in text)
    return Haystack("marked", [Document("marked", sentences)])


@pytest.fixture
def chatting(tokenizer: Tokenizer) -> Tokenizer:
    ours = copy.deepcopy(tokenizer)
    ours.chat_template = CHAT.replace("<|end|>", "<eos>")
    return ours


def test_a_haystack_holds_no_control_token(tokenizer: Tokenizer, marked: Haystack) -> None:
    made = marked.tokenized(tokenizer)
    assert tokenizer.eos_token_id not in made.ids
    assert tokenizer.decode(made.ids) == "".join(f" {text}" for text in made.texts)
    story = Story(["Mary said <eos>."], "Who said <eos>?", "Mary", [0], "qa1")
    sample = compose(story, made, 301, tokenizer, 0)
    ids = np.concatenate(list(sample.ids()))
    assert len(ids) == 301 and tokenizer.eos_token_id not in ids
    # The last sentence is cut at a token, in its text as in its ids.
    assert tokenizer.decode(ids) == sample.text()
    assert tokenizer.eos_token_id not in sample.question_ids()
    template = "<eos>{question}"
    assert list(sample.question_ids(template)).count(tokenizer.eos_token_id) == 1
    assert np.array_equal(
        sample.question_ids(template), encode_question(tokenizer, story.question, template)
    )


def test_perplexity_measures_text_alone(tokenizer: Tokenizer, marked: Haystack) -> None:
    (text,) = choose_texts(marked, tokenizer, 200, 1, seed=0)
    assert tokenizer.eos_token_id not in text.ids
    said = tokenizer.decode(text.ids)
    assert "<eos>" in said and text.sizes.sum() == len(said.encode())


def test_only_the_chat_template_brings_control_tokens(chatting: Tokenizer) -> None:
    prompts = Prompts.of("chat", chatting)
    end = chatting.eos_token_id
    counts = []
    for question in ("Where is Mary?", "Where is <eos>?"):
        before, after = prompts.parts("qa1", question, chatting)
        assert prompts.around("qa1", question, chatting)[1] == "".join(text for text, _ in after)
        ids = encode_parts(chatting, after)
        assert chatting.decode(ids) == "".join(text for text, _ in after)
        counts.append(ids.count(end))
    assert counts == [1, 1] and before


@pytest.mark.parametrize("retrieval", [None, 2])
def test_a_model_under_evaluation_meets_no_control_token_in_a_document(
    chatting: Tokenizer, marked: Haystack, retrieval: int | None
) -> None:
    class Counting(Listening):
        def _answer(self, tokens: list[int]) -> str:
            self.ends = [*getattr(self, "ends", []), tokens.count(chatting.eos_token_id)]
            return super()._answer(tokens)

    model = Counting(chatting, segment_length=50)
    kwargs: dict[str, Any] = {"haystack": marked, "progress": False, "batch_size": 2}
    evaluate(model, chatting, ["qa1"], [300], 2, prompt="chat", retrieval=retrieval, **kwargs)
    assert all(text.count("<eos>") > 3 for text in model.heard)
    assert model.ends == [1, 1]
