"""What a chunk index costs: build, memory, speed and recall of each kind of index, and hashing of texts.

Vectors are synthetic: unit vectors around one centre per 100 of them, the noise as long as the centre, so
that neighbours are found within clusters as in text. Queries are vectors of the same kind that are not in
the index. Recall@10 is the share of the ten true nearest (exact float32) among the ten returned. Seconds
are CPU seconds of the process, with one thread; a machine whose speed drifts shows in them. Bytes are
those of codes, row numbers, links and centroids. IVF probes max(8, lists / 16) lists and HNSW searches
with efSearch 64, as the package does unless told otherwise.

Hashing: chunks of 80 words, Zipf-distributed over 50,000 words of 2 to 10 letters. A word is what
white space separates; a token is 4 bytes of UTF-8, the usual rule of thumb for BPE of English.

    python benchmarks/retrieval.py [--vectors 1000000] [--factories Flat --factories SQ8 ...] [--out FILE]
"""

from __future__ import annotations

import json
import platform
import string
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from memlm import __version__
from memlm.retrieval import HashingEmbedder
from memlm.retrieval.vectors import Vectors

FACTORIES = ["Flat", "SQ8", "IVF1024,Flat", "HNSW32"]
BLOCK = 20_000
K = 10


def clustered(count: int, dim: int, centres: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """(count, dim) unit vectors around the (n, dim) unit `centres`, made in blocks."""
    random = np.random.default_rng(seed)
    made = np.empty((count, dim), np.float32)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        noise = random.standard_normal((size, dim), np.float32) / np.float32(np.sqrt(dim))
        block = centres[random.integers(0, len(centres), size)] + noise
        made[start : start + size] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return made


def nearest(vectors: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.int64]:
    """(q, K) the true nearest, by products block by block."""
    scores = np.full((len(queries), K), -np.inf, np.float32)
    rows = np.full((len(queries), K), -1, np.int64)
    for start in range(0, len(vectors), BLOCK):
        block = queries @ vectors[start : start + BLOCK].T
        scores = np.concatenate([scores, block], axis=1)
        numbers = np.arange(start, start + block.shape[1])
        rows = np.concatenate([rows, np.broadcast_to(numbers, block.shape)], axis=1)
        best = np.argpartition(-scores, K - 1, axis=1)[:, :K]
        scores, rows = (np.take_along_axis(table, best, 1) for table in (scores, rows))
    return rows


def measure(
    factory: str, vectors: NDArray[np.float32], queries: NDArray[np.float32]
) -> dict[str, Any]:
    """Build one index and search it."""
    truth = nearest(vectors, queries)
    index = Vectors(factory, vectors.shape[1], None, 1)
    alive = np.ones(len(vectors), bool)
    start = time.process_time()
    if index.train_at:
        every = max(1, len(vectors) // max(index.train_at, 4096))
        index.train(np.ascontiguousarray(vectors[::every]))
    trained = time.process_time() - start
    for at in range(0, len(vectors), BLOCK):
        block = vectors[at : at + BLOCK]
        index.add(np.arange(at, at + len(block)), block)
    built = time.process_time() - start

    def search(batch: int, most: float) -> tuple[float, list[list[tuple[int, float]]]]:
        """Queries per CPU second in batches, for `most` seconds at most, and what was found."""
        found: list[list[tuple[int, float]]] = []
        begin = time.process_time()
        for at in range(0, len(queries), batch):
            found.extend(index.search(queries[at : at + batch], K, None, alive))
            if time.process_time() - begin > most:
                break
        return len(found) / (time.process_time() - begin), found

    search(1, 0.0)
    single, _ = search(1, 20.0)
    batched, found = search(64, 30.0)
    hits = [
        len({row for row, _ in answer} & set(true))
        for answer, true in zip(found, truth.tolist(), strict=False)
    ]
    return {
        "factory": factory,
        "vectors": len(vectors),
        "train_cpu_seconds": round(trained, 2),
        "build_cpu_seconds": round(built, 2),
        "bytes_per_vector": round(index.bytes / len(vectors), 1),
        "queries_per_second_single": round(single, 1),
        "queries_per_second_batch_64": round(batched, 1),
        "recall_at_10": round(sum(hits) / (K * len(hits)), 4),
        "queries": len(hits),
    }


def hashing(chunks: int) -> dict[str, Any]:
    """Speed of HashingEmbedder over `chunks` chunks, not fitted."""
    random = np.random.default_rng(0)
    letters = np.array(list(string.ascii_lowercase))
    lengths = random.integers(2, 11, 50_000)
    vocabulary = np.array(["".join(random.choice(letters, n)) for n in lengths])
    share = 1 / np.arange(1, len(vocabulary) + 1)
    drawn = random.choice(len(vocabulary), (chunks, 80), p=share / share.sum())
    texts = [" ".join(vocabulary[line]) for line in drawn]
    embedder = HashingEmbedder()
    embedder.encode(texts[:64])
    start = time.process_time()
    embedder.encode(texts)
    seconds = time.process_time() - start
    return {
        "embedder": "HashingEmbedder",
        "dim": embedder.dim,
        "chunks": chunks,
        "cpu_seconds": round(seconds, 2),
        "words_per_cpu_second": round(chunks * 80 / seconds),
        "tokens_per_cpu_second": round(sum(len(t.encode()) for t in texts) / 4 / seconds),
    }


def main(
    vectors: Annotated[int, typer.Option(help="vectors in the index")] = 1_000_000,
    dim: Annotated[int, typer.Option(help="width of a vector")] = 384,
    factories: Annotated[list[str], typer.Option(help="kinds of index")] = FACTORIES,
    hnsw_vectors: Annotated[int, typer.Option(help="at most this many for HNSW, slow to build")] = (
        100_000
    ),
    queries: Annotated[int, typer.Option(help="queries, fewer when slow")] = 256,
    chunks: Annotated[int, typer.Option(help="chunks to hash")] = 5_000,
    out: Annotated[Path, typer.Option(help="JSON to write")] = Path(
        "benchmarks/results/retrieval.json"
    ),
) -> None:
    """Measure and write JSON; rows of an earlier run with other sizes or kinds are kept."""
    import faiss

    from memlm.files import write_json

    settings = {"dim": dim, "threads": 1, "k": K, "metric": "inner_product of unit vectors"}
    rows: list[dict[str, Any]] = []
    if out.exists():
        before = json.loads(out.read_text(encoding="utf-8"))
        rows = before["rows"] if before["settings"] == settings else []
    for factory in factories:
        count = min(vectors, hnsw_vectors) if factory.startswith("HNSW") else vectors
        centres = clustered(max(1, count // 100), dim, np.zeros((1, dim), np.float32), seed=0)
        row = measure(
            factory, clustered(count, dim, centres, 1), clustered(queries, dim, centres, 2)
        )
        key = (factory, count)
        rows = [r for r in rows if (r["factory"], r["vectors"]) != key] + [row]
        typer.echo(json.dumps(row))
        report = {
            "what": "kinds of index on clustered synthetic vectors, and hashing of texts; CPU seconds",
            "settings": settings,
            "versions": {
                "memlm": __version__,
                "faiss": faiss.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "rows": sorted(rows, key=lambda r: (r["vectors"], r["factory"])),
            "hashing": hashing(chunks),
        }
        write_json(out, report)
    typer.echo(json.dumps(report["hashing"]))
    typer.echo(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
