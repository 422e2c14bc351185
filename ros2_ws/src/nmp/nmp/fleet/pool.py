"""Where workers run: in this process, or as actors of Ray."""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from nmp.errors import NmpError
from nmp.fleet.worker import Worker
from nmp.prior.storage import Place

_ANSWER_S = 5.0
"""within which a cluster has to take a connection, s"""
_STORE_BYTES = 128 * 2**20
"""of the shared memory of a Ray of our own: only paths of drives go through it"""


class Pool(Protocol):
    """Workers, and calls of their methods that are under way."""

    def submit(self, method: str, *arguments: object) -> None:
        """Have a worker call one of its methods; where all are busy, as soon as one is free."""

    def has_free(self) -> bool:
        """Tell whether a call would begin at once."""

    def has_next(self) -> bool:
        """Tell whether a call is under way."""

    def next(self) -> Any:
        """Wait for the next call that ends, and return its answer; what it raised as :class:`NmpError` is raised."""


class _Here:
    """One worker in this process, which works when its answer is wanted."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._calls: deque[tuple[str, tuple[object, ...]]] = deque()

    def submit(self, method: str, *arguments: object) -> None:
        self._calls.append((method, arguments))

    def has_free(self) -> bool:
        return not self._calls

    def has_next(self) -> bool:
        return bool(self._calls)

    def next(self) -> Any:
        method, arguments = self._calls.popleft()
        return getattr(self._worker, method)(*arguments)


class _OnRay:
    """Workers that are actors of Ray."""

    def __init__(self, actors: list[Any]) -> None:
        from ray.util import ActorPool

        self._pool = ActorPool(actors)

    def submit(self, method: str, *arguments: object) -> None:
        self._pool.submit(lambda actor, given: getattr(actor, method).remote(*given), arguments)

    def has_free(self) -> bool:
        return self._pool.has_free()

    def has_next(self) -> bool:
        return self._pool.has_next()

    def next(self) -> Any:
        from ray.exceptions import RayError, RayTaskError

        try:
            return self._pool.get_next_unordered()
        except RayTaskError as error:
            if isinstance(error.cause, NmpError):
                raise NmpError(str(error.cause)) from error
            raise
        except RayError as error:
            reason = (str(error).splitlines() or [""])[0]
            raise NmpError(
                f"a worker was lost ({type(error).__name__}: {reason}): start the same command again, it goes on where "
                "it stopped"
            ) from error


@contextmanager
def workers(
    prior: Place, weights: Path | None, location: str, *, count: int, address: str, threads: int
) -> Iterator[Pool]:
    """Start workers, and end them. See :class:`Worker` for the other parameters.

    :param count: how many; 1 without an address is this process
    :param address: of a Ray cluster, empty for a Ray of our own on this machine

    Raises :class:`NmpError` when Ray is missing, or the cluster cannot be reached.
    """
    if count == 1 and not address:
        yield _Here(Worker(prior, weights, location, threads))
        return
    _check_reachable(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report every start over the internet
    try:
        import ray
    except ImportError as error:
        raise NmpError(
            "several workers need Ray: pip install 'neural-map-prior[fleet]', or build with --workers 1"
        ) from error
    own: dict[str, Any] = {"num_cpus": count * threads, "include_dashboard": False, "object_store_memory": _STORE_BYTES}
    try:
        ray.init(address or "local", logging_level=logging.ERROR, **({} if address else own))
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise NmpError(
            f"cannot start or reach Ray at {address or 'this machine'} ({reason}): see ray status"
        ) from error
    try:
        # a lost worker is started again; asked once more, it knows whether the drive was committed
        actor = ray.remote(num_cpus=threads, max_restarts=-1, max_task_retries=2)(Worker)
        yield _OnRay([actor.remote(prior, weights, location, threads) for _ in range(count)])
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise :class:`NmpError` when nothing listens at host:port; Ray itself would try for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not (colon and port.isdigit()):
        return  # auto: Ray looks for it on this machine
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise NmpError(f"no Ray cluster answers at {address} ({error}): check the address, see ray status") from error
