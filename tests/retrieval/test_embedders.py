"""Embedders: rows of their own, the same in every process, and near where texts are alike."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from memlm.retrieval import HashingEmbedder, ModelEmbedder, SentenceTransformerEmbedder
from memlm.retrieval.embedders import hashing
from tests.tokenizers import tokenizer

TEXTS = [
    "Mary went to the kitchen.",
    "John moved to the hallway, didn't he?",
    "The quick brown fox jumps over the lazy dog",
    "naïve café 日本語",
    "Mary",
    "It's 42 degrees. " * 12,
]


def fitted() -> HashingEmbedder:
    return HashingEmbedder.fit(TEXTS, 256, 4)


# Hashing


@pytest.mark.parametrize("make", [HashingEmbedder, fitted])
def test_rows_are_of_length_one_and_do_not_depend_on_each_other(make) -> None:
    embedder = make()
    many = TEXTS + [f"word{n} and word{n * n}" for n in range(300)]
    vectors = embedder.encode(many)
    assert vectors.shape == (len(many), embedder.dim)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    other = make()
    # In another order, and one by one in an embedder that knows other words.
    assert np.array_equal(other.encode(many[::-1])[::-1], vectors)
    fresh = make()
    for text, vector in list(zip(many, vectors, strict=True))[:20]:
        assert np.array_equal(fresh.encode([text])[0], vector)
    for method in ("encode_document", "encode_query", "encode_queries"):
        assert np.array_equal(getattr(embedder, method)(many), vectors)


def test_the_order_of_the_words_does_not_show() -> None:
    # In one dimension words cancel each other; were sums inexact, what is left would be of length 1.
    signs = HashingEmbedder(1, 1).encode([f"w{n}" for n in range(40)])[:, 0]
    plus, minus = np.flatnonzero(signs > 0)[:9], np.flatnonzero(signs < 0)[:9]
    words = [
        f"w{n}" for some in (plus, minus) for count, n in enumerate(some, 1) for _ in range(count)
    ]
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert not HashingEmbedder(1, 1).encode([" ".join(rng.permutation(words))]).any()


@pytest.mark.parametrize("texts", [[], [""], ["", " .,! \n"]])
def test_nothing_gives_zeros(texts) -> None:
    vectors = HashingEmbedder(32).encode(texts)
    assert vectors.shape == (len(texts), 32)
    assert vectors.dtype == np.float32
    assert not vectors.any()


def test_known_values_hold_in_every_process_and_version() -> None:
    # Written down once: an index on disk relies on them.
    (vector,) = HashingEmbedder(8, 3).encode(["Mary went to the café"])
    np.testing.assert_allclose(vector, KNOWN, atol=1e-4)
    code = (
        "from memlm.retrieval.embedders import HashingEmbedder as H;"
        "import hashlib;"
        "e = H(512); f = H.fit(['Mary went', 'Mary caf\\xe9'], 512);"
        "v = [x.encode(['Mary went to the caf\\xe9', 'x']) for x in (e, f)];"
        "print(e.fingerprint, f.fingerprint, *(hashlib.md5(x.tobytes()).hexdigest() for x in v))"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1] != ""


KNOWN = [-0.4992, -0.025, -0.4992, 0.025, 0.4743, 0.025, -0.5242, 0.0]


def test_counts_are_damped_and_function_words_weigh_little() -> None:
    embedder = HashingEmbedder(4096)
    once, twice, other = embedder.encode(["apple", "apple apple pear", "pear"])
    damped = 1 + math.log(2)
    np.testing.assert_allclose(
        [once @ twice, other @ twice],
        np.array([damped, 1]) / math.hypot(damped, 1),
        atol=0.05,
    )
    question, fact, noise = embedder.encode(
        ["Where is Mary?", "Mary went there with a bag", "where is the one who is there"]
    )
    assert question @ fact > 0.4
    assert abs(question @ noise) < 0.15


def test_case_punctuation_and_width_do_not_matter() -> None:
    one, two, three = HashingEmbedder().encode(
        ["CAFÉ, Mary's", "cafe\u0301 mary s", "ｃａｆé MARY s!"]
    )
    np.testing.assert_allclose([one @ two, one @ three], 1, atol=1e-6)
    whole, part = HashingEmbedder().encode(["私は台所へ行った", "台所"])
    assert whole @ part > 0.3


def needle(embedder: HashingEmbedder) -> float:
    """How often the chunk that answers a question comes first, of 300 chunks."""
    rng = np.random.default_rng(0)
    names = [f"{a}{b}" for a in ("Ma", "Jo", "Be", "Tu", "Ki") for b in ("rona", "lin", "mo", "du")]
    common = [f"w{n}" for n in range(3000)]
    chunks = []
    for number in range(300):
        words = [common[min(int(rng.zipf(1.3)), 2999)] for _ in range(70)] + ["the", "is"] * 5
        if number < len(names):
            at = int(rng.integers(len(words)))
            words[at:at] = f"{names[number]} went to the kitchen.".split()
        chunks.append(" ".join(words))
    scores = (
        embedder.encode_queries([f"Where is {name}?" for name in names]) @ embedder.encode(chunks).T
    )
    return float((scores.argmax(axis=1) == np.arange(len(names))).mean())


def test_facts_are_found_among_chunks_because_a_word_has_several_hashes() -> None:
    assert needle(HashingEmbedder()) == 1
    assert needle(HashingEmbedder(hashes=1)) < 0.9


def test_fit_weighs_words_by_their_rarity() -> None:
    texts = [f"der Satz Nummer{n} und der Rest" for n in range(100)]
    plain, learned = HashingEmbedder(), HashingEmbedder.fit(iter(texts))
    assert learned.fingerprint != plain.fingerprint
    assert learned.fingerprint != HashingEmbedder.fit(texts[:50]).fingerprint
    assert learned.fingerprint == HashingEmbedder.fit(texts).fingerprint
    pair = ["der Satz Nummer7", "der Satz Nummer8"]
    a, b = plain.encode(pair)
    c, d = learned.encode(pair)
    assert a @ b > 0.6
    assert abs(c @ d) < 0.1
    # An idf of its own formula: a word in all of n texts, one in one.
    every, one = math.log1p(0.5 / 100.5), math.log1p(99.5 / 1.5)
    e, f = learned.encode(["der Nummer7", "Nummer7"])
    assert e @ f == pytest.approx(one / math.hypot(one, every), abs=0.02)


def test_words_that_share_a_count_are_never_worth_less_than_nothing(monkeypatch) -> None:
    monkeypatch.setattr(hashing, "_SLOTS", 1)
    embedder = HashingEmbedder.fit(["one two three", "four five"], 64)
    assert embedder._idf is not None and (embedder._idf > 0).all()


@pytest.mark.parametrize("make", [lambda: HashingEmbedder(128, 3), fitted])
def test_saved_and_loaded_it_is_the_same(make, tmp_path) -> None:
    embedder = make()
    path = tmp_path / "words"
    embedder.save(path)
    assert os.listdir(tmp_path) == ["words"]
    loaded = HashingEmbedder.load(path)
    assert loaded.fingerprint == embedder.fingerprint
    assert np.array_equal(loaded.encode(TEXTS), embedder.encode(TEXTS))


def test_fingerprints_tell_settings_apart(monkeypatch) -> None:
    prints = {HashingEmbedder(d, h).fingerprint for d in (64, 128) for h in (1, 2)}
    assert len(prints) == 4
    assert HashingEmbedder().fingerprint == HashingEmbedder().fingerprint
    before = HashingEmbedder().fingerprint
    monkeypatch.setattr(hashing, "FUNCTION_WORDS", hashing.FUNCTION_WORDS | {"mary"})
    assert HashingEmbedder().fingerprint != before


def test_a_full_memory_of_words_changes_nothing(monkeypatch) -> None:
    texts = [f"word{n} other{n % 7} more{n % 50}" for n in range(1000)]
    expected = HashingEmbedder(256).encode(texts)
    monkeypatch.setattr(hashing, "_WORDS_KNOWN", 100)
    embedder = HashingEmbedder(256)
    assert np.array_equal(embedder.encode(texts), expected)
    assert len(embedder._words) < 400
    assert len(embedder._slots) < 4000


def test_bad_input_is_refused_by_name(tmp_path) -> None:
    for settings, message in (
        ({"dim": 0}, "dim=0"),
        ({"dim": True}, "dim=True"),
        ({"hashes": 0}, "hashes=0"),
        ({"hashes": 16}, "hashes=16"),
    ):
        with pytest.raises(ValueError, match=message):
            HashingEmbedder(**settings)
    embedder = HashingEmbedder(8)
    with pytest.raises(ValueError, match="one string"):
        embedder.encode("text")
    with pytest.raises(ValueError, match=r"texts\[1\] is a NoneType"):
        embedder.encode(["text", None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="one string"):
        HashingEmbedder.fit("text")
    with pytest.raises(ValueError, match="texts is empty"):
        HashingEmbedder.fit([])
    with pytest.raises(FileNotFoundError):
        HashingEmbedder.load(tmp_path / "nowhere")
    fitted().save(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for name, content in (("text", b"no archive"), ("cut", whole[:-100]), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*is damaged"):
            HashingEmbedder.load(tmp_path / name)
    with (tmp_path / "other").open("wb") as file:
        np.savez(file, settings=np.frombuffer(b'{"version": 99, "dim": 8, "hashes": 1}', np.uint8))
    with pytest.raises(ValueError, match="version 99"):
        HashingEmbedder.load(tmp_path / "other")
    with (tmp_path / "short").open("wb") as file:
        settings = np.frombuffer(b'{"version": 1, "dim": 8, "hashes": 1}', np.uint8)
        np.savez(file, settings=settings, idf=np.ones(3, np.float32))
    with pytest.raises(ValueError, match="damaged word weights"):
        HashingEmbedder.load(tmp_path / "short")


# Models

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 320,
}


def model(kind: str) -> Any:
    import transformers as t

    torch.manual_seed(0)
    if kind == "bert":
        return t.BertModel(t.BertConfig(**SMALL, max_position_embeddings=64)).train()
    if kind == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**SMALL, max_position_embeddings=64)).train()
    if kind == "t5":
        config = t.T5Config(
            vocab_size=320,
            d_model=32,
            d_kv=16,
            d_ff=48,
            num_layers=3,
            num_heads=2,
            dropout_rate=0.3,
        )
        return t.T5ForConditionalGeneration(config).train()
    return t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=320, n_embd=32, n_layer=3, n_head=2, n_positions=64)
    ).train()


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("layer", [-1, "middle"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5"])
def test_a_row_is_that_of_its_text_alone_and_of_the_model(
    kind, layer, pooling, monkeypatch
) -> None:
    live, tokens = model(kind), tokenizer("byte-bpe")
    monkeypatch.setattr(tokens, "padding_side", "left")
    embedder = ModelEmbedder(live, tokens, layer, pooling, batch_size=4, max_length=40)
    vectors = embedder.encode([*TEXTS, ""])
    assert vectors.shape == (len(TEXTS) + 1, 32)
    assert vectors.dtype == np.float32
    assert not vectors[-1].any()
    inner = live.get_encoder() if kind == "t5" else live
    for text, vector in zip(TEXTS, vectors, strict=False):
        np.testing.assert_allclose(embedder.encode([text])[0], vector, atol=1e-5)
        ids = tokens(text, add_special_tokens=False).input_ids[:40]
        with torch.no_grad():
            out = inner.eval()(input_ids=torch.tensor([ids]), output_hidden_states=True)
        inner.train()
        states = out.hidden_states[2 if layer == "middle" else -1][0]
        expected = states.mean(0) if pooling == "mean" else states[-1]
        np.testing.assert_allclose(vector, (expected / expected.norm()).numpy(), atol=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    live = model("gpt2")
    live.transformer.h[1].eval()
    modes = [module.training for module in live.modules()]
    embedder = ModelEmbedder(live, tokenizer("byte-bpe"))
    first = embedder.encode(TEXTS)
    assert np.array_equal(embedder.encode(TEXTS), first)  # no dropout
    assert [module.training for module in live.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in live.parameters())

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken")

    live.transformer.forward = broken
    with pytest.raises(RuntimeError, match="broken"):
        embedder.encode(TEXTS)
    assert [module.training for module in live.modules()] == modes


@pytest.mark.parametrize("memory", ["armt", "infini", "titans-mag"])
def test_a_model_with_a_memory_stands_for_its_base(memory) -> None:
    from memlm import MemLMForCausalLM

    expected = ModelEmbedder(model("llama"), tokenizer("byte-bpe"))
    wrapped = MemLMForCausalLM.from_base(model("llama"), memory=memory, segment_length=8)
    embedder = ModelEmbedder(wrapped, tokenizer("byte-bpe"))
    np.testing.assert_allclose(embedder.encode(TEXTS), expected.encode(TEXTS), atol=1e-6)
    assert embedder.fingerprint == expected.fingerprint


def test_half_precision_gives_float32() -> None:
    embedder = ModelEmbedder(model("gpt2").to(torch.bfloat16), tokenizer("byte-bpe"))
    vectors = embedder.encode(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_centred_vectors_spread() -> None:
    plain = ModelEmbedder(model("gpt2"), tokenizer("byte-bpe"), batch_size=1)
    texts = [f"{text} {n}" for n, text in enumerate(TEXTS * 5)]
    centred = plain.fit(iter(texts))
    raw, _ = plain._pooled_states(texts)
    np.testing.assert_allclose(centred.center, raw.mean(0), atol=1e-5)
    shifted = raw - raw.mean(0)
    shifted /= np.linalg.norm(shifted, axis=1, keepdims=True)
    np.testing.assert_allclose(centred.encode(texts), shifted, atol=1e-4)
    assert plain.center is None
    assert centred.fingerprint != plain.fingerprint
    assert not centred.encode([""]).any()
    with pytest.raises(ValueError, match="texts is empty"):
        plain.fit([])


def test_model_fingerprints_hold_on_disk_and_change_with_what_matters(tmp_path) -> None:
    tokens = tokenizer("byte-bpe")
    embedder = ModelEmbedder(model("bert"), tokens)
    model("bert").save_pretrained(tmp_path)
    tokens.save_pretrained(tmp_path)
    loaded = ModelEmbedder.from_pretrained(tmp_path)
    assert loaded.fingerprint == embedder.fingerprint
    np.testing.assert_allclose(loaded.encode(TEXTS), embedder.encode(TEXTS), atol=1e-6)
    live = model("bert")
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.mul_(1.001)
    others = [
        ModelEmbedder(live, tokens),
        ModelEmbedder(model("bert"), tokens, layer=1),
        ModelEmbedder(model("bert"), tokens, pooling="last"),
        ModelEmbedder(model("bert"), tokens, max_length=8),
        ModelEmbedder(model("bert"), tokens, center=np.ones(32, np.float32)),
        ModelEmbedder(model("bert"), tokenizer("words")),
        ModelEmbedder(model("bert").to(torch.bfloat16), tokens),
        ModelEmbedder(model("gpt2"), tokens),
    ]
    assert len({embedder.fingerprint, *(other.fingerprint for other in others)}) == 9


def test_models_that_do_not_fit_are_refused_by_name() -> None:
    live, tokens = model("gpt2"), tokenizer("byte-bpe")
    for settings, message in (
        ({"layer": 4}, "layer=4"),
        ({"layer": -5}, "layer=-5"),
        ({"layer": "first"}, "layer='first'"),
        ({"pooling": "max"}, "pooling='max'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_length": 65}, "max_length=65 must be from 1 to 64"),
        ({"center": np.ones(3)}, "center gave"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelEmbedder(live, tokens, **settings)
    with pytest.raises(ValueError, match="from_pretrained"):
        ModelEmbedder("gpt2", tokens)
    with torch.no_grad():
        live.transformer.wte.weight[:] = float("nan")
    with pytest.raises(ValueError, match="ModelEmbedder gave values that are not finite"):
        ModelEmbedder(live, tokens).encode(TEXTS)
    with pytest.raises(ValueError, match="one string"):
        ModelEmbedder(live, tokens).encode("text")


# Sentence transformers


class Plain(nn.Module):
    """Stands in for an older sentence transformer, which has `encode` and prompts only."""

    prompts: dict[str, str]
    width = 4

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.prompts = {"query": "query: ", "passage": "passage: "}
        self.seen: list[tuple[str, str]] = []

    def encode(
        self,
        sentences: list[str],
        prompt: str | None = None,
        batch_size: int = 32,
        convert_to_numpy: bool = True,
        show_progress_bar: bool | None = None,
        how: str = "encode",
    ) -> Any:
        assert convert_to_numpy and batch_size == 32
        texts = [(prompt or "") + text for text in sentences]
        self.seen += [(how, text) for text in texts]
        return np.array([[len(t), t.count("e"), 1, 2][: self.width] for t in texts], np.float16)


class Modern(Plain):
    """Stands in for one that knows its prompts itself."""

    def encode_query(self, sentences: list[str], prompt: str = "Q ", **settings: Any) -> Any:
        return self.encode(sentences, prompt, how="query", **settings)

    def encode_document(self, sentences: list[str], prompt: str = "D ", **settings: Any) -> Any:
        return self.encode(sentences, prompt, how="document", **settings)


def test_sentence_transformers_get_their_prompts() -> None:
    modern = Modern()
    embedder = SentenceTransformerEmbedder(modern)
    modern.seen.clear()
    vectors = embedder.encode_document(["one", "three"])
    embedder.encode_query(["who"])
    assert modern.seen == [("document", "D one"), ("document", "D three"), ("query", "Q who")]
    assert embedder.dim == 4
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert embedder.encode([]).shape == (0, 4)

    plain = Plain()
    embedder = SentenceTransformerEmbedder(plain)
    plain.seen.clear()
    embedder.encode(["one"])
    embedder.encode_queries(["who"])
    assert [text for _, text in plain.seen] == ["passage: one", "query: who"]

    modern.seen.clear()
    embedder = SentenceTransformerEmbedder(modern, query_prompt="ask ", document_prompt="")
    modern.seen.clear()
    embedder.encode(["one"])
    embedder.encode_queries(["who"])
    assert modern.seen == [("document", "one"), ("query", "ask who")]

    plain.prompts = {"corpus": "corpus: "}
    plain.seen.clear()
    embedder = SentenceTransformerEmbedder(plain)
    plain.seen.clear()
    embedder.encode_document(["one"])
    embedder.encode_query(["who"])
    assert [text for _, text in plain.seen] == ["corpus: one", "who"]


def test_sentence_transformer_fingerprints() -> None:
    first = SentenceTransformerEmbedder(Plain()).fingerprint
    assert first == SentenceTransformerEmbedder(Plain()).fingerprint
    changed = Plain()
    with torch.no_grad():
        changed.weight[1] = 2
    prompted = Plain()
    prompted.prompts = {}
    pooled = Plain()
    pooled.pooling = nn.Identity()
    assert (
        len(
            {
                first,
                SentenceTransformerEmbedder(changed).fingerprint,
                SentenceTransformerEmbedder(prompted).fingerprint,
                SentenceTransformerEmbedder(pooled).fingerprint,
                SentenceTransformerEmbedder(Plain(), query_prompt="x").fingerprint,
            }
        )
        == 5
    )


def test_sentence_transformers_are_an_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r'pip install "memlm\[sentence-transformers\]"'):
        SentenceTransformerEmbedder("some/model")

    class Module:
        @staticmethod
        def SentenceTransformer(name: str, device: str | None) -> Plain:
            made = Plain()
            made.prompts = {"name": name, "device": str(device)}
            return made

    monkeypatch.setitem(sys.modules, "sentence_transformers", Module)
    made = SentenceTransformerEmbedder("some/model", device="cpu")
    assert made.model.prompts == {"name": "some/model", "device": "cpu"}


def test_sentence_transformers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="model is a object"):
        SentenceTransformerEmbedder(object())
    with pytest.raises(ValueError, match="device='cpu'"):
        SentenceTransformerEmbedder(Plain(), device="cpu")
    with pytest.raises(ValueError, match="batch_size=0"):
        SentenceTransformerEmbedder(Plain(), batch_size=0)
    embedder = SentenceTransformerEmbedder(Plain())
    embedder.model.width = 3
    with pytest.raises(ValueError, match="SentenceTransformerEmbedder gave float32 of shape"):
        embedder.encode(["one"])
