"""Flat things on the ground as polygons with a colour, and lines that they are made from.

Everything that is painted on, cut into or spilt over a road is a mark: a polygon in the map frame (m), a colour or
a gain, an opacity and how rough it is. Marks are collected once for a city and rasterised window by window.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray
from shapely import STRtree
from shapely.geometry import Polygon
from shapely.geometry.base import BaseGeometry

Array = NDArray[np.float64]


class Layer(IntEnum):
    """What lies on what, lowest first."""

    KERB = 0
    TONE = 1
    SEAM = 2
    GHOST = 3
    PAINT = 4
    PATCH = 5
    DIRT = 6


def rng_of(seed: int, geometry: BaseGeometry | Array, salt: int = 0) -> np.random.Generator:
    """Return the generator that belongs to a geometry: from its coordinates to the centimetre, and the seed."""
    points = shapely.get_coordinates(geometry) if isinstance(geometry, BaseGeometry) else np.asarray(geometry)
    key = zlib.crc32(np.round(points * 100).astype(np.int64).tobytes())
    return np.random.default_rng((seed, key, salt))


class Path:
    """A line [N, 2] (m) that is asked by distance along it (m)."""

    def __init__(self, points: ArrayLike) -> None:
        xy = np.asarray(points, dtype=np.float64)[:, :2]
        keep = np.concatenate([[True], np.hypot(*np.diff(xy, axis=0).T) > 1e-6])
        self.points: Array = xy[keep]
        steps = np.diff(self.points, axis=0)
        self.s: Array = np.concatenate([[0.0], np.cumsum(np.hypot(*steps.T))])
        self.length = float(self.s[-1])

    def at(self, s: ArrayLike) -> Array:
        """Return the points [..., 2] at distances ``s``."""
        return np.stack([np.interp(np.asarray(s), self.s, self.points[:, k]) for k in (0, 1)], axis=-1)

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

    def shifted(self, offset: float) -> list[Path]:
        """Return the parallel ``offset`` m to the left; it can fall into parts in tight bends."""
        if offset == 0:
            return [self]
        curve = shapely.offset_curve(shapely.linestrings(self.points), offset, join_style="mitre")
        return [Path(shapely.get_coordinates(part)) for part in shapely.get_parts(curve) if part.length > 0.5]

    def quad(self, start: float, stop: float, right: float, left: float) -> Polygon:
        """Return the area between two distances along the line and two offsets from it."""
        s = np.linspace(start, stop, max(2, int((stop - start) / 3) + 2))
        return Polygon(np.concatenate([self.beside(s, np.full(len(s), right)), self.beside(s[::-1], [left] * len(s))]))


def paths_of(geometry: BaseGeometry, shortest: float = 0.5) -> list[Path]:
    """Return the lines of a geometry that are at least ``shortest`` m long."""
    parts = shapely.get_parts(geometry)
    return [Path(shapely.get_coordinates(p)) for p in parts if p.geom_type == "LineString" and p.length >= shortest]


@dataclass
class Marks:
    """A collector of marks; :meth:`near` gives them back in the order in which they are painted."""

    asphalt: Array
    """[3] colour of the road that they lie on"""
    rings: list[Array] = field(default_factory=list)
    """[N, 2] m, map frame"""
    looks: list[tuple[Array, float, float, float, bool]] = field(default_factory=list)
    """(colour [3] or gain [3], opacity, roughness 0..1, softness of the edge in m, whether it is a gain)"""
    layers: list[int] = field(default_factory=list)

    def fill(
        self,
        shapes: Iterable[BaseGeometry],
        rgb: ArrayLike,
        opacity: float | Sequence[float] = 1.0,
        *,
        layer: Layer = Layer.PAINT,
        rough: float = 0.0,
        soft: float = 0.0,
        gain: bool = False,
    ) -> None:
        """Add polygons; ``gain`` multiplies the ground by ``rgb`` instead of covering it."""
        colour = np.broadcast_to(np.asarray(rgb, dtype=np.float64), (3,))
        shapes = list(shapes)
        opacities = np.broadcast_to(opacity, (len(shapes),))
        for shape, alpha in zip(shapes, opacities, strict=True):
            for part in shapely.get_parts(shape):
                if part.geom_type == "Polygon" and not part.is_empty and alpha > 0.01:
                    self.rings.append(shapely.get_coordinates(part.exterior))
                    self.looks.append((colour, float(alpha), rough, soft, gain))
                    self.layers.append(layer)

    def stroke(
        self,
        lines: Sequence[Array],
        width: float,
        rgb: ArrayLike,
        opacity: float | Sequence[float] = 1.0,
        *,
        layer: Layer = Layer.PAINT,
        rough: float = 0.0,
        soft: float = 0.0,
        gain: bool = False,
    ) -> None:
        """Add lines [N, 2] (m) of a width (m) with square ends."""
        lines = list(lines)
        opacities = np.broadcast_to(opacity, (len(lines),)).tolist()
        if lines:
            count = [len(line) for line in lines]
            shapes = shapely.linestrings(np.concatenate(lines), indices=np.repeat(np.arange(len(lines)), count))
            bands = shapely.buffer(shapes, width / 2, cap_style="flat", join_style="mitre")
            self.fill(bands, rgb, opacities, layer=layer, rough=rough, soft=soft, gain=gain)

    def indexed(self) -> IndexedMarks:
        boxes = np.array([[*r.min(axis=0), *r.max(axis=0)] for r in self.rings]).reshape(-1, 4)
        return IndexedMarks(self, STRtree(shapely.box(*boxes.T)))


@dataclass(frozen=True)
class IndexedMarks:
    """Marks with a spatial index."""

    marks: Marks
    tree: STRtree

    def near(self, region: BaseGeometry) -> NDArray[np.int64]:
        """Return the indices of the marks whose box meets ``region``, lowest layer first."""
        found = np.sort(self.tree.query(region))
        return found[np.argsort(np.array(self.marks.layers, dtype=np.int64)[found], kind="stable")]


def pieces(path: Path, length: float, start: float = 0.0, stop: float | None = None) -> list[Array]:
    """Cut a stretch of a path into equal parts of about ``length`` m."""
    stop = path.length if stop is None else stop
    ends = np.linspace(start, stop, max(1, round((stop - start) / length)) + 1)
    return [path.cut(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def dashes(path: Path, paint: float, gap: float, phase: float) -> list[Array]:
    """Cut a path into dashes of ``paint`` m with gaps of ``gap`` m; the first starts ``phase`` m before the path."""
    starts = np.arange(-(phase % (paint + gap)), path.length, paint + gap)
    return [path.cut(max(a, 0.0), min(a + paint, path.length)) for a in starts if a + paint > 0.15]
