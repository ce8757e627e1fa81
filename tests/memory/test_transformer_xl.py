"""Transformer-XL against plain transformers: the unsplit sequence under a mask of its own."""

from __future__ import annotations

import pytest
import torch

from memlm import MemLMForCausalLM
from memlm.memory import TransformerXLConfig
from tests.cases import FAMILIES, SEGMENT, base_model, tokens

EXACT = {"rtol": 0.0, "atol": 1e-9}
# The base's own window would hide what Transformer-XL shows.
WIDE = {"gemma3_text": {"sliding_window": 64}}


def visible(total: int, segment: int, memory: int) -> torch.Tensor:
    """(N, N) bool: a token sees its segment so far, and `memory` tokens before the segment."""
    at = torch.arange(total)
    first = at // segment * segment - memory
    return (at[None] <= at[:, None]) & (at[None] >= first[:, None])


def unsplit(family: str, ids: torch.Tensor, memory: int) -> torch.Tensor:
    base = base_model(family, **WIDE.get(family, {}))
    total = ids.shape[1]
    seen = visible(total, SEGMENT, memory)[None, None].expand(ids.shape[0], -1, -1, -1)
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e9)
    by_kind = {kind: mask for kind in base.config.layer_types} if family == "gemma3_text" else mask
    places = {}
    if not hasattr(base.get_decoder(), "rotary_emb"):
        places["position_ids"] = (torch.arange(total) % SEGMENT).expand(ids.shape[0], -1)
    return base(ids, attention_mask=by_kind, **places).logits


@pytest.mark.parametrize(
    ("family", "memory"),
    [
        *(("llama", memory) for memory in (1, SEGMENT, 2 * SEGMENT + 1)),
        *((family, memory) for family in FAMILIES for memory in (4, 40)),
    ],
)
@torch.no_grad()
def test_segments_equal_the_unsplit_sequence(family: str, memory: int) -> None:
    ids = tokens(2, 4 * SEGMENT + 3)
    model = MemLMForCausalLM.from_base(
        base_model(family, **WIDE.get(family, {})),
        memory=TransformerXLConfig(memory_length=memory),
        segment_length=SEGMENT,
    )
    # The families keep their rotary angles in float32: once the oldest tokens are dropped, positions are
    # counted from another one, and the same distance is rounded otherwise.
    close = EXACT if memory >= ids.shape[1] else {"rtol": 0.0, "atol": 1e-5}
    torch.testing.assert_close(model(ids).logits, unsplit(family, ids, memory), **close)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
@torch.no_grad()
def test_a_memory_as_long_as_the_document_is_the_base_model(family: str) -> None:
    base, ids = base_model(family), tokens(1, 7 * SEGMENT)
    plain = base(ids).logits
    model = MemLMForCausalLM.from_base(
        base, memory=TransformerXLConfig(memory_length=50), segment_length=SEGMENT
    )
    torch.testing.assert_close(model(ids).logits, plain, **EXACT)


@torch.no_grad()
def test_places_stay_within_what_the_base_was_built_for() -> None:
    base = base_model("llama", max_position_embeddings=3 * SEGMENT)
    seen = []
    rotary = base.model.rotary_emb
    forward = type(rotary).forward
    model = MemLMForCausalLM.from_base(
        base, memory=TransformerXLConfig(memory_length=2 * SEGMENT), segment_length=SEGMENT
    )

    def record(x, position_ids, *args, **kwargs):
        seen.append(int(position_ids.max()))
        return forward(rotary, x, position_ids, *args, **kwargs)

    rotary.forward = record
    model(tokens(1, 200 * SEGMENT), logits_to_keep=None)
    assert max(seen) == 3 * SEGMENT - 1
    with pytest.raises(ValueError, match="memory positions is too large"):
        MemLMForCausalLM.from_base(
            base_model("llama", max_position_embeddings=3 * SEGMENT),
            memory=TransformerXLConfig(memory_length=2 * SEGMENT + 1),
            segment_length=SEGMENT,
        )


def test_the_offset_of_an_absolute_base_tells_places_apart() -> None:
    ids = tokens(1, 2 * SEGMENT)
    model = MemLMForCausalLM.from_base(
        base_model("gpt2"), memory=TransformerXLConfig(memory_length=4), segment_length=SEGMENT
    )
    before = model(ids).logits
    offset = model.memory.attached["transformer-xl"].cells["0"].offset
    with torch.no_grad():
        offset[:, 0] += 1.0
    after = model(ids).logits
    assert torch.equal(after[:, :SEGMENT], before[:, :SEGMENT])
    assert (after - before)[:, SEGMENT:].abs().max() > 1e-6


def test_no_memory_length_is_refused() -> None:
    with pytest.raises(ValueError, match="memory_length=0"):
        MemLMForCausalLM.from_base(
            base_model("llama"), memory=TransformerXLConfig(memory_length=0), segment_length=SEGMENT
        )


def dropping(share: float, schedule: str = "sequential") -> MemLMForCausalLM:
    """In training, without the base's own dropout."""
    return MemLMForCausalLM.from_base(
        base_model("llama"),
        memory=TransformerXLConfig(memory_length=SEGMENT, read_dropout=share),
        segment_length=SEGMENT,
        schedule=schedule,
    ).train()


@pytest.mark.parametrize("schedule", ["sequential", "wavefront"])
@torch.no_grad()
def test_rows_go_without_the_tokens_before_the_segment_in_training(schedule: str) -> None:
    ids = tokens(32, 2 * SEGMENT)
    alone = dropping(0.0, schedule)(ids[:, SEGMENT:]).logits
    whole = dropping(0.0, schedule)(ids).logits[:, SEGMENT:]

    def shares(model: MemLMForCausalLM) -> tuple[float, float]:
        logits = model(ids).logits[:, SEGMENT:]
        same = [(logits - one).abs().amax(dim=(1, 2)) < 1e-5 for one in (alone, whole)]
        return float(same[0].double().mean()), float(same[1].double().mean())

    assert shares(dropping(1.0, schedule)) == (1.0, 0.0)
    assert shares(dropping(1.0, schedule).eval()) == (0.0, 1.0)
    # Each layer draws by itself: a quarter of the rows sees nothing, a quarter everything.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nothing, everything = shares(dropping(0.5, schedule))
    assert 0.05 < nothing < 0.5 and 0.05 < everything < 0.5
    model = dropping(1.0, schedule)
    model.set_memory_options(read_dropout=0.0)
    assert shares(model) == (0.0, 1.0)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_of_rows_is_refused_that_is_none(share: float) -> None:
    with pytest.raises(ValueError, match=r"read_dropout=.* must be from 0 to 1"):
        dropping(share)
