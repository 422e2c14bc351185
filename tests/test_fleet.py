"""The plan of a fleet: quotas, streets driven again, lanes, and splits."""

from __future__ import annotations

import datetime
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely

from nmp.citymap import CityMap
from nmp.errors import NmpError
from nmp_train.cli import main
from nmp_train.sim.drive import load_trajectories, sample_stretch, stretch_lanes
from nmp_train.sim.fleet import FleetPlan, PlannedScene, pass_counts, plan_fleet, quota
from nmp_train.sim.lanes import roads_of
from nmp_train.sim.overlap import overlaps


@pytest.fixture(scope="module")
def plan() -> FleetPlan:
    return plan_fleet(3, cities=2, scenes=24, duration_s=8.0)


def _streets(plan: FleetPlan) -> dict[str, list[PlannedScene]]:
    streets: dict[str, list[PlannedScene]] = defaultdict(list)
    for scene in plan.scenes:
        streets[scene.street].append(scene)
    return streets


def test_quotas_are_exact() -> None:
    assert quota(np.array([0.7, 0.2, 0.1]), 150).tolist() == [105, 30, 15]
    assert quota(np.array([0.7, 0.2, 0.1]), 8).tolist() == [6, 1, 1]
    for total in (1, 5, 24, 75):
        counts = pass_counts(total)
        assert sum(counts) == total and set(counts) <= set(range(1, 7))
    assert set(pass_counts(75)) == set(range(1, 7))


def test_the_plan_has_what_was_asked_for(plan: FleetPlan) -> None:
    assert [s.name for s in plan.scenes] == [f"scene-{k:04d}" for k in range(1, 25)]
    weather = Counter(s.weather for s in plan.scenes)
    assert weather["day"] == 17 and weather["rain"] == 5 and weather["night"] + weather["night rain"] == 2
    assert list(plan.cities) == ["boston-seaport", "singapore-onenorth"]
    assert {s.vehicle for s in plan.scenes if s.trajectory.location == "boston-seaport"} == {"n008"}
    assert {s.vehicle for s in plan.scenes if s.trajectory.location == "singapore-onenorth"} == {"n015"}
    assert all(s.trajectory.duration_s == pytest.approx(8.0, abs=0.09) for s in plan.scenes)
    assert len({s.density for s in plan.scenes}) > 12
    dates = [datetime.date.fromisoformat(s.trajectory.date) for s in plan.scenes]
    assert dates == sorted(dates) and (dates[-1] - dates[0]).days > 60
    # One day has one weather in a city, and one street is driven once a day.
    skies = {(s.trajectory.location, s.trajectory.date, s.weather) for s in plan.scenes}
    assert len(skies) == len({key[:2] for key in skies})
    for scenes in _streets(plan).values():
        assert len({s.trajectory.date for s in scenes}) == len(scenes)


def test_streets_are_driven_again_in_part_and_both_ways(plan: FleetPlan) -> None:
    streets = _streets(plan)
    assert len({len(scenes) for scenes in streets.values()}) >= 4 and max(map(len, streets.values())) == 6
    alike = 0
    for scenes in streets.values():
        first = scenes[0]
        for other in scenes[1:]:
            a, b = (shapely.LineString(s.trajectory.poses_xyyaw[:, :2]) for s in (first, other))
            assert not np.array_equal(first.trajectory.poses_xyyaw, other.trajectory.poses_xyyaw)
            alike += a.buffer(12).intersects(b)
    assert alike >= 0.6 * sum(len(scenes) - 1 for scenes in streets.values())
    table = overlaps([s.trajectory for s in plan.scenes])["all"]
    assert min(table.road_share[:3]) > 0.03 and sum(table.road_share[3:]) > 0.03
    assert 0.3 < table.near[1] < 0.95
    assert any(s.opposite for s in plan.scenes) and table.opposite_direction[2] > 0
    assert table.same_direction[1] > table.opposite_direction[1]


def test_drives_keep_to_the_lanes_of_their_direction(plan: FleetPlan) -> None:
    for place, tables in plan.cities.items():
        graph, city = roads_of(tables).graph, CityMap.from_tables(tables, place)
        road = shapely.union_all(list(city.road_segments.geometries))
        for scene in plan.scenes:
            if scene.trajectory.location != place:
                continue
            poses = scene.trajectory.poses_xyyaw[::12]
            assert shapely.contains(road, shapely.points(poses[:, :2])).mean() > 0.95
            with_flow = 0
            for x, y, yaw in poses:
                here = shapely.points(x, y)
                for i in graph.near(here.buffer(1.5)):
                    line = graph.lanes[i].line
                    s = line.project(here)
                    p, q = (shapely.get_coordinates(line.interpolate(s + d))[0] for d in (-0.5, 0.5))
                    if (q - p) @ [np.cos(yaw), np.sin(yaw)] > 0.7 * np.linalg.norm(q - p):
                        with_flow += 1
                        break
            assert with_flow > 0.8 * len(poses), scene.name


def test_the_way_back_uses_other_lanes(boston: dict[str, Any]) -> None:
    graph = roads_of(boston).graph
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(12):
        stretch = sample_stretch(boston, rng, 120.0)
        there, back = stretch_lanes(boston, stretch), stretch_lanes(boston, stretch, opposite=True)
        assert not {i for chain in there for i in chain} & {i for chain in back for i in chain}
        for chain in back:
            found += 1
            assert all(j in graph.lanes[i].outgoing for i, j in zip(chain, chain[1:], strict=False))
            start, end = graph.lanes[chain[0]].line, graph.lanes[chain[-1]].line
            assert start.distance(shapely.points(stretch[-1])) < 18 and end.distance(shapely.points(stretch[0])) < 18
    assert found > 5


def test_splits_part_the_scenes(plan: FleetPlan) -> None:
    names = {s.name for s in plan.scenes}
    streets = {s.name: s.street for s in plan.scenes}
    splits = plan.splits
    assert set(splits["train"]) | set(splits["val"]) == names and not set(splits["train"]) & set(splits["val"])
    assert sorted(splits["val"]) == sorted(splits["val_seen"] + splits["val_unseen"])
    assert 0.1 < len(splits["val"]) / len(names) < 0.35
    trained = {streets[n] for n in splits["train"]}
    assert splits["val_unseen"] and not {streets[n] for n in splits["val_unseen"]} & trained
    assert splits["val_seen"] and {streets[n] for n in splits["val_seen"]} <= trained
    for place in plan.cities:
        own = {s.name for s in plan.scenes if s.trajectory.location == place}
        assert set(splits[f"val_{place}"]) == own and set(splits[f"train_without_{place}"]) == names - own


def test_the_same_seed_gives_the_same_plan(plan: FleetPlan, tmp_path: Path) -> None:
    for seed, name in ((3, "a"), (3, "b"), (4, "c")):
        plan_fleet(seed, cities=1, scenes=4, duration_s=3.0).save(tmp_path / name)
    first, again, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == again != other
    plan.save(tmp_path / "plan.json")
    drives = load_trajectories(tmp_path / "plan.json")
    assert [d.name for d in drives] == [s.name for s in plan.scenes]
    assert drives[3].poses_xyyaw == pytest.approx(plan.scenes[3].trajectory.poses_xyyaw, abs=1e-4)
    assert drives[3].date == plan.scenes[3].trajectory.date


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"cities": 5}, "5 cities"), ({"cities": 4, "scenes": 3}, "too few"), ({"duration_s": 0.5}, "0.5 s")],
)
def test_plans_that_are_not_possible(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(NmpError, match=message):
        plan_fleet(1, **arguments)


def test_the_command_writes_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    arguments = ["sim", "--bench", "--cities", "1", "--scenes", "6", "--duration", "4", "--seed", "2", "--plan"]
    assert main([*arguments, "--out", str(out)]) == 0
    assert "road driven 2 x" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert len(content["scenes"]) == 6 and content["cities"] == {"boston-seaport": {"size_m": 320.0}}
    [change] = content["changes"]["boston-seaport"]
    dates = [s["date"] for s in content["scenes"]]
    assert min(dates) < change["date"] <= max(dates)
    paths = shapely.union_all([shapely.LineString([*s["poses_xyyaw"]]) for s in content["scenes"]])
    assert paths.distance(shapely.points(change["x"], change["y"])) < 60
    assert main([*arguments, "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
