"""Write simulated drives as a nuScenes data set that the official devkit loads unchanged."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from shapely.geometry import LineString
from tqdm import tqdm

from nmp.changelog import LAST_DAY, Change, apply_changes, checked_date, in_force, time_zone, write_changes
from nmp.errors import NmpError
from nmp.frame import ANCHOR_CAMERA, Camera
from nmp.geometry import transform_from_xyyaw
from nmp_train.sim.boxes import Boxes, nearest
from nmp_train.sim.city import write_map
from nmp_train.sim.drive import Trajectory
from nmp_train.sim.localisation import LocalisationNoise
from nmp_train.sim.rig import (
    CAMERA_PERIOD_S,
    FIRING_OFFSET_MS,
    KEYFRAME_PERIOD_S,
    SAMPLE_STAMP_MS,
    log_rig,
    nuscenes_rig,
    vehicle_of,
)
from nmp_train.sim.scenery import make_scenery
from nmp_train.sim.tables import Tables
from nmp_train.sim.traffic import Traffic, make_traffic

Array = NDArray[np.float64]

RenderCall = Callable[..., NDArray[np.uint8]]
"""render(intrinsics [N, 3, 3], map_from_camera [N, 4, 4], boxes, size=(width, height), weather, seed) -> RGB
[N, height, width, 3]. ``seed`` counts images within a drive and is the drive's number times 100,000 before."""

JPEG_QUALITY = 90
SEEDS_PER_DRIVE = 100_000
ANNOTATED_M = 80.0
RENDERED_M = 120.0
MAX_BOXES = 2000


@dataclass(frozen=True)
class Drive:
    """One scene to write."""

    trajectory: Trajectory
    weather: str = "day"
    """handed to the renderer; "rain" and "night" (or both words) also appear in the scene's description"""
    density: float = 1.0
    """of the traffic"""
    vehicle: str = ""
    """n008 or n015; empty: the one that drove in this city"""
    name: str = ""
    """scene name; empty: numbered"""
    render: RenderCall | None = None
    """draws this drive instead of the data set's own call"""


@dataclass(frozen=True)
class _Scene:
    """A drive with its names and clock."""

    drive: Drive
    name: str
    index: int
    logfile: str
    vehicle: str
    start_us: int
    """start of the first LIDAR turn, which is time 0 of the drive"""

    def stamp_us(self, seconds: float) -> int:
        return self.start_us + round(seconds * 1e6)


def write_dataset(
    out: str | Path,
    drives: Sequence[Drive | Trajectory],
    cities: Mapping[str, dict[str, Any]],
    *,
    version: str = "v1.0-mini",
    render: RenderCall | Mapping[str, RenderCall] = MappingProxyType({}),
    image_size: tuple[int, int] = (1600, 900),
    sweeps: bool = False,
    seed: int = 0,
    render_scale: float = 1.0,
    tilt: bool = True,
    slopes: bool = True,
    progress: bool = True,
    calibration_jitter: bool = True,
    changes: Mapping[str, Sequence[Change]] = MappingProxyType({}),
    localisation: LocalisationNoise | None = None,
    splits: Mapping[str, Collection[str]] | None = None,
    only: Collection[str] | None = None,
) -> Path:
    """Write ``drives`` through ``cities`` (map dictionaries by location) as the data root ``out``.

    ``render`` is one call, or one per location; a drive may bring its own. Images have ``image_size`` (width, height);
    they are rendered at ``render_scale`` of it and enlarged. With ``sweeps``, the 12 Hz images between the 2 Hz samples
    are written too. ``tilt`` lets the car pitch and roll by up to about a degree. The folder appears under its name
    only when it is complete.

    :param calibration_jitter: every log has cameras of its own, as each nuScenes log was calibrated anew; otherwise
        every car has those of :func:`nuscenes_rig`
    :param slopes: roads are not flat: the car pitches and rolls against them as much again, and does not know it. This
        and ``localisation`` bring ``<version>/ego_pose_estimate.json``: what the car believed its poses to be, one row
        per ego_pose token with translation, rotation and covariance (6 x 6 row by row, x y z roll pitch yaw).
        ego_pose.json and the annotations hold the truth in any case
    :param changes: by location: written as change logs, and the traffic of a drive moves in the map of its date.
        ``cities`` is the state before all changes. Painting the changed ground is up to ``render``
    :param localisation: how wrong the car is about its poses otherwise
    :param splits: written as ``<version>/splits.json``: scene names by name of the split
    :param only: write these scenes (names) alone, exactly as they are in the whole set
    """
    out = Path(out)
    if out.exists():
        raise NmpError(f"{out} exists already: remove it or choose another folder")
    if not drives:
        raise NmpError("no drives to write: give at least one trajectory")
    if not 0 < render_scale <= 1:
        raise NmpError(f"render_scale {render_scale:g} is out of range: choose more than 0 and up to 1")
    wanted = [d if isinstance(d, Drive) else Drive(d) for d in drives]
    for drive in wanted:
        if drive.trajectory.location not in cities:
            raise NmpError(f"no map for location {drive.trajectory.location!r}: pass it in cities")
        if drive.render is None and not callable(render) and drive.trajectory.location not in render:
            raise NmpError(f"nothing draws the drives in {drive.trajectory.location}: pass a call as render")
    scenes = _schedule(wanted)
    map_dates = {}
    for place, given in changes.items():
        if place in cities and given:
            map_dates[place] = _map_date(place, scenes, given)
            apply_changes(cities[place], given, LAST_DAY)  # what does not fit should be said before hours of rendering
    names = [s.name for s in scenes]
    for split, members in (splits or {}).items():
        if unknown := sorted({*members} - {*names}):
            raise NmpError(f"split {split!r} names {unknown[0]}, which no drive has: give names of the scenes")
    if only is not None:
        if unknown := sorted({*only} - {*names}):
            raise NmpError(f"no scene is named {unknown[0]}: choose from {names[0]} to {names[-1]}")
        scenes = [s for s in scenes if s.name in only]
    tables = Tables(seed)
    with _whole_or_absent(out) as part:
        used = list(dict.fromkeys(s.drive.trajectory.location for s in scenes))
        scenery = {place: make_scenery(cities[place], seed) for place in used}
        frames = sum(len(_moments(s.drive.trajectory, sweeps)) for s in scenes)

        @functools.lru_cache(maxsize=4)
        def city_with(place: str, count: int) -> dict[str, Any]:
            first = in_force(changes[place], LAST_DAY)[:count]
            return apply_changes(cities[place], first, first[-1].date)

        def city_on(place: str, date: str) -> dict[str, Any]:
            count = len(in_force(changes.get(place, ()), date))
            return city_with(place, count) if count else cities[place]

        with (
            ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 4)) as pool,
            tqdm(total=frames, unit="frame", disable=not progress) as bar,
        ):
            for scene in scenes:
                trajectory = scene.drive.trajectory
                place = trajectory.location
                call = scene.drive.render or (render if callable(render) else render[place])
                traffic = make_traffic(
                    city_on(place, trajectory.date), trajectory, seed * 1000 + scene.index, scene.drive.density
                )
                rig = log_rig(scene.vehicle, _log_seed(seed, scene)) if calibration_jitter else None
                writer = _SceneWriter(
                    part, tables, pool, scene, traffic, scenery[place], call, image_size, render_scale, rig
                )
                for _ in writer.write(sweeps, seed, tilt, slopes, localisation):
                    bar.update()
        for place in used:
            filename = write_map(cities[place], part, place)
            logs = [r["token"] for r in tables.rows["log"] if r["location"] == place]
            tables.add("map", place, category="semantic_prior", filename=filename, log_tokens=logs)
            if place in map_dates:
                write_changes(part, place, changes[place], map_dates[place])
        tables.finish()
        tables.write(part / version)
        if splits is not None:
            content = {split: list(members) for split, members in splits.items()}
            (part / version / "splits.json").write_text(json.dumps(content, indent=1))
    return out


def _map_date(place: str, scenes: Sequence[_Scene], changes: Sequence[Change]) -> str:
    """Return a day before all drives and changes of a location, which its map expansion then shows."""
    if foreign := [c.location for c in changes if c.location != place]:
        raise NmpError(f"changes of {foreign[0]!r} are given for {place}: list them under their own location")
    drives = [s.drive.trajectory.date for s in scenes if s.drive.trajectory.location == place]
    before = datetime.date.fromisoformat(min(c.date for c in changes)) - datetime.timedelta(days=1)
    return min(before.isoformat(), *drives)


def _log_seed(seed: int, scene: _Scene) -> int:
    """Return the seed of a log's calibration; drives of one log share it."""
    return int(hashlib.md5(f"{seed}:{scene.logfile}".encode()).hexdigest()[:8], 16)


@contextmanager
def _whole_or_absent(out: Path) -> Iterator[Path]:
    """Give a folder to write into that takes the name ``out`` only when everything in it was written.

    After an error nothing is left of it.
    """
    part = out.parent / f".{out.name}.partial"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        part.rename(out)
    except OSError as error:
        reason = error.strerror or error
        raise NmpError(f"cannot write {part} ({reason}): free some space; {out} was not made") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _schedule(drives: Sequence[Drive]) -> list[_Scene]:
    """Give every drive a scene name and a time of day; drives of one car, day and light share a log."""
    clock: dict[tuple[str, str, str, bool], datetime.datetime] = {}
    starts: dict[tuple[str, str, str, bool], datetime.datetime] = {}
    out = []
    for k, drive in enumerate(drives):
        place, date = drive.trajectory.location, drive.trajectory.date
        vehicle = drive.vehicle or vehicle_of(place)
        dark = "night" in drive.weather
        key = (place, date, vehicle, dark)
        if key not in clock:
            # Cities and cars start at different minutes, so that no two logs have one name.
            minute = 7 * len(clock) % 55
            day = datetime.datetime.fromisoformat(checked_date(date))
            starts[key] = clock[key] = day.replace(hour=20 if dark else 10, minute=minute, tzinfo=time_zone(place))
        stamp = starts[key].strftime("%Y-%m-%d-%H-%M-%S%z")
        begin = round(clock[key].timestamp() * 1e6)
        clock[key] += datetime.timedelta(seconds=drive.trajectory.duration_s + 60)
        out.append(_Scene(drive, drive.name or f"scene-{9000 + k:04d}", k, f"{vehicle}-{stamp}", vehicle, begin))
    names = [s.name for s in out]
    if len(set(names)) < len(names):
        raise NmpError("two drives have the same scene name: leave the names empty or make them different")
    return out


def _moments(trajectory: Trajectory, sweeps: bool) -> list[tuple[float, bool]]:
    """(start of a turn in s from the start of the drive, is a sample) for every set of six images."""
    per_sample = round(KEYFRAME_PERIOD_S / CAMERA_PERIOD_S)
    count = int((trajectory.duration_s - SAMPLE_STAMP_MS / 1000) / KEYFRAME_PERIOD_S + 1e-6) + 1
    if not sweeps:
        return [(k * KEYFRAME_PERIOD_S, True) for k in range(count)]
    total = (count - 1) * per_sample + 1
    return [(k * CAMERA_PERIOD_S, k % per_sample == 0) for k in range(total)]


class _SceneWriter:
    def __init__(
        self,
        root: Path,
        tables: Tables,
        pool: ThreadPoolExecutor,
        scene: _Scene,
        traffic: Traffic,
        scenery: Boxes,
        render: RenderCall,
        image_size: tuple[int, int],
        render_scale: float,
        rig: Sequence[Camera] | None,
    ) -> None:
        self.root, self.tables, self.pool = root, tables, pool
        self.scene, self.traffic, self.scenery, self.render = scene, traffic, scenery, render
        self.size = image_size
        self.render_size = (round(image_size[0] * render_scale), round(image_size[1] * render_scale))
        self.rig_name = scene.logfile if rig else scene.vehicle
        self.cameras = [_resized(c, image_size) for c in rig or nuscenes_rig(scene.vehicle)]

    def write(
        self, sweeps: bool, seed: int, tilt: bool, slopes: bool, localisation: LocalisationNoise | None
    ) -> Iterator[None]:
        """Render and write the scene; yields after every set of images."""
        scene, tables, trajectory = self.scene, self.tables, self.scene.drive.trajectory
        log = tables.add(
            "log",
            scene.logfile,
            logfile=scene.logfile,
            vehicle=scene.vehicle,
            date_captured=trajectory.date,
            location=trajectory.location,
        )
        scene_token = tables.token("scene", scene.name)
        calibrations = [tables.add_camera(self.rig_name, camera) for camera in self.cameras]
        sway = _Sway(np.random.default_rng([seed, scene.index, 5]) if tilt else None)
        road = _Sway(np.random.default_rng([seed, scene.index, 6]) if slopes else None)
        moments = _moments(trajectory, sweeps)
        keys = [t for t, is_key in moments if is_key]
        base = trajectory.times_s[0]
        samples = []
        for t in keys:
            stamp_s = t + SAMPLE_STAMP_MS / 1000
            sample = tables.add(
                "sample", f"{scene.name}:{t:.4f}", timestamp=scene.stamp_us(stamp_s), scene_token=scene_token
            )
            samples.append(sample)
            users, here = self.traffic.users_at(base + stamp_s), trajectory.at(base + stamp_s)
            tables.add_annotations(scene.name, sample, users, here[:2], ANNOTATED_M)
        driven: list[tuple[str, int, Array]] = []
        written: list[Future[None]] = []
        for k, (t, is_key) in enumerate(moments):
            # The devkit interpolates boxes between the sample before and the one that an image belongs to.
            owner = samples[int(np.searchsorted(keys, t - 1e-6))]
            shots = [t + FIRING_OFFSET_MS[c.name] / 1000 for c in self.cameras]
            as_if_flat = [sway.pose(trajectory.at(base + s), s) for s in shots]
            poses = [pose @ road.tilt(s) for pose, s in zip(as_if_flat, shots, strict=True)]
            images = self._draw(t, poses, (seed * 1000 + scene.index) * SEEDS_PER_DRIVE + k)
            for camera, calibration, s, pose, known, image in zip(
                self.cameras, calibrations, shots, poses, as_if_flat, images, strict=True
            ):
                stamp, channel = scene.stamp_us(s), camera.name.upper()
                folder = "samples" if is_key else "sweeps"
                filename = f"{folder}/{channel}/{scene.logfile}__{channel}__{stamp}.jpg"
                pose_token = tables.add_pose(f"{scene.name}:{channel}:{stamp}", stamp, pose)
                driven.append((pose_token, stamp, known))
                tables.add(
                    "sample_data",
                    f"{scene.name}:{channel}:{stamp}",
                    sample_token=owner,
                    ego_pose_token=pose_token,
                    calibrated_sensor_token=calibration,
                    timestamp=stamp,
                    fileformat="jpg",
                    is_key_frame=is_key,
                    height=self.size[1],
                    width=self.size[0],
                    filename=filename,
                )
                written.append(self.pool.submit(_save, self.root / filename, image, self.size))
            # Do not let rendering run far ahead of the disk.
            while len(written) > 120:
                written.pop(0).result()
            yield
        for future in written:
            future.result()
        if slopes or localisation is not None:
            tokens, stamps, known_poses = zip(*driven, strict=True)
            seconds = (np.array(stamps) - scene.start_us) / 1e6
            noise = localisation or LocalisationNoise(0.0, 0.0)
            believed, covariance = noise.apply(seconds, np.stack(known_poses), (seed, scene.index))
            if slopes:
                covariance = covariance + np.diag(np.square([0.0, 0.0, 0.0, SWAY_RAD, SWAY_RAD, 0.0]))
            for token, stamp, pose in zip(tokens, stamps, believed, strict=True):
                tables.add_pose_estimate(token, stamp, pose, covariance)
        tables.add(
            "scene",
            scene.name,
            log_token=log,
            nbr_samples=len(samples),
            first_sample_token=samples[0],
            last_sample_token=samples[-1],
            name=scene.name,
            description=describe(scene.drive),
        )

    def _draw(self, t: float, poses: list[Array], seed: int) -> NDArray[np.uint8]:
        base = self.scene.drive.trajectory.times_s[0]
        moving = self.traffic.at(base + t + FIRING_OFFSET_MS[ANCHOR_CAMERA] / 1000)
        boxes = nearest(Boxes.joined([moving, self.scenery]), poses[0][:2, 3], RENDERED_M, MAX_BOXES)
        cameras = [_resized(c, self.render_size) for c in self.cameras]
        images = self.render(
            np.stack([c.intrinsics for c in cameras]),
            np.stack([pose @ c.base_from_camera for pose, c in zip(poses, cameras, strict=True)]),
            boxes,
            size=self.render_size,
            weather=self.scene.drive.weather,
            seed=seed,
        )
        expected = (len(cameras), self.render_size[1], self.render_size[0], 3)
        if images.shape != expected or images.dtype != np.uint8:
            raise NmpError(f"the renderer returned {images.dtype} {images.shape}: expected uint8 {expected}")
        return images


def _resized(camera: Camera, size: tuple[int, int]) -> Camera:
    """Return the camera for images of another size; whole pixel coordinates are pixel centres."""
    scale = np.array([size[0] / camera.width, size[1] / camera.height])
    k = camera.intrinsics.copy()
    k[:2, :2] *= scale[:, None]
    k[:2, 2] = (k[:2, 2] + 0.5) * scale - 0.5
    return Camera(camera.name, size[0], size[1], k, camera.base_from_camera)


def _save(path: Path, rgb: NDArray[np.uint8], size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
    if (image.shape[1], image.shape[0]) != size:
        image = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
    if not cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]):
        raise NmpError(f"cannot write {path}: is the disk full?")


SWAY_RAD = math.radians(0.22 * math.sqrt(2))
"""standard deviation of a :class:`_Sway`: four waves, whose amplitudes have one of 0.22 degrees"""


class _Sway:
    """Pitch and roll that come and go: slow, and mostly under a degree."""

    def __init__(self, rng: np.random.Generator | None) -> None:
        self._waves = (
            []
            if rng is None
            else [(rng.normal(0, 0.22, 2), rng.uniform(0.05, 1.1), rng.uniform(0, 7, 2)) for _ in range(4)]
        )

    def tilt(self, t: float) -> Array:
        """Return the turn [4, 4] at a time (s)."""
        pitch, roll = np.radians(
            sum((a * np.sin(2 * np.pi * f * t + phase) for a, f, phase in self._waves), start=np.zeros(2))
        )
        out = np.eye(4)
        out[:3, :3] = Rotation.from_euler("YX", [pitch, roll]).as_matrix()
        return out

    def pose(self, xyyaw: Array, t: float) -> Array:
        """Return map_from_base for a planar pose at a time (s)."""
        out: Array = transform_from_xyyaw(*xyyaw) @ self.tilt(t)
        return out


def describe(drive: Drive) -> str:
    """Return the description of a scene in the words of nuScenes: weather first, then the manoeuvres."""
    words = [word.capitalize() for word in ("night", "rain") if word in drive.weather]
    poses = drive.trajectory.poses_xyyaw
    heading = np.unwrap(poses[:, 2])
    steps = np.hypot(*np.diff(poses[:, :2], axis=0).T)
    if LineString(poses[:, :2]).length < 3:
        words.append("wait")
    else:
        for sign, word in ((1, "turn left"), (-1, "turn right")):
            if (sign * (heading[-1] - heading[0])) > 0.8:
                words.append(word)
        if (steps < 0.02).mean() > 0.1:
            words.append("stop and go")
    words.append("dense traffic" if drive.density > 1.2 else "city streets")
    return ", ".join(words)
