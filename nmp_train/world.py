"""A simulated training world: one city or a part of one, its ground, its solids and the drives through it."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from shapely.geometry import LineString, MultiLineString

from nmp.changelog import LAST_DAY, Change, apply_changes, time_zone
from nmp.citymap import CityMap
from nmp.frame import LOCATIONS
from nmp_train.sim.boxes import Boxes
from nmp_train.sim.changes import draw_changes, removed_markings
from nmp_train.sim.city import generate_city
from nmp_train.sim.drive import Trajectory, sample_routes
from nmp_train.sim.scenery import make_scenery
from nmp_train.sim.surface import Surface, city_bounds, paint_surface
from nmp_train.sim.traffic import Traffic, make_traffic

Array = NDArray[np.float64]

DAY_S = 86400.0


@dataclass(frozen=True)
class State:
    """A city between two changes."""

    city: CityMap
    surface: Surface


@dataclass
class World:
    """Everything that the frames of one place are made from."""

    name: str
    """for messages"""
    states: list[State]
    """the city as it was mapped and, in a world that changes, as it is from ``changed_s`` on"""
    scenery: Boxes
    drives: list[Trajectory]
    """in the order of their start"""
    started_s: Array
    """[drives] time at which each of them begins, s since 1970"""
    traffic: list[list[Traffic]]
    """of each drive, and of each time that it is made again: what hides the road on one day does not on another"""
    frames: Array
    """[F, 5]: x, y (m), yaw (rad), drive, time since its start (s) of every frame of every drive"""
    changed_xy: Array
    """[N, 2] where the states differ (m)"""
    changed_s: float = np.inf
    """s since 1970; infinite in a world that stays as it is"""
    difficulty: float = 1.0
    """of the ground, see :func:`make_world`"""

    @property
    def city(self) -> CityMap:
        """The map before all changes."""
        return self.states[0].city

    @property
    def times_s(self) -> Array:
        """[F] time of every frame, s since 1970."""
        return self.started_s[self.frames[:, 3].astype(np.int64)] + self.frames[:, 4]

    def state_of(self, drive: int) -> int:
        """Return the number of the state in which a drive finds the city."""
        return int(self.started_s[drive] >= self.changed_s)


def make_world(
    seed: int,
    difficulty: float = 1.0,
    changes: int = 0,
    *,
    size_m: float,
    drives: int,
    duration_s: float,
    rate_hz: float = 2.0,
    texel_m: float = 0.1,
    trips: int = 1,
) -> World:
    """Generate a city and drives through it on days of four months, all from one seed.

    :param difficulty: how ambiguous the ground is, see :class:`nmp_train.sim.clutter.Clutter`
    :param changes: crossings, lane markings and kerbs that change, all on the day that parts the drives in halves.
        The ground then takes twice the memory. A city where every drive is on one day stays as it is
    :param trips: as in :func:`assemble`
    """
    location = LOCATIONS[seed % len(LOCATIONS)]
    tables = generate_city(seed, location, size_m)
    routes = sample_routes(tables, seed + 1, drives, duration_s, rate_hz)
    city = CityMap.from_tables(tables, location)
    bounds = city_bounds(city)
    states = [State(city, paint_surface(city, bounds, seed + 3, texel_m, difficulty=difficulty))]
    tables_of = [tables]
    day, changed = _draw_changes(tables, routes, seed + 5, changes)
    if changed:
        tables_of.append(apply_changes(tables, changed, LAST_DAY))
        later = CityMap.from_tables(tables_of[1], location)
        gone = removed_markings(changed, LAST_DAY)
        surface = paint_surface(later, bounds, seed + 3, texel_m, ghosts=gone, difficulty=difficulty)
        states.append(State(later, surface))
    return assemble(
        f"city {seed}",
        states,
        tables_of,
        make_scenery(tables, seed + 4),
        routes,
        seed,
        changed_on=day,
        changed_xy=[(change.x, change.y) for change in changed],
        difficulty=difficulty,
        trips=trips,
    )


def assemble(
    name: str,
    states: list[State],
    tables: Sequence[dict[str, Any]],
    scenery: Boxes,
    drives: Sequence[Trajectory],
    seed: int,
    *,
    changed_on: str = LAST_DAY,
    changed_xy: Sequence[tuple[float, float]] = (),
    difficulty: float = 1.0,
    trips: int = 1,
) -> World:
    """Put a world together: give its drives a time of the day and traffic, and list their frames.

    :param tables: map-expansion dictionary of each state
    :param changed_on: YYYY-MM-DD, the first day of the second state
    :param changed_xy: [N, 2] where the two states differ (m)
    :param trips: times that each drive can be made, among other road users each time. The first is as the drive finds
        the city, the others come when all of it has changed
    """
    rng = np.random.default_rng((seed, 2))
    started = np.array([_midnight(d) + rng.uniform(0.3, 0.9) * DAY_S for d in drives])
    order = np.argsort(started, kind="stable")
    drives, started = [drives[i] for i in order], started[order]
    world = World(
        name=name,
        states=states,
        scenery=scenery,
        drives=list(drives),
        started_s=started,
        traffic=[],
        frames=np.concatenate(
            [np.column_stack([d.poses_xyyaw, np.full(len(d.times_s), i), d.times_s]) for i, d in enumerate(drives)]
        ),
        changed_s=_midnight(replace(drives[0], date=changed_on)) if len(states) > 1 else np.inf,
        changed_xy=np.reshape(changed_xy, (-1, 2)),
        difficulty=difficulty,
    )
    for i, drive in enumerate(drives):
        users = [make_traffic(tables[world.state_of(i)], drive, seed * 1009 + i, float(rng.uniform(0.4, 1.6)))]
        for trip in range(1, trips):
            own = np.random.default_rng((seed, 3, i, trip))
            users.append(make_traffic(tables[-1], drive, int(own.integers(2**31)), float(own.uniform(0.4, 1.6))))
        world.traffic.append(users)
    return world


def _midnight(drive: Trajectory) -> float:
    """Return the local midnight before a drive, s since 1970."""
    day = datetime.datetime.fromisoformat(drive.date)
    return day.replace(tzinfo=time_zone(drive.location)).timestamp()


def _draw_changes(
    tables: dict[str, Any], drives: Sequence[Trajectory], seed: int, count: int
) -> tuple[str, list[Change]]:
    """Draw changes where they are seen from the drives; returns the one day of all of them (YYYY-MM-DD)."""
    dates = sorted({d.date for d in drives})
    if not count or len(dates) < 2:
        return LAST_DAY, []
    # A line needs two points: a car that stands still has one place.
    lines = [LineString(np.concatenate([d.poses_xyyaw[:, :2], d.poses_xyyaw[-1:, :2] + 0.01])) for d in drives]
    place = drives[0].location
    drawn = draw_changes(tables, place, seed, (dates[0], dates[-1]), count, along=MultiLineString(lines))
    every = sorted(d.date for d in drives)
    day = max(every[len(every) // 2], dates[1])
    return day, [replace(change, date=day) for change in drawn]
