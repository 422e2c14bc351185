"""The map reader: what it refuses, and the same geometry as the official devkit's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import shapely
from shapely.geometry import box

from nmp.citymap import CityMap
from nmp.errors import NmpError
from nmp.frame import LOCATIONS
from tests.test_truth import GEOGRAPHY, square_map


def _write(dataroot: Path, text: str) -> None:
    folder = dataroot / "maps" / "expansion"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "boston-seaport.json").write_text(text)


@pytest.mark.skipif(not GEOGRAPHY.is_dir(), reason="no real nuScenes material here")
@pytest.mark.parametrize("location", LOCATIONS)
def test_same_geometry_as_the_devkit(location: str) -> None:
    from nuscenes.map_expansion.map_api import NuScenesMap

    ours = CityMap.load(GEOGRAPHY, location)
    official = NuScenesMap(dataroot=str(GEOGRAPHY), map_name=location)

    for layer, found in {"road_divider": ours.road_dividers, "lane_divider": ours.lane_dividers}.items():
        lines = [official.extract_line(r["line_token"]) for r in getattr(official, layer)]
        assert _same(found.geometries, [line for line in lines if not line.is_empty]), layer
    for layer, found in {
        "ped_crossing": ours.crossings,
        "road_segment": ours.road_segments,
        "lane": ours.lanes,
        "walkway": ours.walkways,
    }.items():
        shapes = [official.extract_polygon(r["polygon_token"]) for r in getattr(official, layer)]
        assert _same(found.geometries, [shape for shape in shapes if shape.is_valid]), layer


def _same(ours: tuple[Any, ...], theirs: list[Any]) -> bool:
    return len(ours) == len(theirs) and all(shapely.equals_exact(a, b, 1e-9) for a, b in zip(ours, theirs, strict=True))


def test_holes_and_neighbourhood() -> None:
    tables = square_map()
    hole = [{"token": f"h{i}", "x": x, "y": y} for i, (x, y) in enumerate([(0, 0), (0, 1), (1, 1), (1, 0)])]
    tables["node"] += hole
    tables["polygon"][0]["holes"] = [{"node_tokens": [n["token"] for n in hole]}]
    city = CityMap.from_tables(tables, "boston-seaport")
    assert city.road_segments.geometries[0].area == pytest.approx(1000 - 1)
    assert len(city.crossings.near(box(0, 0, 30, 30))) == 1
    assert city.crossings.near(box(20, 0, 30, 30)) == []


def test_invalid_polygons_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    tables = square_map()
    tables["polygon"][0]["exterior_node_tokens"][:2] = reversed(tables["polygon"][0]["exterior_node_tokens"][:2])
    city = CityMap.from_tables(tables, "boston-seaport")
    assert city.road_segments.geometries == () and len(city.crossings.geometries) == 1
    assert "1 invalid road_segment" in caplog.text


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(NmpError, match="no map expansion for boston-seaport.*Download"):
        CityMap.load(tmp_path, "boston-seaport")
    for text in ('{"node": [', "[]", '{"node": []}', '{"node": [{"token": "a"}]}'):
        _write(tmp_path, text)
        with pytest.raises(NmpError, match="boston-seaport.json is not .*again"):
            CityMap.load(tmp_path, "boston-seaport")
    tables = square_map()
    tables["line"][0]["node_tokens"] = ["n0", "unknown"]
    _write(tmp_path, json.dumps(tables))
    with pytest.raises(NmpError, match="unknown"):
        CityMap.load(tmp_path, "boston-seaport")
