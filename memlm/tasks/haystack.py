"""Noise text: sources of documents, their sentences, and a tokenised form that costs nothing to cut.

Sources are "builtin" (English that every Python installation carries), a text file or a folder of
text files, and "hub:ID[@CONFIG][:COLUMN]" (any text dataset, streamed through `datasets`). Documents
are divided into a train and an eval split by their names, so noise trained on is never evaluated on.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import numpy as np
from numpy.typing import NDArray

from memlm.text import split_sentences
from memlm.tokens import encode_texts, encode_with_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "eval", "all"]

# Reading stops here (some ten million tokens): a document of 10M tokens then repeats little.
MAX_CHARACTERS = 50_000_000
# BABILong's own filter: shorter ones are headings, page numbers and cries.
MIN_TOKENS = 10
# Fewer files than this are cut into blocks, or a tenth of the files would be none.
MIN_FILES_AS_DOCUMENTS = 20
BLOCK_CHARACTERS = 20_000
# A built-in document gathers neighbours up to this size: noise should run on like a book.
BUILTIN_WORDS = 1_500
SENTENCES_AT_ONCE = 1_000
_MEMO_LIMIT = 50_000

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


@dataclass(frozen=True)
class Document:
    """A named stretch of text, cut into sentences in reading order."""

    name: str
    sentences: list[str]


class Haystack:
    """Documents of one split of a source."""

    def __init__(self, source: str, documents: Sequence[Document]) -> None:
        kept = [document for document in documents if document.sentences]
        if not kept:
            raise ValueError(
                f"haystack {source!r} holds no sentence; give a source with prose in it"
            )
        self.source = source
        self.documents = kept
        self._tokenized: TokenHaystack | None = None

    @classmethod
    def open(
        cls,
        source: str | os.PathLike[str] = "builtin",
        split: Split = "eval",
        max_characters: int = MAX_CHARACTERS,
    ) -> Haystack:
        """Read the documents of `source` that belong to `split`, about one in ten to eval."""
        documents = list(read_documents(source, split, max_characters))
        return cls(os.fspath(source), documents)

    def sentences(self, rng: np.random.Generator) -> Iterator[str]:
        """Yield without end: a random document from a random sentence to its end, then another."""
        while True:
            sentences = self.documents[int(rng.integers(len(self.documents)))].sentences
            yield from itertools.islice(sentences, int(rng.integers(len(sentences))), None)

    def tokenized(
        self, tokenizer: PreTrainedTokenizerBase, min_tokens: int = MIN_TOKENS
    ) -> TokenHaystack:
        """Tokenise every sentence once; the last result is kept for the next call."""
        known = self._tokenized
        if known is None or known.tokenizer is not tokenizer or known.min_tokens != min_tokens:
            known = TokenHaystack(self.documents, tokenizer, self.source, min_tokens)
            self._tokenized = known
        return known


class SentenceTexts(Sequence[str]):
    """Sentences kept as one array of UTF-8 bytes, each decoded when asked for.

    text (bytes,) uint8; offsets (sentences + 1,) int64.
    """

    def __init__(self, text: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self._text = text
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        number = at + len(self) if at < 0 else at
        if not 0 <= number < len(self):
            raise IndexError(f"sentence {at} of {len(self)}")
        return bytes(self._text[self._offsets[number] : self._offsets[number + 1]]).decode()


class TokenHaystack:
    """The sentences of a haystack as one flat array of token ids.

    Each sentence is tokenised by itself behind one space, so a composed document is the
    concatenation of its sentences' ids; for byte-level BPE that equals tokenising the joined text.
    Sentences under `min_tokens` tokens are left out.

    ids (tokens,) int32; offsets (sentences + 1,) where sentences start in ids; first_sentence
    (documents + 1,) where documents start among the sentences. With `in_order` noise starts at the
    first sentence and starts over at the end, else at random documents and sentences.
    """

    def __init__(
        self,
        documents: Iterable[Document],
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        min_tokens: int = MIN_TOKENS,
        in_order: bool = False,
    ) -> None:
        texts: list[str] = []
        pieces: list[NDArray[np.int32]] = []
        lengths: list[NDArray[np.int64]] = []
        first_sentence = [0]
        for kept, ids, sizes in tokenise(documents, tokenizer, source, min_tokens):
            texts += kept
            pieces.append(ids)
            lengths.append(sizes)
            first_sentence.append(len(texts))
        self._set(
            tokenizer,
            source,
            min_tokens,
            in_order,
            texts,
            np.concatenate(pieces),
            np.concatenate([[0], np.cumsum(np.concatenate(lengths))]),
            np.array(first_sentence, dtype=np.int64),
        )

    @classmethod
    def of_arrays(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        min_tokens: int,
        texts: Sequence[str],
        ids: NDArray[np.int32],
        offsets: NDArray[np.int64],
        first_sentence: NDArray[np.int64],
    ) -> TokenHaystack:
        """Make a haystack of what another one was made into; the arrays may be mapped files."""
        made = cls.__new__(cls)
        made._set(tokenizer, source, min_tokens, False, texts, ids, offsets, first_sentence)
        return made

    def _set(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        min_tokens: int,
        in_order: bool,
        texts: Sequence[str],
        ids: NDArray[np.int32],
        offsets: NDArray[np.int64],
        first_sentence: NDArray[np.int64],
    ) -> None:
        self.tokenizer = tokenizer
        self.source = source
        self.min_tokens = min_tokens
        self.in_order = in_order
        self.texts = texts
        self.ids = ids
        self.offsets = offsets
        self.first_sentence = first_sentence
        self._memo: dict[str, NDArray[np.int32]] = {}

    @functools.cached_property
    def digest(self) -> str:
        """A short fingerprint of the token ids: same source, split and tokenizer, same digest."""
        return hashlib.blake2b(np.ascontiguousarray(self.ids).data, digest_size=8).hexdigest()

    def encode(self, text: str) -> NDArray[np.int32]:
        """Tokenise a short text as it stands, remembering it: facts come from few sentences."""
        known = self._memo.get(text)
        if known is None:
            if len(self._memo) >= _MEMO_LIMIT:
                self._memo.clear()
            known = np.array(encode_texts(self.tokenizer, [text])[0], dtype=np.int32)
            self._memo[text] = known
        return known

    def cut_text(self, sentence: int, tokens: int) -> str:
        """Return the text of a sentence's first `tokens` tokens, with its leading space."""
        text = f" {self.texts[sentence]}"
        if tokens == 0:
            return ""
        spans = encode_with_spans(self.tokenizer, [text])[1][0]
        if spans is None:
            start = self.offsets[sentence]
            cut = self.ids[start : start + tokens].tolist()
            # Some decoders drop the leading space.
            return f" {self.tokenizer.decode(cut).removeprefix(' ')}"
        return text[: spans[tokens - 1][1]]

    @functools.cached_property
    def characters(self) -> NDArray[np.int64]:
        """(sentences + 1,) where sentences start in their joined text, each ended by one blank."""
        sizes = np.fromiter((len(text) + 1 for text in self.texts), np.int64, len(self.texts))
        return np.concatenate([[0], np.cumsum(sizes)])

    def runs(
        self, budget: int, rng: np.random.Generator, window: int | None = None
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Draw stretches of sentences until they hold `budget` tokens.

        Returns the first sentence of each stretch and the sentence after its last, both (runs,).
        window: stretches are the whole sentences within so many characters from a random one of a
        random document on, without the sentences that either end cuts or the document ends with, as
        the published sampler takes them; None: from a random sentence of a random document to its
        end. A haystack used in order has no stretches to draw, and no window.
        """
        firsts: list[NDArray[Any]] = []
        ends: list[NDArray[Any]] = []
        held = 0
        while held < budget:
            # Never one at a time: a document of 50M tokens takes tens of thousands of stretches.
            mean = len(self.ids) / (len(self.first_sentence) - 1)
            count = int((budget - held) / mean) + 16
            if self.in_order:
                document = np.zeros(count, dtype=np.int64)
                start = np.zeros(count)
            else:
                document = rng.integers(0, len(self.first_sentence) - 1, count)
                start = rng.random(count)
            begin, end = self.first_sentence[document], self.first_sentence[document + 1]
            if window is None or self.in_order:
                first = begin + (start * (end - begin)).astype(np.int64)
            else:
                first, end = self._within(begin, end, start, window)
                # Where no sentence is as short as that, the published sampler would draw for ever.
                window = window if len(first) else 2 * window
            firsts.append(first)
            ends.append(end)
            held += int((self.offsets[end] - self.offsets[first]).sum())
        if not firsts:
            empty = np.zeros(0, dtype=np.int64)
            return empty, empty
        return np.concatenate(firsts), np.concatenate(ends)

    def _within(
        self, begin: NDArray[Any], end: NDArray[Any], start: NDArray[Any], window: int
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Sentences wholly inside a window of characters that opens at the share `start` of each
        document, (draws,) to (runs,): draws without such a sentence are left out."""
        opens, closes = self.characters[begin], self.characters[end] - 1
        at = opens + (start * (closes - opens)).astype(np.int64)
        # A blank in front is the next sentence's, a blank at the end the last one's.
        first = np.searchsorted(self.characters, at + 1, side="right")
        stop = np.minimum(at + window, closes) - 1
        last = np.searchsorted(self.characters, stop, side="right") - 1
        some = last > first
        return first[some], last[some]


def tokenise(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    min_tokens: int = MIN_TOKENS,
) -> Iterator[tuple[list[str], NDArray[np.int32], NDArray[np.int64]]]:
    """Yield for every document its sentences of `min_tokens`, their ids joined, and their lengths.

    Documents left without a sentence are passed over; ValueError when all are.
    """
    if min_tokens < 1:
        raise ValueError(f"min_tokens={min_tokens} must be at least 1")
    found = False
    for document in documents:
        texts: list[str] = []
        lengths: list[int] = []
        pieces: list[NDArray[np.int32]] = []
        # A tokenizer's own record of a text is many times the text: never a whole book at once.
        for begin in range(0, len(document.sentences), SENTENCES_AT_ONCE):
            batch = document.sentences[begin : begin + SENTENCES_AT_ONCE]
            encoded = encode_texts(tokenizer, [f" {sentence}" for sentence in batch])
            kept = [
                (text, ids)
                for text, ids in zip(batch, encoded, strict=True)
                if len(ids) >= min_tokens
            ]
            texts += [text for text, _ in kept]
            lengths += [len(ids) for _, ids in kept]
            pieces.append(np.fromiter(itertools.chain(*(ids for _, ids in kept)), dtype=np.int32))
        if texts:
            found = True
            yield texts, np.concatenate(pieces), np.array(lengths, dtype=np.int64)
    if not found:
        raise ValueError(
            f"haystack {source!r} has no sentence of {min_tokens} tokens; "
            "give a source with longer sentences"
        )


def from_sentences(
    sentences: Iterable[str], tokenizer: PreTrainedTokenizerBase, tokens: int
) -> TokenHaystack:
    """Make a haystack of the given sentences, used in order and as they are.

    Takes from an iterable no more sentences than `tokens` need, so it may be endless.
    """
    taken: list[str] = []
    held = 0
    pending = iter(sentences)
    while held < tokens or not taken:
        batch = [text.strip() for text in itertools.islice(pending, 256)]
        if not batch:
            break
        taken += batch
        held += sum(map(len, encode_texts(tokenizer, [f" {text}" for text in batch])))
    if not taken:
        raise ValueError("haystack is an empty list of sentences; give at least one sentence")
    return TokenHaystack([Document("given", taken)], tokenizer, "given", 1, in_order=True)


def check_source(source: str | os.PathLike[str]) -> None:
    """Refuse a haystack source that cannot be opened, before any work is done."""
    name = os.fspath(source)
    if name == "builtin" or (name.startswith("hub:") and len(name) > len("hub:")):
        return
    path = Path(name)
    if not path.exists():
        raise ValueError(
            f"haystack {name!r} is neither 'builtin', an existing file or folder, nor 'hub:ID'; "
            "name one of these"
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
    """Yield the documents of `source` that belong to `split`, reading on only as they are taken."""
    check_source(source)
    check_split(split)
    source = os.fspath(source)
    texts, divided = _texts(source, split)
    bounded = _bounded(texts, max_characters)
    cut: Iterator[Document] = (Document(name, split_sentences(text)) for name, text in bounded)
    if source == "builtin":
        cut = _gather((Document(d.name, _prose(d.sentences)) for d in cut), BUILTIN_WORDS)
    read = chosen = 0

    def counted() -> Iterator[Document]:
        nonlocal read
        for document in cut:
            if document.sentences:
                read += 1
                yield document

    for document in counted() if divided else _of_split(counted(), split):
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
    if source.startswith("hub:"):
        return _hub_texts(source, split)
    return _file_texts(Path(source)), False


def _of_split(documents: Iterable[Document], split: Split) -> Iterator[Document]:
    if split == "all":
        yield from documents
        return
    held_out = split == "eval"
    # The draw stands once it has sent a document either way; only until then is any kept back.
    waiting: list[Document] = []
    sides: set[bool] = set()
    for document in documents:
        side = _mark(document) % 10 == 0
        if len(sides) == 2:
            if side == held_out:
                yield document
            continue
        waiting.append(document)
        sides.add(side)
        if len(sides) == 2:
            yield from (d for d in waiting if (_mark(d) % 10 == 0) == held_out)
            waiting = []
    if len(waiting) > 1:
        # Too few documents for the draw to be fair: hold out exactly one.
        least = min(waiting, key=_mark)
        yield from (d for d in waiting if (d.name == least.name) == held_out)


def _mark(document: Document) -> int:
    """A number drawn for a document by its name."""
    mark = hashlib.blake2b(document.name.encode(), digest_size=8).digest()
    return int.from_bytes(mark, "big")


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
    # A class's own entry: reading through some deprecated classes warns.
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


def _gather(documents: Iterable[Document], words: int) -> Iterator[Document]:
    """Join neighbours into documents of at least `words` words."""
    pending: list[str] = []
    name, held = "", 0
    for document in documents:
        name = name or document.name
        pending = pending + document.sentences
        held += sum(sentence.count(" ") + 1 for sentence in document.sentences)
        if held >= words:
            yield Document(name, pending)
            pending, name, held = [], "", 0
    if pending:
        yield Document(name, pending)


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
    """Stream a dataset; a test split of its own serves as eval, else its rows are divided here."""
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
