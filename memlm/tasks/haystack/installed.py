"""The haystack "installed": what the packages that memlm depends on carry of text.

Docstrings, descriptions and licences, and some of their code: several million tokens in many voices, where
"builtin" has some three hundred thousand. Files are read with `ast` and never imported. Packages are held
out whole: what is evaluated on was written by other people than what is trained on. The text depends on the
versions that are installed, so a run records them (`manifest`).
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import warnings
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from memlm.tasks.haystack.documents import Split

# Run-time dependencies and theirs; what is not installed is passed over.
PACKAGES = (
    "accelerate datasets einops fonttools fsspec httpx huggingface_hub jinja2 matplotlib mpmath networkx "
    "numpy packaging pandas pillow psutil pyarrow pydantic pyparsing python-dateutil requests safetensors "
    "setuptools sympy tokenizers torch tqdm transformers typing_extensions"
).split()
HELD_OUT = ("matplotlib", "networkx", "pandas")
# Characters of each kind per package, so that the largest do not outweigh all others.
DOCSTRINGS, CODE = 2_000_000, 300_000
# One file in so many is read as code.
CODE_SHARE = 8


def packages(split: Split) -> list[tuple[str, Distribution]]:
    """The installed packages of `split`, by name."""
    found = []
    for name in PACKAGES:
        if split != "all" and (name in HELD_OUT) != (split == "eval"):
            continue
        try:
            found.append((name, distribution(name)))
        except PackageNotFoundError:
            continue
    return found


def manifest(split: Split = "all") -> list[dict[str, Any]]:
    """What the text was taken from: package, version, and the SHA-256 of its record of files."""
    return [
        {
            "package": name,
            "version": one.version,
            "sha256": hashlib.sha256((one.read_text("RECORD") or "").encode()).hexdigest(),
        }
        for name, one in packages(split)
    ]


def installed_texts(split: Split) -> Iterator[tuple[str, str]]:
    """(name, text) of each document: "PACKAGE/docs/FILE", "PACKAGE/code/FILE", "PACKAGE/text/FILE"."""
    for name, package in packages(split):
        left = {"docs": DOCSTRINGS, "code": CODE}
        for path in sorted(package.files or (), key=_draw):
            located = Path(str(package.locate_file(path)))
            if _is_text(path.name):
                yield f"{name}/text/{path.name}", _read(located)
            if path.suffix != ".py" or any("test" in part for part in path.parts):
                continue
            kinds = ["docs"] + ["code"] * (int(_draw(path), 16) % CODE_SHARE == 0)
            if not any(left[kind] > 0 for kind in kinds):
                continue
            source = _read(located)
            for kind in kinds:
                text = "\n\n".join(docstrings(source)) if kind == "docs" else source
                text = text[: max(left[kind], 0)]
                left[kind] -= len(text)
                if text:
                    yield f"{name}/{kind}/{path}", text


def docstrings(source: str) -> Iterator[str]:
    """The docstrings of a module's source, its classes' and its functions'; none of what does not parse."""
    try:
        with warnings.catch_warnings():
            # Of invalid escapes in other people's strings.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = ast.get_docstring(node, clean=False)
            if found:
                yield inspect.cleandoc(found)


def _is_text(name: str) -> bool:
    """Licences, notices and the description that a package has of itself."""
    return name.upper().startswith(("LICENSE", "LICENCE", "NOTICE", "COPYING", "METADATA"))


def _draw(path: Any) -> str:
    """Files in an order that spreads over the package, the same on every machine."""
    return hashlib.blake2b(str(path).encode(), digest_size=8).hexdigest()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="ignore").replace("\0", "")
    except OSError:
        return ""
