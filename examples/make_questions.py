"""Write documents with questions to try fine-tuning on: English text in which it is told where things are.

    python examples/make_questions.py data

The English is the haystack "builtin", the documentation of Python; `held-out.jsonl` has the part of it that
training never sees. Each document tells of a few things, each once, and is asked about all of them when it
has been read, and, in training, about each one right after it was told.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from memlm.tasks.haystack import read_documents

# Common words of the text, so that a base trained on it knows them.
THINGS = "server client parser socket thread handler stream logger".split()
PLACES = "archive library directory package buffer cache table memory".split()
# Longer sentences are left out, so that facts stand at even distances.
LONGEST_SENTENCE = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--documents", type=int, default=3000, help="for training")
    parser.add_argument("--held-out", type=int, default=64, help="documents for evaluation")
    parser.add_argument("--facts", type=int, default=8, help="most facts of a document")
    parser.add_argument("--words", type=int, default=50, help="most words of text before a fact")
    parser.add_argument("--bare", type=float, default=0.5, help="share of documents of facts alone")
    parser.add_argument("--longest", type=int, default=400, help="the same in evaluation")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, split, count, longest, bare in (
        ("train", "train", arguments.documents, arguments.words, arguments.bare),
        ("held-out", "eval", arguments.held_out, arguments.longest, 0),
    ):
        rng = np.random.default_rng([arguments.seed, split == "eval"])
        texts = [text.sentences for text in read_documents("builtin", split)]
        with (arguments.out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(count):
                facts = int(rng.integers(2, arguments.facts + 1))
                row = make_row(rng, texts, facts, longest, bare, split == "train")
                file.write(json.dumps(row) + "\n")
        print(f"{file.name}: {count} documents")


def make_row(
    rng: np.random.Generator,
    texts: list[list[str]],
    facts: int,
    longest: int,
    bare: float,
    at_once: bool,
) -> dict[str, object]:
    """A document of `facts` facts with up to `longest` words before each, and its questions.

    bare: how likely it is that there are none. at_once: ask about each thing also right after it was told.
    """
    document, questions = "", []
    length = int(np.exp(rng.uniform(np.log(10), np.log(longest))))
    length *= int(rng.random() >= bare)
    things, places = (rng.choice(words, facts, replace=False) for words in (THINGS, PLACES))
    for thing, place in zip(things, places, strict=True):
        told = [*prose(rng, texts, length), f"The {thing} is now in the {place}."]
        document = " ".join([document, *told] if document else told)
        question = {"question": f"Where is the {thing}?", "answer": str(place)}
        questions += [{**question, "at": len(document)}] if at_once else []
        questions.append(question)
    return {"document": " ".join([document, *prose(rng, texts, length)]), "questions": questions}


def prose(rng: np.random.Generator, texts: list[list[str]], words: int) -> Iterator[str]:
    """Sentences that follow each other somewhere, of at least `words` words; short ones that name no place."""
    while words > 0:
        text = texts[rng.integers(len(texts))]
        for sentence in text[rng.integers(len(text)) :]:
            size = sentence.count(" ") + 1
            if 0 < words and size <= LONGEST_SENTENCE and not any(p in sentence for p in PLACES):
                words -= size
                yield sentence


if __name__ == "__main__":
    main()
