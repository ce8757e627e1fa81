"""Infini-attention against the paper's sums, kept as they are printed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from memlm import MemLMForCausalLM
from memlm.memory import QKV, InfiniConfig
from memlm.memory.base import Dims
from memlm.memory.infini import Infini
from tests.cases import FAMILIES, SEGMENT, base_model, tokens

EXACT = {"rtol": 0.0, "atol": 1e-10}
H, G, T, D = 4, 2, 5, 3


def cell(**options) -> Infini:
    memory = Infini(InfiniConfig(**options), Dims(H * D, H * D, 1, H, G, D, T)).double()
    torch.nn.init.normal_(memory.gate)
    return memory


def segments(count: int, rows: int = 2) -> list[QKV]:
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, T, D, generator=generator, dtype=torch.float64)

    return [QKV(random(H), random(G), random(G)) for _ in range(count)]


def local(x: QKV, mask=None) -> torch.Tensor:
    k, v = (t.repeat_interleave(H // G, 1) for t in (x.k, x.v))
    return F.scaled_dot_product_attention(x.q, k, v, is_causal=True)


def sigma(x: torch.Tensor) -> torch.Tensor:
    return F.elu(x) + 1


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_equals_the_sums_of_the_paper(update: str) -> None:
    memory, parts = cell(update=update), segments(4)
    generator = torch.Generator().manual_seed(3)
    masks = [torch.rand(2, T, generator=generator) < 0.6 for _ in parts]
    state = memory.init_state(2)
    big = torch.zeros(2, H, D, D, dtype=torch.float64)
    norm = torch.zeros(2, H, D, dtype=torch.float64)
    for index, (x, mask) in enumerate(zip(parts, masks, strict=True)):
        y, state = memory(x, state, local, mask=mask)
        for row in range(2):
            for head in range(H):
                group = head // (H // G)
                attention = local(x)[row, head]
                if index:
                    gate = torch.sigmoid(memory.gate[head])
                    for t in range(T):
                        phi = sigma(x.q[row, head, t])
                        read = (phi @ big[row, head]) / (phi @ norm[row, head])
                        expected = gate * read + (1 - gate) * attention[t]
                        torch.testing.assert_close(y[row, head, t], expected, **EXACT)
                else:
                    torch.testing.assert_close(y[row, head], attention, **EXACT)
                old, count = big[row, head].clone(), norm[row, head].clone()
                for t in range(T):
                    if not mask[row, t]:
                        continue
                    phi, value = sigma(x.k[row, group, t]), x.v[row, group, t]
                    if update == "delta" and index:
                        value = value - (phi @ old) / (phi @ count)
                    big[row, head] += phi[:, None] * value[None]
                    norm[row, head] += phi
    for row in range(2):
        tokens_written = sum(int(mask[row].sum()) for mask in masks)
        scale = 1 / (1 + tokens_written)
        assert abs(float(state.share[row]) - scale) < 1e-12
        for group in range(G):
            head = group * (H // G)
            torch.testing.assert_close(
                state.associations[row, group], big[row, head] * scale, **EXACT
            )
            torch.testing.assert_close(
                state.normaliser[row, group], norm[row, head] * scale, **EXACT
            )


def test_a_linear_memory_is_linear_attention_over_all_past_tokens() -> None:
    memory, parts = cell(update="linear"), segments(5)
    state = memory.init_state(2)
    for x in parts:
        _, state = memory(x, state, local, mask=None)
    k = torch.cat([x.k for x in parts], 2).repeat_interleave(H // G, 1)
    v = torch.cat([x.v for x in parts], 2).repeat_interleave(H // G, 1)
    q = segments(6)[-1].q
    weights = torch.einsum("bhtd,bhnd->bhtn", sigma(q), sigma(k))
    expected = (weights / weights.sum(-1, keepdim=True)) @ v
    torch.testing.assert_close(memory.read(q, state), expected, **EXACT)


def test_a_closed_gate_is_the_base_model() -> None:
    base, ids = base_model("llama"), tokens(1, 3 * SEGMENT)
    plain = torch.cat([base(part).logits for part in ids.split(SEGMENT, 1)], 1)
    model = MemLMForCausalLM.from_base(
        base, memory=InfiniConfig(initial_gate=-1e9), segment_length=SEGMENT
    )
    torch.testing.assert_close(model(ids).logits, plain, **EXACT)


def test_ten_million_tokens_neither_overflow_nor_freeze() -> None:
    memory = cell(update="linear").float()
    state = memory.init_state(1)
    x = QKV(*(t[:1].float() for t in segments(1)[0]))
    long = state._replace(share=torch.full((1,), 1e-7))
    after = memory.write(x.k, x.v, long, None)
    assert 0 < float(long.share - after.share) < 1e-12
    for _ in range(2000):
        state = memory.write(x.k, x.v, state, None)
    assert state.associations.abs().max() < 20
    assert abs(float(state.share) * (1 + 2000 * T) - 1) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_keys_carry_no_position(family: str, monkeypatch) -> None:
    """In the first layer a key depends on the token alone, unless its embedding has a position."""
    seen = []
    write = Infini.write

    def spy(self, k, v, state, mask):
        seen.append(k)
        return write(self, k, v, state, mask)

    monkeypatch.setattr(Infini, "write", spy)
    base = base_model(family)
    model = MemLMForCausalLM.from_base(base, memory="infini", segment_length=SEGMENT)
    model(torch.tensor([[7, 9, 7, 11]]))
    k = seen[0]
    same = torch.allclose(k[:, :, 0], k[:, :, 2], atol=1e-12)
    assert same == hasattr(base.get_decoder(), "rotary_emb")


def test_an_unknown_update_is_refused() -> None:
    with pytest.raises(ValueError, match="update='hebb'"):
        MemLMForCausalLM.from_base(
            base_model("llama"), memory=InfiniConfig(update="hebb"), segment_length=SEGMENT
        )
