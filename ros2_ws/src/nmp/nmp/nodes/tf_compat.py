"""The functions of ``tf_transformations`` that are used here, for machines where that package is missing.

Same names, same conventions (quaternions [x, y, z, w], angles in rad, static axes "sxyz", 4 x 4 matrices), over
the same library, transforms3d.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from transforms3d import euler, quaternions

from nmp.geometry import Array


def _to_xyzw(wxyz: Any) -> Array:
    return np.roll(np.asarray(wxyz, dtype=np.float64), -1)


def _to_wxyz(xyzw: ArrayLike) -> Array:
    return np.roll(np.asarray(xyzw, dtype=np.float64), 1)


def _homogeneous(rotation: ArrayLike) -> Array:
    out = np.eye(4)
    out[:3, :3] = rotation
    return out


def quaternion_from_euler(ai: float, aj: float, ak: float, axes: str = "sxyz") -> Array:
    """Return the quaternion of three Euler angles (rad)."""
    return _to_xyzw(euler.euler2quat(ai, aj, ak, axes))


def euler_from_quaternion(quaternion: ArrayLike, axes: str = "sxyz") -> tuple[float, float, float]:
    """Return the three Euler angles (rad) of a quaternion."""
    ai, aj, ak = euler.quat2euler(_to_wxyz(quaternion), axes)
    return float(ai), float(aj), float(ak)


def quaternion_matrix(quaternion: ArrayLike) -> Array:
    """Return the 4 x 4 rotation of a quaternion."""
    return _homogeneous(quaternions.quat2mat(_to_wxyz(quaternion)))


def quaternion_from_matrix(matrix: ArrayLike) -> Array:
    """Return the quaternion of a 4 x 4 transform's rotation."""
    return _to_xyzw(quaternions.mat2quat(np.asarray(matrix, dtype=np.float64)[:3, :3]))


def quaternion_multiply(quaternion1: ArrayLike, quaternion0: ArrayLike) -> Array:
    """Return the product of two quaternions: first ``quaternion0``, then ``quaternion1``."""
    return _to_xyzw(quaternions.qmult(_to_wxyz(quaternion1), _to_wxyz(quaternion0)))


def euler_matrix(ai: float, aj: float, ak: float, axes: str = "sxyz") -> Array:
    """Return the 4 x 4 rotation of three Euler angles (rad)."""
    return _homogeneous(euler.euler2mat(ai, aj, ak, axes))


def euler_from_matrix(matrix: ArrayLike, axes: str = "sxyz") -> tuple[float, float, float]:
    """Return the three Euler angles (rad) of a 4 x 4 transform's rotation."""
    ai, aj, ak = euler.mat2euler(np.asarray(matrix, dtype=np.float64)[:3, :3], axes)
    return float(ai), float(aj), float(ak)
