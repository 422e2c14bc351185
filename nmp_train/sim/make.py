"""Simulated data sets on disk: a nuScenes folder from a seed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from shapely.geometry import Point

from nmp.citymap import CityMap, load_with_tables
from nmp.errors import NmpError
from nmp.frame import LOCATIONS
from nmp_train.sim.city import generate_city
from nmp_train.sim.dataset import SEEDS_PER_DRIVE, Drive, RenderCall, write_dataset
from nmp_train.sim.drive import Trajectory, load_trajectories, sample_routes, second_pass
from nmp_train.sim.render import Ground, Weather, render, solids_from_boxes
from nmp_train.sim.surface import city_bounds, paint_surface
from nmp_train.sim.traffic import Boxes

MAX_SOLIDS = 80
VIEW_M = 120.0
"""ground is painted this far around a drive"""
OFF_ROAD_M = 25.0
"""a trajectory may be this far from any road: car parks and drives are not always mapped"""
DEMO_SEED = 75


def make_renderer(ground: Ground, city_seed: int) -> RenderCall:
    """Return the ``render`` call of :func:`write_dataset` for a ground of one city."""

    def call(
        intrinsics: NDArray[np.float64],
        map_from_camera: NDArray[np.float64],
        boxes: Boxes,
        size: tuple[int, int],
        weather: str,
        seed: int,
    ) -> NDArray[np.uint8]:
        about = map_from_camera[0, :2, 3].copy()
        relative = map_from_camera.copy()
        relative[:, :2, 3] -= about
        # One drive has one weather: its draw depends on the drive, the noise on the image.
        scene_generator = torch.Generator().manual_seed(city_seed + seed // SEEDS_PER_DRIVE)
        generator = torch.Generator().manual_seed(city_seed * SEEDS_PER_DRIVE + seed)
        with torch.inference_mode():
            images = render(
                ground,
                torch.zeros(1, dtype=torch.int64),
                torch.from_numpy(about)[None],
                torch.from_numpy(intrinsics).float()[None],
                torch.from_numpy(relative).float()[None],
                solids_from_boxes(boxes.centre, boxes.size, boxes.yaw, boxes.rgb, boxes.kind, about, MAX_SOLIDS),
                Weather.sample(1, scene_generator, weather),
                size,
                generator=generator,
            )
        return images[0].permute(0, 2, 3, 1).contiguous().numpy()

    return call


def make_dataset(
    out: Path,
    *,
    seed: int,
    routes: int = 1,
    passes: int = 1,
    duration_s: float = 20.0,
    size_m: float = 420.0,
    version: str = "v1.0-mini",
    render_scale: float = 0.4,
    sweeps: bool = False,
    weather: str = "day",
) -> Path:
    """Write a nuScenes data set of one simulated city: ``routes`` routes, each driven ``passes`` times.

    Scenes are numbered from scene-0001: first all routes once, then all of them again on another day. The same
    arguments give the same data set.
    """
    location = LOCATIONS[seed % len(LOCATIONS)]
    tables = generate_city(seed, location, size_m)
    first = sample_routes(tables, seed + 1, routes, duration_s, 12.0)
    trajectories = list(first)
    for again in range(1, passes):
        trajectories += [second_pass(t, seed + 1000 * again + i, tables) for i, t in enumerate(first)]
    city = CityMap.from_tables(tables, location)
    ground = Ground.of([paint_surface(city, city_bounds(city), seed + 3)])
    rng = np.random.default_rng(seed + 4)
    drives = [
        Drive(t, weather=_draw_weather(rng) if weather == "mixed" else weather, name=f"scene-{i + 1:04d}")
        for i, t in enumerate(trajectories)
    ]
    return write_dataset(
        out,
        drives,
        {location: tables},
        version=version,
        render=make_renderer(ground, seed),
        sweeps=sweeps,
        seed=seed,
        render_scale=render_scale,
    )


def make_from_maps(
    out: Path,
    maps: Path,
    trajectories: Path,
    *,
    scenes: int,
    seed: int,
    version: str = "v1.0-mini",
    render_scale: float = 0.4,
    sweeps: bool = False,
    weather: str = "mixed",
) -> Path:
    """Write a nuScenes data set of recorded drives through existing maps.

    :param maps: folder with ``maps/expansion/<location>.json`` (v1.3)
    :param trajectories: folder of scene files or one list file, see :func:`load_trajectories`
    :param scenes: how many of them, drawn with ``seed``; 0 takes all
    """
    drives = load_trajectories(trajectories)
    rng = np.random.default_rng(seed)
    if scenes > len(drives):
        raise NmpError(f"{trajectories} holds {len(drives)} trajectories: ask for {len(drives)} scenes or fewer")
    if scenes:
        drives = [drives[i] for i in sorted(rng.choice(len(drives), scenes, replace=False))]
    cities: dict[str, CityMap] = {}
    tables: dict[str, dict[str, Any]] = {}
    for place in sorted({d.location for d in drives}):
        cities[place], found = load_with_tables(maps, place, repair=True)
        tables[place] = {**found, "location": place}
    for drive in drives:
        _check_on_map(drive, cities[drive.location])
    words = [_draw_weather(rng) if weather == "mixed" else weather for _ in drives]

    @functools.lru_cache(maxsize=1)
    def renderer(number: int) -> RenderCall:
        drive = drives[number]
        xy = drive.poses_xyyaw[:, :2]
        low, high = xy.min(axis=0) - VIEW_M, xy.max(axis=0) + VIEW_M
        bounds = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
        wider = (bounds[0] - 10, bounds[1] - 10, bounds[2] + 10, bounds[3] + 10)  # its cut edges stay out of sight
        return make_renderer(Ground.of([paint_surface(cities[drive.location].within(wider), bounds, seed)]), seed)

    wanted = [
        Drive(d, weather=w, name=d.name, render=lambda *a, number=i, **k: renderer(number)(*a, **k))
        for i, (d, w) in enumerate(zip(drives, words, strict=True))
    ]
    return write_dataset(out, wanted, tables, version=version, sweeps=sweeps, seed=seed, render_scale=render_scale)


def _check_on_map(drive: Trajectory, city: CityMap) -> None:
    for x, y, _ in drive.poses_xyyaw[::5]:
        around = Point(x, y).buffer(OFF_ROAD_M)
        if not city.road_segments.near(around) and not city.lanes.near(around):
            raise NmpError(
                f"trajectory {drive.name or drive.date} leaves the map of {drive.location} at x = {x:.1f}, "
                f"y = {y:.1f} m: use the map that it was recorded in, or cut the trajectory"
            )


def _draw_weather(rng: np.random.Generator) -> str:
    return str(rng.choice(["day", "rain", "night"], p=[0.7, 0.2, 0.1]))


def make_demo_dataset(out: Path, seed: int = DEMO_SEED) -> Path:
    """Write the data set of the demo: one route, driven on two days (scene-0001 and scene-0002)."""
    return make_dataset(out, seed=seed, routes=1, passes=2, duration_s=20.0)
