"""What only an accelerator can show: python -m pytest -m gpu tests/test_gpu.py"""

from __future__ import annotations

import pytest
import torch

from memlm import MemoryState
from memlm.memory import available_memories
from tests.cases import LAW_FAMILIES, SEGMENT, memory_model, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]
families = pytest.mark.parametrize("family", LAW_FAMILIES)
memories = pytest.mark.parametrize("memory", available_memories())


@families
@memories
def test_the_device_computes_what_the_processor_does(family: str, memory: str, tmp_path) -> None:
    model, ids = memory_model(family, memory), tokens(2, 4 * SEGMENT + 1)
    expected = model(ids, labels=ids, bptt_depth=2, logits_to_keep=0)
    expected.memory_state.save(tmp_path / "state")
    model.cuda()
    out = model(ids.cuda(), labels=ids.cuda(), bptt_depth=2, logits_to_keep=0)
    torch.testing.assert_close(out.logits.cpu(), expected.logits, rtol=0, atol=1e-8)
    torch.testing.assert_close(out.loss.cpu(), expected.loss, rtol=0, atol=1e-8)
    out.loss.backward()
    # A state from a file goes where the model is.
    state = MemoryState.load(tmp_path / "state")
    again = model(ids.cuda(), memory_state=state)
    assert again.logits.isfinite().all() and again.logits.is_cuda
    greedy = {"max_new_tokens": SEGMENT + 2, "do_sample": False, "pad_token_id": 0}
    said = model.generate(ids.cuda(), eos_token_id=None, **greedy)
    assert torch.equal(said.cpu(), model.cpu().generate(ids, eos_token_id=None, **greedy))


@memories
@torch.no_grad()
def test_bfloat16_reads_a_long_document_in_constant_memory(memory: str) -> None:
    model = memory_model("llama", memory, segment_length=32).to("cuda", torch.bfloat16)

    def peak(length: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        state = model(tokens(2, length).cuda(), logits_to_keep=None).memory_state
        assert all(tensor.isfinite().all() for tensor in state.tensors.values())
        return torch.cuda.max_memory_allocated()

    short, long = peak(32 * 64), peak(32 * 1024)
    # The ids themselves are 16 bytes per position for two rows.
    assert long - short < 64 * 32 * 1024
