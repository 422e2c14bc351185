"""The rig of a log: near the car's own calibration, different from log to log, the same for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from nmp.errors import NmpError
from nmp.frame import CAMERAS, Camera
from nmp.geometry import transform_from
from nmp_train.sim.rig import CENTRE_STD_PX, FOCAL_STD, POSITION_STD_M, ROTATION_STD_DEG, WORST, log_rig, nuscenes_rig

REAL = Path(__file__).resolve().parents[1] / ".." / "shared" / "real" / "frames" / "v1.0-mini"


def _difference(one: Camera, two: Camera) -> NDArray[np.float64]:
    """Rotation about each axis (degrees), shift (m), focal length (share), principal point (pixels): [9]."""
    turn = Rotation.from_matrix(one.base_from_camera[:3, :3].T @ two.base_from_camera[:3, :3]).as_rotvec(degrees=True)
    shift = two.base_from_camera[:3, 3] - one.base_from_camera[:3, 3]
    focal = two.intrinsics[0, 0] / one.intrinsics[0, 0] - 1
    return np.array([*turn, *shift, focal, *(two.intrinsics[:2, 2] - one.intrinsics[:2, 2])])


def test_logs_stray_by_what_is_promised() -> None:
    strays = []
    for vehicle in ("n008", "n015"):
        nominal = nuscenes_rig(vehicle)
        for seed in range(150):
            rig = log_rig(vehicle, seed)
            assert tuple(c.name for c in rig) == CAMERAS
            strays += [_difference(a, b) for a, b in zip(nominal, rig, strict=True)]
            for camera in rig:
                k = camera.intrinsics
                assert k[0, 0] == k[1, 1] and (camera.width, camera.height) == (1600, 900)
                assert np.allclose(camera.base_from_camera[:3, :3] @ camera.base_from_camera[:3, :3].T, np.eye(3))
    std = np.array([ROTATION_STD_DEG] * 3 + [POSITION_STD_M] * 3 + [FOCAL_STD] + [CENTRE_STD_PX] * 2)
    sigmas = np.array(strays) / std
    assert np.allclose(sigmas.std(axis=0), 1.0, atol=0.1)
    assert np.abs(sigmas.mean(axis=0)).max() < 0.1
    assert np.abs(sigmas).max() < WORST * 1.03  # the rotation vector is not quite the three angles


def test_the_same_log_has_the_same_rig() -> None:
    one, again, other, car = log_rig("n008", 4), log_rig("n008", 4), log_rig("n008", 5), log_rig("n015", 4)
    for a, b, c, d in zip(one, again, other, car, strict=True):
        assert np.array_equal(a.base_from_camera, b.base_from_camera) and np.array_equal(a.intrinsics, b.intrinsics)
        assert not np.allclose(a.base_from_camera, c.base_from_camera) and not np.allclose(a.intrinsics, d.intrinsics)
    assert not np.allclose(_difference(nuscenes_rig("n008")[0], one[0]), _difference(nuscenes_rig("n015")[0], car[0]))


def test_an_unknown_vehicle_is_named() -> None:
    with pytest.raises(NmpError, match="unknown vehicle 'n001'"):
        log_rig("n001", 0)


@pytest.mark.skipif(not REAL.exists(), reason="the real excerpts are not here")
def test_the_tables_are_the_real_cars() -> None:
    sensors = {row["token"]: row["channel"].lower() for row in json.loads((REAL / "sensor.json").read_text())}
    rows = json.loads((REAL / "calibrated_sensor.json").read_text())
    seen = [r for r in rows if r["camera_intrinsic"]]
    assert len(seen) == 12
    for row in seen:
        w, x, y, z = row["rotation"]
        pose = transform_from(np.array(row["translation"]), np.array([x, y, z, w]))
        name = sensors[row["sensor_token"]]
        real = Camera(name, 1600, 900, np.array(row["camera_intrinsic"]), pose)
        ours = [nuscenes_rig(vehicle)[CAMERAS.index(name)] for vehicle in ("n008", "n015")]
        assert min(np.abs(_difference(camera, real)).max() for camera in ours) < 1e-3
