"""Segments: a batch of rows cut into pieces of `segment_length` tokens.

Labels are shifted once, over the whole row, before anything is cut: otherwise the last token of every
segment would lose its target. Rows are packed to the left first, so that padding, wherever it stood,
never moves a segment boundary. The short segment is a row's last, or its first where that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
# Which segments of a document are full: those from its "left" end, the last one being short, or from its
# "right" end, the first one being short.
Alignment = Literal["left", "right"]
# The arguments by which flattening collators tell the documents in a row apart (`documents_in`).
BORDERS = (
    "position_ids",
    "seq_idx",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)


@dataclass(frozen=True)
class Segment:
    """One segment of every row of a batch.

    ids (B, T) long. mask (B, T) bool, True on real tokens, real tokens first; None when every token is
    real, which spares the attention a mask. labels (B, T) long, already shifted, -100 where there is
    no target; None when no loss is wanted. num_targets: how many targets there are, where that is known.
    auxiliary (B,) bool: rows whose auxiliary losses count here; None when they do in all.
    """

    ids: Tensor
    mask: Tensor | None = None
    labels: Tensor | None = None
    num_targets: int | None = None
    auxiliary: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("mask", "labels"):
            value = getattr(self, name)
            if value is not None and value.shape != self.ids.shape:
                raise ValueError(
                    f"Segment {name} has shape {tuple(value.shape)}, but ids have shape "
                    f"{tuple(self.ids.shape)}; give both the same shape"
                )

    @property
    def active(self) -> Tensor | None:
        """(B,) bool: rows with at least one real token here; None when that is all of them."""
        return None if self.mask is None else self.mask.any(dim=1)

    @property
    def counted(self) -> Tensor | None:
        """(B,) bool: rows with a real token whose auxiliary losses count; None when that is all of them."""
        if self.auxiliary is None:
            return self.active
        return self.auxiliary if self.mask is None else self.auxiliary & self.mask.any(dim=1)

    @property
    def rows(self) -> Tensor | int:
        """How many rows have a real token here; a tensor where the device has to count them."""
        return self.ids.shape[0] if self.mask is None else self.mask.any(dim=1).sum()


def shift_labels(labels: Tensor) -> Tensor:
    """The label at t becomes that of the token at t + 1; the last has none. (B, N) -> (B, N)."""
    return torch.cat([labels[:, 1:], labels.new_full((labels.shape[0], 1), IGNORE)], dim=1)


@dataclass(frozen=True)
class Packing:
    """Where the documents of a batch (B, N) stand, and how to give each its own row, packed to the left.

    source (D, length): the place in the batch, counted through all its rows, that each packed place came
    from; 0 where mask (D, length) says that it holds no token. shape: (B, N).
    """

    source: Tensor
    mask: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, attention_mask: Tensor, documents: Tensor | None = None) -> Packing:
        """Find the packing of `attention_mask` (B, N), whatever its pattern of zeros.

        documents (B, N): the number of each token's document, counted from 0 in the order of reading
        (`documents_in`); None when every row is one document, which may then be without a token.
        """
        real = attention_mask.to(torch.bool)
        batch, total = real.shape
        places = real.flatten().nonzero().squeeze(1)
        number = places // total if documents is None else documents.flatten()[places]
        count = batch if documents is None else int(number.max()) + 1
        lengths = number.new_zeros(count).index_add_(0, number, torch.ones_like(number))
        begins = lengths.cumsum(0) - lengths
        source = places.new_zeros(count, int(lengths.max()))
        at = torch.arange(source.shape[1], device=real.device)
        source[number, torch.arange(len(places), device=real.device) - begins[number]] = places
        return cls(source, at < lengths.unsqueeze(1), (batch, total))

    @property
    def length(self) -> int:
        """Tokens of the longest document."""
        return self.source.shape[1]

    def pack(self, values: Tensor, fill: int) -> Tensor:
        """(B, N) -> (D, length), a document per row, `fill` after its end."""
        return values.flatten()[self.source].masked_fill(~self.mask, fill)

    def to_the_right(self, segment_length: int) -> Packing:
        """Each document with its short segment first, which padding at its end makes full."""
        lengths = self.mask.sum(dim=1, keepdim=True)
        short = lengths % segment_length
        gap = (segment_length - short) % segment_length
        total = -(-self.length // segment_length) * segment_length
        at = torch.arange(total, device=self.mask.device)
        mask = (at < short) | ((at >= short + gap) & (at < lengths + gap))
        origin = torch.where(at < short, at, at - gap).clamp(0, self.length - 1)
        return replace(self, source=self.source.gather(1, origin).masked_fill(~mask, 0), mask=mask)

    def unpack(self, values: Tensor, fill: int) -> Tensor:
        """(D, length) -> (B, N), the reverse of `pack`."""
        places = self.places()
        return values.flatten()[places.clamp(min=0)].masked_fill(places < 0, fill)

    def places(self) -> Tensor:
        """(B, N): the place, counted through all packed rows, that each token went to; -1 on padding."""
        found = self.source.new_full((self.shape[0] * self.shape[1],), -1)
        found[self.source[self.mask]] = self.mask.flatten().nonzero().squeeze(1)
        return found.view(self.shape)


def documents_in(
    ids: Tensor,
    mask: Tensor | None,
    *,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: Tensor | int | None = None,
    max_length_k: Tensor | int | None = None,
) -> Tensor | None:
    """The documents that follow one another in rows (B, N), numbered as `Packing.of` takes them.

    mask (B, N) bool: the real tokens, None when all are. Each of the others says in its own way where a
    document begins, as transformers' flattening collators do: position_ids (B, N) or (1, N) fall back there
    instead of going on by one; seq_idx (B, N) changes; cu_seq_lens_q (D + 1,) are the borders in a single
    row, and its companions repeat it. None when every row is one document. ValueError when they contradict
    each other, or positions leave some out.
    """
    if cu_seq_lens_q is None:
        if not (cu_seq_lens_k is None and max_length_q is None and max_length_k is None):
            raise ValueError(
                "cu_seq_lens_k, max_length_q and max_length_k say nothing without cu_seq_lens_q; give it"
            )
        if position_ids is None and seq_idx is None:
            return None
    elif cu_seq_lens_k is not None and not torch.equal(cu_seq_lens_q, cu_seq_lens_k):
        raise ValueError(
            "cu_seq_lens_k differs from cu_seq_lens_q; a document's keys are its own, give both alike"
        )
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    begins: dict[str, Tensor] = {}
    if position_ids is not None:
        later, step = _steps("position_ids", position_ids, mask)
        if bool((step > 1).any()):
            raise ValueError(
                f"position_ids goes up by {int(step.max())} between two tokens; memories number positions "
                "themselves, so leave it out, or let it go on by one and restart with each document"
            )
        begins["position_ids"] = later[step < 1]
    if seq_idx is not None:
        later, step = _steps("seq_idx", seq_idx, mask)
        begins["seq_idx"] = later[step != 0]
    if cu_seq_lens_q is not None:
        begins["cu_seq_lens_q"] = _borders(cu_seq_lens_q, mask)
    (name, first), *others = begins.items()
    for other, value in others:
        if not torch.equal(first, value):
            raise ValueError(
                f"{name} and {other} let documents begin at different tokens; give one of them"
            )
    if not len(first):
        return None
    # The first token of a row begins a document as well.
    starts = mask & (mask.cumsum(dim=1) == 1)
    starts.view(-1)[first] = True
    return (starts.flatten().cumsum(0) - 1).view(mask.shape)


def _steps(name: str, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Places of all real tokens but each row's first, and how far each value is above the one before."""
    values = values.unsqueeze(0) if values.ndim == 1 else values
    if values.shape[-1] != mask.shape[1] or values.shape not in (mask.shape, (1, mask.shape[1])):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}, but input_ids has shape {tuple(mask.shape)}; give "
            "both the same shape"
        )
    places = mask.flatten().nonzero().squeeze(1)
    rows = places // mask.shape[1]
    steps = values.expand(mask.shape).flatten()[places].long().diff()
    same = rows[1:] == rows[:-1]
    return places[1:][same], steps[same]


def _borders(cu_seq_lens: Tensor, mask: Tensor) -> Tensor:
    """The places where documents after the first begin, from borders (D + 1,) of a row without padding."""
    borders = cu_seq_lens.long()
    total = mask.shape[1]
    fits = borders.ndim == 1 and len(borders) > 1 and bool((borders.diff() > 0).all())
    if not fits or borders[[0, -1]].tolist() != [0, total] or len(mask) > 1 or not bool(mask.all()):
        raise ValueError(
            f"cu_seq_lens_q={cu_seq_lens.tolist()} does not cut input_ids of shape {tuple(mask.shape)}; "
            f"give a single row without padding, and rising borders from 0 to {total}"
        )
    return borders[1:-1]


def cut(
    ids: Tensor, mask: Tensor | None, labels: Tensor | None, segment_length: int
) -> Iterator[Segment]:
    """Cut packed rows (B, N) into segments of at most `segment_length` tokens, lazily.

    The last segment may be shorter. `labels` must be shifted already (`shift_labels`).
    """
    starts = range(0, ids.shape[1], segment_length)
    full, targets = _known_of(mask, labels, segment_length)
    for number, start in enumerate(starts):
        at = slice(start, start + segment_length)
        yield Segment(
            ids[:, at],
            None if mask is None or full[number] else mask[:, at],
            None if labels is None else labels[:, at],
            None if labels is None else targets[number],
        )


def masked_auxiliary(segments: Sequence[Segment], mask: Tensor) -> list[Segment]:
    """`segments`, each with its column of `mask` (B, S) as `auxiliary`. ValueError for other shapes."""
    wanted = (segments[0].ids.shape[0], len(segments))
    if mask.shape != wanted:
        raise ValueError(
            f"auxiliary_mask has shape {tuple(mask.shape)}, but the call has {wanted[0]} rows and "
            f"{wanted[1]} segments; give a flag for each"
        )
    real = mask.to(torch.bool)
    return [replace(one, auxiliary=real[:, index]) for index, one in enumerate(segments)]


def auxiliary_flags(segments: Sequence[Segment]) -> Tensor | None:
    """The reverse of `masked_auxiliary`: (B, S) bool; None where the segments have no flags."""
    flags = [segment.auxiliary for segment in segments if segment.auxiliary is not None]
    return torch.stack(flags, dim=1) if flags else None


def joined_mask(segments: Sequence[Segment]) -> Tensor | None:
    """The masks of segments side by side, (B, n) bool; None when none of them has padding."""
    if all(segment.mask is None for segment in segments):
        return None
    found = [
        torch.ones_like(one.ids, dtype=torch.bool) if one.mask is None else one.mask
        for one in segments
    ]
    return torch.cat(found, dim=1)


def _known_of(
    mask: Tensor | None, labels: Tensor | None, segment_length: int
) -> tuple[list[int], list[int]]:
    """Of each segment whether it is without padding, and how many targets it has.

    Asked once for all segments: on an accelerator every question waits for what was computed before.
    """
    asked = []
    for values, filler in ((mask, True), (None if labels is None else labels != IGNORE, False)):
        if values is not None:
            whole = F.pad(values, (0, -values.shape[1] % segment_length), value=filler)
            by_segment = whole.unflatten(1, (-1, segment_length))
            asked.append(
                by_segment.all(dim=2).all(dim=0).long() if filler else by_segment.sum(dim=(0, 2))
            )
    answers = torch.stack(asked).tolist() if asked else []
    return ([] if mask is None else answers[0]), ([] if labels is None else answers[-1])
