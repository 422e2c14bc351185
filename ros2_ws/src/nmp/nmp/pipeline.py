"""Steps that follow one another for each frame, side by side for several frames."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_CLOSED_S = 0.1
"""how often a thread that waits for room looks whether anybody still wants what it has, s"""


def ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """Yield the same items in the same order, made in a thread of their own up to ``depth`` ahead.

    What making them raises is raised where the item would have been. When the caller stops early, so does the thread,
    after the item that it is making.
    """
    ready: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def put(entry: tuple[bool, T | BaseException | None]) -> bool:
        while not closed.is_set():
            try:
                ready.put(entry, timeout=_CLOSED_S)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    return
            put((False, None))
        except BaseException as error:  # the caller's, wherever it happens
            put((False, error))

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            more, item = ready.get()
            if more:
                yield item  # type: ignore[misc]
            elif isinstance(item, BaseException):
                raise item
            else:
                return
    finally:
        closed.set()
        thread.join()
