"""What `nmp prior render` costs, and how right the layers are that the prior alone gives.

    python benchmarks/prior_render.py [--km 1 16] [--city PRIOR/LOCATION --maps DATAROOT] [--bag BAG] \
        [--weights gpu_default] [--out FILE.json]

Cost: pictures and a web map of simulated streets of several lengths, random cells in a band of 30 m; the peak memory
of the process and the seconds it took. Layers: a city that the shipped weights wrote, scored against its map expansion
where it has evidence, with different things in the place of the features of an image: what the network makes of no
image (this is what is drawn), zeros, and, with a bag, the mean of the features of its frames.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nmp.assembly import FrameAssembler
from nmp.bags.reader import BagReader
from nmp.citymap import CityMap
from nmp.frame import CLASSES
from nmp.geometry import BevGrid
from nmp.model.fusion import EVIDENCE_SCALE
from nmp.model.preprocess import network_input
from nmp.model.weights import load_network
from nmp.prior import CityPrior, PriorSpec, Window
from nmp.prior.recall import CELL_PX, Recall
from nmp.prior.sheets import City
from nmp.replay import frames_of
from nmp.truth import rasterize

WIDE = 100
"""cells across the street"""


def street(folder: Path, km: float, spec: PriorSpec) -> Path:
    """Store a drive along a street of random cells that heads north-east."""
    steps = round(km * 1000 / 0.3 / 1.414 / 64)
    rng = np.random.default_rng(0)
    latent = rng.integers(-127, 128, (spec.channels, WIDE, WIDE)).astype(np.int8)
    evidence = rng.integers(1, spec.evidence_cap, (WIDE, WIDE)).astype(np.uint16)
    with CityPrior.open(folder, "street", spec, flush_interval_s=2.0) as prior:
        for step in range(steps):
            window = Window(64 * step, 64 * step, WIDE, WIDE)
            before = prior.read(window)[1]
            prior.write(window, latent, np.maximum(before, evidence), (step + 1) * 10**9)
    return folder / "street"


def cost(city: Path, out: Path, kinds: list[str]) -> dict[str, Any]:
    """Draw a city in a process of its own."""
    command = [sys.executable, "-m", "nmp.cli", "prior", "render", str(city), "--layer", *kinds]
    start = time.perf_counter()
    child = subprocess.Popen([*command, "--out", str(out / "pictures"), "--web", str(out / "web")])
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"drawing {city} failed")
    with City(city) as found:
        chunks = len(found.chunks())
    seconds = time.perf_counter() - start
    return {"chunks": chunks, "seconds": round(seconds, 1), "peak_mib": round(usage.ru_maxrss / 1024)}


def mean_features(bag: Path, weights: Path | None) -> torch.Tensor:
    """Return the mean features [1, C, 1, 1] of every third frame of a bag."""
    network, _ = load_network(weights)
    found = []
    with BagReader(bag) as reader, torch.no_grad():
        for number, frame in enumerate(frames_of(reader, FrameAssembler())):
            if number % 3 == 0:
                found.append(network.encode(*network_input(frame, network.config)).mean((2, 3), keepdim=True))
    return torch.stack(found).mean(0)


def scores(place: Path, maps: Path, bag: Path | None, weights: Path | None) -> dict[str, Any]:
    """Return the IoU (percent) of each class, where the city has evidence, for each filling."""
    recall = Recall(load_network(weights)[0])
    fillings = {"no image": recall.nothing, "zeros": torch.zeros_like(recall.nothing)}
    if bag is not None:
        fillings["mean of frames"] = mean_features(bag, weights)
    with City(place) as city:
        extent = city.prior.extent()
        assert extent is not None
        latent, evidence = city.prior.read(extent)
        name, cell = city.name, city.cell
    grid = BevGrid(extent.cols * cell, extent.rows * cell, cell / CELL_PX)
    middle = (extent.col + extent.cols / 2) * cell, (extent.row + extent.rows / 2) * cell
    truth = rasterize(CityMap.load(maps, name), *middle, 0.0, grid) > 0
    known = (evidence > 0).repeat(CELL_PX, 0).repeat(CELL_PX, 1)
    results = {}
    for label, filling in fillings.items():
        recall.nothing = filling
        found = recall(latent, evidence) > 0.5
        results[label] = {
            name: round(100 * float((f & t & known).sum() / max(((f | t) & known).sum(), 1)), 2)
            for name, f, t in zip(CLASSES, found, truth, strict=True)
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--km", type=float, nargs="*", default=[1.0, 16.0], help="lengths of the streets")
    parser.add_argument("--kinds", nargs="+", default=["evidence"], help="of pictures of the streets")
    parser.add_argument("--city", type=Path, help="a city that these weights wrote")
    parser.add_argument("--weights", type=Path, help="(default: cpu_default; of the cost only the shape matters)")
    parser.add_argument("--maps", type=Path, help="data root with its map expansion")
    parser.add_argument("--bag", type=Path, help="a drive through it")
    options = parser.parse_args()
    network, fingerprint = load_network(options.weights)
    cap = round(network.config.evidence_cap * EVIDENCE_SCALE)
    spec = PriorSpec(network.state_channels, network.config.prior_cell, fingerprint, evidence_cap=cap)
    results: dict[str, Any] = {"weights": fingerprint, "kinds": options.kinds, "streets": {}}
    for km in options.km:
        with tempfile.TemporaryDirectory() as folder:
            place = street(Path(folder), km, spec)
            results["streets"][f"{km:g} km"] = cost(place, Path(folder), options.kinds)
    if options.city:
        if not options.maps:
            parser.error("--city needs --maps")
        results["iou"] = scores(options.city, options.maps, options.bag, options.weights)
    text = json.dumps(results, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
