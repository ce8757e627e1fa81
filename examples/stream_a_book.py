"""Read a book into a memory of constant size, ask in between, and go on another day.

    python examples/stream_a_book.py book.txt --question "Where is Mary?" --save runs/book

Without --model, a small model that is shipped with memlm answers; it knows about places and people only.
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer

import memlm
from memlm import DocumentStream, MemLMForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("book", type=Path)
    parser.add_argument("--question", required=True)
    parser.add_argument("--model", help="folder or hub id of a memory model")
    parser.add_argument("--save", type=Path, help="folder to keep the stream in")
    arguments = parser.parse_args()

    if arguments.model is None:
        model, tokenizer = memlm.load_pretrained("qa1")
    else:
        model = MemLMForCausalLM.from_pretrained(arguments.model)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    stream = DocumentStream(model, tokenizer)
    asked = 1
    with arguments.book.open(encoding="utf-8") as lines:
        for line in lines:
            stream.write(line)
            if stream.tokens_seen >= 1000 * asked:
                # Asking changes nothing: the answer is read from a fork of the memory.
                print(f"{stream.tokens_seen:>8,} tokens: {stream.ask(arguments.question)}")
                asked *= 2
    print(f"{stream.tokens_seen:>8,} tokens, {stream.memory_bytes:,} bytes of memory")
    print(f"{arguments.question} {stream.ask(arguments.question)}")
    if arguments.save is not None:
        stream.save(arguments.save)
        again = DocumentStream.load(arguments.save, model, tokenizer)
        assert again.tokens_seen == stream.tokens_seen


if __name__ == "__main__":
    main()
