"""nuScenes to bag: nothing is lost on the way, and what is wrong is said."""

from __future__ import annotations

import argparse
import errno
from pathlib import Path

import numpy as np
import pytest

from nmp import topics
from nmp.bags import nuscenes_to_bag
from nmp.bags.nuscenes_to_bag import convert, load_nuscenes, scene_shots
from nmp.bags.reader import BagReader
from nmp.errors import NmpError
from nmp.frame import CAMERAS
from tests.bag_fixtures import LOCATION, REAL_FRAMES, bag_messages, make_nuscenes, make_shots


@pytest.fixture(scope="module")
def dataroot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nuscenes(tmp_path_factory.mktemp("data") / "nuscenes")


def stamp_of(message: object) -> int:
    stamp = message.header.stamp  # type: ignore[attr-defined]
    return int(stamp.sec) * 10**9 + int(stamp.nanosec)


@pytest.mark.parametrize("scene", ["scene-0061", "scene-0081"])
def test_real_frames_survive_unchanged(scene: str, tmp_path: Path) -> None:
    if not REAL_FRAMES.is_dir():
        pytest.skip("real nuScenes frames are not here")
    convert(REAL_FRAMES, "v1.0-mini", scene, tmp_path / "bag")
    location, shots = scene_shots(load_nuscenes(REAL_FRAMES, "v1.0-mini"), scene)
    messages = bag_messages(tmp_path / "bag")
    by_topic = {m.topic: m.message for m in messages}
    assert by_topic["/location"].data == location
    poses = {m.stamp_ns: m.message for m in messages if m.topic == "/odom"}
    static = {t.child_frame_id: t for t in by_topic["/tf_static"].transforms}
    assert len(shots) == 6
    for shot in shots:
        image = by_topic[topics.absolute(topics.image_topic(shot.camera))]
        assert image.data.tobytes() == shot.path.read_bytes()
        assert stamp_of(image) == shot.stamp_ns
        info = by_topic[topics.absolute(topics.camera_info_topic(shot.camera))]
        assert info.header == image.header
        np.testing.assert_array_equal(info.k.reshape(3, 3), shot.intrinsics)
        p, q = poses[shot.stamp_ns].pose.pose.position, poses[shot.stamp_ns].pose.pose.orientation
        assert ([p.x, p.y, p.z], [q.x, q.y, q.z, q.w]) == shot.pose
        mount = static[topics.optical_frame(shot.camera)]
        t, r = mount.transform.translation, mount.transform.rotation
        assert mount.header.frame_id == "base_link"
        assert ([t.x, t.y, t.z], [r.x, r.y, r.z, r.w]) == shot.extrinsics
    assert static["odom"].header.frame_id == "map"


def test_order_stamps_and_qos(dataroot: Path, tmp_path: Path) -> None:
    convert(dataroot, "v1.0-mini", "scene-0001", tmp_path / "bag")
    messages = bag_messages(tmp_path / "bag")
    assert [m.topic for m in messages[:2]] == ["/tf_static", "/location"]
    assert [m.stamp_ns for m in messages] == sorted(m.stamp_ns for m in messages)
    for m in messages:
        if hasattr(m.message, "header"):
            assert stamp_of(m.message) == m.stamp_ns
    # The pose of an image comes before the image.
    topic_at = [(m.stamp_ns, m.topic) for m in messages]
    for stamp, topic in topic_at:
        if topic.endswith("compressed"):
            assert topic_at.index((stamp, "/odom")) < topic_at.index((stamp, topic))
    with BagReader(tmp_path / "bag") as reader:
        latched = {t.name for t in reader.topics.values() if t.qos.latched}
        assert latched == {"/tf_static", "/location"}
        assert all(t.qos.reliable for t in reader.topics.values())
        assert reader.topics["/odom"].count == 12


def test_sweeps_and_velocity(dataroot: Path, tmp_path: Path) -> None:
    convert(dataroot, "v1.0-mini", "scene-0001", tmp_path / "keys")
    convert(dataroot, "v1.0-mini", "scene-0001", tmp_path / "all", sweeps=True, position_std=0.3, yaw_std=0.01)
    keys, everything = bag_messages(tmp_path / "keys"), bag_messages(tmp_path / "all")
    count = {
        b: sum(m.topic == "/cam_back/image_raw/compressed" for m in b_) for b, b_ in (("k", keys), ("a", everything))
    }
    assert count == {"k": 2, "a": 3}
    odom = next(m.message for m in everything if m.topic == "/odom")
    assert odom.twist.twist.linear.x == pytest.approx(8.0, abs=0.1)
    assert odom.twist.twist.angular.z == pytest.approx(0.05, abs=0.005)
    covariance = odom.pose.covariance.reshape(6, 6)
    assert covariance[0, 0] == pytest.approx(0.09) and covariance[5, 5] == pytest.approx(1e-4)


def test_command_line(dataroot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    nuscenes_to_bag.add_arguments(parser)
    out = tmp_path / "new" / "bag"
    args = ["--dataroot", str(dataroot), "--scene", "scene-0001", "--out", str(out)]
    nuscenes_to_bag.run(parser.parse_args(args))
    assert "50 messages" in capsys.readouterr().out
    with pytest.raises(NmpError, match="already exists"):
        nuscenes_to_bag.run(parser.parse_args(args))


def test_bad_input_is_named(dataroot: Path, tmp_path: Path) -> None:
    out = tmp_path / "bag"
    with pytest.raises(NmpError, match="nowhere does not exist"):
        convert(tmp_path / "nowhere", "v1.0-mini", "scene-0001", out)
    with pytest.raises(NmpError, match=r"no tables 'v1.0-trainval' \(found: v1.0-mini\)"):
        convert(dataroot, "v1.0-trainval", "scene-0001", out)
    with pytest.raises(NmpError, match="'scene-9999' is not in .* scene-0001"):
        convert(dataroot, "v1.0-mini", "scene-9999", out)
    assert not out.exists()


def test_incomplete_release(tmp_path: Path) -> None:
    root = make_nuscenes(tmp_path / "data")
    lost = next((root / "samples" / "CAM_BACK").iterdir())
    lost.unlink()
    with pytest.raises(NmpError, match=f"{lost.name} is missing"):
        convert(root, "v1.0-mini", "scene-0001", tmp_path / "bag")
    (root / "v1.0-mini" / "ego_pose.json").write_text('[{"token": "x", ')
    with pytest.raises(NmpError, match="not a complete nuScenes release"):
        convert(root, "v1.0-mini", "scene-0001", tmp_path / "bag")
    (root / "v1.0-mini" / "ego_pose.json").unlink()
    with pytest.raises(NmpError, match="not a complete nuScenes release"):
        convert(root, "v1.0-mini", "scene-0001", tmp_path / "bag")


def test_scene_without_a_camera(tmp_path: Path) -> None:
    root = make_nuscenes(tmp_path / "data")
    table = root / "v1.0-mini" / "sensor.json"
    table.write_text(table.read_text().replace("CAM_BACK_LEFT", "LIDAR_TOP"))
    with pytest.raises(NmpError, match="no images of cam_back_left"):
        convert(root, "v1.0-mini", "scene-0001", tmp_path / "bag")


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk full .* free about"),
        (OSError(errno.EIO, "Input/output error"), "cannot write .*Input/output error"),
    ],
)
def test_half_a_bag_never_shows(failure: OSError, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shots = make_shots(tmp_path / "images", frames=1)
    calls = 0

    def failing(shot: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise failure
        return real(shot)  # type: ignore[arg-type]

    real = nuscenes_to_bag._compressed_image
    monkeypatch.setattr(nuscenes_to_bag, "_compressed_image", failing)
    with pytest.raises(NmpError, match=text):
        nuscenes_to_bag.write_bag(shots, LOCATION, tmp_path / "bag")
    assert [p.name for p in tmp_path.iterdir()] == ["images"]


def test_every_camera_is_written(dataroot: Path) -> None:
    _, shots = scene_shots(load_nuscenes(dataroot, "v1.0-mini"), "scene-0001")
    assert {s.camera for s in shots} == set(CAMERAS)
