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
