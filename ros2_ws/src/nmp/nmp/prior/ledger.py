"""The ledger of a city: which drives its state is made of. See the package for what lies where.

A record becomes part of the ledger by one atomic write; nothing that was written is changed afterwards, but
``head.json``, which says which base is current and which drives are left out.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmp.errors import NmpError
from nmp.prior import cells as cell_bytes
from nmp.prior.cells import Cells
from nmp.prior.coding import Coding
from nmp.prior.record import Newer, Record, check_spec, checked, unchecked
from nmp.prior.storage import ASIDE, Lock, Storage
from nmp.prior.tiles import Key
from nmp.prior.tileset import SHARD, Planes, TileSet, batches
from nmp.prior.window import PriorSpec

_log = logging.getLogger(__name__)

FORMAT = 4
"""of a city. 2: every tile is a file; 3: the same with a coding; 4: tiles share files, with a coding or without"""
CITY = "city.json"
CODING = "coding.json"
CODING_SPARE = "coding.copy.json"
"""how the cells of a city are written, where it has a coding: nothing can be read without it"""
HEAD = "head.json"
SPARE = "head.copy.json"
COMMITS = "commits"
DRIVES = "drives"
BASES = "bases"
COPY = "record.json"
"""beside the tiles of a record: what the record itself is mended with"""
_LEVEL_DRIVE, _LEVEL_BASE = 9, 22
"""of the compression: a car waits for it when a drive is over (2 ms a tile, 37 ms at 22), nobody for a base"""


@dataclass(frozen=True)
class Head:
    """What of a city may change."""

    base: str = ""
    """id of the current base; empty: there is none"""
    left_out: tuple[str, ...] = ()
    """drives that were rolled back"""


class Compacted(Exception):
    """The drives that were asked for were folded into a new base meanwhile."""


class Ledger:
    """One city's records, and their tiles."""

    def __init__(self, storage: Storage, location: str, spec: PriorSpec, version: int, *, read_only: bool) -> None:
        self.storage = storage
        self.shard = SHARD if version >= 4 else 1
        self.location = location
        self.spec = spec
        self.read_only = read_only
        self._told: set[str] = set()
        self.damaged_tiles = 0
        """tiles that were found damaged or gone so far"""
        self.last_damage = ""
        """what was wrong with the last of them"""
        self._damaged: set[str] = set()
        self._base: str | None = None
        """the base when :meth:`active` was asked"""
        self._sets: dict[str, TileSet] = {}

    @classmethod
    def open(cls, storage: Storage, *, read_only: bool = False) -> Ledger:
        """Open the ledger of a city that exists. Raises :class:`NmpError` where there is none, or a newer one."""
        return cls(storage, *_read_city(storage), read_only=read_only)

    @classmethod
    def open_for(cls, storage: Storage, location: str, spec: PriorSpec, *, read_only: bool) -> Ledger | None:
        """Open the ledger of a city for latents of ``spec``; one that is missing is created, or None read-only."""
        if not exists(storage):
            if read_only:
                return None
            create(storage, location, spec)
        found_location, found, version = _read_city(storage)
        check_spec(storage.name, location, found_location, spec, found)
        return cls(storage, location, found, version, read_only=read_only)

    # -- records ----------------------------------------------------------------------------------------------

    def head(self) -> Head:
        """Return the current base and the drives left out. A damaged head is read from its copy, and reported.

        Whoever is killed while it changes the head for the first time leaves only the copy.
        """
        contents = {name: self.storage.get(name) for name in (HEAD, SPARE)}
        if not any(content is not None for content in contents.values()):
            return Head()
        for name, content in contents.items():
            if content is None:
                continue
            try:
                values = unchecked(content)
                return Head(values["base"], tuple(values["left_out"]))
            except (ValueError, KeyError, TypeError) as error:
                self.tell(f"{self.storage.name}/{name}", f"is damaged ({error}): nmp prior verify --repair mends it")
        raise NmpError(
            f"{self.storage.name}/{HEAD} and its copy are both damaged: restore one of them from a backup, or merge "
            "another copy of the city into a new folder (nmp prior merge)"
        )

    def change_head(self, change: Callable[[Head], Head]) -> Head:
        """Replace the head; others who change it wait meanwhile. Raises :class:`NmpError`."""
        try:
            with Lock(self.storage, "head.lock", wait=True):
                head = change(self.head())
                content = checked(asdict(head))
                self.storage.put(SPARE, content)
                self.storage.put(HEAD, content)
                return head
        except OSError as error:
            raise NmpError(f"cannot change {self.storage.name}/{HEAD} ({error.strerror}): check permissions") from error

    def base(self, head: Head | None = None) -> Record | None:
        """Return the record of the base. Raises :class:`NmpError` when it is damaged and cannot be mended."""
        name = (head or self.head()).base
        if not name:
            return None
        record = self._record(f"{BASES}/{name}", COPY, name) or self._record(f"{BASES}/{name}", f"2.{COPY}", name)
        if record is None:
            raise NmpError(
                f"the base {name[:12]} of the prior in {self.storage.name} has lost its record: restore "
                f"{BASES}/{name}/{COPY} from a backup or another copy of the city"
            )
        return record

    def drives(self) -> list[Record]:
        """Return the records of all drives that are not inside the base, in the order in which they are folded.

        A damaged record is reported once, put aside, and not in the list; ``verify --repair`` brings it back. Raises
        :class:`NmpError` for one of a newer format: without it the state would be another one.
        """
        base = self.base()
        inside = set(base.drives + base.dropped) if base else set()
        found = []
        for name in self.storage.below(COMMITS).keys():
            drive = name.removesuffix(".json")
            if name.endswith(".json") and drive not in inside:
                record = self._record(COMMITS, name, drive)
                if record is not None:
                    found.append(record)
        return sorted(found, key=lambda record: record.order)

    def active(self) -> list[Record]:
        """Return what the state of the city is folded from: the base, if there is one, and the drives after it."""
        head = self.head()
        self._base = head.base
        base = self.base(head)
        drives = [record for record in self.drives() if record.id not in head.left_out]
        return [base, *drives] if base else drives

    def known(self) -> set[str]:
        """Return the ids of all drives that were ever merged."""
        base = self.base()
        names = {n.removesuffix(".json") for n in self.storage.below(COMMITS).keys() if n.endswith(".json")}
        return names | set(base.drives + base.dropped if base else ())

    def recordings(self) -> set[str]:
        """Return the hashes of all recordings that were mapped into the city as a whole, those left out included."""
        base = self.base()
        return {name for record in [*self.drives(), *([base] if base else [])] for name in record.recordings}

    def find(self, text: str) -> Record:
        """Return the drive (or the base) whose id begins so. Raises :class:`NmpError` when it is not one."""
        base = self.base()
        records = self.drives() + ([base] if base else [])
        found = [record for record in records if record.id.startswith(text)] if text else []
        if len(found) == 1:
            return found[0]
        if base and any(drive.startswith(text) for drive in base.drives) and not found:
            raise NmpError(f"drive {text} was compacted into the base {base.id[:12]}: it can no longer be told apart")
        many = "no drive" if not found else f"{len(found)} drives"
        raise NmpError(f"{many} of {self.storage.name} begin with {text!r}: see nmp prior log")

    def _record(self, folder: str, name: str, drive: str) -> Record | None:
        storage = self.storage.below(folder)
        content = storage.get(name)
        if content is None:
            return None
        try:
            return Record.from_bytes(content, drive)
        except Newer:
            raise
        except (ValueError, KeyError, TypeError, NmpError) as error:
            if folder == COMMITS and self.read_only:
                self._damaged.add(drive)
            aside = "" if self.read_only else storage.put_aside(name)
            self.tell(
                f"{storage.name}/{name}",
                f"is corrupt and counts as unknown ({error})" + (f", kept as {aside}" if aside else ""),
            )
            return None

    def kept(self, folder: str, name: str) -> Record | None:
        """Return a record by the copy beside its tiles, None where that is gone or damaged. Of a base there are two."""
        for copy in (COPY, f"2.{COPY}"):
            try:
                return Record.from_bytes(self.storage.get(f"{folder}/{name}/{copy}") or b"", name)
            except (ValueError, KeyError, TypeError, NmpError):
                continue
        return None

    def tell(self, what: str, problem: str) -> None:
        """Report a damaged thing, once."""
        if what not in self._told:
            self._told.add(what)
            _log.warning("%s %s", what, problem)

    def tell_tile(self, what: str, problem: str) -> None:
        """Report a damaged tile, once, and count it."""
        if what not in self._told:
            self.damaged_tiles += 1
            self.last_damage = f"{what} {problem}"
        self.tell(what, problem)

    # -- tiles ------------------------------------------------------------------------------------------------

    def folder_of(self, record: Record) -> str:
        """Return where the tiles of a record lie."""
        return f"{BASES if record.drives else DRIVES}/{record.id}"

    def tiles_of(self, record: Record) -> TileSet:
        """Return the tiles of a record."""
        folder = self.folder_of(record)
        if folder not in self._sets:
            planes = cell_bytes.plane_count(self.spec)
            level = _LEVEL_BASE if record.drives else _LEVEL_DRIVE
            self._sets[folder] = TileSet(self.storage.below(folder), planes, level, self.shard)
        return self._sets[folder]

    def load(self, record: Record, expected: dict[Key, int]) -> dict[Key, Cells]:
        """Return tiles of a record, given with their digests; those that are damaged are reported, and left out.

        Raises :class:`Compacted` when they are gone because of another base: ask :meth:`active` again.
        """
        tiles = self.tiles_of(record)

        def reject(key: Key, reason: str) -> None:
            if reason == "vanished" and self._base is not None and self.head().base != self._base:
                raise Compacted
            blob = tiles.blob(key)
            # what shares a file with others stays where it is until that is mended
            leave = self.read_only or reason == "vanished" or tiles.shard > 1
            aside = "" if leave else tiles.storage.put_aside(blob)
            self.tell_tile(
                f"tile {key} of {record.id[:12]}",
                ("has vanished" if reason == "vanished" else f"is corrupt ({reason})")
                + f" and counts as unknown: {tiles.storage.name}/{blob}"
                + (f", kept as {aside.rpartition('/')[2]}" if aside else ""),
            )

        found = {}
        for key, planes in tiles.load(expected, reject).items():
            if cell_bytes.digest(planes) == expected[key]:
                found[key] = cell_bytes.decode(planes, self.spec)
            else:
                reject(key, "it is not the one that was committed")
        return found

    def publish(
        self,
        describe: Callable[[list[tuple[int, int, int, int]]], Record],
        keys: Iterable[Key],
        make: MakeTiles,
        known: Container[str] = (),
    ) -> Record:
        """Write tiles, then the record that makes them part of the city, and return it.

        :param describe: makes the record, from (row, col, cells, digest) of its tiles
        :param make: returns the cells of some tiles; called twice for each of them, because the name of the record
            depends on them all
        :param known: ids of records that are there already: nothing is written for one of these

        Raises :class:`NmpError` when something cannot be written; the city is then as it was.
        """
        rows = [
            (*key, int((cells.last_seen_s > 0).sum()), cell_bytes.digest(planes))
            for key, cells in _made(sorted(keys), make)
            # a coding leaves out what was hardly seen, which may be all of it
            if (planes := cell_bytes.encode(cells, self.spec)).any()
        ]
        record = describe(rows)
        if record.id in known:
            return record
        tiles = self.tiles_of(record)
        for batch in tiles.files((row, col) for row, col, *_ in rows):
            made = _made(batch, make)
            save(tiles, {key: cell_bytes.encode(cells, self.spec) for key, cells in made})
        tiles.describe()
        tiles.storage.put(COPY, record.to_bytes())
        if record.drives:
            tiles.storage.put(f"2.{COPY}", record.to_bytes())
        else:
            self.storage.put(f"{COMMITS}/{record.id}.json", record.to_bytes())
        return record

    def remove(self, record: Record) -> None:
        """Delete a drive or a base that is no longer needed."""
        if not record.drives:
            self.storage.delete(f"{COMMITS}/{record.id}.json")
        folder = self.folder_of(record)
        self._sets.pop(folder, None)
        self.storage.below(folder).clear()

    def damaged_records(self) -> list[str]:
        """Return the ids of drives whose record is damaged, or was put aside and is not back."""
        names = self.storage.below(COMMITS).keys()
        aside = {name.partition(".")[0] for name in names if name.endswith(ASIDE)}
        return sorted(self._damaged | aside - {name.removesuffix(".json") for name in names})


MakeTiles = Callable[[list[Key]], dict[Key, Cells]]


def _made(keys: list[Key], make: MakeTiles) -> Iterator[tuple[Key, Cells]]:
    for batch in batches(keys):
        yield from sorted(make(batch).items(), key=lambda item: item[0])


def save(tiles: TileSet, batch: dict[Key, Planes]) -> None:
    """Write tiles. Raises :class:`NmpError` when one cannot be written."""
    failures = tiles.save(batch)
    if failures:
        reason = next(iter(failures.values()))
        raise NmpError(
            f"cannot save {len(failures)} tiles of the prior in {tiles.storage.name} ({reason}): "
            "free disk space or mend the permissions"
        )


class State:
    """The cells of a city as some records, folded one after the other, make them."""

    def __init__(self, ledger: Ledger, records: list[Record]) -> None:
        self.ledger = ledger
        self.records = records
        sources = [np.full(len(record.tiles), number, np.int32) for number, record in enumerate(records)]
        packed = [_pack(record.tiles["row"], record.tiles["col"]) for record in records]
        digests = [record.tiles["digest"] for record in records]
        self._keys = np.concatenate([*packed, np.empty(0, np.int64)])
        order = np.argsort(self._keys, kind="stable")  # stable: records stay in their order within a tile
        self._keys = self._keys[order]
        self._source = np.concatenate([*sources, np.empty(0, np.int32)])[order]
        self._digest = np.concatenate([*digests, np.empty(0, np.uint64)])[order]
        self._count = int((np.diff(self._keys) != 0).sum()) + bool(len(self._keys))

    def __len__(self) -> int:
        """Return how many tiles there are."""
        return self._count

    def keys(self) -> set[Key]:
        """Return all tiles."""
        return {(row, col) for row, col in self.places().tolist()}

    def places(self) -> NDArray[np.int64]:
        """Return (row, column) of all tiles as [N, 2]."""
        packed = np.unique(self._keys)
        cols = (packed & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
        return np.stack([packed >> 32, cols.astype(np.int64)], axis=1)

    def existing(self, keys: list[Key]) -> list[Key]:
        """Return those of the tiles that exist, in their order."""
        return [key for key, start, stop in self._parts(keys) if start < stop]

    def _parts(self, keys: list[Key]) -> Iterator[tuple[Key, int, int]]:
        """Return tiles with where their parts begin and end in the list of all."""
        corners = np.array(keys, np.int64).reshape(-1, 2)
        packed = _pack(corners[:, 0], corners[:, 1])
        first, last = (np.searchsorted(self._keys, packed, side).tolist() for side in ("left", "right"))
        return zip(keys, first, last, strict=True)

    def load(self, keys: Iterable[Key]) -> dict[Key, Cells]:
        """Return those of the tiles that exist. Damaged parts count as unknown, and are reported.

        Raises :class:`NmpError` when something cannot be read.
        """
        wanted: dict[int, dict[Key, int]] = {}
        for key, start, stop in self._parts(list(keys)):
            for at in range(start, stop):
                wanted.setdefault(int(self._source[at]), {})[key] = int(self._digest[at])
        found: dict[Key, Cells] = {}
        for number in sorted(wanted):
            record = self.records[number]
            for key, cells in self.ledger.load(record, wanted[number]).items():
                if record.drives:
                    found[key] = cells
                else:
                    state = found.setdefault(key, Cells(self.ledger.spec.channels))
                    cell_bytes.fold(state, cells, self.ledger.spec)
        return found


def _pack(rows: np.ndarray[Any, Any], cols: np.ndarray[Any, Any]) -> Any:
    return (rows.astype(np.int64) << 32) | (cols.astype(np.int64) & 0xFFFFFFFF)


# -- the city itself ----------------------------------------------------------------------------------------


def exists(storage: Storage) -> bool:
    """Tell whether a city is stored here, in whatever condition."""
    if storage.get(CITY) is not None or storage.get("prior.json") is not None:
        return True
    return any(name in (COMMITS, DRIVES, BASES, "cells") for name in storage.children())


def create(storage: Storage, location: str, spec: PriorSpec) -> None:
    """Write what a new city is."""
    content: dict[str, Any] = {"format": FORMAT, "location": location, "spec": spec.to_dict()}
    if spec.coding is not None:
        coding = checked(spec.coding.to_dict())
        for name in (CODING_SPARE, CODING):
            storage.put(name, coding)
        content["coding"] = spec.coding.name
    storage.put(CITY, checked(content))


def coding_of(storage: Storage, name: str = "") -> Coding | None:
    """Return the coding of a city from either copy, None where none is whole.

    :param name: of the one that it has to be
    """
    for file in (CODING, CODING_SPARE):
        try:
            coding = Coding.from_dict(unchecked(storage.get(file) or b""))
        except (ValueError, NmpError):
            continue
        if name in ("", coding.name):
            return coding
    return None


def _read_city(storage: Storage) -> tuple[str, PriorSpec, int]:
    """Return location, spec and format of a city."""
    raw = storage.get(CITY)
    where = f"{storage.name}/{CITY}"
    if raw is None and storage.get("prior.json") is not None:
        raise NmpError(
            f"prior in {storage.name} has format 1, this nmp writes {FORMAT}: import it into a new prior folder "
            f"(nmp prior import NEW {storage.name})"
        )
    if raw is None and not exists(storage):
        raise NmpError(f"there is no prior in {storage.name}: give the folder or URL of one city (<prior>/<location>)")
    mend = "run nmp prior verify --repair on it, or restore it from a backup"
    try:
        version = json.loads(raw or b"")["format"]
        if isinstance(version, int) and version > FORMAT:
            raise Newer(f"prior in {storage.name}", version, FORMAT)
        values = unchecked(raw or b"")
        if version not in range(2, FORMAT + 1):
            raise ValueError(f"format {version!r} never existed")
        coding = None
        if "coding" in values:
            coding = coding_of(storage, str(values["coding"]))
            if coding is None:
                raise NmpError(
                    f"{storage.name} has lost {CODING} and its copy: bring one back from another copy of the city"
                )
        return str(values["location"]), PriorSpec(**values["spec"], coding=coding), version
    except (ValueError, KeyError, TypeError) as error:
        raise NmpError(f"{where} is unreadable ({error}): {mend}") from error


def with_left_out(head: Head, drives: Iterable[str]) -> Head:
    """Return a head that leaves these drives out."""
    return replace(head, left_out=tuple(sorted(set(drives))))
