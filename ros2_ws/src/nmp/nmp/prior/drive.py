"""The drive that is under way: what it adds to each tile, kept on disk until it is committed."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmp.errors import NmpError
from nmp.prior.cells import FIELD_PLANES, Cells, from_planes, on_grid, to_planes
from nmp.prior.ledger import Ledger
from nmp.prior.record import Newer, Record, checked, tile_table, unchecked
from nmp.prior.storage import Lock, Storage
from nmp.prior.tiles import TILE, Key
from nmp.prior.tileset import Planes, TileSet
from nmp.prior.window import PriorSpec

_log = logging.getLogger(__name__)

OPEN = "open"
WHOLE = "building"
"""where drives are kept that count only when they are whole"""
SESSION = "session.json"
LOCK = "lock"
_LEASE_S = 900.0
"""where there are no locks (s3://, ...), a drive that was not saved for so long is over, s"""
_ATTEMPTS = 20
"""to lock the folder of a new drive"""
_FORMAT = 2
"""of the tiles of a drive that is under way"""
_WEIGHT_PLANES = 2
_BEFORE_PLANES = 6
"""share that is left (4) and evidence (2); the latents come after them"""


class Tile:
    """A tile in memory: the state of its cells, and what the own drive has added to them.

    A state holds evidence E and latents l, together the sum S = E l. A frame of weight w adds w times what it saw;
    where that brings E above the cap, S loses the same share as E. So S is the sum of what was there before the drive,
    times the share ``kept`` that is left of it, and of what the drive saw, where later looks count more once the cap
    is reached: the drive's own part is S - kept S_before. While frames are stored no channel needs to be added up.
    """

    def __init__(self, cells: Cells, spec: PriorSpec) -> None:
        self.cells = cells
        self.cells.coded = None  # they are about to change
        self.spec = spec
        self.touched: NDArray[np.bool_] | None = None
        """[64, 64] cells that the own drive saw; None: none"""
        self.weight: NDArray[np.float32] = np.empty(0, np.float32)
        """[64, 64] sum of the weights of its frames, up to 65535"""
        self.before: Cells | None = None
        """the cells before the own drive; None: empty"""
        self.kept: NDArray[np.float32] = np.empty(0, np.float32)
        """[64, 64] share of these that is left; where there are any"""
        self._oldest_s: int | None = None
        self.edits = 0
        """counts the changes, to tell whether a tile changed while it was being saved"""

    @property
    def nbytes(self) -> int:
        own = 0 if self.touched is None else self.touched.nbytes + self.weight.nbytes + self.kept.nbytes
        return self.cells.nbytes + own + (0 if self.before is None else self.before.nbytes)

    def earlier(self) -> tuple[NDArray[np.uint16], NDArray[np.uint32]]:
        """Return what is left of the evidence [64, 64] from before the own drive, and when it was seen then (s).

        Where nobody can tell any more when that was, it is 0.
        """
        if self.touched is None:
            return self.cells.evidence, self.cells.last_seen_s
        if self.before is None:
            return np.zeros((TILE, TILE), np.uint16), np.zeros((TILE, TILE), np.uint32)
        return np.rint(self.kept * self.before.evidence).astype(np.uint16), self.before.last_seen_s

    @property
    def oldest_s(self) -> int:
        """When the cell of :meth:`earlier` that was left alone for longest was seen, s; 2^32 where there is none."""
        if self._oldest_s is None:
            evidence, seen = self.earlier()
            known = seen[(evidence > 0) & (seen > 0)]
            self._oldest_s = int(known.min()) if known.size else 2**32
        return self._oldest_s

    def begin(self) -> None:
        """Make room for what the own drive adds."""
        if self.touched is None:
            self.touched = np.zeros((TILE, TILE), bool)
            if self.spec.merge == "sum":
                self.weight = np.zeros((TILE, TILE), np.float32)
                if self.cells.evidence.any():
                    self.before, self.kept = self.cells.copy(), np.ones((TILE, TILE), np.float32)

    def store(
        self,
        where: tuple[slice, slice],
        latent: NDArray[np.int8],
        evidence: NDArray[np.uint16],
        seconds: int,
        changed: NDArray[np.bool_],
    ) -> None:
        """Put a frame's result into the cells of a block where ``changed`` [rows, cols] is set.

        ``evidence`` is that of the cell before plus the weight of this frame, ``latent`` the mean of both: their
        difference to what the cells hold is what the frame adds.
        """
        self.begin()
        assert self.touched is not None
        cells = self.cells
        old = cells.latent[:, where[0], where[1]]
        stored = np.minimum(evidence, self.spec.evidence_cap)
        new = changed
        if self.spec.merge == "sum":
            new = evidence > cells.evidence[where]
            new &= changed
            self._add(where, evidence, stored, new)
        if new.all():
            old[...] = latent
        else:
            # old ^ (old ^ new) & mask: five times faster than a masked copy
            difference = old ^ latent
            difference &= -new.view(np.int8)
            old ^= difference
        np.copyto(cells.evidence[where], stored, where=new)
        np.copyto(cells.last_seen_s[where], np.uint32(seconds), where=changed)
        first = changed & ~self.touched[where]
        if first.any():
            cells.traversals[where] += first & (cells.traversals[where] < 65535)
            self.touched[where] |= first
        self.edits += 1

    def _add(
        self,
        where: tuple[slice, slice],
        evidence: NDArray[np.uint16],
        stored: NDArray[np.uint16],
        new: NDArray[np.bool_],
    ) -> None:
        """Count the weight of a frame in the cells ``new``, which are about to hold ``stored``."""
        added = evidence - self.cells.evidence[where]
        added *= new
        weight = self.weight[where]
        weight += added
        np.minimum(weight, 65535, out=weight)  # what 16 bits count
        if self.before is not None and evidence.max() > self.spec.evidence_cap:
            left = np.divide(stored, np.maximum(evidence, 1), dtype=np.float32)
            np.multiply(self.kept[where], left, out=self.kept[where], where=new)

    def contribution(self) -> Cells:
        """Return what the own drive adds to the city, as it is committed."""
        own = Cells(self.spec.channels)
        if self.touched is None:
            return own
        own.last_seen_s[...] = self.cells.last_seen_s * self.touched
        own.traversals[...] = self.touched
        latent = self.cells.latent
        if self.spec.merge == "latest":
            own.evidence[...] = self.cells.evidence * self.touched
        else:
            own.evidence[...] = self.weight
            if self.before is not None:
                # Every step is rounded once, in the same way wherever a drive is committed.
                left = self.kept * self.before.evidence
                sums = latent.astype(np.float32) * self.cells.evidence
                sums -= self.before.latent * left
                sums /= np.maximum(self.cells.evidence - left, 1)
                latent = np.rint(sums, out=sums).clip(-128, 127).astype(np.int8)
        own.latent[...] = on_grid(latent, self.spec.bits)
        own.latent *= own.evidence > 0
        return own

    def copy(self) -> Tile:
        """Return what :meth:`pack` needs, which later changes leave as it is."""
        tile = Tile(self.cells.copy(), self.spec)
        assert self.touched is not None
        tile.touched, tile.weight = self.touched.copy(), self.weight.copy()
        tile.before, tile.kept = self.before, self.kept.copy()
        return tile

    def pack(self) -> Planes:
        """Return a tile as it is saved while the drive goes on: all that it holds.

        Planes of the cells and of ``touched``, with sums also those of ``weight``, of ``kept``, and latent and evidence
        from before the drive.
        """
        assert self.touched is not None
        parts = [self.cells.pack(), self.touched[None].view(np.uint8)]
        if self.spec.merge == "sum":
            parts.append(to_planes(self.weight.astype("<u2")))
            if self.before is None:
                parts.append(np.zeros((_BEFORE_PLANES + self.spec.channels, TILE, TILE), np.uint8))
            else:
                parts.append(to_planes(self.kept.astype("<f4", copy=False)))
                parts.append(to_planes(self.before.evidence.astype("<u2", copy=False)))
                parts.append(self.before.latent.view(np.uint8))
        return np.concatenate(parts)

    @classmethod
    def unpack(cls, planes: Planes, spec: PriorSpec) -> Tile:
        """Return the tile that :meth:`pack` wrote."""
        end = spec.channels + FIELD_PLANES
        tile = cls(Cells.unpack(planes[:end]), spec)
        tile.touched = planes[end].view(np.bool_).copy()
        if spec.merge == "sum":
            weight, kept, evidence, latent = np.split(planes[end + 1 :], (2, 6, 8))
            tile.weight = from_planes(weight, "<u2").astype(np.float32)
            if evidence.any():
                tile.before = Cells(spec.channels)
                tile.before.evidence[...] = from_planes(evidence, "<u2")
                tile.before.latent[...] = latent.view(np.int8)
                tile.kept = from_planes(kept, "<f4").astype(np.float32)
        return tile


def open_planes(spec: PriorSpec) -> int:
    """Return how many byte planes a tile has in the drive that is under way."""
    own = _WEIGHT_PLANES + _BEFORE_PLANES + spec.channels if spec.merge == "sum" else 0
    return spec.channels + FIELD_PLANES + 1 + own


def _summed(planes: Planes, spec: PriorSpec) -> Tile:
    """Return a tile as it was saved in format 1: sums of weight x latent, of three bytes, in place of ``before``."""
    end = spec.channels + FIELD_PLANES
    tile = Tile(Cells.unpack(planes[:end]), spec)
    tile.touched = planes[end].view(np.bool_).copy()
    tile.weight = from_planes(planes[end + 1 : end + 3], "<u2").astype(np.float32)
    sums = np.zeros((spec.channels, TILE, TILE, 4), np.uint8)
    # into the upper bytes, and back by a shift that keeps the sign
    sums[..., 1:] = np.moveaxis(planes[end + 3 :].reshape(3, -1, TILE, TILE), 0, -1)
    mean = (sums.view("<i4")[..., 0] >> 8) / np.maximum(tile.weight, 1)
    tile.cells.latent[...] = np.rint(mean).clip(-128, 127)
    return tile


class OpenDrive:
    """One process's drive through a city, until it is committed. Nothing exists on disk before the first save.

    :param whole: it counts only when it is whole: a crash leaves nothing of it
    """

    def __init__(self, ledger: Ledger, vehicle: str, name: str = "", *, whole: bool = False) -> None:
        self.ledger = ledger
        self.vehicle = vehicle
        self.whole = whole
        self.first_ns: int | None = None
        self._taken_over = False
        self.storage: Storage = ledger.storage.below(f"{WHOLE if whole else OPEN}/{name or uuid.uuid4().hex}")
        self._tiles = TileSet(self.storage.below("tiles"), open_planes(ledger.spec), level=1)
        self._unpack = Tile.unpack
        self._lock: Lock | None = None
        self.saved: set[Key] = set()
        """tiles on disk"""

    def lost(self) -> bool:
        """Tell whether what was saved is no longer there: the folder was removed, or the disk is gone."""
        return self._lock is not None and self.storage.get(SESSION) is None

    def save(self, tiles: Mapping[Key, Planes]) -> dict[Key, str]:
        """Write tiles, wait until they are synced to disk, and return the reasons for those that were not saved."""
        try:
            if self._lock is None or self.lost():
                self._begin()
        except (OSError, NmpError) as error:
            reason = str(getattr(error, "strerror", None) or error)
            return dict.fromkeys(tiles, reason)
        failures = self._tiles.save(tiles)
        self.saved.update(tiles.keys() - failures.keys())
        return failures

    def renew(self) -> None:
        """Where there are no locks, tell others that this drive goes on. Raises :class:`NmpError`."""
        if self.storage.local is None and self._lock is not None:
            self._describe()

    def _begin(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        self.saved.clear()
        # Locked before there is anything to see, so that nobody takes it for what a crash left. Who looks into the
        # empty folder just before that removes it.
        for _ in range(_ATTEMPTS):
            lock = Lock(self.storage, LOCK, wait=True)
            if lock.held:
                self._lock = lock
                self._describe()
                return
        raise NmpError("other processes keep removing its folder: saving is tried again")

    def _describe(self) -> None:
        content: dict[str, Any] = {"format": _FORMAT, "vehicle": self.vehicle, "first_ns": self.first_ns}
        if self.storage.local is None:
            content["alive_s"] = time.time()
        self.storage.put(SESSION, checked(content))

    def load(self, keys: Iterable[Key]) -> dict[Key, Tile]:
        """Return those of the saved tiles that are intact; others are reported, and no longer count as saved."""

        def reject(key: Key, reason: str) -> None:
            self.saved.discard(key)
            blob = self._tiles.blob(key)
            aside = "" if reason == "vanished" else self._tiles.storage.put_aside(blob)
            what = "has vanished" if reason == "vanished" else f"is corrupt ({reason}), kept as {aside}"
            self.ledger.tell_tile(f"tile {key} of the drive under way", f"{what}; it counts as unknown: {blob}")

        wanted = [key for key in keys if key in self.saved]
        return {key: self._unpack(planes, self.ledger.spec) for key, planes in self._tiles.load(wanted, reject).items()}

    def commit(self, recording: str = "") -> Record | None:
        """Make what was saved a part of the city for good; None when that is nothing. The drive is over then.

        :param recording: hash of the recording that this drive is the whole of

        Raises :class:`NmpError` when it cannot be written: it stays as it is, for the next who opens the city.
        """
        record = None
        if self._holds_anything():
            seconds: list[int] = []

            def make(keys: list[Key]) -> dict[Key, Cells]:
                found = {key: tile.contribution() for key, tile in self.load(keys).items()}
                seconds.extend(int(cells.last_seen_s.max()) for cells in found.values())
                return found

            def describe(rows: list[tuple[int, int, int, int]]) -> Record:
                return Record(
                    location=self.ledger.location,
                    spec=self.ledger.spec,
                    vehicle=self.vehicle,
                    first_ns=min(seconds) * 10**9 if self.first_ns is None else self.first_ns,
                    last_ns=max(seconds) * 10**9,
                    tiles=tile_table(rows),
                    recordings=(recording,) if recording else (),
                )

            known = self.ledger.known()
            record = self.ledger.publish(describe, self.saved, make, known)
            if record.id in known and not self._taken_over:
                _log.warning("this drive is part of %s already, to the bit: it counts once", self.ledger.storage.name)
        self.forget()
        return record

    def _holds_anything(self) -> bool:
        """Tell whether any saved tile is intact."""
        return any(self.load([key]) for key in sorted(self.saved))

    def release(self) -> None:
        """Let the next who opens the city commit it."""
        if self._lock is not None:
            self._lock.release()

    def forget(self) -> None:
        """Delete what was saved. Raises :class:`NmpError` when that cannot be done."""
        if self._lock is not None:
            # What is committed must not be found again in part: it would count as another drive. Elsewhere than in a
            # folder it goes piece by piece, and without this nobody counts the rest.
            if self.storage.local is None:
                self.storage.delete(SESSION)
            self.storage.discard()
            self._lock.release()

    # -- after a crash ----------------------------------------------------------------------------------------

    @classmethod
    def recover_all(cls, ledger: Ledger) -> list[Record]:
        """Commit the drives that ended without it: killed, out of power, out of disk. Others are left alone.

        Those that count only when they are whole are deleted. Those of a newer nmp are reported, and stay as they are.
        Raises :class:`NmpError` when one cannot be written.
        """
        found = []
        for room in (WHOLE, OPEN):
            ledger.storage.below(room).sweep()
        for name in ledger.storage.below(WHOLE).children():
            drive = cls(ledger, "", name, whole=True)
            if drive._is_over():
                drive.forget()
        for name in ledger.storage.below(OPEN).children():
            drive = cls(ledger, "", name)
            if drive._is_over():
                try:
                    record = drive.commit()
                finally:
                    drive.release()
                if record is not None:
                    _log.info("committed drive %s, which had ended without it", record.id[:12])
                    found.append(record)
        return found

    def _is_over(self) -> bool:
        """Tell whether this drive ended without being committed; if so it is ours from then on."""
        try:
            lock = Lock(self.storage, LOCK, wait=False)
        except OSError as error:
            raise NmpError(f"cannot open {self.storage.name} ({error.strerror}): check permissions") from error
        if not lock.held:
            return False
        self._lock, self._taken_over = lock, True
        raw = self.storage.get(SESSION)
        try:
            values = unchecked(raw or b"")
            version = values.get("format", 1)
            if isinstance(version, int) and version > _FORMAT:
                lock.release()
                self.ledger.tell(self.storage.name, f"stays as it is: {Newer('a drive under way', version, _FORMAT)}")
                return False
            if time.time() - values.get("alive_s", 0) < _LEASE_S:
                lock.release()
                return False
            self.vehicle, self.first_ns = str(values["vehicle"]), int(values["first_ns"])
            if version == 1 and self.ledger.spec.merge == "sum":
                planes = 4 * self.ledger.spec.channels + FIELD_PLANES + 3
                self._tiles = TileSet(self.storage.below("tiles"), planes, level=1)
                self._unpack = _summed
        except (ValueError, KeyError, TypeError) as error:
            if raw is not None:
                self.ledger.tell(f"{self.storage.name}/{SESSION}", f"is damaged ({error}): the vehicle is unknown")
        committed = raw is None and self.storage.local is None
        self.saved = set() if committed else self._tiles.keys()
        return True
