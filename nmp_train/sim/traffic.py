"""Other road users around the ego car during one drive.

Vehicles drive on the lane graph where the map has one, else on lines parallel to the ego's drive; some go ahead
of the ego in its own lane; others are parked along kerbs; people walk beside the road. Whatever would come
too close to the ego at any moment of the drive is left out of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from shapely.geometry import LineString
from shapely.geometry.base import BaseGeometry

from nmp_train.sim.boxes import EGO_LENGTH_M, EGO_WIDTH_M, Boxes, ego_middle, nearest, rectangles_touch
from nmp_train.sim.city import style_of
from nmp_train.sim.drive import REAR_TO_FRONT_M, Trajectory
from nmp_train.sim.flow import simulate
from nmp_train.sim.lanes import World, world_of
from nmp_train.sim.paths import Path
from nmp_train.sim.scenery import kerb_lines, make_scenery, rectangles
from nmp_train.sim.tracks import ego_path, graph_tracks, parallel_tracks
from nmp_train.sim.vehicles import Fleet, build, draw_people, draw_vehicles

__all__ = ["Boxes", "RoadUsers", "Traffic", "make_scenery", "make_traffic", "nearest"]

Array = NDArray[np.float64]
STEP_S = 0.2
REACH_M = 70.0
"""road users are placed up to this far from the ego's way, m"""


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
        x = float(np.clip((t_s - self.times_s[0]) / (self.times_s[1] - self.times_s[0]), 0, len(self.times_s) - 1))
        low = min(int(x), len(self.times_s) - 2)
        step = self.motion[low + 1] - self.motion[low]
        here = np.flatnonzero(self.shown[low] & self.shown[low + 1])
        pose = (self.motion[low] + (x - low) * step)[here]
        velocity = step[here, :2] / (self.times_s[1] - self.times_s[0])
        return RoadUsers(self.fleet.pick(here), pose, velocity, here, self.parked[here])

    def at(self, t_s: float) -> Boxes:
        """Return the boxes of all road users at a time (s, time base of the trajectory)."""
        users = self.users_at(t_s)
        return build(users.fleet, users.xyyaw, users.velocity, users.instance)


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
    world = world_of(city)
    count = max(3, int(np.ceil(trajectory.duration_s / STEP_S)) + 1)
    times = trajectory.times_s[0] + np.arange(count) * STEP_S
    ego = trajectory.at(times)
    ego[:, 2] = np.unwrap(ego[:, 2])
    if density <= 0:
        none = np.zeros((count, 0, 3))
        return Traffic(times, draw_people(rng, 0), none, np.zeros((count, 0), bool), np.zeros(0, bool))
    way, travelled = ego_path(world, ego, 60.0)
    line = LineString(way.points)
    drives_left = style_of(trajectory.location).drives_left
    leaders = _leaders(rng, way, travelled, density)
    tracks = graph_tracks(world, line, REACH_M) or parallel_tracks(world, way, drives_left)
    flow = simulate(rng, world, tracks, ego, STEP_S, density, leaders)
    surface = world.surface(line.buffer(REACH_M))
    cars, car_pose = _parked(rng, world, surface, line, density)
    people, walk = _people(rng, surface, line, times - times[0], density)

    def still(pose: Array) -> Array:
        return np.broadcast_to(pose, (count, *pose.shape))

    lead_shown = np.ones(leaders[1].shape[:2], bool) & (leaders[1][..., 2] < 1e8)
    fleet = Fleet.joined([leaders[0], flow.fleet, cars, people])
    motion = np.concatenate([leaders[1], flow.motion, still(car_pose), walk], axis=1)
    shown = np.concatenate([lead_shown, flow.shown, np.ones((count, len(cars) + len(people)), bool)], axis=1)
    parked = np.zeros(len(fleet), bool)
    first = len(leaders[0]) + len(flow.fleet)
    parked[first : first + len(cars)] = True
    keep = _keep_clear(fleet, motion, shown, ego, clear_ahead_m, clear_beside_m)
    keep &= _keep_apart(fleet, motion, shown & keep)
    index = np.flatnonzero(keep)
    return Traffic(times, fleet.pick(index), motion[:, index], shown[:, index], parked[index])


def _leaders(rng: np.random.Generator, way: Path, travelled: Array, density: float) -> tuple[Fleet, Array]:
    """Vehicles ahead of the ego in its own lane: they drive its way, a few seconds earlier."""
    count = 0
    if rng.random() < 0.75 * min(density, 1.3):
        count = int(rng.integers(1, 5))
    fleet = draw_vehicles(rng, count)
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


def _parked(
    rng: np.random.Generator, world: World, surface: BaseGeometry, way: LineString, density: float
) -> tuple[Fleet, Array]:
    """Cars along the kerbs, in runs with gaps between them."""
    near = way.buffer(REACH_M - 10)
    spots: list[Array] = []
    runs: list[int] = []
    fleets: list[Fleet] = []
    run = 0
    for kerb in kerb_lines(surface):
        s = float(rng.uniform(0, 10))
        while s < kerb.length - 5:
            run += 1
            stop = min(s + float(rng.uniform(12, 70)), kerb.length - 5)
            while s < stop:
                car = draw_vehicles(rng, 1, parked=True)
                length, width = car.size[0, :2]
                where = np.array([s + length / 2])
                if rng.random() < 0.85:
                    at, heading = kerb.beside(where, 0.25 + float(rng.uniform(0, 0.25)) + width / 2, length)
                    if rng.random() < 0.5:
                        heading = heading + np.pi
                    spots.append(np.array([*at[0], heading[0] + rng.normal(0, 0.02)]))
                    fleets.append(car)
                    runs.append(run)
                s += length + float(rng.uniform(0.7, 2.2))
            s += float(rng.exponential(6.0 / max(density, 0.05)))
    if not spots:
        return draw_vehicles(rng, 0), np.zeros((0, 3))
    fleet, pose = Fleet.joined(fleets), np.array(spots)
    shapes = rectangles(pose[:, :2], pose[:, 2], fleet.size[:, :2])
    road = surface.buffer(0.25)
    shapely.prepare(road)
    keep = shapely.contains(road, shapes) & shapely.intersects(near, shapes)
    zebras = shapely.union_all([c.buffer(1.0) for c in world.map.crossings.near(near)])
    keep &= ~shapely.intersects(zebras, shapes)
    if world.graph.lanes:
        lines = shapely.union_all([world.graph.lanes[i].line for i in world.graph.near(near)])
        keep &= shapely.distance(lines, shapes) > 1.15
    else:
        lanes = shapely.union_all(world.map.lanes.near(near))
        share = np.zeros(len(shapes))
        share[keep] = shapely.area(shapely.intersection(lanes, shapes[keep])) / shapely.area(shapes[keep])
        # Off the lanes is a bay; on a lane, only some kerbs are parked on.
        tolerant = rng.random(run + 1) < 0.2
        keep &= (share < 0.3) | tolerant[np.array(runs)]
    index = np.flatnonzero(keep)
    return fleet.pick(index), pose[index]


def _people(
    rng: np.random.Generator, surface: BaseGeometry, way: LineString, times: Array, density: float
) -> tuple[Fleet, Array]:
    """Pedestrians who stand or walk along the kerbs."""
    near = way.buffer(40)
    shapely.prepare(near)
    tracks = []
    for kerb in kerb_lines(surface, 1.5):
        for _ in range(int(rng.poisson(kerb.length / 35 * density))):
            s0, out = float(rng.uniform(0, kerb.length)), -float(rng.uniform(0.5, 3.2))
            pace = 0.0 if rng.random() < 0.35 else float(rng.normal(0, 1) > 0) * 2 - 1
            pace *= float(rng.uniform(0.8, 1.6))
            if near.intersects(shapely.points(kerb.at(np.array(s0)))):
                at, heading = kerb.beside(np.mod(s0 + pace * times, kerb.length), out, 4.0)
                at = gaussian_filter1d(at, 3.0, axis=0, mode="nearest")
                turned = np.unwrap(heading) + (np.pi if pace < 0 else 0.0)
                tracks.append(np.column_stack([at, gaussian_filter1d(turned, 3.0, mode="nearest")]))
    if not tracks:
        return draw_people(rng, 0), np.zeros((len(times), 0, 3))
    return draw_people(rng, len(tracks)), np.stack(tracks, axis=1)


def _keep_clear(
    fleet: Fleet, motion: Array, shown: NDArray[np.bool_], ego: Array, ahead: float, aside: float
) -> NDArray[np.bool_]:
    """Who keeps away from the ego's box the whole time."""
    box = np.array([EGO_LENGTH_M + 2 * ahead, EGO_WIDTH_M + 2 * aside])
    touch = rectangles_touch(ego_middle(ego)[:, None], box, motion, fleet.size[None, :, :2])
    return np.asarray(~(touch & shown).any(axis=0))


def _keep_apart(fleet: Fleet, motion: Array, shown: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Leave out the later of two road users that run through each other."""
    count = len(fleet)
    first, second = np.triu_indices(count, 1)
    reach = fleet.size[:, 0] / 2
    keep = np.ones(count, bool)
    for f in range(0, len(motion), 2):
        gap = np.hypot(*(motion[f, first, :2] - motion[f, second, :2]).T)
        close = (gap < reach[first] + reach[second]) & shown[f, first] & shown[f, second]
        i, j = first[close], second[close]
        touch = rectangles_touch(motion[f, i], fleet.size[i, :2], motion[f, j], fleet.size[j, :2])
        for a, b in zip(i[touch].tolist(), j[touch].tolist(), strict=True):
            if keep[a] and keep[b]:
                keep[b] = False
    return keep
