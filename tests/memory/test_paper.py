"""The papers' own settings: they attach, run, and are what each page says they are."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from memlm.memory import MemoryConfig, available_memories, memory_class
from memlm.modeling import MemLMForCausalLM
from tests.cases import base_model, standing, tokens

PAGES = Path(__file__).parents[2] / "docs/methods"
SEGMENT = 16
mechanisms = pytest.mark.parametrize(
    "name", [name for name in available_memories() if name != "none"]
)


def departures(config: MemoryConfig) -> dict[str, object]:
    """The fields in which `config` is not the default."""
    plain = type(config)()
    values = {one.name: getattr(config, one.name) for one in fields(config)}
    return {name: value for name, value in values.items() if value != getattr(plain, name)}


def listed(name: str) -> dict[str, object]:
    """What the page of `name` says, as `field=value`, in the paragraph that starts with `paper()`."""
    paragraphs = (PAGES / f"{name}.md").read_text().split("\n\n")
    told = " ".join(one for one in paragraphs if one.startswith("`paper()`"))
    found = re.findall(r"`(\w+)=([^`]+)`", told)
    return {field: ast.literal_eval(value) for field, value in found}


@mechanisms
def test_pages_list_what_the_paper_s_settings_change(name: str) -> None:
    found = departures(memory_class(name).Config.paper())
    # Pages give three digits.
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}
    assert rounded == listed(name)


@mechanisms
@torch.no_grad()
def test_the_paper_s_settings_attach_and_run(name: str) -> None:
    config = memory_class(name).Config.paper()
    base = base_model(standing(name, "llama"), max_position_embeddings=4096)
    ids = tokens(1, 3 * SEGMENT + 1)
    plain = base(ids[:, :SEGMENT]).logits
    model = MemLMForCausalLM.from_base(base, memory=config, segment_length=SEGMENT)
    out = model(ids)
    assert out.logits.shape[:2] == ids.shape and out.logits.isfinite().all()
    # The base model is left alone until training, where the mechanism can.
    if memory_class(name).neutral:
        torch.testing.assert_close(out.logits[:, :SEGMENT], plain, rtol=0, atol=1e-10)


def test_without_a_paper_the_defaults_are_all_there_is() -> None:
    assert MemoryConfig.paper() == MemoryConfig()
