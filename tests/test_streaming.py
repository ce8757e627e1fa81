"""DocumentStream: pieces of any size, questions without trace, files."""

from __future__ import annotations

import random
import sys
import threading

import pytest
import torch
from transformers import GenerationConfig

import memlm.streaming
from memlm import DocumentStream, MemLMForCausalLM, MemoryState, StreamPool
from memlm.memory import available_memories
from memlm.retrieval import ChunkIndex, HashingEmbedder
from memlm.retrieval.retriever import RetrievalConfig, Retriever
from memlm.tokens import AHEAD
from tests import test_tokens
from tests.cases import A_SITE_EACH, by_default, memory_model
from tests.tokenizers import TEXT, tokenizer

KINDS = ("byte-bpe", "metaspace", "words")
SEGMENT = 12
# Characters of which four segments are read, and where two have been; more are kept for the tokenizer.
LENGTH, HALF = 400, 343


def model_for(memory: str = "armt", vocab_size: int = 400) -> MemLMForCausalLM:
    return memory_model("llama", memory, SEGMENT, vocab_size=vocab_size)


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Blocks of a few words, so that short texts cross many borders."""
    monkeypatch.setattr(memlm.streaming, "BLOCK", 40)


def written(text, memory: str = "armt", kind: str = "byte-bpe") -> DocumentStream:
    stream = DocumentStream(model_for(memory), tokenizer(kind))
    stream.write(text)
    return stream


def same(a: DocumentStream, b: DocumentStream) -> bool:
    names = a._state.tensors.keys()
    states = [(a._state[name], b._state[name]) for name in names]
    return (
        a._open_ids == b._open_ids
        and a._text == b._text
        and a.tokens_seen == b.tokens_seen
        and names == b._state.tensors.keys()
        and all(torch.allclose(x, y, rtol=1e-9, atol=1e-10) for x, y in states)
    )


# What a tokenizer makes of pieces has nothing to do with the memory that reads them: every kind by one,
# which reads more than the others.
@pytest.mark.parametrize(
    ("kind", "memory"),
    [
        pytest.param(kind, memory, marks=() if by_default else pytest.mark.slow)
        for kind in KINDS
        for memory in available_memories()
        for by_default in [kind == KINDS[0] or memory == "armt"]
    ],
)
def test_pieces_of_any_size_leave_the_state_of_one_write(small_blocks, memory, kind) -> None:
    text = TEXT if memory == "armt" else TEXT[:LENGTH]
    whole = written(text, memory, kind)
    characters = written(list(text), memory, kind)
    assert same(characters, whole) and whole._committed >= 4 * SEGMENT
    stream, rest = DocumentStream(model_for(memory), tokenizer(kind)), text
    generator = random.Random(0)
    while rest:
        size = generator.randint(1, 90)
        stream.write(rest[:size])
        rest = rest[size:]
    assert same(stream, whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [TEXT, "no" * 200, "  \n " * 60, "a" + " b" * 100, "日本語" * 80])
def test_tokens_are_those_of_the_whole_text(small_blocks, kind, text) -> None:
    stream = DocumentStream(model_for(), tokenizer(kind))
    read = []
    stream._read = lambda ids: read.extend(ids)  # type: ignore[method-assign]
    stream.write(text)
    got = read + stream._encode(stream._text)
    expected = tokenizer(kind)(text).input_ids
    if text in (TEXT, "a" + " b" * 100):
        assert got == expected
    # Text without a word border is cut hard, and loses no character.
    decode = tokenizer(kind).decode
    if kind == "byte-bpe":
        assert decode(got) == text


@torch.no_grad()
def test_the_state_is_that_of_the_model_over_the_tokens(small_blocks) -> None:
    stream = written(TEXT)
    ids = tokenizer("byte-bpe")(TEXT, return_tensors="pt").input_ids
    assert stream.tokens_seen == ids.shape[1]
    committed = model_for().eval()(ids[:, : stream._committed]).memory_state
    for name, tensor in committed.tensors.items():
        torch.testing.assert_close(stream._state[name], tensor, rtol=0, atol=1e-9)
    assert 1 <= len(stream._open_ids) <= SEGMENT


# A question is asked of a fork, whatever the memory: that calls leave states alone is a law.
@pytest.mark.parametrize("memory", by_default(available_memories(), ("none", *A_SITE_EACH)))
def test_asking_and_scoring_change_nothing(small_blocks, memory) -> None:
    stream = written(TEXT, memory)
    before = stream.fork()
    answer = stream.ask("Where is Mary?", max_new_tokens=4)
    assert isinstance(answer, str) and answer.sources == ()
    stream.score(" and so on")
    assert same(stream, before)
    assert stream.ask("Where is Mary?", max_new_tokens=4) == answer
    stream.write(" More text follows here." * 5)
    before.write(" More text follows here." * 5)
    assert same(stream, before)


@torch.no_grad()
def test_score_is_the_mean_loss_of_the_continuation() -> None:
    text, continuation = TEXT[:200], TEXT[200:260]
    stream = written(text)
    ids = tokenizer("byte-bpe")(
        text + continuation, return_tensors="pt", return_offsets_mapping=True
    )
    labels = ids.input_ids.clone()
    labels[ids.offset_mapping[..., 0] < len(text)] = -100
    expected = float(model_for().eval()(ids.input_ids, labels=labels).loss)
    assert abs(stream.score(continuation) - expected) < 1e-9
    empty = DocumentStream(model_for(), tokenizer("byte-bpe"))
    whole = tokenizer("byte-bpe")(text, return_tensors="pt").input_ids
    expected = float(model_for().eval()(whole, labels=whole).loss)
    assert abs(empty.score(text) - expected) < 1e-9


def test_a_continuation_at_a_segment_border_is_predicted_by_the_last_token() -> None:
    """The last token stays open, or nothing would predict the next one."""
    words = tokenizer("words")
    stream = DocumentStream(model_for(), words)
    stream.write("Mary " * SEGMENT)
    assert stream.score("Mary") > 0


def test_the_answer_equals_asking_about_all_tokens_at_once(small_blocks) -> None:
    stream = written(TEXT)
    model, tok = model_for().eval(), tokenizer("byte-bpe")
    question = model.config.question_template.format(question="Where is Mary?")
    ids = tok(TEXT).input_ids + tok(question, add_special_tokens=False).input_ids
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=2, pad_token_id=0
    )
    expected = tok.decode(out[0, len(ids) :], skip_special_tokens=True).strip()
    assert stream.ask("Where is Mary?", max_new_tokens=20) == expected


@torch.no_grad()
def test_a_question_may_have_a_segment_of_its_own(small_blocks) -> None:
    stream = written(TEXT)
    stream.model.config.question_segment = "own"
    before = stream.fork()
    answer = stream.ask("Where is Mary?", max_new_tokens=9)
    assert same(stream, before)
    model, tok = model_for().eval(), tokenizer("byte-bpe")
    state = model(tok(TEXT, return_tensors="pt").input_ids).memory_state
    question = model.config.question_template.format(question="Where is Mary?")
    ids = tok(question, add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(
        ids, memory_state=state, max_new_tokens=9, do_sample=False, eos_token_id=2, pad_token_id=0
    )
    assert answer == tok.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_memory_is_constant_and_a_generator_is_read_lazily(small_blocks) -> None:
    stream = written(TEXT)
    size, alive = stream.memory_bytes, []

    def pages():
        for number in range(50):
            alive.append(number)
            yield TEXT[:100]
            assert len(stream._text) < 40 + AHEAD and len(stream._open_ids) <= SEGMENT

    stream.write(pages())
    assert len(alive) == 50 and stream.memory_bytes == size


def test_a_fork_goes_its_own_way(small_blocks) -> None:
    stream = written(TEXT)
    fork = stream.fork()
    fork.write("Something else entirely. " * 10)
    assert fork.tokens_seen > stream.tokens_seen
    assert same(stream, written(TEXT))


@pytest.mark.parametrize("memory", available_memories())
def test_save_and_load_in_the_middle_of_a_word(small_blocks, tmp_path, memory) -> None:
    stream = written(TEXT[:HALF], memory)
    assert stream._committed >= 2 * SEGMENT
    stream.save(tmp_path / "s")
    loaded = DocumentStream.load(tmp_path / "s", model_for(memory), tokenizer("byte-bpe"))
    assert same(loaded, stream)
    loaded.write(TEXT[HALF:LENGTH])
    assert same(loaded, written(TEXT[:LENGTH], memory))


def test_damaged_and_foreign_streams_are_refused(tmp_path) -> None:
    stream = written(TEXT)
    stream.save(tmp_path)
    tok = tokenizer("byte-bpe")
    with pytest.raises(ValueError, match="another model's"):
        DocumentStream.load(tmp_path, model_for("rmt"), tok)
    with pytest.raises(ValueError, match="vocabulary="):
        DocumentStream.load(tmp_path, model_for(), tokenizer("words"))
    with pytest.raises(FileNotFoundError, match="holds no stream"):
        DocumentStream.load(tmp_path / "nowhere", model_for(), tok)
    path = tmp_path / "stream.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a readable safetensors"):
        DocumentStream.load(tmp_path, model_for(), tok)
    MemoryState({}, 1).save(path)
    with pytest.raises(ValueError, match="without a stream"):
        DocumentStream.load(tmp_path, model_for(), tok)


def test_bad_input_is_refused_by_name() -> None:
    tok = tokenizer("byte-bpe")
    stream = DocumentStream(model_for(), tok)
    with pytest.raises(ValueError, match="stream is empty"):
        stream.ask("Where?")
    with pytest.raises(ValueError, match="no token to score"):
        stream.score("")
    with pytest.raises(TypeError, match="bytes"):
        stream.write(b"raw")
    with pytest.raises(TypeError, match="int"):
        stream.write([1])
    stream.write("One")
    stream.ask("Where?", max_new_tokens=2)
    with pytest.raises(ValueError, match="question="):
        stream.ask("  ")
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        stream.ask("Where?", max_new_tokens=0)
    with pytest.raises(ValueError, match="tokens, but the model embeds 100"):
        DocumentStream(model_for(vocab_size=100), tok)
    with pytest.raises(TypeError, match="retrieval is"):
        DocumentStream(model_for(), tok, retrieval=object())
    with pytest.raises(TypeError, match="has no memory"):
        DocumentStream(model_for().base, tok)
    from transformers import PreTrainedTokenizerFast

    endless = PreTrainedTokenizerFast(tokenizer_object=tok.backend_tokenizer)
    with pytest.raises(ValueError, match="no end token"):
        DocumentStream(model_for(), endless)


def tokens_of(stream: DocumentStream, text: str | list[str]) -> list[int]:
    """The tokens a stream reads of a text, and those it would read if the text ended there."""
    read: list[int] = []
    stream._read = read.extend  # type: ignore[method-assign]
    stream.write(text)
    return read + stream._encode(stream._text)


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "unigram", "wordpiece", "bytes"])
def test_any_text_in_any_pieces_has_the_tokens_of_the_whole_text(monkeypatch, kind) -> None:
    monkeypatch.setattr(memlm.streaming, "BLOCK", 300)
    made, rng = test_tokens.tokenizer(kind), random.Random(1)
    parts = [text for name, text in test_tokens.texts(2, 150).items() if name != "control tokens"]
    text = "".join(rng.sample(parts, len(parts)))
    model = model_for("none", vocab_size=len(made))
    whole = made(text, add_special_tokens=False).input_ids
    for size in (1, 700, len(text)):
        pieces, rest = [], text
        while rest:
            at = rng.randint(1, size)
            pieces.append(rest[:at])
            rest = rest[at:]
        assert tokens_of(DocumentStream(model, made), pieces) == whole
    assert tokens_of(DocumentStream(model, made), text) == whole


def test_a_long_string_is_not_copied_for_every_block() -> None:
    stream = DocumentStream(model_for(), tokenizer("byte-bpe"))
    longest = 0
    tokens = stream._tokens

    def watching(text: str) -> list[int]:
        nonlocal longest
        longest = max(longest, len(stream._text))
        return tokens(text)

    stream._tokens, stream._read = watching, lambda ids: None  # type: ignore[method-assign]
    stream.write(TEXT * 200)
    assert 0 < longest <= 2 * memlm.streaming.BLOCK + AHEAD


def prompts(model: MemLMForCausalLM, monkeypatch) -> list[list[int]]:
    """Collects the ids the model is asked to go on from."""
    heard: list[list[int]] = []
    generate = model.generate

    def listening(ids, **kwargs):
        heard.append(ids[0].tolist())
        return generate(ids, **kwargs)

    monkeypatch.setattr(model, "generate", listening)
    return heard


def test_control_tokens_in_a_text_are_text_unless_asked_otherwise(tmp_path, monkeypatch) -> None:
    tok, model = tokenizer("byte-bpe"), model_for()
    model.config.question_template = "<bos>{question}<eos>"
    heard = prompts(model, monkeypatch)
    text = "Mary said <eos>. " * 3
    ends = []
    for split in (True, False):
        index = ChunkIndex(HashingEmbedder(dim=64))
        index.add(["A <eos> ends."])
        stream = DocumentStream(model, tok, index, split_special_tokens=split)
        stream.write(text)
        stream.ask("What is <eos>?", max_new_tokens=1)
        ends.append(heard[-1].count(tok.eos_token_id))
        assert heard[-1].count(tok.bos_token_id) == 1
        stream.save(tmp_path / str(split))
        again = DocumentStream.load(tmp_path / str(split), model, tok, HashingEmbedder(dim=64))
        assert again.split_special_tokens == split and same(again, stream)
    # The template's own; and one of each: three of the text, one of the passage, one of the question.
    assert ends == [1, 6]


def states(text: str, block: int) -> dict[int, DocumentStream]:
    """A stream at every place where it may stand while `text` is written, by the tokens it has read."""
    stream = DocumentStream(model_for(), tokenizer("byte-bpe"))
    found = {0: stream.fork()}
    for at in range(0, len(text), block):
        stream.write(text[at : at + block])
        found[stream.tokens_seen] = stream.fork()
    return found


def during(stream: DocumentStream, act) -> list[threading.Thread]:
    """Let two other threads `act` just before and just behind the reading of the third block."""
    calls, read = [], stream._read
    threads = [threading.Thread(target=act, daemon=True) for _ in range(2)]

    def watched(ids: list[int]) -> None:
        calls.append(1)
        third = len(calls) == 3
        # As much time as it needs when nothing holds it.
        if third:
            threads[0].start()
            threads[0].join(0.2)
        read(ids)
        if third:
            threads[1].start()
            threads[1].join(0.2)

    stream._read = watched  # type: ignore[method-assign]
    return threads


@pytest.mark.parametrize("act", ["fork", "save", "seen", "ask", "score"])
def test_a_stream_is_whole_while_it_is_written(small_blocks, monkeypatch, tmp_path, act) -> None:
    text = TEXT[:420]
    expected = states(text, 40)
    stream = DocumentStream(model_for(), tokenizer("byte-bpe"))
    found: list[object] = []

    def ask(one: DocumentStream) -> object:
        with monkeypatch.context() as patched:
            heard = prompts(one.model, patched)
            one.ask("Where is Mary?", max_new_tokens=1)
        return tuple(heard[-1])

    acts = {
        "fork": lambda: stream.fork(),
        "save": lambda: stream.save(tmp_path),
        "seen": lambda: stream.tokens_seen,
        "ask": lambda: ask(stream),
        "score": lambda: round(stream.score(" and so on"), 9),
    }
    threads = during(stream, lambda: found.append(acts[act]()))
    stream.write(text)
    for thread in threads:
        thread.join(60)
    assert len(found) == 2
    if act == "seen":
        assert set(found) <= expected.keys()
    elif act in ("fork", "save"):
        if act == "save":
            found = [DocumentStream.load(tmp_path, model_for(), tokenizer("byte-bpe"))]
        for got in found:
            assert isinstance(got, DocumentStream) and same(got, expected[got.tokens_seen])
    else:
        # The third block is read when little of the text is left.
        every = list(expected.values())[-4:]
        said = {ask(one) if act == "ask" else round(one.score(" and so on"), 9) for one in every}
        assert set(found) <= said
    assert same(stream, written(text))


def test_writers_do_not_write_into_each_others_text(small_blocks) -> None:
    stream = DocumentStream(model_for("none"), tokenizer("byte-bpe"))
    read: list[int] = []
    stream._read = read.extend  # type: ignore[method-assign]
    told = [f"{letter * 30} " * 20 for letter in "abcd"]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=stream.write, args=([*text],)) for text in told]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(before)
    whole = tokenizer("byte-bpe").decode(read + stream._encode(stream._text))
    assert len(whole) == sum(map(len, told)) and all(text in whole for text in told)


def test_what_cannot_be_saved_is_known_before_anything_is(tmp_path) -> None:
    index = ChunkIndex(HashingEmbedder(dim=64))
    index.add(["One.", "Two."], metadata=[{"year": 1}, {"year": 3}])
    where = {"year": {1, 2}}
    stream = DocumentStream(
        model_for(), tokenizer("byte-bpe"), Retriever(index, RetrievalConfig(where=where))
    )
    stream.save(tmp_path / "a")
    loaded = DocumentStream.load(
        tmp_path / "a", model_for(), tokenizer("byte-bpe"), HashingEmbedder(dim=64)
    )
    assert [p.text for p in loaded.retriever.recall("One or two?")] == ["One."]
    object.__setattr__(stream.retriever.config, "where", {"year": object()})
    with pytest.raises(TypeError):
        stream.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_threads_may_read_a_stream_that_is_written(small_blocks) -> None:
    stream = DocumentStream(model_for(), tokenizer("byte-bpe"), ChunkIndex(HashingEmbedder(dim=64)))
    stream.write("Once upon a time. ")
    errors: list[BaseException] = []
    done = threading.Event()

    def ask() -> None:
        try:
            while not done.is_set():
                fork = stream.fork()
                fork.write("A fork goes on alone. ")
                stream.ask("Where is Mary?", max_new_tokens=1)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        stream.write(TEXT[at : at + 7] for at in range(0, len(TEXT), 7))
    finally:
        done.set()
        thread.join(60)
    assert not errors and not thread.is_alive()
    assert same(stream, written("Once upon a time. " + TEXT))
    assert any("Mary" in p.text for p in stream.ask("Where is Mary?", max_new_tokens=1).sources)


def test_a_failing_model_loses_no_text(small_blocks, monkeypatch) -> None:
    stream = DocumentStream(model_for(), tokenizer("byte-bpe"))
    with monkeypatch.context() as patched:
        patched.setattr(stream.model, "read", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stream.write([TEXT])
    # All of the block that failed is there, as far as it was taken in.
    taken = len(stream._text)
    assert taken > 40
    stream.write(TEXT[taken:])
    assert same(stream, written(TEXT))


def test_every_end_token_of_the_model_ends_an_answer(monkeypatch) -> None:
    """Chat models end a turn with another token than a text; they were made to end at both."""
    stream, answered = written(TEXT), []
    generate = MemLMForCausalLM.generate

    def kept(model, ids, **arguments):
        out = generate(model, ids, **arguments)
        answered.append(out[0, ids.shape[1] :].tolist())
        return out

    monkeypatch.setattr(MemLMForCausalLM, "generate", kept)

    def answer(ends: int | list[int] | None) -> list[int]:
        stream.model.generation_config.eos_token_id = ends
        stream.ask("Where is Mary?", max_new_tokens=8)
        return answered[-1]

    free = answer(None)
    assert len(free) == 8
    # A token that the model says by itself.
    end = free[2]
    until = free[: free.index(end) + 1]
    assert answer(end) == answer([1, end]) == until


def test_segments_that_were_written_are_counted(small_blocks, tmp_path) -> None:
    stream = written(TEXT)
    # Every gate of these weights is open: each committed segment counts.
    assert stream.writes == stream._committed // SEGMENT > 0
    stream.save(tmp_path)
    again = DocumentStream.load(tmp_path, stream.model, stream.tokenizer)
    other = stream.fork()
    other.write(TEXT)
    assert again.writes == stream.writes < other.writes
    stream.model.set_memory_options(write_threshold=2.0)
    again.write(TEXT)
    assert again.writes == stream.writes
    assert written(TEXT, "rmt").writes is None


def test_a_configuration_says_how_an_answer_is_made() -> None:
    """Keywords go before a configuration, but what a stream would do by itself does not."""
    stream, question = written(TEXT), "Where is Mary?"
    # Tokens are not counted in text: what is left out of it is what `generate` was asked for.
    asked: list[dict] = []
    generate = stream.model.generate

    def kept(ids, **arguments):
        asked.append({**arguments, "width": ids.shape[1]})
        out = generate(ids, **arguments)
        asked[-1]["new"] = out.shape[1] - ids.shape[1]
        return out

    stream.model.generate = kept
    ends = {"eos_token_id": 399, "pad_token_id": 0}
    config = GenerationConfig(max_new_tokens=40, do_sample=True, temperature=9.0, **ends)
    answers = set()
    for seed in range(3):
        torch.manual_seed(seed)
        answers.add(str(stream.ask(question, generation_config=config)))
        assert asked[-1]["new"] == 40
    assert len(answers) == 3
    stream.ask(question, 3, generation_config=config)
    assert asked[-1]["new"] == 3
    greedy = GenerationConfig(return_dict_in_generate=True, **ends)
    assert stream.ask(question, generation_config=greedy) == stream.ask(question, eos_token_id=399)
    assert asked[-1]["new"] == asked[-2]["new"] == 32
    with pytest.raises(ValueError, match="num_return_sequences=2 is the stream's own"):
        stream.ask(
            question, generation_config=GenerationConfig(num_return_sequences=2, num_beams=2)
        )


def test_half_a_character_is_refused_and_leaves_the_stream_as_it_was() -> None:
    stream = written(TEXT)
    before, half = stream.ask("Where is Mary?"), "Mary \ud800 went"
    for act in (stream.write, stream.ask, stream.score, stream.chat):
        with pytest.raises(ValueError, match=r"'\\ud800' at 5.*errors='replace'"):
            act(half)
    with pytest.raises(ValueError, match="half a character"):
        stream.write(["whole ", half])
    assert stream.ask("Where is Mary?") != "" or before == ""
    with pytest.raises(TypeError, match="text is a NoneType"):
        stream.write(None)


def test_a_training_in_between_leaves_no_dropout_in_what_is_read() -> None:
    model, tok = memory_model("gpt2", "armt", SEGMENT, vocab_size=400), tokenizer("byte-bpe")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    first, second = DocumentStream(model, tok), DocumentStream(model, tok)
    pool = StreamPool(model, tok)
    pooled = pool.open()
    pooled.write(TEXT)
    first.write(TEXT)
    model.train()
    second.write(TEXT)
    assert same(first, second)
    model.train()
    pool.run()
    assert same(first, pooled)
    model.train()
    assert first.score("more of it") == second.score("more of it")
