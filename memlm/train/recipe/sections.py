"""The sections of a recipe: what each may say, with defaults and meanings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from memlm.train.curriculum import Stage
from memlm.train.options import BabilongOptions, described

Count = Annotated[int, Field(ge=1)]
Names = Annotated[tuple[str, ...], Field(min_length=1)]


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
    segment_length: Count = described("tokens per segment", 512)
    init_from: str | None = described(
        "folder, hub id or shipped name (qa1-5) of a trained memory model to go on from, in place of base "
        "and config",
        None,
    )
    init_std: dict[str, Annotated[float, Field(ge=0)]] = field(
        default_factory=dict,
        metadata={
            "help": "from scratch: standard deviation of the weights whose name matches a pattern "
            "(a regular expression, searched), instead of the architecture's own"
        },
    )
    freeze_base: bool = described("train the memory alone", False)
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = described(
        "numbers of the base; auto: those it was saved in. The memory's are float32", "float32"
    )
    attn_implementation: str | None = described(
        "how attention is computed, by transformers' names (sdpa, eager, flash_attention_2, ...); null: "
        "transformers' choice",
        None,
    )
    quantization: str | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "'4bit' or '8bit' (bitsandbytes, as in QLoRA), or a mapping of fields of one of "
            "transformers' quantization configurations; the base is then frozen"
        },
    )
    lora: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "fields of peft's LoraConfig, for LoRA in the base, which is otherwise frozen; "
            "target_modules: names, or 'all-linear' (default), of the base alone"
        },
    )
    schedule: Literal["sequential", "wavefront", "auto"] = described(
        "order in which layers and segments run in this training; auto measures, so that another run with "
        "the same seed may be rounded differently. The finished model has 'auto'",
        "sequential",
    )
    init_memory: str | None = described(
        "folder of a memory model, or of what save_memory wrote: the memory starts as it is there",
        None,
    )


@dataclass(frozen=True, kw_only=True)
class TokenizerSection:
    """The tokenizer."""

    source: str | None = described(
        "hub id or path, or 'train' for one trained on the data; null: the base model's", None
    )
    vocab_size: Count = described("tokens of a trained tokenizer", 2048)
    chat_template: str | None = described(
        "file with a chat template (Jinja), in place of the tokenizer's own", None
    )


@dataclass(frozen=True, kw_only=True)
class DataSection(BabilongOptions):
    """The training data: BABILong made on the fly, plain documents, or rows of people's own data."""

    source: Literal["babilong", "documents", "rows"] = described(
        "babilong: questions about facts in text; documents: language modelling; rows: your own data, "
        "documents with questions or trl's formats",
        "babilong",
    )
    haystack: str = described(
        "babilong: 'builtin', 'installed', 'made', a text file or folder, or hub:ID[@CONFIG][:COLUMN]; "
        "several are joined by '+'",
        "builtin",
    )
    path: str | None = described(
        "documents: 'builtin', 'installed', 'made', a text file, a folder of them, or "
        "hub:ID[@CONFIG][:COLUMN]; rows: a file or folder of .jsonl, .json, .parquet, .csv or "
        "texts, or a data set of the hub, ID[@CONFIG][:COLUMN]",
        None,
    )
    split: str = described("rows: split of a hub data set", "train")
    eval_path: str | None = described(
        "documents, rows: held-out data that training.eval_strategy evaluates on, named as path is; "
        "'builtin' and its like are what they hold out. null: path, where eval_split says which part",
        None,
    )
    eval_split: str | None = described(
        "rows: split of a hub data set to evaluate on; null: 'train', of eval_path", None
    )
    skip_empty: bool = described(
        "documents: pass over empty rows and files instead of refusing them", False
    )
    split_special_tokens: bool = described(
        "documents, rows: control tokens written out in a text are text; false makes them control tokens",
        True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source == "babilong":
            # Spelt out, as recipes of earlier versions have it.
            object.__setattr__(self, "question_template", self.asked_with)


@dataclass(frozen=True, kw_only=True)
class CurriculumSection:
    """The stages, and what ends one early."""

    stages: Annotated[tuple[Stage, ...], Field(min_length=1)] = field(
        default=(Stage(max_segments=1),), metadata={"help": "the stages, in order"}
    )
    advance_on: Literal["training", "evaluation"] = described(
        "whose answers are compared with a stage's advance_at", "training"
    )
    score_window: Count = described("training steps the running accuracy spans", 50)


@dataclass(frozen=True, kw_only=True)
class EvalSection:
    """What `memlm eval` asks of the finished model unless told otherwise."""

    tasks: Names = described("bAbI tasks", ("qa1",))
    lengths: Names = described("tokens of text, as '4k' or '1M'", ("0k", "4k", "16k"))
    samples: Count = described(
        "samples per task and length; during training, at most so many documents or rows", 100
    )
    haystack: str = described("as in data", "builtin")
    batch_size: Count = described("samples read side by side", 8)
