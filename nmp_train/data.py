"""Training samples: groups of frames around one place, rendered later on the training device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.utils.data import Dataset

from nmp.frame import Camera
from nmp.geometry import BevGrid, transform_from_xyyaw
from nmp.model.config import NetworkConfig
from nmp.model.preprocess import network_intrinsics, unit_projection
from nmp.truth import rasterize
from nmp_train.sim.boxes import Boxes, nearest
from nmp_train.sim.render import MAX_SOLIDS, solids_from_boxes
from nmp_train.sim.rig import log_rig
from nmp_train.world import World

SOLIDS_RADIUS_M = 120.0


@dataclass
class Group:
    """T frames near each other; batching puts B in front. All relative to ``centre``."""

    city: Tensor
    """[] int64 index of the world"""
    centre: Tensor
    """[T, 2] float64 map position of each frame, m"""
    pose: Tensor
    """[T, 3] x, y (m) relative to the first frame's centre, yaw (rad)"""
    intrinsics: Tensor
    """[T, 6, 3, 3] of the network input"""
    map_from_camera: Tensor
    """[T, 6, 4, 4] relative to the frame's centre"""
    pixel_from_base: Tensor
    """[T, 6, 3, 4] what the network is told"""
    solids: tuple[Tensor, ...]
    """fields of Solids, each [T, K, ...]"""
    truth: Tensor
    """[T, 3, rows, cols] uint8"""

    def pin_memory(self) -> Group:
        """Return it in pinned memory: the data loader calls this, so that copies to the GPU wait for nothing."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        solids = tuple(part.pin_memory() for part in values.pop("solids"))
        return Group(solids=solids, **{name: value.pin_memory() for name, value in values.items()})


def collate(groups: Sequence[Group]) -> Group:
    """Stack groups into a batch."""
    values: dict[str, Any] = {}
    for field in fields(Group):
        items = [getattr(g, field.name) for g in groups]
        if field.name == "solids":
            values[field.name] = tuple(torch.stack(part) for part in zip(*items, strict=True))
        else:
            values[field.name] = torch.stack(items)
    return Group(**values)


class SimulatedGroups(Dataset[Group]):
    """Groups of ``group`` frames of one place, from any drive, at any time.

    The first frame is drawn uniformly; the others lie within ``radius_m`` of it, with any heading, so that
    the prior of a place is made of approaches, departures and other drives.
    """

    def __init__(
        self,
        worlds: Sequence[World],
        config: NetworkConfig,
        *,
        group: int,
        radius_m: float,
        seed: int,
        length: int,
        tilt_rad: float = 0.01,
    ) -> None:
        self.worlds = worlds
        self.config = config
        self.group = group
        self.radius_m = radius_m
        self.seed = seed
        self.length = length
        self.tilt_rad = tilt_rad
        self.counts = np.array([len(w.frames) for w in worlds])
        self.grid: BevGrid = config.layer_grid

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Group:
        rng = np.random.default_rng((self.seed, index))
        which = int(rng.choice(len(self.worlds), p=self.counts / self.counts.sum()))
        world = self.worlds[which]
        first = int(rng.integers(len(world.frames)))
        chosen = [first]
        if self.group > 1:
            near = np.array(world.index.query_ball_point(world.frames[first, :2], self.radius_m))
            near = near[near != first]
            if len(near) == 0:
                near = np.array([first])
            chosen += [int(i) for i in rng.choice(near, self.group - 1, replace=len(near) < self.group - 1)]
        rig = log_rig(str(rng.choice(["n008", "n015"])), int(rng.integers(2**31)))
        parts = [self._frame(world, rig, i, rng) for i in chosen]
        intrinsics, map_from_camera, pixel_from_base, truth, solids = zip(*parts, strict=True)
        frames = world.frames[chosen]
        relative = np.column_stack([frames[:, :2] - frames[0, :2], frames[:, 2]])
        return Group(
            city=torch.tensor(which),
            centre=torch.from_numpy(frames[:, :2].copy()),
            pose=torch.from_numpy(relative).float(),
            intrinsics=torch.stack(intrinsics),
            map_from_camera=torch.stack(map_from_camera),
            pixel_from_base=torch.stack(pixel_from_base),
            solids=tuple(torch.cat(part) for part in zip(*solids, strict=True)),
            truth=torch.stack(truth),
        )

    def _frame(
        self, world: World, rig: Sequence[Camera], index: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        x, y, yaw, drive, time = world.frames[index]
        boxes = nearby(world, int(drive), float(time), np.array([x, y]))
        solids = solids_from_boxes(
            boxes.centre, boxes.size, boxes.yaw, boxes.rgb, boxes.kind, np.array([x, y]), MAX_SOLIDS
        )
        level = transform_from_xyyaw(0.0, 0.0, yaw)
        car = np.eye(4)
        car[:3, :3] = Rotation.from_euler("yx", rng.normal(0, self.tilt_rad, 2)).as_matrix()
        matrices, cameras, projections = [], [], []
        for camera in rig:
            k = network_intrinsics(camera.intrinsics, camera.width, camera.height, self.config)
            matrices.append(k)
            cameras.append(level @ car @ camera.base_from_camera)
            projections.append(
                unit_projection(k, car @ camera.base_from_camera, self.config.input_width, self.config.input_height)
            )
        return (
            _tensor(matrices),
            _tensor(cameras),
            _tensor(projections),
            torch.from_numpy(rasterize(world.city, x, y, yaw, self.grid)),
            (solids.centre, solids.size, solids.yaw, solids.rgb, solids.kind),
        )


def nearby(world: World, drive: int, time_s: float, about: NDArray[np.float64]) -> Boxes:
    """Return scenery and traffic around a place (m) at a time (s) of a drive."""
    parts = [world.scenery, world.traffic[drive].at(time_s)]
    return Boxes.joined([nearest(part, about, SOLIDS_RADIUS_M, MAX_SOLIDS) for part in parts])


def _tensor(matrices: list[NDArray[np.float64]]) -> Tensor:
    return torch.from_numpy(np.stack(matrices)).float()
