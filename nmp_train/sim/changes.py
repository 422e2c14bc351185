"""Draw what changes in a city while it is being driven: crossings, lane markings, kerbs.

The changes and the reader of change logs are in :mod:`nmp.changelog`, as the online system needs them too.
"""

from __future__ import annotations

import datetime
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import STRtree
from shapely.geometry import LineString, Point, Polygon
from shapely.geometry.base import BaseGeometry
from shapely.ops import substring

from nmp.changelog import AREA_LAYERS, KINDS, LINE_LAYERS, Change, Shape, checked_date, in_force
from nmp.citymap import CityMap
from nmp.errors import NmpError
from nmp_train.sim.lanes import arcline_points
from nmp_train.sim.mapjson import lines_of, polygons_of

log = logging.getLogger(__name__)

Array = NDArray[np.float64]

APART_M = 15.0
"""between two changes of a city, so that each of them can be told on its own"""
TRIES = 150
"""places that are tried for one change"""
NEAR_M = 12.0
"""changes asked for along drives lie this close to one"""

CROSSING_WIDTH_M = (3.0, 5.0)
STREET_WIDTH_M = (5.0, 32.0)
MEDIAN_M = 6.0
"""a crossing spans islands up to this width"""
MOVE_M = (0.5, 1.5)
"""dividers move sideways by this much"""
NARROWEST_LANE_M = 2.2
"""a divider that moves keeps this far from the others"""
LONGEST_MOVE_M = 400.0
"""of all lines that move together"""
KERB_SHIFT_M = (1.0, 3.0)
KERB_LENGTH_M = (20.0, 60.0)
FREE_LANE_M = 1.1
"""works keep this far from the line that vehicles drive along"""
FREE_DRIVE_M = 1.4
"""and this far from where the car itself drives"""


def draw_changes(
    tables: Mapping[str, Any],
    location: str,
    seed: int,
    dates: tuple[str, str],
    count: int,
    *,
    along: BaseGeometry | None = None,
) -> list[Change]:
    """Draw ``count`` changes of a city, sorted by date.

    Crossings removed and added, lane markings moved sideways and kerbs moved into the road, at places apart from each
    other. Where a map has no room for so many there are fewer, and a warning says so.

    :param tables: map-expansion dictionary, the state before all changes
    :param dates: first and last day (YYYY-MM-DD); changes come into force after the first, up to the last
    :param along: drives (map frame, m): changes lie where they can be seen from there
    """
    first, last = (datetime.date.fromisoformat(checked_date(d)) for d in dates)
    if first >= last:
        raise NmpError(f"no time for changes from {first} to {last}: give a last day after the first")
    if count < 0:
        raise NmpError(f"cannot draw {count} changes: give 0 or more")
    rng = np.random.default_rng([seed, 31, *location.encode()])
    site = _Site.of(tables, location, along)
    draws: dict[str, Callable[[np.random.Generator, _Site], _Draft | None]] = {
        "crossing_removed": _remove_crossing,
        "crossing_added": _add_crossing,
        "dividers_moved": _move_dividers,
        "boundary_moved": _move_boundary,
    }
    out: list[Change] = []
    possible = list(KINDS)
    while len(out) < count and possible:
        # Every kind gets its turn, in an order of its own each time.
        for kind in rng.permutation(possible):
            if len(out) == count:
                break
            draft = next((d for d in (draws[kind](rng, site) for _ in range(TRIES)) if d and site.is_free(d)), None)
            if draft is None:
                possible.remove(str(kind))
                continue
            site.taken.append(draft.extent)
            day = first + datetime.timedelta(days=int(rng.integers(1, (last - first).days + 1)))
            centre = draft.place.centroid
            x, y = round(float(centre.x), 2), round(float(centre.y), 2)
            out.append(Change(day.isoformat(), str(kind), location, x, y, tuple(draft.removed), tuple(draft.added)))
    if len(out) < count:
        log.warning("%s has room for %d changes of %d", location, len(out), count)
    return in_force(out, last.isoformat())


def removed_markings(changes: Sequence[Change], date: str) -> list[BaseGeometry]:
    """Return the dividers and crossings (map frame, m) that were taken away up to a date: their paint may show."""
    return [
        shape.geometry
        for change in in_force(changes, date)
        for shape in change.removed
        if shape.layer in LINE_LAYERS or shape.layer == "ped_crossing"
    ]


@dataclass
class _Draft:
    place: BaseGeometry
    """what a driver would call the change"""
    removed: list[Shape]
    added: list[Shape]

    @property
    def extent(self) -> BaseGeometry:
        """Everything that it touches, lines that are cut in their whole length."""
        return shapely.union_all([self.place, *(s.geometry for s in (*self.removed, *self.added))])


@dataclass
class _Site:
    """The map in the forms that the draws ask."""

    location: str
    city: CityMap
    crossings: list[tuple[str, Polygon]]
    dividers: list[tuple[str, str, LineString]]
    """layer, token, line"""
    divider_tree: STRtree
    ways: STRtree
    """the lines that vehicles drive along, where the map has them"""
    streets: list[LineString]
    """lines along streets where there may be changes"""
    along: BaseGeometry | None
    """what touches this is seen"""
    driven: BaseGeometry | None
    """where the car goes, which is there whatever changes"""
    taken: list[BaseGeometry]

    @classmethod
    def of(cls, tables: Mapping[str, Any], location: str, along: BaseGeometry | None) -> _Site:
        nodes = {n["token"]: (n["x"], n["y"]) for n in tables["node"]}
        polygons = {p["token"]: p for p in tables["polygon"]}
        lines = {r["token"]: [nodes[t] for t in r["node_tokens"]] for r in tables["line"]}
        crossings = []
        for row in tables["ped_crossing"]:
            shape = Polygon([nodes[t] for t in polygons[row["polygon_token"]]["exterior_node_tokens"]])
            if shape.is_valid:
                crossings.append((row["token"], shape))
        marked = [(layer, row["token"], lines[row["line_token"]]) for layer in LINE_LAYERS for row in tables[layer]]
        dividers = [(layer, token, LineString(p)) for layer, token, p in marked if len(p) > 1 and p[0] != p[-1]]
        points = [arcline_points(paths) for paths in tables.get("arcline_path_3", {}).values()]
        ways = [LineString(p) for p in points if len(p) > 1]
        streets = [line for _, _, line in dividers] + ways
        if along is not None:  # a car that stands gives the same point again and again
            along = shapely.remove_repeated_points(along)
        seen = None if along is None else along.buffer(NEAR_M)
        if seen is not None:
            streets = [part for line in streets for part in lines_of(line.intersection(seen), 2.0)]
        return cls(
            location,
            CityMap.from_tables(tables, location),
            crossings,
            dividers,
            STRtree([line for _, _, line in dividers]),
            STRtree(ways),
            streets,
            seen,
            along,
            [],
        )

    def is_seen(self, place: BaseGeometry) -> bool:
        """Return whether something touches what can be seen from the drives."""
        return self.along is None or bool(self.along.intersects(place))

    def is_free(self, draft: _Draft) -> bool:
        """Return whether a draft can be seen and lies apart from the changes that were taken."""
        return self.is_seen(draft.place) and (
            not self.taken or shapely.distance(draft.extent, self.taken).min() > APART_M
        )

    def road(self, region: BaseGeometry) -> BaseGeometry:
        """Return the road inside a region, as its outline is scored: road segments and lanes together."""
        pieces = [g.intersection(region) for g in self.city.road_segments.near(region) + self.city.lanes.near(region)]
        return shapely.union_all(pieces)

    def near_dividers(self, region: BaseGeometry) -> list[tuple[str, str, LineString]]:
        return [self.dividers[i] for i in sorted(self.divider_tree.query(region, predicate="intersects"))]

    def spot(self, rng: np.random.Generator) -> tuple[Array, Array] | None:
        """Return a place (x, y) in a street and the direction of the street there."""
        if not self.streets:
            return None
        line = _choose(rng, self.streets)
        s = float(rng.uniform(0, line.length))
        return shapely.get_coordinates(line.interpolate(s))[0], _direction(line, s)


def _choose(rng: np.random.Generator, lines: Sequence[LineString]) -> LineString:
    lengths = shapely.length(lines)
    return lines[int(rng.choice(len(lines), p=lengths / lengths.sum()))]


def _direction(line: LineString, s: float, step: float = 1.0) -> Array:
    """Return the direction [2] of a line at a distance along it."""
    return _directions(np.array([line]), np.array([s]), step)[0]


def _directions(lines: NDArray[np.object_], s: Array, step: float = 1.0) -> Array:
    """Return the direction [N, 2] of each line at a distance along it."""
    ends = [np.clip(s + d, 0, shapely.length(lines)) for d in (-step, step)]
    p, q = (shapely.get_coordinates(shapely.line_interpolate_point(lines, e)) for e in ends)
    return np.asarray((q - p) / np.linalg.norm(q - p, axis=1, keepdims=True))


def _left(direction: Array) -> Array:
    """Turn directions [..., 2] by a right angle to the left."""
    return np.stack([-direction[..., 1], direction[..., 0]], axis=-1)


def _new_token(site: _Site, name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{site.location}:{name}"))


def _without(site: _Site, area: Polygon, into: _Draft) -> None:
    """Take the dividers out of an area."""
    for layer, token, line in site.near_dividers(area):
        if line.intersection(area).length < 0.05:
            continue
        into.removed.append(Shape.of(layer, line, token))
        pieces = lines_of(line.difference(area), 1.0)
        into.added += [Shape.of(layer, part, _new_token(site, f"{token}:{part.wkt}")) for part in pieces]


# ------------------------------------------------------------------------------------------------------ crossings


def _remove_crossing(rng: np.random.Generator, site: _Site) -> _Draft | None:
    """Wear a crossing off; the lines that it interrupted are painted through."""
    seen = [pair for pair in site.crossings if site.is_seen(pair[1])]
    if not seen:
        return None
    token, shape = seen[int(rng.integers(len(seen)))]
    draft = _Draft(shape, [Shape.of("ped_crossing", shape, token)], [])
    around = shape.buffer(1.5)
    ends = []
    for layer, name, line in site.near_dividers(around):
        for s, outward in ((0.0, -1.0), (line.length, 1.0)):
            point = shapely.get_coordinates(line.interpolate(s))[0]
            if around.contains(Point(point)):
                ends.append((layer, name, point, outward * _direction(line, s)))
    for i, (layer, name, p, toward) in enumerate(ends):
        for other_layer, _, q, back in ends[i + 1 :]:
            gap = float(np.linalg.norm(q - p))
            if layer != other_layer or gap < 1.0 or toward @ back > -0.97 or toward @ (q - p) < 0.97 * gap:
                continue
            bridge = LineString([p, q])
            if bridge.intersects(shape):
                draft.added.append(Shape.of(layer, bridge, _new_token(site, f"{name}:{bridge.wkt}")))
    return draft


def _add_crossing(rng: np.random.Generator, site: _Site) -> _Draft | None:
    """Paint a crossing from kerb to kerb, square to the street."""
    spot = site.spot(rng)
    if spot is None:
        return None
    place, ahead = spot
    around = Point(place).buffer(40)
    if any(shape.distance(Point(place)) < 14 for _, shape in site.crossings):
        return None
    road = site.road(around)
    width = float(rng.uniform(*CROSSING_WIDTH_M))
    # Also looked at a little before and behind, so that it lies in a street and not in the mouth of a junction.
    edges = [_across(road, place + s * ahead, _left(ahead)) for s in (-3.0, 0.0, width, width + 3.0)]
    if any(e is None for e in edges):
        return None
    ends = np.array(edges)
    spans = np.linalg.norm(ends[:, 1] - ends[:, 0], axis=1)
    if not (STREET_WIDTH_M[0] < spans.min() and spans.max() < STREET_WIDTH_M[1] and np.ptp(spans) < 1.5):
        return None
    quad = Polygon(np.round([ends[1, 0], ends[1, 1], ends[2, 1], ends[2, 0]], 4))
    if not quad.is_valid or quad.area < 12:
        return None
    draft = _Draft(quad, [], [])
    _without(site, quad.buffer(0.5, join_style="mitre"), draft)
    draft.added.append(Shape.of("ped_crossing", quad, _new_token(site, f"crossing:{quad.wkt}")))
    return draft


def _across(road: BaseGeometry, place: Array, side: Array) -> Array | None:
    """Return both ends [2, 2] of the road across a street, over islands; None where it is not plain to see."""
    chord = LineString([place - 35 * side, place + 35 * side])
    parts = lines_of(chord.intersection(road), 1.0)
    spans = sorted(sorted(chord.project(Point(c)) for c in (p.coords[0], p.coords[-1])) for p in parts)
    at = next((k for k, (a, b) in enumerate(spans) if a <= 35.0 <= b), None)
    if at is None:
        return None
    low, high = at, at
    while low > 0 and spans[low][0] - spans[low - 1][1] < MEDIAN_M:
        low -= 1
    while high + 1 < len(spans) and spans[high + 1][0] - spans[high][1] < MEDIAN_M:
        high += 1
    return np.array([shapely.get_coordinates(chord.interpolate(s))[0] for s in (spans[low][0], spans[high][1])])


# ------------------------------------------------------------------------------------------------------- dividers


def _move_dividers(rng: np.random.Generator, site: _Site) -> _Draft | None:
    """Mark lanes anew: all of a line, with its double, to one side."""
    seen = [k for k, (_, _, line) in enumerate(site.dividers) if site.is_seen(line)]
    if not seen:
        return None
    lengths = np.array([site.dividers[k][2].length for k in seen])
    group = _stretch(site, int(rng.choice(seen, p=lengths / lengths.sum())))
    size, sign = float(rng.uniform(*MOVE_M)), float(rng.choice([-1, 1]))
    lines = [site.dividers[i][2] for i in group]
    if sum(line.length for line in lines) > LONGEST_MOVE_M or max(line.length for line in lines) < 10:
        return None
    whole = shapely.union_all(lines)
    others = [site.dividers[i][2] for i in site.divider_tree.query(whole.buffer(8.0)) if int(i) not in group]
    road = site.road(whole.buffer(8.0))
    for shift in (sign * size, -sign * size, sign * MOVE_M[0], -sign * MOVE_M[0]):
        moved = _moved(lines, shift)
        if moved is None:
            continue
        new = shapely.union_all(moved)
        # What stays may not come too near to what goes, beyond what was so before.
        clear = new.buffer(NARROWEST_LANE_M, cap_style="flat")
        if any(o.intersection(clear).length > 1.0 for o in others):
            continue
        if new.difference(road.buffer(-0.5)).length > whole.difference(road.buffer(-0.5)).length + 0.5:
            continue
        names = [site.dividers[i][:2] for i in group]
        return _Draft(
            whole.union(new),
            [Shape.of(layer, line, token) for (layer, token), line in zip(names, lines, strict=True)],
            [Shape.of(layer, line, token) for (layer, token), line in zip(names, moved, strict=True)],
        )
    return None


def _stretch(site: _Site, seed: int) -> list[int]:
    """Return the dividers that go on from one end to end, and the second lines of double ones."""
    group, todo = {seed}, [seed]
    while todo:
        line = site.dividers[todo.pop()][2]
        for k in site.divider_tree.query(line.buffer(1.2)):
            other = site.dividers[int(k)][2]
            if int(k) in group:
                continue
            joined = min(a.distance(b) for a in line.boundary.geoms for b in other.boundary.geoms) < 0.5
            shorter = min(line.length, other.length)
            double = line.buffer(1.2).intersection(other).length > 0.7 * shorter
            if joined or double:
                group.add(int(k))
                todo.append(int(k))
        if len(group) > 60:
            break
    return sorted(group)


def _moved(lines: list[LineString], shift: float) -> list[LineString] | None:
    """Move lines sideways by ``shift`` (m, left of the first line); joints stay joined."""
    merged = shapely.line_merge(shapely.union_all([shapely.set_precision(line, 0.01) for line in lines]))
    chains = [c for c in shapely.get_parts(merged) if c.length > 0.5]
    if not chains:
        return None
    tree = STRtree(chains)
    known, signs = np.array(chains), np.array(_signs(chains))
    out = []
    for line in lines:
        points = shapely.points(shapely.get_coordinates(line))
        nearest = tree.nearest(points)
        ahead = _directions(known[nearest], shapely.line_locate_point(known[nearest], points))
        moved = shapely.get_coordinates(points) + shift * signs[nearest, None] * _left(ahead)
        new = LineString(np.round(moved, 4))
        if not new.is_simple or abs(new.length - line.length) > 0.15 * line.length + 0.5:
            return None
        out.append(new)
    return out


def _signs(chains: list[LineString]) -> list[float]:
    """Which chains run with the first (1) and which against it (-1), where they are nearest to each other."""
    out = [1.0]
    for chain in chains[1:]:
        p, q = (Point(c) for c in shapely.get_coordinates(shapely.shortest_line(chains[0], chain)))
        agree = _direction(chains[0], chains[0].project(p)) @ _direction(chain, chain.project(q))
        out.append(1.0 if agree >= 0 else -1.0)
    return out


# -------------------------------------------------------------------------------------------------------- kerbs


def _move_boundary(rng: np.random.Generator, site: _Site) -> _Draft | None:
    """Widen the pavement: a stretch of kerb comes into the road, with a smooth taper at both ends."""
    spot = site.spot(rng)
    if spot is None:
        return None
    place, ahead = spot
    length, size = float(rng.uniform(*KERB_LENGTH_M)), float(rng.uniform(*KERB_SHIFT_M))
    # Twice the length, so that the cut edges of the region stay away from the stretch.
    region = Point(place).buffer(length + 20)
    road = site.road(region)
    toward = _left(ahead) * float(rng.choice([-1, 1]))
    hit = LineString([place, place + 20 * toward]).intersection(road.boundary)
    if hit.is_empty:
        return None
    kerb_point = min((Point(c) for c in shapely.get_coordinates(hit)), key=lambda p: float(p.distance(Point(place))))
    kerb = _kerb_at(road, region, kerb_point, length)
    if kerb is None:
        return None
    station = np.linspace(0, length, max(12, int(length)))
    edge = shapely.get_coordinates(kerb.interpolate(station))
    tangent = np.gradient(edge, station, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    chord = (edge[-1] - edge[0]) / np.linalg.norm(edge[-1] - edge[0])
    if (tangent @ chord).min() < 0.9 or abs(chord @ ahead) < 0.9:
        return None
    inward = _left(tangent)
    if inward[len(inward) // 2] @ toward > 0:
        inward = -inward
    ramp = min(10.0, length / 3)
    ease = np.clip(np.minimum(station, length - station) / ramp, 0, 1)
    ease = ease * ease * (3 - 2 * ease)
    for shift in (size, *np.arange(KERB_SHIFT_M[0], size, 0.5)[::-1]):
        draft = _taken(site, road, edge, inward, ease * shift)
        if draft is not None:
            return draft
    return None


def _kerb_at(road: BaseGeometry, region: BaseGeometry, point: Point, length: float) -> LineString | None:
    """Return ``length`` metres of the outline of a road, about a point of it; None at the cut edge of the region."""
    rings = [r for p in polygons_of(road) for r in (p.exterior, *p.interiors)]
    ring = min(rings, key=lambda r: float(r.distance(point)))
    if ring.length < 2 * length:
        return None
    points = shapely.get_coordinates(ring)[:-1]
    # Start the ring on the far side, so that the stretch does not run over its ends.
    far = int(np.argmax(np.hypot(*(points - [point.x, point.y]).T)))
    opened = LineString(np.concatenate([points[far:], points[: far + 1]]))
    s = opened.project(point)
    if not length / 2 < s < opened.length - length / 2:
        return None
    kerb = substring(opened, s - length / 2, s + length / 2)
    return kerb if kerb.distance(region.boundary) > 5 else None


def _taken(site: _Site, road: BaseGeometry, edge: Array, inward: Array, depth: Array) -> _Draft | None:
    """Take the ground between a kerb [N, 2] and its new place; None where the road is needed."""
    inner = edge + inward * depth[:, None]
    # A little of the outside too, so that no sliver of road is left along the old kerb.
    outer = edge - inward * np.where(depth > 0.1, 0.15, 0.0)[:, None]
    area = Polygon(np.round(np.concatenate([inner, outer[::-1]]), 4)).buffer(0)
    areas = polygons_of(area)
    if len(areas) != 1 or areas[0].area < 0.6 * depth.sum() * np.linalg.norm(edge[1] - edge[0]):
        return None
    area = Polygon(np.round(shapely.get_coordinates(areas[0].exterior), 4))
    if not area.is_valid or any(shape.distance(area) < 2 for _, shape in site.crossings):
        return None
    if len(site.ways.query(area.buffer(FREE_LANE_M), predicate="intersects")):
        return None
    if site.driven is not None and site.driven.distance(area) < FREE_DRIVE_M:
        return None
    if not len(site.ways.geometries):
        # Without lines to drive along, no lane may lose its middle.
        lanes = [lane.buffer(-FREE_LANE_M) for lane in site.city.lanes.near(area)]
        if any(lane.is_empty or lane.intersects(area) for lane in lanes):
            return None
    rest = road.difference(area)
    # Still one road, as wide as a lane at least everywhere beside the works.
    if len(polygons_of(rest, 1.0)) > len(polygons_of(road, 1.0)):
        return None
    beyond = LineString(inner[depth > 0.5] + 2.8 * inward[depth > 0.5])
    if not road.buffer(0.05).contains(beyond):
        return None
    draft = _Draft(area, [], [])
    for layer in AREA_LAYERS[:-1]:
        draft.removed.append(Shape.of(layer, area))
    _without(site, area.buffer(0.3), draft)
    if site.city.walkways.near(area.buffer(0.6)):
        pavement = polygons_of(shapely.set_precision(area.intersection(road), 1e-4), 1.0)
        draft.added += [Shape.of("walkway", p, _new_token(site, f"walkway:{p.wkt}")) for p in pavement]
    return draft
