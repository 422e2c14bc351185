"""The lane graph of a map-expansion dictionary: centre lines, successors, neighbours.

Read from ``arcline_path_3`` and ``connectivity``, which generated cities and the full published maps both have.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra
from scipy.spatial import cKDTree
from shapely import STRtree
from shapely.geometry import LineString, box
from shapely.geometry.base import BaseGeometry

from nmp.citymap import CityMap
from nmp.geometry import distances_along
from nmp_train.sim.polyline import resample

Array = NDArray[np.float64]

_SIGNS = {"L": 1.0, "S": 0.0, "R": -1.0}


@dataclass
class LaneLine:
    """The centre line of a lane or lane connector, in the direction of travel."""

    token: str
    points: Array
    """[N, 2] m, about every metre"""
    connector: bool
    outgoing: list[int] = field(default_factory=list)
    incoming: list[int] = field(default_factory=list)
    beside: list[int] = field(default_factory=list)
    """lanes of the same direction next to this one"""

    def __post_init__(self) -> None:
        self.line = LineString(self.points)
        self.length = float(self.line.length)


class LaneGraph:
    """All lanes of a city; ``alive`` lists those from which one can drive on for ever."""

    def __init__(self, city: dict[str, Any]) -> None:
        connectors = {r["token"] for r in city["lane_connector"]}
        self.lanes: list[LaneLine] = []
        index: dict[str, int] = {}
        for token, paths in city["arcline_path_3"].items():
            points = arcline_points(paths)
            if len(points) > 1:
                index[token] = len(self.lanes)
                self.lanes.append(LaneLine(token, points, token in connectors))
        for token, links in city["connectivity"].items():
            if token in index:
                self.lanes[index[token]].outgoing = [index[t] for t in links["outgoing"] if t in index]
                self.lanes[index[token]].incoming = [index[t] for t in links["incoming"] if t in index]
        self.tree = STRtree([lane.line for lane in self.lanes]) if self.lanes else None
        self._find_neighbours()
        alive = set(range(len(self.lanes)))
        while True:
            dead = {i for i in alive if not any(j in alive for j in self.lanes[i].outgoing)}
            if not dead:
                break
            alive -= dead
        self.alive: frozenset[int] = frozenset(alive)

    def near(self, region: BaseGeometry) -> list[int]:
        """Return the lanes that touch a region, in map order."""
        return [] if self.tree is None else sorted(int(i) for i in self.tree.query(region, predicate="intersects"))

    def _find_neighbours(self) -> None:
        if self.tree is None:
            return
        for i, lane in enumerate(self.lanes):
            if lane.connector or lane.length < 8:
                continue
            middle, heading = _middle(lane)
            for j in self.near(shapely.points(middle).buffer(4.2)):
                other = self.lanes[j]
                if j == i or other.connector:
                    continue
                s = other.line.project(shapely.points(middle))
                if not 1.0 < s < other.length - 1.0:
                    continue
                p, q = (shapely.get_coordinates(other.line.interpolate(s + ds))[0] for ds in (-0.5, 0.5))
                if 2.5 < np.linalg.norm((p + q) / 2 - middle) < 4.2 and (q - p) @ heading > 0.8:
                    lane.beside.append(j)

    def walk(self, rng: np.random.Generator, start: int, length: float) -> list[int]:
        """Return a random drive: a list of lanes of at least ``length`` metres after the first, if there is one."""
        out, total = [start], 0.0
        while total < length:
            choices = [j for j in self.lanes[out[-1]].outgoing if j in self.alive] or self.lanes[out[-1]].outgoing
            if not choices:
                break
            out.append(int(rng.choice(choices)))
            total += self.lanes[out[-1]].length
        return out

    def trace(self, rng: np.random.Generator, start: int, length: float, change: float) -> tuple[Array, list[float]]:
        """Return (points [N, 2], distances of the junction entries) of a random drive with lane changes.

        ``change`` is the chance of a lane change on a lane that is long enough for one.
        """
        parts: list[Array] = []
        entries: list[float] = []
        total, lane, skip = 0.0, start, 0.0
        while total < length:
            here = self.lanes[lane]
            points = here.points
            if skip > 0:
                points = points[distances_along(points) > skip]
                skip = 0.0
            beside = [j for j in here.beside if j in self.alive or lane not in self.alive]
            if beside and here.length > 42 and rng.random() < change:
                moved = self._change(rng, points, int(rng.choice(beside)))
                if moved is not None:
                    points, lane, skip = moved
                    parts.append(points)
                    total += float(np.hypot(*np.diff(points, axis=0).T).sum())
                    continue
            parts.append(points)
            total += float(np.hypot(*np.diff(points, axis=0).T).sum()) if len(points) > 1 else 0.0
            onward = [j for j in self.lanes[lane].outgoing if j in self.alive] or self.lanes[lane].outgoing
            if not onward:
                break
            if not here.connector and len(onward) > 1:
                entries.append(total)
            lane = int(rng.choice(onward))
        return np.concatenate(parts), entries

    def chain_along(self, points: Array, reach_m: float = 18.0) -> list[int] | None:
        """Return the lanes of a drive alongside a polyline [N, 2] (m), from its start to its end and in its direction.

        The drive keeps as close to the line as the lanes allow, and within ``reach_m`` of it. None where no chain
        of lanes leads there: a one-way street backwards, or a wide median.
        """
        points = resample(points, 1.0)
        tree, length = cKDTree(points), LineString(points).length
        near = self.near(box(*points.min(axis=0), *points.max(axis=0)).buffer(reach_m))
        cost: dict[int, float] = {}
        first, last = [], []
        for i in near:
            p = self.lanes[i].points
            away, nearest = tree.query(p)
            s = nearest * (length / (len(points) - 1))
            # Beyond the ends of the line a lane may go wherever it likes.
            beside = (s > 0.5) & (s < length - 0.5)
            if beside.sum() < 2 or away[beside].max() > reach_m:
                continue
            if s[-1] <= s[0] + 0.5 * np.hypot(*(p[-1] - p[0])) * beside.mean():
                continue
            cost[i] = float((1 + (away[beside] / 4) ** 2).sum())
            if s[0] < 6.0:
                first.append(i)
            if s[-1] > length - 6.0:
                last.append(i)
        if not first or not last:
            return None
        number = {i: k + 1 for k, i in enumerate(cost)}
        end = len(number) + 1
        links = [(0, number[i], cost[i]) for i in first] + [(number[i], end, 1e-3) for i in last]
        links += [(number[i], number[j], cost[j]) for i in cost for j in self.lanes[i].outgoing if j in cost]
        rows, columns, weights = (np.array(column) for column in zip(*links, strict=True))
        graph = csr_array((weights, (rows, columns)), shape=(end + 1, end + 1))
        _, before = dijkstra(graph, indices=0, return_predecessors=True)
        lanes, chain = list(cost), [int(before[end])]
        if chain[0] < 0:
            return None
        while before[chain[-1]] > 0:
            chain.append(int(before[chain[-1]]))
        return [lanes[k - 1] for k in reversed(chain)]

    def _change(self, rng: np.random.Generator, points: Array, to: int) -> tuple[Array, int, float] | None:
        """Swing from a lane to the one beside it: (points, lane, how far along that lane they end)."""
        other = self.lanes[to]
        span = float(rng.uniform(22, 34))
        if len(points) < span + 6:
            return None
        first = int(rng.integers(2, len(points) - int(span) - 2))
        last = first + int(span)
        s = np.array([other.line.project(p) for p in shapely.points(points[first : last + 1])])
        if s[0] < 1.0 or s[-1] > other.length - 2.0 or (np.diff(s) < 0.2).any():
            return None
        target = shapely.get_coordinates(other.line.interpolate(s))
        t = np.linspace(0, 1, len(s))[:, None]
        ease = t**3 * (10 - 15 * t + 6 * t**2)
        swing = (1 - ease) * points[first : last + 1] + ease * target
        return np.concatenate([points[:first], swing]), to, float(s[-1])


def _middle(lane: LaneLine) -> tuple[Array, Array]:
    p, q = (shapely.get_coordinates(lane.line.interpolate(lane.length / 2 + ds))[0] for ds in (-0.5, 0.5))
    return (p + q) / 2, (q - p) / np.linalg.norm(q - p)


def arcline_points(paths: list[dict[str, Any]], step: float = 1.0) -> Array:
    """Return the points [N, 2] of arc-line records, about ``step`` metres apart."""
    out: list[Array] = []
    for path in paths:
        x, y, yaw = path["start_pose"]
        for sign, length in zip(path["shape"], path["segment_length"], strict=True):
            if length <= 1e-6:
                continue
            bend = _SIGNS[sign] / path["radius"]
            s = np.linspace(0, length, max(2, int(np.ceil(length / step)) + 1))
            if abs(bend) < 1e-9:
                arc = np.stack([x + s * np.cos(yaw), y + s * np.sin(yaw)], axis=1)
            else:
                turned = yaw + s * bend
                arc = np.stack(
                    [x + (np.sin(turned) - np.sin(yaw)) / bend, y - (np.cos(turned) - np.cos(yaw)) / bend], 1
                )
            out.append(arc if not out else arc[1:])
            x, y, yaw = float(arc[-1, 0]), float(arc[-1, 1]), yaw + length * bend
    if not out:
        return np.zeros((0, 2))
    return resample(np.concatenate(out), step)


@dataclass(frozen=True)
class RoadNetwork:
    """The roads of a city dictionary, as shapes and as a graph of lanes (map frame, m)."""

    map: CityMap
    graph: LaneGraph

    def surface(self, region: BaseGeometry) -> BaseGeometry:
        """Return the road surface (road segments and lanes together) inside a region."""
        shapes = [g.intersection(region) for g in self.map.road_segments.near(region) + self.map.lanes.near(region)]
        return shapely.union_all(shapes).buffer(0.01)


_parsed: list[tuple[dict[str, Any], RoadNetwork]] = []


def roads_of(city: dict[str, Any]) -> RoadNetwork:
    """Return the roads of a map-expansion dictionary, which must not be altered afterwards.

    Those of the last few dictionaries are remembered, as reading them takes a moment.
    """
    for known, roads in _parsed:
        if known is city:
            return roads
    roads = RoadNetwork(CityMap.from_tables(city, str(city.get("location", ""))), LaneGraph(city))
    _parsed.append((city, roads))
    del _parsed[:-8]
    return roads
