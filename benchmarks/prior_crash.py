"""Kill a process that writes, flushes, commits, merges and compacts a city, again and again; then flip bits.

    python benchmarks/prior_crash.py [--cells plain coded] [--kills 500] [--flips 200] [--out prior_crash.json]

After every kill the city is opened, every checksum is verified, and every drive has to hold all that was flushed. A
worker adds as much evidence per frame to an area of its own drive, so that what a drive must hold can be read off it,
and to an area where all drives go: there a drive is saved with what was known before it. Every flipped bit in any file
of the city has to be found: by verify, and in a drive under way, which a crash left, by whoever opens the city next.
Writes JSON; exits with 1 when anything was lost, torn or not noticed.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from nmp.errors import NmpError
from nmp.prior import CityPrior, PriorSpec, Window, upkeep
from nmp.prior.coding import Coding, pack
from nmp.prior.ledger import Ledger
from nmp.prior.storage import Storage
from nmp.prior.tiles import keys_of

CITY = "city"
_EYE = np.eye(4)
_CODING = Coding((0, 0, 0, 0), pack(_EYE * 2.0**20 / 8), pack(_EYE * 2.0**8 * 8))


CAP = 8
"""frames from which on the cap acts"""


class Kind(NamedTuple):
    """A way to write cells."""

    spec: PriorSpec
    frame: int
    """evidence that a frame adds"""
    rounding: int
    """by how much a latent may differ from what was written"""


KINDS = {
    "plain": Kind(PriorSpec(4, 0.3, "benchmark", evidence_cap=CAP), 1, 0),
    # enough for a cell to be written as known, and to tell how many frames there were from what was rounded
    "coded": Kind(PriorSpec(4, 0.3, "benchmark", evidence_cap=CAP * 1024, coding=_CODING), 1024, 2),
}
SIDE = 104
"""cells along each edge of the area of one drive: whole blocks of a coding; areas lie 128 apart and share no tile"""


SHARED = Window(256, 0, SIDE, SIDE)
"""the area of all drives, which see something else there in turn"""
OFF = 12
"""how far what a drive adds there may be from what it saw: every frame is rounded with all that was there before"""


def area(drive: int) -> Window:
    return Window(0, 128 * drive, SIDE, SIDE)


def frame_of(prior: CityPrior, drive: int, kind: Kind) -> None:
    """Map one frame of a drive."""
    added, stamp_ns = np.uint16(kind.frame), (drive + 1) * 10**9
    latent, evidence = prior.read(area(drive))
    prior.write(area(drive), np.full_like(latent, drive % 100), evidence + added, stamp_ns)
    latent, evidence = prior.read(SHARED)
    mean = (latent * evidence.astype(float) + seen_of(drive) * kind.frame) / (evidence + added)
    prior.write(SHARED, np.rint(mean).astype(np.int8), evidence + added, stamp_ns)


def seen_of(drive: int) -> int:
    """Return the latents that a drive sees where all go."""
    return 60 if drive % 2 else -60


def work(folder: Path, first: int, progress: Path, kind: Kind) -> None:
    """Drive, commit, merge and compact until killed; append what is safe to ``progress``."""
    rng = random.Random(first)
    with progress.open("a", buffering=1) as told:
        for drive in range(first, first + 1000):
            prior = CityPrior.open(folder, CITY, kind.spec, flush_interval_s=0.01, vehicle=str(drive))
            for frame in range(rng.randint(1, 12)):
                frame_of(prior, drive, kind)
                if rng.random() < 0.5:
                    prior.flush()
                    told.write(f"{drive} {frame + 1}\n")
            prior.close()
            told.write(f"{drive} {frame + 1}\n")
            city, other = (Ledger.open(Storage(folder / name)) for name in (CITY, "other"))
            if rng.random() < 0.3:
                upkeep.merge(other.storage, city)
            if rng.random() < 0.3:
                upkeep.compact(city, keep=rng.random() < 0.5)


def lost_of(folder: Path, safe: dict[int, int], kind: Kind) -> list[str]:
    """Open the city after a crash, and return what is not as it was told."""
    problems = []
    with CityPrior.open(folder, CITY, kind.spec) as prior:
        for drive, frames in safe.items():
            latent, evidence = prior.read(area(drive))
            least, most = (round(value / kind.frame) for value in (int(evidence.min()), int(evidence.max())))
            if least < min(frames, CAP) or most - least > 12:
                problems.append(f"drive {drive}: {least} of {frames} frames")
            off = np.abs(latent - drive % 100.0)
            if (torn := off > kind.rounding).any():
                problems.append(f"drive {drive}: torn, {torn.mean():.3f} of its cells, by up to {off.max():g}")
    ledger = Ledger.open(Storage(folder / CITY), read_only=True)
    for record in ledger.drives():
        drive, digests = int(record.vehicle), upkeep.digests(record)
        there = {key: digests[key] for key in keys_of(SHARED) if key in digests}
        if drive in safe and len(there) < len(keys_of(SHARED)):
            problems.append(f"drive {drive}: only {len(there)} tiles where others had been")
        for key, cells in ledger.load(record, there).items():
            seen = cells.last_seen_s > 0
            frames = round(int(cells.evidence[seen].min()) / kind.frame)
            if frames < safe.get(drive, 1):
                problems.append(f"drive {drive}: {frames} of {safe.get(drive, 1)} frames of its own in tile {key}")
            if (off := np.abs(cells.latent[:, seen] - float(seen_of(drive))).max()) > OFF:
                problems.append(f"drive {drive}: tile {key} is off by {off:g} where others had been")
    return problems


def begin_anew(folder: Path, kind: Kind) -> None:
    """Make two empty copies of one city."""
    for name in (CITY, "other"):
        shutil.rmtree(folder / name, ignore_errors=True)
        CityPrior.open(folder, name, kind.spec).close()
    shutil.copy(folder / CITY / "city.json", folder / "other" / "city.json")


def kills(folder: Path, count: int, kind: Kind) -> dict[str, object]:
    """Kill a worker ``count`` times at random moments."""
    rng = random.Random(0)
    begin_anew(folder, kind)
    progress = folder / "progress"
    progress.touch()
    # a server that forks before TensorStore has threads: a new interpreter for every kill would take most of the time
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "__main__"])
    problems: list[str] = []
    recovered = opened = 0
    first = 0
    for _ in tqdm(range(count), unit="kill", disable=None):
        begin = progress.stat().st_size
        worker = context.Process(target=work, args=(folder, first, progress, kind))
        worker.start()
        time.sleep(rng.uniform(0.02, 0.6))
        os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join()
        if worker.exitcode != -signal.SIGKILL:
            raise SystemExit(f"the worker ended by itself, with {worker.exitcode}")
        recovered += any((folder / CITY / "open").glob("*/session.json"))
        lines = [line for line in progress.read_text()[begin:].splitlines(keepends=True) if line.endswith("\n")]
        safe: dict[int, int] = {}
        for line in lines:
            drive, frames = map(int, line.split())
            safe[drive] = max(frames, safe.get(drive, 0))
        try:
            problems += lost_of(folder, safe, kind)
            for name in (CITY, "other"):
                found = upkeep.verify(Ledger.open(Storage(folder / name)))
                problems += [f"{name}: {finding.what}" for finding in found]
            opened += 1
        except NmpError as error:
            problems.append(str(error))
        first = max([first, *safe]) + 2
        if first > 300:  # begin anew: what is verified after each kill stays small
            begin_anew(folder, kind)
            first = 0
    return {"kills": count, "opened": opened, "drives_recovered": recovered, "problems": problems}


def flips(folder: Path, count: int, kind: Kind) -> dict[str, object]:
    """Flip ``count`` bits of a city, one at a time, in any of its files."""
    rng = random.Random(0)
    city = folder / CITY
    shutil.rmtree(city, ignore_errors=True)
    for drive in range(6):
        with CityPrior.open(folder, CITY, kind.spec) as prior:
            window = Window(0, 0, SIDE, SIDE)
            latent, evidence = prior.read(window)
            noise = np.random.default_rng(drive).integers(-99, 99, latent.shape).astype(np.int8)
            prior.write(window, noise, evidence + np.uint16(max(50, kind.frame)), (drive + 1) * 10**9)
        if drive == 3:
            upkeep.compact(Ledger.open(Storage(city)))
    crashed = folder / "crashed" / CITY
    with CityPrior.open(folder, CITY, kind.spec, flush_interval_s=1e6) as prior:
        frame_of(prior, 0, kind)
        prior.flush()
        shutil.copytree(city, crashed)
        prior.discard()
    shutil.rmtree(city)
    shutil.copytree(crashed, city)
    files = sorted(p for p in city.rglob("*") if p.is_file() and p.suffix != ".lock" and p.stat().st_size)
    weights = [p.stat().st_size for p in files]

    noticed, in_open, missed = 0, 0, []
    for number in tqdm(range(count), unit="flip", disable=None):
        # every other one anywhere, the rest in a file of any size
        file = rng.choices(files, weights if number % 2 else None)[0]
        raw = file.read_bytes()
        damaged = bytearray(raw)
        bit = rng.randrange(8 * len(raw))
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        under_way = file.relative_to(city).parts[0] == "open"
        in_open += under_way
        try:
            found = (
                warnings_of(folder, kind) if under_way else upkeep.verify(Ledger.open(Storage(city), read_only=True))
            )
            if found:
                noticed += 1
            else:
                missed.append(f"{file.relative_to(city)} bit {bit}")
        except NmpError:
            noticed += 1
        if under_way:  # it was committed
            shutil.rmtree(city)
            shutil.copytree(crashed, city)
        else:
            file.write_bytes(raw)
    shutil.rmtree(crashed.parent)
    return {"flips": count, "in_a_drive_under_way": in_open, "noticed": noticed, "missed": missed}


def warnings_of(folder: Path, kind: Kind) -> list[str]:
    """Open a city with a drive that ended in a crash, and return what is said of it."""
    told: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    listener = Listener(logging.WARNING)
    log = logging.getLogger("nmp")
    log.addHandler(listener)
    log.propagate = False
    try:
        CityPrior.open(folder, CITY, kind.spec).close()
    finally:
        log.removeHandler(listener)
        log.propagate = True
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=KINDS, default=list(KINDS), help="how cells are written")
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for name in options.cells:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.monotonic()
            crash = kills(Path(folder), options.kills, KINDS[name])
            damage = flips(Path(folder), options.flips, KINDS[name])
            results[name] = {"crash": crash, "damage": damage, "seconds": round(time.monotonic() - begin, 1)}
    text = json.dumps(results, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    if any(result["crash"]["problems"] or result["damage"]["missed"] for result in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
