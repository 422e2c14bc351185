"""Cross sections of streets: lanes, medians, parking and bus bays, turn pockets, and where each of them is broken."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from shapely.geometry import Polygon
from shapely.geometry.base import BaseGeometry

from nmp.geometry import distances_along
from nmp_train.sim.plan import ARTERIAL, COLLECTOR, PlannedStreet, Style, min_radius
from nmp_train.sim.polyline import resample

Array = NDArray[np.float64]
LEFT, RIGHT = 1, -1


@dataclass(eq=False)
class Lane:
    """One lane of a street, from ``start`` to ``stop`` along the reference line (m), always start < stop."""

    offset: float
    """of the centre line from the reference line, m, positive to the left of a -> b"""
    width: float
    forward: bool
    """traffic runs from a to b"""
    rank: int
    """0 next to the middle of the road, growing towards the kerb"""
    start: float = 0.0
    stop: float = 0.0
    pocket: bool = False
    """an extra turn lane that exists only before a junction"""


@dataclass
class Gap:
    """A stretch of a street where lanes and dividers are interrupted."""

    start: float
    stop: float
    sides: tuple[int, ...]
    crossing: bool


@dataclass(eq=False)
class Street:
    """A street with its reference line (m, map frame) and everything measured along it."""

    a: int
    b: int
    rank: int
    centre: Array
    """[N, 2] reference line, every half metre"""
    lanes: list[Lane] = field(default_factory=list)
    median: float = 0.0
    """width of the median, m; 0 without"""
    raised: bool = False
    """the median is a hole in the road surface"""
    half: dict[int, float] = field(default_factory=dict)
    """side -> distance from the reference line to the kerb, without bays, m"""
    bays: dict[int, Array] = field(default_factory=dict)
    """side -> extra width at every point of ``centre``, m"""
    mouth: dict[int, float] = field(default_factory=dict)
    """end (0 at a, 1 at b) -> distance from the node at which the junction ends, m"""
    limit: dict[int, float] = field(default_factory=dict)
    """end -> distance from the node at which lanes and dividers begin, m"""
    gaps: list[Gap] = field(default_factory=list)
    parking: dict[int, bool] = field(default_factory=dict)
    marked: bool = True
    """has a painted centre line"""

    def __post_init__(self) -> None:
        self.s = distances_along(self.centre)
        self.length = float(self.s[-1])
        tangent = gaussian_filter1d(np.gradient(self.centre, axis=0), 3.0, axis=0, mode="nearest")
        tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
        self.normal: Array = np.stack([-tangent[:, 1], tangent[:, 0]], axis=1)

    @property
    def one_way(self) -> bool:
        return all(lane.forward for lane in self.lanes)

    def at(self, s: Array | float, offset: Array | float) -> Array:
        """Return the points [..., 2] at distances ``s`` along and ``offset`` to the left of the reference line."""
        x, y = (np.interp(s, self.s, self.centre[:, k] + 0.0) for k in (0, 1))
        nx, ny = (np.interp(s, self.s, self.normal[:, k]) for k in (0, 1))
        return np.stack([x + offset * nx, y + offset * ny], axis=-1)

    def line(self, start: float, stop: float, offset: Array | float, step: float = 2.0) -> Array:
        """Return the line [N, 2] at a constant offset between two distances."""
        s = np.linspace(start, stop, max(2, int(np.ceil((stop - start) / step)) + 1))
        return self.at(s, offset)

    def band(self, start: float, stop: float, right: Array | float, left: Array | float) -> BaseGeometry:
        """Return the area between two offsets (arrays over ``s`` or constants)."""
        s = np.unique(np.concatenate([[start, stop], self.s[(self.s > start) & (self.s < stop)]]))
        sides = [np.interp(s, self.s, np.broadcast_to(offset, self.s.shape)) for offset in (right, left)]
        ring = np.concatenate([self.at(s, sides[0]), self.at(s, sides[1])[::-1]])
        shape: BaseGeometry = Polygon(ring)
        # On the inside of a tight bend an offset line can cross itself.
        return shape if shape.is_valid else shape.buffer(0.05).buffer(-0.05)

    def base(self) -> BaseGeometry:
        """Return the road surface without bays, median filled."""
        return self.band(0, self.length, -self.half[RIGHT], self.half[LEFT])

    def surface(self) -> BaseGeometry:
        """Return the road surface with bays, median filled."""
        return self.band(0, self.length, -self.half[RIGHT] - self.bays[RIGHT], self.half[LEFT] + self.bays[LEFT])

    def toward(self, end: int) -> Array:
        """Return the unit direction in which the street leaves its node at an end."""
        k = min(36, len(self.centre) - 1)
        d = self.centre[k] - self.centre[0] if end == 0 else self.centre[-1 - k] - self.centre[-1]
        return np.asarray(d / np.linalg.norm(d), dtype=np.float64)

    def half_seen(self, end: int, side: int) -> float:
        """Return the half width on a side as seen by someone who leaves the node at an end."""
        return self.half[side if end == 0 else -side]


def make_street(rng: np.random.Generator, plan: PlannedStreet, style: Style) -> Street:
    """Draw the cross section of a planned street: not wider than its bends allow."""
    radius = min_radius(plan.centre)
    for rank in range(plan.rank, -1, -1):
        street = _draw_street(rng, replace(plan, rank=rank), style)
        if max(street.half.values()) + 4 < radius:
            break
    return street


def _draw_street(rng: np.random.Generator, plan: PlannedStreet, style: Style) -> Street:
    centre, a, b = plan.centre, plan.a, plan.b
    width = float(rng.uniform(3.0, 3.7))
    forward, backward = _lane_counts(rng, plan.rank)
    if backward == 0 and b == -1:
        backward = 1
    if backward == 0 and rng.random() < 0.5:
        centre, a, b = centre[::-1], b, a
    street = Street(a, b, plan.rank, resample(centre, 0.5))
    ahead = LEFT if style.drives_left else RIGHT
    if backward == 0:
        half = forward * width / 2
        # The lanes of a one-way street count from the side on which faster traffic drives.
        street.lanes = [Lane(ahead * ((k + 0.5) * width - half), width, True, k) for k in range(forward)]
        reach = {LEFT: half, RIGHT: half}
    else:
        chance = style.median * {ARTERIAL: 1.0, COLLECTOR: 0.6}.get(plan.rank, 0.0)
        if rng.random() < chance and forward + backward > 2:
            street.raised = True
            street.median = float(np.clip(rng.lognormal(0.75, 0.6), 0.9, 7.0))
        elif rng.random() < 0.05:
            street.median = float(rng.uniform(0.6, 2.2))  # painted
        m = street.median / 2
        street.lanes = [Lane(ahead * (m + (k + 0.5) * width), width, True, k) for k in range(forward)]
        street.lanes += [Lane(-ahead * (m + (k + 0.5) * width), width, False, k) for k in range(backward)]
        reach = {ahead: m + forward * width, -ahead: m + backward * width}
    street.marked = len(street.lanes) > 2 or rng.random() > 0.15
    for side in (LEFT, RIGHT):
        street.half[side] = reach[side] + float(rng.uniform(0.2, 0.7))
        chance = style.parking * (0.6 if plan.rank == ARTERIAL else 1.0)
        street.parking[side] = bool(rng.random() < chance)
        street.bays[side] = np.zeros(len(street.s))
    return street


def _lane_counts(rng: np.random.Generator, rank: int) -> tuple[int, int]:
    if rank == ARTERIAL:
        options, odds = [(2, 2), (3, 3), (3, 2), (2, 3)], [0.45, 0.25, 0.15, 0.15]
    elif rank == COLLECTOR:
        options, odds = [(1, 1), (2, 2), (2, 1), (1, 2), (3, 0)], [0.33, 0.35, 0.12, 0.12, 0.08]
    else:
        options, odds = [(1, 1), (2, 0), (1, 0)], [0.68, 0.22, 0.10]
    return options[int(rng.choice(len(options), p=odds))]


def place_gaps(
    rng: np.random.Generator, street: Street, driveways: list[tuple[float, float, int]], style: Style
) -> None:
    """Choose where lanes and dividers are interrupted: at crossings between junctions and at wide driveways.

    ``driveways`` are (distance along the street, width, side).
    """
    low, high = street.limit[0], street.length - street.limit[1]
    if high - low > 45 and street.b >= 0 and street.a >= 0 and rng.random() < style.midblock:
        s, width = rng.uniform(low + 0.3 * (high - low), high - 0.3 * (high - low)), rng.uniform(2.8, 5.0)
        street.gaps.append(Gap(s - width / 2 - 0.8, s + width / 2 + 0.8, (LEFT, RIGHT), True))
    for s, width, side in driveways:
        gap = Gap(s - width / 2 - 2.0, s + width / 2 + 2.0, (side,), False)
        apart = all(gap.stop + 8 < other.start or gap.start - 8 > other.stop for other in street.gaps)
        if apart and gap.start > low + 10 and gap.stop < high - 10 and rng.random() < 0.3:
            if not street.raised and not street.one_way:
                gap.sides = (LEFT, RIGHT)
            street.gaps.append(gap)
    street.gaps.sort(key=lambda g: g.start)


def place_pockets(rng: np.random.Generator, street: Street, style: Style) -> None:
    """Add turn lanes before junctions on the kerb side of main roads: the road widens there."""
    ahead = LEFT if style.drives_left else RIGHT
    for end, node in ((1, street.b), (0, street.a)):
        forward = end == 1
        room = street.length - street.limit[0] - street.limit[1]
        through = [x for x in street.lanes if x.forward == forward and not x.pocket]
        if node < 0 or not through or street.rank < COLLECTOR or room < 60 or rng.random() > 0.3:
            continue
        side = ahead if forward else -ahead
        outer = max(through, key=lambda x: x.rank)
        width, length = float(rng.uniform(2.9, 3.3)), float(rng.uniform(22, 38))
        stop = street.length - street.limit[1] if forward else street.limit[0]
        start = stop - length if forward else stop + length
        if any(g.start - 14 < max(start, stop) and g.stop + 14 > min(start, stop) for g in street.gaps):
            continue
        offset = outer.offset + side * (outer.width + width) / 2
        street.lanes.append(Lane(offset, width, forward, outer.rank + 1, min(start, stop), max(start, stop), True))
        taper = float(rng.uniform(8, 16))
        ramp = (street.s - (start - taper)) / taper if forward else ((start + taper) - street.s) / taper
        edge = street.length - street.mouth[1] + 4 if forward else street.mouth[0] - 4
        ends = (edge - street.s) / 4 if forward else (street.s - edge) / 4
        street.bays[side] = np.maximum(street.bays[side], width * np.clip(np.minimum(ramp, ends), 0, 1))


def place_bays(rng: np.random.Generator, street: Street, driveways: list[tuple[float, float, int]]) -> None:
    """Add parking and bus bays along the kerb: between them the kerb bulges out."""
    low, high = street.limit[0] + 2.0, street.length - street.limit[1] - 2.0
    for side in (LEFT, RIGHT):
        blocked = [(g.start - 3, g.stop + 3) for g in street.gaps if side in g.sides]
        blocked += [(s - w / 2 - 1.5, s + w / 2 + 1.5) for s, w, d in driveways if d == side and rng.random() < 0.8]
        taken = street.s[street.bays[side] > 0.01]
        if len(taken):
            blocked += [(float(taken.min()) - 3, float(taken.max()) + 3)]
        depth, taper = float(rng.uniform(2.0, 2.6)), float(rng.uniform(0.8, 3.5))
        if street.parking[side]:
            s = low + float(rng.uniform(0, 10))
            while s < high - 10:
                length = float(rng.uniform(12, 60))
                stop = min([s + length, high] + [start for start, _ in blocked if start > s])
                inside = [b for start, b in blocked if start <= s < b]
                if inside:
                    s = max(inside)
                    continue
                if stop - s > 9:
                    _widen(street, side, s, stop, depth, taper)
                s = stop + float(rng.uniform(2.5, 12))
        elif street.rank >= COLLECTOR and rng.random() < 0.3 and high - low > 50:
            s = float(rng.uniform(low, high - 45))
            length = float(rng.uniform(30, 45))
            if all(s + length < start or s > stop for start, stop in blocked):
                _widen(street, side, s, s + length, float(rng.uniform(2.7, 3.2)), float(rng.uniform(7, 13)))


def _widen(street: Street, side: int, start: float, stop: float, depth: float, taper: float) -> None:
    ramp = np.minimum((street.s - start) / taper, (stop - street.s) / taper)
    street.bays[side] = np.maximum(street.bays[side], depth * np.clip(ramp, 0, 1))


def roughen(rng: np.random.Generator, street: Street) -> None:
    """Let the kerb wander by a decimetre or two, and jump a little where it was rebuilt."""
    inside = np.clip(np.minimum(street.s - street.mouth[0], street.length - street.mouth[1] - street.s) / 5, 0, 1)
    for side in (LEFT, RIGHT):
        noise = gaussian_filter1d(rng.normal(0, 1, len(street.s)), 36, mode="nearest")
        noise *= 0.08 / max(float(noise.std()), 1e-6)
        for _ in range(int(rng.poisson(street.length / 90))):
            noise = noise + np.clip((street.s - rng.uniform(0, street.length)) / 2.5, 0, 1) * rng.normal(0, 0.25)
        street.bays[side] = np.maximum(street.bays[side] + np.clip(noise, -0.15, 0.7) * inside, -0.15)


def median_hole(rng: np.random.Generator, street: Street, noses: dict[int, float]) -> BaseGeometry:
    """Return the raised median(s), with rounded noses; empty without."""
    if not street.raised:
        return Polygon()
    start, stop = noses[0], street.length - noses[1]
    if stop - start < 12:
        return Polygon()
    width = (street.median - min(0.5, 0.25 * street.median)) / 2
    taper = float(rng.uniform(4, 18))
    shape = np.clip(np.minimum(street.s - start, stop - street.s) / taper, 0, 1)
    least = min(width, 0.35) if rng.random() < 0.5 else width
    half = least + (width - least) * shape
    hole = street.band(start, stop, -half, half)
    for gap in street.gaps:
        opened = len(gap.sides) == 2 and (rng.random() < 0.6 or not gap.crossing)
        if opened and gap.stop - gap.start < 0.5 * (stop - start):
            hole = hole.difference(street.band(gap.start, gap.stop, -street.median, street.median))
    radius = 0.9 * least
    return shapely.buffer(shapely.buffer(hole, -radius, quad_segs=4), radius, quad_segs=4)
