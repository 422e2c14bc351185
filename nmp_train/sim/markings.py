"""The paint that belongs to the map: dividers and crossings, in the state in which streets have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from shapely.geometry import LineString, Polygon
from shapely.geometry.base import BaseGeometry

from nmp.citymap import CityMap
from nmp_train.sim.clutter import Clutter
from nmp_train.sim.marks import Array, Layer, Marks, dashes, pieces, rng_of
from nmp_train.sim.polyline import Polyline
from nmp_train.sim.roadside import RoadSide

WHITE, YELLOW = np.array([0.86, 0.86, 0.83]), np.array([0.82, 0.60, 0.14])
TAR = np.array([0.075, 0.075, 0.08])
BRICK = np.array([0.36, 0.2, 0.16])
PIECE_M = 5.0
"""solid lines are painted in pieces of this length, each with its own wear"""


@dataclass(frozen=True)
class Style:
    """How one line is painted."""

    offsets: tuple[float, ...] = (0.0,)
    """of each stroke from the line of the map, m"""
    dash: tuple[tuple[float, float] | None, ...] = (None,)
    """(paint, gap) of each stroke, m"""
    width: float = 0.12


def paint_style(rng: np.random.Generator, middle: bool, left_hand: bool) -> tuple[Style, Array]:
    """Draw form and colour of a divider.

    :param middle: between opposite directions
    :param left_hand: a city with traffic on the left (Singapore): white lines and shorter dashes
    """
    width = float(rng.uniform(0.10, 0.15))
    apart = (width + float(rng.uniform(0.10, 0.15))) / 2
    short = [(2.0, 4.0), (2.75, 5.5), (2.75, 2.75)]
    long = [(3.0, 9.0), (3.0, 6.0), (2.5, 7.5)]
    dash = (short if left_hand else long)[rng.choice(3, p=[0.5, 0.3, 0.2])]
    single, double = Style(width=width), Style((-apart, apart), (None, None), width)
    dashed, mixed = Style((0.0,), (dash,), width), Style((-apart, apart), (None, dash), width)
    if middle and left_hand:
        form = (double, single, dashed, mixed)[rng.choice(4, p=[0.3, 0.25, 0.4, 0.05])]
        return form, WHITE
    if middle:
        form = (double, single, dashed, mixed)[rng.choice(4, p=[0.68, 0.14, 0.1, 0.08])]
        return form, YELLOW if rng.random() < 0.93 else WHITE
    form = (dashed, single, Style((0.0,), ((0.6, 0.9),), width))[rng.choice(3, p=[0.72, 0.2, 0.08])]
    return form, WHITE


def wear_level(rng: np.random.Generator, faint: float, worn: float) -> tuple[float, float]:
    """Draw (opacity, roughness) of paint: faint 5 to 20 %, worn about half, otherwise fresh."""
    draw = rng.random()
    if draw < faint:
        return float(rng.uniform(0.05, 0.2)), 0.9
    if draw < faint + worn:
        return float(rng.uniform(0.25, 0.65)), 1.0
    return float(rng.uniform(0.7, 0.95)), 0.35


def draw_line(
    marks: Marks,
    rng: np.random.Generator,
    path: Polyline,
    style: Style,
    rgb: Array,
    state: tuple[float, float],
    clutter: Clutter,
    layer: Layer = Layer.PAINT,
) -> None:
    """Paint a line with its wear along it."""
    opacity, rough = state
    fading = rng.random() < clutter.fading
    phase, lost = float(rng.uniform(0, 15)), rng.random() < clutter.missing_dashes
    wave = rng.uniform(0, 2 * np.pi, 3)
    for offset, dash in zip(style.offsets, style.dash, strict=True):
        for part in path.shifted(offset):
            strokes = pieces(part, PIECE_M) if dash is None else dashes(part, *dash, phase)
            if not strokes:
                continue
            middle = np.array([s.mean(axis=0) for s in strokes])
            # Wear follows the place, so that the two strokes of a double line fade together.
            along = np.sin(middle @ [0.09, 0.05] + wave[0]) + np.sin(middle @ [-0.04, 0.11] + wave[1])
            level = opacity * np.clip(1 + 0.55 * along, 0.08, 1.0) if fading else np.full(len(strokes), opacity)
            if lost and dash is not None:
                level = np.where(rng.random(len(strokes)) < 0.3, level * rng.choice([0, 0.15], len(strokes)), level)
            marks.stroke(strokes, style.width, rgb, level.tolist(), layer=layer, rough=rough)


def mark_dividers(
    marks: Marks, city: CityMap, side: RoadSide, region: BaseGeometry, clutter: Clutter, seed: int
) -> None:
    """Paint road and lane dividers, worn, repainted, patched over or not at all."""
    for middle, layer in ((True, city.road_dividers), (False, city.lane_dividers)):
        for line in layer.near(region):
            rng = rng_of(seed, line)
            path = Polyline(shapely.get_coordinates(line))
            if path.length < 0.3:
                continue
            around = line.interpolate(0.5, normalized=True).buffer(9.0)
            quiet = middle and not city.lane_dividers.near(around)
            style, rgb = paint_style(rng, middle, side.left_hand)
            if rng.random() < (clutter.unpainted_quiet if quiet else clutter.unpainted_busy):
                if rng.random() < 0.3:  # only a joint of the paving shows where it was
                    marks.stroke(pieces(path, 8.0), 0.05, TAR, 0.45, layer=Layer.SEAM, rough=0.8)
                continue
            if rng.random() < clutter.repainted:
                _old_line(marks, rng, path, style, rgb, clutter)
            draw_line(marks, rng, path, style, rgb, wear_level(rng, clutter.faint, clutter.worn), clutter)
            for _ in range(rng.poisson(clutter.paint_patches_per_km * path.length / 1000)):
                start = rng.uniform(0, path.length)
                stop = min(start + rng.uniform(1.0, 9.0), path.length)
                if stop - start > 0.5:
                    low, high = -rng.uniform(0.3, 1.8), rng.uniform(0.3, 1.8)
                    patch(marks, rng, path.quad(start, stop, low, high), Layer.PATCH)


def _old_line(
    marks: Marks, rng: np.random.Generator, path: Polyline, style: Style, rgb: Array, clutter: Clutter
) -> None:
    shift = float(rng.uniform(0.2, 0.8) * rng.choice([-1, 1]))
    for part in path.shifted(shift):
        kind = rng.random()
        colour = TAR if kind < 0.45 else rgb * 0.8
        wide = Style(style.offsets, style.dash, style.width * (1.6 if kind < 0.45 else 1.0))
        draw_line(marks, rng, part, wide, colour, (float(rng.uniform(0.12, 0.4)), 0.8), clutter, Layer.GHOST)


def patch(marks: Marks, rng: np.random.Generator, shape: BaseGeometry, layer: Layer) -> None:
    """Lay a piece of other asphalt, some with sealed edges."""
    low, high = ((0.68, 0.93), (0.5, 0.7), (1.06, 1.3))[rng.choice(3, p=[0.6, 0.15, 0.25])]
    tone = marks.asphalt * rng.uniform(low, high)
    marks.fill([shape], tone, float(rng.uniform(0.8, 1.0)), layer=layer, rough=0.25)
    if rng.random() < 0.5:
        outline = Polyline(shapely.get_coordinates(shape))
        marks.stroke(pieces(outline, 6.0), float(rng.uniform(0.04, 0.1)), TAR, 0.6, layer=layer, rough=0.6)


def mark_ghosts(marks: Marks, ghosts: Sequence[BaseGeometry], clutter: Clutter, seed: int) -> None:
    """Paint what a change of the map removed: blacked-out lines and crossings."""
    for ghost in ghosts:
        rng = rng_of(seed, ghost, 1)
        tone, opacity = TAR * rng.uniform(0.8, 1.3), float(rng.uniform(0.3, 0.55))
        for part in shapely.get_parts(ghost):
            if part.geom_type == "Polygon":
                box = crossing_corners(part, None)
                if box is not None:
                    bars = _bars(box, 0.6, 1.15, 0.4)
                    marks.fill(bars, tone, opacity, layer=Layer.GHOST, rough=0.6)
            elif part.geom_type == "LineString" and part.length > 0.3:
                style = Style(width=float(rng.uniform(0.16, 0.26)))
                path = Polyline(shapely.get_coordinates(part))
                draw_line(marks, rng, path, style, tone, (opacity, 0.6), clutter, Layer.GHOST)


def crossing_corners(polygon: BaseGeometry, side: RoadSide | None) -> Array | None:
    """Return the corners [4, 2] of a crossing: 0 to 1 and 3 to 2 lead across the road, 0 to 3 along it."""
    simple = polygon.simplify(0.15)
    corner = shapely.get_coordinates(simple.exterior)[:-1] if simple.geom_type == "Polygon" else np.zeros((0, 2))
    if len(corner) != 4:
        box = polygon.minimum_rotated_rectangle
        if box.geom_type != "Polygon":
            return None
        corner = shapely.get_coordinates(box)[:4]
    edges = np.roll(corner, -1, axis=0) - corner
    length = np.hypot(*edges.T)
    pair = length[[0, 1]] + length[[2, 3]]
    if pair.min() < 0.8:
        return None
    turn = bool(pair[0] < pair[1])
    if side is not None and side.edges and pair.max() < 1.8 * pair.min():
        # Nearly square: people enter where the kerb is.
        gap = side.edge_distance((corner + np.roll(corner, -1, axis=0)) / 2)
        turn = bool(gap[0] + gap[2] < gap[1] + gap[3])
    return np.asarray(np.roll(corner, -1, axis=0) if turn else corner)


def _bars(corner: Array, wide: float, pitch: float, first: float) -> list[Polygon]:
    """Return the bars of a zebra: along the direction of travel, side by side across the road."""
    length = float(np.linalg.norm(corner[1] - corner[0]))
    starts = np.arange(first, max(length - wide * 0.6, first + 0.01), pitch)
    out = []
    for start in starts:
        a, b = start / length, min((start + wide) / length, 1.0)
        ring = [
            (corner[0], corner[1], a),
            (corner[0], corner[1], b),
            (corner[3], corner[2], b),
            (corner[3], corner[2], a),
        ]
        out.append(Polygon([p + t * (q - p) for p, q, t in ring]))
    return out


def mark_crossings(
    marks: Marks, city: CityMap, side: RoadSide, region: BaseGeometry, clutter: Clutter, seed: int
) -> list[Polygon]:
    """Paint the crossings; return the areas (m, map frame) beside them where the kerb is lowered."""
    ramps: list[Polygon] = []
    for polygon in city.crossings.near(region):
        rng = rng_of(seed, polygon)
        corner = crossing_corners(polygon, side)
        if corner is None:
            continue
        # Signs of a crossing beside the road are there with and without paint on it.
        if rng.random() < clutter.crossing_ramp:
            ramps += _ramps(marks, rng, corner, side)
        if rng.random() < clutter.crossing_unpainted:
            continue
        state = wear_level(rng, clutter.crossing_faint, clutter.crossing_worn)
        paint_crossing(marks, rng, corner, state, clutter, left_hand=side.left_hand)
    return ramps


def paint_crossing(
    marks: Marks,
    rng: np.random.Generator,
    corner: Array,
    state: tuple[float, float],
    clutter: Clutter,
    *,
    left_hand: bool,
) -> None:
    """Paint one crossing with the corners of :func:`crossing_corners` in a form drawn from ``rng``."""
    opacity, rough = state
    depth = float(np.linalg.norm(corner[3] - corner[0]))
    length = float(np.linalg.norm(corner[1] - corner[0]))
    form = rng.choice(3, p=[0.35, 0.0, 0.65] if left_hand else [0.42, 0.23, 0.35])
    if rng.random() < clutter.crossing_brick:
        tone = BRICK * rng.uniform(0.7, 1.1) if rng.random() < 0.6 else np.full(3, rng.uniform(0.2, 0.32))
        marks.fill([Polygon(corner)], tone, float(rng.uniform(0.35, 0.85)), rough=0.4)
        form = 2 if rng.random() < 0.6 else 3
    if form in (0, 1):
        pitch = float(rng.uniform(0.9, 1.35))
        bars = _bars(corner, float(rng.uniform(0.4, 0.6)), pitch, float(rng.uniform(0.2, 0.6)))
        # Two wheel tracks a lane.
        station = (np.arange(len(bars)) * pitch + rng.uniform(0, 3.4)) % 3.4
        track = np.exp(-(((np.abs(station - 1.7) - 0.8) / 0.35) ** 2))
        level = opacity * (1 - rng.uniform(0.1, 0.75) * track) * rng.uniform(0.75, 1.0, len(bars))
        marks.fill(bars, WHITE, level.tolist(), rough=rough)
    if form in (1, 2):
        wide = float(rng.uniform(0.12, 0.3)) / depth
        dash = (0.5, 0.5) if left_hand and rng.random() < 0.5 else None
        for low in (0.0, 1.0 - wide):
            ends = [corner[i] + (low + wide / 2) * (corner[j] - corner[i]) for i, j in ((0, 3), (1, 2))]
            line = Polyline(ends)
            strokes = pieces(line, 1.7) if dash is None else dashes(line, *dash, 0.0)
            level = opacity * (1 - 0.5 * rng.random(len(strokes)) * (rough > 0.5))
            marks.stroke(strokes, wide * depth, WHITE, level.tolist(), rough=rough)
    if rng.random() < 0.12 and length > 6:  # cut through by a trench
        a = rng.uniform(0.1, 0.8)
        b = min(1.0, a + rng.uniform(0.8, 2.5) / length)
        ring = [corner[0] + a * (corner[1] - corner[0]), corner[0] + b * (corner[1] - corner[0])]
        ring += [corner[3] + b * (corner[2] - corner[3]), corner[3] + a * (corner[2] - corner[3])]
        patch(marks, rng, Polygon(ring).buffer(0.5, join_style="mitre"), Layer.PATCH)


def _ramps(marks: Marks, rng: np.random.Generator, corner: Array, side: RoadSide) -> list[Polygon]:
    """Lower the kerb at both ends of a crossing and lay a tactile plate there."""
    out = []
    tone = np.array([[0.62, 0.5, 0.12], [0.5, 0.2, 0.15], [0.3, 0.3, 0.31], [0.58, 0.57, 0.54]])[rng.integers(4)]
    plate = rng.random() < 0.6
    for i, j, k in ((0, 3, 1), (1, 2, 0)):
        middle = (corner[i] + corner[j]) / 2
        outward = corner[i] - corner[k]
        outward = outward / np.linalg.norm(outward)
        across = (corner[j] - corner[i]) / np.linalg.norm(corner[j] - corner[i])
        # Crossings of a map end up to a metre before or behind the kerb.
        ray = LineString([middle - 1.5 * outward, middle + 2.5 * outward])
        inside = [p for p in shapely.get_parts(ray.intersection(side.surface)) if p.length > 0.1]
        if not inside or inside[0].length > 3.8:
            continue
        kerb = shapely.get_coordinates(inside[0])[-1]
        half = float(rng.uniform(0.6, max(0.7, float(np.linalg.norm(corner[j] - corner[i])) / 2)))
        for near, far, wide, is_plate in ((-0.3, 1.2, half, False), (0.25, 0.85, half * 0.9, True)):
            ring = ((-wide, near), (wide, near), (wide, far), (-wide, far))
            area = Polygon([kerb + a * across + b * outward for a, b in ring])
            if not is_plate:
                out.append(area)
            elif plate:
                marks.fill([area], tone, 0.85, layer=Layer.DIRT, rough=0.3)
    return out
