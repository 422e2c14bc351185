"""One thread that owns the mapper: jobs first, then frames, from a queue that never makes anybody wait.

Keyframes wait in the order of their stamps; of the others only one waits, as long as it is the newest frame of all.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from nmp.errors import NmpError
from nmp.frame import Frame


class Waiting(NamedTuple):
    """A frame that waits for the network."""

    frame: Frame
    received_s: float
    """when its last message was taken from the middleware, monotonic clock"""
    before_s: Mapping[str, float]
    """what came before the network, by stage: "transport" of its last message, "assembling", the time that its messages
    took to be sorted in"""


class Worker:
    """Runs ``answer`` on every frame and whatever is submitted, one after the other, in a thread of its own."""

    def __init__(self, answer: Callable[[Waiting], None]) -> None:
        self._answer = answer
        self._wake = threading.Condition()
        self._queue: deque[Waiting] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="mapper", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many frames wait."""
        return len(self._queue)

    def offer(self, frames: Sequence[Waiting], limit: int) -> list[Waiting]:
        """Queue frames, in the order of their stamps; return those that make way for them.

        These are frames that are no keyframe and no longer the newest, and the oldest of more than ``limit`` keyframes.
        """
        with self._wake:
            before = [*self._queue, *frames]
            newest = before[-1:]
            keys = [w for w in before if w.frame.keyframe][-limit:]
            kept = keys if newest and newest[0].frame.keyframe else keys + newest
            self._queue = deque(kept)
            self._wake.notify()
        still = {id(w) for w in kept}
        return [w for w in before if id(w) not in still]

    def clear(self) -> int:
        """Drop the frames that wait; return how many did."""
        with self._wake:
            count = len(self._queue)
            self._queue.clear()
        return count

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        """Queue a job, to be run before any frame that waits; its result or error comes through the future."""
        done: Future[Any] = Future()
        with self._wake:
            if self._closing:
                done.set_exception(NmpError("the node is being stopped"))
            else:
                self._jobs.append((job, done))
                self._wake.notify()
        return done

    def close(self, timeout_s: float) -> bool:
        """Finish the jobs, drop the frames and end the thread; False when it does not come back in time."""
        with self._wake:
            self._closing = True
            self._queue.clear()
            self._wake.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._jobs or self._queue or self._closing)
                job = self._jobs.popleft() if self._jobs else None
                if job is None and self._closing:
                    return
                waiting = self._queue.popleft() if job is None else None
            if job is not None:
                _carry_out(*job)
            elif waiting is not None:
                self._answer(waiting)
            job = waiting = None  # what they refer to must not stay while nothing is to be done


def _carry_out(job: Callable[[], Any], done: Future[Any]) -> None:
    try:
        done.set_result(job())
    except Exception as exc:  # belongs to the one who waits for it
        done.set_exception(exc)
