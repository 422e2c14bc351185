"""What is done with one recorded drive, in this process or in another one."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nmp.errors import NmpError
from nmp.fleet.survey import Survey, survey
from nmp.prior.ledger import Ledger, exists
from nmp.prior.storage import Place, Storage
from nmp.replay import ReplaySummary, maps_of

if TYPE_CHECKING:
    from nmp.mapper import OnlineMapper


class Looked(NamedTuple):
    """A bag that was looked through."""

    number: int
    found: Survey | None
    problem: str
    """why nothing can be made of it"""


class Mapped(NamedTuple):
    """A drive that was mapped."""

    number: int
    frames: int
    cpu_s: float
    """CPU time of the worker, s"""
    dropped: int
    """frames and messages that could not be used"""
    problem: str
    """why nothing could be made of it; the city is then as it was before"""


class Worker:
    """Maps drives into the cities below one prior folder.

    :param weights: .safetensors file, None for the weights that come with nmp
    :param location: the city, where bags name none or the wrong one
    :param threads: of the CPU; the same number gives the same bytes
    """

    def __init__(self, prior: Place, weights: Path | None, location: str, threads: int) -> None:
        self._prior = prior
        self._weights = weights
        self._location = location
        self._threads = threads
        self._mapper: OnlineMapper | None = None

    def look(self, number: int, bag: Path) -> Looked:
        """Look through a bag; ``number`` comes back with the answer."""
        try:
            return Looked(number, survey(bag, self._location), "")
        except NmpError as error:
            return Looked(number, None, str(error))

    def map(self, number: int, drive: Survey) -> Mapped:
        """Map a drive, and commit it when it is whole; ``number`` comes back with the answer.

        Raises :class:`NmpError` when the prior cannot be used: no other drive can be mapped then either.
        """
        begin = time.process_time()
        mapper = self._ready()
        summary = ReplaySummary()
        problem = ""
        try:
            if drive.recording in mapper.city(drive.location).recordings():
                return Mapped(number, 0, 0.0, 0, "")  # the answer of a worker was lost after it had committed
            try:
                maps = maps_of(drive.bag, mapper, summary, location=self._location, progress=False)
                for _ in itertools.chain(maps, (None,)):  # once more when the last frame is stored as well
                    if mapper.prior_error:
                        raise _Unsaved(mapper.prior_error)
            except _Unsaved:
                raise
            except NmpError as error:
                mapper.flush()  # raises when it is the prior that fails, not the bag
                problem = str(error)
            else:
                mapper.close(drive.recording)
        finally:
            mapper.discard()
        return Mapped(number, summary.frames, time.process_time() - begin, sum(summary.drops.values()), problem)

    def _ready(self) -> OnlineMapper:
        """Return the mapper; the network is loaded when it is first needed."""
        if self._mapper is None:
            import torch

            from nmp.mapper import OnlineMapper

            torch.manual_seed(0)
            torch.set_num_threads(self._threads)
            torch.use_deterministic_algorithms(True, warn_only=True)
            self._mapper = OnlineMapper(self._weights, self._prior, whole=True)
        return self._mapper


class _Unsaved(NmpError):
    """What a drive adds could not be saved."""


def recordings_in(prior: Place, location: str) -> set[str]:
    """Return the hashes of the recordings that are in a city as a whole; none where there is no city."""
    storage = Storage(prior).below(location)
    return Ledger.open(storage, read_only=True).recordings() if exists(storage) else set()
