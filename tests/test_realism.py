"""The measurements that compare simulated with real images, on images of which the answer is known."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from shapely.geometry import LineString

from nmp.errors import NmpError
from nmp.frame import Camera
from nmp.geometry import inverse, transform_from, transform_from_xyyaw

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "realism.py"
SPEC = importlib.util.spec_from_file_location("realism", PATH)
assert SPEC and SPEC.loader
realism = importlib.util.module_from_spec(SPEC)
sys.modules["realism"] = realism
SPEC.loader.exec_module(realism)


def test_noise_is_measured_in_spite_of_edges() -> None:
    rng = np.random.default_rng(0)
    grey = np.full((200, 300), 0.3)
    grey[:, 120:] = 0.7
    assert realism.noise_level(grey) == 0.0
    for sigma in (0.01, 0.04):
        assert realism.noise_level(grey + rng.normal(0, sigma, grey.shape)) == pytest.approx(sigma, rel=0.05)


def test_the_slope_of_a_power_law_is_found() -> None:
    rng = np.random.default_rng(1)
    shape = (240, 320)
    radius = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.fftfreq(shape[1])[None])
    radius[0, 0] = 1.0
    phases = np.fft.fft2(rng.normal(size=shape))
    for exponent in (-2.0, -3.0):
        image = np.real(np.fft.ifft2(phases * radius ** (exponent / 2)))
        assert realism.slope(*realism.spectrum(image)) == pytest.approx(exponent, abs=0.25)


def test_contrast_of_a_marking_and_of_a_map_that_is_off() -> None:
    camera = Camera(
        "cam_front",
        800,
        450,
        np.array([[633.0, 0, 408], [0, 633.0, 245], [0, 0, 1]]),
        transform_from(np.array([1.7, 0, 1.5]), np.array([-0.5, 0.5, -0.5, 0.5])),
    )
    pose = transform_from_xyyaw(300.0, 400.0, 0.7) @ camera.base_from_camera
    # a white line 0.2 m wide on grey, 1.5 m to the left of the car
    across = transform_from_xyyaw(300.0, 400.0, 0.7)

    def at(x: float, y: float) -> np.ndarray:
        return (across @ np.array([x, y, 0, 1]))[:3]

    corners = np.array([at(4, 1.4), at(4, 1.6), at(40, 1.6), at(40, 1.4)])
    uvw = (inverse(pose) @ np.column_stack([corners, np.ones(4)]).T)[:3].T @ camera.intrinsics.T
    image = np.full((450, 800), 100, np.uint8)
    cv2.fillPoly(image, [np.round(uvw[:, :2] / uvw[:, 2:] * 16).astype(np.int32)], 160, shift=4)
    grey = image / 255
    found = realism.marking_contrast(grey, camera, pose, [LineString([at(5, 1.5)[:2], at(25, 1.5)[:2]])])
    near = found[(found[:, 0] > 5) & (found[:, 0] < 15)]
    assert len(near) > 15
    assert np.median(near[:, 1]) == pytest.approx(0.6, abs=0.06)
    # A map that is 0.25 m off misses the line, but finds it nearby.
    moved = realism.marking_contrast(grey, camera, pose, [LineString([at(5, 1.25)[:2], at(25, 1.25)[:2]])])
    moved = moved[(moved[:, 0] > 5) & (moved[:, 0] < 15)]
    assert abs(np.median(moved[:, 1])) < 0.15
    assert np.median(moved[:, 2]) == pytest.approx(0.6, abs=0.08)
    behind = [LineString([at(-9, 0)[:2], at(-5, 0)[:2]])]
    assert realism.marking_contrast(grey, camera, pose, behind).shape == (0, 3)


def test_what_differs_is_said_worst_first() -> None:
    table = {
        "alike": {"real": 1.0, "day": 1.1},
        "dull": {"real": 0.4, "day": 0.2},
        "loud": {"real": 0.1, "day": 0.9},
        "unknown": {"night": 3.0},
    }
    found, rest = realism.differences(table)
    assert [text.split(":")[0] for text in found] == ["loud", "dull"]
    assert "9.0 times the real value (0.9 against 0.1)" in found[0] and "50 % of" in found[1]
    assert rest == ["alike"]


def test_a_folder_without_frames_is_named(tmp_path: Path) -> None:
    with pytest.raises(NmpError, match="has no v1.0-"):
        realism.read_keyframes(tmp_path, 400)
