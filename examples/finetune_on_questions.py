"""Give a model a memory, train both on your own documents and questions, and ask about a new document.

    python examples/finetune_on_questions.py HuggingFaceTB/SmolLM2-135M examples/questions.jsonl runs/mine \
        --document new.txt --question "Who has the key?" model.segment_length=64

Every line of the data is {"document": ..., "questions": [{"question": ..., "answer": ...}, ...]}.
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from memlm import DocumentStream, MemLMForCausalLM
from memlm.train import Recipe, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("overrides", nargs="*", help="recipe keys to change, as key=value")
    parser.add_argument("--document", type=Path, required=True)
    parser.add_argument("--question", required=True)
    arguments = parser.parse_intermixed_args()

    recipe = Recipe.for_data(arguments.base, arguments.data, "armt", arguments.overrides)
    result = train(recipe, arguments.out, on_outlook=lambda plan: print(*plan.lines(), sep="\n"))
    print(f"{result.steps} steps, loss {result.loss:.3f}")

    model = MemLMForCausalLM.from_pretrained(arguments.out)
    stream = DocumentStream(model, AutoTokenizer.from_pretrained(arguments.out))
    with arguments.document.open(encoding="utf-8") as lines:
        stream.write(lines)
    print(f"{arguments.question} {stream.ask(arguments.question)}")


if __name__ == "__main__":
    main()
