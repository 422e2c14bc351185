"""Commit records: what one drive, or a compacted base of many, consists of. Named by a hash of their content."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmp.errors import NmpError
from nmp.prior.window import PriorSpec

FORMAT = 2
"""of a record"""
_TABLE = np.dtype([("row", "<i4"), ("col", "<i4"), ("cells", "<u2"), ("digest", "<u8")])


class Newer(NmpError):
    """Something was written by a newer nmp: it is neither damaged nor to be touched."""

    def __init__(self, what: str, version: int, known: int) -> None:
        super().__init__(f"{what} has format {version}, this nmp reads up to {known}: update nmp")


@dataclass(frozen=True)
class Record:
    """A drive that was committed, or a base; immutable. ``id`` hashes everything that is in it."""

    location: str
    spec: PriorSpec
    vehicle: str
    """who drove; may be empty"""
    first_ns: int
    """stamp of the first frame, ns: drives are folded in the order of it"""
    last_ns: int
    """stamp of the last one, ns in whole seconds"""
    tiles: NDArray[np.void] = field(repr=False)
    """row, col, cells (seen in it), digest (of its bytes), in the order of row and column"""
    drives: tuple[str, ...] = ()
    """of a base: the drives in it"""
    dropped: tuple[str, ...] = ()
    """of a base: drives that were rolled back and are gone for good"""
    recordings: tuple[str, ...] = ()
    """hash of the recording that was mapped from its first to its last frame (of a base: of all such, the dropped
    too); none for a drive that was live or ended early"""

    @property
    def id(self) -> str:
        return name_of(self.to_bytes())

    @property
    def order(self) -> tuple[int, str]:
        """Drives are folded in this order."""
        return self.first_ns, self.id

    @property
    def cells(self) -> int:
        return int(self.tiles["cells"].sum())

    def to_bytes(self) -> bytes:
        """Return the record as JSON; equal records give equal bytes."""
        content = {
            "format": FORMAT,
            "location": self.location,
            "spec": self.spec.to_dict(),
            "vehicle": self.vehicle,
            "first_ns": self.first_ns,
            "last_ns": self.last_ns,
            "drives": self.drives,
            "dropped": self.dropped,
            "tiles": base64.b64encode(self.tiles.tobytes()).decode(),
        }
        if self.recordings:  # left out when empty: records from before there was such a key keep their names
            content["recordings"] = self.recordings
        return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> Record:
        """Return the record with this id.

        Raises ValueError when the content is not that of the id, :class:`Newer` when it is of a newer format.
        """
        if name_of(content) != name:
            raise ValueError("its checksum is wrong")
        values = json.loads(content)
        version = values["format"]
        if isinstance(version, int) and version > FORMAT:
            raise Newer(f"the record {name[:12]} of the prior", version, FORMAT)
        if version != FORMAT:
            raise ValueError(f"it has format {version}")
        return cls(
            location=values["location"],
            spec=PriorSpec(**values["spec"]),
            vehicle=values["vehicle"],
            first_ns=values["first_ns"],
            last_ns=values["last_ns"],
            tiles=np.frombuffer(base64.b64decode(values["tiles"]), _TABLE),
            drives=tuple(values["drives"]),
            dropped=tuple(values["dropped"]),
            recordings=tuple(values.get("recordings", ())),
        )


def name_of(content: bytes) -> str:
    """Return the id of a record: 128 bits of SHA-256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()[:32]


def tile_table(rows: list[tuple[int, int, int, int]]) -> NDArray[np.void]:
    """Return (row, col, cells, digest) as :attr:`Record.tiles`."""
    return np.array(sorted(rows), _TABLE)


def check_spec(where: str, location: str, found_location: str, spec: PriorSpec, found: PriorSpec) -> None:
    """Raise :class:`NmpError` unless a stored prior is this city's and holds latents of ``spec``."""
    if found_location != location:
        raise NmpError(
            f"prior in {where} holds {found_location}, not {location}: rename it back, or use another --prior folder"
        )
    if found.fingerprint != spec.fingerprint:
        raise NmpError(
            f"prior in {where} was written by model {found.fingerprint}, these weights are {spec.fingerprint}: "
            "use those weights, or another --prior folder"
        )
    if not math.isclose(found.cell, spec.cell, rel_tol=1e-9) or found.channels != spec.channels:
        raise NmpError(
            f"prior in {where} has {found.channels} channels in cells of {found.cell} m, the model wants "
            f"{spec.channels} in {spec.cell} m: use the settings that wrote it, or another --prior folder"
        )
    for name, what in (("merge", "merge rule"), ("bits", "bits per channel"), ("evidence_cap", "evidence cap")):
        stored, wanted = getattr(found, name), getattr(spec, name)
        if stored != wanted:
            raise NmpError(
                f"prior in {where} has the {what} {stored}, not {wanted}: use the settings that wrote it, or another "
                "--prior folder"
            )


def checked(content: dict[str, Any]) -> bytes:
    """Return a small JSON object with a checksum in it."""
    return json.dumps({**content, "sha256": _sum(content)}, indent=1, sort_keys=True).encode() + b"\n"


def unchecked(raw: bytes) -> dict[str, Any]:
    """Return what :func:`checked` wrote. Raises ValueError when it is damaged."""
    content = json.loads(raw)
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    if content.pop("sha256", None) != _sum(content):
        raise ValueError("its checksum is wrong")
    return content


def _sum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
