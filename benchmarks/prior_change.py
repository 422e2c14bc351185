"""How soon the prior forgets what has changed, and how well it keeps what has not, over thresholds of contradiction.

    python benchmarks/prior_change.py [--weights cpu_default] [--data DIR ...] [--out prior_change.json]

Routes of simulated cities are driven several times while crossings disappear and appear, dividers and kerbs move
(``--data`` names data sets that are there already). Every drive is mapped with the weights and committed. Which cells
changed follows from the maps of the days. For each drive and cell: how much the drive differs from what is known,

    |a - b|^2 / (|a|^2 + |b|^2), less what rounding makes of it,

and how much of the evidence from before the change is left, for several pairs of thresholds. Cells count by what
happened there (kerbs are drawn as boundaries), by the visits since, and apart where hardly anything was seen of them.

"layers" is what comes out in the end: of the pixels of the layers within 15 m of the car where something was removed or
added, and of what is unchanged, the share that the layers show, with the prior and without one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from nmp.changelog import local_date
from nmp.evaluation import CityMaps
from nmp.frame import CLASSES, LocalMap
from nmp.geometry import BevGrid, yaw_of
from nmp.mapper import OnlineMapper
from nmp.prior import cells as rules
from nmp.prior.cells import Cells
from nmp.prior.ledger import Ledger, State
from nmp.prior.storage import Storage
from nmp.prior.tiles import TILE, Key
from nmp.prior.upkeep import digests
from nmp.truth import rasterize
from nmp_train.evaluate import read_scenes, scene_frames

SEEDS = (611, 612, 613)
PAIRS = ((0.05, 0.1), (0.1, 0.2), (0.15, 0.3), (0.2, 0.4), (0.3, 0.6), (9.0, 10.0))
"""thresholds to compare; the last takes nothing back"""
HIDDEN = 64
"""evidence (1/4 of a unit) below which a drive hardly saw a cell"""
NEAR = 3
"""cells around a change that count neither as changed nor as unchanged"""
CLOSE_M = 15.0
"""how near the car has to come for a pixel of the layers to count"""


def render(folder: Path, seed: int) -> Path:
    """Make a data set: one route of a city, driven five times while six things change."""
    data = folder / f"city-{seed}"
    arguments = ["--seed", seed, "--routes", 1, "--passes", 5, "--changes", 6, "--weather", "day", "--duration", 16]
    arguments += ["--render-scale", 0.22, "--out", data]
    subprocess.run([sys.executable, "-m", "nmp_train.cli", "sim", *map(str, arguments)], check=True)
    return data


Shown = dict[str, dict[str, NDArray[np.int64]]]
"""by what happened and how the layers were made: pixels that they show, and all"""


def drive(weights: Path, data: Path, version: str, prior: Path, shown: Shown) -> tuple[str, list[str]]:
    """Map all scenes, each as a drive, also without a prior; return the city and the day of each drive."""
    days: list[str] = []
    location, maps = "", CityMaps(data)
    with OnlineMapper(weights, prior) as mapper, OnlineMapper(weights, use_prior=False) as plain:
        for scene in tqdm(read_scenes(data, version), desc=data.name, unit="drive"):
            frames = scene_frames(scene).frames
            location = scene.location
            days.append(local_date(location, frames[0].stamp_ns))
            for frame in frames:
                layers = {"with the prior": mapper.update(frame), "without": plain.update(frame)}
                happened = changes_in_view(maps, days, layers["without"])
                for (what, (index, pixels)), (how, found) in itertools.product(happened.items(), layers.items()):
                    counts = [(pixels & (found.masks[index] > 0)).sum(), pixels.sum()]
                    shown[what][how] = shown[what].get(how, np.zeros(2, np.int64)) + counts
            mapper.close()
    return location, days


def changes_in_view(maps: CityMaps, days: list[str], seen: LocalMap) -> dict[str, tuple[int, NDArray[np.bool_]]]:
    """Return by what has happened up to the last of the days the class that it happened to, and where near the car.

    The places are [rows, cols]. A change is told by the number of drives since, the present one included.
    """
    pose, grid = seen.map_from_base, seen.grid
    near = np.linalg.norm(grid.centres(), axis=-1).reshape(grid.shape) < CLOSE_M
    place = (float(pose[0, 3]), float(pose[1, 3]), yaw_of(pose))
    states = [rasterize(maps.city(seen.location, day), *place, grid) > 0 for day in days]
    found = {}
    for index, name in enumerate(CLASSES):
        own = [state[index] & near for state in states]
        for number, (before, after) in enumerate(itertools.pairwise(own)):
            visit = len(days) - number - 1
            found[f"{name} removed, visit {visit}"] = index, before & ~after & ~own[-1]
            found[f"{name} added, visit {visit}"] = index, ~before & after & own[-1]
        found[f"{name} unchanged, visit {len(days)}"] = index, np.logical_and.reduce(own)
    return {what: (index, pixels) for what, (index, pixels) in found.items() if pixels.any()}


class Truth:
    """The map of each day, on the cells of the city."""

    def __init__(self, data: Path, location: str, cell: float) -> None:
        self._maps, self._location, self._cell = CityMaps(data), location, cell
        self._found: dict[tuple[str, Key], NDArray[np.uint8]] = {}

    def of(self, day: str, key: Key) -> NDArray[np.uint8]:
        """Return the layers [3, 64, 64] of a tile."""
        if (day, key) not in self._found:
            edge = TILE * self._cell
            city = self._maps.city(self._location, day)
            x, y = (key[1] + 0.5) * edge, (key[0] + 0.5) * edge
            self._found[day, key] = rasterize(city, x, y, 0.0, BevGrid(edge, edge, self._cell))
        return self._found[day, key]


def around(mask: NDArray[np.bool_], cells: int) -> NDArray[np.bool_]:
    """Return a mask grown by so many cells."""
    import cv2

    kernel = np.ones((2 * cells + 1, 2 * cells + 1), np.uint8)
    grown: NDArray[np.bool_] = cv2.dilate(mask.astype(np.uint8), kernel) > 0
    return grown


class Tally:
    """What was found, by what happened to a cell and how often it was seen since."""

    def __init__(self) -> None:
        self.differences: dict[str, list[NDArray[np.float32]]] = defaultdict(list)
        self.left: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        """evidence of before the change, and all"""
        self.lost: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        """evidence that was taken back, and all there was"""

    def summary(self) -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for name in sorted(self.lost):
            found = np.concatenate(self.differences[name]) if self.differences[name] else np.empty(0)
            lost, all_of_it = self.lost[name]
            rows[name] = {
                "cells": len(found),
                "difference_percentiles_50_95_99": [round(float(v), 3) for v in np.percentile(found, (50, 95, 99))]
                if len(found)
                else None,
                "taken_back_percent": round(100 * lost / max(all_of_it, 1e-9), 1),
            }
            if name in self.left:
                old, total = self.left[name]
                rows[name]["old_evidence_left_percent"] = round(100 * old / max(total, 1e-9), 1)
        return rows


def follow(ledger: Ledger, truth: Truth, days: list[str], tally: Tally) -> None:
    """Fold the drives of a city one after the other, and count what happens to its cells."""
    records = ledger.drives()
    spec = ledger.spec
    keys = sorted(State(ledger, records).keys())
    for key in keys:
        state = Cells(spec.channels)
        since = np.zeros((TILE, TILE), np.int32)
        kind = np.zeros((TILE, TILE), np.int8)
        near = np.zeros((TILE, TILE), bool)
        old = np.zeros((TILE, TILE), np.float64)
        for number, (record, day) in enumerate(zip(records, days, strict=True)):
            layers = truth.of(day, key)
            if number:
                before = truth.of(days[number - 1], key)
                fresh = (layers != before).any(0)
                near |= around(fresh, NEAR)
                since[fresh] = 0
                for index in range(len(CLASSES)):
                    kind[(before[index] > layers[index]) & fresh] = 2 * index + 1
                    kind[(before[index] < layers[index]) & fresh] = 2 * index + 2
                old = np.where(fresh, state.evidence, old)
            expected = digests(record)
            found = ledger.load(record, {key: expected[key]}) if key in expected else {}
            if key not in found:
                continue
            cells = found[key]
            both = (state.evidence > 0) & (cells.evidence > 0)
            noise = spec.coding.noise_of(state.evidence, cells.evidence) if spec.coding else np.float32(0)
            apart = rules.difference(state.latent, cells.latent, spec.bits, noise)
            share = rules.contradiction(state.latent, cells.latent, spec.bits, noise)
            known, added = state.evidence.astype(np.float64), cells.evidence.astype(np.float64)
            lost = np.minimum(known, np.rint(rules.TAKEN_BACK * added * share)) * both
            kept = known - lost
            old = np.where(both, old * kept / np.maximum(known, 1), old)
            since[cells.evidence > HIDDEN] += 1
            hidden = (cells.evidence > 0) & (cells.evidence <= HIDDEN)
            groups = {"unchanged": both & ~near & ~hidden, "unchanged, hardly seen": both & ~near & hidden}
            crossing = layers[CLASSES.index("crossing")] > 0
            groups["unchanged crossing"] = groups["unchanged"] & crossing
            groups["unchanged crossing, hardly seen"] = groups["unchanged, hardly seen"] & crossing
            for code in range(1, 2 * len(CLASSES) + 1):
                name = f"{CLASSES[(code - 1) // 2]} {'removed' if code % 2 else 'added'}"
                for visit in range(1, 5):
                    part = both & (kind == code) & (since == visit) & ~hidden
                    groups[f"{name}, visit {visit}"] = part
            for name, part in groups.items():
                if part.any():
                    tally.differences[name].append(apart[part])
                    tally.lost[name][0] += lost[part].sum()
                    tally.lost[name][1] += known[part].sum()
                    if "visit" in name:
                        tally.left[name][0] += old[part].sum()
                        tally.left[name][1] += (kept + added)[part].sum()
            rules.fold(state, cells, spec)
            # what the cap cuts off is cut off old and new evidence alike
            old *= np.minimum(state.evidence / np.maximum(kept + added, 1), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=Path("cpu_default"))
    parser.add_argument("--data", type=Path, nargs="+", help="data sets of one city each, rendered before")
    parser.add_argument("--version", default="v1.0-mini")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    shipped = rules.AGREES, rules.CONTRADICTS
    shown: Shown = defaultdict(dict)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = options.data or [render(folder, seed) for seed in SEEDS]
        cities = []
        for number, path in enumerate(data):
            prior = folder / f"prior-{number}"
            location, days = drive(options.weights, path, options.version, prior, shown)
            ledger = Ledger.open(Storage(prior / location), read_only=True)
            cities.append((ledger, Truth(path, location, ledger.spec.cell), days))
        results = {}
        for agrees, contradicts in tqdm(PAIRS, desc="thresholds"):
            rules.AGREES, rules.CONTRADICTS = agrees, contradicts
            tally = Tally()
            for ledger, truth, days in cities:
                follow(ledger, truth, days, tally)
            results[f"{agrees} to {contradicts}"] = tally.summary()
    report = {
        "weights": str(options.weights),
        "coding": cities[0][0].spec.coding.name if cities[0][0].spec.coding else None,
        "cities": len(cities),
        "drives": sum(len(days) for _, _, days in cities),
        "shipped_thresholds": shipped,
        "layers_show_percent": {
            what: {how: round(100 * int(part) / int(every), 1) for how, (part, every) in ways.items()}
            | {"pixels": int(next(iter(ways.values()))[1])}
            for what, ways in sorted(shown.items())
        },
        "thresholds": results,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
