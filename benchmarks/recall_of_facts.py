"""How often retrieval finds the facts that answer a question, by passages, their size and hops.

No model: it bounds what any model can answer from what is recalled. Every sample of BABILong has an
index of its own, as in `memlm eval --retrieval`; it counts when all its supporting facts are recalled.

    python benchmarks/recall_of_facts.py --tasks qa1 qa2 qa3 --lengths 4k 64k 1M --samples 50 20 8
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from memlm.eval.metrics import wilson
from memlm.eval.running.samples import Composed
from memlm.files import write_json
from memlm.retrieval import HashingEmbedder
from memlm.retrieval.retriever import RetrievalConfig, read_document
from memlm.tasks.haystack.cache import tokenized_haystack
from memlm.tasks.published import load_tokenizer

OUT = Path(__file__).parent / "results" / "recall_of_facts.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=["qa1", "qa2", "qa3"])
    parser.add_argument("--lengths", nargs="+", default=["4k", "64k", "1M"])
    parser.add_argument("--samples", nargs="+", type=int, default=[50, 20, 8], help="by length")
    parser.add_argument("--sizes", nargs="+", type=int, default=[16, 32, 64, 128])
    parser.add_argument("--k", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--hops", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--haystack", default="builtin")
    parser.add_argument("--tokenizer", default="words", help="whose tokens a length counts")
    parser.add_argument("--precision", default="ternary", choices=["float32", "ternary"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.tokenizer)
    noise = tokenized_haystack(arguments.haystack, "eval", tokenizer)
    source = Composed("generated", noise, tokenizer, arguments.seed)
    rows = []
    for length, samples in zip(arguments.lengths, arguments.samples, strict=True):
        for task in arguments.tasks:
            tokens = source_tokens(source, task, length)
            for size in arguments.sizes:
                rows += measure(source, task, tokens, length, samples, size, arguments)
                print(rows[-1], file=sys.stderr, flush=True)
    print(table(rows, arguments))
    write_json(arguments.out, {"settings": settings(arguments), "rows": rows})
    print(f"written: {arguments.out}")


def source_tokens(source: Composed, task: str, length: str) -> int:
    from memlm.tasks.babilong import parse_length

    tokens = parse_length(length)
    source.prepare(task, tokens, 1)
    return tokens


def measure(
    source: Composed,
    task: str,
    tokens: int,
    length: str,
    samples: int,
    size: int,
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """One row for each number of passages and of hops."""
    embedder = HashingEmbedder()
    embedder.precision = arguments.precision  # type: ignore[misc]
    whole = {(k, hops): 0 for k in arguments.k for hops in arguments.hops}
    indexing = searching = 0.0
    for index in range(samples):
        sample = source.get(task, tokens, index)
        supporting = [sample.story.facts[i] for i in sample.story.supporting]
        began = time.process_time()
        known = read_document(sample, embedder, RetrievalConfig(size=size))
        known.flush()
        indexing += time.process_time() - began
        began = time.process_time()
        for k, hops in whole:
            known.config = RetrievalConfig(k=k, size=size, hops=hops)
            told = " ".join(
                " ".join(passage.text.split()) for passage in known.recall(sample.question)
            )
            whole[k, hops] += all(fact in told for fact in supporting)
        searching += time.process_time() - began
    return [
        {
            "task": task,
            "length": length,
            "size": size,
            "k": k,
            "hops": hops,
            "samples": samples,
            "recalled": found / samples,
            "interval": list(wilson(found, samples)),
            "indexing_cpu_seconds": indexing / samples,
            "search_cpu_seconds": searching / samples / len(whole),
        }
        for (k, hops), found in whole.items()
    ]


def table(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    lines = [
        "| task | length | words per passage | hops | "
        + " | ".join(f"k={k}" for k in arguments.k)
        + " |",
        "|---" * (4 + len(arguments.k)) + "|",
    ]
    seen: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in rows:
        key = (row["task"], row["length"], row["size"], row["hops"])
        seen.setdefault(key, {})[row["k"]] = row["recalled"]
    for (task, length, size, hops), found in seen.items():
        cells = " | ".join(f"{found[k]:.0%}" for k in arguments.k)
        lines.append(f"| {task} | {length} | {size} | {hops} | {cells} |")
    return "\n".join(lines)


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(arguments).items() if key != "out"}


if __name__ == "__main__":
    print(json.dumps({"argv": sys.argv[1:]}), file=sys.stderr)
    main()
