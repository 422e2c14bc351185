"""Lines through points, asked by the distance along them."""

from __future__ import annotations

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray
from shapely.geometry import LineString, Polygon

from nmp.geometry import distances_along, points_along

Array = NDArray[np.float64]


def resample(points: Array, step: float) -> Array:
    """Return a polyline [N, 2] resampled to about ``step`` metres between points."""
    line = LineString(points)
    return shapely.get_coordinates(line.interpolate(np.linspace(0, line.length, max(2, round(line.length / step) + 1))))


class Polyline:
    """A line [N, 2] (m) that is asked by distance along it (m)."""

    def __init__(self, points: ArrayLike) -> None:
        xy = np.asarray(points, dtype=np.float64)[:, :2]
        keep = np.concatenate([[True], np.hypot(*np.diff(xy, axis=0).T) > 1e-6])
        self.points: Array = xy[keep]
        self.s: Array = distances_along(self.points)
        self.length = float(self.s[-1])

    def at(self, s: ArrayLike) -> Array:
        """Return the points [..., 2] at distances ``s``."""
        return points_along(self.points, self.s, s)

    def normal(self, s: ArrayLike, span: float = 1.0) -> Array:
        """Return the unit normals [..., 2] to the left, from chords of length ``span`` around ``s``."""
        d = self.at(np.asarray(s) + span / 2) - self.at(np.asarray(s) - span / 2)
        d /= np.maximum(np.linalg.norm(d, axis=-1, keepdims=True), 1e-9)
        return np.stack([-d[..., 1], d[..., 0]], axis=-1)

    def beside(self, s: ArrayLike, offset: ArrayLike) -> Array:
        """Return the points [..., 2] at distances ``s``, ``offset`` m to the left."""
        return self.at(s) + np.asarray(offset)[..., None] * self.normal(s)

    def cut(self, start: float, stop: float) -> Array:
        """Return the points [N, 2] of the part between two distances."""
        low, high = np.searchsorted(self.s, [start + 1e-6, stop - 1e-6])
        return np.concatenate([self.at([start]), self.points[low:high], self.at([stop])])

    def shifted(self, offset: float) -> list[Polyline]:
        """Return the parallel ``offset`` m to the left; it can fall into parts in tight bends."""
        if offset == 0:
            return [self]
        curve = shapely.offset_curve(shapely.linestrings(self.points), offset, join_style="mitre")
        return [Polyline(shapely.get_coordinates(part)) for part in shapely.get_parts(curve) if part.length > 0.5]

    def quad(self, start: float, stop: float, right: float, left: float) -> Polygon:
        """Return the area between two distances along the line and two offsets from it."""
        s = np.linspace(start, stop, max(2, int((stop - start) / 3) + 2))
        return Polygon(np.concatenate([self.beside(s, np.full(len(s), right)), self.beside(s[::-1], [left] * len(s))]))
