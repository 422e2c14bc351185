"""Flat things on the ground as polygons with a colour.

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
from shapely.geometry.base import BaseGeometry

from nmp_train.sim.polyline import Polyline

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


@dataclass
class Marks:
    """A collector of marks; :meth:`indexed` makes them ready to be painted."""

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
        """Return the marks collected so far with a spatial index."""
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


def pieces(path: Polyline, length: float, start: float = 0.0, stop: float | None = None) -> list[Array]:
    """Cut a stretch of a path into equal parts of about ``length`` m."""
    stop = path.length if stop is None else stop
    ends = np.linspace(start, stop, max(1, round((stop - start) / length)) + 1)
    return [path.cut(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def dashes(path: Polyline, paint: float, gap: float, phase: float) -> list[Array]:
    """Cut a path into dashes of ``paint`` m with gaps of ``gap`` m; the first starts ``phase`` m before the path."""
    starts = np.arange(-(phase % (paint + gap)), path.length, paint + gap)
    return [path.cut(max(a, 0.0), min(a + paint, path.length)) for a in starts if a + paint > 0.15]
