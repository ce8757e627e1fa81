"""One's own questions about one's own documents: read once, asked where they stand, scored as SQuAD's."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from memlm import DocumentStream, MemLMForCausalLM
from memlm.cli import main
from memlm.eval import Report, evaluate
from memlm.eval.metrics import normalised_match, token_f1
from memlm.eval.reporting.report import load_rows
from memlm.eval.reporting.runs import Run
from memlm.eval.running.own import QUESTIONS, OwnQuestions, are_own_questions
from memlm.memory import TOVAConfig
from memlm.tasks.asking import encode_answer
from memlm.tasks.lengths import parse_length
from tests.cases import FAMILIES, SEGMENT, base_model, randomise
from tests.eval.fake import SolvingModel
from tests.tokenizers import tokenizer

pytestmark = pytest.mark.usefixtures("unpainted")
NOISE = "It rained all day and nobody said much. "
FIRST = f"John moved to the kitchen. {NOISE * 20}Mary went to the garden. {NOISE * 20}"
LATER = f"Sandra moved to the office. {NOISE * 4}"


def asked(question: str, answer: str, at: int | None = None) -> dict[str, object]:
    return {"question": question, "answer": answer} | ({} if at is None else {"at": at})


ROWS = [
    {
        "document": FIRST,
        "questions": [
            asked("Where is Mary?", "garden"),
            asked("Where is John?", "The Kitchen."),
            asked("Where is John?", "kitchen", at=len(FIRST) // 3),
        ],
    },
    {
        "document": f"{LATER}John moved to the hallway. {NOISE}",
        "questions": [asked("Where is Sandra?", "office"), asked("Where is John?", "garden")],
    },
]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "mine.jsonl", ROWS)


@pytest.fixture
def words():
    return tokenizer("byte-bpe")


def test_every_question_is_asked_where_it_stands_and_scored(data, words, tmp_path) -> None:
    model = SolvingModel(words)
    report = evaluate(model, words, data=data, out=tmp_path / "out", progress=False)
    rows = {(row["question"], row["target"]): row for row in load_rows(tmp_path / "out")}
    assert len(load_rows(tmp_path / "out")) == 5
    # The last answer in the file is wrong.
    wrong = rows.pop(("Where is John?", "garden"))
    assert (wrong["output"], wrong["correct"], wrong["f1"]) == ("hallway", False, 0.0)
    assert all(row["correct"] and row["f1"] == 1.0 for row in rows.values())
    # Case, a full stop and an article are no mistake; to the letter they are.
    loose = rows["Where is John?", "The Kitchen."]
    assert loose["correct"] and not loose["exact"]
    short = rows["Where is John?", "kitchen"]
    assert short["tokens"] < 0.4 * rows["Where is Mary?", "garden"]["tokens"]
    # The answer was said at the document's beginning, or in its middle.
    assert short["fact_offsets"][0] < 20 and len(short["supporting"]) == 1
    middle = rows["Where is Mary?", "garden"]
    assert 0.4 < middle["fact_offsets"][0] / middle["tokens"] < 0.6
    assert sum(cell.samples for cell in report.cells) == 5
    for row in load_rows(tmp_path / "out"):
        length = parse_length(row["length"])
        assert length == 256 or length / 2 < row["tokens"] <= length
    assert sum(cell.correct for cell in report.cells) == 4
    assert sum(cell.f1 for cell in report.cells) == pytest.approx(4.0)
    assert Report.load(tmp_path / "out").cells == report.cells
    assert "mean token F1, percent:" in report.to_markdown()
    (command,) = Run.load("out", tmp_path / "out").commands
    assert f"--data {data}" in command and "--samples 5" in command and "--tasks" not in command


def test_a_document_is_read_once_for_all_questions_at_one_place(words, tmp_path) -> None:
    """Two documents in one batch, with questions about each in turn."""
    rows = []
    for places in (("garden", "kitchen"), ("office", "hallway")):
        document = FIRST.replace("garden", places[0]).replace("kitchen", places[1])
        people = zip(("Mary", "John"), places, strict=True)
        questions = [asked(f"Where is {name}?", place) for name, place in people]
        rows.append({"document": document, "questions": questions * 2})
    data = write(tmp_path / "mine.jsonl", rows)
    model = SolvingModel(words)
    report = evaluate(model, words, data=data, progress=False)
    assert [cell.correct for cell in report.cells] == [8]
    assert {rows for rows, _ in model.batches} == {2}
    # The question comes first there, so that there is no common text.
    model = SolvingModel(words)
    evaluate(model, words, data=data, baseline="question-first", progress=False)
    assert {rows for rows, _ in model.batches} == {8}


def test_a_question_knows_nothing_of_what_is_read_after_it(words, tmp_path) -> None:
    """Two questions about one document, close together: what lies between them counts for one."""
    document = f"{NOISE * 20}John moved to the kitchen. John moved to the hallway."
    questions = [
        asked("Where is John?", "hallway"),
        asked("Where is John?", "kitchen", at=document.index("John moved to the hallway")),
    ]
    data = write(tmp_path / "mine.jsonl", [{"document": document, "questions": questions}])
    report = evaluate(SolvingModel(words), words, data=data, progress=False)
    assert [cell.correct for cell in report.cells] == [2]


def test_later_documents_are_asked_about_earlier_ones(words, tmp_path) -> None:
    parts = [
        {"document": LATER, "questions": []},
        {"document": FIRST, "questions": [asked("Where is Sandra?", "office")]},
    ]
    data = write(tmp_path / "mine.jsonl", [{"documents": parts}])
    report = evaluate(SolvingModel(words), words, data=data, progress=False)
    assert report.cells[0].correct == 1


def test_a_run_goes_on_where_it_was_broken_off(data, words, tmp_path) -> None:
    whole = evaluate(SolvingModel(words), words, data=data, progress=False, batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        evaluate(
            SolvingModel(words, fail_at=45), words, data=data, out=tmp_path / "out",
            progress=False, batch_size=1,
        )  # fmt: skip
    begun = load_rows(tmp_path / "out")
    assert 0 < len(begun) < 5
    model = SolvingModel(words)
    again = evaluate(model, words, data=data, out=tmp_path / "out", progress=False, batch_size=1)
    assert load_rows(tmp_path / "out")[: len(begun)] == begun
    assert [(c.length, c.correct) for c in again.cells] == [
        (c.length, c.correct) for c in whole.cells
    ]
    # Another document is another run.
    write(data, [{**ROWS[0], "document": "Nothing. " + FIRST}])
    with pytest.raises(ValueError, match="data_digest"):
        evaluate(model, words, data=data, out=tmp_path / "out", progress=False)


def test_a_table_is_asked_as_lines_are(data, words, tmp_path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = tmp_path / "table" / "mine.parquet"
    table.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), table)
    found = [
        [
            (cell.length, cell.samples, cell.correct, cell.tokens)
            for cell in evaluate(SolvingModel(words), words, data=source, progress=False).cells
        ]
        for source in (data, table, table.parent)
    ]
    assert found[0] == found[1] == found[2] and found[0]


def test_a_data_set_in_the_published_layout_is_none(data, tmp_path) -> None:
    assert are_own_questions(data) and are_own_questions("hub:somebody/questions")
    assert not are_own_questions("RMT-team/babilong") and not are_own_questions(None)
    published = tmp_path / "published"
    (published / "data" / "qa1").mkdir(parents=True)
    (published / "data" / "qa1" / "4k.json").write_text("[]", encoding="utf-8")
    # `memlm data` leaves its settings beside the samples.
    (published / "memlm.json").write_text("{}", encoding="utf-8")
    assert not are_own_questions(published)


def test_the_first_questions_of_a_file_can_be_chosen(data, words, tmp_path) -> None:
    report = evaluate(SolvingModel(words), words, data=data, samples=2, progress=False)
    assert sum(cell.samples for cell in report.cells) == 2


def test_answers_are_those_of_a_stream(data, tmp_path) -> None:
    """A session reads the text in another way, and is asked by other code."""
    torch.manual_seed(0)
    tok = tokenizer("metaspace")
    config = LlamaConfig(**{**FAMILIES["llama"], "vocab_size": len(tok)})
    model = MemLMForCausalLM.from_base(config, memory="armt", segment_length=48).eval()
    randomise(model)
    out = tmp_path / "out"
    evaluate(model, tok, data=data, out=out, max_new_tokens=6, batch_size=4, progress=False)
    expected = {}
    for row in ROWS:
        for question in row["questions"]:
            stream = DocumentStream(model, tok)
            stream.write(row["document"][: question.get("at")])
            said = stream.ask(question["question"], max_new_tokens=6)
            expected[question["question"], question["answer"]] = (str(said), stream.tokens_seen)
    assert len(set(expected.values())) >= 3
    leading = 1
    rows = load_rows(out)
    assert len(rows) == len(expected)
    for row in rows:
        # An answer may take more tokens than allowed where a right one does.
        said, seen = expected[row["question"], row["target"]]
        assert row["output"][: len(said)] == said and row["tokens"] + leading == seen


def test_the_command_line_asks_own_questions(data, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["eval", "qa1", "--data", str(data), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "| questions |" in told and "mean token F1" in told
    saved = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert saved["f1"]["questions"] and (out / "accuracy.png").is_file()


@pytest.mark.parametrize(
    ("row", "arguments", "told"),
    [
        (ROWS[0], {"tasks": ["qa1"]}, r"tasks=\['qa1'\] choose samples of BABILong"),
        (ROWS[0], {"haystack": "installed"}, "haystack='installed' says how samples are composed"),
        ({"text": "Some text."}, {}, "is a TextRow; to ask questions"),
        ({"input": "a", "question": "b", "target": "c"}, {}, "give a row the columns|give"),
        ({"document": "Text.", "questions": []}, {}, "questions is empty"),
        (ROWS[0], {"samples": 0}, "samples=0"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(row, arguments, told, words, tmp_path) -> None:
    data = write(tmp_path / "mine.jsonl", [row])
    with pytest.raises(ValueError, match=told):
        evaluate(SolvingModel(words), words, data=data, progress=False, **arguments)


# From SQuAD's evaluation: words shared, over words said and words wanted.
@pytest.mark.parametrize(
    ("output", "target", "exact", "f1"),
    [
        ("The cat", "cat", True, 1.0),
        ("the cat sat", "cat", False, 2 / 3),
        ("Saint Bernadette Soubirous", "St. Bernadette", False, 0.4),
        ("dog dog", "dog", False, 2 / 3),
        ("a dog, a dog", "dog dog", True, 1.0),
        ("mouse", "cat", False, 0.0),
        ("", "cat", False, 0.0),
        # SQuAD would leave nothing of these targets, and call nothing right.
        ("the", "a", False, 0.0),
        ("", "A", False, 0.0),
        ("a.", "A", True, 1.0),
        ("", "?", False, 0.0),
        ("?", "?", True, 1.0),
        ("the", "", True, 1.0),
        ("cat", "", False, 0.0),
        ("don't", "dont", True, 1.0),
        ("theatre", "atre", False, 0.0),
    ],
)
def test_answers_are_scored_as_squads(output, target, exact, f1) -> None:
    assert normalised_match(output, target) is exact
    assert token_f1(output, target) == pytest.approx(f1)


def test_a_run_goes_on_with_the_memory_and_the_asking_it_began_with(data, words, tmp_path) -> None:
    """Memories without parameters are told apart, and so is where a question stands."""
    base = base_model("llama", vocab_size=len(words)).float()
    out = tmp_path / "out"

    def run(memory: object, segment: str = "open") -> None:
        model = MemLMForCausalLM.from_base(copy.deepcopy(base), memory, SEGMENT)
        model.config.question_segment = segment
        evaluate(model, words, data=data, out=out, progress=False, max_new_tokens=2)

    run(TOVAConfig(memory_length=4))
    run(TOVAConfig(memory_length=4))
    for memory in (None, TOVAConfig(memory_length=5), "transformer-xl"):
        with pytest.raises(ValueError, match="model"):
            run(memory)
    with pytest.raises(ValueError, match="question_segment=own"):
        run(TOVAConfig(memory_length=4), "own")


def test_an_answer_may_be_as_long_as_the_answer_that_is_right(words, tmp_path) -> None:
    said = f"one {words.eos_token} two {words.eos_token} three"
    row = {"document": "Text.", "questions": [asked("Which?", said)]}
    source = OwnQuestions(write(tmp_path / "a.jsonl", [row]), words)
    assert source.task(QUESTIONS).answer_tokens == len(encode_answer(words, said))
