"""Paint that no map has: edge lines, bays, stop lines, arrows, hatches, box junctions and forgotten lines."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import shapely
from shapely.geometry import LineString, Polygon
from shapely.geometry.base import BaseGeometry

from nmp.citymap import CityMap
from nmp_train.sim.clutter import Clutter
from nmp_train.sim.markings import (
    TAR,
    WHITE,
    YELLOW,
    Style,
    crossing_corners,
    draw_line,
    paint_crossing,
    wear_level,
)
from nmp_train.sim.marks import Array, Layer, Marks, pieces, rng_of
from nmp_train.sim.polyline import Polyline
from nmp_train.sim.roadside import LaneAxis, RoadSide, Run

CLEAR_M = 0.8
"""lines end this far before a crossing"""
HATCH_M = 1.6
"""between the lines of a hatched area"""
WORDS = {False: ("STOP", "ONLY", "BUS", "SLOW", "XING"), True: ("SLOW", "BUS", "AHEAD", "STOP", "HUMP")}
# Outlines of arrows: along the direction of travel (the tip at +1) and across it.
_SHAFT = [(-1, -0.06), (0.25, -0.06), (0.25, -0.25), (1, 0), (0.25, 0.25), (0.25, 0.06), (-1, 0.06)]
_HOOK = [(-1, -0.06), (0.1, -0.06), (0.3, -0.3), (0.12, -0.42), (0.75, -0.72), (0.78, -0.22), (0.6, -0.3), (0.15, 0.06)]


def mark_roadsides(
    marks: Marks, city: CityMap, side: RoadSide, region: BaseGeometry, clutter: Clutter, seed: int
) -> None:
    """Paint lines along the kerbs and across the road beside crossings."""
    zebras = city.crossings
    for run in side.runs_near(region):
        if not run.straight or run.path.length < 9:
            continue
        rng = rng_of(seed, run.path.points)
        for path in _clear_of(run.path, zebras.near(LineString(run.path.points).buffer(12.0))):
            _along_kerb(marks, rng, path, run, side, clutter)


def _clear_of(path: Polyline, crossings: list[BaseGeometry]) -> list[Polyline]:
    """Return the parts of a kerb that have no crossing in front of them."""
    if not crossings:
        return [path]
    line = shapely.linestrings(path.points)
    # A crossing lies within half a metre of its kerb, or reaches past it.
    blocked = shapely.union_all([c.buffer(CLEAR_M + 0.7) for c in crossings])
    free = line.difference(blocked)
    merged = shapely.line_merge(free) if free.geom_type == "MultiLineString" else free
    return [Polyline(shapely.get_coordinates(p)) for p in shapely.get_parts(merged) if p.length > 8]


def _along_kerb(
    marks: Marks, rng: np.random.Generator, path: Polyline, run: Run, side: RoadSide, clutter: Clutter
) -> None:
    def along(offset: float, style: Style, rgb: Array, faint: float = 0.25) -> None:
        for part in path.shifted(offset):
            draw_line(marks, rng, part, style, rgb, wear_level(rng, faint, 0.35), clutter)

    width = float(rng.uniform(0.09, 0.14))
    if rng.random() < clutter.edge_lines:
        near = float(rng.uniform(0.2, 0.5))
        if run.thin:
            along(near, Style(width=width), WHITE if side.left_hand else YELLOW)
        elif side.left_hand:
            double = rng.random() < 0.5
            gap = width + float(rng.uniform(0.08, 0.14))
            style = Style((0.0, gap), (None, None), width) if double else Style(width=width)
            along(near, style, YELLOW if rng.random() < 0.8 else WHITE)
        else:
            along(near, Style(width=width), WHITE if rng.random() < 0.8 else YELLOW)
    elif not run.thin and rng.random() < clutter.bike_lanes:
        for offset in (float(rng.uniform(1.5, 2.0)), float(rng.uniform(2.3, 2.8)))[: int(rng.integers(1, 3))]:
            along(offset, Style(width=width, dash=((3.0, 3.0) if rng.random() < 0.2 else None,)), WHITE)
    elif not run.thin and rng.random() < clutter.bays:
        # Bays are mostly where the map has no lane beside the kerb.
        free = not side.in_lane(path.beside([path.length / 2], [1.2])).any()
        if free or rng.random() < 0.25:
            _bays(marks, rng, path, clutter)
    if rng.random() < clutter.false_lines and path.length > 15:
        start, offset = float(rng.uniform(0, path.length / 2)), float(rng.uniform(1.0, 9.0))
        part = Polyline(path.cut(start, min(start + rng.uniform(8, 50), path.length)))
        for line in part.shifted(offset):
            if not side.on_road(line.at(np.linspace(0, line.length, 5))).all():
                continue
            style = Style(width=width, dash=(((3.0, 6.0), (3.0, 9.0), (2.0, 4.0))[rng.integers(3)],))
            if rng.random() < 0.6:
                style = Style(width=width)
            kind = rng.random()
            rgb = WHITE if kind < 0.45 else TAR if kind < 0.75 else YELLOW
            layer = Layer.GHOST if rgb is TAR else Layer.PAINT
            state = (float(rng.uniform(0.12, 0.6)), 0.9)
            draw_line(marks, rng, line, style, rgb, state, clutter, layer)
    if rng.random() < clutter.zigzags * (0.5 if side.left_hand else 0.1) and path.length > 14:
        s = np.arange(0.0, 12.0, 2.0)
        zig = path.beside(s, 0.5 + 0.35 * (np.arange(len(s)) % 2))
        marks.stroke(pieces(Polyline(zig), 4.0), 0.1, WHITE, wear_level(rng, 0.2, 0.4)[0], rough=0.6)
    if rng.random() < clutter.hatches and path.length > 14:
        start, wide = float(rng.uniform(0, path.length - 12)), float(rng.uniform(1.2, 2.4))
        area = path.quad(start, start + float(rng.uniform(6, 12)), 0.3, wide)
        if not side.surface.contains(area):
            return
        _hatch(marks, rng, area, WHITE if rng.random() < 0.7 else YELLOW)


def _bays(marks: Marks, rng: np.random.Generator, path: Polyline, clutter: Clutter) -> None:
    depth, pitch = float(rng.uniform(1.9, 2.5)), float(rng.uniform(5.2, 6.6))
    opacity, rough = wear_level(rng, 0.3, 0.4)
    width = float(rng.uniform(0.08, 0.12))
    ticks = np.arange(rng.uniform(0.5, 3.0), path.length, pitch)
    if len(ticks) < 2:
        return
    reach = depth if rng.random() < 0.6 else 0.6  # whole bays, or corners only
    ends = np.stack([path.beside(ticks, np.full(len(ticks), depth - reach + 0.05)), path.beside(ticks, depth)], axis=1)
    level = opacity * rng.uniform(0.5, 1.0, len(ticks))
    marks.stroke(list(ends), width, WHITE, level.tolist(), rough=rough)
    form = rng.random()
    if form < 0.55:
        dash = None if form < 0.35 else (1.0, 1.0)
        for part in Polyline(path.cut(ticks[0], ticks[-1])).shifted(depth):
            draw_line(marks, rng, part, Style(width=width, dash=(dash,)), WHITE, (opacity, rough), clutter)
    else:
        for t in ticks:
            a, b = max(t - 0.4, 0.0), min(t + 0.4, path.length)
            marks.stroke([path.beside([a, b], [depth, depth])], width, WHITE, opacity, rough=rough)


def _hatch(marks: Marks, rng: np.random.Generator, area: BaseGeometry, rgb: Array, *, grid: bool = False) -> None:
    """Fill an area with diagonal lines, or with a grid of them."""
    opacity, rough = wear_level(rng, 0.25, 0.4)
    box = area.minimum_rotated_rectangle
    if box.geom_type != "Polygon" or area.geom_type != "Polygon":
        return
    corner = shapely.get_coordinates(box)[:4]
    edge = corner[1] - corner[0]
    along = edge / np.linalg.norm(edge)
    left = np.array([-along[1], along[0]])
    reach = float(np.linalg.norm(corner[2] - corner[0]))
    strokes: list[Array] = []
    for diagonal in (along + left, along - left)[: 2 if grid else 1]:
        unit = diagonal / np.linalg.norm(diagonal)
        base = corner.mean(axis=0) + np.arange(-reach, reach, HATCH_M)[:, None] * [-unit[1], unit[0]]
        lines = np.stack([base - reach * unit, base + reach * unit], axis=1)
        cut = shapely.get_parts(shapely.intersection(shapely.linestrings(lines), area))
        strokes += [shapely.get_coordinates(c) for c in cut if c.geom_type == "LineString" and c.length > 0.2]
    marks.stroke(strokes, 0.18, rgb, opacity, rough=rough)
    outline = Polyline(shapely.get_coordinates(area.exterior))
    marks.stroke(pieces(outline, 6.0), 0.12, rgb, opacity, rough=rough)


def mark_crossing_surroundings(
    marks: Marks, city: CityMap, side: RoadSide, region: BaseGeometry, clutter: Clutter, seed: int
) -> None:
    """Paint stop lines, give-way lines and zigzags where traffic waits before a crossing."""
    for polygon in city.crossings.near(region):
        rng = rng_of(seed, polygon, 2)
        corner = crossing_corners(polygon, side)
        if corner is None:
            continue
        for a, b, c in ((corner[0], corner[1], corner[3]), (corner[2], corner[3], corner[1])):
            if rng.random() >= clutter.stop_lines:
                continue
            out = (a - c) / np.linalg.norm(a - c)  # away from the crossing, against the traffic
            across = b - a
            right = np.array([-out[1], out[0]])  # of someone who comes towards the crossing
            near = right if not side.left_hand else -right
            first, last = (a, b) if across @ near < 0 else (b, a)
            shift = float(rng.uniform(1.0, 3.0))
            ends = np.stack([first + 0.52 * (last - first), last - 0.3 * (last - first) / np.linalg.norm(across)])
            line = ends + shift * out
            if not side.on_road(line).all():
                continue
            state = wear_level(rng, 0.2, 0.35)
            wide = float(rng.uniform(0.2, 0.5))
            if rng.random() < 0.8:
                marks.stroke(pieces(Polyline(line), 1.7), wide, WHITE, state[0], rough=state[1])
            else:
                for k in (0, 1):
                    style = Style(width=0.15, dash=((0.6, 0.4),))
                    draw_line(marks, rng, Polyline(line + 0.3 * k * out), style, WHITE, state, clutter)


def mark_lanes(marks: Marks, city: CityMap, side: RoadSide, axes: list[LaneAxis], clutter: Clutter, seed: int) -> None:
    """Paint arrows, words and humps into straight lanes."""
    for axis in axes:
        rng = rng_of(seed, axis.path.points)
        path, state = axis.path, wear_level(rng, 0.3, 0.4)
        if rng.random() < clutter.arrows:
            form = rng.integers(3)
            mirror = rng.choice([-1, 1])
            for station in path.length - np.arange(6.0, min(path.length - 4, 30.0), float(rng.uniform(9, 16))):
                shapes = [_SHAFT] if form == 0 else [_HOOK] if form == 1 else [_SHAFT, _HOOK]
                for shape in shapes:
                    s, off = np.array(shape, dtype=np.float64).T
                    ring = path.beside(station + s * 2.0, off * 1.4 * mirror)
                    marks.fill([Polygon(ring).buffer(0)], WHITE, state[0], rough=state[1])
        elif rng.random() < clutter.words and path.length > 16:
            word = str(rng.choice(WORDS[side.left_hand]))
            marks.fill(
                list(_word(word, path, path.length - rng.uniform(5, 10), axis.width)), WHITE, state[0], rough=0.6
            )
        if rng.random() < clutter.humps and path.length > 25:
            _hump(marks, rng, path, side, city, clutter)


def _word(text: str, path: Polyline, station: float, width: float) -> Iterator[Polygon]:
    """Yield the strokes of a word of 2.4 m height that is read by who comes along the path."""
    (wide, high), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 1.0, 4)
    image = np.zeros((high + 8, wide + 8), np.uint8)
    cv2.putText(image, text, (4, high + 3), cv2.FONT_HERSHEY_SIMPLEX, 1.0, (255,), 4)
    outlines, _ = cv2.findContours(image, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    scale_x, scale_y = min(width - 0.8, 2.4) / image.shape[1], 2.4 / image.shape[0]
    for outline in outlines:
        u, v = outline[:, 0].astype(np.float64).T
        if len(u) > 3:
            right = (u - image.shape[1] / 2) * scale_x
            yield Polygon(path.beside(station - v * scale_y, -right)).buffer(0)


def _hump(
    marks: Marks, rng: np.random.Generator, path: Polyline, side: RoadSide, city: CityMap, clutter: Clutter
) -> None:
    """Lay a speed hump from kerb to kerb; its bars look like a zebra."""
    station = float(rng.uniform(8, path.length - 8))
    point, normal = path.at(station), path.normal(station)
    line = side.across(point, normal)
    if line is None or line.length < 5:
        return
    ends, ahead = shapely.get_coordinates(line), np.array([normal[1], -normal[0]])
    deep = float(rng.uniform(1.6, 3.4))
    corner = np.array([ends[0] - deep / 2 * ahead, ends[1] - deep / 2 * ahead, ends[1] + deep / 2 * ahead])
    corner = np.concatenate([corner, (ends[0] + deep / 2 * ahead)[None]])
    if city.crossings.near(Polygon(corner).buffer(4.0)):
        return
    if rng.random() < 0.6:
        marks.fill([Polygon(corner)], np.full(3, rng.uniform(0.12, 0.3)), 0.7, layer=Layer.TONE, rough=0.3)
    paint_crossing(marks, rng, corner, wear_level(rng, 0.25, 0.5), clutter, left_hand=False)


def mark_junctions(
    marks: Marks, city: CityMap, side: RoadSide, region: BaseGeometry, clutter: Clutter, seed: int
) -> None:
    """Paint yellow grids into junctions: where the road is wide and has no lane."""
    around = region.buffer(50.0)  # so that no junction near the region is cut
    lanes = shapely.union_all([shapely.buffer(x, 0.8, join_style="mitre") for x in city.lanes.near(around)])
    zebras = shapely.union_all([c.buffer(1.0) for c in city.crossings.near(around)])
    share = clutter.box_junctions * (1.0 if side.left_hand else 0.4)
    for part in shapely.get_parts(shapely.clip_by_rect(side.surface, *around.bounds)):
        free = part.difference(lanes).difference(zebras)
        free = shapely.buffer(shapely.buffer(free, -4.0, join_style="mitre"), 3.5, join_style="mitre")
        for area in shapely.get_parts(free):
            if area.geom_type != "Polygon" or not 90 < area.area < 500 or area.area < 0.6 * area.convex_hull.area:
                continue
            if not area.intersects(region) or len(city.lanes.near(area.buffer(7.0))) < 5:  # the mouth of a drive
                continue
            core = area.buffer(-1.0)
            if city.lane_dividers.near(core) or city.road_dividers.near(core):
                continue
            rng = rng_of(seed, area.centroid)
            if rng.random() < share:
                _hatch(marks, rng, area.simplify(0.8).intersection(side.surface), YELLOW, grid=True)
