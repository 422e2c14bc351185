"""How fast a network trains: samples a second, the share of time that waits for data, and memory.

    python benchmarks/training.py nmp_train/configs/gpu_default.yaml --out rendered.json
    python benchmarks/training.py nmp_train/configs/paper.yaml --recorded --steps 40 --out recorded.json
    python benchmarks/training.py nmp_train/configs/gpu_default.yaml stages.0.batch=64 workers=16 --stage 2

A sample is six images. One stage of the configuration is run for some steps with the loop of 'nmp-train fit', once
with images that are rendered while it trains, and with --recorded with JPEGs that are decoded by the loader's workers.
Those JPEGs are made first: 1600 x 900 pixels of shapes and noise, as large on disk as those of a camera, in a nuScenes
folder (--keep FOLDER uses it again). The first step is not counted: it compiles.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from nmp.errors import NmpError
from nmp.frame import LOCATIONS, CameraShot
from nmp.model import BEVNetwork
from nmp.model.preprocess import network_image
from nmp.model.runner import choose_device
from nmp_train.config import TrainConfig, load_config
from nmp_train.data import RecordedSource, SimulatedSource, Source, make_worlds
from nmp_train.loop import train
from nmp_train.sim.city import generate_city
from nmp_train.sim.dataset import Drive, write_dataset
from nmp_train.sim.drive import sample_routes, second_pass
from nmp_train.sim.rig import nuscenes_rig

VERSION = "v1.0-mini"
GRAIN = 1.0
"""standard deviation of the noise that makes a JPEG as large as a real one, about 120 kB"""
SHAPES = 40


def picture(seed: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return an image [height, width, 3] of shapes and noise that a JPEG encoder has as much to do with as a street."""
    width, height = size
    rng = np.random.default_rng(seed)
    sky, road = rng.integers(120, 230, 3), rng.integers(60, 140, 3)
    image = np.linspace(sky, road, height)[:, None].repeat(width, axis=1).astype(np.uint8)
    for _ in range(SHAPES):
        corner = rng.integers(0, [width, height])
        extent = rng.integers(8, 220, 2)
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        if rng.random() < 0.5:
            cv2.rectangle(image, tuple(corner.tolist()), tuple((corner + extent).tolist()), colour, -1)
        else:
            cv2.line(image, tuple(corner.tolist()), tuple((corner + 2 * extent).tolist()), colour, 3, cv2.LINE_AA)
    coarse = rng.normal(0, GRAIN, (height // 2, width // 2)).astype(np.float32)
    grain = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray((image + grain[..., None]).clip(0, 255), dtype=np.uint8)


def write_recording(folder: Path, seed: int, scenes: int, duration_s: float) -> None:
    """Write a nuScenes folder of some scenes through one generated city; its map fits, its images show nothing."""
    place = LOCATIONS[seed % len(LOCATIONS)]
    city = generate_city(seed, place, 420.0)
    first = sample_routes(city, seed + 1, (scenes + 1) // 2, duration_s, 12.0)
    again = [second_pass(t, seed + 1000 + i, city) for i, t in enumerate(first)]
    drives = [Drive(t, name=f"scene-{i + 1:04d}") for i, t in enumerate((*first, *again)) if i < scenes]
    # Drawing is slower than anything that is measured, so the images repeat; each is a file of its own.
    made = [picture(seed + i, (1600, 900)) for i in range(12)]

    def draw(intrinsics: NDArray[np.float64], *_: Any, seed: int, **__: Any) -> NDArray[np.uint8]:
        return np.stack([made[(seed + i) % len(made)] for i in range(len(intrinsics))])

    names = [d.name for d in drives]
    write_dataset(folder, drives, {place: city}, version=VERSION, render=draw, seed=seed, splits={"train": names})


@contextlib.contextmanager
def recording(keep: Path | None, seed: int, scenes: int, duration_s: float) -> Iterator[Path]:
    """Give a folder of recorded images, made when it is not there."""
    with tempfile.TemporaryDirectory(prefix="nmp-benchmark-") as temporary:
        folder = keep or Path(temporary, "recording")
        if not folder.is_dir():
            write_recording(folder, seed, scenes, duration_s)
        yield folder


def describe_recording(folder: Path, config: TrainConfig) -> dict[str, Any]:
    """Return size and number of the JPEGs, and what it costs one core to decode one for the network's input."""
    files = sorted((folder / "samples").rglob("*.jpg"))
    camera = next(c for c in nuscenes_rig("n015") if c.name == "cam_front")
    cv2.setNumThreads(1)
    data = [path.read_bytes() for path in files[:24]]
    begin = time.process_time()
    for image in data:
        network_image(CameraShot(camera, 0, image, np.eye(4)), config.network)
    seconds = (time.process_time() - begin) / len(data)
    return {
        "images": len(files),
        "mean_kb": round(sum(path.stat().st_size for path in files) / len(files) / 1000, 1),
        "decode_ms": round(1e3 * seconds, 2),
    }


def one_stage(config: TrainConfig, number: int, steps: int) -> TrainConfig:
    """Return a configuration of one of the stages alone, for so many steps and with nothing written between."""
    if not 1 <= number <= len(config.stages):
        raise NmpError(f"--stage {number} does not exist: the configuration has {len(config.stages)}")
    stage = dataclasses.replace(config.stages[number - 1], seconds=0.0, steps=steps)
    return dataclasses.replace(config, stages=(stage,), checkpoint_every=steps + 1)


def measure(source: Source, config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """Train from a source; return the summary of the stage without the losses."""
    torch.manual_seed(config.seed)
    network = BEVNetwork(config.network).to(device)
    with tempfile.TemporaryDirectory(prefix="nmp-benchmark-") as folder:
        summary = train(network, source, config, Path(folder), device=device)["stages"][0]
    return {key: value for key, value in summary.items() if key not in ("losses", "stage")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="as for 'nmp-train fit'")
    parser.add_argument("override", nargs="*", help="key=value, for example stages.0.batch=8")
    parser.add_argument("--recorded", action="store_true", help="train from JPEGs instead of rendering")
    parser.add_argument("--stage", type=int, default=1, help="which stage of the configuration (default 1)")
    parser.add_argument("--steps", type=int, default=60, help="default 60")
    parser.add_argument("--worlds", type=int, default=2, help="rendered: cities that are made (default 2)")
    parser.add_argument("--scenes", type=int, default=4, help="recorded: scenes that are made (default 4)")
    parser.add_argument("--duration", type=float, default=10.0, help="recorded: length of a scene, s (default 10)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="recorded: data set to use, made when missing")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=1001)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = choose_device(options.device)
    loaded = load_config(options.config, options.override)
    config = one_stage(loaded, options.stage, options.steps)
    stage = config.stages[0]
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "images": "recorded" if options.recorded else "rendered",
        "input": [config.network.input_height, config.network.input_width],
        "backbone": config.network.backbone,
        "view": config.network.view,
        "fusion": config.network.fusion,
        "groups_a_step": stage.batch,
        "frames_a_group": stage.group,
        "workers": config.workers,
        "precision": config.precision if device.type == "cuda" else "fp32",
        "checkpointing": config.checkpointing,
        "compile": config.compile,
    }
    begin = time.monotonic()
    if options.recorded:
        with recording(options.keep, options.seed, options.scenes, options.duration) as folder:
            result["preparation_s"] = round(time.monotonic() - begin, 1)
            result["recording"] = describe_recording(folder, config)
            scenes = json.loads((folder / VERSION / "splits.json").read_text())["train"]
            result |= measure(RecordedSource(folder, VERSION, scenes, config, device), config, device)
    else:
        worlds = make_worlds(dataclasses.replace(config.worlds, seeds=options.worlds, real=None), config.workers)
        result["preparation_s"] = round(time.monotonic() - begin, 1)
        result |= measure(SimulatedSource(worlds, config, device), config, device)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    try:
        main()
    except NmpError as error:
        raise SystemExit(f"training: error: {error}") from None
