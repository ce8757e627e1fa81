"""The shipped models: what they are, that they answer, and that the command line knows their names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

import memlm
from memlm.card import SHIPPED
from memlm.cli import main
from memlm.pretrained import available_pretrained, resolve_pretrained

pytestmark = pytest.mark.usefixtures("unpainted")
TALK = (
    "The meeting went on for hours, and the budget was discussed at length before anybody had tea. "
)
STORY = "John moved to the kitchen. Mary went to the garden. John travelled to the office."
names = pytest.mark.parametrize("name", available_pretrained())


@pytest.fixture
def notes(tmp_path) -> Path:
    """A text of a person's own, long enough for several segments, with facts at its beginning."""
    path = tmp_path / "notes.txt"
    path.write_text(f"{STORY} {TALK * 60}", encoding="utf-8")
    return path


def test_a_model_is_shipped() -> None:
    assert "qa1" in available_pretrained()


@names
def test_a_shipped_model_is_small_and_holds_nothing_but_what_loading_needs(name) -> None:
    files = sorted(path.name for path in (SHIPPED / name).iterdir())
    assert files == sorted(
        ["README.md", "config.json", "generation_config.json", "model.safetensors", "recipe.yaml",
         "tokenizer.json", "tokenizer_config.json"]
    )  # fmt: skip
    assert sum(path.stat().st_size for path in (SHIPPED / name).iterdir()) <= 4 * 2**20


@names
def test_the_card_of_a_shipped_model_says_how_it_is_loaded_licensed_and_measured(name) -> None:
    card = ModelCard.load(SHIPPED / name / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "memlm"
    assert f'memlm.load_pretrained("{name}")' in card.text
    assert "Nothing is stored" not in card.text and card.data.eval_results
    assert "/work" not in card.content and "/tmp" not in card.content


@names
def test_a_shipped_model_answers_after_many_segments(name, notes) -> None:
    model, tokenizer = memlm.load_pretrained(name)
    assert not model.training
    stream = memlm.DocumentStream(model, tokenizer)
    stream.write(notes.read_text(encoding="utf-8"))
    assert stream.tokens_seen > 4 * model.segment_length
    assert stream.ask("Where is John?") == "office"
    assert stream.ask("Where is Mary?") == "garden"


@names
def test_a_shipped_model_remembers_a_fact_wherever_a_border_cuts_it(name) -> None:
    """The first layer sees across the border, and did not before: three in four of these were lost."""
    model, tokenizer = memlm.load_pretrained(name)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    talk, fact = ids(f"Mary went to the garden. {TALK * 60}"), ids(" Mary moved to the office.")
    question = torch.tensor([ids(model.config.question_template.format(question="Where is Mary?"))])
    length = model.segment_length
    for cut in range(1, len(fact)):
        told = talk[: 2 * length - cut] + fact + talk[2 * length : 3 * length + cut - len(fact)]
        assert len(told) == 3 * length
        with torch.no_grad():
            state = model(torch.tensor([told])).memory_state
            said = model(question, memory_state=state).logits[0, -1].argmax()
        assert tokenizer.decode(said).strip() == "office", cut


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'qa99'.*qa1"):
        memlm.load_pretrained("qa99")


def test_the_command_line_takes_the_name_for_a_model(notes, tmp_path, capsys) -> None:
    assert main(["ask", "qa1", str(notes), "-q", "Where is John?"]) == 0
    assert "Where is John?\n  office\n" in capsys.readouterr().out
    out = tmp_path / "eval"
    asked = ["--tasks", "qa1", "--lengths", "1k", "--samples", "4", "--out", str(out)]
    assert main(["eval", "qa1", *asked, "--haystack", str(notes)]) == 0
    assert (out / "summary.json").is_file()


def test_a_folder_of_that_name_is_preferred(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qa1").mkdir()
    assert resolve_pretrained("qa1") == str(SHIPPED / "qa1")
    shutil.copy(SHIPPED / "qa1" / "config.json", tmp_path / "qa1")
    assert resolve_pretrained("qa1") == "qa1"
    assert resolve_pretrained("gpt2") == "gpt2"


def test_a_name_that_is_nothing_is_refused_with_the_shipped_ones(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["eval", "qa99", "--out", "x"]) == 2
    told = capsys.readouterr().err
    assert "qa99" in told and "shipped with memlm; these are qa1" in told


def test_the_demo_asks_a_shipped_model_about_ones_own_file(notes, capsys) -> None:
    asked = ["--ask", str(notes), "-q", "Where is John?", "-q", "Where is Mary?"]
    assert main(["demo", "--pretrained", "--quick", *asked]) == 0
    told = capsys.readouterr().out
    assert "Where is John?  -> office\n" in told and "Where is Mary?  -> garden\n" in told
    assert "A document of 16,384 tokens" in told
    right = [line for line in told.splitlines() if "(right:" in line]
    assert right and all(
        line.split("-> ")[1].split()[0] in line.split("(right: ")[1] for line in right
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [(["--out", "x"], "leave --out out"), (["--ask", "x"], "belong together")],
)  # fmt: skip
def test_what_the_demo_cannot_do_with_a_shipped_model_is_refused(words, told, capsys) -> None:
    assert main(["demo", "--pretrained", "qa1", *words]) == 2
    assert told in capsys.readouterr().err
    assert main(["demo", "--pretrained", "qa99"]) == 2
    assert "qa1" in capsys.readouterr().err
