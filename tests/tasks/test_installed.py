"""The haystack "installed": what other packages carry of text, read and never imported."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from memlm.eval import evaluate
from memlm.tasks.haystack import Haystack, installed
from memlm.tasks.haystack.cache import identity
from tests.eval.fake import SolvingModel


@pytest.fixture(autouse=True)
def few_packages(monkeypatch: Any) -> None:
    """All of them take half a minute."""
    monkeypatch.setattr(installed, "PACKAGES", ["einops", "packaging", "no-such-package", "tqdm"])
    monkeypatch.setattr(installed, "HELD_OUT", ("tqdm",))


@pytest.fixture
def mpmath(monkeypatch: Any) -> None:
    """A package with much of everything, that nothing here imports."""
    monkeypatch.setattr(installed, "PACKAGES", ["einops", "mpmath", "tqdm"])


def test_packages_are_held_out_whole() -> None:
    assert {name.split("/")[0] for name, _ in installed.installed_texts("eval")} == {"tqdm"}
    train = dict(installed.installed_texts("train"))
    assert {name.split("/")[0] for name in train} == {"einops", "packaging"}
    assert {name.split("/")[1] for name in train} == {"docs", "code", "text"}
    assert list(train) == [name for name, _ in installed.installed_texts("train")]
    assert not any("test" in name for name in train if "/docs/" in name)


@pytest.mark.usefixtures("mpmath")
def test_nothing_is_imported() -> None:
    before = {name for name in sys.modules if name.startswith("mpmath")}
    haystack = Haystack.open("installed", "train")
    assert {name for name in sys.modules if name.startswith("mpmath")} == before
    words = sum(s.count(" ") + 1 for d in haystack.documents for s in d.sentences)
    assert words > 20_000
    held_out = Haystack.open("installed", "eval")
    shared = {d.name for d in haystack.documents} & {d.name for d in held_out.documents}
    assert not shared


def test_docstrings_of_what_does_not_parse_are_none() -> None:
    source = '"""Of\n    a module."""\nclass A:\n    def f(self):\n        """Of f."""\n'
    assert list(installed.docstrings(source)) == ["Of\na module.", "Of f."]
    assert list(installed.docstrings("def f(:")) == []


@pytest.mark.usefixtures("mpmath")
def test_no_package_outweighs_the_others(monkeypatch: Any) -> None:
    monkeypatch.setattr(installed, "DOCSTRINGS", 5_000)
    monkeypatch.setattr(installed, "CODE", 700)
    sizes: dict[tuple[str, str], int] = {}
    for name, text in installed.installed_texts("all"):
        package, kind, _ = name.split("/", 2)
        sizes[package, kind] = sizes.get((package, kind), 0) + len(text)
    assert sizes["mpmath", "docs"] == 5_000 and sizes["mpmath", "code"] == 700


@pytest.mark.parametrize("source", ["installed", "made+installed"])
def test_a_run_records_what_it_was_taken_from(tokenizer: Any, tmp_path: Path, source: str) -> None:
    expected = {"package": "tqdm", "version": version("tqdm")}
    (found,) = installed.manifest("eval")
    assert expected.items() <= found.items() and len(found["sha256"]) == 64
    assert identity("installed") == {"installed": installed.manifest()}
    model = SolvingModel(tokenizer)
    evaluate(model, tokenizer, ["qa1"], [300], 1, haystack=source, out=tmp_path, progress=False)
    settings = json.loads((tmp_path / "summary.json").read_text())["settings"]
    assert settings["haystack"] == source and settings["haystack_manifest"] == [found]
