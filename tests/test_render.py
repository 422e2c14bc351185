"""The ray caster: markings where the map says, solids where they stand, the same bytes from the same seed."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nmp.errors import NmpError
from nmp.geometry import inverse, transform_from, transform_from_xyyaw
from nmp_train.sim import render as caster
from nmp_train.sim.boxes import BODY, BUILDING, CROWN, LAMP_POLE, POLE
from nmp_train.sim.light import SHADOW_CELL_M, SHADOW_SIDE, shadow_scores
from nmp_train.sim.render import Ground, Solids, Weather, render, solids_from_boxes, strip_scores
from nmp_train.sim.surface import Surface

SIZE = (400, 225)
INTRINSICS = np.array([[316.6, 0, 204.0], [0, 316.6, 122.5], [0, 0, 1]])
FORWARD = transform_from(np.array([1.7, 0.0, 1.5]), np.array([-0.5, 0.5, -0.5, 0.5]))
CAR = transform_from_xyyaw(30.0, 40.0, 0.3)
ASPHALT, WHITE = 0x404040, 0xD9D9D9
KERB_UNITS = 28  # 14 cm

Box = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float], int]
"""centre in the car's frame, size, colour, kind"""


def _surface(texels: NDArray[np.int32], resolution: float = 0.1) -> Surface:
    """A surface of square images, coarser levels being every other texel of the one before."""
    levels, flat, start = [], [], 0
    for _ in range(5):
        levels.append((start, *texels.shape))
        flat.append(texels.ravel())
        start += texels.size
        texels = texels[::2, ::2]
    return Surface(0.0, 0.0, resolution, torch.from_numpy(np.concatenate(flat)), tuple(levels))


Places = Callable[[NDArray[np.float64]], NDArray[np.bool_]]


@functools.cache
def _plain(paint: Places | None = None, height: Places | None = None) -> Surface:
    """Asphalt of 90 m by 90 m; points in the car's frame [..., 2] may be painted white or raised."""
    axis = (np.arange(900) + 0.5) * 0.1
    points = (np.stack(np.meshgrid(axis, axis), -1) - CAR[:2, 3]) @ CAR[:2, :2]
    nowhere = np.zeros(points.shape[:2], bool)
    colour = np.where(paint(points) if paint else nowhere, WHITE, ASPHALT)
    units = np.where(height(points) if height else nowhere, KERB_UNITS, 0)
    return _surface((colour + units * 2**24).astype(np.int32))


def _solids(boxes: Sequence[Box] = (), limit: int = 8) -> Solids:
    centre = np.array([(CAR @ [*b[0], 1])[:3] for b in boxes]).reshape(-1, 3)
    size, rgb = (np.array([b[i] for b in boxes], float).reshape(-1, 3) for i in (1, 2))
    kind = np.array([b[3] for b in boxes], np.int64)
    return solids_from_boxes(centre, size, np.full(len(boxes), 0.3), rgb, kind, (CAR @ FORWARD)[:2, 3], limit)


def _image(
    surface: Surface,
    solids: Solids,
    weather: Weather | None = None,
    turns: Sequence[float] = (0.0,),
    scale: float = 1.0,
    *,
    compiled: bool = False,
) -> NDArray[np.float64]:
    """Images [N, H, W, 3] of cameras turned to the left (rad)."""
    about = (CAR @ FORWARD)[:2, 3]
    cameras = np.stack([CAR @ transform_from_xyyaw(0.0, 0.0, turn) @ FORWARD for turn in turns])
    cameras[:, :2, 3] -= about
    images = render(
        Ground.of([surface]),
        torch.zeros(1, dtype=torch.long),
        torch.from_numpy(about)[None],
        torch.from_numpy(np.diag([scale, scale, 1]) @ INTRINSICS).float().repeat(1, len(turns), 1, 1),
        torch.from_numpy(cameras).float()[None],
        solids,
        Weather.clear(1) if weather is None else weather,
        (round(SIZE[0] * scale), round(SIZE[1] * scale)),
        generator=torch.Generator().manual_seed(5),
        compiled=compiled,
    )
    return images[0].permute(0, 2, 3, 1).numpy().astype(float)


def _project(*point: float) -> NDArray[np.float64]:
    """Pixel of a point in the car's frame."""
    uvw = INTRINSICS @ (inverse(FORWARD) @ np.append(point, 1.0))[:3]
    return np.asarray(uvw[:2] / uvw[2])


def _at(image: NDArray[np.float64], *point: float) -> NDArray[np.float64]:
    u, v = np.round(_project(*point)).astype(int)
    return image[v, u]


@pytest.mark.parametrize("ahead, side", [(7.5, 0.5), (9.0, -2.0), (15.0, 3.0)])
def test_a_mark_is_seen_where_the_map_has_it(ahead: float, side: float) -> None:
    surface = _plain(paint=lambda p: np.hypot(p[..., 0] - ahead, p[..., 1] - side) < 0.3)
    image = _image(surface, _solids())[0].sum(axis=2)
    below = image[126:]
    bright = np.argwhere(below > (below.max() + below.min()) / 2) + [126, 0]
    assert np.abs(bright.mean(axis=0)[::-1] - _project(ahead, side, 0.0)).max() < 1.0


def test_kerbs_stand_above_the_road() -> None:
    # raised from 9 m on; its white surface is seen from the top edge on, and below it the face of stone
    def beyond(p: NDArray[np.float64]) -> NDArray[np.bool_]:
        return np.asarray(p[..., 0] > 9.0)

    raised = _image(_plain(paint=beyond, height=beyond), _solids())[0]
    flat = _image(_plain(paint=beyond), _solids())[0]
    column = round(float(_project(9.0, 0.0, 0.0)[0]))
    height = KERB_UNITS * 0.005

    def edge(image: NDArray[np.float64]) -> int:
        return int(np.flatnonzero(image[:, column, 0] > image[150, column, 0] - 4).max())

    assert abs(edge(flat) - _project(9.0, 0.0, 0.0)[1]) < 1.5
    assert abs(edge(raised) - _project(9.0, 0.0, height)[1]) < 1.5
    face = _at(raised, 9.0, 0.0, height / 2)[0]
    assert _at(raised, 8.0, 0.0, 0.0)[0] + 10 < face < _at(raised, 10.0, 0.0, height)[0] - 10
    assert np.array_equal(raised[190:], flat[190:])  # the road in front stays where it was


def test_a_box_hides_the_ground_behind_it() -> None:
    image = _image(_plain(), _solids([((10.0, 0.0, 0.75), (4.0, 2.0, 1.5), (1.0, 0, 0), BODY)]))[0]
    u, v = np.round(_project(10.0, 0.0, 0.75)).astype(int)
    assert image[v, u, 0] > 2 * image[v, u, 1]
    # the edges of the rear face, 2 m wide at x = 8 m, within a pixel
    columns = np.flatnonzero(image[v, :, 0] > 2 * image[v, :, 1])
    assert abs(columns.min() - _project(8.0, 1.0, 0.75)[0]) < 1.5
    assert abs(columns.max() - _project(8.0, -1.0, 0.75)[0]) < 1.5


def test_crowns_are_ragged_and_boxes_are_not() -> None:
    white = _plain(paint=lambda p: np.ones(p.shape[:2], bool))
    holes = []
    for kind in (CROWN, POLE):
        dark: Box = ((10.0, 0.0, 1.5), (3.0, 3.0, 3.0), (0.02, 0.02, 0.02), kind)
        image = _image(white, _solids([dark]))[0].mean(axis=2)
        u, v = np.round(_project(10.0, 0.0, 1.5)).astype(int)
        holes.append((image[v - 25 : v + 25, u - 25 : u + 25] > 90).mean())
    assert 0.02 < holes[0] < 0.5 and holes[1] < 0.01


def test_facades_have_windows_that_shine_at_night() -> None:
    wall: Box = ((22.0, 0.0, 8.0), (6.0, 30.0, 16.0), (0.6, 0.6, 0.6), BUILDING)
    day = _image(_plain(), _solids([wall]))[0][20:110, 100:300].mean(axis=2)
    assert day.std() > 12  # panes, frames and joints
    weather = Weather.clear(1)
    weather.headlights[:], weather.ambient[:] = 1.0, 0.01
    night = _image(_plain(), _solids([wall]), weather)[0][20:110, 100:300]
    lit = night.mean(axis=2) > 70
    assert 0.02 < lit.mean() < 0.4
    assert night[lit][:, 0].mean() > night[lit][:, 2].mean() + 10  # warm


def test_no_free_horizon() -> None:
    image = _image(_plain(), _solids(), turns=(0.0, 1.5, 3.0, 4.5))
    sky, skyline = image[:, 20:60].mean(axis=3), image[:, 117:121].mean(axis=3)
    assert (skyline < sky.mean() - 40).mean() > 0.5


STREET: list[Box] = [
    ((12.0, 4.0, 0.75), (4.5, 1.9, 1.5), (0.8, 0.1, 0.1), BODY),
    ((20.0, -9.0, 6.0), (14.0, 8.0, 12.0), (0.6, 0.5, 0.4), BUILDING),
    ((9.0, -4.0, 4.0), (3.0, 3.0, 3.6), (0.2, 0.4, 0.1), CROWN),
    ((9.0, -4.0, 1.2), (0.3, 0.3, 2.4), (0.3, 0.2, 0.2), POLE),
    ((16.0, 7.0, 4.0), (0.2, 0.2, 8.0), (0.4, 0.4, 0.4), LAMP_POLE),
    ((-8.0, 3.0, 0.75), (4.5, 1.9, 1.5), (0.9, 0.9, 0.9), BODY),
]


@pytest.mark.parametrize("kind", ["day", "rain", "night", "night rain"])
def test_all_at_once_gives_the_images_of_strip_by_strip(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A GPU traces all strips at once, against a fixed number of solids.
    weather = Weather.sample(1, torch.Generator().manual_seed(3), kind)
    one = _image(_plain(), _solids(STREET), weather, (0.0, 2.0), 0.45)
    monkeypatch.setattr(caster, "_compiled", lambda function: function)
    two = _image(_plain(), _solids(STREET), weather, (0.0, 2.0), 0.45, compiled=True)
    different = np.abs(one - two).max(axis=-1) > 2
    assert one.std() > 5 and different.mean() < 2e-4


def test_the_same_seed_gives_the_same_image() -> None:
    weather = [Weather.sample(1, torch.Generator().manual_seed(4), "night rain") for _ in range(2)]
    one, two = (_image(_plain(), _solids(STREET), w) for w in weather)
    assert np.array_equal(one, two)
    other = Weather.sample(1, torch.Generator().manual_seed(5), "night rain")
    assert not np.array_equal(one, _image(_plain(), _solids(STREET), other))


def test_a_strip_sees_what_stands_in_it() -> None:
    left, behind = (12.0, 2.5, 0.75), (-12.0, 0.0, 0.75)
    solids = _solids([(place, (2.0, 2.0, 1.5), (1, 1, 1), POLE) for place in (left, behind)])
    camera = CAR @ FORWARD
    camera[:2, 3] = 0
    matrices = (torch.from_numpy(m).float()[None, None] for m in (INTRINSICS, camera))
    seen = strip_scores(*matrices, solids, SIZE, wet=False)[0, 0] > 0
    wide = math.ceil(SIZE[0] / math.ceil(SIZE[0] / caster.STRIP))
    first, last = (_project(12.0 + s, 2.5 - s, 0.75)[0] // wide for s in (-1.0, 1.0))
    assert seen[:, 0].nonzero()[:, 0].tolist() == list(range(int(first), int(last) + 1)) != []
    assert not seen[:, 1:].any()


def test_shadows_fall_away_from_the_sun() -> None:
    solids = solids_from_boxes(
        np.array([[0.0, 0, 2.0], [20.0, 0, 4.0]]),
        np.array([[2.0, 2, 4], [4, 4, 4]]),
        np.zeros(2),
        np.ones((2, 3)),
        np.array([BUILDING, CROWN]),
        np.zeros(2),
        4,
    )
    sun = torch.tensor([[-0.6, 0.0, 0.8]])  # light comes from -x: shadows are 0.75 times as long as things are tall
    direct, crown, sky = caster._shadows(solids, sun, batched=False, compiled=False)[0]

    def at(values: torch.Tensor, x: float, y: float) -> float:
        row, column = (int(c / SHADOW_CELL_M + SHADOW_SIDE / 2) for c in (y, x))
        return float(values[row, column])

    assert at(direct, 3.0, 0.0) == 0 and at(direct, 4.6, 0.0) == 1 and at(direct, -1.6, 0.0) == 1
    assert at(direct, 3.0, 1.5) == 1
    assert at(sky, 0.0, 0.0) < 0.3 and at(sky, 3.0, 0.0) == 1
    # the crown's middle is 4 m up; its shadow gets lighter towards its edge
    assert at(crown, 23.0, 0.0) > at(crown, 23.0, 1.5) > at(crown, 23.0, 2.6) == 0
    batch = caster._shadows(solids, sun, batched=True, compiled=False)[0]
    assert torch.equal(batch, torch.stack([direct, crown, sky]))
    assert (shadow_scores(solids.centre, solids.size, sun) > 0).float().mean() < 0.5


@functools.cache
def _line(ahead: float) -> Surface:
    return _plain(paint=lambda p: (np.abs(p[..., 0] - ahead) < 0.5) & (np.abs(p[..., 1] + 1.5) < 0.8))


def _contrast(weather: Weather, ahead: float) -> float:
    """How well a line that crosses the view can be told from the road and its noise."""
    image = _image(_line(ahead), _solids(), weather)[0].mean(axis=2)
    u, v = np.round(_project(ahead, -1.5, 0.0)).astype(int)
    right = round(float(_project(ahead, -3.0, 0.0)[0]))
    return float(image[v, u - 2 : u + 3].mean() - image[v - 1 : v + 2, right - 4 : right + 5].mean())


def test_far_markings_are_hard_to_see_at_night_and_in_rain() -> None:
    drawn = {}
    for kind in ("day", "rain", "night"):
        weather = [Weather.sample(1, torch.Generator().manual_seed(i), kind) for i in range(6)]
        drawn[kind] = np.median([[_contrast(w, ahead) for ahead in (7.0, 22.0)] for w in weather], axis=0)
    assert drawn["day"].min() > 30
    for kind in ("rain", "night"):
        assert drawn[kind][1] < 0.8 * drawn["day"][1]
    assert drawn["night"][1] < 0.5 * drawn["night"][0]  # beyond the headlights


def test_headlights_light_the_road_ahead_only() -> None:
    weather = Weather.clear(1)
    weather.headlights[:], weather.ambient[:] = 1.0, 0.02
    front, side, back = _image(_plain(), _solids(), weather, (0.0, 1.57, 3.14))[:, 160:, 100:300].mean(axis=(1, 2, 3))
    assert front > 3 * side and front > 3 * back


def test_a_lamp_glares_until_something_stands_before_it() -> None:
    weather = Weather.clear(1)
    weather.headlights[:], weather.ambient[:], weather.street[:] = 1.0, 0.02, 0.4
    pole: Box = ((20.0, 3.0, 3.0), (0.2, 0.2, 6.0), (0.4, 0.4, 0.4), LAMP_POLE)
    wall: Box = ((15.0, 2.0, 4.0), (0.5, 6.0, 8.0), (0.4, 0.4, 0.4), BUILDING)
    free, hidden = (_image(_plain(), _solids(boxes), weather)[0] for boxes in ([pole], [pole, wall]))
    assert _at(free, 20.0, 3.0, 6.1).min() > 150 and _at(hidden, 20.0, 3.0, 6.1).max() < 60
    # its pool of light lies around its foot
    assert _at(free, 19.0, 2.0, 0.0).mean() > _at(free, 32.0, -6.0, 0.0).mean() + 20


def test_wet_ground_mirrors_what_stands_on_it() -> None:
    red: Box = ((14.0, 0.0, 1.5), (1.0, 6.0, 3.0), (0.9, 0.05, 0.05), POLE)
    weather = Weather.clear(1)
    dry = _at(_image(_plain(), _solids([red]), weather)[0], 12.0, 0.0, 0.0)
    weather.wet[:] = 1.0
    wet = _image(_plain(), _solids([red]), weather)[0]
    mirrored, beside = _at(wet, 12.0, 0.0, 0.0), _at(wet, 12.0, -4.5, 0.0)
    assert abs(dry[0] - dry[1]) < 3
    assert mirrored[0] > mirrored[1] + 15 and abs(beside[0] - beside[1]) < 3


def test_each_camera_exposes_blurs_and_gets_wet_on_its_own() -> None:
    weather = Weather.clear(1)
    surface = _plain(paint=lambda p: (p[..., 0] * 2).astype(int) % 2 == 0)
    weather.exposure[0, 1] = 1.5
    weather.blur[0, 2] = 0.003
    weather.drops[0, 3] = 1.0
    plain, bright, soft, drops = _image(surface, _solids(), weather, (0.0,) * 4)
    assert bright.mean() > plain.mean() + 15

    def edges(image: NDArray[np.float64]) -> float:
        return float(np.abs(np.diff(image[130:], axis=0)).mean())

    assert edges(soft) < 0.7 * edges(plain)
    changed = np.abs(drops - plain).max(axis=2) > 3
    assert 0.02 < changed.mean() < 0.6


def test_metering_levels_bright_and_dark_scenes() -> None:
    means = []
    for metering in (0.0, 1.0):
        weather = [Weather.clear(1) for _ in range(2)]
        weather[1].ambient[:] = 0.2
        for w in weather:
            w.metering[:] = metering
        bright, dark = (_image(_plain(), _solids(), w).mean() for w in weather)
        means.append(bright - dark)
    assert means[0] > 40 and abs(means[1]) < 3


def test_noise_is_strongest_relative_to_the_light_in_the_dark() -> None:
    weather = Weather.clear(1)
    weather.noise[:] = 0.05
    ratios = []
    for ambient in (0.8, 0.05):
        weather.ambient[:] = ambient
        patch = _image(_plain(), _solids(), weather)[0][200:, 100:300]
        ratios.append(patch.std() / patch.mean())
    assert ratios[1] > 2 * ratios[0] > 0


def test_weather_is_drawn_by_words() -> None:
    drawn = Weather.sample(4, torch.Generator().manual_seed(1), ["day", "rain", "night", "night rain"])
    assert (drawn.wet > 0).tolist() == [False, True, False, True]
    assert drawn.headlights.tolist() == [0, 0, 1, 1]
    assert (drawn.sunlight[2:] == 0).all() and (drawn.drops[[0, 2]] == 0).all()
    mixed = Weather.sample(4000, torch.Generator().manual_seed(2))
    rain, night = (mixed.wet > 0).float().mean(), mixed.headlights.mean()
    assert abs(rain - 0.2) < 0.03 and abs(night - 0.1) < 0.02
    assert all(torch.isfinite(value).all() for value in vars(mixed).values())


@pytest.mark.parametrize("kind, words", [("snow", "snow"), (["day"], "needs 2 entries, not 1")])
def test_unknown_weather_is_refused(kind: Any, words: str) -> None:
    with pytest.raises(NmpError, match=words):
        Weather.sample(2, torch.Generator(), kind)


def test_more_than_six_cameras_are_refused() -> None:
    with pytest.raises(NmpError, match="7 cameras"):
        _image(_plain(), _solids(), turns=(0.0,) * 7)
