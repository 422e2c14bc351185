"""Layers to map elements: polylines for dividers and boundaries, polygons for crossings.

A raster says where paint or kerb lies; whoever plans a path or writes a map file needs lines. The strokes of a layer
are thinned to one pixel (Guo and Hall, "Parallel thinning with two-subiteration algorithms", CACM 1989) and the pixels
are joined to a network of lines. In that network short side branches are cut off, branches that go straight on
through a fork are made one line, and gaps between lines that aim at each other are bridged. A crossing is drawn as its
outline, so its polygon is a face of that network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates
from scipy.spatial import cKDTree
from shapely.geometry import LineString, Polygon, box
from shapely.geometry.base import BaseGeometry

from nmp.errors import NmpError
from nmp.frame import CLASSES
from nmp.geometry import Array, BevGrid, distances_along, points_along
from nmp.truth import LINE_WIDTH_PX

SHORTEST_M = 1.5
"""shorter lines are left out"""
SPUR_M = 1.2
"""shorter dead ends at a fork are left out: thinning leaves them at every bump of a stroke"""
GAP_M = 3.0
"""wider gaps are not bridged"""
STRAIGHT_RAD = np.deg2rad(30.0)
"""lines go on into each other when they bend by less than this"""
HEADING_M = 2.0
"""the heading of a line's end is that of its last piece of this length"""
MOST_LINES = 400
"""of one class; the longest are kept"""
TOLERANCE_M = 0.15
"""lines are simplified to within this"""
WIDEST_CROSSING_M = 10.0
"""what a ring of crossings around a junction encloses is wider, and is no crossing"""
SMALLEST_CROSSING_M2 = 4.0
RIM_SHARE = 0.4
"""a crossing may be cut off by the edge of the region along this share of its outline"""
INSTANCE_DISTANCE = 1.5
"""two pixels belong to different elements when their embeddings are further apart: half of what the loss of De
Brabandere et al. (CVPR workshops 2017) pushes elements apart"""
RIM_M = 1.5
"""lines that end this close to the edge of the region go on outside of it"""
_PAD = 4


@dataclass(frozen=True)
class VectorElement:
    """One element of the map around the car."""

    name: str
    """one of ``CLASSES``"""
    geometry: LineString | Polygon
    """ego frame, m; a polygon for a crossing, else a line"""
    score: float
    """mean probability along the line or outline, 0..1"""


def vectorize(
    probabilities: NDArray[np.float32],
    grid: BevGrid | None = None,
    threshold: float = 0.5,
    embedding: NDArray[np.float32] | None = None,
) -> list[VectorElement]:
    """Return the elements of the layers [3, rows, cols] (0..1, over ``grid``, default 60 x 30 m at 0.15 m).

    :param threshold: what is more likely than this belongs to an element
    :param embedding: [channels, rows, cols] of a network with instance embeddings: strokes of different elements that
        touch are told apart by it

    Raises :class:`NmpError` for arrays that do not fit the grid.
    """
    grid = grid or BevGrid()
    expected = (len(CLASSES), *grid.shape)
    if probabilities.shape != expected:
        raise NmpError(f"layers of shape {probabilities.shape} do not fit the grid: give {expected}")
    if embedding is not None and embedding.shape[1:] != grid.shape:
        raise NmpError(f"an embedding of shape {embedding.shape} does not fit the grid: give (channels, {grid.shape})")
    elements = []
    for name, layer in zip(CLASSES, probabilities, strict=True):
        mask = (layer > threshold).astype(np.uint8)
        if not mask.any():
            continue
        shapes = crossings(mask, grid) if name == "crossing" else _lines(mask, grid, embedding)
        elements += [VectorElement(name, shape, mean_along(layer, shape, grid)) for shape in shapes]
    return elements


def outline(shape: BaseGeometry) -> BaseGeometry:
    """Return the line itself, or the outer ring of a polygon."""
    return shape.exterior if shape.geom_type == "Polygon" else shape


def mean_along(layer: NDArray[np.float32], shape: BaseGeometry, grid: BevGrid) -> float:
    """Return the mean of a layer [rows, cols] along a line or the outline of a polygon (ego frame, m)."""
    points = along(outline(shape), grid.resolution)
    at = (points + [grid.length / 2, grid.width / 2]) / grid.resolution - 0.5
    return float(map_coordinates(layer, at[:, ::-1].T, order=1, mode="nearest").mean())


def along(shape: BaseGeometry, spacing: float) -> Array:
    """Return points [N, 2] about every ``spacing`` m along a line, both ends among them."""
    points = shapely.get_coordinates(shape)
    # shapely's own interpolation walks along the line anew for every point
    distances = distances_along(points)
    stations = np.linspace(0.0, distances[-1], max(2, round(distances[-1] / spacing) + 1))
    return points_along(points, distances, stations)


# ----------------------------------------------------------------------------------------- dividers, boundaries


def _lines(mask: NDArray[np.uint8], grid: BevGrid, embedding: NDArray[np.float32] | None) -> list[LineString]:
    def instance(points: Array) -> Array:
        assert embedding is not None
        rows, cols = _cells(points, grid).T
        return np.asarray(embedding[:, rows, cols].T, np.float64)

    edges = skeleton_edges(thin(mask), embedding)
    return lines_of(
        edges, grid.resolution, lambda p: _to_metres(p, grid), instance if embedding is not None else None, MOST_LINES
    )


def lines_of(
    edges: Array,
    resolution: float,
    to_metres: Callable[[Array], Array],
    instance: Callable[[Array], Array] | None = None,
    most: int | None = None,
) -> list[LineString]:
    """Return the simplified lines (m) of a network of pixels.

    :param edges: neighbouring pixels [N, 2, 2] = (col, row) of middle lines, as :func:`skeleton_edges` gives them
    :param resolution: edge of a pixel, m
    :param to_metres: takes pixels [N, 2] to points [N, 2], m
    :param instance: takes points to embeddings [N, channels]: lines are joined only where these agree
    :param most: so many lines at most go in, the longest; None: all of them
    """
    pieces = _longest(_without_spurs(_merged(shapely.linestrings(edges)), SPUR_M / resolution), most)
    lines = _joined([to_metres(shapely.get_coordinates(p)) for p in pieces], instance)
    return [simple for line in lines if (simple := line.simplify(TOLERANCE_M)).length >= SHORTEST_M]


def thin(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the middle lines, one pixel wide, of the strokes of a mask [rows, cols] of 0 and 1.

    Strokes that leave the raster are taken to go on, so that their middle lines reach its edge.
    """
    whole = cv2.copyMakeBorder(mask, _PAD, _PAD, _PAD, _PAD, cv2.BORDER_REPLICATE)
    x, y, width, height = cv2.boundingRect(whole)
    part = np.s_[y : y + height, x : x + width]
    image = whole[part]
    while width:
        before = cv2.countNonZero(image)
        for table in _DELETE:
            code = cv2.filter2D(image, cv2.CV_8U, _NEIGHBOUR_BITS, borderType=cv2.BORDER_CONSTANT)
            image = cv2.bitwise_and(image, cv2.LUT(code, table))
        if cv2.countNonZero(image) == before:
            whole[part] = image
            break
    return np.ascontiguousarray(whole[_PAD:-_PAD, _PAD:-_PAD])


def _guo_hall_tables() -> list[NDArray[np.uint8]]:
    """Return for both passes what stays (1) of a pixel, by the bits of its neighbours."""
    n, ne, e, se, s, sw, w, nw = (np.arange(256) >> np.arange(8)[:, None] & 1).astype(bool)
    branches = (~n & (ne | e)) + (~e & (se | s)).astype(int) + (~s & (sw | w)) + (~w & (nw | n))
    first = (nw | n) + (ne | e).astype(int) + (se | s) + (sw | w)
    second = (n | ne) + (e | se).astype(int) + (s | sw) + (w | nw)
    few = np.minimum(first, second)
    inside = [(s | sw | ~nw) & w, (n | ne | ~se) & e]
    return [(~((branches == 1) & (few >= 2) & (few <= 3) & ~kept)).astype(np.uint8) for kept in inside]


_DELETE = _guo_hall_tables()
_NEIGHBOUR_BITS = np.array([[128, 1, 2], [64, 0, 4], [32, 16, 8]], dtype=np.float32)


def skeleton_edges(skeleton: NDArray[np.uint8], embedding: NDArray[np.float32] | None = None) -> Array:
    """Return the pairs [N, 2, 2] = (col, row) of neighbouring pixels of a skeleton [rows, cols].

    :param embedding: [channels, rows, cols]; neighbours of different elements are no pair
    """
    on = np.pad(skeleton.astype(bool), 1)
    rows, cols = np.nonzero(on)
    steps = []
    for row, col in ((0, 1), (1, 0), (1, 1), (1, -1)):
        start = on[rows + row, cols + col]
        if row and col:
            # Around a corner only along its sides: else every corner would be a small triangle.
            start = start & ~(on[rows + row, cols] | on[rows, cols + col])
        x, y = cols[start] - 1, rows[start] - 1
        steps.append(np.stack([x, y, x + col, y + row], axis=1).reshape(-1, 2, 2))
    ends = np.concatenate(steps)
    if embedding is not None:
        near, far = (embedding[:, ends[:, k, 1], ends[:, k, 0]] for k in (0, 1))
        ends = ends[np.linalg.norm(near - far, axis=0) <= INSTANCE_DISTANCE]
    return ends.astype(np.float64)


def _merged(lines: NDArray[np.object_] | list[LineString]) -> list[LineString]:
    # shapely makes no collection of nothing
    return list(shapely.get_parts(shapely.line_merge(shapely.multilinestrings(lines)))) if len(lines) else []


def _longest(lines: list[LineString], most: int | None) -> list[LineString]:
    """Return ``most`` lines at most: the network of an untrained network's layers has thousands of lines."""
    if most is None or len(lines) <= most:
        return lines
    kept = np.argsort(-shapely.length(lines), kind="stable")[:most]
    return [lines[k] for k in np.sort(kept)]


def _ends(lines: list[LineString]) -> Array:
    """Return the first and last points [N, 2, 2] of lines."""
    points = [shapely.get_coordinates(shapely.get_point(lines, k)) for k in (0, -1)]
    return np.stack(points, axis=1)


def _without_spurs(lines: list[LineString], shortest: float) -> list[LineString]:
    """Leave out lines shorter than ``shortest`` (pixels) between a dead end and a fork."""
    if not lines:
        return []
    _, place, count = np.unique(_ends(lines).reshape(-1, 2), axis=0, return_inverse=True, return_counts=True)
    degree = count[place.reshape(-1, 2)]
    spur = (degree.min(axis=1) == 1) & (degree.max(axis=1) > 2) & (shapely.length(lines) < shortest)
    return _merged([line for line, cut in zip(lines, spur, strict=True) if not cut]) if spur.any() else lines


def _joined(lines: list[Array], embed: Callable[[Array], Array] | None) -> list[LineString]:
    """Join lines [N, 2] (m) whose ends aim at each other: across gaps, and straight on through forks."""
    lines = [line for line in lines if len(line) > 1]
    if not lines:
        return []
    ends = np.array([line[k] for line in lines for k in (0, -1)])
    headings = np.array([_heading(part) for line in lines for part in (line, line[::-1])])
    partner = np.full(len(ends), -1)
    # of each end; without embeddings all ends are alike
    instance = np.zeros((len(ends), 1)) if embed is None else embed(ends)
    for _, a, b in sorted(_candidates(ends, headings)):
        same = np.linalg.norm(instance[a] - instance[b]) <= INSTANCE_DISTANCE
        if same and partner[a] < 0 and partner[b] < 0:
            partner[a], partner[b] = b, a
    out, done = [], np.zeros(len(lines), bool)
    # Rings have no free end: they begin anywhere, after all the others.
    for start in (*np.flatnonzero(partner < 0), *range(0, len(ends), 2)):
        if done[start // 2]:
            continue
        points, end = [], int(start)
        while end >= 0 and not done[end // 2]:
            line = lines[end // 2]
            done[end // 2] = True
            points.append(line if end % 2 == 0 else line[::-1])
            end = int(partner[end ^ 1])
        closed = end == start and partner[start] >= 0
        out.append(LineString(np.concatenate([*points, points[0][:1]] if closed else points)))
    return out


def _heading(line: Array) -> Array:
    """Return the unit vector in which a line [N, 2] leaves its first point, outwards."""
    length = np.hypot(*(line[1:] - line[0]).T)
    far = np.flatnonzero(length >= HEADING_M)
    away = line[0] - line[1 + (far[0] if len(far) else len(length) - 1)]
    size = np.hypot(*away)
    # a ring that is smaller than that has no heading, and is joined to nothing
    return np.asarray(away / size) if size > 0 else np.zeros(2)


def _candidates(ends: Array, headings: Array) -> list[tuple[float, int, int]]:
    """Return the pairs of ends that could be joined as (cost, end, end)."""
    pairs = cKDTree(ends).query_pairs(GAP_M, output_type="ndarray")
    if not len(pairs):
        return []
    a, b = pairs.T
    gap = ends[b] - ends[a]
    width = np.hypot(*gap.T)
    least = np.cos(STRAIGHT_RAD)
    turn = -(headings[a] * headings[b]).sum(axis=1)
    # Across less than half a metre the direction of the gap is that of single pixels.
    wide = width > 0.5
    ahead = np.minimum((headings[a] * gap).sum(axis=1), -(headings[b] * gap).sum(axis=1)) / np.maximum(width, 1e-9)
    fits = (turn > least) & (~wide | (ahead > least))
    cost = width + 1.0 - turn
    return [(float(cost[k]), int(a[k]), int(b[k])) for k in np.flatnonzero(fits)]


# --------------------------------------------------------------------------------------------------- crossings


def crossings(mask: NDArray[np.uint8], grid: BevGrid) -> list[Polygon]:
    """Return the crossings (ego frame, m) of a mask [rows, cols] of 0 and 1.

    They are faces of the network of outlines, and the hulls of strokes that enclose nothing.
    """
    half_l, half_w = grid.length / 2 - grid.resolution / 2, grid.width / 2 - grid.resolution / 2
    region = box(-half_l, -half_w, half_l, half_w)
    pieces = _longest(_merged(shapely.linestrings(skeleton_edges(thin(mask)))), MOST_LINES)
    outlines = [LineString(_to_metres(shapely.get_coordinates(p), grid)) for p in pieces]
    net = shapely.union_all([*outlines, *_to_the_rim(outlines, region), region.exterior])
    faces = shapely.get_parts(shapely.polygonize(shapely.get_parts(net)))
    faces = faces[shapely.area(faces) >= SMALLEST_CROSSING_M2]
    rim = shapely.length(shapely.intersection(shapely.get_exterior_ring(faces), region.exterior))
    faces = faces[rim <= RIM_SHARE * shapely.length(shapely.get_exterior_ring(faces))]
    found = list(faces[shapely.is_empty(shapely.buffer(faces, -WIDEST_CROSSING_M / 2))])
    count, part, boxes, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    used = {0}.union(*(np.unique(part[tuple(_pixels(face.exterior, grid).T)]) for face in found))
    # Outlines that enclose nothing; a crossing leaves more than a few pixels behind.
    wide = boxes[:, cv2.CC_STAT_WIDTH] * boxes[:, cv2.CC_STAT_HEIGHT] * grid.resolution**2 >= SMALLEST_CROSSING_M2
    for label in sorted(set(np.flatnonzero(wide).tolist()) - used):
        x, y, width, height = boxes[label, : cv2.CC_STAT_AREA]
        hull = _hull(part[y : y + height, x : x + width] == label, (int(x), int(y)), grid)
        if hull is not None:
            found.append(hull)
    simple = [face.simplify(TOLERANCE_M) for face in found]
    return [face for face in simple if face.geom_type == "Polygon" and face.is_valid and not face.is_empty]


def _to_the_rim(outlines: list[LineString], region: Polygon) -> list[LineString]:
    """Return what is missing between dead ends and the edge of the region: drawn outlines stop short of it."""
    dead, count = np.unique(_ends(outlines).reshape(-1, 2), axis=0, return_counts=True)
    across = shapely.shortest_line(shapely.points(dead[count == 1]), region.exterior)
    length = shapely.length(across)
    return list(across[(length > 0) & (length < RIM_M)])


def _hull(part: NDArray[np.bool_], corner: tuple[int, int], grid: BevGrid) -> Polygon | None:
    """Return the hull of a broken outline or a filled crossing, None for what is as thin as a line.

    :param part: the pixels [rows, cols] of its bounding box
    :param corner: column and row of the box in the layer
    """
    rows, cols = np.nonzero(part)
    pixels = (np.stack([cols, rows], axis=1) + corner).astype(np.float64)
    hull = shapely.convex_hull(shapely.multipoints(_to_metres(pixels, grid)))
    # Of what is drawn as wide as the truth is, the middle of the stroke is the outline.
    inner = hull.buffer(-(LINE_WIDTH_PX // 2) * grid.resolution, join_style="mitre")
    wide = inner.geom_type == "Polygon" and not inner.buffer(-0.5).is_empty
    return inner if wide and inner.area >= SMALLEST_CROSSING_M2 else None


# ------------------------------------------------------------------------------------------------------- shared


def _to_metres(pixels: Array, grid: BevGrid) -> Array:
    """Return pixels [N, 2] = (col, row) as points [N, 2] = (x, y), m."""
    return (np.asarray(pixels) + 0.5) * grid.resolution - [grid.length / 2, grid.width / 2]


def _pixels(shape: BaseGeometry, grid: BevGrid) -> NDArray[np.int64]:
    """Return the pixels [N, 2] = (row, col) every half pixel along a line."""
    return _cells(along(shape, grid.resolution / 2), grid)


def _cells(points: Array, grid: BevGrid) -> NDArray[np.int64]:
    """Return the pixels [N, 2] = (row, col) of points [N, 2] (m)."""
    at = (points + [grid.length / 2, grid.width / 2]) / grid.resolution
    return np.clip(np.floor(at[:, ::-1]), 0, np.array(grid.shape) - 1).astype(np.int64)
