"""Ground-truth layers: the city map drawn around a pose, exactly as the published evaluation draws it.

The drawing follows the evaluation protocol of HDMapNet (Li et al., ICRA 2022) that Neural Map Prior
(Xiong et al., CVPR 2023) uses: lines are clipped to the region, sampled every metre, truncated to pixels
and drawn 5 pixels (0.75 m) wide. The trainer uses this same function for its labels.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import affinity, ops
from shapely.geometry import box
from shapely.geometry.base import BaseGeometry

from nmp.citymap import CityMap
from nmp.frame import CLASSES
from nmp.geometry import BevGrid

SAMPLE_SPACING_M = 1.0
LINE_WIDTH_PX = 5
EDGE_MARGIN_M = 0.2  # outlines lose this rim, so that the cut along the region's edge is not drawn as a kerb


def rasterize(city: CityMap, x: float, y: float, yaw: float, grid: BevGrid | None = None) -> NDArray[np.uint8]:
    """Draw dividers, crossings and boundaries around a pose (map frame; m, rad).

    Returns uint8 [3, rows, cols] of 0 and 1, classes in the order of ``CLASSES``, over ``grid`` (default 60 x 30 m at
    0.15 m).
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
    out = np.zeros((len(CLASSES), *grid.shape), dtype=np.uint8)
    for index, name in enumerate(CLASSES):
        for line in _lines(layers[name]):
            _draw(out[index], line, grid)
    return out


def _lines(geometries: Iterator[BaseGeometry]) -> Iterator[BaseGeometry]:
    for geometry in geometries:
        if geometry.geom_type in ("LineString", "LinearRing"):
            if not geometry.is_empty:
                yield geometry
        elif hasattr(geometry, "geoms"):
            yield from _lines(geometry.geoms)


def _draw(mask: NDArray[np.uint8], line: BaseGeometry, grid: BevGrid) -> None:
    stations = np.arange(0.0, line.length, SAMPLE_SPACING_M)
    points = shapely.get_coordinates(shapely.line_interpolate_point(line, stations))
    pixels = (points + [grid.length / 2, grid.width / 2]) / grid.resolution
    cv2.polylines(mask, [pixels.astype(np.int32)], isClosed=False, color=(1,), thickness=LINE_WIDTH_PX)
