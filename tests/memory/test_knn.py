"""kNN memory against dense attention, faiss, and the formulas of both papers, query by query."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from memlm import MemLMForCausalLM
from memlm.memory import QKV, KNNConfig, knn
from memlm.memory.base import Attended, Dims
from memlm.memory.knn import KNN
from memlm.memory.parts import nearest
from memlm.segment import cut
from tests.cases import FAMILIES, SEGMENT, base_model, memory_model, tokens

EXACT = {"rtol": 0.0, "atol": 1e-10}
B, H, G, T, D = 2, 4, 2, 5, 3


def cell(groups: int = G, **options) -> KNN:
    config = KNNConfig(**{"capacity": 12, "top_k": 4, **options})
    memory = KNN(config, Dims(H * D, H * D, 1, H, groups, D, T)).double()
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter)
    return memory


def segments(count: int, groups: int = G) -> list[QKV]:
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> torch.Tensor:
        return torch.randn(B, heads, T, D, generator=generator, dtype=torch.float64)

    return [QKV(random(H), random(groups), random(groups)) for _ in range(count)]


def masks(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(B, T, generator=generator) < 0.7 for _ in range(count)]


def local(x: QKV, mask=None, parts: bool = False) -> torch.Tensor | Attended:
    """A stage without positions, whose scale is its own."""
    k, v = (t.repeat_interleave(H // t.shape[1], 1) for t in (x.k, x.v))
    query = 0.8 * x.q
    scores = query @ k.mT + torch.full((T, T), -math.inf, dtype=torch.float64).triu(1)
    y = scores.softmax(-1) @ v
    return Attended(y, scores.logsumexp(-1), query, scores) if parts else y


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def expected(memory: KNN, x: QKV, store: list, row: int, head: int, t: int) -> np.ndarray:
    """The output of one query, given the (key, value) pairs its row and group has stored, in order."""
    group = head // (H // x.k.shape[1])
    q = x.q[row, head, t].numpy()
    own_k, own_v = (s[row, group, : t + 1].numpy() for s in (x.k, x.v))
    own = 0.8 * own_k @ q
    attention = softmax(own) @ own_v

    def similarity(key: np.ndarray) -> float:
        return float(q @ key) / (
            float(np.linalg.norm(q) * np.linalg.norm(key)) if memory.cosine else 1.0
        )

    size = memory.config.chunk_length
    chunks = [store[i : i + size] for i in range(0, len(store), size)]
    found = []
    for chunk in chunks[-memory.capacity // size :]:
        mean = similarity(sum(key for key, _ in chunk) / len(chunk))
        if memory.min_similarity is None or mean >= memory.min_similarity:
            found.append((mean, chunk))
    found = sorted(found, key=lambda entry: -entry[0])[: memory.config.top_k // size]
    near = [(similarity(key), key, value) for _, chunk in found for key, value in chunk]
    if not near:
        return attention
    keys, values = np.stack([n[1] for n in near]), np.stack([n[2] for n in near])
    if memory.joint:
        return softmax(np.concatenate([0.8 * keys @ q, own])) @ np.concatenate([values, own_v])
    gate = 1 / (1 + math.exp(-float(memory.gate[head])))
    scores = keys @ q / math.sqrt(D)
    if memory.cosine:
        scores = np.array([n[0] for n in near]) * math.exp(float(memory.log_scale[head]))
    return gate * (softmax(scores) @ values) + (1 - gate) * attention


@pytest.mark.parametrize("combine", ["gate", "joint"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("least", [None, 0.6])
@pytest.mark.parametrize(
    ("groups", "scores"), [(1, nearest.SCORES), (G, 1), (G, 200), (H, nearest.SCORES)]
)
@torch.no_grad()
def test_equals_the_formulas_query_by_query(
    combine: str, similarity: str, least: float | None, groups: int, scores: int, monkeypatch
) -> None:
    monkeypatch.setattr(nearest, "SCORES", scores)
    memory = cell(groups, combine=combine, similarity=similarity, min_similarity=least)
    state = memory.init_state(B)
    store = [[[] for _ in range(groups)] for _ in range(B)]
    for x, mask in zip(segments(4, groups), masks(4), strict=True):
        y, state = memory(x, state, local, mask=mask)
        for row in range(B):
            for head in range(H):
                held = store[row][head // (H // groups)]
                for t in range(T):
                    found = y[row, head, t].numpy()
                    oracle = expected(memory, x, held, row, head, t)
                    np.testing.assert_allclose(found, oracle, rtol=0, atol=1e-10)
            for group in range(groups):
                store[row][group] += [
                    (x.k[row, group, t].numpy(), x.v[row, group, t].numpy())
                    for t in range(T)
                    if mask[row, t]
                ]
    for row in range(B):
        kept = np.stack([key for key, _ in store[row][0][-12:]])
        assert int(state.length[row]) == len(kept)
        np.testing.assert_array_equal(state.keys[row, 0, 12 - len(kept) :].numpy(), kept)


@pytest.mark.parametrize("combine", ["gate", "joint"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize(("chunk", "least", "groups"), [(4, None, G), (2, 0.3, 1), (2, None, H)])
@torch.no_grad()
def test_chunks_are_found_by_their_mean_keys(
    combine: str, similarity: str, chunk: int, least: float | None, groups: int, monkeypatch
) -> None:
    """As in LongMem; the last chunk may be open, and the oldest leaves as a whole."""
    monkeypatch.setattr(nearest, "SCORES", 200)
    memory = cell(
        groups, chunk_length=chunk, combine=combine, similarity=similarity, min_similarity=least
    )
    state = memory.init_state(B)
    store = [[[] for _ in range(groups)] for _ in range(B)]
    for x, mask in zip(segments(5, groups), masks(5), strict=True):
        y, state = memory(x, state, local, mask=mask)
        for row in range(B):
            for head in range(H):
                for t in range(T):
                    oracle = expected(memory, x, store[row][head // (H // groups)], row, head, t)
                    found = y[row, head, t].numpy()
                    np.testing.assert_allclose(found, oracle, rtol=0, atol=1e-10)
            for group in range(groups):
                store[row][group] += [
                    (x.k[row, group, t].numpy(), x.v[row, group, t].numpy())
                    for t in range(T)
                    if mask[row, t]
                ]
    assert min(len(held[0]) for held in store) > memory.capacity


@pytest.mark.parametrize("chunk", [1, 4])
@torch.no_grad()
def test_with_every_key_retrieved_joint_is_dense_attention(chunk: int) -> None:
    memory, parts = (
        cell(combine="joint", capacity=4 * T, top_k=100, chunk_length=chunk),
        segments(4),
    )
    state = memory.init_state(B)
    for x in parts:
        y, state = memory(x, state, local, mask=None)
    k = torch.cat([x.k for x in parts], 2).repeat_interleave(H // G, 1)
    v = torch.cat([x.v for x in parts], 2).repeat_interleave(H // G, 1)
    scores = 0.8 * parts[-1].q @ k.mT
    ahead = torch.ones(T, 4 * T, dtype=torch.bool).triu(3 * T + 1)
    dense = scores.masked_fill(ahead, -math.inf).softmax(-1) @ v
    torch.testing.assert_close(y, dense, **EXACT)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@torch.no_grad()
def test_the_search_equals_faiss(similarity: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import faiss
    size, count, k = 16, 500, 20
    generator = torch.Generator().manual_seed(0)
    keys, q = (torch.randn(1, 1, n, size, generator=generator) for n in (count, 50))
    index = faiss.IndexFlatIP(size)
    stored, asked = keys[0, 0].clone().numpy(), q[0, 0].clone().numpy()
    if similarity == "cosine":
        faiss.normalize_L2(stored)
        faiss.normalize_L2(asked)
        keys, q = (torch.nn.functional.normalize(t, dim=-1) for t in (keys, q))
    index.add(stored)
    _, theirs = index.search(asked, k)
    ours, real = nearest.nearest(q, keys, torch.ones(1, count, dtype=torch.bool), k)
    assert real.all()
    assert [set(row) for row in ours[0, 0].tolist()] == [set(row) for row in theirs.tolist()]


@pytest.mark.parametrize("combine", ["gate", "joint"])
def test_no_gradient_reaches_the_store(combine: str) -> None:
    model = memory_model("llama", KNNConfig(capacity=20, top_k=5, layers=(0, 1), combine=combine))
    ids = tokens(1, 3 * SEGMENT)
    x = model.base.get_input_embeddings()(ids).detach().requires_grad_()
    embedded = iter(x.split(SEGMENT, 1))
    model.backbone.embed = lambda ids: next(embedded)
    logits = model(ids).logits
    (gradient,) = torch.autograd.grad(logits[:, -SEGMENT:].square().sum(), x)
    assert (gradient[:, : 2 * SEGMENT] == 0).all()
    assert (gradient[:, 2 * SEGMENT :].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("combine", ["gate", "joint"])
@torch.no_grad()
def test_no_row_reads_another_row_s_store(combine: str) -> None:
    model = memory_model("llama", KNNConfig(capacity=20, top_k=5, layers=(0, 1), combine=combine))
    ids = tokens(3, 4 * SEGMENT)
    other = ids.clone()
    # What the others hold is what row 0 looks for.
    other[1:] = ids[:1]
    assert torch.equal(model(ids).logits[0], model(other).logits[0])


@torch.no_grad()
def test_joint_writes_where_nobody_wants_its_output() -> None:
    model = memory_model("llama", KNNConfig(capacity=20, top_k=5, combine="joint"))
    ids = tokens(1, 3 * SEGMENT)
    read, run = model.read(cut(ids, None, None, SEGMENT)), model(ids).memory_state
    for name in run.tensors:
        torch.testing.assert_close(read[name], run[name], **EXACT)


# Partial, interleaved and scaled turns, and softmax scales of their own.
TURNS = ("phi", "cohere2", "exaone4", "glm", "granite")


@pytest.mark.parametrize("family", [*FAMILIES, *TURNS])
@torch.no_grad()
def test_the_house_opens_its_softmax(family: str, monkeypatch) -> None:
    """What `Attended` says, found out from outside: with keys whose scores are known."""
    checked = []

    def forward(self, x, state, inner, *, mask, write=True):
        y, lse, query, own = inner(x, parts=True)
        torch.testing.assert_close(y, inner(x), **EXACT)
        # The scores are what the output is made of.
        v = x.v.repeat_interleave(own.shape[1] // x.v.shape[1], 1)
        torch.testing.assert_close(own.softmax(-1).to(v.dtype) @ v, y, **EXACT)
        torch.testing.assert_close(own.logsumexp(-1), lse, **EXACT)
        batch, groups, length, size = x.k.shape
        # A key of zeros in front scores 0, so that its weight is 1 / (1 + e^lse).
        zero, one = x.k.new_zeros(batch, groups, 1, size), x.k.new_ones(batch, groups, 1, size)
        v = torch.cat([one, torch.zeros_like(x.v)], 2)
        weight = inner(QKV(x.q, torch.cat([zero, x.k], 2), v))[..., 0]
        # The key moves the others by one place, and the families' angles are float32.
        torch.testing.assert_close(1 / (1 + lse.exp()), weight, rtol=0, atol=1e-6)
        # With only the first key not zero, the others add one each to e^lse.
        first = torch.cat([x.k[:, :, :1], torch.zeros_like(x.k[:, :, 1:])], 2)
        alone = inner(QKV(x.q, first, x.v), parts=True).lse
        count = torch.arange(length, dtype=torch.float64).expand_as(alone)
        scores = (query.unflatten(1, (groups, -1)) @ x.k[:, :, None, :1].mT).flatten(1, 2)
        torch.testing.assert_close(alone, torch.logaddexp(scores[..., 0], count.log()), **EXACT)
        checked.append(length)
        return y, state

    monkeypatch.setattr(KNN, "forward", forward)
    over = {"sliding_window": 64} if family in ("gemma3_text", "cohere2", "exaone4") else {}
    over |= {"head_dim": 8} if family == "glm" else {}
    config = CONFIG_MAPPING[family](**{**FAMILIES.get(family, FAMILIES["llama"]), **over})
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).double().eval()
    for parameter in base.parameters():
        if parameter.ndim > 1:
            parameter.mul_(5)
    model = MemLMForCausalLM.from_base(
        base, memory=KNNConfig(combine="joint", capacity=8), segment_length=SEGMENT
    )
    model(tokens(2, SEGMENT))
    assert checked == [SEGMENT, SEGMENT]


@torch.no_grad()
def test_joint_gets_the_base_model_s_scores_and_places() -> None:
    """One layer, one segment of memory: dense attention with rotary angles written out."""
    base, ids = base_model("llama", num_hidden_layers=1), tokens(1, 2 * SEGMENT)
    seen = []

    def spy(x: QKV, state, inner, **kwargs):
        y, new = KNN.forward(cell, x, state, inner, **kwargs)
        seen.append((x, y))
        return y, new

    model = MemLMForCausalLM.from_base(
        base, memory=KNNConfig(combine="joint", capacity=SEGMENT, top_k=99), segment_length=SEGMENT
    )
    cell = model.memory.attached["knn"].cells["0"]
    cell.forward = spy
    model(ids)
    (past, _), (x, y) = seen
    places = torch.cat([torch.zeros(SEGMENT), torch.arange(SEGMENT)])[None].long()
    cos, sin = base.model.rotary_emb(x.v, places)
    k, v = torch.cat([past.k, x.k], 2), torch.cat([past.v, x.v], 2)

    def turned(t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        half = t.shape[-1] // 2
        return t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin

    k = turned(k, cos, sin)
    q = turned(x.q, cos[:, SEGMENT:], sin[:, SEGMENT:])
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    ahead = torch.ones(SEGMENT, 2 * SEGMENT, dtype=torch.bool).triu(SEGMENT + 1)
    scores = (q @ k.mT / math.sqrt(k.shape[-1])).masked_fill(ahead, -math.inf)
    torch.testing.assert_close(y, scores.softmax(-1) @ v, **EXACT)


def test_the_layers_of_the_papers() -> None:
    def layers(count: int, **options) -> tuple[int, ...] | None:
        dims = Dims(H * D, H * D, count, H, G, D, T)
        return KNN.resolve(KNNConfig(**options), dims).layers

    assert layers(12) == (8,)
    assert [layers(count) for count in (1, 2, 4, 32)] == [(0,), (1,), (2,), (23,)]
    assert layers(12, combine="joint") is None
    assert layers(12, layers=(3, 5)) == (3, 5)


@torch.no_grad()
def test_a_search_holds_a_bounded_number_of_scores(monkeypatch) -> None:
    monkeypatch.setattr(nearest, "SCORES", 64)
    sizes = []
    search = nearest.nearest

    def spy(q, keys, *args):
        sizes.append(q.shape[0] * q.shape[1] * q.shape[2] * keys.shape[2])
        return search(q, keys, *args)

    monkeypatch.setattr(knn, "nearest", spy)
    memory = cell(capacity=6)
    memory(segments(1)[0], memory.init_state(B), local, mask=None)
    assert len(sizes) == 5 and max(sizes) <= 64


@pytest.mark.parametrize(
    "options",
    [
        {"capacity": 0},
        {"top_k": 0},
        {"chunk_length": 0},
        {"chunk_length": 3, "capacity": 20},
        {"chunk_length": 3, "capacity": 30, "top_k": 4},
        {"similarity": "l2"},
        {"combine": "sum"},
        {"min_similarity": 1.5},
    ],
)
def test_what_cannot_be_is_refused(options: dict) -> None:
    name, value = list(options.items())[-1]
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        MemLMForCausalLM.from_base(
            base_model("llama"), memory=KNNConfig(**options), segment_length=SEGMENT
        )


def test_joint_refuses_a_softmax_it_cannot_join() -> None:
    config = CONFIG_MAPPING["gemma2"](**FAMILIES["llama"], head_dim=8, attn_logit_softcapping=20.0)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager")

    def made(memory: object) -> MemLMForCausalLM:
        return MemLMForCausalLM.from_base(base, memory=memory, segment_length=SEGMENT)

    assert made(KNNConfig(combine="gate"))(tokens(1, SEGMENT)).logits.isfinite().all()
    for memory in (KNNConfig(combine="joint"), "landmark", "camelot", "tova"):
        with pytest.raises(ValueError, match="softcap"):
            made(memory)
