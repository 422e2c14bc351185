"""At most one process writes a city."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from nmp.errors import NmpError

NAME = "writer.lock"


class WriterLock:
    """Holds a city's lock file until :meth:`release`, or until the process ends in any way.

    Raises :class:`NmpError` when someone else holds it, OSError when the file cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # flock, not lockf: it also keeps out a second writer of the same process
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._descriptor)
            raise NmpError(
                f"prior in {folder} is already being written by process {owner}: stop that one, or open it read-only"
            ) from None
        except OSError:
            os.close(self._descriptor)
            raise
        # for the message above only: the lock is the kernel's, a stale number does no harm
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Let others write; the file stays, because removing it would race with the next one to lock it."""
        os.close(self._descriptor)
