"""Training worlds from real geography: parts of recorded maps, around clusters of recorded drives.

The ground of a whole city at 0.1 m would not fit into a GPU's memory, and most of it is never driven. The drives to
give are those of scenes to train on: a world of a validation scene shows its streets.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from shapely.geometry import box

from nmp.citymap import load_with_tables
from nmp.errors import NmpError
from nmp_train.sim.drive import Trajectory
from nmp_train.sim.scenery import make_scenery
from nmp_train.sim.surface import paint_surface
from nmp_train.world import State, World, assemble

Array = NDArray[np.float64]
Bounds = tuple[float, float, float, float]

SITE_M = 420.0
"""edge of the ground of a world"""
VIEW_M = 80.0
"""drives keep this far from its edge"""
CUT_M = 60.0
"""the map is cut this far outside of the ground, where nobody sees the cut"""
LEAST_FRAMES = 40
"""poses at 2 Hz that are worth a world: 20 s"""
APART_M = 70.0
"""between frames of training and held-out frames, at least: no street is in the labels of both"""
EVERY_HELD_OUT = 5
"""one site in so many is held out; no multiple of the number of cities, so that each has its turn"""
RATE_HZ = 2.0


@dataclass(frozen=True)
class Site:
    """A part of a city that drives go through."""

    name: str
    location: str
    bounds: Bounds
    """x0, y0, x1, y1 of the ground, map frame, m"""
    drives: list[Trajectory]
    """what of them lies inside, at 2 Hz"""

    @property
    def frames(self) -> int:
        return sum(len(d.times_s) for d in self.drives)


def find_sites(
    drives: Sequence[Trajectory], *, size_m: float = SITE_M, reach_m: float = 0.0
) -> tuple[list[Site], list[Site]]:
    """Return the sites of recorded drives, to train on and held out.

    Squares that hold as many frames as possible, the fullest first, the cities in turn; no frame is in two of them.
    Every fifth site is held out, and training leaves out the frames within 70 m of its frames, or more where labels
    reach further: what the labels of one side show, those of the other do not. The same drives give the same sites.

    :param reach_m: how far labels reach from the car, m

    Raises :class:`NmpError` when the drives do not fill two sites.
    """
    places = sorted({d.location for d in drives})
    by_place = [_sites_of([d.resampled(RATE_HZ) for d in drives if d.location == p], size_m) for p in places]
    ranked = sorted((rank, -site.frames, site.name) for sites in by_place for rank, site in enumerate(sites))
    sites = {s.name: s for found in by_place for s in found}
    order = [sites[name] for _, _, name in ranked]
    if len(order) < 2:
        raise NmpError(f"the drives fill {len(order)} sites of {size_m:g} m: give more of them, two sites or more")
    held_out = order[1::EVERY_HELD_OUT]
    training = []
    for site in order:
        if site in held_out:
            continue
        others = [d.poses_xyyaw[:, :2] for s in held_out if s.location == site.location for d in s.drives]
        if others:
            tree = cKDTree(np.concatenate(others))
            apart = max(APART_M, 2 * reach_m)
            kept = [_runs(d, tree.query(d.poses_xyyaw[:, :2])[0] > apart) for d in site.drives]
            site = replace(site, drives=[run for runs in kept for run in runs])
        if site.frames >= LEAST_FRAMES:
            training.append(site)
    return training, held_out


def _sites_of(drives: list[Trajectory], size_m: float) -> list[Site]:
    xy = np.concatenate([d.poses_xyyaw[:, :2] for d in drives])
    reach = size_m / 2 - VIEW_M
    if reach <= 0:
        raise NmpError(f"sites of {size_m:g} m have no room for drives: choose more than {2 * VIEW_M:g} m")
    tree = cKDTree(xy)
    free = np.ones(len(xy), dtype=bool)
    out: list[Site] = []
    while free.any():
        left = cKDTree(xy[free])
        counts = left.query_ball_point(xy[free], reach, p=np.inf, return_length=True)
        if counts.max() < LEAST_FRAMES:
            break
        inside = left.data[left.query_ball_point(xy[free][counts.argmax()], reach, p=np.inf)]
        # Moved to the middle of what it holds, it holds no less.
        middle = (inside.min(axis=0) + inside.max(axis=0)) / 2
        taken = np.zeros(len(xy), dtype=bool)
        taken[tree.query_ball_point(middle, reach + 1e-6, p=np.inf)] = True
        taken &= free
        free &= ~taken
        parts, start = [], 0
        for drive in drives:
            parts += _runs(drive, taken[start : start + len(drive.times_s)])
            start += len(drive.times_s)
        x, y = middle.round(1).tolist()
        half = size_m / 2
        name = f"{drives[0].location} x {x:.0f} y {y:.0f}"
        out.append(Site(name, drives[0].location, (x - half, y - half, x + half, y + half), parts))
    return [s for s in out if s.frames >= LEAST_FRAMES]


def _runs(drive: Trajectory, keep: NDArray[np.bool_]) -> list[Trajectory]:
    """Return the pieces of a drive whose poses are kept, with their own times; single poses are left out."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    return [
        replace(drive, times_s=drive.times_s[a:b], poses_xyyaw=drive.poses_xyyaw[a:b])
        for a, b in edges.reshape(-1, 2)
        if b - a > 1
    ]


def make_real_world(maps: Path, site: Site, difficulty: float = 1.0, *, texel_m: float = 0.1, trips: int = 1) -> World:
    """Make the world of a site.

    :param maps: folder with ``maps/expansion/<location>.json`` (v1.3)
    :param difficulty: as in :func:`nmp_train.world.make_world`
    :param trips: as in :func:`nmp_train.world.assemble`
    """
    city, tables = load_with_tables(maps, site.location, repair=True)
    tables = {**tables, "location": site.location}
    seed = zlib.crc32(site.name.encode())
    x0, y0, x1, y1 = site.bounds
    part = city.within((x0 - CUT_M, y0 - CUT_M, x1 + CUT_M, y1 + CUT_M))
    surface = paint_surface(part, site.bounds, seed, texel_m, difficulty=difficulty)
    scenery = make_scenery(tables, seed, box(*site.bounds))
    return assemble(
        site.name, [State(part, surface)], [tables], scenery, site.drives, seed, difficulty=difficulty, trips=trips
    )
