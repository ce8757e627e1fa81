"""Bases whose layers are mixtures of experts: the loss that keeps their routers in balance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from memlm import MemLMForCausalLM
from memlm.memory import ARMTConfig, TitansMALConfig
from tests.cases import FAMILIES, SEGMENT, randomise, tokens

EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.7}
MOE = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "olmoe": {"num_experts": 4},
}
EXACT = {"rtol": 1e-5, "atol": 1e-5}


def moe(family: str, **over: object) -> PreTrainedModel:
    torch.manual_seed(0)
    fields = {**FAMILIES["llama"], **EXPERTS, **MOE[family], **over}
    base = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**fields)).train()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return base


def read(base: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> tuple[float, float]:
    """The base's own summed cross-entropy over a segment, and its router loss."""
    targets = ids if mask is None else ids.masked_fill(mask == 0, -100)
    out = base(ids, attention_mask=mask, labels=targets)
    extra = 0.7 * out.aux_loss
    return (out.loss - extra) * (targets[:, 1:] != -100).sum(), extra


@pytest.mark.parametrize("family", MOE)
def test_one_segment_costs_what_it_costs_the_base(family: str) -> None:
    base, ids = moe(family), tokens(2, 12)
    expected = base(ids, labels=ids).loss
    expected.backward()
    gates = {n: p.grad.clone() for n, p in base.named_parameters()}
    base.zero_grad()
    model = MemLMForCausalLM.from_base(base, memory="none", segment_length=12).train()
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.loss, expected, **EXACT)
    out.loss.backward()
    for name, parameter in base.named_parameters():
        torch.testing.assert_close(parameter.grad, gates[name], **EXACT)
    # What is evaluated is cross-entropy alone, as for every model here.
    alone = model.eval()(ids, labels=ids)
    torch.testing.assert_close(alone.loss, expected - 0.7 * base(ids).aux_loss, **EXACT)


def test_segments_share_the_router_loss_and_padding_takes_no_part() -> None:
    base, ids = moe("qwen3_moe"), tokens(2, 3 * SEGMENT)
    mask = torch.ones_like(ids)
    mask[1, 2 * SEGMENT - 2 :] = 0
    pieces = zip(ids.split(SEGMENT, 1), mask.split(SEGMENT, 1), strict=True)
    model = MemLMForCausalLM.from_base(base, memory="none", segment_length=SEGMENT).train()
    found = model(ids, attention_mask=mask, labels=ids).auxiliary_loss
    costs = [read(base, *piece)[1] for piece in pieces]
    rows = torch.tensor([2.0, 2.0, 1.0])
    torch.testing.assert_close(found, (torch.stack(costs) * rows).sum() / rows.sum(), **EXACT)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_router_learns_beside_a_memory(checkpointing: bool) -> None:
    """Memory tokens pass the router as well; recomputed segments count once."""
    found = []
    for recompute in (False, checkpointing):
        base, ids = moe("qwen3_moe"), tokens(2, 3 * SEGMENT + 1)
        torch.manual_seed(1)
        model = MemLMForCausalLM.from_base(
            base, memory=ARMTConfig(num_memory_tokens=2), segment_length=SEGMENT
        ).train()
        randomise(model.memory, std=0.1)
        if recompute:
            model.gradient_checkpointing_enable()
        out = model(ids)
        out.auxiliary_loss.backward()
        found.append((out.auxiliary_loss.detach(), base.model.layers[0].mlp.gate.weight.grad))
        assert found[-1][1].abs().sum() > 0
    torch.testing.assert_close(found[0], found[1], **EXACT)


def test_what_cannot_be_balanced_is_refused() -> None:
    base, ids = moe("qwen3_moe"), tokens(2, 2 * SEGMENT)
    model = MemLMForCausalLM.from_base(
        base, memory=TitansMALConfig(num_persistent_tokens=1), segment_length=SEGMENT
    ).train()
    assert model(ids).auxiliary_loss.isfinite()
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match=r"output_router_logits=True.*without padding"):
        model(ids, attention_mask=mask)
    base.config.output_router_logits = False
    assert model(ids, attention_mask=mask).auxiliary_loss is None


def test_a_base_without_routers_is_told_apart() -> None:
    config = CONFIG_MAPPING["llama"](**FAMILIES["llama"], output_router_logits=True)
    model = MemLMForCausalLM.from_base(config, memory="none", segment_length=SEGMENT).train()
    with pytest.raises(ValueError, match=r"output_router_logits=True.*no router"):
        model(tokens(1, SEGMENT))
