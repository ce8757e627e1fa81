"""The wavefront beside law 10: its order, what it refuses, what "auto" picks, where weights stand."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from memlm import MemLMForCausalLM, MemoryState
from memlm.backbone.batched import BatchedLine
from memlm.memory import ARMTConfig, InfiniConfig, TransformerXLConfig
from memlm.memory.armt import ARMT
from memlm.schedule import Place, diagonals
from memlm.scheduling import LEAST_SEGMENTS, MARGIN, Scheduler, faster
from memlm.segment import cut
from memlm.writes import WriteCount
from tests.cases import CASES, SEGMENT, base_model, deeper, memory_model, randomise, tokens

pytestmark = pytest.mark.usefixtures("measured")
EXACT = {"rtol": 0.0, "atol": 1e-10}
FIRST = {"segment_seconds": 1.0, "cells": [1, 2, 3]}
FAST = {**FIRST, "cells_seconds": [0.01, 0.01, 0.01]}
SLOW = {**FIRST, "cells_seconds": [1.0, 2.0, 3.0]}


def wave(family: str = "llama", memory: object = "armt", **over: object) -> MemLMForCausalLM:
    model = memory_model(family, memory, **(deeper(family) | over))
    model.config.schedule = "wavefront"
    return model


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Cells that were run together, call by call."""
    found: list[int] = []
    run = BatchedLine.run

    def noted(line: BatchedLine, places) -> None:
        found.append(len(places))
        run(line, places)

    monkeypatch.setattr(BatchedLine, "run", noted)
    return found


def both(model: MemLMForCausalLM, ids: torch.Tensor, **given: object) -> Iterator[tuple]:
    """(logits, state, gradients) of a training call under either schedule."""
    for schedule in ("sequential", "wavefront"):
        model.config.schedule = schedule
        model.zero_grad()
        out = model(ids, labels=ids, logits_to_keep=0, **given)
        out.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        yield out, out.memory_state.detach(), gradients


def assert_same(model: MemLMForCausalLM, ids: torch.Tensor, **given: object) -> None:
    (a, state, gradients), (b, other, others) = both(model, ids, **given)
    torch.testing.assert_close(a.logits, b.logits, **EXACT)
    torch.testing.assert_close(a.loss, b.loss, **EXACT)
    torch.testing.assert_close(state.tensors, other.tensors, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients, others, **EXACT)
    assert gradients


# The order.


@pytest.mark.parametrize(("layers", "segments"), [(1, 1), (3, 1), (1, 4), (4, 3), (3, 7)])
def test_every_cell_is_run_once_after_those_it_needs(layers: int, segments: int) -> None:
    done: set[tuple[int, int]] = set()
    steps = list(diagonals(layers, segments))
    for places in steps:
        for layer, segment in places:
            assert layer == 0 or (layer - 1, segment) in done
            assert segment == 0 or (layer, segment - 1) in done
            assert (layer, segment) not in done
        done |= {tuple(place) for place in places}
        assert [place.layer for place in places] == sorted(place.layer for place in places)
    assert len(done) == layers * segments and len(steps) == layers + segments - 1


def test_a_window_takes_as_many_steps_as_it_has_diagonals(ran: list[int]) -> None:
    model = wave()
    model(tokens(1, 2 * SEGMENT))
    ran.clear()
    model(tokens(1, 5 * SEGMENT))
    assert ran == [1, 2, 3, 3, 3, 2, 1]


def test_a_cell_out_of_turn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wave()
    model(tokens(1, 2 * SEGMENT))
    order = list(diagonals(3, 2))
    # The function hides its module of the same name.
    module = sys.modules["memlm.schedule.wavefront"]
    # Layer 2 of the first segment before layer 1.
    wrong = [order[0], [Place(0, 1), Place(2, 0)], *order[2:]]
    monkeypatch.setattr(module, "diagonals", lambda *_: iter(wrong))
    with pytest.raises(RuntimeError, match="turn"):
        model(tokens(1, 2 * SEGMENT))


# The same results where law 10 does not look.


def test_layers_of_two_kinds_run_together_with_their_like(ran: list[int]) -> None:
    model = wave("gemma3_text")
    assert_same(model, tokens(2, 4 * SEGMENT))
    assert max(ran) == 4


def test_memories_on_some_layers_and_several_at_once() -> None:
    memories = [
        ARMTConfig(num_memory_tokens=2, d_mem=4, layers=(0, 2)),
        InfiniConfig(layers=(1, 2)),
    ]
    model = wave("llama", memories, num_hidden_layers=5)
    # In windows, the second from the state that the first left.
    assert_same(model, tokens(2, 4 * SEGMENT), bptt_depth=2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("memory", [TransformerXLConfig(memory_length=7), "titans-mac"], ids=str)
def test_padding_goes_through_either_attention(attention: str, memory: object) -> None:
    model = wave("llama", memory)
    model.set_attn_implementation(attention)
    ids = tokens(3, 4 * SEGMENT)
    mask = torch.ones_like(ids)
    mask[0, 5:], mask[1, :9], mask[2, 7:8] = 0, 0, 0
    assert_same(model, ids, attention_mask=mask)


def test_recomputing_diagonals_changes_no_gradient(ran: list[int]) -> None:
    model = wave().train()
    ids = tokens(2, 4 * SEGMENT)
    *_, (_, _, plain) = both(model, ids)
    ran.clear()
    model.gradient_checkpointing_enable()
    *_, (_, _, again) = both(model, ids)
    torch.testing.assert_close(plain, again, **EXACT)
    assert len(ran) == 6


@pytest.mark.parametrize("of_all", [False, True])
def test_what_memories_add_to_the_loss_is_the_same(
    of_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if of_all:
        # Something that a row which has ended would have to pay as well, if it were asked.
        monkeypatch.setattr(ARMT, "auxiliary_loss", lambda _, before, after: 1 + 0 * after.written)
    model = wave("llama", replace(CASES["armt"], write_cost=0.3)).train()
    ids = tokens(3, 4 * SEGMENT)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    (a, *_), (b, *_) = both(model, ids, attention_mask=mask)
    assert a.auxiliary_loss > 1e-3
    torch.testing.assert_close(a.auxiliary_loss, b.auxiliary_loss, **EXACT)
    assert_same(model, ids, attention_mask=mask)


@torch.no_grad()
def test_a_document_that_is_only_read(ran: list[int]) -> None:
    model = wave("llama", replace(CASES["armt"], write_gate="hard"))
    ids = tokens(2, 9 * SEGMENT + 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 4 * SEGMENT :] = False
    found = []
    for schedule in ("sequential", "wavefront"):
        model.config.schedule, writes = schedule, WriteCount()
        state = model.read(cut(ids, mask, None, SEGMENT), None, writes)
        found.append((state, writes.rows()))
    torch.testing.assert_close(found[0][0].tensors, found[1][0].tensors, rtol=1e-10, atol=1e-10)
    assert found[0][1] == found[1][1] and max(found[0][1]) > 0
    assert max(ran) == 3


@torch.no_grad()
def test_layers_above_the_last_memory_rest_in_what_is_only_read(ran: list[int]) -> None:
    model = wave("llama", replace(CASES["armt"], layers=(0, 1)), num_hidden_layers=5)
    ids, found = tokens(2, 5 * SEGMENT), []
    model(ids)
    assert max(ran) == 5
    ran.clear()
    for schedule in ("sequential", "wavefront"):
        model.config.schedule = schedule
        found.append(model.read(cut(ids, None, None, SEGMENT)))
    torch.testing.assert_close(found[0].tensors, found[1].tensors, rtol=1e-10, atol=1e-10)
    assert sum(ran) == 2 * 5


@torch.no_grad()
def test_half_precision_stays_close(ran: list[int]) -> None:
    model, ids = wave(), tokens(2, 4 * SEGMENT)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(0.2)
    exact = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model.to(torch.float32)(ids).logits
    half = model.to(torch.bfloat16)(ids)
    for logits in (mixed, half.logits):
        assert (logits.double() - exact).abs().max() < 0.1 * exact.abs().max()
    model.config.schedule = "sequential"
    kinds = {n: t.dtype for n, t in model(ids).memory_state.tensors.items()}
    assert kinds == {n: t.dtype for n, t in half.memory_state.tensors.items()}
    assert max(ran) == 3


@torch.no_grad()
def test_reading_alone_and_generation_go_one_by_one(ran: list[int]) -> None:
    model, ids = wave(), tokens(1, 3 * SEGMENT)
    state = model(ids).memory_state
    ran.clear()
    assert model(ids, memory_state=state, write=False).memory_state is state
    model.generate(ids[:, :4], memory_state=state, max_new_tokens=2, do_sample=False)
    assert not ran


def test_a_state_that_is_not_finite_is_named() -> None:
    model = wave()
    state = model.init_state(1)
    name = next(n for n in state.tensors if n.startswith("armt.1."))
    broken = MemoryState({**state.tensors, name: state[name] + float("nan")}, 1, state.signature)
    with pytest.raises(FloatingPointError, match=r"layer 1 .* segment 0"):
        model(tokens(1, 3 * SEGMENT), memory_state=broken)


# What it refuses.


def _hooked(model: MemLMForCausalLM) -> None:
    model.backbone.layers[1].mlp.register_forward_hook(lambda *_: None)


def _moved(model: MemLMForCausalLM) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(model.backbone.layers[1], AlignDevicesHook(execution_device="cpu"))


def _offloaded(model: MemLMForCausalLM) -> None:
    layer = model.backbone.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to("meta"))


def _quantised(model: MemLMForCausalLM) -> None:
    layer = model.backbone.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)


def _shared(model: MemLMForCausalLM) -> None:
    first, second, _ = model.backbone.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight


def _compiled(model: MemLMForCausalLM) -> None:
    layer = model.backbone.layers[1]
    layer._compiled_call_impl = layer._call_impl  # As `layer.compile()` sets it.


def _recomputed(model: MemLMForCausalLM) -> None:
    model.train().base.gradient_checkpointing_enable({"use_reentrant": False})


def _hooked_memory(model: MemLMForCausalLM) -> None:
    model.memory.attached["armt"].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hooked, "LlamaMLP of layer 1 has hooks"),
        (_moved, "of layer 1 is moved by accelerate"),
        (_offloaded, "'weight' of a Linear of layer 1 is offloaded"),
        (_quantised, "of layer 1 is quantised .*int8"),
        (_shared, "of layer 1 is shared with layer 0"),
        (_compiled, "of layer 1 is compiled by itself"),
        (_recomputed, "recomputes activations by itself"),
        (_hooked_memory, "memory 'armt' has hooks"),
    ],
)
def test_what_cannot_be_batched_is_refused_by_name(change, reason: str) -> None:
    model = memory_model("llama", "armt", num_hidden_layers=3)
    change(model)
    model.config.schedule = "wavefront"
    with pytest.raises(ValueError, match=f"{reason}.*use schedule='sequential'"):
        model(tokens(1, 2 * SEGMENT))
    assert model.scheduler.obstacle() is not None


class Scaled(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale.factor


def test_a_model_is_refused_when_it_is_made() -> None:
    given = {"segment_length": SEGMENT, "schedule": "wavefront"}
    with pytest.raises(ValueError, match=r"'rmt' stands around the whole decoder.*'armt'"):
        MemLMForCausalLM.from_base(base_model("llama"), memory=CASES["rmt"], **given)
    with pytest.raises(ValueError, match="no two of its layers are alike"):
        MemLMForCausalLM.from_base(base_model("gemma3_text"), memory=CASES["armt"], **given)
    # Attention that is scaled by the layer's number, which its modules show.
    base = base_model("gpt2", n_layer=3, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match="no two of its layers are alike"):
        MemLMForCausalLM.from_base(base, memory=CASES["armt"], **given)
    # And what can only be found by trying.
    base = base_model("llama", num_hidden_layers=3)
    for number, layer in enumerate(base.model.layers):
        layer.mlp.__class__ = Scaled
        layer.mlp.scale = SimpleNamespace(factor=1 + number)
    with pytest.raises(ValueError, match="differ in more than their weights"):
        MemLMForCausalLM.from_base(base, memory=CASES["armt"], **given)
    with pytest.raises(ValueError, match="schedule='diagonal' is unknown; use 'auto'"):
        MemLMForCausalLM.from_base(base_model("llama"), schedule="diagonal")


def test_a_schedule_that_is_set_later_is_looked_at() -> None:
    model = memory_model("llama", "rmt")
    model.config.schedule = "wavefront"
    with pytest.raises(ValueError, match="'rmt'"):
        model(tokens(1, SEGMENT))
    model.config.schedule = "fast"
    with pytest.raises(ValueError, match="schedule='fast' is unknown"):
        model(tokens(1, SEGMENT))
    model.config.schedule = "auto"
    model(tokens(1, 5 * SEGMENT))


def test_hooks_that_transformers_leaves_behind_are_no_hooks() -> None:
    model = wave()
    model.base(tokens(1, 4), output_hidden_states=True)
    assert any(layer._forward_hooks for layer in model.backbone.layers)
    assert_same(model, tokens(1, 3 * SEGMENT))


# What "auto" picks.


def test_the_estimate_counts_every_diagonal() -> None:
    # Five segments: two diagonals of one cell, two of two, three of three.
    measured = {"layers": 3, "cells": [1, 3], "cells_seconds": [0.2, 0.6]}
    wanted = 2 * 0.2 + 2 * 0.4 + 3 * 0.6
    for slack, picked in ((1.01, True), (0.99, False)):
        seconds = slack * MARGIN * wanted / 5
        assert faster({**measured, "segment_seconds": seconds}, 5) is picked
    assert not faster({**SLOW, "layers": 3}, 10**6)
    # Diagonals that take the same time whatever they hold gain nothing with two segments of three layers.
    even = {"segment_seconds": 1.0, "layers": 3, "cells": [1, 3], "cells_seconds": [0.6, 0.6]}
    assert not faster(even, 2) and faster(even, 40)


def measuring() -> MemLMForCausalLM:
    model = memory_model("llama", "armt", num_hidden_layers=3)
    model.config.schedule = "auto"
    return model


def test_auto_is_the_default() -> None:
    assert (
        MemLMForCausalLM.from_base(base_model("llama"), segment_length=8).config.schedule == "auto"
    )


def test_auto_measures_once_and_never_on_a_short_document(
    monkeypatch: pytest.MonkeyPatch, ran: list[int]
) -> None:
    measured: list[int] = []

    def measure(*_: object) -> dict:
        measured.append(1)
        return FAST

    monkeypatch.setattr(Scheduler, "_measure", measure)
    model = measuring()
    with torch.no_grad():
        model(tokens(1, (LEAST_SEGMENTS - 1) * SEGMENT))
        assert not measured and not ran and model.config.schedule_measured is None
        for _ in range(2):
            model(tokens(1, 9 * SEGMENT))
        assert measured == [1] and max(ran) == 3
        (one,) = model.config.schedule_measured
        assert (one["rows"], one["tokens"], one["learning"]) == (1, SEGMENT, False)
        # Another shape is measured by itself; a short document goes one by one whatever was found.
        model(tokens(2, 9 * SEGMENT))
        assert measured == [1, 1]
        ran.clear()
        model(tokens(1, (LEAST_SEGMENTS - 1) * SEGMENT))
        assert not ran
    model(tokens(1, 9 * SEGMENT), labels=tokens(1, 9 * SEGMENT)).loss.backward()
    assert measured == [1, 1, 1]
    # Recomputing is for memory, of which diagonals need more.
    ran.clear()
    model.train().gradient_checkpointing_enable()
    model(tokens(1, 9 * SEGMENT), labels=tokens(1, 9 * SEGMENT)).loss.backward()
    assert measured == [1, 1, 1] and not ran


def test_auto_goes_by_what_was_measured_before(
    monkeypatch: pytest.MonkeyPatch, ran: list[int], tmp_path
) -> None:
    for seconds, used in ((FAST, True), (SLOW, False)):
        monkeypatch.setattr(Scheduler, "_measure", lambda *_, found=seconds: found)
        model = measuring()
        with torch.no_grad():
            model(tokens(1, 9 * SEGMENT))
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
        assert loaded.config.schedule_measured == model.config.schedule_measured
        monkeypatch.setattr(Scheduler, "_measure", lambda *_: pytest.fail("measured again"))
        ran.clear()
        with torch.no_grad():
            loaded(tokens(1, 9 * SEGMENT))
        # Where it is slower, it is not even tried out.
        assert bool(ran) is used


def test_measuring_changes_nothing() -> None:
    model = measuring().train()
    ids = tokens(1, 9 * SEGMENT)
    torch.manual_seed(0)
    model(ids, labels=ids).loss.backward()
    drawn = torch.rand(1)
    (found,) = model.config.schedule_measured
    assert found["learning"] and found["cells"] == [1, 2, 3]
    assert all(second > 0 for second in [found["segment_seconds"], *found["cells_seconds"]])
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.config.schedule = "sequential"
    torch.manual_seed(0)
    model(ids, labels=ids).loss.backward()
    assert torch.equal(drawn, torch.rand(1))
    for one, other in zip(
        gradients, (p.grad for p in model.parameters() if p.grad is not None), strict=True
    ):
        torch.testing.assert_close(one, other, **EXACT)


def test_auto_runs_what_cannot_be_batched_in_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "_measure", lambda *_: pytest.fail("measured"))
    for memory, family in (("rmt", "llama"), ("armt", "gemma3_text")):
        model, ids = memory_model(family, memory), tokens(1, 9 * SEGMENT)
        model.config.schedule = "auto"
        found = model(ids).logits
        model.config.schedule = "sequential"
        torch.testing.assert_close(found, model(ids).logits, **EXACT)


# Where the weights stand.


def storages(model: MemLMForCausalLM) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


def test_parameters_become_views_of_their_stack_and_stay_what_they_were(tmp_path) -> None:
    model, ids = memory_model("llama", "armt", num_hidden_layers=3), tokens(2, 3 * SEGMENT)
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    apart = len(storages(model))
    model.save_pretrained(tmp_path / "before")
    model.config.schedule = "wavefront"
    expected = model(ids)
    # No copy of the weights is kept: three layers' worth of each stands in one place.
    per_layer = sum(1 for _ in model.backbone.layers[0].parameters()) + sum(
        1 for _ in model.memory.attached["armt"].cells["0"].parameters()
    )
    assert len(storages(model)) == apart - 2 * per_layer
    assert {n: p.tolist() for n, p in model.state_dict().items()} == {
        n: p.tolist() for n, p in before.items()
    }
    model.save_pretrained(tmp_path / "after")
    sizes = [(tmp_path / at / "model.safetensors").stat().st_size for at in ("before", "after")]
    assert abs(sizes[0] - sizes[1]) < 64
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after", dtype=torch.float64).eval()
    torch.testing.assert_close(loaded(ids).logits, expected.logits, **EXACT)
    model.save_memory(tmp_path / "memory")
    model.load_memory(tmp_path / "memory")
    # Weights that are written in place, or moved, are seen.
    for change in (
        lambda: model.load_state_dict({n: 1.1 * p for n, p in before.items()}),
        lambda: model.to(torch.float32).to(torch.float64),
        lambda: setattr(
            model.backbone.layers[1].mlp.up_proj.weight, "data", torch.randn(48, 32).double()
        ),
    ):
        change()
        (a, *_), (b, *_) = both(model, ids)
        torch.testing.assert_close(a.logits, b.logits, **EXACT)
        assert (a.logits - expected.logits).abs().max() > 1e-6
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(ids).logits, model(ids).logits, **EXACT)
    assert not storages(twin) & storages(model)
    base = model.unload()
    assert len({p.untyped_storage().data_ptr() for p in base.parameters()}) == len(
        list(base.parameters())
    )


def test_an_optimizer_made_before_goes_on(ran: list[int]) -> None:
    found = []
    for schedule in ("sequential", "wavefront"):
        model, ids = (
            memory_model("llama", "armt", num_hidden_layers=3).train(),
            tokens(2, 3 * SEGMENT),
        )
        model.config.schedule = schedule
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        found.append(losses)
    assert ran and found[0] == pytest.approx(found[1], abs=1e-9) and found[0][2] < found[0][0]


def test_a_parameter_that_changes_before_backward_is_noticed() -> None:
    model, ids = wave(), tokens(1, 3 * SEGMENT)
    loss = model(ids, labels=ids).loss
    with torch.no_grad():
        model.backbone.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        loss.backward()


def test_lora_trains_under_it(ran: list[int]) -> None:
    peft = pytest.importorskip("peft")
    model = memory_model("llama", "armt", num_hidden_layers=3)
    model.freeze_base()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], modules_to_save=["memory"])
    wrapped = peft.get_peft_model(model, config).to(torch.float64)
    randomise(wrapped.base_model.model.memory)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    found = []
    for schedule in ("sequential", "wavefront"):
        model.config.schedule = schedule
        wrapped.zero_grad()
        out = wrapped(
            input_ids=tokens(2, 4 * SEGMENT), labels=tokens(2, 4 * SEGMENT), logits_to_keep=0
        )
        out.loss.backward()
        found.append(
            (
                out.logits,
                {n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None},
            )
        )
    torch.testing.assert_close(found[0][0], found[1][0], **EXACT)
    torch.testing.assert_close(found[0][1], found[1][1], **EXACT)
    assert max(ran) == 3 and any("lora_A" in name for name in found[1][1])


def test_adapters_that_scale_differently_are_of_different_kinds() -> None:
    peft = pytest.importorskip("peft")
    model = memory_model("llama", "armt", num_hidden_layers=3)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], alpha_pattern={"layers.1.self_attn.q_proj": 64}
    )
    wrapped = peft.get_peft_model(model, config).to(torch.float64)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    assert_same(model, tokens(1, 3 * SEGMENT))
