"""How the drives of a data set overlap: how often a road is driven, how far apart in metres and in days."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from nmp.errors import NmpError
from nmp.evaluation import nan_as_null, write_json
from nmp.frame import ANCHOR_CAMERA
from nmp.geometry import distances_along, points_along
from nmp_train.sim.drive import Trajectory, load_trajectories
from nmp_train.sim.rig import KEYFRAME_PERIOD_S

Array = NDArray[np.float64]

CELL_M = 2.5
"""drives are cut into pieces of this length"""
MATCH_M = 7.0
"""two drives are on the same road where they are this close ..."""
MATCH_RAD = np.pi / 4
"""... and parallel, or opposite, to within this angle: a crossing street is another road"""
NEAR_M = (5.0, 10.0, 15.0)
MOST = 6


@dataclass(frozen=True)
class Overlap:
    """Statistics of the drives of one location, or of all of them. NaN where there is nothing to count."""

    scenes: int
    driven_km: float
    road_km: float
    """every road once, however often it was driven"""
    road_share: tuple[float, ...]
    """share of ``road_km`` driven by 1, 2, 3, 4, 5, and 6 or more scenes"""
    keyframes: int
    """poses at 2 Hz"""
    near: tuple[float, ...]
    """share of the keyframes within 5, 10 and 15 m of an earlier scene's path, whatever its direction"""
    same_direction: tuple[float, ...]
    """the same, counting only earlier scenes that drove in the same direction (to 45 degrees)"""
    opposite_direction: tuple[float, ...]
    other_day: tuple[float, ...]
    """as ``near``, counting only scenes of earlier days: scenes of one log often follow each other along a road"""
    offset_m: tuple[float, float]
    """distance to the side between two scenes on the same road: median and 90 %"""
    days: tuple[float, float]
    """days since the last scene of an earlier day within 10 m of a keyframe: median and 90 %"""
    length_m: tuple[float, float, float]
    """length of a scene: 10 %, median, 90 %"""


def read_drives(path: str | Path, version: str | None = None) -> list[Trajectory]:
    """Read a trajectory file or folder (:func:`load_trajectories`), or the 2 Hz ego poses of a nuScenes data root.

    :param version: of the data root; None takes the only one that it has
    """
    where = Path(path)
    versions = sorted(p.parent.name for p in where.glob("*/scene.json")) if where.is_dir() else []
    if not versions:
        if version is not None and where.is_dir():
            raise NmpError(f"{where} is no nuScenes data root: it has no {version}/scene.json")
        return load_trajectories(where)
    if version is None and len(versions) > 1:
        raise NmpError(f"{where} holds several versions ({', '.join(versions)}): choose one with --version")
    if version is not None and version not in versions:
        raise NmpError(f"{where} has no version {version}: it has {', '.join(versions)}")
    return _from_tables(where / (version or versions[0]))


def _from_tables(folder: Path) -> list[Trajectory]:
    def table(name: str) -> list[dict[str, Any]]:
        try:
            rows: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text())
        except (OSError, ValueError) as error:
            raise NmpError(f"cannot read {folder / name}.json: {error}") from error
        return rows

    try:
        sensors = {r["token"] for r in table("sensor") if r["channel"].lower() == ANCHOR_CAMERA}
        cameras = {r["token"] for r in table("calibrated_sensor") if r["sensor_token"] in sensors}
        poses = {r["token"]: r for r in table("ego_pose")}
        scene_of = {r["token"]: r["scene_token"] for r in table("sample")}
        logs = {r["token"]: r for r in table("log")}
        rows: dict[str, list[tuple[float, float, float, float]]] = {}
        for r in table("sample_data"):
            if r["is_key_frame"] and r["calibrated_sensor_token"] in cameras:
                pose = poses[r["ego_pose_token"]]
                w, x, y, z = pose["rotation"]
                yaw = float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))
                place = (r["timestamp"] / 1e6, *pose["translation"][:2], yaw)
                rows.setdefault(scene_of[r["sample_token"]], []).append(place)
        out = []
        for scene in table("scene"):
            values = np.array(sorted(rows[scene["token"]]))
            log = logs[scene["log_token"]]
            out.append(
                Trajectory(
                    log["location"],
                    log["date_captured"],
                    values[:, 0] - values[0, 0],
                    values[:, 1:],
                    scene["name"],
                    log["logfile"],
                )
            )
    except (KeyError, TypeError, ValueError) as error:
        raise NmpError(f"{folder} does not hold the tables of a nuScenes data set: {error!r}") from error
    return out


def overlaps(drives: Sequence[Trajectory]) -> dict[str, Overlap]:
    """Return the statistics of each location, most scenes first, and of ``all`` of them before.

    Scenes of a location are ordered by date, time of the log, and name. A scene counts once wherever it passes,
    even if it comes by twice.
    """
    if not drives:
        raise NmpError("no drives to compare: give at least one trajectory")
    places = sorted({d.location for d in drives}, key=lambda p: (-sum(d.location == p for d in drives), p))
    counts = {p: _count([d for d in drives if d.location == p]) for p in places}
    return {"all": _summary(_Counts.joined(list(counts.values()))), **{p: _summary(c) for p, c in counts.items()}}


@dataclass(frozen=True)
class _Counts:
    """What is counted along the drives of one location."""

    lengths: Array
    """[scenes] m"""
    passes: NDArray[np.int64]
    """[pieces] scenes on the road of each piece of each drive"""
    offsets: Array
    """[pairs] distance to the side, m, where two scenes are on the same road"""
    nearest: Array
    """[keyframes, 4] distance (m) to earlier scenes: any, the same direction, the opposite, earlier days; or inf"""
    days: Array
    """[keyframes within 10 m of a scene of an earlier day]"""

    @classmethod
    def joined(cls, parts: list[_Counts]) -> _Counts:
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in (f.name for f in fields(cls))))


def _count(drives: list[Trajectory]) -> _Counts:
    drives = sorted(drives, key=lambda d: (d.started, d.name))
    lengths = np.array([np.hypot(*np.diff(d.poses_xyyaw[:, :2], axis=0).T).sum() for d in drives])
    pieces = [_pieces(d) for d in drives]
    scene = np.repeat(np.arange(len(drives)), [len(p) for p in pieces])
    everything = np.concatenate(pieces)
    index = cKDTree(everything[:, :2])
    passes = np.ones(len(everything), dtype=np.int64)
    offsets: list[float] = []
    for k, (x, y, yaw) in enumerate(everything):
        close = np.array(index.query_ball_point((x, y), MATCH_M))
        close = close[np.abs(np.cos(everything[close, 2] - yaw)) > np.cos(MATCH_RAD)]
        passes[k] = len(np.unique(scene[close]))
        earlier = close[scene[close] < scene[k]]
        aside = np.abs((everything[earlier, :2] - (x, y)) @ (-np.sin(yaw), np.cos(yaw)))
        along = np.abs((everything[earlier, :2] - (x, y)) @ (np.cos(yaw), np.sin(yaw)))
        for other in np.unique(scene[earlier]):
            mine = scene[earlier] == other
            # The piece right beside is the one that tells the distance to the side.
            if along[mine].min() < CELL_M:
                offsets.append(float(aside[mine][along[mine].argmin()]))
    nearest, days = _keyframes(drives, everything, scene, index)
    return _Counts(lengths, passes, np.array(offsets), nearest, days)


def _pieces(drive: Trajectory) -> Array:
    """Return [P, 3] x, y (m), yaw (rad) every ``CELL_M`` along a drive; places that it passes again are left out."""
    xy = drive.poses_xyyaw[:, :2]
    s = distances_along(xy)
    at = np.arange(0.0, s[-1] + 1e-9, CELL_M) + min(CELL_M, s[-1]) / 2
    yaw = np.interp(at, s, np.unwrap(drive.poses_xyyaw[:, 2]))
    points = np.column_stack([points_along(xy, s, at), yaw])
    first = [
        not ((np.hypot(*(points[:k, :2] - points[k, :2]).T) < MATCH_M) & (at[:k] < at[k] - 4 * MATCH_M)).any()
        for k in range(len(points))
    ]
    return points[first]


def _keyframes(
    drives: list[Trajectory], everything: Array, scene: NDArray[np.int64], index: cKDTree
) -> tuple[Array, Array]:
    nearest: list[Array] = []
    days: list[float] = []
    dates = np.array([_day(d) for d in drives])
    for number, drive in enumerate(drives):
        times = np.arange(drive.times_s[0], drive.times_s[-1] + 1e-6, KEYFRAME_PERIOD_S)
        for x, y, yaw in drive.at(times):
            close = np.array(index.query_ball_point((x, y), NEAR_M[-1] + CELL_M), dtype=np.int64)
            close = close[scene[close] < number]
            # Half a piece may lie between the pose and the middle of the nearest piece: measure to its line.
            ahead = np.stack([np.cos(everything[close, 2]), np.sin(everything[close, 2])], axis=1)
            apart = np.array([x, y]) - everything[close, :2]
            along = np.clip((apart * ahead).sum(axis=1), -CELL_M / 2, CELL_M / 2)
            distance = np.hypot(*(apart - along[:, None] * ahead).T)
            turn = np.cos(everything[close, 2] - yaw)
            older = dates[scene[close]] < dates[number]
            kinds = (distance > -1, turn > np.cos(MATCH_RAD), turn < -np.cos(MATCH_RAD), older)
            nearest.append(np.array([distance[kind].min(initial=np.inf) for kind in kinds]))
            within = scene[close[older & (distance < NEAR_M[1])]]
            if len(within):
                days.append(float((dates[number] - dates[within.max()]) / np.timedelta64(1, "D")))
    return np.array(nearest), np.array(days)


def _day(drive: Trajectory) -> np.datetime64:
    try:
        return np.datetime64(datetime.date.fromisoformat(drive.date))
    except ValueError:
        return np.datetime64("NaT")  # is before and after nothing


def _summary(counts: _Counts) -> Overlap:
    # A road with n drives shows up in n pieces: each of them stands for 1/n of it.
    road = CELL_M / counts.passes
    capped = np.minimum(counts.passes, MOST)
    share = [float(road[capped == n].sum() / road.sum()) for n in range(1, MOST + 1)]
    near, same, opposite, older = (tuple(float((column < m).mean()) for m in NEAR_M) for column in counts.nearest.T)
    return Overlap(
        scenes=len(counts.lengths),
        driven_km=float(counts.lengths.sum() / 1000),
        road_km=float(road.sum() / 1000),
        road_share=tuple(share),
        keyframes=len(counts.nearest),
        near=near,
        same_direction=same,
        opposite_direction=opposite,
        other_day=older,
        offset_m=_quantiles(counts.offsets, (0.5, 0.9)),
        days=_quantiles(counts.days, (0.5, 0.9)),
        length_m=_quantiles(counts.lengths, (0.1, 0.5, 0.9)),
    )


def _quantiles(values: Array, at: tuple[float, ...]) -> Any:
    return tuple(float(v) for v in (np.quantile(values, at) if len(values) else np.full(len(at), np.nan)))


def format_overlaps(tables: dict[str, dict[str, Overlap]]) -> str:
    """Return one text table with the sources (names) side by side within each location."""
    places = list(dict.fromkeys(place for table in tables.values() for place in table))
    heads = ["scenes", "km driven", "km of road", "length of a scene, m: 10 %", "  median", "  90 %"]
    heads += [f"road driven {n}{' or more' if n == MOST else ''} x, %" for n in range(1, MOST + 1)]
    for what in ("earlier scene", "  same direction", "  opposite direction", "  of an earlier day"):
        heads += [f"{what} within {m:g} m, % of keyframes" for m in NEAR_M]
    heads += ["offset to the side, m: median", "  90 %", "days since the last earlier day: median", "  90 %"]
    columns: list[list[str]] = []
    titles: list[tuple[str, str]] = []
    for place in places:
        for name, table in tables.items():
            titles.append((place.rpartition("-")[2][:10], name[:10]))
            columns.append(_cells(table[place]) if place in table else ["-"] * len(heads))
    wide = max(len(h) for h in heads) + 1
    lines = ["".ljust(wide) + "".join(title[k].rjust(11) for title in titles) for k in (0, 1)]
    for k, head in enumerate(heads):
        lines.append(head.ljust(wide) + "".join(column[k].rjust(11) for column in columns))
    lines.append(
        f"Same road: within {MATCH_M:g} m and parallel or opposite to {np.degrees(MATCH_RAD):g} degrees, "
        f"in pieces of {CELL_M:g} m; a scene counts once. Earlier: by date and time of the log."
    )
    return "\n".join(lines)


def _cells(o: Overlap) -> list[str]:
    percent = [
        f"{100 * v:.1f}" for v in (*o.road_share, *o.near, *o.same_direction, *o.opposite_direction, *o.other_day)
    ]
    return [
        str(o.scenes),
        f"{o.driven_km:.2f}",
        f"{o.road_km:.2f}",
        *(f"{v:.0f}" for v in o.length_m),
        *percent,
        *("-" if np.isnan(v) else f"{v:.2f}" for v in o.offset_m),
        *("-" if np.isnan(v) else f"{v:.0f}" for v in o.days),
    ]


def compare(paths: Sequence[Path], version: str | None = None, out: Path | None = None) -> str:
    """Return the table of several trajectory files or data roots; with ``out`` write it as JSON too."""
    tables: dict[str, dict[str, Overlap]] = {}
    for path in paths:
        name = path.stem if path.stem not in tables else str(path)
        tables[name] = overlaps(read_drives(path, version if path.is_dir() else None))
    if out is not None:
        content = {n: {p: asdict(o) for p, o in table.items()} for n, table in tables.items()}
        write_json(out, nan_as_null(content))
    return format_overlaps(tables)
