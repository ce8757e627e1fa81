"""The multiplications that a mechanism's equations need, beside those that its code runs.

By name: a function of one cell (a mechanism where it is attached), the base's sizes, the tokens of a
segment and those before it, which gives what reading and writing add to that segment, forward. A mechanism
without a line here is bounded by what is counted when it runs (`timing.multiplications`); a line says,
besides, how much of that its equations ask for. A test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from memlm import MemLMForCausalLM


class Base(NamedTuple):
    """Sizes of a Llama: layers, hidden, MLP, heads for queries, for keys and values, size of a head."""

    layers: int
    hidden: int
    inner: int
    heads: int
    groups: int
    size: int

    def layer(self, tokens: int, pairs: int) -> int:
        """One layer on so many tokens, whose queries see `pairs` keys in all."""
        width, narrow = self.heads * self.size, self.groups * self.size
        projections = self.hidden * (2 * width + 2 * narrow + 3 * self.inner)
        return tokens * projections + 2 * pairs * width


def causal(tokens: int) -> int:
    """Pairs where every token sees itself and those before it."""
    return tokens * (tokens + 1) // 2


def longer(base: Base, tokens: int, more: int) -> int:
    """What `more` positions cost a layer beside `tokens`, all of them causal."""
    own, both = base.layer(tokens, causal(tokens)), tokens + more
    return base.layer(both, causal(both)) - own


def armt(cell: Any, base: Base, tokens: int, before: int) -> int:
    m, p, d, k = cell.num_memory_tokens, cell.num_features, base.hidden, cell.config.d_mem
    read = (tokens + m) * (d * k + p * (d + 1))
    write = m * (d * k + d * d + d * cell.heads + p * (d + 1) + p + p * d)
    return longer(base, tokens, m) + read + write


def rmt(cell: Any, base: Base, tokens: int, before: int) -> int:
    return base.layers * longer(base, tokens, 2 * cell.num_memory_tokens)


def infini(cell: Any, base: Base, tokens: int, before: int) -> int:
    read = base.size * (base.size + 1)
    # The delta rule reads what its keys recall.
    write = base.size * base.size + read
    return tokens * (base.heads * read + base.groups * write)


def transformer_xl(cell: Any, base: Base, tokens: int, before: int) -> int:
    return 2 * tokens * min(cell.memory_length, before) * base.heads * base.size


def titans(cell: Any, base: Base, tokens: int, before: int) -> int:
    """A chunk at a time, momentum read and written beside the weights; no convolutions counted."""
    memory = cell.memory
    heads, size, chunk = memory.heads, memory.size, memory.chunk
    layers = [(weight.shape[1], weight.shape[2]) for weight in memory.initial]
    weights = sum(n * m for n, m in layers)
    # Gates of the chunk, then keys through all layers, errors back to the first; what is added to weights
    # and momentum, what is read from both, and from the chunk itself.
    gates = chunk**3 + chunk**2
    learned = chunk * (weights + sum(n * m for n, m in layers[1:]))
    added = read = 2 * chunk * weights
    within = chunk**2 * sum(n + m for n, m in layers)
    chunks = heads * (tokens // chunk) * (gates + learned + added + read + within)
    return tokens * base.hidden * (5 * heads * size + 3 * heads) + chunks


NEEDS: dict[str, Callable[[Any, Base, int, int], int]] = {
    "none": lambda *given: 0,
    "armt": armt,
    "rmt": rmt,
    "infini": infini,
    "transformer-xl": transformer_xl,
    "titans-mag": titans,
}


def needed(name: str, model: MemLMForCausalLM, tokens: int, rows: int, segments: int) -> int | None:
    """Multiplications of reading so many full segments, the base and a row's last logits included.

    None where no line says.
    """
    if name not in NEEDS:
        return None
    config = model.config.text_config
    base = Base(
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.hidden_size // config.num_attention_heads,
    )
    cells = [cell for found in model.memory.cells().values() for cell in found]
    plain = base.layers * base.layer(tokens, causal(tokens))
    own = sum(
        NEEDS[name](cell.memory, base, tokens, number * tokens)
        for cell in cells
        for number in range(segments)
    )
    return rows * (segments * plain + own + base.hidden * config.vocab_size)
