"""How much a network loses in rain and at night: the same frames of held-out cities, rendered in each weather.

    python benchmarks/weather.py --out weather.json
    python benchmarks/weather.py --weights gpu_default --frames 96

Streets, traffic, cameras and the pose of the car are those of one frame in all its renderings, so the differences are
those of the weather alone; nothing is remembered from frame to frame. IoU in percent in the published protocol.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nmp.errors import NmpError
from nmp.metrics import IouMeter
from nmp.model import load_network
from nmp.model.runner import choose_device
from nmp_train.config import load_config
from nmp_train.data import SimulatedGroups, SimulatedSource, collate, make_worlds
from nmp_train.sim.weather import WORDS
from nmp_train.step import autocast

CONFIG = Path(__file__).resolve().parents[1] / "nmp_train" / "configs" / "cpu_default.yaml"
CHUNK = 4
"""frames that are rendered together"""


@torch.inference_mode()
def score(weights: Path | None, frames: int, cities: int, device: torch.device, workers: int) -> dict[str, Any]:
    """Return the IoU (percent) of each class and their mean, by weather."""
    network = load_network(weights)[0].eval().to(device)
    config = load_config(CONFIG, [f"validation.seeds={cities}", "validation.difficulties=[1.0]", "supersample=1"])
    config = dataclasses.replace(config, network=network.config)
    source = SimulatedSource(make_worlds(config.validation, workers, held_out=True), config, device)
    stage = dataclasses.replace(config.stages[-1], group=1, batch=1)
    groups = SimulatedGroups(source.worlds, config, stage, seed=77, length=1)
    meters = {word: IouMeter() for word in WORDS}
    with tqdm(total=frames * len(WORDS), unit="frame") as bar:
        for number in range(0, frames, CHUNK):
            world = number // CHUNK % cities
            count = len(source.worlds[world].frames)
            rows = np.random.default_rng((7, number)).choice(count, CHUNK, replace=False)
            for word in WORDS:
                rng = np.random.default_rng((77, number))
                batch = source.batch(collate([groups.make(world, np.sort(rows), rng, weather=word)]))
                with autocast(config, device):
                    bev = network.encode(batch.images, batch.pixel_from_base, batch.present)
                    found = (network.alone(bev).logits > 0).cpu().numpy()
                for layers, truth in zip(found, batch.truth.cpu().numpy(), strict=True):
                    meters[word].add(layers, truth > 0)
                bar.update(CHUNK)
    return {word: meter.percent() for word, meter in meters.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="default: those that nmp ships for a CPU")
    parser.add_argument("--frames", type=int, default=192, help="of all cities together (default 192)")
    parser.add_argument("--cities", type=int, default=4, help="default 4")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=2, help="processes that make the cities (default 2)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    device = choose_device(options.device)
    result = {"device": str(device), "frames": options.frames, "cities": options.cities}
    result |= score(options.weights, options.frames, options.cities, device, options.workers)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    try:
        main()
    except NmpError as error:
        raise SystemExit(f"weather: error: {error}") from None
