"""One vector map of a city from the layers of its drives."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import shapely
from shapely import affinity
from shapely.geometry import LineString, Polygon
from shapely.geometry.base import BaseGeometry

from nmp.errors import NmpError
from nmp.frame import CLASSES
from nmp.geometry import Array, BevGrid
from nmp.layers import read_layers
from nmp.vectorize import along, crossings, lines_of, outline, skeleton_edges, thin
from nmp.vectors.elements import MapElement
from nmp.vectors.raster import TILE_PX, CityRaster

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

    Raises :class:`NmpError` for a folder without layers, a foreign file among them, and layers of two cities.
    """
    for local_map in heapq.merge(*(read_layers(folder) for folder in folders), key=lambda m: m.stamp_ns):
        raster.add(local_map)


def city_elements(raster: CityRaster) -> list[MapElement]:
    """Return the elements of everything that a raster holds, numbered in the order in which they were first seen."""
    found: list[tuple[str, BaseGeometry]] = []
    for layer, name in enumerate(CLASSES):
        shapes = _crossings(raster, layer) if name == "crossing" else _lines(raster, layer)
        found += [(name, shape) for shape in shapes]
    elements = [_described(name, shape, raster) for name, shape in found]
    elements.sort(key=lambda e: (e.first_seen_ns, CLASSES.index(e.name), *e.geometry.bounds))
    return [MapElement(**{**vars(e), "id": number}) for number, e in enumerate(elements, start=1)]


def _described(name: str, shape: BaseGeometry, raster: CityRaster) -> MapElement:
    points = along(outline(shape), SAMPLE_M)
    seen = raster.seen(points)
    known = seen.frames > 0
    if not known.any():
        raise NmpError(f"a {name} lies where nothing was ever seen: please report it with the layers")
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


def _lines(raster: CityRaster, layer: int) -> list[LineString]:
    """Return the lines of one layer: middle lines tile by tile, joined over the whole city."""
    margin = round(LINE_MARGIN_M / raster.resolution)
    edges = [np.zeros((0, 2, 2))]
    for index in raster.tiles:
        mask = (raster.window(index, margin)[layer] > THRESHOLD).astype(np.uint8)
        if not mask.any():
            continue
        found = skeleton_edges(thin(mask))
        core = ((found[:, 0] >= margin) & (found[:, 0] < margin + TILE_PX)).all(axis=1)
        edges.append(found[core] - margin + np.array(index) * TILE_PX)
    return lines_of(np.concatenate(edges), raster.resolution, lambda p: _pixel_centres(p, raster))


def _pixel_centres(pixels: Array, raster: CityRaster) -> Array:
    return np.asarray((pixels + 0.5) * raster.resolution)


def _crossings(raster: CityRaster, layer: int) -> list[Polygon]:
    margin = round(CROSSING_MARGIN_M / raster.resolution)
    side = (TILE_PX + 2 * margin) * raster.resolution
    grid = BevGrid(side, side, raster.resolution)
    found: list[Polygon] = []
    for index in raster.tiles:
        mask = (raster.window(index, margin)[layer] > THRESHOLD).astype(np.uint8)
        if not mask[margin:-margin, margin:-margin].any():
            continue
        centre = (np.array(index) + 0.5) * raster.edge
        found += [affinity.translate(shape, *centre) for shape in crossings(mask, grid) if _belongs(shape, raster.edge)]
    return _distinct(found)


def _belongs(shape: Polygon, edge: float) -> bool:
    # A metre more, so that a crossing whose centre lies on an edge is missed by neither side.
    return bool(np.abs([shape.centroid.x, shape.centroid.y]).max() <= edge / 2 + 1.0)


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
