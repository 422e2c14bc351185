"""Changes of a city: what they do to its map, their log on disk, and scores against the map of the right day."""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from shapely.geometry import LineString, MultiLineString, Point

from nmp.changelog import KINDS, Change, Shape, apply_changes, changes_path, local_date, read_changes, write_changes
from nmp.citymap import CityMap, load_with_tables
from nmp.cli import main
from nmp.errors import NmpError
from nmp.evaluation import CityMaps, truth_at
from nmp.frame import LocalMap
from nmp.geometry import BevGrid, transform_from_xyyaw
from nmp.layers import LayerWriter
from nmp_train.sim.changes import APART_M, draw_changes, removed_markings
from nmp_train.sim.city import generate_city, write_map
from nmp_train.sim.drive import sample_routes
from tests.test_truth import GEOGRAPHY

BOSTON = "boston-seaport"
DATES = ("2018-07-01", "2018-10-01")
Tables = dict[str, Any]


@pytest.fixture(scope="module")
def city() -> Tables:
    return generate_city(6, BOSTON, 420.0)


@pytest.fixture(scope="module")
def changes(city: Tables) -> list[Change]:
    return draw_changes(city, BOSTON, 3, DATES, 8)


def one(changes: list[Change], kind: str) -> Change:
    return next(c for c in changes if c.kind == kind)


def road(city: CityMap) -> Any:
    return shapely.union_all([*city.road_segments.geometries, *city.lanes.geometries])


def before_and_after(city: Tables, change: Change) -> tuple[CityMap, CityMap]:
    return CityMap.from_tables(city, BOSTON), CityMap.from_tables(apply_changes(city, [change], change.date), BOSTON)


def test_all_kinds_apart_sorted_and_the_same_from_the_same_seed(city: Tables, changes: list[Change]) -> None:
    assert [c.kind for c in changes].count("crossing_added") == 2 and {c.kind for c in changes} == {*KINDS}
    assert [c.date for c in changes] == sorted(c.date for c in changes)
    assert all(DATES[0] < c.date <= DATES[1] for c in changes)
    assert draw_changes(city, BOSTON, 3, DATES, 8) == changes
    assert draw_changes(city, BOSTON, 4, DATES, 8) != changes
    extents = [shapely.union_all([s.geometry for s in (*c.removed, *c.added)]) for c in changes]
    assert all(a.distance(b) > APART_M for i, a in enumerate(extents) for b in extents[:i])


def test_the_given_map_stays_and_the_date_decides(city: Tables, changes: list[Change]) -> None:
    kept = copy.deepcopy(city)
    assert apply_changes(city, changes, DATES[0]) is city
    added = one(changes, "crossing_added")
    token = added.added[-1].token
    day = datetime.date.fromisoformat(added.date)
    for date, there in ((day - datetime.timedelta(days=1), False), (day, True), (day.replace(year=2020), True)):
        crossings = apply_changes(city, changes, date.isoformat())["ped_crossing"]
        assert (token in {r["token"] for r in crossings}) is there
    apply_changes(city, changes, DATES[1])
    assert city == kept


def test_crossings_come_and_go(city: Tables, changes: list[Change]) -> None:
    old, new = before_and_after(city, one(changes, "crossing_removed"))
    assert len(new.crossings.geometries) == len(old.crossings.geometries) - 1
    change = one(changes, "crossing_added")
    old, new = before_and_after(city, change)
    assert len(new.crossings.geometries) == len(old.crossings.geometries) + 1
    shape = new.crossings.geometries[-1]
    # From kerb to kerb, square to the lines that it interrupts; no line runs over it.
    assert shape.intersection(road(old)).area > 0.8 * shape.area
    assert shape.boundary.distance(road(old).boundary) < 0.05
    assert not new.lane_dividers.near(shape) and not new.road_dividers.near(shape)
    assert old.lane_dividers.near(shape) or old.road_dividers.near(shape) or len(change.removed) == 0


def test_dividers_move_sideways_as_a_whole(city: Tables, changes: list[Change]) -> None:
    change = one(changes, "dividers_moved")
    for was, now in zip(change.removed, change.added, strict=True):
        assert was.token == now.token
        steps = shapely.distance(shapely.points(now.rings[0]), was.geometry)
        assert (steps > 0.4).all() and (steps < 1.6).all() and np.ptp(steps) < 0.25
    old, new = before_and_after(city, change)
    layer = "lane_dividers" if change.removed[0].layer == "lane_divider" else "road_dividers"
    assert len(getattr(old, layer).geometries) == len(getattr(new, layer).geometries)
    assert getattr(old, layer).near(change.removed[0].geometry.buffer(0.05))
    assert not getattr(new, layer).near(change.removed[0].geometry.buffer(0.05))


def test_works_move_all_layers_that_share_a_kerb(city: Tables, changes: list[Change]) -> None:
    change = one(changes, "boundary_moved")
    area = next(s.geometry for s in change.removed if s.layer == "road_segment")
    tables = apply_changes(city, [change], change.date)
    old, new = before_and_after(city, change)
    lost = road(old).difference(road(new))
    assert lost.area == pytest.approx(road(old).intersection(area).area, rel=1e-6) and lost.area > 15
    assert road(new).difference(road(old)).area < 1e-6
    # The new kerb is 1 to 3 m from the old one in the middle, and runs into it at both ends.
    kerb = road(new).boundary.intersection(area.buffer(0.01))
    depth = shapely.distance(shapely.points(shapely.get_coordinates(shapely.segmentize(kerb, 0.5))), road(old).boundary)
    assert 0.9 < depth.max() < 3.1 and depth.min() < 0.1
    for layer in ("lane", "drivable_area"):
        shapes = CityMap.from_tables({**tables, "road_segment": [], "lane": tables[layer]}, BOSTON).lanes
        assert all(s.intersection(area).area < 1e-6 for s in shapes.near(area)), layer
    dividers = [*new.lane_dividers.near(area), *new.road_dividers.near(area)]
    assert not dividers


def test_bridged_lines_run_through_a_removed_crossing() -> None:
    from nmp_train.sim.mapjson import MapBuilder

    b = MapBuilder(f"test:{BOSTON}", 100, 100)
    b.add("road_segment", polygon_token=b.polygon(shapely.box(0, 40, 100, 60)), is_intersection=False)
    b.add("ped_crossing", polygon_token=b.polygon(shapely.box(48, 40, 52, 60)), road_segment_token="")
    for x0, x1 in ((5, 47), (53, 95)):
        b.add("lane_divider", line_token=b.line(np.array([[x0, 50.0], [x1, 50.0]])), lane_divider_segments=[])
    crossing = b.tables["ped_crossing"][0]["token"]
    b.tables["stop_line"].append({"token": "s", "ped_crossing_tokens": [crossing, "other"]})
    found = [c for c in draw_changes(b.tables, BOSTON, 0, DATES, 1) if c.kind == "crossing_removed"]
    seeds = iter(range(1, 40))
    while not found:
        found = [c for c in draw_changes(b.tables, BOSTON, next(seeds), DATES, 1) if c.kind == "crossing_removed"]
    tables = apply_changes(b.tables, found, DATES[1])
    lines = shapely.line_merge(shapely.union_all(CityMap.from_tables(tables, BOSTON).lane_dividers.geometries))
    assert lines.equals(LineString([(5, 50), (95, 50)]))
    assert tables["stop_line"][0]["ped_crossing_tokens"] == ["other"]
    assert [g.geom_type for g in removed_markings(found, DATES[1])] == ["Polygon"]
    assert removed_markings(found, DATES[0]) == []


def test_changes_along_drives_are_seen_and_leave_room(city: Tables) -> None:
    drive = MultiLineString([r.poses_xyyaw[:, :2] for r in sample_routes(city, 1, 2, 20.0, 2.0)])
    found = draw_changes(city, BOSTON, 5, DATES, 4, along=drive)
    drive = shapely.remove_repeated_points(drive)
    assert found and all(drive.distance(Point(c.x, c.y)) < 40 for c in found)
    works = [s.geometry for c in found if c.kind == "boundary_moved" for s in c.removed if s.layer == "road_segment"]
    assert works and all(area.distance(drive) > 1.39 for area in works)


def test_the_devkit_reads_a_changed_map(city: Tables, changes: list[Change], tmp_path: Path) -> None:
    from nuscenes.map_expansion.map_api import NuScenesMap

    tables = apply_changes(city, changes, DATES[1])
    write_map(tables, tmp_path, BOSTON)
    official = NuScenesMap(str(tmp_path), BOSTON)
    for layer in ("road_segment", "lane", "ped_crossing", "walkway"):
        shapes = [official.extract_polygon(r["polygon_token"]) for r in getattr(official, layer)]
        assert all(s.is_valid and s.area > 0.4 for s in shapes), layer
    for layer in ("road_divider", "lane_divider"):
        lines = [official.extract_line(r["line_token"]) for r in getattr(official, layer)]
        assert len(lines) == len(tables[layer]) and all(line.length > 0.5 for line in lines)
    added = one(changes, "crossing_added").added[-1]
    record = official.get("ped_crossing", added.token)
    assert official.extract_polygon(record["polygon_token"]).equals(added.geometry)


@pytest.mark.skipif(not GEOGRAPHY.is_dir(), reason="no real nuScenes material here")
@pytest.mark.parametrize("location, kinds", [(BOSTON, 4), ("singapore-onenorth", 3)])
def test_real_geography_changes_too(location: str, kinds: int) -> None:
    old, tables = load_with_tables(GEOGRAPHY, location)
    changes = draw_changes(tables, location, 1, DATES, 8)
    assert len(changes) == 8 and len({c.kind for c in changes}) == kinds  # one-north has no crossings to remove
    new = CityMap.from_tables(apply_changes(tables, changes, DATES[1]), location)
    for layer in ("road_segments", "lanes", "crossings", "walkways"):
        assert all(s.is_valid for s in getattr(new, layer).geometries)
    lost = sum(s.area for s in old.road_segments.geometries) - sum(s.area for s in new.road_segments.geometries)
    assert 30 < lost < 1000


# -------------------------------------------------------------------------------------------------- the change log


@pytest.fixture(scope="module")
def dataroot(city: Tables, changes: list[Change], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_map(city, root, BOSTON)
    write_changes(root, BOSTON, reversed(changes), DATES[0])
    return root


def test_log_and_map_of_a_date(city: Tables, changes: list[Change], dataroot: Path) -> None:
    content = json.loads(changes_path(dataroot, BOSTON).read_text())
    assert content["map_date"] == DATES[0] and content["location"] == BOSTON
    first = content["changes"][0]
    assert first["timestamp_us"] == datetime.datetime.fromisoformat(f"{first['date']}T00:00:00-04:00").timestamp() * 1e6
    assert read_changes(dataroot, BOSTON) == changes
    assert read_changes(dataroot, "singapore-onenorth") == []
    for date in (DATES[0], changes[3].date, DATES[1]):
        expected = CityMap.from_tables(apply_changes(city, changes, date), BOSTON)
        loaded = CityMap.load(dataroot, BOSTON, date)
        for layer in ("crossings", "lane_dividers", "road_segments", "walkways"):
            assert shapely.equals(getattr(loaded, layer).geometries, getattr(expected, layer).geometries).all()
    assert load_with_tables(dataroot, BOSTON)[1] == city


def test_local_days() -> None:
    midnight = Change("2018-08-02", "crossing_added", "singapore-onenorth", 0, 0, (), ()).timestamp_us * 1000
    assert local_date("singapore-onenorth", midnight) == "2018-08-02"
    assert local_date("singapore-onenorth", midnight - 1_000_000_000) == "2018-08-01"
    assert local_date(BOSTON, midnight) == "2018-08-01"


def _edit(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["changes"][0].update(fields)


CORRUPT: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda c: c.pop("map_date"), "not a change log .*map_date"),
    (lambda c: c.update(changes=3), "not a change log"),
    (_edit(kind="earthquake"), "unknown kind 'earthquake'"),
    (_edit(date="yesterday"), "not a change log"),
    (_edit(timestamp_us=0), "is not midnight of"),
    (_edit(location="singapore-onenorth", timestamp_us=None), "not a change log"),
    (lambda c: c.update(location="atlantis"), "changes in 'atlantis'"),
    (lambda c: c["changes"].reverse(), "not sorted by date"),
    (lambda c: c.update(map_date="2019-01-01"), "older than the map"),
    (_edit(added=[{"layer": "roof", "token": "a", "coordinates": []}]), "unknown layer 'roof'"),
    (_edit(added=[{"layer": "lane", "token": "a", "coordinates": [[[0, 0], [1, 1]]]}]), "too few points"),
    (
        _edit(added=[{"layer": "lane", "token": "a", "coordinates": [[[0, 0], [1, 1], [1, 0], [0, 1]]]}]),
        "crosses itself",
    ),
    (_edit(added=[{"layer": "lane_divider", "token": "", "coordinates": [[[0, 0], [1, 1]]]}]), "without a token"),
]


@pytest.mark.parametrize("damage, message", CORRUPT)
def test_corrupt_logs_are_named(
    damage: Callable[[dict[str, Any]], Any], message: str, dataroot: Path, tmp_path: Path
) -> None:
    content = json.loads(changes_path(dataroot, BOSTON).read_text())
    damage(content)
    path = changes_path(tmp_path, BOSTON)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    with pytest.raises(NmpError, match=f"{BOSTON}.json .*{message}"):
        read_changes(tmp_path, BOSTON)


def test_other_bad_input(city: Tables, changes: list[Change], dataroot: Path, tmp_path: Path) -> None:
    changes_path(tmp_path, BOSTON).parent.mkdir(parents=True)
    changes_path(tmp_path, BOSTON).write_text("{")
    with pytest.raises(NmpError, match="not valid JSON"):
        read_changes(tmp_path, BOSTON)
    foreign = generate_city(7, BOSTON, 250.0)
    with pytest.raises(NmpError, match="which the map has not on .* same data set"):
        apply_changes(foreign, changes, DATES[1])
    with pytest.raises(NmpError, match="'soon' is not a date"):
        CityMap.load(dataroot, BOSTON, "soon")
    with pytest.raises(NmpError, match="no time for changes"):
        draw_changes(city, BOSTON, 0, (DATES[1], DATES[0]), 1)
    with pytest.raises(NmpError, match="give 0 or more"):
        draw_changes(city, BOSTON, 0, DATES, -1)


# -------------------------------------------------------------------------------------------------------- nmp eval


def test_eval_uses_the_map_of_the_day(
    changes: list[Change], dataroot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = one(changes, "crossing_added")
    grid, pose = BevGrid(), transform_from_xyyaw(change.x, change.y, 0.4)
    nothing, known = np.zeros((3, *grid.shape), np.float32), np.ones(grid.shape, np.float32)
    stamp = change.timestamp_us * 1000
    maps, writer = CityMaps(dataroot), LayerWriter(tmp_path / "layers")
    truth = {}
    for name, when in (("before", stamp - 1_000_000), ("after", stamp)):
        blank = LocalMap(when, BOSTON, pose, grid, nothing, known)
        truth[name] = maps.truth_of(blank)
        writer.write(LocalMap(when, BOSTON, pose, grid, truth[name].astype(np.float32), known))
    assert truth["after"][1].sum() > truth["before"][1].sum() + 200
    arguments = ["eval", str(tmp_path / "layers"), "--maps", str(dataroot), "--json", str(tmp_path / "s.json")]

    def crossing(*more: str) -> float:
        assert main([*arguments, *more]) == 0
        return float(json.loads((tmp_path / "s.json").read_text())["layers"]["crossing"])

    assert crossing() == 100.0
    assert crossing("--map-date", DATES[0]) < 80.0
    assert crossing("--map-date", DATES[1]) < 100.0
    poses = [{"location": BOSTON, "x": change.x, "y": change.y, "yaw": 0.4}]
    assert (truth_at(poses, maps)[0] == truth_at(poses, CityMaps(dataroot, map_date=DATES[0]))[0]).all()
    assert truth_at(poses, CityMaps(dataroot, map_date=change.date))[0][1].sum() == truth["after"][1].sum()
    capsys.readouterr()
    assert main([*arguments, "--map-date", "31.12."]) == 2
    assert "'31.12.' is not a date: write YYYY-MM-DD" in capsys.readouterr().err


def test_shapes_keep_their_holes() -> None:
    ring = shapely.box(0, 0, 9, 9).difference(shapely.box(3, 3, 4, 4))
    shape = Shape.of("walkway", ring, "t")
    assert shape.geometry.equals(ring) and Shape.from_json(json.loads(json.dumps(shape.to_json()))) == shape
