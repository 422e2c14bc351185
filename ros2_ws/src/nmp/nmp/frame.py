"""What goes into the mapper and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nmp.geometry import Array, BevGrid

CLASSES: tuple[str, ...] = ("divider", "crossing", "boundary")
"""The semantic layers, in the order of every class axis in this project."""

CAMERAS: tuple[str, ...] = (
    "cam_front",
    "cam_front_right",
    "cam_back_right",
    "cam_back",
    "cam_back_left",
    "cam_front_left",
)
"""The six cameras of the nuScenes rig, clockwise from the front; also their topic prefixes."""

ANCHOR_CAMERA = "cam_front"
"""The camera whose stamp and ego pose stand for the whole frame."""

IMAGE_FORMATS = ("JPEG", "PNG")
"""Of encoded images. No decoder of another format is given what comes from outside."""

UNSTATED_STD = (0.5, 0.02)
"""How far a pose may be off, m and rad, where nobody says: standard deviations."""

CAR_LENGTH, CAR_WIDTH, REAR_OVERHANG = 4.6, 1.9, 1.0
"""Of the car in pictures, m; base_link is at the rear axle. Nothing is computed with them."""

LOCATIONS: tuple[str, ...] = (
    "singapore-onenorth",
    "singapore-hollandvillage",
    "singapore-queenstown",
    "boston-seaport",
)
"""The cities of nuScenes: each has a map frame of its own."""


def car_outline() -> Array:
    """Return the car in pictures as a polygon [5, 2] in ``base_link``, m; its third corner is the nose."""
    rear, front, half = -REAR_OVERHANG, CAR_LENGTH - REAR_OVERHANG, CAR_WIDTH / 2
    return np.array([(rear, half), (front - 0.9, half), (front, 0.0), (front - 0.9, -half), (rear, -half)])


@dataclass(frozen=True)
class Camera:
    """Calibration of one camera."""

    name: str
    width: int
    """pixels"""
    height: int
    """pixels"""
    intrinsics: Array
    """[3, 3] pinhole matrix, pixels"""
    base_from_camera: Array
    """[4, 4] extrinsics: optical frame to base_link"""


@dataclass(frozen=True)
class CameraShot:
    """One image with the pose of the car at the moment that it was taken."""

    camera: Camera
    stamp_ns: int
    image: bytes | NDArray[np.uint8]
    """encoded JPEG/PNG bytes, or decoded RGB [height, width, 3]"""
    map_from_base: Array
    """[4, 4] ego pose at ``stamp_ns``"""


@dataclass(frozen=True)
class Frame:
    """The images of one moment, and where the car was."""

    stamp_ns: int
    """stamp of the anchor camera"""
    location: str
    """the city, which names the map frame and the prior"""
    map_from_base: Array
    """[4, 4] ego pose at ``stamp_ns``"""
    shots: tuple[CameraShot, ...]
    """one per camera that delivered, the anchor among them, in the order of ``CAMERAS``"""
    position_std: float = 0.0
    """standard deviation of the ego position, m"""
    yaw_std: float = 0.0
    """standard deviation of the heading, rad"""
    keyframe: bool = True
    """may not be left out when there is more to map than time; others make way for newer ones"""


@dataclass(frozen=True)
class LocalMap:
    """The layers around the car at one frame."""

    stamp_ns: int
    location: str
    map_from_base: Array
    """[4, 4] ego pose; the layers lie in its planar part (x, y, yaw)"""
    grid: BevGrid
    probabilities: NDArray[np.float32]
    """[3, rows, cols] in 0..1, in the order of ``CLASSES``"""
    evidence: NDArray[np.float32]
    """[rows, cols] accumulated evidence under each cell; 0 where nothing was ever seen"""

    @property
    def masks(self) -> NDArray[np.uint8]:
        """[3, rows, cols] uint8: 1 where a class is more likely present than not."""
        return (self.probabilities > 0.5).astype(np.uint8)
