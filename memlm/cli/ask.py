"""`memlm ask`: text files into a memory, and questions about them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from memlm.cli.models import load_model
from memlm.cli.options import (
    Commands,
    add_device_options,
    add_store_options,
    let_options_interrupt,
    store_of,
)
from memlm.cli.printing import place_of, print_written, shorten


def add_to(commands: Commands) -> None:
    """Add `memlm ask`."""
    ask = commands.add("ask", "read files into a memory, and ask", run)
    ask.add_argument("model", help="folder or hub id of a memory model")
    ask.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="UTF-8 text files, in order"
    )
    let_options_interrupt(ask, "files", Path)
    ask.add_argument("-q", "--question", action="append", help="what to ask; may be repeated")
    ask.add_argument(
        "--chat",
        action="store_true",
        help="talk: questions and answers are remembered, and written by the chat template; without -q "
        "they are read line by line",
    )
    ask.add_argument(
        "--max-new-tokens", type=int, help="longest answer (default: 32, with --chat 256)"
    )
    ask.add_argument("--load", type=Path, metavar="DIR", help="go on with a stream saved there")
    ask.add_argument(
        "--index", type=Path, metavar="DIR", help="recall passages of this index before answering"
    )
    ask.add_argument(
        "--recall", type=int, metavar="K", help="recall K passages for a question (default: 4)"
    )
    ask.add_argument(
        "--save", type=Path, metavar="DIR", help="after reading, save the stream there"
    )
    add_store_options(
        ask,
        "where passages are kept: a file chunks.db, or http://host:19530; with --load or --index in place "
        "of the saved address",
    )
    add_device_options(ask)


def run(arguments: argparse.Namespace) -> None:
    """Read the files, print the answers, and keep the stream where one is asked for."""
    from memlm.text import check_text_file

    files = [check_text_file(path) for path in arguments.files]
    named = any(name is not None for name in (arguments.load, arguments.index, arguments.store))
    if not files and not named and not arguments.chat:
        raise ValueError(
            "no FILE to read; name text files, a saved stream with --load DIR or an index with "
            "--index DIR"
        )
    if not arguments.question and not arguments.chat:
        raise ValueError("no question; ask one with -q QUESTION, or talk with --chat")
    # Before a long document is read.
    if any(not question.strip() for question in arguments.question or ()):
        raise ValueError("-q is empty; ask something")
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={arguments.max_new_tokens} must be at least 1")
    retriever = make_retriever(arguments)
    model, tokenizer = load_model(arguments)
    if arguments.chat and tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template, which --chat needs; leave it out, and ask with -q"
        )
    from memlm import DocumentStream

    if arguments.load is not None:
        stream = DocumentStream.load(arguments.load, model, tokenizer, store=store_of(arguments))
    else:
        stream = DocumentStream(model, tokenizer, retriever)
    try:
        read_and_ask(arguments, files, stream)
    finally:
        # What is in a store stays there, and no stream would find it again. What was saved stays.
        if stream.retriever is not None and stream.retriever.index.outlives_process:
            stream.retriever.withdraw()


def read_and_ask(arguments: argparse.Namespace, files: list[Path], stream: Any) -> None:
    """Write the files into the stream, print the answers, and save it where that is asked for."""
    from tqdm import tqdm

    from memlm.text import read_text

    total = sum(path.stat().st_size for path in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", delay=1, leave=False) as bar:
        for path in files:
            stream.write(read_text(path, bar.update), document=str(path))
    if files and stream.retriever is not None:
        # Nothing of a file is still to come, so that its last words can be recalled.
        stream.retriever.end()
    print(
        f"{stream.tokens_seen:,} tokens read, {stream.memory_bytes:,} bytes of memory", flush=True
    )
    length = arguments.max_new_tokens
    if length is None:
        length = 256 if arguments.chat else 32
    if arguments.chat:
        talk(stream, arguments.question, length)
    for question in [] if arguments.chat else arguments.question:
        answer = stream.ask(question, max_new_tokens=length)
        print(f"{question}\n  {answer}")
        for passage in answer.sources:
            print(f"    from {place_of(passage.document, passage.start)}: {shorten(passage.text)}")
    if arguments.save is not None:
        stream.save(arguments.save)
        print_written([arguments.save])


def talk(stream: Any, questions: list[str] | None, length: int) -> None:
    """Print answers as they come, to `questions` or to each line typed."""
    from transformers import TextStreamer

    for said in filter(None, questions or (line.strip() for line in sys.stdin)):
        if questions:
            print(f"> {said}", flush=True)
        shown = TextStreamer(stream.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stream.chat(said, max_new_tokens=length, streamer=shown)


def make_retriever(arguments: argparse.Namespace) -> Any:
    """What `ask` recalls from: the named index, or a new one of the files it reads."""
    store = store_of(arguments)
    if arguments.load is not None:
        if arguments.index is not None or arguments.recall is not None:
            raise ValueError(
                "--load goes on with the stream's own index; leave out --index and --recall"
            )
        return None
    if arguments.index is None and arguments.recall is None and store is None:
        return None
    from memlm.retrieval import ChunkIndex, HashingEmbedder
    from memlm.retrieval.retriever import RetrievalConfig, Retriever

    config = RetrievalConfig() if arguments.recall is None else RetrievalConfig(k=arguments.recall)
    if arguments.index is None:
        if store is not None and arguments.files and arguments.save is None:
            raise ValueError(
                f"store={arguments.store!r} would keep passages that no stream finds again; give --save "
                "DIR too"
            )
        return Retriever(ChunkIndex(HashingEmbedder(), store=store), config)
    return Retriever(ChunkIndex.load(arguments.index, HashingEmbedder(), store=store), config)
