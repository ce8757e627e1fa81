"""Makes what a recipe names: tokenizer, model, documents, and the Trainer's arguments."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from memlm.data.encoding import Encoder
from memlm.data.opening import Rows, open_rows
from memlm.data.rows import texts_of
from memlm.loading import load_weights
from memlm.memory import resolve_memories
from memlm.modeling import MemLMForCausalLM
from memlm.pretrained import load_named
from memlm.tasks.haystack import Haystack
from memlm.tasks.haystack.cache import tokenized_haystack
from memlm.tasks.haystack.sources import CARRIED
from memlm.train.babilong import BabilongSource
from memlm.train.bases import check_base, loading, start_memory
from memlm.train.curriculum import Curriculum
from memlm.train.data import Piece, Source
from memlm.train.documents import DocumentSource, Texts, open_texts
from memlm.train.recipe import ModelSection, Recipe
from memlm.train.recipe.binding import did_you_mean, plain
from memlm.train.rows import RowSource, Survey
from memlm.train.tokenizer import babi_words, train_tokenizer
from memlm.train.trainer import MemLMTrainingArguments

# Defaults for what a recipe leaves open.
DEFAULTS: dict[str, Any] = {
    "logging_steps": 10,
    "save_steps": 500,
    "save_total_limit": 2,
    "per_device_train_batch_size": 8,
    "dataloader_num_workers": 0,
    "disable_tqdm": True,
}


def make_tokenizer(recipe: Recipe, saved: Path | None = None) -> Any:
    """The recipe's tokenizer, with an end token and a padding token; `saved`: where it was saved before."""
    section = recipe.tokenizer
    if saved is not None and (saved / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(saved)
    elif section.source == "train":
        # Every process trains its own: the same texts give the same tokenizer.
        whole = babi_words(recipe.data.tasks) if recipe.data.source == "babilong" else ()
        tokenizer = train_tokenizer(training_texts(recipe), section.vocab_size, whole)
    else:
        model = recipe.model
        named = {"tokenizer.source": section.source, "model.base": model.base}
        named["model.init_from"] = model.init_from
        key, name = next((key, name) for key, name in named.items() if name is not None)
        tokenizer = load_named(key, name, AutoTokenizer.from_pretrained)
    if section.chat_template is not None:
        path = Path(section.chat_template).expanduser()
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer.source={section.source!r} has no end token; use one with an eos_token"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def training_texts(recipe: Recipe) -> Iterator[str]:
    """The texts a tokenizer is trained on: haystack sentences, or documents."""
    if recipe.data.source == "documents":
        for _, text in open_texts(recipe.data.path or ""):
            yield text
        return
    if recipe.data.source == "rows":
        for row in open_rows(recipe.data.path or "", recipe.data.split):
            yield from texts_of(row)
        return
    for document in Haystack.open(recipe.data.haystack, split="train").documents:
        for sentence in document.sentences:
            yield f" {sentence}"


def check_model(recipe: Recipe) -> None:
    """Refuse a model that cannot be made, before data are read for it."""
    resolve_memories(recipe.model.memory)
    if recipe.model.config is not None:
        base_config(recipe, {})
    check_base(recipe.model)


def make_model(recipe: Recipe, tokenizer: Any) -> MemLMForCausalLM:
    """The recipe's model: from scratch, from a base with fresh memory, or a trained one."""
    section = recipe.model
    if section.init_from is not None:
        load = partial(load_weights, AutoModelForCausalLM.from_pretrained, **loading(section))
        model = load_named("model.init_from", section.init_from, load)
        if not isinstance(model, MemLMForCausalLM):
            raise ValueError(
                f"model.init_from={section.init_from!r} is a {type(model).__name__} without "
                "memory; give it as model.base"
            )
        check_same_model(section, model)
    elif section.base is not None:
        model = MemLMForCausalLM.from_base(
            section.base,
            memory=section.memory,
            segment_length=section.segment_length,
            **loading(section),
        )
    else:
        model = MemLMForCausalLM.from_base(
            base_config(
                recipe,
                {
                    "vocab_size": len(tokenizer),
                    "bos_token_id": tokenizer.bos_token_id,
                    "eos_token_id": tokenizer.eos_token_id,
                    "pad_token_id": tokenizer.pad_token_id,
                },
            ),
            memory=section.memory,
            segment_length=section.segment_length,
            **loading(section),
        )
    model.config.schedule = section.schedule
    # The model is asked later in the way in which it learns to be asked.
    if recipe.data.source == "babilong":
        model.config.question_template = recipe.data.asked_with
        model.config.question_segment, model.config.recall_template = recipe.asking()
    elif recipe.data.question_template is not None:
        model.config.question_template = recipe.data.question_template
    reinitialise(model, section.init_std)
    rows = len(model.get_input_embeddings().state_dict()["weight"])
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model {rows}; use the base "
            "model's own tokenizer"
        )
    if section.init_memory is not None:
        start_memory(model, section.init_memory)
    if section.freeze_base or section.quantization is not None:
        model.freeze_base()
    return model


def check_same_model(section: ModelSection, model: MemLMForCausalLM) -> None:
    """Refuse settings of a recipe that contradict the model it continues from."""
    default = ModelSection()
    length = model.segment_length
    if section.segment_length not in (default.segment_length, length):
        raise ValueError(
            f"model.segment_length={section.segment_length}, but the model of init_from="
            f"{section.init_from!r} has {length}; leave it out"
        )
    if section.memory == default.memory:
        return
    entries = section.memory if isinstance(section.memory, list) else [section.memory]
    given = [entry if isinstance(entry, dict) else {"name": entry} for entry in entries]
    given = [entry for entry in given if entry["name"] not in (None, "none")]
    own = [{**entry} for entry in model.config.memory or ()]
    if len(given) != len(own) or any(
        plain(has.get(key)) != plain(value)
        for entry, has in zip(given, own, strict=True)
        for key, value in entry.items()
    ):
        raise ValueError(
            f"model.memory={section.memory!r}, but the model of init_from={section.init_from!r} has "
            f"{[entry['name'] for entry in own]} with their own settings; leave it out"
        )


def reinitialise(model: MemLMForCausalLM, stds: dict[str, float]) -> None:
    """Redraw the weights whose names match a pattern. ValueError when none does."""
    for pattern, std in stds.items():
        found = [p for name, p in model.named_parameters() if re.search(pattern, name)]
        if not found:
            raise ValueError(f"model.init_std.{pattern} matches no weight; check the pattern")
        for parameter in found:
            torch.nn.init.normal_(parameter, std=std)


def base_config(recipe: Recipe, vocabulary: dict[str, Any]) -> Any:
    """The configuration of a base from scratch; the recipe's fields override those of `vocabulary`."""
    values = dict(recipe.model.config or {})
    model_type = values.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        hint = did_you_mean(str(model_type), list(CONFIG_MAPPING.keys()))
        raise ValueError(f"model.config.model_type={model_type!r} is unknown; {hint}")
    cls = CONFIG_MAPPING[model_type]
    # transformers silently keeps unknown fields.
    known = {*cls().to_dict(), *cls.attribute_map}
    for key in values:
        if key not in known:
            raise ValueError(
                f"model.config.{key} is not a field of {cls.__name__}; {did_you_mean(key, list(known))}"
            )
    return cls(**{**vocabulary, **values})


def make_source(
    recipe: Recipe, tokenizer: Any, segment_length: int, haystack: Any, seed: int | None = None
) -> Source:
    """The recipe's documents, except those of source 'rows' (`make_rows`)."""
    seed = recipe.seed if seed is None else seed
    if recipe.data.source == "documents":
        texts = open_texts(recipe.data.path or "", recipe.data.skip_empty)
        return _of_documents(recipe, texts, tokenizer, segment_length, seed)
    return BabilongSource(haystack, segment_length, recipe.options(), seed=seed)


def _of_documents(
    recipe: Recipe, texts: Texts, tokenizer: Any, segment_length: int, seed: int
) -> DocumentSource:
    return DocumentSource(
        texts,
        tokenizer,
        segment_length,
        seed=seed,
        skip_empty=recipe.data.skip_empty,
        split_special_tokens=recipe.data.split_special_tokens,
    )


def make_rows(recipe: Recipe, rows: Rows, tokenizer: Any, model: MemLMForCausalLM) -> RowSource:
    """The recipe's rows as documents; from now on the model is asked as they ask it."""
    encoder = Encoder(tokenizer, model.config.question_template, recipe.data.split_special_tokens)
    source = RowSource(rows, encoder, model.segment_length, recipe.seed)
    if source.asks:
        model.config.question_segment = "own"
    return source


def make_eval_set(
    recipe: Recipe, source: Source, tokenizer: Any, model: MemLMForCausalLM
) -> list[Piece] | None:
    """Held-out documents, when the recipe asks for evaluations: `eval.samples` of them at most.

    Of BABILong, documents as the last stage has them; of other data, whole ones. source: what is trained.
    """
    if not recipe.evaluates:
        return None
    data, limit = recipe.data, recipe.eval.samples
    if data.source == "babilong":
        haystack = tokenized_haystack(data.haystack, "eval", tokenizer)
        seed = recipe.seed + 1
        held_out = make_source(recipe, tokenizer, model.segment_length, haystack, seed=seed)
        stage = recipe.curriculum.stages[-1]
        return [next(iter(held_out.document(n, stage))) for n in range(limit)]
    if data.source == "documents":
        path = data.eval_path or (data.path if data.path in CARRIED else None)
    else:
        path = data.eval_path or (data.path if data.eval_split else None)
    if path is None:
        raise ValueError(
            "training.eval_strategy needs held-out data, and none are named; set data.eval_path, or leave "
            "eval_strategy out"
        )
    if data.source == "documents":
        texts = open_texts(path, data.skip_empty, "eval")
        return _of_documents(recipe, texts, tokenizer, model.segment_length, 0).whole(limit)
    assert isinstance(source, RowSource)
    rows = open_rows(path, data.eval_split or "train")
    own = RowSource(rows, source.encoder, model.segment_length)
    if own.asks != source.asks:
        raise ValueError(
            f"data.eval_path={path!r} holds rows of {rows.format.name}, but data.path rows of "
            f"{source.rows.format.name}; evaluate on what is trained"
        )
    return own.whole(limit)


def make_arguments(
    recipe: Recipe, out: Path, curriculum: Curriculum, survey: Survey | None = None
) -> MemLMTrainingArguments:
    """The Trainer's arguments. survey: of the recipe's rows, which epochs are counted in.

    ValueError when nothing says when to stop.
    """
    asked = recipe.data.source == "babilong" or (survey is not None and survey.questions > 0)
    pinned = {"dataloader_pin_memory": torch.cuda.is_available()}
    values = {**DEFAULTS, **pinned, "track_accuracy": asked, **recipe.training}
    # YAML reads a bare `no` as false.
    values |= {k: "no" for k, v in values.items() if v is False and k.endswith("_strategy")}
    # As transformers reads it: none says how many, so that epochs do.
    if int(values.get("max_steps", -1)) <= 0:
        values.pop("max_steps", None)
        if curriculum.total_steps is None and survey is not None and survey.whole:
            return steps_of_epochs(recipe, out, survey, values)
        if curriculum.total_steps is None:
            raise ValueError(
                "neither training.max_steps nor the steps of all stages are given; give one, so "
                "that training ends"
            )
        values["max_steps"] = curriculum.total_steps
    return MemLMTrainingArguments(output_dir=str(out), seed=recipe.seed, **values)


def steps_of_epochs(
    recipe: Recipe, out: Path, survey: Survey, values: dict[str, Any]
) -> MemLMTrainingArguments:
    """The arguments with as many steps as `num_train_epochs` over the surveyed rows take."""
    arguments = MemLMTrainingArguments(output_dir=str(out), seed=recipe.seed, **values, max_steps=1)
    stage = recipe.curriculum.stages[-1]
    batches = survey.pieces(stage, *arguments.steps_by) * arguments.num_train_epochs
    rows = arguments.train_batch_size * arguments.gradient_accumulation_steps
    arguments.max_steps = max(1, math.ceil(batches / (rows * arguments.world_size)))
    return arguments
