"""Composition "published" against the published code's rules, transcribed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from memlm.eval import evaluate
from memlm.eval.running.samples import Composed
from memlm.tasks import babi, babilong
from memlm.tasks.babilong import Composition, composition_of
from memlm.tasks.haystack import Document, Haystack, TokenHaystack
from tests.eval.fake import SolvingModel

# message_lengths of data/create_tasks.py, and what its tables call them.
MESSAGES = {"1k": 1_000, "4k": 4_000, "128k": 128_000, "512k": 512_000, "1M": 1_000_000}


def published_room(name: str) -> int:
    """create_tasks.py: `message_lengths = [ml - 300 for ml in message_lengths]`."""
    return MESSAGES[name] - 300


def published_fits(facts: int, message: int) -> bool:
    """create_tasks.py: `max_n_facts = message_length // 8`; get_dataset_df keeps a story of at most so
    many rows, of which the question is one, and never counts tokens."""
    return facts + 1 <= message // 8


def published_sentences(text: str, at: int, sample_size: int) -> list[str]:
    """SentenceSampler.sample_sentences_ with shuffle: a window of the text without its first and last
    sentence. These texts' sentences end at full stops alone, so that Punkt would cut them alike."""
    text = text[at:]
    text = text[: sample_size * 10]
    return [s for s in re.split(r"(?<=\.) ", text) if s.strip()][1:-1]


class Chosen:
    """Draws one document, and one place in it."""

    def __init__(self, document: int, share: float) -> None:
        self.document, self.share = document, share

    def integers(self, low: int, high: int, count: int) -> NDArray[np.int64]:
        return np.full(count, self.document)

    def random(self, count: int) -> NDArray[np.float64]:
        return np.full(count, self.share)


@pytest.mark.parametrize("sample_size", [9, 20, 31, 200])
def test_noise_is_cut_as_the_published_sampler_cuts_it(
    sample_size: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    books = [
        ["Rain fell on the northern road.", "Nobody came.", "A lamp burned in the old mill."],
        [f"Line {n} tells of {'very ' * (n % 4)}old clocks and b\u00fctter." for n in range(9)],
    ]
    documents = [Document(str(n), book) for n, book in enumerate(books)]
    noise = TokenHaystack(documents, tokenizer, "books", min_tokens=1)
    for number, book in enumerate(books):
        text = " ".join(book)
        for at in range(len(text)):
            wanted = published_sentences(text, at, sample_size)
            chosen: Any = Chosen(number, (at + 0.5) / len(text))
            firsts, ends = noise._within(
                noise.first_sentence[[number]],
                noise.first_sentence[[number + 1]],
                chosen.random(1),
                10 * sample_size,
            )
            found = [noise.texts[n] for a, b in zip(firsts, ends, strict=True) for n in range(a, b)]
            assert found == wanted, (number, at)


def test_published_noise_comes_in_stretches_of_ten_characters_a_token(
    noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast
) -> None:
    rng = np.random.default_rng(0)
    for budget in (30, 100, 400):
        firsts, ends = noise.runs(budget, rng, 10 * budget)
        assert (ends > firsts).all()
        widths = noise.characters[ends] - noise.characters[firsts]
        assert widths.max() <= 10 * budget
        # Neither the first sentence of a document nor its last is ever whole in a window.
        assert not set(firsts) & set(noise.first_sentence[:-1])
        assert not set(ends) & set(noise.first_sentence[1:])
    # No sentence is as short as this window: it grows, where the published sampler never ended.
    firsts, ends = noise.runs(1, rng, 10)
    assert (ends > firsts).all()


@pytest.mark.parametrize("length", ["1k", "4k"])
def test_published_samples_have_the_published_length(
    length: str, noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast
) -> None:
    rules = composition_of("published")
    for name in MESSAGES:
        assert rules.room(babilong.parse_length(name)) == published_room(name)
    for seed in range(5):
        story = next(babi.generate("qa2", seed))
        sample = babilong.compose(story, noise, length, tokenizer, seed, composition="published")
        ids = np.concatenate(list(sample.ids()))
        assert len(ids) == sample.tokens == published_room(length)
        assert sample.text() == tokenizer.decode(ids)
    bare = babilong.compose(story, noise, "0k", tokenizer, 0, composition="published")
    assert bare.text() == "".join(f" {fact}" for fact in story.facts)


def test_published_stories_have_at_most_an_eighth_of_rows_whatever_their_tokens(
    noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast
) -> None:
    message = published_room("1k")
    long = "Daniel went back to the bathroom after a very long and tiring walk around the garden."
    for facts in (message // 8 - 2, message // 8 - 1, message // 8):
        story = babi.Story([long] * facts, "Where is Daniel?", "bathroom", [0], "qa1")
        fits = babilong.facts_fit(story, noise, 1024, composition="published")
        assert fits == published_fits(facts, message)
    # More tokens than room: told without noise, as the published composer does.
    story = replace(story, facts=[long] * 80)
    sample = babilong.compose(story, noise, "1k", tokenizer, 0, composition="published")
    assert sample.tokens == sum(len(noise.encode(f" {long}")) for _ in range(80)) > message
    assert sample.text() == f" {long}" * 80


@pytest.mark.parametrize(
    ("rules", "room"),
    [(Composition(reserve=300), 400), (Composition(share=0.06), 700), ("published", 400)],
)
def test_an_evaluation_draws_stories_that_its_composition_can_place(
    rules: Any, room: int, noise: TokenHaystack, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = Composed("generated", noise, tokenizer, 0, composition=rules)
    told = []
    for index in range(40):
        sample = source.get("qa3", 700, index)
        facts = len(sample.story.facts)
        assert sample.tokens == max(room, sample.tokens if rules == "published" else 0)
        share = composition_of(rules).share
        assert share == 1 or facts + 1 <= int(room * share)
        told.append(facts)
    assert len(set(told)) > 3


def test_a_published_run_says_so_and_is_gone_on_with_as_such_alone(
    prose: Haystack, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def run(**kwargs: Any) -> Any:
        given = {"tasks": ["qa1"], "lengths": ["1k"], "samples": 3, "haystack": prose}
        model = SolvingModel(tokenizer)
        return evaluate(model, tokenizer, **{**given, "progress": False, **kwargs})

    report = run(composition="published", out=tmp_path)
    assert report.accuracy == {"qa1": {"1k": 1.0}} and report.cells[0].tokens == 3 * 700
    for name in ("run.json", "summary.json"):
        saved = json.loads((tmp_path / name).read_text())
        assert saved.get("settings", saved)["composition"] == "published"
    run(composition="published", out=tmp_path, samples=4)
    with pytest.raises(ValueError, match="composition='published', this one has 'exact'"):
        run(out=tmp_path)
    for changed, message in (
        ({"position": (0.0, 0.5)}, r"position=\(0.0, 0.5\) places facts where the published"),
        ({"distance": 9}, "distance=9 places facts"),
        ({"tasks": ["passkey"]}, "'passkey' is none"),
        ({"lengths": [300]}, "reserve=300 must be at least 0 and below length 300"),
        ({"composition": "publisht"}, "composition='publisht' is unknown; use one of exact, publ"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**{"composition": "published", **changed})


def test_data_are_written_by_the_published_rules(tmp_path: Path) -> None:
    source = tmp_path / "noise.txt"
    lines = (f"Paragraph {n} of a book tells of rain, of bread, and of clocks." for n in range(400))
    source.write_text("\n\n".join(lines))
    given: Any = {"samples": 4, "haystack": source}
    published: Any = {"composition": "published", **given}
    babilong.write(tmp_path / "out", ["qa1"], ["0k", "1k"], **published)
    for record in babilong.load(tmp_path / "out", "qa1", "1k"):
        assert len(re.findall(r"\w+|[^\w\s]+", record["input"])) == 700
    entry = json.loads((tmp_path / "out" / "memlm.json").read_text())["files"]["data/qa1/1k.json"]
    said = entry["settings"]
    assert (said["composition"], said["reserve"], said["share"]) == ("published", 300, 0.125)
    assert "composition: published" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match="composition='published', not 'exact'"):
        babilong.write(tmp_path / "out", ["qa1"], ["1k"], **given)
    with pytest.raises(ValueError, match="reserve=9 given beside composition='published'"):
        babilong.write(tmp_path / "other", ["qa1"], ["1k"], reserve=9, **published)
    # What version 0.1 wrote says nothing of a composition, and is gone on with as before.
    babilong.write(tmp_path / "old", ["qa1"], ["1k"], **given)
    path = tmp_path / "old" / "memlm.json"
    entries = json.loads(path.read_text())
    del entries["files"]["data/qa1/1k.json"]["settings"]["composition"]
    path.write_text(json.dumps(entries))
    babilong.write(tmp_path / "old", ["qa1"], ["1k"], **given)
