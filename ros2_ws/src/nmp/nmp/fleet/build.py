"""Building cities from many recorded drives."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from nmp.errors import NmpError
from nmp.fleet.plan import Plan
from nmp.fleet.pool import Pool, workers
from nmp.fleet.survey import Survey
from nmp.fleet.worker import Looked, Mapped, recordings_in
from nmp.prior.ledger import Ledger, exists
from nmp.prior.storage import Lock, Place, Storage
from nmp.prior.tiles import Key
from nmp.prior.upkeep import compact, digests
from nmp.replay import THREADS

Spot = tuple[str, Key]
"""city and tile"""


@dataclass
class Built:
    """What became of the bags."""

    drives: int = 0
    """mapped and committed"""
    frames: int = 0
    dropped: int = 0
    """frames and messages of these that could not be used"""
    seconds: float = 0.0
    """wall time of the mapping, s"""
    cpu_s: float = 0.0
    """CPU time of all workers for it, s"""
    known: int = 0
    """bags whose recording the city held already, or that were given twice"""
    speedup: float = 1.0
    """how many times faster than one worker any number of them can be, with these drives"""
    late: int = 0
    """drives that are older than some that the city held already where they pass"""
    compacted: int = 0
    """drives that were folded into the bases of their cities"""
    bad: dict[Path, str] = field(default_factory=dict)
    """why nothing could be made of a bag"""


def build(
    bags: Sequence[Path],
    prior: Place,
    *,
    weights: Path | None = None,
    location: str = "",
    count: int = 1,
    address: str = "",
    threads: int = THREADS,
    skip_bad: bool = False,
    compact_days: float | None = None,
) -> Built:
    """Map recorded drives into the cities below ``prior``; the number of workers makes no difference to the result.

    Drives that a city holds as a whole are left out, so that a build that was interrupted goes on where it stopped.

    :param weights: .safetensors file, None for the weights that come with nmp
    :param location: the city, where bags name none or the wrong one
    :param count: workers; more than one are actors of Ray
    :param address: of a Ray cluster; bags and prior are then in folders that all its machines share
    :param threads: of the CPU in each worker
    :param skip_bad: go on without bags of which nothing can be made
    :param compact_days: compact the cities of these drives in the end, but for drives that began within so many days
        before the newest one

    Raises :class:`NmpError` for bad bags, all named in one message, and when the prior cannot be used or another build
    is at work on it. Drives that were committed until then stay.
    """
    prior = prior.absolute() if isinstance(prior, Path) else prior
    built = Built()
    with _alone(prior), workers(prior, weights, location, count=count, address=address, threads=threads) as pool:
        surveys = _look(pool, [bag.absolute() for bag in bags], built)
        _refuse(built.bad, len(bags), skip_bad)
        drives = _new_ones(surveys, prior, built)
        touched = _touched(drives, weights)
        built.late = _late(drives, touched, prior)
        plan = Plan(touched, [drive.frames for drive in drives])
        built.speedup = plan.speedup
        begin = time.monotonic()
        _map(pool, plan, drives, built, skip_bad)
        built.seconds = time.monotonic() - begin
        _refuse(built.bad, len(bags), skip_bad)
        if compact_days is not None:
            for location in sorted({drive.location for drive in surveys}):
                ledger = Ledger.open(Storage(prior).below(location))
                before = len(ledger.drives())
                compact(ledger, compact_days)
                built.compacted += before - len(ledger.drives())
    return built


def _alone(prior: Place) -> Lock:
    """Keep other builds of these cities out."""
    try:
        lock = Lock(Storage(prior), "build.lock", wait=False)
    except OSError as error:
        raise NmpError(f"cannot use {prior} ({error.strerror}): check the --prior folder") from error
    if not lock.held:
        raise NmpError(f"another build is at work in {prior}: wait for it, or choose another --prior")
    return lock


def _look(pool: Pool, bags: list[Path], built: Built) -> list[Survey]:
    """Look through all bags; those of which nothing can be made go to ``built.bad``."""
    for number, bag in enumerate(bags):
        pool.submit("look", number, bag)
    found: dict[int, Survey] = {}
    with tqdm(total=len(bags), unit="bag", desc="looking through", disable=None, leave=False) as bar:
        while pool.has_next():
            answer: Looked = pool.next()
            if answer.found is None:
                built.bad[bags[answer.number]] = answer.problem
            else:
                found[answer.number] = answer.found
            bar.update()
    return [found[number] for number in sorted(found)]


def _refuse(bad: dict[Path, str], total: int, skip_bad: bool) -> None:
    if bad and (not skip_bad or len(bad) == total):
        reasons = "\n".join(f"  {bag}: {bad[bag]}" for bag in sorted(bad))
        hint = "give others" if len(bad) == total else "mend them, or go on without them with --skip-bad"
        raise NmpError(f"nothing can be made of {len(bad)} of {total} bags: {hint}\n{reasons}")


def _new_ones(surveys: list[Survey], prior: Place, built: Built) -> list[Survey]:
    """Return the drives that are not in their city yet, each once, in the order of time."""
    drives: dict[tuple[str, str], Survey] = {}
    there = {place: recordings_in(prior, place) for place in {drive.location for drive in surveys}}
    for drive in surveys:
        if drive.recording not in there[drive.location]:
            drives.setdefault((drive.location, drive.recording), drive)
    built.known = len(surveys) - len(drives)
    return sorted(drives.values(), key=lambda drive: drive.order)


def _touched(drives: list[Survey], weights: Path | None) -> list[set[Spot]]:
    """Return the tiles that each drive can read or write with these weights."""
    from nmp.model.config import NetworkConfig
    from nmp.model.runner import window_side
    from nmp.model.weights import read_description

    config = NetworkConfig.from_dict(read_description(weights)["network"])
    side = window_side(config)
    return [{(drive.location, key) for key in drive.tiles(side, config.prior_cell)} for drive in drives]


def _late(drives: list[Survey], touched: list[set[Spot]], prior: Place) -> int:
    """Return how many drives are older than some that their city held already where they pass."""
    newest: dict[Spot, int] = {}
    for location in {drive.location for drive in drives}:
        storage = Storage(prior).below(location)
        if exists(storage):
            for record in Ledger.open(storage, read_only=True).active():
                # of a base only the time of its last frame is known
                stamp = record.last_ns if record.drives else record.first_ns
                for key in digests(record):
                    newest[location, key] = max(stamp, newest.get((location, key), 0))
    return sum(
        any(newest.get(place, 0) > drive.first_ns for place in places)
        for drive, places in zip(drives, touched, strict=True)
    )


def _map(pool: Pool, plan: Plan, drives: list[Survey], built: Built, skip_bad: bool) -> None:
    """Map all drives as the plan allows; without ``skip_bad`` none is begun after the first that is bad."""
    with tqdm(total=sum(drive.frames for drive in drives), unit="frame", desc="building", disable=None) as bar:
        while True:
            while plan.ready and pool.has_free() and (skip_bad or not built.bad):
                job = plan.take()
                pool.submit("map", job, drives[job])
            if not pool.has_next():
                return
            answer: Mapped = pool.next()
            drive = drives[answer.number]
            if answer.problem:
                built.bad[drive.bag] = answer.problem
            else:
                built.drives += 1
                built.frames += answer.frames
                built.cpu_s += answer.cpu_s
                built.dropped += answer.dropped
            plan.done(answer.number)
            bar.update(drive.frames)
