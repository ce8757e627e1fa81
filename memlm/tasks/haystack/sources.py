"""Where noise comes from: texts that every Python installation carries, files, and data sets of the hub.

Sources are "builtin" (English documentation), "installed" (what the dependencies carry of text), "made"
(sentences made up to be taken for facts), a text file or a folder of text files, and
"hub:ID[@CONFIG][:COLUMN]" (any text data set, streamed through `datasets`). Several are joined by "+".
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from memlm.tasks.haystack.documents import (
    BLOCK_CHARACTERS,
    BUILTIN_WORDS,
    Document,
    Split,
    gather,
    of_split,
)
from memlm.tasks.haystack.installed import installed_texts
from memlm.tasks.haystack.made import made_texts
from memlm.text import split_sentences

# Reading stops here (some ten million tokens), so that a document of 10M tokens still repeats little.
MAX_CHARACTERS = 50_000_000

# Fewer files than this are cut into blocks, since a tenth of so few files would be none.
MIN_FILES_AS_DOCUMENTS = 20
# Sources that every installation has.
CARRIED = ("builtin", "installed", "made")
TEXT_COLUMNS = ("text", "content", "document", "article", "body")

# Only modules whose import opens, prints, registers and changes nothing.
BUILTIN_MODULES = (
    "abc argparse array ast asyncio asyncio.base_events asyncio.events asyncio.futures "
    "asyncio.locks asyncio.protocols asyncio.queues asyncio.runners asyncio.sslproto "
    "asyncio.streams asyncio.subprocess asyncio.tasks asyncio.transports asyncio.unix_events "
    "base64 bdb binascii bisect builtins bz2 calendar cmath cmd code codecs codeop collections "
    "colorsys compileall concurrent.futures configparser contextlib contextvars copy copyreg csv "
    "ctypes dataclasses datetime decimal difflib dis doctest email email.charset "
    "email.contentmanager email.generator email.header email.headerregistry email.message "
    "email.mime.text email.parser email.policy email.utils enum errno fcntl filecmp fileinput "
    "fnmatch fractions ftplib functools gc getopt getpass gettext glob graphlib gzip hashlib heapq "
    "hmac html html.parser http http.client http.cookiejar http.cookies http.server imaplib "
    "importlib importlib.abc importlib.machinery importlib.metadata importlib.resources "
    "importlib.util inspect io ipaddress itertools json json.decoder json.encoder keyword "
    "linecache locale logging logging.config logging.handlers lzma mailbox marshal math mimetypes "
    "mmap modulefinder multiprocessing multiprocessing.connection multiprocessing.managers "
    "multiprocessing.pool multiprocessing.queues multiprocessing.shared_memory netrc ntpath "
    "numbers opcode operator optparse os pathlib pdb pickle pickletools pkgutil platform plistlib "
    "poplib posix posixpath pprint profile pstats py_compile pyclbr pydoc queue quopri random re "
    "reprlib resource runpy sched secrets select selectors shelve shlex shutil signal smtplib "
    "socket socketserver sqlite3 ssl stat statistics string stringprep struct subprocess symtable "
    "sys sysconfig tarfile tempfile textwrap threading timeit token tokenize trace traceback "
    "tracemalloc types typing unittest unittest.case unittest.loader unittest.mock unittest.runner "
    "unittest.suite urllib.error urllib.parse urllib.request urllib.response urllib.robotparser "
    "uuid venv warnings wave weakref wsgiref.handlers wsgiref.headers wsgiref.simple_server "
    "wsgiref.util wsgiref.validate xml.dom xml.dom.minidom xml.dom.pulldom xml.etree.ElementTree "
    "xml.sax xml.sax.handler xml.sax.saxutils xml.sax.xmlreader xmlrpc.client xmlrpc.server "
    "zipapp zipfile zipimport zlib zoneinfo"
).split()


def check_source(source: str | os.PathLike[str]) -> None:
    """Refuse a haystack source that cannot be opened, before any work is done."""
    for part in parts_of(source):
        _check_part(part)


def parts_of(source: str | os.PathLike[str]) -> list[str]:
    """The sources that are joined by "+"; a file or folder whose name has one is a single source."""
    name = os.fspath(source)
    return [name] if Path(name).exists() else name.split("+")


def _check_part(name: str) -> None:
    if name in CARRIED or (name.startswith("hub:") and len(name) > len("hub:")):
        return
    path = Path(name)
    if not path.exists():
        raise ValueError(
            f"haystack {name!r} is neither 'builtin', 'installed', 'made', an existing file or folder, "
            "nor 'hub:ID'; name one of these, or several joined by '+'"
        )
    if path.is_dir() and not files_of(path):
        raise ValueError(f"haystack folder {name!r} holds no file; give a folder of text files")


def check_split(split: str) -> None:
    """Refuse a split that is none of train, eval and all."""
    if split not in get_args(Split):
        raise ValueError(f"unknown haystack split {split!r}; use one of {get_args(Split)}")


def read_documents(
    source: str | os.PathLike[str], split: Split = "eval", max_characters: int = MAX_CHARACTERS
) -> Iterator[Document]:
    """Yield the documents of `source` that belong to `split`, reading on only as they are taken.

    Sources that are joined share `max_characters` evenly.
    """
    check_source(source)
    check_split(split)
    parts = parts_of(source)
    for part in parts:
        yield from _documents_of(part, split, max_characters // len(parts))


def _documents_of(source: str, split: Split, max_characters: int) -> Iterator[Document]:
    texts, divided = _texts(source, split)
    bounded = _bounded(texts, max_characters)
    cut: Iterator[Document] = (Document(name, split_sentences(text)) for name, text in bounded)
    if source in CARRIED:
        # Of docstrings, what reads as English; code, licences and what was made up are as they are.
        raw = () if source == "builtin" else ("/code/", "/text/", "made/")
        filtered = (
            d if any(kind in d.name for kind in raw) else Document(d.name, _prose(d.sentences))
            for d in cut
        )
        cut = gather(filtered, BUILTIN_WORDS)
    read = chosen = 0

    def counted() -> Iterator[Document]:
        nonlocal read
        for document in cut:
            if document.sentences:
                read += 1
                yield document

    for document in counted() if divided else of_split(counted(), split):
        chosen += 1
        yield document
    if not read:
        raise ValueError(f"haystack {source!r} holds no text; give a source with prose in it")
    if not chosen:
        raise ValueError(
            f"haystack {source!r} has a single document, which leaves nothing for split "
            f"{split!r}; use split='all' or a longer text"
        )


def _bounded(texts: Iterator[tuple[str, str]], limit: int) -> Iterator[tuple[str, str]]:
    left = limit
    for name, text in texts:
        if left <= 0:
            return
        yield name, text[:left]
        left -= len(text)


def _texts(source: str, split: Split) -> tuple[Iterator[tuple[str, str]], bool]:
    """Return (name, text) of every document, and whether they are already those of `split`."""
    if source == "builtin":
        return _builtin_texts(), False
    if source == "installed":
        return installed_texts(split), True
    if source == "made":
        return made_texts(), False
    if source.startswith("hub:"):
        return _hub_texts(source, split)
    return _file_texts(Path(source)), False


def _builtin_texts() -> Iterator[tuple[str, str]]:
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield f"topic/{name}", topics[name]
    seen: set[str] = set()
    for name in BUILTIN_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue  # Not every platform builds every module.
        docs = [doc for doc in _docstrings(module, name) if doc not in seen]
        seen.update(docs)
        yield f"module/{name}", "\n\n".join(dict.fromkeys(docs))


def _docstrings(module: Any, name: str) -> Iterator[str]:
    """Yield the docstrings of a module, its classes, their members and its functions."""
    own = {name, f"_{name}", None}
    yield from _docstring(module)
    for _, value in sorted(vars(module).items()):
        if inspect.isclass(value) and value.__module__ in own:
            yield from _docstring(value)
            for _, member in sorted(vars(value).items()):
                yield from _docstring(member)
        elif inspect.isroutine(value) and getattr(value, "__module__", None) in own:
            yield from _docstring(value)


def _docstring(value: Any) -> Iterator[str]:
    # The class's own entry: attribute access on some deprecated classes warns.
    doc = vars(value).get("__doc__") if inspect.isclass(value) else getattr(value, "__doc__", None)
    # Other instances carry their class's docstring, which says nothing about them.
    described = inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)
    if isinstance(doc, str) and (described or isinstance(value, property | classmethod)):
        yield inspect.cleandoc(doc)


def _prose(sentences: list[str]) -> list[str]:
    """Keep what reads as English: no examples of code, tables or underlined headings."""
    kept = []
    for sentence in sentences:
        letters = sum(character.isalpha() or character == " " for character in sentence)
        if ">>>" not in sentence and letters >= 0.85 * len(sentence):
            kept.append(sentence)
    return kept


def files_of(folder: Path) -> list[Path]:
    """The files of a folder in a fixed order, hidden ones left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _file_texts(path: Path) -> Iterator[tuple[str, str]]:
    if path.is_dir():
        files = [(file.relative_to(path).as_posix(), file) for file in files_of(path)]
    else:
        files = [(path.name, path)]
    size = sum(file.stat().st_size for _, file in files)
    whole = len(files) >= MIN_FILES_AS_DOCUMENTS
    block = min(BLOCK_CHARACTERS, max(500, size // 20))
    for name, file in files:
        try:
            with file.open(encoding="utf-8") as stream:
                for number in itertools.count():
                    text = stream.read() if whole else stream.read(block) + stream.readline(block)
                    if "\0" in text:
                        raise UnicodeError("it holds zero bytes")
                    if not text:
                        break
                    yield (name if whole else f"{name}#{number}"), text
        except UnicodeError as error:
            raise ValueError(
                f"haystack file {str(file)!r} is not UTF-8 text ({error}); remove or convert it"
            ) from error
        except OSError as error:
            raise ValueError(
                f"haystack file {str(file)!r} cannot be read ({error.strerror}); "
                "check its permissions"
            ) from error


def _hub_texts(source: str, split: Split) -> tuple[Iterator[tuple[str, str]], bool]:
    """Stream a dataset; if it has a test split, that serves as eval, else its rows are divided here."""
    name, config, column = parse_hub(source)
    splits = open_dataset(source, name, config)
    held_out = next((key for key in ("test", "validation") if key in splits), None)
    train = "train" if "train" in splits else next(iter(splits))
    divided = held_out is not None and train == "train" and split != "all"
    rows = splits[held_out if divided and split == "eval" and held_out else train]

    def texts() -> Iterator[tuple[str, str]]:
        chosen = column
        for number, row in enumerate(rows):
            chosen = chosen or text_column(source, row)
            if chosen not in row:
                raise ValueError(
                    f"haystack {source!r} has no column {chosen!r}; its columns are "
                    f"{', '.join(row)}"
                )
            if isinstance(row[chosen], str):
                yield f"row/{number}", row[chosen]

    return texts(), divided


def parse_hub(source: str) -> tuple[str, str | None, str | None]:
    """Split "hub:ID[@CONFIG][:COLUMN]" into its parts."""
    body = source.removeprefix("hub:")
    name, _, column = body.rpartition(":") if ":" in body else (body, "", "")
    name, _, config = name.partition("@")
    return name, config or None, column or None


def open_dataset(source: str, name: str, config: str | None) -> Any:
    """Open a hub dataset or a local file of rows as streams, by split."""
    import datasets

    builder = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
    suffix = Path(name).suffix
    try:
        if Path(name).is_file() and suffix in builder:
            return datasets.load_dataset(builder[suffix], data_files=name, streaming=True)
        return datasets.load_dataset(name, config, streaming=True)
    except Exception as error:  # `datasets` raises a different type for every cause.
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(
            f"{source!r} cannot be opened ({type(error).__name__}: {reason}); "
            "check the name and the connection"
        ) from error


def text_column(source: str, row: dict[str, Any]) -> str:
    """Return the column that holds the text; ValueError when several may."""
    strings = [key for key, value in row.items() if isinstance(value, str)]
    named = [key for key in TEXT_COLUMNS if key in strings]
    if named:
        return named[0]
    if len(strings) == 1:
        return strings[0]
    raise ValueError(
        f"{source!r} has the text columns {strings or 'none'}; "
        f"name one, as in {source + ':COLUMN'!r}"
    )
