"""The ids of a question, and of the answer that is learned after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from memlm.templates import BABILONG_ANSWER_TEMPLATE, BABILONG_QUESTION_TEMPLATE
from memlm.tokens import encode_parts, encode_texts, fill

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_question(
    tokenizer: PreTrainedTokenizerBase, question: str, template: str = BABILONG_QUESTION_TEMPLATE
) -> NDArray[np.int32]:
    """Return the ids that follow the context and ask the question, (Q,)."""
    return np.array(encode_parts(tokenizer, fill(template, question=question)), dtype=np.int32)


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str) -> NDArray[np.int32]:
    """Return the ids of the answer and the end token, (A,)."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token; set tokenizer.eos_token")
    text = BABILONG_ANSWER_TEMPLATE.format(answer=answer)
    return np.array([*encode_texts(tokenizer, [text])[0], tokenizer.eos_token_id], dtype=np.int32)
