"""Write documents with questions to try fine-tuning on: English text in which it is told what uses what.

    python examples/make_questions.py data

The English is the haystack "builtin", the documentation of Python; `held-out.jsonl` has the part of it that
training never sees. Each document tells of a few things, each once, and is asked about all of them. Half of
the held-out documents, and in training as many as `--bare` says, consist of these facts alone.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from memlm.tasks.haystack import read_documents

# Common words of the text, so that a base trained on it knows them.
THINGS = "server client parser socket thread handler stream logger".split()
USED = "archive library directory package buffer cache table memory".split()
# Longer sentences are left out, so that facts stand at even distances.
LONGEST_SENTENCE = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--documents", type=int, default=3000, help="for training")
    parser.add_argument("--held-out", type=int, default=80, help="documents for evaluation")
    parser.add_argument("--facts", type=int, default=2, help="most facts of a document")
    parser.add_argument("--words", type=int, default=40, help="most words of text before a fact")
    parser.add_argument(
        "--bare", type=float, default=1, help="share of documents without text, in training"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, split, count, bare in (
        ("train", "train", arguments.documents, arguments.bare),
        ("held-out", "eval", arguments.held_out, 0.5),
    ):
        rng = np.random.default_rng([arguments.seed, split == "eval"])
        texts = [text.sentences for text in read_documents("builtin", split)]
        with (arguments.out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(count):
                facts = int(rng.integers(2, arguments.facts + 1))
                row = make_row(rng, texts, facts, arguments.words, bare)
                file.write(json.dumps(row) + "\n")
        print(f"{file.name}: {count} documents")


def make_row(
    rng: np.random.Generator, texts: list[list[str]], facts: int, words: int, bare: float
) -> dict[str, object]:
    """A document of `facts` facts with up to `words` words of text before each, and its questions.

    bare: how likely it is that there is no text.
    """
    document, questions = "", []
    length = int(np.exp(rng.uniform(np.log(10), np.log(words))))
    length *= int(rng.random() >= bare)
    things, parts = (rng.choice(known, facts, replace=False) for known in (THINGS, USED))
    for thing, used in zip(things, parts, strict=True):
        told = [*prose(rng, texts, length), f"The {thing} uses the {used}."]
        document = " ".join([document, *told] if document else told)
        questions.append({"question": f"What does the {thing} use?", "answer": str(used)})
    return {"document": " ".join([document, *prose(rng, texts, length)]), "questions": questions}


def prose(rng: np.random.Generator, texts: list[list[str]], words: int) -> Iterator[str]:
    """At least `words` words of short sentences that follow each other and name nothing of USED."""
    while words > 0:
        text = texts[rng.integers(len(texts))]
        for sentence in text[rng.integers(len(text)) :]:
            size = sentence.count(" ") + 1
            if (
                0 < words
                and size <= LONGEST_SENTENCE
                and not any(word in sentence for word in USED)
            ):
                words -= size
                yield sentence


if __name__ == "__main__":
    main()
