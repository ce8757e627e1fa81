"""A small byte-level tokenizer, a small haystack, and where the shared data may lie."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memlm.tasks import babi
from memlm.tasks.haystack import Haystack, TokenHaystack

PROSE = (
    "The old harbour was quiet when the boats came home, and nobody spoke of the storm.",
    "A lamp burned in the window of the mill until the last cart had crossed the bridge.",
    "She counted the coins twice, put them into a tin box and locked the door behind her.",
    "Rain had fallen for nine days, so the road to the north was no longer to be trusted.",
    "He wrote a long letter about the price of wool, which his brother never answered.",
    "In the morning the children found a blue feather on the stairs and began to argue.",
    "The clerk read the list aloud, slowly, as though every name on it were a small debt.",
    "Behind the orchard there was a wall of grey stones that the goats liked to climb.",
)


def find_shared(name: str) -> Path | None:
    """Return a folder or file of the shared data; None where it is not at hand."""
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    root = Path(os.environ.get("MEMLM_SHARED_DATA", beside))
    return root / name if (root / name).exists() else None


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The picture of every run is only noted, and others are composed but not painted.

    Both take longer than the small runs they are of. For files that write many of them (`pytestmark`). A
    test that asks for `painted` as well gets them painted, and tests/eval/reporting paints every kind.
    """
    if "painted" in request.fixturenames:
        return
    from matplotlib.figure import Figure

    def savefig(figure: Figure, path: str | Path, **options: object) -> None:
        note(figure, path)

    def note(_: object, path: str | Path) -> None:
        Path(path).write_bytes(b"\x89PNG unpainted")

    monkeypatch.setattr("memlm.eval.reporting.plots.plot_heat_map", note)
    monkeypatch.setattr("memlm.eval.losses.report.plot_perplexity", note)
    monkeypatch.setattr(Figure, "savefig", savefig)


@pytest.fixture
def painted() -> None:
    """For a test of the pictures themselves in a file whose others leave them unpainted."""


@pytest.fixture(scope="session")
def original_stories() -> Path:
    folder = find_shared("babi")
    if folder is None:
        pytest.skip("the original bAbI files are not at hand; set MEMLM_SHARED_DATA")
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    told = (
        fact
        for task in babi.TASKS
        for story in itertools.islice(babi.generate(task, 0), 100)
        for fact in [*story.facts, story.question]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*PROSE, *(f" {text}" for text in told)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.fixture(scope="session")
def prose_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty files of prose, each naming itself, so that documents can be told apart."""
    folder = tmp_path_factory.mktemp("prose")
    for number in range(30):
        order = [PROSE[(number + i * (1 + number % 5)) % len(PROSE)] for i in range(25)]
        lines = [f"Chapter {number} says that {text[0].lower()}{text[1:]}" for text in order]
        (folder / f"chapter-{number:02}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def prose(prose_folder: Path) -> Haystack:
    return Haystack.open(prose_folder, split="all")


@pytest.fixture(scope="session")
def noise(prose: Haystack, tokenizer: PreTrainedTokenizerFast) -> TokenHaystack:
    return prose.tokenized(tokenizer)
