"""Intersection over union, as published."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nmp.geometry import BevGrid
from nmp.metrics import Breakdown, IouMeter, format_table


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


def test_table_has_the_published_columns() -> None:
    row = {"divider": 54.2, "crossing": 34.52, "boundary": 56.94, "miou": 48.553}
    header, line = format_table({"second pass": row}).splitlines()
    assert header.split("|")[1:] == [" Divider ", " Crossing ", " Boundary ", " All(mIoU)"]
    assert [cell.strip() for cell in line.split("|")] == ["second pass", "54.20", "34.52", "56.94", "48.55"]
    assert len(header) == len(line)
