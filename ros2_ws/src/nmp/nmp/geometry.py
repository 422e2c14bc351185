"""Rigid transforms, the BEV region and its pixel grid.

Conventions: SI units, ego x forward, y left, z up (REP-103). A transform ``a_from_b`` is a 4 x 4 float64
matrix that takes homogeneous points in frame ``b`` to frame ``a``. Quaternions are [x, y, z, w].
Cameras use the optical frame: x right, y down, z forward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from nmp.errors import NmpError

Array = NDArray[np.float64]


def distances_along(points: Array) -> Array:
    """Return how far along a polyline [N, 2] (m) each of its points lies [N], m."""
    return np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])


def points_along(points: Array, distances: Array, at: ArrayLike) -> Array:
    """Return the points [..., 2] at places ``at`` [...] of a polyline [N, 2] whose points lie at ``distances`` [N]."""
    return np.stack([np.interp(np.asarray(at), distances, points[:, axis]) for axis in (0, 1)], axis=-1)


def transform_from(translation: Array, quaternion_xyzw: Array) -> Array:
    """Return the 4 x 4 transform of a translation [3] (m) and a quaternion [x, y, z, w].

    Raises :class:`NmpError` when a number is not finite or the quaternion has no length.
    """
    t = np.asarray(translation, dtype=np.float64)
    q = np.asarray(quaternion_xyzw, dtype=np.float64)
    if not (np.isfinite(t).all() and np.isfinite(q).all()):
        raise NmpError(f"pose is not finite (translation {t.tolist()}, rotation {q.tolist()}): check the localisation")
    if np.linalg.norm(q) < 1e-6:
        raise NmpError("pose has a zero quaternion: check the localisation")
    out = np.eye(4)
    out[:3, :3] = Rotation.from_quat(q).as_matrix()
    out[:3, 3] = t
    return out


def quaternion_of(transform: Array) -> Array:
    """Return the rotation of a 4 x 4 transform as a quaternion [x, y, z, w] with w >= 0."""
    q = Rotation.from_matrix(transform[:3, :3]).as_quat()
    return np.asarray(q if q[3] >= 0 else -q, dtype=np.float64)


def yaw_of(transform: Array) -> float:
    """Return the heading (rad) of a transform: the angle of its x axis in the parent's xy plane."""
    return float(np.arctan2(transform[1, 0], transform[0, 0]))


def transform_from_xyyaw(x: float, y: float, yaw: float) -> Array:
    """Return the planar 4 x 4 transform at x, y (m) with heading yaw (rad) and z = 0."""
    c, s = np.cos(yaw), np.sin(yaw)
    out = np.eye(4)
    out[:2, :2] = [[c, -s], [s, c]]
    out[:2, 3] = [x, y]
    return out


def flatten_to_plane(transform: Array) -> Array:
    """Return the planar part (x, y, yaw) of a pose: the frame in which BEV layers are drawn."""
    return transform_from_xyyaw(transform[0, 3], transform[1, 3], yaw_of(transform))


def inverse(transform: Array) -> Array:
    """Return the inverse of a rigid 4 x 4 transform."""
    out = np.eye(4)
    out[:3, :3] = transform[:3, :3].T
    out[:3, 3] = -transform[:3, :3].T @ transform[:3, 3]
    return out


def interpolate(first: Array, second: Array, fraction: float) -> Array:
    """Return the pose between two poses: linear in translation, shortest arc in rotation.

    ``fraction`` 0 gives ``first``, 1 gives ``second``.
    """
    out = np.eye(4)
    out[:3, 3] = (1 - fraction) * first[:3, 3] + fraction * second[:3, 3]
    relative = Rotation.from_matrix(first[:3, :3].T @ second[:3, :3]).as_rotvec()
    out[:3, :3] = first[:3, :3] @ Rotation.from_rotvec(fraction * relative).as_matrix()
    return out


@dataclass(frozen=True)
class BevGrid:
    """A rectangle around the ego, cut into square cells.

    Arrays over the grid are [..., rows, cols]: row 0 is the right edge (y = -width / 2), column 0 the rear
    edge (x = -length / 2); rows grow to the left (y), columns grow forward (x). The same order as
    nav_msgs/OccupancyGrid data (x fastest) with the origin at the rear right corner.
    """

    length: float = 60.0
    """extent along x, m"""
    width: float = 30.0
    """extent along y, m"""
    resolution: float = 0.15
    """edge of a cell, m"""

    @property
    def rows(self) -> int:
        return round(self.width / self.resolution)

    @property
    def cols(self) -> int:
        return round(self.length / self.resolution)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def reach(self) -> float:
        """How far the corners are from the ego, m."""
        return math.hypot(self.length, self.width) / 2

    def with_resolution(self, resolution: float) -> BevGrid:
        """Return the same rectangle with another cell size (m)."""
        return BevGrid(self.length, self.width, resolution)

    def centres(self) -> Array:
        """Return the cell centres as [rows, cols, 2] = (x, y) in the ego frame, m."""
        x = (np.arange(self.cols) + 0.5) * self.resolution - self.length / 2
        y = (np.arange(self.rows) + 0.5) * self.resolution - self.width / 2
        return np.stack(np.meshgrid(x, y), axis=-1)
