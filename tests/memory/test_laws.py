"""The laws every mechanism obeys, on three architectures, in float64, nothing at zero.

The default run holds every mechanism to every law on the first architecture, one mechanism per site on
another, and two in the cases that ask more of the loop over segments than of a mechanism; `-m "not gpu"`
runs all of them, as tests/law_table.py does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import pytest
import torch

from memlm import MemoryState
from memlm.backbone.batched import BatchedLine
from memlm.memory import available_memories, memory_class
from memlm.memory.parts.gates import GatedMemory
from memlm.modeling import MemLMForCausalLM
from memlm.schedule import Place
from memlm.segment import cut
from tests.cases import (
    CASES,
    LAW_FAMILIES,
    SEGMENT,
    base_model,
    deeper,
    families_of,
    memory_model,
    randomise,
    tokens,
)

EXACT = {"rtol": 0.0, "atol": 1e-10}
MEMORIES = [name for name in available_memories() if name != "none"]
# Those whose write gates can be shut.
SILENT = [
    name
    for name in MEMORIES
    if "write_threshold" in {f.name for f in fields(memory_class(name).Config)}
]
# Where the house may skip a memory, the mechanism itself is asked as well.
SILENCES = [
    (name, skips)
    for name in SILENT
    for skips in (False, True)
    if not skips or memory_class(name).gates_of is not GatedMemory.gates_of
]

# One mechanism per site, and the other architecture it meets by default: where a memory sits decides what
# that shows it, and tests/test_backbone.py has a memory at every site of every family. What is put in front
# meets learned positions, what is within a layer the norms of queries and keys.
PER_SITE = {"rmt": "gpt2", "armt": "qwen3", "titans-mac": "gpt2", "infini": "qwen3"}
# Around the whole decoder and within it: the two ways in which the loop over segments hands states on.
LOOPED = ("none", "rmt", "armt")
# One for each way of going on within an open segment (`Continues.how`): beams exchange what is kept there.
EACH_WAY = ("none", "rmt", "armt", "gated-delta", "memory-caching", "titans-mac")

families = pytest.mark.parametrize("family", LAW_FAMILIES)
memories = pytest.mark.parametrize("memory", MEMORIES)


def grid(
    names: Sequence[str],
    argument: str | None = None,
    values: Sequence[object] = (None,),
    *,
    each: bool = True,
    others: Sequence[str] = LOOPED,
) -> pytest.MarkDecorator:
    """Every mechanism of `names` on every architecture, with every value of `argument`.

    The default run takes all of them on the first architecture with the first value, which asks most of a
    mechanism; those of PER_SITE on another architecture, and `others` with each other value too. The rest
    is marked slow. each=False: for what follows from the laws, mechanism by mechanism; only PER_SITE
    and none are run by default, on the first architecture.
    """
    cases = []
    for value in values:
        for memory in names:
            for family in families_of(memory):
                first = family == families_of(memory)[0]
                if value != values[0]:
                    by_default = first and memory in others
                elif first:
                    by_default = each or memory in ("none", *PER_SITE)
                else:
                    by_default = each and PER_SITE.get(memory) == family
                case = (memory, family) if argument is None else (memory, family, value)
                told = value if isinstance(value, tuple) else () if argument is None else (value,)
                label = "-".join(map(str, (memory, family, *told)))
                marks = () if by_default else pytest.mark.slow
                cases.append(pytest.param(*case, marks=marks, id=label))
    return pytest.mark.parametrize(("memory", "family", *([argument] if argument else ())), cases)


with_memory = grid(MEMORIES)
with_none = grid(available_memories())
once_per_site = grid(available_memories(), each=False)


def same_state(a: MemoryState, b: MemoryState) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(
        torch.allclose(a[name], b[name], **EXACT) for name in a.tensors
    )


def test_every_mechanism_has_a_case() -> None:
    assert set(CASES) == set(MEMORIES)


@with_none
@torch.no_grad()
def test_carry(memory: str, family: str) -> None:
    model, ids = memory_model(family, memory), tokens(2, 4 * SEGMENT + 3)
    whole = model(ids)
    for grouping in ([1, 1, 1, 1, 1], [2, 3]):
        state, logits, start = None, [], 0
        for count in grouping:
            out = model(ids[:, start : start + count * SEGMENT], memory_state=state)
            state, start = out.memory_state, start + count * SEGMENT
            logits.append(out.logits)
        torch.testing.assert_close(torch.cat(logits, 1), whole.logits, **EXACT)
        assert same_state(state, whole.memory_state)


@with_none
@torch.no_grad()
def test_causality(memory: str, family: str) -> None:
    places = (1, SEGMENT - 1, SEGMENT, 2 * SEGMENT + 2)
    # A row as it is, and one for each token that is changed.
    model, ids = memory_model(family, memory), tokens(1, 3 * SEGMENT + 2).repeat(5, 1)
    for row, changed in enumerate(places, 1):
        ids[row, changed] = (ids[row, changed] - 2) % 50 + 3
    before, *others = model(ids).logits
    for after, changed in zip(others, places, strict=True):
        torch.testing.assert_close(after[:changed], before[:changed], **EXACT)
        assert (after[changed] - before[changed]).abs().max() > 1e-6


@with_memory
@torch.no_grad()
def test_the_first_segment_reaches_the_last(memory: str, family: str) -> None:
    model, ids = memory_model(family, memory), tokens(1, 4 * SEGMENT).repeat(2, 1)
    ids[1, 2] = (ids[1, 2] - 2) % 50 + 3
    one, other = model(ids).logits[:, -SEGMENT:]
    assert (one - other).abs().max() > 1e-7


@families
@torch.no_grad()
def test_without_memory_segments_are_independent(family: str) -> None:
    model, ids = memory_model(family, "none"), tokens(1, 3 * SEGMENT)
    alone = model(ids[:, -SEGMENT:]).logits
    torch.testing.assert_close(model(ids).logits[:, -SEGMENT:], alone, **EXACT)


@grid(available_memories(), "side", ("holes", "right", "left"))
@torch.no_grad()
def test_rows_of_a_ragged_batch_equal_rows_alone(memory: str, family: str, side: str) -> None:
    model = memory_model(family, memory)
    lengths, total = [3 * SEGMENT + 2, 1, SEGMENT, 2 * SEGMENT + 5], 4 * SEGMENT
    rows = [tokens(1, n, seed=10 + n)[0] for n in lengths]
    ids = torch.zeros(len(rows), total, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        n = len(row)
        if side == "holes":
            at = torch.randperm(total, generator=torch.Generator().manual_seed(i))[:n].sort()[0]
        else:
            at = torch.arange(n) if side == "right" else torch.arange(total - n, total)
        ids[i, at], mask[i, at] = row, 1
    labels = ids.clone()
    out = model(ids, attention_mask=mask, labels=labels, logits_to_keep=0)
    summed, count = 0.0, 0
    for i, row in enumerate(rows):
        alone = model(row[None], labels=row[None], logits_to_keep=0)
        torch.testing.assert_close(out.logits[i][mask[i].bool()], alone.logits[0], **EXACT)
        assert same_state(out.memory_state.select([i]), alone.memory_state)
        summed, count = summed + float(alone.loss) * (len(row) - 1), count + len(row) - 1
    assert abs(float(out.loss) - summed / count) < 1e-10
    order = [2, 0, 3, 1]
    permuted = model(ids[order], attention_mask=mask[order], logits_to_keep=5)
    torch.testing.assert_close(permuted.logits, out.logits[order, -5:], **EXACT)
    assert same_state(permuted.memory_state, out.memory_state.select(order))


# (depth, anchor): the windows of three segments, the last of them short.
WINDOWS = {
    (2, "end"): (1, 2),
    (1, "end"): (1, 1, 1),
    (2, "start"): (2, 1),
    (3, "end"): (3,),
}


@grid(available_memories(), "windows", tuple(WINDOWS))
def test_bptt_depth_cuts_exactly_there(memory: str, family: str, windows: tuple[int, str]) -> None:
    model, ids = memory_model(family, memory), tokens(2, 2 * SEGMENT + 3)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
        ]

    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    count = int((shifted != -100).sum())
    depth, anchor = windows
    cut = gradients(model(ids, labels=ids, bptt_depth=depth, bptt_anchor=anchor).loss)
    state, total, start = None, 0.0, 0
    for size in WINDOWS[windows]:
        at = slice(start, start + size * SEGMENT)
        out = model(
            ids[:, at],
            shift_labels=shifted[:, at],
            memory_state=state,
            num_items_in_batch=count,
        )
        state, total, start = out.memory_state.detach(), total + out.loss, at.stop
    by_hand = gradients(total)
    for a, b in zip(cut, by_hand, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    full = gradients(model(ids, labels=ids).loss)
    cost = max((a - b).abs().max() for a, b in zip(cut, full, strict=True))
    learns = memory != "none" and memory_class(memory).differentiable
    assert cost > 1e-9 if learns and depth < 3 else cost < 1e-10


@grid(MEMORIES, "window", ((2, 3), (2, 2), (2, 4), (2, 5), (3, 4), (3, 5)))
def test_an_answer_at_the_end_teaches_writing(
    memory: str, family: str, window: tuple[int, int]
) -> None:
    """Whatever the depth and the number of segments."""
    if not memory_class(memory).differentiable:
        pytest.skip("no gradient passes through its state")
    model, (depth, count) = memory_model(family, memory), window
    embeddings = model.get_input_embeddings().weight
    ids = tokens(1, count * SEGMENT, seed=count).clamp(max=50)
    # One token that nothing but the second to last segment holds: only its write can teach it.
    ids[0, (count - 2) * SEGMENT + 3] = 55
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    loss = model(ids, labels=labels, bptt_depth=depth).loss
    (found,) = torch.autograd.grad(loss, embeddings)
    assert found[55].abs().max() > 1e-9


@with_none
def test_recomputing_segments_changes_no_gradient(memory: str, family: str) -> None:
    model, ids = memory_model(family, memory), tokens(2, 2 * SEGMENT + 1)
    model.train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        states.append(out.memory_state.detach())
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    states: list[MemoryState] = []
    plain = gradients()
    model.gradient_checkpointing_enable()
    recomputed = gradients()
    model.gradient_checkpointing_disable()
    assert len(plain) == len(recomputed)
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    assert same_state(states[0], states[1])


@with_none
def test_the_wavefront_is_the_sequence(
    memory: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = memory_model(family, memory, **deeper(family))
    model.config.schedule = "wavefront"
    cells = [cell for found in model.memory.cells().values() for cell in found]
    if any(cell.memory.site == "model" or cell.memory.not_batched for cell in cells):
        with pytest.raises(ValueError, match=memory):
            model(tokens(1, 2 * SEGMENT))
        pytest.skip("the mechanism is refused by name")
    with torch.no_grad():
        # The model is tried out now, and not while cells are counted.
        start = model(tokens(3, SEGMENT, seed=3)).memory_state
    ids = tokens(3, 3 * SEGMENT + 2)
    mask = torch.ones_like(ids)
    # A row that ends early, and one with holes.
    mask[1, SEGMENT + 4 :], mask[2, 3:9], mask[2, 14] = 0, 0, 0
    given = {"attention_mask": mask, "labels": ids, "logits_to_keep": 0, "memory_state": start}
    found, ran = [], []
    monkeypatch.setattr(BatchedLine, "run", _noting(BatchedLine.run, ran))
    for schedule in ("sequential", "wavefront"):
        model.config.schedule = schedule
        model.zero_grad()
        out = model(ids, **given, bptt_depth=3, bptt_anchor="start")
        out.loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((out, gradients))
        # A window of three segments, and the short one, which is by itself.
        expected = 0 if schedule == "sequential" else 3 * len(model.backbone.layers)
        assert len(ran) == len(set(ran)) == expected
    (a, gradients), (b, others) = found
    torch.testing.assert_close(a.logits, b.logits, **EXACT)
    torch.testing.assert_close(a.loss, b.loss, **EXACT)
    # Numbers of a state may be large, and rounding grows with them.
    torch.testing.assert_close(
        a.memory_state.tensors, b.memory_state.tensors, rtol=1e-9, atol=1e-10
    )
    assert len(gradients) == len(others)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def _noting(run: Callable[..., None], ran: list[tuple[int, ...]]) -> Callable[..., None]:
    def noted(line: BatchedLine, places: Sequence[Place]) -> None:
        ran.extend((id(line.states), *place) for place in places)
        lines.append(line)  # Else another's states could come to stand at the same address.
        run(line, places)

    lines: list[BatchedLine] = []
    return noted


@with_memory
def test_layer_checkpointing_of_the_base_changes_no_gradient(memory: str, family: str) -> None:
    model, ids = memory_model(family, memory), tokens(2, 2 * SEGMENT)
    model.train()
    found = []
    for recompute in (False, True):
        if recompute:
            model.base.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@with_memory
def test_every_memory_parameter_gets_a_gradient(memory: str, family: str) -> None:
    model, ids = memory_model(family, memory).train(), tokens(2, 3 * SEGMENT)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.memory.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@with_none
@torch.no_grad()
def test_purity(memory: str, family: str) -> None:
    model, ids = memory_model(family, memory), tokens(2, 2 * SEGMENT + 1)
    start = model(ids).memory_state
    kept = start.fork()
    attributes = {n: sorted(vars(m)) for n, m in model.named_modules()}
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    first = model(ids, memory_state=start)
    second = model(ids, memory_state=start)
    assert torch.equal(first.logits, second.logits)
    assert same_state(start, kept)
    assert attributes == {n: sorted(vars(m)) for n, m in model.named_modules()}
    assert all(torch.equal(weights[n], p) for n, p in model.state_dict().items())
    reading = model(ids[:, :SEGMENT], memory_state=start, write=False)
    assert reading.memory_state is start
    torch.testing.assert_close(
        reading.logits, model(ids[:, :SEGMENT], memory_state=start).logits, **EXACT
    )


@with_none
@torch.no_grad()
def test_reading_leaves_the_state_that_running_leaves(memory: str, family: str) -> None:
    """Where nobody wants hidden states, the layers above the last memory rest; its state is the same."""
    model, ids = memory_model(family, memory), tokens(2, 2 * SEGMENT + 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, SEGMENT + 2 :] = False
    run = model(ids, attention_mask=mask).memory_state
    read = model.read(cut(ids, mask, None, SEGMENT))
    assert same_state(read, run)


def test_every_way_of_going_on_is_searched_with_beams() -> None:
    def way(name: str) -> str:
        cells = memory_model("llama", name).memory.cells()
        return next(iter(cells.values()))[0].memory.continues.how

    ways = {way(name) for name in MEMORIES}
    assert {way(name) for name in EACH_WAY if name != "none"} == ways


@grid(available_memories(), "beams", (1, 3), others=EACH_WAY)
def test_the_cache_changes_no_logit(memory: str, family: str, beams: int) -> None:
    model, ids = memory_model(family, memory), tokens(3, 2 * SEGMENT - 1)
    mask = torch.ones_like(ids)
    # Rows reach their borders at different tokens; the longest goes past two.
    mask[0, :5], mask[1, :1] = 0, 0
    given = {"attention_mask": mask, "max_new_tokens": SEGMENT + 2, "do_sample": False}
    given |= {"num_beams": beams} if beams > 1 else {}
    given |= {"eos_token_id": None, "pad_token_id": 0}
    given |= {"output_logits": True, "return_dict_in_generate": True}
    kept = model.generate(ids, **given)
    if beams == 1:
        # All that was said, read at once.
        there = torch.cat([mask, torch.ones(3, SEGMENT + 2, dtype=torch.long)], 1)
        with torch.no_grad():
            read = model(kept.sequences, attention_mask=there).logits
        expected = read[:, ids.shape[1] - 1 : -1].unbind(1)
    else:
        again = model.generate(ids, use_cache=False, **given)
        assert torch.equal(kept.sequences, again.sequences)
        expected = again.logits
    # `generate` hands logits out in float32.
    for a, b in zip(kept.logits, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0.0, atol=1e-5)
    if family in LAW_FAMILIES:
        hows = {
            cell.memory.continues.how for cells in model.memory.cells().values() for cell in cells
        }
        assert (model.reruns is None) == ("again" not in hows)


@with_none
# Thirteen segments fill the longest memory of the cases twice over.
@pytest.mark.parametrize("segments", [13, pytest.param(400, marks=pytest.mark.slow)])
@torch.no_grad()
def test_constant_size(memory: str, family: str, segments: int) -> None:
    model = memory_model(family, memory)
    model.config.segment_length = 4
    one = model(tokens(1, 4), logits_to_keep=None).memory_state
    many = model(tokens(1, 4 * segments), logits_to_keep=None).memory_state
    shapes = [{n: (t.shape, t.dtype) for n, t in s.tensors.items()} for s in (one, many)]
    assert shapes[0] == shapes[1]
    assert one.nbytes == many.nbytes
    assert shapes[0] == {n: (t.shape, t.dtype) for n, t in model.init_state(1).tensors.items()}


@with_memory
@torch.no_grad()
def test_neutral_at_the_start(memory: str, family: str) -> None:
    if not memory_class(memory).neutral:
        pytest.skip("the mechanism does not promise it")
    base, ids = base_model(family), tokens(2, SEGMENT)
    plain = base(ids).logits
    model = MemLMForCausalLM.from_base(base, memory=CASES[memory], segment_length=SEGMENT)
    torch.testing.assert_close(model(ids).logits, plain, **EXACT)


@with_none
@torch.no_grad()
def test_round_trips(memory: str, family: str, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = memory_model(family, memory), tokens(2, 4 * SEGMENT)
    half = 2 * SEGMENT
    middle = model(ids[:, :half]).memory_state
    expected = model(ids[:, half:], memory_state=middle).logits
    middle.save(tmp_path / "state.safetensors")
    state = MemoryState.load(tmp_path / "state.safetensors")
    assert state.batch_size == 2 and same_state(state, middle)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64).eval()
    assert isinstance(loaded, MemLMForCausalLM)
    got = loaded(ids[:, half:], memory_state=state).logits
    torch.testing.assert_close(got, expected, **EXACT)
    model.save_memory(tmp_path / "memory")
    other = MemLMForCausalLM.from_base(
        base_model(family), memory=CASES.get(memory, memory), segment_length=SEGMENT
    ).eval()
    randomise(other.memory, seed=9)
    other.load_memory(tmp_path / "memory")
    got = other(ids[:, half:], memory_state=state).logits
    torch.testing.assert_close(got, expected, **EXACT)


@with_none
@torch.no_grad()
def test_bfloat16_stays_close(memory: str, family: str) -> None:
    model, ids = memory_model(family, memory), tokens(2, 2 * SEGMENT + 1)
    # Weights of ordinary size: the law is about rounding, not about a chaotic network.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(0.2)
    exact = model(ids).logits
    single = model.to(torch.float32)(ids)
    assert (single.logits - exact).abs().max() < 1e-3 * exact.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(ids).logits
    half = model.to(torch.bfloat16)(ids)
    for logits in (mixed, half.logits):
        assert logits.isfinite().all()
        assert (logits.double() - exact).abs().max() < 0.1 * exact.abs().max()
    for name, tensor in half.memory_state.tensors.items():
        if memory != "none" and memory_class(memory).accumulates:
            assert tensor.dtype == single.memory_state[name].dtype, name


@pytest.mark.parametrize(("memory", "skips"), SILENCES)
# Writing that is not quite silent shows in the first segment; the long one is what the docs promise.
@pytest.mark.parametrize("segments", [7, pytest.param(1000, marks=pytest.mark.slow)])
@torch.no_grad()
def test_silence_leaves_the_state_as_it_was(
    memory: str, segments: int, skips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not skips:
        monkeypatch.setattr("memlm.backbone.silence.may_skip", lambda memory, x: False)
    config = replace(CASES[memory], **memory_class(memory).silent_with)
    model, ids = memory_model("llama", config), tokens(2, 3 * SEGMENT)
    silent = memory_model("llama", replace(config, write_threshold=float("inf")))
    silent.load_state_dict(model.state_dict())
    silent.config.segment_length = 2
    lasting = [
        name
        for name in model.init_state(1).tensors
        if not set(name.split(".")) & memory_class(memory).transient
    ]
    assert lasting
    before = model(ids).memory_state
    read = tokens(2, 2 * segments, seed=4)
    after = silent(read, memory_state=before, logits_to_keep=None).memory_state
    for name in lasting:
        assert torch.equal(after[name], before[name]), name
    # What is not silent writes, and what is transient depends on the last segment alone.
    loud = model(read[:, :SEGMENT], memory_state=before).memory_state
    assert all(not torch.equal(loud[name], before[name]) for name in lasting)
    last = silent(read[:, -2 * SEGMENT :], memory_state=before, logits_to_keep=None).memory_state
    assert same_state(last, after)


# Their numbers leap where what they divide by comes near zero: of two layers, one has in the first part.
LEAPING = ("armt",)


@memories
# (segments in which a memory fills up, segments of the document, layers). What grows with the document
# grows 6 times after the first, further than the limit; a slower drift shows in the long one.
@pytest.mark.parametrize(
    ("early_segments", "segments", "layers"),
    [
        pytest.param(20, 120, 1, id="short"),
        pytest.param(400, 3125, 2, id="long", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_long_documents_stay_bounded(
    memory: str, early_segments: int, segments: int, layers: int
) -> None:
    # Sizes as users have them: the cases' small chunks would take minutes.
    config, segment = memory_class(memory).Config(), 32
    if hasattr(config, "capacity"):
        # Full within the first part, so that its count no longer grows either.
        config = replace(config, capacity=early_segments * segment // 2)
    # One layer is enough: what a memory tells the layers above it comes back to no state.
    over = {
        "max_position_embeddings": 256,
        "num_hidden_layers": 2 if memory in LEAPING else layers,
    }
    model = memory_model("llama", config, segment, **over).to(torch.float32)
    ids, state = tokens(1, segments * segment), None
    # By then a memory is full; what it gains afterwards would be a drift. A forgetful memory's size is
    # another one at every moment, so the largest of many counts.
    early: dict[str, torch.Tensor] = {}
    for part in ids[:, : early_segments * segment].split(5 * segment, 1):
        state = model(part, memory_state=state, logits_to_keep=None).memory_state
        for name, tensor in state.tensors.items():
            if tensor.numel():
                size = tensor.abs().max()
                early[name] = torch.maximum(early.get(name, size), size)
    late = model(
        ids[:, early_segments * segment :], memory_state=state, logits_to_keep=None
    ).memory_state
    for name, limit in early.items():
        assert late[name].isfinite().all()
        assert late[name].abs().max() < 5 * limit + 1, name
