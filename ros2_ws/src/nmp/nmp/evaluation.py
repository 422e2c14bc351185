"""Scores: layers on disk against the map expansion drawn at each layer's own pose."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmp.citymap import CityMap
from nmp.errors import NmpError
from nmp.frame import LocalMap
from nmp.geometry import BevGrid, yaw_of
from nmp.layers import read_layers
from nmp.metrics import IouMeter, format_table
from nmp.truth import rasterize


class CityMaps:
    """The maps of a nuScenes data root; each city is read once."""

    def __init__(self, dataroot: Path) -> None:
        self.dataroot = Path(dataroot)
        if not self.dataroot.is_dir():
            raise NmpError(f"data root {self.dataroot} does not exist: give the folder that holds maps/expansion")
        self._cities: dict[str, CityMap] = {}

    def city(self, location: str) -> CityMap:
        """Return the map of a location; :class:`NmpError` when the data root has none."""
        if location not in self._cities:
            self._cities[location] = CityMap.load(self.dataroot, location)
        return self._cities[location]

    def truth_of(self, local_map: LocalMap) -> NDArray[np.uint8]:
        """Draw the true layers [3, rows, cols] at the pose and over the grid of a local map."""
        pose = local_map.map_from_base
        x, y, yaw = float(pose[0, 3]), float(pose[1, 3]), yaw_of(pose)
        return rasterize(self.city(local_map.location), x, y, yaw, local_map.grid)


@dataclass(frozen=True)
class Evaluation:
    """How well one system did over one set of layers."""

    scores: dict[str, float]
    """IoU in percent: divider, crossing, boundary, miou; NaN where a class occurs in neither"""
    frames: int

    def to_json(self) -> dict[str, float | int | None]:
        """Return plain JSON values; a score that is not defined becomes null."""
        scores = {name: value if math.isfinite(value) else None for name, value in self.scores.items()}
        return {**scores, "frames": self.frames}


def evaluate(layers: Path, maps: CityMaps) -> Evaluation:
    """Score the layers of one folder."""
    meter = IouMeter()
    for local_map in read_layers(layers):
        meter.add(local_map.masks, maps.truth_of(local_map))
    return Evaluation(meter.percent(), meter.frames)


def write_json(path: Path, content: Any) -> None:
    """Write JSON through a temporary file, so that no reader ever sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        partial.replace(path)
    except OSError as error:
        raise NmpError(f"cannot write {path} ({error.strerror}): choose another file") from error


# -------------------------------------------------------------------------------------------------- nmp eval


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``nmp eval``."""
    parser.add_argument("layers", nargs="+", metavar="[NAME=]LAYERS", help="folders of 'nmp map' or of a live run")
    parser.add_argument("--maps", type=Path, required=True, metavar="DATAROOT", help="folder with maps/expansion")
    parser.add_argument("--name", help="name of the row, where only one folder is given (default: the folder's name)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores there")


def run(args: argparse.Namespace) -> None:
    """Carry out ``nmp eval``."""
    if args.name and len(args.layers) > 1:
        raise NmpError("--name is for one folder: name several as NAME=DIR")
    maps = CityMaps(args.maps)
    results: dict[str, Evaluation] = {}
    for argument in args.layers:
        name, folder = _name_and_folder(argument)
        name = args.name or name
        if name in results:
            raise NmpError(f"two folders are named {name}: name them apart as NAME=DIR")
        results[name] = evaluate(folder, maps)
    print(format_table({name: result.scores for name, result in results.items()}))
    if args.json:
        write_json(args.json, {name: result.to_json() for name, result in results.items()})


def _name_and_folder(argument: str) -> tuple[str, Path]:
    name, separator, folder = argument.partition("=")
    # A folder whose own name contains "=" is still a folder.
    if separator and name and "/" not in name and not Path(argument).exists():
        return name, Path(folder)
    return Path(argument).resolve().name, Path(argument)


# ------------------------------------------------------------------------------------------------- nmp truth


def truth_at(poses: list[Mapping[str, Any]], maps: CityMaps, grid: BevGrid | None = None) -> NDArray[np.uint8]:
    """Draw the true layers at poses with location, x, y (m) and yaw (rad): uint8 [N, 3, rows, cols]."""
    grid = grid or BevGrid()
    checked = [_pose(index, pose) for index, pose in enumerate(poses)]
    if not checked:
        raise NmpError("no poses to draw at: give a list of at least one")
    masks = []
    for index, (location, x, y, yaw) in enumerate(checked):
        try:
            masks.append(rasterize(maps.city(location), x, y, yaw, grid))
        except NmpError as error:
            raise NmpError(f"pose {index}: {error}") from error
    return np.stack(masks)


def _pose(index: int, pose: Any) -> tuple[str, float, float, float]:
    example = '{"location": "boston-seaport", "x": 1010.0, "y": 610.0, "yaw": 0.5}'
    if not isinstance(pose, Mapping):
        raise NmpError(f"pose {index} is not an object: write each pose as {example}")
    for key in ("location", "x", "y", "yaw"):
        if key not in pose:
            raise NmpError(f"pose {index} has no '{key}': write each pose as {example}")
    if not isinstance(pose["location"], str):
        raise NmpError(f"pose {index}: 'location' is {pose['location']!r}, not a name such as boston-seaport")
    numbers = []
    for key in ("x", "y", "yaw"):
        value = pose[key]
        # bool is an int in Python, and a JSON true is surely no coordinate
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise NmpError(f"pose {index}: '{key}' is {value!r}, not a finite number (x and y in m, yaw in rad)")
        numbers.append(float(value))
    return pose["location"], numbers[0], numbers[1], numbers[2]


def add_truth_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``nmp truth``."""
    parser.add_argument("--maps", type=Path, required=True, metavar="DATAROOT", help="folder with maps/expansion")
    parser.add_argument(
        "--poses",
        type=Path,
        required=True,
        metavar="POSES.json",
        help='[{"location", "x", "y", "yaw"}, ...], m and rad',
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.npz", help="masks: uint8 [N, 3, 200, 400]")


def run_truth(args: argparse.Namespace) -> None:
    """Carry out ``nmp truth``."""
    try:
        poses = json.loads(args.poses.read_text())
    except OSError as error:
        raise NmpError(f"cannot read {args.poses} ({error.strerror}): check the path") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NmpError(f"{args.poses} is not valid JSON ({error}): write a list of poses") from error
    if not isinstance(poses, list):
        raise NmpError(f"{args.poses} holds no list: write [{{...}}, {{...}}] with one object per pose")
    masks = truth_at(poses, CityMaps(args.maps))
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("wb") as stream:  # an open file, because savez adds .npz to other names
            np.savez_compressed(stream, masks=masks)
    except OSError as error:
        raise NmpError(f"cannot write {args.out} ({error.strerror}): choose another --out") from error
    print(f"wrote {args.out}: {len(masks)} poses")
