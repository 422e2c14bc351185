"""``prior.json``: whose latents a city's prior holds, and in which format."""

from __future__ import annotations

import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nmp.errors import NmpError
from nmp.prior.window import PriorSpec

FORMAT = 1
"""the version of the on-disk layout that this code reads and writes"""
NAME = "prior.json"


def create(folder: Path, location: str, spec: PriorSpec) -> None:
    """Write the manifest of a new prior. Raises OSError."""
    content = {
        "format": FORMAT,
        "location": location,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "spec": {"channels": spec.channels, "cell": spec.cell, "fingerprint": spec.fingerprint},
    }
    # beside, synced, renamed: after a crash there is a whole manifest or none
    temporary = folder / f"{NAME}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / NAME)
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def check(folder: Path, location: str, spec: PriorSpec) -> None:
    """Raise :class:`NmpError` unless the prior in ``folder`` is this city's and holds latents of ``spec``."""
    path = folder / NAME
    content = _read(path)
    version = content.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise NmpError(f"prior in {folder} has format {version}, this nmp reads up to {FORMAT}: update nmp")
    try:
        found = PriorSpec(**content["spec"])
        city = content["location"]
        same_cell = math.isclose(found.cell, spec.cell, rel_tol=1e-9)
    except (KeyError, TypeError, NmpError):
        raise _unreadable(path, "values are missing or wrong") from None
    if version != FORMAT:
        raise _unreadable(path, f"format {version!r} never existed")
    if city != location:
        raise NmpError(f"prior in {folder} holds {city}, not {location}: rename it back, or use another --prior folder")
    if found.fingerprint != spec.fingerprint:
        raise NmpError(
            f"prior in {folder} was written by model {found.fingerprint}, these weights are {spec.fingerprint}: "
            "use those weights, or another --prior folder"
        )
    if not same_cell or found.channels != spec.channels:
        raise NmpError(
            f"prior in {folder} has {found.channels} channels in cells of {found.cell} m, the model wants "
            f"{spec.channels} in {spec.cell} m: use the settings that wrote it, or another --prior folder"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from error
    if not isinstance(content, dict):
        raise _unreadable(path, "not a JSON object")
    return content


def _unreadable(path: Path, reason: str) -> NmpError:
    return NmpError(f"{path} is unreadable ({reason}): restore it from a backup, or use another --prior folder")
