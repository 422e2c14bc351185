"""The cameras' mounting from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nmp.errors import NmpError
from nmp.extrinsics import read_extrinsics

GOOD = "front: {translation: [1.7, 0.1, 1.5], rotation: [-0.5, 0.5, -0.5, 0.5]}\n"


def test_a_camera_that_looks_ahead(tmp_path: Path) -> None:
    path = tmp_path / "mounting.yaml"
    path.write_text(GOOD)
    transform = read_extrinsics(path, ["front"])["front"]
    # a point 10 m in front of the lens, 1 m to the right of its axis and 2 m below it
    np.testing.assert_allclose(transform @ [1.0, 2.0, 10.0, 1.0], [11.7, -0.9, -0.5, 1.0], atol=1e-9)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (GOOD, "mounting of rear"),
        ("rear: {translation: [1, 2], rotation: [0, 0, 0, 1]}", "a length is wrong"),
        ("rear: {translation: [1, 2, x], rotation: [0, 0, 0, 1]}", "rear"),
        ("rear: {translation: [1, 2, 3], rotation: [0, 0, 0, 0]}", "zero quaternion"),
        ("rear: {translation: [1, 2, .nan], rotation: [0, 0, 0, 1]}", "not finite"),
        ("- a list", "rear"),
        ("", "rear"),
        ("rear: [", "cannot read"),
        ("rear: !!python/object/apply:os.system [ls]", "cannot read"),
    ],
)
def test_what_cannot_be_used_is_said(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "mounting.yaml"
    path.write_text(text)
    with pytest.raises(NmpError, match=part):
        read_extrinsics(path, ["rear"])
    with pytest.raises(NmpError, match="cannot read"):
        read_extrinsics(tmp_path / "nowhere.yaml", ["rear"])
