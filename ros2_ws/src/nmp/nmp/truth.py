"""Ground-truth layers: the city map drawn around a pose, exactly as the published evaluation draws it.

The drawing follows the evaluation protocol of HDMapNet (Li et al., ICRA 2022) that Neural Map Prior
(Xiong et al., CVPR 2023) uses: lines are clipped to the region, sampled every metre, truncated to pixels
and drawn 5 pixels (0.75 m) wide. The trainer uses these same functions for its labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import affinity, ops
from shapely.geometry import LineString, box
from shapely.geometry.base import BaseGeometry

from nmp.citymap import CityMap
from nmp.errors import NmpError
from nmp.frame import CLASSES
from nmp.geometry import Array, BevGrid

SAMPLE_SPACING_M = 1.0
LINE_WIDTH_PX = 5
EDGE_MARGIN_M = 0.2  # outlines lose this rim, so that the cut along the region's edge is not drawn as a kerb
DIRECTIONS = 36
"""classes that the full turn is divided into; class 0 is no line, class 1 is centred on forward (+x)"""
MOST_INSTANCES = 255
"""of one class: what a uint8 can number"""


def truth_lines(
    city: CityMap, x: float, y: float, yaw: float, grid: BevGrid | None = None
) -> dict[str, list[LineString]]:
    """Cut the dividers, crossings and boundaries around a pose (map frame; m, rad) out of the map.

    Returns the lines of each of ``CLASSES`` in the ego frame (m), inside the region of ``grid`` (default 60 x 30 m):
    what :func:`rasterize` draws, in the order in which it is drawn.
    """
    grid = grid or BevGrid()
    half_l, half_w = grid.length / 2, grid.width / 2
    region = affinity.rotate(box(x - half_l, y - half_w, x + half_l, y + half_w), yaw, origin=(x, y), use_radians=True)

    def local(geometries: list[BaseGeometry]) -> Iterator[BaseGeometry]:
        for geometry in geometries:
            cut = geometry.intersection(region)
            if not cut.is_empty:
                turned = affinity.rotate(cut, -yaw, origin=(x, y), use_radians=True)
                yield affinity.translate(turned, -x, -y)

    inner = box(*(np.array([-half_l, -half_w, half_l, half_w]) - EDGE_MARGIN_M * np.array([-1, -1, 1, 1])))

    def outlines(polygons: Iterator[BaseGeometry]) -> Iterator[BaseGeometry]:
        union = ops.unary_union(list(polygons))
        for part in getattr(union, "geoms", [union]):
            if part.geom_type == "Polygon":  # touching pieces leave points and lines behind
                for ring in (part.exterior, *part.interiors):
                    cut = ring.intersection(inner)
                    yield ops.linemerge(cut) if cut.geom_type == "MultiLineString" else cut

    roads = [*city.road_segments.near(region), *city.lanes.near(region)]
    layers = {
        "divider": local([*city.road_dividers.near(region), *city.lane_dividers.near(region)]),
        "crossing": outlines(local(city.crossings.near(region))),
        "boundary": outlines(local(roads)),
    }
    return {name: list(_lines(layers[name])) for name in CLASSES}


def rasterize(city: CityMap, x: float, y: float, yaw: float, grid: BevGrid | None = None) -> NDArray[np.uint8]:
    """Draw dividers, crossings and boundaries around a pose (map frame; m, rad).

    Returns uint8 [3, rows, cols] of 0 and 1, classes in the order of ``CLASSES``, over ``grid`` (default 60 x 30 m at
    0.15 m).
    """
    grid = grid or BevGrid()
    out = np.zeros((len(CLASSES), *grid.shape), dtype=np.uint8)
    for mask, lines in zip(out, truth_lines(city, x, y, yaw, grid).values(), strict=True):
        for line in lines:
            _draw(mask, _stations(line), grid, 1)
    return out


def rasterize_vectors(
    city: CityMap, x: float, y: float, yaw: float, grid: BevGrid | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw which line a pixel belongs to and which way the line runs there, as HDMapNet's labels do.

    Where lines cross, the one drawn last counts, in both. Directions are those of the sampled line itself; the
    published code takes them from points already truncated to pixels, which turns them by several degrees.

    Returns uint8

    - instances [3, rows, cols]: the number of the line among those of its class, from 1; 0 where there is none.
      ``instances > 0`` is exactly what :func:`rasterize` draws.
    - directions [2, rows, cols]: classes 1..36 of 10 degrees, counted from forward (+x) to the left (+y), of the line
      and of its opposite, since a map does not say which end comes first; 0 where there is no line.

    Raises :class:`NmpError` when a class has more than 255 lines.
    """
    grid = grid or BevGrid()
    instances = np.zeros((len(CLASSES), *grid.shape), dtype=np.uint8)
    forward = np.zeros(grid.shape, dtype=np.uint8)
    for mask, (name, lines) in zip(instances, truth_lines(city, x, y, yaw, grid).items(), strict=True):
        if len(lines) > MOST_INSTANCES:
            raise NmpError(
                f"{len(lines)} {name} lines around x {x:.1f} m, y {y:.1f} m: no more than {MOST_INSTANCES} can be "
                "numbered, choose a smaller region"
            )
        for number, line in enumerate(lines, start=1):
            stations = _stations(line)
            _draw(mask, stations, grid, number)
            steps = np.diff(stations, axis=0)
            turn = np.arctan2(steps[:, 1], steps[:, 0]) / (2 * np.pi) * DIRECTIONS
            classes = np.rint(turn).astype(int) % DIRECTIONS + 1
            # One call for each stretch of one direction: most lines are straight.
            edges = np.flatnonzero(np.diff(classes, prepend=0, append=0))
            for start, end in pairwise(edges):
                _draw(forward, stations[start : end + 1], grid, int(classes[start]))
    opposite = (forward - 1 + DIRECTIONS // 2) % DIRECTIONS + 1
    return instances, np.stack([forward, np.where(forward > 0, opposite, 0)]).astype(np.uint8)


def _lines(geometries: Iterator[BaseGeometry]) -> Iterator[LineString]:
    for geometry in geometries:
        if geometry.geom_type in ("LineString", "LinearRing"):
            if not geometry.is_empty:
                yield geometry
        elif hasattr(geometry, "geoms"):
            yield from _lines(geometry.geoms)


def _stations(line: LineString) -> Array:
    """Points [n, 2] (m) along a line, one every metre from its start."""
    points = shapely.line_interpolate_point(line, np.arange(0.0, line.length, SAMPLE_SPACING_M))
    return np.asarray(shapely.get_coordinates(points), dtype=np.float64)


def _draw(mask: NDArray[np.uint8], points: Array, grid: BevGrid, value: int) -> None:
    pixels = (points + [grid.length / 2, grid.width / 2]) / grid.resolution
    cv2.polylines(mask, [pixels.astype(np.int32)], isClosed=False, color=(value,), thickness=LINE_WIDTH_PX)
