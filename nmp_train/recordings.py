"""The keyframes of a nuScenes folder, real or simulated, read from its tables without the devkit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nmp.errors import NmpError
from nmp.frame import ANCHOR_CAMERA, CAMERAS, Camera
from nmp.geometry import Array, transform_from

Row = dict[str, Any]


@dataclass(frozen=True)
class Shot:
    """One image of a keyframe, as the tables have it."""

    path: Path
    camera: Camera
    stamp_ns: int
    translation: tuple[float, ...]
    """ego pose when it was taken: x, y, z, m"""
    rotation: tuple[float, ...]
    """w, x, y, z"""
    pose_token: str
    """of this ego pose"""

    @property
    def map_from_base(self) -> Array:
        """[4, 4] ego pose when it was taken."""
        w, x, y, z = self.rotation
        return transform_from(np.array(self.translation), np.array([x, y, z, w]))


@dataclass(frozen=True)
class Sample:
    """One keyframe: an image of each camera."""

    token: str
    scene: str
    location: str
    weather: str
    """as :func:`weather_of`"""
    shots: tuple[Shot, ...]
    """in the order of ``CAMERAS``"""

    @property
    def anchor(self) -> Shot:
        """The shot whose time and pose stand for the sample."""
        return self.shots[CAMERAS.index(ANCHOR_CAMERA)]


def read_samples(dataroot: Path, version: str, scenes: Sequence[str] | None = None) -> list[Sample]:
    """Read the keyframes of scenes (all by default) from the tables, in the order of scenes and time.

    Keyframes that lack a camera are left out. Plain JSON: the devkit is not needed. Rows that are not needed are
    dropped while they are read: the tables of the whole nuScenes hold millions.

    Raises :class:`NmpError` for tables or scenes that are missing or damaged.
    """
    folder = Path(dataroot) / version
    if not folder.is_dir():
        raise NmpError(f"{dataroot} has no tables '{version}': check dataroot and version")
    try:
        chosen = {r["token"]: r for r in _table(folder, "scene") if scenes is None or r["name"] in scenes}
        if lost := sorted(set(scenes or ()) - {r["name"] for r in chosen.values()}):
            more = f" (one of {len(lost)})" if len(lost) > 1 else ""
            raise NmpError(f"{folder} has no {lost[0]}{more}: choose a split of this data set")
        logs = {r["token"]: r["location"] for r in _table(folder, "log")}
        channels = {r["token"]: r["channel"].lower() for r in _table(folder, "sensor")}
        calibrations = {r["token"]: r for r in _table(folder, "calibrated_sensor")}
        samples = {r["token"]: r for r in _table(folder, "sample") if r["scene_token"] in chosen}
        cameras = {t for t, r in calibrations.items() if channels[r["sensor_token"]] in CAMERAS}
        images = _table(
            folder,
            "sample_data",
            lambda r: r["is_key_frame"] and r["sample_token"] in samples and r["calibrated_sensor_token"] in cameras,
        )
        used = {r["ego_pose_token"] for r in images}
        poses = {r["token"]: r for r in _table(folder, "ego_pose", lambda r: r["token"] in used)}
        shots: dict[str, dict[str, Shot]] = {token: {} for token in samples}
        built: dict[tuple[str, int, int], Camera] = {}
        for r in images:
            key = (r["calibrated_sensor_token"], int(r["width"]), int(r["height"]))
            if key not in built:
                calibration = calibrations[key[0]]
                built[key] = _camera(channels[calibration["sensor_token"]], calibration, key[1], key[2])
            pose = poses[r["ego_pose_token"]]
            shots[r["sample_token"]][built[key].name] = Shot(
                Path(dataroot) / r["filename"],
                built[key],
                int(r["timestamp"]) * 1000,
                tuple(float(v) for v in pose["translation"]),
                tuple(float(v) for v in pose["rotation"]),
                pose["token"],
            )
        out = []
        for token, sample in samples.items():
            if len(shots[token]) == len(CAMERAS):
                scene = chosen[sample["scene_token"]]
                place, weather = logs[scene["log_token"]], weather_of(scene["description"])
                taken = tuple(shots[token][name] for name in CAMERAS)
                out.append(Sample(token, scene["name"], place, weather, taken))
    except (KeyError, TypeError, ValueError) as error:
        raise NmpError(
            f"{folder} does not hold the tables of a nuScenes data set ({error!r}): unpack it again"
        ) from error
    if not out:
        raise NmpError(f"{folder} has no keyframe with all six cameras in the scenes that were chosen: choose others")
    return sorted(out, key=lambda s: (s.scene, s.anchor.stamp_ns))


def _table(folder: Path, name: str, keep: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    path = folder / f"{name}.json"
    try:
        rows = json.loads(path.read_text(), object_hook=lambda row: row if keep(row) else None)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise NmpError(f"cannot read {path} ({reason}): unpack the tables of the data set again") from error
    return [row for row in rows if row is not None]


def _camera(name: str, calibration: Mapping[str, Any], width: int, height: int) -> Camera:
    w, x, y, z = calibration["rotation"]
    pose = transform_from(np.array(calibration["translation"]), np.array([x, y, z, w]))
    return Camera(name, width, height, np.asarray(calibration["camera_intrinsic"], dtype=np.float64), pose)


def weather_of(description: str) -> str:
    """Return day, rain, night or night rain for the description of a scene in the words of nuScenes."""
    # Only at the beginning of a word: some scenes pass trains.
    night, rain = (re.search(rf"\b{word}", description, re.IGNORECASE) for word in ("night", "rain"))
    return " ".join(word for word, found in (("night", night), ("rain", rain)) if found) or "day"


def weather_rows(weather: str) -> list[str]:
    """Return what scores of a weather are filed under: a rainy night is night, rain, and a row of its own."""
    return list(dict.fromkeys([*weather.split(), weather]))
