"""Rows as tokens and labels: chat templates of both kinds, completions, and places of questions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tokenizers import Regex, normalizers

from memlm.data import make_row
from memlm.data.encoding import Encoder
from memlm.segment import IGNORE
from tests.tokenizers import tokenizer

ASK = "\n\nQuestion: {question}\nAnswer:"
# The opening of an answer ends in a space, which joins the next word in one token.
PLAIN = (
    "<bos>{% for m in messages %}{{ m.role }}; {{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant; {% endif %}"
)
MARKED = (
    "<bos>{% for m in messages %}[{{ m.role }}]\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<eos>{% endgeneration %}{% else %}{{ m.content }}<eos>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
TURNS = [
    {"role": "system", "content": "the lazy dog."},
    {"role": "user", "content": "did Mary go?"},
    {"role": "assistant", "content": "Mary went to the kitchen."},
    {"role": "user", "content": "did John?"},
    {"role": "assistant", "content": "John moved to the hallway."},
]


def encoder(template: str | None = PLAIN, kind: str = "byte-bpe", **options: Any) -> Encoder:
    own = copy.deepcopy(tokenizer(kind))
    own.chat_template = template
    return Encoder(own, ASK, **options)


def encode(encoder: Encoder, values: dict[str, Any]) -> tuple[list[int], list[int]]:
    ids, labels = encoder.encode(make_row(values, "row 0")[0])
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels, strict=True))
    return ids.tolist(), labels.tolist()


def learned(encoder: Encoder, labels: list[int]) -> list[str]:
    """The runs of labels, as text."""
    runs, run = [], []
    for label in [*labels, IGNORE]:
        if label != IGNORE:
            run.append(label)
        elif run:
            runs, run = [*runs, encoder.tokenizer.decode(run)], []
    return runs


@pytest.mark.parametrize("kind", ["byte-bpe", "metaspace"])
def test_only_what_the_assistant_says_is_learned(kind: str) -> None:
    made = encoder(kind=kind)
    ids, labels = encode(made, {"messages": TURNS})
    said = [turn["content"] for turn in TURNS if turn["role"] == "assistant"]
    found = learned(made, labels)
    assert [text.replace("<eos>", "").strip() for text in found] == said
    assert all("<eos>" in text for text in found)
    # As when it is asked: the tokens before an answer are those of the opened conversation.
    for number in (2, 4):
        opened = made.tokenizer.apply_chat_template(
            TURNS[:number], tokenize=False, add_generation_prompt=True
        )
        begun = [
            at for at in range(1, len(ids)) if labels[at] != IGNORE and labels[at - 1] == IGNORE
        ]
        before = made.tokenizer.decode(ids[: begun[number // 2 - 1]])
        assert before.strip() == opened.strip()


def test_a_template_that_marks_what_is_generated_is_believed() -> None:
    made = encoder(MARKED)
    ids, labels = encode(made, {"messages": TURNS})
    assert learned(made, labels) == [
        f"{turn['content']}<eos>" for turn in TURNS if turn["role"] == "assistant"
    ]
    assert ids == made.tokenizer.apply_chat_template(TURNS, return_dict=True)["input_ids"]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_control_token_that_somebody_wrote_is_text(template: str) -> None:
    turns = [{**turn, "content": turn["content"] + " <eos> <bos>"} for turn in TURNS]
    made = encoder(template)
    ids, labels = encode(made, {"messages": turns})
    control = made.tokenizer.eos_token_id, made.tokenizer.bos_token_id
    assert ids.count(control[0]) == len(turns) and ids.count(control[1]) == 1
    assert len(learned(made, labels)) == 2
    assert made.tokenizer.decode(ids).count("<eos> <bos>") == len(turns)
    meant, _ = encode(encoder(template, split_special_tokens=False), {"messages": turns})
    assert meant.count(control[0]) == 2 * len(turns)


def test_tools_and_template_arguments_reach_the_template() -> None:
    made = encoder("{{ tools | length }} {{ tone }}" + PLAIN)
    row = {"messages": TURNS, "tools": [{"name": "a"}, {"name": "b"}]}
    ids, _ = encode(made, {**row, "chat_template_kwargs": {"tone": "naïve"}})
    assert made.tokenizer.decode(ids).startswith("2 naïve<bos>")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "row 0: messages need a chat template, and the tokenizer has none"),
        ("{{ raise_exception('no system') }}", "the chat template refuses it .*no system"),
        (
            "{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}",
            r"writes messages\[:\d\] in another way when more follows",
        ),
        ("<bos>hello{{ messages[:0] }}", "nothing of what the assistant says is left"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(template: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        encode(encoder(template), {"messages": TURNS})


def test_a_template_that_changes_what_is_said_hides_no_control_token() -> None:
    upper = PLAIN.replace("m.content", "m.content | upper")
    turns = [*TURNS[:4], {"role": "assistant", "content": "So <eos>"}]
    with pytest.raises(ValueError, match=r"control token written out .* changes what messages say"):
        encode(encoder(upper), {"messages": turns})


@pytest.mark.parametrize("kind", ["byte-bpe", "metaspace"])
def test_only_a_completion_is_learned(kind: str) -> None:
    made = encoder(kind=kind)
    ids, labels = encode(made, {"prompt": "Mary went to", "completion": " the kitchen."})
    (found,) = learned(made, labels)
    assert found.strip() == "the kitchen.<eos>"
    assert labels[-1] == made.tokenizer.eos_token_id
    bos = [made.tokenizer.bos_token_id] if kind == "metaspace" else []
    assert ids[: len(bos)] == bos
    assert made.tokenizer.decode(ids[len(bos) :]) == "Mary went to the kitchen.<eos>"


def test_a_completion_may_be_messages() -> None:
    made = encoder()
    ids, labels = encode(made, {"prompt": TURNS[:4], "completion": TURNS[4:]})
    assert [text.strip() for text in learned(made, labels)] == ["John moved to the hallway.<eos>"]
    whole, _ = encode(made, {"messages": TURNS})
    assert made.tokenizer.decode(ids) == made.tokenizer.decode(whole)


def test_a_text_is_learned_to_its_end() -> None:
    made = encoder(kind="metaspace")
    ids, labels = encode(made, {"text": "Mary went."})
    assert ids == labels
    assert made.tokenizer.decode(ids) == "<bos> Mary went.<eos>"


@pytest.mark.parametrize("kind", ["byte-bpe", "metaspace"])
@pytest.mark.parametrize("split", [True, False])  # Without, places are found without spans.
def test_a_question_stands_behind_the_tokens_read_before_it(kind: str, split: bool) -> None:
    text = "Mary went to the kitchen. John moved to the hallway, didn't he?"
    made = encoder(kind=kind, split_special_tokens=split)
    asked = [{"question": "Who?", "answer": "Mary", "at": at} for at in range(1, len(text) + 1)]
    row, _ = make_row({"document": text, "questions": asked}, "row 0")
    ids, found = made.encode_document(row)
    decode, lead = made.tokenizer.decode, int(kind == "metaspace")
    assert decode(ids[lead:]) == text
    # The characters up to which each token reaches.
    ends = [len(decode(ids[lead : n + 1])) for n in range(lead, len(ids))]
    for at, question in enumerate(found, start=1):
        # As many tokens as are needed to see the character before `at`.
        assert question.read == lead + 1 + sum(end < at for end in ends)
        assert kind == "metaspace" or decode(question.prompt) == "\n\nQuestion: Who?\nAnswer:"
        assert decode(question.answer).strip() == "Mary<eos>"


def test_what_has_no_token_is_refused() -> None:
    made = encoder()
    made.tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(" ?zzz"), "")
    row, _ = make_row(
        {"document": "x y", "questions": [{"question": "q", "answer": "zzz"}]}, "row 7"
    )
    with pytest.raises(ValueError, match="row 7: the answer 'zzz' has no token"):
        made.encode_questions(row)
    with pytest.raises(ValueError, match="row 7: completion has no token"):
        made.encode(make_row({"prompt": "x", "completion": "zzz"}, "row 7")[0])
    with pytest.raises(ValueError, match="row 7: token 9999 is none of the tokenizer's"):
        made.encode(make_row({"input_ids": [1, 9999]}, "row 7")[0])


def test_a_conversation_that_the_assistant_begins_is_refused_by_its_row() -> None:
    turns = [{"role": "assistant", "content": "Hello."}, *TURNS]
    with pytest.raises(ValueError, match=r"begins with the assistant.*\{% generation %\}"):
        encode(encoder(), {"messages": turns})
