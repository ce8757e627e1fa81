"""ARMT against the paper's equations, token by token."""

from __future__ import annotations

import pytest
import torch

from memlm.memory import ARMTConfig
from memlm.memory.armt import ARMT, ARMTState
from memlm.memory.base import Dims
from memlm.modeling import MemLMForCausalLM
from tests.cases import LAW_FAMILIES, SEGMENT, base_model, randomise, tokens

EPS = 1e-5
D, D_MEM, M, B = 12, 4, 3, 2


def naive_phi(x: torch.Tensor) -> torch.Tensor:
    r = [max(float(v), 0.0) for v in x] + [max(-float(v), 0.0) for v in x]
    n = len(r)
    products = [r[i] * r[(i - j) % n] for j in (1, 2, 3) for i in range(n)]
    return torch.tensor(products, dtype=torch.float64)


def naive_features(cell: ARMT, x: torch.Tensor) -> list[torch.Tensor]:
    """One token's features, a vector per head."""
    found = [naive_phi(part) for part in x.chunk(cell.config.num_heads)]
    return (
        [phi / phi.square().sum().sqrt() for phi in found] if cell.config.unit_features else found
    )


def naive_recall(cell: ARMT, phi: list[torch.Tensor], a: torch.Tensor, z: object) -> torch.Tensor:
    """What one token's features recall, from one row's memory: head by head, then side by side."""
    heads = cell.config.num_heads
    parts = [matrix.T @ f for matrix, f in zip(a.chunk(heads, dim=1), phi, strict=True)]
    if cell.config.normaliser != "none":
        counts = [keys @ f + EPS for keys, f in zip(z.chunk(heads), phi, strict=True)]
        parts = [part / count for part, count in zip(parts, counts, strict=True)]
    return torch.cat(parts)


def naive_read(cell: ARMT, x: torch.Tensor, a: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    out = x.clone()
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            out[b, t] += naive_recall(
                cell, naive_features(cell, cell.query.weight @ x[b, t]), a[b], z[b] if len(z) else z
            )
    return out


def naive_write(
    cell: ARMT, memory: torch.Tensor, a: torch.Tensor, z: torch.Tensor, first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    config, heads = cell.config, cell.config.num_heads
    new_a, new_z = a.clone(), z.clone() if len(z) else z
    for b in range(memory.shape[0]):
        for i in range(memory.shape[1]):
            m = memory[b, i]
            phi, v = naive_features(cell, cell.key.weight @ m), cell.value.weight @ m
            gates = torch.sigmoid(cell.gate.weight @ m + cell.gate.bias)
            gates = torch.where(gates >= config.write_threshold, gates, 0.0)
            old = (
                torch.zeros_like(v)
                if first
                else naive_recall(cell, phi, a[b], z[b] if len(z) else z)
            )
            for h, (k, d, beta) in enumerate(
                zip(phi, (v - old).chunk(heads), gates.chunk(heads), strict=True)
            ):
                columns = slice(h * len(d), (h + 1) * len(d))
                new_a[b, :, columns] += torch.outer(k, beta * d)
                if config.normaliser == "none":
                    continue
                counts = slice(h * len(k), (h + 1) * len(k))
                gamma = 1.0
                if config.correction and z[b, counts].any():
                    gamma = (1 - (z[b, counts] @ k + EPS) / (k @ k + EPS)).clamp(0, 1)
                new_z[b, counts] += (
                    gamma * k * (beta.max() if config.normaliser == "written" else 1)
                )
    return new_a, new_z


def cell_of(**options: object) -> ARMT:
    dims = Dims(
        hidden_size=D,
        embedding_size=D,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=6,
        segment_length=8,
    )
    config = ARMTConfig(num_memory_tokens=M, d_mem=D_MEM, **options)
    cell = ARMT(config, dims).double()
    cell.reset_parameters(1.0)
    randomise(cell, std=0.5)
    return cell


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_heads": 2},
        {"unit_features": True},
        {"vector_gate": True},
        {"num_heads": 2, "unit_features": True, "vector_gate": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("normaliser", ["all", "written", "none"])
def test_equals_the_equations_over_several_segments(
    normaliser: str, options: dict, threshold: float
) -> None:
    if normaliser == "none":
        options = {**options, "unit_features": True}
    cell = cell_of(normaliser=normaliser, write_threshold=threshold, **options).eval()
    state = cell.init_state(B)
    a, z = state.associations.clone(), state.normaliser
    for step in range(5):
        x = torch.randn(B, 7 + M, D, dtype=torch.float64)
        seen = {}

        def inner(h: torch.Tensor, mask: torch.Tensor | None = None, seen: dict = seen):
            seen["h"] = h
            return torch.tanh(h) + 0.1 * h.cumsum(1)

        _, state = cell(x, state, inner, mask=None)
        expected = naive_read(cell, x, a, z)
        torch.testing.assert_close(seen["h"], expected, rtol=1e-10, atol=1e-10)
        a, z = naive_write(cell, inner(expected)[:, -M:], a, z, first=step == 0)
        torch.testing.assert_close(state.associations, a, rtol=1e-9, atol=1e-9)
        assert isinstance(state.normaliser, tuple) == (normaliser == "none")
        torch.testing.assert_close(state.normaliser, z, rtol=1e-9, atol=1e-9)
    assert a.abs().max() > 1e-3 and (normaliser == "none" or z.abs().max() > 1e-3)


def test_gamma_carries_no_gradient() -> None:
    cell = cell_of()
    start = ARMTState(
        torch.rand(B, 6 * D_MEM, D, dtype=torch.float64),
        torch.rand(B, 6 * D_MEM, dtype=torch.float64, requires_grad=True),
        torch.zeros(B, dtype=torch.float64),
    )
    memory = torch.randn(B, M, D, dtype=torch.float64)
    state = cell.write(memory, start)
    gradient = torch.autograd.grad(state.normaliser.sum(), start.normaliser)[0]
    torch.testing.assert_close(gradient, torch.ones_like(gradient))


@torch.no_grad()
def test_without_correction_every_key_counts_whole() -> None:
    cell = cell_of(correction=False)
    state = cell.init_state(1)
    memory = torch.randn(1, M, D, dtype=torch.float64)
    for _ in range(2):
        state = cell.write(memory, state)
    keys = sum(naive_phi(cell.key.weight @ m) for m in memory[0])
    torch.testing.assert_close(state.normaliser[0], 2 * keys, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_writing_a_key_again_replaces_its_value() -> None:
    cell = cell_of()
    cell.gate.bias.fill_(50.0)
    memory = torch.randn(1, 1, D, dtype=torch.float64)
    state = cell.write(memory, cell.init_state(1))
    for _ in range(20):
        state = cell.write(memory, state)
    phi = naive_phi(cell.key.weight @ memory[0, 0])
    got = state.associations[0].T @ phi / (state.normaliser[0] @ phi + EPS)
    torch.testing.assert_close(got, cell.value.weight @ memory[0, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", LAW_FAMILIES)
@torch.no_grad()
def test_whole_model_equals_layers_unrolled_by_hand(family: str) -> None:
    """Memory tokens flow through all layers; each layer reads its input and writes its output."""
    base = base_model(family)
    config = ARMTConfig(num_memory_tokens=M, d_mem=D_MEM)
    model = MemLMForCausalLM.from_base(base, memory=config, segment_length=SEGMENT)
    randomise(model.memory)
    ids = tokens(2, 3 * SEGMENT)
    expected_state = model.init_state(2)
    attached = model.memory.attached["armt"]
    captured: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    logits = []
    for s in range(3):
        handles = []
        for i, layer in enumerate(model.backbone.layers):
            a, z = (expected_state[f"armt.{i}.{n}"] for n in ("associations", "normaliser"))
            cell = attached.cells[str(i)]

            def before(module, args, kwargs, cell=cell, a=a, z=z):
                return (naive_read(cell, args[0], a, z), *args[1:]), kwargs

            def after(module, args, kwargs, out, i=i, cell=cell, a=a, z=z, s=s):
                hidden = out[0] if isinstance(out, tuple) else out
                captured[i] = naive_write(cell, hidden[:, -M:], a, z, first=s == 0)

            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.register_forward_hook(after, with_kwargs=True))
        text = base.get_input_embeddings()(ids[:, s * SEGMENT : (s + 1) * SEGMENT])
        x = torch.cat([text, attached.tokens.expand(2, -1, -1)], 1)
        logits.append(base(inputs_embeds=x, use_cache=False).logits[:, :SEGMENT])
        for handle in handles:
            handle.remove()
        for i, (a, z) in captured.items():
            expected_state.tensors[f"armt.{i}.associations"] = a
            expected_state.tensors[f"armt.{i}.normaliser"] = z
    out = model(ids)
    for i in range(len(captured)):
        for gates in ("written", "opened"):
            expected_state.tensors[f"armt.{i}.{gates}"] = out.memory_state[f"armt.{i}.{gates}"]
    torch.testing.assert_close(out.logits, torch.cat(logits, 1), rtol=1e-8, atol=1e-8)
    for name, tensor in expected_state.tensors.items():
        torch.testing.assert_close(out.memory_state[name], tensor, rtol=1e-8, atol=1e-8)


def test_keys_may_start_as_the_queries_copy() -> None:
    for shared in (True, False):
        config = ARMTConfig(num_memory_tokens=M, d_mem=D_MEM, shared_start=shared)
        model = MemLMForCausalLM.from_base(base_model("llama"), config, segment_length=SEGMENT)
        for cell in model.memory.attached["armt"].cells.values():
            assert torch.equal(cell.key.weight, cell.query.weight) == shared
            assert cell.key.weight is not cell.query.weight


def test_queries_and_keys_start_at_their_scale() -> None:
    dims = Dims(400, 400, 1, 2, 2, 200, 8)
    config = ARMTConfig(num_memory_tokens=M, d_mem=100, query_scale=3.0, key_scale=0.5)
    cell = ARMT(config, dims)
    torch.manual_seed(0)
    cell.reset_parameters(1.0)
    assert cell.query.weight.std().item() == pytest.approx(3.0 / 20, rel=0.02)
    assert cell.key.weight.std().item() == pytest.approx(0.5 / 20, rel=0.02)


@torch.no_grad()
def test_a_key_written_whole_is_replaced_without_a_denominator_too() -> None:
    """The plain delta rule: what a unit key recalls is then its last value."""
    cell = cell_of(normaliser="none", unit_features=True, num_heads=2, initial_gate=0.0)
    cell.gate.bias.fill_(50.0)
    state = cell.init_state(1)
    for seed in range(3):
        memory = torch.randn(1, 1, D, dtype=torch.float64)
        memory = memory + seed
        state = cell.write(memory, state)
    found = cell.recall(cell.features(cell.key(memory)), state.associations, ())
    torch.testing.assert_close(found, cell.value(memory), rtol=1e-9, atol=1e-9)


def test_the_gate_limit_bounds_the_gate() -> None:
    free, bound = cell_of(), cell_of(gate_limit=2.0)
    memory = 100 * torch.randn(B, M, D, dtype=torch.float64)
    low, high = torch.sigmoid(torch.tensor([-2.0, 2.0], dtype=torch.float64))
    beta = bound._beta(memory, torch.float64)
    assert low <= beta.min() and beta.max() <= high
    small = 1e-5 * memory
    torch.testing.assert_close(
        free._beta(small, torch.float64), bound._beta(small, torch.float64), rtol=0, atol=1e-2
    )


def test_writing_costs_its_mean_gate_whatever_the_windows() -> None:
    config = ARMTConfig(num_memory_tokens=M, d_mem=D_MEM, write_cost=0.5)
    model = MemLMForCausalLM.from_base(base_model("llama"), memory=config, segment_length=SEGMENT)
    randomise(model.memory)
    ids = tokens(2, 3 * SEGMENT)
    plain = model.eval()(ids, labels=ids)
    assert plain.auxiliary_loss is None
    model.train()
    state, expected = None, 0.0
    for part in ids.split(SEGMENT, 1):
        out = model(part, memory_state=state)
        assert out.loss is None
        state = out.memory_state
        written = [float(state[f"armt.{i}.written"].mean().detach()) for i in range(2)]
        expected += 0.5 * sum(written) / 2 / 3
    for depth in (None, 1, 2):
        out = model(ids, labels=ids, bptt_depth=depth)
        assert abs(float(out.auxiliary_loss.detach()) - expected) < 1e-10
        assert abs(float((out.loss - plain.loss).detach()) - expected) < 1e-9
    assert (
        torch.autograd.grad(out.auxiliary_loss, model.memory.attached["armt"].tokens)[0].abs().sum()
        > 0
    )
    # A row that has ended writes nothing, and pays nothing.
    mask = torch.ones_like(ids)
    mask[1, SEGMENT:] = 0
    ragged = model(ids, attention_mask=mask)
    whole = model(ids[:1])
    short = model(ids[1:, :SEGMENT])
    # Three segments of the one row, one of the other.
    mean = (3 * whole.auxiliary_loss + short.auxiliary_loss) / 4
    assert abs(float((ragged.auxiliary_loss - mean).detach())) < 1e-10


def test_bad_options_are_refused() -> None:
    for bad, message in (
        ({"write_cost": -1.0}, "write_cost=-1.0"),
        ({"gate_limit": 0.0}, "gate_limit"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 3}, "num_heads=3 does not divide d_mem=64"),
        ({"num_heads": 64}, "num_heads=64 does not divide hidden_size=32"),
        ({"key_scale": 0.0}, "key_scale=0.0"),
        ({"key_scale": 0.5, "shared_start": True}, "shared_start=True"),
        ({"normaliser": "none"}, "unit_features=True"),
        ({"normaliser": "none", "unit_features": True, "correction": False}, "correction=False"),
    ):
        with pytest.raises(ValueError, match=message):
            MemLMForCausalLM.from_base(base_model("llama"), ARMTConfig(**bad), segment_length=8)
    with pytest.raises(ValueError, match="d_mem=0"):
        MemLMForCausalLM.from_base(base_model("llama"), ARMTConfig(d_mem=0), segment_length=8)
    with pytest.raises(ValueError, match="num_memory_tokens=20"):
        MemLMForCausalLM.from_base(
            base_model("llama"), ARMTConfig(num_memory_tokens=20), segment_length=8
        )
    with pytest.raises(ValueError, match=r"layers=\(0, 7\)"):
        MemLMForCausalLM.from_base(base_model("llama"), ARMTConfig(layers=(0, 7)), segment_length=8)


def test_a_threshold_is_for_reading_and_not_for_training() -> None:
    cell = cell_of(write_threshold=float("inf"), normaliser="written")
    memory, state = torch.randn(B, M, D, dtype=torch.float64), cell.init_state(B)
    state = cell.train().write(memory, state)
    assert state.associations.abs().sum() > 0 and state.written.min() > 0
    after = cell.eval().write(memory, state)
    assert torch.equal(after.associations, state.associations)
    assert torch.equal(after.normaliser, state.normaliser)
    assert not after.written.any()


@pytest.mark.parametrize(
    "options", [{"write_threshold": -0.5}, {"normaliser": "some"}], ids=lambda o: next(iter(o))
)
def test_thresholds_and_normalisers_there_are_not_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        MemLMForCausalLM.from_base(base_model("llama"), ARMTConfig(**options), segment_length=8)
