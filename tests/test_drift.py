"""What the pose search found is carried from frame to frame."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nmp.drift import Drift
from nmp.errors import NmpError
from nmp.frame import Frame
from nmp.geometry import transform_from_xyyaw
from nmp.mapper import OnlineMapper
from nmp.model import BEVNetwork, NetworkConfig, load_network, save_network
from nmp.model.fusion import Exactness
from nmp.model.fusion.align import ALIKE
from nmp.model.weights import put_beside, read_description
from nmp_train import cli
from nmp_train.evaluate import read_scenes, scene_frames
from nmp_train.search import exactness_of
from nmp_train.sim import localisation
from nmp_train.sim.localisation import LocalisationNoise

REAL = Path(__file__).resolve().parents[2] / "shared" / "real" / "frames"
SMALL = NetworkConfig(
    backbone_stages=2, input_width=64, input_height=32, neck_channels=8, bev_channels=16, prior_channels=4, align=True
)
needs_frames = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real frames beside the repository")


def _frame(t: float, pose: np.ndarray, stds: tuple[float, float] = (0.2, 0.02), place: str = "boston-seaport") -> Frame:
    return Frame(round(t * 1e9), place, pose, (), *stds)


def _found(measured: np.ndarray, error: tuple[float, ...]) -> np.ndarray:
    return np.array([measured, error, measured, error], np.float32)


def _followed(white: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray, Drift]:
    """Return errors [N, 3] of the given poses and of those that are expected, along a drive."""
    monkeypatch.setattr(localisation, "WHITE", 1.0 if white else 0.1)
    rng = np.random.default_rng(3)
    times = np.arange(0, 100, 0.5)
    true = np.stack([transform_from_xyyaw(5 * t, 0.1 * t, 0.3 + 0.02 * t) for t in times])
    believed, covariance = LocalisationNoise(0.2, 0.02).apply(times, true, 7)
    error = (0.3, 0.2, 0.015)
    drift, given, left = Drift(), [], []
    for t, pose, truth in zip(times, believed, true, strict=True):
        frame = _frame(t, pose)
        expected = drift.expect(frame)
        used = pose.copy()
        used[:2, 3] += expected.offset[:2]
        yaw = math.atan2(pose[1, 0], pose[0, 0]) + expected.offset[2]
        off = np.array([*(truth[:2, 3] - used[:2, 3]), math.atan2(truth[1, 0], truth[0, 0]) - yaw])
        c, s = math.cos(yaw), math.sin(yaw)
        in_ego = np.array([c * off[0] + s * off[1], c * off[1] - s * off[0], off[2]])
        noise = rng.normal(size=3) * error / ALIKE
        drift.learn(yaw, _found(in_ego + noise, error))
        given.append(off + expected.offset)
        left.append(off)
    return np.array(given[20:]), np.array(left[20:]), drift


def test_a_drift_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    given, left, drift = _followed(False, monkeypatch)
    assert (np.sqrt((left**2).mean(axis=0)) < 0.65 * np.sqrt((given**2).mean(axis=0))).all()
    believed = drift.expect(_frame(100, np.eye(4)))
    assert believed.position_std < 0.15 and believed.yaw_std < 0.015, "and it knows"


def test_errors_that_are_new_with_every_frame_are_not_carried_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given, left, drift = _followed(True, monkeypatch)
    assert (np.sqrt((left**2).mean(axis=0)) < 1.1 * np.sqrt((given**2).mean(axis=0))).all()
    believed = drift.expect(_frame(100, np.eye(4)))
    assert believed.position_std > 0.16 and believed.yaw_std > 0.016, "it does not claim to know them"


def test_where_nothing_is_found_the_pose_is_what_is_told() -> None:
    drift = Drift()
    for t in range(10):
        believed = drift.expect(_frame(t, transform_from_xyyaw(t, 0, 0.1)))
        assert not believed.offset.any()
        assert believed.position_std == pytest.approx(0.2) and believed.yaw_std == pytest.approx(0.02)
        drift.learn(0.1, None if t % 2 else _found(np.zeros(3), (np.inf,) * 3))


def test_what_is_found_in_one_direction_says_nothing_of_the_other() -> None:
    drift = Drift()
    drift.expect(_frame(0, transform_from_xyyaw(0, 0, math.pi / 2)))
    drift.learn(math.pi / 2, _found(np.array([0.0, 0.5, 0.0]), (np.inf, 0.01, np.inf)))  # left is -x
    believed = drift.expect(_frame(0.1, transform_from_xyyaw(0, 0, math.pi / 2)))
    assert believed.offset[0] == pytest.approx(-0.5 * 0.9, abs=0.02), "but for what is new with every frame"
    assert abs(believed.offset[1]) < 1e-9 and believed.offset[2] == 0


@pytest.mark.parametrize("change", ["restart", "earlier", "elsewhere", "much later"])
def test_what_was_found_is_forgotten(change: str) -> None:
    drift = Drift()
    drift.expect(_frame(10, np.eye(4)))
    drift.learn(0.0, _found(np.array([0.4, 0.2, 0.03]), (0.1, 0.1, 0.01)))
    if change == "restart":
        drift.restart()
    stamp = {"earlier": 9.0, "much later": 400.0}.get(change, 10.5)
    place = "singapore-onenorth" if change == "elsewhere" else "boston-seaport"
    believed = drift.expect(_frame(stamp, np.eye(4), place=place))
    assert np.abs(believed.offset).max() < 1e-6
    assert believed.position_std == pytest.approx(0.2)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_network(BEVNetwork(SMALL), tmp_path / "w.safetensors", {})
    return tmp_path / "w.safetensors"


@needs_frames
def test_the_mapper_goes_on_from_where_the_search_found_it(weights: Path, tmp_path: Path) -> None:
    frame = next(f for s in read_scenes(REAL, "v1.0-mini") for f in scene_frames(s).frames)
    frame = dataclasses.replace(frame, position_std=0.5, yaw_std=0.02)
    later = [dataclasses.replace(frame, stamp_ns=frame.stamp_ns + k * 100_000_000) for k in range(4)]
    far = frame.map_from_base.copy()
    far[:2, 3] += 60.0
    asked: list[tuple[np.ndarray, np.ndarray]] = []
    with OnlineMapper(weights, tmp_path / "prior") as mapper:
        ask = mapper._runner.answer

        def answer(pose: torch.Tensor, spread: torch.Tensor) -> object:
            asked.append((pose[0].numpy().copy(), spread[0].numpy().copy()))
            found = _found(np.array([1.0, 0.0, 0.0]), (0.05, 0.05, 0.001))
            return ask(pose, spread)._replace(found=found)

        mapper._runner.answer = answer  # type: ignore[method-assign, assignment]
        for given in (later[0], later[1], dataclasses.replace(later[2], map_from_base=far)):
            mapper.update(given)
        mapper.close()
        mapper.update(later[3])
    cell = mapper.config.prior_cell
    # where the car stands in a cell, as windows begin at cells
    moved = np.linalg.norm(np.remainder(asked[1][0][:2] - asked[0][0][:2] + cell / 2, cell) - cell / 2)
    assert moved > 0.01 and asked[1][1][0] < 0.5 * asked[0][1][0], "what is left is small"
    assert asked[2][1][0] == pytest.approx(0.5) and asked[3][1][0] == pytest.approx(0.5), "a jump, and another drive"
    np.testing.assert_allclose(asked[3][0], asked[0][0], atol=1e-4)


@needs_frames
def test_a_measurement_leaves_no_trace(weights: Path, tmp_path: Path) -> None:
    frames = [f for s in read_scenes(REAL, "v1.0-mini") for f in scene_frames(s).frames]
    layers = []
    for name, asks in (("a", False), ("b", True)):
        with OnlineMapper(weights, tmp_path / name) as mapper:
            for frame in frames:
                if asks:
                    found = mapper.measure(frame)
                    assert found is not None and found.shape == (4, 3)
                layers.append(mapper.update(frame).probabilities)
    np.testing.assert_array_equal(layers[0], layers[len(layers) // 2])
    with OnlineMapper(weights, use_prior=False) as mapper:
        assert mapper.measure(frames[0]) is None


def test_how_exact_a_search_is_comes_out_of_what_it_found() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=(4000, 3)) * [0.3, 0.3, 0.02]
    scale, std, growth = np.array([1.2, 1.0, 2.5]), np.array([0.25, 0.1, 0.01]), np.array([0.4, 0.8, 0.6])
    vague = rng.uniform(0, 1.0, (4000, 3)) * [1, 1, 0.05]
    found = (true + rng.normal(size=(4000, 3)) * np.sqrt(std**2 + (growth * vague) ** 2)) / scale
    vague[40:60] = np.inf
    got = exactness_of(np.stack([true, found, vague], axis=1))
    np.testing.assert_allclose(got.scale, scale, rtol=0.1)
    np.testing.assert_allclose(got.std, std, rtol=0.25)  # it is a little wide for errors that are normal
    np.testing.assert_allclose(got.growth, growth, rtol=0.25)
    found[:20] = [1.5, 1.5, 0.1]  # one line taken for another
    got = exactness_of(np.stack([true, found, vague], axis=1))
    assert (np.array(got.std) < 2 * std).all(), "that is not taken for usual"


def test_a_search_that_finds_nothing_is_not_measured() -> None:
    true = np.random.default_rng(0).normal(size=(200, 3))
    with pytest.raises(NmpError, match="it is not trained"):
        exactness_of(np.stack([true, np.zeros((200, 3)), np.ones((200, 3))], axis=1))
    with pytest.raises(NmpError, match="the search found 0 of 200 frames"):
        exactness_of(np.stack([true, true, np.full((200, 3), np.inf)], axis=1))


@needs_frames
def test_the_command_says_what_it_lacks(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", str(weights), "--dataroot", str(REAL)]) == 2
    assert "frames on the map, 50 are needed" in capsys.readouterr().err
    plain = NetworkConfig(**{**SMALL.to_dict(), "align": False})
    save_network(BEVNetwork(plain), tmp_path / "plain.safetensors", {})
    assert cli.main(["search", str(tmp_path / "plain.safetensors"), "--dataroot", str(REAL)]) == 2
    assert "no search for the pose: train them with network.align=true" in capsys.readouterr().err


def test_the_exactness_lies_beside_the_weights(weights: Path, tmp_path: Path) -> None:
    before = load_network(weights)
    assert before[0].fusion.aligner.exactness == Exactness()
    mine = Exactness((1.1, 1.2, 2.2), (0.31, 0.14, 0.011), (0.5, 0.6, 0.7))
    put_beside(weights, {"search": mine._asdict()})
    network, fingerprint = load_network(weights)
    assert network.fusion.aligner.exactness == mine
    assert fingerprint == before[1]  # cities of these weights stay theirs
    assert cli.main(["export", str(weights), "--out", str(tmp_path / "exported.safetensors")]) == 0
    assert load_network(tmp_path / "exported.safetensors")[0].fusion.aligner.exactness == mine
    assert read_description(weights)["prior"]["channels"] == 4
    for wrong in ({"scale": [1, 1]}, {"std": [0.1, 0.1, math.nan]}, {"std": [0.1, 0.1, "x"]}):
        put_beside(weights, {"search": {**mine._asdict(), **wrong}})
        with pytest.raises(NmpError, match="measure it again with 'nmp-train search'"):
            load_network(weights)
