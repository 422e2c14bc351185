"""The supervisor of the mapping node: what it starts anew, what it does not, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def start(run: str, **limits: float) -> subprocess.Popen[str]:
    """Start a supervisor whose child runs this code; every child prints its process id first."""
    code = [
        "import os, signal, sys, time",
        "from nmp.nodes import supervisor",
        *(f"supervisor.{name} = {value}" for name, value in limits.items()),
        "def run():",
        "    print(os.getpid(), flush=True)",
        textwrap.indent(textwrap.dedent(run), "    "),
        "sys.exit(supervisor.supervise(lambda: run))",
    ]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'ros2_ws/src/nmp'}:{ROOT}"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join(code)], stdout=pipe, stderr=pipe, text=True, env=environment
    )


def child_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def children(process: subprocess.Popen[str]) -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    except OSError:
        return []


def test_a_killed_node_comes_back_and_the_end_is_passed_on() -> None:
    process = start("signal.signal(signal.SIGTERM, lambda *_: os._exit(7))\nwhile True: time.sleep(1)", HEALTHY_S=0.1)
    first = child_of(process)
    time.sleep(0.5)
    spare = next(pid for pid in children(process) if pid != first)
    os.kill(first, signal.SIGKILL)
    second = child_of(process)
    assert second == spare and process.poll() is None
    time.sleep(0.2)  # until it listens
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 7
    assert process.stderr is not None and process.stderr.read().count("was killed (SIGKILL): starting it now") == 1
    for pid in (second, *children(process)):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("code", [0, 2])
def test_a_node_that_ends_is_left_alone(code: int) -> None:
    process = start(f"return {code}")
    out, err = process.communicate(timeout=10)
    assert process.returncode == code and len(out.split()) == 1 and not err


def test_an_error_in_the_child_ends_it_too() -> None:
    process = start("raise RuntimeError('oops')")
    out, err = process.communicate(timeout=10)
    assert process.returncode == 1 and len(out.split()) == 1 and "oops" in err


def test_a_node_that_dies_at_once_is_started_ever_more_slowly_and_can_be_stopped() -> None:
    process = start("os.kill(os.getpid(), signal.SIGSEGV)", FIRST_PAUSE_S=0.3, LONGEST_PAUSE_S=60.0)
    begin = time.monotonic()
    for _ in range(4):
        child_of(process)
    assert time.monotonic() - begin > 0.8  # at once, after 0.3 s, after 0.6 s
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)  # while it waits
    out, err = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGSEGV and not out
    pauses = [line.rsplit("starting it ", 1)[1] for line in err.splitlines()]
    assert pauses == ["now", "in 0.3 s", "in 0.6 s", "in 1.2 s"]


def test_the_child_does_not_outlive_its_supervisor() -> None:
    process = start("while True: time.sleep(1)")
    child = child_of(process)
    time.sleep(0.2)
    process.kill()
    process.wait(10)
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        state = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state == "Z":
            return  # dead, and nobody has asked for its code yet
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child lives on")


def test_nothing_is_running_before_the_fork() -> None:
    pytest.importorskip("rclpy")
    code = """
        import os, threading
        from nmp.nodes.supervisor import load
        load()
        import rclpy, torch
        # Those of LTTng's tracer are there as soon as its library is loaded, and are not needed.
        tasks = len(os.listdir("/proc/self/task"))
        print(threading.active_count(), rclpy.ok(), tasks <= 3)
        torch.ones(1 << 22).add_(1)
        print(len(os.listdir("/proc/self/task")) > tasks or torch.get_num_threads() == 1)
    """
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'ros2_ws/src/nmp'}:{ROOT}"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.split() == ["1", "False", "True", "True"], done.stderr
