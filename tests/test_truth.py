"""Ground truth: our drawing against what the published evaluation code drew, and ``nmp truth``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nmp.citymap import CityMap
from nmp.cli import main
from nmp.errors import NmpError
from nmp.evaluation import CityMaps
from nmp.frame import CLASSES
from nmp.geometry import BevGrid
from nmp.metrics import IouMeter
from nmp.truth import MOST_INSTANCES, rasterize, rasterize_vectors, truth_lines

REAL = Path(__file__).resolve().parents[1] / ".." / "shared" / "real"
GEOGRAPHY = REAL / "geography"
REFERENCE_CLASSES = ("crossing", "divider", "boundary")
"""class order in the stored file"""
needs_real = pytest.mark.skipif(not (REAL / "reference_gt.npz").is_file(), reason="no real nuScenes material here")


@pytest.fixture(scope="module")
def reference() -> dict[str, NDArray[Any]]:
    """The stored rasters, masks unpacked and in our class order."""
    with np.load(REAL / "reference_gt.npz") as data:
        stored = {name: data[name] for name in data.files}
    order = [REFERENCE_CLASSES.index(name) for name in CLASSES]
    stored["masks"] = np.unpackbits(stored["masks"], axis=-1)[:, order]
    for name in ("shifted_intersection", "shifted_union"):
        stored[name] = stored[name][order]
    return stored


@needs_real
def test_agrees_with_the_published_rasters(reference: dict[str, NDArray[Any]]) -> None:
    maps = CityMaps(GEOGRAPHY)
    meter = IouMeter()
    for masks, location, pose in zip(reference["masks"], reference["location"], reference["poses"], strict=True):
        meter.add(rasterize(maps.city(str(location)), *pose), masks)
    scores = meter.percent()
    assert meter.frames == 24
    for name in CLASSES:
        assert scores[name] >= 99.0, scores


@needs_real
def test_counts_agree_with_the_published_counts(reference: dict[str, NDArray[Any]]) -> None:
    meter = IouMeter()
    for first, second in zip(reference["masks"], reference["masks"][1:], strict=False):
        meter.add(first, second)
    assert meter.intersection.tolist() == reference["shifted_intersection"].astype(int).tolist()
    assert meter.union.tolist() == reference["shifted_union"].astype(int).tolist()


@needs_real
def test_command_draws_the_published_rasters(reference: dict[str, NDArray[Any]], tmp_path: Path) -> None:
    poses = [
        {"location": str(location), "x": float(x), "y": float(y), "yaw": float(yaw)}
        for location, (x, y, yaw) in zip(reference["location"], reference["poses"], strict=True)
    ]
    (tmp_path / "poses.json").write_text(json.dumps(poses))
    out = tmp_path / "new" / "truth.npz"
    assert main(["truth", "--maps", str(GEOGRAPHY), "--poses", str(tmp_path / "poses.json"), "--out", str(out)]) == 0
    with np.load(out) as data:
        masks = data["masks"]
    assert masks.dtype == np.uint8 and masks.shape == (24, 3, 200, 400)
    meter = IouMeter()
    for drawn, stored in zip(masks, reference["masks"], strict=True):
        meter.add(drawn, stored)
    assert min(meter.percent().values()) >= 99.0


# ----------------------------------------------------------------------------------------- on a map made up here


def square_map(location: str = "boston-seaport") -> dict[str, Any]:
    """A straight road along x, 10 m wide, 100 m long, with a divider in the middle and a crossing at x = 10 to 14."""
    tables: dict[str, Any] = {name: [] for name in ("node", "line", "polygon", "road_divider", "lane_divider")}
    tables |= {name: [] for name in ("ped_crossing", "road_segment", "lane", "walkway")}

    def nodes(points: list[tuple[float, float]]) -> list[str]:
        tokens = []
        for x, y in points:
            tokens.append(f"n{len(tables['node'])}")
            tables["node"].append({"token": tokens[-1], "x": x, "y": y})
        return tokens

    def rectangle(layer: str, x0: float, y0: float, x1: float, y1: float) -> None:
        token = f"p{len(tables['polygon'])}"
        corners = nodes([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
        tables["polygon"].append({"token": token, "exterior_node_tokens": corners, "holes": []})
        tables[layer].append({"token": f"{layer}{token}", "polygon_token": token})

    tables["line"].append({"token": "l0", "node_tokens": nodes([(-50.0, 0.0), (50.0, 0.0)])})
    tables["road_divider"].append({"token": "d0", "line_token": "l0"})
    rectangle("road_segment", -50.0, -5.0, 50.0, 5.0)
    rectangle("ped_crossing", 10.0, -5.0, 14.0, 5.0)
    return tables


@pytest.fixture
def dataroot(tmp_path: Path) -> Path:
    folder = tmp_path / "maps" / "expansion"
    folder.mkdir(parents=True)
    (folder / "boston-seaport.json").write_text(json.dumps(square_map()))
    return tmp_path


def test_draws_in_the_ego_frame(dataroot: Path) -> None:
    city = CityMaps(dataroot).city("boston-seaport")
    divider, crossing, boundary = rasterize(city, 0.0, 0.0, 0.0)
    # y = 0 is the border between rows 99 and 100, truncated to 100; OpenCV draws 5 pixels and its round caps
    assert np.flatnonzero(divider[:, 200]).tolist() == list(range(97, 104))
    assert not divider[:97].any() and not divider[104:].any()
    assert crossing[:, : round((30 + 9) / 0.15)].sum() == 0 and crossing.any()  # ahead, not behind
    kerb_rows = np.flatnonzero(boundary[:, 100])
    assert set(kerb_rows) == {*range(63, 70), *range(130, 137)}  # y = -5 and 5 m
    # facing the other way, the crossing lies behind
    _, crossing, _ = rasterize(city, 0.0, 0.0, math.pi)
    assert crossing[:, 200:].sum() == 0 and crossing.any()
    # 4 m further left (in y), everything lies 4 m to the right: towards row 0
    divider, _, _ = rasterize(city, 0.0, 4.0, 0.0)
    assert abs(np.flatnonzero(divider[:, 200]).mean() - (100 - 4 / 0.15)) <= 1


def test_other_grids_and_empty_places(dataroot: Path) -> None:
    city = CityMaps(dataroot).city("boston-seaport")
    assert rasterize(city, 0.0, 0.0, 0.3, BevGrid(100.0, 100.0, 0.5)).shape == (3, 200, 200)
    nowhere = rasterize(city, 5000.0, 5000.0, 0.0)
    assert nowhere.shape == (3, 200, 400) and not nowhere.any()


@needs_real
def test_vectors_cover_what_is_drawn(reference: dict[str, NDArray[Any]]) -> None:
    maps = CityMaps(GEOGRAPHY)
    most = 0
    for location, pose in list(zip(reference["location"], reference["poses"], strict=True))[::3]:
        city = maps.city(str(location))
        instances, directions = rasterize_vectors(city, *pose)
        np.testing.assert_array_equal(instances > 0, rasterize(city, *pose))
        np.testing.assert_array_equal((instances > 0).any(axis=0), directions[0] > 0)
        assert directions.max() <= 36
        forward, backward = directions[:, directions[0] > 0].astype(int)
        assert ((forward - backward) % 36 == 18).all()
        most = max(most, int(instances.max()))
    assert most > 5


def test_lines_are_numbered_and_have_directions(dataroot: Path) -> None:
    city = CityMaps(dataroot).city("boston-seaport")
    lines = truth_lines(city, 0.0, 0.0, 0.0)
    assert [len(lines[name]) for name in CLASSES] == [1, 1, 2]  # two kerbs, cut at both ends of the region
    instances, directions = rasterize_vectors(city, 0.0, 0.0, 0.0)
    assert instances.dtype == directions.dtype == np.uint8
    assert instances.shape == (3, 200, 400) and directions.shape == (2, 200, 400)
    assert [np.unique(one).tolist() for one in instances] == [[0, 1], [0, 1], [0, 1, 2]]
    kerbs = instances[2, [66, 133], 100]
    assert set(kerbs.tolist()) == {1, 2} and (instances[2, :100] != kerbs[1]).all()
    assert set(directions[:, 100, 60].tolist()) == {1, 19}  # the divider: forward and back
    assert set(directions[:, 90, round((30 + 10) / 0.15)].tolist()) == {10, 28}  # the crossing's near edge: left, right
    assert not directions[:, 30].any()


@pytest.mark.parametrize(("yaw_deg", "expected"), [(0, {1, 19}), (-30, {4, 22}), (-34, {4, 22}), (-36, {5, 23})])
def test_directions_turn_with_the_ego(dataroot: Path, yaw_deg: float, expected: set[int]) -> None:
    """Turned to the right, the ego sees the road run off to its left."""
    city = CityMaps(dataroot).city("boston-seaport")
    instances, directions = rasterize_vectors(city, -20.0, 0.0, math.radians(yaw_deg))
    alone = (instances[0] > 0) & ~(instances[1:] > 0).any(axis=0)
    assert alone.sum() > 500
    assert set(np.unique(directions[:, alone]).tolist()) == expected


def test_too_many_lines_are_refused() -> None:
    tables = square_map()
    for i in range(MOST_INSTANCES):
        tables["road_divider"].append({"token": f"more{i}", "line_token": "l0"})
    city = CityMap.from_tables(tables, "boston-seaport")
    with pytest.raises(NmpError, match="256 divider lines around x 0.0 m"):
        rasterize_vectors(city, 0.0, 0.0, 0.0)


GOOD = {"location": "boston-seaport", "x": 0.0, "y": 0.0, "yaw": 0.0}


@pytest.mark.parametrize(
    ("poses", "said"),
    [
        ([GOOD, {k: v for k, v in GOOD.items() if k != "yaw"}], ("pose 1", "'yaw'")),
        ([GOOD | {"x": float("nan")}], ("pose 0", "'x'", "nan")),
        ([GOOD, GOOD, GOOD | {"y": float("inf")}], ("pose 2", "'y'", "inf")),
        ([GOOD | {"x": "12"}], ("pose 0", "'x'", "'12'")),
        ([GOOD | {"yaw": True}], ("pose 0", "'yaw'", "True")),
        ([GOOD | {"yaw": None}], ("pose 0", "'yaw'", "None")),
        ([GOOD | {"location": 7}], ("pose 0", "'location'", "7")),
        ([GOOD, GOOD | {"location": "atlantis"}], ("pose 1", "atlantis", "map expansion")),
        ([GOOD, [1, 2, 3]], ("pose 1", "not an object")),
        ([], ("no poses",)),
        ({"poses": [GOOD]}, ("holds no list",)),
    ],
)
def test_bad_poses_are_named(
    dataroot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], poses: Any, said: tuple[str, ...]
) -> None:
    (tmp_path / "poses.json").write_text(json.dumps(poses))
    out = tmp_path / "truth.npz"
    assert main(["truth", "--maps", str(dataroot), "--poses", str(tmp_path / "poses.json"), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nmp: error: ") and error.count("\n") == 1
    for text in said:
        assert text in error
    assert not out.exists()


def test_bad_files_are_named(dataroot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    poses = tmp_path / "poses.json"
    arguments = ["--poses", str(poses), "--out", str(tmp_path / "truth.npz")]
    assert main(["truth", "--maps", str(dataroot), *arguments]) == 2
    assert f"cannot read {poses}" in capsys.readouterr().err
    poses.write_text("[{]")
    assert main(["truth", "--maps", str(dataroot), *arguments]) == 2
    assert "not valid JSON" in capsys.readouterr().err
    poses.write_text(json.dumps([GOOD]))
    assert main(["truth", "--maps", str(tmp_path / "nothing"), *arguments]) == 2
    assert "does not exist" in capsys.readouterr().err
