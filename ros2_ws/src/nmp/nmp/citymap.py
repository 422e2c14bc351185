"""Vector map of one city, read from a nuScenes map expansion (v1.3 JSON).

The trainer needs this on machines without nuscenes-devkit, and needs only six layers, so the JSON is read
directly; a test checks the geometry against the devkit's own ``NuScenesMap``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from shapely import STRtree
from shapely.geometry import LineString, Polygon, box
from shapely.geometry.base import BaseGeometry

from nmp.changelog import apply_changes, checked_date, read_changes
from nmp.errors import NmpError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexedGeometries:
    """Geometries (map frame, m) with a spatial index."""

    geometries: tuple[BaseGeometry, ...]
    index: STRtree

    @classmethod
    def of(cls, geometries: list[BaseGeometry]) -> IndexedGeometries:
        return cls(tuple(geometries), STRtree(geometries))

    def near(self, region: BaseGeometry) -> list[BaseGeometry]:
        """Return the geometries that touch ``region``, in map order."""
        return [self.geometries[i] for i in sorted(self.index.query(region, predicate="intersects"))]


@dataclass(frozen=True)
class CityMap:
    """The layers of a city that nmp draws, in the map frame of that city (m)."""

    location: str
    road_dividers: IndexedGeometries
    """lines between opposite directions"""
    lane_dividers: IndexedGeometries
    """lines between lanes of one direction"""
    crossings: IndexedGeometries
    """polygons: ped_crossing"""
    road_segments: IndexedGeometries
    """polygons: road_segment"""
    lanes: IndexedGeometries
    """polygons: lane"""
    walkways: IndexedGeometries
    """polygons: walkway (pavements); drawn by the simulator only"""

    def within(self, bounds: tuple[float, float, float, float]) -> CityMap:
        """Return the part of the map inside ``bounds`` (x0, y0, x1, y1, m), cut at its edges."""
        region = box(*bounds)

        def cut(layer: IndexedGeometries) -> IndexedGeometries:
            pieces = [geometry.intersection(region) for geometry in layer.near(region)]
            return IndexedGeometries.of([part for piece in pieces for part in _simple_parts(piece)])

        layers = {f.name: cut(getattr(self, f.name)) for f in fields(self) if f.name != "location"}
        return CityMap(location=self.location, **layers)

    @classmethod
    def load(cls, dataroot: Path, location: str, date: str | None = None) -> CityMap:
        """Read ``maps/expansion/<location>.json`` below a nuScenes data root.

        :param date: as in :func:`load_with_tables`
        """
        return load_with_tables(dataroot, location, date=date)[0]

    @classmethod
    def from_tables(cls, tables: Mapping[str, Any], location: str, *, repair: bool = False) -> CityMap:
        """Build from the dictionary of a map-expansion file.

        :param repair: mend self-crossing polygons instead of leaving them out; not for scoring
        """
        nodes = {n["token"]: (n["x"], n["y"]) for n in tables["node"]}
        lines = {r["token"]: [nodes[t] for t in r["node_tokens"]] for r in tables["line"]}
        polygons = {r["token"]: r for r in tables["polygon"]}

        def polygon(token: str) -> Polygon:
            record = polygons[token]
            shell = [nodes[t] for t in record["exterior_node_tokens"]]
            holes = [[nodes[t] for t in h["node_tokens"]] for h in record["holes"] if h["node_tokens"]]
            return Polygon(shell, holes)

        def line_layer(name: str) -> IndexedGeometries:
            found = [lines[r["line_token"]] for r in tables[name]]
            return IndexedGeometries.of([LineString(points) for points in found if len(points) > 1])

        def polygon_layer(name: str) -> IndexedGeometries:
            # a road_segment has one polygon, a drivable_area would have many; both spellings occur
            tokens = [t for r in tables[name] for t in r.get("polygon_tokens", [r.get("polygon_token")])]
            shapes = [polygon(t) for t in tokens]
            # The published evaluation skips self-crossing polygons; repairing them here would change the score.
            if repair:
                shapes = [shape if shape.is_valid else shape.buffer(0) for shape in shapes]
            kept = [s for s in shapes if s.is_valid and not s.is_empty]
            if len(kept) < len(shapes):
                log.warning("%s: %d invalid %s polygon(s) left out", location, len(shapes) - len(kept), name)
            return IndexedGeometries.of(list(kept))

        return cls(
            location=location,
            road_dividers=line_layer("road_divider"),
            lane_dividers=line_layer("lane_divider"),
            crossings=polygon_layer("ped_crossing"),
            road_segments=polygon_layer("road_segment"),
            lanes=polygon_layer("lane"),
            walkways=polygon_layer("walkway"),
        )


def load_with_tables(
    dataroot: Path, location: str, *, repair: bool = False, date: str | None = None
) -> tuple[CityMap, dict[str, Any]]:
    """Read a map expansion once, and return it as a map and as the dictionary that it is.

    :param repair: as in :meth:`CityMap.from_tables`
    :param date: YYYY-MM-DD; the changes of the data root's change log up to that day are applied, where there is one
        (see :mod:`nmp.changelog`). Without it, the expansion file as it is.
    """
    changes = read_changes(dataroot, location) if date is not None and checked_date(date) else []
    path = Path(dataroot) / "maps" / "expansion" / f"{location}.json"
    if not path.is_file():
        raise NmpError(
            f"no map expansion for {location}: {path} is missing. "
            "Download 'Map expansion pack (v1.3)' from nuscenes.org and unpack it into the data root's maps folder"
        )
    try:
        tables = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NmpError(f"{path} is not valid JSON ({error}): unpack the map expansion again") from error
    try:
        if date is not None:
            tables = apply_changes(tables, changes, date)
        return CityMap.from_tables(tables, location, repair=repair), tables
    except (KeyError, TypeError, ValueError) as error:
        raise NmpError(
            f"{path} is not a map expansion v1.3 file (missing or malformed {error}): unpack it again"
        ) from error


def _simple_parts(geometry: BaseGeometry) -> Iterator[BaseGeometry]:
    """Yield the polygons and lines of a cut; the points where something only touched are dropped."""
    if hasattr(geometry, "geoms"):
        for part in geometry.geoms:
            yield from _simple_parts(part)
    elif geometry.geom_type in ("Polygon", "LineString") and not geometry.is_empty:
        yield geometry
