"""What an index takes beside its text, and what it finds, with vectors as float32 and in ternary codes.

Passages of the built-in haystack; into some of them a fact is written that nothing else says. Queries: who
the fact is about ("Where is NAME?"), and six words in a row of a passage, most of them common ones. Found:
the passage is among the first K. Both by vectors alone and with the word index. Then the first hybrid query
after a load, with the word index read from its file and with it built again.

    python benchmarks/index_size.py [--size 64] [--passages 3500]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from record import write_result

from memlm.retrieval import ChunkIndex, HashingEmbedder
from memlm.tasks.haystack import read_documents

OUT = Path(__file__).parent / "results" / "index_size.json"
PRECISIONS = ("float32", "ternary")
CONSONANTS = "bdfgklmnprstvw"
PLACES = ("kitchen", "garden", "office", "bathroom", "hallway", "bedroom", "cellar", "harbour")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=64, help="words of a passage")
    parser.add_argument("--passages", type=int, default=3500)
    parser.add_argument("--queries", type=int, default=300, help="of each kind")
    parser.add_argument("--k", nargs="+", type=int, default=[1, 5, 10])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    random = np.random.default_rng(arguments.seed)
    passages = list(passages_of(arguments.size, arguments.passages))
    asked = questions(passages, arguments.queries, random)
    texts = [" ".join(words) for words in passages]
    rows = []
    for precision in PRECISIONS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(precision, texts, asked, arguments.k, Path(folder)))
        print(rows[-1])
    settings = {k: v for k, v in vars(arguments).items() if k != "out"}
    what = "bytes and recall of an index of hashed texts, CPU seconds, one thread"
    write_result(arguments.out, what, {**settings, "passages": len(texts)}, rows)


def passages_of(size: int, most: int) -> Iterator[list[str]]:
    words: list[str] = []
    for document in read_documents("builtin", "all"):
        words += " ".join(document.sentences).split()
        while len(words) >= size and most:
            yield words[:size]
            words, most = words[size:], most - 1


def questions(
    passages: list[list[str]], count: int, random: np.random.Generator
) -> dict[str, list[tuple[str, int]]]:
    """Of each kind, queries with the number of the passage that answers; writes facts into passages."""
    asked: dict[str, list[tuple[str, int]]] = {"fact": [], "words": []}
    names: set[str] = set()
    for number in random.choice(len(passages), count, replace=False).tolist():
        name = ""
        while not name or name in names:
            pairs = [(random.choice(list(CONSONANTS)), random.choice(list("aeiou"))) for _ in "abc"]
            name = "".join(first + second for first, second in pairs).capitalize()
        names.add(name)
        fact = f"{name} went to the {random.choice(PLACES)}.".split()
        words = passages[number]
        at = int(random.integers(0, max(1, len(words) - len(fact))))
        words[at : at + len(fact)] = fact
        asked["fact"].append((f"Where is {name}?", number))
    for number in random.choice(len(passages), count, replace=False).tolist():
        at = int(random.integers(0, max(1, len(passages[number]) - 6)))
        asked["words"].append((" ".join(passages[number][at : at + 6]), number))
    return asked


def measure(
    precision: str,
    texts: list[str],
    asked: dict[str, list[tuple[str, int]]],
    ks: list[int],
    folder: Path,
) -> dict[str, Any]:
    embedder = HashingEmbedder()
    embedder.encode(texts)  # every word is known when the clock starts
    index = ChunkIndex(embedder, precision=precision)  # type: ignore[arg-type]
    began = time.process_time()
    index.add(texts, ids=range(len(texts)))
    row: dict[str, Any] = {"precision": precision, "add_cpu_seconds": since(began)}
    for kind, questions in asked.items():
        for hybrid in (False, True):
            began = time.process_time()
            found = [
                [hit.id for hit in index.search([query], max(ks), hybrid=hybrid)[0]]
                for query, _ in questions
            ]
            key = f"{kind}, {'hybrid' if hybrid else 'vectors'}"
            row[f"query_cpu_ms, {key}"] = round(1000 * since(began) / len(questions), 2)
            for k in ks:
                hits = sum(n in ids[:k] for ids, (_, n) in zip(found, questions, strict=True))
                row[f"found@{k}, {key}"] = round(hits / len(questions), 4)
    text = sum(len(each.encode()) for each in texts)
    began = time.process_time()
    index.save(folder)
    row["save_cpu_seconds"] = since(began)
    disk = {
        kind: sum(path.stat().st_size for path in folder.glob(f"{kind}*"))
        for kind in ("chunks", "vectors", "main", "words")
    }
    row |= {"text_bytes": text, "memory_bytes": index.info()["bytes"], "disk_bytes": disk}
    row["memory_over_text"] = round(index.bytes / text, 2)
    row["disk_over_text"] = round(sum(disk.values()) / text, 2)
    query = asked["fact"][0][0]
    for key, words in (("read", True), ("built again", False)):
        again = ChunkIndex.load(folder, embedder)
        if not words:
            # As an index without a file of words has it.
            again = ChunkIndex(embedder, precision=precision)  # type: ignore[arg-type]
            again.add(texts)
        began = time.process_time()
        again.search([query])
        row[f"first_hybrid_query_cpu_ms, words {key}"] = round(1000 * since(began), 1)
    return row


def since(began: float) -> float:
    return round(time.process_time() - began, 4)


if __name__ == "__main__":
    main()
