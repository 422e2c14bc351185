"""One vector map of a city from the layers of its drives."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import affinity
from shapely.geometry import Polygon
from shapely.geometry.base import BaseGeometry

from nmp.frame import CLASSES
from nmp.geometry import Array, BevGrid
from nmp.layers import read_layers
from nmp.vectorize import along, crossings, lines_of, outline, skeleton_edges, thin
from nmp.vectors.elements import MapElement
from nmp.vectors.raster import TILE_PX, CityRaster, Index

THRESHOLD = 0.5
LINE_MARGIN_M = 9.0
"""thinning sees so much beyond a tile, so that the middle lines of neighbouring tiles meet"""
CROSSING_MARGIN_M = 30.0
"""a crossing belongs to the tile of its centre, and reaches no further than this out of it"""
SAME_SHARE = 0.5
"""crossings that share so much of the smaller one are one, found from two tiles"""
SAMPLE_M = 0.6
"""elements are looked up in the raster at points this far apart"""


def raster_of(folders: Sequence[Path], raster: CityRaster) -> None:
    """Add the layers of all folders in the order of time, over all of them.

    Raises :class:`nmp.errors.NmpError` for a folder without layers, a foreign file, and layers of two cities.
    """
    for local_map in heapq.merge(*(read_layers(folder) for folder in folders), key=lambda m: m.stamp_ns):
        raster.add(local_map)


def city_elements(raster: CityRaster) -> list[MapElement]:
    """Return the elements of everything that a raster holds, numbered in the order in which they were first seen."""
    found: list[tuple[str, BaseGeometry]] = []
    for name, pieces in _pieces(raster).items():
        if name == "crossing":
            found += [(name, shape) for shape in _distinct(pieces)]
        else:
            edges = np.concatenate([np.zeros((0, 2, 2)), *pieces])
            found += [(name, line) for line in lines_of(edges, raster.resolution, lambda p: _centres(p, raster))]
    elements = [e for name, shape in found if (e := _described(name, shape, raster)) is not None]
    elements.sort(key=lambda e: (e.first_seen_ns, CLASSES.index(e.name), *e.geometry.bounds))
    return [replace(e, id=number) for number, e in enumerate(elements, start=1)]


def _pieces(raster: CityRaster) -> dict[str, list[Any]]:
    """Return what each tile gives to each class: whole crossings, and pairs of pixels on middle lines."""
    out: dict[str, list[Any]] = {name: [] for name in CLASSES}
    margin = round(CROSSING_MARGIN_M / raster.resolution)
    core = np.s_[margin:-margin, margin:-margin]
    for index in raster.tiles:
        masks = (raster.window(index, margin) > THRESHOLD).astype(np.uint8)
        for name, mask in zip(CLASSES, masks, strict=True):
            if not mask[core].any():
                continue
            if name == "crossing":
                out[name] += _crossings(mask, index, raster)
            else:
                out[name].append(_edges(mask, margin, index, raster))
    return out


def _edges(mask: NDArray[np.uint8], margin: int, index: Index, raster: CityRaster) -> Array:
    """Return the pairs of pixels [N, 2, 2] of a city of which the first lies in the tile."""
    less = margin - round(LINE_MARGIN_M / raster.resolution)
    found = skeleton_edges(thin(mask[less:-less, less:-less])) + less - margin
    inside = ((found[:, 0] >= 0) & (found[:, 0] < TILE_PX)).all(axis=1)
    return np.asarray(found[inside] + np.array(index) * TILE_PX)


def _crossings(mask: NDArray[np.uint8], index: Index, raster: CityRaster) -> list[Polygon]:
    """Return the crossings (map frame, m) whose centre lies in the tile."""
    side = mask.shape[0] * raster.resolution
    shapes = crossings(mask, BevGrid(side, side, raster.resolution))
    # A metre more, so that a crossing whose centre lies on an edge is missed by neither side.
    reach = raster.edge / 2 + 1.0
    mine = [s for s in shapes if max(abs(s.centroid.x), abs(s.centroid.y)) <= reach]
    return [affinity.translate(s, *((np.array(index) + 0.5) * raster.edge)) for s in mine]


def _centres(pixels: Array, raster: CityRaster) -> Array:
    return np.asarray((pixels + 0.5) * raster.resolution)


def _described(name: str, shape: BaseGeometry, raster: CityRaster) -> MapElement | None:
    """Return an element without a number yet; None for the hull of strokes around a place that nobody looked at."""
    points = along(outline(shape), SAMPLE_M)
    seen = raster.seen(points)
    known = seen.frames > 0
    if not known.any():
        return None
    return MapElement(
        id=0,
        name=name,
        geometry=shape,
        confidence=float(raster.probability(points, CLASSES.index(name)).mean()),
        first_seen_ns=int(seen.first_ns[known].min()),
        last_seen_ns=int(seen.last_ns[known].max()),
        frames=int(np.median(seen.frames[known])),
        traversals=int(np.median(seen.visits[known])),
    )


def _distinct(shapes: Iterable[Polygon]) -> list[Polygon]:
    """Leave out what an earlier crossing covers."""
    kept: list[Polygon] = []
    for shape in sorted(shapes, key=lambda s: (-s.area, *s.bounds)):
        if (
            not kept
            or not (shapely.area(shapely.intersection(np.array(kept, object), shape)) > SAME_SHARE * shape.area).any()
        ):
            kept.append(shape)
    return kept
