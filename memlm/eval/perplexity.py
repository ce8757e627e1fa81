"""Loss by position in long documents, and how much of it the memory of the past takes away.

A document is read segment by segment, as the model reads everything; of each segment alone are logits
ever held. Beside it the same segments are read from an empty memory, so that the gain is a difference of
the same predictions. A prediction belongs to the position it is made at, the last one read: so in the
first segment, where nothing is remembered yet, the gain is exactly nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from memlm.tasks.babilong import format_length, parse_length
from memlm.tasks.haystack import Haystack, Split, check_source
from memlm.eval.running.log import Row, RunLog
from memlm.eval.running.provenance import fingerprint, versions, without_training
from memlm.tokens import encode_with_spans

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from memlm.modeling import MemLMForCausalLM

DOCUMENTS = "documents.jsonl"
SUMMARY = "perplexity.json"
PICTURE = "perplexity.png"
# Sentences tokenised at a time: a document is read no further than it is used.
_SENTENCES = 256
_BLOCK = re.compile(r"(.*)#(\d+)")
# Student's t at 97.5%, by degrees of freedom; few documents are the rule here.
_T = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814)


@dataclass(frozen=True)
class Estimate:
    """A mean over documents with its 95% interval (Student's t); no interval from one document."""

    mean: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Estimate the mean of independent values, of which there is at least one."""
        count = len(values)
        mean = math.fsum(values) / count
        if count == 1:
            return cls(mean)
        spread = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        half = student_t(count - 1) * math.sqrt(spread / count)
        return cls(mean, mean - half, mean + half)

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.mean:.3f}{interval}"


def student_t(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t with `freedom` degrees of freedom."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    # Hill's expansion about the normal quantile: from ten degrees on true to four places.
    z = 1.959963985
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


@dataclass(frozen=True)
class Bin:
    """Predictions made at positions `start` to `end` - 1, in nats per token but for the bits.

    baseline: each segment read from an empty memory. gain: baseline less loss, paired by document.
    Both are None for a model without memories.
    """

    start: int
    end: int
    documents: int
    predictions: int
    loss: Estimate
    bits_per_byte: Estimate
    baseline: Estimate | None = None
    gain: Estimate | None = None


@dataclass(frozen=True)
class PerplexityReport:
    """Loss by position, over all documents of a run.

    change: the loss of the last bin less that of the second; gain_change: the same of the gain; both
    paired by document, None where there are no such bins. overall: a bin of all positions.
    """

    bins: list[Bin]
    overall: Bin
    change: Estimate | None
    gain_change: Estimate | None
    segment_length: int
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss."""
        return math.exp(self.overall.loss.mean)

    @property
    def verdict(self) -> str:
        """In plain words: does loss keep falling with position, and is the memory what lowers it?"""
        if self.change is None:
            told = "The documents are too short to tell: they end before a third bin of positions."
        else:
            by = (
                f"in the last bin ({_span(self.bins[-1])}) it is {self.change.mean:+.3f} nats against "
                f"the second ({_span(self.bins[1])})"
            )
            if self.change.low is None or self.change.high is None:
                told = f"One document cannot tell whether loss keeps falling; {by}."
            else:
                by += f", 95% interval {self.change.low:+.3f} to {self.change.high:+.3f}"
                if self.change.high < 0:
                    told = f"Loss keeps falling with position: {by}."
                elif self.change.low > 0:
                    told = f"Loss rises with position: {by}."
                else:
                    told = f"Loss neither falls nor rises beyond chance: {by}."
        if self.gain_change is None or self.change is None:
            return told
        gain = self.bins[-1].gain
        assert gain is not None
        told += f" There the memory of the past gains {gain} nats, "
        told += f"{self.gain_change.mean:+.3f} against the second bin"
        if self.gain_change.low is not None and self.gain_change.high is not None:
            told += f" ({self.gain_change.low:+.3f} to {self.gain_change.high:+.3f})"
        return told + "."

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `perplexity.json`."""
        return {
            "verdict": self.verdict,
            "perplexity": self.perplexity,
            "overall": asdict(self.overall),
            "bins": [asdict(found) for found in self.bins],
            "change": None if self.change is None else asdict(self.change),
            "gain_change": None if self.gain_change is None else asdict(self.gain_change),
            "segment_length": self.segment_length,
            "notes": self.notes,
            "settings": self.settings,
            "versions": self.versions,
        }

    def to_markdown(self) -> str:
        """Return a table of the bins, the verdict and the notes."""
        remembers = self.overall.gain is not None
        titles = ["positions", "segments", "documents", "nats per token", "bits per byte"]
        titles += ["without the past", "gain"] if remembers else []
        lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
        for found in [*self.bins, self.overall]:
            whole = found is self.overall
            cells = [
                "all" if whole else _span(found),
                "" if whole else self._segments(found),
                str(found.documents),
                str(found.loss),
                str(found.bits_per_byte),
            ]
            cells += [str(found.baseline), str(found.gain)] if remembers else []
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join([*lines, "", self.verdict, *(f"Note: {note}." for note in self.notes)])

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write `perplexity.json` and `perplexity.png`, each whole or not at all; return their paths."""
        from memlm.state import write_json

        folder = Path(directory)
        write_json(folder / SUMMARY, self.to_dict())
        plot_perplexity(self, folder / PICTURE)
        return [folder / SUMMARY, folder / PICTURE]

    def _segments(self, found: Bin) -> str:
        first = found.start // self.segment_length + 1
        last = (found.end - 1) // self.segment_length + 1
        return str(first) if first == last else f"{first}-{last}"


def _span(found: Bin) -> str:
    return f"{found.start}-{found.end - 1}"


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    haystack: str | os.PathLike[str] | Haystack = "builtin",
    length: str | int = "64k",
    documents: int = 8,
    *,
    bins: Sequence[int] | None = None,
    segment_length: int | None = None,
    seed: int = 0,
    batch_size: int = 4,
    split: Split = "eval",
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> PerplexityReport:
    """Measure `model`'s loss by position in `documents` documents of `length` tokens.

    haystack: a source, of which `split` is used. bins: the positions at which a new bin starts; None:
    the first segment, the second, the third and fourth, the next four and so on. segment_length: how
    long the independent windows are in which a model that is none of ours reads. With `out` every
    batch's documents are appended to `documents.jsonl`, from where a later call with the same settings
    goes on. ValueError names what cannot work.
    """
    tokens = parse_length(length)
    for name, value, least in (
        ("length", tokens, 2), ("documents", documents, 1), ("batch_size", batch_size, 1),
        ("seed", seed, 0),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if not isinstance(haystack, Haystack):
        check_source(haystack)
    elif split != "eval":
        raise ValueError(
            f"split={split!r} chooses a part of a source, but haystack is a Haystack, whose part is chosen "
            "already; leave split out, or name the source"
        )
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"out={os.fspath(out)!r} is a file; name a folder")
    with ExitStack() as stack:
        # Before it is wrapped, which gives all its modules one mode.
        stack.enter_context(without_training(model))
        wrapped = _wrap(model, segment_length)
        if wrapped is not model:
            stack.callback(wrapped.unload)
        size = int(wrapped.config.segment_length)
        edges = _edges(bins, size, tokens)
        if not isinstance(haystack, Haystack):
            haystack = Haystack.open(haystack, split)
        texts = choose_texts(haystack, tokenizer, tokens, documents, seed, split)
        highest = max(int(text.ids.max()) for text in texts)
        known = cast("Tensor", wrapped.get_input_embeddings().weight).shape[0]
        if highest >= known:
            raise ValueError(
                f"tokenizer makes token {highest}, but the model knows {known}; "
                "give the model's own tokenizer"
            )
        settings = {
            "kind": "perplexity",
            "model": fingerprint(wrapped),
            "segment_length": size,
            "haystack": haystack.source,
            "split": split,
            "length": format_length(tokens),
            "seed": seed,
            "bins": edges.tolist(),
        }
        log = RunLog(out, settings, ("document", "digest"), DOCUMENTS)
        _check_log(log, texts, out)
        stack.enter_context(log)
        wrapped.eval()
        batches = [
            range(start, min(start + batch_size, len(texts)))
            for start in range(0, len(texts), batch_size)
        ]
        pending = [b for b in batches if not all(log.has(i, texts[i].digest) for i in b)]
        bar = stack.enter_context(
            _bar(sum(len(texts[i].ids) for b in pending for i in b), progress)
        )
        for batch in pending:
            # The whole batch again, as before: other neighbours could round otherwise.
            rows = _measure(wrapped, [texts[i] for i in batch], edges, bar.update)
            log.append([r for r in rows if not log.has(r["document"], r["digest"])])
        rows = [log.rows[text.index, text.digest] for text in texts]
        report = replace(
            summarise(rows, edges, size, _notes(texts, documents), settings),
            versions=versions(wrapped),
        )
    if out is None:
        return report
    files = (Path(out) / DOCUMENTS, *report.save(out))
    return replace(report, files=tuple(map(str, files)))


# Reading.


@dataclass(frozen=True)
class SegmentLosses:
    """Nats of the predictions made in one segment of every row; NaN where there is none.

    loss (B, T) float64 behind what was read; alone (B, T) from an empty memory, None when not asked for.
    """

    start: int
    loss: NDArray[np.float64]
    alone: NDArray[np.float64] | None


def stream_losses(
    model: MemLMForCausalLM,
    rows: Sequence[NDArray[np.integer[Any]]],
    *,
    baseline: bool = True,
    progress: Callable[[int], object] | None = None,
) -> Iterator[SegmentLosses]:
    """Yield the loss of every prediction, segment by segment, of documents of any lengths (tokens,).

    Position t predicts the token at t + 1, across the borders of segments too, and the last position
    nothing. Holds one segment's logits at a time, whatever the documents' length. A row of one token has
    no prediction; `progress` is told the tokens read.
    """
    import torch

    lengths = np.array([len(row) for row in rows])
    if not len(rows) or lengths.min() < 1:
        raise ValueError(f"rows has lengths {lengths.tolist()}; give documents of a token or more")
    size = int(model.config.segment_length)
    empty = model.init_state(len(rows))
    state = empty
    with torch.no_grad():
        for start in range(0, int(lengths.max()) - 1, size):
            here = np.clip(lengths - start, 0, size)
            # One token more than is read: the last position of a segment predicts the next's first.
            known = np.zeros((len(rows), int(here.max()) + 1), dtype=np.int64)
            for held, row in zip(known, rows, strict=True):
                piece = row[start : start + len(held)]
                held[: len(piece)] = piece
            columns = np.arange(known.shape[1] - 1)
            real = torch.from_numpy(columns < here[:, None]).to(model.device)
            ids = torch.from_numpy(known).to(model.device)
            aimed = columns < (lengths - 1 - start)[:, None]
            read = model(ids[:, :-1], attention_mask=real, memory_state=state)
            loss = _cross_entropy(read.logits, ids[:, 1:], aimed)
            state = read.memory_state
            del read  # Or two segments' logits would be held while the next is read.
            alone = None
            if baseline and start == 0:
                alone = loss
            elif baseline:
                logits = model(
                    ids[:, :-1], attention_mask=real, memory_state=empty, write=False
                ).logits
                alone = _cross_entropy(logits, ids[:, 1:], aimed)
                del logits
            yield SegmentLosses(start, loss, alone)
            if progress is not None:
                progress(int(here.sum()))


def _cross_entropy(
    logits: Tensor, targets: Tensor, aimed: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Nats of each target (B, T), NaN where `aimed` says there is none."""
    import torch
    import torch.nn.functional as F

    # A row at a time: the wider copy is then a row's.
    wide = torch.promote_types(logits.dtype, torch.float32)
    found = [
        F.cross_entropy(row.to(wide), target, reduction="none").double().cpu().numpy()
        for row, target in zip(logits, targets, strict=True)
    ]
    return np.where(aimed, np.stack(found), np.nan)


def _measure(
    model: MemLMForCausalLM,
    texts: Sequence[Text],
    edges: NDArray[np.int64],
    progress: Callable[[int], object],
) -> list[Row]:
    """Sum the losses of a batch of documents bin by bin: a row of the log each."""
    began = time.perf_counter()
    remembers = bool(model.config.memory)
    shape = (len(texts), len(edges))
    counts, held = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    nats, alone = np.zeros(shape), np.zeros(shape)
    pieces = stream_losses(
        model, [text.ids for text in texts], baseline=remembers, progress=progress
    )
    for piece in pieces:
        at = piece.start + np.arange(piece.loss.shape[1])
        where = np.searchsorted(edges, at, side="right") - 1
        for row, text in enumerate(texts):
            aimed = ~np.isnan(piece.loss[row])
            here = where[aimed]
            np.add.at(counts[row], here, 1)
            np.add.at(nats[row], here, piece.loss[row][aimed])
            np.add.at(held[row], here, text.sizes[at[aimed] + 1])
            if piece.alone is not None:
                np.add.at(alone[row], here, piece.alone[row][aimed])
    seconds = (time.perf_counter() - began) / len(texts)
    return [
        {
            "document": text.index,
            "name": text.name,
            "digest": text.digest,
            "tokens": len(text.ids),
            "joined": text.joined,
            "seconds": seconds,
            "predictions": counts[row].tolist(),
            "nats": nats[row].tolist(),
            "baseline_nats": alone[row].tolist() if remembers else None,
            "bytes": held[row].tolist(),
        }
        for row, text in enumerate(texts)
    ]


def _wrap(model: PreTrainedModel, segment_length: int | None) -> MemLMForCausalLM:
    """Return a model that reads in segments; another's reads in independent windows."""
    from memlm.modeling import MemLMForCausalLM

    if isinstance(model, MemLMForCausalLM):
        own = int(model.config.segment_length)
        if segment_length not in (None, own):
            raise ValueError(
                f"segment_length={segment_length} is not the model's own {own}; leave it out"
            )
        return model
    if segment_length is None:
        raise ValueError(
            f"segment_length=None, but model={type(model).__name__} has no segments of its own; "
            "give segment_length=N to read it in independent windows of N tokens"
        )
    return MemLMForCausalLM.from_base(model, memory="none", segment_length=segment_length)


def _edges(bins: Sequence[int] | None, segment: int, tokens: int) -> NDArray[np.int64]:
    """Return where bins start; the last prediction is made at the last position but one."""
    if bins is None:
        doublings = (segment * 2**power for power in itertools.count())
        starts = [0, *itertools.takewhile(lambda start: start < tokens - 1, doublings)]
    else:
        starts = [0, *bins] if not bins or bins[0] != 0 else list(bins)
        if any(a >= b for a, b in itertools.pairwise(starts)) or starts[-1] >= tokens - 1:
            raise ValueError(
                f"bins={list(bins)} must be rising positions below length - 1 = {tokens - 1}"
            )
    return np.array(starts, dtype=np.int64)


# Texts.


@dataclass(frozen=True)
class Text:
    """A document to measure. ids (tokens,); sizes (tokens,) bytes of text of each; joined: of how many
    whole documents it is made."""

    index: int
    name: str
    ids: NDArray[np.int32]
    sizes: NDArray[np.int64]
    joined: int = 1

    @property
    def digest(self) -> str:
        return hashlib.blake2b(self.ids.tobytes(), digest_size=8).hexdigest()


def choose_texts(
    haystack: Haystack,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    count: int,
    seed: int,
    split: str = "eval",
) -> list[Text]:
    """Take the first `tokens` tokens of documents that have as many, in the order of the seed.

    When there are too few of those, the shorter ones are joined whole and in order, each used once;
    fewer texts than `count` when those run out, ValueError when there is not even one.
    """
    pieces = _rejoined(haystack)
    order = np.random.default_rng([seed, 0]).permutation(len(pieces)).tolist()
    texts: list[Text] = []
    long: set[int] = set()
    for number in order:
        if len(texts) == count:
            return texts
        name, sentences = pieces[number]
        # No token is made of nothing: this many bytes are needed, and counting them costs little.
        if sum(len(sentence.encode()) + 1 for sentence in sentences) < tokens:
            continue
        ids, sizes = _tokenised(sentences, tokenizer, tokens)
        if len(ids) == tokens:
            texts.append(Text(len(texts), name, ids, sizes))
            long.add(number)
    held, names, parts = 0, [], []
    most = 0
    for number, (name, sentences) in enumerate(pieces):
        if len(texts) == count:
            return texts
        if number in long:
            continue
        # What is left of a document whose beginning filled a text is dropped: texts begin with one.
        parts.append(_tokenised(sentences, tokenizer, tokens - held))
        names.append(name)
        held += len(parts[-1][0])
        most = max(most, held)
        if held == tokens:
            ids, sizes = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            texts.append(Text(len(texts), names[0], ids, sizes, len(names)))
            held, names, parts = 0, [], []
    if not texts:
        raise ValueError(
            f"haystack {haystack.source!r} has {most} tokens in split {split!r}, fewer than "
            f"length={format_length(tokens)}; give a shorter length, a longer text or split='all'"
        )
    return texts


def _rejoined(haystack: Haystack) -> list[tuple[str, list[str]]]:
    """Return the documents, with neighbouring blocks of one file made one again."""
    joined: list[tuple[str, list[str]]] = []
    before: tuple[str, int] | None = None
    for document in haystack.documents:
        match = _BLOCK.fullmatch(document.name)
        block = (match[1], int(match[2])) if match else None
        if block and before and block == (before[0], before[1] + 1):
            joined[-1][1].extend(document.sentences)
        else:
            joined.append((document.name, list(document.sentences)))
        before = block
    return joined


def _tokenised(
    sentences: Iterable[str], tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the first `limit` ids of a text and the bytes of each, both (tokens,)."""
    ids: list[int] = []
    sizes: list[int] = []
    pending = iter(sentences)
    while len(ids) < limit:
        texts = [f" {sentence}" for sentence in itertools.islice(pending, _SENTENCES)]
        if not texts:
            break
        for text, found, spans in zip(texts, *encode_with_spans(tokenizer, texts), strict=True):
            ids += found
            sizes += _bytes_of(text, len(found), spans)
    return np.array(ids[:limit], dtype=np.int32), np.array(sizes[:limit], dtype=np.int64)


def _bytes_of(text: str, count: int, spans: Sequence[tuple[int, int]] | None) -> list[int]:
    """Share the bytes of a text among its `count` tokens, none counted twice or left out."""
    if not count:
        return []
    if spans is None:
        # A tokenizer that cannot say what its tokens cover: all alike.
        ends = [len(text.encode()) * (number + 1) // count for number in range(count)]
    else:
        before = [0, *itertools.accumulate(len(character.encode()) for character in text)]
        # Tokens that share a character all end behind it; its bytes go to the first of them.
        ends = list(itertools.accumulate((before[end] for _, end in spans), max))
        ends[-1] = before[-1]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _notes(texts: Sequence[Text], wanted: int) -> list[str]:
    notes = []
    joined = [text.joined for text in texts if text.joined > 1]
    if joined:
        notes.append(
            f"{len(joined)} of {len(texts)} documents are joined from whole shorter ones in order, "
            f"{sum(joined) / len(joined):.1f} each, as too few are long enough"
        )
    if len(texts) < wanted:
        notes.append(f"the text suffices for {len(texts)} documents of the {wanted} asked for")
    return notes


# Summing up.


def summarise(
    rows: Sequence[Row],
    edges: NDArray[np.int64],
    segment_length: int,
    notes: Sequence[str] = (),
    settings: dict[str, Any] | None = None,
) -> PerplexityReport:
    """Average rows of the log over documents, bin by bin; every document weighs the same."""
    longest = max(row["tokens"] for row in rows) - 1
    ends = [*edges[1:].tolist(), longest]
    found = []
    for number, (start, end) in enumerate(zip(edges.tolist(), ends, strict=True)):
        bin_ = _bin(rows, [number], start, min(end, longest))
        if bin_ is not None:
            found.append(bin_)
    overall = _bin(rows, range(len(edges)), 0, longest)
    if overall is None:
        raise ValueError("documents of one token predict nothing; give longer ones")
    last = len(found) - 1
    change = gain_change = None
    if last >= 2:
        losses = [(_mean(row, 1, "nats"), _mean(row, last, "nats")) for row in rows]
        change = _paired(losses)
        if overall.gain is not None:
            gain_change = _paired([(_gain(row, 1), _gain(row, last)) for row in rows])
    return PerplexityReport(
        found,
        overall,
        change,
        gain_change,
        segment_length,
        list(notes),
        settings or {},
    )


def _bin(rows: Sequence[Row], numbers: Sequence[int], start: int, end: int) -> Bin | None:
    def total(row: Row, key: str) -> float:
        return math.fsum(row[key][number] for number in numbers)

    there = [row for row in rows if total(row, "predictions")]
    if not there:
        return None
    counts = [total(row, "predictions") for row in there]
    nats = [total(row, "nats") for row in there]
    bits = [
        value / math.log(2) / max(total(row, "bytes"), 1)
        for row, value in zip(there, nats, strict=True)
    ]
    baseline = gain = None
    if all(row["baseline_nats"] is not None for row in there):
        alone = [total(row, "baseline_nats") for row in there]
        baseline = Estimate.of([a / n for a, n in zip(alone, counts, strict=True)])
        gain = Estimate.of([(a - v) / n for a, v, n in zip(alone, nats, counts, strict=True)])
    loss = Estimate.of([value / n for value, n in zip(nats, counts, strict=True)])
    return Bin(start, end, len(there), int(sum(counts)), loss, Estimate.of(bits), baseline, gain)


def _mean(row: Row, number: int, key: str) -> float | None:
    count = row["predictions"][number]
    return row[key][number] / count if count else None


def _gain(row: Row, number: int) -> float | None:
    alone, loss = _mean(row, number, "baseline_nats"), _mean(row, number, "nats")
    return None if alone is None or loss is None else alone - loss


def _paired(pairs: Sequence[tuple[float | None, float | None]]) -> Estimate | None:
    """Estimate second less first, over the documents that have both."""
    differences = [b - a for a, b in pairs if a is not None and b is not None]
    return Estimate.of(differences) if differences else None


def plot_perplexity(report: PerplexityReport, path: str | os.PathLike[str]) -> None:
    """Draw loss by position, with and without the past, and below it the gain; intervals shaded."""
    # Without pyplot: no window system is looked for and no global figure is left behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from memlm.state import write_atomically

    remembers = report.overall.gain is not None
    figure = Figure(figsize=(7.0, 6.0 if remembers else 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        2 if remembers else 1, 1, sharex=True, squeeze=False,
        height_ratios=[2, 1] if remembers else [1],
    )[:, 0]  # fmt: skip
    at = list(range(len(report.bins)))

    def draw(panel: Any, values: Sequence[Estimate | None], label: str, **style: Any) -> None:
        known = [value for value in values if value is not None]
        (line,) = panel.plot(at, [value.mean for value in known], label=label, **style)
        low = [value.mean if value.low is None else value.low for value in known]
        high = [value.mean if value.high is None else value.high for value in known]
        panel.fill_between(at, low, high, alpha=0.15, color=line.get_color(), linewidth=0)

    name = "with its memory" if remembers else "independent windows"
    draw(panels[0], [b.loss for b in report.bins], name, marker="o")
    if remembers:
        style = {"marker": "s", "color": "grey", "linestyle": "--"}
        draw(
            panels[0],
            [b.baseline for b in report.bins],
            "each segment from an empty memory",
            **style,
        )
        draw(panels[1], [b.gain for b in report.bins], "gain", marker="o", color="tab:green")
        panels[1].axhline(0, color="black", linewidth=0.8)
        panels[1].set_ylabel("gain from the past,\nnats per token")
    panels[0].set_ylabel("loss, nats per token")
    panels[0].legend(loc="best")
    count = report.overall.documents
    alike = "" if report.bins[-1].documents == count else "up to "
    shaded = "; shaded: 95% intervals over documents" if count > 1 else ""
    panels[0].set_title(
        f"{count} document{'s' * (count > 1)} of {alike}"
        f"{format_length(report.overall.end + 1)} tokens{shaded}",
        fontsize=10,
    )
    panels[-1].set_xlabel("position in the document, tokens")
    # The last prediction is made at the last position but one; the document ends behind that.
    ends = [b.end + (b.end == report.overall.end) for b in report.bins]
    labels = [
        f"{format_length(b.start) if b.start else 0} to {format_length(end)}"
        for b, end in zip(report.bins, ends, strict=True)
    ]
    many = len(labels) > 7
    panels[-1].set_xticks(at, labels, rotation=35 if many else 0, ha="right" if many else "center")
    for panel in panels:
        panel.grid(alpha=0.3)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


# Around the run.


def _check_log(log: RunLog, texts: Sequence[Text], out: str | os.PathLike[str] | None) -> None:
    """Refuse rows that were made from another text or by another tokenizer."""
    known = {row["document"]: row["digest"] for row in log.rows.values()}
    for text in texts:
        if known.get(text.index, text.digest) != text.digest:
            path = Path(out or "", DOCUMENTS)
            raise ValueError(
                f"{str(path)!r} has document {text.index} of other tokens than this run's "
                f"{text.name!r}; use another folder, or the text and tokenizer of before"
            )


def _bar(total: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="tok", unit_scale=True, disable=not progress, mininterval=0.5)
