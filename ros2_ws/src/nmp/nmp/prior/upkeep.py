"""What is done to a city between drives: rolling back, merging, compacting, comparing, exporting."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nmp.errors import NmpError
from nmp.prior.cells import Cells, encode, on_grid
from nmp.prior.cells import digest as digest_of
from nmp.prior.ledger import (
    BASES,
    CITY,
    CODING,
    CODING_SPARE,
    COMMITS,
    COPY,
    DRIVES,
    HEAD,
    SPARE,
    Head,
    Ledger,
    State,
    coding_of,
    create,
    exists,
    save,
    with_left_out,
)
from nmp.prior.record import Newer, Record, check_spec, checked, tile_table, unchecked
from nmp.prior.storage import Lock, Storage
from nmp.prior.tiles import Key
from nmp.prior.tileset import Planes, TileSet, batches
from nmp.prior.window import PriorSpec

Step = Callable[[int], object]
"""is told how many more pieces of a long job are done"""
_DAY_NS = 86_400 * 10**9
HORIZON_DAYS = 7.0
"""how long the command leaves drives apart, so that those of cars that come late are still merged exactly"""


def _quiet(_: int) -> None:
    pass


@contextmanager
def maintaining(ledger: Ledger) -> Iterator[None]:
    """Keep other compactions, merges and repairs of a city out; drives go on meanwhile."""
    try:
        lock = Lock(ledger.storage, "upkeep.lock", wait=False)
    except OSError as error:
        raise NmpError(f"cannot change {ledger.storage.name} ({error.strerror}): check the permissions") from error
    if not lock.held:
        raise NmpError(f"{ledger.storage.name} is being merged, compacted or repaired: try again when that is done")
    with lock:
        yield


# -- versions -----------------------------------------------------------------------------------------------


def leave_out(ledger: Ledger, drives: Iterable[str]) -> None:
    """Fold the city without these drives (ids) from now on."""
    wanted = set(drives)
    ledger.change_head(lambda head: with_left_out(head, {*head.left_out, *wanted}))


def take_back(ledger: Ledger, drives: Iterable[str]) -> None:
    """Fold the city with these drives (ids) again."""
    wanted = set(drives)
    ledger.change_head(lambda head: with_left_out(head, set(head.left_out) - wanted))


def drives_after(ledger: Ledger, drive: Record) -> list[Record]:
    """Return the drives that are folded after one."""
    return [record for record in ledger.drives() if not drive.drives and record.order > drive.order or drive.drives]


def state_at(ledger: Ledger, name: str) -> State:
    """Return the state of the city after a drive (the beginning of its id), or at "base", "empty" or "now"."""
    records = ledger.active()
    if name == "now":
        return State(ledger, records)
    if name == "empty":
        return State(ledger, [])
    if name == "base":
        return State(ledger, [record for record in records if record.drives])
    last = ledger.find(name)
    return State(ledger, [r for r in records if r.drives or not last.drives and r.order <= last.order])


class TileDifference(NamedTuple):
    """What changed in one tile."""

    key: Key
    added: int
    removed: int
    changed: int
    evidence: int


class Difference(NamedTuple):
    """What changed between two states of a city."""

    tiles: list[TileDifference]
    """those in which something did, in the order of row and column"""
    added: int
    """cells that only the second knows"""
    removed: int
    """cells that only the first knows"""
    changed: int
    """cells that both know, with other content"""
    mean_latent: float
    """mean absolute change of a latent channel of these, in steps of int8"""
    evidence: int
    """total evidence gained, in steps of uint16"""


def difference(first: State, second: State, step: Step = _quiet) -> Difference:
    """Compare two states of one city, cell by cell."""
    tiles = []
    distance = 0.0
    for keys in batches(sorted(first.keys() | second.keys())):
        before, after = first.load(keys), second.load(keys)
        for key in keys:
            a, b = (side.get(key) or Cells(first.ledger.spec.channels) for side in (before, after))
            known_a, known_b = a.last_seen_s > 0, b.last_seen_s > 0
            both = known_a & known_b
            moved = np.abs(a.latent.astype(np.int16) - b.latent).sum(0)
            other = both & ((moved > 0) | (a.evidence != b.evidence) | (a.last_seen_s != b.last_seen_s))
            found = TileDifference(
                key,
                int((known_b & ~known_a).sum()),
                int((known_a & ~known_b).sum()),
                int(other.sum()),
                int(b.evidence.astype(np.int64).sum() - a.evidence.astype(np.int64).sum()),
            )
            distance += float(moved[other].sum())
            if found.added or found.removed or found.changed:
                tiles.append(found)
        step(len(keys))
    added, removed = sum(tile.added for tile in tiles), sum(tile.removed for tile in tiles)
    changed, evidence = sum(tile.changed for tile in tiles), sum(tile.evidence for tile in tiles)
    mean = distance / (changed * first.ledger.spec.channels) if changed else 0.0
    return Difference(tiles, added, removed, changed, mean, evidence)


# -- fleets -------------------------------------------------------------------------------------------------


class Merged(NamedTuple):
    """What a merge did."""

    drives: list[Record]
    """came in"""
    known: int
    """were there already"""
    base: bool
    """the base of the source was taken over"""
    late: list[Record]
    """those of the drives that are older than the base where they pass: see :func:`late_for`"""


def merge(storage: Storage, source: Ledger, only: Sequence[str] | None = None, step: Step = _quiet) -> Merged:
    """Bring the drives of one copy of a city into another, which is created where it is missing.

    Drives that the other one knows are left as they are; drives that the source leaves out stay there. Which of
    several merges comes first makes no difference, but for drives that are older than a base.

    :param only: ids of the drives to take; None for all, and the base

    Raises :class:`NmpError` when the copies do not belong together, and when a drive of the source is damaged (it
    then stays out as a whole).
    """
    if not exists(storage):
        create(storage, source.location, source.spec)
    target = Ledger.open(storage)
    check_spec(source.storage.name, target.location, source.location, target.spec, source.spec)
    if source.spec.coding != target.spec.coding:
        raise NmpError(
            f"{source.storage.name} and {storage.name} write their cells in different ways (nmp prior show: coding): "
            "merge into a new folder, or map the drives again with the same weights"
        )
    with maintaining(target):
        took_base = only is None and _merge_base(target, source, step)
        known, taken, skipped = target.known(), [], 0
        for record in source.active():
            if record.drives or (only is not None and record.id not in only):
                continue
            if record.id in known:
                skipped += 1
            else:
                _copy(source, target, record, step)
                target.storage.put(f"{COMMITS}/{record.id}.json", record.to_bytes())
                taken.append(record)
        base = target.base()
        # under a base that was taken over, those that were there before may be older as well
        late = late_for(base, target.drives() if took_base else taken) if base else []
    return Merged(taken, skipped, took_base, late)


def late_for(base: Record, drives: Iterable[Record]) -> list[Record]:
    """Return the drives that are older than a base, where both were.

    They would have been folded among the drives inside the base, and are now folded on top of them: a copy of the city
    that was compacted later, or not at all, differs from this one by rounding and by where the cap acted. Of a base
    only the time of its last frame is known.
    """
    places = set(digests(base))
    return [drive for drive in drives if drive.first_ns < base.last_ns and not places.isdisjoint(digests(drive))]


def _merge_base(target: Ledger, source: Ledger, step: Step) -> bool:
    """Take over the base of the source where it holds all that the target's does; tell whether that was done."""
    theirs, ours = source.base(), target.base()
    if theirs is None or set(theirs.drives) <= target.known():
        return False
    if ours is not None and not set(ours.drives) <= set(theirs.drives):
        raise NmpError(
            f"{source.storage.name} and {target.storage.name} were both compacted, each with drives that the other "
            "lacks: a base cannot be taken apart again. Merge cities before they are compacted"
        )
    _copy(source, target, theirs, step)
    target.storage.put(f"{BASES}/{theirs.id}/2.{COPY}", theirs.to_bytes())
    target.change_head(lambda head: Head(theirs.id, tuple(sorted(set(head.left_out) - set(theirs.drives)))))
    _sweep(target)
    return True


def _copy(source: Ledger, target: Ledger, record: Record, step: Step) -> None:
    """Copy the tiles of a record. Raises :class:`NmpError` when one is damaged."""
    tiles, into = source.tiles_of(record), target.tiles_of(record)
    expected = digests(record)
    for keys in into.files(expected):
        found = source.load(record, {key: expected[key] for key in keys})
        missing = [key for key in keys if key not in found]
        if missing:
            raise NmpError(
                f"tile {missing[0]} of {record.id[:12]} in {source.storage.name} is damaged: run nmp prior verify "
                "--repair there, or leave this drive out"
            )
        if tiles.shard == into.shard:
            for blob in sorted({tiles.blob(key) for key in keys}):
                into.storage.put(blob, tiles.storage.get(blob) or b"")
        else:
            save(into, {key: encode(cells, target.spec) for key, cells in found.items()})
        step(len(keys))
    into.describe()
    into.storage.put(COPY, record.to_bytes())


def digests(record: Record) -> dict[Key, int]:
    """Return the tiles of a record with their digests."""
    table = record.tiles
    places = zip(table["row"].tolist(), table["col"].tolist(), strict=True)
    return dict(zip(places, table["digest"].tolist(), strict=True))


def export(ledger: Ledger, out: Path, only: Sequence[str] | None = None, step: Step = _quiet) -> int:
    """Write drives (ids; None for all, and the base) into a zip file, and return how many; equal content, equal bytes.

    Raises :class:`NmpError` when the file exists or cannot be written; none is left behind then.
    """
    if out.exists():
        raise NmpError(f"{out} exists: remove it or choose another name")
    records = [r for r in ledger.active() if only is None or r.id in only]
    partial = out.with_name(f"{out.name}.part")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:

            def add(storage: Storage, name: str, path: str) -> None:
                content = storage.get(name)
                if content is None:
                    raise NmpError(f"{storage.name}/{name} has vanished: run nmp prior verify")
                # a fixed date: the same drives give the same file
                archive.writestr(zipfile.ZipInfo(path, (1980, 1, 1, 0, 0, 0)), content)

            for name in (CITY, CODING, CODING_SPARE) if ledger.spec.coding else (CITY,):
                add(ledger.storage, name, name)
            for record in records:
                folder = ledger.folder_of(record)
                storage = ledger.storage.below(folder)
                for name in storage.keys():
                    if name.endswith(".json") or name.startswith("c/") and not name.endswith(".corrupt"):
                        add(storage, name, f"{folder}/{name}")
                if record.drives:
                    head = checked({"base": record.id, "left_out": []})
                    archive.writestr(zipfile.ZipInfo("head.json", (1980, 1, 1, 0, 0, 0)), head)
                else:
                    add(ledger.storage, f"{COMMITS}/{record.id}.json", f"{COMMITS}/{record.id}.json")
                step(len(record.tiles))
        os.replace(partial, out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise NmpError(f"cannot write {out} ({error.strerror}): free disk space or choose another name") from error
    except NmpError:
        partial.unlink(missing_ok=True)
        raise
    return len(records)


# -- growth -------------------------------------------------------------------------------------------------


def compact(ledger: Ledger, older_than_days: float = 0.0, *, keep: bool = True, step: Step = _quiet) -> Record | None:
    """Fold drives into a new base; the city's state stays the same to the bit.

    :param older_than_days: only drives that began so long before the newest one
    :param keep: delete what was folded only when the next base is made: until then :func:`verify` can mend this one

    Drives that are left out and as old are deleted as well. Until the head names the new base, everything before is
    there; whoever crashes in between loses nothing. Returns the base, None where there is nothing to do.
    """
    with maintaining(ledger):
        head = ledger.head()
        drives = ledger.drives()
        newest = max((record.first_ns for record in drives), default=0)
        old = [r for r in drives if newest - r.first_ns >= older_than_days * _DAY_NS]
        folded = [record for record in old if record.id not in head.left_out]
        dropped = [record for record in old if record.id in head.left_out]
        before = ledger.base(head)
        if not folded:
            if not keep:
                _sweep(ledger)
            return None
        records = ([before] if before else []) + folded
        state = State(ledger, records)

        def make(keys: list[Key]) -> dict[Key, Cells]:
            found = state.load(keys)
            step(len(keys))
            return found

        def describe(rows: list[tuple[int, int, int, int]]) -> Record:
            inside = {r.id for r in folded} | set(before.drives if before else ())
            gone = {r.id for r in dropped} | set(before.dropped if before else ())
            return Record(
                location=ledger.location,
                spec=ledger.spec,
                vehicle="",
                first_ns=min(record.first_ns for record in records),
                last_ns=max(record.last_ns for record in records),
                tiles=tile_table(rows),
                drives=tuple(sorted(inside)),
                dropped=tuple(sorted(gone)),
                recordings=tuple(sorted({name for record in records + dropped for name in record.recordings})),
            )

        base = ledger.publish(describe, state.keys(), make)
        gone = {record.id for record in dropped}
        ledger.change_head(lambda now: replace(with_left_out(now, set(now.left_out) - gone), base=base.id))
        _sweep(ledger, {record.id for record in records} if keep else set())
        return base


def _sweep(ledger: Ledger, kept: Container[str] = ()) -> None:
    """Delete bases that are not current and drives inside the current one: what compacting left, or a crash.

    :param kept: ids of those whose tiles stay, for mending the base
    """
    base = ledger.base()
    inside = set(base.drives + base.dropped) if base else set()
    commits = {name.removesuffix(".json") for name in ledger.storage.below(COMMITS).keys() if name.endswith(".json")}
    for drive in sorted(inside & commits):
        ledger.storage.delete(f"{COMMITS}/{drive}.json")
    for drive in ledger.storage.below(DRIVES).children():
        if drive in inside and drive not in kept:
            ledger.storage.below(f"{DRIVES}/{drive}").clear()
    for name in ledger.storage.below(BASES).children():
        if (base is None or name != base.id) and name not in kept:
            ledger.storage.below(f"{BASES}/{name}").clear()


# -- health -------------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """Something damaged."""

    what: str
    repaired: bool


def verify(ledger: Ledger, repair: bool = False, other: Ledger | None = None, step: Step = _quiet) -> list[Finding]:
    """Check every record and every tile against its checksum, and return what is damaged.

    :param repair: put things right: records and the head from their copies, a base's tiles from the base and drives
        before it where they were kept, any tile from ``other``, another copy of the city; the rest stays unknown
    """
    findings = _verify_records(ledger, repair, other)
    base = ledger.base()
    kept, lost = _kept(ledger, base) if base else ([], [])
    for folder in lost:  # without its record it is good for nothing
        if repair:
            ledger.storage.below(folder).clear()
        findings.append(Finding(f"{folder}, which was kept to mend the base", repair))
    for record in ([base] if base else []) + ledger.drives() + kept:
        findings += _verify_spares(ledger, record, repair)
        expected = digests(record)
        tiles, kind = ledger.tiles_of(record), "base" if record.drives else "drive"
        for keys in tiles.files(expected):
            found = ledger.load(record, {key: expected[key] for key in keys})
            missing = {key: expected[key] for key in keys if key not in found}
            mended = _mended(ledger, other, record, missing) if repair else {}
            for file in {tiles.blob(key) for key in mended}:
                whole = {key: encode(cells, ledger.spec) for key, cells in found.items() if tiles.blob(key) == file}
                tiles.replace(whole | {key: planes for key, planes in mended.items() if tiles.blob(key) == file})
            findings += [Finding(f"tile {key} of {kind} {record.id[:12]}", key in mended) for key in missing]
            step(len(keys))
    return findings


def _verify_records(ledger: Ledger, repair: bool, other: Ledger | None) -> list[Finding]:
    findings = []
    storage = ledger.storage
    heads = {name: storage.get(name) for name in (HEAD, SPARE)}
    whole_ones = [content for content in heads.values() if content is not None and _is_whole(content)]
    for name, content in heads.items():
        if whole_ones and repair and content not in whole_ones:
            storage.put(name, whole_ones[0])
        if content is not None and not _is_whole(content):  # one that is not there was never written
            findings.append(Finding(name, repair and bool(whole_ones)))
    if ledger.spec.coding is not None:
        whole = checked(ledger.spec.coding.to_dict())
        for name in (CODING, CODING_SPARE):
            if storage.get(name) != whole:
                if repair:
                    storage.put(name, whole)
                findings.append(Finding(name, repair))
    ledger.drives()  # puts aside what is damaged
    for drive in ledger.damaged_records():
        found = ledger.kept(DRIVES, drive) or (other.kept(DRIVES, drive) if other else None)
        if repair and found is not None:
            storage.put(f"{COMMITS}/{drive}.json", found.to_bytes())
        findings.append(Finding(f"record of drive {drive[:12]}", repair and found is not None))
    return findings


def _is_whole(content: bytes) -> bool:
    try:
        unchecked(content)
    except ValueError:
        return False
    return True


def _verify_spares(ledger: Ledger, record: Record, repair: bool) -> list[Finding]:
    """Check what lies beside the tiles of a record: nothing is read from it unless something else is damaged."""
    tiles = ledger.tiles_of(record)
    findings = []
    for name in (COPY, f"2.{COPY}") if record.drives else (COPY,):
        if tiles.storage.get(name) != record.to_bytes():
            if repair:
                tiles.storage.put(name, record.to_bytes())
            findings.append(Finding(f"{name} of {'base' if record.drives else 'drive'} {record.id[:12]}", repair))
    if not tiles.described():
        if repair:
            tiles.describe()
        findings.append(Finding(f"zarr.json of {record.id[:12]}", repair))
    return findings


def _kept(ledger: Ledger, base: Record) -> tuple[list[Record], list[str]]:
    """Return what a base was folded from, as far as it is there, and the folders of that whose record is damaged."""
    found, lost = [], []
    for room, inside in ((BASES, None), (DRIVES, set(base.drives + base.dropped))):
        for name in ledger.storage.below(room).children():
            if name != base.id and (inside is None or name in inside):
                record = ledger.kept(room, name)
                found += [record] if record else []
                lost += [] if record else [f"{room}/{name}"]
    return found, lost


def _mended(ledger: Ledger, other: Ledger | None, record: Record, missing: dict[Key, int]) -> dict[Key, Planes]:
    """Return tiles as they were: a base's from what it was folded from, any from another copy of the city."""
    mended = {}
    for key, digest in missing.items():
        for source in (ledger, other):
            if source is None or key in mended:
                continue
            found = _rebuilt(source, record, key) if record.drives else None
            if found is None and source is other and source.storage.get(f"{source.folder_of(record)}/{COPY}"):
                found = source.load(record, {key: digest}).get(key)
            if found is not None and digest_of(planes := encode(found, ledger.spec)) == digest:
                mended[key] = planes
    return mended


def _rebuilt(ledger: Ledger, base: Record, key: Key) -> Cells | None:
    """Fold a tile of a base once more, from an earlier base and drives, where all of them are still there."""
    names = [name for name in ledger.storage.below(BASES).children() if name != base.id]
    for before in [None, *(ledger.kept(BASES, name) for name in names)]:
        inside = set(before.drives) if before else set()
        drives = [ledger.kept(DRIVES, drive) for drive in sorted(set(base.drives) - inside)]
        if inside <= set(base.drives) and all(drives):
            after = sorted((drive for drive in drives if drive), key=lambda drive: drive.order)
            return State(ledger, [*([before] if before else []), *after]).load([key]).get(key)
    return None


def mend_city(storage: Storage) -> bool:
    """Write a damaged city.json again, from any record; tell whether that was needed.

    Raises :class:`NmpError` when there is no record to take it from, or the city is of a newer format.
    """
    try:
        Ledger.open(storage)
        return False
    except Newer:
        raise
    except NmpError:
        raw = storage.get(CITY)
        names = [f"{COMMITS}/{n}" for n in storage.below(COMMITS).keys() if n.endswith(".json")]
        names += [f"{BASES}/{n}/{COPY}" for n in storage.below(BASES).children()]
        for name in names:
            try:
                found = Record.from_bytes(storage.get(name) or b"", name.split("/")[1].removesuffix(".json"))
            except (ValueError, KeyError, TypeError, NmpError):
                continue
            if raw is not None:
                storage.put_aside(CITY)
            create(storage, found.location, replace(found.spec, coding=coding_of(storage)))
            return True
        raise


# -- the format before --------------------------------------------------------------------------------------


def import_format_1(storage: Storage, old: Storage, spec_of: Callable[[PriorSpec], PriorSpec]) -> Record:
    """Bring a city of format 1 (one state, no drives) in as one drive, and return it.

    :param spec_of: completes what format 1 says of the latents, for a city that is new

    Raises :class:`NmpError` when the old city cannot be read, or belongs to another model or place.
    """
    where = f"{old.name}/prior.json"
    try:
        content = json.loads(old.get("prior.json") or b"")
        if content["format"] != 1:
            raise ValueError(f"format {content['format']!r}")
        location, found = str(content["location"]), PriorSpec(**content["spec"])
    except (ValueError, KeyError, TypeError) as error:
        raise NmpError(f"{where} is unreadable ({error}): it is no prior of format 1") from error
    if not exists(storage):
        create(storage, location, spec_of(found))
    target = Ledger.open(storage)
    wanted = replace(target.spec, **{n: getattr(found, n) for n in ("channels", "cell", "fingerprint")})
    check_spec(old.name, target.location, location, target.spec, wanted)
    tiles = TileSet(old.below("cells"), found.channels + 6)
    seconds: list[int] = []

    def make(keys: list[Key]) -> dict[Key, Cells]:
        made = {}
        for key, planes in tiles.load(keys, lambda key, why: target.tell(f"tile {key} of {old.name}", why)).items():
            # format 1 had the same planes, but for the traversals
            cells = Cells.unpack(np.concatenate([planes, np.zeros((2, *planes.shape[1:]), np.uint8)]))
            made[key] = _as_drive(cells, target.spec)
            seconds.extend((int(cells.last_seen_s[cells.last_seen_s > 0].min()), int(cells.last_seen_s.max())))
        return made

    def describe(rows: list[tuple[int, int, int, int]]) -> Record:
        if not rows:
            raise NmpError(f"{old.name} holds no readable tiles: there is nothing to import")
        first, last = min(seconds) * 10**9, max(seconds) * 10**9
        return Record(target.location, target.spec, "format 1", first, last, tile_table(rows))

    with maintaining(target):
        return target.publish(describe, tiles.keys(), make)


def _as_drive(cells: Cells, spec: PriorSpec) -> Cells:
    seen = cells.last_seen_s > 0
    cells.traversals[...] = seen
    cells.evidence *= seen
    cells.latent[...] = on_grid(cells.latent, spec.bits)
    cells.latent *= cells.evidence > 0
    return cells
