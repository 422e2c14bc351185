"""One city's prior, open for reading and writing."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmp.errors import NmpError
from nmp.prior import manifest
from nmp.prior.cache import TileCache
from nmp.prior.lock import WriterLock
from nmp.prior.store import TileStore
from nmp.prior.tiles import Block, Key, Tile, blocks, bounds
from nmp.prior.window import PriorSpec, Window

_log = logging.getLogger(__name__)

# tiles that are copied for saving at a time
_BATCH = 8


class CityPrior:
    """What earlier drives learned about the cells of one city; make one with :meth:`open`.

    Safe to use from several threads. Every method but :meth:`close` raises :class:`NmpError` once it is closed.
    """

    def __init__(
        self,
        folder: Path,
        spec: PriorSpec,
        store: TileStore | None,
        lock: WriterLock | None,
        *,
        resident_mb: int,
        flush_interval_s: float,
    ) -> None:
        limit = resident_mb * 1024 * 1024
        self.spec = spec
        self._folder = folder
        self._store = store
        self._lock_file = lock
        self._cache = TileCache(Tile.nbytes(spec.channels), limit)
        # the other half is for tiles that can be dropped at once
        self._dirty_limit = limit // 2
        self._guard = threading.RLock()  # cache and list of tiles
        self._saving = threading.Lock()  # taken before the guard: an older copy must not overtake a newer one
        self._error: NmpError | None = None
        self._closed = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if lock is not None:
            self._thread = threading.Thread(
                target=self._save_regularly, args=(flush_interval_s,), name="prior-flush", daemon=True
            )
            self._thread.start()
            atexit.register(self._close_at_exit)

    @classmethod
    def open(
        cls,
        folder: Path,
        location: str,
        spec: PriorSpec,
        *,
        resident_mb: int = 256,
        flush_interval_s: float = 2.0,
        read_only: bool = False,
    ) -> CityPrior:
        """Open the prior of city ``location`` below ``folder``; a missing one is created.

        ``resident_mb`` bounds the tiles in memory (MiB), ``flush_interval_s`` what a crash can lose (s). A
        read-only prior needs no lock and creates nothing; where there is none it is empty. It sees the tiles
        that existed when it was opened, each as it was on its first use.

        Raises :class:`NmpError` when the stored prior is of another model, cell size, city or newer format,
        when it is damaged, when another process writes it, or when the folder cannot be used.
        """
        if not location or location.startswith(".") or "/" in location or "\0" in location:
            raise NmpError(f"location {location!r} cannot name a folder: use a plain name such as boston-seaport")
        if resident_mb < 1 or not flush_interval_s > 0:
            raise NmpError(
                f"prior with {resident_mb} MB resident, saved every {flush_interval_s} s: both must be above 0"
            )
        city = Path(folder) / location
        try:
            store, lock = _open_reader(city, location, spec) if read_only else _open_writer(city, location, spec)
        except OSError as error:
            raise NmpError(f"cannot open the prior in {city} ({error.strerror}): check the --prior folder") from error
        return cls(city, spec, store, lock, resident_mb=resident_mb, flush_interval_s=flush_interval_s)

    def read(self, window: Window) -> tuple[NDArray[np.int8], NDArray[np.uint16]]:
        """Return copies of the latent [channels, rows, cols] and the evidence [rows, cols]; unknown cells are 0.

        Raises :class:`NmpError` when a tile cannot be read from disk, or the window is out of range.
        """
        latent = np.zeros((self.spec.channels, *window.shape), np.int8)
        evidence = np.zeros(window.shape, np.uint16)
        with self._guard:
            for block, tile in self._tiles_of(window):
                rows, cols = block.in_window
                tile_rows, tile_cols = block.in_tile
                latent[:, rows, cols] = tile.latent[:, tile_rows, tile_cols]
                evidence[rows, cols] = tile.evidence[tile_rows, tile_cols]
        return latent, evidence

    def last_seen(self, window: Window) -> NDArray[np.int64]:
        """Return when each cell [rows, cols] was last written, ns in whole seconds; 0 = never."""
        seconds = np.zeros(window.shape, np.int64)
        with self._guard:
            for block, tile in self._tiles_of(window):
                seconds[block.in_window] = tile.last_seen_s[block.in_tile]
        return seconds * 1_000_000_000

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

        Raises :class:`NmpError` when an argument does not fit, or the prior is read-only. Also raised, once,
        when saving failed since the last call: these cells are then stored in memory all the same, and saving is
        tried again. Only when too much is unsaved for the memory limit is the call refused and nothing stored.
        """
        self._check_writable()
        self._check_arrays(window, latent, evidence, changed)
        seconds = max(1, int(stamp_ns) // 1_000_000_000)
        if not (stamp_ns >= 0 and seconds < 2**32):
            raise NmpError(f"stamp {stamp_ns} ns lies outside the years 1970 to 2106: check the clock of the source")
        mask = evidence > 0 if changed is None else changed
        if self._cache.dirty_bytes > self._dirty_limit:
            self._save_or_raise()
        with self._guard:
            self._check_open()  # again: it may have been closed meanwhile
            touched = [block for block in blocks(window) if mask[block.in_window].any()]
            resident = self._resident(block.key for block in touched)
            for block in touched:
                tile = resident.get(block.key)
                if tile is None:
                    tile = Tile(self.spec.channels)
                    self._cache.put(block.key, tile)
                rows, cols = block.in_window
                part = latent[:, rows, cols], evidence[rows, cols], seconds, mask[rows, cols]
                tile.store(block.in_tile, *part)
                self._cache.mark_dirty(block.key)
            self._cache.shrink()
            error, self._error = self._error, None
        if error is not None:
            raise error

    def extent(self) -> Window | None:
        """Return the block of cells that covers every tile which holds anything, or None for an empty prior."""
        self._check_open()
        with self._guard:
            return bounds(self._keys())

    def statistics(self) -> dict[str, int]:
        """Return counts of tiles (all, resident, dirty = unsaved) and of bytes (on disk, resident)."""
        self._check_open()
        with self._guard:
            return {
                "tiles": len(self._keys()),
                "resident_tiles": len(self._cache),
                "dirty_tiles": len(self._cache.dirty),
                "resident_bytes": self._cache.resident_bytes,
                "bytes_on_disk": sum(self._store.sizes.values()) if self._store else 0,
            }

    def flush(self) -> None:
        """Save every change made so far; it is synced to disk when this returns.

        Raises :class:`NmpError` when a tile could not be saved. It stays in memory and is tried again.
        """
        self._check_open()
        self._save_or_raise()

    def close(self) -> None:
        """Flush, stop the background thread and let others write; a second call does nothing.

        Raises :class:`NmpError` when tiles could not be saved: those changes are lost. To keep them while the
        cause is being mended, call :meth:`flush` until it succeeds, then close.
        """
        with self._guard:
            if self._closed:
                return
            self._closed = True
        if self._thread is None or self._lock_file is None:
            return
        atexit.unregister(self._close_at_exit)
        self._stop.set()
        self._thread.join()
        error = self._save_dirty()
        self._lock_file.release()
        if error is not None:
            raise error

    def __enter__(self) -> CityPrior:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- tiles ----------------------------------------------------------------------------------------------

    def _keys(self) -> set[Key]:
        return self._cache.keys | (self._store.sizes.keys() if self._store else set())

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
        if absent and self._store is not None:
            for key, planes in self._store.load(absent).items():
                tiles[key] = Tile.unpack(planes)
                self._cache.put(key, tiles[key])
        return tiles

    # -- saving ---------------------------------------------------------------------------------------------

    def _save_regularly(self, interval_s: float) -> None:
        """Save changed tiles until told to stop; an error waits for the next call that can report it."""
        reported = ""
        while not self._stop.wait(interval_s):
            try:
                error = self._save_dirty()
            except Exception as unexpected:  # the thread must outlive it: what it holds is in memory only
                error = NmpError(f"cannot save the prior in {self._folder} ({unexpected}): see the log")
                _log.exception("saving the prior failed")
            self._error = error
            if error is not None and str(error) != reported:
                _log.error("%s", error)
            elif error is None and reported:
                _log.info("the prior in %s is saved again", self._folder)
            reported = str(error) if error else ""

    def _save_or_raise(self) -> None:
        error = self._save_dirty()
        self._error = None
        if error is not None:
            raise error

    def _save_dirty(self) -> NmpError | None:
        """Save every tile that is dirty now; return what went wrong."""
        if self._store is None:
            return None
        failures: dict[Key, str] = {}
        with self._saving:
            with self._guard:
                keys = self._cache.dirty
            for start in range(0, len(keys), _BATCH):
                edits: dict[Key, int] = {}
                copies: dict[Key, NDArray[np.uint8]] = {}
                for key in keys[start : start + _BATCH]:
                    with self._guard:  # for one copy at a time, so that reads hardly wait
                        tile = self._cache[key]
                        edits[key], copies[key] = tile.edits, tile.pack()
                sizes, failed = self._store.save(copies)
                failures.update(failed)
                with self._guard:
                    for key, size in sizes.items():
                        self._store.sizes[key] = size
                        self._cache.mark_saved(key, edits[key])
                    self._cache.shrink()
        if not failures:
            return None
        return NmpError(
            f"cannot save {len(failures)} tiles of the prior in {self._folder} ({next(iter(failures.values()))}): "
            "free disk space or mend the permissions, unsaved cells are kept in memory until then"
        )

    def _close_at_exit(self) -> None:
        try:
            self.close()
        except NmpError as error:
            _log.error("%s", error)

    # -- checks ---------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise NmpError(f"prior in {self._folder} is closed: open it again")

    def _check_writable(self) -> None:
        self._check_open()
        if self._lock_file is None:
            raise NmpError(f"prior in {self._folder} was opened read-only: open it for writing")

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


def _open_reader(city: Path, location: str, spec: PriorSpec) -> tuple[TileStore | None, None]:
    if not (city / manifest.NAME).exists() and not TileStore.has_tiles(city):
        return None, None
    manifest.check(city, location, spec)
    return TileStore(city, spec, read_only=True), None


def _open_writer(city: Path, location: str, spec: PriorSpec) -> tuple[TileStore, WriterLock]:
    city.mkdir(parents=True, exist_ok=True)
    lock = WriterLock(city)
    try:
        # tiles without a manifest have lost it: a new one could misread them
        if not (city / manifest.NAME).exists() and not TileStore.has_tiles(city):
            manifest.create(city, location, spec)
        manifest.check(city, location, spec)
        return TileStore(city, spec, read_only=False), lock
    except BaseException:
        lock.release()
        raise
