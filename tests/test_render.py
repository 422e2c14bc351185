"""The ray caster: markings where the map says, solids where they stand, the same bytes from the same seed."""

import numpy as np
import pytest
import torch

from nmp.citymap import CityMap
from nmp.geometry import inverse, transform_from, transform_from_xyyaw
from nmp_train.sim.render import Ground, Solids, Weather, render, solids_from_boxes
from nmp_train.sim.surface import paint_surface

SIZE = (400, 225)
INTRINSICS = np.array([[316.6, 0, 204.0], [0, 316.6, 122.5], [0, 0, 1]])
FORWARD = transform_from(np.array([1.7, 0.0, 1.5]), np.array([-0.5, 0.5, -0.5, 0.5]))
CAR = transform_from_xyyaw(30.0, 40.0, 0.3)


def _tables() -> dict[str, list[dict[str, object]]]:
    """A wide road with one straight crossing of two rails far ahead and nothing else."""
    corners = {"a": (0, 0), "b": (90, 0), "c": (90, 90), "d": (0, 90)}
    nodes = [{"token": t, "x": float(x), "y": float(y)} for t, (x, y) in corners.items()]
    empty: dict[str, list[dict[str, object]]] = {
        name: [] for name in ("line", "lane", "road_divider", "lane_divider", "ped_crossing", "walkway")
    }
    polygon = {"token": "p", "exterior_node_tokens": list(corners), "holes": []}
    return {**empty, "node": nodes, "polygon": [polygon], "road_segment": [{"token": "r", "polygon_token": "p"}]}


def _weather(sunlight: float = 0.0) -> Weather:
    value = torch.ones(1)
    return Weather(
        sun=torch.tensor([[0.0, 0.0, 1.0]]),
        sunlight=value * sunlight,
        ambient=value * 0.8,
        haze=value * 1e-5,
        headlights=value * 0,
        wet=value * 0,
        noise=value * 0,
        exposure=value,
    )


def _image(ground: Ground, solids: Solids) -> np.ndarray:
    camera = CAR @ FORWARD
    about = camera[:2, 3].copy()
    camera[:2, 3] = 0
    out = render(
        ground,
        torch.zeros(1, dtype=torch.long),
        torch.from_numpy(about)[None],
        torch.from_numpy(INTRINSICS).float()[None, None],
        torch.from_numpy(camera).float()[None, None],
        solids,
        _weather(),
        SIZE,
    )
    return out[0, 0].permute(1, 2, 0).numpy()


def _project(point: np.ndarray) -> np.ndarray:
    uvw = INTRINSICS @ (inverse(CAR @ FORWARD) @ np.append(point, 1.0))[:3]
    return uvw[:2] / uvw[2]


def _no_solids() -> Solids:
    nothing = np.zeros((0, 3))
    return solids_from_boxes(nothing, nothing, nothing[:, 0], nothing, nothing[:, 0], (CAR @ FORWARD)[:2, 3], 2)


@pytest.mark.parametrize("ahead, side", [(7.5, 0.5), (9.0, -2.0), (15.0, 3.0)])
def test_a_mark_is_seen_where_the_map_has_it(ahead: float, side: float) -> None:
    city = CityMap.from_tables(_tables(), "boston-seaport")
    surface = paint_surface(city, (0, 0, 90, 90), seed=1, resolution=0.1)
    mark = (CAR @ np.array([ahead, side, 0, 1]))[:2]
    texels = surface.texels.clone()
    # a white disc of 0.3 m painted into every level of the pyramid
    for level, (offset, rows, cols) in enumerate(surface.levels[:3]):
        cell = 0.1 * 2**level
        y, x = np.mgrid[:rows, :cols] * cell + cell / 2
        inside = np.hypot(x - mark[0], y - mark[1]) < 0.3
        block = np.where(inside, 0xFFFFFF, 0x202020).astype(np.int32)
        texels[offset : offset + rows * cols] = torch.from_numpy(block.ravel())
    surface = type(surface)(surface.x0, surface.y0, surface.resolution, texels, surface.levels)
    image = _image(Ground.of([surface]), _no_solids()).astype(float).sum(axis=2)
    bright = np.argwhere(image > image.max() * 0.7)
    bright = bright[bright[:, 0] > 125]  # below the horizon
    centre = bright.mean(axis=0)[::-1]
    assert np.abs(centre - _project(np.array([*mark, 0.0]))).max() < 1.0


def test_a_box_hides_the_ground_behind_it() -> None:
    city = CityMap.from_tables(_tables(), "boston-seaport")
    ground = Ground.of([paint_surface(city, (0, 0, 90, 90), seed=1, resolution=0.2)])
    place = (CAR @ np.array([10.0, 0.0, 0.75, 1]))[:3]
    about = (CAR @ FORWARD)[:2, 3]
    box = solids_from_boxes(
        place[None], np.array([[4.0, 2.0, 1.5]]), np.array([0.3]), np.array([[1.0, 0, 0]]), np.array([0]), about, 2
    )
    image = _image(ground, box)
    u, v = np.round(_project(place)).astype(int)
    red, green, _ = image[v, u].astype(int)
    assert red > 2 * green
    # the edges of the rear face, 2 m wide at x = 8 m, within a pixel
    row = image[v].astype(int)
    columns = np.flatnonzero(row[:, 0] > 2 * row[:, 1])
    left = _project((CAR @ np.array([8.0, 1.0, 0.75, 1]))[:3])[0]
    right = _project((CAR @ np.array([8.0, -1.0, 0.75, 1]))[:3])[0]
    assert abs(columns.min() - left) < 1.5 and abs(columns.max() - right) < 1.5


def test_the_same_seed_gives_the_same_image() -> None:
    city = CityMap.from_tables(_tables(), "boston-seaport")
    one, two = (paint_surface(city, (0, 0, 60, 60), seed=5, resolution=0.2) for _ in range(2))
    assert torch.equal(one.texels, two.texels)
    assert np.array_equal(_image(Ground.of([one]), _no_solids()), _image(Ground.of([two]), _no_solids()))
