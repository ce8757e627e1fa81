"""Recipes: a training run as a YAML file, checked before anything heavy is imported."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
import re
import types
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from memlm.tasks.haystack import check_source
from memlm.train.curriculum import Stage
from memlm.train.options import BabilongOptions, described

SHIPPED = Path(__file__).parent.parent / "recipes"
# What may differ when a run is continued: it changes what is reported, not what is learned.
FREE = (
    "output_dir",
    "eval",
    "training.logging_steps",
    "training.save_steps",
    "training.save_total_limit",
    "training.report_to",
    "training.run_name",
)


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The model: a base, from a checkpoint or from scratch, and its memory."""

    base: str | None = described("hub id or path of the base model; null: from scratch", None)
    config: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "from scratch: model_type and fields of its transformers configuration"},
    )
    memory: str | dict[str, Any] | list[Any] | None = field(
        default="armt",
        metadata={"help": "a memory's name, a mapping of its name and fields, or a list of these"},
    )
    segment_length: int = described("tokens a segment", 512)
    init_from: str | None = described(
        "folder of a trained memory model to go on from, in place of base and config", None
    )
    init_std: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "from scratch: standard deviation of the weights whose name matches a pattern "
            "(a regular expression, searched), instead of the architecture's own"
        },
    )
    freeze_base: bool = described("train the memory alone", False)


@dataclass(frozen=True, kw_only=True)
class TokenizerSection:
    """The tokenizer."""

    source: str | None = described(
        "hub id or path, or 'train' for one trained on the data; null: the base model's", None
    )
    vocab_size: int = described("tokens of a trained tokenizer", 2048)


@dataclass(frozen=True, kw_only=True)
class DataSection(BabilongOptions):
    """The training data: BABILong made on the fly, or plain documents."""

    source: Literal["babilong", "documents"] = described(
        "babilong: questions about facts in text; documents: language modelling", "babilong"
    )
    haystack: str = described(
        "babilong: 'builtin', a text file or folder, or hub:ID[@CONFIG][:COLUMN]", "builtin"
    )
    path: str | None = described(
        "documents: a text file, a folder of them, or hub:ID[@CONFIG][:COLUMN]", None
    )
    skip_empty: bool = described(
        "documents: pass over empty rows and files instead of refusing them", False
    )
    split_special_tokens: bool = described(
        "documents: control tokens written out in a text are text; false makes them control tokens",
        True,
    )


@dataclass(frozen=True, kw_only=True)
class CurriculumSection:
    """The stages, and what ends one early."""

    stages: tuple[Stage, ...] = field(
        default=(Stage(max_segments=1),), metadata={"help": "the stages, in order"}
    )
    advance_on: Literal["training", "evaluation"] = described(
        "whose answers are compared with a stage's advance_at", "training"
    )
    score_window: int = described("training steps the running accuracy spans", 50)


@dataclass(frozen=True, kw_only=True)
class EvalSection:
    """What `memlm eval` asks of the finished model unless told otherwise."""

    tasks: tuple[str, ...] = described("bAbI tasks", ("qa1",))
    lengths: tuple[str, ...] = described("tokens of text, as '4k' or '1M'", ("0k", "4k", "16k"))
    samples: int = described("samples a task and length", 100)
    haystack: str = described("as in data", "builtin")
    batch_size: int = described("samples read side by side", 8)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run."""

    output_dir: str | None = described("folder of the finished model and its checkpoints", None)
    seed: int = described("seed of weights, tokenizer, data and dropout", 0)
    model: ModelSection = field(default_factory=ModelSection)
    tokenizer: TokenizerSection = field(default_factory=TokenizerSection)
    data: DataSection = field(default_factory=DataSection)
    curriculum: CurriculumSection = field(default_factory=CurriculumSection)
    training: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "any field of MemLMTrainingArguments (transformers' and ours)"},
    )
    eval: EvalSection = field(default_factory=EvalSection)

    def __post_init__(self) -> None:
        check_training(self.training)
        given = [
            name
            for name in ("base", "config", "init_from")
            if getattr(self.model, name) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                f"model names {' and '.join(given) or 'no model'}; give one of base (a "
                "checkpoint), config (from scratch) or init_from (a trained memory model)"
            )
        check_memory(self.model.memory)
        if self.model.segment_length < 1:
            raise ValueError(
                f"model.segment_length={self.model.segment_length} is no segment; give at least 1 "
                "token"
            )
        if self.model.config is not None and "model_type" not in self.model.config:
            raise ValueError("model.config has no model_type; give one, such as 'llama'")
        if self.tokenizer.source is None and self.model.config is not None:
            raise ValueError(
                "tokenizer.source is missing, and a model from scratch brings none; give 'train', "
                "a hub id or a path"
            )
        if self.data.source == "documents" and self.data.path is None:
            raise ValueError("data.path is missing; name the documents to train on")
        for index, stage in enumerate(self.curriculum.stages):
            self.options_of(stage, f"curriculum.stages.{index}.data")

    def options(self) -> BabilongOptions:
        """The data section's fields that shape a document."""
        names = [f.name for f in fields(BabilongOptions)]
        return BabilongOptions(**{name: getattr(self.data, name) for name in names})

    def options_of(self, stage: Stage, where: str) -> BabilongOptions:
        """The same with what `stage` changes."""
        if "question_template" in stage.data:
            raise ValueError(
                f"{where}.question_template cannot change within a run, whose model remembers one; "
                "set data.question_template"
            )
        own = {f.name: getattr(self.data, f.name) for f in fields(BabilongOptions)}
        return build(BabilongOptions, {**own, **stage.data}, where)

    def unread(self) -> list[str]:
        """What is set to no effect, as "key: why"; what is as it is by default is not set."""
        data, stages = self.data, self.curriculum.stages
        changed = [f.name for f in fields(data) if getattr(data, f.name) != f.default]
        composing = {"haystack", *(f.name for f in fields(BabilongOptions))}
        if data.source == "documents":
            of_stages = [
                f"curriculum.stages.{i}.data" for i, stage in enumerate(stages) if stage.data
            ]
            keys = [f"data.{name}" for name in changed if name in composing] + of_stages
            found = [f"{key}: is for data.source='babilong'" for key in keys]
        else:
            documents = [name for name in changed if name in ("path", "skip_empty")]
            found = [f"data.{name}: is for data.source='documents'" for name in documents]
            made = [self.options_of(stage, "") for stage in stages]
            found += [
                f"data.{name}: no stage's layout and retrieval read it"
                for name in changed
                if name in composing and not any(options.reads(name) for options in made)
            ]
            found += [
                f"curriculum.stages.{i}.data.{name}: its layout and retrieval do not read it"
                for i, (stage, options) in enumerate(zip(stages, made, strict=True))
                for name in stage.data
                if not options.reads(name)
            ]
        return found

    def asking(self) -> tuple[Literal["own", "open"], str]:
        """How the finished model is asked: the question's segment, and the template of passages.

        As the last stage asked it, and as the last that recalled passages showed them.
        """
        stages = [self.options_of(stage, "") for stage in self.curriculum.stages]
        last = stages[-1]
        shown = next((options for options in reversed(stages) if options.retrieval), last)
        # In a story without passages, the question is the last words of the document itself.
        own = last.layout != "story" or bool(last.retrieval)
        return "own" if own else "open", shown.recall_template

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe, or a shipped one by its name; `overrides` are "section.key=value".

        ValueError or FileNotFoundError name the first key, value or file that is wrong.
        """
        recipe = cls.from_dict(override(read_yaml(find(path)), overrides))
        recipe.check_files()
        return recipe

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """A recipe from plain values, all of them checked."""
        return build(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML has them."""
        return plain(asdict(self))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe, defaults included."""
        import yaml

        from memlm.files import write_atomically

        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @staticmethod
    def describe() -> str:
        """Every key of a recipe with its type, default and meaning, as a table."""
        return describe()

    def check_files(self) -> None:
        """Refuse files that are not there. FileNotFoundError or ValueError name the key."""
        for key, value in (
            ("model.base", self.model.base),
            ("model.init_from", self.model.init_from),
            ("tokenizer.source", self.tokenizer.source),
        ):
            if (
                value is not None
                and looks_like_path(value)
                and not Path(value).expanduser().exists()
            ):
                raise FileNotFoundError(
                    f"{key}={value!r} does not exist; name a folder or a hub id"
                )
        if self.data.source == "documents":
            path = self.data.path or ""
            if not path.startswith("hub:") and not Path(path).exists():
                raise FileNotFoundError(
                    f"data.path={path!r} does not exist; name a text file, a folder or 'hub:ID'"
                )
        else:
            try:
                check_source(self.data.haystack)
            except ValueError as error:
                raise FileNotFoundError(f"data.haystack: {error}") from error

    def differences(self, other: Recipe) -> list[str]:
        """What `other` has otherwise, as "key: mine, there theirs", but for what may change."""
        mine, theirs = flat(self.to_dict()), flat(other.to_dict())
        keys = [*mine, *(key for key in theirs if key not in mine)]
        return [
            f"{key}: {mine.get(key)!r}, there {theirs.get(key)!r}"
            for key in keys
            if mine.get(key) != theirs.get(key)
            and not any(key == free or key.startswith(f"{free}.") for free in FREE)
        ]


def describe() -> str:
    """Every key of a recipe with its type, default and meaning, as a table."""
    rows = list(_rows(Recipe, ""))
    rows += [(f"training.{name}", *about) for name, about in own_training_help().items()]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(
        f"{key:<{widths[0]}}  {kind:<{widths[1]}}  {meaning}" + (f" [{default}]" if default else "")
        for key, kind, default, meaning in rows
    )


def _rows(cls: Any, prefix: str) -> list[tuple[str, str, str, str]]:
    rows: list[tuple[str, str, str, str]] = []
    for item in fields(cls):
        hint = get_type_hints(cls)[item.name]
        key = f"{prefix}{item.name}"
        if is_dataclass(hint):
            rows += _rows(hint, f"{key}.")
            continue
        default = "" if item.default is MISSING else repr(item.default)
        if get_args(hint) and is_dataclass(get_args(hint)[0]):
            rows += _rows(get_args(hint)[0], f"{key}.N.")
            continue
        rows.append((key, type_name(hint), default, item.metadata.get("help", "")))
    return rows


def find(path: str | os.PathLike[str]) -> Path:
    """A recipe's file: a path, or the name of a shipped recipe."""
    given = Path(path)
    if given.is_file():
        return given
    shipped = {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}
    name = given.name.removesuffix(".yaml")
    if given.parent == Path(".") and name in shipped:
        return shipped[name]
    raise FileNotFoundError(
        f"recipe {os.fspath(path)!r} does not exist; give a YAML file, or one of "
        f"{', '.join(shipped)}"
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. ValueError names the line that cannot be read."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {str(path)!r} is not readable YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"recipe {str(path)!r} holds no mapping; write 'model:', 'data:' and so on"
        )
    return values


def parse_yaml(text: str) -> Any:
    """YAML with 1e-3 read as a number, which YAML 1.1 takes for text."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def override(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`values` with "section.key=value" put in; list entries go by number."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(
                f"override {text!r} has no 'key=value'; write training.learning_rate=1e-3"
            )
        parts = key.strip().split(".")
        place: Any = values
        for part in parts[:-1]:
            if isinstance(place, list) and part.isdigit() and int(part) < len(place):
                place = place[int(part)]
            elif isinstance(place, dict):
                if not isinstance(place.get(part), (dict, list)):
                    place[part] = {}
                place = place[part]
            else:
                raise ValueError(f"override {text!r}: {part!r} is in no section; check the key")
        if isinstance(place, list):
            if not parts[-1].isdigit() or int(parts[-1]) >= len(place):
                raise ValueError(
                    f"override {text!r}: the list has entries 0 to {len(place) - 1}; use one of "
                    "them"
                )
            place[int(parts[-1])] = parse_yaml(value)
        else:
            place[parts[-1]] = parse_yaml(value)
    return values


def build(cls: type, values: Any, where: str) -> Any:
    """`cls` from plain values. ValueError on an unknown key, with the nearest, or a wrong type."""
    if not isinstance(values, dict):
        raise ValueError(
            f"{where or 'recipe'}={values!r} should be a mapping; write its keys below it, indented"
        )
    hints = get_type_hints(cls)
    known = [item.name for item in fields(cls)]
    given = {}
    for key, value in values.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in known:
            raise ValueError(f"{name} is no key of a recipe; {nearest(str(key), known)}")
        given[key] = convert(hints[key], value, name)
    for item in fields(cls):
        missing = item.default is MISSING and item.default_factory is MISSING
        if missing and item.name not in given:
            raise ValueError(
                f"{where}.{item.name} is missing; give a {type_name(hints[item.name])}"
            )
    try:
        return cls(**given)
    except ValueError as error:
        # A check between fields: say which section's.
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def nearest(key: str, known: Sequence[str]) -> str:
    """A hint at the known key that is most like `key`."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"


def convert(hint: Any, value: Any, name: str) -> Any:
    """`value` as the type `hint`. ValueError naming key, value and what is expected."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if is_dataclass(hint):
        return build(hint, value, name)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        for option in args:
            try:
                return convert(option, value, name)
            except ValueError:
                continue
    elif hint is type(None):
        if value is None:
            return None
    elif origin is Literal:
        if value in args:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            several = len(args) == 2 and args[1] is Ellipsis
            if several or len(value) == len(args):
                inner = [args[0]] * len(value) if several else list(args)
                pairs = enumerate(zip(inner, value, strict=True))
                return tuple(convert(kind, item, f"{name}.{i}") for i, (kind, item) in pairs)
    elif hint is bool or origin is dict or origin is list:
        if isinstance(value, origin or hint):
            if origin is dict and args[1] is not Any:
                return {key: convert(args[1], item, f"{name}.{key}") for key, item in value.items()}
            return value
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, hint) and not isinstance(value, bool):
        return value
    raise ValueError(f"{name}={value!r} should be {type_name(hint)}; write {example(hint)}")


def type_name(hint: Any) -> str:
    """A type as a reader would say it."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(option) for option in args)
    if origin is Literal:
        return " or ".join(repr(option) for option in args)
    if origin in (tuple, list):
        return f"list of {type_name(args[0])}"
    if origin is dict or is_dataclass(hint):
        return "mapping"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "value"}
    return "null" if hint is type(None) else names.get(hint, str(hint))


def example(hint: Any) -> str:
    """A value of a type, as YAML has it."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return example(args[0])
    if origin is Literal:
        return str(args[0])
    if origin in (tuple, list):
        return f"[{example(args[0])}]"
    if origin is dict or is_dataclass(hint):
        return "{key: value}"
    return {int: "8", float: "0.1", str: "text", bool: "true"}.get(hint, "null")


@cache
def training_fields() -> dict[str, str]:
    """Fields of MemLMTrainingArguments and their types, read from the sources without importing."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations is not None
    source = Path(next(iter(spec.submodule_search_locations))) / "training_args.py"
    return {**_annotations(source, "TrainingArguments"), **own_training_fields()}


@cache
def own_training_fields() -> dict[str, str]:
    """What MemLMTrainingArguments adds."""
    return _annotations(Path(__file__).parent / "trainer.py", "MemLMTrainingArguments")


@cache
def own_training_help() -> dict[str, tuple[str, str, str]]:
    """Type, default and meaning of what MemLMTrainingArguments adds."""
    tree = ast.parse((Path(__file__).parent / "trainer.py").read_text(encoding="utf-8"))
    cls = next(
        n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "MemLMTrainingArguments"
    )
    found = {}
    for statement in cls.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.value, ast.Call):
            said = {k.arg: ast.literal_eval(k.value) for k in statement.value.keywords}
            name, kind = ast.unparse(statement.target), ast.unparse(statement.annotation)
            found[name] = (kind, repr(said["default"]), said["metadata"]["help"])
    return found


def _annotations(source: Path, name: str) -> dict[str, str]:
    tree = ast.parse(source.read_text(encoding="utf-8"))
    cls = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    return {
        statement.target.id: ast.unparse(statement.annotation)
        for statement in cls.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }


# Set from other sections of the recipe.
NOT_IN_TRAINING = {"output_dir": "output_dir", "seed": "seed", "data_seed": "seed"}
_SIMPLE = {"int": int, "float": float, "str": str, "bool": bool, "None": type(None)}


def check_training(values: dict[str, Any]) -> None:
    """Refuse unknown or mistyped fields of the training section."""
    known = training_fields()
    for key, value in values.items():
        if key in NOT_IN_TRAINING:
            raise ValueError(
                f"training.{key} belongs to the top; write {NOT_IN_TRAINING[key]}: there"
            )
        if key not in known:
            raise ValueError(
                f"training.{key} is no field of MemLMTrainingArguments; {nearest(key, list(known))}"
            )
        kinds = [part.strip() for part in known[key].split("|")]
        if all(kind in _SIMPLE for kind in kinds):
            hint: Any = _SIMPLE[kinds[0]]
            for kind in kinds[1:]:
                hint = hint | _SIMPLE[kind]
            convert(hint, value, f"training.{key}")


def check_memory(memory: Any) -> None:
    """Refuse a memory of an unknown name; its fields are checked when the model is made."""
    folder = Path(__file__).parent.parent / "memory"
    names = [f.stem.replace("_", "-") for f in sorted(folder.glob("*.py"))]
    known = ["none", *(name for name in names if name not in ("--init--", "base"))]
    for entry in memory if isinstance(memory, list) else [memory]:
        name = entry.get("name") if isinstance(entry, dict) else entry
        if name is not None and name not in known:
            hint = nearest(str(name), known)
            raise ValueError(f"model.memory={name!r} is not a known memory; {hint}")


def looks_like_path(value: str) -> bool:
    """Whether a name can only be a path: hub ids are "name" or "owner/name"."""
    return value.startswith((".", "/", "~")) or value.count("/") > 1 or "\\" in value


def plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict):
            found |= flat(value, f"{name}.")
        else:
            found[name] = value
    return found
