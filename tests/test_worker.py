"""The worker of the mapping node: order, bounds, and that nobody waits for ever."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import numpy as np
import pytest

from nmp.errors import NmpError
from nmp.frame import Frame
from nmp.nodes.worker import Waiting, Worker


def frame(number: int, keyframe: bool = True) -> Waiting:
    return Waiting(Frame(number, "town", np.eye(4), (), keyframe=keyframe), 0.0, {})


class Gate:
    """An answer that waits until it may go on."""

    def __init__(self) -> None:
        self.answered: list[int] = []
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, waiting: Waiting) -> None:
        self.begun.set()
        assert self.go.wait(10)
        self.answered.append(waiting.frame.stamp_ns)


def test_the_oldest_frames_are_dropped_and_jobs_come_first() -> None:
    gate = Gate()
    worker = Worker(gate)
    assert not worker.offer([frame(0)], 2)
    assert gate.begun.wait(10)
    assert [w.frame.stamp_ns for w in worker.offer([frame(i) for i in range(1, 5)], 2)] == [1, 2]
    job = worker.submit(lambda: list(gate.answered))
    assert worker.waiting == 2  # and nobody waited for the frame that is being answered
    gate.go.set()
    assert job.result(10) == [0]  # before the frames that waited longer
    done: Future[None] = worker.submit(lambda: None)
    done.result(10)
    assert worker.close(10)
    assert gate.answered[:1] == [0] and set(gate.answered) <= {0, 3, 4}


def test_keyframes_wait_and_of_the_others_only_the_newest() -> None:
    gate = Gate()
    worker = Worker(gate)
    worker.offer([frame(0)], 2)
    assert gate.begun.wait(10)

    def gone(*frames: Waiting) -> list[int]:
        return [w.frame.stamp_ns for w in worker.offer(frames, 2)]

    assert gone(frame(1, False)) == [] and gone(frame(2, False)) == [1]
    assert gone(frame(3)) == [2]  # a keyframe is never behind an older frame
    assert gone(frame(4, False)) == [] and gone(frame(5)) == [4] and gone(frame(6, False), frame(7, False)) == [6]
    assert worker.waiting == 3
    assert gone(frame(8)) == [3, 7]  # more keyframes than may wait
    assert gone(frame(9, False)) == []
    gate.go.set()
    worker.submit(lambda: None).result(10)
    for _ in range(1000):
        if len(gate.answered) == 4:
            break
        threading.Event().wait(0.01)
    assert gate.answered == [0, 5, 8, 9]
    assert worker.close(10)


def test_errors_belong_to_who_asked() -> None:
    worker = Worker(lambda waiting: None)

    def fail() -> None:
        raise NmpError("disk full")

    with pytest.raises(NmpError, match="disk full"):
        worker.submit(fail).result(10)
    assert worker.submit(lambda: 7).result(10) == 7
    assert worker.close(10)
    with pytest.raises(NmpError, match="being stopped"):
        worker.submit(lambda: 7).result(10)


def test_a_stuck_answer_is_told() -> None:
    gate = Gate()
    worker = Worker(gate)
    worker.offer([frame(0), frame(1)], 2)
    assert gate.begun.wait(10)
    assert not worker.close(0.1)
    gate.go.set()
    assert worker.close(10) and gate.answered == [0]
