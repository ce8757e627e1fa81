"""DocumentStream: write text of any length into a model's memory, and ask in between.

Text becomes tokens in blocks whose borders depend on the text alone, never on how it was handed over:
a document written character by character leaves the state of one write, and its tokens are those of the
whole text (memlm/tokens.py says when they may differ).
"""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from memlm.modeling import MemLMForCausalLM
from memlm.retrieval.base import Embedder
from memlm.retrieval.chunk_store import StoreAddress
from memlm.retrieval.embedders import HashingEmbedder
from memlm.retrieval.index import ChunkIndex
from memlm.retrieval.retriever import Retriever, as_retriever, render_parts
from memlm.retrieval.store import remove_index
from memlm.saved_stream import INDEX, SavedStream, another_index, other_indexes
from memlm.segment import IGNORE, cut
from memlm.state import MemoryState
from memlm.text import check_characters
from memlm.tokens import (
    Part,
    encode_after,
    encode_parts,
    encode_texts,
    fill,
    leading_tokens,
    next_block,
    tokens_begun,
)
from memlm.turns import Message, as_messages, turn_of
from memlm.writes import WriteCount

FILE = "stream.safetensors"
# Version 3 names the folder of its index.
VERSION = 3
UNNAMED_VERSION = 2
# Characters per block: large enough that tokenising costs little, small enough not to cause a delay.
BLOCK = 4096


class Pool(Protocol):
    """What reads the segments of many streams."""

    def add(self, stream: DocumentStream) -> None: ...


class Answer(str):
    """What the model answered. sources: the recalled passages it was shown, none without retrieval."""

    __slots__ = ("sources",)
    sources: tuple[Any, ...]

    def __new__(cls, text: str, sources: Iterable[Any] = ()) -> Answer:
        answer = super().__new__(cls, text)
        answer.sources = tuple(sources)
        return answer


class DocumentStream:
    """One document, read as it comes, remembered in a state of constant size.

    model: a MemLMForCausalLM (put into evaluation mode). tokenizer: its tokenizer, with an end token.
    retrieval: a ChunkIndex, or a Retriever around one: text is stored in it as it is written, and `ask`
    shows the model the passages it recalls, before the question. split_special_tokens: control tokens
    written out in documents, questions and passages ("</s>") are read as text; False makes them control
    tokens. Those of the model's own templates always are control tokens. ValueError when model, tokenizer
    and retrieval do not fit each other.

    Several threads may use one stream. What one `write` is given stays together, even when other threads
    write at the same time. A question, score, fork or save during a write sees the document up to the last
    block that was read.
    """

    def __init__(
        self,
        model: MemLMForCausalLM,
        tokenizer: Any,
        retrieval: ChunkIndex | Retriever | None = None,
        *,
        split_special_tokens: bool = True,
    ) -> None:
        if not isinstance(model, MemLMForCausalLM):
            raise TypeError(
                f"model={type(model).__name__} has no memory; wrap it with MemLMForCausalLM.from_base"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "tokenizer has no end token, and an answer would never end; set tokenizer.eos_token"
            )
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"tokenizer has {len(tokenizer)} tokens, but the model embeds "
                f"{model.config.vocab_size}; use the model's own tokenizer"
            )
        self._model = model.eval()
        self.tokenizer = tokenizer
        self.split_special_tokens = split_special_tokens
        self._make_locks()
        self._state = model.init_state(1).detach()
        self._committed = 0
        # Tokens after the last committed segment. Between two calls there is at most one segment of them
        # (in a pool, all that waits), and at least one token once something was read: the last token
        # predicts the next one.
        self._open_ids: list[int] = []
        self._writes = WriteCount()
        # Text not tokenised yet, and the text before it, which decides how it is tokenised; None at
        # the document's start.
        self._text = ""
        self._context: str | None = None
        # The last exchange of a dialogue: chat templates write a turn by what stands before it.
        self._turns: list[dict[str, str]] = []
        self.retriever = as_retriever(retrieval)
        # In a pool, what is written waits among the open tokens.
        self._pool: Pool | None = None
        # The folder it was saved to or loaded from last, and what its index is called there.
        self._saved = ("", INDEX)

    @property
    def model(self) -> MemLMForCausalLM:
        """The model, in evaluation mode: a training since then would have left its dropout on."""
        return self._model.eval() if self._model.training else self._model

    def write(self, text: str | Iterable[str], document: str | None = None) -> None:
        """Read text: a string, or pieces of one (a list, a generator, an open file), lazily.

        document: a name for what is read, which recalled passages carry; when the name changes,
        passages are counted from its beginning.
        """
        if isinstance(text, bytes):
            raise TypeError(
                "text is bytes; decode it first, for instance with text.decode('utf-8')"
            )
        if not isinstance(text, Iterable):
            raise TypeError(f"text is a {type(text).__name__}; give a string, or pieces of one")
        with self._writing:
            for piece in (text,) if isinstance(text, str) else text:
                if not isinstance(piece, str):
                    raise TypeError(f"text holds a {type(piece).__name__}; give strings")
                check_characters("text", piece)
                # A long piece goes in parts: a block taken off a string copies the rest of it.
                for at in range(0, max(len(piece), 1), BLOCK):
                    self._append(piece[at : at + BLOCK], document)

    @torch.no_grad()
    def ask(
        self,
        question: str,
        max_new_tokens: int | None = None,
        streamer: BaseStreamer | None = None,
        **generate_arguments: Any,
    ) -> Answer:
        """Answer a question about what was written; the stream stays as it is.

        The question follows the document as the model's `question_template` says. Recalled passages stand
        before it as `recall_template` says, and are the answer's `sources`. Decoding is greedy, up to an
        end token (the tokenizer's, or one of the model's `generation_config`) or to `max_new_tokens` (32),
        unless `generate_arguments` (those of transformers' `generate`, a generation_config among them) say
        otherwise. streamer: is given tokens as they come, first the prompt's, which transformers' streamers
        pass over with skip_prompt=True.
        ValueError when nothing was written and there is nothing to recall.
        """
        _check_arguments(generate_arguments)
        if not question.strip():
            raise ValueError(f"question={question!r} is empty; ask something")
        check_characters("question", question)
        limit = _limit(generate_arguments, max_new_tokens, 32)
        with self._lock:
            sources = [] if self.retriever is None else self.retriever.recall(question.strip())
            tail = self._open_ids + self._encode(self._text)
            state, empty = self._state, not self._committed and not tail
        if empty and not sources:
            raise ValueError("the stream is empty, nothing was written; write a document first")
        config = self.model.config
        prompt = self._filled(render_parts(sources, config.recall_template))
        prompt += self._filled(fill(config.question_template, question=question.strip()))
        if config.question_segment == "own" and tail:
            state = self.model.read(
                cut(self._tensor(tail), None, None, config.segment_length), state
            )
        else:
            prompt = tail + prompt
        given = {"streamer": streamer, **generate_arguments, **limit}
        # Of every kind that a generation_config may ask for, tokens are all that an answer needs.
        out = self._generate(prompt, state, return_dict_in_generate=False, **given)
        text = self.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
        return Answer(text.strip(), sources)

    @torch.no_grad()
    def chat(
        self,
        messages: str | Sequence[Message],
        max_new_tokens: int | None = None,
        streamer: BaseStreamer | None = None,
        **generate_arguments: Any,
    ) -> Answer:
        """Go on with a dialogue about what was written; turns and answer become part of what is remembered.

        messages: the new turns, what the user says or messages of `role` and `content`. They are written as
        the tokenizer's chat template writes them behind the last exchange; control tokens in what they say
        are text. The rest is as in `ask`, without what a question has of its own, and with 256 for the
        longest answer. ValueError for a template
        that does not only add, and in a stream with retrieval. An error leaves the stream as it was.
        """
        _check_arguments(generate_arguments)
        limit = _limit(generate_arguments, max_new_tokens, 256)
        new = as_messages(messages)
        if self.retriever is not None:
            raise ValueError(
                "a stream with retrieval would remember recalled passages as if they had been said; use "
                "ask, or a stream without retrieval"
            )
        with self._writing:
            parts, closing = turn_of(self.tokenizer, self._turns, new)
            first, writes = self._leading(), self._writes.copy()
            begun = self._context is not None or self._text
            bos = self.tokenizer.bos_token
            if bos and (begun or self.tokenizer.bos_token_id in first):
                # The document has its beginning already.
                parts[0] = parts[0][0].removeprefix(bos), parts[0][1]
            prompt = self._open_ids + (self._encode(self._text) if self._text else first)
            prompt += self._filled(parts)
            given = {"streamer": streamer, **generate_arguments, **limit}
            out = self._generate(
                prompt, self._state, writes=writes, return_dict_in_generate=True, **given
            )
            said, rest = out.sequences[0, len(prompt) :].tolist(), out.open_ids[0].tolist()
            text = self.tokenizer.decode(said, skip_special_tokens=True).strip()
            if closing and said[-1] in self._ends():
                end = self.tokenizer.decode([said[-1]])
                if closing.startswith(end):
                    closing = closing.removeprefix(end)
                else:
                    rest = rest[:-1]
            with self._lock:
                self._committed += len(prompt) + len(said) - len(out.open_ids[0])
                self._state, self._open_ids, self._writes = out.memory_state, rest, writes
                self._text, self._context = "", ""
                self._turns = [*new, {"role": "assistant", "content": text}]
                self._read(self._filled([(closing, True)]))
        return Answer(text)

    def _generate(self, prompt: list[int], state: MemoryState, **arguments: Any) -> Any:
        """What `generate` returns for a prompt."""
        ids = self._tensor(prompt)
        pad = self.tokenizer.pad_token_id
        settings: dict[str, Any] = {
            "do_sample": False,
            "eos_token_id": self._ends(),
            "pad_token_id": self.tokenizer.eos_token_id if pad is None else pad,
        }
        # Keywords go before a configuration, in which somebody has said otherwise.
        settings = {k: v for k, v in settings.items() if k not in _configured(arguments)}
        return self.model.generate(
            ids, attention_mask=torch.ones_like(ids), memory_state=state, **(settings | arguments)
        )

    @torch.no_grad()
    def score(self, text: str) -> float:
        """Mean negative log-likelihood of `text` as the document's continuation, in nats per token.

        The stream stays as it is. In an empty stream nothing predicts the first token, so it is not
        counted. ValueError when no token is left to count.
        """
        check_characters("text", text)
        with self._lock:
            state, whole, at = self._state, self._text + text, len(self._text)
            ids = self._encode(whole)
            known = tokens_begun(self._encode, whole, at) if at else len(self._leading())
            before = self._open_ids + ids[:known]
        after = ids[known:]
        counted = len(after) - (0 if before else 1)
        if counted < 1:
            raise ValueError(f"text={text!r} has no token to score; give a longer text")
        tokens = self._tensor(before + after)
        labels = self._tensor([IGNORE] * len(before) + after)
        out = self.model(input_ids=tokens, labels=labels, memory_state=state, logits_to_keep=None)
        return float(out.loss)

    @property
    def tokens_seen(self) -> int:
        """Tokens written so far, including the special tokens a document begins with."""
        with self._lock:
            return self._committed + len(self._open_ids) + len(self._encode(self._text))

    @property
    def writes(self) -> int | None:
        """Segments so far in which a write gate opened (above 0.1 in any layer); None without gates."""
        with self._lock:
            rows = self._writes.rows()
        return None if rows is None else rows[0]

    @property
    def memory_bytes(self) -> int:
        """Bytes of the memory: the same after a page and after a library."""
        return self._state.nbytes

    def fork(self) -> DocumentStream:
        """A second stream that goes on from here independently; model and tokenizer are shared."""
        with self._lock:
            other = copy.copy(self)
            other._make_locks()
            other._state = self._state.fork()
            other._open_ids = list(self._open_ids)
            other.retriever = None if self.retriever is None else self.retriever.fork()
        if self._pool is not None:
            self._pool.add(other)
        return other

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the stream into one file in `directory`, atomically; the model is not saved.

        With retrieval, the index is saved beside it, and first; a kill in between loses nothing, of another
        stream that the folder may hold neither.
        """
        place = Path(directory)
        with self._lock:
            where, name = os.path.realpath(place), INDEX
            if self._saved[0] == where:
                name = self._saved[1]
            elif (place / FILE).exists():
                # Another stream's, whose index is to stay until its file is replaced.
                name = another_index()
            saved: dict[str, Any] = {
                "committed": self._committed,
                "open": self._open_ids,
                "writes": self._writes.rows(),
                "text": self._text,
                "context": self._context,
                "turns": self._turns,
                "split_special_tokens": self.split_special_tokens,
                "retrieval": None if self.retriever is None else self.retriever.state(),
                "segment_length": self.model.segment_length,
                "vocabulary": len(self.tokenizer),
            }
            version = UNNAMED_VERSION
            if self.retriever is not None and name != INDEX:
                version, saved["index"] = VERSION, name
            # What cannot be written is found before anything is.
            extra = {"stream_version": str(version), "stream": json.dumps(saved)}
            if self.retriever is not None:
                self.retriever.index.save(place / name)
            self._state.save(place / FILE, extra)
            self._saved = (where, name)
            if self.retriever is not None:
                for other in other_indexes(place, name):
                    remove_index(other)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        model: MemLMForCausalLM,
        tokenizer: Any,
        embedder: Embedder | None = None,
        store: str | os.PathLike[str] | StoreAddress | None = None,
    ) -> DocumentStream:
        """Load a saved stream, to go on with it. ValueError when it is damaged, or another model's.

        embedder: of the stream's index; None is a HashingEmbedder. store: where the index's chunks are, in
        place of the saved address, as in `ChunkIndex.load`; the next save writes the new one.
        """
        path = Path(directory) / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"directory={str(directory)!r} holds no stream; give a folder DocumentStream.save wrote"
            )
        state, metadata = MemoryState.load_with_extra(path)
        if "stream" not in metadata:
            raise ValueError(f"{str(path)!r} is a state without a stream; use MemoryState.load")
        try:
            version = int(metadata.get("stream_version", "0"))
        except ValueError as error:
            raise _damaged(path, error) from error
        if version > VERSION:
            raise ValueError(
                f"{str(path)!r} has stream version {version}, this memlm reads up to {VERSION}; upgrade "
                "memlm"
            )
        try:
            saved = SavedStream.parse(metadata["stream"])
        except ValueError as error:
            raise _damaged(path, error) from error
        for name, ours in (
            ("segment_length", model.segment_length),
            ("vocabulary", len(tokenizer)),
        ):
            if getattr(saved, name) != ours:
                raise ValueError(
                    f"{str(path)!r} was saved with {name}={getattr(saved, name)}, but here it is {ours}; "
                    "use the model and the tokenizer it was written with"
                )
        if store is not None and saved.retrieval is None:
            raise ValueError(
                f"{str(path)!r} was saved without retrieval; leave store={store!r} out, or index the text "
                "again in a new stream"
            )
        admitted = model._admit(state, 1)
        retriever = None
        if saved.retrieval is not None:
            index = ChunkIndex.load(
                Path(directory) / saved.index, embedder or HashingEmbedder(), store=store
            )
            try:
                retriever = Retriever.restore(index, saved.retrieval)
            except ValueError as error:
                raise _damaged(path, error) from error
        stream = cls(model, tokenizer, retriever, split_special_tokens=saved.split_special_tokens)
        stream._state = admitted
        stream._committed, stream._open_ids = saved.committed, saved.open
        stream._text, stream._context = saved.text, saved.context
        stream._writes, stream._turns = WriteCount(saved.writes), saved.turns
        stream._saved = (os.path.realpath(directory), saved.index)
        return stream

    def _make_locks(self) -> None:
        # The first is held for a whole write, the second while the stream's own fields change.
        self._writing, self._lock = threading.RLock(), threading.RLock()

    def _append(self, text: str, document: str | None) -> None:
        """Append text to what is not read yet, and read the blocks that are complete by now."""
        with self._lock:
            if self.retriever is not None:
                self.retriever.write(text, document)
            self._text += text
            while taken := next_block(self._tokens, self._context, self._text, BLOCK):
                # First the model: should it fail, the text is still there.
                self._read(self._leading() + taken[0])
                _, self._context, self._text = taken

    def _read(self, ids: list[int]) -> None:
        """Add tokens to the open segment, and commit every segment that another token follows."""
        if self._pool is not None:
            self._open_ids.extend(ids)
            return
        ids, state, writes = self._open_ids + ids, self._state, self._writes.copy()
        length = self.model.segment_length
        full = max(0, (len(ids) - 1) // length * length)
        if full:
            segments = cut(self._tensor(ids[:full]), None, None, length)
            state = self.model.read(segments, state, writes)
        self._state, self._open_ids, self._writes = state, ids[full:], writes
        self._committed += full

    def _ends(self) -> list[int]:
        """What ends an answer: the tokenizer's end token, and those the model was made with."""
        config = self.model.generation_config
        made = None if config is None else config.eos_token_id
        made = made if isinstance(made, list) else [] if made is None else [made]
        return list(dict.fromkeys([self.tokenizer.eos_token_id, *made]))

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], dtype=torch.long, device=self.model.backbone.device)

    def _tokens(self, text: str) -> list[int]:
        return encode_texts(self.tokenizer, [text], self.split_special_tokens)[0]

    def _filled(self, parts: Iterable[Part]) -> list[int]:
        return encode_parts(self.tokenizer, parts, self.split_special_tokens)

    def _leading(self) -> list[int]:
        """The special tokens before the text that comes next."""
        return leading_tokens(self.tokenizer) if self._context is None else []

    def _encode(self, text: str) -> list[int]:
        """Tokens of `text` after what was read, with the special tokens a document begins with."""
        if not text:
            return []
        return self._leading() + encode_after(self._tokens, self._context, text)


# Arguments of `generate` that a stream gives by itself.
OWN = (
    "inputs",
    "input_ids",
    "attention_mask",
    "memory_state",
    "num_return_sequences",
    "return_dict_in_generate",
)


def _configured(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the generation_config among the arguments says; empty without one."""
    config = arguments.get("generation_config")
    return {k: v for k, v in config.to_dict().items() if v is not None} if config else {}


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    given = {name: arguments[name] for name in OWN if name in arguments}
    if _configured(arguments).get("num_return_sequences", 1) != 1:
        given["num_return_sequences"] = _configured(arguments)["num_return_sequences"]
    for name, value in given.items():
        raise ValueError(
            f"{name}={value!r} is the stream's own: it reads and answers one text; leave it out, or call "
            "model.generate"
        )


def _limit(arguments: Mapping[str, Any], asked: int | None, default: int) -> dict[str, int]:
    """The longest answer as an argument of `generate`; none where the arguments limit it themselves."""
    if asked is None:
        told = {**_configured(arguments), **arguments}
        return (
            {} if "max_length" in told or "max_new_tokens" in told else {"max_new_tokens": default}
        )
    if asked < 1:
        raise ValueError(f"max_new_tokens={asked} must be at least 1")
    return {"max_new_tokens": asked}


def _damaged(path: Path, why: object) -> ValueError:
    return ValueError(f"{str(path)!r} is damaged or no stream ({why}); take an earlier copy of it")
