"""Vector maps as Lanelet2 maps in OSM XML, written by the library of that name (Poggenhans et al., ITSC 2018).

Tags are those of its documentation ("Tagging Linestrings", "Tagging Lanelets and Areas"). What the layers do not tell
is left out: whether a divider is solid or dashed, so that no lane change is inferred from it; and which lines bound a
lane, so that there are no lanelets.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from shapely.geometry.polygon import orient

from nmp.errors import NmpError
from nmp.geometry import Array
from nmp.vectors.elements import MapElement
from nmp.vectors.geo import Origin
from nmp.vectors.geojson import properties_of

LINE_TYPES = {"divider": "line_thin", "boundary": "road_border"}
CROSSING_LINE, CROSSING_AREA = "pedestrian_marking", "crosswalk"


def write_lanelet2(path: Path, elements: Sequence[MapElement], location: str, origin: Origin) -> None:
    """Write a Lanelet2 map; an element has the same id there as in GeoJSON.

    Read with ``lanelet2.projection.LocalCartesianProjector`` at the same origin, its points are those of the map frame
    again. Raises :class:`NmpError` when the library is missing, or the file cannot be written.
    """
    try:
        from lanelet2 import core, io, projection
    except ImportError as error:
        raise NmpError(
            f"Lanelet2 maps need the package lanelet2 ({error}): pip install 'neural-map-prior[lanelet2]', or write "
            ".geojson"
        ) from error
    city = core.LaneletMap()
    ids = count(max((e.id for e in elements), default=0) + 1)
    for element in elements:
        for primitive in _primitives(core, element, location, ids):
            city.add(primitive)
    partial = path.with_name(f".{path.stem}.partial.osm")  # the library goes by the suffix
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()  # the library's own error does not say why
        io.write(str(partial), city, projection.LocalCartesianProjector(io.Origin(*origin)))
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            partial.unlink()
        reason = getattr(error, "strerror", None) or error
        raise NmpError(f"cannot write {path} ({reason}): choose another --out") from error


def _primitives(core: Any, element: MapElement, location: str, ids: Iterator[int]) -> Iterator[Any]:
    tags = {f"nmp:{key}": str(value) for key, value in properties_of(element).items()} | {"nmp:location": location}
    if element.name != "crossing":
        line = _distinct(np.asarray(element.geometry.coords))
        points = _points(core, line[:-1] if _closed(line) else line, ids)
        points += points[:1] if _closed(line) else []
        yield core.LineString3d(element.id, points, core.AttributeMap({"type": LINE_TYPES[element.name], **tags}))
        return
    # Areas run clockwise, and their outline is of lines that share their ends.
    ring = _points(core, _distinct(np.asarray(orient(element.geometry, -1.0).exterior.coords))[:-1], ids)
    half = len(ring) // 2
    marking = {"type": CROSSING_LINE}
    sides = [
        core.LineString3d(next(ids), part, core.AttributeMap(marking))
        for part in (ring[: half + 1], [*ring[half:], ring[0]])
    ]
    area = {"type": "multipolygon", "subtype": CROSSING_AREA, **tags}
    yield core.Area(element.id, sides, [], core.AttributeMap(area))


def _closed(line: Array) -> bool:
    return len(line) > 3 and bool((line[0] == line[-1]).all())


def _distinct(points: Array) -> Array:
    """Return points [N, 2] without those that repeat the one before, which the format forbids."""
    return points[np.append(True, np.any(np.diff(points, axis=0) != 0, axis=1))]


def _points(core: Any, points: Array, ids: Iterator[int]) -> list[Any]:
    return [core.Point3d(next(ids), float(x), float(y), 0.0) for x, y in points]
