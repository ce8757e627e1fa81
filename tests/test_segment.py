"""Packing and cutting."""

from __future__ import annotations

import pytest
import torch

from memlm import MemoryState
from memlm.scan import first_window, scan
from memlm.segment import Packing, Segment, cut, shift_labels


def test_packing_moves_tokens_left_and_back() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 1, 1]])
    values = torch.arange(15).reshape(3, 5)
    packing = Packing.of(mask)
    packed = packing.pack(values)
    assert packed.shape == (3, 3)
    assert packed[0].tolist() == [1, 2, 4]
    assert packed[1, 0] == 5 and packed[2, :2].tolist() == [13, 14]
    back = packing.unpack(packed)
    assert torch.equal(back, values * mask)


def test_labels_are_shifted_once_before_cutting() -> None:
    ids = torch.arange(7)[None]
    segments = list(cut(ids, None, shift_labels(ids), 3))
    assert [s.labels[0].tolist() for s in segments] == [[1, 2, 3], [4, 5, 6], [-100]]
    assert [s.ids[0].tolist() for s in segments] == [[0, 1, 2], [3, 4, 5], [6]]


def test_rows_with_a_token_are_active() -> None:
    ids, mask = torch.zeros(2, 2, dtype=torch.long), torch.tensor([[True, False], [False, False]])
    assert Segment(ids).active is None
    assert Segment(ids, mask).active.tolist() == [True, False]


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="mask has shape"):
        Segment(torch.zeros(1, 3), torch.ones(1, 2, dtype=torch.bool))


def test_scan_is_lazy_and_hands_the_state_on_detached() -> None:
    taken = []

    def segments():
        for index in range(5):
            taken.append(index)
            yield index

    def run(window, state):
        value = state["a"] * 2
        return window, MemoryState({"a": value}, 1)

    leaf = torch.ones(1, 1, requires_grad=True)
    windows = scan(run, segments(), MemoryState({"a": leaf}, 1), bptt_depth=2)
    assert taken == []
    window, state = next(windows)
    assert window == [0, 1] and taken == [0, 1] and state["a"].requires_grad
    window, state = next(windows)
    assert window == [2, 3] and not state["a"].requires_grad and state["a"].item() == 4
    assert [w for w, _ in windows] == [[4]]


def test_windows_count_back_from_the_end_or_on_from_the_start() -> None:
    for count in range(1, 12):
        for depth in range(1, 6):
            found = {}
            for anchor in ("end", "start"):
                first = first_window(count, depth, anchor)
                windows = scan(lambda w, s: (w, s), range(count), MemoryState({}, 1), depth, first)
                found[anchor] = [window for window, _ in windows]
                assert [n for window in found[anchor] for n in window] == list(range(count))
                assert all(1 <= len(window) <= depth for window in found[anchor])
            # All but one window are full: the first, or the last.
            assert all(len(window) == depth for window in found["end"][1:])
            assert all(len(window) == depth for window in found["start"][:-1])


def test_a_depth_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="bptt_depth=0"):
        next(scan(lambda w, s: (w, s), [1], None, bptt_depth=0))
    with pytest.raises(ValueError, match="bptt_depth=-2"):
        first_window(3, -2)
    with pytest.raises(ValueError, match="bptt_anchor='middle'"):
        first_window(3, 2, "middle")
