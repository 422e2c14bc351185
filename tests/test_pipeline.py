"""Items made ahead of who wants them: the same ones, in order, with their errors, and no thread left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from nmp.pipeline import ahead


def test_the_same_items_in_order_and_only_so_far_ahead() -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for i in range(20):
            made.append(i)
            yield i

    got, before = [], threading.active_count()
    for item in ahead(numbers(), 3):
        got.append(item)
        assert len(made) <= len(got) + 5  # three wait, one is held out, one is handed over
    assert got == list(range(20)) and threading.active_count() == before


def test_an_error_comes_after_what_was_made_before_it() -> None:
    def two() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("three")

    items = ahead(two(), 8)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(ValueError, match="three"):
        next(items)


def test_who_stops_early_leaves_no_thread() -> None:
    items = ahead(iter(range(10**9)), 2)
    assert next(items) == 0
    before = threading.active_count()
    items.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before - 1
