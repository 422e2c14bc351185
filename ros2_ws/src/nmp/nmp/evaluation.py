"""Scores: layers on disk against the map that was in force when they were made.

The truth is drawn at the pose of each layer, or at the true ego pose of its moment where the data set is named.
"""

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

from nmp.changelog import Change, apply_changes, checked_date, in_force, local_date, read_changes
from nmp.citymap import CityMap, load_with_tables
from nmp.errors import NmpError
from nmp.frame import ANCHOR_CAMERA, LocalMap
from nmp.geometry import Array, BevGrid, transform_from, yaw_of
from nmp.layers import read_layers
from nmp.metrics import IouMeter, format_table
from nmp.truth import rasterize


class CityMaps:
    """The maps of a nuScenes data root; each city is read once, and changed once for every state that is asked for.

    :param version: tables of the data root (v1.0-mini, ...): the truth is drawn at their ego poses instead of at the
        poses of the layers
    :param map_date: YYYY-MM-DD: the maps as they were on that day, whatever the stamp of a layer
    """

    def __init__(self, dataroot: Path, *, version: str | None = None, map_date: str | None = None) -> None:
        self.dataroot = Path(dataroot)
        if not self.dataroot.is_dir():
            raise NmpError(f"data root {self.dataroot} does not exist: give the folder that holds maps/expansion")
        self.map_date = None if map_date is None else checked_date(map_date)
        self._poses = None if version is None else TruePoses(self.dataroot, version)
        self._sources: dict[str, tuple[Mapping[str, Any], list[Change]]] = {}
        self._cities: dict[tuple[str, int], CityMap] = {}

    def city(self, location: str, date: str | None = None) -> CityMap:
        """Return the map of a location on a date (YYYY-MM-DD), or before all changes.

        :class:`NmpError` when the data root has none.
        """
        if location not in self._sources:
            changes = read_changes(self.dataroot, location)
            self._cities[location, 0], read = load_with_tables(self.dataroot, location)
            # Without changes nobody needs the tables again.
            self._sources[location] = (read if changes else {}, changes)
        tables, changes = self._sources[location]
        count = 0 if date is None else len(in_force(changes, date))
        if (location, count) not in self._cities:
            due = apply_changes(tables, changes[:count], changes[count - 1].date)
            self._cities[location, count] = CityMap.from_tables(due, location)
        return self._cities[location, count]

    def truth_of(self, local_map: LocalMap) -> NDArray[np.uint8]:
        """Draw the true layers [3, rows, cols] at the pose and over the grid of a local map.

        With tables, at the true ego pose of its stamp: :class:`NmpError` when they have no image of that moment.
        """
        pose, location = local_map.map_from_base, local_map.location
        if self._poses is not None:
            pose = self._poses.at(location, local_map.stamp_ns)
        date = self.map_date or local_date(location, local_map.stamp_ns)
        x, y, yaw = float(pose[0, 3]), float(pose[1, 3]), yaw_of(pose)
        return rasterize(self.city(location, date), x, y, yaw, local_map.grid)


class TruePoses:
    """The ego poses of a nuScenes release at the moments of its anchor camera."""

    def __init__(self, dataroot: Path, version: str) -> None:
        self._where = Path(dataroot) / version
        if not self._where.is_dir():
            found = ", ".join(sorted(p.name for p in Path(dataroot).glob("v1.0-*"))) or "none"
            raise NmpError(f"{dataroot} has no tables '{version}' (found: {found}): check --maps and --version")
        try:
            location = {row["token"]: row["location"] for row in self._table("log")}
            of_scene = {row["token"]: location[row["log_token"]] for row in self._table("scene")}
            of_sample = {row["token"]: of_scene[row["scene_token"]] for row in self._table("sample")}
            anchor = {r["token"] for r in self._table("sensor") if r["channel"].lower() == ANCHOR_CAMERA}
            rigs = {r["token"] for r in self._table("calibrated_sensor") if r["sensor_token"] in anchor}
            # Cars in two cities may fire at one moment.
            moments = {
                row["ego_pose_token"]: (of_sample[row["sample_token"]], int(row["timestamp"]))
                for row in self._table("sample_data")
                if row["calibrated_sensor_token"] in rigs
            }
            self._poses = {
                moments[row["token"]]: (row["translation"], row["rotation"])
                for row in self._table("ego_pose")
                if row["token"] in moments
            }
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise NmpError(f"{self._where} is not a complete nuScenes release ({reason}): unpack it again") from error

    def _table(self, name: str) -> list[dict[str, Any]]:
        rows = json.loads((self._where / f"{name}.json").read_text())
        if not isinstance(rows, list):
            raise TypeError(f"{name}.json holds no list")
        return rows

    def at(self, location: str, stamp_ns: int) -> Array:
        """Return map_from_base [4, 4] at the stamp of an anchor image; :class:`NmpError` when there is none."""
        found = self._poses.get((location, stamp_ns // 1000))
        if found is None or stamp_ns % 1000:
            raise NmpError(
                f"{self._where} has no {ANCHOR_CAMERA} image of {location} at {stamp_ns} ns: give the data set that "
                "the layers were made from, or leave --version out"
            )
        translation, (w, x, y, z) = found
        return transform_from(np.array(translation), np.array([x, y, z, w]))


def nan_as_null(value: Any) -> Any:
    """Return a value for JSON, which knows no NaN: numbers that are not finite, however deep, become None."""
    if isinstance(value, dict):
        return {key: nan_as_null(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [nan_as_null(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Evaluation:
    """How well one system did over one set of layers."""

    scores: dict[str, float]
    """IoU in percent: divider, crossing, boundary, miou; NaN where a class occurs in neither"""
    frames: int

    def to_json(self) -> dict[str, float | int | None]:
        """Return plain JSON values; a score that is not defined becomes null."""
        return {**nan_as_null(self.scores), "frames": self.frames}


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
    parser.add_argument(
        "--version",
        metavar="v1.0-x",
        help="tables of DATAROOT: draw the truth at their ego poses (default: at the pose of each layer, as it was "
        "localised)",
    )
    _add_map_date(parser, "default: the day of each layer's stamp")
    parser.add_argument("--name", help="name of the row, where only one folder is given (default: the folder's name)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores there")


def _add_map_date(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--map-date",
        metavar="YYYY-MM-DD",
        help=f"the maps as they were on that day, where DATAROOT has maps/changes ({default})",
    )


def run(args: argparse.Namespace) -> None:
    """Carry out ``nmp eval``."""
    if args.name and len(args.layers) > 1:
        raise NmpError("--name is for one folder: name several as NAME=DIR")
    maps = CityMaps(args.maps, version=args.version, map_date=args.map_date)
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
            masks.append(rasterize(maps.city(location, maps.map_date), x, y, yaw, grid))
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
    _add_map_date(parser, "default: before all changes")
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
    masks = truth_at(poses, CityMaps(args.maps, map_date=args.map_date))
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("wb") as stream:  # an open file, because savez adds .npz to other names
            np.savez_compressed(stream, masks=masks)
    except OSError as error:
        raise NmpError(f"cannot write {args.out} ({error.strerror}): choose another --out") from error
    print(f"wrote {args.out}: {len(masks)} poses")
