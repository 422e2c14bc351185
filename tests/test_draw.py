"""Pictures: directions, colours, and the ground seen from a camera."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from nmp.draw import (
    CAR,
    CLASS_COLOURS,
    GROUND,
    INK,
    Panel,
    bev_picture,
    camera_mosaic,
    city_picture,
    film_sheet,
    film_strip,
    project_layers,
    save_png,
)
from nmp.errors import NmpError
from nmp.frame import CAMERAS, CLASSES, Camera, CameraShot, Frame, LocalMap
from nmp.geometry import BevGrid, transform_from_xyyaw

GRID = BevGrid()
WIDTH, HEIGHT = 160, 90
POSE = transform_from_xyyaw(400.0, 1100.0, 0.7)


def colour_at(picture: np.ndarray, row: float, col: float) -> tuple[int, ...]:
    return tuple(int(v) for v in picture[int(row), int(col)])


def layers_with(name: str, x: tuple[float, float], y: tuple[float, float]) -> np.ndarray:
    """Layers with one rectangle (ego frame, m) of one class."""
    out = np.zeros((3, *GRID.shape), np.float32)
    centres = GRID.centres()
    inside = (centres[..., 0] >= x[0]) & (centres[..., 0] < x[1]) & (centres[..., 1] >= y[0]) & (centres[..., 1] < y[1])
    out[CLASSES.index(name)][inside] = 1.0
    return out


def local_map(layers: np.ndarray, pose: np.ndarray = POSE, evidence: np.ndarray | None = None) -> LocalMap:
    seen = np.ones(GRID.shape, np.float32) if evidence is None else evidence
    return LocalMap(1, "boston-seaport", pose, GRID, layers, seen)


def shot(name: str = "cam_front", heading: float = 0.0) -> CameraShot:
    """A level camera 1.5 m above the ground at the car's origin, black image, horizon at half the height."""
    optical = Rotation.from_matrix([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    extrinsics = np.eye(4)
    extrinsics[:3, :3] = (Rotation.from_euler("z", heading, degrees=True) * optical).as_matrix()
    extrinsics[2, 3] = 1.5
    intrinsics = np.array([[100.0, 0, WIDTH / 2], [0, 100.0, HEIGHT / 2], [0, 0, 1]])
    camera = Camera(name, WIDTH, HEIGHT, intrinsics, extrinsics)
    return CameraShot(camera, 1, np.zeros((HEIGHT, WIDTH, 3), np.uint8), POSE)


def frame() -> Frame:
    headings = dict(zip(CAMERAS, (0, -55, -110, 180, 110, 55), strict=True))
    return Frame(1, "boston-seaport", POSE, tuple(shot(name, headings[name]) for name in CAMERAS))


def test_bev_forward_is_right_and_left_is_up() -> None:
    picture = bev_picture(local_map(layers_with("crossing", (20, 25), (5, 10))), scale=1)
    assert picture.shape == (200, 400, 3) and picture.dtype == np.uint8
    assert colour_at(picture, 50, 350) == CLASS_COLOURS["crossing"]  # 22.5 m ahead, 7.5 m to the left
    assert colour_at(picture, 150, 350) == GROUND
    assert colour_at(picture, 50, 50) == GROUND
    assert colour_at(picture, 98, 205) == CAR


def test_bev_unknown_is_black_and_unlikely_is_ground() -> None:
    evidence = np.zeros(GRID.shape, np.float32)
    evidence[:, 200:] = 1
    picture = bev_picture(local_map(np.full((3, *GRID.shape), 0.1, np.float32), evidence=evidence), scale=1)
    assert colour_at(picture, 30, 100) == INK
    assert colour_at(picture, 30, 300) == GROUND


def test_projection_meets_the_ground_where_geometry_says() -> None:
    layers = layers_with("divider", (10, 20), (2, 4))
    picture = project_layers(shot(), layers, GRID, POSE, strength=1.0)
    assert picture.shape == (HEIGHT, WIDTH, 3)
    # a point 15 m ahead, 3 m to the left: u = cx - 100 * 3 / 15, v = cy + 100 * 1.5 / 15
    assert colour_at(picture, 45 + 10, 80 - 20) == CLASS_COLOURS["divider"]
    assert colour_at(picture, 45 + 10, 80 + 20) == (0, 0, 0)  # not mirrored
    assert not picture[:45].any()  # nothing in the sky
    painted = np.argwhere(picture.any(axis=-1))
    assert painted[:, 0].min() == pytest.approx(45 + 100 * 1.5 / 20, abs=1)
    assert painted[:, 0].max() == pytest.approx(45 + 100 * 1.5 / 10, abs=1)


def test_projection_moves_with_the_car() -> None:
    """The camera fired when the car was 5 m further on: what was 15 m ahead is now 10 m ahead."""
    layers = layers_with("divider", (14.5, 15.5), (-1, 1))
    moved = shot()
    later = POSE @ transform_from_xyyaw(5.0, 0.0, 0.0)
    moved = CameraShot(moved.camera, 2, moved.image, later)
    painted = np.argwhere(project_layers(moved, layers, GRID, POSE, strength=1.0).any(axis=-1))
    assert painted[:, 0].mean() == pytest.approx(45 + 100 * 1.5 / 10, abs=1.5)


def test_projection_scales_the_picture() -> None:
    layers = layers_with("divider", (10, 20), (2, 4))
    picture = project_layers(shot(), layers, GRID, POSE, width=320, strength=1.0)
    assert picture.shape == (180, 320, 3)
    assert colour_at(picture, 2 * 55, 2 * 60) == CLASS_COLOURS["divider"]


def test_mosaic_and_strip_sizes() -> None:
    layers = layers_with("boundary", (-30, 30), (5, 6))
    mosaic = camera_mosaic(frame(), width=160, gap=4)
    assert mosaic.shape == (2 * 90 + 4, 3 * 160 + 8, 3)
    m = local_map(layers)
    strip = film_strip(
        frame(), [Panel.of("predicted", m), Panel("true map", m.masks)], GRID, painted=m.masks, camera_width=160
    )
    assert strip.shape == (184 + 4 + 121, 488, 3)
    sheet = film_sheet([strip, strip], "A drive", ["0.0 s", "0.5 s"])
    assert sheet.shape[1] == strip.shape[1] and sheet.shape[0] > 2 * strip.shape[0]


def test_city_map_is_north_up_and_averages() -> None:
    north = transform_from_xyyaw(100.0, 200.0, np.pi / 2)
    likely = layers_with("crossing", (20, 25), (-2, 2))
    picture = city_picture([local_map(likely, north)], resolution=0.15, margin=0.0)
    painted = np.argwhere((picture == CLASS_COLOURS["crossing"]).all(axis=-1))
    inner = painted[painted[:, 0] > 60]  # below the legend
    height = picture.shape[0]
    assert len(inner) and inner[:, 0].max() < height / 2  # ahead of a car that looks north is up
    assert inner[:, 1].mean() == pytest.approx(picture.shape[1] / 2, abs=3)
    # one vote in five for a crossing does not make one
    maps = [local_map(likely, north)] + [local_map(np.zeros_like(likely), north) for _ in range(4)]
    outvoted = city_picture(maps, resolution=0.15, margin=0.0)
    assert len(np.argwhere((outvoted == CLASS_COLOURS["crossing"]).all(axis=-1))) == len(painted) - len(inner)


def test_city_map_of_a_long_drive_stays_small() -> None:
    nothing = np.zeros((3, *GRID.shape), np.float32)
    maps = [local_map(nothing, transform_from_xyyaw(x, 0.0, 0.0)) for x in (0.0, 3000.0)]
    picture = city_picture(maps, "a long way", longest_side=900)
    assert max(picture.shape[:2]) <= 1000
    with pytest.raises(NmpError, match="no layers"):
        city_picture([])


def test_saving(tmp_path: Path) -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    save_png(tmp_path / "new" / "a.png", picture)
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(NmpError, match="cannot write the picture"):
        save_png(tmp_path / "new" / "a.png" / "b.png", picture)
