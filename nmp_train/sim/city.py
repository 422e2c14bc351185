"""Generate a city as a nuScenes map-expansion v1.3 dictionary.

``generate_city`` draws a street plan (plan.py), gives every street a cross section (streets.py), joins the
surfaces at junctions (junctions.py) and writes down the layers (mapjson.py). Everything follows from the seed.
"""

from __future__ import annotations

import errno
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import STRtree
from shapely.geometry import LineString, Polygon, box
from shapely.geometry.base import BaseGeometry

from nmp.errors import NmpError
from nmp_train.sim.junctions import Junction, cut_segments, make_driveways, make_junctions, round_corners
from nmp_train.sim.mapjson import MapBuilder, arcline_paths, lines_of, polygons_of
from nmp_train.sim.plan import ARTERIAL, STYLES, Style, make_plan
from nmp_train.sim.streets import (
    LEFT,
    RIGHT,
    Lane,
    Street,
    make_street,
    median_hole,
    place_bays,
    place_gaps,
    place_pockets,
    roughen,
)

Array = NDArray[np.float64]
MASK_RESOLUTION = 0.1
"""edge of a pixel of the mask PNG, m: the only one that the devkit accepts as native"""


def style_of(location: str) -> Style:
    """Return the building habits of a location; unknown names get those of Boston."""
    return STYLES.get(location, STYLES["boston-seaport"])


def generate_city(seed: int, location: str, size_m: float = 600.0) -> dict[str, Any]:
    """Return a random city of ``size_m`` x ``size_m`` metres as a map-expansion v1.3 dictionary.

    Coordinates lie in 0..size_m (m, map frame). The same arguments give the same dictionary.
    """
    if not 200 <= size_m <= 5000:
        raise NmpError(f"city size {size_m:g} m is out of range: choose 200 to 5000 m")
    style = style_of(location)
    for attempt in range(60):
        rng = np.random.default_rng([seed, attempt, *location.encode()])
        plan = make_plan(rng, size_m, style)
        ends = [n for street in plan.streets for n in (street.a, street.b)]
        if sum(ends.count(n) > 2 for n in range(len(plan.nodes))) < 3:
            continue
        streets = [make_street(rng, planned, style) for planned in plan.streets]
        junctions = make_junctions(rng, plan.nodes, streets)
        tables = _Draft(rng, style, streets, junctions, size_m).build(f"{seed}:{location}:{size_m}")
        if _goes_on(tables):
            return tables
    raise NmpError(f"seed {seed} gives no street plan in {size_m:g} m: choose another seed or a larger city")


def _goes_on(tables: dict[str, Any]) -> bool:
    """Whether there is somewhere from where one can drive on for ever."""
    links = {token: set(link["outgoing"]) for token, link in tables["connectivity"].items()}
    while dead := {token for token, onward in links.items() if not onward & links.keys()}:
        links = {token: onward for token, onward in links.items() if token not in dead}
    return bool(links)


@dataclass(eq=False)
class _Piece:
    """A lane record of the map: an interval along a street, with its line of travel."""

    street: Street
    lane: Lane
    start: float
    stop: float
    path: Array
    token: str = ""


class _Clips:
    """A large geometry, cut to the neighbourhood of each street once: what follows is much faster on the cuts."""

    def __init__(self, whole: BaseGeometry) -> None:
        self._whole = whole
        self._known: dict[int, BaseGeometry] = {}

    def near(self, street: Street) -> BaseGeometry:
        key = id(street)
        if key not in self._known:
            low, high = street.centre.min(axis=0) - 30, street.centre.max(axis=0) + 30
            self._known[key] = shapely.clip_by_rect(self._whole, *low, *high).buffer(0)
        return self._known[key]


@dataclass
class _Draft:
    rng: np.random.Generator
    style: Style
    streets: list[Street]
    junctions: list[Junction]
    size: float
    crossings: list[Polygon] = field(default_factory=list)
    bands: list[tuple[Street, float, float]] = field(default_factory=list)
    medians: list[BaseGeometry] = field(default_factory=list)
    kerbs: BaseGeometry = field(default_factory=Polygon)
    """road surface without driveway openings and with medians filled"""

    def build(self, name: str) -> dict[str, Any]:
        self._cross_arms()
        drives = self._surfaces()
        pieces = self._plan_pieces()
        links = self._plan_links(pieces)
        # Where vehicles turn there is road, and no island.
        driven = shapely.union_all([LineString(turn_path(p.path[-2:], q.path[:2])).buffer(1.5) for p, q in links])
        # Crossings end at the kerb of the street, also where an opening lies beside them.
        self.kerbs = shapely.union_all([self.kerbs, driven])
        solid = shapely.union_all([self.kerbs, *drives])
        # Kerbs turn into openings with a small radius.
        solid = shapely.buffer(shapely.buffer(solid, 1.6, quad_segs=4), -1.6, quad_segs=4)
        solid = solid.intersection(box(2, 2, self.size - 2, self.size - 2))
        islands = shapely.union_all([*self.medians, *(i for j in self.junctions for i in j.islands)])
        islands = shapely.buffer(islands.difference(driven), -0.15).buffer(0.15)
        islands = shapely.union_all(polygons_of(islands, 1.5))
        self.total = shapely.simplify(solid.difference(islands), 0.02)
        self._draw_crossings()
        self.builder = MapBuilder(name, self.size, self.size)
        self._emit_surface()
        self._emit_lanes(pieces)
        self._emit_connectors(links)
        self._emit_stop_lines()
        self._emit_dividers()
        self._emit_walkways()
        return self.builder.tables

    # The shape of the ground.

    def _cross_arms(self) -> None:
        for junction in self.junctions:
            busy = len(junction.arms) > 2
            for street, end in junction.arms:
                chance = self.style.crossing * (0.75 if street.rank != ARTERIAL else 1.0) * busy
                start = max(street.mouth[end] + self.rng.uniform(-1.5, 0.6), 3.0)
                width = float(np.clip(self.rng.normal(3.6, 0.8), 2.5, 6.0))
                if street.length > 40 and self.rng.random() < chance:
                    self.bands.append((street, start if end == 0 else street.length - start - width, width))
                    street.limit[end] = start + width + float(self.rng.uniform(0.6, 1.3))
                else:
                    street.limit[end] = street.mouth[end] + float(self.rng.uniform(0, 1.5))
        for street in self.streets:
            for end in (0, 1):
                street.limit.setdefault(end, float(self.rng.uniform(0.3, 1.5)))

    def _surfaces(self) -> list[BaseGeometry]:
        """Lay out streets, junctions and medians; return the driveway openings."""
        bases = [s.base() for s in self.streets]
        drives: list[BaseGeometry] = []
        for k, street in enumerate(self.streets):
            near = bases[k].buffer(40)
            others = shapely.union_all([b for m, b in enumerate(bases) if m != k and b.intersects(near)])
            ways = make_driveways(self.rng, street, others, self.style)
            openings = [way[:3] for way in ways]
            drives += [way[3] for way in ways]
            place_gaps(self.rng, street, openings, self.style)
            place_pockets(self.rng, street, self.style)
            place_bays(self.rng, street, openings)
            roughen(self.rng, street)
            self.bands += [(street, g.start + 0.8, g.stop - g.start - 1.6) for g in street.gaps if g.crossing]
        for junction in self.junctions:
            round_corners(self.rng, junction)
        self.kerbs = shapely.union_all([s.surface() for s in self.streets] + [j.fill for j in self.junctions])
        for street in self.streets:
            noses = {}
            for end, at in ((0, street.a), (1, street.b)):
                refuge = self.rng.random() < 0.5
                nose = street.mouth[end] + self.rng.uniform(-0.5, 2.0) if refuge else street.limit[end]
                noses[end] = float(nose) if at >= 0 else -5.0
            self.medians.append(median_hole(self.rng, street, noses))
        return drives

    def _draw_crossings(self) -> None:
        kerbs = _Clips(self.kerbs)
        for street, start, width in self.bands:
            skew = float(np.clip(self.rng.normal(0, 0.07), -0.22, 0.22))
            taper = float(self.rng.normal(0, 0.25))
            ends = []
            for s, extra in ((start, 0.0), (start + width, taper)):
                d = np.linspace(-street.half[RIGHT] - 5, street.half[LEFT] + 5, 60)
                along = s + skew * d + extra * d / 20
                inside = lines_of(LineString(street.at(along, d)).intersection(kerbs.near(street)))
                middle = shapely.points(street.at(s, 0.0))
                if inside:
                    line = min(inside, key=lambda part: part.distance(middle))
                    ends.append(shapely.get_coordinates(line)[[0, -1]] + self.rng.normal(0, 0.12, (2, 2)))
            if len(ends) < 2:
                continue
            quad = Polygon([ends[0][0], ends[0][1], ends[1][1], ends[1][0]])
            if not quad.is_valid or quad.area < 8 or any(quad.intersects(c) for c in self.crossings):
                continue
            hole = self.medians[self.streets.index(street)].buffer(0.25)
            split = polygons_of(quad.difference(hole), 5.0)
            divided = street.raised and len(split) == 2 and self.rng.random() < 0.5
            self.crossings += split if divided else [quad]

    # The tables.

    def _emit_surface(self) -> None:
        b = self.builder
        area = b.token()
        tokens = []
        for part in polygons_of(self.total, 20.0):
            tokens.append(b.polygon(part))
        b.tables["drivable_area"].append({"token": area, "polygon_tokens": tokens})
        for segment in cut_segments(self.total, self.streets, self.junctions):
            token = b.polygon(segment.shape)
            b.add("road_segment", polygon_token=token, is_intersection=segment.intersection, drivable_area_token=area)
        for crossing in self.crossings:
            b.add("ped_crossing", polygon_token=b.polygon(crossing), road_segment_token="")

    def _pieces(self, lane: Lane, street: Street) -> list[tuple[float, float]]:
        """The intervals of a lane between its interruptions."""
        start = lane.start if lane.pocket else street.limit[0]
        stop = lane.stop if lane.pocket else street.length - street.limit[1]
        side = LEFT if lane.offset > 0 else RIGHT
        out, s = [], start
        for gap in street.gaps:
            if side in gap.sides or street.one_way:
                if min(gap.start, stop) - s > 5:
                    out.append((s, min(gap.start, stop)))
                s = max(s, gap.stop)
        if stop - s > 5:
            out.append((s, stop))
        return out

    def _plan_pieces(self) -> list[_Piece]:
        out = []
        for street in self.streets:
            for lane in street.lanes:
                for start, stop in self._pieces(lane, street):
                    path = street.line(start, stop, lane.offset)
                    out.append(_Piece(street, lane, start, stop, path if lane.forward else path[::-1]))
        return out

    def _plan_links(self, pieces: list[_Piece]) -> list[tuple[_Piece, _Piece]]:
        """Which piece of lane leads to which other."""
        rows: dict[int, list[_Piece]] = {}
        for piece in pieces:
            rows.setdefault(id(piece.lane), []).append(piece)
        first: dict[int, _Piece] = {}
        last: dict[int, _Piece] = {}
        links: list[tuple[_Piece, _Piece]] = []
        for row in rows.values():
            row.sort(key=lambda p: p.start if p.lane.forward else -p.start)
            first[id(row[0].lane)], last[id(row[0].lane)] = row[0], row[-1]
            links += list(zip(row, row[1:], strict=False))
        for junction in self.junctions:
            for street, end in junction.arms:
                arriving = [x for x in street.lanes if x.forward == (end == 1) and id(x) in last]
                arriving.sort(key=lambda x: x.rank)
                turns = self._turns(junction, street, end, arriving, first)
                links += [(last[id(lane)], first[id(onto)]) for lane, onto in turns]
        return links

    def _emit_lanes(self, pieces: list[_Piece]) -> None:
        b = self.builder
        ground = _Clips(self.total.buffer(-0.02))
        zebra = _Clips(shapely.union_all([c.buffer(0.4) for c in self.crossings]))
        for piece in pieces:
            half = piece.lane.width / 2 - 0.05
            area = piece.street.band(piece.start, piece.stop, piece.lane.offset - half, piece.lane.offset + half)
            area = area.intersection(ground.near(piece.street))
            shapes = polygons_of(area.difference(zebra.near(piece.street)), 6.0) or polygons_of(area, 0.5)
            if not shapes:
                continue
            shape = shapely.simplify(max(shapes, key=lambda p: p.area), 0.02)
            ends = []
            for point, toward in ((piece.path[0], piece.path[1]), (piece.path[-1], piece.path[-2])):
                d = (toward - point) / np.linalg.norm(toward - point) * piece.lane.width / 2
                ends.append(b.line(np.stack([point + [-d[1], d[0]], point - [-d[1], d[0]]])))
            piece.token = b.add(
                "lane",
                polygon_token=b.polygon(shape),
                lane_type="CAR",
                from_edge_line_token=ends[0],
                to_edge_line_token=ends[1],
                left_lane_divider_segments=[],
                right_lane_divider_segments=[],
            )
            b.tables["arcline_path_3"][piece.token] = arcline_paths(piece.path, 10.0)
            b.tables["connectivity"][piece.token] = {"incoming": [], "outgoing": []}

    def _emit_connectors(self, planned: list[tuple[_Piece, _Piece]]) -> None:
        b = self.builder
        links = b.tables["connectivity"]
        for before, after in planned:
            if not before.token or not after.token:
                continue
            path = turn_path(before.path[-2:], after.path[:2])
            width = min(before.lane.width, after.lane.width) / 2 - 0.2
            area = polygons_of(LineString(path).buffer(width, cap_style="flat"))
            token = b.add("lane_connector", polygon_token=b.polygon(max(area, key=lambda p: p.area)))
            b.tables["arcline_path_3"][token] = arcline_paths(path, 2.5)
            links[token] = {"incoming": [before.token], "outgoing": [after.token]}
            links[before.token]["outgoing"].append(token)
            links[after.token]["incoming"].append(token)

    def _turns(
        self, junction: Junction, street: Street, end: int, arriving: list[Lane], first: dict[int, _Piece]
    ) -> list[tuple[Lane, Lane]]:
        """Which lane of an arm may go on in which lane of the other arms."""
        near = 1 if self.style.drives_left else -1
        heading = -street.toward(end)
        links: list[tuple[Lane, Lane]] = []
        options: list[list[Lane]] = []
        for other, other_end in junction.arms:
            leaving = [x for x in other.lanes if x.forward == (other_end == 0) and not x.pocket and id(x) in first]
            leaving.sort(key=lambda x: x.rank)
            if (other is street and other_end == end) or not leaving or not arriving:
                continue
            d = other.toward(other_end)
            turn = float(np.arctan2(heading[0] * d[1] - heading[1] * d[0], heading @ d))
            options.append(leaving)
            if abs(turn) < 0.75:
                through = [x for x in arriving if not x.pocket]
                links += [(x, leaving[min(k, len(leaving) - 1)]) for k, x in enumerate(through)]
            elif turn * near > 0:
                links.append((arriving[-1], leaving[-1]))
            else:
                links.append((arriving[0], leaving[0]))
        for k, lane in enumerate(arriving):
            if options and all(lane is not x for x, _ in links):
                links.append((lane, options[-1][min(k, len(options[-1]) - 1)]))
        return links

    def _emit_stop_lines(self) -> None:
        self.local = _Clips(self.total)
        for junction in self.junctions:
            for street, end in junction.arms:
                arriving = [x for x in street.lanes if x.forward == (end == 1)]
                if arriving:
                    self._emit_stop_line(street, end, arriving)

    def _emit_stop_line(self, street: Street, end: int, lanes: list[Lane]) -> None:
        b = self.builder
        s = street.limit[0] if end == 0 else street.length - street.limit[1]
        low = min(x.offset - x.width / 2 for x in lanes)
        high = max(x.offset + x.width / 2 for x in lanes)
        span = (s - 0.5, s + 0.1) if end == 0 else (s - 0.1, s + 0.5)
        area = polygons_of(street.band(*span, low, high).intersection(self.local.near(street)), 0.3)
        if not area:
            return
        polygon = b.polygon(max(area, key=lambda p: p.area))
        lights: list[str] = []
        if street.rank == ARTERIAL:
            kerb = street.at(s, street.half[LEFT] + 1.0 if end == 1 else -street.half[RIGHT] - 1.0)
            pole = b.line(np.stack([kerb, kerb + [0.3, 0.0]]))
            pose = {
                "tx": round(float(kerb[0]), 4),
                "ty": round(float(kerb[1]), 4),
                "tz": 3.0,
                "rx": 0,
                "ry": 0,
                "rz": 0,
            }
            lights.append(
                b.add(
                    "traffic_light",
                    line_token=pole,
                    traffic_light_type="VERTICAL",
                    from_road_block_token="",
                    items=[],
                    pose=pose,
                )
            )
        b.add(
            "stop_line",
            polygon_token=polygon,
            stop_line_type="TRAFFIC_LIGHT" if lights else "STOP_SIGN",
            ped_crossing_tokens=[],
            traffic_light_tokens=lights,
            road_block_token="",
        )

    def _emit_dividers(self) -> None:
        b = self.builder
        zebra = _Clips(shapely.union_all([c.buffer(0.5) for c in self.crossings]))
        ground = _Clips(self.total.buffer(-0.4))
        for street in self.streets:
            for table, offset, lane in self._divider_offsets(street):
                whole = Lane(offset, 0.0, True, 0) if lane is None else lane
                for start, stop in self._pieces(whole, street):
                    line = LineString(street.line(start, stop, offset))
                    line = shapely.simplify(line, 0.03).difference(zebra.near(street))
                    line = line.intersection(ground.near(street))
                    for part in lines_of(line, 3.0):
                        token = b.line(shapely.get_coordinates(part))
                        link: dict[str, Any] = (
                            {"lane_divider_segments": []} if table == "lane_divider" else {"road_segment_token": ""}
                        )
                        b.add(table, line_token=token, **link)

    def _divider_offsets(self, street: Street) -> list[tuple[str, float, Lane | None]]:
        """(table, offset, lane whose extent it has) of every divider of a street."""
        out: list[tuple[str, float, Lane | None]] = []
        if not street.one_way and not street.raised and street.marked:
            double = street.median > 0.5
            out += [("road_divider", d * street.median / 2, None) for d in ((1, -1) if double else (0,))]
        for lane in street.lanes:
            inner = [x for x in street.lanes if x.forward == lane.forward and x.rank == lane.rank - 1]
            if inner:
                # The line lies between the two lanes.
                edge = lane.offset - np.sign(lane.offset - inner[0].offset) * lane.width / 2
                out.append(("lane_divider", float(edge), lane if lane.pocket else None))
        for side in (LEFT, RIGHT):
            marked = street.parking[side] and street.rank == ARTERIAL and street.bays[side].max() > 1.5
            if marked and not any(x.pocket and x.offset * side > 0 for x in street.lanes) and self.rng.random() < 0.3:
                out.append(("lane_divider", side * (street.half[side] - 0.2), None))
        return out

    def _emit_walkways(self) -> None:
        b = self.builder
        ground = self.total.union(shapely.union_all(self.medians)).buffer(0.03)
        shapes: list[BaseGeometry] = []
        for street in self.streets:
            for side in (LEFT, RIGHT):
                if self.rng.random() < 0.1:
                    continue
                width = float(self.rng.uniform(1.8, 5.0))
                inner = street.half[side] + street.bays[side] - 0.3
                low, high = street.mouth[0], street.length - street.mouth[1]
                edges = (inner, inner + width + 0.3) if side == LEFT else (-inner - width - 0.3, -inner)
                shapes.append(street.band(low, high, *edges))
        shapes += [j.fill.buffer(2.5) for j in self.junctions]
        tree = STRtree(shapes)
        for k, shape in enumerate(shapes):
            box_near = shape.buffer(2).bounds
            earlier = [shapes[i] for i in tree.query(shape) if i < k]
            free = shape.difference(shapely.clip_by_rect(ground, *box_near).buffer(0))
            free = free.difference(shapely.union_all(earlier))
            for part in polygons_of(shapely.simplify(free.buffer(-0.05), 0.03), 6.0):
                b.add("walkway", polygon_token=b.polygon(part))


def turn_path(arrive: Array, leave: Array) -> Array:
    """Return a smooth path [N, 2] (m) from the end of one line piece [2, 2] to the start of another."""
    p, q = arrive[-1], leave[0]
    d, e = arrive[-1] - arrive[0], leave[1] - leave[0]
    d, e = d / np.linalg.norm(d), e / np.linalg.norm(e)
    chord = float(np.linalg.norm(q - p))
    turn = float(np.arccos(np.clip(d @ e, -1, 1)))
    # The handles with which a cubic comes closest to a circular arc; straight on, a third.
    handle = chord / 3 if turn < 0.1 else chord / (2 * np.sin(turn / 2)) * 4 / 3 * np.tan(turn / 4)
    handle = min(handle, 0.62 * chord)
    t = np.linspace(0, 1, max(4, int(chord / 1.0) + 2))[:, None]
    a, b = p + d * handle, q - e * handle
    return np.asarray((1 - t) ** 3 * p + 3 * (1 - t) ** 2 * t * a + 3 * (1 - t) * t**2 * b + t**3 * q)


def mask_filename(location: str) -> str:
    """Return the path of the mask PNG below the data root."""
    return f"maps/{hashlib.md5(location.encode()).hexdigest()}.png"


def write_map(city: dict[str, Any], dataroot: str | Path, location: str) -> str:
    """Write maps/expansion/<location>.json and the road mask; return the mask's path below ``dataroot``."""
    root = Path(dataroot)
    (root / "maps" / "expansion").mkdir(parents=True, exist_ok=True)
    (root / "maps" / "expansion" / f"{location}.json").write_text(json.dumps(city))
    if not cv2.imwrite(str(root / mask_filename(location)), road_mask(city)):
        raise OSError(errno.ENOSPC, "no space left on device, or no permission")
    return mask_filename(location)


def road_mask(city: dict[str, Any], resolution: float = MASK_RESOLUTION) -> NDArray[np.uint8]:
    """Return the drivable area as an image [height, width], 255 on the road, first row at the largest y."""
    width, height = (round(v / resolution) for v in city["canvas_edge"])
    mask = np.zeros((height, width), np.uint8)
    node = {n["token"]: (n["x"], n["y"]) for n in city["node"]}
    polygon = {p["token"]: p for p in city["polygon"]}
    for area in city["drivable_area"]:
        for token in area["polygon_tokens"]:
            record = polygon[token]
            rings = [record["exterior_node_tokens"], *(hole["node_tokens"] for hole in record["holes"])]
            points = [np.array([node[t] for t in ring]) / resolution for ring in rings if len(ring) > 2]
            cv2.fillPoly(mask, [np.round(p * [1, -1] + [0, height]).astype(np.int32) for p in points], (255,))
    return mask
