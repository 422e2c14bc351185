"""The simulated city: its map, the drives through it and the traffic around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely

from nmp.citymap import CityMap
from nmp.errors import NmpError
from nmp.frame import LOCATIONS
from nmp_train.sim.boxes import (
    BARRIER,
    BODY,
    CABIN,
    CONE,
    EGO_LENGTH_M,
    EGO_WIDTH_M,
    PEDESTRIAN,
    SIGN,
    ego_middle,
    nearest,
    rectangles_touch,
)
from nmp_train.sim.city import generate_city, road_mask, write_map
from nmp_train.sim.drive import Trajectory, load_trajectories, sample_routes, second_pass
from nmp_train.sim.lanes import arcline_points, roads_of
from nmp_train.sim.mapjson import arcline_paths
from nmp_train.sim.scenery import make_scenery
from nmp_train.sim.traffic import make_traffic

REAL = Path(__file__).resolve().parents[1] / ".." / "shared" / "real"
BOSTON = "boston-seaport"


@pytest.fixture(scope="module")
def routes(boston: dict[str, Any]) -> list[Trajectory]:
    return sample_routes(boston, 2, 12, 15.0, 10.0)


def test_same_seed_same_city(boston: dict[str, Any]) -> None:
    assert json.dumps(generate_city(5, BOSTON, 360.0)) == json.dumps(boston)
    assert json.dumps(generate_city(6, BOSTON, 360.0)) != json.dumps(boston)


@pytest.mark.parametrize("location", LOCATIONS)
def test_geometry_is_valid_and_complete(location: str) -> None:
    for seed in (1, 2):
        tables = generate_city(seed, location, 320.0)
        layers = CityMap.from_tables(tables, location)
        for name in ("road_segments", "lanes", "walkways", "crossings", "road_dividers", "lane_dividers"):
            shapes = np.array(getattr(layers, name).geometries)
            assert len(shapes), name
            assert shapely.is_valid(shapes).all() and not shapely.is_empty(shapes).any(), name
            bounds = shapely.total_bounds(shapes)
            assert bounds[:2].min() >= 0 and bounds[2:].max() <= 320.0, name
        for table, layer in (("lane", layers.lanes), ("road_segment", layers.road_segments)):
            assert len(tables[table]) == len(layer.geometries), f"the map reader dropped a {table}"


def test_dividers_end_before_crossings_and_stay_on_the_road(boston: dict[str, Any]) -> None:
    layers = CityMap.from_tables(boston, BOSTON)
    lines = shapely.union_all([*layers.road_dividers.geometries, *layers.lane_dividers.geometries])
    crossings = shapely.union_all(list(layers.crossings.geometries))
    surface = shapely.union_all(list(layers.road_segments.geometries))
    assert not lines.intersects(crossings)
    assert surface.buffer(0.1).contains(lines)


def test_segments_join_without_hairlines(boston: dict[str, Any]) -> None:
    layers = CityMap.from_tables(boston, BOSTON)
    surface = shapely.union_all([*layers.road_segments.geometries, *layers.lanes.geometries])
    # A crack between two pieces would be a long hole without area.
    holes = [shapely.Polygon(ring) for part in shapely.get_parts(surface) for ring in part.interiors]
    assert all(hole.area > 0.5 for hole in holes)
    assert surface.area == pytest.approx(surface.buffer(0.05).buffer(-0.05).area, rel=1e-3)


def test_statistics_are_those_of_a_real_city() -> None:
    layers = CityMap.from_tables(generate_city(2, BOSTON, 450.0), BOSTON)
    surface = shapely.union_all(list(layers.road_segments.geometries))
    kerb_km = surface.boundary.length / 2000
    assert 0.08 < surface.area / 450**2 < 0.25
    assert 6 < len(layers.crossings.geometries) / kerb_km < 18
    dividers = [*layers.road_dividers.geometries, *layers.lane_dividers.geometries]
    assert 0.5 < sum(line.length for line in dividers) / 1000 / kerb_km < 2.0


def test_devkit_loads_the_map(boston: dict[str, Any], tmp_path: Path) -> None:
    api = pytest.importorskip("nuscenes.map_expansion.map_api")
    mask = write_map(boston, tmp_path, BOSTON)
    assert (tmp_path / mask).is_file()
    devkit = api.NuScenesMap(str(tmp_path), BOSTON)
    layers = ["road_segment", "lane", "ped_crossing", "walkway", "stop_line", "drivable_area"]
    masks = devkit.get_map_mask((180, 180, 200, 200), 20.0, layers, (200, 200))
    assert masks.reshape(len(layers), -1).any(axis=1).all()
    dividers = dict(devkit.get_map_geom((180, 180, 360, 360), 0.0, ["road_divider", "lane_divider"]))
    assert dividers["road_divider"] and dividers["lane_divider"]
    lanes = {r["token"] for r in devkit.lane} | {r["token"] for r in devkit.lane_connector}
    ours = roads_of(boston).graph
    for line in ours.lanes[:40]:
        theirs = np.array(devkit.discretize_lanes([line.token], 0.5)[line.token])[:, :2]
        assert shapely.hausdorff_distance(shapely.LineString(theirs), line.line) < 0.3
        assert all(t in lanes for t in devkit.get_outgoing_lane_ids(line.token))


def test_mask_is_white_on_the_road(boston: dict[str, Any], routes: list[Trajectory]) -> None:
    mask = road_mask(boston)
    assert mask.shape == (3600, 3600) and 0.05 < (mask > 0).mean() < 0.4
    poses = np.concatenate([r.poses_xyyaw for r in routes])
    rows, cols = mask.shape[0] - np.round(poses[:, 1] * 10).astype(int), np.round(poses[:, 0] * 10).astype(int)
    assert (mask[rows, cols] == 255).mean() > 0.99


def test_arclines_round_trip() -> None:
    t = np.linspace(0, 1.4, 80)
    curve = np.column_stack([30 * np.sin(t), 30 * (1 - np.cos(t))])
    back = arcline_points(arcline_paths(curve, 8.0))
    assert shapely.hausdorff_distance(shapely.LineString(curve), shapely.LineString(back)) < 0.05


def test_routes_stay_on_the_road_and_move_like_cars(boston: dict[str, Any], routes: list[Trajectory]) -> None:
    layers = CityMap.from_tables(boston, BOSTON)
    surface = shapely.union_all(list(layers.road_segments.geometries))
    poses = np.concatenate([r.poses_xyyaw for r in routes])
    assert shapely.contains(surface, shapely.points(poses[:, :2])).mean() > 0.99
    for route in routes:
        assert route.location == BOSTON
        assert route.duration_s == pytest.approx(15.0, abs=0.11)
        step = np.hypot(*np.diff(route.poses_xyyaw[:, :2], axis=0).T)
        turn = np.abs(np.diff(np.unwrap(route.poses_xyyaw[:, 2])))
        speed = step * 10
        assert speed.max() < 16 and np.abs(np.diff(speed)).max() < 0.6
        assert (turn[step > 0.1] / step[step > 0.1]).max() < 0.35
    assert np.ptp([r.poses_xyyaw[0, 2] for r in routes]) > 1.0, "drives should go in several directions"


def test_routes_and_second_pass_repeat_with_the_seed(boston: dict[str, Any], routes: list[Trajectory]) -> None:
    again = sample_routes(boston, 2, 2, 15.0, 10.0)
    assert np.array_equal(again[1].poses_xyyaw, routes[1].poses_xyyaw)
    moving = max(routes, key=lambda r: float(np.hypot(*(r.poses_xyyaw[-1] - r.poses_xyyaw[0])[:2])))
    first, second = second_pass(moving, 4), second_pass(moving, 4)
    assert np.array_equal(first.poses_xyyaw, second.poses_xyyaw)
    assert first.date > moving.date
    line = shapely.LineString(moving.poses_xyyaw[:, :2])
    away = shapely.distance(line, shapely.points(first.poses_xyyaw[:, :2]))
    assert 0.05 < away.mean() < 1.0
    assert first.duration_s != moving.duration_s


def test_short_drives_are_possible(boston: dict[str, Any]) -> None:
    assert [r.duration_s for r in sample_routes(boston, 6, 8, 1.0, 5.0)] == pytest.approx([1.0] * 8)


def test_a_map_without_lane_graph_says_so(boston: dict[str, Any]) -> None:
    bare = {**boston, "arcline_path_3": {}, "connectivity": {}}
    with pytest.raises(NmpError, match="no lane graph"):
        sample_routes(bare, 1, 1, 5.0, 2.0)
    with pytest.raises(NmpError, match="size"):
        generate_city(1, BOSTON, 50.0)


def _touches_ego(route: Trajectory, city: dict[str, Any], seed: int, density: float) -> tuple[bool, int]:
    traffic = make_traffic(city, route, seed, density)
    box = np.array([EGO_LENGTH_M, EGO_WIDTH_M])
    most = 0
    for t in np.arange(0, route.duration_s, 0.25):
        users = traffic.users_at(float(t))
        pose = route.at(float(t))
        margin = np.array([3.6, 1.2])  # a little less than is promised, for the time between the steps
        if rectangles_touch(ego_middle(pose), box + margin, users.xyyaw, users.fleet.size[:, :2]).any():
            return True, 0
        most = max(most, int((np.hypot(*(users.xyyaw[:, :2] - pose[:2]).T) < 40).sum()))
    return False, most


def test_traffic_never_touches_the_ego(boston: dict[str, Any], routes: list[Trajectory]) -> None:
    counts = []
    for k, route in enumerate(routes[:5]):
        touches, most = _touches_ego(route, boston, k, 1.3)
        assert not touches
        counts.append(most)
    assert np.mean(counts) > 8


def test_traffic_boxes(boston: dict[str, Any], routes: list[Trajectory]) -> None:
    traffic, again = (make_traffic(boston, routes[0], 3, 1.0) for _ in range(2))
    boxes = traffic.at(4.0)
    assert np.array_equal(boxes.centre, again.at(4.0).centre)
    assert {BODY, CABIN, PEDESTRIAN} <= set(np.unique(boxes.kind)) <= {BODY, CABIN, PEDESTRIAN, BARRIER, SIGN, CONE}
    assert (boxes.instance >= 0).all()
    assert (boxes.size > 0).all() and (boxes.rgb >= 0).all() and (boxes.rgb <= 1).all()
    assert (boxes.centre[:, 2] - boxes.size[:, 2] / 2 > -1e-6).all()
    assert len(make_traffic(boston, routes[0], 3, 0.0).at(0.0)) == 0
    few = nearest(boxes, routes[0].poses_xyyaw[0, :2], 30.0, 10)
    assert len(few) <= 10


def test_scenery_keeps_off_the_road(boston: dict[str, Any]) -> None:
    layers = CityMap.from_tables(boston, BOSTON)
    surface = shapely.union_all(list(layers.road_segments.geometries))
    scenery = make_scenery(boston, 1)
    assert {2, 3, 4, 6} <= set(scenery.kind.tolist()) and (scenery.instance == -1).all()
    assert not shapely.intersects(surface, shapely.points(scenery.centre[:, :2])).any()


@pytest.mark.skipif(not REAL.exists(), reason="the real excerpts are not here")
def test_traffic_on_real_geography() -> None:
    scenes = [t for t in load_trajectories(REAL / "geography" / "trajectories") if t.location == "singapore-onenorth"]
    city = json.loads((REAL / "geography" / "maps" / "expansion" / "singapore-onenorth.json").read_text())
    touches, most = _touches_ego(scenes[0], city, 1, 1.0)
    assert not touches and most > 3


@pytest.mark.skipif(not REAL.exists(), reason="the real excerpts are not here")
def test_real_trajectories_load() -> None:
    folder = load_trajectories(REAL / "geography" / "trajectories", 2.0)
    assert len(folder) == 7 and folder[0].name == "scene-0061" and folder[0].date == "2018-07-24"
    drives = load_trajectories(REAL / "val_trajectories.json", 10.0)
    assert len(drives) == 100 and drives[0].date == "2018-08-02"
    assert np.median(np.diff(drives[0].times_s)) == pytest.approx(0.1)


def test_trajectory_files_that_do_not_work(tmp_path: Path) -> None:
    with pytest.raises(NmpError, match="no trajectories at"):
        load_trajectories(tmp_path / "nothing")
    (tmp_path / "bad.json").write_text('[{"location": "x"}]')
    with pytest.raises(NmpError, match="is not a list of scenes"):
        load_trajectories(tmp_path / "bad.json")
    scene = {"location": BOSTON, "rate_hz": 2, "date": "2018-02-31", "poses_xyyaw": [[0, 0, 0], [1, 0, 0]]}
    (tmp_path / "bad.json").write_text(json.dumps([scene]))
    with pytest.raises(NmpError, match="'2018-02-31' is not a date"):
        load_trajectories(tmp_path / "bad.json")
