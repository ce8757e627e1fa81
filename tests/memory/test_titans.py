"""MAC, MAG and MAL against the paper's recurrence, one row and one token at a time, autograd inside."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from memlm import MemLMForCausalLM
from memlm.backbone.heads import not_later
from memlm.memory import (
    MemoraConfig,
    MonetaConfig,
    OmegaConfig,
    TitansMACConfig,
    TitansMAGConfig,
    TitansMALConfig,
    YaadConfig,
    memory_class,
    name_of,
)
from memlm.memory.base import Dims
from memlm.memory.parts.deep_memory import read
from memlm.memory.parts.titans import Titans
from memlm.memory.titans_mac import TitansMAC
from memlm.memory.titans_mag import TitansMAG
from memlm.memory.titans_mal import TitansMAL
from tests.cases import FAMILIES, SEGMENT, base_model, memory_model, randomise, tokens

EXACT = {"rtol": 0.0, "atol": 1e-9}
D, T, ROWS = 6, 7, 2
KINDS = {"mac": TitansMAC, "mag": TitansMAG, "mal": TitansMAL}


def cell(kind: str, **options) -> Titans:
    cls = KINDS[kind]
    dims = Dims(D, D, 1, 2, 2, 3, T)
    memory = cls(cls.resolve(cls.Config(**options), dims), dims).double()
    memory.reset_parameters(1.0)
    randomise(memory)
    return memory


def norm(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def answer(weights: list[torch.Tensor], x: torch.Tensor, gated: bool = False) -> torch.Tensor:
    """The MLP that is the memory, for one head: x (n,) -> (d,)."""
    for weight in weights[:-1]:
        z = x @ weight
        a, b = z.chunk(2) if gated else (z, 1.0)
        x = F.silu(a) * b * (2 / len(a)) ** 0.5
    return x @ weights[-1]


def monomials(x: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """x (d,) and the products of two of its numbers, in these shares (2,) of its length."""
    pairs = [
        x[i] * x[j] * (1 if i == j else 2**0.5) for i in range(len(x)) for j in range(i, len(x))
    ]
    a, b = shares / shares.norm()
    return torch.cat([a * x, b * torch.stack(pairs)])


class Block:
    """One row of the block: weights as lists, a list of past inputs for each convolution."""

    def __init__(self, memory: Titans) -> None:
        self.own, self.config = memory.memory, memory.config
        self.weights = [[w[h].clone() for w in self.own.initial] for h in range(self.own.heads)]
        self.carried = [[torch.zeros_like(w) for w in head] for head in self.weights]
        self.past: list[list[torch.Tensor]] = [[] for _ in range(4)]
        # What a window may still take: key, value, rate and gates of each token, by head.
        self.seen: list[list[tuple]] = [[] for _ in range(self.own.heads)]

    def project(self, x: torch.Tensor, linear, stream: int) -> torch.Tensor:
        z = linear(norm(x) * self.own.norm)
        if self.config.conv_size:
            self.past[stream].append(z)
            kernel = self.own.kernels[stream][:, 0]
            window = self.past[stream][-self.config.conv_size :]
            z = sum(kernel[:, -i] * window[-i] for i in range(1, len(window) + 1))
        return F.silu(z).reshape(self.own.heads, self.own.size)

    def finish(self, heads: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        read = torch.cat([norm(y) for y in heads]) * self.own.out_norm
        return self.own.out(read * torch.sigmoid(self.own.out_gate(norm(x) * self.own.norm)))

    def say(self, weights: list[torch.Tensor], x: torch.Tensor, h: int) -> torch.Tensor:
        """What one head's memory says to x (d,)."""
        config, features = self.config, x
        if config.key_features == "quadratic":
            features = monomials(x, self.own.shares[h])
        told = answer(weights, features, config.gated)
        if not config.residual:
            return told
        centred = told - told.mean()
        return x + centred / (centred.square().mean() + 1e-6).sqrt()

    def lengths(self, h: int) -> list[float]:
        """W over A where W is A under a norm, for each layer of a head."""
        q, starts = self.config.norm_power, [w[h] for w in self.own.initial]
        if self.config.retention != "norm":
            return [1.0] * len(starts)
        sizes = [
            held.abs().pow(q).sum().pow(1 / q) / start.abs().pow(q).sum().pow(1 / q)
            for held, start in zip(self.weights[h], starts, strict=True)
        ]
        return [1 / float(size.detach()) ** (q - 2) for size in sizes]

    def made(self, h: int, lengths: list[float]) -> list[torch.Tensor]:
        """The weights of a head, of what is held."""
        if self.config.retention == "softmax":
            return [self.config.mass * len(w) * w.softmax(0) for w in self.weights[h]]
        return [w * length for w, length in zip(self.weights[h], lengths, strict=True)]

    def ask(self, x: torch.Tensor) -> torch.Tensor:
        """What the memory says to one token, nothing written."""
        q = F.normalize(self.project(x, self.own.query, 3), dim=-1)
        every = range(self.own.heads)
        heads = [self.say(self.made(h, self.lengths(h)), q[h], h) for h in every]
        return torch.cat([norm(y) for y in heads]) * self.own.out_norm

    def cost(self, error: torch.Tensor, gate: dict[str, torch.Tensor]) -> torch.Tensor:
        """What one head's error comes to."""
        if self.config.objective == "square":
            return error.square().sum()
        if self.config.objective == "power":
            p, e = self.config.error_power, error.detach()
            return (error * p * (10 * e).tanh() * (e**2 + 1e-6) ** ((p - 1) / 2)).sum()
        bound = self.own.size**0.5 * (1 + gate["bound"].exp()).log()
        size = error.norm()
        return size**2 if size <= bound else 2 * bound * size - bound**2

    def segment(self, inputs: torch.Tensor) -> torch.Tensor:
        """(n, D) -> (n, D): every token written, then read."""
        config, out = self.config, []
        for t, x in enumerate(inputs):
            if t % config.chunk_length == 0:
                lengths = [self.lengths(h) for h in range(self.own.heads)]
                made = [self.made(h, one) for h, one in enumerate(lengths)]
                start = [[w.detach().clone() for w in head] for head in made]
            q = F.normalize(self.project(x, self.own.query, 0), dim=-1)
            k = F.normalize(self.project(x, self.own.key, 1), dim=-1)
            v = self.project(x, self.own.value, 2)
            gates = self.own.gates(norm(x) * self.own.norm).reshape(-1, self.own.heads)
            names = ["rate", *["momentum"] * config.momentum, "forgetting"]
            names += ["bound"] * (config.objective == "huber")
            gates = dict(zip(names, gates, strict=True))
            heads = []
            for h in range(self.own.heads):
                eta = torch.sigmoid(gates["momentum"][h]) if config.momentum else 0.0
                alpha = torch.sigmoid(gates["forgetting"][h])
                theta = config.max_rate / 2 * torch.sigmoid(gates["rate"][h])
                theta = theta * (1 - eta) if config.coupled_rate else theta
                self.seen[h].append((k[h], v[h], theta, {n: g[h] for n, g in gates.items()}))
                at = [w.requires_grad_() for w in start[h]]
                step = [torch.zeros_like(w) for w in at]
                for key, value, rate, own in self.seen[h][-config.window :]:
                    loss = self.cost(self.say(at, key, h) - value, own)
                    surprise = torch.autograd.grad(loss, at)
                    size = torch.stack([g.square().sum() for g in surprise]).sum().sqrt()
                    if config.max_surprise is not None:
                        limit = config.max_surprise * self.own.size**0.5
                        surprise = [g * min(1.0, float(limit / size)) for g in surprise]
                    share = rate / config.window
                    step = [s + share * g for s, g in zip(step, surprise, strict=True)]
                self.carried[h] = [eta * s - g for s, g in zip(self.carried[h], step, strict=True)]
                self.weights[h] = [
                    (1 - alpha) * w + s
                    for w, s in zip(self.weights[h], self.carried[h], strict=True)
                ]
                heads.append(self.say(self.made(h, lengths[h]), q[h], h))
            out.append(self.finish(heads, x))
        return torch.stack(out)


def attention(x, mask=None, times=None, last=None):
    """A stage that mixes by content alone: softmax over what a position may see."""
    total = x.shape[1]
    seen = torch.ones(x.shape[0], total, total, dtype=torch.bool).tril()
    if mask is not None:
        seen = seen & (mask[:, None] | torch.eye(total, dtype=torch.bool))
    if times is not None:
        seen = seen & (times[None] <= times[:, None])
    scores = (x @ x.mT).masked_fill(~seen, -1e30)
    return scores.softmax(-1) @ (x * 0.7)


def single(query: torch.Tensor, context: list[torch.Tensor]) -> torch.Tensor:
    keys = torch.stack(context)
    return (keys @ query).softmax(0) @ (keys * 0.7)


def met(memory: Titans, y: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
    """What attention returns, and what the memory says to it."""
    return y + told if memory.config.combine == "add" else y * 2 / (1 + (-told).exp())


def reference(kind: str, memory: Titans, block: Block, x: torch.Tensor) -> torch.Tensor:
    """One segment of one row, x (n, D)."""
    leading = [] if memory.persistent is None else list(memory.persistent)
    if kind == "mac":
        told = [memory.context(block.ask(token)) for token in x]
        y = torch.stack(
            [single(x[t], [*leading, *told[: t + 1], *x[: t + 1]]) for t in range(len(x))]
        )
        return met(memory, y, block.segment(y))
    if kind == "mag":
        y = torch.stack([single(x[t], [*leading, *x[: t + 1]]) for t in range(len(x))])
        return met(memory, y, block.segment(x))
    z = x + block.segment(x)
    return torch.stack([single(z[t], [*leading, *z[: t + 1]]) for t in range(len(z))])


# Rules of other papers, which MAC asks before it writes and after.
RULES = [
    {"objective": "power", "retention": "norm", "residual": True, "momentum": False},
    {"window": 3, "key_features": "quadratic", "gated": True, "residual": True},
    {"retention": "softmax", "residual": True, "momentum": False, "conv_size": 3},
    {"objective": "huber", "initial_bound": 0.3, "window": 2, "gated": True, "depth": 3},
]


@pytest.mark.parametrize("options", RULES)
def test_other_rules_equal_their_recurrences(options: dict) -> None:
    test_equals_the_recurrence_token_by_token("mac", {"chunk_length": 3, **options}, True)


OPTIONS = [
    {"chunk_length": 1, "depth": 1, "max_surprise": None},
    {"chunk_length": 1, "conv_size": 3, "max_rate": 1.5},
    {"chunk_length": 3, "depth": 2, "expansion": 3, "max_surprise": 0.5},
    {"chunk_length": 7, "depth": 3, "num_heads": 3, "num_persistent_tokens": 2, "conv_size": 4},
    {"chunk_length": 4, "num_heads": 1, "head_dim": 5, "num_persistent_tokens": 1},
    {"chunk_length": 1, "coupled_rate": False, "max_rate": 0.2, "max_surprise": None},
    {"chunk_length": 3, "coupled_rate": False, "combine": "multiply", "conv_size": 4},
    {"chunk_length": 3, "momentum": False},
    {"chunk_length": 3, "momentum": False, "objective": "huber", "initial_bound": 0.3},
    {"chunk_length": 1, "objective": "huber", "max_surprise": None, "conv_size": 3},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "padded"),
    [*((options, True) for options in OPTIONS), (OPTIONS[1], False), (OPTIONS[3], False)],
)
def test_equals_the_recurrence_token_by_token(kind: str, options: dict, padded: bool) -> None:
    if kind == "mal":
        options = {name: value for name, value in options.items() if name != "combine"}
    memory = cell(kind, **options)
    generator = torch.Generator().manual_seed(0)
    blocks, state = [Block(memory) for _ in range(ROWS)], memory.init_state(ROWS)
    for _ in range(2):
        x = torch.randn(ROWS, T, D, generator=generator, dtype=torch.float64)
        mask = torch.rand(ROWS, T, generator=generator) < 0.7 if padded else None
        before = state
        y, state = memory(x, before, attention, mask=mask)
        again, same = memory(x, before, attention, mask=mask, write=False)
        torch.testing.assert_close(again, y, **EXACT)
        assert same is before
        for i, block in enumerate(blocks):
            real = torch.ones(T, dtype=torch.bool) if mask is None else mask[i]
            if not real.any():
                continue
            expected = reference(kind, memory, block, x[i, real])
            torch.testing.assert_close(y[i, real], expected, **EXACT)
            for h in range(memory.memory.heads):
                for layer, weight in enumerate(block.weights[h]):
                    torch.testing.assert_close(state.weights[layer][i, h], weight, **EXACT)


def test_learning_one_chunk_changes_the_surprise_of_the_next() -> None:
    """A memory whose gradients are all taken at the first weights would pass the other tests."""
    memory = cell("mag", chunk_length=4, max_rate=1.0, depth=1)
    x = torch.randn(1, 4, D, dtype=torch.float64)
    _, once = memory(x, memory.init_state(1), attention, mask=None)
    _, twice = memory(x, once, attention, mask=None)
    step = [b - a for a, b in zip(memory.init_state(1).weights, once.weights, strict=True)]
    another = [b - a for a, b in zip(once.weights, twice.weights, strict=True)]
    assert max((a - b).abs().max() for a, b in zip(step, another, strict=True)) > 1e-3


REMEMBERING = {
    "mac": TitansMACConfig(),
    "mag": TitansMAGConfig(),
    "mal": TitansMALConfig(),
    "memora": MemoraConfig(),
    "moneta": MonetaConfig(),
    "omega": OmegaConfig(),
    "yaad": YaadConfig(),
}


@pytest.mark.parametrize("kind", REMEMBERING)
def test_the_memory_remembers_what_it_was_told(kind: str) -> None:
    """Untrained, the block's loss on what it has read falls while it reads: no sign is wrong."""
    torch.manual_seed(0)
    dims = Dims(32, 32, 1, 2, 2, 16, 64)
    plain = REMEMBERING[kind]
    cls = memory_class(name_of(plain))
    config = cls.resolve(replace(plain, chunk_length=8, initial_forgetting=1e-4), dims)
    memory = cls(config, dims).double()
    memory.reset_parameters(1.0)
    block, x = memory.memory, torch.randn(4, 64, 32, dtype=torch.float64)

    def loss(state) -> float:
        normed = F.rms_norm(x, (32,), block.norm, 1e-6)
        k, v = (
            block._project(normed, linear, 0, state, None)[0] for linear in (block.key, block.value)
        )
        k = F.normalize(k, dim=-1)
        said = read(block._mapped(k), block._made_of(state.weights), block.rule)
        return float((block._beside(k, said) - v).square().sum(-1).mean().detach())

    state, found = memory.init_state(4), []
    for _ in range(6):
        found.append(loss(state))
        _, state = block(x, state, None)
    assert all(later < earlier for earlier, later in pairwise(found))
    assert found[-1] < 0.75 * found[0]


@pytest.mark.parametrize("kind", ["mag", "omega", "yaad"])
@torch.no_grad()
def test_a_memory_that_has_forgotten_all_its_weights_learns_nothing_more(kind: str) -> None:
    """As docs/methods/titans-mac.md warns: at zero there is no gradient."""
    plain = REMEMBERING[kind]
    cls, dims = memory_class(name_of(plain)), Dims(32, 32, 1, 2, 2, 16, 64)
    memory = cls(cls.resolve(plain, dims), dims)
    memory.reset_parameters(1.0)
    x, state = torch.randn(1, 64, 32), memory.init_state(1)
    told = memory.memory(x, state, None)[1]
    empty = state._replace(weights=tuple(torch.zeros_like(w) for w in state.weights))
    after = memory.memory(x, empty, None)[1]
    assert all(w.any() for w in told.weights) and not any(w.any() for w in after.weights)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_memory_that_starts_again_forgets_all_but_its_convolutions(kind: str) -> None:
    """Every third segment is read as by a fresh memory, and the two after it as after that one."""
    memory = cell(kind, chunk_length=4, window=3, reset_every=3)
    fresh = cell(kind, chunk_length=4, window=3)
    fresh.load_state_dict(memory.state_dict())
    x = torch.randn(7, ROWS, T, D, dtype=torch.float64)
    state, after = memory.init_state(ROWS), fresh.init_state(ROWS)
    for i, part in enumerate(x):
        if i % 3 == 0:
            after = fresh.init_state(ROWS)
        y, state = memory(part, state, attention, mask=None)
        expected, after = fresh(part, after, attention, mask=None)
        torch.testing.assert_close(y, expected, **EXACT)
        assert state.age.tolist() == [(i + 1) % 3] * ROWS
    # Rows start again each at a time of its own.
    mixed = state._replace(age=torch.tensor([0, 2]))
    y, new = memory(x[0], mixed, attention, mask=None)
    assert new.age.tolist() == [1, 0]
    first, _ = fresh(x[0], fresh.init_state(ROWS), attention, mask=None)
    second, _ = fresh(x[0], after, attention, mask=None)
    torch.testing.assert_close(y, torch.stack([first[0], second[1]]), **EXACT)


@torch.no_grad()
def test_a_local_memory_beside_one_that_never_starts_again() -> None:
    """TNT's pair: the local one alone says nothing of a segment before it started again."""
    local = TitansMAGConfig(num_heads=2, chunk_length=2, reset_every=1)
    ids = tokens(1, 3 * SEGMENT)
    other = ids.clone()
    other[0, 2] = (other[0, 2] - 2) % 50 + 3
    moved = []
    for memory in (local, [TitansMAGConfig(num_heads=2, chunk_length=6), local]):
        model = memory_model("llama", memory)
        moved.append((model(ids).logits - model(other).logits)[:, -SEGMENT:].abs().max())
    assert moved[0] < 1e-12 and moved[1] > 1e-7


def test_combinations_there_are_not_are_refused() -> None:
    for config in (TitansMACConfig, TitansMAGConfig):
        with pytest.raises(
            ValueError, match="combine='divide' is unknown; use 'add' or 'multiply'"
        ):
            MemLMForCausalLM.from_base(
                base_model("llama"), memory=config(combine="divide"), segment_length=SEGMENT
            )


@pytest.mark.parametrize("kind", KINDS)
def test_no_rate_makes_it_diverge(kind: str) -> None:
    """The same unit key again and again, the largest rates: what drives other implementations to NaN."""
    cls = KINDS[kind]
    dims = Dims(16, 16, 1, 2, 2, 8, 256)
    config = cls.resolve(cls.Config(max_rate=50.0, initial_rate=49.0, initial_momentum=0.999), dims)
    memory = cls(config, dims)
    memory.reset_parameters(1.0)
    state = memory.init_state(1)
    x = torch.randn(1, 1, 16).expand(1, 256, 16).clone().requires_grad_()
    with torch.no_grad():
        for _ in range(40):
            _, state = memory.memory(x, state, None)
    y, state = memory.memory(x, state, None)
    y.square().mean().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(w.isfinite().all() for w in state.weights)


@torch.no_grad()
def test_mac_answers_stand_at_the_places_of_their_tokens() -> None:
    """Persistent tokens first; a token and the answer to it share a place, and no place is beyond."""
    model = memory_model("llama", TitansMACConfig(num_persistent_tokens=2, chunk_length=3))
    seen = []
    rotary = model.base.model.rotary_emb
    forward = type(rotary).forward

    def record(x, position_ids):
        seen.append(position_ids.clone())
        return forward(rotary, x, position_ids)

    rotary.forward = record
    ids = tokens(2, SEGMENT)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    model(ids, attention_mask=mask)
    longer = [places for places in seen if places.shape[1] == 2 + 2 * SEGMENT]
    assert longer
    assert longer[0][0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 2, 3, 4, 5, 6, 7]
    assert longer[0][1, 2:6].tolist() == longer[0][1, 8:12].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@torch.no_grad()
def test_attention_spared_where_it_is_not_wanted_changes_nothing(family: str, monkeypatch) -> None:
    if family == "gemma2":  # its softmax is its own: eager, with soft-capping
        config = CONFIG_MAPPING[family](
            **{**FAMILIES["llama"], "head_dim": 8, "sliding_window": 64}
        )
        base = AutoModelForCausalLM.from_config(config).double().eval()
    else:
        base = base_model(family)
    ids = tokens(2, 3 * SEGMENT + 1)
    model = MemLMForCausalLM.from_base(base, memory="titans-mac", segment_length=SEGMENT)
    spared = model(ids).logits
    forward = TitansMAC.forward

    def everywhere(self, x, state, inner, **kwargs):
        def whole(*args, last, **given):
            return inner(*args, **given)

        return forward(self, x, state, whole, **kwargs)

    monkeypatch.setattr(TitansMAC, "forward", everywhere)
    torch.testing.assert_close(spared, model(ids).logits, **EXACT)


def test_mac_needs_a_mask_for_each_query() -> None:
    """Flash attention is given (B, T) masks, which cannot say it."""
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        not_later(torch.ones(1, 4, dtype=torch.bool), torch.tensor([0, 1, 0, 1]))


@pytest.mark.parametrize("config", [TitansMACConfig, TitansMAGConfig, TitansMALConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide hidden_size=32"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"chunk_length": SEGMENT + 1}, "longer than segment_length=6"),
        ({"chunk_length": 0}, "chunk_length=0"),
        ({"depth": 0}, "depth=0"),
        ({"expansion": 0}, "expansion=0"),
        ({"conv_size": -1}, "conv_size=-1"),
        ({"num_persistent_tokens": -1}, "num_persistent_tokens=-1"),
        ({"initial_rate": 0.0}, "initial_rate=0.0"),
        ({"initial_rate": 2.0}, "initial_rate=2.0"),
        ({"initial_momentum": 1.0}, "initial_momentum=1.0"),
        ({"initial_forgetting": 0.0}, "initial_forgetting=0.0"),
        ({"max_surprise": 0.0}, "max_surprise=0.0"),
        ({"reset_every": 0}, "reset_every=0 must be at least 1, or None"),
        ({"reset_every": 2, "write_gate": "hard"}, "reset_every=2 forgets what write_gate='hard'"),
        ({"layers": (2,)}, r"layers=\(2,\)"),
    ],
)
def test_bad_options_are_refused(config, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemLMForCausalLM.from_base(
            base_model("llama"), memory=config(**options), segment_length=SEGMENT
        )
