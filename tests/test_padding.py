"""Rows of unequal length as one rectangle."""

from __future__ import annotations

import numpy as np
import pytest

from memlm.padding import pad_rows

T, F = True, False


@pytest.mark.parametrize(
    ("left", "ids", "mask"),
    [
        (False, [[5, 6, 7], [8, 9, 9], [9, 9, 9]], [[T, T, T], [T, F, F], [F, F, F]]),
        (True, [[5, 6, 7], [9, 9, 8], [9, 9, 9]], [[T, T, T], [F, F, T], [F, F, F]]),
    ],
)
def test_rows_stand_on_one_side(left: bool, ids: list[list[int]], mask: list[list[bool]]) -> None:
    rows = [np.array([5, 6, 7], dtype=np.int32), [8], np.array([], dtype=np.int32)]
    found, real = pad_rows(rows, 9, left)
    assert found.tolist() == ids and found.dtype == np.int64
    assert real.tolist() == mask and real.dtype == np.bool_
    # As torch takes them over.
    assert found.flags.writeable and found.flags.c_contiguous and real.flags.c_contiguous


def test_a_whole_rectangle_is_all_real() -> None:
    ids, mask = pad_rows([(1, 2), (3, 4)], left=True)
    assert ids.tolist() == [[1, 2], [3, 4]] and mask.all()
