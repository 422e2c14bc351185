"""Other road users around the ego car during one drive.

Vehicles drive on the lane graph where the map has one, else on lines parallel to the ego's drive; some go ahead
of the ego in its own lane; others are parked along kerbs or have stopped beside them; here and there works take
a part of the road; people walk beside the road and over crossings. Whatever would come too close to the ego at any
moment of the drive is left out of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from shapely.geometry import LineString
from shapely.geometry.base import BaseGeometry

from nmp_train.sim.boxes import EGO_LENGTH_M, EGO_WIDTH_M, Boxes, ego_middle, rectangles_touch
from nmp_train.sim.city import style_of
from nmp_train.sim.drive import REAR_TO_FRONT_M, Trajectory
from nmp_train.sim.flow import simulate
from nmp_train.sim.lanes import RoadNetwork, roads_of
from nmp_train.sim.paths import Path
from nmp_train.sim.scenery import Kerb, kerb_lines, rectangles
from nmp_train.sim.tracks import ego_path, graph_tracks, parallel_tracks
from nmp_train.sim.vehicles import NUMBER, Fleet, build, draw, draw_people, draw_vehicles

Array = NDArray[np.float64]
STEP_S = 0.2
REACH_M = 70.0
"""road users are placed up to this far from the ego's way, m"""


@dataclass(frozen=True)
class Habits:
    """How people park and stop in a city."""

    row_m: float
    """mean length of a row of parked cars, m"""
    pause_m: float
    """mean gap between rows, m"""
    on_lane: float
    """chance that a row stands on the outer one of two or more lanes"""
    on_only_lane: float
    """the same where there is one lane"""
    stopping: float
    """vehicles stopped in a lane, per 100 m of kerb"""
    works: float
    """road works per 100 m of kerb"""


_HABITS = {
    "boston-seaport": Habits(70.0, 6.0, 0.50, 0.15, 0.35, 0.10),
    "singapore-onenorth": Habits(40.0, 10.0, 0.22, 0.08, 0.30, 0.10),
    "singapore-hollandvillage": Habits(60.0, 7.0, 0.30, 0.14, 0.28, 0.06),
    "singapore-queenstown": Habits(45.0, 10.0, 0.22, 0.08, 0.28, 0.08),
}


def _habits(location: str) -> Habits:
    """Return the habits of a location; unknown names get those of Boston."""
    return _HABITS.get(location, _HABITS["boston-seaport"])


@dataclass(frozen=True)
class _Standing:
    """Those that stand for the whole drive: a fleet, poses [A, 3], and whether each blocks a lane [A]."""

    fleet: Fleet
    pose: Array
    blocks: NDArray[np.bool_]

    def pick(self, keep: NDArray[np.bool_]) -> _Standing:
        index = np.flatnonzero(keep)
        return _Standing(self.fleet.pick(index), self.pose[index], self.blocks[index])

    @staticmethod
    def joined(parts: list[_Standing]) -> _Standing:
        return _Standing(
            Fleet.joined([p.fleet for p in parts]),
            np.concatenate([np.zeros((0, 3)), *(p.pose for p in parts)]),
            np.concatenate([np.zeros(0, bool), *(p.blocks for p in parts)]),
        )


@dataclass(frozen=True)
class RoadUsers:
    """The road users at one moment, one row each."""

    fleet: Fleet
    xyyaw: Array
    """[A, 3] middle (m) and heading (rad), map frame"""
    velocity: Array
    """[A, 2] m/s"""
    instance: NDArray[np.int64]
    """[A]"""
    parked: NDArray[np.bool_]
    """[A] stands still for the whole drive at the kerb"""


@dataclass(frozen=True)
class Traffic:
    """All road users of one drive; ask for a moment with :meth:`at`."""

    times_s: Array
    """[F] s, the time base of the trajectory"""
    fleet: Fleet
    motion: Array
    """[F, A, 3] x, y (m), yaw (rad, without jumps) of the middles"""
    shown: NDArray[np.bool_]
    """[F, A]"""
    parked: NDArray[np.bool_]
    """[A]"""

    def users_at(self, t_s: float) -> RoadUsers:
        """Return the road users at a time (s, time base of the trajectory)."""
        here, pose, velocity = self._moment(t_s)
        return RoadUsers(self.fleet.pick(here), pose, velocity, here, self.parked[here])

    def at(self, t_s: float) -> Boxes:
        """Return the boxes of all road users at a time (s, time base of the trajectory)."""
        here, pose, velocity = self._moment(t_s)
        return build(self.fleet.pick(here), pose, velocity, here)

    def _moment(self, t_s: float) -> tuple[NDArray[np.int64], Array, Array]:
        """Return (who is there [V], poses [V, 3], velocities [V, 2])."""
        x = float(np.clip((t_s - self.times_s[0]) / (self.times_s[1] - self.times_s[0]), 0, len(self.times_s) - 1))
        low = min(int(x), len(self.times_s) - 2)
        step = self.motion[low + 1] - self.motion[low]
        here = np.flatnonzero(self.shown[low] & self.shown[low + 1])
        pose = (self.motion[low] + (x - low) * step)[here]
        return here, pose, step[here, :2] / (self.times_s[1] - self.times_s[0])


def make_traffic(
    city: dict[str, Any],
    trajectory: Trajectory,
    seed: int,
    density: float = 1.0,
    *,
    clear_ahead_m: float = 2.0,
    clear_beside_m: float = 0.7,
) -> Traffic:
    """Return road users for a drive; ``density`` 1 gives about as many as in nuScenes, 0 none.

    Nothing comes within ``clear_ahead_m`` of the ego's bumpers or ``clear_beside_m`` of its sides.
    """
    rng = np.random.default_rng([seed, 23])
    roads = roads_of(city)
    count = max(3, int(np.ceil(trajectory.duration_s / STEP_S)) + 1)
    times = trajectory.times_s[0] + np.arange(count) * STEP_S
    ego = trajectory.at(times)
    ego[:, 2] = np.unwrap(ego[:, 2])
    if density <= 0:
        none = np.zeros((count, 0, 3))
        return Traffic(times, draw_people(rng, 0), none, np.zeros((count, 0), bool), np.zeros(0, bool))
    way, travelled = ego_path(roads, ego, 60.0)
    line = LineString(way.points)
    place = trajectory.location
    surface = roads.surface(line.buffer(REACH_M))
    kerbs = list(kerb_lines(surface))
    near = line.buffer(REACH_M - 10)
    standing = _Standing.joined(
        [
            _works(rng, kerbs, near, density, place),
            _stopped(rng, kerbs, near, density, place),
            _parked(rng, roads, kerbs, near, density, place),
        ]
    )
    standing = standing.pick(
        _on_road(roads, standing, surface) & _clear_of_way(standing, ego, clear_ahead_m, clear_beside_m)
    )
    leaders = _leaders(rng, way, travelled, density, place)
    tracks = graph_tracks(roads, line, REACH_M) or parallel_tracks(roads, way, style_of(place).drives_left)
    in_lanes = standing.pick(standing.blocks)
    scripted = Fleet.joined([leaders[0], in_lanes.fleet]), np.concatenate([leaders[1], _still(in_lanes.pose, count)], 1)
    flow = simulate(rng, roads, tracks, ego, STEP_S, density, scripted, place)
    people, walk = _people(rng, roads, kerb_lines(surface, 1.5), line, times - times[0], density)
    lead_shown = leaders[1][..., 2] < 1e8
    fleet = Fleet.joined([leaders[0], standing.fleet, flow.fleet, people])
    motion = np.concatenate([leaders[1], _still(standing.pose, count), flow.motion, walk], axis=1)
    always = np.ones((count, len(standing.pose)), bool), np.ones((count, len(people)), bool)
    shown = np.concatenate([lead_shown, always[0], flow.shown, always[1]], axis=1)
    first, flowing = len(leaders[0]), len(leaders[0]) + len(standing.fleet)
    still = np.zeros(len(fleet), bool)
    still[first:flowing] = True
    head = np.full(len(fleet), -1)
    head[flowing : flowing + len(flow.head)] = np.where(flow.head < 0, -1, flow.head + flowing)
    keep = _keep_clear(fleet, motion, shown, ego, clear_ahead_m, clear_beside_m)
    _part_together(keep, head)
    keep &= _keep_apart(fleet, motion, shown & keep, still, head)
    _part_together(keep, head)
    index = np.flatnonzero(keep)
    return Traffic(times, fleet.pick(index), motion[:, index], shown[:, index], still[index])


def _still(pose: Array, frames: int) -> Array:
    return np.broadcast_to(pose, (frames, *pose.shape))


def _part_together(keep: NDArray[np.bool_], head: NDArray[np.int64]) -> None:
    """Leave out both parts of an articulated vehicle when one of them is left out."""
    tails = np.flatnonzero(head >= 0)
    both = keep[tails] & keep[head[tails]]
    keep[tails] = keep[head[tails]] = both


def _leaders(rng: np.random.Generator, way: Path, travelled: Array, density: float, place: str) -> tuple[Fleet, Array]:
    """Vehicles ahead of the ego in its own lane: they drive its way, a few seconds earlier."""
    count = 0
    if rng.random() < 0.75 * min(density, 1.3):
        count = int(rng.integers(1, 5))
    fleet = draw_vehicles(rng, count, "moving", place, alone=True)
    speed = np.gradient(travelled, STEP_S)
    gap = np.full(len(travelled), REAR_TO_FRONT_M)
    motion = np.zeros((len(travelled), count, 3))
    for k in range(count):
        headway = float(rng.uniform(0.8, 2.6))
        spare = gaussian_filter1d(np.maximum(speed, 0) * headway, 1.2 / STEP_S, mode="nearest")
        gap = gap + float(rng.uniform(2.4, 6)) + fleet.size[k, 0] / 2 + spare
        motion[:, k] = way.at(travelled + gap)
        # Beyond the end of the known way there is nothing to drive on.
        motion[travelled + gap > way.length, k, 2] = 1e9
        gap = gap + fleet.size[k, 0] / 2
    return fleet, motion


def _near(kerb: Kerb, s: Array, near: BaseGeometry) -> NDArray[np.bool_]:
    return np.asarray(shapely.intersects(near, shapely.points(kerb.at(s))), dtype=bool)


def _parked(
    rng: np.random.Generator, roads: RoadNetwork, kerbs: list[Kerb], near: BaseGeometry, density: float, place: str
) -> _Standing:
    """Vehicles along the kerbs, in rows with gaps between them; on lanes as the habits of the city have it."""
    habits = _habits(place)
    fleets, poses, rows = [Fleet.joined([])], [np.zeros((0, 3))], [np.zeros(0, np.int64)]
    count = 0
    shapely.prepare(near)
    for kerb in kerbs:
        most = int(kerb.length / 3.5) + 1
        cars = draw_vehicles(rng, most, "parked", place)
        length, width = cars.size[:, 0], cars.size[:, 1]
        step = length + rng.uniform(0.6, 1.8, most)
        # A new row begins after about row_m metres.
        begins = rng.random(most) < step / habits.row_m
        pause = np.where(begins, rng.exponential(habits.pause_m / max(density, 0.05), most), 0.0)
        start = np.cumsum(step + pause) - step + float(rng.uniform(0, 10))
        s, row = start + length / 2, count + np.cumsum(begins)
        count += most
        flip, skew, gap = rng.random(most) < 0.5, rng.normal(0, 0.02, most), rng.uniform(0.2, 0.45, most)
        there = (s < kerb.length - 3) & (rng.random(most) < 0.92)
        there &= _near(kerb, np.minimum(s, kerb.length), near)
        index = np.flatnonzero(there)
        at, heading = kerb.poses_beside(s[index], gap[index] + width[index] / 2, length[index])
        fleets.append(cars.pick(index))
        poses.append(np.column_stack([at, heading + np.where(flip[index], np.pi, 0.0) + skew[index]]))
        rows.append(row[index])
    fleet, pose, at_row = Fleet.joined(fleets), np.concatenate(poses), np.concatenate(rows)
    if not len(fleet):
        return _Standing(fleet, pose, np.zeros(0, bool))
    shapes = rectangles(pose[:, :2], pose[:, 2], fleet.size[:, :2])
    lot = rng.random(count + 1)[at_row]
    blocks = np.zeros(len(fleet), bool)
    if roads.graph.lanes:
        lanes = roads.graph.near(near)
        if lanes:
            lines = shapely.STRtree([roads.graph.lanes[i].line for i in lanes])
            found, distance = lines.query_nearest(shapes, return_distance=True, all_matches=False)
            closest = np.array([bool(roads.graph.lanes[lanes[i]].beside) for i in found[1]])
            turning = np.array([roads.graph.lanes[lanes[i]].connector for i in found[1]])
            blocks = distance < 1.15
            allowed = np.where(closest, habits.on_lane, np.where(turning, 0.0, habits.on_only_lane))
            keep = ~blocks | (lot < allowed)
        else:
            keep = np.ones(len(fleet), bool)
    else:
        lanes_here = shapely.union_all(roads.map.lanes.near(near))
        share = shapely.area(shapely.intersection(lanes_here, shapes)) / shapely.area(shapes)
        # Off the lanes is a bay; on a lane, only some kerbs are parked on.
        blocks = share >= 0.3
        keep = ~blocks | (lot < 0.2)
    return _Standing(fleet, pose, blocks).pick(keep)


def _stopped(rng: np.random.Generator, kerbs: list[Kerb], near: BaseGeometry, density: float, place: str) -> _Standing:
    """Vans that deliver, taxis and buses: they stand in a lane beside the kerb, or beside the parked cars."""
    habits = _habits(place)
    shapely.prepare(near)
    parts = []
    for kerb in kerbs:
        count = int(rng.poisson(kerb.length / 100 * habits.stopping * density))
        fleet = draw_vehicles(rng, count, "stopping", place)
        s = rng.uniform(5, max(kerb.length - 5, 6), count)
        out = np.where(rng.random(count) < 0.5, 0.4, 2.6) + rng.uniform(0, 0.3, count)
        index = np.flatnonzero(_near(kerb, s, near))
        at, heading = kerb.poses_beside(s[index], (out + fleet.size[:, 1] / 2)[index], fleet.size[index, 0])
        # The road lies to the left of a kerb line: where one drives on the left, that is against the line.
        along = heading + (np.pi if style_of(place).drives_left else 0.0)
        parts.append(_Standing(fleet.pick(index), np.column_stack([at, along]), np.ones(len(index), bool)))
    return _Standing.joined(parts)


def _works(rng: np.random.Generator, kerbs: list[Kerb], near: BaseGeometry, density: float, place: str) -> _Standing:
    """Works that take a part of the road beside a kerb: a row of cones out, barriers along, and cones back."""
    habits = _habits(place)
    shapely.prepare(near)
    parts = []
    for kerb in kerbs:
        for _ in range(int(rng.poisson(kerb.length / 100 * habits.works * min(density, 1.5)))):
            begin, depth = float(rng.uniform(0, kerb.length)), float(rng.uniform(0.8, 3.0))
            length, taper = float(rng.uniform(8, 22)), 3.0 + 2 * depth
            if begin + length + 2 * taper > kerb.length or not _near(kerb, np.array([begin]), near)[0]:
                continue
            slope = np.arange(1.5, taper, 2.2)
            if rng.random() < 0.5:
                along, name = np.arange(1.0, length, 2.15), "barrier"
            else:
                along, name = np.arange(1.0, length, 3.2), "cone"
            s = np.concatenate([slope, taper + along, 2 * taper + length - slope[::-1]])
            out = np.concatenate([slope / taper * depth, np.full(len(along), depth), slope[::-1] / taper * depth])
            number = np.full(len(s), NUMBER["cone"])
            number[len(slope) : len(slope) + len(along)] = NUMBER[name]
            middle = begin + taper + length / 2
            if depth > 1.6:
                extra = "excavator" if depth > 2.6 and rng.random() < 0.6 else "works board"
                number = np.append(number, NUMBER[extra])
                s = np.append(s, middle - begin if extra == "excavator" else taper * 0.6)
                out = np.append(out, depth - 1.6 if extra == "excavator" else 0.3)
            fleet = draw(rng, number.astype(np.int64))
            # One site has barriers of one colour.
            fleet.rgb[number == NUMBER["barrier"]] = fleet.rgb[len(slope)]
            at, heading = kerb.poses_beside(begin + s, 0.25 + out, 2.0)
            parts.append(_Standing(fleet, np.column_stack([at, heading]), np.full(len(s), depth > 1.2)))
    return _Standing.joined(parts)


def _on_road(roads: RoadNetwork, standing: _Standing, surface: BaseGeometry) -> NDArray[np.bool_]:
    """Whether each stands on the road and on no crossing."""
    shapes = rectangles(standing.pose[:, :2], standing.pose[:, 2], standing.fleet.size[:, :2])
    road = surface.buffer(0.25)
    shapely.prepare(road)
    zebras = shapely.union_all([c.buffer(1.0) for c in roads.map.crossings.near(surface)])
    shapely.prepare(zebras)
    return np.asarray(shapely.contains(road, shapes) & ~shapely.intersects(zebras, shapes), dtype=bool)


def _clear_of_way(standing: _Standing, ego: Array, ahead: float, aside: float) -> NDArray[np.bool_]:
    box = np.array([EGO_LENGTH_M + 2 * ahead, EGO_WIDTH_M + 2 * aside])
    touch = rectangles_touch(ego_middle(ego)[:, None], box, standing.pose[None], standing.fleet.size[None, :, :2])
    return np.asarray(~touch.any(axis=0))


def _people(
    rng: np.random.Generator, roads: RoadNetwork, kerbs: Iterator[Kerb], way: LineString, times: Array, density: float
) -> tuple[Fleet, Array]:
    """Pedestrians who stand or walk along the kerbs, some in company, and some who cross the road on a crossing."""
    near = way.buffer(40)
    shapely.prepare(near)
    tracks = []
    for kerb in kerbs:
        for _ in range(int(rng.poisson(kerb.length / 45 * density))):
            s0, out = float(rng.uniform(0, kerb.length)), -float(rng.uniform(0.5, 3.2))
            pace = 0.0 if rng.random() < 0.35 else float(rng.normal(0, 1) > 0) * 2 - 1
            pace *= float(rng.uniform(0.8, 1.6))
            group = int(rng.choice([1, 2, 3], p=[0.75, 0.2, 0.05]))
            if not near.intersects(shapely.points(kerb.at(np.array(s0)))):
                continue
            for k in range(group):
                at, heading = kerb.poses_beside(np.mod(s0 + 0.3 * k + pace * times, kerb.length), out - 0.7 * k, 4.0)
                at = gaussian_filter1d(at, 3.0, axis=0, mode="nearest")
                turned = np.unwrap(heading) + (np.pi if pace < 0 else 0.0)
                tracks.append(np.column_stack([at, gaussian_filter1d(turned, 3.0, mode="nearest")]))
    for crossing in roads.map.crossings.near(near):
        for _ in range(int(rng.poisson(0.5 * density))):
            tracks.append(_walk_over(rng, crossing, times))
    if not tracks:
        return draw_people(rng, 0), np.zeros((len(times), 0, 3))
    return draw_people(rng, len(tracks)), np.stack(tracks, axis=1)


def _walk_over(rng: np.random.Generator, crossing: BaseGeometry, times: Array) -> Array:
    """Walk from one end of a crossing to the other at some moment of the drive; wait before and after: [F, 3]."""
    corners = shapely.get_coordinates(crossing.minimum_rotated_rectangle)[:4]
    edges = np.roll(corners, -1, axis=0) - corners
    # People cross along the longer edge.
    k = int(np.argmax(np.hypot(*edges[:2].T)))
    start, end = corners[k] + edges[k - 1] * -rng.uniform(0.2, 0.8), edges[k]
    if rng.random() < 0.5:
        start, end = start + end, -end
    length = float(np.hypot(*end))
    walked = np.clip((times - float(rng.uniform(-10, times[-1]))) * float(rng.uniform(1.0, 1.6)), -0.8, length + 0.8)
    at = start + walked[:, None] * end / max(length, 1e-6)
    return np.column_stack([at, np.full(len(times), np.arctan2(end[1], end[0]))])


def _keep_clear(
    fleet: Fleet, motion: Array, shown: NDArray[np.bool_], ego: Array, ahead: float, aside: float
) -> NDArray[np.bool_]:
    """Who keeps away from the ego's box the whole time."""
    box = np.array([EGO_LENGTH_M + 2 * ahead, EGO_WIDTH_M + 2 * aside])
    touch = rectangles_touch(ego_middle(ego)[:, None], box, motion, fleet.size[None, :, :2])
    return np.asarray(~(touch & shown).any(axis=0))


def _keep_apart(
    fleet: Fleet, motion: Array, shown: NDArray[np.bool_], still: NDArray[np.bool_], head: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Leave out the later of two road users that run through each other."""
    count = len(fleet)
    first, second = np.triu_indices(count, 1)
    reach = np.hypot(fleet.size[:, 0], fleet.size[:, 1]) / 2
    # The two parts of one vehicle hang together, and those that never move need one look.
    apart = head[second] != first
    moves = apart & ~(still[first] & still[second])
    keep = np.ones(count, bool)
    for f in range(0, len(motion), 2):
        choice = apart if f == 0 else moves
        i, j = first[choice], second[choice]
        near = (motion[f, i, :2] - motion[f, j, :2]) ** 2
        close = (near.sum(axis=1) < (reach[i] + reach[j]) ** 2) & shown[f, i] & shown[f, j]
        i, j = i[close], j[close]
        touch = rectangles_touch(motion[f, i], fleet.size[i, :2], motion[f, j], fleet.size[j, :2])
        for a, b in zip(i[touch].tolist(), j[touch].tolist(), strict=True):
            if keep[a] and keep[b]:
                keep[b] = False
    return keep
