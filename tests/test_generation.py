"""`generate`: tokens are those of reading the whole prefix anew at every step."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from memlm import MemLMForCausalLM
from memlm.memory import TitansMAGConfig, available_memories
from tests.cases import CASES, SEGMENT, memory_model, tokens
from tests.memory.test_laws import grid, once_per_site

# Past the end of two segments from some lengths, of one from all.
NEW = SEGMENT + 4
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LOGITS = {"output_logits": True, "return_dict_in_generate": True}


@torch.no_grad()
def by_rereading(model, ids: torch.Tensor, steps: int, state=None) -> torch.Tensor:
    for _ in range(steps):
        token = model(ids, memory_state=state).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
    return ids


# Every mechanism is held to this by law 13, too: what is kept of a segment changes no logit.
@grid(
    available_memories(),
    "length",
    (SEGMENT + 1, 1, SEGMENT - 1, SEGMENT, 3 * SEGMENT + 2),
    each=False,
)
@torch.no_grad()
def test_greedy_equals_reading_the_whole(memory: str, family: str, length: int) -> None:
    model, ids = memory_model(family, memory), tokens(2, length)
    out = model.generate(ids, **GREEDY)
    # One reading says what every prefix would: no logit knows of a later token (tests/memory/test_laws.py).
    said = model(out).logits.argmax(-1)
    assert out.shape == (2, length + NEW)
    assert torch.equal(out[:, :length], ids) and torch.equal(
        out[:, length:], said[:, length - 1 : -1]
    )


@once_per_site
def test_greedy_equals_rereading_the_prefix(memory: str, family: str) -> None:
    model, ids = memory_model(family, memory), tokens(2, SEGMENT - 1)
    assert torch.equal(model.generate(ids, **GREEDY), by_rereading(model, ids, NEW))


@once_per_site
def test_ragged_prompts_equal_prompts_alone(memory: str, family: str) -> None:
    model = memory_model(family, memory)
    rows = [tokens(1, n, seed=n)[0] for n in (2 * SEGMENT + 1, 1, SEGMENT, 5)]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    out = model.generate(ids, attention_mask=mask, **GREEDY)[:, width:]
    for i, row in enumerate(rows):
        alone = model.generate(row[None], **GREEDY)[0, len(row) :]
        assert torch.equal(out[i], alone)


@once_per_site
def test_generation_goes_on_after_a_state(memory: str, family: str) -> None:
    model, ids = memory_model(family, memory), tokens(2, 4 * SEGMENT + 2)
    state = model(ids[:, : 3 * SEGMENT], logits_to_keep=None).memory_state
    kept = state.fork()
    tail = ids[:, 3 * SEGMENT :]
    out = model.generate(tail, memory_state=state, **GREEDY)
    assert torch.equal(out[:, tail.shape[1] :], model.generate(ids, **GREEDY)[:, ids.shape[1] :])
    assert all(torch.equal(kept[n], state[n]) for n in kept.tensors)


@once_per_site
@torch.no_grad()
def test_beam_search_carries_each_beams_own_memory(memory: str, family: str) -> None:
    """A beam's score is the log-probability of its tokens, however beams were exchanged."""
    model, ids = memory_model(family, memory), tokens(2, SEGMENT + 2)
    out = model.generate(
        ids,
        num_beams=4,
        num_return_sequences=4,
        return_dict_in_generate=True,
        output_scores=True,
        length_penalty=0.0,
        **{**GREEDY, "max_new_tokens": 2 * SEGMENT + 3},
    )
    logits = model(out.sequences).logits.log_softmax(-1)
    picked = logits[:, :-1].gather(2, out.sequences[:, 1:, None])[:, ids.shape[1] - 1 :, 0]
    torch.testing.assert_close(picked.sum(1), out.sequences_scores.double(), rtol=0.0, atol=1e-4)


def test_sampling_is_reproducible_and_expands_rows() -> None:
    model, ids = memory_model("llama", "armt"), tokens(2, SEGMENT + 2)
    state = model(ids[:, :SEGMENT]).memory_state
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        drawn.append(
            model.generate(
                ids[:, SEGMENT:],
                memory_state=state,
                do_sample=True,
                num_return_sequences=3,
                max_new_tokens=NEW,
                eos_token_id=None,
                pad_token_id=0,
            )
        )
    assert torch.equal(*drawn)
    assert drawn[0].shape == (6, 2 + NEW)
    assert len({tuple(row.tolist()) for row in drawn[0]}) > 2


def test_rows_stop_at_their_own_end() -> None:
    model, ids = memory_model("llama", "rmt"), tokens(2, 5)
    free = model.generate(ids, **GREEDY)[:, 5:]
    end = int(free[0, 3])
    out = model.generate(ids, **{**GREEDY, "eos_token_id": end})[:, 5:]
    first = free[0].tolist().index(end)
    assert out[0, first] == end and (out[0, first + 1 :] == 0).all()


def test_an_empty_prompt_in_a_batch_is_refused() -> None:
    model, ids = memory_model("llama", "armt"), tokens(2, 4)
    mask = torch.ones_like(ids)
    mask[1] = 0
    with pytest.raises(ValueError, match="without a token"):
        model.generate(ids, attention_mask=mask, **GREEDY)


@torch.no_grad()
def test_beams_of_like_prompts_keep_their_own_documents() -> None:
    """The same question behind different documents: what was committed is told apart by both."""
    model = memory_model("llama", "armt")
    state = model(tokens(2, 2 * SEGMENT, seed=7), logits_to_keep=None).memory_state
    ids = tokens(1, 2).expand(2, -1)
    search = {**GREEDY, "num_beams": 4, "max_new_tokens": 3 * SEGMENT}
    together = model.generate(ids, memory_state=state, **search)
    for row in range(2):
        alone = model.generate(ids[row : row + 1], memory_state=state.select([row]), **search)
        assert torch.equal(together[row], alone[0])


def test_rows_that_change_places_take_what_they_committed_along() -> None:
    from memlm.rolling import RollingMemory

    model = memory_model("llama", "armt")
    state = model(tokens(2, 2 * SEGMENT, seed=7), logits_to_keep=None).memory_state
    a, b, tail = (tokens(1, n, seed=s)[0] for n, s in ((SEGMENT, 1), (SEGMENT, 2), (2, 3)))
    rolling = RollingMemory(model, state)
    # Two beams of each document; both documents have a beam that begins with `a`.
    rolling.advance(torch.stack([torch.cat([x, tail]) for x in (a, b, b, a)]), None)
    rolling.reorder_cache(torch.tensor([1, 0, 3, 3]))
    swapped = torch.stack([torch.cat([x, tail, tail[:1]]) for x in (b, a, a, a)])
    ids, mask, got = rolling.advance(swapped, None)
    fresh = RollingMemory(model, state).advance(swapped, None)[2]
    assert mask is None and torch.equal(ids, swapped[:, SEGMENT:])
    for name, tensor in fresh.tensors.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-8)


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}])
def test_a_token_costs_one_token(monkeypatch, search: dict) -> None:
    """The base model is given each token once, and once more when its segment is committed."""
    model, built, given = memory_model("llama", "armt"), [], []
    init_state = type(model.memory).init_state

    def noted(self, batch_size: int):
        built.append(batch_size)
        return init_state(self, batch_size)

    monkeypatch.setattr(type(model.memory), "init_state", noted)
    model.get_input_embeddings().register_forward_hook(
        lambda module, ids, out: given.append(out.shape[1])
    )
    model.generate(tokens(2, 20 * SEGMENT + 1), **{**GREEDY, **search})
    assert built == [2 * search.get("num_beams", 1)]
    first = [*[SEGMENT] * 20, *[1] * SEGMENT]
    assert given == [*first, SEGMENT, *[1] * (NEW - SEGMENT)]


SEVERAL = [
    ["rmt", "gated-delta"],
    ["armt", "titans-mal", "transformer-xl"],
    ["titans-mag", "infini"],
]
# Chunks that end within a segment, at other tokens in other rows.
CHUNKED = TitansMAGConfig(num_persistent_tokens=2, chunk_length=4, conv_size=3)


@pytest.mark.parametrize(
    ("memory", "search"),
    [
        *(
            pytest.param([CASES[name] for name in names], {}, id="+".join(names))
            for names in SEVERAL
        ),
        pytest.param(CHUNKED, {}, id="chunks"),
        pytest.param(CHUNKED, {"num_beams": 3}, id="chunks-beams"),
        pytest.param(replace(CHUNKED, write_gate="sigmoid"), {}, id="gate"),
    ],
)
def test_the_cache_of_other_memories(memory: object, search: dict) -> None:
    model, ids = memory_model("llama", memory), tokens(3, SEGMENT + 3)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    given = {"attention_mask": mask, **GREEDY, **LOGITS, **search}
    kept = model.generate(ids, use_cache=True, **given)
    if search:
        expected = model.generate(ids, use_cache=False, **given).logits
    else:
        # All that was said, read at once.
        there = torch.cat([mask, torch.ones(3, NEW, dtype=torch.long)], 1)
        with torch.no_grad():
            read = model(kept.sequences, attention_mask=there).logits
        expected = read[:, ids.shape[1] - 1 : -1].unbind(1)
    for a, b in zip(kept.logits, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=1e-5)


def test_asking_for_a_cache_where_there_can_be_none_is_refused() -> None:
    model, ids = memory_model("llama", "titans-mac"), tokens(1, 3)
    assert "titans-mac" in model.reruns
    with pytest.raises(ValueError, match=r"use_cache=True.*titans-mac.*leave use_cache out"):
        model.generate(ids, use_cache=True, **GREEDY)
    assert memory_model("llama", "armt").reruns is None


def test_admitting_a_state_builds_none(monkeypatch) -> None:
    model, ids = memory_model("llama", "armt"), tokens(2, SEGMENT)
    state = model(ids).memory_state
    monkeypatch.setattr(type(model.memory), "init_state", None)
    assert model(ids, memory_state=state).memory_state.batch_size == 2


def test_prompts_that_differ_in_padding_keep_their_own_memory_in_beam_search() -> None:
    """Ragged prompts in one batch, each searched as alone."""
    model = memory_model("llama", "armt")
    long, short = tokens(1, 2 * SEGMENT + 3, seed=4), tokens(1, SEGMENT + 1, seed=5)
    ids, mask = torch.zeros(2, long.shape[1], dtype=torch.long), torch.zeros(2, long.shape[1])
    ids[0], mask[0] = long[0], 1
    ids[1, -short.shape[1] :], mask[1, -short.shape[1] :] = short[0], 1
    search = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    both = model.generate(ids, attention_mask=mask, **search)[:, long.shape[1] :]
    for index, row in enumerate((long, short)):
        alone = model.generate(row, **search)[:, row.shape[1] :]
        assert torch.equal(both[2 * index : 2 * index + 2], alone)


@pytest.mark.parametrize("search", [{}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("pads_with_end", [False, True])
@torch.no_grad()
def test_what_is_returned_is_where_the_text_stands(search: dict, pads_with_end: bool) -> None:
    model, ids = memory_model("llama", "armt"), tokens(2, SEGMENT + 2)
    given = {**GREEDY, **search, "max_new_tokens": 3 * SEGMENT}
    free = model.generate(ids, **given)
    # One row ends early, and what pads it afterwards is not remembered.
    end = int(free[0, ids.shape[1] + 2])
    given |= {"eos_token_id": end, "return_dict_in_generate": True}
    if pads_with_end:
        given["pad_token_id"] = end
    out = model.generate(ids, **given)
    assert "past_key_values" not in out
    for row, sequence in enumerate(out.sequences):
        new = sequence[ids.shape[1] :].tolist()
        text = sequence[: ids.shape[1] + (new.index(end) + 1 if end in new else len(new))]
        full = (len(text) - 1) // SEGMENT * SEGMENT
        real = slice(None) if out.open_mask is None else out.open_mask[row].bool()
        assert torch.equal(out.open_ids[row][real], text[full:])
        state = model(text[None, :full], logits_to_keep=None).memory_state
        for name, tensor in state.tensors.items():
            torch.testing.assert_close(out.memory_state[name][row], tensor[0], rtol=0, atol=1e-8)


def test_going_on_from_what_is_returned_is_going_on_with_the_text() -> None:
    model, ids, more = memory_model("llama", "rmt"), tokens(2, 4), tokens(2, 3, seed=8)
    out = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    turn = torch.cat([out.open_ids, more], 1)
    on = model.generate(turn, memory_state=out.memory_state, **GREEDY)
    unbroken = model.generate(torch.cat([out.sequences, more], 1), **GREEDY)
    assert torch.equal(on[:, turn.shape[1] :], unbroken[:, -NEW:])


def test_another_cache_is_refused_and_a_configuration_is_obeyed() -> None:
    model, ids = memory_model("llama", "armt"), tokens(1, 3)
    for name, value in (("cache_implementation", "static"), ("prefill_chunk_size", 4)):
        with pytest.raises(ValueError, match=f"{name}=.*leave it out"):
            model.generate(ids, **{name: value}, **GREEDY)
    given: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda m, i, out: given.append(out.shape[1]))
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0, use_cache=False)
    model.generate(ids, config)
    assert given == [3, 4, 5]


class FirstRowStops(StoppingCriteria):
    """After so many tokens, for a reason that no token tells."""

    def __init__(self, columns: int) -> None:
        self.columns = columns

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        stops = input_ids.shape[1] >= self.columns
        return torch.tensor([stops] + [False] * (len(input_ids) - 1))


@pytest.mark.parametrize("steps", [2, SEGMENT + 3])
@pytest.mark.parametrize("positional", [False, True])
@torch.no_grad()
def test_padding_behind_a_row_that_was_stopped_is_no_text(steps: int, positional: bool) -> None:
    """Also where segments are committed while the other row goes on."""
    model, ids = memory_model("llama", "armt"), tokens(2, SEGMENT + 2)
    columns = ids.shape[1] + steps
    stop = StoppingCriteriaList([FirstRowStops(columns)])
    # An end token that nobody says: without one, generation goes on in rows that have stopped.
    said = model.generate(ids, **{**GREEDY, "max_new_tokens": 3 * SEGMENT})
    end = next(token for token in range(61) if token not in said)
    given = {**GREEDY, "max_new_tokens": 3 * SEGMENT, "eos_token_id": end}
    given["return_dict_in_generate"] = True
    if positional:
        out = model.generate(ids, None, None, stop, **given)
    else:
        out = model.generate(ids, stopping_criteria=stop, **given)
    assert (out.sequences[0, columns:] == 0).all() and torch.equal(out.sequences[1], said[1])
    for row, text in enumerate((out.sequences[0, :columns], out.sequences[1])):
        full = (len(text) - 1) // SEGMENT * SEGMENT
        assert torch.equal(out.open_ids[row][out.open_mask[row].bool()], text[full:])
        state = model(text[None, :full], logits_to_keep=None).memory_state
        for name, tensor in state.tensors.items():
            torch.testing.assert_close(out.memory_state[name][row], tensor[0], rtol=0, atol=1e-8)


@torch.no_grad()
def test_padding_behind_a_beam_that_was_stopped_is_no_text() -> None:
    model, ids = memory_model("llama", "armt"), tokens(2, SEGMENT + 2)
    given = {**GREEDY, "num_beams": 2, "return_dict_in_generate": True, "eos_token_id": 60}
    # With token 0 for padding, transformers pads beams with the end token, which could be the text's.
    given["pad_token_id"] = 59
    columns = ids.shape[1] + 2
    out = model.generate(ids, stopping_criteria=[FirstRowStops(columns)], **given)
    for row, text in enumerate(out.sequences):
        text = text[: int((text != 59).nonzero()[-1]) + 1]
        full = (len(text) - 1) // SEGMENT * SEGMENT
        real = slice(None) if out.open_mask is None else out.open_mask[row].bool()
        assert torch.equal(out.open_ids[row][real], text[full:])


def test_rows_that_stop_without_padding_go_on() -> None:
    """Where generation knows no end token it pads nothing, and every token is the text's."""
    model, ids = memory_model("llama", "armt"), tokens(2, SEGMENT + 2)
    given = {**GREEDY, "return_dict_in_generate": True}
    out = model.generate(ids, stopping_criteria=[FirstRowStops(ids.shape[1] + 2)], **given)
    assert out.open_mask is None and torch.equal(
        out.open_ids[0], out.sequences[0, -out.open_ids.shape[1] :]
    )


def test_what_a_base_says_of_its_own_cache_is_not_taken_over() -> None:
    base = copy.deepcopy(memory_model("llama", "armt").base)
    base.generation_config.cache_implementation = "static"
    base.generation_config.prefill_chunk_size = 4
    model = MemLMForCausalLM.from_base(base, "armt", SEGMENT)
    assert model.generate(tokens(1, 3), **GREEDY).shape == (1, 3 + NEW)
    assert base.generation_config.cache_implementation == "static"
    model.generation_config.cache_implementation = "static"
    with pytest.raises(ValueError, match=r"cache_implementation='static' .*generation_config"):
        model.generate(tokens(1, 3), **GREEDY)


def test_what_has_no_tokens_is_refused() -> None:
    model = memory_model("llama", "armt")
    for ids in (tokens(1, 3)[0], tokens(1, 3)[:, :0]):
        with pytest.raises(ValueError, match="with at least one token"):
            model.generate(ids, **GREEDY)
    with pytest.raises(ValueError, match="use generate"):
        model.generate_batch([[1, 2]])


@pytest.mark.parametrize(("pad", "kept"), [(7, [5, 7]), (0, [5, 7]), (None, [5, 7])])
def test_the_end_of_a_beam_is_no_padding(pad: int | None, kept: list[int]) -> None:
    """Also where the end token pads: its first is the text's."""
    from memlm.rolling import RollingMemory

    model = memory_model("llama", "armt")
    rolling = RollingMemory(model, None, None, [7], pad=pad)
    rolling.advance(tokens(1, 2), None)
    filled = 7 if pad is None else pad
    found = rolling.after(
        torch.cat([tokens(1, 2)[0], torch.tensor([5, 7, filled, filled])])[None], True
    )
    assert found.rows[0].tolist() == [*tokens(1, 2)[0].tolist(), *kept]
