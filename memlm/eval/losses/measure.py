"""Loss by position in long documents, and by how much the memory of the past lowers it.

A document is read segment by segment, as the model reads everything, and only one segment's logits
are held. The same segments are also read from an empty memory, so that the gain is a difference of
the same predictions. A prediction belongs to the position it is made at, the last one read: so in the
first segment, where nothing is remembered yet, the gain is exactly nothing.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from memlm.eval.log import Row, RunLog
from memlm.eval.losses.report import PerplexityReport, summarise
from memlm.eval.losses.texts import Text, choose_texts, notes_on
from memlm.eval.processes import in_one_process
from memlm.eval.provenance import fingerprint, versions, without_training
from memlm.tasks.babilong import format_length, parse_length
from memlm.tasks.haystack import Haystack, Split, check_source

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from memlm.modeling import MemLMForCausalLM
    from memlm.output import MemLMOutput

DOCUMENTS = "documents.jsonl"


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
    long the independent windows are in which a model without memory reads. With `out` every batch's
    documents are appended to `documents.jsonl`, from where a later call with the same settings goes on.
    ValueError names what cannot work.
    """
    in_one_process("perplexity")
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
        # Before the model is wrapped, which gives all its modules one mode.
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
            # The whole batch again, as before: with other rows beside it, a row could round differently.
            rows = _measure(wrapped, [texts[i] for i in batch], edges, bar.update)
            log.append([r for r in rows if not log.has(r["document"], r["digest"])])
        rows = [log.rows[text.index, text.digest] for text in texts]
        report = replace(
            summarise(rows, edges, size, notes_on(texts, documents), settings),
            versions=versions(wrapped),
        )
    if out is None:
        return report
    files = (Path(out) / DOCUMENTS, *report.save(out))
    return replace(report, files=tuple(map(str, files)))


@dataclass(frozen=True)
class SegmentLosses:
    """Nats of the predictions made in one segment of every row; NaN where there is none.

    loss (B, T) float64 after what was read; alone (B, T) from an empty memory, None when not asked for.
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
    longest, size = int(lengths.max()), int(model.config.segment_length)
    if longest == 1:
        return
    # A segment that is only a last token would predict nothing.
    width = longest - 1 if (longest - 1) % size == 0 else longest
    # One token more than is read: the last position of a segment predicts the next's first.
    known = np.zeros((len(rows), width + 1), dtype=np.int64)
    for held, row in zip(known, rows, strict=True):
        held[: len(row)] = row[: len(held)]
    columns = np.arange(width)
    aimed = columns < lengths[:, None] - 1
    ids = torch.from_numpy(known).to(model.device)
    real = torch.from_numpy(columns < lengths[:, None]).to(model.device)
    read = model.windows(ids[:, :-1], real, bptt_depth=1)
    # Without writing, every segment reads an empty memory; the first segment does so in any case.
    apart = (
        model.windows(ids[:, size:-1], real[:, size:], bptt_depth=1, write=False)
        if baseline and width > size
        else None
    )

    def losses(windows: Iterator[MemLMOutput], at: slice) -> NDArray[np.float64]:
        # Nothing of the output is kept: two segments' logits would be held while the next is read.
        with torch.no_grad():
            logits = cast("Tensor", next(windows).logits)
            return _cross_entropy(logits, ids[:, 1:][:, at], aimed[:, at])

    for start in range(0, width, size):
        at = slice(start, start + size)
        loss = alone = losses(read, at)
        if apart is not None and start > 0:
            alone = losses(apart, at)
        yield SegmentLosses(start, loss, alone if baseline else None)
        if progress is not None:
            progress(int(np.clip(lengths - start, 0, size).sum()))


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
    """Sum the losses of a batch of documents bin by bin: one row of the log per document."""
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
    """Return a model that reads in segments; one without memory reads in independent windows."""
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
            f"segment_length=None, but model={type(model).__name__} does not read in segments; "
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
