"""Starts the mapping node, and goes on with a spare one when it was killed: ``ros2 run nmp mapping_supervisor``.

What takes longest at a start is loading torch and ROS, and, after a kill, being found by those who publish: DDS still
talks to the dead. The supervisor has loaded both, but computes nothing and takes no part in DDS: the threads for these
would be missing in a copy of it (fork). One such copy is the node; another one, the spare, has opened ROS, is known to
everybody, and waits. A node that ends by itself, with whatever code, is not started again: it has said why.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

from nmp.process import prepare_process

HEALTHY_S = 5.0
"""a node that has lived for so long gets a spare, and is replaced at once, s"""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""wait before the next start of one that has not; doubled each time, s"""
STOP = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

Run = Callable[[], int]
"""runs a node until it ends, and returns its exit code"""


class Child(NamedTuple):
    """A copy of this process, ready or running."""

    pid: int
    go: int
    """file descriptor: a byte lets it run, closing it unwritten ends it"""

    def run(self) -> None:
        """Let it run."""
        os.write(self.go, b"\n")
        os.close(self.go)

    def dismiss(self) -> None:
        """End one that was not let run."""
        os.close(self.go)
        os.waitpid(self.pid, 0)


def supervise(prepare: Callable[[], Run]) -> int:
    """Run a node in a process of its own until it ends by itself or a signal ends this one; return the exit code.

    :param prepare: called in the child as soon as there is one, possibly long before what it returns
    """
    # Blocked signals wait to be fetched, so none is lost between two looks.
    signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP, signal.SIGCHLD})
    node, pause = _start(prepare), 0.0
    while True:
        node.run()
        status, stopped, spare = _watch(node.pid, prepare)
        if stopped or not os.WIFSIGNALED(status):
            if spare is not None:
                spare.dismiss()
            return _code(status)
        if spare is not None:
            pause = 0.0
        after = f"in {pause:g} s" if pause else "now"
        name = signal.Signals(os.WTERMSIG(status)).name
        print(f"nmp: mapping node was killed ({name}): starting it {after}", file=sys.stderr)
        if pause and signal.sigtimedwait(STOP, pause):
            return _code(status)
        pause = min(max(FIRST_PAUSE_S, 2 * pause), LONGEST_PAUSE_S)
        node = spare or _start(prepare)


def _watch(node: int, prepare: Callable[[], Run]) -> tuple[int, bool, Child | None]:
    """Wait for the end of a node, pass on what it is told, and start a spare once it is healthy.

    Returns its status, whether it was told to end, and the spare.
    """
    healthy_s = time.monotonic() + HEALTHY_S
    stopped, spare, tried = False, None, False
    while True:
        left = None if tried else max(healthy_s - time.monotonic(), 0.0)
        event = (
            signal.sigwaitinfo({*STOP, signal.SIGCHLD})
            if left is None
            else signal.sigtimedwait({*STOP, signal.SIGCHLD}, left)
        )
        if event is None:
            spare, tried = _start(prepare), True
        elif event.si_signo == signal.SIGCHLD:
            done, status = os.waitpid(node, os.WNOHANG)
            if spare is not None and os.waitpid(spare.pid, os.WNOHANG)[0]:
                os.close(spare.go)
                spare = None  # the node matters more: it is not started again, only with the next node
            if done:
                return status, stopped, spare
        else:
            stopped = tried = True
            os.kill(node, event.si_signo)


def _start(prepare: Callable[[], Run]) -> Child:
    """Fork. The child never returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    told, go = os.pipe()
    if child := os.fork():
        os.close(told)
        return Child(child, go)
    code = 1
    try:
        os.close(go)
        # A Ctrl-C reaches the whole group of the terminal; the node is to hear it once, from the supervisor.
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)  # it died before this was asked for
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*STOP, signal.SIGCHLD})
        run = prepare()
        code = run() if os.read(told, 1) else 0
    except BaseException:  # nothing may run on in what is a copy of the supervisor
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def load() -> Callable[[], Run]:
    """Import all that the node needs, without starting anything; return what prepares a node in a child."""
    prepare_process()
    import nmp.draw
    import nmp.mapper  # noqa: F401
    from nmp.nodes.mapping_node import MappingNode
    from nmp.nodes.runtime import open_ros, run_node

    def prepare() -> Run:
        found = open_ros()

        def make(stop: threading.Event) -> MappingNode:
            try:
                return MappingNode(stop)
            finally:
                found.destroy_node()

        return lambda: run_node(make)

    return prepare


def main() -> None:
    """Entry point of ``ros2 run nmp mapping_supervisor``."""
    sys.exit(supervise(load()))


if __name__ == "__main__":
    main()
