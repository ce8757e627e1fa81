"""The plan before the run: numbers that can be counted otherwise, and a trial that leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from memlm.cli import main
from memlm.train import train
from memlm.train.outlook import Outlook, Trial, look_ahead
from memlm.train.run import prepare
from tests.data.test_rows import ROWS, TURNS, write
from tests.tokenizers import tokenizer
from tests.train.test_bases import FAST, LORA, own, recipe  # noqa: F401
from tests.train.test_rows import asked
from tests.train.tiny import weights


def test_the_plan_is_what_can_be_counted(own: Path, tmp_path: Path) -> None:  # noqa: F811
    rates = ["training.gradient_accumulation_steps=2", "training.num_train_epochs=5"]
    run = prepare(recipe(own, f"model.lora={json.dumps(LORA)}", *rates), tmp_path / "x", None)
    outlook = look_ahead(run.trainer, run.source, run.curriculum, run.survey)
    model = run.trainer.model
    hidden, inner, layers = 32, model.base.config.intermediate_size, len(model.backbone.layers)
    config = model.base.config
    kv = config.num_key_value_heads * (hidden // config.num_attention_heads)
    widths = [(hidden, hidden)] * 2 + [(hidden, kv)] * 2 + [(hidden, inner)] * 3
    assert config.hidden_size == hidden
    assert outlook.trained["LoRA"] == layers * sum(2 * (a + b) for a, b in widths)
    assert outlook.trained["memory"] == sum(p.numel() for p in model.memory.parameters())
    assert outlook.trained["base"] == 0
    total = sum(p.numel() for p in model.parameters())
    assert outlook.frozen == total - outlook.trained["LoRA"] - outlook.trained["memory"]
    # Four documents, two per step, five times.
    assert (outlook.steps, outlook.rows_per_step) == (10, 2)
    assert outlook.state_bytes == model.init_state(1).nbytes
    tok = tokenizer("byte-bpe")
    lengths = [len(tok(asked(n)["document"]).input_ids) for n in range(4)]
    assert outlook.survey is not None and sorted(outlook.survey.lengths) == sorted(lengths)
    assert outlook.trial is not None
    # All documents are about as long as each other.
    assert 2 * min(lengths) <= outlook.trial.tokens <= 2 * max(lengths)
    assert outlook.optimizer_bytes == 8 * sum(outlook.trained.values())
    assert outlook.peak_bytes is not None and outlook.peak_bytes > outlook.optimizer_bytes
    assert outlook.seconds == outlook.trial.seconds * 10
    said = "\n".join(outlook.lines())
    for word in (
        "of the LoRA",
        "4 rows, 8 questions",
        "each 5 times",
        "steps: 10 of 2 rows",
        "s per step",
    ):
        assert word in said, said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0123, "0.012 s per step, 1.2 s in all"), (3.66, "3.7 s per step, 6 min in all"),
     (112.0, "112 s per step, 3.1 h in all"), (300.0, "5 min per step, 8.3 h in all")],
)  # fmt: skip
def test_the_time_is_told_in_words_of_its_size(seconds: float, said: str) -> None:
    outlook = Outlook(
        trained={"memory": 1}, frozen=0, segment_length=4, state_bytes=4, steps=100, rows_per_step=1,
        bptt_depth=None, stages=(), survey=None, pieces=0, optimizer_bytes=8, device="cpu",
        trial=Trial(tokens=4, seconds=seconds, peak=100),
    )  # fmt: skip
    assert said in list(outlook.lines())[-1]


def test_a_trial_leaves_nothing_behind(own: Path, tmp_path: Path) -> None:  # noqa: F811
    dropping = {**LORA, "lora_dropout": 0.5}
    made = recipe(own, "training.max_steps=2", f"model.lora={json.dumps(dropping)}")
    run = prepare(made, tmp_path / "tried", None)
    before, random = weights(run.trainer.model), torch.get_rng_state()
    look_ahead(run.trainer, run.source, run.curriculum, run.survey)
    assert torch.equal(torch.get_rng_state(), random)
    after = weights(run.trainer.model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.grad is None for p in run.trainer.model.parameters())
    said: list[str] = []
    train(made, tmp_path / "a", progress=False, on_outlook=lambda o: said.extend(o.lines()))
    train(made, tmp_path / "b", progress=False)
    assert said
    files = [tmp_path / name / "model.safetensors" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    logs = [
        [
            json.loads(line)
            for line in (tmp_path / name / "train_log.jsonl").read_text().splitlines()
        ]
        for name in "ab"
    ]
    timed = ("time", "tokens_per_second", "train_runtime")
    kept = [
        [
            {k: v for k, v in line.items() if k not in timed and "per_second" not in k}
            for line in log
        ]
        for log in logs
    ]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("form", ROWS)
def test_the_command_trains_on_every_format_without_a_recipe(
    form: str,
    own: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = own / "base"
    if form == "messages":
        (tmp_path / "chat.jinja").write_text(
            "{% for m in messages %}{{ m.role }}; {{ m.content }}<eos>{% endfor %}"
            "{% if add_generation_prompt %}assistant; {% endif %}"
        )
    values, _ = ROWS[form]
    data = write(tmp_path, values, values)
    arguments = ["train", "--base", str(base), "--memory", "rmt", "--data", str(data)]
    arguments += ["training.max_steps=2", "model.segment_length=32", *FAST]
    if form == "messages":
        arguments.append(f"tokenizer.chat_template={tmp_path / 'chat.jinja'}")
    assert main([*arguments, "--dry-run", "--out", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run").exists()
    plan = capsys.readouterr().out
    assert "trained: " in plan and "2 rows" in plan and "s per step" in plan
    if form in ("messages", "documents"):
        # Training itself is the same for all of them from here on.
        assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
        assert plan.splitlines()[0] in capsys.readouterr().out
        saved = (tmp_path / "run" / "recipe.yaml").read_text()
        assert f"path: {data}" in saved and "memory: rmt" in saved


@pytest.mark.parametrize(
    ("rows", "overrides", "words"),
    [
        ([], [], r"my\.jsonl' is empty"),
        (['{"text": '], [], "line 1 is not JSON"),
        ([{"messages": TURNS}], [], "messages need a chat template"),
        ([asked(1)], ["model.segment_length=8"], "more than a segment of 8"),
        ([asked(1)], ["model.lora={target_modules: [nope]}"], "names 'nope'"),
        ([asked(1)], ["model.quantization=3bit"], "'3bit' is unknown"),
        ([asked(1)], ["data.path=hub:my/set", "data.skip_empty=true"], "skip_empty: is for"),
        ([asked(1)], ["model.lora={}", "model.freeze_base=true"], "model.lora trains in the base"),
    ],
)
def test_bad_input_is_refused_in_a_sentence_before_training(
    rows: list,
    overrides: list[str],
    words: str,
    own: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    data = write(tmp_path, *rows)
    if not rows:
        data.write_text("")
    out = ["--out", str(tmp_path / "run")]
    arguments = ["train", "--base", str(own / "base"), "--data", str(data), *FAST, *out]
    arguments += ["model.segment_length=32", *overrides]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert re.search(words, said), said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "training.max_steps=1"]) == 2
    assert "a RECIPE, or --base and --data" in capsys.readouterr().err
    assert main(["train", "--base", "gpt2"]) == 2
    assert "give --data" in capsys.readouterr().err
