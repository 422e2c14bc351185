"""A simulated training world: one city, its ground, its solids and the drives through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from nmp.citymap import CityMap
from nmp.frame import LOCATIONS
from nmp_train.sim.boxes import Boxes
from nmp_train.sim.city import generate_city
from nmp_train.sim.drive import Trajectory, sample_routes
from nmp_train.sim.scenery import make_scenery
from nmp_train.sim.surface import Surface, city_bounds, paint_surface
from nmp_train.sim.traffic import Traffic, make_traffic


@dataclass
class World:
    """Everything that a frame of one city is made from."""

    tables: Mapping[str, Any]
    """map-expansion dictionary"""
    city: CityMap
    surface: Surface
    scenery: Boxes
    drives: list[Trajectory]
    traffic: list[Traffic]
    """one per drive"""
    frames: NDArray[np.float64]
    """[F, 5]: x, y (m), yaw (rad), drive, time (s) of every frame of every drive"""
    index: cKDTree
    """over x, y of ``frames``"""
    difficulty: float = 1.0
    """of the ground, see :func:`make_world`"""


def make_world(
    seed: int,
    difficulty: float = 1.0,
    *,
    size_m: float,
    drives: int,
    duration_s: float,
    rate_hz: float = 2.0,
    texel_m: float = 0.1,
) -> World:
    """Generate a city and drives through it, all from one seed.

    :param difficulty: how ambiguous the ground is, see :class:`nmp_train.sim.clutter.Clutter`
    """
    location = LOCATIONS[seed % len(LOCATIONS)]
    tables = generate_city(seed, location, size_m)
    city = CityMap.from_tables(tables, location)
    routes = sample_routes(tables, seed + 1, drives, duration_s, rate_hz)
    rng = np.random.default_rng(seed + 2)
    traffic = [make_traffic(tables, r, seed * 1009 + i, float(rng.uniform(0.4, 1.6))) for i, r in enumerate(routes)]
    frames = np.concatenate(
        [np.column_stack([r.poses_xyyaw, np.full(len(r.times_s), i), r.times_s]) for i, r in enumerate(routes)]
    )
    return World(
        tables,
        city,
        paint_surface(city, city_bounds(city), seed + 3, texel_m, difficulty=difficulty),
        make_scenery(tables, seed + 4),
        routes,
        traffic,
        frames,
        cKDTree(frames[:, :2]),
        difficulty,
    )
