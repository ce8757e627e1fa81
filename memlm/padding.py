"""Rows of unequal length as one rectangle (no torch: readers prepare their batches without it)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pad_rows(
    rows: Sequence[ArrayLike], pad: int = 0, left: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Ids (B, T) of rows of tokens, T the longest row's, and their mask (B, T), True on real tokens.

    pad: the id that fills the rest. left: the padding comes first, for prompts that are to be continued.
    """
    known: list[NDArray[Any]] = [np.asarray(row) for row in rows]
    sizes = np.array([len(row) for row in known])
    width = int(sizes.max())
    mask = np.arange(width) < sizes[:, None]
    if left:
        mask = mask[:, ::-1]
    ids = np.full(mask.shape, pad, dtype=np.int64)
    # Both go row by row, and a row's real places ascend.
    ids[mask] = np.concatenate(known)
    return ids, np.ascontiguousarray(mask)
