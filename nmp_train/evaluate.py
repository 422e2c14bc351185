"""Score weights on a nuScenes data set, real or simulated, through the mapper that the node runs."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from tqdm import tqdm

from nmp.bags.nuscenes_to_bag import Shot, load_nuscenes, scene_shots
from nmp.changelog import local_date
from nmp.errors import NmpError
from nmp.evaluation import CityMaps, nan_as_null, write_json
from nmp.frame import ANCHOR_CAMERA, CAMERAS, Camera, CameraShot, Frame
from nmp.geometry import transform_from, yaw_of
from nmp.metrics import Breakdown, format_table
from nmp.truth import rasterize

if TYPE_CHECKING:
    from nuscenes.nuscenes import NuScenes

HELP = """\
Map the scenes of a nuScenes data set, real or simulated, with the mapper that the node runs, and score every keyframe
at the true pose against the map of its day. Where the data set has ego_pose_estimate.json, the mapper is told these
poses. Beside the scores of all frames the table has them by weather, by distance from the car, and by how many of the
scenes that wrote the prior came within 10 m of the frame. The number of frames is in brackets. Protocols:

{protocols}

  nmp-train eval --dataroot data/bench --protocol earlier_trips
  nmp-train eval my.safetensors --dataroot data/bench --split val --protocol train_trips --json scores.json"""

PROTOCOLS = {
    "no_prior": "every frame on its own",
    "empty": "every scene begins with an empty prior and carries it along",
    "earlier_trips": "scenes in the order in which they were driven, one prior for all of them",
    "train_trips": "every scene begins with a copy of the prior that the scenes of --train-split left",
}
SPREAD_S = 0.2
"""images of one sample lie within this time; the next sample is half a second away"""
SAME_PLACE_M = 10.0
"""an earlier drive passed here if it came this close"""
MANY_TRIPS = 5
"""places that were driven as often or more often are counted together"""


@dataclass(frozen=True)
class SceneFrames:
    """The keyframes of one scene, with what the car believed and where it really was."""

    name: str
    location: str
    weather: str
    """as :func:`weather_of`"""
    frames: list[Frame]
    true_poses: list[NDArray[np.float64]]
    """[4, 4] map_from_base of each frame; differs from the frame's own where the localisation is simulated"""


def scene_frames(nusc: NuScenes, name: str) -> SceneFrames:
    """Read the keyframes of a scene; samples that lack a camera are left out.

    Raises :class:`NmpError` on an unknown scene, a missing image file or a missing pose estimate.
    """
    location, shots = scene_shots(nusc, name)
    frames = list(_frames(shots, location))
    truth = {s.stamp_ns: _transform(s.true_pose or s.pose) for s in shots if s.camera == ANCHOR_CAMERA}
    description = next(s["description"] for s in nusc.scene if s["name"] == name)
    return SceneFrames(name, location, weather_of(description), frames, [truth[f.stamp_ns] for f in frames])


def weather_of(description: str) -> str:
    """Return day, rain, night or night rain for the description of a scene in the words of nuScenes."""
    # Only at the beginning of a word: some scenes pass trains.
    night, rain = (re.search(rf"\b{word}", description, re.IGNORECASE) for word in ("night", "rain"))
    return " ".join(word for word, found in (("night", night), ("rain", rain)) if found) or "day"


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


class _History:
    """Where the scenes drove that wrote the prior."""

    def __init__(self) -> None:
        self._trips: list[tuple[str, cKDTree]] = []

    def add(self, scene: SceneFrames) -> None:
        if scene.true_poses:
            self._trips.append((scene.location, cKDTree([p[:2, 3] for p in scene.true_poses])))

    def label(self, location: str, pose: NDArray[np.float64]) -> str:
        """Return what a frame at a true pose [4, 4] is filed under: how many of the scenes came near."""
        near = [place == location and tree.query(pose[:2, 3])[0] < SAME_PLACE_M for place, tree in self._trips]
        return f"trips before: {sum(near)}" if sum(near) < MANY_TRIPS else f"trips before: {MANY_TRIPS}+"


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

    The mapper works at the poses that the car believed in. The truth is drawn at the true poses, from the map that was
    in force on the day of the frame. The scores are filed by weather, by distance from the car and, where scenes share
    a prior (``earlier_trips`` and ``train_trips``), by how many of the scenes that wrote it came within 10 m.

    :param weights: .safetensors file, None for the weights that come with nmp
    :param train_scenes: for ``train_trips``: they write the prior, and are not scored

    Raises :class:`NmpError` for an unknown protocol, version or scene, and for a map or image that is missing.
    """
    # The network is slow to import, so only where it is needed.
    from nmp.mapper import OnlineMapper

    if protocol not in PROTOCOLS:
        raise NmpError(f"there is no protocol {protocol!r}: choose from {', '.join(PROTOCOLS)}")
    nusc = load_nuscenes(dataroot, version)
    order = sorted(nusc.scene, key=lambda s: nusc.get("sample", s["first_sample_token"])["timestamp"])
    everything = [s["name"] for s in order]
    if unknown := sorted({*(scenes or ()), *train_scenes} - set(everything)):
        more = f" (one of {len(unknown)})" if len(unknown) > 1 else ""
        raise NmpError(f"{dataroot} {version} has no {unknown[0]}{more}: choose a split of this data set")
    chosen = [n for n in everything if scenes is None or n in scenes]
    if not chosen:
        raise NmpError(f"no scenes to score in {dataroot} {version}: choose a split that has some")
    train = [n for n in everything if n in train_scenes] if protocol == "train_trips" else []
    if protocol == "train_trips" and not train:
        raise NmpError("no scenes write the prior of train_trips: choose a --train-split that has some")
    if both := sorted({*chosen} & {*train}):
        raise NmpError(
            f"{both[0]} would be scored on a prior that it wrote itself: choose --split and --train-split apart"
        )
    maps = CityMaps(dataroot)
    for location in {nusc.get("log", s["log_token"])["location"] for s in order if s["name"] in chosen}:
        maps.city(location)  # a map that is missing should be told of before hours of mapping
    history = _History()
    with (
        tempfile.TemporaryDirectory(prefix="nmp-eval-") as folder,
        tqdm(total=len(train) + len(chosen), unit="scene", disable=not progress) as bar,
    ):
        shared, own = Path(folder, "shared"), Path(folder, "own")
        if train:
            with OnlineMapper(weights, shared) as mapper:
                for name in train:
                    scene = scene_frames(nusc, name)
                    for frame in scene.frames:
                        mapper.update(frame)
                    history.add(scene)
                    bar.update()
        breakdown: Breakdown | None = None
        for name in chosen:
            scene = scene_frames(nusc, name)
            if protocol == "train_trips":
                shutil.copytree(shared, own)
            prior = shared if protocol == "earlier_trips" else own
            with OnlineMapper(weights, prior, use_prior=protocol != "no_prior") as mapper:
                breakdown = breakdown or Breakdown(mapper.grid)
                for frame, pose in zip(scene.frames, scene.true_poses, strict=True):
                    city = maps.city(scene.location, local_date(scene.location, frame.stamp_ns))
                    truth = rasterize(city, float(pose[0, 3]), float(pose[1, 3]), yaw_of(pose), mapper.grid)
                    labels = [scene.weather]
                    if protocol in ("earlier_trips", "train_trips"):
                        labels.append(history.label(scene.location, pose))
                    breakdown.add(mapper.update(frame).masks, truth, labels)
            shutil.rmtree(own, ignore_errors=True)
            if protocol == "earlier_trips":
                history.add(scene)
            bar.update()
    assert breakdown is not None
    return breakdown


def split_scenes(split: str, dataroot: Path, version: str) -> list[str]:
    """Return the scenes of a split: a name in ``<version>/splits.json`` where there is one, else in the devkit.

    Raises :class:`NmpError` for a split that is in neither, and for a version that the data set has not.
    """
    path = dataroot / version / "splits.json"
    if not path.parent.is_dir():
        raise NmpError(f"{dataroot} has no tables '{version}': check --dataroot and --version")
    if path.is_file():
        try:
            known = {str(name): [str(scene) for scene in names] for name, names in json.loads(path.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise NmpError(f"{path} holds no lists of scenes by split ({error}): write them again") from error
        where = str(path)
    else:
        from nuscenes.utils.splits import create_splits_scenes

        known, where = create_splits_scenes(), "nuScenes"
    if split not in known:
        raise NmpError(f"there is no split {split!r} in {where}: choose from {', '.join(sorted(known))}")
    return known[split]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``nmp-train eval``."""
    parser.description = HELP.format(protocols="\n".join(f"  {name:15}{text}" for name, text in PROTOCOLS.items()))
    parser.add_argument("weights", type=Path, nargs="?", help=".safetensors file (default: the shipped network)")
    parser.add_argument("--dataroot", type=Path, required=True, help="nuScenes folder, real or simulated")
    parser.add_argument("--version", default="v1.0-mini", help="its tables (default: %(default)s)")
    parser.add_argument("--protocol", choices=tuple(PROTOCOLS), default="no_prior", help="default: %(default)s")
    parser.add_argument(
        "--split",
        help="score the scenes of this split, of <version>/splits.json or of the official devkit (default: all scenes)",
    )
    parser.add_argument("--train-split", default="train", help="for train_trips (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores there")


def run(args: argparse.Namespace) -> None:
    """Carry out ``nmp-train eval``."""
    if args.protocol == "train_trips" and args.split is None:
        raise NmpError("train_trips scores other scenes than those of --train-split: name them with --split")
    scenes = None if args.split is None else split_scenes(args.split, args.dataroot, args.version)
    train = split_scenes(args.train_split, args.dataroot, args.version) if args.protocol == "train_trips" else []
    result = evaluate_dataset(
        args.weights, args.dataroot, args.version, args.protocol, scenes=scenes, train_scenes=train
    )
    scores = result.percent()
    frames = {name: result.meters[name].frames for name in scores}
    print(format_table({f"{name} ({frames[name]})": row for name, row in scores.items()}))
    if args.json:
        rows = {name: {**nan_as_null(row), "frames": frames[name]} for name, row in scores.items()}
        write_json(args.json, {"protocol": args.protocol, "split": args.split, **rows.pop("all"), "breakdown": rows})
