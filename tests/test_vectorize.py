"""From layers to map elements."""

from __future__ import annotations

import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from shapely.geometry import LineString, Polygon

from nmp.errors import NmpError
from nmp.frame import CLASSES
from nmp.geometry import BevGrid
from nmp.vectorize import VectorElement, thin, vectorize

GRID = BevGrid()
REAL = Path(__file__).resolve().parents[1] / ".." / "shared" / "real"
DIVIDER, CROSSING, BOUNDARY = range(3)


def layers(**lines: list[list[tuple[float, float]]]) -> NDArray[np.float32]:
    """Draw lines (ego frame, m) by class as wide as the truth is, with a soft rim."""
    out = np.zeros((3, *GRID.shape), np.uint8)
    for name, found in lines.items():
        for points in found:
            pixels = (np.array(points) + [GRID.length / 2, GRID.width / 2]) / GRID.resolution
            cv2.polylines(out[CLASSES.index(name)], [pixels.astype(np.int32)], False, 1, 5)
    return np.stack([cv2.GaussianBlur(0.9 * layer.astype(np.float32), (5, 5), 1.0) for layer in out])


def only(elements: list[VectorElement]) -> VectorElement:
    assert len(elements) == 1, elements
    return elements[0]


def test_a_line_comes_back_where_it_was_drawn() -> None:
    drawn = LineString([(-25, -3), (0, -3), (20, 4)])
    element = only(vectorize(layers(divider=[list(drawn.coords)])))
    assert element.name == "divider"
    assert element.geometry.hausdorff_distance(drawn) < 0.45
    assert element.geometry.length == pytest.approx(drawn.length, abs=0.8)
    assert len(element.geometry.coords) < 12  # simplified
    assert element.score == pytest.approx(0.9, abs=0.03)


def test_lines_reach_the_edge_of_the_region() -> None:
    element = only(vectorize(layers(boundary=[[(-40, 5), (40, 5)]])))
    x = np.array(element.geometry.coords)[:, 0]
    assert x.min() < -29.8 and x.max() > 29.8


def test_score_is_the_mean_probability_along_the_line() -> None:
    picture = layers(divider=[[(-20, 0), (20, 0)]])
    picture[:, :, : GRID.cols // 2] *= 0.7
    assert only(vectorize(picture)).score == pytest.approx(0.9 * 0.85, abs=0.03)


@pytest.mark.parametrize(("gap", "count"), [(2.0, 1), (5.0, 2)])
def test_gaps_are_bridged_when_they_are_short(gap: float, count: int) -> None:
    elements = vectorize(layers(divider=[[(-20, 0), (-gap / 2 - 0.3, 0)], [(gap / 2 + 0.3, 0), (20, 0)]]))
    assert len(elements) == count
    assert sum(e.geometry.length for e in elements) == pytest.approx(40 if count == 1 else 40 - gap, abs=1.2)


def test_lines_side_by_side_or_around_a_corner_are_not_joined() -> None:
    assert len(vectorize(layers(divider=[[(-20, 0), (-1, 0)], [(1, 1.6), (20, 1.6)]]))) == 2
    assert len(vectorize(layers(divider=[[(-20, 0), (-1, 0)], [(0, 1), (0, 14)]]))) == 2


def test_straight_on_through_a_fork_is_one_line() -> None:
    elements = vectorize(layers(boundary=[[(-20, 0), (20, 0)], [(0, 0), (0, 12)]]))
    assert sorted(round(e.geometry.length) for e in elements) == [12, 40]


def test_spurs_are_cut_off() -> None:
    element = only(vectorize(layers(divider=[[(-20, 0), (20, 0)], [(3, 0), (3, 0.9)]])))
    assert element.geometry.length == pytest.approx(40.0, abs=0.6)


def test_a_star_that_is_all_spurs_is_nothing() -> None:
    found = np.zeros((3, *GRID.shape), np.float32)
    for k in range(5):  # a cross of five pixels to either side, the only thing in its layer
        found[0, 50, [60 - k, 60 + k]] = found[0, [50 - k, 50 + k], 60] = 1.0
    assert vectorize(found, GRID) == []


def test_a_closed_line_is_a_ring() -> None:
    square = [(0, 0), (8, 0), (8, 8), (0, 8), (0, 0)]
    element = only(vectorize(layers(boundary=[square])))
    assert element.geometry.is_ring
    assert Polygon(element.geometry).area == pytest.approx(64.0, rel=0.05)


def test_crossings_are_polygons() -> None:
    outline = [(5, -6), (9, -6), (9, 6), (5, 6), (5, -6)]
    element = only(vectorize(layers(crossing=[outline])))
    both = element.geometry.intersection(Polygon(outline)).area
    assert both / element.geometry.union(Polygon(outline)).area > 0.9


@pytest.mark.parametrize(
    "outline",
    [
        # cut off by the left edge of the region
        [(5, 14.9), (5, 7), (9, 7), (9, 14.9)],
        # one side is missing
        [(5, 6), (5, -6), (9, -6), (9, 6)],
    ],
)
def test_outlines_that_are_open_become_polygons_too(outline: list[tuple[float, float]]) -> None:
    element = only(vectorize(layers(crossing=[outline])))
    assert element.geometry.intersection(Polygon(outline)).area / element.geometry.union(Polygon(outline)).area > 0.85


def test_a_filled_crossing_is_a_polygon_and_a_stroke_is_none() -> None:
    picture = layers(crossing=[[(-20, 0), (-10, 0)]])
    picture[CROSSING, 60:140, 250:280] = 0.8
    element = only(vectorize(picture))
    assert element.geometry.area == pytest.approx(80 * 30 * 0.15**2, rel=0.3)


def test_what_a_ring_of_crossings_encloses_is_no_crossing() -> None:
    outer = [(-9, -9), (9, -9), (9, 9), (-9, 9), (-9, -9)]
    inner = [(0.66 * x, 0.66 * y) for x, y in outer]
    ring = [[outer[k], inner[k]] for k in range(4)]
    elements = vectorize(layers(crossing=[outer, inner, *ring]))
    assert len(elements) == 4 and all(e.geometry.area < 60 for e in elements)


def test_touching_lines_are_told_apart_by_their_embeddings() -> None:
    picture = layers(divider=[[(-20, 0), (20, 0)]])
    assert len(vectorize(picture)) == 1
    embedding = np.zeros((4, *GRID.shape), np.float32)
    embedding[2, :, GRID.cols // 2 :] = 3.0
    parts = vectorize(picture, embedding=embedding)
    assert sorted(round(e.geometry.length) for e in parts) == [20, 20]


def test_thin_keeps_the_pieces_and_leaves_lines_of_one_pixel() -> None:
    mask = (layers(boundary=[[(-20, 0), (20, 3)], [(-20, 8), (-5, -9), (10, 8)]])[BOUNDARY] > 0.5).astype(np.uint8)
    skeleton = thin(mask)
    assert not (skeleton & ~mask).any()
    assert cv2.connectedComponents(skeleton)[0] == cv2.connectedComponents(mask)[0]
    blocks = skeleton[1:, 1:] & skeleton[:-1, 1:] & skeleton[1:, :-1] & skeleton[:-1, :-1]
    assert blocks.sum() <= 2  # at a junction at most


def test_empty_layers_have_no_elements_and_wrong_ones_are_refused() -> None:
    assert vectorize(np.zeros((3, *GRID.shape), np.float32)) == []
    with pytest.raises(NmpError, match=r"shape \(3, 100, 200\) do not fit the grid: give \(3, 200, 400\)"):
        vectorize(np.zeros((3, 100, 200), np.float32))
    with pytest.raises(NmpError, match="embedding of shape"):
        vectorize(np.zeros((3, *GRID.shape), np.float32), embedding=np.zeros((4, 100, 200), np.float32))


def test_layers_of_an_untrained_network_take_no_age() -> None:
    noise = np.random.default_rng(0).random((3, *GRID.shape)).astype(np.float32)
    blobs = np.stack([cv2.GaussianBlur(layer, (0, 0), 1.0) for layer in noise])
    start = time.process_time()
    elements = vectorize(blobs, threshold=0.5)
    assert time.process_time() - start < 4.0
    assert all(e.geometry.is_valid and np.isfinite(e.score) for e in elements)


@pytest.mark.skipif(not (REAL / "reference_gt.npz").is_file(), reason="no real nuScenes material here")
def test_perfect_layers_of_real_streets_give_the_true_elements() -> None:
    from nmp.evaluation import CityMaps
    from nmp.metrics import Breakdown
    from nmp.truth import rasterize, truth_lines

    maps, result = CityMaps(REAL / "geography"), Breakdown(GRID)
    with np.load(REAL / "reference_gt.npz") as data:
        places = list(zip(data["location"], data["poses"], strict=True))
    for location, pose in places:
        city = maps.city(str(location))
        truth = rasterize(city, *pose)
        soft = np.stack([cv2.GaussianBlur(layer.astype(np.float32), (5, 5), 1.2) for layer in truth])
        result.add(truth, truth, elements=vectorize(soft), true_lines=truth_lines(city, *pose))
    row = result.scores()["all"]
    assert min(row["average_precision"]["0.5 m"][name] for name in CLASSES) > 85.0, row
    assert max(row["chamfer_m"]["chamfer"][name] for name in CLASSES) < 0.15, row
