"""Time the building of a city from recorded drives, with one worker and with two, and project what a fleet costs.

    python benchmarks/prior_build.py [--drives 6] [--frames 20] [--once] [--out prior_build.json] \
        [--trajectories ../shared/real/val_trajectories.json] [--road-km 10000] [--cars 1000] [--km-per-car 100] \
        [--mb-per-km 0.3]

One short drive through made-up pictures (1600 x 900, 2 Hz, 8 m/s) is copied to places that do not meet, and each copy
is a bag. It is built twice with each (``--once``: once), and all have to leave the same bytes. ``--trajectories`` also
computes how much faster than one worker several would be with recorded drives, by which of them meet, were a frame
always the same work. ``--mb-per-km`` is what a drive adds on disk (benchmarks/prior_footprint.py: made-up pictures give
no latents worth compressing). Writes JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import os
import shutil
import tempfile
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from nmp.bags.nuscenes_to_bag import Shot, write_bag
from nmp.fleet.build import Built, build
from nmp.fleet.plan import Plan
from nmp.fleet.survey import Survey, evenly, survey
from nmp.frame import CAMERAS
from nmp.model.config import NetworkConfig
from nmp.model.runner import window_side
from nmp.prior.ledger import COMMITS, Ledger, create
from nmp.prior.record import Record, tile_table
from nmp.prior.storage import Storage
from nmp.prior.window import PriorSpec

CITY = "city"
WIDTH, HEIGHT, SPEED, PERIOD_NS = 1600, 900, 8.0, 500_000_000
HEADINGS = dict(zip(CAMERAS, (0, -55, -110, 180, 110, 55), strict=True))
APART_M = 2000.0


def make_shots(folder: Path, frames: int) -> list[Shot]:
    """Write the pictures of a straight drive along x, and describe them."""
    rng = np.random.default_rng(0)
    optical = Rotation.from_matrix([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    intrinsics = np.array([[1260.0, 0, WIDTH / 2], [0, 1260.0, HEIGHT / 2], [0, 0, 1]])
    shots = []
    for frame in range(frames):
        for camera in CAMERAS:
            out = BytesIO()
            coarse = rng.integers(0, 255, (45, 80, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
            path = folder / f"{camera}-{frame}.jpg"
            path.write_bytes(out.getvalue())
            q = (Rotation.from_euler("z", HEADINGS[camera], degrees=True) * optical).as_quat().tolist()
            stamp = 10**18 + frame * PERIOD_NS
            pose = ([SPEED * frame * PERIOD_NS * 1e-9, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0])
            shots.append(Shot(camera, stamp, path, WIDTH, HEIGHT, intrinsics, ([0.9, 0.0, 1.5], q), pose))
    return shots


def make_bags(folder: Path, drives: int, frames: int) -> list[Path]:
    """Write the same drive to places that do not meet, an hour after each other."""
    shots = make_shots(folder, frames)
    bags = []
    for drive in range(drives):
        moved = [
            replace(
                s,
                stamp_ns=s.stamp_ns + drive * 3600 * 10**9,
                pose=([s.pose[0][0], drive * APART_M, 0.0], s.pose[1]),
            )
            for s in shots
        ]
        bags.append(folder / f"drive-{drive}")
        write_bag(moved, CITY, bags[-1])
    return bags


def digest(prior: Path) -> str:
    """Return a hash of the files of a city."""
    total = hashlib.sha256()
    for path in sorted(p for p in prior.rglob("*") if p.is_file() and p.suffix != ".lock"):
        total.update(str(path.relative_to(prior)).encode() + path.read_bytes())
    return total.hexdigest()


def timed(bags: list[Path], prior: Path, weights: Path | None, workers: int) -> tuple[Built, float]:
    begin = time.monotonic()
    return build(bags, prior, weights=weights, count=workers, threads=1), time.monotonic() - begin


def speedups(file: Path) -> dict[str, Any]:
    """Return how many times faster than one worker several would be with recorded drives, for each city and all."""
    config = NetworkConfig()
    side = window_side(config)
    places: dict[str, list[set[Any]]] = {}
    costs: dict[str, list[float]] = {}
    # logfiles are named by vehicle and date
    for scene in sorted(json.loads(file.read_text()), key=lambda s: (s["logfile"].partition("-")[2], s["scene"])):
        path = evenly(np.array(scene["poses_xyyaw"])[:, :2])
        tiles = Survey(Path(), "", "", 0, 1, path).tiles(side, config.prior_cell)
        for name in (scene["location"], "all"):
            places.setdefault(name, []).append({(scene["location"], key) for key in tiles})
            costs.setdefault(name, []).append(len(scene["poses_xyyaw"]))
    return {
        name: {
            "drives": len(places[name]),
            "faster_at_most": Plan(places[name], costs[name]).speedup,
            "faster_with": {n: sum(costs[name]) / lasts(places[name], costs[name], n) for n in (2, 4, 8)},
        }
        for name in places
    }


def lasts(touched: list[set[Any]], costs: list[float], workers: int) -> float:
    """Return how long a number of workers need for some drives, in the unit of the costs."""
    plan, now, busy = Plan(touched, costs), 0.0, list[tuple[float, int]]()
    while plan.ready or busy:
        while plan.ready and len(busy) < workers:
            job = plan.take()
            heapq.heappush(busy, (now + costs[job], job))
        now, job = heapq.heappop(busy)
        plan.done(job)
    return now


def ms_per_record(folder: Path, records: int = 300, tiles: int = 50) -> float:
    """Return how long opening a city takes for every drive in it, ms."""
    storage, spec = Storage(folder), PriorSpec(32, 0.3, "benchmark")
    create(storage, CITY, spec)
    for number in range(records):
        table = tile_table([(number, col, 4096, col) for col in range(tiles)])
        record = Record(CITY, spec, "", number, number, table)
        storage.put(f"{COMMITS}/{record.id}.json", record.to_bytes())
    begin = time.monotonic()
    assert len(Ledger.open(storage, read_only=True).active()) == records
    return (time.monotonic() - begin) * 1000 / records


def project(seconds_per_km: float, mb_per_km: float, args: argparse.Namespace) -> dict[str, Any]:
    """Return what a fleet's city costs, as plain products."""
    driven = args.cars * args.km_per_car
    hours = driven * seconds_per_km / 3600
    return {
        "km_driven": driven,
        "core_hours": hours,
        "hours_with_100_cores": hours / 100,
        "gb_of_drives": driven * mb_per_km / 1000,
        "gb_once_compacted": args.road_km * mb_per_km / 1000,
        "arithmetic": f"{args.cars} cars x {args.km_per_car} km x {seconds_per_km:.1f} CPU s per km / 3600; drives: "
        f"km driven x {mb_per_km} MB; compacted: {args.road_km} km of road x {mb_per_km} MB",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drives", type=int, default=6)
    parser.add_argument("--frames", type=int, default=20, help="of each drive")
    parser.add_argument("--once", action="store_true", help="one run with each number of workers, not two")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--trajectories", type=Path)
    parser.add_argument("--road-km", type=float, default=10_000)
    parser.add_argument("--cars", type=int, default=1000)
    parser.add_argument("--km-per-car", type=float, default=100)
    parser.add_argument("--mb-per-km", type=float, default=0.3)
    parser.add_argument("--out", type=Path, default=Path("prior_build.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bags = make_bags(folder, args.drives, args.frames)
        size = sum(p.stat().st_size for p in bags[0].rglob("*")) / 1e6
        begin = time.monotonic()
        for bag in tqdm(bags, desc="looking through"):
            survey(bag)
        looking = (time.monotonic() - begin) / len(bags)
        km = args.drives * (args.frames - 1) * SPEED * PERIOD_NS * 1e-12
        runs: dict[int, list[tuple[Built, float]]] = {1: [], 2: []}
        found = set()
        load = os.getloadavg()[0]
        # back and forth, so that a machine that gets busier favours neither
        for number, workers in enumerate((1, 2) if args.once else (1, 2, 2, 1)):
            prior = folder / f"prior-{number}"
            runs[workers].append(timed(bags, prior, args.weights, workers))
            found.add(digest(prior))
            shutil.rmtree(prior)
        means = {
            workers: {
                "map_s": mean(built.seconds for built, _ in pair),
                "with_start_and_end_s": mean(total for _, total in pair),
                "cpu_s": mean(built.cpu_s for built, _ in pair),
                "cpu_s_per_km": mean(built.cpu_s for built, _ in pair) / km,
            }
            for workers, pair in runs.items()
        }
        result = {
            "cpus": os.cpu_count(),
            "load_before": load,
            "load_after": os.getloadavg()[0],
            "drives": args.drives,
            "frames": args.drives * args.frames,
            "km": km,
            "mb_per_bag": size,
            "look_s_per_bag": looking,
            "workers": means,
            "faster_with_2": means[1]["map_s"] / means[2]["map_s"],
            "more_cpu_with_2": means[2]["cpu_s"] / means[1]["cpu_s"],
            "same_bytes": len(found) == 1,
            "open_ms_per_drive_in_the_city": ms_per_record(folder / "records"),
            "projection": project(means[1]["cpu_s_per_km"], args.mb_per_km, args),
        }
    if args.trajectories:
        result["recorded_drives"] = speedups(args.trajectories)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
