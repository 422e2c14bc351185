"""Score weights on a nuScenes data set, real or simulated, through the mapper that the node runs."""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from shapely.geometry.base import BaseGeometry
from tqdm import tqdm

from nmp.changelog import Change, in_force, local_date, read_changes
from nmp.errors import NmpError
from nmp.evaluation import CityMaps, nan_as_null, write_json
from nmp.frame import ANCHOR_CAMERA, CAMERAS, CameraShot, Frame, LocalMap
from nmp.geometry import Array, BevGrid, inverse, transform_from, yaw_of
from nmp.metrics import Breakdown, format_table, format_vectors
from nmp.truth import rasterize, truth_lines
from nmp.vectorize import vectorize
from nmp_train.recordings import Sample, read_samples, weather_rows
from nmp_train.sim.localisation import LocalisationNoise

if TYPE_CHECKING:
    from nmp.mapper import OnlineMapper

log = logging.getLogger(__name__)

Estimate = tuple[Array, float, float]
"""map_from_base [4, 4] that the car believed in, and its standard deviations: position (m), heading (rad)"""

HELP = """\
Map the scenes of a nuScenes data set, real or simulated, with the mapper that the node runs, and score every keyframe
at the true pose against the map of its day. Where the data set has ego_pose_estimate.json, the mapper is told these
poses. Beside the scores of all frames the table has them by weather, by distance from the car, and by how many of the
scenes that wrote the prior came within 10 m of the frame. The number of frames is in brackets. docs/evaluation.md
defines the scores. Protocols:

{protocols}

  nmp-train eval --dataroot data/bench --protocol earlier_trips
  nmp-train eval my.safetensors --dataroot data/bench --split val --protocol train_trips --json scores.json
  nmp-train eval my.safetensors --dataroot data/bench --workers 4 --device cpu
  torchrun --nproc-per-node 8 -m nmp_train.cli eval my.safetensors --dataroot data/bench"""

PROTOCOLS = {
    "no_prior": "every frame on its own",
    "empty": "every scene begins with an empty prior and carries it along",
    "earlier_trips": "scenes in the order in which they were driven, one prior for all of them",
    "train_trips": "every scene begins with a copy of the prior that the scenes of --train-split left",
}
SAME_PLACE_M = 10.0
"""an earlier drive passed here if it came this close"""
MANY_TRIPS = 5
"""places that were driven as often or more often are counted together"""
APART_M = 13.0
"""scenes whose regions stay this far apart share nothing of a prior: poses have errors, too"""
CHANGED_M = 5.0
"""cells this close to a line or an area that changed are a changed place"""
SAME_M = 0.1
"""a line that moved by less is as it was"""
SHARED = ("earlier_trips", "train_trips")
"""protocols in which one scene sees what another one left"""


@dataclass(frozen=True)
class SceneFrames:
    """The keyframes of one scene, with what the car believed and where it really was."""

    name: str
    location: str
    weather: str
    """day, rain, night or night rain"""
    frames: list[Frame]
    true_poses: list[NDArray[np.float64]]
    """[4, 4] map_from_base of each frame; differs from the frame's own where the localisation is simulated"""


@dataclass(frozen=True)
class Scene:
    """A scene as the tables have it; images are read when its turn comes."""

    name: str
    samples: tuple[Sample, ...]
    """keyframes in the order of time, at least one"""
    estimates: Mapping[Path, Estimate] | None = None
    """what the car believed when each image was taken; None where that is the truth"""

    @property
    def location(self) -> str:
        return self.samples[0].location

    @property
    def start_ns(self) -> int:
        return self.samples[0].anchor.stamp_ns


def read_scenes(dataroot: Path, version: str, names: Sequence[str] | None = None) -> list[Scene]:
    """Read the keyframes of scenes (all by default), in the order in which they were driven.

    Keyframes that lack a camera are left out, and scenes that have no other. Raises :class:`NmpError` for a version,
    a scene or a table that is missing or damaged, and for missing pose estimates.
    """
    samples: dict[str, list[Sample]] = {}
    for sample in read_samples(dataroot, version, names):
        samples.setdefault(sample.scene, []).append(sample)
    estimates, rows = None, _pose_estimates(Path(dataroot) / version)
    if rows is not None:
        needed = [shot for found in samples.values() for sample in found for shot in sample.shots]
        if unknown := [shot for shot in needed if shot.pose_token not in rows]:
            raise NmpError(
                f"{Path(dataroot) / version / 'ego_pose_estimate.json'} has no estimate for {unknown[0].path.name} "
                f"(one of {len(unknown)}): make the data set again"
            )
        estimates = {shot.path: _estimate(rows[shot.pose_token]) for shot in needed}
    scenes = [Scene(name, tuple(found), estimates) for name, found in samples.items()]
    return sorted(scenes, key=lambda s: (s.start_ns, s.name))


def _pose_estimates(tables: Path) -> dict[str, dict[str, Any]] | None:
    """Return what the car believed by token of the ego pose, or None where the data set does not tell."""
    if not (tables / "ego_pose_estimate.json").is_file():
        return None
    # Only here, as the library for bags is not needed on machines that only train.
    from nmp.bags.nuscenes_to_bag import read_pose_estimates

    return read_pose_estimates(tables)


def _estimate(row: Mapping[str, Any]) -> Estimate:
    w, x, y, z = row["rotation"]
    deviation = np.sqrt(np.clip(row["covariance"], 0.0, None))
    pose = transform_from(np.array(row["translation"]), np.array([x, y, z, w]))
    return pose, float(max(deviation[0], deviation[7])), float(deviation[35])


def scene_frames(scene: Scene) -> SceneFrames:
    """Read the images of a scene; :class:`NmpError` names the first that is missing."""
    frames = []
    for sample in scene.samples:
        shots, stated = [], []
        for shot in sample.shots:
            try:
                image = shot.path.read_bytes()
            except OSError as error:
                raise NmpError(
                    f"sample {sample.token} of {scene.name}: cannot read {shot.path} ({error.strerror}): unpack the "
                    "camera files of this scene"
                ) from error
            stated.append(scene.estimates[shot.path] if scene.estimates else (shot.map_from_base, 0.0, 0.0))
            shots.append(CameraShot(shot.camera, shot.stamp_ns, image, stated[-1][0]))
        pose, position_std, yaw_std = stated[CAMERAS.index(ANCHOR_CAMERA)]
        frames.append(Frame(sample.anchor.stamp_ns, sample.location, pose, tuple(shots), position_std, yaw_std))
    true_poses = [s.anchor.map_from_base for s in scene.samples]
    return SceneFrames(scene.name, scene.location, scene.samples[0].weather, frames, true_poses)


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


def with_noise(scene: SceneFrames, noise: LocalisationNoise) -> SceneFrames:
    """Return a scene as a car with worse localisation would have believed it; the true poses stay.

    The error is that of :class:`LocalisationNoise`: it depends on the name of the scene and on the times of its frames
    only. All images of a frame are moved alike.
    """
    if not scene.frames:
        return scene
    stamps = np.array([f.stamp_ns for f in scene.frames])
    poses, covariance = noise.apply(
        (stamps - stamps[0]) / 1e9, np.stack([f.map_from_base for f in scene.frames]), zlib.crc32(scene.name.encode())
    )
    position_std, yaw_std = np.sqrt(covariance[0, 0]), np.sqrt(covariance[5, 5])
    frames = [
        at_pose(frame, pose, float(np.hypot(frame.position_std, position_std)), float(np.hypot(frame.yaw_std, yaw_std)))
        for frame, pose in zip(scene.frames, poses, strict=True)
    ]
    return replace(scene, frames=frames)


def at_pose(frame: Frame, pose: NDArray[np.float64], position_std: float, yaw_std: float) -> Frame:
    """Return a frame as from a car that believes another pose [4, 4], known so well. All its images are moved alike."""
    moved = pose @ inverse(frame.map_from_base)
    shots = tuple(replace(s, map_from_base=moved @ s.map_from_base) for s in frame.shots)
    return replace(frame, map_from_base=pose, shots=shots, position_std=position_std, yaw_std=yaw_std)


class _Changes:
    """Where a data set's cities have changed."""

    def __init__(self, dataroot: Path, locations: set[str]) -> None:
        self._changes = {place: read_changes(dataroot, place) for place in locations}
        if not any(self._changes.values()):
            raise NmpError(f"{dataroot} has no change log in maps/changes: leave out --changed")
        self._areas: dict[tuple[str, int], BaseGeometry] = {}

    def places(
        self, location: str, date: str, pose: NDArray[np.float64], grid: BevGrid
    ) -> dict[str, NDArray[np.bool_]]:
        """Return the cells [rows, cols] around a true pose [4, 4] that had ``changed`` by a day, and the others."""
        due = in_force(self._changes[location], date)
        if (location, len(due)) not in self._areas:
            self._areas[location, len(due)] = shapely.union_all([_changed_area(change) for change in due])
        x, y, yaw = float(pose[0, 3]), float(pose[1, 3]), yaw_of(pose)
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [grid.length / 2, grid.width / 2]
        turn = np.array([[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]])
        near = self._areas[location, len(due)].intersection(shapely.polygons(corners @ turn + [x, y]))
        if near.is_empty:
            return {"unchanged": np.ones(grid.shape, bool)}
        shapely.prepare(near)
        cells = grid.centres() @ turn + [x, y]
        changed = shapely.contains_xy(near, cells[..., 0], cells[..., 1])
        return {"changed": changed, "unchanged": ~changed}


def _changed_area(change: Change) -> BaseGeometry:
    """Return what is within ``CHANGED_M`` of a change (map frame, m).

    A record that moves in one place is removed and added as a whole: only where old and new differ counts.
    """
    areas = []
    for layer in change.layers:
        old, new = (
            shapely.union_all([s.geometry for s in shapes if s.layer == layer])
            for shapes in (change.removed, change.added)
        )
        areas += [a.difference(b.buffer(SAME_M)).buffer(CHANGED_M) for a, b in ((old, new), (new, old))]
    return shapely.union_all(areas)


@dataclass(frozen=True)
class Job:
    """What is scored, and how."""

    weights: Path | None
    """.safetensors file, None for the weights that come with nmp"""
    dataroot: Path
    protocol: str
    scenes: tuple[Scene, ...]
    """to score, in the order in which they were driven"""
    train: tuple[Scene, ...] = ()
    """to write the prior of ``train_trips``, in the order in which they were driven"""
    device: str | None = None
    """None for a GPU where there is one"""
    noise: LocalisationNoise | None = None
    vectors: bool = True
    changed: bool = False


def evaluate_dataset(
    weights: Path | None,
    dataroot: Path,
    version: str,
    protocol: str,
    *,
    scenes: Sequence[str] | None = None,
    train_scenes: Sequence[str] = (),
    device: str | None = None,
    noise: LocalisationNoise | None = None,
    vectors: bool = True,
    changed: bool = False,
    workers: int = 1,
    progress: bool = True,
) -> Breakdown:
    """Map the scenes (all by default) under a protocol of ``PROTOCOLS`` and score every keyframe.

    The mapper works at the poses that the car believed in. The truth is drawn at the true poses, from the map that was
    in force on the day of the frame. The scores are filed by weather, by distance from the car and, where scenes share
    a prior (``earlier_trips`` and ``train_trips``), by how many of the scenes that wrote it came within 10 m.

    :param weights: .safetensors file, None for the weights that come with nmp
    :param train_scenes: for ``train_trips``: they write the prior, and are not scored
    :param device: of the mapper, None for a GPU where there is one; where there are several, each process has its own
    :param noise: an error of the poses that the mapper is told, on top of that of the data set
    :param vectors: score map elements, too
    :param changed: score the places that have changed since the map was drawn apart from the others
    :param workers: processes. Scenes that meet stay together, so the scores are those of one process. Under torchrun
        its processes share the work instead, and each returns the scores of all.

    Raises :class:`NmpError` for an unknown protocol, version or scene, and for a map or image that is missing.
    """
    if protocol not in PROTOCOLS:
        raise NmpError(f"there is no protocol {protocol!r}: choose from {', '.join(PROTOCOLS)}")
    if workers < 1:
        raise NmpError(f"--workers {workers} is out of range: choose 1 or more")
    if scenes is not None and not scenes:
        raise NmpError(f"no scenes to score in {dataroot} {version}: choose a split that has some")
    train_names = {*train_scenes} if protocol == "train_trips" else set()
    if protocol == "train_trips" and not train_names:
        raise NmpError("no scenes write the prior of train_trips: choose a --train-split that has some")
    if both := sorted({*(scenes or ())} & train_names):
        raise NmpError(
            f"{both[0]} would be scored on a prior that it wrote itself: choose --split and --train-split apart"
        )
    everything = read_scenes(dataroot, version, None if scenes is None else sorted({*scenes} | train_names))
    job = Job(
        weights,
        Path(dataroot),
        protocol,
        scenes=tuple(s for s in everything if s.name not in train_names),
        train=tuple(s for s in everything if s.name in train_names),
        device=device,
        noise=noise,
        vectors=vectors,
        changed=changed,
    )
    # What is missing should be told of before hours of mapping.
    maps, locations = CityMaps(job.dataroot), {s.location for s in job.scenes}
    for location in sorted(locations):
        maps.city(location)
    if changed:
        _Changes(job.dataroot, locations)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _on_torchrun(job, progress)
    if workers > 1:
        return _on_processes(shards(job, workers), progress)
    with tqdm(total=len(job.train) + len(job.scenes), unit="scene", disable=not progress) as bar:
        return score(job, bar.update)


def score(job: Job, scene_done: Callable[[], Any] = lambda: None) -> Breakdown:
    """Map and score the scenes of a job, one after the other and with one mapper.

    :param scene_done: called after every scene
    """
    # The network is slow to import, so only where it is needed.
    from nmp.mapper import OnlineMapper

    maps = CityMaps(job.dataroot)
    changes = _Changes(job.dataroot, {s.location for s in job.scenes}) if job.changed else None
    history = _History()
    device = job.device or "auto"
    with tempfile.TemporaryDirectory(prefix="nmp-eval-") as folder:
        shared = Path(folder, "shared")
        with OnlineMapper(job.weights, shared, use_prior=job.protocol != "no_prior", device=device) as mapper:
            breakdown = Breakdown(mapper.grid)
            for written in job.train:
                scene = _believed(written, job)
                for frame in scene.frames:
                    _map(mapper, scene, frame)
                mapper.close()  # a drive of its own
                history.add(scene)
                scene_done()
            for number, scored in enumerate(job.scenes):
                scene = _believed(scored, job)
                own = Path(folder, f"own-{number}")
                if job.protocol in ("empty", "train_trips"):
                    mapper.close()  # so that all of what it wrote is there to copy
                    if shared.is_dir():
                        shutil.copytree(shared, own)
                    mapper.use(own)
                for frame, pose in zip(scene.frames, scene.true_poses, strict=True):
                    day = local_date(scene.location, frame.stamp_ns)
                    city, place = maps.city(scene.location, day), (float(pose[0, 3]), float(pose[1, 3]), yaw_of(pose))
                    labels = weather_rows(scene.weather)
                    if job.protocol in SHARED:
                        labels.append(history.label(scene.location, pose))
                    found = _map(mapper, scene, frame)
                    breakdown.add(
                        found.masks,
                        rasterize(city, *place, mapper.grid),
                        labels,
                        places=changes.places(scene.location, day, pose, mapper.grid) if changes else None,
                        elements=vectorize(found.probabilities, mapper.grid) if job.vectors else None,
                        true_lines=truth_lines(city, *place, mapper.grid) if job.vectors else None,
                    )
                mapper.close()
                if job.protocol == "earlier_trips":
                    history.add(scene)
                else:
                    shutil.rmtree(own, ignore_errors=True)
                scene_done()
    return breakdown


def _believed(scene: Scene, job: Job) -> SceneFrames:
    frames = scene_frames(scene)
    return frames if job.noise is None else with_noise(frames, job.noise)


def _map(mapper: OnlineMapper, scene: SceneFrames, frame: Frame) -> LocalMap:
    try:
        return mapper.update(frame)
    except NmpError as error:
        raise NmpError(f"{scene.name}, frame of {frame.stamp_ns} ns: {error}") from error


# ------------------------------------------------------------------------------------------- several processes


def shards(job: Job, count: int) -> list[Job]:
    """Part a job into at most ``count`` that give, merged, exactly the scores of the whole.

    Where scenes share a prior, all scenes whose regions come within ``APART_M`` of each other, directly or over others,
    stay together. What stays together is dealt out from the largest on, always to the job that has the fewest frames.
    """
    from nmp_train.data.sampler import Places, dealt

    everything = (*job.train, *job.scenes)
    lengths = np.array([len(s.samples) for s in everything])
    group = np.arange(len(everything))
    if job.protocol in SHARED:
        samples = [sample for scene in everything for sample in scene.samples]
        where = Places(
            place=np.unique([s.location for s in samples], return_inverse=True)[1],
            xy=np.array([s.anchor.translation[:2] for s in samples]),
            scene=np.repeat(group, lengths),
            time_s=np.zeros(len(samples)),
        )
        group = where.streets(2 * _grid_of(job.weights).reach + APART_M)
    size = np.bincount(group, weights=lengths).astype(int)
    if size.max() * count > 1.5 * size.sum():
        log.info("%d of %d frames lie in one connected part of a city and stay in one process", size.max(), size.sum())
    of = dealt(size, count)[group]
    parts = [
        replace(
            job,
            train=tuple(s for s, k in zip(job.train, of, strict=False) if k == part),
            scenes=tuple(s for s, k in zip(job.scenes, of[len(job.train) :], strict=True) if k == part),
            device=_device(job.device, part),
        )
        for part in range(count)
    ]
    return [part for part in parts if part.scenes]


def _grid_of(weights: Path | None) -> BevGrid:
    from nmp.model import NetworkConfig
    from nmp.model.weights import read_description

    return NetworkConfig.from_dict(read_description(weights)["network"]).layer_grid


def _device(device: str | None, process: int) -> str | None:
    """Return the device of one of several processes on a machine: GPUs are dealt out to them."""
    import torch

    if device not in (None, "auto", "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{process % torch.cuda.device_count()}"


def _on_torchrun(job: Job, progress: bool) -> Breakdown:
    import torch.distributed as dist

    from nmp_train.distributed import PATIENCE

    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", timeout=PATIENCE)  # shards need not be of one size
    try:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        parts = shards(job, ranks)
        mine = None
        if rank < len(parts):
            part = replace(parts[rank], device=_device(job.device, int(os.environ.get("LOCAL_RANK", rank))))
            total = len(part.train) + len(part.scenes)
            with tqdm(total=total, unit="scene", disable=not progress or rank > 0) as bar:
                mine = score(part, bar.update)
        gathered: list[Breakdown | None] = [None] * ranks
        dist.all_gather_object(gathered, mine)
    finally:
        if started:
            dist.destroy_process_group()
    return merged([b for b in gathered if b is not None])


def merged(parts: Sequence[Breakdown]) -> Breakdown:
    """Return the scores of all parts together, at least one."""
    whole = parts[0]
    for part in parts[1:]:
        whole.merge(part)
    return whole


def _on_processes(parts: Sequence[Job], progress: bool) -> Breakdown:
    context = multiprocessing.get_context("spawn")  # a forked process could not use a GPU
    counter, stop = context.Value("q", 0), context.Value("b", 0)
    total = sum(len(p.train) + len(p.scenes) for p in parts)
    threads = max(1, (os.cpu_count() or 1) // len(parts))
    with (
        tqdm(total=total, unit="scene", disable=not progress) as bar,
        ProcessPoolExecutor(len(parts), context, _start_worker, (counter, stop, threads)) as pool,
    ):
        futures = [pool.submit(_work, part) for part in parts]
        try:
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=0.5)
                bar.update(counter.value - bar.n)
                for future in done:
                    future.result()  # raises what went wrong, before the others are done
        finally:
            stop.value = 1
    return merged([future.result() for future in futures])


_worker: dict[str, Any] = {}
"""what a worker process shares with its parent"""


class _Stopped(Exception):
    """Another process failed, so nobody waits for this one."""


def _start_worker(counter: Any, stop: Any, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    _worker.update(counter=counter, stop=stop)


def _work(part: Job) -> Breakdown:
    def scene_done() -> None:
        with _worker["counter"].get_lock():
            _worker["counter"].value += 1
        if _worker["stop"].value:
            raise _Stopped

    return score(part, scene_done)


def split_scenes(split: str, dataroot: Path, version: str, splits: Path | None = None) -> list[str]:
    """Return the scenes of a split: a name in ``<version>/splits.json`` where there is one, else in the devkit.

    :param splits: file to take them from instead

    Raises :class:`NmpError` for a split that is not there, for a version that the data set has not, and for a file that
    cannot be read.
    """
    tables = dataroot / version
    if not tables.is_dir():
        raise NmpError(f"{dataroot} has no tables '{version}': check --dataroot and --version")
    path = splits or tables / "splits.json"
    if splits or path.is_file():
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


def add_weights_and_data(parser: argparse.ArgumentParser, description: str) -> None:
    """Declare the arguments of a command that finds something out about weights on a data set."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = description
    parser.add_argument("weights", type=Path, help=".safetensors file, or the name of shipped ones")
    parser.add_argument("--dataroot", type=Path, required=True, help="nuScenes folder, simulated or real")
    parser.add_argument("--version", default="v1.0-mini", help="of the data set (default: %(default)s)")


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
    parser.add_argument(
        "--splits", type=Path, metavar="FILE", help="take the splits from there, as 'nmp-train splits' writes it"
    )
    parser.add_argument("--train-split", default="train", help="for train_trips (default: %(default)s)")
    parser.add_argument(
        "--vectors",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="score map elements, too: Chamfer distance and average precision",
    )
    parser.add_argument(
        "--changed",
        action="store_true",
        help=f"score places within {CHANGED_M:g} m of what changed (maps/changes) apart from the others",
    )
    parser.add_argument(
        "--pose-noise", type=float, default=0.0, metavar="M", help="standard deviation of an added error of x and y, m"
    )
    parser.add_argument(
        "--yaw-noise", type=float, default=0.0, metavar="RAD", help="standard deviation of an added error of yaw, rad"
    )
    parser.add_argument("--device", help="cuda, cuda:1 or cpu (default: a GPU for each process, where there are)")
    parser.add_argument("--workers", type=int, default=1, help="processes; the scores are the same (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores there")


def run(args: argparse.Namespace) -> None:
    """Carry out ``nmp-train eval``."""
    if args.protocol == "train_trips" and args.split is None:
        raise NmpError("train_trips scores other scenes than those of --train-split: name them with --split")

    def scenes_of(split: str) -> list[str]:
        return split_scenes(split, args.dataroot, args.version, args.splits)

    if args.splits is not None and args.split is None:
        raise NmpError(f"--splits {args.splits} holds several splits: choose one of them with --split")
    scenes = None if args.split is None else scenes_of(args.split)
    train = scenes_of(args.train_split) if args.protocol == "train_trips" else []
    noisy = args.pose_noise != 0 or args.yaw_noise != 0
    result = evaluate_dataset(
        args.weights,
        args.dataroot,
        args.version,
        args.protocol,
        scenes=scenes,
        train_scenes=train,
        device=args.device,
        noise=LocalisationNoise(args.pose_noise, args.yaw_noise) if noisy else None,
        vectors=args.vectors,
        changed=args.changed,
        workers=args.workers,
    )
    if os.environ.get("RANK", "0") != "0":
        return
    scores = result.scores()
    title = {name: f"{name} ({row['frames']})" for name, row in scores.items()}
    print(format_table({title[name]: row for name, row in scores.items()}))
    if args.vectors:
        print()
        print(format_vectors({title[name]: row for name, row in scores.items()}))
    if args.json:
        how = {key: getattr(args, key) for key in ("protocol", "split", "pose_noise", "yaw_noise")}
        write_json(args.json, nan_as_null({**how, **scores.pop("all"), "breakdown": scores}))
