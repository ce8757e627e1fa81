"""Recipes: what they may hold, and what they say of what they may not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import memlm
from memlm.train import MemLMTrainingArguments, Recipe, Stage
from memlm.train.making import check_same_model
from memlm.train.recipe import (
    override,
    parse_yaml,
    read_yaml,
    shipped_recipes,
    training_fields,
)

MINIMAL: dict[str, Any] = {
    "model": {"config": {"model_type": "llama"}},
    "tokenizer": {"source": "train"},
}


def recipe(*overrides: str) -> Recipe:
    return Recipe.from_dict(override(parse_yaml(str(MINIMAL)), overrides))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.tsks=[qa1]", "data.tsks is not a key of a recipe; did you mean 'tasks'"),
        ("dta.tasks=[qa1]", "dta is not a key of a recipe; did you mean 'data'"),
        ("training.learning_rat=1", "training.learning_rat .* did you mean 'learning_rate'"),
        ("training.bptt_dept=1", "did you mean 'bptt_depth'"),
        ("curriculum.stages=[{max_segmnts: 2}]", r"stages\.0\.max_segmnts .* 'max_segments'"),
        ("model.memory=amrt", "model.memory='amrt' is not a known memory; did you mean 'armt'"),
        ("data.tasks=[qa77]", "data: .*'qa77'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(change: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recipe(change)


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        (["data.layout=story", "data.max_facts=5"], []),
        (["data.layout=aligned", "data.max_facts=5"], ["data.max_facts"]),
        (["data.layout=flowing", "data.facts_per_segment=[1]"], ["data.facts_per_segment"]),
        (["data.layout=aligned", "data.no_gap=0.5"], ["data.no_gap"]),
        (["data.end_probability=0.5", "data.ask_every=2"], ["data.ask_every", "data.end_prob"]),
        (["data.retrieval_hops=2"], ["data.retrieval_hops"]),
        (["data.retrieval_hops=2", "data.retrieval=3"], []),
        (["data.path=somewhere", "data.skip_empty=true"], ["data.path", "data.skip_empty"]),
        (["data.source=documents", "data.path=x", "data.haystack=y"], ["data.haystack"]),
        (["data.source=documents", "data.path=x", "data.tasks=[qa2]"], ["data.tasks"]),
        # One stage that reads it is enough, and a stage's own options are its own alone.
        (
            [
                "data.gap_tokens=[2, 4]",
                "curriculum.stages=[{max_segments: 1}, {max_segments: 1, data: {layout: flowing}}]",
            ],
            [],
        ),
        (
            ["curriculum.stages=[{max_segments: 1, data: {no_gap: 0.2}}]"],
            ["curriculum.stages.0.data.no_gap"],
        ),
    ],
)
def test_what_nothing_reads_is_named(changes: list[str], keys: list[str]) -> None:
    found = recipe(*changes).unread()
    assert len(found) == len(keys)
    assert all(said.startswith(key) for said, key in zip(found, keys, strict=True))


def test_what_stands_beside_weights_is_no_recipe() -> None:
    assert "babilong/qa1-5" in shipped_recipes()
    assert not [name for name in shipped_recipes() if "weights" in name]


def test_shipped_recipes_say_nothing_that_is_not_read() -> None:
    for path in shipped_recipes().values():
        assert Recipe.from_dict(read_yaml(path)).unread() == [], path


def test_a_stage_s_unknown_data_key_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stages\.0\.data\.layot .*did you mean 'layout'"):
        recipe("curriculum.stages=[{max_segments: 2, data: {layot: aligned}}]")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.segment_length=x", "model.segment_length='x' should be whole number; write 8"),
        ("model.segment_length=true", "should be whole number"),
        ("data.tasks=qa1", r"data.tasks='qa1' should be list of text; write \[text\]"),
        ("data.layout=dense", "data.layout='dense' should be 'story' or 'aligned' or 'flowing'"),
        ("data=3", "data=3 should be a mapping"),
        ("training.learning_rate=fast", "training.learning_rate='fast' should be number"),
        ("training.bptt_depth=1.5", "training.bptt_depth=1.5 should be whole number or null"),
        ("training.seed=1", "training.seed belongs to the top; write seed:"),
        ("curriculum.stages=[{steps: 2}]", r"stages\.0\.max_segments is missing"),
        ("curriculum.stages=[{max_segments: 0}]", r"curriculum\.stages\.0: .*max_segments=0"),
        ("model.base=gpt2", "model names base and config"),
        ("model.segment_length=0", "model.segment_length=0: .* greater than or equal to 1"),
        ("seed=-1", "seed=-1: .* greater than or equal to 0"),
        ("seed=4294967296", "seed=4294967296: .* less than 4294967296"),
        ("eval.samples=0", "eval.samples=0: .* greater than or equal to 1"),
        ("eval.tasks=[]", r"eval\.tasks=\[\]: .* at least 1 item"),
        ("curriculum.stages=[]", r"curriculum\.stages=\[\]: .* at least 1 item"),
        ("model.init_std={embed: wide}", "model.init_std.embed='wide' should be number"),
        ("model.memory=3", "model.memory=3 should be text or mapping or list of value or null"),
        ("data.gap_tokens=[1]", r"data\.gap_tokens\.1 is missing; give a number"),
        ("data.gap_tokens=[1, 2, 3]", r"=\[1, 2, 3\]: .* at most 2 items"),
        ("data.tasks=[qa1, 2]", r"data\.tasks\.1=2 should be text"),
        ("eval.batch_size=8.0", r"eval\.batch_size=8\.0 should be whole number"),
        ("data.no_gap='0.5'", r"data\.no_gap='0\.5' should be number; write 0\.1"),
        ("output_dir=2026-01-01", r"datetime\.date\(2026, 1, 1\) is a date, .* in quotes"),
        ("data.source=documents", "data.path is missing"),
        ("tokenizer.source=null", "tokenizer.source is missing"),
        (
            "curriculum.stages=[{max_segments: 1, learning_rate: -1.0}]",
            r"stages\.0: learning_rate=-1\.0",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_key_value_and_remedy(change: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recipe(change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.haystack=gone.txt", r"data\.haystack: .*'gone\.txt'"),
        ("model.init_from=./gone", r"model\.init_from='\./gone' does not exist"),
        ("tokenizer.source=/gone/too", r"tokenizer\.source='/gone/too' does not exist"),
        ("data.path=gone", r"data\.path='gone' does not exist"),
    ],
)
def test_a_missing_file_is_named(change: str, words: str) -> None:
    more = ["data.source=documents"] if "path" in change else []
    more += ["model.config=null"] if "init_from" in change else []
    with pytest.raises(FileNotFoundError, match=words):
        recipe(*more, change).check_files()


def test_a_recipe_that_is_not_there_is_named_beside_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'gone\.yaml' does not exist; .*tiny-armt-qa1"):
        Recipe.load("gone.yaml")
    (tmp_path / "broken.yaml").write_text("model: [\n")
    with pytest.raises(ValueError, match=r"broken\.yaml' is not readable YAML"):
        Recipe.load(tmp_path / "broken.yaml")


def test_overrides_reach_into_sections_and_lists() -> None:
    made = recipe(
        "training.learning_rate=1e-3",
        "curriculum.stages=[{max_segments: 2}, {max_segments: 4, steps: 9}]",
        "curriculum.stages.1.steps=7",
        "data.tasks=[qa1, qa2]",
    )
    assert made.training["learning_rate"] == 1e-3
    assert made.curriculum.stages == (Stage(max_segments=2), Stage(max_segments=4, steps=7))
    assert made.data.tasks == ("qa1", "qa2")
    for wrong in ("seed", "curriculum.stages.5.steps=1", "seed.x.y=1"):
        with pytest.raises(ValueError):
            recipe("curriculum.stages=[{max_segments: 2}]", "seed=1", wrong)


@pytest.mark.parametrize("text", ["1e-3", "1.5E-3", "+1e3", ".5e1", "1.0"])
def test_floats_are_numbers_however_they_are_written(text: str) -> None:
    value = parse_yaml(f"x: {text}")["x"]
    assert isinstance(value, float) and value == float(text)
    assert parse_yaml("x: e3")["x"] == "e3"


def test_a_saved_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    made = recipe("curriculum.stages=[{max_segments: 2, data: {layout: aligned}}]", "seed=3")
    made.save(tmp_path / "recipe.yaml")
    again = Recipe.load(tmp_path / "recipe.yaml")
    assert again == made
    assert again.differences(made) == []
    assert recipe("seed=4").differences(recipe("seed=5")) == ["seed: 4, there 5"]
    assert recipe("eval.samples=4", "training.logging_steps=3").differences(recipe()) == []


def test_every_key_is_described() -> None:
    text = Recipe.describe()
    for line in text.splitlines():
        key, *rest = line.split("  ")
        assert any(part.strip() for part in rest[1:]), f"{key} has no description"
    for key in ("data.layout", "curriculum.stages.N.advance_at", "training.bptt_depth", "seed"):
        assert key in text


def test_training_fields_are_those_of_the_arguments() -> None:
    from dataclasses import fields

    known = {field.name for field in fields(MemLMTrainingArguments)}
    assert set(training_fields()) <= known
    assert {"learning_rate", "bptt_depth", "max_steps", "gradient_checkpointing"} <= set(
        training_fields()
    )


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_whole(name: str) -> None:
    overrides = ["data.path=."] if name == "lm-documents" else []
    made = Recipe.load(name, overrides)
    assert made.curriculum.stages
    assert "easured result" in shipped_recipes()[name].read_text(encoding="utf-8")


def test_a_recipe_is_checked_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys\n"
        "from memlm.train import Recipe\n"
        "Recipe.load('tiny-armt-qa1')\n"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_base_that_has_a_memory_is_gone_on_from(tmp_path: Path) -> None:
    """A folder or a shipped name; what is no such folder stays a base, whatever its config holds."""
    data = tmp_path / "my.jsonl"
    data.write_text('{"text": "The sky is blue."}\n', encoding="utf-8")
    folder = tmp_path / "mine"
    folder.mkdir()
    for config, source in (
        ({"model_type": "memlm"}, "init_from"),
        ({"model_type": "llama"}, "base"),
        (["memlm"], "base"),
    ):
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        made = Recipe.for_data(str(folder), str(data)).model
        assert getattr(made, source) == str(folder)
        assert (made.base is None) == (source == "init_from")
    (folder / "config.json").write_text("{", encoding="utf-8")
    assert Recipe.for_data(str(folder), str(data)).model.base == str(folder)
    assert Recipe.for_data("qa1", str(data)).model.init_from == "qa1"
    # A memory that is named must be its own, "armt" too.
    for memory in ("armt", "titans-mag"):
        recipe = Recipe.for_data("qa1", str(data), memory)
        model, _ = memlm.load_pretrained("qa1")
        with pytest.raises(ValueError, match="leave it out"):
            check_same_model(recipe.model, model)


def test_overrides_of_a_recipe_for_ones_own_data_do_what_they_say() -> None:
    """Options of a memory keep its name, and Muon's rate takes the place of the memory's."""
    made = Recipe.for_data(
        "base",
        "somebody/rows",
        "gated-delta",
        ["model.memory.head_dim=8", "training.muon_learning_rate=0.01"],
    )
    assert made.model.memory == {"name": "gated-delta", "head_dim": 8}
    assert "memory_learning_rate" not in made.training
    assert "memory_learning_rate" in Recipe.for_data("base", "somebody/rows").training
