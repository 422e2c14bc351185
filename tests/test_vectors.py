"""From the layers of a drive to the vector map of a city, in files that their own readers load."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from PIL import Image
from shapely import affinity
from shapely.geometry import LineString, Polygon, shape

from nmp.cli import main
from nmp.errors import NmpError
from nmp.frame import CLASSES, LocalMap
from nmp.geometry import BevGrid
from nmp.layers import LayerWriter
from nmp.vectors.city import city_elements, raster_of
from nmp.vectors.elements import MapElement
from nmp.vectors.geo import ORIGINS, Origin, origin_of, to_wgs84
from nmp.vectors.geojson import feature_collection
from nmp.vectors.lanelet import write_lanelet2
from nmp.vectors.raster import TILE_PX, CityRaster
from tests.test_tracker import START_NS, local_map

AT = (1000.0, 600.0)
"""where the street is, in the map of the city, m; corners of four tiles are 30 m away"""
LENGTH = 140.0
STREET: dict[str, list[list[tuple[float, float]]]] = {
    "divider": [[(-40, 0), (180, 0)]],
    "crossing": [[(50, -6), (54, -6), (54, 6), (50, 6), (50, -6)]],
    "boundary": [[(-40, -7), (180, -7)], [(-40, 7), (60, 7), (180, 14)]],
}
LOCATION = "boston-seaport"


def there(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A street drawn from its own origin, turned by 0.3 rad and laid into the city."""
    line = affinity.rotate(LineString(points), 0.3, origin=(0, 0), use_radians=True)
    return list(affinity.translate(line, *AT).coords)


CITY = {name: [there(line) for line in lines] for name, lines in STREET.items()}


def drive(begin_s: float = 0.0, location: str = LOCATION, step: float = 5.0, offset: float = 0.0) -> list[LocalMap]:
    """The layers of a drive along the street, with the last ones in the other direction."""
    out = []
    for k, along in enumerate(np.arange(0.0, LENGTH, step)):
        ((x, y),) = there([(along, offset), (along + 1, offset)])[:1]
        yaw = 0.3 if along < 0.7 * LENGTH else 0.3 + np.pi
        out.append(local_map(begin_s + 0.5 * k, x, y, yaw, CITY, location, evidence=1.0))
    return out


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers")
    for seen in drive():
        LayerWriter(folder).write(seen)
    return folder


@pytest.fixture(scope="module")
def elements(layers: Path) -> list[MapElement]:
    with CityRaster() as raster:
        raster_of([layers], raster)
        return city_elements(raster)


def of(elements: Sequence[MapElement], name: str) -> list[MapElement]:
    return [e for e in elements if e.name == name]


# -------------------------------------------------------------------------------------------------------- the map


def test_a_street_over_several_tiles_is_one_map(elements: list[MapElement]) -> None:
    assert {name: len(of(elements, name)) for name in CLASSES} == {"divider": 1, "crossing": 1, "boundary": 2}
    assert [e.id for e in elements] == [1, 2, 3, 4]
    truth = {name: [LineString(line) for line in lines] for name, lines in CITY.items()}
    for element in elements:
        ring = element.geometry.exterior if element.name == "crossing" else element.geometry
        points = shapely.points(shapely.get_coordinates(shapely.segmentize(ring, 0.5)))
        nearest = min(shapely.distance(points, line).max() for line in truth[element.name])
        assert nearest < 0.45
        # from 30 m behind the first pose to 30 m before the last one
        assert ring.length > (30 if element.name == "crossing" else LENGTH + 40)
    crossing, drawn = of(elements, "crossing")[0].geometry, Polygon(CITY["crossing"][0])
    assert crossing.intersection(drawn).area / crossing.union(drawn).area > 0.85


def test_an_element_knows_when_and_how_often_it_was_seen(elements: list[MapElement]) -> None:
    divider, crossing = of(elements, "divider")[0], of(elements, "crossing")[0]
    assert divider.first_seen_ns == START_NS and divider.last_seen_ns == drive()[-1].stamp_ns
    # a frame every 5 m, each sees 60 m
    assert crossing.frames == pytest.approx(12, abs=1)
    assert crossing.first_seen_ns == START_NS + 4 * 500_000_000  # from 20 m on, it is less than 30 m ahead
    assert crossing.traversals == 1 and crossing.confidence > 0.7
    assert all(0.5 < e.confidence <= 0.9 for e in elements)


def test_a_second_drive_is_a_second_traversal(layers: Path, tmp_path: Path) -> None:
    for seen in drive(3600.0, step=10.0, offset=1.5):
        LayerWriter(tmp_path).write(seen)
    with CityRaster() as raster:
        raster_of([tmp_path, layers], raster)  # in any order
        found = city_elements(raster)
    assert {e.traversals for e in found} == {2}
    assert of(found, "crossing")[0].frames == pytest.approx(18, abs=1)
    assert of(found, "divider")[0].first_seen_ns == START_NS and of(found, "divider")[0].age_s > 3600


def test_memory_is_bounded_and_nothing_is_lost(elements: list[MapElement]) -> None:
    with CityRaster(resident=2) as raster:
        for seen in drive():
            raster.add(seen)
            assert len(raster._tiles) <= 2
        assert len(raster.tiles) > 4
        found = city_elements(raster)
        folder = Path(raster._folder.name)
        assert any(folder.iterdir())
    assert not folder.exists()
    assert [(e.id, e.name, e.frames, e.confidence) for e in found] == [
        (e.id, e.name, e.frames, e.confidence) for e in elements
    ]
    assert all(a.geometry.equals(b.geometry) for a, b in zip(found, elements, strict=True))


def test_the_raster_is_the_mean_of_what_was_drawn() -> None:
    with CityRaster() as raster:
        raster.add(local_map(0.0, *AT, 0.3, {"divider": [[(AT[0] - 50, AT[1]), (AT[0] + 50, AT[1])]]}))
        raster.add(local_map(0.5, *AT, 0.3, {}))
        here, beside, outside = np.array([AT, (AT[0], AT[1] + 5.0), (AT[0], AT[1] + 100.0)])[:, None]
        assert raster.probability(here, 0) == pytest.approx(0.45, abs=0.02)
        assert raster.probability(beside, 0) == 0.0 and raster.seen(beside).frames.tolist() == [2]
        assert raster.probability(outside, 0) == 0.0 and raster.seen(outside).frames.tolist() == [0]
        # of two views, the one from nearby counts more
        raster.add(local_map(1.0, AT[0] - 20.0, AT[1], 0.0, {"divider": [[(AT[0] - 50, AT[1]), (AT[0] + 50, AT[1])]]}))
        assert 0.45 < raster.probability(here, 0) < 0.57
        view = raster.overview(200)
        row, col = ((np.array(AT)[::-1] - view.corner[::-1]) / view.resolution).astype(int)
        assert view.probabilities[0, row - 1 : row + 2, col].max() > 0.3 and view.seen[row, col] == 1
        assert max(view.seen.shape) <= 200 and view.resolution * view.seen.shape[0] % (TILE_PX * 0.15) < 1e-6


def test_cells_that_were_never_seen_do_not_count() -> None:
    with CityRaster() as raster:
        raster.add(local_map(0.0, *AT, 0.3, CITY))
        raster.add(local_map(0.5, *AT, 0.3, CITY, evidence=0.0))
        assert raster.seen(np.array([AT])).frames.tolist() == [1]


# ------------------------------------------------------------------------------------------------------- on Earth


def earth(points: Sequence[tuple[float, float]], origin: Origin) -> list[shapely.Point]:
    """Points of a map frame on Earth, each by way of a line from the origin."""
    return [shapely.Point(to_wgs84(LineString([(0, 0), p]), origin).coords[1]) for p in points]


def test_origins_are_those_of_the_devkit() -> None:
    script = pytest.importorskip("nuscenes.scripts.export_poses")
    assert {name: list(origin) for name, origin in ORIGINS.items()} == script.REFERENCE_COORDINATES
    # The devkit takes the Earth for a sphere: less than 0.7 % of the way from the origin apart.
    there = script.derive_latlon(LOCATION, [{"timestamp": 0, "translation": (1000.0, 600.0, 0.0)}])[0]
    point = earth([(1000.0, 600.0)], ORIGINS[LOCATION])[0]
    apart = np.hypot(
        (point.y - there["latitude"]) * 111_000, (point.x - there["longitude"]) * 111_000 * np.cos(np.radians(42.3))
    )
    assert apart < 0.007 * np.hypot(1000, 600)


def test_a_map_frame_is_laid_on_the_ellipsoid() -> None:
    pyproj = pytest.importorskip("pyproj")
    origin = ORIGINS["singapore-queenstown"]
    ends = earth([(0, 0), (3000, 0), (0, 3000), (3000, 3600)], origin)
    assert (ends[0].y, ends[0].x) == (pytest.approx(origin.latitude), pytest.approx(origin.longitude))
    globe = pyproj.Geod(ellps="WGS84")
    for end, (azimuth, distance) in zip(
        ends[1:], ((90, 3000), (0, 3000), (np.degrees(np.arctan2(3000, 3600)), np.hypot(3000, 3600))), strict=True
    ):
        found = globe.inv(origin.longitude, origin.latitude, end.x, end.y)
        assert found[0] == pytest.approx(azimuth, abs=1e-6) and found[2] == pytest.approx(distance, abs=1e-4)


def test_unknown_places_need_an_origin() -> None:
    assert origin_of("my-town", (48.1, 11.5)) == Origin(48.1, 11.5)
    with pytest.raises(NmpError, match="'my-town' lies: give --origin LAT LON, or --crs map"):
        origin_of("my-town")
    for wrong in ((91.0, 0.0), (0.0, 181.0), (float("nan"), 0.0)):
        with pytest.raises(NmpError, match="give latitude and longitude in degrees"):
            origin_of(LOCATION, wrong)


# ---------------------------------------------------------------------------------------------------------- files


def test_geojson_keeps_to_the_rfc(elements: list[MapElement]) -> None:
    origin = ORIGINS[LOCATION]
    collection = json.loads(json.dumps(feature_collection(elements, LOCATION, origin)))
    assert collection["type"] == "FeatureCollection" and "crs" not in collection
    assert collection["nmp"]["origin"] == {"latitude": origin.latitude, "longitude": origin.longitude}
    for feature, element in zip(collection["features"], elements, strict=True):
        assert (feature["type"], feature["id"]) == ("Feature", element.id)
        back = shape(feature["geometry"])
        assert back.is_valid and back.geom_type == element.geometry.geom_type
        expected = to_wgs84(element.geometry, origin)
        assert back.hausdorff_distance(expected) < 2e-8  # degrees; 2 mm
        assert -72 < back.centroid.x < -70 and 42 < back.centroid.y < 43
        if back.geom_type == "Polygon":
            assert back.exterior.is_ccw
        said = feature["properties"]
        assert said["class"] == element.name and said["frames"] == element.frames
        assert said["confidence"] == round(element.confidence, 3) and said["traversals"] == 1
        assert said["first_seen"].startswith("2017-07-14T02:40:") and said["first_seen"].endswith("Z")


def test_geojson_in_metres_says_so(elements: list[MapElement]) -> None:
    collection = feature_collection(elements, LOCATION, None)
    assert "m: x east" in collection["nmp"]["coordinates"] and "origin" not in collection["nmp"]
    for feature, element in zip(collection["features"], elements, strict=True):
        assert shape(feature["geometry"]).hausdorff_distance(element.geometry) < 2e-3


def test_lanelet2_reads_what_was_written(elements: list[MapElement], tmp_path: Path) -> None:
    lanelet2: Any = pytest.importorskip("lanelet2")
    from lanelet2 import io, projection

    assert lanelet2
    roundabout = LineString([(0, 0), (8, 0), (8, 8), (0, 8), (0, 0)])
    ring = MapElement(9, "boundary", affinity.translate(roundabout, *AT), 0.8, START_NS, START_NS, 1, 1)
    path = tmp_path / "new" / "map.osm"
    write_lanelet2(path, [*elements, ring], LOCATION, ORIGINS[LOCATION])
    projector = projection.LocalCartesianProjector(io.Origin(*ORIGINS[LOCATION]))
    city, errors = io.loadRobust(str(path), projector)
    assert not list(errors)
    lines = {line.id: line for line in city.lineStringLayer}
    areas = {area.id: area for area in city.areaLayer}
    kinds = {"divider": "line_thin", "boundary": "road_border"}
    for element in (*elements, ring):
        tags = (areas if element.name == "crossing" else lines)[element.id].attributes
        assert tags["nmp:class"] == element.name and tags["nmp:frames"] == str(element.frames)
        if element.name == "crossing":
            area = areas[element.id]
            assert (tags["type"], tags["subtype"]) == ("multipolygon", "crosswalk")
            assert {side.attributes["type"] for side in area.outerBound} == {"pedestrian_marking"}
            back: Any = Polygon([(p.x, p.y) for p in area.outerBoundPolygon()])
            assert not back.exterior.is_ccw
        else:
            assert tags["type"] == kinds[element.name] and "subtype" not in tags
            back = LineString([(p.x, p.y) for p in lines[element.id]])
        # the points of the map frame again
        assert back.hausdorff_distance(element.geometry) < 1e-3
    assert lines[9][0].id == lines[9][len(lines[9]) - 1].id
    assert [p.name for p in path.parent.iterdir()] == ["map.osm"]


# -------------------------------------------------------------------------------------------------------- command


def vectors(*arguments: object) -> int:
    return main(["vectors", *(str(a) for a in arguments)])


def test_the_command_writes_a_map_and_its_picture(
    layers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "map.geojson", tmp_path / "map.png"
    assert vectors(layers, "--out", out, "--picture", picture) == 0
    said = capsys.readouterr().out
    assert "1 x divider (" in said and "2 x boundary (" in said and "from 28 frames of boston-seaport" in said
    assert len(json.loads(out.read_text())["features"]) == 4
    with Image.open(picture) as drawn:
        assert max(drawn.size) <= 1800 and len(drawn.getcolors(2**20) or ()) > 20
    first = out.read_bytes()
    assert vectors(layers, "--out", out) == 0 and out.read_bytes() == first
    assert vectors(layers, "--out", out, "--crs", "map", "--least-confidence", "0.95") == 0
    assert json.loads(out.read_text())["features"] == []


def test_wrong_input_is_one_message(layers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: object) -> str:
        assert vectors(*arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("nmp: error: ")
        return lines[0]

    out = tmp_path / "map.geojson"
    (tmp_path / "empty").mkdir()
    assert "no layers in" in error(tmp_path / "empty", "--out", out)
    assert "no layers in" in error(layers, tmp_path / "nowhere", "--out", out)
    elsewhere = drive(9.0, "singapore-onenorth")[0]
    LayerWriter(tmp_path / "other").write(elsewhere)
    assert "two cities, boston-seaport and singapore-onenorth" in error(layers, tmp_path / "other", "--out", out)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "1.npz").write_bytes(b"PK nothing")
    assert "1.npz is not a layer file" in error(tmp_path / "foreign", "--out", out)
    np.savez(tmp_path / "foreign" / "1.npz", x=np.zeros(3))
    assert "1.npz is not a layer file" in error(tmp_path / "foreign", "--out", out)
    lost = LocalMap(**{**vars(elsewhere), "map_from_base": np.full((4, 4), np.nan)})
    LayerWriter(tmp_path / "lost").write(lost)
    assert "pose is not finite" in error(tmp_path / "lost", "--out", out)
    coarse = LocalMap(**{**vars(elsewhere), "grid": BevGrid(60.0, 30.0, 0.0)})
    LayerWriter(tmp_path / "coarse").write(coarse)
    assert "cells of 0 m are too small" in error(tmp_path / "coarse", "--out", out)
    LayerWriter(tmp_path / "mixed").write(local_map(9.5, *AT, city=CITY, location=LOCATION))
    half = local_map(9.6, *AT, city=CITY, location=LOCATION)
    cells = half.probabilities[:, ::2, ::2]
    LayerWriter(tmp_path / "mixed").write(
        LocalMap(
            **{**vars(half), "grid": BevGrid(60, 30, 0.3), "probabilities": cells, "evidence": half.evidence[::2, ::2]}
        )
    )
    assert "layers of 0.15 m and of 0.3 m a cell" in error(tmp_path / "mixed", "--out", out)
    (tmp_path / "file").write_text("")
    assert "cannot write" in error(layers, "--out", tmp_path / "file" / "map.geojson")
    assert "cannot write the picture" in error(layers, "--out", out, "--picture", tmp_path / "file" / "map.png")
    assert "must end in .geojson, .json or .osm" in error(layers, "--out", tmp_path / "map.shp")
    assert "leave --crs map out" in error(layers, "--out", tmp_path / "map.osm", "--crs", "map")
    assert "give a share from 0 to 1" in error(layers, "--out", out, "--least-confidence", "7")
    LayerWriter(tmp_path / "town").write(drive(location="my-town")[0])
    assert "'my-town' lies: give --origin" in error(tmp_path / "town", "--out", out)


def test_a_lanelet2_map_that_cannot_be_written(
    layers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lanelet2")
    (tmp_path / "file").write_text("")
    assert vectors(layers, "--out", tmp_path / "file" / "map.osm") == 2
    assert "cannot write" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lanelet2", None)
    assert vectors(layers, "--out", tmp_path / "map.osm") == 2
    assert "pip install 'neural-map-prior[lanelet2]'" in capsys.readouterr().err
    assert not (tmp_path / "map.osm").exists()
