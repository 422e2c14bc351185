"""Score weights on a nuScenes data set, real or simulated, through the mapper that the node runs."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from tqdm import tqdm

from nmp.bags.nuscenes_to_bag import Shot, load_nuscenes, scene_shots
from nmp.citymap import CityMap
from nmp.errors import NmpError
from nmp.evaluation import write_json
from nmp.frame import ANCHOR_CAMERA, CAMERAS, Camera, CameraShot, Frame
from nmp.geometry import transform_from, yaw_of
from nmp.metrics import Breakdown, format_table
from nmp.truth import rasterize

if TYPE_CHECKING:
    from nuscenes.nuscenes import NuScenes

    from nmp.mapper import OnlineMapper

PROTOCOLS = {
    "no_prior": "every frame on its own",
    "empty": "every scene begins with an empty prior and carries it along",
    "earlier_trips": "scenes in the order in which they were driven, one prior for all of them",
    "train_trips": "every scene begins with the prior that the scenes of --train-split left",
}
SPREAD_S = 0.2
"""images of one sample lie within this time; the next sample is half a second away"""
SAME_PLACE_M = 10.0
"""an earlier drive passed here if it came this close"""


@dataclass(frozen=True)
class SceneFrames:
    """The keyframes of one scene, with what the car believed and where it really was."""

    name: str
    location: str
    date: str
    weather: str
    """day, rain or night"""
    frames: list[Frame]
    true_poses: list[NDArray[np.float64]]
    """[4, 4] map_from_base of each frame; differs from the frame's own where the localisation is simulated"""


def scene_frames(nusc: NuScenes, name: str) -> SceneFrames:
    """Read the keyframes of a scene; samples that lack a camera are left out."""
    scene = next((s for s in nusc.scene if s["name"] == name), None)
    if scene is None:
        raise NmpError(f"scene '{name}' is not in {nusc.dataroot} {nusc.version}: check the split file")
    location, shots = scene_shots(nusc, name)
    frames = list(_frames(shots, location))
    truth = {s.stamp_ns: _pose(s) for s in scene_shots(nusc, name, true_poses=True)[1] if s.camera == ANCHOR_CAMERA}
    return SceneFrames(
        name,
        location,
        nusc.get("log", scene["log_token"])["date_captured"],
        weather_of(scene["description"]),
        frames,
        [truth[f.stamp_ns] for f in frames],
    )


def weather_of(description: str) -> str:
    """Return day, rain or night for the description of a scene, as the published evaluation tells them apart."""
    text = description.lower()
    return "night" if "night" in text else "rain" if "rain" in text else "day"


def _frames(shots: Sequence[Shot], location: str) -> Iterator[Frame]:
    start = 0
    for end in range(1, len(shots) + 1):
        if end < len(shots) and shots[end].stamp_ns - shots[start].stamp_ns < SPREAD_S * 1e9:
            continue
        by_camera = {s.camera: s for s in shots[start:end]}
        start = end
        if len(by_camera) < len(CAMERAS):
            continue
        taken = [by_camera[name] for name in CAMERAS]
        anchor = by_camera[ANCHOR_CAMERA]
        deviation = np.zeros(36) if anchor.covariance is None else np.sqrt(anchor.covariance.clip(min=0))
        yield Frame(
            anchor.stamp_ns,
            location,
            _pose(anchor),
            tuple(
                CameraShot(
                    Camera(s.camera, s.width, s.height, s.intrinsics, _transform(s.extrinsics)),
                    s.stamp_ns,
                    s.path.read_bytes(),
                    _pose(s),
                )
                for s in taken
            ),
            position_std=float(max(deviation[0], deviation[7])),
            yaw_std=float(deviation[35]),
        )


def _pose(shot: Shot) -> NDArray[np.float64]:
    return _transform(shot.pose)


def _transform(xyz_xyzw: tuple[list[float], list[float]]) -> NDArray[np.float64]:
    return transform_from(np.array(xyz_xyzw[0]), np.array(xyz_xyzw[1]))


class _Truth:
    """The map in force on a day; each city is read once a day."""

    def __init__(self, dataroot: Path) -> None:
        self._dataroot = dataroot
        self._known: dict[tuple[str, str], CityMap] = {}

    def __call__(self, scene: SceneFrames, index: int, mapper: OnlineMapper) -> NDArray[np.uint8]:
        key = (scene.location, scene.date)
        if key not in self._known:
            self._known[key] = CityMap.load(self._dataroot, *key)
        pose = scene.true_poses[index]
        return rasterize(self._known[key], float(pose[0, 3]), float(pose[1, 3]), yaw_of(pose), mapper.grid)


class _History:
    """Where earlier scenes passed."""

    def __init__(self) -> None:
        self._trips: list[tuple[str, cKDTree]] = []

    def add(self, scene: SceneFrames) -> None:
        self._trips.append((scene.location, cKDTree([p[:2, 3] for p in scene.true_poses])))

    def earlier(self, scene: SceneFrames, index: int) -> int:
        """Return how many of them came near a frame."""
        here = scene.true_poses[index][:2, 3]
        return sum(place == scene.location and tree.query(here)[0] < SAME_PLACE_M for place, tree in self._trips)


def evaluate_dataset(
    weights: Path | None,
    dataroot: Path,
    version: str,
    protocol: str,
    *,
    scenes: Sequence[str] | None = None,
    train_scenes: Sequence[str] = (),
    progress: bool = True,
) -> Breakdown:
    """Map the scenes (all by default) under a protocol of ``PROTOCOLS`` and score every keyframe.

    The scores are filed by weather, by distance from the car and, but for ``no_prior``, by how many earlier trips
    wrote the prior at that place.
    """
    from nmp.mapper import OnlineMapper

    nusc = load_nuscenes(dataroot, version)
    order = sorted(nusc.scene, key=lambda s: nusc.get("sample", s["first_sample_token"])["timestamp"])
    everything = [s["name"] for s in order]
    if unknown := sorted({*(scenes or ()), *train_scenes} - set(everything)):
        raise NmpError(f"{dataroot} {version} has no scene(s) {', '.join(unknown[:10])}: check the split file")
    chosen = [n for n in everything if scenes is None or n in scenes]
    train = [n for n in everything if n in train_scenes]
    if not chosen or (protocol == "train_trips" and not train):
        raise NmpError(f"no scenes to score under {protocol}: choose a split that has some")
    truth = _Truth(dataroot)
    steps = len(chosen) + (len(train) if protocol == "train_trips" else 0)
    with (
        tempfile.TemporaryDirectory(prefix="nmp-eval-") as folder,
        tqdm(total=steps, unit="scene", disable=not progress) as bar,
    ):
        shared, trained, own = Path(folder, "shared"), Path(folder, "trained"), Path(folder, "own")
        history = _History()
        breakdown: Breakdown | None = None
        if protocol == "train_trips":
            with OnlineMapper(weights, trained) as mapper:
                for name in train:
                    scene = scene_frames(nusc, name)
                    for frame in scene.frames:
                        mapper.update(frame)
                    history.add(scene)
                    bar.update()
        for name in chosen:
            scene = scene_frames(nusc, name)
            prior = shared if protocol == "earlier_trips" else own
            if protocol == "train_trips":
                shutil.copytree(trained, own)
            with OnlineMapper(weights, prior, use_prior=protocol != "no_prior") as mapper:
                breakdown = breakdown or Breakdown(mapper.grid)
                for index, frame in enumerate(scene.frames):
                    labels = [scene.weather]
                    if protocol != "no_prior":
                        labels.append(f"{min(history.earlier(scene, index), 5)} earlier trips")
                    breakdown.add(mapper.update(frame).masks, truth(scene, index, mapper), labels)
            shutil.rmtree(own, ignore_errors=True)
            if protocol == "earlier_trips":
                history.add(scene)
            bar.update()
    assert breakdown is not None
    return breakdown


def _scenes_of(split: str | None, dataroot: Path, version: str) -> list[str] | None:
    """Return the scenes of a split: a name in the data set's splits.json, or a name of the official devkit."""
    if split is None:
        return None
    import json

    path = dataroot / version / "splits.json"
    known: dict[str, Any] = {}
    if path.is_file():
        known = json.loads(path.read_text())
    else:
        from nuscenes.utils.splits import create_splits_scenes

        known = create_splits_scenes()
    if split not in known:
        raise NmpError(f"there is no split {split!r} in {path}: choose from {', '.join(sorted(known))}")
    return [str(name) for name in known[split]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``nmp-train eval``."""
    parser.add_argument("weights", type=Path, nargs="?", help=".safetensors file (default: the shipped network)")
    parser.add_argument("--dataroot", type=Path, required=True, help="nuScenes folder, real or simulated")
    parser.add_argument("--version", default="v1.0-mini", help="its tables (default: %(default)s)")
    parser.add_argument(
        "--protocol",
        choices=tuple(PROTOCOLS),
        default="no_prior",
        help="; ".join(f"{name}: {text}" for name, text in PROTOCOLS.items()) + " (default: %(default)s)",
    )
    parser.add_argument("--split", help="score the scenes of this split (default: all scenes)")
    parser.add_argument("--train-split", default="train", help="for train_trips (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores there")


def run(args: argparse.Namespace) -> None:
    """Carry out ``nmp-train eval``."""
    scenes = _scenes_of(args.split, args.dataroot, args.version)
    train = _scenes_of(args.train_split, args.dataroot, args.version) if args.protocol == "train_trips" else None
    result = evaluate_dataset(
        args.weights, args.dataroot, args.version, args.protocol, scenes=scenes, train_scenes=train or ()
    )
    scores = result.percent()
    frames = {name: result.meters[name].frames for name in scores}
    print(format_table({f"{name} ({frames[name]})": row for name, row in scores.items()}))
    if args.json:
        content = {
            **_finite(scores["all"]),
            "frames": frames["all"],
            "protocol": args.protocol,
            "breakdown": {name: {**_finite(row), "frames": frames[name]} for name, row in scores.items()},
        }
        write_json(args.json, content)


def _finite(row: dict[str, float]) -> dict[str, float | None]:
    return {name: value if np.isfinite(value) else None for name, value in row.items()}
