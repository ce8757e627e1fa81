"""What transformers, trainers and collators hand to a model: honoured, or refused by name."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache, Trainer, TrainingArguments

from memlm.memory import ARMTConfig
from memlm.modeling import LogitsNotMade
from tests.cases import SEGMENT, VOCAB, memory_model, tokens

EXACT = {"rtol": 0.0, "atol": 1e-10}
LENGTHS = (2 * SEGMENT + 3, 1, SEGMENT, 4)
ROWS = [tokens(1, n, seed=n)[0] for n in LENGTHS]


def flattened(**which: bool) -> dict[str, torch.Tensor]:
    """The rows as transformers' collator puts them into one."""
    collator = DataCollatorWithFlattening(return_tensors="pt", **which)
    return dict(collator([{"input_ids": row.tolist()} for row in ROWS]))


@pytest.mark.parametrize("memory", ["none", "armt", "rmt", "titans-mac"])
@torch.no_grad()
def test_a_packed_row_is_read_as_its_documents_alone(memory: str) -> None:
    model = memory_model("llama", memory)
    batch = flattened(return_flash_attn_kwargs=True, return_seq_idx=True)
    assert {"position_ids", "cu_seq_lens_k", "max_length_q", "seq_idx"} <= batch.keys()
    out = model(**batch, logits_to_keep=0)
    alone = [model(row[None], labels=row[None], logits_to_keep=0) for row in ROWS]
    expected = torch.cat([one.logits for one in alone], 1)
    torch.testing.assert_close(out.logits, expected, **EXACT)
    counts = torch.tensor(LENGTHS) - 1
    losses = torch.stack([one.loss for one in alone])
    torch.testing.assert_close(out.loss, (losses * counts).sum() / counts.sum(), **EXACT)
    for index, one in enumerate(alone):
        mine = out.memory_state.select([index])
        torch.testing.assert_close(mine.tensors, one.memory_state.tensors, **EXACT)
    # Labels do not reach over a border either, whoever wrote them.
    ids = batch["input_ids"]
    torch.testing.assert_close(
        model(ids, labels=ids, position_ids=batch["position_ids"]).loss, out.loss, **EXACT
    )


@pytest.mark.parametrize("way", ["position_ids", "seq_idx", "cu_seq_lens_q"])
@torch.no_grad()
def test_every_way_to_name_borders_gives_the_same(way: str) -> None:
    model = memory_model("llama", "armt")
    batch = flattened(return_flash_attn_kwargs=True, return_seq_idx=True)
    ids = batch["input_ids"]
    expected = torch.cat([model(row[None]).logits for row in ROWS], 1)
    assert (model(ids).logits - expected).abs().max() > 0.1
    torch.testing.assert_close(model(ids, **{way: batch[way]}).logits, expected, **EXACT)


@torch.no_grad()
def test_packed_rows_may_be_padded_and_several() -> None:
    model = memory_model("llama", "armt")
    ids = torch.zeros(2, 22, dtype=torch.long)
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    for index, pair in enumerate((ROWS[:2], ROWS[2:])):
        joined = torch.cat(pair)
        at = slice(22 - len(joined), None) if index else slice(0, len(joined))
        ids[index, at], mask[index, at] = joined, 1
        positions[index, at] = torch.cat([torch.arange(len(row)) for row in pair])
    out = model(ids, attention_mask=mask, position_ids=positions, labels=ids, logits_to_keep=0)
    expected = torch.cat([model(row[None]).logits[0] for row in ROWS])
    torch.testing.assert_close(out.logits[mask.bool()], expected, **EXACT)
    assert out.memory_state.batch_size == 4
    last = model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=2).logits
    torch.testing.assert_close(last, out.logits[:, -2:], **EXACT)


def test_a_packed_row_has_no_state_to_go_on_from() -> None:
    model, batch = memory_model("llama", "armt"), flattened()
    with pytest.raises(ValueError, match="one document per row"):
        model(**batch, memory_state=model.init_state(1))
    with pytest.raises(ValueError, match="continues one document per row"):
        model.generate(batch["input_ids"], position_ids=batch["position_ids"], max_new_tokens=1)


@torch.no_grad()
def test_positions_that_only_count_are_no_borders() -> None:
    model, ids = memory_model("llama", "armt"), tokens(2, 9)
    for positions in (torch.arange(9), torch.arange(9)[None], torch.arange(5, 14).expand(2, 9)):
        assert torch.equal(model(ids, position_ids=positions).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_hidden_states": True}, "output_hidden_states=True is not for a model with"),
        ({"output_attentions": True}, "output_attentions=True is not"),
        ({"use_cache": True}, "use_cache=True is not.*memory_state"),
        ({"past_key_values": DynamicCache()}, "past_key_values is not.*memory_state"),
        ({"inputs_embeds": torch.ones(1, 5, 32)}, "inputs_embeds is not.*input_ids"),
        ({"token_type_ids": torch.ones(1, 5)}, "token_type_ids is not"),
        ({"labels": torch.zeros(1, 5)}, "labels has dtype torch.float32"),
        ({"logits_to_keep": "all"}, "logits_to_keep='all'"),
        ({"logits_to_keep": torch.tensor([5])}, "within the 5 of input_ids"),
        ({"logits_to_keep": torch.ones(1, 5)}, "within the 5 of input_ids"),
        ({"max_length_q": 5}, "say nothing without cu_seq_lens_q"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 5]), "cu_seq_lens_k": torch.tensor([0, 2, 5])},
            "cu_seq_lens_k differs",
        ),
    ],
)
def test_what_cannot_be_given_is_refused_by_name(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory_model("llama", "none")(torch.ones(1, 5, dtype=torch.long), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"output_hidden_states": True, "return_dict_in_generate": True},
            "output_hidden_states=True",
        ),
        ({"past_key_values": DynamicCache()}, "past_key_values is not"),
        ({"labels": torch.ones(1, 5, dtype=torch.long)}, "no use for labels"),
        ({"write": True}, "no use for write"),
        ({"attention_mask": torch.ones(1, 9)}, "attention_mask has shape"),
    ],
)
def test_what_generation_would_pass_over_is_refused(arguments: dict, message: str) -> None:
    model = memory_model("llama", "none")
    with pytest.raises(ValueError, match=message):
        model.generate(torch.ones(1, 5, dtype=torch.long), max_new_tokens=1, **arguments)


@torch.no_grad()
def test_what_trainers_and_tokenizers_pass_by_themselves_is_taken() -> None:
    model, ids = memory_model("llama", "none"), tokens(1, 5)
    asks_nothing = {
        "use_cache": False,
        "past_key_values": None,
        "output_attentions": False,
        "output_hidden_states": None,
        "token_type_ids": torch.zeros_like(ids),
    }
    assert torch.equal(model(ids, **asks_nothing).logits, model(ids).logits)


@torch.no_grad()
def test_labels_of_any_integer_type() -> None:
    model, ids = memory_model("llama", "armt"), tokens(2, 9)
    expected = model(ids, labels=ids).loss
    assert torch.equal(model(ids.int(), labels=ids.int()).loss, expected)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_tensor_of_positions_to_keep(padded: bool) -> None:
    model, ids = memory_model("llama", "armt"), tokens(2, 3 * SEGMENT)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = mask[1, -5:] = 0
    full = model(ids, attention_mask=mask).logits
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    some = torch.tensor([17, 0, 5, 6, 5, -2])
    for keep, expected in ((some, full[:, some]), (some[:1], full[:, -1:])):
        out = model(ids, attention_mask=mask, labels=labels, logits_to_keep=keep)
        torch.testing.assert_close(out.logits, expected, **EXACT)
        torch.testing.assert_close(out.loss, loss, **EXACT)
    chosen = torch.arange(3 * SEGMENT) % 3 == 0
    kept = model(ids, attention_mask=mask, logits_to_keep=chosen).logits
    torch.testing.assert_close(kept, full[:, chosen], **EXACT)


@pytest.mark.parametrize(
    ("length", "arguments", "positions"),
    [
        # What is asked for alone.
        (3 * SEGMENT, {"logits_to_keep": None}, 6),
        (3 * SEGMENT, {}, 6),
        # Beside the loss, each position once.
        (SEGMENT, {}, SEGMENT),
        (3 * SEGMENT, {"logits_to_keep": 0}, 3 * SEGMENT),
        (3 * SEGMENT, {"logits_to_keep": 2}, 2 + 5),
        (3 * SEGMENT, {"logits_to_keep": torch.tensor([0, 1])}, 2 + 6),
    ],
)
def test_the_head_runs_once_where_it_is_needed(
    length: int, arguments: dict, positions: int
) -> None:
    model, ids = memory_model("llama", "armt"), tokens(1, length)
    labels = ids.clone()
    # Six targets, the last of them for the next to last token.
    labels[:, : max(1, length - 6)] = -100
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, given, out: seen.append(out.shape[:-1].numel())
    )
    loss = model(ids, labels=labels, **arguments).loss
    assert sum(seen) == positions
    plain = torch.nn.functional.cross_entropy(
        model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    torch.testing.assert_close(loss, plain)
    gradient, expected = (
        torch.autograd.grad(x, model.base.lm_head.weight)[0] for x in (loss, plain)
    )
    torch.testing.assert_close(gradient, expected)


def test_logits_nobody_asked_for_say_how_to_ask() -> None:
    model, ids = memory_model("llama", "armt"), tokens(1, SEGMENT + 1)
    out = pickle.loads(pickle.dumps(model(ids, labels=ids)))
    assert isinstance(out.logits, LogitsNotMade) and not out.logits
    for use in (lambda x: x.argmax(-1), lambda x: x[..., :-1, :], list, torch.tensor):
        with pytest.raises((ValueError, AttributeError), match="logits_with_labels=True"):
            use(out.logits)
    model.config.logits_with_labels = True
    assert torch.equal(model(ids, labels=ids).logits, model(ids).logits)
    assert model(ids[:, :-1]).logits.shape == (1, SEGMENT, VOCAB)


class Documents(torch.utils.data.Dataset):
    """Two documents of more than a segment, as lists."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = tokens(1, 2 * SEGMENT + 1, seed=index)[0].tolist()
        return {"input_ids": ids, "labels": ids}


def test_a_plain_trainer_computes_metrics_or_says_what_to_set(tmp_path) -> None:
    model = memory_model("llama", "armt").float()
    seen = []
    trainer = Trainer(
        model,
        TrainingArguments(tmp_path, per_device_eval_batch_size=1, use_cpu=True),
        eval_dataset=Documents(),
        compute_metrics=lambda found: seen.append(found.predictions) or {},
    )
    with pytest.raises(TypeError, match="logits_with_labels=True"):
        trainer.evaluate()
    model.config.logits_with_labels = True
    metrics = trainer.evaluate()
    ids = torch.tensor([Documents()[i]["input_ids"] for i in range(2)])
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(torch.tensor(seen[0]), expected, rtol=0, atol=1e-4)
    assert metrics["eval_loss"] > 0


@torch.no_grad()
def test_the_body_without_its_head_has_the_memories() -> None:
    model, batch = memory_model("llama", "armt"), flattened()
    hidden = model.base_model(batch["input_ids"], position_ids=batch["position_ids"])
    expected = torch.cat([model(row[None]).logits for row in ROWS], 1)
    made = model.get_output_embeddings()(hidden.last_hidden_state)
    torch.testing.assert_close(made, expected, **EXACT)


def sft_step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> SimpleNamespace:
    """The loss of trl's SFTTrainer (1.16): the body's hidden states times the head's weights."""
    labels = batch.pop("labels")[:, 1:]
    hidden = model.base_model(**batch, use_cache=False).last_hidden_state[:, :-1]
    logits = hidden @ model.get_output_embeddings().weight.T
    mask = labels != -100
    loss = torch.nn.functional.cross_entropy(logits[mask], labels[mask])
    return SimpleNamespace(loss=loss, logits=logits)


def test_the_step_of_sft_trainer_is_the_models_own() -> None:
    model = memory_model("llama", "armt").train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for loss in (sft_step(model, flattened()).loss, model(**flattened()).loss):
        found.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    # What the loss alone does not reach gets zeros from the model, and nothing from the trainer.
    for mine, own in zip(*found, strict=True):
        torch.testing.assert_close(own * 0 if mine is None else mine, own, **EXACT)


def test_a_loss_of_ones_own_leaves_out_no_cost_in_silence() -> None:
    model = memory_model("llama", ARMTConfig(num_memory_tokens=3, d_mem=8, write_cost=0.1)).train()
    with pytest.raises(ValueError, match=r"write_cost.*MemLMTrainer"):
        sft_step(model, flattened())


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_step_of_trl(tmp_path, padding_free: bool) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from tests.tokenizers import tokenizer

    model = memory_model("llama", "armt", vocab_size=320).float()
    # For versions that read `outputs.logits` (1.4); later ones (1.16) call the body, whatever stands here.
    model.config.logits_with_labels = True
    before = model.memory.attached["armt"].tokens.detach().clone()
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(
            output_dir=tmp_path,
            per_device_train_batch_size=2,
            max_steps=1,
            learning_rate=0.1,
            logging_steps=1,
            padding_free=padding_free,
            max_length=None,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"text": ["hello there, all of you", "again and again"]}),
        processing_class=tokenizer("byte-bpe"),
    )
    with torch.no_grad():
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
        assert batch["input_ids"].shape[1] > SEGMENT and ("position_ids" in batch) == padding_free
        expected = float(model.train()(**batch).loss)
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"] - expected) < 1e-3
    assert not torch.equal(before, model.memory.attached["armt"].tokens)
