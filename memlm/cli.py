"""The `memlm` command: thin over the functions of the package.

torch and transformers are imported when a command needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memlm import __version__

EXAMPLES = """\
examples:
  memlm demo
  memlm train tiny-armt-qa1 --out runs/tiny training.learning_rate=1e-3
  memlm eval runs/tiny --tasks qa1 --lengths 0k 4k 128k --samples 100 --out runs/tiny/eval
  memlm ask runs/tiny book.txt notes.txt -q "Where is Mary?"
  memlm index build library book.txt notes.txt
  memlm ask runs/tiny --index library -q "Where is Mary?"
  memlm data babilong --tasks qa1 qa2 --lengths 4k --samples 100 --out data/mine
"""


# What a recipe may say of an evaluation, and what holds where it does not.
EVALUATED = {
    "tasks": ["qa1"],
    "lengths": ["0k", "4k"],
    "samples": 100,
    "haystack": "builtin",
    "batch_size": 8,
}

COMMANDS_OF_TWO = (
    "eval compare",
    "eval report",
    "eval perplexity",
    "index build",
    "index add",
    "index search",
    "index info",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 done, 1 failed, 2 a mistake of the user, 130 interrupted."""
    arguments = argparse.Namespace(debug=False)
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        print("\nmemlm: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has left; nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError) as error:
        if arguments.debug:
            raise
        print(f"memlm: error: {error}", file=sys.stderr)
        return 2


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """What was typed. SystemExit on what cannot be understood, and behind --help and --keys."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(_joined(argv))
    late = getattr(arguments, "late", None)
    if rest and (late is None or any(value.startswith("-") for value in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if late is not None:
        # argparse gives up on a list of positionals once an option has interrupted it.
        setattr(arguments, late, [*getattr(arguments, late), *map(arguments.kind_of_late, rest)])
    return arguments


def _joined(argv: Sequence[str]) -> list[str]:
    """Make one word of `eval compare` and the like, which argparse takes for a command and a model.

    Each of them is told of a folder at least, so where none follows and a model lies in a folder of that
    name, it is the model that is meant.
    """
    two = " ".join(argv[:2])
    if two not in COMMANDS_OF_TWO:
        return list(argv)
    named = (Path(argv[1]) / "config.json").is_file()
    if named and (len(argv) == 2 or argv[2].startswith("-")):
        return list(argv)
    return [two, *argv[2:]]


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says defaults, but for those that the help says in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "(default: " in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class _Keys(argparse.Action):
    """Prints the keys of a recipe, whatever else is given, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from memlm.train import Recipe

        print(Recipe.describe())
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="memlm",
        description="A memory that never fills up, for any Hugging Face causal language model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"memlm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, help: str, run: Any, **kwargs: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            parents=[shared],
            formatter_class=_Help,
            **kwargs,
        )
        sub.set_defaults(run=run)
        return sub

    train = command("train", "train a memory model from a recipe", _train)
    train.add_argument("recipe", help="a YAML file, or the name of a recipe shipped with memlm")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    train.set_defaults(late="overrides", kind_of_late=str)
    train.add_argument("--out", type=Path, help="folder of the run (default: the recipe's own)")
    train.add_argument(
        "--no-resume",
        action="store_true",
        help="start over in a folder that holds a run, instead of going on with it",
    )
    train.add_argument("--keys", action=_Keys, nargs=0, help="print every key of a recipe and exit")

    evaluate = command(
        "eval",
        "evaluate any causal language model on BABILong and probes, at any length",
        _evaluate,
    )
    evaluate.add_argument("model", help="folder or hub id of a model, with or without memory")
    _add_samples(evaluate, "the recipe's that the model was trained by, else ")
    evaluate.add_argument(
        "--data",
        help="samples in the published layout, a folder or hub id such as RMT-team/babilong, in place "
        "of composed ones",
    )
    evaluate.add_argument(
        "--baseline",
        type=_baseline,
        choices=["model", "last-tokens", "full", "window", "retrieval"],
        help="who reads: the model itself (the default: into its memory; as full where it has none), or "
        "the base model, which sees the last tokens alone, everything, a sliding window, or retrieved "
        "passages",
    )
    evaluate.add_argument(
        "--window",
        type=int,
        help="tokens that --baseline last-tokens and window see (default: a segment)",
    )
    evaluate.add_argument(
        "--retrieval", type=int, metavar="K", help="recall K passages in front of the question"
    )
    evaluate.add_argument("--chunk-size", type=int, help="words of a passage (default: 64)")
    evaluate.add_argument("--hops", type=int, help="searches for each question (default: 1)")
    evaluate.add_argument(
        "--prompt",
        help="answer (document, then question), instruction, chat, or a YAML file of prompts "
        "(default: answer for models of memlm, chat or instruction for others)",
    )
    evaluate.add_argument("--out", type=Path, required=True, help="folder for the results")
    evaluate.add_argument(
        "--batch-size",
        type=int,
        help="samples read side by side (default: the recipe's that the model was trained by, else 8)",
    )
    evaluate.add_argument(
        "--max-new-tokens",
        type=int,
        help="longest answer (default: what a run in --out has, else 20)",
    )
    _add_device(evaluate)

    compare = command(
        "eval compare", "say whether two evaluations of the same samples differ", _compare
    )
    compare.add_argument("a", type=Path, help="folder of an evaluation")
    compare.add_argument("b", type=Path, help="folder of another one")

    report = command(
        "eval report", "draw evaluations side by side: pictures, tables, a page", _report
    )
    report.add_argument(
        "runs", nargs="+", metavar="[NAME=]DIR", help="folders of evaluations, named as you like"
    )
    report.add_argument("--out", type=Path, required=True, help="folder for the report")

    perplexity = command(
        "eval perplexity", "measure whether loss keeps falling along long documents", _perplexity
    )
    perplexity.add_argument("model", help="folder or hub id of a model, with or without memory")
    perplexity.add_argument(
        "--haystack", default="builtin", help="builtin, a text file or folder, or hub:ID"
    )
    perplexity.add_argument("--length", default="64k", help="tokens of each document")
    perplexity.add_argument("--documents", type=int, default=8, help="how many documents")
    perplexity.add_argument(
        "--segment-length", type=int, help="tokens a model without memory reads at a time"
    )
    perplexity.add_argument("--seed", type=int, default=0, help="seed of the choice of documents")
    perplexity.add_argument("--batch-size", type=int, default=4, help="documents read side by side")
    perplexity.add_argument("--out", type=Path, required=True, help="folder for the results")
    _add_device(perplexity)

    ask = command("ask", "read files into a memory, and ask", _ask)
    ask.add_argument("model", help="folder or hub id of a memory model")
    ask.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="UTF-8 text files, in order"
    )
    ask.set_defaults(late="files", kind_of_late=Path)
    ask.add_argument(
        "-q", "--question", action="append", required=True, help="what to ask; may be repeated"
    )
    ask.add_argument("--max-new-tokens", type=int, default=32, help="longest answer")
    ask.add_argument("--load", type=Path, metavar="DIR", help="go on with a stream saved there")
    ask.add_argument(
        "--index", type=Path, metavar="DIR", help="recall passages of this index before answering"
    )
    ask.add_argument(
        "--recall", type=int, metavar="K", help="recall K passages for a question (default: 4)"
    )
    ask.add_argument(
        "--save", type=Path, metavar="DIR", help="keep the stream, after reading, there"
    )
    _add_device(ask)

    for name, help, run in (
        ("index build", "cut text files into chunks and index them for recall", _index_build),
        ("index add", "add text files to an index", _index_add),
    ):
        index = command(name, help, run)
        index.add_argument("index", type=Path, metavar="DIR", help="folder of the index")
        index.add_argument("files", nargs="+", type=Path, metavar="FILE", help="UTF-8 text files")
        index.add_argument("--chunk-size", type=int, default=64, help="words of a chunk")
        index.add_argument("--overlap", type=int, default=0, help="words repeated in the next one")
        if run is _index_build:
            index.add_argument(
                "--factory", default="Flat", help="FAISS's name of a kind: Flat, SQ8, HNSW32, ..."
            )
    search = command("index search", "search an index", _index_search)
    search.add_argument("index", type=Path, metavar="DIR", help="folder of the index")
    search.add_argument("query", nargs="+", help="what to look for; each is searched by itself")
    search.add_argument("-k", type=int, default=5, help="chunks for each query")
    search.add_argument(
        "--where",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="only chunks with this metadata; of one KEY given twice either VALUE will do",
    )
    info = command("index info", "say what an index holds", _index_info)
    info.add_argument("index", type=Path, metavar="DIR", help="folder of the index")

    data = command("data", "write a data set in the layout others read", _data)
    data.add_argument("kind", choices=["babilong"], help="which data set")
    _add_samples(data)
    data.set_defaults(**{name: value for name, value in EVALUATED.items() if name != "batch_size"})
    data.add_argument("--out", type=Path, required=True, help="folder for data/TASK/LENGTH.json")
    data.add_argument(
        "--tokenizer", default="words", help="folder or hub id whose tokens count, or 'words'"
    )
    data.add_argument("--format", choices=["json", "parquet"], default="json", help="of the files")
    data.add_argument(
        "--reserve", type=int, default=0, help="tokens of a length left free (published: 300)"
    )
    data.add_argument(
        "--share",
        type=float,
        default=1.0,
        help="facts and questions allowed for each token of the rest (published: 0.125, ARMT: 0.2)",
    )
    data.add_argument("--overwrite", action="store_true", help="make files again that are there")

    demo = command("demo", "train a small memory model and question it at a million tokens", _demo)
    demo.add_argument("--out", type=Path, default=Path("demo-run"), help="folder of the run")
    demo.add_argument("--seed", type=int, default=0, help="seed of weights, data and samples")
    demo.add_argument(
        "--ask", type=Path, metavar="FILE", help="also ask about a text file of yours"
    )
    demo.add_argument("-q", "--question", help="the question about --ask FILE")
    demo.add_argument(
        "--quick", action="store_true", help="a minute's version: trains too little to answer well"
    )
    return parser


def _add_samples(parser: argparse.ArgumentParser, first: str = "") -> None:
    """first: where defaults are looked for before `EVALUATED`."""

    def default(name: str) -> str:
        value = EVALUATED[name]
        return f" (default: {first}{' '.join(value) if isinstance(value, list) else value})"

    parser.add_argument(
        "--tasks",
        nargs="+",
        help="qa1 to qa20, or probes: passkey recall-8 s-niah-1" + default("tasks"),
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        help="tokens of context: 0k 4k 128k 1M ..." + default("lengths"),
    )
    parser.add_argument(
        "--samples", type=int, help="samples per task and length" + default("samples")
    )
    parser.add_argument(
        "--haystack", help="builtin, a text file or folder, or hub:ID" + default("haystack")
    )
    parser.add_argument(
        "--stories", default="generated", help="generated, or a folder of bAbI's own files"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    parser.add_argument(
        "--position",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="keep the facts between two fractions of the document",
    )
    parser.add_argument(
        "--distance", type=int, help="tokens from the earliest supporting fact to the question"
    )
    parser.add_argument(
        "--composition",
        choices=["exact", "published"],
        default="exact",
        help="exact: 4k is 4,096 tokens of facts and noise; published: lengths, facts and noise by the "
        "rules of the published code (4k is 4,000 less 300)",
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... or auto")


def _train(arguments: argparse.Namespace) -> None:
    from memlm.train import Recipe, train

    recipe = Recipe.load(arguments.recipe, overrides=arguments.overrides)
    result = train(recipe, arguments.out, resume=False if arguments.no_resume else "auto")
    if not result.finished:
        raise KeyboardInterrupt
    accuracy = "" if result.accuracy is None else f", {result.accuracy:.0%} of answers right"
    loss = "" if result.loss is None else f", loss {result.loss:.3f}"
    print(f"{result.steps} steps in {result.seconds:.0f} s{loss}{accuracy}")
    _written(result.files)


def _load(arguments: argparse.Namespace, memory: bool = True) -> tuple[Any, Any]:
    """The model and tokenizer that were named; with `memory`, others than memlm's are refused."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from memlm import MemLMForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name = arguments.model
    folder = Path(name)
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"model={name!r} does not exist; give a folder or a hub id")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"model={name!r} has no config.json; give the folder of a saved model")
    if arguments.dtype != "auto" and not isinstance(
        getattr(torch, arguments.dtype, None), torch.dtype
    ):
        raise ValueError(f"dtype={arguments.dtype!r} is unknown; use float32, bfloat16 or auto")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(name, dtype=arguments.dtype)
    if memory and not isinstance(model, MemLMForCausalLM):
        raise ValueError(
            f"model={name!r} is a {type(model).__name__} without memory; "
            "give a model saved by memlm, or wrap it with MemLMForCausalLM.from_base and train it"
        )
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name)


def _evaluate(arguments: argparse.Namespace) -> None:
    from memlm.eval import evaluate

    retrieval = _passages(arguments)
    asked = _asked(arguments)
    model, tokenizer = _load(arguments, memory=False)
    report = evaluate(
        model,
        tokenizer,
        tasks=asked["tasks"],
        lengths=asked["lengths"],
        samples=asked["samples"],
        haystack=asked["haystack"],
        stories=arguments.stories,
        data=arguments.data,
        out=arguments.out,
        baseline=arguments.baseline,
        window=arguments.window,
        prompt=arguments.prompt,
        position=tuple(arguments.position),
        distance=arguments.distance,
        composition=arguments.composition,
        retrieval=retrieval,
        batch_size=asked["batch_size"],
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
        progress=True,
    )
    print(report.to_markdown())
    _written(report.files)


def _baseline(word: str) -> str:
    """A baseline by its present word, with a note where it was typed by a former one."""
    from memlm.eval.running.baselines import present_word

    return present_word(word)


def _passages(arguments: argparse.Namespace) -> Any:
    """What is recalled in front of a question; None for nothing."""
    from memlm.eval.running.runner import RECALLED
    from memlm.retrieval.retriever import RetrievalConfig

    k = arguments.retrieval
    if k is None and arguments.baseline == "retrieval":
        k = RECALLED
    how = {"size": arguments.chunk_size, "hops": arguments.hops}
    given = {name: value for name, value in how.items() if value is not None}
    if k is None and given:
        raise ValueError(
            "--chunk-size and --hops say how passages are recalled, and none are; add --retrieval K, or "
            "leave them out"
        )
    return None if k is None else RetrievalConfig(k=k, **given)


def _asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is asked: what was typed, else the recipe in the model's folder, else `EVALUATED`."""
    typed = {name: getattr(arguments, name) for name in EVALUATED}
    typed = {name: value for name, value in typed.items() if value is not None}
    path = Path(arguments.model) / "recipe.yaml"
    if not path.is_file():
        return {**EVALUATED, **typed}
    from memlm.train.recipe import EvalSection, build, plain, read_yaml

    said = read_yaml(path).get("eval") or {}
    section = build(EvalSection, said, "eval")
    found = {name: plain(getattr(section, name)) for name in said if name not in typed}
    if arguments.data is not None:
        found.pop("haystack", None)
    if found:
        told = ", ".join(f"{name} {value}" for name, value in found.items())
        print(f"memlm: as {path} says: {told}", file=sys.stderr)
    return {**EVALUATED, **found, **typed}


def _compare(arguments: argparse.Namespace) -> None:
    from memlm.eval.reporting.compare import compare

    print(compare(arguments.a, arguments.b).to_markdown())


def _report(arguments: argparse.Namespace) -> None:
    from memlm.eval.reporting.page import write_report
    from memlm.eval.reporting.report import name_runs

    _written(write_report(name_runs(arguments.runs), arguments.out))


def _perplexity(arguments: argparse.Namespace) -> None:
    from memlm.eval.losses.measure import perplexity

    model, tokenizer = _load(arguments, memory=False)
    report = perplexity(
        model,
        tokenizer,
        arguments.haystack,
        arguments.length,
        arguments.documents,
        segment_length=arguments.segment_length,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        out=arguments.out,
        progress=True,
    )
    print(report.to_markdown())
    _written(report.files)


def _ask(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from memlm.text import check_text_file, read_text

    files = [check_text_file(path) for path in arguments.files]
    if not files and arguments.load is None and arguments.index is None:
        raise ValueError(
            "no FILE to read; name text files, a saved stream with --load DIR or an index with "
            "--index DIR"
        )
    retriever = _retriever(arguments)
    model, tokenizer = _load(arguments)
    from memlm import DocumentStream

    if arguments.load is not None:
        stream = DocumentStream.load(arguments.load, model, tokenizer)
    else:
        stream = DocumentStream(model, tokenizer, retriever)
    total = sum(path.stat().st_size for path in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", delay=1, leave=False) as bar:
        for path in files:
            stream.write(read_text(path, bar.update), document=str(path))
    print(
        f"{stream.tokens_seen:,} tokens read, {stream.memory_bytes:,} bytes of memory", flush=True
    )
    for question in arguments.question:
        answer = stream.ask(question, max_new_tokens=arguments.max_new_tokens)
        print(f"{question}\n  {answer}")
        for passage in answer.sources:
            print(f"    from {_where(passage.document, passage.start)}: {_short(passage.text)}")
    if arguments.save is not None:
        stream.save(arguments.save)
        _written([arguments.save])


def _retriever(arguments: argparse.Namespace) -> Any:
    """What `ask` recalls from: an index that was named, or one of what it reads."""
    if arguments.index is None and arguments.recall is None:
        return None
    if arguments.load is not None:
        raise ValueError(
            "--load goes on with the stream's own index; leave out --index and --recall"
        )
    from memlm.retrieval import ChunkIndex, HashingEmbedder
    from memlm.retrieval.retriever import RetrievalConfig, Retriever

    config = RetrievalConfig() if arguments.recall is None else RetrievalConfig(k=arguments.recall)
    if arguments.index is None:
        return Retriever(ChunkIndex(HashingEmbedder()), config)
    return Retriever(ChunkIndex.load(arguments.index, HashingEmbedder()), config)


def _index_build(arguments: argparse.Namespace) -> None:
    from memlm.retrieval import ChunkIndex, HashingEmbedder

    if arguments.index.exists() and any(arguments.index.iterdir()):
        raise ValueError(
            f"index={str(arguments.index)!r} exists; use `memlm index add`, or another folder"
        )
    _index_files(ChunkIndex(HashingEmbedder(), factory=arguments.factory), arguments)


def _index_add(arguments: argparse.Namespace) -> None:
    from memlm.retrieval import ChunkIndex, HashingEmbedder

    _index_files(ChunkIndex.load(arguments.index, HashingEmbedder()), arguments)


def _index_files(index: Any, arguments: argparse.Namespace) -> None:
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
    _written([arguments.index])


def _index_search(arguments: argparse.Namespace) -> None:
    from memlm.retrieval import ChunkIndex, HashingEmbedder

    where: dict[str, list[Any]] = {}
    for pair in arguments.where:
        key, mark, value = pair.partition("=")
        if not key or not mark:
            raise ValueError(f"where={pair!r} must be KEY=VALUE")
        where.setdefault(key, []).extend(_meant(value))
    index = ChunkIndex.load(arguments.index, HashingEmbedder())
    found = index.search(arguments.query, k=arguments.k, where=where or None)
    for query, hits in zip(arguments.query, found, strict=True):
        print(query)
        for hit in hits:
            place = _where(hit.metadata.get("document"), hit.metadata.get("start"))
            print(f"  {hit.score:.4f}  {place}: {_short(hit.text)}")


def _meant(typed: str) -> list[Any]:
    """What a word may stand for in metadata: itself, and the number, flag or nothing it names."""
    try:
        value = json.loads(typed)
    except ValueError:
        return [typed]
    plain = value is None or (isinstance(value, bool | int | float) and math.isfinite(value))
    return [typed, value] if plain else [typed]


def _index_info(arguments: argparse.Namespace) -> None:
    from memlm.retrieval import ChunkIndex, HashingEmbedder

    for key, value in ChunkIndex.load(arguments.index, HashingEmbedder()).info().items():
        print(f"{key}: {value}")


def _where(document: str | None, start: int | None) -> str:
    return f"{document or 'what was read'}{'' if start is None else f', character {start:,}'}"


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 160 else f"{flat[:157]}..."


def _data(arguments: argparse.Namespace) -> None:
    from memlm.tasks import babilong

    _written(
        babilong.write(
            arguments.out,
            tasks=arguments.tasks,
            lengths=arguments.lengths,
            samples=arguments.samples,
            haystack=arguments.haystack,
            stories=arguments.stories,
            tokenizer=arguments.tokenizer,
            seed=arguments.seed,
            format=arguments.format,
            position=tuple(arguments.position),
            distance=arguments.distance,
            reserve=arguments.reserve,
            share=arguments.share,
            composition=arguments.composition,
            overwrite=arguments.overwrite,
        )
    )


def _demo(arguments: argparse.Namespace) -> None:
    from memlm.demo import demo

    _written(
        demo(
            arguments.out,
            seed=arguments.seed,
            quick=arguments.quick,
            file=arguments.ask,
            question=arguments.question,
        )
    )


def _written(paths: Any) -> None:
    for path in paths:
        print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
