"""Child processes that never outlive the demo, and what all of it takes in memory."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from nmp.errors import NmpError


class Child:
    """A running process with its log."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log

    @property
    def code(self) -> int | None:
        """Exit code, None while it runs."""
        return self.process.poll()

    def failed(self) -> NmpError:
        """Describe its end by the last thing that it wrote."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if "error:" in line), lines[-1] if lines else "it said nothing")
        return NmpError(
            f"{self.name} ended with code {self.code} ({said.removeprefix('nmp: error: ')}): see {self.log}"
        )

    def send(self, number: signal.Signals) -> None:
        """Signal the process and everything that it started."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass

    def stop(self, patience: float = 20.0) -> int:
        """Ask it to end as Ctrl-C does, insist when it does not, and return its exit code."""
        for number, seconds in ((signal.SIGINT, patience), (signal.SIGTERM, 5.0)):
            if self.code is None:
                self.send(number)
                try:
                    self.process.wait(seconds)
                except subprocess.TimeoutExpired:
                    continue
        self.send(signal.SIGKILL)  # also what it may have left behind
        return self.process.wait()


class Children:
    """Starts processes, each in a group of its own, and ends all that still run when the block is left."""

    def __init__(self, logs: Path, environment: dict[str, str]) -> None:
        self.logs = logs
        self.environment = environment
        self._running: list[Child] = []

    def __enter__(self) -> Children:
        self.logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._running:
            if child.code is None:
                child.send(signal.SIGINT)  # all at once, so that they end side by side
        for child in self._running:
            child.stop(patience=5.0)

    def start(self, name: str, command: Sequence[str]) -> Child:
        """Start a command; its output goes to ``<logs>/<name>.log``."""
        log = self.logs / f"{name}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        child = Child(name, process, log)
        self._running.append(child)
        return child

    def wait(self, *children: Child, timeout: float) -> None:
        """Wait until they have ended well; :class:`NmpError` when one fails or takes longer than ``timeout`` s."""
        end = time.monotonic() + timeout
        for child in children:
            try:
                child.process.wait(max(end - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                raise NmpError(f"{child.name} is not done after {timeout:g} s: see {child.log}") from None
            if child.code:
                raise child.failed()


class MemoryMeter:
    """Watches the resident memory of this process and of all below it; pages that they share count in each."""

    def __init__(self, period: float = 0.25) -> None:
        self.peak_bytes = 0
        self._period = period
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> MemoryMeter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(self._period):
            self.peak_bytes = max(self.peak_bytes, sum(_resident(pid) for pid in _tree(os.getpid())))


def _tree(pid: int) -> list[int]:
    out = [pid]
    for parent in out:  # grows while it is read
        try:
            for task in Path(f"/proc/{parent}/task").iterdir():
                out += [int(child) for child in (task / "children").read_text().split()]
        except OSError:  # it has ended in the meantime
            continue
    return out


def _resident(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
