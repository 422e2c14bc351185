"""The asphalt itself: paving seams, tones, trenches, tracks, cracks, patches, lids, stains and concrete."""

from __future__ import annotations

import numpy as np
import shapely
from shapely.geometry import Point, Polygon
from shapely.geometry.base import BaseGeometry

from nmp.citymap import CityMap
from nmp_train.sim.clutter import Clutter
from nmp_train.sim.markings import TAR, patch
from nmp_train.sim.marks import Array, Layer, Marks, pieces, rng_of
from nmp_train.sim.polyline import Polyline
from nmp_train.sim.roadside import LaneAxis, RoadSide

CELL_M = 20.0
"""things that lie anywhere are drawn per cell of a fixed grid"""
BLOCK_M = 70.0
"""lanes whose middles lie in one such block are of concrete together"""
CONCRETE = np.array([0.42, 0.41, 0.385])


def mark_lengthwise(
    marks: Marks, city: CityMap, side: RoadSide, region: BaseGeometry, clutter: Clutter, seed: int
) -> None:
    """Lay seams, tones, trenches and tyre tracks along dividers and kerbs."""
    lines = [*city.road_dividers.near(region), *city.lane_dividers.near(region)]
    guides = [Polyline(shapely.get_coordinates(line)) for line in lines]
    guides += [run.path for run in side.runs_near(region) if run.straight and run.path.length > 15]
    for k, guide in enumerate(guides):
        if guide.length < 8:
            continue
        kerb = k >= len(lines)
        rng = rng_of(seed, guide.points, 3)
        # The strip beside a kerb is the gutter's.
        low, high = (0.8, 6.5) if kerb else (-2.6, 2.6)
        if rng.random() < clutter.seams:
            _seam(marks, rng, guide, float(rng.uniform(low, high)), side, clutter)
        if rng.random() < clutter.trenches:
            start = float(rng.uniform(0, guide.length * 0.7))
            stop = min(guide.length, start + float(rng.uniform(5, 45)))
            at, wide = float(rng.uniform(low, high)), float(rng.uniform(0.35, 1.1))
            _lay(marks, rng, guide, start, stop, at, wide, side)
        if not kerb and rng.random() < clutter.tracks:
            offset = float(rng.uniform(1.4, 1.9)) * rng.choice([-1, 1])
            for shift, gain in ((-0.8, 1.07), (0.0, float(rng.uniform(0.82, 0.95))), (0.8, 1.07)):
                for part in guide.shifted(offset + shift):
                    strength = rng.uniform(0.5, 1.0)
                    marks.stroke(
                        pieces(part, 10.0), 0.55, gain, strength, layer=Layer.DIRT, soft=0.3, gain=True, rough=0.5
                    )


def _inside(side: RoadSide, shape: Polygon) -> bool:
    return bool(side.surface.contains(shape))


def _seam(
    marks: Marks, rng: np.random.Generator, guide: Polyline, offset: float, side: RoadSide, clutter: Clutter
) -> None:
    start = float(rng.uniform(0, guide.length * 0.5))
    stop = min(guide.length, start + float(rng.uniform(15, 90)))
    strip = guide.quad(start, stop, offset - 0.05, offset + 0.05)
    if not _inside(side, strip):
        return
    if rng.random() < clutter.tones:
        wide = float(rng.uniform(2.4, 3.6)) * rng.choice([-1, 1])
        low, high = sorted((offset, offset + wide))
        gain = float(rng.choice([rng.uniform(0.72, 0.9), rng.uniform(1.1, 1.3)]))
        area = guide.quad(start, stop, low, high).intersection(side.surface)
        marks.fill([area], gain, 0.9, layer=Layer.TONE, gain=True)
        for s in (start, stop):  # the end of a day's paving
            marks.stroke([guide.beside([s, s], [low, high])], 0.05, TAR, 0.5, layer=Layer.SEAM, rough=0.6)
    kind = rng.random()
    width = float(rng.uniform(0.03, 0.1))
    if kind < 0.75:
        rgb, opacity = TAR, float(rng.uniform(0.35, 0.85))
    else:  # a dusty joint is lighter than what it joins
        rgb, opacity = np.full(3, rng.uniform(0.4, 0.55)), float(rng.uniform(0.3, 0.7))
    for part in Polyline(guide.cut(start, stop)).shifted(offset):
        strokes = pieces(part, 4.0)
        level = opacity * rng.uniform(0.4, 1.0, len(strokes))
        marks.stroke(strokes, width, rgb, level.tolist(), layer=Layer.SEAM, rough=0.7)


def _lay(
    marks: Marks,
    rng: np.random.Generator,
    guide: Polyline,
    start: float,
    stop: float,
    at: float,
    wide: float,
    side: RoadSide,
) -> None:
    if stop - start > 3:
        area = guide.quad(start, stop, at - wide / 2, at + wide / 2)
        if _inside(side, area):
            patch(marks, rng, area, Layer.PATCH if rng.random() < 0.4 else Layer.TONE)


def mark_concrete(marks: Marks, axes: list[LaneAxis], clutter: Clutter, seed: int) -> None:
    """Make some blocks of lanes light concrete slabs with a grid of joints."""
    for axis in axes:
        block = np.floor(axis.middle / BLOCK_M)
        shared = rng_of(seed, block, 4)
        if shared.random() >= clutter.concrete:
            continue
        tone, slab = CONCRETE * shared.uniform(0.8, 1.1), float(shared.uniform(3.5, 6.0))
        path, half = axis.path, axis.width / 2 + 0.12
        marks.fill([path.quad(0, path.length, -half, half)], tone, 0.95, layer=Layer.TONE, rough=0.1)
        joints = [path.beside([s, s], [-half, half]) for s in np.arange(slab / 2, path.length, slab)]
        joints += [path.beside([0, path.length], [d, d]) for d in (-half, half)]
        marks.stroke(joints, 0.04, TAR, 0.6, layer=Layer.SEAM, rough=0.5)


def mark_spots(marks: Marks, side: RoadSide, region: BaseGeometry, clutter: Clutter, seed: int) -> None:
    """Scatter patches, lids, cracks, stains, skid marks and puddles over the road, cell by cell."""
    low, high = (np.array(region.bounds[k : k + 2]) // CELL_M for k in (0, 2))
    i, j = (g.ravel() for g in np.meshgrid(np.arange(low[0], high[0] + 1), np.arange(low[1], high[1] + 1)))
    corner = np.stack([i, j], axis=1) * CELL_M
    boxes = shapely.box(*corner.T, *(corner + CELL_M).T)
    rate = CELL_M**2 / 10_000
    rates = np.array([getattr(clutter, f"{kind}_per_ha") for kind in _SPOTS]) * rate
    for place in corner[shapely.intersects(side.surface, boxes)]:
        rng = rng_of(seed, place, 5)
        for kind, count in zip(_SPOTS, rng.poisson(rates), strict=True):
            points = place + rng.uniform(0, CELL_M, (count, 2))
            for point, heading in zip(points, side.heading(points) if count else [], strict=True):
                if side.on_road(point[None])[0]:
                    _SPOTS[kind](marks, rng, point, np.array([np.cos(heading), np.sin(heading)]), side)


def _rectangle(point: Array, ahead: Array, long: float, wide: float) -> Polygon:
    left = np.array([-ahead[1], ahead[0]])
    return Polygon(
        [point + a * long / 2 * ahead + b * wide / 2 * left for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    )


def _spot_patch(marks: Marks, rng: np.random.Generator, point: Array, ahead: Array, side: RoadSide) -> None:
    shape = _rectangle(point, ahead, float(rng.uniform(0.8, 6.0)), float(rng.uniform(0.6, 2.8)))
    if rng.random() < 0.2:  # a trench across the road
        shape = _rectangle(
            point, np.array([-ahead[1], ahead[0]]), float(rng.uniform(4, 9)), float(rng.uniform(0.4, 1.0))
        )
    clipped = shape.intersection(side.surface)
    if clipped.geom_type == "Polygon" and not clipped.is_empty:
        patch(marks, rng, clipped, Layer.PATCH if rng.random() < 0.5 else Layer.TONE)


def _spot_lid(marks: Marks, rng: np.random.Generator, point: Array, ahead: Array, side: RoadSide) -> None:
    if rng.random() < 0.7:
        radius = float(rng.uniform(0.28, 0.42))
        shape, rim = Point(point).buffer(radius, quad_segs=4), Point(point).buffer(radius + 0.12, quad_segs=4)
    else:
        shape = _rectangle(point, ahead, float(rng.uniform(0.5, 1.2)), float(rng.uniform(0.4, 0.9)))
        rim = shape.buffer(0.1, join_style="mitre")
    marks.fill([rim], np.full(3, rng.uniform(0.1, 0.34)), 0.8, layer=Layer.PATCH)
    marks.fill([shape], np.full(3, rng.uniform(0.08, 0.24)), 0.9, layer=Layer.PATCH, rough=0.3)


def _spot_crack(marks: Marks, rng: np.random.Generator, point: Array, ahead: Array, side: RoadSide) -> None:
    # Cracks follow the road or cross it.
    across = rng.random() < 0.35
    start = np.arctan2(ahead[1], ahead[0]) + (np.pi / 2 if across else 0.0)
    turns = rng.normal(0, 0.2, int(rng.integers(4, 14))).cumsum() * 0.6 + start + rng.normal(0, 0.08, 1)
    line = point + np.cumsum(np.stack([np.cos(turns), np.sin(turns)], axis=1), axis=0)
    line = line[side.on_road(line)]
    if len(line) < 2:
        return
    sealed = rng.random() < 0.4
    width = float(rng.uniform(0.06, 0.13) if sealed else rng.uniform(0.02, 0.05))
    marks.stroke(pieces(Polyline(line), 4.0), width, TAR, float(rng.uniform(0.4, 0.9)), layer=Layer.SEAM, rough=0.4)


def _blob(rng: np.random.Generator, point: Array, ahead: Array, long: float, wide: float) -> Polygon:
    angle = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    radius = 1 + 0.25 * rng.standard_normal(14)
    left = np.array([-ahead[1], ahead[0]])
    return Polygon(
        point + (radius * np.cos(angle) * long)[:, None] * ahead + (radius * np.sin(angle) * wide)[:, None] * left
    )


def _spot_stain(marks: Marks, rng: np.random.Generator, point: Array, ahead: Array, side: RoadSide) -> None:
    shape = _blob(rng, point, ahead, float(rng.uniform(0.2, 1.5)), float(rng.uniform(0.15, 0.5)))
    gain = float(rng.uniform(0.6, 0.9)) if rng.random() < 0.8 else float(rng.uniform(1.1, 1.4))
    marks.fill([shape.buffer(0)], gain, 0.9, layer=Layer.DIRT, soft=0.2, gain=True, rough=0.3)


def _spot_skid(marks: Marks, rng: np.random.Generator, point: Array, ahead: Array, side: RoadSide) -> None:
    s = np.linspace(0, float(rng.uniform(4, 18)), 6)
    bend = float(rng.normal(0, 0.006)) * s**2
    left = np.array([-ahead[1], ahead[0]])
    for track in (-0.75, 0.75)[: int(rng.integers(1, 3))]:
        line = point + s[:, None] * ahead + (bend + track)[:, None] * left
        if side.on_road(line).all():
            marks.stroke(pieces(Polyline(line), 5.0), 0.18, 0.6, 0.7, layer=Layer.DIRT, soft=0.08, gain=True, rough=0.8)


def _spot_puddle(marks: Marks, rng: np.random.Generator, point: Array, ahead: Array, side: RoadSide) -> None:
    shape = _blob(rng, point, ahead, float(rng.uniform(0.8, 4.0)), float(rng.uniform(0.5, 1.3)))
    gain = float(rng.choice([rng.uniform(0.7, 0.85), rng.uniform(1.1, 1.25)]))
    marks.fill([shape.buffer(0).intersection(side.surface)], gain, 0.9, layer=Layer.DIRT, soft=0.3, gain=True)


# Drawn in this order. Every one takes (marks, generator, place [2] m, direction of the road [2], road).
_SPOTS = {
    "patches": _spot_patch,
    "lids": _spot_lid,
    "cracks": _spot_crack,
    "stains": _spot_stain,
    "skids": _spot_skid,
    "puddles": _spot_puddle,
}
