"""A model whose accuracy is known: it keeps what it read and answers with the symbolic solver."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from memlm.segment import Segment
from memlm.tasks import babi
from memlm.tasks.babilong import QUESTION_TEMPLATE

_FACT = re.compile(
    r"(?:[A-Z][a-z]+ (?:moved|went|went back|journeyed|travelled) to the \w+\.)"
    r"|(?:[A-Z][a-z]+ (?:got|grabbed|took|picked up|dropped|left|discarded|put down) the \w+"
    r"(?: there)?\.)"
)
_QUESTION = re.compile(r"Where [^?.]*\?$")


@dataclass
class Remembered:
    """The tokens read so far, one tuple per row."""

    rows: list[tuple[int, ...]]

    def detach(self) -> Remembered:
        return self

    def select(self, rows: Sequence[int]) -> Remembered:
        return Remembered([self.rows[row] for row in rows])

    @classmethod
    def cat(cls, states: Sequence[Remembered]) -> Remembered:
        return cls([row for state in states for row in state.rows])


class SolvingModel(nn.Module):
    """Obeys the contract of MemLMForCausalLM and checks that its caller does.

    `span` is how many tokens it remembers; `fail_at` the call that is interrupted.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        segment_length: int = 32,
        span: int | None = None,
        fail_at: int | None = None,
        question_segment: str = "open",
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(20.0))
        self.config = SimpleNamespace(
            segment_length=segment_length,
            question_template=QUESTION_TEMPLATE,
            question_segment=question_segment,
        )
        self.device = torch.device("cpu")
        self.scheduler = SimpleNamespace(reads_ahead=lambda: 1)
        self.tokenizer = tokenizer
        self.span = span
        self.fail_at = fail_at
        self.calls = 0
        self.batches: list[tuple[int, int]] = []

    def init_state(self, batch_size: int) -> Remembered:
        return Remembered([()] * batch_size)

    def read(
        self,
        segments: Iterable[Segment],
        memory_state: Remembered,
        writes: object = None,
    ) -> Remembered:
        assert not self.training and not torch.is_grad_enabled()
        rows = memory_state.rows
        for segment in segments:
            self.calls += 1
            if self.calls == self.fail_at:
                raise KeyboardInterrupt
            self.batches.append(tuple(segment.ids.shape))
            real = torch.ones_like(segment.ids).bool() if segment.mask is None else segment.mask
            sizes = real.sum(dim=1).tolist()
            whole = {0, self.config.segment_length}
            # Only whole segments may be read, unless the question has a segment of its own.
            assert self.config.question_segment == "own" or set(sizes) <= whole
            assert max(sizes) == segment.ids.shape[1]
            assert all(bool(row[:size].all()) for row, size in zip(real, sizes, strict=True))
            rows = [
                (*known, *ids[:size])
                for known, ids, size in zip(rows, segment.ids.tolist(), sizes, strict=True)
            ]
        return Remembered(rows)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        memory_state: Remembered | None,
        max_new_tokens: int,
        do_sample: bool,
        eos_token_id: list[int],
        pad_token_id: int,
    ) -> Tensor:
        assert not do_sample and bool(attention_mask[:, -1].all())
        before = memory_state.rows if memory_state else [()] * len(input_ids)
        new = torch.full((len(input_ids), max_new_tokens), pad_token_id)
        for row, (known, ids, mask) in enumerate(
            zip(before, input_ids, attention_mask.bool(), strict=True)
        ):
            tokens = [*known, *ids[mask].tolist()]
            answer = self._answer(tokens if self.span is None else tokens[-self.span :])
            said = [*self.tokenizer(f" {answer}")["input_ids"], eos_token_id[0]][:max_new_tokens]
            new[row, : len(said)] = torch.tensor(said)
        return torch.cat([input_ids, new], dim=1)

    def _answer(self, tokens: list[int]) -> str:
        text = self.tokenizer.decode(tokens)
        question = _QUESTION.search(text)
        assert question is not None, text[-80:]
        try:
            return babi.solve(_FACT.findall(text), question.group(0))
        except ValueError:
            return "nowhere"
