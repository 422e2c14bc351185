"""What a painter needs to know of a map beside its lines: the outline of the road in smooth runs, and directions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from shapely import STRtree
from shapely.geometry import LineString, Polygon
from shapely.geometry.base import BaseGeometry
from shapely.geometry.polygon import orient

from nmp.citymap import CityMap
from nmp_train.sim.marks import Array
from nmp_train.sim.polyline import Polyline

EDGE_M = 15.0
"""edges of the road that is filled are no longer than this"""
STEP = 1.0
"""between the points at which an outline is looked at for corners, m"""
CORNER_RAD, CORNER_SPAN = 0.45, 6
"""an outline that turns by more over this many steps has a corner there"""
LONGEST_RUN = 90.0
"""longer stretches are cut into equal parts, m"""
THIN_M = 5.0
"""a hole of the road whose area / half its outline is less is a median or an island, not a block"""


@dataclass(frozen=True)
class Run:
    """A smooth stretch of the outline of the road, with the road on its left."""

    path: Polyline
    straight: bool
    """False at corners of junctions and openings"""
    thin: bool
    """goes around a median or an island"""
    kerb: Array
    """[2] where its block begins: runs around one block have one kind of kerb"""


@dataclass(frozen=True)
class LaneAxis:
    """The middle of a lane that is about straight, in the direction of travel."""

    path: Polyline
    width: float
    middle: Array
    """[2] m"""


class RoadSide:
    """The road of a city as one surface, and everything that is measured from it (map frame, m)."""

    def __init__(self, city: CityMap) -> None:
        shapes = [*city.road_segments.geometries, *city.lanes.geometries]
        self.surface: BaseGeometry = shapely.union_all(shapes) if shapes else Polygon()
        # Short edges: where a window cuts them, none changes its slope within sight.
        self.segmented = shapely.segmentize(self.surface, EDGE_M)
        self.left_hand = city.location.startswith("singapore")
        self.runs = [run for polygon in _polygons(self.surface) for run in _runs(polygon)]
        self.lane_tree = city.lanes.index
        self.lane_shapes = city.lanes.geometries
        lines = [*city.road_dividers.geometries, *city.lane_dividers.geometries]
        points, headings = [np.zeros((0, 2))], [np.zeros(0)]
        for path in [
            *(r.path for r in self.runs if r.straight),
            *(Polyline(shapely.get_coordinates(x)) for x in lines),
        ]:
            s = np.arange(1.0, path.length, 3.0)
            n = path.normal(s, 2.0)
            points.append(path.at(s))
            headings.append(np.arctan2(-n[:, 0], n[:, 1]))
        self._headings = np.concatenate(headings)
        self._compass = cKDTree(np.concatenate(points))
        self.edges = [shapely.linestrings(r.path.points) for r in self.runs]
        self.edge_tree = STRtree(self.edges)
        self._axes: dict[int, LaneAxis | None] = {}
        shapely.prepare(self.surface)

    def runs_near(self, region: BaseGeometry) -> list[Run]:
        """Return the runs whose box meets a region, in order."""
        return [self.runs[i] for i in np.sort(self.edge_tree.query(region))]

    def axes_near(self, region: BaseGeometry) -> list[LaneAxis]:
        """Return the middles of the lanes whose box meets a region."""
        out = []
        for i in np.sort(self.lane_tree.query(region)).tolist():
            if i not in self._axes:
                self._axes[i] = self.axis(self.lane_shapes[i])
            out.append(self._axes[i])
        return [axis for axis in out if axis is not None]

    def heading(self, xy: Array) -> Array:
        """Return the direction [N] (rad) of the road around points [N, 2]; it has no forward and backward."""
        if not len(self._headings):
            return np.zeros(len(xy))
        _, nearest = self._compass.query(xy)
        return np.asarray(self._headings[nearest])

    def on_road(self, xy: Array) -> NDArray[np.bool_]:
        """Return for points [N, 2] whether they lie on the road."""
        return np.asarray(shapely.contains_xy(self.surface, xy[:, 0], xy[:, 1]))

    def in_lane(self, xy: Array) -> NDArray[np.bool_]:
        """Return for points [N, 2] whether they lie in a lane of the map."""
        inside = np.zeros(len(xy), dtype=bool)
        inside[self.lane_tree.query(shapely.points(xy), predicate="intersects")[0]] = True
        return inside

    def edge_distance(self, xy: Array) -> Array:
        """Return the distance [N] (m) of points [N, 2] from the edge of the road."""
        if not self.edges:
            return np.full(len(xy), np.inf)
        points = shapely.points(xy)
        nearest = self.edge_tree.nearest(points)
        return np.asarray(shapely.distance(points, np.array(self.edges, dtype=object)[nearest]))

    def axis(self, lane: BaseGeometry) -> LaneAxis | None:
        """Return the middle of a lane, directed as its side of the road is; None for bent or odd shapes."""
        box = lane.minimum_rotated_rectangle
        if box.geom_type != "Polygon" or lane.area < 0.75 * box.area:
            return None
        corner = shapely.get_coordinates(box)[:4]
        if np.linalg.norm(corner[1] - corner[0]) < np.linalg.norm(corner[2] - corner[1]):
            corner = np.roll(corner, -1, axis=0)
        ends = np.stack([(corner[0] + corner[3]) / 2, (corner[1] + corner[2]) / 2])
        width = float(np.linalg.norm(corner[3] - corner[0]))
        if np.linalg.norm(ends[1] - ends[0]) < 12 or not 2.2 < width < 6:
            return None
        path = Polyline(ends)
        side = path.beside([path.length / 2] * 2, [width, -width])
        near = self.edge_distance(side)
        kerb_left = near[0] < near[1]
        return LaneAxis(path if kerb_left == self.left_hand else Polyline(ends[::-1]), width, corner.mean(axis=0))

    def across(self, point: Array, direction: Array, reach: float = 14.0) -> LineString | None:
        """Return the line through a point of the road from edge to edge, or None where the road is wider."""
        ray = LineString([point - reach * direction, point + reach * direction])
        for part in shapely.get_parts(ray.intersection(self.surface)):
            if part.geom_type == "LineString" and part.distance(shapely.points(point)) < 0.01:
                return part if part.length < 2 * reach - 2 else None
        return None


def _polygons(geometry: BaseGeometry) -> list[Polygon]:
    return [orient(p, 1.0) for p in shapely.get_parts(geometry) if p.geom_type == "Polygon" and not p.is_empty]


def _runs(polygon: Polygon) -> list[Run]:
    out = []
    for ring in (polygon.exterior, *polygon.interiors):
        hole = Polygon(ring)
        thin = ring is not polygon.exterior and hole.area / (hole.length / 2) < THIN_M
        points = shapely.get_coordinates(ring)
        path = Polyline(points)
        if path.length < 4:
            continue
        count = max(8, round(path.length / STEP))
        s = np.linspace(0, path.length, count, endpoint=False)
        chord = np.roll(path.at(s), -1, axis=0) - path.at(s)
        heading = np.arctan2(chord[:, 1], chord[:, 0])
        back = np.roll(heading, CORNER_SPAN // 2)
        turn = np.abs(np.angle(np.exp(1j * (np.roll(heading, -CORNER_SPAN // 2) - back))))
        corner = turn > CORNER_RAD
        change = np.flatnonzero(corner != np.roll(corner, 1))
        if not len(change):
            cuts = np.array([0.0, path.length])
        else:  # a ring may begin anywhere, its runs begin where a corner does
            points = np.concatenate([path.cut(s[change[0]], path.length), path.cut(0.0, s[change[0]])[1:]])
            path, corner = Polyline(points), np.roll(corner, -change[0])
            cuts = np.concatenate([(s[change] - s[change[0]]), [path.length]])
        for a, b in zip(cuts[:-1], cuts[1:], strict=True):
            parts = max(1, int(np.ceil((b - a) / LONGEST_RUN)))
            bent = bool(corner[min(int((a + b) / 2 / path.length * count), count - 1)])
            for p, q in zip(np.linspace(a, b, parts + 1)[:-1], np.linspace(a, b, parts + 1)[1:], strict=True):
                if q - p > 0.3:
                    out.append(Run(Polyline(path.cut(p, q)), not bent, thin, points[0]))
    return out
