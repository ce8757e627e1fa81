"""lm-evaluation-harness: streamed requests against one plain forward, and against its own model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast

lm_eval = pytest.importorskip("lm_eval", reason="the harness is an extra: memlm[lm-eval]")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import MODEL_REGISTRY, get_model  # noqa: E402

from memlm import MemLMForCausalLM  # noqa: E402
from memlm.eval import evaluate  # noqa: E402
from memlm.eval.harness import HarnessModel, write_babilong_tasks  # noqa: E402
from memlm.tasks import babilong  # noqa: E402
from memlm.tasks.haystack import Haystack  # noqa: E402
from tests.cases import CASES, SEGMENT, base_model, memory_model  # noqa: E402
from tests.tokenizers import TEXT  # noqa: E402
from tests.tokenizers import tokenizer as make_tokenizer  # noqa: E402

CONTEXTS = ("", "Mary", "John moved", TEXT[:60], TEXT[:61], TEXT, TEXT[:200])
PAIRS = [(c, e) for c in CONTEXTS for e in (" kitchen", " the lazy dog; then" + TEXT[:40], " a")]


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def model_for(tokenizer: PreTrainedTokenizerFast, memory: str = "armt") -> MemLMForCausalLM:
    return memory_model("llama", memory, vocab_size=len(tokenizer))


@torch.no_grad()
def one_forward(
    model: MemLMForCausalLM, context: list[int], continuation: list[int]
) -> tuple[float, bool]:
    """The definition: all tokens in one call."""
    logits = model(input_ids=torch.tensor([context + continuation])).logits[
        0, len(context) - 1 : -1
    ]
    targets = torch.tensor(continuation)
    found = logits.log_softmax(1).gather(1, targets[:, None]).sum()
    return float(found), bool((logits.argmax(1) == targets).all())


@torch.no_grad()
def one_by_one(model: MemLMForCausalLM, context: list[int], count: int) -> list[int]:
    """Greedy decoding by its definition: the whole text anew at every token."""
    ids = list(context)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(context) :]


@pytest.mark.parametrize("kind", ["byte-bpe", "metaspace"])
@pytest.mark.parametrize("memory", ["none", *CASES])
def test_likelihood_is_that_of_one_forward_whatever_the_batches(memory: str, kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    model = model_for(tokenizer, memory)
    lm = HarnessModel(model, tokenizer)
    expected = []
    for context, continuation in PAIRS:
        if context:
            before, after = lm._encode_pair(context, continuation)
        else:
            before, after = [lm.prefix_token_id], lm.tok_encode(continuation, False)
        expected.append(one_forward(model, before, after))
    assert len(lm.tok_encode(TEXT)) > 10 * SEGMENT
    for batch_size in (1, 4, 64):
        lm = HarnessModel(model, tokenizer, batch_size=batch_size)
        found = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
        assert [f[0] for f in found] == pytest.approx([e[0] for e in expected], rel=1e-10)
        assert [f[1] for f in found] == [e[1] for e in expected]
        backwards = lm.loglikelihood(requests("loglikelihood", PAIRS[::-1]), disable_tqdm=True)
        assert [f[0] for f in backwards[::-1]] == pytest.approx([f[0] for f in found], rel=1e-12)


def test_greedy_continuations_are_told_apart() -> None:
    tokenizer = make_tokenizer("byte-bpe")
    model = model_for(tokenizer)
    lm = HarnessModel(model, tokenizer, batch_size=3)
    context = lm.tok_encode(TEXT[:100])
    said = one_by_one(model, context, 9)
    other = [*said[:8], (said[8] + 1) % len(tokenizer)]
    tokens = [(None, context, said), (None, context, other), (None, context, said[:1])]
    found = lm._loglikelihood_tokens([*tokens, (None, context, [])], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False, True, True]
    assert found[3][0] == 0.0


def test_a_context_is_read_once_and_never_more_than_a_segment_at_a_time(monkeypatch) -> None:
    tokenizer = make_tokenizer("byte-bpe")
    model = model_for(tokenizer)
    lm = HarnessModel(model, tokenizer, batch_size=2)
    widths, read = [], []
    run = model.backbone.run_segment

    def spy(ids: torch.Tensor, mask: torch.Tensor | None, *rest: Any) -> Any:
        widths.append(ids.shape[1])
        read.append(ids.numel() if mask is None else int(mask.sum()))
        return run(ids, mask, *rest)

    monkeypatch.setattr(model.backbone, "run_segment", spy)
    endings = [" kitchen", " hallway", " dog", " fox", " line"]
    pairs = [(TEXT * 4, ending) for ending in endings]
    lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert max(widths) <= SEGMENT
    # Once the text, and for every ending the open segment.
    whole = len(lm.tok_encode(TEXT * 4))
    assert whole < sum(read) < whole + len(endings) * 3 * SEGMENT
    widths.clear()
    settings = {"until": [], "max_gen_toks": 2}
    lm.generate_until(requests("generate_until", [(TEXT * 4, settings)]), disable_tqdm=True)
    assert max(widths) <= SEGMENT


def test_rolling_likelihood_starts_from_the_prefix_token() -> None:
    tokenizer = make_tokenizer("byte-bpe")
    model = model_for(tokenizer, "titans-mag")
    lm = HarnessModel(model, tokenizer, batch_size=2)
    documents = [TEXT, TEXT[:50], "", "Mary"]
    assert lm.prefix_token_id == tokenizer.bos_token_id
    found = lm.loglikelihood_rolling(
        requests("loglikelihood_rolling", [(text,) for text in documents]), disable_tqdm=True
    )
    for text, value in zip(documents, found, strict=True):
        ids = lm.tok_encode(text)
        expected = one_forward(model, [tokenizer.bos_token_id], ids)[0] if ids else 0.0
        assert value == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("memory", ["armt", "transformer-xl", "none"])
def test_generation_is_that_of_the_whole_text_anew(memory: str) -> None:
    tokenizer = make_tokenizer("byte-bpe")
    model = model_for(tokenizer, memory)
    eos = tokenizer.eos_token_id
    contexts = [text for text in CONTEXTS if text]
    expected, stopped, stops = [], [], []
    for context in contexts:
        said = one_by_one(model, tokenizer(context).input_ids, 20)
        said = said[: said.index(eos)] if eos in said else said
        text = tokenizer.decode(said, skip_special_tokens=True)
        expected.append(text)
        stops.append(next((letter for letter in reversed(text) if letter.isascii()), text[-1]))
        stopped.append(text.split(stops[-1])[0])
    assert len(set(expected)) > 1 and any(stopped)
    assert all(len(cut) < len(text) for cut, text in zip(stopped, expected, strict=True))
    plain: dict[str, Any] = {
        "until": [],
        "max_gen_toks": 20,
        "do_sample": False,
        "temperature": 0.0,
    }
    for batch_size in (1, 3):
        lm = HarnessModel(model, tokenizer, batch_size=batch_size)
        asked = [(context, plain) for context in contexts]
        assert lm.generate_until(requests("generate_until", asked), disable_tqdm=True) == expected
        cut = [(c, {**plain, "until": [s]}) for c, s in zip(contexts, stops, strict=True)]
        assert lm.generate_until(requests("generate_until", cut), disable_tqdm=True) == stopped


def test_generation_ends_at_stop_strings_ends_and_limits(monkeypatch) -> None:
    tokenizer = make_tokenizer("byte-bpe")
    lm = HarnessModel(model_for(tokenizer), tokenizer, batch_size=4, max_gen_toks=5)
    script = tokenizer("one two\n\nthree").input_ids
    steps = []

    def scripted(input_ids: torch.Tensor, **given: Any) -> Any:
        steps.append(given)
        for _ in range(given["max_new_tokens"]):
            said = input_ids.shape[1] - given["start"]
            token = script[said] if said < len(script) else tokenizer.eos_token_id
            new = torch.full_like(input_ids[:, :1], token)
            input_ids = torch.cat([input_ids, new], dim=1)
            if any(bool(stop(input_ids, None).all()) for stop in given["stopping_criteria"]):
                break
        return input_ids

    def generate(input_ids: torch.Tensor, **given: Any) -> Any:
        return scripted(input_ids, start=input_ids.shape[1], **given)

    monkeypatch.setattr(lm.model, "generate", generate)

    def ask(**given: Any) -> str:
        return lm.generate_until(
            requests("generate_until", [("Mary\n", given)]), disable_tqdm=True
        )[0]

    assert ask(max_gen_toks=99) == "one two\n\nthree"
    # The prompt's own line break does not count, and the stop string is cut off.
    assert ask(until="\n\n", max_new_tokens=99) == "one two"
    assert ask(until=["nothing", "wo"], max_tokens=99) == "one t"
    assert len(tokenizer(ask()).input_ids) == 5
    assert steps[-1]["do_sample"] is False and "temperature" not in steps[-1]
    ask(temperature=0.7, top_p=0.9)
    assert steps[-1]["do_sample"] is True and steps[-1]["temperature"] == 0.7
    with pytest.raises(ValueError, match="temperature=0"):
        ask(do_sample=True, temperature=0.0)
    with pytest.raises(ValueError, match="until"):
        ask(until=[3])


def test_the_harness_s_own_model_agrees_where_everything_fits_one_segment() -> None:
    from lm_eval.models.huggingface import HFLM

    tokenizer = make_tokenizer("byte-bpe")
    base = base_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    theirs = HFLM(pretrained=base, tokenizer=tokenizer, batch_size=2, device="cpu")
    model = MemLMForCausalLM.from_base(base, memory="none", segment_length=512)
    ours = HarnessModel(model, tokenizer, batch_size=3)
    pairs = requests("loglikelihood", PAIRS)
    a, b = theirs.loglikelihood(pairs), ours.loglikelihood(pairs)
    assert [x[0] for x in b] == pytest.approx([x[0] for x in a], rel=1e-10)
    assert [x[1] for x in b] == [x[1] for x in a]
    documents = requests("loglikelihood_rolling", [(TEXT,), (TEXT[:70],)])
    assert ours.loglikelihood_rolling(documents) == pytest.approx(
        theirs.loglikelihood_rolling(documents), rel=1e-10
    )
    asked = [
        (context, {"until": until, "max_gen_toks": 12, "do_sample": False})
        for context in CONTEXTS[1:]
        for until in ([], ["a", "e"], [tokenizer.eos_token])
    ]
    generated = requests("generate_until", asked)
    assert ours.generate_until(generated) == theirs.generate_until(generated)


def test_answers_go_to_the_cache_one_by_one(tmp_path) -> None:
    from lm_eval.api.model import CachingLM

    tokenizer = make_tokenizer("byte-bpe")
    lm = HarnessModel(model_for(tokenizer), tokenizer, batch_size=2)
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    asked = {
        "loglikelihood": PAIRS,
        "loglikelihood_rolling": [(TEXT,), ("Mary",)],
        "generate_until": [(TEXT, {"until": [], "max_gen_toks": 3})],
    }
    first = {kind: getattr(cached, kind)(requests(kind, given)) for kind, given in asked.items()}
    lm.model = None
    for kind, given in asked.items():
        assert [*getattr(cached, kind)(requests(kind, given))] == first[kind]
    cached.dbdict.close()


def test_chat_templates() -> None:
    tokenizer = make_tokenizer("metaspace")
    lm = HarnessModel(model_for(tokenizer), tokenizer)
    template = "{% for m in messages %}{{ bos_token if loop.first }}"
    template += "[{{ m.role }}]{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + template
    )
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = template
        prompt = lm.apply_chat_template(talk)
        assert prompt == "<bos>[system]Be brief.[user]Where?[assistant]"
        assert lm.tok_encode(prompt).count(tokenizer.bos_token_id) == 1
        assert lm.tok_encode("Where?").count(tokenizer.bos_token_id) == 1
        assert lm.chat_template(True) == template
        assert "/" not in lm.tokenizer_name
        tokenizer.chat_template = strict
        assert lm.apply_chat_template(talk) == "<bos>[user]Where?[assistant]"
    finally:
        tokenizer.chat_template = before


@pytest.fixture(scope="module")
def reader(tokenizer: PreTrainedTokenizerFast) -> MemLMForCausalLM:
    """A model of bAbI's tokens whose answers are arbitrary, but differ."""
    return memory_model("llama", "armt", seed=1, vocab_size=len(tokenizer))


@pytest.fixture(scope="module")
def samples(tmp_path_factory, prose_folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    out = tmp_path_factory.mktemp("samples")
    babilong.write(
        out, ["qa1", "qa2"], ["0k", 300], 2, haystack=prose_folder, tokenizer=tokenizer, seed=1
    )
    return out


@pytest.fixture
def run_tasks(reader, tokenizer, tmp_path, monkeypatch) -> Any:
    """Run tasks over a folder of samples offline; the harness's results."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def run(source: Path, tasks: list[str], lengths: list[str | int]) -> Any:
        names = write_babilong_tasks(tmp_path / "tasks", source, tasks, lengths)
        lm = HarnessModel(reader, tokenizer, batch_size=2)
        manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
        return lm_eval.simple_evaluate(
            model=lm, tasks=names, task_manager=manager, bootstrap_iters=0
        )

    return run


def test_the_harness_s_babilong_runs_on_a_local_folder(
    reader, tokenizer, samples: Path, run_tasks
) -> None:
    results = run_tasks(samples, ["qa1"], ["0k", 300])
    assert results["config"]["segment_length"] == SEGMENT
    for length in ("0k", "300"):
        rows = json.loads((samples / "data/qa1" / f"{length}.json").read_text())
        logged = results["samples"][f"memlm_babilong_qa1_{length}"]
        logged = sorted(logged, key=lambda sample: sample["doc_id"])
        assert len(logged) == len(rows) == 2
        for row, sample in zip(rows, logged, strict=True):
            prompt, _ = sample["arguments"][0]
            # Their prompt, taken as it is: instruction, two examples, the document, the question.
            assert row["input"] in prompt and "I will give you context" in prompt
            said = one_by_one(reader, tokenizer(prompt).input_ids, 4)
            assert tokenizer.eos_token_id not in said
            assert sample["resps"][0][0].startswith(tokenizer.decode(said).rstrip("\ufffd"))


def test_the_harness_s_babilong_counts_what_is_right(samples: Path, run_tasks, tmp_path) -> None:
    """Half of the targets are made what the model says, as a random one is never right."""
    name = "memlm_babilong_qa2_0k"
    before = run_tasks(samples, ["qa2"], ["0k"])
    assert before["results"][name]["acc,none"] == 0
    rows = json.loads((samples / "data/qa2/0k.json").read_text())
    said = {s["doc_id"]: s["resps"][0][0] for s in before["samples"][name]}
    words = {i: [w for w in text.split() if w.isprintable()] for i, text in said.items()}
    answered = next(i for i in words if words[i])
    rows[answered]["target"] = max(words[answered], key=len)
    mended = tmp_path / "mended/data/qa2/0k.json"
    mended.parent.mkdir(parents=True)
    mended.write_text(json.dumps(rows))
    after = run_tasks(tmp_path / "mended", ["qa2"], ["0k"])
    assert after["results"][name]["acc,none"] == 0.5
    assert {s["doc_id"]: s["resps"][0][0] for s in after["samples"][name]} == said


def test_our_own_evaluation_gives_the_same_answers(
    reader, tokenizer, prose_folder: Path, tmp_path, monkeypatch
) -> None:
    """The prompts our runner gave the model, as text, through the harness."""
    read: list[torch.Tensor] = []
    prompts: list[str] = []
    plain_read, plain_generate = reader.read, reader.generate

    def spy_read(segments: Any, *rest: Any) -> Any:
        def passing() -> Any:
            for segment in segments:
                read.append(
                    segment.ids[0] if segment.mask is None else segment.ids[0, segment.mask[0]]
                )
                yield segment

        return plain_read(passing(), *rest)

    def spy_generate(*rest: Any, input_ids: torch.Tensor, **given: Any) -> Any:
        ids = torch.cat([*read, input_ids[0, given["attention_mask"][0].bool()]]).tolist()
        read.clear()
        prompts.append(tokenizer.decode(ids))
        assert tokenizer(prompts[-1]).input_ids == ids
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reader, "read", plain_read)
            return plain_generate(*rest, input_ids=input_ids, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "read", spy_read)
        patch.setattr(reader, "generate", spy_generate)
        evaluate(
            reader,
            tokenizer,
            ["qa1"],
            ["0k", 200],
            3,
            haystack=Haystack.open(prose_folder, split="all"),
            out=tmp_path / "ours",
            batch_size=1,
            max_new_tokens=6,
            progress=False,
        )
    lines = (tmp_path / "ours/samples.jsonl").read_text().splitlines()
    ours = [json.loads(line) for line in lines]
    assert len(ours) == len(prompts) == 6 and len({row["output"] for row in ours}) > 1
    lm = HarnessModel(reader, tokenizer, batch_size=4)
    settings = {"until": [], "max_gen_toks": 6, "do_sample": False}
    theirs = lm.generate_until(requests("generate_until", [(p, settings) for p in prompts]))
    assert [answer.strip() for answer in theirs] == [row["output"] for row in ours]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer: PreTrainedTokenizerFast) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    MemLMForCausalLM.from_base(config, memory="armt", segment_length=16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_saved_model_by_the_harness_s_argument_string(folder: Path) -> None:
    assert get_model("memlm") is HarnessModel
    assert "hf" in MODEL_REGISTRY, "the harness's own models are still there"
    lm = HarnessModel.create_from_arg_string(
        f"pretrained={folder},dtype=float64,max_gen_toks=7", {"batch_size": "3", "device": "cpu"}
    )
    assert lm.batch_size == 3 and lm.max_gen_toks == 7 and lm.rank == 0 and lm.world_size == 1
    assert lm.model.dtype == torch.float64 and not lm.model.training
    assert lm.prefix_token_id == lm.eot_token_id
    found = lm.loglikelihood(requests("loglikelihood", [("Mary went to the", " kitchen")]))
    before = lm.tok_encode("Mary went to the")
    after = lm.tok_encode("Mary went to the kitchen")[len(before) :]
    assert found[0][0] == pytest.approx(one_forward(lm.model, before, after)[0], rel=1e-10)
    json.dumps(lm.get_model_info())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrained={model},batch_size=auto", "batch_size='auto'"),
        ("pretrained={model},max_gen_toks=0", "max_gen_toks=0"),
        ("pretrained={model},dtype=float12", "float12"),
        ("pretrained={tmp}", "config.json"),
        ("pretrained=./no/such/model", "does not exist"),
        ("pretrained={plain}", "has no memory"),
    ],
)
def test_bad_arguments_are_refused(folder, tmp_path, arguments: str, message: str) -> None:
    plain = tmp_path / "plain"
    base_model("llama").save_pretrained(plain)
    given = arguments.format(model=folder, tmp=tmp_path, plain=plain)
    with pytest.raises(ValueError, match=message):
        HarnessModel.create_from_arg_string(given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_the_device_the_command_line_asks_for_may_not_be_there(caplog) -> None:
    tokenizer = make_tokenizer("byte-bpe")
    model = model_for(tokenizer)
    assert HarnessModel(model, tokenizer, device="cuda:0").device.type == "cpu"
    assert "no CUDA here" in caplog.text
    with pytest.raises(ValueError, match="device='gpu'"):
        HarnessModel(model, tokenizer, device="gpu")


def test_a_model_object_needs_its_tokenizer_and_one_process(monkeypatch) -> None:
    tokenizer = make_tokenizer("byte-bpe")
    model = model_for(tokenizer)
    with pytest.raises(ValueError, match="tokenizer is missing"):
        HarnessModel(model)
    with pytest.raises(ValueError, match="but the model embeds"):
        HarnessModel(memory_model("llama", "armt"), tokenizer)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        HarnessModel(model, tokenizer)


def test_babilong_tasks_need_their_samples(samples: Path, tmp_path) -> None:
    with pytest.raises(ValueError, match="memlm data babilong"):
        write_babilong_tasks(tmp_path, samples, ["qa1"], ["4k"])


def test_the_command_line(folder: Path, samples: Path, tmp_path) -> None:
    names = write_babilong_tasks(tmp_path / "tasks", samples, ["qa1"], [300])
    command = [sys.executable, "-m", "memlm.eval.harness", "run", "--model", "memlm"]
    command += ["--model_args", f"pretrained={folder}", "--device", "cpu", "--batch_size", "2"]
    command += ["--tasks", *names, "--include_path", str(tmp_path / "tasks"), "--limit", "2"]
    command += ["--output_path", str(tmp_path / "out")]
    environment = {
        **os.environ,
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|memlm_babilong_qa1_300|" in done.stdout
    assert list((tmp_path / "out").rglob("results_*.json"))
