"""Assemble the tables of a nuScenes map-expansion v1.3 file from shapely geometry."""

from __future__ import annotations

import hashlib
import uuid
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry import LineString, Polygon
from shapely.geometry.base import BaseGeometry

Array = NDArray[np.float64]

LIST_TABLES = (
    "polygon",
    "line",
    "node",
    "drivable_area",
    "road_segment",
    "road_block",
    "lane",
    "ped_crossing",
    "walkway",
    "stop_line",
    "carpark_area",
    "lane_connector",
    "road_divider",
    "lane_divider",
    "traffic_light",
)


def polygons_of(geometry: BaseGeometry, min_area: float = 0.0) -> list[Polygon]:
    """Return the polygons of a geometry that are larger than ``min_area`` (m^2)."""
    return [
        g for g in shapely.get_parts(geometry, return_index=False) if g.geom_type == "Polygon" and g.area > min_area
    ]


def lines_of(geometry: BaseGeometry, min_length: float = 0.0) -> list[LineString]:
    """Return the line strings of a geometry that are longer than ``min_length`` (m)."""
    return [
        g
        for g in shapely.get_parts(geometry, return_index=False)
        if g.geom_type == "LineString" and g.length > min_length
    ]


class MapBuilder:
    """Collects records; tokens depend only on the name of the map and the order of the calls."""

    def __init__(self, name: str, width_m: float, height_m: float) -> None:
        self._name = name
        self._count = 0
        self.tables: dict[str, Any] = {
            "version": "1.3",
            "location": name.split(":")[1],
            "canvas_edge": [float(width_m), float(height_m)],
        }
        self.tables["connectivity"] = {}
        self.tables["arcline_path_3"] = {}
        for table in LIST_TABLES:
            self.tables[table] = []

    def token(self) -> str:
        """Return a fresh token."""
        self._count += 1
        return str(uuid.UUID(hashlib.md5(f"{self._name}:{self._count}".encode()).hexdigest()))

    def add(self, table: str, **fields: Any) -> str:
        """Append a record to a table and return its token."""
        token = self.token()
        self.tables[table].append({"token": token, **fields})
        return token

    def line(self, points: Array) -> str:
        """Store a line [N, 2] (m, map frame) and return its token."""
        return self.add("line", node_tokens=self._nodes(points))

    def polygon(self, polygon: Polygon) -> str:
        """Store a polygon with its holes and return its token."""
        shape = shapely.set_precision(polygon, 1e-4) if not _valid_when_rounded(polygon) else polygon
        shape = max(polygons_of(shape), key=lambda p: p.area)
        exterior = self._nodes(np.asarray(shape.exterior.coords)[:-1])
        holes = [{"node_tokens": self._nodes(np.asarray(ring.coords)[:-1])} for ring in shape.interiors]
        return self.add("polygon", exterior_node_tokens=exterior, holes=holes)

    def _nodes(self, points: Array) -> list[str]:
        # Four decimals, as in the published files: 0.1 mm, which keeps the files small.
        return [self.add("node", x=round(float(x), 4), y=round(float(y), 4)) for x, y in points]


def _valid_when_rounded(polygon: Polygon) -> bool:
    return bool(shapely.transform(polygon, lambda c: np.round(c, 4)).is_valid)


def arcline_paths(points: Array, step: float) -> list[dict[str, Any]]:
    """Return a centre line [N, 2] (m) as nuScenes arc-line records, one circular arc every ``step`` metres."""
    line = LineString(points)
    count = max(1, round(line.length / step))
    s = np.linspace(0, line.length, count + 1)
    at = shapely.get_coordinates(line.interpolate(s))
    ahead = shapely.get_coordinates(line.interpolate(np.minimum(s + 0.25, line.length)))
    behind = shapely.get_coordinates(line.interpolate(np.maximum(s - 0.25, 0)))
    heading = np.arctan2(*(ahead - behind).T[::-1])
    paths = []
    for i in range(count):
        chord = at[i + 1] - at[i]
        length = float(np.hypot(*chord))
        # The one arc that leaves along the heading and ends in the next point.
        turn = (np.arctan2(chord[1], chord[0]) - heading[i] + np.pi) % (2 * np.pi) - np.pi
        curvature = 2 * np.sin(turn) / length
        straight = abs(curvature) < 1e-4
        arc = length if straight else float(turn / np.sin(turn)) * length
        end_heading = heading[i] if straight else heading[i] + 2 * turn
        paths.append(
            {
                "start_pose": [*(round(float(v), 4) for v in at[i]), round(float(heading[i]), 6)],
                "end_pose": [*(round(float(v), 4) for v in at[i + 1]), round(float(end_heading), 6)],
                "shape": "RSR" if curvature < 0 else "LSL",
                "radius": 9999.0 if straight else round(abs(1 / float(curvature)), 4),
                "segment_length": [0.0, round(arc, 4), 0.0] if straight else [round(arc, 4), 0.0, 0.0],
            }
        )
    return paths
