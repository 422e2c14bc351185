"""Simulated data sets: what the devkit sees of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from nmp.errors import NmpError
from nmp.frame import CAMERAS
from nmp_train.sim.boxes import Boxes
from nmp_train.sim.city import generate_city
from nmp_train.sim.dataset import Drive, write_dataset
from nmp_train.sim.drive import Trajectory, sample_routes, second_pass
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
def city() -> dict[str, Any]:
    return generate_city(5, BOSTON, 360.0)


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
    assert not (tmp_path / "c").exists()


def test_user_errors(city: dict[str, Any], drives: list[Drive], root: Path, tmp_path: Path) -> None:
    with pytest.raises(NmpError, match="exists already"):
        write_dataset(root, drives, {BOSTON: city}, render=grey)
    with pytest.raises(NmpError, match="no map for location"):
        write_dataset(tmp_path / "d", drives, {}, render=grey)
    with pytest.raises(NmpError, match="no drives"):
        write_dataset(tmp_path / "d", [], {}, render=grey)
    with pytest.raises(NmpError, match="unknown vehicle"):
        nuscenes_rig("n001")
    with pytest.raises(NmpError, match="two or more poses"):
        Trajectory(BOSTON, "2018-01-01", np.zeros(1), np.zeros((1, 3)))


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
