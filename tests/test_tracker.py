"""Elements keep their numbers while the car moves, and lose them when they are gone."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from shapely.geometry import LineString, Polygon

from nmp.frame import CLASSES, LocalMap
from nmp.geometry import BevGrid, inverse, transform_from_xyyaw
from nmp.vectors.tracker import FORGET_S, ElementTracker, Tracked, assign

GRID = BevGrid()
START_NS = 1_500_000_000_000_000_000
CITY: dict[str, list[list[tuple[float, float]]]] = {
    "divider": [[(-100, 0), (100, 0)], [(-100, 3.5), (100, 3.5)]],
    "crossing": [[(10, -6), (14, -6), (14, 6), (10, 6), (10, -6)]],
    "boundary": [[(-100, -7), (100, -7)]],
}


def local_map(
    seconds: float,
    x: float = 0.0,
    y: float = 0.0,
    yaw: float = 0.0,
    city: dict[str, list[list[tuple[float, float]]]] = CITY,
    location: str = "here",
    evidence: float = 4.0,
) -> LocalMap:
    """What a car at a pose sees of a city of lines (map frame, m)."""
    pose = transform_from_xyyaw(x, y, yaw)
    layers = np.zeros((3, *GRID.shape), np.uint8)
    for name, lines in city.items():
        for line in lines:
            points = np.array([(a, b, 0, 1) for a, b in line]) @ inverse(pose).T
            pixels = (points[:, :2] + [GRID.length / 2, GRID.width / 2]) / GRID.resolution
            cv2.polylines(layers[CLASSES.index(name)], [pixels.astype(np.int32)], False, 1, 5)
    known = np.full(GRID.shape, evidence, np.float32)
    return LocalMap(START_NS + round(seconds * 1e9), location, pose, GRID, 0.9 * layers.astype(np.float32), known)


def ids(tracked: Tracked) -> dict[str, list[int]]:
    return {name: [e.id for e in tracked.elements if e.name == name] for name in CLASSES}


def test_elements_lie_in_the_map_frame_and_say_what_is_known_of_them() -> None:
    tracked = ElementTracker().update(local_map(0.0, 5.0, 1.0, 0.2))
    assert {name: len(found) for name, found in ids(tracked).items()} == {"divider": 2, "crossing": 1, "boundary": 1}
    crossing = next(e for e in tracked.elements if e.name == "crossing")
    drawn = Polygon(CITY["crossing"][0])
    assert crossing.geometry.intersection(drawn).area / crossing.geometry.union(drawn).area > 0.85
    assert (crossing.frames, crossing.age_s, crossing.evidence) == (1, 0.0, pytest.approx(4.0))
    assert crossing.confidence > 0.7 and crossing.traversals is None


def test_elements_tell_how_many_drives_saw_them() -> None:
    def left_of_the_middle(location: str, points: np.ndarray) -> np.ndarray:
        assert location == "here"
        return np.where(points[:, 1] > 2.0, 5, 0)

    tracked = ElementTracker().update(local_map(0.0, 5.0, 1.0, 0.2), left_of_the_middle)
    found = {round(e.geometry.centroid.y): e.traversals for e in tracked.elements if e.name == "divider"}
    assert found[4] == 5
    assert found[0] == 1  # this drive sees it, whatever is stored
    unknown = ElementTracker().update(local_map(0.0), lambda location, points: None)
    assert {e.traversals for e in unknown.elements} == {None}
    assert not ElementTracker().update(local_map(0.0, city={}), left_of_the_middle).elements


def test_numbers_stay_while_the_car_drives_on_and_turns() -> None:
    tracker = ElementTracker()
    first = ids(tracker.update(local_map(0.0)))
    for step in range(1, 8):
        # poses are wrong by up to 0.3 m: what is drawn is where the car believes it to be
        noise = 0.3 * np.sin(step * 2.0)
        seen = local_map(0.5 * step, 2.0 * step, 0.3 * step, 0.03 * step)
        believed = transform_from_xyyaw(2.0 * step, 0.3 * step + noise, 0.03 * step)
        tracked = tracker.update(LocalMap(**{**vars(seen), "map_from_base": believed}))
        assert ids(tracked) == first and not tracked.gone
    assert {e.frames for e in tracked.elements} == {8}
    assert {e.age_s for e in tracked.elements} == {3.5}


def test_what_is_missed_for_a_moment_gets_its_number_back() -> None:
    tracker = ElementTracker()
    first = ids(tracker.update(local_map(0.0)))
    less = {**CITY, "divider": CITY["divider"][:1]}
    missing = next(i for i in first["divider"] if [i] != ids(tracker.update(local_map(0.5, city=less)))["divider"])
    for seconds in (1.0, 1.5):  # named as gone every time: one message may be lost
        tracked = tracker.update(local_map(seconds, city=less))
        assert tracked.gone == (("divider", missing),)
    tracked = tracker.update(local_map(2.0))
    assert ids(tracked) == first and not tracked.gone


def test_what_is_gone_for_long_is_forgotten() -> None:
    tracker = ElementTracker()
    first = ids(tracker.update(local_map(0.0)))
    less = {**CITY, "crossing": []}
    assert tracker.update(local_map(1.0, city=less)).gone == (("crossing", first["crossing"][0]),)
    assert not tracker.update(local_map(1.1 + FORGET_S, city=less)).gone
    again = ids(tracker.update(local_map(2.0 + FORGET_S)))
    assert again["crossing"] != first["crossing"] and again["divider"] == first["divider"]


@pytest.mark.parametrize("after", [local_map(-3.0), local_map(1.0, location="elsewhere")])
def test_another_time_or_city_begins_anew(after: LocalMap) -> None:
    tracker = ElementTracker()
    first = tracker.update(local_map(0.0))
    tracked = tracker.update(after)
    assert not {e.id for e in tracked.elements} & {e.id for e in first.elements}
    assert set(tracked.gone) == {(e.name, e.id) for e in first.elements}
    assert {e.first_seen_ns for e in tracked.elements} == {after.stamp_ns}


def test_nothing_is_made_of_cells_that_were_never_seen() -> None:
    assert ElementTracker().update(local_map(0.0, evidence=0.0)).elements == ()


def test_of_two_parts_only_one_inherits_the_number() -> None:
    whole = LineString([(0, 0), (40, 0)])
    parts = [LineString([(0, 0.2), (15, 0.2)]), LineString([(17, 0.2), (40, 0.2)])]
    assert assign(parts, [whole]) == [None, 0]
    assert assign([whole], parts) == [1]


def test_lines_side_by_side_are_told_apart() -> None:
    old = [LineString([(0, y), (40, y)]) for y in (0.0, 0.8, 10.0)]
    new = [LineString([(5, y), (45, y)]) for y in (0.9, 0.1, 20.0)]
    assert assign(new, old) == [1, 0, None]
    assert assign([], old) == [] and assign(new, []) == [None] * 3
    across = LineString([(20, -10), (20, 10)])
    assert assign([across], old) == [None]
