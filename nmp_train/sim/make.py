"""Simulated data sets on disk: a nuScenes folder from a seed."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from shapely.geometry import LineString, MultiLineString, Point

from nmp.changelog import Change, apply_changes, in_force
from nmp.citymap import CityMap, load_with_tables
from nmp.errors import NmpError
from nmp.frame import LOCATIONS
from nmp_train.sim.boxes import Boxes
from nmp_train.sim.changes import draw_changes, removed_markings
from nmp_train.sim.city import generate_city
from nmp_train.sim.dataset import SEEDS_PER_DRIVE, Drive, RenderCall, write_dataset
from nmp_train.sim.drive import Trajectory, load_trajectories, sample_routes, second_pass
from nmp_train.sim.fleet import FleetPlan, plan_fleet
from nmp_train.sim.localisation import LocalisationNoise
from nmp_train.sim.overlap import format_overlaps, overlaps
from nmp_train.sim.render import MAX_SOLIDS, Ground, Weather, render, solids_from_boxes
from nmp_train.sim.surface import city_bounds, paint_surface
from nmp_train.sim.weather import MIX

log = logging.getLogger(__name__)

VIEW_M = 120.0
"""ground is painted this far around a drive"""
BEYOND_M = 30.0
"""but not farther than this from the roads of the city"""
TOGETHER_M2 = 0.8e6
"""the ground of several drives is painted in one piece up to this size"""
OFF_ROAD_M = 25.0
"""a trajectory may be this far from any road: car parks and drives are not always mapped"""
DEMO_SEED = 75

Bounds = tuple[float, float, float, float]


@dataclass(frozen=True)
class Output:
    """How a data set is written, whatever is in it."""

    version: str = "v1.0-mini"
    render_scale: float = 0.4
    """resolution of the ray caster; images are enlarged to 1600 x 900"""
    sweeps: bool = False
    """also the 12 Hz images between the keyframes"""
    device: str | None = None
    """cuda or cpu; None: cuda where there is one"""
    localisation: LocalisationNoise | None = None
    """what the car knows of its pose; None: everything but the slopes"""
    slopes: bool = True
    """roads are not flat, see :func:`nmp_train.sim.dataset.write_dataset`"""
    only: tuple[str, ...] = ()
    """write these scenes alone, exactly as they are in the whole set; empty: all"""

    @property
    def torch_device(self) -> torch.device:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise NmpError("there is no CUDA device here: leave --device out, or choose cpu")
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def make_renderer(ground: Ground, city_seed: int, device: torch.device | str = "cpu") -> RenderCall:
    """Return the ``render`` call of :func:`write_dataset` for a ground of one city on ``device``.

    The weather of a drive follows from its number and ``city_seed``, the noise of an image from its own number.
    """
    device = torch.device(device)

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
        scene_generator = torch.Generator().manual_seed(city_seed + seed // SEEDS_PER_DRIVE)
        generator = torch.Generator(device).manual_seed(city_seed * SEEDS_PER_DRIVE + seed)
        # Not compiled: frames come one by one, and most of their time goes into the JPEG files.
        with torch.inference_mode():
            images = render(
                ground,
                torch.zeros(1, dtype=torch.int64, device=device),
                torch.from_numpy(about)[None].to(device),
                torch.from_numpy(intrinsics).float()[None].to(device),
                torch.from_numpy(relative).float()[None].to(device),
                solids_from_boxes(boxes.centre, boxes.size, boxes.yaw, boxes.rgb, boxes.kind, about, MAX_SOLIDS).to(
                    device
                ),
                Weather.sample(1, scene_generator, weather).to(device),
                size,
                generator=generator,
            )
        return images[0].permute(0, 2, 3, 1).contiguous().cpu().numpy()

    return call


class _Grounds:
    """The ground under every drive, painted when it is first needed, in the state of the drive's date."""

    def __init__(
        self,
        tables: Mapping[str, dict[str, Any]],
        drives: Sequence[Trajectory],
        changes: Mapping[str, Sequence[Change]],
        seeds: Mapping[str, int],
        device: torch.device,
        repair: bool = False,
    ) -> None:
        self.tables, self.changes, self.seeds, self.device, self.repair = tables, changes, seeds, device, repair
        self._cities: dict[str, tuple[int, CityMap, list[Any]]] = {}
        self._painted: dict[str, tuple[int, Bounds, Ground]] = {}
        self.together: dict[str, Bounds] = {}
        # Beyond the last road there is nothing to see.
        self.limits = {p: city_bounds(self.city_on(p, "0001-01-01")[1], BEYOND_M) for p in tables}
        for place in tables:
            box = self._box([d for d in drives if d.location == place])
            if (box[2] - box[0]) * (box[3] - box[1]) <= TOGETHER_M2:
                self.together[place] = box

    def city_on(self, place: str, date: str) -> tuple[int, CityMap, list[Any]]:
        """Return the number of changes in force, the map, and the outlines of what was removed."""
        count = len(in_force(self.changes.get(place, ()), date))
        if place not in self._cities or self._cities[place][0] != count:
            tables, removed = self.tables[place], []
            if count:
                tables = apply_changes(tables, self.changes[place], date)
                removed = removed_markings(self.changes[place], date)
            self._cities[place] = (count, CityMap.from_tables(tables, place, repair=self.repair), removed)
        return self._cities[place]

    def of(self, drive: Trajectory) -> Ground:
        place = drive.location
        count, city, removed = self.city_on(place, drive.date)
        bounds = self.together.get(place) or self._box([drive])
        # The last ground of each city is kept: drives come in the order of their dates, and change little.
        if place not in self._painted or self._painted[place][:2] != (count, bounds):
            self._painted.pop(place, None)
            surface = paint_surface(city, bounds, self.seeds[place], ghosts=removed)
            self._painted[place] = (count, bounds, Ground.of([surface], self.device))
        return self._painted[place][2]

    def _box(self, drives: Sequence[Trajectory]) -> Bounds:
        xy = np.concatenate([d.poses_xyyaw[:, :2] for d in drives])
        limit = self.limits[drives[0].location]
        x0, y0 = np.maximum(xy.min(axis=0) - VIEW_M, limit[:2])
        x1, y1 = np.minimum(xy.max(axis=0) + VIEW_M, limit[2:])
        return float(x0), float(y0), float(x1), float(y1)


def _write(
    out: Path,
    drives: Sequence[Drive],
    tables: Mapping[str, dict[str, Any]],
    seed: int,
    output: Output,
    *,
    changes: Mapping[str, Sequence[Change]],
    ground_seeds: Mapping[str, int],
    splits: Mapping[str, Sequence[str]] | None = None,
    repair: bool = False,
) -> Path:
    """Write drives with the ground that belongs to each of them."""
    device = output.torch_device
    grounds = _Grounds(tables, [d.trajectory for d in drives], changes, ground_seeds, device, repair)

    def call(trajectory: Trajectory) -> RenderCall:
        return lambda *args, **kwargs: make_renderer(grounds.of(trajectory), seed, device)(*args, **kwargs)

    return write_dataset(
        out,
        [replace(d, render=call(d.trajectory)) for d in drives],
        tables,
        version=output.version,
        sweeps=output.sweeps,
        seed=seed,
        render_scale=output.render_scale,
        changes=changes,
        localisation=output.localisation,
        slopes=output.slopes,
        splits=splits,
        only=output.only or None,
    )


def _changes(
    tables: Mapping[str, dict[str, Any]], drives: Sequence[Trajectory], seed: int, counts: Mapping[str, int]
) -> dict[str, list[Change]]:
    """Draw changes of each city where it is driven, between its first and its last drive."""
    out: dict[str, list[Change]] = {}
    for place, count in counts.items():
        if count < 0:
            raise NmpError(f"{count} changes are not possible: ask for 0 or more")
        here = [d for d in drives if d.location == place]
        dates = sorted({d.date for d in here})
        if not count:
            continue
        if len(dates) < 2:
            log.warning("%s is driven on %s only: nothing changes there", place, dates[0])
            continue
        # A line needs two points: a car that stands still has one place.
        lines = [np.concatenate([d.poses_xyyaw[::6, :2], d.poses_xyyaw[-1:, :2] + 0.01]) for d in here]
        along = MultiLineString([LineString(line) for line in lines])
        out[place] = draw_changes(tables[place], place, seed, (dates[0], dates[-1]), count, along=along)
    if any(counts.values()) and not out:
        raise NmpError(
            "changes need drives of a city on two days or more: leave --changes out, or simulate more drives"
        )
    return out


def make_dataset(
    out: Path,
    *,
    seed: int,
    routes: int = 1,
    passes: int = 1,
    duration_s: float = 20.0,
    size_m: float = 420.0,
    weather: str = "day",
    changes: int = 0,
    output: Output = Output(),
) -> Path:
    """Write a nuScenes data set of one simulated city: ``routes`` routes, each driven ``passes`` times.

    Scenes are numbered from scene-0001: first all routes once, then all of them again on another day. The same
    arguments give the same data set. ``changes`` crossings, lane markings and kerbs change between the first and the
    last day.
    """
    location = LOCATIONS[seed % len(LOCATIONS)]
    tables = generate_city(seed, location, size_m)
    first = sample_routes(tables, seed + 1, routes, duration_s, 12.0)
    trajectories = list(first)
    for again in range(1, passes):
        trajectories += [second_pass(t, seed + 1000 * again + i, tables) for i, t in enumerate(first)]
    rng = np.random.default_rng(seed + 4)
    drives = [
        Drive(t, weather=_draw_weather(rng) if weather == "mixed" else weather, name=f"scene-{i + 1:04d}")
        for i, t in enumerate(trajectories)
    ]
    cities = {location: tables}
    changed = _changes(cities, trajectories, seed, {location: changes})
    return _write(out, drives, cities, seed, output, changes=changed, ground_seeds={location: seed + 3})


def make_from_maps(
    out: Path,
    maps: Path,
    trajectories: Path,
    *,
    scenes: int,
    seed: int,
    weather: str = "mixed",
    changes: int = 0,
    output: Output = Output(),
) -> Path:
    """Write a nuScenes data set of recorded drives through existing maps.

    :param maps: folder with ``maps/expansion/<location>.json`` (v1.3)
    :param trajectories: folder of scene files or one list file, see :func:`load_trajectories`
    :param scenes: how many of them, drawn with ``seed``; 0 takes all
    :param changes: of each city, as in :func:`make_dataset`
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
    changed = _changes(tables, drives, seed, dict.fromkeys(tables, changes))
    wanted = [Drive(d, weather=w, name=d.name) for d, w in zip(drives, words, strict=True)]
    seeds = dict.fromkeys(tables, seed)
    return _write(out, wanted, tables, seed, output, changes=changed, ground_seeds=seeds, repair=True)


def plan_bench(
    seed: int,
    *,
    cities: int = 4,
    scenes: int = 150,
    duration_s: float = 20.0,
    size_m: float | None = None,
    changes: int | None = None,
) -> tuple[FleetPlan, dict[str, list[Change]]]:
    """Plan the data set of :func:`make_bench`; returns the drives and the changes by location."""
    plan = plan_fleet(seed, cities, scenes, duration_s, size_m)
    trajectories = [s.trajectory for s in plan.scenes]
    counts = {}
    for place in plan.cities:
        here = [t for t in trajectories if t.location == place]
        some = min(6, (len(here) + 7) // 8) if len({t.date for t in here}) > 1 else 0
        counts[place] = some if changes is None else changes
    return plan, _changes(plan.cities, trajectories, seed, counts)


def make_bench(
    out: Path,
    seed: int,
    *,
    cities: int = 4,
    scenes: int = 150,
    duration_s: float = 20.0,
    size_m: float | None = None,
    changes: int | None = None,
    output: Output = Output(),
) -> Path:
    """Write the data set that the project measures itself with: a fleet in a few simulated cities.

    See :func:`nmp_train.sim.fleet.plan_fleet` for the drives. The same arguments give the same data set, and
    ``output.only`` gives the same scenes as they are in the whole of it.

    :param changes: of each city; None: one for every eight scenes, up to six
    """
    plan, changed = plan_bench(
        seed, cities=cities, scenes=scenes, duration_s=duration_s, size_m=size_m, changes=changes
    )
    drives = [Drive(s.trajectory, s.weather, s.density, s.vehicle, s.name) for s in plan.scenes]
    # Cities have grounds of their own even where their coordinates are the same.
    seeds = {place: zlib.crc32(f"{seed}/{place}".encode()) for place in plan.cities}
    return _write(out, drives, plan.cities, seed, output, changes=changed, ground_seeds=seeds, splits=plan.splits)


def write_plan(out: Path, plan: FleetPlan, changes: Mapping[str, Sequence[Change]]) -> str:
    """Write a plan as JSON and return the table of its overlaps."""
    if out.exists():
        raise NmpError(f"{out} exists already: remove it or choose another file")
    plan.save(out, {place: [c.to_json() for c in found] for place, found in changes.items()})
    return format_overlaps({"plan": overlaps([s.trajectory for s in plan.scenes])})


def _check_on_map(drive: Trajectory, city: CityMap) -> None:
    for x, y, _ in drive.poses_xyyaw[::5]:
        around = Point(x, y).buffer(OFF_ROAD_M)
        if not city.road_segments.near(around) and not city.lanes.near(around):
            raise NmpError(
                f"trajectory {drive.name or drive.date} leaves the map of {drive.location} at x = {x:.1f}, "
                f"y = {y:.1f} m: use the map that it was recorded in, or cut the trajectory"
            )


def _draw_weather(rng: np.random.Generator) -> str:
    return str(rng.choice(list(MIX), p=list(MIX.values())))


def make_demo_dataset(out: Path, seed: int = DEMO_SEED) -> Path:
    """Write the data set of the demo: one route, driven on two days (scene-0001 and scene-0002)."""
    return make_dataset(out, seed=seed, routes=1, passes=2, duration_s=20.0)
