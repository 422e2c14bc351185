"""Vehicles that follow lanes, keep their distance, and give way to the ego car."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from nmp_train.sim.boxes import EGO_LENGTH_M, EGO_WIDTH_M, ego_middle
from nmp_train.sim.lanes import RoadNetwork
from nmp_train.sim.paths import Path
from nmp_train.sim.tracks import Track
from nmp_train.sim.vehicles import Fleet, draw_vehicles, tail_of

Array = NDArray[np.float64]
SPACING_M = 0.5
LOOK_M = np.arange(1.5, 27.0, 2.5)
"""distances ahead of the front bumper at which a driver looks for something in the way, m"""
BRAKE = 2.5
FAR_M = 95.0
"""vehicles farther than this from the ego are dropped, m"""
ROOM_FOR_TAIL_M = 16.0
"""a vehicle that draws another one appears at least this far along its track, m"""


@dataclass
class Flow:
    """The vehicles on the road during one drive: motion [F, A, 3] (x, y, yaw of the middle), shown [F, A]."""

    fleet: Fleet
    motion: Array
    shown: NDArray[np.bool_]
    head: NDArray[np.int64]
    """[A] place of the vehicle that draws this one, -1 for none"""


class _Tails:
    """What some vehicles draw behind them: the rear parts of articulated lorries and buses.

    A tail hangs on a hitch of its head, and its axle follows the hitch.
    """

    def __init__(self) -> None:
        self.fleet = Fleet.joined([])
        self.head = np.zeros(0, np.int64)
        self.axle = np.zeros((0, 2))

    def update(self, heads: Fleet, state: Array) -> Array:
        """Follow the heads (all vehicles and their poses [A, 3]); return the poses [T, 3] of the tails' middles."""
        if len(heads) == 0:
            return np.zeros((0, 3))
        fleet, head = tail_of(heads)
        size = fleet.size[:, 0]
        towards = np.stack([np.cos(state[head, 2]), np.sin(state[head, 2])], axis=1)
        # A bus is hinged at its end, a trailer rests on its tractor.
        bus = fleet.size[:, 0] < 10.0
        hitch = state[head, :2] - np.where(bus, 0.53, 0.22)[:, None] * heads.size[head, :1] * towards
        reach, middle = size * np.where(bus, 0.75, 0.68), size * np.where(bus, 0.53, 0.42)
        axle = hitch - reach[:, None] * towards
        axle[: len(self.axle)] = self.axle
        pull = hitch - axle
        pull /= np.maximum(np.hypot(*pull.T), 0.1)[:, None]
        self.fleet, self.head, self.axle = fleet, head, hitch - reach[:, None] * pull
        return np.column_stack([hitch - middle[:, None] * pull, np.arctan2(pull[:, 1], pull[:, 0])])


class _Drivers:
    """Everyone on the road so far, as arrays: one row each."""

    def __init__(self) -> None:
        self.way = np.zeros((0, 2, 3))
        """[A, N, 3] x, y, yaw every SPACING_M, the last one repeated"""
        self.pace = np.zeros((0, 2))
        """[A, N] speed that the bends allow, m/s"""
        self.count = np.zeros(0, np.int64)
        """[A] points of each way"""
        self.s = np.zeros(0)
        self.v = np.zeros(0)
        self.wish = np.zeros(0)
        self.since = np.zeros(0, np.int64)

    def add(self, path: Path, speed: float, wish: float, frame: int) -> None:
        grid = np.arange(0, path.length, SPACING_M)
        bend = np.abs(np.interp(grid, path.s, path.curvature))
        longest = max(len(grid), self.way.shape[1])
        way = np.pad(self.way, ((0, 0), (0, longest - self.way.shape[1]), (0, 0)), mode="edge")
        mine = np.pad(path.at(grid), ((0, longest - len(grid)), (0, 0)), mode="edge")
        pace = np.pad(self.pace, ((0, 0), (0, longest - self.pace.shape[1])), mode="edge")
        slow = np.pad(np.sqrt(2.0 / np.maximum(bend, 0.005)), (0, longest - len(grid)), mode="edge")
        self.way, self.pace = np.concatenate([way, mine[None]]), np.concatenate([pace, slow[None]])
        self.count = np.append(self.count, len(grid))
        self.s, self.v, self.wish = np.append(self.s, 0.0), np.append(self.v, speed), np.append(self.wish, wish)
        self.since = np.append(self.since, frame)

    def at(self, s: Array) -> Array:
        """Return the poses [A, ..., 3] at distances [A, ...] along the ways."""
        x = np.clip(s / SPACING_M, 0, (self.count - 1.001).reshape(-1, *[1] * (s.ndim - 1)))
        low = x.astype(np.int64)
        row = np.arange(len(self.s)).reshape(-1, *[1] * (s.ndim - 1))
        here = self.way[row, low]
        return np.asarray(here + (x - low)[..., None] * (self.way[row, low + 1] - here))


def simulate(
    rng: np.random.Generator,
    roads: RoadNetwork,
    tracks: list[Track],
    ego: Array,
    dt: float,
    density: float,
    scripted: tuple[Fleet, Array],
    location: str,
) -> Flow:
    """Let vehicles drive on the tracks around the ego poses [F, 3], which are ``dt`` seconds apart.

    ``scripted`` are vehicles and things (motion [F, L, 3]) that the others see but that do not react.
    """
    frames = len(ego)
    drivers = _Drivers()
    # At density 1 about as many vehicles should come near as in nuScenes; some are left out again later.
    starts = _starts(rng, tracks, 1.5 * density)
    pool, chosen = draw_vehicles(rng, len(starts), "moving", location), list[int]()
    waiting = [(k, start, bool(pool.makes[k].tail)) for k, start in enumerate(starts)]
    fleet, tails = pool.pick(np.zeros(0, np.int64)), _Tails()
    leaders, lead_motion = scripted
    states: list[Array] = []
    tail_states: list[Array] = []
    middle = ego_middle(ego)
    for f in range(frames):
        if f % max(1, int(2.0 / dt)) == 0:
            _appear(rng, roads, tracks, waiting, drivers, chosen, ego, f, lead_motion[f], (frames - f) * dt)
            fleet = pool.pick(np.array(chosen, dtype=np.int64))
        state = drivers.at(drivers.s)
        states.append(state)
        tail_states.append(tails.update(fleet, state))
        if len(state):
            others = Fleet.joined([leaders, tails.fleet]), np.concatenate([lead_motion[f], tail_states[-1]])
            _advance(drivers, fleet, state, *others, middle[f:], dt, tails.head)
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
        ends = SPACING_M * (drivers.count - 1)
        steps = np.hypot(*np.diff(motion[..., :2], axis=0).transpose(2, 0, 1))
        travelled = np.concatenate([np.zeros((1, count)), np.cumsum(steps, axis=0)])
        shown &= (away < FAR_M) & (travelled < ends - 1.0)
    behind = np.zeros((frames, len(tails.head), 3))
    for f, state in enumerate(tail_states):
        behind[f, : len(state)] = state
    behind[..., 2] = np.unwrap(behind[..., 2], axis=0)
    return Flow(
        Fleet.joined([fleet, tails.fleet]),
        np.concatenate([motion, behind], axis=1),
        np.concatenate([shown, shown[:, tails.head]], axis=1),
        np.concatenate([np.full(count, -1), tails.head]),
    )


def _starts(rng: np.random.Generator, tracks: list[Track], density: float) -> list[tuple[int, float, float, float]]:
    """Places where vehicles may appear: (track, distance along it, speed, wished speed), in random order."""
    out = []
    for k, track in enumerate(tracks):
        length = float(np.hypot(*np.diff(track.points, axis=0).T).sum())
        if track.junction or length < 6:
            continue
        mood = rng.random()
        if mood < 0.35:  # a queue before the junction
            s, wish = length - float(rng.uniform(3, 5)), 0.0
            for _ in range(int(rng.integers(2, 7))):
                out.append((k, s, 0.0, wish if rng.random() < 0.8 else 6.0))
                s -= float(rng.uniform(6.2, 8.5)) / min(max(density, 0.3), 1.2)
            free = s - 15
        else:
            free = length - 3
        gap = (6.0 if mood < 0.6 else 15.0) / max(density, 0.05)
        speed = float(rng.uniform(1, 5) if mood < 0.6 else rng.uniform(5, 11))
        s = float(rng.uniform(0, gap))
        while s < free:
            out.append((k, s, speed, speed * float(rng.uniform(0.9, 1.5))))
            s += 7.0 + float(rng.exponential(gap))
    out = [start for start in out if start[1] > 0.5]
    return [out[i] for i in rng.permutation(len(out))]


def _appear(
    rng: np.random.Generator,
    roads: RoadNetwork,
    tracks: list[Track],
    waiting: list[tuple[int, tuple[int, float, float, float], bool]],
    drivers: _Drivers,
    chosen: list[int],
    ego: Array,
    frame: int,
    leaders: Array,
    seconds: float,
) -> None:
    here = ego[frame, :2]
    others = np.concatenate([drivers.at(drivers.s)[:, :2], leaders[:, :2], here[None]])
    ahead = ego[frame:, :2]
    for entry in list(waiting):
        number, (k, s, speed, wish), long = entry
        track = tracks[k]
        at = track.points[min(int(s), len(track.points) - 1)]
        distance = float(np.hypot(*(at - here)))
        if distance > 78 or (frame > 0 and distance < 45):
            continue
        waiting.remove(entry)
        nose = track.points[min(int(s) + 1, len(track.points) - 1)] - track.points[max(int(s) - 1, 0)]
        nose = nose / max(float(np.hypot(*nose)), 1e-6)
        gap = others - at
        along = gap @ nose
        behind = ROOM_FOR_TAIL_M if long else 7.5
        close = (along < 7.5) & (along > -behind) & (np.abs(gap @ [-nose[1], nose[0]]) < 2.4)
        if (long and s < ROOM_FOR_TAIL_M) or close.any() or np.hypot(*(ahead - at).T).min() < 2.6:
            continue
        # Those who stand stay where they are.
        path = track.path(roads, rng, s, seconds * max(wish, 2.0) * 1.2 + 30 if wish > 0 else 5.0)
        if path.length < 4:
            continue
        drivers.add(path, speed, wish, frame)
        chosen.append(number)
        others = np.concatenate([others, at[None]])


def _discs(pose: Array, length: Array, width: Array) -> tuple[Array, Array]:
    """Cover vehicles by four discs each: (middles [..., 4, 2], radii [...])."""
    k = np.array([-0.375, -0.125, 0.125, 0.375]) * length[..., None]
    x = pose[..., 0, None] + k * np.cos(pose[..., 2, None])
    y = pose[..., 1, None] + k * np.sin(pose[..., 2, None])
    return np.stack([x, y], axis=-1), width / 2 + 0.15


def _advance(
    drivers: _Drivers,
    fleet: Fleet,
    state: Array,
    leaders: Fleet,
    lead: Array,
    ego_ahead: Array,
    dt: float,
    tail_heads: NDArray[np.int64],
) -> None:
    """Move everyone on by ``dt``; the last of ``lead`` are tails, whose heads do not brake for them."""
    movers = np.flatnonzero((drivers.wish > 0) & (np.hypot(*(state[:, :2] - ego_ahead[0, :2]).T) < FAR_M))
    if not len(movers):
        return
    v = drivers.v[movers]
    look = drivers.s[:, None] + fleet.size[:, :1] / 2 + LOOK_M
    seen = drivers.at(look)[movers][..., :2]  # [A, D, 2]
    # The ego now and where it will be in the next seconds: the others give way to it.
    future = ego_ahead[: int(3.5 / dt) + 1 : max(1, int(0.5 / dt))]
    ego_size = np.broadcast_to([EGO_LENGTH_M, EGO_WIDTH_M], (len(future), 2))
    pose = np.concatenate([state, lead, future])
    size = np.concatenate([fleet.size[:, :2], leaders.size[:, :2], ego_size])
    middles, radius = _discs(pose, size[:, 0], size[:, 1])
    gap = cdist(seen.reshape(-1, 2), middles.reshape(-1, 2), "sqeuclidean")
    gap = gap.reshape(len(movers), len(LOOK_M), len(pose), -1).min(axis=-1)  # [A, D, M]
    touch = gap < ((fleet.size[movers, 1] / 2 + 0.25)[:, None, None] + radius) ** 2
    touch[np.arange(len(movers)), :, movers] = False
    first_tail = len(state) + len(lead) - len(tail_heads)
    for k, head in enumerate(tail_heads):
        touch[movers == head, :, first_tail + k] = False
    speed = np.concatenate([drivers.v, np.zeros(len(lead) + len(future))])
    along = np.maximum(speed[None] * np.cos(pose[None, :, 2] - state[movers, None, 2]), 0)  # [A, M]
    room = np.where(touch, LOOK_M[None, :, None] - 2.5, np.inf).min(axis=1)  # [A, M]
    allowed = np.sqrt(along**2 + 2 * BRAKE * np.maximum(room, 0)).min(axis=1)
    ahead = np.minimum((drivers.s[movers] / SPACING_M).astype(np.int64) + 8, drivers.count[movers] - 1)
    target = np.minimum(np.minimum(drivers.wish[movers], drivers.pace[movers, ahead]), allowed)
    drivers.v[movers] = np.maximum(v + np.clip(target - v, -5.0 * dt, 1.5 * dt), 0)
    drivers.s[movers] += drivers.v[movers] * dt
