"""The model as lm_eval asks it: each distinct context's whole segments are read into the memory once.

The open rest is scored or continued from that state. So a request gets what one `model(input_ids)` over
all its tokens gives.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from memlm.eval.harness.loading import device_named, dtype_named, load_model
from memlm.eval.harness.requests import (
    Decoding,
    Ids,
    TokenRequest,
    count_of,
    decoding_of,
    families_of,
)
from memlm.modeling import MemLMForCausalLM
from memlm.padding import pad_rows
from memlm.pretrained import resolve_pretrained
from memlm.segment import Segment
from memlm.state import MemoryState

try:
    # Before ours: the harness lists its own models only while it knows none.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError("memlm.eval.harness needs lm_eval; pip install 'memlm[lm-eval]'") from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

NAME = "memlm"
# Predictions looked at together: a large vocabulary makes each of them a megabyte in float32.
POSITIONS = 512
Pair = tuple[Sequence[int], Sequence[int]]
Item = TypeVar("Item")


@register_model(NAME)
class HarnessModel(TemplateLM):
    """A memlm model that answers the harness's requests.

    pretrained: a folder, hub id or shipped name (`memlm.pretrained`) of a saved memlm model, or the model
    itself, which then needs a tokenizer. tokenizer: one, or its name; the model's own when None.
    batch_size: rows side by side, each with a state of constant size. device: the model's own, or an
    accelerator where there is one. dtype: "auto" as saved, or a name. max_gen_toks: tokens of an answer
    where a task does not say.
    add_bos_token: whether contexts begin with the start token; None as the tokenizer does it.
    prefix_token_id: what stands before an empty context; the start token, else the end token.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | MemLMForCausalLM,
        tokenizer: Any = None,
        batch_size: int | str = 1,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        revision: str = "main",
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but memlm evaluates in one process; start it "
                "without torchrun or accelerate launch, and raise batch_size instead"
            )
        self.batch_size = count_of("batch_size", batch_size)
        self.max_gen_toks = count_of("max_gen_toks", max_gen_toks)
        self.add_bos_token = add_bos_token
        loaded = isinstance(pretrained, (str, os.PathLike))
        if isinstance(pretrained, (str, os.PathLike)):
            pretrained = resolve_pretrained(os.fspath(pretrained))
            model = load_model(pretrained, dtype, revision)
        else:
            model = pretrained
        if not isinstance(model, MemLMForCausalLM):
            raise ValueError(
                f"pretrained={type(model).__name__} has no memory; give a model saved by memlm, or wrap "
                "it with MemLMForCausalLM.from_base (model=hf runs a model as it is)"
            )
        if not loaded and dtype != "auto":
            model = model.to(dtype_named(dtype))
        if device is None and loaded and torch.cuda.is_available():
            device = "cuda"
        self.model = (model if device is None else model.to(device_named(device))).eval()
        if tokenizer is None and not loaded:
            raise ValueError("tokenizer is missing; give the tokenizer of the model, or its name")
        if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(tokenizer or pretrained, revision=revision)
        if len(tokenizer) > self.model.config.vocab_size:
            raise ValueError(
                f"tokenizer has {len(tokenizer)} tokens, but the model embeds "
                f"{self.model.config.vocab_size}; use the model's own tokenizer"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer has no end token; set tokenizer.eos_token")
        self.tokenizer = tokenizer
        chosen = (prefix_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        self._prefix = int(next(token for token in chosen if token is not None))

    # What the harness asks a model about itself.

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the results record beside the scores."""
        import memlm

        config = self.model.config
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "memlm_version": memlm.__version__,
            "memory": config.memory,
            "segment_length": config.segment_length,
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text; a start token the text already begins with is not given twice."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        start = self.tokenizer.decode([self._prefix])
        if add_special_tokens is None and start and string.startswith(start):
            special = False
        given = {} if special is None else {"add_special_tokens": special}
        return list(self.tokenizer.encode(string, verbose=False, **given))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the tokenizer's chat template writes it."""
        from jinja2 import TemplateError

        settings = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, **settings))
        except TemplateError:
            # Some templates know no system message; the harness leaves it out for them.
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            return str(self.tokenizer.apply_chat_template(rest, **settings))

    # The three kinds of requests. `loglikelihood` itself is the harness's: it tokenises, and calls
    # `_loglikelihood_tokens`.

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding says it) of every continuation."""

        def done(index: int, found: tuple[float, bool]) -> None:
            if requests[index][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[index][0], found)

        return self._likelihoods([request[1:] for request in requests], done, disable_tqdm)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole documents, each after one prefix token."""

        def done(index: int, found: tuple[float, bool]) -> None:
            self.cache_hook.add_partial("loglikelihood_rolling", requests[index].args, found[0])

        pairs = [((), self.tok_encode(request.args[0])) for request in requests]
        return [found for found, _ in self._likelihoods(pairs, done, disable_tqdm)]

    @torch.no_grad()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model says after every context, up to a stop string, the end token or a limit."""
        answers: list[str] = [""] * len(requests)
        alike: dict[str, list[TokenRequest]] = {}
        ways: dict[str, Decoding] = {}
        for index, request in enumerate(requests):
            context, given = request.args
            name = json.dumps(given, sort_keys=True, default=str)
            ways.setdefault(name, decoding_of(given, self.max_gen_toks))
            ids = np.array(self.tok_encode(context) or [self._prefix], dtype=np.int64)
            alike.setdefault(name, []).append(TokenRequest(index, ids, self._whole(ids), ids[:0]))
        plans = {name: families_of(rows) for name, rows in alike.items()}
        families = [family for plan in plans.values() for family in plan]
        with _bar(families, "generating", disable_tqdm) as bar:
            for name, plan in plans.items():
                for rows, state in self._groups(plan, bar):
                    said = self._continue([row.rest for row in rows], state, ways[name])
                    for row, answer in zip(rows, said, strict=True):
                        answers[row.index] = answer
                        key = requests[row.index].args
                        self.cache_hook.add_partial("generate_until", key, answer)
                        bar.update(len(row.rest))
        return answers

    # Streaming.

    @torch.no_grad()
    def _likelihoods(
        self,
        pairs: Sequence[Pair],
        done: Callable[[int, tuple[float, bool]], None],
        disable_tqdm: bool,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, greedy) of (context, continuation) in tokens; `done` is told of each at once."""
        results = [(0.0, True)] * len(pairs)
        rows = []
        for index, (context, continuation) in enumerate(pairs):
            targets = np.array(continuation, dtype=np.int64)
            before = np.array(context if len(context) else [self._prefix], dtype=np.int64)
            if len(targets):
                ids = np.concatenate([before, targets[:-1]])
                rows.append(TokenRequest(index, ids, self._whole(before), targets))
            else:
                done(index, results[index])
        families = families_of(rows)
        with _bar(families, "scoring", disable_tqdm) as bar:
            for some, state in self._groups(families, bar):
                for row, found in zip(some, self._score(some, state, bar), strict=True):
                    results[row.index] = found
                    done(row.index, found)
        return results

    def _whole(self, context: Ids) -> int:
        """How many tokens of a context are read as whole segments. Its last token always stays open,
        as it predicts what follows."""
        length = self.model.segment_length
        return (len(context) - 1) // length * length

    def _groups(
        self, families: list[list[TokenRequest]], bar: tqdm
    ) -> Iterator[tuple[list[TokenRequest], MemoryState]]:
        """Read the whole segments of each family once; yield its rows, in batches, with their states."""
        for some in _chunks(families, self.batch_size):
            state = self._read([family[0].ids[: family[0].whole] for family in some], bar)
            members = [(row, which) for which, family in enumerate(some) for row in family]
            members.sort(key=lambda member: -len(member[0].rest))
            for batch in _chunks(members, self.batch_size):
                yield [row for row, _ in batch], state.select([which for _, which in batch])

    def _read(self, prefixes: Sequence[Ids], bar: tqdm) -> MemoryState:
        """The state after each prefix, which is whole segments, read a segment of every row at a time."""
        length = self.model.segment_length

        def segments() -> Iterator[Segment]:
            for start in range(0, max(map(len, prefixes)), length):
                pieces = [prefix[start : start + length] for prefix in prefixes]
                yield Segment(*self._padded(pieces))
                bar.update(sum(map(len, pieces)))

        return self.model.read(segments(), self.model.init_state(len(prefixes)))

    def _score(
        self, rows: Sequence[TokenRequest], state: MemoryState, bar: tqdm
    ) -> list[tuple[float, bool]]:
        """Predict every row's targets from its state, a segment at a time."""
        length = self.model.segment_length
        totals = np.zeros(len(rows))
        greedy = np.ones(len(rows), dtype=bool)
        ids, mask = self._padded([row.rest for row in rows])
        # Hidden states in place of logits: the head is for the positions that have a target.
        windows = self.model.windows(
            ids,
            mask,
            memory_state=state,
            bptt_depth=1,
            write=ids.shape[1] > length,
            head=torch.nn.Identity(),
        )
        for number, read in enumerate(windows):
            start = number * length
            # Row, column and target of each prediction that is made here and counts.
            found = []
            for which, row in enumerate(rows):
                first = len(row.rest) - len(row.targets)
                at = np.arange(max(first, start), min(len(row.rest), start + length))
                found.append((np.full_like(at, which), at - start, row.targets[at - first]))
            where, columns, targets = map(np.concatenate, zip(*found, strict=True))
            hidden = read.logits[self._tensor(where), self._tensor(columns)]
            likelihood, best = self._predictions(hidden, targets)
            np.add.at(totals, where, likelihood)
            np.logical_and.at(greedy, where, best)
            bar.update(sum(min(max(len(row.rest) - start, 0), length) for row in rows))
        return [(float(total), bool(all_)) for total, all_ in zip(totals, greedy, strict=True)]

    def _predictions(
        self, hidden: Tensor, targets: Ids
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Log-likelihood of each target (N,) after hidden states (N, D), and whether no token is
        likelier."""
        likelihoods, best = [], []
        for start in range(0, len(targets), POSITIONS):
            at = slice(start, start + POSITIONS)
            some = self.model.backbone.logits(hidden[at].unsqueeze(0)).squeeze(0)
            some = some.to(torch.promote_types(some.dtype, torch.float32))
            wanted = self._tensor(targets[at])
            chosen = some.gather(1, wanted[:, None]).squeeze(1) - some.logsumexp(dim=1)
            likelihoods.append(chosen.cpu().double().numpy())
            best.append((some.argmax(dim=1) == wanted).cpu().numpy())
        return np.concatenate(likelihoods), np.concatenate(best)

    def _continue(
        self, prompts: Sequence[Ids], state: MemoryState, decoding: Decoding
    ) -> list[str]:
        """What the model says after the open rest of each context."""
        ids, mask = self._padded(prompts, left=True)
        ends = self._ends()
        pad = self.tokenizer.pad_token_id
        stopping = _StopStrings(self.tokenizer, decoding.stops, ids.shape[1])
        said = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask.to(ids.dtype),
            memory_state=state,
            max_new_tokens=decoding.limit,
            eos_token_id=ends,
            pad_token_id=self.eot_token_id if pad is None else pad,
            stopping_criteria=StoppingCriteriaList([stopping] if decoding.stops else []),
            **decoding.options,
        )
        answers = []
        for row in said[:, ids.shape[1] :].tolist():
            end = next((i for i, token in enumerate(row) if token in ends), len(row))
            text = self.tokenizer.decode(row[:end], skip_special_tokens=True)
            for stop in decoding.stops:
                text = text.split(stop, 1)[0]
            answers.append(text)
        return answers

    def _ends(self) -> list[int]:
        """Tokens that end an answer: the tokenizer's, and the generation configuration's (a turn's end)."""
        given = getattr(self.model.generation_config, "eos_token_id", None)
        more = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
        return sorted({self.eot_token_id, *map(int, more)})

    def _padded(self, pieces: Sequence[Ids], left: bool = False) -> tuple[Tensor, Tensor | None]:
        """(B, T) ids and the mask of real tokens; None where all are."""
        # Padding is masked everywhere, so any id serves.
        ids, mask = pad_rows(pieces, left=left)
        return self._tensor(ids), None if mask.all() else self._tensor(mask)

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)


class _StopStrings(StoppingCriteria):
    """A row is done when what it has said, its prompt not counted, holds a stop string."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], start: int) -> None:
        self.tokenizer = tokenizer
        self.stops = stops
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        # Special tokens stay in: a task may stop at the end of a turn by its text.
        said = self.tokenizer.batch_decode(input_ids[:, self.start :])
        done = [any(stop in text for stop in self.stops) for text in said]
        return torch.tensor(done, device=input_ids.device)


def _chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _bar(families: list[list[TokenRequest]], what: str, disable: bool) -> tqdm:
    """A bar over tokens: a request may have ten of them or a million."""
    total = sum(family[0].whole + sum(len(row.rest) for row in family) for family in families)
    return tqdm(total=total, unit="tok", unit_scale=True, desc=f"memlm {what}", disable=disable)
