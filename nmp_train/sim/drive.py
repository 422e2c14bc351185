"""Trajectories of the ego car: sampled on a generated city, driven a second time, or read from files."""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from shapely.geometry import LineString
from shapely.ops import substring

from nmp.changelog import checked_date
from nmp.errors import NmpError
from nmp_train.sim.lanes import RoadNetwork, roads_of
from nmp_train.sim.paths import Path, Stop, drive_along, lateral_wander

Array = NDArray[np.float64]
REAR_TO_FRONT_M = 3.45
"""from the rear axle, where the ego pose is, to the front bumper"""
LANE_M = 3.3
"""to the middle of the lane beside, about"""
NO_GRAPH = "this map has no lane graph to drive on: give trajectories by file instead (load_trajectories)"


@dataclass(frozen=True)
class Trajectory:
    """Planar poses of the ego car's rear axle in the map frame of a location."""

    location: str
    date: str
    """YYYY-MM-DD"""
    times_s: Array
    """[T] from the start, s"""
    poses_xyyaw: Array
    """[T, 3] x, y (m), yaw (rad)"""
    name: str = ""
    """scene name; empty when it has none yet"""
    logfile: str = ""
    """name of the recording that it is from; empty when not known"""

    def __post_init__(self) -> None:
        if len(self.times_s) < 2 or self.poses_xyyaw.shape != (len(self.times_s), 3):
            raise NmpError(
                f"trajectory {self.name or '(unnamed)'} needs two or more poses [T, 3] with as many times: "
                f"got {self.poses_xyyaw.shape} poses and {len(self.times_s)} times"
            )
        if not (np.isfinite(self.poses_xyyaw).all() and (np.diff(self.times_s) > 0).all()):
            raise NmpError(f"trajectory {self.name or '(unnamed)'} has poses that are not finite or times that go back")

    @property
    def started(self) -> str:
        """Local date of the drive, with the time of its log (YYYY-MM-DD-hh-mm-ss) where that is known."""
        found = re.search(r"\d{4}-\d{2}-\d{2}-\d{2}-\d{2}-\d{2}", self.logfile)
        return found.group() if found else self.date

    @property
    def duration_s(self) -> float:
        return float(self.times_s[-1] - self.times_s[0])

    def at(self, t_s: Array | float) -> Array:
        """Return the poses [..., 3] at times (s), interpolated; the first and last pose hold beyond the ends."""
        poses = np.column_stack([self.poses_xyyaw[:, :2], np.unwrap(self.poses_xyyaw[:, 2])])
        t = np.clip(np.asarray(t_s, dtype=np.float64), self.times_s[0], self.times_s[-1])
        out = np.asarray(PchipInterpolator(self.times_s, poses, axis=0)(t), dtype=np.float64)
        out[..., 2] = (out[..., 2] + np.pi) % (2 * np.pi) - np.pi
        return out

    def resampled(self, rate_hz: float) -> Trajectory:
        """Return the same drive with poses at another rate."""
        times = self.times_s[0] + np.arange(int(self.duration_s * rate_hz + 1e-6) + 1) / rate_hz
        return replace(self, times_s=times, poses_xyyaw=self.at(times))


def sample_routes(city: dict[str, Any], seed: int, n: int, duration_s: float, rate_hz: float) -> list[Trajectory]:
    """Return ``n`` drives of ``duration_s`` seconds along the lanes of a city, at ``rate_hz`` poses a second.

    They turn at junctions, slow down for it, sometimes change lane, sometimes stand at a junction or behind
    nobody in particular.

    :raise NmpError: when the map has no lane graph; generated cities have one
    """
    roads = roads_of(city)
    starts = [i for i in sorted(roads.graph.alive) if not roads.graph.lanes[i].connector]
    if not starts:
        raise NmpError(NO_GRAPH)
    weights = np.array([roads.graph.lanes[i].length for i in starts])
    place = str(city.get("location", ""))
    out = []
    for k in range(n):
        rng = np.random.default_rng([seed, k])
        points, entries = roads.graph.trace(
            rng, int(rng.choice(starts, p=weights / weights.sum())), duration_s * 15 + 60, 0.25
        )
        path = Path(points)
        path = path.shifted(lateral_wander(rng, path, float(rng.normal(0, 0.12)), 0.13))
        begin = float(rng.uniform(0, 20))
        stops = _stops(rng, entries, begin, path.length, duration_s)
        times, s = drive_along(
            path, rng, duration_s + 0.1, cruise=float(rng.uniform(6, 13.0)), stops=stops, start_s=begin
        )
        date = datetime.date(2018, 7, 1) + datetime.timedelta(days=int(rng.integers(0, 120)))
        out.append(_trajectory(place, date.isoformat(), path, times, s, duration_s, rate_hz, f"sim-{seed:04d}-{k:04d}"))
    return out


def _stops(
    rng: np.random.Generator, entries: list[float], begin: float, length: float, duration_s: float
) -> list[Stop]:
    """Draw stops at junctions (their distances are ``entries``), in between, and at the beginning."""
    stops = [
        Stop(s - REAR_TO_FRONT_M - float(rng.uniform(0.3, 2.5)), float(rng.uniform(2, 12)))
        for s in entries
        if rng.random() < 0.28
    ]
    stops += [
        Stop(float(rng.uniform(begin, length)), float(rng.uniform(1, 6))) for _ in range(rng.poisson(duration_s / 90))
    ]
    if rng.random() < 0.12:
        stops.append(Stop(begin, float(rng.uniform(1, max(1.0, 0.7 * duration_s)))))
    return stops


def sample_stretch(city: dict[str, Any], rng: np.random.Generator, length_m: float) -> Array:
    """Return a random stretch of street as the points [N, 2] (m) of one lane after the other, with turns.

    Wide streets are more likely than narrow ones: most traffic is there.
    """
    graph = roads_of(city).graph
    starts = [i for i in sorted(graph.alive) if not graph.lanes[i].connector]
    if not starts:
        raise NmpError(NO_GRAPH)
    weights = np.array([graph.lanes[i].length * (1 + 2 * len(graph.lanes[i].beside)) for i in starts])
    points, _ = graph.trace(rng, int(rng.choice(starts, p=weights / weights.sum())), length_m + 40, 0.0)
    line = LineString(points)
    begin = float(rng.uniform(0, max(1.0, min(40.0, line.length - length_m))))
    return shapely.get_coordinates(substring(line, begin, begin + length_m))


def stretch_lanes(city: dict[str, Any], stretch: Array, opposite: bool = False) -> list[list[int]]:
    """Return the ways to drive along a stretch of street [N, 2] (m): chains of lanes that differ in some lane.

    :param opposite: in the other direction; empty on one-way streets
    """
    graph = roads_of(city).graph
    wish = Path(stretch[::-1] if opposite else stretch)
    lines = [wish.points, *(wish.shifted(d).points for d in (LANE_M, -LANE_M))]
    chains = [graph.chain_along(line) for line in lines]
    return list({tuple(chain): chain for chain in chains if chain is not None}.values())


def drive_stretch(
    city: dict[str, Any],
    stretch: Array,
    chain: list[int],
    rng: np.random.Generator,
    *,
    duration_s: float,
    rate_hz: float,
    start_m: float = 0.0,
) -> Trajectory:
    """Return a drive along a stretch of street [N, 2] (m), and on beyond its end while time is left.

    :param stretch: in the direction of the drive
    :param chain: the lanes to use, one of :func:`stretch_lanes`
    :param start_m: how far from the beginning of the stretch the drive starts
    :return: a trajectory without name and date
    """
    graph = roads_of(city).graph
    ends = np.cumsum([graph.lanes[i].length for i in chain])
    entries = [
        float(s)
        for i, s in zip(chain[:-1], ends[:-1], strict=True)
        if not graph.lanes[i].connector and len(graph.lanes[i].outgoing) > 1
    ]
    onward, more = graph.trace(rng, chain[-1], duration_s * 15 + 60, 0.1)
    entries += [float(ends[-1]) - graph.lanes[chain[-1]].length + s for s in more]
    path = Path(np.concatenate([*(graph.lanes[i].points for i in chain[:-1]), onward]))
    path = path.shifted(lateral_wander(rng, path, float(rng.normal(0, 0.15)), 0.13))
    # The first lane begins before the stretch does; it is the last one that ends beyond it.
    begin = LineString(path.points).project(shapely.points(stretch[0])) + start_m
    begin = float(min(begin, 0.8 * ends[-1]))
    stops = _stops(rng, [s for s in entries if s > begin + 8.0], begin, path.length, duration_s)
    if rng.random() < 0.07:  # at a red light, or parked, from beginning to end
        stops.append(Stop(begin, 2 * duration_s))
    cruise = float(rng.uniform(4.0, 10.5))
    times, s = drive_along(path, rng, duration_s + 0.1, cruise=cruise, stops=stops, start_s=begin)
    return _trajectory(str(city.get("location", "")), "", path, times, s, duration_s, rate_hz, "")


def second_pass(trajectory: Trajectory, seed: int, city: dict[str, Any] | None = None) -> Trajectory:
    """Return the same route on a later day: another speed profile, other stops, another lateral offset.

    With ``city``, half of the passes use the lane next to it, where there is one all the way.
    """
    rng = np.random.default_rng([seed, 7])
    poses = trajectory.poses_xyyaw
    moving = np.concatenate([[True], np.hypot(*np.diff(poses[:, :2], axis=0).T) > 0.02])
    points = poses[moving, :2]
    if len(points) < 4 or LineString(points).length < 10:
        # It stood still: so does the second pass, a little aside.
        side = np.stack([-np.sin(poses[:, 2]), np.cos(poses[:, 2]), np.zeros(len(poses))], axis=1)
        poses = poses + side * rng.uniform(-0.4, 0.4)
        return replace(trajectory, date=_later(rng, trajectory.date), poses_xyyaw=poses, name=_again(trajectory.name))
    path = Path(points, smooth_m=1.0)
    shift = float(rng.choice([-1, 1]) * rng.uniform(0.15, 0.55))
    if city is not None and rng.random() < 0.5:
        lanes = [d for d in (LANE_M, -LANE_M) if _drivable(roads_of(city), path, d)]
        shift += float(rng.choice(lanes)) if lanes else 0.0
    path = path.shifted(shift + lateral_wander(rng, path, 0.0, 0.12))
    rate = 1 / float(np.median(np.diff(trajectory.times_s)))
    mean_speed = path.length / trajectory.duration_s
    stops = [
        Stop(float(rng.uniform(5, path.length)), float(rng.uniform(1, 6)))
        for _ in range(rng.poisson(path.length / 250))
    ]
    cruise = float(np.clip(mean_speed * rng.uniform(0.9, 1.7), 4.0, 14.0))
    times, s = drive_along(path, rng, 4 * trajectory.duration_s + 20, cruise=cruise, stops=stops)
    return _trajectory(
        trajectory.location,
        _later(rng, trajectory.date),
        path,
        times,
        s,
        float(times[-1]),
        rate,
        _again(trajectory.name),
    )


def _drivable(roads: RoadNetwork, path: Path, offset: float) -> bool:
    """Whether the path moved sideways still runs along lanes of its own direction."""
    poses = path.shifted(offset).at(np.arange(0, path.length, 4.0))
    good = 0
    for x, y, yaw in poses:
        here = shapely.points(x, y)
        for i in roads.graph.near(here.buffer(1.2)):
            lane = roads.graph.lanes[i]
            s = lane.line.project(here)
            p, q = (shapely.get_coordinates(lane.line.interpolate(s + ds))[0] for ds in (-0.5, 0.5))
            if (q - p) @ [np.cos(yaw), np.sin(yaw)] > 0.8 * np.linalg.norm(q - p):
                good += 1
                break
    return good > 0.9 * len(poses)


def _trajectory(
    location: str, date: str, path: Path, times: Array, s: Array, duration: float, rate_hz: float, name: str
) -> Trajectory:
    wanted = np.arange(int(min(duration, times[-1]) * rate_hz + 1e-6) + 1) / rate_hz
    poses = path.at(np.interp(wanted, times, s))
    poses[:, 2] = (poses[:, 2] + np.pi) % (2 * np.pi) - np.pi
    return Trajectory(location, date, wanted, poses, name)


def _later(rng: np.random.Generator, date: str) -> str:
    try:
        day = datetime.date.fromisoformat(date)
    except ValueError:
        day = datetime.date(2018, 9, 1)
    return (day + datetime.timedelta(days=int(rng.integers(1, 40)))).isoformat()


def _again(name: str) -> str:
    return f"{name}-again" if name else ""


def load_trajectories(path: str | FilePath, rate_hz: float | None = None) -> list[Trajectory]:
    """Read recorded drives: a folder with one JSON file per scene, or one JSON file with a list of scenes or a plan.

    Every scene has location, rate_hz and poses_xyyaw; its date comes from ``date`` or from ``logfile``, and is
    2018-01-01 where there is neither. ``rate_hz`` resamples them.
    """
    where = FilePath(path)
    if where.is_dir():
        files = sorted(where.glob("*.json"))
        records = [{"scene": f.stem, **_read_json(f)} for f in files]
    elif where.is_file():
        content = _read_json(where)
        if isinstance(content, dict) and isinstance(content.get("scenes"), list):
            content = content["scenes"]  # a plan of a fleet
        records = content if isinstance(content, list) else [content]
    else:
        raise NmpError(f"no trajectories at {where}: give a folder of scene JSON files or one list file")
    if not records:
        raise NmpError(f"{where} holds no scene JSON files")
    try:
        out = [_from_record(r) for r in records]
    except (KeyError, TypeError, ValueError) as error:
        raise NmpError(f"{where} is not a list of scenes with location, rate_hz and poses_xyyaw: {error!r}") from error
    return out if rate_hz is None else [t.resampled(rate_hz) for t in out]


def _read_json(path: FilePath) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise NmpError(f"cannot read {path}: {error}") from error


def _from_record(record: dict[str, Any]) -> Trajectory:
    poses = np.asarray(record["poses_xyyaw"], dtype=np.float64)
    times = np.arange(len(poses)) / float(record["rate_hz"])
    found = re.search(r"\d{4}-\d{2}-\d{2}", str(record.get("date") or record.get("logfile") or ""))
    date = checked_date(found.group()) if found else "2018-01-01"
    name, log = str(record.get("scene", "")), str(record.get("logfile") or "")
    return Trajectory(str(record["location"]), date, times, poses, name, log)
