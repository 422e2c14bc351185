"""What stands beside the road: buildings, walls and hedges, trees, lamps, signs, street furniture, car parks.

Made once for a city from its seed, so that every drive finds the same things in the same places.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import STRtree
from shapely.geometry import Polygon, box
from shapely.geometry.base import BaseGeometry
from shapely.geometry.polygon import orient

from nmp_train.sim.boxes import BARRIER, BUILDING, CROWN, LAMP_POLE, POLE, SIGN, WALL, Boxes
from nmp_train.sim.lanes import RoadNetwork, roads_of
from nmp_train.sim.mapjson import polygons_of
from nmp_train.sim.polyline import Polyline
from nmp_train.sim.vehicles import build, draw_vehicles

Array = NDArray[np.float64]

_FACADES = np.array(
    [
        [0.42, 0.29, 0.25],
        [0.50, 0.47, 0.43],
        [0.64, 0.63, 0.60],
        [0.36, 0.37, 0.39],
        [0.28, 0.31, 0.34],
        [0.62, 0.58, 0.51],
        [0.20, 0.21, 0.23],
    ]
)
_GREEN = np.array([0.115, 0.145, 0.075])
_WALLS = np.array([[0.62, 0.6, 0.56], [0.5, 0.3, 0.24], [0.75, 0.73, 0.68], [0.3, 0.31, 0.32], [0.4, 0.3, 0.2]])
_SIGNS = np.array([[0.08, 0.35, 0.18], [0.1, 0.2, 0.55], [0.8, 0.8, 0.78], [0.75, 0.1, 0.1], [0.85, 0.65, 0.1]])
_SMALL = np.array([[0.75, 0.1, 0.08], [0.2, 0.3, 0.22], [0.12, 0.2, 0.4], [0.3, 0.3, 0.33], [0.7, 0.65, 0.1]])


def make_scenery(city: dict[str, Any], seed: int, region: BaseGeometry | None = None) -> Boxes:
    """Return the standing scenery of a city, or of the part of it inside ``region`` (map frame, m)."""
    rng = np.random.default_rng([seed, 11])
    roads = roads_of(city)
    width, height = city["canvas_edge"]
    area = box(0, 0, width, height) if region is None else region
    ground = roads.surface(area)
    parts = [*_frontage(rng, ground), *_along_kerbs(rng, ground), *_medians(rng, ground)]
    parts.append(_signals(rng, roads, area, ground))
    return Boxes.joined([p for p in parts if len(p)])


class Kerb(Polyline):
    """An outline of a road surface with the road on its left, asked by distance along it (m)."""

    def poses_beside(self, s: Array, offset: Array | float, span: Array | float = 2.0) -> tuple[Array, Array]:
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
        yield Kerb(oriented.exterior.coords)
        for ring in oriented.interiors:
            hole = Polygon(ring)
            # Medians and islands are long or small, blocks are neither.
            if hole.area > 600 and hole.area / hole.length > 5:
                yield Kerb(ring.coords)


def rectangles(xy: Array, yaw: Array, size: Array) -> NDArray[np.object_]:
    """Return rectangles with middles [N, 2], headings [N] and lengths and widths [N, 2] as polygons."""
    corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / 2 * size[:, None, :]
    c, s = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    x = xy[:, None, 0] + corners[..., 0] * c - corners[..., 1] * s
    y = xy[:, None, 1] + corners[..., 0] * s + corners[..., 1] * c
    return np.asarray(shapely.polygons(np.stack([x, y], axis=-1)), dtype=object)


def _frontage(rng: np.random.Generator, ground: BaseGeometry) -> list[Boxes]:
    """Buildings behind the pavements, and between them walls, hedges, fences, greens and car parks."""
    lots: list[tuple[float, ...]] = []
    for kerb in kerb_lines(ground, 7.0):
        s = float(rng.uniform(0, 15))
        tall, back = float(rng.choice([1.0, 2.2])), float(rng.uniform(4.5, 8))
        while s < kerb.length - 6:
            what = int(rng.choice(4, p=[0.68, 0.14, 0.06, 0.12]))
            tall = float(rng.choice([0.7, 1.0, 2.2, 3.5], p=[0.25, 0.4, 0.25, 0.1])) if rng.random() < 0.25 else tall
            back = float(rng.uniform(4.0, 12)) if rng.random() < 0.35 else back
            if what == 0:
                front, depth, high = rng.uniform(8, 32), rng.uniform(7, 26), rng.uniform(4, 14) * tall
                near = back
            elif what == 1:
                front, near = rng.uniform(6, 18), rng.uniform(2.6, 4.0)
                hedge = rng.random() < 0.4
                depth, high = (rng.uniform(0.6, 1.2), rng.uniform(0.7, 1.7)) if hedge else (0.2, rng.uniform(0.9, 2.4))
            elif what == 2:
                front, near, depth, high = rng.uniform(12, 32), rng.uniform(3.6, 5.5), 5.2, 0.1
            else:
                front, near, depth, high = rng.uniform(10, 30), 3.5, rng.uniform(6, 14), 0.1
            point, heading = kerb.poses_beside(np.array([s + front / 2]), -(near + depth / 2), front)
            lots.append((*point[0], heading[0], front, depth, high, what))
            s += float(front) + float(rng.uniform(0.3, 1.5) if rng.random() < 0.65 else rng.uniform(3, 14))
    if not lots:
        return []
    table = np.array(lots)
    shapes = rectangles(table[:, :2], table[:, 2], table[:, 3:5])
    road = ground.buffer(2.2, quad_segs=2)
    shapely.prepare(road)
    keep = ~shapely.intersects(road, shapes)
    first, second = STRtree(shapes).query(shapes, predicate="intersects")
    for i, j in sorted(zip(first.tolist(), second.tolist(), strict=True)):
        if i < j and keep[i] and keep[j]:
            keep[j] = False
    table = table[keep]
    at, yaw, size, what = table[:, :2], table[:, 2], table[:, 3:6], table[:, 6].astype(np.int64)
    built, fenced = what == 0, what == 1
    rgb = _tinted(rng, _FACADES, len(at), 0.05)
    # Hedges are the thick ones.
    hedges = fenced & (size[:, 1] > 0.4)
    rgb[fenced] = _tinted(rng, _WALLS, int(fenced.sum()), 0.03)
    rgb[hedges] = _greens(rng, int(hedges.sum()))
    out = [_stand(at[built], size[built], yaw[built], rgb[built], BUILDING)]
    out.append(_stand(at[fenced], size[fenced], yaw[fenced], rgb[fenced], WALL))
    # Some high ones step back above the lower floors.
    stepped = np.flatnonzero(built & (size[:, 2] > 12) & (rng.random(len(at)) < 0.5))
    if len(stepped):
        upper = size[stepped] * np.column_stack(
            [rng.uniform(0.5, 0.85, (len(stepped), 2)), rng.uniform(0.4, 1.2, len(stepped))]
        )
        out.append(_stand(at[stepped], upper, yaw[stepped], rgb[stepped] * 0.92, BUILDING, size[stepped, 2]))
    out += [_car_park(rng, at[k], yaw[k], size[k, 0]) for k in np.flatnonzero(what == 2)]
    for k in np.flatnonzero(what == 3):
        out += _park(rng, at[k], yaw[k], size[k])
    return out


def _park(rng: np.random.Generator, at: Array, yaw: float, size: Array) -> list[Boxes]:
    """Trees here and there on a green."""
    n = int(rng.integers(2, 3 + int(size[0] / 7)))
    x, y = rng.uniform(-0.5, 0.5, (2, n)) * size[:2, None]
    c, s = np.cos(yaw), np.sin(yaw)
    return _trees(rng, at + np.column_stack([x * c - y * s, x * s + y * c]), float(rng.choice([1.0, 1.7])))


def _car_park(rng: np.random.Generator, at: Array, yaw: float, length: float) -> Boxes:
    """A row of parked cars, side by side across the direction of the road."""
    places = np.arange(-length / 2 + 1.3, length / 2 - 1.2, 2.6)
    places = places[rng.random(len(places)) < 0.7]
    cars = draw_vehicles(rng, len(places), "parked", alone=True)
    low = np.flatnonzero(cars.size[:, 0] < 5.3)
    cars, places = cars.pick(low), places[low]
    turned = yaw + np.pi / 2 + np.where(rng.random(len(low)) < 0.5, np.pi, 0.0)
    xy = at + places[:, None] * np.array([np.cos(yaw), np.sin(yaw)])
    nothing = np.zeros((len(low), 2))
    return build(cars, np.column_stack([xy, turned]), nothing, np.full(len(low), -1))


def _along_kerbs(rng: np.random.Generator, ground: BaseGeometry) -> list[Boxes]:
    out = []
    near = ground.buffer(0.45, quad_segs=2)
    shapely.prepare(near)
    for kerb in kerb_lines(ground, 1.5):
        # One kind of tree to a street, as a rule.
        scale = float(rng.choice([0.65, 1.0, 1.7], p=[0.3, 0.45, 0.25]))
        spacing = (5 + 4 * scale, 8 + 7 * scale)
        trees, _ = _spots(rng, kerb, near, spacing, (25, 120), (5, 50), (0.9, 2.4))
        out += _trees(rng, trees, scale)
        # Planting strips and railings stand before the pavement, walls of shelters and kiosks on it.
        out.append(_strips(rng, kerb, near))
        lamps, _ = _spots(rng, kerb, near, (24, 36), (200, 400), (0, 20), (0.6, 1.0))
        n = len(lamps)
        tall = np.full(n, float(rng.uniform(6, 10)))
        size = np.column_stack([np.full(n, 0.18), np.full(n, 0.18), tall])
        grey = np.tile(rng.uniform(0.25, 0.55), (n, 3))
        out.append(_stand(lamps, size, np.zeros(n), grey, LAMP_POLE))
        signs, along = _spots(rng, kerb, near, (25, 70), (100, 400), (0, 60), (0.5, 0.9))
        out += _posts(rng, signs, along + np.pi / 2, rng.uniform(2.0, 2.5, len(signs)), (0.7, 0.8))
        small, along = _spots(rng, kerb, near, (8, 40), (20, 80), (30, 140), (0.6, 1.6))
        n = len(small)
        size = np.column_stack([rng.uniform(0.3, 0.8, n), rng.uniform(0.25, 0.6, n), rng.uniform(0.6, 1.2, n)])
        out.append(_stand(small, size, along, _tinted(rng, _SMALL, n, 0.03), BARRIER))
        shelters, along = _spots(rng, kerb, near, (150, 400), (10, 20), (150, 300), (1.9, 2.4))
        out += _shelters(rng, shelters, along, near)
        out.append(_site(rng, kerb, near))
    return out


def _trees(rng: np.random.Generator, at: Array, scale: float) -> list[Boxes]:
    """Trunks and crowns; the crowns of large trees hang over the road, above the traffic."""
    n = len(at)
    crown = rng.uniform(2.8, 5.0, n) * scale
    tall = crown * rng.uniform(0.75, 1.3, n)
    stem = np.maximum(rng.uniform(1.6, 2.8, n) * np.sqrt(scale), np.where(crown > 2.4, 2.9, 1.7))
    size = np.column_stack([crown, crown * rng.uniform(0.85, 1.15, n), tall])
    thick = rng.uniform(0.18, 0.3, n) * scale
    bark = np.tile([0.28, 0.22, 0.17], (n, 1))
    return [
        _stand(at, size, rng.uniform(0, np.pi, n), _greens(rng, n), CROWN, stem - 0.2),
        _stand(at, np.column_stack([thick, thick, stem]), np.zeros(n), bark, POLE),
    ]


def _strips(rng: np.random.Generator, kerb: Kerb, near: BaseGeometry) -> Boxes:
    """Low hedges or railings beside the kerb, in pieces that follow it."""
    kind = int(rng.choice(3, p=[0.6, 0.25, 0.15]))
    if kind == 0:
        return Boxes.empty()
    green = kind == 1
    piece = float(rng.uniform(5, 9))
    setback = (0.9, 1.2) if green else (0.6, 0.7)
    at, along = _spots(rng, kerb, near, (piece, piece), (20, 70), (15, 90), setback, piece)
    n = len(at)
    thick, high = (0.8, float(rng.uniform(0.4, 0.9))) if green else (0.06, 1.0)
    size = np.tile([piece * 0.9, thick, high], (n, 1))
    keep = ~shapely.intersects(near, rectangles(at, along, size[:, :2])) if n else np.zeros(0, bool)
    rgb = _greens(rng, n) if green else np.full((n, 3), 0.5)
    return _stand(at[keep], size[keep], along[keep], rgb[keep], WALL)


def _posts(rng: np.random.Generator, at: Array, yaw: Array, bottom: Array, span: tuple[float, float]) -> list[Boxes]:
    """Signs on posts: a board that faces along ``yaw`` [N] and begins ``bottom`` [N] m above the ground."""
    n = len(at)
    wide, high = rng.uniform(0.45, span[0], n), rng.uniform(0.45, span[1], n)
    post = np.column_stack([np.full(n, 0.09), np.full(n, 0.09), bottom + high])
    board = np.column_stack([np.full(n, 0.05), wide, high])
    # The board hangs before its post.
    front = at + 0.08 * np.column_stack([np.cos(yaw), np.sin(yaw)])
    return [
        _stand(at, post, np.zeros(n), np.full((n, 3), 0.45), POLE),
        _stand(front, board, yaw, _tinted(rng, _SIGNS, n, 0.03), SIGN, bottom),
    ]


def _shelters(rng: np.random.Generator, at: Array, along: Array, near: BaseGeometry) -> list[Boxes]:
    """Bus shelters: a roof over a rear wall."""
    n = len(at)
    length = rng.uniform(4, 9, n)
    keep = ~shapely.intersects(near, rectangles(at, along, np.column_stack([length, np.full(n, 1.7)])))
    at, along, length = at[keep], along[keep], length[keep]
    n = len(at)
    away = np.column_stack([np.sin(along), -np.cos(along)])
    roof = np.column_stack([length, np.full(n, 1.7), np.full(n, 0.12)])
    wall = np.column_stack([length * 0.9, np.full(n, 0.08), np.full(n, 2.1)])
    return [
        _stand(at, roof, along, np.full((n, 3), 0.35), BARRIER, np.full(n, 2.4)),
        _stand(at + 0.7 * away, wall, along, np.tile([0.42, 0.48, 0.5], (n, 1)), WALL, np.full(n, 0.25)),
    ]


def _site(rng: np.random.Generator, kerb: Kerb, near: BaseGeometry) -> Boxes:
    """A building site: a hoarding of long boards or barriers close behind the kerb."""
    if rng.random() > kerb.length / 1500:
        return Boxes.empty()
    low = rng.random() < 0.5
    s = float(rng.uniform(0, kerb.length)) + np.arange(0, float(rng.uniform(18, 60)), 6.0)
    at, along = kerb.poses_beside(s[s < kerb.length], -(0.75 if low else 1.6), 6.0)
    n = len(at)
    size = np.tile([5.9, 0.45, 0.95] if low else [5.95, 0.12, 2.4], (n, 1))
    rgb = np.tile(_SIGNS[4] if low else _WALLS[int(rng.integers(len(_WALLS)))], (n, 1))
    keep = ~shapely.intersects(near, rectangles(at, along, size[:, :2])) if n else np.zeros(0, bool)
    return _stand(at[keep], size[keep], along[keep], rgb[keep], BARRIER if low else WALL)


def _medians(rng: np.random.Generator, ground: BaseGeometry) -> list[Boxes]:
    """Hedges, trees and lamps in the middle of wide medians."""
    out = []
    for polygon in polygons_of(ground, 50.0):
        for ring in polygon.interiors:
            hole = Polygon(ring)
            if not 12 < hole.area < 2500 or hole.area / hole.length > 5:
                continue
            core = hole.buffer(-0.75)
            for part in polygons_of(core, 1.0):
                # The outline of the core runs up and down beside the middle line.
                kerb = Kerb(orient(part, 1.0).exterior.coords)
                piece = 6.0
                s = np.arange(piece / 2, kerb.length / 2, piece)
                if not len(s):
                    continue
                at, along = kerb.poses_beside(s, 0.0, piece)
                size = np.tile([piece * 0.95, 0.5, float(rng.uniform(0.5, 1.1))], (len(s), 1))
                what = rng.random()
                if what < 0.5:
                    inside = shapely.contains(hole, rectangles(at, along, size[:, :2]))
                    out.append(_stand(at[inside], size[inside], along[inside], _greens(rng, int(inside.sum())), WALL))
                if what > 0.3:
                    out += _trees(rng, at[::2], float(rng.choice([0.7, 1.2])))
    return out


def _signals(rng: np.random.Generator, roads: RoadNetwork, area: BaseGeometry, ground: BaseGeometry) -> Boxes:
    """Traffic lights on poles at the ends of the crossings."""
    crossings = roads.map.crossings.near(area)
    at, yaw = [np.zeros((0, 2))], [np.zeros(0)]
    for crossing in crossings:
        corners = shapely.get_coordinates(crossing.minimum_rotated_rectangle)[:4]
        if len(corners) < 4 or rng.random() < 0.4:
            continue
        edges = np.roll(corners, -1, axis=0) - corners
        k = int(np.argmax(np.hypot(*edges[:2].T)))
        along = edges[k] / max(float(np.hypot(*edges[k])), 1e-6)
        # Two opposite corners, a little beyond the ends.
        at.append(np.array([corners[k] - 0.9 * along, corners[(k + 2) % 4] + 0.9 * along]))
        across = np.arctan2(edges[k - 1][1], edges[k - 1][0])
        yaw.append(np.array([across + np.pi, across]))
    xy, facing = np.concatenate(at), np.concatenate(yaw)
    near = ground.buffer(0.35, quad_segs=2)
    shapely.prepare(near)
    free = ~shapely.intersects(near, shapely.points(xy))
    xy, facing = xy[free], facing[free]
    n = len(xy)
    pole = np.tile([0.14, 0.14, 3.4], (n, 1))
    lights = np.tile([0.25, 0.36, 1.0], (n, 1))
    dark = np.tile([0.05, 0.055, 0.05], (n, 1))
    return Boxes.joined(
        [
            _stand(xy, pole, np.zeros(n), np.full((n, 3), 0.3), POLE),
            _stand(xy, lights, facing, dark, SIGN, np.full(n, 2.3)),
        ]
    )


def _stand(at: Array, size: Array, yaw: Array, rgb: Array, kind: int, bottom: Array | None = None) -> Boxes:
    """Boxes of one kind whose bottoms are ``bottom`` [N] m above the ground (none: on it)."""
    z = size[:, 2] / 2 if bottom is None else bottom + size[:, 2] / 2
    return Boxes.scenery(np.column_stack([at, z]), size, yaw, rgb, kind)


def _tinted(rng: np.random.Generator, colours: Array, count: int, spread: float) -> Array:
    """Draw colours; they vary in brightness more than in hue."""
    shade, hue = rng.normal(0, spread, (count, 1)), rng.normal(0, spread / 5, (count, 3))
    return np.clip(colours[rng.integers(0, len(colours), count)] + shade + hue, 0.02, 0.95)


def _greens(rng: np.random.Generator, count: int) -> Array:
    return np.clip(_GREEN * rng.uniform(0.55, 1.5, (count, 1)) + rng.normal(0, 0.008, (count, 3)), 0.02, 0.9)


def _spots(
    rng: np.random.Generator,
    kerb: Kerb,
    near: BaseGeometry,
    spacing: tuple[float, float],
    run: tuple[float, float],
    pause: tuple[float, float],
    setback: tuple[float, float],
    span: float = 2.0,
) -> tuple[Array, Array]:
    """Points [N, 2] behind a kerb and its headings [N], in runs of an even spacing with pauses between them."""
    s, at = float(rng.uniform(0, 20)), []
    while s < kerb.length - 2:
        step, stop = float(rng.uniform(*spacing)), s + float(rng.uniform(*run))
        while s < min(stop, kerb.length - 2):
            at.append(s)
            s += step if spacing[0] == spacing[1] else step * float(rng.uniform(0.85, 1.15))
        s += float(rng.uniform(*pause))
    if not at:
        return np.zeros((0, 2)), np.zeros(0)
    back = float(rng.uniform(*setback)) + (0.0 if spacing[0] == spacing[1] else rng.normal(0, 0.08, len(at)))
    points, along = kerb.poses_beside(np.array(at), -back, span)
    free = ~shapely.intersects(near, shapely.points(points))
    return points[free], along[free]
