"""Smooth paths and the speed at which somebody drives along them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from nmp.geometry import distances_along
from nmp_train.sim.polyline import resample

Array = NDArray[np.float64]
STEP = 0.5
"""distance between points of a path, m"""


class Path:
    """A smooth line in the map frame, asked by distance from its start (m)."""

    def __init__(self, points: Array, smooth_m: float = 2.0) -> None:
        points = resample(points, STEP)
        if smooth_m > 0 and len(points) > 3:
            points = _smooth(points, smooth_m / STEP)
        steps = np.hypot(*np.diff(points, axis=0).T)
        keep = np.concatenate([[True], steps > 1e-6])
        self.points = points[keep]
        self.s: Array = distances_along(self.points)
        self.heading: Array = np.unwrap(np.arctan2(*np.gradient(self.points, axis=0).T[::-1]))
        bend = np.gradient(self.heading) / np.maximum(np.gradient(self.s), 1e-6)
        self.curvature: Array = gaussian_filter1d(bend, 1.0, mode="nearest")

    @property
    def length(self) -> float:
        return float(self.s[-1])

    def at(self, s: Array | float) -> Array:
        """Return [..., 3] = x, y (m), yaw (rad, unwrapped along the path); straight on beyond the ends."""
        s = np.asarray(s, dtype=np.float64)
        inside = np.clip(s, 0, self.length)
        yaw = np.interp(inside, self.s, self.heading)
        x, y = (np.interp(inside, self.s, self.points[:, k]) for k in (0, 1))
        over = s - inside
        return np.stack([x + over * np.cos(yaw), y + over * np.sin(yaw), yaw], axis=-1)

    def shifted(self, offset: Array | float) -> Path:
        """Return the path moved to its left by ``offset`` m (a constant, or an array over ``s``)."""
        d = np.broadcast_to(offset, self.s.shape)
        normal = np.stack([-np.sin(self.heading), np.cos(self.heading)], axis=1)
        return Path(self.points + d[:, None] * normal, smooth_m=1.0)


def _smooth(points: Array, sigma: float) -> Array:
    # Mirror the ends through the end points: plain padding would pull the ends inwards and bend them.
    pad = min(int(4 * sigma), len(points) - 1)
    head = 2 * points[0] - points[pad:0:-1]
    tail = 2 * points[-1] - points[-2 : -2 - pad : -1]
    return np.asarray(gaussian_filter1d(np.concatenate([head, points, tail]), sigma, axis=0)[pad : pad + len(points)])


@dataclass(frozen=True)
class Stop:
    """Stand still at a distance along a path."""

    s: float
    seconds: float


def drive_along(
    path: Path,
    rng: np.random.Generator,
    duration_s: float,
    *,
    cruise: float,
    stops: list[Stop],
    start_s: float = 0.0,
    lateral_accel: float = 2.0,
    dt: float = 0.05,
) -> tuple[Array, Array]:
    """Return (times [T] s, distances [T] m) of a drive that slows for bends and stands at the stops.

    ``cruise`` is the speed on a free straight road, m/s. The drive ends early at the end of the path.
    """
    wish = cruise * np.exp(0.12 * _slow_noise(rng, len(path.s), 60 / STEP))
    limit = np.minimum(wish, np.sqrt(lateral_accel / np.maximum(np.abs(path.curvature), 1e-4)))
    brake = float(rng.uniform(1.5, 2.3))
    push = float(rng.uniform(1.0, 1.9))
    limit = _brake_before(limit, path.s, brake)
    pending = sorted((s for s in stops if s.s > start_s - 0.5), key=lambda s: s.s)
    s, held = start_s, 0.0
    v = float(np.interp(s, path.s, limit))
    if pending and pending[0].s - s < v * v / (2 * brake):
        v = float(np.sqrt(max(2 * brake * (pending[0].s - s), 0)))
    times, out = [0.0], [s]
    while times[-1] < duration_s and s < path.length:
        target = float(np.interp(s, path.s, limit))
        if pending:
            room = pending[0].s - s
            target = min(target, float(np.sqrt(max(2 * brake * room, 0.0))))
            if room < 0.3:
                target = 0.0
                held += dt
                if held > pending[0].seconds:
                    pending, held = pending[1:], 0.0
        v += float(np.clip(target - v, -3.0 * dt, push * dt))
        v = max(v, 0.0)
        s += v * dt
        times.append(times[-1] + dt)
        out.append(s)
    travelled = _smooth(np.asarray(out)[:, None], 0.35 / dt)[:, 0]
    inside = travelled <= path.length
    inside[:2] = True
    return np.asarray(times)[inside], np.clip(travelled[inside], start_s, path.length)


def _brake_before(limit: Array, s: Array, brake: float) -> Array:
    out = limit.copy()
    for i in range(len(out) - 2, -1, -1):
        out[i] = min(out[i], np.sqrt(out[i + 1] ** 2 + 2 * brake * (s[i + 1] - s[i])))
    return out


def _slow_noise(rng: np.random.Generator, count: int, correlation: float) -> Array:
    """Noise of unit deviation that changes over about ``correlation`` samples."""
    knots = max(4, int(count / correlation) + 4)
    coarse = gaussian_filter1d(rng.normal(0, 1.6, knots), 0.8)
    return np.asarray(np.interp(np.linspace(0, knots - 1, count), np.arange(knots), coarse))


def lateral_wander(rng: np.random.Generator, path: Path, mean_m: float, sway_m: float) -> Array:
    """Return the lateral offset (m, left positive) of a driver who does not keep exactly to the middle."""
    noise = gaussian_filter1d(_slow_noise(rng, len(path.s), 35 / STEP), 8 / STEP, mode="nearest")
    return mean_m + sway_m * noise
