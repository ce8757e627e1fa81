"""Packing and cutting."""

from __future__ import annotations

import pytest
import torch

from memlm import MemoryState
from memlm.scan import first_window, scan
from memlm.segment import IGNORE, Packing, Segment, cut, documents_in, joined_mask, shift_labels


def test_packing_moves_tokens_left_and_back() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 1, 1]])
    values = torch.arange(15).reshape(3, 5)
    packing = Packing.of(mask)
    packed = packing.pack(values, -1)
    assert packed.tolist() == [[1, 2, 4], [5, -1, -1], [13, 14, -1]]
    assert torch.equal(packing.mask, packed >= 0) and packing.length == 3
    places = packing.places()
    assert torch.equal(places >= 0, mask.bool())
    assert torch.equal(packed.flatten()[places[mask.bool()]], values[mask.bool()])


def test_documents_are_found_in_three_ways() -> None:
    mask = torch.ones(1, 7, dtype=torch.bool)
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0, 1]])
    expected = [[0, 0, 0, 1, 1, 2, 2]]
    borders = torch.tensor([0, 3, 5, 7], dtype=torch.int32)
    assert documents_in(mask, None, position_ids=position_ids).tolist() == expected
    assert documents_in(mask, None, position_ids=position_ids + 2).tolist() == expected
    assert (
        documents_in(mask, None, seq_idx=torch.tensor([[4, 4, 4, 9, 9, 4, 4]])).tolist() == expected
    )
    assert (
        documents_in(
            mask,
            None,
            position_ids=position_ids,
            cu_seq_lens_q=borders,
            seq_idx=torch.tensor(expected),
        ).tolist()
        == expected
    )
    # One document, wherever its positions start, is as good as none named.
    assert documents_in(mask, None, position_ids=torch.arange(3, 10)) is None
    assert documents_in(mask, None) is None
    packing = Packing.of(mask, documents_in(mask, None, position_ids=position_ids))
    assert packing.pack(torch.arange(7)[None], -1).tolist() == [[0, 1, 2], [3, 4, -1], [5, 6, -1]]


def test_padding_is_no_border() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    position_ids = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 0, 0, 0]])
    found = documents_in(mask, mask, position_ids=position_ids)
    packed = Packing.of(mask, found).pack(torch.arange(10).view(2, 5), -1)
    assert packed.tolist() == [[2, 3, 4], [5, 6, -1], [7, -1, -1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position_ids": torch.tensor([[0, 1, 4, 5]])}, "position_ids goes up by 3"),
        ({"position_ids": torch.zeros(3, 1, 4)}, "position_ids has shape"),
        ({"seq_idx": torch.zeros(1, 3)}, "seq_idx has shape"),
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, "rising borders from 0 to 4"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 2, 4])}, "rising borders from 0 to 4"),
        (
            {
                "position_ids": torch.tensor([[0, 1, 0, 1]]),
                "seq_idx": torch.tensor([[0, 1, 1, 1]]),
            },
            "position_ids and seq_idx let documents begin at different tokens",
        ),
    ],
)
def test_borders_that_do_not_fit_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        documents_in(torch.ones(1, 4, dtype=torch.long), None, **arguments)


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


def test_cut_says_what_the_host_has_to_know() -> None:
    ids = torch.arange(1, 23).view(2, 11)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 6:] = False
    labels = torch.full_like(ids, IGNORE)
    labels[0, 1], labels[1, 2], labels[0, 9] = 5, 6, 7
    found = list(cut(ids, mask, labels, 4))
    assert [segment.mask is None for segment in found] == [True, False, False]
    assert [segment.num_targets for segment in found] == [2, 0, 1]
    assert torch.equal(torch.cat([s.ids for s in found], 1), ids)
    # Short segments are full as well, where no row is shorter.
    assert [s.mask is None for s in cut(ids, torch.ones_like(mask), None, 4)] == [True] * 3
    assert [s.num_targets for s in cut(ids, mask, None, 4)] == [None] * 3
    assert all(s.mask is None for s in cut(ids, None, labels, 4))
    joined = joined_mask(found)
    assert joined is not None and torch.equal(joined, mask)
    assert joined_mask(found[:1]) is None
