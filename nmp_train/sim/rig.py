"""The six cameras of the nuScenes cars, as calibrated, and when they fire."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.spatial.transform import Rotation

from nmp.errors import NmpError
from nmp.frame import CAMERAS, Camera
from nmp.geometry import Array, transform_from

IMAGE_SIZE = (1600, 900)
"""width, height of the original images, pixels"""

FIRING_OFFSET_MS: dict[str, float] = {
    "cam_front_left": 7.0,
    "cam_front": 15.0,
    "cam_front_right": 22.0,
    "cam_back_right": 31.0,
    "cam_back": 40.0,
    "cam_back_left": 49.0,
}
"""When each camera fires: as the turning LIDAR passes its direction, after the start of the LIDAR's turn, ms."""

SAMPLE_STAMP_MS = 50.0
"""nuScenes stamps a sample with the end of that turn: this long after its start, ms."""

CAMERA_PERIOD_S = 1 / 12
"""time between images of one camera"""

KEYFRAME_PERIOD_S = 0.5
"""time between samples"""

# How much one car's calibration differs from log to log (standard deviations). The cameras of the two cars below
# differ by about 1.3 degrees, 3 cm, 0.7 % and 20 pixels: more, because they were mounted twice.
ROTATION_STD_DEG = 0.5
"""about each axis of a camera, degrees"""
POSITION_STD_M = 0.015
FOCAL_STD = 0.005
"""share of the focal length"""
CENTRE_STD_PX = 8.0
"""of the principal point, pixels at ``IMAGE_SIZE``"""
WORST = 2.5
"""nothing strays farther than this many standard deviations"""

# Per vehicle and camera: translation (m), rotation [w x y z], focal length and principal point (pixels at 1600 x 900).
_Row = tuple[tuple[float, float, float], tuple[float, float, float, float], tuple[float, float, float]]
_RIGS: dict[str, dict[str, _Row]] = {
    "n015": {
        "cam_front": (
            (1.700791, 0.015946, 1.510958),
            (0.499801543, -0.503031616, 0.499779811, -0.497370838),
            (1266.4172, 816.267, 491.5071),
        ),
        "cam_front_right": (
            (1.550848, -0.493405, 1.495748),
            (0.206034797, -0.202694058, 0.682450782, -0.671361088),
            (1260.8474, 807.9682, 495.3344),
        ),
        "cam_back_right": (
            (1.014878, -0.480568, 1.562395),
            (0.122809801, -0.132400843, -0.700430582, 0.690496031),
            (1259.5137, 807.2529, 501.1958),
        ),
        "cam_back": (
            (0.028326, 0.003451, 1.579103),
            (0.503787267, -0.497402498, -0.494185022, 0.50454961),
            (809.221, 829.2196, 481.7784),
        ),
        "cam_back_left": (
            (1.035691, 0.484795, 1.59097),
            (0.692418559, -0.703161942, -0.116483428, 0.112033179),
            (1256.7415, 792.1126, 492.7757),
        ),
        "cam_front_left": (
            (1.523878, 0.494631, 1.509328),
            (0.675726503, -0.673626652, 0.21214015, -0.211228271),
            (1272.5979, 826.6155, 479.7517),
        ),
    },
    "n008": {
        "cam_front": (
            (1.722006, 0.004755, 1.494913),
            (0.507724139, -0.497339223, 0.498371675, -0.496483201),
            (1252.8131, 826.5881, 469.9847),
        ),
        "cam_front_right": (
            (1.580826, -0.499079, 1.517494),
            (0.203351738, -0.191463332, 0.678571004, -0.679360917),
            (1256.7485, 817.7888, 451.9542),
        ),
        "cam_back_right": (
            (1.059452, -0.467203, 1.550509),
            (0.138191877, -0.137967182, -0.689332994, 0.697630336),
            (1249.9629, 825.3768, 462.5482),
        ),
        "cam_back": (
            (0.055246, 0.010788, 1.567943),
            (0.506799734, -0.497756702, -0.498784993, 0.496594226),
            (796.8911, 857.7774, 476.8849),
        ),
        "cam_back_left": (
            (1.04852, 0.483058, 1.562102),
            (0.70486203, -0.69073068, -0.11209092, 0.116173457),
            (1254.9861, 829.5769, 467.1681),
        ),
        "cam_front_left": (
            (1.575256, 0.500519, 1.50696),
            (0.681208853, -0.668750717, 0.210170245, -0.211081611),
            (1257.8625, 827.2411, 450.9155),
        ),
    },
}


def nuscenes_rig(vehicle: str = "n015") -> tuple[Camera, ...]:
    """Return the cameras of a nuScenes car, n008 (Boston) or n015 (Singapore), in the order of ``CAMERAS``."""
    if vehicle not in _RIGS:
        raise NmpError(f"unknown vehicle {vehicle!r}: the rigs are {', '.join(sorted(_RIGS))}")
    return tuple(_camera(name, *_RIGS[vehicle][name]) for name in CAMERAS)


def vehicle_of(location: str) -> str:
    """Return the car that drove in a city: n008 in Boston, n015 in Singapore."""
    return "n008" if location.startswith("boston") else "n015"


def log_rig(vehicle: str, seed: int) -> tuple[Camera, ...]:
    """Return the cameras of a nuScenes car as if it had been calibrated anew for one log.

    Each camera is turned, moved and refocused a little around :func:`nuscenes_rig`; the same (vehicle, seed) gives
    the same rig. Raises :class:`NmpError` for an unknown vehicle.
    """
    rng = np.random.default_rng((seed, 31, *vehicle.encode()))

    def stray(std: float, count: int) -> Array:
        return np.asarray(std * np.clip(rng.normal(size=count), -WORST, WORST))

    cameras = []
    for camera in nuscenes_rig(vehicle):
        pose, intrinsics = camera.base_from_camera.copy(), camera.intrinsics.copy()
        pose[:3, :3] = pose[:3, :3] @ Rotation.from_euler("xyz", stray(ROTATION_STD_DEG, 3), degrees=True).as_matrix()
        pose[:3, 3] += stray(POSITION_STD_M, 3)
        intrinsics[[0, 1], [0, 1]] *= 1 + stray(FOCAL_STD, 1)
        intrinsics[:2, 2] += stray(CENTRE_STD_PX, 2)
        cameras.append(replace(camera, intrinsics=intrinsics, base_from_camera=pose))
    return tuple(cameras)


def _camera(
    name: str,
    translation: tuple[float, float, float],
    wxyz: tuple[float, float, float, float],
    lens: tuple[float, float, float],
) -> Camera:
    focal, cx, cy = lens
    intrinsics = np.array([[focal, 0.0, cx], [0.0, focal, cy], [0.0, 0.0, 1.0]])
    w, x, y, z = wxyz
    pose = transform_from(np.array(translation), np.array([x, y, z, w]))
    return Camera(name, *IMAGE_SIZE, intrinsics, pose)
