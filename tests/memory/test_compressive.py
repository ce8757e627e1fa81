"""The Compressive Transformer against lists of tokens, one row and one token at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from memlm import MemLMForCausalLM
from memlm.memory import QKV, CompressiveConfig, TransformerXLConfig
from memlm.memory.base import Dims
from memlm.memory.compressive import COMPRESSIONS, Compressive
from tests.cases import SEGMENT, base_model, memory_model, randomise, tokens

EXACT = {"rtol": 0.0, "atol": 1e-10}
H, G, T, D = 4, 2, 7, 3


def cell(rotary: bool = True, **options) -> Compressive:
    dims = Dims(H * D, H * D, 1, H, G, D, T, rotary=rotary)
    config = Compressive.resolve(CompressiveConfig(**options), dims)
    memory = Compressive(config, dims).double()
    memory.reset_parameters(1.0)
    randomise(memory)
    return memory


def segments(count: int, rows: int = 3) -> list[QKV]:
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, T, D, generator=generator, dtype=torch.float64)

    return [QKV(random(H), random(G), random(G)) for _ in range(count)]


def attend(x: QKV, mask=None) -> torch.Tensor:
    """Softmax over the keys in front, where real, and the segment so far."""
    extra = x.k.shape[2] - x.q.shape[2]
    seen = torch.ones(x.q.shape[2], x.k.shape[2], dtype=torch.bool).tril(extra)
    seen = seen & (torch.ones(1, 1, dtype=torch.bool) if mask is None else mask)[:, None]
    k, v = (t.repeat_interleave(H // G, 1) for t in (x.k, x.v))
    return F.scaled_dot_product_attention(x.q, k, v, attn_mask=seen[:, None])


class Row:
    """One row's memory as Python lists of (key, value, usage)."""

    def __init__(self, memory: Compressive) -> None:
        self.cell, self.tokens, self.slots = memory, [], []

    def read(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        held = self.slots + self.tokens
        return [k for k, *_ in held], [v for _, v, *_ in held]

    def write(self, q, k, v) -> None:
        """q (H, n, D), k and v (G, n, D): the real tokens of a segment."""
        if self.tokens:
            keys = torch.stack([k for k, *_ in self.tokens], 1).repeat_interleave(H // G, 0)
            weights = (q @ keys.mT / D**0.5).softmax(-1).mean(0).sum(0)
            for token, weight in zip(self.tokens, weights, strict=True):
                token[2] += weight
        self.tokens += [[k[:, i], v[:, i], 0.0] for i in range(k.shape[1])]
        rate, due = self.cell.rate, []
        while len(self.tokens) > self.cell.memory_length:
            group, self.tokens = self.tokens[:rate], self.tokens[rate:]
            due.append(group)
        if self.cell.compression == "most-used":
            old = [token for group in due for token in group]
            order = sorted(range(len(old)), key=lambda i: -float(old[i][2]))
            self.slots += [old[i] for i in sorted(order[: len(due)])]
        else:
            self.slots += [self.compress(group) for group in due]
        self.slots = self.slots[-self.cell.compressed_length :]

    def compress(self, group):
        def one(which: int) -> torch.Tensor:
            stacked = torch.stack([token[which] for token in group], -1)  # (G, D, rate)
            if self.cell.compression == "max":
                return stacked.amax(-1)
            if self.cell.compression == "mean":
                return stacked.mean(-1)
            conv = (self.cell.key_conv, self.cell.value_conv)[which]
            flat = stacked.reshape(G * D, -1)
            return (torch.einsum("oic,ic->o", conv.weight, flat) + conv.bias).reshape(G, D)

        return [one(0), one(1), 0.0]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(
    ("memory_length", "rate", "masked"),
    [(6, 3, True), (6, 3, False), (2, 2, True), (8, 1, True), (12, 4, True)],
)
@torch.no_grad()
def test_equals_lists_of_tokens(compression, memory_length, rate, masked) -> None:
    memory = cell(
        memory_length=memory_length,
        compressed_length=5,
        compression_rate=rate,
        compression=compression,
    )
    rows, state = [Row(memory) for _ in range(3)], memory.init_state(3)
    generator = torch.Generator().manual_seed(5)
    for x in segments(6):
        mask = torch.arange(T) < torch.randint(1, T + 1, (3, 1), generator=generator)
        y, state = memory(x, state, attend, mask=mask if masked else None)
        for i, row in enumerate(rows):
            n = int(mask[i].sum()) if masked else T
            keys, values = row.read()
            for t in range(n):
                k = torch.stack([*keys, *x.k[i].unbind(1)[: t + 1]], 1)
                v = torch.stack([*values, *x.v[i].unbind(1)[: t + 1]], 1)
                for head in range(H):
                    group = head // (H // G)
                    weights = (k[group] @ x.q[i, head, t] / D**0.5).softmax(0)
                    torch.testing.assert_close(y[i, head, t], weights @ v[group], **EXACT)
            row.write(x.q[i, :, :n], x.k[i, :, :n], x.v[i, :, :n])
            assert int(state.length[i]) == len(row.tokens)
            assert int(state.compressed_length[i]) == len(row.slots)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_without_slots_it_is_transformer_xl(family: str) -> None:
    ids = tokens(2, 4 * SEGMENT + 1)
    models = [
        MemLMForCausalLM.from_base(base_model(family), memory=config, segment_length=SEGMENT)
        for config in (
            CompressiveConfig(memory_length=8, compressed_length=0),
            TransformerXLConfig(memory_length=8),
        )
    ]
    for model in models:
        randomise(model.memory)
    ours, theirs = (model(ids).logits for model in models)
    torch.testing.assert_close(ours, theirs, **EXACT)


def test_each_loss_moves_what_it_should() -> None:
    """Reconstruction trains the convolutions and nothing else; the main loss everything else."""
    model, ids = memory_model("llama", "compressive").train(), tokens(2, 4 * SEGMENT)
    convolutions = {n for n, _ in model.named_parameters() if "_conv." in n}
    assert convolutions
    out = model(ids, labels=ids)
    parameters = dict(model.named_parameters())

    def moved(loss: torch.Tensor) -> set[str]:
        found = torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=True, allow_unused=True
        )
        return {n for n, g in zip(parameters, found, strict=True) if g is not None and g.any()}

    assert moved(out.auxiliary_loss) == convolutions
    main = moved(out.loss - out.auxiliary_loss)
    assert not main & convolutions
    assert any("k_proj" in name for name in main)


def test_reconstruction_is_the_difference_of_two_attentions() -> None:
    sizes = {"memory_length": 4, "compressed_length": 4, "compression_rate": 2}
    memory = cell(**sizes, reconstruction_weight=0.25).train()
    first, second = segments(2, rows=1)
    _, state = memory(first, memory.init_state(1), attend, mask=None)
    assert float(state.reconstruction.detach()) > 0  # 7 tokens: 4 leave at once
    _, after = memory(second, state, attend, mask=None)
    old_k = torch.cat([state.keys[:, :, -int(state.length) :], second.k], 2)[:, :, :6]
    old_v = torch.cat([state.values[:, :, -int(state.length) :], second.v], 2)[:, :, :6]
    full = _plain(second.q, old_k, old_v)
    short = _plain(
        second.q,
        after.compressed_keys[:, :, -3:],
        after.compressed_values[:, :, -3:],
    )
    expected = (full - short).square().mean()
    torch.testing.assert_close(after.reconstruction[0], expected, **EXACT)
    torch.testing.assert_close(memory.auxiliary_loss(state, after)[0], 0.25 * expected, **EXACT)
    for free in ({"reconstruction_weight": 0.0}, {"compression": "mean"}):
        assert cell(**sizes, **free).auxiliary_loss(state, after) is None


def _plain(q, k, v):
    k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
    return (q @ k.mT / D**0.5).softmax(-1) @ v


def test_training_learns_to_reconstruct() -> None:
    """Values constant within a group of two but for noise: a mean is right, a random start is not."""
    torch.manual_seed(0)
    memory = cell(memory_length=4, compressed_length=4, compression_rate=2).train()
    optimizer = torch.optim.Adam(memory.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        k, v = (torch.randn(8, G, 4, D, dtype=torch.float64).repeat_interleave(2, 2) for _ in "kv")
        x = QKV(torch.randn(8, H, 8, D, dtype=torch.float64), k, v)
        before = memory.init_state(8)
        _, after = memory(x, before, attend, mask=None)
        loss = memory.auxiliary_loss(before, after).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


@torch.no_grad()
def test_the_convolution_starts_as_the_mean() -> None:
    models = [
        MemLMForCausalLM.from_base(
            base_model("llama"),
            memory=CompressiveConfig(memory_length=4, compression_rate=2, compression=kind),
            segment_length=SEGMENT,
        )
        for kind in ("conv", "mean")
    ]
    ids = tokens(1, 5 * SEGMENT)
    conv, mean = (model(ids).logits for model in models)
    torch.testing.assert_close(conv, mean, **EXACT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_length": 6, "compression_rate": 4}, "compression_rate=4 does not divide"),
        ({"compression_rate": 0}, "compression_rate=0"),
        ({"compression": "zip"}, "compression='zip'"),
        ({"memory_length": 0, "compression_rate": 2}, "memory_length=0"),
        ({"compressed_length": -1}, "compressed_length=-1"),
        ({"reconstruction_weight": -1.0}, "reconstruction_weight=-1.0"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemLMForCausalLM.from_base(
            base_model("llama"), memory=CompressiveConfig(**options), segment_length=SEGMENT
        )


@pytest.mark.parametrize("segment", [4, 16, 30, 40])
@torch.no_grad()
def test_default_sizes_fit_the_base_model(segment: int) -> None:
    for memory in ("compressive", "transformer-xl"):
        model = MemLMForCausalLM.from_base(
            base_model("llama"), memory=memory, segment_length=segment
        )
        assert model(tokens(1, 3 * segment)).logits.isfinite().all()
        sizes = model.config.memory[0]
        held = sizes["memory_length"] + sizes.get("compressed_length", 0)
        assert held + segment <= 64
        assert sizes["memory_length"] == segment or held + segment > 64 - 4
