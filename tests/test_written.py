"""What earlier versions wrote is read with equal results, from the version that made it on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from memlm import DocumentStream, MemLMForCausalLM, MemoryState
from memlm.retrieval import HashingEmbedder
from tests.cases import SEGMENT, tokens
from tests.written import make

WRITTEN = Path(make.__file__).parent
MODELS = sorted(path.parent for path in WRITTEN.glob("*/*/state.safetensors"))
STREAMS = sorted(path.parent for path in WRITTEN.glob("*/*/expected.json"))
models = pytest.mark.parametrize("folder", MODELS, ids=lambda f: f"{f.parent.name}-{f.name}")
streams = pytest.mark.parametrize("folder", STREAMS, ids=lambda f: f"{f.parent.name}-{f.name}")


def test_something_was_written() -> None:
    assert len(MODELS) >= 12 and STREAMS


# In bfloat16 a divisor of ARMT's is nearly zero in this row; other rounding moves the leaf by a third.
LEAPS = ("armt-bfloat16", "armt.1.normaliser", 1)


def _far(found: torch.Tensor, expected: torch.Tensor, half: bool) -> float:
    """The distance from `expected`, in units of what another processor may do.

    In float32, another order of summing moves ARMT's quotients by up to 2e-4, number by number. One that
    rounds products in bfloat16 otherwise moves four logits in a thousand by up to .05, the whole hardly.
    """
    if not expected.numel():
        return 0.0
    difference = (found - expected).float()
    if half:
        return (difference.norm() / (2e-2 * expected.float().norm())).item()
    return (difference.abs() / (1e-3 + 1e-3 * expected.abs())).max().item()


@models
@torch.no_grad()
def test_a_model_and_its_state_give_the_logits_they_gave(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    expected = load_file(folder / "expected.safetensors")["logits"]
    half = expected.dtype == torch.bfloat16
    state = MemoryState.load(folder / "state.safetensors")
    again = model(tokens(*make.SECOND, seed=3), memory_state=state).logits
    assert _far(again, expected, half) < 1
    torch.testing.assert_close(again, expected, rtol=0.1, atol=0.1)
    # The state is one the model makes itself, but for leaves that came later, and it matters.
    made = model(tokens(*make.FIRST)).memory_state.tensors
    for name, tensor in state.tensors.items():
        for row, (ours, theirs) in enumerate(zip(made[name], tensor, strict=True)):
            if (folder.name, name, row) != LEAPS:
                assert _far(ours, theirs, half) < 1, (name, row)
    if folder.name != "none":
        alone = model(tokens(*make.SECOND, seed=3)).logits
        assert _far(alone, expected, half) > 1


@models
@torch.no_grad()
def test_a_memory_alone_fits_on_a_base_of_its_own(folder: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    model = MemLMForCausalLM.from_base(
        make.base_for(whole.config.memory, whole.base.dtype),
        memory=whole.config.memory,
        segment_length=SEGMENT,
        memory_dtype=whole.config.memory_dtype,
    ).eval()
    model.load_memory(folder / "memory")
    model.base.load_state_dict(whole.base.state_dict())
    ids = tokens(*make.SECOND, seed=3)
    state = MemoryState.load(folder / "state.safetensors")
    torch.testing.assert_close(
        model(ids, memory_state=state).logits.float(),
        whole(ids, memory_state=state).logits.float(),
        rtol=0,
        atol=2e-2 if whole.base.dtype == torch.bfloat16 else 1e-6,
    )


@streams
def test_a_stream_goes_on_where_it_was_left(folder: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    embedder = HashingEmbedder(dim=expected["dim"])
    stream = DocumentStream.load(folder / "stream", model, tokenizer, embedder)
    # Version 0.1 took control tokens written out in a text for control tokens.
    assert stream.split_special_tokens == (folder.parent.name != "0.1")
    assert stream.tokens_seen == expected["tokens_seen"]
    assert stream.score(make.CONTINUATION) == pytest.approx(expected["score"], abs=1e-3)
    answer = stream.ask(make.QUESTION, max_new_tokens=6)
    assert answer == expected["answer"]
    assert [source.text for source in answer.sources] == expected["sources"]
