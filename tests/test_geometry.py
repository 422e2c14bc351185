"""Transforms and the BEV grid."""

import math

import numpy as np
import pytest

from nmp.errors import NmpError
from nmp.geometry import (
    BevGrid,
    flatten_to_plane,
    interpolate,
    inverse,
    quaternion_of,
    transform_from,
    transform_from_xyyaw,
    yaw_of,
)


def test_transform_and_quaternion_are_inverse_of_each_other() -> None:
    quaternion = np.array([0.1, -0.2, 0.3, 0.9])
    quaternion /= np.linalg.norm(quaternion)
    pose = transform_from(np.array([1.0, 2.0, 3.0]), quaternion)
    np.testing.assert_allclose(quaternion_of(pose), quaternion, atol=1e-12)
    np.testing.assert_allclose(pose @ inverse(pose), np.eye(4), atol=1e-12)


def test_yaw_turns_x_towards_y() -> None:
    pose = transform_from_xyyaw(5.0, -1.0, math.pi / 2)
    np.testing.assert_allclose(pose @ [1, 0, 0, 1], [5, 0, 0, 1], atol=1e-12)
    assert yaw_of(pose) == pytest.approx(math.pi / 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_pose_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(NmpError, match="not finite"):
        transform_from(np.array([bad, 0, 0]), np.array([0, 0, 0, 1.0]))
    with pytest.raises(NmpError, match="zero quaternion"):
        transform_from(np.zeros(3), np.zeros(4))


def test_interpolation_takes_the_short_way_round() -> None:
    first, second = transform_from_xyyaw(0, 0, 3.0), transform_from_xyyaw(2, 4, -3.0)
    middle = interpolate(first, second, 0.5)
    np.testing.assert_allclose(middle[:2, 3], [1, 2])
    assert abs(yaw_of(middle)) == pytest.approx(math.pi)
    np.testing.assert_allclose(interpolate(first, second, 0.0), first, atol=1e-12)
    np.testing.assert_allclose(interpolate(first, second, 1.0), second, atol=1e-12)


def test_flattening_keeps_place_and_heading_only() -> None:
    tilted = transform_from(np.array([1.0, 2.0, 9.0]), np.array([0.01, 0.02, math.sin(0.4), math.cos(0.4)]))
    flat = flatten_to_plane(tilted)
    assert flat[2, 3] == 0
    assert yaw_of(flat) == pytest.approx(yaw_of(tilted))
    np.testing.assert_allclose(flat[2, :3], [0, 0, 1])


def test_grid_starts_at_the_rear_right_corner() -> None:
    grid = BevGrid()
    assert grid.shape == (200, 400)
    centres = grid.centres()
    np.testing.assert_allclose(centres[0, 0], [-29.925, -14.925])
    np.testing.assert_allclose(centres[-1, -1], [29.925, 14.925])
    assert grid.with_resolution(0.3).shape == (100, 200)
