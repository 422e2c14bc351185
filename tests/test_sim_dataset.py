"""Simulated data sets: what the devkit sees of them."""

from __future__ import annotations

import dataclasses
import filecmp
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import shapely
from numpy.typing import NDArray
from shapely.geometry import MultiLineString, box

from nmp.changelog import Change, Shape, apply_changes, read_changes
from nmp.errors import NmpError
from nmp.frame import CAMERAS
from nmp.geometry import inverse, transform_from
from nmp_train.sim import dataset
from nmp_train.sim.boxes import Boxes
from nmp_train.sim.changes import draw_changes
from nmp_train.sim.dataset import Drive, write_dataset
from nmp_train.sim.drive import Trajectory, sample_routes, second_pass
from nmp_train.sim.mapjson import MapBuilder
from nmp_train.sim.rig import FIRING_OFFSET_MS, SAMPLE_STAMP_MS, nuscenes_rig

BOSTON = "boston-seaport"
SIZE = (160, 90)


def grey(
    intrinsics: NDArray[np.float64],
    map_from_camera: NDArray[np.float64],
    boxes: Boxes,
    *,
    size: tuple[int, int],
    weather: str,
    seed: int,
) -> NDArray[np.uint8]:
    assert intrinsics.shape == (6, 3, 3) and map_from_camera.shape == (6, 4, 4) and len(boxes)
    return np.full((6, size[1], size[0], 3), 60 + seed % 7 * 20, np.uint8)


@pytest.fixture(scope="module")
def city(boston: dict[str, Any]) -> dict[str, Any]:
    return boston


@pytest.fixture(scope="module")
def drives(city: dict[str, Any]) -> list[Drive]:
    routes = [r for r in sample_routes(city, 2, 6, 3.0, 10.0) if np.ptp(r.poses_xyyaw[:, 0]) > 2]
    return [Drive(routes[0]), Drive(second_pass(routes[0], 1), "night rain", density=1.4)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, city: dict[str, Any], drives: list[Drive]) -> Path:
    out = tmp_path_factory.mktemp("sim") / "data"
    return write_dataset(
        out, drives, {BOSTON: city}, render=grey, image_size=SIZE, sweeps=True, seed=3, render_scale=0.5, progress=False
    )


@pytest.fixture(scope="module")
def nusc(root: Path) -> Any:
    return pytest.importorskip("nuscenes.nuscenes").NuScenes("v1.0-mini", str(root), verbose=False)


def test_scenes_and_logs(nusc: Any) -> None:
    assert [s["name"] for s in nusc.scene] == ["scene-9000", "scene-9001"]
    assert "Night, Rain" in nusc.scene[1]["description"]
    assert "rain" not in nusc.scene[0]["description"].lower()
    assert {log["location"] for log in nusc.log} == {BOSTON} and len(nusc.log) == 2
    assert nusc.scene[0]["nbr_samples"] == 6
    assert nusc.get("log", nusc.scene[0]["log_token"])["map_token"] == nusc.map[0]["token"]


def test_samples_follow_each_other_every_half_second(nusc: Any) -> None:
    for scene in nusc.scene:
        stamps, token = [], scene["first_sample_token"]
        while token:
            sample = nusc.get("sample", token)
            stamps.append(sample["timestamp"])
            token = sample["next"]
        assert len(stamps) == scene["nbr_samples"]
        assert np.diff(stamps).tolist() == [500_000] * (len(stamps) - 1)


def test_cameras_fire_one_after_the_other(nusc: Any) -> None:
    for sample in nusc.sample:
        assert set(sample["data"]) == {c.upper() for c in CAMERAS}
        for channel, token in sample["data"].items():
            row = nusc.get("sample_data", token)
            late = (row["timestamp"] - sample["timestamp"]) / 1000
            assert late == pytest.approx(FIRING_OFFSET_MS[channel.lower()] - SAMPLE_STAMP_MS, abs=0.01)
            assert nusc.get("ego_pose", row["ego_pose_token"])["timestamp"] == row["timestamp"]
            assert str(row["timestamp"]) in row["filename"]


def test_sweeps_fill_the_time_between(nusc: Any) -> None:
    row = nusc.get("sample_data", nusc.sample[0]["data"]["CAM_FRONT"])
    stamps = [row["timestamp"]]
    while row["next"]:
        row = nusc.get("sample_data", row["next"])
        stamps.append(row["timestamp"])
    assert len(stamps) == 5 * 6 + 1
    assert np.abs(np.diff(stamps) - 1e6 / 12).max() < 2


def test_images_are_there(nusc: Any, root: Path) -> None:
    for row in nusc.sample_data:
        assert (row["width"], row["height"]) == SIZE
        assert (root / row["filename"]).is_file()
    assert cv2.imread(nusc.get_sample_data_path(nusc.sample[0]["data"]["CAM_BACK"])).shape == (90, 160, 3)


def test_ego_poses_follow_the_drive_and_tilt_a_little(nusc: Any, drives: list[Drive]) -> None:
    from pyquaternion import Quaternion

    first = nusc.scene[0]
    stamp0 = nusc.get("sample", first["first_sample_token"])["timestamp"] / 1e6 - SAMPLE_STAMP_MS / 1000
    tilts = []
    for row in nusc.sample_data:
        if nusc.get("sample", row["sample_token"])["scene_token"] != first["token"]:
            continue
        pose = nusc.get("ego_pose", row["ego_pose_token"])
        x, y, yaw = drives[0].trajectory.at(pose["timestamp"] / 1e6 - stamp0)
        assert pose["translation"] == pytest.approx([x, y, 0.0], abs=0.01)
        up = Quaternion(pose["rotation"]).rotation_matrix
        assert np.arctan2(up[1, 0], up[0, 0]) == pytest.approx(yaw, abs=0.01)
        tilts.append(np.degrees(np.arccos(up[2, 2])))
    assert 0.02 < np.mean(tilts) and np.max(tilts) < 2.5


def test_annotations(nusc: Any) -> None:
    assert nusc.sample_annotation
    for instance in nusc.instance:
        token, count = instance["first_annotation_token"], 0
        while token:
            row = nusc.get("sample_annotation", token)
            assert row["instance_token"] == instance["token"]
            token, count = row["next"], count + 1
        assert count == instance["nbr_annotations"]
    _, boxes, _ = nusc.get_sample_data(nusc.sample[0]["data"]["CAM_FRONT"])
    assert all(box.center[2] > 0 for box in boxes)


def test_devkit_renders_and_maps(nusc: Any, root: Path, tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from nuscenes.map_expansion.map_api import NuScenesMap

    nusc.render_sample_data(nusc.sample[0]["data"]["CAM_FRONT"], out_path=str(tmp_path / "view.png"), verbose=False)
    assert (tmp_path / "view.png").is_file()
    NuScenesMap(str(root), BOSTON)
    poses = np.array([nusc.get("ego_pose", r["ego_pose_token"])["translation"] for r in nusc.sample_data])
    assert nusc.map[0]["mask"].is_on_mask(poses[:, 0], poses[:, 1]).mean() > 0.95


def test_same_seed_same_tables(root: Path, city: dict[str, Any], drives: list[Drive], tmp_path: Path) -> None:
    again = write_dataset(
        tmp_path / "b",
        drives,
        {BOSTON: city},
        render={BOSTON: grey},
        image_size=SIZE,
        sweeps=True,
        seed=3,
        render_scale=0.5,
        progress=False,
    )
    for table in (root / "v1.0-mini").iterdir():
        assert table.read_bytes() == (again / "v1.0-mini" / table.name).read_bytes()


def test_a_failed_run_leaves_no_data_set(city: dict[str, Any], drives: list[Drive], tmp_path: Path) -> None:
    def broken(*args: Any, **kwargs: Any) -> NDArray[np.uint8]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        write_dataset(tmp_path / "c", drives, {BOSTON: city}, render=broken, image_size=SIZE, progress=False)
    assert not list(tmp_path.iterdir())


def test_user_errors(city: dict[str, Any], drives: list[Drive], root: Path, tmp_path: Path) -> None:
    with pytest.raises(NmpError, match="exists already"):
        write_dataset(root, drives, {BOSTON: city}, render=grey)
    with pytest.raises(NmpError, match="no map for location"):
        write_dataset(tmp_path / "d", drives, {}, render=grey)
    with pytest.raises(NmpError, match="no drives"):
        write_dataset(tmp_path / "d", [], {}, render=grey)
    with pytest.raises(NmpError, match="nothing draws the drives in boston-seaport"):
        write_dataset(tmp_path / "d", drives, {BOSTON: city})
    with pytest.raises(NmpError, match="unknown vehicle"):
        nuscenes_rig("n001")
    with pytest.raises(NmpError, match="two or more poses"):
        Trajectory(BOSTON, "2018-01-01", np.zeros(1), np.zeros((1, 3)))


# ---------------------------------------------------------------------- calibration, changes, splits, single scenes


def _rigs(nusc: Any) -> dict[str, dict[str, Any]]:
    """Calibrated sensors by logfile and channel."""
    out: dict[str, dict[str, Any]] = {}
    for row in nusc.sample_data:
        scene = nusc.get("scene", nusc.get("sample", row["sample_token"])["scene_token"])
        rig = out.setdefault(nusc.get("log", scene["log_token"])["logfile"], {})
        calibration = nusc.get("calibrated_sensor", row["calibrated_sensor_token"])
        assert rig.setdefault(row["channel"], calibration) == calibration
    return out


def test_every_log_is_calibrated_anew(nusc: Any, city: dict[str, Any], drives: list[Drive], tmp_path: Path) -> None:
    from nuscenes.nuscenes import NuScenes

    one, two = _rigs(nusc).values()
    assert len(nusc.calibrated_sensor) == 12 and len(nusc.sensor) == 6
    for channel, camera in zip(one, nuscenes_rig("n008"), strict=True):
        a, b = one[channel], two[channel]
        assert a["token"] != b["token"] and a["sensor_token"] == b["sensor_token"]
        assert 0 < np.abs(np.subtract(a["translation"], b["translation"])).max() < 0.2
        assert np.abs(np.subtract(a["translation"], camera.base_from_camera[:3, 3])).max() < 0.2
        assert a["camera_intrinsic"] != b["camera_intrinsic"]
    plain = write_dataset(
        tmp_path / "plain",
        [dataclasses.replace(d, density=0.0) for d in drives],
        {BOSTON: city},
        render=grey,
        image_size=SIZE,
        progress=False,
        calibration_jitter=False,
    )
    one, two = _rigs(NuScenes("v1.0-mini", str(plain), verbose=False)).values()
    assert one == two


def test_one_scene_alone_is_as_in_the_whole_set(
    root: Path, city: dict[str, Any], drives: list[Drive], tmp_path: Path
) -> None:
    part = write_dataset(
        tmp_path / "part",
        drives,
        {BOSTON: city},
        render=grey,
        image_size=SIZE,
        sweeps=True,
        seed=3,
        render_scale=0.5,
        progress=False,
        only=["scene-9001"],
    )
    images = [str(p.relative_to(part)) for p in part.rglob("*.jpg")]
    assert 100 < len(images) < len(list(root.rglob("*.jpg")))
    assert filecmp.cmpfiles(root, part, images, shallow=False)[0] == images
    for table in ("scene", "sample", "sample_data", "ego_pose", "calibrated_sensor", "sample_annotation", "log"):
        whole, some = (json.loads((r / "v1.0-mini" / f"{table}.json").read_text()) for r in (root, part))
        assert some and all(row in whole for row in some), table


def test_changes_and_splits(
    city: dict[str, Any], drives: list[Drive], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nuscenes.map_expansion.map_api import NuScenesMap
    from nuscenes.nuscenes import NuScenes

    first, second = drives[0].trajectory.date, drives[1].trajectory.date
    assert first < second
    changes = [dataclasses.replace(c, date=second) for c in draw_changes(city, BOSTON, 1, (first, "2019-06-01"), 2)]
    driven_in: list[dict[str, Any]] = []
    real = dataset.make_traffic
    monkeypatch.setattr(dataset, "make_traffic", lambda c, *a, **k: driven_in.append(c) or real(c, *a, **k))
    out = write_dataset(
        tmp_path / "data",
        drives,
        {BOSTON: city},
        render=grey,
        image_size=SIZE,
        progress=False,
        changes={BOSTON: changes},
        splits={"train": ["scene-9000"], "val": ("scene-9001",)},
    )
    assert driven_in[0] is city and driven_in[1] == apply_changes(city, changes, second) != city
    assert read_changes(out, BOSTON) == changes
    assert json.loads((out / "maps" / "changes" / f"{BOSTON}.json").read_text())["map_date"] == first
    assert json.loads((out / "maps" / "expansion" / f"{BOSTON}.json").read_text()) == city
    assert json.loads((out / "v1.0-mini" / "splits.json").read_text()) == {
        "train": ["scene-9000"],
        "val": ["scene-9001"],
    }
    assert len(NuScenes("v1.0-mini", str(out), verbose=False).scene) == 2
    NuScenesMap(str(out), BOSTON)


def test_bad_changes_splits_and_names(city: dict[str, Any], drives: list[Drive], tmp_path: Path) -> None:
    def write(**more: Any) -> None:
        write_dataset(tmp_path / "d", drives, {BOSTON: city}, render=grey, progress=False, image_size=SIZE, **more)

    foreign = Change("2018-08-01", "crossing_added", "singapore-onenorth", 0, 0, (), ())
    with pytest.raises(NmpError, match="changes of 'singapore-onenorth' are given for boston-seaport"):
        write(changes={BOSTON: [foreign]})
    unknown = Change(
        "2018-08-01", "crossing_removed", BOSTON, 0, 0, (Shape.of("ped_crossing", box(0, 0, 1, 1), "x"),), ()
    )
    with pytest.raises(NmpError, match="ped_crossing x, which the map has not"):
        write(changes={BOSTON: [unknown]})
    with pytest.raises(NmpError, match="split 'val' names scene-0001, which no drive has"):
        write(splits={"val": ["scene-0001"]})
    with pytest.raises(NmpError, match="no scene is named scene-0001: choose from scene-9000 to scene-9001"):
        write(only=["scene-0001"])
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------- geometry, by the devkit


PLACE = np.array([30.0, 30.0, 0.6])


def _painted_world() -> tuple[dict[str, Any], NDArray[np.float64]]:
    """A bare square with one divider in front of each camera: its tables, and the line ends [6, 2, 2] (m)."""
    x, y, yaw = PLACE
    ends = []
    for camera in nuscenes_rig("n008"):
        axis = camera.base_from_camera[:2, 2]
        bearing = yaw + np.arctan2(axis[1], axis[0])
        ahead = np.array([np.cos(bearing), np.sin(bearing)])
        middle = np.array([x, y]) + (9.5 if camera.name == "cam_back" else 8.0) * ahead
        # slanted, so that a shift to any side shows
        along = np.array([[0.8, -0.6], [0.6, 0.8]]) @ ahead
        ends.append([middle - along, middle + along])
    b = MapBuilder(f"test:{BOSTON}", 60, 60)
    ground = b.polygon(box(1, 1, 59, 59))
    b.add("drivable_area", polygon_tokens=[ground])
    b.add("road_segment", polygon_token=b.polygon(box(1, 1, 59, 59)), is_intersection=False, drivable_area_token="")
    for pair in np.round(ends, 4):
        b.add("lane_divider", line_token=b.line(pair), lane_divider_segments=[])
    return b.tables, np.round(ends, 4)


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A car that stands in that square, drawn by the real renderer; the lines are fresh and white, all else dark."""
    torch = pytest.importorskip("torch")
    from nmp.citymap import CityMap
    from nmp_train.sim.render import Ground, Weather, render, solids_from_boxes
    from nmp_train.sim.surface import paint_surface

    tables, ends = _painted_world()
    surface = paint_surface(CityMap.from_tables(tables, BOSTON), (18, 18, 42, 42), 1, 0.05)
    texels = torch.zeros_like(surface.texels)
    for level, (offset, rows, cols) in enumerate(surface.levels):
        cell = surface.resolution * 2**level
        row, col = np.mgrid[:rows, :cols]
        points = shapely.points(surface.x0 + (col + 0.5) * cell, surface.y0 + (row + 0.5) * cell)
        near = shapely.distance(points, MultiLineString(list(ends)))
        # Texels at the edge are as bright as the line covers them: half a texel is half a pixel here.
        grey_level = (32 + 223 * np.clip((0.15 - near) / cell + 0.5, 0, 1)).astype(np.int32)
        block = grey_level * 0x010101
        texels[offset : offset + rows * cols] = torch.from_numpy(block.ravel())
    ground = Ground.of([dataclasses.replace(surface, texels=texels)])

    def draw(
        intrinsics: NDArray[np.float64],
        map_from_camera: NDArray[np.float64],
        boxes: Boxes,
        *,
        size: tuple[int, int],
        weather: str,
        seed: int,
    ) -> NDArray[np.uint8]:
        about = map_from_camera[0, :2, 3].copy()
        poses, none = map_from_camera.copy(), np.zeros((0, 3))
        poses[:, :2, 3] -= about
        generator = torch.Generator().manual_seed(seed)
        images = render(
            ground,
            torch.zeros(1, dtype=torch.int64),
            torch.from_numpy(about)[None],
            torch.from_numpy(intrinsics).float()[None],
            torch.from_numpy(poses).float()[None],
            solids_from_boxes(none, none, none[:, 0], none, none[:, 0], about, 2),
            Weather.sample(1, generator, weather),
            size,
            generator=generator,
        )
        return np.ascontiguousarray(images[0].permute(0, 2, 3, 1).numpy())

    still = Trajectory(BOSTON, "2018-08-01", np.array([0.0, 0.3]), np.stack([PLACE, PLACE]))
    out = tmp_path_factory.mktemp("painted") / "data"
    return write_dataset(
        out, [Drive(still, density=0.0)], {BOSTON: tables}, render=draw, image_size=(800, 450), progress=False
    )


def test_map_lines_lie_where_the_devkit_projects_them(painted: Path) -> None:
    from nuscenes.map_expansion.map_api import NuScenesMap
    from nuscenes.nuscenes import NuScenes
    from nuscenes.utils.geometry_utils import view_points
    from pyquaternion import Quaternion

    data, city = NuScenes("v1.0-mini", str(painted), verbose=False), NuScenesMap(str(painted), BOSTON)
    lines = [city.extract_line(r["line_token"]) for r in city.lane_divider]
    for channel, line in zip((c.upper() for c in CAMERAS), lines, strict=True):
        row = data.get("sample_data", data.sample[0]["data"][channel])
        calibration = data.get("calibrated_sensor", row["calibrated_sensor_token"])
        ego = data.get("ego_pose", row["ego_pose_token"])
        world = np.array([[*p, 0.0, 1.0] for p in np.linspace(*line.coords, 21)])
        points = world[:, :3].T
        for record in (ego, calibration):
            points = Quaternion(record["rotation"]).rotation_matrix.T @ (
                points - np.array(record["translation"])[:, None]
            )
        intrinsics = np.array(calibration["camera_intrinsic"])
        uv = view_points(points, intrinsics, normalize=True)[:2].T
        # our own projection
        pose, mount = (
            transform_from(np.array(r["translation"]), np.roll(r["rotation"], -1)) for r in (ego, calibration)
        )
        uvw = (intrinsics @ (inverse(pose @ mount) @ world.T)[:3]).T
        assert np.abs(uvw[:, :2] / uvw[:, 2:] - uv).max() < 0.1, channel
        # the painted line: the middle of its brightness across the line, beside many points of it
        image = cv2.imread(str(painted / row["filename"])).astype(np.float32).sum(axis=2)
        normal = np.array([-(uv[-1] - uv[0])[1], (uv[-1] - uv[0])[0]]) / np.linalg.norm(uv[-1] - uv[0])
        reach = np.arange(-14, 14.01, 0.25)
        samples = uv[4:-4, None] + reach[None, :, None] * normal
        profile = cv2.remap(image, *np.moveaxis(samples.astype(np.float32), -1, 0), cv2.INTER_LINEAR)
        base, peak = np.median(profile), profile.max()
        assert peak > 1.5 * base, channel
        light = np.clip(profile - (base + peak) / 2, 0, None)
        offsets = (light * reach).sum(axis=1) / light.sum(axis=1)
        assert np.abs(offsets.mean()) < 0.6 and np.abs(offsets).max() < 1.0, (channel, offsets)


def test_the_devkit_draws_the_map_into_the_images(
    painted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.patches import Polygon as Patch
    from nuscenes.map_expansion.map_api import NuScenesMap, NuScenesMapExplorer
    from nuscenes.nuscenes import NuScenes

    data = NuScenes("v1.0-mini", str(painted), verbose=False)
    # The devkit draws polygons with descartes, which does not know shapely 2.
    patch = lambda polygon, **how: Patch(np.asarray(polygon.exterior.coords)[:, :2], **how)  # noqa: E731
    monkeypatch.setattr("descartes.PolygonPatch", patch)
    explorer = NuScenesMapExplorer(NuScenesMap(str(painted), BOSTON))
    explorer.render_map_in_image(
        data,
        data.sample[0]["token"],
        layer_names=["road_segment"],
        camera_channel="CAM_BACK_LEFT",
        out_path=str(tmp_path / "map.png"),
        verbose=False,
    )
    assert cv2.imread(str(tmp_path / "map.png")).std() > 5


def test_rig_looks_the_right_way() -> None:
    yaws = {"cam_front": 0, "cam_front_right": -56, "cam_back_right": -110, "cam_back": 180, "cam_back_left": 108}
    for vehicle in ("n008", "n015"):
        rig = nuscenes_rig(vehicle)
        assert tuple(c.name for c in rig) == CAMERAS
        for camera in rig:
            axis = camera.base_from_camera[:3, 2]
            yaw = np.degrees(np.arctan2(axis[1], axis[0]))
            assert abs((yaw - yaws.get(camera.name, 55) + 180) % 360 - 180) < 4, (vehicle, camera.name)
            assert 1.4 < camera.base_from_camera[2, 3] < 1.7
