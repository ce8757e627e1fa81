"""flash-linear-attention's kernels: how they are called, by a stand-in; what they compute, on a GPU."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from memlm.memory import GatedDeltaConfig
from memlm.memory.parts import delta_kernels
from memlm.memory.parts.delta_block import RULES
from memlm.memory.parts.delta_kernels import by_kernel, run_delta_rule
from memlm.memory.parts.delta_rule import Tokens, delta_rule
from tests.cases import SEGMENT, memory_model, tokens

DECAYS = [None, "head", "channel"]
B, G, T, DK, DV = 2, 3, 11, 5, 4
rules = pytest.mark.parametrize("decay", DECAYS)
erasing = pytest.mark.parametrize("erases", [True, False])


def example(decay: str | None, questions: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    g = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    parts = {
        "query": random(B, G, questions, T, DK),
        "key": 0.5 * random(B, G, T, DK),
        "value": random(B, G, T, DV),
        "step": torch.rand(B, G, T, generator=g, dtype=torch.float64),
    }
    # Padding at the end of the second row.
    parts["step"][1, :, 7:] = 0
    if decay is not None:
        parts["log_decay"] = -random(B, G, T, *((DK,) if decay == "channel" else ())).abs()
        parts["log_decay"][1, :, 7:] = 0
    return parts, random(B, G, DK, DV)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The package's four functions by their documented conventions, token by token; the names called."""
    called: list[str] = []

    def function(name: str, beta: bool, channel: bool):
        def compute(*, q, k, v, scale, initial_state, output_final_state, g=None, **rest):
            called.append(name)
            assert set(rest) == ({"beta"} if beta else set()) and output_final_state
            rows, length, heads, _ = q.shape
            assert k.shape == q.shape and v.shape[:3] == q.shape[:3]
            assert initial_state.shape == (rows, heads, q.shape[3], v.shape[3])
            assert g is None or g.shape == (k.shape if channel else k.shape[:3])
            q, k, v = (x.to(initial_state.dtype) for x in (q, k, v))
            state, found = initial_state, []
            for t in range(length):
                if g is not None:
                    state = state * g[:, t].reshape(rows, heads, -1, 1).exp()
                new = v[:, t]
                if beta:
                    known = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
                    new = rest["beta"][:, t].unsqueeze(-1) * (new - known)
                state = state + k[:, t].unsqueeze(-1) * new.unsqueeze(-2)
                found.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
            return torch.stack(found, 1), state

        return compute

    for path, name, beta, channel in (
        ("gated_delta_rule", "chunk_gated_delta_rule", True, False),
        ("kda", "chunk_kda", True, True),
        ("simple_gla", "chunk_simple_gla", False, False),
        ("gla", "chunk_gla", False, True),
    ):
        module = ModuleType(f"fla.ops.{path}")
        setattr(module, name, function(name, beta, channel))
        monkeypatch.setitem(sys.modules, f"fla.ops.{path}", module)
    for parent in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    delta_kernels.kernels.cache_clear()
    yield called
    delta_kernels.kernels.cache_clear()


@rules
@erasing
@pytest.mark.parametrize("questions", [1, 2])
def test_kernels_are_called_by_their_conventions(
    decay: str | None, erases: bool, questions: int, stand_in: list[str]
) -> None:
    parts, start = example(decay, questions)
    leaves = [x.requires_grad_() for x in (*parts.values(), start)]
    given = Tokens(**parts, erases=erases)
    found, expected = by_kernel(given, start, torch.float64), delta_rule(given, start, 4)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    weights = [torch.randn_like(x) for x in expected]

    def gradients(results: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        total = sum((w * x).sum() for w, x in zip(weights, results, strict=True))
        return torch.autograd.grad(total, leaves)

    torch.testing.assert_close(gradients(found), gradients(expected), rtol=1e-8, atol=1e-8)
    kind = "channel" if decay == "channel" else "head"
    names = {
        (True, "head"): "chunk_gated_delta_rule",
        (True, "channel"): "chunk_kda",
        (False, "head"): "chunk_simple_gla",
        (False, "channel"): "chunk_gla",
    }
    assert stand_in == [names[erases, kind]]


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_a_whole_memory_by_kernels(
    rule: str, stand_in: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GatedDeltaConfig(rule=rule, householder_steps=2, num_heads=2)
    model, ids = memory_model("llama", config), tokens(2, 3 * SEGMENT)
    mask = torch.ones_like(ids)
    mask[1, 4:9] = 0
    expected = model(ids, attention_mask=mask)
    assert not stand_in
    # As if the processor were a CUDA device, and float64 half precision.
    monkeypatch.setattr(
        "memlm.memory.gated_delta.run_delta_rule",
        lambda given, state, chunk, dtype: by_kernel(given, state, dtype),
    )
    found = model(ids, attention_mask=mask)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-9)
    assert len(stand_in) == 6 and len(set(stand_in)) == 1


def test_the_torch_form_computes_wherever_kernels_do_not_fit(
    stand_in: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, start = example("head", 1)
    given = Tokens(**parts)
    expected = delta_rule(given, start, 4)

    class OnCuda(torch.Tensor):
        is_cuda = True

    there = start.as_subclass(OnCuda)
    for state, dtype in ((start, torch.bfloat16), (there, torch.float32), (there, torch.float64)):
        assert torch.equal(run_delta_rule(given, state, 4, dtype)[0], expected[0])
    monkeypatch.setattr(delta_kernels, "WIDEST", DK - 1)
    assert torch.equal(run_delta_rule(given, there, 4, torch.bfloat16)[0], expected[0])
    assert not stand_in
    monkeypatch.setattr(delta_kernels, "WIDEST", DK)
    run_delta_rule(given, there, 4, torch.bfloat16)
    assert stand_in == ["chunk_gated_delta_rule"]


def test_without_the_package_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", None)
    delta_kernels.kernels.cache_clear()
    assert delta_kernels.kernels() is None
    delta_kernels.kernels.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@rules
@erasing
@pytest.mark.parametrize("questions", [1, 4])
def test_kernels_compute_what_the_torch_form_does(
    decay: str | None, erases: bool, questions: int
) -> None:
    pytest.importorskip("fla")
    g = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        # Numbers that bfloat16 has, so that only the kernels' own rounding is compared.
        return torch.randn(*size, generator=g).bfloat16().float().cuda()

    rows, heads, length, dk, dv = 2, 2, 200, 64, 128
    key = torch.nn.functional.normalize(random(rows, heads, length, dk), dim=-1)
    parts = {
        "query": random(rows, heads, questions, length, dk) / 8,
        "key": key.bfloat16().float(),
        "value": random(rows, heads, length, dv),
        "step": torch.rand(rows, heads, length, generator=g).cuda(),
    }
    parts["step"][1, :, 150:] = 0
    if decay is not None:
        shape = (rows, heads, length, *((dk,) if decay == "channel" else ()))
        parts["log_decay"] = -0.1 * torch.rand(shape, generator=g).cuda()
    start = random(rows, heads, dk, dv)
    leaves = [x.requires_grad_() for x in (*parts.values(), start)]
    given = Tokens(**parts, erases=erases)
    expected = delta_rule(given, start, 64)
    found = run_delta_rule(given, start, 64, torch.bfloat16)

    def close(a: torch.Tensor, b: torch.Tensor) -> None:
        assert float((a - b).abs().max()) < 0.03 * float(b.abs().max())

    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        close(a, b)
    for a, b in zip(
        torch.autograd.grad((found[0].square().sum() + found[1].square().sum()), leaves),
        torch.autograd.grad((expected[0].square().sum() + expected[1].square().sum()), leaves),
        strict=True,
    ):
        close(a, b)
    shut = Tokens(**{**parts, "step": torch.zeros_like(parts["step"])}, erases=erases)
    if "log_decay" in parts:
        shut = shut._replace(log_decay=torch.zeros_like(parts["log_decay"]))
    assert torch.equal(run_delta_rule(shut, start, 64, torch.bfloat16)[1], start)
