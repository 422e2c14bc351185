"""Scores of held-out worlds while training, on drives rendered as they are needed.

Each drive is made several times, in a weather and among road users of its own each time. The first time the map is
empty; afterwards it holds what the earlier times left. That is what the mapper does online, with the map on the
training device.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from nmp.geometry import BevGrid
from nmp.metrics import IouMeter, distance_edges
from nmp.model import BEVNetwork, fusion
from nmp.model.runner import window_side
from nmp.truth import rasterize
from nmp_train.config import TrainConfig
from nmp_train.data import Group, SimulatedGroups, SimulatedSource, collate
from nmp_train.recordings import weather_rows
from nmp_train.score import Scores
from nmp_train.step import autocast
from nmp_train.world import World

FRAMES = 48
"""frames that are rendered together"""
POSE_ERRORS = ((0.0, 0.0), (0.2, 0.02), (1.0, math.radians(2.0)))
"""standard deviations of the error of every single pose, m and rad"""
TRIPS = ("empty", "one trip before", "two trips before", "three trips before")
NEAR_CHANGE_M = 2.0
"""what lies this near to a line that was drawn or removed counts as changed"""


@dataclass
class _Drive:
    """What is kept of one drive: features instead of images, to be fused again and again."""

    bev: Tensor
    """[T, C, rows, cols] half precision"""
    truth: Tensor
    """[T, 3, rows, cols] uint8"""
    pose: Tensor
    """[T, 3] in the frame of the drive's first trip"""
    labels: list[str]
    """what all its frames are filed under"""
    changed: Tensor | None
    """[T, rows, cols] cells where the map changes after the first trip, in a world that changes"""


class _Trips(Dataset[tuple[Group, Tensor | None]]):
    """The first drives of every world, each ``trips`` times."""

    def __init__(self, groups: SimulatedGroups, drives: int, trips: int, weather: str | None) -> None:
        self.groups, self.weather = groups, weather
        self.jobs = [
            (world, drive, trip)
            for world, made in enumerate(groups.worlds)
            for drive in range(min(drives, len(made.drives)))
            for trip in range(trips)
        ]

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> tuple[Group, Tensor | None]:
        number, drive, trip = self.jobs[index]
        world = self.groups.worlds[number]
        rows = np.flatnonzero(world.frames[:, 3] == drive)[:FRAMES]
        # A world that changes does so between the first trip and the second.
        state = min(trip, len(world.states) - 1)
        rng = np.random.default_rng((77, number, drive, trip))
        group = self.groups.make(number, rows, rng, state=state, trip=trip, weather=self.weather)
        if len(world.states) == 1:
            return group, None
        return group, torch.from_numpy(np.stack([self._changed(world, *world.frames[row, :3]) for row in rows]))

    def _changed(self, world: World, x: float, y: float, yaw: float) -> NDArray[np.uint8]:
        grid = self.groups.config.network.layer_grid
        before, after = (rasterize(state.city, x, y, yaw, grid) for state in world.states[:2])
        reach = round(NEAR_CHANGE_M / grid.resolution)
        around = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
        return np.asarray(cv2.dilate((before != after).any(axis=0).astype(np.uint8), around))


def _one(items: list[tuple[Group, Tensor | None]]) -> tuple[Group, Tensor | None]:
    return collate([items[0][0]]), items[0][1]


@torch.inference_mode()
def validate(
    network: BEVNetwork,
    source: SimulatedSource,
    config: TrainConfig,
    *,
    drives: int,
    trips: int,
    with_prior: bool = True,
    weather: str | None = None,
    errors: Sequence[tuple[float, float]] = POSE_ERRORS,
) -> Scores:
    """Score the worlds of a source without prior, with a map that starts empty, and with the map of earlier trips.

    :param drives: drives of each world
    :param trips: times that each is driven, 1 to 4; a world that changes does so after the first
    :param with_prior: False scores single frames only
    :param weather: day, rain or night, of all trips; None: drawn for each
    :param errors: of every single pose, standard deviations in m and rad
    :return: IoU in percent by system (``no prior``, ``empty``, ... also with errors of the pose, and again for the
        cities that change), by part of the set
        (``all``, weather, difficulty, rings of distance; with a prior also rings of the nearest view so far,
        this one or an earlier one), by class
    """
    network.eval()
    stage = dataclasses.replace(config.stages[-1], group=1, batch=1)
    groups = SimulatedGroups(source.worlds, config, stage, seed=77, length=1, first=source.first)
    todo = _Trips(groups, drives, trips, weather)
    loader = DataLoader(
        todo,
        batch_size=1,
        collate_fn=_one,
        num_workers=config.workers,
        multiprocessing_context="fork" if config.workers else None,
        pin_memory=source.device.type == "cuda",
    )
    found: list[_Drive] = []
    for group, changed in tqdm(loader, desc="validation", unit="drive", total=len(todo)):
        found.append(_encode(network, source, config, group, changed))
    lanes = [found[i : i + trips] for i in range(0, len(found), trips)]
    counter = _Counter(config.network.layer_grid, source.device)
    with autocast(config, source.device):
        for prefix, changing in (("", False), ("changing city, ", True)):
            some = [lane for lane in lanes if (lane[0].changed is not None) is changing]
            by_trip = [[lane[i] for lane in some] for i in range(trips)]
            # The first trip shows the city before the change.
            for drive in itertools.chain(*by_trip[1 if changing and trips > 1 else 0 :]):
                for part in torch.arange(len(drive.bev)).split(8):
                    counter.add(f"{prefix}no prior", network.alone(drive.bev[part].float()).logits, drive, part)
            if some and with_prior:
                for error in errors:
                    _drive_all(network, by_trip, error, counter, source.device, prefix)
    return counter.percent()


def _encode(
    network: BEVNetwork, source: SimulatedSource, config: TrainConfig, group: Group, changed: Tensor | None
) -> _Drive:
    batch = source.batch(group)
    with autocast(config, source.device):
        bev = torch.cat(
            [
                network.encode(*parts)
                for parts in zip(
                    batch.images.split(8), batch.pixel_from_base.split(8), batch.present.split(8), strict=True
                )
            ]
        )
    first = batch.pose[0, :1].clone()
    first[:, 2] = 0
    return _Drive(
        bev.half(), batch.truth, batch.pose[0] - first, [*weather_rows(batch.weather[0]), batch.labels[0]], changed
    )


def _drive_all(
    network: BEVNetwork,
    trips: Sequence[Sequence[_Drive]],
    error: tuple[float, float],
    counter: _Counter,
    device: torch.device,
    prefix: str,
) -> None:
    """Make all trips, side by side for all drives, each on a map of its own."""
    net = network.config
    side = window_side(net)
    cell = net.prior_cell
    paths = [torch.cat([trip[i].pose[:, :2] for trip in trips]).cpu() for i in range(len(trips[0]))]
    low = [torch.floor(path.amin(0) / cell).long() - side for path in paths]
    size = [torch.ceil(path.amax(0) / cell).long() + side - a for path, a in zip(paths, low, strict=True)]
    maps = [fusion.Memory.empty(1, network.state_channels, int(s[1]), int(s[0]), device) for s in size]
    # How near each cell was ever seen, as metres short of the reach: zero, which is what lies outside, is never.
    nearness = [torch.zeros(1, 1, int(s[1]), int(s[0]), device=device) for s in size]
    ahead = counter.reach - torch.as_tensor(net.feature_grid.centres(), dtype=torch.float32).norm(dim=-1).to(device)
    ahead = ahead.view(1, 1, *net.feature_grid.shape)
    spread = torch.tensor([error[0], error[0], error[1]])
    told = spread[1:].to(device)
    generator = torch.Generator().manual_seed(5)
    name = f" at {error[0]:g} m, {error[1]:.3g} rad" if error[0] else ""
    for number, made in enumerate(trips):
        for t in range(max(len(d.pose) for d in made)):
            active = [i for i, d in enumerate(made) if t < len(d.pose)]
            true = torch.stack([made[i].pose[t].cpu() for i in active])
            pose = true + torch.randn(len(active), 3, generator=generator) * spread
            corner = [torch.floor(pose[k, :2] / cell).long() - side // 2 for k in range(len(active))]
            # A pose that is far off may reach beyond the map that was made for the true ones.
            corner = [c.clamp(low[i], low[i] + size[i] - side) for c, i in zip(corner, active, strict=True)]
            spots = []
            for c, i in zip(corner, active, strict=True):
                col, row = (c - low[i]).tolist()
                spots.append((slice(None), slice(None), slice(row, row + side), slice(col, col + side)))
            memory = fusion.Memory(
                *(torch.cat([maps[i][part][spot] for i, spot in zip(active, spots, strict=True)]) for part in (0, 1))
            )
            bev = torch.stack([made[i].bev[t] for i in active]).float()
            origin = torch.stack(corner).float() * cell
            pose, origin = pose.to(device), origin.to(device)
            output, memory = network.step(bev, memory, pose, origin, spread=told.expand(len(active), 2))
            near = torch.cat([nearness[i][spot] for i, spot in zip(active, spots, strict=True)])
            before = fusion.map_to_ego(near, pose, net.layer_grid, origin, cell, "nearest")
            seen = ahead.expand(len(active), -1, -1, -1)
            near = torch.maximum(
                near, fusion.ego_to_map(seen, pose, net.feature_grid, origin, cell, side, side, "nearest")
            )
            for k, (i, spot) in enumerate(zip(active, spots, strict=True)):
                maps[i].latent[spot] = memory.latent[k]
                maps[i].evidence[spot] = memory.evidence[k]
                nearness[i][spot] = near[k]
                frame = (output.logits[k : k + 1], made[i], torch.tensor([t]))
                counter.add(f"{prefix}{TRIPS[number]}{name}", *frame, earlier=before[k])


class _Counter:
    """Intersections and unions by system and part, counted on the device."""

    def __init__(self, grid: BevGrid, device: torch.device) -> None:
        centres = torch.as_tensor(grid.centres(), dtype=torch.float32)
        distance = centres.norm(dim=-1).view(grid.shape).to(device)
        edges = list(itertools.pairwise(distance_edges(grid)))
        self.edges = torch.tensor(edges, device=device)
        self.rings = [f"{near:.0f}-{far:.0f} m" for near, far in edges]
        self.nearest = [f"nearest view {ring}" for ring in self.rings]
        self.reach = edges[-1][1]
        self.distance = distance
        self.masks = torch.cat([torch.ones(1, distance.numel(), device=device), self._in_rings(distance)])
        self.found: list[tuple[str, int, list[str], list[str], Tensor]] = []

    def _in_rings(self, distance: Tensor) -> Tensor:
        """Return [rings, cells] 1 where a distance [rows, cols] lies in a ring."""
        flat = distance.flatten()
        return ((flat >= self.edges[:, :1]) & (flat < self.edges[:, 1:])).float()

    def add(self, system: str, logits: Tensor, drive: _Drive, frames: Tensor, *, earlier: Tensor | None = None) -> None:
        """Count frames of a drive: ``logits`` [F, 3, rows, cols].

        :param earlier: [1, rows, cols] of one frame: how near its cells were seen before, in metres short of the reach
        """
        truth = drive.truth[frames] > 0
        predicted = logits > 0
        pair = torch.stack([predicted & truth, predicted | truth]).flatten(3).float()  # [2, F, 3, cells]
        counts = [pair.sum(dim=1) @ self.masks.T]  # [2, 3, 1 + rings]
        parts = list(self.rings)
        if earlier is not None:
            nearest = torch.minimum(self.reach - earlier[0], self.distance)
            counts.append(pair.sum(dim=1) @ self._in_rings(nearest).T)
            parts += self.nearest
        if drive.changed is not None:
            changed = drive.changed[frames].to(pair.device).flatten(1).float()[:, None]  # [F, 1, cells]
            counts += [(pair * mask).sum(dim=(1, 3))[..., None] for mask in (changed, 1 - changed)]
            parts += ["changed", "unchanged"]
        self.found.append((system, len(frames), drive.labels, parts, torch.cat(counts, dim=-1).double()))

    def percent(self) -> Scores:
        meters: dict[str, dict[str, IouMeter]] = {}
        for system, frames, labels, parts, counted in self.found:
            intersection, union = counted.cpu().numpy().astype(np.int64)
            columns = [
                ("all", 0),
                *((label, 0) for label in labels if label),
                *((p, k + 1) for k, p in enumerate(parts)),
            ]
            for part, column in columns:
                meter = meters.setdefault(system, {}).setdefault(part, IouMeter())
                meter.intersection += intersection[:, column]
                meter.union += union[:, column]
                meter.frames += frames
        return {
            system: {part: found[part].percent() for part in self._sorted(found)} for system, found in meters.items()
        }

    def _sorted(self, parts: Iterable[str]) -> list[str]:
        found = set(parts)
        behind = (*self.rings, *self.nearest, "changed", "unchanged")
        labels = sorted(found - {"all", *behind})
        return [p for p in ("all", *labels, *behind) if p in found]
