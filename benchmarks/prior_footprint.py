"""How many bytes the prior takes per km, over channels, bits and cell size, along recorded trajectories.

    python benchmarks/prior_footprint.py --maps ../shared/real/geography \
        --trajectories ../shared/real/val_trajectories.json [--scenes 3] [--data DIR] [--out prior_footprint.json]

Some scenes are rendered along their recorded poses through real maps (nmp-train sim; ``--data`` names a data set that
is there already) and mapped with the shipped weights: the content of the cells is what that network writes. The other
settings are stand-ins made of the same cells: fewer channels are the first ones of the network's 32, cells of 0.6 m
the weighted means of four, fewer bits a coarser rounding. How many cells all the trajectories touch is computed from
their poses; MB per km of all of them is these cells x the bytes per cell that were measured.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmp.geometry import BevGrid
from nmp.mapper import OnlineMapper
from nmp.prior.cells import Cells, encode, on_grid, plane_count
from nmp.prior.ledger import Ledger
from nmp.prior.storage import Storage
from nmp.prior.tiles import TILE, Key
from nmp.prior.tileset import TileSet
from nmp.prior.upkeep import digests
from nmp.prior.window import PriorSpec
from nmp_train.evaluate import Scene, scene_frames
from nmp_train.recordings import read_samples

REGION = BevGrid(60.0, 30.0, 0.3)
HALF = TILE // 2
LEVEL = 19
"""of zstd, as the tiles of a base are written"""


def length(poses: Sequence[Sequence[float]]) -> float:
    """Return the length of a path, m."""
    return sum(math.dist(a[:2], b[:2]) for a, b in zip(poses, poses[1:], strict=False))


def cells_touched(scenes: list[dict[str, Any]], cell: float) -> int:
    """Return how many cells lie under the region of any pose; places that scenes share count once."""
    seen: dict[str, list[NDArray[np.int64]]] = defaultdict(list)
    y, x = np.mgrid[-15 : 15 : cell * 0.7, -30 : 30 : cell * 0.7]
    for scene in scenes:
        for px, py, yaw in scene["poses_xyyaw"]:
            col = np.floor((px + x * math.cos(yaw) - y * math.sin(yaw)) / cell).astype(np.int64)
            row = np.floor((py + x * math.sin(yaw) + y * math.cos(yaw)) / cell).astype(np.int64)
            seen[scene["location"]].append((row * 2**24 + col).ravel())
    return sum(len(np.unique(np.concatenate(parts))) for parts in seen.values())


def drive(data: Path, version: str, prior: Path) -> list[str]:
    """Map every scene of a data set, each as a drive of its own; return the cities."""
    scenes: dict[str, list[Any]] = defaultdict(list)
    for sample in read_samples(data, version):
        scenes[sample.scene].append(sample)
    cities = set()
    for name, samples in scenes.items():
        scene = scene_frames(Scene(name, tuple(samples)))
        with OnlineMapper(None, prior) as mapper:
            for frame in scene.frames:
                mapper.update(frame)
        cities.add(scene.location)
        print(f"mapped {name}: {len(scene.frames)} frames", file=sys.stderr)
    return sorted(cities)


def four(values: NDArray[Any]) -> NDArray[Any]:
    """Return [..., rows, cols] as [..., rows / 2, 2, cols / 2, 2]."""
    return values.reshape(*values.shape[:-2], HALF, 2, HALF, 2)


def changed(tiles: dict[Key, Cells], channels: int, bits: int, coarse: bool) -> dict[Key, Cells]:
    """Return the cells as another setting would hold them."""
    out: dict[Key, Cells] = {}
    for (row, col), cells in tiles.items():
        if not coarse:
            new = out[row, col] = Cells(channels)
            new.latent[...], new.evidence[...] = cells.latent[:channels], cells.evidence
            new.last_seen_s[...], new.traversals[...] = cells.last_seen_s, cells.traversals
            continue
        new = out.setdefault((row // 2, col // 2), Cells(channels))
        part = tuple(slice(i % 2 * HALF, i % 2 * HALF + HALF) for i in (row, col))

        weight = four(cells.evidence.astype(np.float64)).sum((-3, -1))
        sums = four(cells.latent[:channels] * cells.evidence.astype(np.float64)).sum((-3, -1))
        new.latent[:, part[0], part[1]] = np.rint(sums / np.maximum(weight, 1))
        new.evidence[part] = np.minimum(weight / 4, 65535)
        new.last_seen_s[part] = four(cells.last_seen_s).max((-3, -1))
        new.traversals[part] = four(cells.traversals).max((-3, -1))
    for cells in out.values():
        cells.latent[...] = on_grid(cells.latent, bits)
        cells.latent *= cells.evidence > 0
    return out


def stored(folder: Path, planes: dict[Key, NDArray[np.uint8]]) -> tuple[int, int]:
    """Return the bytes of tiles on disk, and what they occupy in blocks of 4 KiB."""
    storage = Storage(folder)
    tiles = TileSet(storage, len(next(iter(planes.values()))), LEVEL)
    # zeros are not written: a plane that is empty everywhere costs nothing
    tiles.save(planes)
    sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
    return sum(sizes), sum(-(-size // 4096) * 4096 for size in sizes)


def measure(tiles: dict[Key, Cells], spec: PriorSpec, km: float, folder: Path) -> dict[str, Any]:
    planes = {key: encode(cells, spec) for key, cells in tiles.items()}
    assert len(next(iter(planes.values()))) == plane_count(spec)
    cells = sum(int((part.last_seen_s > 0).sum()) for part in tiles.values())
    size, blocks = stored(folder / "all", planes)
    end = spec.channels
    parts = {"latent": slice(0, end), "evidence": slice(end, end + 2), "last_seen": slice(end + 2, end + 6)}
    fields = {
        name: round(stored(folder / name, {k: p[part] for k, p in planes.items()})[0] / cells, 3)
        for name, part in parts.items()
    }
    record = 24 * len(tiles)  # its line in the record, twice: beside the tiles as well
    return {
        "channels": spec.channels,
        "bits": spec.bits,
        "cell_m": spec.cell,
        "tiles": len(tiles),
        "cells": cells,
        "bytes_per_cell": round((size + 2 * record) / cells, 3),
        "of_it": fields,
        "mb_per_km": round((size + 2 * record) / 1e6 / km, 3),
        "mb_per_km_in_disk_blocks": round((blocks + 2 * record) / 1e6 / km, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=Path, help="nuScenes folder with the maps to render")
    parser.add_argument("--trajectories", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=3, help="so many are rendered, spread over the list")
    parser.add_argument("--data", type=Path, help="a data set rendered before, of these scenes")
    parser.add_argument("--version", default="v1.0-mini")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    every = json.loads(options.trajectories.read_text())
    step = len(every) // options.scenes
    chosen = every[step // 2 :: step][: options.scenes]
    total_km = sum(length(scene["poses_xyyaw"]) for scene in every) / 1e3
    km = sum(length(scene["poses_xyyaw"]) for scene in chosen) / 1e3
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = options.data
        if data is None:
            data = folder / "data"
            (folder / "chosen.json").write_text(json.dumps(chosen))
            arguments = ["--maps", options.maps, "--trajectories", folder / "chosen.json", "--out", data, "--seed", 1]
            arguments += ["--scenes", len(chosen), "--render-scale", 0.22]
            subprocess.run([sys.executable, "-m", "nmp_train.cli", "sim", *map(str, arguments)], check=True)
        tiles: dict[Key, Cells] = {}
        as_stored = 0
        for number, city in enumerate(drive(data, options.version, folder / "prior")):
            ledger = Ledger.open(Storage(folder / "prior" / city), read_only=True)
            as_stored += ledger.storage.size()
            for count, record in enumerate(ledger.drives()):
                for (row, col), cells in ledger.load(record, digests(record)).items():
                    # drives side by side, far from each other
                    tiles[row + 2**14 * number, col + 2**14 * count] = cells
        settings = [(32, b, 0.3) for b in (8, 4, 2)] + [(16, b, c) for c in (0.3, 0.6) for b in (8, 4, 2)]
        touched = {cell: cells_touched(every, cell) for cell in (0.3, 0.6)}
        results = []
        for number, (channels, bits, cell) in enumerate(settings):
            spec = PriorSpec(channels, cell, "footprint", bits)
            row = measure(changed(tiles, channels, bits, cell == 0.6), spec, km, folder / str(number))
            row["mb_per_km_of_all_trajectories"] = round(touched[cell] * row["bytes_per_cell"] / 1e6 / total_km, 3)
            results.append(row)
    text = json.dumps(
        {
            "rendered": {"scenes": [scene["scene"] for scene in chosen], "km": round(km, 3)},
            "as_stored_mb_per_km": round(as_stored / 1e6 / km, 3),
            "all": {"scenes": len(every), "km": round(total_km, 3), "cells": touched},
            "settings": results,
        },
        indent=2,
    )
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
