"""The Trainer: gradients by hand, whatever the windowing, padding and accumulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

from memlm.memory import ARMTConfig
from memlm.modeling import MemLMForCausalLM
from memlm.segment import IGNORE
from memlm.state import MemoryState
from memlm.train import Collator, Piece, PieceSource, Question, Stage
from memlm.train.data import shifted
from memlm.train.trainer import MemLMTrainer, count_targets
from memlm.train.trainer.tally import tally_answers
from tests.cases import SEGMENT, memory_model
from tests.train.tiny import (
    Endless,
    answer_piece,
    arguments,
    assert_same,
    gradients,
    ids,
    stream,
    text_piece,
    trainer,
    weights,
)


def step(
    model: MemLMForCausalLM, folder: Path, batch: dict[str, Any], **values: Any
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one training step on `batch`."""
    made = trainer(model, folder, [{"input_ids": ids(4)}], **values)
    model.zero_grad()
    loss = made.training_step(model, dict(batch), count_targets(batch))
    return float(loss), gradients(model)


def parts(length: int, depth: int) -> list[slice]:
    """Windows of `depth` segments over `length` tokens, found from the end backwards."""
    end, found = -(-length // SEGMENT), []
    while end > 0:
        found.insert(0, slice(max(end - depth, 0) * SEGMENT, end * SEGMENT))
        end -= depth
    return found


def by_hand(model: MemLMForCausalLM, batch: dict[str, Any], depth: int) -> dict[str, Tensor]:
    """Gradients from calls of `depth` segments, the last of them whole, the state detached between."""
    model.zero_grad()
    model.train()
    state: MemoryState | None = None
    for at in parts(batch["input_ids"].shape[1], depth):
        out = model(
            input_ids=batch["input_ids"][:, at],
            attention_mask=batch["attention_mask"][:, at],
            shift_labels=batch["shift_labels"][:, at],
            memory_state=state,
            num_items_in_batch=count_targets(batch),
        )
        out.loss.backward()
        state = out.memory_state.detach()
    return gradients(model)


@pytest.fixture(params=["armt", "rmt"])
def model(request: pytest.FixtureRequest) -> MemLMForCausalLM:
    return memory_model("llama", request.param)


@pytest.fixture
def armt() -> MemLMForCausalLM:
    return memory_model("llama", "armt")


def test_a_whole_document_gives_the_plain_backward(model: MemLMForCausalLM, tmp_path: Path) -> None:
    batch = Collator()([text_piece(20, 1), text_piece(20, 2)])
    loss, found = step(model, tmp_path, batch)
    model.zero_grad()
    out = model(batch["input_ids"], shift_labels=batch["shift_labels"])
    out.loss.backward()
    assert loss == pytest.approx(float(out.loss.detach()), rel=1e-6)
    assert_same(found, gradients(model))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_windows_cut_gradients_at_their_borders(
    model: MemLMForCausalLM, tmp_path: Path, depth: int
) -> None:
    batch = Collator()([text_piece(27, 1), text_piece(27, 2)])
    loss, found = step(model, tmp_path, batch, bptt_depth=depth)
    whole, full = step(model, tmp_path, batch)
    assert loss == pytest.approx(whole, rel=1e-6)
    assert_same(found, by_hand(model, batch, depth))
    assert any(not torch.allclose(found[name], full[name]) for name in found)


def test_windows_count_back_from_the_last_target(armt: MemLMForCausalLM, tmp_path: Path) -> None:
    # The answer is in the fifth of seven segments; what the fourth writes must be taught by it.
    long, answer = ids(7 * SEGMENT), 5 * SEGMENT - 2
    targets = np.full(len(long), IGNORE)
    targets[answer : answer + 2] = long[answer + 1 : answer + 3]
    read: list[tuple[int, bool]] = []
    armt.register_forward_pre_hook(
        lambda _, __, given: read.append(
            (given["input_ids"].shape[1] // SEGMENT, torch.is_grad_enabled())
        ),
        with_kwargs=True,
    )
    batch = Collator()([Piece(long, targets)])
    for anchor, windows in (("end", [(1, False), (4, True)]), ("start", [(4, False), (1, True)])):
        read.clear()
        _, found = step(armt, tmp_path, batch, bptt_depth=4, bptt_anchor=anchor)
        assert read == windows
        wrote = [value.abs().max() for name, value in found.items() if "key" in name]
        assert all((value > 1e-9) == (anchor == "end") for value in wrote) and wrote


def test_a_piece_that_is_read_on_is_remembered_to_its_end(
    armt: MemLMForCausalLM, tmp_path: Path
) -> None:
    # Questions behind the second of four segments: two windows to learn from, one to remember.
    piece = Piece(ids(4 * SEGMENT), questions=(Question(1, ids(4, 9), 2),))
    batch = {**Collator()([piece]), "continued": torch.tensor([False])}
    made = trainer(armt, tmp_path, stream(Endless()), bptt_depth=2)
    seen: list[bool] = []
    armt.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    made.training_step(armt, batch, 2)
    assert seen == [True, True, False]
    state = armt(torch.from_numpy(piece.ids[None])).memory_state
    for name, value in made._carried[0].tensors.items():
        torch.testing.assert_close(value, state[name])


def test_windows_without_a_target_get_no_gradient(model: MemLMForCausalLM, tmp_path: Path) -> None:
    batch = Collator()([answer_piece(27, 1), answer_piece(28, 2)])
    seen: list[bool] = []
    model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    _, found = step(model, tmp_path, batch, bptt_depth=1)
    assert seen == [False] * 4 + [True]
    model._forward_hooks.clear()
    assert_same(found, by_hand(model, batch, 1))


def test_nothing_behind_the_last_target_is_run(armt: MemLMForCausalLM, tmp_path: Path) -> None:
    piece = text_piece(30)
    targets = piece.targets.copy()
    targets[8:] = IGNORE
    batch = Collator()([Piece(piece.ids, targets)])
    read: list[int] = []
    armt.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    step(armt, tmp_path, batch, bptt_depth=1)
    assert read == [SEGMENT, SEGMENT]


@pytest.mark.parametrize("depth", [None, 1])
def test_a_ragged_batch_is_its_rows(
    model: MemLMForCausalLM, tmp_path: Path, depth: int | None
) -> None:
    pieces = [text_piece(20, 1), text_piece(7, 2), text_piece(13, 3)]
    _, found = step(model, tmp_path, Collator()(pieces), bptt_depth=depth)
    count = count_targets(Collator()(pieces))
    total = {name: torch.zeros_like(value) for name, value in found.items()}
    for piece in pieces:
        alone = Collator()([piece])
        _, part = step(model, tmp_path, alone, bptt_depth=depth)
        for name, value in part.items():
            total[name] += value * count_targets(alone) / count
    assert_same(found, total)


def test_padding_on_the_left_changes_nothing(armt: MemLMForCausalLM, tmp_path: Path) -> None:
    right = Collator()([text_piece(14, 1), text_piece(9, 2)])
    labels = right["input_ids"].masked_fill(right["attention_mask"] == 0, IGNORE)
    left = {name: right[name].clone() for name in ("input_ids", "attention_mask")}
    left["labels"] = labels.clone()
    for value in left.values():
        value[1] = value[1].roll(5)
    assert count_targets(left) == count_targets(right)
    assert_same(
        step(armt, tmp_path, left, bptt_depth=1)[1], step(armt, tmp_path, right, bptt_depth=1)[1]
    )


def test_documents_packed_into_one_row_are_rows_of_their_own(
    armt: MemLMForCausalLM, tmp_path: Path
) -> None:
    rows = [ids(20, 1), ids(3, 2), ids(9, 3)]
    labels = [torch.tensor([IGNORE, *row[1:].tolist()]) for row in rows]
    flat = {
        "input_ids": torch.tensor([t for row in rows for t in row.tolist()])[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
    }
    expected, apart = step(armt, tmp_path, Collator()([{"input_ids": row} for row in rows]))
    loss, found = step(armt, tmp_path, flat)
    assert abs(loss - expected) < 1e-9
    assert_same(found, apart)
    asked = {**flat, "question_at": torch.tensor([[0, 0]])}
    with pytest.raises(ValueError, match="question_at counts rows of one document"):
        count_targets(asked)


def test_recomputed_activations_give_the_same_gradients(
    model: MemLMForCausalLM, tmp_path: Path
) -> None:
    batch = Collator()([text_piece(20, 1), text_piece(13, 2)])
    plain = step(model, tmp_path, batch)
    model.gradient_checkpointing_enable()
    assert model.gradient_checkpointing
    again = step(model, tmp_path, batch)
    assert again[0] == plain[0]
    assert_same(again[1], plain[1])


def test_a_batch_without_a_target_gives_zeros(armt: MemLMForCausalLM, tmp_path: Path) -> None:
    loss, found = step(armt, tmp_path, Collator()([text_piece(1)]))
    assert loss == 0
    assert all(float(value.abs().max()) == 0 for value in found.values())


def test_a_one_token_document_trains_beside_another(armt: MemLMForCausalLM, tmp_path: Path) -> None:
    _, pair = step(armt, tmp_path, Collator()([text_piece(1), text_piece(15, 1)]))
    _, alone = step(armt, tmp_path, Collator()([text_piece(15, 1)]))
    assert_same(pair, alone)


def test_questions_read_forks_and_leave_no_trace(model: MemLMForCausalLM, tmp_path: Path) -> None:
    asked = Question(0, ids(5, 8), 2), Question(0, ids(4, 9), 2), Question(1, ids(5, 10), 1)
    first = Piece(ids(18, 1), questions=asked[:1])
    second = Piece(ids(18, 2), questions=asked[1:])
    batch = Collator()([first, second])
    assert count_targets(batch) == 5
    loss, found = step(model, tmp_path, batch)

    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for piece in (first, second):
        for question in piece.questions:
            # A fresh document for every question: none may feel that another was asked.
            state = model.init_state(1)
            end = (question.segment + 1) * SEGMENT
            context = torch.from_numpy(piece.ids[None, :end])
            state = model(context, memory_state=state, logits_to_keep=None).memory_state
            tokens = torch.from_numpy(question.ids[None])
            labels = tokens.clone()
            labels[:, : -question.answer] = IGNORE
            out = model(
                tokens, labels=labels, memory_state=state, write=False, num_items_in_batch=5
            )
            total = total + out.loss
    total.backward()
    assert loss == pytest.approx(float(total.detach()), rel=1e-6)
    assert_same(found, gradients(model))


def test_shorter_segments_end_early(armt: MemLMForCausalLM, tmp_path: Path) -> None:
    piece = Piece(ids(8, 1), questions=(Question(1, ids(4, 2), 2),), segment_length=4)
    _, found = step(armt, tmp_path, Collator()([piece]))
    armt.zero_grad()
    state = None
    for at in (0, 4):
        context = torch.from_numpy(piece.ids[None, at : at + 4])
        state = armt(context, memory_state=state).memory_state
    tokens = torch.from_numpy(piece.questions[0].ids[None])
    labels = tokens.clone()
    labels[:, :2] = IGNORE
    armt(tokens, labels=labels, memory_state=state, write=False).loss.backward()
    assert_same(found, gradients(armt))


def test_accumulation_equals_one_batch(tmp_path: Path) -> None:
    # Documents of unlike lengths: micro-batches hold unlike numbers of targets.
    pieces = [text_piece(length, length) for length in (20, 8, 15, 3)]
    results = []
    for rows, slots in ((4, 1), (2, 2), (1, 4)):
        model = memory_model("llama", "armt")
        made = trainer(
            model,
            tmp_path,
            stream(PieceSource(pieces), Stage(max_segments=1)),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=slots,
            # From the end, a window's place would depend on the longest row of its batch.
            bptt_depth=2,
            bptt_anchor="start",
        )
        made.train()
        results.append((made.state.log_history[0]["loss"], weights(model)))
    for loss, found in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert_same(found, results[0][1])


class Watch(TrainerCallback):
    """Count what happens to the optimiser."""

    steps = 0

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1


def test_a_step_a_window_equals_the_loop_by_hand(tmp_path: Path) -> None:
    piece, watch = text_piece(26, 1), Watch()
    model = memory_model("llama", "armt")
    made = trainer(
        model,
        tmp_path,
        stream(PieceSource([piece]), Stage(max_segments=1)),
        [watch],
        per_device_train_batch_size=1,
        bptt_depth=2,
        window_step="window",
        max_steps=3,
    )
    made.train()
    assert watch.steps == 3 == made.state.global_step

    other = memory_model("llama", "armt").train()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    state = None
    for part in parts(26, 2):
        out = other(
            torch.from_numpy(piece.ids[None, part]),
            shift_labels=torch.from_numpy(piece.targets[None, part]),
            memory_state=state,
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        state = out.memory_state.detach()
    assert_same(weights(model), weights(other))


def test_memories_are_carried_into_the_next_batch(tmp_path: Path) -> None:
    model = memory_model("llama", "armt")
    made = trainer(
        model,
        tmp_path,
        stream(Endless(pieces=3), Stage(max_segments=2)),
        max_steps=6,
        learning_rate=0.0,
    )
    seen: list[tuple[Any, ...]] = []
    run = made._run_batch

    def spy(module: Any, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        slot = made._slot
        result = run(module, batch, *args, **kwargs)
        seen.append((batch, made._carried[slot]))
        return result

    made._run_batch = spy  # type: ignore[method-assign]
    made.train()
    assert any(bool(batch["continued"].any()) for batch, _ in seen)
    assert any(not bool(batch["continued"].all()) for batch, _ in seen[1:])
    state = model.init_state(2)
    for batch, carried in seen:
        state = state.where(batch["continued"], model.init_state(2))
        with torch.no_grad():
            state = model(
                batch["input_ids"], batch["attention_mask"], memory_state=state
            ).memory_state
        for name, value in state.tensors.items():
            torch.testing.assert_close(value, carried[name], rtol=1e-9, atol=1e-9)


def test_evaluation_streams_the_loss_and_counts_answers(tmp_path: Path) -> None:
    model = memory_model("llama", "armt")
    held_out = [answer_piece(20, 1), answer_piece(13, 2)]
    made = MemLMTrainer(
        model,
        arguments(tmp_path, track_accuracy=True, per_device_eval_batch_size=2),
        train_dataset=held_out,
        eval_dataset=held_out,
    )
    metrics = made.evaluate()
    batch = Collator()(held_out)
    with torch.no_grad():
        out = model.eval()(
            batch["input_ids"],
            batch["attention_mask"],
            shift_labels=batch["shift_labels"],
            logits_to_keep=0,
        )
    assert metrics["eval_loss"] == pytest.approx(float(out.loss), rel=1e-6)
    guessed, aimed = out.logits.argmax(dim=-1), batch["shift_labels"] != IGNORE
    right = [bool((guessed[r] == batch["shift_labels"][r])[aimed[r]].all()) for r in range(2)]
    assert metrics["eval_accuracy"] == sum(right) / 2
    _, logits, labels = made.prediction_step(model, batch, prediction_loss_only=False)
    assert logits is None and labels is None


def test_an_answer_is_right_when_all_its_tokens_are() -> None:
    labels = torch.full((2, 8), IGNORE)
    labels[0, 1:3] = torch.tensor([5, 6])
    labels[0, 6] = 7
    labels[1, 3:6] = torch.tensor([5, 6, 7])
    # Segments of four tokens: the second row's answer runs over the border.
    right = [torch.tensor([5, 6, 5]), torch.tensor([7, 6, 7])]
    tally = tally_answers(labels, right, 4)
    assert (tally.right, tally.asked) == (3, 3)
    tally = tally_answers(labels, [torch.tensor([5, 9, 5]), torch.tensor([7, 6, 9])], 4)
    assert (tally.right, tally.asked) == (1, 3)


def costly() -> MemLMForCausalLM:
    """A model whose memory asks for something besides the loss."""
    return memory_model("llama", ARMTConfig(num_memory_tokens=3, d_mem=8, write_cost=0.3))


def test_what_memories_ask_for_is_a_loss(tmp_path: Path) -> None:
    model = costly()
    asked = (Question(1, ids(4, 9), 2),)
    for piece in (text_piece(12, 1), Piece(ids(12, 1), questions=asked)):
        loss, found = step(model, tmp_path, Collator()([piece]))
        model.zero_grad()
        model.train()
        tokens = torch.from_numpy(piece.ids[None])
        targets = None if piece.targets is None else torch.from_numpy(piece.targets[None])
        out = model(tokens, shift_labels=targets)
        assert float(out.auxiliary_loss.detach()) > 0
        auxiliary = out.auxiliary_loss
        total = auxiliary if targets is None else out.loss
        for question in piece.questions:
            prompt = torch.from_numpy(question.ids[None])
            labels = prompt.clone()
            labels[:, :2] = IGNORE
            total = (
                total
                + model(prompt, labels=labels, memory_state=out.memory_state, write=False).loss
            )
        total.backward()
        assert loss == pytest.approx(float((total - auxiliary).detach()), rel=1e-6)
        assert_same(found, gradients(model))


@pytest.mark.parametrize("kind", ["text", "questions"])
def test_what_memories_ask_for_is_a_mean_over_accumulated_rows(tmp_path: Path, kind: str) -> None:
    # Documents of unlike lengths: micro-batches hold unlike numbers of segments.
    pieces = [text_piece(length, length) for length in (20, 8, 15, 3)]
    if kind == "questions":
        asked = [Question(len(p.ids) // SEGMENT, ids(4, len(p.ids)), 2) for p in pieces]
        pieces = [Piece(p.ids, questions=(q,)) for p, q in zip(pieces, asked, strict=True)]
    results = []
    for rows, slots in ((4, 1), (2, 2)):
        model = costly()
        made = trainer(
            model,
            tmp_path,
            stream(PieceSource(pieces), Stage(max_segments=1)),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=slots,
        )
        made.train()
        results.append((made.state.log_history[0], weights(model)))
    for logged, found in results[1:]:
        for name in ("loss", "auxiliary_loss"):
            assert logged[name] == pytest.approx(results[0][0][name], rel=1e-5)
        assert_same(found, results[0][1])


def test_windows_share_what_memories_ask_for_by_their_segments(tmp_path: Path) -> None:
    model, piece = costly(), text_piece(27)
    costs = model.train()(torch.from_numpy(piece.ids[None])).auxiliary_loss.detach()
    data = [{"input_ids": piece.ids}]
    made = trainer(model, tmp_path, data, bptt_depth=2, per_device_train_batch_size=1)
    made.train()
    assert made.state.log_history[0]["auxiliary_loss"] == pytest.approx(float(costs), rel=1e-6)


def test_what_memories_ask_for_does_not_grow_with_the_document(tmp_path: Path) -> None:
    logged = []
    for count in (2, 16):
        data = [{"input_ids": ids(count * SEGMENT)}]
        made = trainer(memory_model("llama", "compressive"), tmp_path, data)
        made.train()
        logged.append(made.state.log_history[0]["auxiliary_loss"])
    assert 0.3 < logged[1] / logged[0] < 1.5


def overflowing(memory: Any) -> MemLMForCausalLM:
    """A model that cannot read token 60: in float32, which norms are taken in, it is infinite."""
    model = memory_model("llama", memory)
    with torch.no_grad():
        model.get_input_embeddings().weight[60] = 1e200
    return model


def bad_piece(length: int, seed: int) -> Piece:
    tokens = ids(length, seed).clip(max=59)
    tokens[3 * length // 4] = 60
    return Piece(tokens, shifted(tokens))


@pytest.mark.parametrize("memory", ["armt", "none"])
def test_one_bad_document_is_left_out(tmp_path: Path, memory: str) -> None:
    good = ids(15, 1).clip(max=59)
    pieces = [Piece(good, shifted(good)), bad_piece(20, 2)]
    model = overflowing(memory)
    before = weights(model)
    values = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "bptt_depth": 2}
    made = trainer(model, tmp_path, stream(PieceSource(pieces), Stage(max_segments=1)), **values)
    made.train()
    assert made.state.global_step == 1
    assert made.skipped == made.state.log_history[0]["skipped"] == 1

    # By hand: the good document alone, as its share of all targets. The bad one overflows in its
    # second window; what its first has taught stays.
    other = overflowing(memory).train()
    batch = Collator()([pieces[0]])
    state = None
    for part in parts(15, 2):
        out = other(
            batch["input_ids"][:, part],
            shift_labels=batch["shift_labels"][:, part],
            memory_state=state,
            num_items_in_batch=14 + 19,
        )
        out.loss.backward()
        state = out.memory_state.detach()
    bad = Collator()([pieces[1]])
    at = parts(20, 2)[0]
    out = other(
        bad["input_ids"][:, at], shift_labels=bad["shift_labels"][:, at], num_items_in_batch=33
    )
    out.loss.backward()
    for name, parameter in other.named_parameters():
        before[name] -= 0.1 * parameter.grad
    assert_same(weights(model), before)


def test_a_bad_document_ends_a_run_that_asks_for_it(tmp_path: Path) -> None:
    made = trainer(overflowing("armt"), tmp_path, [{"input_ids": bad_piece(20, 2).ids}])
    made.args.skip_nonfinite = False
    with pytest.raises(FloatingPointError, match="no longer finite"):
        made.train()


def test_weights_that_overflowed_end_a_run(armt: MemLMForCausalLM, tmp_path: Path) -> None:
    with torch.no_grad():
        next(armt.parameters())[5] = torch.nan
    data = [{"input_ids": np.full(12, 5)}]
    with pytest.raises(FloatingPointError, match="no longer finite"):
        trainer(armt, tmp_path, data).train()


def test_an_evaluation_says_that_a_document_overflowed(tmp_path: Path) -> None:
    data = [{"input_ids": bad_piece(20, 2).ids}]
    made = MemLMTrainer(overflowing("armt"), arguments(tmp_path), eval_dataset=data)
    assert np.isnan(made.evaluate()["eval_loss"])


@pytest.mark.parametrize("limit", [1.0, 0.0])
def test_steps_that_overflow_are_left_out(tmp_path: Path, limit: float) -> None:
    model = memory_model("llama", "armt")
    made = trainer(
        model,
        tmp_path,
        stream(Endless(pieces=3), Stage(max_segments=1)),
        max_steps=2,
        max_grad_norm=limit,
    )
    before = weights(model)
    run = made._run_batch

    def spoil(module: Any, *args: Any, **kwargs: Any) -> Any:
        result = run(module, *args, **kwargs)
        next(module.parameters()).grad.view(-1)[0] = float("nan")
        return result

    made._run_batch = spoil  # type: ignore[method-assign]
    made.train()
    assert made.state.global_step == made.skipped == 2
    assert_same(weights(model), before)


def test_a_memory_that_overflowed_starts_afresh(armt: MemLMForCausalLM, tmp_path: Path) -> None:
    made = trainer(armt, tmp_path, stream(Endless()))
    ids_ = torch.from_numpy(ids(12).reshape(2, 6))
    state = armt(ids_).memory_state.detach()
    name = next(iter(state.tensors))
    state[name][1].view(-1)[3] = float("inf")
    mended, fresh = made._restart_broken_rows(state), armt.init_state(2)
    for key, value in mended.tensors.items():
        assert torch.equal(value[0], state[key][0])
        assert torch.equal(value[1], fresh[key][1])


def test_a_question_too_long_for_a_segment_is_refused(
    armt: MemLMForCausalLM, tmp_path: Path
) -> None:
    piece = Piece(ids(6), questions=(Question(0, ids(SEGMENT + 1), 1),))
    with pytest.raises(ValueError, match="segment_length=6"):
        step(armt, tmp_path, Collator()([piece]))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bptt_depth": 0}, "bptt_depth=0"),
        ({"window_step": "segment"}, "'segment'"),
        ({"window_step": "window"}, "give bptt_depth"),
        (
            {"window_step": "window", "bptt_depth": 1, "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps=2",
        ),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        arguments(tmp_path, **values)


def test_deepspeed_is_refused_before_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="deepspeed steps its optimiser at every backward"):
        arguments(tmp_path, deepspeed={"zero_optimization": {"stage": 2}})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="deepspeed"):
        arguments(tmp_path)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (Piece(ids(12, 2), shifted(ids(12, 2))), True),
        (Piece(ids(13, 2), shifted(ids(13, 2))), True),
        (Piece(ids(14, 2), shifted(ids(14, 2))), False),
        (Piece(ids(12, 2), questions=(Question(1, ids(4, 9), 2),)), False),
    ],
)
def test_sharded_processes_must_run_the_same_calls(
    armt: MemLMForCausalLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    other: Piece,
    same: bool,
) -> None:
    made = trainer(armt, tmp_path, [{"input_ids": ids(4)}])
    monkeypatch.setattr(MemLMTrainer, "_sharded", True)
    marks: list[Tensor] = []

    def gather(mark: Tensor) -> Tensor:
        marks.append(mark)
        return torch.cat(marks)

    monkeypatch.setattr(made.accelerator, "gather", gather)
    plans = [made._plan(Collator()([piece]), train=True) for piece in (text_piece(12), other)]
    made._check_in_step(plans[0])
    if same:
        made._check_in_step(plans[1])
    else:
        with pytest.raises(ValueError, match="FSDP every process must run the same calls"):
            made._check_in_step(plans[1])


def test_a_step_a_window_needs_a_stream(armt: MemLMForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="TrainingStream"):
        trainer(armt, tmp_path, [text_piece(5)], window_step="window", bptt_depth=1)


def test_the_usual_flag_recomputes_segments(
    armt: MemLMForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return checkpoint(*args, **kwargs)

    # What transformers hands to the model.
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    data = [{"input_ids": ids(18)}] * 2
    trainer(armt, tmp_path, data, gradient_checkpointing=True, bptt_depth=2).train()
    assert len(calls) == 3


def test_loss_falls(tmp_path: Path) -> None:
    model = memory_model("llama", "armt").float()
    made = trainer(
        model,
        tmp_path,
        [{"input_ids": ids(20, seed)} for seed in range(2)],
        optim="adamw_torch",
        learning_rate=3e-3,
        bptt_depth=2,
        max_steps=30,
    )
    made.train()
    losses = [line["loss"] for line in made.state.log_history if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("peak", [0.1, 0.0])
def test_a_stage_may_rest(tmp_path: Path, peak: float) -> None:
    model = memory_model("llama", "armt")
    stages = [Stage(max_segments=1, steps=2, learning_rate=0.0), Stage(max_segments=1)]
    stages += [Stage(max_segments=1, learning_rate=0.2)]
    seen: list[dict[str, Tensor]] = [weights(model)]

    class Keep(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(weights(model))

    data = stream(Endless(pieces=1), stages[0], stages[2 if peak == 0 else 1])
    made = trainer(model, tmp_path, data, [Keep()], max_steps=3, learning_rate=peak)
    made.train()
    assert_same(seen[2], seen[0])
    assert any((seen[3][name] - seen[2][name]).abs().max() > 1e-6 for name in seen[0])
    assert [line["learning_rate"] for line in made.state.log_history[:3]] == [
        0.0,
        0.0,
        pytest.approx(peak or 0.2),
    ]


def test_a_stage_weighs_what_memories_ask_for(tmp_path: Path) -> None:
    def after(cost: float, weight: float) -> dict[str, torch.Tensor]:
        memory = ARMTConfig(num_memory_tokens=3, d_mem=8, write_cost=cost)
        model = memory_model("llama", memory)
        stage = Stage(max_segments=2, auxiliary_weight=weight)
        trainer(model, tmp_path, stream(Endless(pieces=1), stage), max_steps=2).train()
        return weights(model)

    free, priced = after(0.0, 1.0), after(0.3, 1.0)
    assert_same(after(0.3, 0.0), free)
    assert_same(after(0.3, 2.0), after(0.6, 1.0))
    assert any((free[name] - priced[name]).abs().max() > 1e-4 for name in free)


def test_a_stage_sets_options_of_the_memories(tmp_path: Path) -> None:
    def run(*stages: Stage, steps: int, resume: bool = False, **options: Any) -> MemLMForCausalLM:
        memory = ARMTConfig(num_memory_tokens=3, d_mem=8, **options)
        model = memory_model("llama", memory)
        data = stream(Endless(pieces=1), *stages)
        values = {"save_strategy": "steps", "save_steps": 2}
        trainer(model, tmp_path, data, max_steps=steps, **values).train(
            resume_from_checkpoint=resume
        )
        return model

    priced = {"write_cost": 0.3, "write_threshold": 0.1}
    stages = Stage(max_segments=2, steps=2), Stage(max_segments=2, memory=priced)
    plain, always = run(stages[0], steps=2), run(stages[0], steps=2, **priced)
    first = run(*stages, steps=2)
    assert_same(weights(first), weights(plain))
    assert _apart(plain, always)
    # Resumed in the second stage, it has what that stage sets.
    resumed, whole = run(*stages, steps=5, resume=True), run(*stages, steps=5)
    assert_same(weights(resumed), weights(whole))
    assert whole.config.memory[0]["write_cost"] == 0.3
    assert whole.config.memory[0]["write_threshold"] == 0.1
    without = run(stages[0], Stage(max_segments=2), steps=5)
    assert _apart(whole, without)


def _apart(one: MemLMForCausalLM, other: MemLMForCausalLM) -> bool:
    mine, theirs = weights(one), weights(other)
    return any((mine[name] - theirs[name]).abs().max() > 1e-4 for name in mine)


def test_options_of_a_stage_that_no_memory_has_are_refused_at_once(tmp_path: Path) -> None:
    model = memory_model("llama", "armt")
    stages = Stage(max_segments=1, steps=2), Stage(max_segments=1, memory={"writethreshold": 1})
    with pytest.raises(ValueError, match=r"writethreshold=1.*write_threshold"):
        trainer(model, tmp_path, stream(Endless(pieces=1), *stages), max_steps=3)


def test_a_window_pays_only_where_it_is_said_to() -> None:
    """The flags of a batch reach the model, segment by segment, and the trainer's sum."""
    from memlm.memory import GatedDeltaConfig
    from memlm.train.trainer.plan import cut_batch
    from memlm.train.trainer.window import run_window
    from tests.cases import SEGMENT, memory_model, tokens

    model = memory_model("llama", GatedDeltaConfig(num_heads=2, chunk_length=4, write_cost=0.5))
    model.train()
    ids, counted = tokens(2, 2 * SEGMENT), torch.tensor([[True, False], [False, False]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    paid = {}
    for name, flags in (("all", None), ("one", counted), ("none", torch.zeros_like(counted))):
        segments = cut_batch(
            batch if flags is None else {**batch, "auxiliary_mask": flags}, SEGMENT
        )
        lengths = {"length": SEGMENT, "model_length": SEGMENT}
        state = model.init_state(2)
        result = run_window(model, segments, state, count=ids.numel(), head=None, **lengths)
        paid[name] = result.auxiliary.item()
    first = model(ids[:1, :SEGMENT]).auxiliary_loss.item()
    assert (
        paid["none"] == 0 and paid["one"] == pytest.approx(first, rel=1e-9) and paid["all"] > first
    )
    with pytest.raises(ValueError, match=r"auxiliary_mask has shape \(2, 1\).*2 segments"):
        cut_batch({**batch, "auxiliary_mask": counted[:, :1]}, SEGMENT)


@pytest.mark.parametrize("labels", [[-100] * 9, [7]])
def test_a_step_without_a_target_changes_nothing(
    model: MemLMForCausalLM, tmp_path: Path, labels: list[int]
) -> None:
    """Neither by a division by no targets, where the step is not left out."""
    rows = [{"input_ids": [7] * len(labels), "labels": labels}] * 4
    before = weights(model)
    made = trainer(model, tmp_path, rows, skip_nonfinite=False)
    made.train()
    assert made.state.log_history[0]["loss"] == 0.0
    assert_same(weights(model), before)


def test_metrics_of_predictions_are_refused(armt: MemLMForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"compute_metrics .* get no predictions.*track_accuracy"):
        MemLMTrainer(armt, arguments(tmp_path), compute_metrics=lambda found: {})
