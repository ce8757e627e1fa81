"""Index a folder of texts once, and answer questions from the passages that are found.

    python examples/search_a_folder.py notes/ library --question "Where is Mary?"

The index is kept in the second folder and used again; the model reads what was found before the question.
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer

import memlm
from memlm import DocumentStream, MemLMForCausalLM
from memlm.retrieval import ChunkIndex, HashingEmbedder, RetrievalConfig, Retriever


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path)
    parser.add_argument("library", type=Path)
    parser.add_argument("--question", required=True)
    parser.add_argument("--model", help="folder or hub id of a memory model")
    arguments = parser.parse_args()

    if (arguments.library / "meta.json").exists():
        index = ChunkIndex.load(arguments.library, HashingEmbedder())
    else:
        index = ChunkIndex(HashingEmbedder())
        for path in sorted(arguments.texts.glob("*.txt")):
            paragraphs = [
                text for text in path.read_text(encoding="utf-8").split("\n\n") if text.strip()
            ]
            index.add(paragraphs, metadata=[{"file": path.name}] * len(paragraphs))
        index.save(arguments.library)
    for hit in index.search([arguments.question], 3)[0]:
        print(f"{hit.score:.3f} {hit.metadata['file']}: {hit.text[:80]}")

    if arguments.model is None:
        model, tokenizer = memlm.load_pretrained("qa1")
    else:
        model = MemLMForCausalLM.from_pretrained(arguments.model)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    stream = DocumentStream(model, tokenizer, Retriever(index, RetrievalConfig(k=2)))
    answer = stream.ask(arguments.question)
    print(f"{arguments.question} {answer} ({len(answer.sources)} passages shown)")


if __name__ == "__main__":
    main()
