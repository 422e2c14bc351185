"""What services ask of the stored prior. No ROS; every path that a caller names stays inside the prior's folder."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path

from nmp.errors import NmpError
from nmp.prior import upkeep
from nmp.prior.ledger import CITY, Ledger
from nmp.prior.record import Record
from nmp.prior.storage import Place, Storage


class Refused(NmpError):
    """A caller names something that is not there, or not allowed."""


def confined(folder: Path, name: str) -> Path:
    """Return the absolute path that ``name`` means below ``folder``, links followed.

    Raises :class:`Refused` when it is empty or lies elsewhere.
    """
    root = folder.expanduser().resolve()
    try:
        path = (root / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise Refused(f"{name!r} is no path: give a name inside {root}") from error
    if not name or path == root or not path.is_relative_to(root):
        raise Refused(f"{name!r} lies outside the folder of the prior: give a name inside {root}")
    return path


def ledger_of(prior: Place, location: str, *, read_only: bool = False) -> Ledger:
    """Return the ledger of a city of a prior. Raises :class:`Refused` when there is no such city."""
    if isinstance(prior, Path):
        path = confined(prior, location)
        known = path.parent == prior.expanduser().resolve()
    else:
        known = bool(location) and "/" not in location and not location.startswith(".")
    storage = Storage(prior).below(location) if known else None
    if storage is None or storage.get(CITY) is None:
        raise Refused(f"there is no city {location!r} in {prior}: name one that is")
    return Ledger.open(storage, read_only=read_only)


def check_version(prior: Place, location: str, version: str) -> None:
    """Raise :class:`Refused` when the city has no such drive; an empty version and "base" always exist."""
    ledger = ledger_of(prior, location, read_only=True)
    if version not in ("", "base"):
        try:
            ledger.find(version)
        except NmpError as error:
            raise Refused(str(error)) from error


def load_version(prior: Place, location: str, version: str) -> int:
    """Leave out the drives after one, or all of them for "base"; return how many records the city is folded from.

    An empty version changes nothing. The prior of this city must be closed, to be opened again afterwards.
    """
    ledger = ledger_of(prior, location)
    if version == "base":
        upkeep.leave_out(ledger, [record.id for record in ledger.drives()])
    elif version:
        upkeep.leave_out(ledger, [r.id for r in upkeep.drives_after(ledger, ledger.find(version))])
    return len(ledger.active())


def stored(prior: Place) -> set[str]:
    """Return the ids of all drives of all cities."""
    storage = Storage(prior)
    cities = [name for name in storage.children() if storage.get(f"{name}/{CITY}") is not None]
    return {drive for name in cities for drive in ledger_of(prior, name, read_only=True).known()}


def forget(prior: Place, drives: Mapping[str, Record], before: Container[str]) -> int:
    """Leave drives, by city, out of their cities; return how many.

    :param before: ids of those that were stored before they were driven: a recording that is played twice counts once
    """
    new = {location: record.id for location, record in drives.items() if record.id not in before}
    for location, drive in new.items():
        upkeep.leave_out(ledger_of(prior, location), [drive])
    return len(new)


def export_city(folder: Place, location: str, name: str) -> tuple[Path, int]:
    """Write a city's drives into a new zip file in the prior's folder; return its path, and how many records it holds.

    Raises :class:`Refused` for a name that cannot be that, and while no drive of the city is over.
    """
    if not isinstance(folder, Path):
        raise Refused(f"{folder} is no folder to write a file to: run nmp prior export {folder}/{location}")
    path = confined(folder, name)
    if path.suffix != ".zip":
        raise Refused(f"{name!r} does not end in .zip: give such a name")
    if path.exists():
        raise Refused(f"{path} exists: choose another name")
    if not path.parent.is_dir():
        raise Refused(f"{path.parent} is no folder: give a name in {folder}")
    ledger = ledger_of(folder, location, read_only=True)
    if not ledger.active():
        raise Refused(f"no drive of {location} is over yet: ~/reset ends the one that is being driven")
    return path, upkeep.export(ledger, path)
