"""RMT-R against its recurrence, one row and one vector at a time, through plain transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from memlm.memory import RMTRConfig
from memlm.memory.base import Dims
from memlm.memory.rmt_r import RMTR, RMTRState
from memlm.modeling import MemLMForCausalLM
from tests.cases import FAMILIES, SEGMENT, base_model, memory_model, randomise, tokens

M, D, ROWS = 2, 6, 3
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
CONFIGS = {
    "all": RMTRConfig(num_memory_tokens=M),
    "bank": RMTRConfig(num_memory_tokens=M, bank_size=2),
    "archive": RMTRConfig(num_memory_tokens=M, bank_size=1, archive_size=2, recall=1),
}
PUBLISHED = {
    "biases": RMTRConfig(num_memory_tokens=M, bank_size=2, archive_size=1, recall=1, biases=True),
    "top-1": RMTRConfig(num_memory_tokens=M, attention="top-1", biases=True),
    "recalled": RMTRConfig(num_memory_tokens=M, bank_size=2, read_memory=False),
}


def build(family: str, config: RMTRConfig) -> MemLMForCausalLM:
    over = {"sliding_window": 64} if family == "gemma3_text" else {}
    return memory_model(family, config, **over)


def cell_of(model: MemLMForCausalLM) -> RMTR:
    return model.memory.attached["rmt-r"].cells["model"]


def cell(**options) -> RMTR:
    dims = Dims(D, D, 1, 2, 2, 3, SEGMENT)
    memory = RMTR(RMTR.resolve(RMTRConfig(num_memory_tokens=M, **options), dims), dims).double()
    memory.reset_parameters(1.0)
    randomise(memory)
    return memory


def filled(memory: RMTR, states: torch.Tensor) -> RMTRState:
    """The state after `states` (B, n, M, D) were written, one after the other."""
    state = memory.init_state(states.shape[0])
    for new in states.unbind(1):
        state = memory.write(new, state)
    return state


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def norm(x: torch.Tensor, layer: torch.nn.LayerNorm) -> torch.Tensor:
    x = x - x.mean()
    return x / (x.square().mean() + 1e-5).sqrt() * layer.weight + layer.bias


def apply(linear: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear.weight @ x + (0 if linear.bias is None else linear.bias)


def chosen(own: RMTR, memory: torch.Tensor, past: list[torch.Tensor]) -> list[torch.Tensor]:
    """The states in reach: the bank's, and of the archive's those with the largest mean logit."""
    bank, older = past[-own.bank_size :], past[: -own.bank_size]
    archive = older[-own.archive_size :] if own.archive_size else []

    @torch.no_grad()
    def mean_logit(state: torch.Tensor) -> float:
        queries = [apply(own.query, norm(m, own.query_norm)) for m in memory]
        keys = [apply(own.key, norm(m, own.past_norm)) for m in state]
        return float(sum(q @ k for q in queries for k in keys)) / len(memory) ** 2

    best = sorted(archive, key=mean_logit, reverse=True)[: own.picked]
    # What is archived is kept without gradient.
    return [state.detach() for state in best] + bank


def recalled(own: RMTR, memory: torch.Tensor, past: list[torch.Tensor]) -> torch.Tensor:
    """R (M, D) for one row: memory (M, D), past states (M, D) from the first on."""
    if not past:
        return own.initial_recall
    states = chosen(own, memory, past)
    normed = [norm(vector, own.past_norm) for state in states for vector in state]
    out = []
    for m in memory:
        q = apply(own.query, norm(m, own.query_norm))
        logits = torch.stack([q @ apply(own.key, n) for n in normed]) / len(q) ** 0.5
        weights = logits.exp() / logits.exp().sum()
        if own.config.attention == "top-1":
            weights = torch.eye(len(logits), dtype=logits.dtype)[logits.argmax()]
        found = sum(w * apply(own.value, n) for w, n in zip(weights, normed, strict=True))
        r = m + apply(own.output, found)
        hidden = F.gelu(own.mlp_in.weight @ norm(r, own.mlp_norm) + own.mlp_in.bias)
        out.append(r + own.mlp_out.weight @ hidden + own.mlp_out.bias)
    return torch.stack(out)


def by_hand(
    base: PreTrainedModel, own: RMTR, ids: torch.Tensor, depth: int = 1000
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One document (N,): its logits (N, V), and the memory behind every segment."""
    memory, past, logits = own.initial_memory, [], []
    m = len(memory)
    for s, segment in enumerate(ids.split(SEGMENT)):
        if s and s % depth == 0:
            memory, past = memory.detach(), [state.detach() for state in past]
        embedded = base.get_input_embeddings()(segment)
        read = [memory] if own.config.read_memory else []
        before = torch.cat([*read, recalled(own, memory, past)])
        x = torch.cat([before, embedded, memory])
        plain = base(inputs_embeds=x[None], use_cache=False, output_hidden_states=True)
        logits.append(plain.logits[0, len(before) : -m])
        memory = plain.hidden_states[-1][0, -m:]
        past.append(memory)
    return torch.cat(logits), past


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_recall_of_past_memory_states(family: str, config: str) -> None:
    model, ids = build(family, CONFIGS[config]), tokens(2, 4 * SEGMENT + 2)
    out = model(ids)
    for row in range(2):
        logits, past = by_hand(model.base, cell_of(model), ids[row])
        torch.testing.assert_close(out.logits[row], logits, **CLOSE)
        torch.testing.assert_close(out.memory_state["rmt-r.memory"][row], past[-1], **CLOSE)
        kept = torch.stack(past[-CONFIGS[config].bank_size :])
        bank = out.memory_state["rmt-r.bank"][row]
        torch.testing.assert_close(bank[-len(kept) :], kept, **CLOSE)


@pytest.mark.parametrize("config", PUBLISHED)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_the_published_code_s_options_equal_the_recurrence(family: str, config: str) -> None:
    model, ids = build(family, PUBLISHED[config]), tokens(2, 4 * SEGMENT + 2)
    out = model(ids)
    for row in range(2):
        logits, past = by_hand(model.base, cell_of(model), ids[row])
        torch.testing.assert_close(out.logits[row], logits, **CLOSE)
        torch.testing.assert_close(out.memory_state["rmt-r.memory"][row], past[-1], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["softmax", "top-1"])
def test_dropout_falls_on_weights_and_on_what_is_added(attention: str) -> None:
    """The published code's three places, in their order; the hard attention keeps its weights."""
    own = cell(bank_size=3, dropout=0.4, attention=attention)
    state = filled(own, random(2, 3, M, D))
    memory, past = state.memory, own.past_norm(state.bank.flatten(1, 2))
    scores = own.query(own.query_norm(memory)) @ own.key(past).mT / D**0.5
    hard = F.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype)
    torch.manual_seed(3)
    weights = F.dropout(scores.softmax(-1), 0.4) if attention == "softmax" else hard
    expected = memory + F.dropout(own.output(weights @ own.value(past)), 0.4)
    hidden = F.gelu(own.mlp_in(own.mlp_norm(expected)))
    expected = expected + F.dropout(own.mlp_out(hidden), 0.4)
    torch.manual_seed(3)
    torch.testing.assert_close(own.train().read(state), expected, **CLOSE)
    assert torch.equal(own.eval().read(state), own.read(state))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_equals_it_row_by_row_in_a_padded_batch(side: str, config: str) -> None:
    model, lengths = build("llama", CONFIGS[config]), [4 * SEGMENT + 3, 2, 2 * SEGMENT, 3 * SEGMENT]
    ids = torch.zeros(len(lengths), 5 * SEGMENT, dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, n in enumerate(lengths):
        mask[row, -n:] = True
        if side == "right":
            mask[row] = mask[row].flip(0)
        ids[row, mask[row]] = tokens(1, n, seed=n)[0]
    out = model(ids, attention_mask=mask)
    for row in range(len(lengths)):
        logits, past = by_hand(model.base, cell_of(model), ids[row, mask[row]])
        torch.testing.assert_close(out.logits[row, mask[row]], logits, **CLOSE)
        torch.testing.assert_close(out.memory_state["rmt-r.memory"][row], past[-1], **CLOSE)


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_are_those_of_the_unrolled_recurrence(config: str) -> None:
    model, ids = build("llama", CONFIGS[config]), tokens(1, 4 * SEGMENT + 1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = {}
    for depth in (1, 2, 1000):
        logits, _ = by_hand(model.base, cell_of(model), ids[0], depth)
        losses = (
            F.cross_entropy(logits[:-1], ids[0, 1:]),
            model(ids, labels=ids, bptt_depth=min(depth, 5), bptt_anchor="start").loss,
        )
        by_oracle, found[depth] = (
            torch.autograd.grad(loss, parameters, materialize_grads=True) for loss in losses
        )
        for a, b in zip(by_oracle, found[depth], strict=True):
            torch.testing.assert_close(b, a, **CLOSE)
    for depth in (1, 2):
        pairs = zip(found[depth], found[1000], strict=True)
        assert max((a - b).abs().max() for a, b in pairs) > 1e-9


def test_gradient_passes_through_the_bank_and_not_through_the_archive() -> None:
    memory = cell(bank_size=2, archive_size=2, recall=2)
    states = [random(1, M, D, seed=i).requires_grad_() for i in range(4)]
    state = memory.init_state(1)
    for new in states:
        state = memory.write(new, state)
    # A memory of its own, so that what comes from the past comes through the bank.
    memory.read(state._replace(memory=random(1, M, D, seed=9))).square().sum().backward()
    assert all(s.grad is None or not s.grad.any() for s in states[:2])
    assert all(s.grad.abs().sum() > 0 for s in states[2:])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_at_the_start_it_is_rmt_with_its_memory_read_twice(family: str) -> None:
    base = base_model(family)
    model = MemLMForCausalLM.from_base(base, CONFIGS["archive"], segment_length=SEGMENT)
    ids = tokens(2, 4 * SEGMENT + 2)
    memory = cell_of(model).initial_memory.expand(2, -1, -1)
    logits = []
    for segment in ids.split(SEGMENT, dim=1):
        x = torch.cat([memory, memory, base.get_input_embeddings()(segment), memory], 1)
        plain = base(inputs_embeds=x, use_cache=False, output_hidden_states=True)
        logits.append(plain.logits[:, 2 * M : -M])
        memory = plain.hidden_states[-1][:, -M:]
    out = model(ids)
    torch.testing.assert_close(out.logits, torch.cat(logits, 1), **CLOSE)
    torch.testing.assert_close(out.memory_state["rmt-r.memory"], memory, **CLOSE)


@pytest.mark.parametrize("archive", [0, 3])
def test_a_full_bank_hands_on_exactly_its_oldest(archive: int) -> None:
    memory = cell(bank_size=2, archive_size=archive, recall=1)
    states = random(ROWS, 8, M, D)
    state = memory.init_state(ROWS)
    for n in range(1, 9):
        state = memory.write(states[:, n - 1], state)
        bank, older = (
            states[:, max(0, n - 2) : n],
            states[:, max(0, n - 2 - archive) : max(0, n - 2)],
        )
        assert torch.equal(state.bank[:, 2 - bank.shape[1] :], bank)
        assert torch.equal(state.archive[:, archive - older.shape[1] :], older)
        assert state.archive.shape[1] == archive and state.bank.shape[1] == 2
        assert state.length.tolist() == [min(n, 2 + archive)] * ROWS


def test_the_archive_finds_what_a_flat_faiss_index_finds() -> None:
    import faiss

    memory = cell(bank_size=2, archive_size=40, recall=5).float()
    for written in (4, 12, 60):
        state = filled(memory, random(ROWS, written, M, D, seed=written).float())
        index, real = memory.pick(state.memory, state)
        held = min(written - 2, 40)
        for row in range(ROWS):
            with torch.no_grad():
                keys = memory.mean_keys(state.archive)[row, 40 - held :].numpy()
                query = memory.mean_query(state.memory)[row : row + 1].numpy()
            flat = faiss.IndexFlatIP(D)
            flat.add(keys)
            expected = flat.search(query, min(5, held))[1][0] + 40 - held
            assert index[row][real[row]].tolist() == expected.tolist()


@torch.no_grad()
def test_rows_and_empty_places_do_not_leak() -> None:
    memory = cell(bank_size=4, archive_size=4, recall=3)
    for written in (0, 1, 3, 5, 9):
        state = filled(memory, random(ROWS, written, M, D, seed=written))
        before = memory.read(state)
        assert before.isfinite().all()
        free = max(0, 4 - written), max(0, 8 - max(written, 4))
        bank, archive = state.bank.clone(), state.archive.clone()
        bank[:, : free[0]], archive[:, : free[1]] = 1e3 * random(ROWS, 1, M, D), -1e3
        assert torch.equal(memory.read(state._replace(bank=bank, archive=archive)), before)
        # Another first row, one that holds another number of states, changes no other row.
        other = filled(memory, random(ROWS, written + 2, M, D, seed=77))
        parts = zip(other, state, strict=True)
        mixed = RMTRState(*(torch.cat([theirs[:1], ours[1:]]) for theirs, ours in parts))
        after = memory.read(mixed)
        torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=1e-13)
        assert (after[0] - before[0]).abs().max() > 1e-3


def test_without_a_past_the_learned_vectors_are_read() -> None:
    memory = cell()
    recall = memory.read(memory.init_state(ROWS))
    assert torch.equal(recall, memory.initial_recall.expand(ROWS, -1, -1))
    recall.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in memory.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (0,)}, "layers="),
        ({"bank_size": 0}, "bank_size=0"),
        ({"archive_size": -1}, "archive_size=-1"),
        ({"recall": 0}, "recall=0"),
        ({"attention": "top-2"}, "attention='top-2' is unknown; use 'softmax' or 'top-1'"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"archive_size": 2, "recall": 3}, "recall=3 .* archive_size=2"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemLMForCausalLM.from_base(base_model("llama"), RMTRConfig(**options), segment_length=8)


def test_three_times_the_memory_has_to_fit() -> None:
    base = base_model("gpt2")
    with pytest.raises(ValueError, match=r"with 9 memory positions .* use at most 55"):
        MemLMForCausalLM.from_base(base, RMTRConfig(num_memory_tokens=3), segment_length=56)
    MemLMForCausalLM.from_base(base, RMTRConfig(num_memory_tokens=3), segment_length=55)
