"""A recipe: a training run in plain values, checked before anything heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from memlm.data.opening import looks_like_file
from memlm.tasks.haystack import check_source
from memlm.tasks.haystack.sources import CARRIED
from memlm.train.curriculum import Stage
from memlm.train.options import BabilongOptions, described
from memlm.train.recipe.binding import bind, did_you_mean, dotted, plain
from memlm.train.recipe.own import own_data
from memlm.train.recipe.reading import find_recipe, override, read_yaml
from memlm.train.recipe.sections import (
    CurriculumSection,
    DataSection,
    EvalSection,
    ModelSection,
    TokenizerSection,
)
from memlm.train.recipe.table import describe_keys
from memlm.train.recipe.training import check_training

MEMORIES = Path(__file__).parent.parent.parent / "memory"
# Keys of the data section that only some sources read.
READ_FROM = {
    "path": ("documents", "rows"),
    "skip_empty": ("documents",),
    "split": ("rows",),
    "eval_path": ("documents", "rows"),
    "eval_split": ("rows",),
}
# Keys that may differ when a run is continued: they change what is reported, not what is learned.
MAY_DIFFER = (
    "output_dir",
    "eval",
    "training.logging_steps",
    "training.save_steps",
    "training.save_total_limit",
    "training.report_to",
    "training.run_name",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run."""

    output_dir: str | None = described("folder of the finished model and its checkpoints", None)
    # As numpy takes it.
    seed: Annotated[int, Field(ge=0, lt=2**32)] = described(
        "seed of weights, tokenizer, data and dropout", 0
    )
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
        if self.model.config is not None and "model_type" not in self.model.config:
            raise ValueError("model.config has no model_type; give one, such as 'llama'")
        if self.tokenizer.source is None and self.model.config is not None:
            raise ValueError(
                "tokenizer.source is missing, and a model from scratch brings none; give 'train', "
                "a hub id or a path"
            )
        if self.data.source != "babilong" and self.data.path is None:
            raise ValueError(f"data.path is missing; name the {self.data.source} to train on")
        check_base(self.model)
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
        return bind(BabilongOptions, {**own, **stage.data}, where)

    def unread(self) -> list[str]:
        """Keys that are set without effect, as "key: why"; a key left at its default counts as not set."""
        data, stages = self.data, self.curriculum.stages
        changed = [f.name for f in fields(data) if getattr(data, f.name) != f.default]
        composing = {"haystack", *(f.name for f in fields(BabilongOptions))}
        found = [
            f"data.{name}: is for data.source={' or '.join(map(repr, sources))}"
            for name, sources in READ_FROM.items()
            if name in changed and data.source not in sources
        ]
        if not self.evaluates:
            found += [
                f"data.{name}: is for training.eval_strategy, which is not set"
                for name in ("eval_path", "eval_split")
                if name in changed
            ]
        if data.source != "babilong":
            of_stages = [
                f"curriculum.stages.{i}.data" for i, stage in enumerate(stages) if stage.data
            ]
            if data.source == "rows":
                composing.remove("question_template")
            keys = [f"data.{name}" for name in changed if name in composing] + of_stages
            found += [f"{key}: is for data.source='babilong'" for key in keys]
        else:
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

    @property
    def evaluates(self) -> bool:
        """Whether the training section asks for evaluations on the way."""
        # A bare `no` is false in YAML.
        return self.training.get("eval_strategy", "no") not in ("no", False, None)

    def asking(self) -> tuple[Literal["own", "open"], str]:
        """How the finished model is asked: the question's segment, and the template of passages.

        The first is that of the last stage, the second that of the last stage that recalled passages.
        """
        stages = [self.options_of(stage, "") for stage in self.curriculum.stages]
        last = stages[-1]
        shown = next((options for options in reversed(stages) if options.retrieval), last)
        # In a story without passages, the question is the end of the document itself.
        own = last.layout != "story" or bool(last.retrieval)
        return "own" if own else "open", shown.recall_template

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe, or a shipped one by its name; `overrides` are "section.key=value".

        ValueError or FileNotFoundError name the first key, value or file that is wrong.
        """
        recipe = cls.from_dict(override(read_yaml(find_recipe(path)), overrides))
        recipe.check_files()
        return recipe

    @classmethod
    def for_data(
        cls, base: str, data: str, memory: Any = None, overrides: Sequence[str] = ()
    ) -> Recipe:
        """A recipe that gives the model `base` a memory ("armt" by default) and trains on rows of `data`.

        A folder of a model with a memory, or the name of a shipped one, is trained on as it is.
        """
        values = own_data(base, data, memory)
        if any(
            text.partition("=")[0].strip() == "training.muon_learning_rate" for text in overrides
        ):
            # Both would set the rate of the memory's matrices.
            del values["training"]["memory_learning_rate"]
        recipe = cls.from_dict(override(values, overrides))
        recipe.check_files()
        return recipe

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """A recipe from plain values, all of them checked."""
        return bind(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML has them."""
        return plain(asdict(self))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe, defaults included."""
        import yaml

        from memlm.files import write_text

        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        write_text(path, text)

    @staticmethod
    def describe() -> str:
        """Every key of a recipe with its type, default and meaning, as a table."""
        return describe_keys(Recipe)

    def check_files(self) -> None:
        """Refuse files that are not there. FileNotFoundError or ValueError name the key."""
        for key, value in (
            ("model.base", self.model.base),
            ("model.init_from", self.model.init_from),
            ("tokenizer.source", self.tokenizer.source),
            ("model.init_memory", self.model.init_memory),
        ):
            if (
                value is not None
                and looks_like_path(value)
                and not Path(value).expanduser().exists()
            ):
                raise FileNotFoundError(
                    f"{key}={value!r} does not exist; name a folder or a hub id"
                )
        template = self.tokenizer.chat_template
        if template is not None and not Path(template).expanduser().is_file():
            raise FileNotFoundError(
                f"tokenizer.chat_template={template!r} does not exist; name a file with a template"
            )
        paths = {"path": self.data.path or ""}
        if self.data.eval_path is not None:
            paths["eval_path"] = self.data.eval_path
        if self.data.source == "rows":
            for key, path in paths.items():
                if looks_like_file(path) and not Path(path).expanduser().exists():
                    raise FileNotFoundError(
                        f"data.{key}={path!r} does not exist; name a file, a folder or a data set of the "
                        "hub"
                    )
        elif self.data.source == "documents":
            for key, path in paths.items():
                named = path in CARRIED or path.startswith("hub:")
                if not named and not Path(path).exists():
                    raise FileNotFoundError(
                        f"data.{key}={path!r} does not exist; name 'builtin', 'installed', a text file, a "
                        "folder or 'hub:ID'"
                    )
        else:
            try:
                check_source(self.data.haystack)
            except ValueError as error:
                raise FileNotFoundError(f"data.haystack: {error}") from error

    def differences(self, other: Recipe) -> list[str]:
        """How `other` differs, as "key: mine, there theirs"; keys that may differ are left out."""
        mine, theirs = dotted(self.to_dict()), dotted(other.to_dict())
        keys = [*mine, *(key for key in theirs if key not in mine)]
        return [
            f"{key}: {mine.get(key)!r}, there {theirs.get(key)!r}"
            for key in keys
            if mine.get(key) != theirs.get(key)
            and not any(key == free or key.startswith(f"{free}.") for free in MAY_DIFFER)
        ]


def check_memory(memory: Any) -> None:
    """Refuse a memory of an unknown name; its fields are checked when the model is made."""
    names = [f.stem.replace("_", "-") for f in sorted(MEMORIES.glob("*.py"))]
    known = ["none", *(name for name in names if name not in ("--init--", "base"))]
    for entry in memory if isinstance(memory, list) else [memory]:
        name = entry.get("name") if isinstance(entry, dict) else entry
        if name is not None and name not in known:
            hint = did_you_mean(str(name), known)
            raise ValueError(f"model.memory={name!r} is not a known memory; {hint}")


def check_base(model: ModelSection) -> None:
    """Refuse settings of the base that contradict each other."""
    quantization = model.quantization
    if isinstance(quantization, str) and quantization not in ("4bit", "8bit"):
        raise ValueError(
            f"model.quantization={quantization!r} is unknown; use '4bit', '8bit' or a mapping"
        )
    if quantization is not None and model.base is None:
        raise ValueError(
            "model.quantization is for a base that is loaded; give model.base, or leave it out"
        )
    if model.lora is not None and model.freeze_base:
        raise ValueError("model.lora trains in the base, which model.freeze_base forbids; give one")
    if model.init_memory is not None and model.init_from is not None:
        raise ValueError("model.init_from brings a memory, and so does init_memory; give one")


def looks_like_path(value: str) -> bool:
    """Whether a name can only be a path: hub ids are "name" or "owner/name"."""
    return value.startswith((".", "/", "~")) or value.count("/") > 1 or "\\" in value
