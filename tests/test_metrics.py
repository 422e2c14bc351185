"""Intersection over union as published, Chamfer distance and average precision of elements."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from shapely.geometry import LineString, Polygon

from nmp.frame import CLASSES
from nmp.geometry import BevGrid
from nmp.metrics import Breakdown, IouMeter, distance_edges, element_lines, format_table, format_vectors
from nmp.vectorize import VectorElement


def _masks(*rows: list[int]) -> np.ndarray:
    """Three one-row masks, one per class."""
    return np.array(rows, dtype=np.uint8)[:, None, :]


def test_counts_are_summed_before_they_are_divided() -> None:
    meter = IouMeter()
    meter.add(_masks([1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]), _masks([1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]))
    meter.add(_masks([0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]), _masks([0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]))
    assert meter.intersection.tolist() == [1, 1, 1]
    assert meter.union.tolist() == [4, 1, 4]
    assert meter.frames == 2
    scores = meter.percent()
    assert scores == pytest.approx({"divider": 25.0, "crossing": 100.0, "boundary": 25.0, "miou": 50.0})


def test_a_class_that_never_occurs_is_left_out_of_the_mean() -> None:
    meter = IouMeter()
    nothing = [0, 0]
    meter.add(_masks([1, 0], nothing, [1, 1]), _masks([1, 1], nothing, [1, 1]))
    scores = meter.percent()
    assert math.isnan(scores["crossing"])
    assert scores["miou"] == pytest.approx(75.0)
    assert math.isnan(IouMeter().percent()["miou"])


def test_scores_are_broken_down_by_label_and_by_distance() -> None:
    """Near the car all is right, further out nothing is found; rain sees nothing at all."""
    grid = BevGrid()
    truth = np.ones((3, *grid.shape), np.uint8)
    near = np.hypot(*np.moveaxis(grid.centres(), -1, 0)) < 10
    breakdown = Breakdown(grid)
    breakdown.add(truth * near, truth, ["day"])
    breakdown.add(truth * 0, truth, ["rain"])
    scores = {name: row["miou"] for name, row in breakdown.percent().items()}
    assert list(scores) == ["all", "day", "rain", "0-10 m", "10-20 m", "20-40 m"]
    assert scores["0-10 m"] == pytest.approx(50.0) and scores["10-20 m"] == scores["20-40 m"] == 0.0
    assert scores["rain"] == 0.0 < scores["all"] < scores["day"] < 50.0
    assert scores["day"] == pytest.approx(2 * scores["all"])


@pytest.mark.parametrize(
    ("length", "width", "edges"),
    [(60, 30, (0, 10, 20, 40)), (100, 100, (0, 10, 20, 40, 80)), (160, 100, (0, 10, 20, 40, 80, 160)), (6, 6, (0, 10))],
)
def test_rings_reach_as_far_as_the_region(length: float, width: float, edges: tuple[float, ...]) -> None:
    grid = BevGrid(length, width, 1.0)
    assert distance_edges(grid) == edges
    breakdown = Breakdown(grid)
    breakdown.add(np.ones((3, *grid.shape), np.uint8), np.ones((3, *grid.shape), np.uint8))
    rings = [meter.union[0] for name, meter in breakdown.meters.items() if name.endswith(" m")]
    assert len(rings) == len(edges) - 1 and sum(rings) == grid.rows * grid.cols


def test_table_has_the_published_columns() -> None:
    row = {"divider": 54.2, "crossing": 34.52, "boundary": 56.94, "miou": 48.553}
    header, line = format_table({"second pass": row}).splitlines()
    assert header.split("|")[1:] == [" Divider ", " Crossing ", " Boundary ", " All(mIoU)"]
    assert [cell.strip() for cell in line.split("|")] == ["second pass", "54.20", "34.52", "56.94", "48.55"]
    assert len(header) == len(line)


# ------------------------------------------------------------------------------------------------------ elements

NOTHING: dict[str, list[LineString]] = {name: [] for name in CLASSES}


def _along(y: float, x0: float = -20.0, x1: float = 20.0) -> LineString:
    return LineString([(x0, y), (x1, y)])


def _divider(line: LineString, score: float = 0.9) -> VectorElement:
    return VectorElement("divider", line, score)


def _score(*frames: tuple[list[VectorElement], list[LineString]]) -> Breakdown:
    """Score dividers, frame by frame."""
    grid = BevGrid()
    empty = np.zeros((3, *grid.shape), np.uint8)
    out = Breakdown(grid)
    for elements, true in frames:
        out.add(empty, empty, ["day"], elements=elements, true_lines={**NOTHING, "divider": true})
    return out


def test_chamfer_tells_what_is_wrong_from_what_is_missing() -> None:
    # 0.3 m aside and half as long: all that was found is near, half of the truth is up to 20 m from it, counted as 5 m
    rows = _score(([_divider(_along(0.3, -20, 0))], [_along(0.0)])).chamfer["all"].metres()
    assert rows["precision"]["divider"] == pytest.approx(0.3, abs=1e-3)
    xs = np.linspace(-20, 20, 134)
    expected = np.minimum(np.hypot(np.maximum(xs, 0), 0.3), 5.0).mean()
    assert rows["recall"]["divider"] == pytest.approx(expected, abs=1e-3)
    assert rows["chamfer"]["divider"] == pytest.approx((0.3 + expected) / 2, abs=1e-3)
    assert math.isnan(rows["chamfer"]["crossing"]) and rows["chamfer"]["mean"] == rows["chamfer"]["divider"]


def test_what_is_never_found_and_what_is_not_there_are_5_m_away() -> None:
    missed = _score(([], [_along(0.0)])).scores()["all"]
    assert missed["chamfer_m"]["chamfer"]["divider"] == 5.0 and missed["average_precision"]["all"]["divider"] == 0.0
    invented = _score(([_divider(_along(0.0))], [])).scores()["all"]
    assert invented["chamfer_m"]["precision"]["divider"] == 5.0
    assert math.isnan(invented["average_precision"]["all"]["divider"])


def test_chamfer_is_broken_down_by_distance() -> None:
    rows = _score(([_divider(_along(0.2, -30, 0)), _divider(_along(1.0, 0, 30))], [_along(0.0, -30, 30)])).scores()
    assert json.dumps(rows["day"]["chamfer_m"]) == json.dumps(rows["all"]["chamfer_m"])
    assert rows["20-40 m"]["chamfer_m"]["precision"]["divider"] == pytest.approx(0.6, abs=0.02)


def test_average_precision_is_broken_down_by_distance_with_elements_cut_at_the_rings() -> None:
    """What was found of a line through all rings is on its place within 10 m and behind, and beside it ahead."""
    true = [_along(0.0, -30, 30)]
    found = [
        _divider(_along(0.1, -10, 10), 0.9),
        _divider(_along(0.1, -30, -10), 0.9),
        _divider(_along(0.8, 10, 30), 0.5),
    ]
    rows = _score((found, true)).scores()
    rings = {name: rows[name]["average_precision"] for name in ("0-10 m", "10-20 m", "20-40 m")}
    assert rings["0-10 m"]["0.5 m"]["divider"] == 100.0
    # ahead and behind are two true pieces there, and what is ahead is found 0.8 m aside
    assert rings["10-20 m"]["0.5 m"]["divider"] == rings["20-40 m"]["0.5 m"]["divider"] == 50.0
    assert rings["20-40 m"]["1 m"]["divider"] == 100.0
    # the whole line is not found at all
    assert rows["all"]["average_precision"]["1 m"]["divider"] == 0.0


def test_average_precision_of_a_known_ranking() -> None:
    """Right, wrong, right of three true elements: the area is 1/3 * 1 + 1/3 * 2/3."""
    true = [_along(0.0), _along(6.0), _along(-6.0)]
    found = [_divider(_along(0.1), 0.9), _divider(_along(3.0), 0.8), _divider(_along(6.1), 0.7)]
    row = _score((found, true)).precision["all"].percent()
    assert row["0.5 m"]["divider"] == pytest.approx(100 * (1 + 2 / 3) / 3)
    assert row["all"]["divider"] == pytest.approx(row["0.5 m"]["divider"])
    assert math.isnan(row["all"]["boundary"]) and row["all"]["mean"] == row["all"]["divider"]


def test_average_precision_depends_on_the_threshold_and_counts_an_element_once() -> None:
    # 0.8 m aside: too far for 0.5 m, near enough for 1 m
    row = _score(([_divider(_along(0.8))], [_along(0.0)])).precision["all"].percent()
    assert [row[name]["divider"] for name in ("0.5 m", "1 m", "1.5 m")] == [0.0, 100.0, 100.0]
    # the same true line found twice: the better one is right, and comes first
    twice = [_divider(_along(0.1), 0.5), _divider(_along(0.0), 0.9)]
    assert _score((twice, [_along(0.0), _along(9.0)])).precision["all"].percent()["1 m"]["divider"] == 50.0


def test_scores_are_ranked_over_the_whole_set() -> None:
    """A wrong element with a high score in one frame costs the right ones of another."""
    right, wrong = ([_divider(_along(0.0), 0.6)], [_along(0.0)]), ([_divider(_along(4.0), 0.9)], [])
    assert _score(right, wrong).precision["all"].percent()["1 m"]["divider"] == pytest.approx(50.0)


def test_a_crossing_at_the_edge_is_compared_without_the_edge() -> None:
    grid = BevGrid()
    inside = Polygon([(5, -3), (9, -3), (9, 3), (5, 3)])
    assert only_line(inside, grid).length == pytest.approx(inside.exterior.length)
    cut = Polygon([(5, 7), (9, 7), (9, 14.925), (5, 14.925)])
    assert only_line(cut, grid).length == pytest.approx(2 * 7.8 + 4)


def only_line(polygon: Polygon, grid: BevGrid) -> LineString:
    (line,) = element_lines(VectorElement("crossing", polygon, 1.0), grid)
    return line


def test_parts_of_a_set_merge_to_exactly_the_whole() -> None:
    """Three parts in another order give the very same numbers, equal scores and all."""
    rng = np.random.default_rng(5)
    grid = BevGrid()
    frames = []
    for k in range(12):
        lines = {name: [_along(float(y)) for y in rng.uniform(-14, 14, 3)] for name in CLASSES}
        elements = [
            VectorElement(name, _along(line.coords[0][1] + float(rng.normal(0, 0.8))), round(float(rng.random()), 1))
            for name in CLASSES
            for line in lines[name]
        ]
        masks = rng.random((2, 3, *grid.shape)) < 0.3
        place = {"changed": rng.random(grid.shape) < 0.5} if k % 2 else {}
        frames.append((masks.astype(np.uint8), ["day", "rain"][k % 3 == 0], place, elements, lines))

    def score(numbers: list[int]) -> Breakdown:
        out = Breakdown(grid)
        for (predicted, truth), label, place, elements, lines in (frames[k] for k in numbers):
            out.add(predicted, truth, [label], places=place, elements=elements, true_lines=lines)
        return out

    whole = score(list(range(12)))
    merged = score([7, 2, 11])
    merged.merge(score([0, 1, 3, 4]))
    merged.merge(score([10, 9, 8, 6, 5]))
    assert json.dumps(merged.scores()) == json.dumps(whole.scores())
    assert {"all", "day", "rain", "0-10 m", "changed"} <= set(whole.scores())


def test_table_of_elements_has_a_row_for_places_without_average_precision() -> None:
    grid = BevGrid()
    nothing, lines_of = np.zeros((3, *grid.shape), np.uint8), {name: [_along(0.0)] for name in CLASSES}
    breakdown = Breakdown(grid)
    changed = {"changed": np.ones(grid.shape, bool)}
    breakdown.add(nothing, nothing, places=changed, elements=[_divider(_along(0.3))], true_lines=lines_of)
    rows = breakdown.scores()
    header, *lines = format_vectors(rows).splitlines()
    assert header.split("|")[1].strip() == "AP divider" and len(lines) == len(rows)
    assert len({len(line) for line in (header, *lines)}) == 1
    place = next(line for line in lines if line.startswith("changed")).split("|")
    assert place[1].strip() == "-" and place[5].strip() == "0.30"
    assert next(line for line in lines if line.startswith("0-10 m")).split("|")[1].strip() == "100.00"
