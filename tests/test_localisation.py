"""Imperfect localisation: the noise itself, and its way from the simulator through a bag to the scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from nmp.bags.nuscenes_to_bag import convert, load_nuscenes, scene_shots
from nmp.cli import main
from nmp.errors import NmpError
from nmp.evaluation import CityMaps
from nmp.frame import ANCHOR_CAMERA, LocalMap
from nmp.geometry import BevGrid, transform_from, transform_from_xyyaw, yaw_of
from nmp.layers import LayerWriter
from nmp_train.sim.dataset import Drive, write_dataset
from nmp_train.sim.drive import sample_routes
from nmp_train.sim.localisation import MAX_ANGLE_RAD, LocalisationNoise
from tests.bag_fixtures import bag_messages

BOSTON = "boston-seaport"
VERSION = "v1.0-mini"
NOISE = LocalisationNoise(0.8, 0.03)


def errors(noise: LocalisationNoise, times: NDArray[np.float64], seed: Any) -> NDArray[np.float64]:
    """x, y, z, roll, pitch, yaw [N, 6] of believed against true."""
    truth = np.stack([transform_from_xyyaw(5.0 * t, 3.0, 0.1 * t) for t in times])
    believed, _ = noise.apply(times, truth, seed)
    turn = Rotation.from_matrix(believed[:, :3, :3] @ truth[:, :3, :3].transpose(0, 2, 1)).as_rotvec()
    return np.concatenate([believed[:, :3, 3] - truth[:, :3, 3], turn], axis=1)


def test_deviations_are_those_asked_for_and_told() -> None:
    noise, times = LocalisationNoise(0.3, 0.02), np.arange(0, 20, 2.0)
    found = np.stack([errors(noise, times, (4, k)) for k in range(600)])
    asked = np.sqrt(np.diag(noise.covariance))
    assert asked == pytest.approx([0.3, 0.3, 0.0, 0.004, 0.004, 0.02])
    # Stationary: the first and the last moment of a drive are equally uncertain.
    for moment in (0, -1):
        assert found[:, moment].std(axis=0) == pytest.approx(asked, rel=0.12, abs=1e-12)
    assert np.abs(found.mean(axis=(0, 1))).max() < 0.04
    assert np.abs(np.corrcoef(found[:, 3, [0, 1, 5]].T) - np.eye(3)).max() < 0.15


def test_drift_is_slow_and_smooth_between_camera_shots() -> None:
    noise = LocalisationNoise(0.5, 0.02, drift_time_s=10.0)
    times = np.arange(0, 40, 0.05)
    found = np.stack([errors(noise, times, k)[:, 0] for k in range(150)])
    assert np.abs(np.diff(found, axis=1)).std() < 0.2 * 0.5  # 50 ms later nearly the same
    for lag, kept in ((0.0, 1.0), (10.0, np.exp(-1)), (20.0, np.exp(-2))):
        k = round(lag / 0.05)
        assert (found[:, : len(times) - k] * found[:, k:]).mean() / found.var() == pytest.approx(kept, abs=0.16)


def test_one_moment_one_error_and_one_seed_one_drive() -> None:
    times = np.array([0.5, 0.0, 0.5, 0.1])
    found = errors(NOISE, times, 1)
    assert found[0] == pytest.approx(found[2], abs=1e-9) and np.abs(found[0] - found[3]).max() > 1e-3
    # The order of the times does not matter, only the times.
    assert errors(NOISE, np.sort(times), 1) == pytest.approx(found[np.argsort(times, kind="stable")], abs=1e-9)
    assert np.abs(errors(NOISE, times, 2) - found).max() > 0.01
    assert np.abs(errors(LocalisationNoise(0, 0), times, 1)).max() < 1e-12


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"position_m": 1.01}, "position_m = 1.01 .* 0 to 1$"),
        ({"position_m": -0.1}, "position_m"),
        ({"angle_rad": MAX_ANGLE_RAD * 1.01}, "angle_rad .* 0 to 0.03491"),
        ({"angle_rad": float("nan")}, "angle_rad"),
        ({"drift_time_s": 0.0}, "drift_time_s"),
    ],
)
def test_noise_out_of_range(fields: dict[str, float], message: str) -> None:
    with pytest.raises(NmpError, match=message):
        LocalisationNoise(**fields)
    LocalisationNoise(1.0, MAX_ANGLE_RAD)


# ------------------------------------------------------------------------------- simulator, bag, evaluation


def black(*args: Any, size: tuple[int, int], **kwargs: Any) -> NDArray[np.uint8]:
    return np.zeros((6, size[1], size[0], 3), np.uint8)


def write(out: Path, city: dict[str, Any], localisation: LocalisationNoise | None, slopes: bool = False) -> Path:
    route = max(sample_routes(city, 2, 4, 2.0, 10.0), key=lambda r: np.ptp(r.poses_xyyaw[:, 0]))
    return write_dataset(
        out,
        [Drive(route, density=0.0)],
        {BOSTON: city},
        render=black,
        image_size=(32, 18),
        seed=3,
        progress=False,
        localisation=localisation,
        slopes=slopes,
    )


@pytest.fixture(scope="module")
def root(boston: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("noisy") / "data", boston, NOISE)


def table(root: Path, name: str) -> Any:
    return json.loads((root / VERSION / f"{name}.json").read_text())


def matrix(row: dict[str, Any]) -> NDArray[np.float64]:
    w, x, y, z = row["rotation"]
    return transform_from(np.array(row["translation"]), np.array([x, y, z, w]))


def test_the_car_does_not_know_of_slopes(boston: dict[str, Any], tmp_path: Path) -> None:
    uneven, flat = (write(tmp_path / name, boston, None, name == "uneven") for name in ("uneven", "flat"))
    truth, believed = table(uneven, "ego_pose"), table(uneven, "ego_pose_estimate")
    assert [matrix(r).tolist() for r in believed] == [matrix(r).tolist() for r in table(flat, "ego_pose")]
    turns = [np.linalg.inv(matrix(b)) @ matrix(t) for b, t in zip(believed, truth, strict=True)]
    pitch_roll_yaw = np.degrees([Rotation.from_matrix(t[:3, :3]).as_euler("YXZ") for t in turns])
    assert 0.05 < np.sqrt((pitch_roll_yaw[:, :2] ** 2).mean()) < 0.9
    assert np.abs(pitch_roll_yaw[:, 2]).max() < 1e-6 and max(np.abs(t[:3, 3]).max() for t in turns) < 1e-9
    spread = np.sqrt(np.diag(np.reshape(believed[0]["covariance"], (6, 6))))
    np.testing.assert_allclose(np.degrees(spread), [0, 0, 0, 0.31, 0.31, 0], atol=0.01)


def test_the_data_set_keeps_the_truth_and_tells_the_belief(root: Path, boston: dict[str, Any], tmp_path: Path) -> None:
    exact = write(tmp_path / "exact", boston, None)
    assert not (exact / VERSION / "ego_pose_estimate.json").exists()
    assert table(root, "ego_pose") == table(exact, "ego_pose")
    poses, estimates = table(root, "ego_pose"), table(root, "ego_pose_estimate")
    assert [r["token"] for r in poses] == [r["token"] for r in estimates]
    assert [r["timestamp"] for r in poses] == [r["timestamp"] for r in estimates]
    assert all(np.reshape(r["covariance"], (6, 6)).tolist() == NOISE.covariance.tolist() for r in estimates)
    off = np.array([matrix(e)[:3, 3] - matrix(p)[:3, 3] for p, e in zip(poses, estimates, strict=True)])
    assert 0.05 < np.hypot(off[:, 0], off[:, 1]).mean() < 3 and np.abs(off[:, 2]).max() == 0


def test_the_bag_holds_what_the_car_believed(root: Path, tmp_path: Path) -> None:
    by_stamp = {r["timestamp"] * 1000: r for r in table(root, "ego_pose_estimate")}
    true_by_stamp = {r["timestamp"] * 1000: r for r in table(root, "ego_pose")}
    convert(root, VERSION, "scene-9000", tmp_path / "bag")
    messages = bag_messages(tmp_path / "bag")
    odometry = [m for m in messages if m.topic == "/odom"]
    moved = {m.stamp_ns: m.message.transforms[0].transform for m in messages if m.topic == "/tf"}
    assert len(odometry) == len(moved) == len({r["timestamp"] for r in by_stamp.values()})
    for m in odometry:
        row, p = by_stamp[m.stamp_ns], m.message.pose.pose.position
        assert [p.x, p.y, p.z] == row["translation"]
        assert m.message.pose.covariance.tolist() == row["covariance"]
        t = moved[m.stamp_ns].translation
        assert [t.x, t.y, t.z] == row["translation"]
    convert(root, VERSION, "scene-9000", tmp_path / "true", true_poses=True)
    for m in bag_messages(tmp_path / "true"):
        if m.topic == "/odom":
            p = m.message.pose.pose.position
            assert [p.x, p.y, p.z] == true_by_stamp[m.stamp_ns]["translation"]
            assert m.message.pose.covariance.reshape(6, 6)[0, 0] == pytest.approx(0.05**2)


def test_eval_draws_the_truth_at_the_true_pose(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    location, shots = scene_shots(load_nuscenes(root, VERSION), "scene-9000")
    shots = [s for s in shots if s.camera == ANCHOR_CAMERA]
    true_by_stamp = {r["timestamp"] * 1000: matrix(r) for r in table(root, "ego_pose")}
    grid, maps = BevGrid(), CityMaps(root)
    writer, known = LayerWriter(tmp_path / "layers"), np.ones(grid.shape, np.float32)
    for shot in shots:
        # What a perfect eye would see: the surroundings of where the car is, said of where it believes to be.
        believed, true = transform_from(*map(np.array, shot.pose)), true_by_stamp[shot.stamp_ns]
        assert abs(yaw_of(believed) - yaw_of(true)) < 0.2
        seen = maps.truth_of(LocalMap(shot.stamp_ns, location, true, grid, np.zeros((3, *grid.shape)), known))
        writer.write(LocalMap(shot.stamp_ns, location, believed, grid, seen.astype(np.float32), known))
    arguments = ["eval", str(tmp_path / "layers"), "--maps", str(root), "--json", str(tmp_path / "s.json")]

    def miou(*more: str) -> float:
        assert main([*arguments, *more]) == 0
        return float(json.loads((tmp_path / "s.json").read_text())["layers"]["miou"])

    assert miou("--version", VERSION) == 100.0
    assert miou() < 90.0
    capsys.readouterr()
    stamp = shots[-1].stamp_ns + 1000
    writer.write(LocalMap(stamp, location, np.eye(4), grid, np.zeros((3, *grid.shape), np.float32), known))
    assert main([*arguments, "--version", VERSION]) == 2
    assert f"no cam_front image of {BOSTON} at {stamp} ns" in capsys.readouterr().err
    assert main([*arguments, "--version", "v1.0-test"]) == 2
    assert "has no tables 'v1.0-test' (found: v1.0-mini)" in capsys.readouterr().err


def _write_estimates(root: Path, out: Path, rows: Any) -> Path:
    for path in root.iterdir():
        if path.name != VERSION:
            (out / path.name).symlink_to(path)
    (out / VERSION).mkdir()
    for path in (root / VERSION).iterdir():
        (out / VERSION / path.name).write_text(path.read_text())
    (out / VERSION / "ego_pose_estimate.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return out


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda rows: rows[:-3], r"no estimate of ego pose [0-9a-f]+ \(one of 3\)"),
        (lambda rows: [], "no estimate of ego pose"),
        (lambda rows: "[{", "no file of pose estimates"),
        (lambda rows: [{**rows[0], "covariance": [0.1] * 6}], "has not 3, 4 and 36 finite numbers"),
        (lambda rows: [{**rows[0], "translation": [0.0, None, 0.0]}], "no file of pose estimates"),
        (lambda rows: [{"token": "a"}], "no file of pose estimates .*translation"),
    ],
)
def test_damaged_estimates_are_named(damage: Any, message: str, root: Path, tmp_path: Path) -> None:
    damaged = _write_estimates(root, tmp_path, damage(table(root, "ego_pose_estimate")))
    with pytest.raises(NmpError, match=f"ego_pose_estimate.json .*{message}.*--true-poses"):
        convert(damaged, VERSION, "scene-9000", tmp_path / "bag")
    assert not (tmp_path / "bag").exists()


def test_true_poses_do_not_look_at_damaged_estimates(root: Path, tmp_path: Path) -> None:
    damaged = _write_estimates(root, tmp_path, "[{")
    arguments = ["--dataroot", damaged, "--scene", "scene-9000", "--out", tmp_path / "bag", "--true-poses"]
    assert main(["bag", *map(str, arguments)]) == 0
