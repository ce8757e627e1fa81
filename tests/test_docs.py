"""What is written by hand stays true: lists of mechanisms, layering, names in the wrong place."""

from __future__ import annotations

import re
from pathlib import Path

from memlm.memory import available_memories, memory_class
from memlm.memory.parts.titans import Titans
from tests.cases import CASES

ROOT = Path(__file__).parent.parent
MECHANISMS = {name for name in available_memories() if name != "none"}


def test_files_cases_and_methods_table_name_the_same_mechanisms() -> None:
    text = (ROOT / "docs/methods.md").read_text()
    table = re.findall(r"^\| \[`([\w-]+)`\]\(methods/\1\.md\) \|", text, re.MULTILINE)
    assert set(table) == MECHANISMS == set(CASES)
    assert {path.stem for path in (ROOT / "docs/methods").glob("*.md")} == MECHANISMS


def test_the_readme_names_every_mechanism() -> None:
    row = r"^\| `([\w-]+)` \|.*\[page\]\(docs/methods/\1\.md\) \|$"
    assert re.findall(row, (ROOT / "README.md").read_text(), re.MULTILINE) == sorted(MECHANISMS)


def test_the_frame_has_a_row_for_every_mechanism() -> None:
    text = (ROOT / "docs/regression.md").read_text()
    cells = re.findall(r"^\| ((?:`[\w-]+`(?:, )?)+) \|", text, re.MULTILINE)
    assert sorted(re.findall(r"`([\w-]+)`", " ".join(cells))) == sorted(MECHANISMS)


def test_generation_says_how_every_mechanism_goes_on() -> None:
    text = (ROOT / "docs/generation.md").read_text()
    for name in MECHANISMS:
        continues = memory_class(name).continues
        # Of some it depends on the options.
        how = r"\w+" if isinstance(continues, property) else continues.how
        assert re.search(rf'^\| `"{how}"` \|.*[ ,]{name}(?=[,; ])', text, re.MULTILINE), name


def test_links_of_the_documentation_lead_somewhere() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            if not re.match(r"\w+:", target):
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_pages_name_every_option() -> None:
    from dataclasses import fields

    for name in MECHANISMS:
        page = (ROOT / f"docs/methods/{name}.md").read_text()
        if issubclass(memory_class(name), Titans):
            # What all memories whose weights are their state have is said there.
            page += (ROOT / "docs/methods/titans-mac.md").read_text()
        if "../lasting.md" in page:
            # What all memories with gates have is said there.
            page += (ROOT / "docs/lasting.md").read_text()
        for field in fields(memory_class(name).Config):
            if field.name != "layers" or memory_class(name).site != "model":
                assert f"`{field.name}" in page, f"{name}.md says nothing of {field.name}"


def test_mechanisms_do_not_import_mechanisms() -> None:
    files = {path.stem: path for path in (ROOT / "memlm/memory").glob("*.py")}
    for name in MECHANISMS:
        text = files[name.replace("-", "_")].read_text()
        for other in MECHANISMS - {name}:
            assert f"memory.{other.replace('-', '_')} import" not in text, f"{name} imports {other}"


def test_no_module_branches_on_a_mechanism_s_name() -> None:
    """Names appear in their own file, recipes, tests and docs only."""
    names = "|".join(MECHANISMS)
    branch = re.compile(rf"""(?:==|!=|\bin\b|case)\s*\(?\s*["']({names})["']""")
    assert branch.search('if name in ("armt", "rmt"):') and not branch.search('name = "armt"')
    for path in (ROOT / "memlm").rglob("*.py"):
        if path.parent.name == "memory" and path.stem.replace("_", "-") in MECHANISMS:
            continue
        found = branch.search(path.read_text())
        assert not found, f"{path.name} branches on {found[1]!r}"


def test_nothing_is_loaded_by_pickle() -> None:
    for path in (ROOT / "memlm").rglob("*.py"):
        assert not re.search(
            r"import pickle|pickle\.load|torch\.load\(|allow_pickle=True", path.read_text()
        ), path


def test_readme_code_runs() -> None:
    """The Python blocks of the README, as a user would paste them."""
    import contextlib
    import io
    import os
    import tempfile

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    runnable = [block for block in blocks if "# runs as it stands" in block]
    assert runnable
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(folder)
        try:
            for block in runnable:
                exec(compile(block, "README.md", "exec"), {})
        finally:
            os.chdir(before)
