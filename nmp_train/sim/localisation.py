"""What a car believes its pose to be: the truth with a slow drift and a little white noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from nmp.errors import NmpError

Array = NDArray[np.float64]

MAX_POSITION_M = 1.0
MAX_ANGLE_RAD = float(np.radians(2.0))
WHITE = 0.1
"""share of the deviation that is new at every moment"""
TILT = 0.2
"""pitch and roll are known this much better than the heading: gravity shows them"""


@dataclass(frozen=True)
class LocalisationNoise:
    """Errors of x, y, roll, pitch and yaw about the axes of the map; the height stays exact.

    Every error is a first-order Gauss-Markov process, which starts anew with every drive and is stationary from its
    start, plus white noise of a tenth of its size.
    """

    position_m: float = 0.1
    """standard deviation of x and of y, m; up to 1"""
    angle_rad: float = 0.01
    """standard deviation of the heading, rad; up to 2 degrees"""
    drift_time_s: float = 30.0
    """after this time the drift has forgotten all but 1/e of what it was"""

    def __post_init__(self) -> None:
        for name, value, limit in (
            ("position_m", self.position_m, MAX_POSITION_M),
            ("angle_rad", self.angle_rad, MAX_ANGLE_RAD),
        ):
            if not 0 <= value <= limit + 1e-9:
                raise NmpError(f"localisation noise {name} = {value:g} is out of range: choose 0 to {limit:.4g}")
        if not 0 < self.drift_time_s < np.inf:
            raise NmpError(f"localisation drift_time_s = {self.drift_time_s:g} is out of range: choose more than 0 s")

    @property
    def covariance(self) -> Array:
        """[6, 6] of x, y, z (m), roll, pitch, yaw (rad), as in nav_msgs/Odometry."""
        p, a = self.position_m, self.angle_rad
        return np.diag(np.square([p, p, 0.0, TILT * a, TILT * a, a]))

    def apply(self, times_s: Array, map_from_base: Array, seed: int | Sequence[int]) -> tuple[Array, Array]:
        """Return the believed poses [N, 4, 4] of one drive, and the covariance [6, 6] of each of them.

        :param times_s: [N] in any order; poses of one moment have one error
        :param map_from_base: [N, 4, 4] true poses
        """
        times, moment = np.unique(np.asarray(times_s, dtype=np.float64), return_inverse=True)
        if map_from_base.shape != (len(moment), 4, 4):
            raise NmpError(f"{len(moment)} times do not go with poses of shape {map_from_base.shape}: give [N, 4, 4]")
        rng = np.random.default_rng([*np.atleast_1d(seed).tolist(), 6])
        fresh, white = rng.standard_normal((2, len(times), 5))
        keep = np.exp(-np.diff(times) / self.drift_time_s)
        drift = fresh.copy()
        for k, a in enumerate(keep):
            drift[k + 1] = a * drift[k] + np.sqrt(1 - a * a) * fresh[k + 1]
        unit = np.sqrt(1 - WHITE**2) * drift + WHITE * white
        a = self.angle_rad
        error = (unit * [self.position_m, self.position_m, TILT * a, TILT * a, a])[moment]
        out = np.array(map_from_base, dtype=np.float64)
        out[:, :2, 3] += error[:, :2]
        out[:, :3, :3] = Rotation.from_rotvec(error[:, 2:]).as_matrix() @ out[:, :3, :3]
        return out, self.covariance
