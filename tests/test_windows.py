"""`windows`: a document as `forward` reads it, through whatever is around the model, in bounded memory."""

import gc
import weakref

import pytest
import torch
from torch import nn

import memlm
from memlm.memory import CompressiveConfig
from tests.cases import SEGMENT, memory_model, tokens

MECHANISMS = ("armt", "rmt", "titans-mag", "transformer-xl", "none")


def _gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _check_alike(model, arguments, through=None, **options):
    """Losses, gradients and state of the windows against those of one call."""
    called = {"bptt_depth": 3, **options}
    whole = model(**arguments, **called)
    whole.loss.backward()
    expected = {name: grad.clone() for name, grad in _gradients(model).items()}
    model.zero_grad()
    total, auxiliary = 0.0, 0.0
    for out in memlm.windows(through or model, **arguments, **called):
        out.loss.backward()
        total += float(out.loss.detach())
        auxiliary += 0.0 if out.auxiliary_loss is None else float(out.auxiliary_loss.detach())
    assert total == pytest.approx(float(whole.loss.detach()), rel=1e-12)
    if whole.auxiliary_loss is not None:
        assert auxiliary == pytest.approx(float(whole.auxiliary_loss.detach()), rel=1e-12)
    found = _gradients(model)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)
    for name, value in out.memory_state.tensors.items():
        torch.testing.assert_close(value, whole.memory_state[name], msg=name)


@pytest.mark.parametrize("anchor", ["end", "start"])
@pytest.mark.parametrize("memory", MECHANISMS)
def test_losses_gradients_and_state_are_those_of_forward(memory, anchor):
    model = memory_model("llama", memory if memory != "none" else None)
    ids = tokens(2, 7 * SEGMENT + 2)
    _check_alike(model, {"input_ids": ids, "labels": ids}, bptt_anchor=anchor)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_on_any_side(side):
    model, ids = memory_model("llama", "armt"), tokens(3, 5 * SEGMENT + 1)
    mask = torch.ones_like(ids)
    size = 4 * SEGMENT + 3
    at = {"left": slice(0, size), "right": slice(-size, None), "middle": slice(2, 2 + size)}[side]
    mask[1, at] = 0
    mask[2, 3] = 0
    _check_alike(model, {"input_ids": ids, "attention_mask": mask, "labels": ids}, bptt_depth=2)


def test_an_auxiliary_loss_weighs_what_it_weighs_in_forward():
    config = CompressiveConfig(
        memory_length=4, compressed_length=11, compression_rate=2, reconstruction_weight=0.5
    )
    model, ids = memory_model("llama", config).train(), tokens(2, 6 * SEGMENT)
    labels = ids.clone()
    labels[:, : 4 * SEGMENT] = -100  # The first window has no target at all.
    mask = torch.ones_like(ids)
    mask[1, -2 * SEGMENT :] = 0
    arguments = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    _check_alike(model, arguments)
    model.zero_grad()
    _check_alike(model, arguments, num_items_in_batch=17)


def test_documents_packed_into_a_row_are_rows_of_the_output():
    model, ids = memory_model("llama", "armt"), tokens(1, 40)
    position_ids = torch.cat([torch.arange(25), torch.arange(15)])[None]
    arguments = {"input_ids": ids, "labels": ids, "position_ids": position_ids}
    _check_alike(model, arguments, bptt_depth=2)
    state = model.init_state(1)
    with pytest.raises(ValueError, match="memory_state goes on"):
        memlm.windows(model, ids, position_ids=position_ids, memory_state=state)


def test_a_state_is_gone_on_with_and_labels_are_not_asked_for():
    model, ids = memory_model("llama", "armt"), tokens(2, 8 * SEGMENT)
    half = ids[:, : 4 * SEGMENT], ids[:, 4 * SEGMENT :]
    with torch.no_grad():
        *_, first = model.windows(half[0], bptt_depth=3)
        found = list(model.windows(half[1], memory_state=first.memory_state, bptt_depth=3))
        whole = model(ids)
    logits = torch.cat([out.logits for out in found], dim=1)
    torch.testing.assert_close(logits, whole.logits[:, 4 * SEGMENT :])
    assert all(out.loss is None for out in found)
    for name, value in found[-1].memory_state.tensors.items():
        torch.testing.assert_close(value, whole.memory_state[name])


def test_one_token_is_a_window_and_none_is_refused_before_anything_is_read():
    model = memory_model("llama", "armt")
    (out,) = memlm.windows(model, tokens(1, 1), labels=tokens(1, 1))
    assert float(out.loss.detach()) == 0.0 and out.memory_state.batch_size == 1
    with pytest.raises(ValueError, match="at least one row and one token"):
        memlm.windows(model, tokens(1, 1)[:, :0])
    with pytest.raises(ValueError, match="bptt_depth=0"):
        memlm.windows(model, tokens(1, 1), bptt_depth=0)
    with pytest.raises(TypeError, match="labels alone"):
        memlm.windows(model, tokens(1, 1), shift_labels=tokens(1, 1))
    with pytest.raises(TypeError, match="no MemLMForCausalLM in it"):
        memlm.windows(nn.Linear(2, 2), tokens(1, 1))


class _Around(nn.Module):
    """A module around a model that gives nothing of it but its call, as DDP does."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


def test_a_module_around_the_model_is_what_is_called():
    model, ids = memory_model("llama", "armt"), tokens(1, 6 * SEGMENT)
    around = _Around(model)
    _check_alike(model, {"input_ids": ids, "labels": ids}, through=around)
    assert around.calls == 2


def test_peft_around_the_model():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(memory_model("llama", "armt"), config)
    ids = tokens(1, 6 * SEGMENT)
    _check_alike(model, {"input_ids": ids, "labels": ids})


def test_no_graph_of_an_earlier_window_is_alive():
    model, ids = memory_model("llama", "armt"), tokens(1, 12 * SEGMENT)
    alive: list[weakref.ref] = []
    most = []

    def pack(tensor):
        kept = tensor.detach()
        alive.append(weakref.ref(kept))
        return kept

    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
            for out in memlm.windows(model, ids, labels=ids, bptt_depth=2):
                most.append(sum(one() is not None for one in alive))
                out.loss.backward()
                del out
    finally:
        gc.enable()
    # The first window starts from a state without a graph; the others are alike.
    assert len(most) == 6 and max(most) <= min(most[:2]) * 1.1


def test_nothing_of_a_window_is_held_while_the_next_is_read():
    model, ids = memory_model("llama", "armt"), tokens(1, 4 * SEGMENT)
    held: list[weakref.ref] = []
    alive = []
    around = _Around(model)
    around.register_forward_pre_hook(
        lambda *_: alive.append(sum(one() is not None for one in held))
    )
    gc.disable()
    try:
        with torch.no_grad():
            for out in memlm.windows(around, ids, bptt_depth=1):
                held.append(weakref.ref(out.logits))
                del out
    finally:
        gc.enable()
    assert alive == [0] * 4
