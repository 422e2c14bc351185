"""What a process sets up for itself: memory that stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ros2_ws" / "src" / "nmp"

FAULTS = """
import resource, sys, threading
from nmp.process import prepare_process
if sys.argv[1] == "kept":
    prepare_process()
def work():
    for _ in range(10):
        parts = [b"x" * (5 << 20) for _ in range(20)]
        del parts
def run():
    work()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""
"""page faults of a thread that takes 100 MB ten times and lets go of them"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is of glibc")
def test_memory_that_was_let_go_of_is_not_asked_for_again() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | {"PYTHONPATH": str(PACKAGE)}

    def faults(mode: str) -> int:
        command = [sys.executable, "-c", FAULTS, mode]
        return int(subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60).stdout)

    assert faults("kept") < 500 < faults("as it is")


LET_GO = """
from nmp.process import give_memory_back, prepare_process
prepare_process()
def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])
parts = [b"x" * (200 << 10) for _ in range(500)]
last = parts.pop()  # what lies behind the rest and stays
parts.clear()
before = resident()
give_memory_back()
print(before - resident())
"""
"""bytes that a process has less after it has let go of 100 MB, all but the last piece, and has given them back"""


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is of glibc")
def test_memory_between_what_is_in_use_can_be_given_back() -> None:
    command = [sys.executable, "-c", LET_GO]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE)}
    done = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60)
    assert int(done.stdout) > 80 << 20
