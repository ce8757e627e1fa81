"""Write gates: what is common to all memories that have them."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from memlm import MemLMForCausalLM
from memlm.memory import TitansMAGConfig, available_memories, memory_class
from memlm.memory.parts.gates import COSTS, GatedConfig, open_gate
from memlm.segment import cut
from memlm.writes import WriteCount
from tests.cases import CASES, SEGMENT, memory_model, tokens

GATED = [
    name
    for name in available_memories()
    if name != "none" and issubclass(memory_class(name).Config, GatedConfig)
]
gated = pytest.mark.parametrize("memory", GATED)


def config_of(memory: str, **options: object) -> GatedConfig:
    """Its case, with gates where it can be without, and with no price on anything else."""
    config = CASES[memory]
    assert isinstance(config, GatedConfig)
    prices = {f.name for f in fields(config) if f.name.endswith("_cost")} - set(COSTS)
    options = dict.fromkeys(prices, 0.0) | options
    if config.write_gate == "none":
        options = {"write_gate": "sigmoid", **options}
    return replace(config, **options)


def lasting(model: MemLMForCausalLM, memory: str) -> list[str]:
    transient = memory_class(memory).transient
    return [name for name in model.init_state(1).tensors if not set(name.split(".")) & transient]


def test_a_gate_at_one_can_be_closed_and_one_at_zero_stays() -> None:
    logit = torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0], dtype=torch.float64, requires_grad=True)
    slope = 1.2 * torch.sigmoid(logit) * torch.sigmoid(-logit)
    for pull in (1.0, -1.0):
        cut, closing = (
            torch.autograd.grad(pull * open_gate(logit, "hard", closing=way).sum(), logit)[0]
            for way in (False, True)
        )
        assert cut.tolist()[0] == cut.tolist()[-1] == 0
        # Descent lowers a gate that its loss grows with.
        moved = torch.tensor([False, True, True, True, pull > 0])
        torch.testing.assert_close(closing, torch.where(moved, pull * slope, 0.0))
    assert torch.equal(open_gate(logit, "hard", closing=True), open_gate(logit, "hard"))


@gated
def test_a_price_reaches_a_gate_that_stands_at_one(memory: str) -> None:
    grown = {}
    for way in ("cut", "closing"):
        config = config_of(
            memory, write_gate="hard", initial_gate=8.0, open_cost=1.0, gate_gradient=way
        )
        model = memory_model("llama", config).train()
        paid = model(tokens(2, SEGMENT)).auxiliary_loss
        assert paid.item() == pytest.approx(1.0)
        paid.backward()
        grown[way] = sum(
            float(p.grad.abs().sum()) for p in model.memory.parameters() if p.grad is not None
        )
    assert grown["cut"] == 0 and grown["closing"] > 0


def test_every_config_with_a_threshold_is_a_gated_one() -> None:
    with_threshold = [
        name
        for name in CASES
        if "write_threshold" in {f.name for f in fields(memory_class(name).Config)}
    ]
    assert with_threshold == sorted(GATED) and len(GATED) >= 6


def test_a_hard_gate_reaches_both_ends() -> None:
    logit = torch.linspace(-6, 6, 49, dtype=torch.float64, requires_grad=True)
    gate = open_gate(logit, "hard")
    shares = 1 / (1 + torch.exp(-logit.detach()))
    torch.testing.assert_close(gate, (shares * 1.2 - 0.1).clamp(0, 1), rtol=0, atol=1e-12)
    assert bool((gate == 0).any()) and bool((gate == 1).any())
    soft = open_gate(logit, "sigmoid", 0.25)
    assert torch.equal(soft, torch.where(shares < 0.25, 0.0, torch.sigmoid(logit)))
    (slope,) = torch.autograd.grad(soft.sum(), logit)
    assert torch.equal(slope == 0, shares < 0.25)


@gated
def test_the_thresholds_of_training_and_of_use_are_two(memory: str) -> None:
    model, ids = memory_model("llama", config_of(memory)), tokens(2, SEGMENT + 2)
    with torch.no_grad():
        before = model(ids[:, :SEGMENT]).memory_state
        free = model(ids, memory_state=before).memory_state
        for mode, other, shut in (("write", "train", False), ("train", "write", True)):
            model.set_memory_options(**{f"{mode}_threshold": 2.0, f"{other}_threshold": 0.0})
            silenced = model.train(shut)(ids, memory_state=before).memory_state
            assert silenced.tensors[f"{model_label(model)}.opened"].max() == 0
            free_again = model.train(not shut)(ids, memory_state=before).memory_state
            for name in lasting(model, memory):
                torch.testing.assert_close(free_again[name], free[name], rtol=0, atol=1e-12)


def model_label(model: MemLMForCausalLM) -> str:
    return next(
        name.rsplit(".", 1)[0] for name in model.init_state(1).tensors if name.endswith("opened")
    )


@gated
def test_noise_is_for_training(memory: str) -> None:
    model, ids = memory_model("llama", config_of(memory)), tokens(2, 2 * SEGMENT)
    with torch.no_grad():
        plain = model(ids).logits
        model.set_memory_options(gate_noise=1.0)
        assert torch.equal(model(ids).logits, plain)
        model.train()
        torch.manual_seed(0)
        first, second = (model(ids).memory_state[f"{model_label(model)}.written"] for _ in "ab")
    assert not torch.equal(first, second)


@gated
@pytest.mark.parametrize(("cost", "leaf"), [("write_cost", "written"), ("open_cost", "opened")])
def test_a_price_is_paid_for_the_mean_gate_and_for_the_largest(
    memory: str, cost: str, leaf: str
) -> None:
    model = memory_model("llama", config_of(memory, **{cost: 0.5})).train()
    out = model(tokens(2, SEGMENT))
    paid = [v for name, v in out.memory_state.tensors.items() if name.endswith(f".{leaf}")]
    assert len(paid) == 2 and all(0 < float(value.detach().min()) < 1 for value in paid)
    mean = torch.stack([value.mean() for value in paid]).mean()
    torch.testing.assert_close(out.auxiliary_loss, 0.5 * mean, rtol=1e-10, atol=1e-12)
    out.auxiliary_loss.backward()
    moved = [n for n, p in model.memory.named_parameters() if p.grad is not None and p.grad.any()]
    assert any("gate" in name or "b_proj" in name for name in moved)


@pytest.mark.parametrize("schedule", ["sequential", "wavefront"])
def test_a_price_can_be_left_out_of_rows_and_segments(schedule: str) -> None:
    config = config_of("gated-delta", write_cost=0.5)
    model = memory_model("llama", config).train()
    model.schedule = schedule
    ids = tokens(2, 3 * SEGMENT)
    counted = torch.tensor([[True, False, True], [False, False, True]])
    alone, state = 0.0, None
    for index in range(3):
        for row in range(2):
            part = ids[row : row + 1, index * SEGMENT : (index + 1) * SEGMENT]
            before = None if state is None else state.select([row])
            cost = model(part, memory_state=before).auxiliary_loss
            alone += cost.item() * bool(counted[row, index])
        whole = ids[:, index * SEGMENT : (index + 1) * SEGMENT]
        state = model(whole, memory_state=state).memory_state
    paid = model(ids, auxiliary_mask=counted).auxiliary_loss
    # A mean over all rows of all segments, those left out included.
    assert paid.item() == pytest.approx(alone / 6, rel=1e-9) and alone > 0
    shares = [
        out.auxiliary_loss for out in model.windows(ids, bptt_depth=2, auxiliary_mask=counted)
    ]
    assert len(shares) == 2 and sum(shares).item() == pytest.approx(paid.item(), rel=1e-9)
    none = model(ids, auxiliary_mask=torch.zeros_like(counted)).auxiliary_loss
    assert none.item() == 0
    with pytest.raises(ValueError, match=r"auxiliary_mask has shape \(2, 2\).*3 segments"):
        model(ids, auxiliary_mask=counted[:, :2])


def test_prices_add_up() -> None:
    costs = {"write_cost": 0.5, "open_cost": 0.25}
    model = memory_model("llama", config_of("armt", **costs)).train()
    out = model(tokens(2, SEGMENT))
    both = zip(costs.values(), ("written", "opened"), strict=True)
    total = sum(
        price
        * torch.stack([v.mean() for n, v in out.memory_state.tensors.items() if n.endswith(leaf)])
        for price, leaf in both
    )
    torch.testing.assert_close(out.auxiliary_loss, total.mean(), rtol=1e-10, atol=1e-12)


@gated
@torch.no_grad()
def test_options_change_on_a_finished_model(memory: str) -> None:
    model, ids = memory_model("llama", config_of(memory)), tokens(2, 2 * SEGMENT)
    shut = memory_model("llama", config_of(memory, write_threshold=0.9))
    open_, expected = model(ids), shut(ids)
    assert not torch.equal(open_.logits, expected.logits)
    model.set_memory_options(write_threshold=0.9)
    assert torch.equal(model(ids).logits, expected.logits)
    # States are the same kind of thing under either.
    model(ids, memory_state=open_.memory_state)


@torch.no_grad()
def test_options_that_were_changed_are_saved(tmp_path: Path) -> None:
    model, ids = memory_model("llama", config_of("gated-delta")), tokens(2, 2 * SEGMENT)
    before = model(ids).logits
    model.set_memory_options(write_threshold=0.9)
    expected = model(ids).logits
    assert not torch.equal(before, expected)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.memory[0]["write_threshold"] == 0.9
    # Loaded weights may lie at other addresses, for which a product may be rounded otherwise.
    torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=1e-12)


def test_options_that_cannot_change_are_refused_and_nothing_is_changed() -> None:
    model = memory_model("llama", config_of("armt", write_threshold=0.2))
    described = [dict(entry) for entry in model.config.memory]
    for options, words in (
        ({"write_cost": 0.1, "d_mem": 4}, r"d_mem=4.*write_threshold"),
        ({"write_cost": 0.1, "write_threshold": -1.0}, r"write_threshold=-1.0 must be"),
        ({"open_cost": -0.1}, r"open_cost=-0.1 would pay"),
        ({"gate_noise": -1.0}, r"gate_noise=-1.0"),
        ({"gate_gradient": "both"}, r"gate_gradient='both'.*'closing'"),
        ({"gate_gradient": "closing"}, r"gate_gradient='closing'.*write_gate='sigmoid'"),
    ):
        with pytest.raises(ValueError, match=words):
            model.set_memory_options(**options)
        assert model.config.memory == described == model.memory.configs
    with pytest.raises(ValueError, match="its memories have none"):
        memory_model("llama", "rmt").set_memory_options(write_threshold=0.1)


def test_options_without_gates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"write_threshold=0.1 needs write gates"):
        memory_model("llama", TitansMAGConfig(write_threshold=0.1))
    with pytest.raises(ValueError, match=r"write_gate='soft' is unknown"):
        memory_model("llama", TitansMAGConfig(write_gate="soft"))


@gated
@torch.no_grad()
def test_segments_that_are_written_are_counted_row_by_row(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = memory_model("llama", config_of(memory))
    ids, mask = tokens(3, 6 * SEGMENT), torch.ones(3, 6 * SEGMENT, dtype=torch.bool)
    mask[1, 3 * SEGMENT + 2 :] = 0
    state, opened = None, []
    for part, real in zip(ids.split(SEGMENT, 1), mask.split(SEGMENT, 1), strict=True):
        state = model(part, attention_mask=real, memory_state=state).memory_state
        gates = torch.stack([v for n, v in state.tensors.items() if n.endswith(".opened")])
        assert gates.shape == (2, 3)
        opened.append(gates.amax(dim=0))
    # Half of the gates are above what counts.
    level = float(torch.stack(opened).median())
    monkeypatch.setattr("memlm.writes.WRITTEN_ABOVE", level)
    there = mask.unflatten(1, (6, SEGMENT)).any(dim=2)
    expected = ((torch.stack(opened, 1) > level) & there).sum(dim=1).tolist()
    count = WriteCount()
    model.read(cut(ids, mask, None, SEGMENT), None, count)
    assert count.rows() == expected and 0 < sum(expected) < int(there.sum())
    assert WriteCount(count.rows()).rows() == expected


@torch.no_grad()
def test_without_gates_nothing_is_counted() -> None:
    model, count = memory_model("llama", "rmt"), WriteCount()
    model.read(cut(tokens(1, 12), None, None, SEGMENT), None, count)
    assert count.rows() is None


@pytest.mark.parametrize("memory", ["titans-mac", "titans-mag", "titans-mal"])
@torch.no_grad()
def test_titans_move_as_far_as_the_gate_lets_them(memory: str) -> None:
    """From the old weights and momentum towards those of the same memory without a gate."""
    gate = memory_model("llama", config_of(memory, write_gate="hard", layers=(0,)))
    free = memory_model("llama", replace(CASES[memory], layers=(0,)))
    own = {n: p for n, p in gate.named_parameters() if n in dict(free.named_parameters())}
    free.load_state_dict(own)
    ids, mask = tokens(2, SEGMENT), torch.ones(2, SEGMENT, dtype=torch.long)
    mask[1, 3:] = 0
    seen: list[torch.Tensor] = []
    cell = gate.memory.attached[memory].cells["0"]
    cell.gate.register_forward_hook(lambda module, args, out: seen.append(out))
    state = gate(tokens(2, SEGMENT, seed=5)).memory_state
    bare = {n: state[n] for n in free.init_state(2).tensors}
    start = free.init_state(2).map(lambda value: value)
    start = type(start)(bare, 2, start.signature)
    made = free(ids, attention_mask=mask, memory_state=start).memory_state
    got = gate(ids, attention_mask=mask, memory_state=state).memory_state
    logits = torch.stack([seen[-1][0].amax(0), seen[-1][1, :3].amax(0)])
    share = (torch.sigmoid(logits) * 1.2 - 0.1).clamp(0, 1)
    for name in lasting(gate, memory):
        expected = state[name] + share[:, :, None, None] * (made[name] - state[name])
        torch.testing.assert_close(got[name], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(got[f"{memory}.0.opened"], share.amax(1))
