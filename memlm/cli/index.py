"""`memlm index`: text files in chunks that can be searched and recalled."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from memlm.cli.options import Commands, add_store_options, store_of
from memlm.cli.printing import place_of, print_written, shorten
from memlm.files import parse_json

MOVED = "where the chunks are in place of the saved address: chunks.db, or http://host:19530"


def add_to(commands: Commands) -> None:
    """Add `memlm index` build, add, search and info."""
    for name, help, run in (
        ("index build", "cut text files into chunks and index them for recall", run_build),
        ("index add", "add text files to an index", run_add),
    ):
        index = commands.add(name, help, run)
        index.add_argument("index", type=Path, metavar="DIR", help="folder of the index")
        index.add_argument("files", nargs="+", type=Path, metavar="FILE", help="UTF-8 text files")
        index.add_argument("--chunk-size", type=int, default=64, help="words of a chunk")
        index.add_argument("--overlap", type=int, default=0, help="words repeated in the next one")
        if run is run_build:
            index.add_argument(
                "--factory", default="Flat", help="a FAISS index type: Flat, SQ8, HNSW32, ..."
            )
            index.add_argument(
                "--precision",
                choices=("float32", "ternary"),
                help="how Flat keeps vectors (default: ternary, a twentieth of float32)",
            )
            add_store_options(
                index,
                "keep the chunks in Milvus: a file chunks.db, or http://host:19530; DIR then holds the "
                "address",
            )
        else:
            add_store_options(index, MOVED)
    search = commands.add("index search", "search an index", run_search)
    search.add_argument("index", type=Path, metavar="DIR", help="folder of the index")
    search.add_argument("query", nargs="+", help="what to look for; each is searched by itself")
    search.add_argument("-k", type=int, default=5, help="chunks for each query")
    search.add_argument(
        "--where",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="only chunks with this metadata; a KEY given twice matches either VALUE",
    )
    add_store_options(search, MOVED)
    info = commands.add("index info", "say what an index holds", run_info)
    info.add_argument("index", type=Path, metavar="DIR", help="folder of the index")
    add_store_options(info, MOVED)


def run_build(arguments: argparse.Namespace) -> None:
    """Make an index of the files, in a folder that is empty or not there yet."""
    from memlm.retrieval import ChunkIndex, HashingEmbedder

    if arguments.index.exists() and any(arguments.index.iterdir()):
        raise ValueError(
            f"index={str(arguments.index)!r} exists; use `memlm index add`, or another folder"
        )
    index = ChunkIndex(
        HashingEmbedder(),
        factory=arguments.factory,
        precision=arguments.precision,
        store=store_of(arguments),
    )
    add_files(index, arguments)


def load(arguments: argparse.Namespace) -> Any:
    """The index of a command, with its chunks where the options say."""
    from memlm.retrieval import ChunkIndex, HashingEmbedder

    return ChunkIndex.load(arguments.index, HashingEmbedder(), store=store_of(arguments))


def run_add(arguments: argparse.Namespace) -> None:
    """Add the files to an index."""
    add_files(load(arguments), arguments)


def add_files(index: Any, arguments: argparse.Namespace) -> None:
    """Add the files, cut into chunks, to `index`, and save it."""
    from itertools import islice

    from tqdm import tqdm

    from memlm.retrieval import chunk_text
    from memlm.text import check_text_file, read_text

    files = [check_text_file(path) for path in arguments.files]
    before = len(index)
    total = sum(path.stat().st_size for path in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="indexing", delay=1, leave=False) as bar:
        for path in files:
            pieces = read_text(path, bar.update)
            chunks = chunk_text(pieces, size=arguments.chunk_size, overlap=arguments.overlap)
            while batch := list(islice(chunks, 1024)):
                index.add(
                    [chunk.text for chunk in batch],
                    metadata=[
                        {"document": str(path), "start": chunk.start, "end": chunk.end}
                        for chunk in batch
                    ],
                )
    index.save(arguments.index)
    print(f"{len(index) - before:,} chunks added, {len(index):,} in all")
    print_written([arguments.index])


def run_search(arguments: argparse.Namespace) -> None:
    """Print the chunks nearest to each query."""
    where: dict[str, list[Any]] = {}
    for pair in arguments.where:
        key, mark, value = pair.partition("=")
        if not key or not mark:
            raise ValueError(f"where={pair!r} must be KEY=VALUE")
        where.setdefault(key, []).extend(values_meant(value))
    index = load(arguments)
    found = index.search(arguments.query, k=arguments.k, where=where or None)
    for query, hits in zip(arguments.query, found, strict=True):
        print(query)
        for hit in hits:
            place = place_of(hit.metadata.get("document"), hit.metadata.get("start"))
            print(f"  {hit.score:.4f}  {place}: {shorten(hit.text)}")


def values_meant(typed: str) -> list[Any]:
    """The metadata values a typed word may stand for: itself, and the number, flag or null it spells."""
    try:
        value = parse_json(typed)
    except ValueError:
        return [typed]
    plain = value is None or (isinstance(value, bool | int | float) and math.isfinite(value))
    return [typed, value] if plain else [typed]


def run_info(arguments: argparse.Namespace) -> None:
    """Print what the index holds, a line per property."""
    for key, value in load(arguments).info().items():
        print(f"{key}: {value}")
