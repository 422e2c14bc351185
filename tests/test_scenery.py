"""Solid things: what stands beside the road, what drives on it, and which of it matters to a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely

from nmp.citymap import CityMap, load_with_tables
from nmp_train.sim.boxes import BARRIER, BUILDING, CROWN, LAMP_POLE, POLE, SIGN, WALL, Boxes, nearest, rectangles_touch
from nmp_train.sim.city import generate_city
from nmp_train.sim.drive import sample_routes
from nmp_train.sim.flow import _Tails
from nmp_train.sim.scenery import make_scenery, rectangles
from nmp_train.sim.traffic import make_traffic
from nmp_train.sim.vehicles import ALL, CATEGORIES, MAKES, NUMBER, build, draw, draw_vehicles, tail_of

REAL = Path(__file__).resolve().parents[1] / ".." / "shared" / "real" / "geography"
BOSTON = "boston-seaport"

OFFICIAL = """animal flat.driveable_surface human.pedestrian.adult human.pedestrian.child
human.pedestrian.construction_worker human.pedestrian.personal_mobility human.pedestrian.police_officer
human.pedestrian.stroller human.pedestrian.wheelchair movable_object.barrier movable_object.debris
movable_object.pushable_pullable movable_object.trafficcone static_object.bicycle_rack vehicle.bicycle
vehicle.bus.bendy vehicle.bus.rigid vehicle.car vehicle.construction vehicle.emergency.ambulance
vehicle.emergency.police vehicle.motorcycle vehicle.trailer vehicle.truck""".split()


@pytest.fixture(scope="module")
def city() -> dict[str, Any]:
    return generate_city(7, BOSTON, 300.0)


def _footprints(boxes: Boxes) -> np.ndarray:
    return rectangles(boxes.centre[:, :2], boxes.yaw, boxes.size[:, :2])


def _off_the_road(scenery: Boxes, layers: CityMap) -> None:
    surface = shapely.union_all([*layers.road_segments.geometries, *layers.lanes.geometries])
    shapely.prepare(surface)
    over = shapely.intersects(surface.buffer(-0.1), _footprints(scenery))
    bottom = scenery.centre[:, 2] - scenery.size[:, 2] / 2
    assert (scenery.kind[over] == CROWN).all(), "only crowns of trees hang over the road"
    # An ellipsoid bulges above its bottom; a van fits under it.
    assert (bottom[over] > 1.3).all()
    assert over.sum() > 0.03 * (scenery.kind == CROWN).sum()


def test_scenery_stands_beside_the_road(city: dict[str, Any]) -> None:
    scenery, again, other = make_scenery(city, 1), make_scenery(city, 1), make_scenery(city, 2)
    assert np.array_equal(scenery.centre, again.centre) and np.array_equal(scenery.rgb, again.rgb)
    assert len(other) != len(scenery) or not np.array_equal(scenery.centre, other.centre)
    assert {BUILDING, CROWN, POLE, BARRIER, LAMP_POLE, SIGN, WALL} <= set(scenery.kind.tolist())
    assert (scenery.size > 0).all() and (scenery.instance == -1).all() and not scenery.velocity.any()
    assert (scenery.centre[:, 2] - scenery.size[:, 2] / 2 > -1e-6).all()
    assert (scenery.rgb >= 0).all() and (scenery.rgb <= 1).all()
    _off_the_road(scenery, CityMap.from_tables(city, BOSTON))


@pytest.mark.skipif(not REAL.exists(), reason="the real excerpts are not here")
def test_scenery_on_real_geography() -> None:
    layers, tables = load_with_tables(REAL, "singapore-onenorth", repair=True)
    scenery = make_scenery(tables, 3)
    assert 500 < len(scenery) < 10_000
    _off_the_road(scenery, layers)


def test_every_make_is_built_inside_its_size() -> None:
    rng = np.random.default_rng(0)
    fleet = draw(rng, np.arange(len(ALL)))
    pose = np.column_stack([rng.uniform(-50, 50, (len(ALL), 2)), rng.uniform(-3, 3, len(ALL))])
    boxes = build(fleet, pose, np.zeros((len(ALL), 2)), np.arange(len(ALL)))
    whole = rectangles(pose[:, :2], pose[:, 2], fleet.size[:, :2])
    inside = shapely.contains(shapely.buffer(whole[boxes.instance], 0.02), _footprints(boxes))
    assert inside.all(), {ALL[i].name for i in boxes.instance[~inside]}
    top = boxes.centre[:, 2] + boxes.size[:, 2] / 2
    highest = np.array([top[boxes.instance == k].max() for k in range(len(ALL))])
    assert (highest >= 0.999 * fleet.size[:, 2]).all() and (highest < 1.12 * fleet.size[:, 2]).all()
    assert (top - boxes.size[:, 2] > -1e-6).all() and (boxes.size > 0).all()
    assert set(CATEGORIES) <= set(OFFICIAL) and len(MAKES) >= 20


def test_cities_have_their_own_traffic() -> None:
    rng = np.random.default_rng(1)
    boston = {m.name for m in draw_vehicles(rng, 4000, "moving", BOSTON).makes}
    singapore = {m.name for m in draw_vehicles(rng, 4000, "moving", "singapore-queenstown").makes}
    assert "double-decker" in singapore - boston
    parked = draw_vehicles(rng, 4000, "parked", BOSTON).makes
    assert "trailer" in {m.name for m in parked} and not any("bus.bendy" in m.category for m in parked)
    assert not any(m.tail for m in draw_vehicles(rng, 4000, "moving", BOSTON, alone=True).makes)


@pytest.mark.parametrize("name", ["tractor", "bendy bus"])
def test_tails_follow_their_heads(name: str) -> None:
    heads = draw(np.random.default_rng(2), np.array([NUMBER["sedan"], NUMBER[name]]))
    tails = _Tails()
    # straight on, a bend of 12 m radius to the left, straight on
    s = np.arange(0, 80, 0.5)
    yaw = np.clip((s - 20) / 12, 0, np.pi / 2)
    xy = np.cumsum(0.5 * np.column_stack([np.cos(yaw), np.sin(yaw)]), axis=0)
    poses = []
    for k in range(len(s)):
        state = np.array([[500.0, 0.0, 0.0], [*xy[k], yaw[k]]])
        poses.append(tails.update(heads, state)[0])
    tail = np.array(poses)
    assert tails.head.tolist() == [1]
    gap = np.hypot(*(tail[:, :2] - xy).T)
    assert np.ptp(gap) < 0.35 * gap.mean()
    assert tail[20, 2] == pytest.approx(0.0, abs=1e-6) and tail[-1, 2] == pytest.approx(np.pi / 2, abs=0.02)
    lag = yaw - tail[:, 2]
    assert 0.25 < lag.max() < 1.2 and lag.min() > -1e-6
    assert tail_of(heads)[0].makes[0].name == MAKES[NUMBER[name]].tail


def test_road_users_keep_apart(city: dict[str, Any]) -> None:
    vehicles, parked, names = 0, 0, set()
    for k, route in enumerate(sample_routes(city, 3, 3, 10.0, 5.0)):
        traffic = make_traffic(city, route, k, 1.2)
        names |= {m.name for m in traffic.fleet.makes}
        for t in (0.0, 4.0, 8.0):
            users = traffic.users_at(t)
            i, j = np.triu_indices(len(users.fleet), 1)
            size = users.fleet.size[:, :2] - 0.3
            touch = rectangles_touch(users.xyyaw[i], size[i], users.xyyaw[j], size[j])
            pairs = [(users.fleet.makes[a], users.fleet.makes[b]) for a, b in zip(i[touch], j[touch], strict=True)]
            assert all(b.name == a.tail or a.name == b.tail for a, b in pairs), pairs
            still = users.parked
            assert not users.velocity[still].any()
            near = np.hypot(*(users.xyyaw[:, :2] - route.at(t)[:2]).T) < 50
            wheels = np.array([m.category.startswith("vehicle") for m in users.fleet.makes])
            vehicles += int((near & wheels).sum())
            parked += int((near & wheels & still).sum())
    assert vehicles / 9 > 12 and parked / 9 > 4
    assert len(names) > 12


def test_what_matters_most_comes_first() -> None:
    centre = np.array([[10.0, 0, 0.3], [45.0, 0, 4], [3.0, 3, 0.7], [300.0, 0, 10]])
    size = np.array([[0.3, 0.3, 0.6], [20.0, 10, 8], [4.0, 1.8, 1.4], [30.0, 30, 20]])
    boxes = Boxes.scenery(centre, size, np.zeros(4), np.zeros((4, 3)), BARRIER)
    chosen = nearest(boxes, np.zeros(2), 70.0, 10)
    assert chosen.centre[:, 0].tolist() == [3.0, 45.0, 10.0]
    assert len(nearest(boxes, np.zeros(2), 70.0, 2)) == 2
    assert len(nearest(Boxes.empty(), np.zeros(2), 70.0, 2)) == 0
