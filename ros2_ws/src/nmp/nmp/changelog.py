"""What changed in a city after its map was drawn, and the map as it was on a given day.

A data root may hold ``maps/changes/<location>.json`` next to its map expansions: an object with ``location``,
``map_date`` (the day of the expansion file, before all changes) and ``changes``, a list sorted by date. Every change
carries its geometry as plain coordinates in the map frame (m), so that the file can be read without the map.
"""

from __future__ import annotations

import datetime
import json
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shapely
from shapely.geometry import LineString, Polygon

from nmp.errors import NmpError

Tables = dict[str, Any]
Point = tuple[float, float]

LINE_LAYERS = ("road_divider", "lane_divider")
AREA_LAYERS = ("drivable_area", "road_segment", "road_block", "lane", "walkway")
"""layers that lose or gain ground; the others gain or lose whole records"""
LAYERS = (*LINE_LAYERS, *AREA_LAYERS, "ped_crossing")

KINDS = ("crossing_removed", "crossing_added", "dividers_moved", "boundary_moved")

LAST_DAY = "9999-12-31"
"""the date on which all changes are in force"""

SMALLEST_PART_M2 = 0.5
"""what is cut off a road and is smaller than this goes too"""


@dataclass(frozen=True)
class Shape:
    """A line or polygon of one layer."""

    layer: str
    rings: tuple[tuple[Point, ...], ...]
    """the points of a line, or the outline of a polygon and then its holes, not closed; map frame, m"""
    token: str = ""
    """of the whole record that this is; empty for ground that is cut out of all records of its layer"""

    @property
    def geometry(self) -> LineString | Polygon:
        return LineString(self.rings[0]) if self.layer in LINE_LAYERS else Polygon(self.rings[0], self.rings[1:])

    @classmethod
    def of(cls, layer: str, geometry: LineString | Polygon, token: str = "") -> Shape:
        """Make a shape of a geometry, to a tenth of a millimetre as in the published maps."""
        if layer in LINE_LAYERS:
            rings = [shapely.get_coordinates(geometry)]
        else:
            rings = [shapely.get_coordinates(ring)[:-1] for ring in (geometry.exterior, *geometry.interiors)]
        return cls(layer, tuple(tuple((round(float(x), 4), round(float(y), 4)) for x, y in r) for r in rings), token)

    def to_json(self) -> dict[str, Any]:
        return {"layer": self.layer, "token": self.token, "coordinates": [[list(p) for p in r] for r in self.rings]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Shape:
        """Read what :meth:`to_json` wrote; KeyError, TypeError or ValueError when it is something else."""
        rings = tuple(tuple((float(x), float(y)) for x, y in ring) for ring in record["coordinates"])
        layer, least = str(record["layer"]), 2 if record["layer"] in LINE_LAYERS else 3
        if layer not in LAYERS:
            raise ValueError(f"unknown layer {layer!r}")
        if not rings or any(len(ring) < least for ring in rings):
            raise ValueError(f"a {layer} with too few points")
        if not all(math.isfinite(v) for ring in rings for p in ring for v in p):
            raise ValueError(f"a {layer} with coordinates that are not finite")
        shape = cls(layer, rings, str(record["token"]))
        if layer not in LINE_LAYERS and not shape.geometry.is_valid:
            raise ValueError(f"a {layer} whose outline crosses itself")
        return shape


@dataclass(frozen=True)
class Change:
    """One change of a city."""

    date: str
    """YYYY-MM-DD, local time: in force from that day on"""
    kind: str
    """one of ``KINDS``"""
    location: str
    x: float
    """centre, map frame, m"""
    y: float
    removed: tuple[Shape, ...]
    added: tuple[Shape, ...]
    """with the token of a removed record: that record in its new place"""

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that it touches."""
        return tuple(sorted({s.layer for s in (*self.removed, *self.added)}))

    @property
    def timestamp_us(self) -> int:
        """Local midnight of its date, microseconds since 1970 as in the nuScenes tables."""
        midnight = datetime.datetime.fromisoformat(self.date).replace(tzinfo=time_zone(self.location))
        return round(midnight.timestamp() * 1e6)

    def to_json(self) -> dict[str, Any]:
        return {
            "date": self.date,
            "timestamp_us": self.timestamp_us,
            "kind": self.kind,
            "location": self.location,
            "layers": list(self.layers),
            "x": self.x,
            "y": self.y,
            "removed": [s.to_json() for s in self.removed],
            "added": [s.to_json() for s in self.added],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Change:
        """Read what :meth:`to_json` wrote; KeyError, TypeError or ValueError when it is something else."""
        change = cls(
            date=datetime.date.fromisoformat(record["date"]).isoformat(),
            kind=str(record["kind"]),
            location=str(record["location"]),
            x=float(record["x"]),
            y=float(record["y"]),
            removed=tuple(Shape.from_json(s) for s in record["removed"]),
            added=tuple(Shape.from_json(s) for s in record["added"]),
        )
        if change.kind not in KINDS:
            raise ValueError(f"unknown kind {change.kind!r}")
        if record["timestamp_us"] != change.timestamp_us:
            raise ValueError(f"timestamp_us {record['timestamp_us']} is not midnight of {change.date}")
        if any(not s.token for s in change.added) or any(not s.token and _is_record(s.layer) for s in change.removed):
            raise ValueError("a record without a token")
        return change


def _is_record(layer: str) -> bool:
    return layer not in AREA_LAYERS


def time_zone(location: str) -> datetime.timezone:
    """Return the time zone of a location: nuScenes drove in summer, Boston at UTC-4, Singapore at UTC+8."""
    return datetime.timezone(datetime.timedelta(hours=-4 if location.startswith("boston") else 8))


def local_date(location: str, stamp_ns: int) -> str:
    """Return the day (YYYY-MM-DD) on the calendar of a location at a stamp, nanoseconds since 1970."""
    return datetime.datetime.fromtimestamp(stamp_ns / 1e9, time_zone(location)).date().isoformat()


def checked_date(text: str) -> str:
    """Return a date as YYYY-MM-DD; :class:`NmpError` when it is none."""
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except (TypeError, ValueError) as error:
        raise NmpError(f"{text!r} is not a date: write YYYY-MM-DD") from error


def changes_path(dataroot: Path, location: str) -> Path:
    """Return where the change log of a location lies."""
    return Path(dataroot) / "maps" / "changes" / f"{location}.json"


def read_changes(dataroot: Path, location: str) -> list[Change]:
    """Read the change log of a location, sorted by date; empty where there is none."""
    path = changes_path(dataroot, location)
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text())
        changes = [Change.from_json(record) for record in content["changes"]]
        map_date = datetime.date.fromisoformat(content["map_date"]).isoformat()
        place = str(content["location"])
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NmpError(f"{path} is not valid JSON ({error}): make the data set again, or delete the file") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise NmpError(f"{path} is not a change log ({error}): make the data set again, or delete the file") from error
    for name in (place, *(c.location for c in changes)):
        if name != location:
            raise NmpError(f"{path} tells of changes in {name!r}: put the change log of {location} there")
    dates = [map_date, *(c.date for c in changes)]
    if dates != sorted(dates):
        raise NmpError(f"{path} is not sorted by date, or a change is older than the map: make the data set again")
    return changes


def write_changes(dataroot: Path, location: str, changes: Iterable[Change], map_date: str) -> Path:
    """Write the change log of a location; ``map_date`` (YYYY-MM-DD) must not be after the first change."""
    path = changes_path(dataroot, location)
    rows = [change.to_json() for change in in_force(changes, LAST_DAY)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"location": location, "map_date": map_date, "changes": rows}, indent=1))
    return path


def in_force(changes: Iterable[Change], date: str) -> list[Change]:
    """Return the changes up to a date (YYYY-MM-DD, inclusive), sorted by date."""
    day = checked_date(date)
    return sorted((c for c in changes if c.date <= day), key=lambda c: c.date)


def apply_changes(tables: Mapping[str, Any], changes: Sequence[Change], date: str) -> Tables:
    """Return the map-expansion dictionary that is in force on a date (YYYY-MM-DD).

    The given dictionary stays as it is; without a change in force it is returned itself. Raises :class:`NmpError` when
    a change does not fit the map.
    """
    due = in_force(changes, date)
    if not due:
        return tables if isinstance(tables, dict) else dict(tables)
    editor = _Editor(tables)
    for change in due:
        editor.apply(change)
    return editor.tables


class _Editor:
    """A copy of a map-expansion dictionary that shares every record that is not changed."""

    def __init__(self, tables: Mapping[str, Any]) -> None:
        self.tables: Tables = {**tables, **{name: list(rows) for name, rows in tables.items() if type(rows) is list}}
        self._at = {
            name: {row["token"]: k for k, row in enumerate(self.tables[name])} for name in ("node", "polygon", "line")
        }
        self._polygons: dict[str, Polygon] = {}

    def apply(self, change: Change) -> None:
        moved = {(s.layer, s.token) for s in change.removed} & {(s.layer, s.token) for s in change.added}
        for shape in change.removed:
            if not shape.token:
                self._cut(shape.layer, shape.geometry)
            elif (shape.layer, shape.token) not in moved:
                self._remove(shape, change)
        for shape in change.added:
            if (shape.layer, shape.token) in moved:
                self._move(shape, change)
            else:
                self._add(shape)

    def _find(self, shape: Shape, change: Change) -> int:
        for k, row in enumerate(self.tables[shape.layer]):
            if row["token"] == shape.token:
                return k
        raise NmpError(
            f"the change log of {change.location} speaks of {shape.layer} {shape.token}, which the map has not on "
            f"{change.date}: use the map and the change log of the same data set"
        )

    def _remove(self, shape: Shape, change: Change) -> None:
        # Its line or polygon stays, as other records may share it.
        del self.tables[shape.layer][self._find(shape, change)]
        if shape.layer == "ped_crossing":
            for k, row in enumerate(self.tables["stop_line"]):
                if shape.token in row.get("ped_crossing_tokens", ()):
                    kept = [t for t in row["ped_crossing_tokens"] if t != shape.token]
                    self.tables["stop_line"][k] = {**row, "ped_crossing_tokens": kept}

    def _move(self, shape: Shape, change: Change) -> None:
        k = self._find(shape, change)
        row = self.tables[shape.layer][k]
        nodes, line = self._line(shape)
        new = {**row, "line_token": line}
        kinds = [s["segment_type"] for s in row.get("lane_divider_segments", [])]
        if kinds:
            kinds = kinds if len(kinds) == len(nodes) else [max(sorted(kinds), key=kinds.count)] * len(nodes)
            new["lane_divider_segments"] = [
                {"node_token": n, "segment_type": s} for n, s in zip(nodes, kinds, strict=True)
            ]
        self.tables[shape.layer][k] = new

    def _add(self, shape: Shape) -> None:
        row: dict[str, Any] = {"token": shape.token}
        if shape.layer in LINE_LAYERS:
            nodes, row["line_token"] = self._line(shape)
            if shape.layer == "lane_divider":
                row["lane_divider_segments"] = []
            else:
                row["road_segment_token"] = ""
        else:
            row["polygon_token"] = self._polygon_of(shape.token, "polygon", shape.geometry, {})
            if shape.layer == "ped_crossing":
                row["road_segment_token"] = ""
        self.tables[shape.layer].append(row)

    def _cut(self, layer: str, area: Polygon) -> None:
        """Take ground away from all records of a layer."""
        shapely.prepare(area)
        rows, out = self.tables[layer], []
        for row in rows:
            tokens = row["polygon_tokens"] if "polygon_tokens" in row else [row["polygon_token"]]
            left = [part for token in tokens for part in self._cut_polygon(token, area)]
            if left == tokens:
                out.append(row)
            elif "polygon_tokens" in row:
                out.append({**row, "polygon_tokens": left})
            else:
                # A lane stays one lane, as the lane graph speaks of it; a road may fall into pieces.
                for k, token in enumerate(left[:1] if layer == "lane" else left):
                    out.append({**row, "token": row["token"] if k == 0 else token, "polygon_token": token})
        self.tables[layer] = out

    def _cut_polygon(self, token: str, area: Polygon) -> list[str]:
        """Return the tokens of what is left of a polygon, the largest part first and under its old token."""
        record = self.tables["polygon"][self._at["polygon"][token]]
        shape = self._shape(token)
        # Readers leave self-crossing polygons out; cutting would make them good ones.
        if not area.intersects(shape) or not shape.is_valid or area.intersection(shape).area < 1e-6:
            return [token]
        parts = [
            p
            for p in shapely.get_parts(shape.difference(area))
            if p.geom_type == "Polygon" and p.area > SMALLEST_PART_M2
        ]
        parts.sort(key=lambda p: -p.area)
        rings = [record["exterior_node_tokens"], *(hole["node_tokens"] for hole in record["holes"])]
        known = {self._xy(t): t for ring in rings for t in ring}
        return [self._polygon_of(token, f"{area.wkt}:{k}", part, known, replace=k == 0) for k, part in enumerate(parts)]

    def _xy(self, node: str) -> Point:
        row = self.tables["node"][self._at["node"][node]]
        return row["x"], row["y"]

    def _shape(self, token: str) -> Polygon:
        if token not in self._polygons:
            record = self.tables["polygon"][self._at["polygon"][token]]
            rings = [record["exterior_node_tokens"], *(h["node_tokens"] for h in record["holes"] if h["node_tokens"])]
            shell, *holes = [[self._xy(t) for t in ring] for ring in rings]
            self._polygons[token] = Polygon(shell, holes)
        return self._polygons[token]

    def _line(self, shape: Shape) -> tuple[list[str], str]:
        """Store a line; return the tokens of its nodes and its own."""
        nodes = self._nodes(f"{shape.token}:{shape.rings}", shape.rings[0], {})
        token = _token(f"{shape.token}:{shape.rings}:line")
        self._put("line", {"token": token, "node_tokens": nodes})
        return nodes, token

    def _polygon_of(
        self, owner: str, name: str, shape: Polygon, known: Mapping[Point, str], *, replace: bool = False
    ) -> str:
        token = owner if replace else _token(f"{owner}:{name}")
        rings = [
            self._nodes(f"{owner}:{name}:{k}", shapely.get_coordinates(ring)[:-1].tolist(), known)
            for k, ring in enumerate((shape.exterior, *shape.interiors))
        ]
        holes = [{"node_tokens": ring} for ring in rings[1:]]
        self._put("polygon", {"token": token, "exterior_node_tokens": rings[0], "holes": holes})
        self._polygons[token] = shape
        return token

    def _nodes(self, name: str, points: Iterable[Sequence[float]], known: Mapping[Point, str]) -> list[str]:
        out = []
        for k, (x, y) in enumerate(points):
            token = known.get((x, y))
            if token is None:
                token = _token(f"{name}:{k}")
                self._put("node", {"token": token, "x": float(x), "y": float(y)})
            out.append(token)
        return out

    def _put(self, table: str, row: dict[str, Any]) -> None:
        at = self._at[table].setdefault(row["token"], len(self.tables[table]))
        self.tables[table][at : at + 1] = [row]


def _token(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, name))
