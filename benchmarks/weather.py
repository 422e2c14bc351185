"""How much a network loses in rain and at night, and how much its prior then helps.

    python benchmarks/weather.py --out weather.json
    python benchmarks/weather.py --weights gpu_default --drives 5

The same drives through held-out cities are made in each weather, twice: first on an empty map, then on what the first
trip left. Streets, traffic, cameras and poses are the same in every weather, so the differences are those of the
weather alone. IoU in percent in the published protocol.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from nmp.errors import NmpError
from nmp.model import load_network
from nmp.model.runner import choose_device
from nmp_train.config import load_config
from nmp_train.data import SimulatedSource, make_worlds
from nmp_train.sim.weather import WORDS
from nmp_train.validate import validate

CONFIG = Path(__file__).resolve().parents[1] / "nmp_train" / "configs" / "cpu_default.yaml"
SYSTEMS = ("no prior", "empty", "one trip before")


def score(weights: Path | None, drives: int, cities: int, device: torch.device, workers: int) -> dict[str, Any]:
    """Return the IoU (percent) of each class and their mean, by weather and system."""
    network = load_network(weights)[0].eval().to(device)
    config = load_config(
        CONFIG,
        [
            f"workers={workers}",
            "supersample=1",
            f"validation.seeds={cities}",
            f"validation.drives={drives}",
            "validation.changed_share=0",
        ],
    )
    config = dataclasses.replace(config, network=network.config)
    source = SimulatedSource(make_worlds(config.validation, workers, held_out=True, trips=2), config, device)
    exact = ((0.0, 0.0),)
    found = {
        word: validate(network, source, config, drives=drives, trips=2, weather=word, errors=exact) for word in WORDS
    }
    return {word: {system: scores[system]["all"] for system in SYSTEMS} for word, scores in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="default: those that nmp ships for a CPU")
    parser.add_argument("--drives", type=int, default=2, help="of each city, 24 s (default 2)")
    parser.add_argument("--cities", type=int, default=4, help="default 4")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=2, help="processes that make the cities (default 2)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    device = choose_device(options.device)
    result = {"device": str(device), "drives": options.drives, "cities": options.cities}
    result |= score(options.weights, options.drives, options.cities, device, options.workers)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    try:
        main()
    except NmpError as error:
        raise SystemExit(f"weather: error: {error}") from None
