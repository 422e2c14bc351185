"""A plan of many drives through a few cities: which street, when, in which direction, lane, weather and traffic."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from nmp.errors import NmpError
from nmp_train.sim.city import generate_city
from nmp_train.sim.drive import Trajectory, drive_stretch, sample_stretch, stretch_lanes
from nmp_train.sim.rig import vehicle_of
from nmp_train.sim.weather import MIX

Array = NDArray[np.float64]

CITIES = {
    "boston-seaport": 0.50,
    "singapore-onenorth": 0.22,
    "singapore-queenstown": 0.16,
    "singapore-hollandvillage": 0.12,
}
"""share of the scenes by location, about as in nuScenes"""
PASSES = {1: 0.10, 2: 0.12, 3: 0.15, 4: 0.18, 5: 0.20, 6: 0.25}
"""how many streets are driven how often. Drives share a street only in part, so that less road is driven often."""
NIGHT_RAIN = 3
"""it rains in every third night"""
OPPOSITE = 0.3
"""chance that a repeated drive comes from the other end, where the street has a way back"""
FIRST_DATE, LAST_DATE = datetime.date(2018, 6, 4), datetime.date(2018, 11, 23)
GAP_DAYS = 13.0
"""drives along one street are mostly this near in time to each other"""
STRETCH_M = 170.0
RATE_HZ = 12.0
CANDIDATES = 40
CHOICE = 5
"""as many unused stretches are compared: the one with the most lanes is taken"""
VAL_SHARE = 0.2


@dataclass(frozen=True)
class PlannedScene:
    """One scene of the fleet."""

    name: str
    trajectory: Trajectory
    """with location, date and name"""
    weather: str
    """words as in :class:`nmp_train.sim.dataset.Drive`"""
    density: float
    """of the traffic"""
    vehicle: str
    street: str
    """name of the stretch of street; scenes with the same one overlap, at least in part"""
    opposite: bool
    """driven from the other end than the first scene of the street"""


@dataclass(frozen=True)
class FleetPlan:
    """Everything about a data set but its images and tables."""

    seed: int
    duration_s: float
    cities: dict[str, dict[str, Any]]
    """map-expansion dictionaries by location"""
    sizes: dict[str, float]
    """edge of each city, m"""
    scenes: list[PlannedScene]
    """in the order of their dates and names"""
    splits: dict[str, list[str]]
    """scene names by split, see :func:`make_splits`"""

    def save(self, path: str | Path, changes: dict[str, list[Any]] | None = None) -> None:
        """Write the plan as JSON; its ``scenes`` can be read by :func:`nmp_train.sim.drive.load_trajectories`."""
        content = {
            "seed": self.seed,
            "duration_s": self.duration_s,
            "cities": {place: {"size_m": size} for place, size in self.sizes.items()},
            "splits": self.splits,
            "changes": changes or {},
            "scenes": [_record(s) for s in self.scenes],
        }
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps(content) + "\n")
        except OSError as error:
            raise NmpError(f"cannot write {path}: {error.strerror}") from error


def _record(scene: PlannedScene) -> dict[str, Any]:
    return {
        "scene": scene.name,
        "location": scene.trajectory.location,
        "date": scene.trajectory.date,
        "weather": scene.weather,
        "density": scene.density,
        "vehicle": scene.vehicle,
        "street": scene.street,
        "opposite": scene.opposite,
        "rate_hz": RATE_HZ,
        "poses_xyyaw": scene.trajectory.poses_xyyaw.round(4).tolist(),
    }


def plan_fleet(
    seed: int, cities: int = 4, scenes: int = 150, duration_s: float = 20.0, size_m: float | None = None
) -> FleetPlan:
    """Plan ``scenes`` drives of ``duration_s`` seconds through generated cities.

    Streets are driven 1 to 6 times: on other days, mostly a few weeks apart, in the same or the opposite direction,
    in the same lane or the one beside, from another starting point, at another speed and in other traffic. 70 % of
    the scenes are by day, 20 % in rain, 10 % at night (a third of these in rain as well): as exactly as whole scenes
    allow. The same arguments give the same plan.

    :param cities: 1 to 4, by the official location names; the first is boston-seaport
    :param size_m: edge of every city, m; None makes each as large as its share of the scenes needs
    """
    if not 1 <= cities <= len(CITIES):
        raise NmpError(f"{cities} cities are not possible: choose 1 to {len(CITIES)}, one for each nuScenes location")
    if scenes < cities:
        raise NmpError(f"{scenes} scenes are too few for {cities} cities: ask for one per city or more")
    if not 2 <= duration_s <= 120:
        raise NmpError(f"scenes of {duration_s:g} s are not possible: choose 2 to 120 s")
    places = list(CITIES)[:cities]
    shares = np.array([CITIES[p] for p in places])
    counts = 1 + quota(shares, scenes - cities)
    weather = np.repeat(list(MIX), quota(np.array(list(MIX.values())), scenes)).tolist()
    nights = [k for k, word in enumerate(weather) if word == "night"]
    for k in nights[NIGHT_RAIN - 1 :: NIGHT_RAIN]:
        weather[k] = "night rain"
    weather = [weather[i] for i in np.random.default_rng((seed, 31)).permutation(scenes)]
    tables, sizes, planned = {}, {}, []
    for number, (place, count) in enumerate(zip(places, counts, strict=True)):
        size = float(np.clip(np.ceil(9 * np.sqrt(count)) * 10, 320, 1500)) if size_m is None else size_m
        tables[place], sizes[place] = generate_city(seed, place, size), size
        drives = _drives(np.random.default_rng((seed, 32, number)), tables[place], place, int(count), duration_s)
        words = [weather.pop() for _ in drives]
        planned += _dated(np.random.default_rng((seed, 33, number)), drives, words)
    # Names follow time, as does everything that asks which drive came first.
    planned.sort(key=lambda s: (s.trajectory.date, s.trajectory.location, "night" in s.weather, s.street))
    for k, scene in enumerate(planned):
        name = f"scene-{k + 1:04d}"
        planned[k] = replace(scene, name=name, trajectory=replace(scene.trajectory, name=name))
    return FleetPlan(seed, duration_s, tables, sizes, planned, make_splits(planned, seed))


def quota(shares: Array, total: int) -> NDArray[np.int64]:
    """Return whole numbers [N] with the sum ``total``, as near to the shares [N] as possible (largest remainders)."""
    exact = shares / shares.sum() * total
    out = np.floor(exact).astype(np.int64)
    out[np.argsort(out - exact, kind="stable")[: total - out.sum()]] += 1
    return out


def pass_counts(total: int) -> list[int]:
    """Return how often each street is driven: numbers 1 to 6 with the sum ``total``, in the shares of ``PASSES``.

    No street takes more than half of the drives.
    """
    out: list[int] = []
    most = max(1, total // 2)
    left = total
    while left:
        seen = Counter(out)
        # the number that is most behind its share; what is left may be less than it asks for
        behind = max(PASSES, key=lambda n: PASSES[n] * (len(out) + 1) - seen[n])
        out.append(min(behind, left, most))
        left -= out[-1]
    return out


@dataclass
class _Pass:
    trajectory: Trajectory
    street: str
    opposite: bool


def _drives(rng: np.random.Generator, city: dict[str, Any], place: str, count: int, duration_s: float) -> list[_Pass]:
    """Drive streets of one city again and again."""
    out: list[_Pass] = []
    used = np.zeros((0, 2))
    scale = min(1.0, duration_s / 20)
    for number, passes in enumerate(pass_counts(count)):
        street = f"{place}-{number + 1:03d}"
        stretch = _unused(rng, city, used, max(40.0, STRETCH_M * scale))
        ways = {backwards: stretch_lanes(city, stretch, backwards) for backwards in (False, True)}
        for k in range(passes):
            # One-way streets have no way back.
            opposite = k > 0 and bool(rng.random() < OPPOSITE) and len(ways[True]) > 0
            chains = ways[opposite]
            drive = drive_stretch(
                city,
                stretch[::-1] if opposite else stretch,
                chains[int(rng.integers(len(chains)))],
                rng,
                duration_s=duration_s,
                rate_hz=RATE_HZ,
                start_m=float(rng.uniform(0, 40.0 if k else 15.0)) * scale,
            )
            out.append(_Pass(replace(drive, location=place), street, opposite))
            used = np.concatenate([used, drive.poses_xyyaw[::6, :2]])
    return out


def _unused(rng: np.random.Generator, city: dict[str, Any], used: Array, length_m: float) -> Array:
    """Draw a stretch of street that was driven as little as possible, with as many lanes as possible."""
    tree = cKDTree(used) if len(used) else None
    drawn: list[tuple[float, int, Array]] = []
    for _ in range(CANDIDATES):
        stretch = sample_stretch(city, rng, length_m)
        drawn.append((0.0 if tree is None else float((tree.query(stretch)[0] < 12.0).mean()), len(drawn), stretch))
        if sum(busy == 0 for busy, _, _ in drawn) == CHOICE:
            break
    found: list[tuple[int, Array]] = []
    for _, _, stretch in sorted(drawn, key=lambda d: d[:2]):
        # A stretch that comes back to its own beginning has no clear way along it.
        if lanes := len(stretch_lanes(city, stretch)):
            found.append((lanes, stretch))
        if len(found) == CHOICE:
            break
    if not found:
        raise NmpError("this city has no street that can be driven along: choose another seed or a larger city")
    return max(found, key=lambda f: f[0])[1]


def _dated(rng: np.random.Generator, drives: Sequence[_Pass], weather: Sequence[str]) -> list[PlannedScene]:
    """Give the drives of one city their dates: a day has one weather, a street is driven once a day."""
    span = (LAST_DATE - FIRST_DATE).days + 1
    kinds = sorted(set(weather))
    days = rng.permutation(span)
    dates: dict[str, NDArray[np.int64]] = {}
    for kind in kinds:
        # A log holds about three of these scenes; a street of six drives still needs six days.
        count = min(max(6, round(weather.count(kind) / 3)), len(days) // len(kinds))
        dates[kind], days = days[:count], days[count:]
    centre: dict[str, float] = {}
    taken: dict[str, set[int]] = {}
    out = []
    for drive, word in zip(drives, weather, strict=True):
        middle = centre.setdefault(drive.street, float(rng.uniform(0, span)))
        free = np.array([d for d in dates[word] if d not in taken.get(drive.street, set())])
        chance = np.exp(-np.abs(free - middle) / GAP_DAYS) + 1e-9
        day = int(rng.choice(free, p=chance / chance.sum()))
        taken.setdefault(drive.street, set()).add(day)
        date = (FIRST_DATE + datetime.timedelta(days=day)).isoformat()
        out.append(
            PlannedScene(
                "",
                replace(drive.trajectory, date=date),
                word,
                round(float(rng.lognormal(0.0, 0.35)), 2),
                vehicle_of(drive.trajectory.location),
                drive.street,
                drive.opposite,
            )
        )
    return out


def make_splits(scenes: Sequence[PlannedScene], seed: int) -> dict[str, list[str]]:
    """Return scene names by split.

    ``train`` and ``val`` part the scenes: ``val_unseen`` are all the drives of some streets, ``val_seen`` the last
    drives of streets whose earlier ones are in ``train``; ``val`` is both. With several cities,
    ``train_without_<location>`` and ``val_<location>`` part them by city: no street of one is in the other.
    """
    rng = np.random.default_rng((seed, 34))
    streets: dict[str, list[str]] = {}
    for scene in scenes:
        streets.setdefault(scene.street, []).append(scene.name)
    order = [list(streets)[i] for i in rng.permutation(len(streets))]
    want = VAL_SHARE * len(scenes) / 2
    unseen: set[str] = set()
    seen: set[str] = set()
    for street in order:
        names = streets[street]
        if len(unseen) + len(names) <= want + 0.5:
            unseen |= set(names)
        elif len(names) > 1 and len(seen) < want:
            seen.add(names[-1])
    splits = {
        "train": [s.name for s in scenes if s.name not in unseen | seen],
        "val": [s.name for s in scenes if s.name in unseen | seen],
        "val_seen": [s.name for s in scenes if s.name in seen],
        "val_unseen": [s.name for s in scenes if s.name in unseen],
    }
    places = list(dict.fromkeys(s.trajectory.location for s in scenes))
    if len(places) > 1:
        for place in sorted(places):
            splits[f"train_without_{place}"] = [s.name for s in scenes if s.trajectory.location != place]
            splits[f"val_{place}"] = [s.name for s in scenes if s.trajectory.location == place]
    return splits
