"""HMT against its equations, one row and one vector at a time, through plain transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from memlm.memory import HMTConfig
from memlm.memory.base import Dims
from memlm.memory.hmt import HMT, HMTState
from memlm.modeling import MemLMForCausalLM
from tests.cases import CASES, SEGMENT, base_model, memory_model, randomise, tokens

D = 6
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
CONFIGS = {
    "full": HMTConfig(queue_size=2, num_sensory_tokens=4),
    "narrow": HMTConfig(queue_size=9, num_sensory_tokens=0, summary_length=2, recall_size=3),
}


def cell_of(model: MemLMForCausalLM) -> HMT:
    return model.memory.attached["hmt"].cells["model"]


def cell(segment: int = SEGMENT, **options) -> HMT:
    dims = Dims(D, D, 1, 2, 2, 3, segment)
    memory = HMT(HMT.resolve(HMTConfig(**options), dims), dims).double()
    memory.reset_parameters(1.0)
    randomise(memory)
    return memory


def by_hand(
    base: PreTrainedModel, own: HMT, ids: torch.Tensor, depth: int = 1000
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One document (N,): its logits (N, V), and the memory vectors of its segments."""
    probe, h, logits = own.probe[0], own.summary_length, []
    past: list[torch.Tensor] = []
    before = [probe] * own.num_sensory

    def run(vectors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        out = base(
            inputs_embeds=torch.stack(vectors)[None], use_cache=False, output_hidden_states=True
        )
        return out.logits[0], out.hidden_states[-1][0, -1]

    for s, segment in enumerate(ids.split(SEGMENT)):
        if s and s % depth == 0:
            past, before = [one.detach() for one in past], [one.detach() for one in before]
        x = list(base.get_input_embeddings()(segment))
        sensory = before[len(before) - own.num_sensory :] if own.num_sensory else []
        place = 1 + len(sensory)
        found, summary = run([past[-1] if past else probe, *sensory, *x[:h], probe])
        logits += found[place:-1]
        recalled = probe
        if past:
            kept = past[-own.queue_size :]
            q = own.query.weight @ summary
            scores = torch.stack([q @ (own.key.weight @ m) for m in kept]) / len(q) ** 0.5
            weights = scores.exp() / scores.exp().sum()
            recalled = sum(w * m for w, m in zip(weights, kept, strict=True))
        found, memory = run([recalled, *sensory, *x, recalled])
        logits += found[place + h : -1]
        past.append(memory)
        before = [*before, *x]
    return torch.stack(logits), past


@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", "full"), ("llama", "narrow"), ("gpt2", "full"), ("opt", "full")],
)
@torch.no_grad()
def test_equals_the_equations(family: str, config: str) -> None:
    # The last segment is shorter than a summary.
    model, ids = memory_model(family, CONFIGS[config]), tokens(2, 4 * SEGMENT + 2)
    out = model(ids)
    for row in range(2):
        logits, past = by_hand(model.base, cell_of(model), ids[row])
        torch.testing.assert_close(out.logits[row], logits, **CLOSE)
        size = CONFIGS[config].queue_size
        kept = torch.stack(past[-size:])
        queue = out.memory_state["hmt.queue"][row]
        torch.testing.assert_close(queue[-len(kept) :], kept, **CLOSE)
        assert int(out.memory_state["hmt.length"][row]) == len(kept)
        if own := CONFIGS[config].num_sensory_tokens:
            last = model.get_input_embeddings()(ids[row, -own:])
            torch.testing.assert_close(out.memory_state["hmt.sensory"][row], last, **CLOSE)


@pytest.mark.parametrize("depth", [1, 2, 10])
def test_gradients_equal_those_of_the_equations(depth: int) -> None:
    model, ids = memory_model("llama", CONFIGS["full"]), tokens(1, 4 * SEGMENT)
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    own = cell_of(model)
    wanted = [own.probe, own.query.weight, own.key.weight, model.get_input_embeddings().weight]
    loss = model(ids, labels=labels, bptt_depth=depth).loss
    found = torch.autograd.grad(loss, wanted)
    logits, _ = by_hand(model.base, own, ids[0], depth)
    by_eye = torch.nn.functional.cross_entropy(logits[-3:-1], ids[0, -2:])
    for a, b in zip(found, torch.autograd.grad(by_eye, wanted), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@torch.no_grad()
def test_what_is_recalled_is_read_after_the_summary_and_not_before() -> None:
    """The published code lets every token read it, the ones that it was asked for with as well."""
    model, ids = memory_model("llama", CASES["hmt"]), tokens(1, 3 * SEGMENT)
    state = model(ids[:, : 2 * SEGMENT]).memory_state
    own, rest = cell_of(model), ids[:, 2 * SEGMENT :]
    before = model(rest, memory_state=state).logits
    own.query.weight.mul_(-3)
    after = model(rest, memory_state=state).logits
    changed = (after - before).abs().amax(dim=(0, 2)) > 1e-9
    assert changed.tolist() == [i >= own.summary_length for i in range(SEGMENT)]


@torch.no_grad()
def test_a_sharp_query_recalls_the_vector_that_matches_it() -> None:
    own = cell(queue_size=4, num_sensory_tokens=0)
    vectors = torch.eye(D, dtype=torch.float64)[None, :3]
    queue = torch.cat([torch.full((1, 1, D), 1e3, dtype=torch.float64), vectors], dim=1)
    state = HMTState(queue, torch.tensor([3]), queue[:, :0])
    for weight in (own.query.weight, own.key.weight):
        weight.copy_(torch.eye(D))
    found = own.read(200.0 * vectors[:, 1:2], state)
    torch.testing.assert_close(found, vectors[:, 1:2], **CLOSE)


@pytest.mark.parametrize(
    ("memory", "name"),
    [([CASES["hmt"], CASES["armt"]], "armt"), (["infini", CASES["hmt"]], "infini")],
)
def test_memories_that_would_be_written_twice_are_refused(memory: list, name: str) -> None:
    with pytest.raises(ValueError, match=f"'hmt' runs the decoder more than once.*{name!r}"):
        MemLMForCausalLM.from_base(base_model("llama"), memory=memory, segment_length=SEGMENT)


@torch.no_grad()
def test_stands_inside_another_memory_around_the_decoder() -> None:
    model, ids = memory_model("llama", [CASES["rmt"], CASES["hmt"]]), tokens(2, 2 * SEGMENT)
    out = model(ids)
    assert out.logits.isfinite().all() and (out.memory_state["hmt.length"] == 2).all()
    with pytest.raises(ValueError, match="'rmt' inside it"):
        memory_model("llama", [CASES["hmt"], CASES["rmt"]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queue_size": 0}, "queue_size=0 recalls nothing"),
        ({"recall_size": 0}, "recall_size=0 recalls nothing"),
        ({"num_sensory_tokens": -1}, "num_sensory_tokens=-1 must be 0 or more"),
        ({"summary_length": SEGMENT}, f"summary_length={SEGMENT} must be from 1 to below"),
        ({"summary_length": 0}, "summary_length=0 must be from 1"),
        ({"layers": (0,)}, "wraps the whole decoder"),
    ],
)
def test_refuses_what_cannot_work(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cell(**options)


def test_sizes_follow_the_segment() -> None:
    assert (cell(segment=7).num_sensory, cell(segment=7).summary_length) == (3, 3)
    assert (cell(segment=100).num_sensory, cell(segment=100).summary_length) == (32, 50)
    assert cell(segment=1).summary_length == 1
