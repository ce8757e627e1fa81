"""How much of a stream's time its retrieval takes: chunking, embedding and indexing what is read.

A stream reads a document with and without an index, in turns; the share is what the index adds to the CPU
seconds of reading. On top, the time a question's search takes at the end.

    python benchmarks/stream_retrieval.py MODEL --tokens 1M
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memlm import DocumentStream
from memlm.files import write_json
from memlm.retrieval import ChunkIndex, HashingEmbedder
from memlm.retrieval.retriever import RetrievalConfig, Retriever
from memlm.tasks import babi
from memlm.tasks.babilong import compose, parse_length
from memlm.tasks.haystack.cache import tokenized_haystack

OUT = Path(__file__).parent / "results" / "stream_retrieval.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder of a memory model")
    parser.add_argument("--tokens", default="1M")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--factory", default="Flat")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    noise = tokenized_haystack("builtin", "eval", tokenizer)
    story = next(babi.generate("qa1", 1))
    tokens = parse_length(arguments.tokens)
    sample = compose(story, noise, tokens, tokenizer, np.random.default_rng(1))
    plain, recalling, searching = [], [], []
    for _ in range(arguments.rounds):
        plain.append(read(DocumentStream(model, tokenizer), sample))
        config = RetrievalConfig(size=arguments.chunk_size)
        index = ChunkIndex(HashingEmbedder(), factory=arguments.factory)
        stream = DocumentStream(model, tokenizer, Retriever(index, config))
        recalling.append(read(stream, sample))
        began = time.process_time()
        stream.retriever.recall(story.question)
        searching.append(time.process_time() - began)
    shares = [1 - p / r for p, r in zip(plain, recalling, strict=True)]
    result = {
        "settings": {
            k: Path(v).name if k == "model" else v for k, v in vars(arguments).items() if k != "out"
        },
        "tokens": tokens,
        "chunks": len(index),
        "index_bytes": index.bytes,
        "plain_cpu_seconds": plain,
        "recalling_cpu_seconds": recalling,
        "share": statistics.median(shares),
        "first_search_cpu_seconds": searching,
    }
    print(result)
    write_json(arguments.out, result)
    print(f"written: {arguments.out}")


def read(stream: DocumentStream, sample) -> float:
    began = time.process_time()
    stream.write(iter(sample))
    if stream.retriever is not None:
        stream.retriever.flush()
    return time.process_time() - began


if __name__ == "__main__":
    main()
