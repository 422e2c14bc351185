"""Where other vehicles may drive around the ego car: lanes of the graph, or lines parallel to the ego's own drive."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry import LineString

from nmp.geometry import distances_along
from nmp_train.sim.lanes import RoadNetwork
from nmp_train.sim.paths import Path

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Track:
    """A line on which vehicles appear; ``lane`` is its place in the lane graph, -1 outside one."""

    points: Array
    lane: int
    junction: bool

    def path(self, roads: RoadNetwork, rng: np.random.Generator, start: float, length: float) -> Path:
        """Return a way to drive of about ``length`` metres that starts ``start`` metres along the track."""
        points = [self.points]
        if self.lane >= 0:
            points += [roads.graph.lanes[i].points for i in roads.graph.walk(rng, self.lane, length)[1:]]
        line = np.concatenate(points)
        s = distances_along(line)
        line = line[(s >= start) & (s <= start + length + 2)]
        return Path(line if len(line) > 3 else np.concatenate(points)[-4:])


def graph_tracks(roads: RoadNetwork, way: LineString, radius: float) -> list[Track]:
    """Return the lanes within ``radius`` m of the ego's way."""
    lanes = roads.graph.lanes
    return [Track(lanes[i].points, i, lanes[i].connector) for i in roads.graph.near(way.buffer(radius))]


def parallel_tracks(roads: RoadNetwork, ego: Path, drives_left: bool) -> list[Track]:
    """Return lines beside the ego's way that stay on the road: for maps without a lane graph.

    Lanes towards the kerb have the ego's direction; towards the middle of the road they have it as long as
    the map shows only lane dividers between.
    """
    near = LineString(ego.points).buffer(25)
    surface = roads.surface(near).buffer(-0.9)
    shapely.prepare(surface)
    same = shapely.union_all(roads.map.lane_dividers.near(near))
    kerb = 1 if drives_left else -1
    out = []
    for step in (1, 2, 3):
        for side in (kerb, -kerb):
            line = ego.shifted(side * 3.35 * step)
            between = ego.shifted(side * 3.35 * (step - 0.5))
            inside = shapely.contains(surface, shapely.points(line.points))
            for first, last in _runs(inside, 40):
                piece = line.points[first:last]
                middle = between.points[min(first + 10, len(between.points) - 1)]
                divided = not same.is_empty and same.distance(shapely.points(middle)) < 1.0
                ahead = side == kerb or divided
                out.append(Track(piece if ahead else piece[::-1], -1, False))
    return out


def _runs(mask: NDArray[np.bool_], least: int) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2) if b - a >= least]


def ego_path(roads: RoadNetwork, poses_xyyaw: Array, extra_m: float) -> tuple[Path, Array]:
    """Return (the ego's way, drawn out ahead by up to ``extra_m``, distance along it [F] at every pose)."""
    xy = poses_xyyaw[:, :2]
    steps = np.hypot(*np.diff(xy, axis=0).T)
    moving = np.concatenate([[True], steps > 0.02])
    heading = poses_xyyaw[-1, 2]
    reach = _room_ahead(roads, xy[-1], heading, extra_m)
    tail = xy[-1] + np.outer(np.arange(1.0, max(reach, 3.0)), [np.cos(heading), np.sin(heading)])
    path = Path(np.concatenate([xy[moving], tail]), smooth_m=0.5)
    travelled = np.concatenate([[0.0], np.cumsum(np.where(moving[1:], steps, 0.0))])
    return path, travelled


def _room_ahead(roads: RoadNetwork, xy: Array, heading: float, limit: float) -> float:
    """Distance straight ahead to the edge of the road, m."""
    line = LineString([xy, xy + limit * np.array([np.cos(heading), np.sin(heading)])])
    inside = roads.surface(line.buffer(3)).intersection(line)
    first = min(shapely.get_parts(inside), key=lambda g: g.distance(shapely.points(xy)), default=line)
    return float(first.length)
