"""Items made ahead by a thread: all of them, in order, not too far ahead, and stopped when told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from memlm.eval.running.feed import Feed


def counted(made: list[int], end: int = 10**9) -> Iterator[int]:
    for number in range(end):
        made.append(number)
        yield number


def test_all_items_come_in_order() -> None:
    with Feed(iter(range(1000)), 10, lambda item: 1) as feed:
        assert list(feed) == list(range(1000))
        assert list(feed) == []


def test_no_more_is_made_than_ahead_allows() -> None:
    made: list[int] = []
    with Feed(counted(made), 12, lambda item: 4) as feed:
        assert next(feed) == 0
        time.sleep(0.2)
        # One taken, three in store, one in the maker's hand.
        assert len(made) == 5
        assert next(feed) == 1
        time.sleep(0.2)
        assert len(made) == 6


def test_an_item_larger_than_all_is_made_alone() -> None:
    made: list[int] = []
    with Feed(counted(made), 1, lambda item: 100) as feed:
        time.sleep(0.2)
        assert len(made) == 2
        assert [next(feed) for _ in range(5)] == [0, 1, 2, 3, 4]


def test_an_error_is_raised_where_its_item_would_have_come() -> None:
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("the third is broken")

    with Feed(broken(), 100, lambda item: 1) as feed:
        time.sleep(0.1)
        assert [next(feed), next(feed)] == [1, 2]
        with pytest.raises(ValueError, match="the third"):
            next(feed)
        with pytest.raises(ValueError, match="the third"):
            next(feed)


def test_leaving_stops_the_thread_and_closes_nothing_twice() -> None:
    before = threading.active_count()
    made: list[int] = []
    with pytest.raises(KeyboardInterrupt), Feed(counted(made), 5, lambda item: 1) as feed:
        next(feed)
        raise KeyboardInterrupt
    assert threading.active_count() == before
    assert len(made) < 10


def test_waiting_is_counted_only_when_nothing_is_there() -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.1)
            yield number

    with Feed(slow(), 5, lambda item: 1) as feed:
        list(feed)
        assert 0.2 < feed.waited < 2
    with Feed(iter(range(5)), 5, lambda item: 1) as feed:
        time.sleep(0.3)
        list(feed)
        assert feed.waited < 0.1
