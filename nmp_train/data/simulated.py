"""Training batches of simulated worlds, rendered on the training device."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from nmp.citymap import CityMap
from nmp.errors import NmpError
from nmp.frame import CAMERAS, Camera
from nmp.geometry import transform_from_xyyaw
from nmp.model.preprocess import network_intrinsics, unit_projection
from nmp_train.data.batch import Batch, GroupLoader, use_one_thread
from nmp_train.data.group import Drawn, Group
from nmp_train.data.sampler import Places, Targets
from nmp_train.data.truth import draw_truth
from nmp_train.geography import find_sites, make_real_world
from nmp_train.sim.boxes import Boxes, nearest
from nmp_train.sim.drive import load_trajectories
from nmp_train.sim.render import MAX_SOLIDS, Ground, Solids, render, solids_from_boxes
from nmp_train.sim.rig import log_rig
from nmp_train.sim.weather import MIX, Weather
from nmp_train.world import World, make_world

if TYPE_CHECKING:
    from nmp_train.config import StageConfig, TrainConfig, WorldsConfig

_Maker = Callable[..., World]

SOLIDS_RADIUS_M = 120.0
DRAWN_AHEAD = 6
"""batches that each worker has ready: they are small, as the images are rendered later"""
TILT_RAD = 0.01
"""standard deviation of pitch and roll of the car, which its pose tells"""
UNTOLD_TILT_RAD = 0.005
"""the same against the road under it, which no pose tells: slopes, bumps, the play of the mounting"""
NEAR_CHANGE_M = 20.0
"""a frame shows a change that is no further from the car"""


def make_worlds(
    config: WorldsConfig, workers: int, *, held_out: bool = False, trips: int = 1, reach_m: float = 0.0
) -> list[World]:
    """Make the worlds of a configuration, in parallel: generated cities, and parts of real ones.

    The share ``config.changed_share`` of the generated ones changes on one day between its drives.

    :param held_out: for validation: each world at each of ``config.difficulties``, instead of one of them in turn, and
        of the real cities the parts that training leaves out
    :param trips: times that each drive can be made (see :func:`nmp_train.world.assemble`)
    :param reach_m: how far labels reach from the car, m: so far apart are training and validation in real cities
    """
    count, levels, share = config.seeds, config.difficulties, config.changed_share
    # As evenly among the cities as whole cities allow.
    changes = [config.changes * (int((i + 1) * share + 1e-9) - int(i * share + 1e-9)) for i in range(count)]
    make = functools.partial(
        make_world, size_m=config.size_m, drives=config.drives, duration_s=config.duration_s, trips=trips
    )
    makers: list[_Maker] = [functools.partial(make, config.first_seed + i, changes=changes[i]) for i in range(count)]
    if config.real is not None:
        training, left_out = find_sites(load_trajectories(config.real.trajectories), reach_m=reach_m)
        sites = (left_out if held_out else training)[: config.real.count]
        makers += [functools.partial(make_real_world, Path(config.real.maps), site, trips=trips) for site in sites]
    if not makers:
        raise NmpError("there are no cities to make: set seeds, or real.count, of the worlds to 1 or more")
    if held_out:
        jobs = [(maker, level) for level in levels for maker in makers]
    else:
        jobs = [(maker, levels[i % len(levels)]) for i, maker in enumerate(makers)]
    if not workers:
        return [_make(*job) for job in tqdm(jobs, desc="cities", unit="city")]
    # Spawned, not forked: torch's threads do not survive a fork.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=spawn, initializer=use_one_thread) as pool:
        return list(tqdm(pool.map(_make, *zip(*jobs, strict=True)), desc="cities", unit="city", total=len(jobs)))


def _make(maker: _Maker, difficulty: float) -> World:
    return maker(difficulty=difficulty)


class SimulatedSource:
    """Draws groups of the worlds' frames in the workers, and renders them on the training device."""

    def __init__(
        self, worlds: Sequence[World], config: TrainConfig, device: torch.device, *, ground: Ground | None = None
    ) -> None:
        """:param ground: of ``worlds`` and maybe others behind them, where it is on the device already"""
        self.worlds, self.config, self.device = list(worlds), config, device
        states = [s for w in worlds for s in w.states]
        self.ground = ground or Ground.of([s.surface for s in states], device)
        self.first = 0
        """number of the first ground of ``worlds`` in ``ground``"""
        self.turn_rad = config.augment.turn_rad

    def part(self, start: int, stop: int | None = None, *, augmented: bool = True) -> SimulatedSource:
        """Return the source of ``worlds[start:stop]`` alone. It shares the ground, so that nothing is compiled anew.

        :param augmented: False for validation: ego frames are not turned
        """
        out = SimulatedSource(self.worlds[start:stop], self.config, self.device, ground=self.ground)
        out.first = self.first + sum(len(w.states) for w in self.worlds[:start])
        out.turn_rad = self.turn_rad if augmented else 0.0
        return out

    def loader(
        self, stage: StageConfig, *, seed: int, length: int, rank: int = 0, ranks: int = 1, start: int = 0
    ) -> GroupLoader:
        """See :meth:`nmp_train.data.batch.Source.loader`."""
        groups = SimulatedGroups(
            self.worlds, self.config, stage, seed=seed, length=length, first=self.first, turn_rad=self.turn_rad
        )
        return GroupLoader(
            groups, stage, self.config.workers, length=length, rank=rank, ranks=ranks, start=start, ahead=DRAWN_AHEAD
        )

    def batch(self, group: Group) -> Batch:
        """Render every frame of a collated group, each drive in a weather of its own."""
        drawn, network = group.drawn, self.config.network
        assert drawn is not None, "a group of another source"

        def flat(value: Tensor) -> Tensor:
            return value.to(self.device, non_blocking=True).flatten(0, 1)

        images = render(
            self.ground,
            flat(drawn.city),
            flat(drawn.centre),
            flat(drawn.intrinsics),
            flat(drawn.map_from_camera),
            Solids(*(flat(s) for s in drawn.solids)),
            Weather(*(flat(c) for c in drawn.conditions)),
            (network.input_width, network.input_height),
            supersample=self.config.supersample,
            # The noise of a group follows from its seed: the same in a run that is taken up again, on any rank.
            generator=[torch.Generator(self.device).manual_seed(seed) for seed in group.seed.tolist()],
            compiled=self.device.type == "cuda",
        )
        return Batch.of(group, images, self.device)


class SimulatedGroups(Dataset[Group]):
    """Groups of frames of one place of a world, in the order of time (see :class:`~nmp_train.data.sampler.Places`)."""

    def __init__(
        self,
        worlds: Sequence[World],
        config: TrainConfig,
        stage: StageConfig,
        *,
        seed: int,
        length: int,
        first: int = 0,
        turn_rad: float = 0.0,
    ) -> None:
        """:param first: number of the first ground of the first world
        :param turn_rad: the ego frame of every frame is turned by up to this angle
        """
        self.turn_rad = turn_rad
        self.worlds, self.config, self.length = worlds, config, length
        sizes = [len(w.frames) for w in worlds]
        self.world_of = np.repeat(np.arange(len(worlds)), sizes)
        self.frame_of = np.concatenate([np.arange(n) for n in sizes])
        self.ground_of = first + np.cumsum([0, *(len(w.states) for w in worlds)])
        drives = np.cumsum([0, *(len(w.drives) for w in worlds)])
        places = Places(
            place=self.world_of,
            xy=np.concatenate([w.frames[:, :2] for w in worlds]),
            scene=np.concatenate([w.frames[:, 3].astype(np.int64) + n for w, n in zip(worlds, drives, strict=False)]),
            time_s=np.concatenate([w.times_s for w in worlds]),
            changed_s=np.concatenate([_changed_s(w) for w in worlds]),
        )
        self.targets = Targets(places, stage, seed)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Group:
        rng = self.targets.generator(index)
        chosen = self.targets.group(rng, index)
        return self.make(int(self.world_of[chosen[-1]]), self.frame_of[chosen], rng)

    def make(
        self,
        number: int,
        rows: NDArray[np.int64],
        rng: np.random.Generator,
        *,
        state: int | None = None,
        weather: str | None = None,
        trip: int = 0,
    ) -> Group:
        """Make a group of frames of world ``number``: ``rows`` [T] of its ``frames``, in the order of time.

        :param state: of the city; None: the one that each drive finds
        :param weather: day, rain or night; None: drawn for each drive. All else stays the same
        :param trip: how often the drives were made before
        """
        world = self.worlds[number]
        frames = world.frames[rows]
        states = [world.state_of(int(d)) if state is None else state for d in frames[:, 3]]
        drives, drive = np.unique(frames[:, 3].astype(np.int64), return_inverse=True)
        rigs = [log_rig(str(rng.choice(["n008", "n015"])), int(rng.integers(2**31))) for _ in drives]
        words = [str(w) for w in rng.choice(list(MIX), len(drives), p=list(MIX.values()))]
        if weather is not None:
            words = [weather] * len(drives)
        seed = int(rng.integers(2**62))
        each = Weather.sample(len(drives), torch.Generator().manual_seed(seed), words)
        turn = rng.uniform(-1, 1, len(frames)) * self.turn_rad
        parts = [
            self._frame(world, world.states[s].city, rigs[d], frame, float(a), rng, trip)
            for s, frame, d, a in zip(states, frames, drive, turn, strict=True)
        ]
        slope, intrinsics, map_from_camera, pixel_from_base, truth, solids = zip(*parts, strict=True)
        layers, instance, direction = (None if t[0] is None else torch.stack(t) for t in zip(*truth, strict=True))
        assert layers is not None
        pose = np.column_stack([frames[:, :2] - frames[-1, :2], frames[:, 2] + turn])
        return Group(
            pose=torch.from_numpy(pose).float(),
            slope=torch.stack(slope),
            drive=torch.from_numpy(drive),
            seed=torch.tensor(seed),
            pixel_from_base=torch.stack(pixel_from_base),
            present=torch.ones(len(frames), len(CAMERAS)),
            truth=layers,
            names=[f"{world.name}/drive {int(f[3])}/{f[4]:.1f} s" for f in frames],
            weather=[words[d] for d in drive],
            labels=[f"difficulty {world.difficulty:g}"] * len(frames),
            instance=instance,
            direction=direction,
            drawn=Drawn(
                city=torch.tensor(states) + int(self.ground_of[number]),
                centre=torch.from_numpy(frames[:, :2].copy()),
                intrinsics=torch.stack(intrinsics),
                map_from_camera=torch.stack(map_from_camera),
                solids=tuple(torch.cat(part) for part in zip(*solids, strict=True)),
                conditions=tuple(getattr(each, f.name)[drive] for f in fields(Weather)),
            ),
        )

    def _frame(
        self,
        world: World,
        city: CityMap,
        rig: Sequence[Camera],
        frame: NDArray[np.float64],
        turn: float,
        rng: np.random.Generator,
        trip: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor | None, Tensor | None], tuple[Tensor, ...]]:
        """Make a frame whose ego frame is turned by ``turn`` (rad): the car is where it was, its axes are not."""
        x, y, yaw, drive, time = frame
        boxes = nearby(world, int(drive), float(time), np.array([x, y]), trip)
        solids = solids_from_boxes(
            boxes.centre, boxes.size, boxes.yaw, boxes.rgb, boxes.kind, np.array([x, y]), MAX_SOLIDS
        )
        level = transform_from_xyyaw(0.0, 0.0, yaw)
        turned = transform_from_xyyaw(0.0, 0.0, -turn)
        car, road = np.eye(4), np.eye(4)
        car[:3, :3] = Rotation.from_euler("yx", rng.normal(0, TILT_RAD, 2)).as_matrix()
        road[:3, :3] = Rotation.from_euler("yx", rng.normal(0, UNTOLD_TILT_RAD, 2)).as_matrix()
        network = self.config.network
        matrices, cameras, projections = [], [], []
        for camera in rig:
            k = network_intrinsics(camera.intrinsics, camera.width, camera.height, network)
            matrices.append(k)
            cameras.append(level @ road @ car @ camera.base_from_camera)
            base_from_camera = turned @ car @ camera.base_from_camera
            projections.append(unit_projection(k, base_from_camera, network.input_width, network.input_height))
        return (
            torch.from_numpy(slope_of(road, np.mean([c.base_from_camera[2, 3] for c in rig]), turn)).float(),
            _tensor(matrices),
            _tensor(cameras),
            _tensor(projections),
            draw_truth(city, x, y, yaw + turn, network),
            (solids.centre, solids.size, solids.yaw, solids.rgb, solids.kind),
        )


def _changed_s(world: World) -> NDArray[np.float64]:
    """Return [F] when what each frame of a world shows changes, s since 1970."""
    near = cKDTree(world.changed_xy).query(world.frames[:, :2])[0] < NEAR_CHANGE_M
    return np.where(near, world.changed_s, np.inf)


def slope_of(tilt: NDArray[np.float64], height_m: float, turn: float) -> NDArray[np.float64]:
    """Return the slope [2] of level ground (:attr:`Group.slope`) in the frame of a car that leans.

    :param tilt: [4, 4] level frame from the car's, which its pose takes for level
    :param height_m: of the cameras above the ground
    :param turn: the ego frame is turned by this angle (rad) against the car
    """
    # On the ground the third coordinate in the level frame is zero.
    rise = -tilt[2, :2] / tilt[2, 2] / height_m
    c, s = np.cos(turn), np.sin(turn)
    return np.array([c * rise[0] + s * rise[1], c * rise[1] - s * rise[0]])


def nearby(world: World, drive: int, time_s: float, about: NDArray[np.float64], trip: int = 0) -> Boxes:
    """Return scenery and traffic around a place (m) at a time (s) of a drive that was made ``trip`` times before."""
    parts = [world.scenery, world.traffic[drive][trip].at(time_s)]
    return Boxes.joined([nearest(part, about, SOLIDS_RADIUS_M, MAX_SOLIDS) for part in parts])


def _tensor(matrices: list[NDArray[np.float64]]) -> Tensor:
    return torch.from_numpy(np.stack(matrices)).float()
