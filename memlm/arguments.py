"""A call's arguments: which are refused and why, and the batch packed to the left, one document per row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import Cache

from memlm.segment import IGNORE, Alignment, Packing, documents_in, shift_labels

# Arguments that every model of transformers takes and this one cannot honour, and what to use instead.
REFUSED = {
    "inputs_embeds": "memories read token ids; give input_ids",
    "past_key_values": "a call keeps no cache; hand on memory_state, which remembers what was read",
    "use_cache": "a call keeps no cache; hand on memory_state, which remembers what was read",
    "output_attentions": "attention is run segment by segment and not kept; call model.base for the base's",
    "output_hidden_states": "hidden states are run segment by segment and not kept; call model.base for "
    "the base's, or model.base_model for the last layer's with memories",
    "token_type_ids": "documents are read as text of one type; leave it out",
}


@dataclass(frozen=True)
class Batch:
    """The documents of a call, one per row, packed to the left (or their segments to the right).

    ids (D, L) long. mask (D, L) bool, True on real tokens; None when all are. targets (D, L) long: labels
    that were shifted over each whole document; None without labels. packing: where each token stood in the
    batch as it was given; None when no token was moved.
    """

    ids: Tensor
    mask: Tensor | None
    targets: Tensor | None
    packing: Packing | None


def packed(
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    shifted_labels: Tensor | None = None,
    *,
    continued: bool = False,
    alignment: Alignment = "left",
    segment_length: int,
    **borders: Any,
) -> Batch:
    """Check what a call was given, and pack it to the left. ValueError on what does not fit.

    alignment "right" puts the padding after a document's first segment of `segment_length` tokens, so that
    all others are full. continued: whether a memory_state, which has one row per row here, is given as
    well. borders: what tells the documents in a row apart (`documents_in`).
    """
    if alignment not in get_args(Alignment):
        raise ValueError(f"segment_alignment={alignment!r} is unknown; use 'left' or 'right'")
    ids, mask, targets = _check(input_ids, attention_mask, labels, shifted_labels)
    documents = documents_in(ids, mask, **borders)
    if documents is not None and continued:
        raise ValueError(
            "memory_state goes on with one document per row, but position_ids, seq_idx or "
            "cu_seq_lens_q put several into a row; give one or the other"
        )
    right = alignment == "right"
    packing = None
    if mask is not None or documents is not None or (right and ids.shape[1] % segment_length):
        packing = Packing.of(torch.ones_like(ids) if mask is None else mask, documents)
        ids, mask = packing.pack(ids, 0), packing.mask
        targets = None if targets is None else packing.pack(targets, IGNORE)
    if targets is not None and shifted_labels is None:
        targets = shift_labels(targets)
    if right and packing is not None:
        aligned = packing.to_the_right(segment_length)
        ids = aligned.pack(packing.unpack(ids, 0), 0)
        if targets is not None:
            targets = aligned.pack(packing.unpack(targets, IGNORE), IGNORE)
        packing, mask = aligned, aligned.mask
    return Batch(ids, mask, targets, packing)


def _check(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    shift_labels: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Refuse what does not fit; return ids, the mask as bool (None without padding) and targets."""
    if input_ids is None:
        raise ValueError("input_ids is missing; memories read token ids")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; give (batch, tokens) with at least one "
            "row and one token"
        )
    if input_ids.is_floating_point():
        raise ValueError(f"input_ids has dtype {input_ids.dtype}; give integer token ids")
    if labels is not None and shift_labels is not None:
        raise ValueError("labels and shift_labels are both given; give one of them")
    targets = labels if shift_labels is None else shift_labels
    if targets is not None:
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise ValueError(f"labels has dtype {targets.dtype}; give integer token ids")
        targets = targets.long()
    for name, value in (("attention_mask", attention_mask), ("labels", targets)):
        if value is not None and value.shape != input_ids.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, but input_ids has shape "
                f"{tuple(input_ids.shape)}; give both the same shape"
            )
    mask = None
    if attention_mask is not None and not bool(attention_mask.all()):
        mask = attention_mask.to(torch.bool)
        if not bool(mask.any()):
            raise ValueError("attention_mask is 0 everywhere; give at least one real token")
        if targets is not None:
            targets = targets.masked_fill(~mask, IGNORE)
    return input_ids, mask, targets


def refuse(arguments: Mapping[str, Any]) -> None:
    """ValueError for an argument that asks for what this model cannot give; falsy values ask nothing."""
    for name, remedy in REFUSED.items():
        value = arguments.get(name)
        asks = bool(value.any()) if isinstance(value, Tensor) else value not in (None, False)
        if asks:
            given = name if isinstance(value, (Tensor, Cache)) else f"{name}={value}"
            raise ValueError(f"{given} is not for a model with memories: {remedy}")
