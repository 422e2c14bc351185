"""Where streets meet: kerb arcs at corners, islands, driveway openings, and the cut of the ground into segments."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry import LineString, Point, Polygon
from shapely.geometry.base import BaseGeometry

from nmp_train.sim.mapjson import polygons_of
from nmp_train.sim.plan import ARTERIAL, Style
from nmp_train.sim.streets import LEFT, RIGHT, Street

Array = NDArray[np.float64]


@dataclass
class Junction:
    """Where streets meet: ``arms`` are (street, end) counter-clockwise by direction."""

    centre: Array
    arms: list[tuple[Street, int]]
    radius: float
    """of the kerbs at its corners, m"""
    fill: BaseGeometry = field(default_factory=Polygon)
    islands: list[Polygon] = field(default_factory=list)


def make_junctions(rng: np.random.Generator, nodes: Array, streets: list[Street]) -> list[Junction]:
    """Sort the arms of every junction and measure how far the junction reaches into each."""
    out = []
    for n, centre in enumerate(nodes):
        arms = [(s, end) for s in streets for end, at in ((0, s.a), (1, s.b)) if at == n]
        arms.sort(key=lambda arm: float(np.arctan2(*arm[0].toward(arm[1])[::-1])))
        main = max(s.rank for s, _ in arms) == ARTERIAL
        radius = float(rng.uniform(6, 12) if main else rng.uniform(4, 9))
        if main and rng.random() < 0.3:
            radius = float(rng.uniform(16, 22))
        out.append(Junction(centre, arms, radius))
    for junction in out:
        for k, (street, end) in enumerate(junction.arms):
            street.mouth[end] = max(_reach(junction, k, 1), _reach(junction, k, -1), 4.0)
    for street in streets:
        for end, at in ((0, street.a), (1, street.b)):
            if at < 0:
                street.mouth[end] = 0.0
        excess = (street.mouth[0] + street.mouth[1]) / max(street.length - 16, 1)
        if excess > 1:
            street.mouth = {end: m / excess for end, m in street.mouth.items()}
    return out


def _reach(junction: Junction, k: int, turn: int) -> float:
    """Distance along arm k from the node to where its kerb towards the next arm is straight, m."""
    if len(junction.arms) < 2:
        return 4.0
    street, end = junction.arms[k]
    other, other_end = junction.arms[(k + turn) % len(junction.arms)]
    d, e = street.toward(end), other.toward(other_end)
    theta = turn * float(np.arctan2(d[0] * e[1] - d[1] * e[0], d @ e)) % (2 * np.pi)
    if theta > 2.7:
        return 4.0
    mine, theirs = street.half_seen(end, turn), other.half_seen(other_end, -turn)
    corner = (theirs + mine * np.cos(theta)) / np.sin(theta)
    return float(corner + min(0.8 * junction.radius / np.tan(theta / 2), 20.0))


def round_corners(rng: np.random.Generator, junction: Junction) -> None:
    """Fill the corners of a junction with kerb arcs; large corners may get a triangular island."""
    reach = max(s.mouth[end] for s, end in junction.arms) + 2.0
    centre = Point(junction.centre)
    near = centre.buffer(reach + 2 * junction.radius + 10)
    arms = shapely.union_all([s.base().intersection(near) for s, _ in junction.arms])
    arms = arms.union(centre.buffer(min(min(s.half.values()) for s, _ in junction.arms) - 0.1))
    closed = shapely.buffer(shapely.buffer(arms, junction.radius, quad_segs=10), -junction.radius, quad_segs=10)
    junction.fill = closed.intersection(centre.buffer(reach + 6))
    if junction.radius < 14 or closed.geom_type != "Polygon":
        return
    # A slip lane runs between the island and the kerb.
    slip = closed.exterior.buffer(4.3)
    for corner in polygons_of(closed.difference(arms), 30.0):
        if corner.distance(centre) < reach and rng.random() < 0.75:
            island = shapely.buffer(shapely.buffer(corner.difference(slip), -0.7), 0.5)
            junction.islands += polygons_of(island, 3.0)


def make_driveways(
    rng: np.random.Generator, street: Street, others: BaseGeometry, style: Style
) -> list[tuple[float, float, int, Polygon]]:
    """Draw driveway openings: (distance along the street, width, side, polygon)."""
    out: list[tuple[float, float, int, Polygon]] = []
    low, high = street.mouth[0] + 9, street.length - street.mouth[1] - 9
    own = street.base()
    for side in (LEFT, RIGHT):
        for _ in range(int(rng.poisson(max(high - low, 0) / 100 * style.driveways))):
            s, width = float(rng.uniform(low, high)), float(np.clip(rng.normal(5.0, 1.3), 3.2, 9.0))
            length = float(rng.uniform(2.0, 5.0) if rng.random() < 0.5 else rng.uniform(6, 16))
            lean = float(rng.normal(0, 0.09)) * length
            flare = float(rng.normal(0, 0.06)) * width
            if any(d == side and abs(s - t) < (width + w) / 2 + 4 for t, w, d, _ in out):
                continue
            base, deep = street.half[side], street.half[side] + 2.7 * street.parking[side] + length
            s4 = np.array([s - width / 2, s + width / 2, s + width / 2 + lean + flare, s - width / 2 + lean - flare])
            polygon = Polygon(street.at(s4, float(side) * np.array([base - 1.0, base - 1.0, deep, deep])))
            outer = Polygon(street.at(s4, float(side) * np.array([base + 0.4, base + 0.4, deep + 4, deep + 4])))
            if polygon.is_valid and not outer.buffer(1.5).difference(own).intersects(others):
                out.append((s, width, side, polygon))
    return out


@dataclass
class Segment:
    """A piece of road surface."""

    shape: Polygon
    intersection: bool


def cut_segments(total: BaseGeometry, streets: list[Street], junctions: list[Junction]) -> list[Segment]:
    """Cut the road surface into one piece per street and one per junction; their union is the surface."""
    cuts = []
    for street in streets:
        for end, at in ((0, street.a), (1, street.b)):
            if at >= 0:
                s = street.mouth[end] if end == 0 else street.length - street.mouth[1]
                wide = {side: street.half[side] + 0.5 + street.bays[side].max() for side in (LEFT, RIGHT)}
                cuts.append(LineString(street.at(np.array([s, s]), np.array([-wide[RIGHT], wide[LEFT]]))))
    thin = total.difference(shapely.union_all([c.buffer(0.01) for c in cuts]))
    centres = [Point(j.centre) for j in junctions]
    out = []
    for piece in polygons_of(thin, 0.01):
        # The pieces overlap by a few centimetres: a hairline between them would be a false boundary.
        shape = piece.buffer(0.06, join_style="mitre").intersection(total)
        crossing = any(piece.intersects(c) for c in centres)
        out += [Segment(p, crossing) for p in polygons_of(shape, 0.05)]
    return out
