"""How far the given poses are off the stored map, followed from frame to frame.

A localisation drifts: what it was wrong by half a second ago it is wrong by now, nearly. So what the pose search found
(:mod:`nmp.model.fusion.align`) is not forgotten with the frame: a Kalman filter carries it on, and the search has to
find only what is new.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nmp.frame import Frame
from nmp.geometry import Array
from nmp.model.fusion.align import ALIKE, MAP_AS_WELL

DRIFT_TIME_S = 20.0
"""after so long an error of the localisation is another one, but for 1/e of it"""
FRESH = 0.1
"""share of the variance of a pose's error that is new with every frame, at least: until it is found to be more"""
FRAMES = 8.0
"""of which that is the mean"""


class Believed(NamedTuple):
    """Where a car is taken to be before anything is compared."""

    offset: Array
    """[3] x, y (m) in the map frame, and yaw (rad), to be added to the given pose"""
    position_std: float
    """standard deviation of what is left of the pose's error, m"""
    yaw_std: float
    """rad"""


class Drift:
    """Follows the error of the poses of one drive.

    The error is taken for a first-order Gauss-Markov process with the standard deviations that come with the poses,
    plus a part that is new with every frame (Bar-Shalom, Li, Kirubarajan: Estimation with Applications to Tracking and
    Navigation, 2001). How large that part is shows in the heading, which is measured best: how its error differs
    from one frame to the next.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget everything: another drive begins, or the pose jumped."""
        self._offset: Array = np.zeros(3)
        self._variance: Array = np.zeros((3, 3))
        self._fresh: Array = np.zeros((3, 3))
        self._last: tuple[str, int] | None = None
        self._share = FRESH
        self._turn: float | None = None
        self._yaw_variance = 0.0

    def expect(self, frame: Frame) -> Believed:
        """Return what is believed of the pose of a frame: at first, what is told of it."""
        spread = MAP_AS_WELL * np.array([frame.position_std, frame.position_std, frame.yaw_std])
        whole = np.diag(spread**2)
        self._fresh = min(max(self._share, FRESH), 1.0) * whole
        self._yaw_variance = whole[2, 2]
        lasting = whole - self._fresh
        if self._last is None or frame.location != self._last[0] or frame.stamp_ns < self._last[1]:
            self._offset, self._variance, self._turn = np.zeros(3), lasting, None
        else:
            kept = math.exp((self._last[1] - frame.stamp_ns) / 1e9 / DRIFT_TIME_S)
            self._offset = kept * self._offset
            self._variance = kept**2 * self._variance + (1 - kept**2) * lasting
        self._last = frame.location, frame.stamp_ns
        left = np.diag(self._variance) + np.diag(self._fresh)
        position, heading = math.sqrt((left[0] + left[1]) / 2), math.sqrt(left[2])
        return Believed(self._offset.copy(), position / MAP_AS_WELL, heading / MAP_AS_WELL)

    def learn(self, yaw: float, found: NDArray[np.float32] | None) -> None:
        """Take in what the search found from the pose that was expected.

        :param yaw: heading of that pose in the map frame, rad
        :param found: [4, 3] as in :class:`nmp.model.runner.Answer`; None without a search
        """
        if found is None:
            return
        self._compare(float(self._offset[2] + found[2, 2]), float(found[3, 2]))
        told = np.isfinite(found[3])
        c, s = math.cos(yaw), math.sin(yaw)
        # rows: what of the offset in the map frame each of the numbers found is
        ego_from_map = np.array([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 1.0]])[told]
        error = np.diag(found[3][told].astype(np.float64) ** 2)
        total = ego_from_map @ (self._variance + self._fresh) @ ego_from_map.T + error
        gain = self._variance @ ego_from_map.T @ np.linalg.inv(total)
        self._offset = self._offset + gain @ found[2][told].astype(np.float64)
        left = self._variance - gain @ ego_from_map @ self._variance
        self._variance = (left + left.T) / 2  # rounding must not make it lopsided

    def _compare(self, turn: float, error: float) -> None:
        """Learn from one frame to the next how much of an error is new.

        :param turn: by which the given heading is off, as it was measured, rad
        :param error: standard deviation of that, rad; nothing is learned from what is less exact than the pose itself
        """
        one, pose = (error / ALIKE) ** 2, self._yaw_variance / MAP_AS_WELL**2  # of one frame
        exact = one <= pose
        if exact and self._turn is not None:
            # Two errors that have nothing to do with each other differ by twice the variance of each.
            ratio = ((turn - self._turn) ** 2 - 2 * one) / (2 * pose)
            self._share += (min(ratio, 3.0) - self._share) / FRAMES
        self._turn = turn if exact else None
