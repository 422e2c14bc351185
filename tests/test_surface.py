"""The painted ground: the same at a place from everywhere, markings on the map's lines, kerbs beside roads."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from shapely.geometry import LineString, Polygon, box

from nmp.citymap import CityMap, IndexedGeometries
from nmp.errors import NmpError
from nmp_train.sim.clutter import Clutter
from nmp_train.sim.surface import Surface, city_bounds, paint_surface

GEOGRAPHY = Path(__file__).resolve().parents[1] / ".." / "shared" / "real" / "geography"
BOUNDS = (0.0, 0.0, 96.0, 64.0)
LINE_Y, DRIVE_Y = 30.0, 36.0
CLEAN = Clutter().scaled(0)


def _city(location: str = "boston-seaport", **layers: list) -> CityMap:
    """A road along x between y = 20 and 40 m."""
    names = ("road_dividers", "lane_dividers", "crossings", "road_segments", "lanes", "walkways")
    found = {"road_segments": [box(-100, 20, 200, 40)], **layers}
    return CityMap(location=location, **{n: IndexedGeometries.of(found.get(n, [])) for n in names})


def _level(surface: Surface, level: int = 0) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Colours [rows, cols, 3] and heights [rows, cols] of a level."""
    offset, rows, cols = surface.levels[level]
    texels = surface.texels[offset : offset + rows * cols].reshape(rows, cols).numpy()
    return np.stack([texels & 255, texels >> 8 & 255, texels >> 16 & 255], axis=-1), texels >> 24


def _busy_city() -> CityMap:
    return _city(
        road_dividers=[LineString([(-60, LINE_Y), (30, LINE_Y + 0.7), (160, LINE_Y)])],
        lane_dividers=[LineString([(-60, y), (160, y + 1)]) for y in (24.0, DRIVE_Y)],
        crossings=[Polygon([(40, 20), (44, 20), (45, 40), (41, 40)])],
        lanes=[box(-60, 20.2, 35, 24), box(50, 20.2, 160, 24)],
        walkways=[box(-60, 15, 160, 20)],
    )


def test_overlapping_surfaces_agree() -> None:
    city = _busy_city()
    one = paint_surface(city, BOUNDS, seed=4)
    two = paint_surface(city, (37.3, 11.9, 150.0, 71.0), seed=4)
    for level in (0, 3):
        step = 0.1 * 2**level
        a, b = (np.concatenate([*_level(s, level)[:1], _level(s, level)[1][..., None]], axis=-1) for s in (one, two))
        dx, dy = (round((getattr(two, k) - getattr(one, k)) / step) for k in ("x0", "y0"))
        part = a[dy:, dx:]
        other = b[: part.shape[0], : part.shape[1]]
        assert part.size > 1000 and other.shape == part.shape
        assert np.array_equal(part, other)


def test_the_seed_changes_the_ground_and_repeats_it() -> None:
    city = _busy_city()
    one, again, other = (paint_surface(city, (30, 20, 46, 40), seed) for seed in (1, 1, 2))
    assert np.array_equal(one.texels, again.texels)
    assert (one.texels != other.texels).float().mean() > 0.9


def test_a_line_lies_on_the_map_and_is_as_wide_as_paint() -> None:
    line = LineString([(-60, 30.03), (160, 34.57)])
    for seed in range(3):
        bare, painted = (
            _level(paint_surface(_city(lane_dividers=lines), BOUNDS, seed, clutter=CLEAN))[0][..., 0].astype(float)
            for lines in ([], [line])
        )
        extra = (painted - bare)[230:400]
        sums = extra.sum(axis=0)
        there = sums > 0.5 * sums.max()  # columns with a dash
        assert there.mean() > 0.15
        y = (np.arange(230, 400) + 0.5) * 0.1
        x = (np.arange(extra.shape[1]) + 0.5) * 0.1
        centre = (extra * y[:, None]).sum(axis=0)[there] / sums[there]
        truth = 30.03 + (x[there] + 60) / 220 * 4.54
        assert abs(np.median(centre - truth)) < 0.012
        assert np.percentile(np.abs(centre - truth), 90) < 0.03
        full = 0.78 * 255 - bare[230:400].mean()
        assert 0.05 < np.median(sums[there]) * 0.1 / full < 0.2


def test_double_yellow_has_two_lines_around_the_divider() -> None:
    found = 0
    for seed in range(8):
        city = _city(road_dividers=[LineString([(-60, LINE_Y), (160, LINE_Y)])])
        surface = paint_surface(city, (0, 27, 20, 33), seed, resolution=0.04, clutter=CLEAN)
        colour = _level(surface)[0].astype(float)
        yellow = (colour[..., 0] - colour[..., 2]).mean(axis=1)
        y = surface.y0 + (np.arange(len(yellow)) + 0.5) * 0.04
        strong = yellow > 0.6 * yellow[np.abs(y - LINE_Y) < 0.4].max()
        edges = np.flatnonzero(np.diff((strong & (np.abs(y - LINE_Y) < 0.4)).astype(int)))
        if len(edges) == 4 and yellow.max() > 20:
            found += 1
            assert abs(y[edges].mean() + 0.02 - LINE_Y) < 0.03
    assert found >= 3


@pytest.mark.parametrize(
    "location, paint, period", [("boston-seaport", 3.0, (9, 12)), ("singapore-queenstown", 2.0, (6, 8.25))]
)
def test_dashes_have_real_lengths(location: str, paint: float, period: tuple[float, float]) -> None:
    matched = 0
    for seed in range(8):
        city = _city(location, lane_dividers=[LineString([(-60, LINE_Y), (160, LINE_Y)])])
        colour = _level(paint_surface(city, (0, 26, 96, 33), seed, clutter=CLEAN))[0][..., 2].astype(float)
        row = colour[round((LINE_Y - 25.6) * 10) - 1 : round((LINE_Y - 25.6) * 10) + 1].mean(axis=0)
        smooth = np.convolve(row, np.ones(3) / 3, mode="same") > (row.max() + np.median(colour)) / 2
        rises, falls = (np.flatnonzero(np.diff(smooth.astype(int)) == k) * 0.1 for k in (1, -1))
        if len(rises) > 3:
            step, length = np.median(np.diff(rises)), np.median(falls[falls > rises[0]][: len(rises) - 1] - rises[:-1])
            matched += bool(period[0] - 0.3 < step < period[1] + 0.3 and abs(length - paint) < 0.8)
    assert matched >= 3


def test_heights_are_kerbs_beside_the_road() -> None:
    surface = paint_surface(_city(), BOUNDS, seed=3, clutter=CLEAN)
    height = _level(surface)[1]
    kerb = int(height.max())
    assert 24 <= kerb <= 30
    assert (height[205:395] == 0).all() and (height[:195] == kerb).all() and (height[405:] == kerb).all()
    coarse = _level(surface, 1)[1]
    assert np.array_equal(coarse, (height.reshape(coarse.shape[0], 2, -1, 2).sum(axis=(1, 3)) + 2) >> 2)
    assert paint_surface(_city(), BOUNDS, seed=3, clutter=CLEAN).texels.min() >= 0


def test_roads_without_kerb_lie_level_with_the_ground_beside_them() -> None:
    everywhere = Clutter(flush=1.0, crossing_ramp=0.0)
    height = _level(paint_surface(_city(), BOUNDS, seed=3, clutter=everywhere))[1]
    assert (height[150:450] == 0).all()


def test_a_ramp_lowers_the_kerb_at_a_crossing() -> None:
    crossing = Polygon([(40, 20), (44, 20), (44, 40), (40, 40)])
    ramps = Clutter(**{**CLEAN.__dict__, "crossing_ramp": 1.0})
    height = _level(paint_surface(_city(crossings=[crossing]), BOUNDS, seed=3, clutter=ramps))[1]
    assert height[196:199, 418:422].max() <= 3 and height[402:405, 418:422].max() <= 3
    assert height[190, 300] >= 24


def test_ghosts_are_darker_than_the_asphalt() -> None:
    line, zebra = LineString([(2, 25), (90, 25)]), Polygon([(40, 27), (44, 27), (44, 39), (40, 39)])
    before, after = (
        _level(paint_surface(_city(), BOUNDS, 5, clutter=CLEAN, ghosts=g))[0].mean(axis=-1) for g in ((), (line, zebra))
    )
    change = after - before
    assert change[249:251, 30:890].mean() < -2
    assert change[275:385, 402:438].mean() < -1
    away = np.ones(change.shape, bool)
    away[240:260], away[265:395, 395:445] = False, False
    assert np.array_equal(after[away], before[away])


def test_difficulty_takes_paint_away() -> None:
    lines = [LineString([(-60, 22 + k * 0.9), (160, 22 + k * 0.9)]) for k in range(18)]
    city = _city(lane_dividers=lines)

    def white(difficulty: float) -> float:
        return float(
            (
                _level(paint_surface(city, (0, 18, 96, 42), 6, difficulty=difficulty))[0][45:235].min(axis=-1) > 120
            ).mean()
        )

    assert white(1.0) < 0.75 * white(0.0) and white(2.0) < white(1.0)


def test_bad_input_is_named() -> None:
    with pytest.raises(NmpError, match="difficulty"):
        paint_surface(_city(), BOUNDS, 1, difficulty=-1)
    with pytest.raises(NmpError, match="bounds"):
        paint_surface(_city(), (5, 5, 5, 9), 1)
    with pytest.raises(NmpError, match="has no roads"):
        city_bounds(_city(road_segments=[]))


@pytest.mark.skipif(not GEOGRAPHY.is_dir(), reason="needs the real geography")
def test_real_maps_can_be_painted() -> None:
    city = CityMap.load(GEOGRAPHY, "singapore-queenstown")
    x, y = city.crossings.geometries[0].centroid.coords[0]
    small = city.within((x - 150, y - 150, x + 150, y + 150))
    colour, height = _level(paint_surface(small, (x - 20, y - 20, x + 20, y + 20), 1))
    assert colour.std() > 5 and height.max() >= 24 and (height == 0).mean() > 0.2
