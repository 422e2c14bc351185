"""Starts the mapping node, and starts it anew when it was killed: ``ros2 run nmp mapping_supervisor``.

What takes longest at a start is loading torch. The supervisor has loaded it, and everything else that starts no
threads: a copy of a process (fork) has none of them. It computes nothing and takes no part in DDS, so a copy of it is a
node within a moment. A node that ends by itself, with whatever code, is not started again: it has said why.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from nmp.nodes.process import prepare_process

HEALTHY_S = 10.0
"""a node that has lived for so long is started anew at once, s"""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""wait before the next start of one that has not; doubled each time, s"""
STOP = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def supervise(run: Callable[[], int]) -> int:
    """Run a node in a process of its own until it ends by itself or a signal ends this one; return the exit code.

    :param run: what the child does, for its exit code; it may not return before the node has ended
    """
    # Blocked signals wait to be fetched, so none is lost between two looks.
    signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP, signal.SIGCHLD})
    pause = 0.0
    while True:
        begin = time.monotonic()
        status, stopped = _wait(_start(run))
        if stopped or not os.WIFSIGNALED(status):
            return _code(status)
        number = os.WTERMSIG(status)
        if time.monotonic() - begin >= HEALTHY_S:
            pause = 0.0
        after = f"in {pause:g} s" if pause else "now"
        print(f"nmp: mapping node was killed ({signal.Signals(number).name}): starting it {after}", file=sys.stderr)
        if pause and signal.sigtimedwait(STOP, pause):
            return 128 + number
        pause = min(max(FIRST_PAUSE_S, 2 * pause), LONGEST_PAUSE_S)


def _start(run: Callable[[], int]) -> int:
    """Fork; return the child's process id. The child never returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    if child := os.fork():
        return child
    code = 1
    try:
        # A Ctrl-C reaches the whole group of the terminal; the node is to hear it once, from the supervisor.
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)  # it died before this was asked for
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*STOP, signal.SIGCHLD})
        code = run()
    except BaseException:  # nothing may run on in what is a copy of the supervisor
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int) -> tuple[int, bool]:
    """Wait for the end of a child, and pass on what it is told; return its status, and whether it was told to end."""
    stopped = False
    while True:
        number = signal.sigwait({*STOP, signal.SIGCHLD})
        if number == signal.SIGCHLD:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status, stopped
        else:
            stopped = True
            os.kill(child, number)


def _code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def load() -> None:
    """Import what the node needs and what starts no threads: all but ROS, whose middleware does."""
    prepare_process()
    import nmp.draw
    import nmp.mapper  # noqa: F401


def run_mapping_node() -> int:
    """Run the node until it ends; return its exit code."""
    from nmp.nodes.mapping_node import MappingNode
    from nmp.nodes.runtime import run_node

    return run_node(MappingNode)


def main() -> None:
    """Entry point of ``ros2 run nmp mapping_supervisor``."""
    load()
    sys.exit(supervise(run_mapping_node))


if __name__ == "__main__":
    main()
