"""The command ``nmp prior``: what a city's prior is made of, and its upkeep."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nmp.errors import NmpError
from nmp.fleet import command
from nmp.prior import upkeep
from nmp.prior.ledger import Ledger
from nmp.prior.record import Record
from nmp.prior.storage import Storage
from nmp.prior.tiles import TILE, Key, bounds
from nmp.prior.window import MERGES, PriorSpec

SHORT = 12
"""characters of an id that are shown"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands of ``nmp prior``."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, text: str, run_it: Callable[[argparse.Namespace], None], city: str = "city") -> Any:
        sub = actions.add_parser(name, help=text, description=f"{text.capitalize()}.")
        sub.add_argument("city", metavar=city.upper(), help="folder or URL of one city: PRIOR/LOCATION")
        sub.set_defaults(act=run_it)
        return sub

    log = action("log", "list the drives that a city is made of", _log)
    log.add_argument("--json", action="store_true", help="print JSON")

    show = action("show", "tell of a city, or of one drive", _show)
    show.add_argument("drive", nargs="?", metavar="ID", help="the beginning of a drive's id (default: the whole city)")
    show.add_argument("--tiles", action="store_true", help="also list the tiles of the drive, and where they lie")
    show.add_argument("--json", action="store_true", help="print JSON")

    diff = action("diff", "count the cells that differ between two states of a city", _diff)
    for name in ("first", "second"):
        diff.add_argument(name, metavar="STATE", help="a drive's id (the city after it), base, empty or now")
    diff.add_argument("--json", action="store_true", help="print JSON, with the tiles in which something changed")

    rollback = action("rollback", "leave drives out of a city; the earlier state is back to the bit", _rollback)
    which = rollback.add_mutually_exclusive_group(required=True)
    which.add_argument("--to", metavar="ID", help="leave out every drive after this one (base: every drive)")
    which.add_argument("--drop", nargs="+", metavar="ID", help="leave out these drives")
    which.add_argument("--undo", nargs="+", metavar="ID", help="take these drives back in")

    export = action("export", "write drives into one zip file", _export)
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="zip file to write")
    export.add_argument("--drives", nargs="+", metavar="ID", help="only these (default: the base and all drives)")

    load = action("import", "bring drives of an exported file, or a city of format 1, into a city", _import)
    load.add_argument(
        "source", metavar="FILE|OLD", help="zip file of nmp prior export, or folder of a city of format 1"
    )
    load.add_argument("--merge", choices=MERGES, default="sum", help="format 1 into a new city: how drives add up")
    load.add_argument(
        "--evidence-cap", type=int, default=4096, metavar="N", help="format 1 into a new city (default: %(default)s)"
    )

    merge = action("merge", "bring the drives of other copies into a city, in any order", _merge)
    merge.add_argument("sources", nargs="+", metavar="SOURCE", help="folders or URLs of other copies of the city")

    compact = action("compact", "fold drives into the base, so that the size follows the road driven", _compact)
    compact.add_argument(
        "--older-than",
        type=float,
        default=upkeep.HORIZON_DAYS,
        metavar="DAYS",
        help="only drives so much older than the newest one, as drives that are merged later should not be older than "
        "those that were folded; 0 folds all (default: %(default)g)",
    )
    compact.add_argument(
        "--drop",
        action="store_true",
        help="delete what was folded at once, and not when the next base is made: then nothing here can mend the base",
    )

    render = action("render", "draw a city: its layers, evidence, age and traversals", _render)
    render.add_argument(
        "--out", type=Path, metavar="DIR|FILE.png", help="folder for one picture of each, or one picture"
    )
    render.add_argument(
        "--web", type=Path, metavar="DIR", help="also, or instead: folder for a map to open in a browser"
    )
    render.add_argument(
        "--layer",
        nargs="+",
        metavar="KIND",
        help="layers, evidence, age, traversals (default: all; in one file: layers)",
    )
    render.add_argument(
        "--metres-per-pixel", type=float, metavar="M", help="scale of the pictures (default: about 1600 pixels in all)"
    )
    render.add_argument(
        "--weights", type=Path, metavar="FILE", help="that wrote the city (default: the shipped network)"
    )

    verify = action("verify", "check every record and tile", _verify)
    verify.add_argument("--repair", action="store_true", help="mend what can be mended")
    verify.add_argument("--from", dest="other", metavar="CITY", help="another copy of the city to mend from")
    verify.add_argument("--json", action="store_true", help="print JSON")

    command.add_arguments(actions)


def run(args: argparse.Namespace) -> None:
    """Carry out ``nmp prior``."""
    args.act(args)


def _log(args: argparse.Namespace) -> None:
    ledger = Ledger.open(Storage(args.city), read_only=True)
    head, base = ledger.head(), ledger.base()
    entries = ([(base, "base")] if base else []) + [
        (record, "left out" if record.id in head.left_out else "") for record in ledger.drives()
    ]
    if args.json:
        _print_json([{**_facts(record), "state": state} for record, state in entries])
        return
    rows = [
        (
            record.id[:SHORT],
            _date(record.first_ns),
            f"{(record.last_ns - record.first_ns) / 6e10:.1f}",
            _who(record),
            record.spec.fingerprint,
            len(record.tiles),
            record.cells,
            state,
        )
        for record, state in entries
    ]
    _print_table(("drive", "began (UTC)", "minutes", "vehicle", "weights", "tiles", "cells", ""), rows)


def _show(args: argparse.Namespace) -> None:
    ledger = Ledger.open(Storage(args.city), read_only=True)
    places: list[dict[str, Any]] = []
    if args.tiles and not args.drive:
        raise NmpError("--tiles lists those of one drive, or of the base: give the beginning of its id (nmp prior log)")
    if args.drive:
        record = ledger.find(args.drive)
        facts = _facts(record)
        table = record.tiles
        rows = zip(table["row"].tolist(), table["col"].tolist(), table["cells"].tolist(), strict=True)
        places = [{**_place((row, col), ledger.spec), "cells": cells} for row, col, cells in rows]
    else:
        active = ledger.active()
        keys = {key for record in active for key in upkeep.digests(record)}
        head, extent = ledger.head(), bounds(keys)
        facts = {
            "location": ledger.location,
            **ledger.spec.to_dict(),
            "coding": ledger.spec.coding.name if ledger.spec.coding else "",
            "base": head.base,
            "drives": sum(len(record.drives) or 1 for record in active),
            "left_out": list(head.left_out),
            "tiles": len(keys),
            "bytes": ledger.storage.size(),
            "extent_cells": [extent.row, extent.col, extent.rows, extent.cols] if extent else None,
        }
    if args.json:
        _print_json({**facts, "tile_list": places} if args.tiles else facts)
        return
    for name, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        print(f"{name.replace('_', ' '):<14} {'-' if text in ('', None) else text}")
    if args.tiles:
        print()
        _print_table(tuple(places[0]) if places else (), [tuple(place.values()) for place in places])


def _diff(args: argparse.Namespace) -> None:
    ledger = Ledger.open(Storage(args.city), read_only=True)
    first, second = (upkeep.state_at(ledger, name) for name in (args.first, args.second))
    with _progress(len(first.keys() | second.keys()), "tile", "comparing") as step:
        found = upkeep.difference(first, second, step)
    sums = {**found._asdict(), "tiles": len(found.tiles)}
    if args.json:
        names = upkeep.TileDifference._fields[1:]
        tiles = [{**_place(tile.key, ledger.spec), **dict(zip(names, tile[1:], strict=True))} for tile in found.tiles]
        _print_json({**sums, "tile_list": tiles})
        return
    for name, value in sums.items():
        print(f"{name.replace('_', ' '):<14} {value if isinstance(value, int) else round(value, 2)}")


def _rollback(args: argparse.Namespace) -> None:
    ledger = Ledger.open(Storage(args.city))
    if args.undo:
        # also of a drive that is damaged: the head says which there are
        out = ledger.head().left_out
        drives = [_one_of(out, text) for text in args.undo]
        upkeep.take_back(ledger, drives)
        print(f"{len(drives)} drives are part of {ledger.location} again")
        return
    if args.drop:
        drives = [_a_drive(ledger, text).id for text in args.drop]
    elif args.to == "base":
        drives = [record.id for record in ledger.drives()]
    else:
        drives = [record.id for record in upkeep.drives_after(ledger, ledger.find(args.to))]
    upkeep.leave_out(ledger, drives)
    print(f"{len(drives)} drives are left out of {ledger.location}; --undo takes them back until it is compacted")


def _export(args: argparse.Namespace) -> None:
    ledger = Ledger.open(Storage(args.city), read_only=True)
    only = [_a_drive(ledger, text).id for text in args.drives] if args.drives else None
    total = sum(len(r.tiles) for r in ledger.active() if only is None or r.id in only)
    with _progress(total, "tile", "exporting") as step:
        count = upkeep.export(ledger, args.out, only, step)
    print(f"wrote {args.out}: {count} records, {args.out.stat().st_size / 1e6:.2f} MB")


def _import(args: argparse.Namespace) -> None:
    target = Storage(args.city)
    if args.source.endswith(".zip"):
        if not Path(args.source).is_file():
            raise NmpError(f"{args.source} does not exist: check the path")
        _merge_one(target, Ledger.open(Storage.of_zip(Path(args.source)), read_only=True))
        return
    old = Storage(args.source)
    if old.get("prior.json") is None:
        raise NmpError(f"{args.source} is neither a zip file nor a city of format 1: for a city use nmp prior merge")

    def complete(found: PriorSpec) -> PriorSpec:
        return replace(found, merge=args.merge, evidence_cap=args.evidence_cap)

    record = upkeep.import_format_1(target, old, complete)
    print(f"imported {args.source} as drive {record.id[:SHORT]}: {len(record.tiles)} tiles, {record.cells} cells")


def _merge(args: argparse.Namespace) -> None:
    for source in args.sources:
        _merge_one(Storage(args.city), Ledger.open(Storage(source), read_only=True))


def _merge_one(target: Storage, source: Ledger) -> None:
    with _progress(sum(len(r.tiles) for r in source.active()), "tile", "merging") as step:
        done = upkeep.merge(target, source, step=step)
    base = " and the base" if done.base else ""
    print(f"{source.storage.name}: {len(done.drives)} drives{base} came in, {done.known} were known")
    if done.late:
        names = ", ".join(record.id[:SHORT] for record in done.late)
        print(
            f"{len(done.late)} drives are older than the base where they pass ({names}): they are folded on top of it, "
            "so copies that were compacted at other times can differ by rounding"
        )


def _compact(args: argparse.Namespace) -> None:
    if not args.older_than >= 0:
        raise NmpError(f"--older-than is {args.older_than} days: give 0 or more")
    ledger = Ledger.open(Storage(args.city))
    before = ledger.storage.size()
    with _progress(None, "tile", "compacting") as step:
        base = upkeep.compact(ledger, args.older_than, keep=not args.drop, step=step)
    if base is None:
        apart = len(ledger.drives())
        print(f"nothing to compact: {apart} drives, none {args.older_than:g} days older than the newest (--older-than)")
        return
    after, own = ledger.storage.size(), ledger.storage.below(ledger.folder_of(base)).size()
    print(f"base {base.id[:SHORT]} holds {len(base.drives)} drives" + (f", {own / 1e6:.2f} MB" if own else ""))
    if before and after:
        rest = "" if args.drop else ", with what the base was made of: the next compaction deletes that (or --drop)"
        print(f"the city had {before / 1e6:.2f} MB, and has {after / 1e6:.2f}{rest}")


def _render(args: argparse.Namespace) -> None:
    if args.out is None and args.web is None:
        raise NmpError("nowhere to draw to: give --out DIR, --out FILE.png or --web DIR")
    one = args.out is not None and args.out.suffix.lower() == ".png"
    from nmp.prior.render import frame_of, write_picture  # brings torch and matplotlib, which take their time
    from nmp.prior.sheets import KINDS, City, sheets_of
    from nmp.prior.web import prepare_folder, write_map

    kinds = args.layer or (KINDS[:1] if one and args.web is None else KINDS)
    if one and len(set(kinds)) > 1:
        raise NmpError(f"--out {args.out} is one picture, not {len(set(kinds))}: give a folder, or one --layer")
    with City(args.city) as city:
        sheets = sheets_of(city, kinds, args.weights)
        frame = frame_of(city, args.metres_per_pixel) if args.out is not None else None
        if args.web is not None:
            prepare_folder(args.web)
        chunks = len(city.chunks())
        if frame is not None:
            for sheet in sheets:
                path = args.out if one else args.out / f"{sheet.name}.png"
                with _progress(chunks, "chunk", f"drawing {sheet.name}") as step:
                    write_picture(city, sheet, path, frame, step)
                print(f"wrote {path}: {frame.width} x {frame.height} pixels of {frame.metres_per_pixel:.3g} m")
        if args.web is not None:
            with _progress(chunks * len(sheets), "chunk", "drawing the map") as step:
                tiles = write_map(city, sheets, args.web, step)
            print(f"wrote {args.web / 'index.html'}: {tiles} pictures, open it in a browser")


def _verify(args: argparse.Namespace) -> None:
    storage = Storage(args.city)
    mended = upkeep.mend_city(storage) if args.repair else False
    ledger = Ledger.open(storage, read_only=not args.repair)
    other = Ledger.open(Storage(args.other), read_only=True) if args.other else None
    with _progress(None, "tile", "verifying") as step:
        findings = upkeep.verify(ledger, args.repair, other, step)
    if mended:
        findings.insert(0, upkeep.Finding("city.json", True))
    if args.json:
        _print_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            print(f"{'repaired' if finding.repaired else 'damaged':<9} {finding.what}")
    left = sum(not finding.repaired for finding in findings)
    if left:
        hint = "they count as unknown" if args.repair else "nmp prior verify --repair mends what can be mended"
        raise NmpError(f"{left} damaged parts in {storage.name}: {hint}; --from another copy of the city helps most")
    if not args.json:
        print(f"{storage.name}: all checksums are right")


# -- in and out ---------------------------------------------------------------------------------------------


def _a_drive(ledger: Ledger, text: str) -> Record:
    record = ledger.find(text)
    if record.drives:
        raise NmpError(f"{text} is the base: name a drive")
    return record


def _one_of(names: Sequence[str], text: str) -> str:
    found = [name for name in names if name.startswith(text)] if text else []
    if len(found) != 1:
        raise NmpError(f"{len(found) or 'no'} drives that are left out begin with {text!r}: see nmp prior log")
    return found[0]


def _facts(record: Record) -> dict[str, Any]:
    extent = bounds(upkeep.digests(record))
    return {
        "id": record.id,
        "location": record.location,
        "vehicle": record.vehicle,
        "weights": record.spec.fingerprint,
        "first_ns": record.first_ns,
        "last_ns": record.last_ns,
        "began": _date(record.first_ns),
        "tiles": len(record.tiles),
        "cells": record.cells,
        "extent_cells": [extent.row, extent.col, extent.rows, extent.cols] if extent else None,
        "drives": list(record.drives),
        "dropped": list(record.dropped),
        "recordings": list(record.recordings),
    }


def _place(key: Key, spec: PriorSpec) -> dict[str, Any]:
    """Return which tile it is, and the rectangle that it covers in the map frame, m."""
    (row, col), edge = key, TILE * spec.cell
    corners = {"x_min_m": col * edge, "y_min_m": row * edge, "x_max_m": (col + 1) * edge, "y_max_m": (row + 1) * edge}
    return {"row": row, "col": col, **{name: round(value, 3) for name, value in corners.items()}}


def _date(stamp_ns: int) -> str:
    return datetime.fromtimestamp(stamp_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _who(record: Record) -> str:
    return f"{len(record.drives)} drives" if record.drives else record.vehicle or "-"


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


def _print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    lines = [[str(value) for value in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


@contextmanager
def _progress(total: int | None, unit: str, text: str) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal, nothing elsewhere."""
    with tqdm(total=total, unit=unit, desc=text, disable=None, leave=False) as bar:
        yield bar.update
