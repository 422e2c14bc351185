"""One city's prior, open for reading and writing."""

from __future__ import annotations

import atexit
import logging
import math
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmp.defaults import RESIDENT_MB
from nmp.errors import NmpError
from nmp.prior.cache import TileCache
from nmp.prior.cells import Cells
from nmp.prior.drive import OpenDrive, Tile
from nmp.prior.ledger import Compacted, Ledger, State
from nmp.prior.record import Record
from nmp.prior.storage import Place, Storage
from nmp.prior.tiles import Block, Key, blocks, bounds, keys_of
from nmp.prior.window import PriorSpec, Window

_log = logging.getLogger(__name__)

# tiles that are copied for saving at a time
_BATCH = 8
_AHEAD_M = 80.0
"""how far along the heading tiles are fetched, m"""
_STRIDE_M = 16.0
"""from one of the windows to the next that a car will come to on the way, m: less than the edge of a tile"""
_MOVED_M, _TURNED = 4.0, 0.1
"""how far a car moves (m) or turns (rad) before what lies ahead is looked through again"""
_SHARED = 4
"""tiles from which on two threads load them: those of a first read, for which a car waits"""


class CityPrior:
    """What earlier drives learned about the cells of one city; make one with :meth:`open`.

    Safe to use from several threads. Every method but :meth:`close` raises :class:`NmpError` once it is closed.
    """

    def __init__(
        self,
        name: str,
        spec: PriorSpec,
        ledger: Ledger | None,
        drive: OpenDrive | None,
        *,
        resident_mb: int,
        flush_interval_s: float,
    ) -> None:
        limit = resident_mb * 1024 * 1024
        self.spec = spec
        self._name = name
        self._ledger = ledger
        self._state = State(ledger, ledger.active()) if ledger is not None else None
        self._drive = drive
        self._created: set[Key] = set()
        """tiles of the own drive that no drive before had"""
        self._cache = TileCache(limit)
        # the other half is for tiles that can be dropped at once
        self._dirty_limit = limit // 2
        self._guard = threading.RLock()  # cache and list of tiles
        self._saving = threading.Lock()  # taken before the guard: an older copy must not overtake a newer one
        self.unsaved = ""
        """why the last save failed; empty when everything was saved"""
        self._closed = False
        self._stop = threading.Event()
        self._way: tuple[float, float, float] | None = None
        """where the car is and where it heads: x, y (m) and yaw (rad), for what to fetch next"""
        self._reach = 0, 0
        """rows and columns of the last window that was read"""
        self._fetch = threading.Event()
        self._threads: list[threading.Thread] = []
        if drive is not None:
            self._run(self._save_regularly, flush_interval_s)
            atexit.register(self._close_at_exit)

    def _run(self, loop: Any, *arguments: object) -> None:
        thread = threading.Thread(target=loop, args=arguments, name="prior", daemon=True)
        self._threads.append(thread)
        thread.start()

    @classmethod
    def open(
        cls,
        folder: Place,
        location: str,
        spec: PriorSpec,
        *,
        resident_mb: int = RESIDENT_MB,
        flush_interval_s: float = 2.0,
        read_only: bool = False,
        vehicle: str = "",
        whole: bool = False,
    ) -> CityPrior:
        """Open the prior of city ``location`` below ``folder``, a folder or URL; a missing one is created.

        ``resident_mb`` bounds the tiles in memory (MiB), ``flush_interval_s`` what a crash can lose (s),
        ``vehicle`` is kept with the drive. What is written becomes one drive of the city when the prior is closed;
        with ``whole`` nothing of it ever does when the process ends before that.
        Any number of processes may write a city: each sees the drives that were committed when it opened the prior,
        and its own. Drives that crashed are committed first. A read-only prior creates nothing; where there is none
        it is empty.

        Raises :class:`NmpError` when the stored prior is of another model, cell size, merge rule, city or newer
        format, when it is damaged, or when the folder cannot be used.
        """
        if not location or location.startswith(".") or "/" in location or "\0" in location:
            raise NmpError(f"location {location!r} cannot name a folder: use a plain name such as boston-seaport")
        if resident_mb < 1 or not flush_interval_s > 0:
            raise NmpError(
                f"prior with {resident_mb} MB resident, saved every {flush_interval_s} s: both must be above 0"
            )
        storage = Storage(str(folder)).below(location)
        try:
            ledger = Ledger.open_for(storage, location, spec, read_only=read_only)
            drive = None
            if not read_only:
                assert ledger is not None
                try:
                    OpenDrive.recover_all(ledger)
                except NmpError as error:  # a full disk: what that drive saved stays, for the next time
                    _log.warning("a drive that ended without being committed stays so for now: %s", error)
                drive = OpenDrive(ledger, vehicle, whole=whole)
            return cls(storage.name, spec, ledger, drive, resident_mb=resident_mb, flush_interval_s=flush_interval_s)
        except OSError as error:
            raise NmpError(
                f"cannot open the prior in {storage.name} ({error.strerror}): check the --prior folder"
            ) from error

    def read(
        self, window: Window, out: tuple[NDArray[np.int8], NDArray[np.uint16]] | None = None
    ) -> tuple[NDArray[np.int8], NDArray[np.uint16]]:
        """Return copies of the latent [channels, rows, cols] and the evidence [rows, cols]; unknown cells are 0.

        :param out: arrays to put them into; without it new arrays

        Raises :class:`NmpError` when a tile cannot be read from disk, or the window is out of range.
        """
        if out is None:
            out = np.empty((self.spec.channels, *window.shape), np.int8), np.empty(window.shape, np.uint16)
        latent, evidence = out
        latent.fill(0)
        evidence.fill(0)
        with self._guard:
            self._reach = window.shape
            for block, tile in self._tiles_of(window):
                rows, cols = block.in_window
                tile_rows, tile_cols = block.in_tile
                latent[:, rows, cols] = tile.cells.latent[:, tile_rows, tile_cols]
                evidence[rows, cols] = tile.cells.evidence[tile_rows, tile_cols]
        return latent, evidence

    def stale(self, window: Window, stamp_ns: int, after_s: float) -> NDArray[np.uint16] | None:
        """Return how much of the evidence [rows, cols] is too old to count; None where nothing is.

        What earlier drives left counts in full until nobody has seen the cell for ``after_s`` before ``stamp_ns``, by
        half after twice that time, by a quarter after three times. What the own drive saw is new.
        """
        now = int(stamp_ns) // 1_000_000_000
        old: NDArray[np.uint16] | None = None  # most windows hold nothing that is
        with self._guard:
            for block, tile in self._tiles_of(window):
                if now - tile.oldest_s <= after_s:
                    continue
                evidence, seen = (values[block.in_tile] for values in tile.earlier())
                age = np.where(seen > 0, (now - seen.astype(np.int64)) / after_s - 1, 0)
                if old is None:
                    old = np.zeros(window.shape, np.uint16)
                old[block.in_window] = np.rint(evidence * (1 - 0.5 ** np.maximum(age, 0)))
        return old if old is not None and old.any() else None

    def last_seen(self, window: Window) -> NDArray[np.int64]:
        """Return when each cell [rows, cols] was last written, ns in whole seconds; 0 = never."""
        seconds = np.zeros(window.shape, np.int64)
        with self._guard:
            for block, tile in self._tiles_of(window):
                seconds[block.in_window] = tile.cells.last_seen_s[block.in_tile]
        return seconds * 1_000_000_000

    def traversals(self, window: Window) -> NDArray[np.uint16]:
        """Return how many drives saw each cell [rows, cols], the own one included."""
        counts = np.zeros(window.shape, np.uint16)
        with self._guard:
            for block, tile in self._tiles_of(window):
                counts[block.in_window] = tile.cells.traversals[block.in_tile]
        return counts

    def prefetch(self, x: float, y: float, heading: float) -> None:
        """Bring the tiles of the next windows on the way into memory, in the background, the nearest first.

        These are windows like the last one that was read, up to 80 m ahead of (x, y) (m, map frame) along ``heading``,
        the yaw in the map frame (rad). What cannot be read is left to :meth:`read`, which reports it.
        """
        if not (math.isfinite(x) and math.isfinite(y) and math.isfinite(heading)):
            raise NmpError(f"pose ({x}, {y}, {heading}) is not finite: check the localisation")
        self._check_open()
        if self._way is not None:
            near = math.hypot(x - self._way[0], y - self._way[1]) < _MOVED_M
            if near and abs(math.remainder(heading - self._way[2], math.tau)) < _TURNED:
                return
        self._way = x, y, heading
        with self._guard:
            if self._closed:
                return
            if not any(thread.name == "prior-ahead" for thread in self._threads):
                self._run(self._fetch_ahead)
                self._threads[-1].name = "prior-ahead"
        self._fetch.set()

    def write(
        self,
        window: Window,
        latent: NDArray[np.int8],
        evidence: NDArray[np.uint16],
        stamp_ns: int,
        changed: NDArray[np.bool_] | None = None,
    ) -> None:
        """Store the cells of a window where ``changed`` [rows, cols] is set (without it: where evidence > 0).

        ``latent`` is int8 [channels, rows, cols], ``evidence`` uint16 [rows, cols]; ``stamp_ns`` becomes the
        time these cells were last seen, cut to whole seconds (the first second counts as 1 s, as 0 is "never").

        With the merge rule "sum", ``evidence`` is that of the cell as it was read plus the weight of this frame,
        before any cap (the prior caps it), and ``latent`` the mean of both: what the drive adds to the city is
        derived from the difference. A cell whose evidence does not grow was seen, and stays as it is.

        What cannot be saved stays in memory, and is tried again; :attr:`unsaved` tells of it. Raises :class:`NmpError`
        when an argument does not fit, when the prior is read-only, and when so much is unsaved that the memory limit
        is reached: nothing is stored then.
        """
        drive = self._check_writable()
        self._check_arrays(window, latent, evidence, changed)
        seconds = max(1, int(stamp_ns) // 1_000_000_000)
        if not (stamp_ns >= 0 and seconds < 2**32):
            raise NmpError(f"stamp {stamp_ns} ns lies outside the years 1970 to 2106: check the clock of the source")
        mask = evidence > 0 if changed is None else changed
        if self._cache.dirty_bytes > self._dirty_limit:
            self._save_or_raise()
        with self._guard:
            self._check_open()  # again: it may have been closed meanwhile
            touched = [part for block in blocks(window) if (part := block.cropped(mask))]
            resident = self._resident(block.key for block in touched)
            if touched and drive.first_ns is None:
                drive.first_ns = int(stamp_ns)
            for block in touched:
                tile = resident.get(block.key)
                if tile is None:
                    tile = Tile(Cells(self.spec.channels), self.spec)
                    self._cache.put(block.key, tile)
                    if self._state is not None and not self._state.existing([block.key]):
                        self._created.add(block.key)
                rows, cols = block.in_window
                values = latent[:, rows, cols], evidence[rows, cols], seconds, mask[rows, cols]
                tile.store(block.in_tile, *values)
                self._cache.mark_dirty(block.key)
            self._cache.shrink()

    def extent(self) -> Window | None:
        """Return the block of cells that covers every tile which holds anything, or None for an empty prior."""
        self._check_open()
        with self._guard:
            return bounds(self._keys())

    def recordings(self) -> set[str]:
        """Return the hashes of the recordings that had been mapped as a whole when this prior was opened."""
        records = self._state.records if self._state is not None else []
        return {name for record in records for name in record.recordings}

    def places(self) -> NDArray[np.int64]:
        """Return (row, column) of every committed tile as [N, 2]: small in memory, unlike a set of them."""
        self._check_open()
        return self._state.places() if self._state is not None else np.empty((0, 2), np.int64)

    def statistics(self) -> dict[str, int]:
        """Return counts of tiles (all, resident, dirty = unsaved, damaged) and of bytes (resident).

        However large the city is, this looks at nothing that is stored: it may be asked for while frames are mapped.
        """
        self._check_open()
        with self._guard:
            return {
                "tiles": (len(self._state) if self._state is not None else 0) + len(self._created),
                "resident_tiles": len(self._cache),
                "dirty_tiles": len(self._cache.dirty),
                "damaged_tiles": self._ledger.damaged_tiles if self._ledger is not None else 0,
                "resident_bytes": self._cache.resident_bytes,
            }

    @property
    def damage(self) -> str:
        """What was wrong with the tile that was found damaged last, and where it lies; empty when none was."""
        return self._ledger.last_damage if self._ledger is not None else ""

    def flush(self) -> None:
        """Save every change made so far; it is synced to disk when this returns.

        Raises :class:`NmpError` when a tile could not be saved. It stays in memory and is tried again.
        """
        self._check_open()
        self._save_or_raise()

    def close(self, recording: str = "") -> Record | None:
        """Flush, commit the drive and stop the background threads; a second call does nothing.

        :param recording: hash of the recording that this drive is the whole of, where it is one

        Returns the record of the drive, None when it wrote nothing. Raises :class:`NmpError` when that could not be
        saved: what was flushed stays, and is committed when the prior is opened again; later changes are lost. To
        keep them while the cause is being mended, call :meth:`flush` until it succeeds, then close.
        """
        if not self._end() or self._drive is None:
            return None
        try:
            error = self._save_dirty()
            if error is not None:
                raise error
            return self._drive.commit(recording)
        finally:
            self._drive.release()

    def discard(self) -> None:
        """Close without committing: nothing of this drive becomes part of the city.

        Raises :class:`NmpError` when what was saved of it cannot be deleted.
        """
        if self._end() and self._drive is not None:
            try:
                self._drive.forget()
            finally:
                self._drive.release()

    def _end(self) -> bool:
        """Stop the background threads; tell whether that was still to be done."""
        with self._guard:
            if self._closed:
                return False
            self._closed = True
        self._stop.set()
        self._fetch.set()
        for thread in self._threads:
            thread.join()
        atexit.unregister(self._close_at_exit)
        return True

    def __enter__(self) -> CityPrior:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._drive is not None and self._drive.whole:
            self.discard()
        else:
            self.close()

    # -- tiles ----------------------------------------------------------------------------------------------

    def _keys(self) -> set[Key]:
        keys = set(self._cache)
        if self._state is not None:
            keys |= self._state.keys()
        return keys | self._drive.saved if self._drive is not None else keys

    def _tiles_of(self, window: Window) -> list[tuple[Block, Tile]]:
        """Return the known tiles of a window with the part of it that each covers; the guard is held."""
        self._check_open()
        parts = list(blocks(window))
        resident = self._resident(block.key for block in parts)
        self._cache.shrink()
        return [(block, resident[block.key]) for block in parts if block.key in resident]

    def _resident(self, keys: Iterable[Key]) -> dict[Key, Tile]:
        """Return those of the tiles that are known, from memory or disk; the guard is held."""
        tiles: dict[Key, Tile] = {}
        absent: list[Key] = []
        for key in keys:
            tile = self._cache.get(key)
            if tile is None:
                absent.append(key)
            else:
                tiles[key] = tile
        if absent:
            for key, tile in self._load(absent).items():
                tiles[key] = tile
                self._cache.put(key, tile)
        return tiles

    def _load(self, keys: list[Key]) -> dict[Key, Tile]:
        """Return those of the tiles that are stored: as the own drive left them, or as the drives before did."""
        own = self._drive.load(keys) if self._drive is not None else {}
        others = [key for key in keys if key not in own]
        return own | {key: Tile(cells, self.spec) for key, cells in self._committed(others).items()}

    def _committed(self, keys: list[Key]) -> dict[Key, Cells]:
        if self._state is None or self._ledger is None:
            return {}
        try:
            return _loaded(self._state, keys)
        except Compacted:
            self._state = State(self._ledger, self._ledger.active())
            self._created -= set(self._state.existing(list(self._created)))
            return _loaded(self._state, keys)

    def _fetch_ahead(self) -> None:
        """Load what :meth:`prefetch` asked for, until told to stop."""
        while self._fetch.wait() and not self._stop.is_set():
            self._fetch.clear()
            for key in self._ahead():
                with self._guard:  # a read that loads tiles itself comes first
                    if key in self._cache or self._is_own(key):
                        continue
                try:
                    # without the guard: reading and writing go on. Committed drives never change meanwhile.
                    found = self._committed([key])
                except NmpError as error:
                    _log.debug("not fetched ahead: %s", error)
                    break
                with self._guard:
                    for place, cells in found.items():
                        if place not in self._cache and not self._is_own(place):
                            self._cache.put(place, Tile(cells, self.spec))
                    self._cache.shrink()
                if self._fetch.is_set():  # the car has moved on, and something else may be nearest
                    break

    def _is_own(self, key: Key) -> bool:
        """Tell whether the own drive has saved a tile: it is not as others left it."""
        return self._drive is not None and key in self._drive.saved

    def _ahead(self) -> list[Key]:
        """Return the committed tiles on the way that are not in memory, in the order in which the car needs them."""
        if self._way is None or self._state is None:
            return []
        x, y, heading = self._way
        rows, cols = (size or round(_AHEAD_M / self.spec.cell) for size in self._reach)
        wanted: dict[Key, None] = {}  # a dict, because it keeps their order
        for step in range(round(_AHEAD_M / _STRIDE_M) + 1):
            along = step * _STRIDE_M
            place = x + along * math.cos(heading), y + along * math.sin(heading)
            wanted.update(dict.fromkeys(keys_of(Window.around(*place, self.spec.cell, rows, cols))))
        with self._guard:
            absent = [key for key in wanted if key not in self._cache]
        return self._state.existing(absent)

    # -- saving ---------------------------------------------------------------------------------------------

    def _save_regularly(self, interval_s: float) -> None:
        """Save changed tiles until told to stop; :attr:`unsaved` tells of errors."""
        while not self._stop.wait(interval_s):
            try:
                error = self._save_dirty()
            except Exception as unexpected:  # the thread must outlive it: what it holds is in memory only
                error = NmpError(f"cannot save the prior in {self._name} ({unexpected}): see the log")
                _log.exception("saving the prior failed")
            if error is not None and str(error) != self.unsaved:
                _log.error("%s", error)
            elif error is None and self.unsaved:
                _log.info("the prior in %s is saved again", self._name)
            self.unsaved = str(error) if error else ""

    def _save_or_raise(self) -> None:
        error = self._save_dirty()
        self.unsaved = str(error) if error else ""
        if error is not None:
            raise error

    def _save_dirty(self) -> NmpError | None:
        """Save every tile that is dirty now; return what went wrong."""
        if self._drive is None:
            return None
        failures: dict[Key, str] = {}
        with self._saving:
            try:
                if self._drive.lost():
                    _log.error("what was saved of this drive in %s is gone: saving again what is in memory", self._name)
                    self._mark_own_dirty()
                self._drive.renew()
            except NmpError as error:
                return error
            with self._guard:
                keys = self._cache.dirty
            for start in range(0, len(keys), _BATCH):
                edits: dict[Key, int] = {}
                copies: dict[Key, NDArray[np.uint8]] = {}
                for key in keys[start : start + _BATCH]:
                    with self._guard:  # for one copy at a time, so that reads hardly wait
                        edits[key], tile = self._cache[key].edits, self._cache[key].copy()
                    copies[key] = tile.pack()
                failed = self._drive.save(copies)
                failures.update(failed)
                with self._guard:
                    for key in copies.keys() - failed.keys():
                        self._cache.mark_saved(key, edits[key])
                    self._cache.shrink()
        if not failures:
            return None
        return NmpError(
            f"cannot save {len(failures)} tiles of the prior in {self._name} ({next(iter(failures.values()))}): "
            "free disk space or mend the permissions, unsaved cells are kept in memory until then"
        )

    def _mark_own_dirty(self) -> None:
        with self._guard:
            for key in self._cache:
                if self._cache[key].touched is not None:
                    self._cache.mark_dirty(key)

    def _close_at_exit(self) -> None:
        try:
            if self._drive is not None and self._drive.whole:
                self.discard()
            else:
                self.close()
        except NmpError as error:
            _log.error("%s", error)

    # -- checks ---------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise NmpError(f"prior in {self._name} is closed: open it again")

    def _check_writable(self) -> OpenDrive:
        self._check_open()
        if self._drive is None:
            raise NmpError(f"prior in {self._name} was opened read-only: open it for writing")
        return self._drive

    def _check_arrays(
        self,
        window: Window,
        latent: NDArray[np.int8],
        evidence: NDArray[np.uint16],
        changed: NDArray[np.bool_] | None,
    ) -> None:
        expected: list[tuple[str, NDArray[Any], type[np.generic], tuple[int, ...]]] = [
            ("latent", latent, np.int8, (self.spec.channels, *window.shape)),
            ("evidence", evidence, np.uint16, window.shape),
        ]
        if changed is not None:
            expected.append(("changed", changed, np.bool_, window.shape))
        for name, array, dtype, shape in expected:
            if array.dtype != dtype or array.shape != shape:
                raise NmpError(
                    f"{name} for the prior is {array.dtype} {list(array.shape)}: "
                    f"pass {np.dtype(dtype).name} {list(shape)}"
                )


def _loaded(state: State, keys: list[Key]) -> dict[Key, Cells]:
    """Return those of the tiles that exist; two threads fold them where there are many."""
    there = state.existing(keys)
    if len(there) < _SHARED:
        return state.load(there)
    with ThreadPoolExecutor(1) as helper:
        half = helper.submit(state.load, there[1::2])
        return state.load(there[::2]) | half.result()
