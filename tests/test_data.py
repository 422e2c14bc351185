"""Training data: what a group is made of, in which order groups come, and that images, poses and truth agree."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import torch
from numpy.typing import NDArray
from torch import Tensor

from nmp.changelog import Change, Shape, apply_changes, local_date
from nmp.citymap import CityMap
from nmp.errors import NmpError
from nmp.frame import CAMERAS, CameraShot, Frame
from nmp.model.config import NetworkConfig
from nmp.model.preprocess import network_input
from nmp.truth import rasterize
from nmp_train.config import AugmentConfig, StageConfig, TrainConfig, WorldsConfig
from nmp_train.data import (
    Batch,
    Group,
    Places,
    RecordedSource,
    SimulatedSource,
    StepSampler,
    Targets,
    augment,
    collate,
    geographic_lanes,
    make_worlds,
)
from nmp_train.data import simulated as simulated_module
from nmp_train.data.augment import coloured, mirrored, moved, without
from nmp_train.data.simulated import nearby
from nmp_train.geography import APART_M, find_sites, make_real_world
from nmp_train.recordings import read_samples, weather_of
from nmp_train.sim.dataset import Drive, write_dataset
from nmp_train.sim.drive import Trajectory, load_trajectories, sample_routes, second_pass
from nmp_train.world import World, make_world

NET = NetworkConfig(
    backbone_stages=2, input_width=64, input_height=32, neck_channels=8, bev_channels=16, layer_resolution=0.3
)
CONFIG = TrainConfig(workers=0, supersample=1, network=NET)
CPU = torch.device("cpu")
SHARED = Path(__file__).parents[2] / "shared" / "real"
BOSTON = "boston-seaport"


# ---------------------------------------------------------------------------------- which frames make a group


def streets(counts: Sequence[int], frames: int = 8, gap_m: float = 200.0) -> Places:
    """Parallel streets; street k is driven ``counts[k]`` times, a day apart, in steps of 5 m and half a second."""
    place, xy, scene, time = [], [], [], []
    for street, passes in enumerate(counts):
        for day in range(passes):
            scene += [len(set(scene))] * frames
            place += [street % 2] * frames
            xy += [(5.0 * k, gap_m * street + day) for k in range(frames)]
            time += [86400.0 * day + 0.5 * k for k in range(frames)]
    return Places(np.array(place), np.array(xy), np.array(scene), np.array(time))


def test_a_group_is_a_frame_and_earlier_ones_near_it() -> None:
    places = streets([4, 1])
    rng = np.random.default_rng(0)
    target, radius = 3 * 8 + 6, 20.0
    drives = []
    for _ in range(200):
        found = places.group(rng, target, 4, radius)
        assert found is not None and found[-1] == target and len(set(found)) == 4
        assert (np.diff(places.time_s[found]) > 0).all() and (places.place[found] == 0).all()
        assert np.hypot(*(places.xy[found] - places.xy[target]).T).max() <= radius
        drives.append(tuple(places.scene[found]))
    pieces = [d for d in drives if set(d) == {3}]
    others = [d for d in drives if d[-1] == 3 and 3 not in d[:-1]]
    assert len(pieces) > 30 and len(others) > 50 and len(pieces) + len(others) < 200
    # the first drive of a street has nothing before it
    assert places.group(rng, 0, 4, radius) is None
    assert places.padded_group(2, 5, radius).tolist() == [0, 0, 0, 1, 2]
    assert places.padded_group(2, 1, radius).tolist() == [2]
    # a frame of another city at the same place is not near
    twin = replace(places, place=np.arange(len(places.place)) % 2)
    assert set(twin.earlier(target, radius) % 2) == {target % 2}


def test_targets_without_a_past_are_drawn_anew() -> None:
    places = streets([1, 1, 3])
    targets = Targets(places, StageConfig(group=6, radius_m=12.0), 5)
    for index in range(40):
        found = targets.group(targets.generator(index), index)
        assert found.shape == (6,) and (np.diff(places.time_s[found]) > 0).all()
    # where no frame has enough, the first is repeated
    few = Targets(streets([1], frames=2), StageConfig(group=3), 5)
    assert {tuple(few.group(few.generator(i), i)) for i in range(20)} <= {(0, 0, 1), (0, 0, 0), (1, 1, 1)}


def test_groups_that_end_where_something_changed() -> None:
    places = streets([1, 4, 3])
    nowhere = np.full(len(places.time_s), np.inf)
    # the second street changes between its second drive and its third
    second = (places.scene >= 1) & (places.scene <= 4)
    changed_s = np.where(second, places.time_s[places.scene == 3].min(), nowhere)
    changing = replace(places, changed_s=changed_s)
    assert set(places.scene[changing.changed]) == {3, 4} and not len(places.changed)
    targets = Targets(changing, StageConfig(group=5, radius_m=12.0, changed_groups=1.0), 5)
    before = []
    for index in range(100):
        found = targets.group(targets.generator(index), index)
        assert found.shape == (5,) and (np.diff(places.time_s[found]) > 0).all()
        assert found[-1] in changing.changed
        before.append(int((places.time_s[found] < changed_s[found[-1]]).sum()))
    assert set(before) == {1, 2, 3, 4}
    # some groups, as many as asked for; elsewhere and without changes all is as it was
    some = Targets(changing, StageConfig(group=5, radius_m=12.0, changed_groups=0.3), 5)
    drawn = [some.group(some.generator(i), i) for i in range(300)]
    assert 75 < sum((places.time_s[f] < changed_s[f]).any() and f[-1] in changing.changed for f in drawn) < 180
    plain, none = (Targets(places, StageConfig(group=5, radius_m=12.0, changed_groups=s), 5) for s in (0.0, 0.3))
    assert plain.group(plain.generator(1), 1).shape == none.group(none.generator(1), 1).shape
    # a place that nobody passed before it changed has no such group
    late = replace(places, changed_s=np.where(second, 0.0, nowhere))
    rng = np.random.default_rng(0)
    assert late.changed_group(rng, int(late.changed[-1]), 5, 12.0) is None


def test_scenes_that_overlap_share_a_lane_and_lanes_are_balanced(caplog: pytest.LogCaptureFixture) -> None:
    counts = [3, 1, 2, 2, 1, 1, 2]
    places = streets(counts)
    street = places.streets()
    expected = np.repeat(np.arange(len(counts)), counts)
    assert all((street[a] == street[b]) == (expected[a] == expected[b]) for a in range(12) for b in range(12))
    lanes = geographic_lanes(places, 4)
    assert all(len({*lanes[expected == k]}) == 1 for k in range(len(counts)))
    assert np.bincount(lanes).tolist() == [3, 3, 3, 3]
    assert not caplog.records
    geographic_lanes(streets([6, 1, 1]), 2)
    assert "1 of 3 streets hold more" in caplog.text and "the biggest 48, 1.5 times" in caplog.text
    with pytest.raises(NmpError, match="3 streets do not overlap, too few for 4 groups a step"):
        geographic_lanes(streets([6, 1, 1]), 4)


@pytest.mark.parametrize("geographic", [True, False])
def test_the_number_of_ranks_changes_nothing(geographic: bool) -> None:
    places = streets([3, 1, 2, 2, 1, 1, 2])
    stage = StageConfig(group=1, batch=4)
    targets = Targets(places, stage, 9, geographic=geographic)

    def drawn(ranks: int) -> list[list[int]]:
        """The frames of each step, and that no street is on two ranks."""
        steps: list[list[int]] = [[] for _ in range(40)]
        homes: dict[int, set[int]] = {}
        for rank in range(ranks):
            for step, indices in enumerate(StepSampler(160, 4, rank=rank, ranks=ranks)):
                for index in indices:
                    frame = int(targets.group(targets.generator(index), index)[-1])
                    steps[step].append(frame)
                    homes.setdefault(int(places.streets()[places.scene[frame]]), set()).add(rank)
        if geographic:
            assert all(len(ranks_of) == 1 for ranks_of in homes.values())
        return [sorted(step) for step in steps]

    one = drawn(1)
    assert one == drawn(2) == drawn(4)
    everything = sorted(frame for step in one for frame in step)
    if geographic:  # 40 steps of 4 lanes of 24 frames: all come once before any comes a third time
        assert set(everything) == set(range(96)) and max(np.bincount(everything)) == 2


def test_a_run_that_goes_on_draws_what_it_would_have_drawn() -> None:
    whole = list(StepSampler(26, 4, rank=1, ranks=2))
    assert len(whole) == 6 and whole[0] == [1, 3]
    assert list(StepSampler(26, 4, rank=1, ranks=2, start=12)) == whole[3:]
    assert list(StepSampler(3, 4)) == [[0, 1, 2]] and len(StepSampler(3, 4)) == 1
    with pytest.raises(NmpError, match="4 groups a step cannot be shared by 3"):
        StepSampler(26, 4, ranks=3)
    with pytest.raises(NmpError, match="cannot go on at group 6"):
        StepSampler(26, 4, start=6)


# ------------------------------------------------------------------------------------------------- simulated


@pytest.fixture(scope="module")
def world() -> World:
    """A city that changes between its drives."""
    return make_world(1001, changes=2, size_m=220.0, drives=4, duration_s=5.0, texel_m=1.0)


def frame_of(world: World, name: str) -> NDArray[np.float64]:
    _, drive, time = name.split("/")
    rows = world.frames[world.frames[:, 3] == int(drive.split()[1])]
    return np.asarray(rows[np.abs(rows[:, 4] - float(time.split()[0])).argmin()])


def test_a_changing_world_is_shown_and_labelled_as_each_drive_finds_it(world: World) -> None:
    assert len(world.states) == 2 and (np.diff(world.started_s) > 0).all() and (np.diff(world.times_s) > 0).all()
    states = [world.state_of(d) for d in range(len(world.drives))]
    assert states == sorted(states) and set(states) == {0, 1}
    assert not torch.equal(world.states[0].surface.texels, world.states[1].surface.texels)
    source = SimulatedSource([world, world], CONFIG, CPU)
    stage, differs = StageConfig(group=3, batch=2), 0
    for group in source.part(1).loader(stage, seed=4, length=8):
        assert group.drawn is not None
        for b in range(2):
            for t in range(3):
                frame = frame_of(world, group.names[3 * b + t])
                x, y, yaw = frame[:3]
                state = world.state_of(int(frame[3]))
                assert int(group.drawn.city[b, t]) == 2 + state
                truth = rasterize(world.states[state].city, x, y, yaw, NET.layer_grid)
                np.testing.assert_array_equal(group.truth[b, t].numpy(), truth)
                before = rasterize(world.states[0].city, x, y, yaw, NET.layer_grid)
                differs += bool((truth != before).any())
                last = frame_of(world, group.names[3 * b + 2])
                np.testing.assert_allclose(group.pose[b, t], [x - last[0], y - last[1], yaw], atol=1e-4)
    assert differs, "no frame of the test shows a change"
    # groups that are asked to: of the city as it was first, and of a place that is another now at last
    differs = 0
    for group in source.loader(replace(stage, radius_m=100.0, changed_groups=1.0), seed=4, length=8):
        assert group.drawn is not None
        cities = group.drawn.city
        assert (cities[:, 0] % 2 == 0).all() and (cities[:, -1] % 2 == 1).all()
        for b in range(2):
            x, y, yaw = frame_of(world, group.names[3 * b + 2])[:3]
            before, after = (rasterize(state.city, x, y, yaw, NET.layer_grid) for state in world.states)
            differs += bool((before != after).any())
    assert differs == 8


def test_frames_of_one_drive_share_their_weather_and_batches_come_again(world: World) -> None:
    source = SimulatedSource([world], CONFIG, CPU)
    stage = StageConfig(group=3, batch=2)
    group = next(iter(source.loader(stage, seed=1, length=4)))
    drawn = group.drawn
    assert drawn is not None
    sun = drawn.conditions[0]
    for b in range(2):
        for i in range(3):
            for j in range(i):
                same = bool(group.drive[b, i] == group.drive[b, j])
                assert torch.equal(sun[b, i], sun[b, j]) == same
    first = source.batch(group)
    assert first.images.shape == (6, 6, 3, 32, 64) and first.truth.shape == (6, 3, 100, 200)
    assert first.instance is None and len(first.names) == len(first.weather) == len(first.labels) == 6
    assert torch.equal(first.images, source.batch(group).images)
    halves = [g for rank in (0, 1) for g in source.loader(stage, seed=1, length=4, rank=rank, ranks=2, start=2)]
    whole = next(iter(source.loader(stage, seed=1, length=4, start=2)))
    assert [h.names for h in halves] == [whole.names[:3], whole.names[3:]]
    assert torch.equal(torch.cat([h.seed for h in halves]), whole.seed)


def test_a_drive_that_is_made_again_meets_others_on_the_same_streets(world: World) -> None:
    again = make_world(1001, changes=2, size_m=220.0, drives=4, duration_s=5.0, texel_m=1.0, trips=2)
    np.testing.assert_array_equal(again.frames, world.frames)
    x, y, _, drive, time = world.frames[3]
    first, same, other = (
        nearby(w, int(drive), float(time), np.array([x, y]), trip).centre
        for w, trip in ((world, 0), (again, 0), (again, 1))
    )
    np.testing.assert_array_equal(first, same)
    places = [{tuple(p) for p in found.round(3).tolist()} for found in (first, other)]
    assert places[0] & places[1], "buildings and trees stay"
    assert len(places[0] - places[1]) > 5 and len(places[1] - places[0]) > 5, "those on the road do not"


def test_vector_truth_comes_with_vector_heads(world: World) -> None:
    config = replace(CONFIG, network=replace(NET, vector_heads=True))
    batch = SimulatedSource([world], config, CPU)
    group = next(iter(batch.loader(StageConfig(batch=1), seed=1, length=1)))
    assert group.instance is not None and group.direction is not None
    assert torch.equal(group.instance > 0, group.truth > 0) and group.direction.shape == (1, 1, 2, 100, 200)


def test_a_turned_ego_frame_agrees_with_its_images(world: World) -> None:
    """A place of the map is seen at the same pixel, whichever way the axes of the car are laid."""
    config = replace(CONFIG, augment=AugmentConfig(turn_rad=0.5))
    stage = StageConfig(group=2, batch=1)
    turned = next(iter(SimulatedSource([world], config, CPU).loader(stage, seed=3, length=1)))
    straight = next(iter(SimulatedSource([world], CONFIG, CPU).loader(stage, seed=3, length=1)))
    angle = (turned.pose - straight.pose)[0, :, 2]
    assert turned.names == straight.names and float(angle.abs().min()) > 0.01
    point = np.array([4.0, 9.0, 0.3])
    for t in range(2):
        frame = frame_of(world, turned.names[t])
        city = world.states[world.state_of(int(frame[3]))].city
        yaw = float(turned.pose[0, t, 2])
        expected = rasterize(city, frame[0], frame[1], yaw, NET.layer_grid)
        assert (turned.truth[0, t].numpy() != expected).mean() < 1e-3  # the yaw was rounded to float32
        found = []
        for group in (straight, turned):
            pose = group.pose[0, t].numpy()
            c, s = np.cos(pose[2]), np.sin(pose[2])
            ahead = np.array([c * point[0] + s * point[1], -s * point[0] + c * point[1], point[2], 1.0])
            found.append(group.pixel_from_base[0, t].numpy() @ ahead)
        np.testing.assert_allclose(found[0], found[1], atol=1e-4)


def test_the_slope_of_a_frame_moves_what_is_seen(world: World) -> None:
    """A place on the ground is seen where the network is told that another place is: that of the sloping road."""
    config = replace(CONFIG, augment=AugmentConfig(turn_rad=0.5))
    compared = 0
    for group in SimulatedSource([world], config, CPU).loader(StageConfig(group=4, batch=1), seed=6, length=3):
        assert group.drawn is not None
        for t in range(4):
            slope = group.slope[0, t].double()
            x, y, yaw = frame_of(world, group.names[t])[:3]
            turned = float(group.pose[0, t, 2]) - yaw
            for n in range(6):
                camera = group.drawn.map_from_camera[0, t, n].double()
                for place in ((14.0, 3.0), (-15.0, -4.0), (3.0, 12.0), (-2.0, -13.0), (9.0, 10.0)):
                    q = torch.tensor(place, dtype=torch.float64)
                    angle = yaw + turned  # from the turned ego frame to the map's axes
                    c, s = np.cos(angle), np.sin(angle)
                    ground = torch.tensor([c * q[0] - s * q[1], s * q[0] + c * q[1], 0.0, 1.0], dtype=torch.float64)
                    ray = torch.linalg.inv(camera) @ ground
                    pixel = group.drawn.intrinsics[0, t, n].double() @ ray[:3]
                    u, v = (pixel[0] / pixel[2] + 0.5) / NET.input_width, (pixel[1] / pixel[2] + 0.5) / NET.input_height
                    if pixel[2] < 1 or not (0 < u < 1):
                        continue
                    a = group.pixel_from_base[0, t, n].double()
                    # the place at z = 0 that the told projection has at this pixel
                    rows = torch.stack([a[0] - u * a[2], a[1] - v * a[2]])
                    p = torch.linalg.solve(rows[:, :2], -rows[:, 3])
                    expected = q * (q @ slope)
                    assert float((p - q - expected).norm()) < 0.25 * float(expected.norm()) + 0.06
                    compared += 1
    assert compared > 30
    assert float(group.slope.abs().max()) > 0.001


def test_worlds_of_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, float, int]] = []

    def note(seed: int, difficulty: float, changes: int, **_: Any) -> tuple[int, float, int]:
        made.append((seed, difficulty, changes))
        return made[-1]

    monkeypatch.setattr(simulated_module, "make_world", note)
    config = WorldsConfig(seeds=4, first_seed=7, difficulties=(0.5, 1.0), changed_share=0.5)
    make_worlds(config, 0)
    assert [m[:2] for m in made] == [(7, 0.5), (8, 1.0), (9, 0.5), (10, 1.0)]
    assert [m[2] > 0 for m in made] == [False, True, False, True]
    made.clear()
    make_worlds(config, 0, held_out=True)
    assert [m[:2] for m in made] == [(s, d) for d in (0.5, 1.0) for s in (7, 8, 9, 10)]
    with pytest.raises(NmpError, match="no cities to make"):
        make_worlds(WorldsConfig(seeds=0), 2)


# ------------------------------------------------------------------------------------------- real geography


def random_drives(count: int) -> list[Trajectory]:
    rng = np.random.default_rng(1)
    out = []
    for k in range(count):
        start, yaw = rng.uniform(0, 900, 2), rng.uniform(0, 2 * np.pi)
        s = np.arange(0, 200, 2.0)
        poses = np.column_stack([start[0] + s * np.cos(yaw), start[1] + s * np.sin(yaw), np.full(len(s), yaw)])
        out.append(Trajectory((BOSTON, "singapore-queenstown")[k % 2], "2018-08-01", s / 8, poses, f"scene-{k:04d}"))
    return out


def test_held_out_sites_share_no_ground_with_training() -> None:
    drives = random_drives(60)
    training, held_out = find_sites(drives)
    assert {s.location for s in held_out} == {s.location for s in training} == {BOSTON, "singapore-queenstown"}
    for site in (*training, *held_out):
        x0, y0, x1, y1 = site.bounds
        xy = np.concatenate([d.poses_xyyaw[:, :2] for d in site.drives])
        assert (xy > [x0 + 79, y0 + 79]).all() and (xy < [x1 - 79, y1 - 79]).all()
    for left in held_out:
        for site in training:
            if left.location == site.location:
                here, there = (
                    shapely.MultiPoint(np.concatenate([d.poses_xyyaw[:, :2] for d in s.drives])) for s in (left, site)
                )
                assert here.distance(there) > APART_M
    # Where labels reach further, more is left out.
    fewer, same = find_sites(drives, reach_m=70.0)
    assert [s.name for s in same] == [s.name for s in held_out]
    assert sum(s.frames for s in fewer) < sum(s.frames for s in training)
    poses = [tuple(p) for s in (*training, *held_out) for d in s.drives for p in d.poses_xyyaw.round(6)]
    assert len(poses) == len(set(poses)), "a frame is in two sites"
    with pytest.raises(NmpError, match="fill 1 sites"):
        find_sites(drives[:1])


def test_images_do_not_depend_on_who_else_is_in_the_batch(world: World) -> None:
    source = SimulatedSource([world], CONFIG, CPU)
    stage = StageConfig(batch=2, group=2)
    together = source.batch(next(iter(source.loader(stage, seed=5, length=2)))).images.unflatten(0, (2, 2))
    for rank in range(2):
        alone = source.batch(next(iter(source.loader(stage, seed=5, length=2, rank=rank, ranks=2)))).images
        torch.testing.assert_close(alone, together[rank], atol=0, rtol=0)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real maps")
def test_a_world_of_a_real_city_renders() -> None:
    _, held_out = find_sites(load_trajectories(SHARED / "val_trajectories.json"))
    site = next(s for s in held_out if s.location == "singapore-queenstown")
    world = make_real_world(SHARED / "geography", replace(site, drives=site.drives[:1]), texel_m=1.0)
    group = next(iter(SimulatedSource([world], CONFIG, CPU).loader(StageConfig(batch=2), seed=1, length=2)))
    batch = SimulatedSource([world], CONFIG, CPU).batch(group)
    assert float(batch.images.float().std()) > 10 and batch.truth[:, 2].any()
    frame = frame_of(world, batch.names[0])
    whole = CityMap.load(SHARED / "geography", site.location)  # the world has a part of it
    expected = rasterize(whole, *frame[:3].tolist(), grid=NET.layer_grid)
    assert (batch.truth[0].numpy() != expected).mean() < 0.002


# -------------------------------------------------------------------------------------------------- recorded


def _painted(*args: Any, size: tuple[int, int], seed: int, **_: Any) -> NDArray[np.uint8]:
    return np.full((6, size[1], size[0], 3), 60 + seed % 7 * 20, np.uint8)


@pytest.fixture(scope="module")
def recorded(
    tmp_path_factory: pytest.TempPathFactory, boston: dict[str, Any]
) -> tuple[Path, list[Change], dict[str, Any]]:
    """A data set of one street, driven on three days, with changes of the map on the way."""
    route = next(r for r in sample_routes(boston, 2, 6, 2.0, 10.0) if np.ptp(r.poses_xyyaw[:, 0]) > 2)
    drives = [replace(second_pass(route, k), date=f"2018-08-{1 + 9 * k:02d}") for k in range(3)]
    # The line of paint next to the road is removed between the first day and the second.
    here = shapely.Point(*route.poses_xyyaw[0, :2])
    nodes = {n["token"]: (n["x"], n["y"]) for n in boston["node"]}
    points = {r["token"]: [nodes[t] for t in r["node_tokens"]] for r in boston["line"]}
    lines = {r["token"]: shapely.LineString(points[r["line_token"]]) for r in boston["lane_divider"]}
    token = min(lines, key=lambda t: lines[t].distance(here))
    removed = Shape.of("lane_divider", lines[token], token)
    changes = [Change("2018-08-05", "dividers_moved", BOSTON, here.x, here.y, (removed,), ())]
    out = tmp_path_factory.mktemp("recorded") / "data"
    write_dataset(
        out,
        [Drive(d, density=0.0, name=f"scene-{k}") for k, d in enumerate(drives)],
        {BOSTON: boston},
        render=_painted,
        image_size=(160, 90),
        changes={BOSTON: changes},
        progress=False,
    )
    # A city lies at some height above the map's datum.
    path = out / "v1.0-mini" / "ego_pose.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([{**r, "translation": [*r["translation"][:2], 7.5]} for r in rows]))
    return out, changes, boston


def test_recorded_frames_are_those_of_the_mapper(recorded: tuple[Path, list[Change], dict[str, Any]]) -> None:
    """Images, projections and truth of a group are what the mapper and the evaluation make of the same keyframes."""
    root, changes, boston = recorded
    source = RecordedSource(root, "v1.0-mini", None, CONFIG, CPU)
    samples = {s.token: s for s in source.samples}
    changed = 0
    for group in source.loader(StageConfig(group=3, batch=2, radius_m=20.0), seed=2, length=6):
        batch = source.batch(group)
        assert batch.images.shape == (6, 6, 3, 32, 64) and batch.pose.shape == (2, 3, 3)
        for b in range(2):
            stamps = [samples[name].anchor.stamp_ns for name in batch.names[3 * b : 3 * b + 3]]
            assert stamps == sorted(set(stamps))
        for k, name in enumerate(batch.names):
            sample = samples[name]
            shots = tuple(CameraShot(s.camera, s.stamp_ns, s.path.read_bytes(), s.map_from_base) for s in sample.shots)
            frame = Frame(sample.anchor.stamp_ns, sample.location, sample.anchor.map_from_base, shots)
            images, projection, _ = network_input(frame, NET)
            assert torch.equal(batch.images[k], images[0])
            torch.testing.assert_close(batch.pixel_from_base[k], projection[0], rtol=1e-4, atol=1e-4)
            x, y, yaw = sample.anchor.translation[0], sample.anchor.translation[1], float(batch.pose[k // 3, k % 3, 2])
            date = local_date(BOSTON, sample.anchor.stamp_ns)
            expected = rasterize(
                CityMap.from_tables(apply_changes(boston, changes, date), BOSTON), x, y, yaw, NET.layer_grid
            )
            assert (batch.truth[k].numpy() != expected).mean() < 1e-3  # the yaw was rounded to float32
            unchanged = rasterize(CityMap.from_tables(boston, BOSTON), x, y, yaw, NET.layer_grid)
            changed += bool((expected != unchanged).any())
    assert changed, "no frame of the test shows the change"


def test_broken_data_sets_are_named(recorded: tuple[Path, list[Change], dict[str, Any]], tmp_path: Path) -> None:
    root = recorded[0]
    stage = StageConfig(group=1, batch=4)

    def copy(name: str) -> Path:
        out = tmp_path / name
        (out / "v1.0-mini").mkdir(parents=True)
        for path in (root / "v1.0-mini").glob("*.json"):
            (out / "v1.0-mini" / path.name).symlink_to(path)
        (out / "maps").symlink_to(root / "maps")
        (out / "samples").symlink_to(root / "samples")
        return out

    with pytest.raises(NmpError, match="no tables 'v2'"):
        read_samples(root, "v2")
    with pytest.raises(NmpError, match="has no scene-9999"):
        read_samples(root, "v1.0-mini", ["scene-1", "scene-9999"])
    assert {s.scene for s in read_samples(root, "v1.0-mini", ["scene-2"])} == {"scene-2"}
    bad = copy("table")
    (bad / "v1.0-mini" / "ego_pose.json").unlink()
    with pytest.raises(NmpError, match=r"cannot read .*ego_pose.json"):
        read_samples(bad, "v1.0-mini")
    (bad / "v1.0-mini" / "ego_pose.json").write_text(json.dumps([{"token": 3}]))
    with pytest.raises(NmpError, match="does not hold the tables"):
        read_samples(bad, "v1.0-mini")
    bad = copy("map")
    (bad / "maps").unlink()
    with pytest.raises(NmpError, match="no map expansion for boston-seaport"):
        RecordedSource(bad, "v1.0-mini", None, CONFIG, CPU)
    bad = copy("image")
    (bad / "samples").unlink()
    for camera in CAMERAS:
        (bad / "samples" / camera.upper()).mkdir(parents=True)
        for path in (root / "samples" / camera.upper()).iterdir():
            (bad / "samples" / camera.upper() / path.name).write_bytes(path.read_bytes()[:300])
    # also from another process, where errors come with a traceback
    for workers in (0, 1):
        source = RecordedSource(bad, "v1.0-mini", None, replace(CONFIG, workers=workers), CPU)
        with pytest.raises(NmpError, match=r"\Asample \w+: .*CAM_FRONT.*jpg is damaged \(.*unpack it again\Z"):
            next(iter(source.loader(stage, seed=1, length=4)))
    next((bad / "samples" / "CAM_FRONT").iterdir()).unlink()
    source = RecordedSource(bad, "v1.0-mini", None, CONFIG, CPU)
    with pytest.raises(NmpError, match=r"sample \w+: cannot read .*CAM_FRONT.*No such file|is damaged"):
        for _ in source.loader(stage, seed=1, length=40):
            pass


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real frames")
def test_real_keyframes_load() -> None:
    source = RecordedSource(SHARED / "frames", "v1.0-mini", None, replace(CONFIG, sampler="geographic"), CPU)
    group = next(iter(source.loader(StageConfig(group=1, batch=2), seed=1, length=2)))
    batch = source.batch(group)
    assert sorted(batch.names) == sorted(s.token for s in source.samples) and float(batch.images.float().std()) > 20
    assert batch.truth.flatten(1).any(dim=1).all()


def test_weather_words() -> None:
    words = ("Night, after rain", "Trains", "", "rain")
    assert [weather_of(w) for w in words] == ["night rain", "day", "day", "rain"]


# ---------------------------------------------------------------------------------------------- augmentation


def camera_batch() -> tuple[Batch, Tensor, Tensor]:
    """Two groups of two frames with a bright spot in each image where its own point is seen.

    Returns the batch, the points [F, 6, 3] (m) and a mask of visible ones.
    """
    rng = torch.Generator().manual_seed(3)
    points = torch.zeros(4, 6, 3)
    projection = torch.zeros(4, 6, 3, 4)
    images = torch.zeros(4, 6, 3, 48, 96)
    v, u = torch.meshgrid((torch.arange(48) + 0.5) / 48, (torch.arange(96) + 0.5) / 96, indexing="ij")
    for n, degrees in enumerate((0.0, -55.0, -110.0, 180.0, 110.0, 55.0)):
        yaw = np.radians(degrees)
        forward, left = torch.tensor([np.cos(yaw), np.sin(yaw), 0.0]), torch.tensor([-np.sin(yaw), np.cos(yaw), 0.0])
        rotation = torch.stack([-left, torch.tensor([0.0, 0.0, -1.0]), forward]).float()
        k = torch.tensor([[0.8, 0.0, 0.5], [0.0, 1.6, 0.5], [0.0, 0.0, 1.0]])
        for f in range(4):
            side = torch.rand(2, generator=rng) * 2 - 1
            points[f, n] = 10 * forward + 3 * side[0] * left + torch.tensor([0.0, 0.0, 1.5 + float(side[1])])
            shift = -rotation @ torch.tensor([0.5, 0.0, 1.5])
            projection[f, n] = k @ torch.cat([rotation, shift[:, None]], dim=1)
            x, y, z = projection[f, n] @ torch.cat([points[f, n], torch.ones(1)])
            images[f, n] = 255 * torch.exp(-(((u - x / z) * 96) ** 2 + ((v - y / z) * 48) ** 2) / 18)
    truth = (torch.rand(4, 3, 20, 40, generator=rng) < 0.2).to(torch.uint8)
    batch = Batch(
        images=images.round().to(torch.uint8),
        pixel_from_base=projection,
        present=torch.ones(4, 6),
        pose=torch.randn(2, 2, 3, generator=rng),
        slope=torch.randn(2, 2, 2, generator=rng),
        drive=torch.zeros(2, 2, dtype=torch.int64),
        seeds=torch.tensor([5, 6]),
        truth=truth,
        instance=truth * 3,
        direction=torch.arange(37).repeat(44)[: 2 * 20 * 40].reshape(1, 2, 20, 40).repeat(4, 1, 1, 1).to(torch.uint8),
        weather=["day"] * 4,
        labels=[""] * 4,
        names=[""] * 4,
    )
    return batch, points, torch.ones(4, 6)


def spot(image: Tensor) -> Tensor:
    """Where an image [3, H, W] is bright: u, v in 0..1."""
    weight = image[0].double()
    h, w = weight.shape
    rows, cols = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (h, w))
    return torch.stack([(weight.sum(0) * cols).sum(), (weight.sum(1) * rows).sum()]) / weight.sum()


def seen(projection: Tensor, point: Tensor) -> Tensor:
    x, y, z = projection.double() @ torch.cat([point.double(), torch.ones(1, dtype=torch.float64)])
    return torch.stack([x / z, y / z])


def test_a_mirrored_world_is_seen_by_mirrored_cameras() -> None:
    batch, points, _ = camera_batch()
    batch = without(batch, torch.tensor([[False, True, False, False, False, False]]).expand(4, 6))
    out = mirrored(batch, torch.tensor([False, True]))
    swap = [0, 5, 4, 3, 2, 1]
    for n in range(6):
        if n != 5:  # what lacked an image on the right lacks one on the left
            mirror = points[3, swap[n]] * torch.tensor([1.0, -1.0, 1.0])
            torch.testing.assert_close(
                spot(out.images[3, n]), seen(out.pixel_from_base[3, n], mirror), atol=2e-3, rtol=0
            )
    assert out.present[2:].tolist() == [[1, 1, 1, 1, 1, 0]] * 2
    assert torch.equal(out.images[:2], batch.images[:2]) and torch.equal(out.pose[0], batch.pose[0])
    torch.testing.assert_close(out.pose[1], batch.pose[1] * torch.tensor([1.0, -1.0, -1.0]))
    assert torch.equal(out.truth[2:], batch.truth[2:].flip(-2)) and torch.equal(out.truth[:2], batch.truth[:2])
    assert out.instance is not None and out.direction is not None and batch.direction is not None
    assert torch.equal(out.instance, out.truth * 3)
    # the direction at 10 (k - 1) degrees becomes its negative
    before, after = batch.direction[3].flip(-2).long(), out.direction[3].long()
    assert torch.equal(after == 0, before == 0)
    assert torch.equal(
        ((after - 1 + before - 1) % 36)[before > 0], torch.zeros(int((before > 0).sum()), dtype=torch.long)
    )
    # a front left camera looks to the front left again
    centre = torch.tensor([0.5, 0.5, 1.0])
    before_ray, after_ray = (
        torch.linalg.solve(p[3, 5, :, :3], centre) for p in (batch.pixel_from_base, out.pixel_from_base)
    )
    torch.testing.assert_close(before_ray, after_ray, atol=1e-5, rtol=1e-5)
    twice = mirrored(out, torch.tensor([False, True]))
    for name in ("images", "pixel_from_base", "present", "pose", "truth", "direction"):
        torch.testing.assert_close(getattr(twice, name), getattr(batch, name))


def test_zoomed_and_shifted_images_keep_to_their_projection() -> None:
    batch, points, _ = camera_batch()
    scale = torch.linspace(0.8, 1.2, 24).reshape(4, 6)
    shift = torch.stack([torch.linspace(-0.08, 0.08, 24), torch.linspace(0.05, -0.05, 24)], dim=-1).reshape(4, 6, 2)
    out = moved(batch, scale, shift)
    for f in range(4):
        for n in range(6):
            torch.testing.assert_close(
                spot(out.images[f, n]), seen(out.pixel_from_base[f, n], points[f, n]), atol=3e-3, rtol=0
            )
    same = moved(batch, torch.ones(4, 6), torch.zeros(4, 6, 2))
    assert int((same.images.int() - batch.images.int()).abs().max()) <= 1
    torch.testing.assert_close(same.pixel_from_base, batch.pixel_from_base)


def test_colours_and_lost_cameras() -> None:
    batch, _, _ = camera_batch()
    assert torch.equal(coloured(batch.images, torch.ones(4, 3)), batch.images)
    flat = torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None].expand(1, 1, 3, 4, 4)
    assert coloured(flat, torch.tensor([[1.1, 1.0, 1.0]]))[0, 0, :, 0, 0].tolist() == [220, 110, 55]
    grey = coloured(flat, torch.tensor([[1.0, 1.0, 0.0]]))[0, 0, :, 0, 0]
    assert grey.tolist() == [124] * 3
    config = AugmentConfig(zoom=0.2, shift=0.1, colour=0.3, drop_camera=1.0, mirror=0.5)
    out = augment(batch, config)
    assert out.present.sum(dim=1).tolist() == [5.0] * 4
    assert torch.equal(out.images.flatten(2).any(dim=2), out.present > 0)
    assert augment(batch, AugmentConfig()).images is batch.images
    # each group has its own generator: alone it is changed as among others
    half = replace(
        batch,
        **{
            name: getattr(batch, name)[2:]
            for name in ("images", "pixel_from_base", "present", "truth", "instance", "direction")
        },
        pose=batch.pose[1:],
        seeds=batch.seeds[1:],
    )
    alone = augment(half, config)
    assert torch.equal(alone.images, out.images[2:]) and torch.equal(alone.pixel_from_base, out.pixel_from_base[2:])


def test_collating_keeps_what_is_absent_absent() -> None:
    def group(name: str) -> Group:
        one = torch.zeros(2, 3)
        return Group(one, one[:, 0].long(), torch.tensor(1), one, one, one, one, [name, name], ["day"] * 2, [""] * 2)

    batch = collate([group("a"), group("b")])
    assert batch.names == ["a", "a", "b", "b"] and batch.pose.shape == (2, 2, 3) and batch.seed.shape == (2,)
    assert batch.images is None and batch.drawn is None
