"""What stands beside the road: buildings, trees, poles and street furniture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import STRtree
from shapely.geometry import LinearRing, Polygon, box
from shapely.geometry.base import BaseGeometry
from shapely.geometry.polygon import orient

from nmp_train.sim.boxes import BARRIER, BUILDING, CROWN, POLE, Boxes
from nmp_train.sim.lanes import world_of
from nmp_train.sim.mapjson import polygons_of

Array = NDArray[np.float64]

_FACADES = np.array(
    [
        [0.55, 0.33, 0.27],
        [0.62, 0.58, 0.52],
        [0.72, 0.70, 0.66],
        [0.45, 0.47, 0.50],
        [0.35, 0.42, 0.48],
        [0.80, 0.76, 0.66],
    ]
)


def make_scenery(city: dict[str, Any], seed: int, region: BaseGeometry | None = None) -> Boxes:
    """Return the standing scenery of a city, or of the part of it inside ``region`` (map frame, m)."""
    rng = np.random.default_rng([seed, 11])
    width, height = city["canvas_edge"]
    ground = world_of(city).surface(box(0, 0, width, height) if region is None else region)
    parts = [_buildings(rng, ground), *_along_kerbs(rng, ground)]
    return Boxes.joined([p for p in parts if len(p)])


class Kerb:
    """An outline of a road surface with the road on its left, asked by distance along it (m)."""

    def __init__(self, ring: LinearRing) -> None:
        self.points = shapely.get_coordinates(ring)
        self.s: Array = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(self.points, axis=0).T))])
        self.length = float(self.s[-1])

    def at(self, s: Array) -> Array:
        """Return the points [N, 2] at distances [N]."""
        return np.stack([np.interp(s, self.s, self.points[:, k]) for k in (0, 1)], axis=-1)

    def beside(self, s: Array, offset: Array | float, span: Array | float = 2.0) -> tuple[Array, Array]:
        """Return (points [N, 2], headings [N]) at distances ``s``, ``offset`` m to the left.

        The heading is that of the chord of length ``span`` around the point.
        """
        half = np.asarray(span) / 2
        p, q = self.at(s - half), self.at(s + half)
        heading = np.arctan2(q[:, 1] - p[:, 1], q[:, 0] - p[:, 0])
        normal = np.stack([-np.sin(heading), np.cos(heading)], axis=1)
        return (p + q) / 2 + np.asarray(offset).reshape(-1, 1) * normal, heading


def kerb_lines(surface: BaseGeometry, smooth_m: float = 0.0) -> Iterator[Kerb]:
    """Yield the outlines of a road surface; small islands and medians are left out."""
    shape = surface if smooth_m == 0 else surface.buffer(smooth_m, quad_segs=3).buffer(-smooth_m, quad_segs=3)
    for polygon in polygons_of(shape, 50.0):
        oriented = orient(polygon, 1.0)
        yield Kerb(oriented.exterior)
        for ring in oriented.interiors:
            hole = Polygon(ring)
            # Medians and islands are long or small, blocks are neither.
            if hole.area > 600 and hole.area / hole.length > 5:
                yield Kerb(ring)


def rectangles(xy: Array, yaw: Array, size: Array) -> NDArray[np.object_]:
    """Return rectangles with middles [N, 2], headings [N] and lengths and widths [N, 2] as polygons."""
    corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / 2 * size[:, None, :]
    c, s = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    x = xy[:, None, 0] + corners[..., 0] * c - corners[..., 1] * s
    y = xy[:, None, 1] + corners[..., 0] * s + corners[..., 1] * c
    return np.asarray(shapely.polygons(np.stack([x, y], axis=-1)), dtype=object)


def _buildings(rng: np.random.Generator, ground: BaseGeometry) -> Boxes:
    xy, yaw, size = [], [], []
    for kerb in kerb_lines(ground, 7.0):
        s = float(rng.uniform(0, 15))
        tall = float(rng.choice([1.0, 2.2]))
        back = float(rng.uniform(4.5, 8))
        while s < kerb.length - 6:
            front, depth = float(rng.uniform(8, 30)), float(rng.uniform(8, 18))
            tall = float(rng.choice([1.0, 2.2])) if rng.random() < 0.2 else tall
            back = float(rng.uniform(4.0, 11)) if rng.random() < 0.3 else back
            point, heading = kerb.beside(np.array([s + front / 2]), -(back + depth / 2), front)
            xy.append(point[0])
            yaw.append(heading[0])
            size.append([front, depth, float(rng.uniform(4, 14)) * tall])
            s += front + float(rng.uniform(0.5, 2.5) if rng.random() < 0.5 else rng.uniform(4, 24))
    if not xy:
        return Boxes.empty()
    at, turn, dims = np.array(xy), np.array(yaw), np.array(size)
    shapes = rectangles(at, turn, dims[:, :2])
    road = ground.buffer(2.2, quad_segs=2)
    shapely.prepare(road)
    keep = ~shapely.intersects(road, shapes)
    first, second = STRtree(shapes).query(shapes, predicate="intersects")
    for i, j in sorted(zip(first.tolist(), second.tolist(), strict=True)):
        if i < j and keep[i] and keep[j]:
            keep[j] = False
    at, turn, dims = at[keep], turn[keep], dims[keep]
    rgb = np.clip(_FACADES[rng.integers(0, len(_FACADES), len(at))] + rng.normal(0, 0.05, (len(at), 3)), 0.05, 0.95)
    centre = np.column_stack([at, dims[:, 2] / 2])
    return Boxes.scenery(centre, dims, turn, rgb, BUILDING)


def _along_kerbs(rng: np.random.Generator, ground: BaseGeometry) -> list[Boxes]:
    out = []
    near = ground.buffer(0.45, quad_segs=2)
    shapely.prepare(near)
    for kerb in kerb_lines(ground, 1.5):
        trees = _spots(rng, kerb, near, (7, 14), (20, 90), (5, 60), (0.9, 2.4))
        n = len(trees)
        if n:
            stem, crown = rng.uniform(1.6, 2.8, n), rng.uniform(2.2, 5.0, n)
            tall = crown * rng.uniform(0.9, 1.4, n)
            green = np.array([0.20, 0.33, 0.13]) * rng.uniform(0.7, 1.4, (n, 1)) + rng.normal(0, 0.03, (n, 3))
            size = np.column_stack([crown, crown, tall])
            centre = np.column_stack([trees, stem + tall / 2 - 0.2])
            out.append(Boxes.scenery(centre, size, np.zeros(n), np.clip(green, 0.02, 0.9), CROWN))
            wide = rng.uniform(0.18, 0.4, n)
            size = np.column_stack([wide, wide, stem])
            bark = np.tile([0.28, 0.22, 0.17], (n, 1))
            out.append(Boxes.scenery(np.column_stack([trees, stem / 2]), size, np.zeros(n), bark, POLE))
        poles = _spots(rng, kerb, near, (24, 36), (200, 400), (0, 20), (0.6, 1.0))
        n = len(poles)
        if n:
            tall = np.where(rng.random(n) < 0.7, rng.uniform(6, 9, n), rng.uniform(2.2, 3.2, n))
            size = np.column_stack([np.full(n, 0.18), np.full(n, 0.18), tall])
            grey = np.repeat(rng.uniform(0.25, 0.55, (n, 1)), 3, axis=1)
            out.append(Boxes.scenery(np.column_stack([poles, tall / 2]), size, np.zeros(n), grey, POLE))
        things = _spots(rng, kerb, near, (2, 16), (10, 40), (20, 120), (0.6, 2.2))
        n = len(things)
        if n:
            size = np.column_stack([rng.uniform(0.3, 2.0, n), rng.uniform(0.25, 0.6, n), rng.uniform(0.6, 1.2, n)])
            colours = np.array(
                [[0.85, 0.35, 0.1], [0.75, 0.75, 0.72], [0.2, 0.3, 0.22], [0.7, 0.65, 0.1], [0.3, 0.3, 0.33]]
            )
            rgb = colours[rng.integers(0, len(colours), n)]
            yaw = rng.uniform(0, np.pi, n)
            out.append(Boxes.scenery(np.column_stack([things, size[:, 2] / 2]), size, yaw, rgb, BARRIER))
    return out


def _spots(
    rng: np.random.Generator,
    kerb: Kerb,
    near: BaseGeometry,
    spacing: tuple[float, float],
    run: tuple[float, float],
    pause: tuple[float, float],
    setback: tuple[float, float],
) -> Array:
    """Points [N, 2] behind a kerb, in runs of an even spacing with pauses between them."""
    s, at = float(rng.uniform(0, 20)), []
    while s < kerb.length - 2:
        step, stop = float(rng.uniform(*spacing)), s + float(rng.uniform(*run))
        while s < min(stop, kerb.length - 2):
            at.append(s)
            s += step * float(rng.uniform(0.85, 1.15))
        s += float(rng.uniform(*pause))
    if not at:
        return np.zeros((0, 2))
    back = float(rng.uniform(*setback)) + rng.normal(0, 0.08, len(at))
    points, _ = kerb.beside(np.array(at), -back)
    return points[~shapely.intersects(near, shapely.points(points))]
