"""Vehicles that follow lanes, keep their distance, and give way to the ego car."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nmp_train.sim.boxes import EGO_LENGTH_M, EGO_WIDTH_M, ego_middle
from nmp_train.sim.lanes import World
from nmp_train.sim.paths import Path
from nmp_train.sim.tracks import Track
from nmp_train.sim.vehicles import Fleet, draw_vehicles

Array = NDArray[np.float64]
SPACING_M = 0.5
LOOK_M = np.arange(1.5, 28.0, 2.0)
"""distances ahead of the front bumper at which a driver looks for something in the way, m"""
BRAKE = 2.5
FAR_M = 95.0
"""vehicles farther than this from the ego are dropped, m"""


@dataclass
class Flow:
    """The vehicles on the road during one drive: motion [F, A, 3] (x, y, yaw of the middle), shown [F, A]."""

    fleet: Fleet
    motion: Array
    shown: NDArray[np.bool_]


@dataclass
class _Drivers:
    way: list[Array] = field(default_factory=list)
    """[N, 3] x, y, yaw every SPACING_M"""
    pace: list[Array] = field(default_factory=list)
    """[N] speed that the bends allow, m/s"""
    s: list[float] = field(default_factory=list)
    v: list[float] = field(default_factory=list)
    wish: list[float] = field(default_factory=list)
    since: list[int] = field(default_factory=list)


def simulate(
    rng: np.random.Generator,
    world: World,
    tracks: list[Track],
    ego: Array,
    dt: float,
    density: float,
    scripted: tuple[Fleet, Array],
) -> Flow:
    """Let vehicles drive on the tracks around the ego poses [F, 3], which are ``dt`` seconds apart.

    ``scripted`` are vehicles (motion [F, L, 3]) that the others see but that do not react.
    """
    frames = len(ego)
    drivers, fleets = _Drivers(), []
    starts = _starts(rng, tracks, ego, density)
    leaders, lead_motion = scripted
    states: list[Array] = []
    middle = ego_middle(ego)
    for f in range(frames):
        if f % max(1, int(2.0 / dt)) == 0:
            _appear(rng, world, tracks, starts, drivers, fleets, ego, f, lead_motion[f], (frames - f) * dt)
        state = _poses(drivers)
        states.append(state)
        if len(state):
            _advance(drivers, Fleet.joined(fleets), state, leaders, lead_motion[f], middle[f:], dt)
    count = len(drivers.s)
    motion = np.zeros((frames, count, 3))
    shown = np.zeros((frames, count), bool)
    for f, state in enumerate(states):
        motion[f, : len(state)] = state
        shown[f, : len(state)] = True
    for a in range(count):
        motion[: drivers.since[a], a] = motion[drivers.since[a], a]
    if count:
        away = np.hypot(*(motion[..., :2] - ego[:, None, :2]).transpose(2, 0, 1))
        ends = np.array([SPACING_M * (len(w) - 1) for w in drivers.way])
        travelled = np.concatenate([np.zeros((1, count)), np.cumsum(np.hypot(*np.diff(motion[..., :2], axis=0).transpose(2, 0, 1)), 0)])
        shown &= (away < FAR_M) & (travelled < ends - 1.0)
    return Flow(Fleet.joined(fleets), motion, shown)


def _starts(rng: np.random.Generator, tracks: list[Track], ego: Array, density: float) -> list[tuple[int, float, float, float]]:
    """Places where vehicles may appear: (track, distance along it, speed, wished speed), in random order."""
    out = []
    for k, track in enumerate(tracks):
        length = float(np.hypot(*np.diff(track.points, axis=0).T).sum())
        if track.junction or length < 6:
            continue
        mood = rng.random()
        if mood < 0.3:  # a queue before the junction
            s, wish = length - float(rng.uniform(3, 5)), 0.0
            for _ in range(int(rng.integers(1, 6))):
                out.append((k, s, 0.0, wish if rng.random() < 0.8 else 6.0))
                s -= float(rng.uniform(6.2, 8.5)) / min(density, 1.3)
            free = s - 15
        else:
            free = length - 3
        gap = (16.0 if mood < 0.6 else 32.0) / max(density, 0.05)
        speed = float(rng.uniform(1, 5) if mood < 0.6 else rng.uniform(5, 11))
        s = float(rng.uniform(0, gap))
        while s < free:
            out.append((k, s, speed, speed * float(rng.uniform(0.9, 1.5))))
            s += 7.0 + float(rng.exponential(gap))
    out = [start for start in out if start[1] > 0.5]
    return [out[i] for i in rng.permutation(len(out))]


def _appear(
    rng: np.random.Generator,
    world: World,
    tracks: list[Track],
    starts: list[tuple[int, float, float, float]],
    drivers: _Drivers,
    fleets: list[Fleet],
    ego: Array,
    frame: int,
    leaders: Array,
    seconds: float,
) -> None:
    here = ego[frame, :2]
    others = np.concatenate([_poses(drivers)[:, :2], leaders[:, :2], here[None]])
    ahead = ego[frame:, :2]
    for start in list(starts):
        k, s, speed, wish = start
        track = tracks[k]
        at = track.points[min(int(s), len(track.points) - 1)]
        distance = float(np.hypot(*(at - here)))
        if distance > 75 or (frame > 0 and distance < 55):
            continue
        starts.remove(start)
        if np.hypot(*(others - at).T).min() < 6.5 or np.hypot(*(ahead - at).T).min() < 3.0:
            continue
        path = track.path(world, rng, s, seconds * max(wish, 2.0) * 1.2 + 30)
        if path.length < 4:
            continue
        grid = np.arange(0, path.length, SPACING_M)
        bend = np.abs(np.interp(grid, path.s, path.curvature))
        drivers.way.append(path.at(grid))
        drivers.pace.append(np.sqrt(2.0 / np.maximum(bend, 0.005)))
        drivers.s.append(0.0)
        drivers.v.append(speed)
        drivers.wish.append(wish)
        drivers.since.append(frame)
        fleets.append(draw_vehicles(rng, 1))
        others = np.concatenate([others, at[None]])


def _poses(drivers: _Drivers) -> Array:
    if not drivers.s:
        return np.zeros((0, 3))
    return np.stack([_along(way, np.array([s]))[0] for way, s in zip(drivers.way, drivers.s, strict=True)])


def _along(way: Array, s: Array) -> Array:
    x = np.clip(s / SPACING_M, 0, len(way) - 1.001)
    low = x.astype(np.int64)
    return np.asarray(way[low] + (x - low)[..., None] * (way[np.minimum(low + 1, len(way) - 1)] - way[low]))


def _discs(pose: Array, length: Array, width: Array) -> tuple[Array, Array]:
    """Cover vehicles by four discs each: (middles [..., 4, 2], radii [...])."""
    k = np.array([-0.375, -0.125, 0.125, 0.375]) * length[..., None]
    x = pose[..., 0, None] + k * np.cos(pose[..., 2, None])
    y = pose[..., 1, None] + k * np.sin(pose[..., 2, None])
    return np.stack([x, y], axis=-1), width / 2 + 0.15


def _advance(
    drivers: _Drivers, fleet: Fleet, state: Array, leaders: Fleet, lead: Array, ego_ahead: Array, dt: float
) -> None:
    count = len(state)
    s, v = np.array(drivers.s), np.array(drivers.v)
    look = s[:, None] + fleet.size[:, :1] / 2 + LOOK_M
    seen = np.stack([_along(way, row)[:, :2] for way, row in zip(drivers.way, look, strict=True)])  # [A, D, 2]
    # The ego now and where it will be in the next seconds: the others give way to it.
    future = ego_ahead[: int(3.5 / dt) + 1 : max(1, int(0.5 / dt))]
    ego_size = np.broadcast_to([EGO_LENGTH_M, EGO_WIDTH_M], (len(future), 2))
    pose = np.concatenate([state, lead, future])
    size = np.concatenate([fleet.size[:, :2], leaders.size[:, :2], ego_size])
    middles, radius = _discs(pose, size[:, 0], size[:, 1])
    gap = np.hypot(*(seen[:, :, None, None] - middles[None, None]).transpose(4, 0, 1, 2, 3)).min(axis=-1)  # [A, D, M]
    touch = gap < (fleet.size[:, 1] / 2 + 0.25)[:, None, None] + radius
    touch[np.arange(count), :, np.arange(count)] = False
    speed = np.concatenate([v, np.zeros(len(lead) + len(future))])
    turn = pose[None, :, 2] - state[:, None, 2]
    along = np.maximum(speed[None] * np.cos(turn), 0)  # [A, M]
    room = np.where(touch, LOOK_M[None, :, None] - 2.5, np.inf).min(axis=1)  # [A, M]
    allowed = np.sqrt(along**2 + 2 * BRAKE * np.maximum(room, 0)).min(axis=1)
    allowed = np.where(np.isfinite(room).any(axis=1), allowed, np.inf)
    pace = np.array([p[min(int(x / SPACING_M) + 8, len(p) - 1)] for p, x in zip(drivers.pace, s, strict=True)])
    target = np.minimum(np.minimum(np.array(drivers.wish), pace), allowed)
    v = np.maximum(v + np.clip(target - v, -5.0 * dt, 1.5 * dt), 0)
    drivers.v = v.tolist()
    drivers.s = (s + v * dt).tolist()
