"""RMT against the paper's recurrence, through plain transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from memlm import windows
from memlm.memory import RMTConfig
from memlm.modeling import MemLMForCausalLM
from tests.cases import FAMILIES, SEGMENT, base_model, memory_model, randomise, tokens

M = 3


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_memory_tokens_around_each_segment(family: str) -> None:
    base = base_model(family, **({"sliding_window": 64} if family == "gemma3_text" else {}))
    model = MemLMForCausalLM.from_base(
        base, memory=RMTConfig(num_memory_tokens=M), segment_length=SEGMENT
    )
    randomise(model.memory)
    ids = tokens(2, 3 * SEGMENT + 2)
    memory = model.memory.attached["rmt"].cells["model"].initial_memory.expand(2, -1, -1)
    logits = []
    for segment in ids.split(SEGMENT, dim=1):
        length = segment.shape[1]
        x = torch.cat([memory, base.get_input_embeddings()(segment), memory], 1)
        plain = base(inputs_embeds=x, use_cache=False, output_hidden_states=True)
        logits.append(plain.logits[:, M : M + length])
        memory = plain.hidden_states[-1][:, -M:]
    out = model(ids)
    torch.testing.assert_close(out.logits, torch.cat(logits, 1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.memory_state["rmt.memory"], memory, rtol=1e-9, atol=1e-9)


def by_hand(model: MemLMForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One document (N,), the short segment first: its logits, and the memory behind it."""
    memory = model.memory.attached["rmt"].cells["model"].initial_memory
    short = len(ids) % SEGMENT
    pieces = [ids[:short]] if short else []
    pieces += [ids[at : at + SEGMENT] for at in range(short, len(ids), SEGMENT)]
    logits = []
    for piece in pieces:
        x = torch.cat([memory, model.base.get_input_embeddings()(piece), memory])[None]
        plain = model.base(inputs_embeds=x, use_cache=False, output_hidden_states=True)
        logits.append(plain.logits[0, M:-M])
        memory = plain.hidden_states[-1][0, -M:]
    return torch.cat(logits), memory


@pytest.mark.parametrize("side", ["left", "right"])
def test_segments_may_be_aligned_to_the_right(side: str) -> None:
    """Every row by its own length; losses and gradients included, windows too."""
    model = memory_model("llama", RMTConfig(num_memory_tokens=M))
    lengths, total = [3 * SEGMENT + 2, 1, SEGMENT, 2 * SEGMENT + 5, 2 * SEGMENT], 4 * SEGMENT
    ids = torch.zeros(len(lengths), total, dtype=torch.long)
    mask = torch.zeros_like(ids)
    summed, rows = torch.zeros((), dtype=torch.float64), []
    for row, n in enumerate(lengths):
        at = torch.arange(n) if side == "right" else torch.arange(total - n, total)
        ids[row, at], mask[row, at] = tokens(1, n, seed=n)[0], 1
        rows.append(by_hand(model, ids[row, at]))
        summed = summed + F.cross_entropy(rows[-1][0][:-1], ids[row, at][1:], reduction="sum")
    given = {"attention_mask": mask, "labels": ids, "segment_alignment": "right"}
    out = model(ids, logits_to_keep=0, **given)
    for row, (logits, memory) in enumerate(rows):
        torch.testing.assert_close(out.logits[row, mask[row].bool()], logits, rtol=1e-9, atol=1e-9)
        kept = out.memory_state["rmt.memory"][row]
        torch.testing.assert_close(kept, memory, rtol=1e-9, atol=1e-9)
    expected = summed / sum(n - 1 for n in lengths)
    torch.testing.assert_close(out.loss, expected, rtol=1e-9, atol=1e-9)
    parameters = [p for p in model.parameters() if p.requires_grad]
    pairs = zip(
        torch.autograd.grad(out.loss, parameters, materialize_grads=True),
        torch.autograd.grad(expected, parameters, materialize_grads=True),
        strict=True,
    )
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-9)
    parts = [one.loss.detach() for one in windows(model, ids, bptt_depth=2, **given)]
    assert len(parts) == 2
    torch.testing.assert_close(sum(parts), expected.detach(), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_row_without_padding_is_aligned_too() -> None:
    model, ids = memory_model("llama", RMTConfig(num_memory_tokens=M)), tokens(1, 2 * SEGMENT + 1)
    out = model(ids, segment_alignment="right")
    torch.testing.assert_close(out.logits[0], by_hand(model, ids[0])[0], rtol=1e-9, atol=1e-9)
    assert (out.logits - model(ids).logits).abs().max() > 1e-3
    whole = ids[:, 1:]
    torch.testing.assert_close(
        model(whole, segment_alignment="right").logits, model(whole).logits, rtol=0, atol=0
    )
    with pytest.raises(ValueError, match="segment_alignment='center' is unknown"):
        model(ids, segment_alignment="center")
    # Where it would not be heeded it is refused.
    with pytest.raises(ValueError, match="no use for segment_alignment"):
        model.generate(ids, max_new_tokens=1, segment_alignment="right")


def test_a_window_shorter_than_segment_and_memory_is_refused() -> None:
    base = base_model("mistral", sliding_window=8)
    with pytest.raises(ValueError, match="sliding window of 8"):
        MemLMForCausalLM.from_base(base, RMTConfig(num_memory_tokens=2), segment_length=6)
    MemLMForCausalLM.from_base(base, RMTConfig(num_memory_tokens=1), segment_length=6)


def test_layers_have_no_meaning() -> None:
    with pytest.raises(ValueError, match="layers="):
        MemLMForCausalLM.from_base(base_model("llama"), RMTConfig(layers=(0,)), segment_length=8)


def test_embeddings_of_another_size_are_refused() -> None:
    base = base_model("opt", word_embed_proj_dim=16)
    with pytest.raises(ValueError, match="memory='armt'"):
        MemLMForCausalLM.from_base(base, "rmt", segment_length=8)
    MemLMForCausalLM.from_base(base, "armt", segment_length=8)
