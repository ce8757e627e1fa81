"""MemoryLLM against its equations, one row and one vector at a time, around plain transformers' layers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from memlm.memory import MemoryLLMConfig
from memlm.memory.base import Dims
from memlm.memory.memoryllm import MemoryLLM
from memlm.memory.parts.chance import BITS, draw, mixed, next_count
from memlm.modeling import MemLMForCausalLM
from tests.cases import SEGMENT, base_model, memory_model, randomise, tokens

D, ROWS, T, N, K = 4, 3, 5, 7, 2
DIMS = Dims(D, D, 2, 2, 2, 2, T, layer=1)
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def cell(pool_size: int = N, num_written: int = K) -> MemoryLLM:
    config = MemoryLLMConfig(pool_size=pool_size, num_written=num_written)
    memory = MemoryLLM(MemoryLLM.resolve(config, DIMS), DIMS).double()
    memory.reset_parameters(1.0)
    randomise(memory)
    return memory


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def alone(x: torch.Tensor) -> torch.Tensor:
    """A causal stand-in for a layer on one row's real positions (n, D), places included."""
    places = torch.arange(len(x), dtype=x.dtype)[:, None]
    return x + 0.5 * x.cumsum(dim=0).sin() + 0.1 * (places * x).cos()


def layer(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(x, 1e6)
    for row, real in enumerate(mask):
        out[row, real] = alone(x[row, real])
    return out


def hashed(value: int) -> int:
    """The finaliser as published, in Python's integers."""
    for _ in range(2):
        value = ((value ^ (value >> 16)) * 0x45D9F3B) % 2**32
    return value ^ (value >> 16)


def by_hand(
    own: MemoryLLM, x: torch.Tensor, pool: list[torch.Tensor], counter: int, size: int
) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """One row's real tokens (n, D); pool: its vectors, oldest first. Outputs, and what is kept next."""
    outputs = alone(torch.stack([*pool, *x]))[len(pool) :]
    count = own.num_written
    seen = [*pool[-count:], *x]
    first = max(0, len(seen) - count)
    marked = [v + own.mark if i >= first else v for i, v in enumerate(seen)]
    new = list(alone(torch.stack(marked))[first:])
    # Vectors stand at the end of `size` places, and those with the largest numbers leave.
    chance = {
        i: hashed(hashed(counter) ^ hashed(size - len(pool) + i + 1)) for i in range(len(pool))
    }
    crowd = max(0, len(pool) + len(new) - size)
    leaving = sorted(chance, key=lambda i: chance[i], reverse=True)[:crowd]
    kept = [vector for i, vector in enumerate(pool) if i not in leaving]
    return outputs, [*kept, *new], (counter * 1664525 + 1013904223) % 2**32


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_equals_the_equations(padded: bool) -> None:
    own = cell()
    state = own.init_state(ROWS)
    pools: list[list[torch.Tensor]] = [[] for _ in range(ROWS)]
    counters = [hashed(2)] * ROWS
    dropped = 0
    for segment in range(7):
        x, mask = random(ROWS, T, D, seed=segment), torch.ones(ROWS, T, dtype=torch.bool)
        if padded:
            # One row has a single token at times: fewer than are written.
            mask = random(ROWS, T, seed=10 + segment) > (0.0 if segment % 2 else 1.2)
            mask[:, segment % T] = True
        y, state = own(x, state, layer, mask=mask if padded else None)
        for row in range(ROWS):
            before = len(pools[row])
            outputs, pools[row], counters[row] = by_hand(
                own, x[row, mask[row]], pools[row], counters[row], N
            )
            dropped += before + K - len(pools[row])
            torch.testing.assert_close(y[row, mask[row]], outputs, **CLOSE)
            assert int(state.length[row]) == len(pools[row])
            assert int(state.counter[row]) == counters[row]
            kept = state.pool[row, -len(pools[row]) :]
            torch.testing.assert_close(kept, torch.stack(pools[row]), **CLOSE)
            assert not state.pool[row, : -len(pools[row])].any()
    assert dropped > 10


@torch.no_grad()
def test_around_a_transformer_the_pool_is_text_before_the_segment() -> None:
    """The lowest layer's pool and outputs, by the base model's own layer."""
    config = MemoryLLMConfig(pool_size=8, num_written=3)
    model, ids = memory_model("llama", config), tokens(1, 2 * SEGMENT)
    state = model(ids[:, :SEGMENT]).memory_state
    plain, own = base_model("llama"), model.memory.attached["memoryllm"].cells["0"]

    def through(x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1])[None]
        rotary = plain.model.rotary_emb(x, places)
        out = plain.model.layers[0](x, position_embeddings=rotary, attention_mask=None)
        return out if isinstance(out, torch.Tensor) else out[0]

    x = plain.get_input_embeddings()(ids)
    marked = x[:, :SEGMENT].clone()
    marked[:, -3:] += own.mark
    pool = through(marked)[:, -3:]
    torch.testing.assert_close(state["memoryllm.0.pool"][:, -3:], pool, **CLOSE)
    joined = torch.cat([pool, x[:, SEGMENT:]], dim=1)
    found = []
    second = model.backbone.layers[1]
    hook = second.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model(ids[:, SEGMENT:], memory_state=state, write=False)
    hook.remove()
    torch.testing.assert_close(found[0], through(joined)[:, 3:], **CLOSE)


@torch.no_grad()
def test_a_full_pool_loses_k_vectors_at_random_and_none_that_are_new() -> None:
    own = cell(pool_size=30, num_written=2)
    state, places = own.init_state(1), Counter()
    for segment in range(1, 401):
        before = state.pool[0, :, 0].int().tolist()
        new = torch.tensor([2.0 * segment, 2 * segment + 1]).reshape(1, 2, 1).expand(1, 2, D)
        state = own.replaced(new, torch.ones(1, 2, dtype=torch.bool), state)
        after = state.pool[0, :, 0].int().tolist()
        assert after == sorted(after) and after[-2:] == [2 * segment, 2 * segment + 1]
        if segment > 15:
            assert int(state.length) == 30
            places.update(i for i, one in enumerate(before) if one not in after)
    # Every place is left as often as any other: 770 / 30 times, give or take 5.
    assert sum(places.values()) == 770 and min(places.values()) > 8 and len(places) == 30
    assert max(places.values()) < 50


@torch.no_grad()
def test_half_is_gone_after_twenty_segments_as_published() -> None:
    """With N / K = 30 the part (1 - 1 / 30)^t is left after t segments: .51, .18, .03 after 20, 50, 100."""
    own, held = cell(60, 2), []
    state = own.init_state(1)
    for segment in range(630):
        new = torch.full((1, 2, D), float(segment), dtype=torch.float64)
        state = own.replaced(new, torch.ones(1, 2, dtype=torch.bool), state)
        held.append(Counter(state.pool[0, :, 0].int().tolist()))
    for lag in (20, 50, 100):
        left = [held[t + lag][t] / 2 for t in range(30, 630 - lag)]
        assert abs(sum(left) / len(left) - (1 - 1 / 30) ** lag) < 0.03


@torch.no_grad()
def test_chance_depends_on_the_layer_and_on_nothing_outside_the_state() -> None:
    model, ids = memory_model("llama", MemoryLLMConfig(pool_size=6, num_written=3)), tokens(2, 30)
    torch.manual_seed(1)
    one = model(ids).memory_state
    torch.manual_seed(2)
    other = model(ids).memory_state
    assert all(torch.equal(one[name], other[name]) for name in one.tensors)
    counters = [model.init_state(1)[f"memoryllm.{layer}.counter"] for layer in (0, 1)]
    assert not torch.equal(*counters)


def test_hashes_are_the_published_function_and_spread() -> None:
    values = torch.tensor([0, 1, 2, 77, BITS])
    assert (
        mixed(values).tolist()
        == [hashed(int(v)) for v in values]
        == [mixed(int(v)) for v in values]
    )
    counts, seen = torch.tensor([mixed(3)]), []
    for _ in range(500):
        seen.append(draw(counts, torch.arange(8)))
        counts = next_count(counts)
    # Each of 8 places has the largest number as often as any other: 62.5 times, give or take 7.4.
    largest = torch.cat(seen).argmax(dim=1).bincount(minlength=8)
    assert largest.min() > 35 and largest.max() < 95


def test_a_pool_fits_what_the_base_leaves() -> None:
    short = Dims(D, D, 2, 2, 2, 2, 32, max_positions=256)
    assert MemoryLLM.resolve(MemoryLLMConfig(), short).pool_size == 14 * 16
    free = Dims(D, D, 2, 2, 2, 2, 32)
    assert MemoryLLM.resolve(MemoryLLMConfig(), free).pool_size == 30 * 16
    with pytest.raises(ValueError, match="pool_size=1 cannot hold the num_written=2"):
        MemoryLLM.resolve(MemoryLLMConfig(pool_size=1, num_written=2), free)
    with pytest.raises(ValueError, match="num_written=0 writes nothing"):
        MemoryLLM.resolve(MemoryLLMConfig(num_written=0), free)
    base = base_model("llama")
    with pytest.raises(ValueError, match="too large for the base"):
        MemLMForCausalLM.from_base(
            base, memory=MemoryLLMConfig(pool_size=60, num_written=2), segment_length=SEGMENT
        )
