"""What the benchmarks count as multiplications is what the equations say, for bases and mechanisms."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Any:
    """The modules of the benchmarks, found as when a script of theirs is run."""
    sys.path.insert(0, str(ROOT))
    threads = torch.get_num_threads()
    try:
        yield {
            n: importlib.import_module(n) for n in ("timing", "equations", "shapes", "mechanisms")
        }
    finally:
        sys.path.remove(str(ROOT))
        torch.set_num_threads(threads)


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("kind", ["causal", "mask", "all"])
def test_fused_attention_is_counted_pair_by_pair(bench: Any, kind: str, learning: bool) -> None:
    q = torch.randn(2, 3, 5, 4, requires_grad=learning)
    k, v = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    mask = torch.zeros(2, 1, 5, 7, dtype=torch.bool)
    mask[..., :2] = True
    if kind == "causal":
        k, v = k[:, :, :5], v[:, :, :5]
    given = {"causal": {"is_causal": True}, "mask": {"attn_mask": mask}, "all": {}}[kind]
    pairs = {"causal": 5 * 6 // 2, "mask": 5 * 2, "all": 5 * 7}[kind]

    def run() -> None:
        out = F.scaled_dot_product_attention(q, k, v, **given)
        if learning:
            out.sum().backward()

    found = bench["timing"].multiplications(run)
    assert found == 2 * 3 * pairs * 4 * (6 if learning else 2)


def test_a_convolution_of_groups_costs_twice_as_much_backward(bench: Any) -> None:
    """Not each channel with every other."""
    x, weight = torch.randn(2, 6, 9, requires_grad=True), torch.randn(6, 2, 4, requires_grad=True)
    once = 2 * 6 * 6 * 2 * 4  # rows, channels, places, what each takes

    def run(*wanted: torch.Tensor) -> None:
        torch.autograd.grad(F.conv1d(x, weight, groups=3).sum(), wanted)

    assert bench["timing"].multiplications(partial(run, x, weight)) == 3 * once
    assert bench["timing"].multiplications(partial(run, weight)) == 2 * once


@pytest.mark.parametrize("how", ["addmm_", "addmm", "baddbmm_", "baddbmm"])
def test_a_product_that_is_added_counts_as_one(bench: Any, how: str) -> None:
    """In place as well, which torch's counter leaves out."""
    rows = (3,) if how.startswith("b") else ()
    onto, a, b = torch.zeros(*rows, 4, 6), torch.randn(*rows, 4, 5), torch.randn(*rows, 5, 6)
    found = bench["timing"].multiplications(lambda: getattr(onto, how)(a, b))
    assert found == 4 * 5 * 6 * (3 if rows else 1)


@pytest.mark.parametrize("name", ["none", "armt", "rmt", "infini", "transformer-xl", "titans-mag"])
def test_equations_need_what_is_counted(bench: Any, name: str) -> None:
    """To the multiplication: a product more in the code, or less in the equations, is seen."""
    shape = bench["shapes"].Shape(32, 2, 16, 3, 2, 64, "cpu", "float32", 1)
    model = bench["shapes"].with_memory(bench["shapes"].base_model(shape), name, shape)
    run = partial(bench["mechanisms"].step, "forward", model, bench["shapes"].tokens(shape), 16)
    asked: list[Any] = []
    rotary = model.base.model.rotary_emb
    hook = rotary.register_forward_hook(
        lambda _, given, named, __: asked.append((given, named)), with_kwargs=True
    )
    counted = bench["timing"].multiplications(run)
    hook.remove()
    assert asked
    # transformers 5.17 computes a position's angles by a product of matrices, which is no mechanism's.
    angles = bench["timing"].multiplications(
        lambda: [rotary(*given, **named) for given, named in asked]
    )
    assert bench["equations"].needed(name, model, 16, 2, 3) == counted - angles


def test_every_mechanism_with_equations_is_compared(bench: Any) -> None:
    marks = test_equations_need_what_is_counted.pytestmark  # type: ignore[attr-defined]
    assert set(marks[0].args[1]) == set(bench["equations"].NEEDS)
    shape = bench["shapes"].Shape(32, 1, 16, 1, 1, 64, "cpu", "float32", 1)
    model = bench["shapes"].with_memory(bench["shapes"].base_model(shape), "lact", shape)
    assert bench["equations"].needed("lact", model, 16, 1, 1) is None
