"""The thirteen tables of a nuScenes data set, filled row by row."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmp.frame import Camera
from nmp.geometry import quaternion_of
from nmp_train.sim.traffic import RoadUsers
from nmp_train.sim.vehicles import CATEGORIES

Array = NDArray[np.float64]

TABLES = (
    "category",
    "attribute",
    "visibility",
    "instance",
    "sensor",
    "calibrated_sensor",
    "ego_pose",
    "log",
    "scene",
    "sample",
    "sample_data",
    "sample_annotation",
    "map",
)
_ATTRIBUTES = (
    "vehicle.moving",
    "vehicle.stopped",
    "vehicle.parked",
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.moving",
    "pedestrian.standing",
)
_VISIBILITY = ("v0-40", "v40-60", "v60-80", "v80-100")


class Tables:
    """Rows by table; tokens depend only on the seed and on the name of the thing."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
        self.estimates: list[dict[str, Any]] = []
        """rows of ego_pose_estimate, which is no table of nuScenes"""
        self._known: set[str] = set()
        for name in CATEGORIES:
            self.add("category", name, name=name, description="")
        for name in _ATTRIBUTES:
            self.add("attribute", name, name=name, description="")
        for k, level in enumerate(_VISIBILITY):
            self.rows["visibility"].append({"token": str(k + 1), "level": level, "description": ""})

    def token(self, table: str, name: str) -> str:
        """Return the token of a named thing."""
        return hashlib.md5(f"{self._seed}:{table}:{name}".encode()).hexdigest()

    def add(self, table: str, key: str, **row: Any) -> str:
        """Add a row and return its token; a row that is there already stays as it is."""
        token = self.token(table, key)
        if token not in self._known:
            self._known.add(token)
            self.rows[table].append({"token": token, **row})
        return token

    def add_camera(self, rig: str, camera: Camera) -> str:
        """Add the sensor and its calibration in a rig (its name); return the token of the calibration."""
        sensor = self.add("sensor", camera.name, channel=camera.name.upper(), modality="camera")
        return self.add(
            "calibrated_sensor",
            f"{rig}:{camera.name}",
            sensor_token=sensor,
            translation=camera.base_from_camera[:3, 3].tolist(),
            rotation=_wxyz(camera.base_from_camera),
            camera_intrinsic=camera.intrinsics.tolist(),
        )

    def add_pose(self, name: str, stamp_us: int, map_from_base: Array) -> str:
        """Add an ego pose; return its token."""
        return self.add(
            "ego_pose",
            name,
            timestamp=stamp_us,
            rotation=_wxyz(map_from_base),
            translation=map_from_base[:3, 3].tolist(),
        )

    def add_pose_estimate(self, pose: str, stamp_us: int, map_from_base: Array, covariance: Array) -> None:
        """Add what the car believed its ego pose (a token) to be, with the covariance [6, 6] of nav_msgs/Odometry."""
        self.estimates.append(
            {
                "token": pose,
                "timestamp": stamp_us,
                "rotation": _wxyz(map_from_base),
                "translation": map_from_base[:3, 3].tolist(),
                "covariance": covariance.reshape(36).tolist(),
            }
        )

    def add_annotations(self, scene: str, sample: str, users: RoadUsers, ego_xy: Array, reach_m: float) -> None:
        """Annotate the road users within ``reach_m`` of the ego in a sample (a token)."""
        distance = np.hypot(*(users.xyyaw[:, :2] - ego_xy).T)
        for k in np.flatnonzero(distance < reach_m):
            make, size = users.fleet.makes[k], users.fleet.size[k]
            speed = float(np.hypot(*users.velocity[k]))
            if make.category in ("vehicle.motorcycle", "vehicle.bicycle"):
                attribute = "cycle.without_rider" if users.parked[k] else "cycle.with_rider"
            elif make.category.startswith("movable_object"):
                attribute = ""
            elif make.category.startswith("human"):
                attribute = "pedestrian.moving" if speed > 0.2 else "pedestrian.standing"
            elif users.parked[k]:
                attribute = "vehicle.parked"
            else:
                attribute = "vehicle.moving" if speed > 0.2 else "vehicle.stopped"
            x, y, yaw = users.xyyaw[k]
            instance = self.token("instance", f"{scene}:{users.instance[k]}")
            self.add("instance", f"{scene}:{users.instance[k]}", category_token=self.token("category", make.category))
            self.add(
                "sample_annotation",
                f"{sample}:{users.instance[k]}",
                sample_token=sample,
                instance_token=instance,
                visibility_token="4",
                attribute_tokens=[self.token("attribute", attribute)] if attribute else [],
                translation=[float(x), float(y), float(size[2] / 2)],
                size=[float(size[1]), float(size[0]), float(size[2])],
                rotation=[float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))],
                # There is no LIDAR; a plausible count keeps tools from dropping the box as unseen.
                num_lidar_pts=int(3000 * size[1] * size[2] / max(float(distance[k]), 3.0) ** 2) + 1,
                num_radar_pts=0,
            )

    def finish(self) -> None:
        """Link the rows that follow each other in time, and count them."""
        by_sensor: dict[str, list[dict[str, Any]]] = {}
        by_instance: dict[str, list[dict[str, Any]]] = {}
        samples = {row["token"]: row for row in self.rows["sample"]}
        for row in self.rows["sample_data"]:
            key = samples[row["sample_token"]]["scene_token"] + row["calibrated_sensor_token"]
            by_sensor.setdefault(key, []).append(row)
        for row in self.rows["sample_annotation"]:
            by_instance.setdefault(row["instance_token"], []).append(row)
        by_scene: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows["sample"]:
            by_scene.setdefault(row["scene_token"], []).append(row)
        for chain in by_sensor.values():
            _link(sorted(chain, key=lambda r: r["timestamp"]))
        for chain in by_instance.values():
            _link(sorted(chain, key=lambda r: samples[r["sample_token"]]["timestamp"]))
        for chain in by_scene.values():
            _link(sorted(chain, key=lambda r: r["timestamp"]))
        for row in self.rows["instance"]:
            seen = sorted(by_instance[row["token"]], key=lambda r: samples[r["sample_token"]]["timestamp"])
            row["nbr_annotations"] = len(seen)
            row["first_annotation_token"], row["last_annotation_token"] = seen[0]["token"], seen[-1]["token"]

    def write(self, folder: Path) -> None:
        """Write one JSON file per table, and ``ego_pose_estimate.json`` when there are estimates."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in TABLES:
            (folder / f"{name}.json").write_text(json.dumps(self.rows[name], indent=0))
        if self.estimates:
            (folder / "ego_pose_estimate.json").write_text(json.dumps(self.estimates, indent=0))


def _link(rows: list[dict[str, Any]]) -> None:
    for k, row in enumerate(rows):
        row["prev"] = rows[k - 1]["token"] if k else ""
        row["next"] = rows[k + 1]["token"] if k + 1 < len(rows) else ""


def _wxyz(transform: Array) -> list[float]:
    x, y, z, w = quaternion_of(transform)
    return [float(w), float(x), float(y), float(z)]
